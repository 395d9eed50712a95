"""Frontal (AP or PA) radiograph of the spine: vertebrae, curves with Cobb angles, severity, the picture's class with its map.

    pixels -> normalise -+-> letterbox -> spine_class -> familiar? -> class, CAM
                         +-> letterbox -> vertebra_ap -> column -> line through the centres -> tilts -> curves

Nothing is answered about a picture unlike those that the networks learnt from, whatever its header says: the classifier's own
pooled channels tell, so the gate costs no inference of its own and is never shed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, cast

import numpy as np
from numpy.typing import NDArray

from appliance.errors import SpineNotFound, WrongModality
from appliance.protocols import Bench
from appliance.report import Curve, Finding, Frontal, Heatmap, Line, Measurement, Omission, Report
from appliance.study import Instance
from kernels import cobb
from kernels.heatmap import positive_unit
from kernels.preprocess import letterbox, normalise
from models import familiarity, spine_class, vertebra_ap

NAME = "spine-xray-ap"
READS = "frontal radiographs of the spine"
MODALITIES: tuple[str, ...] = ("CR", "DX")
FAMILIES: tuple[str, ...] = ("vertebra_ap", "spine_class")
# The class comes out of the gate's own inference, so below the heatmap there is nothing left to shed.
PATHS: Mapping[str, tuple[str, ...]] = {
    "full": ("detect", "explain"),
    "no-heatmap": ("detect", "close"),
    "detection-only": ("detect", "close"),
}

# Measured on the choosing part of the training pictures: a column has at least 11 boxes of this score and scatters by at most .14
# of a box's height; sagittal MRI of training patients that passes the gate has at most 8 such boxes.
SURE_SCORE = 0.30
LEAST_SURE = 4  # where the header says radiograph; lumbar views show five vertebrae
LEAST_SURE_UNSTATED = 9  # where nobody says it
LARGEST_SCATTER = 0.25
CURVE_DEG = 10.0  # scoliosis begins here; smaller ones are told only where there is no larger
# Apex, counted from the lowest vertebra as if that were L5: L5..T12, T11..T6, T5 and above (Lenke et al., JBJS 83-A, 2001).
REGIONS = ((6, "thoracolumbar or lumbar"), (12, "main thoracic"), (99, "proximal thoracic"))
NAMING = (
    "Vertebrae are numbered from the lowest one found. Levels are not named: nothing in these boxes tells L5 from L4. "
    "Regions of curves count as if the lowest were L5. Left and right are sides of the picture, which does not say how it is hung."
)


def check(instance: Instance) -> None:
    """Raises WrongModality for a radiograph that its header says was not taken from the front or the back."""
    if instance.modality is not None and instance.view not in (None, "AP", "PA"):
        raise WrongModality(
            "of radiographs, this bundle reads frontal views of the spine only", value=instance.view, remedy="Send an AP or PA view."
        )


def rung_ms(expected_ms: Mapping[str, float]) -> dict[str, float]:
    both = expected_ms["vertebra_ap"] + expected_ms["spine_class"] + 15.0
    return {"full": both + 10.0, "no-heatmap": both, "detection-only": both}


def run(bench: Bench, instance: Instance, rung: str) -> Report:
    """Raises SpineNotFound, BackendFailed."""
    clock = bench.clock
    with clock.stage("preprocess"):
        normalised = normalise(instance.pixels)
        x, back = letterbox(normalised, spine_class.SPEC.input_hw)
    with clock.stage("spine_class"):
        classed = bench.infer("spine_class", x)
    with clock.stage("decode"):
        _require_familiar(classed["pooled"])
        temperature = bench.confidence("spine_class").temperatures.get("class", 1.0)
        found = spine_class.decode(classed["logits"], temperature)[0]
    with clock.stage("preprocess"):
        x, back_boxes = letterbox(normalised, vertebra_ap.SPEC.input_hw)
    with clock.stage("vertebra_ap"):
        detected = bench.infer("vertebra_ap", x)
    with clock.stage("decode"):
        decoded = vertebra_ap.decode(detected)
        boxes, scores = back_boxes.boxes_to_source(decoded.boxes), decoded.scores
        boxes, scores = column(boxes, scores)
    with clock.stage("measure"):
        line = column_line(boxes, scores, instance.spacing_mm, stated=instance.modality is not None)
        curves = _told(cobb.curves(line)) if line is not None else ()
    rung = bench.go_on("detect", rung)
    heatmaps: list[Heatmap] = []
    if rung == "full":
        with clock.stage("heatmap"):
            values, reason = bench.cam("spine_class", classed, spine_class.SPEC.classes.index(found.name))
            layer = spine_class.SPEC.heatmap_layer
            heatmaps.append(
                Heatmap("cam", layer, found.name, None if values is None else back.map_to_source(values), "spine_class", reason)
            )
            evidence = back_boxes.map_to_source(positive_unit(detected[vertebra_ap.SPEC.outputs[0]][0, 0]))
            heatmaps.append(Heatmap("class-evidence", vertebra_ap.SPEC.heatmap_layer, "vertebra", evidence, "vertebra_ap"))
    count = len(boxes)
    frontal = Frontal(
        tuple(_curve(c, count) for c in curves),
        cast(Literal["none", "mild", "moderate", "severe"], cobb.severity(curves)) if line is not None else None,
        dict(zip(spine_class.SPEC.classes, found.probabilities, strict=True)),
    )
    return Report(
        status="partial" if any(h.values is None for h in heatmaps) else "complete",
        protocol=NAME,
        source=instance.source,
        findings=tuple(Finding("vertebra", float(scores[i]), _box(boxes[i]), count - i) for i in range(count - 1, -1, -1)),
        heatmaps=tuple(heatmaps),
        naming=NAMING,
        notes=(*instance.notes, *_doubts(frontal)),
        measurements=tuple(
            Measurement("cobb_angle", c.angle_deg, "deg", _plates(line, boxes, c, instance.spacing_mm), _where(_curve(c, count)))
            for c in curves
            if line is not None
        ),
        omitted=()
        if line is not None
        else (Omission("cobb_angle", f"{count} vertebrae stand in one column; an angle needs {cobb.LEAST_VERTEBRAE}"),),
        frontal=frontal,
    )


def _require_familiar(pooled: NDArray[np.float32]) -> None:
    known = familiarity.read()
    distance = float(known.distance(pooled)[0])
    if not known.known(pooled):
        raise SpineNotFound(
            "the picture is unlike the radiographs of spines that the networks learnt from",
            value=f"distance {distance:.2f}, at most {known.limit:.2f}",
            remedy="Send a frontal radiograph of the spine, uncut and without writing over it.",
        )


def _scale(spacing_mm: tuple[float, float] | None) -> NDArray[np.float64]:
    """Millimetres for a pixel in x and y; square where the source states none."""
    row, column = spacing_mm or (1.0, 1.0)
    return np.array([column, row])


def column(boxes: NDArray[np.float32], scores: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Boxes and scores of the vertebrae that stand in one column, from the top down."""
    kept = cobb.column(boxes, scores)
    return boxes[kept], scores[kept]


def column_line(
    boxes: NDArray[np.float32], scores: NDArray[np.float32], spacing_mm: tuple[float, float] | None, stated: bool
) -> cobb.Line | None:
    """The line through a column's centres, None where they are too few. Raises SpineNotFound where they are no column.

    `stated`: the header says that this is a radiograph.
    """
    sure, least = int((scores >= SURE_SCORE).sum()), LEAST_SURE if stated else LEAST_SURE_UNSTATED
    if sure < least:
        raise SpineNotFound(
            f"{sure} sure vertebrae stand in one column, {least} are needed",
            value=sure,
            remedy="Send a frontal radiograph of the spine, as DICOM if you have it: a picture that says what it is needs to show less.",
        )
    if len(boxes) < cobb.LEAST_VERTEBRAE:
        return None
    scale = _scale(spacing_mm)
    line = cobb.fit((boxes[:, :2] + boxes[:, 2:]) / 2 * scale)
    tall = float(np.median(boxes[:, 3] - boxes[:, 1])) * scale[1]
    if line.scatter > LARGEST_SCATTER * tall:
        raise SpineNotFound(
            "the vertebrae that were found stand in no column",
            value=f"scatter {line.scatter / tall:.2f} of their height",
            remedy="Send a frontal radiograph of the whole spine.",
        )
    return line


def _told(found: Sequence[cobb.Curve]) -> tuple[cobb.Curve, ...]:
    large = tuple(c for c in found if c.angle_deg >= CURVE_DEG)
    return large or tuple(sorted(found, key=lambda c: -c.angle_deg)[:1])


def _curve(found: cobb.Curve, count: int) -> Curve:
    """Indices from the top become numbers from the lowest vertebra."""
    apex = count - found.apex
    region = next(name for limit, name in REGIONS if apex <= limit)
    side = cast(Literal["left", "right"], found.convex)
    return Curve(region, count - found.upper, apex, count - found.lower, found.angle_deg, found.margin_deg, side)


def _where(curve: Curve) -> str:
    return f"{curve.region}, vertebrae {curve.upper} to {curve.lower}, apex {curve.apex}, convex to the {curve.convex} of the picture"


def _plates(line: cobb.Line, boxes: NDArray[np.float32], curve: cobb.Curve, spacing_mm: tuple[float, float] | None) -> tuple[Line, ...]:
    """Upper plate of the upper end vertebra and lower plate of the lower one, in source pixels, towards the curve's hollow side,
    where they meet."""
    out: list[Line] = []
    scale = _scale(spacing_mm)
    for index, sign in ((curve.upper, -1.0), (curve.lower, 1.0)):
        tilt = np.deg2rad(line.tilt_deg[index])
        right, down = np.array([np.cos(tilt), -np.sin(tilt)]), np.array([np.sin(tilt), np.cos(tilt)])
        wide, tall = (boxes[index, 2:] - boxes[index, :2]) * scale
        # An upright box around a tilted vertebra is taller than the vertebra; half of what the tilt adds lies above it.
        height = max(0.5 * tall, tall - abs(np.sin(tilt)) * wide)
        middle = line.points[index] + sign * down * height / 2
        sides = (-1, 1) if curve.convex == "left" else (1, -1)
        ends = [(middle + side * 0.75 * wide * right) / scale for side in sides]
        out.append(((float(ends[0][0]), float(ends[0][1])), (float(ends[1][0]), float(ends[1][1]))))
    return tuple(out)


def _doubts(frontal: Frontal) -> list[str]:
    """Where the two ways to the answer disagree, the reader is told."""
    if frontal.severity is None:
        return []
    largest = max((c.angle_deg for c in frontal.curves), default=0.0)
    curved = frontal.severity != "none"
    if frontal.name == "scoliosis" and not curved:
        return [f"The picture is classed as scoliosis, but no curve of {CURVE_DEG:.0f} degrees was measured: look at both."]
    if frontal.name == "normal" and curved:
        return [f"The picture is classed as normal, but a curve of {largest:.0f} degrees was measured: look at both."]
    return []


def _box(values: NDArray[np.float32]) -> tuple[float, float, float, float]:
    x0, y0, x1, y1 = (float(v) for v in values)
    return (x0, y0, x1, y1)
