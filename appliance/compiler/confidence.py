"""Is the network's confidence worth its name after INT8: temperature, calibration error, conformal sets, strangers.

Hides the folds and the statistics. A temperature T divides the logits before softmax or sigmoid (Guo et al., ICML 2017). Nobody is
judged by a temperature or a threshold that saw them, and there are two ways to that:

    training    with a `Fitting`: temperatures and threshold come from training patients, as networks answered that had not learnt
                from them (`models/known.py`). The patients here only judge. Those networks answered in FP32; the same
                temperature serves the INT8 engine, so what rounding did to its confidence is seen, not mended
    judged      without one, as for a stranger's model that comes with nothing but images to judge it on: the patients here are
                split into folds, each is judged by what the others gave, and what ships is fitted on all, anew for each engine

    ECE    expected calibration error: 15 bins of equal mass by confidence, sum over bins of share x |accuracy - confidence|

With few samples ECE is above zero even for a perfect network, so it is held to the larger of a fixed limit and the 95th
percentile of what a perfectly calibrated network with the same confidences would show.

The same numbers are recorded for a reader, as the bins of a reliability diagram: of the answers that were about so sure, how many
were right. `appliance/reliability.py` reads the record back; docs/confidence.md says how it is to be read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from appliance.compiler.verdict import Verdict
from appliance.errors import CalibrationLeaks
from kernels.fusion import Fusion
from models import grader
from models.evaluate import Crop, Runner, auroc, folds, grade_logits, resampled
from models.known import Known

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
GRADE = "pfirrmann"  # the head that the grader's first five logits are, as temperatures are called in a manifest
Floats = NDArray[np.float64]
Kind = Literal["softmax", "sigmoid"]
Answers = tuple[Floats, NDArray[np.int64]]  # logits of one head, N x K for softmax and N for sigmoid; and the truths, class or 0 / 1


@dataclass(frozen=True)
class Fitting:
    """Answers about other patients than those judged, by networks that had not learnt from them: what temperatures and the threshold
    are fitted on. `heads` by name, `groups` the patient of each answer, `source` how it was come by, `sha256` of the file."""

    heads: Mapping[str, Answers]
    groups: NDArray[np.int64]
    source: str
    sha256: str


@dataclass(frozen=True)
class Calibrated:
    """One head of one engine. `temperature` ships; `ece_before` is at temperature 1, `ece` at a temperature that did not see the
    patient, both with their 95 % intervals over patients; `ece_chance` is the 95th percentile of a perfectly calibrated network; all in
    [0, 1]."""

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

    `threshold` is the one that ships: a class belongs to the set where 1 - probability is at most that.
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


# -- calibration error ----------------------------------------------------------------------------------------------


def confidence_of(p: Floats, truth: NDArray[np.int64], kind: Kind) -> tuple[Floats, Floats]:
    """(how sure, whether right): of the most probable class, or of "yes" for a sigmoid, where "right" is that it is so."""
    if kind == "sigmoid":
        return p, truth.astype(np.float64)
    return p.max(axis=1), (p.argmax(axis=1) == truth).astype(np.float64)


def expected_calibration_error(sure: Floats, right: Floats, bins: int = BINS, by: Floats | None = None) -> float:
    """Bins of equal mass by confidence, or by `by`; ties in given order; NaN for no sample. In [0, 1]."""
    if not len(sure):
        return float("nan")
    order = np.argsort(sure if by is None else by, kind="stable")
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
    low, high = np.percentile(resampled(groups, over, SEED, RESAMPLES), [2.5, 97.5])
    return float(low), float(high)


def _centred(value: float, groups: NDArray[np.int64], over: Any) -> tuple[float, float]:
    """As `_interval`, moved so that its resamples lie around `value`, and not below 0.

    An error that cannot be negative grows when patients are drawn twice, so a plain percentile interval may lie above the error itself.
    """
    values = resampled(groups, over, SEED, RESAMPLES)
    low, high = np.percentile(values, [2.5, 97.5]) - (np.mean(values) - value)
    return max(0.0, float(min(low, value))), float(max(high, value))


def out_of_fold(logits: Floats, truth: NDArray[np.int64], groups: NDArray[np.int64], kind: Kind) -> Floats:
    """Probabilities of every sample by the temperature of the other folds' patients."""
    fold = folds(groups, SEED, FOLDS)
    out = np.empty_like(logits)
    for k in np.unique(fold):
        held = fold == k
        out[held] = probabilities(logits[held], fit_temperature(logits[~held], truth[~held], kind), kind)
    return out


def unseen(logits: Floats, truth: NDArray[np.int64], groups: NDArray[np.int64], kind: Kind, fitted: Answers | None) -> tuple[float, Floats]:
    """(the temperature that ships, probabilities of every sample by a temperature that did not see its patient): that of `fitted`,
    or, without it, the one of all samples here and those of the other folds."""
    if fitted is None:
        return fit_temperature(logits, truth, kind), out_of_fold(logits, truth, groups, kind)
    temperature = fit_temperature(*fitted, kind)
    return temperature, probabilities(logits, temperature, kind)


def calibrate(
    name: str, logits: Floats, truth: NDArray[np.int64], groups: NDArray[np.int64], kind: Kind, fitted: Answers | None = None
) -> Calibrated:
    """Temperature and calibration error of one head. ValueError for fewer than LEAST_PATIENTS patients."""
    patients = len(np.unique(groups))
    if patients < LEAST_PATIENTS:
        raise ValueError(f"{patients} patients are too few to judge, {LEAST_PATIENTS} are needed")
    temperature, p = unseen(logits, truth, groups, kind, fitted)
    plain, right = confidence_of(probabilities(logits, 1.0, kind), truth, kind)
    sure, right_after = confidence_of(p, truth, kind)
    before, after = expected_calibration_error(plain, right), expected_calibration_error(sure, right_after)
    before_low, before_high = _centred(before, groups, lambda i: expected_calibration_error(plain[i], right[i]))
    low, high = _centred(after, groups, lambda i: expected_calibration_error(sure[i], right_after[i]))
    return Calibrated(
        name, round(temperature, 4), before, before_low, before_high, after, low, high, chance_error(sure), len(truth), patients
    )


def diagram(
    logits: Floats, truth: NDArray[np.int64], groups: NDArray[np.int64], kind: Kind, fitted: Answers | None = None
) -> dict[str, list[dict[str, Any]]]:
    """The bins of one head's reliability diagram as JSON: `before` at temperature 1, `after` at one that did not see the patient."""
    both = {"before": probabilities(logits, 1.0, kind), "after": unseen(logits, truth, groups, kind, fitted)[1]}
    return {when: [asdict(b) for b in reliability(*confidence_of(p, truth, kind))] for when, p in both.items()}


def rise(head: Head, groups: NDArray[np.int64], fitted: Answers) -> tuple[float, float, float]:
    """How much the calibration error of the INT8 engine lies above that of FP32 at the same temperature, with its 95 % interval.

    Both are of the same resampled patients and over the same bins, by the mean of the two confidences, so that what the two share, the
    luck of who was judged and of who stands beside whom, cancels out: in bins of its own a copy of an engine that differs by a
    twentieth of a logit is off by up to two points more or less.
    """
    (plain, plainly), (sure, rightly) = (
        confidence_of(unseen(z, head.truth, groups, head.kind, fitted)[1], head.truth, head.kind) for z in (head.fp32, head.int8)
    )

    def over(i: NDArray[np.int64]) -> float:
        both = plain[i] + sure[i]
        return expected_calibration_error(sure[i], rightly[i], by=both) - expected_calibration_error(plain[i], plainly[i], by=both)

    return (over(np.arange(len(head.truth))), *_interval(groups, over))


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
    fold = folds(groups, SEED, FOLDS)
    inside = np.empty(len(p), bool)
    size = np.empty(len(p))
    for k in np.unique(fold):
        held = fold == k
        threshold = conformal_threshold(own[~held])
        inside[held] = own[held] <= threshold
        size[held] = (score[held] <= threshold).sum(axis=1)
    return _covered(inside, size, groups, conformal_threshold(own))


def threshold_of(fitted: Answers, groups: NDArray[np.int64]) -> float:
    """The threshold that the answers of `fitted` give, each at a temperature that did not see its patient."""
    logits, truth = fitted
    p = out_of_fold(logits, truth, groups, "softmax")
    return conformal_threshold(1.0 - p[np.arange(len(p)), truth])


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


def confidence_gate(
    heads: Sequence[Head],
    groups: NDArray[np.int64],
    outliers: tuple[Floats, Floats] | None = None,
    *,
    samples: str = "samples",
    fitting: Fitting | None = None,
) -> Verdict:
    """Refuses an engine whose confidence became worse than FP32's and is not good enough.

    A head fails where its ECE exceeds max(ECE_LIMIT, chance) and is more than ECE_RISE above FP32's: what FP32 itself lacks is the
    network's fault, said in the note, and no reason to refuse its engine. With a `fitting` both are at one temperature, so an engine that
    became louder or quieter is not mended by a temperature of its own; how much it is above FP32 is taken in the same bins (`rise`); and
    below that limit it fails too where that is more than ECE_RISE and its interval lies above nothing: worse by more than chance,
    however much chance hides of the error itself.

    Conformal coverage fails where its 95 % interval misses COVERAGE altogether. With a `fitting` it can miss it for FP32 too. Too little
    is a broken promise to the reader, whoever broke it, and is refused; too much is refused where FP32 keeps within it, else said.

    `outliers` are first-head logits (FP32, INT8) of images that are no spine: INT8's AUROC may not fall more than OUTLIER_FALL below
    FP32's; whether it reaches OUTLIER_AUROC is said. Temperatures stand in `details["temperatures"]`, where they come from in
    `details["fitted_on"]`. No verdict for too few patients. `samples` is what an answer is about, in the plural ("discs").

    Raises CalibrationLeaks where a judged patient is among those of `fitting`, ValueError where it lacks a head.
    """
    patients = len(np.unique(groups))
    if not heads or patients < LEAST_PATIENTS:
        return Verdict("confidence", None, f"{patients} patients are too few to judge, {LEAST_PATIENTS} are needed", limit=ECE_LIMIT)
    if fitting is not None:
        _require_apart(fitting, heads, groups)
    rows: list[dict[str, Any]] = []
    failed: list[str] = []
    weak: list[str] = []
    for head in heads:
        fitted = fitting.heads[head.name] if fitting is not None else None
        before = calibrate(head.name, head.fp32, head.truth, groups, head.kind, fitted)
        after = calibrate(head.name, head.int8, head.truth, groups, head.kind, fitted)
        bins = diagram(head.int8, head.truth, groups, head.kind, fitted)
        row: dict[str, Any] = {"int8": asdict(after), "fp32": asdict(before), "limit": after.limit, "kind": head.kind, "bins": bins}
        rows.append(row)
        more, beyond_chance = after.ece - before.ece, False
        if fitted is not None:
            more, low, high = rise(head, groups, fitted)
            beyond_chance = low > 0
            row["rise"] = {"value": more, "low": low, "high": high}
            # What these patients would have asked for: nothing uses it.
            both = {"fp32": head.fp32, "int8": head.int8}
            row["best_here"] = {who: round(fit_temperature(z, head.truth, head.kind), 4) for who, z in both.items()}
        if after.ece > after.limit:
            (failed if more > ECE_RISE else weak).append(f"{head.name} ECE {after.ece:.3f} > {after.limit:.3f}")
        elif more > ECE_RISE and beyond_chance:
            failed.append(f"{head.name} ECE {after.ece:.3f}, {more:.3f} above FP32's on the same answers")
    main = heads[0]
    details: dict[str, Any] = {
        "samples": samples,
        "heads": rows,
        "temperatures": {h.name: r["int8"]["temperature"] for h, r in zip(heads, rows, strict=True)},
        "fitted_on": _fitted_on(fitting, groups),
    }
    if main.kind == "softmax":
        sets = {who: _sets(z, main.truth, groups, main.name, fitting) for who, z in (("fp32", main.fp32), ("int8", main.int8))}
        details["conformal"] = {k: _finite(asdict(v)) for k, v in sets.items()}
        found, plain = sets["int8"], sets["fp32"]
        words = f"conformal coverage {found.coverage:.3f} [{found.low:.3f}, {found.high:.3f}]"
        if found.high < COVERAGE[0] or found.low > COVERAGE[1]:
            spared = fitting is not None and found.low > COVERAGE[1] and plain.low > COVERAGE[1]
            (weak if spared else failed).append(words)
    details["outliers"] = _outliers(main, outliers, rows[0], failed, weak)
    first = rows[0]["int8"]
    note = f"{main.name}: T {first['temperature']:.2f}, ECE {first['ece_before']:.3f} -> {first['ece']:.3f}"
    if failed:
        note = f"{'; '.join(failed)}"
    elif weak:
        note += f"; FP32 is no better: {'; '.join(weak)}"
    return Verdict("confidence", not failed, note, first["ece"], first["low"], first["high"], rows[0]["limit"], details)


def _require_apart(fitting: Fitting, heads: Sequence[Head], groups: NDArray[np.int64]) -> None:
    both = np.intersect1d(fitting.groups, groups)
    if both.size:
        remedy = "Make the file of known answers again from training patients alone: `python -m models.known`."
        raise CalibrationLeaks("patients are fitted on and judged", value=", ".join(map(str, both[:5])), remedy=remedy)
    missing = [h.name for h in heads if h.name not in fitting.heads]
    if missing:
        raise ValueError(f"there is nothing to fit {', '.join(missing)} on")


def _fitted_on(fitting: Fitting | None, groups: NDArray[np.int64]) -> dict[str, Any]:
    if fitting is None:
        return {"who": "judged", "samples": len(groups), "patients": len(np.unique(groups))}
    count = {"samples": len(fitting.groups), "patients": len(np.unique(fitting.groups))}
    return {"who": "training", **count, "source": fitting.source, "sha256": fitting.sha256}


def _sets(logits: Floats, truth: NDArray[np.int64], groups: NDArray[np.int64], name: str, fitting: Fitting | None) -> Conformal:
    if fitting is None:
        return conformal(out_of_fold(logits, truth, groups, "softmax"), truth, groups)
    fitted = fitting.heads[name]
    _, p = unseen(logits, truth, groups, "softmax", fitted)
    return conformal_by(threshold_of(fitted, fitting.groups), p, truth, groups)


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


def grader_heads(fp32: Runner, int8: Runner, crops: Sequence[Crop], fusion: Fusion | None = None) -> tuple[list[Head], NDArray[np.int64]]:
    """The grader's heads on graded discs, fused where a device fuses: five grades, and each flag by itself; and the patient of each."""
    a, b = (grade_logits(run, crops, fusion).astype(np.float64) for run in (fp32, int8))
    truth = np.array([[c.grading.pfirrmann, *(int(getattr(c.grading, name)) for name in grader.FLAGS)] for c in crops], np.int64)
    before, after = grader_answers(a, truth), grader_answers(b, truth)
    heads = [
        Head(name, "softmax" if name == GRADE else "sigmoid", z, after[name][0], t)
        for name, (z, t) in before.items()
        if name == GRADE or 0 < t.sum() < len(t)  # a flag that nobody has cannot be calibrated
    ]
    return heads, np.array([c.patient for c in crops], np.int64)


def grader_answers(logits: Floats, truth: NDArray[np.int64]) -> dict[str, Answers]:
    """The grader's N x 8 logits and N x 4 truths (grade 1 to 5, then each flag), by head."""
    flags = {name: (logits[:, 5 + k], truth[:, 1 + k]) for k, name in enumerate(grader.FLAGS)}
    return {GRADE: (logits[:, :5], truth[:, 0] - 1), **flags}


def grader_fitting(known: Known) -> Fitting:
    """What the grader's temperatures are fitted on."""
    return Fitting(grader_answers(known.logits.astype(np.float64), known.truth), known.patient, known.source, known.sha256)
