"""The report's JSON is the public contract: what we write validates, and what breaks the contract does not."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from appliance.budget import RUNGS, SHED
from appliance.engine import refused_report
from appliance.errors import SpineNotFound, all_errors
from appliance.report import DISCLAIMER, REPORT_VERSION, Finding, Heatmap, Mask, Measurement, Pfirrmann, Report
from models import grader, levels

SCHEMA = json.loads((Path(__file__).parent.parent / "docs/report.schema.json").read_text())
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)
SOURCE = {
    "rows": 100,
    "columns": 80,
    "spacing_mm": [0.5, 0.25],
    "spacing_kind": "patient",
    "modality": "MR",
    "view": "sagittal",
    "format": "DICOM",
    "transfer_syntax": None,
    "transfer_syntax_uid": None,
    "sha256": "ab" * 32,
    "sop_instance_uid": "1.2.3",
    "series_instance_uid": None,
    "study_instance_uid": None,
    "instance_number": 4,
}


def _disc(level: str | None = "L5/S1", graded: bool = True) -> Finding:
    return Finding(
        "disc",
        0.91234567,
        (10.0, 60.0, 50.0, 72.004),
        1,
        level,
        Pfirrmann(4, (0.01, 0.04, 0.2, 0.7, 0.05)) if graded else None,
        {"herniation": 0.1, "narrowing": 0.8, "bulging": 0.5} if graded else {},
        (Measurement("disc_height", 7.12345, "mm"), Measurement("disc_area", 231.0, "mm2")),
        ((10.5, 60.5), (49.5, 60.5), (49.5, 71.5)),
    )


def _report(**changes: Any) -> Report:
    ones = np.ones((100, 80), np.float32)
    whole = Report(
        status="complete",
        protocol="lumbar-mri-sagittal",
        source=dict(SOURCE),
        findings=(_disc(), Finding("vertebra", 0.8, (12.0, 20.0, 48.0, 55.0), 1, "L5")),
        heatmaps=(
            Heatmap("class-evidence", "head", "disc", ones, "segmenter"),
            Heatmap("cam", "features", "L5/S1 Pfirrmann 4", ones, "grader"),
        ),
        mask=Mask(np.zeros((100, 80), np.uint8)),
        weighting="T2",
        naming="Levels are counted upwards from the sacrum.",
        timing_ms={"detector": 10.1234567, "engine_total": 55.0},
        engine={"backends": {"detector": "openvino"}, "precision": "int8", "threads": 0},
        bundle={"name": "lumbar-mri", "digest": "0f" * 32, "spinebox": "0.1.0"},
    )
    return dataclasses.replace(whole, **changes)


def _json(report: Report) -> dict[str, Any]:
    """Through text, as it travels: NaN and numpy scalars would not survive."""
    out: dict[str, Any] = json.loads(json.dumps(report.to_json(), allow_nan=False))
    return out


GOOD = {
    "complete": _report(),
    "partial, heatmap shed": _report(status="partial", rung="no-heatmap", shed=SHED["no-heatmap"], heatmaps=()),
    "partial, detection only": _report(
        status="partial",
        rung="detection-only",
        shed=SHED["detection-only"],
        heatmaps=(),
        mask=None,
        weighting=None,
        findings=(dataclasses.replace(_disc(graded=False), outline_px=(), measurements=()),),
    ),
    "partial, heatmap withheld": _report(
        status="partial", heatmaps=(Heatmap("cam", "features", "L5/S1 Pfirrmann 4", None, "grader", "it does not add up"),)
    ),
    "T1, no grades": _report(weighting="T1", findings=(_disc(graded=False),), notes=("Grades need T2.",)),
    "unnamed levels": _report(naming="The sacrum is not in view.", findings=(_disc(level=None),)),
    "no spacing": _report(source={**SOURCE, "spacing_mm": None, "spacing_kind": None}),
    "refused, image read": refused_report(SpineNotFound("0 sure vertebrae and discs were found", value=0), dict(SOURCE)),
    "refused, image not read": refused_report(SpineNotFound("nothing")),
}


def test_the_schema_is_a_schema() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


@pytest.mark.parametrize("name", GOOD)
def test_what_we_write_validates(name: str) -> None:
    VALIDATOR.validate(_json(GOOD[name]))


@pytest.mark.parametrize("error", all_errors(), ids=lambda e: e.code)
def test_every_error_fits_the_contract(error: Any) -> None:
    VALIDATOR.validate(_json(refused_report(error("what happened", value="x" * 500))))


def _set(*path: Any, to: Any) -> Callable[[dict[str, Any]], None]:
    def change(report: dict[str, Any]) -> None:
        place: Any = report
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = to

    return change


def _drop(*path: Any) -> Callable[[dict[str, Any]], None]:
    def change(report: dict[str, Any]) -> None:
        place: Any = report
        for key in path[:-1]:
            place = place[key]
        del place[path[-1]]

    return change


BAD = {
    "unknown key": _set("diagnosis", to="fine"),
    "no disclaimer": _drop("disclaimer"),
    "another disclaimer": _set("disclaimer", to="Certified."),
    "unknown status": _set("status", to="ok"),
    "another version": _set("report_version", to="2"),
    "empty findings": _set("findings", to=[]),
    "refused but with findings": _set("status", to="refused"),
    "complete with an error": _set("error", to={"code": "internal", "message": "m", "value": "", "remedy": "r"}),
    "complete but shed": _set("shed", to=["heatmap"]),
    "complete on a lower rung": _set("rung", to="no-heatmap"),
    "complete with a heatmap withheld": _set("heatmaps", 0, to={**_json(_report())["heatmaps"][0], "available": False, "reason": "why"}),
    "three numbers in a box": _set("findings", 0, "box_px", to=[1, 2, 3]),
    "score above one": _set("findings", 0, "score", to=1.2),
    "label in capitals": _set("findings", 0, "label", to="DISC"),
    "level that no disc has": _set("findings", 0, "level", to="L5"),
    "level that no vertebra has": _set("findings", 1, "level", to="L5/S1"),
    "grade of a vertebra": _set("findings", 1, "pfirrmann", to=None),
    "no grade key": _drop("findings", 0, "pfirrmann"),
    "plausible grade six": _set("findings", 0, "pfirrmann", "plausible", to=[6]),
    "a plausible grade twice": _set("findings", 0, "pfirrmann", "plausible", to=[3, 3]),
    "grade six": _set("findings", 0, "pfirrmann", "grade", to=6),
    "four probabilities": _set("findings", 0, "pfirrmann", "probabilities", to=[0.25] * 4),
    "unknown flag": _set("findings", 0, "flags", to={"tumour": 0.1}),
    "number zero": _set("findings", 0, "number", to=0),
    "measure without unit": _drop("findings", 0, "measurements", 0, "unit"),
    "measure in inches": _set("findings", 0, "measurements", 0, "unit", to="in"),
    "point with three numbers": _set("findings", 0, "outline_px", 0, to=[1, 2, 3]),
    "negative time": _set("timing_ms", "detector", to=-1),
    "time as text": _set("timing_ms", "detector", to="fast"),
    "no total time": _drop("timing_ms", "engine_total"),
    "kind of map that we do not make": _set("heatmaps", 0, "kind", to="grad-cam"),
    "reason for a map that is there": _set("heatmaps", 0, "reason", to="why"),
    "bundle without digest": _drop("bundle", "digest"),
    "digest too short": _set("bundle", "digest", to="abc"),
    "engine without backends": _drop("engine", "backends"),
    "weighting unknown": _set("weighting", to="PD"),
    "one spacing": _set("source", "spacing_mm", to=[0.5]),
    "three spacings": _set("source", "spacing_mm", to=[0.5, 0.5, 0.5]),
    "spacing of zero": _set("source", "spacing_mm", to=[0.5, 0]),
}


@pytest.mark.parametrize("name", BAD)
def test_what_breaks_the_contract_does_not_validate(name: str) -> None:
    report = copy.deepcopy(_json(GOOD["complete"]))
    VALIDATOR.validate(report)
    BAD[name](report)
    assert not VALIDATOR.is_valid(report)


@pytest.mark.parametrize(
    ("base", "change"),
    [
        ("refused, image read", _set("error", to=None)),
        ("refused, image read", _drop("error", "remedy")),
        ("refused, image read", _set("error", "value", to=3)),
        ("partial, heatmap withheld", _set("heatmaps", 0, "reason", to=None)),
        ("partial, heatmap shed", _set("shed", to=[])),
        ("partial, detection only", _set("shed", to=["heatmap"])),
    ],
    ids=str,
)
def test_other_breaches(base: str, change: Callable[[dict[str, Any]], None]) -> None:
    report = _json(GOOD[base])
    change(report)
    assert not VALIDATOR.is_valid(report)


def test_the_schema_knows_the_names_of_the_code() -> None:
    definitions, top = SCHEMA["$defs"], SCHEMA["properties"]
    assert definitions["disc"]["properties"]["level"]["enum"] == [*levels.DISC_LEVELS, None]
    assert definitions["vertebra"]["properties"]["level"]["enum"] == [*levels.VERTEBRA_LEVELS, None]
    assert tuple(definitions["disc"]["properties"]["flags"]["properties"]) == grader.FLAGS
    assert tuple(top["rung"]["enum"]) == RUNGS
    assert top["disclaimer"]["const"] == DISCLAIMER
    assert top["report_version"]["const"] == REPORT_VERSION
    assert set(SCHEMA["required"]) == set(top) == set(_report().to_json())
    steps = [{k: v["const"] for k, v in rule["properties"].items()} for rule in SCHEMA["allOf"][-1]["oneOf"]]
    assert steps == [
        {"asked": asked, "rung": rung, "shed": [part for part in SHED[rung] if part not in SHED[asked]]}
        for i, asked in enumerate(RUNGS)
        for rung in RUNGS[i:]
    ]


def test_millimetres_use_the_row_spacing_for_y_and_the_column_spacing_for_x() -> None:
    found = _json(GOOD["complete"])["findings"][0]
    assert found["box_mm"] == [2.5, 30.0, 12.5, 36.0]
    assert found["score"] == 0.9123
    assert _json(GOOD["no spacing"])["findings"][0]["box_mm"] is None


def test_arrays_stay_out_of_the_json_and_are_announced() -> None:
    out = _json(GOOD["partial, heatmap withheld"])
    assert out["heatmaps"] == [
        {
            "kind": "cam",
            "layer": "features",
            "target": "L5/S1 Pfirrmann 4",
            "model": "grader",
            "available": False,
            "reason": "it does not add up",
        }
    ]
    assert len(json.dumps(_json(GOOD["complete"]))) < 4000
