"""Detector: boxes of vertebrae, discs and the first sacral segment on sagittal lumbar MRI.

YOLOv8-nano kind: anchor-free, decoupled heads, distribution focal regression (Li et al., NeurIPS 2020) on strides 8, 16
and 32, over an EfficientNet-Lite0 trunk. The sacrum is detected so that levels can be counted from it; it is never a
finding of its own. The class logits of each stride are outputs of their own, so that boxes and scores never share one
INT8 range, and they are the class-evidence map.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kernels.nms import nms_by_class
from models.family import Spec

if TYPE_CHECKING:
    from torch import nn

STRIDES = (8, 16, 32)
BINS = 8  # distances of 0..7 strides
SPEC = Spec(
    name="detector",
    task="detection",
    version="1",
    input_hw=(384, 384),
    classes=("vertebra", "disc", "sacrum"),
    outputs=("class_8", "class_16", "class_32", "box_8", "box_16", "box_32"),
    heatmap_output="class_8",
    heatmap_kind="class-evidence",
    heatmap_layer="class_heads.0",
)
CANDIDATE_SCORE = 0.05  # below this a cell is not decoded
MAX_CANDIDATES = 600


def network(pretrained: bool = False) -> nn.Module:
    """N x 1 x H x W in [-1, 1] -> class_8, class_16, class_32 (N x 3 x H/s x W/s) and box_8, ... (N x 32 x H/s x W/s)."""
    import torch
    from torch import Tensor, nn

    from models.backbone import conv_bn_act, csp, inverted_residual, trunk

    class Detector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stages, channels = trunk(last_stage=4, pretrained=pretrained)
            c3, c4, c5 = channels[2], channels[4], 128
            self.deep = nn.Sequential(inverted_residual(c4, c5, 5, 2, 4), inverted_residual(c5, c5, 5, 1, 4))
            self.down4 = csp(c5 + c4, 96)
            self.down3 = csp(96 + c3, 64)
            self.to4 = conv_bn_act(64, 64, 3, 2)
            self.up4 = csp(64 + 96, 96)
            self.to5 = conv_bn_act(96, 96, 3, 2)
            self.up5 = csp(96 + c5, 128)
            widths = (64, 96, 128)
            self.class_stems = nn.ModuleList([conv_bn_act(w, 64, 3) for w in widths])
            self.box_stems = nn.ModuleList([conv_bn_act(w, 64, 3) for w in widths])
            self.class_heads = nn.ModuleList([nn.Conv2d(64, len(SPEC.classes), 1) for _ in widths])
            self.box_heads = nn.ModuleList([nn.Conv2d(64, 4 * BINS, 1) for _ in widths])
            for head in self.class_heads:
                nn.init.constant_(head.bias, -4.6)  # prior of 1 % a cell, as in RetinaNet

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            features: list[Tensor] = []
            for stage in self.stages:
                x = stage(x)
                features.append(x)
            p3, p4 = features[2], features[4]
            p5 = self.deep(p4)
            n4 = self.down4(torch.cat([nn.functional.interpolate(p5, scale_factor=2, mode="nearest"), p4], 1))
            n3 = self.down3(torch.cat([nn.functional.interpolate(n4, scale_factor=2, mode="nearest"), p3], 1))
            n4 = self.up4(torch.cat([self.to4(n3), n4], 1))
            n5 = self.up5(torch.cat([self.to5(n4), p5], 1))
            levels = (n3, n4, n5)
            classes = [h(s(f)) for h, s, f in zip(self.class_heads, self.class_stems, levels, strict=True)]
            boxes = [h(s(f)) for h, s, f in zip(self.box_heads, self.box_stems, levels, strict=True)]
            return (*classes, *boxes)

    return Detector()


@dataclass(frozen=True)
class Detections:
    """N boxes (x0, y0, x1, y1) in input pixels, scores in [0, 1], class indices into SPEC.classes."""

    boxes: NDArray[np.float32]
    scores: NDArray[np.float32]
    classes: NDArray[np.int64]


def decode(
    outputs: dict[str, NDArray[np.float32]],
    score_limit: float = CANDIDATE_SCORE,
    iou_limit: float = 0.5,
    strides: tuple[int, ...] = STRIDES,
) -> Detections:
    """One image's outputs (batch of 1) -> boxes after per-class NMS, best score first. `strides` are those of the maps' names."""
    boxes, scores, classes = [], [], []
    for stride in strides:
        logits = outputs[f"class_{stride}"][0]
        limit = float(np.log(score_limit / (1 - score_limit)))
        kind, row, column = np.nonzero(logits > limit)
        if kind.size == 0:
            continue
        if kind.size > MAX_CANDIDATES:
            best = np.argpartition(-logits[kind, row, column], MAX_CANDIDATES)[:MAX_CANDIDATES]
            kind, row, column = kind[best], row[best], column[best]
        bins = outputs[f"box_{stride}"][0].reshape(4, BINS, *logits.shape[1:])[:, :, row, column]
        bins = np.exp(bins - bins.max(axis=1, keepdims=True))
        distance = (bins * np.arange(BINS, dtype=np.float32)[None, :, None]).sum(1) / bins.sum(1) * stride
        x, y = (column + 0.5) * stride, (row + 0.5) * stride
        boxes.append(np.stack([x - distance[0], y - distance[1], x + distance[2], y + distance[3]], 1))
        scores.append(1 / (1 + np.exp(-logits[kind, row, column])))
        classes.append(kind)
    if not boxes:
        return Detections(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64))
    all_boxes = np.concatenate(boxes).astype(np.float32)
    all_scores = np.concatenate(scores).astype(np.float32)
    all_classes = np.concatenate(classes)
    kept = nms_by_class(all_boxes, all_scores, all_classes, iou_limit)
    return Detections(all_boxes[kept], all_scores[kept], all_classes[kept])
