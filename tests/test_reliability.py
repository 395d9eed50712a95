"""What a bundle records of its percentages, read back into words, and drawn; also from bundles of before, and from strangers."""

from __future__ import annotations

import json
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from judged import ENGINE, MODEL, PATIENTS, VERDICT, N, changed, older

from appliance import reliability
from appliance.compiler import confidence as cf
from appliance.compiler import diagram
from appliance.reliability import of_engine

# -- reading ----------------------------------------------------------------------------------------------------------


def test_what_the_gate_recorded_is_read_back() -> None:
    found = of_engine(ENGINE)
    assert found.reason == ""
    assert [(h.name, h.kind, h.samples, h.count, h.patients) for h in found.heads] == [
        ("pfirrmann", "softmax", "discs", N, PATIENTS),
        ("bulging", "sigmoid", "discs", N, PATIENTS),
    ]
    row = VERDICT.details["heads"][0]
    assert found.heads[0].error.value == pytest.approx(row["int8"]["ece"])
    assert [b.count for b in found.heads[0].after] == [b["count"] for b in row["bins"]["after"]]
    assert found.sets is not None
    assert found.sets.coverage.value == pytest.approx(VERDICT.details["conformal"]["int8"]["coverage"])
    assert found.fitted_on is not None
    assert found.words[-1] == found.fitted_on.words
    assert found.fitted_on.words == (
        f"The corrections come from {N} discs of {PATIENTS} training patients, each answered by a network that had not learnt from the "
        "patient (cross-validated networks, recipe base). Nothing was fitted on the patients that the engine was judged on."
    )
    assert found.to_json()["fitted_on"]["words"] == found.fitted_on.words
    json.dumps(found.to_json(), allow_nan=False)


def test_the_promise_in_words_is_the_one_that_sets_are_made_by() -> None:
    assert pytest.approx(1 - cf.ALPHA) == reliability.PROMISED


def test_the_words_are_those_of_the_fullest_bins() -> None:
    def change(verdict: dict[str, Any]) -> None:
        grade, flag = verdict["details"]["heads"]
        grade["bins"]["after"] = [
            {"count": 9, "confidence": 0.41, "observed": 0.3333, "low": 0.1, "high": 0.7},
            {"count": 28, "confidence": 0.804, "observed": 0.7742, "low": 0.6, "high": 0.88},
            {"count": 3, "confidence": 0.95, "observed": 1.0, "low": 0.44, "high": 1.0},
        ]
        grade["int8"] |= {"samples": 40, "patients": 12, "ece": 0.094, "low": 0.05, "high": 0.19, "ece_before": 0.2, "ece_chance": 0.14}
        flag["bins"]["after"] = [
            {"count": 30, "confidence": 0.05, "observed": 0.0333, "low": 0.0, "high": 0.2},
            {"count": 10, "confidence": 0.72, "observed": 0.7, "low": 0.4, "high": 0.9},
        ]

    grade, flag = of_engine(changed(change)).heads
    assert grade.words == [
        "Of the 28 discs of whose grade it was about 80 % sure, it was right in 77 % (95 % interval 60 to 88 %).",
        "Over all 40 discs of 12 patients it was 73 % sure on average, and right in 69 %.",
        "Its percentages are off by 9 points on average (95 % interval 5 to 19), 20 before they were corrected. "
        "So few discs show up to 14 points even where every percentage is true.",
    ]
    assert flag.words[:2] == [
        "Of the 10 discs to which it gave about 72 % for bulging, 70 % (95 % interval 40 to 90 %) had it.",
        "Of the 30 discs to which it gave about 5 % for bulging, 3 % (95 % interval 0 to 20 %) had it.",
    ]
    sets = of_engine(ENGINE).sets
    assert sets is not None
    assert sets.words.startswith("The sets of plausible grades are made to hold the true grade in 90 % of discs. They held it in ")


def test_a_bundle_of_before_tells_what_it_has_and_what_it_lacks() -> None:
    found = of_engine(changed(older))
    assert found.reason == reliability.NO_BINS
    assert [h.kind for h in found.heads] == ["softmax", "sigmoid"]
    assert all(h.after == () and h.words for h in found.heads)
    assert found.sets is not None
    assert found.fitted_on is not None
    assert found.fitted_on.words == (
        f"The corrections were fitted on the same {N} samples of {PATIENTS} patients; each patient is judged by what the others gave."
    )
    assert diagram.rows_of({"grader": {"engines": {"openvino": changed(older)}}}) == []


def test_whose_patients_it_was_fitted_on_is_told_in_either_way() -> None:
    def here(verdict: dict[str, Any]) -> None:
        verdict["details"]["fitted_on"] = {"who": "judged", "samples": 90, "patients": 15}

    found = of_engine(changed(here)).fitted_on
    assert found == reliability.FittedOn("judged", "discs", 90, 15)
    assert "the same 90 discs of 15 patients" in found.words

    def somebody(verdict: dict[str, Any]) -> None:
        verdict["details"]["fitted_on"]["who"] = "somebody"

    assert of_engine(changed(somebody)).reason == reliability.UNREADABLE

    def coloured(verdict: dict[str, Any]) -> None:
        verdict["details"]["fitted_on"]["source"] = "\x1b[2Jfolds" + "!" * reliability.MAX_TEXT

    found = of_engine(changed(coloured)).fitted_on
    assert found is not None
    assert found.source.startswith("?[2Jfolds!")
    assert len(found.source) == reliability.MAX_TEXT


def test_engines_of_few_heads_share_a_line_and_heads_of_one_stay_together() -> None:
    def row(name: str, heads: int) -> diagram.Row:
        return diagram.Row(name, list(range(heads)))  # type: ignore[arg-type]

    rows = [row("a", 4), row("b", 4), row("c", 1), row("d", 2), row("e", 2), row("f", 9)]
    lines = [[name for name, _ in line] for line in diagram._lines(rows, 4)]
    assert lines == [["a"] * 4, ["b"] * 4, ["c", "d", "d"], ["e", "e"], ["f"] * 4]


def test_what_no_gate_judged_says_so() -> None:
    assert of_engine({"verdicts": [{"gate": "task", "passed": True, "note": ""}]}).reason == reliability.NOT_JUDGED
    few = {"verdicts": [{"gate": "confidence", "passed": None, "note": "9 patients\x1b are too few"}]}
    assert of_engine(few).reason == "9 patients? are too few"
    assert of_engine(few).heads == ()


def test_the_engines_in_use_and_no_others() -> None:
    models = {"grader": MODEL, "detector": {**MODEL, "engines": {"openvino": {**ENGINE, "verdicts": []}}}}
    found = reliability.engines(models, {"detector": "openvino", "grader": "openvino", "segmenter": "null"})
    assert [(e["model"], bool(e["reliability"]["heads"])) for e in found] == [("detector", False), ("grader", True)]
    assert found[1]["reliability"]["heads"][0]["words"]
    assert reliability.engines(models, {"grader": "null"}) == []


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(p for k, v in inner for p in places(v, (*path, k)))]


PLACES = [p for p in places(ENGINE["verdicts"][1]["details"]) if p]


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(PLACES),
    st.sampled_from([None, True, -1, 1e400, "x" * 999, "\x1b[2J", [], {}, [[]], 3, 0.5, "GONE"]),
)
def test_no_record_of_a_stranger_breaks_the_reading(place: tuple[Any, ...], value: Any) -> None:
    def change(verdict: dict[str, Any]) -> None:
        at = verdict["details"]
        for key in place[:-1]:
            at = at[key]
        if value == "GONE":
            del at[place[-1]]
        else:
            at[place[-1]] = value

    engine = changed(change)
    found = of_engine(engine)
    assert found.heads or found.reason
    text = json.dumps(found.to_json(), allow_nan=False)
    assert "\\u001b" not in text
    assert all(word.isprintable() for word in found.words)
    rows = diagram.rows_of({"m": {"engines": {"openvino": engine}}})
    assert all(h.after for r in rows for h in r.heads)


# -- the picture ------------------------------------------------------------------------------------------------------


def test_the_picture_is_drawn_of_what_was_not_refused() -> None:
    engines = {"openvino": ENGINE, "tflite": {**ENGINE, "passed": False}, "tensorrt": {**ENGINE, "passed": None}, "myriad": changed(older)}
    rows = diagram.rows_of({"grader": {"engines": engines}})
    assert [r.title for r in rows] == ["grader on openvino int8", "grader on tensorrt int8"]
    drawn = diagram.draw(rows, "a $title$ of \x1b two")
    assert drawn == diagram.draw(rows, "a $title$ of \x1b two")
    image = cv2.imdecode(np.frombuffer(drawn, np.uint8), 1)
    blue = (image[:, :, 0] > 150) & (image[:, :, 2] < 80)
    # A panel a head and a row an engine, each with its curve: two by two.
    middle_y, middle_x = image.shape[0] // 2, image.shape[1] // 2
    for part in (blue[:middle_y, :middle_x], blue[:middle_y, middle_x:], blue[middle_y:, :middle_x], blue[middle_y:, middle_x:]):
        assert part.sum() > 300
    red = (image[:, :, 2] > 120) & (image[:, :, 0] < 60) & (image[:, :, 1] < 60)
    assert red[-60:].sum() > 200, "the disclaimer is drawn in red at the foot"


def test_the_picture_is_cut_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    said: list[str] = []
    honest = Figure.suptitle

    def title(self: Any, text: str, **options: Any) -> Any:
        said.append(text)
        return honest(self, text, **options)

    monkeypatch.setattr(Figure, "suptitle", title)
    monkeypatch.setattr(diagram, "MOST_ROWS", 1)
    rows = diagram.rows_of({"grader": {"engines": {"a": ENGINE, "b": ENGINE}}})
    diagram.draw(rows, "t")
    diagram.draw(rows[:1], "t")
    assert said == ["t (not all of them)", "t"]
    with pytest.raises(ValueError, match="no reliability diagram"):
        diagram.draw([], "t")
