"""The load benchmarks: schedules, a sender that never waits, sums that lose nothing, exactly-once accounting, and what a slope is.

Against a double of the appliance on the loopback: small, scripted, and with a "worker" process that can be killed.
"""

from __future__ import annotations

import csv
import http.server
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import psutil
import pytest

from appliance import study
from appliance.errors import UsageError
from benchmarks import chaos, load, openloop, overhead, soak, watch
from benchmarks.arrivals import DEADLINES_MS, PATTERNS, Arrival, bursts, poisson
from benchmarks.openloop import Outcome, Pool, Reply, Request, account, closed_loop, offer, outcome, summarise
from benchmarks.peers import environments, served, work
from benchmarks.peers.served import SYSTEMS, Served

# -- arrivals -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", list(PATTERNS))
def test_schedules_have_their_rate_order_and_deadlines(pattern: str) -> None:
    schedule = PATTERNS[pattern](20.0, 500.0, 3)
    times = np.array([a.offered_s for a in schedule])
    deadlines = np.array([a.deadline_ms for a in schedule])
    assert abs(len(schedule) / 500 - 20) < (0.6 if pattern == "poisson" else 2.0)  # three standard deviations
    assert (np.diff(times) >= 0).all()
    assert times[0] >= 0
    assert times[-1] < 500
    low, high = DEADLINES_MS
    assert low <= deadlines.min() < low + 5
    assert high - 5 < deadlines.max() <= high
    assert abs(deadlines.mean() - (low + high) / 2) < 5
    assert schedule == PATTERNS[pattern](20.0, 500.0, 3)
    assert schedule != PATTERNS[pattern](20.0, 500.0, 4)


def test_poisson_gaps_are_exponential() -> None:
    gaps = np.diff([a.offered_s for a in poisson(50.0, 400.0, 1)])
    assert abs(gaps.std() / gaps.mean() - 1) < 0.03  # an exponential's deviation is its mean; evenly spaced: 0
    assert abs((gaps > gaps.mean()).mean() - np.exp(-1)) < 0.01


def test_bursts_come_in_groups_of_five_to_ten() -> None:
    schedule = bursts(30.0, 300.0, 1)
    sizes = np.unique([a.offered_s for a in schedule], return_counts=True)[1]
    assert set(sizes) == {5, 6, 7, 8, 9, 10}
    assert len({a.deadline_ms for a in schedule}) == len(schedule)  # mixed within a group too


@pytest.mark.parametrize("bad", [(0.0, 10.0), (-1.0, 10.0), (float("nan"), 10.0), (10.0, 0.0), (10.0, float("inf")), (1e6, 1e6)])
def test_what_cannot_be_offered_is_refused(bad: tuple[float, float]) -> None:
    for pattern in PATTERNS.values():
        with pytest.raises(ValueError, match=r"offer|time|more than"):
            pattern(*bad, 1)


def test_deadlines_and_groups_are_checked() -> None:
    with pytest.raises(ValueError, match="deadlines"):
        poisson(1.0, 1.0, 1, (600.0, 200.0))
    with pytest.raises(ValueError, match="group"):
        bursts(1.0, 1.0, 1, group=(0, 3))


# -- studies ------------------------------------------------------------------------------------------------------------


def test_no_two_studies_of_a_pool_are_alike_and_all_can_be_read() -> None:
    pool = Pool(2, hw=(128, 128))
    studies = [pool.study() for _ in range(40)]
    assert len(set(studies)) == 40
    read = [study.read(data) for data in studies[:6]]
    assert len({i.source["sop_instance_uid"] for i in read}) == 6 if "sop_instance_uid" in read[0].source else True
    first, third = read[0], read[2]  # of the same picture
    assert first.pixels.shape == (128, 128)
    changed = first.pixels != third.pixels
    assert 0 < changed.sum() <= openloop.BITS
    assert np.abs(first.pixels - third.pixels).max() <= 1.0  # the lowest bit
    assert not changed[:-1].any()


def test_pools_of_two_runs_do_not_repeat_each_other() -> None:
    assert Pool(1, hw=(128, 128)).study() != Pool(1, hw=(128, 128)).study()


# -- outcomes -----------------------------------------------------------------------------------------------------------

REPORT = {"status": "complete", "rung": "full", "shed": [], "id": "a"}


def reply(status: int, body: Any, took_ms: float = 100.0, late_ms: float = 1.0, **more: Any) -> Reply:
    sent_s = 10.0 + late_ms / 1e3
    return Reply(status, {}, json.dumps(body).encode(), 10.0, sent_s, sent_s + took_ms / 1e3, **more)


@pytest.mark.parametrize(
    ("status", "body", "took_ms", "on_time", "admitted", "refused"),
    [
        (201, REPORT, 199.0, True, True, False),
        (200, REPORT, 201.0, False, True, False),
        (200, {**REPORT, "status": "partial", "rung": "detection-only", "shed": ["heatmap", "masks"]}, 50.0, True, True, False),
        (200, {**REPORT, "status": "refused"}, 50.0, False, True, False),  # no answer, whatever the status line says
        (503, {"error": {"code": "refused.out-of-time"}}, 5.0, False, False, True),
        (503, {"error": {"code": "backend.worker-lost"}}, 50.0, False, True, False),  # it was let in, and lost
        (503, {"error": {"code": "refused.out-of-time"}, "admitted": True}, 90.0, False, True, False),  # promised, and then not kept
        (503, {"error": {"code": "refused.out-of-time"}, "admitted": False}, 3.0, False, False, True),
        (504, {"error": {"code": "fifo.expired"}}, 400.0, False, True, False),
        (429, {"error": "Too many requests"}, 2.0, False, False, True),
        (422, {"error": {"code": "refused.no-spine"}}, 90.0, False, True, False),
        (500, "no object", 9.0, False, True, False),
    ],
)
def test_what_a_reply_means(status: int, body: Any, took_ms: float, on_time: bool, admitted: bool, refused: bool) -> None:
    row = outcome(0, Arrival(0.0, 200.0), reply(status, body, took_ms))
    assert (row.on_time, row.admitted, row.refusal_ms is not None) == (on_time, admitted, refused)
    assert row.latency_ms == pytest.approx(took_ms)
    assert row.lateness_ms == pytest.approx(1.0)
    if row.on_time:
        assert row.rung == body["rung"]
        assert row.shed == " ".join(body["shed"])


def test_a_connection_that_gives_no_answer_is_no_answer() -> None:
    row = outcome(3, Arrival(0.5, 200.0), Reply(0, {}, b"", 1, 1, 2, 0, "ConnectionResetError"), "own")
    assert (row.status, row.on_time, row.admitted, row.code, row.study_id) == (0, False, True, "ConnectionResetError", "own")


def rows_of(*replies: Reply, deadline_ms: float = 200.0) -> list[Outcome]:
    return [outcome(i, Arrival(float(i), deadline_ms), r, f"s{i}") for i, r in enumerate(replies)]


def test_sums_of_a_run() -> None:
    full = {"error": {"code": "refused.out-of-time"}}
    rows = rows_of(
        reply(201, {**REPORT, "id": "a"}, 100),
        reply(201, {**REPORT, "id": "b", "rung": "detection-only"}, 150),
        reply(201, {**REPORT, "id": "c"}, 300),
        reply(503, full, 4),
        reply(503, full, 6),
        reply(503, full, 80),
        Reply(0, {}, b"", 0, 0, 1, 0, "no answer"),
        reply(500, {"error": {"code": "backend.failed"}}, 30),
        reply(201, {**REPORT, "id": "d"}, 199.5, late_ms=7),
        reply(201, {**REPORT, "id": "e"}, 20),
    )
    found = summarise(rows)
    assert (found["offered"], found["on_time"], found["admitted"], found["refused"]) == (10, 4, 7, 3)
    assert found["on_time_share"] == pytest.approx(0.4)
    assert found["on_time_share_from_schedule"] == pytest.approx(0.3)  # the sender's 7 ms cost one of them its deadline
    assert (found["late_among_admitted"], found["unanswered"], found["failed"]) == (3, 1, 1)
    assert found["late_share_of_admitted"] == pytest.approx(3 / 7)
    assert found["refusal_ms_p50"] == pytest.approx(6)
    assert found["refusals_slow"] == 1
    assert found["rungs"] == {"detection-only": 1, "full": 4}
    assert found["codes"] == {"backend.failed": 1, "no answer": 1, "refused.out-of-time": 3}
    assert found["sender_on_schedule"] is False
    assert summarise(rows_of(reply(201, REPORT)))["sender_on_schedule"] is True
    nothing = summarise(rows_of(reply(503, full)))
    assert (nothing["late_share_of_admitted"], nothing["latency_ms_p50"]) == (None, None)
    with pytest.raises(ValueError, match="nothing"):
        summarise([])


def test_rows_survive_their_file(tmp_path: Path) -> None:
    rows = rows_of(reply(201, {**REPORT, "shed": ["heatmap", "masks"]}, 99.5), reply(503, {"error": {"code": "refused.out-of-time"}}, 4))
    tags = {"system": "spinebox", "load": 2.0, "pattern": "poisson", "repetition": 1}
    assert openloop.write_rows(tmp_path / "sub/rows.csv", [(tags, rows)]) == 2
    first, second = openloop.read_rows(tmp_path / "sub/rows.csv")
    assert (first["system"], first["rung"], first["shed"], first["on_time"], first["latency_ms"]) == (
        "spinebox", "full", "heatmap masks", "1", "99.500",
    )  # fmt: skip
    assert (second["status"], second["on_time"], second["admitted"], second["refusal_ms"]) == ("503", "0", "0", "4.000")
    assert first["refusal_ms"] == ""


# -- exactly once -------------------------------------------------------------------------------------------------------


def answered(name: str, **more: Any) -> Reply:
    return reply(201, {**REPORT, "id": name}, **more)


def test_accounts_where_all_is_well() -> None:
    rows = rows_of(answered("a"), answered("b"), reply(503, {"error": {"code": "refused.out-of-time"}}))
    found = account(rows, {"a": ["complete"], "b": ["partial"], "s2": ["refused"], "earlier": ["complete"]})
    assert (found["sent"], found["answered"], found["refused_with_code"]) == (3, 2, 1)
    assert (found["lost"], found["doubled"], found["unkept"], found["unheard"]) == (0, 0, 0, 0)


@pytest.mark.parametrize(
    ("replies", "journal", "what"),
    [
        ([answered("a"), Reply(0, {}, b"", 0, 0, 1, 0, "no answer")], {"a": ["complete"]}, {"lost": 1}),
        ([answered("a"), reply(500, "a page of HTML")], {"a": ["complete"]}, {"lost": 1}),  # refused, but without a code
        ([answered("a", replies=2)], {"a": ["complete"]}, {"doubled": 1}),
        ([answered("a"), answered("a")], {"a": ["complete"]}, {"doubled": 2}),
        ([answered("a")], {"a": ["complete", "complete"]}, {"doubled": 1}),
        ([answered("a")], {}, {"unkept": 1}),
        ([answered("a")], {"a": ["refused"]}, {"unkept": 1}),
        ([Reply(0, {}, b"", 0, 0, 1, 0, "no answer")], {"s0": ["complete"]}, {"lost": 1, "unheard": 1}),
    ],
)
def test_accounts_where_something_is_wrong(replies: list[Reply], journal: dict[str, list[str]], what: dict[str, int]) -> None:
    found = account(rows_of(*replies), journal)
    assert {k: found[k] for k in ("lost", "doubled", "unkept", "unheard") if found[k]} == what


def test_an_outage_ends_with_an_answer_to_somebody_who_asked_after_the_kill() -> None:
    def at(number: int, sent_s: float, ended_s: float, on_time: bool = True) -> Outcome:
        row = outcome(
            number, Arrival(sent_s, 10_000 if on_time else 1), reply(201, {**REPORT, "id": str(number)}, (ended_s - sent_s) * 1e3, 0)
        )
        return Outcome(**{**vars(row), "ended_s": ended_s})

    rows = [at(0, 1.0, 2.1), at(1, 2.2, 2.6, on_time=False), at(2, 2.3, 3.4), at(3, 5.0, 5.2)]
    first, last = chaos.outages([chaos.Kill(2.0, 7, "SIGKILL", 0.5), chaos.Kill(6.0, 8, "SIGSTOP", None)], rows)
    assert (first["any_s"], first["sent_after_s"]) == (pytest.approx(0.1), pytest.approx(1.4))
    assert (last["any_s"], last["sent_after_s"]) == (None, None)
    found = chaos.sums([chaos.Kill(2.0, 7, "SIGKILL", 0.5)], rows, {str(i): ["complete"] for i in range(4)})
    assert (found["outage_s"]["most"], found["outage_s"]["over_2_s"], found["by"]) == (pytest.approx(1.4), 0, {"SIGKILL": 1})
    assert chaos.verdict({**found, "stopped_early": ""}) == []
    never = chaos.sums([chaos.Kill(6.0, 7, "SIGKILL", 0.5)], rows, {str(i): ["complete"] for i in range(4)})
    assert never["outage_s"]["most"] is None
    assert "outage" in chaos.verdict({**never, "stopped_early": ""})[0]


# -- against a double on the loopback -----------------------------------------------------------------------------------


class Double(http.server.ThreadingHTTPServer):
    """Answers studies after `delay_s`, or as `script` says; its worker is a process that sleeps, and is replaced when it is dead."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.delay_s = 0.0
        self.script: list[Any] = []
        self.kept: dict[str, str] = {}
        self.headers_seen: list[Any] = []
        self.lock = threading.Lock()
        self.worker: subprocess.Popen[bytes] | None = None
        self.tells_worker = True

    def alive(self) -> int:
        with self.lock:
            if self.worker is None or self.worker.poll() is not None or psutil.Process(self.worker.pid).status() == psutil.STATUS_STOPPED:
                if self.worker is not None:
                    self.worker.kill()
                    self.worker.wait()
                self.worker = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"])
            return self.worker.pid


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Double
    quiet: ClassVar[bool] = True

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        pass

    def send(self, status: int, body: Any) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_POST(self) -> None:
        data = self.rfile.read(int(self.headers["Content-Length"]))
        with self.server.lock:
            self.server.headers_seen.append(self.headers)
            what = self.server.script.pop(0) if self.server.script else None
        time.sleep(self.server.delay_s)
        name = chaos.study_id_of(data)
        if what == "reset":
            self.close_connection = True
            return
        if what == "chunked":
            content = json.dumps({**REPORT, "id": name}).encode()
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            for part in (content[:7], content[7:], b""):
                self.wfile.write(f"{len(part):x}\r\n".encode() + part + b"\r\n")
            return
        if isinstance(what, int):
            self.send(what, {"error": {"code": "refused.out-of-time"}})
            return
        with self.server.lock:
            self.server.kept[name] = "complete"
        self.send(201, {**REPORT, "id": name})
        if what == "twice":
            self.send(201, {**REPORT, "id": name})

    def do_GET(self) -> None:
        if self.path == "/readyz":
            engine = {"worker": {"pid": self.server.alive(), "standby": None}} if self.server.tells_worker else {}
            self.send(200, {"ready": True, "engine": engine})
        else:
            query = dict(p.split("=") for p in self.path.partition("?")[2].split("&"))
            with self.server.lock:
                studies = [{"id": k, "status": v} for k, v in self.server.kept.items()]
            first = int(query["offset"])
            self.send(200, {"total": len(studies), "studies": studies[first : first + int(query["limit"])]})


@pytest.fixture
def double() -> Iterator[Double]:
    server = Double()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join(5)
    if server.worker is not None:
        server.worker.kill()
        server.worker.wait()


class Beside(Served):
    """A Served around the double: its process is this one."""

    def __init__(self, double: Double) -> None:
        super().__init__("spinebox", peers=Path("nowhere"))
        self.port = double.server_address[1]

    @property
    def process(self) -> psutil.Process:
        return psutil.Process()


def simple(arrival: Arrival) -> Request:
    return Request("/api/studies", {"Content-Type": "application/dicom", **served.budget(arrival.deadline_ms)}, f"{arrival}".encode())


def test_the_sender_does_not_wait_for_answers(double: Double) -> None:
    double.delay_s = 0.3
    schedule = [Arrival(0.01 * i, 5_000.0) for i in range(20)]
    began = time.monotonic()
    rows = offer("127.0.0.1", double.server_address[1], schedule, simple)
    assert time.monotonic() - began < 2.0  # one after the other they would take 6 s
    assert [r.status for r in rows] == [201] * 20
    assert all(r.on_time and r.latency_ms >= 300 for r in rows)
    assert max(r.lateness_ms for r in rows) < 150  # the double shares this process; the sender's own figure is the point
    assert [r.offered_s for r in rows] == [a.offered_s for a in schedule]
    assert rows[-1].ended_s > rows[-1].offered_s
    seen = double.headers_seen[0]
    assert (seen["X-Latency-Budget-Ms"], seen["Connection"]) == ("5000.000", "close")


def test_answers_refusals_and_broken_connections_are_told_apart(double: Double) -> None:
    double.script = [None, 503, "reset", "chunked", "twice"]
    rows = [offer("127.0.0.1", double.server_address[1], [Arrival(0.0, 1_000.0)], simple)[0] for _ in range(5)]
    assert [r.status for r in rows] == [201, 503, 0, 200, 201]
    assert [r.replies for r in rows] == [1, 1, 0, 1, 2]
    assert rows[1].code == "refused.out-of-time"
    assert rows[1].refusal_ms is not None
    assert rows[3].rung == "full"
    assert account(rows[4:], {rows[4].study_id: ["complete"]})["doubled"] == 1


def test_a_client_gives_up_and_nobody_there_is_no_answer(double: Double) -> None:
    double.delay_s = 2.0
    (row,) = offer("127.0.0.1", double.server_address[1], [Arrival(0.0, 100.0)], simple, patience_s=0.1)
    assert (row.status, row.code, row.on_time) == (0, "no answer", False)
    assert row.latency_ms < 1_000
    (row,) = offer("127.0.0.1", served.free_port(), [Arrival(0.0, 100.0)], simple)
    assert (row.status, row.code) == (0, "ConnectionRefusedError")


def test_offering_can_be_ended_early(double: Double) -> None:
    stop = threading.Event()
    rows = offer(
        "127.0.0.1", double.server_address[1], [Arrival(0.1 * i, 500.0) for i in range(100)], simple, stop=stop, told=lambda *_: stop.set()
    )
    assert 1 <= len(rows) < 10


def test_capacity_is_of_full_answers_only(double: Double) -> None:
    double.delay_s = 0.02
    times = closed_loop("127.0.0.1", double.server_address[1], simple, 4, warm=1)
    assert len(times) == 4
    assert min(times) >= 20
    double.script = [503]
    with pytest.raises(RuntimeError, match="503"):
        closed_loop("127.0.0.1", double.server_address[1], simple, 2)


def test_one_run_of_a_load(double: Double) -> None:
    pool = Pool(1, hw=(96, 96))
    alone = load.capacity(Beside(double), pool, 3)
    assert alone["per_s"] == pytest.approx(1e3 / alone["mean_ms"], rel=1e-2)
    load.drain(Beside(double), pool, 1000.0)
    run = load.load_once(Beside(double), pool, 2.0, "bursts", 40.0, 1.0, 1)
    found = run.to_json()
    assert found["offered"] == len(run.rows) == len({r.study_id for r in run.rows})
    assert found["on_time_share"] > 0.5
    assert found["cpu_cores"] >= 0


def test_workers_are_killed_and_every_request_is_accounted_for(double: Double) -> None:
    target, done = Beside(double), threading.Event()
    killer = chaos.Killer(target, 3, 0.1, 0.5, done, lambda: None, seed=1)
    killer.began_s = time.monotonic()
    killer.thread.start()
    rows = offer(
        target.host, target.port, [Arrival(0.02 * i, 2_000.0) for i in range(400)], chaos.maker(target, Pool(1, hw=(96, 96))), stop=done
    )
    killer.thread.join(10)
    assert killer.failure == ""
    assert len(killer.kills) == len({k.pid for k in killer.kills}) == 3
    assert {k.how for k in killer.kills} == {"SIGKILL", "SIGSTOP"}  # by this seed
    assert all(k.replaced_s is not None for k in killer.kills)
    kept = chaos.journal(target)
    found = account(rows, kept)
    assert found["answered"] == found["journal"] == len(rows) > 0
    assert (found["lost"], found["doubled"], found["unkept"]) == (0, 0, 0)


def test_a_long_journal_is_read_page_by_page(double: Double) -> None:
    double.kept = {f"s{i}": "complete" for i in range(2 * chaos.PAGE + 7)}
    assert len(chaos.journal(Beside(double))) == 2 * chaos.PAGE + 7


def test_a_daemon_that_does_not_name_its_worker_is_refused(double: Double) -> None:
    assert watch.workers(Beside(double)).pid == double.alive()
    double.tells_worker = False
    with pytest.raises(UsageError, match="which process owns its engines"):
        watch.workers(Beside(double))


# -- watching -----------------------------------------------------------------------------------------------------------


def test_a_watch_keeps_what_it_saw(double: Double, tmp_path: Path) -> None:
    path = tmp_path / "sub/watch.csv"
    with watch.Watch(Beside(double), 0.05, path, segment=2, since_s=100.0) as seen:
        until = time.monotonic() + 10
        while len(seen.rows) < 3 and time.monotonic() < until:
            time.sleep(0.05)
    assert len(seen.rows) >= 3
    assert watch.read(path) == seen.rows
    row = seen.rows[0]
    assert row.at_s >= 100
    assert row.segment == 2
    assert row.daemon_mb > 10
    assert row.worker_mb > 0
    assert row.daemon_fds > 3
    with path.open("a") as f:
        f.write("101.0,2,12")  # whoever measured was killed in the middle of a line
    assert watch.read(path) == seen.rows


def test_a_slope_is_told_from_noise() -> None:
    rng = np.random.default_rng(1)
    at = np.arange(0, 3600, 5.0)
    flat, growing = 300 + rng.normal(0, 2, len(at)), 300 + at / 3600 * 6 + rng.normal(0, 2, len(at))
    growing[: len(at) // 12] -= 40  # caches that fill at the start are no leak
    still = watch.slope(at, flat)
    leak = watch.slope(at, growing)
    assert still is not None
    assert leak is not None
    assert still["low"] < 0 < still["high"]
    assert not still["grows"]
    assert leak["grows"]
    assert leak["low"] < 6 < leak["high"]
    assert leak["high"] - leak["low"] < 3
    assert watch.slope(at[:10], flat[:10]) is None


def test_memory_is_of_the_longest_segment() -> None:
    def row(at_s: float, segment: int, mb: float) -> watch.Row:
        return watch.Row(at_s, segment, mb, 200.0, 50.0, 30, 12, 4, 1.0, 61.5 if at_s == 3 else None, 7)

    rows = [row(float(i), 0, 100.0 + i) for i in range(30)] + [row(30.0 + i, 1, 100.0) for i in range(60)]
    found = watch.memory(rows)
    assert found["samples"] == 60
    assert found["daemon_mb"]["per_hour"] == 0
    assert found["hottest_c"] is None
    assert watch.memory([]) == {}


def test_thermal_zones(tmp_path: Path) -> None:
    assert watch.temperature_c(tmp_path) is None
    for number, text in enumerate(("45500\n", "61000\n", "broken\n")):
        (tmp_path / f"thermal_zone{number}").mkdir()
        (tmp_path / f"thermal_zone{number}/temp").write_text(text)
    assert watch.temperature_c(tmp_path) == 61.0


def test_slices_of_a_soak_add_up(tmp_path: Path) -> None:
    path = tmp_path / "soak-load.csv"
    with path.open("w", newline="") as f:
        out = csv.DictWriter(f, soak.SLICE_COLUMNS)
        out.writeheader()
        for i in range(3):
            numbers = {"offered": 100, "on_time": 98, "admitted": 99, "late_among_admitted": 1, "refused": 1, "unanswered": 0, "failed": 0}
            out.writerow(
                {
                    **numbers,
                    "at_s": i * 60,
                    "segment": 0,
                    "seconds": 60.0,
                    "latency_ms_p99": 100 + i,
                    "refusal_ms_p99": "",
                    "disk_free_gb": 9,
                }
            )
        f.write("180,0,60.0,100")
    found = soak.totals(soak.slices_of(path))
    assert (found["offered"], found["late_among_admitted"], found["minutes"]) == (300, 3, 3.0)
    assert found["late_share_of_admitted"] == pytest.approx(3 / 297)
    assert (found["latency_ms_p99_worst_slice"], found["refusal_ms_p99_worst_slice"]) == (102.0, None)
    assert soak.totals([])["on_time_share"] is None


# -- tables, pictures, peers --------------------------------------------------------------------------------------------


def run_of(system: str, load_: float, repetition: int, on_time: int, of: int = 10) -> load.Run:
    ok, late = answered("x", took_ms=100.0), reply(503, {"error": {"code": "refused.out-of-time"}}, 5.0)
    return load.Run(system, load_, "poisson", repetition, 7.0, tuple(rows_of(*[ok] * on_time, *[late] * (of - on_time))), 0.5, 2.0)


def test_repetitions_become_a_median_with_its_spread(tmp_path: Path) -> None:
    runs = [run_of("spinebox", 2.0, i, n) for i, n in enumerate((9, 7, 10))] + [run_of("fifo", 2.0, i, n) for i, n in enumerate((4, 5, 2))]
    table = load.table([r.to_json() for r in runs])
    assert [r["system"] for r in table] == ["spinebox", "fifo"]
    assert table[0]["on_time_share"] == pytest.approx([0.9, 0.7, 1.0])
    assert (table[0]["offered"], table[0]["on_time"], table[0]["refused"], table[0]["repetitions"]) == (30, 26, 4, 3)
    assert table[0]["rungs"] == {"full": 26}
    openloop.write_rows(tmp_path / "load.csv", ((r.tags, r.rows) for r in runs))
    load.picture({"table": table}, openloop.read_rows(tmp_path / "load.csv"), tmp_path / "load.png")
    assert (tmp_path / "load.png").stat().st_size > 10_000


class Tuned(Beside):
    """The double as the first-in-first-out server: refuses everything unless its limit is 3."""

    def __init__(self, double: Double, options: Any) -> None:
        super().__init__(double)
        self._refuses = options[1] != "3"
        self._double = double

    def __enter__(self) -> Tuned:
        self._double.script = [None] * 2 + [503] * 1000 if self._refuses else []
        return self

    def __exit__(self, *_: object) -> None:
        self._double.script = []


def test_the_peer_is_tuned_to_its_best(double: Double, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "LIMITS", (1, 3))
    monkeypatch.setattr(load, "WAITS_MS", (float("inf"), 150.0))
    found = load.tune_fifo(60.0, 0.3, Pool(1, hw=(96, 96)), lambda options: Tuned(double, options), lambda text: None)
    assert found["limit"] == 3
    assert {s["limit"] for s in found["sweep"]} == set(load.LIMITS)
    best = [s for s in found["sweep"] if s["limit"] == 3]
    assert len(best) == len(load.WAITS_MS)
    assert min(s["on_time_share"] for s in best) > max(s["on_time_share"] for s in found["sweep"] if s["limit"] != 3)


def test_schedules_are_the_same_for_all_systems_and_differ_between_runs() -> None:
    seeds = [load.schedule_seed(p, x, r) for p in PATTERNS for x in load.LOADS for r in range(1, 6)]
    assert len(set(seeds)) == len(seeds)


@pytest.mark.parametrize(
    "bad", [["--systems", "nobody"], ["--loads", "x"], ["--loads", "-1"], ["--patterns", "saw"], ["--reference", "bentoml"]]
)
def test_options_that_make_no_sense(bad: list[str]) -> None:
    with pytest.raises(SystemExit):
        load.arguments(bad)


def test_quick_gives_way_to_what_was_asked_for() -> None:
    args = load.arguments(["--quick", "--seconds", "3"])
    assert (args.seconds, args.repetitions, args.systems, args.loads) == (3.0, 1, ["null", "spinebox"], [0.7, 2.0])


def test_the_tail_and_what_serving_adds() -> None:
    rng = np.random.default_rng(1)
    bare = 20 + rng.exponential(1, 500)
    times = {"bare": list(bare), "spinebox": list(bare + 1.5), "litserve": list(bare + 5 + rng.exponential(6, 500)), "null": [2.0] * 500}
    found = overhead.sums(times)
    assert found["spinebox"]["over_bare_ms"] == pytest.approx(1.5)
    assert found["spinebox"]["tail_ms"] == pytest.approx(found["bare"]["tail_ms"])
    low, high = found["litserve"]["over_bare_ms_interval"]
    assert low < found["litserve"]["over_bare_ms"] < high
    assert "over_bare_ms" not in found["null"]
    assert list(overhead.goals(found).values()) == [True, True]
    slow = overhead.sums({**times, "spinebox": list(bare + 2.5 + rng.exponential(5, 500))})
    assert list(overhead.goals(slow).values()) == [False, False]
    assert overhead.goals({"spinebox": found["spinebox"]}) == {}


def test_contestants_are_asked_in_a_shuffled_order() -> None:
    asked: list[str] = []
    asks = {name: (lambda data, name=name: asked.append(name) or data) for name in "abc"}
    times = overhead.race(asks, [b"x"], 40, 1, lambda: None)
    rounds = [tuple(asked[i : i + 3]) for i in range(0, 120, 3)]
    assert {len(v) for v in times.values()} == {40}
    assert all(sorted(r) == ["a", "b", "c"] for r in rounds)
    assert len(set(rounds)) == 6


def test_a_contestant_that_does_not_do_the_work_is_found_out() -> None:
    right = np.arange(8, dtype=np.float32).tobytes()
    overhead.check({"fastapi": lambda data: right, "null": lambda data: b""}, b"", right)
    for wrong in (right[:-4], np.zeros(8, np.float32).tobytes()):
        with pytest.raises(UsageError, match="does not answer"):
            overhead.check({"fastapi": lambda data, wrong=wrong: wrong}, b"", right)


def test_deadlines_as_peers_read_them() -> None:
    assert work.until_s({"x-latency-budget-ms": "250.000"}, 10.0) == pytest.approx(10.25)
    assert work.until_s({}, 10.0) > 1000


def test_every_peer_has_pins_and_says_what_it_lacks() -> None:
    assert set(environments.names()) == {s.environment for s in SYSTEMS.values()} - {""}
    for name in environments.names():
        lines = [x for x in (environments.REQUIREMENTS / f"{name}.txt").read_text().splitlines() if x and not x.startswith("#")]
        assert lines
        assert all(x.count("==") == 1 for x in lines)
    assert all(s.lacks for s in SYSTEMS.values() if s.name != "spinebox")
    assert served.needs(["spinebox", "fifo", "fastapi"]) == ["fastapi"]
    with pytest.raises(UsageError, match="no such system"):
        served.needs(["triton"])
    with pytest.raises(UsageError, match="no such system"):
        Served("triton", peers=Path("nowhere"))


def test_an_environment_is_made_again_when_its_pins_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = environments.names()[0]
    assert not environments.ready(name, tmp_path)
    python = environments.python_of(name, tmp_path)
    python.parent.mkdir(parents=True)
    python.touch()
    (tmp_path / name / environments.STAMP).write_text(environments.wanted(name))
    assert environments.ensure(name, tmp_path) == python
    monkeypatch.setattr(environments, "EXTRAS", ("openvino",))
    assert not environments.ready(name, tmp_path)
    with pytest.raises(UsageError, match="no such peer"):
        environments.wanted("triton")


def test_the_null_system_is_served_and_leaves_nothing_behind(tmp_path: Path) -> None:
    pool = Pool(1, hw=(96, 96))
    with Served("null", peers=tmp_path) as target:
        process = target.process
        rows = offer(target.host, target.port, [Arrival(0.02 * i, 5_000.0) for i in range(10)], target.maker(pool))
        assert [r.on_time for r in rows] == [True] * 10
        assert target.sample().root_mb > 10
    assert not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def test_every_process_below_a_server_is_seen() -> None:
    inner = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-S', '-c', 'import time; time.sleep(30)']); time.sleep(30)"
    child = subprocess.Popen([sys.executable, "-S", "-c", inner])
    below: list[psutil.Process] = []
    try:
        until = time.monotonic() + 10
        while len(below) < 2 and time.monotonic() < until:
            time.sleep(0.02)
            below = [p for p in served.descendants(psutil.Process()) if p.pid == child.pid or child.pid in (q.pid for q in p.parents())]
        assert len(below) == 2
    finally:
        for process in below or [psutil.Process(child.pid)]:
            process.kill()
        child.wait()


def test_a_server_that_does_not_come_up_says_why(tmp_path: Path) -> None:
    with (
        pytest.raises(UsageError, match=r"does not come up.*no-such-option"),
        Served("spinebox", peers=tmp_path, options=("--no-such-option",)),
    ):
        pass


def test_every_command_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    for module in (load, chaos, soak, overhead):
        with pytest.raises(SystemExit) as ended:
            module.main(["--help"])
        assert ended.value.code == 0
        told = capsys.readouterr().out
        for word in ("--quick", "--json", "--out", "python -m benchmarks."):
            assert word in told
