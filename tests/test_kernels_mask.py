"""Separate structures out of an indexed mask: on shapes made by hand, and on phantoms whose truth is known."""

from __future__ import annotations

import itertools
from functools import cache

import cv2
import numpy as np
import pytest

from kernels import mask as km
from kernels.nms import iou_matrix
from models import phantom

SEEDS = range(6)


@cache
def _truth(seed: int) -> phantom.Truth:
    return phantom.draw(np.random.default_rng(100 + seed), hw=(384, 320), weighting="T2")[1]


# -- components -----------------------------------------------------------------------------------------------------


def test_components_are_8_connected_largest_first_with_edges_and_centre() -> None:
    region = np.zeros((20, 30), bool)
    region[2:5, 3:9] = True
    region[10, 10] = region[11, 11] = True
    region[15, 20] = True
    found = km.components(region)
    assert [c.area for c in found] == [18, 2, 1]
    assert found[0].box == (3, 2, 9, 5)
    assert found[0].centre == (6.0, 3.5)
    np.testing.assert_array_equal(np.logical_or.reduce([c.pixels for c in found]), region)
    assert [c.area for c in km.components(region, min_area=2)] == [18, 2]
    assert km.components(np.zeros((5, 5), bool)) == []


def test_the_number_of_components_is_limited() -> None:
    region = np.zeros((64, 64), bool)
    region[::2, ::2] = True
    assert region.sum() > km.MAX_COMPONENTS
    assert len(km.components(region)) == km.MAX_COMPONENTS


# -- phantoms -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_discs_of_a_phantom_are_its_discs_from_the_lowest_up(seed: int) -> None:
    truth = _truth(seed)
    found = km.discs(truth.mask)
    # The truth lists what lies at least half in view; a sliver at the upper edge is in the mask alone.
    assert len(truth.discs) <= len(found) <= len(truth.discs) + 1
    for c, d in zip(found, truth.discs, strict=False):
        assert float(iou_matrix(np.array([c.box], np.float32), np.array([d.box_px], np.float32))[0, 0]) > 0.9
    assert all(a.centre[1] > b.centre[1] for a, b in itertools.pairwise(found))


@pytest.mark.parametrize("seed", SEEDS)
def test_bodies_of_a_phantom_are_cut_free_of_the_spinous_processes(seed: int) -> None:
    truth = _truth(seed)
    found = km.bodies(truth.mask)
    assert len(truth.vertebrae) <= len(found) <= len(truth.vertebrae) + 1
    boxes = np.array([c.box for c in found], np.float32)
    overlaps = iou_matrix(np.array([v.box_px for v in truth.vertebrae], np.float32), boxes)
    assert overlaps.argmax(1).tolist() == list(range(len(truth.vertebrae)))
    assert float(overlaps.max(1).min()) > 0.7
    assert all((truth.mask[c.pixels] == km.VERTEBRA).all() for c in found)


@pytest.mark.parametrize(("rows", "columns"), [(0.5, 1.0), (1.0, 0.5), (2.0, 1.0)])
def test_bodies_are_the_same_whatever_the_shape_of_a_pixel(rows: float, columns: float) -> None:
    """Without the spacing a slice of half the rows lost three bodies of four: the opening was twice too high for them."""
    for seed in SEEDS:
        truth = _truth(seed)
        mask = cv2.resize(truth.mask, None, fx=columns, fy=rows, interpolation=cv2.INTER_NEAREST)
        found = km.bodies(mask, spacing=(0.7 / rows, 0.7 / columns))
        square = km.bodies(truth.mask)
        assert len(found) == len(square)
        for mine, its in zip(found, square, strict=True):
            want = cv2.resize(its.pixels.astype(np.uint8), mask.shape[::-1], interpolation=cv2.INTER_NEAREST) > 0
            assert (mine.pixels & want).sum() / (mine.pixels | want).sum() > 0.9


def test_square_pixels_of_any_size_are_cut_alike() -> None:
    for spacing in ((0.7, 0.7), (3.0, 3.0)):
        found, plain = km.bodies(_truth(0).mask, spacing=spacing), km.bodies(_truth(0).mask)
        assert [c.box for c in found] == [c.box for c in plain]
        assert all(np.array_equal(a.pixels, b.pixels) for a, b in zip(found, plain, strict=True))


def test_bodies_joined_to_posterior_elements_by_pedicles_are_cut_off() -> None:
    mask = np.zeros((200, 200), np.uint8)
    for top in (20, 70, 120):
        mask[top : top + 36, 60:110] = km.VERTEBRA
        mask[top + 10 : top + 18, 110:150] = km.VERTEBRA  # pedicle
        mask[top + 4 : top + 30, 140:160] = km.VERTEBRA  # spinous process
        mask[top + 38 : top + 48, 60:110] = km.DISC
    found = km.bodies(mask)
    assert [c.box[1::2] for c in found] == [(120, 156), (70, 106), (20, 56)]
    # Growing back what the opening rounded off reaches a few pixels into the pedicle, never to the process.
    assert all(c.box[0] == 60 and 110 <= c.box[2] <= 118 for c in found)


def test_a_body_cut_by_the_image_edge_survives() -> None:
    mask = np.zeros((100, 120), np.uint8)
    mask[0:14, 30:80] = km.VERTEBRA
    mask[16:26, 30:80] = km.DISC
    mask[28:64, 30:80] = km.VERTEBRA
    assert [c.box[1] for c in km.bodies(mask)] == [28.0, 0.0]


def test_specks_are_no_discs_and_bone_far_from_discs_no_body() -> None:
    mask = np.zeros((120, 120), np.uint8)
    for top in (20, 50, 80):
        mask[top : top + 8, 30:70] = km.DISC
    mask[5:9, 100:104] = km.DISC
    mask[10:11, 10:14] = km.DISC
    assert len(km.discs(mask)) == 3
    mask[90:118, 90:118] = km.VERTEBRA
    assert km.bodies(mask) == []


def test_without_discs_there_is_nothing() -> None:
    blank = np.zeros((50, 50), np.uint8)
    assert km.discs(blank) == km.bodies(blank) == []
    blank[10:30, 10:30] = km.VERTEBRA
    assert km.bodies(blank) == []


# -- outlines -------------------------------------------------------------------------------------------------------


def _region(kind: str) -> np.ndarray:
    out = np.zeros((160, 160), np.uint8)
    if kind == "ellipse":
        cv2.ellipse(out, (80, 80), (60, 30), 20, 0, 360, 1, -1)
    elif kind == "rectangle":
        out[40:110, 20:130] = 1
    else:
        return km.bodies(_truth(0).mask)[1].pixels
    return out > 0


@pytest.mark.parametrize("kind", ["ellipse", "rectangle", "vertebra"])
def test_an_outline_encloses_its_region(kind: str) -> None:
    region = _region(kind)
    polygon = np.array(km.outline(region), np.float32)
    assert abs(cv2.contourArea(polygon) - region.sum()) / region.sum() < 0.04
    drawn = np.zeros(region.shape, np.uint8)
    cv2.fillPoly(drawn, [np.rint(polygon - 0.5).astype(np.int32)], 1)
    assert (drawn.astype(bool) & region).sum() / (drawn.astype(bool) | region).sum() > 0.96
    assert len(polygon) < 80


def test_the_outline_is_that_of_the_largest_part_in_pixel_edges() -> None:
    region = np.zeros((30, 30), bool)
    region[2:4, 2:4] = True
    region[10:21, 5:26] = True
    corners = np.array(sorted(km.outline(region)))
    assert np.abs(corners - [(5, 10), (5, 21), (26, 10), (26, 21)]).max() < 0.07
    assert km.outline(np.zeros((5, 5), bool)) == ()


# -- windows --------------------------------------------------------------------------------------------------------


def test_components_are_those_of_the_whole_image_in_its_order() -> None:
    """They are looked for where the region lies only; equals in size come in the same order."""
    rng = np.random.default_rng(5)
    for _ in range(60):
        region = np.zeros((50, 61), bool)
        y, x = (int(v) for v in rng.integers(0, 24, 2))
        region[y : y + 23, x : x + 29] = rng.uniform(size=(23, 29)) < 0.2
        count, labels, stats, centres = cv2.connectedComponentsWithStats(region.astype(np.uint8), connectivity=8)
        order = sorted(range(1, count), key=lambda i: -int(stats[i, cv2.CC_STAT_AREA]))
        found = km.components(region)
        assert [c.centre for c in found] == [(float(centres[i][0]) + 0.5, float(centres[i][1]) + 0.5) for i in order]
        for c, i in zip(found, order, strict=True):
            np.testing.assert_array_equal(c.pixels, labels == i)
            assert c.area == stats[i, cv2.CC_STAT_AREA]
            assert km.bounds(c.pixels) == c.window


def test_bodies_and_outlines_do_not_depend_on_how_much_lies_around_them() -> None:
    mask = _truth(1).mask
    inner = np.zeros_like(mask)
    inner[40:340, 8:-8] = mask[40:340, 8:-8]
    wide = np.zeros((inner.shape[0] + 101, inner.shape[1] + 57), np.uint8)
    wide[64 : 64 + inner.shape[0], 31 : 31 + inner.shape[1]] = inner
    small, large = km.bodies(inner), km.bodies(wide)
    assert len(small) == len(large) > 2
    for a, b in zip(small, large, strict=True):
        assert (a.area, a.box) == (b.area, (b.box[0] - 31, b.box[1] - 64, b.box[2] - 31, b.box[3] - 64))
        assert b.window == km.bounds(b.pixels)
        np.testing.assert_array_equal(a.pixels[a.window], b.pixels[b.window])
        assert km.outline(a.pixels, window=a.window) == tuple((x - 31, y - 64) for x, y in km.outline(b.pixels))


def test_nothing_has_empty_bounds() -> None:
    rows, columns = km.bounds(np.zeros((4, 5), bool))
    assert np.zeros((4, 5))[rows, columns].size == 0


def _bodies_of_the_whole_image(mask: np.ndarray) -> list[tuple[tuple[float, float], np.ndarray]]:
    """Centre and pixels of the bodies, square pixels, with nothing cut to where it is."""
    width = float(np.median([max(c.box[2] - c.box[0], c.box[3] - c.box[1]) for c in km.discs(mask)]))

    def ellipse(across: float) -> np.ndarray:
        return np.asarray(cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (max(3, int(across) | 1),) * 2), np.uint8)

    kernel = ellipse(0.4 * width)
    pad = len(kernel)
    vertebra = (mask == km.VERTEBRA).astype(np.uint8)
    padded = cv2.copyMakeBorder(vertebra, pad, pad, pad, pad, cv2.BORDER_REPLICATE)
    opened = cv2.morphologyEx(padded, cv2.MORPH_OPEN, kernel)[pad:-pad, pad:-pad]
    near = cv2.dilate((mask == km.DISC).astype(np.uint8), ellipse(0.3 * width)) > 0
    touching = [c for c in km.components(opened > 0, min_area=12) if (c.pixels & near).any()]
    grown = [
        (c.centre, (cv2.dilate(c.pixels.astype(np.uint8), ellipse(5.0), iterations=max(1, pad // 8)) & vertebra) > 0)
        for c in touching
        if c.area >= 0.15 * touching[0].area
    ]
    return sorted(grown, key=lambda found: -found[0][1])


@pytest.mark.parametrize("seed", SEEDS)
def test_bodies_are_those_that_the_whole_image_gives(seed: int) -> None:
    """Cut anywhere, so that bodies end at the image's edge, and at the edge of what is worked on."""
    rng = np.random.default_rng(seed)
    mask = _truth(seed).mask
    for _ in range(6):
        y, x = (int(v) for v in rng.integers(0, 120, 2))
        part = mask[y : y + 200, x : x + int(rng.integers(80, 200))].copy()
        part[:, part.shape[1] // 2 + int(rng.integers(0, 60)) :] = 0  # a cut with image beyond it
        part[: int(rng.integers(0, 40))] = 0
        if not km.discs(part):
            continue
        expected, found = _bodies_of_the_whole_image(part), km.bodies(part)
        assert [c.centre for c in found] == [centre for centre, _ in expected]
        for c, (_, pixels) in zip(found, expected, strict=True):
            np.testing.assert_array_equal(c.pixels, pixels)
            assert c.area == pixels.sum()
