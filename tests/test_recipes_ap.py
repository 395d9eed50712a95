"""Variation of radiographs for training: boxes go where the pixels go, and a batch depends on its seed alone."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import cv2
import numpy as np
import pytest

from models import evaluate_ap, radiographs, recipes_ap, spine_class
from models.recipes_ap import ClassRecipe, VertebraRecipe


def dots(boxes: np.ndarray, hw: tuple[int, int]) -> np.ndarray:  # type: ignore[type-arg]
    """Bright ellipses that fill their boxes, on black."""
    image = np.full(hw, -1.0, np.float32)
    for x0, y0, x1, y1 in boxes:
        centre, half = ((x0 + x1) / 2 - 0.5, (y0 + y1) / 2 - 0.5), ((x1 - x0) / 2, (y1 - y0) / 2)
        cv2.ellipse(image, (centre, (2 * half[0], 2 * half[1]), 0), 1.0, -1)
    return image


BOXES = np.array([[60, 40 + 60 * i, 60 + 50, 40 + 60 * i + 30] for i in range(5)], np.float32)


def extents(image: np.ndarray, count: int) -> np.ndarray:  # type: ignore[type-arg]
    n, _, stats, _ = cv2.connectedComponentsWithStats((image > 0).astype(np.uint8))
    assert n - 1 == count
    found = np.array([[x, y, x + w, y + h] for x, y, w, h, _ in stats[1:]], np.float32)
    return found[np.argsort(found[:, 1])]


@pytest.mark.parametrize("seed", range(6))
def test_boxes_go_where_the_pixels_go(seed: int) -> None:
    # So far zoomed out that everything stays in the picture.
    matrix = recipes_ap.affine(np.random.default_rng(seed), (400, 200), (400, 260), 0.5, -0.4)
    image = recipes_ap.warp(dots(BOXES, (400, 200)), matrix, (400, 260))
    moved = recipes_ap.moved_boxes(BOXES, matrix)
    assert np.abs(extents(image, len(moved)) - moved[np.argsort(moved[:, 1])]).max() < 2.5


@pytest.mark.parametrize("seed", range(6))
def test_boxes_follow_a_bend(seed: int) -> None:
    image, moved = recipes_ap.bend(np.random.default_rng(seed), dots(BOXES, (400, 200)), BOXES)
    assert np.abs(extents(image, 5) - moved).max() < 3.5
    assert np.array_equal(moved[:, 1::2], BOXES[:, 1::2])


def test_exposure_keeps_the_range() -> None:
    for seed in range(12):
        x = recipes_ap.exposure(np.random.default_rng(seed), dots(BOXES, (400, 200)))
        assert x.dtype == np.float32
        assert -1 <= x.min() <= x.max() <= 1


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A set of phantoms in place of the folders, and few phantoms beside it."""
    pictures = evaluate_ap.phantoms(3)
    classes = [radiographs.Classed(str(i), p.pixels, i % 3, i) for i, (p, _) in enumerate(pictures)]
    monkeypatch.setattr(recipes_ap, "PHANTOMS", 2)
    monkeypatch.setattr(radiographs, "boxed", lambda *_: [p for p, _ in pictures])
    monkeypatch.setattr(radiographs, "classed", lambda *_: classes)


@pytest.mark.usefixtures("small")
def test_a_batch_depends_on_its_seed_alone() -> None:
    for recipe in (VertebraRecipe(SimpleNamespace(), None, 10), ClassRecipe(SimpleNamespace(), None, 10)):  # type: ignore[arg-type]
        first, again, other = (recipe.batch(np.random.default_rng(s), 9) for s in (1, 1, 2))
        assert all(np.array_equal(first[k], again[k]) for k in first)
        assert not np.array_equal(first["image"], other["image"])


@pytest.mark.usefixtures("small")
def test_boxes_of_a_batch_lie_in_its_input_and_small_inputs_come_first() -> None:
    recipe = VertebraRecipe(SimpleNamespace(), None, 10)  # type: ignore[arg-type]
    for step, hw in ((0, recipe.coarse_hw), (9, recipe.hw)):
        batch = recipe.batch(np.random.default_rng(4), step)
        assert batch["image"].shape == (recipe.batch_size, 1, *hw)
        real = batch["kinds"] >= 0
        boxes = batch["boxes"][real]
        assert real.sum() > 40
        assert boxes.min() >= 0
        assert (boxes[:, 2] <= hw[1]).all()
        assert (boxes[:, 3] <= hw[0]).all()
        assert (boxes[:, 2:] > boxes[:, :2]).all()


@pytest.mark.usefixtures("small")
def test_classes_are_drawn_as_often_as_they_are_and_a_missing_one_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = ClassRecipe(SimpleNamespace(), None, 10, teaching=PLAIN)  # type: ignore[arg-type]
    target = np.concatenate([recipe.batch(np.random.default_rng(s), 0)["target"] for s in range(6)])
    assert set(target.sum(1)) == {1.0}
    assert (target.sum(0) > 18).all()  # one picture of each class
    one = radiographs.classed(None, "train")[:1]  # type: ignore[arg-type]
    monkeypatch.setattr(radiographs, "classed", lambda *_: one)
    with pytest.raises(SystemExit, match=spine_class.SPEC.classes[1]):
        ClassRecipe(SimpleNamespace(), None, 10)  # type: ignore[arg-type]


PLAIN = recipes_ap.Teaching(boxed=0.0, bent=0.0, mixed=0.0)


@pytest.mark.usefixtures("small")
def test_each_fold_leaves_out_its_own_persons(monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = radiographs.classed(None, "train")[0].pixels  # type: ignore[arg-type]
    pictures = [radiographs.Classed(str(i), pixels, i % 3, i // 2) for i in range(60)]
    monkeypatch.setattr(radiographs, "classed", lambda *_: pictures)
    left_out = []
    for fold in range(radiographs.FOLDS):
        recipe = recipes_ap.RECIPES[f"spine_class.tuned.{fold}"](SimpleNamespace(), None, None)  # type: ignore[arg-type]
        seen = {name for pool in recipe.pools for name, _ in pool}  # type: ignore[attr-defined]
        left_out.append({p.name for p in pictures} - seen)
        assert not {p.group for p in pictures if p.name in left_out[-1]} & {p.group for p in pictures if p.name in seen}
    assert sorted(n for names in left_out for n in names) == sorted(p.name for p in pictures)


@pytest.mark.usefixtures("small")
def test_blended_pictures_have_blended_classes() -> None:
    recipe = ClassRecipe(SimpleNamespace(), None, 10, teaching=replace(PLAIN, mixed=1.0))  # type: ignore[arg-type]
    batch = recipe.batch(np.random.default_rng(2), 0)
    assert batch["target"].sum(1) == pytest.approx(np.ones(recipe.batch_size))
    assert ((batch["target"] > 0.05) & (batch["target"] < 0.95)).any()
    assert np.abs(batch["image"]).max() <= 1 + 1e-6


def spine(angle_deg: float) -> recipes_ap.Spine:
    """Bright boxes along a bow of `angle_deg` between its ends, in a dark picture of 400 x 240."""
    y = np.linspace(20, 380, 16)
    steep = np.tan(np.deg2rad(angle_deg / 2))
    x = 120 + steep * (y - 200) ** 2 / 360 - steep * 180**2 / 720
    boxes = np.stack([x - 14, y - 9, x + 14, y + 9], 1).astype(np.float32)
    return recipes_ap.Spine.of("bow", dots(boxes, (400, 240)), boxes)


def middle_of(image: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
    """Where the bright part of each row lies, of rows that have one."""
    light = image + 1.0
    rows = light.sum(1) > 1.0
    return np.asarray((light[rows] * np.arange(light.shape[1])).sum(1) / light[rows].sum(1))


@pytest.mark.parametrize("angle", [20.0, 40.0])
def test_a_curve_is_taken_out_or_made_stronger_with_its_picture(angle: float) -> None:
    bow = spine(angle)
    assert bow.angle_deg(1.0) == pytest.approx(angle, abs=0.15 * angle)
    assert bow.angle_deg(0.0) == 0.0
    middles = [middle_of(bow.recurved(share)) for share in (0.0, 0.5, 1.0, 1.5)]
    # The bow by its parabola: the rows of a tilted box's corners lie beside its middle.
    spread = [float(np.ptp(np.polyval(np.polyfit(np.arange(len(m)), m, 2), np.arange(len(m))))) for m in middles]
    assert spread[0] < 0.2 * spread[2]
    assert spread[1] == pytest.approx(0.5 * spread[2], rel=0.15)
    assert spread[3] == pytest.approx(1.5 * spread[2], rel=0.15)
    assert np.abs(bow.recurved(1.0) - bow.image).max() < 1e-5


@pytest.mark.usefixtures("small")
def test_a_picture_whose_curve_was_changed_is_called_what_it_became() -> None:
    recipe = ClassRecipe(SimpleNamespace(), None, 10)  # type: ignore[arg-type]
    recipe.spines = [spine(30.0)]
    made = [recipe._recurved(np.random.default_rng(s)) for s in range(40)]
    shares = np.array([float(name.rpartition(" ")[2]) for name, _, _ in made])
    angles, kinds = np.array([recipe.spines[0].angle_deg(share) for share in shares]), np.array([kind for _, _, kind in made])
    assert {0, 1} == set(kinds)
    assert angles[kinds == 0].max() <= recipes_ap.STRAIGHT_DEG + 0.5
    assert angles[kinds == 1].min() >= recipes_ap.CURVED_DEG - 0.5
    # A strong curve is not taken out: what lies beside it would be folded.
    recipe.spines = [spine(80.0)]
    assert {recipe._recurved(np.random.default_rng(s))[2] for s in range(20)} == {1}


@pytest.mark.usefixtures("small")
def test_a_normal_picture_is_bent_by_what_is_said() -> None:
    straight = np.full((320, 224), -1.0, np.float32)
    straight[:, 104:120] = 1.0
    for seed in range(6):
        bent, angle = ClassRecipe._bent(np.random.default_rng(seed), straight)
        line = np.polyfit(np.arange(len(middle_of(bent))), middle_of(bent), 7)
        tilt = np.rad2deg(np.arctan(np.polyval(np.polyder(line), np.arange(8, 312))))
        assert float(np.ptp(tilt)) == pytest.approx(angle, abs=0.2 * angle)
