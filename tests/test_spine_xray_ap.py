"""The protocol for frontal radiographs, with sessions that see exactly what a phantom holds: what is said, and what is refused.

The networks themselves are measured by `python -m models.evaluate_ap`; here their answers are written by hand, so that every
error is the protocol's own.
"""

from __future__ import annotations

import dataclasses
import json
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
from jsonschema import Draft202012Validator

from appliance import engine, kept, render, study
from appliance.engine import Engine
from appliance.errors import OutOfTime, SpineNotFound, WrongModality
from appliance.protocols import Bench, lumbar_mri, spine_xray_ap
from appliance.report import Report
from appliance.study import Instance
from kernels import mask as km
from kernels.preprocess import letterbox, normalise
from models import familiarity, phantom_ap, spine_class, vertebra_ap
from models.phantom_ap import LEVELS, Swing
from tests.seeing import Array, Seeing, maps_of

SCHEMA = Draft202012Validator(json.loads((Path(__file__).parent.parent / "docs/report.schema.json").read_text()))
DOUBLE = (Swing(0, -8.0), Swing(5, 26.0), Swing(12, -16.0), Swing(16, 4.0))  # 34, 42 and 20 degrees


def classed(kind: str = "scoliosis", pooled: float = 0.0) -> dict[str, Array]:
    rng = np.random.default_rng(3)
    cam = rng.normal(0, 1, (1, 3, 20, 14)).astype(np.float32)
    cam[0, spine_class.SPEC.classes.index(kind)] += 3.0
    return {"cam": cam, "logits": cam.mean((2, 3)), "pooled": np.full((1, 80), pooled, np.float32)}


@lru_cache
def seen(
    swings: tuple[Swing, ...] = DOUBLE, levels: tuple[str, ...] = LEVELS, score: float = 0.9
) -> tuple[Instance, phantom_ap.Truth, dict[str, Array]]:
    """A phantom as a PNG, its truth, and the detector's maps of those of its vertebrae that `levels` names."""
    image, truth = phantom_ap.draw(np.random.default_rng(8), (832, 460), swings)
    instance = study.read(cv2.imencode(".png", np.rint(image / 4095 * 255).astype(np.uint8))[1].tobytes())
    boxes = np.array([v.box_px for v in truth.vertebrae if v.level in levels], np.float32).reshape(-1, 4)
    _, back = letterbox(normalise(instance.pixels), vertebra_ap.SPEC.input_hw)
    boxes[:, 0::2] = boxes[:, 0::2] * back.scale + back.offset_x
    boxes[:, 1::2] = boxes[:, 1::2] * back.scale + back.offset_y
    return instance, truth, maps_of(boxes, score)


def bench(detected: dict[str, Array], classes: dict[str, Array] | None = None, bias: float = 0.0) -> Bench:
    sessions = {"vertebra_ap": Seeing(detected), "spine_class": Seeing(classes or classed())}
    return Bench(sessions, {"spine_class": {"cam_bias": [bias] * 3, "temperature": None}})


@pytest.fixture(autouse=True)
def everything_near_nothing_is_familiar(monkeypatch: pytest.MonkeyPatch) -> None:
    known = familiarity.Familiarity(np.zeros(80), np.eye(80), 2.0)
    monkeypatch.setattr(familiarity, "read", lambda *_: known)


def whole(report: Report) -> dict[str, Any]:
    """The report as the engine hands it out, which is what the schema is about."""
    return dataclasses.replace(
        report,
        timing_ms={"engine_total": 1.0},
        engine={"backends": {}, "precision": "int8", "threads": 0},
        bundle={"name": "b", "digest": "0" * 64, "spinebox": "1"},
    ).to_json()


def test_curves_have_the_phantoms_angles_and_end_vertebrae() -> None:
    instance, truth, maps = seen()
    report = spine_xray_ap.run(bench(maps), instance, "full")
    assert report.frontal is not None
    assert len(report.findings) == 17
    assert [f.number for f in report.findings] == list(range(1, 18))
    assert all(a.box_px[3] > b.box_px[3] for a, b in zip(report.findings, report.findings[1:], strict=False))
    for found, true in zip(report.frontal.curves, truth.curves, strict=True):
        assert found.angle_deg == pytest.approx(true.angle_deg, abs=3.0)
        assert abs(17 - found.upper - LEVELS.index(true.upper)) <= 1
        assert abs(17 - found.lower - LEVELS.index(true.lower)) <= 1
        assert found.upper > found.apex > found.lower
    assert report.frontal.severity == "severe"
    assert [c.region for c in report.frontal.curves] == ["proximal thoracic", "main thoracic", "thoracolumbar or lumbar"]
    assert report.status == "complete"
    assert report.protocol == "spine-xray-ap"
    SCHEMA.validate(whole(report))


def test_the_lines_of_an_angle_enclose_it_and_lie_at_its_end_plates() -> None:
    instance, truth, maps = seen()
    report = spine_xray_ap.run(bench(maps), instance, "full")
    assert [m.name for m in report.measurements] == ["cobb_angle"] * 3
    for m, true in zip(report.measurements, truth.curves, strict=True):
        (a, b), (c, d) = (np.array(line) for line in m.lines_px)
        u, v = (b - a) / np.hypot(*(b - a)), (d - c) / np.hypot(*(d - c))
        assert np.rad2deg(np.arccos(u @ v)) == pytest.approx(m.value, abs=1e-6)
        for middle, level, plate in (((a + b) / 2, true.upper, "upper_px"), ((c + d) / 2, true.lower, "lower_px")):
            near = [LEVELS.index(level) + k for k in (-1, 0, 1) if 0 <= LEVELS.index(level) + k < 17]
            off = [np.hypot(*(middle - np.mean(getattr(truth.vertebrae[i], plate), axis=0))) for i in near]
            assert min(off) < 0.4 * (truth.vertebrae[8].box_px[3] - truth.vertebrae[8].box_px[1])


def test_pixels_that_are_not_square_change_no_angle() -> None:
    instance, _, maps = seen()
    plain = spine_xray_ap.run(bench(maps), instance, "full")
    # The same spine sampled half as finely across: boxes of the squeezed picture, and a header that says so.
    squeezed = np.asarray(cv2.resize(instance.pixels, (230, 832), interpolation=cv2.INTER_AREA), np.float32)
    _, back = letterbox(normalise(squeezed), vertebra_ap.SPEC.input_hw)
    boxes = np.array([f.box_px for f in plain.findings], np.float32)
    boxes[:, 0::2] = boxes[:, 0::2] / 2 * back.scale + back.offset_x
    boxes[:, 1::2] = boxes[:, 1::2] * back.scale + back.offset_y
    other = dataclasses.replace(instance, pixels=squeezed, spacing_mm=(0.3, 0.6), modality="DX", view="AP")
    report = spine_xray_ap.run(bench(maps_of(boxes)), other, "full")
    assert report.frontal is not None
    assert plain.frontal is not None
    assert [c.angle_deg for c in report.frontal.curves] == pytest.approx([c.angle_deg for c in plain.frontal.curves], abs=0.5)


def test_a_straight_spine_is_normal_and_a_class_that_differs_is_doubted() -> None:
    instance, _, maps = seen((Swing(0, 1.0), Swing(16, -1.0)))
    agreed = spine_xray_ap.run(bench(maps, classed("normal")), instance, "full")
    assert agreed.frontal is not None
    assert (agreed.frontal.severity, agreed.frontal.name) == ("none", "normal")
    assert not any("look at both" in n for n in agreed.notes)
    doubted = spine_xray_ap.run(bench(maps, classed("scoliosis")), instance, "full")
    assert any("look at both" in n for n in doubted.notes)
    instance, _, maps = seen()
    assert any("look at both" in n for n in spine_xray_ap.run(bench(maps, classed("normal")), instance, "full").notes)


def test_few_vertebrae_are_found_but_not_measured() -> None:
    instance, _, maps = seen(levels=LEVELS[-5:])
    stated = dataclasses.replace(instance, modality="DX", view="AP")
    report = spine_xray_ap.run(bench(maps), stated, "full")
    assert report.frontal is not None
    assert (len(report.findings), report.measurements, report.frontal.curves, report.frontal.severity) == (5, (), (), None)
    assert [(o.name, "needs 6" in o.reason) for o in report.omitted] == [("cobb_angle", True)]
    SCHEMA.validate(whole(report))


def speaks_of_radiographs(error: SpineNotFound) -> bool:
    """Whoever sent a radiograph is not told to send an MRI slice."""
    return "radiograph" in error.remedy and "MRI" not in error.remedy


@pytest.mark.parametrize(
    ("levels", "score", "modality"),
    [((), 0.9, "DX"), (LEVELS[:3], 0.9, "DX"), (LEVELS, 0.2, "DX"), (LEVELS[-8:], 0.9, None)],
)
def test_too_few_sure_vertebrae_are_no_spine(levels: tuple[str, ...], score: float, modality: str | None) -> None:
    instance, _, maps = seen(levels=levels, score=score)
    with pytest.raises(SpineNotFound, match="sure vertebrae") as caught:
        spine_xray_ap.run(bench(maps), dataclasses.replace(instance, modality=modality), "full")
    assert speaks_of_radiographs(caught.value)


def test_boxes_strewn_about_are_no_column() -> None:
    instance, _, _ = seen()
    x = 100 + np.random.default_rng(1).uniform(-18, 18, 12)
    y = np.linspace(30, 300, 12)
    strewn = np.stack([x, y, x + 24, y + 14], 1).astype(np.float32)
    with pytest.raises(SpineNotFound, match="no column") as caught:
        spine_xray_ap.run(bench(maps_of(strewn)), instance, "full")
    assert speaks_of_radiographs(caught.value)


@pytest.mark.parametrize("pooled", [5.0, float("nan"), float("inf")])
def test_a_picture_unlike_the_learnt_ones_is_refused_whatever_its_header_says(pooled: float) -> None:
    instance, _, maps = seen()
    stated = dataclasses.replace(instance, modality="DX", view="AP")
    for image in (instance, stated):
        with pytest.raises(SpineNotFound, match="unlike") as caught:
            spine_xray_ap.run(bench(maps, classed(pooled=pooled)), image, "no-heatmap")
        assert speaks_of_radiographs(caught.value)


def test_a_map_that_does_not_add_up_is_withheld() -> None:
    instance, _, maps = seen()
    report = spine_xray_ap.run(bench(maps, bias=0.5), instance, "full")
    withheld = [h for h in report.heatmaps if h.values is None]
    assert [(h.kind, h.target) for h in withheld] == [("cam", "scoliosis")]
    assert report.status == "partial"
    assert report.frontal is not None
    SCHEMA.validate(whole(report))


def test_the_heatmap_is_shed_before_anything_else() -> None:
    instance, _, maps = seen()
    full, short = (spine_xray_ap.run(bench(maps), instance, rung) for rung in ("full", "no-heatmap"))
    assert [(h.kind, h.values is not None and h.values.shape == instance.pixels.shape) for h in full.heatmaps] == [
        ("cam", True),
        ("class-evidence", True),
    ]
    assert short.heatmaps == ()
    assert short.frontal == full.frontal
    need = spine_xray_ap.rung_ms({"vertebra_ap": 9.0, "spine_class": 3.0})
    assert need["full"] > need["no-heatmap"] == need["detection-only"]


@pytest.mark.parametrize(("view", "fits"), [("AP", True), ("PA", True), (None, True), ("LL", False), ("RLO", False)])
def test_only_frontal_views_are_read(view: str | None, fits: bool) -> None:
    instance, _, _ = seen()
    stated = dataclasses.replace(instance, modality="CR", view=view)
    if fits:
        spine_xray_ap.check(stated)
    else:
        with pytest.raises(WrongModality, match="frontal"):
            spine_xray_ap.check(stated)


def test_a_kept_report_is_the_report_and_the_overlay_shows_its_lines() -> None:
    instance, _, maps = seen()
    report = spine_xray_ap.run(bench(maps), instance, "full")
    again = kept.unpack(json.loads(json.dumps(whole(report))), kept.pack(report))
    assert again.frontal is not None
    assert again.to_json()["frontal"] == report.to_json()["frontal"]
    with_lines, without = (render.overlay_png(instance, report, measures=m, heatmap=0) for m in (True, False))
    a, b = (cv2.imdecode(np.frombuffer(p, np.uint8), cv2.IMREAD_COLOR) for p in (with_lines, without))
    assert a.shape == b.shape
    assert (np.abs(a.astype(int) - b).max(2) > 60).sum() > 500


# -- which protocol answers -----------------------------------------------------------------------------------------


class Scripted:
    """A protocol that refuses or answers as told."""

    def __init__(self, name: str, modalities: tuple[str, ...], error: Exception | None = None, checks: Exception | None = None) -> None:
        self.NAME, self.READS, self.MODALITIES, self.FAMILIES = name, f"pictures of {name}", modalities, ("toy",)
        self.error, self.checks = error, checks

    def check(self, instance: Instance) -> None:
        if self.checks:
            raise self.checks

    def rung_ms(self, expected_ms: Any) -> dict[str, float]:
        return {"full": 3.0, "no-heatmap": 2.0, "detection-only": 1.0}

    def run(self, bench: Bench, instance: Instance, rung: str) -> Report:
        if self.error:
            raise self.error
        with bench.clock.stage("work"):
            return Report("complete", self.NAME, instance.source)


def opened(*protocols: Scripted) -> Engine:
    manifested = SimpleNamespace(manifest={"models": {}}, identity={"name": "toy"})
    out = Engine(manifested)  # type: ignore[arg-type]
    out.protocols = protocols
    out._sessions = {"toy": Seeing({})}
    out.used, out.precisions = {"toy": "null"}, {"toy": "int8"}
    return out


def picture(modality: str | None) -> Instance:
    return Instance(np.ones((4, 4), np.float32), None, modality, None, None, "0" * 64, "png", {})


def test_the_header_chooses_the_protocol() -> None:
    frontal, lumbar = Scripted("ap", ("CR", "DX")), Scripted("mri", ("MR",))
    machine = opened(frontal, lumbar)
    assert machine.run(picture("DX")).protocol == "ap"
    assert machine.run(picture("MR")).protocol == "mri"
    report = machine.run(picture(None))
    assert report.protocol == "ap"
    assert set(report.timing_ms) == {"work", "engine_total"}
    assert report.engine == {"backends": {"toy": "null"}, "precision": "int8", "threads": 0}


def test_a_picture_without_header_goes_to_whoever_knows_it() -> None:
    blind = Scripted("ap", ("CR", "DX"), SpineNotFound("no spine from the front"))
    assert opened(blind, Scripted("mri", ("MR",))).run(picture(None)).protocol == "mri"
    with pytest.raises(WrongModality, match=r"not a protocol that I know.*from the front.*no canal"):
        opened(blind, Scripted("mri", ("MR",), SpineNotFound("no canal"))).run(picture(None))


def test_where_only_one_protocol_fits_its_own_refusal_stands() -> None:
    blind = Scripted("ap", ("CR", "DX"), SpineNotFound("no spine from the front"))
    with pytest.raises(SpineNotFound, match="from the front"):
        opened(blind, Scripted("mri", ("MR",))).run(picture("DX"))
    with pytest.raises(WrongModality, match="lateral"):
        opened(Scripted("ap", ("DX",), checks=WrongModality("lateral"))).run(picture("DX"))


def test_each_refusal_says_what_its_own_protocol_reads() -> None:
    """The tree's own remedy speaks of no protocol, since it stands for any; a protocol's raises speak of theirs."""
    sure = np.full(6, 0.9, np.float32)
    discs, bodies = (np.array([[10, top, 60, top + 20]] * 6, np.float32) for top in (10, 40))
    none = (np.zeros((0, 4), np.float32), np.zeros(0, np.float32))
    found = lumbar_mri._Boxes(discs, sure, bodies, sure, *none)
    outlined = np.zeros((80, 80), np.uint8)
    outlined[10:30, 10:60], outlined[40:60, 10:60] = km.DISC, km.VERTEBRA
    flat, grey = np.zeros((80, 80), np.float32), np.arange(6400, dtype=np.float32).reshape(80, 80)
    cases = {
        "sure vertebrae and discs": (lumbar_mri._Boxes(*none, *none, *none), None, flat),
        "agree": (found, np.zeros_like(outlined), flat),
        "drawing": (found, outlined, flat),
        "canal": (found, outlined, grey),
    }
    for what, (boxes, mask, pixels) in cases.items():
        with pytest.raises(SpineNotFound, match=what) as caught:
            lumbar_mri._require_spine(boxes, mask, pixels, stated=False)
        assert "MRI" in caught.value.remedy
        assert "radiograph" not in caught.value.remedy
    assert not any(word in SpineNotFound.default_remedy for word in ("MRI", "radiograph"))


def test_a_modality_that_nobody_reads_is_refused_by_name() -> None:
    with pytest.raises(WrongModality, match="pictures of mri only; it has no engine for radiographs"):
        opened(Scripted("mri", ("MR",))).run(picture("CR"))


def test_no_time_is_no_reason_to_try_another_protocol() -> None:
    late = Scripted("ap", ("DX",), OutOfTime("late"))
    with pytest.raises(OutOfTime):
        opened(late, Scripted("mri", ("MR",))).run(picture(None))


def test_the_engine_knows_both_protocols_and_names_them_apart() -> None:
    names = [p.NAME for p in engine.PROTOCOLS]
    assert names == ["spine-xray-ap", "lumbar-mri-sagittal"]
    assert not set(engine.PROTOCOLS[0].MODALITIES) & set(engine.PROTOCOLS[1].MODALITIES)
