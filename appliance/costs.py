"""What work costs on this device, and whether that can still be believed.

Hides windows, quantiles and the test for drift. A cost is kept for each (engine, shape, threads, stage); a prediction is the 99th
percentile of what was last seen, times the inflation that drift has earned. Predictions are judged against what then happened: more
misses than chance allows raise the inflation and an alarm, time takes them back.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from appliance.errors import CostsInvalid

WINDOW = 512  # last times of each cost
AGE_S, FRESH = 60.0, 32  # times older than this are forgotten, as long as so many are younger
HALF_LIFE_S = 10.0  # of an inflation: by then the window has the slow times in it
QUANTILE = 0.99
FEWEST = 5  # times below which nothing is predicted
JUDGED = 200  # last predictions that the test for drift looks at
CHANCE = 1e-3  # of a false alarm each time it is asked
STEP, MOST = 1.25, 8.0  # of the inflation
LEAST_RAISED = 1.02  # less is none
MOST_KEYS = 512
MOST_BYTES = 1 << 22
VERSION = 2


@dataclass(frozen=True, order=True)
class Key:
    """What was timed: a stage ("detector", "decode", "render") of work of one shape on one engine with so many threads."""

    stage: str
    engine: str = ""
    shape: tuple[int, ...] = ()
    threads: int = 0

    def to_json(self) -> list[Any]:
        return [self.stage, self.engine, list(self.shape), self.threads]


@dataclass
class _Cost:
    times_ms: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    seen_s: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))  # when each was
    misses: deque[bool] = field(default_factory=lambda: deque(maxlen=JUDGED))
    p99_ms: float | None = None  # of these times, once it was asked for
    raised: float = 1.0  # the inflation at `raised_s`
    raised_s: float = 0.0

    def add(self, ms: float, now_s: float) -> None:
        self.times_ms.append(ms)
        self.seen_s.append(now_s)
        while len(self.times_ms) > FRESH and now_s - self.seen_s[0] > AGE_S and now_s - self.seen_s[-FRESH] <= AGE_S:
            self.times_ms.popleft()
            self.seen_s.popleft()
        self.p99_ms = None

    def quantile_ms(self, q: float) -> float:
        ordered = sorted(self.times_ms)
        return ordered[min(len(ordered) - 1, math.ceil(q * len(ordered)) - 1)]

    def usual_worst_ms(self) -> float:
        """The 99th percentile. Plans ask for it a dozen times for each request."""
        if self.p99_ms is None:
            self.p99_ms = self.quantile_ms(QUANTILE)
        return self.p99_ms

    def inflation(self, now_s: float) -> float:
        """What drift has earned, fading: a cost that is too high is not chosen, and so would never be seen to have fallen."""
        fading = 1.0 + (self.raised - 1.0) * 0.5 ** (max(0.0, now_s - self.raised_s) / HALF_LIFE_S)
        return fading if fading > LEAST_RAISED else 1.0


def at_least(misses: int, of: int, rate: float) -> float:
    """P(X >= misses) of a binomial with `of` trials of probability `rate`, exact."""
    if misses <= 0:
        return 1.0
    below = math.fsum(math.comb(of, k) * rate**k * (1 - rate) ** (of - k) for k in range(misses))
    return max(0.0, 1.0 - below)


class CostModel:
    """Times by key, and predictions from them. `slowed` is by how much heat or a cap slowed the device when they were first taken.
    Not thread-safe: its owner has a lock. `clock` is monotonic, in seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.slowed = 1.0
        self._costs: dict[Key, _Cost] = {}

    def observe(self, key: Key, ms: float) -> None:
        """One time in ms. Raises ValueError for one that is no time; a key beyond MOST_KEYS takes the place of the oldest."""
        if not (math.isfinite(ms) and ms >= 0):
            raise ValueError(f"{ms} is no time in milliseconds")
        if key not in self._costs:
            while len(self._costs) >= MOST_KEYS:
                self._costs.pop(next(iter(self._costs)))
            self._costs[key] = _Cost()
        self._costs[key].add(ms, self._clock())

    def known(self, key: Key) -> bool:
        return key in self._costs and len(self._costs[key].times_ms) >= FEWEST

    def p50_ms(self, key: Key) -> float:
        """The median of the window. Raises KeyError where fewer than FEWEST times are known."""
        return self._cost(key).quantile_ms(0.5)

    def p99_ms(self, key: Key) -> float:
        """The 99th percentile of the window, as measured. Raises KeyError where fewer than FEWEST times are known."""
        return self._cost(key).usual_worst_ms()

    def predicted_ms(self, key: Key) -> float:
        """What a plan should count with: the 99th percentile times the inflation. Raises KeyError as `p99_ms`."""
        cost = self._cost(key)
        return cost.usual_worst_ms() * cost.inflation(self._clock())

    def judge(self, key: Key, predicted_ms: float, ms: float) -> bool:
        """Keep whether a prediction held, and the time itself. True where this miss was one too many: the cost was inflated.

        Under a right 99th percentile a miss has probability .01; the alarm is raised where that many misses among the last JUDGED
        would come by chance less often than CHANCE (one-sided exact binomial test). The misses are then forgotten: the inflated
        prediction is judged by its own. The inflation fades, with a half-life of HALF_LIFE_S; by then the window has the slow times in it.
        """
        self.observe(key, ms)
        cost, now_s = self._costs[key], self._clock()
        missed = ms > predicted_ms
        cost.misses.append(missed)
        if missed and at_least(sum(cost.misses), len(cost.misses), 1 - QUANTILE) < CHANCE:
            cost.raised, cost.raised_s = min(MOST, cost.inflation(now_s) * STEP), now_s
            cost.misses.clear()
            return True
        return False

    def alarms(self) -> dict[Key, float]:
        """Costs that are inflated now, with the factor."""
        now_s = self._clock()
        return {key: factor for key, cost in self._costs.items() if (factor := cost.inflation(now_s)) > 1.0}

    def measured(self) -> tuple[Key, ...]:
        return tuple(self._costs)

    def _cost(self, key: Key) -> _Cost:
        if not self.known(key):
            raise KeyError(f"no cost is known of {key}")
        return self._costs[key]

    # -- kept over a restart ------------------------------------------------------------------------------------------

    def save(self, path: Path, device: str) -> None:
        """Write the windows, whole or not at all; `device` names the machine, bundle and threads that they hold for."""
        costs = [
            {"key": key.to_json(), "times_ms": [round(t, 4) for t in c.times_ms], "inflation": c.inflation(self._clock())}
            for key, c in self._costs.items()
        ]
        part = path.with_suffix(".part")
        with part.open("w") as f:
            json.dump({"version": VERSION, "device": device, "slowed": self.slowed, "costs": costs}, f)
            f.flush()
            os.fsync(f.fileno())
        part.replace(path)

    @classmethod
    def load(cls, path: Path, device: str) -> CostModel:
        """The costs kept for `device`; none where the file is absent or of another device. Raises CostsInvalid for a broken one."""
        model = cls()
        if not path.exists():
            return model
        try:
            if path.stat().st_size > MOST_BYTES:
                raise ValueError("too large")
            found = json.loads(path.read_bytes())
            if found["version"] != VERSION or found["device"] != device:
                return model
            model.slowed = max(1.0, float(found["slowed"]))
            model._fill(found["costs"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise CostsInvalid("the kept costs cannot be read", value=f"{path}: {error}") from error
        return model

    def _fill(self, costs: Iterable[Mapping[str, Any]]) -> None:
        for item in costs:
            stage, engine, shape, threads = item["key"]
            key = Key(str(stage), str(engine), tuple(int(n) for n in shape), int(threads))
            for ms in item["times_ms"]:
                self.observe(key, float(ms))
            inflation = float(item["inflation"])
            if key in self._costs and 1.0 <= inflation <= MOST:
                self._costs[key].raised, self._costs[key].raised_s = inflation, self._clock()
