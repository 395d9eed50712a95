"""OpenVINO on the CPU.

Hides its properties and exceptions. Left alone, it runs "float" graphs in bf16 on CPUs that have it, so the precision is
always pinned: f32 for reference and for the float islands of an INT8 graph, bf16 only where it is asked for.
"""

from __future__ import annotations

import importlib
import os
from typing import Any

import numpy as np
from numpy.typing import NDArray

from appliance.backends import Probe, Signature
from appliance.backends._tiny import TINY_INPUT, TINY_ONNX, TINY_OUTPUT
from appliance.errors import BackendFailed, BackendUnavailable

REQUIRES = ("openvino",)
_core: Any = None


def _runtime() -> Any:
    """One Core a process: plugins load once."""
    global _core
    if _core is None:
        # No phoning home: OpenVINO's tools send usage statistics unless told not to.
        os.environ.setdefault("OPENVINO_TELEMETRY_OPT_OUT", "1")
        try:
            module = importlib.import_module("openvino")
        except ImportError as error:
            raise BackendUnavailable(f"openvino cannot be imported: {error}", remedy="pip install 'spinebox[openvino]'") from error
        _core = module.Core()
    return _core


class Session:
    def __init__(self, blob: bytes, precision: str, threads: int) -> None:
        core = _runtime()
        properties: dict[str, Any] = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "bf16" if precision == "bf16" else "f32",
            "NUM_STREAMS": "1",
        }
        if threads:
            properties["INFERENCE_NUM_THREADS"] = threads
        try:
            model = core.read_model(blob)
            self._compiled = core.compile_model(model, "CPU", properties)
            self._request = self._compiled.create_infer_request()
        except Exception as error:
            raise BackendFailed(f"openvino cannot open the engine: {str(error).strip().splitlines()[-1]}") from error
        self._inputs = {i.any_name for i in self._compiled.inputs}
        self._outputs = [o.any_name for o in self._compiled.outputs]

    def run(self, inputs: dict[str, NDArray[np.float32]]) -> dict[str, NDArray[np.float32]]:
        # OpenVINO runs a missing input on whatever its buffer holds from the call before: another person's image.
        if set(inputs) != self._inputs:
            raise BackendFailed(f"openvino needs the inputs {sorted(self._inputs)}", value=sorted(inputs))
        try:
            # Shared outputs: else every one is copied into a dictionary first, and once more here.
            self._request.infer(inputs, share_inputs=True, share_outputs=True)
            # Copied: the request reuses its output buffers on the next call.
            return {name: self._request.get_output_tensor(i).data.copy() for i, name in enumerate(self._outputs)}
        except Exception as error:
            raise BackendFailed(f"openvino failed: {str(error).strip().splitlines()[-1]}") from error

    def close(self) -> None:
        self._request = self._compiled = None


def probe() -> Probe:
    try:
        core = _runtime()
        out = Session(TINY_ONNX, "f32", threads=1).run({"image": TINY_INPUT})["out"]
    except (BackendUnavailable, BackendFailed) as error:
        return Probe("openvino", False, error.what)
    version = str(importlib.import_module("openvino").__version__)
    if not np.allclose(out, TINY_OUTPUT, atol=1e-5):
        return Probe("openvino", False, "the tiny model gave a wrong answer", version)
    devices = list(core.available_devices)
    abilities = list(core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"))
    return Probe("openvino", True, "ran a tiny model", version, {"devices": devices, "cpu_capabilities": abilities})


def build(graph: bytes) -> bytes:
    """OpenVINO reads the portable ONNX graph; compiling it once here proves that it can."""
    Session(graph, "f32", threads=1).close()
    return graph


def open(blob: bytes, signature: Signature, *, precision: str = "int8", threads: int = 0) -> Session:  # noqa: A001
    """`precision` "int8" (float parts in f32), "f32", or "bf16" (a float graph in bf16)."""
    del signature
    return Session(blob, precision, threads)
