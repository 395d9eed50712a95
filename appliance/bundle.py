"""The bundle: compiled engines with the record of where they came from. The manifest names every digest and is the identity.

Hides the layout: a folder, or one file (a zip) with the same digest. A bundle whose manifest is missing was never finished; one
whose digests differ is not opened. What an author may write (`check_authored`) is less strict than what a device may run
(`check_installable`).

    manifest.json                  canonical JSON; docs/bundle.md lists its fields
    signature.json                 Ed25519 over the manifest's bytes, written last
    profile.json                   times of one device and the engine it chose: no part of the identity
    sbom.json                      CycloneDX
    models/NAME/...                graphs
    cards/, calibration/, golden/  what the manifest's entries name
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from appliance import backends, signing
from appliance._archive import PATH, Archive
from appliance._archive import write as write_archive
from appliance.backends import Signature, Tensor
from appliance.errors import BundleCorrupt, BundleIncompatible, BundleMissing, CompileDiskFull, UsageError
from appliance.signing import PrivateKey, PublicKey
from kernels.preprocess import PREPROCESS_VERSION

FORMAT = "2"
MANIFEST, SIGNATURE, PROFILE = "manifest.json", "signature.json", "profile.json"
MAX_MANIFEST_BYTES = 4 << 20
MAX_PROFILE_BYTES = 1 << 20
MAX_FILE_BYTES = 512 << 20
MAX_TOTAL_BYTES = (2 << 30) - (64 << 20)  # what the single-file form can hold
MAX_FILES = 1000
MAX_MODELS = 64
MAX_LIST = 100_000  # classes, metrics, verdicts
MAX_DEPTH = 16
MAX_VALUES = 1 << 26  # of one input or output: 256 MB of float32
MEMORY_SHARE = 4  # a graph larger than a fourth of the memory is not opened: runtimes hold it about twice
PRECISIONS = ("int8", "fp16", "f32")
MAP_KINDS = ("cam", "grad-cam", "class-evidence", "activation", "unavailable")
SHIPPED = Path(__file__).resolve().parent.parent / "models" / "weights" / "bundle"
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_OWN = (MANIFEST, SIGNATURE, PROFILE)


def canonical(value: Any) -> bytes:
    """JSON with sorted keys, no spaces, UTF-8, no NaN: the same value gives the same bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


@dataclass(frozen=True)
class Build:
    """One model built for one backend. `passed` None: no gate could judge it where it was compiled. `golden` is the file by
    which a device accepts it."""

    backend: str
    graph: str
    precision: str
    passed: bool | None
    golden: str | None = None


@dataclass(frozen=True)
class Engine:
    """One model's entry: what goes in and out, the builds that a device may open, and the one its profile chose."""

    name: str
    version: str
    signature: Signature
    float_share: float
    builds: Mapping[str, Build]
    choice: str | None

    def order(self) -> list[Build]:
        """The builds that a device may try: the profile's choice, what passed by PREFERENCE and name, then what nobody could judge
        but has golden inputs to be accepted by."""
        wanted = [self.choice, *backends.PREFERENCE, *sorted(self.builds)]
        found = [self.builds[n] for n in dict.fromkeys(wanted) if n is not None and n in self.builds]
        usable = [b for b in found if b.passed or (b.passed is None and b.golden is not None)]
        return sorted(usable, key=lambda b: (b.backend != self.choice, not b.passed))


class _Store(Protocol):
    def size(self, name: str) -> int: ...
    def read(self, name: str) -> bytes: ...
    def holds(self, name: str) -> bool: ...


@dataclass(frozen=True)
class Bundle:
    """A bundle that was read. Every file was read and its digest checked when it was opened.

    `signer` is who signed it, `trusted` whether this machine trusts them; `profile` is empty where there is none or a bad one,
    and `profile_problem` then says why.
    """

    root: Path
    manifest: dict[str, Any]
    digest: str
    signer: PublicKey | None = None
    trusted: bool = False
    profile: dict[str, Any] = field(default_factory=dict)
    profile_problem: str = ""
    _store: _Store = field(repr=False, compare=False, kw_only=True)

    @property
    def identity(self) -> dict[str, Any]:
        """What a report says of the bundle: name, SHA-256 of the manifest, version of the tool that compiled it."""
        return {"name": self.manifest["name"], "digest": self.digest, "spinebox": self.manifest["spinebox"]}

    def engine(self, name: str) -> Engine:
        """The entry of the model `name`. Raises BundleIncompatible where the bundle has none."""
        entry = self.manifest["models"].get(name)
        if entry is None:
            raise BundleIncompatible(f"the bundle has no {name}", value=self.root)
        builds = {
            backend: Build(backend, e["graph"], e["precision"], e["passed"], e["golden"])
            for backend, e in entry["engines"].items()
            if e["graph"] is not None and e["passed"] is not False and backend in backends.names()
        }
        choice = self.profile.get("models", {}).get(name, {}).get("choice", {}).get("backend")
        return Engine(name, entry["version"], _signature(entry), entry["float_share"], builds, choice)

    def read(self, path: str) -> bytes:
        """The bytes of a listed file, checked against its digest once more: the disk may have changed since."""
        entry = self.manifest["files"].get(path)
        if entry is None:
            raise BundleCorrupt("the manifest does not list this file", value=path)
        return _read_checked(self._store, path, entry)

    def part(self, name: str) -> bytes | None:
        """The bytes of the manifest, signature or profile as they lie there; None where there is none."""
        return self._store.read(name) if self._store.holds(name) else None


def _signature(entry: Mapping[str, Any]) -> Signature:
    sides = (tuple(Tensor(t["name"], tuple(t["shape"])) for t in entry[side]) for side in ("inputs", "outputs"))
    return Signature(*sides)


# -- where the bytes lie ------------------------------------------------------------------------------------------------


class _Folder:
    def __init__(self, root: Path) -> None:
        self.root = root

    def holds(self, name: str) -> bool:
        return (self.root / name).is_file()

    def size(self, name: str) -> int:
        return self._file(name).stat().st_size

    def read(self, name: str) -> bytes:
        return self._file(name).read_bytes()

    def _file(self, name: str) -> Path:
        file = self.root / name
        if file.is_symlink() or not file.resolve().is_relative_to(self.root.resolve()):
            raise BundleCorrupt("a bundle holds no links", value=name)
        if file.exists() and not file.is_file():  # a pipe would block for ever
            raise BundleCorrupt("a bundle holds plain files only", value=name)
        return file


class _File:
    def __init__(self, path: Path) -> None:
        self._archive = Archive(path, MAX_FILES + len(_OWN))
        self.names = self._archive.names()

    def holds(self, name: str) -> bool:
        return name in self.names

    def size(self, name: str) -> int:
        return self._archive.size(name) if name in self.names else self._lacks(name)

    def read(self, name: str) -> bytes:
        return self._archive.read(name) if name in self.names else self._lacks(name)

    def _lacks(self, name: str) -> Any:
        raise FileNotFoundError(errno.ENOENT, "the archive has no such entry", name)


def _open_store(root: Path) -> _Store:
    try:
        if root.is_file():
            return _File(root)
        store = _Folder(root)
        store.size(MANIFEST)
    except OSError as error:
        raise BundleMissing("there is no finished bundle here", value=root) from error
    return store


def _read_checked(store: _Store, path: str, entry: Mapping[str, Any]) -> bytes:
    if not PATH.fullmatch(path):
        raise BundleCorrupt("the manifest names a path that leaves the bundle", value=path)
    try:
        size = store.size(path)
        if size != entry["bytes"] or size > MAX_FILE_BYTES:
            raise BundleCorrupt(f"{path} has {size} bytes, the manifest says {entry['bytes']}")
        data = store.read(path)
    except OSError as error:
        raise BundleCorrupt(f"{path} cannot be read: {error.strerror}") from error
    if hashlib.sha256(data).hexdigest() != entry["sha256"]:
        raise BundleCorrupt(f"{path} does not match its SHA-256")
    return data


def _read_part(store: _Store, name: str, most: int) -> bytes | None:
    """Manifest, signature or profile, within its limit; None where there is none. Raises BundleCorrupt."""
    try:
        if not store.holds(name):
            return None
        if store.size(name) > most:
            raise BundleCorrupt(f"{name} is larger than {most} bytes")
        return store.read(name)
    except OSError as error:
        raise BundleCorrupt(f"{name} cannot be read: {error.strerror}") from error


def _parse(name: str, data: bytes) -> Any:
    try:
        value = json.loads(data)
        canonical(value)  # NaN and lone surrogates are no JSON, though Python reads them
    except (ValueError, RecursionError) as error:
        raise BundleCorrupt(f"{name} is not JSON: {error}") from error
    _check_depth(name, value)
    return value


def _check_depth(name: str, value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [x for v in level if isinstance(v, dict | list) for x in (v.values() if isinstance(v, dict) else v)]
        if not level:
            return
    raise BundleCorrupt(f"{name} is nested more than {MAX_DEPTH} deep")


# -- what an author may write -------------------------------------------------------------------------------------------


def _is(value: Any, kind: str) -> bool:
    """Whether a JSON value is of a kind: a word for a type, `?` after it where null will do."""
    if kind.endswith("?"):
        return value is None or _is(value, kind[:-1])
    match kind:
        case "text":
            return isinstance(value, str)
        case "number":
            return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300
        case "count":
            return type(value) is int and 0 <= value < 1 << 53
        case "flag":
            return isinstance(value, bool)
        case "object":
            return isinstance(value, dict)
        case "sha256":
            return isinstance(value, str) and _SHA256.fullmatch(value) is not None
        case "list":
            return isinstance(value, list) and len(value) <= MAX_LIST
        case "texts":
            return _is(value, "list") and all(isinstance(v, str) for v in value)
        case "numbers":
            return _is(value, "list") and all(_is(v, "number") for v in value)
    raise ValueError(kind)


def _check_fields(owner: str, value: Any, kinds: Mapping[str, str]) -> None:
    if not isinstance(value, dict):
        raise BundleCorrupt(f"{owner} is not an object", value=value)
    for key, kind in kinds.items():
        if key not in value:
            raise BundleCorrupt(f"{owner} lacks {key}")
        if not _is(value[key], kind):
            raise BundleCorrupt(f"{owner}: {key} is of the wrong kind, it must be {kind.removesuffix('?')}", value=value[key])


def _check_listed(owner: str, path: Any, files: Mapping[str, Any]) -> None:
    if path not in files:
        raise BundleCorrupt(f"{owner} names a file that is not listed", value=path)


_TOP = {"format": "text", "name": "text", "spinebox": "text", "preprocess": "text", "tools": "object", "max_drop": "number"}
_TOP |= {"calibration_root": "sha256", "sbom": "text", "files": "object", "models": "object"}
_MODEL = {"version": "text", "task": "text", "classes": "texts", "inputs": "list", "outputs": "list", "preprocess": "object"}
_MODEL |= {"heatmap": "object", "cam_bias": "numbers?", "float_share": "number", "source_sha256": "sha256", "card": "text"}
_MODEL |= {"calibration": "object", "temperature": "object?", "metrics": "object", "engines": "object"}
_HEATMAP = {"kind": "text", "output": "text?", "layer": "text", "reason": "text"}
_CALIBRATION = {"manifest": "text", "record": "text", "root": "sha256", "images": "count", "source": "text"}
_METRIC = {"name": "text", "value": "number", "low": "number?", "high": "number?", "images": "count", "patients": "count"}
_ENGINE = {"graph": "text?", "precision": "text", "passed": "flag?", "verified": "text", "golden": "text?"}
_ENGINE |= {"metrics": "list", "verdicts": "list"}
_VERDICT = {"gate": "text", "passed": "flag?", "note": "text"}


def check_authored(manifest: Any) -> None:
    """What the compiler may write: every field there, of its kind, and nothing that contradicts another. Raises BundleCorrupt."""
    _check_fields("the manifest", manifest, _TOP)
    files, models = manifest["files"], manifest["models"]
    if not _NAME.fullmatch(manifest["name"]):
        raise BundleCorrupt("the manifest's name is no name", value=manifest["name"])
    if not all(isinstance(v, str) for v in manifest["tools"].values()):
        raise BundleCorrupt("the manifest's tools are names with versions", value=manifest["tools"])
    _check_files(files)
    _check_listed("the manifest's sbom", manifest["sbom"], files)
    if len(models) > MAX_MODELS:
        raise BundleCorrupt(f"the manifest has more than {MAX_MODELS} models", value=len(models))
    for name, model in models.items():
        if not _NAME.fullmatch(name):
            raise BundleCorrupt("a model's name is no name", value=name)
        _check_model(f"model {name}", model, files)
    if manifest["calibration_root"] != calibration_root(models):
        raise BundleCorrupt("calibration_root is not that of the models' own roots", value=manifest["calibration_root"])


def _check_files(files: Mapping[str, Any]) -> None:
    if len(files) > MAX_FILES:
        raise BundleCorrupt(f"the manifest lists more than {MAX_FILES} files", value=len(files))
    for path, entry in files.items():
        if not PATH.fullmatch(path) or path in _OWN:
            raise BundleCorrupt("the manifest names a path that leaves the bundle", value=path)
        _check_fields(f"file {path}", entry, {"bytes": "count", "sha256": "sha256"})
    if sum(entry["bytes"] for entry in files.values()) > MAX_TOTAL_BYTES:
        raise BundleCorrupt(f"the files have more than {MAX_TOTAL_BYTES} bytes together")


def _check_model(owner: str, model: Any, files: Mapping[str, Any]) -> None:
    """One model's entry: every field of its kind, tensors that a device can hold, files that are listed."""
    _check_fields(owner, model, _MODEL)
    for side in ("inputs", "outputs"):
        for tensor in model[side]:
            shape: Any = tensor.get("shape") if isinstance(tensor, dict) else None
            sizes = isinstance(shape, list) and all(type(n) is int and n > 0 for n in shape)
            if not sizes or not isinstance(tensor.get("name"), str) or math.prod(shape) > MAX_VALUES:
                raise BundleCorrupt(f"{owner} has {side} that cannot be", value=tensor)
        if not model[side]:
            raise BundleCorrupt(f"{owner} has no {side}")
    _check_fields(f"{owner}, heatmap", model["heatmap"], _HEATMAP)
    kind, output = model["heatmap"]["kind"], model["heatmap"]["output"]
    if kind not in MAP_KINDS or (output is None) != (kind == "unavailable"):
        raise BundleCorrupt(f"{owner} has a heatmap that cannot be", value=model["heatmap"])
    if output is not None and output not in [t["name"] for t in model["outputs"]]:
        raise BundleCorrupt(f"{owner}: no output is named like its heatmap", value=output)
    if (model["cam_bias"] is None) == (kind == "cam"):
        raise BundleCorrupt(f"{owner}: cam_bias belongs to a heatmap of kind cam, and only there", value=kind)
    _check_fields(f"{owner}, calibration", model["calibration"], _CALIBRATION)
    for path in (model["card"], model["calibration"]["manifest"], model["calibration"]["record"]):
        _check_listed(owner, path, files)
    if "fusion" in model:
        _check_listed(owner, model["fusion"], files)
    _check_fields(f"{owner}, metrics", model["metrics"], {"source": "text", "fp32": "list"})
    _check_metrics(owner, model["metrics"]["fp32"])
    for backend, engine in model["engines"].items():
        _check_engine(f"{owner} on {backend}", backend, engine, files)


def _check_engine(owner: str, backend: str, engine: Any, files: Mapping[str, Any]) -> None:
    if not _NAME.fullmatch(backend):
        raise BundleCorrupt("a backend's name is no name", value=backend)
    _check_fields(owner, engine, _ENGINE)
    if engine["precision"] not in PRECISIONS:
        raise BundleCorrupt(f"{owner}: precision is one of {', '.join(PRECISIONS)}", value=engine["precision"])
    for path in (engine["graph"], engine["golden"]):
        if path is not None:
            _check_listed(owner, path, files)
    if engine["passed"] and engine["graph"] is None:
        raise BundleCorrupt(f"{owner} passed, but has no graph")
    _check_metrics(owner, engine["metrics"])
    for verdict in engine["verdicts"]:
        _check_fields(f"{owner}, verdict", verdict, _VERDICT)
        if verdict["passed"] is False and engine["passed"]:
            raise BundleCorrupt(f"{owner} passed, but its {verdict['gate']} gate refused it")


def _check_metrics(owner: str, metrics: list[Any]) -> None:
    for metric in metrics:
        _check_fields(f"{owner}, metric", metric, _METRIC)


def calibration_root(models: Mapping[str, Any]) -> str:
    """One digest over every model's calibration root: a changed calibration image changes it, and with it the identity."""
    roots = {name: model["calibration"]["root"] for name, model in models.items()}
    return hashlib.sha256(b"spinebox calibration roots\x00" + canonical(roots)).hexdigest()


# -- what a device may run ----------------------------------------------------------------------------------------------


def device_memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _check_format(manifest: Any) -> None:
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if isinstance(found, str) and found != FORMAT:
        raise BundleIncompatible(f"this version reads bundle format {FORMAT}", value=found)


def check_installable(
    manifest: dict[str, Any], signature: Any | None, trusted: Mapping[str, PublicKey] | None, memory_bytes: int | None = None
) -> PublicKey | None:
    """What a device may run: known format, the same preprocessing, a trusted signature, graphs that fit its memory, and for each
    model an engine of a known backend that passed, each such engine with golden outputs. The manifest must have passed `check_authored`.

    `trusted` None asks for no signature. Raises BundleIncompatible, BundleUnsigned, BundleCorrupt (a signature that does not fit).
    """
    _check_format(manifest)
    if manifest["preprocess"] != PREPROCESS_VERSION:
        raise BundleIncompatible(f"the engines expect preprocessing {manifest['preprocess']}, this version does {PREPROCESS_VERSION}")
    signer = None if trusted is None else signing.verify(signature, canonical(manifest), trusted)
    most = (memory_bytes or device_memory_bytes()) // MEMORY_SHARE
    for name, model in manifest["models"].items():
        usable = [b for b, e in model["engines"].items() if e["passed"] and b in backends.names()]
        if not usable:
            raise BundleIncompatible(f"no engine of {name} that passed its gates is of a backend that this version has", value=name)
        for backend in usable:
            engine = model["engines"][backend]
            size = manifest["files"][engine["graph"]]["bytes"]
            if size > most:
                raise BundleIncompatible(f"{name} on {backend} is too large for this device's memory", value=f"{size} > {most} bytes")
            if engine["golden"] is None:
                what = f"{name} on {backend} has no golden outputs, so that engine cannot be checked on this device"
                raise BundleIncompatible(what, value=name)
    return signer


# -- profile ------------------------------------------------------------------------------------------------------------


def check_profile(profile: Any, manifest: Mapping[str, Any]) -> None:
    """{device, models: {NAME: {choice, losers, engines}}}, choosing only among engines that passed. Raises BundleCorrupt."""
    _check_fields("the profile", profile, {"device": "object", "models": "object"})
    for name, entry in profile["models"].items():
        owner = f"the profile of {name}"
        if name not in manifest["models"]:
            raise BundleCorrupt("the profile names a model that the bundle does not have", value=name)
        _check_fields(owner, entry, {"choice": "object", "losers": "list", "engines": "object"})
        for choice in (entry["choice"], *entry["losers"]):
            _check_fields(owner, choice, {"backend": "text", "precision": "text", "reason": "text"})
        engine = manifest["models"][name]["engines"].get(entry["choice"]["backend"], {})
        if engine.get("passed", False) is False or engine["precision"] != entry["choice"]["precision"]:
            raise BundleCorrupt(f"{owner} chooses an engine that did not pass", value=entry["choice"])
        if not all(isinstance(v, dict) for v in entry["engines"].values()):
            raise BundleCorrupt(f"{owner} has times that are no object")


def write_profile(root: Path, profile: dict[str, Any]) -> None:
    """A device's own profile for the bundle folder `root`, in one step. Raises BundleCorrupt, BundleIncompatible, CompileDiskFull."""
    bundle = read_bundle(root)
    if root.is_file():
        raise BundleIncompatible("a single file keeps the profile that it was packed with", value=root, remedy="Unpack it first.")
    check_profile(profile, bundle.manifest)
    _replace(root / PROFILE, _profile_bytes(profile))


def _profile_bytes(profile: dict[str, Any]) -> bytes:
    data = (json.dumps(profile, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()
    if len(data) > MAX_PROFILE_BYTES:
        raise BundleCorrupt(f"the profile is larger than {MAX_PROFILE_BYTES} bytes", value=len(data))
    return data


def _read_profile(store: _Store, manifest: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """The profile, or none and why: a bad one costs the choice, never the bundle."""
    try:
        data = _read_part(store, PROFILE, MAX_PROFILE_BYTES)
        if data is None:
            return {}, "no device has measured these engines yet"
        profile = _parse("the profile", data)
        check_profile(profile, manifest)
    except BundleCorrupt as error:
        return {}, error.what
    return profile, ""


# -- reading ------------------------------------------------------------------------------------------------------------


def read_bundle(root: Path | None = None) -> Bundle:
    """Read a folder or a file as an author may write it, signed or not; the shipped bundle where none is named.

    Raises BundleMissing (nothing there, or no manifest: never finished), BundleCorrupt, BundleIncompatible (another format).
    """
    root = SHIPPED if root is None else root
    try:
        store = _open_store(root)
        data = _read_part(store, MANIFEST, MAX_MANIFEST_BYTES)
        if data is None:
            raise BundleMissing("there is no finished bundle here", value=root)
        manifest = _parse("the manifest", data)
        _check_format(manifest)
        check_authored(manifest)
        if canonical(manifest) != data:
            raise BundleCorrupt("the manifest is not in its canonical form")
        if isinstance(store, _File) and not store.names <= {*manifest["files"], *_OWN}:
            raise BundleCorrupt("the archive holds files that the manifest does not list")
        signer: PublicKey | None = None
        document = _read_part(store, SIGNATURE, signing.MAX_SIGNATURE_BYTES)
        if document is not None:
            signer = signing.check_signature(_parse("the signature", document), data)
        for path, entry in manifest["files"].items():
            _read_checked(store, path, entry)
    except BundleCorrupt as error:
        error.value = error.value or str(root)
        raise
    known = signing.trusted_keys().get(signer.id) if signer else None
    profile, problem = _read_profile(store, manifest)
    digest = hashlib.sha256(data).hexdigest()
    return Bundle(root, manifest, digest, known or signer, known is not None, profile, problem, _store=store)


def open_bundle(root: Path | None = None, *, require_signature: bool = True) -> Bundle:
    """As `read_bundle`, for running: the bundle must be installable here.

    Raises what `read_bundle` raises, BundleUnsigned, BundleIncompatible.
    """
    bundle = read_bundle(root)
    document = bundle.part(SIGNATURE)
    trusted = signing.trusted_keys() if require_signature else None
    check_installable(bundle.manifest, None if document is None else _parse("the signature", document), trusted)
    return bundle


# -- writing ------------------------------------------------------------------------------------------------------------


@contextmanager
def _disk(target: Path) -> Iterator[None]:
    """Errors of the disk, in the tree's words."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise CompileDiskFull(f"the bundle cannot be written: {error.strerror}", value=target) from error
        what = f"the bundle cannot be written: {error.strerror}"
        raise UsageError(what, value=target, remedy="Name a folder that you may write to.") from error


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _replace(path: Path, data: bytes) -> None:
    """One file in one step, durable."""
    with _disk(path):
        handle, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
        os.close(handle)
        part = Path(name)
        try:
            _write(part, data)
            part.chmod(0o644)
            part.replace(path)
            _sync_folder(path.parent)
        finally:
            part.unlink(missing_ok=True)


class Writer:
    """Collects the files of a bundle; the manifest goes last, and after it nothing but its signature."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.files: dict[str, dict[str, Any]] = {}
        self.finished = False

    def add(self, path: str, data: bytes) -> str:
        """Write one file, durable before the manifest names it. Returns its path in the bundle.

        Raises BundleCorrupt (a path that cannot be, one used twice, too many or too large files), CompileDiskFull.
        """
        if self.finished or not PATH.fullmatch(path) or path in _OWN:
            raise BundleCorrupt("a bundle cannot hold this path", value=path)
        if path in self.files:
            raise BundleCorrupt("a bundle holds each path once", value=path)
        if len(data) > MAX_FILE_BYTES:
            raise BundleCorrupt(f"{path} is larger than {MAX_FILE_BYTES} bytes", value=len(data))
        if len(self.files) >= MAX_FILES or len(data) + sum(f["bytes"] for f in self.files.values()) > MAX_TOTAL_BYTES:
            raise BundleCorrupt(f"a bundle holds at most {MAX_FILES} files with {MAX_TOTAL_BYTES} bytes", value=path)
        target = self.root / path
        with _disk(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            _write(target, data)
            _sync_folder(target.parent)
        self.files[path] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        return path

    def finish(self, manifest: dict[str, Any], key: PrivateKey | None = None, profile: dict[str, Any] | None = None) -> None:
        """Write `profile`, the manifest with its files, format and calibration root, and where there is a `key` the signature.

        Raises BundleCorrupt where `check_authored` or `check_profile` would, CompileDiskFull.
        """
        manifest = {**manifest, "format": FORMAT, "preprocess": PREPROCESS_VERSION, "files": self.files}
        if not isinstance(manifest.get("models"), dict):
            raise BundleCorrupt("the manifest lacks models")
        for name, model in manifest["models"].items():
            _check_model(f"model {name}", model, self.files)
        manifest["calibration_root"] = calibration_root(manifest["models"])
        check_authored(manifest)
        data = canonical(manifest)
        if len(data) > MAX_MANIFEST_BYTES:
            raise BundleCorrupt(f"the manifest is larger than {MAX_MANIFEST_BYTES} bytes", value=len(data))
        if profile is not None:
            check_profile(profile, manifest)
            self._last(PROFILE, _profile_bytes(profile))
        self._last(MANIFEST, data)
        if key is not None:
            self._last(SIGNATURE, canonical(signing.sign(data, key)))
        self.finished = True

    def copy(self, bundle: Bundle) -> None:
        """Every file of another bundle, with its manifest, signature and profile as they are."""
        for path in bundle.manifest["files"]:
            self.add(path, bundle.read(path))
        for name in (PROFILE, MANIFEST, SIGNATURE):
            data = bundle.part(name)
            if data is not None:
                self._last(name, data)
        self.finished = True

    def _last(self, name: str, data: bytes) -> None:
        with _disk(self.root / name):
            _write(self.root / name, data)
            _sync_folder(self.root)


@contextmanager
def new_bundle(root: Path) -> Iterator[Writer]:
    """A writer into a scratch folder beside `root`, moved into place in one step at the end; nothing is left behind on failure.

    Of several writers to one place the last to finish wins, whole. Raises UsageError where `root` is there and no bundle.
    """
    root = Path(os.path.realpath(root))
    _check_replaceable(root)
    with _disk(root):
        root.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{root.name}-", dir=root.parent))
    try:
        writer = Writer(scratch)
        yield writer
        if not writer.finished:
            raise BundleCorrupt("the bundle was not finished", value=root)
        with _disk(root):
            scratch.chmod(0o755)
            _place(scratch, root)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _check_replaceable(root: Path) -> None:
    if not root.exists() or (root.is_dir() and ((root / MANIFEST).is_file() or not any(root.iterdir()))):
        return
    raise UsageError("there is something here that is no bundle, and it is not replaced", value=root, remedy="Name a new folder.")


def _place(scratch: Path, root: Path) -> None:
    """`scratch` becomes `root`; what was there before becomes `scratch`. One writer at a time, by a lock on the folder above."""
    parent = os.open(root.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(parent, fcntl.LOCK_EX)
        _check_replaceable(root)
        if root.exists():
            _exchange(scratch, root)
        else:
            scratch.rename(root)
        os.fsync(parent)
    finally:
        os.close(parent)


def _exchange(a: Path, b: Path) -> None:
    """Swap two folders: at no moment is either name without one where the file system can do that (renameat2), else in three steps."""
    libc = ctypes.CDLL(None, use_errno=True)
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if hasattr(libc, "renameat2") and libc.renameat2(here, os.fsencode(a), here, os.fsencode(b), exchange) == 0:
        return
    aside = b.with_name(f"{a.name}-old")
    b.rename(aside)
    try:
        a.rename(b)
    except OSError:
        aside.rename(b)
        raise
    aside.rename(a)


def pack(bundle: Bundle, out: Path, *, with_profile: bool = True) -> None:
    """The single-file form of a bundle at `out`, in one step. The same bundle gives the same bytes. Raises CompileDiskFull."""
    parts = {n: bundle.part(n) for n in _OWN if n != PROFILE or with_profile}
    _pack(bundle, {n: data for n, data in parts.items() if data is not None}, out)


def _pack(bundle: Bundle, parts: Mapping[str, bytes], out: Path) -> None:
    files = [(path, lambda path=path: bundle.read(path)) for path in bundle.manifest["files"]]
    files += [(name, lambda data=data: data) for name, data in parts.items()]
    with _disk(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{out.name}-", dir=out.parent)
        part = Path(name)
        try:
            with os.fdopen(handle, "wb") as f:
                write_archive(f, files)
                f.flush()
                os.fsync(f.fileno())
            part.chmod(0o644)
            part.replace(out)
            _sync_folder(out.parent)
        finally:
            part.unlink(missing_ok=True)


def unpack(bundle: Bundle, root: Path) -> None:
    """The folder form of a bundle at `root`, with the same digest and signature. Raises as `new_bundle`."""
    with new_bundle(root) as writer:
        writer.copy(bundle)


def sign_bundle(root: Path, key: PrivateKey) -> PublicKey:
    """Sign the folder or file at `root`, in place of whatever signature it has. Raises as `read_bundle`, CompileDiskFull."""
    bundle = read_bundle(root)
    manifest = bundle.part(MANIFEST)
    assert manifest is not None  # noqa: S101 - it was just read; for the type checker
    document = canonical(signing.sign(manifest, key))
    if root.is_file():
        parts = {MANIFEST: manifest, SIGNATURE: document, PROFILE: bundle.part(PROFILE)}
        _pack(bundle, {n: data for n, data in parts.items() if data is not None}, root)
    else:
        _replace(root / SIGNATURE, document)
    return signing.public_of(key)
