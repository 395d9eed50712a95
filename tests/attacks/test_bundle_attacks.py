"""A bundle from a stranger: whatever its bytes say, it opens whole and true, or it is refused with a bundle error."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from appliance.bundle import MANIFEST, MAX_FILES, MAX_MANIFEST_BYTES, canonical, new_bundle, open_bundle
from appliance.errors import BundleCorrupt, BundleError, BundleIncompatible
from kernels.preprocess import PREPROCESS_VERSION

GRAPH = bytes(range(256)) * 4
PATH = "models/segmenter/int8.onnx"
ENTRY = {
    "version": "1",
    "graph": PATH,
    "inputs": [{"name": "image", "shape": [1, 1, 8, 8]}],
    "outputs": [{"name": "logits", "shape": [1, 4, 4, 4]}],
    "choice": {"backend": "openvino"},
    "float_share": 0.02,
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    with new_bundle(tmp_path / "b") as writer:
        writer.add(PATH, GRAPH)
        writer.finish({"name": "tiny", "spinebox": "0.1.0", "models": {"segmenter": copy.deepcopy(ENTRY)}})
    (tmp_path / "secret").write_bytes(b"secret")
    return tmp_path / "b"


def _manifest(root: Path) -> dict[str, Any]:
    out: dict[str, Any] = json.loads((root / MANIFEST).read_bytes())
    return out


def _rewrite(root: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    manifest = _manifest(root)
    changed = change(manifest)
    (root / MANIFEST).write_bytes(json.dumps(manifest if changed is None else changed).encode())


def _record(data: bytes) -> dict[str, Any]:
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


# -- the files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [0, 511, 1023])
def test_a_flipped_bit(root: Path, place: int) -> None:
    data = bytearray(GRAPH)
    data[place] ^= 1
    (root / PATH).write_bytes(data)
    with pytest.raises(BundleCorrupt, match="SHA-256"):
        open_bundle(root)


@pytest.mark.parametrize("length", [0, 1, 1023, 1025])
def test_a_file_of_another_length(root: Path, length: int) -> None:
    (root / PATH).write_bytes((GRAPH + b"x")[:length])
    with pytest.raises(BundleCorrupt, match="bytes"):
        open_bundle(root)


def test_a_file_that_is_gone_or_a_folder(root: Path) -> None:
    (root / PATH).unlink()
    with pytest.raises(BundleCorrupt, match="cannot be read"):
        open_bundle(root)
    (root / PATH).mkdir()
    with pytest.raises(BundleCorrupt):
        open_bundle(root)


def test_a_link_to_the_right_bytes_is_still_a_link(root: Path) -> None:
    (root / "other").write_bytes(GRAPH)
    (root / PATH).unlink()
    (root / PATH).symlink_to(root / "other")
    with pytest.raises(BundleCorrupt, match="no links"):
        open_bundle(root)


def test_a_folder_that_links_out(root: Path) -> None:
    outside = root.parent / "outside"
    (root / "models").rename(outside)
    (root / "models").symlink_to(outside)
    with pytest.raises(BundleCorrupt, match="no links"):
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
    with pytest.raises(BundleCorrupt, match="leaves the bundle"):
        open_bundle(root)


def test_reading_does_not_follow_such_a_path_either(root: Path) -> None:
    bundle = open_bundle(root)
    bundle.manifest["files"]["../secret"] = _record(b"secret")
    with pytest.raises(BundleCorrupt, match="leaves the bundle"):
        bundle.read("../secret")


# -- the manifest ---------------------------------------------------------------------------------------------------


def test_a_huge_manifest_is_not_read(root: Path) -> None:
    with (root / MANIFEST).open("r+b") as f:
        f.truncate(MAX_MANIFEST_BYTES + 1)
    with pytest.raises(BundleCorrupt, match="larger than"):
        open_bundle(root)
    with (root / MANIFEST).open("r+b") as f:
        f.truncate(1 << 40)
    with pytest.raises(BundleCorrupt, match="larger than"):
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
    (root / MANIFEST).write_bytes(data)
    with pytest.raises(BundleCorrupt):
        open_bundle(root)


def test_too_many_files(root: Path) -> None:
    _rewrite(root, lambda m: m["files"].update({f"f{i}": _record(b"") for i in range(MAX_FILES)}))
    with pytest.raises(BundleCorrupt, match="more than"):
        open_bundle(root)


KEYS = ("format", "name", "spinebox", "preprocess", "models", "files")
VALUES = (None, 1, True, 1.5, [], ["x"], "x", {}, {"x": 1})


@pytest.mark.parametrize("key", KEYS)
def test_every_field_must_be_there(root: Path, key: str) -> None:
    _rewrite(root, lambda m: m.pop(key) and None)
    with pytest.raises(BundleCorrupt, match=key):
        open_bundle(root)


@pytest.mark.parametrize("value", VALUES, ids=repr)
@pytest.mark.parametrize("key", KEYS)
def test_every_field_must_be_of_its_kind(root: Path, key: str, value: Any) -> None:
    right = _manifest(root)[key]
    if isinstance(value, type(right)):
        return
    _rewrite(root, lambda m: m.__setitem__(key, value))
    with pytest.raises(BundleCorrupt, match=key):
        open_bundle(root)


FILE_ENTRIES = [None, 3, [], {}, {"bytes": 6}, {"sha256": "0" * 64}, {"bytes": "6", "sha256": "0" * 64}, {"bytes": 6.0, "sha256": "0" * 64}]
FILE_ENTRIES += [{"bytes": 6, "sha256": x} for x in (None, 7, "", "0" * 63, "G" * 64, "A" * 64, "0" * 64 + "\n", ["0" * 64])]
FILE_ENTRIES += [{"bytes": -1, "sha256": "0" * 64}, {"bytes": 1 << 70, "sha256": "0" * 64}]


@pytest.mark.parametrize("entry", FILE_ENTRIES, ids=repr)
def test_a_file_entry_of_the_wrong_shape(root: Path, entry: Any) -> None:
    _rewrite(root, lambda m: m["files"].__setitem__(PATH, entry))
    with pytest.raises(BundleCorrupt):
        open_bundle(root)


def test_a_model_that_is_not_there(root: Path) -> None:
    _rewrite(root, lambda m: m["models"]["segmenter"].__setitem__("graph", "models/other.onnx"))
    with pytest.raises(BundleCorrupt, match="not listed"):
        open_bundle(root)


@pytest.mark.parametrize("key", ENTRY)
@pytest.mark.parametrize("value", ["gone", *VALUES], ids=repr)
def test_a_model_entry_of_the_wrong_shape_opens_no_engine(root: Path, key: str, value: Any) -> None:
    """Refused when the bundle is opened or when its engine is asked for; either way by a bundle error."""

    def change(manifest: dict[str, Any]) -> None:
        if value == "gone":
            del manifest["models"]["segmenter"][key]
        else:
            manifest["models"]["segmenter"][key] = value

    _rewrite(root, change)
    harmless = (key == "version" and value == "x") or (key == "float_share" and isinstance(value, int | float) and value is not True)
    if harmless:
        open_bundle(root).engine("segmenter")
        return
    with pytest.raises(BundleError):
        open_bundle(root).engine("segmenter")


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


@pytest.mark.parametrize(("key", "value"), [("format", "2"), ("format", ""), ("preprocess", "99")])
def test_another_version_is_said_to_be_one(root: Path, key: str, value: str) -> None:
    _rewrite(root, lambda m: m.__setitem__(key, value))
    with pytest.raises(BundleIncompatible):
        open_bundle(root)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_value_anywhere_opens_or_is_a_bundle_error(root: Path, data: st.DataObject) -> None:
    manifest = {
        "format": "1",
        "name": "tiny",
        "spinebox": "0.1.0",
        "preprocess": PREPROCESS_VERSION,
        "models": {"segmenter": copy.deepcopy(ENTRY)},
        "files": {PATH: _record(GRAPH)},
    }
    place: Any = manifest
    while True:
        key = data.draw(st.sampled_from(sorted(place)) if isinstance(place, dict) else st.integers(0, len(place) - 1))
        if not (isinstance(place[key], dict | list) and place[key]) or data.draw(st.booleans()):
            break
        place = place[key]
    place[key] = data.draw(json_values)
    (root / MANIFEST).write_bytes(canonical(manifest))
    try:
        bundle = open_bundle(root)
        bundle.engine("segmenter")
        assert bundle.read(PATH) == GRAPH
    except BundleError:
        pass
