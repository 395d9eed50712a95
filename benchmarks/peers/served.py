"""A server under test: started, waited for, watched, stopped. Hides processes, ports and how each system wants its bytes.

`SYSTEMS` says what each is and, honestly, what it cannot do. `Served` is a context manager: inside it the system answers at
`host`:`port`, and nothing of it is left afterwards.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO

import psutil
from rich.console import Console

from appliance.errors import UsageError
from benchmarks.arrivals import Arrival
from benchmarks.openloop import Pool, Request
from benchmarks.peers import environments

HOST = "127.0.0.1"
START_S = 120.0
STOP_S = 20.0
SETTLE_S = 30.0
DICOM = "application/dicom"


def _raw(kind: str) -> Callable[[bytes], tuple[str, bytes]]:
    return lambda data: (kind, data)


def _base64_json(data: bytes) -> tuple[str, bytes]:
    return "application/json", b'{"data": "' + base64.b64encode(data) + b'"}'


@dataclass(frozen=True)
class System:
    """One contestant. `environment` is the peer's own, "" for this one; `encode` gives (content type, body) of a study's bytes."""

    name: str
    title: str
    environment: str
    ready_path: str
    lacks: str
    encode: Callable[[bytes], tuple[str, bytes]] = field(default=_raw("application/octet-stream"))
    path: str = "/api/studies"


SYSTEMS: dict[str, System] = {
    s.name: s
    for s in (
        System("null", "null", "", "/", "does no work: the sender, the loopback and the sockets alone", _raw(DICOM)),
        System("spinebox", "Spinebox", "", "/readyz", "", _raw(DICOM)),
        System(
            "fifo",
            "first in first out, tuned",
            "fastapi",
            "/ready",
            "predicts nothing, has no rungs and no order by deadline; keeps no journal and draws no pictures, so it has less to do",
        ),
        System(
            "litserve",
            "LitServe",
            "litserve",
            "/health",
            "sees no request's deadline: one time-out for all, looked at when a request's turn comes; no limit of its queue; bytes travel "
            "as base64 in JSON; no rungs, journal or pictures",
            _base64_json,
        ),
        System(
            "bentoml",
            "BentoML",
            "bentoml",
            "/readyz",
            "one time-out for all requests, which answers while the work goes on; the input passes through a file; no rungs, journal or "
            "pictures",
        ),
        System(
            "fastapi",
            "thin FastAPI handler",
            "fastapi",
            "/ready",
            "no limit and no deadline: whatever arrives is worked on; no rungs, journal or pictures",
        ),
    )
}


def free_port() -> int:
    with socket.socket() as s:
        s.bind((HOST, 0))
        return int(s.getsockname()[1])


@dataclass(frozen=True)
class Sample:
    """Of a process tree at one moment: CPU seconds so far, resident MB and open descriptors of the root and of the rest, processes."""

    cpu_s: float
    root_mb: float
    rest_mb: float
    root_fds: int
    rest_fds: int
    processes: int


def descendants(root: psutil.Process) -> list[psutil.Process]:
    """Every process below `root`. Asked of the kernel process by process, because psutil's own way reads all of /proc, which takes the
    interpreter from the sender for milliseconds; that way is the fallback."""
    out: list[psutil.Process] = []
    left = [root.pid]
    try:
        while left:
            for task in Path(f"/proc/{left.pop()}/task").iterdir():
                for pid in map(int, (task / "children").read_text().split()):
                    left.append(pid)
                    with contextlib.suppress(psutil.Error):
                        out.append(psutil.Process(pid))
    except OSError:  # no such file in this kernel, or a process that has just ended
        return root.children(recursive=True)
    return out


def sample(root: psutil.Process) -> Sample:
    """Raises psutil.NoSuchProcess where the root is gone."""
    times = root.cpu_times()
    cpu_s = times.user + times.system + times.children_user + times.children_system
    root_mb, root_fds = root.memory_info().rss / 2**20, root.num_fds()
    rest, rest_fds, count = 0.0, 0, 1
    for child in descendants(root):
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            own = child.cpu_times()
            cpu_s += own.user + own.system + own.children_user + own.children_system
            rest += child.memory_info().rss / 2**20
            rest_fds += child.num_fds()
            count += 1
    return Sample(cpu_s, root_mb, rest, root_fds, rest_fds, count)


class Served:
    """A system, running. `options` are of the server's own command line. `data_dir` is for the daemon; a temporary one where None.

    Raises UsageError where it does not come up, with the last lines of what it said.
    """

    def __init__(
        self,
        name: str,
        *,
        peers: Path,
        mode: str = "study",
        threads: int = 0,
        options: Sequence[str] = (),
        data_dir: Path | None = None,
        console: Console | None = None,
    ) -> None:
        if name not in SYSTEMS:
            raise UsageError("no such system", value=name, remedy=f"Choose among: {', '.join(SYSTEMS)}.")
        self.system = SYSTEMS[name]
        self.host, self.port = HOST, 0
        self._peers, self._mode, self._threads, self._options = peers, mode, threads, tuple(options)
        self.data_dir = data_dir
        self._console = console
        self._stack = contextlib.ExitStack()
        self._log: IO[str] | None = None
        self._child: subprocess.Popen[bytes] | None = None

    # -- life ------------------------------------------------------------------------------------------------------------

    def __enter__(self) -> Served:
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    @property
    def process(self) -> psutil.Process:
        assert self._child is not None
        return psutil.Process(self._child.pid)

    def sample(self) -> Sample:
        return sample(self.process)

    def _command(self, python: Path) -> list[str]:
        name, port, threads = self.system.name, str(self.port), str(self._threads)
        if name == "null":
            return [str(python), "-m", "benchmarks.peers.null_server", "--port", port]
        if name == "spinebox":
            folder = str(self.data_dir)
            serve = [str(python), "-m", "appliance.cli", "serve", "--port", "0", "--data-dir", folder, "--threads", threads]
            return [*serve, *self._options]
        if name == "bentoml":
            bento = str(python.with_name("bentoml"))
            return [bento, "serve", "benchmarks.peers.bentoml_server:Studies", "--port", port, "--host", HOST, *self._options]
        own = ["--port", port, "--mode", self._mode, "--threads", threads]
        return [str(python), "-m", f"benchmarks.peers.{name}_server", *own, *self._options]

    def _start(self) -> None:
        self._stack = contextlib.ExitStack()
        python = Path(sys.executable)
        if self.system.environment:
            python = environments.ensure(self.system.environment, self._peers, self._console)
        scratch = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="spinebox-load-", ignore_cleanup_errors=True)))
        if self.data_dir is None:
            self.data_dir = scratch / "data"
        self.port = 0 if self.system.name == "spinebox" else free_port()
        self._log = self._stack.enter_context((scratch / "log").open("w+"))
        environment = {
            **os.environ,
            "SPINEBOX_PEER_MODE": self._mode,
            "SPINEBOX_PEER_THREADS": str(self._threads),
            "OPENVINO_TELEMETRY_OPT_OUT": "1",
            "BENTOML_DO_NOT_TRACK": "True",
            "BENTOML_HOME": str(scratch / "bentoml"),
            "PYTHONUNBUFFERED": "1",
            "COLUMNS": "200",  # an address is not broken over two lines
        }
        self._child = subprocess.Popen(
            self._command(python), cwd=environments.ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log,
            start_new_session=True,
        )  # fmt: skip
        until = time.monotonic() + START_S
        while not self._up():
            if self._child.poll() is not None or time.monotonic() > until:
                raise UsageError(f"{self.system.title} does not come up: {self.last_lines()}", value=self.system.name)
            time.sleep(0.05)
        if self.system.name == "spinebox":
            self._settle()

    def _settle(self) -> None:
        """Wait for the daemon's standby, where it keeps one: while that loads its engines it takes the processors, and a capacity
        measured meanwhile would be too low, which flatters every load that is a multiple of it."""
        until = time.monotonic() + SETTLE_S
        while time.monotonic() < until:
            worker = (json.loads(self.get(self.system.ready_path)[1]).get("engine") or {}).get("worker")
            if not isinstance(worker, dict) or worker.get("standby") or "--no-standby" in self._options:
                return
            time.sleep(0.1)

    def _up(self) -> bool:
        if not self.port:
            found = re.search(r"http://127\.0\.0\.1:(\d+)", self._said())
            if found is None:
                return False
            self.port = int(found.group(1))
        with contextlib.suppress(OSError, http.client.HTTPException):
            return self.get(self.system.ready_path)[0] == 200
        return False

    def _said(self) -> str:
        assert self._log is not None
        return Path(self._log.name).read_text(errors="replace")

    def last_lines(self, count: int = 5) -> str:
        """The end of what the server said, for a message."""
        return " / ".join(self._said().strip().splitlines()[-count:])

    def stop(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            for number, wait_s in ((signal.SIGTERM, STOP_S), (signal.SIGKILL, STOP_S)):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, number)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(wait_s)
                    break
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)  # children that outlive their parent
        self._stack.close()

    # -- asking ----------------------------------------------------------------------------------------------------------

    def get(self, path: str, timeout_s: float = 10.0) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection(self.host, self.port, timeout=timeout_s)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def request(self, data: bytes, deadline_ms: float, study_id: str = "") -> Request:
        """One study with its deadline, as this system takes it."""
        kind, body = self.system.encode(data)
        return Request(self.system.path, {"Content-Type": kind, **budget(deadline_ms)}, body, study_id)

    def maker(self, pool: Pool) -> Callable[[Arrival], Request]:
        """The request of an arrival: the pool's next study."""
        return lambda arrival: self.request(pool.study(), arrival.deadline_ms)


def budget(deadline_ms: float) -> Mapping[str, str]:
    """The header in which a request says how long its answer is of use."""
    return {"X-Latency-Budget-Ms": f"{deadline_ms:.3f}", "X-Budget-Ms": f"{deadline_ms:.3f}"}


def needs(names: Sequence[str]) -> list[str]:
    """Environments that these systems need. Raises UsageError for a system that is not known."""
    unknown = [n for n in names if n not in SYSTEMS]
    if unknown:
        raise UsageError("no such system", value=", ".join(unknown), remedy=f"Choose among: {', '.join(SYSTEMS)}.")
    return sorted({SYSTEMS[n].environment for n in names} - {""})
