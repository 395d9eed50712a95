"""Grows the forest that fuses the grader's logits with what is measured, and tells by patient what each part of it adds.

`python -m models.fusion --data DIR --pseudo DIR --logits RUN ...` cross-validates by patient on the training side of
models/split.json; with --ablate also without each group of numbers, with --out the forest of all of them is written. Each RUN left a
fold of patients out (`python -m models.crossval`), and holds its logits for them. A grader's logits of its own training patients are
far too sure, and would teach the forest to believe nothing else. With --answers the fused logits are written, each by a forest that
did not see the patient: what temperatures and the threshold of plausible grades are fitted on. No patient of the test side is read
here. docs/grading.md has the figures.

Trees are those of Geurts et al., "Extremely randomized trees", Machine Learning 63, 2006. What they minimise is the ranked
probability score: the squared error of the four shares P(grade > k), and of the three flags.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from appliance.errors import ModelInvalid, TrainingDataInvalid
from kernels import appearance, fusion
from kernels.fusion import GRADES, NAMES, TARGETS, Fusion
from models import evaluate, grader
from models.known import of_folds

Floats = NDArray[np.float64]
FILE = Path(__file__).with_name("weights") / "grader-fusion.npz"
SEED = 20261127
FOLDS = 5
FUSED = "fused"  # in the source of known answers that went through a fusion
REMEDY = (
    "Fit it to the grader that lies beside it (`python -m models.fusion --logits FILE --out FILE --answers FILE`), and write its answers "
    "with `python -m models.known grader`; or remove it, and the grader answers alone."
)


@dataclass(frozen=True)
class Forest:
    """How a forest is grown. `share` of the columns are tried at a node; a leaf keeps at least `leaf` discs; `flags` is the
    weight of a flag beside that of one share of the grade."""

    trees: int = 200
    leaf: int = 5
    share: float = 0.7
    flags: float = 1.0


@dataclass(frozen=True, eq=False)
class Discs:
    """N discs of training patients: rows as `kernels.fusion.rows` makes them, the network's logits N x 8, truth N x 4 (grade 1..5,
    three flags), patient, level and slice of each."""

    x: NDArray[np.float32]
    logits: NDArray[np.float32]
    truth: NDArray[np.int64]
    patient: NDArray[np.int64]
    number: NDArray[np.int64]
    slice_name: NDArray[np.str_]

    @property
    def plain(self) -> NDArray[np.bool_]:
        """What the evaluation measures: usual T2 slices, not the middle of a T2-SPACE volume."""
        return np.array([name.endswith("_t2.png") for name in self.slice_name])


# -- discs ----------------------------------------------------------------------------------------------------------


def read_logits(files: Sequence[Path]) -> tuple[dict[tuple[str, int], NDArray[np.float32]], list[str]]:
    """((slice, disc number) -> 8 logits; names of the recipes), of runs of `python -m models.crossval` or files like theirs. Raises
    TrainingDataInvalid for one without them, and as `models.known.of_folds`."""
    found, recipes = of_folds(files, ("logits", "number", "slice_name"))
    logits, number, name = found["logits"], found["number"], found["slice_name"]
    where = ", ".join(str(f) for f in files)
    if (
        logits.ndim != 2
        or logits.shape[1] != len(grader.SPEC.classes)
        or not len(logits) == len(number) == len(found["patient"]) == len(name)
    ):
        raise TrainingDataInvalid("the logits are not eight for each disc", value=where)
    if not np.isfinite(logits).all():
        raise TrainingDataInvalid("some logits are no numbers", value=where)
    return {(str(n), int(k)): np.asarray(z, np.float32) for n, k, z in zip(name, number, logits, strict=True)}, recipes


def discs(
    root: Path,
    pseudo: Path | None,
    known: dict[tuple[str, int], NDArray[np.float32]],
    segment: evaluate.Runner,
    progress: Callable[[int, int], None] | None = None,
) -> Discs:
    """The graded T2 discs of the training side that have logits, measured as a device measures them. Raises TrainingDataInvalid
    where none has."""
    from models.recipes import GradedDisc, graded_discs

    slices: dict[str, list[tuple[int, GradedDisc]]] = {}
    for disc in graded_discs(root, pseudo, "train", space=False):
        name, _, number = disc.name.rpartition(", disc ")
        slices.setdefault(Path(name).name, []).append((int(number), disc))
    parts: list[tuple[Any, ...]] = []
    for done, (name, column) in enumerate(sorted(slices.items()), 1):
        numbers = [k for k, _ in column if (name, k) in known]
        if numbers:
            image = column[0][1].image
            looks = evaluate.looks(image, segment, [d.box for _, d in column], [k for k, _ in column])
            logits = np.stack([known[name, k] for k in numbers])
            kept = [i for i, (k, _) in enumerate(column) if k in numbers]
            x = fusion.rows(logits, looks[kept], numbers, numbers)
            gradings = [(g.pfirrmann, g.herniation, g.narrowing, g.bulging) for g in (column[i][1].grading for i in kept)]
            parts.append((x, logits, np.array(gradings, np.int64), [column[0][1].patient] * len(numbers), numbers, [name] * len(numbers)))
        if progress:
            progress(done, len(slices))
    if not parts:
        raise TrainingDataInvalid("no graded disc has logits", value=root)
    x, logits, truth, patient, number, names = (np.concatenate([np.asarray(p[i]) for p in parts]) for i in range(6))
    return Discs(x, logits, truth, patient, number, names)


# -- growing --------------------------------------------------------------------------------------------------------


def targets(truth: NDArray[np.int64]) -> Floats:
    """N x 4 (grade, flags) -> N x 7: grade > 1, > 2, > 3, > 4, and the flags, each 0 or 1."""
    return np.column_stack([truth[:, :1] > np.arange(1, GRADES), truth[:, 1:]]).astype(np.float64)


def grow(
    x: NDArray[np.float32],
    y: Floats,
    order: Forest = Forest(),
    seed: int = SEED,
    grader_sha256: str = "",
    columns: NDArray[np.int64] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Fusion:
    """A forest on N x len(NAMES) rows (NaN: not known) and N x 7 targets. `columns`: those that may be asked for; all where None.

    The same arguments give the same bytes. ValueError for fewer than two leaves' worth of discs, or targets of another shape.
    """
    if len(x) < 2 * order.leaf or y.shape != (len(x), TARGETS) or x.shape[1] != len(NAMES):
        raise ValueError(f"{len(x)} discs with {y.shape} targets grow no forest")
    known = np.isfinite(x)
    fill = np.array([np.median(x[seen, i]) if (seen := known[:, i]).any() else 0.0 for i in range(x.shape[1])], np.float32)
    filled = np.where(known, x, fill).astype(np.float32)
    usable = np.arange(len(NAMES)) if columns is None else columns
    weight = np.array([1.0] * (GRADES - 1) + [order.flags] * (TARGETS - GRADES + 1))
    rng = np.random.default_rng(seed)
    feature: list[int] = []
    threshold: list[float] = []
    child: list[int] = []
    value: list[Floats] = []
    roots = []

    def node(members: NDArray[np.int64]) -> int:
        feature.append(-1)
        threshold.append(0.0)
        child.append(0)
        value.append(y[members].mean(axis=0))
        return len(feature) - 1

    for tree in range(order.trees):
        everybody = np.arange(len(x))
        roots.append(node(everybody))
        waiting = [(roots[-1], everybody)]
        while waiting:
            at, members = waiting.pop()
            found = _split(filled, y * weight, members, usable, order, rng)
            if found is None:
                continue
            column, cut = found
            low = filled[members, column] <= cut
            feature[at], threshold[at] = column, float(cut)
            child[at] = node(members[low])
            node(members[~low])
            waiting += [(child[at], members[low]), (child[at] + 1, members[~low])]
        if progress:
            progress(tree + 1, order.trees)
    return Fusion(
        fill,
        np.array(feature, np.int16),
        np.array(threshold, np.float32),
        np.array(child, np.int32),
        np.array(value, np.float32),
        np.array(roots, np.int32),
        grader_sha256,
    )


def _split(
    x: NDArray[np.float32], y: Floats, members: NDArray[np.int64], columns: NDArray[np.int64], order: Forest, rng: np.random.Generator
) -> tuple[int, np.float32] | None:
    """The best of some random cuts, one a column; None where nothing is left to be cut."""
    here = y[members]
    if len(members) < 2 * order.leaf or (here == here[0]).all():
        return None
    inside = x[members][:, columns]
    low, high = inside.min(axis=0), inside.max(axis=0)
    varied = np.flatnonzero(high > low)
    tried = rng.permutation(varied)[: max(1, round(order.share * len(columns)))]
    if not tried.size:
        return None
    cuts = (low[tried] + (high[tried] - low[tried]) * rng.random(len(tried))).astype(np.float32)
    # Rounding must not put everybody on one side.
    cuts = np.minimum(cuts, np.nextafter(high[tried], low[tried]))
    left = inside[:, tried] <= cuts
    count = left.sum(axis=0)
    sums = left.T.astype(np.float64) @ here
    rest = here.sum(axis=0) - sums
    # Of cuts of the same discs, the smallest squared error has the largest sum of squares of means.
    gain = (sums**2).sum(axis=1) / np.maximum(count, 1) + (rest**2).sum(axis=1) / np.maximum(len(members) - count, 1)
    gain[(count < order.leaf) | (len(members) - count < order.leaf)] = -np.inf
    best = int(gain.argmax())
    return (int(columns[tried[best]]), cuts[best]) if np.isfinite(gain[best]) else None


def beside(weights: Path) -> Fusion | None:
    """The fusion that lies beside a grader; None where there is none. Raises ModelInvalid where it is no fusion, or another grader's."""
    path = weights / FILE.name
    if not path.exists():
        return None
    try:
        found = fusion.read(path.read_bytes())
        own = hashlib.sha256((weights / "grader.onnx").read_bytes()).hexdigest()
    except (OSError, ValueError) as error:
        raise ModelInvalid(f"the fusion cannot be used: {error}", value=path, remedy=REMEDY) from error
    if found.grader != own:
        raise ModelInvalid("the fusion was fitted to the logits of another grader", value=found.grader[:12], remedy=REMEDY)
    return found


# -- judging --------------------------------------------------------------------------------------------------------


def cross_validated(
    d: Discs,
    order: Forest,
    seeds: Sequence[int],
    columns: NDArray[np.int64] | None = None,
    changed: NDArray[np.float32] | None = None,
    learnt: NDArray[np.bool_] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> NDArray[np.float32]:
    """S x N x 8 fused logits, one layer a seed of folds: each disc by a forest that did not see its patient.

    `changed` are other rows of the same discs to be judged, say with numbers missing; `learnt` the discs that forests may learn from.
    """
    judged = d.x if changed is None else changed
    usable = np.ones(len(d.x), bool) if learnt is None else learnt
    y = targets(d.truth)
    out = np.zeros((len(seeds), *d.logits.shape), np.float32)
    for i, seed in enumerate(seeds):
        fold = evaluate.folds(d.patient, seed, FOLDS)
        for k in range(FOLDS):
            others = (fold != k) & usable
            forest = grow(d.x[others], y[others], order, seed, columns=columns)
            out[i, fold == k] = forest.logits(d.logits[fold == k], judged[fold == k])
            if progress:
                progress(i * FOLDS + k + 1, len(seeds) * FOLDS)
    return out


def scores(logits: NDArray[np.float32], d: Discs, which: NDArray[np.bool_]) -> evaluate.Scores:
    """The grader's metrics on some of the discs and the mean log likelihood of the grade, with intervals over patients; of S x N x 8
    logits the means over the S answers, which are not averaged themselves: a device gives one."""
    groups, truth = d.patient[which].tolist(), d.truth[which]
    layers = []
    for layer in logits:
        z = layer[which, :GRADES].astype(np.float64)
        own = z[np.arange(len(z)), truth[:, 0] - 1] - np.logaddexp.reduce(z, axis=1)
        one = evaluate.grade_measures(grader.decode(layer[which]), truth)
        layers.append({**one, "log_likelihood": lambda i, own=own: float(own[i].mean())})
    out = evaluate.Scores("pfirrmann_exact")
    for name in layers[0]:
        out.add(name, groups, lambda i, name=name: float(np.mean([m[name](i) for m in layers])))  # type: ignore[misc]
    return out


def reading(logits: NDArray[np.float32], truth: NDArray[np.int64], patient: NDArray[np.int64]) -> dict[str, float]:
    """What of the error is the same for all discs of a patient: the reader's habit of that day, or a picture that misleads as a whole.

    From N x 8 logits: the spread of truth less expected grade, the share of its variance that lies between patients, and metrics of
    the rounded expected grade as it is, and moved by half of what the patient's other discs are off. Nobody knows that on a device:
    it tells what no better look at one disc can mend.
    """
    z = logits[:, :GRADES].astype(np.float64)
    p = np.exp(z - np.logaddexp.reduce(z, axis=1, keepdims=True))
    expected = p @ np.arange(1.0, GRADES + 1)
    off = truth[:, 0] - expected
    sums, counts = np.zeros(len(off)), np.zeros(len(off))
    within = 0.0
    for who in np.unique(patient):
        own = patient == who
        sums[own], counts[own] = off[own].sum(), own.sum()
        within += float(((off[own] - off[own].mean()) ** 2).sum())
    others = np.where(counts > 1, (sums - off) / np.maximum(counts - 1, 1), 0.0)
    within /= max(len(off) - len(np.unique(patient)), 1)
    out = {"spread_grades": float(off.std()), "share_between_patients": max(0.0, 1 - within / float(off.var(ddof=1)))}
    for name, moved in (("as_it_is", expected), ("offset_known", expected + 0.5 * others)):
        answer = np.clip(np.round(moved), 1, GRADES).astype(np.int64)
        out[f"exact_{name}"] = float((answer == truth[:, 0]).mean())
        out[f"within_1_{name}"] = float((np.abs(answer - truth[:, 0]) <= 1).mean())
        out[f"kappa_{name}"] = evaluate.quadratic_kappa(answer, truth[:, 0])
    return {name: round(value, 4) for name, value in out.items()}


def columns_of(*groups: str) -> NDArray[np.int64]:
    """Columns of some groups of `kernels.fusion.GROUPS`."""
    names = {name for group in groups for name in fusion.GROUPS[group]}
    return np.array([i for i, name in enumerate(NAMES) if name in names], np.int64)


def ablations() -> dict[str, NDArray[np.int64]]:
    """What may be asked for, by a name in words: groups one after the other, and everything but one."""
    groups = tuple(fusion.GROUPS)
    out = {"network": columns_of("network")}
    for k in range(1, len(groups)):
        out[f"+ {groups[k]}"] = columns_of(*groups[: k + 1])
    measured = ("level", *appearance.GROUPS)
    out["measured alone, without the network"] = columns_of(*measured)
    out |= {f"all but {group}": columns_of(*(g for g in groups if g != group)) for group in groups[1:]}
    return out


def without(x: NDArray[np.float32], *groups: str) -> NDArray[np.float32]:
    """A copy of rows that do not know some groups."""
    out = x.copy()
    out[:, columns_of(*groups)] = np.nan
    return out


def _as_json(found: evaluate.Scores, reference: evaluate.Scores | None) -> dict[str, Any]:
    out: dict[str, Any] = {"metrics": {m.name: [round(v, 4) for v in (m.value, m.low, m.high)] for m in found.metrics}}
    if reference is not None:
        gains = {m.name: evaluate.paired_drop(found, reference, m.name) for m in found.metrics}
        out["gain"] = {name: [round(v, 4) for v in (g.value, g.low, g.high)] for name, g in gains.items()}
    return out


def main(argv: list[str] | None = None) -> int:
    """Raises TrainingDataInvalid."""
    from models import card
    from models.export import WEIGHTS

    parser = argparse.ArgumentParser(prog="python -m models.fusion", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds lumbar_mri/")
    parser.add_argument("--pseudo", type=Path, help="folder of pseudo-labels made by `python -m models.pseudo`")
    parser.add_argument("--logits", type=Path, required=True, nargs="+", help="runs of `python -m models.crossval`, a fold each")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="folder of segmenter.onnx and grader.onnx")
    parser.add_argument("--out", type=Path, help=f"write the forest of all training patients, say {FILE.name} beside grader.onnx")
    parser.add_argument("--answers", type=Path, help="write the fused answers of the first seed, for `python -m models.known grader`")
    parser.add_argument("--json", type=Path, help="write all figures here too")
    parser.add_argument("--seeds", type=int, default=3, help="how many times patients are split into five folds")
    parser.add_argument("--trees", type=int, default=Forest.trees)
    parser.add_argument("--leaf", type=int, default=Forest.leaf, help="least discs in a leaf")
    parser.add_argument("--share", type=float, default=Forest.share, help="share of the columns that a branch tries")
    parser.add_argument("--ablate", action="store_true", help="also without each group of numbers, and with some missing")
    args = parser.parse_args(argv)
    if args.seeds < 1 or args.trees < 1 or args.leaf < 1 or not 0 < args.share <= 1:
        parser.error("--seeds, --trees and --leaf are at least 1, --share is above 0 and at most 1")
    order = Forest(args.trees, args.leaf, args.share)
    known, recipes = read_logits(args.logits)
    d = discs(args.data, args.pseudo, known, card.runner("segmenter", args.weights), _progress("measure slices"))
    seeds = [SEED + i for i in range(args.seeds)]
    which = d.plain
    network = scores(d.logits[None], d, which)
    report: dict[str, Any] = {
        "discs": int(which.sum()), "patients": len(np.unique(d.patient[which])), "discs_learnt_from": len(d.x),
        "order": {"trees": order.trees, "leaf": order.leaf, "share": order.share, "flags": order.flags, "seeds": seeds},
        "logits": [p.name for p in args.logits], "network alone": _as_json(network, None),
    }  # fmt: skip
    trials: dict[str, dict[str, Any]] = {"fused": {}}
    if args.ablate:
        trials |= {name: {"columns": columns} for name, columns in ablations().items()}
        trials["fused, learnt from usual T2 slices alone"] = {"learnt": d.plain}
        missing = {"level": ("level",), "everything behind the disc": ("canal",), "everything measured": (*appearance.GROUPS, "level")}
        trials |= {f"fused, {name} missing": {"changed": without(d.x, *groups)} for name, groups in missing.items()}
    for name, trial in trials.items():
        found = cross_validated(d, order, seeds, **trial, progress=_progress(name))
        report[name] = _as_json(scores(found, d, which), network)
        if name == "fused":
            answers = found[0, which, :GRADES].argmax(axis=1) + 1
            report["confusion by level"] = evaluate.confusion_of(d.number[which], d.truth[which, 0], answers).tolist()
            report["reading"] = reading(found[0][which], d.truth[which], d.patient[which])
            if args.answers:
                _write_answers(args.answers, found[0], d, recipes)
    text = json.dumps(report, indent=1)
    print(text)
    if args.json:
        args.json.write_text(text + "\n")
    if args.out is not None:
        digest = hashlib.sha256((args.weights / "grader.onnx").read_bytes()).hexdigest()
        forest = grow(d.x, targets(d.truth), order, SEED, digest, progress=_progress("grow"))
        blob = forest.to_bytes()
        part = args.out.with_suffix(".part")
        part.write_bytes(blob)
        part.replace(args.out)
        print(f"{args.out}: {len(forest.feature)} nodes, {len(blob) / 1e6:.2f} MB, for grader {digest[:12]}", file=sys.stderr)
    return 0


def _write_answers(path: Path, logits: NDArray[np.float32], d: Discs, recipes: Sequence[str]) -> None:
    part = path.with_suffix(".part")
    with part.open("wb") as f:
        np.savez_compressed(f, logits=logits, truth=d.truth, patient=d.patient, variant=np.array([f"{r}, {FUSED}" for r in recipes]))
    part.replace(path)


def _progress(stage: str) -> Callable[[int, int], None]:
    """A bar for a stage that tells how much is done of how much."""
    from tqdm import tqdm

    bar = tqdm(desc=stage)

    def step(done: int, total: int) -> None:
        bar.total = total
        bar.update(done - bar.n)
        if done == total:
            bar.close()

    return step


if __name__ == "__main__":
    raise SystemExit(main())
