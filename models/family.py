"""What every model family declares: the contract between training, compiling and serving.

A family is one module of this package with three names: `SPEC` (a `Spec`), `network()` (a torch module, torch
imported inside) and `decode()` (numpy arrays of one inference -> typed answers). No backend knows families; no
family knows backends.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Spec:
    """The fixed facts of a family.

    `input_hw` is rows x columns in pixels of the one input `image`, float32 N x 1 x H x W in [-1, 1].
    `outputs` are the graph's output names in order; `heatmap_output` names the fused evidence map among them or is
    None; `heatmap_kind` is the honest name of that map: "cam" (exact class activation map, equal to Grad-CAM up to a
    positive constant) or "class-evidence" (logits of a dense head).
    """

    name: str
    task: Literal["segmentation", "detection", "classification"]
    version: str
    input_hw: tuple[int, int]
    classes: tuple[str, ...]
    outputs: tuple[str, ...]
    heatmap_output: str | None
    heatmap_kind: Literal["cam", "class-evidence"]
    heatmap_layer: str
