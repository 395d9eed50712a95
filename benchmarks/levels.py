"""How often a disc's name is right: `python -m benchmarks.levels --data DIR`, the shipped bundle as a device would run it.

Held-out mid-sagittal slices on which every graded disc has a drawn box: there the lowest box is L5/S1 and the others follow upwards.
A finding is compared with the drawn box that it overlaps most; a name is right, wrong or not given. Whether the sacrum is in view is
nobody's label, so abstaining is counted and not judged. Intervals resample whole patients.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from appliance.bundle import open_bundle
from appliance.engine import Engine
from appliance.errors import SpineboxError
from appliance.study import read
from kernels.nms import iou_matrix
from models import data
from models.evaluate import Scores
from models.levels import DISC_LEVELS

LEAST_OVERLAP = 0.2  # drawn boxes are looser than found ones


def discs(engine: Engine, root: Path, name: str) -> list[str]:
    """What became of each drawn disc of one slice: right, wrong, not named, not found or refused."""
    drawn = data.disc_boxes(root)[name][::-1]  # the lowest first
    try:
        report = engine.run(read((root / "lumbar_mri/midsagittal" / name).read_bytes()))
    except SpineboxError:
        return ["refused"] * len(drawn)
    found = [f for f in report.findings if f.label == "disc"]
    if not found:
        return ["not found"] * len(drawn)
    overlaps = iou_matrix(np.array(drawn, np.float32), np.array([f.box_px for f in found], np.float32))
    out = []
    for number, row in enumerate(overlaps):
        best = found[int(row.argmax())]
        if row.max() < LEAST_OVERLAP:
            out.append("not found")
        elif best.level is None:
            out.append("not named")
        else:
            out.append("right" if number < len(DISC_LEVELS) and best.level == DISC_LEVELS[number] else "wrong")
    return out


def measure(root: Path, backend: str) -> dict[str, Any]:
    """Counts, and the share of right names among those given with its 95 % interval."""
    graded = data.gradings(root)
    names = [
        name
        for name, boxes in sorted(data.disc_boxes(root).items())
        if int(name.split("_")[0]) in data.split()["test"] and len(boxes) == len(graded.get(int(name.split("_")[0]), {}))
    ]
    became: list[str] = []
    patients: list[int] = []
    with Engine(open_bundle(), backend) as engine:
        for name in names:
            own = discs(engine, root, name)
            became += own
            patients += [int(name.split("_")[0])] * len(own)
    kinds = np.array(became)
    given = np.isin(kinds, ("right", "wrong"))
    right = kinds == "right"

    def share(index: Any) -> float:
        return float(right[index][given[index]].mean()) if given[index].any() else float("nan")

    scores = Scores("right_of_named")
    scores.add("right_of_named", patients, share)
    metric = scores.metrics[0]
    return {
        "slices": len(names),
        "patients": len(set(patients)),
        "discs": len(kinds),
        "counts": {k: int((kinds == k).sum()) for k in ("right", "wrong", "not named", "not found", "refused")},
        "right_of_named": metric.value,
        "low": metric.low,
        "high": metric.high,
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.levels", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds lumbar_mri/")
    parser.add_argument("--backend", default="auto", help="runtime for every model")
    parser.add_argument("--json", action="store_true", help="print JSON for machines")
    args = parser.parse_args(argv)
    found = measure(args.data, args.backend)
    if args.json:
        print(json.dumps(found))
        return 0
    print(f"{found['discs']} discs on {found['slices']} slices of {found['patients']} held-out patients: {found['counts']}")
    print(f"right where named: {found['right_of_named']:.3f} [{found['low']:.3f}, {found['high']:.3f}]")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
