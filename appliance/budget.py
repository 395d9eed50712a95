"""Time: how much a request was given, how much is left, and what is shed first when it is short.

Hides the clock. A `Deadline` is cut from a `Budget` when the first byte arrives; every stage asks the deadline, none reads the
clock itself. The ladder sheds the heatmap first, then the masks, never detection, and below that refuses.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field

from appliance.errors import UsageError

RUNGS: tuple[str, ...] = ("full", "no-heatmap", "detection-only")
SHED: dict[str, tuple[str, ...]] = {
    "full": (),
    "no-heatmap": ("heatmap",),
    "detection-only": ("heatmap", "masks", "grades"),
}
# What a request may ask for by name, and what each rung brings of it.
PARTS: tuple[str, ...] = ("detect", "segment", "heatmap")
BRINGS: dict[str, tuple[str, ...]] = {"full": PARTS, "no-heatmap": ("detect", "segment"), "detection-only": ("detect",)}


@dataclass(frozen=True)
class Wanted:
    """What an answer must have and what it may have beside it, of PARTS. Detection is always had, and a heatmap comes with the
    outlines that it is laid over. Raises UsageError for a part that there is not."""

    must: tuple[str, ...] = ("detect",)
    may: tuple[str, ...] = PARTS

    def __post_init__(self) -> None:
        for part in (*self.must, *self.may):
            if part not in PARTS:
                raise UsageError("an answer has no such part", value=part, remedy=f"must and may take {', '.join(PARTS)}.")

    @classmethod
    def of(cls, must: Iterable[str] | None, may: Iterable[str] | None) -> Wanted:
        """None is the default of each: detection must be, everything else may."""
        return cls(cls.must if must is None else tuple(must), cls.may if may is None else tuple(may))

    def rungs(self) -> tuple[str, ...]:
        """The rungs that answer this, richest first; never none."""
        must, may = self._whole(self.must), self._whole((*self.must, *self.may))
        return tuple(r for r in RUNGS if must <= set(BRINGS[r]) <= may)

    @staticmethod
    def _whole(parts: Iterable[str]) -> set[str]:
        return {p for p in PARTS if p == "detect" or p in parts or (p == "segment" and "heatmap" in parts)}


@dataclass(frozen=True)
class Budget:
    """Milliseconds from the first byte received to the answer ready to be sent. 0 < total_ms <= 600 000."""

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
