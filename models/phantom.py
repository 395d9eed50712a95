"""A synthetic mid-sagittal lumbar MRI with exact truth: the demonstration study, the CI input, the default calibration set.

Hides the anatomy (a chain of end plates with lordosis, tissues painted over one another in millimetres), the physics
that makes it look acquired (surface coil, point spread, Rician noise) and the DICOM object around it. No patient is in
it, so it may be shown, shipped and published. Deterministic: the same generator state gives the same bytes.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import cv2
import numpy as np
from numpy.typing import NDArray

from appliance.errors import UsageError
from appliance.report import DISCLAIMER, Box

Points = NDArray[np.float64]
Plane = NDArray[np.float32]

VERTEBRAE = ("L5", "L4", "L3", "L2", "L1", "T12", "T11", "T10", "T9", "T8", "T7", "T6", "T5", "T4", "T3", "T2")
TYPICAL_HW = ((384, 384), (448, 448), (512, 512), (512, 448), (640, 512))
MIN_SIDE, MAX_SIDE = 96, 2048
DEMO_SEED = 7

_SUPERSAMPLING = 2
_SACRAL_HOLLOW = 0.4  # mm
_CANAL_REACH = 45.0  # mm; no canal is as wide
# Share of the lordosis that each (disc, body) turns, from L5/S1 upwards; negative where kyphosis begins.
_TURN = (
    (0.25, 0.13), (0.20, 0.05), (0.15, 0.02), (0.10, 0.0), (0.07, -0.01), (0.03, -0.03), (0.0, -0.05), (-0.01, -0.07),
)  # fmt: skip
_HEIGHT_OF_GRADE = (1.0, 0.98, 0.9, 0.72, 0.45)
_T2_NUCLEUS = (0.92, 0.76, 0.40, 0.19, 0.08)
_T1_NUCLEUS = (0.36, 0.35, 0.33, 0.29, 0.24)
_BULGE_ODDS = (0.02, 0.12, 0.4, 0.6, 0.7)
_HERNIA_ODDS = (0.0, 0.03, 0.12, 0.25, 0.3)
_TISSUE = {
    "T2": {"csf": 1.0, "fat": 0.8, "marrow": 0.5, "cortex": 0.06, "ligament": 0.08, "muscle": 0.17, "cord": 0.45, "nerve": 0.42,
           "vessel": 0.05, "bowel": 0.3, "annulus": 0.1, "vein": 0.7, "fluid": 0.95},
    "T1": {"csf": 0.16, "fat": 0.9, "marrow": 0.56, "cortex": 0.06, "ligament": 0.08, "muscle": 0.26, "cord": 0.33, "nerve": 0.27,
           "vessel": 0.06, "bowel": 0.3, "annulus": 0.22, "vein": 0.3, "fluid": 0.17},
}  # fmt: skip

_CANAL, _SACRUM, _DISC, _SPINOUS = 200, 220, 50, 100
_CLASS_OF = np.zeros(256, dtype=np.uint8)
_CLASS_OF[1 : 1 + len(VERTEBRAE)] = 1
_CLASS_OF[_SPINOUS : _SPINOUS + len(VERTEBRAE)] = 1
_CLASS_OF[_DISC : _DISC + len(VERTEBRAE)] = 2
_CLASS_OF[_CANAL] = 3


@dataclass(frozen=True)
class Deformity:
    """What is wrong with a phantom's column on purpose. Levels are those of VERTEBRAE and "L4/L5" and the like.

    `slip_mm`: disc -> how far all above it is moved to the front, -15 to 30. `height_loss`: vertebra -> (loss of the anterior,
    loss of the middle height), shares of the posterior one, 0 to 0.6. `stenosis_mm`: disc -> how much the canal loses, 0 to 8.
    """

    slip_mm: Mapping[str, float] = field(default_factory=dict)
    height_loss: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    stenosis_mm: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class PlateTruth:
    """One end plate as (x, y) in pixel edges: its two rims, where the body's sides would meet it without rounding, and its middle,
    which lies deeper by its hollow."""

    anterior_px: tuple[float, float]
    middle_px: tuple[float, float]
    posterior_px: tuple[float, float]


@dataclass(frozen=True)
class DiscTruth:
    """One disc: `level` such as "L4/L5", `box_px` edges around all of it including what protrudes, what ails it.

    `heights_mm` (anterior, middle, posterior) between the facing end plates, along the normal of their bisector;
    `mean_height_mm` area over depth of what was painted; `angle_deg` between the facing end plates, `segment_deg` from the
    upper end plate of the vertebra above to the lower one of the vertebra below (L5/S1: to the upper one of S1), both positive
    where they open to the front; `slip_mm` of the vertebra above to the front along the end plate below, `slip_percent` of its
    length; `canal_mm` the least diameter of the canal within the height of the disc.
    """

    level: str
    box_px: Box
    pfirrmann: int
    herniation: bool
    narrowing: bool
    bulging: bool
    heights_mm: tuple[float, float, float]
    mean_height_mm: float
    angle_deg: float
    segment_deg: float
    slip_mm: float
    slip_percent: float
    canal_mm: float


@dataclass(frozen=True)
class VertebraTruth:
    """One vertebra: `level` such as "L5", `box_px` edges around its body without the spinous process, its end plates.

    `heights_mm` (anterior, middle, posterior) between them; `wedge_deg` positive where the front is the higher one.
    """

    level: str
    box_px: Box
    upper: PlateTruth
    lower: PlateTruth
    heights_mm: tuple[float, float, float]
    wedge_deg: float


@dataclass(frozen=True)
class Truth:
    """What `draw` drew.

    `mask` is H x W uint8: 0 background, 1 vertebra (bodies and spinous processes), 2 disc, 3 canal. The sacrum is
    background. `discs` and `vertebrae` run from the lowest upwards and hold those at least half inside the field of
    view, their boxes clipped to it; the mask shows whatever part is visible. `sacrum_box` encloses the S1 body, None
    where it is out of view, `sacral_plate` its upper end plate in or out of view. `lordosis_deg` is the angle from the upper
    end plate of L1 to that of S1. `spacing_mm` is (row, column).
    """

    mask: NDArray[np.uint8]
    discs: tuple[DiscTruth, ...]
    vertebrae: tuple[VertebraTruth, ...]
    sacrum_box: Box | None
    spacing_mm: tuple[float, float]
    weighting: str
    sacral_plate: PlateTruth
    lordosis_deg: float


@dataclass(frozen=True)
class _Plate:
    """One end plate: centre in mm, tilt in radians (positive: its front edge is lower), half depth in mm."""

    centre: Points
    tilt: float
    half: float

    @property
    def up(self) -> Points:
        return np.array([-np.sin(self.tilt), -np.cos(self.tilt)])

    @property
    def back(self) -> Points:
        return np.array([np.cos(self.tilt), -np.sin(self.tilt)])

    @property
    def anterior(self) -> Points:
        return self.centre - self.back * self.half

    @property
    def posterior(self) -> Points:
        return self.centre + self.back * self.half

    @classmethod
    def between(cls, anterior: Points, posterior: Points) -> _Plate:
        across = posterior - anterior
        return cls((anterior + posterior) / 2, float(np.arctan2(-across[1], across[0])), float(np.hypot(*across)) / 2)

    def moved(self, distance: float, turn: float, half: float) -> _Plate:
        """The next plate, `distance` mm upwards along an arc that turns by `turn` radians."""
        tilt = self.tilt - turn / 2
        step = np.array([-np.sin(tilt), -np.cos(tilt)]) * distance
        return _Plate(self.centre + step, self.tilt - turn, half)


@dataclass(frozen=True)
class _Disc:
    lower: _Plate
    upper: _Plate
    grade: int
    height: float
    protrusion: float
    migrates: float
    herniation: bool
    narrowing: bool
    bulging: bool

    @property
    def inset(self) -> float:
        """Share of the way to its plates that the disc fills; the rest is their cartilage."""
        return max(0.86, 1 - 0.8 / self.height)


def _mm(x: float, y: float) -> Points:
    return np.array([x, y], dtype=np.float64)


def _squircle(exponent: float, count: int = 72) -> tuple[Points, Points]:
    """Unit outline between ellipse (2) and rectangle (infinity): u towards the back, v upwards, each in [-1, 1]."""
    t = np.linspace(0, 2 * np.pi, count, endpoint=False)
    c, s = np.cos(t), np.sin(t)
    return np.sign(c) * np.abs(c) ** (2 / exponent), np.sign(s) * np.abs(s) ** (2 / exponent)


def _between(lower: _Plate, upper: _Plate, u: Points, v: Points, waist: float, dent: float) -> Points:
    """(u, v) in the quadrilateral of two plates -> N x 2 mm. `waist` mm narrower at mid height; `dent` mm hollower plates."""
    w = ((v + 1) / 2)[:, None]
    centre = (1 - w) * lower.centre + w * upper.centre
    back = (1 - w) * lower.back + w * upper.back
    up = (1 - w) * lower.up + w * upper.up
    half = (1 - w[:, 0]) * lower.half + w[:, 0] * upper.half - waist * (1 - v**2)
    out: Points = centre + back * (u * half)[:, None] - up * (dent * v * (1 - u**2))[:, None]
    return out


def _smooth_open(points: Points, step: float, sigma: float) -> Points:
    """Polyline resampled every `step` mm and smoothed with a Gaussian of `sigma` mm, ends kept."""
    along = np.concatenate([[0], np.cumsum(np.hypot(*np.diff(points, axis=0).T))])
    t = np.arange(0, along[-1], step)
    dense = np.stack([np.interp(t, along, points[:, k]) for k in (0, 1)], 1)
    return _blur_rows(dense, sigma / step)


def _blur_rows(values: Points, sigma: float) -> Points:
    radius = max(1, int(3 * sigma))
    kernel = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    kernel /= kernel.sum()
    # Odd reflection keeps the ends where they are and their direction straight.
    n = len(values)
    pad = min(radius, n - 1)
    head = 2 * values[0] - values[pad:0:-1]
    tail = 2 * values[-1] - values[-2 : -pad - 2 : -1]
    padded = np.concatenate([head, values, tail])
    return np.stack([np.convolve(padded[:, k], kernel, "same")[pad : pad + n] for k in range(values.shape[1])], 1)


def _rounded(points: Points, count: int = 64, sigma: float = 1.6) -> Points:
    """Closed polygon with its corners rounded."""
    closed = np.concatenate([points, points[:1]])
    along = np.concatenate([[0], np.cumsum(np.hypot(*np.diff(closed, axis=0).T))])
    t = np.linspace(0, along[-1], count, endpoint=False)
    dense = np.stack([np.interp(t, along, closed[:, k]) for k in (0, 1)], 1)
    radius = int(3 * sigma)
    kernel = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    kernel /= kernel.sum()
    wrapped = np.concatenate([dense[-radius:], dense, dense[:radius]])
    return np.stack([np.convolve(wrapped[:, k], kernel, "valid") for k in (0, 1)], 1)


def _normals(path: Points) -> Points:
    """Unit normals of a path that runs downwards, pointing to the back (right)."""
    d = np.gradient(path, axis=0)
    d /= np.hypot(d[:, 0], d[:, 1])[:, None] + 1e-9
    return np.stack([d[:, 1], -d[:, 0]], 1)


class _Canvas:
    """Supersampled image and instance labels; takes millimetres, paints with soft edges inside bounding boxes only."""

    def __init__(self, hw: tuple[int, int], spacing: float, origin: Points, angle: float, rng: np.random.Generator) -> None:
        self.hw = (hw[0] * _SUPERSAMPLING, hw[1] * _SUPERSAMPLING)
        self.per_mm = _SUPERSAMPLING / spacing
        c, s = np.cos(angle), np.sin(angle)
        self.rotation = np.array([[c, -s], [s, c]])
        self.origin = origin
        self.image: Plane = np.zeros(self.hw, np.float32)
        self.labels: NDArray[np.uint8] = np.zeros(self.hw, np.uint8)
        self.rng = rng
        self.area: dict[int, float] = {}
        self.shapes: list[tuple[int, Points]] = []

    def to_px(self, points: Points) -> Points:
        out: Points = (points @ self.rotation.T + self.origin) * self.per_mm
        return out

    def noise(self, x_mm: float, y_mm: float | None = None) -> Plane:
        """Band-limited texture over the canvas, zero mean, unit deviation, grains of about x_mm by y_mm."""
        y_mm = x_mm if y_mm is None else y_mm
        h = max(4, int(self.hw[0] / (self.per_mm * y_mm)) + 1)
        w = max(4, int(self.hw[1] / (self.per_mm * x_mm)) + 1)
        small = self.rng.standard_normal((h, w), dtype=np.float32)
        big = cv2.resize(small, (self.hw[1], self.hw[0]), interpolation=cv2.INTER_CUBIC)
        return np.asarray(big * np.float32(1.25), np.float32)

    def _roi(self, px: Points, margin: int) -> tuple[int, int, int, int] | None:
        x0, y0 = np.floor(px.min(0)).astype(int) - margin
        x1, y1 = np.ceil(px.max(0)).astype(int) + margin + 1
        x0, y0, x1, y1 = max(0, int(x0)), max(0, int(y0)), min(self.hw[1], int(x1)), min(self.hw[0], int(y1))
        return None if x0 >= x1 or y0 >= y1 else (x0, y0, x1, y1)

    def paint(
        self,
        points: Points,
        value: float | Plane,
        *,
        soft: float = 0.35,
        alpha: float = 1.0,
        label: int = 0,
        texture: Sequence[tuple[Plane, float]] = (),
    ) -> None:
        """Fill a polygon with a constant or with a field of the canvas' size; edges blend over `soft` mm.

        `texture` lists (field, amplitude): the value is modulated by 1 + their sum, inside the bounding box only.
        """
        px = self.to_px(points)
        if label:
            x, y = px[:, 0], px[:, 1]
            self.area[label] = abs(float(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1)))) / 2
            self.shapes.append((label, points))
        sigma = soft * self.per_mm
        box = self._roi(px, int(3 * sigma) + 1)
        if box is None:
            return
        x0, y0, x1, y1 = box
        fill = np.zeros((y1 - y0, x1 - x0), np.uint8)
        # Pixel centres are at integers for fillPoly, at integer + 0.5 here; the shift keeps 1/16 pixel.
        fixed = np.round((px - [x0 + 0.5, y0 + 0.5]) * 16).astype(np.int32)
        cv2.fillPoly(fill, [fixed], 255, shift=4)
        if label:
            self.labels[y0:y1, x0:x1][fill > 0] = label
        cover = fill.astype(np.float32) * np.float32(alpha / 255)
        if sigma > 0.3:
            cover = cv2.GaussianBlur(cover, (0, 0), sigma)
        region = self.image[y0:y1, x0:x1]
        source = value[y0:y1, x0:x1] if isinstance(value, np.ndarray) else np.float32(value)
        if texture:
            source = source * (1 + sum(np.float32(amount) * field[y0:y1, x0:x1] for field, amount in texture))
        region += cover * (source - region)

    def line(self, points: Points, width: float, value: float, alpha: float = 1.0) -> None:
        """Polyline of `width` mm."""
        n = len(points)
        if n < 2:
            return
        normals = _normals(points) * (width / 2)
        self.paint(np.concatenate([points + normals, (points - normals)[::-1]]), value, soft=min(0.3, width / 3), alpha=alpha)


def _grades(rng: np.random.Generator, given: Sequence[int] | None) -> list[int]:
    # The generator is advanced alike whether or not grades are given: the same seed keeps its anatomy.
    age = rng.uniform(0, 1)
    random: list[int] = []
    for i in range(len(VERTEBRAE)):
        worn = age * 3.2 + (0.6 if i < 2 else 0.0) - 0.12 * i + rng.normal(0, 0.75)
        random.append(int(np.clip(round(1.5 + worn), 1, 5)))
    fixed = list(given or ())[: len(random)]
    return [int(g) for g in fixed] + random[len(fixed) :]


def _checked(deformity: Deformity) -> None:
    """Raises UsageError for a level that is none and for a value out of its range."""
    discs = tuple(f"{a}/{b}" for a, b in zip(VERTEBRAE, ("S1", *VERTEBRAE), strict=False))
    losses = {name: loss for name, pair in deformity.height_loss.items() for loss in pair}
    for what, values, names, low, high in (
        ("slip", deformity.slip_mm, discs, -15.0, 30.0),
        ("loss of height", losses, VERTEBRAE, 0.0, 0.6),
        ("stenosis", deformity.stenosis_mm, discs, 0.0, 8.0),
    ):
        for name, value in values.items():
            if name not in names:
                raise UsageError(f"A phantom has no level of this name for a {what}", value=name)
            if not low <= value <= high:
                raise UsageError(f"A phantom's {what} lies between {low} and {high}", value=value)


def _column(rng: np.random.Generator, grades: list[int], deformity: Deformity) -> tuple[list[_Disc], list[tuple[_Plate, _Plate]]]:
    """Discs and bodies from L5/S1 upwards, in mm, the middle of the S1 end plate at (0, 0)."""
    slope = np.deg2rad(rng.uniform(28, 50))
    lordosis = slope + np.deg2rad(rng.uniform(6, 20))
    size = rng.uniform(0.9, 1.1)
    depth, tall = size * rng.uniform(17.0, 19.4), size * rng.uniform(25.5, 28.5)
    plump = size * rng.uniform(8.5, 11.5)
    plate = _Plate(np.zeros(2), slope, depth * 0.97)
    discs: list[_Disc] = []
    bodies: list[tuple[_Plate, _Plate]] = []
    for i, grade in enumerate(grades):
        disc_turn, body_turn = _TURN[min(i, len(_TURN) - 1)]
        profile = (1.0, 1.05, 1.0, 0.92, 0.84, 0.74, 0.64, 0.56)[min(i, 7)]
        jitter = rng.uniform(0.9, 1.1)
        height = max(3.2, plump * profile * jitter * _HEIGHT_OF_GRADE[grade - 1])
        half = depth * (1 - 0.013 * i) * rng.uniform(0.98, 1.02)
        draws = rng.uniform(0, 1, 4)
        hernia = bool(draws[0] < _HERNIA_ODDS[grade - 1]) and i < 6
        bulge = bool(draws[1] < _BULGE_ODDS[grade - 1])
        protrusion = 3.5 + 3.5 * draws[2] if hernia else 1.2 + 1.6 * draws[2] if bulge else 0.25
        turn = disc_turn * lordosis
        # A collapsed disc cannot be wedged: its back must keep some height.
        turn = float(np.clip(turn, -0.7 * (height - 1.8) / half, 0.7 * (height - 1.8) / half))
        slip = rng.normal(0, 0.4) - deformity.slip_mm.get(f"{VERTEBRAE[i]}/{VERTEBRAE[i - 1] if i else 'S1'}", 0.0)
        upper = plate.moved(height, turn, half)
        upper = _Plate(upper.centre + upper.back * slip, upper.tilt, half)
        narrow = _HEIGHT_OF_GRADE[grade - 1] * jitter < 0.8
        discs.append(_Disc(plate, upper, grade, height, float(protrusion), float(draws[3] * 2 - 1), hernia, narrow, bulge))
        body_height = tall * (1.0 - 0.014 * i) * rng.uniform(0.97, 1.03)
        top = upper.moved(body_height, body_turn * lordosis + rng.normal(0, 0.008), half * rng.uniform(0.96, 1.0))
        loss = deformity.height_loss.get(VERTEBRAE[i], (0.0, 0.0))[0]
        if loss:
            # The front collapses; the back keeps its height.
            front = top.anterior - upper.anterior
            back_height = float(np.hypot(*(top.posterior - upper.posterior)))
            top = _Plate.between(upper.anterior + front / np.hypot(*front) * back_height * (1 - loss), top.posterior)
        bodies.append((upper, top))
        plate = top
    return discs, bodies


def _sacrum(rng: np.random.Generator, first: _Plate) -> list[tuple[_Plate, _Plate]]:
    """Sacral and coccygeal segments downwards as (lower, upper) plates, rudimentary disc spaces between them."""
    segments: list[tuple[_Plate, _Plate]] = []
    upper = first
    curl = rng.uniform(0.7, 1.3)
    sizes = ((28, 0.68, -4), (23, 0.5, 4), (19, 0.38, 14), (16, 0.30, 18), (13, 0.25, 18), (9, 0.2, 22), (8, 0.15, 25))
    scale = first.half / 17.0
    for length, narrower, turn in sizes:
        lower = upper.moved(-length * scale, np.deg2rad(turn * curl), first.half * narrower)
        segments.append((lower, upper))
        gap = lower.moved(-rng.uniform(0.6, 1.8), 0.0, first.half * narrower * 0.97)
        upper = gap
    return segments


def draw(
    rng: np.random.Generator,
    *,
    weighting: str | None = None,
    hw: tuple[int, int] | None = None,
    sacrum: bool = True,
    grades: Sequence[int] | None = None,
    deformity: Deformity | None = None,
) -> tuple[Plane, Truth]:
    """One phantom: (H x W float32 image in whole scanner units from 0, its truth).

    `weighting` "T2", "T1" or None for a random one, mostly T2. `hw` is (rows, columns), each 96 to 2048, None for a
    random typical size. `sacrum=False` ends the field of view above S1, within L3 to L5: nothing in the image then
    tells the levels, which the truth still names. `grades` are Pfirrmann grades from the L5/S1 disc upwards; those
    not given are random. `deformity` adds slips, fractures and stenoses; without it the same generator gives the same
    phantom as with an empty one. Raises UsageError where an argument is out of its range.
    """
    if weighting not in (None, "T1", "T2"):
        raise UsageError("A phantom is T1 or T2 weighted", value=weighting)
    if hw is not None and not all(MIN_SIDE <= side <= MAX_SIDE for side in hw):
        raise UsageError(f"A phantom has {MIN_SIDE} to {MAX_SIDE} rows and columns", value=hw)
    if any(g not in (1, 2, 3, 4, 5) for g in grades or ()):
        raise UsageError("A Pfirrmann grade is 1, 2, 3, 4 or 5", value=list(grades or ()))
    deformity = deformity or Deformity()
    _checked(deformity)
    chance, size_index = rng.uniform(), int(rng.integers(len(TYPICAL_HW)))
    weighting = weighting or ("T2" if chance < 0.75 else "T1")
    rows, columns = hw or TYPICAL_HW[size_index]
    discs, bodies = _column(rng, _grades(rng, grades), deformity)
    segments = _sacrum(rng, discs[0].lower)
    canvas, fade = _place(rng, (rows, columns), discs, bodies, sacrum)
    anatomy = _Anatomy(rng, canvas, weighting, discs, bodies, segments, deformity)
    anatomy.paint()
    image = _acquire(rng, canvas, anatomy, fade)
    truth = _truth(canvas, (rows, columns), anatomy, weighting)
    return image, truth


def _place(
    rng: np.random.Generator, hw: tuple[int, int], discs: list[_Disc], bodies: list[tuple[_Plate, _Plate]], sacrum: bool
) -> tuple[_Canvas, float]:
    """Choose field of view, rotation and position; returns the canvas and the fade at its lower edge in mm."""
    field_mm = rng.uniform(265, 330)
    spacing = float(np.round(max(0.45, field_mm / max(hw)), 4))
    height, width = hw[0] * spacing, hw[1] * spacing
    angle = float(np.deg2rad(rng.normal(0, 3)))
    x = width * rng.uniform(0.5, 0.6)
    if sacrum:
        y = height * rng.uniform(0.7, 0.82)
        anchor, fade = bodies[1][0].centre, 0.0
        y -= 45 * height / 300
    else:
        # The lower edge cuts through a body or just below it.
        anchor = bodies[int(rng.integers(0, 3))][0].centre
        y, fade = height - rng.uniform(-8, 14), float(rng.uniform(12, 30))
    c, s = np.cos(angle), np.sin(angle)
    turn = np.array([[c, -s], [s, c]])
    origin = np.array([x, y]) - turn @ anchor
    if not sacrum:
        # The back corner of S1 is its highest point: it must stay below the image.
        s1 = discs[0].lower
        highest = (turn @ (s1.centre + s1.back * s1.half))[1] + origin[1]
        origin[1] += max(0.0, height + 3 - highest)
    return _Canvas(hw, spacing, origin, angle, rng), fade


class _Anatomy:
    """Everything that is painted, from the outside inwards and from the back to the front of what hides what."""

    def __init__(
        self,
        rng: np.random.Generator,
        canvas: _Canvas,
        weighting: str,
        discs: list[_Disc],
        bodies: list[tuple[_Plate, _Plate]],
        segments: list[tuple[_Plate, _Plate]],
        deformity: Deformity,
    ) -> None:
        self.rng, self.canvas, self.weighting = rng, canvas, weighting
        self.discs, self.bodies, self.segments, self.deformity = discs, bodies, segments, deformity
        # Hollow of each body's end plates and of each disc, mm; a disc ends `inset` of the way to its plates.
        self.body_dent: list[float] = []
        self.disc_dent: list[float] = []
        tissue = {k: v * rng.uniform(0.92, 1.08) for k, v in _TISSUE[weighting].items()}
        tissue["marrow"] *= rng.uniform(0.75, 1.25)
        tissue["muscle"] *= rng.uniform(0.8, 1.4)
        self.tissue = tissue
        self.fine, self.mid, self.coarse = canvas.noise(0.9), canvas.noise(2.5), canvas.noise(11)
        self.streaks = canvas.noise(2.0, 15)
        self._paths()

    def _paths(self) -> None:
        """Front wall of the canal, its back, and the line of the spinous tips, all downwards, every 1 mm."""
        rng = self.rng
        wall, kind = [], []
        for i in range(len(self.bodies) - 1, -1, -1):
            lower, upper = self.bodies[i]
            wall += [upper.centre + upper.back * upper.half, lower.centre + lower.back * lower.half]
            kind += [i, i]
        for lower, upper in self.segments[:5]:
            wall += [upper.centre + upper.back * upper.half, lower.centre + lower.back * lower.half]
        front = _smooth_open(np.array(wall), 1.0, 6.0)
        n = len(front)
        t = np.arange(n, dtype=np.float64)

        def at(point: Points) -> int:
            return int(np.argmin(np.hypot(*(front - point).T)))

        self.at_body = [at((lo.centre + lo.back * lo.half + up.centre + up.back * up.half) / 2) for lo, up in self.bodies]
        self.at_disc = [
            at((d.lower.centre + d.lower.back * d.lower.half + d.upper.centre + d.upper.back * d.upper.half) / 2) for d in self.discs
        ]
        s1, l4, s2 = self.at_disc[0], self.at_body[1], at(self.segments[1][0].centre + self.segments[1][0].back * self.segments[1][0].half)
        self.end = min(n - 2, s2 - int(rng.integers(0, 14)))
        wide = rng.uniform(11.5, 15.5)
        knots_t = [0, self.at_body[4], l4, s1, (s1 + self.end) / 2, self.end]
        width = np.interp(t, knots_t, [wide * 0.95, wide * 1.05, wide * 0.92, wide * 0.8, wide * 0.55, 1.5])
        gap = np.interp(t, [0, l4, s1, s1 + 18, self.end], [1.3, 1.5, rng.uniform(2.5, 6), rng.uniform(2, 5), 2.0])
        # The sac is waisted from behind at each disc by the yellow ligament, from the front a little by the annulus.
        below = ("S1", *VERTEBRAE)
        for k, (d, i) in enumerate(zip(self.discs, self.at_disc, strict=True)):
            bump = np.exp(-0.5 * ((t - i) / 5.5) ** 2)
            stenosis = self.deformity.stenosis_mm.get(f"{VERTEBRAE[k]}/{below[k]}", 0.0)
            width -= bump * (0.7 + 0.5 * (d.grade >= 4) + (0.3 * d.protrusion if d.bulging else 0) + stenosis)
        width = np.maximum(width, 1.0)
        normal = _normals(front)
        self.t, self.normal = t, normal
        self.wall = front
        self.sac_front = front + normal * gap[:, None]
        self.sac_back = front + normal * (gap + width)[:, None]
        # Behind the sac comes fat, deepest at the discs, then laminae.
        fat = 0.8 + 0.0 * t
        for i in self.at_disc[1:]:
            fat += rng.uniform(2.5, 4.5) * np.exp(-0.5 * ((t - i - 2) / 5.0) ** 2)
        fat[s1:] += 1.5
        self.epidural_back = self.sac_back + normal * fat[:, None]
        reach = np.interp(t, [0, self.at_body[4], l4, s1, n], [30, 33, 31, 22, 12]) * rng.uniform(0.9, 1.12)
        self.tips = _blur_rows(self.sac_back + normal * (reach + 4)[:, None], 14)
        self.skin_fat = _blur_rows(
            np.interp(t, [0, l4, s1, n], [rng.uniform(8, 20), rng.uniform(14, 40), rng.uniform(18, 55), rng.uniform(12, 45)])[:, None], 12
        )[:, 0]

    # -- around the spine ---------------------------------------------------------------------------------------

    def paint(self) -> None:
        self._body()
        self._abdomen()
        self._back_muscle()
        self._sacral_bone()
        self._canal()
        self._posterior_elements()
        for disc in self.discs:
            # End plate cartilage and fibres: no fat shows between a disc and its bodies.
            bed = _between(disc.lower, disc.upper, *_squircle(8), 0.0, -2.5)
            self.canvas.paint(bed, self.tissue["ligament"], soft=0.3)
        self._vertebral_bodies()
        for i, disc in enumerate(self.discs):
            self._disc(i, disc)
        self._ligaments()

    def _body(self) -> None:
        c, tissue = self.canvas, self.tissue
        skin = self.tips + self.normal * (self.skin_fat + 3)[:, None]
        skin = _smooth_open(skin, 2.0, 16)
        down = skin[-1] + np.array([[4.0, 60.0], [-10.0, 160.0]])
        up = skin[0] + np.array([[0.0, -200.0]])
        self.skin = np.concatenate([up, skin, down])
        belly = self.rng.uniform(125, 215)
        spine_x = float(np.mean(self.wall[:, 0])) - 35
        y = np.linspace(self.skin[0, 1], self.skin[-1, 1], 24)
        x = spine_x - belly + 14 * np.sin(y / 60 + self.rng.uniform(0, 6))
        self.belly = np.stack([x, y], 1)
        outline = np.concatenate([self.skin, self.belly[::-1]])
        c.paint(outline, tissue["muscle"] * 0.8, soft=0.5)
        inner = np.concatenate([self.skin + _mm(-1.8, 0), (self.belly + _mm(1.8, 0))[::-1]])
        fat = tissue["fat"] * (1 + 0.04 * self.coarse + 0.03 * self.mid)
        c.paint(inner, fat.astype(np.float32), soft=0.5)
        # Fibrous septa through the fat under the skin, roughly along it.
        for _ in range(int(self.rng.integers(6, 16))):
            k = int(self.rng.integers(20, len(skin) - 21))
            f = self.rng.uniform(0.15, 0.9)
            seg = slice(k, k + int(self.rng.integers(8, 20)))
            base = _smooth_open(self.tips, 2.0, 16)
            m = min(len(base), len(skin))
            piece = base[:m][seg] * (1 - f) + skin[:m][seg] * f
            if len(piece) > 4:
                wobble = _blur_rows(self.rng.normal(0, 1.6, (len(piece), 1)), 2)
                c.line(piece + wobble * _mm(1, 0), 0.6, tissue["fat"] * 0.6, 0.6)

    def _abdomen(self) -> None:
        c, rng, tissue = self.canvas, self.rng, self.tissue
        front = self._front_path()
        inner = np.concatenate([front + _mm(-rng.uniform(1, 5), 0), (self.belly + _mm(rng.uniform(10, 30), 0))[::-1]])
        field = tissue["bowel"] * (1 + 0.25 * self.coarse + 0.15 * self.mid + 0.06 * self.fine) + 0.25 * tissue["fat"]
        c.paint(inner, np.maximum(field, 0.03).astype(np.float32), soft=3.0, alpha=rng.uniform(0.55, 1))
        y_low = float(self.discs[0].lower.centre[1])
        for _ in range(int(rng.integers(14, 34))):
            k = int(rng.integers(len(front)))
            away = rng.uniform(24, 150)
            centre = front[k] + _mm(-away, rng.normal(0, 8))
            self._organ(centre, rng.uniform(4, 17), tissue["bowel"] * rng.uniform(0.1, 1.9), wall=rng.uniform(0, 1) < 0.5)
        # Presacral and pelvic fat, with rectum, bladder or uterus in it.
        s = np.array([seg[0].centre - seg[0].back * seg[0].half for seg in self.segments])
        top = self.discs[0].lower
        tip = top.centre - top.back * top.half
        pelvis = np.concatenate([[tip + _mm(-4, -8)], s + _mm(2, 0), [s[-1] + _mm(-45, 45), tip + _mm(-75, 60), tip + _mm(-45, 8)]])
        c.paint(_rounded(pelvis, 80, 3), (tissue["fat"] * (1 + 0.07 * self.coarse + 0.04 * self.mid)).astype(np.float32), soft=2.5)
        for _ in range(int(rng.integers(2, 7))):
            centre = np.array([tip[0] + rng.uniform(-70, 12), y_low + rng.uniform(35, 110)])
            value = (tissue["fluid"] if rng.uniform() < 0.25 else tissue["bowel"]) * rng.uniform(0.15, 1.1)
            self._organ(centre, rng.uniform(7, 22), value, wall=True)
        self._vessel(front)
        strip = _blur_rows(rng.uniform(1.5, 6, (len(front), 1)), 12)
        c.paint(np.concatenate([front - strip * _mm(1, 0), front[::-1] + _mm(3, 0)]), tissue["fat"], soft=0.8, alpha=0.9)

    def _front_path(self) -> Points:
        points = []
        for i in range(len(self.bodies) - 1, -1, -1):
            lower, upper = self.bodies[i]
            points += [upper.centre - upper.back * upper.half, lower.centre - lower.back * lower.half]
        s1 = self.discs[0].lower
        points.append(s1.centre - s1.back * s1.half)
        return _smooth_open(np.array(points), 1.0, 6.0)

    def _organ(self, centre: Points, radius: float, value: float, wall: bool) -> None:
        rng = self.rng
        t = np.linspace(0, 2 * np.pi, 40, endpoint=False)
        r = radius * (1 + 0.18 * np.sin(2 * t + rng.uniform(0, 6)) + 0.1 * np.sin(3 * t + rng.uniform(0, 6)))
        stretch = rng.uniform(0.6, 1.5)
        points = centre + np.stack([r * np.cos(t) * stretch, r * np.sin(t) / stretch], 1)
        if wall:
            self.canvas.paint(points, self.tissue["muscle"] * 1.1, soft=0.6)
            points = centre + (points - centre) * (1 - 2.0 / (radius + 2))
        self.canvas.paint(points, value, soft=0.8, alpha=0.9, texture=((self.mid, 0.12), (self.coarse, 0.1)))

    def _vessel(self, front: Points) -> None:
        """Aorta or vena cava in front of the column down to about L4: a flow void, or grey where flow is slow."""
        rng = self.rng
        if rng.uniform() < 0.2:
            return
        i = np.clip(self.at_body[1] + int(rng.integers(-35, 10)), 10, len(front) - 1)
        width = rng.uniform(9, 17)
        path = front[: int(i)] + _mm(-rng.uniform(3, 8) - width / 2, 0)
        sway = _blur_rows(rng.normal(0, 12, (len(path), 1)), 18)
        path = path + sway * _mm(1, 0)
        taper = np.minimum(1, np.sqrt(np.arange(len(path))[::-1] / 10 + 0.05))[:, None]
        n = _normals(path)
        tube = np.concatenate([path + n * width / 2 * taper, (path - n * width / 2 * taper)[::-1]])
        slow = rng.uniform(0, 0.35) if rng.uniform() < 0.35 else 0.0
        self.canvas.paint(tube, self.tissue["muscle"], soft=0.6)
        tube = np.concatenate([path + n * (width / 2 - 1) * taper, (path - n * (width / 2 - 1) * taper)[::-1]])
        self.canvas.paint(tube, (self.tissue["vessel"] + slow + 0.02 * self.mid).astype(np.float32), soft=0.8)

    def _back_muscle(self) -> None:
        c, rng, tissue = self.canvas, self.rng, self.tissue
        region = np.concatenate([self.epidural_back, self.tips[::-1]])
        fatty = rng.uniform(0.1, 0.45)
        mix = np.clip(fatty + 0.22 * self.streaks + 0.12 * self.coarse + 0.06 * self.mid, 0, 1) ** 1.2
        field = tissue["muscle"] * (1 + 0.08 * self.fine) + mix * (tissue["fat"] - tissue["muscle"])
        c.paint(region, field.astype(np.float32), soft=0.6)
        fascia = self.tips[: self.at_disc[0] + 25]
        c.line(fascia, rng.uniform(1.2, 2.4), tissue["ligament"], 0.9)

    # -- canal --------------------------------------------------------------------------------------------------

    def _canal(self) -> None:
        c, rng, tissue = self.canvas, self.rng, self.tissue
        end = self.end
        fat = (tissue["fat"] * (1 + 0.05 * self.mid)).astype(np.float32)
        space = np.concatenate([self.wall[: end + 12], self.epidural_back[: end + 12][::-1]])
        c.paint(space, fat, soft=0.4)
        front, back = self.sac_front[:end], self.sac_back[:end]
        sac = np.concatenate([front, back[::-1]])
        csf = (tissue["csf"] * (1 + 0.03 * self.coarse + 0.03 * self.mid)).astype(np.float32)
        c.paint(sac, csf, soft=0.4, label=_CANAL)
        conus = self.at_body[4] + int(rng.integers(-30, 22))
        if conus > 20:
            mid = front[:conus] * 0.5 + back[:conus] * 0.5 + self.normal[:conus] * rng.uniform(-0.5, 1.8)
            half = rng.uniform(2.9, 3.6) * np.minimum(1.0, np.arange(conus)[::-1] / rng.uniform(28, 45) + 0.08)[:, None]
            n = self.normal[:conus]
            cord = np.concatenate([mid + n * half, (mid - n * half)[::-1]])
            c.paint(cord, (tissue["cord"] * (1 + 0.04 * self.mid)).astype(np.float32), soft=0.5)
        # Roots fall from the conus to the back of the sac, one after another leaving forwards.
        start = max(0, conus - 25)
        length = end - start
        for _ in range(int(rng.integers(9, 17))):
            stop = start + int(length * rng.uniform(0.35, 0.97))
            if stop - start < 12:
                continue
            k = np.arange(start, stop)
            along = (k - start) / max(1, stop - start)
            lie = rng.uniform(0.5, 0.93)
            f = 0.5 + (lie - 0.5) * np.minimum(1, along * rng.uniform(1.5, 3.5)) - 0.5 * np.maximum(0, along - 0.8) * rng.uniform(0, 2.5)
            wobble = _blur_rows(rng.normal(0, 0.12, (len(k), 1)), 6)[:, 0]
            f = np.clip(f + wobble, 0.08, 0.95)[:, None]
            c.line(front[k] * (1 - f) + back[k] * f, rng.uniform(0.5, 1.0), tissue["nerve"], rng.uniform(0.35, 0.75))
        c.line(front, 0.6, tissue["ligament"], 0.7)
        c.line(back, 0.6, tissue["ligament"], 0.7)

    def _posterior_elements(self) -> None:
        c, rng, tissue = self.canvas, self.rng, self.tissue
        midline = rng.uniform() < 0.7
        # Fat and worn ligament between the processes: bright, ragged and different at each level.
        for i in range(len(self.bodies) - 1):
            for _ in range(int(rng.integers(1, 4))):
                k = min(self.at_body[i] + int(rng.integers(-22, 4)), len(self.t) - 2)
                at = self.sac_back[max(k, 0)] * (f := rng.uniform(0.1, 0.85)) + self.tips[max(k, 0)] * (1 - f)
                u, v = _squircle(2, 20)
                blob = at + np.stack([u * rng.uniform(2, 8), v * rng.uniform(1.5, 5)], 1) + rng.normal(0, 0.9, (20, 2))
                c.paint(blob, tissue["fat"] * rng.uniform(0.5, 1.1), soft=0.7, alpha=rng.uniform(0.3, 0.9))
        for i in range(len(self.bodies) - 1, -1, -1):
            k = min(self.at_body[i] + int(rng.integers(5, 10)), len(self.t) - 2)
            anchor = self.sac_back[k] + self.normal[k] * 2.2
            back = self.normal[k]
            down = np.array([-back[1], back[0]])
            dip = np.deg2rad(rng.uniform(8, 24) if i < 5 else rng.uniform(25, 42))
            axis = back * np.cos(dip) + down * np.sin(dip)
            side = np.array([-axis[1], axis[0]])
            reach = float(np.hypot(*(self.tips[k] - anchor))) * rng.uniform(0.86, 0.98) * (0.8 if i == 0 else 1.0)
            scale = (0.72 if i == 0 else 1.0 if i < 5 else 0.75) * rng.uniform(0.85, 1.1)
            t = np.array([0, 0.1, 0.35, 0.7, 0.93, 1.0, 0.95, 0.7, 0.35, 0.12]) * reach + rng.normal(0, 0.8, 10)
            w = np.array([-2, -5, -4.2, -5.5, -6.5, -1, 8.5, 9.5, 7.2, 6]) * scale + rng.normal(0, 0.7, 10)
            outline = anchor + t[:, None] * axis + w[:, None] * side
            if not midline and rng.uniform() < 0.75:
                # Off the midline only the lamina is cut, and the process shows as an island or not at all.
                t2 = np.array([0, 0.1, 0.28, 0.36, 0.28, 0.1]) * reach
                w2 = np.array([-2, -6, -6, 1, 8, 7.5]) * scale
                outline = anchor + t2[:, None] * axis + w2[:, None] * side
            shape = _rounded(outline, 56, 1.8)
            c.paint(shape, tissue["cortex"], soft=0.3, label=_SPINOUS + i)
            centre = shape.mean(0)
            inner = centre + (shape - centre) * (1 - 1.5 / max(7.0, 13 * scale))
            c.paint(inner, tissue["marrow"] * 1.1, soft=0.5, texture=((self.mid, 0.1), (self.fine, 0.05)))
        # Yellow ligament from lamina to lamina, behind the epidural fat.
        for i in range(1, len(self.discs)):
            k0, k1 = self.at_body[i] + 13, self.at_body[i - 1] + 3
            if k1 - k0 > 4:
                c.line(self.epidural_back[k0:k1] + self.normal[k0:k1] * 1.0, rng.uniform(1.6, 2.8), tissue["ligament"] * 1.3, 0.9)

    # -- bone and discs -----------------------------------------------------------------------------------------

    def _bone(self, lower: _Plate, upper: _Plate, waist: float, dent: float, exponent: float, label: int, rim: float) -> None:
        c, rng, tissue = self.canvas, self.rng, self.tissue
        u, v = _squircle(exponent)
        shape = _between(lower, upper, u, v, waist, dent)
        c.paint(shape, tissue["cortex"], soft=0.25, label=label)
        centre = (lower.centre + upper.centre) / 2
        size = float(np.hypot(*(upper.centre - lower.centre)))
        inner = centre + (shape - centre) * (1 - 2 * rim / max(size, 6))
        level = tissue["marrow"] * rng.uniform(0.95, 1.05)
        c.paint(inner, level, soft=0.45, texture=((self.mid, self.grain), (self.fine, 0.6 * self.grain), (self.coarse, 0.05)))

    def _vertebral_bodies(self) -> None:
        c, rng, tissue = self.canvas, self.rng, self.tissue
        for i, (lower, upper) in enumerate(self.bodies):
            waist, dent = rng.uniform(1.4, 3.0), rng.uniform(0.6, 1.9)
            loss = self.deformity.height_loss.get(VERTEBRAE[i], (0.0, 0.0))[1]
            if loss:
                high = float(np.hypot(*(upper.posterior - lower.posterior))) * (1 - loss)
                dent = max(dent, (float(np.hypot(*(upper.centre - lower.centre))) - high) / 2)
            self.body_dent.append(dent)
            self._bone(lower, upper, waist, dent, rng.uniform(7, 11), 1 + i, rng.uniform(0.6, 1.0))
            middle = (lower.centre + upper.centre) / 2
            back = (lower.back + upper.back) / 2
            up = (lower.up + upper.up) / 2
            edge = middle + back * (upper.half - waist)
            # Basivertebral vein: a notch in the middle of the back wall.
            depth, high = rng.uniform(3, 8), rng.uniform(1.2, 2.2)
            notch = np.array([edge + up * high + back * 0.5, edge - back * depth, edge - up * high + back * 0.5])
            c.paint(_rounded(notch, 24, 1.0), tissue["vein"], soft=0.6, alpha=rng.uniform(0.3, 0.8))
            for plate, sign in ((lower, 1), (upper, -1)):
                self._end_plate_change(plate, sign)
            if rng.uniform() < 0.04:
                self.canvas.paint(
                    middle + rng.normal(0, 5, 2) + rng.uniform(2, 5) * np.stack(_squircle(2, 24), 1), tissue["fat"], soft=1.2, alpha=0.5
                )

    def _end_plate_change(self, plate: _Plate, sign: int) -> None:
        """Fatty or oedematous band along an end plate, now and then."""
        if self.rng.uniform() > 0.07:
            return
        low, high = sorted(self.rng.uniform(-0.9, 0.9, 2))
        u = np.linspace(low, high, 12) * plate.half
        thick = self.rng.uniform(2, 7)
        base = plate.centre + u[:, None] * plate.back + plate.up * sign * 1.2
        top = base + plate.up * sign * thick * np.sin(np.linspace(0.2, np.pi - 0.2, 12))[:, None]
        self.canvas.paint(np.concatenate([base, top[::-1]]), self.tissue["fat"], soft=1.2, alpha=self.rng.uniform(0.25, 0.6))

    def _sacral_bone(self) -> None:
        c, rng, tissue = self.canvas, self.rng, self.tissue
        self.grain = rng.uniform(0.03, 0.09)
        for i, (lower, upper) in list(enumerate(self.segments))[::-1]:
            self._bone(lower, upper, 0.5, _SACRAL_HOLLOW if i == 0 else 0.0, 11 if i < 3 else 5, _SACRUM + i, 0.7)
        for above, below in zip(self.segments[:3], self.segments[1:4], strict=True):
            lower, upper = below[1], above[0]
            u, v = _squircle(3)
            shape = _between(
                _Plate(lower.centre, lower.tilt, lower.half * 0.75), _Plate(upper.centre, upper.tilt, upper.half * 0.75), u, v, 0, 0
            )
            # Bone bridges the rim of the space; a thin remnant of disc stays in its middle.
            slab = _between(lower.moved(-1.2, 0, lower.half * 0.9), upper.moved(1.2, 0, upper.half * 0.9), *_squircle(8), 0, 0)
            c.paint(slab, tissue["marrow"], soft=0.6, alpha=rng.uniform(0.5, 1.0))
            middle = shape.mean(0) + lower.back * lower.half * rng.uniform(-0.3, 0.3)
            c.paint(middle + (shape - shape.mean(0)) * [rng.uniform(0.5, 1.0), 1.0] * rng.uniform(0.8, 1.2), tissue["annulus"], soft=0.4)
        # Median crest behind the sacral canal.
        k = np.arange(self.at_disc[0] + 14, min(self.end + 30, len(self.t) - 1))
        if len(k) > 10:
            inner = self.epidural_back[k] + self.normal[k] * 1.0
            outer = inner + self.normal[k] * (rng.uniform(3, 7) * (1 + 0.4 * np.sin(k / 4.0)) + 1)[:, None]
            c.paint(np.concatenate([inner, outer[::-1]]), tissue["cortex"], soft=0.4)
            c.paint(np.concatenate([inner * 0.75 + outer * 0.25, (inner * 0.2 + outer * 0.8)[::-1]]), tissue["marrow"], soft=0.5, alpha=0.9)

    def _disc(self, i: int, disc: _Disc) -> None:
        c, rng, tissue = self.canvas, self.rng, self.tissue
        u, v = _squircle(3.6, 96)
        # Between the plates less their thickness; the front bulges a little, the back by what protrudes.
        inset = disc.inset
        dent = -rng.uniform(0.7, 1.6) if disc.grade < 5 else -rng.uniform(0.1, 0.6)
        self.disc_dent.append(-dent)
        shape = _between(disc.lower, disc.upper, u * 1.0, v * inset, 0.0, dent)
        back = (disc.lower.back + disc.upper.back) / 2
        up = (disc.lower.up + disc.upper.up) / 2
        focus = 0.55 if disc.herniation else 0.9
        push = disc.protrusion * np.exp(-0.5 * ((v - 0.25 * disc.migrates) / focus) ** 2) * np.clip((u - 0.3) / 0.7, 0, 1) ** 2
        shape = shape + back * push[:, None]
        if disc.herniation:
            shape = shape + up * (push * disc.migrates * 0.5)[:, None]
        front = rng.uniform(0.3, 1.5) * np.clip((-u - 0.3) / 0.7, 0, 1) ** 2
        shape = shape - back * front[:, None]
        c.paint(shape, tissue["annulus"], soft=0.3, label=_DISC + i, texture=((self.mid, 0.12),))
        value = (_T2_NUCLEUS if self.weighting == "T2" else _T1_NUCLEUS)[disc.grade - 1] * rng.uniform(0.93, 1.07)
        spread = (0.84, 0.82, 0.8, 0.8, 0.7)[disc.grade - 1]
        un, vn = _squircle(2.6, 64)
        rough = 0.05 if disc.grade < 3 else 0.12
        tall = 0.78 if disc.grade < 3 else 0.72
        core = _between(disc.lower, disc.upper, un * spread - 0.02, vn * tall, 0.0, dent * 0.7)
        c.paint(core, value, soft=(0.9, 0.9, 1.3, 1.3, 0.9)[disc.grade - 1], texture=((self.mid, rough), (self.coarse, rough)))
        if disc.grade in (2, 3) and self.weighting == "T2":
            u_line = np.linspace(-0.55, 0.5, 20)
            line = _between(disc.lower, disc.upper, u_line, 0.06 * np.sin(4 * u_line), 0.0, 0.0)
            c.line(line[:, :], 1.1, value * 0.45, 0.8 if disc.grade == 2 else 0.4)
        if disc.herniation:
            rear = disc.lower.centre * 0.5 + disc.upper.centre * 0.5 + back * (disc.lower.half + disc.protrusion * 0.35)
            c.paint(rear + np.stack(_squircle(2, 24), 1) * [disc.protrusion * 0.4, 1.6], value * 0.9, soft=0.8, alpha=0.6)
        if disc.grade == 5 and rng.uniform() < 0.5:
            u_line = np.linspace(-0.5, 0.3, 12)
            c.line(_between(disc.lower, disc.upper, u_line, 0 * u_line, 0, 0), 0.8, 0.01, 0.9)

    def _ligaments(self) -> None:
        c, rng, tissue = self.canvas, self.rng, self.tissue
        front = self._front_path() - np.array([0.6, 0.0])
        c.line(front, rng.uniform(0.8, 1.6), tissue["ligament"], 0.85)
        c.line(self.wall[: self.at_disc[0] + 10], 0.8, tissue["ligament"], 0.7)


def _acquire(rng: np.random.Generator, canvas: _Canvas, anatomy: _Anatomy, fade: float) -> Plane:
    """Tissue -> scanner units: coil, point spread, sampling, Rician noise, whole numbers."""
    image = canvas.image
    rows, columns = image.shape[0] // _SUPERSAMPLING, image.shape[1] // _SUPERSAMPLING
    sigma = rng.uniform(0.25, 0.5) * _SUPERSAMPLING
    image = cv2.GaussianBlur(image, (0, 0), sigma)
    image = cv2.resize(image, (columns, rows), interpolation=cv2.INTER_AREA)
    per_mm = canvas.per_mm / _SUPERSAMPLING
    # The coil lies behind the back: signal falls with the distance from the back wall of the bodies.
    y, x = np.mgrid[0:rows, 0:columns].astype(np.float32)
    wall = canvas.to_px(anatomy.wall) / _SUPERSAMPLING
    order = np.argsort(wall[:, 1])
    line = np.interp(np.arange(rows), wall[order, 1], wall[order, 0]).astype(np.float32)[:, None]
    depth = (line - x) / np.float32(per_mm)
    reach, floor = rng.uniform(45, 150), rng.uniform(0.05, 0.5)
    shade = floor + (1 - floor) / (1 + np.exp((depth - reach) / (reach * rng.uniform(0.25, 0.45))))
    shade = shade * (1 + rng.uniform(0, 0.5) * np.exp(-np.maximum(depth + 55, 0) / rng.uniform(15, 35)))
    if rng.uniform() < 0.3:
        # Anterior saturation band against breathing ghosts.
        edge = rng.uniform(46, 62)
        shade = shade * (0.05 + 0.95 / (1 + np.exp(np.clip((depth - edge) / 4.0, -40, 40))))
    ends = np.abs(y / rows - 0.5) * 2
    shade = shade * (1 - rng.uniform(0, 0.35) * ends**4)
    if fade:
        shade = shade * (1 - 0.85 * np.exp(-(rows - y) / np.float32(per_mm * fade * 0.5)))
    signal = image * shade.astype(np.float32)
    noise = np.float32(rng.uniform(0.006, 0.022))
    real = signal + noise * rng.standard_normal(signal.shape, dtype=np.float32)
    imaginary = noise * rng.standard_normal(signal.shape, dtype=np.float32)
    magnitude = np.hypot(real, imaginary)
    gain = rng.uniform(500, 1300)
    return np.asarray(np.rint(np.clip(magnitude * gain, 0, 4095)), np.float32)


def _degrees(above: _Plate, below: _Plate) -> float:
    """Angle between two plates, positive where they open to the front."""
    return float(np.rad2deg(below.tilt - above.tilt))


class _Measures:
    """The column's lengths and angles in closed form, from the plates and polygons that were painted: no pixel has a part in it."""

    def __init__(self, canvas: _Canvas, anatomy: _Anatomy) -> None:
        self.canvas, self.anatomy = canvas, anatomy
        self.discs, self.bodies = anatomy.discs, anatomy.bodies
        self.shapes = dict(canvas.shapes)

    def _hollow(self, body: int, above: bool) -> float:
        """How deep a body's end plate is in its middle: its own hollow, or what the disc that was painted over it takes."""
        own = self.anatomy.body_dent[body]
        k = body + 1 if above else body
        if k >= len(self.discs):
            return own
        disc = self.discs[k]
        return max(own, self.anatomy.disc_dent[k] * disc.inset - (1 - disc.inset) * disc.height / 2)

    def _middle(self, body: int, above: bool) -> Points:
        lower, upper = self.bodies[body]
        hollow = self._hollow(body, above)
        return upper.centre - upper.up * hollow if above else lower.centre + lower.up * hollow

    def _plate(self, plate: _Plate, middle: Points) -> PlateTruth:
        points = self.canvas.to_px(np.stack([plate.anterior, middle, plate.posterior])) / _SUPERSAMPLING
        front, centre, back = ((float(x), float(y)) for x, y in points)
        return PlateTruth(front, centre, back)

    def sacral_plate(self) -> PlateTruth:
        plate = self.discs[0].lower
        return self._plate(plate, plate.centre - plate.up * _SACRAL_HOLLOW)

    def lordosis(self) -> float:
        return _degrees(self.bodies[VERTEBRAE.index("L1")][1], self.discs[0].lower)

    def vertebra(self, i: int, box: Box) -> VertebraTruth:
        lower, upper = self.bodies[i]
        top, bottom = self._middle(i, True), self._middle(i, False)
        heights = (upper.anterior - lower.anterior, top - bottom, upper.posterior - lower.posterior)
        front, middle, back = (float(np.hypot(*h)) for h in heights)
        return VertebraTruth(
            VERTEBRAE[i], box, self._plate(upper, top), self._plate(lower, bottom), (front, middle, back), _degrees(upper, lower)
        )

    def disc(self, i: int, box: Box) -> DiscTruth:
        disc = self.discs[i]
        lower, upper = disc.lower, disc.upper
        normal = lower.up + upper.up
        normal = normal / np.hypot(*normal)
        below = self._middle(i - 1, True) if i else lower.centre - lower.up * _SACRAL_HOLLOW
        pairs = (upper.anterior - lower.anterior, self._middle(i, False) - below, upper.posterior - lower.posterior)
        front, middle, back = (float(h @ normal) for h in pairs)
        shape = self.shapes[_DISC + i].astype(np.float32)
        depth = max(cv2.minAreaRect(shape)[1])
        slip = -float((upper.posterior - lower.posterior) @ lower.back)
        name = f"{VERTEBRAE[i]}/{VERTEBRAE[i - 1] if i else 'S1'}"
        return DiscTruth(
            name,
            box,
            disc.grade,
            disc.herniation,
            disc.narrowing,
            disc.bulging,
            (front, middle, back),
            float(cv2.contourArea(shape)) / depth,
            _degrees(upper, lower),
            _degrees(self.bodies[i][1], self.bodies[i - 1][0] if i else lower),
            slip,
            100 * slip / (2 * lower.half),
            self._canal(i),
        )

    def _canal(self, i: int) -> float:
        """Least visible width of the sac within the height of disc `i`, along the normals of its front wall."""
        wall, normal = self.anatomy.wall, self.anatomy.normal
        half = float(np.hypot(*(self.discs[i].upper.posterior - self.discs[i].lower.posterior))) / 2
        at = self.anatomy.at_disc[i] + np.linspace(-half, half, 15)
        steps = np.arange(len(wall))
        middle = wall[self.anatomy.at_disc[i]]
        near = [(label, s) for label, s in self.canvas.shapes if (np.abs(s - middle).min(0) < _CANAL_REACH).all()]
        widths = []
        for t in np.clip(at, 0, len(wall) - 1):
            start = np.array([np.interp(t, steps, wall[:, k]) for k in (0, 1)])
            across = np.array([np.interp(t, steps, normal[:, k]) for k in (0, 1)])
            # Where the line enters and leaves each polygon, in the order of painting: later ones cover earlier ones.
            inside: list[tuple[float, float]] = []
            for label, shape in near:
                cut = _crossings(start, across, shape)
                inside = cut if label == _CANAL else [piece for a in inside for piece in _without(a, cut)]
            widths.append(max((b - a for a, b in inside), default=0.0))
        return float(min(widths))


def _crossings(start: Points, across: Points, shape: Points, reach: float = _CANAL_REACH) -> list[tuple[float, float]]:
    """Intervals of the distance along a line, within `reach` mm ahead of `start`, that lie inside a polygon (even-odd rule)."""
    ahead = (shape - start) @ across
    aside = (shape - start) @ np.array([-across[1], across[0]])
    ahead2, aside2 = np.roll(ahead, -1), np.roll(aside, -1)
    crossed = (aside < 0) != (aside2 < 0)
    share = aside[crossed] / (aside[crossed] - aside2[crossed])
    at = np.sort(ahead[crossed] + share * (ahead2 - ahead)[crossed])
    pairs = ((float(a), float(b)) for a, b in zip(at[::2], at[1::2], strict=True))
    return [(max(a, -5.0), min(b, reach)) for a, b in pairs if b > -5.0 and a < reach]


def _without(piece: tuple[float, float], cut: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """What is left of an interval when ascending intervals are cut out of it."""
    out, start = [], piece[0]
    for a, b in cut:
        if a > start:
            out.append((start, min(a, piece[1])))
        start = max(start, b)
    out.append((start, piece[1]))
    return [(a, b) for a, b in out if b > a]


def _truth(canvas: _Canvas, hw: tuple[int, int], anatomy: _Anatomy, weighting: str) -> Truth:
    a, b = canvas.labels[0::2, 0::2], canvas.labels[0::2, 1::2]
    c, d = canvas.labels[1::2, 0::2], canvas.labels[1::2, 1::2]
    # The majority of each 2 x 2; where there is none, any.
    labels = np.where((a == b) | (a == c) | (a == d), a, np.where((b == c) | (b == d), b, np.where(c == d, c, a)))
    mask = _CLASS_OF[labels]
    counts = np.bincount(labels.ravel(), minlength=256)

    def box(label: int) -> Box | None:
        full = canvas.area.get(label, 0.0) / _SUPERSAMPLING**2
        if not counts[label] or counts[label] < 0.5 * full:
            return None
        here = labels == label
        xs, ys = np.flatnonzero(here.any(0)), np.flatnonzero(here.any(1))
        return (float(xs[0]), float(ys[0]), float(xs[-1] + 1), float(ys[-1] + 1))

    measures = _Measures(canvas, anatomy)
    disc_boxes = [box(_DISC + i) for i in range(len(anatomy.discs))]
    body_boxes = [box(1 + i) for i in range(len(anatomy.bodies))]
    spacing = _SUPERSAMPLING / canvas.per_mm
    return Truth(
        mask=mask.reshape(hw),
        discs=tuple(measures.disc(i, edges) for i, edges in enumerate(disc_boxes) if edges),
        vertebrae=tuple(measures.vertebra(i, edges) for i, edges in enumerate(body_boxes) if edges),
        sacrum_box=box(_SACRUM),
        spacing_mm=(spacing, spacing),
        weighting=weighting,
        sacral_plate=measures.sacral_plate(),
        lordosis_deg=measures.lordosis(),
    )


def demo(seed: int = DEMO_SEED) -> tuple[Plane, Truth]:
    """The demonstration study: T2, 512 x 512, L5/S1 to T11/T12 and above, grades mixed."""
    return draw(np.random.default_rng(seed), weighting="T2", hw=(512, 512), grades=(4, 5, 3, 2, 2, 1, 1))


def write_dicom(image: Plane, truth: Truth, destination: str | Path | BinaryIO | None = None, *, seed: int = 0) -> bytes:
    """The phantom as a DICOM MR Image Storage object, explicit little endian: its bytes, also written to `destination`.

    `image` is H x W in 0 to 65535 and is rounded to whole numbers. UIDs and PatientID follow from `seed`, the
    weighting and the pixels, dates are fixed: the same arguments give the same bytes. Raises UsageError where the image cannot be
    stored or differs from its truth in shape.
    """
    import hashlib
    import io

    import pydicom
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage, generate_uid

    if image.shape != truth.mask.shape:
        raise UsageError("The image and its truth differ in shape", value=(image.shape, truth.mask.shape))
    if not np.isfinite(image).all() or image.min() < 0 or image.max() > 65535:
        raise UsageError("Pixels must lie in 0 to 65535", value=(float(image.min()), float(image.max())))
    pixels = np.rint(image).astype("<u2")
    rows, columns = pixels.shape
    row_mm, column_mm = truth.spacing_mm
    t2 = truth.weighting == "T2"

    def uid(*parts: str) -> str:
        return str(generate_uid(entropy_srcs=["spinebox-phantom", str(seed), *parts]))

    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = MRImageStorage
    meta.MediaStorageSOPInstanceUID = uid("instance", truth.weighting, hashlib.sha256(pixels.tobytes()).hexdigest())
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.ImplementationClassUID = str(generate_uid(entropy_srcs=["spinebox-phantom", "implementation"]))
    meta.ImplementationVersionName = "SPINEBOX_PHANTOM"

    ds: Any = FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128)
    ds.SpecificCharacterSet = "ISO_IR 192"
    # A phantom is made, not measured; DERIVED would need a source image, and readers expect an axis for MR.
    ds.ImageType = ["ORIGINAL", "PRIMARY", "OTHER"]
    ds.SOPClassUID = meta.MediaStorageSOPClassUID
    ds.SOPInstanceUID = meta.MediaStorageSOPInstanceUID
    ds.StudyDate = ds.SeriesDate = ds.AcquisitionDate = ds.ContentDate = "20250101"
    ds.StudyTime = ds.SeriesTime = ds.AcquisitionTime = ds.ContentTime = "120000"
    ds.AccessionNumber = ""
    ds.Modality = "MR"
    ds.Manufacturer = "Spinebox"
    ds.ManufacturerModelName = "Phantom"
    ds.ReferringPhysicianName = ""
    ds.StudyDescription = "Synthetic lumbar spine"
    ds.SeriesDescription = f"{truth.weighting} TSE sagittal (synthetic)"
    ds.PatientName = "PHANTOM^SPINEBOX"
    ds.PatientID = f"PHANTOM-{seed}"
    ds.PatientBirthDate = ""
    ds.PatientSex = "O"
    ds.PatientComments = "Synthetic phantom, no patient. " + DISCLAIMER
    ds.BodyPartExamined = "LSPINE"
    ds.ScanningSequence = "SE"
    ds.SequenceVariant = "SK"
    ds.ScanOptions = ""
    ds.MRAcquisitionType = "2D"
    ds.SliceThickness = "4"
    ds.RepetitionTime = "3500" if t2 else "600"
    ds.EchoTime = "100" if t2 else "10"
    ds.NumberOfAverages = "1"
    ds.MagneticFieldStrength = "1.5"
    ds.SpacingBetweenSlices = "4.4"
    ds.EchoTrainLength = "15" if t2 else "3"
    ds.FlipAngle = "90"
    ds.DeviceSerialNumber = "0"
    ds.SoftwareVersions = "1"
    ds.PatientPosition = "HFS"
    ds.StudyInstanceUID = uid("study")
    ds.SeriesInstanceUID = uid("series", truth.weighting)
    ds.StudyID = "1"
    ds.SeriesNumber = "1" if t2 else "2"
    ds.AcquisitionNumber = "1"
    ds.InstanceNumber = "1"
    # The patient's x grows to the left, y to the back, z to the head: columns run backwards, rows downwards.
    ds.ImagePositionPatient = ["0", f"{-columns * column_mm / 2:.4f}", f"{rows * row_mm / 2:.4f}"]
    ds.ImageOrientationPatient = ["0", "1", "0", "0", "0", "-1"]
    ds.FrameOfReferenceUID = uid("frame")
    ds.PositionReferenceIndicator = ""
    ds.SliceLocation = "0"
    ds.ImageComments = "Synthetic phantom. " + DISCLAIMER
    ds.SamplesPerPixel = 1
    ds.PhotometricInterpretation = "MONOCHROME2"
    ds.Rows, ds.Columns = rows, columns
    ds.PixelSpacing = [f"{row_mm:.6g}", f"{column_mm:.6g}"]
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 16, 15, 0
    low, high = float(np.percentile(pixels, 1)), float(max(np.percentile(pixels, 99.5), 1))
    ds.WindowCenter, ds.WindowWidth = f"{(low + high) / 2:.1f}", f"{max(high - low, 1):.1f}"
    ds.PixelData = pixels.tobytes()
    buffer = io.BytesIO()
    pydicom.dcmwrite(buffer, ds, enforce_file_format=True)
    data = buffer.getvalue()
    if isinstance(destination, str | Path):
        Path(destination).write_bytes(data)
    elif destination is not None:
        destination.write(data)
    return data


def _plate_to_json(plate: PlateTruth) -> list[list[float]]:
    """Anterior rim, middle, posterior rim."""
    return [[round(x, 3), round(y, 3)] for x, y in (plate.anterior_px, plate.middle_px, plate.posterior_px)]


def truth_to_json(truth: Truth) -> dict[str, Any]:
    """The truth without its mask, boxes in pixel edges."""
    return {
        "disclaimer": DISCLAIMER,
        "weighting": truth.weighting,
        "spacing_mm": list(truth.spacing_mm),
        "rows_columns": list(truth.mask.shape),
        "discs": [
            {
                "level": d.level,
                "box_px": list(d.box_px),
                "pfirrmann": d.pfirrmann,
                "herniation": d.herniation,
                "narrowing": d.narrowing,
                "bulging": d.bulging,
                "heights_mm": [round(v, 3) for v in d.heights_mm],
                "mean_height_mm": round(d.mean_height_mm, 3),
                "angle_deg": round(d.angle_deg, 3),
                "segment_deg": round(d.segment_deg, 3),
                "slip_mm": round(d.slip_mm, 3),
                "slip_percent": round(d.slip_percent, 3),
                "canal_mm": round(d.canal_mm, 3),
            }
            for d in truth.discs
        ],
        "vertebrae": [
            {
                "level": v.level,
                "box_px": list(v.box_px),
                "upper_end_plate_px": _plate_to_json(v.upper),
                "lower_end_plate_px": _plate_to_json(v.lower),
                "heights_mm": [round(h, 3) for h in v.heights_mm],
                "wedge_deg": round(v.wedge_deg, 3),
            }
            for v in truth.vertebrae
        ],
        "sacral_end_plate_px": _plate_to_json(truth.sacral_plate),
        "lordosis_deg": round(truth.lordosis_deg, 3),
        "sacrum_box_px": list(truth.sacrum_box) if truth.sacrum_box else None,
    }


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m models.phantom",
        description="Write synthetic lumbar MRI slices with their exact truth. " + DISCLAIMER,
        epilog="Files: phantom-SEED.dcm, phantom-SEED.json (truth), phantom-SEED-mask.png (0 background, 1 vertebra, 2 disc, 3 canal).",
    )
    parser.add_argument(
        "--seed", type=int, default=DEMO_SEED, help="first seed, 0 or more; each image takes the next (default %(default)s)"
    )
    parser.add_argument("--count", type=int, default=1, help="how many images, 1 to 100000 (default %(default)s)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write into; made where it is missing")
    parser.add_argument("--png", action="store_true", help="write an 8-bit PNG beside each DICOM file")
    parser.add_argument("--t1", action="store_true", help="T1 weighted instead of T2")
    parser.add_argument("--no-sacrum", action="store_true", help="end the field of view above the sacrum, so levels cannot be told")
    parser.add_argument("--demo", action="store_true", help="the canonical demonstration study (grades mixed) instead of random grades")
    args = parser.parse_args(argv)
    if args.seed < 0 or not 1 <= args.count <= 100_000:
        parser.error("--seed must be 0 or more, --count 1 to 100000")
    if args.demo and (args.t1 or args.no_sacrum):
        parser.error("--demo is T2 with its sacrum; leave out --t1 and --no-sacrum")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    from rich.console import Console
    from rich.progress import track

    args = _arguments(argv)
    console = Console(stderr=True)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        for seed in track(range(args.seed, args.seed + args.count), description="Phantoms", console=console):
            rng = np.random.default_rng(seed)
            image, truth = demo(seed) if args.demo else draw(rng, weighting="T1" if args.t1 else "T2", sacrum=not args.no_sacrum)
            stem = args.out / f"phantom-{seed}"
            write_dicom(image, truth, stem.with_suffix(".dcm"), seed=seed)
            stem.with_suffix(".json").write_text(json.dumps(truth_to_json(truth), indent=1) + "\n", encoding="utf-8")
            _write_png(Path(f"{stem}-mask.png"), truth.mask)
            if args.png:
                high = max(float(np.percentile(image, 99.5)), 1.0)
                _write_png(stem.with_suffix(".png"), np.asarray(np.clip(image * (255 / high), 0, 255), np.uint8))
    except OSError as error:
        console.print(f"Cannot write: {error}. Choose another --out or free space.", markup=False)
        return 8
    console.print(f"{args.count} written to {args.out}. {DISCLAIMER}", markup=False)
    return 0


def _write_png(path: Path, pixels: NDArray[np.uint8]) -> None:
    ok, data = cv2.imencode(".png", pixels)
    if not ok:
        raise OSError(f"{path} could not be encoded")
    path.write_bytes(data.tobytes())


if __name__ == "__main__":
    sys.exit(main())
