"""Is this a kind of picture that the classifier has learnt from? Mahalanobis distance of its trunk's pooled channels.

Hides the measure: mean and covariance of the 80 pooled channels over the training radiographs, the covariance shrunk towards
its diagonal because pictures are few (after Ledoit and Wolf, Journal of Multivariate Analysis 88, 2004, with a fixed share),
and the limit that 99 % of pictures keep that did not set the mean (Lee et al., "A simple unified framework for detecting
out-of-distribution samples", NeurIPS 2018, with one class). The numbers belong to one set of weights and lie beside them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

FILE = Path(__file__).with_name("weights") / "spine_class-familiarity.npz"
SHRINKAGE = 0.03
KEPT = 0.99  # of pictures of the known kind
FOLDS = 5
PHANTOMS, PHANTOM_SEED = 24, 2_000_000  # a demonstration must be answered too


@dataclass(frozen=True, eq=False)
class Familiarity:
    """`mean` of D channels, `root` D x D with (x - mean) @ root of unit covariance, `limit` of the distance."""

    mean: NDArray[np.float64]
    root: NDArray[np.float64]
    limit: float

    def distance(self, pooled: NDArray[np.floating]) -> NDArray[np.float64]:
        """N x D -> N distances, 1 for a usual picture (root mean square over the channels); infinite where a channel is no number."""
        x = np.asarray(pooled, np.float64)
        finite = np.isfinite(x).all(axis=1)
        white = (x[finite] - self.mean) @ self.root
        out = np.full(len(x), np.inf)
        out[finite] = np.sqrt((white**2).mean(axis=1))
        return out

    def known(self, pooled: NDArray[np.floating]) -> bool:
        """Of one picture, 1 x D."""
        return bool(self.distance(pooled)[0] <= self.limit)


def fit(learnt: NDArray[np.floating], choosing: NDArray[np.floating], rare: NDArray[np.floating] | None = None) -> Familiarity:
    """From pooled channels of training pictures, and of pictures that training did not see, which set the limit.

    `rare` are training pictures of kinds that the choosing ones lack: they are measured in FOLDS folds, each by the other
    folds and `learnt`, and set the limit with the choosing ones. Raises ValueError below 50 of `learnt` or of `choosing`: a
    covariance and a 99th percentile need some.
    """
    if min(len(learnt), len(choosing)) < 50:
        raise ValueError(f"{len(learnt)} and {len(choosing)} pictures; at least 50 of each are needed")
    rare = np.zeros((0, learnt.shape[1])) if rare is None else rare
    found = _measured(np.concatenate([learnt, rare]))
    fold = np.arange(len(rare)) % FOLDS
    crossed = [_measured(np.concatenate([learnt, rare[fold != k]])).distance(rare[fold == k]) for k in range(FOLDS)]
    limit = float(np.quantile(np.concatenate([found.distance(choosing), *crossed]), KEPT))
    return Familiarity(found.mean, found.root, limit)


def _measured(learnt: NDArray[np.floating]) -> Familiarity:
    """Mean and square root, with everything known."""
    x = np.asarray(learnt, np.float64)
    mean = x.mean(axis=0)
    covariance = np.cov(x - mean, rowvar=False)
    diagonal = np.diag(np.diag(covariance))
    # A channel that never fires would divide by nothing.
    floor = 1e-3 * float(np.trace(covariance)) / len(covariance) * np.eye(len(covariance))
    values, vectors = np.linalg.eigh((1 - SHRINKAGE) * covariance + SHRINKAGE * diagonal + floor)
    return Familiarity(mean, vectors / np.sqrt(values), np.inf)


def write(found: Familiarity, path: Path = FILE) -> None:
    part = path.with_suffix(".part")
    with part.open("wb") as f:
        np.savez_compressed(f, mean=found.mean.astype(np.float32), root=found.root.astype(np.float32), limit=np.float32(found.limit))
    part.replace(path)


@cache
def read(path: Path = FILE) -> Familiarity:
    """The numbers that ship with the weights. Raises OSError, and KeyError or ValueError for anything but what `write` wrote."""
    with np.load(path, allow_pickle=False) as stored:
        mean, root, limit = (np.asarray(stored[name], np.float64) for name in ("mean", "root", "limit"))
    if mean.ndim != 1 or root.shape != (len(mean), len(mean)) or limit.ndim or not all(np.isfinite(a).all() for a in (mean, root, limit)):
        raise ValueError(f"{path.name} does not hold a mean, a square root and a limit")
    return Familiarity(mean, root, float(limit))


def main(argv: list[str] | None = None) -> int:
    """`python -m models.familiarity --data DIR --weights final.pt`: the numbers for one set of the classifier's weights."""
    import argparse

    from models import evaluate_ap, phantom_ap, radiographs

    parser = argparse.ArgumentParser(prog="python -m models.familiarity", description=main.__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds spine_xray_ap/ and spine_xray_class/")
    parser.add_argument("--weights", type=Path, required=True, help="the classifier: final.pt of a run, or the .onnx that ships")
    parser.add_argument("--out", type=Path, default=FILE)
    args = parser.parse_args(argv)
    run = evaluate_ap.runner_of("spine_class", args.weights)
    drawn = [phantom_ap.draw(np.random.default_rng(PHANTOM_SEED + i))[0] for i in range(PHANTOMS)]
    # Half of the boxed pictures tell 80 channels' covariance; the classed ones are few, and of other makers.
    learnt = [p.pixels for p in radiographs.boxed(args.data, "train")[::2]]
    rare = [*(p.pixels for p in radiographs.classed(args.data, "train")), *drawn]
    choosing = [p.pixels for p in radiographs.boxed(args.data, "validation")]
    found = fit(*(evaluate_ap.pooled(run, pictures) for pictures in (learnt, choosing, rare)))
    write(found, args.out)
    print(f"{args.out}: {len(learnt) + len(rare)} pictures, limit {found.limit:.3f} with {len(choosing)} others")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
