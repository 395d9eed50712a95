"""EfficientNet-Lite0 to stride 16, as a grader: the trunk of the shipped families."""

from __future__ import annotations

from typing import TYPE_CHECKING

from models.backbone import trunk
from models.shelf.blocks import classifier
from models.shelf.design import IMAGENET, TASKS, Design

if TYPE_CHECKING:
    from torch import nn

DESIGN = Design(
    title="EfficientNet-Lite0",
    family="grader",
    paper="Tan & Le, EfficientNet: rethinking model scaling for convolutional neural networks, ICML 2019; the Lite variant",
    differences=(
        "One input channel: the stem is summed over the colours.",
        "Stages 0 to 4 of seven, which end at stride 16; 256 features before the pooling.",
    ),
    heatmap_kind="cam",
    heatmap_output="cam",
    heatmap_layer="features",
    outputs=("logits",),
    start=IMAGENET,
)


def network(pretrained: bool = False) -> nn.Module:
    """N x 1 x 128 x 128 -> logits N x 8; `pretrained` starts from ImageNet."""
    from torch import nn

    stages, channels = trunk(last_stage=4, pretrained=pretrained)
    return classifier(nn.Sequential(*stages), channels[-1], len(TASKS[DESIGN.family].classes))
