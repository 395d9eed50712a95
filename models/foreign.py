"""Foreign models: an image into the input that a card describes, and the common export layouts back into answers.

Hides the conventions of exporters: where the objectness of a YOLO lies, what a row of chosen boxes means, which way round a
box is written. Boxes come out as corners in pixels of the network's input, masks and probabilities as plain arrays.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from kernels.nms import nms_by_class

Array = NDArray[np.float32]
YOLOX_STRIDES = (8, 16, 32)
MAX_CANDIDATES = 1000  # boxes that enter non-maximum suppression, best scores first


@dataclass(frozen=True)
class Placement:
    """Source edges -> input edges: `input = source * scale + offset`."""

    scale_x: float
    scale_y: float
    offset_x: float
    offset_y: float
    source_hw: tuple[int, int]
    input_hw: tuple[int, int]

    def boxes_to_input(self, boxes: Array) -> Array:
        """N x 4 (x0, y0, x1, y1) in source pixels -> input pixels, clipped to the input."""
        out = np.asarray(boxes, np.float32).reshape(-1, 4).copy()
        out[:, 0::2] = (out[:, 0::2] * self.scale_x + self.offset_x).clip(0, self.input_hw[1])
        out[:, 1::2] = (out[:, 1::2] * self.scale_y + self.offset_y).clip(0, self.input_hw[0])
        return out

    def boxes_to_source(self, boxes: Array) -> Array:
        """The way back, clipped to the source."""
        out = np.asarray(boxes, np.float32).reshape(-1, 4).copy()
        out[:, 0::2] = ((out[:, 0::2] - self.offset_x) / self.scale_x).clip(0, self.source_hw[1])
        out[:, 1::2] = ((out[:, 1::2] - self.offset_y) / self.scale_y).clip(0, self.source_hw[0])
        return out


def place(source_hw: tuple[int, int], input_hw: tuple[int, int], resize: str) -> Placement:
    """Where an image of `source_hw` lies in the input: "stretch", "letterbox" (centred), "letterbox-corner" (top left), "crop"."""
    (h, w), (rows, columns) = source_hw, input_hw
    if resize == "stretch":
        return Placement(columns / w, rows / h, 0.0, 0.0, source_hw, input_hw)
    scale = max(rows / h, columns / w) if resize == "crop" else min(rows / h, columns / w)
    new_h, new_w = max(1, round(h * scale)), max(1, round(w * scale))
    if resize == "letterbox-corner":
        return Placement(new_w / w, new_h / h, 0.0, 0.0, source_hw, input_hw)
    return Placement(new_w / w, new_h / h, float((columns - new_w) // 2), float((rows - new_h) // 2), source_hw, input_hw)


def resized(image: NDArray[np.uint8], at: Placement, pad: float, nearest: bool = False) -> NDArray[np.uint8]:
    """H x W or H x W x C -> the same of the input's size, as `place` said; what no pixel covers is `pad`."""
    rows, columns = at.input_hw
    height, width = max(1, round(at.source_hw[0] * at.scale_y)), max(1, round(at.source_hw[1] * at.scale_x))
    how = cv2.INTER_NEAREST if nearest else cv2.INTER_AREA if height < image.shape[0] else cv2.INTER_LINEAR
    small = np.asarray(image) if image.shape[:2] == (height, width) else cv2.resize(image, (width, height), interpolation=how)
    if (height, width) == (rows, columns):
        return np.asarray(small, np.uint8)
    out = np.full((rows, columns, *image.shape[2:]), np.uint8(round(pad)), np.uint8)
    y, x = int(at.offset_y), int(at.offset_x)
    y0, x0, y1, x1 = max(y, 0), max(x, 0), min(y + height, rows), min(x + width, columns)
    out[y0:y1, x0:x1] = small[y0 - y : y1 - y, x0 - x : x1 - x]
    return out


def image_input(
    image: NDArray[np.uint8],
    input_hw: tuple[int, int],
    colour: str,
    scale: float,
    mean: Sequence[float],
    std: Sequence[float],
    resize: str,
    pad: float,
) -> tuple[Array, Placement]:
    """H x W x 3 BGR (as OpenCV reads it) -> (1 x C x h x w float32, where the image lies in it).

    C is 1 for `colour` "grey", else 3. The value is (pixel * scale - mean) / std, channel by channel.
    """
    at = place((image.shape[0], image.shape[1]), input_hw, resize)
    small = resized(image, at, pad)
    if colour == "grey":
        planes = cv2.cvtColor(small, cv2.COLOR_BGR2GRAY)[None]
    else:
        planes = (small[:, :, ::-1] if colour == "rgb" else small).transpose(2, 0, 1)
    shift = np.asarray(mean, np.float32).reshape(-1, 1, 1)
    spread = np.asarray(std, np.float32).reshape(-1, 1, 1)
    x = (planes.astype(np.float32) * np.float32(scale) - shift) / spread
    return np.ascontiguousarray(x[None], np.float32), at


# -- answers --------------------------------------------------------------------------------------------------------


def softmax(x: Array, axis: int = -1) -> Array:
    e = np.exp(x - x.max(axis=axis, keepdims=True))
    return np.asarray(e / e.sum(axis=axis, keepdims=True), np.float32)


def sigmoid(x: Array) -> Array:
    # Beyond 60 the answer is 0 or 1 in float32, and exp would overflow.
    return np.asarray(1.0 / (1.0 + np.exp(-np.clip(x, -60.0, 60.0))), np.float32)


def classify(output: Array, decoder: str) -> Array:
    """The output of a classifier -> K probabilities (summing to 1 only where the classes exclude each other)."""
    flat = np.asarray(output, np.float32).reshape(-1)
    if decoder == "softmax":
        return softmax(flat)
    if decoder == "sigmoid":
        return sigmoid(flat)
    return flat


@dataclass(frozen=True)
class Boxes:
    """N boxes (x0, y0, x1, y1) in input pixels, best score first, with scores and class indices."""

    boxes: Array
    scores: Array
    classes: NDArray[np.int64]


@dataclass(frozen=True)
class BoxRules:
    """How a card says that boxes are written and chosen."""

    decoder: str
    box: str = "cxcywh"
    normalised: bool = False
    iou_limit: float = 0.45
    max_boxes: int = 100
    extra: int = 0


def yolox_cells(input_hw: tuple[int, int]) -> Array:
    """(column, row, stride) of each cell that YOLOX (Ge et al., 2021) gives a box, in its order: A x 3."""
    cells = []
    for stride in YOLOX_STRIDES:
        rows, columns = np.meshgrid(np.arange(input_hw[0] // stride), np.arange(input_hw[1] // stride), indexing="ij")
        cells.append(np.stack([columns.ravel(), rows.ravel(), np.full(rows.size, stride)], 1))
    return np.concatenate(cells).astype(np.float32)


def dense_scores(outputs: Mapping[str, Array], decoder: str, extra: int = 0) -> Array | None:
    """Scores of every box the network considered, A x K, before any choice; None where the choice lies inside the graph. The last
    `extra` numbers of a box are no scores."""
    if decoder in ("yolov5", "yolox"):
        rows = np.asarray(outputs["main"], np.float32).reshape(-1, outputs["main"].shape[-1])
        return np.asarray(rows[:, 4:5] * rows[:, 5 : rows.shape[1] - extra], np.float32)
    if decoder == "yolov8":
        rows = np.asarray(outputs["main"], np.float32)[0].T
        return np.asarray(rows[:, 4 : rows.shape[1] - extra], np.float32)
    if decoder == "boxes-scores" and "classes" not in outputs:
        scores = np.asarray(outputs["scores"], np.float32)[0]
        count = np.asarray(outputs["boxes"]).reshape(-1, 4).shape[0]
        return scores if scores.shape[0] == count else scores.T
    return None


def boxes(outputs: Mapping[str, Array], rules: BoxRules, input_hw: tuple[int, int], score_limit: float) -> Boxes:
    """Outputs by role -> boxes of at least `score_limit`; suppressed class by class where the graph has not done so."""
    dense = dense_scores(outputs, rules.decoder, rules.extra)
    if dense is not None:
        raw = _dense_boxes(outputs, rules.decoder, input_hw)
        classes = dense.argmax(1) if dense.shape[1] else np.zeros(len(dense), np.int64)
        scores = dense.max(1, initial=0.0)
    else:
        raw, scores, classes = _chosen(outputs, rules.decoder)
    finite = np.isfinite(raw).all(1) & np.isfinite(scores)
    keep = np.flatnonzero((scores >= score_limit) & (scores > 0) & finite)
    keep = keep[np.argsort(-scores[keep], kind="stable")][:MAX_CANDIDATES]
    found = _corners(raw[keep], rules, input_hw)
    # A box without a side overlaps nothing, itself included.
    solid = (found[:, 2:] > found[:, :2]).all(1)
    found, keep = found[solid], keep[solid]
    scores, classes = scores[keep], np.asarray(classes[keep], np.int64)
    if dense is not None:
        best = nms_by_class(found, scores, classes, rules.iou_limit, rules.max_boxes)
    else:
        best = np.argsort(-scores, kind="stable")
    best = best[: rules.max_boxes]
    return Boxes(found[best], np.asarray(scores[best], np.float32), classes[best])


def _dense_boxes(outputs: Mapping[str, Array], decoder: str, input_hw: tuple[int, int]) -> Array:
    if decoder in ("yolov5", "yolox"):
        rows = np.asarray(outputs["main"], np.float32).reshape(-1, outputs["main"].shape[-1])[:, :4]
        if decoder == "yolov5":
            return rows
        cells = yolox_cells(input_hw)
        with np.errstate(over="ignore"):  # an infinite size is dropped with what is not finite
            return np.concatenate([(rows[:, :2] + cells[:, :2]) * cells[:, 2:], np.exp(rows[:, 2:]) * cells[:, 2:]], 1)
    if decoder == "yolov8":
        return np.asarray(outputs["main"], np.float32)[0].T[:, :4]
    return np.asarray(outputs["boxes"], np.float32).reshape(-1, 4)


def _chosen(outputs: Mapping[str, Array], decoder: str) -> tuple[Array, Array, NDArray[np.int64]]:
    """Boxes, scores and classes of a graph that has suppressed already."""
    if decoder == "boxes-scores":
        raw = np.asarray(outputs["boxes"], np.float32).reshape(-1, 4)
        scores = np.asarray(outputs["scores"], np.float32).reshape(-1)
        classes = np.asarray(outputs["classes"]).reshape(-1)
        count = len(raw) if "count" not in outputs else int(np.clip(np.asarray(outputs["count"]).reshape(-1)[0], 0, len(raw)))
        return raw[:count], scores[:count], classes[:count].astype(np.int64)
    rows = np.asarray(outputs["main"], np.float32)
    rows = rows.reshape(-1, rows.shape[-1])
    if rows.shape[1] == 7:  # image, x0, y0, x1, y1, class, score
        return rows[:, 1:5], rows[:, 6], rows[:, 5].astype(np.int64)
    if decoder == "nms-class-first":  # class, score, x0, y0, x1, y1
        return rows[:, 2:6], rows[:, 1], rows[:, 0].astype(np.int64)
    return rows[:, :4], rows[:, 4], rows[:, 5].astype(np.int64)


def _corners(raw: Array, rules: BoxRules, input_hw: tuple[int, int]) -> Array:
    out = np.asarray(raw, np.float32).reshape(-1, 4).copy()
    if rules.box == "cxcywh":
        half = out[:, 2:] / 2
        out = np.concatenate([out[:, :2] - half, out[:, :2] + half], 1)
    elif rules.box == "yxyx":
        out = out[:, [1, 0, 3, 2]]
    if rules.normalised:
        out = out * np.array([input_hw[1], input_hw[0], input_hw[1], input_hw[0]], np.float32)
    return np.asarray(out, np.float32)


def segment(output: Array, decoder: str) -> NDArray[np.int64]:
    """The output of a segmenter -> h x w class of each pixel; with one channel, or independent classes, 0 is "none of them"."""
    x = np.asarray(output, np.float32)
    if decoder == "labels":
        return np.asarray(x.reshape(x.shape[-2:]).round(), np.int64)
    planes = x.reshape(-1, *x.shape[-2:])
    if decoder == "argmax" and len(planes) > 1:
        return np.asarray(planes.argmax(0), np.int64)
    sure = planes if decoder == "probability" else sigmoid(planes)
    return np.asarray(np.where(sure.max(0) > 0.5, sure.argmax(0) + 1, 0), np.int64)


def ctc(output: Array) -> tuple[int, ...]:
    """1 x steps x letters -> the letters' indices: the best of each step, repeats merged, blanks (index 0) dropped."""
    best = np.asarray(output)[0].argmax(-1)
    changed = np.concatenate([[True], best[1:] != best[:-1]]) if len(best) else np.zeros(0, bool)
    return tuple(int(b) for b in best[changed & (best != 0)])


def edit_distance(a: Sequence[int], b: Sequence[int]) -> int:
    """Fewest insertions, deletions and replacements that turn `a` into `b` (Levenshtein)."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        previous, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (x != y))
    return row[-1]
