"""What the radiograph networks learn from: samples, variation, loss, schedule; as `models/recipes.py` for lumbar MRI.

Nothing on a device imports this module.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
from numpy.typing import NDArray

from kernels.preprocess import normalise
from models import data, phantom_ap, radiographs, spine_class, vertebra_ap
from models.detection_loss import detection_loss
from models.recipes import NAMES, Batch, Recipe

if TYPE_CHECKING:
    from torch import Tensor, nn

MOST_BOXES = 24
PHANTOMS = 96
PHANTOM_SHARE = 0.12
PHANTOM_SEED = 1_000_000  # none of these is measured on


def affine(rng: data.Rng, hw: tuple[int, int], out_hw: tuple[int, int], zoom_out: float, zoom_in: float) -> NDArray[np.float64]:
    """2 x 3 matrix from source to input pixels: letterbox, then rotate, zoom by exp(-zoom_out..zoom_in), shear, shift, mirror."""
    height, width = hw
    out_h, out_w = out_hw
    zoom = float(np.exp(rng.uniform(-zoom_out, zoom_in))) * min(out_h / height, out_w / width)
    aspect = float(np.exp(rng.uniform(-0.12, 0.12)))
    angle, shear = np.deg2rad(rng.normal(0, 5.0)), float(rng.normal(0, 0.05))
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    linear = zoom * rotation @ np.array([[aspect, shear], [0.0, 1 / aspect]])
    if rng.random() < 0.5:
        linear[:, 0] *= -1
    # A picture larger than the input may be moved by what hangs over, a smaller one by the room around it.
    slack = np.abs(np.array([out_w, out_h]) - zoom * np.array([width, height])) / 2 + 0.03 * np.array([out_w, out_h])
    target = np.array([out_w, out_h]) / 2 + rng.uniform(-1, 1, 2) * slack
    return np.hstack([linear, (target - linear @ np.array([width / 2, height / 2]))[:, None]])


def exposure(rng: data.Rng, image: NDArray[np.float32]) -> NDArray[np.float32]:
    """H x W in [-1, 1] -> the same picture as another plate, printer or equalisation would show it, in [-1, 1].

    The set with boxes was contrast-equalised and a clinic's DICOM is not: coarse brightness and fine detail are weighed anew.
    """
    x = (image + 1.0) / 2.0
    height, width = x.shape
    if rng.random() < 0.6:
        coarse = cv2.GaussianBlur(x, (0, 0), width / 10)
        x = (x - coarse) * float(rng.uniform(0.35, 1.2)) + coarse * float(rng.uniform(0.4, 1.4))
    if rng.random() < 0.5:
        field = rng.normal(0, 0.3, (int(rng.integers(2, 5)), int(rng.integers(2, 5)))).astype(np.float32)
        x = x * np.exp(cv2.resize(field, (width, height), interpolation=cv2.INTER_CUBIC))
    x = np.clip(x - x.min(), 0.0, None)
    x = np.clip(x / max(float(np.percentile(x, 99.5)), 1e-3), 0.0, 1.0) ** float(np.exp(rng.normal(0, 0.3)))
    if rng.random() < 0.3:
        x = cv2.GaussianBlur(x, (0, 0), float(rng.uniform(0.4, 1.2)))
    if rng.random() < 0.5:
        x = x + rng.normal(0, float(rng.uniform(0.01, 0.06)), x.shape).astype(np.float32)
    if rng.random() < 0.05:
        x = 1.0 - x  # a film as it hangs on a light box, the other way round
    return np.clip(x * 2.0 - 1.0, -1.0, 1.0).astype(np.float32)


def warp(image: NDArray[np.float32], matrix: NDArray[np.float64], out_hw: tuple[int, int]) -> NDArray[np.float32]:
    """Source -> input by a matrix between edges, padded with -1; blurred to the input's sampling first where it shrinks."""
    scale = float(np.sqrt(abs(np.linalg.det(matrix[:, :2]))))
    if scale < 0.8:
        image = cv2.GaussianBlur(image, (0, 0), 0.4 / scale)
    centres = matrix.copy()
    centres[:, 2] += 0.5 * matrix[:, :2].sum(1) - 0.5
    size = (out_hw[1], out_hw[0])
    return np.asarray(cv2.warpAffine(image, centres, size, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT, borderValue=-1.0))


def moved_boxes(boxes: NDArray[np.float32], matrix: NDArray[np.float64]) -> NDArray[np.float32]:
    """N x 4 boxes under an affine map, upright again. The ellipse in each box is what is enclosed: corners of a box are hardly
    ever bone, and a box around turned corners would grow with every turn."""
    centre = np.stack([boxes[:, 0] + boxes[:, 2], boxes[:, 1] + boxes[:, 3]], 1) / 2 @ matrix[:, :2].T + matrix[:, 2]
    half = np.stack([boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]], 1) / 2
    extent = np.sqrt((half**2) @ (matrix[:, :2] ** 2).T)
    return np.hstack([centre - extent, centre + extent]).astype(np.float32)


def bend(
    rng: data.Rng, image: NDArray[np.float32], boxes: NDArray[np.float32], steepest: float = 0.45
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Rows pushed sideways along a sine: more curves than the set has, up to slope `steepest`; boxes follow and widen."""
    height, width = image.shape
    wave = height * float(rng.uniform(0.45, 1.2))
    size = float(rng.uniform(-1, 1)) * min(steepest * wave / (2 * np.pi), 0.15 * width)
    phase = float(rng.uniform(0, 2 * np.pi))

    def shift(y: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.asarray(size * np.sin(2 * np.pi * y / wave + phase), np.float32)

    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    bent = cv2.remap(image, x - shift(y + 0.5), y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT, borderValue=-1.0)
    middle, half = (boxes[:, 1] + boxes[:, 3]) / 2, (boxes[:, 3] - boxes[:, 1]) / 2
    slope = size * 2 * np.pi / wave * np.cos(2 * np.pi * middle / wave + phase)
    # The same ellipse that `moved_boxes` encloses, sheared.
    wide = np.hypot((boxes[:, 2] - boxes[:, 0]) / 2, slope * half)
    centre = (boxes[:, 0] + boxes[:, 2]) / 2 + shift(middle)
    moved = np.stack([centre - wide, boxes[:, 1], centre + wide, boxes[:, 3]], 1).astype(np.float32)
    return np.asarray(bent, np.float32), moved


class VertebraRecipe:
    """Boxes drawn on AP radiographs, and phantoms; whoever is in the test side under another name is withdrawn.

    Inputs are wider than the device's, which are as narrow as most pictures: on the choosing part the network so taught reads
    448 x 256 as well as 448 x 320 (mAP50 .946 both), and better than one taught and read at 384 x 224 (.936).
    """

    name = "vertebra_ap"
    learning_rate = 1.5e-3
    batch_size = 8
    coarse_share = 0.25  # of the steps, on smaller inputs
    coarse_hw = (320, 192)
    hw = (448, 320)

    def __init__(self, root: Path, pseudo: Path | None, steps: int | None) -> None:
        del pseudo
        self.steps = steps or 2000
        self.real = [(b.name, normalise(b.pixels.astype(np.float32)), b.boxes) for b in radiographs.boxed(root, "train")]
        self.drawn = []
        for i in range(PHANTOMS):
            image, truth = phantom_ap.draw(np.random.default_rng(PHANTOM_SEED + i), (512, 288))
            self.drawn.append((f"phantom {PHANTOM_SEED + i}", normalise(image), np.array([v.box_px for v in truth.vertebrae], np.float32)))

    def network(self, pretrained: bool) -> nn.Module:
        return vertebra_ap.network(pretrained)

    def one(self, rng: data.Rng, hw: tuple[int, int]) -> tuple[NDArray[np.float32], NDArray[np.float32], str]:
        pool = self.drawn if rng.random() < PHANTOM_SHARE else self.real
        name, image, boxes = pool[int(rng.integers(len(pool)))]
        shape = (image.shape[0], image.shape[1])
        matrix = affine(rng, shape, hw, 0.25, 0.45 if rng.random() < 0.6 else 0.0)
        x, moved = warp(image, matrix, hw), moved_boxes(boxes, matrix)
        if rng.random() < 0.5:
            x, moved = bend(rng, x, moved)
        inside = moved.clip(0, np.array([hw[1], hw[0], hw[1], hw[0]], np.float32))
        share = np.prod(inside[:, 2:] - inside[:, :2], 1) / np.prod(moved[:, 2:] - moved[:, :2], 1)
        return exposure(rng, x), inside[share >= 0.5], name

    def batch(self, rng: data.Rng, step: int) -> Batch:
        hw = self.coarse_hw if step < self.coarse_share * self.steps else self.hw
        images = np.zeros((self.batch_size, 1, *hw), np.float32)
        boxes = np.zeros((self.batch_size, MOST_BOXES, 4), np.float32)
        kinds = np.full((self.batch_size, MOST_BOXES), -1, np.int64)
        names = []
        for i in range(self.batch_size):
            images[i, 0], found, name = self.one(rng, hw)
            names.append(name)
            count = min(len(found), MOST_BOXES)
            boxes[i, :count], kinds[i, :count] = found[:count], 0
        known = np.ones((self.batch_size, 1), np.float32)
        return {"image": images, "boxes": boxes, "kinds": kinds, "known": known, NAMES: np.array(names)}

    def loss(self, out: Any, batch: dict[str, Tensor]) -> Tensor:
        return detection_loss(out, batch["boxes"], batch["kinds"], batch["known"], vertebra_ap.STRIDES)


@dataclass(frozen=True)
class Teaching:
    """How the classifier is taught. `boxed`: the share of a batch that comes from pictures with boxes, whose curve is made
    stronger or taken out and which are called scoliosis or normal after it; `bent`: the share of normal pictures that are bent
    into scoliosis; `mixed`: the share of a batch that is blended with another picture of it (Zhang et al., "mixup", ICLR 2018).
    """

    frozen: int = 0  # stages of the trunk
    learning_rate: float = 1e-3
    boxed: float = 0.3
    bent: float = 0.3
    mixed: float = 0.5


STRAIGHT_DEG, CURVED_DEG = 7.0, 14.0  # between them nobody calls a picture either for certain
STRAIGHTENED_DEG = 45.0  # a stronger curve cannot be taken out without folding what lies beside it


@dataclass(frozen=True, eq=False)
class Spine:
    """A picture with boxes whose curve can be changed: where the spine runs in each row, and how steeply, in pixels of `image`."""

    name: str
    image: NDArray[np.float32]
    off: NDArray[np.float32]
    line: NDArray[np.float32]
    width: float

    @classmethod
    def of(cls, name: str, image: NDArray[np.float32], boxes: NDArray[np.float32]) -> Spine:
        x, y = (boxes[:, 0] + boxes[:, 2]) / 2, (boxes[:, 1] + boxes[:, 3]) / 2
        middle, half = (y[0] + y[-1]) / 2, max((y[-1] - y[0]) / 2, 1.0)
        curve = np.polynomial.Polynomial.fit(y, x, min(6, len(x) - 1), domain=[middle - half, middle + half])
        straight = np.polynomial.Polynomial.fit(y, x, 1, domain=[middle - half, middle + half])
        rows = np.arange(image.shape[0]) + 0.5
        held = rows.clip(y[0], y[-1])
        off = curve(held) - straight(held)
        return cls(name, image, off.astype(np.float32), straight(rows).astype(np.float32), float(np.median(boxes[:, 2] - boxes[:, 0])))

    def angle_deg(self, share: float) -> float:
        """Between the two steepest places of the line with its curve multiplied by `share`."""
        tilt = np.arctan(share * np.gradient(self.off))
        return float(np.rad2deg(tilt.max() - tilt.min()))

    def recurved(self, share: float) -> NDArray[np.float32]:
        """The picture with the curve multiplied by `share`; vertebrae turn with the line, what lies far beside it does not."""
        height, width = self.image.shape
        y, x = np.mgrid[0:height, 0:width].astype(np.float32)
        turn = ((1 - share) * np.gradient(self.off)).astype(np.float32)[:, None]
        beside = x + 0.5 - (self.line + share * self.off)[:, None]
        near = np.exp(-((beside / (1.5 * self.width)) ** 2)).astype(np.float32)
        from_x, from_y = x + ((1 - share) * self.off)[:, None], y - beside * turn * near
        x, y = from_x.astype(np.float32), from_y.astype(np.float32)
        made = cv2.remap(self.image, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT, borderValue=-1.0)
        return np.asarray(made, np.float32)


class ClassRecipe:
    """Radiographs of three classes, as often as in the set, started from the vertebra detector's weights (`--init`).

    `fold` leaves one fold of the training persons out (`radiographs.folds`), to choose between ways of teaching.
    """

    name = "spine_class"
    batch_size = 16

    def __init__(
        self, root: Path, pseudo: Path | None, steps: int | None, teaching: Teaching = Teaching(), fold: int | None = None
    ) -> None:
        del pseudo
        self.teaching, self.learning_rate = teaching, teaching.learning_rate
        self.steps = steps or 750
        found = radiographs.classed(root, "train")
        kept = [c for c, k in zip(found, radiographs.folds(found), strict=True) if k != fold]
        self.pools = [[(c.name, self._small(c.pixels)) for c in kept if c.kind == k] for k in range(len(radiographs.CLASSES))]
        for name, pool in zip(radiographs.CLASSES, self.pools, strict=True):
            if not pool:
                raise SystemExit(f"no picture of the class {name} is in the training part of {root}")
        counts = np.array([len(p) for p in self.pools], np.float64)
        self.often = counts / counts.sum()
        boxed = radiographs.boxed(root, "train") if teaching.boxed else []
        self.spines = [Spine.of(b.name, normalise(b.pixels.astype(np.float32)), b.boxes) for b in boxed if len(b.boxes) >= 8]

    @staticmethod
    def _small(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Normalised as the device does, then at most twice the input's height: reading 1024 rows for 320 costs time alone."""
        normalised = normalise(pixels.astype(np.float32))
        scale = 2 * spine_class.SPEC.input_hw[0] / max(normalised.shape)
        return np.asarray(cv2.resize(normalised, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA) if scale < 1 else normalised)

    def network(self, pretrained: bool) -> nn.Module:
        return spine_class.network(pretrained, self.teaching.frozen)

    def _recurved(self, rng: data.Rng) -> tuple[str, NDArray[np.float32], int]:
        spine = self.spines[int(rng.integers(len(self.spines)))]
        share, wanted = float(rng.uniform(0.2, 1.2)), 1
        if spine.angle_deg(1.0) <= STRAIGHTENED_DEG and rng.random() < 0.6:
            wanted = 0
            # The angle grows a little slower than the curve, so this is at most the straightest that is wanted.
            share = float(rng.uniform(0, STRAIGHT_DEG)) / max(spine.angle_deg(1.0), STRAIGHT_DEG)
            while spine.angle_deg(share) > STRAIGHT_DEG:
                share *= 0.8
        elif spine.angle_deg(share) < CURVED_DEG:
            share = 1.0
            wanted = int(spine.angle_deg(share) >= CURVED_DEG)
        image = spine.recurved(share)
        return f"{spine.name} x {share:.2f}", image[:, ::-1] if rng.random() < 0.5 else image, wanted

    def one(self, rng: data.Rng) -> tuple[NDArray[np.float32], int, str]:
        hw = spine_class.SPEC.input_hw
        if self.spines and rng.random() < self.teaching.boxed:
            name, image, kind = self._recurved(rng)
        else:
            kind = int(rng.choice(len(self.pools), p=self.often))
            name, image = self.pools[kind][int(rng.integers(len(self.pools[kind])))]
        matrix = affine(rng, (image.shape[0], image.shape[1]), hw, 0.15, 0.2)
        x = warp(np.ascontiguousarray(image), matrix, hw)
        if kind == 0 and rng.random() < self.teaching.bent:
            x, strength = self._bent(rng, x)
            kind = 1 if strength >= CURVED_DEG else 0
        return exposure(rng, x), kind, name

    @staticmethod
    def _bent(rng: data.Rng, x: NDArray[np.float32]) -> tuple[NDArray[np.float32], float]:
        """An input with an S or C put into it, and by how many degrees it is bent; the spine is taken to run down its middle."""
        height, width = x.shape
        wave, phase, angle = height * float(rng.uniform(0.6, 1.4)), float(rng.uniform(0, 2 * np.pi)), float(rng.uniform(16, 60))
        size = np.tan(np.deg2rad(angle / 2)) * wave / (2 * np.pi)
        rows = np.arange(height) + 0.5
        off = (size * np.sin(2 * np.pi * rows / wave + phase)).astype(np.float32)
        spine = Spine("", x, -off, np.full(height, width / 2, np.float32) + off, width / 6)
        # Taking the opposite curve out puts this one in.
        return spine.recurved(0.0), spine.angle_deg(1.0)

    def batch(self, rng: data.Rng, step: int) -> Batch:
        del step
        made = [self.one(rng) for _ in range(self.batch_size)]
        images = np.stack([x[None] for x, _, _ in made])
        target = np.eye(len(self.pools), dtype=np.float32)[[k for _, k, _ in made]]
        if self.teaching.mixed:
            other = rng.permutation(self.batch_size)
            share = np.where(rng.random(self.batch_size) < self.teaching.mixed, rng.beta(0.4, 0.4, self.batch_size), 1.0).astype(np.float32)
            images = share[:, None, None, None] * images + (1 - share[:, None, None, None]) * images[other]
            target = share[:, None] * target + (1 - share[:, None]) * target[other]
        return {"image": images, "target": target, NAMES: np.array([n for _, _, n in made])}

    def loss(self, out: Any, batch: dict[str, Tensor]) -> Tensor:
        from torch.nn import functional as f

        return f.cross_entropy(out[0].float(), batch["target"], label_smoothing=0.05)


# Compared by `python -m models.evaluate_ap spine_class --side folds`, the figures in docs/radiographs.md; the last is what ships.
TEACHINGS = {
    "probe": Teaching(spine_class.TRUNK_STAGES, 3e-3, boxed=0.0, bent=0.0, mixed=0.0),
    "tuned": Teaching(boxed=0.0, bent=0.0, mixed=0.0),
    "curved": Teaching(mixed=0.0),
    "mixed": Teaching(),
}
RECIPES: dict[str, Callable[[Path, Path | None, int | None], Recipe]] = {
    "vertebra_ap": VertebraRecipe,
    "spine_class": ClassRecipe,
    **{f"spine_class.{n}.{k}": partial(ClassRecipe, teaching=t, fold=k) for n, t in TEACHINGS.items() for k in range(radiographs.FOLDS)},
}
