"""The process that owns the engines. It may crash, hang or grow without end; the daemon outlives it (`appliance.workers`).

Hides the loop over one socket in which it is asked. Messages are small JSON objects, one a packet; images, maps and reports lie in two
shared memories, one written by the daemon, one by this process. No pickle crosses in either direction.

    daemon                                      worker
    answer {bytes, rung, richest}         ->
                                          <-    read {}                          the image can be read
                                          <-    stretch {protocol, stretch, ms}  a stretch of work is done; what now?
    {rung} or {drop}                      ->
                                          <-    done {report, evidence, ...} | refused {error, ...}
    infer {model, inputs}                 ->
                                          <-    done {outputs} | refused {error}
    fall_back {model}, measure {}, passes {model, limit_ms}, ping {}, adopt {}   likewise
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import json
import logging
import math
import mmap
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from appliance import backends, kept, study
from appliance.budget import RUNGS
from appliance.bundle import Build, Bundle, open_bundle
from appliance.certificate import BLOCKING_QUANTILE, DeviceRecord, Subject, passes_needed, refuse_above
from appliance.engine import PROTOCOL, Engine
from appliance.errors import RequestGone, SpineboxError, SpineNotFound, UsageError, WrongModality
from appliance.protocols import ProtocolModule
from appliance.report import Report

log = logging.getLogger("spinebox.worker")

MOST_MESSAGE_BYTES = 1 << 17  # of one packet
IN_BYTES, OUT_BYTES = 1 << 27, 1 << 28  # of the shared memories; pages are taken when they are written
MEASURED_RUNS = 6  # of each path, where nothing is known yet; one more than appliance.costs asks for
POLITE = 10  # niceness while the engines are loaded: others are being answered meanwhile
_PR_SET_PDEATHSIG = 1


class _Steer:
    """Asks the daemon after each stretch. Raises RequestGone where the daemon drops the request."""

    def __init__(self, link: _Link, rung: str, richest: str) -> None:
        self.rung, self.richest = rung, richest
        self.protocol: ProtocolModule | None = None
        self._link = link
        self.since_s = time.perf_counter()

    def stretch_ms(self) -> float:
        return (time.perf_counter() - self.since_s) * 1e3

    def go_on(self, protocol: ProtocolModule, stretch: str, rung: str) -> str:
        self.protocol = protocol
        self._link.send(at="stretch", protocol=protocol.NAME, stretch=stretch, rung=rung, ms=self.stretch_ms())
        told = self._link.receive()
        self.since_s = time.perf_counter()
        if "rung" not in told:
            raise RequestGone("the client went away while its study was computed")
        return str(told["rung"])


class _Always:
    """One rung to the end, with the time of each stretch: what the first measurement is made of."""

    def __init__(self, rung: str) -> None:
        self.rung = self.richest = rung
        self.times: list[tuple[str, float]] = []
        self.since_s = time.perf_counter()

    def go_on(self, protocol: ProtocolModule, stretch: str, rung: str) -> str:  # noqa: ARG002 - as Steer has it
        now_s = time.perf_counter()
        self.times.append((stretch, (now_s - self.since_s) * 1e3))
        self.since_s = now_s
        return rung


class _Link:
    """The socket and the two memories."""

    def __init__(self, socket_fd: int, in_fd: int, out_fd: int) -> None:
        self._socket = socket.socket(fileno=socket_fd)
        self.given = mmap.mmap(in_fd, IN_BYTES)
        self.made = mmap.mmap(out_fd, OUT_BYTES)
        os.close(in_fd)
        os.close(out_fd)

    def send(self, **message: Any) -> None:
        self._socket.sendall(json.dumps(message).encode())

    def receive(self) -> dict[str, Any]:
        """Raises EOFError where the daemon has gone."""
        packet = self._socket.recv(MOST_MESSAGE_BYTES)
        if not packet:
            raise EOFError
        message: dict[str, Any] = json.loads(packet)
        return message

    def put(self, parts: Sequence[bytes]) -> list[int]:
        """Write `parts` one after the other into the memory of this process; their lengths. Raises UsageError where they do not fit."""
        if sum(map(len, parts)) > OUT_BYTES:
            raise UsageError("the answer is larger than the shared memory", value=f"{sum(map(len, parts))} of {OUT_BYTES} bytes")
        at = 0
        for part in parts:
            self.made[at : at + len(part)] = part
            at += len(part)
        return [len(p) for p in parts]


class _Worker:
    """The loop. One question at a time, each answered before the next is read."""

    def __init__(self, link: _Link, engine: Engine) -> None:
        self._link, self._engine = link, engine

    def run(self) -> None:
        questions = {
            "answer": self._answer,
            "infer": self._infer,
            "fall_back": self._fall_back,
            "measure": self._measure,
            "passes": self._passes,
            "ping": lambda _: self._link.send(at="done"),
            "adopt": self._adopt,
        }
        with contextlib.suppress(EOFError):
            while True:
                question = self._link.receive()
                questions[question["op"]](question)

    def _adopt(self, _: dict[str, Any]) -> None:
        _be_nice(0)
        self._link.send(at="done")

    def _answer(self, question: dict[str, Any]) -> None:
        steer = _Steer(self._link, question["rung"], question["richest"])
        instance: study.Instance | None = None
        try:
            instance = study.read(bytes(self._link.given[: question["bytes"]]))
            read_ms = steer.stretch_ms()
            self._link.send(at="read")
            report = self._engine.run(instance, steer=steer)
            report.timing_ms["read"] = read_ms
            self._deliver(report, steer)
        except RequestGone:
            self._link.send(at="dropped")
        except SpineboxError as error:
            source = dict(instance.source) if instance is not None else None
            family = getattr(error, "family", None)
            self._link.send(at="refused", error=error.to_json(), source=source, family=family, ms=steer.stretch_ms())
        except (EOFError, OSError, MemoryError):
            raise  # the daemon has gone, or starts another process
        except Exception as exc:
            log.exception("a study failed")
            bug = SpineboxError("an unexpected failure inside the appliance", value=type(exc).__name__)
            source = dict(instance.source) if instance is not None else None
            self._link.send(at="refused", error=bug.to_json(), source=source, family=None, ms=steer.stretch_ms())

    def _deliver(self, report: Report, steer: _Steer) -> None:
        began_s = time.perf_counter()
        evidence = kept.pack(report)
        report.timing_ms["encode"] = (time.perf_counter() - began_s) * 1e3
        text = json.dumps(report.to_json(), allow_nan=False, separators=(",", ":")).encode()
        lengths = self._link.put([text, evidence or b""])
        path = steer.protocol.PATHS[report.rung] if steer.protocol is not None else ("whole",)
        self._link.send(at="done", report=lengths[0], evidence=lengths[1], stretch=path[-1], ms=steer.stretch_ms())

    def _infer(self, question: dict[str, Any]) -> None:
        began_s = time.perf_counter()
        try:
            inputs = {
                name: np.frombuffer(self._link.given, np.float32, math.prod(shape), offset).reshape(shape)
                for name, shape, offset in question["inputs"]
            }
            outputs = self._engine.infer(question["model"], inputs)
            told, at = [], 0
            for name, values in outputs.items():
                flat = np.frombuffer(self._link.made, np.float32, values.size, at)
                flat[:] = values.ravel()
                told.append([name, list(values.shape), at])
                at += values.nbytes
            self._link.send(at="done", outputs=told, ms=(time.perf_counter() - began_s) * 1e3)
        except SpineboxError as error:
            self._link.send(at="refused", error=error.to_json(), source=None, family=question["model"], ms=0.0)

    def _fall_back(self, question: dict[str, Any]) -> None:
        self._link.send(at="done", backend=self._engine.fall_back(question["model"]), used=self._engine.used)

    def _measure(self, _: dict[str, Any]) -> None:
        """What each stretch of each protocol takes on synthetic images: [protocol, stretch, pixels, ms] each."""
        found: list[list[Any]] = []
        for protocol in self._engine.protocols:
            data = _phantom(protocol.NAME)
            for rung in dict.fromkeys(RUNGS):
                for _run in range(MEASURED_RUNS):
                    pixels, times = self._stretches_ms(protocol, data, rung)
                    found += [[protocol.NAME, stretch, pixels, ms] for stretch, ms in times]
        for family in self._engine.used:
            found += [["infer", family, 0, ms] for ms in self._inference_ms(family)]
        self._link.put([text := json.dumps(found).encode()])
        self._link.send(at="done", bytes=len(text))

    def _passes(self, question: dict[str, Any]) -> None:
        """How many straight passes of an engine keep to a limit, of the 459 that prove its 99th percentile at 99 %."""
        model, limit_ms, needed = question["model"], float(question["limit_ms"]), passes_needed(0.99, 0.99)
        blank = {t.name: np.zeros(t.shape, np.float32) for t in self._engine.bundle.engine(model).signature.inputs}
        passes, longest_ms = 0, 0.0
        while passes < needed:
            began_s = time.perf_counter()
            self._engine.infer(model, blank)
            ms = (time.perf_counter() - began_s) * 1e3
            longest_ms = max(longest_ms, ms)
            if ms > limit_ms:
                break
            passes += 1
        self._link.send(at="done", passes=passes, needed=needed, longest_ms=longest_ms)

    def _stretches_ms(self, protocol: ProtocolModule, data: bytes, rung: str) -> tuple[int, list[tuple[str, float]]]:
        """(pixels, the time of each stretch of the rung's path); where the engines see no spine, what is never come to takes nothing."""
        steer = _Always(rung)
        instance = study.read(data)
        path = protocol.PATHS[rung]
        try:
            report = self._engine.run(instance, steer=steer)
            kept.pack(report)
            json.dumps(report.to_json())
        except (SpineNotFound, WrongModality):
            pass
        steer.go_on(protocol, path[len(steer.times)], rung)
        return instance.pixels.size, steer.times + [(stretch, 0.0) for stretch in path[len(steer.times) :]]

    def _inference_ms(self, family: str) -> list[float]:
        blank = {t.name: np.zeros(t.shape, np.float32) for t in self._engine.bundle.engine(family).signature.inputs}
        times = []
        for _ in range(4 * MEASURED_RUNS):
            began_s = time.perf_counter()
            self._engine.infer(family, blank)
            times.append((time.perf_counter() - began_s) * 1e3)
        return times


def _phantom(protocol: str) -> bytes:
    """A synthetic image that the protocol answers, as a file."""
    import cv2

    from models import phantom, phantom_ap

    if protocol == PROTOCOL:
        return phantom.write_dicom(*phantom.demo())
    image, _ = phantom_ap.draw(np.random.default_rng(3))
    return bytes(cv2.imencode(".png", np.rint(image / image.max() * 255).astype(np.uint8))[1].tobytes())


def _be_nice(value: int) -> None:
    """Of every thread of this process: niceness belongs to threads, and those of a runtime took that of their maker."""
    for thread in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, int(thread.name), value)


def _may_be_nice() -> bool:
    """Whether a raised niceness could be taken back here: it needs root, or LimitNICE in the unit."""
    try:
        os.setpriority(os.PRIO_PROCESS, 0, os.getpriority(os.PRIO_PROCESS, 0) + 1)
        os.setpriority(os.PRIO_PROCESS, 0, os.getpriority(os.PRIO_PROCESS, 0) - 1)
    except OSError:
        return False
    return True


def _signatures(engine: Engine) -> dict[str, Any]:
    found = {}
    for family in engine.used:
        signature = engine.bundle.engine(family).signature
        found[family] = {
            "inputs": [[t.name, list(t.shape)] for t in signature.inputs],
            "outputs": [[t.name, list(t.shape)] for t in signature.outputs],
        }
    return found


def _barring(bundle: Bundle, folder: Path, threads: int, allowance_ms: float) -> Callable[[str, Build], str]:
    """An inference cannot be interrupted: an engine may block the device only as long as it has proven that it does not take longer."""
    record = DeviceRecord.open(folder)

    def barred(model: str, build: Build) -> str:
        runtime = backends.probe(build.backend).version or ""
        subject = Subject(model, build.backend, runtime, build.precision, threads, record.fingerprint, bundle.digest)
        return refuse_above(record.find(subject, BLOCKING_QUANTILE), allowance_ms)

    return barred


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="The process that owns the engines; the daemon starts it.")
    for name in ("socket", "given", "made", "threads"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--backend", required=True)
    parser.add_argument("--cache", type=Path, default=None)
    parser.add_argument("--polite", action="store_true")
    parser.add_argument("--blocking-ms", type=float, default=None)
    parser.add_argument("--record", type=Path, default=None)
    asked = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    # Without its daemon there is nothing to do, and to stop is the daemon's to decide.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("500")
    if asked.polite and _may_be_nice():
        _be_nice(POLITE)
    link = _Link(asked.socket, asked.given, asked.made)
    began_s = time.perf_counter()
    try:
        bundle = open_bundle(asked.bundle)
        barred = None if asked.blocking_ms is None else _barring(bundle, asked.record, asked.threads, asked.blocking_ms)
        with Engine(bundle, asked.backend, asked.threads, asked.cache, barred) as engine:
            study.warm_up()
            # What is there now stays: without this the collector walks over all of it every few seconds, in the middle of an answer.
            gc.collect()
            gc.freeze()
            link.send(
                at="up",
                used=engine.used,
                versions={name: backends.probe(name).version or "" for name in set(engine.used.values())},
                protocols=[p.NAME for p in engine.protocols],
                models=_signatures(engine),
                bundle=engine.bundle.identity,
                ms=(time.perf_counter() - began_s) * 1e3,
            )
            _Worker(link, engine).run()
    except SpineboxError as error:
        with contextlib.suppress(OSError):
            link.send(at="refused", error=error.to_json())
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
