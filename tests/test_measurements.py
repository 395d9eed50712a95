"""Measurements of columns whose truth is exact; mirrored, turned, stretched; and of masks that allow none."""

from __future__ import annotations

import math
import tracemalloc
from dataclasses import replace
from functools import cache
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from appliance.measurements import LUMBAR, ODD_PIXELS, OF_BODY, OF_DISC, SLIP_FLOOR, Measured, Part, measure, not_outlined
from appliance.protocols import lumbar_mri
from appliance.report import Measurement
from kernels import mask as km
from kernels.nms import iou_matrix
from models import phantom

LENGTHS = ("mm", "px")
WHOLE = ("lumbar_lordosis", "canal_diameter_narrowest")
BENT = phantom.Deformity(slip_mm={"L4/L5": 12.0, "L2/L3": -6.0}, height_loss={"L1": (0.35, 0.0)}, stenosis_mm={"L3/L4": 4.0})


@cache
def drawn(seed: int, bent: bool = False, hw: tuple[int, int] = (512, 512)) -> phantom.Truth:
    deformity = BENT if bent else None
    return phantom.draw(np.random.default_rng(700 + seed), weighting="T2", hw=hw, deformity=deformity)[1]


def parts_of(
    mask: np.ndarray, truth: phantom.Truth, move: Any = lambda box: box, named: bool = True, spacing: Any = (1.0, 1.0)
) -> list[Part]:
    """The regions of a mask, named by the truth's boxes; `move` takes a box of the truth to where it is in the mask."""
    found = {"disc": km.discs(mask)}
    found["vertebra"] = km.bodies(mask, found["disc"], spacing)
    parts = []
    for label, truths in (("disc", truth.discs), ("vertebra", truth.vertebrae)):
        boxes = np.array([c.box for c in found[label]], np.float32).reshape(-1, 4)
        for i, t in enumerate(truths):
            overlap = iou_matrix(np.array([move(t.box_px)], np.float32), boxes)[0]
            if len(overlap) and overlap.max() > 0.4:
                parts.append(Part((label, i), t.level if named else None, found[label][int(overlap.argmax())]))  # type: ignore[arg-type]
    return parts


Values = dict[tuple[str, str], Measurement]


def values(parts: list[Part], found: dict[Any, Measured], whole: Measured) -> Values:
    out = {("", m.name): m for m in whole.measurements}
    for part in parts:
        out |= {(part.level or str(part.key), m.name): m for m in found[part.key].measurements}
    return out


def measured(mask: np.ndarray, truth: phantom.Truth, spacing: Any = None, kind: str | None = "patient", **how: Any) -> Values:
    parts = parts_of(mask, truth, spacing=spacing or truth.spacing_mm, **how)
    return values(parts, *measure(parts, mask == km.CANAL, 1.0, spacing or truth.spacing_mm, kind))


def close(a: Values, b: Values, mm: float, deg: float, least: int = 60) -> None:
    """The same structures measured alike: lengths within `mm`, angles within `deg`, ratios and percent accordingly."""
    both = a.keys() & b.keys()
    assert len(both) >= least
    limits = {"mm": mm, "px": mm, "deg": deg, "mm2": 40 * mm, "ratio": 0.06 * mm, "%": 5 * mm, "grade": 1}
    for key in both:
        assert a[key].unit == b[key].unit
        assert abs(a[key].value - b[key].value) <= limits[a[key].unit] + 1e-9, (key, a[key].value, b[key].value)


# -- against the truth ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bent", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_everything_is_near_the_truth(seed: int, bent: bool) -> None:
    truth = drawn(seed, bent)
    found = measured(truth.mask, truth)
    expected: dict[tuple[str, str], tuple[float, float]] = {("", "lumbar_lordosis"): (truth.lordosis_deg, 3.0)}
    for d in truth.discs:
        for name, value in zip(("anterior", "middle", "posterior"), d.heights_mm, strict=True):
            expected[d.level, f"disc_height_{name}"] = value, 2.5
        expected[d.level, "disc_height"] = d.mean_height_mm, 0.6
        expected[d.level, "disc_angle"] = d.angle_deg, 3.5
        expected[d.level, "segment_angle"] = d.segment_deg, 3.5
        expected[d.level, "canal_diameter"] = d.canal_mm, 1.4
        expected[d.level, "slip"] = d.slip_mm, 1.8
        expected[d.level, "slip_percent"] = d.slip_percent, 6.0
    for v in truth.vertebrae:
        for name, value in zip(("anterior", "middle", "posterior"), v.heights_mm, strict=True):
            expected[v.level, f"vertebral_height_{name}"] = value, 2.0
        expected[v.level, "wedge_angle"] = v.wedge_deg, 2.5
    seen = 0
    for key, (value, limit) in expected.items():
        if key in found:
            seen += 1
            assert found[key].value == pytest.approx(value, abs=limit), key
    assert seen > 0.75 * len(expected)


def test_a_slip_has_its_sign_and_its_grade() -> None:
    truth = drawn(0, bent=True)
    found = measured(truth.mask, truth)
    front, back = found["L4/L5", "slip"], found["L2/L3", "slip"]
    assert front.value > 9
    assert found["L4/L5", "meyerding_grade"] == replace(found["L4/L5", "meyerding_grade"], value=2.0, where="anterolisthesis")
    assert back.value < -4
    assert found["L2/L3", "meyerding_grade"].value == 1
    assert found["L2/L3", "meyerding_grade"].where == "retrolisthesis"
    none = found["L3/L4", "meyerding_grade"]
    assert abs(found["L3/L4", "slip_percent"].value) < 100 * SLIP_FLOOR
    assert none.value == 0


def test_a_fracture_has_its_grade_and_its_wedge() -> None:
    for seed in range(3):
        truth = drawn(seed, bent=True)
        found = measured(truth.mask, truth)
        assert found["L1", "height_loss"].value == pytest.approx(35, abs=5)
        assert found["L1", "genant_grade"].value == 2
        assert found["L1", "genant_grade"].where == "anterior height against its own posterior height"
        assert found["L1", "wedge_angle"].value < -9
        assert found["L4", "genant_grade"].value == 0


def test_a_stenosis_is_the_narrowest_place() -> None:
    for seed in range(3):
        truth, usual = drawn(seed, bent=True), drawn(seed)
        narrowest = measured(truth.mask, truth)["", "canal_diameter_narrowest"]
        least = min((d for d in truth.discs if d.level in LUMBAR), key=lambda d: d.canal_mm)
        assert narrowest.where.split("; ")[0] == least.level
        assert narrowest.value == pytest.approx(least.canal_mm, abs=1.2)
        assert narrowest.value < measured(usual.mask, usual)["", "canal_diameter_narrowest"].value - 1


def test_a_canal_that_is_closed_at_a_disc_is_named_as_missing() -> None:
    truth = drawn(0)
    closed = truth.mask.copy()
    disc = next(d for d in truth.discs if d.level == "L3/L4")
    rows = slice(int(disc.box_px[1]), int(disc.box_px[3]))
    closed[rows][closed[rows] == km.CANAL] = 0
    assert measured(truth.mask, truth)["", "canal_diameter_narrowest"].where in LUMBAR
    assert measured(closed, truth)["", "canal_diameter_narrowest"].where.endswith("; not measured at L3/L4")


def test_lines_are_where_the_number_comes_from() -> None:
    truth = drawn(1, bent=True)
    row, column = truth.spacing_mm
    rows, columns = truth.mask.shape
    found = measured(truth.mask, truth)
    checked = set()
    for (_, name), m in found.items():
        points = np.array(m.lines_px).reshape(-1, 2, 2)
        assert (points > -20).all()
        assert (points[..., 0] < columns + 20).all()
        assert (points[..., 1] < rows + 20).all()
        runs = (points[:, 1] - points[:, 0]) * [column, row]
        if name.startswith(("canal", "vertebral_height_a", "vertebral_height_m", "vertebral_height_p")) and m.unit == "mm":
            assert float(np.hypot(*runs[0])) == pytest.approx(m.value, rel=1e-6)
            checked.add(name)
        elif name == "slip":
            assert float(np.hypot(*runs[0])) == pytest.approx(abs(m.value), rel=1e-6)
            checked.add(name)
        elif m.unit == "deg":
            a, b = runs
            angle = math.degrees(math.atan2(abs(a[0] * b[1] - a[1] * b[0]), a @ b))
            assert angle == pytest.approx(abs(m.value), abs=1e-6)
            checked.add(name)
    assert checked >= {
        "canal_diameter",
        "vertebral_height_posterior",
        "slip",
        "wedge_angle",
        "disc_angle",
        "segment_angle",
        "lumbar_lordosis",
    }


# -- the same column, shown otherwise -------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(2))
def test_a_patient_who_looks_the_other_way_measures_the_same(seed: int) -> None:
    truth = drawn(seed, bent=True)
    columns = truth.mask.shape[1]
    mirrored = np.ascontiguousarray(truth.mask[:, ::-1])
    other = measured(mirrored, truth, move=lambda b: (columns - b[2], b[1], columns - b[0], b[3]))
    close(measured(truth.mask, truth), other, mm=1e-3, deg=1e-3)


@settings(max_examples=8, deadline=None)
@given(st.floats(-12, 12), st.floats(-3, 3), st.floats(-3, 3))
def test_a_turn_and_a_shift_change_little(degrees: float, dx: float, dy: float) -> None:
    truth = drawn(0, bent=True)
    rows, columns = truth.mask.shape
    matrix = cv2.getRotationMatrix2D((columns / 2, rows / 2), degrees, 1.0)
    matrix[:, 2] += (dx, dy)
    planes = [cv2.warpAffine((truth.mask == k).astype(np.float32), matrix, (columns, rows)) for k in (1, 2, 3)]
    turned = np.where(np.max(planes, 0) >= 0.5, 1 + np.argmax(planes, 0), 0).astype(np.uint8)

    def move(box: Any) -> tuple[float, float, float, float]:
        x, y = matrix @ [(box[0] + box[2]) / 2, (box[1] + box[3]) / 2, 1]
        w, h = (box[2] - box[0]) / 2, (box[3] - box[1]) / 2
        return x - w, y - h, x + w, y + h

    close(measured(truth.mask, truth), measured(turned, truth, move=move), mm=1.6, deg=2.5, least=40)


@pytest.mark.parametrize("zoom", [(2, 2), (1, 1.3), (1.3, 1), (1, 2), (2, 1)])
def test_pixels_of_another_size_or_shape_measure_the_same(zoom: tuple[float, float]) -> None:
    truth = drawn(1, bent=True)
    rows, columns = (round(side * z / 10) * 10 for side, z in zip(truth.mask.shape, zoom, strict=True))
    down, across = rows / truth.mask.shape[0], columns / truth.mask.shape[1]
    finer = np.asarray(cv2.resize(truth.mask, (columns, rows), interpolation=cv2.INTER_NEAREST_EXACT), np.uint8)
    spacing = truth.spacing_mm[0] / down, truth.spacing_mm[1] / across
    other = measured(finer, truth, spacing, move=lambda b: (b[0] * across, b[1] * down, b[2] * across, b[3] * down))
    plain = measured(truth.mask, truth)
    close(plain, other, mm=1.6, deg=3.0)
    for key in plain.keys() & other.keys():
        a, b = (np.array(v[key].lines_px).reshape(-1, 2) for v in (plain, other))
        if plain[key].unit == "deg":
            assert np.abs(b / [across, down] - a).max() < 8


@pytest.mark.parametrize("spacing", [(100.0, 1e-3), (1e-3, 100.0), (100.0, 1e-9)])
def test_a_spacing_that_cannot_be_true_measures_nothing_and_costs_nothing(spacing: tuple[float, float]) -> None:
    """A header may say anything; steps of the finer spacing over the coarser one would take memory without end."""
    truth = drawn(1)
    parts = parts_of(truth.mask, truth, spacing=spacing)
    tracemalloc.start()
    try:
        one, whole = measure(parts, truth.mask == km.CANAL, 1.0, spacing, "patient")
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()
    complete(parts, one, whole)
    assert not whole.measurements
    assert {o.reason for m in (*one.values(), whole) for o in m.omitted} == {ODD_PIXELS}


def test_the_protocol_tells_the_shape_of_its_pixels() -> None:
    """A slice with columns twice as fine as its rows has as many bodies as the same with square pixels."""
    truth = drawn(1)
    wide = np.asarray(cv2.resize(truth.mask, None, fx=2, fy=1, interpolation=cv2.INTER_NEAREST), np.uint8)
    square = lumbar_mri._structures(truth.mask, truth.spacing_mm).regions["vertebra"]
    found = lumbar_mri._structures(wide, (truth.spacing_mm[0], truth.spacing_mm[1] / 2)).regions["vertebra"]
    assert len(found) == len(square) == len(lumbar_mri._structures(truth.mask).regions["vertebra"])


def test_working_pixels_give_source_pixels_back() -> None:
    truth = drawn(1)
    parts = parts_of(truth.mask, truth)
    canal = truth.mask == km.CANAL
    plain = values(parts, *measure(parts, canal, 1.0, truth.spacing_mm, "patient"))
    # The same pixels, but each stands for two by two of the source.
    half = values(parts, *measure(parts, canal, 0.5, (truth.spacing_mm[0] / 2, truth.spacing_mm[1] / 2), "patient"))
    assert plain.keys() == half.keys()
    for key, m in plain.items():
        assert half[key].value == pytest.approx(m.value, rel=1e-9)
        np.testing.assert_allclose(np.array(half[key].lines_px), 2 * np.array(m.lines_px), rtol=1e-9)


# -- what geometry does not allow -----------------------------------------------------------------------------------


def test_without_spacing_lengths_are_pixels() -> None:
    truth = drawn(1)
    parts = parts_of(truth.mask, truth)
    pixels = values(parts, *measure(parts, truth.mask == km.CANAL, 1.0, None, None))
    mm = measured(truth.mask, truth)
    assert pixels.keys() == mm.keys()
    for key, m in mm.items():
        if m.unit in ("mm", "mm2"):
            assert pixels[key].unit == m.unit.replace("mm", "px")
            assert pixels[key].value == pytest.approx(m.value / truth.spacing_mm[0] ** (2 if m.unit == "mm2" else 1), rel=1e-6, abs=1e-4)
        else:
            assert (pixels[key].unit, pixels[key].value) == (m.unit, pytest.approx(m.value, abs=1e-4))


@pytest.mark.parametrize("kind", ["detector", "film"])
def test_millimetres_of_a_detector_are_not_those_of_the_patient(kind: str) -> None:
    truth = drawn(1)
    found = measured(truth.mask, truth, kind=kind)
    plain = measured(truth.mask, truth)
    assert found["L4", "vertebral_height_posterior"].unit == "px"
    assert found["L4", "vertebral_height_posterior"].value * truth.spacing_mm[0] == pytest.approx(
        plain["L4", "vertebral_height_posterior"].value
    )
    assert found["", "lumbar_lordosis"].value == pytest.approx(plain["", "lumbar_lordosis"].value)
    flat = np.repeat(truth.mask, 2, 0)
    parts = parts_of(flat, truth, move=lambda b: (b[0], 2 * b[1], b[2], 2 * b[3]))
    one, whole = measure(parts, flat == km.CANAL, 1.0, (truth.spacing_mm[0] / 2, truth.spacing_mm[1]), kind)
    assert not [m for m in values(parts, one, whole).values() if m.unit in (*LENGTHS, "px2", "mm2")]
    assert any("not square" in o.reason for o in whole.omitted)
    assert any(m.name == "lumbar_lordosis" for m in whole.measurements)


def test_without_a_canal_there_is_no_front_but_there_are_middles() -> None:
    truth = drawn(1)
    blind = np.where(truth.mask == km.CANAL, 0, truth.mask).astype(np.uint8)
    found = measured(blind, truth)
    names = {name for _, name in found}
    assert names == {"disc_height", "disc_depth", "disc_area", "disc_height_index", "disc_height_middle", "vertebral_height_middle"}
    parts = parts_of(blind, truth)
    one, whole = measure(parts, blind == km.CANAL, 1.0, truth.spacing_mm, "patient")
    assert {o.name for o in whole.omitted} == set(WHOLE)
    reasons = {o.reason for m in one.values() for o in m.omitted if o.name in ("slip", "wedge_angle", "disc_angle")}
    assert "the canal is not seen on one side of the column, so front and back cannot be told" in reasons


def test_a_canal_on_both_sides_is_none() -> None:
    truth = drawn(1)
    both = truth.mask.copy()
    canal = both == km.CANAL
    # Above the middle of the column it lies in front.
    half = int(np.median([d.box_px[1] for d in truth.discs]))
    canal[half:] = False
    both[canal] = 0
    for v in truth.vertebrae:
        both[int(v.box_px[1]) : min(int(v.box_px[3]), half), max(0, int(v.box_px[0]) - 30) : int(v.box_px[0]) - 8] = km.CANAL
    assert ("", "lumbar_lordosis") not in measured(both, truth)


def test_levels_that_are_not_named_give_no_lordosis() -> None:
    truth = drawn(1)
    parts = parts_of(truth.mask, truth, named=False)
    _, whole = measure(parts, truth.mask == km.CANAL, 1.0, truth.spacing_mm, "patient")
    assert [(o.name, o.reason) for o in whole.omitted] == [
        ("lumbar_lordosis", "the upper end plate of S1 is not known: no disc is named L5/S1")
    ]
    without = [p for p in parts_of(truth.mask, truth) if p.level != "L1"]
    _, whole = measure(without, truth.mask == km.CANAL, 1.0, truth.spacing_mm, "patient")
    assert [(o.name, o.reason) for o in whole.omitted] == [("lumbar_lordosis", "no vertebra is named L1")]


def test_the_slip_of_l5_needs_a_corner_that_nobody_segments() -> None:
    truth = drawn(1)
    parts = parts_of(truth.mask, truth)
    one, _ = measure(parts, truth.mask == km.CANAL, 1.0, truth.spacing_mm, "patient")
    lowest = next(p for p in parts if p.level == "L5/S1")
    omitted = {o.name: o.reason for o in one[lowest.key].omitted}
    assert omitted == dict.fromkeys(
        ("slip", "slip_percent", "meyerding_grade"), "S1 is not segmented, so its posterior corner is not known"
    )


def region(pixels: np.ndarray) -> km.Component:
    return km.components(pixels)[0]


def blank() -> np.ndarray:
    return np.zeros((200, 200), bool)


def column(merged: bool = False, cut: bool = False) -> tuple[list[Part], np.ndarray]:
    """Three upright bodies and two discs with a canal to their right; the upper two bodies `merged`, or the column `cut` above."""
    canal = blank()
    canal[:, 120:140] = True
    tops = [0 if cut else 8, 66, 124]
    bodies = []
    for top in tops:
        pixels = blank()
        pixels[top : top + (58 if cut and top == 0 else 44) - (8 if cut and top == 0 else 0), 40:108] = True
        bodies.append(pixels)
    if merged:
        bodies[0][8:110, 40:108] = True
        bodies.pop(1)
    discs = []
    for top in (53, 111):
        pixels = blank()
        pixels[top : top + 12, 40:108] = True
        discs.append(pixels)
    parts = [Part(("vertebra", i), None, region(p)) for i, p in enumerate(bodies)]
    return parts + [Part(("disc", i), None, region(p)) for i, p in enumerate(discs)], canal


def test_a_column_of_blocks_is_exact() -> None:
    parts, canal = column()
    found = values(parts, *measure(parts, canal, 1.0, (0.5, 0.5), "patient"))
    for i in range(3):
        for name in ("anterior", "middle", "posterior"):
            assert found[f"('vertebra', {i})", f"vertebral_height_{name}"].value == pytest.approx(22, abs=0.01)
        assert found[f"('vertebra', {i})", "wedge_angle"].value == pytest.approx(0, abs=0.01)
        assert found[f"('vertebra', {i})", "genant_grade"].value == 0
    for i in range(2):
        assert found[f"('disc', {i})", "disc_height_middle"].value == pytest.approx(7, abs=0.01)
        assert found[f"('disc', {i})", "disc_height"].value == pytest.approx(6, abs=0.01)
        assert found[f"('disc', {i})", "disc_height_index"].value == pytest.approx(6 / 22, abs=0.001)
        assert found[f"('disc', {i})", "slip"].value == pytest.approx(0, abs=0.01)
        assert found[f"('disc', {i})", "canal_diameter"].value == pytest.approx(10, abs=0.01)
    assert found["", "canal_diameter_narrowest"].value == pytest.approx(10, abs=0.01)


def complete(parts: list[Part], found: dict[Any, Measured], whole: Measured) -> None:
    """Every name is measured or omitted, once, and every number is one."""
    for part in parts:
        one = found[part.key]
        names = [m.name for m in one.measurements] + [o.name for o in one.omitted]
        assert sorted(names) == sorted(OF_DISC if part.key[0] == "disc" else OF_BODY)
    assert sorted([m.name for m in whole.measurements] + [o.name for o in whole.omitted]) == sorted(WHOLE)
    for m in [*whole.measurements, *(m for one in found.values() for m in one.measurements)]:
        assert np.isfinite(m.value)
        assert np.isfinite(np.array(m.lines_px)).all()
    for o in [*whole.omitted, *(o for one in found.values() for o in one.omitted)]:
        assert len(o.reason) > 10
        assert not o.reason.endswith(".")


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("bent", [False, True])
def test_nothing_is_lost_without_a_word(seed: int, bent: bool) -> None:
    truth = drawn(seed, bent)
    parts = parts_of(truth.mask, truth)
    complete(parts, *measure(parts, truth.mask == km.CANAL, 1.0, truth.spacing_mm, "patient"))


def test_two_bodies_grown_together_are_not_one() -> None:
    parts, canal = column(merged=True)
    found, whole = measure(parts, canal, 1.0, (0.5, 0.5), "patient")
    complete(parts, found, whole)
    assert not found["vertebra", 0].measurements
    assert {o.reason for o in found["vertebra", 0].omitted} == {"its height is 1.50 of its depth, which no single vertebral body has"}
    assert found["vertebra", 1].measurements


def test_a_body_cut_by_the_edge_has_no_height() -> None:
    parts, canal = column(cut=True)
    found, whole = measure(parts, canal, 1.0, (0.5, 0.5), "patient")
    complete(parts, found, whole)
    assert {o.reason for o in found["vertebra", 0].omitted} == {"it is cut off by the edge of the image"}
    assert "of the vertebra above: it is cut off by the edge of the image" in {o.reason for o in found["disc", 0].omitted}


def test_a_body_with_a_pedicle_grown_on_is_refused_or_hardly_moved() -> None:
    parts, canal = column()
    plain = values(parts, *measure(parts, canal, 1.0, (0.5, 0.5), "patient"))
    for rows in (6, 10, 14, 18, 24):
        pixels = parts[1].region.pixels.copy()
        pixels[66 : 66 + rows, 108:119] = True
        odd = [replace(parts[1], region=region(pixels)) if p is parts[1] else p for p in parts]
        found, whole = measure(odd, canal, 1.0, (0.5, 0.5), "patient")
        complete(odd, found, whole)
        for m in found["vertebra", 1].measurements:
            if m.unit == "deg":
                assert abs(m.value - plain["('vertebra', 1)", m.name].value) < 6


@pytest.mark.parametrize("shape", ["pixel", "line", "dust", "ring", "triangle"])
@pytest.mark.parametrize("label", ["disc", "vertebra"])
def test_odd_regions_raise_nothing_and_are_no_vertebrae(shape: str, label: str) -> None:
    pixels = blank()
    if shape == "pixel":
        pixels[90, 70] = True
    elif shape == "line":
        pixels[90, 40:108] = True
    elif shape == "dust":
        pixels[60:110:2, 40:108:2] = True
    elif shape == "ring":
        pixels[66:110, 40:108] = True
        pixels[70:106, 44:104] = False
    else:
        pixels[60:110, 40:108] = np.tri(50, 68, 0, bool)
    parts, canal = column()
    odd = Part((label, 9), None, km.Component((40, 60, 108, 110), int(pixels.sum()), (74.0, 85.0), pixels))  # type: ignore[arg-type]
    for others in ([], [parts[0]], [parts[3]], parts):
        everything = [*others, odd]
        found, whole = measure(everything, canal, 1.0, (0.5, 0.5), "patient")
        complete(everything, found, whole)
    if shape in ("pixel", "line", "dust") and label == "vertebra":
        assert not found[odd.key].measurements


def test_nothing_at_all() -> None:
    for canal in (blank(), ~blank()):
        found, whole = measure([], canal, 1.0, (0.5, 0.5), "patient")
        assert found == {}
        assert {o.name for o in whole.omitted} == set(WHOLE)


def test_one_disc_alone_has_its_size_and_its_canal() -> None:
    parts, canal = column()
    disc = parts[3]
    found, whole = measure([disc], canal, 1.0, (0.5, 0.5), "patient")
    complete([disc], found, whole)
    assert [m.name for m in found[disc.key].measurements] == ["disc_height", "disc_depth", "disc_area", "canal_diameter"]
    assert whole.measurements[0].value == pytest.approx(10, abs=0.01)


@pytest.mark.parametrize("label", ["disc", "vertebra"])
def test_what_was_not_outlined_says_so(label: Any) -> None:
    out = not_outlined(label)
    assert not out.measurements
    assert {o.name for o in out.omitted} == set(OF_DISC if label == "disc" else OF_BODY)
