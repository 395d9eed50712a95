"""How far an engine's percentages can be believed: the record that a bundle carries, read back and put into words.

Hides the layout of the record (`details` of the confidence gate, `appliance/compiler/confidence.py`) and the versions of it: a
bundle that was compiled before there were bins has none, and what it lacks is said. A bundle may come from a stranger, so what
does not fit is a reason in words, never an exception. docs/confidence.md says how a reliability diagram is to be read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

MAX_HEADS = 64
MAX_BINS = 100
MAX_TEXT = 300
PROMISED = 0.9  # share of the truths that a set of plausible classes is made to hold
NOT_JUDGED = "no gate judged how far this engine's percentages can be believed"
NO_BINS = "the bundle was compiled before reliability diagrams were recorded"
UNREADABLE = "the bundle's record of it cannot be read"
# What the answer of a head is called, one and many. A head without a name here answers with a class.
ANSWERS = {"pfirrmann": ("grade", "grades")}


def percent(share: float) -> str:
    """0.804 -> "80 %"."""
    return f"{100 * share:.0f} %"


@dataclass(frozen=True)
class Share:
    """A share in [0, 1] with its 95 % interval, where it has one."""

    value: float
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            return percent(self.value)
        return f"{percent(self.value)} (95 % interval {100 * self.low:.0f} to {percent(self.high)})"


@dataclass(frozen=True)
class Bin:
    """The answers that were about equally sure: how many, how sure on average, and the share that was right."""

    count: int
    confidence: float
    observed: Share


@dataclass(frozen=True)
class Head:
    """One head of one engine on the patients that it was judged on; shares in [0, 1].

    `kind` "softmax": one class of several, sure of the most probable one. "sigmoid": yes or no, sure of yes. `before` is at
    temperature 1, `after` at a temperature that other patients set; no bins where the bundle records none. `chance` is the calibration
    error that one perfect network in twenty would exceed on so few answers.
    """

    name: str
    kind: Literal["softmax", "sigmoid"]
    samples: str
    count: int
    patients: int
    temperature: float
    error_before: Share
    error: Share
    chance: float
    before: tuple[Bin, ...] = ()
    after: tuple[Bin, ...] = ()

    @property
    def words(self) -> list[str]:
        """What the diagram says, in sentences."""
        out = [self._of(b) for b in self._telling()]
        if self.after:
            sure = sum(b.count * b.confidence for b in self.after) / sum(b.count for b in self.after)
            share = sum(b.count * b.observed.value for b in self.after) / sum(b.count for b in self.after)
            said = f"it was {percent(sure)} sure on average, and right in {percent(share)}."
            if self.kind == "sigmoid":
                said = f"it gave {percent(sure)} for {self.name} on average, and {percent(share)} had it."
            out.append(f"Over all {self.count} {self.samples} of {self.patients} patients {said}")
        what = f"percentages for {self.name}" if self.kind == "sigmoid" else "percentages"
        off = f"Its {what} are off by {100 * self.error.value:.0f} points on average"
        if self.error.low is not None and self.error.high is not None:
            off += f" (95 % interval {100 * self.error.low:.0f} to {100 * self.error.high:.0f})"
        off += f", {100 * self.error_before.value:.0f} before they were corrected."
        return [*out, f"{off} So few {self.samples} show up to {100 * self.chance:.0f} points even where every percentage is true."]

    def _telling(self) -> list[Bin]:
        """The fullest bin, and for yes or no the fullest on either side of one half."""
        high, low = ([b for b in self.after if (b.confidence >= 0.5) is yes] for yes in (True, False))
        sides = [list(self.after)] if self.kind == "softmax" else [high, low]
        return [max(side, key=lambda b: b.count) for side in sides if side]

    def _of(self, found: Bin) -> str:
        one, _ = ANSWERS.get(self.name, ("class", "classes"))
        about = percent(found.confidence)
        if self.kind == "softmax":
            return f"Of the {found.count} {self.samples} of whose {one} it was about {about} sure, it was right in {found.observed}."
        return f"Of the {found.count} {self.samples} to which it gave about {about} for {self.name}, {found.observed} had it."


@dataclass(frozen=True)
class Sets:
    """Sets of plausible classes, made to hold the true one in PROMISED of the cases: how often they did, and how many they hold."""

    answers: tuple[str, str]
    coverage: Share
    mean_size: float
    count: int
    patients: int
    samples: str

    @property
    def words(self) -> str:
        one, many = self.answers
        return (
            f"The sets of plausible {many} are made to hold the true {one} in {percent(PROMISED)} of {self.samples}. They held it in "
            f"{self.coverage} of {self.count} {self.samples} of {self.patients} patients, with {self.mean_size:.1f} {many} in a set."
        )


@dataclass(frozen=True)
class FittedOn:
    """Whose answers temperatures and sets were fitted on.

    `who` "training": training patients, by networks that had not learnt from them, come by as `source` says; nothing was fitted on
    the patients that an engine was judged on. "judged": those patients themselves, each judged by what the others gave.
    """

    who: Literal["training", "judged"]
    samples: str
    count: int
    patients: int
    source: str = ""

    @property
    def words(self) -> str:
        if self.who == "judged":
            return (
                f"The corrections were fitted on the same {self.count} {self.samples} of {self.patients} patients; "
                "each patient is judged by what the others gave."
            )
        return (
            f"The corrections come from {self.count} {self.samples} of {self.patients} training patients, each answered by a network that "
            f"had not learnt from the patient ({self.source}). Nothing was fitted on the patients that the engine was judged on."
        )


@dataclass(frozen=True)
class Reliability:
    """All that a bundle records of one engine; no heads where `reason` says why. `reason` may stand beside heads without bins."""

    heads: tuple[Head, ...] = ()
    sets: Sets | None = None
    fitted_on: FittedOn | None = None
    reason: str = ""

    @property
    def words(self) -> list[str]:
        out = [w for h in self.heads for w in h.words]
        return [*out, *([self.sets.words] if self.sets else []), *([self.fitted_on.words] if self.fitted_on else [])]

    def to_json(self) -> dict[str, Any]:
        """The same as JSON, each part with its `words`."""
        fitted = self.fitted_on
        return {
            "heads": [asdict(h) | {"words": h.words} for h in self.heads],
            "sets": asdict(self.sets) | {"words": self.sets.words} if self.sets else None,
            "fitted_on": asdict(fitted) | {"words": fitted.words} if fitted else None,
            "reason": self.reason,
        }


def of_engine(engine: Mapping[str, Any]) -> Reliability:
    """What the manifest's entry of one engine says; never raises for what a stranger wrote there."""
    verdict = next((v for v in engine.get("verdicts", ()) if v.get("gate") == "confidence"), None)
    if verdict is None:
        return Reliability(reason=NOT_JUDGED)
    if verdict["passed"] is None:
        return Reliability(reason=_text(verdict["note"]))
    try:
        details = verdict["details"]
        samples = _text(details.get("samples", "samples"))
        conformal = details.get("conformal")
        # A record without kinds is of one head of classes, the only kind that has sets, and then of heads of yes or no.
        kinds = ["softmax" if conformal else "sigmoid", *["sigmoid"] * MAX_HEADS]
        heads = tuple(_head(row, samples, kind) for row, kind in zip(details["heads"][:MAX_HEADS], kinds, strict=False))
        sets = _sets(conformal["int8"], heads[0]) if conformal else None
        return Reliability(heads, sets, _fitted_on(details.get("fitted_on"), heads[0]), "" if any(h.after for h in heads) else NO_BINS)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError):
        return Reliability(reason=UNREADABLE)


def engines(models: Mapping[str, Any], used: Mapping[str, str]) -> list[dict[str, Any]]:
    """As JSON: of each model of a manifest (`models`) the engine in use (`used`, model to backend), with its Reliability."""
    return [
        {
            "model": name,
            "version": models[name]["version"],
            "backend": backend,
            "precision": models[name]["engines"][backend]["precision"],
            "measured_on": models[name]["metrics"]["source"],
            "reliability": of_engine(models[name]["engines"][backend]).to_json(),
        }
        for name, backend in used.items()
        if backend in models.get(name, {}).get("engines", {})
    ]


def _head(row: Mapping[str, Any], samples: str, usual: str) -> Head:
    found = row["int8"]
    bins = row.get("bins") or {}
    kind = row.get("kind", usual)
    if kind not in ("softmax", "sigmoid"):
        raise ValueError(kind)
    return Head(
        _text(found["name"]),
        kind,
        samples,
        _count(found["samples"]),
        _count(found["patients"]),
        _number(found["temperature"], 1e6),
        Share(_number(found["ece_before"]), _maybe(found.get("ece_before_low")), _maybe(found.get("ece_before_high"))),
        Share(_number(found["ece"]), _maybe(found["low"]), _maybe(found["high"])),
        _number(found["ece_chance"]),
        _bins(bins.get("before", ())),
        _bins(bins.get("after", ())),
    )


def _bins(found: Sequence[Mapping[str, Any]]) -> tuple[Bin, ...]:
    return tuple(
        Bin(_count(b["count"]), _number(b["confidence"]), Share(_number(b["observed"]), _number(b["low"]), _number(b["high"])))
        for b in found[:MAX_BINS]
    )


def _sets(found: Mapping[str, Any], head: Head) -> Sets:
    share = Share(_number(found["coverage"]), _maybe(found["low"]), _maybe(found["high"]))
    answers = ANSWERS.get(head.name, ("class", "classes"))
    return Sets(answers, share, _number(found["mean_size"], 1e6), head.count, head.patients, head.samples)


def _fitted_on(found: Mapping[str, Any] | None, head: Head) -> FittedOn:
    if found is None:  # a record that does not say is of before there was another way
        return FittedOn("judged", head.samples, head.count, head.patients)
    who = found["who"]
    if who not in ("training", "judged"):
        raise ValueError(who)
    source = _text(found["source"]) if who == "training" else ""
    return FittedOn(who, head.samples, _count(found["samples"]), _count(found["patients"]), source)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(type(value))
    return "".join(c if c.isprintable() else "?" for c in value)[:MAX_TEXT]


def _count(value: Any) -> int:
    if type(value) is not int or not 0 < value < 1 << 53:
        raise ValueError(value)
    return value


def _number(value: Any, most: float = 1.0) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or not 0 <= value <= most:
        raise ValueError(value)
    return float(value)


def _maybe(value: Any) -> float | None:
    return None if value is None else _number(value)
