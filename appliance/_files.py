"""Paths -> the image files behind them, in the order in which they belong.

Hides what a file system can put in the way (pipes, loops, endless folders, files that cannot be opened), how a file's format
is told by its first bytes, and how the slices of a series are put in order.
"""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import numpy as np

from appliance import _dicom, _raster
from appliance._limits import DEFAULT_LIMITS
from appliance.errors import NoPixels, NotAnImage, SpineboxError, UsageError

_HEAD_BYTES: Final = 64 << 10
_MAX_DEPTH: Final = 32
# Series by series, by number, then along the normal; others by path, at the end: (1 for others, series, number, mm, path).
_Place = tuple[int, str, int, float, str]


def format_of(data: bytes) -> str | None:
    """ "DICOM", "PNG" or "JPEG", from the first bytes of a file; None where it is something else."""
    # A preamble may hold anything, the beginning of a picture too: what follows it counts.
    if data[128:132] == b"DICM":
        return "DICOM"
    if data.startswith(_raster.PNG_MAGIC):
        return "PNG"
    if data.startswith(_raster.JPEG_MAGIC):
        return "JPEG"
    return "DICOM" if _dicom.looks_like_dicom(data) else None


def open_regular(path: Path) -> tuple[int, int]:
    """(descriptor, size in bytes) of a regular file, to be closed by the caller. Raises UsageError, NotAnImage.

    Opened before it is looked at, without waiting, so that a pipe put in its place cannot hold us.
    """
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


def _head(path: Path) -> bytes:
    """The first bytes of a regular file; b"" where it cannot be read or is something else."""
    try:
        descriptor, _ = open_regular(path)
        with os.fdopen(descriptor, "rb") as stream:
            return stream.read(_HEAD_BYTES)
    except (SpineboxError, OSError):
        return b""


def _place(path: Path) -> _Place | None:
    """None where the file does not look like an image, or is a DICOMDIR."""
    head = _head(path)
    kind = format_of(head)
    if kind is None:
        return None
    other = (1, "", 0, 0.0, str(path))
    if kind != "DICOM":
        return other
    try:
        _, header = _dicom.parse(head, DEFAULT_LIMITS, only_head=True)
    except (NotAnImage, NoPixels):
        return None
    except SpineboxError:  # for whoever reads it to say
        return other
    series, number = header.uid("SeriesInstanceUID"), header.integer("InstanceNumber")
    if series is None:
        return other
    position, axes = header.decimals("ImagePositionPatient") or [], header.axes()
    along_mm = 0.0
    if len(position) == 3 and all(math.isfinite(v) for v in position) and axes is not None:
        along_mm = float(np.cross(*axes) @ np.array(position))
    return 0, series, 1 << 62 if number is None else number, along_mm, str(path)


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
            yield Path(where) / name


def find_inputs(paths: Sequence[Path], limit: int = 100_000) -> list[Path]:
    """The files to read: those named, as they are, and from each folder the DICOM, PNG and JPEG files below it.

    A folder's files are told by their first bytes, not by name; a DICOMDIR is left out. DICOM comes series by series, in the
    order of InstanceNumber or, where that is the same, of position; then the rest by path. Only heads are read, one at a
    time. Raises UsageError for a path that is not there and for more than `limit` files.
    """
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            places: list[_Place] = []
            for file in _files_below(path, limit):
                place = _place(file)
                if place is not None:
                    places.append(place)
                if len(found) + len(places) > limit:
                    break
            found.extend(Path(place[-1]) for place in sorted(places))
        elif path.exists() or path.is_symlink():
            found.append(path)
        else:
            raise UsageError("there is no such file or folder", value=path, remedy="Check the path.")
        if len(found) > limit:
            raise UsageError(f"more than {limit} images were found", value=path, remedy="Name a smaller folder.")
    return found
