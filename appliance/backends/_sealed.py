"""A blob that is more than one runtime's file: a magic number, a canonical JSON header, the parts.

    magic (8 bytes) | header length (4, little-endian) | header | zeros to a multiple of 64 | part | zeros | part ...

The header names the parts with their lengths and digests, so that a torn or altered blob is refused here and never reaches a
native parser. What a backend needs to know beside the runtime's own file stands in the header rather than in the file's
metadata: the file stays exactly what the converter wrote, and a board can read the header without a flatbuffer library.
"""

from __future__ import annotations

import hashlib
import json
import struct
from typing import Any

from appliance.errors import BackendFailed

MAGIC_BYTES = 8
MAX_HEADER_BYTES = 1 << 20
MAX_PARTS = 8
_ALIGNED = 64
_LENGTH = struct.Struct("<I")


def seal(magic: bytes, header: dict[str, Any], parts: dict[str, bytes]) -> bytes:
    """`header` (JSON values, no key "parts") and `parts` as one blob. The same input gives the same bytes."""
    table = [{"name": name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in parts.items()]
    text = json.dumps({**header, "parts": table}, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()
    if len(magic) != MAGIC_BYTES or len(text) > MAX_HEADER_BYTES or len(parts) > MAX_PARTS:
        raise ValueError("a sealed blob needs an 8-byte magic number, a header below 1 MiB and few parts")
    out = bytearray(magic + _LENGTH.pack(len(text)) + text)
    for data in parts.values():
        out += bytes(-len(out) % _ALIGNED) + data
    return bytes(out)


def unseal(magic: bytes, blob: bytes, what: str) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The header and the parts of a blob made by `seal`. Raises BackendFailed, naming `what`, where anything does not fit."""
    start = MAGIC_BYTES + _LENGTH.size
    if blob[:MAGIC_BYTES] != magic or len(blob) < start:
        raise BackendFailed(f"{what}: not an engine of this kind", value=blob[:MAGIC_BYTES])
    (length,) = _LENGTH.unpack_from(blob, MAGIC_BYTES)
    if length > MAX_HEADER_BYTES or start + length > len(blob):
        raise BackendFailed(f"{what}: the header is cut short", value=f"{length} bytes")
    try:
        header = json.loads(blob[start : start + length])
        table = [(str(p["name"]), int(p["bytes"]), str(p["sha256"])) for p in header.pop("parts")]
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        raise BackendFailed(f"{what}: the header cannot be read") from error
    parts: dict[str, bytes] = {}
    at = start + length
    for name, size, digest in table[:MAX_PARTS]:
        at += -at % _ALIGNED
        data = blob[at : at + size] if size >= 0 else b""
        if len(data) != size or hashlib.sha256(data).hexdigest() != digest:
            raise BackendFailed(f"{what}: part {name} is damaged", value=f"{len(data)} of {size} bytes")
        parts[name] = data
        at += size
    if at != len(blob) or len(table) > MAX_PARTS:
        raise BackendFailed(f"{what}: bytes are left over after the last part", value=len(blob) - at)
    return header, parts
