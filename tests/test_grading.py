"""Fused grades on a device: as the evaluation measures them, told in parts, and the network's own where nothing could be measured."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import jsonschema
import numpy as np
import pytest

from appliance import study
from appliance.bundle import Bundle, check_authored, open_bundle
from appliance.compiler import confidence, families
from appliance.compiler.pipeline import Order, compile_subjects
from appliance.engine import Engine
from appliance.errors import BundleCorrupt, ModelInvalid
from appliance.protocols import Confidence, lumbar_mri
from appliance.report import Report
from appliance.study import Instance
from kernels import mask as km
from kernels.fusion import GRADES, Fusion, read
from kernels.preprocess import normalise
from models import data, evaluate, fusion, grader, known, phantom
from models.export import WEIGHTS
from models.fusion import Forest
from models.levels import DISC_LEVELS
from tests import toy
from tests.small_bundles import manifest
from tests.test_kernels_fusion import discs

SCHEMA = json.loads((Path(__file__).parent.parent / "docs/report.schema.json").read_text())


@pytest.fixture(scope="module")
def forest() -> Fusion:
    """A forest with something to say: of made-up discs, so that it disagrees with the network."""
    x, truth = discs(200)
    return fusion.grow(x, fusion.targets(truth), Forest(trees=30), 2, "00" * 32)


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return open_bundle()


@pytest.fixture(scope="module")
def engine(bundle: Bundle, forest: Fusion) -> Iterator[Engine]:
    with Engine(bundle) as opened:
        opened._fusions = {"grader": forest}
        yield opened


def instance(seed: int, **options: object) -> Instance:
    image, truth = phantom.draw(np.random.default_rng(seed), weighting="T2", **options)  # type: ignore[arg-type]
    return study.read(phantom.write_dicom(image, truth, seed=seed))


def graded(report: Report) -> list[Any]:
    return [f for f in report.findings if f.pfirrmann]


@pytest.fixture(scope="module")
def report(engine: Engine) -> Report:
    return engine.run(instance(101))


def plain(bundle: Bundle, image: Instance) -> Report:
    with Engine(bundle) as alone:
        alone._fusions = {}
        return alone.run(image)


# -- what is answered -----------------------------------------------------------------------------------------------


def test_the_answer_is_the_one_that_the_evaluation_measures(engine: Engine, report: Report, forest: Fusion) -> None:
    found = graded(report)
    assert len(found) >= 5
    image = instance(101)
    pixels = np.asarray(image.pixels, np.float32)
    nothing = data.Grading(1, 0, 0, 0)
    numbers = [DISC_LEVELS.index(f.level) + 1 for f in found]
    boxes = [f.box_px for f in found]
    samples = evaluate._column(0, "", pixels, boxes, [nothing] * len(found), numbers, engine._sessions["segmenter"].run)
    logits = evaluate.grade_logits(engine._sessions["grader"].run, samples, forest)
    sure = confidence_of(engine)
    expected = grader.decode(logits, sure.temperatures, sure.threshold)
    for f, e in zip(found, expected, strict=True):
        assert f.pfirrmann.grade == e.grade
        np.testing.assert_allclose(f.pfirrmann.probabilities, e.probabilities, atol=1e-4)
        assert f.pfirrmann.plausible == e.plausible
        assert f.flags == pytest.approx(e.flags, abs=1e-4)


def confidence_of(engine: Engine) -> Confidence:
    return lumbar_mri.Bench(engine._sessions, engine.bundle.manifest["models"], engine.used).confidence("grader")


def test_the_fusion_has_a_say(bundle: Bundle, report: Report) -> None:
    alone = plain(bundle, instance(101))
    assert [f.box_px for f in graded(alone)] == [f.box_px for f in graded(report)]
    assert [f.pfirrmann.probabilities for f in graded(alone)] != [f.pfirrmann.probabilities for f in graded(report)]
    assert all(not f.pfirrmann.basis for f in graded(alone))
    assert "basis" not in graded(alone)[0].pfirrmann.to_json()
    assert lumbar_mri.FUSED_NOTE not in alone.notes


def test_the_report_says_what_a_grade_rests_on_and_it_adds_up(report: Report) -> None:
    assert report.notes.count(lumbar_mri.FUSED_NOTE) == 1
    for f in graded(report):
        basis = f.pfirrmann.basis
        assert list(basis) == ["average", *lumbar_mri.BASIS]
        assert 1 <= sum(basis.values()) <= GRADES
        assert any(abs(v) > 0.05 for name, v in basis.items() if name != "average")
    groups = [g for names in lumbar_mri.BASIS.values() for g in names]
    assert sorted(groups) == sorted(set(groups)) == sorted(fusion.fusion.GROUPS)


def test_the_report_with_its_parts_keeps_to_the_schema(report: Report) -> None:
    found = report.to_json()
    jsonschema.validate(found, SCHEMA)
    told = next(f for f in found["findings"] if f.get("pfirrmann"))
    told["pfirrmann"]["basis"]["luck"] = 0.1
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(found, SCHEMA)


def test_heatmaps_are_the_networks_own_and_named_by_the_grade_that_is_given(report: Report) -> None:
    maps = {h.target for h in report.heatmaps if h.kind == "cam"}
    assert maps == {f"{f.level} Pfirrmann {f.pfirrmann.grade}" for f in graded(report)}
    assert all(h.values is not None for h in report.heatmaps)


def test_without_levels_it_grades_all_the_same(engine: Engine) -> None:
    report = engine.run(instance(24, sacrum=False))
    assert graded(report)
    assert all(f.level is None and f.pfirrmann.basis for f in graded(report))


def test_where_no_fluid_is_seen_the_network_answers_alone_and_the_report_says_so(engine: Engine, bundle: Bundle) -> None:
    image = instance(101)
    inner = engine._sessions["segmenter"]

    class Blind:
        def run(self, inputs: dict[str, Any]) -> dict[str, Any]:
            out = dict(inner.run(inputs))
            out["logits"] = out["logits"].copy()
            out["logits"][:, km.CANAL] = -50
            return out

        def close(self) -> None:
            inner.close()

    engine._sessions["segmenter"] = Blind()  # type: ignore[assignment]
    try:
        report = engine.run(dataclasses.replace(image, weighting="T2"))
    finally:
        engine._sessions["segmenter"] = inner
    alone = graded(plain(bundle, image))
    assert graded(report)
    sure = confidence_of(engine)
    for f, other in zip(graded(report), alone, strict=True):
        assert not f.pfirrmann.basis
        assert f.pfirrmann.plausible == ()  # no threshold was made for the network alone
        # The same logits; the temperature is that of fused ones, and left out.
        z = np.log(f.pfirrmann.probabilities) / sure.temperatures["pfirrmann"]
        p = np.exp(z) / np.exp(z).sum()
        np.testing.assert_allclose(p, other.pfirrmann.probabilities, atol=1e-3)
    assert lumbar_mri.FUSED_NOTE not in report.notes
    assert any(n.startswith(lumbar_mri.ALONE_NOTE) and "L5/S1" in n for n in report.notes)


def test_a_picture_larger_than_the_working_size_is_graded_alike(engine: Engine) -> None:
    image = instance(77, hw=(512, 512))
    pixels = cv2.resize(image.pixels, (1400, 1400), interpolation=cv2.INTER_CUBIC)
    small, large = engine.run(image), engine.run(dataclasses.replace(image, pixels=pixels, spacing_mm=None))
    levels = {f.level: f.pfirrmann for f in graded(small)}
    both = [(levels[f.level], f.pfirrmann) for f in graded(large) if f.level in levels]
    assert len(both) >= 4
    apart = [abs(sum(a.basis.values()) - sum(b.basis.values())) for a, b in both]
    assert np.median(apart) < 0.6


@pytest.mark.parametrize(
    ("names", "levels", "places"),
    [
        (["L5/S1", "L4/L5", "L3/L4"], [1, 2, 3], [1, 2, 3]),
        (["L5/S1", "L3/L4", "L2/L3"], [1, 3, 4], [1, 3, 4]),  # one was not found: they are no neighbours
        (["L5/S1", "L4/L5", None, None], [1, 2, None, None], [1, 2, 4, 5]),  # naming ended at a gap
        ([None, None, None], [None, None, None], [1, 2, 3]),
        ([], [], []),
    ],
)
def test_places_follow_the_names(names: list[str | None], levels: list[int | None], places: list[int]) -> None:
    assert lumbar_mri._places(names) == (levels, places)


# -- from the bundle ------------------------------------------------------------------------------------------------


def with_fusion(bundle: Bundle, blob: bytes) -> Bundle:
    """The shipped bundle, as if it held a fusion."""

    class Store:
        def __init__(self, inner: Any) -> None:
            self.inner = inner

        def read(self, name: str) -> bytes:
            return blob if name == "models/grader/fusion.npz" else self.inner.read(name)

        def size(self, name: str) -> int:
            return len(blob) if name == "models/grader/fusion.npz" else self.inner.size(name)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inner, name)

    models = {**bundle.manifest["models"]}
    models["grader"] = {**models["grader"], "fusion": "models/grader/fusion.npz"}
    files = {**bundle.manifest["files"], "models/grader/fusion.npz": {"bytes": len(blob), "sha256": hashlib.sha256(blob).hexdigest()}}
    return dataclasses.replace(bundle, manifest={**bundle.manifest, "models": models, "files": files}, _store=Store(bundle._store))


def test_an_engine_takes_the_fusion_from_its_bundle(bundle: Bundle, forest: Fusion, report: Report) -> None:
    with Engine(with_fusion(bundle, forest.to_bytes())) as opened:
        found = opened.run(instance(101))
    assert [f.pfirrmann for f in graded(found)] == [f.pfirrmann for f in graded(report)]


@pytest.mark.parametrize("damage", ["cut", "other", "empty"])
def test_a_bundle_whose_fusion_is_broken_does_not_open(bundle: Bundle, forest: Fusion, damage: str) -> None:
    blob = {"cut": forest.to_bytes()[:-100], "other": b"PK\x03\x04 nothing", "empty": b""}[damage]
    with pytest.raises(BundleCorrupt, match="fusion of grader"), Engine(with_fusion(bundle, blob)):
        pass


def test_a_fusion_that_the_bundle_does_not_list_is_no_bundle() -> None:
    entries = manifest()
    entries["models"]["segmenter"]["fusion"] = "models/segmenter/fusion.npz"
    files = {"sbom.json", "cards/segmenter.json", "calibration/segmenter.csv", "calibration/segmenter.json", "golden/segmenter.npz"}
    listed = {name: {"bytes": 1, "sha256": "00" * 32} for name in (*files, "models/segmenter/int8.onnx")}
    entries |= {"format": "2", "preprocess": "2", "files": listed, "calibration_root": "00" * 32}
    with pytest.raises(BundleCorrupt, match="not listed"):
        check_authored(entries)


def test_the_shipped_bundle_holds_the_shipped_fusion_and_it_is_the_shipped_graders(bundle: Bundle) -> None:
    shipped = fusion.beside(WEIGHTS)
    assert shipped is not None
    entry = bundle.manifest["models"]["grader"]
    assert read(bundle.read(entry["fusion"])).to_bytes() == shipped.to_bytes()
    assert entry["source_sha256"] == shipped.grader


def test_a_compile_puts_the_fusion_into_the_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forest: Fusion) -> None:
    monkeypatch.setattr(evaluate, "RESAMPLES", 20)
    order = Order(targets=("onnxruntime",), latency_runs=2, profile_runs=3, max_drop=0.05)
    subject = dataclasses.replace(toy.subject(), fusion=forest.to_bytes())
    made = compile_subjects(tmp_path / "bundle", [subject], order, "toy").bundle
    path = made.manifest["models"]["toy"]["fusion"]
    assert read(open_bundle(made.root).read(path)).to_bytes() == forest.to_bytes()
    without = compile_subjects(tmp_path / "other", [toy.subject()], order, "toy").bundle
    assert "fusion" not in without.manifest["models"]["toy"]


def test_a_grader_with_a_fusion_is_examined_with_it(monkeypatch: pytest.MonkeyPatch, forest: Fusion) -> None:
    monkeypatch.setattr(evaluate, "PHANTOMS", 12)
    monkeypatch.setattr(evaluate, "RESAMPLES", 20)
    monkeypatch.setattr(fusion, "beside", lambda weights: None)
    (alone,) = families.subjects(None, images=4, names=("grader",))
    monkeypatch.setattr(fusion, "beside", lambda weights: forest)
    (fused,) = families.subjects(None, images=4, names=("grader",))
    assert alone.fusion is None
    assert fused.fusion == forest.to_bytes()
    assert fused.examiner.identity != alone.examiner.identity
    rng = np.random.default_rng(1)
    noise = rng.normal(0, 2, (400, 8)).astype(np.float32)

    def runner() -> Any:
        waiting = iter(noise)
        return lambda _: {"logits": next(waiting)[None]}

    names = {m.name for m in fused.examiner.scores(runner()).metrics}
    assert {"pfirrmann_exact", "pfirrmann_exact_network", "auroc_narrowing", "auroc_narrowing_network"} <= names
    assert not any(m.name.endswith("_network") for m in alone.examiner.scores(runner()).metrics)
    crops = fused.examiner.samples  # type: ignore[attr-defined]
    heads, _ = confidence.grader_heads(runner(), runner(), crops, forest)
    network, _ = confidence.grader_heads(runner(), runner(), crops)
    assert (heads[0].fp32 != network[0].fp32).any()
    np.testing.assert_array_equal(heads[0].fp32, evaluate.fuse(noise[: len(crops)], crops, forest)[:, :5].astype(float))


def test_known_answers_and_the_grader_are_both_fused_or_neither(monkeypatch: pytest.MonkeyPatch, forest: Fusion, tmp_path: Path) -> None:
    answers = known.Known(np.zeros((1, 8), np.float32), np.zeros((1, 4), np.int64), np.zeros(1, np.int64), "networks, recipe base", "00")
    monkeypatch.setattr(known, "read", lambda family, weights: answers)
    monkeypatch.setattr(evaluate, "samples", lambda *_, **__: [])
    call = (None, None, lambda x: x)
    with pytest.raises(ModelInvalid, match="one is fused"):
        families._subject("grader", *call, forest, None, tmp_path, 4, tmp_path)
    fused = dataclasses.replace(answers, source="networks, recipe base, fused")
    monkeypatch.setattr(known, "read", lambda family, weights: fused)
    with pytest.raises(ModelInvalid, match="one is fused"):
        families._subject("grader", *call, None, None, tmp_path, 4, tmp_path)


def test_strangers_are_told_by_the_networks_energy_after_fusing(forest: Fusion) -> None:
    """The gate's score of strangeness at temperature 1 is the same before and after."""
    x, _ = discs(50)
    z = np.random.default_rng(3).normal(0, 3, (50, 8)).astype(np.float32)
    before, after = (confidence.strangeness(v[:, :5].astype(float), 1.0) for v in (z, forest.logits(z, x)))
    np.testing.assert_allclose(before, after, atol=1e-5)


def test_measuring_a_column_changes_no_pixel() -> None:
    image, truth = phantom.draw(np.random.default_rng(4), weighting="T2")
    x = normalise(image)
    kept = x.copy()
    fusion.appearance.describe(fusion.appearance.Scene.of(x, truth.mask), [d.box_px for d in truth.discs], range(len(truth.discs)))
    np.testing.assert_array_equal(x, kept)
