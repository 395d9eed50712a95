"""Cobb angles from centres: closed forms, what must not change them, and the error on phantoms whose angles are exact."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from kernels import cobb
from models import phantom_ap

Values = NDArray[np.float64]
SETTINGS = settings(max_examples=25, deadline=None, derandomize=True)


def boxes_of(seed: int, jitter: float = 0.0) -> tuple[Values, tuple[phantom_ap.Swing, ...]]:
    """Boxes of a random phantom spine in mm, edges moved by `jitter` of a box's height; nothing is painted."""
    rng = np.random.default_rng(seed)
    swings = phantom_ap.random_swings(rng)
    corners = [body.corners() for body in phantom_ap.column(rng, swings)]
    boxes = np.array([[*c.min(0), *c.max(0)] for c in corners])
    tall = float(np.median(boxes[:, 3] - boxes[:, 1]))
    return boxes + np.random.default_rng(seed + 10_000).normal(0, jitter * tall, boxes.shape), swings


def centres_of(seed: int) -> Values:
    boxes, _ = boxes_of(seed, 0.02)
    return np.asarray((boxes[:, :2] + boxes[:, 2:]) / 2)


def summary(centres: Values) -> list[tuple[int, int, int, float, float]]:
    return [(c.upper, c.apex, c.lower, c.angle_deg, c.margin_deg) for c in cobb.curves(cobb.fit(centres))]


def same(a: list[tuple[int, int, int, float, float]], b: list[tuple[int, int, int, float, float]]) -> bool:
    return [x[:3] for x in a] == [x[:3] for x in b] and np.allclose([x[3:] for x in a], [x[3:] for x in b], atol=1e-6)


@SETTINGS
@given(st.integers(0, 10_000), st.floats(-25, 25), st.floats(0.1, 30), st.floats(-500, 500))
def test_turning_scaling_and_moving_a_spine_changes_no_angle(seed: int, turn_deg: float, scale: float, shift: float) -> None:
    centres = centres_of(seed)
    c, s = np.cos(np.deg2rad(turn_deg)), np.sin(np.deg2rad(turn_deg))
    assert same(summary(centres @ np.array([[c, s], [-s, c]]) * scale + shift), summary(centres))


@SETTINGS
@given(st.integers(0, 10_000))
def test_a_mirrored_spine_bulges_to_the_other_side_by_the_same_angle(seed: int) -> None:
    centres = centres_of(seed)
    here, there = cobb.curves(cobb.fit(centres)), cobb.curves(cobb.fit(centres * [-1, 1]))
    assert [c.convex for c in here] == [{"left": "right", "right": "left"}[c.convex] for c in there]
    assert same(summary(centres), summary(centres * [-1, 1]))


@SETTINGS
@given(st.integers(0, 10_000))
def test_curves_touch_and_are_few_and_none_is_smaller_than_said(seed: int) -> None:
    found = cobb.curves(cobb.fit(centres_of(seed)))
    assert len(found) <= cobb.MOST_CURVES
    assert all(a.lower == b.upper for a, b in pairwise(found))
    assert all(c.upper < c.apex < c.lower and c.angle_deg >= cobb.LEAST_SWING_DEG for c in found)


def test_a_straight_spine_has_no_curve() -> None:
    line = cobb.fit(np.stack([np.full(17, 40.0), np.arange(17) * 20.0], 1))
    assert cobb.curves(line) == ()
    assert cobb.severity(()) == "none"
    assert np.abs(line.tilt_deg).max() < 1e-9


def test_tilt_is_positive_where_the_right_end_is_higher() -> None:
    # The column runs to the right on its way down, so a plate across it rises to the right.
    line = cobb.fit(np.stack([np.arange(10) * 5.0, np.arange(10) * 20.0], 1))
    assert np.allclose(line.tilt_deg, np.rad2deg(np.arctan2(5, 20)))


def test_a_sine_has_the_angles_of_its_slopes() -> None:
    # x = a sin(2 pi y / wave): steepest where it crosses the axis, at slope 2 pi a / wave.
    y = np.arange(17.0)
    x = 0.8 * np.sin(2 * np.pi * y / 16)
    steepest = 2 * np.rad2deg(np.arctan(2 * np.pi * 0.8 / 16))
    found = cobb.curves(cobb.fit(np.stack([x, y], 1)))
    assert [c.angle_deg for c in found] == pytest.approx([steepest] * 2, abs=1.0)
    assert [(c.apex, c.convex) for c in found] == [(4, "right"), (12, "left")]


def test_one_centre_far_off_does_not_bend_the_line() -> None:
    boxes, _ = boxes_of(5)
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    moved = centres.copy()
    moved[8, 0] += 25.0
    assert cobb.fit(moved).weights[8] < 0.05
    assert np.abs(cobb.fit(moved).tilt_deg - cobb.fit(centres).tilt_deg).max() < 2.5


def test_a_missing_vertebra_changes_angles_little() -> None:
    for seed in range(10):
        centres = centres_of(seed)
        whole = max((c.angle_deg for c in cobb.curves(cobb.fit(centres))), default=0.0)
        without = max((c.angle_deg for c in cobb.curves(cobb.fit(np.delete(centres, 8, 0)))), default=0.0)
        assert abs(whole - without) < 4.0


def test_too_few_or_equal_centres_are_refused() -> None:
    with pytest.raises(ValueError, match="needs 6"):
        cobb.fit(np.zeros((5, 2)))
    with pytest.raises(ValueError, match="differ"):
        cobb.fit(np.zeros((8, 2)))
    with pytest.raises(ValueError, match="finite"):
        cobb.fit(np.stack([np.full(8, np.nan), np.arange(8.0)], 1))


@pytest.mark.parametrize(
    ("angle", "name"), [(9.9, "none"), (10.0, "mild"), (24.9, "mild"), (25.0, "moderate"), (40.0, "severe"), (90.0, "severe")]
)
def test_severity_limits(angle: float, name: str) -> None:
    assert cobb.severity([cobb.Curve(0, 3, 6, angle, 1.0, "left"), cobb.Curve(6, 8, 10, 5.0, 1.0, "right")]) == name


def errors(seeds: range, jitter: float) -> tuple[Values, Values]:
    """|found - true| of every curve of at least 10 degrees (all of it where none is found), and whether the margin holds it."""
    off, held = [], []
    for seed in seeds:
        boxes, swings = boxes_of(seed, jitter)
        found = cobb.curves(cobb.fit((boxes[:, :2] + boxes[:, 2:]) / 2))
        for a, b in pairwise(swings):
            truth = abs(a.tilt_deg - b.tilt_deg)
            if truth >= 10:
                shared = [(min(c.lower, b.vertebra) - max(c.upper, a.vertebra), c) for c in found]
                best = max(shared, key=lambda p: p[0], default=(0, None))
                curve = best[1] if best[0] > 0 else None
                off.append(abs(truth - curve.angle_deg) if curve else truth)
                held.append(curve is not None and off[-1] <= curve.margin_deg)
    return np.array(off), np.array(held)


@pytest.mark.parametrize(("jitter", "limit_deg"), [(0.0, 1.4), (0.04, 2.0)])
def test_mean_error_on_phantom_boxes(jitter: float, limit_deg: float) -> None:
    off, _ = errors(range(1000, 1120), jitter)
    assert len(off) > 150
    assert off.mean() <= limit_deg


@pytest.mark.parametrize("jitter", [0.0, 0.03, 0.06])
def test_the_margin_holds_about_95_of_100_errors(jitter: float) -> None:
    _, held = errors(range(1000, 1120), jitter)
    assert 0.9 <= held.mean() <= 0.99


def test_a_column_leaves_out_doubles_neighbours_and_what_lies_apart() -> None:
    boxes, _ = boxes_of(3)
    tall, wide = (float(np.median(boxes[:, k + 2] - boxes[:, k])) for k in (1, 0))
    half_way = (boxes[6] + boxes[7]) / 2
    beside = boxes[9] + [2 * wide, 3, 2 * wide, 3]
    extra = np.array([boxes[4] + 2.0, half_way, beside, boxes[-1] + [0, 9 * tall, 0, 9 * tall]])
    everything = np.concatenate([boxes, extra]).astype(np.float32)
    scores = np.concatenate([np.full(17, 0.9), [0.5, 0.4, 0.8, 0.99]]).astype(np.float32)
    mixed = np.random.default_rng(0).permutation(len(everything))
    kept = mixed[cobb.column(everything[mixed], scores[mixed])]
    assert kept.tolist() == list(range(17))


def test_a_faint_vertebra_that_continues_the_column_is_taken_and_noise_is_not() -> None:
    boxes, _ = boxes_of(4)
    scores = np.full(17, 0.9, np.float32)
    scores[8] = 0.12
    assert cobb.column(boxes.astype(np.float32), scores).tolist() == list(range(17))
    rng = np.random.default_rng(0)
    low, high = boxes.min(0)[:2] - 50, boxes.max(0)[2:] + 50
    corner = rng.uniform(low, high, (40, 2))
    strewn = np.hstack([corner, corner + rng.uniform(5, 40, (40, 2))])
    everything = np.concatenate([boxes, strewn]).astype(np.float32)
    kept = cobb.column(everything, np.concatenate([scores, np.full(40, 0.08, np.float32)]))
    assert set(range(17)) <= set(kept.tolist())
    assert len(kept) <= 19


def test_a_column_of_nothing_is_empty() -> None:
    assert cobb.column(np.zeros((0, 4), np.float32), np.zeros(0, np.float32)).size == 0
    assert cobb.column(np.array([[0, 0, 9, 9]], np.float32), np.ones(1, np.float32)).tolist() == [0]


def test_boxes_without_extent_divide_by_nothing() -> None:
    boxes = np.repeat([[5.0, 5.0, 5.0, 5.0]], 4, axis=0).astype(np.float32)
    assert len(cobb.column(boxes, np.full(4, 0.9, np.float32))) == 1
