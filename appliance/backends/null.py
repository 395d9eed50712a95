"""A backend without a runtime: answers zeros of the right shapes, at once.

It is the ruler's own thickness: what the box costs without any engine. Zeros decode to no spine, so it can never pass for
an answer. `Session(..., replay=...)` gives recorded outputs instead, for tests of what lies behind an engine.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from appliance.backends import Probe, Signature
from appliance.errors import BackendFailed

REQUIRES: tuple[str, ...] = ()
FORMAT = "any"


class Session:
    def __init__(self, signature: Signature, replay: Mapping[str, NDArray[np.float32]] | None = None) -> None:
        self._signature = signature
        self._outputs = {t.name: np.zeros(t.shape, np.float32) for t in signature.outputs}
        for name, values in (replay or {}).items():
            if name not in self._outputs or values.shape != self._outputs[name].shape:
                raise BackendFailed("the replayed output does not fit the signature", value=f"{name} {values.shape}")
            self._outputs[name] = np.asarray(values, np.float32)

    def run(self, inputs: dict[str, NDArray[np.float32]]) -> dict[str, NDArray[np.float32]]:
        for t in self._signature.inputs:
            if t.name not in inputs or inputs[t.name].shape != t.shape:
                got = inputs[t.name].shape if t.name in inputs else "nothing"
                raise BackendFailed(f"input {t.name} must have shape {t.shape}", value=got)
        return {name: values.copy() for name, values in self._outputs.items()}

    def close(self) -> None:
        self._outputs = {}


def probe() -> Probe:
    return Probe("null", True, "always there; answers zeros, for measuring the box itself", "1")


def build(graph: bytes) -> bytes:
    return graph


def open(  # noqa: A001
    blob: bytes, signature: Signature, *, precision: str = "int8", threads: int = 0, device: str = "", cache: Path | None = None
) -> Session:
    del blob, precision, threads, device, cache
    return Session(signature)
