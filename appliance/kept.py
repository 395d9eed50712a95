"""An answer as files, and back: what is kept of a report beside its JSON.

Hides which arrays are packed where. The report's JSON has no arrays; with "evidence.png" beside it the whole report can be
made again, after a restart too, so that a picture is drawn when somebody asks for it: nobody's answer waits for pictures that nobody
looks at, and a picture with other switches needs no second inference and cannot differ from the first.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import cv2
import numpy as np
from numpy.typing import NDArray

from appliance import _png
from appliance.errors import JournalCorrupt
from appliance.report import Finding, Frontal, Heatmap, Mask, Measurement, Omission, Pfirrmann, Report

EVIDENCE = "evidence.png"
MAX_HEATMAPS = 32
NO_MASK = 255


class Render(Protocol):
    """The pictures of `appliance.render`, each a PNG; the module itself fits."""

    def base_png(self, instance: Any, max_side: int | None = None) -> bytes: ...

    def overlay_png(
        self,
        instance: Any,
        report: Report,
        *,
        boxes: bool = True,
        outlines: bool = True,
        grades: bool = True,
        measures: bool = True,
        heatmap: float = 0.45,
        max_side: int | None = None,
    ) -> bytes: ...

    def heatmap_png(self, report: Report, index: int) -> bytes: ...

    def labels_png(self, report: Report) -> bytes: ...


def pack(report: Report) -> bytes | None:
    """The report's arrays, one under the other, as one grey PNG: available heatmaps in steps of 1/255, then the mask.

    None where there is nothing to keep. A shed mask is a plane of NO_MASK, so that the number of planes is always known.
    """
    planes: list[NDArray[np.uint8]] = [
        np.rint(np.clip(h.values, 0.0, 1.0) * 255.0).astype(np.uint8) for h in report.heatmaps[:MAX_HEATMAPS] if h.values is not None
    ]
    if report.mask is not None:
        planes.append(report.mask.values)
    elif planes:
        planes.append(np.full_like(planes[0], NO_MASK))
    else:
        return None
    return _png.encode(np.concatenate(planes, axis=0))


def unpack(report_json: Mapping[str, Any], evidence: bytes | None) -> Report:
    """The report as it was given, its heatmaps rounded to 1/255. Raises JournalCorrupt where JSON and arrays disagree."""
    try:
        return _unpack(report_json, evidence)
    except (KeyError, TypeError, ValueError, AttributeError) as exc:
        raise JournalCorrupt("a kept report does not fit this version", value=exc) from exc


def _unpack(report: Mapping[str, Any], evidence: bytes | None) -> Report:
    wanted = sum(bool(h["available"]) for h in report["heatmaps"][:MAX_HEATMAPS])
    planes: list[NDArray[np.uint8]] = []
    if evidence is not None:
        stack = cv2.imdecode(np.frombuffer(evidence, dtype=np.uint8), cv2.IMREAD_GRAYSCALE)
        if stack is None or stack.shape[0] % (wanted + 1):
            raise ValueError("the evidence has another number of planes than the report")
        planes = [np.asarray(p, dtype=np.uint8) for p in np.split(np.asarray(stack), wanted + 1, axis=0)]
    elif wanted:
        raise ValueError("the evidence is missing")
    maps = iter(planes[:wanted])
    heatmaps = tuple(
        Heatmap(
            kind=h["kind"],
            layer=h["layer"],
            target=h["target"],
            values=next(maps).astype(np.float32) / np.float32(255) if h["available"] and index < MAX_HEATMAPS else None,
            model=h["model"],
            reason=h["reason"],
        )
        for index, h in enumerate(report["heatmaps"])
    )
    return Report(
        status=report["status"],
        protocol=report["protocol"],
        source=dict(report["source"]),
        findings=tuple(_finding(f) for f in report["findings"]),
        heatmaps=heatmaps,
        mask=Mask(planes[wanted]) if planes and planes[wanted].max() < NO_MASK else None,
        weighting=report["weighting"],
        naming=report["naming"],
        notes=tuple(report["notes"]),
        rung=report["rung"],
        shed=tuple(report["shed"]),
        timing_ms=dict(report["timing_ms"]),
        engine=dict(report["engine"]),
        bundle=dict(report["bundle"]),
        error=report["error"],
        measurements=tuple(Measurement.from_json(m) for m in report.get("measurements", ())),
        omitted=_omitted(report),
        asked=report.get("asked", "full"),
        shed_reasons=dict(report.get("shed_reasons", {})),
        frontal=Frontal.from_json(report["frontal"]) if report.get("frontal") else None,
    )


def _finding(found: Mapping[str, Any]) -> Finding:
    grade = found.get("pfirrmann")
    x0, y0, x1, y1 = found["box_px"]
    return Finding(
        label=found["label"],
        score=found["score"],
        box_px=(x0, y0, x1, y1),
        number=found["number"],
        level=found["level"],
        pfirrmann=Pfirrmann(grade["grade"], tuple(grade["probabilities"]), tuple(grade.get("plausible", ())), dict(grade.get("basis", {})))
        if grade
        else None,
        flags=dict(found.get("flags") or {}),
        measurements=tuple(Measurement.from_json(m) for m in found["measurements"]),
        outline_px=tuple((x, y) for x, y in found["outline_px"]),
        omitted=_omitted(found),
    )


def _omitted(found: Mapping[str, Any]) -> tuple[Omission, ...]:
    return tuple(Omission(o["name"], o["reason"]) for o in found.get("omitted", ()))
