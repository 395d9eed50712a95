"""Lengths and areas of rectangles whose size is known, turned and stretched."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.measure import disc_size


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
