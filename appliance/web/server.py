"""A port, a few threads and a way to stop: hides waitress.

Adds what waitress leaves out: the moment at which a request's last byte came in (where its budget starts), refusals of
malformed or oversized requests in the same JSON as every other error, and a stop that lets running answers leave.
"""

from __future__ import annotations

import contextlib
import json
import logging
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import waitress
from waitress import wasyncore
from waitress.channel import HTTPChannel
from waitress.parser import HTTPRequestParser
from waitress.task import ErrorTask, WSGITask

from appliance.errors import SpineboxError, StudyTooLarge, UsageError
from appliance.report import DISCLAIMER

log = logging.getLogger("spinebox.web")

COMPLETED_S = "spinebox.completed_s"  # WSGI environment: monotonic seconds at the last byte received
GRACE_S = 15.0
MAX_HEADER_BYTES = 32 * 2**10
# What multipart may add to a file: boundaries and part headers.
MULTIPART_BYTES = 64 * 2**10


class _Parser(HTTPRequestParser):  # type: ignore[misc]
    completed_s: float | None = None

    def received(self, data: bytes) -> int:
        consumed = int(super().received(data))
        if self.completed and self.completed_s is None:
            self.completed_s = time.monotonic()
        return consumed


class _Task(WSGITask):  # type: ignore[misc]
    def get_environment(self) -> dict[str, Any]:
        environment: dict[str, Any] = super().get_environment()
        environment[COMPLETED_S] = self.request.completed_s
        return environment


class _JsonErrorTask(ErrorTask):  # type: ignore[misc]
    """What waitress itself refuses: a body over the limit, a malformed request line, headers without end."""

    def execute(self) -> None:
        refused = self.request.error
        error: SpineboxError
        if refused.code == 413:
            limit = self.channel.server.adj.max_request_body_size - MULTIPART_BYTES
            error = StudyTooLarge("the request is larger than the limit", value=f"{limit} bytes")
        else:
            error = UsageError("the request is not valid HTTP", value=refused.reason, remedy="Send HTTP/1.1 with a short header.")
        body = json.dumps({"error": error.to_json(), "disclaimer": DISCLAIMER}).encode()
        self.status = f"{refused.code} {refused.reason}"
        self.response_headers += [("Content-Type", "application/json"), ("X-Content-Type-Options", "nosniff")]
        self.response_headers += [("Cache-Control", "no-store")]
        self.set_close_on_finish()
        self.content_length = len(body)
        self.write(body)


class _Channel(HTTPChannel):  # type: ignore[misc]
    parser_class = _Parser
    task_class = _Task
    error_task_class = _JsonErrorTask

    def busy(self) -> bool:
        return bool(self.requests or self.total_outbufs_len)


class Server:
    """`app` on `host`:`port`, bound when constructed (port 0: any free one, see `.port`), serving while `run` runs.

    `max_bytes` bounds a request's file, `threads` (2 to 4) the requests at work. Raises UsageError where it cannot bind.
    """

    def __init__(self, app: Any, host: str = "127.0.0.1", port: int = 8080, *, max_bytes: int = 64 * 2**20, threads: int = 4) -> None:
        if not 2 <= threads <= 4:
            raise UsageError("threads must lie in 2 to 4", value=threads)
        if not 0 <= port <= 65535:
            raise UsageError("a port lies in 0 to 65535", value=port, remedy="Choose another port, or 0 for any free one.")
        bare = host.strip("[]")
        try:
            family, _, _, _, address = socket.getaddrinfo(bare, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
            listening = socket.create_server(address[:2], family=family, backlog=64)
        except (OSError, OverflowError, UnicodeError) as exc:
            raise UsageError(
                "the appliance cannot listen there",
                value=f"{host}:{port} ({exc})",
                remedy="Stop what uses the port, or choose another one (PORT=8081, or port 0 for any free one).",
            ) from exc
        self._map: dict[int, Any] = {}
        self._server = waitress.create_server(
            app,
            map=self._map,
            sockets=[listening],
            threads=threads,
            ident="spinebox",
            max_request_body_size=max_bytes + MULTIPART_BYTES,
            max_request_header_size=MAX_HEADER_BYTES,
            channel_timeout=60,
            cleanup_interval=10,
            connection_limit=64,
            clear_untrusted_proxy_headers=True,
        )
        self._server.channel_class = _Channel
        self.host = bare
        self.port = int(listening.getsockname()[1])
        self._stop = threading.Event()

    @property
    def url(self) -> str:
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)  # noqa: S104 - compared, not bound
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"

    def run(self, grace_s: float = GRACE_S) -> None:
        """Serve until `stop`; then take no new connection, let running requests finish (at most `grace_s`), and close."""
        try:
            while not self._stop.is_set():
                wasyncore.loop(timeout=0.5, map=self._map, count=1)
            self._server.accepting = False
            until = time.monotonic() + grace_s
            while any(isinstance(c, _Channel) and c.busy() for c in list(self._map.values())) and time.monotonic() < until:
                wasyncore.loop(timeout=0.1, map=self._map, count=1)
        finally:
            self._server.task_dispatcher.shutdown(timeout=1)
            wasyncore.close_all(self._map, ignore_all=True)

    def stop(self) -> None:
        """Ask `run` to end; may be called from a signal handler or another thread, more than once."""
        self._stop.set()
        with contextlib.suppress(OSError):
            self._server.pull_trigger()


def serve(
    app: Any,
    host: str = "127.0.0.1",
    port: int = 8080,
    *,
    max_bytes: int = 64 * 2**20,
    threads: int = 4,
    bound: Callable[[Server], None] | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT. `bound` is told the server once its port is taken (`.url`, `.port`)."""
    server = Server(app, host, port, max_bytes=max_bytes, threads=threads)
    with _stopping_on_signals(server):
        if bound is not None:
            bound(server)
        server.run()


@contextlib.contextmanager
def _stopping_on_signals(server: Server) -> Iterator[None]:
    def handle(number: int, _frame: FrameType | None) -> None:
        log.info("signal %d: stopping", number)
        server.stop()

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
