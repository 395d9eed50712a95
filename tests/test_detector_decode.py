"""Logits made by hand, with boxes that are known, through the detector's decoding."""

from __future__ import annotations

import numpy as np
import pytest

from models import detector
from models.detector import BINS, STRIDES, decode

SIDE = 384
EMPTY = -12.0


def _blank() -> dict[str, np.ndarray]:
    out = {}
    for s in STRIDES:
        out[f"class_{s}"] = np.full((1, len(detector.SPEC.classes), SIDE // s, SIDE // s), EMPTY, np.float32)
        out[f"box_{s}"] = np.zeros((1, 4 * BINS, SIDE // s, SIDE // s), np.float32)
    return out


def _put(
    outputs: dict[str, np.ndarray], stride: int, kind: int, box: tuple[float, ...], score: float, cell: tuple[int, int] | None = None
) -> None:
    """Write one box into a cell: each distance as weight on the two whole bins around it."""
    x0, y0, x1, y1 = box
    row, column = cell or (int((y0 + y1) / 2 // stride), int((x0 + x1) / 2 // stride))
    x, y = (column + 0.5) * stride, (row + 0.5) * stride
    outputs[f"class_{stride}"][0, kind, row, column] = np.log(score / (1 - score))
    for side, distance in enumerate((x - x0, y - y0, x1 - x, y1 - y)):
        bins = distance / stride
        assert 0 <= bins <= BINS - 1
        low = min(int(bins), BINS - 2)
        share = np.full(BINS, 1e-9)
        share[low], share[low + 1] = max(1 - (bins - low), 1e-9), max(bins - low, 1e-9)
        outputs[f"box_{stride}"][0, side * BINS : (side + 1) * BINS, row, column] = np.log(share)


@pytest.mark.parametrize("stride", STRIDES)
@pytest.mark.parametrize("kind", [0, 1, 2])
def test_one_box_comes_out_as_it_was_put_in(stride: int, kind: int) -> None:
    outputs = _blank()
    half = stride * 3.3
    box = (150.0 - half, 201.5 - half / 3, 150.0 + half, 201.5 + half / 4)
    _put(outputs, stride, kind, box, 0.8)
    found = decode(outputs)
    assert found.boxes.shape == (1, 4)
    np.testing.assert_allclose(found.boxes[0], box, atol=0.01)
    assert found.scores[0] == pytest.approx(0.8, abs=1e-5)
    assert found.classes.tolist() == [kind]
    assert (found.boxes.dtype, found.scores.dtype, found.classes.dtype) == (np.float32, np.float32, np.int64)


def test_nothing_found_is_empty_of_the_right_shapes() -> None:
    found = decode(_blank())
    assert found.boxes.shape == (0, 4)
    assert found.scores.shape == found.classes.shape == (0,)


def test_several_strides_and_classes_come_best_first() -> None:
    outputs = _blank()
    _put(outputs, 8, 1, (40, 40, 72, 52), 0.6)
    _put(outputs, 16, 0, (100, 90, 160, 150), 0.9)
    _put(outputs, 32, 2, (190, 200, 290, 300), 0.7)
    found = decode(outputs)
    assert found.classes.tolist() == [0, 2, 1]
    np.testing.assert_allclose(found.scores, [0.9, 0.7, 0.6], atol=1e-5)
    np.testing.assert_allclose(found.boxes[2], (40, 40, 72, 52), atol=0.01)


def test_the_same_box_from_two_cells_counts_once_but_two_classes_stay() -> None:
    outputs = _blank()
    box = (100.0, 100.0, 140.0, 120.0)
    _put(outputs, 8, 1, box, 0.7, cell=(13, 14))
    _put(outputs, 8, 1, (101.0, 100.0, 141.0, 121.0), 0.9, cell=(13, 15))
    _put(outputs, 16, 1, box, 0.5)
    _put(outputs, 16, 0, box, 0.4)
    found = decode(outputs)
    assert sorted((c, round(s, 3)) for c, s in zip(found.classes.tolist(), found.scores.tolist(), strict=True)) == [(0, 0.4), (1, 0.9)]


@pytest.mark.parametrize(("score", "count"), [(0.049, 0), (0.051, 1)])
def test_the_candidate_limit(score: float, count: int) -> None:
    outputs = _blank()
    _put(outputs, 8, 1, (100, 100, 130, 112), score)
    assert len(decode(outputs).scores) == count
    assert len(decode(outputs, score_limit=0.5).scores) == 0


def test_a_wild_network_is_cut_to_the_best_candidates() -> None:
    outputs = _blank()
    rng = np.random.default_rng(1)
    outputs["class_8"][0] = rng.normal(3, 0.5, outputs["class_8"][0].shape)
    outputs["class_8"][0, 1, 20, 20] = 9.0
    found = decode(outputs)
    assert len(found.scores) <= detector.MAX_CANDIDATES
    assert found.scores[0] == pytest.approx(1 / (1 + np.exp(-9.0)), abs=1e-5)
    assert (np.diff(found.scores) <= 0).all()
