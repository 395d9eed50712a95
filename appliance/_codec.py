"""Compressed pixels -> an array, by way of a process that may die.

Hides the processes that run `_decode`: starting them, keeping them warm, limiting each question in memory, processor time and
wall time, and replacing one that crashed, hung, lied or grew old. Thread-safe; a forked child starts its own.
"""

from __future__ import annotations

import atexit
import contextlib
import math
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from appliance import _decode
from appliance._limits import Limits
from appliance.errors import BackendUnavailable, OutOfTime, UndecodablePixels

_WORKERS: Final = 2
_START_TIMEOUT_S: Final = 60.0
# A fresh process now and then: codecs leak.
_JOBS_PER_WORKER: Final = 500


class _Worker:
    """One codec process and the socket to it. Not thread-safe: whoever took it from the pool owns it."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        environment = dict(os.environ, OPENBLAS_NUM_THREADS="1", OMP_NUM_THREADS="1", MALLOC_ARENA_MAX="1")
        command = [sys.executable, "-I", "-X", "faulthandler=0", str(Path(_decode.__file__).resolve())]
        null = subprocess.DEVNULL
        try:
            # No preexec_fn: the child sets its own limits, so that starting it is safe beside other threads.
            self.process = subprocess.Popen(
                command,
                stdin=theirs.fileno(),
                stdout=null,
                stderr=null,
                env=environment,
                start_new_session=True,
            )
        except OSError as exc:
            ours.close()
            raise BackendUnavailable("the codec process cannot be started", value=exc) from exc
        finally:
            theirs.close()
        self.socket = ours
        self.jobs = 0
        try:
            ready = self._receive(len(_decode.READY), time.monotonic() + _START_TIMEOUT_S)
        except OSError as exc:
            self.stop()
            raise BackendUnavailable(
                "the codec process ends before it is ready", value=exc, remedy="Check that pydicom, python-gdcm and OpenCV are installed."
            ) from exc
        if ready != _decode.READY:
            self.stop()
            raise BackendUnavailable("the codec process does not answer as it must", value=bytes(ready).hex())

    def _left(self, until_s: float) -> None:
        left = until_s - time.monotonic()
        if left <= 0:
            raise TimeoutError("time limit")
        self.socket.settimeout(left)

    def _receive(self, length: int, until_s: float) -> bytearray:
        out = bytearray(length)
        view = memoryview(out)
        while view:
            self._left(until_s)
            count = self.socket.recv_into(view)
            if count == 0:
                raise ConnectionResetError("the codec process ended")
            view = view[count:]
        return out

    def run(self, request: bytes, payload: bytes, max_bytes: int, until_s: float) -> tuple[tuple[Any, ...], bytearray]:
        """(response fields, body). Raises OSError (also TimeoutError) where the process fails or answers nonsense."""
        self.jobs += 1
        self._left(until_s)
        self.socket.sendall(request)
        self._left(until_s)
        self.socket.sendall(payload)
        fields = _decode.RESPONSE.unpack(self._receive(_decode.RESPONSE.size, until_s))
        magic, status, length = fields[0], fields[1], fields[-1]
        if magic != _decode.MAGIC or length > (max_bytes if status == _decode.STATUS_OK else _decode.MAX_MESSAGE_BYTES):
            raise ConnectionError("the codec process answers nonsense")
        return fields, self._receive(length, until_s)

    def usable(self) -> bool:
        return self.jobs < _JOBS_PER_WORKER and self.process.poll() is None

    def stop(self) -> None:
        self.socket.close()
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        self.process.wait()


class Pool:
    """Warm codec processes, at most `_WORKERS`, started when first needed."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.slots = threading.BoundedSemaphore(_WORKERS)
        self.idle: list[_Worker] = []

    def take(self) -> _Worker:
        while True:
            with self.lock:
                worker = self.idle.pop() if self.idle else None
            if worker is None:
                return _Worker()
            if worker.usable():
                return worker
            worker.stop()

    def give_back(self, worker: _Worker) -> None:
        with self.lock:
            self.idle.append(worker)

    def stop(self) -> None:
        with self.lock:
            idle, self.idle = self.idle, []
        for worker in idle:
            worker.stop()

    def run(self, request: bytes, payload: bytes, max_bytes: int, timeout_s: float) -> tuple[tuple[Any, ...], bytearray]:
        if not self.slots.acquire(timeout=timeout_s):
            raise OutOfTime("every codec process is busy", value=f"waited {timeout_s:g} s", remedy="Send it again in a moment.")
        try:
            worker = self.take()
            try:
                fields, body = worker.run(request, payload, max_bytes, time.monotonic() + timeout_s)
            except BaseException:
                worker.stop()
                raise
            if fields[1] == _decode.STATUS_OK:
                self.give_back(worker)
            else:
                # What failed on hostile bytes may be damaged: the next file gets a fresh process.
                worker.stop()
        finally:
            self.slots.release()
        return fields, body


_pool = Pool()


def _after_fork() -> None:
    """A forked child must not talk on its parent's sockets, nor mourn its parent's children."""
    global _pool
    for worker in _pool.idle:
        worker.socket.close()
        worker.process.returncode = 0
    _pool = Pool()


def _stop_workers() -> None:
    _pool.stop()


os.register_at_fork(after_in_child=_after_fork)
atexit.register(_stop_workers)


def warm_up() -> None:
    """Start a codec process now, so that the first compressed file does not wait for it. Raises BackendUnavailable."""
    pool = _pool
    with pool.slots:
        pool.give_back(pool.take())


def decode(
    payload: bytes,
    limits: Limits,
    *,
    syntax: str = "",
    shape: tuple[int, int] = (0, 0),
    allocated: int = 0,
    stored: int = 0,
    signed: bool = False,
) -> NDArray[Any]:
    """Run a codec in its process: a PNG or JPEG, or with `syntax` (a transfer syntax UID) one DICOM frame of `shape` (rows,
    columns), of `stored` of `allocated` bits. H x W or H x W x C, native byte order. Raises UndecodablePixels, OutOfTime,
    BackendUnavailable.
    """
    request = _decode.REQUEST.pack(
        _decode.MAGIC,
        _decode.KIND_DICOM if syntax else _decode.KIND_RASTER,
        syntax.encode("ascii"),
        *shape,
        allocated,
        stored,
        signed,
        limits.decode_memory_bytes,
        math.ceil(limits.decode_timeout_s) + 1,
        len(payload),
    )
    try:
        fields, body = _pool.run(request, payload, 2 * limits.max_decoded_bytes, limits.decode_timeout_s)
    except TimeoutError as exc:
        raise UndecodablePixels("decoding takes longer than allowed", value=f"{limits.decode_timeout_s:g} s") from exc
    except OSError as exc:
        raise UndecodablePixels("the codec crashed on this picture", value=exc) from exc
    _, status, dtype_kind, item_size, height, width, channels, length = fields
    if status == _decode.STATUS_MISSING:
        raise BackendUnavailable("a codec is missing", value=body.decode("utf-8", "replace"), remedy="Install python-gdcm.")
    if status == _decode.STATUS_MEMORY:
        raise UndecodablePixels("decoding needs more memory than allowed", value=f"{limits.decode_memory_bytes} bytes")
    if status != _decode.STATUS_OK:
        raise UndecodablePixels("the codec cannot decode this picture", value=body.decode("utf-8", "replace"))
    if dtype_kind not in (b"u", b"i") or item_size not in (1, 2, 4) or height * width * channels * item_size != length or not length:
        raise UndecodablePixels("the codec answers nonsense", value=f"{height} x {width} x {channels}")
    array = np.frombuffer(body, dtype=np.dtype(f"<{dtype_kind.decode('ascii')}{item_size}"))
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    return array.reshape((height, width) if channels == 1 else (height, width, channels))
