"""End to end: DICOM bytes to JSON and overlay, beside the sum of the engines' own time; and the daemon's peak memory.

`python -m benchmarks.end_to_end` works on phantoms in one process: read, run, render, serialise. `--http` puts the same
bytes through a real daemon on a free loopback port and reads its peak resident memory.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import numpy as np

from appliance import render, study
from appliance.budget import Budget
from appliance.bundle import open_bundle
from appliance.engine import Engine
from models import phantom


def studies(count: int) -> list[bytes]:
    out = []
    for seed in range(count):
        image, truth = phantom.draw(np.random.default_rng(seed), weighting="T2", hw=(512, 512))
        out.append(phantom.write_dicom(image, truth, seed=seed))
    return out


def _line(name: str, values: list[float]) -> str:
    p50, p99 = np.percentile(values, [50, 99])
    return f"{name:34} p50 {p50:7.1f} ms   p99 {p99:7.1f} ms   ({len(values)} runs)"


def in_process(rounds: int, count: int, backend: str) -> None:
    files = studies(count)
    total: list[float] = []
    answer: list[float] = []
    engines: list[float] = []
    drawing: list[float] = []
    with Engine(open_bundle(), backend) as engine:
        for i in range(rounds + 3):
            began = time.perf_counter()
            instance = study.read(files[i % count])
            report = engine.run(instance, Budget(60_000).start())
            answered = time.perf_counter()
            render.overlay_png(instance, report)
            drawn = time.perf_counter()
            json.dumps(report.to_json())
            ended = time.perf_counter()
            if i < 3:  # first runs allocate
                continue
            total.append((ended - began) * 1e3)
            answer.append((answered - began + ended - drawn) * 1e3)
            drawing.append((drawn - answered) * 1e3)
            engines.append(sum(report.timing_ms.get(k, 0.0) for k in ("detector", "segmenter", "grader")))
    print(f"one process, {count} phantoms of 512 x 512, backends {engine.used}")
    print(_line("DICOM bytes -> JSON and overlay", total))
    print(_line("DICOM bytes -> JSON", answer))
    print(_line("overlay alone", drawing))
    print(_line("engines' own time (sum)", engines))
    print(f"box around the engines: {np.median(np.array(total) / np.array(engines)):.2f} x their own time")


def over_http(rounds: int, count: int) -> None:
    files = studies(rounds)[: max(rounds, count)]
    with tempfile.TemporaryDirectory() as folder:
        daemon = subprocess.Popen(
            [sys.executable, "-m", "appliance.cli", "serve", "--port", "0", "--data-dir", folder], stderr=subprocess.PIPE, text=True
        )
        try:
            url = None
            assert daemon.stderr is not None
            for line in daemon.stderr:
                if found := re.search(r"http://[0-9.]+:\d+", line):
                    url = found.group(0)
                    break
            if url is None:
                raise SystemExit("the daemon did not come up")
            times = []
            for content in files:
                ask = urllib.request.Request(f"{url}/api/studies", content, {"Content-Type": "application/dicom"})
                began = time.perf_counter()
                with urllib.request.urlopen(ask, timeout=60) as answer:
                    json.load(answer)
                times.append((time.perf_counter() - began) * 1e3)
            status = Path(f"/proc/{daemon.pid}/status").read_text()
            peak = int(re.search(r"VmHWM:\s+(\d+) kB", status).group(1)) / 1024  # type: ignore[union-attr]
            print(_line("HTTP: POST DICOM -> kept report", times[3:]))
            print(f"daemon's peak resident memory: {peak:.0f} MB")
        finally:
            daemon.terminate()
            daemon.wait(20)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.end_to_end", description=__doc__)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--count", type=int, default=10, help="different phantoms")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--http", action="store_true", help="also through a real daemon")
    args = parser.parse_args(argv)
    in_process(args.rounds, args.count, args.backend)
    if args.http:
        over_http(min(args.rounds, 40), args.count)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
