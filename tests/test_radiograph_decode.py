"""Outputs of the radiograph networks as arrays -> boxes and classes."""

from __future__ import annotations

import numpy as np
import pytest

from models import detector, spine_class, vertebra_ap
from tests.seeing import maps_of


def column(count: int, height: float) -> np.ndarray:  # type: ignore[type-arg]
    top = 20 + np.arange(count) * height
    return np.stack([np.full(count, 80.0), top, np.full(count, 80.0) + 2.2 * height, top + height], 1).astype(np.float32)


@pytest.mark.parametrize(("count", "height"), [(17, 11.0), (12, 25.0), (5, 46.0)])
def test_boxes_come_out_as_they_went_in(count: int, height: float) -> None:
    boxes = column(count, height)
    found = vertebra_ap.decode(maps_of(boxes))
    assert len(found.boxes) == count
    assert found.boxes[np.argsort(found.boxes[:, 1])] == pytest.approx(boxes, abs=0.02)
    assert found.scores == pytest.approx(np.full(count, 0.9), abs=1e-5)
    assert (found.classes == 0).all()


def test_tilted_neighbours_overlap_and_both_stay() -> None:
    boxes = np.array([[60, 100, 110, 130], [75, 110, 125, 140]], np.float32)  # IoU .30
    assert len(vertebra_ap.decode(maps_of(boxes)).boxes) == 2
    doubled = np.array([[60, 100, 110, 130], [64, 104, 114, 134]], np.float32)  # IoU .66
    assert len(vertebra_ap.decode(maps_of(doubled)).boxes) == 1


def test_nothing_sure_is_nothing_found() -> None:
    found = vertebra_ap.decode(maps_of(column(9, 20.0), score=0.03))
    assert found.boxes.shape == (0, 4)
    assert len(vertebra_ap.decode(maps_of(column(9, 20.0), score=0.03), score_limit=0.01).boxes) == 9


def test_the_shapes_of_both_specs_fit_their_strides() -> None:
    for s in vertebra_ap.STRIDES:
        assert all(side % s == 0 for side in vertebra_ap.SPEC.input_hw)
    assert all(side % 16 == 0 for side in spine_class.SPEC.input_hw)
    assert len(vertebra_ap.SPEC.outputs) == 2 * len(vertebra_ap.STRIDES)
    reach = 2 * (detector.BINS - 1) * max(vertebra_ap.STRIDES)
    assert reach >= 0.75 * vertebra_ap.SPEC.input_hw[1]  # no vertebra is wider than three quarters of its picture


def test_probabilities_sum_to_one_and_temperature_softens_them() -> None:
    logits = np.array([[0.0, 2.0, -1.0], [3.0, 0.0, 0.0]], np.float32)
    plain, soft = spine_class.decode(logits), spine_class.decode(logits, temperature=4.0)
    assert [c.name for c in plain] == ["scoliosis", "normal"] == [c.name for c in soft]
    for a, b in zip(plain, soft, strict=True):
        assert sum(a.probabilities) == pytest.approx(1.0)
        assert max(b.probabilities) < max(a.probabilities)
    assert np.isfinite(spine_class.decode(np.array([[900.0, -900.0, 0.0]], np.float32))[0].probabilities).all()
