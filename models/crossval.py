"""Cross-validation of graders by patient, on training patients alone: `python -m models.crossval --data DIR --fold K`.

Fold K of FOLDS is left out, a grader learns from the rest, and its logits for the discs left out go to WORK/RUN/logits.npz. Fold
`all` leaves nobody out: the grader that would be shipped. `--teacher` distils from large graders that left out the same fold.
What is chosen between variants, what `models/fusion.py` learns from, and what temperatures are fitted on (`models/known.py`), are these
logits: no patient of the test side is read here.
"""

from __future__ import annotations

import argparse
import os
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from models import data, grader, teacher
from models.compress import taught
from models.recipes import VARIANTS, GradedDisc, GraderRecipe, graded_discs
from models.train import DEVICES, SEED, device_named, train

if TYPE_CHECKING:
    from torch import Tensor, nn

FOLDS = 5
STEPS = 1200


def fold_patients(fold: int) -> frozenset[int]:
    """Training patients of one fold, 0..FOLDS - 1; the same whatever is trained."""
    if not 0 <= fold < FOLDS:
        raise ValueError(f"fold {fold} is not in 0..{FOLDS - 1}")
    patients = sorted(data.split()["train"])
    random.Random(SEED).shuffle(patients)
    return frozenset(patients[fold::FOLDS])


def folder(work: Path, variant: str, fold: str, seed: int = SEED, taught: bool = False) -> Path:
    """Where a run's checkpoints and logits lie."""
    return work / f"grader-{variant}{'-taught' if taught else ''}-{fold}{'' if seed == SEED else f'-{seed}'}"


def command_of(run: str) -> str:
    """What follows `python -m models.crossval` in the command that makes a run of a name that `folder` gives; folders are left to
    whoever calls it. ValueError for another name."""
    parts = run.split("-")
    if not 3 <= len(parts) <= 4 or parts[0] != "grader" or parts[1] not in VARIANTS:
        raise ValueError(f"{run} is no run of a grader")
    _, variant, fold, *seed = parts
    return f"--data DIR --pseudo DIR --variant {variant} --fold {fold}{f' --seed {seed[0]}' if seed else ''}"


def logits(net: nn.Module, discs: list[GradedDisc], widths: float, device: str) -> Any:
    """N x 8 float32: what `net` says of each disc, cropped as the device crops it."""
    import torch

    net.eval().to(device)
    out = []
    with torch.no_grad():
        for i in range(0, len(discs), 64):
            crops = np.stack([grader.crop(d.image, d.box, widths) for d in discs[i : i + 64]])
            out.append(net(torch.from_numpy(crops).to(device)).float().cpu().numpy())
    return np.concatenate(out)


class Taught:
    """A grader's recipe with a teacher beside the labels, as `models/compress.py` distils networks of the shelf."""

    def __init__(self, base: GraderRecipe, teacher: nn.Module) -> None:
        self.base, self.teacher = base, teacher
        self.name, self.steps, self.learning_rate, self.variant = "grader-taught", base.steps, base.learning_rate, base.variant
        self.network, self.batch = base.network, base.batch

    def loss(self, out: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return taught(self.base.loss(out, batch), out, batch["image"], self.teacher)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m models.crossval", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds lumbar_mri/")
    parser.add_argument("--pseudo", type=Path, help="folder of pseudo-labels made by `python -m models.pseudo`")
    parser.add_argument("--variant", choices=sorted(VARIANTS), default="base", help="see models/recipes.py")
    parser.add_argument("--fold", required=True, help=f"0 to {FOLDS - 1}, or all: the patients that are left out")
    parser.add_argument(
        "--work",
        type=Path,
        default=Path.home() / ".cache/spinebox/train/shelf",
        help="beside the shelf, which they teach",
    )
    parser.add_argument("--steps", type=int, default=STEPS, help="of training")
    parser.add_argument("--teacher", action="append", default=[], help="run in --work of a large grader; given again, the mean of all")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 2)
    parser.add_argument("--device", choices=DEVICES, default="cpu", help="where the network runs")
    args = parser.parse_args(argv)
    if args.fold != "all" and args.fold not in map(str, range(FOLDS)):
        parser.error(f"--fold: {args.fold} is neither 0 to {FOLDS - 1} nor all")
    variant, device = VARIANTS[args.variant], device_named(args.device)
    out = frozenset[int]() if args.fold == "all" else fold_patients(int(args.fold))
    base = GraderRecipe(args.data, args.pseudo, args.steps, variant, out)
    heads = [args.work / t / "final.pt" for t in args.teacher]
    recipe = Taught(base, teacher.committee(heads, device)) if heads else base
    work = folder(args.work, args.variant, args.fold, args.seed, bool(heads))
    state = train(recipe, work, args.seed, None, args.threads, device)
    discs = [d for d in graded_discs(args.data, args.pseudo, "train", space=False) if d.patient in out]
    if not discs:
        return 0
    net = recipe.network(pretrained=False)
    net.load_state_dict(state)
    part = work / "logits.part.npz"
    np.savez(
        part,
        logits=logits(net, discs, variant.widths, device),
        patient=np.array([d.patient for d in discs]),
        number=np.array([int(d.name.rsplit(" ", 1)[1]) for d in discs]),
        slice_name=np.array([Path(d.name.split(",")[0]).name for d in discs]),
        truth=np.array([[d.grading.pfirrmann, d.grading.herniation, d.grading.narrowing, d.grading.bulging] for d in discs]),
        fold=args.fold,
        variant=f"{args.variant}{'-taught' if heads else ''}",
    )
    part.replace(work / "logits.npz")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
