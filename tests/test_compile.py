"""The compile pipeline on a network small enough for every stage to run for real: a bundle comes out whole, or not at all."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from appliance import backends
from appliance.bundle import open_bundle, read_bundle
from appliance.compiler import alike, build, gates, golden, pipeline, quantise, search
from appliance.compiler.cache import Cache
from appliance.compiler.explainers import explain, held
from appliance.compiler.pipeline import Order, Outcome, compile_subjects
from appliance.compiler.signature import REFERENCE, signature_of
from appliance.compiler.subject import Subject
from appliance.errors import BackendFailed, BackendUnavailable, BundleMissing, CalibrationInvalid, CompileDiskFull, GateRefused
from appliance.golden import Golden
from appliance.protocols import lumbar_mri
from models import evaluate
from models.export import WEIGHTS
from tests import toy

HERE = ("onnxruntime", "openvino")
QUICK = Order(targets=HERE, latency_runs=2, profile_runs=3, max_drop=0.05)


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "RESAMPLES", 60)


def compiled(tmp_path: Path, subject: Subject | None = None, order: Order = QUICK, name: str = "bundle") -> Outcome:
    return compile_subjects(tmp_path / name, [subject or toy.subject()], order, "toy")


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return compile_subjects(tmp_path_factory.mktemp("compiled") / "bundle", [toy.subject()], QUICK, "toy")


# -- what comes out -----------------------------------------------------------------------------------------------------


def test_the_bundle_opens_signed_and_says_everything(outcome: Outcome) -> None:
    bundle = open_bundle(outcome.bundle.root)
    assert bundle.trusted
    entry = bundle.manifest["models"]["toy"]
    assert set(entry["engines"]) == set(build.TARGETS)
    for name in HERE:
        engine = entry["engines"][name]
        assert engine["passed"] is True
        said = {v["gate"]: v["passed"] for v in engine["verdicts"]}
        assert said == {"task": True, "heatmap": None, "golden": True, "parity": True}
        assert engine["verified"].startswith("ran on this machine")
        assert engine["metrics"][0]["name"] == entry["metrics"]["fp32"][0]["name"] == "accuracy"
    assert entry["engines"]["onnxruntime"]["graph"] == entry["engines"]["openvino"]["graph"]
    assert entry["calibration"]["root"] == toy.subject().calibration.root
    record = json.loads(bundle.read(entry["calibration"]["record"]))
    assert set(record["tensors"]) >= {"image", "r1", "r2"}
    assert json.loads(bundle.read(bundle.manifest["sbom"]))["bomFormat"] == "CycloneDX"
    assert b"Research use only" in bundle.read("cards/toy.md")


def test_what_was_not_asked_for_is_told_and_not_shipped(outcome: Outcome) -> None:
    for target in set(build.TARGETS) - set(HERE):
        engine = outcome.bundle.manifest["models"]["toy"]["engines"][target]
        assert engine["graph"] is None
        assert engine["passed"] is None
        assert engine["verified"].startswith("not built: ")


def test_the_choice_is_the_fastest_that_passed_and_lies_outside_the_identity(outcome: Outcome) -> None:
    profile = outcome.bundle.profile["models"]["toy"]
    ratios = {n: profile["engines"][f"{n} int8"]["ratio"] for n in HERE}
    picked = profile["choice"]["backend"]
    # Within the margin of a tie the usual preference decides.
    assert 1 / ratios[picked] <= 1 / max(ratios.values()) + pipeline.choice.CLOSE
    assert {(x["backend"], x["precision"]) for x in profile["losers"]} >= {("openvino", "f32"), ("openvino", "bf16")}
    assert not any(word in json.dumps(outcome.bundle.manifest) for word in ('"ratio"', "median_ms", "latency_ms", '"choice"'))
    assert outcome.rows[0].precision == "f32"
    assert [r.target for r in outcome.rows if r.chosen] == [picked]


def test_golden_inputs_accept_the_engine_and_not_another(outcome: Outcome) -> None:
    bundle = outcome.bundle
    entry = bundle.manifest["models"]["toy"]["engines"]["openvino"]
    file = Golden.from_bytes(bundle.read(entry["golden"]))
    signature = bundle.engine("toy").signature
    good = backends.load("openvino").open(bundle.read(entry["graph"]), signature, precision="int8", threads=1)
    assert golden.check(file, good.run).passed
    model = onnx.load_from_string(bundle.read(entry["graph"]))
    weight = next(t for t in model.graph.initializer if t.name == "w1_quantized")
    # As a saturating processor would: products beyond what it can add are cut off.
    weight.CopyFrom(numpy_helper.from_array(np.clip(numpy_helper.to_array(weight), -16, 16), weight.name))
    bad = backends.load("openvino").open(model.SerializeToString(), signature, precision="int8", threads=1)
    assert golden.check(file, bad.run).passed is False


# -- reproducible, resumable --------------------------------------------------------------------------------------------


def test_two_clean_compiles_are_equal_and_one_flipped_byte_is_another_engine(outcome: Outcome, tmp_path: Path) -> None:
    again = compiled(tmp_path, name="elsewhere").bundle
    assert again.manifest == outcome.bundle.manifest
    assert again.digest == outcome.bundle.digest
    other = compiled(tmp_path, toy.subject(flipped=5), name="flipped").bundle
    assert other.manifest["calibration_root"] != again.manifest["calibration_root"]
    assert other.digest != again.digest


def test_a_second_compile_computes_nothing_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = compiled(tmp_path, order=replace(QUICK, cache=Cache(tmp_path / "cache")))
    monkeypatch.setattr(search, "prepare_int8", lambda *a, **k: pytest.fail("prepared twice"))
    monkeypatch.setattr(gates, "task_gate", lambda *a, **k: pytest.fail("judged twice"))
    second = compiled(tmp_path, order=replace(QUICK, cache=Cache(tmp_path / "cache")), name="second")
    assert second.bundle.digest == first.bundle.digest


def test_an_interrupted_compile_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order = replace(QUICK, cache=Cache(tmp_path / "cache"))
    honest = pipeline.Compile._judged
    judged: list[str] = []

    def stops(self: Any, built: Any) -> Any:
        if built.target == "openvino":
            raise KeyboardInterrupt
        judged.append(built.target)
        return honest(self, built)

    monkeypatch.setattr(pipeline.Compile, "_judged", stops)
    with pytest.raises(KeyboardInterrupt):
        compiled(tmp_path, order=order)
    assert not (tmp_path / "bundle").exists()

    def counts(self: Any, built: Any) -> Any:
        judged.append(built.target)
        return honest(self, built)

    monkeypatch.setattr(pipeline.Compile, "_judged", counts)
    monkeypatch.setattr(search, "prepare_int8", lambda *a, **k: pytest.fail("prepared twice"))
    compiled(tmp_path, order=order)
    assert judged == ["onnxruntime", "openvino"]


# -- refusals -----------------------------------------------------------------------------------------------------------


def ruin(monkeypatch: pytest.MonkeyPatch, share: float) -> None:
    """Every range cut to a share of itself, as a wrong estimator would."""
    honest = quantise.quantise

    def clipped(model: Any, ranges: Any, **kwargs: Any) -> Any:
        return honest(model, {k: (low * share, high * share) for k, (low, high) in ranges.items()}, **kwargs)

    monkeypatch.setattr(quantise, "quantise", clipped)


def test_a_loss_above_the_limit_is_refused_by_name_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ruin(monkeypatch, 0.02)
    subject = toy.subject()
    subject.validator = None
    with pytest.raises(GateRefused, match="task gate: accuracy fell by") as caught:
        compiled(tmp_path, subject)
    assert [r.passed for r in caught.value.rows if r.precision == "int8"] == [False, False]
    with pytest.raises(BundleMissing):
        open_bundle(tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []


def test_an_engine_unlike_its_graph_is_refused_by_the_golden_gate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A runtime that adds a twentieth of the range to every logit may keep the classes; it is still not this engine."""
    module = backends.load("openvino")
    honest = module.open

    class Off:
        def __init__(self, session: Any) -> None:
            self._session = session

        def run(self, inputs: Any) -> Any:
            found = self._session.run(inputs)
            return {n: v + np.float32(0.05 * np.ptp(v)) for n, v in found.items()}

        def close(self) -> None:
            self._session.close()

    monkeypatch.setattr(module, "open", lambda *a, **k: Off(honest(*a, **k)))
    with pytest.raises(GateRefused, match=r"toy on openvino: .*golden gate"):
        compiled(tmp_path)


def test_what_was_not_asked_for_by_name_may_fail_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = pipeline.Compile._judged

    def one_fails(self: Any, built: Any) -> Any:
        parts = honest(self, built)
        if built.target == "openvino":
            said = json.loads(parts["said"])
            said["verdicts"][0] |= {"passed": False, "note": "worse"}
            parts["said"] = json.dumps(said).encode()
        return parts

    monkeypatch.setattr(pipeline.Compile, "_judged", one_fails)
    monkeypatch.setattr(build, "TARGETS", HERE)
    bundle = compiled(tmp_path, order=replace(QUICK, targets=None)).bundle
    engines = bundle.manifest["models"]["toy"]["engines"]
    assert engines["openvino"]["passed"] is False
    assert engines["openvino"]["graph"] is None
    assert bundle.profile["models"]["toy"]["choice"]["backend"] == "onnxruntime"
    assert any(x["backend"] == "openvino" and "task gate: worse" in x["reason"] for x in bundle.profile["models"]["toy"]["losers"])


def test_a_target_that_cannot_be_built_here_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "buildable", lambda t: "the environment is not made" if t == "tflite" else None)
    with pytest.raises(BackendUnavailable, match="tflite engines cannot be built here"):
        compiled(tmp_path, order=replace(QUICK, targets=("tflite",)))


def test_a_calibration_image_that_changes_meanwhile_is_noticed(tmp_path: Path) -> None:
    """Two passes over the set see different pixels: what the ranges came from is then not what the manifest says."""
    from calibration import sets
    from models import detector

    made = sets.for_family(detector.SPEC, None, 8)
    swapped = sets.FamilyCalibration(replace(made.manifest, sha256=made.manifest.sha256[::-1]), made.spec, None)
    with pytest.raises(CalibrationInvalid, match="not the one that the manifest was made with"):
        list(swapped.inputs())


def test_a_full_disk_leaves_no_half_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CompileDiskFull):
        compiled(tmp_path)
    assert not (tmp_path / "bundle").exists()
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".bundle")]


def test_a_runtime_that_dies_is_no_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any, **kwargs: Any) -> Any:
        raise BackendFailed("openvino cannot open the engine")

    monkeypatch.setattr(backends.load("openvino"), "open", fails)
    with pytest.raises(BackendFailed):
        compiled(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_runtime_that_dies_costs_its_own_target_where_none_was_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = pipeline.Compile._judged

    def fails(self: Any, built: Any) -> Any:
        if built.target == "openvino":
            raise BackendFailed("openvino failed: no such kernel")
        return honest(self, built)

    monkeypatch.setattr(pipeline.Compile, "_judged", fails)
    monkeypatch.setattr(build, "TARGETS", HERE)
    bundle = compiled(tmp_path, order=replace(QUICK, targets=None)).bundle
    engine = bundle.manifest["models"]["toy"]["engines"]["openvino"]
    assert engine["graph"] is None
    assert engine["verified"] == "not built: openvino failed: no such kernel"


def test_the_share_in_float_is_told_by_any_target_that_knows_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A converter of its own does not tell it; the layers are the same for every target."""
    honest = build.build

    def one_is_silent(target: str, *rest: Any) -> Any:
        return replace(honest(target, *rest), float_share=None if target == HERE[0] else 0.25)

    monkeypatch.setattr(build, "build", one_is_silent)
    assert compiled(tmp_path).bundle.manifest["models"]["toy"]["float_share"] == 0.25


# -- mixed precision ----------------------------------------------------------------------------------------------------


def test_the_fewest_layers_are_kept_in_float_where_plain_int8_fails(tmp_path: Path) -> None:
    """One channel drowns the others in the eight bits of their activation; the gate must be met by giving up as few layers
    as it takes, and the held-out images must not be asked."""
    subject = toy.subject(spiky=3000.0)
    order = replace(QUICK, max_drop=0.03)
    plain = compiled_or_rows(tmp_path, replace_validator(subject))
    assert any(r.passed is False for r in plain), "the case is too easy: plain INT8 passes"
    bundle = compiled(tmp_path, subject, order, name="mixed").bundle
    reverts = bundle.manifest["models"]["toy"]["reverts"]
    assert 0 < len(reverts["kept_float"]) < reverts["layers"]
    assert len(reverts["trials"]) <= reverts["layers"].bit_length() + 1
    assert bundle.manifest["models"]["toy"]["float_share"] > 0
    assert subject.validator is not None
    assert subject.validator.calls == 1 + len(reverts["trials"])


def mapped(subject: Subject) -> Any:
    """Who reads the toy's map, on four images that nothing is measured on."""
    return explain(subject.heatmap, held([toy.image(s) for s in range(3000, 3004)]), scores="logits")


def test_reverts_begin_with_one_layer_where_eight_bits_everywhere_were_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images that are content with eight bits everywhere do not end the search that the gate has begun; maps have a say in it."""
    subject = replace(toy.subject(), validator=None)
    subject.tuner = mapped(subject)
    answers = iter([False, True, True, True])
    monkeypatch.setattr(alike.Lookalike, "__call__", lambda self, run: next(answers, True))
    one = pipeline.Compile(subject, QUICK, HERE, {}, pipeline.Steps(QUICK, 1))
    try:
        base = one.prepare()
        kept = one._fewest_reverts(base)
        assert one.reverts is not None
        assert next(passed for _, passed in one.reverts["trials"]) is False
        assert all(count > 0 for count, _ in one.reverts["trials"])
        assert 0 < len(kept) <= one.reverts["layers"]
        monkeypatch.setattr(alike.Lookalike, "__call__", lambda self, run: True)
        assert len(one._fewest_reverts(base)) == 1
        # The images that choose are held to less than the gate allows, because the gate's are others.
        limits: list[float] = []
        honest = gates.task_gate
        monkeypatch.setattr(gates, "task_gate", lambda a, b, limit, **k: limits.append(limit) or honest(a, b, limit, **k))
        one.subject.validator = toy.subject().validator
        one._fewest_reverts(base)
        assert set(limits) == {pipeline.AIM * QUICK.max_drop}
        assert pipeline.AIM < 1
    finally:
        one.close()


def engine_that(passed: bool | None) -> Any:
    return SimpleNamespace(passed=passed)


def test_layers_are_reverted_where_the_runtime_that_every_device_has_was_refused() -> None:
    one = pipeline.Compile(toy.subject(), QUICK, HERE, {}, pipeline.Steps(QUICK, 1))
    first, other = REFERENCE, "tflite"
    for found, wanted in (
        ({first: True, other: False}, False), ({first: False, other: True}, True), ({first: False, other: False}, True),
        ({first: None, other: None}, True), ({first: None, other: True}, False), ({other: True}, False), ({other: False}, True),
    ):  # fmt: skip
        one.examined = {target: engine_that(passed) for target, passed in found.items()}
        assert one._reverts_wanted() is wanted, found


def test_more_layers_are_reverted_until_the_gate_lets_one_through_or_half_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """The calibration's ranking says which, the gate only whether: the fewest, WIDER times as many, and so on."""
    subject = toy.subject()
    names = [f"layer {i}" for i in range(100)]

    def tried(passes_at: int) -> list[list[str]]:
        one = pipeline.Compile(subject, QUICK, HERE, {}, pipeline.Steps(QUICK, 1))
        built: list[list[str]] = []

        def examine(kept: frozenset[str]) -> None:
            built.append(sorted(kept, key=names.index))
            one.examined = {REFERENCE: engine_that(len(kept) >= passes_at)}

        def prepare() -> Any:
            one.ranking = [(name, 1.0) for name in names]
            return None

        monkeypatch.setattr(one, "prepare", prepare)
        monkeypatch.setattr(one, "_with_float", lambda base, reverted: reverted)
        monkeypatch.setattr(one, "_build_and_examine", lambda prepared: examine(prepared or frozenset()))
        monkeypatch.setattr(one, "_int8_here", lambda: True)
        monkeypatch.setattr(one, "_fewest_reverts", lambda base: frozenset(names[:1]))
        monkeypatch.setattr(one, "_judge", lambda: one.refused.append("enough"))
        one.run()
        return built

    assert [len(b) for b in tried(0)] == [0]
    assert [len(b) for b in tried(1)] == [0, 1]
    assert tried(3) == [[], names[:1], names[: pipeline.WIDER]]
    assert [len(b) for b in tried(101)] == [0, 1, 4, 16]  # 64 would be more than half of 100


def test_maps_look_alike_or_they_do_not() -> None:
    subject = toy.subject()
    session = backends.load("onnxruntime").open(subject.model.SerializeToString(), signature_of(subject.model), precision="f32", threads=1)
    look = alike.Lookalike(mapped(subject), session.run, subject.heatmap, "image")
    assert look(session.run)

    def turned(feed: Any) -> Any:
        out = dict(session.run(feed))
        return out | {"cam": out["cam"][:, :, ::-1].copy()}

    assert not look(turned)

    def unsure(feed: Any) -> Any:
        """The same map, and a tenth of the conviction."""
        out = dict(session.run(feed))
        return out | {"logits": out["logits"] * 0.1}

    assert not look(unsure)
    session.close()


def replace_validator(subject: Subject) -> Subject:
    return replace(subject, validator=None)


def compiled_or_rows(tmp_path: Path, subject: Subject) -> Any:
    try:
        return compiled(tmp_path, subject, replace(QUICK, max_drop=0.03), name="plain").rows
    except GateRefused as error:
        return error.rows


# -- the bundle that ships ----------------------------------------------------------------------------------------------


def test_the_shipped_bundle_comes_from_the_shipped_weights() -> None:
    import hashlib

    bundle = read_bundle()
    for family, entry in bundle.manifest["models"].items():
        assert entry["source_sha256"] == hashlib.sha256((WEIGHTS / f"{family}.onnx").read_bytes()).hexdigest()
        who = "patients" if family in lumbar_mri.FAMILIES else "persons"  # radiographs carry no patient numbers
        assert entry["calibration"]["source"] == "training patients"
        assert entry["metrics"]["source"] == f"held-out {who}"
        main = entry["metrics"]["fp32"][0]
        for engine in entry["engines"].values():
            if engine["passed"]:
                assert main["value"] - engine["metrics"][0]["value"] <= bundle.manifest["max_drop"]
        card = json.loads((WEIGHTS / f"{family}.json").read_text())
        assert card["weights_sha256"] == entry["source_sha256"]
        assert np.isclose(card["metrics_fp32"][0]["value"], main["value"], atol=1e-6)
