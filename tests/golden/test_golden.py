"""Golden reports: what the shipped bundle says of three phantoms. `make golden` writes them anew; read the diff.

Compared with tolerances, because the instructions of a CPU may round an INT8 sum differently: structures, names and status
exactly, boxes within 3 pixels, scores and probabilities within 0.1.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from appliance import study
from appliance.bundle import open_bundle
from appliance.engine import Engine
from models import phantom

HERE = Path(__file__).parent
CASES: dict[str, dict[str, Any]] = {
    "t2": {"seed": 41, "weighting": "T2"},
    "t1": {"seed": 42, "weighting": "T1"},
    "t2-without-sacrum": {"seed": 43, "weighting": "T2", "sacrum": False},
}
PASSING = ("timing_ms", "bundle", "engine")  # measured or identifying, not part of what was said


def answer(options: dict[str, Any]) -> dict[str, Any]:
    options = dict(options)
    seed = options.pop("seed")
    image, truth = phantom.draw(np.random.default_rng(seed), hw=(512, 512), **options)
    with Engine(open_bundle(), "onnxruntime") as engine:
        report = engine.run(study.read(phantom.write_dicom(image, truth, seed=seed))).to_json()
    for finding in report["findings"]:
        finding["outline_px"] = len(finding["outline_px"])
    # Where a number was taken is drawn, and tested in tests/test_measurements.py.
    for found in (report, *report["findings"]):
        for measurement in found["measurements"]:
            del measurement["lines_px"], measurement["where"]
    return {k: v for k, v in report.items() if k not in PASSING}


@pytest.mark.parametrize("case", sorted(CASES))
def test_report(case: str) -> None:
    path = HERE / f"{case}.json"
    found = answer(CASES[case])
    if os.environ.get("SPINEBOX_GOLDEN") == "write":
        path.write_text(json.dumps(found, indent=1) + "\n")
    golden = json.loads(path.read_text())
    assert [h["target"].split(" Pf")[0] for h in found["heatmaps"]] == [h["target"].split(" Pf")[0] for h in golden["heatmaps"]]
    for key in ("status", "weighting", "naming", "notes", "rung", "shed", "source", "disclaimer", "error"):
        assert found[key] == golden[key], key
    assert len(found["findings"]) == len(golden["findings"])
    for a, b in zip(found["findings"], golden["findings"], strict=True):
        assert (a["label"], a["level"], a["number"]) == (b["label"], b["level"], b["number"])
        assert np.abs(np.array(a["box_px"]) - np.array(b["box_px"])).max() <= 3
        assert abs(a["score"] - b["score"]) <= 0.1
        if b.get("pfirrmann"):
            assert np.abs(np.array(a["pfirrmann"]["probabilities"]) - np.array(b["pfirrmann"]["probabilities"])).max() <= 0.1
        compare(a, b)
    compare(found, golden)


def compare(a: dict[str, Any], b: dict[str, Any]) -> None:
    """Measurements and omissions of one structure or of the column."""
    assert a["omitted"] == b["omitted"]
    for m, n in zip(a["measurements"], b["measurements"], strict=True):
        assert (m["name"], m["unit"]) == (n["name"], n["unit"])
        assert abs(m["value"] - n["value"]) <= 0.1 * abs(n["value"]) + (2 if m["unit"] in ("deg", "%") else 0.5)
