"""Engine latency: ONNX Runtime FP32 against each other engine of each model, one pair of sessions in a process at a time.

Each pair runs in a process of its own, because many sessions in one process distort each other. Scope: engine only.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import asdict

import numpy as np

from appliance import backends
from appliance.bundle import open_bundle
from appliance.compiler.heatmap import attach_cam
from benchmarks.harness import interleaved
from models.export import WEIGHTS, load_float32

CONTESTANTS = (("onnxruntime", "int8"), ("openvino", "f32"), ("openvino", "bf16"), ("openvino", "int8"))
FAMILIES = ("segmenter", "detector", "grader")


def pair(family: str, backend: str, precision: str, runs: int) -> dict[str, object]:
    bundle = open_bundle()
    entry = bundle.engine(family)
    model = load_float32(WEIGHTS / f"{family}.onnx")
    if family == "grader":
        model, _ = attach_cam(model)
    fp32 = model.SerializeToString()
    blob = bundle.read(entry.builds[backend].graph) if precision == "int8" else fp32
    a = backends.load("onnxruntime").open(fp32, entry.signature, precision="f32", threads=0)
    b = backends.load(backend).open(blob, entry.signature, precision=precision, threads=0)
    rng = np.random.default_rng(1)
    feed = {t.name: rng.uniform(-1, 1, t.shape).astype(np.float32) for t in entry.signature.inputs}
    return asdict(interleaved(lambda: a.run(feed), lambda: b.run(feed), runs))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engines", description=__doc__)
    parser.add_argument("--runs", type=int, default=60)
    parser.add_argument("--pair", nargs=3, metavar=("FAMILY", "BACKEND", "PRECISION"), help="one pair, as JSON")
    args = parser.parse_args(argv)
    if args.pair:
        print(json.dumps(pair(*args.pair, args.runs)))
        return 0
    print(f"{'model':10} {'engine':20} {'ORT FP32 ms':>12} {'engine ms':>10} {'ratio':>6}  middle half of ratios")
    for family in FAMILIES:
        for backend, precision in CONTESTANTS:
            if not backends.probe(backend).available:
                continue
            command = [sys.executable, "-m", "benchmarks.engines", "--runs", str(args.runs), "--pair", family, backend, precision]
            found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            print(
                f"{family:10} {backend + ' ' + precision:20} {found['a']['median_ms']:12.1f} {found['b']['median_ms']:10.1f} "
                f"{found['ratio']:6.2f}  {found['ratio_p25']:.2f} to {found['ratio_p75']:.2f}",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
