"""A bundle is written whole or not at all, and what was written is what is read."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest

from appliance import bundle as bundle_module
from appliance.backends import Signature, Tensor
from appliance.bundle import FORMAT, MANIFEST, Bundle, canonical, check_authored, check_installable, new_bundle, open_bundle
from appliance.errors import BundleCorrupt, BundleIncompatible, BundleMissing
from kernels.preprocess import PREPROCESS_VERSION

GRAPH = b"graph bytes \x00\xff" * 50


def model(graph: str) -> dict[str, Any]:
    return {
        "version": "1",
        "graph": graph,
        "inputs": [{"name": "image", "shape": [1, 1, 8, 8]}],
        "outputs": [{"name": "logits", "shape": [1, 4, 4, 4]}],
        "choice": {"backend": "openvino"},
        "float_share": 0.02,
    }


def write(root: Path, name: str = "tiny") -> None:
    with new_bundle(root) as writer:
        graph = writer.add("models/segmenter/int8.onnx", GRAPH)
        writer.add("calibration/segmenter.csv", b"item,sha256\nphantom:1,00\n")
        writer.finish({"name": name, "spinebox": "0.1.0", "models": {"segmenter": model(graph)}})


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write(tmp_path / "b")
    return tmp_path / "b"


def test_what_was_written_is_read(root: Path) -> None:
    bundle = open_bundle(root)
    assert bundle.read("models/segmenter/int8.onnx") == GRAPH
    entry = bundle.engine("segmenter")
    assert entry.signature == Signature((Tensor("image", (1, 1, 8, 8)),), (Tensor("logits", (1, 4, 4, 4)),))
    assert (entry.family, entry.version, entry.graph, entry.backend, entry.float_share) == (
        "segmenter",
        "1",
        "models/segmenter/int8.onnx",
        "openvino",
        0.02,
    )
    assert bundle.digest == hashlib.sha256((root / MANIFEST).read_bytes()).hexdigest()
    assert bundle.identity == {"name": "tiny", "digest": bundle.digest, "spinebox": "0.1.0"}
    assert bundle.manifest["format"] == FORMAT
    assert bundle.manifest["preprocess"] == PREPROCESS_VERSION
    assert bundle.manifest["files"]["models/segmenter/int8.onnx"] == {"bytes": len(GRAPH), "sha256": hashlib.sha256(GRAPH).hexdigest()}
    assert MANIFEST not in bundle.manifest["files"]


def test_the_same_content_has_the_same_digest_and_other_content_another(tmp_path: Path) -> None:
    for place, name in (("a", "x"), ("b", "x"), ("c", "y")):
        write(tmp_path / place, name)
    a, b, c = (open_bundle(tmp_path / p).digest for p in "abc")
    assert a == b != c


def test_the_manifest_is_written_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    real = os.fsync

    def note(fd: int) -> None:
        synced.append(Path(f"/proc/self/fd/{fd}").readlink().name)
        real(fd)

    monkeypatch.setattr(bundle_module.os, "fsync", note)
    write(tmp_path / "b")
    files = [n for n in synced if "." in n and not n.startswith(".")]
    assert files[-1] == MANIFEST
    assert set(files) == {"int8.onnx", "segmenter.csv", MANIFEST}


def test_a_failure_leaves_nothing_behind(tmp_path: Path) -> None:
    def fail() -> None:
        with new_bundle(tmp_path / "b") as writer:
            writer.add("models/segmenter/int8.onnx", GRAPH)
            raise RuntimeError("power")

    with pytest.raises(RuntimeError, match="power"):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_an_unfinished_bundle_is_not_moved_into_place(tmp_path: Path) -> None:
    def forget() -> None:
        with new_bundle(tmp_path / "b") as writer:
            writer.add("models/segmenter/int8.onnx", GRAPH)

    with pytest.raises(BundleCorrupt, match="not finished"):
        forget()
    assert list(tmp_path.iterdir()) == []


def test_a_failure_leaves_the_old_bundle_as_it_was_and_success_replaces_it(root: Path) -> None:
    before = open_bundle(root).digest

    def fail() -> None:
        with new_bundle(root) as writer:
            writer.finish({"name": "half"})

    with pytest.raises(BundleCorrupt, match="spinebox"):
        fail()
    assert open_bundle(root).digest == before
    write(root, "second")
    assert open_bundle(root).identity["name"] == "second"
    assert [p.name for p in root.parent.iterdir()] == ["b"]


@pytest.mark.parametrize("what", ["no folder", "empty folder", "a file"])
def test_no_bundle_there(tmp_path: Path, what: str) -> None:
    place = tmp_path / "b"
    if what == "empty folder":
        place.mkdir()
    elif what == "a file":
        place.write_bytes(b"x")
    with pytest.raises(BundleMissing):
        open_bundle(place)


def test_a_bundle_without_manifest_was_never_finished(root: Path) -> None:
    (root / MANIFEST).unlink()
    with pytest.raises(BundleMissing, match="no finished bundle"):
        open_bundle(root)


def test_a_family_that_the_bundle_lacks(root: Path) -> None:
    with pytest.raises(BundleIncompatible, match="has no grader"):
        open_bundle(root).engine("grader")


def test_a_file_that_the_manifest_does_not_list_is_not_read(root: Path) -> None:
    (root / "extra.onnx").write_bytes(GRAPH)
    bundle = open_bundle(root)
    with pytest.raises(BundleCorrupt, match="does not list"):
        bundle.read("extra.onnx")


def test_a_file_that_changed_after_opening_is_not_read(root: Path) -> None:
    bundle = open_bundle(root)
    file = root / "models/segmenter/int8.onnx"
    file.write_bytes(GRAPH[:-1] + b"!")
    with pytest.raises(BundleCorrupt, match="SHA-256"):
        bundle.read("models/segmenter/int8.onnx")
    file.unlink()
    with pytest.raises(BundleCorrupt, match="cannot be read"):
        bundle.read("models/segmenter/int8.onnx")


def test_canonical_json() -> None:
    assert canonical({"b": [1, 2.5], "a": "ß"}) == '{"a":"ß","b":[1,2.5]}'.encode()
    assert canonical(json.loads(canonical({"x": {"z": 1, "y": None}}))) == b'{"x":{"y":null,"z":1}}'
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical({"a": float("nan")})


def test_format_and_preprocessing_must_be_this_version(root: Path) -> None:
    manifest = open_bundle(root).manifest
    check_installable(manifest)
    for key, wrong in (("format", "99"), ("preprocess", "0")):
        changed = {**manifest, key: wrong}
        check_authored(changed)
        with pytest.raises(BundleIncompatible):
            check_installable(changed)
        (root / MANIFEST).write_bytes(canonical(changed))
        with pytest.raises(BundleIncompatible):
            open_bundle(root)


def test_the_type_of_what_is_opened(root: Path) -> None:
    assert isinstance(open_bundle(root), Bundle)
