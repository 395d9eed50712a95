"""Bytes -> one 2D grey `Instance`. Refuses what cannot be read for certain; never guesses.

Hides what an image object means: which of its numbers are pixels, what they measure, how they lie and what they show. How
DICOM is written is hidden by `_dicom`, PNG and JPEG by `_raster`, running codecs by `_codec`, finding files by `_files`, and
the bounds on all of them stand in `_limits`. Nothing here prints or warns; what was tolerated is in `Instance.notes`.

- Uncompressed pixels are read in this process. Compressed ones (JPEG, JPEG-LS, JPEG 2000, RLE, PNG) are decoded in a warm
  process of its own; when it dies, the file is refused and the next one gets a fresh process.
- Pixels keep their full range: the VOI window is reported (`Instance.window`) and not applied, for CR and DX as for MR,
  because the network normalises by percentiles and a window may cut off what it needs. The modality LUT or the rescale
  slope and intercept are applied. MONOCHROME1 is inverted within its own range. Pixels marked as padding take the darkest
  other value.
- Spacing that makes no sense (not two numbers, not positive, above 100 mm) is unknown spacing with a note: lengths are then
  given in pixels, which is true, where a refusal would lose the answer for a fault in one header field.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from pydicom import uid as uids

from appliance import _codec, _raster
from appliance._codec import warm_up
from appliance._dicom import SYNTAXES, Buffer, Header, Pixels, parse
from appliance._files import find_inputs, format_of, open_regular
from appliance._limits import DEFAULT_LIMITS, Limits
from appliance.errors import (
    ColourImage,
    InvalidStudy,
    NoPixels,
    NotAnImage,
    NotTwoDimensional,
    SpineboxError,
    StudyTooLarge,
    TruncatedStudy,
    UndecodablePixels,
    UsageError,
    WrongModality,
)

__all__ = [
    "DEFAULT_LIMITS", "MODALITIES", "SYNTAXES", "Glance", "Instance", "Limits", "find_inputs", "glance", "hash_patient", "read",
    "read_colour", "read_path", "warm_up",
]  # fmt: skip

MODALITIES: Final = ("MR", "CR", "DX")
MAX_SPACING_MM: Final = 100.0
_HEAD_BYTES: Final = 1 << 16  # of a file that is glanced at

_CLASS_MODALITY: Final[dict[str, str]] = {
    uids.MRImageStorage: "MR",
    uids.EnhancedMRImageStorage: "MR",
    uids.ComputedRadiographyImageStorage: "CR",
    uids.DigitalXRayImageStorageForPresentation: "DX",
}


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
    identifiers of the object, never the patient's name, number or birth date. `vendor`: the manufacturer's name; `acquisition`:
    "2D" or "3D"; `patient_sha256`: SHA-256 of the patient's number, to tell patients apart on this machine: whoever knows the
    range of numbers can undo it, so it is not for sending. Each is None where the header does not say.
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
    vendor: str | None = None
    acquisition: str | None = None
    patient_sha256: str | None = None


def read(data: bytes, limits: Limits = DEFAULT_LIMITS) -> Instance:
    """One DICOM, PNG or JPEG file -> Instance. Raises StudyError, and OutOfTime or BackendUnavailable from the codecs."""
    if len(data) > limits.max_bytes:
        raise StudyTooLarge(f"the file is larger than {limits.max_bytes} bytes", value=f"{len(data)} bytes")
    if not data:
        raise NotAnImage("the file is empty", value="0 bytes")
    kind = format_of(data)
    if kind is None:
        raise NotAnImage("these bytes are neither DICOM nor PNG nor JPEG", value=data[:8].hex())
    if kind == "DICOM":
        return _read_dicom(data, limits)
    return _instance(data, _raster.read(data, limits), kind, Header())


@dataclass(frozen=True)
class Glance:
    """What the head of a file states, so that its cost can be foreseen: `modality` None where it states none, `pixels` 0 where it
    does not say its size."""

    modality: str | None
    pixels: int


def glance(data: bytes, limits: Limits = DEFAULT_LIMITS) -> Glance:
    """The head of a DICOM, PNG or JPEG file in a fraction of a millisecond. Never raises: what is wrong with it `read` will say."""
    try:
        kind = format_of(data)
        if kind == "DICOM":
            _, header = parse(data[:_HEAD_BYTES], limits, only_head=True)
            return Glance(_modality(header), (header.number("Rows") or 0) * (header.number("Columns") or 0))
        if kind is not None:
            rows, columns = _raster.size_of(data, limits)
            return Glance(None, rows * columns)
    except SpineboxError:
        pass
    return Glance(None, 0)


def read_path(path: Path, limits: Limits = DEFAULT_LIMITS) -> Instance:
    """`read` of a regular file whose size was checked first. Raises also UsageError where it cannot be opened."""
    return read(_content(path, limits), limits)


def _content(path: Path, limits: Limits) -> bytes:
    descriptor, size = open_regular(path)
    with os.fdopen(descriptor, "rb") as stream:
        if size > limits.max_bytes:
            raise StudyTooLarge(f"the file is larger than {limits.max_bytes} bytes", value=f"{path}: {size} bytes")
        try:
            # One byte more than allowed: a file that grows meanwhile is refused by `read`.
            return stream.read(limits.max_bytes + 1)
        except OSError as exc:
            raise UsageError(f"the file cannot be read: {exc.strerror}", value=path, remedy="Check the medium.") from exc


def _read_dicom(data: bytes, limits: Limits) -> Instance:
    buffer, header = parse(data, limits)
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
        "DICOM",
        header,
        modality=modality,
        spacing=spacing,
        spacing_kind=spacing_kind,
        view=_view(header, modality),
        weighting=_weighting(header, modality),
        window=window,
    )


def _instance(
    data: bytes,
    values: NDArray[np.float32],
    image_format: str,
    header: Header,
    *,
    modality: str | None = None,
    spacing: tuple[float, float] | None = None,
    spacing_kind: str | None = None,
    view: str | None = None,
    weighting: str | None = None,
    window: tuple[float, float] | None = None,
) -> Instance:
    pixels = np.ascontiguousarray(values, dtype=np.float32)
    pixels.setflags(write=False)
    digest = hashlib.sha256(data).hexdigest()
    source: dict[str, Any] = {
        "rows": int(pixels.shape[0]),
        "columns": int(pixels.shape[1]),
        "spacing_mm": list(spacing) if spacing else None,
        "spacing_kind": spacing_kind,
        "modality": modality,
        "view": view,
        "format": image_format,
        "transfer_syntax": header.syntax.name if header.syntax else None,
        "transfer_syntax_uid": str(header.syntax) if header.syntax else None,
        "sha256": digest,
        "sop_instance_uid": header.uid("SOPInstanceUID"),
        "series_instance_uid": header.uid("SeriesInstanceUID"),
        "study_instance_uid": header.uid("StudyInstanceUID"),
        "instance_number": header.integer("InstanceNumber"),
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
        notes=tuple(header.notes),
        vendor=re.sub(r"[^A-Za-z0-9 .&+-]", "?", header.text("Manufacturer"))[:64] or None,
        acquisition=header.text("MRAcquisitionType") if header.text("MRAcquisitionType") in ("2D", "3D") else None,
        patient_sha256=hash_patient(header.raw("PatientID")),
    )


def hash_patient(number: bytes) -> str | None:
    """SHA-256 of a PatientID without its padding, None where there is none."""
    number = number.strip(b" \0")
    return hashlib.sha256(number).hexdigest() if number else None


def read_colour(path: Path, limits: Limits = DEFAULT_LIMITS) -> NDArray[np.uint8]:
    """A PNG or JPEG as H x W x 3 uint8, RGB, for networks that look at photographs. Raises StudyError, UsageError."""
    return _raster.read_colour(_content(path, limits), limits)


# --- What it shows -----------------------------------------------------------------------------------------------------------


def _modality(header: Header) -> str:
    modality = header.text("Modality").upper()
    if modality in MODALITIES:
        return modality
    if modality:
        raise WrongModality("this modality is not read", value=modality)
    known = _CLASS_MODALITY.get(header.text("SOPClassUID"))
    if known:
        header.note(f"no modality is stated; the object class says {known}")
        return known
    if header.pixels is None:
        raise NoPixels("the object holds no pixel data")
    raise WrongModality("the object states no modality", value=header.text("SOPClassUID") or "none")


def _spacing(header: Header, modality: str) -> tuple[tuple[float, float] | None, str | None]:
    candidates = (
        [("PixelSpacing", "patient")]
        if modality == "MR"
        else [("ImagerPixelSpacing", "detector"), ("PixelSpacing", "calibrated"), ("NominalScannedPixelSpacing", "film")]
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


def _view(header: Header, modality: str) -> str | None:
    if modality != "MR":
        position = header.text("ViewPosition").upper()
        return position if re.fullmatch(r"[A-Z0-9 ]{1,16}", position) else None
    axes = header.axes()
    if axes is None:
        if header.raw("ImageOrientationPatient"):
            header.note("the image orientation makes no sense and is unknown")
        return None
    normal = np.abs(np.cross(*axes))
    axis = int(np.argmax(normal))
    # Within 37 degrees of the plane that it is named after.
    return ("sagittal", "coronal", "axial")[axis] if normal[axis] >= 0.8 else None


_WEIGHTED: Final = re.compile(r"(?<![A-Z0-9])T([12])(?!\d)")
# Other contrasts that are named after T1 or T2, and vertebrae that share the names T1 and T2.
_NOT_WEIGHTED: Final = re.compile(r"\*|STAR|STIR|TIRM|FLAIR|MAP|RHO|RELAX|MEDIC|[CTL]\d*\s*(-|/|TO)\s*[CTL]\d|[CTL]\s*-\s*T\d")


def _weighting(header: Header, modality: str) -> str | None:
    """ "T1" or "T2" where what the header says agrees; inversion, gradient and echo-planar sequences are left out."""
    if modality != "MR":
        return None
    said: set[str] = set()
    contrast = header.text("AcquisitionContrast").upper()
    if contrast in ("T1", "T2"):
        said.add(contrast)
    description = header.text("SeriesDescription").upper()
    named = {f"T{m}" for m in _WEIGHTED.findall(description)}
    if _NOT_WEIGHTED.search(description) or len(named) > 1:
        return None
    said |= named
    sequence = set(header.text("ScanningSequence").upper().split("\\"))
    if sequence - {"", "SE"}:
        return said.pop() if len(said) == 1 and "IR" not in sequence and "EP" not in sequence else None
    repetition, echo = header.decimals("RepetitionTime"), header.decimals("EchoTime")
    if "SE" in sequence and repetition and echo:
        if 250 <= repetition[0] <= 900 and 0 < echo[0] <= 30:
            said.add("T1")
        elif repetition[0] >= 1400 and 70 <= echo[0] <= 300:
            said.add("T2")
    return said.pop() if len(said) == 1 else None


# --- What its pixels are -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Layout:
    """How the stored pixels are laid out; `allocated`, `stored` and `high_bit` count bits."""

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


def _layout(header: Header, pixels: Pixels, limits: Limits) -> _Layout:
    rows, columns = header.number("Rows"), header.number("Columns")
    if rows is None or columns is None:
        raise InvalidStudy("the object does not state its size", value=f"Rows {rows}, Columns {columns}")
    limits.check_size(rows, columns)
    frames = header.integer("NumberOfFrames")
    if frames is None and header.text("NumberOfFrames"):
        raise InvalidStudy("NumberOfFrames is not a number", value=header.text("NumberOfFrames")[:40])
    if frames is not None and frames > 1:
        raise NotTwoDimensional("the object has more than one frame", value=f"{frames} frames")
    photometric = header.text("PhotometricInterpretation").upper()
    samples = header.number("SamplesPerPixel")
    if photometric.startswith(("RGB", "YBR", "PALETTE", "HSV", "ARGB", "CMYK", "XYB")) or samples in (3, 4):
        raise ColourImage("the image is in colour", value=f"{photometric or 'unknown'}, {samples} samples per pixel")
    if photometric not in ("MONOCHROME1", "MONOCHROME2"):
        raise InvalidStudy("the photometric interpretation is not one of a grey image", value=photometric[:40] or "none")
    if samples not in (None, 1):
        raise InvalidStudy("a grey image has one sample per pixel", value=samples)
    allocated = header.number("BitsAllocated")
    is_float = pixels.keyword != "PixelData"
    allowed = {"PixelData": (8, 16, 32), "FloatPixelData": (32,), "DoubleFloatPixelData": (64,)}[pixels.keyword]
    if allocated not in allowed:
        raise InvalidStudy(f"BitsAllocated must be one of {', '.join(str(v) for v in allowed)}", value=allocated)
    if rows * columns * allocated // 8 > limits.max_decoded_bytes:
        raise StudyTooLarge(f"the pixels need more than {limits.max_decoded_bytes} bytes", value=f"{rows} x {columns} x {allocated} bits")
    inverted = photometric == "MONOCHROME1"
    if is_float:
        return _Layout(rows, columns, allocated, allocated, allocated - 1, True, True, inverted)
    stored = header.number("BitsStored")
    stored = allocated if stored is None else stored
    if not 1 <= stored <= allocated:
        raise InvalidStudy("BitsStored must lie between 1 and BitsAllocated", value=f"{stored} of {allocated}")
    high_bit = header.number("HighBit")
    if high_bit is None or not stored - 1 <= high_bit < allocated:
        if high_bit is not None:
            header.note("HighBit makes no sense and was taken as BitsStored - 1")
        high_bit = stored - 1
    representation = header.number("PixelRepresentation")
    if representation not in (0, 1):
        raise InvalidStudy("PixelRepresentation must be 0 or 1", value=representation)
    return _Layout(rows, columns, allocated, stored, high_bit, representation == 1, False, inverted)


def _stored_pixels(buffer: Buffer, header: Header, pixels: Pixels, layout: _Layout, limits: Limits) -> NDArray[Any]:
    """H x W of the file's own integer (or float) type, native byte order, unused bits removed."""
    compressed = header.syntax is not None and header.syntax.is_encapsulated
    if pixels.encapsulated and not compressed:
        raise InvalidStudy("the pixel data is compressed, the transfer syntax says that it is not", value=header.syntax or "none")
    if compressed and not pixels.encapsulated:
        raise InvalidStudy("the pixel data is not compressed, the transfer syntax says that it is", value=header.syntax)
    array = _decoded(buffer, header, pixels, layout, limits) if compressed else _uncompressed(buffer, header, pixels, layout)
    if layout.is_float:
        return array
    # Compressed pixels are numbers, not bit patterns: only stored words have a high bit that can lie elsewhere.
    high_bit = layout.stored - 1 if compressed and header.syntax != uids.RLELossless else layout.high_bit
    bits = array.dtype.itemsize * 8
    up, down = bits - 1 - high_bit, bits - layout.stored
    return np.right_shift(np.left_shift(array, up), down) if down > 0 and up >= 0 else array


def _uncompressed(buffer: Buffer, header: Header, pixels: Pixels, layout: _Layout) -> NDArray[Any]:
    start, length = pixels.runs[0]
    count = layout.rows * layout.columns
    needed = count * layout.allocated // 8
    even = needed + needed % 2
    # Bytes packed in words of the other byte order come in swapped pairs.
    swapped = not header.little and layout.allocated == 8 and pixels.vr == b"OW"
    if swapped:
        needed = even
    if length == 0:
        raise NoPixels("the pixel data is empty")
    if length < needed:
        raise TruncatedStudy("the pixel data is shorter than rows x columns need", value=f"{length} of {needed} bytes")
    if length > even:
        header.note("the pixel data is longer than rows x columns need; the rest was ignored")
    if swapped:
        array = np.frombuffer(buffer, dtype=np.uint16, count=even // 2, offset=start).byteswap().view(layout.dtype(True))[:count]
    else:
        array = np.frombuffer(buffer, dtype=layout.dtype(header.little), count=count, offset=start)
    return array.reshape(layout.rows, layout.columns).astype(array.dtype.newbyteorder("="), copy=False)


def _decoded(buffer: Buffer, header: Header, pixels: Pixels, layout: _Layout, limits: Limits) -> NDArray[Any]:
    if layout.is_float:
        raise InvalidStudy("float pixels cannot be compressed", value=header.syntax)
    if pixels.cut and (not pixels.runs or sum(pixels.runs[-1]) >= len(buffer)):
        header.note("the pixel data has no end marker")
    frame = b"".join(bytes(buffer[start : start + length]) for start, length in pixels.runs)
    if not frame:
        raise NoPixels("the pixel data is empty")
    shape = (layout.rows, layout.columns)
    try:
        array = _codec.decode(
            frame,
            limits,
            syntax=header.syntax or "",
            shape=shape,
            allocated=layout.allocated,
            stored=layout.stored,
            signed=layout.signed,
        )
    except UndecodablePixels as exc:
        if pixels.cut:
            raise TruncatedStudy("the compressed pixel data ends early", value=f"{len(frame)} bytes") from exc
        raise
    if array.shape != shape:
        raise UndecodablePixels("the decoded picture has another size than the header states", value=f"{array.shape}")
    return array


def _lut(header: Header, layout: _Layout) -> tuple[int, NDArray[np.float32]] | None:
    """The modality LUT: (stored value of its first entry, its entries), where there is one."""
    descriptor, data = header.raw("LUTDescriptor"), header.raw("LUTData")
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


def _padding(header: Header, layout: _Layout, stored: NDArray[Any]) -> NDArray[np.bool_] | None:
    """Which pixels are marked as lying outside the image, where any are."""
    first, last = header.raw("PixelPaddingValue"), header.raw("PixelPaddingRangeLimit")
    if layout.is_float or len(first) != 2:
        return None
    form = ("<" if header.little else ">") + ("h" if layout.signed else "H")
    ends = [int(struct.unpack(form, v)[0]) for v in (first, last) if len(v) == 2]
    mask: NDArray[np.bool_] = (stored >= min(ends)) & (stored <= max(ends))
    return mask if mask.any() and not mask.all() else None


def _one_number(header: Header, keyword: str, default: float) -> float:
    numbers = header.decimals(keyword)
    if numbers == []:
        return default
    if numbers is None or not math.isfinite(numbers[0]):
        raise InvalidStudy(f"{keyword} is not a number", value=header.text(keyword)[:40])
    return numbers[0]


def _values(header: Header, layout: _Layout, stored: NDArray[Any]) -> tuple[NDArray[np.float32], tuple[float, float] | None]:
    """Modality values, larger = brighter, H x W float32; and the VOI window (centre, width) on the same scale."""
    slope = _one_number(header, "RescaleSlope", 1.0)
    intercept = _one_number(header, "RescaleIntercept", 0.0)
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
    centre, width = header.decimals("WindowCenter"), header.decimals("WindowWidth")
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
