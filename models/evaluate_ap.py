"""How good the radiograph networks are, in the manner of `models/evaluate.py`: same scores, same intervals, other truths.

The detector is measured on the publishers' `valid` pictures, the classifier on the held-out quarter, Cobb angles on phantoms
(exact) and on `valid` against the angles of the drawn boxes. Intervals resample persons. `side="validation"` measures on the
part of the training pictures that may choose.

`python -m models.evaluate_ap FAMILY --data DIR --weights final.pt` prints them as JSON.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from kernels import cobb
from kernels.preprocess import letterbox, normalise
from models import detector, phantom_ap, radiographs, spine_class, vertebra_ap
from models.evaluate import PHANTOM_SEED, Progress, Runner, Scores, average_precision, match

FAMILIES = {m.SPEC.name: m for m in (vertebra_ap, spine_class)}
BOX_SCORE = 0.30  # of precision and recall
COLUMN_SCORE = detector.CANDIDATE_SCORE  # a column is chosen among all that are decoded on the device
CANDIDATE_SCORE = 0.01
Side = Literal["validation", "test"]


@dataclass(frozen=True)
class CobbPair:
    """The largest curve of one picture, or any curve of a phantom: true angle and the one found over the same vertebrae, 0
    where none is."""

    truth_deg: float
    found_deg: float
    margin_deg: float
    group: int

    @property
    def error_deg(self) -> float:
        return abs(self.truth_deg - self.found_deg)


def samples(family: str, root: Path | None, side: Side = "test") -> Sequence[radiographs.Boxed] | Sequence[radiographs.Classed]:
    """What a family is measured on. `root` None: phantoms for the detector; the classifier has none and raises ValueError."""
    if family == vertebra_ap.SPEC.name:
        return radiographs.boxed(root, side) if root is not None else [b for b, _ in phantoms()]
    if root is None:
        raise ValueError("a phantom has no class; the classifier is measured on radiographs only")
    if side != "test":
        raise ValueError("the classifier's pictures are too few for a part that chooses")
    return radiographs.classed(root, "test")


def phantoms(count: int = 24) -> list[tuple[radiographs.Boxed, phantom_ap.Truth]]:
    """Frontal phantoms with the pixels of an 8-bit picture."""
    out = []
    for i in range(count):
        image, truth = phantom_ap.draw(np.random.default_rng(PHANTOM_SEED + i))
        boxes = np.array([v.box_px for v in truth.vertebrae], np.float32)
        out.append((radiographs.Boxed(f"phantom-{i}", np.rint(image / 4095 * 255).astype(np.uint8), boxes, i), truth))
    return out


def detect(run: Runner, pixels: NDArray[Any], score: float) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """H x W grey -> boxes in its pixels and their scores, as the device finds them."""
    x, back = letterbox(normalise(pixels.astype(np.float32)), vertebra_ap.SPEC.input_hw)
    found = vertebra_ap.decode(run({"image": x}), score)
    return back.boxes_to_source(found.boxes), found.scores


def evaluate_detector(run: Runner, pictures: Sequence[radiographs.Boxed], progress: Progress | None = None) -> Scores:
    """mAP50 and the recall of the boxes that make a column, with precision beside it."""
    matches, hits, kept = [], [], []
    for i, p in enumerate(pictures):
        boxes, scores = detect(run, p.pixels, CANDIDATE_SCORE)
        matches.append(match(boxes, scores, p.boxes))
        sure = scores >= BOX_SCORE
        hits.append(int(match(boxes[sure], scores[sure], p.boxes)[1].sum()))
        kept.append(int(sure.sum()))
        if progress:
            progress(i + 1, len(pictures))
    groups = [p.group for p in pictures]
    h, k, n = np.array(hits), np.array(kept), np.array([len(p.boxes) for p in pictures])
    out = Scores("map50_vertebra")
    out.add("map50_vertebra", groups, lambda i: average_precision([matches[j] for j in i]))
    out.add("recall_vertebra", groups, lambda i: float(h[i].sum() / n[i].sum()))
    out.add("precision_vertebra", groups, lambda i: float(h[i].sum() / max(k[i].sum(), 1)))
    return out


def evaluate_classifier(run: Runner, pictures: Sequence[radiographs.Classed], progress: Progress | None = None) -> Scores:
    """Accuracy, its mean over classes, and the recall of each class."""
    return _classified([run] * len(pictures), pictures, progress)


def out_of_fold(runs: Sequence[Runner], pictures: Sequence[radiographs.Classed]) -> Scores:
    """The classifier's scores on training pictures, each read by the network that learnt from the other folds; `runs[k]` left out
    fold k of `radiographs.folds`. Ways of teaching are chosen by this, so that the test side judges the chosen one alone."""
    return _classified([runs[k] for k in radiographs.folds(pictures)], pictures)


def _classified(runs: Sequence[Runner], pictures: Sequence[radiographs.Classed], progress: Progress | None = None) -> Scores:
    """`runs` has one runner for each picture."""
    predicted = []
    for i, (run, p) in enumerate(zip(runs, pictures, strict=True)):
        x, _ = letterbox(normalise(p.pixels.astype(np.float32)), spine_class.SPEC.input_hw)
        predicted.append(int(run({"image": x})["logits"][0].argmax()))
        if progress:
            progress(i + 1, len(pictures))
    found, truth = np.array(predicted), np.array([p.kind for p in pictures])
    groups = [p.group for p in pictures]

    def recall(i: NDArray[np.int64], kind: int) -> float:
        own = i[truth[i] == kind]
        return float((found[own] == kind).mean()) if own.size else float("nan")

    kinds = range(len(spine_class.SPEC.classes))
    out = Scores("accuracy")
    out.add("accuracy", groups, lambda i: float((found[i] == truth[i]).mean()))
    out.add("balanced_accuracy", groups, lambda i: float(np.nanmean([recall(i, k) for k in kinds])))
    for k in kinds:
        out.add(f"recall_{spine_class.SPEC.classes[k]}", groups, lambda i, k=k: recall(i, k))  # type: ignore[misc]
    return out


def pooled(run: Runner, pictures: Sequence[NDArray[Any]]) -> NDArray[np.float32]:
    """The classifier's pooled channels of pictures as the device sees them, N x 80."""
    rows = [run({"image": letterbox(normalise(p.astype(np.float32)), spine_class.SPEC.input_hw)[0]})["pooled"][0] for p in pictures]
    return np.array(rows, np.float32)


def evaluate(
    family: str,
    run: Runner,
    given: Sequence[radiographs.Boxed] | Sequence[radiographs.Classed],
    progress: Progress | None = None,
) -> Scores:
    measures: dict[str, Callable[..., Scores]] = {
        vertebra_ap.SPEC.name: evaluate_detector,
        spine_class.SPEC.name: evaluate_classifier,
    }
    return measures[family](run, given, progress)


# -- Cobb angles ----------------------------------------------------------------------------------------------------


def curves_of(boxes: NDArray[np.float32], scores: NDArray[np.float32] | None = None) -> tuple[tuple[cobb.Curve, ...], NDArray[np.float64]]:
    """Boxes in square pixels -> curves, and the centres that their indices count; nothing where there is no column."""
    scores = np.full(len(boxes), 0.9, np.float32) if scores is None else scores
    boxes = boxes[cobb.column(boxes, scores)]
    centres = np.asarray((boxes[:, :2] + boxes[:, 2:]) / 2, np.float64)
    return (cobb.curves(cobb.fit(centres)) if len(centres) >= cobb.LEAST_VERTEBRAE else ()), centres


def cobb_on_phantoms(run: Runner | None, count: int = 60, jitter: float = 0.0, least_deg: float = 10.0) -> list[CobbPair]:
    """Every curve of at least `least_deg` of `count` phantoms against what is found over the same stretch of spine.

    `run` None takes the true boxes, their edges moved by `jitter` of a box's median height (standard deviation).
    """
    out = []
    for i in range(count):
        rng = np.random.default_rng(PHANTOM_SEED + 1000 + i)
        if run is None:
            truth = phantom_ap.truth(rng)
            boxes = np.array([v.box_px for v in truth.vertebrae], np.float32)
            tall = float(np.median(boxes[:, 3] - boxes[:, 1]))
            noise = np.random.default_rng([PHANTOM_SEED, i]).normal(0, jitter * tall, boxes.shape)
            found, centres = curves_of((boxes + noise).astype(np.float32))
        else:
            image, truth = phantom_ap.draw(rng)
            found, centres = curves_of(*detect(run, image, COLUMN_SCORE))
        for curve in truth.curves:
            if curve.angle_deg < least_deg:
                continue
            top, bottom = (truth.vertebrae[phantom_ap.LEVELS.index(level)].box_px for level in (curve.upper, curve.lower))
            ends = (top[1] + top[3]) / 2, (bottom[1] + bottom[3]) / 2
            shared = [(min(centres[c.lower, 1], ends[1]) - max(centres[c.upper, 1], ends[0]), c) for c in found]
            overlap, best = max(shared, key=lambda pair: pair[0], default=(0.0, None))
            hit = best if overlap > 0 else None
            out.append(CobbPair(curve.angle_deg, hit.angle_deg if hit else 0.0, hit.margin_deg if hit else 0.0, i))
    return out


def cobb_on_pictures(run: Runner, pictures: Sequence[radiographs.Boxed]) -> list[CobbPair]:
    """The largest angle by the detector's boxes against the largest by the drawn boxes: what detection alone adds."""
    out = []
    for p in pictures:
        drawn, found = curves_of(p.boxes)[0], curves_of(*detect(run, p.pixels, COLUMN_SCORE))[0]
        a, b = (max(cs, key=lambda c: c.angle_deg, default=None) for cs in (drawn, found))
        out.append(CobbPair(a.angle_deg if a else 0.0, b.angle_deg if b else 0.0, b.margin_deg if b else 0.0, p.group))
    return out


def summary(pairs: Sequence[CobbPair]) -> dict[str, float]:
    """Mean absolute error with its interval over resampled pictures, bias, 95th percentile, share within the margin."""
    off = np.array([p.error_deg for p in pairs])
    scores = Scores("cobb")
    scores.add("cobb", [p.group for p in pairs], lambda i: float(off[i].mean()))
    m = scores["cobb"]
    return {
        "mean_absolute_error_deg": m.value,
        "low": m.low,
        "high": m.high,
        "bias_deg": float(np.mean([p.found_deg - p.truth_deg for p in pairs])),
        "p95_deg": float(np.percentile(off, 95)),
        "within_margin": float(np.mean([p.error_deg <= p.margin_deg for p in pairs])),
        "curves": len(pairs),
        "missed": sum(p.found_deg == 0 and p.truth_deg > 0 for p in pairs),
    }


# -- command --------------------------------------------------------------------------------------------------------


def runner_of(family: str, weights: Path) -> Runner:
    """A trained state dict in float32, or an ONNX file as it is: the one that ships, or an INT8 engine of a bundle."""
    spec = FAMILIES[family].SPEC
    if weights.suffix == ".onnx":
        from models.export import file_runner

        return file_runner(weights)
    import torch

    net = FAMILIES[family].network()
    net.load_state_dict(torch.load(weights, weights_only=True))
    net.eval()

    def run(inputs: dict[str, NDArray[np.float32]]) -> dict[str, NDArray[np.float32]]:
        with torch.inference_mode():
            out = net(torch.from_numpy(inputs["image"]))
        parts = out if isinstance(out, tuple) else (out,)
        return {name: part.numpy() for name, part in zip(spec.outputs, parts, strict=True)}

    return run


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m models.evaluate_ap", description=__doc__)
    parser.add_argument("family", choices=sorted(FAMILIES))
    parser.add_argument("--data", type=Path, required=True, help="folder that holds spine_xray_ap/ and spine_xray_class/")
    parser.add_argument("--weights", type=Path, required=True, help="final.pt of a run, or an ONNX file; --side folds: with {fold} in it")
    parser.add_argument("--side", choices=("validation", "test", "folds"), default="test", help="folds: the classifier's training pictures")
    args = parser.parse_args(argv)
    if args.side == "folds":
        if args.family != spine_class.SPEC.name or "{fold}" not in str(args.weights):
            parser.error("--side folds takes spine_class, and --weights with {fold} in it")
        runs = [runner_of(args.family, Path(str(args.weights).format(fold=k))) for k in range(radiographs.FOLDS)]
        crossed = out_of_fold(runs, radiographs.classed(args.data, "train"))
        print(json.dumps({m.name: asdict(m) for m in crossed.metrics}, indent=2))
        return 0
    run = runner_of(args.family, args.weights)
    pictures = samples(args.family, args.data, args.side)
    found: dict[str, Any] = {m.name: asdict(m) for m in evaluate(args.family, run, pictures).metrics}
    if args.family == vertebra_ap.SPEC.name:
        boxed = [p for p in pictures if isinstance(p, radiographs.Boxed)]
        found["cobb_against_drawn_boxes"] = summary(cobb_on_pictures(run, boxed))
        found["cobb_on_phantoms"] = summary(cobb_on_phantoms(run))
        found["cobb_on_phantoms_true_boxes"] = summary(cobb_on_phantoms(None))
        found["cobb_on_phantoms_jitter_4_percent"] = summary(cobb_on_phantoms(None, jitter=0.04))
    print(json.dumps(found, indent=2))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
