"""Golden inputs: what a device feeds to an engine before it believes it, and how far the answers may lie from the float ones.

Hides the file's layout and the comparison. A device needs no compiler and no network of its own to accept an engine: a cached
TensorRT engine, a runtime of another version, a CPU whose 8-bit products saturate. Inputs are uint8, so that every device
feeds the very same numbers; expected outputs are half precision, of a seeded choice of places where an output is large.

    SPINEBOX-GOLDEN 1\\n    canonical JSON, one line\\n    zlib: every array's bytes in order
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from appliance.bundle import canonical
from appliance.errors import BundleCorrupt

Array = NDArray[np.float32]
Run = Callable[[dict[str, Array]], dict[str, Array]]
MAGIC = b"SPINEBOX-GOLDEN 1\n"
MAX_HEADER_BYTES = 1 << 20
MAX_PAYLOAD_BYTES = 64 << 20
MAX_INPUTS = 64
MAX_OUTPUTS = 64
MAX_VALUES = 4096  # kept of one output of one input
_DIMENSIONS = 8
_SIDE = 1 << 16


@dataclass(frozen=True)
class Tolerance:
    """Of one output, in its own unit: largest and root-mean-square difference from FP32 over the places that are kept."""

    max_abs: float
    rms: float


@dataclass(frozen=True)
class Expected:
    """One output: its shape, the places kept (indices into the flat output, sorted), a row of values for each golden input."""

    shape: tuple[int, ...]
    places: NDArray[np.uint32]
    values: NDArray[np.float16]
    tolerance: Tolerance


@dataclass(frozen=True)
class Golden:
    """`inputs` are uint8, N x the shape of the input with its batch of 1; a value v is fed as low + v * step, in float32."""

    input_name: str
    low: float
    step: float
    inputs: NDArray[np.uint8]
    outputs: Mapping[str, Expected]
    target: str

    def feed(self, index: int) -> dict[str, Array]:
        """What the engine is given for golden input `index`: the same bits on every machine."""
        values = self.inputs[index].astype(np.float32) * np.float32(self.step) + np.float32(self.low)
        return {self.input_name: values}

    # -- the file ---------------------------------------------------------------------------------------------------

    def to_bytes(self) -> bytes:
        """The same Golden gives the same bytes."""
        names = sorted(self.outputs)
        header = {
            "input": {"name": self.input_name, "low": self.low, "step": self.step, "shape": list(self.inputs.shape)},
            "outputs": [
                {
                    "name": n,
                    "shape": list(self.outputs[n].shape),
                    "places": int(self.outputs[n].places.size),
                    "max_abs": self.outputs[n].tolerance.max_abs,
                    "rms": self.outputs[n].tolerance.rms,
                }
                for n in names
            ],
            "target": self.target,
        }
        parts = [self.inputs.tobytes()]
        for n in names:
            parts += [self.outputs[n].places.astype("<u4").tobytes(), self.outputs[n].values.astype("<f2").tobytes()]
        return MAGIC + canonical(header) + b"\n" + zlib.compress(b"".join(parts), 9)

    @classmethod
    def from_bytes(cls, content: bytes) -> Golden:
        """Raises BundleCorrupt for anything that `to_bytes` does not write; never allocates more than the limits allow."""
        end = content.find(b"\n", len(MAGIC), len(MAGIC) + MAX_HEADER_BYTES)
        if not content.startswith(MAGIC) or end < 0:
            raise BundleCorrupt("not a file of golden inputs", value=content[: len(MAGIC)])
        try:
            return _read(json.loads(content[len(MAGIC) : end]), content[end + 1 :])
        except (KeyError, TypeError, ValueError, OverflowError, RecursionError, zlib.error) as error:
            raise BundleCorrupt(f"golden inputs cannot be read: {error}") from error


def _read(header: Any, packed: bytes) -> Golden:
    """ValueError, KeyError, TypeError or zlib.error where header and payload do not belong together."""
    shape = _shape(header["input"]["shape"])
    low, step = _number(header["input"]["low"]), _number(header["input"]["step"])
    entries = header["outputs"]
    if not isinstance(entries, list) or not 0 < len(entries) <= MAX_OUTPUTS or not 0 < shape[0] <= MAX_INPUTS or len(shape) < 2:
        raise ValueError("too many or no inputs or outputs")
    count = shape[0]
    places = [int(_number(e["places"])) for e in entries]
    if any(not 0 < p <= MAX_VALUES for p in places):
        raise ValueError("an output keeps too many or no places")
    expected_bytes = math.prod(shape) + sum(p * 4 + p * count * 2 for p in places)
    if expected_bytes > MAX_PAYLOAD_BYTES:
        raise ValueError(f"{expected_bytes} bytes are more than {MAX_PAYLOAD_BYTES}")
    unpack = zlib.decompressobj()
    payload = unpack.decompress(packed, expected_bytes + 1)
    if len(payload) != expected_bytes or not unpack.eof or unpack.unused_data:
        raise ValueError("the payload has another size than the header says")
    inputs = np.frombuffer(payload, np.uint8, math.prod(shape)).reshape(shape)
    at = math.prod(shape)
    outputs: dict[str, Expected] = {}
    for entry, kept in zip(entries, places, strict=True):
        name, out_shape = entry["name"], _shape(entry["shape"])
        index = np.frombuffer(payload, "<u4", kept, at).astype(np.uint32)
        values = np.frombuffer(payload, "<f2", kept * count, at + kept * 4).astype(np.float16).reshape(count, kept)
        at += kept * 4 + kept * count * 2
        tolerance = Tolerance(_number(entry["max_abs"]), _number(entry["rms"]))
        if not isinstance(name, str) or name in outputs or int(index.max()) >= math.prod(out_shape) or not np.isfinite(values).all():
            raise ValueError(f"output {name!r} is not one")
        if tolerance.max_abs < 0 or tolerance.rms < 0:
            raise ValueError(f"output {name!r} has a negative tolerance")
        outputs[name] = Expected(out_shape, index, values, tolerance)
    if not isinstance(header["input"]["name"], str) or not isinstance(header["target"], str):
        raise ValueError("names are text")
    return Golden(header["input"]["name"], low, step, inputs, outputs, header["target"])


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"not a number: {value!r}"[:80])
    return float(value)


def _shape(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or not 0 < len(value) <= _DIMENSIONS:
        raise ValueError("not a shape")
    if any(isinstance(v, bool) or not isinstance(v, int) or not 0 < v <= _SIDE for v in value):
        raise ValueError("not a shape")
    return tuple(value)


@dataclass(frozen=True)
class Found:
    """How far one output lay from FP32, and whether that is within its tolerance."""

    max_abs: float
    rms: float
    tolerance: Tolerance
    accepted: bool


@dataclass(frozen=True)
class Acceptance:
    """Whether an engine may be believed on this device. `note` names the first output that is out, and by how much."""

    accepted: bool
    note: str
    outputs: Mapping[str, Found]


def accept(golden: Golden, run: Run) -> Acceptance:
    """Feed every golden input to an engine and hold its outputs to the tolerances. Raises what `run` raises.

    An output that is missing, has another shape or is not finite is beyond any tolerance.
    """
    answers = [run(golden.feed(i)) for i in range(len(golden.inputs))]
    found: dict[str, Found] = {}
    for name, wanted in golden.outputs.items():
        largest, squares = 0.0, 0.0
        for i, answer in enumerate(answers):
            values = answer.get(name)
            if values is None or tuple(values.shape) != wanted.shape or not np.isfinite(values).all():
                largest = squares = math.inf
                break
            difference = np.asarray(values, np.float64).reshape(-1)[wanted.places] - wanted.values[i].astype(np.float64)
            largest = max(largest, float(np.abs(difference).max()))
            squares += float(difference @ difference)
        rms = math.sqrt(squares / wanted.values.size)
        found[name] = Found(largest, rms, wanted.tolerance, largest <= wanted.tolerance.max_abs and rms <= wanted.tolerance.rms)
    bad = [n for n, f in found.items() if not f.accepted]
    if not bad:
        return Acceptance(True, f"{len(answers)} golden inputs, every output of {golden.target} within its tolerance", found)
    f = found[bad[0]]
    note = (
        f"output {bad[0]} lies {f.max_abs:.4g} (rms {f.rms:.4g}) from FP32; "
        f"{f.tolerance.max_abs:.4g} (rms {f.tolerance.rms:.4g}) is the tolerance of {golden.target}"
    )
    return Acceptance(False, note, found)
