"""The radiographs: where they lie, what their labels say, and which of them may teach, choose or judge.

Hides the folder layout of the two sets and the committed split, which names files by content. The publishers' own split is
not by patient: pictures of one person lie in both of its folders. `python -m calibration.radiographs` therefore groups
pictures of one person, keeps each group on one side, and withdraws from training whatever is also in the publishers'
`valid` folder. Nothing on a device imports this module.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from models.data import read_grey

SPLIT_FILE = Path(__file__).with_name("split_radiographs.json")
CLASSES = ("normal", "scoliosis", "spondylolisthesis")
MOST_BOXES = 64  # of one label file
FOLDS = 5  # of the classed training pictures, to choose a recipe by
BoxesSide = Literal["train", "validation", "test"]


@dataclass(frozen=True)
class Boxed:
    """One AP radiograph: H x W uint8 grey, N x 4 boxes (x0, y0, x1, y1) in its pixels from the top down, its person's number."""

    name: str
    pixels: NDArray[np.uint8]
    boxes: NDArray[np.float32]
    group: int


@dataclass(frozen=True)
class Classed:
    """One radiograph and the index of its class in CLASSES."""

    name: str
    pixels: NDArray[np.uint8]
    kind: int
    group: int


def digest(path: Path) -> str:
    """What the split calls a file: 16 hexadecimal digits of its SHA-256."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


@cache
def split() -> dict[str, dict[str, int]]:
    """The committed split: side -> {digest: group}. Sides: boxes_train, boxes_validation, boxes_withdrawn, boxes_test,
    class_train, class_withdrawn, class_test."""
    return {side: dict(members) for side, members in json.loads(SPLIT_FILE.read_text())["sides"].items()}


def boxed_paths(root: Path) -> list[Path]:
    return sorted((root / "spine_xray_ap").glob("*/images/*.jpg"))


def classed_paths(root: Path) -> list[Path]:
    return sorted(p for kind in CLASSES for p in (root / "spine_xray_class" / kind).glob("*.jpg"))


def read_boxes(path: Path, hw: tuple[int, int]) -> NDArray[np.float32]:
    """A YOLO label file (`class cx cy w h`, or `class x y x y ...` of a polygon, as shares of the image) -> N x 4 pixel edges
    from the top down; a polygon counts by its extent. Raises ValueError naming the file and line for anything else.
    """
    height, width = hw
    rows = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if not line.strip():
            continue
        try:
            kind, *values = (float(v) for v in line.split())
        except ValueError as error:
            raise ValueError(f"{path.name}, line {number}: not numbers: {line[:60]!r}") from error
        polygon = len(values) >= 6 and len(values) % 2 == 0
        if polygon:
            xs, ys = values[::2], values[1::2]
            values = [(min(xs) + max(xs)) / 2, (min(ys) + max(ys)) / 2, max(xs) - min(xs), max(ys) - min(ys)]
        if kind != 0 or len(values) != 4 or not all(0.0 <= v <= 1.0 for v in values) or min(values[2:]) == 0.0:
            raise ValueError(f"{path.name}, line {number}: not a vertebra inside the image: {line[:60]!r}")
        cx, cy, w, h = values
        rows.append([(cx - w / 2) * width, (cy - h / 2) * height, (cx + w / 2) * width, (cy + h / 2) * height])
    if len(rows) > MOST_BOXES:
        raise ValueError(f"{path.name}: {len(rows)} boxes; a spine has at most {MOST_BOXES}")
    rows.sort(key=lambda r: r[1] + r[3])
    return np.array(rows, np.float32).reshape(-1, 4)


def boxed(root: Path, side: BoxesSide) -> list[Boxed]:
    """AP radiographs of one side with their boxes; an image without a label file raises FileNotFoundError."""
    members = split()[f"boxes_{side}"]
    out = []
    for path in boxed_paths(root):
        group = members.get(digest(path))
        if group is not None:
            pixels = read_grey(path)
            label = path.parent.parent / "labels" / f"{path.stem}.txt"
            out.append(Boxed(path.name, pixels, read_boxes(label, (pixels.shape[0], pixels.shape[1])), group))
    return out


def folds(pictures: Sequence[Classed]) -> NDArray[np.int64]:
    """The fold of each picture, 0 to FOLDS - 1: a person is in one fold, and a class is spread over all of them evenly."""
    kind_of = {p.group: p.kind for p in reversed(pictures)}
    order = sorted(kind_of, key=lambda g: (kind_of[g], g))
    fold = {group: i % FOLDS for i, group in enumerate(order)}
    return np.array([fold[p.group] for p in pictures], np.int64)


def classed(root: Path, side: Literal["train", "test"]) -> list[Classed]:
    """Radiographs of one side with their class, which is the folder's name."""
    members = split()[f"class_{side}"]
    out = []
    for path in classed_paths(root):
        group = members.get(digest(path))
        if group is not None:
            out.append(Classed(path.name, read_grey(path), CLASSES.index(path.parent.name), group))
    return out
