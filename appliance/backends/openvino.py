"""OpenVINO: the CPU, and where Intel's devices are there, GPU, NPU and AUTO among them.

Hides its properties, its exceptions and its compiled models, which are kept between starts where a folder is given. Left alone, it
runs "float" graphs in bf16 on CPUs that have it, so the precision is
always pinned: f32 for reference and for the float islands of an INT8 graph, bf16 only where it is asked for.
"""

from __future__ import annotations

import hashlib
import importlib
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from appliance.backends import Probe, Signature
from appliance.backends._enginecache import EngineCache, Key
from appliance.backends._tiny import TINY_INPUT, TINY_ONNX, TINY_OUTPUT
from appliance.errors import BackendFailed, BackendUnavailable

REQUIRES = ("openvino",)
FORMAT = "onnx"
# One device, or AUTO, HETERO or MULTI over several: "AUTO:NPU,CPU" takes the first that can. HETERO with NPU is refused by
# OpenVINO itself where there is no NPU; AUTO falls back.
_DEVICE = re.compile(r"(?:CPU|(?:GPU|NPU)(?:\.\d{1,2})?|(?:AUTO|HETERO|MULTI)(?::[A-Z]{3}(?:\.\d{1,2})?(?:,[A-Z]{3}(?:\.\d{1,2})?){0,7})?)")
_core: Any = None


def _runtime() -> Any:
    """One Core a process: plugins load once."""
    global _core
    if _core is None:
        # No phoning home: when imported, OpenVINO's tools report to an analytics service, from a forked process, and no variable turns
        # that off. Without the package that does it they have a stub for it.
        sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
        try:
            module = importlib.import_module("openvino")
        except ImportError as error:
            raise BackendUnavailable(f"openvino cannot be imported: {error}", remedy="pip install 'spinebox[openvino]'") from error
        _core = module.Core()
    return _core


def _present(core: Any, device: str) -> str:
    """AUTO over the devices that are here. OpenVINO's own AUTO passes over a device that is absent, but fails where its plugin
    lacks a library (no OpenCL: no GPU), although the next one in the list would do."""
    kind, _, wanted = device.partition(":")
    if kind != "AUTO" or not wanted:
        return device
    here = {d.partition(".")[0] for d in core.available_devices}
    found = [d for d in wanted.split(",") if d.partition(".")[0] in here]
    if not found:
        raise BackendFailed("openvino finds none of these devices here", value=device)
    return f"AUTO:{','.join(found)}"


def _hint(core: Any, device: str, precision: str) -> str:
    """f32 for the float parts wherever the device has it; an NPU computes float parts in f16 and refuses to be told otherwise."""
    if precision == "bf16":
        return "bf16"
    try:
        abilities = core.get_property(device, "OPTIMIZATION_CAPABILITIES") if device.partition(".")[0] in ("GPU", "NPU") else ["FP32"]
    except Exception:  # noqa: BLE001 - no such device: compiling says so, with the vendor's own words
        return "f32"
    return "f32" if "FP32" in abilities else "f16"


def _compiled(core: Any, blob: bytes, device: str, properties: dict[str, Any], cache: Path | None) -> Any:
    """Read and compile; with a folder, take back what an earlier start compiled, for a device that can export."""
    if cache is None or ":" in device or device in ("AUTO", "HETERO", "MULTI"):
        return core.compile_model(core.read_model(blob), device, properties)
    kept = EngineCache(cache)
    options = ",".join(f"{k}={v}" for k, v in sorted(properties.items()))
    version = str(importlib.import_module("openvino").__version__)
    name = str(core.get_property(device, "FULL_DEVICE_NAME"))
    key = Key(f"{device} {name}", f"openvino {version}", "", hashlib.sha256(blob).hexdigest(), options)
    found = kept.get(key)
    if found is not None:
        try:
            return core.import_model(found, device, properties)
        except Exception:  # noqa: BLE001 - whole, but not taken back: compiled again from the graph, which is the truth
            kept.drop(key)
    compiled = core.compile_model(core.read_model(blob), device, properties)
    exported = compiled.export_model()
    kept.put(key, exported if isinstance(exported, bytes) else exported.getvalue())
    return compiled


class Session:
    def __init__(
        self, blob: bytes, precision: str, threads: int, device: str = "CPU", cache: Path | None = None, names: Sequence[str] = ()
    ) -> None:
        core = _runtime()
        if not _DEVICE.fullmatch(device):
            raise BackendFailed("openvino knows no such device", value=device, remedy="Say CPU, GPU, NPU or AUTO:NPU,CPU.")
        device = _present(core, device)
        properties: dict[str, Any] = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": _hint(core, device, precision),
        }
        if device == "CPU":
            properties["NUM_STREAMS"] = "1"
            if threads:
                properties["INFERENCE_NUM_THREADS"] = threads
        try:
            self._compiled = _compiled(core, blob, device, properties, cache)
            self._request = self._compiled.create_infer_request()
        except Exception as error:
            raise BackendFailed(f"openvino cannot open the engine: {str(error).strip().splitlines()[-1]}") from error
        self._inputs = {i.any_name for i in self._compiled.inputs}
        # Optimising merges tensors, and one output may then bear several names: the graph's own is among them.
        self._outputs = [next((n for n in names if n in o.names), o.any_name) for o in self._compiled.outputs]

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


def open(  # noqa: A001
    blob: bytes, signature: Signature, *, precision: str = "int8", threads: int = 0, device: str = "", cache: Path | None = None
) -> Session:
    """`precision` "int8" (float parts in f32), "f32", or "bf16" (a float graph in bf16). `device` as OpenVINO spells it: "CPU"
    (default), "GPU", "NPU", "AUTO:NPU,CPU". `cache` is a folder for compiled models: the second opening takes a third of the time."""
    return Session(blob, precision, threads, device or "CPU", cache, [t.name for t in signature.outputs])
