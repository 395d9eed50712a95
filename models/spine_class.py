"""Three-class classifier of a spine radiograph: normal, scoliosis, spondylolisthesis, with an exact class activation map.

The vertebra detector's trunk, taught further end to end; a 1x1 convolution, global average pooling and one linear layer, as in
`models/grader.py`: mean over the map + bias = logit. The trunk's own pooled channels are a second output: the vector by which
`models/familiarity.py` tells a spine radiograph from anything else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from models.family import Spec

if TYPE_CHECKING:
    from torch import nn

SPEC = Spec(
    name="spine_class",
    task="classification",
    version="2",
    input_hw=(320, 224),
    classes=("normal", "scoliosis", "spondylolisthesis"),
    outputs=("logits", "pooled"),
    heatmap_output="cam",
    heatmap_kind="cam",
    heatmap_layer="features",
)
FEATURES = 256
TRUNK_STAGES = 4


def network(pretrained: bool = False, frozen: int = 0) -> nn.Module:
    """N x 1 x 320 x 224 in [-1, 1] -> logits N x 3, pooled N x 80. The first `frozen` of the trunk's TRUNK_STAGES learn nothing."""
    from torch import Tensor, nn

    from models.backbone import conv_bn_act, trunk

    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stages, channels = trunk(last_stage=TRUNK_STAGES - 1, pretrained=pretrained, frozen=frozen)
            self.features = conv_bn_act(channels[3], FEATURES)
            self.drop = nn.Dropout(0.4)
            self.head = nn.Linear(FEATURES, len(SPEC.classes))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            for stage in self.stages:
                x = stage(x)
            logits: Tensor = self.head(self.drop(self.features(x).mean((2, 3))))
            return logits, x.mean((2, 3))

    return Classifier()


@dataclass(frozen=True)
class Classification:
    """The most probable class and the probability of each, in the order of SPEC.classes."""

    name: str
    probabilities: tuple[float, ...]


def decode(logits: NDArray[np.float32], temperature: float = 1.0) -> list[Classification]:
    """N x 3 logits -> one Classification for each image."""
    out = []
    for row in np.asarray(logits, dtype=np.float64) / temperature:
        p = np.exp(row - row.max())
        p /= p.sum()
        out.append(Classification(SPEC.classes[int(p.argmax())], tuple(float(v) for v in p)))
    return out
