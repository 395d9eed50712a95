"""Is the network's confidence worth its name after INT8: temperature, calibration error, conformal sets, strangers.

Hides the folds and the statistics. A temperature T divides the logits before softmax or sigmoid (Guo et al., ICML 2017); it is
fitted again for the INT8 engine, because rounding changes how sure a network sounds. Every figure is out of fold: patients are
split into folds, and nobody is judged by a temperature or a threshold that saw them. The temperature that ships is fitted on all.

    ECE    expected calibration error: 15 bins of equal mass by confidence, sum over bins of share x |accuracy - confidence|

With few samples ECE is above zero even for a perfect network, so it is held to the larger of a fixed limit and the 95th
percentile of what a perfectly calibrated network with the same confidences would show.

The same numbers are recorded for a reader, as the bins of a reliability diagram: of the answers that were about so sure, how many
were right. `appliance/reliability.py` reads the record back; docs/confidence.md says how it is to be read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from appliance.compiler.verdict import Verdict
from kernels.preprocess import normalise
from models import grader
from models.evaluate import Crop, Runner, auroc

SEED = 20261124
BINS = 15
DIAGRAM_BINS = 10  # of equal width, as a reader thinks of them: 70 to 80 % sure
DIGITS = 4  # of a recorded share
Z95 = 1.959964
FOLDS = 5
RESAMPLES = 500
ECE_LIMIT = 0.05
ECE_RISE = 0.02
ALPHA = 0.10  # conformal sets miss the truth this often at most
COVERAGE = (0.88, 0.92)
OUTLIER_AUROC = 0.98
OUTLIER_FALL = 0.02
TEMPERATURES = (0.05, 20.0)
LEAST_PATIENTS = 10
Floats = NDArray[np.float64]
Kind = Literal["softmax", "sigmoid"]


@dataclass(frozen=True)
class Calibrated:
    """One head of one engine. `temperature` ships; `ece_before` is at temperature 1, `ece` out of fold after the re-fit with
    its 95 % interval over patients, both; `ece_chance` is the 95th percentile of a perfectly calibrated network; all in [0, 1]."""

    name: str
    temperature: float
    ece_before: float
    ece_before_low: float
    ece_before_high: float
    ece: float
    low: float
    high: float
    ece_chance: float
    samples: int
    patients: int

    @property
    def limit(self) -> float:
        return max(ECE_LIMIT, self.ece_chance)


@dataclass(frozen=True)
class Bin:
    """The answers that were about equally sure: how many, how sure on average, and the share that was right with its 95 %
    interval (Wilson, 1927), as if the answers were independent: those of one patient are not quite."""

    count: int
    confidence: float
    observed: float
    low: float
    high: float


@dataclass(frozen=True)
class Conformal:
    """Split conformal sets at 1 - ALPHA: share of truths inside with its 95 % interval over patients, mean number of classes.

    `threshold` is the one of all samples: a class belongs to the set where 1 - probability is at most that.
    """

    coverage: float
    low: float
    high: float
    mean_size: float
    threshold: float


# -- temperature ----------------------------------------------------------------------------------------------------


def probabilities(logits: Floats, temperature: float, kind: Kind) -> Floats:
    """N x K logits (softmax) or N logits (sigmoid) -> probabilities of the same shape."""
    z = logits / temperature
    if kind == "sigmoid":
        return np.asarray(0.5 * (1.0 + np.tanh(0.5 * z)))
    e = np.exp(z - z.max(axis=1, keepdims=True))
    return np.asarray(e / e.sum(axis=1, keepdims=True))


def negative_log_likelihood(logits: Floats, truth: NDArray[np.int64], temperature: float, kind: Kind) -> float:
    z = logits / temperature
    if kind == "sigmoid":
        return float(np.mean(np.logaddexp(0.0, z) - truth * z))
    return float(np.mean(np.logaddexp.reduce(z, axis=1) - z[np.arange(len(z)), truth]))


def fit_temperature(logits: Floats, truth: NDArray[np.int64], kind: Kind) -> float:
    """The temperature of the smallest negative log likelihood, within TEMPERATURES; convex in 1 / T, so there is one."""
    from scipy.optimize import minimize_scalar

    low, high = (1.0 / t for t in reversed(TEMPERATURES))
    found = minimize_scalar(
        lambda inverse: negative_log_likelihood(logits, truth, 1.0 / inverse, kind),
        bounds=(low, high),
        method="bounded",
        options={"xatol": 1e-6},
    )
    return float(1.0 / found.x)


def folds(groups: NDArray[np.int64], count: int = FOLDS) -> NDArray[np.int64]:
    """The fold of each sample; a patient is in one fold. Seeded."""
    patients = np.unique(groups)
    order = np.random.default_rng(SEED).permutation(len(patients))
    fold = np.empty(len(patients), np.int64)
    fold[order] = np.arange(len(patients)) % count
    return np.asarray(fold[np.searchsorted(patients, groups)])


# -- calibration error ----------------------------------------------------------------------------------------------


def confidence_of(p: Floats, truth: NDArray[np.int64], kind: Kind) -> tuple[Floats, Floats]:
    """(how sure, whether right): of the most probable class, or of "yes" for a sigmoid, where "right" is that it is so."""
    if kind == "sigmoid":
        return p, truth.astype(np.float64)
    return p.max(axis=1), (p.argmax(axis=1) == truth).astype(np.float64)


def expected_calibration_error(sure: Floats, right: Floats, bins: int = BINS) -> float:
    """Bins of equal mass by confidence, ties in given order; NaN for no sample. In [0, 1]."""
    if not len(sure):
        return float("nan")
    order = np.argsort(sure, kind="stable")
    count = min(bins, len(order))
    starts = np.arange(count) * len(order) // count
    # Share of a bin times the difference of its means is the difference of its sums.
    return float(np.abs(np.add.reduceat((sure - right)[order], starts)).sum() / len(order))


def reliability(sure: Floats, right: Floats, bins: int = DIAGRAM_BINS) -> tuple[Bin, ...]:
    """Bins of equal width over [0, 1], the least sure first; empty ones are left out. Rounded to DIGITS."""
    place = np.minimum((sure * bins).astype(np.int64), bins - 1)
    out = []
    for k in np.unique(place):
        inside = place == k
        n, share = int(inside.sum()), float(right[inside].mean())
        middle, half = share + Z95**2 / (2 * n), Z95 * float(np.sqrt(share * (1 - share) / n + Z95**2 / (4 * n * n)))
        low, high = ((middle + sign * half) / (1 + Z95**2 / n) for sign in (-1, 1))
        # At a share of 0 or 1 the end of the interval is that share, but for rounding.
        figures = (float(sure[inside].mean()), share, min(max(low, 0.0), share), max(min(high, 1.0), share))
        out.append(Bin(n, *(round(x, DIGITS) for x in figures)))
    return tuple(out)


def chance_error(sure: Floats, percentile: float = 95.0, runs: int = RESAMPLES) -> float:
    """What `expected_calibration_error` reaches by chance: outcomes drawn from the confidences themselves."""
    rng = np.random.default_rng(SEED)
    return float(
        np.percentile(
            [expected_calibration_error(sure, (rng.random(len(sure)) < sure).astype(np.float64)) for _ in range(runs)], percentile
        )
    )


def _interval(groups: NDArray[np.int64], over: Any) -> tuple[float, float]:
    """95 % interval over patients drawn with replacement."""
    low, high = np.percentile(_resampled(groups, over), [2.5, 97.5])
    return float(low), float(high)


def _resampled(groups: NDArray[np.int64], over: Any) -> list[float]:
    members = [np.flatnonzero(groups == g) for g in np.unique(groups)]
    rng = np.random.default_rng(SEED)
    return [over(np.concatenate([members[i] for i in rng.integers(len(members), size=len(members))])) for _ in range(RESAMPLES)]


def _centred(value: float, groups: NDArray[np.int64], over: Any) -> tuple[float, float]:
    """As `_interval`, moved so that its resamples lie around `value`, and not below 0.

    An error that cannot be negative grows when patients are drawn twice, so a plain percentile interval may lie above the error itself.
    """
    values = _resampled(groups, over)
    low, high = np.percentile(values, [2.5, 97.5]) - (np.mean(values) - value)
    return max(0.0, float(min(low, value))), float(max(high, value))


def out_of_fold(logits: Floats, truth: NDArray[np.int64], groups: NDArray[np.int64], kind: Kind) -> Floats:
    """Probabilities of every sample by the temperature of the other folds' patients."""
    fold = folds(groups)
    out = np.empty_like(logits)
    for k in np.unique(fold):
        held = fold == k
        out[held] = probabilities(logits[held], fit_temperature(logits[~held], truth[~held], kind), kind)
    return out


def calibrate(name: str, logits: Floats, truth: NDArray[np.int64], groups: NDArray[np.int64], kind: Kind) -> Calibrated:
    """Temperature and calibration error of one head. ValueError for fewer than LEAST_PATIENTS patients."""
    patients = len(np.unique(groups))
    if patients < LEAST_PATIENTS:
        raise ValueError(f"{patients} patients are too few for folds, {LEAST_PATIENTS} are needed")
    plain, right = confidence_of(probabilities(logits, 1.0, kind), truth, kind)
    sure, right_after = confidence_of(out_of_fold(logits, truth, groups, kind), truth, kind)
    before, after = expected_calibration_error(plain, right), expected_calibration_error(sure, right_after)
    before_low, before_high = _centred(before, groups, lambda i: expected_calibration_error(plain[i], right[i]))
    low, high = _centred(after, groups, lambda i: expected_calibration_error(sure[i], right_after[i]))
    return Calibrated(
        name,
        round(fit_temperature(logits, truth, kind), 4),
        before,
        before_low,
        before_high,
        after,
        low,
        high,
        chance_error(sure),
        len(truth),
        patients,
    )


def diagram(logits: Floats, truth: NDArray[np.int64], groups: NDArray[np.int64], kind: Kind) -> dict[str, list[dict[str, Any]]]:
    """The bins of one head's reliability diagram as JSON: `before` at temperature 1, `after` out of fold."""
    both = {"before": probabilities(logits, 1.0, kind), "after": out_of_fold(logits, truth, groups, kind)}
    return {when: [asdict(b) for b in reliability(*confidence_of(p, truth, kind))] for when, p in both.items()}


# -- sets and strangers ---------------------------------------------------------------------------------------------


def conformal_threshold(scores: Floats, alpha: float = ALPHA) -> float:
    """The ceil((n + 1)(1 - alpha))-th smallest non-conformity score (Vovk et al., 2005); infinite where n is too small.

    A new sample, exchangeable with these, scores at most this with probability 1 - alpha or more.
    """
    rank = int(np.ceil((len(scores) + 1) * (1.0 - alpha)))
    return float("inf") if rank > len(scores) else float(np.sort(scores)[rank - 1])


def conformal(p: Floats, truth: NDArray[np.int64], groups: NDArray[np.int64]) -> Conformal:
    """Sets of classes from out-of-fold probabilities; each fold's threshold comes from the other folds' patients."""
    score = 1.0 - p
    own = score[np.arange(len(p)), truth]
    fold = folds(groups)
    inside = np.empty(len(p), bool)
    size = np.empty(len(p))
    for k in np.unique(fold):
        held = fold == k
        threshold = conformal_threshold(own[~held])
        inside[held] = own[held] <= threshold
        size[held] = (score[held] <= threshold).sum(axis=1)
    return _covered(inside, size, groups, conformal_threshold(own))


def conformal_by(threshold: float, p: Floats, truth: NDArray[np.int64], groups: NDArray[np.int64]) -> Conformal:
    """Sets by a threshold that comes from other patients than these."""
    sets = 1.0 - p <= threshold
    return _covered(sets[np.arange(len(p)), truth], sets.sum(axis=1).astype(np.float64), groups, threshold)


def _covered(inside: NDArray[np.bool_], size: Floats, groups: NDArray[np.int64], threshold: float) -> Conformal:
    low, high = _interval(groups, lambda i: float(inside[i].mean()))
    return Conformal(float(inside.mean()), low, high, float(size.mean()), threshold)


def strangeness(logits: Floats, temperature: float) -> Floats:
    """Negative free energy turned round: -T log sum exp(logits / T), larger for strangers (Liu et al., NeurIPS 2020)."""
    return np.asarray(-temperature * np.logaddexp.reduce(logits / temperature, axis=1))


# -- the gate -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Head:
    """Logits of one head on the same samples by both engines: N x K for softmax, N for sigmoid. `truth` is the class or 0 / 1."""

    name: str
    kind: Kind
    fp32: Floats
    int8: Floats
    truth: NDArray[np.int64]


@dataclass(frozen=True)
class Judged:
    """Heads on the answers of some patients; `groups` is the patient of each answer."""

    heads: Sequence[Head]
    groups: NDArray[np.int64]


def confidence_gate(
    heads: Sequence[Head],
    groups: NDArray[np.int64],
    outliers: tuple[Floats, Floats] | None = None,
    *,
    samples: str = "samples",
    validation: Judged | None = None,
) -> Verdict:
    """Refuses an engine whose confidence became worse than FP32's and is not good enough.

    A head fails where its out-of-fold ECE exceeds max(ECE_LIMIT, chance) and is more than ECE_RISE above FP32's: what FP32 itself
    lacks is the network's fault, said in the note, and no reason to refuse its engine. Conformal coverage fails where its
    95 % interval misses COVERAGE altogether. `outliers` are first-head logits (FP32, INT8) of images that are no
    spine: INT8's AUROC may not fall more than OUTLIER_FALL below FP32's; whether it reaches OUTLIER_AUROC is said. Temperatures stand in
    `details["temperatures"]`. No verdict for too few patients.

    For a reader, and judged by nobody: `samples` is what an answer is about, in the plural ("discs"); each head's row has the
    `bins` of the engine's reliability diagram; `validation` are answers about patients on whom a compile may tune, and
    `details["by_validation"]` says how temperature and sets that come from them do on the patients here.
    """
    patients = len(np.unique(groups))
    if not heads or patients < LEAST_PATIENTS:
        return Verdict(
            "confidence", None, f"{patients} patients are too few to fit a temperature, {LEAST_PATIENTS} are needed", limit=ECE_LIMIT
        )
    rows: list[dict[str, Any]] = []
    failed: list[str] = []
    weak: list[str] = []
    for head in heads:
        before = calibrate(head.name, head.fp32, head.truth, groups, head.kind)
        after = calibrate(head.name, head.int8, head.truth, groups, head.kind)
        bins = diagram(head.int8, head.truth, groups, head.kind)
        rows.append({"int8": asdict(after), "fp32": asdict(before), "limit": after.limit, "kind": head.kind, "bins": bins})
        if after.ece > after.limit:
            (failed if after.ece > before.ece + ECE_RISE else weak).append(f"{head.name} ECE {after.ece:.3f} > {after.limit:.3f}")
    main = heads[0]
    details: dict[str, Any] = {
        "samples": samples,
        "heads": rows,
        "temperatures": {h.name: r["int8"]["temperature"] for h, r in zip(heads, rows, strict=True)},
    }
    if main.kind == "softmax":
        sets = {
            who: conformal(out_of_fold(z, main.truth, groups, "softmax"), main.truth, groups)
            for who, z in (("fp32", main.fp32), ("int8", main.int8))
        }
        details["conformal"] = {k: _finite(asdict(v)) for k, v in sets.items()}
        if sets["int8"].high < COVERAGE[0] or sets["int8"].low > COVERAGE[1]:
            failed.append(f"conformal coverage {sets['int8'].coverage:.3f} [{sets['int8'].low:.3f}, {sets['int8'].high:.3f}]")
        if validation is not None and len(np.unique(validation.groups)) >= LEAST_PATIENTS:
            details["by_validation"] = _by_validation(validation, main, groups)
    details["outliers"] = _outliers(main, outliers, rows[0], failed, weak)
    first = rows[0]["int8"]
    note = f"{main.name}: T {first['temperature']:.2f}, ECE {first['ece_before']:.3f} -> {first['ece']:.3f}"
    if failed:
        note = f"{'; '.join(failed)}"
    elif weak:
        note += f"; FP32 is no better: {'; '.join(weak)}"
    return Verdict("confidence", not failed, note, first["ece"], first["low"], first["high"], rows[0]["limit"], details)


def _by_validation(validation: Judged, main: Head, groups: NDArray[np.int64]) -> dict[str, Any]:
    """Temperature and sets of the engine's first head by validation patients: out of fold among them, and on the patients here."""
    known = validation.heads[0]
    temperature = fit_temperature(known.int8, known.truth, "softmax")
    p = probabilities(known.int8, temperature, "softmax")
    threshold = conformal_threshold(1.0 - p[np.arange(len(p)), known.truth])
    own = conformal(out_of_fold(known.int8, known.truth, validation.groups, "softmax"), known.truth, validation.groups)
    here = conformal_by(threshold, probabilities(main.int8, temperature, "softmax"), main.truth, groups)
    return {
        "samples": len(known.truth),
        "patients": len(np.unique(validation.groups)),
        "temperature": round(temperature, 4),
        "among_them": _finite(asdict(own)),
        "on_held_out": _finite(asdict(here)),
    }


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    return {k: None if isinstance(v, float) and not np.isfinite(v) else v for k, v in values.items()}


def _outliers(
    main: Head, outliers: tuple[Floats, Floats] | None, row: dict[str, Any], failed: list[str], weak: list[str]
) -> dict[str, Any]:
    if main.kind != "softmax":
        return {"passed": None, "reason": "the first head has no classes that exclude each other"}
    if outliers is None or not len(outliers[0]):
        return {"passed": None, "reason": "no images of other things were given"}
    found = {}
    for who, inside, outside in (("fp32", main.fp32, outliers[0]), ("int8", main.int8, outliers[1])):
        t = row[who]["temperature"]
        values = np.concatenate([strangeness(outside, t), strangeness(inside, t)])
        found[who] = auroc(values, np.arange(len(values)) < len(outside))
    fall = found["fp32"] - found["int8"]
    if fall > OUTLIER_FALL:
        failed.append(f"out-of-distribution AUROC fell from {found['fp32']:.3f} to {found['int8']:.3f}")
    elif found["int8"] < OUTLIER_AUROC:
        weak.append(f"out-of-distribution AUROC {found['int8']:.3f} < {OUTLIER_AUROC}")
    return {"passed": fall <= OUTLIER_FALL, "images": len(outliers[0]), "reached": found["int8"] >= OUTLIER_AUROC, **found}


def grader_heads(fp32: Runner, int8: Runner, crops: Sequence[Crop]) -> tuple[list[Head], NDArray[np.int64]]:
    """The grader's heads on graded discs: five grades, and each flag by itself; and the patient of each disc."""
    inputs = [grader.crop(normalise(c.pixels), c.box)[None] for c in crops]
    a, b = (np.concatenate([run({"image": x})["logits"] for x in inputs]).astype(np.float64) for run in (fp32, int8))
    grades = np.array([c.grading.pfirrmann - 1 for c in crops], np.int64)
    heads = [Head("pfirrmann", "softmax", a[:, :5], b[:, :5], grades)]
    for k, name in enumerate(grader.FLAGS):
        truth = np.array([int(getattr(c.grading, name)) for c in crops], np.int64)
        if 0 < truth.sum() < len(truth):  # a flag that nobody has cannot be calibrated
            heads.append(Head(name, "sigmoid", a[:, 5 + k], b[:, 5 + k], truth))
    return heads, np.array([c.patient for c in crops], np.int64)
