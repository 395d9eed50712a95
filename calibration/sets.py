"""CalibrationSet: which images the INT8 ranges come from, as a manifest that anyone can check and nobody can read.

A manifest is a CSV of `item,sha256`: where the image comes from, and the SHA-256 of its preprocessed float32 pixels, so it
ships without any image. An item is `midsagittal/NAME.png` or `t2space/NAME.png` under lumbar_mri of the training data, with
`#x0,y0,x1,y1` for a disc crop, or `phantom:SEED` (`phantom:SEED#x0,...`), which anyone can draw again.
"""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from appliance.errors import CalibrationInvalid
from kernels.preprocess import letterbox, normalise
from models import data, grader, phantom
from models.family import Spec

SEED = 20261122
MAX_ITEMS = 10_000


@dataclass(frozen=True)
class CalibrationSet:
    """Items with the SHA-256 of their preprocessed pixels, for one input size."""

    family: str
    items: tuple[str, ...]
    sha256: tuple[str, ...]

    @property
    def root(self) -> str:
        """SHA-256 over the sorted digests: one changed byte of one image changes it."""
        return hashlib.sha256("\n".join(sorted(self.sha256)).encode()).hexdigest()

    def to_csv(self) -> bytes:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["item", "sha256"])
        writer.writerows(zip(self.items, self.sha256, strict=True))
        return text.getvalue().encode()

    @classmethod
    def from_csv(cls, family: str, content: bytes) -> CalibrationSet:
        """Raises CalibrationInvalid for a file that is not such a manifest."""
        rows = list(csv.reader(io.StringIO(content.decode("utf-8", "replace"))))
        if not rows or rows[0] != ["item", "sha256"] or len(rows) < 2 or len(rows) > MAX_ITEMS or any(len(r) != 2 for r in rows):
            raise CalibrationInvalid(f"not a calibration manifest of {family}", value=rows[0] if rows else "empty")
        return cls(family, tuple(r[0] for r in rows[1:]), tuple(r[1] for r in rows[1:]))

    def inputs(self, spec: Spec, root: Path | None) -> Iterator[NDArray[np.float32]]:
        """Each preprocessed input, 1 x 1 x H x W, checked against its digest. Raises CalibrationInvalid at the first that differs."""
        for item, expected in zip(self.items, self.sha256, strict=True):
            x = prepare(item, spec, root)
            if digest(x) != expected:
                raise CalibrationInvalid("a calibration image is not the one that the manifest was made with", value=item)
            yield x


def digest(x: NDArray[np.float32]) -> str:
    return hashlib.sha256(np.ascontiguousarray(x, dtype="<f4").tobytes()).hexdigest()


def prepare(item: str, spec: Spec, root: Path | None) -> NDArray[np.float32]:
    """The network input that an item stands for, 1 x 1 x H x W float32. Raises CalibrationInvalid for one that stands for nothing."""
    try:
        return _prepare(item, spec, root)
    except (ValueError, OSError) as error:
        raise CalibrationInvalid(f"a calibration item cannot be read: {error}", value=item) from error


def _prepare(item: str, spec: Spec, root: Path | None) -> NDArray[np.float32]:
    name, _, box_text = item.partition("#")
    if name.startswith("phantom:"):
        pixels, _ = phantom.draw(np.random.default_rng(int(name.removeprefix("phantom:"))))
    elif root is None:
        raise CalibrationInvalid("this item needs the training images", value=item, remedy="Name their folder with --data.")
    else:
        folder, _, file = name.partition("/")
        if folder not in ("midsagittal", "t2space") or "/" in file or file.startswith("."):
            raise CalibrationInvalid("an item names a file outside the training data", value=item)
        path = root / "lumbar_mri" / (folder if folder == "midsagittal" else "t2space/images") / file
        pixels = data.read_grey(path).astype(np.float32)
    x = normalise(pixels)
    if box_text:
        x0, y0, x1, y1 = (float(v) for v in box_text.split(","))
        return grader.crop(x, (x0, y0, x1, y1))[None]
    return letterbox(x, spec.input_hw)[0]


def make(spec: Spec, items: Sequence[str], root: Path | None) -> CalibrationSet:
    """Hash every item. Raises CalibrationInvalid for a held-out patient, an empty list, or a constant image."""
    if not items:
        raise CalibrationInvalid("a calibration set needs at least one image")
    hashes = []
    for item in items:
        patient = item.partition("#")[0].rpartition("/")[2].partition("_")[0]
        if not item.startswith("phantom:") and not patient.isdecimal():
            raise CalibrationInvalid("an item of the training data begins with the patient's number", value=item)
        if not item.startswith("phantom:") and int(patient) in data.split()["test"]:
            raise CalibrationInvalid("this patient is held out for evaluation", value=item)
        x = prepare(item, spec, root)
        if float(x.max()) - float(x.min()) < 1e-6:
            raise CalibrationInvalid("a constant image measures no range", value=item)
        hashes.append(digest(x))
    return CalibrationSet(spec.name, tuple(items), tuple(hashes))


def select(root: Path | None, count: int, crops: Sequence[str] = ()) -> list[str]:
    """`count` items, seeded: training patients only, half mid-sagittal T1 and T2, half T2-SPACE; phantoms for `root` None.

    Families that look at crops choose among `crops` (items with boxes) instead.
    """
    rng = np.random.default_rng(SEED)
    if crops:
        order = rng.permutation(len(crops))[:count]
        return sorted(crops[int(i)] for i in order)
    if root is None:
        return [f"phantom:{SEED + i}" for i in range(count)]
    out: list[str] = []
    for folder, pattern, share in (
        ("midsagittal", "midsagittal/*.png", count - count // 2),
        ("t2space", "t2space/images/*.png", count // 2),
    ):
        paths = [p for p in sorted((root / "lumbar_mri").glob(pattern)) if data.patient_of(p) in data.split()["train"]]
        out += [f"{folder}/{paths[int(i)].name}" for i in sorted(rng.permutation(len(paths))[:share])]
    return out
