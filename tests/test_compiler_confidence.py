"""Temperature, calibration error and conformal sets against their definitions, and the gate against engines that lie."""

from __future__ import annotations

import itertools
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from appliance.compiler import confidence as cf
from appliance.errors import CalibrationLeaks
from models import known
from models.evaluate import folds

PATIENTS, EACH, CLASSES = 60, 8, 5
GROUPS = np.repeat(np.arange(PATIENTS), EACH)
N = len(GROUPS)


def honest(seed: int = 0, spread: float = 2.0) -> tuple[np.ndarray, np.ndarray]:
    """Logits of a perfectly calibrated network, and truths drawn from its own probabilities."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, spread, (N, CLASSES))
    p = cf.probabilities(logits, 1.0, "softmax")
    truth = (p.cumsum(1) > rng.random((N, 1))).argmax(1)
    return logits, truth.astype(np.int64)


LOGITS, TRUTH = honest()


def head(int8: np.ndarray, fp32: np.ndarray = LOGITS) -> cf.Head:
    return cf.Head("grade", "softmax", fp32, int8, TRUTH)


# -- definitions ----------------------------------------------------------------------------------------------------


def test_calibration_error_by_hand() -> None:
    sure = np.array([0.1, 0.2, 0.8, 0.9])
    right = np.array([0.0, 1.0, 1.0, 1.0])
    # two bins: |.15 - .5| and |.85 - 1|, half of the mass each
    assert cf.expected_calibration_error(sure, right, bins=2) == pytest.approx(0.5 * 0.35 + 0.5 * 0.15)
    assert cf.expected_calibration_error(sure, right, bins=1) == pytest.approx(0.25)
    assert np.isnan(cf.expected_calibration_error(sure[:0], right[:0]))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=80))
def test_calibration_error_is_the_sum_over_bins(pairs: list[tuple[float, bool]]) -> None:
    sure, right = np.array([p[0] for p in pairs]), np.array([float(p[1]) for p in pairs])
    order = np.argsort(sure, kind="stable")
    count = min(cf.BINS, len(order))
    bounds = [b * len(order) // count for b in range(count + 1)]
    total = 0.0
    for a, b in itertools.pairwise(bounds):
        part = order[a:b]
        total += len(part) / len(order) * abs(sure[part].mean() - right[part].mean())
    found = cf.expected_calibration_error(sure, right)
    assert found == pytest.approx(total)
    assert 0 <= found <= 1


@pytest.mark.parametrize("true_temperature", [0.4, 1.0, 3.0])
def test_the_temperature_that_was_put_in_is_found(true_temperature: float) -> None:
    assert cf.fit_temperature(LOGITS * true_temperature, TRUTH, "softmax") == pytest.approx(true_temperature, rel=0.12)
    rng = np.random.default_rng(3)
    z = rng.normal(0, 2, 4000)
    yes = (rng.random(4000) < cf.probabilities(z, 1.0, "sigmoid")).astype(np.int64)
    assert cf.fit_temperature(z * true_temperature, yes, "sigmoid") == pytest.approx(true_temperature, rel=0.12)


def test_the_temperature_is_the_best_of_a_grid() -> None:
    found = cf.fit_temperature(LOGITS, TRUTH, "softmax")
    best = cf.negative_log_likelihood(LOGITS, TRUTH, found, "softmax")
    assert all(best <= cf.negative_log_likelihood(LOGITS, TRUTH, t, "softmax") + 1e-9 for t in np.geomspace(*cf.TEMPERATURES, 60))


@given(st.lists(st.integers(0, 30), min_size=1, max_size=100))
def test_no_patient_is_in_two_folds(groups: list[int]) -> None:
    g = np.array(groups)
    fold = folds(g, cf.SEED, cf.FOLDS)
    for patient in np.unique(g):
        assert len(np.unique(fold[g == patient])) == 1
    assert np.array_equal(fold, folds(g, cf.SEED, cf.FOLDS))


def test_chance_error_is_met_by_an_honest_network_and_not_by_another() -> None:
    """The 95th percentile is exceeded by one honest network in twenty."""
    met = []
    for seed in range(100):
        logits, truth = honest(seed)
        sure, right = cf.confidence_of(cf.probabilities(logits, 1.0, "softmax"), truth, "softmax")
        met.append(cf.expected_calibration_error(sure, right) <= cf.chance_error(sure, runs=100))
    assert 0.85 <= np.mean(met) < 1.0
    loud, right = cf.confidence_of(cf.probabilities(LOGITS * 4, 1.0, "softmax"), TRUTH, "softmax")
    assert cf.expected_calibration_error(loud, right) > 2 * cf.chance_error(loud)
    assert cf.chance_error(sure[:40]) > cf.chance_error(sure)  # few samples: more by chance


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 200), st.integers(0, 1000))
def test_the_conformal_threshold_is_the_order_statistic(n: int, seed: int) -> None:
    scores = np.random.default_rng(seed).random(n)
    threshold = cf.conformal_threshold(scores, 0.1)
    if n < 9:
        assert threshold == float("inf")
    else:
        assert (scores <= threshold).sum() == int(np.ceil((n + 1) * 0.9))


def test_conformal_sets_cover_what_they_promise() -> None:
    """Over many draws the coverage is .9 or a little more; a threshold one rank too low would be seen with few samples."""
    covered = []
    rng = np.random.default_rng(4)
    for _ in range(4000):
        scores = rng.random(12)
        covered.append(scores[11] <= cf.conformal_threshold(scores[:11], 0.1))
    assert 0.90 <= float(np.mean(covered)) <= 0.935  # 11 / 12 exactly
    found = cf.conformal(cf.probabilities(LOGITS, 1.0, "softmax"), TRUTH, GROUPS)
    assert found.low <= 0.9 <= found.high
    assert 1 <= found.mean_size < CLASSES


# -- the gate -------------------------------------------------------------------------------------------------------


def test_an_equal_engine_passes_and_its_temperature_is_kept() -> None:
    verdict = cf.confidence_gate([head(LOGITS)], GROUPS)
    assert verdict.passed is True, verdict.note
    assert verdict.details["temperatures"]["grade"] == pytest.approx(1.0, abs=0.1)
    assert verdict.details["outliers"]["passed"] is None
    assert verdict.limit is not None
    assert verdict.limit >= cf.ECE_LIMIT
    json.dumps(verdict.to_json(), allow_nan=False)


def test_an_engine_that_only_became_louder_is_mended_by_its_temperature() -> None:
    verdict = cf.confidence_gate([head(LOGITS * 3)], GROUPS)
    assert verdict.passed is True, verdict.note
    row = verdict.details["heads"][0]["int8"]
    assert row["temperature"] == pytest.approx(3.0, rel=0.1)
    assert row["ece_before"] > 3 * row["ece"]


def lying() -> np.ndarray:
    """Sure and wrong on a third of the answers, sure and right on the rest: no temperature mends both."""
    out = LOGITS.copy()
    wrong = np.random.default_rng(9).random(N) < 0.3
    out[wrong] = -LOGITS[wrong] * 5
    return out


def test_an_engine_that_no_temperature_mends_is_refused() -> None:
    """Fails if the limit of the error, the rise over FP32, or the out-of-fold rule is dropped."""
    verdict = cf.confidence_gate([head(lying())], GROUPS)
    assert verdict.passed is False
    assert "grade ECE" in verdict.note
    row = verdict.details["heads"][0]
    assert row["int8"]["ece"] > max(row["limit"], row["fp32"]["ece"] + cf.ECE_RISE)


def test_what_fp32_lacks_is_said_but_is_not_the_engines_fault() -> None:
    verdict = cf.confidence_gate([head(lying(), lying())], GROUPS)
    assert verdict.passed is True
    assert "FP32 is no better" in verdict.note


def test_a_second_head_can_refuse() -> None:
    rng = np.random.default_rng(6)
    z = rng.normal(0, 2, N)
    yes = (rng.random(N) < cf.probabilities(z, 1.0, "sigmoid")).astype(np.int64)
    fine = cf.Head("flag", "sigmoid", z, z * 1.5, yes)
    off = cf.Head("flag", "sigmoid", z, np.where(rng.random(N) < 0.4, -5 * z, z), yes)
    assert cf.confidence_gate([head(LOGITS), fine], GROUPS).passed is True
    refused = cf.confidence_gate([head(LOGITS), off], GROUPS)
    assert refused.passed is False
    assert "flag ECE" in refused.note


def test_coverage_outside_the_band_is_refused(monkeypatch: Any) -> None:
    """A threshold that is too low covers too little: the gate must see it."""
    right = cf.conformal_threshold
    monkeypatch.setattr(cf, "conformal_threshold", lambda scores, alpha=0.1: right(scores, 0.35))
    verdict = cf.confidence_gate([head(LOGITS)], GROUPS)
    assert verdict.passed is False
    assert "coverage" in verdict.note


def test_strangers_must_stay_strange() -> None:
    rng = np.random.default_rng(2)
    far = rng.normal(0, 0.1, (60, CLASSES)) - 8.0
    near = LOGITS[:60] + rng.normal(0, 0.1, (60, CLASSES))
    good = cf.confidence_gate([head(LOGITS)], GROUPS, (far, far))
    assert good.passed is True
    assert good.details["outliers"]["int8"] > 0.98
    assert good.details["outliers"]["reached"] is True
    blind = cf.confidence_gate([head(LOGITS)], GROUPS, (far, near))
    assert blind.passed is False
    assert "out-of-distribution" in blind.note
    both = cf.confidence_gate([head(LOGITS)], GROUPS, (near, near))
    assert both.passed is True  # FP32 cannot tell them either, and the note says so
    assert "AUROC" in both.note


def test_few_patients_are_not_judged() -> None:
    few = GROUPS < cf.LEAST_PATIENTS - 1
    small = cf.Head("grade", "softmax", LOGITS[few], LOGITS[few], TRUTH[few])
    verdict = cf.confidence_gate([small], GROUPS[few])
    assert verdict.passed is None
    assert cf.confidence_gate([], GROUPS).passed is None
    with pytest.raises(ValueError, match="too few"):
        cf.calibrate("grade", LOGITS[few], TRUTH[few], GROUPS[few], "softmax")


def test_the_gate_gives_the_same_answer_twice() -> None:
    assert cf.confidence_gate([head(LOGITS * 2)], GROUPS) == cf.confidence_gate([head(LOGITS * 2)], GROUPS)


# -- what is recorded for a reader ------------------------------------------------------------------------------------


def test_bins_by_hand() -> None:
    """Two answers of about a quarter, one right; three of one, all right; nothing in between, so no bin."""
    found = cf.reliability(np.array([0.22, 1.0, 0.28, 1.0, 1.0]), np.array([0.0, 1.0, 1.0, 1.0, 1.0]))
    assert [(b.count, b.confidence, b.observed) for b in found] == [(2, 0.25, 0.5), (3, 1.0, 1.0)]
    # Wilson by hand: 1 of 2 is 0.5 -+ z sqrt(1/8 + z^2/16) / (1 + z^2/2); 3 of 3 reaches down to 3 / (3 + z^2).
    assert (found[0].low, found[0].high) == (pytest.approx(0.0945, abs=1e-4), pytest.approx(0.9055, abs=1e-4))
    assert (found[1].low, found[1].high) == (pytest.approx(0.4385, abs=1e-4), 1.0)
    assert cf.reliability(np.zeros(0), np.zeros(0)) == ()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=80))
def test_bins_hold_every_answer_once_and_in_order(pairs: list[tuple[float, bool]]) -> None:
    sure, right = np.array([p[0] for p in pairs]), np.array([float(p[1]) for p in pairs])
    found = cf.reliability(sure, right)
    assert sum(b.count for b in found) == len(pairs)
    assert sum(b.count * b.observed for b in found) == pytest.approx(right.sum(), abs=1e-4 * len(pairs))
    assert [b.confidence for b in found] == sorted(b.confidence for b in found)
    for b in found:
        assert 0 <= b.low <= b.observed <= b.high <= 1


def test_the_record_has_the_bins_before_and_after_the_temperature() -> None:
    """Logits that are three times too loud: sure before, as sure as it is right after; each interval holds its own value."""
    verdict = cf.confidence_gate([head(LOGITS * 3)], GROUPS, samples="discs")
    row = verdict.details["heads"][0]
    assert verdict.details["samples"] == "discs"
    assert row["kind"] == "softmax"
    before, after = row["bins"]["before"], row["bins"]["after"]
    assert sum(b["count"] for b in before) == sum(b["count"] for b in after) == N
    assert before[-1]["count"] > 2 * after[-1]["count"]

    def off(bins: list[dict[str, Any]]) -> float:
        return sum(b["count"] * abs(b["confidence"] - b["observed"]) for b in bins) / N

    assert off(before) > 3 * off(after)
    for who in ("fp32", "int8"):
        assert row[who]["ece_before_low"] <= row[who]["ece_before"] <= row[who]["ece_before_high"]
        assert 0 <= row[who]["low"] <= row[who]["ece"] <= row[who]["high"]
    json.dumps(verdict.to_json(), allow_nan=False)


def test_an_interval_lies_around_its_error_and_not_above_it() -> None:
    """Drawing patients twice adds noise, and an error without sign adds it up: the plain interval of an honest network lies too high."""
    sure, right = cf.confidence_of(cf.probabilities(LOGITS, 1.0, "softmax"), TRUTH, "softmax")
    error = cf.expected_calibration_error(sure, right)
    over = lambda i: cf.expected_calibration_error(sure[i], right[i])  # noqa: E731
    plain, moved = cf._interval(GROUPS, over), cf._centred(error, GROUPS, over)
    assert np.mean(plain) > error + 0.005
    assert np.mean(moved) == pytest.approx(error, abs=0.006)
    assert cf._centred(0.0, GROUPS, over)[0] == 0.0


# -- fitted on other patients -----------------------------------------------------------------------------------------


def fitting(logits: np.ndarray | None = None, truth: np.ndarray | None = None, groups: np.ndarray = GROUPS + PATIENTS) -> cf.Fitting:
    """Answers about other patients, as an honest network gives them; or `logits` in their place."""
    z, t = honest(77)
    return cf.Fitting({"grade": (z if logits is None else logits, t if truth is None else truth)}, groups, "folds", "f" * 64)


def test_temperatures_and_threshold_come_from_the_others_alone() -> None:
    """Networks twice as loud elsewhere: T is 2 whatever the engine here would like, and the threshold is theirs for both engines."""
    z, t = honest(77)
    found = cf.confidence_gate([head(LOGITS * 2.0, LOGITS * 2.1)], GROUPS, fitting=fitting(2 * z))
    assert found.passed is True, found.note
    row = found.details["heads"][0]
    assert found.details["temperatures"]["grade"] == row["int8"]["temperature"] == row["fp32"]["temperature"]
    assert row["int8"]["temperature"] == pytest.approx(cf.fit_temperature(2 * z, t, "softmax"), abs=1e-4)
    sets = found.details["conformal"]
    p = cf.out_of_fold(2 * z, t, GROUPS, "softmax")
    assert sets["int8"]["threshold"] == sets["fp32"]["threshold"] == cf.conformal_threshold(1 - p[np.arange(N), t])
    assert found.details["fitted_on"] == {"who": "training", "samples": N, "patients": PATIENTS, "source": "folds", "sha256": "f" * 64}
    # The bins and the error are those of that temperature on these patients.
    sure, right = cf.confidence_of(cf.probabilities(LOGITS * 2, row["int8"]["temperature"], "softmax"), TRUTH, "softmax")
    assert row["int8"]["ece"] == pytest.approx(cf.expected_calibration_error(sure, right), abs=1e-4)
    assert sum(b["count"] * b["confidence"] for b in row["bins"]["after"]) == pytest.approx(sure.sum(), abs=0.1)
    json.dumps(found.to_json(), allow_nan=False)


def test_no_judged_patient_sets_anything() -> None:
    """Other truths for the judged patients change how they are judged, and nothing that ships."""
    other = cf.Head("grade", "softmax", LOGITS, LOGITS, np.roll(TRUTH, 1))
    a, b = (cf.confidence_gate([h], GROUPS, fitting=fitting()).details for h in (head(LOGITS), other))
    assert a["temperatures"] == b["temperatures"]
    assert a["conformal"]["int8"]["threshold"] == b["conformal"]["int8"]["threshold"]
    assert a["conformal"]["int8"]["coverage"] != b["conformal"]["int8"]["coverage"]
    assert a["heads"][0]["best_here"] != b["heads"][0]["best_here"]
    apart = cf.confidence_gate([head(LOGITS)], GROUPS)
    assert apart.details["fitted_on"] == {"who": "judged", "samples": N, "patients": PATIENTS}
    assert "best_here" not in apart.details["heads"][0]


def test_a_patient_is_fitted_on_or_judged() -> None:
    groups = GROUPS + PATIENTS
    groups[groups == 2 * PATIENTS - 1] = 3
    with pytest.raises(CalibrationLeaks, match="fitted on and judged") as caught:
        cf.confidence_gate([head(LOGITS)], GROUPS, fitting=fitting(groups=groups))
    assert caught.value.value == "3"
    with pytest.raises(ValueError, match="fit flag on"):
        cf.confidence_gate([head(LOGITS), cf.Head("flag", "sigmoid", LOGITS[:, 0], LOGITS[:, 0], TRUTH % 2)], GROUPS, fitting=fitting())


def test_an_engine_that_became_louder_is_not_mended_by_a_temperature_of_its_own() -> None:
    verdict = cf.confidence_gate([head(LOGITS * 3)], GROUPS, fitting=fitting())
    assert verdict.passed is False
    assert "grade ECE" in verdict.note
    row = verdict.details["heads"][0]
    assert row["best_here"]["int8"] == pytest.approx(3.0, rel=0.1)
    assert row["int8"]["temperature"] == pytest.approx(1.0, rel=0.15)


def test_worse_than_fp32_by_more_than_chance_is_refused_below_the_limit_too(monkeypatch: Any) -> None:
    """Few discs give a limit that hides much; that the same discs are off more in INT8 is seen all the same."""
    monkeypatch.setattr(cf, "ECE_LIMIT", 0.5)
    monkeypatch.setattr(cf, "COVERAGE", (0.0, 1.0))
    verdict = cf.confidence_gate([head(LOGITS * 2)], GROUPS, fitting=fitting())
    row = verdict.details["heads"][0]
    assert row["int8"]["ece"] < row["limit"]
    assert row["rise"]["value"] == pytest.approx(row["int8"]["ece"] - row["fp32"]["ece"], abs=0.03)
    assert row["rise"]["value"] > cf.ECE_RISE
    assert 0 < row["rise"]["low"] <= row["rise"]["value"] <= row["rise"]["high"]
    assert verdict.passed is False
    assert verdict.note == f"grade ECE {row['int8']['ece']:.3f}, {row['rise']['value']:.3f} above FP32's on the same answers"
    # The same by no more than chance: the rise is there, its interval reaches below nothing.
    monkeypatch.setattr(cf, "rise", lambda *_: (0.05, -0.01, 0.1))
    assert cf.confidence_gate([head(LOGITS * 2)], GROUPS, fitting=fitting()).passed is True
    # Above nothing but small: no more than is allowed.
    monkeypatch.setattr(cf, "rise", lambda *_: (0.01, 0.005, 0.02))
    assert cf.confidence_gate([head(LOGITS * 1.02)], GROUPS, fitting=fitting()).passed is True


@pytest.mark.parametrize("seed", [127, 45, 88])
def test_rounding_noise_is_not_refused_although_fp32_is_off_too(seed: int, monkeypatch: Any) -> None:
    """In bins of its own a tenth of a logit looks like two points and more, which such draws show: answers change places."""
    monkeypatch.setattr(cf, "COVERAGE", (0.0, 1.0))
    noisy = 1.5 * LOGITS + np.random.default_rng(seed).normal(0, 0.1, LOGITS.shape)
    verdict = cf.confidence_gate([head(noisy, 1.5 * LOGITS)], GROUPS, fitting=fitting())
    row = verdict.details["heads"][0]
    assert row["int8"]["ece"] > row["limit"]
    assert row["int8"]["ece"] - row["fp32"]["ece"] > cf.ECE_RISE
    assert abs(row["rise"]["value"]) < 0.015
    assert verdict.passed is True, verdict.note


def test_the_rise_by_hand() -> None:
    """In every bin half had it; FP32 gave one half and INT8 gave all. An engine has no rise over itself."""
    truth = np.array([0, 1] * 30)
    flat, sure = np.zeros(60), np.full(60, 20.0)
    fitted = (np.array([1.0, 1.0, 1.0, -1.0] * 9), np.array([1, 1, 0, 0] * 9))
    value, low, high = cf.rise(cf.Head("flag", "sigmoid", flat, sure, truth), np.repeat(np.arange(30), 2), fitted)
    assert value == pytest.approx(0.5, abs=1e-3)
    assert low <= value <= high
    assert cf.rise(cf.Head("flag", "sigmoid", sure, sure, truth), np.repeat(np.arange(30), 2), fitted) == (0.0, 0.0, 0.0)


def test_a_broken_promise_of_coverage_is_refused_whoever_broke_it() -> None:
    """Patients whom networks know by heart give sets that hold too little here, in FP32 as well."""
    z, t = honest(77)
    heart = np.where(np.arange(CLASSES) == t[:, None], 8.0, 0.0) + 0.3 * z
    verdict = cf.confidence_gate([head(LOGITS)], GROUPS, fitting=fitting(heart))
    assert verdict.details["conformal"]["fp32"]["high"] < cf.COVERAGE[0]
    assert verdict.passed is False
    assert "coverage" in verdict.note


def test_too_much_coverage_is_the_engines_fault_only_where_fp32_keeps_to_it() -> None:
    """Networks that were worse elsewhere give wide sets here: said, not refused; where INT8 alone is wide, refused."""
    z, _ = honest(77)
    worse = np.where(np.random.default_rng(1).random((N, 1)) < 0.35, np.roll(z, 1, axis=1), z)
    wide = cf.confidence_gate([head(LOGITS)], GROUPS, fitting=fitting(worse))
    assert wide.details["conformal"]["int8"]["low"] > cf.COVERAGE[1]
    assert wide.passed is True, wide.note
    assert "FP32 is no better: " in wide.note
    assert "coverage" in wide.note
    sharper = np.where(np.arange(CLASSES) == TRUTH[:, None], LOGITS.max(1, keepdims=True) + 0.1, LOGITS)
    alone = cf.confidence_gate([head(sharper)], GROUPS, fitting=fitting())
    assert alone.details["conformal"]["int8"]["low"] > cf.COVERAGE[1]
    assert alone.details["conformal"]["fp32"]["low"] <= cf.COVERAGE[1]
    assert alone.passed is False
    assert "coverage" in alone.note


def test_the_graders_columns_are_its_heads() -> None:
    z, truth = np.arange(16.0).reshape(2, 8), np.array([[1, 0, 1, 0], [5, 1, 0, 1]])
    found = cf.grader_fitting(known.Known(z.astype(np.float32), truth, np.array([4, 9]), "folds", "ab"))
    assert list(found.heads) == ["pfirrmann", "herniation", "narrowing", "bulging"]
    assert found.heads["pfirrmann"][0].tolist() == z[:, :5].tolist()
    assert found.heads["pfirrmann"][1].tolist() == [0, 4]
    assert (found.heads["narrowing"][0].tolist(), found.heads["narrowing"][1].tolist()) == ([6.0, 14.0], [1, 0])
    assert (found.groups.tolist(), found.source, found.sha256) == ([4, 9], "folds", "ab")


def test_the_record_refuses_nobody() -> None:
    """What is said for a reader has no part in the verdict."""
    plain = cf.confidence_gate([head(lying())], GROUPS)
    told = cf.confidence_gate([head(lying())], GROUPS, samples="discs")
    assert (plain.passed, plain.note, plain.value) == (told.passed, told.note, told.value)
