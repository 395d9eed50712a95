"""One image in, one Report out: the bundle's three engines, run in order, and what their answers mean together.

Hides which backend runs, how boxes, masks, grades and heatmaps are brought together, and when the answer is withheld.
Constructing an `Engine` is free; entering it touches the device: sessions open, warm up, and are timed.

    pixels -> normalise -> letterbox 384 -+-> detector  -> boxes -> levels -----+
                                          +-> segmenter -> outlines, evidence --+-> crops of T2 discs -> grader -> grades, CAM
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from appliance import backends, golden
from appliance.backends import Session
from appliance.budget import SHED, Budget, Deadline, choose_rung
from appliance.bundle import Build, Bundle
from appliance.bundle import Engine as BundleEngine
from appliance.errors import BackendFailed, BackendUnavailable, OutOfTime, SpineNotFound, WrongModality
from appliance.measurements import PIXEL_NOTE, Key, Measured, Part, measure, not_outlined
from appliance.report import Finding, Heatmap, Mask, Pfirrmann, Report
from appliance.study import Instance
from kernels import mask as km
from kernels.heatmap import cam_residual, paste, positive_unit
from kernels.nms import iou_matrix
from kernels.preprocess import Letterbox, letterbox, normalise
from models import detector, grader, segmenter
from models.levels import RIVAL_SCORE, Column, name_levels

PROTOCOL = "lumbar-mri-sagittal"
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
CAM_TOLERANCE = 1e-2  # float convolution against float mean: far above rounding, far below any real difference
WARM_RUNS = 5
WORKING_SIDE = 1024  # pixels of the longer side on which outlines are separated


@dataclass
class _Clock:
    """Stage times of one run, in ms."""

    ms: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.ms[name] = self.ms.get(name, 0.0) + (time.perf_counter() - began) * 1e3


@dataclass(frozen=True)
class _Boxes:
    """Detections in source pixels, split by class."""

    discs: NDArray[np.float32]
    disc_scores: NDArray[np.float32]
    vertebrae: NDArray[np.float32]
    vertebra_scores: NDArray[np.float32]
    sacra: NDArray[np.float32]
    sacrum_scores: NDArray[np.float32]


class Engine:
    """The appliance's answer machine: `with Engine(bundle) as engine: report = engine.run(instance, deadline)`.

    `backend` "auto" takes each model's choice from the bundle's profile where it is available, else the first that passed its
    gates and is. `threads` 0 leaves the count to the runtime. Not thread-safe: one owner calls `run`.
    """

    def __init__(self, bundle: Bundle, backend: str = "auto", threads: int = 0) -> None:
        self.bundle = bundle
        self.backend = backend
        self.threads = threads
        self.used: dict[str, str] = {}
        self.precisions: dict[str, str] = {}
        self.expected_ms: dict[str, float] = {}
        self._sessions: dict[str, Session] = {}

    def __enter__(self) -> Engine:
        try:
            for family in ("detector", "segmenter", "grader"):
                entry = self.bundle.engine(family)
                build, self._sessions[family] = self._open(entry)
                self.used[family] = build.backend
                self.precisions[family] = build.precision
            self._warm_up()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        for session in self._sessions.values():
            session.close()
        self._sessions = {}

    def _builds(self, entry: BundleEngine) -> list[tuple[Build, str]]:
        """The builds to try with the device each runs on: of the backend that was asked for, else in the bundle's own order."""
        if self.backend == "auto":
            return [(b, "") for b in entry.order()]
        name, device = backends.parse(self.backend)
        backends.choose(name)
        if name in entry.builds:
            return [(entry.builds[name], device)]
        if not backends.load(name).REQUIRES:  # the null backend answers without a graph
            return [(Build(name, "", "int8", None), device)]
        raise BackendUnavailable(f"the bundle has no engine of {entry.name} for {name} that its gates let pass", value=name)

    def _open(self, entry: BundleEngine) -> tuple[Build, Session]:
        """The first build that opens here and answers its golden inputs as it should.

        What passed its gates on one machine can still be wrong on another: a processor whose 8-bit products saturate, a runtime
        of another version, a cached engine of another driver. Raises BackendUnavailable with every reason.
        """
        reasons = []
        for build, device in self._builds(entry):
            state = backends.probe(build.backend)
            if not state.available:
                reasons.append(f"{build.backend}: {state.reason}")
                continue
            graph = self.bundle.read(build.graph) if build.graph else b""
            module = backends.load(build.backend)
            try:
                session = module.open(graph, entry.signature, precision=build.precision, threads=self.threads, device=device)
            except BackendFailed as error:
                reasons.append(f"{build.backend}: {error.what}")
                continue
            if build.golden is None:
                return build, session
            try:
                found = golden.accept(golden.Golden.from_bytes(self.bundle.read(build.golden)), session.run)
            except BackendFailed as error:
                found = golden.Acceptance(False, error.what, {})
            if found.accepted:
                return build, session
            session.close()
            reasons.append(f"{build.backend}: {found.note}")
        raise BackendUnavailable(
            f"no engine of {entry.name} can run here ({'; '.join(reasons) or 'none passed its gates'})", value=entry.name
        )

    def _precision(self) -> str:
        kinds = set(self.precisions.values())
        return kinds.pop() if len(kinds) == 1 else "mixed"

    def _warm_up(self) -> None:
        """First runs allocate; later ones are timed, so that a deadline can be judged before work starts."""
        for family, session in self._sessions.items():
            blank = {t.name: np.zeros(t.shape, np.float32) for t in self.bundle.engine(family).signature.inputs}
            times = []
            for _ in range(WARM_RUNS):
                began = time.perf_counter()
                session.run(blank)
                times.append((time.perf_counter() - began) * 1e3)
            self.expected_ms[family] = statistics.median(times[1:])

    def rung_ms(self) -> dict[str, float]:
        """Expected milliseconds of each rung of the ladder, for a usual slice with eight discs."""
        e = self.expected_ms
        rest = 15.0  # preprocessing and decoding of a 512 x 512 slice, without rendering
        return {
            "full": e["detector"] + e["segmenter"] + 8 * e["grader"] + rest + 10.0,
            "no-heatmap": e["detector"] + e["segmenter"] + 8 * e["grader"] + rest,
            "detection-only": e["detector"] + rest,
        }

    # -- one run ----------------------------------------------------------------------------------------------------

    def run(self, instance: Instance, deadline: Deadline | None = None) -> Report:
        """The Report of one image, complete or partial.

        Raises WrongModality (a radiograph: no protocol for it in this bundle), SpineNotFound, OutOfTime (with the
        numbers), BackendFailed. Never answers an empty list of findings.
        """
        if not self._sessions:
            raise BackendFailed("the engine is not open", remedy="Use it as a context manager.")
        if instance.modality not in (None, "MR"):
            raise WrongModality("this bundle reads sagittal lumbar MRI only; it has no engine for radiographs", value=instance.modality)
        if instance.view in ("axial", "coronal"):
            raise WrongModality("this bundle reads sagittal slices only", value=instance.view, remedy="Send a sagittal slice.")
        deadline = deadline or Budget().start()
        expected = self.rung_ms()
        rung = choose_rung(deadline.left_ms(), expected)
        if rung is None:
            raise OutOfTime(
                f"{deadline.left_ms():.0f} ms were left of {deadline.budget.total_ms:.0f}; the fastest answer takes about "
                f"{expected['detection-only']:.0f} ms here",
                value=f"{deadline.budget.total_ms:.0f} ms",
            )
        clock = _Clock()
        began = time.perf_counter()
        with clock.stage("preprocess"):
            normalised = normalise(instance.pixels)
            x, back = letterbox(normalised, detector.SPEC.input_hw)
        with clock.stage("detector"):
            found = self._sessions["detector"].run({"image": x})
        with clock.stage("decode"):
            boxes = _split(detector.decode(found), back)
        mask: NDArray[np.uint8] | None = None
        evidence: NDArray[np.float32] | None = None
        if rung != "detection-only":
            with clock.stage("segmenter"):
                logits = self._sessions["segmenter"].run({"image": x})["logits"]
            with clock.stage("decode"):
                mask, evidence = segmenter.decode(logits, back)
        with clock.stage("decode"):
            _require_spine(boxes, mask, instance.pixels, stated=instance.modality is not None)
            column = name_levels(boxes.discs, boxes.vertebrae, boxes.sacra, boxes.sacrum_scores)
            structures = _structures(mask) if mask is not None else None
            weighting = instance.weighting or (_weighting(normalised, structures) if structures else None)
            regions = _regions(boxes, column, structures) if structures else {}
        measured: dict[Key, Measured] = {}
        whole = Measured()
        if structures:
            with clock.stage("measure"):
                canal = structures.mask == km.CANAL
                measured, whole = measure(_parts(column, regions), canal, structures.scale, instance.spacing_mm, instance.spacing_kind)
        notes: list[str] = list(instance.notes)
        if structures and instance.spacing_mm is None:
            notes.append(PIXEL_NOTE)
        grades: dict[int, grader.Grade] = {}
        heatmaps: list[Heatmap] = []
        if rung == "detection-only":
            notes.append("Grades need the outlines' contrast check; both were shed to keep the budget.")
        elif weighting == "T2":
            with clock.stage("grader"):
                grades, heatmaps = self._grade(normalised, boxes, column, with_heatmap=rung == "full")
        else:
            seen = "looks T1-weighted" if weighting == "T1" else "cannot be told to be T2-weighted"
            notes.append(f"Pfirrmann grades are defined on T2-weighted images; this one {seen}, so none is given.")
        if rung == "full" and evidence is not None:
            with clock.stage("heatmap"):
                heatmaps.append(_evidence_map(evidence, back))
        with clock.stage("decode"):
            findings = _findings(boxes, column, regions, measured, structures.scale if structures else 1.0, structures is None, grades)
        clock.ms["engine_total"] = (time.perf_counter() - began) * 1e3
        withheld = any(h.values is None for h in heatmaps)
        shed = SHED[rung]
        return Report(
            status="partial" if shed or withheld else "complete",
            protocol=PROTOCOL,
            source=instance.source,
            findings=findings,
            heatmaps=tuple(heatmaps),
            mask=Mask(mask) if mask is not None else None,
            weighting=weighting,
            naming=column.reason,
            notes=tuple(notes),
            rung=rung,
            shed=shed,
            timing_ms=clock.ms,
            engine={"backends": dict(self.used), "precision": self._precision(), "threads": self.threads},
            bundle=self.bundle.identity,
            measurements=tuple(whole.measurements),
            omitted=tuple(whole.omitted),
        )

    def _grade(
        self, normalised: NDArray[np.float32], boxes: _Boxes, column: Column, with_heatmap: bool
    ) -> tuple[dict[int, grader.Grade], list[Heatmap]]:
        """Grade each disc of the column on its own crop; the CAM of the winning grade comes out of the same pass."""
        bias = np.asarray(self.bundle.manifest["models"]["grader"]["cam_bias"], np.float32)
        grades: dict[int, grader.Grade] = {}
        heatmaps: list[Heatmap] = []
        size = grader.SPEC.input_hw[0]
        for place, index in enumerate(column.discs[:MOST_DISCS]):
            box = tuple(float(v) for v in boxes.discs[index])
            box4 = (box[0], box[1], box[2], box[3])
            out = self._sessions["grader"].run({"image": grader.crop(normalised, box4)[None]})
            grade = grader.decode(out["logits"])[0]
            grades[index] = grade
            if not with_heatmap:
                continue
            target = f"{column.disc_levels[place] or f'disc {place + 1}'} Pfirrmann {grade.grade}"
            residual = cam_residual(out["cam"][0], bias, out["logits"][0])
            if residual > CAM_TOLERANCE:
                reason = f"the map does not add up to its logit (off by {residual:.3g}), so it explains nothing"
                heatmaps.append(Heatmap("cam", grader.SPEC.heatmap_layer, target, None, "grader", reason))
                continue
            values = paste(positive_unit(out["cam"][0][grade.grade - 1]), grader.crop_matrix(box4, size), size, normalised.shape)
            heatmaps.append(Heatmap("cam", grader.SPEC.heatmap_layer, target, values, "grader"))
        return grades, heatmaps


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
        raise SpineNotFound(f"{sure} sure vertebrae and discs were found, {LEAST_SURE} with at least one disc are needed", value=sure)
    if mask is None:
        return
    filled = [_share(mask, b, km.DISC) for b in discs] + [_share(mask, b, km.VERTEBRA) for b in vertebrae]
    agreement = float(np.mean(filled))
    if agreement < LEAST_AGREEMENT:
        raise SpineNotFound("the outlines do not agree with the boxes", value=f"agreement {agreement:.2f} < {LEAST_AGREEMENT}")
    if stated:
        return
    levels = np.unique(pixels[::2, ::2]).size
    if levels < LEAST_GREYS:
        raise SpineNotFound("the picture is a drawing of a spine, not an image of one", value=f"{levels} grey levels")
    everything = np.concatenate([discs, vertebrae])
    rows = slice(int(everything[:, 1].min()), int(np.ceil(everything[:, 3].max())))
    canal = float((mask[rows] == km.CANAL).any(axis=1).mean())
    if canal < LEAST_CANAL and not (canal > LITTLE_CANAL and sure >= MANY_SURE):
        raise SpineNotFound(
            "vertebrae and discs were found, but hardly any spinal canal",
            value=f"canal beside {canal:.0%} of the column",
            remedy="Send a sagittal lumbar MRI slice near the midline, as DICOM if you have it; radiographs are not read by this bundle.",
        )


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


def _structures(mask: NDArray[np.uint8]) -> _Structures:
    """The network drew the outlines on 192 x 192 cells; separating them on more than WORKING_SIDE pixels adds time, not detail."""
    scale = min(1.0, WORKING_SIDE / max(mask.shape))
    if scale < 1.0:
        mask = np.asarray(cv2.resize(mask, None, fx=scale, fy=scale, interpolation=cv2.INTER_NEAREST), np.uint8)
    found = km.discs(mask)
    return _Structures(scale, mask, {"disc": found, "vertebra": km.bodies(mask, found)})


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
        outline = km.outline(regions[key].pixels) if key in regions else ()
        out.append(
            Finding(
                label,
                float(score),
                _box(box),
                number,
                level,
                Pfirrmann(grade.grade, grade.probabilities) if grade else None,
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


def refused_report(error: Any, source: dict[str, Any] | None = None) -> Report:
    """The record of a refusal: no findings, and the error says why."""
    return Report(status="refused", protocol=PROTOCOL, source=source or {}, error=error.to_json(), naming="")
