"""Intel Movidius (Myriad X) sticks, served in FP16 by OpenVINO 2021.4 in a process of its own.

The stick cannot compute INT8 (its compiler rejects FakeQuantize), and OpenVINO dropped it with 2023.0, so the last runtime that
our Python 3.9 environment can hold (`make toolchains`) runs beside this one and answers over pipes. Hides that process: its
protocol (`_myriad_worker.py`), its time-outs, its death. `device="CPU"` runs the same FP16 graph on the old runtime's CPU plugin,
which computes it in float32: that checks the protocol, the graph and its rounded weights where no stick is at hand.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from appliance.backends import Probe, Signature, Tensor, _toolchains
from appliance.backends._myriad_worker import FRAME, MAGIC, MAX_HEADER_BYTES, MAX_PAYLOAD_BYTES
from appliance.backends._sealed import seal, unseal
from appliance.backends._tiny import TINY_INPUT, TINY_ONNX, TINY_OUTPUT
from appliance.errors import BackendFailed, BackendUnavailable

REQUIRES: tuple[str, ...] = ()  # nothing in this environment: the runtime has its own
FORMAT = "ir-fp16"
SEALED = b"SPXMYR1\n"
DEVICES = ("MYRIAD", "CPU")
START_S, LOAD_S, RUN_S = 30.0, 120.0, 10.0
WORKER = Path(__file__).with_name("_myriad_worker.py")
_LOG_BYTES = 4096
_TINY = Signature((Tensor("image", (1, 4)),), (Tensor("out", (1, 4)),))


def wrap(xml: bytes, weights: bytes, signature: Signature) -> bytes:
    """The blob that `open` takes: an FP16 IR whose inputs and outputs are named and shaped as in `signature`."""
    return seal(SEALED, {"inputs": _listed(signature.inputs), "outputs": _listed(signature.outputs)}, {"xml": xml, "bin": weights})


def _listed(tensors: tuple[Tensor, ...]) -> list[dict[str, Any]]:
    return [{"name": t.name, "shape": list(t.shape)} for t in tensors]


class _Process:
    """The worker: one question at a time, each with a time limit; a worker that broke one is ended and stays ended."""

    def __init__(self, python: Path) -> None:
        if not python.exists():
            raise BackendUnavailable("the environment of the old runtime is not there", value=python, remedy="Run `make toolchains`.")
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the worker
        try:
            self._process = subprocess.Popen(
                [str(python), "-I", str(WORKER)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                env={"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "HOME": "/", "PYTHONDONTWRITEBYTECODE": "1"},
                start_new_session=True,
            )
        except OSError as error:
            self._log.close()
            raise BackendFailed(f"myriad: the old runtime's Python cannot be started: {error.strerror}", value=python) from error
        assert self._process.stdin is not None  # noqa: S101 - pipes, as asked for; for the type checker
        assert self._process.stdout is not None  # noqa: S101
        self._in, self._out = self._process.stdin.fileno(), self._process.stdout.fileno()
        os.set_blocking(self._in, False)
        os.set_blocking(self._out, False)

    def ask(self, header: dict[str, Any], payload: bytes, timeout_s: float) -> tuple[dict[str, Any], bytes]:
        """One question, its answer. Raises BackendFailed where the worker is dead, late, or answers with an error or nonsense."""
        if self._process.poll() is not None:
            raise BackendFailed(f"myriad: the worker process has ended: {self._last()}", value=self._process.returncode)
        text = json.dumps(header).encode()
        end = time.monotonic() + timeout_s
        try:
            self._send(memoryview(FRAME.pack(MAGIC, len(text), len(payload)) + text + payload), end)
            magic, header_bytes, payload_bytes = FRAME.unpack(self._receive(FRAME.size, end))
            if magic != MAGIC or header_bytes > MAX_HEADER_BYTES or payload_bytes > MAX_PAYLOAD_BYTES:
                raise BackendFailed("myriad: the worker answered nonsense", value=magic)
            answer = json.loads(self._receive(header_bytes, end))
            data = self._receive(payload_bytes, end)
        except BackendFailed:
            self.close()
            raise
        except (OSError, ValueError, RecursionError) as error:
            self.close()
            raise BackendFailed(f"myriad: the worker's answer cannot be read: {error}") from error
        if not isinstance(answer, dict) or "error" in answer:
            raise BackendFailed(f"myriad failed: {answer.get('error') if isinstance(answer, dict) else answer}")
        return answer, data

    def _send(self, rest: memoryview, end: float) -> None:
        while rest:
            self._wait([], [self._in], end)
            with contextlib.suppress(BlockingIOError):
                try:
                    rest = rest[os.write(self._in, rest) :]
                except BrokenPipeError as error:
                    raise BackendFailed(f"myriad: the worker process died: {self._last()}") from error

    def _receive(self, count: int, end: float) -> bytes:
        data = bytearray()
        while len(data) < count:
            self._wait([self._out], [], end)
            with contextlib.suppress(BlockingIOError):
                chunk = os.read(self._out, min(count - len(data), 1 << 20))
                if not chunk:
                    raise BackendFailed(f"myriad: the worker process died: {self._last()}")
                data += chunk
        return bytes(data)

    def _wait(self, readable: list[int], writable: list[int], end: float) -> None:
        left = end - time.monotonic()
        if left <= 0 or not any(select.select(readable, writable, [], left)):
            raise BackendFailed("myriad: the worker process did not answer in time", remedy="Unplug the stick, plug it in, try again.")

    def _last(self) -> str:
        with contextlib.suppress(ValueError, OSError):
            self._process.wait(1.0) if self._process.poll() is None else None
        with contextlib.suppress(subprocess.TimeoutExpired, ValueError, OSError):
            size = os.fstat(self._log.fileno()).st_size
            tail = os.pread(self._log.fileno(), _LOG_BYTES, max(0, size - _LOG_BYTES)).decode(errors="replace")
            return " / ".join(line.strip() for line in tail.splitlines()[-2:]) or f"exit status {self._process.poll()}"
        return "no word from it"

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._log):
            if stream:
                with contextlib.suppress(OSError):
                    stream.close()


class Session:
    """One owner at a time: the worker answers one question after the other."""

    def __init__(self, header: dict[str, Any], payload: bytes, signature: Signature, run_s: float = RUN_S) -> None:
        self._signature = signature
        self._run_s = run_s
        self._process = _Process(_toolchains.interpreter("myriad"))
        try:
            ports = {"inputs": _listed(signature.inputs), "outputs": _listed(signature.outputs)}
            self._process.ask({"op": "load", **ports, **header}, payload, LOAD_S)
        except BaseException:
            self._process.close()
            raise

    def run(self, inputs: dict[str, NDArray[np.float32]]) -> dict[str, NDArray[np.float32]]:
        expected = {t.name: t.shape for t in self._signature.inputs}
        if {n: x.shape for n, x in inputs.items()} != expected:
            raise BackendFailed(f"myriad needs the inputs {expected}", value={n: x.shape for n, x in inputs.items()})
        payload = b"".join(np.ascontiguousarray(inputs[t.name], "<f4").tobytes() for t in self._signature.inputs)
        _, data = self._process.ask({"op": "run"}, payload, self._run_s)
        outputs, at = {}, 0
        if len(data) != 4 * sum(int(np.prod(t.shape)) for t in self._signature.outputs):
            raise BackendFailed("myriad: the worker gave outputs of another size", value=len(data))
        for t in self._signature.outputs:
            count = int(np.prod(t.shape))
            outputs[t.name] = np.frombuffer(data, "<f4", count, at).reshape(t.shape).copy()
            at += 4 * count
        return outputs

    def close(self) -> None:
        self._process.close()


def probe() -> Probe:
    """Environment, plugin, stick, in this order; the first that is missing is the reason."""
    try:
        process = _Process(_toolchains.interpreter("myriad"))
    except (BackendUnavailable, BackendFailed) as error:
        return Probe("myriad", False, f"{error.what}; {error.remedy}")
    try:
        state, _ = process.ask({"op": "hello"}, b"", START_S)
    except BackendFailed as error:
        return Probe("myriad", False, error.what)
    finally:
        process.close()
    version = str(state.get("runtime"))
    if not state.get("plugin"):
        return Probe("myriad", False, f"the plugin cannot be loaded: {state.get('plugin_error')}", version, state)
    if not any(str(d).startswith("MYRIAD") for d in state.get("devices", [])):
        return Probe("myriad", False, "runtime and plugin are there; no Movidius stick is plugged in", version, state)
    try:
        session = Session({"device": "MYRIAD", "format": "onnx", "first_bytes": len(TINY_ONNX)}, TINY_ONNX, _TINY)
        out = session.run({"image": TINY_INPUT})["out"]
        session.close()
    except BackendFailed as error:
        return Probe("myriad", False, error.what, version, state)
    if not np.allclose(out, TINY_OUTPUT, atol=1e-2):
        return Probe("myriad", False, "the tiny model gave a wrong answer", version, state)
    return Probe("myriad", True, "ran a tiny model in FP16", version, state)


def build(graph: bytes) -> bytes:
    """Takes what the compiler's converter sealed and has the old runtime's CPU plugin load it, which proves that it can be read."""
    header, _ = unseal(SEALED, graph, "myriad")
    open(graph, _signature(header), precision="fp16", device="CPU").close()
    return graph


def _signature(header: dict[str, Any]) -> Signature:
    try:
        inputs, outputs = (
            tuple(Tensor(str(t["name"]), tuple(int(v) for v in t["shape"])) for t in header[k]) for k in ("inputs", "outputs")
        )
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise BackendFailed("myriad: the tensor list cannot be read") from error
    return Signature(inputs, outputs)


def open(  # noqa: A001
    blob: bytes, signature: Signature, *, precision: str = "fp16", threads: int = 0, device: str = "", cache: Path | None = None
) -> Session:
    """`precision` "fp16": what the stick computes in. `device` "MYRIAD" (default) or "CPU" (the old runtime's, to check a graph)."""
    del threads, cache
    if precision != "fp16":
        raise BackendFailed("a Movidius stick computes in FP16 only", value=precision, remedy="Ask for fp16.")
    if device and device not in DEVICES:
        raise BackendFailed(f"myriad runs on {' or '.join(DEVICES)}", value=device)
    header, parts = unseal(SEALED, blob, "myriad")
    found = _signature(header)
    if (set(found.inputs), set(found.outputs)) != (set(signature.inputs), set(signature.outputs)):
        raise BackendFailed("myriad: the engine has other inputs or outputs than the bundle says", value=found)
    if set(parts) != {"xml", "bin"}:
        raise BackendFailed("myriad: the IR is not whole", value=sorted(parts))
    order = {"device": device or DEVICES[0], "format": "ir", "first_bytes": len(parts["xml"])}
    return Session(order, parts["xml"] + parts["bin"], signature)
