"""What discs look like in numbers: it follows the truth of phantoms, and not the units, the size or the side of the picture."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import appearance
from kernels import mask as km
from kernels.appearance import NAMES, Scene, describe
from kernels.preprocess import normalise
from models import phantom

Box = tuple[float, float, float, float]
PLACE = {name: i for i, name in enumerate(NAMES)}


def drawn(seed: int, **options: object) -> tuple[np.ndarray, np.ndarray, list[Box], list[int]]:
    """(raw pixels, mask, disc boxes from below, grades)."""
    pixels, truth = phantom.draw(np.random.default_rng(seed), weighting="T2", **options)  # type: ignore[arg-type]
    return pixels, truth.mask, [d.box_px for d in truth.discs], [d.pfirrmann for d in truth.discs]


def measured(pixels: np.ndarray, mask: np.ndarray, boxes: list[Box]) -> np.ndarray:
    return describe(Scene.of(normalise(pixels), mask), boxes, range(len(boxes)))


@pytest.fixture(scope="module")
def many() -> tuple[np.ndarray, np.ndarray]:
    """Numbers and grades of the discs of some phantoms."""
    looks, grades = [], []
    for seed in range(700, 712):
        pixels, mask, boxes, truth = drawn(seed)
        looks.append(measured(pixels, mask, boxes))
        grades += truth
    return np.concatenate(looks), np.array(grades)


def test_names_are_told_apart() -> None:
    assert len(set(NAMES)) == len(NAMES) == sum(len(names) for names in appearance.GROUPS.values())


@pytest.mark.parametrize(
    ("name", "least"), [("median_fluid", 0.8), ("nucleus_marrow", 0.75), ("contrast_fluid", 0.5), ("median_fluid_share", 0.5)]
)
def test_a_worn_disc_is_darker(many: tuple[np.ndarray, np.ndarray], name: str, least: float) -> None:
    looks, grades = many
    assert np.corrcoef(looks[:, PLACE[name]], grades)[0, 1] < -least


def test_a_collapsed_disc_is_lower(many: tuple[np.ndarray, np.ndarray]) -> None:
    looks, grades = many
    height = looks[:, PLACE["height"]]
    assert height[grades == 5].mean() < 0.8 * height[grades <= 3].mean()


def test_almost_everything_is_measured_on_a_clear_picture(many: tuple[np.ndarray, np.ndarray]) -> None:
    looks, _ = many
    assert np.isfinite(looks[:, [PLACE[n] for n in ("median_fluid", "median_marrow", "height", "canal_width", "bulge_back")]]).all()
    assert np.isnan(looks).mean() < 0.06
    assert not np.isinf(looks).any()


@pytest.mark.parametrize("change", [lambda x: 3.5 * x, lambda x: x + 1000.0, lambda x: 0.01 * x - 7.0])
def test_the_units_of_the_scanner_have_no_part(change) -> None:  # type: ignore[no-untyped-def]
    pixels, mask, boxes, _ = drawn(31)
    np.testing.assert_allclose(measured(change(pixels), mask, boxes), measured(pixels, mask, boxes), atol=2e-3)


def test_which_way_the_patient_looks_has_no_part() -> None:
    pixels, mask, boxes, _ = drawn(32)
    width = pixels.shape[1]
    other = [(width - c, b, width - a, d) for a, b, c, d in boxes]
    turned = measured(np.ascontiguousarray(pixels[:, ::-1]), np.ascontiguousarray(mask[:, ::-1]), other)
    plain = measured(pixels, mask, boxes)
    # Every second pixel sets the window, and those are others in a mirror; a disc cut at a percentile may lose another pixel.
    assert np.nanmedian(np.abs(turned - plain)) < 1e-3
    for name in ("front_fluid", "back_fluid", "height_front", "bulge_back", "bulge_front", "canal_gap", "incline_deg"):
        np.testing.assert_allclose(turned[:, PLACE[name]], plain[:, PLACE[name]], atol=0.05 if name != "incline_deg" else 1.0, err_msg=name)


def test_the_size_of_a_pixel_has_no_part() -> None:
    pixels, mask, boxes, _ = drawn(33, hw=(320, 320))
    twice = [tuple(2 * v for v in b) for b in boxes]
    large = measured(cv2.resize(pixels, None, fx=2, fy=2), cv2.resize(mask, None, fx=2, fy=2, interpolation=cv2.INTER_NEAREST), twice)  # type: ignore[arg-type]
    plain = measured(pixels, mask, boxes)
    for name in ("median_fluid", "nucleus_marrow", "contrast_fluid", "height", "height_gap", "canal_width"):
        # The uppermost disc lies at the edge of the image, where a pixel more or less is seen of the canal.
        np.testing.assert_allclose(large[:-1, PLACE[name]], plain[:-1, PLACE[name]], atol=0.05, err_msg=name)


def test_a_picture_that_was_windowed_before_is_as_bright_as_one_that_was_not() -> None:
    pixels, mask, boxes, _ = drawn(34)
    top = float(np.percentile(pixels, 95))
    exported = np.round(255 * np.clip(pixels / top, 0, 1)).astype(np.float32)
    apart = appearance.window(normalise(exported)) - appearance.window(normalise(pixels))
    assert np.abs(apart).max() < 0.05
    plain, after = measured(pixels, mask, boxes), measured(exported, mask, boxes)
    for name in ("median_fluid", "median_marrow", "nucleus_fluid"):
        np.testing.assert_allclose(after[:, PLACE[name]], plain[:, PLACE[name]], atol=0.06, err_msg=name)


def test_without_a_canal_nothing_is_compared_with_fluid_and_no_side_is_guessed() -> None:
    pixels, mask, boxes, _ = drawn(35)
    looks = measured(pixels, np.where(mask == km.CANAL, 0, mask).astype(np.uint8), boxes)
    told = np.isfinite(looks).any(axis=0)
    assert not any(told[i] for name, i in PLACE.items() if name.startswith(("canal_", "behind_", "bulge_", "step_")))
    assert not any(told[PLACE[name]] for name in ("median_fluid", "front_fluid", "height_front", "height_back_mean", "centre"))
    assert np.isfinite(looks[:, [PLACE[name] for name in ("median_marrow", "nucleus_marrow", "height", "height_gap")]]).all()


def test_a_disc_without_a_region_is_measured_within_its_box() -> None:
    pixels, mask, boxes, _ = drawn(36)
    x0, y0, x1, y1 = (round(v) for v in boxes[1])
    lost = mask.copy()
    lost[y0 - 2 : y1 + 2, x0 - 2 : x1 + 2][lost[y0 - 2 : y1 + 2, x0 - 2 : x1 + 2] == km.DISC] = 0
    looks, plain = measured(pixels, lost, boxes), measured(pixels, mask, boxes)
    assert looks[1, PLACE["median_fluid"]] == pytest.approx(plain[1, PLACE["median_fluid"]], abs=0.1)
    assert np.isfinite(looks[1, PLACE["height"]])


def test_neighbours_are_those_whose_places_differ_by_one() -> None:
    pixels, mask, boxes, _ = drawn(37)
    scene = Scene.of(normalise(pixels), mask)
    places = [1, 2, 4, 5, *range(6, 2 + len(boxes))][: len(boxes)]  # nobody is at 3
    looks = describe(scene, boxes, places)
    own, above, below = (looks[:, PLACE[f"median_fluid{how}"]] for how in ("", "_above", "_below"))
    assert above[0] == own[1]
    assert below[1] == own[0]
    assert np.isnan(above[1])
    assert np.isnan(below[2])
    assert np.isnan(below[0])
    # One disc more or less elsewhere changes nothing of what is a disc's own.
    alone = describe(scene, boxes[:1], [1])
    np.testing.assert_array_equal(alone[0, : PLACE["height_gap"]], looks[0, : PLACE["height_gap"]])


def test_no_disc_no_row() -> None:
    pixels, mask, _, _ = drawn(38)
    assert measured(pixels, mask, []).shape == (0, len(NAMES))


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), st.integers(8, 60), st.integers(8, 60), st.integers(1, 5), st.sampled_from([0.0, 0.3, 1.0]))
def test_any_mask_and_any_boxes_are_answered(seed: int, height: int, width: int, count: int, share: float) -> None:
    rng = np.random.default_rng(seed)
    image = rng.uniform(-1, 1, (height, width)).astype(np.float32) if share else np.full((height, width), -1, np.float32)
    mask = cv2.resize(rng.integers(0, 4, (6, 6)).astype(np.uint8), (width, height), interpolation=cv2.INTER_NEAREST)
    mask[rng.random(mask.shape) > share] = 0
    corners = np.sort(rng.uniform(-20, 80, (count, 2, 2)), axis=1).reshape(count, 4)
    boxes = [(float(a), float(b), float(c), float(d)) for a, b, c, d in corners]
    looks = describe(Scene.of(image, mask), boxes, list(range(count)))
    assert looks.shape == (count, len(NAMES))
    assert not np.isinf(looks).any()
