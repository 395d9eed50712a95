"""NVIDIA TensorRT on a Jetson or a PC's GPU. The bundle carries a symmetric Q/DQ graph; the device builds its own engine from it.

Hides the build, the cache that spares it (keyed by device, runtime, driver and graph; a corrupt entry is built again), the CUDA
context and the buffers. An engine built elsewhere may run slower or not at all, so none is shipped. Each session retains the
device's primary context and makes it current around every call, so whichever thread calls may do so; inputs and outputs pass
through pinned memory on the session's own stream.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from appliance.backends import Probe, Signature, Tensor
from appliance.backends._enginecache import EngineCache, Key
from appliance.backends._tensorrt_build import BuildRefused, logger_of
from appliance.backends._tensorrt_build import build as build_engine
from appliance.backends._tiny import TINY_INPUT, TINY_ONNX, TINY_OUTPUT
from appliance.errors import BackendFailed, BackendUnavailable

REQUIRES = ("tensorrt", "pycuda")
FORMAT = "onnx-symmetric"
OLDEST = (10, 0)  # named tensors and execute_async_v3
_TINY = Signature((Tensor("image", (1, 4)),), (Tensor("out", (1, 4)),))


def _runtime() -> tuple[Any, Any]:
    """TensorRT and the CUDA driver, initialised. Raises BackendUnavailable."""
    try:
        trt = importlib.import_module("tensorrt")
        cuda = importlib.import_module("pycuda.driver")
    except ImportError as error:
        raise BackendUnavailable(f"tensorrt cannot be imported: {error}", remedy="pip install 'spinebox[tensorrt]'") from error
    if tuple(int(p) for p in str(trt.__version__).split(".")[:2]) < OLDEST:
        raise BackendUnavailable("this TensorRT is too old; 10.0 or newer is needed", value=trt.__version__)
    try:
        cuda.init()
        if not cuda.Device.count():
            raise BackendUnavailable("no CUDA device is here")
    except BackendUnavailable:
        raise
    except Exception as error:
        raise BackendUnavailable(f"CUDA cannot be initialised: {error}") from error
    return trt, cuda


def _number(device: str) -> int:
    """ "", "GPU" or "GPU.1" -> the number of the card."""
    name, _, number = (device or "GPU").partition(".")
    if name != "GPU" or not (number or "0").isdecimal():
        raise BackendFailed("tensorrt runs on GPU or GPU.n", value=device)
    return int(number or 0)


class _Device:
    """One card's primary context, which TensorRT itself works in."""

    def __init__(self, cuda: Any, number: int) -> None:
        if number >= cuda.Device.count():
            raise BackendFailed("there is no such GPU", value=f"GPU.{number} of {cuda.Device.count()}")
        self.card = cuda.Device(number)
        self._context = self.card.retain_primary_context()

    @contextlib.contextmanager
    def current(self) -> Iterator[None]:
        """Current on this thread until the end, and nothing left on its stack."""
        self._context.push()
        try:
            yield
        finally:
            self._context.pop()

    def key(self, trt: Any, cuda: Any, graph: bytes) -> Key:
        major, minor = self.card.compute_capability()
        return Key(
            device=f"{self.card.name()} SM{major}{minor} {self.card.total_memory() >> 20} MiB",
            runtime=f"tensorrt {trt.__version__} cuda {'.'.join(map(str, cuda.get_version()))}",
            driver=str(cuda.get_driver_version()),
            graph_sha256=hashlib.sha256(graph).hexdigest(),
        )


def _engine(trt: Any, cuda: Any, device: _Device, graph: bytes, cache: EngineCache, logger: Any) -> Any:
    """A deserialised engine: the kept one, or one built now with the device's timing cache. Called with the context current."""
    key = device.key(trt, cuda, graph)
    timing = Key(key.device, key.runtime, key.driver, "", "timing cache")
    runtime = trt.Runtime(logger)

    def make() -> bytes:
        built = build_engine(trt, graph, timing_cache=cache.get(timing) or b"", logger=logger)
        if built.timing_cache:
            cache.put(timing, built.timing_cache)
        return built.engine

    engine = runtime.deserialize_cuda_engine(cache.engine(key, make))
    if engine is None:
        # Whole, and still not taken back: built by another library that calls itself the same. Once more from the graph.
        cache.drop(key)
        engine = runtime.deserialize_cuda_engine(cache.engine(key, make))
    if engine is None:
        raise BackendFailed(f"tensorrt does not take its own engine: {' / '.join(logger.lines[-2:])}")
    return engine


class Session:
    """Any thread may call `run`; one at a time, which a lock sees to, because the buffers are the session's."""

    def __init__(self, graph: bytes, signature: Signature, device: str, cache: EngineCache) -> None:
        self._trt, self._cuda = trt, cuda = _runtime()
        self._signature = signature
        self._lock = threading.Lock()
        self._device = _Device(cuda, _number(device))
        self._open = False
        logger = logger_of(trt)
        try:
            with self._device.current():
                self._engine = _engine(trt, cuda, self._device, graph, cache, logger)
                self._check()
                self._context = self._engine.create_execution_context()
                if self._context is None:
                    raise BackendFailed(f"tensorrt has no room for the engine: {' / '.join(logger.lines[-2:])}")
                self._stream = cuda.Stream()
                self._host, self._card = {}, {}
                for t in (*signature.inputs, *signature.outputs):
                    self._host[t.name] = cuda.pagelocked_empty(t.shape, np.float32)
                    self._card[t.name] = cuda.mem_alloc(self._host[t.name].nbytes)
                    if not self._context.set_tensor_address(t.name, int(self._card[t.name])):
                        raise BackendFailed(f"tensorrt has no tensor {t.name}")
                self._open = True
        except BackendFailed:
            raise
        except BuildRefused as error:
            named = "; ".join(f"{e['operator']} {e['node']}: {e['what']}" for e in error.errors[:3])
            raise BackendFailed(f"tensorrt cannot build the engine: {error}: {named[:600]}") from error
        except Exception as error:
            raise BackendFailed(f"tensorrt cannot open the engine: {str(error).strip().splitlines()[-1:]}") from error

    def _check(self) -> None:
        """The engine's tensors against the bundle's, before a buffer of the wrong size is handed to native code."""
        trt, engine = self._trt, self._engine
        found: dict[bool, set[Tensor]] = {True: set(), False: set()}
        for i in range(engine.num_io_tensors):
            name = engine.get_tensor_name(i)
            if engine.get_tensor_dtype(name) != trt.float32:
                raise BackendFailed(f"tensorrt: {name} is not float32 at the border", value=engine.get_tensor_dtype(name))
            is_input = engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT
            found[is_input].add(Tensor(name, tuple(int(d) for d in engine.get_tensor_shape(name))))
        if found[True] != set(self._signature.inputs) or found[False] != set(self._signature.outputs):
            raise BackendFailed("tensorrt: the engine has other inputs or outputs than the bundle says", value=found)

    def run(self, inputs: dict[str, NDArray[np.float32]]) -> dict[str, NDArray[np.float32]]:
        expected = {t.name: t.shape for t in self._signature.inputs}
        if {n: x.shape for n, x in inputs.items()} != expected:
            raise BackendFailed(f"tensorrt needs the inputs {expected}", value={n: x.shape for n, x in inputs.items()})
        with self._lock:
            if not self._open:
                raise BackendFailed("tensorrt: the session is closed")
            try:
                with self._device.current():
                    for name, x in inputs.items():
                        np.copyto(self._host[name], x)
                        self._cuda.memcpy_htod_async(self._card[name], self._host[name], self._stream)
                    if not self._context.execute_async_v3(self._stream.handle):
                        raise BackendFailed("tensorrt failed to start the engine")
                    for t in self._signature.outputs:
                        self._cuda.memcpy_dtoh_async(self._host[t.name], self._card[t.name], self._stream)
                    self._stream.synchronize()
                    # Copied: the pinned buffers are used again by the next call.
                    return {t.name: np.array(self._host[t.name]) for t in self._signature.outputs}
            except BackendFailed:
                raise
            except Exception as error:
                raise BackendFailed(f"tensorrt failed: {str(error).strip().splitlines()[-1:]}") from error

    def close(self) -> None:
        with self._lock:
            if self._open:
                self._open = False
                # Device memory is freed by pycuda's destructors, which need the context that it was taken in.
                with self._device.current():
                    self._card, self._host = {}, {}
                    del self._context, self._engine, self._stream


def probe() -> Probe:
    """A tiny float graph, built and run on the card; the cache spares the build at the next start."""
    try:
        trt, cuda = _runtime()
        session = Session(TINY_ONNX, _TINY, "", EngineCache())
        out = session.run({"image": TINY_INPUT})["out"]
        session.close()
    except (BackendUnavailable, BackendFailed) as error:
        return Probe("tensorrt", False, error.what)
    version = str(trt.__version__)
    if not np.allclose(out, TINY_OUTPUT, atol=1e-3):  # TF32 has eleven bits
        return Probe("tensorrt", False, "the tiny model gave a wrong answer", version)
    cards = [cuda.Device(i).name() for i in range(cuda.Device.count())]
    return Probe("tensorrt", True, "built and ran a tiny model", version, {"devices": cards, "driver": str(cuda.get_driver_version())})


def build(graph: bytes) -> bytes:
    """The portable graph is what a device builds from. Where TensorRT is here, parsing and building it once proves that it can."""
    trt, cuda = _runtime()
    try:
        with _Device(cuda, 0).current():
            build_engine(trt, graph)
    except BuildRefused as error:
        named = "; ".join(f"{e['operator']} {e['node']}: {e['what']}" for e in error.errors[:3])
        raise BackendFailed(f"tensorrt cannot build the engine: {error}: {named[:600]}") from error
    return graph


def open(  # noqa: A001
    blob: bytes, signature: Signature, *, precision: str = "int8", threads: int = 0, device: str = "", cache: Path | None = None
) -> Session:
    """`precision` "int8" or "f32": what the graph says; the network is strongly typed. `device` "GPU" or "GPU.n". `cache` is the
    folder of built engines; the first opening of a graph builds, which takes minutes on a Jetson."""
    del threads
    if precision not in ("int8", "f32"):
        raise BackendFailed(f"tensorrt runs what the graph says, which is not {precision}", value=precision)
    return Session(blob, signature, device, EngineCache(cache))
