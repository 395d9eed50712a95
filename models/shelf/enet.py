"""ENet: early shrinking, then bottlenecks with dilated and asymmetric convolutions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from models.segmenter import SPEC
from models.shelf.blocks import unit
from models.shelf.design import Design

if TYPE_CHECKING:
    from torch import nn

DESIGN = Design(
    title="ENet",
    family="segmenter",
    paper="Paszke et al., ENet: a deep neural network architecture for real-time semantic segmentation, arXiv 1606.02147, 2016",
    differences=(
        "ReLU instead of PReLU, which the quantiser folds into a range.",
        "Nearest upsampling instead of unpooling by kept indices, which ONNX targets do not share.",
        "Stages 2 and 3 once each as in the paper; logits at half the input size, so the last transposed convolution is left out.",
    ),
    heatmap_kind="class-evidence",
    heatmap_output="logits",
    heatmap_layer="head",
    outputs=("logits",),
)

# Stage 2 of table 1: plain, dilated 2, asymmetric 5, dilated 4, plain, dilated 8, asymmetric 5, dilated 16
STAGE: tuple[dict[str, Any], ...] = (
    {},
    {"dilation": 2},
    {"asymmetric": True},
    {"dilation": 4},
    {},
    {"dilation": 8},
    {"asymmetric": True},
    {"dilation": 16},
)


def _bottleneck(cin: int, cout: int, way: str = "same", dilation: int = 1, asymmetric: bool = False) -> nn.Module:
    """`way`: "same", "down" (stride 2, max-pooled past) or "up" (nearest, both ways)."""
    from torch import Tensor, nn

    mid = cin // 4 if way != "down" else max(cout // 4, 4)

    class Bottleneck(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            first = unit(cin, mid, 2, 2) if way == "down" else unit(cin, mid)
            if way == "down":
                first[0].padding = (0, 0)
            middle = [unit(mid, mid, (5, 1)), unit(mid, mid, (1, 5))] if asymmetric else [unit(mid, mid, 3, dilation=dilation)]
            self.body = nn.Sequential(first, *middle, unit(mid, cout, act="none"), nn.Dropout2d(0.05))
            self.past = unit(cin, cout, act="none") if cin != cout else nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            if way == "up":
                x = nn.functional.interpolate(x, scale_factor=2, mode="nearest")
            past = self.past(nn.functional.max_pool2d(x, 2) if way == "down" else x)
            return nn.functional.relu(self.body(x) + past)

    return Bottleneck()


def network(pretrained: bool = False) -> nn.Module:
    """N x 1 x H x W -> logits N x 4 x H/2 x W/2; there are no weights to start from."""
    import torch
    from torch import Tensor, nn

    del pretrained

    class ENet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.initial = unit(1, 15, 3, 2)
            self.encoder = nn.Sequential(
                _bottleneck(16, 64, "down"),
                *(_bottleneck(64, 64) for _ in range(4)),
                _bottleneck(64, 128, "down"),
                *(_bottleneck(128, 128, **kind) for kind in (*STAGE, *STAGE)),
            )
            self.decoder = nn.Sequential(
                _bottleneck(128, 64, "up"), _bottleneck(64, 64), _bottleneck(64, 64), _bottleneck(64, 16, "up"), _bottleneck(16, 16)
            )
            self.head = nn.Conv2d(16, len(SPEC.classes), 1)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.cat([self.initial(x), nn.functional.max_pool2d(x, 2)], 1)
            logits: Tensor = self.head(self.decoder(self.encoder(x)))
            return logits

    return ENet()
