"""Evidence maps: from network output to values in [0, 1] over source pixels, and the check that a map tells the truth."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray


def positive_unit(evidence: NDArray[np.float32]) -> NDArray[np.float32]:
    """Grad-CAM's final step: negative evidence to 0, the largest value to 1. All zeros where nothing is positive."""
    positive = np.maximum(evidence, 0.0)
    peak = float(positive.max()) if positive.size else 0.0
    return np.asarray(positive / peak if peak > 0 else positive, dtype=np.float32)


def cam_residual(cam: NDArray[np.float32], bias: NDArray[np.float32], logits: NDArray[np.float32]) -> float:
    """Largest |mean(cam_k) + b_k - logit_k|: for a GAP -> linear head it is zero, so anything else is not this map.

    Shapes C x h x w, C, C.
    """
    return float(np.abs(cam.mean(axis=(1, 2)) + bias - logits).max())


def paste(crop_map: NDArray[np.float32], matrix: NDArray[np.float64], crop_size: int, source_hw: tuple[int, int]) -> NDArray[np.float32]:
    """A map over a square crop -> H x W over the source, zero outside the crop.

    `matrix` is 2 x 3, source edges -> crop edges, as the crop was cut; the map's cells lie at any stride of the crop.
    """
    height, width = source_hw
    stride = crop_size / crop_map.shape[0]
    full = np.vstack([matrix, [0.0, 0.0, 1.0]])
    corners = np.linalg.inv(full) @ np.array([[0.0, crop_size], [0.0, crop_size], [1.0, 1.0]])
    x0, x1 = (int(np.clip(v, 0, width)) for v in (np.floor(corners[0, 0]), np.ceil(corners[0, 1])))
    y0, y1 = (int(np.clip(v, 0, height)) for v in (np.floor(corners[1, 0]), np.ceil(corners[1, 1])))
    out = np.zeros((height, width), np.float32)
    if x1 <= x0 or y1 <= y0:
        return out
    # Only the crop's own rectangle is computed: the source may be ten times as large.
    scale = matrix[0, 0] / stride
    local = np.array(
        [
            [scale, 0.0, (matrix[0, 0] * (x0 + 0.5) + matrix[0, 2]) / stride - 0.5],
            [0.0, scale, (matrix[1, 1] * (y0 + 0.5) + matrix[1, 2]) / stride - 0.5],
        ]
    )
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    out[y0:y1, x0:x1] = cv2.warpAffine(crop_map, local, (x1 - x0, y1 - y0), flags=flags, borderMode=cv2.BORDER_REPLICATE)
    return out
