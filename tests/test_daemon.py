"""The real daemon: `spinebox serve` in a process of its own, over HTTP, killed and started again."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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


def post(url: str, content: bytes) -> tuple[int, dict]:  # type: ignore[type-arg]
    ask = urllib.request.Request(f"{url}/api/studies", content, {"Content-Type": "application/dicom"})
    try:
        with urllib.request.urlopen(ask, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


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
        process.send_signal(signal.SIGKILL)
        process.wait(10)
    with daemon(tmp_path) as (url, process):
        again = get(f"{url}/api/studies/{report['id']}")
        assert again["findings"] == report["findings"]
        assert len(get(f"{url}/api/studies")["studies"]) == 2
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
