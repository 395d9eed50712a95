"""Source pixels -> network input: one definition, used by training, calibration and the device alike.

Change anything here and `PREPROCESS_VERSION` must change too: calibration manifests and bundles record it.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from kernels import rank

PREPROCESS_VERSION = "2"
PERCENTILES = (1.0, 99.5)
CANVAS_ABOVE = -0.96  # normalised; JPEG leaves traces on a black canvas
CANVAS_SHARE = 0.5  # of the image: content below this is cut out of its canvas


@dataclass(frozen=True)
class Letterbox:
    """Affine map between source pixels and input pixels: `input = source * scale + offset`.

    Pixel centres lie at integer + 0.5; coordinates here are edges (a box of the whole source is [0, 0, w, h]).
    """

    scale: float
    offset_x: float
    offset_y: float
    source_hw: tuple[int, int]
    input_hw: tuple[int, int]
    window: tuple[int, int, int, int] | None = None  # (y0, y1, x0, x1) of the source that the input shows; None: all

    def boxes_to_source(self, boxes: NDArray[np.float32]) -> NDArray[np.float32]:
        """N x 4 boxes (x0, y0, x1, y1) in input pixels -> source pixels, clipped to the image."""
        out = np.asarray(boxes, dtype=np.float32).reshape(-1, 4).copy()
        out[:, 0::2] = (out[:, 0::2] - self.offset_x) / self.scale
        out[:, 1::2] = (out[:, 1::2] - self.offset_y) / self.scale
        height, width = self.source_hw
        out[:, 0::2] = out[:, 0::2].clip(0, width)
        out[:, 1::2] = out[:, 1::2].clip(0, height)
        return out

    def map_to_source(self, plane: NDArray[np.float32], interpolation: int = cv2.INTER_LINEAR, outside: float = 0.0) -> NDArray[np.float32]:
        """h x w (or h x w x C) map over the network input, at any stride -> H x W (x C) in source pixels.

        What the input does not show (see `window`) is `outside`.
        """
        height, width = self.source_hw
        stride_x = self.input_hw[1] / plane.shape[1]
        stride_y = self.input_hw[0] / plane.shape[0]
        # Centres: source (x + .5) -> input (x + .5) * scale + offset -> plane index ... / stride - .5
        matrix = np.array(
            [
                [self.scale / stride_x, 0.0, (0.5 * self.scale + self.offset_x) / stride_x - 0.5],
                [0.0, self.scale / stride_y, (0.5 * self.scale + self.offset_y) / stride_y - 0.5],
            ]
        )
        flags = interpolation | cv2.WARP_INVERSE_MAP
        warped = cv2.warpAffine(plane, matrix, (width, height), flags=flags, borderMode=cv2.BORDER_REPLICATE)
        out = np.asarray(warped, dtype=plane.dtype)
        if self.window is not None:
            # The network never saw the canvas: without this the edge of the content would go on through it.
            y_from, y_to, x_from, x_to = self.window
            out[:y_from] = out[y_to:] = outside
            out[:, :x_from] = out[:, x_to:] = outside
        return out


def normalise(pixels: NDArray[np.float32]) -> NDArray[np.float32]:
    """H x W intensities in any unit -> float32 in [-1, 1].

    The 1st and 99.5th percentile of the pixels above the minimum (scanners pad with it) become -1 and 1. A constant
    image becomes all -1.
    """
    low_all = float(pixels.min())
    # Every second pixel each way: percentiles of a quarter of the image differ by less than one grey level.
    sample = pixels[::2, ::2]
    sample = sample[sample > low_all]
    if sample.size < 16:
        sample = pixels.ravel()
    low, high = rank.percentiles(sample, PERCENTILES)
    if high - low < 1e-6:
        return np.full(pixels.shape, -1.0, dtype=np.float32)
    scaled = pixels.astype(np.float32)
    scaled -= low
    scaled *= np.float32(2.0 / (high - low))
    scaled -= np.float32(1.0)
    return np.asarray(np.clip(scaled, -1.0, 1.0, out=scaled), dtype=np.float32)


def content_window(normalised: NDArray[np.float32]) -> tuple[int, int, int, int]:
    """(y0, y1, x0, x1): the part of the image that is not border, or the whole of it.

    Exports and screenshots often put a scan on a black canvas, where the spine would become too small to find. Rows and
    columns without a pixel above the darkest are cut, but only where they are more than half of the image: a usual margin
    is what the networks learnt with.
    """
    height, width = normalised.shape
    bright = normalised > CANVAS_ABOVE
    rows, columns = np.flatnonzero(bright.any(axis=1)), np.flatnonzero(bright.any(axis=0))
    if not rows.size:
        return 0, height, 0, width
    window = int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1
    area = (window[1] - window[0]) * (window[3] - window[2])
    return window if area < CANVAS_SHARE * height * width else (0, height, 0, width)


def letterbox(normalised: NDArray[np.float32], input_hw: tuple[int, int]) -> tuple[NDArray[np.float32], Letterbox]:
    """H x W in [-1, 1] -> (1 x 1 x h x w float32 in [-1, 1], the map back).

    A black canvas around the content is cut (`content_window`); aspect ratio kept, centred, padded with -1.
    """
    y_from, y_to, x_from, x_to = content_window(normalised)
    part = normalised[y_from:y_to, x_from:x_to]
    height, width = part.shape
    out_h, out_w = input_hw
    scale = min(out_h / height, out_w / width)
    new_w, new_h = max(1, round(width * scale)), max(1, round(height * scale))
    shrink = scale < 1.0
    resized = cv2.resize(part, (new_w, new_h), interpolation=cv2.INTER_AREA if shrink else cv2.INTER_LINEAR)
    x0, y0 = (out_w - new_w) // 2, (out_h - new_h) // 2
    canvas = np.full((1, 1, out_h, out_w), -1.0, dtype=np.float32)
    canvas[0, 0, y0 : y0 + new_h, x0 : x0 + new_w] = resized
    source_hw = (normalised.shape[0], normalised.shape[1])
    window = (y_from, y_to, x_from, x_to)
    seen = None if window == (0, source_hw[0], 0, source_hw[1]) else window
    back = Letterbox(scale, x0 - x_from * scale, y0 - y_from * scale, source_hw, (out_h, out_w), seen)
    return canvas, back
