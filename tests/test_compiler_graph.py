"""A foreign graph becomes float32, NCHW, of fixed shapes, and still answers what it answered."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from appliance.compiler import graph
from appliance.compiler.card import Card, shape_of
from appliance.compiler.drafting import draft
from appliance.errors import CardInvalid, GraphUnsupported
from tests import foreign_models as fm
from tests.foreign_models import node

CARD = Card(
    name="net", task="classification", decoder="probabilities", input_name="image", shape=(1, 3, 64, 64), outputs={"main": "probabilities"}
)  # fmt: skip
X = np.random.default_rng(3).random((1, 3, 64, 64)).astype(np.float32)


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The jobs of the other process run here: starting one takes longer than any of these graphs."""

    def job(name: str, plan: dict[str, Any], model: Any = None, timeout_s: float = 0) -> bytes:
        if name == "load":
            return bytes(graph.read_model(Path(plan["path"])).SerializeToString())
        if name == "probe":
            return graph.json.dumps(graph._probe(model, plan)).encode()
        return bytes(graph._prepare(model, plan, tmp_path).SerializeToString(deterministic=True))

    monkeypatch.setattr(graph, "_isolated", job)


def loaded(model: Any, folder: Path) -> Any:
    return graph.load_model(fm.save(model, folder / "m.onnx"))


@pytest.mark.parametrize("opset", range(11, 22))
def test_every_opset(tmp_path: Path, opset: int) -> None:
    source = fm.classifier(opset)
    model = loaded(source, tmp_path)
    assert model.opset_import[0].version >= graph.OPSET_QUANTISED
    ready = graph.prepare(model, CARD)
    onnx.checker.check_model(ready, full_check=True)
    np.testing.assert_allclose(fm.run(ready, X)["probabilities"], fm.run(source, X)["probabilities"], atol=1e-6)
    assert "BatchNormalization" not in {n.op_type for n in ready.graph.node}
    assert [shape_of(v) for v in (*ready.graph.input, *ready.graph.output)] == [[1, 3, 64, 64], [1, 3]]


@pytest.mark.parametrize("kind", [TensorProto.FLOAT, TensorProto.UINT8])
def test_nhwc_and_whole_numbers_are_turned_at_the_front(tmp_path: Path, kind: int) -> None:
    source = fm.classifier(layout="NHWC", kind=kind)
    ready = graph.prepare(loaded(source, tmp_path), replace(CARD, layout="NHWC", shape=(1, 64, 64, 3), scale=1.0))
    assert shape_of(ready.graph.input[0]) == [1, 3, 64, 64]
    assert ready.graph.input[0].type.tensor_type.elem_type == TensorProto.FLOAT
    x = np.random.default_rng(1).integers(0, 256, (1, 3, 64, 64)).astype(np.float32)
    fed = x.transpose(0, 2, 3, 1).astype(np.uint8 if kind == TensorProto.UINT8 else np.float32)
    np.testing.assert_allclose(fm.run(ready, x)["probabilities"], fm.run(source, fed)["probabilities"], atol=1e-5)
    if kind == TensorProto.FLOAT:
        assert "Transpose" not in {n.op_type for n in ready.graph.node}, "two Transposes cancel"


def test_division_by_a_constant_becomes_multiplication(tmp_path: Path) -> None:
    source = fm.classifier(side=64, batch=1)
    relu = next(n for n in source.graph.node if n.name == "r2")
    relu.op_type = "Div"
    relu.input.append("six")
    source.graph.initializer.append(numpy_helper.from_array(np.array(6, np.float32), "six"))
    ready = graph.prepare(loaded(source, tmp_path), CARD)
    assert "Div" not in {n.op_type for n in ready.graph.node}
    np.testing.assert_allclose(fm.run(ready, X)["probabilities"], fm.run(source, X)["probabilities"], atol=1e-6)


def test_the_same_model_and_card_give_the_same_bytes(tmp_path: Path) -> None:
    model = loaded(fm.detector("yolov8"), tmp_path)
    card, _ = draft(model, "net")
    first, second = (graph.prepare(model, card).SerializeToString(deterministic=True) for _ in range(2))
    assert first == second


def test_names_are_unique_and_notes_gone(tmp_path: Path) -> None:
    source = fm.classifier(side=64)
    for n in source.graph.node:
        n.name = "same"
        n.doc_string = "/home/somebody/train.py"
    ready = graph.prepare(loaded(source, tmp_path), CARD)
    names = [n.name for n in ready.graph.node]
    assert len(set(names)) == len(names)
    assert all(names)
    assert b"somebody" not in ready.SerializeToString()


def test_half_precision_becomes_float32(tmp_path: Path) -> None:
    source = fm.classifier(side=64, batch=1)
    half = onnx.ModelProto()
    half.CopyFrom(source)
    for tensor in half.graph.initializer:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), tensor.name))
    for value in (*half.graph.input, *half.graph.output):
        value.type.tensor_type.elem_type = TensorProto.FLOAT16
    ready = graph.prepare(loaded(half, tmp_path), CARD)
    assert ready.graph.input[0].type.tensor_type.elem_type == TensorProto.FLOAT
    np.testing.assert_allclose(fm.run(ready, X)["probabilities"], fm.run(source, X)["probabilities"], atol=5e-3)


def test_our_own_files_read_as_their_own_reader_reads_them() -> None:
    from models.export import WEIGHTS, load_float32

    path = WEIGHTS / "grader.onnx"
    x = np.random.default_rng(1).normal(size=(1, 1, 128, 128)).astype(np.float32)
    ours, theirs = fm.run(graph.load_model(path), x), fm.run(load_float32(path), x)
    np.testing.assert_allclose(ours["logits"], theirs["logits"], atol=1e-5)


def test_weights_listed_as_inputs_are_no_inputs(tmp_path: Path) -> None:
    source = fm.classifier(11, side=64, batch=1)
    for tensor in source.graph.initializer:
        source.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    ready = graph.prepare(loaded(source, tmp_path), CARD)
    assert [v.name for v in ready.graph.input] == ["image"]


def test_nodes_out_of_order_are_sorted(tmp_path: Path) -> None:
    source = fm.classifier(side=64, batch=1)
    graph.replace(source.graph.node, list(source.graph.node)[::-1])
    np.testing.assert_allclose(fm.run(loaded(source, tmp_path), X)["probabilities"], fm.run(fm.classifier(), X)["probabilities"], atol=1e-6)


def test_functions_are_written_out(tmp_path: Path) -> None:
    source = fm.classifier(side=64, batch=1)
    body = [node("Sigmoid", ["a"], ["s"]), node("Mul", ["a", "s"], ["b"])]
    source.functions.append(helper.make_function("own", "Swish", ["a"], ["b"], body, [helper.make_opsetid("", 17)]))
    source.opset_import.append(helper.make_opsetid("own", 1))
    relu = next(n for n in source.graph.node if n.name == "r2")
    relu.op_type, relu.domain = "Swish", "own"
    model = loaded(source, tmp_path)
    assert not model.functions
    np.testing.assert_allclose(fm.run(model, X)["probabilities"], fm.run(source, X)["probabilities"], atol=1e-6)


def test_boxes_chosen_inside_get_a_fixed_number_of_rows(tmp_path: Path) -> None:
    source = fm.detector("yolov8", chosen=True)
    card = Card(
        name="net", task="detection", decoder="nms", input_name="image", shape=(1, 3, 64, 64), outputs={"main": "rows_out"}, max_boxes=4
    )  # fmt: skip
    ready = graph.prepare(loaded(source, tmp_path), card)
    assert shape_of(ready.graph.output[0]) == [4, 6]
    rows = fm.run(source, X)["rows_out"]
    assert len(rows) > 4
    np.testing.assert_allclose(fm.run(ready, X)["rows_out"], rows[:4], atol=1e-4)
    long = graph.prepare(loaded(source, tmp_path), replace(card, max_boxes=500))
    padded = fm.run(long, X)["rows_out"]
    np.testing.assert_allclose(padded[: len(rows)], rows, atol=1e-4)
    assert not padded[len(rows) :].any()


def test_whole_numbers_come_out_as_float(tmp_path: Path) -> None:
    source = fm.segmenter("ArgMax")
    card = Card(name="net", task="segmentation", decoder="labels", input_name="image", shape=(1, 3, 64, 64), outputs={"main": "out"})
    ready = graph.prepare(loaded(source, tmp_path), card)
    assert ready.graph.output[0].type.tensor_type.elem_type == TensorProto.FLOAT
    np.testing.assert_array_equal(fm.run(ready, X)["out"], fm.run(source, X)["out"])


def test_outputs_that_the_card_leaves_out_are_gone(tmp_path: Path) -> None:
    source = fm.classifier(side=64, batch=1)
    source.graph.output.append(helper.make_tensor_value_info("r1", TensorProto.FLOAT, None))
    source.graph.node.append(node("Abs", ["r1"], ["unused"], name="unused"))
    source.graph.output.append(helper.make_tensor_value_info("unused", TensorProto.FLOAT, None))
    ready = graph.prepare(loaded(source, tmp_path), CARD)
    assert [o.name for o in ready.graph.output] == ["probabilities"]
    assert "Abs" not in {n.op_type for n in ready.graph.node}


def test_a_second_input_becomes_a_constant(tmp_path: Path) -> None:
    source = fm.classifier(side=64, batch=1)
    source.graph.input.append(helper.make_tensor_value_info("gain", TensorProto.FLOAT, [1, 3]))
    source.graph.node.append(node("Mul", ["probabilities", "gain"], ["scaled"], name="scaled"))
    source.graph.output[0].CopyFrom(helper.make_tensor_value_info("scaled", TensorProto.FLOAT, [1, 3]))
    card = replace(CARD, outputs={"main": "scaled"})
    with pytest.raises(CardInvalid, match=r"constants\.gain"):
        graph.prepare(loaded(source, tmp_path), card)
    ready = graph.prepare(loaded(source, tmp_path), replace(card, constants={"gain": (1.0, 2.0, 3.0)}))
    assert [v.name for v in ready.graph.input] == ["image"]
    np.testing.assert_allclose(fm.run(ready, X)["scaled"], fm.run(fm.classifier(), X)["probabilities"] * [[1, 2, 3]], atol=1e-6)
    with pytest.raises(CardInvalid, match=r"constants\.gain"):
        graph.prepare(loaded(source, tmp_path), replace(card, constants={"gain": (1.0, 2.0)}))


def test_a_prepared_graph_that_answers_otherwise_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    simplify = graph._simplify

    def wrong(model: Any, folder: Path) -> Any:
        out = simplify(model, folder)
        biases = next(t for t in out.graph.initializer if t.name == "b3")
        biases.CopyFrom(numpy_helper.from_array(np.array([0.0, 1.0, 0.0], np.float32), "b3"))
        return out

    monkeypatch.setattr(graph, "_simplify", wrong)
    with pytest.raises(GraphUnsupported, match=r"probabilities: off by"):
        graph.prepare(loaded(fm.classifier(), tmp_path), CARD)


def test_a_size_that_does_not_run_is_named(tmp_path: Path) -> None:
    model = loaded(fm.detector("yolov8"), tmp_path)
    with pytest.raises(GraphUnsupported, match="ONNX Runtime does not run"):
        graph.output_shapes(model, {"image": (1, 4, 64, 64)})
