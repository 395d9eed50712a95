"""How many images are enough, and `spinebox calibrate` as a person types it."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result
from onnx import TensorProto, helper, numpy_helper

from appliance.cli.calibrate import calibrate, prove
from appliance.compiler import sweep
from appliance.compiler.sweep import Size, enough, prefixes
from appliance.errors import CalibrationInvalid
from models import phantom

HW = (64, 64)


def call(*arguments: object) -> Result:
    command = {"calibrate": calibrate, "prove": prove}[str(arguments[0])]
    return CliRunner().invoke(command, [str(a) for a in arguments[1:]], catch_exceptions=False)


@pytest.fixture(scope="module")
def model() -> onnx.ModelProto:
    """Two convolutions with a ReLU between; the last one makes the output."""
    rng = np.random.default_rng(0)
    weights = {
        "w1": rng.normal(0, 0.3, (8, 1, 3, 3)).astype(np.float32),
        "w2": rng.normal(0, 0.3, (8, 8, 3, 3)).astype(np.float32),
        "w3": rng.normal(0, 0.3, (2, 8, 1, 1)).astype(np.float32),
    }
    pads = {"pads": [1, 1, 1, 1]}
    nodes = [
        helper.make_node("Conv", ["image", "w1"], ["a"], "first", **pads),
        helper.make_node("Relu", ["a"], ["b"], "relu"),
        helper.make_node("Conv", ["b", "w2"], ["c"], "second", **pads),
        helper.make_node("Relu", ["c"], ["d"], "relu2"),
        helper.make_node("Conv", ["d", "w3"], ["logits"], "third"),
    ]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, (1, 1, *HW))],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, (1, 2, *HW))],
        [numpy_helper.from_array(v, k) for k, v in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for n in range(24):
        image, _ = phantom.draw(np.random.default_rng(n), hw=(112, 96))
        cv2.imwrite(str(folder / f"{n}.png"), np.clip(image / image.max() * 255, 0, 255).astype(np.uint8))
    return folder


def inputs(count: int, spread: float = 1.0, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [np.asarray(rng.uniform(-spread, spread, (1, 1, *HW)), np.float32) for _ in range(count)]


def test_prefixes_double_and_end_with_all() -> None:
    assert prefixes(16) == [8, 16]
    assert prefixes(64) == [8, 16, 32, 64]
    assert prefixes(100) == [8, 16, 32, 64, 100]
    with pytest.raises(CalibrationInvalid, match="at least 16"):
        prefixes(15)


def test_images_that_are_alike_are_soon_enough(model: onnx.ModelProto) -> None:
    found = sweep.sweep(model, inputs(32), inputs(4, seed=1))
    assert [s.images for s in found.sizes] == [8, 16, 32]
    assert found.sizes[-1].range_change == 0
    assert 0 < found.sizes[-1].error < 0.2
    assert found.enough == 8
    assert found == sweep.sweep(model, inputs(32), inputs(4, seed=1))
    assert "8 images are enough" in found.sentence()


def test_a_last_step_that_still_changes_the_engine_is_said(model: onnx.ModelProto) -> None:
    """The images beyond the sixteenth are four times as strong, and so are those held back."""
    strong = [*inputs(16, 0.25), *inputs(16, 1.0, seed=2)]
    found = sweep.sweep(model, strong, inputs(4, seed=1))
    assert found.enough is None
    assert found.sizes[0].range_change > 0.3
    assert found.sizes[0].error > 2 * found.sizes[-1].error
    assert "not shown to be enough" in found.sentence()


def test_enough_needs_every_larger_size_to_agree() -> None:
    def row(images: int, change: float, error: float) -> Size:
        return Size(images, change, change, error)

    assert enough([row(8, 0.2, 0.1), row(16, 0.04, 0.1), row(32, 0.01, 0.1), row(64, 0, 0.1)]) == 16
    assert enough([row(8, 0.01, 0.1), row(16, 0.2, 0.1), row(32, 0.01, 0.1), row(64, 0, 0.1)]) == 32
    assert enough([row(8, 0.0, 0.2), row(16, 0, 0.1)]) is None


def test_the_picture_is_a_picture_and_the_same_again(model: onnx.ModelProto) -> None:
    found = sweep.sweep(model, inputs(16), inputs(2, seed=1))
    content = sweep.picture(found, "tiny")
    image = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)
    assert image.shape[1] > 600
    assert content == sweep.picture(found, "tiny")


def test_nothing_held_back_is_refused(model: onnx.ModelProto) -> None:
    with pytest.raises(CalibrationInvalid, match="held back"):
        sweep.sweep(model, inputs(16), [])


# -- the command ----------------------------------------------------------------------------------------------------


def test_calibrate_writes_all_that_it_was_asked_for(pictures: Path, model: onnx.ModelProto, tmp_path: Path) -> None:
    onnx.save(model, tmp_path / "tiny.onnx")
    files = {k: tmp_path / k for k in ("set.csv", "ours.json", "sheet.png", "sweep.png")}
    options = ("--input-size", "64x64", "--images", 24, "--sweep", tmp_path / "tiny.onnx", "--sweep-picture", files["sweep.png"])
    more = ("--out", files["set.csv"], "--export-statistics", files["ours.json"], "--preview", files["sheet.png"])
    result = call("calibrate", pictures, *options, *more, "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["written"] == [str(files[k]) for k in ("set.csv", "ours.json", "sheet.png", "sweep.png")]
    assert told["sweep"]["sizes"][0]["images"] == 8
    assert told["sweep"]["held_back"] + told["sweep"]["sizes"][-1]["images"] == 24
    assert told["root"] in files["set.csv"].read_text()
    sheet = cv2.imread(str(files["sheet.png"]), cv2.IMREAD_GRAYSCALE)
    assert sheet[-26:].max() > 200  # the disclaimer
    before = {k: p.read_bytes() for k, p in files.items()}
    call("calibrate", pictures, *options, *more)
    assert before == {k: p.read_bytes() for k, p in files.items()}


def test_calibrate_tells_a_person_what_it_chose(pictures: Path, tmp_path: Path) -> None:
    call("calibrate", pictures, "--export-statistics", tmp_path / "a.json", "--images", 12)
    result = call("calibrate", pictures, "--images", 20, "--compare", tmp_path / "a.json")
    assert result.exit_code == 0
    assert "20 of 24 images" in result.output
    assert "intensity" in result.output
    assert "alike" in result.output


@pytest.mark.parametrize(
    ("options", "code", "text"),
    [
        (["--input-size", "384"], 2, "ROWSxCOLUMNS"),
        (["--input-size", "9x9999"], 2, "ROWSxCOLUMNS"),
        (["--model", "a\nb"], 2, "printable"),
        (["--seed", "1" * 20], 2, "18 digits"),
        (["--images", "4"], 7, "at least 8"),
    ],
)
def test_a_wrong_setting_is_told(options: list[str], code: int, text: str, pictures: Path) -> None:
    result = call("calibrate", pictures, *options)
    assert result.exit_code == code
    assert text in result.stderr


def test_a_sweep_needs_a_model_of_the_size_of_the_set(pictures: Path, model: onnx.ModelProto, tmp_path: Path) -> None:
    onnx.save(model, tmp_path / "tiny.onnx")
    (tmp_path / "broken.onnx").write_bytes(b"\x08\x07no model")
    assert call("calibrate", pictures, "--images", 24, "--sweep", tmp_path / "tiny.onnx").exit_code == 7
    result = call("calibrate", pictures, "--images", 24, "--sweep", tmp_path / "broken.onnx")
    assert result.exit_code == 7
    assert "[compile.model]" in result.stderr


def test_help_teaches() -> None:
    for command in (calibrate, prove):
        assert "spinebox" in CliRunner().invoke(command, ["--help"]).output
        assert all(getattr(p, "help", "") for p in command.params if p.param_type_name == "option")
