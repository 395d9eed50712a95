"""U-Net, the reference that every segmenter is held against."""

from __future__ import annotations

from typing import TYPE_CHECKING

from models.segmenter import SPEC
from models.shelf.blocks import unet
from models.shelf.design import Design

if TYPE_CHECKING:
    from torch import nn

DESIGN = Design(
    title="U-Net",
    family="segmenter",
    paper="Ronneberger et al., U-Net: convolutional networks for biomedical image segmentation, MICCAI 2015",
    differences=(
        "A stem of stride 2: logits are asked for at half the input size.",
        "Channels 16, 32, 64, 128 instead of 64 to 1024; batch norm; padded convolutions; nearest upsampling instead of transposed "
        "convolutions.",
    ),
    heatmap_kind="class-evidence",
    heatmap_output="logits",
    heatmap_layer="head",
    outputs=("logits",),
)
WIDTHS = (16, 32, 64, 128)


def network(pretrained: bool = False) -> nn.Module:
    """N x 1 x H x W -> logits N x 4 x H/2 x W/2; there are no weights to start from."""
    del pretrained
    return unet(len(SPEC.classes), WIDTHS, attention=False)
