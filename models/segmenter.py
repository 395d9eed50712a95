"""Segmenter: outlines of vertebrae, discs and the spinal canal on sagittal lumbar MRI.

A Mobile-UNet: EfficientNet-Lite0 trunk to stride 16, a decoder of inverted residuals, logits at half the input size.
The logits are the class-evidence map: the last convolution is the evidence, so the heatmap costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kernels.preprocess import Letterbox
from models.family import Spec

if TYPE_CHECKING:
    from torch import nn

SPEC = Spec(
    name="segmenter",
    task="segmentation",
    version="1",
    input_hw=(384, 384),
    classes=("background", "vertebra", "disc", "canal"),
    outputs=("logits",),
    heatmap_output="logits",
    heatmap_kind="class-evidence",
    heatmap_layer="head",
)

WIDTHS = (64, 40, 32)  # decoder channels at strides 8, 4, 2


def network(pretrained: bool = False) -> nn.Module:
    """The trainable network: N x 1 x H x W in [-1, 1] -> logits N x 4 x H/2 x W/2. H and W are multiples of 16."""
    import torch
    from torch import Tensor, nn

    from models.backbone import conv_bn_act, inverted_residual, trunk

    class MobileUNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stages, channels = trunk(last_stage=4, pretrained=pretrained)
            skips = channels[2::-1]  # strides 8, 4, 2
            cin = channels[4]
            self.up = nn.ModuleList()
            for skip, width in zip(skips, WIDTHS, strict=True):
                self.up.append(
                    nn.Sequential(
                        conv_bn_act(cin + skip, width),
                        inverted_residual(width, width, kernel=3, expand=3),
                        inverted_residual(width, width, kernel=3, expand=3),
                    )
                )
                cin = width
            self.head = nn.Conv2d(cin, len(SPEC.classes), 1)

        def forward(self, x: Tensor) -> Tensor:
            features: list[Tensor] = []
            for stage in self.stages:
                x = stage(x)
                features.append(x)
            for i, up in enumerate(self.up):
                x = nn.functional.interpolate(x, scale_factor=2, mode="nearest")
                x = up(torch.cat([x, features[2 - i]], dim=1))
            logits: Tensor = self.head(x)
            return logits

    return MobileUNet()


def decode(logits: NDArray[np.float32], back: Letterbox) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """logits 1 x 4 x h x w -> (H x W uint8 class indices in source pixels, 4 x h x w evidence as it is).

    One class is brought to source size at a time, so that memory stays at two maps however large the source is.
    """
    evidence = logits[0]
    best = back.map_to_source(evidence[0], outside=np.inf)  # background, for certain
    mask = np.zeros(best.shape, np.uint8)
    for index in range(1, evidence.shape[0]):
        plane = back.map_to_source(evidence[index])
        wins = plane > best
        mask[wins] = index
        np.maximum(best, plane, out=best)
    return mask, evidence
