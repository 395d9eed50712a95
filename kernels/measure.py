"""Lengths and areas of one structure from its region of pixels."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Size:
    """Height and depth (length along the structure), and area; in millimetres where spacing was given, else pixels."""

    height: float
    depth: float
    area: float


def disc_size(pixels: NDArray[np.bool_], spacing: tuple[float, float] = (1.0, 1.0)) -> Size:
    """Size of a disc seen from the side. `spacing` is (row, column) in mm per pixel, or (1, 1) for pixels.

    The depth is the long side of the smallest enclosing rectangle; the height is area / depth, the mean height along the
    disc, after the area-based disc height index of Pfirrmann et al., Journal of Orthopaedic Research 2006.
    """
    rows, columns = np.flatnonzero(pixels.any(axis=1)), np.flatnonzero(pixels.any(axis=0))
    part = pixels[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] if rows.size else pixels[:0, :0]
    ys, xs = np.nonzero(part)
    if xs.size < 3:
        return Size(0.0, 0.0, float(xs.size) * spacing[0] * spacing[1])
    points = np.stack([xs * spacing[1], ys * spacing[0]], 1).astype(np.float32)
    (_, _), (a, b), _ = cv2.minAreaRect(points)
    # Points are pixel centres: one pixel more along each side.
    pixel = float(np.sqrt(spacing[0] * spacing[1]))
    depth = max(a, b) + pixel
    area = float(xs.size) * spacing[0] * spacing[1]
    return Size(area / depth, depth, area)
