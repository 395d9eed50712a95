"""The measure of strangers: what is given in folders, and an area in which each kind weighs the same."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from benchmarks import strangers


def test_each_kind_weighs_the_same_however_many_there_are() -> None:
    usual = np.linspace(0.0, 1.0, 200)
    far, near = np.full(3, 2.0), np.full(300, 0.5)
    alone = [strangers.separation(usual, [kind])["auroc"] for kind in (far, near)]
    assert alone == pytest.approx([1.0, 0.5], abs=0.01)
    both = strangers.separation(usual, [far, near])
    assert both["auroc"] == pytest.approx(0.75, abs=0.01)
    assert both["low"] <= both["auroc"] <= both["high"]
    assert both["pictures"] == 303


def test_pictures_given_in_folders_are_kinds_and_colour_is_made_grey(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for kind, shape in (("chest", (60, 70)), ("knee", (60, 70, 3))):
        (tmp_path / kind).mkdir()
        cv2.imwrite(str(tmp_path / kind / "a.png"), rng.integers(0, 255, shape, np.uint8))
    (tmp_path / "knee" / "notes.txt").write_text("not a picture")
    found = strangers.given(tmp_path)
    assert {k: [(p.shape, p.dtype) for p in v] for k, v in found.items()} == {
        "chest": [((60, 70), np.dtype(np.uint8))],
        "knee": [((60, 70), np.dtype(np.uint8))],
    }


@pytest.mark.parametrize("kind", strangers.MADE)
def test_made_pictures_are_the_same_each_time(kind: str) -> None:
    first, again = strangers.made(kind, 2), strangers.made(kind, 2)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first[0], first[1])
    assert all(p.dtype == np.uint8 and p.max() > p.min() for p in first)
