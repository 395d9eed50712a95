"""Time is asked of the deadline only, and the ladder gives the richest rung that fits."""

from __future__ import annotations

import itertools
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance import budget
from appliance.budget import BRINGS, PARTS, RUNGS, SHED, Budget, Deadline, Wanted, choose_rung
from appliance.errors import UsageError

EXPECTED = {"full": 120.0, "no-heatmap": 100.0, "detection-only": 40.0}


@pytest.mark.parametrize(
    ("left_ms", "rung"),
    [(500.0, "full"), (120.0, "full"), (119.9, "no-heatmap"), (100.0, "no-heatmap"), (99.0, "detection-only"), (40.0, "detection-only"),
     (39.9, None), (0.0, None), (-5.0, None)],
)  # fmt: skip
def test_the_richest_rung_that_fits(left_ms: float, rung: str | None) -> None:
    assert choose_rung(left_ms, EXPECTED) == rung


ms = st.floats(0, 1e5, allow_nan=False)


@given(ms, ms, st.tuples(ms, ms, ms))
def test_more_time_never_gives_less(left: float, more: float, times: tuple[float, float, float]) -> None:
    expected = dict(zip(RUNGS, times, strict=True))
    first, second = choose_rung(left, expected), choose_rung(left + more, expected)
    if first is not None:
        assert second is not None
        assert RUNGS.index(second) <= RUNGS.index(first)
        assert expected[first] <= left


def test_each_rung_sheds_more_than_the_one_above_and_detection_never() -> None:
    assert set(SHED) == set(RUNGS)
    for above, below in itertools.pairwise(RUNGS):
        assert set(SHED[above]) < set(SHED[below])
    assert SHED[RUNGS[0]] == ()
    assert not any("detect" in what for shed in SHED.values() for what in shed)


@pytest.mark.parametrize("total_ms", [0.0, -1.0, 600_001.0, float("nan"), float("inf")])
def test_a_budget_has_limits(total_ms: float) -> None:
    with pytest.raises(ValueError, match="total_ms"):
        Budget(total_ms)


@pytest.mark.parametrize("total_ms", [0.001, 600_000.0])
def test_the_limits_themselves_are_allowed(total_ms: float) -> None:
    assert Budget(total_ms).total_ms == total_ms


def test_a_deadline_runs_on_the_monotonic_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(budget.time, "monotonic", lambda: now)
    deadline = Deadline(Budget(250.0), started_s=999.9)
    assert deadline.elapsed_ms() == pytest.approx(100.0)
    assert deadline.left_ms() == pytest.approx(150.0)
    now = 1001.0
    assert deadline.left_ms() == pytest.approx(-850.0)
    monkeypatch.setattr(budget.time, "time", lambda: 0.0)
    assert deadline.left_ms() == pytest.approx(-850.0)


def test_a_started_budget_counts_from_now() -> None:
    before = time.monotonic()
    deadline = Budget(1000.0).start()
    assert before <= deadline.started_s <= time.monotonic()
    assert 0 < deadline.left_ms() <= 1000.0


@pytest.mark.parametrize(
    ("must", "may", "rungs"),
    [
        (None, None, RUNGS),
        ((), None, RUNGS),
        (None, (), ("detection-only",)),
        (("detect",), ("segment",), ("no-heatmap", "detection-only")),
        (("segment",), (), ("no-heatmap",)),
        (("segment",), ("heatmap",), ("full", "no-heatmap")),
        (("heatmap",), (), ("full",)),
        (None, ("heatmap",), RUNGS),  # a heatmap lies over outlines
    ],
)
def test_what_is_wanted_as_rungs(must: tuple[str, ...] | None, may: tuple[str, ...] | None, rungs: tuple[str, ...]) -> None:
    assert Wanted.of(must, may).rungs() == rungs


@given(st.sets(st.sampled_from(PARTS)), st.sets(st.sampled_from(PARTS)))
def test_every_wish_has_a_rung_with_all_that_must_be_and_nothing_that_may_not(must: set[str], may: set[str]) -> None:
    wanted = Wanted.of(must, may)
    found = wanted.rungs()
    assert found
    assert list(found) == [r for r in RUNGS if r in found]
    for rung in found:
        assert must <= set(BRINGS[rung])
        if "heatmap" not in must | may:
            assert set(BRINGS[rung]) <= {"detect"} | must | may


def test_a_part_that_there_is_not_is_named() -> None:
    with pytest.raises(UsageError, match="no such part") as caught:
        Wanted.of(("masks",), None)
    assert caught.value.value == "masks"
