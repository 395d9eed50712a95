"""Evidence maps: scaled as Grad-CAM scales them, checked against their logit, and laid where they belong."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from kernels.heatmap import cam_residual, paste, positive_unit
from models.grader import crop_matrix

planes = hnp.arrays(np.float32, st.tuples(st.integers(1, 9), st.integers(1, 9)), elements=st.floats(-100, 100, width=32))


@given(planes)
def test_positive_unit_drops_the_negative_and_keeps_the_order(evidence: np.ndarray) -> None:
    out = positive_unit(evidence)
    assert out.dtype == np.float32
    assert (out[evidence <= 0] == 0).all()
    peak = float(evidence.max())
    if peak > 0:
        assert float(out.max()) == pytest.approx(1.0)
        np.testing.assert_allclose(out * peak, np.maximum(evidence, 0), rtol=1e-5, atol=1e-6)
    else:
        assert not out.any()


def test_positive_unit_of_nothing() -> None:
    assert positive_unit(np.zeros((0, 0), np.float32)).size == 0


@settings(max_examples=50)
@given(st.integers(0, 2**31))
def test_the_residual_is_zero_for_the_map_of_a_linear_head_and_the_error_else(seed: int) -> None:
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(16, 8, 8))
    weight, bias = rng.normal(size=(5, 16)), rng.normal(size=5)
    cam = np.einsum("kc,chw->khw", weight, features).astype(np.float32)
    logits = (weight @ features.mean((1, 2)) + bias).astype(np.float32)
    assert cam_residual(cam, bias.astype(np.float32), logits) < 1e-5
    off = logits.copy()
    off[3] += 0.25
    assert cam_residual(cam, bias.astype(np.float32), off) == pytest.approx(0.25, abs=1e-5)
    off[3] -= 0.5
    assert cam_residual(cam, bias.astype(np.float32), off) == pytest.approx(0.25, abs=1e-5)
    assert cam_residual(cam[::-1], bias.astype(np.float32), logits) > 1e-3


def _slow_paste(crop_map: np.ndarray, matrix: np.ndarray, crop_size: int, hw: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Each source pixel's centre carried into the crop, read there by hand; and which pixels lie clearly inside or outside."""
    cells = crop_map.shape[0]
    out = np.zeros(hw)
    inside = np.zeros(hw, int)
    for y in range(hw[0]):
        for x in range(hw[1]):
            cx = matrix[0, 0] * (x + 0.5) + matrix[0, 2]
            cy = matrix[1, 1] * (y + 0.5) + matrix[1, 2]
            slack = matrix[0, 0]
            if not (-slack < cx < crop_size + slack and -slack < cy < crop_size + slack):
                continue
            inside[y, x] = 2 if 0 <= cx <= crop_size and 0 <= cy <= crop_size else 1
            u = np.clip(cx * cells / crop_size - 0.5, 0, cells - 1)
            v = np.clip(cy * cells / crop_size - 0.5, 0, cells - 1)
            u0, v0 = int(u), int(v)
            u1, v1 = min(u0 + 1, cells - 1), min(v0 + 1, cells - 1)
            fu, fv = u - u0, v - v0
            top = crop_map[v0, u0] * (1 - fu) + crop_map[v0, u1] * fu
            low = crop_map[v1, u0] * (1 - fu) + crop_map[v1, u1] * fu
            out[y, x] = top * (1 - fv) + low * fv
    return out, inside


@pytest.mark.parametrize("box", [(20.0, 30.0, 50.0, 42.0), (-5.0, 3.0, 21.0, 13.0), (60.3, 70.2, 90.8, 79.9), (40.0, 40.0, 43.0, 41.0)])
def test_paste_equals_the_slow_way(box: tuple[float, float, float, float]) -> None:
    hw = (80, 90)
    crop_map = np.random.default_rng(5).uniform(0, 1, (8, 8)).astype(np.float32)
    matrix = crop_matrix(box, 128)
    out = paste(crop_map, matrix, 128, hw)
    expected, inside = _slow_paste(crop_map, matrix, 128, hw)
    assert out.shape == hw
    assert out.dtype == np.float32
    sure = inside == 2
    assert sure.sum() > 20
    # OpenCV reads at steps of 1/32 of a cell.
    assert float(np.abs(out - expected)[sure].max()) < 1 / 16
    assert float(np.abs(out - expected)[sure].mean()) < 1 / 64
    assert not out[inside == 0].any()


def test_a_peak_in_the_crop_is_a_peak_in_the_source() -> None:
    for row, column in ((1, 1), (4, 6), (6, 2)):
        crop_map = np.zeros((8, 8), np.float32)
        crop_map[row, column] = 1.0
        matrix = crop_matrix((100.0, 200.0, 160.0, 220.0), 128)
        out = paste(crop_map, matrix, 128, (400, 300))
        y, x = np.unravel_index(int(cv2.GaussianBlur(out, (0, 0), 3).argmax()), out.shape)
        centre = np.array([(column + 0.5) * 16, (row + 0.5) * 16])
        expected = (centre - matrix[:, 2]) / matrix[0, 0]
        assert np.hypot(x + 0.5 - expected[0], y + 0.5 - expected[1]) < 1.5


def test_a_crop_outside_the_image_leaves_nothing() -> None:
    matrix = crop_matrix((500.0, 500.0, 540.0, 510.0), 128)
    assert not paste(np.ones((8, 8), np.float32), matrix, 128, (100, 100)).any()
