"""Lengths, angles and areas: of one structure from its region of pixels, and of a column from its end plates."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from kernels.corners import Field, Plate, Vector
from kernels.mask import bounds


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
    part = pixels[bounds(pixels)]
    count = int(part.sum())
    if count < 3:
        return Size(0.0, 0.0, float(count) * spacing[0] * spacing[1])
    # The rectangle encloses all pixels where it encloses the first and the last of each row.
    rows = np.flatnonzero(part.any(axis=1))
    first, last = part[rows].argmax(axis=1), part.shape[1] - 1 - part[rows, ::-1].argmax(axis=1)
    points = np.stack([np.concatenate([first, last]) * spacing[1], np.tile(rows, 2) * spacing[0]], 1).astype(np.float32)
    (_, _), (a, b), _ = cv2.minAreaRect(points)
    # Points are pixel centres: one pixel more along each side.
    pixel = float(np.sqrt(spacing[0] * spacing[1]))
    depth = max(a, b) + pixel
    area = float(count) * spacing[0] * spacing[1]
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
    """As `canal_chords`, of one disc."""
    return canal_chords(canal, at[None], back[None], np.array([height]), np.array([depth]))[0]


def canal_chords(canal: Field, at: Vector, back: Vector, height: Vector, depth: Vector) -> list[Chord | None]:
    """The least diameter of the canal at right angles to its own axis, within the height of each of N discs; all at once, which
    takes hardly longer than one.

    `at` N x 2 are the back ends of the discs, `back` N x 2 the unit vectors along their middle planes; `height` and `depth` are
    the discs'. None where no canal lies there, or where it does not run beside the disc.
    """
    out: list[Chord | None] = [None] * len(at)
    which = np.arange(len(at))
    middle, across = at, back

    offset = canal.chords(middle, across, 1.5 * depth).mean(1)
    seen = np.abs(offset) <= depth  # nor where the line does not meet the canal
    which = which[seen]
    middle, across, back, height, depth, offset = _where(seen, middle, across, back, height, depth, offset)
    middle = middle + across * offset[:, None]
    for _ in range(2):
        points = middle[:, None] + np.array([[-0.3], [0.3]]) * depth[:, None, None] * _normal(across)[:, None]
        offsets = _chords(canal, points, across, depth).mean(2)
        ends = points + offsets[:, :, None] * across[:, None]
        # Where the canal ends within the disc's reach its tip would pass for a stenosis.
        seen = np.isfinite(offsets).all(1)
        which = which[seen]
        middle, back, height, depth, run = _where(seen, middle, back, height, depth, ends[:, 1] - ends[:, 0])
        across = np.stack([run[:, 1], -run[:, 0]], 1) / np.hypot(run[:, 0], run[:, 1])[:, None]
        across = np.where((across * back).sum(1, keepdims=True) < 0, -across, across)
        offset = canal.chords(middle, across, depth).mean(1)
        seen = np.isfinite(offset)
        which = which[seen]
        middle, across, back, height, depth, offset = _where(seen, middle, across, back, height, depth, offset)
        middle = middle + across * offset[:, None]
    starts = middle[:, None] + np.linspace(-0.5, 0.5, 11)[:, None] * height[:, None, None] * _normal(across)[:, None]
    found = _chords(canal, starts, across, depth)
    for i, start, ends, way, most in zip(which, starts, found, across, depth, strict=True):
        lengths = ends[:, 1] - ends[:, 0]
        if np.isfinite(lengths).all():
            k = int(lengths.argmin())
            chord = Chord(start[k] + way * ends[k, 0], start[k] + way * ends[k, 1])
            out[i] = chord if chord.length < most else None
    return out


def _where(seen: NDArray[np.bool_], *rows: Vector) -> list[Vector]:
    return [row[seen] for row in rows]


def _normal(across: Vector) -> Vector:
    """N x 2 vectors, each turned by a right angle."""
    return np.stack([-across[:, 1], across[:, 0]], 1)


def _chords(canal: Field, points: NDArray[np.float64], across: Vector, reach: Vector) -> NDArray[np.float64]:
    """`Field.chords` through K points at each of N places, N x K x 2, along one vector at each place: N x K x 2."""
    count = points.shape[1]
    found = canal.chords(points.reshape(-1, 2), np.repeat(across, count, 0), np.repeat(reach, count))
    return found.reshape(points.shape)
