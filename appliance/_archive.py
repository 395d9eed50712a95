"""The single-file form of a bundle: a zip whose every byte is accounted for.

Hides the zip. Written: entries stored, sorted, of one fixed date, so that the same files give the same bytes. Read: only what
could have been written so; an entry that is compressed, encrypted, linked, doubled, overlapping or badly named, and any byte
that belongs to no entry, make the whole file corrupt before a single entry is read.
"""

from __future__ import annotations

import re
import stat
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO

from appliance.errors import BundleCorrupt

SUFFIX = ".spinebox"
PATH = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}(/[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}){0,5}")
MAX_BYTES = 2 << 30  # beyond it a zip needs its 64-bit form
_DATE = (1980, 1, 1, 0, 0, 0)
_MODE = stat.S_IFREG | 0o644
_END = struct.Struct("<4s4H2LH")  # end of central directory: PKWARE APPNOTE 4.3.16
_LOCAL = struct.Struct("<4s5H3L2H")  # local file header: APPNOTE 4.3.7
_ENTRY_BYTES = 46 + 700  # of the central directory, with the longest name


def write(f: IO[bytes], files: Iterable[tuple[str, Callable[[], bytes]]]) -> None:
    """`files` are names and how to read them; one is in memory at a time. Raises OSError as the file does."""
    with zipfile.ZipFile(f, "w", zipfile.ZIP_STORED, allowZip64=False) as archive:
        for name, read in sorted(files, key=lambda x: x[0]):
            info = zipfile.ZipInfo(name, _DATE)
            info.create_system = 3
            info.external_attr = _MODE << 16
            archive.writestr(info, read())


class Archive:
    """An archive at `path`, its layout checked. Raises BundleCorrupt; OSError where the file cannot be read."""

    def __init__(self, path: Path, most_entries: int) -> None:
        self.path = path
        self._where: dict[str, tuple[int, int, int]] = {}  # offset of the bytes, their count, CRC-32
        with path.open("rb") as f:
            start = self._end(f, most_entries)
            try:
                with zipfile.ZipFile(f) as archive:
                    entries = sorted(archive.infolist(), key=lambda i: i.header_offset)
            except (zipfile.BadZipFile, NotImplementedError, struct.error, ValueError, EOFError, OverflowError) as error:
                raise BundleCorrupt(f"the archive's directory cannot be read: {error}", value=path) from error
            if len(entries) > most_entries:
                raise BundleCorrupt(f"the archive has more than {most_entries} entries", value=path)
            place = 0
            for info in entries:
                place = self._entry(f, info, place)
            if place != start:
                raise BundleCorrupt("the archive holds bytes that belong to no entry, or entries overlap", value=path)

    def names(self) -> set[str]:
        return set(self._where)

    def size(self, name: str) -> int:
        """Raises KeyError where there is no such entry."""
        return self._where[name][1]

    def read(self, name: str) -> bytes:
        """Raises KeyError, OSError, BundleCorrupt (the file changed since it was opened)."""
        offset, size, crc = self._where[name]
        with self.path.open("rb") as f:
            f.seek(offset)
            data = f.read(size)
        if len(data) != size or zlib.crc32(data) != crc:
            raise BundleCorrupt(f"{name} does not match its CRC-32", value=self.path)
        return data

    def _end(self, f: IO[bytes], most_entries: int) -> int:
        """Where the central directory begins, after a look at its end; nothing of a size that the file claims is read before."""
        size = f.seek(0, 2)
        if not _END.size <= size <= MAX_BYTES:
            raise BundleCorrupt(f"an archive has {_END.size} to {MAX_BYTES} bytes", value=f"{self.path}: {size}")
        f.seek(size - _END.size)
        magic, disk, first, here, total, length, start, comment = _END.unpack(f.read(_END.size))
        if magic != b"PK\x05\x06" or disk or first or comment:
            raise BundleCorrupt("this is no bundle archive, or something was appended to it", value=self.path)
        if here != total or total > most_entries or length > total * _ENTRY_BYTES:
            raise BundleCorrupt(f"the archive claims more than {most_entries} entries", value=f"{self.path}: {total}")
        if start + length != size - _END.size:
            raise BundleCorrupt("the archive's directory does not lie where it says", value=self.path)
        return int(start)

    def _entry(self, f: IO[bytes], info: zipfile.ZipInfo, place: int) -> int:
        """Check one entry, which must begin at `place`; where the next one must begin."""
        name = info.orig_filename
        where = f"{self.path}: {name!r}"
        if not PATH.fullmatch(name) or name != info.filename:
            raise BundleCorrupt("the archive holds a path that leaves the bundle", value=where)
        if name in self._where:
            raise BundleCorrupt("the archive holds the same path twice", value=where)
        if info.flag_bits or info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
            raise BundleCorrupt("entries of a bundle archive are stored: not compressed, not encrypted", value=where)
        if info.create_system != 3 or info.external_attr >> 16 != _MODE or info.extra or info.comment:
            raise BundleCorrupt("entries of a bundle archive are plain files", value=where)
        if info.header_offset != place:
            raise BundleCorrupt("the archive holds bytes that belong to no entry, or entries overlap", value=where)
        f.seek(place)
        raw = f.read(_LOCAL.size + len(name))
        if len(raw) != _LOCAL.size + len(name):
            raise BundleCorrupt("the archive ends in the middle of an entry", value=where)
        magic, _, flags, method, _, _, crc, packed, size, name_length, extra_length = _LOCAL.unpack(raw[: _LOCAL.size])
        same = (magic, flags, method, crc, packed, size, name_length, extra_length, raw[_LOCAL.size :]) == (
            (b"PK\x03\x04", 0, zipfile.ZIP_STORED, info.CRC, info.file_size, info.file_size, len(name), 0, name.encode())
        )
        if not same:
            raise BundleCorrupt("an entry's own header differs from the archive's directory", value=where)
        begin = place + len(raw)
        self._where[name] = (begin, info.file_size, info.CRC)
        return begin + info.file_size
