"""A YOLOv5-nano kind: anchors, and one head for box, objectness and class. Loss and decoding are its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kernels.nms import nms_by_class
from models.detector import CANDIDATE_SCORE, MAX_CANDIDATES, SPEC, STRIDES, Detections
from models.shelf.blocks import yolo
from models.shelf.design import Design

if TYPE_CHECKING:
    from torch import Tensor, nn

DESIGN = Design(
    title="YOLOv5-nano kind",
    family="detector",
    paper="Jocher et al., Ultralytics YOLOv5, 2020 (no paper; built from the published description); anchors after Redmon & Farhadi, "
    "YOLO9000, CVPR 2017",
    differences=(
        "One input channel; channels 16, 32, 64, 96, 128 instead of 16, 32, 64, 128, 256.",
        "Anchors by k-means over the training boxes. Each head's convolution is split into class, objectness and box outputs, which "
        "computes the same and keeps them in ranges of their own.",
        "The stem is a 3 x 3 convolution of stride 2 instead of 6 x 6.",
    ),
    heatmap_kind="class-evidence",
    heatmap_output="evidence_8",
    heatmap_layer="class_heads.0",
    heatmap_note="class logit at stride 8, the greatest over the three anchors; objectness is not in it",
    outputs=("class_8", "class_16", "class_32", "object_8", "object_16", "object_32", "box_8", "box_16", "box_32", "evidence_8"),
)

WIDTHS = (16, 32, 64, 96, 128)
REPEATS = (1, 2, 3, 1)
PER_PLACE = 3
# Width and height in pixels of a 384 x 384 input, three for each stride.
ANCHORS = np.array((((37, 10), (39, 19), (27, 31)), ((54, 17), (40, 32), (59, 26)), ((53, 44), (86, 34), (72, 61))), np.float32)
MATCH = 4.0  # an anchor teaches a box whose sides are at most this much longer or shorter
OBJECT_WEIGHTS = (4.0, 1.0, 0.4)  # of the strides: fine maps have many empty places


def network(pretrained: bool = False) -> nn.Module:
    """N x 1 x H x W -> for each stride s: class_s N x 9, object_s N x 3, box_s N x 12 x H/s x W/s (anchor-major); last
    evidence_8 N x 3. There are no weights to start from."""
    from torch import nn

    del pretrained
    kinds = len(SPEC.classes)

    class YoloV5(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk = yolo("c3", WIDTHS, REPEATS, attention=False)

            def heads(values: int) -> nn.ModuleList:
                return nn.ModuleList([nn.Conv2d(w, PER_PLACE * values, 1) for w in WIDTHS[2:]])

            self.class_heads, self.object_heads, self.box_heads = heads(kinds), heads(1), heads(4)
            for head in self.object_heads:
                nn.init.constant_(head.bias, -4.6)

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            maps = self.trunk(x)
            classes, objects, boxes = (
                [head(m) for head, m in zip(own, maps, strict=True)] for own in (self.class_heads, self.object_heads, self.box_heads)
            )
            first, second, third = classes[0].split(kinds, 1)
            return (*classes, *objects, *boxes, first.maximum(second).maximum(third))

    return YoloV5()


def loss(base: Callable[..., Tensor], out: Any, batch: dict[str, Tensor]) -> Tensor:
    """YOLOv5's: a box is taught by every anchor of fitting shape at its own cell and the two nearest neighbours; CIoU, BCE.

    Where a picture's labels lack a class, an empty place is not held against it: what lies there may be of that class.
    """
    import torch
    from torch.nn import functional as f

    from models.detection_loss import ciou

    del base
    boxes, kinds, known = batch["boxes"], batch["kinds"], batch["known"]
    whole = (known.min(1).values > 0).float()
    which = (kinds >= 0).nonzero()
    truth, kind = boxes[which[:, 0], which[:, 1]], kinds[which[:, 0], which[:, 1]]
    total = torch.zeros(())
    for level, stride in enumerate(STRIDES):
        class_map, object_map, box_map = (out[3 * k + level].float() for k in range(3))
        rows, columns = object_map.shape[2:]
        anchors = torch.from_numpy(ANCHORS[level]).to(boxes.device)
        centre, sides = (truth[:, :2] + truth[:, 2:]) / 2 / stride, truth[:, 2:] - truth[:, :2]
        ratio = sides[None] / anchors[:, None]
        fits = torch.maximum(ratio, 1 / ratio.clamp(min=1e-6)).amax(2) < MATCH  # anchors x boxes
        part = centre - centre.floor()
        near = torch.tensor([[0, 0], [-1, 0], [1, 0], [0, -1], [0, 1]])
        taken = torch.stack(
            [torch.ones(len(truth), dtype=torch.bool), part[:, 0] < 0.5, part[:, 0] >= 0.5, part[:, 1] < 0.5, part[:, 1] >= 0.5]
        )
        a, t, o = (fits[:, :, None] & taken.T[None]).nonzero().T
        cell = centre[t].floor().long() + near[o]
        inside = ((cell >= 0) & (cell < torch.tensor([columns, rows]))).all(1)
        a, t, cell = a[inside], t[inside], cell[inside]
        image, x, y = which[t, 0], cell[:, 0], cell[:, 1]
        target = torch.zeros_like(object_map)
        if len(t):
            raw = box_map.unflatten(1, (PER_PLACE, 4))[image, a, :, y, x].sigmoid()
            middle = (raw[:, :2] * 2 - 0.5 + cell) * stride
            size = (raw[:, 2:] * 2) ** 2 * anchors[a]
            iou, complete = ciou(torch.cat([middle - size / 2, middle + size / 2], 1), truth[t])
            target[image, a, y, x] = iou.detach().clamp(min=0)
            scores = class_map.unflatten(1, (PER_PLACE, len(SPEC.classes)))[image, a, :, y, x]
            total = total + 2.5 * (1 - complete).mean()
            total = total + 0.5 * f.binary_cross_entropy_with_logits(scores, f.one_hot(kind[t], len(SPEC.classes)).float())
        entropy = f.binary_cross_entropy_with_logits(object_map, target, reduction="none")
        counts = torch.where(target > 0, torch.ones_like(target), whole[:, None, None, None].expand_as(target))
        total = total + 10 * OBJECT_WEIGHTS[level] * (entropy * counts).sum() / counts.sum().clamp(min=1)
    return total


def decode(outputs: dict[str, NDArray[np.float32]], score_limit: float = CANDIDATE_SCORE, iou_limit: float = 0.5) -> Detections:
    """One image's outputs (batch of 1) -> boxes after per-class NMS, best score first; score = objectness x class."""
    boxes, scores, classes = [], [], []
    for level, stride in enumerate(STRIDES):
        logits = outputs[f"class_{stride}"][0]
        rows, columns = logits.shape[1:]
        chance = _sigmoid(logits.reshape(PER_PLACE, -1, rows, columns)) * _sigmoid(outputs[f"object_{stride}"][0])[:, None]
        a, kind, row, column = np.nonzero(chance > score_limit)
        if kind.size > MAX_CANDIDATES:
            best = np.argpartition(-chance[a, kind, row, column], MAX_CANDIDATES)[:MAX_CANDIDATES]
            a, kind, row, column = a[best], kind[best], row[best], column[best]
        raw = _sigmoid(outputs[f"box_{stride}"][0].reshape(PER_PLACE, 4, rows, columns)[a, :, row, column])
        middle = (raw[:, :2] * 2 - 0.5 + np.stack([column, row], 1)) * stride
        half = (raw[:, 2:] * 2) ** 2 * ANCHORS[level][a] / 2
        boxes.append(np.concatenate([middle - half, middle + half], 1))
        scores.append(chance[a, kind, row, column])
        classes.append(kind)
    all_boxes, all_scores = np.concatenate(boxes).astype(np.float32), np.concatenate(scores).astype(np.float32)
    all_classes = np.concatenate(classes)
    order = nms_by_class(all_boxes, all_scores, all_classes, iou_limit)
    return Detections(all_boxes[order], all_scores[order], all_classes[order])


def _sigmoid(x: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.asarray(0.5 * (1.0 + np.tanh(0.5 * x)), np.float32)
