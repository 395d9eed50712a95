"""What each family learns from: its samples, its loss, its schedule. The loop lies in `models/train.py`.

Nothing on a device imports this module.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import cv2
import numpy as np
from numpy.typing import NDArray

from kernels.preprocess import normalise
from models import data, segmenter

if TYPE_CHECKING:
    from torch import Tensor, nn

Batch = dict[str, NDArray[Any]]


class Recipe(Protocol):
    name: str
    steps: int
    learning_rate: float

    def network(self, pretrained: bool) -> nn.Module: ...
    def batch(self, rng: data.Rng, step: int) -> Batch: ...
    def loss(self, out: Any, batch: dict[str, Tensor]) -> Tensor: ...


def _train_side(paths: list[Path]) -> list[Path]:
    return [p for p in sorted(paths) if data.patient_of(p) in data.split()["train"]]


class SegmenterRecipe:
    """Cross-entropy and soft Dice on T2-SPACE masks, pseudo-labelled T1/T2 mid-sagittal slices, and phantoms."""

    name = "segmenter"
    learning_rate = 1.5e-3
    batch_size = 8

    def __init__(self, root: Path, pseudo: Path | None, steps: int | None) -> None:
        self.steps = steps or 1100
        pairs = [
            (p, root / "lumbar_mri/t2space/masks" / p.name) for p in _train_side(list((root / "lumbar_mri/t2space/images").glob("*.png")))
        ]
        self.real = [(normalise(data.read_grey(i).astype(np.float32)), data.read_mask(m)) for i, m in pairs]
        self.pseudo: list[tuple[NDArray[np.float32], NDArray[np.uint8]]] = []
        if pseudo:
            for p in _train_side(list(pseudo.glob("*.png"))):
                image = data.read_grey(root / "lumbar_mri/midsagittal" / p.name)
                self.pseudo.append((normalise(image.astype(np.float32)), data.read_grey(p)))

    def network(self, pretrained: bool) -> nn.Module:
        return segmenter.network(pretrained)

    def size(self, step: int) -> int:
        """Small inputs first: twice the samples a minute while the coarse shapes are learnt."""
        return 320 if step < 0.6 * self.steps else 384

    def one(self, rng: data.Rng, size: int) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
        kind = rng.random()
        if kind < 0.0:
            image, truth = phantom.draw(rng)
            mask = truth.mask
            image = normalise(image)
        elif self.pseudo and kind < 0.5:
            image, mask = self.pseudo[int(rng.integers(len(self.pseudo)))]
        else:
            image, mask = self.real[int(rng.integers(len(self.real)))]
        rows, columns = data.cut_edges(rng, mask.shape)
        image, mask = image[rows, columns], mask[rows, columns]
        if rng.random() < 0.25:
            image, mask = image[:, ::-1], mask[:, ::-1]
        matrix = data.random_affine(rng, mask.shape, size)
        x = data.warp(np.ascontiguousarray(image), matrix, size)
        y = data.warp(np.ascontiguousarray(mask), matrix, size, nearest=True, fill=0).astype(np.uint8)
        return data.vary_contrast(rng, x, y), y

    def batch(self, rng: data.Rng, step: int) -> Batch:
        size = self.size(step)
        items = [self.one(rng, size) for _ in range(self.batch_size)]
        return {"image": np.stack([x[None] for x, _ in items]), "mask": np.stack([y for _, y in items]).astype(np.int64)}

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


RECIPES: dict[str, Callable[[Path, Path | None, int | None], Recipe]] = {
    "segmenter": SegmenterRecipe,
}
