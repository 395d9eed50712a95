"""Boxes against a count of cells, and suppression against its definition."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.nms import iou_matrix, nms

SIDE = 12
edge = st.tuples(st.integers(0, SIDE), st.integers(0, SIDE)).map(sorted)
box = st.tuples(edge, edge).map(lambda e: (e[0][0], e[1][0], e[0][1], e[1][1]))
boxes = st.lists(box, min_size=0, max_size=8).map(lambda b: np.array(b, np.float32).reshape(-1, 4))


def _cells(b: np.ndarray) -> np.ndarray:
    grid = np.zeros((SIDE, SIDE), bool)
    x0, y0, x1, y1 = (int(v) for v in b)
    grid[y0:y1, x0:x1] = True
    return grid


def _iou(a: np.ndarray, b: np.ndarray) -> float:
    union = (_cells(a) | _cells(b)).sum()
    return float((_cells(a) & _cells(b)).sum() / union) if union else 0.0


@given(boxes, boxes)
def test_iou_is_the_share_of_cells(a: np.ndarray, b: np.ndarray) -> None:
    out = iou_matrix(a, b)
    assert out.shape == (len(a), len(b))
    assert out.dtype == np.float32
    expected = np.array([[_iou(x, y) for y in b] for x in a]).reshape(len(a), len(b))
    np.testing.assert_allclose(out, expected, atol=1e-6)
    np.testing.assert_array_equal(out, iou_matrix(b, a).T)


def _greedy(found: np.ndarray, scores: np.ndarray, limit: float, most: int) -> list[int]:
    """The definition: best first, lower index on ties, drop what overlaps a kept one by `limit` or more."""
    kept: list[int] = []
    for i in sorted(range(len(found)), key=lambda i: (-scores[i], i)):
        if len(kept) < most and all(_iou(found[i], found[k]) < limit for k in kept):
            kept.append(i)
    return kept


@settings(max_examples=200)
@given(boxes, st.data())
def test_nms_is_its_definition(found: np.ndarray, data: st.DataObject) -> None:
    # Few different scores, so that ties happen; limits that no ratio of small whole numbers hits.
    scores = np.array(data.draw(st.lists(st.sampled_from([0.1, 0.5, 0.9]), min_size=len(found), max_size=len(found))), np.float32)
    limit = data.draw(st.sampled_from([0.0314, 0.3137, 0.4999, 0.7771]))
    most = data.draw(st.sampled_from([1, 3, 100]))
    out = nms(found, scores, limit, most)
    assert out.dtype == np.int64
    assert out.tolist() == _greedy(found, scores, limit, most)


def test_equal_boxes_leave_one_and_touching_boxes_stay() -> None:
    found = np.array([[0, 0, 4, 4], [0, 0, 4, 4], [4, 0, 8, 4]], np.float32)
    assert nms(found, np.array([0.2, 0.9, 0.5], np.float32)).tolist() == [1, 2]


def test_an_overlap_of_exactly_the_limit_is_dropped() -> None:
    found = np.array([[0, 0, 2, 1], [0, 0, 1, 1]], np.float32)
    assert nms(found, np.array([0.9, 0.8], np.float32), iou_limit=0.5).tolist() == [0]


def test_a_suppressed_box_suppresses_nothing() -> None:
    chain = np.array([[0, 0, 10, 1], [4, 0, 14, 1], [8, 0, 18, 1]], np.float32)
    assert nms(chain, np.array([0.9, 0.8, 0.7], np.float32), iou_limit=0.4).tolist() == [0, 2]


@pytest.mark.parametrize("shape", [(0,), (0, 4)])
def test_nothing_in_nothing_out(shape: tuple[int, ...]) -> None:
    assert nms(np.zeros((0, 4), np.float32), np.zeros(0, np.float32)).shape == (0,)
    assert iou_matrix(np.zeros(shape, np.float32), np.ones((2, 4), np.float32)).shape == (0, 2)
