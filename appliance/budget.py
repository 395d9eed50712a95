"""Time: how much a request was given, how much is left, and what is shed first when it is short.

Hides the clock. A `Deadline` is cut from a `Budget` when the bytes arrive; every stage asks the deadline, none reads the
clock itself. The ladder sheds the heatmap first, then the masks, never detection, and below that refuses.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

RUNGS: tuple[str, ...] = ("full", "no-heatmap", "detection-only")
SHED: dict[str, tuple[str, ...]] = {
    "full": (),
    "no-heatmap": ("heatmap",),
    "detection-only": ("heatmap", "masks", "grades"),
}


@dataclass(frozen=True)
class Budget:
    """Milliseconds from the last byte received to the answer ready to be sent. 0 < total_ms <= 600 000."""

    total_ms: float = 3000.0

    def __post_init__(self) -> None:
        if not 0 < self.total_ms <= 600_000:
            raise ValueError(f"total_ms must lie in (0, 600000], not {self.total_ms}")

    def start(self) -> Deadline:
        return Deadline(self)


@dataclass(frozen=True)
class Deadline:
    """A started budget. `started_s` is on the monotonic clock."""

    budget: Budget
    started_s: float = field(default_factory=time.monotonic)

    def elapsed_ms(self) -> float:
        return (time.monotonic() - self.started_s) * 1e3

    def left_ms(self) -> float:
        return self.budget.total_ms - self.elapsed_ms()


def choose_rung(left_ms: float, expected_ms: dict[str, float]) -> str | None:
    """The richest rung whose expected time (ms, measured on this device) fits `left_ms`; None where none does."""
    for rung in RUNGS:
        if expected_ms[rung] <= left_ms:
            return rung
    return None
