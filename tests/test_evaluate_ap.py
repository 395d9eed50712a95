"""Measures of the radiograph networks on answers whose score is known beforehand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kernels.preprocess import letterbox, normalise
from models import evaluate_ap, radiographs, spine_class, vertebra_ap
from tests.seeing import Array, maps_of

Runner = Callable[[dict[str, Array]], dict[str, Array]]


@pytest.fixture(scope="module")
def pictures() -> list[radiographs.Boxed]:
    return [p for p, _ in evaluate_ap.phantoms(4)]


def knowing(pictures: list[radiographs.Boxed], change: Callable[[Array], Array] = lambda b: b) -> Runner:
    """A detector that finds each picture's boxes, after `change`."""
    answers = {}
    for p in pictures:
        x, back = letterbox(normalise(p.pixels.astype(np.float32)), vertebra_ap.SPEC.input_hw)
        boxes = change(p.boxes.copy())
        boxes[:, 0::2] = boxes[:, 0::2] * back.scale + back.offset_x
        boxes[:, 1::2] = boxes[:, 1::2] * back.scale + back.offset_y
        answers[x.tobytes()] = maps_of(boxes)
    return lambda inputs: answers[inputs["image"].tobytes()]


def test_boxes_that_are_the_drawn_ones_score_one(pictures: list[radiographs.Boxed]) -> None:
    scores = evaluate_ap.evaluate("vertebra_ap", knowing(pictures), pictures)
    assert scores.main == "map50_vertebra"
    assert {m.name: m.value for m in scores.metrics} == {"map50_vertebra": 1.0, "recall_vertebra": 1.0, "precision_vertebra": 1.0}
    assert all((m.low, m.high, m.images, m.patients) == (1.0, 1.0, 4, 4) for m in scores.metrics)


def test_half_the_boxes_score_half_and_moved_ones_nothing(pictures: list[radiographs.Boxed]) -> None:
    half = evaluate_ap.evaluate("vertebra_ap", knowing(pictures, lambda b: b[:8]), pictures)
    assert half["map50_vertebra"].value == pytest.approx(8 / 17, abs=0.01)
    assert half["recall_vertebra"].value == pytest.approx(8 / 17)
    assert half["precision_vertebra"].value == 1.0
    assert (
        evaluate_ap.evaluate("vertebra_ap", knowing(pictures, lambda b: b + np.float32([60, 0, 60, 0])), pictures)["map50_vertebra"].value
        == 0.0
    )


def test_classes_are_counted_by_class() -> None:
    rng = np.random.default_rng(0)
    kinds = [0] * 4 + [1] * 6 + [2] * 2
    shown = [radiographs.Classed(str(i), rng.integers(0, 255, (64, 48)).astype(np.uint8), k, i) for i, k in enumerate(kinds)]
    said = {}
    for i, p in enumerate(shown):
        x, _ = letterbox(normalise(p.pixels.astype(np.float32)), spine_class.SPEC.input_hw)
        said[x.tobytes()] = 1 if i in (0, 11) else p.kind  # one normal and one spondylolisthesis called scoliosis
    scores = evaluate_ap.evaluate("spine_class", lambda i: {"logits": np.eye(3, dtype=np.float32)[[said[i["image"].tobytes()]]]}, shown)
    found = {m.name: m.value for m in scores.metrics}
    assert found == pytest.approx(
        {
            "accuracy": 10 / 12,
            "balanced_accuracy": (0.75 + 1 + 0.5) / 3,
            "recall_normal": 0.75,
            "recall_scoliosis": 1.0,
            "recall_spondylolisthesis": 0.5,
        }
    )
    assert scores["accuracy"].low < 10 / 12 < scores["accuracy"].high


def test_each_training_picture_is_read_by_the_network_that_did_not_learn_it() -> None:
    rng = np.random.default_rng(1)
    shown = [radiographs.Classed(str(i), rng.integers(0, 255, (64, 48)).astype(np.uint8), i % 3, i // 2) for i in range(30)]
    folds = radiographs.folds(shown)
    assert set(folds) == set(range(radiographs.FOLDS))
    assert all(len({f for f, p in zip(folds, shown, strict=True) if p.group == g}) == 1 for g in range(15))

    def only_knows(fold: int) -> Any:
        """Right about the pictures of one fold, wrong about all others."""
        own = {letterbox(normalise(p.pixels.astype(np.float32)), spine_class.SPEC.input_hw)[0].tobytes(): p.kind
               for p, f in zip(shown, folds, strict=True) if f == fold}  # fmt: skip
        wrong = {letterbox(normalise(p.pixels.astype(np.float32)), spine_class.SPEC.input_hw)[0].tobytes(): (p.kind + 1) % 3 for p in shown}
        return lambda i: {"logits": np.eye(3, dtype=np.float32)[[own.get(i["image"].tobytes(), wrong[i["image"].tobytes()])]]}

    assert evaluate_ap.out_of_fold([only_knows(k) for k in range(radiographs.FOLDS)], shown)["accuracy"].value == 1.0
    assert (
        evaluate_ap.out_of_fold([only_knows((k + 1) % radiographs.FOLDS) for k in range(radiographs.FOLDS)], shown)["accuracy"].value == 0.0
    )


def test_true_boxes_give_angles_within_two_degrees_and_jitter_widens_them() -> None:
    exact, moved = (evaluate_ap.summary(evaluate_ap.cobb_on_phantoms(None, 60, jitter=j)) for j in (0.0, 0.06))
    assert exact["mean_absolute_error_deg"] <= 2.0
    assert exact["missed"] == 0
    assert exact["mean_absolute_error_deg"] < moved["mean_absolute_error_deg"]


def test_a_detector_that_sees_the_truth_adds_no_error(pictures: list[radiographs.Boxed]) -> None:
    pairs = evaluate_ap.cobb_on_pictures(knowing(pictures), pictures)
    assert max(p.error_deg for p in pairs) < 0.2
    nothing = evaluate_ap.cobb_on_pictures(knowing(pictures, lambda b: b[:3]), pictures)
    assert all(p.found_deg == 0 for p in nothing)
    assert evaluate_ap.summary(nothing)["missed"] == sum(p.truth_deg > 0 for p in nothing)


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(ValueError, match="phantom has no class"):
        evaluate_ap.samples("spine_class", None)
    with pytest.raises(ValueError, match="too few"):
        evaluate_ap.samples("spine_class", Path("nowhere"), "validation")
