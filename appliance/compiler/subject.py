"""Subject: one model on its way into a bundle, whoever trained it. What the pipeline needs to know, and nothing else.

A trained family of `models/` and a stranger's ONNX file both become a Subject; from there on one pipeline serves both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from appliance.compiler.verdict import Verdict
from models.evaluate import Runner, Scores

Array = NDArray[np.float32]
Progress = Callable[[int, int], None]  # done, total
Task = Literal["classification", "detection", "segmentation", "tensor"]  # "tensor": numbers without a meaning that we know
# "cam": exact class activation map. "grad-cam": closed form of Grad-CAM through a hidden layer. "class-evidence": logits of a
# dense head. "activation": class-agnostic mean of the last features. "unavailable": none, and `reason` says why.
MapKind = Literal["cam", "grad-cam", "class-evidence", "activation", "unavailable"]


@dataclass(frozen=True)
class MapSpec:
    """The heatmap that a graph gives out: its honest kind, the output that holds it, the layer it looks at."""

    kind: MapKind
    output: str | None
    layer: str
    reason: str = ""
    cam_bias: tuple[float, ...] | None = None  # "cam" only: mean(map) + bias = logit


class Calibration(Protocol):
    """What the ranges come from: every input with its digest. `calibration.sets.CalibrationSet` bound to its images."""

    @property
    def root(self) -> str:
        """Merkle root over the digests; hexadecimal."""
        ...

    @property
    def count(self) -> int: ...

    @property
    def source(self) -> str:
        """ "training patients", "phantoms", "synthetic images" or "images named by the card"."""
        ...

    def to_csv(self) -> bytes: ...

    def inputs(self) -> Iterator[Array]:
        """Each preprocessed network input in order, shape of the graph's input, batch 1. Raises CalibrationInvalid."""
        ...


@dataclass(frozen=True)
class Explained:
    """One evaluation input whose explanation is judged. `truth`, where known, is the boolean region (rows and columns of the
    network input) that it should point to; `group` is the patient."""

    x: Array
    group: int
    truth: NDArray[np.bool_] | None = None


class Explainer(Protocol):
    """How the heatmap of one network is read: the target is chosen once, from the float outputs, and kept for every engine."""

    def samples(self) -> Sequence[Explained]: ...

    def target(self, outputs: dict[str, Array]) -> int: ...

    def map(self, outputs: dict[str, Array], target: int) -> Array:
        """h x w raw evidence for the target."""
        ...

    def score(self, outputs: dict[str, Array], target: int) -> float:
        """How sure the network is of the target, in [0, 1]."""
        ...


class Examiner(Protocol):
    """Measures one model on images that training never saw."""

    @property
    def source(self) -> str:
        """ "held-out patients", "phantoms", "labelled images" or "agreement with FP32"."""
        ...

    @property
    def identity(self) -> str:
        """Digest of the evaluation images and truths: what a cached result depends on."""
        ...

    def scores(self, run: Runner, progress: Progress | None = None) -> Scores:
        """Scores of one engine. Two calls' scores are of the same samples in the same order, so they can be paired."""
        ...

    def baseline(self, run: Runner, progress: Progress | None = None) -> Scores:
        """Scores of the float model that engines are held against."""
        ...


@dataclass
class Subject:
    """`model` is float32 ONNX with fixed shapes, heatmap attached, one input named `input_name`, batch 1, NCHW unless the
    card says otherwise. `preprocess` says how an image becomes that input, as JSON, for whoever runs the engine."""

    name: str
    version: str
    task: Task
    model: Any
    source_sha256: str
    classes: tuple[str, ...]
    preprocess: dict[str, Any]
    heatmap: MapSpec
    calibration: Calibration
    examiner: Examiner
    validator: Examiner | None = None  # other images, which a search may look at; the examiner's never tune anything
    explainer: Explainer | None = None
    tuner: Explainer | None = None  # maps of images which a search may look at
    confidence: Callable[[Runner, Runner], Verdict] | None = None  # (float, engine) -> how far its probabilities can be believed
    fitted_on: str = ""  # SHA-256 of the answers that `confidence` fits on, which a verdict that is kept depends on
    fusion: bytes | None = None  # what a device fuses its logits with (`kernels.fusion`), carried in the bundle
    golden: Sequence[Array] = ()  # inputs without any patient in them
    keep_float: tuple[str, ...] = ()  # nodes that must not be quantised, by name
    card: dict[str, Any] = field(default_factory=dict)
