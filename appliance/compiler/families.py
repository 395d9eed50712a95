"""The trained families as Subjects: where their calibration, evaluation and golden images come from.

Hides the order in which families need each other (the grader's crops are where the float detector finds discs) and the three
sides of the patients: calibrated on, tuned on, measured on. No patient is on two of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from appliance import backends
from appliance.compiler import alike, confidence, frontal, trained
from appliance.compiler.explainers import family_explainer
from appliance.compiler.heatmap import CAM, attach_cam
from appliance.compiler.signature import REFERENCE, signature_of
from appliance.compiler.subject import Array, MapSpec, Progress, Subject
from appliance.compiler.verdict import Verdict
from appliance.errors import ModelInvalid
from calibration import sets
from kernels.fusion import Fusion
from kernels.preprocess import letterbox, normalise
from models import data, detector, evaluate, fusion, grader, known, phantom, segmenter
from models.export import WEIGHTS, load_float32
from models.family import Spec

# The detector first: the grader's crops are cut where it finds discs.
LUMBAR: dict[str, Spec] = {m.SPEC.name: m.SPEC for m in (detector, segmenter, grader)}
FAMILIES: dict[str, Spec] = {**LUMBAR, **frontal.FAMILIES}
# The engines that each protocol of the appliance needs, by its name in a report.
PROTOCOLS: dict[str, tuple[str, ...]] = {"lumbar-mri-sagittal": tuple(LUMBAR), "spine-xray-ap": tuple(frontal.FAMILIES)}
GOLDEN_SEED = 7_000_000  # neither trained, calibrated nor measured on
STRANGE = 60
EXPLAINED_SLICES = 40


@dataclass
class FamilyExaminer:
    """A family on the patients of one side, or on phantoms. Samples are read once, however many engines are measured."""

    family: str
    samples: evaluate.Samples
    source: str
    fusion: Fusion | None = None
    identity: str = field(init=False)

    def __post_init__(self) -> None:
        h = hashlib.sha256(f"{self.family} {self.source} {evaluate.RESAMPLES}".encode())
        for s in self.samples:
            truth = s.grading if isinstance(s, evaluate.Crop) else (s.mask, s.discs, s.vertebrae)
            h.update(np.ascontiguousarray(s.pixels).tobytes())
            h.update(repr(s.box).encode() if isinstance(s, evaluate.Crop) else b"")
            for part in truth if isinstance(truth, tuple) else (truth,):
                h.update(np.ascontiguousarray(part).tobytes() if isinstance(part, np.ndarray) else repr(part).encode())
            h.update(s.look.tobytes() if isinstance(s, evaluate.Crop) and s.look is not None else b"")
        h.update(self.fusion.to_bytes() if self.fusion is not None else b"")
        self.identity = h.hexdigest()

    def scores(self, run: evaluate.Runner, progress: Progress | None = None) -> evaluate.Scores:
        out = evaluate.evaluate(self.family, run, None, None, progress, self.samples, self.fusion)
        out.source = self.source
        return out

    baseline = scores  # truth is known, so the float model is judged by it like any other


def float_model(family: str, weights: Path = WEIGHTS) -> tuple[Any, MapSpec]:
    """The trained graph in float32 with its heatmap attached. Raises ModelInvalid where the file is not there."""
    spec = FAMILIES[family]
    path = weights / f"{family}.onnx"
    try:
        model = load_float32(path)
    except OSError as error:
        raise ModelInvalid(f"the trained {family} cannot be read: {error.strerror}", value=path) from error
    if spec.heatmap_kind != "cam":
        return model, MapSpec(spec.heatmap_kind, spec.heatmap_output, spec.heatmap_layer)
    model, bias = attach_cam(model)
    return model, MapSpec("cam", CAM, spec.heatmap_layer, cam_bias=tuple(bias))


def subjects(root: Path | None, images: int = 64, weights: Path = WEIGHTS, names: Sequence[str] = tuple(LUMBAR)) -> list[Subject]:
    """The families as Subjects. `root` is the folder that holds lumbar_mri/ and the radiographs; None calibrates and measures on
    phantoms, and leaves the radiograph families out, as a folder without radiographs does.

    Raises ModelInvalid, CalibrationInvalid, GraphUnsupported.
    """
    frontals = [n for n in frontal.FAMILIES if n in names and (weights / f"{n}.onnx").exists()] if frontal.there(root) else []
    lumbar = [n for n in LUMBAR if n in names]
    out: list[Subject] = []
    if lumbar:
        # The grader's discs are found by the detector and, for a fusion, outlined by the segmenter.
        fused = fusion.beside(weights) if grader.SPEC.name in lumbar else None
        helpers = ("detector",) if fused is None else ("detector", "segmenter")
        graphs = {name: float_model(name, weights) for name in dict.fromkeys((*helpers, *lumbar))}
        with ExitStack() as stack:
            runs = {name: stack.enter_context(closing(_float_session(graphs[name][0]))).run for name in helpers}
            for name in lumbar:
                more = (fused, runs.get("segmenter")) if name == grader.SPEC.name else (None, None)
                out.append(_subject(name, *graphs[name], runs["detector"], *more, root, images, weights))
    if root is not None:
        out += [frontal.subject(name, *float_model(name, weights), root, images, weights) for name in frontals]
    return out


def _float_session(model: Any) -> backends.Session:
    return backends.load(REFERENCE).open(model.SerializeToString(), signature_of(model), precision="f32", threads=0)


def _subject(
    family: str,
    model: Any,
    heatmap: MapSpec,
    detect: evaluate.Runner,
    fused: Fusion | None,
    segment: evaluate.Runner | None,
    root: Path | None,
    images: int,
    weights: Path,
) -> Subject:
    spec = LUMBAR[family]
    measured = evaluate.samples(family, root, detect, segment=segment)
    tuned = evaluate.samples(family, root, detect, data.validation_patients(), segment) if root is not None else None
    # Phantoms are no patients: temperatures of patients would be judged on what they are not for.
    answers = known.read(family, weights) if root is not None else None
    if answers is not None and family == grader.SPEC.name and (fused is not None) != (fusion.FUSED in answers.source):
        raise ModelInvalid("of the grader and its known answers one is fused, the other not", value=answers.source, remedy=fusion.REMEDY)
    return trained.subject(
        spec,
        model,
        heatmap,
        weights,
        "disc crop" if family == grader.SPEC.name else "letterbox",
        calibration=sets.for_family(spec, root, images, detect),
        examiner=FamilyExaminer(family, measured, "phantoms" if root is None else "held-out patients", fused),
        validator=FamilyExaminer(family, tuned, "validation patients", fused) if tuned is not None else None,
        # A disc is cheap to explain, a slice is not.
        explainer=family_explainer(family, measured, len(measured) if family == grader.SPEC.name else EXPLAINED_SLICES),
        tuner=family_explainer(family, tuned, alike.MOST) if tuned is not None else None,
        confidence=_confidence(measured, answers, root, fused) if family == grader.SPEC.name else None,
        fitted_on=answers.sha256 if answers is not None else "",
        fusion=fused.to_bytes() if fused is not None else None,
        golden=golden_inputs(spec),
    )


def _confidence(
    crops: evaluate.Samples, answers: known.Known | None, root: Path | None, fused: Fusion | None
) -> Callable[[evaluate.Runner, evaluate.Runner], Verdict]:
    """The grader's probabilities: temperature, calibration error, conformal sets, and whether it is less sure of what is no disc."""

    fitting = confidence.grader_fitting(answers) if answers is not None else None

    def judge(fp32: evaluate.Runner, engine: evaluate.Runner) -> Verdict:
        heads, groups = confidence.grader_heads(fp32, engine, [c for c in crops if isinstance(c, evaluate.Crop)], fused)
        strange = _strange_crops(root)
        logits = tuple(np.concatenate([run({"image": x})["logits"] for x in strange])[:, :5].astype(np.float64) for run in (fp32, engine))
        return confidence.confidence_gate(heads, groups, (logits[0], logits[1]), samples="discs", fitting=fitting)

    return judge


def _strange_crops(root: Path | None) -> list[Array]:
    """Crops that hold no disc on MRI: places on radiographs, where their folder is there, else noise and shading."""
    rng = np.random.default_rng(GOLDEN_SEED)
    folder = root / "spine_xray_ap/valid/images" if root is not None else None
    files = sorted(folder.glob("*.jpg"))[:STRANGE] if folder is not None and folder.is_dir() else []
    pictures = [data.read_grey(p).astype(np.float32) for p in files]
    if not pictures:
        pictures = [data.smooth_field(rng, 256, int(rng.integers(2, 40)), 1.0) for _ in range(STRANGE)]
    out = []
    for pixels in pictures:
        height, width = pixels.shape
        side = 0.25 * min(height, width)
        x, y = rng.uniform(0, width - side), rng.uniform(0, height - side)
        out.append(grader.crop(normalise(pixels), (x, y, x + side, y + 0.4 * side))[None])
    return out


def golden_inputs(spec: Spec) -> list[Array]:
    """Two inputs drawn from fixed seeds: no patient is in them, so a bundle may carry them."""
    out: list[Array] = []
    for seed in (GOLDEN_SEED, GOLDEN_SEED + 1):
        pixels, truth = phantom.draw(np.random.default_rng(seed), weighting="T2")
        x = normalise(pixels)
        if spec.name == grader.SPEC.name:
            out.append(grader.crop(x, truth.discs[len(out)].box_px)[None])
        else:
            out.append(letterbox(x, spec.input_hw)[0])
    return out
