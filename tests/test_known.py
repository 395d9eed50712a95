"""Answers about patients that a network does not know: the file, whom it may hold, and that it reaches the gate."""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from appliance.compiler import families, frontal, pipeline
from appliance.errors import CalibrationLeaks, ModelInvalid, TrainingDataInvalid
from models import data, evaluate_ap, grader, known, radiographs, spine_class

N = 40
SPLIT = {"train": frozenset(range(100)), "test": frozenset(range(100, 130))}


def answers(patients: range = range(20)) -> known.Known:
    rng = np.random.default_rng(3)
    truth = np.stack([np.arange(N) % 5 + 1, *((np.arange(N) // k) % 2 for k in (1, 2, 3))], axis=1)
    patient = np.resize(np.array(patients), N)
    return known.Known(rng.normal(0, 3, (N, 8)).astype(np.float32), truth, np.sort(patient), "five folds")


# -- the file ---------------------------------------------------------------------------------------------------------


def test_what_was_written_is_read_back_with_its_digest(tmp_path: Path) -> None:
    found = answers()
    digest = known.write("grader", found, known.path_of("grader", tmp_path))
    back = known.read("grader", tmp_path)
    assert back is not None
    assert np.abs(back.logits - found.logits).max() <= 2**-9
    assert np.array_equal(back.truth, found.truth)
    assert np.array_equal(back.patient, found.patient)
    assert back.source == "five folds"
    assert back.sha256 == digest == hashlib.sha256((tmp_path / "grader-known.npz").read_bytes()).hexdigest()
    assert known.write("grader", found, tmp_path / "again.npz") == digest
    assert [p.suffix for p in tmp_path.iterdir()] == [".npz"] * 2


def test_a_family_without_a_file_has_none(tmp_path: Path) -> None:
    assert known.read("grader", tmp_path) is None
    (tmp_path / "detector-known.npz").write_bytes(b"no such thing")
    assert known.read("detector", tmp_path) is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda k: replace(k, logits=k.logits[:, :5]), "logits is"),
        (lambda k: replace(k, truth=k.truth[:, :1]), "truth is"),
        (lambda k: replace(k, patient=k.patient[:-1]), "logits is"),
        (lambda k: replace(k, logits=np.where(np.arange(8) == 2, np.inf, k.logits).astype(np.float32)), "no number"),
        (lambda k: replace(k, logits=k.logits * 1e5), "no number"),  # half precision ends at 65504
        (lambda k: replace(k, truth=k.truth - np.array([1, 0, 0, 0])), "truth has 0 in column 0"),
        (lambda k: replace(k, truth=k.truth * np.array([1, 0, 1, 1])), "one value alone in column 1"),
        (lambda k: replace(k, source=""), "source"),
        (lambda k: replace(k, source="two\nlines"), "source"),
    ],
)
def test_what_is_no_answer_is_neither_written_nor_read(
    tmp_path: Path, change: Callable[[known.Known], known.Known], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = change(answers())
    with pytest.raises(ValueError, match=said):
        known.write("grader", bad, known.path_of("grader", tmp_path))
    assert list(tmp_path.iterdir()) == []
    with monkeypatch.context() as patch:
        patch.setattr(known, "check", lambda *_: None)
        known.write("grader", bad, known.path_of("grader", tmp_path))
    with pytest.raises(ModelInvalid, match=said) as caught:
        known.read("grader", tmp_path)
    assert "models.known" in caught.value.remedy


def pickled(path: Path) -> None:
    np.savez(path, logits=np.array([{}], object), truth=np.zeros((1, 4)), patient=np.zeros(1), source="x")


def swollen(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("logits.npy", bytes(known.MAX_BYTES + 1))


def lacking(path: Path) -> None:
    np.savez(path, logits=np.zeros((1, 8)), truth=np.zeros((1, 4)))


def cut(path: Path) -> None:
    whole = io.BytesIO()
    np.savez(whole, logits=np.zeros((1, 8)))
    path.write_bytes(whole.getvalue()[:100])


@pytest.mark.parametrize("make", [pickled, swollen, lacking, cut, lambda p: p.write_bytes(b""), lambda p: p.mkdir()])
def test_a_file_of_another_kind_is_named(tmp_path: Path, make: Callable[[Path], Any]) -> None:
    make(known.path_of("grader", tmp_path))
    with pytest.raises(ModelInvalid, match="known answers of grader cannot be used") as caught:
        known.read("grader", tmp_path)
    assert caught.value.value == str(known.path_of("grader", tmp_path))


# -- where answers come from ------------------------------------------------------------------------------------------


@pytest.fixture
def split(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "split", lambda: SPLIT)


def run(folder: Path, found: known.Known, variant: str = "base") -> Path:
    folder.mkdir()
    np.savez(folder / "logits.npz", logits=found.logits, truth=found.truth, patient=found.patient, fold="0", variant=variant, number=1)
    return folder


@pytest.mark.usefixtures("split")
def test_the_folds_of_a_grader_become_one_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    second, first = run(tmp_path / "b", answers(range(50, 70))), run(tmp_path / "a", answers())
    out = tmp_path / "known.npz"
    assert known.main(["grader", str(second), str(first), "--out", str(out)]) == 0
    assert capsys.readouterr().out.startswith(f"{out}: {2 * N} answers, 40 patients, sha256 {hashlib.sha256(out.read_bytes()).hexdigest()}")
    merged = known.graded([first / "logits.npz", second])
    assert merged.patient.tolist() == sorted(merged.patient.tolist())
    assert merged.source == "cross-validated networks, recipe base"
    assert np.array_equal(merged.logits[:N], answers().logits)
    assert known.write("grader", merged, tmp_path / "x.npz") == hashlib.sha256(out.read_bytes()).hexdigest()


@pytest.mark.usefixtures("split")
def test_nobody_who_judges_and_nobody_twice(tmp_path: Path) -> None:
    with pytest.raises(TrainingDataInvalid, match="may tune nothing") as caught:
        known.graded([run(tmp_path / "a", answers(range(90, 103)))])
    assert str(caught.value.value).endswith(": 100")
    with pytest.raises(TrainingDataInvalid, match="in two files") as caught:
        known.graded([run(tmp_path / "b", answers()), run(tmp_path / "c", answers(range(19, 30)))])
    assert str(caught.value.value).endswith(": 19")


def test_a_classifier_is_asked_by_the_network_that_left_the_picture_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    pictures = [radiographs.Classed(f"{i}.jpg", rng.integers(0, 255, (60, 40)).astype(np.uint8), i % 3, 7 * (i // 2)) for i in range(24)]
    asked: list[Path] = []

    def runner(family: str, weights: Path) -> Any:
        asked.append(weights)
        at = len(asked) - 1

        def answer(inputs: dict[str, Any]) -> dict[str, Any]:
            assert inputs["image"].shape == (1, 1, *spine_class.SPEC.input_hw)
            assert -1 <= inputs["image"].min() < inputs["image"].max() <= 1
            return {"logits": np.full((1, 3), at, np.float32)}

        return answer

    def some(root: Path, side: str) -> list[radiographs.Classed]:
        assert (root, side) == (tmp_path, "train")
        return pictures

    monkeypatch.setattr(radiographs, "classed", some)
    monkeypatch.setattr(evaluate_ap, "runner_of", runner)
    found = known.classed(tmp_path, "w/spine_class.mixed.{fold}/final.pt")
    assert [str(p) for p in asked] == [f"w/spine_class.mixed.{k}/final.pt" for k in range(radiographs.FOLDS)]
    assert found.logits[:, 0].tolist() == radiographs.folds(pictures).tolist()
    assert found.truth[:, 0].tolist() == [p.kind for p in pictures]
    assert found.patient.tolist() == [p.group for p in pictures]
    assert found.source == "cross-validated networks, recipe spine_class.mixed"
    with pytest.raises(SystemExit):
        known.main(["spine_class", "--data", str(tmp_path), "--weights", "w/final.pt"])


# -- what ships -------------------------------------------------------------------------------------------------------


def test_the_shipped_answers_are_of_training_patients() -> None:
    found = known.read("grader")
    assert found is not None
    assert set(found.patient.tolist()) <= data.split()["train"]
    assert len(np.unique(found.patient)) > 100
    classes = known.read("spine_class")
    assert classes is not None
    sides = radiographs.split()
    assert set(classes.patient.tolist()) == set(sides["class_train"].values())
    assert not set(classes.patient.tolist()) & set(sides["class_test"].values())
    for family in known.LAYOUT:
        assert known.path_of(family).stat().st_size < 40_000


def judge(logits: np.ndarray) -> Any:
    """An engine that answers one row after the other, over and over."""
    at = [0]

    def answer(inputs: dict[str, Any]) -> dict[str, Any]:
        at[0] += 1
        return {"logits": logits[(at[0] - 1) % len(logits)][None].astype(np.float32)}

    return answer


def test_the_graders_file_reaches_its_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    crops = [
        families.evaluate.Crop(100 + i // 2, np.zeros((9, 9), np.float32), (1, 1, 7, 5), data.Grading(i % 5 + 1, i % 2, i % 2, i % 2))
        for i in range(24)
    ]
    rows = np.random.default_rng(0).normal(0, 2, (24, 8))
    monkeypatch.setattr(families, "_strange_crops", lambda root: [np.zeros((1, 1, *grader.SPEC.input_hw), np.float32)])
    told: list[Any] = []
    monkeypatch.setattr(families.confidence, "confidence_gate", lambda *a, **k: told.append((a, k)))
    monkeypatch.setattr(families.grader, "crop", lambda *a: np.zeros((1, *grader.SPEC.input_hw), np.float32))
    for given in (answers(), None):
        families._confidence(crops, given, None, None)(judge(rows), judge(rows))
    (_, with_it), (_, without) = told
    assert with_it["fitting"].groups.tolist() == answers().patient.tolist()
    assert with_it["fitting"].heads["pfirrmann"][1].tolist() == (answers().truth[:, 0] - 1).tolist()
    assert without["fitting"] is None


def test_the_classifiers_file_reaches_its_gate() -> None:
    pictures = [radiographs.Classed(f"{i}", np.zeros((9, 9), np.uint8) + i, i % 3, 1000 + i) for i in range(30)]
    rows = 4.0 * np.eye(3)[np.arange(30) % 3] + np.random.default_rng(0).normal(0, 1, (30, 3))
    found = known.Known(3 * rows.astype(np.float32), np.arange(30)[:, None] % 3, np.arange(30), "folds", "cd")
    verdict = frontal._confidence(pictures, found, Path(), None)(judge(rows), judge(rows))
    assert verdict.details["fitted_on"] == {"who": "training", "samples": 30, "patients": 30, "source": "folds", "sha256": "cd"}
    here = frontal._confidence(pictures, None, Path(), None)(judge(rows), judge(rows))
    assert here.details["fitted_on"]["who"] == "judged"
    assert verdict.details["temperatures"]["class"] != here.details["temperatures"]["class"]
    with pytest.raises(CalibrationLeaks):
        frontal._confidence(pictures, replace(found, patient=found.patient + 1000), Path(), None)(judge(rows), judge(rows))
    json.dumps(verdict.to_json(), allow_nan=False)


@pytest.mark.parametrize("there", [True, False])
def test_a_grader_is_fitted_on_the_file_beside_its_weights_but_not_for_phantoms(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bool
) -> None:
    digest = known.write("grader", answers(), known.path_of("grader", tmp_path)) if there else ""
    given: list[known.Known | None] = []
    monkeypatch.setattr(families.evaluate, "samples", lambda *_, **__: [])
    monkeypatch.setattr(families.sets, "for_family", lambda *_: None)
    monkeypatch.setattr(families, "family_explainer", lambda *_: None)
    monkeypatch.setattr(families, "_confidence", lambda crops, known, *_: given.append(known))
    monkeypatch.setattr(families.trained, "subject", lambda *_, **fields: SimpleNamespace(**fields))

    def subject(root: Path | None) -> Any:
        return families._subject("grader", None, None, judge, None, None, root, 4, tmp_path)

    assert subject(tmp_path).fitted_on == digest
    assert subject(None).fitted_on == ""
    (first, second) = given
    assert (first.sha256 if first is not None else "") == digest
    assert second is None


def test_a_kept_verdict_depends_on_the_file() -> None:
    keys: list[Any] = []

    def parts(stage: str, key: Any, make: Any) -> dict[str, bytes]:
        keys.append(key)
        return {"said": b'{"metrics": [], "verdicts": []}', "golden": b""}

    one = pipeline.Compile.__new__(pipeline.Compile)
    one.order = SimpleNamespace(cache=SimpleNamespace(parts=parts), max_drop=0.01, effort=None)
    one.__dict__["_float_key"] = {}
    for digest in ("ab", "cd"):
        one.subject = SimpleNamespace(fitted_on=digest, golden=[])
        one.examine(SimpleNamespace(sha256="", target="onnxruntime", examined_on="", runs_here=True))
    assert keys[0] != keys[1]
