"""Where a grader goes wrong: `python -m models.review --data DIR --out DIR` writes two files for a person to look at.

`confusion.md` holds the confusion matrix of the grades at each level, `worst.png` the discs that were misjudged most, each with its
patient, level, grade and answer. The picture shows patients: it is looked at and not handed on. Held-out patients by default;
with --validation the part of the training patients that choices may use.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from kernels.preprocess import normalise
from models import card, data, evaluate, fusion, grader
from models.export import WEIGHTS
from models.levels import DISC_LEVELS

WORST = 10
COLUMNS = 5
SIDE = 260  # pixels of one picture
WIDTHS = 2.4  # of the disc, so that a person sees the neighbours too


def surprise(grade: grader.Grade, truth: int) -> float:
    """How much a disc was misjudged: expected distance in grades between answer and truth, from the five probabilities."""
    return float(np.dot(grade.probabilities, np.abs(np.arange(1, 6) - truth)))


def confusion_table(counts: NDArray[np.int64]) -> str:
    """Levels x 5 x 5 counts -> Markdown, one row for each level and true grade that occurs, and the sum over levels last."""
    lines = ["| level | true grade | answered 1 | 2 | 3 | 4 | 5 | discs | exact |", "|---|---|---|---|---|---|---|---|---|"]
    named = [*zip(DISC_LEVELS, counts, strict=False), ("all", counts.sum(0))]
    for level, matrix in named:
        for truth, row in enumerate(matrix):
            if row.sum():
                lines.append(f"| {level} | {truth + 1} | {' | '.join(str(n) for n in row)} | {row.sum()} | {row[truth] / row.sum():.2f} |")
    return "\n".join(lines) + "\n"


def worst_picture(grades: Sequence[grader.Grade], samples: Sequence[evaluate.Crop], count: int = WORST) -> NDArray[np.uint8]:
    """The `count` most surprising discs, worst first, side by side; grey, SIDE pixels a disc and a line of text over each."""
    order = np.argsort([-surprise(g, c.grading.pfirrmann) for g, c in zip(grades, samples, strict=True)], kind="stable")[:count]
    tiles = [_tile(grades[i], samples[i]) for i in order]
    tiles += [np.zeros_like(tiles[0])] * (-len(tiles) % COLUMNS)
    return np.vstack([np.hstack(tiles[k : k + COLUMNS]) for k in range(0, len(tiles), COLUMNS)])


def _tile(grade: grader.Grade, sample: evaluate.Crop) -> NDArray[np.uint8]:
    matrix = grader.crop_matrix(sample.box, SIDE, WIDTHS)
    image = cv2.warpAffine(normalise(sample.pixels), matrix, (SIDE, SIDE), borderMode=cv2.BORDER_CONSTANT, borderValue=-1.0)
    grey = np.clip((image + 1) * 127.5, 0, 255).astype(np.uint8)
    corners = matrix @ np.array([[sample.box[0], sample.box[2]], [sample.box[1], sample.box[3]], [1, 1]])
    (x0, x1), (y0, y1) = np.round(corners).astype(int)
    cv2.rectangle(grey, (int(x0), int(y0)), (int(x1), int(y1)), 255, 1)
    head = np.zeros((34, SIDE), np.uint8)
    level = DISC_LEVELS[sample.number - 1] if 0 < sample.number <= len(DISC_LEVELS) else ""
    shares = " ".join(f"{p:.2f}" for p in grade.probabilities)
    for y, text in ((13, f"{sample.patient} {level}  true {sample.grading.pfirrmann}, answer {grade.grade}"), (29, shares)):
        cv2.putText(head, text, (3, y), cv2.FONT_HERSHEY_SIMPLEX, 0.42, 255, 1, cv2.LINE_AA)
    return np.vstack([head, grey])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m models.review", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds lumbar_mri/")
    parser.add_argument("--out", type=Path, required=True, help="folder for confusion.md and worst.png")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="folder of the exported networks and of the fusion")
    parser.add_argument("--validation", action="store_true", help="validation patients instead of the held-out ones")
    args = parser.parse_args(argv)
    patients = data.validation_patients() if args.validation else data.split()["test"]
    fused = fusion.beside(args.weights)
    segment = None if fused is None else card.runner("segmenter", args.weights)
    samples = evaluate.crops(args.data, card.runner("detector", args.weights), patients, segment)
    grades = evaluate.grade(card.runner("grader", args.weights), samples, fusion=fused)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "confusion.md").write_text(confusion_table(evaluate.confusion(grades, samples)))
    cv2.imwrite(str(args.out / "worst.png"), worst_picture(grades, samples))
    print(f"{len(samples)} discs of {len({c.patient for c in samples})} patients: {args.out / 'confusion.md'}, {args.out / 'worst.png'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
