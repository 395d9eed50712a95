"""ONNX Runtime on the CPU.

Hides its session options and its exceptions. Spinning is off: same median, better tail, and the spare cycles belong to
the rest of the box. It has no bf16 on CPUs; "f32" and "int8" are what the graph says.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from appliance.backends import Probe, Signature
from appliance.backends._tiny import TINY_INPUT, TINY_ONNX, TINY_OUTPUT
from appliance.errors import BackendFailed, BackendUnavailable

REQUIRES = ("onnxruntime",)
FORMAT = "onnx"


def _runtime() -> Any:
    try:
        return importlib.import_module("onnxruntime")
    except ImportError as error:
        raise BackendUnavailable(f"onnxruntime cannot be imported: {error}", remedy="pip install 'spinebox[onnxruntime]'") from error


class Session:
    """Thread-safe: ONNX Runtime allows concurrent `run`."""

    def __init__(self, blob: bytes, threads: int, as_written: bool = False) -> None:
        ort = _runtime()
        options = ort.SessionOptions()
        level = ort.GraphOptimizationLevel
        options.graph_optimization_level = level.ORT_DISABLE_ALL if as_written else level.ORT_ENABLE_ALL
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3
        try:
            self._session = ort.InferenceSession(blob, options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise BackendFailed(f"onnxruntime cannot open the engine: {str(error).splitlines()[0]}") from error
        self._outputs = [o.name for o in self._session.get_outputs()]

    def run(self, inputs: dict[str, NDArray[np.float32]]) -> dict[str, NDArray[np.float32]]:
        try:
            values = self._session.run(self._outputs, inputs)
        except Exception as error:
            raise BackendFailed(f"onnxruntime failed: {str(error).splitlines()[0]}") from error
        return dict(zip(self._outputs, values, strict=True))

    def close(self) -> None:
        self._session = None


def probe() -> Probe:
    try:
        ort = _runtime()
        out = Session(TINY_ONNX, threads=1).run({"image": TINY_INPUT})["out"]
    except (BackendUnavailable, BackendFailed) as error:
        return Probe("onnxruntime", False, error.what)
    if not np.allclose(out, TINY_OUTPUT, atol=1e-5):
        return Probe("onnxruntime", False, "the tiny model gave a wrong answer", ort.__version__)
    return Probe("onnxruntime", True, "ran a tiny model", ort.__version__, {"providers": ort.get_available_providers()})


def build(graph: bytes) -> bytes:
    """The portable graph is what ONNX Runtime opens; opening it once here proves that it can."""
    Session(graph, threads=1).close()
    return graph


def open(  # noqa: A001
    blob: bytes, signature: Signature, *, precision: str = "int8", threads: int = 0, device: str = "", cache: Path | None = None
) -> Session:
    """`precision` "int8" or "f32": what the graph itself says, as fast as it goes; "as-written": node by node, so that every
    rounding is where the graph has it and none is the CPU's; "bf16" is refused, ONNX Runtime has none on CPUs. `device` "CPU" or
    nothing."""
    del signature, cache
    if precision == "bf16":
        raise BackendFailed("onnxruntime has no bf16 on CPUs", value=precision, remedy="Use the openvino backend for bf16.")
    if device not in ("", "CPU"):
        raise BackendFailed("onnxruntime runs on the CPU only", value=device)
    return Session(blob, threads, precision == "as-written")
