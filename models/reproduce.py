"""`make train DATA=...`: every training in the order in which one feeds the next, then export and model cards.

Each step resumes where it stopped, and a finished one is skipped, so the whole may be interrupted at any time:

    segmenter, first round (T2-SPACE outlines) -> pseudo-labels on T1 and T2 slices -> detector -> grader
    -> segmenter, second round (outlines, pseudo-labels, phantoms) -> ONNX files -> cards
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from models import card, export, pseudo, train

ROUNDS: tuple[tuple[str, str, int, str | None, bool], ...] = (
    # run, family, steps, starts from, uses pseudo-labels
    ("segmenter-first", "segmenter", 700, None, False),
    ("detector", "detector", 1100, None, True),
    ("grader", "grader", 450, None, True),
    ("segmenter", "segmenter", 600, "segmenter-first", True),
)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m models.reproduce", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds lumbar_mri/")
    parser.add_argument("--work", type=Path, default=Path.home() / ".cache/spinebox/train", help="checkpoints, logs, pseudo-labels")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 2)
    args = parser.parse_args(argv)
    labels = args.work / "pseudo"
    for run, family, steps, start, uses_labels in ROUNDS:
        common = ["--data", str(args.data), "--work", str(args.work), "--threads", str(args.threads)]
        if not (args.work / run / "final.pt").exists():
            more = ["--pseudo", str(labels)] if uses_labels else []
            more += ["--init", str(args.work / start / "final.pt")] if start else []
            failed = train.main([family, "--run", run, "--steps", str(steps), *common, *more])
            if failed:
                return failed
        if run == "segmenter-first" and not (labels / ".done").exists():
            pseudo.main(["--data", str(args.data), "--weights", str(args.work / run / "final.pt"), "--out", str(labels)])
            (labels / ".done").touch()
    for family in ("detector", "segmenter", "grader"):
        export.main([family, "--weights", str(args.work / family / "final.pt")])
    for family, steps in (("detector", 1100), ("segmenter", 700 + 600), ("grader", 450)):
        note = f"{steps} steps, AdamW with cosine decay, bf16 autocast, averaged weights, seed {train.SEED}."
        card.main([family, "--data", str(args.data), "--log", str(args.work / family / "log.csv"), "--note", note])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
