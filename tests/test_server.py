"""The port itself, over real sockets and with tiny applications: clocks, who has gone, admission, and every kind of bad client."""

from __future__ import annotations

import contextlib
import errno
import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from appliance.errors import OutOfTime, UsageError
from appliance.report import DISCLAIMER
from appliance.web import server as module
from appliance.web.server import COMPLETED_S, GONE, STARTED_S, TICKET, Knock, Server

WAIT_S = 20.0  # for what must happen; nothing here takes that long unless it is broken
GET = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"


def until(true: Callable[[], Any], what: str = "") -> None:
    end = time.monotonic() + WAIT_S
    while not true():
        assert time.monotonic() < end, what or "it did not happen"
        time.sleep(0.005)


class App:
    """Answers with what it was sent. /hold waits for `release`, /fail fails, /large answers `size` bytes, /stream piece by piece."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []
        self.inside = 0
        self.lock = threading.Lock()
        self.release = threading.Event()
        self.size = 0
        self.ended: list[str] = []

    def __call__(self, environ, start_response):
        body = environ["wsgi.input"].read()
        seen = {"path": environ["PATH_INFO"], "body": body, "thread": threading.current_thread().name, "at": time.monotonic()}
        call = {key: environ[key] for key in (STARTED_S, COMPLETED_S, GONE, TICKET)} | seen
        self.calls.append(call)
        headers = [("Content-Type", "application/json")]
        if call["path"] == "/fail":
            raise RuntimeError("as asked")
        if call["path"] == "/hold":
            with self.lock:
                self.inside += 1
            assert self.release.wait(WAIT_S)
            with self.lock:
                self.inside -= 1
        if call["path"] == "/large":
            start_response("200 OK", [*headers, ("Content-Length", str(self.size))])
            return [b"x" * self.size]
        if call["path"] == "/stream":
            start_response("200 OK", [*headers, ("Content-Length", str(self.size))])
            return self.pieces()
        answer = json.dumps({"path": call["path"], "length": len(body)}).encode()
        start_response("200 OK", [*headers, ("Content-Length", str(len(answer)))])
        return [answer]

    def pieces(self) -> Iterator[bytes]:
        try:
            for _ in range(self.size >> 20):
                yield b"x" * 2**20
            self.ended.append("whole")
        except GeneratorExit:
            self.ended.append("cut")
            raise


@contextlib.contextmanager
def serving(app: Any, grace_s: float = 5.0, **settings: Any) -> Iterator[Server]:
    server = Server(app, port=0, **{"max_bytes": 100_000, "threads": 2, **settings})
    thread = threading.Thread(target=server.run, args=(grace_s,))
    thread.start()
    try:
        yield server
    finally:
        server.stop()
        if isinstance(app, App):
            app.release.set()
        thread.join(WAIT_S)
        assert not thread.is_alive()


@pytest.fixture
def app() -> App:
    return App()


@pytest.fixture
def server(app: App) -> Iterator[Server]:
    with serving(app) as running:
        yield running


class Client:
    def __init__(self, server: Server, send: bytes = b"") -> None:
        self.socket = socket.create_connection(("127.0.0.1", server.port), timeout=WAIT_S)
        self.unread = b""
        if send:
            self.socket.sendall(send)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exc: object) -> None:
        self.socket.close()

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def head(self) -> tuple[int, dict[str, str]]:
        """(status, headers by lower-case name) of the next answer."""
        while b"\r\n\r\n" not in self.unread:
            part = self.socket.recv(65536)
            assert part, f"closed after {self.unread!r}"
            self.unread += part
        head, _, self.unread = self.unread.partition(b"\r\n\r\n")
        lines = head.decode().split("\r\n")
        return int(lines[0].split()[1]), {name.lower(): value for name, _, value in (line.partition(": ") for line in lines[1:])}

    def answer(self) -> tuple[int, dict[str, str], Any]:
        status, headers = self.head()
        while len(self.unread) < int(headers["content-length"]):
            part = self.socket.recv(65536)
            assert part, "closed within the body"
            self.unread += part
        body, self.unread = self.unread[: int(headers["content-length"])], self.unread[int(headers["content-length"]) :]
        return status, headers, json.loads(body)

    def refused(self, status: int, code: str) -> dict[str, str]:
        """The headers of a refusal in the shape of every other error."""
        found, headers, body = self.answer()
        assert (found, body["error"]["code"], body["disclaimer"]) == (status, code, DISCLAIMER), body
        assert set(body["error"]) == {"code", "message", "value", "remedy"}
        assert body["error"]["message"]
        assert body["error"]["remedy"]
        assert headers["content-type"] == "application/json"
        return headers

    def ended(self) -> bool:
        """Whether the server closes the connection without another byte."""
        try:
            return not self.unread and self.socket.recv(65536) == b""
        except ConnectionResetError:
            return True


def heard(server: Server, client: Client) -> bool:
    """Whether a part of a request has come in from this client."""
    port = client.socket.getsockname()[1]
    return any(channel.addr[1] == port and channel.request is not None for channel in list(server._loop.channels.values()))


def works(server: Server) -> None:
    with Client(server, GET) as client:
        assert client.answer()[0] == 200


def post(body: bytes, length: int | None = None, path: str = "/", more: str = "") -> bytes:
    return (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\n{more}Content-Length: {len(body) if length is None else length}\r\n\r\n".encode()
        + body
    )


# --- the clocks --------------------------------------------------------------------------------------------------------


def test_the_first_and_the_last_byte_of_each_request_are_timed(app, server):
    with Client(server) as client:
        for _ in range(2):  # the second on the same connection, after an empty line that is not its beginning
            client.send(b"\r\n")
            time.sleep(0.1)
            whole = post(b"abc")
            t = [time.monotonic()]
            for part in (whole[:1], whole[1:-1], whole[-1:]):
                client.send(part)
                time.sleep(0.1)
                t.append(time.monotonic())
            assert client.answer()[0] == 200
            call = app.calls.pop()
            assert t[0] <= call[STARTED_S] <= t[1]
            assert t[2] <= call[COMPLETED_S] <= call["at"]


def test_a_pipelined_request_began_when_it_came_not_when_its_turn_came(app, server):
    with Client(server, post(b"", path="/hold")) as client:
        until(lambda: app.inside)
        before = time.monotonic()
        client.send(GET)
        time.sleep(0.1)
        after = time.monotonic()
        app.release.set()
        assert [client.answer()[2]["path"] for _ in range(2)] == ["/hold", "/"]
    assert before <= app.calls[1][STARTED_S] <= after <= app.calls[1]["at"]


def test_requests_pipelined_in_one_packet_are_answered_in_order(app, server):
    with Client(server, post(b"a", path="/1") + post(b"bc", path="/2") + GET) as client:
        assert [client.answer()[2] for _ in range(3)] == [{"path": p, "length": n} for p, n in (("/1", 1), ("/2", 2), ("/", 0))]
    assert app.calls[0][STARTED_S] == app.calls[1][STARTED_S] == app.calls[2][STARTED_S] <= app.calls[0]["at"]


# --- who has gone ------------------------------------------------------------------------------------------------------


def reset(client: Client) -> None:
    client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.socket.close()


def half_closed(client: Client) -> None:
    client.socket.shutdown(socket.SHUT_WR)


def behind_another_request(client: Client) -> None:
    client.send(GET)
    client.socket.close()


@pytest.mark.parametrize("leave", [lambda client: client.socket.close(), reset, half_closed, behind_another_request])
def test_a_client_that_leaves_while_it_is_answered_is_seen(app, server, leave):
    with Client(server, post(b"", path="/hold")) as client:
        until(lambda: app.inside)
        gone = app.calls[0][GONE]
        assert gone() is False
        client.send(b"GET ")  # more to read is no end
        time.sleep(0.05)
        assert gone() is False
    with Client(server, post(b"", path="/hold")) as client:
        until(lambda: app.inside == 2)
        gone = app.calls[1][GONE]
        leave(client)
        until(lambda: gone() is True)
        app.release.set()
        until(lambda: not app.inside)
        assert gone() is True  # asked later still, it does not raise
        until(lambda: gone.__self__.socket is None)
        gone.__self__.connected = True  # as in the moment in which the loop closes it
        assert gone() is True
    works(server)


def test_a_client_that_only_half_closes_still_gets_what_is_answered(app, server):
    with Client(server, post(b"", path="/hold")) as client:
        until(lambda: app.inside)
        half_closed(client)
        until(app.calls[0][GONE])
        app.release.set()
        assert client.answer()[0] == 200
        assert client.ended()


# --- admission ---------------------------------------------------------------------------------------------------------


def test_so_many_threads_and_no_others():
    for threads in (1, 129):
        with pytest.raises(UsageError, match="2 to 128"):
            Server(App(), port=0, threads=threads)


def test_as_many_requests_as_threads_are_at_work_together(app):
    with serving(app, threads=module.THREADS) as server, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(Client(server, post(b"", path="/hold"))) for _ in range(32)]
        until(lambda: app.inside == 32)
        app.release.set()
        assert [client.answer()[0] for client in clients] == [200] * 32


def test_a_request_without_a_thread_is_refused_at_once(app, server):
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(Client(server, post(b"", path="/hold"))) for _ in range(2)]
        until(lambda: app.inside == 2)
        others = [stack.enter_context(Client(server, post(b"", path="/more"))) for _ in range(20)]
        for client in others:  # while both threads are still held: nothing waited for them
            assert client.refused(503, "refused.out-of-time")["retry-after"] == "1"
        others[0].send(b"HEAD / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert others[0].head()[0] == 503
        others[1].send(b"nonsense\r\n\r\n")  # needs no thread
        others[1].refused(400, "usage.invalid")
        app.release.set()
        assert [client.answer()[0] for client in held] == [200, 200]
        until(lambda: len(server._loop._crew._free) == 2)
        others[2].send(GET)  # the same connection goes on
        assert others[2].answer()[0] == 200
    assert not [call for call in app.calls if call["path"] == "/more"]


def test_what_follows_a_refused_request_does_not_run_in_the_loop(app, server):
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(Client(server, post(b"", path="/hold"))) for _ in range(2)]
        until(lambda: app.inside == 2)
        client = stack.enter_context(Client(server, GET + GET + GET))
        for _ in range(3):
            client.refused(503, "refused.out-of-time")
        held[0].send(GET)  # behind a request at work: its thread goes on with it
        app.release.set()
        assert [held[0].answer()[0] for _ in range(2)] == [200, 200]
    assert len(app.calls) == 3
    assert {call["thread"].rpartition("-")[0] for call in app.calls} == {"spinebox-request"}


def test_an_application_that_fails_is_a_json_error_and_loses_no_thread(app, server, caplog):
    for _ in range(5):
        with Client(server, post(b"", path="/fail")) as client:
            client.refused(500, "internal")
    assert "as asked" in caplog.text
    works(server)


# --- many connections --------------------------------------------------------------------------------------------------


# --- the door ----------------------------------------------------------------------------------------------------------


class Place:
    def __init__(self) -> None:
        self.closed = 0

    def close(self) -> None:
        self.closed += 1


class Keeper:
    """A door that says what the test says."""

    def __init__(self) -> None:
        self.knocks: list[Knock] = []
        self.places: list[Place] = []
        self.says: Callable[[], Any] = self.let_in

    def __call__(self, knock: Knock) -> Any:
        self.knocks.append(knock)
        return self.says()

    def let_in(self) -> Place:
        self.places.append(Place())
        return self.places[-1]


@pytest.fixture
def keeper() -> Keeper:
    return Keeper()


@pytest.fixture
def guarded(app: App, keeper: Keeper) -> Iterator[Server]:
    with serving(app, door=keeper, max_bytes=8 * 2**20) as running:
        yield running


def post_head(length: int, more: str = "") -> bytes:
    return f"POST /hold?budget_ms=5 HTTP/1.1\r\nHost: localhost\r\nX-Word: Yes\r\nContent-Length: {length}\r\n{more}\r\n".encode()


def test_the_door_refuses_before_the_body_is_there(app, keeper, guarded):
    def refuse() -> None:
        error = OutOfTime("too much before it", value="70 ms", remedy="Later.")
        error.retry_after_ms = 2100.0
        raise error

    keeper.says = refuse
    with Client(guarded, post_head(50_000)) as client:
        status, headers, body = client.answer()
        assert (status, headers["retry-after"], body["admitted"]) == (503, "3", False)
        assert (body["error"]["code"], body["error"]["value"]) == ("refused.out-of-time", "70 ms")
        client.send(b"x" * 50_000)  # goes on, and is not reset
        assert client.socket.recv(1) == b""
    (knock,) = keeper.knocks
    assert (knock.method, knock.path, knock.query, knock.size, knock.headers["X_WORD"]) == ("POST", "/hold", "budget_ms=5", 50_000, "Yes")
    assert 0 <= time.monotonic() - knock.started_s < WAIT_S
    assert app.calls == []


def test_whom_the_door_lets_in_brings_the_place_along_and_gives_it_back(app, keeper, guarded):
    with Client(guarded, post_head(10)) as client:
        until(lambda: keeper.places)
        client.send(b"x" * 10)
        until(lambda: app.inside)
        (place,) = keeper.places
        assert (app.calls[0][TICKET], place.closed) == (place, 0)
        app.release.set()
        assert client.answer()[0] == 200
    until(lambda: place.closed)
    assert len(keeper.knocks) == 1


def test_a_place_is_given_back_by_who_goes_away_before_all_is_there(keeper, guarded):
    with Client(guarded, post_head(1000)) as client:
        until(lambda: keeper.places)
        client.send(b"half")
    until(lambda: keeper.places[0].closed)


def test_who_sends_nothing_or_much_is_not_asked(app, keeper, guarded):
    app.release.set()
    large = module.MOST_AT_DOOR_BYTES
    with Client(guarded, GET) as client:
        assert client.answer()[0] == 200
    with Client(guarded, post_head(large + 1)) as client:
        client.send(b"x" * (large + 1))
        assert client.answer()[0] == 200
    with Client(guarded, b"POST /hold HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n") as client:
        client.send(b"3\r\nabc\r\n0\r\n\r\n")
        assert client.answer()[0] == 200
    assert ([call[TICKET] for call in app.calls], keeper.knocks) == ([None, None, None], [])
    for size in (3, large):
        with Client(guarded, post_head(size) + b"x" * size) as client:
            assert client.answer()[0] == 200
        assert keeper.knocks[-1].size == size
    assert [call[TICKET] for call in app.calls[3:]] == keeper.places


def test_a_door_that_fails_lets_in(app, keeper, guarded, caplog):
    keeper.says = lambda: 1 / 0
    app.release.set()
    with Client(guarded, post_head(10)) as client:
        until(lambda: keeper.knocks)
        client.send(b"x" * 10)
        assert client.answer()[0] == 200
    assert app.calls[0][TICKET] is None
    assert "the door failed" in caplog.text


def test_who_waits_to_be_told_to_go_on_is_refused_instead(app, keeper, guarded):
    def refuse() -> None:
        raise OutOfTime("too much before it")

    keeper.says = refuse
    with Client(guarded, post_head(1000, "Expect: 100-continue\r\n")) as client:
        assert client.head()[0] == 503
    assert app.calls == []


def test_two_hundred_idle_sockets_keep_nobody_out(app, server):
    with contextlib.ExitStack() as stack:
        idle = [stack.enter_context(Client(server)) for _ in range(200)]
        works(server)
        idle[0].send(GET)  # and they are all still welcome
        assert idle[0].answer()[0] == 200


def test_when_there_is_no_room_the_longest_idle_goes_first(app, server, monkeypatch):
    monkeypatch.setattr(module, "MAX_CONNECTIONS", 8)
    channels = server._loop.channels
    with contextlib.ExitStack() as stack:
        at_work = stack.enter_context(Client(server, post(b"", path="/hold")))
        until(lambda: app.inside)
        sending = stack.enter_context(Client(server, b"GET / HTTP/1.1\r\n"))
        until(lambda: heard(server, sending))
        idle = []
        for n in range(3, 9):  # one after the other: who came first is known
            idle.append(stack.enter_context(Client(server)))
            until(lambda n=n: len(channels) == n)
        for _ in range(2):
            client = stack.enter_context(Client(server, GET))
            assert client.answer()[0] == 200
        assert idle[0].ended()
        assert idle[1].ended()
        idle[2].send(GET)
        assert idle[2].answer()[0] == 200
        sending.send(b"\r\n")
        assert sending.answer()[0] == 200
        # Unfinished requests do not keep anyone out either.
        halves = []
        for _ in range(10):
            halves.append(stack.enter_context(Client(server, b"GET / HTTP/1.1\r\n")))
            until(lambda: heard(server, halves[-1]))
        works(server)
        assert all(half.ended() for half in halves[:4])  # seven had room, then six
        app.release.set()
        assert at_work.answer()[0] == 200


def test_without_descriptors_the_longest_idle_makes_room(app, server):
    real = server._loop._listening

    class Short:
        """The listening socket, at first with no descriptor left for a connection."""

        lacking = 1

        def accept(self):
            if self.lacking:
                self.lacking -= 1
                raise OSError(errno.EMFILE, "Too many open files")
            return real.accept()

        def close(self):
            real.close()

    with Client(server) as idle:
        until(lambda: server._loop.channels)
        server._loop._listening = Short()
        works(server)
        assert idle.ended()


def test_an_idle_connection_is_closed(app, server, monkeypatch):
    monkeypatch.setattr(module, "IDLE_S", 0.2)
    with Client(server) as never, Client(server, GET) as once:
        assert once.answer()[0] == 200
        assert never.ended()
        assert once.ended()
    with Client(server, post(b"", path="/hold")) as at_work:  # is not idle
        until(lambda: app.inside)
        monkeypatch.setattr(module, "IDLE_S", 0.8)
        time.sleep(1.0)
        app.release.set()
        assert at_work.answer()[0] == 200
        time.sleep(0.3)  # more than a tick: idle is since the answer
        at_work.send(GET)
        assert at_work.answer()[0] == 200


# --- slow clients ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "begin", [b"GET / HTTP/1.1\r\nX: ", post(b"", 1000), b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n3e8\r\n"]
)
def test_a_client_that_trickles_is_told_and_closed(app, server, monkeypatch, begin):
    monkeypatch.setattr(module, "REQUEST_S", 0.4)
    with Client(server, begin) as client:
        client.socket.settimeout(0.05)
        for _ in range(int(WAIT_S / 0.05)):
            client.send(b"y")
            with contextlib.suppress(TimeoutError):
                client.unread += client.socket.recv(65536)
                break
        client.socket.settimeout(WAIT_S)
        client.refused(408, "usage.invalid")
        assert client.ended()
    assert not app.calls
    works(server)


def test_a_client_that_is_slow_but_steady_is_waited_for(app, server, monkeypatch):
    monkeypatch.setattr(module, "REQUEST_S", 0.5)
    monkeypatch.setattr(module, "MIN_BYTES_PER_S", 1000)
    with Client(server, post(b"", 20_000)) as client:
        for _ in range(20):
            client.send(b"z" * 1000)
            time.sleep(0.06)
        assert client.answer()[2]["length"] == 20_000
    assert app.calls[0][COMPLETED_S] - app.calls[0][STARTED_S] > 1.0  # longer than REQUEST_S and two ticks


def test_more_newcomers_at_once_than_there_is_room_for_are_all_heard(app, monkeypatch):
    monkeypatch.setattr(module, "MAX_CONNECTIONS", 8)
    server = Server(app, port=0, threads=4)
    with contextlib.ExitStack() as stack:
        # All wait in the kernel's queue, with their requests, when the loop begins.
        clients = [stack.enter_context(Client(server, GET.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))) for _ in range(40)]
        thread = threading.Thread(target=server.run)
        thread.start()
        try:
            assert {client.answer()[0] for client in clients} <= {200, 503}
        finally:
            server.stop()
            thread.join(WAIT_S)


@pytest.mark.parametrize("path", ["/large", "/stream"])
@pytest.mark.parametrize("taken", [0, 2**24])
def test_a_client_that_does_not_read_frees_its_thread(app, server, monkeypatch, path, taken):
    app.size = 2**26 if path == "/large" else 2**28  # more than the client's kernel takes, and the buffers
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(Client(server, post(b"", path=path))) for _ in range(2)]  # as many as threads
        for client in clients:
            got = 0
            while got < taken:
                got += len(client.socket.recv(2**20))
        until(lambda: len(app.calls) == 2)
        monkeypatch.setattr(module, "ANSWER_S", 0.4)
        if path == "/stream":  # the threads wait for room in the buffer
            until(lambda: app.ended == ["cut", "cut"], "the threads were not freed")
        until(lambda: not server._loop.channels, "the connections were not closed")
        works(server)


def test_a_client_that_reads_too_slowly_is_cut_off(app, server, monkeypatch):
    monkeypatch.setattr(module, "ANSWER_S", 0.4)
    monkeypatch.setattr(module, "MIN_BYTES_PER_S", 2**40)
    app.size = 256 * 2**20
    with Client(server, post(b"", path="/stream")) as client, contextlib.suppress(ConnectionResetError):
        while client.socket.recv(2**18):
            time.sleep(0.02)
    until(lambda: app.ended)
    assert app.ended == ["cut"]


def test_a_client_that_reads_slowly_gets_it_all(app, server, monkeypatch):
    monkeypatch.setattr(module, "ANSWER_S", 0.3)
    app.size = 32 * 2**20
    with Client(server, post(b"", path="/stream")) as client:
        got = 0
        assert client.head()[0] == 200
        while got + len(client.unread) < app.size:
            part = client.socket.recv(2**20)
            assert part
            got += len(part)
            time.sleep(0.02)
    assert app.ended == ["whole"]


# --- what is not HTTP --------------------------------------------------------------------------------------------------

CHUNKED = "Transfer-Encoding: chunked\r\n"


@pytest.mark.parametrize(
    ("request_head", "status"),
    [
        ("GET / HTTP/1.1\r\nContent-Length: -5\r\n\r\n", 400),
        ("GET / HTTP/1.1\r\nContent-Length: five\r\n\r\n", 400),
        ("GET / HTTP/1.1\r\nContent-Length: 5, 5\r\n\r\n", 400),
        ("GET / HTTP/1.1\r\nContent-Length: 5\r\nContent-Length: 5\r\n\r\n", 400),
        ("GET / HTTP/1.1\r\nContent-Length: 1e3\r\n\r\n", 400),
        ("GET / HTTP/1.1\r\nContent-Length: +5\r\n\r\n", 400),
        ("GET / HTTP/1.1\r\nContent-Length:\r\n\r\n", 400),
        (f"GET / HTTP/1.1\r\nContent-Length: {'9' * 6000}\r\n\r\n", 400),
        (f"GET / HTTP/1.1\r\n{CHUNKED}Content-Length: 5\r\n\r\n0\r\n\r\n", 400),
        (f"GET / HTTP/1.0\r\n{CHUNKED}\r\n0\r\n\r\n", 400),
        ("GET / HTTP/1.1\r\nTransfer-Encoding: gzip\r\n\r\n", 501),
        (f"GET / HTTP/1.1\r\n{CHUNKED}\r\nxyz\r\n", 400),
        (f"GET / HTTP/1.1\r\n{CHUNKED}\r\n-1\r\n", 400),
        (f"GET / HTTP/1.1\r\n{CHUNKED}\r\n3\r\nabcdef\r\n", 400),
        (f"GET / HTTP/1.1\r\n{CHUNKED}\r\n{'0' * 20_000}", 400),
        (f"GET / HTTP/1.1\r\n{CHUNKED}\r\n0\r\n{'T: x' * 20_000}", 400),
        (f"GET / HTTP/1.1\r\n{CHUNKED}\r\nfffffffff\r\n{'x' * 200_000}", 413),
        ("GET http://[ HTTP/1.1\r\n\r\n", 400),
        ("get / HTTP/1.1\r\n\r\n", 400),
        ("\x00\x01\x02\r\n\r\n", 400),
        ("GET / HTTP/1.1\r\nno colon\r\n\r\n", 400),
        ("GET / HTTP/1.1\r\n X: folded\r\n\r\n", 400),
        (f"GET / HTTP/1.1\r\n{'X: y' * 20_000}", 431),
        ("POST / HTTP/1.1\r\nContent-Length: 165537\r\n\r\n", 413),
        ("POST / HTTP/1.1\r\nContent-Length: 165537\r\nExpect: 100-continue\r\n\r\n", 413),
    ],
)
def test_what_cannot_be_understood_is_refused_clearly(app, server, request_head, status):
    with Client(server, request_head.encode("latin-1")) as client:
        client.refused(status, "study.too-large" if status == 413 else "usage.invalid")
        assert client.ended()
    assert not app.calls
    works(server)


def test_a_refusal_arrives_although_the_client_goes_on_sending(app, server):
    with Client(server, post(b"", 10_000_000)) as client:
        for _ in range(100):
            client.send(b"x" * 100_000)
        client.refused(413, "study.too-large")
        assert client.ended()


def test_who_never_stops_sending_after_a_refusal_is_cut_off(app, server, monkeypatch):
    monkeypatch.setattr(module, "LINGER_S", 0.2)

    def send_without_end():
        with Client(server, b"nonsense\r\n\r\n") as client:
            end = time.monotonic() + WAIT_S
            while time.monotonic() < end:
                client.send(b"x" * 1000)
                time.sleep(0.01)

    with pytest.raises(OSError, match=r"Broken pipe|reset"):
        send_without_end()


def test_a_body_in_chunks_is_read(app, server):
    with Client(server, b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n") as client:
        client.send(b"5;name=value\r\nhello\r\n" + b"1\r\nx\r\n" * 3000 + b"1388\r\n" + b"y" * 5000 + b"\r\n0\r\nTrailer: z\r\n\r\n" + GET)
        assert client.answer()[2]["length"] == 8005
        assert client.answer()[2]["length"] == 0
    assert app.calls[0]["body"] == b"hello" + b"x" * 3000 + b"y" * 5000


def test_a_body_longer_than_declared_does_not_become_part_of_it(app, server):
    with Client(server, post(b"abcdef\r\n\r\n", 3)) as client:
        assert client.answer()[2]["length"] == 3
        client.refused(400, "usage.invalid")
        assert client.ended()
    assert [call["body"] for call in app.calls] == [b"abc"]


def test_a_body_shorter_than_declared_is_never_answered_as_if_it_were_whole(app, server):
    with Client(server, post(b"abc", 10)) as client:
        half_closed(client)
        client.refused(400, "usage.invalid")
        assert client.ended()
    with Client(server, post(b"abc", 10)):
        pass
    with Client(server, post(b"a" * 1000, 90_000)) as client:
        reset(client)
    until(lambda: not server._loop.channels)
    assert not app.calls
    works(server)


def test_who_asks_before_sending_a_body_is_told_to_go_on(app, server):
    with Client(server, post(b"", 3, more="Expect: 100-continue\r\n")) as client:
        assert client.head()[0] == 100
        client.send(b"abc")
        assert client.answer()[2]["length"] == 3
        client.send(b"GET / HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\n\r\n")  # has no body to go on with
        assert client.answer()[0] == 200


def test_too_many_requests_in_one_breath(app, server):
    with Client(server, post(b"", path="/hold")) as client:
        until(lambda: app.inside)
        client.send(GET * 1000)
        app.release.set()
        for _ in range(1 + module.PIPELINED):
            assert client.answer()[0] == 200
        client.refused(400, "usage.invalid")
        assert client.ended()


def test_what_all_requests_together_may_hold_has_a_limit(app, monkeypatch):
    monkeypatch.setattr(module, "HELD_BYTES", 0)  # four of the largest then
    size = 2**21 - 2**18
    with serving(app, max_bytes=2**21) as server, contextlib.ExitStack() as stack:
        for n in range(1, 6):
            stack.enter_context(Client(server, post(b"x" * size, 2**21)))
            until(lambda n=n: sum(c.held_bytes() for c in list(server._loop.channels.values())) == n * size)
        with Client(server, post(b"x" * size, 2**21)) as client:
            client.refused(503, "refused.out-of-time")
        works(server)


def test_what_all_answers_together_may_hold_has_a_limit(app, monkeypatch):
    monkeypatch.setattr(module, "HELD_BYTES", 2**25)
    app.size = 3 * 2**24
    with serving(app) as server, contextlib.ExitStack() as stack:
        for _ in range(2):
            stack.enter_context(Client(server, post(b"", path="/large")))
        until(lambda: len(app.calls) == 2)
        until(lambda: not server._loop.channels)  # long before ANSWER_S
        works(server)


# --- answers and the end -----------------------------------------------------------------------------------------------


def test_head_and_body_leave_together(app, server, monkeypatch):
    sent = []
    real = module._Channel.send

    def send(self, data, do_close=True):
        sent.append(bytes(data))
        return real(self, data, do_close)

    monkeypatch.setattr(module._Channel, "send", send)
    with Client(server, GET) as client:
        client.answer()
    assert len(sent) == 1
    assert sent[0].startswith(b"HTTP/1.1 200 OK\r\n")
    assert sent[0].endswith(b"}")


def test_nothing_waits_for_the_tick(app, monkeypatch):
    monkeypatch.setattr(module, "_TICK_S", 3 * WAIT_S)
    app.size = 2**27
    with serving(app) as server:
        with Client(server, post(b"", path="/hold")) as client:
            until(lambda: app.inside)
            client.send(GET)
            time.sleep(0.05)
            app.release.set()
            assert [client.answer()[0] for _ in range(2)] == [200, 200]
        with Client(server, post(b"", path="/stream", more="Connection: close\r\n")) as client:
            until(lambda: any(c.total_outbufs_len > 2**24 for c in list(server._loop.channels.values())))  # its thread waits for room
            client.head()
            got = len(client.unread)
            while part := client.socket.recv(2**20):
                got += len(part)
            assert got == app.size


def test_the_stop_lets_running_answers_leave_and_takes_no_others(app):
    server = Server(app, port=0, threads=4)
    thread = threading.Thread(target=server.run)
    thread.start()
    with Client(server, post(b"", path="/hold")) as at_work, Client(server, GET) as idle, Client(server, b"GET / HT") as sending:
        until(lambda: app.inside)
        assert idle.answer()[0] == 200
        server.stop()
        until(lambda: server._loop.stopping)
        with pytest.raises(OSError, match=r"refused|reset"), Client(server, GET) as late:
            assert late.answer()
        idle.send(GET)
        time.sleep(0.1)
        assert thread.is_alive()
        app.release.set()
        status, headers, _ = at_work.answer()
        assert (status, headers["connection"]) == (200, "close")
        thread.join(WAIT_S)
        assert not thread.is_alive()
        assert idle.ended()
        assert sending.ended()
    assert len(app.calls) == 2
    assert not [t for t in threading.enumerate() if t.name.startswith("spinebox-request")]


def test_the_stop_does_not_wait_for_ever(app, caplog):
    with serving(app, grace_s=0.2) as server, Client(server, post(b"", path="/hold")) as client:
        until(lambda: app.inside)
        server.stop()
        assert client.ended()
        until(lambda: "still at work" in caplog.text)
