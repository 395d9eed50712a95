"""Lengths and areas of rectangles whose size is known, turned and stretched."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.corners import Field, Plate
from kernels.mask import bounds
from kernels.measure import canal_chord, canal_chords, disc_size, gaps, genant, heights, meyerding, opening_deg, slip


def _rectangle(length_mm: float, height_mm: float, degrees: float, spacing: tuple[float, float], side: int = 260) -> np.ndarray:
    """Pixels whose centre lies in a rectangle of the given size in mm, turned about the middle of the image."""
    ys, xs = np.mgrid[:side, :side].astype(float)
    x, y = (xs - side / 2 + 0.25) * spacing[1], (ys - side / 2 + 0.25) * spacing[0]
    turn = np.deg2rad(degrees)
    u, v = x * np.cos(turn) + y * np.sin(turn), -x * np.sin(turn) + y * np.cos(turn)
    return (np.abs(u) <= length_mm / 2) & (np.abs(v) <= height_mm / 2)


@pytest.mark.parametrize(("height", "width"), [(10, 40), (1, 7), (5, 5)])
def test_an_upright_rectangle_is_exact(height: int, width: int) -> None:
    pixels = np.zeros((60, 60), bool)
    pixels[8 : 8 + height, 3 : 3 + width] = True
    size = disc_size(pixels)
    assert size.depth == pytest.approx(width, abs=1e-3)
    assert size.height == pytest.approx(height, abs=1e-3)
    assert size.area == height * width


@settings(max_examples=60, deadline=None)
@given(st.floats(-60, 60), st.floats(28, 44), st.floats(6, 14), st.floats(0.4, 0.9))
def test_a_turn_changes_nothing(degrees: float, length: float, height: float, mm: float) -> None:
    size = disc_size(_rectangle(length, height, degrees, (mm, mm)), (mm, mm))
    assert size.depth == pytest.approx(length, abs=1.5 * mm)
    assert size.area == pytest.approx(length * height, rel=0.12)
    assert size.height == pytest.approx(height, abs=0.15 * height)
    assert size.height * size.depth == pytest.approx(size.area, rel=1e-6)


@pytest.mark.parametrize("spacing", [(0.5, 0.5), (0.4, 0.8), (0.8, 0.4)])
@pytest.mark.parametrize("degrees", [0, 20, -35])
def test_rows_and_columns_have_their_own_spacing(spacing: tuple[float, float], degrees: float) -> None:
    size = disc_size(_rectangle(36.0, 10.0, degrees, spacing), spacing)
    assert size.depth == pytest.approx(36.0, abs=1.2)
    assert size.height == pytest.approx(10.0, rel=0.1)
    assert size.area == pytest.approx(360.0, rel=0.08)  # one row of pixels is 8 % of the height


def test_too_few_pixels_have_an_area_only() -> None:
    pixels = np.zeros((5, 5), bool)
    assert disc_size(pixels) == disc_size(pixels, (0.5, 0.5))
    assert disc_size(pixels).area == 0.0
    pixels[1, 1] = pixels[1, 2] = True
    size = disc_size(pixels, (0.5, 2.0))
    assert (size.height, size.depth, size.area) == (0.0, 0.0, 2.0)


UP = np.array([0.0, -1.0])


def _plate(x: float, y: float, degrees: float, length: float = 34.0, back: float = 1.0) -> Plate:
    """An end plate with its middle at (x, y), its front edge `degrees` lower than its back edge; `back` is 1 to the right."""
    t = np.deg2rad(degrees)
    half = np.array([back * np.cos(t), -np.sin(t)]) * length / 2
    middle = np.array([x, y])
    return Plate(middle - half, middle, middle + half)


@given(st.floats(-40, 60), st.floats(-40, 60), st.sampled_from([1.0, -1.0]))
def test_the_angle_is_positive_where_plates_open_to_the_front(above: float, below: float, back: float) -> None:
    angle = opening_deg(_plate(0, 0, above, back=back), _plate(0, 30, below, back=back), UP)
    assert angle == pytest.approx(below - above, abs=1e-9)


def test_heights_are_between_rims_and_middles() -> None:
    upper, lower = _plate(0, 0, 0), Plate(np.array([-17.0, 20]), np.array([0.0, 22]), np.array([17.0, 26]))
    assert heights(upper, lower) == pytest.approx((20, 22, 26))


@given(st.floats(-20, 20), st.floats(-12, 12))
def test_a_slip_moves_no_gap(moved: float, degrees: float) -> None:
    below = _plate(0, 10, degrees)
    above = _plate(0, 0, degrees)
    across = below.direction
    shifted = Plate(*(p - moved * across for p in (above.front, above.middle, above.back)))
    assert gaps(shifted, below) == pytest.approx(gaps(above, below), abs=1e-9)
    assert slip(shifted, below) - slip(above, below) == pytest.approx(moved, abs=1e-9)


@pytest.mark.parametrize(
    ("share", "grade"),
    [(0.0, 0), (0.079, 0), (-0.079, 0), (0.08, 1), (0.25, 1), (0.26, 2), (-0.3, 2), (0.5, 2), (0.75, 3), (1.0, 4), (1.2, 5)],
)
def test_meyerding_goes_by_quarters(share: float, grade: int) -> None:
    assert meyerding(share, 0.08) == grade


@pytest.mark.parametrize(("loss", "grade"), [(0.0, 0), (0.19, 0), (0.20, 1), (0.249, 1), (0.25, 2), (0.40, 2), (0.41, 3), (0.9, 3)])
def test_genant_goes_by_loss_of_height(loss: float, grade: int) -> None:
    assert genant(loss) == grade


def _canal(degrees: float, width_mm: float, waist_mm: float = 0.0, mm: float = 0.5, side: int = 240) -> Field:
    """A straight canal through the middle, `degrees` off the vertical, narrowed at its middle from behind."""
    ys, xs = np.mgrid[:side, :side] + 0.5
    x, y = xs * mm - side * mm / 2, ys * mm - side * mm / 2
    t = np.deg2rad(degrees)
    across, along = x * np.cos(t) + y * np.sin(t), -x * np.sin(t) + y * np.cos(t)
    back = width_mm / 2 - waist_mm * np.exp(-0.5 * (along / 3) ** 2)
    return Field((across >= -width_mm / 2) & (across <= back), (mm, mm))


@settings(max_examples=40, deadline=None)
@given(st.floats(-30, 30), st.floats(8, 18), st.floats(-12, 12))
def test_the_canal_is_measured_at_right_angles_to_itself(degrees: float, width: float, disc: float) -> None:
    """Whatever way the disc points."""
    t = np.deg2rad(disc)
    chord = canal_chord(_canal(degrees, width), np.array([42.0, 60.0]), np.array([np.cos(t), np.sin(t)]), 8.0, 34.0)
    assert chord is not None
    assert chord.length == pytest.approx(width, abs=0.76)
    assert chord.front[0] < chord.back[0]


def test_the_narrowest_place_within_the_height_of_the_disc_counts() -> None:
    at, back = np.array([42.0, 60.0]), np.array([1.0, 0.0])
    wide, narrow = canal_chord(_canal(0, 14), at, back, 8.0, 34.0), canal_chord(_canal(0, 14, 6), at, back, 8.0, 34.0)
    assert wide is not None
    assert narrow is not None
    assert wide.length == pytest.approx(14, abs=0.2)
    assert narrow.length == pytest.approx(8, abs=0.3)


@pytest.mark.parametrize("kind", ["none", "far", "lengthwise", "ends here"])
def test_what_is_no_canal_behind_a_disc_has_no_diameter(kind: str) -> None:
    pixels = np.zeros((240, 240), bool)
    if kind == "far":
        pixels[:, 236:] = True
    elif kind == "lengthwise":
        pixels[110:130, 90:] = True
    elif kind == "ends here":
        pixels[118:, 100:125] = True
    assert canal_chord(Field(pixels, (0.5, 0.5)), np.array([42.0, 60.0]), np.array([1.0, 0.0]), 8.0, 34.0) is None


def test_the_canal_at_many_discs_is_that_at_each() -> None:
    canal = _canal(7, 14, 5)
    at = np.array([[42.0, 60.0], [42.0, 20.0], [42.0, 119.0], [5.0, 60.0], [42.0, 80.0]])
    turns = np.deg2rad([0.0, 5.0, -3.0, 0.0, 12.0])
    back, height, depth = np.stack([np.cos(turns), np.sin(turns)], 1), np.array([8.0, 9, 7, 8, 10]), np.array([34.0, 36, 33, 20, 40])
    together = canal_chords(canal, at, back, height, depth)
    alone = [canal_chord(canal, a, b, float(h), float(d)) for a, b, h, d in zip(at, back, height, depth, strict=True)]
    assert [c is None for c in together] == [c is None for c in alone] == [False, False, True, True, False]
    for a, b in zip(together, alone, strict=True):
        if a is not None and b is not None:
            np.testing.assert_array_equal([a.front, a.back], [b.front, b.back])
    assert canal_chords(canal, at[:0], back[:0], height[:0], depth[:0]) == []


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000))
def test_a_disc_is_enclosed_with_all_its_pixels(seed: int) -> None:
    """The ends of its rows are enough to enclose it by."""
    rng = np.random.default_rng(seed)
    pixels = cv2.GaussianBlur(rng.standard_normal((40, 60)), (0, 0), float(rng.uniform(1, 6))) > rng.uniform(0, 0.1)
    ys, xs = np.nonzero(pixels[bounds(pixels)])
    if xs.size < 3:
        return
    (_, _), sides, _ = cv2.minAreaRect(np.stack([xs * 0.7, ys * 0.5], 1).astype(np.float32))
    size = disc_size(pixels, (0.5, 0.7))
    assert size.depth == max(sides) + float(np.sqrt(0.5 * 0.7))
    assert size.area == xs.size * 0.5 * 0.7
