"""The runtimes, one file each, found by listing this folder. No backend knows families; no family knows backends.

A backend file has five names:

    REQUIRES          the import names it needs, and the extra that installs them
    FORMAT            what it opens: "onnx" (the portable Q/DQ graph), "onnx-symmetric", "tflite", "ir-fp16"; "any" looks at nothing
    probe()           -> Probe: loads and runs a tiny model; importing is not being available
    build(graph)      -> the blob this runtime opens, from a portable Q/DQ graph; raises BackendFailed
    open(blob, ...)   -> Session; `cache` is a folder for what compiling made, for the next start of a runtime that has such a thing

An unavailable backend is kept with its reason, so that `spinebox doctor` tells the truth.
"""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from appliance.errors import BackendUnavailable

# Tried in this order where nobody chose. There is no universally fastest runtime: the bundle's own choice comes first.
PREFERENCE = ("openvino", "onnxruntime", "tflite")


@dataclass(frozen=True)
class Tensor:
    """Name and fixed shape of one float32 input or output."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Signature:
    """What goes in and what comes out of one engine."""

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]


@dataclass(frozen=True)
class Probe:
    """The state of one backend on this machine, for people and for choosing."""

    name: str
    available: bool
    reason: str
    version: str | None = None
    details: dict[str, Any] = field(default_factory=dict)


class Session(Protocol):
    """A loaded engine. `run` is not thread-safe unless the backend says so; one owner calls it."""

    def run(self, inputs: dict[str, NDArray[np.float32]]) -> dict[str, NDArray[np.float32]]:
        """Inputs by name -> outputs by name. The arrays returned stay valid after the next call. Raises BackendFailed."""
        ...

    def close(self) -> None: ...


class Backend(Protocol):
    """The shape of a backend module."""

    REQUIRES: tuple[str, ...]
    FORMAT: str

    def probe(self) -> Probe: ...
    def build(self, graph: bytes) -> bytes: ...
    def open(
        self, blob: bytes, signature: Signature, *, precision: str, threads: int, device: str = "", cache: Path | None = None
    ) -> Session: ...


def names() -> tuple[str, ...]:
    """Every backend file of this folder, available or not."""
    return tuple(sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_")))


def load(name: str) -> Backend:
    """The backend module `name`. Raises BackendUnavailable for a name that no file has."""
    if name not in names():
        raise BackendUnavailable("no such backend", value=name, remedy=f"Choose one of: {', '.join(names())}.")
    module: ModuleType = importlib.import_module(f"{__name__}.{name}")
    return module


def parse(spec: str) -> tuple[str, str]:
    """A backend as a person writes it, "openvino" or "openvino:AUTO:NPU,CPU" -> (name, device); the device is "" where none is
    named. Raises BackendUnavailable for a name that no file has; the backend itself judges the device."""
    name, _, device = spec.partition(":")
    if name != "auto":
        load(name)
    return name, device


@cache
def probe(name: str) -> Probe:
    """The state of one backend, found once a process."""
    return load(name).probe()


def choose(preferred: str = "auto") -> str:
    """`preferred` where it is available, else the first available of PREFERENCE. Raises BackendUnavailable, with every reason."""
    if preferred != "auto":
        state = probe(preferred) if preferred in names() else None
        if state is None or not state.available:
            load(preferred)  # an unknown name has its own message
            raise BackendUnavailable(f"backend {preferred} is not available: {state.reason if state else ''}", value=preferred)
        return preferred
    for name in PREFERENCE:
        if probe(name).available:
            return name
    reasons = "; ".join(f"{n}: {probe(n).reason}" for n in PREFERENCE)
    raise BackendUnavailable(f"no runtime can run engines here ({reasons})")
