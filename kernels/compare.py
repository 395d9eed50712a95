"""How far one array lies from another: the distances by which engines of different runtimes are held to agree."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Distance:
    """Of one output. `sqnr_db`: signal to quantisation noise, 10 log10(sum r^2 / sum (r - x)^2), infinite where nothing differs.
    `max_share`, `rms_share`: largest and root-mean-square difference, as a share of the reference's own spread (largest minus
    smallest value). `cosine`: of the angle between the two."""

    sqnr_db: float
    max_share: float
    rms_share: float
    cosine: float


_NEAR = 0.05  # of 0 or 1
_DECIDED = 0.9  # share of the values there
_MANY = 1000
NOWHERE = Distance(-np.inf, np.inf, np.inf, -1.0)  # another shape, or values that are not finite


def distance(reference: NDArray[np.floating], other: NDArray[np.floating]) -> Distance:
    """Shapes must be equal and every value finite; where they are not, the answer is as far as can be, never an error."""
    if reference.shape != other.shape or not (np.isfinite(reference).all() and np.isfinite(other).all()) or not reference.size:
        return NOWHERE
    r, x = reference.astype(np.float64).ravel(), other.astype(np.float64).ravel()
    difference = r - x
    noise, signal = float(difference @ difference), float(r @ r)
    spread = float(r.max() - r.min()) or max(float(np.abs(r).max()), 1e-12)  # one value alone has no spread
    length = float(np.sqrt(signal * (x @ x)))
    return Distance(
        float("inf") if noise == 0.0 else 10.0 * float(np.log10(max(signal, 1e-30) / noise)),
        float(np.abs(difference).max()) / spread,
        float(np.sqrt(noise / r.size)) / spread,
        float(r @ x) / length if length > 0 else float(noise == 0.0),
    )


def decided(values: NDArray[np.floating]) -> bool:
    """Whether this is a map of yes and no: many values, all in [0, 1], nearly all at one of the ends. What differs between two such
    maps is flipped, not noisy: decibels and the largest difference say nothing of it, the overlap does."""
    if values.size < _MANY or not np.isfinite(values).all() or values.min() < 0.0 or values.max() > 1.0:
        return False
    ends = float(np.mean((values <= _NEAR) | (values >= 1.0 - _NEAR)))
    return ends >= _DECIDED and bool((values > 0.5).any())


def overlap(reference: NDArray[np.floating], other: NDArray[np.floating]) -> float:
    """Dice of what lies above one half in both; 0 for another shape or values that are not finite, 1 where both have nothing."""
    if reference.shape != other.shape or not np.isfinite(other).all():
        return 0.0
    a, b = reference > 0.5, other > 0.5
    total = int(a.sum()) + int(b.sum())
    return 2.0 * int((a & b).sum()) / total if total else 1.0
