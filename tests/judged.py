"""An engine whose confidence a gate really judged, as a manifest holds it; and the same as it was recorded before there were bins."""

from __future__ import annotations

import copy
import json
from typing import Any

import numpy as np

from appliance.compiler import confidence as cf

PATIENTS, EACH = 30, 6
GROUPS = np.repeat(np.arange(PATIENTS), EACH)
N = len(GROUPS)


def heads() -> list[cf.Head]:
    rng = np.random.default_rng(8)
    grades, flag = rng.normal(0, 2, (N, 5)), rng.normal(-1, 2, N)
    grade = (cf.probabilities(grades, 1.0, "softmax").cumsum(1) > rng.random((N, 1))).argmax(1).astype(np.int64)
    yes = (rng.random(N) < cf.probabilities(flag, 1.0, "sigmoid")).astype(np.int64)
    return [cf.Head("pfirrmann", "softmax", grades, grades * 2, grade), cf.Head("bulging", "sigmoid", flag, flag, yes)]


def others() -> cf.Fitting:
    """The same discs as other patients."""
    return cf.Fitting(
        {h.name: (h.fp32 * 1.5, h.truth) for h in heads()}, GROUPS + PATIENTS, "cross-validated networks, recipe base", "ab" * 32
    )


VERDICT = cf.confidence_gate(heads(), GROUPS, samples="discs", fitting=others())
ENGINE: dict[str, Any] = {
    "precision": "int8",
    "passed": True,
    "verdicts": [{"gate": "task", "passed": True, "note": ""}, json.loads(json.dumps(VERDICT.to_json()))],
}
MODEL = {"version": "1", "metrics": {"source": "held-out patients"}, "engines": {"openvino": ENGINE}}


def changed(change: Any) -> dict[str, Any]:
    out = copy.deepcopy(ENGINE)
    change(out["verdicts"][1])
    return out


def older(verdict: dict[str, Any]) -> None:
    """As it was recorded before there were bins."""
    for key in ("samples", "fitted_on"):
        verdict["details"].pop(key)
    for row in verdict["details"]["heads"]:
        del row["bins"], row["kind"]
        for who in ("int8", "fp32"):
            del row[who]["ece_before_low"], row[who]["ece_before_high"]
        del row["rise"], row["best_here"]
