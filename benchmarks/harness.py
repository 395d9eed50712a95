"""Timing rules: things to compare run interleaved in shuffled order in one process, medians with spread, two at a time.

Many sessions in one process distort each other's times, so a comparison is always a pair. The ratio of a pair is the
median of the ratios of neighbouring runs: a noisy machine slows both.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Times:
    """Milliseconds of one contestant: median, 25th and 75th percentile, 99th percentile, number of runs."""

    median_ms: float
    p25_ms: float
    p75_ms: float
    p99_ms: float
    runs: int

    @classmethod
    def of(cls, values: list[float]) -> Times:
        p25, p50, p75, p99 = (float(v) for v in np.percentile(values, [25, 50, 75, 99]))
        return cls(p50, p25, p75, p99, len(values))


@dataclass(frozen=True)
class Pair:
    """A against B: `ratio` > 1 says that B is faster; the interval is the middle half of the neighbouring ratios."""

    a: Times
    b: Times
    ratio: float
    ratio_p25: float
    ratio_p75: float

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Pair:
        """What `dataclasses.asdict` made of a Pair."""
        return cls(**{**values, "a": Times(**values["a"]), "b": Times(**values["b"])})


def interleaved(a: Callable[[], object], b: Callable[[], object], runs: int = 40, warm: int = 5, seed: int = 1) -> Pair:
    """Run both `runs` times, in an order shuffled within each round."""
    rng = random.Random(seed)  # noqa: S311 - an order, not a secret
    for _ in range(warm):
        a()
        b()
    times: dict[str, list[float]] = {"a": [], "b": []}
    for _ in range(runs):
        order = [("a", a), ("b", b)]
        rng.shuffle(order)
        for name, f in order:
            began = time.perf_counter()
            f()
            times[name].append((time.perf_counter() - began) * 1e3)
    ratios = np.array(times["a"]) / np.array(times["b"])
    p25, p50, p75 = (float(v) for v in np.percentile(ratios, [25, 50, 75]))
    return Pair(Times.of(times["a"]), Times.of(times["b"]), p50, p25, p75)
