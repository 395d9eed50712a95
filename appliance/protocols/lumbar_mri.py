"""Sagittal lumbar MRI: boxes, outlines, levels, measurements, and grades of the discs where the contrast allows them.

pixels -> normalise -> letterbox 384 -+-> detector  -> boxes -> levels -----+
                                      +-> segmenter -> outlines, evidence --+-> crops of T2 discs -> grader -> grades, CAM
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from appliance.errors import SpineNotFound, WrongModality
from appliance.measurements import PIXEL_NOTE, Key, Measured, Part, measure, not_outlined
from appliance.protocols import Bench
from appliance.report import Finding, Heatmap, Mask, Pfirrmann, Report
from appliance.study import Instance
from kernels import appearance
from kernels import mask as km
from kernels.fusion import rows
from kernels.heatmap import paste, positive_unit
from kernels.nms import iou_matrix
from kernels.preprocess import Letterbox, letterbox, normalise
from models import detector, grader, segmenter
from models.levels import DISC_LEVELS, RIVAL_SCORE, Column, name_levels

NAME = "lumbar-mri-sagittal"
READS = "sagittal lumbar MRI"
MODALITIES: tuple[str, ...] = ("MR",)
FAMILIES: tuple[str, ...] = ("detector", "segmenter", "grader")
PATHS: Mapping[str, tuple[str, ...]] = {
    "full": ("detect", "segment", "explain"),
    "no-heatmap": ("detect", "segment", "grade"),
    "detection-only": ("detect", "close"),
}
REMEDY = "Send a sagittal lumbar MRI slice near the midline; nothing in this image looks like a row of vertebrae and discs."

FINDING_SCORE = 0.30  # boxes below are not reported
SURE_SCORE = 0.50  # a spine needs some boxes above
LEAST_SURE = 3  # sure discs and vertebrae together
MOST_DISCS = 16  # graded at most: a bound on time
LEAST_AGREEMENT = 0.35  # share of sure boxes that the segmenter fills with the same structure
# A lateral radiograph saved as a picture has vertebrae and discs too, but no canal to see. Share of the column's rows that
# show one, measured: MRI >= .25 but for one slice (.05, 11 sure structures), 170 radiographs <= .16 (8 sure structures).
LEAST_CANAL, LITTLE_CANAL, MANY_SURE = 0.20, 0.02, 10
LEAST_GREYS = 16  # a mask or a diagram has fewer grey levels than any scan
T1_BELOW, T2_ABOVE = 0.70, 0.85  # median canal over median body; measured on 319 slices: T1 <= .61, T2 >= .95
# What a grade rests on, as a report calls it, by groups of `kernels.fusion.GROUPS`.
BASIS: dict[str, tuple[str, ...]] = {
    "network": ("network",),
    "neighbours": ("neighbours", "column"),
    "brightness": ("brightness",),
    "height": ("height",),
    "surroundings": ("canal", "end plates", "level"),
}
FUSED_NOTE = (
    "The grades rest on the network's view of each disc, on what was measured of it, and on the discs beside it; the heatmaps explain the "
    "network's part only."
)
ALONE_NOTE = "No fluid or marrow was seen to compare with: the network alone graded"
WORKING_SIDE = 1024  # pixels of the longer side on which outlines are separated


@dataclass(frozen=True)
class _Boxes:
    """Detections in source pixels, split by class."""

    discs: NDArray[np.float32]
    disc_scores: NDArray[np.float32]
    vertebrae: NDArray[np.float32]
    vertebra_scores: NDArray[np.float32]
    sacra: NDArray[np.float32]
    sacrum_scores: NDArray[np.float32]


def check(instance: Instance) -> None:
    """Raises WrongModality for a slice that its header says is not sagittal."""
    if instance.view in ("axial", "coronal"):
        raise WrongModality("this bundle reads sagittal slices only", value=instance.view, remedy="Send a sagittal slice.")


def rung_ms(expected_ms: Mapping[str, float]) -> dict[str, float]:
    """For a usual slice with eight discs."""
    e = expected_ms
    rest = 15.0  # preprocessing and decoding of a 512 x 512 slice, without rendering
    measuring = 23.0  # end plates and measurements of a usual column, and what its discs look like
    return {
        "full": e["detector"] + e["segmenter"] + 8 * e["grader"] + rest + measuring + 10.0,
        "no-heatmap": e["detector"] + e["segmenter"] + 8 * e["grader"] + rest + measuring,
        "detection-only": e["detector"] + rest,
    }


def run(bench: Bench, instance: Instance, rung: str) -> Report:
    """Raises SpineNotFound, BackendFailed."""
    clock = bench.clock
    with clock.stage("preprocess"):
        normalised = normalise(instance.pixels)
        x, back = letterbox(normalised, detector.SPEC.input_hw)
    with clock.stage("detector"):
        found = bench.infer("detector", x)
    with clock.stage("decode"):
        boxes = _split(detector.decode(found), back)
    rung = bench.go_on("detect", rung)
    mask: NDArray[np.uint8] | None = None
    evidence: NDArray[np.float32] | None = None
    if rung != "detection-only":
        with clock.stage("segmenter"):
            logits = bench.infer("segmenter", x)["logits"]
        with clock.stage("decode"):
            mask, evidence = segmenter.decode(logits, back)
    with clock.stage("decode"):
        _require_spine(boxes, mask, instance.pixels, stated=instance.modality is not None)
        column = name_levels(boxes.discs, boxes.vertebrae, boxes.sacra, boxes.sacrum_scores)
        structures = _structures(mask, instance.spacing_mm) if mask is not None else None
        weighting = instance.weighting or (_weighting(normalised, structures) if structures else None)
        regions = _regions(boxes, column, structures) if structures else {}
    measured: dict[Key, Measured] = {}
    whole = Measured()
    if structures:
        with clock.stage("measure"):
            canal = structures.mask == km.CANAL
            measured, whole = measure(_parts(column, regions), canal, structures.scale, instance.spacing_mm, instance.spacing_kind)
        rung = bench.go_on("segment", rung)
    notes: list[str] = list(instance.notes)
    if structures and instance.spacing_mm is None:
        notes.append(PIXEL_NOTE)
    grades: dict[int, grader.Grade] = {}
    heatmaps: list[Heatmap] = []
    if structures is None:
        notes.append("Grades need the outlines' contrast check; both were shed to keep the budget.")
    elif weighting == "T2":
        with clock.stage("grader"):
            grades, heatmaps, basis_notes = _grade(bench, normalised, boxes, column, structures, with_heatmap=rung == "full")
        notes += basis_notes
    else:
        seen = "looks T1-weighted" if weighting == "T1" else "cannot be told to be T2-weighted"
        notes.append(f"Pfirrmann grades are defined on T2-weighted images; this one {seen}, so none is given.")
    if rung == "full" and evidence is not None:
        with clock.stage("heatmap"):
            heatmaps.append(_evidence_map(evidence, back))
    with clock.stage("decode"):
        findings = _findings(boxes, column, regions, measured, structures.scale if structures else 1.0, structures is None, grades)
    return Report(
        status="partial" if any(h.values is None for h in heatmaps) else "complete",
        protocol=NAME,
        source=instance.source,
        findings=findings,
        heatmaps=tuple(heatmaps),
        mask=Mask(mask) if mask is not None else None,
        weighting=weighting,
        naming=column.reason,
        notes=tuple(notes),
        measurements=tuple(whole.measurements),
        omitted=tuple(whole.omitted),
    )


def _grade(
    bench: Bench,
    normalised: NDArray[np.float32],
    boxes: _Boxes,
    column: Column,
    structures: _Structures,
    with_heatmap: bool,
) -> tuple[dict[int, grader.Grade], list[Heatmap], list[str]]:
    """Grade each disc of the column: the network on its own crop, then, where the bundle holds a fusion, with what is measured of it
    and of its neighbours. The CAM of the winning grade comes out of the same pass as the logits, and explains the network's part.
    The last of the answer says in words what the grades rest on; nothing where the bundle has the network alone."""
    grades: dict[int, grader.Grade] = {}
    heatmaps: list[Heatmap] = []
    size = grader.SPEC.input_hw[0]
    sure = bench.confidence("grader")
    graded = column.discs[:MOST_DISCS]
    crops = [_box(boxes.discs[index]) for index in graded]
    outs = [bench.infer("grader", grader.crop(normalised, box)[None]) for box in crops]
    found = _fuse(bench, normalised, crops, column, structures, [out["logits"][0] for out in outs])
    for place, (index, box, out) in enumerate(zip(graded, crops, outs, strict=True)):
        logits, basis = found.logits[place : place + 1], found.basis[place]
        if found.fusing and not basis:  # temperature and threshold are those of fused logits
            grade = grader.decode(logits)[0]
        else:
            grade = replace(grader.decode(logits, sure.temperatures, sure.threshold)[0], basis=basis)
        grades[index] = grade
        if not with_heatmap:
            continue
        target = f"{column.disc_levels[place] or f'disc {place + 1}'} Pfirrmann {grade.grade}"
        values, reason = bench.cam("grader", out, grade.grade - 1)
        if values is not None:
            values = paste(values, grader.crop_matrix(box, size), size, normalised.shape)
        heatmaps.append(Heatmap("cam", grader.SPEC.heatmap_layer, target, values, "grader", reason))
    names = [column.disc_levels[i] or f"disc {i + 1}" for i, basis in enumerate(found.basis) if found.fusing and not basis]
    notes = [FUSED_NOTE] if any(found.basis) else []
    return grades, heatmaps, notes + ([f"{ALONE_NOTE} {', '.join(names)}."] if names else [])


@dataclass(frozen=True)
class _Fused:
    """Logits N x 8 as they are answered. `fusing`: the bundle holds a fusion; `basis` of a disc is empty where it could not be used."""

    logits: NDArray[np.float32]
    fusing: bool
    basis: list[dict[str, float]]


def _fuse(
    bench: Bench,
    normalised: NDArray[np.float32],
    crops: Sequence[tuple[float, float, float, float]],
    column: Column,
    structures: _Structures,
    logits: Sequence[NDArray[np.float32]],
) -> _Fused:
    network = np.array(logits, np.float32).reshape(-1, len(grader.SPEC.classes))
    fusion = bench.fusions.get("grader")
    if fusion is None or not crops:
        return _Fused(network, fusion is not None, [{} for _ in crops])
    scale, shape = structures.scale, structures.mask.shape
    if normalised.shape != shape:
        normalised = np.asarray(cv2.resize(normalised, shape[::-1], interpolation=cv2.INTER_AREA), np.float32)
    scene = appearance.Scene(normalised, structures.mask, structures.regions["disc"], structures.regions["vertebra"])
    working = [(x0 * scale, y0 * scale, x1 * scale, y1 * scale) for x0, y0, x1, y1 in crops]
    levels, places = _places(column.disc_levels[: len(crops)])
    x = rows(network, appearance.describe(scene, working, places), places, levels)
    shares, average, parts = fusion.explained(x)
    bases = [basis if known else {} for basis, known in zip(_basis(average, parts, len(x)), fusion.usable(x), strict=True)]
    return _Fused(fusion.logits(network, x, shares), True, bases)


def _places(names: Sequence[str | None]) -> tuple[list[int | None], list[int]]:
    """(number of each disc's level from L5/S1 upwards or None, its place in the column): where naming ended there is a gap."""
    levels = [DISC_LEVELS.index(name) + 1 if name else None for name in names]
    places: list[int] = []
    for i, level in enumerate(levels):
        ended = i > 0 and level is None and levels[i - 1] is not None
        places.append(level or (places[-1] + (2 if ended else 1) if places else 1))
    return levels, places


def _basis(average: float, parts: Mapping[str, NDArray[np.float64]], count: int) -> list[dict[str, float]]:
    """What the expected grade of each of `count` discs consists of, in grades: the forest's mean, and what each of BASIS added."""
    added = {name: np.sum([parts[g] for g in groups], axis=0) for name, groups in BASIS.items()}
    return [{"average": average, **{name: float(values[i]) for name, values in added.items()}} for i in range(count)]


def _split(found: detector.Detections, back: Letterbox) -> _Boxes:
    # The sacrum is no finding; the naming of levels has thresholds of its own.
    keep = (found.scores >= FINDING_SCORE) | (found.classes == detector.SPEC.classes.index("sacrum")) & (found.scores >= RIVAL_SCORE)
    boxes = back.boxes_to_source(found.boxes[keep])
    scores, classes = found.scores[keep], found.classes[keep]
    # A box squeezed to nothing at the image's edge is no finding.
    real = (boxes[:, 2] - boxes[:, 0] >= 2) & (boxes[:, 3] - boxes[:, 1] >= 2)
    parts = [(boxes[real & (classes == k)], scores[real & (classes == k)]) for k in range(len(detector.SPEC.classes))]
    (v, vs), (d, ds), (s, ss) = parts
    return _Boxes(d, ds, v, vs, s, ss)


def _require_spine(boxes: _Boxes, mask: NDArray[np.uint8] | None, pixels: NDArray[np.float32], stated: bool) -> None:
    """Two networks must agree: enough sure boxes, and the outlines fill them; a picture whose modality nobody states must
    also have a scan's grey levels and show a spinal canal. Raises SpineNotFound with the numbers."""
    discs = boxes.discs[boxes.disc_scores >= SURE_SCORE]
    vertebrae = boxes.vertebrae[boxes.vertebra_scores >= SURE_SCORE]
    sure = len(discs) + len(vertebrae)
    if sure < LEAST_SURE or not len(discs):
        what = f"{sure} sure vertebrae and discs were found, {LEAST_SURE} with at least one disc are needed"
        raise SpineNotFound(what, value=sure, remedy=REMEDY)
    if mask is None:
        return
    filled = [_share(mask, b, km.DISC) for b in discs] + [_share(mask, b, km.VERTEBRA) for b in vertebrae]
    agreement = float(np.mean(filled))
    if agreement < LEAST_AGREEMENT:
        value = f"agreement {agreement:.2f} < {LEAST_AGREEMENT}"
        raise SpineNotFound("the outlines do not agree with the boxes", value=value, remedy=REMEDY)
    if stated:
        return
    levels = _greys(pixels)
    if levels < LEAST_GREYS:
        raise SpineNotFound("the picture is a drawing of a spine, not an image of one", value=f"{levels} grey levels", remedy=REMEDY)
    everything = np.concatenate([discs, vertebrae])
    rows = slice(int(everything[:, 1].min()), int(np.ceil(everything[:, 3].max())))
    canal = float((mask[rows] == km.CANAL).any(axis=1).mean())
    if canal < LEAST_CANAL and not (canal > LITTLE_CANAL and sure >= MANY_SURE):
        raise SpineNotFound(
            "vertebrae and discs were found, but hardly any spinal canal",
            value=f"canal beside {canal:.0%} of the column",
            remedy="Send a sagittal lumbar MRI slice near the midline, as DICOM if you have it, whose header says what it is.",
        )


def _greys(pixels: NDArray[np.float32]) -> int:
    """Different values of every second pixel each way, as far as LEAST_GREYS is concerned: a few rows of a scan have more."""
    few = np.unique(pixels[:: max(2, len(pixels) // 16 * 2), ::2]).size
    return few if few >= LEAST_GREYS else np.unique(pixels[::2, ::2]).size


def _share(mask: NDArray[np.uint8], box: NDArray[np.float32], kind: int) -> float:
    x0, y0, x1, y1 = (round(float(v)) for v in box)
    part = mask[y0 : max(y1, y0 + 1), x0 : max(x1, x0 + 1)]
    return float((part == kind).mean()) if part.size else 0.0


@dataclass(frozen=True)
class _Structures:
    """The separate discs and bodies of a mask, lowest first, at `scale` working pixels for each source pixel."""

    scale: float
    mask: NDArray[np.uint8]
    regions: dict[str, list[km.Component]]


def _structures(mask: NDArray[np.uint8], spacing_mm: tuple[float, float] | None = None) -> _Structures:
    """The network drew the outlines on 192 x 192 cells; separating them on more than WORKING_SIDE pixels adds time, not detail."""
    scale = min(1.0, WORKING_SIDE / max(mask.shape))
    if scale < 1.0:
        mask = np.asarray(cv2.resize(mask, None, fx=scale, fy=scale, interpolation=cv2.INTER_NEAREST), np.uint8)
    found = km.discs(mask)
    return _Structures(scale, mask, {"disc": found, "vertebra": km.bodies(mask, found, spacing_mm or (1.0, 1.0))})


def _weighting(normalised: NDArray[np.float32], structures: _Structures) -> str | None:
    """Cerebrospinal fluid is brighter than marrow on T2 and darker on T1; None between the two or without a canal."""
    canal = cv2.erode((structures.mask == km.CANAL).astype(np.uint8), np.ones((3, 3), np.uint8)) > 0
    bodies = structures.regions["vertebra"]
    if int(canal.sum()) < 30 or not bodies:
        return None
    height, width = canal.shape
    if canal.shape != normalised.shape:
        normalised = np.asarray(cv2.resize(normalised, (width, height), interpolation=cv2.INTER_AREA), np.float32)
    body = np.zeros(canal.shape, bool)
    for c in bodies:
        body |= c.pixels
    ratio = float(np.median(normalised[canal]) + 1) / max(float(np.median(normalised[body]) + 1), 0.04)
    return "T1" if ratio < T1_BELOW else "T2" if ratio > T2_ABOVE else None


def _regions(boxes: _Boxes, column: Column, structures: _Structures) -> dict[Key, km.Component]:
    """The region of the mask that each box is about: greatest overlap of boxes, each region used once."""
    out: dict[Key, km.Component] = {}
    for label, indices, all_boxes in _by_label(boxes, column):
        found = structures.regions[label]
        if not found or not indices:
            continue
        overlaps = iou_matrix(all_boxes * np.float32(structures.scale), np.array([c.box for c in found], np.float32))
        pairs = sorted(((float(overlaps[i, j]), i, j) for i in indices for j in range(len(found))), reverse=True)
        used: set[int] = set()
        for value, i, j in pairs:
            if value > 0.15 and (label, i) not in out and j not in used:
                out[label, i] = found[j]
                used.add(j)
    return out


def _by_label(boxes: _Boxes, column: Column) -> tuple[tuple[Literal["disc", "vertebra"], tuple[int, ...], NDArray[np.float32]], ...]:
    return ("disc", column.discs, boxes.discs), ("vertebra", column.vertebrae, boxes.vertebrae)


def _parts(column: Column, regions: dict[Key, km.Component]) -> list[Part]:
    levels: dict[Key, str | None] = {("disc", i): level for i, level in zip(column.discs, column.disc_levels, strict=True)}
    levels |= {("vertebra", i): level for i, level in zip(column.vertebrae, column.vertebra_levels, strict=True)}
    return [Part(key, levels[key], region) for key, region in regions.items()]


def _evidence_map(evidence: NDArray[np.float32], back: Letterbox) -> Heatmap:
    """Disc logit over the best other class: positive where the last convolution says disc, by how much."""
    others = np.maximum(np.maximum(evidence[0], evidence[1]), evidence[3])
    values = back.map_to_source(positive_unit(evidence[km.DISC] - others))
    return Heatmap("class-evidence", segmenter.SPEC.heatmap_layer, "disc", values, "segmenter")


def _findings(
    boxes: _Boxes,
    column: Column,
    regions: dict[Key, km.Component],
    measured: dict[Key, Measured],
    scale: float,
    shed: bool,
    grades: dict[int, grader.Grade],
) -> tuple[Finding, ...]:
    out: list[Finding] = []

    def add(label: Literal["disc", "vertebra"], index: int, number: int, level: str | None, box: Any, score: Any) -> None:
        key: Key = (label, index)
        found = measured.get(key) or (Measured() if shed else not_outlined(label))
        grade = grades.get(index) if label == "disc" else None
        outline = km.outline(regions[key].pixels, window=regions[key].window) if key in regions else ()
        out.append(
            Finding(
                label,
                float(score),
                _box(box),
                number,
                level,
                Pfirrmann(grade.grade, grade.probabilities, grade.plausible, grade.basis) if grade else None,
                grade.flags if grade else {},
                tuple(found.measurements),
                tuple((x / scale, y / scale) for x, y in outline),
                tuple(found.omitted),
            )
        )

    for number, (index, level) in enumerate(zip(column.discs, column.disc_levels, strict=True), 1):
        add("disc", index, number, level, boxes.discs[index], boxes.disc_scores[index])
    for number, (index, level) in enumerate(zip(column.vertebrae, column.vertebra_levels, strict=True), 1):
        add("vertebra", index, number, level, boxes.vertebrae[index], boxes.vertebra_scores[index])
    return tuple(out)


def _box(values: NDArray[np.float32]) -> tuple[float, float, float, float]:
    x0, y0, x1, y1 = (float(v) for v in values)
    return (x0, y0, x1, y1)
