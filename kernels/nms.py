"""Box arithmetic: intersection over union and greedy non-maximum suppression."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def iou_matrix(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float32]:
    """N x 4 and M x 4 boxes (x0, y0, x1, y1) -> N x M intersection over union; 0 where a union is empty."""
    a = np.asarray(a, np.float32).reshape(-1, 4)
    b = np.asarray(b, np.float32).reshape(-1, 4)
    top_left = np.maximum(a[:, None, :2], b[None, :, :2])
    bottom_right = np.minimum(a[:, None, 2:], b[None, :, 2:])
    side = np.clip(bottom_right - top_left, 0, None)
    overlap = side[..., 0] * side[..., 1]
    area_a = (a[:, 2] - a[:, 0]) * (a[:, 3] - a[:, 1])
    area_b = (b[:, 2] - b[:, 0]) * (b[:, 3] - b[:, 1])
    union = area_a[:, None] + area_b[None] - overlap
    return np.asarray(np.where(union > 0, overlap / np.maximum(union, 1e-9), 0.0), dtype=np.float32)


def nms(boxes: NDArray[np.float32], scores: NDArray[np.float32], iou_limit: float = 0.5, keep_at_most: int = 100) -> NDArray[np.int64]:
    """Greedy NMS of one class. N x 4, N -> indices kept, best score first; ties go to the lower index."""
    order = np.argsort(-scores, kind="stable")
    overlaps = iou_matrix(boxes[order], boxes[order])
    alive = np.ones(order.size, dtype=bool)
    kept: list[int] = []
    for i in range(order.size):
        if not alive[i]:
            continue
        kept.append(int(order[i]))
        if len(kept) >= keep_at_most:
            break
        alive &= overlaps[i] < iou_limit
    return np.array(kept, dtype=np.int64)


def nms_by_class(
    boxes: NDArray[np.float32],
    scores: NDArray[np.float32],
    classes: NDArray[np.int64],
    iou_limit: float = 0.5,
    keep_at_most: int = 100,
) -> NDArray[np.int64]:
    """Greedy NMS of each class by itself, at most `keep_at_most` of each. Indices kept, best score first; equals in the order of
    their classes."""
    kept = [np.zeros(0, np.int64)]
    for kind in np.unique(classes):
        own = np.flatnonzero(classes == kind)
        kept.append(own[nms(boxes[own], scores[own], iou_limit, keep_at_most)])
    every = np.concatenate(kept)
    return np.asarray(every[np.argsort(-scores[every], kind="stable")], np.int64)
