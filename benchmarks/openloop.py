"""The sender of the load benchmarks: requests leave on schedule whatever became of the earlier ones, and nothing is lost in counting.

Hides sockets and clocks. `Pool` makes studies that differ in every byte string, `offer` sends them on a schedule of
`benchmarks.arrivals`, each on a connection of its own, and gives one `Outcome` per request. `summarise` and `account` are pure.

A latency counts from the moment the client begins to connect to the last byte of the answer. How much later than scheduled that
moment was is the sender's own lateness, kept beside it: where its 99th percentile is above 5 ms, the load was not what it says.
"""

from __future__ import annotations

import asyncio
import contextlib
import csv
import gc
import itertools
import json
import os
import secrets
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.arrivals import Arrival
from models import phantom

PATIENCE_S = 5.0  # a client waits for a late answer this long after its deadline, to know how late it was
LATE_SENDER_MS = 5.0
LINGER_S = 0.25  # for bytes after an answer: there must be none
AMPLE_MS = 60_000.0  # a deadline that decides nothing
AHEAD_BYTES = 1 << 30  # of requests that are made before the first is sent
BITS = 48  # of the lowest bits of the last pixels, which tell one request from another
# What says at the door: not taken. The other codes of a 503 (a worker was lost) are failures of what was admitted.
REFUSES = frozenset({429, 503})
DOOR_CODES = frozenset({"", "refused.out-of-time", "fifo.full"})
SLOW_REFUSAL_MS = 50.0  # a door says no at once; what takes longer was let in first, whatever its code says


# -- what is sent -------------------------------------------------------------------------------------------------------


class Pool:
    """Studies of phantoms without end, no two alike in bytes or in SOP Instance UID; all of the same few pictures.

    The appliance gives the same bytes the kept answer of the first time, so each request must differ. Only the lowest bits of the
    last 48 pixels (a corner of the noise) and the last digits of the UID change: the work stays the same, and a request costs a copy.
    """

    def __init__(self, pictures: int = 12, hw: tuple[int, int] = (512, 512), seed: int = 0, progress: Callable[[], object] = lambda: None):
        self._templates: list[tuple[bytes, bytes]] = []
        for number in range(pictures):
            image, truth = phantom.draw(np.random.default_rng([seed, number]), weighting="T2", hw=hw)
            data = phantom.write_dicom(image, truth, seed=number)
            self._templates.append((data, _uid(data)))
            progress()
        self._next = itertools.count(secrets.randbits(30) << 16)  # two runs against one daemon differ too

    def __len__(self) -> int:
        return len(self._templates)

    def study(self) -> bytes:
        """The next DICOM object."""
        number = next(self._next)
        data, uid = self._templates[number % len(self._templates)]
        out = bytearray(data)
        digits = f"{number % 10**15:015d}".encode()
        for at in _places(data, uid):
            out[at + len(uid) - 15 : at + len(uid)] = digits
        tail = np.frombuffer(out, np.uint8)[-2 * BITS :: 2]  # the low bytes of the last pixels, little endian
        tail[:] = (tail & 0xFE) | ((number >> np.arange(BITS)) & 1).astype(np.uint8)
        return bytes(out)


def _uid(data: bytes) -> bytes:
    """The SOP Instance UID as it stands in the file meta information (0002,0003), explicit little endian."""
    at = data.index(b"\x02\x00\x03\x00UI")
    length = int.from_bytes(data[at + 6 : at + 8], "little")
    return data[at + 8 : at + 8 + length].rstrip(b"\0")


def _places(data: bytes, uid: bytes) -> tuple[int, int]:
    first = data.index(uid)
    return first, data.index(uid, first + len(uid))


@dataclass(frozen=True)
class Request:
    """One HTTP request but for its Host: path, headers and body. `study_id` is the appliance's id of the bytes, "" where unknown."""

    path: str
    headers: Mapping[str, str]
    body: bytes
    study_id: str = ""


# -- what came back -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reply:
    """What a client saw: `status` 0 where no whole answer came, and why. Times are seconds on the sender's clock."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    scheduled_s: float
    sent_s: float
    ended_s: float
    replies: int = 1  # answers on this connection; two would be one too many
    why: str = ""


@dataclass(frozen=True)
class Outcome:
    """One row. `rung` and `code` are "" where the answer has none; `on_time` says that the client held an answer, of whatever rung,
    within its deadline. `refusal_ms` is the time to a refusal at the door. `admitted`: not refused there, whatever came of it."""

    number: int
    offered_s: float
    lateness_ms: float
    deadline_ms: float
    status: int
    code: str
    rung: str
    shed: str
    latency_ms: float
    on_time: bool
    admitted: bool
    refusal_ms: float | None
    ended_s: float
    replies: int
    study_id: str


def outcome(number: int, arrival: Arrival, reply: Reply, study_id: str = "") -> Outcome:
    """What one reply means. An answer is 200 or 201 with a report that is complete or partial."""
    body: Any = {}
    with contextlib.suppress(ValueError):
        body = json.loads(reply.body)
    if not isinstance(body, dict):
        body = {}
    error = body.get("error")
    latency_ms = (reply.ended_s - reply.sent_s) * 1e3
    answered = reply.status in (200, 201) and body.get("status") in ("complete", "partial")
    code = str(error.get("code", "")) if isinstance(error, dict) else ""
    refused = reply.status in REFUSES and code in DOOR_CODES and body.get("admitted") is not True
    if reply.status == 0:
        code = reply.why
    return Outcome(
        number=number,
        offered_s=arrival.offered_s,
        lateness_ms=(reply.sent_s - reply.scheduled_s) * 1e3,
        deadline_ms=arrival.deadline_ms,
        status=reply.status,
        code=code,
        rung=str(body.get("rung") or "") if answered else "",
        shed=" ".join(str(s) for s in body.get("shed") or ()) if answered else "",
        latency_ms=latency_ms,
        on_time=answered and latency_ms <= arrival.deadline_ms,
        admitted=not refused,
        refusal_ms=latency_ms if refused else None,
        ended_s=reply.ended_s,
        replies=reply.replies,
        study_id=str(body.get("id") or study_id),
    )


class _Exchange(asyncio.Protocol):
    """One request on one connection. The answer ends where its length says; what comes after it is counted, not ignored."""

    def __init__(self, content: bytes, clock: Callable[[], float]) -> None:
        self._content, self._clock = content, clock
        self._buffer = bytearray()
        self._need: int | None = None  # bytes of head and body, once known
        self._chunked = False
        self.ended_s: float | None = None
        self.done = asyncio.get_running_loop().create_future()
        self.closed = asyncio.get_running_loop().create_future()
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        transport.write(self._content)
        self._content = b""

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        if self.ended_s is None and self._whole(closed=False):
            self._end()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio's own signature
        if self.ended_s is None and self._whole(closed=True):
            self._end()
        for waiter in (self.done, self.closed):
            if not waiter.done():
                waiter.set_result(None)

    def _end(self) -> None:
        self.ended_s = self._clock()
        if not self.done.done():
            self.done.set_result(None)

    def _whole(self, closed: bool) -> bool:
        if self._need is None and not self._chunked:
            at = self._buffer.find(b"\r\n\r\n")
            if at < 0:
                return False
            headers = parse_head(bytes(self._buffer[: at + 4]))[1]
            if "content-length" in headers:
                self._need = at + 4 + int(headers["content-length"])
            elif "chunked" in headers.get("transfer-encoding", "").lower():
                self._chunked = True
            else:
                return closed
        if self._chunked:
            return self._buffer.endswith(b"\r\n0\r\n\r\n")
        return self._need is not None and len(self._buffer) >= self._need

    def reply(self) -> tuple[int, dict[str, str], bytes, int]:
        """(status, headers, body, answers on this connection); status 0 where no whole answer came."""
        if self.ended_s is None:
            return 0, {}, b"", 0
        at = self._buffer.find(b"\r\n\r\n") + 4
        status, headers = parse_head(bytes(self._buffer[:at]))
        body = bytes(self._buffer[at : self._need])
        if self._chunked:
            body = _unchunked(body)
        more = self._need is not None and b"HTTP/1." in self._buffer[self._need :]
        return status, headers, body, 2 if more else 1


def parse_head(head: bytes) -> tuple[int, dict[str, str]]:
    """(status, headers by lower-case name) of an answer's head; status 0 where it is no HTTP."""
    lines = head.decode("latin-1").split("\r\n")
    parts = lines[0].split(" ", 2)
    status = int(parts[1]) if len(parts) > 1 and parts[0].startswith("HTTP/1.") and parts[1].isdigit() else 0
    found = (line.partition(":") for line in lines[1:] if ":" in line)
    return status, {name.strip().lower(): value.strip() for name, _, value in found}


def _unchunked(body: bytes) -> bytes:
    out, at = bytearray(), 0
    while True:
        end = body.index(b"\r\n", at)
        size = int(body[at:end].split(b";")[0], 16)
        if size == 0:
            return bytes(out)
        out += body[end + 2 : end + 2 + size]
        at = end + 2 + size + 2


# -- sending ------------------------------------------------------------------------------------------------------------


def _encode(request: Request, host: str, port: int) -> bytes:
    head = [f"POST {request.path} HTTP/1.1", f"Host: {host}:{port}", "Connection: close", f"Content-Length: {len(request.body)}"]
    head += [f"{name}: {value}" for name, value in request.headers.items()]
    return ("\r\n".join(head) + "\r\n\r\n").encode("latin-1") + request.body


async def _exchange(host: str, port: int, content: bytes, scheduled_s: float, allowed_s: float) -> Reply:
    loop = asyncio.get_running_loop()
    sent_s = loop.time()
    until = sent_s + allowed_s
    exchange: _Exchange | None = None
    why = ""
    try:
        async with asyncio.timeout_at(until):
            _, exchange = await loop.create_connection(lambda: _Exchange(content, loop.time), host, port)
            await exchange.done
            if exchange.ended_s is not None:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(asyncio.shield(exchange.closed), LINGER_S)
    except TimeoutError:
        why = "no answer"
    except OSError as error:
        why = f"{type(error).__name__}"
    if exchange is None:
        return Reply(0, {}, b"", scheduled_s, sent_s, loop.time(), 0, why)
    if exchange.transport is not None:
        exchange.transport.abort()
    status, headers, body, replies = exchange.reply()
    if status:
        assert exchange.ended_s is not None
        return Reply(status, headers, body, scheduled_s, sent_s, exchange.ended_s, replies)
    return Reply(0, {}, b"", scheduled_s, sent_s, loop.time(), 0, why or "closed without an answer")


async def _offer(
    host: str,
    port: int,
    schedule: Sequence[Arrival],
    make: Callable[[Arrival], Request],
    patience_s: float,
    told: Callable[[Reply, Arrival], None] | None,
    stop: threading.Event | None,
) -> tuple[list[tuple[Arrival, Reply, str]], float]:
    loop = asyncio.get_running_loop()
    tasks: list[asyncio.Task[tuple[Arrival, Reply, str]]] = []

    async def one(arrival: Arrival, scheduled_s: float, content: bytes, study_id: str) -> tuple[Arrival, Reply, str]:
        reply = await _exchange(host, port, content, scheduled_s, arrival.deadline_ms / 1e3 + patience_s)
        if told is not None:
            told(reply, arrival)
        return arrival, reply, study_id

    # Made ahead, so that neither a burst nor the answers to it wait for the copies of the next; what does not fit is made between.
    ready: list[tuple[bytes, str]] = []

    def prepare(index: int) -> None:
        request = make(schedule[index])
        ready.append((_encode(request, host, port), request.study_id))

    size = 0
    while len(ready) < len(schedule) and size < AHEAD_BYTES:
        prepare(len(ready))
        size += len(ready[-1][0])
    ahead = made = len(ready)
    start_s = loop.time() + 0.2
    for index, arrival in enumerate(schedule):
        due_s = start_s + arrival.offered_s
        if stop is not None and stop.is_set():
            break
        while made < min(index + ahead, len(schedule)) and due_s - loop.time() > 0.005:
            prepare(made)
            made += 1
            await asyncio.sleep(0)
        if (wait_s := due_s - loop.time()) > 0:
            await asyncio.sleep(wait_s)
        if made <= index:
            prepare(index)
            made += 1
        content, study_id = ready[index]
        ready[index] = (b"", "")
        tasks.append(loop.create_task(one(arrival, due_s, content, study_id)))
    return list(await asyncio.gather(*tasks)), start_s


@contextlib.contextmanager
def _undisturbed() -> Any:
    """No garbage collection, other threads of this process kept short (a progress bar may hold the interpreter for 5 ms at a time), and a
    higher priority where that is allowed: a client is another machine, not a rival for these cores."""
    before, interval_s = os.getpriority(os.PRIO_PROCESS, 0), sys.getswitchinterval()
    sys.setswitchinterval(0.0005)
    with contextlib.suppress(PermissionError):
        os.setpriority(os.PRIO_PROCESS, 0, min(before, -10))
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()
        sys.setswitchinterval(interval_s)
        with contextlib.suppress(PermissionError):
            os.setpriority(os.PRIO_PROCESS, 0, before)


def offer(
    host: str,
    port: int,
    schedule: Sequence[Arrival],
    make: Callable[[Arrival], Request],
    *,
    patience_s: float = PATIENCE_S,
    told: Callable[[Reply, Arrival], None] | None = None,
    stop: threading.Event | None = None,
) -> list[Outcome]:
    """Send every arrival of `schedule` on time and wait for what comes of each, at most its deadline and `patience_s`.

    `make` gives the request of an arrival; `told` hears each reply as it ends, on the sender's thread, and must be quick. Setting
    `stop` ends the offering early. One Outcome per request that was sent, in their order; `ended_s` counts from the start.
    """
    with _undisturbed():
        found, start_s = asyncio.run(_offer(host, port, schedule, make, patience_s, told, stop))
    out = []
    for number, (arrival, reply, study_id) in enumerate(found):
        row = outcome(number, arrival, reply, study_id)
        out.append(Outcome(**{**asdict(row), "ended_s": reply.ended_s - start_s}))
    return out


def closed_loop(host: str, port: int, make: Callable[[Arrival], Request], count: int, warm: int = 3) -> list[float]:
    """Milliseconds of `count` answers to one client that sends the next request when it holds the answer; `warm` more before them.

    Raises RuntimeError for anything but an answer at the full rung: a capacity of refusals is none.
    """
    times = []
    for number in range(warm + count):
        (row,) = offer(host, port, [Arrival(0.0, AMPLE_MS)], make)
        if not row.on_time or row.rung not in ("", "full"):
            raise RuntimeError(f"one client alone was answered with status {row.status}, code {row.code!r}, rung {row.rung!r}")
        if number >= warm:
            times.append(row.latency_ms)
    return times


# -- sums ---------------------------------------------------------------------------------------------------------------


def _percentiles(values: Iterable[float], *of: float) -> list[float | None]:
    found = list(values)
    return [round(float(v), 2) for v in np.percentile(found, of)] if found else [None] * len(of)


def summarise(rows: Sequence[Outcome]) -> dict[str, Any]:
    """Shares and percentiles of one run; shares are of what was offered but for those that say otherwise. None where there is no
    such request. `on_time_share_from_schedule` charges the sender's own lateness to the system as well."""
    offered = len(rows)
    if not offered:
        raise ValueError("nothing was offered")
    admitted = [r for r in rows if r.admitted]
    refused = [r for r in rows if not r.admitted]
    answered = [r for r in rows if r.status in (200, 201) and r.replies]
    late = sum(not r.on_time for r in admitted)
    refusal_p50, refusal_p99 = _percentiles((r.refusal_ms for r in refused if r.refusal_ms is not None), 50, 99)
    latency_p50, latency_p99 = _percentiles((r.latency_ms for r in answered), 50, 99)
    lateness_p50, lateness_p99 = _percentiles((r.lateness_ms for r in rows), 50, 99)
    rungs = Counter(r.rung or "unnamed" for r in answered)
    return {
        "offered": offered,
        "on_time": sum(r.on_time for r in rows),
        "on_time_share": sum(r.on_time for r in rows) / offered,
        "on_time_share_from_schedule": sum(r.on_time and r.latency_ms + r.lateness_ms <= r.deadline_ms for r in rows) / offered,
        "admitted": len(admitted),
        "late_among_admitted": late,
        "late_share_of_admitted": late / len(admitted) if admitted else None,
        "refused": len(refused),
        "refusal_ms_p50": refusal_p50,
        "refusal_ms_p99": refusal_p99,
        "refusals_slow": sum((r.refusal_ms or 0) > SLOW_REFUSAL_MS for r in refused),
        "unanswered": sum(r.status == 0 for r in rows),
        "failed": sum(r.admitted and r.status not in (0, 200, 201) for r in rows),
        "latency_ms_p50": latency_p50,
        "latency_ms_p99": latency_p99,
        "rungs": dict(sorted(rungs.items())),
        "statuses": {str(k): v for k, v in sorted(Counter(r.status for r in rows).items())},
        "codes": dict(sorted(Counter(r.code for r in rows if r.code).items())),
        "sender_lateness_ms_p50": lateness_p50,
        "sender_lateness_ms_p99": lateness_p99,
        "sender_on_schedule": lateness_p99 is not None and lateness_p99 <= LATE_SENDER_MS,
    }


def account(rows: Sequence[Outcome], journal: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Was every request answered once, or refused with a code? `journal`: study id -> the status of each of its entries.

    lost: sent, and neither an answer nor a refusal with a code came back. doubled: more than one answer on a connection, one study
    answered to two requests, or more than one entry in the journal. unkept: answered, but the journal has no answer of it.
    unheard: the journal has an answer that its client never got, because it gave up or was told that it failed.
    """
    answered = [r for r in rows if r.status in (200, 201)]
    coded = [r for r in rows if r.status not in (0, 200, 201) and r.code]
    lost = [r for r in rows if r.status == 0 or (r.status not in (200, 201) and not r.code)]
    times = Counter(r.study_id for r in answered)
    twice = {r.number for r in rows if r.replies > 1} | {r.number for r in answered if times[r.study_id] > 1}
    entries = {i for i, kept in journal.items() if len(kept) > 1}
    full = {i for i, kept in journal.items() if any(s in ("complete", "partial") for s in kept)}
    heard = {r.study_id for r in answered}
    return {
        "sent": len(rows),
        "answered": len(answered),
        "refused_with_code": len(coded),
        "lost": len(lost),
        "lost_numbers": [r.number for r in lost][:50],
        "doubled": len(twice) + len(entries),
        "unkept": len(heard - full),
        "unheard": len(({r.study_id for r in rows} - heard) & full),
        "journal": len(journal),
    }


COLUMNS = ("system", "load", "pattern", "repetition", *(f.name for f in fields(Outcome)))


def write_rows(path: Path, runs: Iterable[tuple[Mapping[str, Any], Sequence[Outcome]]]) -> int:
    """One CSV row per request; `runs` gives the tags (system, load, pattern, repetition) of each run. Returns how many."""
    count = 0
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as f:
        out = csv.DictWriter(f, COLUMNS)
        out.writeheader()
        for tags, rows in runs:
            for row in rows:
                out.writerow({**tags, **{k: _cell(v) for k, v in asdict(row).items()}})
                count += 1
    return count


def _cell(value: Any) -> Any:
    if value is None:
        return ""
    if isinstance(value, bool):
        return int(value)
    return f"{value:.3f}" if isinstance(value, float) else value


def read_rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as f:
        return list(csv.DictReader(f))
