"""The fused heatmap: equal to Grad-CAM, and what it costs.

`python -m benchmarks.cam` times the grader with and without its map, INT8 and FP32, on each CPU runtime, in shuffled pairs.
With `--weights final.pt` (training environment) it also holds every map against autograd's Grad-CAM.
"""

from __future__ import annotations

import argparse
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


def overhead(runs: int) -> None:
    """Three graphs: the trained one (pool, linear), the fused one, and the fused one's INT8 form with and without the output."""
    import onnx

    plain = load_float32(WEIGHTS / "grader.onnx")
    fused, _ = attach_cam(plain)
    bundle = open_bundle()
    int8 = onnx.load_from_string(bundle.read(bundle.engine("grader").graph))
    image = crops(1)[0]
    for backend in backends.PREFERENCE:
        if not backends.probe(backend).available:
            continue
        for label, precision, a, b in (
            ("FP32", "f32", plain, fused),
            ("INT8", "int8", without_map(int8), int8),
        ):
            opened = [
                backends.load(backend).open(
                    m.SerializeToString(), signature_of(onnx.shape_inference.infer_shapes(m)), precision=precision, threads=0
                )
                for m in (a, b)
            ]
            pair = interleaved(lambda o=opened: o[0].run({"image": image}), lambda o=opened: o[1].run({"image": image}), runs)  # type: ignore[misc]
            extra = (1 / pair.ratio - 1) * 100
            print(
                f"{backend:12} {label}: without {pair.a.median_ms:.2f} ms, with map {pair.b.median_ms:.2f} ms, "
                f"extra {extra:+.1f} % (middle half {(1 / pair.ratio_p75 - 1) * 100:+.1f} to {(1 / pair.ratio_p25 - 1) * 100:+.1f} %)"
            )
            for o in opened:
                o.close()


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
    parser.add_argument("--runs", type=int, default=300)
    parser.add_argument("--weights", type=Path, help="final.pt that grader.onnx was exported from; needs torch")
    parser.add_argument("--count", type=int, default=8, help="phantoms to compare maps on")
    args = parser.parse_args(argv)
    overhead(args.runs)
    if args.weights:
        against_autograd(args.weights, args.count)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
