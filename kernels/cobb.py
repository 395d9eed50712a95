"""Cobb angles of a spine seen from the front: from the centres of its vertebrae to curves with end vertebrae and apex.

Hides the fit. Vertebra boxes are upright and so say nothing of tilt; the tilt of a vertebra's end plates is taken from the
normal of a smooth line through all centres. Coordinates are x to the right and y downwards, in any unit that is the same in
both directions (millimetres, or square pixels). Angles are in degrees.

Cobb angle: between the most tilted end plates above and below the apex of a curve (Cobb, Instructional Course Lectures 5,
1948). On a smooth line these lie where it bends from one side to the other, so curves are the swings between successive
extremes of tilt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]

LEAST_VERTEBRAE = 6  # below, a line through the centres is hardly more than its own smoothing
MOST_CURVES = 3
LEAST_SWING_DEG = 5.0  # smaller swings of tilt are no curve: the usual error between two readers of one film
# Wavelength in vertebrae at which the fit passes half. Chosen on phantoms of other seeds than the reported ones, between bias
# without scatter (smaller is better) and scatter of 3 and 6 % of a vertebra's height (larger is better).
CUT_OFF = 5.0
END_STIFFNESS = 10.0  # beyond its ends the line goes on straight, as a natural spline does: ends were 3 degrees off without
# Of a column; chosen on the validation part of the training pictures by the error of the largest angle.
WORTH = 0.15
STEPPING, SHORT_STEPPING = 1.5, 3.0  # a vertebra is missed more often than found twice
USUAL_STEP = 0.95  # median distance of centres in heights of a box, over the training boxes
SHORTEST_STEP, LONGEST_STEP = 0.5, 3.3  # in usual steps: a vertebra or two are easily missed, three in a row are another thing
LEAST_DOWN = 0.25  # of a step: no spine runs flatter
SMOOTHING_DEG = 1.8  # what the fit itself is off by: so large that margins hold 95 % of errors on phantoms, scattered or not
_ROBUST_STEPS = 6
_TUKEY = 4.685  # 95 % efficiency on normal errors (Holland and Welsch, 1977)
_LEAST_SCALE = 0.03  # of the vertebral distance: below, scatter is rounding

# By the largest angle. Ten degrees define scoliosis (Negrini et al., "2016 SOSORT guidelines", Scoliosis and Spinal Disorders
# 13:3, 2018). 25 and 40 are where practice goes from watching to bracing and on to considering surgery while a patient grows;
# SOSORT's own bands are finer and overlap.
SEVERITY_DEG = ((10.0, "none"), (25.0, "mild"), (40.0, "moderate"), (float("inf"), "severe"))


@dataclass(frozen=True)
class Line:
    """A smooth line through N centres.

    `points`: N x 2, the line at each vertebra. `tilt_deg`: N, of the end plates against the horizontal, positive where the
    right end is higher. `weights`: N in [0, 1], near 0 where a centre lies off the line of the others. `scatter`: standard
    deviation of the centres about the line. `influence`: N x N, degrees of tilt at row i for a centre moved sideways at j by one.
    """

    points: Values
    tilt_deg: Values
    weights: Values
    scatter: float
    influence: Values


@dataclass(frozen=True)
class Curve:
    """One curve: indices of its vertebrae from the top, its Cobb angle and the margin that holds 95 % of errors, as far as they
    come from smoothing and from the centres' scatter about the line.

    `convex` is the side of the picture that it bulges to. On a frontal film hung as usual, the picture's left is the
    patient's right; a picture does not say how it is hung.
    """

    upper: int
    apex: int
    lower: int
    angle_deg: float
    margin_deg: float
    convex: str


def column(boxes: NDArray[np.float32], scores: NDArray[np.float32]) -> NDArray[np.int64]:
    """N x 4 boxes and N scores in (0, 1) -> indices of those that make the likeliest column, from the top down.

    The path downwards with the greatest sum: each box adds the log odds of its score over WORTH, and each step to the next
    loses STEPPING times the squared logarithms of how far it departs from one vertebra's height (SHORT_STEPPING where it falls
    short), and of the ratio of the two widths. So a double loses to the surer of two, a faint vertebra that continues the
    column is taken, and a box beside it is not. Found by dynamic programming over the boxes in order of height.
    """
    if not len(boxes):
        return np.zeros(0, np.int64)
    order = np.argsort(boxes[:, 1] + boxes[:, 3], kind="stable")
    x0, y0, x1, y1 = np.asarray(boxes[order], np.float64).T
    x, y, wide, tall = (x0 + x1) / 2, (y0 + y1) / 2, np.maximum(x1 - x0, 1e-6), np.maximum(y1 - y0, 1e-6)
    score = np.clip(np.asarray(scores[order], np.float64), 1e-6, 1 - 1e-6)
    worth = np.log(score / (1 - score)) - np.log(WORTH / (1 - WORTH))
    best, before = worth.copy(), np.full(len(order), -1)
    for j in range(1, len(order)):
        step = np.hypot(x[j] - x[:j], y[j] - y[:j])
        ratio = np.maximum(step / (USUAL_STEP * (tall[j] + tall[:j]) / 2), 1e-6)
        fits = (ratio > SHORTEST_STEP) & (ratio < LONGEST_STEP) & (y[j] - y[:j] > LEAST_DOWN * step)
        stepping = np.where(ratio < 1, SHORT_STEPPING, STEPPING)
        lost = stepping * np.log(ratio) ** 2 + STEPPING * np.log(wide[:j] / wide[j]) ** 2
        sums = np.where(fits, best[:j] - lost, -np.inf)
        i = int(sums.argmax())
        if sums[i] > 0:
            best[j], before[j] = sums[i] + worth[j], i
    path = [int(best.argmax())]
    while before[path[-1]] >= 0:
        path.append(int(before[path[-1]]))
    return order[path[::-1]].astype(np.int64)


def fit(centres: Values, cut_off: float = CUT_OFF) -> Line:
    """N x 2 centres from the top down -> the line through them. Raises ValueError below LEAST_VERTEBRAE or for equal centres.

    A cubic P-spline over the chord length (Eilers and Marx, Statistical Science 11, 1996) with third differences penalised and
    the curvature at its ends held near nothing; the same weights for x and y, so that turning the spine turns the line. Centres far
    off are weighed down (Tukey's biweight), and where a vertebra is missing the gap counts by its length.
    """
    points = np.asarray(centres, np.float64)
    count = len(points)
    if count < LEAST_VERTEBRAE:
        raise ValueError(f"{count} vertebrae; a curve needs {LEAST_VERTEBRAE}")
    steps = np.hypot(*np.diff(points, axis=0).T)
    if not np.isfinite(points).all() or steps.min() <= 0.0:
        raise ValueError("centres must be finite and differ from their neighbours")
    unit = float(np.median(steps))
    along = np.concatenate([[0.0], np.cumsum(steps)]) / unit
    basis, slope = _spline(along)
    second, third = (np.diff(np.eye(basis.shape[1]), order, axis=0) for order in (2, 3))
    ends = second[[0, -1]]
    penalty = (cut_off / (2 * np.pi)) ** 6 * (third.T @ third + END_STIFFNESS * ends.T @ ends)
    weights = np.ones(count)
    for _ in range(_ROBUST_STEPS):
        weighed = basis * weights[:, None]
        solve = np.linalg.solve(basis.T @ weighed + penalty, weighed.T)
        line = basis @ solve @ points
        residual = np.hypot(*(points - line).T)
        scale = max(1.4826 * float(np.median(residual)), _LEAST_SCALE * unit)
        weights = np.clip(1.0 - (residual / (_TUKEY * scale)) ** 2, 0.0, 1.0) ** 2
        # A column with more outliers than vertebrae is none; never let the fit lose its footing.
        if (weights > 0.1).sum() < LEAST_VERTEBRAE:
            weights = np.ones(count)
    hat = basis @ solve
    direction = slope @ solve @ points
    tilt = np.arctan2(direction[:, 0], direction[:, 1])
    speed = np.hypot(direction[:, 0], direction[:, 1])
    # Degrees of freedom that are left for noise, once for each of the two coordinates.
    free = max(float(weights.sum() - np.trace(hat)), 1.0)
    normal = np.stack([direction[:, 1], -direction[:, 0]], 1) / speed[:, None]
    aside = ((points - line) * normal).sum(1)
    scatter = float(np.sqrt((weights * aside**2).sum() / free))
    return Line(line, np.rad2deg(tilt), weights, scatter, np.rad2deg(slope @ solve / speed[:, None]))


def _spline(along: Values) -> tuple[Values, Values]:
    """Cubic B-splines on knots one unit apart over `along`, and their derivatives: both len(along) x K."""
    pieces = max(int(np.ceil(along[-1])), 3)
    knots = np.arange(-3, pieces + 4) * (along[-1] / pieces)
    # The last knot interval is closed on the right.
    at = np.minimum(along, np.nextafter(along[-1], 0.0))[:, None]
    level = ((knots[:-1] <= at) & (at < knots[1:])).astype(np.float64)
    below = level
    for degree in range(1, 4):
        below = level
        left = (at - knots[: -degree - 1]) / (knots[degree:-1] - knots[: -degree - 1])
        right = (knots[degree + 1 :] - at) / (knots[degree + 1 :] - knots[1:-degree])
        level = left * below[:, :-1] + right * below[:, 1:]
    step = along[-1] / pieces
    return level, (below[:, :-1] - below[:, 1:]) / step


def curves(line: Line, most: int = MOST_CURVES, least_deg: float = LEAST_SWING_DEG) -> tuple[Curve, ...]:
    """The curves of a line from the top down: swings between successive extremes of tilt.

    Swings below `least_deg` are smoothed away, smallest first, and then the smallest until at most `most` are left: an
    interior one takes its two neighbours into one swing, one at an end is dropped.
    """
    tilt = line.tilt_deg
    turns = _extremes(tilt)
    while len(turns) > 1:
        swings = np.abs(np.diff(tilt[turns]))
        smallest = int(swings.argmin())
        if swings[smallest] >= least_deg and len(swings) <= most:
            break
        if smallest == 0:
            turns = turns[1:]
        elif smallest == len(swings) - 1:
            turns = turns[:-1]
        else:
            turns = turns[:smallest] + turns[smallest + 2 :]
    return tuple(_curve(line, a, b) for a, b in pairwise(turns))


def _extremes(tilt: Values) -> list[int]:
    """First, last, and every place where the tilt turns back."""
    rising = np.sign(np.diff(tilt))
    turns, before = [0], 0.0
    for i, sign in enumerate(rising):
        if sign and before and sign != before:
            turns.append(i)
        before = sign or before
    return [*turns, len(tilt) - 1]


def _curve(line: Line, upper: int, lower: int) -> Curve:
    start, chord = line.points[upper], line.points[lower] - line.points[upper]
    between = line.points[upper : lower + 1] - start
    # Positive: to the right of the way down, which is the left of the picture.
    aside = (between[:, 1] * chord[0] - between[:, 0] * chord[1]) / max(float(np.hypot(*chord)), 1e-12)
    apex = int(np.abs(aside).argmax())
    chance = line.scatter * float(np.linalg.norm(line.influence[upper] - line.influence[lower]))
    margin = 1.96 * float(np.hypot(chance, SMOOTHING_DEG))
    angle = float(abs(line.tilt_deg[upper] - line.tilt_deg[lower]))
    return Curve(upper, upper + apex, lower, angle, margin, "left" if aside[apex] > 0 else "right")


def severity(found: Sequence[Curve]) -> str:
    """none, mild, moderate or severe, by the largest angle."""
    largest = max((c.angle_deg for c in found), default=0.0)
    return next(name for limit, name in SEVERITY_DEG if largest < limit)
