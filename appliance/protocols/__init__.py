"""Protocols: what kind of image an answer is about. One module each, and what they all work with.

A protocol is a module with six names: `NAME` (as a report calls it), `READS` (in words, for refusals), `MODALITIES`,
`FAMILIES` (the engines that it needs), `PATHS` (for each rung, the stretches of work from one decision to the next), and three
functions: `check(instance)` raises WrongModality where the header says that the image is another kind, `rung_ms(expected_ms)`
gives the time of each rung of the ladder from the median time of each family, and `run(bench, instance, rung)` makes the Report.
`run` raises SpineNotFound where the pixels show no image of its kind, and asks `bench.go_on` after each stretch but the last,
so that what has become too much can still be shed. The engine opens sessions, chooses protocol and rung, and signs the Report;
no protocol knows backends.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from appliance.backends import Session
from appliance.errors import BackendFailed
from appliance.report import Report
from appliance.study import Instance
from kernels.fusion import Fusion
from kernels.heatmap import cam_residual, positive_unit

CAM_TOLERANCE = 1e-2  # float convolution against float mean: far above rounding, far below any real difference


class ProtocolModule(Protocol):
    """What the engine asks of a module of this package."""

    NAME: str
    READS: str
    MODALITIES: tuple[str, ...]
    FAMILIES: tuple[str, ...]
    PATHS: Mapping[str, tuple[str, ...]]

    def check(self, instance: Instance) -> None: ...
    def rung_ms(self, expected_ms: Mapping[str, float]) -> dict[str, float]: ...
    def run(self, bench: Bench, instance: Instance, rung: str) -> Report: ...


@dataclass
class Clock:
    """Stage times of one run, in ms."""

    ms: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.ms[name] = self.ms.get(name, 0.0) + (time.perf_counter() - began) * 1e3


@dataclass(frozen=True)
class Confidence:
    """`temperatures` by head, each divides that head's logits. A class is plausible where 1 - its probability is at most `threshold`."""

    temperatures: Mapping[str, float]
    threshold: float | None


@dataclass(frozen=True)
class Bench:
    """The open engines by family, what the bundle says of each (`manifest["models"]`), the runtime of each, the clock, and what a
    family's logits are fused with, where the bundle holds it. `go_on(stretch, rung)` is asked after each stretch of work: the rung
    to go on with, the same or a poorer one whose path is the same so far."""

    sessions: Mapping[str, Session]
    models: Mapping[str, Any]
    used: Mapping[str, str] = field(default_factory=dict)
    clock: Clock = field(default_factory=Clock)
    fusions: Mapping[str, Fusion] = field(default_factory=dict)
    go_on: Callable[[str, str], str] = lambda _, rung: rung

    def infer(self, family: str, image: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
        """One inference of a family on 1 x 1 x H x W. Raises BackendFailed, which names the family."""
        try:
            return self.sessions[family].run({"image": image})
        except BackendFailed as error:
            error.family = family
            raise

    def confidence(self, family: str) -> Confidence:
        """What the confidence gate found for the engine in use; nothing where it judged none."""
        engine = self.models[family].get("engines", {}).get(self.used.get(family, ""), {})
        found: Mapping[str, Any] = next((v["details"] for v in engine.get("verdicts", ()) if v["gate"] == "confidence"), {})
        conformal = (found.get("conformal") or {}).get("int8") or {}
        return Confidence(found.get("temperatures") or {}, conformal.get("threshold"))

    def cam(self, family: str, outputs: Mapping[str, NDArray[np.float32]], index: int) -> tuple[NDArray[np.float32] | None, str | None]:
        """The class activation map of logit `index`, h x w in [0, 1]; or None and the reason why it is withheld."""
        bias = np.asarray(self.models[family]["cam_bias"], np.float32)
        residual = cam_residual(outputs["cam"][0], bias, outputs["logits"][0])
        if residual > CAM_TOLERANCE:
            return None, f"the map does not add up to its logit (off by {residual:.3g}), so it explains nothing"
        return positive_unit(outputs["cam"][0][index]), None
