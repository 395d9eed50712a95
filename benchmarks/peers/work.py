"""The work that every peer does, so that only the serving differs: a study to a report at the full rung, or one inference.

Hides the engines. Runs in a peer's environment, where spinebox is installed beside the peer.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from appliance import backends, render, study
from appliance.backends import Session, Signature
from appliance.budget import Budget
from appliance.bundle import open_bundle
from appliance.engine import Engine
from appliance.errors import BackendUnavailable

BUDGET_HEADER = "X-Latency-Budget-Ms"
AMPLE_MS = 600_000.0  # no rung but the full one: a peer has no ladder
MODEL = "SPINEBOX_PEER_MODEL"  # which model is the small one
LONGEST_S = 0.6  # the longest deadline that the benchmark offers: the best time-out of a server that has one for all requests
MODE = "SPINEBOX_PEER_MODE"  # for servers that a command starts and that take no options of ours
THREADS = "SPINEBOX_PEER_THREADS"


class Studies:
    """DICOM bytes in, report JSON out, at the full rung. Entered engines; one owner calls."""

    def __init__(self, threads: int = 0) -> None:
        study.warm_up()
        render.warm_up()
        self._engine = Engine(open_bundle(), threads=threads).__enter__()

    def answer(self, data: bytes) -> bytes:
        """Raises StudyError, Refusal, BackendError as the appliance does."""
        report = self._engine.run(study.read(data), Budget(AMPLE_MS).start())
        return json.dumps(report.to_json()).encode()

    def close(self) -> None:
        self._engine.close()


def small() -> str:
    """The small model, the detector unless the launcher says another."""
    return os.environ.get(MODEL, "detector")


class SmallModel:
    """One inference of the small model: float32 bytes of its input in, float32 bytes of its outputs, one after another, out."""

    def __init__(self, threads: int = 0) -> None:
        self.signature, self._session = _open_small(threads)
        (self._input,) = self.signature.inputs

    def run(self, x: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
        return self._session.run({self._input.name: x})

    def infer(self, data: bytes) -> bytes:
        """Raises ValueError where the bytes are not one input."""
        found = self.run(np.frombuffer(data, np.float32).reshape(self._input.shape))
        return b"".join(np.ascontiguousarray(found[t.name], np.float32).tobytes() for t in self.signature.outputs)

    def close(self) -> None:
        self._session.close()


def _open_small(threads: int) -> tuple[Signature, Session]:
    """The build that an Engine of the shipped bundle would take for the small model."""
    bundle = open_bundle()
    entry = bundle.engine(small())
    for build in entry.order():
        if backends.probe(build.backend).available:
            graph = bundle.read(build.graph) if build.graph else b""
            return entry.signature, backends.load(build.backend).open(
                graph, entry.signature, precision=build.precision, threads=threads, device=""
            )
    raise BackendUnavailable("no runtime of this environment opens the small model", value=small())


def work_of(mode: str, threads: int) -> Callable[[bytes], bytes]:
    """The work of a mode, "study" or "infer", opened and ready: bytes in, bytes out."""
    return Studies(threads).answer if mode == "study" else SmallModel(threads).infer


def from_environment() -> tuple[str, int]:
    """(mode, threads) that the launcher set."""
    return os.environ.get(MODE, "study"), int(os.environ.get(THREADS, "0"))


def until_s(headers: Mapping[str, str], arrived_s: float | None = None) -> float:
    """Monotonic moment at which the answer is of no more use; an hour from now where the request states none."""
    arrived_s = time.monotonic() if arrived_s is None else arrived_s
    asked = headers.get(BUDGET_HEADER) or headers.get(BUDGET_HEADER.lower())
    return arrived_s + (float(asked) / 1e3 if asked else 3600.0)
