"""Lengths, angles and areas: of one structure from its region of pixels, and of a column from its end plates."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from kernels.corners import Field, Plate, Vector


@dataclass(frozen=True)
class Size:
    """Height and depth (length along the structure), and area; in millimetres where spacing was given, else pixels."""

    height: float
    depth: float
    area: float


def disc_size(pixels: NDArray[np.bool_], spacing: tuple[float, float] = (1.0, 1.0)) -> Size:
    """Size of a disc seen from the side. `spacing` is (row, column) in mm per pixel, or (1, 1) for pixels.

    The depth is the long side of the smallest enclosing rectangle; the height is area / depth, the mean height along the
    disc, after the area-based disc height index of Pfirrmann et al., Journal of Orthopaedic Research 2006.
    """
    rows, columns = np.flatnonzero(pixels.any(axis=1)), np.flatnonzero(pixels.any(axis=0))
    part = pixels[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] if rows.size else pixels[:0, :0]
    ys, xs = np.nonzero(part)
    if xs.size < 3:
        return Size(0.0, 0.0, float(xs.size) * spacing[0] * spacing[1])
    points = np.stack([xs * spacing[1], ys * spacing[0]], 1).astype(np.float32)
    (_, _), (a, b), _ = cv2.minAreaRect(points)
    # Points are pixel centres: one pixel more along each side.
    pixel = float(np.sqrt(spacing[0] * spacing[1]))
    depth = max(a, b) + pixel
    area = float(xs.size) * spacing[0] * spacing[1]
    return Size(area / depth, depth, area)


def opening_deg(above: Plate, below: Plate, up: Vector) -> float:
    """Angle between two end plates, positive where they open to the front (lordosis), after Cobb: the angle of the lines through
    their rims. `up` points roughly to the head."""
    a, b = above.direction, below.direction
    cross = float(a[0] * b[1] - a[1] * b[0])
    # The sign of a turn depends on which way the patient looks.
    looks = 1.0 if float(up[0] * a[1] - up[1] * a[0]) > 0 else -1.0
    return float(np.rad2deg(-looks * np.arctan2(cross, float(a @ b))))


def heights(upper: Plate, lower: Plate) -> tuple[float, float, float]:
    """(front, middle, back) distance of two end plates that belong to one vertebral body: six-point morphometry."""
    return tuple(float(np.hypot(*(a - b))) for a, b in zip(_points(upper), _points(lower), strict=True))  # type: ignore[return-value]


def gaps(upper: Plate, lower: Plate) -> tuple[float, float, float]:
    """(front, middle, back) distance of two facing end plates along the normal of their bisector, so that a slip does not
    lengthen it, after Frobin et al., Clinical Biomechanics 1997."""
    along = upper.direction + lower.direction
    normal = np.array([along[1], -along[0]]) / np.hypot(*along)
    if float(normal @ (upper.middle - lower.middle)) < 0:
        normal = -normal
    return tuple(float((a - b) @ normal) for a, b in zip(_points(upper), _points(lower), strict=True))  # type: ignore[return-value]


def _points(plate: Plate) -> tuple[Vector, Vector, Vector]:
    return plate.front, plate.middle, plate.back


def slip(above: Plate, below: Plate) -> float:
    """How far the posterior rim of the vertebra above stands in front of that of the vertebra below, along the latter's upper
    end plate; negative behind it. `above` is the lower end plate of the upper vertebra, `below` the upper one of the lower."""
    return -float((above.back - below.back) @ below.direction)


def meyerding(share: float, floor: float) -> int:
    """Grade 1 to 5 by quarters of the end plate (Meyerding, Surgery, Gynecology and Obstetrics 1932), of a slip to either side;
    0 where it is less than `floor`."""
    size = abs(share)
    return 0 if size < floor else 5 if size > 1 else max(1, int(np.ceil(4 * size - 1e-9)))


def genant(loss: float) -> int:
    """Grade of a vertebral fracture by its loss of height as a share: 1 mild from .20, 2 moderate from .25, 3 severe above .40;
    0 below (Genant et al., Journal of Bone and Mineral Research 1993)."""
    return 0 if loss < 0.20 else 1 if loss < 0.25 else 2 if loss <= 0.40 else 3


@dataclass(frozen=True)
class Chord:
    """The narrowest way across a canal: its end towards the disc, its end away from it."""

    front: Vector
    back: Vector

    @property
    def length(self) -> float:
        return float(np.hypot(*(self.back - self.front)))


def canal_chord(canal: Field, at: Vector, back: Vector, height: float, depth: float) -> Chord | None:
    """The least diameter of the canal at right angles to its own axis, within the height of a disc.

    `at` is the back end of the disc, `back` the unit vector along its middle plane; `height` and `depth` are the disc's. None
    where no canal lies there, or where it does not run beside the disc.
    """
    ends = canal.chords(at[None], back, 1.5 * depth)[0]
    if not np.isfinite(ends).all() or abs(ends.mean()) > depth:
        return None
    across, middle = back, at + back * ends.mean()
    for _ in range(2):
        axis = np.array([-across[1], across[0]])
        points = middle + np.array([[-0.3], [0.3]]) * depth * axis
        offsets = canal.chords(points, across, depth).mean(1, keepdims=True)
        # Where the canal ends within the disc's reach its tip would pass for a stenosis.
        if not np.isfinite(offsets).all():
            return None
        run = np.diff(points + offsets * across, axis=0)[0]
        across = np.array([run[1], -run[0]]) / np.hypot(*run)
        if float(across @ back) < 0:
            across = -across
        offset = canal.chords(middle[None], across, depth)[0].mean()
        if not np.isfinite(offset):
            return None
        middle = middle + across * offset
    axis = np.array([-across[1], across[0]])
    starts = middle + np.linspace(-0.5, 0.5, 11)[:, None] * height * axis
    found = canal.chords(starts, across, depth)
    lengths = found[:, 1] - found[:, 0]
    if not np.isfinite(lengths).all():
        return None
    i = int(lengths.argmin())
    chord = Chord(starts[i] + across * found[i, 0], starts[i] + across * found[i, 1])
    return chord if chord.length < depth else None
