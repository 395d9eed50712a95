"""The measures against examples worked out by hand, and against their definitions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models import data, detector, evaluate, grader, phantom
from models.evaluate import average_precision, dice, match, quadratic_kappa

Match = tuple[np.ndarray, np.ndarray, int]


def _image(scores: list[float], hits: list[int], truths: int) -> Match:
    return np.array(scores, np.float32), np.array(hits, bool), truths


# -- average precision ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("images", "value"),
    [
        ([_image([0.9, 0.8], [1, 1], 2)], 1.0),
        ([_image([0.9, 0.8], [1, 1], 4)], 0.5),
        ([_image([0.9, 0.8], [0, 0], 2)], 0.0),
        ([_image([], [], 3)], 0.0),
        # hit, miss, hit of two: 1/2 * 1 + 1/2 * 2/3
        ([_image([0.9, 0.8, 0.7], [1, 0, 1], 2)], 0.5 + 0.5 * 2 / 3),
        # miss, hit, hit of two: precision 1/2 is lifted to the 2/3 that comes later
        ([_image([0.9, 0.8, 0.7], [0, 1, 1], 2)], 2 / 3),
        # the same detections in two images, ranked together
        ([_image([0.7, 0.9], [1, 1], 1), _image([0.8], [0], 1)], 0.5 + 0.5 * 2 / 3),
        ([_image([0.9], [1], 1), _image([], [], 1)], 0.5),
    ],
)
def test_average_precision_by_hand(images: list[Match], value: float) -> None:
    assert average_precision(images) == pytest.approx(value)


def test_average_precision_without_truth_is_not_a_number() -> None:
    assert math.isnan(average_precision([_image([0.9], [0], 0)]))
    assert math.isnan(average_precision([]))


@given(st.lists(st.booleans(), min_size=1, max_size=12), st.integers(0, 5))
def test_average_precision_is_the_area_under_the_curve(hits: list[bool], missed: int) -> None:
    truths = sum(hits) + missed
    scores = [1 - i / 20 for i in range(len(hits))]
    if not truths:
        return
    area = 0.0
    for rank, hit in enumerate(hits):
        if hit:
            area += max(sum(hits[: r + 1]) / (r + 1) for r in range(rank, len(hits))) / truths
    assert average_precision([_image(scores, [int(h) for h in hits], truths)]) == pytest.approx(area)


def test_matching_gives_each_truth_to_one_detection_the_surest_first() -> None:
    truth = np.array([[0, 0, 10, 10], [20, 0, 30, 10]], np.float32)
    boxes = np.array([[0, 0, 10, 9], [0, 0, 10, 10], [20, 0, 30, 10], [40, 0, 50, 10]], np.float32)
    scores, hits, count = match(boxes, np.array([0.9, 0.8, 0.3, 0.95], np.float32), truth)
    np.testing.assert_allclose(scores, [0.95, 0.9, 0.8, 0.3])
    assert hits.tolist() == [False, True, False, True]
    assert count == 2


@pytest.mark.parametrize(("width", "hit"), [(5.0, True), (4.9, False)])
def test_a_match_needs_half_of_the_union(width: float, hit: bool) -> None:
    _, hits, _ = match(np.array([[0, 0, width, 10]], np.float32), np.ones(1, np.float32), np.array([[0, 0, 10, 10]], np.float32))
    assert hits.tolist() == [hit]


def test_matching_against_nothing() -> None:
    scores, hits, count = match(np.ones((2, 4), np.float32), np.ones(2, np.float32), np.zeros((0, 4), np.float32))
    assert (len(scores), hits.any(), count) == (2, False, 0)
    assert match(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.ones((3, 4), np.float32))[2] == 3


# -- grades ---------------------------------------------------------------------------------------------------------


def test_kappa_by_hand() -> None:
    truth = np.array([1, 2, 3, 4, 5])
    assert quadratic_kappa(truth, truth) == pytest.approx(1.0)
    assert quadratic_kappa(truth[::-1].copy(), truth) == pytest.approx(-1.0)
    # Two raters, grades 1 and 2 only: observed disagreement 1/4, by chance 1/2.
    assert quadratic_kappa(np.array([1, 1, 2, 2]), np.array([1, 2, 2, 2])) == pytest.approx(1 - (1 / 4) / (1 / 2 * 3 / 4 + 1 / 2 * 1 / 4))
    assert quadratic_kappa(np.array([3, 3, 3, 3, 3]), truth) == pytest.approx(0.0)
    assert math.isnan(quadratic_kappa(np.array([3, 3]), np.array([3, 3])))


def test_kappa_weighs_a_large_error_more_and_does_not_care_who_rates() -> None:
    truth = np.array([1, 2, 3, 4, 5, 3])
    near, far = np.array([2, 2, 3, 4, 5, 3]), np.array([5, 2, 3, 4, 5, 3])
    assert quadratic_kappa(near, truth) > quadratic_kappa(far, truth)
    assert quadratic_kappa(far, truth) == pytest.approx(quadratic_kappa(truth, far))


@given(st.lists(st.tuples(st.integers(0, 4), st.booleans()), min_size=2, max_size=20))
def test_auroc_is_the_share_of_pairs_in_order(rows: list[tuple[int, bool]]) -> None:
    scores, truth = np.array([float(r[0]) for r in rows]), np.array([r[1] for r in rows])
    pairs = [(p, n) for p in scores[truth] for n in scores[~truth]]
    value = evaluate.auroc(scores, truth)
    if pairs:
        assert value == pytest.approx(np.mean([1.0 if p > n else 0.5 if p == n else 0.0 for p, n in pairs]))
    else:
        assert math.isnan(value)


# -- outlines -------------------------------------------------------------------------------------------------------


def test_dice_by_hand() -> None:
    a, b = np.zeros((4, 4), np.uint8), np.zeros((4, 4), np.uint8)
    a[:2], b[1:3] = 2, 2
    b[0] = 1
    assert dice(a, b, 2) == pytest.approx(0.5)
    assert dice(a, b, 1) == 0.0
    assert dice(a, a, 2) == 1.0
    assert math.isnan(dice(a, b, 3))


# -- intervals ------------------------------------------------------------------------------------------------------


def interval(groups: Sequence[int], over: Callable[[np.ndarray], float], name: str = "m") -> evaluate.Metric:
    scores = evaluate.Scores(name)
    scores.add(name, groups, over)
    return scores[name]


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31), st.integers(2, 12))
def test_the_interval_holds_the_value_and_stays_in_range(seed: int, patients: int) -> None:
    rng = np.random.default_rng(seed)
    groups = np.repeat(np.arange(patients), 4)
    values = rng.uniform(size=len(groups))
    found = interval(groups.tolist(), lambda i: float(values[i].mean()), "mean")
    assert found.value == pytest.approx(values.mean())
    assert values.min() <= found.low <= found.value <= found.high <= values.max()
    assert (found.name, found.images, found.patients) == ("mean", len(groups), patients)
    assert found == interval(groups.tolist(), lambda i: float(values[i].mean()), "mean")


def test_patients_are_drawn_whole() -> None:
    """Slices of one patient say the same thing again: forty of them must not shrink the interval."""
    rng = np.random.default_rng(1)
    per_patient = rng.uniform(size=10)
    groups, values = np.repeat(np.arange(10), 40), np.repeat(per_patient, 40)
    repeated = interval(groups.tolist(), lambda i: float(values[i].mean()), "m")
    alone = interval(list(range(10)), lambda i: float(per_patient[i].mean()), "m")
    assert repeated.high - repeated.low == pytest.approx(alone.high - alone.low, rel=1e-6)
    independent = interval(list(range(400)), lambda i: float(values[i].mean()), "m")
    assert independent.high - independent.low < 0.4 * (repeated.high - repeated.low)


def test_a_resample_without_a_value_is_left_out() -> None:
    groups = [0, 1, 2]
    found = interval(groups, lambda i: float("nan") if 0 not in i else 0.5, "m")
    assert (found.low, found.high) == (0.5, 0.5)


def test_a_paired_difference_is_narrower_than_either_interval() -> None:
    """Both engines see the same patients; a steady loss of two points is sure although the patients differ by forty."""
    rng = np.random.default_rng(2)
    groups = np.repeat(np.arange(12), 5)
    values = rng.uniform(0.5, 0.9, len(groups))
    worse = values - 0.02 - rng.normal(0, 0.002, len(groups))
    a, b = evaluate.Scores("m"), evaluate.Scores("m")
    a.add("m", groups, lambda i: float(values[i].mean()))
    b.add("m", groups, lambda i: float(worse[i].mean()))
    drop = evaluate.paired_drop(a, b)
    assert drop.value == pytest.approx(0.02, abs=0.002)
    assert 0.015 < drop.low < drop.value < drop.high < 0.025
    assert drop.high - drop.low < 0.1 * (a["m"].high - a["m"].low)


def test_scores_of_other_samples_cannot_be_paired() -> None:
    a, b = evaluate.Scores("m"), evaluate.Scores("m")
    a.add("m", [0, 1], lambda i: 1.0)
    b.add("m", [0, 2], lambda i: 1.0)
    with pytest.raises(ValueError, match="not of the same samples"):
        evaluate.paired_drop(a, b)


# -- a perfect network on phantoms ----------------------------------------------------------------------------------


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "PHANTOMS", 2)
    monkeypatch.setattr(evaluate, "RESAMPLES", 50)
    real = phantom.draw
    monkeypatch.setattr(evaluate.phantom, "draw", lambda rng, weighting: real(rng, weighting=weighting, hw=(192, 160)))


def test_the_detector_measure_rewards_truth_and_punishes_silence(few: None) -> None:
    samples = evaluate.slices(None)
    assert [s.name for s in samples] == ["phantom-0", "phantom-1"]
    blank = {f"class_{s}": np.full((1, 3, 384 // s, 384 // s), -12.0, np.float32) for s in detector.STRIDES}
    blank |= {f"box_{s}": np.zeros((1, 4 * detector.BINS, 384 // s, 384 // s), np.float32) for s in detector.STRIDES}
    silent = evaluate.evaluate("detector", lambda _: blank, None)
    assert silent["map50_disc"].value == 0.0
    assert silent["map50_vertebra"].value == 0.0
    assert silent.source == "phantoms"
    assert silent.main == "map50_disc"
    assert silent["map50_disc"].images == 2

    waiting = iter(samples)

    def perfect(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        from kernels.preprocess import letterbox, normalise

        s = next(waiting)
        x, back = letterbox(normalise(s.pixels), detector.SPEC.input_hw)
        np.testing.assert_array_equal(inputs["image"], x)
        out = {k: v.copy() for k, v in blank.items()}
        assert s.discs is not None
        assert s.vertebrae is not None
        for kind, boxes in ((0, s.vertebrae), (1, s.discs)):
            for box in boxes * back.scale + np.array([back.offset_x, back.offset_y] * 2):
                stride = next(st for st in detector.STRIDES if max(box[2] - box[0], box[3] - box[1]) / 2 < (detector.BINS - 2) * st)
                row, column = int((box[1] + box[3]) / 2 // stride), int((box[0] + box[2]) / 2 // stride)
                x_c, y_c = (column + 0.5) * stride, (row + 0.5) * stride
                out[f"class_{stride}"][0, kind, row, column] = 4.0
                for side, d in enumerate((x_c - box[0], y_c - box[1], box[2] - x_c, box[3] - y_c)):
                    low = int(d / stride)
                    share = np.full(detector.BINS, 1e-9)
                    share[low], share[low + 1] = 1 - (d / stride - low) + 1e-9, d / stride - low + 1e-9
                    out[f"box_{stride}"][0, side * detector.BINS : (side + 1) * detector.BINS, row, column] = np.log(share)
        return out

    right = evaluate.evaluate("detector", perfect, None)
    assert right["map50_disc"].value == pytest.approx(1.0)
    assert right["map50_vertebra"].value == pytest.approx(1.0)


def test_the_segmenter_measure_rewards_truth(few: None) -> None:
    from kernels.preprocess import letterbox, normalise

    waiting = iter(evaluate.slices(None))

    def perfect(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        s = next(waiting)
        assert s.mask is not None
        _, back = letterbox(normalise(s.pixels), (384, 384))
        planes = [letterbox((s.mask == k).astype(np.float32), (384, 384))[0][0, 0] for k in range(4)]
        del back
        return {"logits": np.stack(planes)[None]}

    found = evaluate.evaluate("segmenter", perfect, None)
    assert found["dice_mean"].value > 0.97
    assert {m.name for m in found.metrics} == {"dice_mean", "dice_vertebra", "dice_disc", "dice_canal"}


def test_the_grader_measure_rewards_truth(few: None) -> None:
    truths = [c.grading for c in evaluate.crops(None)]
    waiting = iter(truths)

    def perfect(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        assert inputs["image"].shape == (1, 1, 128, 128)
        g = next(waiting)
        logits = np.zeros((1, 8), np.float32)
        logits[0, g.pfirrmann - 1] = 9
        logits[0, 5:] = [9 if getattr(g, f) else -9 for f in grader.FLAGS]
        return {"logits": logits}

    found = evaluate.evaluate("grader", perfect, None)
    assert found["pfirrmann_exact"].value == found["pfirrmann_within_1"].value == 1.0
    assert found["pfirrmann_kappa"].value == pytest.approx(1.0)
    for flag in grader.FLAGS:
        value = found[f"auroc_{flag}"].value
        assert value == 1.0 or len({bool(getattr(t, flag)) for t in truths}) == 1

    three = evaluate.evaluate("grader", lambda _: {"logits": np.eye(8, dtype=np.float32)[2:3]}, None)
    expected = np.mean([t.pfirrmann == 3 for t in truths])
    assert three["pfirrmann_exact"].value == pytest.approx(expected)


def test_an_unknown_family_has_no_measure() -> None:
    with pytest.raises(ValueError, match="no measure"):
        evaluate.evaluate("oracle", lambda _: {}, None)


def test_gradings_fit_the_flags() -> None:
    assert {"pfirrmann", *grader.FLAGS} == set(data.Grading.__dataclass_fields__)
