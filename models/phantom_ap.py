"""A synthetic frontal radiograph of the spine with exact truth: boxes, tilts and Cobb angles known before anything is drawn.

Hides the column (end plates turned by a tilt that swings between given angles), the anatomy painted around it in
millimetres, and the exposure. Radiographs add what the beam passes, so shapes are added, not painted over one another as in
`models/phantom.py`. No patient is in it. Deterministic: the same generator state gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import cv2
import numpy as np
from numpy.typing import NDArray

from appliance.errors import UsageError
from appliance.report import Box

Points = NDArray[np.float64]
Plane = NDArray[np.float32]

LEVELS = (*(f"T{i}" for i in range(1, 13)), *(f"L{i}" for i in range(1, 6)))
TYPICAL_HW = ((832, 458), (1024, 512), (960, 600), (1024, 420), (720, 400))
MIN_SIDE, MAX_SIDE = 128, 2048
LEAST_SPAN = 3  # vertebrae between two extremes of tilt
STEEPEST_DEG = 48.0
_SUPERSAMPLING = 2
_COARSE = 8  # pixels of the picture for one of the layer that soft shapes lie on
_FIXED_POINT_BITS = 4  # of OpenCV's polygon coordinates


@dataclass(frozen=True)
class Swing:
    """An extreme of tilt: the vertebra (index into LEVELS) and the tilt of both of its end plates, degrees, right side up."""

    vertebra: int
    tilt_deg: float


@dataclass(frozen=True)
class VertebraTruth:
    """`box_px` edges around the body; the end plates as ((x0, y0), (x1, y1)) from left to right; their tilts in degrees."""

    level: str
    box_px: Box
    upper_px: tuple[tuple[float, float], tuple[float, float]]
    lower_px: tuple[tuple[float, float], tuple[float, float]]
    upper_tilt_deg: float
    lower_tilt_deg: float


@dataclass(frozen=True)
class CurveTruth:
    """Levels of the end vertebrae and the angle between the upper plate of one and the lower plate of the other."""

    upper: str
    lower: str
    angle_deg: float


@dataclass(frozen=True)
class Truth:
    """What `draw` drew: T1 to L5 from the top down, all within the picture; pixels are square."""

    vertebrae: tuple[VertebraTruth, ...]
    curves: tuple[CurveTruth, ...]
    spacing_mm: float


def random_swings(rng: np.random.Generator) -> tuple[Swing, ...]:
    """A spine as they come: one to three curves, straight ones included; T1 and L5 are always ends."""
    count = int(rng.integers(1, 4))
    inner = [round(float(v)) for v in np.linspace(0, 16, count + 1)[1:-1]]
    play = 4 - count  # so that extremes never come too near one another
    places = [0, *(p + int(rng.integers(-play, play + 1)) for p in inner), 16]
    major = float(rng.choice([rng.uniform(0, 10), rng.uniform(10, 45), rng.uniform(45, 80)], p=[0.2, 0.6, 0.2]))
    sizes = major * rng.uniform(0.35, 0.9, count)
    sizes[int(rng.integers(count))] = major
    sign = 1.0 if rng.random() < 0.5 else -1.0
    tilt = np.concatenate([[0.0], np.cumsum(sizes * sign * (-1.0) ** np.arange(count))])
    tilt *= min(1.0, 2 * (STEEPEST_DEG - 4) / max(float(np.ptp(tilt)), 1e-9))
    tilt -= (tilt.max() + tilt.min()) / 2 + float(np.clip(rng.normal(0, 2), -4, 4))
    return tuple(Swing(p, float(t)) for p, t in zip(places, tilt, strict=True))


def _checked(swings: Sequence[Swing]) -> None:
    places = [s.vertebra for s in swings]
    if len(swings) < 2 or places[0] != 0 or places[-1] != len(LEVELS) - 1 or min(np.diff(places)) < LEAST_SPAN:
        raise UsageError(f"Extremes of tilt start at T1, end at L5 and lie {LEAST_SPAN} vertebrae apart", value=str(places))
    if max(abs(s.tilt_deg) for s in swings) > STEEPEST_DEG:
        raise UsageError(f"A phantom's end plate is tilted by at most {STEEPEST_DEG:.0f} degrees", value=str(swings))


def _plate_tilts(swings: Sequence[Swing]) -> Points:
    """17 x 2 tilts in degrees of upper and lower plates: level over an end vertebra, half a cosine between two of them."""
    out = np.zeros((len(LEVELS), 2))
    for a, b in pairwise(swings):
        # The disc takes 40 % of the turn between two vertebrae, the body the rest.
        steps = np.zeros(2 * (b.vertebra - a.vertebra))
        steps[0::2], steps[1::2] = 0.4, 0.6
        steps[-1] = 0.0  # the lower end vertebra is not wedged
        share = np.concatenate([[0.0], np.cumsum(steps)])
        share = (1 - np.cos(np.pi * share / share[-1])) / 2
        values = a.tilt_deg + (b.tilt_deg - a.tilt_deg) * share
        flat = out.reshape(-1)
        flat[2 * a.vertebra + 1 : 2 * b.vertebra + 2] = values
        if a.vertebra == 0:
            flat[0] = a.tilt_deg
    return out


@dataclass(frozen=True)
class Body:
    """A vertebral body in mm: middles of its plates, their directions (unit vectors to the right), half widths."""

    upper: Points
    lower: Points
    upper_right: Points
    lower_right: Points
    half: tuple[float, float]

    def corners(self) -> Points:
        """Upper left, upper right, lower right, lower left."""
        a, b = self.half
        u, v = self.upper_right, self.lower_right
        return np.array([self.upper - a * u, self.upper + a * u, self.lower + b * v, self.lower - b * v])

    @property
    def centre(self) -> Points:
        return (self.upper + self.lower) / 2

    @property
    def right(self) -> Points:
        mean = self.upper_right + self.lower_right
        return np.asarray(mean / np.hypot(*mean))

    @property
    def down(self) -> Points:
        return np.array([-self.right[1], self.right[0]])


def _right(tilt_deg: float) -> Points:
    return np.array([np.cos(np.deg2rad(tilt_deg)), -np.sin(np.deg2rad(tilt_deg))])


def column(rng: np.random.Generator, swings: Sequence[Swing]) -> list[Body]:
    """Bodies in mm from T1 down, the middle of T1's upper plate at (0, 0)."""
    tilts = _plate_tilts(swings)
    size = rng.uniform(0.85, 1.1)
    at = np.zeros(2)
    out: list[Body] = []
    for i, (above, below) in enumerate(tilts):
        share = i / 16
        height = size * (15.5 + 11.0 * share) * rng.uniform(0.97, 1.03)
        wide = size * (14.5 - 3.0 * np.sin(np.pi * min(1.0, share * 2.4)) + 9.5 * share) * rng.uniform(0.98, 1.02)
        upper_right, lower_right = _right(above), _right(below)
        middle = upper_right + lower_right
        down = np.array([-middle[1], middle[0]]) / np.hypot(*middle)
        lower = at + down * height
        out.append(Body(at, lower, upper_right, lower_right, (wide * 0.98, wide * 1.02)))
        following = tilts[i + 1, 0] if i < 16 else below
        disc_right = lower_right + _right(following)
        at = lower + np.array([-disc_right[1], disc_right[0]]) / np.hypot(*disc_right) * size * (3.2 + 6.5 * share**1.5)
    return out


class _Film:
    """Supersampled sum of attenuations; takes millimetres. Soft shapes go on a coarse layer: blurring them in full takes seconds."""

    def __init__(self, hw: tuple[int, int], spacing: float, origin: Points) -> None:
        self.hw = hw
        self.per_mm = 1 / spacing
        self.origin = origin
        self.fine: Plane = np.zeros((hw[0] * _SUPERSAMPLING, hw[1] * _SUPERSAMPLING), np.float32)
        self.coarse: Plane = np.zeros((-(-hw[0] // _COARSE), -(-hw[1] // _COARSE)), np.float32)

    def to_px(self, points: Points) -> Points:
        """mm -> edges of the picture."""
        return np.asarray((points - self.origin) * self.per_mm)

    def image(self) -> Plane:
        rows, columns = self.hw
        fine = cv2.resize(self.fine, (columns, rows), interpolation=cv2.INTER_AREA)
        coarse = cv2.resize(self.coarse, None, fx=_COARSE, fy=_COARSE, interpolation=cv2.INTER_LINEAR)
        return np.asarray(fine + coarse[:rows, :columns], np.float32)

    def add(self, points: Points, value: float, soft: float = 0.5) -> None:
        """A filled polygon with edges `soft` mm wide."""
        plane, zoom = (self.coarse, 1 / _COARSE) if soft * self.per_mm > _COARSE / 2 else (self.fine, float(_SUPERSAMPLING))
        px = self.to_px(points) * zoom
        sigma = soft * self.per_mm * zoom
        x0, y0 = (int(max(0, v)) for v in px.min(0) - 4 * sigma - 4)
        x1, y1 = (int(max(0, v)) for v in px.max(0) + 4 * sigma + 4)
        part = plane[y0:y1, x0:x1]
        if not part.size:
            return
        layer = np.zeros(part.shape, np.float32)
        fixed = np.rint((px - 0.5 - [x0, y0]) * 2**_FIXED_POINT_BITS).astype(np.int32)
        cv2.fillPoly(layer, [fixed], 1.0, lineType=cv2.LINE_8, shift=_FIXED_POINT_BITS)
        part += value * cv2.GaussianBlur(layer, (0, 0), max(sigma, 0.3))

    def line(self, points: Points, width: float, value: float, soft: float = 0.4) -> None:
        """A polyline of `width` mm."""
        along = np.gradient(points, axis=0)
        along /= np.hypot(along[:, 0], along[:, 1])[:, None] + 1e-9
        normal = np.stack([along[:, 1], -along[:, 0]], 1) * width / 2
        self.add(np.concatenate([points + normal, (points - normal)[::-1]]), value, soft)


def _mm(x: float, y: float) -> Points:
    return np.array([x, y], dtype=np.float64)


def _ellipse(centre: Points, a: float, b: float, turn: float = 0.0, count: int = 40) -> Points:
    t = np.linspace(0, 2 * np.pi, count, endpoint=False)
    c, s = np.cos(turn), np.sin(turn)
    return centre + np.stack([a * np.cos(t), b * np.sin(t)], 1) @ np.array([[c, s], [-s, c]])


def _rounded(corners: Points, waist: float, count: int = 14) -> Points:
    """Quadrilateral -> a body's outline: corners cut, sides drawn in by `waist` mm."""
    out = []
    middle = corners.mean(0)
    for i in range(4):
        a, b = corners[i], corners[(i + 1) % 4]
        t = np.linspace(0.06, 0.94, count)[:, None]
        pull = waist * np.sin(np.pi * t) * (1.0 if i % 2 else 0.3)
        side = a + (b - a) * t
        inward = middle - side
        out.append(side + inward / np.hypot(inward[:, 0], inward[:, 1])[:, None] * pull)
    return np.concatenate(out)


def draw(rng: np.random.Generator, hw: tuple[int, int] | None = None, swings: Sequence[Swing] | None = None) -> tuple[Plane, Truth]:
    """One frontal radiograph, H x W float32 whole numbers in 0..4095 (bright bone), and its truth.

    `swings` are the extremes of tilt from T1 to L5; random where None. Raises UsageError for those that no spine has and for
    a picture smaller than MIN_SIDE or larger than MAX_SIDE.
    """
    film, bodies, known = _planned(rng, hw, swings)
    _paint(rng, film, bodies)
    return _expose(rng, film), known


def truth(rng: np.random.Generator, hw: tuple[int, int] | None = None, swings: Sequence[Swing] | None = None) -> Truth:
    """The truth of what `draw` would draw, a hundred times as fast."""
    return _planned(rng, hw, swings)[2]


def _planned(rng: np.random.Generator, hw: tuple[int, int] | None, swings: Sequence[Swing] | None) -> tuple[_Film, list[Body], Truth]:
    chosen = random_swings(rng)
    swings = tuple(swings) if swings is not None else chosen
    _checked(swings)
    typical = TYPICAL_HW[int(rng.integers(len(TYPICAL_HW)))]
    hw = hw or typical
    if not all(MIN_SIDE <= side <= MAX_SIDE for side in hw):
        raise UsageError(f"A phantom's sides are {MIN_SIDE} to {MAX_SIDE} pixels", value=f"{hw[0]} x {hw[1]}")
    bodies = column(rng, swings)
    corners = np.concatenate([b.corners() for b in bodies])
    low, high = corners.min(0), corners.max(0)
    above, below, aside = rng.uniform(15, 120), rng.uniform(8, 170), rng.uniform(25, 70)
    spacing = max((high[1] - low[1] + above + below) / hw[0], (high[0] - low[0] + 2 * aside) / hw[1])
    free = np.array([hw[1] * spacing - (high[0] - low[0]), hw[0] * spacing - (high[1] - low[1])])
    origin = low - free * [rng.uniform(0.35, 0.65), above / (above + below)]
    film = _Film(hw, spacing, origin)
    return film, bodies, _truth(film, bodies, swings, spacing)


def _paint(rng: np.random.Generator, film: _Film, bodies: list[Body]) -> None:
    _soft_tissue(rng, film, bodies)
    _ribs(rng, film, bodies)
    _pelvis(rng, film, bodies[-1])
    _neck(rng, film, bodies[0])
    fade = rng.uniform(0.5, 1.0)  # the upper spine lies behind the mediastinum
    for i, body in enumerate(bodies):
        _bone(rng, film, body, 0.34 * (fade + (1 - fade) * min(1.0, i / 8)))


def _bone(rng: np.random.Generator, film: _Film, body: Body, value: float) -> None:
    corners, half = body.corners(), float(np.mean(body.half))
    height = float(np.hypot(*(body.lower - body.upper)))
    outline = _rounded(corners, rng.uniform(0.8, 1.8))
    film.add(outline, value)
    # Cortex: what the beam meets edge on.
    film.add(outline, value * 0.35, 0.4)
    film.add(body.centre + (outline - body.centre) * (1 - 2.4 / half), -value * 0.35, 0.4)
    for plate, right, wide in ((body.upper, body.upper_right, body.half[0]), (body.lower, body.lower_right, body.half[1])):
        film.line(plate + np.linspace(-0.88, 0.88, 8)[:, None] * wide * right, 1.1, value * rng.uniform(0.4, 0.8), 0.35)
    for side in (-1, 1):
        pedicle = body.centre + side * half * rng.uniform(0.55, 0.66) * body.right - body.down * height * 0.12
        turn = float(np.arctan2(body.right[1], body.right[0]))
        film.add(_ellipse(pedicle, half * 0.15, height * 0.24, turn), value * 0.7, 0.5)
        film.add(_ellipse(pedicle, half * 0.09, height * 0.16, turn), -value * 0.5, 0.5)
        tip = pedicle + side * half * rng.uniform(0.75, 1.0) * body.right - body.down * height * 0.05
        film.line(np.array([pedicle, (pedicle + tip) / 2, tip]), height * 0.28, value * 0.4, 0.9)
    spinous = body.centre + body.down * height * rng.uniform(0.15, 0.4) + rng.normal(0, 0.6) * body.right
    film.add(_ellipse(spinous, half * 0.13, height * 0.3, float(np.arctan2(body.right[1], body.right[0]))), value * 0.55, 0.7)


def _soft_tissue(rng: np.random.Generator, film: _Film, bodies: list[Body]) -> None:
    axis = np.array([b.centre for b in bodies])
    middle, top, bottom = axis.mean(0), axis[0, 1], axis[-1, 1]
    wide = rng.uniform(115, 150)
    trunk = np.array([middle[0] + 0.0, (top + bottom) / 2])
    film.add(_ellipse(trunk, wide, (bottom - top) * 0.85), rng.uniform(0.3, 0.5), 12)
    film.add(_ellipse(np.array([middle[0], bottom - 20]), wide * 0.9, (bottom - top) * 0.38), rng.uniform(0.15, 0.35), 15)
    diaphragm = bodies[9].centre[1] + rng.uniform(-8, 12)
    for side in (-1, 1):
        x = middle[0] + side * wide * rng.uniform(0.46, 0.54)
        tall = diaphragm - top
        lung = _ellipse(np.array([x, top + tall * 0.52]), wide * rng.uniform(0.34, 0.42), tall * 0.56, side * -0.06)
        lung[:, 1] = np.minimum(lung[:, 1], diaphragm + 6 * np.cos((lung[:, 0] - x) / wide * 3))
        film.add(lung, -rng.uniform(0.25, 0.45), 3)
    side = 1 if rng.random() < 0.9 else -1
    heart = np.array([middle[0] + side * wide * 0.22, diaphragm - rng.uniform(30, 45)])
    film.add(_ellipse(heart, wide * rng.uniform(0.3, 0.38), rng.uniform(38, 50), side * 0.5), rng.uniform(0.1, 0.22), 5)
    mediastinum = np.concatenate([axis[:9] + _mm(rng.uniform(16, 26), 0), (axis[:9] - _mm(rng.uniform(14, 24), 0))[::-1]])
    film.add(mediastinum, rng.uniform(0.08, 0.2), 6)
    for _ in range(int(rng.integers(2, 10))):
        gas = np.array([middle[0] + rng.normal(0, 50), rng.uniform(bodies[12].centre[1], bottom + 60)])
        film.add(_ellipse(gas, rng.uniform(6, 22), rng.uniform(5, 14), rng.uniform(0, 3)), -rng.uniform(0.08, 0.25), 2.5)


def _ribs(rng: np.random.Generator, film: _Film, bodies: list[Body]) -> None:
    reach = rng.uniform(95, 125)
    droop = rng.uniform(0.25, 0.6)
    value = rng.uniform(0.07, 0.16)
    for i in range(12):
        body = bodies[i]
        half = float(np.mean(body.half))
        long = reach * (0.55 + 0.45 * np.sin(np.pi * min(1.0, (i + 1) / 9) / 2)) * (1.0 if i < 10 else 0.6 if i == 10 else 0.4)
        for side in (-1, 1):
            t = np.linspace(0, 1, 24)
            x = side * (half + long * np.sin(t * np.pi * 0.55))
            y = long * (droop * t**1.7 - 0.16 * np.sin(np.pi * t))
            # A twisted chest spreads the ribs of one side; a share of the body's tilt goes on into them.
            line = body.upper + x[:, None] * (0.5 * body.right + _mm(0.5, 0.0)) + y[:, None] * np.array([0.0, 1.0])
            film.line(line, 7.5, value, 0.8)
            film.line(line, 4.5, -0.55 * value, 0.8)
            if i < 8:  # its front part, on the way back
                front = line[-1] + np.stack([-side * t * long * 0.6, t * long * 0.45], 1)
                film.line(front, 7.0, 0.5 * value, 1.2)
    for side in (-1, 1):
        t = np.linspace(0, 1, 16)
        start = bodies[1].centre + _mm(side * 14.0, 6.0)
        clavicle = start + np.stack([side * t * 110, -18 * np.sin(t * np.pi * 0.8) - 10 * t], 1)
        film.line(clavicle, 10, rng.uniform(0.12, 0.22), 1.0)


def _pelvis(rng: np.random.Generator, film: _Film, last: Body) -> None:
    base = last.lower + last.down * rng.uniform(7, 12)
    half = last.half[1]
    wide, tip = 1.15 * half * last.right, _mm(half * 0.35, 0.0)
    end = base + _mm(0.0, 95.0)
    film.add(np.array([base - wide, base + wide, end + tip, end - tip]), rng.uniform(0.15, 0.25), 2.0)
    for k in range(4):
        for side in (-1, 1):
            film.add(_ellipse(base + _mm(side * half * (0.55 - 0.09 * k), 16.0 + 20 * k), 4.5, 3.5), -0.1, 1.0)
    for side in (-1, 1):
        wing = _ellipse(base + _mm(side * rng.uniform(68, 80), rng.uniform(22, 36)), 50, 68, side * -0.35)
        film.add(wing, rng.uniform(0.12, 0.2), 1.5)
        film.add(_ellipse(wing.mean(0), 45, 63, side * -0.35), -0.06, 2.0)


def _neck(rng: np.random.Generator, film: _Film, first: Body) -> None:
    """Cervical vertebrae above T1, which no box is drawn around."""
    at = first.upper - first.down * 4.0
    for _ in range(6):
        half, height = first.half[0] * rng.uniform(0.7, 0.8), rng.uniform(11, 13)
        top = at - first.down * height
        _bone(rng, film, Body(top, at, first.upper_right, first.upper_right, (half, half)), 0.25)
        at = top - first.down * rng.uniform(3.5, 5)


def _expose(rng: np.random.Generator, film: _Film) -> Plane:
    """Attenuation -> grey values: scatter, response, grain of the exposure, at times an equaliser; whole numbers."""
    rows, columns = film.hw
    image = cv2.GaussianBlur(film.image(), (0, 0), float(rng.uniform(0.4, 0.9)))
    small = cv2.resize(image, None, fx=1 / _COARSE, fy=1 / _COARSE, interpolation=cv2.INTER_AREA)
    scatter = cv2.resize(cv2.GaussianBlur(small, (0, 0), columns / 6 / _COARSE), (columns, rows), interpolation=cv2.INTER_LINEAR)
    image = image - rng.uniform(0.0, 0.6) * scatter
    field = cv2.resize(rng.normal(0, 0.06, (4, 3)).astype(np.float32), (columns, rows), interpolation=cv2.INTER_CUBIC)
    grain = cv2.GaussianBlur(rng.standard_normal((rows, columns), dtype=np.float32), (0, 0), 0.6)
    structure = cv2.GaussianBlur(rng.standard_normal((rows, columns), dtype=np.float32), (0, 0), 2.0)
    image = image + field + grain * rng.uniform(0.01, 0.03) + structure * rng.uniform(0.02, 0.08)
    low, high = (float(v) for v in np.percentile(image, (0.5, 99.8)))
    unit = np.clip((image - low) / max(high - low, 1e-6), 0, 1) ** rng.uniform(0.7, 1.4)
    if rng.random() < 0.6:
        clahe = cv2.createCLAHE(clipLimit=float(rng.uniform(1.5, 5.0)), tileGridSize=(8, 8))
        unit = clahe.apply(np.rint(unit * 4095).astype(np.uint16)).astype(np.float32) / 4095
        unit = unit / max(float(unit.max()), 1e-6)
    return np.asarray(np.rint(unit * 4095), np.float32)


def _truth(film: _Film, bodies: list[Body], swings: Sequence[Swing], spacing: float) -> Truth:
    vertebrae = []
    for level, body, (above, below) in zip(LEVELS, bodies, _plate_tilts(swings), strict=True):
        px = film.to_px(body.corners())
        (ul, ur, lr, ll) = ((float(x), float(y)) for x, y in px)
        box = (float(px[:, 0].min()), float(px[:, 1].min()), float(px[:, 0].max()), float(px[:, 1].max()))
        vertebrae.append(VertebraTruth(level, box, (ul, ur), (ll, lr), float(above), float(below)))
    curves = tuple(CurveTruth(LEVELS[a.vertebra], LEVELS[b.vertebra], abs(a.tilt_deg - b.tilt_deg)) for a, b in pairwise(swings))
    return Truth(tuple(vertebrae), curves, spacing)
