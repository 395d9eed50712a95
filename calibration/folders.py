"""Folders of DICOM, PNG and JPEG files -> images that may calibrate, with what is known of each; and a set chosen among them.

Hides reading, what is left out and why, and the names: nothing that a manifest holds says who was imaged. Vendors and protocols
are words of fixed lists, patients are hashes that stay on this machine, files are numbers with the beginning of a pixel hash
unless somebody asks to keep their names.
"""

from __future__ import annotations

import csv
import hashlib
import io
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from appliance import study
from appliance.errors import CalibrationInvalid, SpineboxError, UsageError
from calibration.duplicates import Fingerprint, fingerprint
from calibration.sets import SEED, CalibrationSet, digest
from calibration.strata import Candidate, bins, choose
from kernels.preprocess import PREPROCESS_VERSION, letterbox, normalise

MAX_FILES = 20_000
MAX_TABLE_BYTES = 8 << 20
MIN_IMAGES = 8
PERCENTS = (1, 5, 10, 25, 50, 75, 90, 95, 99)
UNKNOWN = "unknown"
# First words of the names that manufacturers write into DICOM, in capitals; what is not among them is "other".
_VENDORS = {
    "SIEMENS": "Siemens", "GE": "GE", "GENERAL": "GE", "PHILIPS": "Philips", "CANON": "Canon", "TOSHIBA": "Canon", "HITACHI": "Hitachi",
    "FUJIFILM": "Fujifilm", "FUJI": "Fujifilm", "UIH": "United Imaging", "UNITED": "United Imaging", "ESAOTE": "Esaote",
    "PARAMED": "Paramed", "AGFA": "Agfa", "CARESTREAM": "Carestream", "KODAK": "Carestream", "KONICA": "Konica Minolta",
    "SAMSUNG": "Samsung", "NEUSOFT": "Neusoft", "MINDRAY": "Mindray", "SPINEBOX": "Spinebox",
}  # fmt: skip
# Defined terms of ViewPosition; any other text in that element could be anything.
_VIEWS = ("AP", "PA", "LL", "RL", "RLD", "LLD", "RLO", "LLO", "sagittal", "coronal", "axial")
_WORDS = re.compile(r"[^A-Za-z0-9 ._+/-]")

Pixels = NDArray[Any]  # H x W float32, or H x W x 3 uint8 where colour was asked for
Prepare = Callable[[Pixels], NDArray[np.float32]]
Progress = Callable[[int, int], None]  # done, total


@dataclass(frozen=True)
class Row:
    """What a table says of one file; "" where it says nothing. `patient` is a hash already."""

    protocol: str = ""
    vendor: str = ""
    label: str = ""
    patient: str = ""


@dataclass(frozen=True)
class Table:
    """`file,protocol,vendor,label,patient`: what the files themselves do not tell. Files by path in the folder, name or stem."""

    rows: dict[str, Row]

    @classmethod
    def read(cls, path: Path) -> Table:
        """`file` is needed; other columns may be missing or more. `new_file_name` and `Manufacturer`, as SPIDER names them, will do.

        Raises UsageError.
        """
        try:
            if path.stat().st_size > MAX_TABLE_BYTES:
                raise UsageError(f"the table is larger than {MAX_TABLE_BYTES} bytes", value=path)
            content = path.read_text("utf-8-sig")
            rows = list(csv.DictReader(io.StringIO(content), strict=True))
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise UsageError(f"the table cannot be read: {error}", value=path) from error
        if not rows or not {"file", "new_file_name"} & set(rows[0]):
            raise UsageError(
                "the table has no column `file`, or no row", value=path, remedy="Begin it with: file,protocol,vendor,label,patient"
            )
        out: dict[str, Row] = {}
        for row in rows:
            name = (row.get("file") or row.get("new_file_name") or "").strip()
            patient = (row.get("patient") or "").strip()
            found = Row(
                _word(row.get("protocol")),
                vendor_of(row.get("vendor") or row.get("Manufacturer")),
                _word(row.get("label")),
                study.hash_patient(patient.encode()) or "",
            )
            if out.setdefault(name, found) != found:
                raise UsageError("the table says two things of one file", value=name)
        return cls(out)

    def of(self, name: str) -> Row:
        path = Path(name)
        return next((self.rows[k] for k in (name, path.name, path.stem) if k in self.rows), Row())


def _word(value: str | None) -> str:
    return _WORDS.sub("?", (value or "").strip())[:48]


def vendor_of(name: str | None) -> str:
    """A manufacturer's name as one of a fixed list, "other", or "unknown" where there is none."""
    words = re.split(r"[^A-Z]+", (name or "").upper().strip())
    return next((_VENDORS[w] for w in words[:2] if w in _VENDORS), "other" if name and name.strip() else UNKNOWN)


@dataclass(frozen=True, eq=False)
class Image:
    """One readable image. `source_sha256` is of its pixels as read; `patient` a hash, "" where nobody said whose it is.

    `percentiles` are those of PERCENTS, `mean` and `contrast` (standard deviation) of the pixels normalised to [-1, 1].
    """

    path: Path
    name: str
    source_sha256: str
    rows: int
    columns: int
    spacing_mm: tuple[float, float] | None
    protocol: str
    vendor: str
    label: str
    patient: str
    mean: float
    contrast: float
    percentiles: tuple[float, ...]
    fingerprint: Fingerprint


@dataclass
class Gathered:
    """`skipped`: (file, why). `duplicates`: (file, the file with the same pixels that is kept)."""

    images: list[Image] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    duplicates: list[tuple[str, str]] = field(default_factory=list)


def load(path: Path, colour: bool = False) -> tuple[Pixels, study.Instance | None]:
    """The pixels that a network's preparation takes, and the Instance of a grey image. Raises StudyError, UsageError."""
    if not colour:
        instance = study.read_path(path)
        return instance.pixels, instance
    return study.read_colour(path), None


def source_digest(pixels: Pixels) -> str:
    """SHA-256 of pixels as read, their shape with them."""
    plain = np.ascontiguousarray(pixels, dtype="<f4" if pixels.dtype.kind == "f" else pixels.dtype)
    return hashlib.sha256(f"{plain.dtype.str} {plain.shape}".encode() + plain.tobytes()).hexdigest()


def grey(pixels: Pixels) -> NDArray[np.float32]:
    """H x W float32 of either kind of pixels."""
    if pixels.ndim == 2:
        return np.asarray(pixels, np.float32)
    return np.asarray(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY), np.float32)


def gather(folders: Sequence[Path], table: Table | None = None, colour: bool = False, progress: Progress | None = None) -> Gathered:
    """Read every image below `folders`; what cannot be read or is constant is listed, not fatal; the same pixels are kept once.

    One image is in memory at a time. Raises UsageError for a folder that is not there or that holds more than MAX_FILES files,
    CalibrationInvalid where nothing usable is left.
    """
    paths = study.find_inputs(folders, MAX_FILES)
    out = Gathered()
    kept: dict[str, Image] = {}
    for done, path in enumerate(sorted(paths, key=lambda p: _relative(p, folders)), 1):
        name = _relative(path, folders)
        try:
            image = _look(path, name, (table or Table({})).of(name), colour)
        except SpineboxError as error:
            out.skipped.append((name, f"{error.code}: {error.what}"))
        else:
            if image is None:
                out.skipped.append((name, "a constant image measures no range"))
            elif image.source_sha256 in kept:
                out.duplicates.append((name, kept[image.source_sha256].name))
                # Whose it is must not depend on which of the two names comes first.
                if not kept[image.source_sha256].patient or (image.patient and image.patient < kept[image.source_sha256].patient):
                    kept[image.source_sha256] = image
            else:
                kept[image.source_sha256] = image
        if progress:
            progress(done, len(paths))
    out.images = sorted(kept.values(), key=lambda i: i.source_sha256)
    if not out.images:
        first = "; ".join(f"{n}: {why}" for n, why in out.skipped[:3])
        raise CalibrationInvalid(
            f"no image can calibrate: {len(paths)} found, {len(out.skipped)} left out",
            value=first or ", ".join(str(f) for f in folders),
            remedy="Name a folder with DICOM, PNG or JPEG files that `spinebox run` can read.",
        )
    return out


def _relative(path: Path, folders: Sequence[Path]) -> str:
    name = next((path.relative_to(f).as_posix() for f in folders if f in path.parents), path.name)
    return name.encode("utf-8", "replace").decode()  # a file system may hold names that are no text


def _look(path: Path, name: str, row: Row, colour: bool) -> Image | None:
    pixels, instance = load(path, colour)
    plain = grey(pixels)
    if float(plain.max()) - float(plain.min()) < 1e-6:
        return None
    x = normalise(plain)
    stated = ""
    if instance is not None and instance.format == "DICOM":
        view = instance.view if instance.view in _VIEWS else "other view"
        stated = " ".join(p for p in (instance.modality, view, instance.weighting, instance.acquisition) if p)
    percentiles = tuple(round(float(v), 6) for v in np.percentile(x, PERCENTS))
    return Image(
        path=path,
        name=name,
        source_sha256=source_digest(pixels),
        rows=plain.shape[0],
        columns=plain.shape[1],
        spacing_mm=instance.spacing_mm if instance else None,
        protocol=row.protocol or stated or UNKNOWN,
        vendor=row.vendor if row.vendor not in ("", UNKNOWN) else vendor_of(instance.vendor if instance else None),
        label=row.label or UNKNOWN,
        patient=row.patient or (instance.patient_sha256 if instance else None) or "",
        mean=round(float(x.mean(dtype=np.float64)), 6),
        contrast=round(float(x.std(dtype=np.float64)), 6),
        percentiles=percentiles,
        fingerprint=fingerprint(plain),
    )


def select(images: Sequence[Image], count: int, seed: int = SEED, force: bool = False) -> list[tuple[Image, str]]:
    """`count` images with their stratum, in an order of which every prefix is a fair sample.

    Strata, coarse to fine: protocol, vendor, label, third of the mean, third of the contrast; the last two yield to the spread
    over patients where the seats allow either. Raises CalibrationInvalid for
    fewer than MIN_IMAGES unless `force`.
    """
    if not force and min(count, len(images)) < MIN_IMAGES:
        raise CalibrationInvalid(
            f"{min(count, len(images))} of at least {MIN_IMAGES} images: too few to measure ranges that hold",
            value=images[0].name if len(images) == 1 else f"{len(images)} images, {count} wanted",
            remedy="Name more images, or add --force where you know that they are enough.",
        )
    ordered = sorted(images, key=lambda i: i.source_sha256)
    means, contrasts = bins([i.mean for i in ordered], "mean"), bins([i.contrast for i in ordered], "contrast")
    by_key = {i.source_sha256: i for i in ordered}
    pool = [
        Candidate(i.source_sha256, i.patient, (i.protocol, i.vendor, i.label, mean, contrast))
        for i, mean, contrast in zip(ordered, means, contrasts, strict=True)
    ]
    return [(by_key[c.key], " | ".join(c.strata)) for c in choose(pool, count, seed, fine=2)]


def hold_back(chosen: Sequence[tuple[Image, str]], share: float = 0.2) -> tuple[list[tuple[Image, str]], list[tuple[Image, str]]]:
    """(what stays, what is held back): about `share` of the images, by whole patients, chosen by the hash of the patient.

    Both keep their order. Nothing is held back of fewer than two patients.
    """
    owner = [i.patient or i.source_sha256 for i, _ in chosen]
    order = sorted(set(owner), key=lambda p: hashlib.sha256(f"held back {p}".encode()).digest())
    back: set[str] = set()
    for patient in order[:-1]:
        if sum(p in back for p in owner) >= share * len(chosen):
            break
        back.add(patient)
    parts = list(zip(chosen, owner, strict=True))
    return [c for c, p in parts if p not in back], [c for c, p in parts if p in back]


def standard(input_hw: tuple[int, int]) -> Prepare:
    """The families' own preparation: H x W -> 1 x 1 x h x w in [-1, 1]."""
    return lambda pixels: letterbox(normalise(grey(pixels)), input_hw)[0]


def _prepared(image_name: str, pixels: Pixels, prepare: Prepare) -> NDArray[np.float32]:
    x = np.ascontiguousarray(prepare(pixels), dtype=np.float32)
    if not x.size or not np.isfinite(x).all():
        raise CalibrationInvalid("preparation gives NaN or infinite values, or nothing", value=image_name)
    if float(x.max()) - float(x.min()) < 1e-6:
        raise CalibrationInvalid("a constant image measures no range", value=image_name)
    return x


@dataclass(frozen=True)
class FolderCalibration:
    """A set with the files that it stands for: what the compile pipeline calls a Calibration. `source` says where it comes from."""

    manifest: CalibrationSet
    paths: tuple[Path, ...]
    prepare: Prepare
    colour: bool = False
    source: str = "images of a folder"

    @property
    def root(self) -> str:
        return self.manifest.root

    @property
    def count(self) -> int:
        return len(self.manifest.items)

    def to_csv(self) -> bytes:
        return self.manifest.to_csv()

    def inputs(self) -> Iterator[NDArray[np.float32]]:
        """Each network input, checked against its digests. Raises CalibrationInvalid at the first that differs."""
        rows = zip(self.manifest.items, self.manifest.sha256, self.manifest.source_sha256, self.paths, strict=True)
        for item, expected, source, path in rows:
            try:
                pixels, _ = load(path, self.colour)
            except SpineboxError as error:
                raise CalibrationInvalid(f"a calibration image cannot be read: {error.what}", value=item) from error
            x = _prepared(item, pixels, self.prepare)
            if (digest(x), source_digest(pixels)) != (expected, source):
                raise CalibrationInvalid("a calibration image is not the one that the manifest was made with", value=item)
            yield x


def make(
    chosen: Sequence[tuple[Image, str]],
    prepare: Prepare,
    *,
    model: str,
    input_hw: tuple[int, int],
    preprocess: str = PREPROCESS_VERSION,
    seed: int = SEED,
    colour: bool = False,
    keep_names: bool = False,
    progress: Progress | None = None,
) -> FolderCalibration:
    """Hash what `prepare` makes of each chosen image. `preprocess` names the preparation: a changed one is another set.

    `keep_names` writes file names and patient hashes into the manifest, for a manifest that stays on its site. Raises
    CalibrationInvalid.
    """
    if not chosen:
        raise CalibrationInvalid("a calibration set needs at least one image")
    hashes = []
    for done, (image, _) in enumerate(chosen, 1):
        pixels, _ = load(image.path, colour)
        if source_digest(pixels) != image.source_sha256:
            raise CalibrationInvalid("an image changed while the set was made", value=image.name)
        hashes.append(digest(_prepared(image.name, pixels, prepare)))
        if progress:
            progress(done, len(chosen))
    images = [i for i, _ in chosen]
    names = tuple(i.name if keep_names else f"image-{n:04d}-{i.source_sha256[:12]}" for n, i in enumerate(images, 1))
    manifest = CalibrationSet(
        model,
        names,
        tuple(hashes),
        tuple(i.source_sha256 for i in images),
        tuple(stratum for _, stratum in chosen),
        tuple(i.fingerprint.hexadecimal for i in images),
        tuple(i.patient for i in images) if keep_names else (),
        seed=seed,
        preprocess=preprocess,
        input_hw=input_hw,
    )
    return FolderCalibration(manifest, tuple(i.path for i in images), prepare, colour)


def find(manifest: CalibrationSet, folders: Sequence[Path], prepare: Prepare, colour: bool = False) -> FolderCalibration:
    """The files below `folders` that a manifest stands for, by their pixels, whatever they are called now.

    Raises CalibrationInvalid naming the first item that is not there.
    """
    wanted = set(manifest.source_sha256)
    found: dict[str, Path] = {}
    for path in study.find_inputs(folders, MAX_FILES):
        try:
            key = source_digest(load(path, colour)[0])
        except SpineboxError:  # not one of the set, whose images could all be read
            continue
        if key in wanted:
            found.setdefault(key, path)
    for item, key in zip(manifest.items, manifest.source_sha256, strict=True):
        if key not in found:
            raise CalibrationInvalid(
                "an image of the manifest is not in the folder", value=item, remedy="Name the folder that the manifest was made from."
            )
    return FolderCalibration(manifest, tuple(found[k] for k in manifest.source_sha256), prepare, colour)
