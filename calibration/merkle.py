"""A Merkle tree over digests: one root for a whole set, and short proofs that one member is in it.

The hashes are those of RFC 9162 (Certificate Transparency 2.0), section 2.1: a leaf is SHA-256(0x00 || digest), a node
SHA-256(0x01 || left || right), so no node can pass for a leaf. A site proves that one image was in a set with about log2(n)
hashes, none of which tells anything of the other images.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence

MAX_PATH = 64
_HEX = re.compile(r"[0-9a-f]{64}")


def _leaf(digest: str) -> bytes:
    return hashlib.sha256(b"\0" + bytes.fromhex(digest)).digest()


def _node(left: bytes, right: bytes) -> bytes:
    return hashlib.sha256(b"\1" + left + right).digest()


def _split(count: int) -> int:
    """The largest power of two below `count`, which is at least 2."""
    return 1 << (count - 1).bit_length() - 1


def _root(leaves: Sequence[bytes]) -> bytes:
    if len(leaves) == 1:
        return leaves[0]
    k = _split(len(leaves))
    return _node(_root(leaves[:k]), _root(leaves[k:]))


def root(digests: Sequence[str]) -> str:
    """Root over hexadecimal SHA-256 digests in the order given; that of the empty string for none."""
    return _root([_leaf(d) for d in digests]).hex() if digests else hashlib.sha256(b"").hexdigest()


def prove(digests: Sequence[str], index: int) -> list[str]:
    """Inclusion path of member `index`, from the leaf upwards (RFC 9162, 2.1.3.1). Raises IndexError."""
    if not 0 <= index < len(digests):
        raise IndexError(f"{index} of {len(digests)}")
    leaves = [_leaf(d) for d in digests]
    path: list[bytes] = []
    while len(leaves) > 1:
        k = _split(len(leaves))
        if index < k:
            path.append(_root(leaves[k:]))
            leaves = leaves[:k]
        else:
            path.append(_root(leaves[:k]))
            leaves, index = leaves[k:], index - k
    return [p.hex() for p in reversed(path)]


def verify(top: str, digest: str, index: int, count: int, path: Sequence[str]) -> bool:
    """Whether `digest` is member `index` of the `count` behind root `top` (RFC 9162, 2.1.3.2). False for what is malformed."""
    if not 0 <= index < count or len(path) > MAX_PATH or not all(_HEX.fullmatch(p) for p in (top, digest, *path)):
        return False
    at, last, value = index, count - 1, _leaf(digest)
    for step in (bytes.fromhex(p) for p in path):
        if last == 0:
            return False
        if at & 1 or at == last:
            value = _node(step, value)
            while not at & 1 and at:
                at, last = at >> 1, last >> 1
        else:
            value = _node(value, step)
        at, last = at >> 1, last >> 1
    return last == 0 and value.hex() == top
