"""How good a network is on patients that training never saw: the same measure for torch, FP32 and INT8 engines.

A runner is any function from named inputs to named outputs. Samples come from the held-out patients of the real images, or
from phantoms of fixed seeds where no real image is at hand (the card then says so). Intervals resample whole patients,
because slices and discs of one patient are not independent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kernels import mask as km
from kernels.nms import iou_matrix
from kernels.preprocess import letterbox, normalise
from models import data, detector, grader, phantom, segmenter

Runner = Callable[[dict[str, NDArray[np.float32]]], dict[str, NDArray[np.float32]]]
Progress = Callable[[int, int], None]
PHANTOMS = 24
PHANTOM_SEED = 9_000_000  # far from any training seed
RESAMPLES = 1000
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Slice:
    """One evaluation image: pixels as read, its truth where it is known (None where it is not)."""

    name: str
    patient: int
    pixels: NDArray[np.float32]
    mask: NDArray[np.uint8] | None = None
    discs: NDArray[np.float32] | None = None
    vertebrae: NDArray[np.float32] | None = None


@dataclass(frozen=True)
class Crop:
    """One graded disc: the image it lies in, its box, the radiologist's grading, its number from L5/S1 (1) upwards (0: unknown)."""

    patient: int
    pixels: NDArray[np.float32]
    box: Box
    grading: data.Grading
    number: int = 0


@dataclass(frozen=True)
class Metric:
    """A value with its 95 % interval over resampled patients; higher is better."""

    name: str
    value: float
    low: float
    high: float
    images: int
    patients: int


@dataclass(frozen=True)
class Measure:
    """What a metric is computed from, kept so that two engines can be compared on the same resampled patients.

    `groups` is the patient of each sample; `over` takes indices of samples and gives the metric on them.
    """

    groups: NDArray[np.int64]
    over: Callable[[NDArray[np.int64]], float]


@dataclass
class Scores:
    """All metrics of one engine on one set of samples; `main` names the one that gates. Higher is better for every one."""

    main: str
    metrics: list[Metric] = field(default_factory=list)
    source: str = ""
    measures: dict[str, Measure] = field(default_factory=dict, repr=False)

    def __getitem__(self, name: str) -> Metric:
        return next(m for m in self.metrics if m.name == name)

    def add(self, name: str, groups: Sequence[int], over: Callable[[NDArray[np.int64]], float]) -> None:
        """One more metric with its interval; `over` takes indices of samples, `groups` is the patient of each."""
        measure = Measure(np.asarray(groups, np.int64), over)
        values = _resampled(measure.groups, over)
        low, high = (float(v) for v in np.nanpercentile(values, [2.5, 97.5]))
        everything = np.arange(len(measure.groups))
        patients = len(np.unique(measure.groups))
        self.metrics.append(Metric(name, float(over(everything)), low, high, len(everything), patients))
        self.measures[name] = measure


def paired_drop(reference: Scores, other: Scores, name: str | None = None) -> Metric:
    """How much `other` lost against `reference` (positive: worse), on the same samples, with the interval of the difference.

    Both are measured on the same resampled patients (cluster bootstrap), so what they share cancels out. Raises ValueError
    where the two are not of the same samples.
    """
    name = name or reference.main
    a, b = reference.measures[name], other.measures[name]
    if not np.array_equal(a.groups, b.groups):
        raise ValueError(f"{name}: the two scores are not of the same samples")
    values = _resampled(a.groups, lambda i: a.over(i) - b.over(i))
    low, high = (float(v) for v in np.nanpercentile(values, [2.5, 97.5]))
    return Metric(name, reference[name].value - other[name].value, low, high, len(a.groups), len(np.unique(a.groups)))


# -- samples --------------------------------------------------------------------------------------------------------


def _phantoms() -> Iterator[tuple[int, NDArray[np.float32], phantom.Truth]]:
    for i in range(PHANTOMS):
        image, truth = phantom.draw(np.random.default_rng(PHANTOM_SEED + i), weighting="T2")
        yield i, image, truth


def slices(root: Path | None, patients: frozenset[int] | None = None) -> list[Slice]:
    """Slices of `patients` (the held-out ones where None): T2-SPACE with masks, mid-sagittal with every drawn disc box; or
    phantoms for `root` None."""
    patients = data.split()["test"] if patients is None else patients
    if root is None:
        return [
            Slice(f"phantom-{i}", i, image, t.mask, _array(d.box_px for d in t.discs), _array(v.box_px for v in t.vertebrae))
            for i, image, t in _phantoms()
        ]
    out = []
    for path in sorted((root / "lumbar_mri/t2space/images").glob("*.png")):
        if data.patient_of(path) in patients:
            mask = data.read_mask(root / "lumbar_mri/t2space/masks" / path.name)
            found = _array(c.box for c in km.discs(mask)), _array(c.box for c in km.bodies(mask))
            out.append(Slice(path.name, data.patient_of(path), data.read_grey(path).astype(np.float32), mask, *found))
    graded = data.gradings(root)
    for name, boxes in sorted(data.disc_boxes(root).items()):
        patient = int(name.split("_")[0])
        # Where boxes are missing, a right detection would count as a wrong one.
        if patient in patients and len(boxes) == len(graded.get(patient, {})):
            pixels = data.read_grey(root / "lumbar_mri/midsagittal" / name).astype(np.float32)
            out.append(Slice(name, patient, pixels, discs=boxes))
    return out


def _array(boxes: Iterator[Box]) -> NDArray[np.float32]:
    return np.array(list(boxes), np.float32).reshape(-1, 4)


def crops(root: Path | None, detect: Runner | None = None, patients: frozenset[int] | None = None) -> list[Crop]:
    """Graded T2 discs of `patients` (the held-out ones where None). Boxes are the drawn ones, else those that `detect` finds
    where they are as many as graded."""
    patients = data.split()["test"] if patients is None else patients
    if root is None:
        return [
            Crop(i, im, d.box_px, data.Grading(d.pfirrmann, d.herniation, d.narrowing, d.bulging))
            for i, im, t in _phantoms()
            for d in t.discs
        ]
    out = []
    for path in sorted((root / "lumbar_mri/midsagittal").glob("*_t2.png")):
        patient = data.patient_of(path)
        table = data.gradings(root).get(patient, {})
        if patient not in patients or not table:
            continue
        pixels = data.read_grey(path).astype(np.float32)
        drawn = data.disc_boxes(root).get(path.name)
        boxes: list[Box] = []
        if drawn is not None and len(drawn) == len(table):
            boxes = [(float(b[0]), float(b[1]), float(b[2]), float(b[3])) for b in drawn[::-1]]
        elif detect is not None:
            boxes = find_discs(detect, pixels)
        if len(boxes) == len(table):
            out += [Crop(patient, pixels, b, table[i + 1], i + 1) for i, b in enumerate(boxes) if i + 1 in table]
    return out


def find_discs(detect: Runner, pixels: NDArray[np.float32], score: float = 0.4) -> list[Box]:
    """Disc boxes in source pixels from the lowest upwards, by a detector's runner."""
    x, back = letterbox(normalise(pixels), detector.SPEC.input_hw)
    found = detector.decode(detect({"image": x}))
    keep = (found.classes == 1) & (found.scores >= score)
    boxes = back.boxes_to_source(found.boxes[keep])
    return sorted(((float(b[0]), float(b[1]), float(b[2]), float(b[3])) for b in boxes), key=lambda b: -(b[1] + b[3]))


# -- measures -------------------------------------------------------------------------------------------------------


def _resampled(groups: NDArray[np.int64], over: Callable[[NDArray[np.int64]], float], seed: int = 1) -> list[float]:
    """Cluster bootstrap: patients are drawn with replacement, RESAMPLES times; the same seed draws the same patients."""
    members = [np.flatnonzero(groups == p) for p in np.unique(groups)]
    rng = np.random.default_rng(seed)
    return [over(np.concatenate([members[i] for i in rng.integers(len(members), size=len(members))])) for _ in range(RESAMPLES)]


def dice(predicted: NDArray[np.uint8], truth: NDArray[np.uint8], index: int) -> float:
    """2 |A and B| / (|A| + |B|) of one class; NaN where neither has it."""
    a, b = predicted == index, truth == index
    total = int(a.sum()) + int(b.sum())
    return 2.0 * float((a & b).sum()) / total if total else float("nan")


def evaluate_segmenter(run: Runner, samples: Sequence[Slice], progress: Progress | None = None) -> Scores:
    with_mask = [s for s in samples if s.mask is not None]
    rows = []
    for i, s in enumerate(with_mask):
        x, back = letterbox(normalise(s.pixels), segmenter.SPEC.input_hw)
        mask, _ = segmenter.decode(run({"image": x})["logits"], back)
        assert s.mask is not None  # noqa: S101 - filtered above; for the type checker
        rows.append([dice(mask, s.mask, k) for k in (1, 2, 3)])
        if progress:
            progress(i + 1, len(with_mask))
    table = np.array(rows)
    groups = [s.patient for s in with_mask]
    out = Scores("dice_mean")
    out.add("dice_mean", groups, lambda i: float(np.nanmean(table[i])))
    for k, name in enumerate(segmenter.SPEC.classes[1:]):
        out.add(f"dice_{name}", groups, lambda i, k=k: float(np.nanmean(table[i, k])))  # type: ignore[misc]
    return out


def average_precision(matches: Sequence[tuple[NDArray[np.float32], NDArray[np.bool_], int]]) -> float:
    """Area under the interpolated precision-recall curve (all points), as in PASCAL VOC 2010 and later.

    One tuple for each image: scores, whether each detection matched a truth box of its own, number of truth boxes.
    """
    truths = sum(m[2] for m in matches)
    if not truths:
        return float("nan")
    scores = np.concatenate([m[0] for m in matches])
    hits = np.concatenate([m[1] for m in matches])[np.argsort(-scores, kind="stable")]
    tp = np.cumsum(hits)
    recall = tp / truths
    precision = tp / np.arange(1, len(hits) + 1)
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    return float(np.sum(np.diff(np.concatenate([[0.0], recall])) * precision))


def match(
    boxes: NDArray[np.float32], scores: NDArray[np.float32], truth: NDArray[np.float32], limit: float = 0.5
) -> tuple[NDArray[np.float32], NDArray[np.bool_], int]:
    """Greedy by score: a detection is a hit if its best free truth box overlaps by IoU >= `limit`."""
    order = np.argsort(-scores, kind="stable")
    overlaps = iou_matrix(boxes[order], truth)
    free = np.ones(len(truth), bool)
    hits = np.zeros(len(order), bool)
    for i in range(len(order)):
        candidates = np.where(free, overlaps[i], -1.0) if len(truth) else np.zeros(0)
        if candidates.size and candidates.max() >= limit:
            hits[i] = True
            free[int(candidates.argmax())] = False
    return scores[order], hits, len(truth)


def evaluate_detector(
    run: Runner,
    samples: Sequence[Slice],
    progress: Progress | None = None,
    decode: Callable[..., detector.Detections] = detector.decode,
) -> Scores:
    """`decode` is for a detector whose head is not the shipped one's."""
    discs, vertebrae, disc_groups, vertebra_groups = [], [], [], []
    for i, s in enumerate(samples):
        x, back = letterbox(normalise(s.pixels), detector.SPEC.input_hw)
        found = decode(run({"image": x}), score_limit=0.01)
        boxes = back.boxes_to_source(found.boxes)
        if s.discs is not None:
            own = found.classes == 1
            discs.append(match(boxes[own], found.scores[own], s.discs))
            disc_groups.append(s.patient)
        if s.vertebrae is not None:
            own = found.classes == 0
            vertebrae.append(match(boxes[own], found.scores[own], s.vertebrae))
            vertebra_groups.append(s.patient)
        if progress:
            progress(i + 1, len(samples))
    out = Scores("map50_disc")
    out.add("map50_disc", disc_groups, lambda i: average_precision([discs[j] for j in i]))
    out.add("map50_vertebra", vertebra_groups, lambda i: average_precision([vertebrae[j] for j in i]))
    drawn = [j for j, s in enumerate(s for s in samples if s.discs is not None) if s.mask is None]
    if drawn:
        groups = [disc_groups[j] for j in drawn]
        out.add("map50_disc_midsagittal", groups, lambda i: average_precision([discs[drawn[j]] for j in i]))
    return out


def quadratic_kappa(predicted: NDArray[np.int64], truth: NDArray[np.int64], grades: int = 5) -> float:
    """Cohen's kappa with quadratic weights; grades are 1..`grades`."""
    observed = np.zeros((grades, grades))
    np.add.at(observed, (truth - 1, predicted - 1), 1.0)
    observed /= max(observed.sum(), 1.0)
    expected = np.outer(observed.sum(1), observed.sum(0))
    weights = (np.arange(grades)[:, None] - np.arange(grades)[None]) ** 2
    chance = float((weights * expected).sum())
    return 1.0 - float((weights * observed).sum()) / chance if chance else float("nan")


def auroc(scores: NDArray[np.float64], truth: NDArray[np.bool_]) -> float:
    """Area under the ROC curve by ranks, ties shared; NaN where one class is missing."""
    positive, negative = scores[truth], scores[~truth]
    if not positive.size or not negative.size:
        return float("nan")
    wins = (positive[:, None] > negative[None]).sum() + 0.5 * (positive[:, None] == negative[None]).sum()
    return float(wins / (positive.size * negative.size))


def grade(run: Runner, samples: Sequence[Crop], progress: Progress | None = None) -> list[grader.Grade]:
    """The grader's answer to each crop, as the device asks it."""
    out = []
    for i, c in enumerate(samples):
        out += grader.decode(run({"image": grader.crop(normalise(c.pixels), c.box)[None]})["logits"])
        if progress:
            progress(i + 1, len(samples))
    return out


def confusion(grades: Sequence[grader.Grade], samples: Sequence[Crop]) -> NDArray[np.int64]:
    """Levels x 5 x 5 counts: disc number (row 0 of the first axis: L5/S1), true grade, answered grade. Unknown levels are left out."""
    known = [(c.number - 1, c.grading.pfirrmann - 1, g.grade - 1) for g, c in zip(grades, samples, strict=True) if c.number > 0]
    out = np.zeros((max((k[0] for k in known), default=-1) + 1, 5, 5), np.int64)
    for place in known:
        out[place] += 1
    return out


def evaluate_grader(run: Runner, samples: Sequence[Crop], progress: Progress | None = None) -> Scores:
    grades = grade(run, samples, progress)
    flags = [[g.flags[f] for f in grader.FLAGS] for g in grades]
    p = np.array([g.grade for g in grades])
    t = np.array([c.grading.pfirrmann for c in samples])
    groups = [c.patient for c in samples]
    out = Scores("pfirrmann_exact")
    out.add("pfirrmann_exact", groups, lambda i: float((p[i] == t[i]).mean()))
    out.add("pfirrmann_within_1", groups, lambda i: float((np.abs(p[i] - t[i]) <= 1).mean()))
    out.add("pfirrmann_kappa", groups, lambda i: quadratic_kappa(p[i], t[i]))
    scores = np.array(flags)
    for k, name in enumerate(grader.FLAGS):
        truth = np.array([bool(getattr(c.grading, name)) for c in samples])
        out.add(f"auroc_{name}", groups, lambda i, k=k, truth=truth: auroc(scores[i, k], truth[i]))  # type: ignore[misc]
    return out


Samples = Sequence[Slice] | Sequence[Crop]


def samples(family: str, root: Path | None, detect: Runner | None = None, patients: frozenset[int] | None = None) -> Samples:
    """What a family is measured on; read once, measured with as many engines as there are."""
    return crops(root, detect, patients) if family == "grader" else slices(root, patients)


def evaluate(
    family: str,
    run: Runner,
    root: Path | None,
    detect: Runner | None = None,
    progress: Progress | None = None,
    given: Samples | None = None,
) -> Scores:
    """The Scores of one family on held-out patients (or phantoms, `root` None); `given` are its `samples`, where read already."""
    measures = {"segmenter": evaluate_segmenter, "detector": evaluate_detector, "grader": evaluate_grader}
    if family not in measures:
        raise ValueError(f"no measure for family {family}")
    out: Scores = measures[family](run, samples(family, root, detect) if given is None else given, progress)  # type: ignore[operator]
    out.source = "phantoms" if root is None else "held-out patients"
    return out
