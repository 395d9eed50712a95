"""Grader: Pfirrmann grade and flags of one disc, from a square T2 crop around it.

EfficientNet-Lite0 trunk to stride 16, a 1x1 convolution, global average pooling and one linear layer, so that its class
activation map is exact: mean over the map + bias = logit. Five ordinal grades and three independent flags share the head.
The crop is normalised by itself, so that the coil's shading along the spine does not count as signal.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import cv2
import numpy as np
from numpy.typing import NDArray

from kernels.preprocess import normalise
from models.family import Spec

if TYPE_CHECKING:
    from torch import nn

FLAGS = ("herniation", "narrowing", "bulging")
SPEC = Spec(
    name="grader",
    task="classification",
    version="1",
    input_hw=(128, 128),
    classes=("1", "2", "3", "4", "5", *FLAGS),
    outputs=("logits",),
    heatmap_output="cam",
    heatmap_kind="cam",
    heatmap_layer="features",
)
CROP_WIDTHS = 1.6  # side of the crop in widths of the disc's box
FEATURES = 256


def network(pretrained: bool = False) -> nn.Module:
    """N x 1 x 128 x 128 in [-1, 1] -> logits N x 8: five grades, then herniation, narrowing, bulging."""
    from torch import Tensor, nn

    from models.backbone import conv_bn_act, trunk

    class Grader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stages, channels = trunk(last_stage=4, pretrained=pretrained)
            self.features = conv_bn_act(channels[4], FEATURES)
            self.drop = nn.Dropout(0.4)
            self.head = nn.Linear(FEATURES, len(SPEC.classes))

        def forward(self, x: Tensor) -> Tensor:
            for stage in self.stages:
                x = stage(x)
            pooled = self.features(x).mean((2, 3))
            logits: Tensor = self.head(self.drop(pooled))
            return logits

    return Grader()


def crop_matrix(box: tuple[float, float, float, float], size: int = 128, widths: float = CROP_WIDTHS) -> NDArray[np.float64]:
    """2 x 3 matrix, source pixels -> crop pixels, for a disc box (x0, y0, x1, y1): centred, upright, square."""
    x0, y0, x1, y1 = box
    side = max(x1 - x0, (y1 - y0) * 1.2, 4.0) * widths
    scale = size / side
    cx, cy = (x0 + x1) / 2, (y0 + y1) / 2
    return np.array([[scale, 0.0, size / 2 - cx * scale], [0.0, scale, size / 2 - cy * scale]])


def crop(normalised: NDArray[np.float32], box: tuple[float, float, float, float], widths: float = CROP_WIDTHS) -> NDArray[np.float32]:
    """H x W in [-1, 1] and a disc box in its pixels -> 1 x 128 x 128 float32 in [-1, 1], padded with -1."""
    size = SPEC.input_hw[0]
    matrix = crop_matrix(box, size, widths)
    shrink = matrix[0, 0] < 0.7
    if shrink:  # a plain bilinear warp would alias; blur to the output's sampling first
        x0, y0, x1, y1 = box
        pad = max(x1 - x0, y1 - y0)
        rows = slice(max(0, int(y0 - pad)), max(1, int(y1 + pad)))
        columns = slice(max(0, int(x0 - pad)), max(1, int(x1 + pad)))
        normalised = normalised.copy()
        normalised[rows, columns] = cv2.GaussianBlur(normalised[rows, columns], (0, 0), 0.45 / matrix[0, 0])
    # Box edges are pixel edges; warpAffine addresses pixel centres.
    shifted = matrix.copy()
    shifted[:, 2] += 0.5 * (matrix[0, 0] - 1.0)
    warped = cv2.warpAffine(normalised, shifted, (size, size), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT, borderValue=-1.0)
    return normalise(np.asarray(warped, dtype=np.float32))[None]


@dataclass(frozen=True)
class Grade:
    """Pfirrmann grade 1 to 5 (most probable), its five probabilities, and a probability for each flag.

    `plausible`: the conformal set, grades from the lowest up, the most probable always among them; () where no threshold is known.
    `basis`: for a fused grade what the expected grade consists of, in grades, by what was looked at.
    """

    grade: int
    probabilities: tuple[float, ...]
    flags: dict[str, float]
    plausible: tuple[int, ...] = ()
    basis: dict[str, float] = field(default_factory=dict)


def decode(logits: NDArray[np.float32], temperatures: Mapping[str, float] | None = None, threshold: float | None = None) -> list[Grade]:
    """N x 8 logits -> one Grade for each disc.

    `temperatures` divide the logits of "pfirrmann" and of each flag (Guo et al., ICML 2017; 1 where not named); a grade is plausible
    where 1 - its probability is at most `threshold` (split conformal sets, Vovk et al., 2005). No temperature changes the grade.
    """
    t = temperatures or {}
    own = np.array([t.get("pfirrmann", 1.0)] * 5 + [t.get(name, 1.0) for name in FLAGS])
    out = []
    for row in np.asarray(logits, dtype=np.float64) / own:
        p = np.exp(row[:5] - row[:5].max())
        p /= p.sum()
        flags = 1 / (1 + np.exp(-row[5:8]))
        best = int(p.argmax())
        plausible = () if threshold is None else tuple(k + 1 for k in range(5) if k == best or 1 - p[k] <= threshold)
        named = dict(zip(FLAGS, (float(f) for f in flags), strict=True))
        out.append(Grade(best + 1, tuple(float(v) for v in p), named, plausible))
    return out
