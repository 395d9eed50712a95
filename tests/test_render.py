"""Pictures of a report: sizes, raw values, what each switch draws, and the disclaimer on all of them."""

from __future__ import annotations

import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import lru_cache
from typing import Any

import cv2
import numpy as np
import pytest

from appliance import render
from appliance.errors import UsageError
from appliance.measurements import Part, measure
from appliance.report import DISCLAIMER, Finding, Heatmap, Mask, Measurement, Omission, Pfirrmann, Report
from appliance.study import Instance
from kernels import mask as km
from models import phantom

STRIP_BGR = (0x00, 0x2F, 0x3D)


def _instance(pixels: Any, spacing: tuple[float, float] | None = (0.6, 0.6)) -> Instance:
    return Instance(np.asarray(pixels, np.float32), spacing, "MR", "sagittal", "T2", "ab" * 32, "dicom", {})


@lru_cache
def _study(named: bool = True, graded: bool = True) -> tuple[Instance, Report]:
    image, truth = phantom.demo()
    yy, xx = np.mgrid[: image.shape[0], : image.shape[1]].astype(np.float32)
    findings, heatmaps = [], []
    regions = {"disc": km.discs(truth.mask), "vertebra": km.bodies(truth.mask)}

    def outline(label: str, box: Any) -> tuple[tuple[float, float], ...]:
        centre = np.array([box[0] + box[2], box[1] + box[3]]) / 2
        return km.outline(min(regions[label], key=lambda c: float(np.hypot(*(centre - c.centre)))).pixels)

    for number, d in enumerate(truth.discs, 1):
        grade = Pfirrmann(d.pfirrmann, tuple(0.6 if g == d.pfirrmann else 0.1 for g in range(1, 6))) if graded else None
        level = d.level if named else None
        flags = {"herniation": 0.1, "narrowing": 0.9 if d.narrowing else 0.2, "bulging": 0.6 if d.bulging else 0.1} if graded else {}
        size = (Measurement("disc_height", 7.25, "mm"),)
        findings.append(Finding("disc", 0.9, d.box_px, number, level, grade, flags, size, outline("disc", d.box_px)))
        if graded:
            x, y = (d.box_px[0] + d.box_px[2]) / 2, (d.box_px[1] + d.box_px[3]) / 2
            values = np.maximum(0, 1 - np.hypot((xx - x) / 22, (yy - y) / 12)).astype(np.float32)
            heatmaps.append(Heatmap("cam", "head", f"{level} Pfirrmann {d.pfirrmann}", values, "grader"))
    for number, v in enumerate(truth.vertebrae, 1):
        findings.append(Finding("vertebra", 0.9, v.box_px, number, v.level if named else None, outline_px=outline("vertebra", v.box_px)))
    evidence = cv2.GaussianBlur((truth.mask == 2).astype(np.float32), (0, 0), 3)
    heatmaps.append(Heatmap("class-evidence", "out", "disc", evidence, "segmenter"))
    report = Report(
        "complete",
        "lumbar-mri-sagittal",
        {},
        tuple(findings),
        tuple(heatmaps),
        Mask(truth.mask),
        "T2",
        "Levels are counted upwards from the sacrum.",
        engine={"backends": {"detector": "onnxruntime", "grader": "openvino"}, "precision": "int8"},
        bundle={"digest": "0123456789abcdef" * 4},
    )
    return _instance(image, truth.spacing_mm), report


def _pixels(png: bytes) -> Any:
    out = cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_UNCHANGED)
    assert out is not None
    return out


def _chunks(png: bytes) -> list[tuple[bytes, bytes]]:
    out, at = [], 8
    while at < len(png):
        (length,) = struct.unpack_from(">I", png, at)
        kind, body = png[at + 4 : at + 8], png[at + 8 : at + 8 + length]
        assert struct.unpack_from(">I", png, at + 8 + length)[0] == zlib.crc32(kind + body)
        out.append((kind, body))
        at += 12 + length
    return out


def _strip_rows(picture: Any) -> Any:
    """The rows at the foot whose first pixel has the strip's colour."""
    rows = 0
    while rows < picture.shape[0] and tuple(picture[-1 - rows, 0]) == STRIP_BGR:
        rows += 1
    return picture[picture.shape[0] - rows :]


def test_base_is_the_source_in_its_size_and_window() -> None:
    instance, _ = _study()
    base = _pixels(render.base_png(instance))
    assert base.shape == instance.pixels.shape
    assert base.dtype == np.uint8
    low, high = np.percentile(instance.pixels[instance.pixels > instance.pixels.min()], (1.0, 99.5))
    expected = np.clip((instance.pixels - low) / (high - low), 0, 1) * 255
    assert float(np.abs(base - expected).mean()) < 2


def test_base_shrinks_but_never_grows() -> None:
    instance = _instance(np.random.default_rng(0).uniform(0, 100, (300, 150)))
    assert _pixels(render.base_png(instance, max_side=100)).shape == (100, 50)
    assert _pixels(render.base_png(instance, max_side=1000)).shape == (300, 150)
    with pytest.raises(UsageError, match="max_side"):
        render.base_png(instance, max_side=0)


def test_a_constant_image_is_drawn_black() -> None:
    assert not _pixels(render.base_png(_instance(np.full((64, 64), 7)))).any()


def test_labels_keep_their_raw_values_in_every_reader() -> None:
    _, report = _study()
    assert report.mask is not None
    png = render.labels_png(report)
    for flag in (cv2.IMREAD_UNCHANGED, cv2.IMREAD_GRAYSCALE):
        assert np.array_equal(cv2.imdecode(np.frombuffer(png, np.uint8), flag), report.mask.values)
    header = dict(_chunks(png))[b"IHDR"]
    assert header[8:10] == b"\x08\x00"  # 8 bits, grey: no palette that a reader could resolve into colours
    comment = dict(_chunks(png))[b"tEXt"].decode("latin-1")
    assert comment == f"Comment\0{DISCLAIMER} Values: 0 background, 1 vertebra, 2 disc, 3 canal."
    assert set(np.unique(report.mask.values)) == {0, 1, 2, 3}


def test_shed_labels_are_refused_with_the_reason() -> None:
    _, report = _study()
    with pytest.raises(UsageError, match="shed"):
        render.labels_png(replace(report, mask=None, rung="detection-only"))


def test_heatmap_is_transparent_exactly_where_there_is_no_evidence() -> None:
    values = np.zeros((40, 30), np.float32)
    values[5:10, 5:10] = 1.0
    values[20:25, 5:10] = 0.5
    report = replace(_study()[1], heatmaps=(Heatmap("cam", "head", "L4/L5 Pfirrmann 4", values),))
    picture = _pixels(render.heatmap_png(report, 0))
    assert picture.shape == (40, 30, 4)
    assert np.array_equal(picture[..., 3] > 0, values > 0)
    assert picture[7, 7, 3] == 255
    assert 0 < picture[22, 7, 3] < 255
    turbo = cv2.applyColorMap(np.array([[255]], np.uint8), cv2.COLORMAP_TURBO)[0, 0]
    assert np.array_equal(picture[7, 7, :3], turbo)


def test_heatmap_opacity_grows_with_the_evidence() -> None:
    values = np.linspace(0, 1, 256, dtype=np.float32)[None].repeat(3, 0)
    alpha = _pixels(render.heatmap_png(replace(_study()[1], heatmaps=(Heatmap("cam", "h", "t", values),)), 0))[1, :, 3]
    assert np.all(np.diff(alpha.astype(int)) >= 0)
    assert (alpha[0], alpha[-1]) == (0, 255)


@pytest.mark.parametrize("index", [-1, 99])
def test_a_heatmap_that_is_not_there_is_refused(index: int) -> None:
    with pytest.raises(UsageError, match="no heatmap"):
        render.heatmap_png(_study()[1], index)


def test_a_withheld_heatmap_is_refused_with_its_reason_and_the_overlay_says_so() -> None:
    instance, report = _study()
    withheld = replace(report, heatmaps=(Heatmap("cam", "head", "L4/L5 Pfirrmann 4", None, "grader", "it does not add up"),))
    with pytest.raises(UsageError, match="it does not add up"):
        render.heatmap_png(withheld, 0)
    none = replace(report, heatmaps=())
    assert render.overlay_png(instance, withheld) != render.overlay_png(instance, none)


def test_every_picture_carries_the_disclaimer_as_text() -> None:
    instance, report = _study()
    pictures = (render.base_png(instance), render.overlay_png(instance, report), render.heatmap_png(report, 0), render.labels_png(report))
    for png in pictures:
        assert DISCLAIMER.encode() in dict(_chunks(png))[b"tEXt"]


@pytest.mark.parametrize("max_side", [None, 1000, 500, 256])
def test_the_overlay_has_the_disclaimer_burned_in_at_any_size(max_side: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    instance, report = _study()
    picture = _pixels(render.overlay_png(instance, report, max_side=max_side))
    strip = _strip_rows(picture)
    assert strip.shape[0] >= 15
    # The same strip drawn alone, so the words are there whole and nothing lies over them.
    assert np.array_equal(strip, render._strip(picture.shape[1], render._provenance(instance, report)))
    assert render._width(DISCLAIMER, 10, 700) < picture.shape[1]
    monkeypatch.setattr(render, "DISCLAIMER", " ")
    without = _pixels(render.overlay_png(instance, report, max_side=max_side))
    assert int((_strip_rows(without) != STRIP_BGR).sum()) < 0.8 * int((strip != STRIP_BGR).sum())


def test_the_strip_names_bundle_backend_and_image() -> None:
    instance, report = _study()
    words = render._provenance(instance, report)
    for part in ("0123456789ab", "onnxruntime+openvino", "INT8", "abababababab"):
        assert part in words
    other = replace(report, bundle={"digest": "f" * 64})
    assert not np.array_equal(
        _strip_rows(_pixels(render.overlay_png(instance, report))), _strip_rows(_pixels(render.overlay_png(instance, other)))
    )


def test_overlay_is_large_enough_to_read_and_bounded() -> None:
    instance, report = _study()
    picture = _pixels(render.overlay_png(instance, report))
    strip = _strip_rows(picture).shape[0]
    assert picture.shape[0] - strip == 1000
    assert 1000 < picture.shape[1] <= 2400
    assert picture.shape[2] == 3
    assert max(_pixels(render.overlay_png(instance, report, max_side=700)).shape) == 700


@pytest.mark.parametrize("switch", [{"boxes": False}, {"outlines": False}, {"grades": False}, {"heatmap": 0.0}, {"heatmap": 1.0}])
def test_each_switch_changes_pixels_of_the_image_and_of_the_legend(switch: dict[str, Any]) -> None:
    instance, report = _study()
    usual = _pixels(render.overlay_png(instance, report))
    other = _pixels(render.overlay_png(instance, report, **switch))
    assert usual.shape == other.shape
    changed = (usual != other).any(axis=2)
    assert changed[:1000, :1000].any()
    if switch != {"heatmap": 1.0}:  # opacity alone needs no other legend
        assert changed[:1000, 1000:].any()


def test_with_everything_off_the_image_is_the_bare_source() -> None:
    instance, report = _study()
    picture = _pixels(render.overlay_png(instance, report, boxes=False, outlines=False, grades=False, heatmap=0))[:1000, :1000]
    grey = cv2.resize(_pixels(render.base_png(instance)), (1000, 1000), interpolation=cv2.INTER_CUBIC)
    assert np.array_equal(picture, cv2.cvtColor(grey, cv2.COLOR_GRAY2BGR))


def test_structures_are_drawn_where_the_report_says() -> None:
    instance, _ = _study()
    square = ((100.0, 100.0), (200.0, 100.0), (200.0, 160.0), (100.0, 160.0))
    report = replace(_study()[1], findings=(Finding("disc", 0.9, (100, 100, 200, 160), 1, outline_px=square),), heatmaps=(), mask=None)

    def changed(**on: bool) -> Any:
        off = {"boxes": False, "outlines": False, "grades": False}
        bare, drawn = (_pixels(render.overlay_png(instance, report, **{**off, **o})) for o in ({}, on))
        ys, xs = np.nonzero((bare != drawn)[:1000, :1000].any(axis=2))
        return np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]) * 512 / 1000

    assert np.allclose(changed(boxes=True), (100, 100, 200, 160), atol=0.6)
    assert np.allclose(changed(outlines=True), (100, 100, 200, 160), atol=2.5)


def test_exact_maps_are_shown_before_the_general_one_and_combined() -> None:
    instance, report = _study()
    general = tuple(h for h in report.heatmaps if h.kind == "class-evidence")
    cams = tuple(h for h in report.heatmaps if h.kind == "cam")
    both = render.overlay_png(instance, report)
    assert both == render.overlay_png(instance, replace(report, heatmaps=cams))
    assert both != render.overlay_png(instance, replace(report, heatmaps=general))
    bare = {"boxes": False, "outlines": False, "grades": False}
    off = _pixels(render.overlay_png(instance, report, **bare, heatmap=0))[:1000, :1000]
    on = _pixels(render.overlay_png(instance, report, **bare))[:1000, :1000]
    for cam in cams:
        assert cam.values is not None
        y, x = (int((v + 0.5) * 1000 / 512) for v in np.unravel_index(int(cam.values.argmax()), cam.values.shape))
        assert (on[y, x] != off[y, x]).any()


def test_unnamed_discs_are_numbered_never_named() -> None:
    finding = _study(named=False)[1].findings[2]
    assert render._name(finding) == "#3"
    instance, unnamed = _study(named=False)
    assert render.overlay_png(instance, unnamed) != render.overlay_png(*_study())


def test_flags_are_words_from_one_half_on() -> None:
    finding = replace(_study()[1].findings[0], flags={"herniation": 0.5, "narrowing": 0.49, "bulging": 1.0})
    assert render._flags(finding) == "herniation, bulging"


def test_ungraded_and_partial_reports_are_drawn() -> None:
    instance, report = _study(graded=False)
    bare = tuple(replace(f, outline_px=(), measurements=()) for f in report.findings)
    partial = replace(
        report, status="partial", findings=bare, heatmaps=(), mask=None, rung="detection-only", shed=("heatmap", "masks", "grades")
    )
    drawn = _pixels(render.overlay_png(instance, partial))
    complete = _pixels(render.overlay_png(instance, replace(partial, status="complete", rung="full", shed=())))
    assert drawn.shape == complete.shape
    assert np.array_equal(drawn[:1000, :1000], complete[:1000, :1000])
    assert not np.array_equal(drawn[:1000, 1000:], complete[:1000, 1000:])


def test_a_refusal_is_drawn_with_its_reason() -> None:
    instance, _ = _study()
    errors = [{"code": "refused.no-spine", "message": m, "value": "", "remedy": "Send another."} for m in ("No spine.", "Out of time.")]
    a, b = (render.overlay_png(instance, Report("refused", "lumbar-mri-sagittal", {}, error=e)) for e in errors)
    assert a != b
    assert _strip_rows(_pixels(a)).shape[0] > 20


@pytest.mark.parametrize(
    ("shape", "spacing"),
    [
        ((64, 64), None),
        ((4096, 4096), (0.1, 0.1)),
        ((1, 64), None),
        ((64, 1), (1.0, 1.0)),
        ((40, 2000), None),
        ((100, 100), (50.0, 0.1)),
    ],
)
def test_extreme_sizes_are_drawn_within_the_limits(shape: tuple[int, int], spacing: tuple[float, float] | None) -> None:
    rows, columns = shape
    pixels = np.random.default_rng(1).integers(0, 1000, shape).astype(np.float32)
    box = (columns * 0.2, rows * 0.2, columns * 0.9, rows * 0.5)
    outline = ((box[0], box[1]), (box[2], box[1]), (box[2], box[3]), (box[0], box[3]))
    grade = Pfirrmann(5, (0.1, 0.1, 0.1, 0.1, 0.6))
    findings = tuple(Finding("disc", 0.9, box, n, "L5/S1", grade, {"herniation": 0.9}, outline_px=outline) for n in range(1, 17))
    findings += (Finding("vertebra", 0.9, box, 1, "L5", outline_px=outline),)
    heatmaps = (Heatmap("class-evidence", "out", "disc", np.ones(shape, np.float32)),)
    report = replace(_study()[1], findings=findings, heatmaps=heatmaps, mask=Mask(np.full(shape, 3, np.uint8)))
    picture = _pixels(render.overlay_png(_instance(pixels, spacing), report))
    assert max(picture.shape) <= 2400
    assert _strip_rows(picture).shape[0] >= 15
    assert _pixels(render.base_png(_instance(pixels, spacing))).shape == shape
    assert _pixels(render.heatmap_png(report, 0)).shape == (*shape, 4)
    assert _pixels(render.labels_png(report)).shape == shape


def test_physical_aspect_is_kept() -> None:
    pixels = np.random.default_rng(2).uniform(0, 9, (200, 400))
    empty = replace(_study()[1], findings=(), heatmaps=(), mask=None)
    flat = render._frame(_instance(pixels, (1.0, 1.0)))
    tall = render._frame(_instance(pixels, (2.0, 1.0)))
    assert (flat.width, flat.height) == (1000, 500)
    assert (tall.width, tall.height) == (1000, 1000)
    picture = _pixels(render.overlay_png(_instance(pixels, (2.0, 1.0)), empty))
    assert picture.shape[0] - _strip_rows(picture).shape[0] == 1000


@pytest.mark.parametrize("heights", [[40] * 6, [20, 60, 20, 60, 20, 20], [150] * 6])
def test_labels_never_overlap_and_stay_inside(heights: list[int]) -> None:
    rng = np.random.default_rng(3)
    for _ in range(50):
        tops = render._spread(sorted(rng.uniform(-50, 1050, 6)), heights, 4.0, 1000.0)
        assert tops[0] >= 0
        assert tops[-1] + heights[-1] <= 1000 + 1e-6
        assert all(b >= a + h + 4.0 - 1e-6 for a, b, h in zip(tops, tops[1:], heights, strict=False))


def test_labels_that_have_room_stay_where_they_are_wanted() -> None:
    assert render._spread([10.0, 200.0, 500.0], [40, 40, 40], 4.0, 1000.0) == [10.0, 200.0, 500.0]
    assert render._spread([], [], 4.0, 1000.0) == []


def test_labels_lie_beside_the_column_even_where_the_image_is_narrow() -> None:
    instance, report = _study()
    frame = render._frame(instance)
    labels = render._labels(frame, report)
    extra, edge = render._label_room(frame, report, labels)
    assert extra == 0
    assert edge < min(f.box_px[0] for f in report.findings) * frame.scale_x
    cut = int(min(f.box_px[0] for f in report.findings))
    shifted = tuple(
        replace(f, box_px=(f.box_px[0] - cut, f.box_px[1], f.box_px[2] - cut, f.box_px[3]), outline_px=()) for f in report.findings
    )
    narrow = _instance(instance.pixels[:, cut:])
    picture = _pixels(render.overlay_png(narrow, replace(report, findings=shifted, heatmaps=(), mask=None)))
    bare = render._frame(narrow)
    assert picture.shape[1] > bare.width + round(350 * bare.unit)


def test_labels_are_put_on_the_side_away_from_the_canal() -> None:
    _, report = _study()
    assert report.mask is not None
    assert render._anterior_left(report)
    width = report.mask.values.shape[1]
    mirrored = tuple(replace(f, box_px=(width - f.box_px[2], f.box_px[1], width - f.box_px[0], f.box_px[3])) for f in report.findings)
    assert not render._anterior_left(replace(report, findings=mirrored, mask=Mask(np.ascontiguousarray(report.mask.values[:, ::-1]))))
    assert render._anterior_left(replace(report, mask=None))


def test_words_from_outside_are_bounded() -> None:
    instance, report = _study()
    evil = "\x00\x1b[31m" + "W" * 100_000 + "\n" + "ü" * 10
    withheld = tuple(Heatmap("cam", "head", evil, None, "grader", evil) for _ in range(40))
    report = replace(
        report, notes=(evil,) * 500, naming=evil, heatmaps=withheld, protocol=evil, shed=("heatmap",), rung=evil, weighting=evil
    )
    picture = _pixels(render.overlay_png(instance, replace(report, engine={"backends": {"a": evil}}, bundle={"digest": evil})))
    assert max(picture.shape) <= 2400
    assert _strip_rows(picture).shape[0] >= 15
    assert len(render._clean(evil)) <= 320
    assert render._clean(evil).isprintable()


@pytest.mark.parametrize(
    "wrong", [{"heatmap": -0.1}, {"heatmap": 1.1}, {"heatmap": float("nan")}, {"max_side": 0}, {"max_side": 255}], ids=str
)
def test_settings_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    instance, report = _study()
    with pytest.raises(UsageError):
        render.overlay_png(instance, report, **wrong)


def test_a_report_about_another_image_is_refused() -> None:
    _, report = _study()
    with pytest.raises(UsageError, match="another size"):
        render.overlay_png(_instance(np.zeros((64, 64))), report)


def test_the_same_report_gives_the_same_bytes_in_any_thread() -> None:
    instance, report = _study()
    first = render.overlay_png(instance, report, max_side=800)
    with ThreadPoolExecutor(4) as pool:
        again = list(pool.map(lambda _: render.overlay_png(instance, report, max_side=800), range(6)))
    assert all(png == first for png in again)
    assert render.base_png(instance) == render.base_png(instance)
    assert render.heatmap_png(report, 0) == render.heatmap_png(report, 0)


# -- measurements ---------------------------------------------------------------------------------------------------


@lru_cache
def _measured() -> tuple[Instance, Report]:
    """The phantom with a slip, a fracture and a stenosis, measured from its own mask."""
    bent = phantom.Deformity({"L4/L5": 12.0}, {"L2": (0.35, 0.0)}, {"L3/L4": 4.0})
    image, truth = phantom.draw(np.random.default_rng(7), weighting="T2", hw=(512, 512), deformity=bent)
    regions = {"disc": km.discs(truth.mask), "vertebra": km.bodies(truth.mask)}
    parts, boxes = [], {}
    for label, truths in (("disc", truth.discs), ("vertebra", truth.vertebrae)):
        for number, t in enumerate(truths, 1):
            centre = np.array([t.box_px[0] + t.box_px[2], t.box_px[1] + t.box_px[3]]) / 2
            nearest = min(regions[label], key=lambda c: float(np.hypot(*(centre - c.centre))))
            parts.append(Part((label, number), t.level, nearest))  # type: ignore[arg-type]
            boxes[label, number] = t.box_px
    one, whole = measure(parts, truth.mask == km.CANAL, 1.0, truth.spacing_mm, "patient")
    findings = tuple(
        Finding(
            p.key[0], 0.9, boxes[p.key], p.key[1], p.level, measurements=tuple(one[p.key].measurements), omitted=tuple(one[p.key].omitted)
        )
        for p in parts
    )
    report = replace(_study()[1], findings=findings, heatmaps=(), mask=Mask(truth.mask), measurements=tuple(whole.measurements))
    return _instance(image, truth.spacing_mm), report


def test_measurements_have_a_switch_of_their_own() -> None:
    instance, report = _measured()
    bare = {"boxes": False, "outlines": False, "grades": False, "heatmap": 0.0}
    on, off = (_pixels(render.overlay_png(instance, report, **bare, measures=m)) for m in (True, False))
    changed = (on != off).any(axis=2)
    assert changed[:1000, :1000].any()
    assert changed[:1000, 1000:].any()
    grey = cv2.resize(_pixels(render.base_png(instance)), (1000, 1000), interpolation=cv2.INTER_CUBIC)
    assert np.array_equal(off[:1000, :1000], cv2.cvtColor(grey, cv2.COLOR_GRAY2BGR))


def test_what_has_a_grade_is_drawn_and_listed() -> None:
    """Without the slip's, the fracture's or the lordosis' number, other pixels: of the image and of the panel."""
    instance, report = _measured()
    whole = _pixels(render.overlay_png(instance, report))
    for name in ("meyerding_grade", "genant_grade", "lumbar_lordosis", "canal_diameter_narrowest"):
        less = replace(
            report,
            findings=tuple(replace(f, measurements=tuple(m for m in f.measurements if m.name != name)) for f in report.findings),
            measurements=tuple(m for m in report.measurements if m.name != name),
        )
        changed = (whole != _pixels(render.overlay_png(instance, less)))[:1000].any(axis=2)
        assert changed[:, :1000].any(), name
        assert changed[:, 1000:].any(), name


def test_a_canal_is_drawn_where_the_report_says() -> None:
    instance, report = _measured()
    canal = Measurement("canal_diameter", 12.0, "mm", (((300.0, 200.0), (330.0, 210.0)),))
    finding = Finding("disc", 0.9, (200, 190, 290, 220), 1, measurements=(canal,))
    plain = replace(report, findings=(replace(finding, measurements=()),), measurements=(), mask=None)
    bare = {"boxes": False, "outlines": False, "grades": False, "heatmap": 0.0}
    off = _pixels(render.overlay_png(instance, plain, **bare))
    on = _pixels(render.overlay_png(instance, replace(plain, findings=(finding,)), **bare))
    ys, xs = np.nonzero((on != off)[:1000, :1000].any(axis=2))
    assert abs(xs.min() * 0.512 - 300) < 2.5
    assert abs(ys.min() * 0.512 - 200) < 2.5
    # Its words stand behind it.
    assert xs.max() * 0.512 > 335


@pytest.mark.parametrize("mirrored", [False, True])
def test_an_angle_near_the_edge_stays_within_the_image(mirrored: bool) -> None:
    instance, report = _measured()
    lines = (((420.0, 60.0), (480.0, 50.0)), ((410.0, 400.0), (470.0, 360.0)))
    if mirrored:
        lines = tuple(tuple((512 - x, y) for x, y in line) for line in lines)  # type: ignore[assignment]
    angle = Measurement("lumbar_lordosis", 41.0, "deg", lines)
    bare = {"boxes": False, "outlines": False, "grades": False, "heatmap": 0.0}
    plain = replace(report, findings=report.findings[:1], measurements=(angle,))
    assert _pixels(render.overlay_png(instance, plain, **bare)).shape == _pixels(render.overlay_png(instance, report, **bare)).shape


def test_omissions_are_listed_once_for_each_reason() -> None:
    instance, report = _measured()
    odd = replace(report, measurements=(), omitted=(Omission("lumbar_lordosis", "no vertebra is named L1"),))
    more = replace(odd, omitted=(*odd.omitted, Omission("canal_diameter_narrowest", "no vertebra is named L1")))
    pictures = [_pixels(render.overlay_png(instance, r)) for r in (replace(odd, omitted=()), odd, more)]
    assert (pictures[0] != pictures[1]).any()
    assert (pictures[1] != pictures[2]).any()
    assert render._omissions(more.omitted) == ["Not measured: lumbar lordosis, canal diameter narrowest; no vertebra is named L1."]


def test_dashes_go_round_the_corners_of_a_polygon_and_are_as_long_as_told() -> None:
    square = np.array([[0.0, 0.0], [40.0, 0.0], [40.0, 40.0], [0.0, 40.0]])
    dashes = render._dashes(square, 15.0, 5.0)
    lengths = [float(np.hypot(*np.diff(d, axis=0).T).sum()) for d in dashes]
    assert lengths == pytest.approx([15.0] * 8)
    long = render._dashes(square, 60.0, 20.0)
    assert [len(d) for d in long] == [3, 3]
    assert long[0].tolist() == [[0, 0], [40, 0], [40, 20]]


def test_evidence_leaves_the_grey_as_it_is_where_there_is_none() -> None:
    grey = np.random.default_rng(0).integers(0, 256, (60, 50)).astype(np.uint8)
    evidence = np.zeros_like(grey)
    assert np.array_equal(render._blended(grey, evidence, 0.45), render._blended(grey, None, 0.45))
    evidence[20:31, 8:19] = np.linspace(1, 255, 121).reshape(11, 11)
    blended = render._blended(grey, evidence, 0.45)
    everywhere = render._blended(grey, np.maximum(evidence, 1), 0.45)  # evidence of 1 is all but nothing
    assert np.array_equal(blended[20:31, 8:19], everywhere[20:31, 8:19])
    outside = evidence == 0
    assert np.array_equal(blended[outside], cv2.cvtColor(grey, cv2.COLOR_GRAY2BGR)[outside])
