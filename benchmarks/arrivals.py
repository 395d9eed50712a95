"""When requests come and how long each may take: seeded open-loop schedules, the same for every system that is compared.

Open loop: nobody waits for an answer before the next request is sent, as clients do not wait for each other. Poisson arrivals have
independent exponential gaps. Bursts come in groups of 5 to 10 requests at one moment, groups themselves being Poisson, at the same
mean rate. Deadlines are uniform between 200 and 600 ms. Pure: nothing is sent and no clock is read here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

DEADLINES_MS = (200.0, 600.0)
GROUP = (5, 10)  # requests of one burst, both ends included
MOST = 1_000_000


@dataclass(frozen=True)
class Arrival:
    """One request: seconds after the start at which it is offered, and the milliseconds in which its answer is of use."""

    offered_s: float
    deadline_ms: float


def _checked(rate_per_s: float, seconds: float, deadlines_ms: tuple[float, float]) -> None:
    if not (np.isfinite(rate_per_s) and rate_per_s > 0):
        raise ValueError(f"a rate of {rate_per_s} requests a second cannot be offered")
    if not (np.isfinite(seconds) and seconds > 0):
        raise ValueError(f"{seconds} s is no time to offer requests in")
    if rate_per_s * seconds > MOST:
        raise ValueError(f"{rate_per_s * seconds:.0f} requests are more than {MOST}")
    low, high = deadlines_ms
    if not 0 < low <= high < float("inf"):
        raise ValueError(f"deadlines from {low} to {high} ms are none")


def _moments(rng: np.random.Generator, rate_per_s: float, seconds: float) -> list[float]:
    """Moments of a Poisson process within [0, seconds)."""
    out: list[float] = []
    now = float(rng.exponential(1 / rate_per_s))
    while now < seconds:
        out.append(now)
        now += float(rng.exponential(1 / rate_per_s))
    return out


def poisson(rate_per_s: float, seconds: float, seed: int, deadlines_ms: tuple[float, float] = DEADLINES_MS) -> tuple[Arrival, ...]:
    """Independent arrivals at `rate_per_s`. Raises ValueError for what cannot be offered."""
    _checked(rate_per_s, seconds, deadlines_ms)
    rng = np.random.default_rng([seed, 1])
    return tuple(Arrival(t, float(rng.uniform(*deadlines_ms))) for t in _moments(rng, rate_per_s, seconds))


def bursts(
    rate_per_s: float,
    seconds: float,
    seed: int,
    deadlines_ms: tuple[float, float] = DEADLINES_MS,
    group: tuple[int, int] = GROUP,
) -> tuple[Arrival, ...]:
    """Groups of `group` requests at one moment each, `rate_per_s` requests on average. Raises ValueError for what cannot be offered."""
    _checked(rate_per_s, seconds, deadlines_ms)
    fewest, most = group
    if not 1 <= fewest <= most:
        raise ValueError(f"a group of {fewest} to {most} requests is none")
    rng = np.random.default_rng([seed, 2])
    out: list[Arrival] = []
    for moment in _moments(rng, rate_per_s / ((fewest + most) / 2), seconds):
        out += [Arrival(moment, float(rng.uniform(*deadlines_ms))) for _ in range(int(rng.integers(fewest, most + 1)))]
    return tuple(out)


PATTERNS: dict[str, Callable[[float, float, int], tuple[Arrival, ...]]] = {"poisson": poisson, "bursts": bursts}
