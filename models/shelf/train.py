"""Train a network of the shelf on its family's own task: `python -m models.shelf.train NAME --data DIR`.

The batches, the loss and the loop are those of `models/recipes.py` and `models/train.py`; what differs is the network, the number
of steps, and the learning rate of what starts from nothing.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.data import Rng
from models.recipes import RECIPES, Batch, Recipe
from models.shelf.design import NOTHING, Network, shelf
from models.train import DEVICES, SEED, device_named, train

if TYPE_CHECKING:
    from torch import Tensor, nn

# One budget for all networks of a task, so that they can be compared with each other.
STEPS = {"grader": 60, "detector": 90, "segmenter": 90}
RATE_FROM_NOTHING = 2e-3


class ShelfRecipe:
    """A family's recipe with another network."""

    def __init__(self, entry: Network, base: Recipe) -> None:
        self.entry, self.base = entry, base
        self.name = f"shelf-{entry.name}"
        self.steps = base.steps
        self.learning_rate = RATE_FROM_NOTHING if entry.design.start == NOTHING else base.learning_rate
        # Small inputs throughout: the budget is short, and coarse shapes come first.
        if hasattr(base, "coarse_share"):
            base.coarse_share = 1.0

    def network(self, pretrained: bool) -> nn.Module:
        return self.entry.network(pretrained)

    def batch(self, rng: Rng, step: int) -> Batch:
        return self.base.batch(rng, step)

    def loss(self, out: Any, batch: dict[str, Tensor]) -> Tensor:
        return self.base.loss(out, batch) if self.entry.loss is None else self.entry.loss(self.base.loss, out, batch)


def recipe(name: str, data: Path, pseudo: Path | None, steps: int | None = None) -> ShelfRecipe:
    """The recipe of one network of the shelf. Raises KeyError for a name that is not on it."""
    entry = shelf()[name]
    family = entry.design.family
    return ShelfRecipe(entry, RECIPES[family](data, pseudo, steps or STEPS[family]))


def run(given: ShelfRecipe, work: Path, seed: int, threads: int, device: str = "cpu") -> dict[str, Any]:
    """Train in `work`, and leave `run.json` beside the weights: what was spent on them. Returns the averaged state dict."""
    state = train(given, work, seed, None, threads, device)
    with (work / "log.csv").open() as f:
        seconds = float(list(csv.DictReader(f))[-1]["seconds"])
    facts = {
        "network": given.entry.name,
        "family": given.entry.design.family,
        "start": given.entry.design.start,
        "seed": seed,
        "steps": given.steps,
        "batch_size": getattr(given.base, "batch_size", None),
        "learning_rate": given.learning_rate,
        "seconds": seconds,
        "threads": threads,
        "trained_on": device_title(device),
        "weights_sha256": digest(state),
    }
    part = work / "run.part"
    part.write_text(json.dumps(facts, indent=1) + "\n")
    part.replace(work / "run.json")
    return state


def device_title(device: str) -> str:
    """What a run's record calls the device that it was made on."""
    import torch

    return torch.cuda.get_device_name() if device == "cuda" else f"CPU, {platform.machine()}"


def digest(state: dict[str, Any]) -> str:
    """SHA-256 over the names and float32 values of a state dict, in the order of the names."""
    h = hashlib.sha256()
    for name in sorted(state):
        h.update(name.encode())
        h.update(state[name].detach().float().contiguous().numpy().tobytes())
    return h.hexdigest()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m models.shelf.train", description=__doc__)
    parser.add_argument("name", choices=sorted(shelf()))
    parser.add_argument("--data", type=Path, required=True, help="folder that holds lumbar_mri/")
    parser.add_argument("--pseudo", type=Path, help="folder of pseudo-labels made by `python -m models.pseudo`")
    parser.add_argument("--work", type=Path, default=Path.home() / ".cache/spinebox/train/shelf", help="checkpoints and logs")
    parser.add_argument("--steps", type=int, help="shorten or lengthen the budget")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 2)
    parser.add_argument("--device", choices=DEVICES, default="cpu", help="where the network runs; only a CPU ends in the same bytes again")
    args = parser.parse_args(argv)
    given = recipe(args.name, args.data, args.pseudo, args.steps)
    run(given, args.work / args.name, args.seed, args.threads, device_named(args.device))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
