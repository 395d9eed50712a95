"""Who is answered next, with how much, and who is told at once that it cannot be.

Hides the plan of one device: non-preemptive earliest deadline first over predicted costs. A request is admitted only if, with
everything queued at its poorest rung, nobody's deadline is missed; whoever is admitted is then given the richest rung that keeps
all others feasible and leaves room for a few more. Pure: the clock is an argument, nothing is run here, so that a simulation and the
daemon share every line.

Earliest deadline first is optimal among plans that never idle and never preempt known work (Jackson's rule, 1955); admission walks the
queue in that order.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

MOST_QUEUED = 256
# A rung richer than the poorest leaves the queue so many poorest answers of slack. Without it the richest rungs use up all slack there
# is, whoever comes next is refused, and the first thing to take longer than predicted makes somebody late.
ROOM = 3.0
ROUNDING_MS = 1e-7  # sums of seconds and of milliseconds differ by less: what was admitted on the edge is in time there too


@dataclass(frozen=True)
class Rung:
    """One way to answer: its name and its predicted cost in ms."""

    name: str
    cost_ms: float


@dataclass(frozen=True)
class Work:
    """A request in the plan: when it must be answered (s, monotonic), and its rungs, richest first. `number` tells equals apart."""

    number: int
    deadline_s: float
    rungs: tuple[Rung, ...]

    def __post_init__(self) -> None:
        if not self.rungs or any(not (math.isfinite(r.cost_ms) and r.cost_ms >= 0) for r in self.rungs):
            raise ValueError(f"work {self.number} has no rungs with finite costs")

    @property
    def least_ms(self) -> float:
        return min(r.cost_ms for r in self.rungs)


@dataclass(frozen=True)
class Verdict:
    """Whether a request is taken; where not, when it would have been answered and when it is worth asking again (ms from now)."""

    admitted: bool
    predicted_ms: float
    retry_after_ms: float = 0.0
    reason: str = ""


@dataclass
class Plan:
    """The queue of one device and what runs on it. Not thread-safe."""

    most_queued: int = MOST_QUEUED
    _queue: list[Work] = field(default_factory=list)  # the most urgent first
    _coming: list[tuple[float, Work]] = field(default_factory=list)  # announced, and until when their places are kept
    _free_s: float = -math.inf  # when what runs now is done, at the least that may still be shed

    def __len__(self) -> int:
        return len(self._queue)

    def __iter__(self) -> Iterator[Work]:
        return iter(self._queue)

    def busy_until(self, free_s: float) -> None:
        """What runs now will be done by `free_s` if the rest of it is shed as far as it may be."""
        self._free_s = free_s

    def admit(self, work: Work, now_s: float) -> Verdict:
        """Queue `work`, or say why not. Work that is admitted stays feasible at its poorest rung whatever else is admitted, as long
        as the costs hold."""
        verdict = self._judge(work, now_s)
        if verdict.admitted:
            bisect.insort(self._queue, work, key=_urgency)
        return verdict

    def announce(self, work: Work, now_s: float, until_s: float) -> Verdict:
        """As `admit` for work that is on its way: not queued yet, but its place is kept until it is (withdraw it, then admit what has
        come), at the longest `until_s`."""
        verdict = self._judge(work, now_s)
        if verdict.admitted:
            self._coming.append((until_s, work))
        return verdict

    def _judge(self, work: Work, now_s: float) -> Verdict:
        order = self._ahead(now_s)
        if len(order) >= self.most_queued:
            wait_ms = self._drained_ms(now_s)
            return Verdict(False, wait_ms + work.least_ms, wait_ms, "the queue is full")
        bisect.insort(order, work, key=_urgency)
        done_s, late, own_s = max(now_s, self._free_s), None, math.inf
        for w in order:
            done_s += w.least_ms / 1e3
            if w is work:
                own_s = done_s
            if late is None and done_s > w.deadline_s:
                late = w
        predicted_ms = (own_s - now_s) * 1e3
        if late is None:
            return Verdict(True, predicted_ms)
        # It can be answered within the same budget once as much work is done as is in the way now.
        budget_ms = max(0.0, (work.deadline_s - now_s) * 1e3)
        wait_ms = max(self._drained_ms(now_s) + work.least_ms - budget_ms, 1.0)
        why = "it would not be ready in time" if late is work else "others that wait would be late"
        return Verdict(False, predicted_ms, wait_ms, why)

    def withdraw(self, number: int) -> bool:
        """Take work out of the queue, or give back the place kept for it. False where there is none."""
        before = len(self._queue) + len(self._coming)
        self._queue = [w for w in self._queue if w.number != number]
        self._coming = [(until_s, w) for until_s, w in self._coming if w.number != number]
        return len(self._queue) + len(self._coming) < before

    def take(self, now_s: float) -> tuple[Work, Rung | None] | None:
        """The most urgent work and the richest rung that keeps it and all others in time; None where nothing waits.

        Where costs did not hold and even the poorest rung is late, the rung is None: it must be refused, not started.
        """
        if not self._queue:
            return None
        work = self._queue.pop(0)
        return work, self.richest(work.rungs, work.deadline_s, now_s)

    def richest(self, rungs: Sequence[Rung], deadline_s: float, now_s: float) -> Rung | None:
        """The first of `rungs` that ends by `deadline_s` and leaves everything queued feasible, with room for ROOM more; where none
        does, the cheapest if it is itself in time; None where it is not. Asked again between stages, of what remains."""
        own_ms = (deadline_s - now_s) * 1e3
        ahead = self._ahead(now_s)
        room_ms = ROOM * sum(w.least_ms for w in ahead) / len(ahead) if ahead else 0.0
        allowed_ms = min(own_ms, _slack_ms(ahead, now_s) - room_ms)
        cheapest = min(rungs, key=lambda r: r.cost_ms)
        if cheapest.cost_ms > own_ms + ROUNDING_MS:
            return None
        return next((r for r in rungs if r.cost_ms <= allowed_ms + ROUNDING_MS), cheapest)

    def _ahead(self, now_s: float) -> list[Work]:
        """What waits and what is on its way, the most urgent first."""
        if not self._coming:
            return list(self._queue)
        self._coming = [(until_s, w) for until_s, w in self._coming if until_s > now_s]
        return sorted([*self._queue, *(w for _, w in self._coming)], key=_urgency)

    def _drained_ms(self, now_s: float) -> float:
        return max(0.0, self._free_s - now_s) * 1e3 + sum(w.least_ms for w in self._ahead(now_s))


def _slack_ms(ahead: Sequence[Work], now_s: float) -> float:
    """How long the device may be busy from now until one of `ahead`, the most urgent first, is late at the poorest rung; inf where
    there is none."""
    least, before_ms = math.inf, 0.0
    for work in ahead:
        before_ms += work.least_ms
        least = min(least, (work.deadline_s - now_s) * 1e3 - before_ms)
    return least


def _urgency(work: Work) -> tuple[float, int]:
    return work.deadline_s, work.number
