"""A YOLOv8-nano kind with efficient channel attention in its neck."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from models.shelf import yolov8_nano

if TYPE_CHECKING:
    from torch import nn

DESIGN = replace(
    yolov8_nano.DESIGN,
    title="YOLOv8-nano kind with ECA",
    paper="Wang et al., ECA-Net: efficient channel attention for deep convolutional neural networks, CVPR 2020; in YOLOv8 for discs: "
    "GE-YOLOv8 (Guo 2025)",
    differences=(
        *yolov8_nano.DESIGN.differences,
        "ECA behind each of the four joins of the neck, kernel 3; the gradient search of GE-YOLOv8 is not here.",
    ),
)


def network(pretrained: bool = False) -> nn.Module:
    """N x 1 x H x W -> the shipped detector's outputs; there are no weights to start from."""
    del pretrained
    return yolov8_nano.build(attention=True)
