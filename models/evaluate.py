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

from kernels import appearance
from kernels import mask as km
from kernels.fusion import Fusion, rows
from kernels.nms import iou_matrix
from kernels.preprocess import letterbox, normalise
from models import data, detector, grader, phantom, segmenter

Runner = Callable[[dict[str, NDArray[np.float32]]], dict[str, NDArray[np.float32]]]
Progress = Callable[[int, int], None]
ALONE = "_network"  # ends the name of a metric of the network alone, where a fusion answers
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
    """One graded disc: the image it lies in, its box, the radiologist's grading, its number from L5/S1 (1) upwards (0: unknown).

    Discs with the same `column` are of one slice; there, `place` counts from below. `look` is what `kernels.appearance.describe`
    says of it, where it was measured.
    """

    patient: int
    pixels: NDArray[np.float32]
    box: Box
    grading: data.Grading
    number: int = 0
    column: str = ""
    place: int = 0
    look: NDArray[np.float64] | None = None


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
        values = resampled(measure.groups, over)
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
    values = resampled(a.groups, lambda i: a.over(i) - b.over(i))
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


def crops(
    root: Path | None, detect: Runner | None = None, patients: frozenset[int] | None = None, segment: Runner | None = None
) -> list[Crop]:
    """Graded T2 discs of `patients` (the held-out ones where None). Boxes are the drawn ones, else those that `detect` finds
    where they are as many as graded. With `segment`, every disc is measured too, for a grader with a fusion."""
    patients = data.split()["test"] if patients is None else patients
    out: list[Crop] = []
    if root is None:
        for i, image, t in _phantoms():
            gradings = [data.Grading(d.pfirrmann, d.herniation, d.narrowing, d.bulging) for d in t.discs]
            out += _column(i, f"phantom-{i}", image, [d.box_px for d in t.discs], gradings, [0] * len(gradings), segment)
        return out
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
            numbers = range(1, len(boxes) + 1)
            out += _column(patient, path.name, pixels, boxes, [table.get(k) for k in numbers], list(numbers), segment)
    return out


def _column(
    patient: int,
    name: str,
    pixels: NDArray[np.float32],
    boxes: Sequence[Box],
    gradings: Sequence[data.Grading | None],
    numbers: Sequence[int],
    segment: Runner | None,
) -> list[Crop]:
    """The graded discs of one slice, given from below."""
    seen: Sequence[NDArray[np.float64] | None] = [None] * len(boxes)
    if segment is not None:
        seen = list(looks(normalise(pixels), segment, boxes, range(len(boxes))))
    return [
        Crop(patient, pixels, box, grading, number, name, place, look)
        for place, (box, grading, number, look) in enumerate(zip(boxes, gradings, numbers, seen, strict=True))
        if grading is not None
    ]


def looks(normalised: NDArray[np.float32], segment: Runner, boxes: Sequence[Box], places: Sequence[int]) -> NDArray[np.float64]:
    """What is measured of the discs of one slice, N x len(appearance.NAMES), within the outlines that `segment` draws."""
    x, back = letterbox(normalised, segmenter.SPEC.input_hw)
    mask, _ = segmenter.decode(segment({"image": x})["logits"], back)
    return appearance.describe(appearance.Scene.of(normalised, mask), boxes, places)


def find_discs(detect: Runner, pixels: NDArray[np.float32], score: float = 0.4) -> list[Box]:
    """Disc boxes in source pixels from the lowest upwards, by a detector's runner."""
    x, back = letterbox(normalise(pixels), detector.SPEC.input_hw)
    found = detector.decode(detect({"image": x}))
    keep = (found.classes == 1) & (found.scores >= score)
    boxes = back.boxes_to_source(found.boxes[keep])
    return sorted(((float(b[0]), float(b[1]), float(b[2]), float(b[3])) for b in boxes), key=lambda b: -(b[1] + b[3]))


# -- measures -------------------------------------------------------------------------------------------------------


def resampled(groups: NDArray[np.int64], over: Callable[[NDArray[np.int64]], float], seed: int = 1, times: int = 0) -> list[float]:
    """Cluster bootstrap: patients are drawn with replacement, `times` times (0: RESAMPLES); the same seed draws the same patients."""
    members = [np.flatnonzero(groups == p) for p in np.unique(groups)]
    rng = np.random.default_rng(seed)
    return [over(np.concatenate([members[i] for i in rng.integers(len(members), size=len(members))])) for _ in range(times or RESAMPLES)]


def folds(groups: NDArray[np.int64], seed: int, count: int) -> NDArray[np.int64]:
    """The fold of each sample, 0 to `count` - 1; a patient is in one, and folds hold as many patients as can be."""
    patients = np.unique(groups)
    fold = np.empty(len(patients), np.int64)
    fold[np.random.default_rng(seed).permutation(len(patients))] = np.arange(len(patients)) % count
    return np.asarray(fold[np.searchsorted(patients, groups)])


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


def grade_logits(
    run: Runner, samples: Sequence[Crop], fusion: Fusion | None = None, progress: Progress | None = None
) -> NDArray[np.float32]:
    """N x 8: the grader's logits of each crop, fused where there is a fusion, as the device answers. Raises as `fuse`."""
    out = np.zeros((len(samples), len(grader.SPEC.classes)), np.float32)
    for i, c in enumerate(samples):
        out[i] = run({"image": grader.crop(normalise(c.pixels), c.box)[None]})["logits"][0]
        if progress:
            progress(i + 1, len(samples))
    return out if fusion is None else fuse(out, samples, fusion)


def fuse(logits: NDArray[np.float32], samples: Sequence[Crop], fusion: Fusion) -> NDArray[np.float32]:
    """N x 8 logits of the network -> fused ones, a column at a time. ValueError for discs that were not measured."""
    out = logits.copy()
    columns: dict[tuple[int, str], list[int]] = {}
    for i, c in enumerate(samples):
        columns.setdefault((c.patient, c.column), []).append(i)
    for members in columns.values():
        here = [samples[i] for i in members]
        seen = [c.look for c in here if c.look is not None]
        if len(seen) < len(members):
            raise ValueError("a fusion needs discs that were measured")
        x = rows(logits[members], np.stack(seen), [c.place for c in here], [c.number or None for c in here])
        out[members] = fusion.logits(logits[members], x)
    return out


def grade(run: Runner, samples: Sequence[Crop], progress: Progress | None = None, fusion: Fusion | None = None) -> list[grader.Grade]:
    """The grader's answer to each crop, as the device gives it."""
    return grader.decode(grade_logits(run, samples, fusion, progress))


def confusion(grades: Sequence[grader.Grade], samples: Sequence[Crop]) -> NDArray[np.int64]:
    """Levels x 5 x 5 counts: disc number (row 0 of the first axis: L5/S1), true grade, answered grade. Unknown levels are left out."""
    known = [(c.number, c.grading.pfirrmann, g.grade) for g, c in zip(grades, samples, strict=True) if c.number > 0]
    return confusion_of(*np.array(known, np.int64).reshape(-1, 3).T)


def confusion_of(numbers: NDArray[np.int64], truth: NDArray[np.int64], answers: NDArray[np.int64]) -> NDArray[np.int64]:
    """As `confusion`, from N disc numbers, true and answered grades."""
    out = np.zeros((int(numbers.max(initial=0)), 5, 5), np.int64)
    np.add.at(out, (numbers - 1, truth - 1, answers - 1), 1)
    return out


def evaluate_grader(run: Runner, samples: Sequence[Crop], progress: Progress | None = None, fusion: Fusion | None = None) -> Scores:
    """Metrics of what the device answers. With a fusion, those of the network alone stand behind them, their names end in ALONE."""
    truth = np.array([[c.grading.pfirrmann, *(int(getattr(c.grading, name)) for name in grader.FLAGS)] for c in samples], np.int64)
    groups = [c.patient for c in samples]
    logits = grade_logits(run, samples, None, progress)
    out = Scores("pfirrmann_exact")
    answers = {"": logits} if fusion is None else {"": fuse(logits, samples, fusion), ALONE: logits}
    for suffix, found in answers.items():
        for name, over in grade_measures(grader.decode(found), truth).items():
            out.add(f"{name}{suffix}", groups, over)
    return out


def grade_measures(grades: Sequence[grader.Grade], truth: NDArray[np.int64]) -> dict[str, Callable[[NDArray[np.int64]], float]]:
    """Each metric of N answers over indices of them; `truth` is N x 4 (grade, then each flag)."""
    p, t = np.array([g.grade for g in grades]), truth[:, 0]
    flags = np.array([[g.flags[f] for f in grader.FLAGS] for g in grades])
    out: dict[str, Callable[[NDArray[np.int64]], float]] = {
        "pfirrmann_exact": lambda i: float((p[i] == t[i]).mean()),
        "pfirrmann_within_1": lambda i: float((np.abs(p[i] - t[i]) <= 1).mean()),
        "pfirrmann_kappa": lambda i: quadratic_kappa(p[i], t[i]),
    }
    for k, name in enumerate(grader.FLAGS):
        out[f"auroc_{name}"] = lambda i, k=k: auroc(flags[i, k], truth[i, 1 + k] > 0)  # type: ignore[misc]
    return out


Samples = Sequence[Slice] | Sequence[Crop]


def samples(
    family: str, root: Path | None, detect: Runner | None = None, patients: frozenset[int] | None = None, segment: Runner | None = None
) -> Samples:
    """What a family is measured on; read once, measured with as many engines as there are."""
    return crops(root, detect, patients, segment) if family == "grader" else slices(root, patients)


def evaluate(
    family: str,
    run: Runner,
    root: Path | None,
    detect: Runner | None = None,
    progress: Progress | None = None,
    given: Samples | None = None,
    fusion: Fusion | None = None,
) -> Scores:
    """The Scores of one family on held-out patients (or phantoms, `root` None); `given` are its `samples`, where read already.

    `fusion` is the grader's, whose samples must have been measured.
    """
    measures = {"segmenter": evaluate_segmenter, "detector": evaluate_detector, "grader": evaluate_grader}
    if family not in measures:
        raise ValueError(f"no measure for family {family}")
    more = {"fusion": fusion} if family == "grader" else {}
    out: Scores = measures[family](run, samples(family, root, detect) if given is None else given, progress, **more)  # type: ignore[operator]
    out.source = "phantoms" if root is None else "held-out patients"
    return out
