"""Bytes -> one 2D grey `Instance`. Refuses what cannot be read for certain; never guesses.

Hides the file formats: DICOM's encodings and their usual faults, PNG, JPEG, and the process that runs codecs.

- The DICOM header is walked here, iteratively and within `Limits`, and only the elements that matter are interpreted: a
  general parser inflates, recurses and allocates as a hostile file tells it to. Nothing here prints or warns; what was
  tolerated is in `Instance.notes`.
- Uncompressed pixels are read in this process. Compressed ones (JPEG, JPEG-LS, JPEG 2000, RLE, PNG) are decoded by
  `_decode` in a warm process of its own, with a limit on memory, processor time and wall time; when it dies, the file is
  refused and the next one gets a fresh process.
- Pixels keep their full range: the VOI window is reported (`Instance.window`) and not applied, for CR and DX as for MR,
  because the network normalises by percentiles and a window may cut off what it needs. The modality LUT or the rescale
  slope and intercept are applied. MONOCHROME1 is inverted within its own range. Pixels marked as padding take the darkest
  other value.
- Spacing that makes no sense (not two numbers, not positive, above 100 mm) is unknown spacing with a note: lengths are then
  given in pixels, which is true, where a refusal would lose the answer for a fault in one header field.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import math
import os
import re
import socket
import stat
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from appliance import _decode
from appliance.errors import (
    BackendUnavailable,
    ColourImage,
    EmptyPixels,
    InvalidStudy,
    NoPixels,
    NotAnImage,
    NotTwoDimensional,
    OutOfTime,
    SpineboxError,
    StudyTooLarge,
    TruncatedStudy,
    UndecodablePixels,
    UnsupportedSyntax,
    UsageError,
    WrongModality,
)

MODALITIES: Final = ("MR", "CR", "DX")
MAX_SPACING_MM: Final = 100.0

Buffer = bytes | bytearray


@dataclass(frozen=True)
class Limits:
    """What one file may cost. Sizes in bytes, times in seconds; every number must be positive.

    `max_decoded_bytes` bounds the stored pixels and the inflated data set; `decode_memory_bytes` is the address space that a
    codec may add; `max_elements` counts data elements, items and fragments, at any depth.
    """

    max_bytes: int = 64 << 20
    max_rows: int = 4096
    max_columns: int = 4096
    max_pixels: int = 4096 * 4096
    max_decoded_bytes: int = 96 << 20
    max_sequence_depth: int = 32
    max_elements: int = 250_000
    decode_timeout_s: float = 15.0
    decode_memory_bytes: int = 512 << 20

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise ValueError(f"{name} must be positive, not {value}")


DEFAULT_LIMITS: Final = Limits()


@dataclass(frozen=True, eq=False)
class Instance:
    """One image.

    `pixels`: H x W float32, read-only, all finite, larger = brighter, in the units of the modality (MR: arbitrary).
    `spacing_mm`: (between rows, between columns), or None where unknown; `spacing_kind` says what it measures: "patient"
    (PixelSpacing of MR), "detector" (ImagerPixelSpacing of CR and DX: magnified, not patient millimetres), "calibrated"
    (PixelSpacing of CR and DX) or "film" (NominalScannedPixelSpacing).
    `view`: "sagittal", "coronal", "axial" (MR, from the orientation), the ViewPosition code such as "AP" (CR, DX), or None.
    `weighting`: "T1", "T2", or None where the header does not say it clearly. `window`: (centre, width) of the VOI window, in
    the units of `pixels`, or None. `notes`: what was odd and tolerated. `source`: JSON-ready, for `Report.source`; it holds
    identifiers of the object, never the patient's name, number or birth date.
    """

    pixels: NDArray[np.float32]
    spacing_mm: tuple[float, float] | None
    modality: str | None
    view: str | None
    weighting: str | None
    sha256: str
    format: str
    source: dict[str, Any]
    spacing_kind: str | None = None
    window: tuple[float, float] | None = None
    notes: tuple[str, ...] = ()


# --- Transfer syntaxes -------------------------------------------------------------------------------------------------------

_NATIVE, _DEFLATED, _ENCAPSULATED = "native", "deflated", "encapsulated"
_IMPLICIT_LE: Final = "1.2.840.10008.1.2"
_EXPLICIT_LE: Final = "1.2.840.10008.1.2.1"
_EXPLICIT_BE: Final = "1.2.840.10008.1.2.2"
_DEFLATED_LE: Final = "1.2.840.10008.1.2.1.99"

SYNTAXES: Final[dict[str, tuple[str, str]]] = {
    _IMPLICIT_LE: ("Implicit VR Little Endian", _NATIVE),
    _EXPLICIT_LE: ("Explicit VR Little Endian", _NATIVE),
    _EXPLICIT_BE: ("Explicit VR Big Endian", _NATIVE),
    _DEFLATED_LE: ("Deflated Explicit VR Little Endian", _DEFLATED),
    "1.2.840.10008.1.2.5": ("RLE Lossless", _ENCAPSULATED),
    "1.2.840.10008.1.2.4.50": ("JPEG Baseline", _ENCAPSULATED),
    "1.2.840.10008.1.2.4.51": ("JPEG Extended", _ENCAPSULATED),
    "1.2.840.10008.1.2.4.57": ("JPEG Lossless", _ENCAPSULATED),
    "1.2.840.10008.1.2.4.70": ("JPEG Lossless, first-order prediction", _ENCAPSULATED),
    "1.2.840.10008.1.2.4.80": ("JPEG-LS Lossless", _ENCAPSULATED),
    "1.2.840.10008.1.2.4.81": ("JPEG-LS Near-Lossless", _ENCAPSULATED),
    "1.2.840.10008.1.2.4.90": ("JPEG 2000 Lossless", _ENCAPSULATED),
    "1.2.840.10008.1.2.4.91": ("JPEG 2000", _ENCAPSULATED),
}
"""Transfer syntax UID -> (name, how its pixels are stored): everything that can be read."""

_DICOMDIR: Final = "1.2.840.10008.1.3.10"
_SOP_MODALITY: Final = {
    "1.2.840.10008.5.1.4.1.1.4": "MR",
    "1.2.840.10008.5.1.4.1.1.4.1": "MR",
    "1.2.840.10008.5.1.4.1.1.1": "CR",
    "1.2.840.10008.5.1.4.1.1.1.1": "DX",
}

# --- Walking a data set ------------------------------------------------------------------------------------------------------

_UNDEFINED: Final = 0xFFFFFFFF
_ITEM, _ITEM_END, _SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD
_PIXEL_DATA, _FLOAT_PIXELS, _DOUBLE_PIXELS = 0x7FE00010, 0x7FE00008, 0x7FE00009
_PIXEL_TAGS: Final = frozenset({_PIXEL_DATA, _FLOAT_PIXELS, _DOUBLE_PIXELS})
_LONG_VRS: Final = frozenset({b"OB", b"OD", b"OF", b"OL", b"OW", b"OV", b"SQ", b"UC", b"UN", b"UR", b"UT", b"SV", b"UV"})
_SHORT_VRS: Final = frozenset(
    {b"AE", b"AS", b"AT", b"CS", b"DA", b"DS", b"DT", b"FD", b"FL", b"IS", b"LO", b"LT", b"PN", b"SH", b"SL", b"SS", b"ST", b"TM"}
    | {b"UI", b"UL", b"US"}
)
_RAW_VRS: Final = frozenset({b"OB", b"OD", b"OF", b"OL", b"OW", b"OV"})

_SOP_CLASS, _SOP_INSTANCE, _MODALITY = 0x00080016, 0x00080018, 0x00080060
_SERIES_DESCRIPTION, _ACQUISITION_CONTRAST = 0x0008103E, 0x00089209
_SCANNING_SEQUENCE, _REPETITION_TIME, _ECHO_TIME = 0x00180020, 0x00180080, 0x00180081
_IMAGER_SPACING, _SCANNED_SPACING, _VIEW_POSITION = 0x00181164, 0x00182010, 0x00185101
_STUDY_UID, _SERIES_UID, _INSTANCE_NUMBER, _POSITION, _ORIENTATION = 0x0020000D, 0x0020000E, 0x00200013, 0x00200032, 0x00200037
_SAMPLES, _PHOTOMETRIC, _FRAMES, _ROWS, _COLUMNS, _PIXEL_SPACING = 0x00280002, 0x00280004, 0x00280008, 0x00280010, 0x00280011, 0x00280030
_ALLOCATED, _STORED, _HIGH_BIT, _REPRESENTATION = 0x00280100, 0x00280101, 0x00280102, 0x00280103
_PADDING, _PADDING_LIMIT, _CENTRE, _WIDTH, _INTERCEPT, _SLOPE = 0x00280120, 0x00280121, 0x00281050, 0x00281051, 0x00281052, 0x00281053
_LUT_SEQUENCE, _LUT_DESCRIPTOR, _LUT_DATA = 0x00283000, 0x00283002, 0x00283006

_WANTED: Final = frozenset(
    {_SOP_CLASS, _SOP_INSTANCE, _MODALITY, _SERIES_DESCRIPTION, _ACQUISITION_CONTRAST, _SCANNING_SEQUENCE, _REPETITION_TIME, _ECHO_TIME}
    | {_IMAGER_SPACING, _SCANNED_SPACING, _VIEW_POSITION, _STUDY_UID, _SERIES_UID, _INSTANCE_NUMBER, _POSITION, _ORIENTATION}
    | {_SAMPLES, _PHOTOMETRIC, _FRAMES, _ROWS, _COLUMNS, _PIXEL_SPACING, _ALLOCATED, _STORED, _HIGH_BIT, _REPRESENTATION}
    | {_PADDING, _PADDING_LIMIT, _CENTRE, _WIDTH, _INTERCEPT, _SLOPE}
)
# Enhanced objects keep these two levels down: functional groups (shared, then per frame) > this macro > this element.
_FUNCTIONAL_GROUPS: Final = frozenset({0x52009229, 0x52009230})
_MACROS: Final = {
    (0x00289110, _PIXEL_SPACING): _PIXEL_SPACING,
    (0x00209116, _ORIENTATION): _ORIENTATION,
    (0x00209113, _POSITION): _POSITION,
    (0x00289145, _SLOPE): _SLOPE,
    (0x00289145, _INTERCEPT): _INTERCEPT,
    (0x00289132, _CENTRE): _CENTRE,
    (0x00289132, _WIDTH): _WIDTH,
    (0x00189226, _ACQUISITION_CONTRAST): _ACQUISITION_CONTRAST,
}
# The longest value that is copied out of a header; a LUT has at most 65 536 entries of two bytes.
_MAX_VALUE_BYTES: Final = 131_072
_MAX_TEXT_BYTES: Final = 1024
_MAX_NOTES: Final = 16


class _Cut(Exception):
    """The buffer ended inside an element, at top level."""


@dataclass
class _Pixels:
    """Where the pixel element's value lies in the buffer: one run of bytes, or one per fragment."""

    tag: int
    vr: bytes
    runs: list[tuple[int, int]]
    encapsulated: bool
    cut: bool


@dataclass
class _Frame:
    """An open data set, sequence or item: it ends at `limit`, or earlier at its delimiter where `undefined`."""

    limit: int
    undefined: bool
    is_sequence: bool
    implicit: bool
    tag: int


@dataclass
class _Header:
    """The wanted elements of one data set, undecoded, with the byte order that they need."""

    little: bool
    syntax: str | None
    values: dict[int, bytes] = field(default_factory=dict)
    grouped: dict[int, bytes] = field(default_factory=dict)
    lut: dict[int, bytes] = field(default_factory=dict)
    pixels: _Pixels | None = None
    notes: list[str] = field(default_factory=list)

    def note(self, text: str) -> None:
        if len(self.notes) < _MAX_NOTES and text not in self.notes:
            self.notes.append(text)

    def raw(self, tag: int) -> bytes:
        return self.values.get(tag) or self.grouped.get(tag, b"")

    def text(self, tag: int) -> str:
        """The value as ASCII without padding, "" where absent; undecodable bytes become "?"."""
        value = self.raw(tag)[:_MAX_TEXT_BYTES].decode("ascii", "replace").replace("\ufffd", "?")
        return value.strip(" \0\r\n\t")

    def number(self, tag: int, name: str) -> int | None:
        """An unsigned 16-bit element, None where absent or empty. Raises InvalidStudy where it has another length."""
        value = self.values.get(tag, b"")
        if not value:
            return None
        if len(value) != 2:
            raise InvalidStudy(f"{name} has {len(value)} bytes instead of 2", value=value[:8].hex())
        return int(struct.unpack("<H" if self.little else ">H", value)[0])

    def decimals(self, tag: int) -> list[float] | None:
        """A decimal string of one or more numbers; [] where absent or empty, None where it is not numbers."""
        text = self.text(tag)
        if not text:
            return []
        out = []
        for part in text.split("\\"):
            if not _DECIMAL.fullmatch(part.strip(" \0")):
                return None
            out.append(float(part.strip(" \0")))
        return out


# Infinity and NaN are no decimal strings, but writers produce them: recognise them to name them.
_DECIMAL: Final = re.compile(r"[+-]?(\d{1,40}(\.\d{0,40})?|\.\d{1,40})([eE][+-]?\d{1,4})?|[+-]?(nan|inf|infinity)", re.IGNORECASE)
_INTEGER: Final = re.compile(r"[+-]?\d{1,12}")
_UID: Final = re.compile(r"\d+(\.\d+)*")


class _Walker:
    """One pass over a data set, without recursion: fills a `_Header` with what is wanted, and stops at the pixel data."""

    def __init__(self, buffer: Buffer, header: _Header, limits: Limits, stop_after: int | None) -> None:
        self.buffer = buffer
        self.header = header
        self.limits = limits
        self.stop_after = stop_after
        order = "<" if header.little else ">"
        self.two_shorts = struct.Struct(order + "HH").unpack_from
        self.short = struct.Struct(order + "H").unpack_from
        self.long = struct.Struct(order + "I").unpack_from
        self.item = b"\xfe\xff\x00\xe0" if header.little else b"\xff\xfe\xe0\x00"
        self.count = 0

    def tick(self) -> None:
        self.count += 1
        if self.count > self.limits.max_elements:
            raise StudyTooLarge(f"the header has more than {self.limits.max_elements} elements", value=self.count)

    def element(self, at: int, limit: int, implicit: bool) -> tuple[int, bytes, int, int]:
        """(tag, VR or b"", offset of the value, its length or _UNDEFINED). Raises _Cut where the head does not fit."""
        if limit - at < 8:
            raise _Cut
        group, number = self.two_shorts(self.buffer, at)
        tag = group << 16 | number
        if implicit or group == 0xFFFE:
            return tag, b"", at + 8, self.long(self.buffer, at + 4)[0]
        vr = bytes(self.buffer[at + 4 : at + 6])
        if vr in _SHORT_VRS:
            return tag, vr, at + 8, self.short(self.buffer, at + 6)[0]
        unknown = vr.isalpha() and vr.isupper()
        if vr in _LONG_VRS or (unknown and self.buffer[at + 6] == 0 == self.buffer[at + 7]):
            if limit - at < 12:
                raise _Cut
            return tag, vr, at + 12, self.long(self.buffer, at + 8)[0]
        if unknown:
            self.header.note("a value representation is not one of DICOM's")
            return tag, vr, at + 8, self.short(self.buffer, at + 6)[0]
        # Some writers change to implicit elements in the middle of an explicit data set.
        self.header.note("an element without a value representation in an explicit data set")
        return tag, b"", at + 8, self.long(self.buffer, at + 4)[0]

    def fragments(self, at: int, limit: int) -> tuple[list[tuple[int, int]], int, bool]:
        """The items of an encapsulated value: (offset and length of each), offset behind, whether the data ended first."""
        runs: list[tuple[int, int]] = []
        while True:
            if limit - at < 8:
                return runs, limit, True
            self.tick()
            group, number = self.two_shorts(self.buffer, at)
            length = self.long(self.buffer, at + 4)[0]
            tag = group << 16 | number
            if tag == _SEQUENCE_END:
                return runs, at + 8, False
            if tag != _ITEM or length == _UNDEFINED:
                raise InvalidStudy("the pixel data's fragments are broken", value=f"({group:04X},{number:04X}) length {length}")
            if length > limit - at - 8:
                runs.append((at + 8, limit - at - 8))
                return runs, limit, True
            runs.append((at + 8, length))
            at += 8 + length

    def keep(self, stack: list[_Frame], tag: int, start: int, length: int) -> None:
        """Copy a value out where it is wanted, at top level or in one of the known sequences."""
        if length > _MAX_VALUE_BYTES:
            return
        into: dict[int, bytes]
        if len(stack) == 1:
            if tag not in _WANTED:
                return
            into = self.header.values
        elif len(stack) == 3 and stack[1].tag == _LUT_SEQUENCE and tag in (_LUT_DESCRIPTOR, _LUT_DATA):
            into = self.header.lut
        elif len(stack) == 5 and stack[1].tag in _FUNCTIONAL_GROUPS and (stack[3].tag, tag) in _MACROS:
            into, tag = self.header.grouped, _MACROS[stack[3].tag, tag]
        else:
            return
        value = bytes(self.buffer[start : start + length])
        if into is self.header.values and into.get(tag, value) != value:
            raise InvalidStudy("an element is there twice with different values", value=f"({tag >> 16:04X},{tag & 0xFFFF:04X})")
        into.setdefault(tag, value)

    def recover(self, stack: list[_Frame], what: str) -> int:
        """Skip the innermost sequence whose length is known; where there is none, the rest cannot be found."""
        while len(stack) > 1:
            frame = stack.pop()
            if not frame.undefined:
                self.header.note(f"a sequence was skipped: {what}")
                return frame.limit
        raise InvalidStudy(what)

    def walk(self, at: int, implicit: bool) -> None:
        """Raises _Cut where the buffer ends inside an element, InvalidStudy and StudyTooLarge."""
        stack = [_Frame(len(self.buffer), False, False, implicit, 0)]
        while True:
            frame = stack[-1]
            if at >= frame.limit:
                if len(stack) == 1:
                    return
                if frame.undefined and frame.limit == stack[0].limit:
                    raise _Cut
                stack.pop()
                continue
            try:
                tag, vr, start, length = self.element(at, frame.limit, frame.implicit)
            except _Cut:
                if len(stack) > 1 and any(not f.undefined for f in stack[1:]):
                    at = self.recover(stack, "its last element does not fit")
                    continue
                if not any(self.buffer[at : frame.limit]):  # padding to an even or a sector size
                    return
                raise
            self.tick()
            if tag >> 16 == 0xFFFE:
                at = self.delimiter(stack, tag, start, length)
                continue
            if frame.is_sequence:
                at = self.recover(stack, f"({tag >> 16:04X},{tag & 0xFFFF:04X}) stands where an item must")
                continue
            top = len(stack) == 1
            if top and tag in _PIXEL_TAGS:
                self.take_pixels(tag, vr, start, length, frame.limit)
                return
            if top and self.stop_after is not None and tag > self.stop_after:
                return
            if length == _UNDEFINED:
                if vr in _RAW_VRS or tag == _PIXEL_DATA:
                    at = self.fragments(start, frame.limit)[1]
                else:
                    self.open(stack, _Frame(frame.limit, True, True, frame.implicit or vr == b"UN", tag))
                    at = start
                continue
            if length > frame.limit - start:
                if top:
                    raise _Cut
                if all(f.undefined for f in stack[1:]):
                    raise _Cut
                at = self.recover(stack, "an element in it is longer than it")
                continue
            # Sequences of known length are entered too: their depth is a limit on this file whoever reads it next.
            nested = vr == b"SQ" or (vr in (b"", b"UN") and self.buffer[start : start + 4] == self.item)
            if nested and length >= 8:
                self.open(stack, _Frame(start + length, False, True, frame.implicit or vr == b"UN", tag))
                at = start
                continue
            self.keep(stack, tag, start, length)
            at = start + length

    def open(self, stack: list[_Frame], frame: _Frame) -> None:
        if frame.is_sequence and len(stack) // 2 >= self.limits.max_sequence_depth:
            raise StudyTooLarge(f"sequences are nested deeper than {self.limits.max_sequence_depth}", value=len(stack) // 2 + 1)
        stack.append(frame)

    def delimiter(self, stack: list[_Frame], tag: int, start: int, length: int) -> int:
        """An item or a delimiter: open or close frames; returns where to go on."""
        frame = stack[-1]
        if tag == _ITEM and frame.is_sequence:
            if length == _UNDEFINED:
                self.open(stack, _Frame(frame.limit, True, False, frame.implicit, frame.tag))
            elif length > frame.limit - start:
                if all(f.undefined for f in stack[1:]):
                    raise _Cut
                return self.recover(stack, "an item in it is longer than it")
            elif length:
                self.open(stack, _Frame(start + length, False, False, frame.implicit, frame.tag))
            return start
        if tag == _ITEM_END and len(stack) > 1 and not frame.is_sequence:
            stack.pop()
            return start
        if tag == _SEQUENCE_END and len(stack) > 1:
            if not frame.is_sequence:  # an item without its own delimiter
                stack.pop()
            stack.pop()
            return start
        if len(stack) == 1:
            if length:
                raise InvalidStudy("an item stands outside any sequence", value=f"({tag >> 16:04X},{tag & 0xFFFF:04X})")
            self.header.note("a delimiter outside any sequence")
            return start
        return self.recover(stack, "its items are out of order")

    def take_pixels(self, tag: int, vr: bytes, start: int, length: int, limit: int) -> None:
        if length == _UNDEFINED:
            runs, _, cut = self.fragments(start, limit)
            # The first item is the offset table, which one frame does not need.
            self.header.pixels = _Pixels(tag, vr, runs[1:], True, cut)
            return
        self.header.pixels = _Pixels(tag, vr, [(start, min(length, limit - start))], False, length > limit - start)


# --- DICOM files -------------------------------------------------------------------------------------------------------------


def _begins_like_dataset(data: Buffer, at: int = 0) -> bool:
    """Whether a plausible first element (group 0002 or 0008) stands here: files without preamble have no other magic."""
    if len(data) - at < 12:
        return False
    for order in ("<", ">"):
        group, number = struct.unpack_from(order + "HH", data, at)
        if group not in (0x0002, 0x0008) or number > 0x2000:
            continue
        vr = bytes(data[at + 4 : at + 6])
        if vr in _SHORT_VRS or vr in _LONG_VRS:
            return True
        (length,) = struct.unpack_from(order + "I", data, at + 4)
        if length <= 1024 and (number, length) != (0, 0):
            return True
    return False


def _is_dicom(data: Buffer) -> bool:
    return bytes(data[128:132]) == b"DICM" or _begins_like_dataset(data)


def _meta(data: Buffer, at: int) -> tuple[dict[int, bytes], int]:
    """The file meta information (group 0002, always explicit little endian) and where the data set begins.

    The group length element is not believed: the group ends where another begins.
    """
    walker = _Walker(data, _Header(True, None), DEFAULT_LIMITS, None)
    values: dict[int, bytes] = {}
    for _ in range(64):
        if len(data) - at < 8 or data[at : at + 2] != b"\x02\x00":
            break
        tag, _, start, length = walker.element(at, len(data), False)
        if length > len(data) - start:
            raise _Cut
        values.setdefault(tag, bytes(data[start : start + min(length, _MAX_TEXT_BYTES)]))
        at = start + length
    return values, at


def _ascii(value: bytes) -> str:
    return value.decode("ascii", "replace").strip(" \0")


def _inflate(data: Buffer, at: int, maximum: int) -> bytearray:
    """Raw deflate (or, wrongly written, zlib) from `at` on. Raises StudyTooLarge, TruncatedStudy, InvalidStudy."""
    # A zlib stream begins with 0x78 and a check; raw deflate of a data set practically never does.
    zlib_wrapped = data[at] == 0x78 and len(data) - at > 1 and (data[at] << 8 | data[at + 1]) % 31 == 0
    inflater = zlib.decompressobj(15 if zlib_wrapped else -15)
    out = bytearray()
    view = memoryview(data)
    step = 1 << 18
    try:
        while not inflater.eof and at < len(data):
            chunk: bytes | memoryview = view[at : at + step]
            at += len(chunk)
            while len(chunk) and not inflater.eof:
                out += inflater.decompress(chunk, step)
                if len(out) > maximum:
                    raise StudyTooLarge(f"the deflated data set grows beyond {maximum} bytes", value=f"{len(data)} bytes as sent")
                chunk = inflater.unconsumed_tail
        out += inflater.flush()
    except zlib.error as exc:
        raise InvalidStudy("the deflated data set cannot be inflated", value=exc) from exc
    if not inflater.eof:
        raise TruncatedStudy("the deflated data set ends early", value=f"{len(data)} bytes")
    return out


def _detect(buffer: Buffer, at: int, syntax: str | None, header_notes: Callable[[str], None]) -> tuple[bool, bool]:
    """(implicit, little endian) of the data set at `at`: as the syntax says, unless the first element shows otherwise."""
    little = syntax != _EXPLICIT_BE
    if syntax is None:
        # Group numbers of a first element are small: 0008 read in the wrong order is 0800.
        group = struct.unpack_from("<H", buffer, at)[0]
        little = not (group >= 0x0100 and group & 0xFF == 0)
    vr = bytes(buffer[at + 4 : at + 6])
    explicit = vr in _SHORT_VRS or vr in _LONG_VRS
    if syntax is not None and explicit == (syntax == _IMPLICIT_LE):
        header_notes("the data set is not encoded as its transfer syntax says; read as it is")
    return not explicit, little


def _parse(data: bytes, limits: Limits, stop_after: int | None = None) -> tuple[Buffer, _Header]:
    """Walk a DICOM file. Raises StudyError; with `stop_after` (a tag) a buffer that ends early is not an error."""
    partial = stop_after is not None
    has_preamble = data[128:132] == b"DICM"
    begin = 132 if has_preamble else 0
    meta: dict[int, bytes] = {}
    try:
        meta, at = _meta(data, begin)
    except _Cut:
        raise TruncatedStudy("the file ends inside its meta information", value=f"{len(data)} bytes") from None
    syntax = _ascii(meta.get(0x00020010, b"")) or None
    buffer: Buffer = data
    if len(data) - at < 8:
        if _ascii(meta.get(0x00020002, b"")) == _DICOMDIR:
            raise NoPixels("this is a DICOMDIR, a table of contents", remedy="Send the image files that it lists.")
        raise TruncatedStudy("the file has no data set", value=f"{len(data)} bytes")
    if syntax is not None and syntax not in SYNTAXES:
        raise UnsupportedSyntax("this transfer syntax is not read", value=syntax)
    if syntax == _DEFLATED_LE:
        maximum = limits.max_decoded_bytes
        if partial:
            inflater = zlib.decompressobj(-15)
            try:
                buffer = inflater.decompress(data[at:], 1 << 16)
            except zlib.error as exc:
                raise InvalidStudy("the deflated data set cannot be inflated", value=exc) from exc
        else:
            buffer = _inflate(data, at, maximum)
        at = 0
        if len(buffer) < 8:
            raise TruncatedStudy("the file has no data set", value=f"{len(buffer)} bytes")
    notes: list[str] = []
    implicit, little = _detect(buffer, at, syntax, notes.append)
    header = _Header(little, syntax, notes=notes)
    if not has_preamble:
        header.note("the file has no DICOM preamble")
    if syntax is None:
        header.note("the file does not state its transfer syntax; read as uncompressed")
    for key, tag in ((0x00020002, _SOP_CLASS), (0x00020003, _SOP_INSTANCE)):
        if key in meta:
            header.grouped[tag] = meta[key]
    walker = _Walker(buffer, header, limits, stop_after)
    try:
        walker.walk(at, implicit)
    except _Cut:
        if not partial:
            raise TruncatedStudy("the file ends inside an element", value=f"{len(buffer)} bytes") from None
    except InvalidStudy:
        # Bytes that begin by chance like an element, and go on like none, are no DICOM at all.
        if not has_preamble and not header.values:
            raise NotAnImage("these bytes are neither DICOM nor PNG nor JPEG", value=data[:8].hex()) from None
        raise
    return buffer, header


def _uid(header: _Header, tag: int, name: str) -> str | None:
    """A valid UID or None: it names things further on, so nothing else may pass."""
    text = header.text(tag)
    if not text:
        return None
    if len(text) > 64 or not _UID.fullmatch(text):
        header.note(f"{name} is not a UID and was dropped")
        return None
    return text


def _integer(header: _Header, tag: int) -> int | None:
    text = header.text(tag)
    return int(text) if _INTEGER.fullmatch(text) else None


def _modality(header: _Header) -> str:
    modality = header.text(_MODALITY).upper()
    if modality in MODALITIES:
        return modality
    known = _SOP_MODALITY.get(header.text(_SOP_CLASS))
    if not modality and known:
        header.note(f"no modality is stated; the object class says {known}")
        return known
    if not modality:
        if header.pixels is None:
            raise NoPixels("the object holds no pixel data")
        raise WrongModality("the object states no modality", value=header.text(_SOP_CLASS) or "none")
    raise WrongModality("this modality is not read", value=modality)


def _spacing(header: _Header, modality: str) -> tuple[tuple[float, float] | None, str | None]:
    candidates = (
        [(_PIXEL_SPACING, "patient")]
        if modality == "MR"
        else [(_IMAGER_SPACING, "detector"), (_PIXEL_SPACING, "calibrated"), (_SCANNED_SPACING, "film")]
    )
    for tag, kind in candidates:
        numbers = header.decimals(tag)
        if numbers == []:
            continue
        if numbers is None or len(numbers) != 2 or not all(0.0 < v <= MAX_SPACING_MM for v in numbers):
            header.note(f"the pixel spacing makes no sense and is unknown: {header.text(tag)[:40]}")
            continue
        return (numbers[0], numbers[1]), kind
    return None, None


def _vectors(header: _Header) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
    """Unit vectors along a row and along a column in patient coordinates (x left, y back, z up), where they make sense."""
    numbers = header.decimals(_ORIENTATION)
    if not numbers:
        return None
    if len(numbers) != 6 or not all(abs(v) <= 1.1 for v in numbers):
        return None
    row, column = np.array(numbers[:3]), np.array(numbers[3:])
    if abs(float(row @ row) - 1) > 0.1 or abs(float(column @ column) - 1) > 0.1 or abs(float(row @ column)) > 0.1:
        return None
    return row, column


def _view(header: _Header, modality: str) -> str | None:
    if modality != "MR":
        position = header.text(_VIEW_POSITION).upper()
        return position if re.fullmatch(r"[A-Z0-9 ]{1,16}", position) else None
    vectors = _vectors(header)
    if vectors is None:
        if header.raw(_ORIENTATION):
            header.note("the image orientation makes no sense and is unknown")
        return None
    normal = np.abs(np.cross(*vectors))
    axis = int(np.argmax(normal))
    # Within 37 degrees of the plane that it is named after.
    return ("sagittal", "coronal", "axial")[axis] if normal[axis] >= 0.8 else None


_WEIGHTED: Final = re.compile(r"(?<![A-Z0-9])T([12])(?!\d)")
# Other contrasts that are named after T1 or T2, and vertebrae that share the names T1 and T2.
_NOT_WEIGHTED: Final = re.compile(r"\*|STAR|STIR|TIRM|FLAIR|MAP|RHO|RELAX|MEDIC|[CTL]\d*\s*(-|/|TO)\s*[CTL]\d|[CTL]\s*-\s*T\d")


def _weighting(header: _Header, modality: str) -> str | None:
    """ "T1" or "T2" where what the header says agrees; inversion, gradient and echo-planar sequences are left out."""
    if modality != "MR":
        return None
    said: set[str] = set()
    contrast = header.text(_ACQUISITION_CONTRAST).upper()
    if contrast in ("T1", "T2"):
        said.add(contrast)
    description = header.text(_SERIES_DESCRIPTION).upper()
    named = {f"T{m}" for m in _WEIGHTED.findall(description)}
    if _NOT_WEIGHTED.search(description) or len(named) > 1:
        return None
    said |= named
    sequence = set(header.text(_SCANNING_SEQUENCE).upper().split("\\"))
    if sequence - {"", "SE"}:
        return said.pop() if len(said) == 1 and "IR" not in sequence and "EP" not in sequence else None
    repetition, echo = header.decimals(_REPETITION_TIME), header.decimals(_ECHO_TIME)
    if "SE" in sequence and repetition and echo:
        if 250 <= repetition[0] <= 900 and 0 < echo[0] <= 30:
            said.add("T1")
        elif repetition[0] >= 1400 and 70 <= echo[0] <= 300:
            said.add("T2")
    return said.pop() if len(said) == 1 else None


def _one_number(header: _Header, tag: int, name: str, default: float) -> float:
    numbers = header.decimals(tag)
    if numbers == []:
        return default
    if numbers is None or not math.isfinite(numbers[0]):
        raise InvalidStudy(f"{name} is not a number", value=header.text(tag)[:40])
    return numbers[0]


@dataclass(frozen=True)
class _Layout:
    """How the stored pixels are laid out; `dtype` has the byte order of the file."""

    rows: int
    columns: int
    allocated: int
    stored: int
    high_bit: int
    signed: bool
    is_float: bool
    inverted: bool

    def dtype(self, little: bool) -> np.dtype[Any]:
        kind = "f" if self.is_float else "i" if self.signed else "u"
        return np.dtype(f"{'<' if little else '>'}{kind}{self.allocated // 8}")


def _check_size(rows: int, columns: int, limits: Limits) -> None:
    if rows <= 0 or columns <= 0:
        raise EmptyPixels("the image has no pixels", value=f"{rows} x {columns}")
    if rows > limits.max_rows or columns > limits.max_columns or rows * columns > limits.max_pixels:
        most = f"{limits.max_rows} x {limits.max_columns} and {limits.max_pixels} pixels"
        raise StudyTooLarge(f"the image is larger than {most}", value=f"{rows} x {columns}")


def _layout(header: _Header, pixels: _Pixels, limits: Limits) -> _Layout:
    rows, columns = header.number(_ROWS, "Rows"), header.number(_COLUMNS, "Columns")
    if rows is None or columns is None:
        raise InvalidStudy("the object does not state its size", value=f"Rows {rows}, Columns {columns}")
    _check_size(rows, columns, limits)
    frames = header.text(_FRAMES)
    if frames and not _INTEGER.fullmatch(frames):
        raise InvalidStudy("NumberOfFrames is not a number", value=frames[:40])
    if frames and int(frames) > 1:
        raise NotTwoDimensional("the object has more than one frame", value=f"{int(frames)} frames")
    photometric = header.text(_PHOTOMETRIC).upper()
    samples = header.number(_SAMPLES, "SamplesPerPixel")
    if photometric.startswith(("RGB", "YBR", "PALETTE", "HSV", "ARGB", "CMYK", "XYB")) or samples in (3, 4):
        raise ColourImage("the image is in colour", value=f"{photometric or 'unknown'}, {samples} samples per pixel")
    if photometric not in ("MONOCHROME1", "MONOCHROME2"):
        raise InvalidStudy("the photometric interpretation is not one of a grey image", value=photometric[:40] or "none")
    if samples not in (None, 1):
        raise InvalidStudy("a grey image has one sample per pixel", value=samples)
    allocated = header.number(_ALLOCATED, "BitsAllocated")
    is_float = pixels.tag != _PIXEL_DATA
    allowed = {_PIXEL_DATA: (8, 16, 32), _FLOAT_PIXELS: (32,), _DOUBLE_PIXELS: (64,)}[pixels.tag]
    if allocated not in allowed:
        raise InvalidStudy(f"BitsAllocated must be one of {', '.join(str(v) for v in allowed)}", value=allocated)
    if rows * columns * allocated // 8 > limits.max_decoded_bytes:
        raise StudyTooLarge(f"the pixels need more than {limits.max_decoded_bytes} bytes", value=f"{rows} x {columns} x {allocated} bits")
    inverted = photometric == "MONOCHROME1"
    if is_float:
        return _Layout(rows, columns, allocated, allocated, allocated - 1, True, True, inverted)
    stored = header.number(_STORED, "BitsStored")
    stored = allocated if stored is None else stored
    if not 1 <= stored <= allocated:
        raise InvalidStudy("BitsStored must lie between 1 and BitsAllocated", value=f"{stored} of {allocated}")
    high_bit = header.number(_HIGH_BIT, "HighBit")
    if high_bit is None or not stored - 1 <= high_bit < allocated:
        if high_bit is not None:
            header.note("HighBit makes no sense and was taken as BitsStored - 1")
        high_bit = stored - 1
    representation = header.number(_REPRESENTATION, "PixelRepresentation")
    if representation not in (0, 1):
        raise InvalidStudy("PixelRepresentation must be 0 or 1", value=representation)
    return _Layout(rows, columns, allocated, stored, high_bit, representation == 1, False, inverted)


def _stored_pixels(buffer: Buffer, header: _Header, pixels: _Pixels, layout: _Layout, limits: Limits) -> NDArray[Any]:
    """H x W of the file's own integer (or float) type, native byte order, unused bits removed."""
    kind = SYNTAXES[header.syntax][1] if header.syntax else _NATIVE
    native = kind != _ENCAPSULATED
    if native and pixels.encapsulated:
        raise InvalidStudy("the pixel data is compressed, the transfer syntax says that it is not", value=header.syntax or "none")
    if not native and not pixels.encapsulated:
        raise InvalidStudy("the pixel data is not compressed, the transfer syntax says that it is", value=header.syntax)
    if native:
        expected = layout.rows * layout.columns * layout.allocated // 8
        start, length = pixels.runs[0]
        if length == 0:
            raise NoPixels("the pixel data is empty")
        if length < expected:
            raise TruncatedStudy("the pixel data is shorter than rows x columns need", value=f"{length} of {expected} bytes")
        if length > expected + expected % 2:
            header.note("the pixel data is longer than rows x columns need; the rest was ignored")
        array = np.frombuffer(buffer, dtype=layout.dtype(header.little), count=layout.rows * layout.columns, offset=start)
        if not header.little and layout.allocated == 8 and pixels.vr == b"OW":
            # Bytes packed in words of the other byte order: swap each pair. The value has an even length by definition.
            words = np.frombuffer(buffer, dtype=np.uint8, count=min(length, expected + expected % 2), offset=start)
            array = words[: len(words) // 2 * 2].reshape(-1, 2)[:, ::-1].reshape(-1)[:expected].view(layout.dtype(True))
            if len(array) < expected:
                raise TruncatedStudy("the pixel data is shorter than rows x columns need", value=f"{length} of {expected} bytes")
        array = array.reshape(layout.rows, layout.columns)
        if not layout.is_float:
            array = array.astype(array.dtype.newbyteorder("="), copy=False)
    else:
        if layout.is_float:
            raise InvalidStudy("float pixels cannot be compressed", value=header.syntax)
        if pixels.cut and (not pixels.runs or sum(pixels.runs[-1]) >= len(buffer)):
            header.note("the pixel data has no end marker")
        frame = b"".join(bytes(buffer[start : start + length]) for start, length in pixels.runs)
        if not frame:
            raise NoPixels("the pixel data is empty")
        try:
            array = _decode_frame(_decode.KIND_DICOM, frame, layout, header.syntax or "", limits)
        except UndecodablePixels as exc:
            if pixels.cut:
                raise TruncatedStudy("the compressed pixel data ends early", value=f"{len(frame)} bytes") from exc
            raise
        if array.shape != (layout.rows, layout.columns):
            raise UndecodablePixels("the decoded picture has another size than the header states", value=f"{array.shape}")
    if layout.is_float:
        return array
    # Compressed pixels are numbers, not bit patterns: only stored words have a high bit that can lie elsewhere.
    bits = array.dtype.itemsize * 8
    shifted = native or header.syntax == "1.2.840.10008.1.2.5"
    up = bits - 1 - (layout.high_bit if shifted else layout.stored - 1)
    down = bits - layout.stored
    if down > 0 and up >= 0:
        array = np.right_shift(np.left_shift(array, up), down)
    return array


def _lut(header: _Header, layout: _Layout) -> tuple[int, NDArray[np.float32]] | None:
    """The modality LUT: (stored value of its first entry, its entries), where there is one."""
    descriptor, data = header.lut.get(_LUT_DESCRIPTOR, b""), header.lut.get(_LUT_DATA, b"")
    if not descriptor and not data:
        return None
    order = "<" if header.little else ">"
    if len(descriptor) != 6:
        raise InvalidStudy("the modality LUT has no valid descriptor", value=descriptor[:16].hex())
    count, _, bits = struct.unpack(order + "HHH", descriptor)
    (first,) = struct.unpack_from(order + ("h" if layout.signed else "H"), descriptor, 2)
    count = count or 65536
    if len(data) == count * 2:
        entries = np.frombuffer(data, dtype=order + "u2")
    elif bits == 8 and len(data) == count + count % 2:
        entries = np.frombuffer(data, dtype=np.uint8, count=count)
    else:
        raise InvalidStudy("the modality LUT is not as long as its descriptor says", value=f"{len(data)} bytes for {count} entries")
    return int(first), entries.astype(np.float32)


def _padding(header: _Header, layout: _Layout, stored: NDArray[Any]) -> NDArray[np.bool_] | None:
    """Which pixels are marked as lying outside the image, where any are."""
    if layout.is_float:
        return None
    form = ("<" if header.little else ">") + ("h" if layout.signed else "H")
    ends = []
    for tag in (_PADDING, _PADDING_LIMIT):
        value = header.values.get(tag, b"")
        if len(value) == 2:
            ends.append(int(struct.unpack(form, value)[0]))
    if not ends or len(header.values.get(_PADDING, b"")) != 2:
        return None
    mask: NDArray[np.bool_] = (stored >= min(ends)) & (stored <= max(ends))
    return mask if mask.any() and not mask.all() else None


def _values(header: _Header, layout: _Layout, stored: NDArray[Any]) -> tuple[NDArray[np.float32], tuple[float, float] | None]:
    """Modality values, larger = brighter, H x W float32; and the VOI window (centre, width) on the same scale."""
    slope = _one_number(header, _SLOPE, "RescaleSlope", 1.0)
    intercept = _one_number(header, _INTERCEPT, "RescaleIntercept", 0.0)
    if slope == 0.0:
        raise InvalidStudy("RescaleSlope is zero: every pixel would become the same", value=slope)
    lut = None if layout.is_float else _lut(header, layout)
    # Values that overflow are caught below; numpy's warning about them would be the process's, not this file's.
    with np.errstate(all="ignore"):
        if lut is not None:
            first, entries = lut
            index = np.clip(stored.astype(np.int64) - first, 0, len(entries) - 1)
            values = entries[index]
        elif stored.dtype.itemsize <= 2 and abs(slope) <= 1e9 and abs(intercept) <= 1e9:
            values = stored.astype(np.float32)
            if slope != 1.0:
                values *= np.float32(slope)
            if intercept != 0.0:
                values += np.float32(intercept)
        else:
            values = (stored.astype(np.float64) * slope + intercept).astype(np.float32)
    low, high = float(values.min()), float(values.max())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise InvalidStudy("the pixels are not all finite numbers", value=f"slope {slope}, intercept {intercept}")
    mask = _padding(header, layout, stored)
    if mask is not None:
        inside = values[~mask]
        low, high = float(inside.min()), float(inside.max())
        header.note("padding was set to the darkest value")
    centre, width = header.decimals(_CENTRE), header.decimals(_WIDTH)
    window: tuple[float, float] | None = None
    if centre and width and math.isfinite(centre[0]) and 0 < width[0] < math.inf:
        window = (centre[0], width[0])
    if layout.inverted:
        values = np.float32(high) + np.float32(low) - values
        if window is not None:
            window = (high + low - window[0], window[1])
    if mask is not None:
        values[mask] = low
    if not math.isfinite(float(values.min()) + float(values.max())):
        raise InvalidStudy("the pixels are not all finite numbers", value=f"slope {slope}, intercept {intercept}")
    return values, window


def _read_dicom(data: bytes, limits: Limits) -> Instance:
    buffer, header = _parse(data, limits)
    if header.text(_SOP_CLASS) == _DICOMDIR:
        raise NoPixels("this is a DICOMDIR, a table of contents", remedy="Send the image files that it lists.")
    if not header.values and data[128:132] != b"DICM":
        raise NotAnImage("these bytes are neither DICOM nor PNG nor JPEG", value=data[:8].hex())
    modality = _modality(header)
    if header.pixels is None:
        raise NoPixels("the object holds no pixel data", value=modality)
    layout = _layout(header, header.pixels, limits)
    stored = _stored_pixels(buffer, header, header.pixels, layout, limits)
    values, window = _values(header, layout, stored)
    spacing, spacing_kind = _spacing(header, modality)
    return _instance(
        data,
        values,
        header=header,
        spacing=spacing,
        spacing_kind=spacing_kind,
        modality=modality,
        view=_view(header, modality),
        weighting=_weighting(header, modality),
        window=window,
        image_format="DICOM",
    )


def _instance(
    data: bytes,
    values: NDArray[np.float32],
    *,
    header: _Header | None,
    image_format: str,
    spacing: tuple[float, float] | None = None,
    spacing_kind: str | None = None,
    modality: str | None = None,
    view: str | None = None,
    weighting: str | None = None,
    window: tuple[float, float] | None = None,
    notes: tuple[str, ...] = (),
) -> Instance:
    pixels = np.ascontiguousarray(values, dtype=np.float32)
    pixels.setflags(write=False)
    digest = hashlib.sha256(data).hexdigest()
    syntax = header.syntax if header else None
    source: dict[str, Any] = {
        "rows": int(pixels.shape[0]),
        "columns": int(pixels.shape[1]),
        "spacing_mm": list(spacing) if spacing else None,
        "spacing_kind": spacing_kind,
        "modality": modality,
        "view": view,
        "format": image_format,
        "transfer_syntax": SYNTAXES[syntax][0] if syntax else None,
        "transfer_syntax_uid": syntax,
        "sha256": digest,
        "sop_instance_uid": _uid(header, _SOP_INSTANCE, "SOPInstanceUID") if header else None,
        "series_instance_uid": _uid(header, _SERIES_UID, "SeriesInstanceUID") if header else None,
        "study_instance_uid": _uid(header, _STUDY_UID, "StudyInstanceUID") if header else None,
        "instance_number": _integer(header, _INSTANCE_NUMBER) if header else None,
    }
    return Instance(
        pixels=pixels,
        spacing_mm=spacing,
        modality=modality,
        view=view,
        weighting=weighting,
        sha256=digest,
        format=image_format,
        source=source,
        spacing_kind=spacing_kind,
        window=window,
        notes=tuple(header.notes) if header else notes,
    )


# --- PNG and JPEG ------------------------------------------------------------------------------------------------------------

_PNG_MAGIC: Final = b"\x89PNG\r\n\x1a\n"
_JPEG_MAGIC: Final = b"\xff\xd8\xff"
# A grey picture saved in colour: channels may differ by this share of the range, in at most this share of the pixels.
_GREY_TOLERANCE: Final = 12 / 255
_GREY_EXCEPTIONS: Final = 0.001


def _check_png(data: bytes, limits: Limits) -> None:
    """Size, completeness and kind from the chunk heads, before any pixel is inflated."""
    if len(data) < 33 or data[12:16] != b"IHDR":
        raise TruncatedStudy("the PNG ends in its header", value=f"{len(data)} bytes")
    columns, rows, depth = struct.unpack_from(">IIB", data, 16)
    _check_size(rows, columns, limits)
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
            return
        at += 12 + length
    raise StudyTooLarge(f"the PNG has more than {limits.max_elements} chunks")


def _check_jpeg(data: bytes, limits: Limits) -> None:
    """Size, completeness and kind from the markers, before any pixel is decoded."""
    at, sized = 2, False
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
            _check_size(rows, columns, limits)
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


def _read_raster(data: bytes, image_format: str, limits: Limits) -> Instance:
    if image_format == "PNG":
        _check_png(data, limits)
    else:
        _check_jpeg(data, limits)
    array = _decode_frame(_decode.KIND_RASTER, data, None, "", limits)
    _check_size(array.shape[0], array.shape[1], limits)
    # Orientation tags of cameras are not followed: coordinates in the report are those of the stored pixels.
    return _instance(data, _grey(array), header=None, image_format=image_format)


# --- The codec process -------------------------------------------------------------------------------------------------------

_WORKERS: Final = 2
_START_TIMEOUT_S: Final = 60.0
# A fresh process now and then: codecs leak.
_JOBS_PER_WORKER: Final = 500


class _Worker:
    """One codec process and the socket to it. Not thread-safe: whoever took it from the pool owns it."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        environment = dict(os.environ, OPENBLAS_NUM_THREADS="1", OMP_NUM_THREADS="1", MALLOC_ARENA_MAX="1")
        command = [sys.executable, "-I", "-X", "faulthandler=0", str(Path(_decode.__file__).resolve())]
        null = subprocess.DEVNULL
        try:
            # No preexec_fn: the child sets its own limits, so that starting it is safe beside other threads.
            self.process = subprocess.Popen(
                command,
                stdin=theirs.fileno(),
                stdout=null,
                stderr=null,
                env=environment,
                start_new_session=True,
            )
        except OSError as exc:
            ours.close()
            raise BackendUnavailable("the codec process cannot be started", value=exc) from exc
        finally:
            theirs.close()
        self.socket = ours
        self.jobs = 0
        try:
            ready = self._receive(len(_decode.READY), time.monotonic() + _START_TIMEOUT_S)
        except OSError as exc:
            self.stop()
            raise BackendUnavailable(
                "the codec process ends before it is ready", value=exc, remedy="Check that pydicom, python-gdcm and OpenCV are installed."
            ) from exc
        if ready != _decode.READY:
            self.stop()
            raise BackendUnavailable("the codec process does not answer as it must", value=bytes(ready).hex())

    def _left(self, until_s: float) -> None:
        left = until_s - time.monotonic()
        if left <= 0:
            raise TimeoutError("time limit")
        self.socket.settimeout(left)

    def _receive(self, length: int, until_s: float) -> bytearray:
        out = bytearray(length)
        view = memoryview(out)
        while view:
            self._left(until_s)
            count = self.socket.recv_into(view)
            if count == 0:
                raise ConnectionResetError("the codec process ended")
            view = view[count:]
        return out

    def run(self, request: bytes, payload: bytes, max_bytes: int, until_s: float) -> tuple[tuple[Any, ...], bytearray]:
        """(response fields, body). Raises OSError (also TimeoutError) where the process fails or answers nonsense."""
        self.jobs += 1
        self._left(until_s)
        self.socket.sendall(request)
        self._left(until_s)
        self.socket.sendall(payload)
        fields = _decode.RESPONSE.unpack(self._receive(_decode.RESPONSE.size, until_s))
        magic, status, length = fields[0], fields[1], fields[-1]
        if magic != _decode.MAGIC or length > (max_bytes if status == _decode.STATUS_OK else _decode.MAX_MESSAGE_BYTES):
            raise ConnectionError("the codec process answers nonsense")
        return fields, self._receive(length, until_s)

    def usable(self) -> bool:
        return self.jobs < _JOBS_PER_WORKER and self.process.poll() is None

    def stop(self) -> None:
        self.socket.close()
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        self.process.wait()


class _Pool:
    """Warm codec processes, at most `_WORKERS`, started when first needed."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.slots = threading.BoundedSemaphore(_WORKERS)
        self.idle: list[_Worker] = []

    def take(self) -> _Worker:
        while True:
            with self.lock:
                worker = self.idle.pop() if self.idle else None
            if worker is None:
                return _Worker()
            if worker.usable():
                return worker
            worker.stop()

    def give_back(self, worker: _Worker) -> None:
        with self.lock:
            self.idle.append(worker)

    def stop(self) -> None:
        with self.lock:
            idle, self.idle = self.idle, []
        for worker in idle:
            worker.stop()

    def run(self, request: bytes, payload: bytes, max_bytes: int, timeout_s: float) -> tuple[tuple[Any, ...], bytearray]:
        if not self.slots.acquire(timeout=timeout_s):
            raise OutOfTime("every codec process is busy", value=f"waited {timeout_s:g} s", remedy="Send it again in a moment.")
        try:
            worker = self.take()
            try:
                fields, body = worker.run(request, payload, max_bytes, time.monotonic() + timeout_s)
            except BaseException:
                worker.stop()
                raise
            if fields[1] == _decode.STATUS_OK:
                self.give_back(worker)
            else:
                # What failed on hostile bytes may be damaged: the next file gets a fresh process.
                worker.stop()
        finally:
            self.slots.release()
        return fields, body


_pool = _Pool()


def _after_fork() -> None:
    """A forked child must not talk on its parent's sockets, nor mourn its parent's children."""
    global _pool
    for worker in _pool.idle:
        worker.socket.close()
        worker.process.returncode = 0
    _pool = _Pool()


def _stop_workers() -> None:
    _pool.stop()


os.register_at_fork(after_in_child=_after_fork)
atexit.register(_stop_workers)


def warm_up() -> None:
    """Start a codec process now, so that the first compressed file does not wait for it. Raises BackendUnavailable."""
    pool = _pool
    with pool.slots:
        pool.give_back(pool.take())


def _decode_frame(kind: int, payload: bytes, layout: _Layout | None, syntax: str, limits: Limits) -> NDArray[Any]:
    """Run a codec in its process: H x W or H x W x C, native byte order. Raises UndecodablePixels, OutOfTime, BackendUnavailable."""
    rows, columns, allocated, stored, signed = (
        (layout.rows, layout.columns, layout.allocated, layout.stored, int(layout.signed)) if layout else (0, 0, 0, 0, 0)
    )
    request = _decode.REQUEST.pack(
        _decode.MAGIC,
        kind,
        syntax.encode("ascii"),
        rows,
        columns,
        allocated,
        stored,
        signed,
        limits.decode_memory_bytes,
        math.ceil(limits.decode_timeout_s) + 1,
        len(payload),
    )
    try:
        fields, body = _pool.run(request, payload, 2 * limits.max_decoded_bytes, limits.decode_timeout_s)
    except TimeoutError as exc:
        raise UndecodablePixels("decoding takes longer than allowed", value=f"{limits.decode_timeout_s:g} s") from exc
    except OSError as exc:
        raise UndecodablePixels("the codec crashed on this picture", value=exc) from exc
    _, status, dtype_kind, item_size, height, width, channels, length = fields
    if status == _decode.STATUS_MISSING:
        raise BackendUnavailable("a codec is missing", value=body.decode("utf-8", "replace"), remedy="Install python-gdcm.")
    if status == _decode.STATUS_MEMORY:
        raise UndecodablePixels("decoding needs more memory than allowed", value=f"{limits.decode_memory_bytes} bytes")
    if status != _decode.STATUS_OK:
        raise UndecodablePixels("the codec cannot decode this picture", value=body.decode("utf-8", "replace"))
    if dtype_kind not in (b"u", b"i") or item_size not in (1, 2, 4) or height * width * channels * item_size != length or not length:
        raise UndecodablePixels("the codec answers nonsense", value=f"{height} x {width} x {channels}")
    array = np.frombuffer(body, dtype=np.dtype(f"<{dtype_kind.decode('ascii')}{item_size}"))
    shape = (height, width) if channels == 1 else (height, width, channels)
    return array.astype(array.dtype.newbyteorder("="), copy=False).reshape(shape)


# --- Public ------------------------------------------------------------------------------------------------------------------


def read(data: bytes, limits: Limits = DEFAULT_LIMITS) -> Instance:
    """One DICOM, PNG or JPEG file -> Instance. Raises StudyError, and OutOfTime or BackendUnavailable from the codecs."""
    if len(data) > limits.max_bytes:
        raise StudyTooLarge(f"the file is larger than {limits.max_bytes} bytes", value=f"{len(data)} bytes")
    if not data:
        raise NotAnImage("the file is empty", value="0 bytes")
    if data[128:132] == b"DICM":
        return _read_dicom(data, limits)
    if data.startswith(_PNG_MAGIC):
        return _read_raster(data, "PNG", limits)
    if data.startswith(_JPEG_MAGIC):
        return _read_raster(data, "JPEG", limits)
    if _begins_like_dataset(data):
        return _read_dicom(data, limits)
    raise NotAnImage("these bytes are neither DICOM nor PNG nor JPEG", value=data[:8].hex())


def _open_regular(path: Path) -> tuple[int, int]:
    """(descriptor, size). Opened before it is looked at, without waiting, so that a pipe put in its place cannot hold us."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else str(exc)
        raise UsageError(f"the file cannot be opened: {reason}", value=path, remedy="Check the name and the permissions.") from exc
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise NotAnImage("this is not a regular file", value=path)
    return descriptor, status.st_size


def read_path(path: Path, limits: Limits = DEFAULT_LIMITS) -> Instance:
    """`read` of a regular file whose size was checked first. Raises also UsageError where it cannot be opened."""
    descriptor, size = _open_regular(path)
    with os.fdopen(descriptor, "rb") as stream:
        if size > limits.max_bytes:
            raise StudyTooLarge(f"the file is larger than {limits.max_bytes} bytes", value=f"{path}: {size} bytes")
        try:
            # One byte more than allowed: a file that grows meanwhile is refused by `read`.
            data = stream.read(limits.max_bytes + 1)
        except OSError as exc:
            raise UsageError(f"the file cannot be read: {exc.strerror}", value=path, remedy="Check the medium.") from exc
    return read(data, limits)


_HEAD_BYTES: Final = 64 << 10
_MAX_DEPTH: Final = 32


@dataclass(frozen=True, order=True)
class _Place:
    """Where a file comes in the order: series by series, by number, then along the normal; others by path, at the end."""

    rank: int
    series: str
    number: int
    position: float
    path: str


def _head(path: Path) -> bytes:
    """The first bytes of a regular file; b"" where it cannot be read or is something else."""
    try:
        descriptor, _ = _open_regular(path)
        with os.fdopen(descriptor, "rb") as stream:
            return stream.read(_HEAD_BYTES)
    except (SpineboxError, OSError):
        return b""


def _place(path: Path) -> _Place | None:
    """None where the file does not look like an image, or is a DICOMDIR."""
    head = _head(path)
    other = _Place(1, "", 0, 0.0, str(path))
    if head[128:132] != b"DICM" and head.startswith((_PNG_MAGIC, _JPEG_MAGIC)):
        return other
    if not _is_dicom(head):
        return None
    try:
        _, header = _parse(head, DEFAULT_LIMITS, stop_after=_ORIENTATION)
    except NotAnImage:
        return None
    except NoPixels:  # an empty DICOMDIR
        return None
    except SpineboxError:
        return other
    if header.text(_SOP_CLASS) == _DICOMDIR:
        return None
    series = _uid(header, _SERIES_UID, "SeriesInstanceUID")
    if series is None:
        return other
    number = _integer(header, _INSTANCE_NUMBER)
    position = header.decimals(_POSITION) or []
    vectors = _vectors(header)
    along = 0.0
    if len(position) == 3 and all(math.isfinite(v) for v in position) and vectors is not None:
        along = float(np.cross(*vectors) @ np.array(position))
    return _Place(0, series, 1 << 62 if number is None else number, along, str(path))


def _files_below(folder: Path, limit: int) -> Iterator[Path]:
    """Regular files below `folder`; folders behind symbolic links are not entered, so that no loop exists."""
    seen = 0
    for where, folders, names in os.walk(folder, followlinks=False):
        folders.sort()
        if len(Path(where).relative_to(folder).parts) >= _MAX_DEPTH:
            folders.clear()
        for name in sorted(names):
            seen += 1
            # Other files lie beside images, but not ten times as many; an endless folder must end.
            if seen > 10 * limit:
                raise UsageError(f"the folder holds more than {10 * limit} files", value=folder, remedy="Name a smaller folder.")
            if name.upper() != "DICOMDIR":
                yield Path(where) / name


def find_inputs(paths: Sequence[Path], limit: int = 100_000) -> list[Path]:
    """The files to read: those named, as they are, and from each folder the DICOM, PNG and JPEG files below it.

    A folder's files are told by their first bytes, not by name; DICOMDIR is left out. DICOM comes series by series, in the
    order of InstanceNumber or, where that is the same, of position; then the rest by path. Only heads are read, one at a
    time. Raises UsageError for a path that is not there and for more than `limit` files.
    """
    found: list[Path] = []
    for path in paths:
        places: list[_Place] = []
        if path.is_dir():
            for file in _files_below(path, limit):
                place = _place(file)
                if place is not None:
                    places.append(place)
                if len(found) + len(places) > limit:
                    break
        elif path.exists() or path.is_symlink():
            found.append(path)
        else:
            raise UsageError("there is no such file or folder", value=path, remedy="Check the path.")
        found.extend(Path(place.path) for place in sorted(places))
        if len(found) > limit:
            raise UsageError(f"more than {limit} images were found", value=path, remedy="Name a smaller folder.")
    return found
