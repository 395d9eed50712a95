"""A bundle from a stranger: whatever its bytes say, it opens whole and true, or it is refused with a bundle error."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
import stat
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_bundles import GRAPH, MODEL, PATH, PROFILE, refused, write

from appliance import bundle as bundle_module
from appliance import signing
from appliance.bundle import (
    MANIFEST,
    MAX_FILES,
    MAX_MANIFEST_BYTES,
    SIGNATURE,
    canonical,
    open_bundle,
    pack,
    read_bundle,
    unpack,
)
from appliance.errors import BundleCorrupt, BundleError, BundleIncompatible, BundleUnsigned


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "secret").write_bytes(b"secret")
    return write(tmp_path / "b")


def _manifest(root: Path) -> dict[str, Any]:
    out: dict[str, Any] = json.loads((root / MANIFEST).read_bytes())
    return out


def _seal(root: Path, data: bytes) -> None:
    """The attacker has a trusted key: what follows must hold even so."""
    (root / MANIFEST).write_bytes(data)
    (root / SIGNATURE).write_bytes(canonical(signing.sign(data, signing.author_key())))


def _rewrite(root: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    manifest = _manifest(root)
    changed = change(manifest)
    _seal(root, canonical(manifest if changed is None else changed))


def _record(data: bytes) -> dict[str, Any]:
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


# -- the files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [0, 511, 1023])
def test_a_flipped_bit(root: Path, place: int) -> None:
    data = bytearray(GRAPH)
    data[place] ^= 1
    (root / PATH).write_bytes(data)
    with refused(BundleCorrupt, "SHA-256"):
        open_bundle(root)


@pytest.mark.parametrize("length", [0, 1, 1023, 1025])
def test_a_file_of_another_length(root: Path, length: int) -> None:
    (root / PATH).write_bytes((GRAPH + b"x")[:length])
    with refused(BundleCorrupt, "bytes"):
        open_bundle(root)


def test_a_file_that_is_gone_or_a_folder(root: Path) -> None:
    (root / PATH).unlink()
    with refused(BundleCorrupt, "cannot be read"):
        open_bundle(root)
    (root / PATH).mkdir()
    with pytest.raises(BundleCorrupt):
        open_bundle(root)


def test_a_link_to_the_right_bytes_is_still_a_link(root: Path) -> None:
    (root / "other").write_bytes(GRAPH)
    (root / PATH).unlink()
    (root / PATH).symlink_to(root / "other")
    with refused(BundleCorrupt, "no links"):
        open_bundle(root)


def test_a_folder_that_links_out(root: Path) -> None:
    outside = root.parent / "outside"
    (root / "models").rename(outside)
    (root / "models").symlink_to(outside)
    with refused(BundleCorrupt, "no links"):
        open_bundle(root)


# -- the paths ------------------------------------------------------------------------------------------------------

PATHS = [
    "../secret",
    "models/../../secret",
    "/etc/passwd",
    "./x",
    "models//x",
    "models/",
    "",
    ".hidden",
    "models/.hidden",
    "a\\b",
    "a\x00b",
    "a\nb",
    "x\n",
    "~/x",
    "C:/x",
    "ü",
    "a/b/c/d/e/f/g",
    "-rf",
]


@pytest.mark.parametrize("path", PATHS, ids=ascii)
def test_a_path_that_leaves_the_bundle_is_refused_before_it_is_opened(root: Path, path: str) -> None:
    _rewrite(root, lambda m: m["files"].__setitem__(path, _record(b"secret")))
    with refused(BundleCorrupt, "leaves the bundle"):
        open_bundle(root)


def test_reading_does_not_follow_such_a_path_either(root: Path) -> None:
    bundle = open_bundle(root)
    bundle.manifest["files"]["../secret"] = _record(b"secret")
    with refused(BundleCorrupt, "leaves the bundle"):
        bundle.read("../secret")


# -- the manifest ---------------------------------------------------------------------------------------------------


def test_a_huge_manifest_is_not_read(root: Path) -> None:
    with (root / MANIFEST).open("r+b") as f:
        f.truncate(MAX_MANIFEST_BYTES + 1)
    with refused(BundleCorrupt, "larger than"):
        open_bundle(root)
    with (root / MANIFEST).open("r+b") as f:
        f.truncate(1 << 40)
    with refused(BundleCorrupt, "larger than"):
        open_bundle(root)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"\x00" * 100,
        b"[" * 500_000,
        b'{"a":' * 300_000,
        b"[" * 100_000 + b"]" * 100_000,
        b"1" * 10_000,
        b"null",
        b"[]",
        b'"x"',
        b"NaN",
    ],
    ids=lambda d: ascii(d[:6]),
)
def test_bytes_that_are_no_manifest(root: Path, data: bytes) -> None:
    _seal(root, data)
    with pytest.raises(BundleCorrupt):
        open_bundle(root)


@pytest.mark.parametrize("change", ["spaces", "another order", "a key twice"])
def test_a_manifest_that_is_not_canonical(root: Path, change: str) -> None:
    """Two readers could see two things in it, though the signature fits."""
    manifest = _manifest(root)
    data = {
        "spaces": json.dumps(manifest, sort_keys=True).encode(),
        "another order": json.dumps(dict(reversed(manifest.items())), separators=(",", ":")).encode(),
        "a key twice": canonical(manifest).replace(b'"format":', b'"format":"2","format":', 1),
    }[change]
    _seal(root, data)
    with refused(BundleCorrupt, "canonical"):
        open_bundle(root)


def test_a_manifest_nested_too_deep(root: Path) -> None:
    deep: Any = 1
    for _ in range(bundle_module.MAX_DEPTH + 1):
        deep = [deep]
    _rewrite(root, lambda m: m["models"]["segmenter"]["preprocess"].update(x=deep))
    with refused(BundleCorrupt, "deep"):
        open_bundle(root)


def test_too_many_files(root: Path) -> None:
    _rewrite(root, lambda m: m["files"].update({f"f{i}": _record(b"") for i in range(MAX_FILES)}))
    with refused(BundleCorrupt, "more than"):
        open_bundle(root)


KEYS = ("format", "name", "spinebox", "preprocess", "tools", "max_drop", "calibration_root", "sbom", "models", "files")
VALUES = (None, 1, True, 1.5, [], ["x"], "x", {}, {"x": 1})


@pytest.mark.parametrize("key", KEYS)
def test_every_field_must_be_there(root: Path, key: str) -> None:
    _rewrite(root, lambda m: m.pop(key) and None)
    with refused(BundleCorrupt, key):
        open_bundle(root)


@pytest.mark.parametrize("value", VALUES, ids=repr)
@pytest.mark.parametrize("key", KEYS)
def test_every_field_must_be_of_its_kind(root: Path, key: str, value: Any) -> None:
    right = _manifest(root)[key]
    if isinstance(value, type(right)) or (key == "max_drop" and type(value) is int):
        return
    _rewrite(root, lambda m: m.__setitem__(key, value))
    with refused(BundleCorrupt, key):
        open_bundle(root)


FILE_ENTRIES = [None, 3, [], {}, {"bytes": 6}, {"sha256": "0" * 64}, {"bytes": "6", "sha256": "0" * 64}, {"bytes": 6.0, "sha256": "0" * 64}]
FILE_ENTRIES += [{"bytes": 6, "sha256": x} for x in (None, 7, "", "0" * 63, "G" * 64, "A" * 64, "0" * 64 + "\n", ["0" * 64])]
FILE_ENTRIES += [{"bytes": -1, "sha256": "0" * 64}, {"bytes": 1 << 70, "sha256": "0" * 64}]


@pytest.mark.parametrize("entry", FILE_ENTRIES, ids=repr)
def test_a_file_entry_of_the_wrong_shape(root: Path, entry: Any) -> None:
    _rewrite(root, lambda m: m["files"].__setitem__(PATH, entry))
    with pytest.raises(BundleCorrupt):
        open_bundle(root)


@pytest.mark.parametrize("place", ["graph", "card", "golden", "sbom", "manifest", "record"])
def test_a_file_that_is_named_but_not_listed(root: Path, place: str) -> None:
    def change(m: dict[str, Any]) -> None:
        model = m["models"]["segmenter"]
        openvino = model["engines"]["openvino"]
        where = {"graph": openvino, "golden": openvino, "sbom": m, "manifest": model["calibration"], "record": model["calibration"]}
        where.get(place, model)[place] = "models/other.onnx"

    _rewrite(root, change)
    with refused(BundleCorrupt, "not listed"):
        open_bundle(root)


@pytest.mark.parametrize("key", MODEL)
@pytest.mark.parametrize("value", ["gone", *VALUES], ids=repr)
def test_a_model_entry_of_the_wrong_shape_opens_no_engine(root: Path, key: str, value: Any) -> None:
    """Refused when the bundle is opened; what may be free text, free JSON or absent is the only exception."""

    def change(manifest: dict[str, Any]) -> None:
        if value == "gone":
            del manifest["models"]["segmenter"][key]
        else:
            manifest["models"]["segmenter"][key] = value

    _rewrite(root, change)
    texts = key in ("version", "task") and isinstance(value, str) and value != "gone"
    numbers = key == "float_share" and isinstance(value, int | float) and value is not True
    free = (key == "preprocess" and isinstance(value, dict)) or (key == "temperature" and (value is None or isinstance(value, dict)))
    names = key == "classes" and isinstance(value, list)
    if texts or numbers or free or names or (key == "cam_bias" and value is None):
        open_bundle(root).engine("segmenter")
        return
    with pytest.raises(BundleError):
        open_bundle(root).engine("segmenter")


ENGINE_VALUES = {
    "graph": [1, "", "../secret", ["x"], {}, None],
    "precision": ["int4", "", None, 8, [], {}],
    "passed": [1, "true", [], {}],
    "verified": [None, 1, [], {}],
    "golden": [1, "", "../secret", [], {}],
    "metrics": [None, {}, "x", [1], [{}], [{"name": "x", "value": True, "low": 0, "high": 1, "images": 1, "patients": 1}]],
    "verdicts": [None, {}, "x", [1], [{}], [{"gate": "task", "passed": False, "note": ""}], [{"gate": 1, "passed": True, "note": ""}]],
}


@pytest.mark.parametrize(("key", "value"), [(k, v) for k, values in ENGINE_VALUES.items() for v in ["gone", *values]], ids=repr)
def test_an_engine_of_the_wrong_shape(root: Path, key: str, value: Any) -> None:
    def change(m: dict[str, Any]) -> None:
        engine = m["models"]["segmenter"]["engines"]["openvino"]
        if value == "gone":
            del engine[key]
        else:
            engine[key] = value

    _rewrite(root, change)
    with pytest.raises(BundleCorrupt):
        open_bundle(root)


def test_an_engine_cannot_pass_against_its_own_gate(root: Path) -> None:
    """The flag is what a device looks at; a verdict that contradicts it is not overlooked."""
    _rewrite(root, lambda m: m["models"]["segmenter"]["engines"]["openvino"]["verdicts"][0].update(passed=False))
    with refused(BundleCorrupt, "its task gate refused it"):
        open_bundle(root)


def test_a_swapped_calibration_root(root: Path) -> None:
    _rewrite(root, lambda m: m["models"]["segmenter"]["calibration"].update(root="00" * 32))
    with refused(BundleCorrupt, "calibration_root"):
        open_bundle(root)


@pytest.mark.parametrize(
    "heatmap",
    [
        {"kind": "magic", "output": "logits", "layer": "", "reason": ""},
        {"kind": "unavailable", "output": "logits", "layer": "", "reason": ""},
        {"kind": "activation", "output": None, "layer": "", "reason": ""},
        {"kind": "activation", "output": "absent", "layer": "", "reason": ""},
        {"kind": "cam", "output": "logits", "layer": "", "reason": ""},
    ],
    ids=repr,
)
def test_a_heatmap_that_cannot_be(root: Path, heatmap: Any) -> None:
    _rewrite(root, lambda m: m["models"]["segmenter"].update(heatmap=heatmap))
    with pytest.raises(BundleCorrupt):
        open_bundle(root)


@pytest.mark.parametrize("entry", [None, 1, "x", [], ["version"], {}], ids=repr)
def test_a_model_that_is_no_object(root: Path, entry: Any) -> None:
    _rewrite(root, lambda m: m["models"].__setitem__("segmenter", entry))
    with pytest.raises(BundleCorrupt):
        open_bundle(root)


@pytest.mark.parametrize(
    "tensors",
    [
        [{"name": "image"}],
        [{"shape": [1]}],
        [{"name": 3, "shape": [1]}],
        [{"name": "image", "shape": "11"}],
        [{"name": "image", "shape": [1, -1]}],
        [{"name": "image", "shape": [0]}],
        [{"name": "image", "shape": [1.5]}],
        [{"name": "image", "shape": [1 << 40, 1 << 40]}],
        ["image"],
    ],
    ids=repr,
)
@pytest.mark.parametrize("side", ["inputs", "outputs"])
def test_a_signature_that_cannot_be(root: Path, side: str, tensors: Any) -> None:
    _rewrite(root, lambda m: m["models"]["segmenter"].__setitem__(side, tensors))
    with pytest.raises(BundleError):
        open_bundle(root).engine("segmenter")


@pytest.mark.parametrize(("key", "value"), [("format", "1"), ("format", "3"), ("format", ""), ("preprocess", "99")])
def test_another_version_is_said_to_be_one(root: Path, key: str, value: str) -> None:
    _rewrite(root, lambda m: m.__setitem__(key, value))
    with pytest.raises(BundleIncompatible):
        open_bundle(root)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


def _mutate(data: st.DataObject, document: Any) -> None:
    """Put any JSON value in any place."""
    place: Any = document
    while True:
        key = data.draw(st.sampled_from(sorted(place)) if isinstance(place, dict) else st.integers(0, len(place) - 1))
        if not (isinstance(place[key], dict | list) and place[key]) or data.draw(st.booleans()):
            break
        place = place[key]
    place[key] = data.draw(json_values)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_value_anywhere_opens_or_is_a_bundle_error(root: Path, data: st.DataObject) -> None:
    pristine = root.parent / "pristine"
    if not pristine.exists():
        shutil.copytree(root, pristine)
    manifest = _manifest(pristine)
    _mutate(data, manifest)
    _seal(root, canonical(manifest))
    try:
        bundle = open_bundle(root)
        bundle.engine("segmenter").order()
        assert bundle.read(PATH) == GRAPH
    except BundleError:
        pass


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_value_in_a_profile_is_harmless(root: Path, data: st.DataObject) -> None:
    from appliance.cli.inspect import summary

    profile = copy.deepcopy(PROFILE)
    _mutate(data, profile)
    (root / bundle_module.PROFILE).write_text(json.dumps(profile))
    bundle = open_bundle(root)
    assert {b.backend for b in bundle.engine("segmenter").order()} == {"onnxruntime", "openvino"}
    summary(bundle)


@pytest.mark.parametrize("figure", [0, -1.0, 1e299, 1 << 60, 3.6e6])
def test_a_picture_of_figures_that_cannot_be(root: Path, figure: float) -> None:
    from appliance.cli.inspect import picture

    profile = copy.deepcopy(PROFILE)
    for entry in profile["models"]["segmenter"]["engines"].values():  # type: ignore[index]
        entry["a"] = entry["b"] = {"median_ms": figure}
    (root / bundle_module.PROFILE).write_text(json.dumps(profile))
    _rewrite(root, lambda m: m["models"]["segmenter"]["engines"]["openvino"]["verdicts"][0].update(value=figure, high=figure))
    bundle = open_bundle(root)
    assert bundle.profile_problem == ""
    assert picture(bundle).startswith(b"\x89PNG")


# -- the signature --------------------------------------------------------------------------------------------------


def test_without_the_key_no_change_to_the_manifest_opens(root: Path) -> None:
    manifest = _manifest(root)
    manifest["models"]["segmenter"]["engines"]["openvino"]["verdicts"] = []
    (root / MANIFEST).write_bytes(canonical(manifest))
    with refused(BundleCorrupt, "does not fit"):
        open_bundle(root)
    with refused(BundleCorrupt, "does not fit"):
        open_bundle(root, require_signature=False)
    (root / SIGNATURE).unlink()
    with pytest.raises(BundleUnsigned):
        open_bundle(root)


@pytest.mark.parametrize(
    "data", [b"", b"{", b"[]", b"null", b"{}", b"\xff", b"[" * 10_000, b" " * (signing.MAX_SIGNATURE_BYTES + 1)], ids=lambda d: ascii(d[:5])
)
def test_bytes_that_are_no_signature(root: Path, data: bytes) -> None:
    (root / SIGNATURE).write_bytes(data)
    with pytest.raises(BundleCorrupt):
        open_bundle(root)


def test_a_signature_of_another_bundle(root: Path, tmp_path: Path) -> None:
    other = write(tmp_path / "other", "other")
    shutil.copy(other / SIGNATURE, root / SIGNATURE)
    with refused(BundleCorrupt, "does not fit"):
        open_bundle(root)


@pytest.mark.parametrize("name", [MANIFEST, SIGNATURE, bundle_module.PROFILE])
def test_a_link_or_a_pipe_in_place_of_the_bundles_own_files(root: Path, name: str) -> None:
    (root / "copy").write_bytes((root / name).read_bytes() if (root / name).exists() else b"{}")
    (root / name).unlink(missing_ok=True)
    (root / name).symlink_to(root / "copy")
    if name == bundle_module.PROFILE:
        assert "links" in open_bundle(root).profile_problem
    else:
        with refused(BundleCorrupt, "links"):
            open_bundle(root)
    (root / name).unlink()
    os.mkfifo(root / name)
    if name == bundle_module.PROFILE:
        open_bundle(root)
    else:
        with pytest.raises(BundleError):
            open_bundle(root)


def test_a_pipe_in_place_of_a_graph_does_not_block(root: Path) -> None:
    (root / PATH).unlink()
    os.mkfifo(root / PATH)
    with refused(BundleCorrupt, "plain files"):
        open_bundle(root)


# -- the single file ------------------------------------------------------------------------------------------------


@pytest.fixture
def packed(root: Path) -> Path:
    pack(open_bundle(root), root.parent / "x.spinebox")
    return root.parent / "x.spinebox"


def _entries(file: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(file) as archive:
        return {n: archive.read(n) for n in archive.namelist()}


def _info(name: str, mode: int = stat.S_IFREG | 0o644, **options: Any) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
    info.create_system, info.external_attr = 3, mode << 16
    for key, value in options.items():
        setattr(info, key, value)
    return info


def _zip(file: Path, entries: list[tuple[zipfile.ZipInfo, bytes]], comment: bytes = b"") -> None:
    with zipfile.ZipFile(file, "w") as archive:
        for info, data in entries:
            archive.writestr(info, data, info.compress_type)
        archive.comment = comment


def _refused(file: Path, match: str) -> None:
    with refused(BundleCorrupt, match):
        open_bundle(file)
    assert not (file.parent / "out").exists()


def test_an_honest_rewrite_of_the_zip_opens(packed: Path) -> None:
    """The tools below are right: what they write unchanged is a bundle."""
    _zip(packed, [(_info(n), d) for n, d in _entries(packed).items()])
    assert open_bundle(packed).read(PATH) == GRAPH


def test_a_zip_bomb(packed: Path) -> None:
    """Half a gigabyte of zeros in half a megabyte: compressed entries are refused before any is read."""
    entries = [(_info(n), d) for n, d in _entries(packed).items()]
    _zip(packed, [*entries, (_info("bomb", compress_type=zipfile.ZIP_DEFLATED), bytes(50 << 20))])
    assert packed.stat().st_size < 1 << 20
    _refused(packed, "not compressed")


@pytest.mark.parametrize("path", [p for p in PATHS if p and "\x00" not in p], ids=ascii)
def test_an_entry_that_leaves_the_bundle(packed: Path, path: str) -> None:
    _zip(packed, [*((_info(n), d) for n, d in _entries(packed).items()), (_info(path), b"x")])
    _refused(packed, "leaves the bundle|not compressed")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_the_same_entry_twice(packed: Path) -> None:
    _zip(packed, [*((_info(n), d) for n, d in _entries(packed).items()), (_info(PATH), b"other")])
    _refused(packed, "twice")


@pytest.mark.parametrize("mode", [stat.S_IFLNK | 0o777, stat.S_IFDIR | 0o755, stat.S_IFIFO | 0o644, stat.S_IFREG | 0o4755, 0])
def test_an_entry_that_is_no_plain_file(packed: Path, mode: int) -> None:
    _zip(packed, [(_info(n, mode if n == PATH else stat.S_IFREG | 0o644), d) for n, d in _entries(packed).items()])
    _refused(packed, "plain files")


def test_an_entry_with_a_comment_or_extra_data(packed: Path) -> None:
    kept = _entries(packed)
    for options in ({"comment": b"x"}, {"extra": b"\x99\x99\x00\x00"}):
        _zip(packed, [(_info(n, **(options if n == PATH else {})), d) for n, d in kept.items()])
        _refused(packed, "plain files")


def _patched(file: Path, signature: bytes, offset: int, value: bytes, which: int = 0) -> None:
    """Overwrite a field in the `which`-th header that begins with `signature`."""
    data = bytearray(file.read_bytes())
    place = -1
    for _ in range(which + 1):
        place = data.index(signature, place + 1)
    data[place + offset : place + offset + len(value)] = value
    file.write_bytes(data)


CENTRAL, LOCAL = b"PK\x01\x02", b"PK\x03\x04"


def test_encrypted_entries(packed: Path) -> None:
    _patched(packed, CENTRAL, 8, b"\x01\x00")
    _patched(packed, LOCAL, 6, b"\x01\x00")
    _refused(packed, "not encrypted")


@pytest.mark.parametrize(
    ("offset", "value"),
    [
        (6, b"\x01\x00"),
        (8, b"\x08\x00"),
        (14, b"XXXX"),
        (18, b"\x01\x00\x00\x00"),
        (22, b"\x01\x00\x00\x00"),
        (26, b"\x01\x00"),
        (28, b"\x04\x00"),
        (30, b"X"),
    ],
    ids=["flags", "method", "crc", "packed size", "size", "name length", "extra length", "name"],
)
def test_a_local_header_that_says_another_thing(packed: Path, offset: int, value: bytes) -> None:
    """Two readers, one of which believes the local headers, must not see two bundles."""
    _patched(packed, LOCAL, offset, value)
    _refused(packed, "differs")


def test_overlapping_entries(packed: Path) -> None:
    """Two directory entries that share one entry's bytes: the trick of the flat zip bomb."""
    _patched(packed, CENTRAL, 42, struct.pack("<L", 0), which=1)
    _refused(packed, "overlap|differs")


@pytest.mark.parametrize("where", ["before", "after", "between"])
def test_bytes_that_belong_to_no_entry(packed: Path, where: str) -> None:
    data = packed.read_bytes()
    middle = data.index(CENTRAL)
    new = {"before": b"MZ" + data, "after": data + b"x", "between": data[:middle] + b"hidden" + data[middle:]}[where]
    packed.write_bytes(new)
    _refused(packed, "appended|does not lie|belong to no entry")


def test_a_hidden_gap_with_a_consistent_directory(packed: Path) -> None:
    """Bytes between the last entry and the directory, and the end record tells of it: still no entry's bytes."""
    data = packed.read_bytes()
    middle = data.index(CENTRAL)
    end = bytearray(data[-22:])
    end[16:20] = struct.pack("<L", middle + 6)
    packed.write_bytes(data[:middle] + b"hidden" + data[middle:-22] + end)
    _refused(packed, "belong to no entry")


def test_a_comment(packed: Path) -> None:
    _zip(packed, [(_info(n), d) for n, d in _entries(packed).items()], comment=b"PK\x05\x06 and so on")
    _refused(packed, "appended|no bundle archive")


def test_more_entries_than_a_bundle_holds(packed: Path) -> None:
    entries = [(_info(f"f{i}"), b"") for i in range(MAX_FILES + 10)]
    _zip(packed, entries)
    _refused(packed, "more than")
    _patched(packed, b"PK\x05\x06", 8, struct.pack("<HH", 3, 3))
    _refused(packed, "claims|more than|does not lie")


def test_a_file_that_the_manifest_does_not_list_in_the_zip(packed: Path) -> None:
    _zip(packed, [*((_info(n), d) for n, d in _entries(packed).items()), (_info("zz"), b"smuggled")])
    _refused(packed, "does not list")


def test_an_entry_altered_with_its_crc(packed: Path) -> None:
    kept = _entries(packed)
    _zip(packed, [(_info(n), GRAPH[::-1] if n == PATH else d) for n, d in kept.items()])
    _refused(packed, "SHA-256")
    _zip(packed, [(_info(n), d) for n, d in kept.items() if n != PATH])
    _refused(packed, "cannot be read")
    _zip(packed, [(_info(n), d) for n, d in kept.items()])
    data = packed.read_bytes()
    packed.write_bytes(data.replace(GRAPH, GRAPH[::-1], 1))
    _refused(packed, "CRC")


def test_an_archive_larger_than_a_bundle_is_not_read(packed: Path) -> None:
    with packed.open("r+b") as f:
        f.truncate(3 << 30)
    _refused(packed, "an archive has")


@pytest.mark.parametrize("data", [b"", b"PK", bytes(22), b"PK\x05\x06" + bytes(18), b"x" * 1000], ids=lambda d: ascii(d[:6]))
def test_bytes_that_are_no_archive(packed: Path, data: bytes) -> None:
    packed.write_bytes(data)
    with pytest.raises(BundleError):
        open_bundle(packed)


def test_a_file_swapped_between_opening_and_reading(packed: Path, tmp_path: Path) -> None:
    bundle = open_bundle(packed)
    pack(read_bundle(write(tmp_path / "other", graph=GRAPH[::-1])), packed)
    with pytest.raises(BundleCorrupt):
        bundle.read(PATH)


def test_unpacking_what_is_broken_leaves_nothing(packed: Path, tmp_path: Path) -> None:
    bundle = open_bundle(packed)
    packed.write_bytes(packed.read_bytes().replace(GRAPH, GRAPH[::-1], 1))
    with pytest.raises(BundleCorrupt):
        unpack(bundle, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b", "secret", "x.spinebox"]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_bytes_changed_in_the_zip_give_the_same_bundle_or_a_bundle_error(packed: Path, data: st.DataObject) -> None:
    pristine = packed.parent / "pristine"
    if not pristine.exists():
        shutil.copy(packed, pristine)
    raw = bytearray(pristine.read_bytes())
    headers = [i for i in range(len(raw)) if raw[i : i + 2] == b"PK"]
    for _ in range(data.draw(st.integers(1, 4))):
        near = data.draw(st.sampled_from(headers)) + data.draw(st.integers(0, 50))
        place = data.draw(st.just(near) | st.integers(0, len(raw) - 1))
        if place < len(raw):
            raw[place] = data.draw(st.integers(0, 255))
    if data.draw(st.integers(0, 5)) == 0:
        del raw[data.draw(st.integers(0, len(raw))) :]
    packed.write_bytes(raw)
    try:
        bundle = open_bundle(packed)
        assert bundle.digest == read_bundle(pristine).digest
        assert bundle.read(PATH) == GRAPH
    except BundleError:
        pass


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=300))
def test_any_bytes_as_manifest_or_signature_are_a_bundle_error(root: Path, noise: bytes) -> None:
    for name in (MANIFEST, SIGNATURE):
        kept = (root / name).read_bytes()
        (root / name).write_bytes(noise)
        with pytest.raises(BundleError):
            open_bundle(root)
        (root / name).write_bytes(kept)


def test_an_end_record_that_claims_four_gigabytes_of_directory(packed: Path) -> None:
    data = bytearray(packed.read_bytes())
    data[-10:-6] = struct.pack("<L", 0xFFFFFFFF)
    packed.write_bytes(data)
    _refused(packed, "claims|does not lie")
