"""Medians and percentiles of one array, as numpy's own to the bit, at a tenth of the cost where there are few values.

numpy's are made for any axis, method and weight; on a few hundred values most of their time is spent on finding out what was
asked for, and an image is measured with hundreds of such calls (`python -m benchmarks.path`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def median(values: NDArray[np.floating]) -> float:
    """As `numpy.median` of N > 0 numbers, none of them NaN."""
    half = values.size // 2
    if values.size % 2:
        return float(np.partition(values, half, axis=None)[half])
    ranked = np.partition(values, [half - 1, half], axis=None)
    return float((ranked[half - 1] + ranked[half]) / 2)


def percentile(values: NDArray[np.floating], share: float) -> float:
    """As `numpy.percentile` of N > 0 numbers, none of them NaN, at one share in percent."""
    return float(_at(values, [share])[0])


def percentiles(values: NDArray[np.floating], shares: Sequence[float]) -> list[float]:
    """As `numpy.percentile` at several shares in percent, which numpy works out in double precision, unlike a single one."""
    return [float(v) for v in _at(values, [np.float64(share) for share in shares])]


def _at(values: NDArray[np.floating], shares: Sequence[float]) -> list[np.floating]:
    last = values.size - 1
    places = [last * (share / 100) for share in shares]
    below = [min(int(place), last) for place in places]
    ranked = np.partition(values, sorted({k for i in below for k in (i, min(i + 1, last))}), axis=None)
    out = []
    for place, i in zip(places, below, strict=True):
        a, b, part = ranked[i], ranked[min(i + 1, last)], place - i
        # From the nearer neighbour, so that the last one is met exactly.
        out.append(a + (b - a) * part if part < 0.5 else b - (b - a) * (1 - part))
    return out
