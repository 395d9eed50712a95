"""The large grader that teaches: never compiled, never on a device.

The whole EfficientNet-Lite0 trunk, whose last two stages the shipped grader leaves out, under the same head; it answers to the same
crops, so that its logits can stand beside the labels while a smaller network learns (`models/compress.py`, step `distil`).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from models.grader import SPEC

if TYPE_CHECKING:
    from torch import Tensor, nn

FEATURES = 512


def network(pretrained: bool = False) -> nn.Module:
    """N x 1 x 128 x 128 in [-1, 1] -> logits N x 8: five grades, then herniation, narrowing, bulging."""
    from torch import nn

    from models.backbone import conv_bn_act, trunk

    class Teacher(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stages, channels = trunk(last_stage=6, pretrained=pretrained)
            self.features = conv_bn_act(channels[6], FEATURES)
            self.drop = nn.Dropout(0.5)
            self.head = nn.Linear(FEATURES, len(SPEC.classes))

        def forward(self, x: Tensor) -> Tensor:
            for stage in self.stages:
                x = stage(x)
            logits: Tensor = self.head(self.drop(self.features(x).mean((2, 3))))
            return logits

    return Teacher()


def committee(weights: list[Path], device: str = "cpu") -> nn.Module:
    """Teachers from their final.pt, as one module in eval mode whose logits are the mean of theirs."""
    import torch
    from torch import nn

    class Committee(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.members = nn.ModuleList()
            for path in weights:
                member = network()
                member.load_state_dict(torch.load(path, weights_only=True, map_location="cpu"))
                self.members.append(member)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = sum(m(x) for m in self.members) / len(self.members)  # type: ignore[assignment]
            return out

    return Committee().to(device).eval()
