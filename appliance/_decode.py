"""The process that runs image codecs, and the wire between it and `study`.

Hides every codec (pydicom's decoders over GDCM, and OpenCV's PNG and JPEG readers) behind one question: these bytes, this
size, which pixels? A codec that crashes, hangs or wants too much memory ends this process and nothing else.
`study` starts this file as a script, so it imports nothing of the appliance; and it is imported by `study` for the wire
format alone, so the codecs are imported in `main` only. The wire is fixed-size headers and raw pixels: nothing that comes
back from a process that a hostile file may have taken over is ever interpreted as an object.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import os
import resource
import socket
import struct
import sys
import warnings
from collections.abc import Callable
from typing import Any

# magic, kind, transfer syntax UID, rows, columns, bits allocated, bits stored, pixel representation, memory, CPU s, payload
REQUEST = struct.Struct("<4sB64sIIBBBQIQ")
# magic, status, numpy kind, item size, rows, columns, channels, payload
RESPONSE = struct.Struct("<4sB1sBIIIQ")
READY = b"SBXR"
MAGIC = b"SBXD"
KIND_DICOM, KIND_RASTER = 0, 1
STATUS_OK, STATUS_FAILED, STATUS_MEMORY, STATUS_MISSING = 0, 1, 2, 3
MAX_MESSAGE_BYTES = 300

_RLE = "1.2.840.10008.1.2.5"
_JPEG_EXTENDED = "1.2.840.10008.1.2.4.51"

Decode = Callable[[str, int, int, int, int, int, bytes], Any]


class _Missing(Exception):
    """A codec library is not installed."""


def _encapsulate(frame: bytes) -> bytes:
    """One frame as an item sequence: empty offset table, one even fragment, delimiter."""
    frame += b"\0" * (len(frame) % 2)
    parts = (b"\xfe\xff\x00\xe0\0\0\0\0", struct.pack("<HHI", 0xFFFE, 0xE000, len(frame)), frame, b"\xfe\xff\xdd\xe0\0\0\0\0")
    return b"".join(parts)


def _gdcm_extended(gdcm: Any, np: Any, rows: int, columns: int, stored: int, frame: bytes) -> Any:
    """JPEG Extended of 9 to 12 bits: pydicom refuses it with GDCM, which has been able to since 3.0."""
    fragment = gdcm.Fragment()
    fragment.SetByteStringValue(frame)
    fragments = gdcm.SequenceOfFragments.New()
    fragments.AddFragment(fragment)
    element = gdcm.DataElement(gdcm.Tag(0x7FE0, 0x0010))
    element.SetValue(fragments.__ref__())
    image = gdcm.Image()
    image.SetNumberOfDimensions(2)
    image.SetDimensions((columns, rows, 1))
    image.SetDataElement(element)
    image.SetPhotometricInterpretation(gdcm.PhotometricInterpretation(gdcm.PhotometricInterpretation.MONOCHROME2))
    image.SetTransferSyntax(gdcm.TransferSyntax(gdcm.TransferSyntax.GetTSType(_JPEG_EXTENDED)))
    image.SetPixelFormat(gdcm.PixelFormat(1, 16, stored, stored - 1, 0))
    raw = image.GetBuffer().encode("utf-8", "surrogateescape")
    return np.frombuffer(raw, dtype="<u2").reshape(rows, columns)


def _load() -> tuple[Decode, Decode]:
    """Import the codecs and return (decode a DICOM frame, decode a PNG or JPEG)."""
    import cv2
    import numpy as np
    from pydicom.pixels import get_decoder

    gdcm: Any = None
    with contextlib.suppress(ImportError):
        gdcm = importlib.import_module("gdcm")
    cv2.setNumThreads(1)

    def dicom(syntax: str, rows: int, columns: int, allocated: int, stored: int, signed: int, frame: bytes) -> Any:
        if syntax != _RLE and gdcm is None:
            raise _Missing("python-gdcm is not installed")
        if syntax == _JPEG_EXTENDED and allocated == 16 and stored > 8:
            return _gdcm_extended(gdcm, np, rows, columns, stored, frame)
        array, _ = get_decoder(syntax).as_array(
            _encapsulate(frame),
            index=0,
            raw=True,
            # Named, so that no other plugin that happens to be installed changes the answer.
            decoding_plugin="pydicom" if syntax == _RLE else "gdcm",
            rows=rows,
            columns=columns,
            number_of_frames=1,
            samples_per_pixel=1,
            bits_allocated=allocated,
            bits_stored=stored,
            pixel_representation=signed,
            photometric_interpretation="MONOCHROME2",
            pixel_keyword="PixelData",
        )
        return array

    def raster(_syntax: str, _rows: int, _columns: int, _allocated: int, _stored: int, _signed: int, data: bytes) -> Any:
        array = cv2.imdecode(np.frombuffer(data, dtype=np.uint8), cv2.IMREAD_UNCHANGED)
        if array is None:
            raise ValueError("the picture cannot be decoded")
        return array

    # First use of a decoder imports and allocates: pay before the first request, not in it.
    raster("", 1, 1, 8, 8, 0, cv2.imencode(".png", np.zeros((4, 4), dtype=np.uint8))[1].tobytes())
    return dicom, raster


def _limit(memory_bytes: int, cpu_s: int) -> None:
    """Allow this much more address space than is mapped now, and this much more processor time than was used."""
    with open("/proc/self/statm", encoding="ascii") as statm:  # noqa: PTH123 - pathlib would be an import for one line
        mapped = int(statm.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + memory_bytes, resource.RLIM_INFINITY))
    usage = resource.getrusage(resource.RUSAGE_SELF)
    used_s = math.ceil(usage.ru_utime + usage.ru_stime)
    resource.setrlimit(resource.RLIMIT_CPU, (used_s + cpu_s, resource.RLIM_INFINITY))


def _receive(sock: socket.socket, length: int) -> bytearray | None:
    """Exactly `length` bytes, or None where the other side is gone."""
    out = bytearray(length)
    view = memoryview(out)
    while view:
        count = sock.recv_into(view)
        if count == 0:
            return None
        view = view[count:]
    return out


def _reply_error(sock: socket.socket, status: int, message: str) -> None:
    text = message.encode("utf-8", "replace")[:MAX_MESSAGE_BYTES]
    sock.sendall(RESPONSE.pack(MAGIC, status, b"u", 1, 0, 0, 0, len(text)) + text)


def _serve(sock: socket.socket, dicom: Decode, raster: Decode) -> None:
    while True:
        head = _receive(sock, REQUEST.size)
        if head is None:
            return
        _, kind, uid, rows, columns, allocated, stored, signed, memory, cpu_s, length = REQUEST.unpack(head)
        payload = _receive(sock, length)
        if payload is None:
            return
        syntax = uid.rstrip(b"\0").decode("ascii")
        try:
            _limit(memory, cpu_s)
            decode = raster if kind == KIND_RASTER else dicom
            array = decode(syntax, rows, columns, allocated, stored, signed, bytes(payload))
            channels = 1 if array.ndim == 2 else int(array.shape[2])
            body = memoryview(array.astype(array.dtype.newbyteorder("<"), order="C", copy=False)).cast("B")
        except MemoryError:
            _reply_error(sock, STATUS_MEMORY, "out of memory")
            continue
        except _Missing as exc:
            _reply_error(sock, STATUS_MISSING, str(exc))
            continue
        except Exception as exc:  # noqa: BLE001 - whatever a codec raises about hostile bytes is an answer, not a failure
            _reply_error(sock, STATUS_FAILED, " ".join(f"{type(exc).__name__}: {exc}".split()))
            continue
        kind_byte = str(array.dtype.kind).encode("ascii")
        height, width = (int(v) for v in array.shape[:2])
        sock.sendall(RESPONSE.pack(MAGIC, STATUS_OK, kind_byte, array.dtype.itemsize, height, width, channels, body.nbytes))
        sock.sendall(body)


def main() -> int:
    """Serve requests on file descriptor 0, a socket, until it closes."""
    sock = socket.socket(fileno=os.dup(0))
    # Codecs print to both outputs as they please; nobody reads them, and the socket must stay ours alone.
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    warnings.simplefilter("ignore")
    dicom, raster = _load()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    sock.sendall(READY)
    _serve(sock, dicom, raster)
    return 0


if __name__ == "__main__":
    sys.exit(main())
