"""The device with real worker processes: answers, steering, lost workers, poison, another bundle."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import cv2
import jsonschema
import numpy as np
import pytest

from appliance import device as module
from appliance import kept, study
from appliance.budget import RUNGS, Budget, Wanted
from appliance.bundle import SHIPPED, open_bundle
from appliance.device import Answer, Device, Unanswered
from appliance.dispatch import OTHERS, Dispatcher
from appliance.engine import Engine
from appliance.errors import (
    BackendFailed,
    BundleMissing,
    NotAnImage,
    OutOfTime,
    Quarantined,
    RequestGone,
    SpineboxError,
    SpineNotFound,
    WorkerLost,
    WrongModality,
)
from appliance.workers import Plan, Workers
from models import phantom

SCHEMA = json.loads((Path(__file__).parents[1] / "docs/report.schema.json").read_text())
LONG = Budget(60_000)
PLAN = Plan(SHIPPED, "auto", 1)


def slice_of(seed: int) -> bytes:
    image, truth = phantom.demo(seed=3)
    image = np.array(image)
    image[0, 0] = seed % 1000
    return phantom.write_dicom(image, truth, seed=seed)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("device")


@pytest.fixture(scope="module")
def device(folder: Path) -> Iterator[Device]:
    with Device(Workers(PLAN), Dispatcher(), costs_path=folder / "costs.json") as opened:
        yield opened


def ask(device: Device, data: bytes, wanted: Wanted | None = None, budget: Budget = LONG, **more: object) -> Answer:
    return device.answer(data, wanted or Wanted(), budget.start(), **more)  # type: ignore[arg-type]


def standing_by(device: Device) -> int:
    """The standby's pid, once there is one."""
    until = time.monotonic() + 60
    while time.monotonic() < until:
        if (pid := device.workers.health()["standby"]) is not None:
            return int(pid)
        time.sleep(0.02)
    raise AssertionError("no standby came up")


def test_an_answer_is_the_engines_own(device: Device) -> None:
    data = slice_of(1)
    read: list[int] = []
    found = ask(device, data, readable=lambda: read.append(1))
    assert read == [1]
    jsonschema.Draft202012Validator(SCHEMA).validate(found.report)
    assert (found.report["status"], found.report["rung"], found.report["shed_reasons"]) == ("complete", "full", {})
    with Engine(open_bundle(), "auto", 1) as engine:
        own = engine.run(study.read(data))
    for key in ("findings", "measurements", "heatmaps", "bundle", "engine", "notes"):
        assert found.report[key] == own.to_json()[key]
    again = kept.unpack(found.report, found.artefacts[kept.EVIDENCE])
    assert again.mask is not None
    assert own.mask is not None
    assert np.array_equal(again.mask.values, own.mask.values)
    assert {"read", "preprocess", "detector", "engine_total", "encode", "queue"} <= set(found.report["timing_ms"])


@pytest.mark.parametrize(
    ("wanted", "rung"),
    [(Wanted(may=()), "detection-only"), (Wanted(may=("segment",)), "no-heatmap"), (Wanted(must=("heatmap",), may=()), "full")],
)
def test_what_is_asked_for_is_what_comes_and_nothing_counts_as_shed(device: Device, wanted: Wanted, rung: str) -> None:
    report = ask(device, slice_of(2), wanted).report
    jsonschema.Draft202012Validator(SCHEMA).validate(report)
    assert (report["rung"], report["asked"], report["shed"], report["status"]) == (rung, rung, [], "complete")


def test_a_short_budget_sheds_and_says_why(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "stretch_ms", lambda kind, protocol, stretch: {"segment": 5000.0}.get(stretch, 10.0))
    report = ask(device, slice_of(3), budget=Budget(4000)).report
    assert report["rung"] == "detection-only"
    assert set(report["shed_reasons"]) == {"heatmap", "masks", "grades"}
    assert all("its own time" in reason for reason in report["shed_reasons"].values())
    with pytest.raises(OutOfTime, match="the answer would take 5020 ms"):
        ask(device, slice_of(3), Wanted(must=("segment",)), Budget(4000))


def test_one_that_waits_makes_the_running_one_shed(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second is admitted because the first can still shed; after its next stretch the first is told to."""
    keep = module.Turn.keep
    entered = threading.Event()
    answers: dict[str, Answer] = {}
    need = device.health()["expected_ms"]["lumbar-mri-sagittal"]

    def other() -> None:
        answers["second"] = ask(device, slice_of(5), budget=Budget(need["detection-only"] * 1.5 + 60))

    def after_detection(turn: module.Turn, ways: list[module.Way]) -> module.Way:
        if not entered.is_set():
            entered.set()
            threading.Thread(target=other).start()
            until = time.monotonic() + 10
            while not device.dispatcher.waiting() and time.monotonic() < until:
                time.sleep(0.0005)
        return keep(turn, ways)

    monkeypatch.setattr(module.Turn, "keep", after_detection)
    # Time enough that the second one's wait here cannot be what is short.
    monkeypatch.setattr(device, "stretch_ms", lambda kind, protocol, stretch: {"segment": 5000.0}.get(stretch, 10.0))
    first = ask(device, slice_of(4))
    assert (first.report["rung"], first.report["status"]) == ("detection-only", "partial")
    assert first.report["shed_reasons"] == dict.fromkeys(("heatmap", "masks", "grades"), OTHERS)
    assert first.report["heatmaps"] == []
    until = time.monotonic() + 20
    while "second" not in answers and time.monotonic() < until:
        time.sleep(0.01)
    assert answers["second"].report["findings"]


def test_refusals_of_the_engine_come_through_with_what_the_image_says(device: Device) -> None:
    with pytest.raises(Unanswered) as caught:
        ask(device, b"not an image")
    assert isinstance(caught.value.error, NotAnImage)
    assert caught.value.source is None
    flat = cv2.imencode(".png", np.random.default_rng(0).integers(0, 255, (300, 300), dtype=np.uint8))[1].tobytes()
    with pytest.raises(Unanswered) as caught:
        ask(device, flat)
    assert isinstance(caught.value.error, SpineNotFound | WrongModality)
    assert caught.value.source is not None
    assert caught.value.source["rows"] == 300
    assert ask(device, slice_of(6)).report["status"] == "complete"  # and the worker goes on


def test_a_client_that_goes_away_costs_one_stretch(device: Device) -> None:
    pid = device.workers.health()["pid"]
    gone = threading.Event()
    with pytest.raises(RequestGone):
        ask(device, slice_of(7), readable=gone.set, gone=gone.is_set)
    assert device.workers.health()["pid"] == pid
    assert ask(device, slice_of(7)).report["status"] == "complete"


def test_raw_inference_is_the_sessions_own(device: Device) -> None:
    blank = np.random.default_rng(0).random((1, 1, 384, 384), np.float32)
    found = device.infer("detector", {"image": blank}, LONG.start())
    with Engine(open_bundle(), "auto", 1) as engine:
        own = engine.infer("detector", {"image": blank})
    assert set(found) == set(own)
    for name, values in own.items():
        assert np.array_equal(found[name], values)


def test_costs_are_measured_once_and_kept(device: Device, folder: Path) -> None:
    expected = device.health()["expected_ms"]
    assert set(expected) == {"spine-xray-ap", "lumbar-mri-sagittal"}
    for times in expected.values():
        assert 0 < times["detection-only"] <= times["no-heatmap"] <= times["full"] * 1.5
    device.save()
    again = Device(device.workers, Dispatcher(), costs_path=folder / "costs.json")
    again._load()
    assert again._all_known()
    (folder / "costs.json").write_text("{")
    broken = Device(device.workers, Dispatcher(), costs_path=folder / "costs.json")
    broken._load()
    assert not broken._all_known()


def test_time_is_left_for_keeping_and_sending(device: Device) -> None:
    deadline = Budget(1000).start()
    fresh = Device(device.workers, Dispatcher())
    before_s = fresh._until_s(deadline)
    assert deadline.started_s + 0.5 <= before_s < deadline.started_s + 1.0
    for _ in range(5):
        fresh.delivered(30.0)
    assert fresh._until_s(deadline) - deadline.started_s == pytest.approx(1.0 - (30.0 + module.TRANSIT_MS) / 1e3, abs=1e-6)
    for _ in range(600):
        fresh.delivered(5000.0)  # the answer does not wait for such a disk, and leaves it no more time than this
    left_ms = module.MOST_DELIVER_MS + module.TRANSIT_MS
    assert fresh._until_s(deadline) - deadline.started_s == pytest.approx(1.0 - left_ms / 1e3, abs=1e-6)
    short = Budget(40).start()
    assert fresh._until_s(short) - short.started_s == pytest.approx(0.020, abs=1e-6)  # at most half


def test_a_place_is_kept_for_a_body_that_is_coming(device: Device) -> None:
    with pytest.raises(OutOfTime) as caught:
        device.announce(500_000, Budget(1).start())
    assert caught.value.admitted is False
    assert caught.value.retry_after_ms is not None
    ticket = device.announce(500_000, Budget(60_000).start())
    assert len(device.dispatcher._plan._coming) == 1
    data = phantom.write_dicom(*phantom.demo())
    kept_for_others: list[int] = []
    answer = device.answer(
        data, Wanted(), Budget(60_000).start(), ticket=ticket, admitted=lambda: kept_for_others.append(len(device.dispatcher._plan._coming))
    )
    assert (answer.report["status"], kept_for_others) == ("complete", [0])


def test_heat_raises_what_is_foreseen_before_it_shows(device: Device) -> None:
    hot = [1.0]
    warm = Device(device.workers, Dispatcher(), power_factor=lambda: hot[0])
    warm._costs = device._costs
    (lumbar,) = [p for p in module.PROTOCOLS if p.NAME == "lumbar-mri-sagittal"]
    kind = module._Kind((lumbar,), module._size(1 << 18), 1 << 18)
    cool_ms = warm._way(kind, "full").cost_ms
    hot[0] = 1.5
    assert warm._way(kind, "full").cost_ms == pytest.approx(1.5 * cool_ms)
    assert warm.state()["power_factor"] == 1.5


def test_a_larger_image_is_foreseen_to_take_longer(device: Device) -> None:
    sizes = [module._size(n) for n in (1, 1 << 16, 1 << 18, 1 << 20, 1 << 24)]
    assert sizes == sorted(sizes)
    assert sizes[0] == sizes[1]
    (lumbar,) = [p for p in module.PROTOCOLS if p.NAME == "lumbar-mri-sagittal"]
    cost = {n: device._way(module._Kind((lumbar,), module._size(n), n), "full").cost_ms for n in (1 << 18, 1 << 20, 1 << 22)}
    assert cost[1 << 18] < cost[1 << 20] < cost[1 << 22]


def test_a_picture_that_does_not_say_what_it_is_counts_with_the_dearest(device: Device) -> None:
    picture = cv2.imencode(".png", np.zeros((512, 512), np.uint8))[1].tobytes()
    unsure, sure = device._kind(picture), device._kind(slice_of(1))
    assert (len(unsure.protocols), len(sure.protocols)) == (2, 1)
    for rung in RUNGS:
        assert device._way(unsure, rung).cost_ms >= device._way(sure, rung).cost_ms


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_worker_lost_in_the_middle_is_replaced_and_the_request_answered_once(device: Device, number: signal.Signals) -> None:
    standby = standing_by(device)
    before = device.workers.health()

    def lose() -> None:
        if device.workers.health()["pid"] == before["pid"]:
            os.kill(before["pid"], number)

    found = ask(device, slice_of(100 + number), readable=lose)
    assert found.report["status"] == "complete"
    after = device.workers.health()
    assert (after["pid"], after["restarts"]) == (standby, before["restarts"] + 1)
    assert after["last_outage_ms"] < 2000
    assert standing_by(device) != standby


def test_an_idle_worker_that_dies_is_replaced_before_anyone_asks(device: Device) -> None:
    standby = standing_by(device)
    os.kill(device.workers.health()["pid"], signal.SIGKILL)
    until = time.monotonic() + 10
    while device.workers.health()["pid"] != standby and time.monotonic() < until:
        time.sleep(0.01)
    assert device.workers.health()["pid"] == standby
    assert ask(device, slice_of(8)).report["status"] == "complete"


def test_a_worker_that_hangs_over_an_image_is_given_up(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    """What takes many times what was foreseen hangs; here hardly anything was foreseen."""
    standing_by(device)
    before = device.workers.health()["restarts"]
    for name in ("HANG_MS", "HANG_TIMES", "HANG_MS_PER_MEGAPIXEL"):
        monkeypatch.setattr(module, name, 0.001)
    with pytest.raises((Quarantined, WorkerLost)):
        ask(device, slice_of(60))
    assert device.workers.health()["restarts"] > before
    monkeypatch.undo()
    standing_by(device)
    assert ask(device, slice_of(61)).report["status"] == "complete"


def test_what_loses_two_workers_is_not_tried_again(device: Device) -> None:
    standing_by(device)
    poison = slice_of(9)

    def lose() -> None:
        os.kill(device.workers.health()["pid"], signal.SIGKILL)

    with pytest.raises(Quarantined):
        ask(device, poison, readable=lose)
    with pytest.raises(Quarantined, match="each time that they saw this image"):
        ask(device, poison)
    standing_by(device)
    assert ask(device, slice_of(10)).report["status"] == "complete"


def test_without_time_for_a_second_try_the_loss_is_told(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    standing_by(device)
    monkeypatch.setattr(module.Turn, "again", lambda turn, ways: None)
    with pytest.raises(WorkerLost, match="no time is left to try again"):
        ask(device, slice_of(11), readable=lambda: os.kill(device.workers.health()["pid"], signal.SIGKILL))


def test_a_worker_that_grows_too_large_is_replaced(device: Device) -> None:
    standby = standing_by(device)
    worker = device.workers._at_work
    assert worker is not None
    worker.plan = Plan(SHIPPED, "onnxruntime", 1, memory_bytes=1 << 20)
    until = time.monotonic() + 10
    while device.workers.health()["pid"] != standby and time.monotonic() < until:
        time.sleep(0.01)
    assert "MiB of memory, more than 1" in worker.lost_because


def test_an_engine_that_fails_gives_way_to_the_next_of_its_model(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where an accelerator is pulled out: the answer comes from the next runtime, in the same request."""
    before = device.health()["backends"]["detector"]
    run = module._Errand.run
    failed: list[str] = []

    def once(errand: module._Errand, way: module.Way) -> Answer:
        if not failed:
            failed.append(way.rung)
            error = BackendFailed("the device is gone")
            error.family = "detector"
            raise error
        return run(errand, way)

    monkeypatch.setattr(module._Errand, "run", once)
    report = ask(device, slice_of(12)).report
    assert report["status"] == "complete"
    assert report["engine"]["backends"]["detector"] == device.health()["backends"]["detector"] != before
    # Nothing is known of the one that took over, but what the one before took: it is not taken to need an age.
    assert device.health()["expected_ms"]["lumbar-mri-sagittal"]["detection-only"] < 2 * module.UNMEASURED_MS
    with pytest.raises(SpineboxError):  # what is wrong with one request is not the engine's fault
        device.infer("detector", {"image": np.zeros((1, 1, 3, 3), np.float32)}, LONG.start())


def test_another_bundle_takes_over_while_requests_go_on(device: Device, tmp_path: Path) -> None:
    os.kill(device.workers.health()["pid"], signal.SIGKILL)  # what fell back before is forgotten with its worker
    standing_by(device)
    stop, failures, answered = threading.Event(), [], []

    def load() -> None:
        number = 5000
        while not stop.is_set():
            number += 1
            try:
                answered.append(ask(device, slice_of(number), Wanted(may=())).report["engine"]["backends"]["detector"])
            except SpineboxError as error:
                failures.append(error)

    thread = threading.Thread(target=load)
    thread.start()
    try:
        with pytest.raises(BundleMissing):
            device.swap(Plan(tmp_path / "none", "onnxruntime", 1))
        assert device.health()["backends"]["detector"] == "openvino"
        device.swap(Plan(SHIPPED, "onnxruntime", 1))
        done = len(answered)
        until = time.monotonic() + 20
        while len(answered) < done + 3 and time.monotonic() < until:
            time.sleep(0.01)
    finally:
        stop.set()
        thread.join(60)
    assert failures == []
    assert answered[0] == "openvino"
    assert answered[-1] == "onnxruntime"
    assert device.health()["ready"]


def test_a_bundle_that_cannot_be_opened_is_said_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(BundleMissing), Device(Workers(Plan(tmp_path / "none")), Dispatcher()):
        pass


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_the_kernel_says_when_an_idle_worker_is_lost(monkeypatch: pytest.MonkeyPatch, how: signal.Signals) -> None:
    monkeypatch.setattr("appliance.workers.WATCH_S", 3600.0)  # nobody looks
    with Workers(PLAN, standby=False) as workers:
        first = workers.health()["pid"]
        os.kill(first, how)
        until = time.monotonic() + 30
        while workers.health()["pid"] in (first, None) and time.monotonic() < until:
            time.sleep(0.01)
        assert workers.health()["pid"] not in (first, None)


def test_without_a_standby_a_loss_costs_a_start_and_short_budgets_are_told_at_once() -> None:
    dispatcher = Dispatcher()
    workers = Workers(PLAN, standby=False, lost=dispatcher.close_for)
    with Device(workers, dispatcher) as device:
        assert workers.health()["standby"] is None
        first = workers.health()["pid"]
        os.kill(first, signal.SIGKILL)
        until = time.monotonic() + 10
        while workers.health()["pid"] is not None and time.monotonic() < until:
            time.sleep(0.001)
        assert not device.ready()
        assert device.health()["reason"] == "the engines are being started"
        time.sleep(0.05)  # the dispatcher is told right after
        began_s = time.monotonic()
        with pytest.raises(OutOfTime):
            ask(device, slice_of(30), budget=Budget(400))
        assert time.monotonic() - began_s < 2
        assert ask(device, slice_of(30)).report["status"] == "complete"
        assert workers.health()["pid"] != first
        # A start that was quicker than the last one is over when it is: what was foreseen of it holds nobody up.
        workers._start_ms = 3_600_000.0
        os.kill(workers.health()["pid"], signal.SIGKILL)
        until = time.monotonic() + 10
        while workers.health()["pid"] is not None and time.monotonic() < until:
            time.sleep(0.001)
        until, waits = time.monotonic() + 30, set()
        while workers.health()["pid"] is None and time.monotonic() < until:
            waits.add(workers.wait_ms())
            time.sleep(0.01)
        assert any(0.0 < ms < 3_600_000.0 for ms in waits)  # what has begun does not begin anew
        time.sleep(0.1)
        assert ask(device, slice_of(30), budget=Budget(20_000)).report["status"] == "complete"

        # In the middle of a request: the next start is waited for, and that wait is no crash over these bytes.
        lost = []

        def lose() -> None:
            if not lost:
                lost.append(workers.health()["pid"])
                os.kill(lost[0], signal.SIGKILL)

        assert ask(device, slice_of(31), readable=lose).report["status"] == "complete"
        lost.clear()
        workers._start_ms = 60_000.0
        with pytest.raises(WorkerLost, match="no time is left to try again"):
            ask(device, slice_of(32), budget=Budget(1500), readable=lose)
        assert ask(device, slice_of(32)).report["status"] == "complete"
        # The start takes longer than it ever did: nobody saw these bytes a second time, so they are not to blame.
        lost.clear()
        workers._start_ms = 1.0
        with pytest.raises(WorkerLost, match="no engine is running yet"):
            ask(device, slice_of(33), budget=Budget(900), readable=lose)
        assert ask(device, slice_of(33)).report["status"] == "complete"
        assert workers.health()["last_outage_ms"] > 0
    assert not Path(f"/proc/{first}").exists()


def test_the_end_takes_every_process_with_it() -> None:
    with Workers(PLAN) as workers:
        pids = [workers.health()["pid"]]
        until = time.monotonic() + 60
        while workers.health()["standby"] is None and time.monotonic() < until:
            time.sleep(0.02)
        pids.append(workers.health()["standby"])
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
