"""Where the time of one answer goes: a lumbar MRI slice and a frontal radiograph, stage by stage, and the pictures after them.

`python -m benchmarks.path` prints a table of this tree. `--against FOLDER` runs another checkout beside it, each in a process of
its own, one study at a time in turns, and prints the ratio of neighbouring turns: a busy machine slows both. `--png` compares the
compressors of `appliance._png` on this study's overlay.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from benchmarks.harness import Pair, Times, interleaved

PROTOCOLS = ("lumbar-mri-sagittal", "spine-xray-ap")
PICTURES = ("overlay", "base", "heatmaps", "labels", "evidence")
WARM = 5
Stages = dict[str, float]


def studies() -> dict[str, bytes]:
    """A phantom's file for each protocol: a DICOM slice of MRI, and a picture of a radiograph, without a header."""
    from models import phantom, phantom_ap

    image, truth = phantom.demo()
    film, _ = phantom_ap.draw(np.random.default_rng(3))
    _, png = cv2.imencode(".png", cv2.convertScaleAbs(film, alpha=255.0 / float(film.max())))
    return dict(zip(PROTOCOLS, (phantom.write_dicom(image, truth), png.tobytes()), strict=True))


class WholePath:
    """The whole path in this process: an open engine, and the functions that an answer goes through."""

    def __init__(self, backend: str) -> None:
        from appliance import study
        from appliance.bundle import open_bundle
        from appliance.engine import Engine

        self.files = studies()
        self.engine = Engine(open_bundle(None), backend).__enter__()
        study.warm_up()

    def answer(self, protocol: str) -> Stages:
        """Milliseconds of each stage of one study: reading, those of the engine, JSON, each kind of picture, and their sums."""
        from appliance import render, study
        from appliance.budget import Budget

        out: Stages = {}

        def timed(name: str, work: Callable[[], Any]) -> Any:
            began = time.perf_counter()
            found = work()
            out[name] = (time.perf_counter() - began) * 1e3
            return found

        instance = timed("read", lambda: study.read(self.files[protocol]))
        report = timed("run", lambda: self.engine.run(instance, Budget(60_000).start()))
        if report.protocol != protocol:
            raise SystemExit(f"the study was answered as {report.protocol}, not as {protocol}")
        out |= {f"  {name}": ms for name, ms in report.timing_ms.items() if name != "engine_total"}
        timed("json", lambda: json.dumps(report.to_json()))
        shown = [i for i, heatmap in enumerate(report.heatmaps) if heatmap.values is not None]
        drawn: dict[str, Callable[[], Any]] = {
            "overlay": lambda: render.overlay_png(instance, report),
            "base": lambda: render.base_png(instance),
            "heatmaps": lambda: [render.heatmap_png(report, i) for i in shown],
            "labels": lambda: render.labels_png(report) if report.mask else None,
            "evidence": lambda: _pack()(report),
        }
        for name in PICTURES:
            timed(f"  {name}", drawn[name])
        out["pictures"] = sum(out[f"  {name}"] for name in PICTURES)
        return out


def _pack() -> Callable[[Any], Any]:
    """`kept.pack`, which older trees have in `appliance.web`."""
    from appliance import render

    here = Path(render.__file__).with_name("kept.py").exists()
    found: Callable[[Any], Any] = import_module("appliance.kept" if here else "appliance.web.kept").pack
    return found


def serve(backend: str) -> int:
    """One line in, a protocol; one line out, its stages: the process that `Tree` talks to."""
    path = WholePath(backend)
    for line in sys.stdin:
        print(json.dumps(path.answer(line.strip())), flush=True)
    return 0


class Tree:
    """A checkout in a process of its own."""

    def __init__(self, folder: Path, backend: str) -> None:
        command = [sys.executable, "-P", str(Path(__file__).resolve()), "--serve", "--backend", backend]
        env = {**os.environ, "PYTHONPATH": str(folder.resolve())}
        self._process = subprocess.Popen(command, cwd=folder, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def answer(self, protocol: str) -> Stages:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(protocol, file=self._process.stdin, flush=True)
        found: Stages = json.loads(self._process.stdout.readline())
        return found

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)


def profile(ask: Callable[[str], Stages], runs: int) -> dict[str, dict[str, Times]]:
    """Times of each stage by protocol."""
    out = {}
    for protocol in PROTOCOLS:
        rows = [ask(protocol) for _ in range(WARM + runs)][WARM:]
        out[protocol] = {name: Times.of([row[name] for row in rows]) for name in rows[0]}
    return out


def compare(before: Callable[[str], Stages], after: Callable[[str], Stages], runs: int) -> dict[str, dict[str, Pair]]:
    """Stages of the two in turns, the one that goes first changing; a stage that only one has is left out."""
    out = {}
    for protocol in PROTOCOLS:
        rows: list[tuple[Stages, Stages]] = []
        for i in range(WARM + runs):
            order = (before, after) if i % 2 else (after, before)
            first, second = (ask(protocol) for ask in order)
            rows.append((first, second) if i % 2 else (second, first))
        out[protocol] = dict(_pairs(rows[WARM:]))
    return out


def _pairs(rows: list[tuple[Stages, Stages]]) -> Iterator[tuple[str, Pair]]:
    for name in rows[0][0]:
        if name not in rows[0][1]:
            continue
        a, b = (np.array([row[k][name] for row in rows]) for k in (0, 1))
        p25, p50, p75 = (float(v) for v in np.percentile(a / np.maximum(b, 1e-6), [25, 50, 75]))
        yield name, Pair(Times.of(a.tolist()), Times.of(b.tolist()), p50, p25, p75)


def print_profile(found: Mapping[str, Mapping[str, Times]]) -> None:
    for protocol, stages in found.items():
        print(f"\n{protocol:28} {'median':>8} {'p25':>8} {'p75':>8} {'p99':>8}  ms")
        for name, t in stages.items():
            print(f"{name:28} {t.median_ms:8.2f} {t.p25_ms:8.2f} {t.p75_ms:8.2f} {t.p99_ms:8.2f}")


def print_pairs(found: Mapping[str, Mapping[str, Pair]]) -> None:
    for protocol, stages in found.items():
        print(f"\n{protocol:28} {'before':>8} {'after':>8}  ms, ratio (middle half)")
        for name, pair in stages.items():
            times = f"{pair.a.median_ms:8.2f} {pair.b.median_ms:8.2f}"
            print(f"{name:28} {times}  {pair.ratio:5.2f} ({pair.ratio_p25:.2f} to {pair.ratio_p75:.2f})")


def print_png(runs: int, backend: str) -> None:
    """OpenCV's zlib against what `appliance._png` uses, on an overlay."""
    from appliance import _png, render, study
    from appliance.budget import Budget

    path = WholePath(backend)
    instance = study.read(path.files[PROTOCOLS[0]])
    drawn = render.overlay_png(instance, path.engine.run(instance, Budget(60_000).start()))
    pixels = np.asarray(cv2.imdecode(np.frombuffer(drawn, np.uint8), cv2.IMREAD_UNCHANGED), np.uint8)
    by_cv2 = (cv2.IMWRITE_PNG_COMPRESSION, 1, cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_FILTER_UP)
    pair = interleaved(lambda: cv2.imencode(".png", pixels, by_cv2), lambda: _png.encode(pixels), runs)
    sizes = len(cv2.imencode(".png", pixels, by_cv2)[1]), len(_png.encode(pixels))
    name = "zlib" if _png.deflate is zlib else "ISA-L"
    print(f"{pixels.shape}: OpenCV {pair.a.median_ms:.1f} ms, {sizes[0]} bytes; {name} {pair.b.median_ms:.1f} ms, {sizes[1]} bytes")
    print(f"ratio {pair.ratio:.2f} ({pair.ratio_p25:.2f} to {pair.ratio_p75:.2f})")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.path", description=__doc__)
    parser.add_argument("--runs", type=int, default=40)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--against", type=Path, help="another checkout, which counts as before")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    parser.add_argument("--png", action="store_true", help="compare the compressors of a picture instead")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.serve:
        return serve(args.backend)
    if args.png:
        print_png(args.runs, args.backend)
        return 0
    found: Mapping[str, Mapping[str, Pair | Times]]
    if args.against:
        trees = Tree(args.against, args.backend), Tree(Path(__file__).parents[1], args.backend)
        pairs = compare(trees[0].answer, trees[1].answer, args.runs)
        for tree in trees:
            tree.close()
        print_pairs(pairs)
        found = pairs
    else:
        times = profile(WholePath(args.backend).answer, args.runs)
        print_profile(times)
        found = times
    if args.json:
        values = {protocol: {name.strip(): asdict(times) for name, times in stages.items()} for protocol, stages in found.items()}
        args.json.write_text(json.dumps(values, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
