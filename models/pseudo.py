"""Pseudo-labels: a first segmenter outlines the unlabelled mid-sagittal T1 and T2 slices, so that the next one learns them.

`python -m models.pseudo --data DIR --weights final.pt --out DIR` (or `--weights segmenter.onnx`) writes one index mask (0..3)
for each slice that passes the checks: as many discs as the patient has gradings for (one more or less at the cut edges), and
agreement with the drawn disc boxes where there are some. Slices of held-out patients get masks too, for looking at; recipes
take the train side only.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from kernels import mask as km
from kernels.nms import iou_matrix
from kernels.preprocess import letterbox, normalise
from models import data, segmenter
from models.export import torch_runner


def segment(net: object, image: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """H x W grey -> H x W class indices, averaged over the image and its mirror."""
    import torch

    x, back = letterbox(normalise(image.astype(np.float32)), (size, size))
    with torch.inference_mode():
        both = torch.from_numpy(np.concatenate([x, x[..., ::-1]]))
        logits = net(both)  # type: ignore[operator]
        logits = (logits[0] + logits[1].flip(-1)).numpy() / 2
    return np.asarray(back.map_to_source(np.ascontiguousarray(logits.transpose(1, 2, 0))).argmax(-1), dtype=np.uint8)


def network(weights: Path) -> object:
    """The segmenter of a training run's state dict, or of an exported ONNX file, as a function from N x 1 x H x W to logits."""
    import torch

    if weights.suffix != ".onnx":
        net = segmenter.network()
        net.load_state_dict(torch.load(weights, weights_only=True))
        return net.eval()
    return torch_runner(weights)


def believable(mask: NDArray[np.uint8], graded: int, drawn: NDArray[np.float32] | None) -> bool:
    found = km.discs(mask)
    if abs(len(found) - graded) > 1 or not (mask == km.CANAL).any():
        return False
    if drawn is not None and len(drawn):
        overlaps = iou_matrix(drawn, np.array([c.box for c in found], np.float32))
        return bool((overlaps.max(1) > 0.3).mean() >= 0.8)
    return True


def main(argv: list[str] | None = None) -> int:
    from tqdm import tqdm

    parser = argparse.ArgumentParser(prog="python -m models.pseudo", description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True, help="final.pt of a segmenter run, or an exported segmenter")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    net = network(args.weights)
    args.out.mkdir(parents=True, exist_ok=True)
    kept = 0
    paths = sorted((args.data / "lumbar_mri/midsagittal").glob("*.png"))
    for path in tqdm(paths, unit="slice"):
        image = data.read_grey(path)
        mask = segment(net, image, segmenter.SPEC.input_hw[0])
        graded = len(data.gradings(args.data).get(data.patient_of(path), {}))
        if believable(mask, graded, data.disc_boxes(args.data).get(path.name)):
            cv2.imwrite(str(args.out / path.name), mask)
            kept += 1
    print(f"{kept} of {len(paths)} slices kept in {args.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
