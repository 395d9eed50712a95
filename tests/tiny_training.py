"""A training that takes a second, with everything in it that could differ after a resume: batch norm, dropout, momentum.

Run as a program it trains in a folder until it is done or killed: `python tests/tiny_training.py WORK SECONDS_A_STEP`.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from models import train
from models.recipes import NAMES, Batch

SEED, STEPS = 5, 45


class TinyRecipe:
    """Stripes or no stripes, 16 x 16."""

    name = "tiny"
    learning_rate = 1e-2

    def __init__(self, steps: int = STEPS, pause_s: float = 0.0, poison: int | None = None, steep: int | None = None) -> None:
        self.steps, self.pause_s, self.poison, self.steep = steps, pause_s, poison, steep
        self.step = 0

    def network(self, pretrained: bool) -> Any:
        from torch import nn

        head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.5), nn.Linear(8, 2))
        return nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), *head)

    def batch(self, rng: np.random.Generator, step: int) -> Batch:
        kind = rng.integers(0, 2, 6)
        image = rng.normal(0, 0.5, (6, 1, 16, 16)).astype(np.float32)
        image[kind == 1, :, ::2] += 1.0
        if step == self.poison:
            image[2, 0, 3, 3] = np.nan
        return {"image": image, "kind": kind, NAMES: np.array([f"step {step} sample {i}" for i in range(6)])}

    def loss(self, out: Any, batch: dict[str, Any]) -> Any:
        from torch.nn import functional as f

        time.sleep(self.pause_s)
        self.step += 1
        loss = f.cross_entropy(out, batch["kind"])
        # The root of nothing: the value is sound, its slope is not.
        return loss + (out.sum() * 0.0).sqrt() if self.step - 1 == self.steep else loss


if __name__ == "__main__":
    train.CHECKPOINT_EVERY_S = 0.0
    train.train(TinyRecipe(pause_s=float(sys.argv[2])), Path(sys.argv[1]), SEED, None, 1)
