"""The bundle: compiled engines with the record of where they came from. The manifest is written last and names every digest.

Hides the layout of the directory. A bundle whose manifest is missing was never finished; one whose digests differ is not
opened. What an author may write (`check_authored`) is less strict than what a device may install (`check_installable`).

    manifest.json                  canonical JSON, written last
    models/FAMILY/int8.onnx        the portable Q/DQ graph that the CPU runtimes open
    calibration/FAMILY.csv         hashes of the preprocessed calibration images
    calibration/FAMILY.ranges.json the activation ranges measured on them
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from appliance.backends import Signature, Tensor
from appliance.errors import BundleCorrupt, BundleIncompatible, BundleMissing
from kernels.preprocess import PREPROCESS_VERSION

FORMAT = "1"
MANIFEST = "manifest.json"
MAX_MANIFEST_BYTES = 4 << 20
MAX_FILE_BYTES = 512 << 20
MAX_FILES = 1000
MAX_VALUES = 1 << 26  # of one input or output: 256 MB of float32
_PATH = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*){0,5}")
SHIPPED = Path(__file__).resolve().parent.parent / "models" / "weights" / "bundle"


def canonical(value: Any) -> bytes:
    """JSON with sorted keys, no spaces, UTF-8, no NaN: the same value gives the same bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


@dataclass(frozen=True)
class Engine:
    """One family's entry: where its graph lies, what goes in and out, and which backend and precision won here."""

    family: str
    version: str
    graph: str
    signature: Signature
    backend: str
    float_share: float


@dataclass(frozen=True)
class Bundle:
    """An opened bundle. Every file was read and its digest checked when it was opened."""

    root: Path
    manifest: dict[str, Any]
    digest: str

    @property
    def identity(self) -> dict[str, Any]:
        """What a report says of the bundle: name, SHA-256 of the manifest, version of the tool that compiled it."""
        return {"name": self.manifest["name"], "digest": self.digest, "spinebox": self.manifest["spinebox"]}

    def engine(self, family: str) -> Engine:
        """The entry of `family`. Raises BundleIncompatible where the bundle has none."""
        entry = self.manifest["models"].get(family)
        if entry is None:
            raise BundleIncompatible(f"the bundle has no {family}", value=self.root)
        signature = Signature(
            tuple(Tensor(t["name"], tuple(t["shape"])) for t in entry["inputs"]),
            tuple(Tensor(t["name"], tuple(t["shape"])) for t in entry["outputs"]),
        )
        return Engine(family, entry["version"], entry["graph"], signature, entry["choice"]["backend"], entry["float_share"])

    def read(self, path: str) -> bytes:
        """The bytes of a listed file, checked against its digest once more: the disk may have changed since."""
        entry = self.manifest["files"].get(path)
        if entry is None:
            raise BundleCorrupt("the manifest does not list this file", value=path)
        return _read_checked(self.root, path, entry)


def _read_checked(root: Path, path: str, entry: Mapping[str, Any]) -> bytes:
    if not _PATH.fullmatch(path):
        raise BundleCorrupt("the manifest names a path that leaves the bundle", value=path)
    file = root / path
    try:
        if file.is_symlink() or not file.resolve().is_relative_to(root.resolve()):
            raise BundleCorrupt("a bundle holds no links", value=path)
        size = file.stat().st_size
        if size != entry["bytes"] or size > MAX_FILE_BYTES:
            raise BundleCorrupt(f"{path} has {size} bytes, the manifest says {entry['bytes']}", value=root)
        data = file.read_bytes()
    except OSError as error:
        raise BundleCorrupt(f"{path} cannot be read: {error.strerror}", value=root) from error
    if hashlib.sha256(data).hexdigest() != entry["sha256"]:
        raise BundleCorrupt(f"{path} does not match its SHA-256", value=root)
    return data


def check_authored(manifest: Any) -> None:
    """What the compiler may write: every key there, of the right kind. Raises BundleCorrupt naming the field."""
    if not isinstance(manifest, dict):
        raise BundleCorrupt("the manifest is not an object")
    for key, kind in (("format", str), ("name", str), ("spinebox", str), ("preprocess", str), ("models", dict), ("files", dict)):
        if not isinstance(manifest.get(key), kind):
            raise BundleCorrupt(f"manifest field {key} is missing or not a {kind.__name__}", value=manifest.get(key))
    if len(manifest["files"]) > MAX_FILES:
        raise BundleCorrupt(f"the manifest lists more than {MAX_FILES} files", value=len(manifest["files"]))
    for path, entry in manifest["files"].items():
        if not _PATH.fullmatch(path):
            raise BundleCorrupt("the manifest names a path that leaves the bundle", value=path)
        well = isinstance(entry, dict) and isinstance(entry.get("bytes"), int) and re.fullmatch(r"[0-9a-f]{64}", str(entry.get("sha256")))
        if not well:
            raise BundleCorrupt("a file entry needs bytes and sha256", value=path)
    for name, model in manifest["models"].items():
        _check_model(name, model)
        if model["graph"] not in manifest["files"]:
            raise BundleCorrupt(f"model {name} names a graph that is not listed", value=model["graph"])


def _check_model(name: str, model: Any) -> None:
    """One model's entry: every key of its kind, and tensors that a device can hold."""
    kinds: dict[str, type | tuple[type, ...]] = {
        "version": str,
        "graph": str,
        "inputs": list,
        "outputs": list,
        "choice": dict,
        "float_share": (int, float),
    }
    for key, kind in kinds.items():
        if not isinstance(model, dict) or not isinstance(model.get(key), kind) or isinstance(model[key], bool):
            raise BundleCorrupt(f"model {name} lacks {key}, or it is of the wrong kind")
    if not isinstance(model["choice"].get("backend"), str):
        raise BundleCorrupt(f"model {name} does not say its choice of backend", value=model["choice"])
    for side in ("inputs", "outputs"):
        for tensor in model[side]:
            shape: Any = tensor.get("shape") if isinstance(tensor, dict) else None
            sizes = isinstance(shape, list) and all(type(n) is int and n > 0 for n in shape)
            if not sizes or not isinstance(tensor.get("name"), str) or math.prod(shape) > MAX_VALUES:
                raise BundleCorrupt(f"model {name} has {side} that cannot be", value=tensor)
        if not model[side]:
            raise BundleCorrupt(f"model {name} has no {side}")


def check_installable(manifest: dict[str, Any]) -> None:
    """What this device may run: known format, the same preprocessing. Raises BundleIncompatible."""
    if manifest["format"] != FORMAT:
        raise BundleIncompatible(f"this version reads bundle format {FORMAT}", value=manifest["format"])
    if manifest["preprocess"] != PREPROCESS_VERSION:
        raise BundleIncompatible(f"the engines expect preprocessing {manifest['preprocess']}, this version does {PREPROCESS_VERSION}")


def open_bundle(root: Path | None = None) -> Bundle:
    """Read and check a bundle directory; the shipped one where none is named.

    Raises BundleMissing (no directory, or no manifest: never finished), BundleCorrupt, BundleIncompatible.
    """
    root = SHIPPED if root is None else root
    path = root / MANIFEST
    try:
        if path.stat().st_size > MAX_MANIFEST_BYTES:
            raise BundleCorrupt(f"the manifest is larger than {MAX_MANIFEST_BYTES} bytes", value=path)
        data = path.read_bytes()
    except OSError as error:
        raise BundleMissing("there is no finished bundle here", value=root) from error
    try:
        manifest = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BundleCorrupt(f"the manifest is not JSON: {error}", value=path) from error
    check_authored(manifest)
    check_installable(manifest)
    for name, entry in manifest["files"].items():
        _read_checked(root, name, entry)
    return Bundle(root, manifest, hashlib.sha256(data).hexdigest())


class Writer:
    """Collects files for a bundle; the manifest goes last."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.files: dict[str, dict[str, Any]] = {}

    def add(self, path: str, data: bytes) -> str:
        """Write one file, durable before the manifest names it. Returns its path in the bundle."""
        target = self.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        self.files[path] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        return path

    def finish(self, manifest: dict[str, Any]) -> None:
        manifest = {**manifest, "format": FORMAT, "preprocess": PREPROCESS_VERSION, "files": self.files}
        check_authored(manifest)
        self.add(MANIFEST, canonical(manifest))


@contextmanager
def new_bundle(root: Path) -> Iterator[Writer]:
    """A writer into a scratch folder beside `root`, moved into place at the end; nothing is left behind on failure."""
    root.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{root.name}-", dir=root.parent))
    try:
        writer = Writer(scratch)
        yield writer
        if MANIFEST not in writer.files:
            raise BundleCorrupt("the bundle was not finished", value=root)
        scratch.chmod(0o755)
        if root.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{root.name}-old-", dir=root.parent))
            root.rename(old / "bundle")
            scratch.rename(root)
            shutil.rmtree(old)
        else:
            scratch.rename(root)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
