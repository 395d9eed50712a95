"""Does a calibration set know the evaluation? Refuses an image of a patient, or a picture, that is measured on.

Hides the three ways in which two images can be the same: the same patient number (compared as hashes), the same pixels, and
the same picture after it was re-encoded, rescaled, cut or shifted (`calibration.duplicates`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from appliance.errors import CalibrationLeaks, UsageError
from calibration.duplicates import HASH_ALONE, SAME, bits, candidates, distances, likeness
from calibration.folders import Image, Progress, Table, gather
from calibration.sets import MAX_MANIFEST_BYTES, CalibrationSet

MAX_NAMED = 20


@dataclass(frozen=True)
class Leak:
    """Image `ours` of the calibration set is image `theirs` of the evaluation, or of the same patient; `value` measures it."""

    ours: str
    theirs: str
    why: str  # "patient", "pixels" or "near-duplicate"
    value: float

    def __str__(self) -> str:
        how = {"patient": "the same patient", "pixels": "the same pixels"}.get(self.why, f"near-duplicate, {self.value:.2f}")
        return f"{self.ours} is {self.theirs} ({how})"


@dataclass
class Evaluation:
    """The list that is measured on: images of a folder, or a manifest without any picture."""

    images: Sequence[Image] = ()
    manifest: CalibrationSet | None = None
    skipped: list[tuple[str, str]] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path, table: Table | None = None, colour: bool = False, progress: Progress | None = None) -> Evaluation:
        """A folder, or a manifest of `spinebox calibrate` (with patients only if it kept its names). Raises UsageError,
        CalibrationInvalid."""
        if path.is_dir():
            found = gather([path], table, colour, progress)
            return cls(found.images, None, found.skipped)
        try:
            with path.open("rb") as f:
                content = f.read(MAX_MANIFEST_BYTES + 1)
        except OSError as error:
            raise UsageError(
                f"the evaluation list cannot be read: {error.strerror}", value=path, remedy="Name a folder or a manifest."
            ) from error
        return cls((), CalibrationSet.from_csv("", content))

    @property
    def limits(self) -> str:
        """What this list cannot show, in words; "" where it shows everything."""
        if self.manifest is None:
            unknown = sum(not i.patient for i in self.images)
            return f"{unknown} of {len(self.images)} evaluation images do not say whose they are" if unknown else ""
        missing = "" if self.manifest.patients else "patients cannot be compared, because the manifest does not hold them; "
        return f"{missing}cut or shifted pictures cannot be found, because a manifest holds none"


def leaks(images: Sequence[Image], evaluation: Evaluation, progress: Progress | None = None) -> list[Leak]:
    """Every image that leaks, once, by the first reason that holds: patient, pixels, near-duplicate."""
    found: dict[str, Leak] = {}

    def add(leak: Leak) -> None:
        found.setdefault(leak.ours, leak)

    if evaluation.manifest is not None:
        _by_manifest(images, evaluation.manifest, add)
        return list(found.values())
    patients = {i.patient: i.name for i in evaluation.images if i.patient}
    pixels = {i.source_sha256: i.name for i in evaluation.images}
    for image in images:
        if image.patient in patients:
            add(Leak(image.name, patients[image.patient], "patient", 1.0))
        if image.source_sha256 in pixels:
            add(Leak(image.name, pixels[image.source_sha256], "pixels", 1.0))
    rest = [i for i in images if i.name not in found]
    pairs = candidates([i.fingerprint for i in rest], [i.fingerprint for i in evaluation.images])
    for done, (a, b) in enumerate(pairs, 1):
        if rest[a].name not in found:
            value = likeness(rest[a].fingerprint, evaluation.images[b].fingerprint)
            if value >= SAME:
                add(Leak(rest[a].name, evaluation.images[b].name, "near-duplicate", value))
        if progress:
            progress(done, len(pairs))
    return list(found.values())


def _by_manifest(images: Sequence[Image], manifest: CalibrationSet, add: Callable[[Leak], None]) -> None:
    patients = {p: item for p, item in zip(manifest.patients, manifest.items, strict=False) if p}
    pixels = dict(zip(manifest.source_sha256, manifest.items, strict=True))
    wholes = np.array([bits(h) for h in manifest.fingerprints])
    near = distances(np.array([i.fingerprint.hashes for i in images]), wholes) if images else np.zeros((0, 0))
    for image, row in zip(images, near, strict=True):
        if image.patient in patients:
            add(Leak(image.name, patients[image.patient], "patient", 1.0))
        if image.source_sha256 in pixels:
            add(Leak(image.name, pixels[image.source_sha256], "pixels", 1.0))
        best = int(np.argmin(row))
        if row[best] <= HASH_ALONE:
            add(Leak(image.name, manifest.items[best], "near-duplicate", 1.0 - float(row[best]) / 64))


def refuse(found: Sequence[Leak]) -> None:
    """Raises CalibrationLeaks naming both images of each pair."""
    if found:
        first = "; ".join(str(leak) for leak in found[:MAX_NAMED])
        raise CalibrationLeaks(
            f"{len(found)} calibration image{'s are' if len(found) > 1 else ' is'} in the evaluation list: {first}",
            value=f"{found[0].ours} and {found[0].theirs}",
            remedy="Take them out of one of the two, or add --exclude-leaks to leave them out of the calibration set.",
        )
