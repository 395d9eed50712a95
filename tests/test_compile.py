"""The compile pipeline on phantoms, with the shipped weights: a bundle comes out whole, or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from appliance.bundle import open_bundle
from appliance.compiler import pipeline
from appliance.errors import BundleMissing, GateRefused
from calibration.sets import CalibrationSet
from models import evaluate
from models.export import WEIGHTS


@pytest.fixture
def few_phantoms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "PHANTOMS", 3)
    monkeypatch.setattr(evaluate, "RESAMPLES", 20)


@pytest.mark.usefixtures("few_phantoms")
def test_compiles_on_phantoms_and_the_bundle_opens(tmp_path: Path) -> None:
    stages: list[str] = []
    out = tmp_path / "bundle"
    outcome = pipeline.compile_bundle(out, root=None, images=4, max_drop=0.2, latency_runs=2, say=lambda s, d, t: stages.append(s))
    bundle = open_bundle(out)
    assert outcome.bundle is not None
    assert bundle.digest == outcome.bundle.digest
    assert set(bundle.manifest["models"]) == {"detector", "segmenter", "grader"}
    for family, entry in bundle.manifest["models"].items():
        assert entry["calibration"]["source"] == "phantoms"
        manifest = CalibrationSet.from_csv(family, bundle.read(entry["calibration"]["manifest"]))
        assert manifest.root == entry["calibration"]["root"]
        graph = entry["engines"]["onnxruntime"]["graph"]
        assert graph == entry["engines"]["openvino"]["graph"]
        assert bundle.read(entry["card"])
        assert len(bundle.read(graph)) < 0.45 * len((WEIGHTS / f"{family}.onnx").read_bytes()) * 2
    assert {r.engine for r in outcome.rows} == {"onnxruntime", "openvino"}
    assert any("measure ranges" in s for s in stages)
    assert bundle.trusted
    assert bundle.profile_problem == ""
    assert bundle.profile["models"]["detector"]["engines"]


@pytest.mark.usefixtures("few_phantoms")
def test_a_loss_above_the_limit_is_refused_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranges cut to a hundredth ruin every engine; the gate must see it."""
    honest = pipeline.measure_ranges

    def ruined(*arguments: object) -> dict[str, tuple[float, float]]:
        return {k: (low / 100, high / 100) for k, (low, high) in honest(*arguments).items()}  # type: ignore[arg-type]

    monkeypatch.setattr(pipeline, "measure_ranges", ruined)
    out = tmp_path / "bundle"
    with pytest.raises(GateRefused) as caught:
        pipeline.compile_bundle(out, root=None, images=2, latency_runs=1)
    assert caught.value.rows
    assert "fell by" in str(caught.value)
    with pytest.raises(BundleMissing):
        open_bundle(out)
    assert list(tmp_path.iterdir()) == []


def test_the_shipped_bundle_comes_from_the_shipped_weights() -> None:
    import hashlib

    manifest = open_bundle().manifest
    for family, entry in manifest["models"].items():
        assert entry["source_sha256"] == hashlib.sha256((WEIGHTS / f"{family}.onnx").read_bytes()).hexdigest()
        assert entry["calibration"]["source"] == "training patients"
        assert entry["metrics"]["source"] == "held-out patients"
        main = entry["metrics"]["fp32"][0]
        for engine in entry["engines"].values():
            assert not engine["passed"] or main["value"] - engine["metrics"][0]["value"] <= manifest["max_drop"]
        card = json.loads((WEIGHTS / f"{family}.json").read_text())
        assert card["weights_sha256"] == entry["source_sha256"]
        assert np.isclose(card["metrics_fp32"][0]["value"], main["value"], atol=1e-6)
