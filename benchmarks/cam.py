"""The fused heatmap: equal to Grad-CAM, and what it costs.

`python -m benchmarks.cam` times the grader with and without its map, INT8 and FP32, on each CPU runtime, in shuffled pairs.
With `--weights final.pt` (training environment) it also holds every map against autograd's Grad-CAM.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from appliance import backends
from appliance.bundle import open_bundle
from appliance.compiler.heatmap import CAM, attach_cam
from appliance.compiler.pipeline import signature_of
from benchmarks.harness import interleaved
from kernels.preprocess import normalise
from models import grader, phantom
from models.export import WEIGHTS, load_float32


def without_map(model: Any) -> Any:
    """The same graph, the map no longer an output: what the pass costs without its explanation."""
    import onnx

    out = onnx.ModelProto()
    out.CopyFrom(model)
    kept = [o for o in out.graph.output if o.name != CAM]
    del out.graph.output[:]
    out.graph.output.extend(kept)
    return out


def crops(count: int) -> list[Any]:
    out = []
    for seed in range(count):
        pixels, truth = phantom.draw(np.random.default_rng(seed), weighting="T2")
        out += [grader.crop(normalise(pixels), d.box_px)[None] for d in truth.discs]
    return out


def pair(backend: str, precision: str, swapped: bool, runs: int) -> dict[str, object]:
    """With the map against without, in this process. FP32: the trained head (pool, linear) against the fused one, which
    computes the logits from the map; INT8: the shipped graph without and with the map among its outputs."""
    import onnx

    if precision == "f32":
        without = load_float32(WEIGHTS / "grader.onnx")
        fused, _ = attach_cam(without)
    else:
        bundle = open_bundle()
        fused = onnx.load_from_string(bundle.read(bundle.engine("grader").builds["onnxruntime"].graph))
        without = without_map(fused)
    image = crops(1)[0]
    opened: dict[str, backends.Session] = {}
    # Which session was made first decides where its buffers lie: both orders are measured.
    for name, model in sorted({"without": without, "with": fused}.items(), reverse=swapped):
        signature = signature_of(onnx.shape_inference.infer_shapes(model))
        opened[name] = backends.load(backend).open(model.SerializeToString(), signature, precision=precision, threads=0)
    return asdict(interleaved(lambda: opened["without"].run({"image": image}), lambda: opened["with"].run({"image": image}), runs))


def overhead(runs: int) -> None:
    """Each pair in a process of its own, once in each order of making the sessions; the extra time is the mean of the two."""
    for backend in backends.PREFERENCE:
        if backends.load(backend).FORMAT != "onnx" or not backends.probe(backend).available:
            continue
        for precision in ("f32", "int8"):
            found = []
            for order in ("0", "1"):
                command = [sys.executable, "-m", "benchmarks.cam", "--runs", str(runs), "--pair", backend, precision, order]
                found.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
            extras = [(1 / f["ratio"] - 1) * 100 for f in found]
            print(
                f"{backend:12} {precision:5} without {np.mean([f['a']['median_ms'] for f in found]):.3f} ms, with map "
                f"{np.mean([f['b']['median_ms'] for f in found]):.3f} ms, extra {np.mean(extras):+.1f} % "
                f"({extras[0]:+.1f} and {extras[1]:+.1f} % in the two orders)",
                flush=True,
            )


def against_autograd(weights: Path, count: int) -> None:
    import onnxruntime as ort

    from models.gradcam import reference

    fused, _ = attach_cam(load_float32(WEIGHTS / "grader.onnx"))
    session = ort.InferenceSession(fused.SerializeToString(), providers=["CPUExecutionProvider"])
    maps = reference(weights)
    largest = relative = logits_off = 0.0
    seen = 0
    for crop in crops(count):
        logits, cam = session.run(["logits", CAM], {"image": crop})
        expected_logits, expected = maps(crop)
        got = cam[0] / (cam.shape[2] * cam.shape[3])
        difference = np.abs(expected - got)
        largest = max(largest, float(difference.max()))
        relative = max(relative, float((difference.max((1, 2)) / np.abs(expected).max((1, 2))).max()))
        logits_off = max(logits_off, float(np.abs(expected_logits - logits[0]).max()))
        seen += len(expected)
    print(f"fused CAM against autograd Grad-CAM, {seen} maps: largest difference {largest:.2e}, {relative:.2e} of a map's peak")
    print(f"largest difference of a logit: {logits_off:.2e}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cam", description=__doc__)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--weights", type=Path, help="final.pt that grader.onnx was exported from; needs torch")
    parser.add_argument("--count", type=int, default=8, help="phantoms to compare maps on")
    parser.add_argument("--pair", nargs=3, metavar=("BACKEND", "PRECISION", "ORDER"), help="one pair, as JSON")
    args = parser.parse_args(argv)
    if args.pair:
        print(json.dumps(pair(args.pair[0], args.pair[1], args.pair[2] == "1", args.runs)))
        return 0
    overhead(args.runs)
    if args.weights:
        against_autograd(args.weights, args.count)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
