"""Does the fused map equal autograd's Grad-CAM? `python -m models.cam_check --weights final.pt` says by how much it differs.

Grad-CAM of class k: alpha_c = mean over the map of d logit_k / d F_c, map = sum_c alpha_c F_c. For GAP -> linear,
alpha = W_k / (h w), so the fused map divided by h w must equal it to rounding. Checked on phantoms for every class.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from kernels.preprocess import normalise
from models import grader, phantom
from models.export import WEIGHTS, load_float32


def main(argv: list[str] | None = None) -> int:
    import onnxruntime as ort
    import torch

    from appliance.compiler.heatmap import attach_cam

    parser = argparse.ArgumentParser(prog="python -m models.cam_check", description=__doc__)
    parser.add_argument("--weights", type=Path, required=True, help="final.pt of a grader run, the one that grader.onnx was exported from")
    parser.add_argument("--count", type=int, default=8, help="phantoms to look at")
    args = parser.parse_args(argv)
    net = grader.network()
    net.load_state_dict(torch.load(args.weights, weights_only=True))
    net.eval()
    fused, _ = attach_cam(load_float32(WEIGHTS / "grader.onnx"))
    session = ort.InferenceSession(fused.SerializeToString(), providers=["CPUExecutionProvider"])
    # The file stores half-precision weights: give torch the same ones through the exported graph's own head.
    largest, largest_relative, logits_off, maps = 0.0, 0.0, 0.0, 0
    for seed in range(args.count):
        pixels, truth = phantom.draw(np.random.default_rng(seed), weighting="T2")
        for disc in truth.discs:
            x = grader.crop(normalise(pixels), disc.box_px)[None]
            logits, cam = session.run(["logits", "cam"], {"image": x})
            features = torch.from_numpy(x)
            for stage in net.stages:  # type: ignore[union-attr]
                features = stage(features)
            features = net.features(features).detach().requires_grad_()  # type: ignore[operator]
            out = net.head(features.mean((2, 3)))  # type: ignore[operator]
            logits_off = max(logits_off, float(np.abs(out.detach().numpy() - logits).max()))
            for k in range(out.shape[1]):
                (gradient,) = torch.autograd.grad(out[0, k], features, retain_graph=True)
                expected = (gradient.mean((2, 3), keepdim=True) * features).sum(1)[0].detach().numpy()
                got = cam[0, k] / (cam.shape[2] * cam.shape[3])
                largest = max(largest, float(np.abs(expected - got).max()))
                largest_relative = max(largest_relative, float(np.abs(expected - got).max() / np.abs(expected).max()))
                maps += 1
    print(f"{maps} maps: largest difference {largest:.2e} ({largest_relative:.2e} of the map's peak); logits differ by {logits_off:.2e}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
