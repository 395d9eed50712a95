"""How the heatmap of each kind of network is read: which output, which channel, what score, and where it ought to point.

Hides the families' decoding from the report card. A stranger's model has explainers of the same shape, made from its MapSpec.
The target of a sample is what FP32 answers; the truth region is where an annotation says that the evidence lies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import cv2
import numpy as np
from numpy.typing import NDArray

from appliance.compiler.subject import Array, Explained, MapSpec
from appliance.errors import GraphUnsupported
from kernels import mask as km
from kernels.preprocess import Letterbox, letterbox, normalise
from models import detector, grader, segmenter
from models.evaluate import Box, Crop, Slice

SEED = 20261124
MOST = 40  # inputs of one explainer
DISC = detector.SPEC.classes.index("disc")
TOP_SHARE = 0.01  # of a dense map's cells: the score is the mean over the surest


def pick(groups: Sequence[int], count: int) -> list[int]:
    """Indices of `count` samples at most, spread over patients: one of each before a second of any, seeded, in given order."""
    rng = np.random.default_rng(SEED)
    seen: dict[int, int] = {}
    order: list[tuple[int, int, int]] = []
    for i in rng.permutation(len(groups)):
        turn = seen[groups[i]] = seen.get(groups[i], -1) + 1
        order.append((turn, len(order), int(i)))
    return sorted(i for _, _, i in sorted(order)[:count])


def softmax(logits: NDArray[np.floating], axis: int = -1) -> NDArray[np.float64]:
    e = np.exp(logits.astype(np.float64) - logits.max(axis=axis, keepdims=True))
    return np.asarray(e / e.sum(axis=axis, keepdims=True))


def sigmoid(logits: NDArray[np.floating]) -> NDArray[np.float64]:
    return np.asarray(0.5 * (1.0 + np.tanh(0.5 * logits.astype(np.float64))))


def _top(values: NDArray[np.float64]) -> float:
    count = max(1, round(TOP_SHARE * values.size))
    return float(np.sort(values, axis=None)[-count:].mean())


@dataclass(frozen=True)
class _Held:
    """Samples are made once: a card asks for them many times."""

    explained: tuple[Explained, ...] = field(repr=False)

    def samples(self) -> Sequence[Explained]:
        return self.explained


# -- the three families ---------------------------------------------------------------------------------------------


class GraderExplainer(_Held):
    """The exact map of the grade that FP32 gives; the truth is the disc's box in its crop."""

    def target(self, outputs: dict[str, Array]) -> int:
        return int(outputs["logits"][0, :5].argmax())

    def map(self, outputs: dict[str, Array], target: int) -> Array:
        return np.asarray(outputs["cam"][0, target])

    def score(self, outputs: dict[str, Array], target: int) -> float:
        """Softmax probability among the five grades."""
        return float(softmax(outputs["logits"][0, :5])[target])


class SegmenterExplainer(_Held):
    """Disc logit over the best other class, as the appliance shows it; the truth is the annotated discs."""

    def target(self, outputs: dict[str, Array]) -> int:
        del outputs
        return km.DISC

    def map(self, outputs: dict[str, Array], target: int) -> Array:
        logits = outputs["logits"][0]
        return np.asarray(logits[target] - np.delete(logits, target, axis=0).max(axis=0), np.float32)

    def score(self, outputs: dict[str, Array], target: int) -> float:
        return _top(softmax(outputs["logits"][0], axis=0)[target])


class DetectorExplainer(_Held):
    """Disc logit of the finest stride; the truth is the drawn disc boxes."""

    def target(self, outputs: dict[str, Array]) -> int:
        del outputs
        return DISC

    def map(self, outputs: dict[str, Array], target: int) -> Array:
        return np.asarray(outputs["class_8"][0, target])

    def score(self, outputs: dict[str, Array], target: int) -> float:
        return _top(sigmoid(outputs["class_8"][0, target]))


FamilyExplainer = GraderExplainer | SegmenterExplainer | DetectorExplainer


def boxes_as_region(boxes: NDArray[np.float32], hw: tuple[int, int]) -> NDArray[np.bool_]:
    """N x 4 boxes in input pixels -> the cells that they cover."""
    out = np.zeros(hw, bool)
    for x0, y0, x1, y1 in boxes:
        out[max(0, int(np.floor(y0))) : max(0, int(np.ceil(y1))), max(0, int(np.floor(x0))) : max(0, int(np.ceil(x1)))] = True
    return out


def boxes_to_input(boxes: NDArray[np.float32], back: Letterbox) -> NDArray[np.float32]:
    """N x 4 boxes in source pixels -> in pixels of the network's input."""
    return np.asarray(boxes, np.float32) * np.float32(back.scale) + np.array([back.offset_x, back.offset_y] * 2, np.float32)


def _maskboxes_to_input(mask: NDArray[np.uint8], back: Letterbox) -> NDArray[np.bool_]:
    # Pixel centres: input + .5 = (source + .5) * scale + offset
    half = 0.5 * back.scale - 0.5
    matrix = np.array([[back.scale, 0.0, back.offset_x + half], [0.0, back.scale, back.offset_y + half]])
    discs = (mask == km.DISC).astype(np.uint8)
    return np.asarray(cv2.warpAffine(discs, matrix, back.input_hw[::-1], flags=cv2.INTER_NEAREST) > 0)


def explain_grader(crops: Sequence[Crop], most: int = MOST) -> GraderExplainer:
    out = []
    for c in (crops[i] for i in pick([c.patient for c in crops], most)):
        size = grader.SPEC.input_hw[0]
        matrix = grader.crop_matrix(c.box, size)
        x0, y0, x1, y1 = c.box
        inside: Box = (
            x0 * matrix[0, 0] + matrix[0, 2],
            y0 * matrix[1, 1] + matrix[1, 2],
            x1 * matrix[0, 0] + matrix[0, 2],
            y1 * matrix[1, 1] + matrix[1, 2],
        )
        truth = boxes_as_region(np.array([inside], np.float32), (size, size))
        out.append(Explained(grader.crop(normalise(c.pixels), c.box)[None], c.patient, truth))
    return GraderExplainer(tuple(out))


def explain_segmenter(slices: Sequence[Slice], most: int = MOST) -> SegmenterExplainer:
    known = [s for s in slices if s.mask is not None] or list(slices)
    out = []
    for s in (known[i] for i in pick([s.patient for s in known], most)):
        x, back = letterbox(normalise(s.pixels), segmenter.SPEC.input_hw)
        out.append(Explained(x, s.patient, None if s.mask is None else _maskboxes_to_input(s.mask, back)))
    return SegmenterExplainer(tuple(out))


def explain_detector(slices: Sequence[Slice], most: int = MOST) -> DetectorExplainer:
    known = [s for s in slices if s.discs is not None] or list(slices)
    out = []
    for s in (known[i] for i in pick([s.patient for s in known], most)):
        x, back = letterbox(normalise(s.pixels), detector.SPEC.input_hw)
        truth = None if s.discs is None else boxes_as_region(boxes_to_input(s.discs, back), detector.SPEC.input_hw)
        out.append(Explained(x, s.patient, truth))
    return DetectorExplainer(tuple(out))


def family_explainer(family: str, samples: Sequence[Slice] | Sequence[Crop], most: int = MOST) -> FamilyExplainer:
    """The explainer of one of the three families, from its evaluation samples. ValueError for any other name."""
    makers = {"grader": explain_grader, "segmenter": explain_segmenter, "detector": explain_detector}
    if family not in makers:
        raise ValueError(f"no explainer for family {family}")
    made: FamilyExplainer = makers[family](samples, most)  # type: ignore[operator]
    return made


# -- anybody's network ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ClassifierExplainer(_Held):
    """A classifier with a map of one channel a class, or of one channel for all: the map of the class that FP32 gives.

    `scores` names the output of 1 x classes. `probabilities` says that it holds probabilities already; `exclusive` that the
    classes exclude each other (softmax), else each has a sigmoid of its own. `channels_last`: the map is 1 x h x w x classes.
    """

    spec: MapSpec
    scores: str
    exclusive: bool = True
    probabilities: bool = False
    channels_last: bool = False

    def target(self, outputs: dict[str, Array]) -> int:
        return int(self._row(outputs).argmax())

    def _row(self, outputs: dict[str, Array]) -> Array:
        return outputs[self.scores].reshape(-1)

    def map(self, outputs: dict[str, Array], target: int) -> Array:
        return _channel(outputs[str(self.spec.output)], target, self.channels_last)

    def score(self, outputs: dict[str, Array], target: int) -> float:
        row = self._row(outputs)
        if self.probabilities:
            return float(np.clip(row[target], 0.0, 1.0))
        return float(softmax(row)[target] if self.exclusive else sigmoid(row)[target])


@dataclass(frozen=True)
class DenseExplainer(_Held):
    """A segmenter or detector whose map holds one channel of logits a class: the class whose surest cells are surest.

    `exclusive`: classes exclude each other, so evidence is the logit over the best other one. `background` is never a target.
    """

    spec: MapSpec
    exclusive: bool = True
    background: int | None = None
    probabilities: bool = False
    channels_last: bool = False

    def _planes(self, outputs: dict[str, Array]) -> Array:
        values = outputs[str(self.spec.output)][0]
        return np.moveaxis(values, -1, 0) if self.channels_last else values

    def _sure(self, outputs: dict[str, Array]) -> NDArray[np.float64]:
        planes = self._planes(outputs)
        if self.probabilities:
            return np.clip(planes, 0.0, 1.0).astype(np.float64)
        return softmax(planes, axis=0) if self.exclusive and len(planes) > 1 else sigmoid(planes)

    def target(self, outputs: dict[str, Array]) -> int:
        sure = [-1.0 if k == self.background else _top(p) for k, p in enumerate(self._sure(outputs))]
        return int(np.argmax(sure))

    def map(self, outputs: dict[str, Array], target: int) -> Array:
        planes = self._planes(outputs)
        if self.exclusive and len(planes) > 1:
            return np.asarray(planes[target] - np.delete(planes, target, axis=0).max(axis=0), np.float32)
        return np.asarray(planes[target])

    def score(self, outputs: dict[str, Array], target: int) -> float:
        return _top(self._sure(outputs)[target])


def _channel(values: Array, target: int, channels_last: bool) -> Array:
    planes = np.moveaxis(values[0], -1, 0) if channels_last else values[0]
    return np.asarray(planes[0] if len(planes) == 1 else planes[target])


def held(inputs: Sequence[Array], groups: Sequence[int] | None = None, most: int = MOST) -> tuple[Explained, ...]:
    """Samples of a stranger's model: every input is its own group unless `groups` says otherwise."""
    groups = list(range(len(inputs))) if groups is None else list(groups)
    return tuple(Explained(inputs[i], groups[i]) for i in pick(groups, most))


def explain(
    spec: MapSpec,
    samples: tuple[Explained, ...],
    *,
    scores: str | None = None,
    exclusive: bool = True,
    background: int | None = None,
    probabilities: bool = False,
    channels_last: bool = False,
) -> ClassifierExplainer | DenseExplainer:
    """An explainer from what a card says: `scores` names a classifier's output, None means a dense head.

    Raises GraphUnsupported where the MapSpec has no map.
    """
    if spec.kind == "unavailable" or spec.output is None:
        raise GraphUnsupported("this graph has no heatmap to judge", value=spec.reason or spec.kind)
    if scores is not None:
        return ClassifierExplainer(samples, spec, scores, exclusive, probabilities, channels_last)
    return DenseExplainer(samples, spec, exclusive, background, probabilities, channels_last)
