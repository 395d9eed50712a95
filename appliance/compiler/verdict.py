"""Verdict: what one gate said of one engine. Every gate answers in these, so that a table, a bundle and a refusal agree."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Gate = Literal["task", "heatmap", "confidence", "golden", "parity", "latency", "float"]


@dataclass(frozen=True)
class Verdict:
    """`passed` None says that the gate could not judge; `note` says why, or what it saw.

    `value` is what is limited, `low` and `high` its 95 % interval where it has one, `limit` the bound that it is held to.
    `details` holds the rest of the evidence as JSON.
    """

    gate: Gate
    passed: bool | None
    note: str
    value: float | None = None
    low: float | None = None
    high: float | None = None
    limit: float | None = None
    details: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def refusals(verdicts: Iterable[Verdict]) -> list[str]:
    """One line for each gate that refused, naming it."""
    return [f"{v.gate} gate: {v.note}" for v in verdicts if v.passed is False]
