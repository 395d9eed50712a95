"""A YOLOv8-nano kind: anchor-free, class and box in branches of their own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from models.detector import BINS, SPEC
from models.shelf.blocks import decoupled_heads, yolo
from models.shelf.design import Design

if TYPE_CHECKING:
    from torch import nn

DESIGN = Design(
    title="YOLOv8-nano kind",
    family="detector",
    paper="Jocher et al., Ultralytics YOLOv8, 2023 (no paper; built from the published description); "
    "Li et al., Generalized focal loss, NeurIPS 2020",
    differences=(
        "One input channel; channels 16, 32, 64, 96, 128 instead of 16, 32, 64, 128, 256.",
        "Heads of 32 channels and 8 distance bins instead of 64 and 16: a spine's boxes are small.",
        "The shipped detector's loss: task-aligned assignment, CIoU, distribution focal loss.",
    ),
    heatmap_kind="class-evidence",
    heatmap_output="class_8",
    heatmap_layer="class_heads.0",
    outputs=SPEC.outputs,
)

WIDTHS = (16, 32, 64, 96, 128)
REPEATS = (1, 2, 2, 1)
HIDDEN = 32


def build(attention: bool) -> nn.Module:
    """The network, with ECA in its neck where `attention`."""
    trunk = yolo("c2f", WIDTHS, REPEATS, attention)
    return decoupled_heads(trunk, WIDTHS[2:], HIDDEN, len(SPEC.classes), BINS)


def network(pretrained: bool = False) -> nn.Module:
    """N x 1 x H x W -> the shipped detector's outputs; there are no weights to start from."""
    del pretrained
    return build(attention=False)
