"""The plan of one device: who is admitted is answered in time, at the richest rung that leaves the others in time, and nobody waits
for ever. Time is an argument, so every run here is a simulation without a clock."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from appliance.schedule import MOST_QUEUED, ROOM, Plan, Rung, Work

LADDER = (Rung("full", 60.0), Rung("no-heatmap", 45.0), Rung("detection-only", 18.0))


def work(number: int, deadline_ms: float, rungs: Sequence[Rung] = LADDER) -> Work:
    return Work(number, deadline_ms / 1e3, tuple(rungs))


# -- admission ------------------------------------------------------------------------------------------------------


def test_an_empty_device_takes_what_fits_and_says_when_it_is_done() -> None:
    verdict = Plan().admit(work(1, 18.0), 0.0)
    assert verdict.admitted
    assert verdict.predicted_ms == pytest.approx(18.0)


def test_what_cannot_be_ready_is_refused_with_the_numbers() -> None:
    plan = Plan()
    verdict = plan.admit(work(1, 17.0), 0.0)
    assert not verdict.admitted
    assert verdict.predicted_ms == pytest.approx(18.0)
    assert verdict.retry_after_ms > 0
    assert "in time" in verdict.reason
    assert len(plan) == 0


def test_what_runs_now_is_counted() -> None:
    plan = Plan()
    plan.busy_until(0.030)
    assert not plan.admit(work(1, 40.0), 0.0).admitted
    assert plan.admit(work(1, 48.0), 0.0).admitted


def test_an_urgent_request_that_would_make_another_late_is_refused_for_the_others_sake() -> None:
    plan = Plan()
    assert plan.admit(work(1, 20.0), 0.0).admitted
    verdict = plan.admit(work(2, 19.0), 0.0)
    assert not verdict.admitted
    assert "others" in verdict.reason
    assert [w.number for w in plan] == [1]


def test_waiting_as_long_as_told_makes_the_same_request_feasible() -> None:
    plan = Plan()
    for i in range(3):
        assert plan.admit(work(i, 60.0), 0.0).admitted
    verdict = plan.admit(work(9, 60.0), 0.0)
    assert not verdict.admitted
    later_s = verdict.retry_after_ms / 1e3
    # The device went through its queue at the poorest rung meanwhile.
    done_s, now_s = 0.0, 0.0
    while done_s <= later_s and len(plan):
        taken = plan.take(now_s)
        assert taken is not None
        done_s = now_s = now_s + 0.018
    plan.busy_until(done_s)
    assert plan.admit(work(9, later_s * 1e3 + 60.0), later_s).admitted


def test_the_queue_has_a_limit() -> None:
    plan = Plan(most_queued=2)
    assert plan.admit(work(1, 1e6), 0.0).admitted
    assert plan.admit(work(2, 1e6), 0.0).admitted
    verdict = plan.admit(work(3, 1e6), 0.0)
    assert not verdict.admitted
    assert verdict.reason == "the queue is full"
    assert MOST_QUEUED >= 64


@pytest.mark.parametrize("rungs", [(), (Rung("x", math.nan),), (Rung("x", math.inf),), (Rung("x", -1.0),)])
def test_work_needs_rungs_with_costs(rungs: tuple[Rung, ...]) -> None:
    with pytest.raises(ValueError, match="rungs with finite costs"):
        Work(1, 1.0, rungs)


# -- dispatch -------------------------------------------------------------------------------------------------------


def test_the_most_urgent_goes_first_and_equals_in_the_order_of_arrival() -> None:
    plan = Plan()
    for number, deadline in ((1, 900.0), (2, 300.0), (3, 600.0), (4, 300.0)):
        assert plan.admit(work(number, deadline), 0.0).admitted
    order = []
    while (taken := plan.take(0.0)) is not None:
        order.append(taken[0].number)
    assert order == [2, 4, 3, 1]


def test_the_richest_rung_that_leaves_the_others_in_time_and_room_for_more() -> None:
    room = ROOM * 18.0

    def given(own_ms: float, other_ms: float, now_s: float = 0.0) -> Rung | None:
        plan = Plan()
        plan.admit(work(1, other_ms), 0.0)
        plan.admit(work(2, own_ms), 0.0)
        taken = plan.take(now_s)
        assert taken is not None
        assert taken[0].number == 2
        return taken[1]

    assert given(70.0, 60.0 + 18.0 + room) == LADDER[0]
    assert given(70.0, 60.0 + 17.9 + room) == LADDER[1]
    assert given(70.0, 45.0 + 17.9 + room) == LADDER[2]
    assert given(50.0, 1000.0) == LADDER[1]  # its own time
    assert given(500.0, 600.0, now_s=0.450) == LADDER[1]
    assert given(70.0, 18.0 + 70.0) == LADDER[2]  # the poorest needs no room: who is admitted is answered


def test_work_that_is_on_its_way_has_a_place() -> None:
    plan = Plan()
    assert plan.announce(work(1, 30.0), 0.0, until_s=0.2).admitted
    assert (len(plan), plan.take(0.0)) == (0, None)  # it has not come yet
    rungs = (Rung("more", 13.0), Rung("least", 1.0))
    assert plan.richest(rungs, 1.0, 0.0) == rungs[1]  # 13 + 18 > 30
    refused = plan.admit(work(2, 30.0), 0.0)
    assert (refused.admitted, refused.predicted_ms) == (False, 36.0)
    assert not plan.announce(work(3, 30.0), 0.0, until_s=0.2).admitted
    assert plan.withdraw(1)
    assert plan.admit(work(1, 30.0), 0.0).admitted  # come


def test_a_place_is_kept_for_a_while_only() -> None:
    plan = Plan(most_queued=2)
    for number in (1, 2):
        assert plan.announce(work(number, 1000.0), 0.0, until_s=0.2).admitted
    assert plan.admit(work(3, 1000.0), 0.1).reason == "the queue is full"
    assert plan.admit(work(3, 1000.0), 0.2).admitted
    assert not plan.withdraw(1)


def test_work_that_became_hopeless_is_not_started() -> None:
    plan = Plan()
    plan.admit(work(1, 50.0), 0.0)
    assert plan.take(0.040) == (work(1, 50.0), None)
    assert plan.take(0.040) is None


def test_between_stages_what_remains_is_asked_again() -> None:
    plan = Plan()
    rest = (Rung("heatmap", 10.0), Rung("nothing", 0.0))
    assert plan.richest(rest, 0.100, 0.050) == rest[0]
    plan.admit(work(2, 78.0 + ROOM * 18.0), 0.050)
    assert plan.richest(rest, 0.100, 0.050) == rest[0]
    assert plan.richest(rest, 0.100, 0.051) == rest[1]  # 51 + 10 + 18 and the room > 78 and the room
    assert plan.richest(rest, 0.045, 0.050) is None  # its own time is over


def test_a_client_that_is_gone_gives_its_place_back() -> None:
    plan = Plan()
    plan.admit(work(1, 20.0), 0.0)
    assert not plan.admit(work(2, 30.0), 0.0).admitted
    assert plan.withdraw(1)
    assert not plan.withdraw(1)
    assert plan.admit(work(2, 30.0), 0.0).admitted


# -- whole days, simulated ------------------------------------------------------------------------------------------


def simulate(arrivals_s: Sequence[float], budgets_s: Sequence[float], rungs: Sequence[Rung], factors: Sequence[float]) -> Counter[str]:
    """One device, real costs = predicted times a factor. Counts what became of each request, and the rungs given."""
    plan, out, free_s, i = Plan(), Counter[str](), 0.0, 0
    deadlines = [a + b for a, b in zip(arrivals_s, budgets_s, strict=True)]
    while i < len(arrivals_s) or len(plan):
        start_s = max(free_s, arrivals_s[i] if not len(plan) and i < len(arrivals_s) else 0.0)
        if i < len(arrivals_s) and arrivals_s[i] <= start_s:
            plan.busy_until(free_s)
            verdict = plan.admit(Work(i, deadlines[i], tuple(rungs)), arrivals_s[i])
            out["admitted" if verdict.admitted else "refused"] += 1
            i += 1
            continue
        taken = plan.take(start_s)
        assert taken is not None
        mine, rung = taken
        if rung is None:
            out["not started"] += 1
            continue
        assert start_s + rung.cost_ms / 1e3 <= mine.deadline_s + 1e-9
        free_s = start_s + rung.cost_ms / 1e3 * factors[mine.number]
        out["late" if free_s > mine.deadline_s + 1e-9 else "in time"] += 1
        out[rung.name] += 1
    return out


times = st.floats(0, 0.5, allow_nan=False)


@given(st.lists(st.tuples(times, times), min_size=1, max_size=40), st.tuples(times, times, times))
@example([(0.5, 0.0), (0.0, 0.0)], (0.5, 0.5, 2.2250738585072014e-308))
def test_as_long_as_costs_hold_everyone_admitted_is_answered_in_time(gaps: list[tuple[float, float]], costs: tuple[float, ...]) -> None:
    """No stage starts after its last feasible start, and none that was admitted is starved: each is taken, and ends in time."""
    arrivals = list(np.cumsum([g for g, _ in gaps]))
    rungs = tuple(Rung(str(i), c * 1e3) for i, c in enumerate(sorted(costs, reverse=True)))
    found = simulate(arrivals, [b for _, b in gaps], rungs, [1.0] * len(gaps))
    assert found["in time"] == found["admitted"]
    assert found["late"] == found["not started"] == 0
    assert found["admitted"] + found["refused"] == len(gaps)


@given(st.lists(st.tuples(times, times), min_size=2, max_size=12))
def test_nobody_is_refused_who_could_be_answered(gaps: list[tuple[float, float]]) -> None:
    """With one rung, a refusal means that no order of those waiting and this one meets all deadlines."""
    from itertools import permutations

    plan = Plan()
    rung = (Rung("only", 50.0),)
    for number, (_, budget_s) in enumerate(gaps):
        candidate = Work(number, budget_s, rung)
        waiting = [*plan, candidate]
        if plan.admit(candidate, 0.0).admitted or len(waiting) > 5:
            continue
        for order in permutations(waiting):
            done = np.cumsum([0.05] * len(order))
            assert any(d > w.deadline_s for d, w in zip(done, order, strict=True))


@pytest.mark.parametrize(("load", "least"), [(0.7, 0.9995), (1.0, 0.998), (2.0, 0.97), (3.0, 0.85)])
def test_twice_the_capacity_with_mixed_deadlines(load: float, least: float) -> None:
    """60 / 45 / 18 ms, deadlines of 200 to 600 ms, Poisson arrivals, costs that scatter by 8 % below a prediction 20 % above."""
    rng = np.random.default_rng(20261127)
    count = 6000
    arrivals = np.cumsum(rng.exponential(0.060 / load, count))
    rungs = tuple(Rung(r.name, 1.2 * r.cost_ms) for r in LADDER)
    factors = np.exp(rng.normal(0, 0.08, count)) / 1.2
    found = simulate(arrivals.tolist(), rng.uniform(0.2, 0.6, count).tolist(), rungs, factors.tolist())
    assert found["in time"] >= least * count
    assert found["late"] + found["not started"] <= 0.001 * max(1, found["admitted"])
    if load <= 0.7:
        assert found["full"] >= 0.9 * count
