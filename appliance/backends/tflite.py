"""TensorFlow Lite on the CPU: ai-edge-litert, or the older tflite-runtime where that is what a board has.

Hides the interpreter, its tensor order and its layout. A converter turns NCHW graphs to NHWC, may rename tensors and may
reorder outputs; where height, width and channels are equal (an 8 x 8 map of 8 classes) shapes alone cannot tell. So the
compiler finds out by value, once, and seals the mapping beside the flatbuffer: for each input and output of the Signature
its position in the interpreter and the permutation of its axes. INT8 is inside; the border is float32 in the Signature's layout.
"""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from appliance.backends import Probe, Signature, Tensor
from appliance.backends._sealed import seal, unseal
from appliance.backends._tiny import TINY_INPUT, TINY_OUTPUT, TINY_TFLITE
from appliance.errors import BackendFailed, BackendUnavailable

REQUIRES = ("ai_edge_litert",)
FORMAT = "tflite"
MAGIC = b"SPXTFL1\n"
MAX_RANK = 8
_RUNTIMES = (("ai_edge_litert.interpreter", "ai-edge-litert"), ("tflite_runtime.interpreter", "tflite-runtime"))


def _runtime() -> tuple[Any, str]:
    """The interpreter's module and the distribution that it came from."""
    reasons = []
    for module, distribution in _RUNTIMES:
        try:
            return importlib.import_module(module), distribution
        except ImportError as error:
            reasons.append(f"{distribution} cannot be imported: {error}")
    raise BackendUnavailable("; ".join(reasons), remedy="pip install 'spinebox[tflite]'")


def wrap(flatbuffer: bytes, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> bytes:
    """The blob that `open` takes. Each entry: "name" and "shape" of the Signature, "index" (position in the interpreter's list)
    and "axes", so that numpy.transpose(signature's tensor, axes) has the interpreter's layout."""
    return seal(MAGIC, {"inputs": inputs, "outputs": outputs}, {"tflite": flatbuffer})


class _Port:
    """One tensor of the Signature and the interpreter's tensor behind it."""

    def __init__(self, entry: Any, details: list[dict[str, Any]]) -> None:
        try:
            name, index = str(entry["name"]), int(entry["index"])
            shape, axes = tuple(int(v) for v in entry["shape"]), tuple(int(v) for v in entry["axes"])
        except (TypeError, KeyError, ValueError, OverflowError) as error:
            raise BackendFailed("tflite: the tensor mapping cannot be read", value=entry) from error
        if sorted(axes) != list(range(len(shape))) or len(axes) > MAX_RANK or not 0 <= index < len(details):
            raise BackendFailed(f"tflite: the mapping of {name} makes no sense", value=f"axes {axes}, position {index}")
        detail = details[index]
        layout = tuple(int(v) for v in detail["shape"])
        if layout != tuple(shape[a] for a in axes) or detail["dtype"] != np.float32:
            raise BackendFailed(f"tflite: {name} does not fit the flatbuffer", value=f"{layout} {detail['dtype'].__name__}")
        self.tensor = Tensor(name, shape)
        self.index = int(detail["index"])
        self.axes = axes
        self.back = tuple(int(v) for v in np.argsort(axes))


class Session:
    """One owner at a time: the interpreter holds the tensors of the running call."""

    def __init__(self, blob: bytes, signature: Signature | None, threads: int) -> None:
        header, parts = unseal(MAGIC, blob, "tflite")
        module, _ = _runtime()
        try:
            # It takes one thread where none is named, unlike every other runtime here.
            interpreter = module.Interpreter(model_content=parts["tflite"], num_threads=threads or len(os.sched_getaffinity(0)))
            interpreter.allocate_tensors()
            details = interpreter.get_input_details(), interpreter.get_output_details()
        except Exception as error:
            raise BackendFailed(f"tflite cannot open the engine: {str(error).strip().splitlines()[-1:]}") from error
        if not isinstance(header.get("inputs"), list) or not isinstance(header.get("outputs"), list):
            raise BackendFailed("tflite: the tensor mapping is missing")
        self._inputs = [_Port(e, details[0]) for e in header["inputs"]]
        self._outputs = [_Port(e, details[1]) for e in header["outputs"]]
        found = Signature(tuple(p.tensor for p in self._inputs), tuple(p.tensor for p in self._outputs))
        if signature is not None and (set(found.inputs), set(found.outputs)) != (set(signature.inputs), set(signature.outputs)):
            raise BackendFailed("tflite: the engine has other inputs or outputs than the bundle says", value=found)
        self._interpreter = interpreter

    def run(self, inputs: dict[str, NDArray[np.float32]]) -> dict[str, NDArray[np.float32]]:
        if set(inputs) != {p.tensor.name for p in self._inputs}:
            raise BackendFailed(f"tflite needs the inputs {[p.tensor.name for p in self._inputs]}", value=sorted(inputs))
        for port in self._inputs:
            if inputs[port.tensor.name].shape != port.tensor.shape:
                raise BackendFailed(f"tflite: input {port.tensor.name} must have shape {port.tensor.shape}")
        try:
            for port in self._inputs:
                x = np.asarray(inputs[port.tensor.name], np.float32)
                self._interpreter.set_tensor(port.index, np.ascontiguousarray(x.transpose(port.axes)))
            self._interpreter.invoke()
            # get_tensor copies; the copy is turned back to the Signature's layout.
            return {p.tensor.name: np.ascontiguousarray(self._interpreter.get_tensor(p.index).transpose(p.back)) for p in self._outputs}
        except Exception as error:
            raise BackendFailed(f"tflite failed: {str(error).strip().splitlines()[-1:]}") from error

    def close(self) -> None:
        self._interpreter = None


def probe() -> Probe:
    try:
        module, distribution = _runtime()
        shape = list(TINY_INPUT.shape)
        port = {"shape": shape, "index": 0, "axes": [0, 1]}
        tiny = wrap(TINY_TFLITE, [{**port, "name": "image"}], [{**port, "name": "out"}])
        out = Session(tiny, None, threads=1).run({"image": TINY_INPUT})["out"]
    except (BackendUnavailable, BackendFailed) as error:
        return Probe("tflite", False, error.what)
    version = str(importlib.import_module(module.__name__.partition(".")[0]).__version__)
    if not np.allclose(out, TINY_OUTPUT, atol=1e-5):
        return Probe("tflite", False, "the tiny model gave a wrong answer", version)
    return Probe("tflite", True, "ran a tiny model", version, {"distribution": distribution})


def build(graph: bytes) -> bytes:
    """Takes what the compiler's converter sealed and opens it once, which proves that it can. ONNX is not converted here: a
    device has no converter."""
    Session(graph, None, threads=1).close()
    return graph


def open(  # noqa: A001
    blob: bytes, signature: Signature, *, precision: str = "int8", threads: int = 0, device: str = "", cache: Path | None = None
) -> Session:
    """`precision` "int8" or "f32": what the flatbuffer itself says. `device` "CPU" or nothing."""
    del cache
    if precision not in ("int8", "f32"):
        raise BackendFailed(f"tflite has no {precision}", value=precision, remedy="Use the openvino backend for bf16.")
    if device not in ("", "CPU"):
        raise BackendFailed("tflite runs on the CPU only", value=device)
    return Session(blob, signature, threads)
