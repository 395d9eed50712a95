"""CalibrationSet: which images the INT8 ranges come from, as a manifest that anyone can check and nobody can read.

A manifest is a CSV of one line for each image: what it is called, the SHA-256 of its pixels as read and after preprocessing,
its stratum, a hash of its low frequencies. It ships without any image. Of the families' own training data an item is
`midsagittal/NAME.png` or `t2space/NAME.png` under lumbar_mri, with `#x0,y0,x1,y1` for a disc crop, `radiograph:DIGEST`, or
`phantom:SEED` (`phantom:SEED#x0,...`), which anyone can draw again. Folders of other images are the work of `calibration.folders`.
"""

from __future__ import annotations

import csv
import hashlib
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from appliance.errors import CalibrationInvalid, CalibrationLeaks, TrainingDataInvalid
from calibration import merkle
from calibration.duplicates import fingerprint
from calibration.strata import Candidate, choose
from kernels.preprocess import PREPROCESS_VERSION, letterbox, normalise
from models import data, evaluate, grader, phantom, radiographs, spine_class, vertebra_ap
from models.family import Spec

SEED = 20261122
MAX_ITEMS = 10_000
MAX_MANIFEST_BYTES = 8 << 20
_COLUMNS = ("item", "sha256", "source_sha256", "stratum", "fingerprint")
_TITLE = "# spinebox calibration manifest 2"
_HEAD = ("model", "preprocess", "input", "seed", "images", "merkle root")
RADIOGRAPH = "radiograph:"  # and 16 digits of the file's SHA-256
_RADIOGRAPH_SIDES = {vertebra_ap.SPEC.name: "boxes_train", spine_class.SPEC.name: "class_train"}
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Proof:
    """That one image is member `index` of the `count` images behind `root`, without a word on the others."""

    root: str
    sha256: str
    source_sha256: str
    index: int
    count: int
    path: tuple[str, ...]


def leaf(sha256: str, source_sha256: str) -> str:
    """What the tree holds of one image: the digest of both digests, so a changed pixel shows even where preprocessing clips it."""
    return hashlib.sha256(bytes.fromhex(source_sha256) + bytes.fromhex(sha256)).hexdigest()


def verify(proof: Proof) -> bool:
    """Whether the proof holds. Whoever checks must know the root from elsewhere: a bundle's manifest."""
    try:
        member = leaf(proof.sha256, proof.source_sha256)
        return merkle.verify(proof.root, member, proof.index, proof.count, proof.path)
    except (TypeError, ValueError):  # it comes from elsewhere
        return False


@dataclass(frozen=True)
class CalibrationSet:
    """Items with the SHA-256 of their preprocessed pixels (`sha256`) and of their pixels as read, for one input size.

    All tuples run alike; `patients` is empty, or holds hashes of patient numbers in a manifest that stays on its site.
    """

    family: str
    items: tuple[str, ...]
    sha256: tuple[str, ...]
    source_sha256: tuple[str, ...]
    strata: tuple[str, ...]
    fingerprints: tuple[str, ...]
    patients: tuple[str, ...] = ()
    seed: int = SEED
    preprocess: str = PREPROCESS_VERSION
    input_hw: tuple[int, int] = (0, 0)

    def _leaves(self) -> list[str]:
        return sorted(leaf(a, b) for a, b in zip(self.sha256, self.source_sha256, strict=True))

    @property
    def root(self) -> str:
        """Merkle root over the sorted leaves: one changed pixel of one image changes it, the order of the items does not."""
        return merkle.root(self._leaves())

    def prove(self, item: str) -> Proof:
        """Raises CalibrationInvalid for an item that is not in the set."""
        if item not in self.items:
            raise CalibrationInvalid("this item is not in the calibration set", value=item, remedy="Take an item from the manifest.")
        at = self.items.index(item)
        leaves = self._leaves()
        index = leaves.index(leaf(self.sha256[at], self.source_sha256[at]))
        return Proof(self.root, self.sha256[at], self.source_sha256[at], index, len(leaves), tuple(merkle.prove(leaves, index)))

    def to_csv(self) -> bytes:
        head = (self.family, self.preprocess, f"{self.input_hw[0]}x{self.input_hw[1]}", self.seed, len(self.items), self.root)
        text = io.StringIO()
        text.write("\n".join([_TITLE, *(f"# {k}: {v}" for k, v in zip(_HEAD, head, strict=True))]) + "\n")
        writer = csv.writer(text, lineterminator="\n")
        columns = [self.items, self.sha256, self.source_sha256, self.strata, self.fingerprints]
        writer.writerow([*_COLUMNS, *(["patient"] if self.patients else [])])
        writer.writerows(zip(*columns, *([self.patients] if self.patients else []), strict=True))
        return text.getvalue().encode()

    @classmethod
    def from_csv(cls, family: str, content: bytes) -> CalibrationSet:
        """Raises CalibrationInvalid for a file that is no such manifest, is of another model ("" takes any), or was altered."""
        if len(content) > MAX_MANIFEST_BYTES:
            raise CalibrationInvalid(f"a calibration manifest has at most {MAX_MANIFEST_BYTES} bytes", value=len(content))
        try:
            made = cls._parse(content.decode())
        except (ValueError, csv.Error) as error:
            kind = f" of {family}" if family else ""
            raise CalibrationInvalid(f"not a calibration manifest{kind}: {error}", value=content[:60], remedy=_MAKE) from error
        if family and made.family != family:
            raise CalibrationInvalid(f"not a calibration manifest of {family}", value=made.family, remedy=_MAKE)
        return made

    @classmethod
    def _parse(cls, text: str) -> CalibrationSet:
        lines = text.split("\n")  # not splitlines: a name may hold what Unicode calls a line separator
        title, *rest = lines[: len(_HEAD) + 1]
        if title != _TITLE or len(rest) != len(_HEAD):
            raise ValueError("it does not begin like one")
        head = {}
        for key, line in zip(_HEAD, rest, strict=True):
            if not line.startswith(f"# {key}: "):
                raise ValueError(f"it does not state its {key}")
            head[key] = line.removeprefix(f"# {key}: ")
        size = re.fullmatch(r"(\d{1,5})x(\d{1,5})", head["input"])
        if size is None or not re.fullmatch(r"-?\d{1,18}", head["seed"]):
            raise ValueError("its input size or its seed is not a number")
        body = "\n".join(lines[len(_HEAD) + 1 :])
        header, *rows = list(csv.reader(io.StringIO(body), strict=True)) or [[]]
        private = tuple(header) == (*_COLUMNS, "patient")
        if not private and tuple(header) != _COLUMNS:
            raise ValueError("its columns are others")
        if not 1 <= len(rows) <= MAX_ITEMS or str(len(rows)) != head["images"] or any(len(r) != len(header) for r in rows):
            raise ValueError(f"it states {head['images'][:20]} images and has {len(rows)} lines, of at most {MAX_ITEMS}")
        for row in rows:
            if not _SHA256.fullmatch(row[1]) or not _SHA256.fullmatch(row[2]) or not re.fullmatch(r"[0-9a-f]{16}", row[4]):
                raise ValueError(f"{row[0][:40]} lacks a digest")
            if private and row[5] and not _SHA256.fullmatch(row[5]):
                raise ValueError(f"{row[0][:40]} has a patient that is no digest")
        columns = tuple(zip(*rows, strict=True))
        hw = int(size[1]), int(size[2])
        made = cls(
            head["model"], *columns[:5], columns[5] if private else (), seed=int(head["seed"]), preprocess=head["preprocess"], input_hw=hw
        )
        if made.root != head["merkle root"]:
            raise ValueError("its digests do not give the root that it states")
        return made

    def inputs(self, spec: Spec, root: Path | None) -> Iterator[NDArray[np.float32]]:
        """Each preprocessed input, 1 x 1 x H x W, checked against its digest. Raises CalibrationInvalid at the first that differs."""
        for item, expected in zip(self.items, self.sha256, strict=True):
            x = prepare(item, spec, root)
            if digest(x) != expected:
                raise CalibrationInvalid("a calibration image is not the one that the manifest was made with", value=item)
            yield x


_MAKE = "Make one with `spinebox calibrate`."


@dataclass(frozen=True)
class FamilyCalibration:
    """A family's set with the data that it stands for: what the compile pipeline calls a Calibration."""

    manifest: CalibrationSet
    spec: Spec
    data: Path | None

    @property
    def root(self) -> str:
        return self.manifest.root

    @property
    def count(self) -> int:
        return len(self.manifest.items)

    @property
    def source(self) -> str:
        return "phantoms" if self.data is None else "training patients"

    def to_csv(self) -> bytes:
        return self.manifest.to_csv()

    def inputs(self) -> Iterator[NDArray[np.float32]]:
        return self.manifest.inputs(self.spec, self.data)


def for_family(spec: Spec, root: Path | None, count: int, detect: evaluate.Runner | None = None) -> FamilyCalibration:
    """Choose and hash `count` inputs of a family; the grader's are crops around the discs that `detect` finds.

    Raises CalibrationInvalid, also where the grader has no detector or finds no disc.
    """
    if spec.name in (vertebra_ap.SPEC.name, spine_class.SPEC.name):
        if root is None:
            raise CalibrationInvalid("this family is calibrated on radiographs", value=spec.name, remedy="Name their folder with --data.")
        return FamilyCalibration(make(spec, select_radiographs(spec, root, count), root), spec, root)
    crops: dict[str, str] = {}
    if spec.name == grader.SPEC.name:
        if detect is None:
            raise CalibrationInvalid("the grader is calibrated on crops, which a detector finds", value=spec.name)
        crops = crop_items(root, detect, count)
        if not crops:
            raise CalibrationInvalid("no disc was found on the calibration images", value=root or "phantoms")
    return FamilyCalibration(make(spec, select(root, count, crops), root, crops), spec, root)


def digest(x: NDArray[np.float32]) -> str:
    return hashlib.sha256(np.ascontiguousarray(x, dtype="<f4").tobytes()).hexdigest()


def prepare(item: str, spec: Spec, root: Path | None) -> NDArray[np.float32]:
    """The network input that an item stands for, 1 x 1 x H x W float32. Raises CalibrationInvalid for one that stands for nothing."""
    return _prepare(item, spec, root)[0]


def _prepare(item: str, spec: Spec, root: Path | None) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """(the network input, the image as read)."""
    try:
        return _read(item, spec, root)
    except (ValueError, OSError, TrainingDataInvalid) as error:
        raise CalibrationInvalid(f"a calibration item cannot be read: {error}", value=item) from error


def _read(item: str, spec: Spec, root: Path | None) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    name, _, box_text = item.partition("#")
    if name.startswith("phantom:"):
        pixels, _ = phantom.draw(np.random.default_rng(int(name.removeprefix("phantom:"))))
    elif root is not None and name.startswith(RADIOGRAPH):
        path = _radiographs(root).get(name.removeprefix(RADIOGRAPH))
        if path is None:
            raise CalibrationInvalid("no radiograph of the training data has this content", value=item)
        pixels = data.read_grey(path).astype(np.float32)
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
        return grader.crop(x, (x0, y0, x1, y1))[None], pixels
    return letterbox(x, spec.input_hw)[0], pixels


def make(spec: Spec, items: Sequence[str], root: Path | None, labels: Mapping[str, str] | None = None) -> CalibrationSet:
    """Hash every item. Raises CalibrationInvalid for an empty list, an item given twice or a constant image, CalibrationLeaks
    for a patient of the evaluation."""
    if not items:
        raise CalibrationInvalid("a calibration set needs at least one image")
    if len(set(items)) != len(items):
        raise CalibrationInvalid("an item stands twice in the calibration set", value=next(i for i in items if items.count(i) > 1))
    hashes, sources, strata, fingerprints = [], [], [], []
    for item in items:
        _keep_apart(item)
        x, pixels = _prepare(item, spec, root)
        if float(x.max()) - float(x.min()) < 1e-6:
            raise CalibrationInvalid("a constant image measures no range", value=item)
        hashes.append(digest(x))
        sources.append(hashlib.sha256(f"<f4 {pixels.shape}".encode() + np.ascontiguousarray(pixels, dtype="<f4").tobytes()).hexdigest())
        strata.append(" | ".join(_strata(item, root, labels or {})))
        fingerprints.append(fingerprint(pixels).hexadecimal)
    return CalibrationSet(
        spec.name, tuple(items), tuple(hashes), tuple(sources), tuple(strata), tuple(fingerprints), input_hw=spec.input_hw
    )


def _keep_apart(item: str) -> None:
    """Raises CalibrationLeaks for a patient on whom something is measured or tuned, CalibrationInvalid where nobody can tell."""
    if item.startswith("phantom:"):
        return
    if item.startswith(RADIOGRAPH):
        sides = [side for side, members in radiographs.split().items() if item.removeprefix(RADIOGRAPH) in members]
        if not sides or any(side not in _RADIOGRAPH_SIDES.values() for side in sides):
            raise CalibrationLeaks(
                "this radiograph is not one of those that may be learnt from", value=f"{item}: {', '.join(sides) or 'unknown'}"
            )
        return
    patient = item.partition("#")[0].rpartition("/")[2].partition("_")[0]
    if not patient.isdecimal():
        raise CalibrationInvalid("an item of the training data begins with the patient's number", value=item)
    if int(patient) in data.split()["test"]:
        raise CalibrationLeaks("this patient is held out for evaluation", value=item)
    if int(patient) in data.validation_patients():
        raise CalibrationLeaks("this patient is held out for tuning", value=item)


@cache
def _radiographs(root: Path) -> dict[str, Path]:
    """Digest -> file, of both sets."""
    return {radiographs.digest(p): p for p in (*radiographs.boxed_paths(root), *radiographs.classed_paths(root))}


def select_radiographs(spec: Spec, root: Path, count: int) -> list[str]:
    """`count` training pictures of a radiograph family, seeded, persons spread; the classifier's stratified by class."""
    members = radiographs.split()[_RADIOGRAPH_SIDES[spec.name]]
    paths = _radiographs(root)
    pool = []
    for name, group in members.items():
        if name in paths:
            kind = paths[name].parent.name if spec.name == spine_class.SPEC.name else "frontal"
            pool.append(Candidate(f"{RADIOGRAPH}{name}", str(group), (kind,)))
    if not pool:
        raise CalibrationInvalid("the folder holds none of the training radiographs", value=root)
    return [c.key for c in choose(pool, count, SEED)]


def select(root: Path | None, count: int, crops: Mapping[str, str] | Sequence[str] = ()) -> list[str]:
    """`count` items, seeded, in an order of which every prefix is a fair sample; phantoms for `root` None.

    Of the real images those of training patients on whom nothing is tuned, stratified by series (T1, T2, T2-SPACE) and vendor,
    patients spread. Families that look at crops choose among `crops` (items with boxes, to their Pfirrmann grade where it is
    known) instead, stratified by vendor and grade.
    """
    if crops:
        labels = crops if isinstance(crops, Mapping) else dict.fromkeys(crops, "")
        return _choose(list(labels), count, root, labels)
    if root is None:
        return [f"phantom:{SEED + i}" for i in range(count)]
    items = [f"midsagittal/{p.name}" for p in (root / "lumbar_mri").glob("midsagittal/*.png") if _may_calibrate(p)]
    items += [f"t2space/{p.name}" for p in (root / "lumbar_mri").glob("t2space/images/*.png") if _may_calibrate(p)]
    return _choose(items, count, root, {})


def _may_calibrate(path: Path) -> bool:
    return data.patient_of(path) in data.split()["train"] - data.validation_patients()


def _choose(items: Sequence[str], count: int, root: Path | None, labels: Mapping[str, str]) -> list[str]:
    patients = [i.partition("#")[0] if i.startswith("phantom:") else i.rpartition("/")[2].partition("_")[0] for i in items]
    pool = [Candidate(item, patient, _strata(item, root, labels)) for item, patient in zip(items, patients, strict=True)]
    return [c.key for c in choose(pool, count, SEED)]


def _strata(item: str, root: Path | None, labels: Mapping[str, str]) -> tuple[str, ...]:
    """Series, vendor, and the grade of a crop."""
    if item.startswith(RADIOGRAPH):
        series, vendor = "radiograph", "unknown"
    elif item.startswith("phantom:"):
        series, vendor = "phantom", "none"
    else:
        stem = Path(item.partition("#")[0]).stem
        found = re.match(r"\d+_(t1|t2(?!_SPACE)|t2_SPACE)", stem)
        series = {"t1": "T1", "t2": "T2", "t2_SPACE": "T2-SPACE"}.get(found[1] if found else "", "unknown")
        vendor = _vendors(root).get(found[0] if found else "", "unknown") if root else "unknown"
    grade = (labels.get(item) or "ungraded",) if "#" in item else ()
    return series, vendor, *grade


@cache
def _vendors(root: Path) -> dict[str, str]:
    """PATIENT_series -> first word of the manufacturer's name; empty where the table is not there."""
    path = root / "lumbar_mri/scans.csv"
    if not path.exists():
        return {}
    with path.open() as f:
        return {r["new_file_name"]: (r["Manufacturer"].split() or ["unknown"])[0].capitalize() for r in csv.DictReader(f)}


def crop_items(root: Path | None, detect: evaluate.Runner, count: int) -> dict[str, str]:
    """Items for a family that looks at discs, each to its grade, "" where that is not known.

    Boxes are those that the detector finds on T2 images of training patients; the grade is known where there are as many as
    graded discs. Of phantoms, enough for `count` crops, boxes and grades are the drawn ones.
    """
    out: dict[str, str] = {}
    if root is None:
        for item in select(None, max(4, count // 4)):
            _, truth = phantom.draw(np.random.default_rng(int(item.removeprefix("phantom:"))))
            if truth.weighting == "T2":
                out |= {f"{item}#{_text(d.box_px)}": f"Pfirrmann {d.pfirrmann}" for d in truth.discs}
        return out
    for path in sorted((root / "lumbar_mri/midsagittal").glob("*_t2*.png")):
        if _may_calibrate(path):
            boxes = evaluate.find_discs(detect, data.read_grey(path).astype(np.float32))
            graded = data.gradings(root).get(data.patient_of(path), {})
            known = len(boxes) == len(graded) and set(graded) == set(range(1, len(boxes) + 1))
            for label, box in enumerate(boxes, 1):
                out[f"midsagittal/{path.name}#{_text(box)}"] = f"Pfirrmann {graded[label].pfirrmann}" if known else ""
    return out


def _text(box: tuple[float, ...]) -> str:
    return ",".join(f"{v:.1f}" for v in box)
