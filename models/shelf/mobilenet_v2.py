"""MobileNetV2 at half width, as a grader."""

from __future__ import annotations

from typing import TYPE_CHECKING

from models.shelf.blocks import classifier, inverted_residual, unit
from models.shelf.design import TASKS, Design

if TYPE_CHECKING:
    from torch import nn

DESIGN = Design(
    title="MobileNetV2 0.5",
    family="grader",
    paper="Sandler et al., MobileNetV2: inverted residuals and linear bottlenecks, CVPR 2018",
    differences=(
        "Half width, one input channel.",
        "The last stage keeps stride 16, so that the map has 8 x 8 cells instead of 4 x 4.",
        "256 features before the pooling instead of 1280.",
    ),
    heatmap_kind="cam",
    heatmap_output="cam",
    heatmap_layer="features",
    outputs=("logits",),
)

# (expand ratio, channels at half width, repeats, stride), table 2 of the paper
STAGES = ((1, 8, 1, 1), (6, 16, 2, 2), (6, 16, 3, 2), (6, 32, 4, 2), (6, 48, 3, 1), (6, 80, 3, 1), (6, 160, 1, 1))
STEM = 16


def network(pretrained: bool = False) -> nn.Module:
    """N x 1 x 128 x 128 -> logits N x 8; there are no weights to start from."""
    from torch import nn

    del pretrained
    blocks: list[nn.Module] = [unit(1, STEM, 3, 2, "relu6")]
    cin = STEM
    for expand, cout, repeats, stride in STAGES:
        for i in range(repeats):
            blocks.append(inverted_residual(cin, cin * expand, cout, 3, stride if i == 0 else 1))
            cin = cout
    return classifier(nn.Sequential(*blocks), cin, len(TASKS[DESIGN.family].classes))
