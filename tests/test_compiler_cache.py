"""Stages kept by content: found again, never believed when torn, never in the way when the disk is full."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from types import ModuleType

import pytest

from appliance.compiler import cache as module
from appliance.compiler.cache import Cache, code_digest
from appliance.errors import CompileDiskFull


class Maker:
    def __init__(self, answer: bytes) -> None:
        self.answer, self.calls = answer, 0

    def __call__(self) -> bytes:
        self.calls += 1
        return self.answer


def test_the_second_time_is_kept_and_another_key_is_not(tmp_path: Path) -> None:
    cache, make = Cache(tmp_path / "c"), Maker(b"engine")
    assert cache.blob("quantise", {"model": "a"}, make) == b"engine"
    assert Cache(tmp_path / "c").blob("quantise", {"model": "a"}, make) == b"engine"
    assert make.calls == 1
    cache.blob("quantise", {"model": "b"}, make)
    cache.blob("build", {"model": "a"}, make)
    assert make.calls == 3
    assert (cache.hits, cache.misses) == (0, 3)


@pytest.mark.parametrize("damage", ["cut", "flipped", "emptied", "gone"])
def test_a_damaged_entry_is_made_again(tmp_path: Path, damage: str) -> None:
    cache, make = Cache(tmp_path), Maker(b"x" * 1000)
    cache.blob("s", {}, make)
    (entry,) = tmp_path.iterdir()
    data = bytearray(entry.read_bytes())
    if damage == "gone":
        entry.unlink()
    else:
        data[500] ^= 1
        entry.write_bytes(bytes(data) if damage == "flipped" else bytes(data[:600]) if damage == "cut" else b"")
    assert cache.blob("s", {}, make) == b"x" * 1000
    assert make.calls == 2
    assert cache.blob("s", {}, make) == b"x" * 1000
    assert make.calls == 2


def test_what_failed_is_not_kept(tmp_path: Path) -> None:
    def fails() -> bytes:
        raise ValueError("no")

    cache = Cache(tmp_path)
    with pytest.raises(ValueError, match="no"):
        cache.blob("s", {}, fails)
    assert list(tmp_path.iterdir()) == []


def test_json_comes_back_alike_kept_or_not(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    first = cache.json("s", {}, lambda: {"pair": (1, 2.5), "none": None})
    assert first == {"pair": [1, 2.5], "none": None}
    assert cache.json("s", {}, lambda: pytest.fail("made twice")) == first


def test_parts_stay_together(tmp_path: Path) -> None:
    parts = {"model": os.urandom(5000), "record": b"", "more": b"{}"}
    cache = Cache(tmp_path)
    assert cache.parts("s", {}, lambda: parts) == parts
    assert cache.parts("s", {}, lambda: pytest.fail("made twice")) == parts
    assert len(list(tmp_path.iterdir())) == 1


def test_without_a_folder_nothing_is_kept() -> None:
    make = Maker(b"x")
    cache = Cache(None)
    assert cache.blob("s", {}, make) + cache.blob("s", {}, make) == b"xx"
    assert make.calls == 2


def test_a_full_disk_says_so_and_leaves_no_scrap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CompileDiskFull, match="No space left"):
        Cache(tmp_path).blob("s", {}, Maker(b"x"))
    assert list(tmp_path.iterdir()) == []


def test_the_oldest_go_when_the_folder_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_BYTES", 2500)
    cache, make = Cache(tmp_path), Maker(b"x" * 968)  # 1000 with its digest
    for i, name in enumerate("ab"):
        cache.blob("s", {"k": name}, make)
        for entry in tmp_path.iterdir():
            os.utime(entry, (100 + i, 100 + i)) if entry.stat().st_mtime > 1e9 else None
    cache.blob("s", {"k": "c"}, make)
    assert make.calls == 3
    cache.blob("s", {"k": "b"}, make)
    assert make.calls == 3
    cache.blob("s", {"k": "a"}, make)
    assert make.calls == 4


def test_an_edit_of_the_code_is_another_key(tmp_path: Path) -> None:
    def load(source: str, name: str) -> ModuleType:
        import importlib.util

        path = tmp_path / f"{name}.py"
        path.write_text(source)
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        return importlib.util.module_from_spec(spec)

    one, same, other = load("x = 1\n", "one"), load("x = 1\n", "same"), load("x = 2\n", "other")
    assert code_digest(one) == code_digest(same) != code_digest(other)
