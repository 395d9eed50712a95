"""One prepared model -> what each runtime opens, and how far that was proven on the machine at hand.

Hides which flavour a runtime takes, which converter makes it, and what stands in where the runtime's own device is absent.
A target whose device is not here is still built; its answers are measured on a stand-in where one exists, its graph is put
before the vendor's own parser, and `verified` says exactly that. It is never called passed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from appliance import backends
from appliance.backends import Session, Signature, _tensorrt_build
from appliance.compiler import convert, downgrade, quantise, toolchain
from appliance.compiler.cache import Cache, code_digest, sha256
from appliance.compiler.signature import REFERENCE
from appliance.compiler.subject import Array
from appliance.errors import BackendUnavailable, GraphUnsupported, UsageError

# Order of the table. The first two open one and the same file.
TARGETS = ("onnxruntime", "openvino", "tflite", "tensorrt", "myriad")
_TOOLCHAIN = {"tflite": "onnx2tf", "tensorrt": "tensorrt-rtx", "myriad": "myriad"}


@dataclass(frozen=True)
class Prepared:
    """What every target is built from: the float graph that all are held against, the adjusted one that is quantised, and the
    record of ranges."""

    model: Any
    adjusted: Any
    ranges: quantise.Ranges
    keep_float: tuple[str, ...]
    signature: Signature
    inputs: Callable[[], Iterator[Array]]
    calibration_root: str


@dataclass(frozen=True)
class Built:
    """One engine. `path` is its file name in the bundle; `open` gives a session on which its answers are measured;
    `runs_here` says whether that session is its own runtime on its own kind of device."""

    target: str
    precision: str
    path: str
    blob: bytes
    open: Callable[[], Session]
    runs_here: bool
    verified: str
    examined_on: str
    float_share: float | None = None
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def sha256(self) -> str:
        return sha256(self.blob)


def buildable(target: str) -> str | None:
    """None where `target` can be built on this machine, else the reason in words."""
    if target not in TARGETS:
        raise UsageError("no such target", value=target, remedy=f"Choose among {', '.join(TARGETS)}.")
    if target in _TOOLCHAIN:
        made = toolchain.state(_TOOLCHAIN[target])
        if not made.ready:
            return f"the {made.name} environment is {made.reason}"
    # TensorRT and Movidius engines are built for a device that need not be here; the others are run before they count.
    state = backends.probe("onnxruntime" if target in ("tensorrt", "myriad") else target)
    return None if state.available else state.reason


def build(target: str, prepared: Prepared, cache: Cache) -> Built:
    """Build `prepared` for one target. Raises ConverterFailed, GraphUnsupported, BackendFailed, BackendUnavailable."""
    reason = buildable(target)
    if reason is not None:
        raise BackendUnavailable(f"{target} engines cannot be built here: {reason}", value=target, remedy="Run `make toolchains`.")
    return {"onnxruntime": _cpu, "openvino": _cpu, "tflite": _tflite, "tensorrt": _tensorrt, "myriad": _myriad}[target](
        target, prepared, cache
    )


def opener(backend: str, blob: bytes, signature: Signature, precision: str, device: str = "") -> Callable[[], Session]:
    return lambda: backends.load(backend).open(blob, signature, precision=precision, threads=0, device=device)


def _flavour(prepared: Prepared, flavour: quantise.Flavour) -> tuple[bytes, float]:
    graph, share = quantise.quantise(prepared.adjusted, prepared.ranges, flavour=flavour, keep_float=prepared.keep_float)
    return graph.SerializeToString(deterministic=True), share


def _cpu(target: str, prepared: Prepared, cache: Cache) -> Built:
    del cache
    blob, share = _flavour(prepared, "u8")
    blob = backends.load(target).build(blob)
    version = backends.probe(target).version
    open_it = opener(target, blob, prepared.signature, "int8")
    return Built(target, "int8", "int8.onnx", blob, open_it, True, f"ran on this machine ({target} {version})", target, share)


def _key(prepared: Prepared, tool: str) -> dict[str, Any]:
    return {
        "model": sha256(prepared.adjusted.SerializeToString(deterministic=True)),
        "calibration": prepared.calibration_root,
        "keep_float": sorted(prepared.keep_float),
        **_tool(tool),
    }


def _tool(tool: str) -> dict[str, str]:
    """What a conversion depends on besides its graph: the environment's pins, the scripts in it, and our side of both."""
    scripts = b"".join(p.read_bytes() for p in sorted(toolchain.CONVERTERS.glob("*.py")))
    requirements = toolchain.TOOLCHAINS[tool].requirements.read_bytes()
    return {
        "toolchain": sha256(requirements),
        "scripts": sha256(scripts),
        "code": code_digest(convert, downgrade, toolchain, _tensorrt_build),
    }


def _tflite(target: str, prepared: Prepared, cache: Cache) -> Built:
    blob = cache.blob(
        "tflite",
        _key(prepared, "onnx2tf"),
        lambda: convert.to_tflite(prepared.adjusted, prepared.inputs, prepared.signature, prepared.keep_float),
    )
    version = backends.probe(target).version
    open_it = opener(target, blob, prepared.signature, "int8")
    return Built(target, "int8", "int8.tflite", blob, open_it, True, f"ran on this machine (LiteRT {version})", target)


def _tensorrt(target: str, prepared: Prepared, cache: Cache) -> Built:
    """The graph is the truth; the engine is built by the device. Here the vendor's parser and builder take it, and what it says
    is computed node by node."""
    blob, share = _flavour(prepared, "symmetric")
    if backends.probe(target).available:
        open_it = opener(target, blob, prepared.signature, "int8")
        version = backends.probe(target).version
        return Built(target, "int8", "int8-symmetric.onnx", blob, open_it, True, f"ran on this machine (TensorRT {version})", target, share)
    key = {"graph": sha256(blob), **_tool("tensorrt-rtx")}
    gate = cache.json("tensorrt-gate", key, lambda: convert.tensorrt_gate(blob))
    verified = (
        f"not run: {backends.probe(target).reason}. TensorRT-RTX {gate['version']} parsed the graph and built an engine of "
        f"{gate['layers']} layers without a GPU; the metrics are of the same graph, computed node by node as it is written"
    )
    # As written: a processor's own 8-bit kernels may saturate where the GPU's do not.
    open_it = opener(REFERENCE, blob, prepared.signature, "as-written")
    return Built(target, "int8", "int8-symmetric.onnx", blob, open_it, False, verified, "the graph as written", share, gate)


def _myriad(target: str, prepared: Prepared, cache: Cache) -> Built:
    """FP16: the stick has no INT8. Here its plugin is asked about every layer, and the old runtime's CPU runs the same file."""
    model = prepared.model
    key = {"model": sha256(model.SerializeToString(deterministic=True)), **_tool("myriad")}
    blob = cache.blob("myriad", key, lambda: convert.to_myriad(model))
    version = backends.probe(target).version
    if backends.probe(target).available:
        open_it = opener(target, blob, prepared.signature, "fp16", "MYRIAD")
        return Built(target, "fp16", "fp16.ir", blob, open_it, True, f"ran on this machine (OpenVINO {version}, MYRIAD)", target)
    query = cache.json("myriad-query", key, lambda: convert.myriad_query(blob))
    if not query["passed"]:
        named = ", ".join(f"{u['name']} ({u['type']})" for u in query["unsupported"][:3])
        raise GraphUnsupported(
            f"the MYRIAD plugin takes {query['supported']} of {query['layers']} layers", value=named, remedy="Compile for other targets."
        )
    verified = (
        f"not run: {backends.probe(target).reason}. The MYRIAD plugin of OpenVINO 2021.4 accepts all {query['layers']} layers; the "
        f"metrics are of the same FP16 file on that runtime's CPU"
    )
    open_it = opener(target, blob, prepared.signature, "fp16", "CPU")
    return Built(target, "fp16", "fp16.ir", blob, open_it, False, verified, "OpenVINO 2021.4 CPU", None, query)
