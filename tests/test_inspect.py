"""`spinebox inspect` and the commands about keys and signatures, as a person types them; the papers that a bundle carries."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import click
import cv2
import judged
import numpy as np
import pytest
from click.testing import CliRunner, Result
from small_bundles import ABSENT, ENGINE, METRIC, MODEL, PROFILE, REFUSED, write

from appliance.bundle import open_bundle, read_bundle
from appliance.cli.inspect import COMMANDS, differences, rows_of
from appliance.compiler import modelcard, pareto, sbom
from appliance.compiler.pareto import Point
from appliance.report import DISCLAIMER

main = click.Group(commands={c.name or "": c for c in COMMANDS})


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments], catch_exceptions=False)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Every state an engine can have: picked, passed, refused, not judged, and floats beside them."""

    def change(m: dict) -> None:  # type: ignore[type-arg]
        m["models"]["segmenter"]["engines"].update(tflite=copy.deepcopy(REFUSED), myriad=copy.deepcopy(ABSENT))

    return write(tmp_path / "b", profile=PROFILE, change=change)


# -- rows and tables ------------------------------------------------------------------------------------------------


def test_every_engine_has_a_row_with_its_reason(root: Path) -> None:
    rows = {f"{r.backend} {r.precision}": r for r in rows_of(open_bundle(root))}
    assert {k: r.state for k, r in rows.items()} == {
        "onnxruntime f32": "reference",
        "myriad fp16": "not judged",
        "onnxruntime int8": "picked",
        "openvino int8": "passed",
        "tflite int8": "refused",
        "openvino bf16": "compared",
    }
    assert rows["tflite int8"].why == "task gate: fell by 62.00 points"
    assert rows["myriad fp16"].why == "not run here: no device here; the graph was query-checked"
    assert rows["openvino int8"].why == "slower here"
    best = rows["onnxruntime int8"]
    assert (best.value, best.drop, best.drop_low, best.drop_high) == (0.909, 0.001, -0.002, 0.004)
    assert (best.latency_ms_p50, best.ratio, best.size_bytes) == (6.5, 1.54, 1024)
    assert rows["onnxruntime f32"].latency_ms_p50 == 10.0


def test_without_a_profile_nothing_is_picked_and_no_time_is_made_up(tmp_path: Path) -> None:
    rows = rows_of(open_bundle(write(tmp_path / "b")))
    assert {r.state for r in rows} == {"reference", "passed"}
    assert all(r.latency_ms_p50 is None for r in rows)


def test_inspect_prints_table_signer_roots_and_reasons(root: Path) -> None:
    text = call("inspect", root).output
    bundle = open_bundle(root)
    for words in (
        DISCLAIMER,
        bundle.digest,
        bundle.manifest["calibration_root"],
        "trusted",
        "fell by 62.00 points",
        "query-checked",
        "may run it",
    ):
        assert words in text
    assert "+0.10 [-0.20, +0.40]" in text
    assert "0.909 [0.900, 0.920]" in text


def test_inspect_tells_the_same_to_machines(root: Path) -> None:
    found = json.loads(call("inspect", root, "--json").output)
    bundle = open_bundle(root)
    assert found["bundle"]["digest"] == bundle.digest
    assert found["signer"] == {"key_id": bundle.signer.id if bundle.signer else "", "name": "author", "trusted": True}
    assert found["installable"] == {"ok": True}
    assert found["disclaimer"] == DISCLAIMER
    assert len(found["engines"]) == 6


def test_an_unsigned_bundle_and_one_that_cannot_run_are_shown_all_the_same(tmp_path: Path) -> None:
    unsigned = json.loads(call("inspect", write(tmp_path / "a", signed=False), "--json").output)
    assert unsigned["signer"] is None
    assert unsigned["installable"]["code"] == "bundle.unsigned"
    write(
        tmp_path / "b",
        change=lambda m: m["models"]["segmenter"].update(
            metrics={"source": "none", "fp32": []}, engines={"onnxruntime": {**ENGINE, "golden": None}}
        ),
    )
    result = call("inspect", tmp_path / "b", "--picture", tmp_path / "p.png")
    assert result.exit_code == 0
    assert "no golden outputs" in result.output


def test_a_broken_bundle_is_refused_by_code(root: Path) -> None:
    (root / "sbom.json").write_bytes(b"[]")
    result = call("inspect", root, "--json")
    assert result.exit_code == 5
    assert json.loads(result.stdout)["error"]["code"] == "bundle.corrupt"
    assert call("inspect", root.parent / "absent").exit_code == 5


def test_words_of_a_stranger_reach_no_terminal_as_commands(tmp_path: Path) -> None:
    """Escape sequences, markup and line breaks in every free text are printed as plain characters."""
    nasty = "\x1b[2J\x9b[red]x[/red]\n\r\x07$\\frac$"

    def change(m: dict) -> None:  # type: ignore[type-arg]
        model = m["models"]["segmenter"]
        m["spinebox"] = m["tools"]["onnx"] = nasty
        model["calibration"]["source"] = model["metrics"]["source"] = nasty
        for metric in (model["metrics"]["fp32"][0], model["engines"]["onnxruntime"]["metrics"][0]):
            metric["name"] = nasty
        for engine in model["engines"].values():
            engine["verified"] = nasty
            engine["verdicts"][0]["gate"] = engine["verdicts"][0]["note"] = nasty

    profile = copy.deepcopy(PROFILE)
    profile["device"] = {nasty: nasty}
    profile["models"]["segmenter"]["losers"][0]["reason"] = nasty  # type: ignore[index]
    root = write(tmp_path / "b", change=change, profile=profile)
    other = write(tmp_path / "c")
    for result in (call("inspect", root), call("inspect", root, "--diff", other), call("verify", root)):
        assert result.exit_code == 0
        assert not {"\x1b", "\x9b", "\x07", "\r"} & set(result.output)
    assert call("inspect", root, "--picture", tmp_path / "p.png").exit_code == 0


def test_the_table_says_how_much_of_a_model_stayed_in_float(tmp_path: Path) -> None:
    def share(value: float) -> str:
        root = write(tmp_path / f"{value}", change=lambda m: m["models"]["segmenter"].update(float_share=value))
        return call("inspect", root).output

    assert "52 % in float" in share(0.5204)
    assert "<1 % in float" in share(0.0003)
    assert "0 % in float" in share(0)


# -- how far percentages can be believed --------------------------------------------------------------------------------


def believable(root: Path) -> Path:
    """A bundle with a confidence gate that judged one engine."""
    return write(root, change=lambda m: m["models"]["segmenter"]["engines"].update(openvino={**ENGINE, "verdicts": [VERDICT_OF_ALL]}))


VERDICT_OF_ALL = judged.ENGINE["verdicts"][1]


def test_how_far_percentages_can_be_believed_is_told_and_drawn(tmp_path: Path) -> None:
    root = believable(tmp_path / "b")
    text = call("inspect", root, "--reliability", tmp_path / "r.png").output
    assert "segmenter on openvino, how far its percentages can be believed:" in text
    assert "The sets of plausible grades are made to hold the true grade in 90 % of discs." in " ".join(text.split())
    assert cv2.imread(str(tmp_path / "r.png")).shape[0] > 400
    found = json.loads(call("inspect", root, "--json").output)["reliability"]
    assert list(found) == ["segmenter"]
    assert list(found["segmenter"]) == ["openvino"]
    assert found["segmenter"]["openvino"]["heads"][0]["after"][0]["count"] > 0


@pytest.mark.parametrize("recorded", [True, False])
def test_a_compile_draws_what_it_recorded(recorded: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A compile that has nothing to draw has still made a bundle: it says so and ends well."""
    from appliance.cli.compile import compile_
    from appliance.compiler import pipeline

    made = read_bundle(believable(tmp_path / "b") if recorded else write(tmp_path / "b"))
    monkeypatch.setattr(pipeline, "compile_families", lambda *a, **k: pipeline.Outcome(made, [], "phantoms"))
    found = CliRunner().invoke(compile_, ["--out", str(tmp_path / "b"), "--fresh", "--reliability", str(tmp_path / "r.png")])
    assert found.exit_code == 0, found.output
    assert (tmp_path / "r.png").exists() is recorded
    assert ("is not written" in found.stderr) is not recorded
    assert "2 % in float" in found.output


def test_a_bundle_without_a_record_is_shown_and_not_drawn(root: Path, tmp_path: Path) -> None:
    assert json.loads(call("inspect", root, "--json").output)["reliability"] == {}
    assert "believed" not in call("inspect", root).output
    result = call("inspect", root, "--reliability", tmp_path / "r.png")
    assert result.exit_code == 2
    assert "records no reliability diagram" in result.output + result.stderr
    assert not (tmp_path / "r.png").exists()


# -- picture --------------------------------------------------------------------------------------------------------------


def test_the_picture_has_a_panel_a_model_and_the_disclaimer(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[str] = []
    from matplotlib.figure import Figure

    real = Figure.text

    def note(self: Figure, x: float, y: float, s: str, **options: object) -> object:
        drawn.append(s)
        return real(self, x, y, s, **options)

    monkeypatch.setattr(Figure, "text", note)
    assert call("inspect", root, "--picture", tmp_path / "p.png").exit_code == 0
    assert DISCLAIMER in drawn
    image = cv2.imread(str(tmp_path / "p.png"))
    assert image.shape[0] > 400
    red = (image[:, :, 2] > 120) & (image[:, :, 0] < 60) & (image[:, :, 1] < 60)
    assert red[-60:].sum() > 200, "the disclaimer is drawn in red at the foot"
    first = (tmp_path / "p.png").read_bytes()
    call("inspect", root, "--picture", tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes() == first


def test_the_picture_of_many_models_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pareto, "MOST_PANELS", 2)
    panel = pareto.Panel("m", "agreement", 0.01, [Point("openvino", "int8", 1.0, 0.001, "picked")])
    image = cv2.imdecode(np.frombuffer(pareto.draw([panel] * 40, "t"), np.uint8), 1)
    assert image.shape[0] < 700
    assert pareto.draw([], "nothing")


def test_a_picture_that_cannot_be_written(root: Path, tmp_path: Path) -> None:
    result = call("inspect", root, "--picture", tmp_path / "absent/p.png")
    assert result.exit_code == 2


def test_the_front_holds_what_nothing_beats() -> None:
    def point(ms: float, loss: float, state: pareto.State = "passed") -> Point:
        return Point("x", "int8", ms, loss, state)

    fast, middle, exact = point(1, 0.03), point(2, 0.01), point(3, 0.0, "reference")
    beaten, refused, unjudged = point(2.5, 0.02), point(0.5, 0.9, "refused"), point(0.1, 0.0, "not judged")
    assert pareto.front([beaten, exact, refused, fast, unjudged, middle]) == [fast, middle, exact]
    assert pareto.front([]) == []


# -- differences ----------------------------------------------------------------------------------------------------------


def test_diff_names_what_changed_and_nothing_else(root: Path, tmp_path: Path) -> None:
    def change(m: dict) -> None:  # type: ignore[type-arg]
        m["tools"]["onnx"] = "9.9.9"
        m["models"]["segmenter"]["calibration"]["root"] = "ee" * 32
        m["models"]["segmenter"]["engines"].update(tflite=copy.deepcopy(REFUSED), myriad=copy.deepcopy(ABSENT))

    other = write(tmp_path / "c", graph=b"another graph", change=change)
    found = json.loads(call("inspect", root, "--diff", other, "--json").output)["differences"]
    assert {d["what"] for d in found} == {
        "tool onnx",
        "calibration_root",
        "segmenter: calibration root",
        "segmenter on onnxruntime: graph",
        "segmenter on openvino: graph",
        "segmenter on tflite: graph",
    }
    assert "9.9.9" in call("inspect", root, "--diff", other).output
    assert "the same" in call("inspect", root, "--diff", root).output
    assert differences(read_bundle(root), read_bundle(root)) == []


# -- keys, signatures, one file -----------------------------------------------------------------------------------------


def test_keygen_sign_verify_pack_unpack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    root = write(tmp_path / "b", signed=False)
    assert call("verify", root).exit_code == 5
    made = call("keygen", tmp_path / "clinic.pem", "--json")
    key = json.loads(made.output)
    private = (tmp_path / "clinic.pem").read_text()
    assert not any(line in made.output for line in private.splitlines())
    assert call("sign", root, "--key", tmp_path / "clinic.pem").exit_code == 0
    refused = call("verify", root, "--json")
    assert (refused.exit_code, json.loads(refused.stdout)["error"]["code"]) == (5, "bundle.unsigned")
    trusted = tmp_path / "config/spinebox/trusted"
    trusted.mkdir(parents=True)
    (trusted / "clinic.pub").write_bytes((tmp_path / "clinic.pub").read_bytes())
    found = json.loads(call("verify", root, "--json").output)
    assert (found["ok"], found["key_id"]) == (True, key["key_id"])
    assert "onnxruntime" in found["backends"]
    packed = json.loads(call("pack", root, "--out", tmp_path / "x.spinebox", "--json").output)
    assert packed["digest"] == found["digest"]
    assert call("verify", tmp_path / "x.spinebox").exit_code == 0
    assert call("unpack", tmp_path / "x.spinebox", "--out", tmp_path / "y").exit_code == 0
    assert call("verify", tmp_path / "y").exit_code == 0
    assert call("keygen", tmp_path / "clinic.pem").exit_code == 5
    assert call("unpack", tmp_path / "x.spinebox", "--out", tmp_path / "config").exit_code == 2


def test_pack_names_the_file_after_the_bundle(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert call("pack", root, "--without-profile").exit_code == 0
    assert open_bundle(tmp_path / "tiny.spinebox").profile == {}


def test_a_passphrase_is_asked_for_and_not_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write(tmp_path / "b")
    answer = CliRunner().invoke(main, ["keygen", str(tmp_path / "k.pem"), "--passphrase"], input="secret words\nsecret words\n")
    assert answer.exit_code == 0
    assert "secret words" not in answer.output
    assert call("sign", root, "--key", tmp_path / "k.pem").exit_code == 5
    monkeypatch.setenv("SPINEBOX_PASSPHRASE", "secret words")
    assert call("sign", root, "--key", tmp_path / "k.pem").exit_code == 0


# -- papers ---------------------------------------------------------------------------------------------------------------


CARD = {"licence": "Apache-2.0 (weights)", "data": "phantoms", "limits": ["One | two", "three"], "split": {"train_patients": 3}}


def test_the_model_card_says_data_licence_limits_metrics_gates_and_heatmap() -> None:
    entry = {**MODEL, "engines": {"openvino": MODEL["engines"]["openvino"], "tflite": REFUSED, "myriad": ABSENT}}
    as_json, text = modelcard.make("segmenter", entry, CARD, 0.01)
    document, words = json.loads(as_json), text.decode()
    assert document["disclaimer"] == DISCLAIMER
    assert document["engines"]["tflite"]["passed"] is False
    assert document["metrics"]["fp32"] == [METRIC]
    for expected in (
        f"**{DISCLAIMER}**", "Apache-2.0 (weights)", "phantoms", "One | two", "train patients 3", "dice_mean", "0.910 [0.900, 0.920]",
        "0.909 [0.900, 0.920]", "refused", "fell by 62.00 points", "not judged", "query-checked", "class-evidence", "MYRIAD FP16".lower(),
    ):  # fmt: skip
        assert expected.lower() in words.lower(), expected
    assert modelcard.make("segmenter", entry, CARD, 0.01) == (as_json, text)
    bare, plain = modelcard.make("segmenter", entry, {}, 0.01)
    assert json.loads(bare)["licence"] == "not stated"
    assert "states none" in plain.decode()


def test_the_report_card_of_a_heatmap_stands_in_the_model_card() -> None:
    verdict = {"gate": "heatmap", "passed": True, "note": "14 of 14", "details": {"ssim_median": 0.987654, "peak": "ok"}}
    engine = {**MODEL["engines"]["openvino"], "verdicts": [verdict]}
    text = modelcard.make("m", {**MODEL, "engines": {"openvino": engine}}, CARD, 0.01)[1].decode()
    assert "Report card on openvino: passed. 14 of 14" in text
    assert "| ssim_median | 0.9877 |" in text


def test_the_model_card_says_how_far_percentages_can_be_believed() -> None:
    engine = {**MODEL["engines"]["openvino"], "verdicts": [VERDICT_OF_ALL]}
    refused = {**engine, "passed": False}
    as_json, text = modelcard.make("m", {**MODEL, "engines": {"onnxruntime": refused, "openvino": engine}}, CARD, 0.01)
    words = text.decode()
    row = VERDICT_OF_ALL["details"]["heads"][0]
    off, low, high = (100 * row["int8"][k] for k in ("ece", "low", "high"))
    assert f"| pfirrmann | openvino INT8 | {row['int8']['temperature']:.2f} |" in words
    assert f"{off:.1f} [{low:.1f}, {high:.1f}]" in words
    # The bins are those of the engine that passed.
    first = row["bins"]["after"][0]
    assert "pfirrmann on openvino INT8, with 95 % intervals" in words
    assert "pfirrmann on onnxruntime INT8, with" not in words
    assert f"| {100 * first['confidence']:.0f} % | {100 * first['observed']:.0f} % [" in words
    assert "- The sets of plausible grades" in words
    assert json.loads(as_json)["engines"]["openvino"]["verdicts"][0]["details"]["heads"][0]["bins"] == row["bins"]
    assert "## Confidence" not in modelcard.make("m", MODEL, CARD, 0.01)[1].decode()


def _bill(**changes: object) -> bytes:
    model = sbom.Model("segmenter", "1", "segmentation", "ab" * 32, {"models/segmenter/int8.onnx": "cd" * 32}, CARD)
    options: dict = {
        "name": "tiny",
        "spinebox": "0.1.0",
        "tools": {"onnx": "1.23.2", "numpy": "2.4.6", "unheard-of": "1"},
        "models": [model],
    }  # type: ignore[type-arg]
    return sbom.make(**{**options, **changes})


def test_the_bill_of_materials_is_valid_cyclonedx() -> None:
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    bill = _bill()
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(bill.decode()) is None
    document = json.loads(bill)
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(json.dumps({**document, "components": [{"name": "x"}]})) is not None
    parts = {c["name"]: c for c in document["components"]}
    assert parts["segmenter"]["type"] == "machine-learning-model"
    assert parts["segmenter"]["hashes"] == [{"alg": "SHA-256", "content": "ab" * 32}]
    assert parts["segmenter"]["licenses"] == [{"license": {"name": "Apache-2.0 (weights)"}}]
    assert parts["segmenter"]["properties"] == [
        {"name": "spinebox:task", "value": "segmentation"},
        {"name": "spinebox:training-data", "value": "phantoms"},
    ]
    assert parts["segmenter"]["components"][0]["hashes"][0]["content"] == "cd" * 32
    assert parts["onnx"]["version"] == "1.23.2"
    assert parts["onnx"]["licenses"]
    assert "licenses" not in parts["unheard-of"]


def test_the_bill_has_neither_clock_nor_chance() -> None:
    bill = _bill()
    assert bill == _bill()
    document = json.loads(bill)
    assert "timestamp" not in document["metadata"]
    other = json.loads(_bill(spinebox="0.2.0"))
    assert other["serialNumber"] != document["serialNumber"]
    assert document["serialNumber"].startswith("urn:uuid:")


def test_the_shipped_bundle_has_all_its_papers() -> None:
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    bundle = open_bundle()
    bill = bundle.read(bundle.manifest["sbom"]).decode()
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(bill) is None
    names = {c["name"] for c in json.loads(bill)["components"]}
    assert set(bundle.manifest["models"]) | set(bundle.manifest["tools"]) <= names
    for entry in bundle.manifest["models"].values():
        card = json.loads(bundle.read(entry["card"]))
        assert card["disclaimer"] == DISCLAIMER
        assert card["data"].startswith(("SPIDER", "Spine Region", "Radiographs of"))
        assert card["source_sha256"] == entry["source_sha256"]
