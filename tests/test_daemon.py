"""The real daemon: `spinebox serve` in a process of its own, over HTTP, killed and started again."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from models import phantom


@contextmanager
def daemon(folder: Path, *extra: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    command = [sys.executable, "-m", "appliance.cli", "serve", "--port", "0", "--data-dir", str(folder), *extra]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "COLUMNS": "200"})
    try:
        assert process.stderr is not None
        lines = []
        for line in process.stderr:
            lines.append(line)
            if found := re.search(r"http://127\.0\.0\.1:\d+", line):
                yield found.group(0), process
                return
        raise AssertionError("the daemon did not come up: " + "".join(lines))
    finally:
        if process.poll() is None:
            process.terminate()
        process.wait(30)
        if process.stderr:
            process.stderr.close()


def get(url: str) -> dict:  # type: ignore[type-arg]
    with urllib.request.urlopen(url, timeout=30) as answer:
        return json.load(answer)


def post(url: str, content: bytes, path: str = "/api/studies") -> tuple[int, dict]:  # type: ignore[type-arg]
    ask = urllib.request.Request(f"{url}{path}", content, {"Content-Type": "application/dicom"})
    try:
        with urllib.request.urlopen(ask, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


def running(pid: int) -> bool:
    """Whether a process still does something; one that ended may wait for init to take it away."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_answers_refuses_survives_a_kill_and_stops_cleanly(tmp_path: Path) -> None:
    image, truth = phantom.demo(seed=8)
    content = phantom.write_dicom(image, truth, seed=8)
    with daemon(tmp_path, "--demo") as (url, process):
        ready = get(f"{url}/readyz")
        assert ready["ready"]
        # What may crash is in another process: this one has no runtime in its memory.
        mapped = Path(f"/proc/{process.pid}/maps").read_text()
        assert not {"onnxruntime", "openvino", "litert"} & set(re.findall(r"onnxruntime|openvino|litert", mapped))
        assert "openvino" in Path(f"/proc/{ready['engine']['worker']['pid']}/maps").read_text()
        assert set(ready["engine"]["expected_ms"]) == {"spine-xray-ap", "lumbar-mri-sagittal"}
        before = get(f"{url}/api/studies")
        assert len(before["studies"]) == 1  # the demonstration
        with urllib.request.urlopen(f"{url}/", timeout=30) as page:  # what the bundle's protocols read
            assert "Frontal radiographs of the spine or sagittal lumbar MRI" in page.read().decode()
        status, refusal = post(url, b"this is not an image")
        assert (status, refusal["error"]["code"]) == (415, "study.not-an-image")
        status, report = post(url, content)
        assert status == 201
        assert report["status"] == "complete"
        assert report["findings"]
        for link in ("overlay", "labels"):
            with urllib.request.urlopen(f"{url}/api/studies/{report['id']}/{link}.png", timeout=30) as picture:
                assert picture.read(8) == b"\x89PNG\r\n\x1a\n"
        pids = [ready["engine"]["worker"]["pid"], get(f"{url}/readyz")["engine"]["worker"]["standby"]]
        process.send_signal(signal.SIGKILL)
        process.wait(10)
        until = time.monotonic() + 20
        while any(pid is not None and running(pid) for pid in pids) and time.monotonic() < until:
            time.sleep(0.05)
        assert not any(pid is not None and running(pid) for pid in pids)  # no worker outlives its daemon
    with daemon(tmp_path) as (url, process):
        again = get(f"{url}/api/studies/{report['id']}")
        assert again["findings"] == report["findings"]
        assert len(get(f"{url}/api/studies")["studies"]) == 2
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0


def metric(url: str, name: str) -> float:
    """The value of a series, 0 where it is not there yet."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as answer:
        lines = answer.read().decode().splitlines()
    return next((float(line.rpartition(" ")[2]) for line in lines if line.startswith(name)), 0.0)


def test_budgets_are_kept_refused_and_counted(tmp_path: Path) -> None:
    image, truth = phantom.demo(seed=8)
    with daemon(tmp_path, "--no-standby") as (url, _):
        expected = get(f"{url}/readyz")["engine"]["expected_ms"]["lumbar-mri-sagittal"]
        for number, budget in enumerate(("0", "-5", "nan", "1e9", "soon")):
            ask = urllib.request.Request(
                f"{url}/api/studies", phantom.write_dicom(image, truth, seed=number), {"X-Latency-Budget-Ms": budget}
            )
            ask.add_header("Content-Type", "application/dicom")
            with pytest.raises(urllib.error.HTTPError) as caught:
                urllib.request.urlopen(ask, timeout=30)
            assert (caught.value.code, json.load(caught.value)["error"]["code"]) == (400, "usage.invalid")
            caught.value.close()
        status, refusal = post(f"{url}/api/studies?budget_ms=2", phantom.write_dicom(image, truth, seed=50), path="")
        assert (status, refusal["error"]["code"], refusal["admitted"]) == (503, "refused.out-of-time", False)
        ample = 20 * expected["full"]
        status, whole = post(f"{url}/api/studies?budget_ms={ample}", phantom.write_dicom(image, truth, seed=51), path="")
        assert (status, whole["rung"], whole["study"]["late"]) == (201, "full", False)
        status, bare = post(f"{url}/api/studies?may=&budget_ms={ample}", phantom.write_dicom(image, truth, seed=52), path="")
        assert (status, bare["rung"], bare["asked"], bare["shed"]) == (201, "detection-only", "detection-only", [])
        assert metric(url, 'spinebox_answers_total{on_time="true",protocol="lumbar-mri-sagittal",rung="full"}') == 1
        assert metric(url, 'spinebox_refusals_total{admitted="false",code="refused.out-of-time"}') == 1


def test_a_client_that_goes_away_gets_its_work_cancelled(tmp_path: Path) -> None:
    image, truth = phantom.demo(seed=8)
    with daemon(tmp_path, "--no-standby") as (url, _):
        host, _, port = url.removeprefix("http://").partition(":")
        for number in range(20):  # one of them is met while its study is computed
            data = phantom.write_dicom(image, truth, seed=100 + number)
            with socket.create_connection((host, int(port)), timeout=20) as connection:
                head = (
                    f"POST /api/studies HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/dicom\r\nContent-Length: {len(data)}\r\n\r\n"
                )
                connection.sendall(head.encode() + data)
            until = time.monotonic() + 20
            while get(f"{url}/readyz")["engine"]["waiting"] and time.monotonic() < until:
                time.sleep(0.01)
            if metric(url, 'spinebox_refusals_total{admitted="true",code="refused.client-gone"}') > 0:
                break
        else:
            raise AssertionError("no request was cancelled")
        assert post(url, phantom.write_dicom(image, truth, seed=99))[0] == 201
