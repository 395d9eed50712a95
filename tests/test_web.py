"""The HTTP interface, with a scripted double in place of the engine: what it answers is written here, never computed."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import types
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import cv2
import jsonschema
import numpy as np
import pytest
from pydicom.data import get_testdata_file

from appliance import kept, render, study
from appliance.budget import RUNGS, Budget
from appliance.errors import (
    BackendFailed,
    ColourImage,
    DiskFull,
    NotAnImage,
    OutOfTime,
    Quarantined,
    RequestGone,
    SpineNotFound,
    UsageError,
    error_from_json,
)
from appliance.journal import Journal, study_id_of
from appliance.report import DISCLAIMER, Finding, Heatmap, Mask, Measurement, Pfirrmann, Report
from appliance.web import Metrics, Server, WebSettings, create_app, door, finish_keeping, finish_pending
from appliance.web.server import MAX_HEADER_BYTES, Knock
from appliance.web.v2 import ModelInfo, TensorInfo
from tests.inprocess import InProcess

ROWS, COLUMNS = 96, 80


def png(value: int = 0) -> bytes:
    return cv2.imencode(".png", np.full((ROWS, COLUMNS), value, np.uint8))[1].tobytes()


def scripted_read(data: bytes):
    """A double of `study.read`: knows PNG, and three words that stand for files it refuses."""
    if data == b"colour":
        raise ColourImage("three channels where one is read", value="3")
    if not data.startswith(b"\x89PNG"):
        raise NotAnImage("neither DICOM nor PNG nor JPEG", value=data[:8])
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_GRAYSCALE)
    source = {"rows": pixels.shape[0], "columns": pixels.shape[1], "spacing_mm": [0.5, 0.5]}
    return types.SimpleNamespace(pixels=pixels.astype(np.float32), spacing_mm=(0.5, 0.5), sha256=study_id_of(data), source=source)


def scripted_report(instance, **changes) -> Report:
    rows, columns = instance.pixels.shape
    ramp = np.linspace(0, 1, rows * columns, dtype=np.float32).reshape(rows, columns)
    mask = np.zeros((rows, columns), np.uint8)
    mask[20:30, 20:40] = 2
    disc = Finding(
        "disc",
        0.93,
        (20.0, 20.0, 40.0, 30.0),
        1,
        level="L5/S1",
        pfirrmann=Pfirrmann(4, (0.02, 0.08, 0.2, 0.6, 0.1), (3, 4)),
        flags={"herniation": 0.7, "narrowing": 0.2, "bulging": 0.1},
        measurements=(Measurement("disc_height", 5.0, "mm"),),
        outline_px=((20.0, 20.0), (40.0, 20.0), (40.0, 30.0), (20.0, 30.0)),
    )
    unnamed = Finding("disc", 0.5, (20.0, 40.0, 40.0, 48.0), 2)
    vertebra = Finding("vertebra", 0.88, (18.0, 2.0, 42.0, 18.0), 1, level="L5")
    report = Report(
        status="complete",
        protocol="lumbar-mri-sagittal",
        source=instance.source,
        findings=(disc, unnamed, vertebra),
        heatmaps=(
            Heatmap("class-evidence", "head", "disc", ramp, model="detector"),
            Heatmap("cam", "features", "L5/S1 Pfirrmann 4", ramp[::-1], model="grader"),
            Heatmap("cam", "features", "disc 2 Pfirrmann", None, model="grader", reason="its sum does not equal the logit"),
        ),
        mask=Mask(mask),
        naming="Levels are counted upwards from the sacrum.",
        timing_ms={"engine_total": 1.0},
        engine={"backends": {"detector": "double"}, "precision": "int8", "threads": 1},
        bundle={"name": "double", "digest": "0" * 64, "spinebox": "0"},
    )
    return dataclasses.replace(report, **changes)


class ScriptedEngine:
    """A double of an entered engine: counts its runs and answers, waits or fails as the test says."""

    def __init__(self) -> None:
        self.runs = 0
        self.deadlines = []
        self.then = lambda instance, deadline: scripted_report(instance)

    def run(self, instance, deadline):
        self.runs += 1
        self.deadlines.append(deadline)
        return self.then(instance, deadline)


class ScriptedRender:
    """A double of `appliance.render` whose pictures say how they were asked for."""

    def base_png(self, instance, max_side=None):
        return cv2.imencode(".png", instance.pixels.astype(np.uint8))[1].tobytes()

    def overlay_png(self, instance, report, *, boxes=True, outlines=True, grades=True, measures=True, heatmap=0.5, max_side=None):
        sums = [None if h.values is None else round(float(h.values.mean()), 2) for h in report.heatmaps]
        area = None if report.mask is None else int((report.mask.values == 2).sum())
        return b"\x89PNG" + json.dumps([boxes, outlines, grades, measures, heatmap, len(report.findings), sums, area]).encode()

    def heatmap_png(self, report, index):
        return b"\x89PNG heatmap %d" % index

    def labels_png(self, report):
        return b"\x89PNG labels"


class Box:
    """The application over doubles and a real journal, with a test client."""

    def __init__(self, path: Path, **settings) -> None:
        self.journal = Journal(path, reserve_bytes=0).open()
        self.engine = ScriptedEngine()
        self.device = InProcess(scripted_read, lambda instance, deadline: self.engine.run(instance, deadline))
        self.health = {"ready": True, "bundle": "double"}
        self.app = create_app(
            device=self.device,
            read=scripted_read,
            render=ScriptedRender(),
            journal=self.journal,
            health=lambda: self.health,
            engines=lambda: {"bundle": {"name": "double"}, "engines": [{"model": "grader", "backend": "double"}]},
            settings=WebSettings(**settings),
        )
        self.client = self.app.test_client()

    def post(self, data=None, query="", kind="image/png", **headers):
        return self.client.post("/api/studies" + query, data=png() if data is None else data, content_type=kind, headers=headers)


@pytest.fixture
def box(tmp_path):
    made = Box(tmp_path / "data", max_bytes=100_000)
    yield made
    made.journal.close()


def assert_error(response, status, code):
    assert response.status_code == status, response.get_data(as_text=True)
    assert response.mimetype == "application/json"
    body = response.get_json()
    assert body["disclaimer"] == DISCLAIMER
    assert set(body["error"]) == {"code", "message", "value", "remedy"}
    assert body["error"]["code"] == code
    assert body["error"]["remedy"]
    assert "Traceback" not in response.get_data(as_text=True)
    return body


# --- the good way ------------------------------------------------------------------------------------------------------


def test_a_study_is_answered_kept_and_linked(box):
    response = box.post(query="?name=../L spine.png&budget_ms=1500")
    assert response.status_code == 201
    body = response.get_json()
    assert body["id"] == study_id_of(png())
    assert body["disclaimer"] == DISCLAIMER
    assert (body["status"], body["findings"][0]["level"], body["findings"][0]["pfirrmann"]["grade"]) == ("complete", "L5/S1", 4)
    assert (body["study"]["name"], body["study"]["budget_ms"], body["study"]["late"]) == ("L spine.png", 1500, False)
    assert 0 < body["study"]["elapsed_ms"] < 1500
    assert response.headers["Location"] == body["links"]["self"]
    assert box.client.get(body["links"]["self"]).get_json() == body
    assert len(body["links"]["heatmaps"]) == len(body["heatmaps"]) == 3
    assert body["links"]["heatmaps"][2] is None  # withheld
    for link in (body["links"]["base"], body["links"]["overlay"], body["links"]["labels"], *body["links"]["heatmaps"][:2]):
        picture = box.client.get(link)
        assert (picture.status_code, picture.mimetype, picture.data[:4]) == (200, "image/png", b"\x89PNG")
    assert box.client.get(body["links"]["heatmaps"][1]).data.endswith(b"heatmap 1")
    source = box.client.get(body["links"]["source"])
    assert source.data == png()
    assert source.mimetype == "application/octet-stream"
    assert source.headers["Content-Disposition"].startswith("attachment")


@pytest.mark.parametrize("kind", ["application/dicom", "image/png", "image/jpeg", "application/octet-stream", "image/png; charset=x"])
def test_raw_bodies(box, kind):
    assert box.post(kind=kind).status_code == 201


def test_multipart(box):
    response = box.client.post("/api/studies", data={"file": (io.BytesIO(png()), "scans/a.png")})
    assert response.status_code == 201
    assert response.get_json()["study"]["name"] == "a.png"


def test_the_same_bytes_are_answered_from_the_journal(box):
    first, second = box.post(), box.post()
    assert (first.status_code, second.status_code) == (201, 200)
    assert first.get_json() == second.get_json()
    assert box.engine.runs == 1


def test_a_restart_shows_the_same(box):
    before = box.post().get_json()
    box.journal.close()
    again = Box(box.journal.data_dir)
    assert again.client.get(before["links"]["self"]).get_json() == before
    assert again.client.get(before["links"]["overlay"]).status_code == 200
    assert again.post().status_code == 200
    assert again.engine.runs == 0
    again.journal.close()


def test_the_deadline_starts_at_arrival_and_carries_the_budget(box):
    box.post()
    box.post(data=png(1), **{"X-Latency-Budget-Ms": "250.5"})
    assert [d.budget.total_ms for d in box.engine.deadlines] == [3000.0, 250.5]
    assert len(box.device.delivered_ms) == 2  # what keeping took, so that the next leaves time for it
    assert box.journal.get(study_id_of(png(1))).budget_ms == 250.5
    long_ago = time.monotonic() - 5
    response = box.client.post(
        "/api/studies",
        data=png(2),
        content_type="image/png",
        environ_base={"spinebox.started_s": long_ago},
        query_string={"budget_ms": 1000},
    )
    assert response.status_code == 201
    assert box.engine.deadlines[-1].started_s == long_ago
    assert response.get_json()["study"]["late"] is True


def test_an_answer_cut_short_is_tried_again_and_only_bettered(box):
    box.engine.then = lambda i, d: scripted_report(i, status="partial", rung="no-heatmap", shed=("heatmap",), heatmaps=())
    assert box.post().status_code == 201
    box.engine.then = lambda i, d: scripted_report(
        i, status="partial", rung="detection-only", shed=("heatmap", "masks"), heatmaps=(), mask=None
    )
    worse = box.post()
    assert (worse.status_code, worse.get_json()["rung"]) == (200, "no-heatmap")

    def out_of_time(instance, deadline):
        raise OutOfTime("too late")

    box.engine.then = out_of_time
    assert (box.post().status_code, box.journal.get(study_id_of(png())).status) == (200, "partial")
    box.engine.then = lambda i, d: scripted_report(i)
    better = box.post()
    assert (better.status_code, better.get_json()["rung"]) == (201, "full")
    assert box.engine.runs == 4


def test_the_overlay_is_drawn_again_from_what_was_kept(box):
    links = box.post().get_json()["links"]
    stored = box.client.get(links["overlay"]).data
    assert json.loads(stored[4:]) == [True, True, True, True, 0.45, 3, [0.5, 0.5, None], 200]
    drawn = box.client.get(links["overlay"] + "?boxes=0&grades=0&heatmap=0.25").data
    assert json.loads(drawn[4:]) == [False, True, False, True, 0.25, 3, [0.5, 0.5, None], 200]
    drawn = box.client.get(links["overlay"] + "?measures=0").data
    assert json.loads(drawn[4:])[:4] == [True, True, True, False]
    assert box.engine.runs == 1
    for query in ("boxes=2", "outlines=yes", "measures=on", "heatmap=1.1", "heatmap=nan", "heatmap=", "heatmap=x"):
        assert_error(box.client.get(f"{links['overlay']}?{query}"), 400, "usage.invalid")


def test_a_kept_report_is_the_report():
    report = scripted_report(scripted_read(png()))
    again = kept.unpack(json.loads(json.dumps(report.to_json())), kept.pack(report))
    assert again.to_json() == report.to_json()
    for one, other in zip(report.heatmaps, again.heatmaps, strict=True):
        if one.values is None:
            assert other.values is None
        else:
            assert np.abs(one.values - other.values).max() <= 0.5 / 255 + 1e-6
    assert np.array_equal(again.mask.values, report.mask.values)
    shed = dataclasses.replace(report, mask=None)
    assert kept.unpack(shed.to_json(), kept.pack(shed)).mask is None
    bare = dataclasses.replace(report, mask=None, heatmaps=())
    assert kept.pack(bare) is None
    assert kept.unpack(bare.to_json(), None) == bare


def test_the_history_is_newest_first(box):
    ids = [box.post(data=png(i)).get_json()["id"] for i in range(3)]
    body = box.client.get("/api/studies?limit=2").get_json()
    assert [s["id"] for s in body["studies"]] == ids[:0:-1]
    assert (body["total"], body["disclaimer"]) == (3, DISCLAIMER)
    assert [s["id"] for s in box.client.get("/api/studies?limit=2&offset=2").get_json()["studies"]] == ids[:1]
    for query in ("limit=0", "limit=201", "limit=x", "limit=1.5", "offset=-1", "offset=1e99", "limit=inf"):
        assert_error(box.client.get(f"/api/studies?{query}"), 400, "usage.invalid")


def test_the_engines_in_use_are_told(box):
    found = box.client.get("/api/engines")
    assert found.status_code == 200
    assert found.get_json() == {
        "disclaimer": DISCLAIMER,
        "bundle": {"name": "double"},
        "engines": [{"model": "grader", "backend": "double"}],
    }
    assert found.headers["Cache-Control"] == "no-store"
    silent = create_app(device=box.device, read=scripted_read, render=ScriptedRender(), journal=box.journal, health=lambda: {"ready": True})
    assert silent.test_client().get("/api/engines").get_json() == {"disclaimer": DISCLAIMER, "bundle": None, "engines": []}


def test_health(box, monkeypatch):
    assert box.client.get("/healthz").get_json() == {"status": "alive"}
    ready = box.client.get("/readyz")
    assert (ready.status_code, ready.get_json()["ready"]) == (200, True)
    box.health = {"ready": False, "reason": "bundle.missing"}
    body = box.client.get("/readyz")
    assert (body.status_code, body.get_json()["not_ready"]) == (503, [{"what": "engine", "why": "bundle.missing"}])
    box.health = None  # a health check that fails
    assert box.client.get("/readyz").get_json()["not_ready"] == [{"what": "engine", "why": "TypeError"}]
    box.health = {"ready": True}
    box.journal.close()
    body = box.client.get("/readyz")
    assert (body.status_code, body.get_json()["not_ready"][0]["what"]) == (503, "journal")
    assert box.client.get("/healthz").status_code == 200


def test_the_report_alone_keeps_to_the_public_contract(tmp_path):
    schema = json.loads((Path(__file__).parents[1] / "docs/report.schema.json").read_text())
    validate = jsonschema.Draft202012Validator(schema).validate
    with Journal(tmp_path, reserve_bytes=0) as journal:
        engine = ScriptedEngine()
        app = create_app(
            device=InProcess(study.read, engine.run), read=study.read, render=render, journal=journal, health=lambda: {"ready": True}
        )
        client = app.test_client()
        engine.then = lambda i, d: scripted_report(i, status="partial")  # one of its heatmaps is withheld
        body = client.post("/api/studies", data=png(), content_type="image/png").get_json()
        alone = client.get(body["links"]["report"]).get_json()
        assert alone == {k: v for k, v in body.items() if k not in ("id", "links", "study")}
        validate(alone)
        refused = client.post("/api/studies", data=Path(get_testdata_file("CT_small.dcm")).read_bytes(), content_type="application/dicom")
        validate(client.get(f"/api/studies/{refused.get_json()['id']}/report.json").get_json())
        waiting = journal.accept(b"later", "x")
        assert_error(client.get(f"/api/studies/{waiting}/report.json"), 404, "journal.unknown")


# --- bad input ---------------------------------------------------------------------------------------------------------


def test_what_is_no_study_is_refused_and_not_kept(box):
    assert "id" not in assert_error(box.post(data=b"hello"), 415, "study.not-an-image")
    assert_error(box.post(data=b""), 400, "study.not-an-image")
    assert_error(box.post(data=b"x" * 100_001), 413, "study.too-large")
    assert_error(box.post(data=b"x" * 400_000), 413, "study.too-large")
    assert_error(box.post(kind="text/html"), 415, "usage.invalid")
    assert_error(box.client.post("/api/studies", data=png()), 415, "usage.invalid")  # no content type
    assert_error(box.client.post("/api/studies"), 415, "usage.invalid")
    assert box.journal.list() == ()
    assert box.post().status_code == 201  # and the next one is served


def test_multipart_takes_exactly_one_file(box):
    send = lambda data: box.client.post("/api/studies", data=data, content_type="multipart/form-data")  # noqa: E731
    assert_error(send({}), 400, "usage.invalid")
    assert_error(send({"file": "text, not a file"}), 400, "usage.invalid")
    assert_error(send({"other": (io.BytesIO(png()), "a.png")}), 400, "usage.invalid")
    assert_error(send({"file": [(io.BytesIO(png()), "a.png"), (io.BytesIO(png(1)), "b.png")]}), 400, "usage.invalid")
    assert_error(send({"file": (io.BytesIO(png()), "a.png"), "more": (io.BytesIO(png(1)), "b.png")}), 400, "usage.invalid")
    assert_error(send({"file": (io.BytesIO(b""), "a.png")}), 400, "study.not-an-image")
    assert_error(send({"file": (io.BytesIO(b"x" * 100_001), "a.png")}), 413, "study.too-large")
    assert_error(send({f"f{i}": "x" for i in range(50)}), 413, "study.too-large")
    broken = box.client.post("/api/studies", data=b"--x\r\nnonsense", content_type="multipart/form-data; boundary=x")
    assert broken.status_code == 400
    assert box.journal.list() == ()


@pytest.mark.parametrize("budget", ["0", "-1", "nan", "inf", "60001", "soon", "1e999"])
def test_a_budget_has_limits(box, budget):
    assert_error(box.post(query=f"?budget_ms={budget}"), 400, "usage.invalid")
    assert_error(box.post(**{"X-Latency-Budget-Ms": budget}), 400, "usage.invalid")
    assert box.engine.runs == 0


def test_a_readable_image_that_is_refused_is_kept_as_refused(box):
    def no_spine(instance, deadline):
        raise SpineNotFound("no row of vertebrae was found", value="0 discs")

    box.engine.then = no_spine
    body = assert_error(box.post(query="?name=cat.png"), 422, "refused.no-spine")
    kept_study = box.client.get(f"/api/studies/{body['id']}").get_json()
    assert (kept_study["status"], kept_study["findings"], kept_study["error"]) == ("refused", [], body["error"])
    assert kept_study["study"]["name"] == "cat.png"
    assert box.client.get(kept_study["links"]["base"]).status_code == 200
    assert kept_study["links"]["overlay"] is None
    assert_error(box.client.get(f"/api/studies/{body['id']}/overlay.png"), 404, "journal.unknown")
    assert_error(box.client.get(f"/api/studies/{body['id']}/overlay.png?boxes=0"), 404, "journal.unknown")
    colour = assert_error(box.post(data=b"colour"), 422, "study.colour")
    history = box.client.get("/api/studies").get_json()["studies"]
    assert [(s["id"], s["status"], s["error"]["code"]) for s in history] == [
        (colour["id"], "refused", "study.colour"),
        (body["id"], "refused", "refused.no-spine"),
    ]
    box.engine.then = lambda i, d: scripted_report(i)
    assert box.post().status_code == 201  # tried again, not refused for ever


def test_a_report_that_says_refused_is_an_error_not_an_empty_answer(box):
    error = OutOfTime("too slow", value="3 ms").to_json()
    box.engine.then = lambda i, d: scripted_report(i, status="refused", findings=(), heatmaps=(), mask=None, error=error)
    response = box.post()
    assert assert_error(response, 503, "refused.out-of-time")["error"] == error
    assert response.headers["Retry-After"]
    assert error_from_json({"code": "new.code", "message": "m"}).http_status == 422


def test_failures_inside_are_json_and_kept(box):
    def backend(instance, deadline):
        raise BackendFailed("the runtime stopped")

    def bug(instance, deadline):
        raise ZeroDivisionError("secret detail")

    box.engine.then = backend
    assert_error(box.post(), 500, "backend.failed")
    box.engine.then = bug
    response = box.post(data=png(1))
    body = assert_error(response, 500, "internal")
    assert "secret detail" not in response.get_data(as_text=True)
    assert box.journal.get(body["id"]).error["code"] == "internal"
    assert box.journal.pending() == ()


def test_a_full_disk_is_507_and_nothing_is_acknowledged(box, monkeypatch):
    def full(data, name, now=None):
        raise DiskFull("no space left")

    monkeypatch.setattr(box.journal, "accept", full)
    assert "id" not in assert_error(box.post(), 507, "journal.disk-full")
    assert box.journal.count() == 0


class SlowDisk:
    """`journal.complete` waits for `go`, then does what it would have done, or fails."""

    def __init__(self, box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go, self.asked = threading.Event(), threading.Event()
        self.fails = False
        complete = box.journal.complete

        def slow(*args, **kwargs):
            self.asked.set()
            assert self.go.wait(20)
            if self.fails:
                raise DiskFull("no space left")
            return complete(*args, **kwargs)

        monkeypatch.setattr(box.journal, "complete", slow)


@pytest.fixture
def disk(box, monkeypatch) -> Iterator[SlowDisk]:
    slow = SlowDisk(box, monkeypatch)
    yield slow
    slow.go.set()
    finish_keeping(box.app)


def test_a_slow_disk_does_not_make_an_answer_late(box, disk):
    response = box.post(query="?name=a.png&budget_ms=300")
    body = response.get_json()
    assert (response.status_code, body["status"], body["study"]["kept"], body["study"]["late"]) == (200, "complete", False, False)
    assert 0 < body["study"]["elapsed_ms"] < 300
    assert box.journal.get(body["id"]).status == "accepted"
    assert box.device.delivered_ms == []  # what the disk took is not what an answer waits for
    assert b"spinebox_answers_before_kept_total 1.0" in box.app.extensions["spinebox-metrics"].scrape()[0]
    # Until it is kept, it is found as if it were.
    there = box.client.get(body["links"]["self"]).get_json()
    assert there["study"]["kept"] is False
    assert (there["findings"], there["study"]["received_at"]) == (body["findings"], body["study"]["received_at"])
    drawn = box.client.get(body["links"]["overlay"])
    assert drawn.data.startswith(b"\x89PNG")
    assert box.client.get(body["links"]["source"]).data == png()
    assert box.client.get(body["links"]["report"]).get_json()["findings"] == body["findings"]
    again = box.post(query="?budget_ms=300")
    assert (again.status_code, again.get_json()["study"]["name"], box.engine.runs) == (200, "a.png", 1)
    disk.go.set()
    finish_keeping(box.app)
    after = box.client.get(body["links"]["self"]).get_json()
    assert (after["status"], after["study"]["kept"], after["findings"]) == ("complete", True, body["findings"])
    assert after["study"]["received_at"] == body["study"]["received_at"]
    assert box.client.get(body["links"]["overlay"]).data == drawn.data


def test_a_disk_that_fails_after_the_answer_is_told_in_the_log_and_tried_at_the_next_start(box, disk, caplog):
    disk.fails = True
    body = box.post(query="?budget_ms=300").get_json()
    assert body["study"]["kept"] is False
    disk.go.set()
    finish_keeping(box.app)
    assert "could not be kept" in caplog.text
    assert box.client.get(body["links"]["self"]).get_json()["status"] == "accepted"
    assert [s.id for s in box.journal.pending()] == [body["id"]]


def test_a_late_answer_and_one_too_many_wait_for_the_disk(box, disk, monkeypatch):
    threading.Timer(0.3, disk.go.set).start()
    long_ago = time.monotonic() - 5
    late = box.client.post("/api/studies", data=png(), content_type="image/png", environ_base={"spinebox.started_s": long_ago})
    assert (late.status_code, late.get_json()["study"]["late"], late.get_json()["study"]["kept"]) == (201, True, True)
    disk.go.clear()
    assert box.post(data=png(1), query="?budget_ms=100").get_json()["study"]["kept"] is False
    monkeypatch.setattr("appliance.web.service.MOST_HELD_BYTES", 1)
    threading.Timer(0.5, disk.go.set).start()
    third = box.post(data=png(2), query="?budget_ms=100").get_json()["study"]
    assert (third["kept"], third["late"]) == (True, True)


def test_who_computes_keeps_nobody_from_being_told(box):
    inside, go = threading.Event(), threading.Event()
    box.post()

    def wait(instance, deadline):
        inside.set()
        assert go.wait(20)
        return scripted_report(instance)

    box.engine.then = wait
    thread = threading.Thread(target=lambda: box.app.test_client().post("/api/studies", data=png(1), content_type="image/png"))
    thread.start()
    assert inside.wait(20)
    assert box.post().status_code == 200  # the kept answer of the first, while the second is at work
    assert thread.is_alive()
    go.set()
    thread.join(20)


# --- the door ----------------------------------------------------------------------------------------------------------


def knock(budget=None, *, method="POST", path="/api/studies", query="", size=500_000, **headers) -> Knock:
    named = {"HOST": "localhost:8080"} | ({} if budget is None else {"X_LATENCY_BUDGET_MS": budget}) | headers
    return Knock(method, path, query, named, size, time.monotonic())


def test_a_study_is_announced_with_its_size_and_its_budget(box):
    ask = door(box.app)
    box.device.ticket = object()
    for asked, total_ms in ((knock(), 3000), (knock("250"), 250), (knock(query="must=detect&budget_ms=400"), 400)):
        assert ask(asked) is box.device.ticket
        size, deadline = box.device.announced.pop()
        assert (size, deadline.budget.total_ms, deadline.started_s) == (500_000, total_ms, asked.started_s)


@pytest.mark.parametrize(
    "other",
    [
        knock(method="GET"), knock(path="/v2/models/detector/infer"), knock("soon"), knock("0"), knock("-5"), knock("nan"), knock("1e9"),
        knock(query="budget_ms="), knock(HOST="evil.example"), knock(ORIGIN="http://evil.example"), knock(SEC_FETCH_SITE="cross-site"),
    ],
)  # fmt: skip
def test_what_is_no_study_of_an_allowed_client_is_not_announced(box, other):
    assert door(box.app)(other) is None
    assert box.device.announced == []


def test_a_study_refused_at_the_door_is_counted(tmp_path):
    def no_time(size, deadline):
        raise OutOfTime("there is too much before it")

    metrics = Metrics(("lumbar-mri-sagittal",))
    device = InProcess(scripted_read, lambda instance, deadline: scripted_report(instance))
    device.announce = no_time
    with Journal(tmp_path) as journal:
        app = create_app(
            device=device, read=scripted_read, render=ScriptedRender(), journal=journal, health=lambda: {"ready": True}, metrics=metrics
        )
        with pytest.raises(OutOfTime):
            door(app)(knock())
    assert b'spinebox_refusals_total{admitted="false",code="refused.out-of-time"} 1.0' in metrics.scrape()[0]


def test_a_request_brings_along_what_the_door_gave(box):
    ticket = object()
    box.client.post("/api/studies", data=png(), content_type="image/png", environ_base={"spinebox.ticket": ticket})
    assert box.device.tickets == [ticket]


def test_unknown_addresses_and_methods(box):
    for path in ("/api/nothing", "/api/studies/", "/api//studies", "/nothing", "/api/studies/x/y/z", "/static/none.js"):
        assert_error(box.client.get(path), 404, "usage.invalid")
    for path in ("/api/studies/" + "0" * 32, "/api/studies/..", "/api/studies/" + "A" * 32, "/api/studies/x/source"):
        assert_error(box.client.get(path), 404, "journal.unknown")
    response = box.client.delete("/api/studies")
    assert_error(response, 405, "usage.invalid")
    assert "POST" in response.headers["Allow"]
    study = box.post().get_json()["id"]
    for tail in ("heatmap/2.png", "heatmap/99.png", "heatmap/99999999999999999999.png"):
        assert_error(box.client.get(f"/api/studies/{study}/{tail}"), 404, "journal.unknown")
    for tail in ("heatmap/-1.png", "heatmap/x.png", "evidence.png", "../../x"):
        assert_error(box.client.get(f"/api/studies/{study}/{tail}"), 404, "usage.invalid")


def test_a_damaged_picture_is_an_error_not_a_wrong_picture(box):
    body = box.post().get_json()
    digest = box.journal.get(body["id"]).artefacts["evidence.png"]
    (box.journal.data_dir / "blobs" / digest[:2] / digest[2:]).write_bytes(b"\x89PNG other")
    assert_error(box.client.get(body["links"]["overlay"]), 500, "journal.corrupt")


def test_with_the_real_reader(tmp_path):
    with Journal(tmp_path, reserve_bytes=0) as journal:
        engine = ScriptedEngine()
        app = create_app(
            device=InProcess(study.read, engine.run),
            read=study.read,
            render=ScriptedRender(),
            journal=journal,
            health=lambda: {"ready": True},
        )

        def send(data):
            return app.test_client().post("/api/studies", data=data, content_type="application/dicom")

        slice_mr = Path(get_testdata_file("MR_small.dcm")).read_bytes()
        body = send(slice_mr).get_json()
        assert (body["source"]["rows"], body["source"]["modality"], len(body["findings"])) == (64, "MR", 3)
        assert app.test_client().get(body["links"]["overlay"] + "?boxes=0").status_code == 200
        assert engine.runs == 1
        assert send(slice_mr[:3000]).status_code == 400
        assert "id" in assert_error(send(Path(get_testdata_file("CT_small.dcm")).read_bytes()), 422, "study.wrong-modality")
        assert [s.status for s in journal.list()] == ["refused", "complete"]


# --- security ----------------------------------------------------------------------------------------------------------


def test_every_answer_carries_the_security_headers(box):
    study = box.post().get_json()["id"]
    for path in (
        "/",
        "/api/studies",
        f"/api/studies/{study}",
        f"/api/studies/{study}/overlay.png",
        "/none",
        "/healthz",
        "/static/kiosk.js",
    ):
        with box.client.get(path) as response:
            headers = response.headers
        policy = headers["Content-Security-Policy"]
        assert "default-src 'self'" in policy
        assert "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Referrer-Policy"] == "no-referrer"
        assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
        assert headers["Cache-Control"] == ("no-cache" if path.startswith("/static") else "no-store")


@pytest.mark.parametrize(
    ("host", "bound", "status"),
    [
        ("127.0.0.1:8080", "127.0.0.1", 200),
        ("LOCALHOST", "127.0.0.1", 200),
        ("[::1]:8080", "127.0.0.1", 200),
        ("evil.example", "127.0.0.1", 421),
        ("127.0.0.1.evil.example:8080", "127.0.0.1", 421),
        ("192.168.1.5", "127.0.0.1", 421),
        ("", "127.0.0.1", 421),
        ("192.168.1.5:80", "192.168.1.5", 200),
        ("192.168.1.5:80", "0.0.0.0", 200),
        ("[fe80::1]:80", "::", 200),
        ("evil.example:80", "0.0.0.0", 421),
        ("kiosk.clinic", "0.0.0.0", 200),
    ],
)
def test_a_foreign_host_name_is_turned_away(tmp_path, host, bound, status):
    box = Box(tmp_path, host=bound, allowed_hosts=("kiosk.clinic",))
    response = box.client.get("/api/studies", headers={"Host": host})
    assert response.status_code == status
    if status == 421:
        assert_error(response, 421, "usage.invalid")
    box.journal.close()


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 201),
        ({"Origin": "http://localhost"}, 201),
        ({"Origin": "http://localhost", "Sec-Fetch-Site": "same-origin"}, 201),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://localhost.evil.example"}, 403),
        ({"Origin": "http://localhost:9999"}, 403),
        ({"Origin": "http://[broken"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
    ],
)
def test_another_site_may_not_send(box, headers, status):
    response = box.post(**headers)
    assert response.status_code == status
    if status == 403:
        assert_error(response, 403, "usage.invalid")
        assert box.engine.runs == 0


# --- what is asked for -------------------------------------------------------------------------------------------------


def test_must_and_may_reach_the_device(box):
    box.post(query="?must=segment&may=")
    box.post(data=png(1), query="?may=segment")
    box.post(data=png(2))
    assert [w.rungs() for w in box.device.wanted] == [("no-heatmap",), ("no-heatmap", "detection-only"), RUNGS]
    for query in ("must=colour", "may=heatmaps", "must=detect,,x"):
        assert_error(box.post(data=png(3), query=f"?{query}"), 400, "usage.invalid")
    assert box.engine.runs == 3


def test_an_answer_is_given_again_to_whom_it_is_enough(box):
    box.engine.then = lambda i, d: scripted_report(i, rung="no-heatmap", asked="no-heatmap", heatmaps=())
    assert box.post(query="?may=segment").status_code == 201
    assert box.post(query="?may=segment").status_code == 200
    assert box.post(query="?may=").status_code == 200  # richer than asked for
    assert box.engine.runs == 1
    box.engine.then = lambda i, d: scripted_report(i)
    whole = box.post()  # now with heatmaps
    assert (whole.status_code, whole.get_json()["rung"]) == (201, "full")


def test_a_refusal_at_once_says_when_to_ask_again(box):
    def no_time(*args, **kwargs):
        error = OutOfTime("it would not be ready in time", value="812 ms")
        error.retry_after_ms = 2400.0
        raise error

    box.device.answer = no_time
    response = box.post(**{"X-Latency-Budget-Ms": "300"})
    assert "id" not in assert_error(response, 503, "refused.out-of-time")
    assert response.headers["Retry-After"] == "3"
    assert box.journal.count() == 0
    # Also where these bytes have a poorer answer: this refusal is not what is kept under its id.
    box.device = InProcess(scripted_read, box.engine.run)
    box.app.extensions["spinebox"]._device = box.device
    box.engine.then = lambda i, d: scripted_report(i, rung="no-heatmap", asked="no-heatmap", heatmaps=())
    assert box.post(query="?may=segment").status_code == 201
    box.device.answer = no_time
    assert "id" not in assert_error(box.post(), 503, "refused.out-of-time")


def test_what_cost_two_workers_is_not_tried_again_after_a_restart(tmp_path):
    def poison(data, wanted, deadline, *, readable, **_):
        readable()
        raise Quarantined("the engines were lost each time that they saw this image", value="2 times")

    box = Box(tmp_path)
    box.device.answer = poison
    assert_error(box.post(), 422, "refused.quarantined")
    box.journal.close()
    again = Box(tmp_path)
    assert_error(again.post(), 422, "refused.quarantined")
    assert again.engine.runs == 0
    assert again.post(data=png(1)).status_code == 201
    again.journal.close()


def test_whose_client_is_gone_is_told_in_the_history(box):
    def gone(data, wanted, deadline, *, readable, **_):
        readable()
        raise RequestGone("the client went away")

    box.device.answer = gone
    assert_error(box.post(), 499, "refused.client-gone")
    assert [(s.status, s.error["code"]) for s in box.journal.list()] == [("refused", "refused.client-gone")]


def test_the_start_finishes_what_a_crash_left(tmp_path):
    box = Box(tmp_path)
    lost = box.journal.accept(png(), "lost.png")
    gone = box.journal.accept(b"not an image", "x")
    killer = box.journal.accept(png(7), "killer.png")
    for _ in range(2):
        box.journal.attempt(killer)
    assert box.client.get(f"/api/studies/{lost}").get_json()["status"] == "accepted"
    assert finish_pending(box.app) == 3
    assert box.journal.pending() == ()
    assert (box.journal.get(lost).status, box.journal.get(lost).attempts) == ("complete", 2)
    assert box.journal.get(gone).error["code"] == "study.not-an-image"
    assert (box.journal.get(killer).status, box.journal.get(killer).error["code"]) == ("refused", "refused")
    assert box.engine.runs == 1
    box.journal.close()


# --- a real socket -----------------------------------------------------------------------------------------------------


@pytest.fixture
def served(box):
    server = Server(box.app, port=0, max_bytes=100_000)
    thread = threading.Thread(target=server.run)
    thread.start()
    yield box, server
    server.stop()
    thread.join(30)
    assert not thread.is_alive()


def talk(server: Server, request: bytes) -> tuple[bytes, bytes]:
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        connection.sendall(request)
        answer = b""
        while part := connection.recv(65536):
            answer += part
    head, _, body = answer.partition(b"\r\n\r\n")
    return head, body


def test_over_a_socket_the_clock_starts_at_the_first_byte(served):
    box, server = served
    data = png()
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        head = "POST /api/studies HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: image/png\r\n"
        before = time.monotonic()
        connection.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data[:-1])
        time.sleep(0.3)
        late = time.monotonic()
        connection.sendall(data[-1:])
        answer = b""
        while part := connection.recv(65536):
            answer += part
    assert answer.startswith(b"HTTP/1.1 201")
    assert before <= box.engine.deadlines[0].started_s < late
    assert 250 <= json.loads(answer.partition(b"\r\n\r\n")[2])["timing_ms"]["receive"] < 20_000


def test_what_the_server_itself_refuses_is_json_too(served):
    _, server = served
    head, body = talk(server, b"POST /api/studies HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999999\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 413")
    assert json.loads(body)["error"] == {**json.loads(body)["error"], "code": "study.too-large", "value": "100000 bytes"}
    assert json.loads(body)["disclaimer"] == DISCLAIMER
    head, body = talk(server, b"GET / HTTP/1.1\r\nHost: localhost\r\nContent-Length: nonsense\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400")
    assert json.loads(body)["error"]["code"] == "usage.invalid"
    head, body = talk(server, b"GET / HTTP/1.1\r\nX: ".ljust(MAX_HEADER_BYTES, b"y"))
    assert b" 431 " in head.splitlines()[0]
    with urllib.request.urlopen(server.url + "/healthz", timeout=20) as answer:
        assert json.load(answer) == {"status": "alive"}


def test_a_port_that_is_taken_is_a_usage_error(served):
    box, server = served
    with pytest.raises(UsageError, match="cannot listen"):
        Server(box.app, port=server.port)
    for host, port in (("999.1.1.1", 0), ("127.0.0.1", 70000)):
        with pytest.raises(UsageError):
            Server(box.app, host, port)


DAEMON = """
import sys, threading, time
sys.path.insert(0, sys.argv[2])
import test_web as doubles
from pathlib import Path
from appliance.web import serve
box = doubles.Box(Path(sys.argv[1]))
def slow(instance, deadline):
    print("computing", flush=True)
    time.sleep(1.0)
    return doubles.scripted_report(instance)
box.engine.then = slow
serve(box.app, port=0, bound=lambda server: print(server.port, flush=True))
box.journal.close()
print("closed", flush=True)
"""


def test_sigterm_lets_the_running_answer_leave(tmp_path):
    daemon = subprocess.Popen(
        [sys.executable, "-c", DAEMON, str(tmp_path), str(Path(__file__).parent)],
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[1],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        text=True,
    )
    try:
        port = int(daemon.stdout.readline())
        answers = []

        def send():
            request = urllib.request.Request(f"http://127.0.0.1:{port}/api/studies", png(), {"Content-Type": "image/png"})
            with urllib.request.urlopen(request, timeout=30) as answer:
                answers.append((answer.status, json.load(answer)["status"]))

        thread = threading.Thread(target=send)
        thread.start()
        assert daemon.stdout.readline() == "computing\n"
        daemon.send_signal(signal.SIGTERM)
        thread.join(30)
        assert answers == [(201, "complete")]
        assert daemon.stdout.readline() == "closed\n"
        assert daemon.wait(30) == 0
    finally:
        daemon.kill()
        daemon.stdout.close()
        daemon.wait()


@pytest.mark.parametrize(
    ("reads", "said"),
    [
        (None, "Sagittal lumbar MRI"),
        (("sagittal lumbar MRI", "frontal radiographs of the spine"), "Sagittal lumbar MRI or frontal radiographs of the spine"),
        (("a", "b", "c"), "A, b or c"),
        (("<b>bold</b>",), "&lt;b&gt;bold&lt;/b&gt;"),
    ],
)
def test_the_page_says_what_is_read(tmp_path, reads, said):
    box = Box(tmp_path, **({} if reads is None else {"reads": reads}))
    page = box.client.get("/").get_data(as_text=True)
    assert f'<p id="reads">{said}</p>' in page
    box.journal.close()


def test_the_page_of_a_bundle_that_does_not_say_what_it_reads(tmp_path):
    box = Box(tmp_path, reads=())
    page = box.client.get("/").get_data(as_text=True)
    assert 'id="reads"' not in page
    assert "DICOM, PNG or JPEG" in page
    box.journal.close()


def test_the_page_says_what_it_is_for(box):
    page = box.client.get("/").get_data(as_text=True)
    assert DISCLAIMER in page
    assert "<noscript>" in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "https://" not in page
    assert Budget(box.app.extensions["spinebox-settings"].budget_ms).total_ms == 3000


def test_inferences_before_flask_keep_the_guards_and_the_headers(tmp_path):
    """The short way of /v2 must refuse what the application refuses, and say what every answer says."""

    class Still:
        def models(self):
            tensor = TensorInfo("image", "FP32", (1, 2))
            return {"tiny": ModelInfo("tiny", "1", "null_any", (tensor,), (tensor,))}

        def ready(self):
            return True

        def infer(self, model, inputs, deadline, gone):
            return dict(inputs)

    box = Box(tmp_path)
    app = create_app(
        device=box.device,
        read=scripted_read,
        render=ScriptedRender(),
        journal=box.journal,
        health=lambda: {"ready": True},
        inferring=Still(),
    )
    body = json.dumps({"inputs": [{"name": "image", "datatype": "FP32", "shape": [1, 2], "data": [1, 2]}]})

    def infer(**headers):
        return app.test_client().post("/v2/models/tiny/infer", data=body, headers=headers)

    good = infer()
    assert good.get_json()["outputs"][0]["data"] == [1.0, 2.0]
    for name, value in box.client.get("/healthz").headers.items():
        if name not in ("Content-Length", "Content-Type"):
            assert good.headers[name] == value, name
    assert infer(Host="evil.example").status_code == 421
    assert infer(Origin="http://evil.example").status_code == 403
    assert infer(**{"Sec-Fetch-Site": "cross-site"}).status_code == 403
    box.journal.close()
