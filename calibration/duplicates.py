"""Is this the same picture? Fingerprints that survive re-encoding, rescaling, another gamma, cut or padded borders and small shifts.

Hides the measure, in two steps. A 64-bit hash of the low frequencies (DCT) of the picture and of eleven crops of it finds
candidates among thousands in a moment. A candidate is then laid over the other picture by an affine map (ECC, Evangelidis and
Psarakis, PAMI 2008) and compared by normalised cross-correlation of a band of detail: pictures of the same anatomy share the
coarse, only the same picture shares the fine. Where only a manifest is at hand there is no picture to lay over; then the
hash alone decides, at a distance so small that crops and shifts escape it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from kernels.preprocess import normalise

SIDE = 64  # rows and columns of the picture that is compared
HASH_DISTANCE = 14  # bits of 64; one in 27 pairs of different patients is as near, and is then looked at
HASH_ALONE = 2  # bits; different patients came to 4
SAME = 0.90  # correlation; set from both sides, see docs/calibration.md
_BAND = (0.8, 4.0)  # standard deviations of the two Gaussians, in pixels of SIDE
_LARGEST_STRETCH, _LARGEST_SHIFT, _LEAST_OVERLAP, _MARGIN = 0.35, 0.3, 0.6, 3
# Shares cut from top, bottom, left, right.
_CROPS = (
    (0.0, 0.0, 0.0, 0.0),
    *((c, c, c, c) for c in (0.03, 0.06, 0.09)),
    *((0.08, 0.0, 0.0, 0.0), (0.0, 0.08, 0.0, 0.0), (0.0, 0.0, 0.08, 0.0), (0.0, 0.0, 0.0, 0.08)),
    *((0.08, 0.08, 0.0, 0.0), (0.0, 0.0, 0.08, 0.08), (0.04, 0.04, 0.0, 0.0), (0.0, 0.0, 0.04, 0.04)),
)

Plane = NDArray[np.float32]
Hashes = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Fingerprint:
    """`hashes`: 12 x 64 bits, the whole picture first. `plane`: SIDE x SIDE uint8, the picture itself: never written anywhere."""

    hashes: Hashes
    plane: NDArray[np.uint8]

    @property
    def hexadecimal(self) -> str:
        """The hash of the whole picture, 16 digits."""
        return np.packbits(self.hashes[0]).tobytes().hex()


def fingerprint(pixels: NDArray[np.float32]) -> Fingerprint:
    """H x W grey in any unit -> its fingerprint."""
    plane = np.asarray(cv2.resize(normalise(pixels), (SIDE, SIDE), interpolation=cv2.INTER_AREA), np.float32)
    big = cv2.resize(plane, (128, 128), interpolation=cv2.INTER_LINEAR)
    hashes = []
    for top, bottom, left, right in _CROPS:
        part = big[int(128 * top) : 128 - int(128 * bottom), int(128 * left) : 128 - int(128 * right)]
        low = cv2.dct(cv2.resize(part, (32, 32), interpolation=cv2.INTER_AREA))[:8, :8].ravel()
        hashes.append(low > np.median(low))
    return Fingerprint(np.array(hashes), np.rint((plane + 1.0) * 127.5).astype(np.uint8))


def bits(hexadecimal: str) -> Hashes:
    """The 64 bits of a hash as written. Raises ValueError."""
    raw = bytes.fromhex(hexadecimal)
    if len(raw) != 8:
        raise ValueError(f"a hash has 16 digits, not {2 * len(raw)}")
    return np.unpackbits(np.frombuffer(raw, np.uint8)).astype(bool)


def distances(crops: Hashes, wholes: Hashes) -> NDArray[np.float32]:
    """N x K x 64 and M x 64 -> N x M: bits that differ, least over the K crops."""
    a = crops.reshape(-1, 64).astype(np.float32) * 2 - 1
    b = wholes.astype(np.float32) * 2 - 1
    return np.asarray(((64 - a @ b.T) / 2).reshape(len(crops), -1, len(wholes)).min(axis=1), np.float32)


def candidates(ours: Sequence[Fingerprint], theirs: Sequence[Fingerprint]) -> list[tuple[int, int]]:
    """Pairs (ours, theirs) whose hashes are near enough to look closer; either side may be the cropped one."""
    if not ours or not theirs:
        return []
    a, b = np.array([f.hashes for f in ours]), np.array([f.hashes for f in theirs])
    near = np.minimum(distances(a, b[:, 0]), distances(b, a[:, 0]).T)
    return [(int(i), int(j)) for i, j in np.argwhere(near <= HASH_DISTANCE)]


def likeness(a: Fingerprint, b: Fingerprint) -> float:
    """Correlation in [-1, 1] of the fine detail of two pictures laid over one another; -1 where they cannot be."""
    first = _laid_over(a.plane, b.plane)
    # The search is not symmetric: from the larger field of view it finds what it misses from the smaller.
    return first if first >= SAME else max(first, _laid_over(b.plane, a.plane))


def _laid_over(fixed: NDArray[np.uint8], moving: NDArray[np.uint8]) -> float:
    p, q = fixed.astype(np.float32) / 127.5 + 1.0, moving.astype(np.float32) / 127.5 + 1.0
    start = np.eye(2, 3, dtype=np.float32)
    ends = (cv2.TERM_CRITERIA_EPS | cv2.TERM_CRITERIA_COUNT, 40, 1e-4)
    try:
        _, found = cv2.findTransformECC(p, q, start, cv2.MOTION_AFFINE, ends, None, 5)
    except cv2.error:  # it did not converge: nothing in common
        return -1.0
    matrix = np.asarray(found, np.float32)
    if np.abs(matrix[:, :2] - np.eye(2)).max() > _LARGEST_STRETCH or np.abs(matrix[:, 2]).max() > _LARGEST_SHIFT * SIDE:
        return -1.0
    back = cv2.WARP_INVERSE_MAP
    moved = np.asarray(cv2.warpAffine(q, matrix, (SIDE, SIDE), flags=cv2.INTER_LINEAR | back), np.float32)
    seen = cv2.warpAffine(np.ones_like(q), matrix, (SIDE, SIDE), flags=cv2.INTER_NEAREST | back) > 0
    seen[:_MARGIN] = seen[-_MARGIN:] = False
    seen[:, :_MARGIN] = seen[:, -_MARGIN:] = False
    return _correlation(_detail(p)[seen], _detail(moved)[seen]) if float(seen.mean()) >= _LEAST_OVERLAP else -1.0


def _detail(plane: Plane) -> Plane:
    return np.asarray(cv2.GaussianBlur(plane, (0, 0), _BAND[0]) - cv2.GaussianBlur(plane, (0, 0), _BAND[1]), np.float32)


def _correlation(a: Plane, b: Plane) -> float:
    a, b = a - a.mean(), b - b.mean()
    size = float(np.sqrt((a * a).sum(dtype=np.float64) * (b * b).sum(dtype=np.float64)))
    return float((a * b).sum(dtype=np.float64)) / size if size > 0 else -1.0
