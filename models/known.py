"""What a network says of patients that it does not know: answers about training patients by networks that had not learnt from them.

Hides where such answers come from and the file that keeps them, `weights/FAMILY-known.npz`. A compile fits temperatures and the
threshold of plausible grades on it, so that held-out patients only judge (`appliance/compiler/confidence.py`). The file is a NumPy
archive without pickles:

    logits    N x K float16, as the family's output
    truth     N x H int8; grader: grade 1 to 5, then 0 or 1 for each flag of `models.grader.FLAGS`; spine_class: index of the class
    patient   N int32, the patient or person of each answer
    source    a sentence's worth of text: how the answers were come by

    python -m models.known grader FILE...                            files with `logits`, `truth` and `patient`, or run folders of
                                                                     `python -m models.crossval`
    python -m models.known spine_class --data DIR --weights PATTERN  final.pt of each fold, {fold} for its number

Nothing on a device imports this module.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from appliance.errors import ModelInvalid, TrainingDataInvalid
from kernels.preprocess import letterbox, normalise
from models import data, evaluate_ap, grader, radiographs, spine_class

WEIGHTS = Path(__file__).with_name("weights")
MAX_BYTES = 4 << 20  # of all arrays of a file
MAX_TEXT = 200
# Of each family: logits, and of each column of the truth the values that it may have.
LAYOUT: dict[str, tuple[int, tuple[range, ...]]] = {
    grader.SPEC.name: (len(grader.SPEC.classes), (range(1, 6), *[range(2)] * len(grader.FLAGS))),
    spine_class.SPEC.name: (len(spine_class.SPEC.classes), (range(len(spine_class.SPEC.classes)),)),
}
REMEDY = "Write it again with `python -m models.known`, or remove it: what is fitted is then fitted on the patients who judge."


@dataclass(frozen=True, eq=False)
class Known:
    """N answers: `logits` N x K float32, `truth` N x H int64, `patient` N int64; `sha256` is the file's, "" where none was read."""

    logits: NDArray[np.float32]
    truth: NDArray[np.int64]
    patient: NDArray[np.int64]
    source: str
    sha256: str = ""


def path_of(family: str, weights: Path = WEIGHTS) -> Path:
    return weights / f"{family}-known.npz"


def read(family: str, weights: Path = WEIGHTS) -> Known | None:
    """The answers that lie beside a family's weights; None where there are none. Raises ModelInvalid for a file that is not such."""
    path = path_of(family, weights)
    if family not in LAYOUT or not path.exists():
        return None
    try:
        blob = path.read_bytes()
        with zipfile.ZipFile(io.BytesIO(blob)) as archive:
            if sum(member.file_size for member in archive.infolist()) > MAX_BYTES:
                raise ValueError(f"more than {MAX_BYTES >> 20} MiB")
        with np.load(io.BytesIO(blob), allow_pickle=False) as found:
            out = Known(
                found["logits"].astype(np.float32),
                found["truth"].astype(np.int64),
                found["patient"].astype(np.int64),
                str(found["source"]),
                hashlib.sha256(blob).hexdigest(),
            )
        check(family, out)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ModelInvalid(f"the known answers of {family} cannot be used: {error}", value=path, remedy=REMEDY) from error
    return out


def write(family: str, found: Known, path: Path) -> str:
    """The same answers give the same bytes; their SHA-256 comes back. ValueError for what `read` would refuse."""
    with np.errstate(over="ignore"):  # what half precision cannot hold becomes infinite, and is refused
        half = found.logits.astype(np.float16)
    check(family, Known(half.astype(np.float32), found.truth, found.patient, found.source))
    part = path.with_suffix(".part")
    with part.open("wb") as f:
        np.savez_compressed(
            f, logits=half, truth=found.truth.astype(np.int8), patient=found.patient.astype(np.int32), source=np.array(found.source)
        )
    part.replace(path)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def check(family: str, found: Known) -> None:
    """Raises ValueError for other shapes, a logit that is no number, a truth that the family has not, or one that nobody has."""
    width, columns = LAYOUT[family]
    n = len(found.patient)
    shapes = {"logits": (found.logits.shape, (n, width)), "truth": (found.truth.shape, (n, len(columns)))}
    for name, (shape, wanted) in shapes.items():
        if shape != wanted:
            raise ValueError(f"{name} is {shape}, not {wanted}")
    if not np.isfinite(found.logits).all():
        raise ValueError("a logit is no number")
    for k, values in enumerate(columns):
        there = set(found.truth[:, k].tolist())
        if not there <= set(values):
            raise ValueError(f"truth has {min(there - set(values))} in column {k}")
        # With one answer alone the best temperature is the smallest there is.
        if len(there) < 2:
            raise ValueError(f"truth has one value alone in column {k}")
    if not 0 < len(found.source) <= MAX_TEXT or not found.source.isprintable():
        raise ValueError("its source is not told in one line")


# -- where they come from -------------------------------------------------------------------------------------------


def of_folds(files: Sequence[Path], names: Sequence[str]) -> tuple[dict[str, NDArray[Any]], list[str]]:
    """(`patient` and the arrays `names` of cross-validated graders, fold after fold; their recipes). `files` are runs of
    `python -m models.crossval` or files with such arrays.

    Raises TrainingDataInvalid for a file that lacks one, and for a patient who is not of the training side, or in two files: then a
    network had learnt from one whom another left out, or is asked twice.
    """
    parts: list[dict[str, NDArray[Any]]] = []
    recipes: list[str] = []
    seen = set[int]()
    for file in files:
        path = file / "logits.npz" if file.is_dir() else file
        try:
            with np.load(path, allow_pickle=False) as found:
                parts.append({k: np.asarray(found[k]) for k in ("patient", *names)})
                recipes += np.atleast_1d(found["variant"]).tolist() if "variant" in found else [path.stem]
        except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise TrainingDataInvalid(f"the answers cannot be read: {error}", value=path) from error
        patients = set(parts[-1]["patient"].tolist())
        if strangers := patients - data.split()["train"]:
            raise TrainingDataInvalid("a patient is not of the training side, and may tune nothing", value=f"{path}: {min(strangers)}")
        if twice := patients & seen:
            raise TrainingDataInvalid("a patient is in two files", value=f"{path}: {min(twice)}")
        seen |= patients
    return {k: np.concatenate([p[k] for p in parts]) for k in ("patient", *names)}, sorted(set(recipes))


def graded(files: Sequence[Path]) -> Known:
    """Of the grader: answers of each fold, sorted by patient. Raises as `of_folds`."""
    found, recipes = of_folds(files, ("logits", "truth"))
    order = np.argsort(found["patient"], kind="stable")
    source = f"cross-validated networks, recipe {' and '.join(recipes)}"
    return Known(
        found["logits"][order].astype(np.float32), found["truth"][order].astype(np.int64), found["patient"][order].astype(np.int64), source
    )


def classed(root: Path, weights: str) -> Known:
    """Of the radiograph classifier: each training picture as the network of its fold answers it, read as a device reads it.
    `weights` is a path with {fold} in it."""
    pictures = radiographs.classed(root, "train")
    runs = [evaluate_ap.runner_of(spine_class.SPEC.name, Path(weights.format(fold=k))) for k in range(radiographs.FOLDS)]
    logits = [
        runs[k]({"image": letterbox(normalise(p.pixels.astype(np.float32)), spine_class.SPEC.input_hw)[0]})["logits"]
        for p, k in zip(pictures, radiographs.folds(pictures), strict=True)
    ]
    truth = np.array([[p.kind] for p in pictures], np.int64)
    name = Path(weights).parent.name.format(fold="").rstrip(".-") or "the classifier"
    source = f"cross-validated networks, recipe {name}"
    return Known(np.concatenate(logits), truth, np.array([p.group for p in pictures], np.int64), source)


def main(argv: list[str] | None = None) -> int:
    """Raises TrainingDataInvalid; ValueError for answers that are none of the family's."""
    parser = argparse.ArgumentParser(prog="python -m models.known", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    families = parser.add_subparsers(dest="family", required=True)
    one = families.add_parser(grader.SPEC.name)
    one.add_argument("files", nargs="+", type=Path, help="files with logits, truth and patient, or runs of `python -m models.crossval`")
    two = families.add_parser(spine_class.SPEC.name)
    two.add_argument("--data", type=Path, required=True, help="folder that holds spine_xray_class/")
    two.add_argument("--weights", required=True, help="final.pt of each fold, with {fold} for its number")
    for family in (one, two):
        family.add_argument("--out", type=Path, help="file to write; the one beside the shipped weights if not given")
    args = parser.parse_args(argv)
    if args.family == spine_class.SPEC.name and "{fold}" not in args.weights:
        parser.error("--weights needs {fold} in it")
    found = graded(args.files) if args.family == grader.SPEC.name else classed(args.data, args.weights)
    out = args.out or path_of(args.family)
    digest = write(args.family, found, out)
    print(f"{out}: {len(found.patient)} answers, {len(np.unique(found.patient))} patients, sha256 {digest}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
