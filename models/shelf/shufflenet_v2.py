"""ShuffleNetV2 0.5x, as a grader."""

from __future__ import annotations

from typing import TYPE_CHECKING

from models.shelf.blocks import classifier, unit
from models.shelf.design import TASKS, Design

if TYPE_CHECKING:
    from torch import nn

DESIGN = Design(
    title="ShuffleNetV2 0.5x",
    family="grader",
    paper="Ma et al., ShuffleNet V2: practical guidelines for efficient CNN architecture design, ECCV 2018",
    differences=(
        "One input channel; no max-pooling behind the stem, so that the map has 8 x 8 cells.",
        "256 features before the pooling instead of 1024.",
    ),
    heatmap_kind="cam",
    heatmap_output="cam",
    heatmap_layer="features",
    outputs=("logits",),
)

STEM = 24
STAGES = ((48, 4), (96, 8), (192, 4))  # (channels, units), table 5 of the paper


def _unit(cin: int, cout: int, stride: int) -> nn.Module:
    import torch
    from torch import Tensor, nn

    half = cout // 2

    class ShuffleUnit(nn.Module):
        """Half the channels pass by (or are reduced by a branch of their own), half are convolved; then both are interleaved."""

        def __init__(self) -> None:
            super().__init__()
            own = cin if stride == 2 else half
            self.past = nn.Sequential(unit(cin, cin, 3, 2, "none", groups=cin), unit(cin, half)) if stride == 2 else None
            self.body = nn.Sequential(unit(own, half), unit(half, half, 3, stride, "none", groups=half), unit(half, half))

        def forward(self, x: Tensor) -> Tensor:
            if self.past is not None:
                a, b = self.past(x), self.body(x)
            else:
                a, b = x.split(half, 1)
                b = self.body(b)
            n, _, h, w = b.shape
            return torch.cat([a, b], 1).reshape(n, 2, half, h, w).transpose(1, 2).reshape(n, cout, h, w)

    return ShuffleUnit()


def network(pretrained: bool = False) -> nn.Module:
    """N x 1 x 128 x 128 -> logits N x 8; there are no weights to start from."""
    from torch import nn

    del pretrained
    blocks: list[nn.Module] = [unit(1, STEM, 3, 2)]
    cin = STEM
    for cout, repeats in STAGES:
        for i in range(repeats):
            blocks.append(_unit(cin, cout, 2 if i == 0 else 1))
            cin = cout
    return classifier(nn.Sequential(*blocks), cin, len(TASKS[DESIGN.family].classes), act="relu")
