"""One device, many requests: who is let in, who goes next, with how much, and who is told at once that it cannot be.

Hides the lock and the waiting threads around `appliance.schedule` (the plan). A request enters with its deadline and the ways in
which it may be answered, richest first. Either it is refused before anything is done for it, with the predicted time and when to
ask again; or it waits for its turn and begins with the richest way whose first stretch keeps everyone in time. Between stretches of
work it asks again, and sheds what has become too much. What anything costs, others say.
"""

from __future__ import annotations

import itertools
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from appliance.errors import OutOfTime, RequestGone
from appliance.schedule import MOST_QUEUED, Plan, Rung, Verdict, Work

COMING_S = 0.25  # a place is kept so long for who has announced itself: a body takes milliseconds, and who trickles must block nobody
POLL_S = 0.05  # how often who waits looks whether its client is still there
OWN, OTHERS = "too little of its own time was left", "others that wait or come next could have been late"


@dataclass(frozen=True)
class Way:
    """One way to answer, or to go on: its rung, and the stretches of work from here to the end, each with its predicted ms."""

    rung: str
    stretches: tuple[tuple[str, float], ...]

    @property
    def cost_ms(self) -> float:
        return sum(ms for _, ms in self.stretches)


def committed_ms(way: Way, ways: Sequence[Way]) -> float:
    """What beginning with `way` costs at the least: after its first stretch the cheapest of `ways` that begin with the same one can still
    be gone on with."""
    return min(w.cost_ms for w in ways if w.stretches[:1] == way.stretches[:1])


@dataclass
class _Waiting:
    work: Work
    ways: tuple[Way, ...]
    arrived_s: float
    changed: threading.Condition
    given: Way | None = None
    called: bool = False
    shed: dict[str, str] = field(default_factory=dict)


class Turn:
    """A request whose turn it is: the device is its own until it leaves. `way` is what it was given."""

    def __init__(self, dispatcher: Dispatcher, mine: _Waiting, began_s: float) -> None:
        assert mine.given is not None  # noqa: S101 - `_called` raises where nothing was given
        self.way = mine.given
        self.waited_ms = (began_s - mine.arrived_s) * 1e3
        self._dispatcher, self._mine = dispatcher, mine

    @property
    def shed(self) -> dict[str, str]:
        """Rungs that were not given, each with the reason."""
        return dict(self._mine.shed)

    def keep(self, ways: Sequence[Way]) -> Way:
        """Between stretches: the richest of `ways` (what may still be done, richest first) that keeps this and all others in time. The
        cheapest where none does: what is done so far is lost otherwise."""
        return self._dispatcher._keep(self._mine, ways) or min(ways, key=lambda w: w.cost_ms)

    def again(self, ways: Sequence[Way]) -> Way | None:
        """From the start, after a failure: as `keep`, but None where it can no longer be in time."""
        self._mine.shed.clear()
        return self._dispatcher._keep(self._mine, ways)

    def hold(self, ms: float) -> None:
        """The device can do nothing for so long, and then what this request still needs at the least."""
        self._dispatcher._hold(self._mine, ms)


class Ticket:
    """A place that is kept; `close` gives it back, at any time and more than once."""

    def __init__(self, dispatcher: Dispatcher, number: int) -> None:
        self._dispatcher, self.number = dispatcher, number

    def close(self) -> None:
        self._dispatcher._withdraw(self.number)


class Dispatcher:
    """The only door to one device. Thread-safe; `clock` is monotonic, in seconds."""

    def __init__(self, *, most_queued: int = MOST_QUEUED, clock: Callable[[], float] = time.monotonic) -> None:
        self._plan = Plan(most_queued)
        self._clock = clock
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)
        self._waiting: dict[int, _Waiting] = {}
        self._running: _Waiting | None = None
        self._closed_s = -math.inf

    def announce(self, deadline_s: float, least_ms: float) -> Ticket:
        """A request is on its way that will take at least so much: its place is kept until it comes (`turn`), for COMING_S.

        Raises OutOfTime where it could not be in time.
        """
        with self._lock:
            now_s = self._clock()
            work = Work(next(self._numbers), deadline_s, (Rung("least", least_ms),))
            verdict = self._plan.announce(work, now_s, now_s + COMING_S)
            if not verdict.admitted:
                raise refusal(verdict, (deadline_s - now_s) * 1e3, least_ms)
            return Ticket(self, work.number)

    @contextmanager
    def turn(
        self,
        deadline_s: float,
        ways: Sequence[Way],
        gone: Callable[[], bool] = lambda: False,
        admitted: Callable[[], None] = lambda: None,
        ticket: Ticket | None = None,
    ) -> Iterator[Turn]:
        """Wait for the device; it is given back when the block is left.

        `deadline_s` is when the device must be done with it, on the clock; `admitted()` is called once it waits, in the place that was
        kept with `ticket`. Raises OutOfTime at once where that cannot be kept (`retry_after_ms` says when it is worth asking again),
        later where costs did not hold; RequestGone where `gone()` while it waited.
        """
        mine = self._enter(deadline_s, tuple(ways), ticket)
        try:
            admitted()
            self._wait(mine, gone)
            yield Turn(self, mine, self._clock())
        finally:
            self._leave(mine)

    def waiting(self) -> int:
        """How many wait for their turn."""
        with self._lock:
            return len(self._plan)

    def close_for(self, ms: float) -> None:
        """The device can do nothing for so long (its engines are being started); 0: it can again, whatever was said before."""
        with self._lock:
            self._closed_s = self._clock() + ms / 1e3
            if self._running is None:
                self._plan.busy_until(self._closed_s)
                self._next()

    # -- inside --------------------------------------------------------------------------------------------------------

    def _enter(self, deadline_s: float, ways: tuple[Way, ...], ticket: Ticket | None = None) -> _Waiting:
        with self._lock:
            now_s = self._clock()
            if ticket is not None:
                self._plan.withdraw(ticket.number)
            work = Work(next(self._numbers), deadline_s, _rungs(ways))
            verdict = self._plan.admit(work, now_s)
            if not verdict.admitted:
                raise refusal(verdict, (deadline_s - now_s) * 1e3, work.least_ms)
            mine = _Waiting(work, ways, now_s, threading.Condition(self._lock))  # woken alone: there may be dozens
            self._waiting[work.number] = mine
            self._next()
            return mine

    def _wait(self, mine: _Waiting, gone: Callable[[], bool]) -> None:
        with self._lock:
            while not mine.called:
                mine.changed.wait(POLL_S)
                if mine.called:
                    break
                if gone():
                    raise RequestGone("the client went away while its study waited")
                self._next()  # the device may have been closed until now
                if self._clock() > mine.work.deadline_s - mine.work.least_ms / 1e3:
                    break
            if mine.given is None:
                left_ms = (mine.work.deadline_s - self._clock()) * 1e3
                verdict = Verdict(False, mine.work.least_ms, mine.work.least_ms, "what ran before took longer than predicted")
                error = refusal(verdict, left_ms, least_ms=0.0)
                error.admitted = True
                raise error

    def _withdraw(self, number: int) -> None:
        with self._lock:
            self._plan.withdraw(number)

    def _leave(self, mine: _Waiting) -> None:
        with self._lock:
            self._waiting.pop(mine.work.number, None)
            self._plan.withdraw(mine.work.number)
            if self._running is mine:
                self._running = None
                self._plan.busy_until(max(self._clock(), self._closed_s))
            self._next()

    def _next(self) -> None:
        """Call the next request where the device is free and not closed. Those for whom it is too late are called too, to be told."""
        while self._running is None and (now_s := self._clock()) >= self._closed_s:
            taken = self._plan.take(now_s)
            if taken is None:
                return
            work, rung = taken
            mine = self._waiting[work.number]
            mine.called = True
            if rung is not None:
                mine.given = self._choose(mine, mine.ways, rung, now_s)
                self._running = mine
            mine.changed.notify()

    def _keep(self, mine: _Waiting, ways: Sequence[Way]) -> Way | None:
        with self._lock:
            now_s = self._clock()
            rung = self._plan.richest(_rungs(ways), mine.work.deadline_s, now_s)
            return None if rung is None else self._choose(mine, ways, rung, now_s)

    def _choose(self, mine: _Waiting, ways: Sequence[Way], rung: Rung, now_s: float) -> Way:
        """Note why richer ways were not taken, and how long the device is busy at the least."""
        own_ms = (mine.work.deadline_s - now_s) * 1e3
        chosen = next(w for w in ways if w.rung == rung.name)
        for way in ways[: ways.index(chosen)]:
            mine.shed[way.rung] = OWN if committed_ms(way, ways) > own_ms else OTHERS
        self._plan.busy_until(now_s + rung.cost_ms / 1e3)
        return chosen

    def _hold(self, mine: _Waiting, ms: float) -> None:
        with self._lock:
            self._plan.busy_until(self._clock() + (ms + mine.work.least_ms) / 1e3)


def _rungs(ways: Sequence[Way]) -> tuple[Rung, ...]:
    """Ways as a plan sees them: it need not know yet what can be decided later."""
    return tuple(Rung(w.rung, committed_ms(w, ways)) for w in ways)


def refusal(verdict: Verdict, left_ms: float, least_ms: float) -> OutOfTime:
    """A verdict in words: what is left, what it would take, when to ask again. Whoever allows less than `least_ms` need not ask again."""
    again = f"Send it again in {max(verdict.retry_after_ms, 100.0) / 1e3:.1f} s, or allow more time."
    error = OutOfTime(
        f"{verdict.reason}: {max(left_ms, 0.0):.0f} ms are left of its budget, the answer would take {verdict.predicted_ms:.0f} ms",
        value=f"{verdict.predicted_ms:.0f} ms",
        remedy=again if left_ms >= least_ms else f"Allow more time: the least answer takes up to {least_ms:.0f} ms here.",
    )
    error.retry_after_ms = verdict.retry_after_ms
    return error
