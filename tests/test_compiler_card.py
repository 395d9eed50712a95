"""A card is read strictly, held against its graph field by field, and drafted from a graph with what was guessed said."""

# ruff: noqa: E501 - tables of one case a line

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from appliance.cli.card import card as card_command
from appliance.compiler import card as cards
from appliance.compiler import graph
from appliance.compiler.card import Card, check_against, check_outputs, parse_card, read_card, to_toml
from appliance.compiler.drafting import draft
from appliance.errors import CardInvalid, CompileDiskFull, UsageError
from tests import foreign_models as fm
from tests.foreign_models import node

CARD = Card(
    name="net", task="detection", decoder="yolov8", input_name="image", shape=(1, 3, 64, 64), outputs={"main": "out"}, classes=("a", "b", "c")
)  # fmt: skip
TEXT = to_toml(CARD)
ULTRALYTICS = {"author": "Ultralytics", "task": "detect", "names": "{0: 'disc', 1: 'body', 2: 'canal'}", "imgsz": "[64, 64]", "stride": "8"}


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes are probed here: starting another process takes longer than any of these graphs."""

    def job(name: str, plan: dict[str, Any], model: Any = None, timeout_s: float = 0) -> bytes:
        if name == "load":
            return bytes(graph.read_model(Path(plan["path"])).SerializeToString())
        return json.dumps(graph._probe(model, plan)).encode()

    monkeypatch.setattr(graph, "_isolated", job)


def test_what_is_written_is_read_back() -> None:
    assert parse_card(TEXT) == CARD


TEXTS = st.text(st.characters(exclude_categories=("Cs", "Cc")), max_size=40)
NAMES = TEXTS.filter(bool)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    classes=st.lists(TEXTS, max_size=5), input_name=NAMES, output=NAMES, licence=TEXTS,
    scale=st.floats(1e-6, 1e3), mean=st.floats(-10, 10), constant=st.floats(-1e6, 1e6), key=NAMES,
)  # fmt: skip
def test_any_card_survives_its_own_file(
    classes: list[str], input_name: str, output: str, licence: str, scale: float, mean: float, constant: float, key: str
) -> None:
    card = replace(
        CARD, classes=tuple(classes), input_name=input_name, outputs={"main": output}, licence=licence, scale=scale, mean=(mean,),
        constants={key: constant},
    )  # fmt: skip
    assert parse_card(to_toml(card, {"task": cards.Note("low", "why\nx = 1")})) == card


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("format = 1", "format = 2", "format"),
        ("format = 1", "format = true", "format"),
        ('task = "detection"', 'task = "magic"', "task must be one of"),
        ('decoder = "yolov8"', 'decoder = "softmax"', "decoder must be one of"),
        ('decoder = "yolov8"', "", "decoder is missing"),
        ('name = "net"', 'name = "../net"', "name must be"),
        ('name = "net"', 'name = "net"\nsurprise = 1', "surprise"),
        ("[input]", "[input]\nsurprise = 1", "input.surprise"),
        ("shape = [1, 3, 64, 64]", "shape = [2, 3, 64, 64]", "batch of 1"),
        ("shape = [1, 3, 64, 64]", "shape = [1, 3, 64]", "four sizes"),
        ("shape = [1, 3, 64, 64]", "shape = [1, 3, 64, -64]", "input.shape"),
        ("shape = [1, 3, 64, 64]", "shape = [1, 3, 100000, 64]", "rows or columns"),
        ("shape = [1, 3, 64, 64]", "shape = [1, 3, 64, true]", "input.shape"),
        ("shape = [1, 3, 64, 64]", 'shape = "big"', "input.shape"),
        ("shape = [1, 3, 64, 64]", "shape = [1, 64, 64, 3]", "colour does not fit the channels"),
        ('layout = "NCHW"', 'layout = "none"', "task can only be tensor"),
        ("std = [1.0]", "std = [0.0]", "std must be above 0"),
        ("std = [1.0]", "std = [1.0, 1.0]", "one for each channel"),
        ("std = [1.0]", "std = [nan]", "input.std"),
        ("scale = ", "scale = -", "input.scale must be"),
        ("score_limit = 0.25", "score_limit = 25", "detection.score_limit"),
        ("max_boxes = 100", "max_boxes = 1000000", "detection.max_boxes"),
        ("normalised = false", "normalised = 0", "detection.normalised"),
        ('main = "out"', 'scores = "out"', "outputs of decoder yolov8"),
        ('main = "out"', "", "outputs must be"),
        ("[detection]", "[evaluation]\nlabels = '../truth.csv'\n[detection]", "evaluation.labels"),
        ("[detection]", "[constants]\na = 'text'\n[detection]", "constants.a"),
        ("format = 1", "format = = 1", "no TOML"),
    ],
)
def test_a_wrong_field_is_named(old: str, new: str, says: str) -> None:
    assert old in TEXT
    with pytest.raises(CardInvalid) as caught:
        parse_card(TEXT.replace(old, new, 1))
    assert says in f"{caught.value.what} {caught.value.value}"


@pytest.mark.parametrize("text", ["", "a = " + "[" * 5000, "x = 1", "[input]\nname = 1"])
def test_what_is_no_card(text: str) -> None:
    with pytest.raises(CardInvalid):
        parse_card(text)


def test_files_that_are_no_cards(tmp_path: Path) -> None:
    (tmp_path / "big.toml").write_bytes(b"#" * (cards.MAX_BYTES + 1))
    (tmp_path / "latin.toml").write_bytes(b"name = '\xff'")
    for name in ("big.toml", "latin.toml", "absent.toml", "."):
        with pytest.raises(CardInvalid):
            read_card(tmp_path / name)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"input_name": "images"}, "input.name is not an input of the graph (value: card images, graph ['image'])"),
        ({"outputs": {"main": "output0"}}, "outputs.main is not in the graph (value: card output0, graph ['out'])"),
        (
            {"shape": (1, 3, 32, 64)},
            "rows of the card (layout NCHW) are not the graph's (value: card [1, 3, 32, 64], graph [1, 3, 64, 64])",
        ),
        ({"shape": (1, 1, 64, 64)}, "channels of the card (layout NCHW)"),
        ({"shape": (1, 64, 64, 3), "layout": "NHWC"}, "rows of the card (layout NHWC) are not the graph's"),
        ({"shape": (1, 3)}, "another number of dimensions"),
        ({"constants": {"gain": 1.0}}, "constants names no input of the graph (value: card gain"),
    ],
)
def test_a_card_that_contradicts_its_graph(change: dict[str, Any], says: str) -> None:
    model = fm.detector("yolov8")
    check_against(CARD, model)
    with pytest.raises(CardInvalid) as caught:
        check_against(replace(CARD, **change), model)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("change", "shape", "says"),
    [
        ({"classes": ("a", "b")}, (1, 7, 320), "card 2, graph 3"),
        ({"decoder": "yolov5"}, (1, 320, 5), "1 x boxes x (5 + classes)"),
        ({}, (1, 7), "1 x (4 + classes) x boxes"),
        ({"decoder": "nms"}, (100, 5), "boxes x 6 or 7"),
        ({"extra": 4}, (1, 7, 320), "1 x (4 + classes + 4) x boxes"),
        ({"extra": 1}, (1, 7, 320), "card 3, graph 2"),
        ({"decoder": "yolox"}, (1, 99, 8), "strides 8, 16 and 32"),
        ({"task": "classification", "decoder": "softmax"}, (1, 4), "card 3, graph 4"),
        ({"task": "classification", "decoder": "softmax"}, (1, 3, 8, 8), "1 x classes"),
        ({"task": "segmentation", "decoder": "argmax"}, (1, 2, 8, 8), "card 3, graph 2"),
        ({"task": "segmentation", "decoder": "argmax"}, (1, 2), "rows x columns"),
    ],
)
def test_a_card_that_contradicts_the_outputs(change: dict[str, Any], shape: tuple[int, ...], says: str) -> None:
    check_outputs(CARD, {"out": (1, 7, 320)})
    with pytest.raises(CardInvalid) as caught:
        check_outputs(replace(CARD, **change), {"out": shape})
    assert says in str(caught.value)


def grid(exponential: bool) -> Any:
    """Rows of 7 for every cell of strides 8, 16 and 32 of a 64 x 64 image, as YOLOX has them."""
    nodes, weights, rows = [], {}, []
    for s in (8, 16, 32):
        nodes += [
            helper.make_node("Conv", ["image", f"w{s}"], [f"c{s}"], strides=[s, s], name=f"head{s}"),
            helper.make_node("Reshape", [f"c{s}", f"r{s}"], [f"f{s}"]),
            helper.make_node("Transpose", [f"f{s}"], [f"t{s}"], perm=[0, 2, 1]),
        ]
        weights |= {f"w{s}": np.full((7, 3, s, s), 0.01, np.float32), f"r{s}": np.array([1, 7, -1])}
        rows.append(f"t{s}")
    nodes.append(helper.make_node("Concat", rows, ["raw"], axis=1))
    nodes.append(helper.make_node("Exp" if exponential else "Identity", ["raw"], ["out"]))
    return fm.build(nodes, weights, (1, 3, 64, 64), ["out"], ranks=[3])


def prototypes() -> Any:
    """A YOLOv8 detector whose last two numbers of a box are coefficients of the masks in a second output."""
    model = fm.detector("yolov8")
    model.graph.node.append(helper.make_node("Conv", ["image", "proto_w"], ["masks"], strides=[4, 4], name="proto"))
    model.graph.initializer.append(numpy_helper.from_array(np.ones((2, 3, 4, 4), np.float32), "proto_w"))
    model.graph.output.append(helper.make_tensor_value_info("masks", TensorProto.FLOAT, None))
    return model


def one_logit() -> Any:
    nodes = [
        helper.make_node("Conv", ["image", "w"], ["c"], name="c"),
        helper.make_node("GlobalAveragePool", ["c"], ["p"]),
        helper.make_node("Flatten", ["p"], ["out"]),
    ]
    return fm.build(nodes, {"w": np.ones((1, 3, 3, 3), np.float32)}, (1, 3, 64, 64), ["out"], ranks=[2])


def many_scales() -> Any:
    model = grid(False)
    del model.graph.output[:]
    model.graph.output.extend(helper.make_tensor_value_info(f"t{s}", TensorProto.FLOAT, None) for s in (8, 16, 32))
    return model


DRAFTS: dict[str, tuple[Any, dict[str, Any]]] = {
    "classifier": (lambda: fm.classifier(), {"task": "classification", "decoder": "probabilities", "shape": (1, 3, 224, 224)}),
    "NHWC": (lambda: fm.classifier(layout="NHWC", side=96), {"layout": "NHWC", "shape": (1, 96, 96, 3), "scale": 1 / 255}),
    "uint8": (lambda: fm.classifier(layout="NHWC", kind=TensorProto.UINT8), {"layout": "NHWC", "scale": 1.0, "mean": (0.0,)}),
    "yolov8": (lambda: fm.detector("yolov8", ULTRALYTICS), {"task": "detection", "decoder": "yolov8", "classes": ("disc", "body", "canal"), "resize": "letterbox"}),
    "yolov5": (lambda: fm.detector("yolov5"), {"task": "detection", "decoder": "yolov5", "classes": ("class_0", "class_1", "class_2")}),
    "chosen inside": (lambda: fm.detector("yolov8", chosen=True), {"task": "detection", "decoder": "nms", "box": "xyxy"}),
    "segmenter": (lambda: fm.segmenter(), {"task": "segmentation", "decoder": "argmax", "shape": (1, 3, 640, 640)}),
    "grid of logarithms": (lambda: grid(False), {"task": "detection", "decoder": "yolox", "classes": ("class_0", "class_1"), "resize": "letterbox-corner", "scale": 1.0}),
    "grid of pixels": (lambda: grid(True), {"task": "detection", "decoder": "yolov5", "classes": ("class_0", "class_1")}),
    "mask coefficients": (prototypes, {"task": "detection", "decoder": "yolov8", "extra": 2, "classes": ("class_0",)}),
    "one logit": (one_logit, {"task": "classification", "decoder": "sigmoid", "classes": ("class_0",)}),
    "rows at three scales": (many_scales, {"task": "tensor", "decoder": "cosine"}),
    "one probability": (lambda: fm.segmenter("Sigmoid", 1), {"task": "segmentation", "decoder": "probability"}),
}  # fmt: skip


@pytest.mark.parametrize("name", DRAFTS)
def test_drafts(name: str) -> None:
    make, expected = DRAFTS[name]
    model = make()
    made, notes = draft(model, f"a {name}/../x")
    assert {k: getattr(made, k) for k in expected} == expected
    assert parse_card(to_toml(made, notes)) == made
    check_against(made, model)
    assert {"task", "decoder", "shape"} <= set(notes)
    assert all(n.why for n in notes.values())


@pytest.mark.parametrize(
    "names", ["__import__('os').system('true')", "[" * 2000, "{0: 'a'}", "{'x': 'a', 1: 'b', 2: 'c'}", "3", "[1, 2, 3]"]
)
def test_hostile_class_names_are_left_out(names: str) -> None:
    made, notes = draft(fm.detector("yolov8", ULTRALYTICS | {"names": names}), "net")
    assert made.classes == ("class_0", "class_1", "class_2")
    assert notes["classes"].sure == "low"


def test_a_second_input_is_noted() -> None:
    model = fm.classifier(side=64, batch=1)
    model.graph.input.append(helper.make_tensor_value_info("scale_factor", TensorProto.FLOAT, [1, 3]))
    model.graph.node.append(node("Mul", ["probabilities", "scale_factor"], ["scaled"], name="scaled"))
    made, notes = draft(model, "net")
    assert made.constants == {"scale_factor": 1.0}
    assert notes["constants"].sure == "low"


def test_the_command(tmp_path: Path) -> None:
    source = fm.save(fm.detector("yolov8", ULTRALYTICS), tmp_path / "m.onnx")
    target = tmp_path / "card.toml"
    run = CliRunner().invoke
    assert parse_card(run(card_command, [str(source)]).stdout).classes == ("disc", "body", "canal")
    assert run(card_command, [str(source), "--out", str(target), "--name", "mine"]).exit_code == 0
    assert read_card(target).name == "mine"
    before = target.read_bytes()
    assert run(card_command, [str(source), "--out", str(target)]).exit_code == UsageError.exit_code
    assert target.read_bytes() == before
    answer = json.loads(run(card_command, [str(source), "--json"]).stdout)
    assert answer["notes"]["classes"] == {"sure": "high", "why": "names in the metadata"}
    lost = run(card_command, [str(source), "--out", str(tmp_path / "no" / "card.toml")])
    assert lost.exit_code == CompileDiskFull.exit_code
