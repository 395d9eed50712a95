"""MRU-Net: a MobileNetV2 encoder under a decoder of residual steps; the Mobile-UNet of the field."""

from __future__ import annotations

from typing import TYPE_CHECKING

from models.segmenter import SPEC
from models.shelf.blocks import climb, inverted_residual, unit
from models.shelf.design import Design

if TYPE_CHECKING:
    from torch import nn

DESIGN = Design(
    title="MRU-Net (Mobile-UNet)",
    family="segmenter",
    paper="MRU-Net, MobileNetV2 with a residual U-Net (as the survey of 2024 describes it); encoder: Sandler et al., CVPR 2018; "
    "residual steps: Zhang et al., Road extraction by deep residual U-Net, IEEE GRSL 2018",
    differences=(
        "Built from the survey's description; half width, one input channel.",
        "The encoder ends at stride 16; logits at half the input size.",
    ),
    heatmap_kind="class-evidence",
    heatmap_output="logits",
    heatmap_layer="head",
    outputs=("logits",),
)

STEM = 16
LEVELS = (((1, 8, 1, 1),), ((6, 16, 2, 2),), ((6, 16, 3, 2),), ((6, 32, 4, 2), (6, 48, 3, 1)))  # strides 2, 4, 8, 16
WIDTHS = (40, 32, 24)  # of the decoder at strides 8, 4, 2


def _residual(cin: int, cout: int) -> nn.Module:
    from torch import Tensor, nn

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(unit(cin, cout, 3), unit(cout, cout, 3, act="none"))
            self.past = unit(cin, cout, act="none")

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.relu(self.body(x) + self.past(x))

    return Residual()


def network(pretrained: bool = False) -> nn.Module:
    """N x 1 x H x W -> logits N x 4 x H/2 x W/2; there are no weights to start from."""
    from torch import Tensor, nn

    del pretrained

    class MruNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            cin = STEM
            self.down = nn.ModuleList()
            skips = []
            for i, level in enumerate(LEVELS):
                blocks: list[nn.Module] = [unit(1, STEM, 3, 2, "relu6")] if i == 0 else []
                for expand, cout, repeats, stride in level:
                    for k in range(repeats):
                        blocks.append(inverted_residual(cin, cin * expand, cout, 3, stride if k == 0 else 1))
                        cin = cout
                self.down.append(nn.Sequential(*blocks))
                skips.append(cin)
            self.up = nn.ModuleList()
            for skip, width in zip(skips[-2::-1], WIDTHS, strict=True):
                self.up.append(_residual(cin + skip, width))
                cin = width
            self.head = nn.Conv2d(cin, len(SPEC.classes), 1)

        def forward(self, x: Tensor) -> Tensor:
            skips: list[Tensor] = []
            for down in self.down:
                x = down(x)
                skips.append(x)
            logits: Tensor = self.head(climb(x, skips, self.up))
            return logits

    return MruNet()
