"""A port, many threads and a way to stop: hides waitress, of which it takes the parser, the buffers and the tasks.

Adds what waitress leaves out. The moments at which a request's first and last byte came in (where its budget starts). A way to ask
whether the client still waits. Admission on arrival: a request can be refused when its header is there (`Door`), and one that finds
no free thread is refused, never parked. Limits on every wait: a client that trickles, idles or does not read loses its connection,
never a thread. Refusals in the same JSON as every other error. A stop that lets running answers leave.

One thread moves bytes (`_Loop`), on epoll, so that idle connections cost nothing; it also answers what needs no application: what is
malformed, late or too much. Request threads run the application and send its answer themselves; what the client does not take at
once is left to the loop.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import math
import os
import select
import signal
import socket
import sys
import termios
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from types import FrameType
from typing import Any, Protocol

from waitress.adjustments import Adjustments
from waitress.channel import HTTPChannel
from waitress.parser import HTTPRequestParser, ParsingError
from waitress.proxy_headers import proxy_headers_middleware
from waitress.task import ErrorTask, Task, WSGITask
from waitress.utilities import BadRequest

from appliance.errors import OutOfTime, SpineboxError, StudyTooLarge, UsageError
from appliance.report import DISCLAIMER

log = logging.getLogger("spinebox.web")

# WSGI environment, monotonic seconds: when this request's first byte was there (on a connection kept alive, of this request; requests
# pipelined behind another share the moment at which the first of them was seen), and when its last byte came in.
STARTED_S = "spinebox.started_s"
COMPLETED_S = "spinebox.completed_s"
# WSGI environment: () -> bool, whether the client has gone away, for good (closed, reset) or to listen only (half-closed: a closed
# and a half-closed connection look alike until something is sent, and who asks for a study keeps the line open). Never raises,
# consumes nothing, may be asked from any thread, costs microseconds. What is answered all the same is still sent.
GONE = "spinebox.gone"
# WSGI environment: what the door gave for this request, or None.
TICKET = "spinebox.ticket"

GRACE_S = 15.0
MAX_HEADER_BYTES = 32 * 2**10
# What multipart may add to a file: boundaries and part headers.
MULTIPART_BYTES = 64 * 2**10
MIN_THREADS, MAX_THREADS, THREADS = 2, 128, 32
# Connections at once. Each may hold a temporary file for what comes and one for what goes: together below the usual 1024 descriptors.
# A newcomer beyond them displaces whoever has idled longest, or else whoever has been sending or not reading longest.
MAX_CONNECTIONS = 256
IDLE_S = 30.0  # a connection without a request
# A request must be in, and an answer taken, within so many seconds plus a second for every MIN_BYTES_PER_S already moved: who moves
# bytes at that pace is never cut off, who trickles is, however steadily. Of an answer, too, something must be taken every ANSWER_S:
# the client's kernel alone takes megabytes, which would buy one that never reads minutes.
REQUEST_S = 20.0
ANSWER_S = 20.0
MIN_BYTES_PER_S = 64 * 2**10
LINGER_S = 2.0  # what still comes in after the last answer of a connection is thrown away, lest a reset destroy the answer
PATIENCE_S = 0.002  # for a thread that has sent its answer and is about to be free
PIPELINED = 16  # requests on one connection that wait for their turn
HELD_BYTES = 512 * 2**20  # bodies that came in, and answers not yet taken, of all connections: so many of either

# A body up to here is thrown away behind its refusal, within LINGER_S on a network of 5 Mbit/s. Who sends more is heard out first, for
# a connection closed on what it still sends is reset, and the refusal lost.
MOST_AT_DOOR_BYTES = 2**20

_TICK_S = 0.25
_IN_MEMORY_BYTES = 8 * 2**20  # of one request or answer, before it goes to a temporary file
_RECEIVE_BYTES = 64 * 2**10  # at once: below malloc's threshold for mapping memory anew each time
_TOGETHER_BYTES = 256 * 2**10  # up to here head and body are joined, to leave in one packet; a copy of more costs more than a packet
# The parser of chunks copies the rest of its input for every chunk: short input keeps one-byte chunks from stalling everyone.
_CHUNKED_BYTES = 4 * 2**10
_LONGEST_CHUNK_LINE = 4 * 2**10
_HUNG_UP = select.EPOLLHUP | select.EPOLLERR


@dataclass(frozen=True)
class Knock:
    """What is known of a request before its body is there. `headers` have WSGI's names without HTTP_ ("X_LATENCY_BUDGET_MS")."""

    method: str
    path: str
    query: str
    headers: Mapping[str, str]
    size: int
    started_s: float


class Held(Protocol):
    """What a door gives a request that may come in; closed when the request is over, whatever became of it."""

    def close(self) -> None: ...


# Asked in the thread that moves bytes, and so quick. Raises SpineboxError for what is refused at once.
Door = Callable[[Knock], Held | None]


@dataclass(frozen=True)
class _Refusal:
    """What waitress calls an error of the request; `keep` says that the connection is in order and may go on."""

    code: int
    reason: str
    error: SpineboxError
    keep: bool = False


def _too_busy(what: str, value: object, *, keep: bool) -> _Refusal:
    error = OutOfTime(what, value=value, remedy="Send it again after the seconds in Retry-After.")
    return _Refusal(503, "Service Unavailable", error, keep)


class _Parser(HTTPRequestParser):  # type: ignore[misc]
    # What is refused before its first line is read has these all the same.
    path = command = ""
    completed: bool
    started_s: float | None = None
    completed_s: float | None = None
    ticket: Held | None = None
    knocked = False

    def received(self, data: bytes) -> int:
        if self.body_rcv is not None and self.chunked:
            data = data[:_CHUNKED_BYTES]
        consumed = int(super().received(data))
        if self.chunked and not self.completed:
            lines = self.body_rcv
            if len(lines.control_line) > _LONGEST_CHUNK_LINE or len(lines.trailer) > MAX_HEADER_BYTES:
                self.error = BadRequest("a line between chunks is too long")
                self.completed = True
        if self.completed and self.completed_s is None:
            self.completed_s = time.monotonic()
        return consumed

    def parse_header(self, header_plus: bytes) -> None:
        try:
            super().parse_header(header_plus)
        except ValueError as exc:  # a length of thousands of digits, an address like http://[
            raise ParsingError(f"Header is invalid: {exc}") from exc
        # Two accounts of where the body ends, or one that HTTP/1.0 does not know: the next request could be smuggled in.
        if "CONTENT_LENGTH" in self.headers and self.chunked:
            raise ParsingError("Content-Length beside Transfer-Encoding")
        if "TRANSFER_ENCODING" in self.headers:
            raise ParsingError("Transfer-Encoding needs HTTP/1.1")

    def close(self) -> None:
        super().close()
        self.give_back()

    def give_back(self) -> None:
        if self.ticket is not None:
            self.ticket.close()

    def knock(self, door: Door) -> None:
        """Once, as soon as the header is there."""
        if self.knocked or not self.headers_finished or self.completed or not 0 < self.content_length <= MOST_AT_DOOR_BYTES:
            return
        self.knocked = True
        started_s = self.started_s or time.monotonic()
        try:
            self.ticket = door(Knock(self.command, self.path, self.query, self.headers, self.content_length, started_s))
        except SpineboxError as error:
            self.error = _Refusal(error.http_status, HTTPStatus(error.http_status).phrase, error)
            self.completed = True
        except Exception:  # the application will be asked all the same
            log.exception("the door failed")

    def moved(self) -> int:
        return int(self.header_bytes_received + self.body_bytes_received)


class _OnePacket(Task):  # type: ignore[misc]
    def write(self, data: bytes) -> None:
        # Sent apart, the head would wake the client once for nothing.
        with self.channel.together():
            super().write(data)

    def build_response_header(self) -> bytes:
        if self.channel.server.stopping:
            self.set_close_on_finish()
        return bytes(super().build_response_header())


class _Task(_OnePacket, WSGITask):  # type: ignore[misc]
    def get_environment(self) -> dict[str, Any]:
        environment: dict[str, Any] = super().get_environment()
        environment[STARTED_S] = self.request.started_s
        environment[COMPLETED_S] = self.request.completed_s
        environment[GONE] = self.channel.gone
        environment[TICKET] = self.request.ticket
        return environment


class _JsonErrorTask(_OnePacket, ErrorTask):  # type: ignore[misc]
    """What the application never sees: bodies over the limit, malformed requests, late ones, those without a thread."""

    def execute(self) -> None:
        refused = self.request.error
        error: SpineboxError
        if isinstance(refused, _Refusal):
            error = refused.error
        elif refused.code == 413:
            limit = self.channel.server.adj.max_request_body_size - MULTIPART_BYTES
            error = StudyTooLarge("the request is larger than the limit", value=f"{limit} bytes")
        elif refused.code == 500:
            error = SpineboxError("an unexpected failure inside the appliance")
        else:
            error = UsageError("the request is not valid HTTP", value=refused.body, remedy="Send HTTP/1.1 with a short header.")
        admitted = {"admitted": error.admitted} if refused.code == 503 else {}
        body = json.dumps({"error": error.to_json(), "disclaimer": DISCLAIMER, **admitted}).encode()
        self.status = f"{refused.code} {refused.reason}"
        self.response_headers += [("Content-Type", "application/json"), ("X-Content-Type-Options", "nosniff")]
        self.response_headers += [("Cache-Control", "no-store")]
        if refused.code == 503:
            self.response_headers += [("Retry-After", str(max(1, math.ceil((error.retry_after_ms or 0.0) / 1e3))))]
        # Elsewhere the beginning of the next request is not known; and this answer has a body, which that to a HEAD has not.
        if not (isinstance(refused, _Refusal) and refused.keep) or self.request.command == "HEAD":
            self.set_close_on_finish()
        self.content_length = len(body)
        self.write(body)


class _Channel(HTTPChannel):  # type: ignore[misc]
    """One connection. The loop reads and closes; a request thread runs `work`; both send, and say through `watch` what they wait for.

    Locks, from outer to inner: `requests_lock` (which requests there are, who serves), `outbuf_lock` (what is to be sent), `_watched`.
    """

    request: _Parser | None  # the one that is not all here
    _fileno: int | None
    parser_class = _Parser
    task_class = _Task
    error_task_class = _JsonErrorTask

    def __init__(self, loop: _Loop, sock: socket.socket, address: Any) -> None:
        self.serving = False  # a thread is at this connection's requests
        self._again = False  # and has another one to do
        self._next_byte_s: float | None = None  # bytes wait in the kernel behind a request at work
        self._idle_since_s = time.monotonic()
        self._unsent_since_s: float | None = None
        self._linger_since_s: float | None = None
        self._sent = self._sent_before = 0
        self._last_taken = 0, 0.0  # bytes, when they were more than before
        self._held: list[Any] | None = None
        self._watched = threading.Lock()
        self._flags = 0
        super().__init__(loop, sock, address, loop.adj)
        self.requests_lock = threading.RLock()
        self.watch()

    # --- what the loop waits for ---

    def add_channel(self, map: Any = None) -> None:  # noqa: A002, ARG002 - waitress's
        self.server.channels[self._fileno] = self
        self.server.epoll.register(self._fileno, 0)

    def del_channel(self, map: Any = None) -> None:  # noqa: A002, ARG002
        with self._watched:
            descriptor, self._fileno = self._fileno, None
            if descriptor is not None:
                self.server.channels.pop(descriptor, None)
                self.server.epoll.unregister(descriptor)

    def watch(self) -> None:
        """To be called after every change of what `readable` and `writable` look at; tells the loop without waking it."""
        with self._watched:
            if self._fileno is None:
                return
            if bool(self.total_outbufs_len) != (self._unsent_since_s is not None):
                now = time.monotonic()
                self._unsent_since_s, self._sent_before, self._idle_since_s = now if self.total_outbufs_len else None, self._sent, now
            flags = (select.EPOLLIN if self.readable() else 0) | (select.EPOLLOUT if self.writable() else 0)
            if flags != self._flags:
                self._flags = flags
                self.server.epoll.modify(self._fileno, flags)

    def readable(self) -> bool:
        if self._linger_since_s is not None:
            return True
        if self.will_close or self.close_when_flushed:
            return False
        if self.requests or self.total_outbufs_len:
            return self._next_byte_s is None  # only to learn when the next request began
        return not self.server.stopping

    # --- in the loop ---

    def handle_read(self) -> None:
        with self.requests_lock:
            if self.will_close or self.close_when_flushed:
                return
            if (self.requests or self.total_outbufs_len) and self._linger_since_s is None:
                self._next_byte_s = time.monotonic()
                return
            try:
                data = self.socket.recv(_RECEIVE_BYTES)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            if self._linger_since_s is not None:
                if not data:
                    self.handle_close()
            elif data:
                self.received(data)
            elif self.request is not None and self.request.started_s is not None:
                # Who has only half closed can read this; to others it is the same as a close.
                self.refuse(400, "Bad Request", "the connection ended before the request did", f"{self.request.moved()} bytes")
            else:
                self.handle_close()

    def received(self, data: bytes) -> bool:
        """Parse; as waitress does, but a request refused is the last, and there is an end to how many may wait."""
        with self.requests_lock:
            arrived_s, self._next_byte_s = self._next_byte_s or time.monotonic(), None
            while data and self.connected:
                if self.request is None:
                    self.request = self.parser_class(self.adj)
                request = self.request
                # Some clients send an empty line behind a body: it does not begin the next request.
                if request.started_s is None and data.lstrip(b"\r\n"):
                    request.started_s = arrived_s
                before = request.body_bytes_received
                data = data[request.received(data) :]
                if self.server.door is not None:
                    request.knock(self.server.door)
                if not request.completed and before >> 20 != request.body_bytes_received >> 20 and self.server.is_full():
                    request.error = _too_busy("the appliance holds as many bytes of requests as it can", self.server.most_bytes, keep=False)
                    request.completed = True
                if request.completed:
                    self.sent_continue = False
                    self.request = None
                    if not request.empty:
                        if len(self.requests) >= PIPELINED:
                            error = UsageError("too many requests wait on one connection", value=PIPELINED, remedy="Wait for answers.")
                            request.error = _Refusal(400, "Bad Request", error)
                        self._queue(request)
                    if request.error:
                        break  # where the next request would begin is not known
                elif request.expect_continue and request.headers_finished and not self.requests and not self.sent_continue:
                    self.send_continue()
        return True

    def _queue(self, request: _Parser) -> None:
        self.requests.append(request)
        if len(self.requests) == 1:
            self.server.add_task(self)

    def refuse(self, code: int, reason: str, what: str, value: str) -> None:
        """Answer a request that is not all here, and close."""
        with self.requests_lock:
            if self.will_close or self.close_when_flushed:
                return
            request, self.request = self.request or self.parser_class(self.adj), None
            error = UsageError(what, value=value, remedy="Send the whole request without pause, as long as it declares.")
            request.error, request.completed = _Refusal(code, reason, error), True
            self._queue(request)

    def handle_write(self) -> None:
        if not self.close_when_flushed:
            super().handle_write()
            return
        self._flush_exception(self._flush_some)
        if self.will_close:
            self.handle_close()
        elif self.connected and not self.total_outbufs_len:
            self._linger()

    def _linger(self) -> None:
        """All is sent: say so, and go on reading for a while. Closed with bytes unread, the kernel would reset the connection and
        the client might lose the answer."""
        self.close_when_flushed = False
        self._linger_since_s = time.monotonic()
        try:
            self.socket.shutdown(socket.SHUT_WR)
        except OSError:
            self.handle_close()

    def handle_close(self) -> None:
        super().handle_close()
        if self.request is not None:
            self.request.close()

    def keep_time(self, now: float) -> None:
        """Close, or refuse, what has taken too long."""
        request = self.request
        if self._linger_since_s is not None:
            if now > self._linger_since_s + LINGER_S:
                self.handle_close()
        elif (since := self._unsent_since_s) is not None:
            taken = self._taken()
            if taken > self._last_taken[0]:
                self._last_taken = taken, now
            if now > min(since + max(0, taken - self._sent_before) / MIN_BYTES_PER_S, max(since, self._last_taken[1])) + ANSWER_S:
                log.info("an answer is not read: connection closed")
                self.handle_close()  # a thread that waits for room in the buffer learns of it
        elif self.requests or self.serving:
            pass  # the application's own time
        elif request is not None and request.started_s is not None:
            if now > request.started_s + REQUEST_S + request.moved() / MIN_BYTES_PER_S:
                self.refuse(408, "Request Timeout", "the request did not come in in time", f"{request.moved()} bytes")
        elif now > self._idle_since_s + IDLE_S:
            self.handle_close()

    def _taken(self) -> int:
        """Bytes that the client's machine has acknowledged, since the connection began."""
        waiting = fcntl.ioctl(self.socket.fileno(), termios.TIOCOUTQ, bytes(4))
        return self._sent - int.from_bytes(waiting, sys.byteorder)

    def dispensable(self) -> tuple[int, float] | None:
        """Who goes first when there is no room: the least of these; None while a request is at work."""
        request = self.request
        if self._linger_since_s is not None:
            return 0, self._linger_since_s
        if self.requests or self.serving:
            return None
        if (since := self._unsent_since_s) is not None:
            return 3, since
        if request is not None and request.started_s is not None:
            return 2, float(request.started_s)
        return 1, self._idle_since_s

    def busy(self) -> bool:
        return bool(self.requests or self.total_outbufs_len)

    def held_bytes(self) -> int:
        return sum(int(request.body_bytes_received) for request in [*self.requests, self.request] if request is not None)

    # --- in a request thread, or in the loop for what is refused ---

    def take_on(self) -> bool:
        """Called with `requests_lock` held: whether someone must now be found who calls `work`."""
        if self.serving:
            self._again = True
            return False
        self.serving = True
        return True

    def work(self) -> bool:
        """Answer the first request; whether another one has come in meanwhile, which is the caller's to see to."""
        try:
            self.service()
        except Exception:  # the thread must outlive it
            log.exception("a request's thread failed")
            self.will_close = True
        self._idle_since_s = time.monotonic()
        with self.requests_lock:
            self.serving = self._again and not self.will_close
            self._again = False
            more = self.serving
        self.watch()
        return more

    def gone(self) -> bool:
        try:
            if not self.connected:
                return True
            # Rather than a peek: this sees an end that stands behind bytes not yet read, too.
            poll = select.poll()
            poll.register(self.socket.fileno(), select.POLLRDHUP)
            return bool(poll.poll(0))
        except (AttributeError, OSError, ValueError):  # closed by the loop in this very moment
            return True

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """What is written within leaves at once."""
        held: list[Any] = []
        self._held = held
        try:
            yield
        finally:
            self._held = None
        if sum(len(data) for data in held) <= _TOGETHER_BYTES:
            held = [b"".join(held)]
        for data in held:
            self.write_soon(data)

    def write_soon(self, data: Any) -> int:
        if self._held is not None:
            self._held.append(data)
            return len(data)
        try:
            if isinstance(data, bytes):
                return self._send_now(data)
            return int(super().write_soon(data))
        finally:
            self.watch()

    def _send_now(self, data: bytes) -> int:
        """Straight to the socket where nothing waits before it; only the rest is buffered, which copies it twice."""
        rest: bytes | memoryview = data
        with self.outbuf_lock:
            if self.connected and not self.total_outbufs_len:
                sent, failed = self._flush_exception(lambda do_close: self.send(data, do_close), do_close=False)
                if not failed:
                    rest = memoryview(data)[sent:]
        if len(rest):
            super().write_soon(rest)
        return len(data)

    def send(self, data: Any, do_close: bool = True) -> int:
        sent = int(super().send(data, do_close))
        self._sent += sent
        return sent


class _Crew:
    """Request threads. Whoever was free last works next: its stack is still in the cache."""

    def __init__(self, count: int) -> None:
        self._free = [_Member(self.release, f"spinebox-request-{i}") for i in range(count)]
        self._all = tuple(self._free)
        for member in self._all:
            member.start()

    def give(self, channel: _Channel) -> bool:
        """Whether a thread was free to take it."""
        try:
            member = self._free.pop()
        except IndexError:
            return False
        member.begin(channel)
        return True

    def release(self, member: _Member) -> None:
        self._free.append(member)

    def dismiss(self, timeout_s: float) -> None:
        """Ask those that are free to end, and wait for them; one that still works ends with the process."""
        until = time.monotonic() + timeout_s
        gone = 0
        while gone < len(self._all) and time.monotonic() < until:
            try:
                member = self._free.pop()
            except IndexError:
                time.sleep(0.005)
                continue
            member.begin(None)
            member.join()
            gone += 1
        if gone < len(self._all):
            log.warning("%d requests are still at work", len(self._all) - gone)


class _Member(threading.Thread):
    def __init__(self, release: Callable[[_Member], None], name: str) -> None:
        super().__init__(name=name, daemon=True)
        self._release = release
        self._channel: _Channel | None = None
        self._called = threading.Lock()  # released to wake this thread: the cheapest signal there is
        self._called.acquire()

    def begin(self, channel: _Channel | None) -> None:
        self._channel = channel
        self._called.release()

    def run(self) -> None:
        while True:
            self._called.acquire()
            channel, self._channel = self._channel, None
            if channel is None:
                return
            while channel.work():
                pass
            self._release(self)


class _Loop:
    """The thread that moves bytes; to its channels it is what waitress calls the server."""

    def __init__(self, app: Any, listening: socket.socket, max_bytes: int, threads: int, door: Door | None) -> None:
        self.adj = Adjustments(
            ident="spinebox",
            max_request_body_size=max_bytes + MULTIPART_BYTES,
            max_request_header_size=MAX_HEADER_BYTES,
            inbuf_overflow=_IN_MEMORY_BYTES,
            outbuf_overflow=_IN_MEMORY_BYTES,
        )
        self.application = proxy_headers_middleware(app, clear_untrusted=True)
        self.server_name = self.adj.server_name
        self.effective_port = listening.getsockname()[1]
        self.channels: dict[int, _Channel] = {}
        self.stopping = False
        self.door = door
        self.most_bytes = max(HELD_BYTES, 4 * (max_bytes + MULTIPART_BYTES))
        self._threads = threads
        self._crew: _Crew | None = None
        self._waiting: deque[tuple[float, _Channel]] = deque()
        self._next_tick_s = 0.0
        self._listening = listening
        listening.setblocking(False)
        self._waker = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.epoll = select.epoll()
        self.epoll.register(self._waker, select.EPOLLIN)
        self.epoll.register(listening.fileno(), select.EPOLLIN)

    def wake(self) -> None:
        with contextlib.suppress(OSError):
            os.eventfd_write(self._waker, 1)

    def pull_trigger(self) -> None:
        """Waitress calls this for the loop to look at everything anew; here `watch` has already told it."""

    def start(self) -> None:
        self._crew = _Crew(self._threads)

    def stop_listening(self) -> None:
        self.stopping = True
        self._listening.close()
        for channel in list(self.channels.values()):
            channel.watch()

    def busy(self) -> bool:
        return any(channel.busy() for channel in list(self.channels.values()))

    def close(self) -> None:
        if self._crew is not None:
            for channel in list(self.channels.values()):
                channel.handle_close()
            self._crew.dismiss(1.0)
        self._listening.close()
        self.epoll.close()
        os.close(self._waker)

    def turn(self) -> None:
        """Wait for something to happen, a tick at most, and see to it."""
        wait_s = max(0.0, self._next_tick_s - time.monotonic())
        events = self.epoll.poll(min(wait_s, PATIENCE_S / 2) if self._waiting else wait_s)
        newcomers = False
        for descriptor, flags in events:
            if channel := self.channels.get(descriptor):
                self._see_to(channel, flags)
            elif descriptor == self._waker:
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(self._waker)
            else:
                newcomers = True
        if newcomers and not self.stopping:  # last, for a new connection may take the descriptor of one just closed
            self._accept()
        self._assign()
        if time.monotonic() >= self._next_tick_s:
            self._tick()

    def _see_to(self, channel: _Channel, flags: int) -> None:
        try:
            if flags & select.EPOLLIN:
                channel.handle_read()
            if flags & select.EPOLLOUT and channel.connected:
                channel.handle_write()
            if flags & _HUNG_UP:
                channel.handle_close()
        except Exception:  # one connection must not end the others
            log.exception("a connection failed")
            channel.handle_close()
        channel.watch()

    def _accept(self) -> None:
        now = time.monotonic()
        for _ in range(64):
            leaver = None
            if len(self.channels) >= MAX_CONNECTIONS:
                leaver = self._dispensable(now)
                if leaver is None:  # those let in are heard first; there are fewer threads than connections, so it is soon their turn
                    return
            try:
                sock, address = self._listening.accept()
            except OSError as exc:
                if exc.errno in (errno.EMFILE, errno.ENFILE):
                    if (leaver := self._dispensable()) is None:
                        time.sleep(0.01)  # rather than ask again without pause
                    else:
                        leaver.handle_close()
                return
            try:
                if leaver is not None:
                    leaver.handle_close()
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                _Channel(self, sock, address)
            except OSError:
                sock.close()

    def _dispensable(self, before: float = math.inf) -> _Channel | None:
        """Who goes first when there is no room, of those in their present state since before that moment."""
        ranked = [(rank, channel) for channel in list(self.channels.values()) if (rank := channel.dispensable()) and rank[1] < before]
        return min(ranked, key=lambda pair: pair[0])[1] if ranked else None

    def is_full(self) -> bool:
        return sum(channel.held_bytes() for channel in list(self.channels.values())) > self.most_bytes

    def add_task(self, channel: _Channel) -> None:
        """Have the first request of `channel` answered, whose `requests_lock` the caller holds."""
        if not channel.take_on():
            return
        # Straight to a thread, unless others were here first.
        if self._waiting or channel.requests[0].error or not self._give(channel):
            self._waiting.append((time.monotonic(), channel))

    def _give(self, channel: _Channel) -> bool:
        return self._crew is not None and self._crew.give(channel)

    def _assign(self) -> None:
        """Answer what is refused; find threads for the others, or refuse them too."""
        while self._waiting:
            since_s, channel = self._waiting[0]
            request = channel.requests[0]
            if not request.error:
                if self._give(channel):
                    self._waiting.popleft()
                    continue
                if time.monotonic() < since_s + PATIENCE_S:
                    return
                busy = "the appliance is at work on as many requests as it takes at once"
                request.error = _too_busy(busy, self._threads, keep=True)
            self._waiting.popleft()
            if channel.work():
                self._waiting.append((time.monotonic(), channel))

    def _tick(self) -> None:
        now = time.monotonic()
        self._next_tick_s = now + _TICK_S
        for channel in list(self.channels.values()):
            try:
                channel.keep_time(now)
            except Exception:  # one connection must not end the others
                log.exception("a connection failed")
                channel.handle_close()
            channel.watch()
        self._assign()
        unread = sorted(self.channels.values(), key=lambda channel: int(channel.total_outbufs_len))
        while sum(channel.total_outbufs_len for channel in unread) > self.most_bytes:
            unread.pop().handle_close()


class Server:
    """`app` on `host`:`port`, bound when constructed (port 0: any free one, see `.port`), serving while `run` runs.

    `max_bytes` bounds a request's file, `threads` (2 to 128) the requests at work: one more is refused at once. `door` is asked about
    every request with a body when its header is there. Raises UsageError where it cannot bind.
    """

    def __init__(
        self,
        app: Any,
        host: str = "127.0.0.1",
        port: int = 8080,
        *,
        max_bytes: int = 64 * 2**20,
        threads: int = THREADS,
        door: Door | None = None,
    ) -> None:
        if not MIN_THREADS <= threads <= MAX_THREADS:
            raise UsageError(f"threads must lie in {MIN_THREADS} to {MAX_THREADS}", value=threads)
        if not 0 <= port <= 65535:
            raise UsageError("a port lies in 0 to 65535", value=port, remedy="Choose another port, or 0 for any free one.")
        bare = host.strip("[]")
        try:
            family, _, _, _, address = socket.getaddrinfo(bare, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
            listening = socket.create_server(address[:2], family=family, backlog=1024)
        except (OSError, OverflowError, UnicodeError) as exc:
            raise UsageError(
                "the appliance cannot listen there",
                value=f"{host}:{port} ({exc})",
                remedy="Stop what uses the port, or choose another one (PORT=8081, or port 0 for any free one).",
            ) from exc
        self.host = bare
        self.port = int(listening.getsockname()[1])
        self._loop = _Loop(app, listening, max_bytes, threads, door)
        self._stop = threading.Event()

    @property
    def url(self) -> str:
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)  # noqa: S104 - compared, not bound
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"

    def run(self, grace_s: float = GRACE_S) -> None:
        """Serve until `stop`; then take no new request, let running ones finish (at most `grace_s`), and close."""
        loop = self._loop
        try:
            loop.start()
            while not self._stop.is_set():
                loop.turn()
            loop.stop_listening()
            until = time.monotonic() + grace_s
            while loop.busy() and time.monotonic() < until:
                loop.turn()
        finally:
            loop.close()

    def stop(self) -> None:
        """Ask `run` to end; may be called from a signal handler or another thread, more than once."""
        self._stop.set()
        self._loop.wake()


def serve(
    app: Any,
    host: str = "127.0.0.1",
    port: int = 8080,
    *,
    max_bytes: int = 64 * 2**20,
    threads: int = THREADS,
    door: Door | None = None,
    bound: Callable[[Server], None] | None = None,
    hangup: Callable[[], None] | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT. `bound` is told the server once its port is taken (`.url`, `.port`); `hangup` is called for each
    SIGHUP, and must return at once."""
    server = Server(app, host, port, max_bytes=max_bytes, threads=threads, door=door)
    with _on_signals(server, hangup):
        if bound is not None:
            bound(server)
        server.run()


@contextlib.contextmanager
def _on_signals(server: Server, hangup: Callable[[], None] | None) -> Iterator[None]:
    def handle(number: int, _frame: FrameType | None) -> None:
        log.info("signal %d: stopping", number)
        server.stop()

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    if hangup is not None:
        before[signal.SIGHUP] = signal.signal(signal.SIGHUP, lambda *_: hangup())
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
