"""Another bundle under load: taken over where it is right and fast enough, left where it is otherwise."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_daemon import daemon, get

from appliance import backends, signing
from appliance.budget import Budget, Wanted
from appliance.bundle import SHIPPED, canonical, open_bundle
from appliance.certificate import DeviceRecord, Subject, measure
from appliance.device import Device
from appliance.dispatch import Dispatcher
from appliance.errors import BackendUnavailable, BundleUnsigned, EngineTooSlow, SpineboxError, SwapRefused
from appliance.swap import Swaps, proven_limits_ms
from appliance.workers import Plan, Workers
from models import phantom


@pytest.fixture(scope="module", autouse=True)
def author(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A key of one's own, that this machine trusts: workers are started with the same environment."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CONFIG_HOME", str(tmp_path_factory.mktemp("config")))
        signing.author_path().parent.mkdir(parents=True)
        signing.generate(signing.author_path())
        yield


def copied(folder: Path, name: str, change: Any = None, sign: bool = True) -> Path:
    """The shipped bundle under another name, with `change(manifest)`, signed."""
    root = folder / name
    shutil.copytree(SHIPPED, root)
    manifest = json.loads((root / "manifest.json").read_text())
    manifest["name"] = name
    if change is not None:
        change(manifest)
    content = canonical(manifest)
    (root / "manifest.json").write_bytes(content)
    (root / "signature.json").unlink()
    if sign:
        (root / "signature.json").write_bytes(canonical(signing.sign(content, signing.load_private(signing.author_path()))))
    return root


def wrong_golden(manifest: dict[str, Any]) -> None:
    """The detector is held to the answers of another network."""
    other = next(e["golden"] for e in manifest["models"]["spine_class"]["engines"].values() if e["golden"])
    for engine in manifest["models"]["detector"]["engines"].values():
        engine["golden"] = other if engine["golden"] else None


@pytest.fixture(scope="module")
def device() -> Iterator[Device]:
    with Device(Workers(Plan(SHIPPED, "auto", 1)), Dispatcher()) as opened:
        yield opened


def slice_of(seed: int) -> bytes:
    image, truth = phantom.demo(seed=3)
    return phantom.write_dicom(image, truth, seed=seed)


def test_the_next_bundle_takes_over_without_one_failed_request_and_a_worse_one_does_not(device: Device, tmp_path: Path) -> None:
    link = tmp_path / "current"
    link.symlink_to(SHIPPED)
    swaps = Swaps(device, link, Plan(SHIPPED, "auto", 1))
    stop, failures, digests = threading.Event(), [], []

    def load() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            try:
                digests.append(device.answer(slice_of(number), Wanted(may=()), Budget(60_000).start()).report["bundle"]["digest"])
            except SpineboxError as error:
                failures.append(error)

    thread = threading.Thread(target=load)
    thread.start()
    try:
        swaps.now()
        assert swaps.last is not None
        assert swaps.last["outcome"] == "unchanged"

        link.unlink()
        link.symlink_to(copied(tmp_path, "next"))
        swaps.now()
        assert swaps.last["outcome"] == "swapped"
        served = open_bundle(tmp_path / "next").digest
        assert device.health()["bundle"]["digest"] == served == swaps.bundle.digest

        link.unlink()
        link.symlink_to(copied(tmp_path, "wrong", wrong_golden))
        with pytest.raises(BackendUnavailable, match="no engine of detector can run here"):
            swaps.now()
        assert swaps.last["outcome"] == "refused"
        assert swaps.last["error"]["code"] == "backend.unavailable"

        link.unlink()
        link.symlink_to(copied(tmp_path, "unsigned", sign=False))
        with pytest.raises(BundleUnsigned):
            swaps.now()

        # What is in use has proven to be faster than anything is.
        link.unlink()
        link.symlink_to(copied(tmp_path, "slow"))
        swaps.limits_ms = {"grader": 1e-3}
        with pytest.raises(SwapRefused, match=r"grader took .* ms in pass 1 of 459; the one in use has proven 0\.0 ms"):
            swaps.now()
        swaps.limits_ms = {"grader": 10_000.0}
        swaps.now()
        assert swaps.last["outcome"] == "swapped"
        done = len(digests)
        until = time.monotonic() + 20
        while len(digests) < done + 2 and time.monotonic() < until:
            time.sleep(0.01)
    finally:
        stop.set()
        thread.join(60)
    assert failures == []
    assert list(dict.fromkeys(digests)) == [open_bundle().digest, served, open_bundle(tmp_path / "slow").digest]


def test_only_one_swap_at_a_time(tmp_path: Path) -> None:
    entered, leave, calls = threading.Event(), threading.Event(), []

    class Slow:
        def swap(self, plan: Plan, accept: Any) -> dict[str, Any]:
            calls.append(plan)
            entered.set()
            assert leave.wait(20)
            return {}

    swaps = Swaps(Slow(), copied(tmp_path, "next"), Plan(SHIPPED))
    swaps.ask()
    assert entered.wait(20)
    swaps.ask()
    assert [t.name for t in threading.enumerate()].count("swap") == 1
    leave.set()
    until = time.monotonic() + 20
    while swaps._running and time.monotonic() < until:
        time.sleep(0.005)
    assert len(calls) == 1
    assert swaps.last is not None
    assert swaps.last["outcome"] == "swapped"


def test_limits_come_from_the_certificates_of_the_engines_in_use(tmp_path: Path) -> None:
    bundle, record = open_bundle(), DeviceRecord.open(tmp_path)
    build = bundle.engine("grader").builds["onnxruntime"]
    version = backends.probe("onnxruntime").version or ""
    subject = Subject("grader", "onnxruntime", version, build.precision, 1, record.fingerprint, bundle.digest)
    used = {"used": {"grader": "onnxruntime", "detector": "openvino"}, "versions": {"onnxruntime": version, "openvino": "1"}}
    assert proven_limits_ms(tmp_path, bundle, used, 1) == {}
    record.keep(measure(lambda: None, subject, 50.0, 0.99, 0.99))
    assert proven_limits_ms(tmp_path, bundle, used, 1) == {"grader": 50.0}
    assert proven_limits_ms(tmp_path, bundle, used, 2) == {}  # other threads, other times


def test_engines_that_may_block_too_long_do_not_serve(tmp_path: Path) -> None:
    plan = Plan(SHIPPED, "auto", 1, record=tmp_path, blocking_ms=200.0)
    with (
        pytest.raises(EngineTooSlow, match=r"no certificate of this engine proves p99\.9 on this device"),
        Device(Workers(plan), Dispatcher()),
    ):
        pass
    bundle, record = open_bundle(), DeviceRecord.open(tmp_path)
    version = backends.probe("onnxruntime").version or ""
    for model in bundle.manifest["models"]:  # of all its engines these alone are certified
        precision = bundle.engine(model).builds["onnxruntime"].precision
        subject = Subject(model, "onnxruntime", version, precision, 1, record.fingerprint, bundle.digest)
        record = record.keep(measure(lambda: None, subject, 100.0, 0.999, 0.99))
    with Device(Workers(plan, standby=False), Dispatcher()) as device:
        assert set(device.health()["backends"].values()) == {"onnxruntime"}


def test_a_hangup_swaps_the_bundle_of_a_running_daemon(tmp_path: Path) -> None:
    link = tmp_path / "current"
    link.symlink_to(SHIPPED)
    with daemon(tmp_path / "data", "--bundle", str(link), "--no-standby") as (url, process):
        before = get(f"{url}/readyz")["engine"]
        assert before["last_swap"] is None
        link.unlink()
        link.symlink_to(copied(tmp_path, "next"))
        os.kill(process.pid, signal.SIGHUP)
        until = time.monotonic() + 60
        while get(f"{url}/readyz")["engine"]["last_swap"] is None and time.monotonic() < until:
            time.sleep(0.1)
        after = get(f"{url}/readyz")["engine"]
        assert (after["last_swap"]["outcome"], after["bundle"]["name"]) == ("swapped", "next")
        assert after["worker"]["pid"] != before["worker"]["pid"]
        assert get(f"{url}/api/engines")["bundle"]["digest"] == hashlib.sha256((tmp_path / "next/manifest.json").read_bytes()).hexdigest()
