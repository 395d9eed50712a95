"""Engines that a device built for itself, kept between starts. A cache, never a truth: the bundle can always build them again.

Hides where they lie and how they are trusted. The key is everything that an engine depends on: device, runtime, driver, graph.
An entry carries its own digest and is written whole or not at all, so a power cut, a bad sector or a second process can cost a
rebuild and nothing else. A disk that is full or read-only costs every start a rebuild, and is no failure.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

MAX_BYTES = 2 << 30  # of the folder; what was used longest ago goes first
_MAGIC = b"SPXENG1\n"
_DIGEST_BYTES = 32
_STALE_S = 3600.0  # a scratch file this old belongs to a process that died
_SCRATCH = ".part-"


@dataclass(frozen=True)
class Key:
    """What an engine depends on. `device` names the very card (and its compute capability), `runtime` the library and version,
    `options` whatever else was asked for."""

    device: str
    runtime: str
    driver: str
    graph_sha256: str
    options: str = ""

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


def default_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "spinebox" / "engines"


class EngineCache:
    def __init__(self, folder: Path | None = None, max_bytes: int = MAX_BYTES) -> None:
        self.folder = folder or default_folder()
        self.max_bytes = max_bytes

    def get(self, key: Key) -> bytes | None:
        """The kept engine, or None where there is none that can be trusted."""
        path = self._path(key)
        try:
            if path.stat().st_size > self.max_bytes:
                return None
            data = path.read_bytes()
        except OSError:
            return None
        head = len(_MAGIC) + _DIGEST_BYTES
        body = data[head:]
        # The digest is over the key too: an entry that was renamed to another's place is refused.
        if data[: len(_MAGIC)] != _MAGIC or _digest(key, body) != data[len(_MAGIC) : head]:
            return None
        with contextlib.suppress(OSError):
            os.utime(path)  # last use, for whoever makes room
        return body

    def put(self, key: Key, engine: bytes) -> None:
        """Keep `engine`; silently not, where the disk does not allow it."""
        part = ""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            handle, part = tempfile.mkstemp(prefix=_SCRATCH, dir=self.folder)
            with os.fdopen(handle, "wb") as f:
                f.write(_MAGIC + _digest(key, engine) + engine)
                f.flush()
                os.fsync(f.fileno())
            Path(part).replace(self._path(key))
            self._make_room()
        except OSError:
            with contextlib.suppress(OSError):
                if part:
                    Path(part).unlink(missing_ok=True)

    def drop(self, key: Key) -> None:
        """Forget an engine that the runtime would not take back although it is whole."""
        with contextlib.suppress(OSError):
            self._path(key).unlink(missing_ok=True)

    def engine(self, key: Key, build: Callable[[], bytes]) -> bytes:
        """The kept engine of `key`, or `build()`, kept. Two processes at once may both build; each gets a whole one."""
        kept = self.get(key)
        if kept is not None:
            return kept
        made = build()
        self.put(key, made)
        return made

    def _path(self, key: Key) -> Path:
        return self.folder / f"{key.digest}.engine"

    def _make_room(self) -> None:
        entries = []
        newest = max((p.stat().st_mtime for p in self.folder.glob("*.engine")), default=0.0)
        for path in self.folder.iterdir():
            with contextlib.suppress(FileNotFoundError):  # another process makes room too
                state = path.stat()
                if path.name.startswith(_SCRATCH):
                    if state.st_mtime < newest - _STALE_S:
                        path.unlink()
                elif path.suffix == ".engine":
                    entries.append((state.st_mtime, state.st_size, path))
        total = sum(size for _, size, _ in entries)
        for _, size, path in sorted(entries, key=lambda e: (e[0], e[2].name)):
            if total <= self.max_bytes:
                break
            path.unlink(missing_ok=True)
            total -= size


def _digest(key: Key, body: bytes) -> bytes:
    return hashlib.sha256(key.digest.encode() + body).digest()
