"""Arrays -> PNG files.

Hides the filter, the compressor and the chunks. OpenCV writes the same pixels with zlib; ISA-L's deflate takes a fifth of the
time for as many bytes (`python -m benchmarks.path --png`), and an overlay is mostly compression. Where ISA-L is not installed,
zlib does it: the same pixels, other bytes.
"""

from __future__ import annotations

import struct
import zlib

import cv2
import numpy as np
from numpy.typing import NDArray

try:
    from isal import isal_zlib as deflate
except ImportError:  # a platform without its wheel
    deflate = zlib  # type: ignore[misc]

Image = NDArray[np.uint8]

_LEVEL = 1  # of both; more takes longer for hardly fewer bytes of a scan
_GREY, _COLOUR, _PALETTE = 0, 2, 3
_UP = 2  # one filter for all rows: trying each takes more than twice as long for a twentieth of the bytes


def encode(pixels: Image, palette: Image | None = None, text: tuple[str, str] | None = None) -> bytes:
    """H x W grey, H x W x 3 (blue, green, red), or H x W indices into a `palette` of at most 256 x 4 (blue, green, red, alpha).

    `text` is (keyword, words) of one tEXt chunk, Latin-1, right after the header: a reader meets it before any pixel.
    """
    height, width = pixels.shape[:2]
    colour = pixels.ndim == 3
    kind = _COLOUR if colour else _GREY if palette is None else _PALETTE
    chunks = [_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, kind, 0, 0, 0))]
    if text is not None:
        keyword, words = text
        chunks.append(_chunk(b"tEXt", keyword.encode("latin-1") + b"\0" + words.encode("latin-1", "replace")))
    if palette is not None:
        chunks += [_chunk(b"PLTE", palette[:, 2::-1].tobytes()), _chunk(b"tRNS", palette[:, 3].tobytes())]
    rows = np.asarray(cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB), np.uint8) if colour else pixels
    chunks += [_chunk(b"IDAT", deflate.compress(_filtered(rows.reshape(height, -1)), _LEVEL)), _chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def _filtered(rows: Image) -> Image:
    """Each row less the one above it, behind the filter's number."""
    out: Image = np.empty((rows.shape[0], rows.shape[1] + 1), np.uint8)
    out[:, 0] = _UP
    out[:1, 1:] = rows[:1]
    np.subtract(rows[1:], rows[:-1], out=out[1:, 1:])
    return out


def _chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(body, zlib.crc32(name)))
