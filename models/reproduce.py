"""`make train DATA=...`: every training in the order in which one feeds the next, then export and model cards.

Each step resumes where it stopped, and a finished one is skipped, so the whole may be interrupted at any time:

    segmenter, first round (T2-SPACE outlines) -> pseudo-labels on T1 and T2 slices -> detector -> grader
    -> segmenter (outlines, pseudo-labels, phantoms)
    vertebra detector, first round -> second round
                                   -> classifier of radiographs from its trunk -> what is familiar
    -> ONNX files
    graders and classifiers that each leave a fold of persons out -> what grades are fused by, what temperatures are fitted on
    -> cards

The radiographs' part is left out where the folder does not hold them. The vertebra detector that ships had its first round in two
parts and at a smaller input; its card says so.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from models import card, crossval, export, familiarity, fusion, known, pseudo, radiographs, train

ROUNDS: tuple[tuple[str, str, int, str | None, bool], ...] = (
    # run, family, steps, starts from, uses pseudo-labels
    ("segmenter-first", "segmenter", 700, None, False),
    ("detector", "detector", 3000, None, True),
    ("grader", "grader", 2000, None, True),
    ("segmenter", "segmenter", 3500, None, True),
)
RADIOGRAPHS: tuple[tuple[str, str, int, str | None, bool], ...] = (
    ("vertebra_ap-first", "vertebra_ap", 1050, None, False),
    ("vertebra_ap", "vertebra_ap", 2000, "vertebra_ap-first", False),
    ("spine_class", "spine_class", 750, "vertebra_ap-first", False),
)

TEACHING = "mixed"  # of the classifier that ships


def fuse(args: argparse.Namespace, common: list[str], labels: Path) -> None:
    """Folds of the grader -> the forest beside it and the answers that its temperatures are fitted on."""
    work = args.work / "crossval"
    runs = [crossval.folder(work, "base", str(k)) for k in range(crossval.FOLDS)]
    for k, run in enumerate(runs):
        if not (run / "logits.npz").exists():
            crossval.main([*common, "--work", str(work), "--pseudo", str(labels), "--fold", str(k)])
    answers = work / "fused.npz"
    data = ["--data", str(args.data), "--pseudo", str(labels), "--logits", *map(str, runs)]
    fusion.main([*data, "--seeds", "1", "--out", str(fusion.FILE), "--answers", str(answers)])
    known.main(["grader", str(answers)])


def leave_out(args: argparse.Namespace, common: list[str], start: Path) -> int:
    """Folds of the radiograph classifier -> the answers that its temperature is fitted on."""
    for k in range(radiographs.FOLDS):
        run = f"spine_class.{TEACHING}.{k}"
        if not (args.work / run / "final.pt").exists():
            failed = train.main([run, *common, "--work", str(args.work), "--run", run, "--init", str(start)])
            if failed:
                return failed
    known.main(["spine_class", "--data", str(args.data), "--weights", str(args.work / f"spine_class.{TEACHING}.{{fold}}" / "final.pt")])
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m models.reproduce", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds lumbar_mri/ and, if it may be, the radiographs")
    parser.add_argument("--work", type=Path, default=Path.home() / ".cache/spinebox/train", help="checkpoints, logs, pseudo-labels")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 2)
    parser.add_argument("--device", choices=train.DEVICES, default="auto", help="only a CPU ends in the same bytes again")
    args = parser.parse_args(argv)
    labels = args.work / "pseudo"
    frontal = RADIOGRAPHS if (args.data / "spine_xray_ap").is_dir() and (args.data / "spine_xray_class").is_dir() else ()
    common = ["--data", str(args.data), "--threads", str(args.threads), "--device", args.device]
    for run, family, steps, start, uses_labels in (*ROUNDS, *frontal):
        if not (args.work / run / "final.pt").exists():
            more = ["--pseudo", str(labels)] if uses_labels else []
            more += ["--init", str(args.work / start / "final.pt")] if start else []
            failed = train.main([family, "--run", run, "--steps", str(steps), "--work", str(args.work), *common, *more])
            if failed:
                return failed
        if run == "segmenter-first" and not (labels / ".done").exists():
            pseudo.main(["--data", str(args.data), "--weights", str(args.work / run / "final.pt"), "--out", str(labels)])
            (labels / ".done").touch()
    families = ("detector", "segmenter", "grader", *(("vertebra_ap", "spine_class") if frontal else ()))
    for family in families:
        export.main([family, "--weights", str(args.work / family / "final.pt")])
    fuse(args, common, labels)
    if frontal:
        familiarity.main(["--data", str(args.data), "--weights", str(args.work / "spine_class/final.pt")])
        if failed := leave_out(args, common, args.work / "vertebra_ap-first/final.pt"):
            return failed
    taught = {"detector": "3000", "segmenter": "3500", "grader": "2000", "vertebra_ap": "1050 and 2000", "spine_class": "750"}
    for family in families:
        note = f"{taught[family]} steps, AdamW with cosine decay, averaged weights, seed {train.SEED}."
        card.main([family, "--data", str(args.data), "--log", str(args.work / family / "log.csv"), "--note", note])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
