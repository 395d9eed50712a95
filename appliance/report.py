"""The answer: what was found, how sure, where, and why. The JSON form is a public contract, docs/report.schema.json.

Coordinates are source pixels (x to the right, y down, edges: a box over a whole W x H image is [0, 0, W, H]) and, where
the source states its spacing, millimetres from the same corner. Arrays stay out of the JSON; `render` draws them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

REPORT_VERSION = "1"
DISCLAIMER = "Research use only. Not for diagnosis."

Status = Literal["complete", "partial", "refused"]
Box = tuple[float, float, float, float]
Line = tuple[tuple[float, float], tuple[float, float]]


@dataclass(frozen=True)
class Measurement:
    """One number with its unit and where it was taken: name such as "disc_height"; docs/measurements.md defines each.

    `unit` is "mm", "mm2", "px", "px2", "ratio", "%", "deg" or "grade".
    `lines_px` are the straight lines that it was taken between or along, as ((x0, y0), (x1, y1)) in source pixels, empty
    where it has none (an area). `where` says in words what they join, where the name alone does not.
    """

    name: str
    value: float
    unit: str
    lines_px: tuple[Line, ...] = ()
    where: str = ""

    def to_json(self) -> dict[str, Any]:
        lines = [[[round(x, 2), round(y, 2)] for x, y in line] for line in self.lines_px]
        return {"name": self.name, "value": round(self.value, 3), "unit": self.unit, "lines_px": lines, "where": self.where}

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Measurement:
        """What `to_json` made; lines and place may be missing, as in what an earlier version kept. Raises KeyError, ValueError."""
        lines = tuple(((a, b), (c, d)) for (a, b), (c, d) in found.get("lines_px", ()))
        return cls(found["name"], found["value"], found["unit"], lines, found.get("where", ""))


@dataclass(frozen=True)
class Omission:
    """A measurement that this image does not allow, and why: a sentence without a full stop."""

    name: str
    reason: str

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "reason": self.reason}


@dataclass(frozen=True)
class Curve:
    """One lateral curve of a frontal radiograph. `upper`, `apex`, `lower` are numbers of vertebra findings (1 is the lowest).

    `angle_deg` is the Cobb angle, `margin_deg` how far it may be off (95 %) by smoothing and the vertebrae's scatter.
    `convex` is the side of the picture that it bulges to; `region` counts the apex from the lowest vertebra found.
    """

    region: str
    upper: int
    apex: int
    lower: int
    angle_deg: float
    margin_deg: float
    convex: Literal["left", "right"]

    def to_json(self) -> dict[str, Any]:
        return {
            "region": self.region,
            "upper": self.upper,
            "apex": self.apex,
            "lower": self.lower,
            "angle_deg": round(self.angle_deg, 2),
            "margin_deg": round(self.margin_deg, 2),
            "convex": self.convex,
        }


@dataclass(frozen=True)
class Frontal:
    """What a frontal radiograph's report has beside its findings: curves from the top down, severity by the largest angle
    (None where no angle could be measured), and the class of the whole picture with the probability of each class."""

    curves: tuple[Curve, ...]
    severity: Literal["none", "mild", "moderate", "severe"] | None
    probabilities: dict[str, float]

    @property
    def name(self) -> str:
        """The most probable class."""
        return max(self.probabilities, key=lambda k: self.probabilities[k])

    def to_json(self) -> dict[str, Any]:
        return {
            "curves": [c.to_json() for c in self.curves],
            "severity": self.severity,
            "class": self.name,
            "probabilities": {k: round(v, 4) for k, v in self.probabilities.items()},
        }

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Frontal:
        """What `to_json` made. Raises KeyError, TypeError."""
        return cls(tuple(Curve(**c) for c in found["curves"]), found["severity"], dict(found["probabilities"]))


@dataclass(frozen=True)
class Pfirrmann:
    """Disc degeneration, grade 1 to 5; `probabilities` has five numbers that sum to 1. `plausible` grades hold the true one in nine
    discs of ten (conformal set); () where the bundle has no threshold for them. `basis` is what the expected grade consists of, in
    grades: that of the average disc, and what each thing that was looked at added; {} for the network alone."""

    grade: int
    probabilities: tuple[float, ...]
    plausible: tuple[int, ...] = ()
    basis: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        out = {"grade": self.grade, "probabilities": [round(p, 4) for p in self.probabilities], "plausible": list(self.plausible)}
        return {**out, "basis": {k: round(v, 3) for k, v in self.basis.items()}} if self.basis else out


@dataclass(frozen=True)
class Finding:
    """One structure. `level` is "L5/S1" for a disc, "L4" for a vertebra, or None where it cannot be told.

    `number` counts the structures of the same label from the lowest upwards, 1 first; it is a count, not a level.
    `flags` are probabilities in [0, 1] of "herniation", "narrowing", "bulging" (discs only).
    `outline_px` is a closed polygon, N x 2 (x, y) in source pixels, empty where masks were shed or none overlaps.
    """

    label: Literal["disc", "vertebra"]
    score: float
    box_px: Box
    number: int
    level: str | None = None
    pfirrmann: Pfirrmann | None = None
    flags: dict[str, float] = field(default_factory=dict)
    measurements: tuple[Measurement, ...] = ()
    outline_px: tuple[tuple[float, float], ...] = ()
    omitted: tuple[Omission, ...] = ()

    def to_json(self, spacing_mm: tuple[float, float] | None) -> dict[str, Any]:
        out: dict[str, Any] = {
            "label": self.label,
            "level": self.level,
            "number": self.number,
            "score": round(self.score, 4),
            "box_px": [round(v, 2) for v in self.box_px],
            "box_mm": None,
            "outline_px": [[round(x, 2), round(y, 2)] for x, y in self.outline_px],
            "measurements": [m.to_json() for m in self.measurements],
            "omitted": [o.to_json() for o in self.omitted],
        }
        if spacing_mm:
            row_mm, column_mm = spacing_mm
            x0, y0, x1, y1 = self.box_px
            out["box_mm"] = [round(v, 2) for v in (x0 * column_mm, y0 * row_mm, x1 * column_mm, y1 * row_mm)]
        if self.label == "disc":
            out["pfirrmann"] = self.pfirrmann.to_json() if self.pfirrmann else None
            out["flags"] = {k: round(v, 4) for k, v in self.flags.items()}
        return out


@dataclass(frozen=True)
class Heatmap:
    """Evidence for one target, H x W float32 in [0, 1] over the source pixels, or None where it is withheld.

    `kind`: "cam" (exact class activation map of a global-average-pool head) or "class-evidence" (logits of a dense head).
    `target` names what it is evidence for: "disc", "L4/L5 Pfirrmann 4". `reason` says why it is withheld.
    """

    kind: Literal["cam", "class-evidence"]
    layer: str
    target: str
    values: NDArray[np.float32] | None
    model: str = ""
    reason: str | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "layer": self.layer,
            "target": self.target,
            "model": self.model,
            "available": self.values is not None,
            "reason": self.reason,
        }


@dataclass(frozen=True)
class Mask:
    """Indexed mask in source pixels, H x W uint8: 0 background, 1 vertebra, 2 disc, 3 canal."""

    values: NDArray[np.uint8]
    classes: tuple[str, ...] = ("background", "vertebra", "disc", "canal")


@dataclass(frozen=True)
class Report:
    """Everything the appliance says about one image.

    `status` is "complete", "partial" (something was shed, see `shed`, or withheld, see `notes`) or "refused" (see
    `error`: code, message, value, remedy; then there are no findings, and their absence means nothing).
    `protocol` is "lumbar-mri-sagittal", or "spine-xray-ap", which alone has `frontal`; `weighting` "T1", "T2" or None where it
    cannot be told.
    `naming` says in words how levels were named or why not. `measurements` are of the whole column, `omitted` what of it could
    not be measured; those of one structure are in its finding. `rung`, `asked` and `shed` come from the ladder in `budget`: the rung
    that was reached, the one that was asked for, and what lies between, each with its reason in `shed_reasons`.
    `timing_ms` maps stage -> milliseconds; `engine` and `bundle` identify what computed it.
    """

    status: Status
    protocol: str
    source: dict[str, Any]
    findings: tuple[Finding, ...] = ()
    heatmaps: tuple[Heatmap, ...] = ()
    mask: Mask | None = None
    weighting: str | None = None
    naming: str = ""
    notes: tuple[str, ...] = ()
    rung: str = "full"
    shed: tuple[str, ...] = ()
    timing_ms: dict[str, float] = field(default_factory=dict)
    engine: dict[str, Any] = field(default_factory=dict)
    bundle: dict[str, Any] = field(default_factory=dict)
    error: dict[str, str] | None = None
    measurements: tuple[Measurement, ...] = ()
    omitted: tuple[Omission, ...] = ()
    frontal: Frontal | None = None
    asked: str = "full"
    shed_reasons: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        spacing = self.source.get("spacing_mm")
        return {
            "report_version": REPORT_VERSION,
            "disclaimer": DISCLAIMER,
            "status": self.status,
            "protocol": self.protocol,
            "weighting": self.weighting,
            "source": self.source,
            "naming": self.naming,
            "findings": [f.to_json(tuple(spacing) if spacing else None) for f in self.findings],
            "measurements": [m.to_json() for m in self.measurements],
            "omitted": [o.to_json() for o in self.omitted],
            "heatmaps": [h.to_json() for h in self.heatmaps],
            "notes": list(self.notes),
            "rung": self.rung,
            "asked": self.asked,
            "shed": list(self.shed),
            "shed_reasons": self.shed_reasons,
            "timing_ms": {k: round(v, 3) for k, v in self.timing_ms.items()},
            "engine": self.engine,
            "bundle": self.bundle,
            "error": self.error,
            "frontal": self.frontal.to_json() if self.frontal else None,
        }
