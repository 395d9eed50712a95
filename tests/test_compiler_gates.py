"""The gates over numbers: what refuses, what passes, what is not proven; each limit fails a test when it is weakened."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from appliance.compiler import gates
from appliance.compiler.verdict import refusals
from kernels.compare import NOWHERE, decided, distance, overlap
from models.evaluate import Scores

PATIENTS, EACH = 40, 6


def scores(right: np.ndarray, name: str = "accuracy") -> Scores:
    out = Scores(name, source="synthetic")
    groups = np.repeat(np.arange(len(right) // EACH), EACH)
    out.add(name, list(groups), lambda i: float(right[i].mean()) if len(right) else float("nan"))
    return out


def with_wrong(wrong: list[int], size: int = PATIENTS * EACH) -> Scores:
    right = np.ones(size)
    right[wrong] = 0.0
    return scores(right)


FP32 = with_wrong([])


# -- task -----------------------------------------------------------------------------------------------------------


def test_an_equal_engine_passes_and_is_proven() -> None:
    verdict = gates.task_gate(FP32, with_wrong([]), 0.01)
    assert verdict.passed is True
    assert (verdict.value, verdict.low, verdict.high) == (0.0, 0.0, 0.0)
    assert verdict.details["proven"] is True


def test_a_drop_above_the_limit_is_refused_though_the_interval_reaches_below() -> None:
    """One patient of forty is lost: 2.5 points, but some resamples do not hold that patient."""
    verdict = gates.task_gate(FP32, with_wrong(list(range(EACH))), 0.01)
    assert verdict.value == pytest.approx(0.025)
    assert verdict.low is not None
    assert verdict.low <= 0.01
    assert verdict.passed is False
    assert "above the limit" in verdict.note


def test_a_drop_with_confidence_says_so() -> None:
    verdict = gates.task_gate(FP32, with_wrong(list(range(0, PATIENTS * EACH, 4))), 0.01)
    assert verdict.passed is False
    assert "with confidence" in verdict.note
    assert refusals([verdict])[0].startswith("task gate: accuracy fell by 25.00 points")


def test_an_interval_that_reaches_above_the_limit_passes_but_is_not_proven() -> None:
    straddles = with_wrong([0, 1])  # 0.83 points, all in one patient
    verdict = gates.task_gate(FP32, straddles, 0.01)
    assert verdict.value == pytest.approx(2 / 240)
    assert verdict.high is not None
    assert verdict.high > 0.01
    assert verdict.passed is True
    assert verdict.details["proven"] is False
    assert "not proven" in verdict.note
    strict = gates.task_gate(FP32, straddles, 0.01, strict=True)
    assert strict.passed is False
    assert gates.task_gate(FP32, with_wrong([]), 0.01, strict=True).passed is True


def test_the_limit_is_the_limit() -> None:
    lost = with_wrong(list(range(EACH)))
    assert gates.task_gate(FP32, lost, 0.0249).passed is False
    assert gates.task_gate(FP32, lost, 0.0251).passed is True


def test_an_engine_that_is_better_passes() -> None:
    verdict = gates.task_gate(with_wrong(list(range(0, 60, 4))), FP32, 0.0)
    assert verdict.passed is True
    assert verdict.value is not None
    assert verdict.value < 0


def test_pairing_matters() -> None:
    """Both networks fail the same patients: unpaired, the interval would be wide; paired it is nothing."""
    same = with_wrong(list(range(60)))
    verdict = gates.task_gate(same, with_wrong(list(range(60))), 0.01)
    assert (verdict.low, verdict.high) == (0.0, 0.0)
    assert same["accuracy"].high - same["accuracy"].low > 0.1


def test_what_cannot_be_measured_is_not_judged() -> None:
    empty = Scores("accuracy")
    with pytest.warns(RuntimeWarning):
        empty.add("accuracy", [1, 1], lambda i: float("nan"))
    verdict = gates.task_gate(empty, empty, 0.01)
    assert verdict.passed is None
    with pytest.raises(ValueError, match="same samples"):
        gates.task_gate(FP32, with_wrong([], 60), 0.01)


@settings(max_examples=25, deadline=None)
@given(st.sets(st.integers(0, 59), max_size=20), st.sets(st.integers(0, 59), max_size=20), st.floats(0, 0.2))
def test_the_verdict_is_what_the_definition_says(a: set[int], b: set[int], limit: float) -> None:
    verdict = gates.task_gate(with_wrong(sorted(a), 60), with_wrong(sorted(b), 60), limit)
    assert verdict.value is not None
    assert verdict.low is not None
    assert verdict.high is not None
    assert verdict.passed is not (verdict.value > limit or verdict.low > limit)
    assert verdict.details["proven"] is (verdict.high <= limit)
    json.dumps(verdict.to_json(), allow_nan=False)


# -- distances and parity -------------------------------------------------------------------------------------------


def test_distance_by_hand() -> None:
    d = distance(np.array([0.0, 3.0, 4.0]), np.array([0.0, 3.0, 3.5]))
    assert d.sqnr_db == pytest.approx(20.0)  # 25 against .25
    assert d.max_share == pytest.approx(0.5 / 4)
    assert d.rms_share == pytest.approx(np.sqrt(0.25 / 3) / 4)
    assert d.cosine == pytest.approx((9 + 14) / (5 * np.sqrt(9 + 12.25)))


@pytest.mark.parametrize(
    ("a", "b"),
    [(np.ones(3), np.ones(4)), (np.ones(3), np.array([1, np.nan, 1])), (np.array([np.inf]), np.ones(1)), (np.ones(0), np.ones(0))],
    ids=["shape", "NaN", "infinite", "empty"],
)
def test_what_cannot_be_compared_is_nowhere_near(a: np.ndarray, b: np.ndarray) -> None:
    assert distance(a, b) == NOWHERE


@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=20))
def test_an_array_is_no_distance_from_itself(values: list[float]) -> None:
    d = distance(np.array(values, np.float32), np.array(values, np.float32))
    assert d.max_share == d.rms_share == 0.0
    assert d.sqnr_db == float("inf")
    assert d.cosine == pytest.approx(1.0)


INPUTS = [np.random.default_rng(i).normal(0, 1, (1, 3, 8, 8)).astype(np.float32) for i in range(6)]
REFERENCE = [{"map": x * 4, "logits": x.mean((2, 3)) * 8} for x in INPUTS]


def near(share: float, seed: int = 0) -> list[dict[str, np.ndarray]]:
    """Noise of `share` of each output's standard deviation."""
    rng = np.random.default_rng(seed)
    return [
        {k: (v + share * v.std() * rng.normal(0, 1, v.shape)).astype(np.float32) if k == "map" else v for k, v in r.items()}
        for r in REFERENCE
    ]


@pytest.mark.parametrize(("precision", "good", "bad"), [("f32", 1e-5, 3e-3), ("fp16", 1e-3, 0.06), ("bf16", 0.01, 0.2), ("int8", 0.1, 0.6)])
def test_each_precision_has_its_own_bound(precision: str, good: float, bad: float) -> None:
    targets = {"a": near(good), "b": REFERENCE}
    verdict = gates.parity(targets, REFERENCE, {"a": precision, "b": "f32"})
    assert verdict.passed is True, verdict.note
    refused = gates.parity({**targets, "a": near(bad)}, REFERENCE, {"a": precision, "b": "f32"})
    assert refused.passed is False
    assert refused.note.startswith("beyond bounds: a map")
    json.dumps(refused.to_json(), allow_nan=False)


SPOILT: dict[str, Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]] = {
    "missing output": lambda r: {"map": r["map"]},
    "not a number": lambda r: {**r, "logits": r["logits"] * np.float32(np.nan)},
    "transposed": lambda r: {**r, "map": np.moveaxis(r["map"], 1, -1)},
    "channels swapped": lambda r: {**r, "map": r["map"][:, ::-1]},
}


@pytest.mark.parametrize("name", SPOILT)
def test_one_wrong_input_refuses_the_target(name: str) -> None:
    answers = [*REFERENCE[:-1], SPOILT[name](REFERENCE[-1])]
    verdict = gates.parity({"x": answers}, REFERENCE, {"x": "int8"})
    assert verdict.passed is False
    json.dumps(verdict.to_json(), allow_nan=False)


class _Channel:
    """Reads channel 1 of `map`, whatever is asked."""

    def samples(self):
        return ()

    def target(self, outputs):
        return 1

    def map(self, outputs, target):
        return outputs["map"][0, target]

    def score(self, outputs, target):
        return 0.5


def test_a_heatmap_that_moved_is_refused_though_the_numbers_are_near() -> None:
    smooth = np.zeros((1, 3, 8, 8), np.float32)
    smooth[0, 1] = np.add.outer(np.arange(8.0), np.arange(8.0)) / 14
    smooth[0, 0, 0] = 60.0  # another channel carries nearly all of the energy
    moved = smooth.copy()
    moved[0, 1] = moved[0, 1, ::-1, ::-1]
    reference, answers = [{"map": smooth}] * 3, {"x": [{"map": moved}] * 3}
    assert gates.parity(answers, reference, {"x": "int8"}).passed is True
    verdict = gates.parity(answers, reference, {"x": "int8"}, explainer=_Channel(), input_hw=(128, 128))
    assert verdict.passed is False
    assert "heatmap" in verdict.note
    same = gates.parity({"x": reference}, reference, {"x": "f32"}, explainer=_Channel(), input_hw=(128, 128))
    assert same.passed is True


def _page(edge: int) -> dict[str, np.ndarray]:
    mask = np.full((1, 1, 64, 64), 0.001, np.float32)
    mask[..., 8:40, 8:edge] = 0.999
    return {"mask": mask}


def test_a_map_of_yes_and_no_is_held_to_overlap() -> None:
    verdict = gates.parity({"x": [_page(52)]}, [_page(48)], {"x": "int8"})  # a tenth more: one difference is the whole range
    found = verdict.details["targets"]["x"]["outputs"]["mask"]
    assert verdict.passed is True
    assert found["max_share"] > 0.9
    assert found["overlap"] == pytest.approx(2 * 40 / (40 + 44), abs=1e-6)
    assert gates.parity({"x": [_page(58)]}, [_page(48)], {"x": "int8"}).passed is False
    assert gates.parity({"x": [_page(49)]}, [_page(48)], {"x": "f32"}).passed is False
    assert gates.parity({"x": [{"mask": np.full((1, 1, 64, 64), np.nan, np.float32)}]}, [_page(48)], {"x": "int8"}).passed is False


@pytest.mark.parametrize(
    ("values", "is_one"),
    [
        (_page(48)["mask"], True),
        (_page(48)["mask"] * 2 - 1, False),  # logits
        (_page(48)["mask"] * 0.4, False),  # nothing above one half
        (np.linspace(0, 1, 4096, dtype=np.float32), False),
        (np.array([0.0, 1.0], np.float32), False),
    ],
)
def test_what_is_a_map_of_yes_and_no(values: np.ndarray, is_one: bool) -> None:
    assert decided(values) is is_one
    assert overlap(values, values) == 1.0
    assert overlap(values, values[..., :1]) == 0.0


def test_parity_of_nothing_is_not_judged_and_counts_must_agree() -> None:
    assert gates.parity({}, REFERENCE, {}).passed is None
    with pytest.raises(ValueError, match="answered 5"):
        gates.parity({"x": REFERENCE[:-1]}, REFERENCE, {"x": "int8"})


# -- latency --------------------------------------------------------------------------------------------------------


def test_a_percentile_that_the_runs_cannot_carry_is_not_given() -> None:
    def run(feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return feed

    short = gates.latency_profile(run, {}, lambda: run, runs=50, cold_runs=2)
    assert short["warm"]["runs"] == 50
    assert short["warm"]["latency_ms_p50"] <= short["warm"]["latency_ms_max"]
    assert short["warm"]["latency_ms_p99"] is None
    long = gates.latency_profile(run, {}, lambda: run, runs=1000, cold_runs=2)
    assert long["warm"]["latency_ms_p50"] <= long["warm"]["latency_ms_p99"] <= long["warm"]["latency_ms_p99_9"]
    assert long["cold"]["latency_ms_p99"] is None
    hundred = gates.latency_profile(run, {}, lambda: run, runs=100, cold_runs=1)
    assert hundred["warm"]["latency_ms_p99"] is not None
    assert hundred["warm"]["latency_ms_p99_9"] is None


def test_cold_counts_the_opening_and_warm_does_not() -> None:
    import time

    opened = []

    def slow_open():
        time.sleep(0.02)
        opened.append(1)
        return lambda feed: {}

    found = gates.latency_profile(lambda feed: {}, {}, slow_open, runs=5, cold_runs=3)
    assert len(opened) == 3
    assert found["cold"]["latency_ms_p50"] >= 20
    assert found["cold_first_run"]["latency_ms_p50"] < 15
    with pytest.raises(ValueError, match="at least one run"):
        gates.latency_profile(lambda feed: {}, {}, slow_open, runs=0)
