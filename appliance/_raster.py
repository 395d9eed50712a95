"""PNG or JPEG bytes -> grey pixels.

Hides both formats and how grey pictures are stored in colour. Size, completeness and kind are read from the heads of chunks
and from markers, before any pixel is decoded; decoding is left to the codec process.
"""

from __future__ import annotations

import struct
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from appliance import _codec
from appliance._limits import Limits
from appliance.errors import (
    ColourImage,
    InvalidStudy,
    NotAnImage,
    NotTwoDimensional,
    StudyTooLarge,
    TruncatedStudy,
    UndecodablePixels,
    UnsupportedSyntax,
)

PNG_MAGIC: Final = b"\x89PNG\r\n\x1a\n"
JPEG_MAGIC: Final = b"\xff\xd8\xff"
# A grey picture saved in colour: channels may differ by this share of the range, in at most this share of the pixels.
_GREY_TOLERANCE: Final = 12 / 255
_GREY_EXCEPTIONS: Final = 0.001


def _check_png(data: bytes, limits: Limits) -> tuple[int, int]:
    """Size, completeness and kind from the chunk heads, before any pixel is inflated. (rows, columns)."""
    if len(data) < 33 or data[12:16] != b"IHDR":
        raise TruncatedStudy("the PNG ends in its header", value=f"{len(data)} bytes")
    columns, rows, depth = struct.unpack_from(">IIB", data, 16)
    limits.check_size(rows, columns)
    if rows * columns * 4 * (2 if depth == 16 else 1) > 2 * limits.max_decoded_bytes:
        raise StudyTooLarge(f"the pixels need more than {2 * limits.max_decoded_bytes} bytes", value=f"{rows} x {columns}")
    at = 8
    for _ in range(limits.max_elements):
        if len(data) - at < 12:
            raise TruncatedStudy("the PNG ends early", value=f"{len(data)} bytes")
        length, name = struct.unpack_from(">I4s", data, at)
        if name == b"acTL":
            raise NotTwoDimensional("the PNG is animated")
        if name == b"IEND":
            return rows, columns
        at += 12 + length
    raise StudyTooLarge(f"the PNG has more than {limits.max_elements} chunks")


def _check_jpeg(data: bytes, limits: Limits) -> tuple[int, int]:
    """Size, completeness and kind from the markers, before any pixel is decoded. (rows, columns)."""
    at, sized, rows, columns = 2, False, 0, 0
    for _ in range(limits.max_elements):
        if len(data) - at < 4:
            raise TruncatedStudy("the JPEG ends in its header", value=f"{len(data)} bytes")
        if data[at] != 0xFF:
            raise UndecodablePixels("the JPEG's markers are broken", value=f"offset {at}")
        marker = data[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
            continue
        (length,) = struct.unpack_from(">H", data, at + 2)
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            if len(data) - at < 10:
                raise TruncatedStudy("the JPEG ends in its header", value=f"{len(data)} bytes")
            precision, rows, columns, components = struct.unpack_from(">BHHB", data, at + 4)
            if sized:
                raise UndecodablePixels("the JPEG states its size twice")
            sized = True
            limits.check_size(rows, columns)
            if marker > 0xC2 or precision != 8:
                raise UnsupportedSyntax(
                    "only 8-bit baseline and progressive JPEG files are read", value=f"SOF{marker & 15}, {precision} bits"
                )
            if components not in (1, 3):
                raise ColourImage("the JPEG is neither grey nor RGB", value=f"{components} components")
        if marker == 0xDA:
            break
        at += 2 + max(length, 2)
    if not sized:
        raise UndecodablePixels("the JPEG does not state its size")
    if data.rfind(b"\xff\xd9") < at:
        raise TruncatedStudy("the JPEG ends early", value=f"{len(data)} bytes")
    return rows, columns


def _grey(array: NDArray[Any]) -> NDArray[np.float32]:
    """H x W (x C) of 8 or 16 bits -> H x W float32. Raises ColourImage, InvalidStudy."""
    if array.dtype not in (np.uint8, np.uint16):
        raise InvalidStudy("a picture must have 8 or 16 bits per sample", value=array.dtype)
    if array.ndim == 2:
        return array.astype(np.float32)
    top = int(np.iinfo(array.dtype).max)
    if array.shape[2] not in (3, 4):
        raise ColourImage("the picture is neither grey nor RGB", value=f"{array.shape[2]} channels")
    if array.shape[2] == 4 and int(array[:, :, 3].min()) != top:
        raise InvalidStudy("the picture is partly transparent", value=int(array[:, :, 3].min()), remedy="Send it without transparency.")
    blue, green, red = (array[:, :, c] for c in range(3))
    spread = np.maximum(np.maximum(blue, green), red) - np.minimum(np.minimum(blue, green), red)
    coloured = float(np.count_nonzero(spread > _GREY_TOLERANCE * top)) / spread.size
    if coloured > _GREY_EXCEPTIONS:
        raise ColourImage("the picture is in colour", value=f"{100 * coloured:.1f} % of its pixels")
    if not spread.any():
        return green.astype(np.float32)
    grey = blue.astype(np.float32)
    grey += green
    grey += red
    grey /= np.float32(3)
    return grey


def read(data: bytes, limits: Limits) -> NDArray[np.float32]:
    """A PNG or a JPEG -> H x W float32, as stored: 0..255, or 0..65535 for a PNG of 16 bits. Raises StudyError, OutOfTime,
    BackendUnavailable."""
    # Orientation tags of cameras are not followed: coordinates in the report are those of the stored pixels.
    return _grey(_decoded(data, limits))


def read_colour(data: bytes, limits: Limits) -> NDArray[np.uint8]:
    """A PNG or a JPEG -> H x W x 3 uint8, RGB; grey is repeated, transparency dropped. Raises as `read`, and NotAnImage."""
    if not data.startswith((PNG_MAGIC, JPEG_MAGIC)):
        raise NotAnImage("a colour picture is a PNG or a JPEG", value=data[:8].hex())
    array = _decoded(data, limits)
    if array.dtype == np.uint16:
        array = (array >> 8).astype(np.uint8)
    if array.dtype != np.uint8 or (array.ndim == 3 and array.shape[2] not in (3, 4)):
        raise InvalidStudy("a picture must be grey or RGB, of 8 or 16 bits per sample", value=f"{array.dtype}, {array.shape}")
    out = np.repeat(array[:, :, None], 3, axis=2) if array.ndim == 2 else array[:, :, 2::-1]
    return np.ascontiguousarray(out)


def size_of(data: bytes, limits: Limits) -> tuple[int, int]:
    """(rows, columns) that a PNG or a JPEG states. Raises StudyError, also for what is not whole."""
    check = _check_png if data.startswith(PNG_MAGIC) else _check_jpeg
    return check(data, limits)


def _decoded(data: bytes, limits: Limits) -> NDArray[Any]:
    size_of(data, limits)
    array = _codec.decode(data, limits)
    limits.check_size(array.shape[0], array.shape[1])
    return array
