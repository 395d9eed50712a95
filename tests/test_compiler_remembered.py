"""Answers from memory are the engine's own, and a compile that uses them says what one that does not would say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from appliance.bundle import read_bundle
from appliance.compiler import pipeline
from appliance.compiler.explainers import explain, held
from appliance.compiler.pipeline import Order, compile_subjects
from appliance.compiler.remembered import Remembered
from models import evaluate
from tests import toy


class Counted:
    """A session that answers its input's sum and counts how often it is asked."""

    def __init__(self) -> None:
        self.asked = 0
        self.closed = False

    def run(self, inputs: dict[str, Any]) -> dict[str, Any]:
        self.asked += 1
        return {"sum": np.array([sum(float(v.sum()) for v in inputs.values())], np.float32)}

    def close(self) -> None:
        self.closed = True


def test_the_same_question_is_asked_once_and_answered_alike() -> None:
    inner = Counted()
    session = Remembered(inner)
    x = np.arange(6, dtype=np.float32)
    first = session.run({"image": x})
    first["sum"][:] = -1  # the caller's own
    assert session.run({"image": x.copy()})["sum"] == 15
    assert inner.asked == 1
    x[0] = 1  # the same array with other numbers is another question
    assert session.run({"image": x})["sum"] == 16
    assert inner.asked == 2


@pytest.mark.parametrize(
    "other",
    [
        {"picture": np.zeros(4, np.float32)},
        {"image": np.zeros((2, 2), np.float32)},
        {"image": np.zeros(4, np.int32)},
        {"image": np.zeros(4, np.float32), "scale": np.zeros(1, np.float32)},
    ],
    ids=["name", "shape", "type", "one more"],
)
def test_equal_bytes_are_not_always_the_same_question(other: dict[str, Any]) -> None:
    inner = Counted()
    session = Remembered(inner)
    session.run({"image": np.zeros(4, np.float32)})
    session.run(other)
    assert inner.asked == 2


def test_what_is_kept_is_bounded_and_the_first_stays() -> None:
    inner = Counted()
    session = Remembered(inner, most_bytes=8)  # two answers of four bytes
    for value in (1, 2, 3, 1, 2, 3):
        assert session.run({"image": np.full(1, value, np.float32)})["sum"] == value
    assert inner.asked == 4
    session.close()
    assert inner.closed


def explained() -> Any:
    subject = toy.subject()
    maps = explain(subject.heatmap, held([toy.image(s) for s in range(3000, 3012)]), scores="logits")
    return replace(subject, explainer=maps)


def test_a_compile_says_the_same_with_and_without_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every metric and every row of the report card, to the last bit; and the engines are asked less."""
    monkeypatch.setattr(evaluate, "RESAMPLES", 60)
    order = Order(targets=("onnxruntime",), latency_runs=2, profile_runs=3, max_drop=0.05)
    asked: dict[str, int] = {}

    def counted(name: str, wrap: Callable[[Any], Any]) -> Callable[[Any], Any]:
        class Asked:
            def __init__(self, session: Any) -> None:
                self._session = session

            def run(self, inputs: Any) -> Any:
                asked[name] = asked.get(name, 0) + 1
                return self._session.run(inputs)

            def close(self) -> None:
                self._session.close()

        return lambda session: wrap(Asked(session))

    manifests = {}
    for name, wrap in (("with", Remembered), ("without", lambda session: session)):
        monkeypatch.setattr(pipeline, "Remembered", counted(name, wrap))
        try:
            compile_subjects(tmp_path / name, [explained()], order, "toy")
        except pipeline.GateRefused as error:
            pytest.fail(f"the case must pass its gates: {error}")
        manifests[name] = read_bundle(tmp_path / name).manifest
    assert manifests["with"] == manifests["without"]
    verdicts = manifests["with"]["models"]["toy"]["engines"]["onnxruntime"]["verdicts"]
    assert len(next(v for v in verdicts if v["gate"] == "heatmap")["details"]["rows"]) > 10
    assert asked["with"] < asked["without"]
