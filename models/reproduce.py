"""`make train DATA=...`: every training in the order in which one feeds the next, then export and model cards.

Each step resumes where it stopped, and a finished one is skipped, so the whole may be interrupted at any time:

    segmenter, first round (T2-SPACE outlines) -> pseudo-labels on T1 and T2 slices -> detector -> grader
    -> segmenter (outlines, pseudo-labels, phantoms)
    vertebra detector, first round -> second round
                                   -> classifier of radiographs from its trunk -> what is familiar
    -> ONNX files -> cards

The radiographs' part is left out where the folder does not hold them. The vertebra detector that ships had its first round in two
parts and at a smaller input; its card says so.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from models import card, export, familiarity, pseudo, train

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


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m models.reproduce", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds lumbar_mri/ and, if it may be, the radiographs")
    parser.add_argument("--work", type=Path, default=Path.home() / ".cache/spinebox/train", help="checkpoints, logs, pseudo-labels")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 2)
    parser.add_argument("--device", choices=train.DEVICES, default="auto", help="only a CPU ends in the same bytes again")
    args = parser.parse_args(argv)
    labels = args.work / "pseudo"
    radiographs = RADIOGRAPHS if (args.data / "spine_xray_ap").is_dir() and (args.data / "spine_xray_class").is_dir() else ()
    for run, family, steps, start, uses_labels in (*ROUNDS, *radiographs):
        common = ["--data", str(args.data), "--work", str(args.work), "--threads", str(args.threads), "--device", args.device]
        if not (args.work / run / "final.pt").exists():
            more = ["--pseudo", str(labels)] if uses_labels else []
            more += ["--init", str(args.work / start / "final.pt")] if start else []
            failed = train.main([family, "--run", run, "--steps", str(steps), *common, *more])
            if failed:
                return failed
        if run == "segmenter-first" and not (labels / ".done").exists():
            pseudo.main(["--data", str(args.data), "--weights", str(args.work / run / "final.pt"), "--out", str(labels)])
            (labels / ".done").touch()
    families = ("detector", "segmenter", "grader", *(("vertebra_ap", "spine_class") if radiographs else ()))
    for family in families:
        export.main([family, "--weights", str(args.work / family / "final.pt")])
    if radiographs:
        familiarity.main(["--data", str(args.data), "--weights", str(args.work / "spine_class/final.pt")])
    taught = {"detector": "3000", "segmenter": "3500", "grader": "2000", "vertebra_ap": "1050 and 2000", "spine_class": "750"}
    for family in families:
        note = f"{taught[family]} steps, AdamW with cosine decay, averaged weights, seed {train.SEED}."
        card.main([family, "--data", str(args.data), "--log", str(args.work / family / "log.csv"), "--note", note])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
