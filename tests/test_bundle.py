"""A bundle is written whole or not at all, what was written is what is read, and a device runs only what it may."""

from __future__ import annotations

import copy
import errno
import fcntl
import hashlib
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from small_bundles import ABSENT, ENGINE, GRAPH, PATH, PROFILE, REFUSED, manifest, refused, write

from appliance import backends, signing
from appliance import bundle as bundle_module
from appliance.backends import Signature, Tensor
from appliance.bundle import (
    FORMAT,
    MANIFEST,
    MAX_FILES,
    SIGNATURE,
    Bundle,
    Writer,
    canonical,
    check_authored,
    check_installable,
    new_bundle,
    open_bundle,
    pack,
    read_bundle,
    sign_bundle,
    unpack,
    write_profile,
)
from appliance.engine import Engine
from appliance.errors import (
    BackendUnavailable,
    BundleCorrupt,
    BundleIncompatible,
    BundleMissing,
    BundleUnsigned,
    CompileDiskFull,
    UsageError,
)
from kernels.preprocess import PREPROCESS_VERSION

PROFILE_FILE = bundle_module.PROFILE


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write(tmp_path / "b", profile=PROFILE)


def entries(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


# -- what was written is read ---------------------------------------------------------------------------------------


def test_what_was_written_is_read(root: Path) -> None:
    bundle = open_bundle(root)
    assert isinstance(bundle, Bundle)
    assert bundle.read(PATH) == GRAPH
    entry = bundle.engine("segmenter")
    assert entry.signature == Signature((Tensor("image", (1, 1, 8, 8)),), (Tensor("logits", (1, 4, 4, 4)),))
    assert (entry.name, entry.version, entry.float_share, entry.choice) == ("segmenter", "1", 0.02, "onnxruntime")
    assert {b.backend: (b.graph, b.precision, b.passed) for b in entry.builds.values()} == {
        "onnxruntime": (PATH, "int8", True),
        "openvino": (PATH, "int8", True),
    }
    assert bundle.digest == hashlib.sha256((root / MANIFEST).read_bytes()).hexdigest()
    assert bundle.identity == {"name": "tiny", "digest": bundle.digest, "spinebox": "0.1.0"}
    assert bundle.manifest["format"] == FORMAT
    assert bundle.manifest["preprocess"] == PREPROCESS_VERSION
    assert bundle.manifest["files"][PATH] == {"bytes": len(GRAPH), "sha256": hashlib.sha256(GRAPH).hexdigest()}
    assert not {MANIFEST, SIGNATURE, PROFILE_FILE} & set(bundle.manifest["files"])
    assert bundle.trusted
    assert bundle.profile == PROFILE


def test_the_same_content_has_the_same_bytes_and_other_content_another_digest(tmp_path: Path) -> None:
    for place, name in (("a", "x"), ("b", "x"), ("c", "y")):
        write(tmp_path / place, name)
    a, b, c = (open_bundle(tmp_path / p).digest for p in "abc")
    assert a == b != c
    for file in (MANIFEST, SIGNATURE):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_one_calibration_root_changes_the_identity(tmp_path: Path) -> None:
    write(tmp_path / "a")
    write(tmp_path / "b", change=lambda m: m["models"]["segmenter"]["calibration"].update(root="ce" * 32))
    a, b = open_bundle(tmp_path / "a"), open_bundle(tmp_path / "b")
    assert a.manifest["calibration_root"] != b.manifest["calibration_root"]
    assert a.digest != b.digest


def test_times_are_no_part_of_the_identity(tmp_path: Path) -> None:
    write(tmp_path / "a")
    write(tmp_path / "b", profile=PROFILE)
    assert open_bundle(tmp_path / "a").digest == open_bundle(tmp_path / "b").digest


def test_a_file_that_the_manifest_does_not_list_is_not_read(root: Path) -> None:
    (root / "extra.onnx").write_bytes(GRAPH)
    bundle = open_bundle(root)
    with refused(BundleCorrupt, "does not list"):
        bundle.read("extra.onnx")


def test_a_file_that_changed_after_opening_is_not_read(root: Path) -> None:
    bundle = open_bundle(root)
    file = root / PATH
    file.write_bytes(GRAPH[:-1] + b"!")
    with refused(BundleCorrupt, "SHA-256"):
        bundle.read(PATH)
    file.unlink()
    with refused(BundleCorrupt, "cannot be read"):
        bundle.read(PATH)


@pytest.mark.parametrize("what", ["no folder", "empty folder", "a folder without a manifest"])
def test_no_bundle_there(tmp_path: Path, what: str) -> None:
    place = tmp_path / "b"
    if what != "no folder":
        place.mkdir()
    if what == "a folder without a manifest":
        write(tmp_path / "whole").rename(place / "x")
    with refused(BundleMissing, "no finished bundle"):
        open_bundle(place)


def test_a_family_that_the_bundle_lacks(root: Path) -> None:
    with refused(BundleIncompatible, "has no grader"):
        open_bundle(root).engine("grader")


def test_canonical_json() -> None:
    assert canonical({"b": [1, 2.5], "a": "ß"}) == '{"a":"ß","b":[1,2.5]}'.encode()
    assert canonical(json.loads(canonical({"x": {"z": 1, "y": None}}))) == b'{"x":{"y":null,"z":1}}'
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical({"a": float("nan")})


# -- writing ----------------------------------------------------------------------------------------------------------


def test_the_signature_is_written_last_and_the_manifest_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    signing.author_key()
    synced: list[str] = []
    real = os.fsync

    def note(fd: int) -> None:
        synced.append(Path(f"/proc/self/fd/{fd}").readlink().name)
        real(fd)

    monkeypatch.setattr(bundle_module.os, "fsync", note)
    write(tmp_path / "b", profile=PROFILE)
    files = [n for n in synced if "." in n and not n.startswith(".")]
    assert files[-3:] == [PROFILE_FILE, MANIFEST, SIGNATURE]
    assert {"int8.onnx", "segmenter.csv", "sbom.json"} <= set(files[:-3])


def test_a_failure_leaves_nothing_behind(tmp_path: Path) -> None:
    def fail() -> None:
        with new_bundle(tmp_path / "b") as writer:
            writer.add(PATH, GRAPH)
            raise RuntimeError("power")

    with pytest.raises(RuntimeError, match="power"):
        fail()
    assert entries(tmp_path) == []


def test_an_unfinished_bundle_is_not_moved_into_place(tmp_path: Path) -> None:
    def forget() -> None:
        with new_bundle(tmp_path / "b") as writer:
            writer.add(PATH, GRAPH)

    with refused(BundleCorrupt, "not finished"):
        forget()
    assert entries(tmp_path) == []


def test_a_failure_leaves_the_old_bundle_as_it_was_and_success_replaces_it(root: Path) -> None:
    before = open_bundle(root).digest

    def fail() -> None:
        with new_bundle(root) as writer:
            writer.finish({"name": "half", "models": {}})

    with refused(BundleCorrupt, "lacks"):
        fail()
    assert open_bundle(root).digest == before
    write(root, "second")
    assert open_bundle(root).identity["name"] == "second"
    assert entries(root.parent) == ["b"]


def test_a_system_without_exchange_replaces_it_too_and_a_failure_puts_the_old_one_back(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class NoExchange:
        @staticmethod
        def renameat2(*_: object) -> int:
            return -1

    monkeypatch.setattr(bundle_module.ctypes, "CDLL", lambda *a, **k: NoExchange)
    write(root, "second")
    assert open_bundle(root).identity["name"] == "second"
    real = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if target == root and not self.name.endswith("-old"):
            raise OSError(errno.EIO, "broken disk")
        return real(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with refused(UsageError, "broken disk"):
        write(root, "third")
    assert open_bundle(root).identity["name"] == "second"
    assert entries(root.parent) == ["b"]


def test_what_is_no_bundle_is_not_replaced(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "letter.txt").write_text("dear")
    for place in (home, home / "letter.txt"):
        with refused(UsageError, "not replaced"):
            write(place)
    ran: list[bool] = []
    with refused(UsageError, "not replaced"), new_bundle(home):
        ran.append(True)
    assert ran == [], "refused before the work, not after it"
    assert entries(tmp_path) == ["home"]
    assert (home / "letter.txt").read_text() == "dear"
    (tmp_path / "empty").mkdir()
    open_bundle(write(tmp_path / "empty"))


@pytest.mark.parametrize("point", range(16))
def test_a_full_disk_at_any_point_leaves_no_half_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: int) -> None:
    """The disk fills up at the n-th fsync: files, folders, manifest, signature."""
    root = write(tmp_path / "b", "old")
    before = open_bundle(root).digest
    real, count = os.fsync, [0]

    def full(fd: int) -> None:
        count[0] += 1
        if count[0] > point:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(fd)

    monkeypatch.setattr(bundle_module.os, "fsync", full)
    with refused(CompileDiskFull, "No space left"):
        write(root, "new")
    monkeypatch.undo()
    assert entries(tmp_path) == ["b"]
    assert open_bundle(root).digest == before


def test_a_full_disk_while_packing_leaves_the_old_file(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = open_bundle(root)
    out = root.parent / "x.spinebox"
    pack(bundle, out)
    before = out.read_bytes()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(bundle_module.os, "fsync", full)
    with pytest.raises(CompileDiskFull):
        pack(bundle, out, with_profile=False)
    assert out.read_bytes() == before
    assert entries(root.parent) == ["b", "x.spinebox"]


def test_of_concurrent_writers_one_wins_whole(tmp_path: Path) -> None:
    """Each writer has a graph of its own; whatever stands there at the end, or in between, is one writer's."""
    root = tmp_path / "b"
    write(root, "w0", graph=b"0" * 1000)

    def work(n: int) -> None:
        for _ in range(4):
            write(root, f"w{n}", graph=str(n).encode() * 1000)

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(work, range(4))) == [None] * 4
    bundle = open_bundle(root)
    assert bundle.read(PATH) == bundle.manifest["name"][1:].encode() * 1000
    assert entries(tmp_path) == ["b"]


def test_writers_take_turns_at_the_last_step(tmp_path: Path) -> None:
    """While another holds the folder above, a finished bundle waits beside its place."""
    root = tmp_path / "b"
    handle = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(write, root)
        while not list(tmp_path.glob(f".b-*/{SIGNATURE}")):
            time.sleep(0.01)
        time.sleep(0.3)
        assert not root.exists()
        os.close(handle)
        assert waiting.result(timeout=30) == root
    assert open_bundle(root).trusted


@pytest.mark.parametrize("path", ["../x", "/x", "a//b", ".x", "", MANIFEST, SIGNATURE, PROFILE_FILE, "a" * 101])
def test_a_writer_refuses_paths_that_no_reader_would_take(tmp_path: Path, path: str) -> None:
    with refused(BundleCorrupt, "cannot hold"):
        Writer(tmp_path).add(path, b"x")
    assert entries(tmp_path) == []


def test_a_writer_keeps_the_limits_of_a_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = Writer(tmp_path)
    writer.add("a/b", b"x")
    with refused(BundleCorrupt, "once"):
        writer.add("a/b", b"y")
    with pytest.raises(UsageError):  # a file is no folder
        writer.add("a/b/c", b"y")
    monkeypatch.setattr(bundle_module, "MAX_FILE_BYTES", 10)
    with refused(BundleCorrupt, "larger"):
        writer.add("big", b"x" * 11)
    monkeypatch.setattr(bundle_module, "MAX_TOTAL_BYTES", 12)
    writer.add("c", b"x" * 10)
    with refused(BundleCorrupt, "at most"):
        writer.add("d", b"x" * 2)
    monkeypatch.setattr(bundle_module, "MAX_FILES", 2)
    with refused(BundleCorrupt, "at most"):
        writer.add("e", b"")
    assert MAX_FILES > 100


# -- author and device ------------------------------------------------------------------------------------------------


def test_what_an_author_may_write_is_more_than_what_a_device_may_run(tmp_path: Path) -> None:
    """Each of these is a bundle that can be written and inspected; none is one that a device opens."""
    only = {"engines": {"myriad": ABSENT}}
    strange = {"engines": {"abacus": ENGINE}}
    failed = {"engines": {"onnxruntime": REFUSED}}
    for place, part, complaint in (
        ("a", only, "no engine of segmenter"),
        ("b", strange, "no engine of segmenter"),
        ("c", failed, "no engine of segmenter"),
        ("d", {"engines": {"onnxruntime": {**ENGINE, "golden": None}}}, "no golden outputs"),
    ):
        write(tmp_path / place, change=lambda m, part=part: m["models"]["segmenter"].update(copy.deepcopy(part)))
        assert read_bundle(tmp_path / place).trusted
        with refused(BundleIncompatible, complaint):
            open_bundle(tmp_path / place)


def test_format_and_preprocessing_must_be_this_version(root: Path) -> None:
    found = open_bundle(root).manifest
    trusted = signing.trusted_keys()
    for key, wrong in (("format", "99"), ("format", "1"), ("preprocess", "0")):
        changed = {**found, key: wrong}
        check_authored(changed)
        with pytest.raises(BundleIncompatible):
            check_installable(changed, None, trusted)
        (root / MANIFEST).write_bytes(canonical(changed))
        sign = signing.sign(canonical(changed), signing.author_key())
        (root / SIGNATURE).write_bytes(canonical(sign))
        with pytest.raises(BundleIncompatible):
            open_bundle(root)


def test_a_graph_larger_than_the_device_holds(root: Path) -> None:
    found = open_bundle(root).manifest
    check_installable(found, None, None, memory_bytes=4 * len(GRAPH))
    with refused(BundleIncompatible, "too large"):
        check_installable(found, None, None, memory_bytes=4 * len(GRAPH) - 4)


def test_an_unsigned_bundle_opens_only_where_that_is_asked_for(tmp_path: Path) -> None:
    root = write(tmp_path / "b", signed=False)
    with refused(BundleUnsigned, "nobody signed"):
        open_bundle(root)
    bundle = open_bundle(root, require_signature=False)
    assert bundle.signer is None
    assert not bundle.trusted
    sign_bundle(root, signing.author_key())
    assert open_bundle(root).digest == bundle.digest


def test_a_strangers_signature_is_not_trusted(root: Path, tmp_path: Path) -> None:
    signing.generate(tmp_path / "keys/stranger.pem")
    sign_bundle(root, signing.load_private(tmp_path / "keys/stranger.pem"))
    with refused(BundleUnsigned, "not trusted here"):
        open_bundle(root)
    assert not read_bundle(root).trusted
    assert open_bundle(root, require_signature=False).signer is not None


def test_the_shipped_bundle_is_signed_with_the_shipped_key() -> None:
    bundle = open_bundle()
    assert bundle.trusted
    assert bundle.signer is not None
    assert bundle.signer == signing.load_public(signing.SHIPPED_TRUST / "release.pub")
    assert bundle.profile_problem == ""


# -- which engine runs --------------------------------------------------------------------------------------------------


def picked(bundle: Bundle, backend: str = "auto") -> str:
    """The first build that is tried here; the graphs of these bundles are noise, so none is opened."""
    builds = Engine(bundle, backend)._builds(bundle.engine("segmenter"))
    return next(b.backend for b, _ in builds if backends.probe(b.backend).available)


def test_the_profile_chooses_among_what_passed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert backends.PREFERENCE[0] == "openvino"
    assert picked(open_bundle(write(tmp_path / "a", profile=PROFILE))) == "onnxruntime"
    assert picked(open_bundle(write(tmp_path / "b"))) == "openvino"
    monkeypatch.setattr(backends, "probe", lambda name: backends.Probe(name, name == "openvino", "test"))
    assert picked(open_bundle(tmp_path / "a")) == "openvino"
    monkeypatch.setattr(backends, "probe", lambda name: backends.Probe(name, False, "not here"))
    with refused(BackendUnavailable, "onnxruntime: not here"):
        Engine(open_bundle(tmp_path / "a"))._open(open_bundle(tmp_path / "a").engine("segmenter"))


def test_a_refused_engine_never_runs(tmp_path: Path) -> None:
    root = write(tmp_path / "a", change=lambda m: m["models"]["segmenter"]["engines"].update(openvino=copy.deepcopy(REFUSED)))
    bundle = open_bundle(root)
    assert picked(bundle) == "onnxruntime"
    with refused(BackendUnavailable, "let pass"):
        picked(bundle, "openvino")
    profile = copy.deepcopy(PROFILE)
    profile["models"]["segmenter"]["choice"]["backend"] = "openvino"  # type: ignore[index]
    with refused(BundleCorrupt, "did not pass"):
        write_profile(root, profile)
    (root / PROFILE_FILE).write_text(json.dumps(profile))
    bundle = open_bundle(root)
    assert "did not pass" in bundle.profile_problem
    assert picked(bundle) == "onnxruntime"


def test_an_engine_that_nobody_judged_comes_after_those_that_passed(tmp_path: Path) -> None:
    unjudged = {**ENGINE, "passed": None, "verdicts": []}
    bundle = open_bundle(write(tmp_path / "a", change=lambda m: m["models"]["segmenter"]["engines"].update(openvino=unjudged)))
    assert picked(bundle) == "onnxruntime"
    assert [b.backend for b in bundle.engine("segmenter").order()] == ["onnxruntime", "openvino"]
    assert picked(bundle, "openvino") == "openvino"
    without = {**unjudged, "golden": None}
    bundle = open_bundle(write(tmp_path / "b", change=lambda m: m["models"]["segmenter"]["engines"].update(openvino=without)))
    assert [b.backend for b in bundle.engine("segmenter").order()] == ["onnxruntime"]


def test_the_null_backend_needs_no_graph(root: Path) -> None:
    assert picked(open_bundle(root), "null") == "null"


# -- profile ------------------------------------------------------------------------------------------------------------

BAD_PROFILES: dict[str, Any] = {
    "no JSON": b"{",
    "not UTF-8": b"\xff",
    "NaN": json.dumps({**PROFILE, "device": {"x": float("nan")}}).encode(),
    "too deep": b'{"device":{"a":' + b"[" * 100 + b"]" * 100 + b'},"models":{}}',
    "far too deep": b"[" * 200_000,
    "too large": b" " * (bundle_module.MAX_PROFILE_BYTES + 1),
    "a list": b"[]",
    "a model that is not there": json.dumps({"device": {}, "models": {"x": {}}}).encode(),
    "no choice": json.dumps({"device": {}, "models": {"segmenter": {"losers": [], "engines": {}}}}).encode(),
    "the form of old": json.dumps({"segmenter": {}}).encode(),
}


@pytest.mark.parametrize("what", BAD_PROFILES)
def test_a_bad_profile_is_reported_and_costs_only_the_choice(root: Path, what: str) -> None:
    (root / PROFILE_FILE).write_bytes(BAD_PROFILES[what])
    bundle = open_bundle(root)
    assert bundle.profile == {}
    assert bundle.profile_problem
    assert picked(bundle) == "openvino"


def test_a_device_writes_a_profile_of_its_own(root: Path) -> None:
    digest = open_bundle(root).digest
    own = copy.deepcopy(PROFILE)
    own["models"]["segmenter"]["choice"]["backend"] = "openvino"  # type: ignore[index]
    write_profile(root, own)
    bundle = open_bundle(root)
    assert (bundle.digest, picked(bundle)) == (digest, "openvino")
    (root / PROFILE_FILE).unlink()
    assert "no device" in open_bundle(root).profile_problem
    pack(bundle, root.parent / "x.spinebox")
    with refused(BundleIncompatible, "packed with"):
        write_profile(root.parent / "x.spinebox", own)


# -- one file -----------------------------------------------------------------------------------------------------------


def test_folder_and_file_are_the_same_bundle(root: Path, tmp_path: Path) -> None:
    bundle = open_bundle(root)
    for name in ("a", "b"):
        pack(bundle, tmp_path / f"{name}.spinebox")
    assert (tmp_path / "a.spinebox").read_bytes() == (tmp_path / "b.spinebox").read_bytes()
    packed = open_bundle(tmp_path / "a.spinebox")
    assert packed.digest == bundle.digest
    assert packed.trusted
    assert packed.profile == PROFILE
    assert packed.read(PATH) == GRAPH
    unpack(packed, tmp_path / "again")
    again = open_bundle(tmp_path / "again")
    assert again.digest == bundle.digest
    for file in root.rglob("*"):
        if file.is_file():
            assert (tmp_path / "again" / file.relative_to(root)).read_bytes() == file.read_bytes()
    pack(again, tmp_path / "c.spinebox")
    assert (tmp_path / "c.spinebox").read_bytes() == (tmp_path / "a.spinebox").read_bytes()


def test_without_their_profiles_two_devices_pack_the_same_bytes(tmp_path: Path) -> None:
    for name, profile in (("a", PROFILE), ("b", None)):
        pack(open_bundle(write(tmp_path / name, profile=profile)), tmp_path / f"{name}.spinebox", with_profile=False)
    assert (tmp_path / "a.spinebox").read_bytes() == (tmp_path / "b.spinebox").read_bytes()


def test_a_file_is_signed_in_place(tmp_path: Path) -> None:
    bundle = read_bundle(write(tmp_path / "b", signed=False))
    file = tmp_path / "b.spinebox"
    pack(bundle, file)
    with pytest.raises(BundleUnsigned):
        open_bundle(file)
    sign_bundle(file, signing.author_key())
    assert open_bundle(file).digest == bundle.digest


def test_the_standard_library_reads_the_file_too(root: Path, tmp_path: Path) -> None:
    import zipfile

    pack(open_bundle(root), tmp_path / "x.spinebox")
    with zipfile.ZipFile(tmp_path / "x.spinebox") as archive:
        assert archive.testzip() is None
        assert archive.read(PATH) == GRAPH
        assert archive.namelist() == sorted(archive.namelist())


def test_a_manifest_of_the_right_shape_passes_and_finish_fills_in_the_rest(tmp_path: Path) -> None:
    assert not {"format", "preprocess", "files", "calibration_root"} & set(manifest())
    found = read_bundle(write(tmp_path / "b")).manifest
    check_authored(found)
    for key in manifest():
        with refused(BundleCorrupt, key):
            check_authored({k: v for k, v in found.items() if k != key})
