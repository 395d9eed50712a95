"""What each family learns from: its samples, its loss, its schedule. The loop lies in `models/train.py`.

Nothing on a device imports this module.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import cv2
import numpy as np
from numpy.typing import NDArray

from appliance.errors import TrainingDataInvalid, UsageError
from kernels import mask as km
from kernels.preprocess import normalise
from models import data, detector, grader, objects, phantom, segmenter, teacher
from models.detection_loss import detection_loss

if TYPE_CHECKING:
    from torch import Tensor, nn

Box = tuple[float, float, float, float]
Batch = dict[str, NDArray[Any]]
PHANTOMS = 96  # each weighting's pool: drawing one takes ten times as long as everything else about a sample
PHANTOM_SEED = 2_000_000  # none of these is measured on
NAMES = "names"  # of a batch: where each of its samples came from, for whoever has to find a bad one; no tensor


class Recipe(Protocol):
    name: str
    steps: int
    learning_rate: float

    def network(self, pretrained: bool) -> nn.Module: ...
    def batch(self, rng: data.Rng, step: int) -> Batch: ...
    def loss(self, out: Any, batch: dict[str, Tensor]) -> Tensor: ...


@cache
def _drawn(index: int, weighting: Literal["T1", "T2"] | None) -> tuple[NDArray[np.float32], phantom.Truth]:
    image, truth = phantom.draw(np.random.default_rng(PHANTOM_SEED + index), weighting=weighting)
    return normalise(image), truth


def any_phantom(rng: data.Rng, weighting: Literal["T1", "T2"] | None = None) -> tuple[NDArray[np.float32], phantom.Truth]:
    """One of PHANTOMS phantoms, H x W in [-1, 1], and its truth. Drawn when first asked for, then kept: neither is to be changed."""
    return _drawn(int(rng.integers(PHANTOMS)), weighting)


def _train_side(paths: list[Path]) -> list[Path]:
    return [p for p in sorted(paths) if data.patient_of(p) in data.split()["train"]]


def outlined(root: Path, side: str = "train") -> list[tuple[Path, tuple[NDArray[np.uint8], NDArray[np.uint8]]]]:
    """T2-SPACE slices of one side of the split: (path, (pixels, mask as class indices)), without the broken ones."""
    masks = root / "lumbar_mri/t2space/masks"
    paths = sorted(p for p in (root / "lumbar_mri/t2space/images").glob("*.png") if data.patient_of(p) in data.split()[side])
    if not paths:
        raise TrainingDataInvalid(f"no outlined slice of a {side} patient is there", value=root / "lumbar_mri/t2space/images")
    return data.readable(paths, lambda p: data.read_outlined(p, masks / p.name))


class SegmenterRecipe:
    """Cross-entropy and soft Dice on T2-SPACE masks, pseudo-labelled T1/T2 mid-sagittal slices, and phantoms."""

    name = "segmenter"
    learning_rate = 1.5e-3
    batch_size = 8
    coarse_share = 0.6  # of the steps, on smaller inputs

    def __init__(self, root: Path, pseudo: Path | None, steps: int | None) -> None:
        self.steps = steps or 3500
        self.real = [(p.name, normalise(i.astype(np.float32)), m) for p, (i, m) in outlined(root)]
        data.require_outlines([m for _, _, m in self.real])
        self.pseudo: list[tuple[str, NDArray[np.float32], NDArray[np.uint8]]] = []
        if pseudo:
            for p in _train_side(list(pseudo.glob("*.png"))):
                image, mask = data.read_grey(root / "lumbar_mri/midsagittal" / p.name), data.read_grey(p)
                if mask.shape != image.shape or mask.max(initial=0) > km.CANAL:
                    remedy = "Make the pseudo-labels again: python -m models.pseudo."
                    raise TrainingDataInvalid("a pseudo-label does not fit its image", value=p, remedy=remedy)
                self.pseudo.append((p.name, normalise(image.astype(np.float32)), mask))

    def network(self, pretrained: bool) -> nn.Module:
        return segmenter.network(pretrained)

    def size(self, step: int) -> int:
        """Small inputs first: twice the samples a minute while the coarse shapes are learnt."""
        return 320 if step < self.coarse_share * self.steps else 384

    def one(self, rng: data.Rng, size: int) -> tuple[NDArray[np.float32], NDArray[np.uint8], str]:
        kind = rng.random()
        if kind < 0.08:
            image, truth = any_phantom(rng)
            name, mask = "phantom", truth.mask
        elif self.pseudo and kind < 0.5:
            name, image, mask = self.pseudo[int(rng.integers(len(self.pseudo)))]
        else:
            name, image, mask = self.real[int(rng.integers(len(self.real)))]
        rows, columns = data.cut_edges(rng, mask.shape)
        image, mask = image[rows, columns], mask[rows, columns]
        if rng.random() < 0.25:
            image, mask = image[:, ::-1], mask[:, ::-1]
        matrix = data.random_affine(rng, mask.shape, size)
        x = data.warp(np.ascontiguousarray(image), matrix, size)
        y = data.warp(np.ascontiguousarray(mask), matrix, size, nearest=True, fill=0).astype(np.uint8)
        return data.vary_contrast(rng, x, y), y, name

    def batch(self, rng: data.Rng, step: int) -> Batch:
        size = self.size(step)
        items = [self.one(rng, size) for _ in range(self.batch_size)]
        return {
            "image": np.stack([x[None] for x, _, _ in items]),
            "mask": np.stack([y for _, y, _ in items]).astype(np.int64),
            NAMES: np.array([n for _, _, n in items]),
        }

    def loss(self, out: Tensor, batch: dict[str, Tensor]) -> Tensor:
        import torch
        from torch.nn import functional as f

        mask = batch["mask"]
        logits = f.interpolate(out.float(), size=mask.shape[1:], mode="bilinear", align_corners=False)
        entropy = f.cross_entropy(logits, mask)
        p = logits.softmax(1)
        truth = f.one_hot(mask, p.shape[1]).permute(0, 3, 1, 2).float()
        dims = (0, 2, 3)
        dice = (2 * (p * truth).sum(dims) + 1) / (p.sum(dims) + truth.sum(dims) + 1)
        total: torch.Tensor = entropy + (1 - dice[1:]).mean()
        return total


class DetectorRecipe:
    """Boxes from masks, pseudo-masks and drawn rectangles; crops that lose the sacrum teach it to be absent."""

    name = "detector"
    learning_rate = 1.5e-3
    batch_size = 8
    coarse_share = 0.5
    most_boxes = 40

    def __init__(self, root: Path, pseudo: Path | None, steps: int | None) -> None:
        if pseudo is None:
            raise UsageError("the detector learns from pseudo-labels too", remedy="Name them with --pseudo (python -m models.pseudo).")
        self.steps = steps or 3000
        self.masks: list[tuple[str, objects.Labelled]] = []
        real = outlined(root)
        data.require_outlines([m for _, (_, m) in real])
        for path, (image, mask) in real:
            graded = len(data.gradings(root).get(data.patient_of(path), {}))
            self.masks.append((path.name, objects.from_mask(image, mask, graded)))
        margin = objects.drawn_margin(root, pseudo)
        self.slices: list[tuple[str, objects.Labelled]] = []
        slices = _train_side(list((root / "lumbar_mri/midsagittal").glob("*.png")))
        for path, item in data.readable(slices, lambda p: objects.midsagittal(root, pseudo, p, margin)):
            if item:
                boxes = data.disc_boxes(root).get(path.name, np.zeros((0, 4), np.float32))
                data.require_inside(boxes, (item.image.shape[0], item.image.shape[1]), path.name)
                self.slices += [(path.name, item)] * (2 if item.drawn else 1)
        labels = [label for _, item in self.masks + self.slices for label, _ in item.objects]
        data.require_examples({name: labels.count(k) for k, name in enumerate(detector.SPEC.classes)}, "the boxes")

    def network(self, pretrained: bool) -> nn.Module:
        return detector.network(pretrained)

    def one(self, rng: data.Rng, size: int) -> tuple[NDArray[np.float32], list[tuple[int, NDArray[np.float32]]], tuple[float, ...], str]:
        kind = rng.random()
        if kind < 0.06:
            image, truth = any_phantom(rng)
            name, known = "phantom", (1.0, 1.0, 1.0)
            things = [(objects.DISC, objects.ellipse_points(np.array(d.box_px, np.float32))) for d in truth.discs]
            things += [(objects.VERTEBRA, objects.ellipse_points(np.array(v.box_px, np.float32))) for v in truth.vertebrae]
            if truth.sacrum_box:
                things.append((objects.SACRUM, objects.ellipse_points(np.array(truth.sacrum_box, np.float32))))
        else:
            pool = self.masks if kind < 0.45 else self.slices
            name, item = pool[int(rng.integers(len(pool)))]
            image, things, known = item.image, item.objects, item.known
        rows, columns = data.cut_edges(rng, image.shape)
        image = image[rows, columns]
        shift = np.array([columns.start, rows.start], np.float32)
        flip = rng.random() < 0.25
        matrix = data.random_affine(rng, image.shape, size)
        if flip:
            image = np.ascontiguousarray(image[:, ::-1])
        x = data.warp(np.ascontiguousarray(image), matrix, size)
        # What lies outside the cut image is not in the picture, even where the canvas goes on.
        seen = data.warp(np.ones(image.shape, np.float32), matrix, size, nearest=True, fill=0.0)
        visible = cv2.integral(seen)
        labelled = []
        for label, points in things:
            p = points - shift
            if flip:
                p = np.stack([image.shape[1] - p[:, 0], p[:, 1]], 1)
            # The matrix maps pixel centres; the points are edges.
            q = (p - 0.5) @ matrix[:, :2].T + matrix[:, 2] + 0.5
            whole = np.concatenate([q.min(0), q.max(0)])
            box = whole.clip(0, size)
            area = float(np.prod(np.maximum(whole[2:] - whole[:2], 1e-3)))
            x0, y0, x1, y1 = (int(v) for v in np.round(box))
            inside = float(visible[y1, x1] - visible[y0, x1] - visible[y1, x0] + visible[y0, x0])
            if inside < 0.4 * area or x1 - x0 < 4 or y1 - y0 < 3:
                continue
            if inside < 0.95 * float(np.prod(box[2:] - box[:2])):
                box = _shrink(box, seen)
            labelled.append((label, box.astype(np.float32)))
        return data.vary_contrast(rng, x, None), labelled, known, name

    def batch(self, rng: data.Rng, step: int) -> Batch:
        size = 320 if step < self.coarse_share * self.steps else 384
        images = np.zeros((self.batch_size, 1, size, size), np.float32)
        boxes = np.zeros((self.batch_size, self.most_boxes, 4), np.float32)
        kinds = np.full((self.batch_size, self.most_boxes), -1, np.int64)
        known = np.zeros((self.batch_size, 3), np.float32)
        names = []
        for i in range(self.batch_size):
            images[i, 0], labelled, known[i], name = self.one(rng, size)
            names.append(name)
            for j, (label, box) in enumerate(labelled[: self.most_boxes]):
                boxes[i, j], kinds[i, j] = box, label
        return {"image": images, "boxes": boxes, "kinds": kinds, "known": known, NAMES: np.array(names)}

    def loss(self, out: Any, batch: dict[str, Tensor]) -> Tensor:
        return detection_loss(out, batch["boxes"], batch["kinds"], batch["known"])


def _shrink(box: NDArray[np.float64], seen: NDArray[np.float32]) -> NDArray[np.float64]:
    """The part of a box over seen pixels, as a box."""
    x0, y0, x1, y1 = (int(v) for v in np.round(box))
    part = seen[y0:y1, x0:x1] > 0
    rows, columns = np.flatnonzero(part.any(1)), np.flatnonzero(part.any(0))
    return np.array([x0 + columns[0], y0 + rows[0], x0 + columns[-1] + 1, y0 + rows[-1] + 1], np.float64)


@dataclass(frozen=True)
class GradedDisc:
    name: str
    image: NDArray[np.float32]
    box: Box
    grading: data.Grading
    patient: int


def _corners(box: Any) -> Box:
    return (float(box[0]), float(box[1]), float(box[2]), float(box[3]))


def _grown(box: Box, factor: NDArray[np.float64]) -> Box:
    cx, cy, w, h = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2, box[2] - box[0], box[3] - box[1]
    half_w, half_h = w * factor[0] / 2, h * factor[1] / 2
    return (cx - half_w, cy - half_h, cx + half_w, cy + half_h)


def graded_discs(root: Path, pseudo: Path | None, side: str, space: bool) -> list[GradedDisc]:
    """T2 discs of one side of the split with a known level: drawn boxes first, else pseudo-masks; with `space`, T2-SPACE masks too.

    A level is known where the discs found are exactly as many as the patient has gradings: the lowest is IVD label 1. Slices
    where they are not are counted on standard error. Boxes from regions are grown as the detector's are, which follow the drawn
    ones.
    """
    out: list[GradedDisc] = []
    tables = data.gradings(root)
    patients = frozenset(p for p in data.split()[side] if tables.get(p))
    margin = objects.drawn_margin(root, pseudo) if pseudo else np.ones(2)
    uncertain = 0

    def add(path: Path, pixels: NDArray[np.uint8], boxes: Sequence[Box]) -> None:
        nonlocal uncertain
        table = tables[data.patient_of(path)]
        if len(boxes) != len(table):
            uncertain += 1
            return
        image = normalise(pixels.astype(np.float32))
        for level, box in enumerate(boxes, 1):
            if level in table:
                name = f"{path.relative_to(root / 'lumbar_mri')}, disc {level}"
                out.append(GradedDisc(name, image, box, table[level], data.patient_of(path)))

    slices = sorted(p for p in (root / "lumbar_mri/midsagittal").glob("*_t2*.png") if data.patient_of(p) in patients)
    for path, pixels in data.readable(slices, data.read_grey):
        drawn = data.disc_boxes(root).get(path.name, np.zeros((0, 4), np.float32))
        data.require_inside(drawn, (pixels.shape[0], pixels.shape[1]), path.name)
        boxes = [_corners(b) for b in drawn[::-1]]
        if len(boxes) != len(tables[data.patient_of(path)]) and pseudo and (pseudo / path.name).exists():
            boxes = [_grown(c.box, margin) for c in km.discs(data.read_grey(pseudo / path.name))]
        add(path, pixels, boxes)
    if space:
        for path, (pixels, mask) in outlined(root, side):
            if data.patient_of(path) in patients:
                add(path, pixels, [_grown(c.box, margin) for c in km.discs(mask)])
    if uncertain:
        print(f"{uncertain} slices left out: not as many discs were found as were graded", file=sys.stderr)
    return out


def require_all_grades(discs: Sequence[GradedDisc]) -> None:
    """Raises TrainingDataInvalid where a grade, or one answer of a flag, has no disc to be learnt from."""
    counts = {f"grade {k}": sum(d.grading.pfirrmann == k for d in discs) for k in range(1, 6)}
    for flag in grader.FLAGS:
        present = sum(bool(getattr(d.grading, flag)) for d in discs)
        counts |= {flag: present, f"no {flag}": len(discs) - present}
    data.require_examples(counts, "the graded discs")


@dataclass(frozen=True)
class GraderVariant:
    """What may differ between graders that are compared by cross-validation on training patients (`models/crossval.py`).

    `widths`: side of the crop in widths of the disc's box. `emd`: weight of the squared earth mover's distance between the said and
    the wanted distribution over grades (Hou et al., "Squared earth mover's distance-based loss", 2016), 0 for cross-entropy alone.
    `sharpness` of the soft targets: the weight of a grade d steps away is exp(-sharpness d). `large`: the teacher's network.
    """

    widths: float = grader.CROP_WIDTHS
    emd: float = 0.0
    sharpness: float = 1.9
    large: bool = False


VARIANTS = {
    "base": GraderVariant(),
    "emd": GraderVariant(emd=2.0),
    "wide": GraderVariant(widths=2.4),
    "sharp": GraderVariant(sharpness=3.0),
    "large": GraderVariant(large=True),
}


class GraderRecipe:
    """Soft ordinal targets for the grade, binary targets for the flags; crops jittered as a detector's boxes would be.

    Pairs of crops are mixed (mixup, Zhang et al., ICLR 2018): without it the network learnt 95 % of the training grades by
    heart and half of the held-out ones.
    """

    name = "grader"
    learning_rate = 7e-4
    batch_size = 32

    def __init__(
        self,
        root: Path,
        pseudo: Path | None,
        steps: int | None,
        variant: GraderVariant = VARIANTS["base"],
        without: frozenset[int] = frozenset(),
    ) -> None:
        self.steps, self.variant = steps or 2000, variant
        discs = [d for d in graded_discs(root, pseudo, "train", space=True) if d.patient not in without]
        self.slices = [d for d in discs if d.name.startswith("midsagittal")]
        self.space = [d for d in discs if d.name.startswith("t2space")]
        require_all_grades(self.slices)

    def network(self, pretrained: bool) -> nn.Module:
        return teacher.network(pretrained) if self.variant.large else grader.network(pretrained)

    def one(self, rng: data.Rng) -> tuple[NDArray[np.float32], GradedDisc]:
        if rng.random() < 0.1:
            drawn, truth = any_phantom(rng, "T2")
            d = truth.discs[int(rng.integers(len(truth.discs)))]
            disc = GradedDisc("phantom", drawn, d.box_px, data.Grading(d.pfirrmann, d.herniation, d.narrowing, d.bulging), -1)
        else:
            pool = self.space if self.space and rng.random() < 0.3 else self.slices
            disc = pool[int(rng.integers(len(pool)))]
        x0, y0, x1, y1 = disc.box
        side = max(x1 - x0, 1.2 * (y1 - y0))
        size = side * self.variant.widths * float(np.exp(rng.normal(0, 0.12)))
        cx, cy = (x0 + x1) / 2 + rng.normal(0, 0.06) * side, (y0 + y1) / 2 + rng.normal(0, 0.06) * side
        out = grader.SPEC.input_hw[0]
        scale = out / size
        angle, shear = np.deg2rad(rng.normal(0, 8)), rng.normal(0, 0.05)
        linear = scale * np.array([[np.cos(angle), -np.sin(angle) + shear], [np.sin(angle), np.cos(angle)]])
        if rng.random() < 0.3:
            linear[:, 0] *= -1
        matrix = np.hstack([linear, (np.array([out / 2, out / 2]) - linear @ np.array([cx, cy]))[:, None]])
        image = disc.image
        if scale < 0.7:
            image = cv2.GaussianBlur(image, (0, 0), 0.45 / scale)
        x = normalise(data.warp(image, matrix, out))
        # Signal is the evidence here: contrast varies a little, never per class.
        y = (x + 1) / 2
        y = np.clip(y * float(np.exp(rng.normal(0, 0.12))), 0, 1) ** float(np.exp(rng.normal(0, 0.15)))
        if rng.random() < 0.3:
            y = cv2.GaussianBlur(y, (0, 0), float(rng.uniform(0.4, 1.2)))
        if rng.random() < 0.5:
            y = y + rng.normal(0, float(rng.uniform(0.01, 0.04)), y.shape)
        return np.clip(y * 2 - 1, -1, 1).astype(np.float32), disc

    def batch(self, rng: data.Rng, step: int) -> Batch:
        del step
        items = [self.one(rng) for _ in range(self.batch_size)]
        gradings = [d.grading for _, d in items]
        grades = np.array([g.pfirrmann for g in gradings], np.float32)
        distance = np.abs(np.arange(1, 6)[None] - grades[:, None])
        soft = np.exp(-self.variant.sharpness * distance)
        soft /= soft.sum(1, keepdims=True)
        flags = np.array([[g.herniation, g.narrowing, g.bulging] for g in gradings], np.float32)
        images = np.stack([x[None] for x, _ in items])
        other = rng.permutation(len(items))
        share = rng.beta(0.5, 0.5, (len(items), 1)).astype(np.float32)
        wide = share[:, :, None, None]
        return {
            "image": wide * images + (1 - wide) * images[other],
            "soft": (share * soft + (1 - share) * soft[other]).astype(np.float32),
            "flags": share * flags + (1 - share) * flags[other],
            NAMES: np.array([f"{items[i][1].name} + {items[j][1].name}" for i, j in enumerate(other)]),
        }

    def loss(self, out: Tensor, batch: dict[str, Tensor]) -> Tensor:
        from torch.nn import functional as f

        logits = out.float()
        grade = f.cross_entropy(logits[:, :5], batch["soft"])
        if self.variant.emd:
            apart = (logits[:, :5].softmax(1).cumsum(1) - batch["soft"].cumsum(1)).square().sum(1)
            grade = grade + self.variant.emd * apart.mean()
        return grade + 0.5 * f.binary_cross_entropy_with_logits(logits[:, 5:], batch["flags"] * 0.96 + 0.02)


RECIPES: dict[str, Callable[[Path, Path | None, int | None], Recipe]] = {
    "detector": DetectorRecipe,
    "grader": GraderRecipe,
    "segmenter": SegmenterRecipe,
}
