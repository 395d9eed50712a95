"""UNet++: nested decoders that each answer, so that a device may stop at the depth that it can pay for."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from models.segmenter import SPEC
from models.shelf.blocks import unit
from models.shelf.design import Design

if TYPE_CHECKING:
    from torch import Tensor, nn

DESIGN = Design(
    title="UNet++",
    family="segmenter",
    paper="Zhou et al., UNet++: redesigning skip connections to exploit multiscale features in image segmentation, IEEE TMI 2020",
    differences=(
        "A stem of stride 2: logits are asked for at half the input size.",
        "Channels 12, 16, 24, 32, 48 instead of 32 to 512; one convolution in each nested node instead of two.",
        "Deep supervision: the loss is the mean over the four depths. In use the deepest answers, or a smaller depth alone: its "
        "deeper nodes are then not in the graph.",
    ),
    heatmap_kind="class-evidence",
    heatmap_output="logits",
    heatmap_layer="heads.3",
    outputs=("logits",),
)

WIDTHS = (12, 16, 24, 32, 48)
DEPTH = len(WIDTHS) - 1


def network(pretrained: bool = False, depth: int = DEPTH) -> nn.Module:
    """N x 1 x H x W -> logits N x 4 x H/2 x W/2; in training a tuple, one for each depth 1..`depth`. There are no weights to
    start from. The state dict of a greater depth fits a smaller one (strict=False)."""
    import torch
    from torch import nn

    del pretrained
    if not 1 <= depth <= DEPTH:
        raise ValueError(f"depth {depth} is not in 1..{DEPTH}")

    class UNetPlusPlus(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = unit(1, WIDTHS[0], 3, 2)
            nodes: dict[str, nn.Module] = {}
            for i in range(depth + 1):
                cin = WIDTHS[max(i - 1, 0)]
                nodes[f"{i}_0"] = nn.Sequential(unit(cin, WIDTHS[i], 3), unit(WIDTHS[i], WIDTHS[i], 3))
                for j in range(1, depth + 1 - i):
                    nodes[f"{i}_{j}"] = unit(j * WIDTHS[i] + WIDTHS[i + 1], WIDTHS[i], 3)
            self.nodes = nn.ModuleDict(nodes)
            self.heads = nn.ModuleList([nn.Conv2d(WIDTHS[0], len(SPEC.classes), 1) for _ in range(depth)])

        def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
            x = self.stem(x)
            rows: list[list[Tensor]] = []
            for i in range(depth + 1):
                x = self.nodes[f"{i}_0"](x if i == 0 else nn.functional.max_pool2d(x, 2))
                rows.append([x])
            for j in range(1, depth + 1):
                for i in range(depth + 1 - j):
                    below = nn.functional.interpolate(rows[i + 1][j - 1], scale_factor=2, mode="nearest")
                    rows[i].append(self.nodes[f"{i}_{j}"](torch.cat([*rows[i], below], 1)))
            if self.training:
                return tuple(head(row) for head, row in zip(self.heads, rows[0][1:], strict=True))
            logits: Tensor = self.heads[depth - 1](rows[0][depth])
            return logits

    return UNetPlusPlus()


def loss(base: Callable[[Tensor, dict[str, Tensor]], Tensor], out: Any, batch: dict[str, Tensor]) -> Tensor:
    """Deep supervision: the mean of the task's loss over the depths."""
    total: Tensor = sum(base(o, batch) for o in out) / len(out)  # type: ignore[assignment]
    return total
