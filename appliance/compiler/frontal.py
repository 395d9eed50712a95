"""The radiograph families as Subjects: calibrated on training pictures, measured on those that training never saw.

Hides which of the two sets a family lives on, and its three sides. A person is on one side only; pictures are named by their
content (`models/radiographs.py`). There is no phantom of a class, so these families compile from radiographs or not at all.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from appliance.compiler import alike, confidence, trained
from appliance.compiler.explainers import DenseExplainer, boxes_as_region, boxes_to_input, explain, held, pick
from appliance.compiler.subject import Array, Explained, Explainer, MapSpec, Progress, Subject
from appliance.compiler.verdict import Verdict
from calibration import sets
from kernels.preprocess import letterbox, normalise
from models import evaluate, evaluate_ap, familiarity, known, phantom_ap, radiographs, spine_class, vertebra_ap
from models.family import Spec

FAMILIES: dict[str, Spec] = {m.SPEC.name: m.SPEC for m in (vertebra_ap, spine_class)}
GOLDEN_SEED = 7_100_000  # neither trained nor measured on
EXPLAINED = 40
HEAD = "class"  # of the classifier, as temperatures are called in a manifest
FAMILIAR_RISE = 0.02  # of the share of held-out spines that an engine takes for strangers, above FP32's
Pictures = Sequence[radiographs.Boxed] | Sequence[radiographs.Classed]


def there(root: Path | None) -> bool:
    """Whether the folder of training data holds the radiographs."""
    return root is not None and (root / "spine_xray_ap").is_dir() and (root / "spine_xray_class").is_dir()


@dataclass
class PictureExaminer:
    """One family on pictures of one side."""

    family: str
    pictures: Pictures = field(repr=False)
    source: str
    identity: str = field(init=False)

    def __post_init__(self) -> None:
        h = hashlib.sha256(f"{self.family} {self.source} {evaluate.RESAMPLES}".encode())
        for p in self.pictures:
            h.update(np.ascontiguousarray(p.pixels).tobytes())
            h.update(p.boxes.tobytes() if isinstance(p, radiographs.Boxed) else bytes([p.kind]))
        self.identity = h.hexdigest()

    def scores(self, run: evaluate.Runner, progress: Progress | None = None) -> evaluate.Scores:
        out = evaluate_ap.evaluate(self.family, run, self.pictures, progress)
        out.source = self.source
        return out

    baseline = scores


def subject(name: str, model: Any, heatmap: MapSpec, root: Path, images: int, weights: Path) -> Subject:
    """One radiograph family. Raises CalibrationInvalid, and FileNotFoundError or ValueError for labels that are not there or no boxes."""
    spec = FAMILIES[name]
    measured = evaluate_ap.samples(name, root, "test")
    choosing = radiographs.boxed(root, "validation")
    answers = known.read(name, weights)
    numbers = weights / familiarity.FILE.name if name == spine_class.SPEC.name else None
    return trained.subject(
        spec,
        model,
        heatmap,
        weights,
        calibration=sets.for_family(spec, root, images),
        examiner=PictureExaminer(name, measured, "held-out persons"),
        # The classifier's pictures are too few for a part that chooses. Maps need no class to be alike, so those of the detector's
        # choosing side serve it too.
        validator=PictureExaminer(name, choosing, "validation persons") if name == vertebra_ap.SPEC.name else None,
        explainer=_explainer(spec, heatmap, measured, EXPLAINED),
        tuner=_explainer(spec, heatmap, choosing, alike.MOST),
        confidence=_confidence(measured, answers, root, numbers) if name == spine_class.SPEC.name else None,
        fitted_on=(answers.sha256 if answers is not None else "") + _digest(numbers),
        golden=golden_inputs(spec),
    )


def _explainer(spec: Spec, heatmap: MapSpec, pictures: Pictures, most: int) -> Explainer:
    chosen = [pictures[i] for i in pick([p.group for p in pictures], most)]
    if spec.name == spine_class.SPEC.name:
        inputs = [letterbox(normalise(p.pixels.astype(np.float32)), spec.input_hw)[0] for p in chosen]
        return explain(heatmap, held(inputs, [p.group for p in chosen]), scores="logits")
    samples = []
    for p in chosen:
        x, back = letterbox(normalise(p.pixels.astype(np.float32)), spec.input_hw)
        truth = boxes_as_region(boxes_to_input(p.boxes, back), spec.input_hw) if isinstance(p, radiographs.Boxed) else None
        samples.append(Explained(x, p.group, truth))
    return DenseExplainer(tuple(samples), heatmap, exclusive=False)


def _digest(numbers: Path | None) -> str:
    return hashlib.sha256(numbers.read_bytes()).hexdigest() if numbers is not None and numbers.exists() else ""


def _confidence(
    pictures: Pictures, answers: known.Known | None, root: Path, numbers: Path | None
) -> Callable[[evaluate.Runner, evaluate.Runner], Verdict]:
    """The classifier's probabilities, and whether its pooled channels still know a spine (`models/familiarity.py`, whose numbers are
    those of FP32)."""
    fitting = None
    if answers is not None:
        fitted = {HEAD: (answers.logits.astype(np.float64), answers.truth[:, 0])}
        fitting = confidence.Fitting(fitted, answers.patient, answers.source, answers.sha256)

    def judge(fp32: evaluate.Runner, engine: evaluate.Runner) -> Verdict:
        judged = [p for p in pictures if isinstance(p, radiographs.Classed)]
        inputs = [letterbox(normalise(p.pixels.astype(np.float32)), spine_class.SPEC.input_hw)[0] for p in judged]
        a, b = (np.concatenate([run({"image": x})["logits"] for x in inputs]).astype(np.float64) for run in (fp32, engine))
        truth = np.array([p.kind for p in judged], np.int64)
        groups = np.array([p.group for p in judged], np.int64)
        head = confidence.Head(HEAD, "softmax", a, b, truth)
        verdict = confidence.confidence_gate([head], groups, samples="radiographs", fitting=fitting)
        if numbers is None or not numbers.exists():
            return verdict
        shown = [*pictures, *radiographs.boxed(root, "test")]
        return familiar(verdict, [evaluate_ap.pooled(run, [p.pixels for p in shown]) for run in (fp32, engine)], familiarity.read(numbers))

    return judge


def familiar(verdict: Verdict, pooled: Sequence[Array], numbers: familiarity.Familiarity) -> Verdict:
    """The verdict, refused where an engine takes more spines for strangers than FP32 does: its rounding is spread over all channels,
    and may carry every picture away from the mean while no logit moves. `pooled`: N x D of FP32 and of the engine."""
    before, after = (float((numbers.distance(p) > numbers.limit).mean()) for p in pooled)
    said = {"pictures": len(pooled[0]), "strange_fp32": before, "strange_int8": after, "limit": FAMILIAR_RISE}
    found = replace(verdict, details={**verdict.details, "familiar": said})
    if after - before <= FAMILIAR_RISE:
        return found
    note = f"takes {after:.1%} of {len(pooled[0])} radiographs of spines for strangers, FP32 {before:.1%}"
    return replace(found, passed=False, note=note if verdict.passed is not False else f"{verdict.note}; {note}")


def golden_inputs(spec: Spec) -> list[Array]:
    """Two frontal phantoms of fixed seeds."""
    out = []
    for seed in (GOLDEN_SEED, GOLDEN_SEED + 1):
        image, _ = phantom_ap.draw(np.random.default_rng(seed))
        out.append(letterbox(normalise(image), spec.input_hw)[0])
    return out
