"""A MobileViT-XXS kind, as a grader: convolutions with transformers between them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from models.shelf.blocks import classifier, inverted_residual, unit
from models.shelf.design import TASKS, Design

if TYPE_CHECKING:
    from torch import nn

DESIGN = Design(
    title="MobileViT-XXS kind",
    family="grader",
    paper="Mehta & Rastegari, MobileViT: light-weight, general-purpose, and mobile-friendly vision transformer, ICLR 2022",
    differences=(
        "One input channel; the last stage keeps stride 16.",
        "Attention runs over single places instead of over 2 x 2 patches: the maps have 256 places and fewer.",
        "Two transformer layers in each block instead of two, four and three.",
        "256 features before the pooling instead of 320.",
    ),
    heatmap_kind="cam",
    heatmap_output="cam",
    heatmap_layer="features",
    heatmap_note="exact in the features, but attention lets every cell see the whole crop before",
    outputs=("logits",),
)

STEM, HEADS, LAYERS = 16, 4, 2
STAGES = ((16, 1, 1, 0), (24, 2, 3, 0), (48, 2, 1, 64), (64, 2, 1, 80), (80, 1, 1, 96))  # (channels, stride, repeats, token width)


def _transformer(width: int) -> nn.Module:
    from torch import Tensor, nn

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
            self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
            self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width))

        def forward(self, x: Tensor) -> Tensor:
            n, places, _ = x.shape
            y = self.norm1(x)
            q, k, v = (f(y).reshape(n, places, HEADS, width // HEADS).transpose(1, 2) for f in (self.q, self.k, self.v))
            weight = (q @ k.transpose(2, 3) * (width // HEADS) ** -0.5).softmax(-1)
            x = x + self.out((weight @ v).transpose(1, 2).reshape(n, places, width))
            out: Tensor = x + self.mlp(self.norm2(x))
            return out

    return Layer()


def _block(channels: int, width: int) -> nn.Module:
    import torch
    from torch import Tensor, nn

    class MobileVitBlock(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.near = nn.Sequential(unit(channels, channels, 3, act="silu"), nn.Conv2d(channels, width, 1, bias=False))
            self.far = nn.Sequential(*(_transformer(width) for _ in range(LAYERS)), nn.LayerNorm(width))
            self.back = unit(width, channels, act="silu")
            self.merge = unit(2 * channels, channels, 3, act="silu")

        def forward(self, x: Tensor) -> Tensor:
            y = self.near(x)
            n, c, h, w = y.shape
            y = self.far(y.reshape(n, c, h * w).transpose(1, 2)).transpose(1, 2).reshape(n, c, h, w)
            out: Tensor = self.merge(torch.cat([x, self.back(y)], 1))
            return out

    return MobileVitBlock()


def network(pretrained: bool = False) -> nn.Module:
    """N x 1 x 128 x 128 -> logits N x 8; there are no weights to start from."""
    from torch import nn

    del pretrained
    blocks: list[nn.Module] = [unit(1, STEM, 3, 2, "silu")]
    cin = STEM
    for cout, stride, repeats, width in STAGES:
        for i in range(repeats):
            blocks.append(inverted_residual(cin, 2 * cin, cout, 3, stride if i == 0 else 1, "silu"))
            cin = cout
        if width:
            blocks.append(_block(cin, width))
    return classifier(nn.Sequential(*blocks), cin, len(TASKS[DESIGN.family].classes), act="silu")
