"""Engines that a device keeps: built once, built again where they cannot be trusted, never handed out torn."""

from __future__ import annotations

import multiprocessing
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.backends._enginecache import EngineCache, Key

KEY = Key("Orin SM87", "tensorrt 11.4.0", "12080", "ab" * 32)
ENGINE = bytes(range(256)) * 8


class Builder:
    """Counts its builds; each gives other bytes, as a real builder may."""

    def __init__(self, engine: bytes = ENGINE) -> None:
        self.count = 0
        self._engine = engine

    def __call__(self) -> bytes:
        self.count += 1
        return self._engine + bytes([self.count])


@pytest.fixture
def cache(tmp_path: Path) -> EngineCache:
    return EngineCache(tmp_path / "engines")


def entry(cache: EngineCache) -> Path:
    (path,) = cache.folder.glob("*.engine")
    return path


def test_built_once(cache: EngineCache) -> None:
    build = Builder()
    assert cache.engine(KEY, build) == cache.engine(KEY, build) == EngineCache(cache.folder).engine(KEY, build) == ENGINE + b"\1"
    assert build.count == 1


@pytest.mark.parametrize(
    "other",
    [
        replace(KEY, device="Orin SM89"),
        replace(KEY, runtime="tensorrt 11.4.1"),
        replace(KEY, driver="12090"),
        replace(KEY, graph_sha256="cd" * 32),
        replace(KEY, options="x"),
    ],
    ids=["device", "runtime", "driver", "graph", "options"],
)
def test_each_part_of_the_key_counts(cache: EngineCache, other: Key) -> None:
    build = Builder()
    cache.engine(KEY, build)
    cache.engine(other, build)
    assert build.count == 2
    cache.engine(KEY, build)
    cache.engine(other, build)
    assert build.count == 2


@pytest.mark.parametrize("keep", [0, 1, 8, 39, 40, 41, 1000])
def test_a_torn_entry_is_built_again(cache: EngineCache, keep: int) -> None:
    build = Builder()
    cache.engine(KEY, build)
    path = entry(cache)
    path.write_bytes(path.read_bytes()[:keep])
    assert cache.engine(KEY, build) == ENGINE + b"\2"
    assert cache.engine(KEY, build) == ENGINE + b"\2"  # and kept whole
    assert build.count == 2


@given(at=st.integers(0, 8 + 32 + len(ENGINE)), bit=st.integers(0, 7))
def test_any_flipped_bit_is_seen(tmp_path_factory: pytest.TempPathFactory, at: int, bit: int) -> None:
    cache = EngineCache(tmp_path_factory.mktemp("engines"))
    build = Builder()
    cache.engine(KEY, build)
    path = entry(cache)
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << bit
    path.write_bytes(data)
    cache.engine(KEY, build)
    assert build.count == 2


def test_an_entry_in_the_place_of_another_is_refused(cache: EngineCache) -> None:
    build = Builder()
    other = replace(KEY, driver="9")
    cache.engine(KEY, build)
    first = entry(cache)
    first.rename(first.with_name(f"{other.digest}.engine"))
    cache.engine(other, build)
    assert build.count == 2


def test_a_build_that_fails_leaves_nothing(cache: EngineCache) -> None:
    def fail() -> bytes:
        raise RuntimeError("no memory on the card")

    with pytest.raises(RuntimeError):
        cache.engine(KEY, fail)
    assert not cache.folder.exists() or list(cache.folder.iterdir()) == []


def test_what_was_used_longest_ago_goes_first(tmp_path: Path) -> None:
    cache = EngineCache(tmp_path, max_bytes=3 * 2100)
    keys = [replace(KEY, driver=str(i)) for i in range(4)]
    build = Builder()
    for i, key in enumerate(keys[:2]):
        cache.engine(key, build)
        os.utime(tmp_path / f"{key.digest}.engine", (1000 + i, 1000 + i))
    assert cache.get(keys[0])  # used now: younger than keys[1]
    cache.engine(keys[2], build)
    cache.engine(keys[3], build)
    assert [cache.get(k) is not None for k in keys] == [True, False, True, True]
    assert sum(p.stat().st_size for p in tmp_path.iterdir()) <= 3 * 2100


def test_scratch_of_a_dead_process_is_swept(cache: EngineCache) -> None:
    cache.folder.mkdir(parents=True)
    dead, alive = cache.folder / ".part-dead", cache.folder / ".part-alive"
    dead.write_bytes(b"half")
    alive.write_bytes(b"half")
    old = time.time() - 7200
    os.utime(dead, (old, old))
    cache.engine(KEY, Builder())
    assert not dead.exists()
    assert alive.exists()


def test_a_disk_that_cannot_be_written_costs_a_rebuild_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    cache = EngineCache(blocked)
    build = Builder()
    assert cache.engine(KEY, build) == ENGINE + b"\1"
    assert cache.engine(KEY, build) == ENGINE + b"\2"

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    cache = EngineCache(tmp_path / "engines")
    monkeypatch.setattr(os, "fsync", full)
    assert cache.engine(KEY, build) == ENGINE + b"\3"
    assert list(cache.folder.iterdir()) == []


def _one_process(folder: str, start: object, seed: int, answers: object) -> None:
    cache = EngineCache(Path(folder))
    start.wait()  # type: ignore[attr-defined]
    good = True
    for i in range(40):
        key = replace(KEY, driver=str(i % 4))
        engine = cache.engine(key, lambda i=i: bytes([seed]) * (1000 + i % 4))
        good = good and len(engine) == 1000 + i % 4 and len(set(engine)) == 1
        if i % 5 == seed:
            cache.drop(key)
    answers.put(good)  # type: ignore[attr-defined]


def test_processes_at_once_never_see_a_torn_engine(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    start, answers = context.Event(), context.Queue()
    workers = [context.Process(target=_one_process, args=(str(tmp_path), start, seed, answers)) for seed in (1, 2)]
    for w in workers:
        w.start()
    start.set()
    assert [answers.get(timeout=60) for _ in workers] == [True, True]
    for w in workers:
        w.join(10)
        assert w.exitcode == 0
    assert all(p.suffix == ".engine" for p in tmp_path.iterdir())
