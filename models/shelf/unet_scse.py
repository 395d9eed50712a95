"""U-Net with spatial and channel squeeze-and-excitation behind each step."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from models.segmenter import SPEC
from models.shelf import unet
from models.shelf.blocks import unet as build

if TYPE_CHECKING:
    from torch import nn

DESIGN = replace(
    unet.DESIGN,
    title="scSE U-Net",
    paper="Roy et al., Concurrent spatial and channel squeeze & excitation in fully convolutional networks, MICCAI 2018",
    differences=(*unet.DESIGN.differences, "scSE behind each encoder and decoder step, the greater of both maps."),
)


def network(pretrained: bool = False) -> nn.Module:
    """N x 1 x H x W -> logits N x 4 x H/2 x W/2; there are no weights to start from."""
    del pretrained
    return build(len(SPEC.classes), unet.WIDTHS, attention=True)
