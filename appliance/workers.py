"""The processes that own the engines, and that one is always there: a worker at work, a warm one standing by.

Hides starting, watching, killing and replacing them, and the wire to them. A worker that crashes, is stopped, hangs over a question
or grows past its memory is killed and the standby takes its place at once; another is then started. Whoever asked is told by
WorkerLost; asking again is up to them.
"""

from __future__ import annotations

import contextlib
import json
import logging
import mmap
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from appliance.errors import SpineboxError, UsageError, WorkerLost, error_from_json
from appliance.worker import IN_BYTES, MOST_MESSAGE_BYTES, OUT_BYTES

log = logging.getLogger("spinebox.workers")

START_S = 120.0  # a first start may compile engines
# Between two looks at memory and at idle workers. The kernel says when one ends or is stopped; a look costs half a millisecond of two
# processors, which every answer in the meantime would wait for.
WATCH_S = 1.0
START_WATCH_S = 0.05  # while one is being started
PING_S, PONG_S = 1.0, 1.0  # an idle worker is asked so often, and must answer within
RESPAWN_S = (0.0, 0.0, 0.5, 1.0, 2.0)  # waits before the next start after so many that failed one after the other
KEEP_BYTES = 1 << 23  # of the shared memory of a large study, kept for the next
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Plan:
    """What a worker is started with. `memory_bytes` is the resident memory beyond which it is killed, `cache` a folder for compiled
    engines. With `blocking_ms` only engines serve whose p99.9 is proven to lie below in the device's record, kept in `record`."""

    bundle: Path
    backend: str = "auto"
    threads: int = 0
    memory_bytes: int = 1 << 32
    cache: Path | None = None
    record: Path | None = None
    blocking_ms: float | None = None


class Worker:
    """One process and the wire to it. One question at a time: whoever asks holds `lock`."""

    def __init__(self, plan: Plan, polite: bool) -> None:
        self.plan = plan
        self.lock = threading.Lock()
        self.lost_because = ""
        self.up: dict[str, Any] = {}
        self.asked_s = self.started_s = time.monotonic()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        given, made = os.memfd_create("spinebox-given"), os.memfd_create("spinebox-made")
        try:
            os.ftruncate(given, IN_BYTES)
            os.ftruncate(made, OUT_BYTES)
            self._given, self._made = mmap.mmap(given, IN_BYTES), mmap.mmap(made, OUT_BYTES)
            fds = (theirs.fileno(), given, made)
            command = [sys.executable, "-m", "appliance.worker", "--bundle", str(plan.bundle), "--backend", plan.backend]
            command += ["--threads", str(plan.threads), *(["--polite"] if polite else [])]
            command += [] if plan.cache is None else ["--cache", str(plan.cache)]
            if plan.blocking_ms is not None:
                command += ["--blocking-ms", str(plan.blocking_ms), "--record", str(plan.record)]
            command += [f"--{name}={fd}" for name, fd in zip(("socket", "given", "made"), fds, strict=True)]
            self.process = subprocess.Popen(command, pass_fds=fds, stdin=subprocess.DEVNULL, start_new_session=True)
        finally:
            theirs.close()
            os.close(given)
            os.close(made)
        self._socket = ours

    @property
    def pid(self) -> int:
        return self.process.pid

    def alive(self) -> bool:
        return not self.lost_because and self.process.poll() is None

    def rss_bytes(self) -> int:
        """Resident memory, the shared one included; 0 where the process has gone."""
        try:
            return int(Path(f"/proc/{self.pid}/statm").read_text().split()[1]) * PAGE_BYTES
        except (OSError, IndexError, ValueError):
            return 0

    def stopped(self) -> bool:
        """Whether somebody stopped it (SIGSTOP, a debugger)."""
        try:
            return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] in ("T", "t")
        except (OSError, IndexError):
            return False

    def kill(self, because: str) -> None:
        """Once; the first reason is kept. Whoever waits for an answer gets WorkerLost."""
        if not self.lost_because:
            self.lost_because = because
        with contextlib.suppress(OSError):
            self.process.send_signal(signal.SIGKILL)
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """After `kill`: reap it and give back what it held."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(5)
        with self.lock:
            self._socket.close()
            self._given.close()
            self._made.close()

    def wait_up(self) -> None:
        """Until its engines are loaded. Raises what it was refused with, WorkerLost."""
        told = self.receive(START_S)
        if told["at"] != "up":
            self.kill("it did not start")
            raise error_from_json(told["error"])
        self.up = told

    # -- the wire; `lock` is held ---------------------------------------------------------------------------------------

    def send(self, message: Mapping[str, Any]) -> None:
        try:
            self._socket.sendall(json.dumps(message).encode())
        except OSError as exc:
            raise self._lost() from exc

    def receive(self, timeout_s: float) -> dict[str, Any]:
        """The next message. Raises WorkerLost where the process ends or says nothing for so long, which ends it."""
        try:
            self._socket.settimeout(timeout_s)
            packet = self._socket.recv(MOST_MESSAGE_BYTES)
        except TimeoutError as exc:
            self.kill(f"it said nothing for {timeout_s * 1e3:.0f} ms")
            raise self._lost() from exc
        except OSError as exc:
            raise self._lost() from exc
        if not packet:
            raise self._lost()
        message: dict[str, Any] = json.loads(packet)
        return message

    def ask(self, message: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
        """One question, one answer. Raises what it was refused with, WorkerLost."""
        self.send(message)
        told = self.receive(timeout_s)
        if told["at"] == "refused":
            error = error_from_json(told["error"])
            if told.get("family"):
                error.family = told["family"]  # type: ignore[attr-defined]
            raise error
        return told

    def give(self, data: bytes) -> None:
        self._given[: len(data)] = data

    def give_arrays(self, arrays: Mapping[str, NDArray[np.float32]]) -> list[list[Any]]:
        """Write them one after the other; what the worker is told of them: [name, shape, offset]."""
        told, at = [], 0
        for name, values in arrays.items():
            np.frombuffer(self._given, np.float32, values.size, at)[:] = values.ravel()
            told.append([name, list(values.shape), at])
            at += values.nbytes
        return told

    def made(self, lengths: Sequence[int]) -> list[bytes]:
        """Copies of the parts that the worker wrote, one after the other."""
        out, at = [], 0
        for length in lengths:
            out.append(bytes(self._made[at : at + length]))
            at += length
        return out

    def made_arrays(self, told: Sequence[tuple[str, Sequence[int], int]]) -> dict[str, NDArray[np.float32]]:
        return {name: np.frombuffer(self._made, np.float32, int(np.prod(shape)), at).reshape(shape).copy() for name, shape, at in told}

    def tidy(self, used_bytes: int) -> None:
        """Give the pages of a large study back."""
        if used_bytes <= KEEP_BYTES:
            return
        for memory in (self._given, self._made):
            memory.madvise(mmap.MADV_REMOVE, KEEP_BYTES, len(memory) - KEEP_BYTES)

    def _lost(self) -> WorkerLost:
        if not self.lost_because:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(1.0)
            self.kill(_ending(self.process.returncode))
        return WorkerLost(f"the process that owns the engines is gone: {self.lost_because}", value=f"pid {self.pid}")


def _ending(code: int | None) -> str:
    if code is None:
        return "it closed its socket"
    if code < 0:
        with contextlib.suppress(ValueError):
            return f"it ended by {signal.Signals(-code).name}"
    return f"it ended with code {code}"


@dataclass
class _Swap:
    plan: Plan
    accept: Callable[[Worker], None] | None
    done: threading.Event = field(default_factory=threading.Event)
    failure: BaseException | None = None
    up: Mapping[str, Any] = field(default_factory=dict)


class Workers:
    """`with Workers(plan) as workers:` one at work and, where `standby`, one warm beside it.

    `lost(ms)` is called where no worker is left and the next will be there in about so many ms, and with 0 when it is. Raises, when
    entered, what the first worker was refused with.
    """

    def __init__(self, plan: Plan, *, standby: bool = True, lost: Callable[[float], None] | None = None) -> None:
        self.plan, self._standby_wanted, self._on_lost = plan, standby, lost
        self._changed = threading.Condition()
        self._at_work: Worker | None = None
        self._standby: Worker | None = None
        self._lost: list[Worker] = []  # to be reaped
        self._failure: BaseException | None = None
        self._closing = False
        self._swap: _Swap | None = None
        self._startled = True  # there is something to look at: at first that there is no worker
        self._start_ms = 3000.0
        self._starting_s: float | None = None  # since when one is being started
        self._gone_s: float | None = None
        self._last_up: Mapping[str, Any] = {}
        self.restarts = 0
        self.outage_ms: float | None = None  # of the last time that none was there
        self._thread = threading.Thread(target=self._watch, name="workers", daemon=True)

    def __enter__(self) -> Workers:
        self._thread.start()
        with self._changed:
            self._changed.wait_for(lambda: self._at_work is not None or self._failure is not None)
            if self._failure is not None:
                failure = self._failure
                self._closing = True
        if self._closing:
            self._thread.join()
            raise failure
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()

    def up(self) -> Mapping[str, Any]:
        """What the worker at work said when it came up: engines, protocols, signatures, bundle. Where none is at work, what the last
        one said: the next will have the same."""
        with self._changed:
            return self._at_work.up if self._at_work is not None else self._last_up

    def health(self) -> dict[str, Any]:
        with self._changed:
            at_work, standby = self._at_work, self._standby
            return {
                "pid": at_work.pid if at_work is not None and at_work.alive() else None,
                "rss_bytes": at_work.rss_bytes() if at_work is not None else 0,
                "standby": standby.pid if standby is not None and standby.up and standby.alive() else None,
                "restarts": self.restarts,
                "last_outage_ms": None if self.outage_ms is None else round(self.outage_ms, 1),
            }

    def wait_ms(self) -> float:
        """How long until a worker is there: 0 where one is, else what is left of a start if it takes as long as the last one."""
        with self._changed:
            return 0.0 if self._usable() is not None else self._until_up_ms()

    @contextlib.contextmanager
    def held(self, until_s: float) -> Iterator[Worker]:
        """The worker at work, for one question; waits for one until `until_s` on the monotonic clock. Raises WorkerLost."""
        with self._changed:
            self._changed.wait_for(lambda: self._usable() is not None, max(0.0, until_s - time.monotonic()))
            worker = self._usable()
            if worker is None:
                raise WorkerLost("no engine is running yet", value=f"{self.restarts} restarts")
        with worker.lock:
            worker.asked_s = time.monotonic()
            try:
                yield worker
            except WorkerLost:
                self._replace(worker)
                raise
            finally:
                worker.asked_s = time.monotonic()

    def swap(self, plan: Plan, accept: Callable[[Worker], None] | None = None) -> Mapping[str, Any]:
        """Let a worker with another bundle take over: what it says of itself. It is started beside the one at work, answers its golden
        inputs, and is shown to `accept`, which may ask it and raises what is wrong with it. What runs is finished by the old one; where
        anything fails the old one stays, and the failure is raised."""
        order = _Swap(plan, accept)
        with self._changed:
            if self._swap is not None or self._closing:
                raise UsageError("another bundle is being swapped in", remedy="Wait until it is done.")
            self._swap = order
            self._changed.notify_all()
        order.done.wait()
        if order.failure is not None:
            raise order.failure
        return order.up

    # -- inside ---------------------------------------------------------------------------------------------------------

    def _usable(self) -> Worker | None:
        return self._at_work if self._at_work is not None and self._at_work.alive() else None

    def _until_up_ms(self) -> float:
        begun_ms = 0.0 if self._starting_s is None else (time.monotonic() - self._starting_s) * 1e3
        return max(0.0, self._start_ms - begun_ms)

    def _replace(self, lost: Worker) -> None:
        """The standby takes the place of a lost worker, where there is one."""
        with self._changed:
            if self._at_work is not lost:
                return
            log.warning("worker %d is gone: %s", lost.pid, lost.lost_because)
            self._lost.append(lost)
            self.restarts += 1
            ready = self._standby if self._standby is not None and self._standby.up and self._standby.alive() else None
            self._at_work = ready
            self._gone_s = time.monotonic()
            if ready is not None:
                self._standby = None
                self._adopt(ready)
            elif self._on_lost is not None:
                self._on_lost(self._until_up_ms())
            self._startled = True
            self._changed.notify_all()

    def _adopt(self, worker: Worker) -> None:
        self._last_up = worker.up
        if self._on_lost is not None:
            self._on_lost(0.0)
        if self._gone_s is not None:
            self.outage_ms, self._gone_s = (time.monotonic() - self._gone_s) * 1e3, None
        with contextlib.suppress(SpineboxError), worker.lock:
            worker.ask({"op": "adopt"}, PONG_S)

    def _watch(self) -> None:
        """Every process is started here: the kernel ends a child with the *thread* that made it."""
        failures = 0
        while not self._wait(WATCH_S):
            self._look_at_all()
            with self._changed:
                lacking, order = self._at_work is None, self._swap
                wanted = lacking or (self._standby_wanted and self._standby is None)
            if wanted:
                failures = 0 if self._start(polite=not lacking) else failures + 1
                if failures and self._wait(RESPAWN_S[min(failures, len(RESPAWN_S) - 1)]):
                    break
                self._startled = True  # another one may be lacking
            elif order is not None:
                self._exchange(order)
        for worker in filter(None, (self._at_work, self._standby, *self._lost)):
            worker.kill("the appliance stops")
            worker.close()

    def _wait(self, seconds: float) -> bool:
        """Until something is to be done, at most so long. Whether the end has come."""
        with self._changed:
            self._changed.wait_for(lambda: self._closing or self._startled or self._swap is not None, seconds)
            self._startled = False
            return self._closing

    def _attend(self, worker: Worker) -> None:
        """Until it ends, or somebody stops it."""
        with contextlib.suppress(ChildProcessError):
            os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WSTOPPED | os.WNOWAIT)
        with self._changed:
            self._startled = True
            self._changed.notify_all()

    def _bring_up(self, plan: Plan, polite: bool) -> Worker | BaseException:
        """Start one, looking after the others meanwhile. What it was refused with where it does not come up."""
        worker = Worker(plan, polite)
        threading.Thread(target=self._attend, args=(worker,), name="worker-end", daemon=True).start()
        failure: list[BaseException] = []

        def wait() -> None:
            try:
                worker.wait_up()
            except BaseException as exc:  # noqa: BLE001 - handed over to whoever started it
                failure.append(exc)

        waiting = threading.Thread(target=wait, name="worker-start")
        waiting.start()
        while waiting.is_alive():
            waiting.join(START_WATCH_S)
            self._look_at_all()
            if self._closing:
                worker.kill("the appliance stops")
        if not failure and not self._closing:
            return worker
        worker.kill("it did not start")
        worker.close()
        return failure[0] if failure else WorkerLost("the appliance stops")

    def _start(self, polite: bool) -> bool:
        """One more, to work or to stand by. True where it came up."""
        self._starting_s = began_s = time.monotonic()
        found = self._bring_up(self.plan, polite)
        with self._changed:
            self._starting_s = None
            if isinstance(found, Worker):
                self._start_ms = (time.monotonic() - began_s) * 1e3
                if self._at_work is None:
                    self._at_work = found
                    self._adopt(found)
                else:
                    self._standby = found
            else:
                log.error("a worker did not start: %s", found)
                if self._at_work is None and not self.restarts:
                    self._failure = found
            self._changed.notify_all()
        return isinstance(found, Worker)

    def _exchange(self, order: _Swap) -> None:
        found = self._bring_up(order.plan, polite=True)
        if isinstance(found, Worker):
            try:
                with found.lock:
                    if order.accept is not None:
                        order.accept(found)
            except BaseException as exc:  # noqa: BLE001 - handed over to whoever asked for the swap
                found.kill("it was not accepted")
                found.close()
                found = exc
        old: list[Worker] = []
        with self._changed:
            if isinstance(found, Worker):
                old = [w for w in (self._standby, self._at_work) if w is not None]
                self.plan, self._at_work, self._standby = order.plan, found, None
                self._adopt(found)
                order.up = found.up
                self._startled = True  # there is no standby
            else:
                order.failure = found
            self._swap = None
            self._changed.notify_all()
        order.done.set()
        for worker in old:
            with worker.lock:  # what it is asked now is answered first
                worker.kill("another bundle took over")
            worker.close()

    def _look_at_all(self) -> None:
        for worker in filter(None, (self._at_work, self._standby)):
            self._look_at(worker)
        with self._changed:
            lost, self._lost = self._lost, []
        for worker in lost:
            worker.close()

    def _look_at(self, worker: Worker) -> None:
        """Kill it for a reason, or ask it whether it lives; replace it where it does not."""
        if not worker.up:
            return
        if worker.process.poll() is not None and not worker.lost_because:
            worker.kill(_ending(worker.process.returncode))
        elif worker.stopped():
            worker.kill("it was stopped")
        elif (size := worker.rss_bytes()) > worker.plan.memory_bytes:
            worker.kill(f"it took {size >> 20} MiB of memory, more than {worker.plan.memory_bytes >> 20}")
        elif time.monotonic() - worker.asked_s > PING_S and worker.lock.acquire(blocking=False):
            try:
                worker.asked_s = time.monotonic()
                worker.ask({"op": "ping"}, PONG_S)
            except SpineboxError as error:
                log.warning("worker %d does not answer: %s", worker.pid, error)
            finally:
                worker.lock.release()
        if worker.lost_because:
            self._forget(worker)

    def _forget(self, worker: Worker) -> None:
        with self._changed:
            if self._standby is worker:
                log.warning("the standby %d is gone: %s", worker.pid, worker.lost_because)
                self._lost.append(worker)
                self._standby = None
        self._replace(worker)
