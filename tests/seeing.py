"""Sessions that answer what a test wants a network to have seen."""

from __future__ import annotations

import copy

import numpy as np
from numpy.typing import NDArray

from models import detector, vertebra_ap

Array = NDArray[np.float32]


class Seeing:
    """A session that answers what it is given, whatever the image."""

    def __init__(self, outputs: dict[str, Array]) -> None:
        self.outputs = outputs

    def run(self, inputs: dict[str, Array]) -> dict[str, Array]:
        assert set(inputs) == {"image"}
        return copy.deepcopy(self.outputs)

    def close(self) -> None:
        pass


def maps_of(boxes: Array, score: float = 0.9) -> dict[str, Array]:
    """Detector maps that decode to these boxes of the network's input: the inverse of `vertebra_ap.decode`."""
    height, width = vertebra_ap.SPEC.input_hw
    out: dict[str, Array] = {}
    for s in vertebra_ap.STRIDES:
        out[f"class_{s}"] = np.full((1, 1, height // s, width // s), -9.0, np.float32)
        out[f"box_{s}"] = np.zeros((1, 4 * detector.BINS, height // s, width // s), np.float32)
    for x0, y0, x1, y1 in boxes:
        stride = next(s for s in vertebra_ap.STRIDES if max(x1 - x0, y1 - y0) / 2 / s < detector.BINS - 2)
        column, row = int((x0 + x1) / 2 / stride), int((y0 + y1) / 2 / stride)
        x, y = (column + 0.5) * stride, (row + 0.5) * stride
        out[f"class_{stride}"][0, 0, row, column] = np.log(score / (1 - score))
        for side, distance in enumerate((x - x0, y - y0, x1 - x, y1 - y)):
            low = int(distance // stride)
            share = distance / stride - low
            bins = out[f"box_{stride}"][0].reshape(4, detector.BINS, *out[f"box_{stride}"].shape[2:])
            bins[side, :, row, column] = -30.0
            bins[side, low, row, column] = np.log(max(1 - share, 1e-9))
            bins[side, low + 1, row, column] = np.log(max(share, 1e-9))
    return out
