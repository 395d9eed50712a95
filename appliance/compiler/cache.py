"""Stages kept by content: the same inputs, the same code and the same tools give the kept answer, in milliseconds.

Hides where answers lie and how they are trusted. A key is the digest of everything that the answer depends on, the source of
the code among it, so an edit never meets an old answer. An entry carries its own digest: a torn or altered one is made again.
Every stage of a compile is kept as soon as it is done, so an interrupted compile goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from appliance.bundle import canonical
from appliance.errors import CompileDiskFull

MAX_BYTES = 8 << 30  # of the folder; the oldest entries go first
_DIGEST_BYTES = 32


@cache
def code_digest(*modules: ModuleType) -> str:
    """SHA-256 over the sources of modules: what a stage's answer depends on besides its inputs."""
    h = hashlib.sha256()
    for module in modules:
        h.update(inspect.getsource(module).encode())
    return h.hexdigest()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def default_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME", str(Path.home() / ".cache"))) / "spinebox" / "compile"


def _pack(parts: Mapping[str, bytes]) -> bytes:
    head = canonical([[name, len(data)] for name, data in parts.items()])
    return len(head).to_bytes(8, "little") + head + b"".join(parts.values())


class Cache:
    """`folder` None keeps nothing: every stage is computed."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.hits = 0
        self.misses = 0

    def blob(self, stage: str, key: Mapping[str, Any], make: Callable[[], bytes]) -> bytes:
        """The kept answer of `stage` for `key` (JSON values), or `make()`, kept. Raises what `make` raises, CompileDiskFull."""
        if self.folder is None:
            return make()
        path = self.folder / f"{stage}-{sha256(canonical({'stage': stage, **key}))}"
        kept = self._read(path)
        if kept is not None:
            self.hits += 1
            return kept
        self.misses += 1
        data = make()
        self._write(path, data)
        return data

    def json(self, stage: str, key: Mapping[str, Any], make: Callable[[], Any]) -> Any:
        """As `blob`, for JSON values; what comes back went through JSON, kept or not, so both are alike."""
        return json.loads(self.blob(stage, key, lambda: canonical(make())))

    def parts(self, stage: str, key: Mapping[str, Any], make: Callable[[], Mapping[str, bytes]]) -> dict[str, bytes]:
        """As `blob`, for an answer of several named parts, kept together or not at all."""
        packed = self.blob(stage, key, lambda: _pack(make()))
        out: dict[str, bytes] = {}
        head = int.from_bytes(packed[:8], "little")
        start = 8 + head
        for name, size in json.loads(packed[8:start]):
            out[name] = packed[start : start + size]
            start += size
        return out

    def _read(self, path: Path) -> bytes | None:
        try:
            data = path.read_bytes()
            os.utime(path)  # last use, for whoever makes room
        except OSError:
            return None
        body = data[_DIGEST_BYTES:]
        return body if hashlib.sha256(body).digest() == data[:_DIGEST_BYTES] else None

    def _write(self, path: Path, data: bytes) -> None:
        part: str | None = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, part = tempfile.mkstemp(prefix=".part-", dir=path.parent)
            with os.fdopen(handle, "wb") as f:
                f.write(hashlib.sha256(data).digest() + data)
                f.flush()
                os.fsync(f.fileno())
            Path(part).replace(path)
        except OSError as error:
            if part is not None:
                Path(part).unlink(missing_ok=True)
            raise CompileDiskFull(f"a stage cannot be kept: {error.strerror}", value=path.parent) from error
        self._make_room()

    def _make_room(self) -> None:
        assert self.folder is not None  # noqa: S101 - only called where entries are kept; for the type checker
        entries = [(p.stat().st_mtime, p.stat().st_size, p) for p in self.folder.iterdir() if p.is_file()]
        total = sum(size for _, size, _ in entries)
        for _, size, path in sorted(entries, key=lambda e: e[0]):
            if total <= MAX_BYTES:
                break
            path.unlink(missing_ok=True)
            total -= size
