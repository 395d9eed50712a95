"""MobileNetV3-small, as a grader."""

from __future__ import annotations

from typing import TYPE_CHECKING

from models.shelf.blocks import Act, classifier, inverted_residual, squeeze_excite, unit
from models.shelf.design import TASKS, Design

if TYPE_CHECKING:
    from torch import nn

DESIGN = Design(
    title="MobileNetV3-small",
    family="grader",
    paper="Howard et al., Searching for MobileNetV3, ICCV 2019",
    differences=(
        "One input channel; the last stage keeps stride 16.",
        "256 features before the pooling, and no hidden layer of 1024 behind it: with it the map would be a Grad-CAM, without it "
        "the map is the class activation map.",
    ),
    heatmap_kind="cam",
    heatmap_output="cam",
    heatmap_layer="features",
    outputs=("logits",),
)

# (kernel, expanded, out, squeeze-and-excitation, activation, stride), table 2 of the paper
STAGES: tuple[tuple[int, int, int, bool, Act, int], ...] = (
    (3, 16, 16, True, "relu", 2),
    (3, 72, 24, False, "relu", 2),
    (3, 88, 24, False, "relu", 1),
    (5, 96, 40, True, "hardswish", 2),
    (5, 240, 40, True, "hardswish", 1),
    (5, 240, 40, True, "hardswish", 1),
    (5, 120, 48, True, "hardswish", 1),
    (5, 144, 48, True, "hardswish", 1),
    (5, 288, 96, True, "hardswish", 1),
    (5, 576, 96, True, "hardswish", 1),
    (5, 576, 96, True, "hardswish", 1),
)
STEM = 16


def network(pretrained: bool = False) -> nn.Module:
    """N x 1 x 128 x 128 -> logits N x 8; there are no weights to start from."""
    from torch import nn

    del pretrained
    blocks: list[nn.Module] = [unit(1, STEM, 3, 2, "hardswish")]
    cin = STEM
    for kernel, mid, cout, attends, act, stride in STAGES:
        se = squeeze_excite(mid, max(8, mid // 4), nn.Hardsigmoid()) if attends else None
        blocks.append(inverted_residual(cin, mid, cout, kernel, stride, act, se))
        cin = cout
    return classifier(nn.Sequential(*blocks), cin, len(TASKS[DESIGN.family].classes), act="hardswish")
