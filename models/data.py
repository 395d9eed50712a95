"""The training images: where they lie, who is held out, what is wrong with them, and how they are varied.

Hides the folder layout and the grey values of the SPIDER extracts, the patient split, the checks of labels against images, and
the augmentation. What is wrong is a TrainingDataInvalid that names the file and the row. Nothing on a device imports this module.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TypeVar

import cv2
import numpy as np
from numpy.typing import NDArray

from appliance.errors import TrainingDataInvalid
from kernels.preprocess import letterbox, normalise

SPLIT_FILE = Path(__file__).with_name("split.json")
# Measured, not as first documented: red (76) is the vertebra, blue (29) the disc, green (150) the canal.
MASK_GREY = {76: 1, 29: 2, 150: 3}
MOST_FILE_BYTES = 64 << 20
MOST_ROWS = 100_000
MOST_UNREADABLE = 0.02  # share of the files of a folder
HIGHEST_LEVEL = 12  # IVD labels count upwards from L5/S1
Rng = np.random.Generator
T = TypeVar("T")


def make_split(root: Path, seed: int = 20261122, held_out: float = 0.2) -> dict[str, list[int]]:
    """Patients -> {"train": [...], "test": [...]}, stratified by whether the patient has masks, so both sides have some."""
    with_masks = {int(p.name.split("_")[0]) for p in (root / "lumbar_mri/t2space/masks").glob("*.png")}
    everyone = {int(p.name.split("_")[0]) for p in (root / "lumbar_mri/midsagittal").glob("*.png")} | with_masks
    rng = random.Random(seed)
    test: set[int] = set()
    for group in (with_masks, everyone - with_masks):
        order = sorted(group)
        rng.shuffle(order)
        test |= set(order[: round(len(order) * held_out)])
    return {"train": sorted(everyone - test), "test": sorted(test)}


@cache
def split() -> dict[str, frozenset[int]]:
    """The committed split: {"train", "test"} -> patient numbers."""
    lists = json.loads(SPLIT_FILE.read_text())
    return {side: frozenset(lists[side]) for side in ("train", "test")}


@cache
def validation_patients() -> frozenset[int]:
    """A seventh of the training patients, by a hash of their number: what a compile may tune on. They are in no calibration
    set, and held-out patients are never among them."""
    return frozenset(p for p in split()["train"] if hashlib.sha256(f"validation {p}".encode()).digest()[0] % 7 == 0)


def patient_of(path: Path) -> int:
    """The number before the first underscore. Raises TrainingDataInvalid for a file that is named otherwise."""
    number = path.name.partition("_")[0]
    if not (number.isascii() and number.isdecimal() and len(number) < 10):
        remedy = "Take it out of the training folder, or name it after its patient: PATIENT_SERIES.png."
        raise TrainingDataInvalid("the file's name does not begin with a patient's number", value=path, remedy=remedy)
    return int(number)


def read_grey(path: Path) -> NDArray[np.uint8]:
    """H x W of a picture file. Raises TrainingDataInvalid for what is no whole picture, or too large."""
    try:
        size = path.stat().st_size
    except OSError as error:
        raise TrainingDataInvalid("the file cannot be read", value=path) from error
    if size > MOST_FILE_BYTES:
        raise TrainingDataInvalid(f"{size} bytes are more than the {MOST_FILE_BYTES} of a training image", value=path)
    try:
        image = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)
    except cv2.error as error:  # more pixels than the decoder allows
        raise TrainingDataInvalid("the picture cannot be decoded", value=path) from error
    if image is None:
        raise TrainingDataInvalid("not a picture, or a broken one", value=path)
    return np.asarray(image, dtype=np.uint8)


def read_mask(path: Path) -> NDArray[np.uint8]:
    """SPIDER grey values -> class indices 0 background, 1 vertebra, 2 disc, 3 canal.

    Raises TrainingDataInvalid for a grey value that means nothing, and for a mask that outlines nothing.
    """
    grey = read_grey(path)
    out = np.zeros_like(grey)
    for value, index in MASK_GREY.items():
        out[grey == value] = index
    unknown = np.unique(grey[(out == 0) & (grey != 0)])
    if unknown.size:
        raise TrainingDataInvalid(f"the mask holds grey values that are no class ({unknown[:5].tolist()})", value=path)
    if not out.any():
        raise TrainingDataInvalid("the mask outlines nothing", value=path)
    return out


def read_outlined(image: Path, mask: Path) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """An image and its mask. Raises TrainingDataInvalid where they differ in size: outlines of another picture."""
    pixels, outlines = read_grey(image), read_mask(mask)
    if pixels.shape != outlines.shape:
        raise TrainingDataInvalid(f"the mask is {outlines.shape}, its image {pixels.shape} (rows, columns)", value=mask)
    return pixels, outlines


def readable(paths: Sequence[Path], read: Callable[[Path], T]) -> list[tuple[Path, T]]:
    """(path, read(path)) of every file that is sound; broken ones are named on standard error, counted, and left out.

    Raises TrainingDataInvalid where more than MOST_UNREADABLE of them are broken, or all: then it is not a file that is
    broken, but the folder.
    """
    out: list[tuple[Path, T]] = []
    broken: list[str] = []
    for path in paths:
        try:
            out.append((path, read(path)))
        except TrainingDataInvalid as error:
            broken.append(path.name)
            print(f"left out: {error.what} ({error.value})", file=sys.stderr)
    if broken and (not out or len(broken) > MOST_UNREADABLE * len(paths)):
        what = f"{len(broken)} of {len(paths)} files of {paths[0].parent} are broken, more than {MOST_UNREADABLE:.0%}"
        raise TrainingDataInvalid(what, value=", ".join(broken))
    return out


def require_examples(counts: Mapping[str, int], what: str) -> None:
    """Raises TrainingDataInvalid where a class has no example: a network would learn never to say it."""
    absent = [name for name, count in counts.items() if not count]
    if absent:
        remedy = "Bring examples of it into the training folder, or take the class out of the family."
        raise TrainingDataInvalid(f"{what} have no example of a class", value=", ".join(absent), remedy=remedy)


def require_outlines(masks: Sequence[NDArray[np.uint8]]) -> None:
    """Raises TrainingDataInvalid where masks lack a class, or their vertebrae cover less than their discs: grey values were
    swapped, since a lumbar vertebra is three times as high as a disc."""
    total = np.sum([np.bincount(m.ravel(), minlength=4)[:4] for m in masks], axis=0) if masks else np.zeros(4, np.int64)
    require_examples({name: int(total[k]) for name, k in (("vertebra", 1), ("disc", 2), ("canal", 3))}, "the masks")
    if total[1] <= total[2]:
        raise TrainingDataInvalid("vertebrae cover less of the masks than discs do", value=f"{total[1]} and {total[2]} pixels")


@dataclass(frozen=True)
class Grading:
    pfirrmann: int
    herniation: int
    narrowing: int
    bulging: int


def _rows(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """("FILE, line N", row) of a table with a head. Raises TrainingDataInvalid where it is absent or longer than MOST_ROWS."""
    try:
        f = path.open(newline="", encoding="utf-8")
    except OSError as error:
        raise TrainingDataInvalid("the table cannot be read", value=path) from error
    with f:
        try:
            for number, row in enumerate(csv.DictReader(f), 2):
                if number > MOST_ROWS:
                    raise TrainingDataInvalid(f"the table has more than {MOST_ROWS} rows", value=path)
                yield f"{path.name}, line {number}", row
        except (csv.Error, UnicodeDecodeError) as error:
            raise TrainingDataInvalid(f"the table is no CSV: {error}", value=path) from error


def _number(row: dict[str, str], column: str, low: float, high: float, where: str) -> float:
    text = row.get(column)
    try:
        value = float(text or "")
    except ValueError:
        value = math.nan
    if not low <= value <= high:
        raise TrainingDataInvalid(f"{column} is {text!r}, not a number from {low:g} to {high:g}", value=where)
    return value


def _whole(row: dict[str, str], column: str, low: int, high: int, where: str) -> int:
    value = _number(row, column, low, high, where)
    if value != int(value):
        raise TrainingDataInvalid(f"{column} is {row[column]!r}, not a whole number", value=where)
    return int(value)


@cache
def gradings(root: Path) -> dict[int, dict[int, Grading]]:
    """patient -> {IVD label (1 = L5/S1, upwards) -> Grading}. Raises TrainingDataInvalid for a grade that does not exist, and for
    a disc that was graded twice."""
    out: dict[int, dict[int, Grading]] = {}
    for where, row in _rows(root / "lumbar_mri/gradings.csv"):
        patient, level = _whole(row, "Patient", 0, 10**9, where), _whole(row, "IVD label", 1, HIGHEST_LEVEL, where)
        if level in out.setdefault(patient, {}):
            raise TrainingDataInvalid(f"disc {level} of patient {patient} is graded twice", value=where)
        grade = _whole(row, "Pfirrman grade", 1, 5, where)
        out[patient][level] = Grading(grade, *(_whole(row, f"Disc {f}", 0, 1, where) for f in ("herniation", "narrowing", "bulging")))
    return out


@cache
def disc_boxes(root: Path) -> dict[str, NDArray[np.float32]]:
    """midsagittal image name -> N x 4 disc boxes (x0, y0, x1, y1) in its pixels, from the top down.

    Raises TrainingDataInvalid for a box without an inside, and for boxes whose numbers from the top contradict their places.
    """
    rows: dict[str, list[tuple[int, list[float]]]] = {}
    for where, r in _rows(root / "lumbar_mri/disc_boxes.csv"):
        x, y = (_number(r, k, 0, 1e5, where) for k in "xy")
        w, h = (_number(r, k, 0.5, 1e5, where) for k in "wh")
        rows.setdefault(r.get("image") or "", []).append((_whole(r, "disc_from_top", 1, 40, where), [x, y, x + w, y + h]))
    out = {name: np.array([b for _, b in sorted(items)], dtype=np.float32) for name, items in rows.items()}
    for name, boxes in out.items():
        if (np.diff(boxes[:, 1] + boxes[:, 3]) <= 0).any():
            raise TrainingDataInvalid("discs are not numbered from the top downwards", value=f"disc_boxes.csv, {name}")
    return out


def require_inside(boxes: NDArray[np.float32], hw: tuple[int, int], name: str) -> None:
    """Raises TrainingDataInvalid where a drawn box (x0, y0, x1, y1) leaves its image by more than a pixel."""
    if len(boxes) and (boxes.min() < -1 or boxes[:, 2].max() > hw[1] + 1 or boxes[:, 3].max() > hw[0] + 1):
        raise TrainingDataInvalid(f"a box lies outside its image of {hw[0]} x {hw[1]} pixels", value=f"disc_boxes.csv, {name}")


# -- variation ------------------------------------------------------------------------------------------------------


def random_affine(rng: Rng, hw: tuple[int, int], out: int, strong: bool = True) -> NDArray[np.float64]:
    """2 x 3 matrix from source pixels to an `out` x `out` input: letterbox, then rotate, scale, shear, shift."""
    height, width = hw
    fit = min(out / height, out / width)
    zoom = float(np.exp(rng.uniform(-0.3, 0.45))) if strong else float(np.exp(rng.uniform(-0.1, 0.15)))
    aspect = float(np.exp(rng.uniform(-0.1, 0.1)))
    angle = np.deg2rad(rng.normal(0, 9.0))
    shear = rng.normal(0, 0.06)
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    linear = rotation @ np.array([[zoom * aspect, shear], [0.0, zoom / aspect]]) * fit
    slack = 0.12 + 0.35 * max(0.0, zoom - 1.0)
    target = np.array([out / 2, out / 2]) + rng.uniform(-slack, slack, 2) * out
    shift = target - linear @ np.array([width / 2, height / 2])
    return np.hstack([linear, shift[:, None]])


def smooth_field(rng: Rng, size: int, cells: int, spread: float) -> NDArray[np.float32]:
    """size x size, smooth, about `spread` in standard deviation: coil shading, or a slow warp."""
    coarse = rng.normal(0, spread, (cells, cells)).astype(np.float32)
    return np.asarray(cv2.resize(coarse, (size, size), interpolation=cv2.INTER_CUBIC), dtype=np.float32)


def vary_contrast(rng: Rng, image: NDArray[np.float32], mask: NDArray[np.uint8] | None) -> NDArray[np.float32]:
    """Image in [-1, 1] -> another contrast of the same anatomy, in [-1, 1].

    Where the classes are known, each gets its own gain and offset with soft borders, so that a T2 slice can turn T1-like
    (dark canal, bright vertebrae): after SynthSeg (Billot et al., Medical Image Analysis 2023), but keeping the texture.
    """
    x = (image + 1.0) * 0.5
    if mask is not None and rng.random() < 0.7:
        gain = np.ones_like(x)
        offset = np.zeros_like(x)
        t1_like = rng.random() < 0.4
        for index in (1, 2, 3):
            inside = (mask == index).astype(np.float32)
            if not inside.any():
                continue
            mean = float(x[mask == index].mean())
            want = (
                {1: rng.uniform(0.4, 0.95), 2: rng.uniform(0.15, 0.45), 3: rng.uniform(0.05, 0.35)}[index]
                if t1_like
                else float(np.clip(mean + rng.normal(0, 0.18), 0.03, 0.97))
            )
            g = float(np.exp(rng.normal(0, 0.35))) * (min(1.0, want / max(mean, 0.05)) if t1_like else 1.0)
            soft = cv2.GaussianBlur(inside, (0, 0), float(rng.uniform(0.6, 1.6)))
            gain += soft * (g - 1.0)
            offset += soft * (want - g * mean)
        x = np.clip(x * gain + offset, 0.0, 1.2)
    if rng.random() < 0.5:
        x = x * np.exp(smooth_field(rng, x.shape[0], int(rng.integers(2, 5)), 0.45))
    x = np.clip(x, 0.0, None)
    x = x / max(float(np.percentile(x, 99.5)), 1e-3)
    x = np.clip(x, 0.0, 1.0) ** float(np.exp(rng.normal(0, 0.35)))
    if rng.random() < 0.3:
        x = cv2.GaussianBlur(x, (0, 0), float(rng.uniform(0.4, 1.3)))
    if rng.random() < 0.5:
        x = x + rng.normal(0, float(rng.uniform(0.01, 0.07)), x.shape).astype(np.float32)
    if rng.random() < 0.05:
        x = 1.0 - x
    lo, hi = -rng.uniform(0, 0.1), 1.0 + rng.uniform(-0.2, 0.1)
    return np.clip((x - lo) / (hi - lo) * 2.0 - 1.0, -1.0, 1.0).astype(np.float32)


def warp(
    image: NDArray[np.float32], matrix: NDArray[np.float64], out: int, nearest: bool = False, fill: float = -1.0
) -> NDArray[np.float32]:
    flags = cv2.INTER_NEAREST if nearest else cv2.INTER_LINEAR
    return np.asarray(cv2.warpAffine(image, matrix, (out, out), flags=flags, borderMode=cv2.BORDER_CONSTANT, borderValue=fill))


def cut_edges(rng: Rng, hw: tuple[int, int]) -> tuple[slice, slice]:
    """A random crop, at times so deep that the sacrum or the upper levels leave the picture."""
    height, width = hw
    top = int(height * max(0.0, rng.uniform(-0.4, 0.4))) if rng.random() < 0.4 else 0
    bottom = int(height * max(0.0, rng.uniform(-0.4, 0.45))) if rng.random() < 0.4 else 0
    if top + bottom > 0.6 * height:
        bottom = 0
    left = int(width * max(0.0, rng.uniform(-0.3, 0.2)))
    right = int(width * max(0.0, rng.uniform(-0.3, 0.2)))
    return slice(top, height - bottom), slice(left, width - right)


def as_input(image: NDArray[np.uint8], size: int) -> NDArray[np.float32]:
    """The device's own preprocessing, 1 x 1 x size x size."""
    return letterbox(normalise(image.astype(np.float32)), (size, size))[0]
