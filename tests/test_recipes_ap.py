"""Variation of radiographs for training: boxes go where the pixels go, and a batch depends on its seed alone."""

from __future__ import annotations

from types import SimpleNamespace

import cv2
import numpy as np
import pytest

from models import evaluate_ap, radiographs, recipes_ap, spine_class, vertebra_ap
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
    for step, hw in ((0, recipe.coarse_hw), (9, vertebra_ap.SPEC.input_hw)):
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
def test_every_class_is_drawn_alike_and_a_missing_one_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = ClassRecipe(SimpleNamespace(), None, 10)  # type: ignore[arg-type]
    kinds = np.concatenate([recipe.batch(np.random.default_rng(s), 0)["kind"] for s in range(6)])
    assert (np.bincount(kinds, minlength=3) > 18).all()
    one = radiographs.classed(None, "train")[:1]  # type: ignore[arg-type]
    monkeypatch.setattr(radiographs, "classed", lambda *_: one)
    with pytest.raises(SystemExit, match=spine_class.SPEC.classes[1]):
        ClassRecipe(SimpleNamespace(), None, 10)  # type: ignore[arg-type]
