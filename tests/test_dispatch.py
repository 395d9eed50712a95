"""Who waits, who goes, who is refused at once; a simulation with a clock of its own holds the promises over any traffic."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from appliance.dispatch import COMING_S, OTHERS, OWN, POLL_S, Dispatcher, Way, _Waiting, committed_ms
from appliance.errors import OutOfTime, RequestGone

FULL = Way("full", (("detect", 20.0), ("segment", 60.0), ("explain", 40.0)))
PLAIN = Way("no-heatmap", (("detect", 20.0), ("segment", 60.0), ("grade", 30.0)))
LEAST = Way("detection-only", (("detect", 20.0), ("close", 2.0)))
WAYS = (FULL, PLAIN, LEAST)


def soon(ms: float) -> float:
    return time.monotonic() + ms / 1e3


def test_a_free_device_is_given_at_once_with_all_that_may_be() -> None:
    with Dispatcher().turn(soon(10_000), WAYS) as turn:
        assert (turn.way, turn.shed) == (FULL, {})
        assert turn.waited_ms < 1000


def rest(after: int, *ways: Way) -> list[Way]:
    return [Way(w.rung, w.stretches[after:]) for w in ways]


def test_what_can_be_decided_later_is_decided_later() -> None:
    now = [0.0]
    dispatcher = Dispatcher(clock=lambda: now[0])
    with dispatcher.turn(0.115, WAYS) as turn:  # of 115 ms the whole takes 120; but finding alone takes 22
        assert (turn.way, turn.shed) == (FULL, {})
        now[0] = 0.010  # it took half of what was foreseen, and so there is time for all
        assert turn.keep(rest(1, *WAYS)).rung == "full"
        now[0] = 0.070
        assert turn.keep(rest(2, FULL, PLAIN)).rung == "full"
        assert turn.shed == {}
    now, dispatcher = [0.0], Dispatcher(clock=lambda: now[0])
    with dispatcher.turn(0.115, WAYS) as turn:
        now[0] = 0.020
        assert turn.keep(rest(1, *WAYS)).rung == "full"
        now[0] = 0.080
        assert turn.keep(rest(2, FULL, PLAIN)).rung == "no-heatmap"
        assert turn.shed == {"full": OWN}
    now, dispatcher = [0.0], Dispatcher(clock=lambda: now[0])
    with dispatcher.turn(0.080, WAYS) as turn:
        now[0] = 0.020
        assert turn.keep(rest(1, *WAYS)).rung == "detection-only"
        assert turn.shed == dict.fromkeys(("full", "no-heatmap"), OWN)


def test_what_cannot_be_in_time_is_refused_at_once_with_the_numbers() -> None:
    dispatcher = Dispatcher(clock=lambda: 0.0)
    with (
        pytest.raises(OutOfTime, match=r"10 ms are left of its budget, the answer would take 22 ms") as caught,
        dispatcher.turn(0.01, WAYS),
    ):
        pass
    assert caught.value.remedy == "Allow more time: the least answer takes up to 22 ms here."
    with dispatcher.turn(10.0, WAYS):
        refused: list[OutOfTime] = []
        for _ in range(2):
            with pytest.raises(OutOfTime) as caught, dispatcher.turn(0.03, WAYS):
                pass
            refused.append(caught.value)
        assert all(r.retry_after_ms is not None and r.retry_after_ms > 0 for r in refused)
        assert "Send it again in" in refused[0].remedy
    assert dispatcher.waiting() == 0


def test_who_announces_itself_has_a_place_for_a_moment() -> None:
    now = [0.0]
    dispatcher = Dispatcher(clock=lambda: now[0])
    ticket = dispatcher.announce(0.04, 22.0)
    assert dispatcher.waiting() == 0
    with pytest.raises(OutOfTime, match="the answer would take 44 ms") as caught:
        dispatcher.announce(0.04, 22.0)
    assert caught.value.retry_after_ms is not None
    with pytest.raises(OutOfTime), dispatcher.turn(0.04, WAYS):  # somebody else
        pass
    with dispatcher.turn(0.04, WAYS, ticket=ticket) as turn:  # the one who is expected
        assert turn.way.rung in ("full", "detection-only")
    dispatcher.announce(0.04, 22.0).close()
    late = dispatcher.announce(0.04, 22.0)
    late.close()
    late.close()
    stays_away = dispatcher.announce(10.0, 9_900.0)
    with pytest.raises(OutOfTime):
        dispatcher.announce(10.0, 9_900.0)
    now[0] = COMING_S
    dispatcher.announce(10.0 + COMING_S, 9_900.0).close()
    stays_away.close()


def test_who_is_admitted_is_told_before_its_turn() -> None:
    dispatcher = Dispatcher()
    told: list[str] = []
    entered = threading.Event()

    def other() -> None:
        with dispatcher.turn(soon(60_000), WAYS, admitted=entered.set):
            told.append("turn")

    with dispatcher.turn(soon(60_000), WAYS, admitted=lambda: told.append("admitted")):
        assert told == ["admitted"]
        thread = threading.Thread(target=other)
        thread.start()
        assert entered.wait(10)
        assert told == ["admitted"]
    thread.join(10)
    assert told == ["admitted", "turn"]
    with pytest.raises(OutOfTime), dispatcher.turn(soon(1), WAYS, admitted=lambda: told.append("never")):
        pass
    assert "never" not in told


def test_who_waits_makes_the_one_at_work_shed() -> None:
    dispatcher = Dispatcher(clock=lambda: 0.0)
    admitted = threading.Event()

    def other() -> None:
        with dispatcher.turn(0.1, WAYS):
            admitted.set()

    with dispatcher.turn(10.0, WAYS) as turn:
        assert turn.way is FULL
        thread = threading.Thread(target=other)
        thread.start()
        until = time.monotonic() + 10
        while not dispatcher.waiting() and time.monotonic() < until:
            time.sleep(0.001)
        # Of 100 ms the other needs 22: the rest of the full way, 100 ms, does not fit, closing does.
        assert turn.keep(rest(1, *WAYS)).rung == "detection-only"
        assert turn.shed == {"full": OTHERS, "no-heatmap": OTHERS}
        assert not admitted.is_set()
    thread.join(10)
    assert admitted.is_set()


def test_what_is_done_is_not_thrown_away_but_a_hopeless_retry_is() -> None:
    now = [0.0]
    dispatcher = Dispatcher(clock=lambda: now[0])
    with dispatcher.turn(0.1, WAYS) as turn:
        now[0] = 0.0999
        assert turn.keep([Way("no-heatmap", (("grade", 30.0),))]).rung == "no-heatmap"
        assert turn.again(WAYS) is None
        now[0] = 0.05
        assert turn.again(WAYS) is not None
        assert turn.keep(rest(1, *WAYS)).rung == "detection-only"
        assert set(turn.shed) == {"full", "no-heatmap"}
        now[0] = 0.0
        assert turn.again(WAYS) is not None
        assert turn.shed == {}  # of this try; what was not given before does not count


def test_a_client_that_went_away_while_it_waited_leaves_the_queue() -> None:
    dispatcher = Dispatcher()
    with dispatcher.turn(soon(60_000), WAYS):
        with pytest.raises(RequestGone), dispatcher.turn(soon(60_000), WAYS, gone=lambda: True):
            pass
        assert dispatcher.waiting() == 0


def test_who_is_done_early_frees_the_device_early() -> None:
    dispatcher = Dispatcher(clock=lambda: 0.0)
    with dispatcher.turn(10.0, WAYS):
        pass
    with dispatcher.turn(0.03, WAYS) as turn:  # of these, 22 are needed
        assert turn.way is FULL


def test_who_was_admitted_and_cannot_be_in_time_any_more_is_told_so() -> None:
    now = [0.0]
    dispatcher = Dispatcher(clock=lambda: now[0])
    told: list[OutOfTime] = []

    def other() -> None:
        try:
            with dispatcher.turn(0.1, WAYS):
                pass
        except OutOfTime as error:
            told.append(error)

    with dispatcher.turn(10.0, WAYS):
        thread = threading.Thread(target=other)
        thread.start()
        until = time.monotonic() + 10
        while not dispatcher.waiting() and time.monotonic() < until:
            time.sleep(0.001)
        now[0] = 0.2  # what ran took longer than anybody foresaw
    thread.join(10)
    assert [(e.admitted, "took longer than predicted" in e.what) for e in told] == [(True, True)]
    with pytest.raises(OutOfTime) as caught, dispatcher.turn(0.21, WAYS):
        pass
    assert not caught.value.admitted


def test_the_device_is_free_again_after_a_failure() -> None:
    dispatcher = Dispatcher()
    for _ in range(3):
        with pytest.raises(ZeroDivisionError), dispatcher.turn(soon(10_000), WAYS):
            raise ZeroDivisionError
    with dispatcher.turn(soon(10_000), WAYS) as turn:
        assert turn.way is FULL


def test_while_the_engines_are_started_nothing_is_promised() -> None:
    now = [0.0]
    dispatcher = Dispatcher(clock=lambda: now[0])
    dispatcher.close_for(3000.0)
    with pytest.raises(OutOfTime), dispatcher.turn(1.0, WAYS):
        pass
    with pytest.raises(OutOfTime), dispatcher.turn(3.01, WAYS):
        pass
    now[0] = 3.0
    with dispatcher.turn(3.1, WAYS) as turn:
        assert turn.way.rung == "full"
        turn.hold(500.0)
        with pytest.raises(OutOfTime), dispatcher.turn(3.5, WAYS):
            pass


def test_a_device_is_open_again_as_soon_as_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("appliance.dispatch.POLL_S", 60.0)  # not when somebody looks again
    dispatcher = Dispatcher()
    dispatcher.close_for(60_000.0)
    with pytest.raises(OutOfTime):
        dispatcher.announce(soon(30_000), 20.0)
    entered, done = threading.Event(), threading.Event()

    def patient() -> None:
        with dispatcher.turn(soon(90_000), WAYS, admitted=entered.set):
            done.set()

    thread = threading.Thread(target=patient)
    thread.start()
    assert entered.wait(10)
    assert not done.wait(3 * POLL_S)  # nobody is given a device that cannot work
    dispatcher.close_for(0.0)
    assert done.wait(10)
    thread.join(10)
    with dispatcher.turn(soon(1000), WAYS) as turn:
        assert turn.way is FULL


def test_a_device_that_closes_while_it_works_is_closed_when_that_is_done() -> None:
    now = [0.0]
    dispatcher = Dispatcher(clock=lambda: now[0])
    with dispatcher.turn(10.0, WAYS):
        dispatcher.close_for(3000.0)
    with pytest.raises(OutOfTime), dispatcher.turn(3.01, WAYS):
        pass


def test_who_waits_is_told_as_soon_as_it_is_too_late() -> None:
    now = [0.0]
    dispatcher = Dispatcher(clock=lambda: now[0])
    entered, told = threading.Event(), []

    def other() -> None:
        try:
            with dispatcher.turn(0.5, WAYS, admitted=entered.set):
                pass
        except OutOfTime as error:
            told.append(error)

    with dispatcher.turn(10.0, WAYS):
        thread = threading.Thread(target=other)
        thread.start()
        assert entered.wait(10)
        now[0] = 0.4779  # 22.1 ms before
        thread.join(3 * POLL_S)
        assert thread.is_alive()
        now[0] = 0.4781
        thread.join(10)
        assert [e.admitted for e in told] == [True]  # although the first is still at work
        assert dispatcher.waiting() == 0


def test_many_threads_have_the_device_one_at_a_time_and_all_get_it() -> None:
    dispatcher = Dispatcher()
    inside, most, done = [0], [0], []

    def one(number: int) -> None:
        with dispatcher.turn(soon(60_000), (Way("full", (("detect", 1.0),)),)):
            inside[0] += 1
            most[0] = max(most[0], inside[0])
            time.sleep(0.001)
            inside[0] -= 1
            done.append(number)

    threads = [threading.Thread(target=one, args=(i,)) for i in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert (most[0], sorted(done)) == (1, list(range(40)))


# -- any traffic --------------------------------------------------------------------------------------------------------


@dataclass
class Simulation:
    """One device and a clock that jumps from event to event. The dispatcher's own lock, plan and decisions, without its threads."""

    costs: tuple[Way, ...]
    now_s: float = 0.0
    admitted: list[_Waiting] = field(default_factory=list)
    answered: dict[int, tuple[float, str]] = field(default_factory=dict)
    refused: int = 0

    def __post_init__(self) -> None:
        self.dispatcher = Dispatcher(clock=lambda: self.now_s)

    def run(self, arrivals: list[tuple[float, float]]) -> None:
        """Each of `arrivals` is (ms since the one before, ms allowed). A stretch takes exactly what was predicted."""
        pending, at_s = [], 0.0
        for gap_ms, allowed_ms in arrivals:
            at_s += gap_ms / 1e3
            pending.append((at_s, at_s + allowed_ms / 1e3))
        running: tuple[_Waiting, Way, float] | None = None
        while True:
            running = running or self._called()
            if running is not None and (not pending or running[2] <= pending[0][0]):
                self.now_s = running[2]
                running = self._stretch_done(*running[:2])
            elif pending:
                self.now_s, deadline_s = pending.pop(0)
                self._arrive(deadline_s)
            else:
                return

    def _arrive(self, deadline_s: float) -> None:
        try:
            self.admitted.append(self.dispatcher._enter(deadline_s, self.costs))
        except OutOfTime:
            self.refused += 1

    def _called(self) -> tuple[_Waiting, Way, float] | None:
        mine = self.dispatcher._running
        if mine is None:
            return None
        assert mine.given is not None
        return self._begin(mine, mine.given, mine.ways)

    def _begin(self, mine: _Waiting, way: Way, ways: Sequence[Way]) -> tuple[_Waiting, Way, float]:
        # No stretch starts after its last feasible start: with the least that can follow, it still fits.
        assert self.now_s * 1e3 + committed_ms(way, ways) <= mine.work.deadline_s * 1e3 + 1e-3
        return mine, way, self.now_s + way.stretches[0][1] / 1e3

    def _stretch_done(self, mine: _Waiting, way: Way) -> tuple[_Waiting, Way, float] | None:
        left = way.stretches[1:]
        if not left:
            self.answered[mine.work.number] = (self.now_s, way.rung)
            self.dispatcher._leave(mine)
            return None
        done = [s for s, _ in next(w for w in mine.ways if w.rung == way.rung).stretches]
        behind = len(done) - len(left)
        ways = [
            Way(w.rung, w.stretches[behind:])
            for w in mine.ways[[w.rung for w in mine.ways].index(way.rung) :]
            if [s for s, _ in w.stretches[:behind]] == done[:behind]
        ]
        chosen = self.dispatcher._keep(mine, ways)
        assert chosen is not None  # as long as costs hold there is always a way
        return self._begin(mine, chosen, ways)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0, 120), st.floats(1, 900)), min_size=1, max_size=40),
    st.tuples(st.floats(1, 40), st.floats(1, 90), st.floats(1, 60), st.floats(1, 50), st.floats(0.1, 10)),
)
def test_everyone_admitted_is_answered_in_time_and_no_stretch_starts_too_late(
    arrivals: list[tuple[float, float]], ms: tuple[float, float, float, float, float]
) -> None:
    detect, segment, explain, grade, close = ms
    simulation = Simulation(
        (
            Way("full", (("detect", detect), ("segment", segment), ("explain", max(explain, grade)))),
            Way("no-heatmap", (("detect", detect), ("segment", segment), ("grade", grade))),
            Way("detection-only", (("detect", detect), ("close", close))),
        )
    )
    simulation.run(arrivals)
    assert len(simulation.admitted) + simulation.refused == len(arrivals)
    for mine in simulation.admitted:  # nobody starves
        done_s, rung = simulation.answered[mine.work.number]
        assert done_s <= mine.work.deadline_s + 1e-6
        # Reasons are given for what was not had, and for nothing else.
        had = [w.rung for w in mine.ways].index(rung)
        assert set(mine.shed) == {w.rung for w in mine.ways[:had]}
    assert simulation.dispatcher.waiting() == 0


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.floats(200, 400), st.floats(130, 900)), min_size=1, max_size=20))
def test_a_device_with_time_sheds_nothing(arrivals: list[tuple[float, float]]) -> None:
    simulation = Simulation(WAYS)
    simulation.run(arrivals)
    assert simulation.refused == 0
    assert {rung for _, rung in simulation.answered.values()} == {"full"}
