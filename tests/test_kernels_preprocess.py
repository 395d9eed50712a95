"""Grey values to [-1, 1], the letterbox and its way back: coordinates must survive the round trip."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.preprocess import Letterbox, content_window, letterbox, normalise

hw = st.tuples(st.integers(8, 700), st.integers(8, 700))


# -- normalise ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0.0, 1.0, -1000.0, 65535.0])
def test_a_constant_image_is_black(value: float) -> None:
    out = normalise(np.full((20, 30), value, np.float32))
    assert out.dtype == np.float32
    np.testing.assert_array_equal(out, np.full((20, 30), -1.0, np.float32))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.floats(1e-2, 1e4), st.floats(-1e4, 1e4))
def test_any_unit_gives_the_same_picture(seed: int, gain: float, offset: float) -> None:
    pixels = np.random.default_rng(seed).gamma(2.0, 100.0, (40, 50)).astype(np.float32)
    base, other = normalise(pixels), normalise((pixels * gain + offset).astype(np.float32))
    assert base.shape == pixels.shape
    assert base.min() == -1.0
    assert base.max() == 1.0
    # float32 holds seven digits: an offset a hundred times the contrast costs two of them.
    assert float(np.abs(base - other).max()) < 1e-4 + 1e-6 * abs(offset) / gain


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31))
def test_brighter_stays_brighter(seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 4096, (31, 33)).astype(np.float32)
    out = normalise(pixels)
    order = np.argsort(pixels.ravel(), kind="stable")
    assert (np.diff(out.ravel()[order]) >= 0).all()
    assert np.unique(out).size > 100


def test_padding_does_not_count_and_outliers_do_not_stretch() -> None:
    rng = np.random.default_rng(1)
    inside = rng.uniform(500, 600, (64, 64)).astype(np.float32)
    padded = np.zeros((256, 256), np.float32)
    padded[96:160, 96:160] = inside
    out = normalise(padded)[96:160, 96:160]
    assert float(np.median(out)) == pytest.approx(0.0, abs=0.1)
    hot = inside.copy()
    hot[10, 10] = 1e6
    np.testing.assert_allclose(normalise(hot)[20:], normalise(inside)[20:], atol=0.02)


def test_the_input_is_left_as_it_is() -> None:
    pixels = np.arange(400, dtype=np.float32).reshape(20, 20)
    pixels.setflags(write=False)
    normalise(pixels)
    np.testing.assert_array_equal(pixels, np.arange(400).reshape(20, 20))


# -- letterbox ------------------------------------------------------------------------------------------------------


@settings(max_examples=80, deadline=None)
@given(hw, st.sampled_from([(384, 384), (256, 128), (96, 160)]))
def test_letterbox_keeps_aspect_centre_and_padding(source: tuple[int, int], target: tuple[int, int]) -> None:
    out, back = letterbox(np.ones(source, np.float32), target)
    assert out.shape == (1, 1, *target)
    assert out.dtype == np.float32
    ys, xs = np.nonzero(out[0, 0] > 0)
    height, width = int(np.ptp(ys)) + 1, int(np.ptp(xs)) + 1
    assert abs(height - source[0] * back.scale) <= 0.5 + 1e-6 or height == 1
    assert abs(width - source[1] * back.scale) <= 0.5 + 1e-6 or width == 1
    assert height == target[0] or width == target[1]
    assert abs(int(ys.min()) - (target[0] - 1 - int(ys.max()))) <= 1
    assert abs(int(xs.min()) - (target[1] - 1 - int(xs.max()))) <= 1
    assert (out[0, 0][out[0, 0] <= 0] == -1).all()
    assert (xs.min(), ys.min()) == (back.offset_x, back.offset_y)


@settings(max_examples=100, deadline=None)
@given(hw, st.lists(st.tuples(*[st.floats(0, 1)] * 4), min_size=1, max_size=5))
def test_a_box_to_the_input_and_back_is_the_box(source: tuple[int, int], shares: list[tuple[float, ...]]) -> None:
    _, back = letterbox(np.zeros(source, np.float32), (384, 384))
    size = np.array([source[1], source[0], source[1], source[0]])
    boxes = np.sort(np.array(shares).reshape(-1, 2, 2), axis=1).reshape(-1, 4) * size
    shift = np.array([back.offset_x, back.offset_y] * 2)
    there = (boxes * back.scale + shift).astype(np.float32)
    np.testing.assert_allclose(back.boxes_to_source(there), boxes, atol=1e-3)


def test_boxes_are_clipped_to_the_image_and_the_argument_is_left() -> None:
    _, back = letterbox(np.zeros((100, 50), np.float32), (200, 200))
    given_boxes = np.array([[-50, -50, 500, 500], [0, 0, 10, 10]], np.float32)
    kept = given_boxes.copy()
    np.testing.assert_array_equal(back.boxes_to_source(given_boxes), [[0, 0, 50, 100], [0, 0, 0, 5]])
    np.testing.assert_array_equal(given_boxes, kept)


@pytest.mark.parametrize("source", [(384, 384), (512, 448), (300, 641), (640, 200), (97, 130)])
@pytest.mark.parametrize("stride", [1, 2, 8])
def test_a_map_comes_back_where_it_was(source: tuple[int, int], stride: int) -> None:
    """Each cell of a map holds its own centre in input pixels; back in the source, that must be the pixel's centre."""
    _, back = letterbox(np.zeros(source, np.float32), (384, 384))
    cells = 384 // stride
    centre = (np.arange(cells, dtype=np.float32) + 0.5) * stride
    columns, rows = np.meshgrid(centre, centre)
    height, width = source
    for plane, offset, along, size in (
        (columns, back.offset_x, np.arange(width)[None] + 0.5, width),
        (rows, back.offset_y, np.arange(height)[:, None] + 0.5, height),
    ):
        out = (back.map_to_source(plane) - offset) / back.scale
        assert out.shape == source
        error = np.abs(out - along)
        # The outermost half cell repeats the last value, for want of a neighbour.
        margin = int(np.ceil(0.5 * stride / back.scale))
        inner = error[margin : height - margin or None, margin : width - margin or None]
        assert float(inner.max()) < 0.1, size
        assert float(error.max()) <= 0.5 * stride / back.scale + 0.5


@pytest.mark.parametrize("source", [(512, 448), (300, 641), (200, 150)])
def test_a_bright_spot_comes_back_within_half_a_pixel(source: tuple[int, int]) -> None:
    """Through the real resize, not the formula: a blob's centre of mass before and after."""
    ys, xs = np.mgrid[: source[0], : source[1]].astype(np.float32)
    for fy, fx in ((0.3, 0.4), (0.62, 0.55), (0.5, 0.7)):
        cy, cx = fy * source[0], fx * source[1]
        blob = np.exp(-((xs + 0.5 - cx) ** 2 + (ys + 0.5 - cy) ** 2) / (2 * 8.0**2)).astype(np.float32)
        x, back = letterbox(blob * 2 - 1, (384, 384))
        out = np.clip(back.map_to_source((x[0, 0] + 1) / 2), 0.02, None) - 0.02
        found = (float((out * (xs + 0.5)).sum() / out.sum()), float((out * (ys + 0.5)).sum() / out.sum()))
        assert np.hypot(found[0] - cx, found[1] - cy) < 0.5


def test_maps_with_channels_and_nearest_neighbours() -> None:
    back = Letterbox(1.0, 0.0, 0.0, (4, 4), (4, 4))
    plane = np.arange(32, dtype=np.float32).reshape(4, 4, 2)
    np.testing.assert_array_equal(back.map_to_source(plane), plane)
    labels = np.array([[0, 3], [2, 1]], np.uint8)
    out = back.map_to_source(labels, cv2.INTER_NEAREST)  # type: ignore[arg-type]
    assert out.dtype == np.uint8
    assert set(np.unique(out)) <= {0, 1, 2, 3}
    assert (out[0, 0], out[0, 3], out[3, 0], out[3, 3]) == (0, 3, 2, 1)


def test_a_black_canvas_is_cut_and_everything_still_maps_to_the_source() -> None:
    content = np.random.default_rng(0).uniform(-0.5, 1.0, (100, 80)).astype(np.float32)
    canvas = np.full((300, 400), -1.0, np.float32)
    canvas[150:250, 30:110] = content
    x, back = letterbox(canvas, (64, 64))
    alone, own = letterbox(content, (64, 64))
    np.testing.assert_array_equal(x, alone)
    box = np.array([[10.0, 6.0, 40.0, 50.0]], np.float32)
    np.testing.assert_allclose(back.boxes_to_source(box), own.boxes_to_source(box) + np.float32([30, 150, 30, 150]), atol=1e-3)
    plane = np.random.default_rng(1).normal(size=(32, 32)).astype(np.float32)
    mapped = back.map_to_source(plane, outside=7.0)
    np.testing.assert_allclose(mapped[150:250, 30:110], own.map_to_source(plane), atol=1e-4)
    mapped[150:250, 30:110] = 7.0
    assert (mapped == 7.0).all()


def test_a_usual_margin_stays() -> None:
    image = np.full((100, 100), -1.0, np.float32)
    image[:, :60] = 0.5
    assert content_window(image) == (0, 100, 0, 100)
    image[:, 45:] = -1.0
    assert content_window(image) == (0, 100, 0, 45)
    assert content_window(np.full((10, 12), -1.0, np.float32)) == (0, 10, 0, 12)
