"""DICOM bytes -> the few header values that matter, undecoded, and where the pixels lie.

Hides the encodings of a data set (byte order, implicit and explicit elements, nesting, deflate) and the usual faults of its
writers. Tags, value representations and transfer syntaxes come from pydicom's tables; its reader is not used here, because
this runs in the process that serves everybody and a general parser does what the file tells it to. Measured with pydicom
3.0.2: 522 kB of deflated data set become 1.6 GiB even with stop_before_pixels; 500 nested sequences raise RecursionError;
and its warnings go through a module whose state all threads share. So a data set is walked in one pass without recursion,
within `Limits`, only wanted values are copied out, and what was tolerated is a note. Decoding compressed pixels is pydicom's
work, in a process of its own (`_codec`, `_decode`).
"""

from __future__ import annotations

import re
import struct
import zlib
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray
from pydicom import uid as uids
from pydicom.tag import Tag
from pydicom.valuerep import EXPLICIT_VR_LENGTH_16, EXPLICIT_VR_LENGTH_32

from appliance._limits import DEFAULT_LIMITS, Limits
from appliance.errors import InvalidStudy, NoPixels, NotAnImage, StudyTooLarge, TruncatedStudy, UnsupportedSyntax

Buffer = bytes | bytearray

SYNTAXES: Final[dict[str, uids.UID]] = {
    str(syntax): syntax
    for syntax in (
        *(uids.ImplicitVRLittleEndian, uids.ExplicitVRLittleEndian, uids.ExplicitVRBigEndian, uids.DeflatedExplicitVRLittleEndian),
        *(uids.RLELossless, uids.JPEGBaseline8Bit, uids.JPEGExtended12Bit, uids.JPEGLossless, uids.JPEGLosslessSV1),
        *(uids.JPEGLSLossless, uids.JPEGLSNearLossless, uids.JPEG2000Lossless, uids.JPEG2000),
    )
}
"""Every transfer syntax that can be read."""

_UNDEFINED: Final = 0xFFFFFFFF
_ITEM, _ITEM_END, _SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD
_META_CLASS, _META_INSTANCE, _META_SYNTAX = 0x00020002, 0x00020003, 0x00020010
# What the meta information repeats of the data set, for where that leaves it out.
_STATED_TWICE: Final = {"SOPClassUID": _META_CLASS, "SOPInstanceUID": _META_INSTANCE}
_LONG_VRS: Final = frozenset(vr.encode() for vr in EXPLICIT_VR_LENGTH_32)
_SHORT_VRS: Final = frozenset(vr.encode() for vr in EXPLICIT_VR_LENGTH_16)
_VRS: Final = _LONG_VRS | _SHORT_VRS

_PIXEL_TAGS: Final = {int(Tag(keyword)): keyword for keyword in ("PixelData", "FloatPixelData", "DoubleFloatPixelData")}
_KEYWORDS: Final = (
    "SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "InstanceNumber", "Modality", "SeriesDescription",
    "ScanningSequence", "RepetitionTime", "EchoTime", "AcquisitionContrast", "ViewPosition", "ImagePositionPatient",
    "ImageOrientationPatient", "PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing", "SamplesPerPixel",
    "PhotometricInterpretation", "NumberOfFrames", "Rows", "Columns", "BitsAllocated", "BitsStored", "HighBit",
    "PixelRepresentation", "PixelPaddingValue", "PixelPaddingRangeLimit", "WindowCenter", "WindowWidth", "RescaleIntercept",
    "RescaleSlope", "ModalityLUTSequence.LUTDescriptor", "ModalityLUTSequence.LUTData", "Manufacturer", "MRAcquisitionType", "PatientID",
)  # fmt: skip
# Enhanced objects keep these two levels down, in the functional groups that the frames share or in those of each frame.
_MACROS: Final = (
    "PixelMeasuresSequence.PixelSpacing",
    "PlaneOrientationSequence.ImageOrientationPatient",
    "PlanePositionSequence.ImagePositionPatient",
    "PixelValueTransformationSequence.RescaleSlope",
    "PixelValueTransformationSequence.RescaleIntercept",
    "FrameVOILUTSequence.WindowCenter",
    "FrameVOILUTSequence.WindowWidth",
    "MRImageFrameTypeSequence.AcquisitionContrast",
)
_GROUPS: Final = ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence")
# The tags of the sequences that lead to a value, and its own -> its keyword.
_WANTED: Final = {
    tuple(int(Tag(step)) for step in path.split(".")): path.rpartition(".")[2]
    for path in (*_KEYWORDS, *(f"{group}.{macro}" for group in _GROUPS for macro in _MACROS))
}
# The longest value that is copied out of a header; a LUT has at most 65 536 entries of two bytes.
_MAX_VALUE_BYTES: Final = 131_072
_MAX_TEXT_BYTES: Final = 1024
_MAX_META_ELEMENTS: Final = 64
_MAX_HEAD_INFLATED: Final = 1 << 20
_MAX_NOTES: Final = 16

# Infinity and NaN are no decimal strings, but writers produce them: recognise them to name them.
_DECIMAL: Final = re.compile(r"[+-]?(\d{1,40}(\.\d{0,40})?|\.\d{1,40})([eE][+-]?\d{1,4})?|[+-]?(nan|inf|infinity)", re.IGNORECASE)
_INTEGER: Final = re.compile(r"[+-]?\d{1,12}")
_UID: Final = re.compile(r"\d+(\.\d+)*")


class _Cut(Exception):
    """The buffer ended inside an element, at top level."""


@dataclass
class Pixels:
    """Where the value of the pixel element `keyword` lies in the buffer: one (offset, length), or one per fragment.

    `cut`: the file ended before the value did.
    """

    keyword: str
    vr: bytes
    runs: list[tuple[int, int]]
    encapsulated: bool
    cut: bool


@dataclass
class Header:
    """The wanted values of one data set by keyword, undecoded, with the byte order that they need.

    `values` are those of the top level; `nested` those of the known sequences and of the file's meta information.
    """

    little: bool = True
    syntax: uids.UID | None = None
    values: dict[str, bytes] = field(default_factory=dict)
    nested: dict[str, bytes] = field(default_factory=dict)
    pixels: Pixels | None = None
    notes: list[str] = field(default_factory=list)

    def note(self, text: str) -> None:
        if len(self.notes) < _MAX_NOTES and text not in self.notes:
            self.notes.append(text)

    def raw(self, keyword: str) -> bytes:
        return self.values.get(keyword) or self.nested.get(keyword, b"")

    def text(self, keyword: str) -> str:
        """The value as ASCII without padding, "" where absent; undecodable bytes become "?"."""
        value = self.raw(keyword)[:_MAX_TEXT_BYTES].decode("ascii", "replace").replace("\ufffd", "?")
        return value.strip(" \0\r\n\t")

    def number(self, keyword: str) -> int | None:
        """An unsigned 16-bit element, None where absent or empty. Raises InvalidStudy where it has another length."""
        value = self.raw(keyword)
        if not value:
            return None
        if len(value) != 2:
            raise InvalidStudy(f"{keyword} has {len(value)} bytes instead of 2", value=value[:8].hex())
        return int.from_bytes(value, "little" if self.little else "big")

    def decimals(self, keyword: str) -> list[float] | None:
        """A decimal string of one or more numbers; [] where absent or empty, None where it is not numbers."""
        text = self.text(keyword)
        parts = [part.strip(" \0") for part in text.split("\\")] if text else []
        return [float(part) for part in parts] if all(_DECIMAL.fullmatch(part) for part in parts) else None

    def integer(self, keyword: str) -> int | None:
        """An integer string; None where absent or not an integer."""
        text = self.text(keyword)
        return int(text) if _INTEGER.fullmatch(text) else None

    def uid(self, keyword: str) -> str | None:
        """A valid UID or None: it names things further on, so nothing else may pass."""
        text = self.text(keyword)
        if text and (len(text) > 64 or not _UID.fullmatch(text)):
            self.note(f"{keyword} is not a UID and was dropped")
            return None
        return text or None

    def axes(self) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
        """Unit vectors along a row and along a column in patient coordinates (x left, y back, z up), where they make sense."""
        numbers = self.decimals("ImageOrientationPatient")
        if numbers is None or len(numbers) != 6 or not all(abs(v) <= 1.1 for v in numbers):
            return None
        row, column = np.array(numbers[:3]), np.array(numbers[3:])
        if abs(float(row @ row) - 1) > 0.1 or abs(float(column @ column) - 1) > 0.1 or abs(float(row @ column)) > 0.1:
            return None
        return row, column


@dataclass
class _Frame:
    """An open data set, sequence or item: it ends at `limit`, or earlier at its delimiter where `undefined`."""

    limit: int
    undefined: bool
    is_sequence: bool
    implicit: bool
    tag: int


class _Walker:
    """One pass over a data set, without recursion: fills a `Header` with what is wanted, and stops at the pixel data."""

    def __init__(self, buffer: Buffer, header: Header, limits: Limits) -> None:
        self.buffer = buffer
        self.header = header
        self.limits = limits
        order = "<" if header.little else ">"
        self.two_shorts = struct.Struct(order + "HH").unpack_from
        self.short = struct.Struct(order + "H").unpack_from
        self.long = struct.Struct(order + "I").unpack_from
        self.item = b"\xfe\xff\x00\xe0" if header.little else b"\xff\xfe\xe0\x00"
        self.count = 0
        self.stack: list[_Frame] = []

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
        while limit - at >= 8:
            self.tick()
            tag, _, at, length = self.element(at, limit, implicit=True)
            if tag == _SEQUENCE_END:
                return runs, at, False
            if tag != _ITEM or length == _UNDEFINED:
                raise InvalidStudy("the pixel data's fragments are broken", value=f"{_name(tag)} length {length}")
            runs.append((at, min(length, limit - at)))
            if length > limit - at:
                break
            at += length
        return runs, limit, True

    def keep(self, tag: int, start: int, length: int) -> None:
        """Copy a value out where it is wanted, at top level or in one of the known sequences."""
        if length > _MAX_VALUE_BYTES or len(self.stack) > 5:
            return
        keyword = _WANTED.get((*(f.tag for f in self.stack if f.is_sequence), tag))
        if keyword is None:
            return
        value = bytes(self.buffer[start : start + length])
        if len(self.stack) > 1:
            self.header.nested.setdefault(keyword, value)
        elif self.header.values.setdefault(keyword, value) != value:
            raise InvalidStudy("an element is there twice with different values", value=_name(tag))

    def contained(self) -> bool:
        """Whether damage here ends at a known place: inside a sequence or item whose length is stated."""
        return any(not f.undefined for f in self.stack[1:])

    def recover(self, what: str, otherwise: Exception | None = None) -> int:
        """Skip the innermost sequence whose length is known; where there is none, the rest cannot be found."""
        if not self.contained():
            raise otherwise or InvalidStudy(what)
        while (frame := self.stack.pop()).undefined:
            pass
        self.header.note(f"a sequence was skipped: {what}")
        return frame.limit

    def walk(self, at: int, implicit: bool) -> None:
        """Raises _Cut where the buffer ends inside an element, InvalidStudy and StudyTooLarge."""
        stack = self.stack = [_Frame(len(self.buffer), False, False, implicit, 0)]
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
            except _Cut as cut:
                if not self.contained() and not any(self.buffer[at : frame.limit]):  # padding to an even or a sector size
                    return
                at = self.recover("its last element does not fit", cut)
                continue
            self.tick()
            if tag >> 16 == 0xFFFE:
                at = self.delimiter(tag, start, length)
            elif frame.is_sequence:
                at = self.recover(f"{_name(tag)} stands where an item must")
            elif len(stack) == 1 and tag in _PIXEL_TAGS:
                self.take_pixels(_PIXEL_TAGS[tag], vr, start, length, frame.limit)
                return
            elif length == _UNDEFINED and (vr.startswith(b"O") or tag in _PIXEL_TAGS):
                at = self.fragments(start, frame.limit)[1]
            elif length == _UNDEFINED:
                self.open(_Frame(frame.limit, True, True, frame.implicit or vr == b"UN", tag))
                at = start
            elif length > frame.limit - start:
                at = self.recover("an element in it is longer than it", _Cut())
            # Sequences of known length are entered too: their depth is a limit on this file whoever reads it next.
            elif length >= 8 and (vr == b"SQ" or (vr in (b"", b"UN") and self.buffer[start : start + 4] == self.item)):
                self.open(_Frame(start + length, False, True, frame.implicit or vr == b"UN", tag))
                at = start
            else:
                self.keep(tag, start, length)
                at = start + length

    def open(self, frame: _Frame) -> None:
        depth = len(self.stack) // 2
        if frame.is_sequence and depth >= self.limits.max_sequence_depth:
            raise StudyTooLarge(f"sequences are nested deeper than {self.limits.max_sequence_depth}", value=depth + 1)
        self.stack.append(frame)

    def delimiter(self, tag: int, start: int, length: int) -> int:
        """An item or a delimiter: open or close frames; returns where to go on."""
        stack, frame = self.stack, self.stack[-1]
        if tag == _ITEM and frame.is_sequence:
            if length == _UNDEFINED:
                self.open(_Frame(frame.limit, True, False, frame.implicit, frame.tag))
            elif length > frame.limit - start:
                return self.recover("an item in it is longer than it", _Cut())
            elif length:
                self.open(_Frame(start + length, False, False, frame.implicit, frame.tag))
            return start
        if len(stack) == 1:
            if length:
                raise InvalidStudy("an item stands outside any sequence", value=_name(tag))
            self.header.note("a delimiter outside any sequence")
            return start
        if tag == _SEQUENCE_END:
            if not frame.is_sequence:  # an item without its own delimiter
                stack.pop()
            stack.pop()
            return start
        if tag == _ITEM_END and not frame.is_sequence:
            stack.pop()
            return start
        return self.recover("its items are out of order")

    def take_pixels(self, keyword: str, vr: bytes, start: int, length: int, limit: int) -> None:
        if length == _UNDEFINED:
            runs, _, cut = self.fragments(start, limit)
            # The first item is the offset table, which one frame does not need.
            self.header.pixels = Pixels(keyword, vr, runs[1:], True, cut)
        else:
            self.header.pixels = Pixels(keyword, vr, [(start, min(length, limit - start))], False, length > limit - start)


def _name(tag: int) -> str:
    return f"({tag >> 16:04X},{tag & 0xFFFF:04X})"


def looks_like_dicom(data: Buffer) -> bool:
    """A preamble, or else a plausible first element (group 0002 or 0008): files without a preamble have no other magic."""
    if data[128:132] == b"DICM":
        return True
    if len(data) < 12:
        return False
    known_vr = bytes(data[4:6]) in _VRS
    for order in ("<", ">"):
        group, number, length = struct.unpack_from(order + "HHI", data)
        plausible = known_vr or (length <= 1024 and (number, length) != (0, 0))
        if group in (0x0002, 0x0008) and number <= 0x2000 and plausible:
            return True
    return False


def _meta(data: Buffer, at: int) -> tuple[dict[int, bytes], int]:
    """The file meta information (group 0002, always explicit little endian) and where the data set begins.

    The group length element is not believed: the group ends where another begins. Raises _Cut.
    """
    walker = _Walker(data, Header(), DEFAULT_LIMITS)
    values: dict[int, bytes] = {}
    for _ in range(_MAX_META_ELEMENTS):
        if len(data) - at < 8 or data[at : at + 2] != b"\x02\x00":
            break
        tag, _, start, length = walker.element(at, len(data), False)
        if length > len(data) - start:
            raise _Cut
        values.setdefault(tag, bytes(data[start : start + min(length, _MAX_TEXT_BYTES)]))
        at = start + length
    return values, at


def _inflate(data: Buffer, at: int, maximum: int, only_head: bool) -> bytearray:
    """Raw deflate (or, wrongly written, zlib) from `at` on. Raises StudyTooLarge, TruncatedStudy, InvalidStudy.

    `only_head`: give what there is, up to about `maximum` bytes, instead of the first two.
    """
    # A zlib stream begins with 0x78 and a check; raw deflate of a data set practically never does.
    zlib_wrapped = data[at] == 0x78 and (data[at] << 8 | data[at + 1]) % 31 == 0
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
                    if only_head:
                        return out
                    raise StudyTooLarge(f"the deflated data set grows beyond {maximum} bytes", value=f"{len(data)} bytes as sent")
                chunk = inflater.unconsumed_tail
        out += inflater.flush()
    except zlib.error as exc:
        raise InvalidStudy("the deflated data set cannot be inflated", value=exc) from exc
    if not inflater.eof and not only_head:
        raise TruncatedStudy("the deflated data set ends early", value=f"{len(data)} bytes")
    return out


def parse(data: bytes, limits: Limits, only_head: bool = False) -> tuple[Buffer, Header]:
    """Walk a DICOM file: (the buffer that `Header.pixels` points into, the header). Raises StudyError.

    `only_head`: `data` is the beginning of a file, and that it ends early is not an error.
    """
    has_preamble = data[128:132] == b"DICM"
    try:
        meta, at = _meta(data, 132 if has_preamble else 0)
    except _Cut:
        raise TruncatedStudy("the file ends inside its meta information", value=f"{len(data)} bytes") from None
    said = {tag: value.decode("ascii", "replace").strip(" \0") for tag, value in meta.items()}
    if said.get(_META_CLASS) == uids.MediaStorageDirectoryStorage:
        raise NoPixels("this is a DICOMDIR, a table of contents", remedy="Send the image files that it lists.")
    if len(data) - at < 8:
        raise TruncatedStudy("the file has no data set", value=f"{len(data)} bytes")
    stated = said.get(_META_SYNTAX)
    if stated and stated not in SYNTAXES:
        raise UnsupportedSyntax("this transfer syntax is not read", value=stated)
    syntax = SYNTAXES[stated] if stated else None
    buffer: Buffer = data
    if syntax is not None and syntax.is_deflated:
        maximum = min(limits.max_decoded_bytes, _MAX_HEAD_INFLATED) if only_head else limits.max_decoded_bytes
        buffer, at = _inflate(data, at, maximum, only_head), 0
        if len(buffer) < 8:
            raise TruncatedStudy("the file has no data set", value=f"{len(buffer)} bytes")
    header = Header(little=syntax.is_little_endian if syntax else _begins_little(buffer, at), syntax=syntax)
    implicit = bytes(buffer[at + 4 : at + 6]) not in _VRS
    if syntax is not None and implicit != syntax.is_implicit_VR:
        header.note("the data set is not encoded as its transfer syntax says; read as it is")
    if not has_preamble:
        header.note("the file has no DICOM preamble")
    if syntax is None:
        header.note("the file does not state its transfer syntax; read as uncompressed")
    header.nested = {keyword: meta[tag] for keyword, tag in _STATED_TWICE.items() if tag in meta}
    try:
        _Walker(buffer, header, limits).walk(at, implicit)
    except _Cut:
        if not only_head:
            raise TruncatedStudy("the file ends inside an element", value=f"{len(buffer)} bytes") from None
    except InvalidStudy:
        if has_preamble or header.values:
            raise
    # Bytes that begin by chance like an element, and go on like none, are no DICOM at all.
    if not has_preamble and not header.values:
        raise NotAnImage("these bytes are neither DICOM nor PNG nor JPEG", value=data[:8].hex())
    return buffer, header


def _begins_little(buffer: Buffer, at: int) -> bool:
    """Group numbers of a first element are small: 0008 read in the wrong order is 0800."""
    group = int.from_bytes(buffer[at : at + 2], "little")
    return group < 0x0100 or group & 0xFF != 0
