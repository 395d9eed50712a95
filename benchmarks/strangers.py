"""Pictures that no protocol knows, made and found, and how well the gate of the radiograph protocol tells them from spines.

Made: noise, shading, text, diagrams, drawings of a chest, a knee and a hand as a radiograph would show them, lumbar MRI phantoms.
Found: photographs that scikit-image and matplotlib carry, DICOM files that pydicom carries, and lumbar MRI of held-out patients.
Chests, knees and hands of real patients are in none of them: `--found DIR` measures a folder of pictures that are at hand, one
subfolder for each kind.

`python -m benchmarks.strangers --data DIR` prints, for each kind, the area under the ROC curve of the distance with its interval, and
the share that the whole protocol refuses, with the weights that ship; a bundle's int8.onnx can be asked instead.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from appliance import study
from appliance.errors import SpineboxError, SpineNotFound
from appliance.protocols import spine_xray_ap
from models import data, evaluate_ap, familiarity, phantom, radiographs
from models.evaluate import Runner, auroc
from models.export import WEIGHTS

SEED = 5_000_000
EACH = 24
LEAST_SIDE = 48
RESAMPLES = 300
Picture = NDArray[np.uint8]


def _unit(image: NDArray[Any]) -> Picture:
    low, high = float(image.min()), float(image.max())
    return np.asarray(np.rint((image - low) / max(high - low, 1e-9) * 255), np.uint8)


def _noise(rng: np.random.Generator) -> Picture:
    sigma = float(rng.choice([0.0, 1.0, 4.0]))
    image = rng.normal(0, 1, (512, int(rng.integers(200, 520))))
    return _unit(cv2.GaussianBlur(image, (0, 0), sigma) if sigma else image)


def _shading(rng: np.random.Generator) -> Picture:
    return _unit(data.smooth_field(rng, 400, int(rng.integers(2, 9)), 1.0))


def _text(rng: np.random.Generator) -> Picture:
    image = np.full((700, 500), int(rng.integers(0, 2)) * 255, np.uint8)
    words = ["the", "patient", "was", "seen", "on", "ward", "and", "sent", "home", "with", "a", "letter", "copy", "file", "of", "which"]
    for line in range(int(rng.integers(8, 28))):
        chosen = " ".join(rng.choice(words, 6))
        cv2.putText(image, chosen, (20, 30 + 24 * line), cv2.FONT_HERSHEY_SIMPLEX, 0.5, int(255 - image[0, 0]), 1, cv2.LINE_AA)
    return image


def _diagram(rng: np.random.Generator) -> Picture:
    image = np.zeros((480, 480), np.uint8)
    for _ in range(int(rng.integers(4, 14))):
        a, b = (tuple(int(v) for v in rng.integers(0, 480, 2)) for _ in range(2))
        value = int(rng.integers(90, 256))
        if rng.random() < 0.5:
            cv2.rectangle(image, a, b, value, int(rng.integers(-1, 4)) or 1)
        else:
            cv2.circle(image, a, int(rng.integers(10, 120)), value, int(rng.integers(1, 5)))
    return image


def _exposed(rng: np.random.Generator, image: NDArray[np.float32]) -> Picture:
    image = cv2.GaussianBlur(image, (0, 0), 1.5) + 0.03 * rng.standard_normal(image.shape).astype(np.float32)
    return _unit(image - 0.3 * cv2.GaussianBlur(image, (0, 0), 60))


def _chest(rng: np.random.Generator) -> Picture:
    """Wide, with lungs, heart and ribs; the spine is one pale band."""
    image = np.full((520, 560), 0.6, np.float32)
    for side in (-1, 1):
        cv2.ellipse(image, (280 + side * 125, 250), (int(rng.integers(85, 105)), 180), side * 4, 0, 360, 0.2, -1)
        for i in range(9):
            cv2.ellipse(image, (280 + side * 110, 90 + 38 * i), (120, 46), side * 12, 0, 360, 0.32, 5)
    cv2.ellipse(image, (320, 330), (int(rng.integers(80, 110)), 90), 20, 0, 360, 0.75, -1)
    image[:, 262:298] += 0.08
    return _exposed(rng, image)


def _knee(rng: np.random.Generator) -> Picture:
    image = np.full((620, 420), 0.15, np.float32)
    cv2.rectangle(image, (90, 0), (330, 620), 0.35, -1)
    cv2.rectangle(image, (160, 0), (260, 230), 0.75, -1)
    cv2.ellipse(image, (210, 260), (int(rng.integers(85, 100)), 70), 0, 0, 360, 0.8, -1)
    cv2.ellipse(image, (210, 390), (int(rng.integers(85, 100)), 55), 0, 0, 360, 0.8, -1)
    cv2.rectangle(image, (165, 400), (255, 620), 0.72, -1)
    cv2.rectangle(image, (290, 430), (315, 620), 0.6, -1)
    return _exposed(rng, image)


def _hand(rng: np.random.Generator) -> Picture:
    image = np.full((600, 460), 0.1, np.float32)
    for finger in range(5):
        angle = np.deg2rad(-30 + 15 * finger + rng.normal(0, 3))
        for part, (start, long) in enumerate(((0, 120), (130, 90), (230, 60), (300, 45))):
            a = np.array([230 + np.sin(angle) * (60 + start), 480 - np.cos(angle) * (60 + start)])
            b = a + long * np.array([np.sin(angle), -np.cos(angle)])
            cv2.line(image, tuple(int(v) for v in a), tuple(int(v) for v in b), 0.8, 26 - 4 * part)
    cv2.ellipse(image, (230, 500), (80, 55), 0, 0, 360, 0.65, -1)
    return _exposed(rng, image)


def _mri_phantom(rng: np.random.Generator) -> Picture:
    return _unit(phantom.draw(rng)[0])


MADE: dict[str, Callable[[np.random.Generator], Picture]] = {
    "noise": _noise,
    "shading": _shading,
    "text": _text,
    "diagram": _diagram,
    "drawn chest": _chest,
    "drawn knee": _knee,
    "drawn hand": _hand,
    "MRI phantom": _mri_phantom,
}


def made(kind: str, count: int = EACH) -> list[Picture]:
    """The same pictures each time."""
    return [MADE[kind](np.random.default_rng([SEED, sorted(MADE).index(kind), i])) for i in range(count)]


def _folder(package: str, *parts: str) -> Path | None:
    spec = importlib.util.find_spec(package)
    where = list(spec.submodule_search_locations or ()) if spec else []
    folder = Path(where[0]).joinpath(*parts) if where else None
    return folder if folder is not None and folder.is_dir() else None


def given(folder: Path) -> dict[str, list[Picture]]:
    """Pictures and DICOM files of the subfolders, each a kind; colour is made grey, what cannot be read is left out."""
    out: dict[str, list[Picture]] = {}
    for path in sorted(p for p in folder.glob("*/*") if p.is_file()):
        try:
            pixels: NDArray[Any] = study.read_path(path).pixels
        except SpineboxError:
            image = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)
            if image is None:
                continue
            pixels = image
        out.setdefault(path.parent.name, []).append(_unit(pixels))
    return out


def found(root: Path | None) -> dict[str, list[Picture]]:
    """What packages and the data folder hold; a kind of which nothing is there is left out."""
    photographs: list[Picture] = []
    for folder in (_folder("skimage", "data"), _folder("matplotlib", "mpl-data", "sample_data")):
        for path in sorted(p for p in folder.rglob("*") if p.suffix in (".png", ".jpg", ".jpeg", ".tif", ".tiff")) if folder else []:
            image = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)
            if image is not None and min(image.shape) >= LEAST_SIDE:
                photographs.append(np.asarray(image, np.uint8))
    objects: dict[bytes, Picture] = {}  # many files hold one picture in different encodings
    dicom = _folder("pydicom", "data", "test_files")
    for path in sorted(dicom.rglob("*.dcm")) if dicom else []:
        try:
            pixels = study.read_path(path).pixels
        except SpineboxError:
            continue
        if min(pixels.shape) >= LEAST_SIDE:
            objects.setdefault(_unit(pixels).tobytes(), _unit(pixels))
    slices: list[Picture] = []
    if root is not None:
        test = data.split()["test"]
        slices = [data.read_grey(p) for p in sorted((root / "lumbar_mri/midsagittal").glob("*.png")) if data.patient_of(p) in test]
    return {k: v for k, v in (("photographs", photographs), ("DICOM test files", list(objects.values())), ("lumbar MRI", slices)) if v}


def refused(detector: Runner, picture: Picture, distance: float) -> bool:
    """Whether the protocol, gate and column together, answers nothing; a header is not at hand."""
    if distance > familiarity.read().limit:
        return True
    boxes, scores = evaluate_ap.detect(detector, picture, evaluate_ap.COLUMN_SCORE)
    try:
        spine_xray_ap.column_line(*spine_xray_ap.column(boxes, scores), None, stated=False)
    except SpineNotFound:
        return True
    return False


def separation(usual: NDArray[np.float64], kinds: Sequence[NDArray[np.float64]]) -> dict[str, float]:
    """AUROC of the distance, with its interval over resampled pictures. Of several kinds it is the mean of theirs, which is that of
    a mixture where each kind weighs the same: seventy slices would else speak for all."""
    rng = np.random.default_rng(SEED)

    def area(usual: NDArray[np.float64], kinds: Sequence[NDArray[np.float64]]) -> float:
        return float(np.mean([auroc(np.concatenate([usual, k]), np.repeat([False, True], [len(usual), len(k)])) for k in kinds]))

    drawn = [area(rng.choice(usual, len(usual)), [rng.choice(k, len(k)) for k in kinds]) for _ in range(RESAMPLES)]
    low, high = np.percentile(drawn, [2.5, 97.5])
    return {"auroc": area(usual, kinds), "low": float(low), "high": float(high), "pictures": sum(len(k) for k in kinds)}


def report(root: Path, classifier: Runner, detector: Runner, folder: Path | None = None) -> dict[str, Any]:
    """What `main` prints. `folder`: more strangers (`given`)."""
    known = familiarity.read()

    def distances(pictures: Sequence[Picture]) -> NDArray[np.float64]:
        return known.distance(evaluate_ap.pooled(classifier, pictures))

    def refusals(pictures: Sequence[Picture], far: NDArray[np.float64]) -> dict[str, float]:
        share = float(np.mean([refused(detector, p, d) for p, d in zip(pictures, far, strict=True)]))
        return {"beyond_limit": float((far > known.limit).mean()), "refused": share}

    spines: dict[str, list[Picture]] = {
        "spine radiographs with boxes, test": [p.pixels for p in radiographs.boxed(root, "test")],
        "spine radiographs with class, test": [p.pixels for p in radiographs.classed(root, "test")],
    }
    usual = {k: distances(v) for k, v in spines.items()}
    together = np.concatenate(list(usual.values()))
    out: dict[str, Any] = {"limit": known.limit}
    out |= {name: {**refusals(pictures, usual[name]), "pictures": len(pictures)} for name, pictures in spines.items()}
    everyone = []
    for name, pictures in ({k: made(k) for k in MADE} | found(root) | (given(folder) if folder else {})).items():
        everyone.append(distances(pictures))
        out[name] = {**separation(together, everyone[-1:]), **refusals(pictures, everyone[-1])}
    out["all kinds alike"] = separation(together, everyone)
    return out


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.strangers", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds spine_xray_ap/, spine_xray_class/, lumbar_mri/")
    parser.add_argument("--classifier", type=Path, default=WEIGHTS / "spine_class.onnx", help="spine_class: a final.pt or an ONNX file")
    parser.add_argument("--detector", type=Path, default=WEIGHTS / "vertebra_ap.onnx", help="vertebra_ap: a final.pt or an ONNX file")
    parser.add_argument("--found", type=Path, help="folder of more pictures that show no spine, a subfolder for each kind")
    args = parser.parse_args(argv)
    classifier, detector = (evaluate_ap.runner_of(f, w) for f, w in (("spine_class", args.classifier), ("vertebra_ap", args.detector)))
    print(json.dumps(report(args.data, classifier, detector, args.found), indent=2))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
