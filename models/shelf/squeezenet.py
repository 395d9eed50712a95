"""SqueezeNet 1.1, as a grader."""

from __future__ import annotations

from typing import TYPE_CHECKING

from models.shelf.blocks import unit
from models.shelf.design import TASKS, Design

if TYPE_CHECKING:
    from torch import nn

DESIGN = Design(
    title="SqueezeNet 1.1",
    family="grader",
    paper="Iandola et al., SqueezeNet: AlexNet-level accuracy with 50x fewer parameters, arXiv 1602.07360, 2016; version 1.1",
    differences=(
        "One input channel; batch norm behind every convolution, because nothing pretrained exists to start from.",
        "No ReLU behind the last convolution: with it the map could not speak against a class.",
    ),
    heatmap_kind="cam",
    heatmap_output="cam",
    heatmap_layer="head",
    heatmap_note="no linear layer: the last convolution is the map, its mean over the places is the logit",
    outputs=("logits", "cam"),
)

# (squeezed, expanded) of each fire module; None is a max-pooling
STAGES = (None, (16, 64), (16, 64), None, (32, 128), (32, 128), None, (48, 192), (48, 192), (64, 256), (64, 256))
STEM = 64


def _fire(cin: int, squeezed: int, expanded: int) -> nn.Module:
    import torch
    from torch import Tensor, nn

    class Fire(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.squeeze = unit(cin, squeezed)
            self.narrow, self.wide = unit(squeezed, expanded), unit(squeezed, expanded, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.squeeze(x)
            return torch.cat([self.narrow(y), self.wide(y)], 1)

    return Fire()


def network(pretrained: bool = False) -> nn.Module:
    """N x 1 x 128 x 128 -> logits N x 8, in use beside them the map N x 8 x 8 x 8; there are no weights to start from."""
    from torch import Tensor, nn

    del pretrained

    class SqueezeNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            blocks: list[nn.Module] = [unit(1, STEM, 3, 2)]
            cin = STEM
            for stage in STAGES:
                if stage is None:
                    blocks.append(nn.MaxPool2d(3, 2, 1))
                else:
                    blocks.append(_fire(cin, *stage))
                    cin = 2 * stage[1]
            self.trunk = nn.Sequential(*blocks)
            self.drop = nn.Dropout(0.3)
            self.head = nn.Conv2d(cin, len(TASKS[DESIGN.family].classes), 1)

        def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
            cam: Tensor = self.head(self.drop(self.trunk(x)))
            logits = cam.mean((2, 3))
            return logits if self.training else (logits, cam)

    return SqueezeNet()
