"""End plates of shapes whose corners are known: turned, mirrored, stretched, bitten, and too small to have any."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.corners import Field, Quad, Shape, body_quad, disc_quad, quads
from kernels.mask import bounds

UP = np.array([0.0, -1.0])
BACK = np.array([1.0, 0.0])
SIDE = 220


def filled(corners_mm: np.ndarray, spacing: tuple[float, float], side: int = SIDE) -> np.ndarray:
    """Pixels whose centre lies in a convex polygon of (x, y) in mm, pixel edges."""
    ys, xs = np.mgrid[:side, :side] + 0.5
    points = np.stack([xs * spacing[1], ys * spacing[0]], -1)
    inside = np.ones((side, side), bool)
    for a, b in zip(corners_mm, np.roll(corners_mm, -1, 0), strict=True):
        d, p = b - a, points - a
        inside &= d[0] * p[..., 1] - d[1] * p[..., 0] >= 0
    return inside


def body(
    height: tuple[float, float] = (24, 24), depth: float = 34, degrees: float = 0, centre: tuple[float, float] = (55, 50)
) -> np.ndarray:
    """Corners of a body in mm, clockwise from the upper front: `height` in front and at the back."""
    front, back = height
    flat = np.array([[-depth / 2, -front / 2], [depth / 2, -back / 2], [depth / 2, back / 2], [-depth / 2, front / 2]])
    t = np.deg2rad(degrees)
    return flat @ np.array([[np.cos(t), np.sin(t)], [-np.sin(t), np.cos(t)]]) + centre


def found(quad: Quad | None) -> np.ndarray:
    assert quad is not None
    return np.stack([quad.upper.front, quad.upper.back, quad.lower.back, quad.lower.front])


@settings(max_examples=60, deadline=None)
@given(st.floats(-25, 25), st.floats(16, 28), st.floats(16, 28), st.floats(30, 40), st.floats(0, 1), st.floats(0, 1))
def test_corners_of_a_turned_body_are_found_to_a_pixel_or_two(
    degrees: float, front: float, back: float, depth: float, dx: float, dy: float
) -> None:
    corners = body((front, back), depth, degrees, (55 + dx, 50 + dy))
    quad = body_quad(filled(corners, (0.5, 0.5)), (0.5, 0.5), UP, BACK)
    off = np.hypot(*(found(quad) - corners).T)
    assert off.max() < 1.3
    assert off.mean() < 0.8
    assert quad is not None
    assert quad.residual < 0.25


@pytest.mark.parametrize("spacing", [(0.5, 0.5), (0.35, 0.7), (0.7, 0.35)])
@pytest.mark.parametrize("degrees", [0, 12, -20])
def test_rows_and_columns_have_their_own_spacing(spacing: tuple[float, float], degrees: float) -> None:
    corners = body((22, 25), 34, degrees, (SIDE * spacing[1] / 2, SIDE * spacing[0] / 2))
    assert np.hypot(*(found(body_quad(filled(corners, spacing), spacing, UP, BACK)) - corners).T).max() < 0.6


def test_a_mirrored_body_has_mirrored_corners() -> None:
    pixels = filled(body((20, 25), 34, 15), (0.5, 0.5))
    a = found(body_quad(pixels, (0.5, 0.5), UP, BACK))
    b = found(body_quad(np.ascontiguousarray(pixels[:, ::-1]), (0.5, 0.5), UP, -BACK))
    b[:, 0] = SIDE * 0.5 - b[:, 0]
    np.testing.assert_allclose(a, b, atol=1e-3)


def test_without_a_back_the_left_is_the_front() -> None:
    pixels = filled(body(), (0.5, 0.5))
    np.testing.assert_array_equal(found(body_quad(pixels, (0.5, 0.5), UP)), found(body_quad(pixels, (0.5, 0.5), UP, BACK)))


def test_rounded_corners_are_where_the_sides_would_meet() -> None:
    corners = body((24, 24), 34, 10)
    big = cv2.resize(filled(corners, (0.5, 0.5)).astype(np.uint8), None, fx=2, fy=2, interpolation=cv2.INTER_NEAREST)
    round_one = cv2.morphologyEx(big, cv2.MORPH_OPEN, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (17, 17)))[::2, ::2] > 0
    assert round_one.sum() < filled(corners, (0.5, 0.5)).sum() - 20
    assert np.hypot(*(found(body_quad(round_one, (0.5, 0.5), UP, BACK)) - corners).T).max() < 0.6


def test_a_pedicle_on_the_back_wall_moves_no_corner_far() -> None:
    corners = body()
    pixels = filled(corners, (0.5, 0.5))
    pixels[84:92, 140:160] = True
    assert np.hypot(*(found(body_quad(pixels, (0.5, 0.5), UP, BACK)) - corners).T).max() < 0.6


def test_hollow_end_plates_keep_their_rims_and_lower_their_middle() -> None:
    ys, xs = np.mgrid[:SIDE, :SIDE] + 0.5
    x, y = (xs * 0.5 - 55) / 17, ys * 0.5 - 50
    pixels = (np.abs(x) <= 1) & (np.abs(y) <= 12 - 3 * (1 - x**2))
    quad = body_quad(pixels, (0.5, 0.5), UP, BACK)
    assert np.hypot(*(found(quad) - body()).T).max() < 0.8
    assert quad is not None
    assert quad.height == pytest.approx(18, abs=0.3)


def test_a_hollow_between_two_lips_is_not_drawn_on_beyond_them() -> None:
    """A node in the middle of an end plate bends the parabola; the rims stay where the outline ends."""
    ys, xs = np.mgrid[:SIDE, :SIDE] + 0.5
    x, y = xs * 0.5 - 55, ys * 0.5 - 50
    pixels = (np.abs(x) <= 17) & (y <= 12) & (y >= -12 + 6 * np.exp(-0.5 * (x / 7) ** 2))
    quad = body_quad(pixels, (0.5, 0.5), UP, BACK)
    assert quad is not None
    assert min(quad.upper.front[1], quad.upper.back[1]) > 50 - 12 - 1.0


def test_a_lens_has_the_borders_of_a_disc_but_no_walls() -> None:
    ys, xs = np.mgrid[:SIDE, :SIDE] + 0.5
    x, y = (xs * 0.5 - 55) / 18, ys * 0.5 - 50
    pixels = np.abs(y) <= 5 * np.sqrt(np.clip(1 - x**2, 0, 1))
    quad = disc_quad(pixels, (0.5, 0.5), UP, BACK)
    assert quad is not None
    assert quad.height == pytest.approx(10, abs=0.4)
    assert np.rad2deg(np.arctan2(quad.lower.direction[1], quad.lower.direction[0])) == pytest.approx(0, abs=0.5)


@pytest.mark.parametrize("shape", ["nothing", "a pixel", "a line", "a square of four pixels", "dust"])
@pytest.mark.parametrize("fit", [body_quad, disc_quad])
def test_what_has_no_sides_gives_none(shape: str, fit: object) -> None:
    pixels = np.zeros((60, 60), bool)
    if shape == "a pixel":
        pixels[30, 30] = True
    elif shape == "a line":
        pixels[30, 5:55] = True
    elif shape == "a square of four pixels":
        pixels[30:32, 30:32] = True
    elif shape == "dust":
        pixels[np.random.default_rng(0).uniform(size=pixels.shape) < 0.02] = True
    assert fit(pixels, (0.5, 0.5), UP, BACK) is None  # type: ignore[operator]


def test_a_chord_ends_at_the_edges_of_the_part_that_is_nearest() -> None:
    pixels = np.zeros((40, 100), bool)
    pixels[:, 20:30] = pixels[:, 50:64] = True
    field = Field(pixels, (1.0, 0.5))
    points = np.array([[20.6, 20.0], [8.0, 20.0], [31.9, 20.0], [20.0, 300.0]])
    chords = field.chords(points, BACK, 40.0)
    np.testing.assert_allclose(points[:3, :1] + chords[:3], [[25, 32], [10, 15], [25, 32]], atol=0.06)
    assert np.isnan(chords[3]).all()


def test_an_empty_region_has_an_empty_field() -> None:
    field = Field(np.zeros((9, 9), bool), (1.0, 1.0))
    assert field.count == 0
    assert not field.at(np.array([[0.5, 0.5], [4.0, 4.0]])).any()
    assert np.isnan(field.chords(np.array([[4.0, 4.0]]), BACK, 5.0)).all()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000))
def test_whatever_the_region_rims_are_numbers_near_it(seed: int) -> None:
    """Blobs of noise: an answer, if there is one, lies about where the pixels are."""
    rng = np.random.default_rng(seed)
    noise = cv2.GaussianBlur(rng.standard_normal((90, 90)), (0, 0), float(rng.uniform(2, 9)))
    blob = noise > np.quantile(noise, rng.uniform(0.4, 0.97))
    for fit in (body_quad, disc_quad):
        quad = fit(blob, (0.5, 0.5), UP, BACK)
        if quad is not None:
            points = np.stack([p for plate in (quad.upper, quad.lower) for p in (plate.front, plate.middle, plate.back)])
            assert np.isfinite(points).all()
            assert (np.abs(points - 22.5) < 60).all()


def test_many_shapes_at_once_have_the_plates_that_each_has_alone() -> None:
    sizes = ((24, 24), (20, 25), (16, 27), (6, 6.5))
    shapes = [filled(body(height, 34, degrees), (0.5, 0.5)) for height, degrees in zip(sizes, (0, 12, -17, 5), strict=True)]
    shapes.insert(2, np.zeros((SIDE, SIDE), bool))  # one that has none
    asked = [Shape(pixels, UP, BACK if i % 2 else None, walls=i < 4) for i, pixels in enumerate(shapes)]
    together, alone = quads(asked, (0.5, 0.5)), [quads([one], (0.5, 0.5))[0] for one in asked]
    assert [q is None for q in together] == [False, False, True, False, False]
    for a, b in zip(together, alone, strict=True):
        if a is not None:
            np.testing.assert_array_equal(found(a), found(b))
            assert b is not None
            assert a.residual == b.residual
    assert quads([], (0.5, 0.5)) == []


def test_a_window_that_is_known_changes_nothing() -> None:
    pixels = filled(body(), (0.5, 0.5))
    plain, told = (quads([Shape(pixels, UP, BACK, True, window)], (0.5, 0.5))[0] for window in (None, bounds(pixels)))
    np.testing.assert_array_equal(found(plain), found(told))


def test_chords_of_many_lines_are_those_of_each() -> None:
    rng = np.random.default_rng(2)
    field = Field(cv2.GaussianBlur(rng.standard_normal((80, 70)), (0, 0), 3) > 0.03, (0.5, 0.7))
    points = rng.uniform(0, 50, (40, 2))
    turns, reach = rng.uniform(0, 7, 40), rng.choice([4.0, 11.3, 30.0], 40)
    along = np.stack([np.cos(turns), np.sin(turns)], 1)
    together = field.chords(points, along, reach)
    alone = np.concatenate([field.chords(p[None], a, float(r)) for p, a, r in zip(points, along, reach, strict=True)])
    np.testing.assert_array_equal(together, alone)
    assert 5 < np.isfinite(together[:, 0]).sum() < 40
    assert field.chords(points[:0], along[:0], reach[:0]).shape == (0, 2)
