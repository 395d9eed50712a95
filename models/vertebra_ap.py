"""Vertebra detector: one box for each thoracic and lumbar vertebra on a frontal (AP or PA) radiograph of the spine.

The kind of `models/detector.py` (anchor-free, decoupled heads, distribution focal regression) made smaller: an
EfficientNet-Lite0 trunk that ends before its widest stage, a feature pyramid, heads on strides 8 and 16. The input is tall,
as the pictures are. Boxes are upright; how much a vertebra is tilted is geometry (`kernels/cobb.py`), not learnt. Cervical
vertebrae and the sacrum are background.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from models import detector
from models.family import Spec

if TYPE_CHECKING:
    from torch import nn

STRIDES = (8, 16)
SPEC = Spec(
    name="vertebra_ap",
    task="detection",
    version="2",
    input_hw=(448, 256),
    classes=("vertebra",),
    outputs=("class_8", "class_16", "box_8", "box_16"),
    heatmap_output="class_8",
    heatmap_kind="class-evidence",
    heatmap_layer="class_heads.0",
)


def network(pretrained: bool = False) -> nn.Module:
    """N x 1 x H x W in [-1, 1] -> class_8, class_16 (N x 1 x H/s x W/s), box_8, box_16 (N x 32 x H/s x W/s)."""
    import torch
    from torch import Tensor, nn

    from models.backbone import conv_bn_act, csp, inverted_residual, trunk

    class Detector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stages, channels = trunk(last_stage=3, pretrained=pretrained)
            c3, c4 = channels[2], channels[3]
            self.deep = nn.Sequential(inverted_residual(c4, c4, 5, 2, 3), inverted_residual(c4, c4, 5, 1, 3))
            self.down4 = csp(2 * c4, 64)
            self.down3 = csp(64 + c3, 48)
            widths = (48, 64)
            self.class_stems = nn.ModuleList([conv_bn_act(w, 32, 3) for w in widths])
            self.box_stems = nn.ModuleList([conv_bn_act(w, 32, 3) for w in widths])
            self.class_heads = nn.ModuleList([nn.Conv2d(32, len(SPEC.classes), 1) for _ in widths])
            self.box_heads = nn.ModuleList([nn.Conv2d(32, 4 * detector.BINS, 1) for _ in widths])
            for head in self.class_heads:
                nn.init.constant_(head.bias, -4.6)  # prior of 1 % a cell, as in RetinaNet

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            features: list[Tensor] = []
            for stage in self.stages:
                x = stage(x)
                features.append(x)
            p3, p4 = features[2], features[3]
            p5 = self.deep(p4)
            n4 = self.down4(torch.cat([nn.functional.interpolate(p5, scale_factor=2, mode="nearest"), p4], 1))
            n3 = self.down3(torch.cat([nn.functional.interpolate(n4, scale_factor=2, mode="nearest"), p3], 1))
            levels = (n3, n4)
            classes = [h(s(f)) for h, s, f in zip(self.class_heads, self.class_stems, levels, strict=True)]
            boxes = [h(s(f)) for h, s, f in zip(self.box_heads, self.box_stems, levels, strict=True)]
            return (*classes, *boxes)

    return Detector()


def decode(outputs: dict[str, NDArray[np.float32]], score_limit: float = detector.CANDIDATE_SCORE) -> detector.Detections:
    """One image's outputs (batch of 1) -> boxes in input pixels, best score first.

    Neighbouring vertebrae of a strong curve overlap as upright boxes do, hence a looser suppression than elsewhere.
    """
    return detector.decode(outputs, score_limit, iou_limit=0.6, strides=STRIDES)
