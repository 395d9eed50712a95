"""The engine with the shipped bundle on phantoms: what it finds, names, grades, withholds and refuses."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import cv2
import numpy as np
import pytest

from appliance import backends, study
from appliance.backends import Signature, null
from appliance.budget import RUNGS, SHED, Budget, Deadline
from appliance.bundle import Bundle, open_bundle
from appliance.engine import Engine
from appliance.errors import BackendFailed, BackendUnavailable, EngineTooSlow, OutOfTime, SpineNotFound, WrongModality
from appliance.protocols import CAM_TOLERANCE, ProtocolModule, lumbar_mri
from appliance.protocols.lumbar_mri import LEAST_GREYS, WORKING_SIDE, _Boxes, _greys, _require_spine
from appliance.report import Report
from appliance.study import Instance
from kernels.nms import iou_matrix
from models import phantom

OPENS_ONNX = [n for n in backends.PREFERENCE if backends.load(n).FORMAT == "onnx"]
RUNTIMES = [n for n in OPENS_ONNX if backends.probe(n).available]


def served(name: str) -> bool:
    """Whether the shipped bundle's gates let this runtime's engine of every lumbar model pass."""
    return all(name in open_bundle().engine(f).builds for f in lumbar_mri.FAMILIES)


SERVED = [n for n in RUNTIMES if served(n)]


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return open_bundle()


@pytest.fixture(scope="module", params=["auto", *SERVED])
def engine(request: pytest.FixtureRequest, bundle: Bundle) -> Iterator[Engine]:
    with Engine(bundle, request.param) as opened:
        yield opened


def instance(seed: int, **options: object) -> tuple[Instance, phantom.Truth]:
    image, truth = phantom.draw(np.random.default_rng(seed), **options)  # type: ignore[arg-type]
    return study.read(phantom.write_dicom(image, truth, seed=seed)), truth


def discs(report: Report) -> list:  # type: ignore[type-arg]
    return [f for f in report.findings if f.label == "disc"]


def test_both_cpu_runtimes_are_installed_here() -> None:
    assert {"onnxruntime", "openvino"} <= set(OPENS_ONNX) == set(RUNTIMES)


def test_the_shipped_bundle_serves_the_runtime_that_every_device_has(bundle: Bundle) -> None:
    for family in bundle.manifest["models"]:
        assert "onnxruntime" in bundle.engine(family).builds, family


@pytest.mark.parametrize("seed", [101, 102, 103])
def test_finds_names_and_outlines_the_discs_of_a_phantom(engine: Engine, seed: int) -> None:
    image, truth = instance(seed, weighting="T2")
    report = engine.run(image)
    assert report.status == "complete"
    assert report.weighting == "T2"
    found = discs(report)
    overlaps = iou_matrix(np.array([f.box_px for f in found], np.float32), np.array([d.box_px for d in truth.discs], np.float32))
    assert (overlaps.max(0) > 0.4).mean() >= 0.8
    for k, d in enumerate(truth.discs):
        if overlaps[:, k].max() > 0.4:
            assert found[int(overlaps[:, k].argmax())].level == d.level
    assert report.mask is not None
    both = (report.mask.values == 2) & (truth.mask == 2)
    assert 2 * both.sum() / ((report.mask.values == 2).sum() + (truth.mask == 2).sum()) > 0.75
    assert all(f.outline_px for f in found[:4])


def test_grades_follow_degeneration(engine: Engine) -> None:
    healthy = engine.run(instance(11, weighting="T2", grades=[1] * 12)[0])
    worn = engine.run(instance(11, weighting="T2", grades=[5] * 12)[0])
    mean = [np.mean([f.pfirrmann.grade for f in discs(r)]) for r in (healthy, worn)]
    assert mean[1] - mean[0] >= 1.5


def test_grades_come_with_the_plausible_ones_of_the_engine_in_use(engine: Engine) -> None:
    verdicts = engine.bundle.manifest["models"]["grader"]["engines"][engine.used["grader"]]["verdicts"]
    threshold = next(v for v in verdicts if v["gate"] == "confidence")["details"]["conformal"]["int8"]["threshold"]
    grades = [f.pfirrmann for f in engine.run(instance(101, weighting="T2")[0]).findings if f.pfirrmann]
    assert len(grades) > 3
    for g in grades:
        assert g.grade in g.plausible
        assert set(g.plausible) == {g.grade} | {k for k in range(1, 6) if 1 - g.probabilities[k - 1] <= threshold}


def test_t1_gets_no_grade_and_says_so(engine: Engine) -> None:
    image, _ = instance(12, weighting="T1")
    # Without the DICOM header's word, the contrast itself must tell.
    report = engine.run(dataclasses.replace(image, weighting=None))
    assert report.weighting == "T1"
    assert all(f.pfirrmann is None and not f.flags for f in discs(report))
    assert any("Pfirrmann" in n for n in report.notes)
    assert [h.kind for h in report.heatmaps] == ["class-evidence"]


def test_levels_are_null_where_the_sacrum_is_cut_off(engine: Engine) -> None:
    unnamed = 0
    for seed in range(20, 26):
        report = engine.run(instance(seed, weighting="T2", sacrum=False)[0])
        assert [f.number for f in discs(report)] == list(range(1, len(discs(report)) + 1))
        unnamed += all(f.level is None for f in report.findings)
    assert unnamed >= 5


def test_every_disc_has_an_exact_map_that_adds_up(engine: Engine) -> None:
    image, _ = instance(13, weighting="T2")
    report = engine.run(image)
    maps = [h for h in report.heatmaps if h.kind == "cam"]
    assert len(maps) == len(discs(report))
    for h in maps:
        assert h.values is not None
        assert h.values.shape == image.pixels.shape
        assert h.values.min() >= 0
        assert 0 < h.values.max() <= 1 + 1e-6


def test_a_map_that_does_not_add_up_is_withheld(bundle: Bundle) -> None:
    image, _ = instance(13, weighting="T2")
    with Engine(bundle, "onnxruntime") as engine:
        inner = engine._sessions["grader"]

        class Tampered:
            def run(self, inputs: dict) -> dict:  # type: ignore[type-arg]
                out = inner.run(inputs)
                return {**out, "cam": out["cam"] + np.float32(2 * CAM_TOLERANCE)}

            def close(self) -> None:
                inner.close()

        engine._sessions["grader"] = Tampered()  # type: ignore[assignment]
        report = engine.run(image)
    maps = [h for h in report.heatmaps if h.kind == "cam"]
    assert maps
    assert all(h.values is None and h.reason and "add up" in h.reason for h in maps)
    assert report.status == "partial"
    assert all(f.pfirrmann for f in discs(report))


@pytest.mark.parametrize("kind", ["noise", "blank", "gradient", "stripes", "blobs"])
def test_an_image_without_a_spine_is_refused(engine: Engine, kind: str) -> None:
    rng = np.random.default_rng(5)
    size = 320
    pixels = {
        "noise": rng.normal(500, 200, (size, size)),
        "blank": np.full((size, size), 7.0),
        "gradient": np.tile(np.linspace(0, 900, size), (size, 1)),
        "stripes": np.tile((np.arange(size) // 20 % 2 * 700.0)[:, None], (1, size)),
        "blobs": np.add.reduce([np.roll(np.eye(size) * 900, int(s), 1) for s in rng.integers(0, size, 30)]),
    }[kind].astype(np.float32)
    image, _ = instance(1)
    with pytest.raises(SpineNotFound) as caught:
        engine.run(dataclasses.replace(image, pixels=pixels))
    assert caught.value.value


def test_a_picture_of_labels_is_no_scan(engine: Engine) -> None:
    _, truth = instance(14, weighting="T2")
    picture = cv2.imencode(".png", truth.mask * 80)[1].tobytes()
    with pytest.raises(WrongModality, match=r"drawing|sure"):
        engine.run(study.read(picture))


def test_a_picture_without_a_canal_is_refused_where_nobody_states_its_modality() -> None:
    """A lateral radiograph saved as a picture: vertebrae and discs that both networks see, and no canal."""
    image, truth = instance(14, weighting="T2", hw=(512, 512))
    discs = np.array([d.box_px for d in truth.discs[:4]], np.float32)
    bodies = np.array([v.box_px for v in truth.vertebrae[:4]], np.float32)
    none = np.zeros((0, 4), np.float32)
    boxes = _Boxes(discs, np.full(4, 0.8, np.float32), bodies, np.full(4, 0.8, np.float32), none, np.zeros(0, np.float32))
    without = np.where(truth.mask == 3, 0, truth.mask).astype(np.uint8)
    _require_spine(boxes, truth.mask, image.pixels, stated=False)
    _require_spine(boxes, without, image.pixels, stated=True)  # a header that says MR is believed
    with pytest.raises(SpineNotFound, match="canal"):
        _require_spine(boxes, without, image.pixels, stated=False)


def test_axial_slices_and_modalities_that_nobody_reads_are_refused(engine: Engine) -> None:
    image, _ = instance(1)
    for change in ({"view": "axial"}, {"modality": "CT"}):
        with pytest.raises(WrongModality):
            engine.run(dataclasses.replace(image, **change))


def test_an_mri_slice_that_calls_itself_a_radiograph_is_no_spine_that_it_knows(engine: Engine) -> None:
    image, _ = instance(1)
    for modality in ("DX", "CR"):
        with pytest.raises(SpineNotFound):
            engine.run(dataclasses.replace(image, modality=modality, view="AP"))


def test_a_short_budget_sheds_and_a_tiny_one_refuses_with_numbers(engine: Engine) -> None:
    image, _ = instance(13, weighting="T2")
    need = engine.rung_ms(lumbar_mri)
    assert need["detection-only"] < need["no-heatmap"] < need["full"]
    # A deadline that is about to start later than now holds exactly the time asked for when `run` looks at it.
    for rung, shed in (("no-heatmap", ("heatmap",)), ("detection-only", ("heatmap", "masks", "grades"))):
        richer = {"no-heatmap": "full", "detection-only": "no-heatmap"}[rung]
        budget = Budget((need[rung] + need[richer]) / 2)
        report = engine.run(image, _frozen(budget))
        assert (report.rung, report.shed, report.status) == (rung, shed, "partial")
        assert discs(report)
        assert (report.mask is None) == (rung == "detection-only")
    with pytest.raises(OutOfTime) as caught:
        engine.run(image, _frozen(Budget(need["detection-only"] / 2)))
    assert "ms" in str(caught.value)


def _frozen(budget: Budget) -> Deadline:
    class Still(Deadline):
        def left_ms(self) -> float:
            return self.budget.total_ms

    return Still(budget)


def test_a_closed_engine_says_so(bundle: Bundle) -> None:
    with pytest.raises(BackendFailed):
        Engine(bundle).run(instance(1)[0])


def test_the_null_backend_never_passes_for_an_answer(bundle: Bundle) -> None:
    with Engine(bundle, "null") as engine, pytest.raises(SpineNotFound):
        engine.run(instance(1)[0])


def test_a_source_of_many_pixels_is_answered_alike(bundle: Bundle) -> None:
    """Above the working size the outlines are separated on fewer pixels; everything still comes in source pixels."""
    image, _ = instance(14, weighting="T2", hw=(512, 512))
    zoom = 5
    large = np.asarray(cv2.resize(image.pixels, None, fx=zoom, fy=zoom, interpolation=cv2.INTER_CUBIC), np.float32)
    assert max(large.shape) > WORKING_SIDE
    assert image.spacing_mm is not None
    spacing = (image.spacing_mm[0] / zoom, image.spacing_mm[1] / zoom)
    with Engine(bundle, "onnxruntime") as engine:
        # A busy machine must not shed what is compared here.
        small = engine.run(image, Budget(60_000.0).start())
        big = engine.run(dataclasses.replace(image, pixels=large, spacing_mm=spacing), Budget(60_000.0).start())
    assert [(f.label, f.level) for f in small.findings] == [(f.label, f.level) for f in big.findings]
    assert big.mask is not None
    assert big.mask.values.shape == large.shape
    for f, g in zip(small.findings, big.findings, strict=True):
        assert np.abs(np.array(f.box_px) * zoom - np.array(g.box_px)).max() < 3 * zoom
        if f.outline_px and g.outline_px:
            a, b = np.array(f.outline_px), np.array(g.outline_px) / zoom
            assert np.abs(np.stack([a.min(0) - b.min(0), a.max(0) - b.max(0)])).max() < 4
        assert [(m.name, m.unit) for m in f.measurements] == [(m.name, m.unit) for m in g.measurements]
        for m, n in zip(f.measurements, g.measurements, strict=True):
            assert abs(m.value - n.value) < 0.25 * abs(m.value) + (5 if m.unit in ("deg", "%") else 1), (f.level, m, n)


def test_a_scan_on_a_black_canvas_is_answered_alike(engine: Engine) -> None:
    image, _ = instance(14, weighting="T2", hw=(512, 512))
    canvas = cv2.copyMakeBorder(np.array(image.pixels), 200, 100, 500, 300, cv2.BORDER_CONSTANT, value=float(image.pixels.min()))
    plain, framed = engine.run(image), engine.run(dataclasses.replace(image, pixels=canvas))
    assert [(f.label, f.level) for f in plain.findings] == [(f.label, f.level) for f in framed.findings]
    for f, g in zip(plain.findings, framed.findings, strict=True):
        assert np.abs(np.array(f.box_px) + np.array([500, 200, 500, 200]) - np.array(g.box_px)).max() < 8
    assert framed.mask is not None
    assert not framed.mask.values[:200].any()
    assert not framed.mask.values[:, :500].any()


def test_runtimes_agree(bundle: Bundle) -> None:
    image, _ = instance(14, weighting="T2")
    reports = []
    for name in ("auto", "onnxruntime"):
        with Engine(bundle, name) as engine:
            reports.append(engine.run(image))
            used = set(engine.used.values())
    assert used == {"onnxruntime"}
    a, b = reports
    assert [(f.label, f.level) for f in a.findings] == [(f.label, f.level) for f in b.findings]
    for f, g in zip(a.findings, b.findings, strict=True):
        assert np.abs(np.array(f.box_px) - np.array(g.box_px)).max() < 4
    assert a.mask is not None
    assert b.mask is not None
    assert (a.mask.values == b.mask.values).mean() > 0.995


def test_replayed_outputs_must_fit() -> None:
    with pytest.raises(BackendFailed):
        null.Session(Signature((), ()), {"x": np.zeros(1, np.float32)})


def test_an_engine_that_answers_its_golden_inputs_wrongly_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What passed on the machine that compiled may be wrong on this processor: the next engine is taken, or none."""
    from appliance import golden
    from appliance.bundle import open_bundle

    honest = golden.accept

    def saturating(file: golden.Golden, run: golden.Run) -> golden.Acceptance:
        return honest(file, lambda feed: {k: v + 5 for k, v in run(feed).items()} if file.target in broken else run(feed))

    monkeypatch.setattr(golden, "accept", saturating)
    broken = {"openvino"}
    with Engine(open_bundle()) as engine:
        assert "openvino" not in engine.used.values()
    broken = {"openvino", "onnxruntime", "tflite"}
    with pytest.raises(BackendUnavailable, match=r"lies .* from FP32"), Engine(open_bundle()):
        pass


def test_greys_are_counted_wherever_they_stand() -> None:
    """A few rows tell where a picture has enough of them; where they do not, all that are looked at count."""
    few = np.zeros((400, 300), np.float32)
    few[100, 0] = 50  # in a row that is looked at first; the others are not
    few[102:118:2, 0] = np.arange(1, 9)
    assert _greys(few) == 10
    few[102:118:2, 2] = np.arange(9, 17)
    assert _greys(few) == 18 >= LEAST_GREYS
    assert _greys(np.zeros((1, 1), np.float32)) == 1
    assert _greys(np.random.default_rng(0).uniform(size=(64, 64)).astype(np.float32)) >= LEAST_GREYS


# -- steered between stretches ------------------------------------------------------------------------------------------


class Scripted:
    """Goes on with what the script says, and keeps what it was asked."""

    def __init__(self, richest: str, *rungs: str) -> None:
        self.richest, self.rung, self._then = richest, rungs[0], list(rungs[1:])
        self.asked: list[tuple[str, str, str]] = []

    def go_on(self, protocol: ProtocolModule, stretch: str, rung: str) -> str:
        self.asked.append((protocol.NAME, stretch, rung))
        return self._then.pop(0) if self._then else rung


def ways() -> list[tuple[str, ...]]:
    """Every way down the ladder of lumbar MRI: the rung at the start, after detection, after the outlines."""
    out: list[tuple[str, ...]] = []
    for first in RUNGS:
        for second in RUNGS[RUNGS.index(first) :]:
            if second == "detection-only":
                out.append((first, second))
            else:
                out += [(first, second, third) for third in RUNGS[RUNGS.index(second) : -1]]
    return out


@pytest.mark.parametrize("rungs", ways(), ids="-".join)
def test_a_report_never_claims_what_was_shed(engine: Engine, rungs: tuple[str, ...]) -> None:
    steer = Scripted("full", *rungs)
    report = engine.run(study.read(phantom.write_dicom(*phantom.demo(seed=3))), steer=steer)
    reached = rungs[-1]
    assert (report.rung, report.asked, report.shed) == (reached, "full", SHED[reached])
    assert (report.status == "complete") == (reached == "full")
    assert set(report.shed_reasons) == set(report.shed)
    assert bool(report.heatmaps) == (reached == "full")
    assert (report.mask is None) == (reached == "detection-only")
    graded = [f for f in report.findings if f.pfirrmann is not None]
    assert bool(graded) == (reached != "detection-only")
    assert bool(report.measurements) == (reached != "detection-only")
    assert report.findings
    path = lumbar_mri.PATHS[reached]
    assert [stretch for _, stretch, _ in steer.asked] == list(path[:-1])
    assert [rung for _, _, rung in steer.asked] == list(rungs[: len(path) - 1])


def test_what_was_not_asked_for_is_not_shed(engine: Engine) -> None:
    instance = study.read(phantom.write_dicom(*phantom.demo(seed=3)))
    report = engine.run(instance, steer=Scripted("no-heatmap", "no-heatmap"))
    assert (report.status, report.rung, report.asked, report.shed) == ("complete", "no-heatmap", "no-heatmap", ())
    report = engine.run(instance, steer=Scripted("no-heatmap", "no-heatmap", "detection-only"))
    assert (report.status, report.shed) == ("partial", ("masks", "grades"))


def test_an_engine_that_fails_names_its_model_and_gives_way(bundle: Bundle) -> None:
    class Gone:
        def run(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            raise BackendFailed("the device is gone")

        def close(self) -> None:
            self.closed = True

    instance = study.read(phantom.write_dicom(*phantom.demo(seed=3)))
    with Engine(bundle, "auto", 1) as engine:
        first, broken = engine.used["segmenter"], Gone()
        engine._sessions["segmenter"].close()
        engine._sessions["segmenter"] = broken
        with pytest.raises(BackendFailed) as caught:
            engine.run(instance)
        assert caught.value.family == "segmenter"
        second = engine.fall_back("segmenter")
        assert second not in (None, first)
        assert broken.closed
        report = engine.run(instance)
        assert report.engine["backends"]["segmenter"] == second
        while engine.fall_back("segmenter") is not None:
            pass
        assert engine.used["segmenter"] not in (first, second)  # the last that could run stays


def test_an_engine_may_be_barred_and_the_reason_is_told(bundle: Bundle) -> None:
    with Engine(bundle, "auto", 1, barred=lambda model, build: "too slow" if build.backend == "openvino" else "") as engine:
        assert "openvino" not in engine.used.values()
    with pytest.raises(EngineTooSlow, match="openvino: not today"), Engine(bundle, "openvino", 1, barred=lambda model, build: "not today"):
        pass
