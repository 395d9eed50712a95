"""Straight sides and corners of a structure from its region of pixels, to a fraction of a pixel.

Hides how an outline becomes end plates: the region's smoothed indicator is met along parallel lines, where it crosses one half
is the edge, and a parabola is fitted to the crossings of each side with outliers left out. Rounded corners and the ends of an
end plate have no part in the fit, so corners are where the fitted sides meet, as a person would mark them.

Everything is in millimetres (or in pixels, with a spacing of 1) from the corner of the image, x to the right, y down, pixel
edges; so rows and columns may have spacings of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from kernels import rank
from kernels.mask import Window, bounds

Vector = NDArray[np.float64]
Spacing = tuple[float, float]

SMOOTH_PX = 0.8  # steps of single pixels vanish, corners move by less than they are rounded already
STEP_PX = 0.5
LINES = 33
PLATE_SHARE = 0.84  # of the depth, on which an end plate is fitted: its rims are round
SIDE_SHARE = 0.7  # of the height
LEAST_PX = 30  # region of fewer pixels has no sides
LEAST_SIDE_PX = 3
LEAST_POINTS, LEAST_INLIERS = 8, 0.6
ROUNDS = 2
OUTWARDS = np.array([1.0, -1.0, -1.0, 1.0])  # of the upper, lower, front and back side
ALLOWANCE, HOLLOW = 0.02, 0.09  # of the depth
_RIDGE = 1e-12 * np.eye(3)  # keeps the equations solvable where few crossings are left


class Field:
    """The smoothed indicator of a region, sampled along lines in millimetres. Outside the region's surroundings it is 0. `window` is
    that of the region, where it is known."""

    def __init__(self, pixels: NDArray[np.bool_], spacing: Spacing, window: Window | None = None) -> None:
        rows, columns = window or bounds(pixels)
        self.spacing = spacing
        self.step = STEP_PX * min(spacing)
        pad = 4
        part = pixels[rows, columns] if pixels[rows, columns].size else np.zeros((1, 1), bool)
        self.corner = (columns.start - pad, rows.start - pad)
        padded = np.zeros((part.shape[0] + 2 * pad, part.shape[1] + 2 * pad), np.float32)
        padded[pad:-pad, pad:-pad] = part
        self.values = np.asarray(cv2.GaussianBlur(padded, (0, 0), SMOOTH_PX), np.float32)
        self.count = int((self.values >= 0.5).sum())  # of what is left when it is smoothed

    def moments(self) -> tuple[Vector, NDArray[np.float64]]:
        """Centre (x, y) and 2 x 2 covariance of the region."""
        m = cv2.moments((self.values >= 0.5).astype(np.uint8), True)
        per = np.array([self.spacing[1], self.spacing[0]])
        centre = (np.array([m["m10"], m["m01"]]) / m["m00"] + self.corner + 0.5) * per
        spread = np.array([[m["mu20"], m["mu11"]], [m["mu11"], m["mu02"]]]) / m["m00"]
        return np.asarray(centre, np.float64), spread * np.outer(per, per)

    def at(self, points: Vector) -> NDArray[np.float32]:
        """Values at N x ... x 2 points."""
        return self._at(points[..., 0], points[..., 1])

    def _at(self, x: Vector, y: Vector) -> NDArray[np.float32]:
        """Values at points by their x and y, two arrays of one shape: pairs in the last axis would be worked on two by two."""
        column = (x.reshape(1, -1) / self.spacing[1] - self.corner[0] - 0.5).astype(np.float32)
        row = (y.reshape(1, -1) / self.spacing[0] - self.corner[1] - 0.5).astype(np.float32)
        # OpenCV takes at most 32767 columns.
        parts = [
            cv2.remap(self.values, column[:, i : i + 32000], row[:, i : i + 32000], cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT)
            for i in range(0, column.shape[1], 32000)
        ]
        return np.asarray(parts[0] if len(parts) == 1 else np.concatenate(parts, 1), np.float32).reshape(x.shape)

    def edges(self, starts: Vector, along: Vector, reach: float) -> NDArray[np.float64]:
        """Distance from each of K x N starts at which a line along its of K unit vectors leaves the region for good; K x N, NaN
        where the line never is in it."""
        distance = np.arange(0.0, reach + self.step, self.step)
        values = self._at(*(starts[:, :, None, k] + distance * along[:, None, None, k] for k in (0, 1)))
        inside = values >= 0.5
        end = len(distance) - 1
        last = end - inside[:, :, ::-1].argmax(axis=2)
        side, line = np.ogrid[: values.shape[0], : values.shape[1]]
        here, after = values[side, line, last], values[side, line, np.minimum(last + 1, end)]
        share = np.where(here > after, (here - 0.5) / np.maximum(here - after, 1e-6), 0.0)
        return np.where(here >= 0.5, distance[last] + np.clip(share, 0, 1) * self.step, np.nan)

    def chords(self, points: Vector, along: Vector, reach: Vector | float) -> NDArray[np.float64]:
        """Where the line through each of N points enters and leaves the part of the region that the point lies in, or that lies
        nearest to it on the line: N x 2 signed distances; NaN where the line does not meet the region. The unit vector `along` and
        the reach are one for all, or one for each."""
        out = np.full((len(points), 2), np.nan)
        if not len(points):
            return out
        along, reach = np.broadcast_to(along, points.shape), np.broadcast_to(reach, len(points))
        reaches, which = np.unique(reach, return_inverse=True)
        steps = [np.arange(-r, r + self.step, self.step) for r in reaches.tolist()]
        most = max(len(row) for row in steps)
        # A shorter line goes on at its last place: what is seen there again is neither nearer nor another border.
        distance = np.stack([np.concatenate([row, np.full(most - len(row), row[-1])]) for row in steps])[which]
        values = self._at(*(points[:, k, None] + distance * along[:, k, None] for k in (0, 1)))
        place = np.arange(most)
        inside = values >= 0.5
        near = np.where(inside, np.abs(distance), np.inf).argmin(1)[:, None]
        a = np.where(~inside & (place < near), place, -1).max(1)
        b = np.where(~inside & (place > near), place, most).min(1)
        met = np.flatnonzero(inside.any(1) & (a >= 0) & (b < most))
        a, b = a[met], b[met]
        before, after, last, beyond = values[met, a], values[met, a + 1], values[met, b - 1], values[met, b]
        out[met, 0] = distance[met, a] + (0.5 - before) / (after - before) * self.step
        out[met, 1] = distance[met, b - 1] + (last - 0.5) / (last - beyond) * self.step
        return out


@dataclass(frozen=True)
class Plate:
    """One end plate from rim to rim as (x, y); `middle` lies on it half way, deeper by its hollow."""

    front: Vector
    middle: Vector
    back: Vector

    @property
    def direction(self) -> Vector:
        """Unit vector from front to back."""
        across = self.back - self.front
        return np.asarray(across / np.hypot(*across))

    @property
    def length(self) -> float:
        return float(np.hypot(*(self.back - self.front)))


@dataclass(frozen=True)
class Quad:
    """Two end plates of one structure. `residual` is the root mean square distance of its edge from the worst of the fitted sides;
    of the walls only what was kept counts, because pedicles leave there."""

    upper: Plate
    lower: Plate
    residual: float

    @property
    def height(self) -> float:
        return float(np.hypot(*(self.upper.middle - self.lower.middle)))


@dataclass(frozen=True)
class _Curve:
    """value = a + b t + c t^2, but beyond the fitted crossings no further outwards than those of the same end reach, and a little.

    `outwards` is 1 or -1; `bounds` are for negative and positive t, in that direction. `residual` is root mean square over what
    was kept, `roughness` over everything.
    """

    a: float
    b: float
    c: float
    outwards: float = 1.0
    bounds: tuple[float, float] = (np.inf, np.inf)
    residual: float = 0.0
    roughness: float = 0.0

    def __call__(self, t: float) -> float:
        value = self.outwards * (self.a + self.b * t + self.c * t * t)
        return self.outwards * min(value, self.bounds[0 if t < 0 else 1])


def _parabolas(
    t: NDArray[np.float64], values: NDArray[np.float64], outwards: NDArray[np.float64], tolerance: float, depth: NDArray[np.float64]
) -> list[_Curve | None]:
    """K x N positions and values, K signs of the way outwards, K depths -> K curves that may end ALLOWANCE further out than what they
    were fitted to: rims are rounded, but a hollow end plate must not be drawn on beyond its lip. Least
    squares with trimming: what lies further off than 2.5 robust deviations, and than `tolerance`, is left out; None where too
    little is left. All at once: single small systems cost more to call than to solve."""
    allowance, hollow = ALLOWANCE * depth, HOLLOW * depth[:, None]
    good = np.isfinite(values)
    scale = np.maximum(np.abs(t).max(1, keepdims=True), 1e-9)
    basis = np.stack([np.ones_like(t), t / scale, (t / scale) ** 2], 2)
    found = np.where(good, values, 0.0)
    weights = good.astype(np.float64)
    # The first fit must not be drawn away by what is to be left out: absolute deviations, by weighting, from a straight line,
    # because a parabola would bend towards a pedicle at its end.
    straight = basis * [1.0, 1.0, 0.0]
    for _ in range(8):
        off = _off(straight, found, weights)[1]
        weights = good / np.maximum(off, tolerance / 4)
    fit, off = _off(straight, found, weights)
    for limit in (hollow, np.array([tolerance]), np.array([tolerance])):
        ranked = np.sort(np.where(good, off, np.inf), axis=1)
        typical = np.take_along_axis(ranked, (good.sum(1, keepdims=True) - 1) // 2, 1)
        weights = (good & (off <= np.maximum(limit, 2.5 * 1.4826 * typical))).astype(np.float64)
        fit, off = _off(basis, found, weights)
    kept = weights.sum(1)
    residual = np.sqrt((weights * off**2).sum(1) / np.maximum(kept, 1))
    roughness = np.sqrt((good * off**2).sum(1) / good.sum(1))
    reached = np.where(weights > 0, found * outwards[:, None], -np.inf)
    ends = [np.where(end, reached, -np.inf).max(1) + allowance for end in (t < -scale / 3, t > scale / 3)]
    # A side whose one end has nothing to be fitted to is none.
    enough = (kept >= np.maximum(LEAST_INLIERS * good.sum(1), 6)) & np.isfinite(ends[0]) & np.isfinite(ends[1])
    return [
        _Curve(float(f[0]), float(f[1] / w), float(f[2] / w**2), float(sign), (float(low), float(high)), float(r), float(rough))
        if ok
        else None
        for f, w, sign, low, high, r, rough, ok in zip(
            fit, scale[:, 0], outwards, ends[0], ends[1], residual, roughness, enough, strict=True
        )
    ]


def _off(
    basis: NDArray[np.float64], found: NDArray[np.float64], weights: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """K weighted fits: coefficients K x 3 and distances K x N."""
    weighted = (basis * weights[:, :, None]).transpose(0, 2, 1)
    fit = np.linalg.solve(weighted @ basis + _RIDGE, weighted @ found[:, :, None])
    return np.asarray(fit[:, :, 0], np.float64), np.abs(found - np.asarray(basis @ fit, np.float64)[:, :, 0])


@dataclass(frozen=True)
class _Frame:
    """Origin, and the unit vectors to the back and up: (t, s) are distances along them."""

    centre: Vector
    u: Vector
    v: Vector

    def point(self, t: float, s: float) -> Vector:
        return np.asarray(self.centre + t * self.u + s * self.v)


@dataclass(frozen=True)
class Shape:
    """A structure seen from the side, for `quads`: a vertebral body has `walls`, a disc has none, it bulges.

    `pixels` is H x W, `window` that of the region in it, where it is known. `up` points roughly (within 30 degrees) to the head,
    `back` roughly to the back; where `back` is not given, "front" and "back" of the answer are left and right as seen with `up` up.
    """

    pixels: NDArray[np.bool_]
    up: Vector
    back: Vector | None
    walls: bool
    window: Window | None = None


def quads(shapes: Sequence[Shape], spacing: Spacing) -> list[Quad | None]:
    """End plates of each shape; `spacing` is (row, column). All together take hardly longer than one: the sides of all are fitted
    at once.

    Rims of a body lie where the fitted end plates meet the fitted walls, those of a disc on the fitted borders where the disc ends
    at its middle height. None where the region is too small, or where an edge does not look like a side.
    """
    fits = [_Fit.begun(shape, spacing) for shape in shapes]
    _find_sides([fit for fit in fits if fit])
    for _ in range(ROUNDS - 1):
        _find_sides([fit for fit in fits if fit and fit.turned()])
    return [fit.quad() if fit else None for fit in fits]


def body_quad(pixels: NDArray[np.bool_], spacing: Spacing, up: Vector, back: Vector | None = None) -> Quad | None:
    """End plates of one vertebral body, as `quads`."""
    return quads([Shape(pixels, up, back, walls=True)], spacing)[0]


def disc_quad(pixels: NDArray[np.bool_], spacing: Spacing, up: Vector, back: Vector | None = None) -> Quad | None:
    """Upper and lower border of one disc, as `quads`."""
    return quads([Shape(pixels, up, back, walls=False)], spacing)[0]


_Sides = tuple[_Curve, _Curve, _Curve, _Curve]  # upper, lower, front and back


@dataclass
class _Fit:
    """One shape on its way: the frame that its sides are looked for in, and the sides found there; None where one is none."""

    field: Field
    walls: bool
    frame: _Frame
    height: float
    depth: float
    sides: _Sides | None = None

    @classmethod
    def begun(cls, shape: Shape, spacing: Spacing) -> _Fit | None:
        field = Field(shape.pixels, spacing, shape.window)
        if field.count < LEAST_PX:
            return None
        centre, covariance = field.moments()
        v = np.asarray(shape.up / np.hypot(*shape.up), np.float64)
        u = np.array([-v[1], v[0]])
        if shape.back is not None and float(u @ shape.back) < 0:
            u = -u
        height, depth = (float(np.sqrt(12 * d @ covariance @ d)) for d in (v, u))
        return cls(field, shape.walls, _Frame(centre, u, v), height, depth)

    def turned(self) -> bool:
        """Put the frame where the sides say that it belongs, and forget them. False where the shape has no sides."""
        sides, self.sides = self.sides, None
        if sides is None:
            return False
        top, bottom, left, right = sides
        self.height, self.depth = top(0.0) - bottom(0.0), right(0.0) - left(0.0)
        if min(self.height, self.depth) < LEAST_SIDE_PX * max(self.field.spacing):
            return False
        turn = float(np.arctan((top.b + bottom.b) / 2))
        u, v = self.frame.u, self.frame.v
        middle = self.frame.point((right(0.0) + left(0.0)) / 2, (top(0.0) + bottom(0.0)) / 2)
        self.frame = _Frame(middle, u * np.cos(turn) + v * np.sin(turn), v * np.cos(turn) - u * np.sin(turn))
        return True

    def edges(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Where the four sides are met: 4 x LINES positions along each, and distances outwards from the frame's axes, upwards and to
        the back positive."""
        frame = self.frame
        # Far enough for any side; what reaches further (a pedicle) is an outlier anyway.
        reach = 0.8 * max(self.height, self.depth) + 4 * max(self.field.spacing)
        s = _LINES * SIDE_SHARE * self.height
        t = _LINES * PLATE_SHARE * self.depth
        along_v, along_u = frame.centre + s[:, None] * frame.v, frame.centre + t[:, None] * frame.u
        along = np.stack([frame.v, -frame.v, -frame.u, frame.u])
        found = self.field.edges(np.stack([along_u, along_u, along_v, along_v]), along, reach)
        found[1:3] *= -1
        return np.stack([t, t, s, s]), found

    def quad(self) -> Quad | None:
        if self.sides is None:
            return None
        top, bottom, left, right = self.sides
        upper, lower = (_plate(self.frame, plate, left, right, self.height + self.depth) for plate in (top, bottom))
        if upper is None or lower is None:
            return None
        return Quad(upper, lower, max(top.roughness, bottom.roughness, left.residual, right.residual))


_LINES = np.linspace(-0.5, 0.5, LINES)


def _find_sides(fits: Sequence[_Fit]) -> None:
    """The sides of each in its frame: parabolas, but the ends of a disc are level."""
    fitted, at, values, outwards, depths = [], [], [], [], []
    for fit in fits:
        t, found = fit.edges()
        count = 4 if fit.walls else 2
        if (np.isfinite(found[:count]).sum(1) < LEAST_POINTS).any():
            continue
        fitted.append((fit, count, found))
        at.append(t[:count])
        values.append(found[:count])
        outwards.append(OUTWARDS[:count])
        depths.append(np.full(count, fit.depth))
    if not fitted:
        return
    tolerance = 0.75 * max(fitted[0][0].field.spacing)
    curves = iter(_parabolas(np.concatenate(at), np.concatenate(values), np.concatenate(outwards), tolerance, np.concatenate(depths)))
    for fit, count, found in fitted:
        own = [next(curves) for _ in range(count)]
        top, bottom, left, right = own if fit.walls else [*own, _level(found[2]), _level(found[3])]
        fit.sides = (top, bottom, left, right) if top and bottom and left and right else None


def _level(value: NDArray[np.float64]) -> _Curve | None:
    found = value[np.isfinite(value)]
    return _Curve(rank.median(found), 0.0, 0.0) if found.size >= LINES // 2 else None


def _plate(frame: _Frame, plate: _Curve, left: _Curve, right: _Curve, reach: float) -> Plate | None:
    """From where a plate meets the left wall to where it meets the right one; None where they meet nowhere near."""
    rims = []
    for wall in (left, right):
        t = wall(plate(0.0))
        for _ in range(8):
            t = wall(plate(t))
            if max(abs(t), abs(plate(t))) > reach:
                return None
        rims.append(frame.point(t, plate(t)))
    if float((rims[1] - rims[0]) @ frame.u) <= 0:
        return None
    half = float((rims[0] + rims[1] - 2 * frame.centre) @ frame.u) / 2
    return Plate(rims[0], frame.point(half, plate(half)), rims[1])
