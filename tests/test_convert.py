"""From the float graph to other runtimes: what a converter may change, and how each change is found out."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from appliance.backends import Signature, Tensor, onnxruntime, tflite
from appliance.backends._sealed import unseal
from appliance.compiler import convert, downgrade, toolchain
from appliance.compiler.signature import signature_of
from appliance.errors import CalibrationInvalid, ConverterFailed, GraphUnsupported

sys.path.insert(0, str(Path(__file__).parent / "conformance"))
from small_graph import HERE, SIGNATURE, an_image, deeper_model, engines, small_model

RNG = np.random.default_rng(8)


def graph(nodes: list[Any], inputs: dict[str, list[int]], outputs: dict[str, list[int]], opset: int = 18, **stored: Any) -> Any:
    def info(shapes: dict[str, list[int]]) -> list[Any]:
        return [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in shapes.items()]

    tensors = [numpy_helper.from_array(np.asarray(v), n) for n, v in stored.items()]
    model = helper.make_model(
        helper.make_graph(nodes, "g", info(inputs), info(outputs), tensors), opset_imports=[helper.make_opsetid("", opset)], ir_version=10
    )
    onnx.checker.check_model(model)
    return model


def square() -> Any:
    """4 x 4 maps of 4 classes: no shape tells rows from channels. With logits like the fused class activation map."""
    nodes = [
        helper.make_node("Conv", ["image", "w0"], ["c0"], name="first", pads=[1, 1, 1, 1], strides=[2, 2]),
        helper.make_node("Clip", ["c0", "zero", "six"], ["f"], name="relu6"),
        helper.make_node("Conv", ["f", "w1"], ["cam"], name="cam"),
        helper.make_node("ReduceMean", ["cam", "axes"], ["pooled"], name="pool", keepdims=0),
        helper.make_node("Add", ["pooled", "bias"], ["logits"], name="add"),
    ]
    rng = np.random.default_rng(4)
    weights = {"w0": rng.normal(size=(8, 1, 3, 3)).astype(np.float32), "w1": rng.normal(size=(4, 8, 1, 1)).astype(np.float32)}
    rest = {"axes": np.array([2, 3]), "bias": rng.normal(size=4).astype(np.float32), "zero": np.float32(0), "six": np.float32(6)}
    return graph(nodes, {"image": [1, 1, 8, 8]}, {"logits": [1, 4], "cam": [1, 4, 4, 4]}, **weights, **rest)


def images(count: int, shape: tuple[int, ...] = (1, 1, 8, 8)) -> Iterator[np.ndarray]:
    return (np.random.default_rng(i).uniform(-1, 1, shape).astype(np.float32) for i in range(count))


def answers(model: Any, feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return onnxruntime.open(model.SerializeToString(), signature_of(model), precision="f32", threads=1).run(feed)


# -- down to opset 13 -----------------------------------------------------------------------------------------------

IMAGE = {"image": [1, 2, 6, 6]}
NEWER = {
    "reduce over stored axes": graph(
        [helper.make_node("ReduceMean", ["image", "axes"], ["y"], name="n", keepdims=0)], IMAGE, {"y": [1, 2]}, axes=np.array([2, -1])
    ),
    "reduce over everything": graph([helper.make_node("ReduceMax", ["image"], ["y"], name="n", keepdims=1)], IMAGE, {"y": [1, 1, 1, 1]}),
    "resize": graph(
        [
            helper.make_node(
                "Resize",
                ["image", "", "scales"],
                ["y"],
                name="n",
                mode="nearest",
                antialias=0,
                nearest_mode="floor",
                coordinate_transformation_mode="asymmetric",
            )
        ],
        IMAGE,
        {"y": [1, 2, 12, 12]},
        scales=np.array([1, 1, 2, 2], np.float32),
    ),
    "split": graph(
        [
            helper.make_node("Split", ["image"], ["a", "b"], name="n", axis=1, num_outputs=2),
            helper.make_node("Sub", ["a", "b"], ["y"], name="m"),
        ],
        IMAGE,
        {"y": [1, 1, 6, 6]},
    ),
    "hard sigmoid": graph(
        [
            helper.make_node("HardSigmoid", ["image"], ["a"], name="n", alpha=0.3),
            helper.make_node("HardSigmoid", ["a"], ["b"], beta=0.1),
            helper.make_node("HardSwish", ["b"], ["y"], name="m"),
        ],
        IMAGE,
        {"y": [1, 2, 6, 6]},
    ),
    "hard swish": graph([helper.make_node("HardSwish", ["image"], ["y"], name="n")], IMAGE, {"y": [1, 2, 6, 6]}),
    "average pool": graph(
        [helper.make_node("AveragePool", ["image"], ["y"], name="n", kernel_shape=[2, 2], dilations=[1, 1])],
        IMAGE,
        {"y": [1, 2, 5, 5]},
        opset=19,
    ),
    "reshape": graph(
        [helper.make_node("Reshape", ["image", "shape"], ["y"], name="n", allowzero=0)], IMAGE, {"y": [1, 72]}, shape=np.array([0, -1])
    ),
    "class activation map": square(),
}


@pytest.mark.parametrize("model", NEWER.values(), ids=NEWER.keys())
def test_a_newer_graph_means_the_same_at_opset_13(model: Any) -> None:
    older = downgrade.to_opset13(model)
    onnx.checker.check_model(older)
    assert older.opset_import[0].version == 13
    shape = signature_of(model).inputs[0].shape
    feed = {"image": RNG.normal(scale=3, size=shape).astype(np.float32)}
    wanted, found = answers(model, feed), answers(older, feed)
    for name, values in wanted.items():
        np.testing.assert_allclose(found[name], values, atol=1e-6)
    assert not {"HardSwish", "HardSigmoid"} & {n.op_type for n in older.graph.node}  # Movidius has neither


REFUSED = {
    "an operator that came later": ([helper.make_node("Gelu", ["image"], ["y"], name="bad")], 20, {}),
    "antialiasing": (
        [helper.make_node("Resize", ["image", "", "", "sizes"], ["y"], name="bad", mode="linear", antialias=1)],
        18,
        {"sizes": np.array([1, 2, 6, 6])},
    ),
    "resize over some axes": (
        [helper.make_node("Resize", ["image", "", "", "sizes"], ["y"], name="bad", axes=[2, 3])],
        18,
        {"sizes": np.array([6, 6])},
    ),
    "pad over some axes": (
        [helper.make_node("Pad", ["image", "pads", "", "axes"], ["y"], name="bad")],
        18,
        {"pads": np.array([0, 0]), "axes": np.array([2])},
    ),
    "pad that wraps": ([helper.make_node("Pad", ["image", "pads"], ["y"], name="bad", mode="wrap")], 19, {"pads": np.zeros(8, np.int64)}),
    "reduce over computed axes": (
        [
            helper.make_node("Cast", ["floats"], ["axes"], name="c", to=TensorProto.INT64),
            helper.make_node("ReduceMean", ["image", "axes"], ["y"], name="bad"),
        ],
        18,
        {"floats": np.array([3.0], np.float32)},
    ),
    "reduce over nothing": ([helper.make_node("ReduceMean", ["image"], ["y"], name="bad", noop_with_empty_axes=1)], 18, {}),
    "reshape to zero": (
        [helper.make_node("Reshape", ["image", "shape"], ["y"], name="bad", allowzero=1)],
        18,
        {"shape": np.array([1, 2, 6, 6])},
    ),
}


@pytest.mark.parametrize(("nodes", "opset", "stored"), REFUSED.values(), ids=REFUSED.keys())
def test_what_has_no_older_form_is_refused_by_its_node(nodes: list[Any], opset: int, stored: dict[str, Any]) -> None:
    with pytest.raises(GraphUnsupported) as caught:
        downgrade.to_opset13(graph(nodes, IMAGE, {"y": [1, 2, 6, 6]}, opset=opset, **stored))
    if "noop_with_empty_axes" not in str(nodes):
        assert caught.value.value == "bad"


def test_an_old_graph_stays_as_it_is_and_too_old_a_one_is_refused() -> None:
    model = small_model()
    assert list(downgrade.to_opset13(model).graph.node) == list(model.graph.node)
    model.opset_import[0].version = 9
    with pytest.raises(GraphUnsupported, match="too old"):
        downgrade.to_opset13(model)


# -- half precision -------------------------------------------------------------------------------------------------


def test_half_precision_rounds_the_weights_and_keeps_the_border() -> None:
    model = downgrade.to_opset13(square())
    half = downgrade.to_half(model)
    onnx.checker.check_model(half, full_check=True)
    assert signature_of(half) == signature_of(model)
    assert {t.data_type for t in half.graph.initializer} == {TensorProto.FLOAT16}
    feed = {"image": next(images(1))}
    wanted, found = answers(model, feed), answers(half, feed)
    for name, values in wanted.items():
        assert not np.array_equal(found[name], values)
        np.testing.assert_allclose(found[name], values, atol=0.02)


def test_a_scale_of_resize_stays_float32() -> None:
    half = downgrade.to_half(downgrade.to_opset13(NEWER["resize"]))
    assert [t.data_type for t in half.graph.initializer] == [TensorProto.FLOAT]
    onnx.checker.check_model(half, full_check=True)


def test_a_weight_that_half_precision_cannot_hold_is_refused_by_name() -> None:
    model = small_model()
    weights = numpy_helper.to_array(model.graph.initializer[0]).copy()
    weights[0, 0, 0, 0] = 1e6
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(weights, "w"))
    with pytest.raises(GraphUnsupported, match="half precision") as caught:
        downgrade.to_half(model)
    assert caught.value.value == "w"


# -- places and layouts ---------------------------------------------------------------------------------------------


def test_layouts_of_equal_sides_are_told_apart_by_value() -> None:
    tensor = Tensor("cam", (1, 4, 4, 4))
    wanted = RNG.normal(size=tensor.shape).astype(np.float32)
    for axes in [(0, 1, 2, 3), (0, 2, 3, 1), (0, 3, 2, 1)]:
        found = convert._match_outputs([tensor], ["x"], [[wanted.transpose(axes)]], [{"cam": wanted}], {})
        assert found == [{"name": "cam", "shape": [1, 4, 4, 4], "index": 0, "axes": list(axes)}]


def test_outputs_that_were_renamed_and_reordered_are_found() -> None:
    tensors = [Tensor("a", (1, 3)), Tensor("b", (1, 3))]
    a, b = RNG.normal(size=(2, 1, 3)).astype(np.float32)
    found = convert._match_outputs(tensors, ["Identity", "Identity_1"], [[b, a]], [{"a": a, "b": b}], {})
    assert found is not None
    assert [(e["name"], e["index"]) for e in found] == [("a", 1), ("b", 0)]


def test_an_output_that_is_nowhere_is_missed() -> None:
    a = RNG.normal(size=(1, 3)).astype(np.float32)
    for other in (a + 0.1, np.full_like(a, np.nan), np.zeros((1, 4), np.float32)):
        assert convert._match_outputs([Tensor("a", (1, 3))], ["a"], [[other]], [{"a": a}], {}) is None


# -- TensorFlow Lite ------------------------------------------------------------------------------------------------


def test_without_its_toolchain_a_target_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for ask in (
        lambda: convert.to_tflite_f32(small_model(), SIGNATURE),
        lambda: convert.to_myriad(small_model()),
        lambda: convert.tensorrt_gate(b""),
    ):
        with pytest.raises(ConverterFailed) as caught:
            ask()
        assert "make toolchains" in caught.value.remedy


def swapped(monkeypatch: pytest.MonkeyPatch, flat: bytes) -> None:
    """As if the converter had answered `flat`."""
    monkeypatch.setattr(toolchain, "call", lambda *a, **k: toolchain.Answer({}, {"model.tflite": flat}))


def flatbuffer(name: str) -> bytes:
    return unseal(tflite.MAGIC, (HERE / name).read_bytes(), "test")[1]["tflite"]


def test_a_conversion_that_computes_something_else_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    swapped(monkeypatch, flatbuffer("small.f32.tflite"))
    assert convert.to_tflite_f32(small_model(), SIGNATURE) == (HERE / "small.f32.tflite").read_bytes()
    other = small_model()
    other.graph.initializer[1].CopyFrom(numpy_helper.from_array(numpy_helper.to_array(other.graph.initializer[1]) + 0.5, "b"))
    with pytest.raises(ConverterFailed, match="other values"):
        convert.to_tflite_f32(other, SIGNATURE)
    for flat in (b"", bytes(500)):
        swapped(monkeypatch, flat)
        with pytest.raises(ConverterFailed, match="cannot open"):
            convert.to_tflite_f32(small_model(), SIGNATURE)


def test_quantising_needs_sound_images_of_one_input(monkeypatch: pytest.MonkeyPatch) -> None:
    swapped(monkeypatch, flatbuffer("small.f32.tflite"))
    with pytest.raises(CalibrationInvalid, match="at least one"):
        convert.to_tflite(small_model(), lambda: iter(()), SIGNATURE)
    with pytest.raises(CalibrationInvalid, match="NaN"):
        convert.to_tflite(small_model(), lambda: iter([np.full((1, 1, 12, 10), np.nan, np.float32)]), SIGNATURE)
    with pytest.raises(ConverterFailed, match="not in the graph") as caught:
        convert.to_tflite(small_model(), lambda: iter([an_image(1)]), SIGNATURE, keep_float=["conv", "nowhere"])
    assert caught.value.value == "nowhere"
    with pytest.raises(GraphUnsupported, match="one input"):
        convert.to_tflite(small_model(), lambda: iter(()), Signature(SIGNATURE.inputs * 2, SIGNATURE.outputs))


def test_an_output_that_int8_has_lost_is_caught() -> None:
    blob = (HERE / "small.int8.tflite").read_bytes()
    convert._sensible(blob, deeper_model(), SIGNATURE, lambda: (an_image(i) for i in range(4)))
    with pytest.raises(ConverterFailed, match="lost an output"):
        convert._sensible(blob, small_model(), SIGNATURE, lambda: (an_image(i) for i in range(4)))


def _types(blob: bytes) -> dict[str, str]:
    """Tensor of the flatbuffer -> its type."""
    interpreter = convert._interpreter(unseal(tflite.MAGIC, blob, "test")[1]["tflite"])
    return {d["name"]: d["dtype"].__name__ for d in interpreter.get_tensor_details()}


@pytest.mark.toolchain("onnx2tf")
def test_the_committed_engines_are_what_the_converter_makes_today() -> None:
    for name, blob in engines().items():
        assert blob == (HERE / name).read_bytes(), f"{name}: python tests/conformance/small_graph.py writes it anew"


@pytest.mark.toolchain("onnx2tf")
def test_a_square_map_comes_back_in_its_layout_and_heads_stay_float(monkeypatch: pytest.MonkeyPatch) -> None:
    model = square()
    signature = signature_of(model)
    exact = convert.to_tflite_f32(model, signature)
    assert min(convert.sqnr_db(exact, model, signature, images(4)).values()) > 90
    swapped(monkeypatch, unseal(tflite.MAGIC, exact, "test")[1]["tflite"])  # converting once is enough
    blob = convert.to_tflite(model, lambda: images(16), signature)
    assert convert.to_tflite(model, lambda: images(16), signature) == blob
    ratios = convert.sqnr_db(blob, model, signature, images(4))
    assert 20 < min(ratios.values()) < 45
    types = _types(blob)
    assert types["cam"] == types["logits"] == "float32"
    assert sum(t == "int8" for n, t in types.items() if n.endswith("filter")) == 1  # the first convolution, not the head
    for keep in ("first", "relu6"):  # fused into one operator: either name means it
        kept = convert.to_tflite(model, lambda: images(16), signature, keep_float=[keep])
        assert not any(t == "int8" for n, t in _types(kept).items() if n.endswith("filter"))
        assert min(convert.sqnr_db(kept, model, signature, images(4)).values()) > min(ratios.values()) + 3  # the image is still rounded


def shown() -> Any:
    """A segmenter's end: the logits are read by the sigmoid and given out as evidence too."""
    nodes = [
        helper.make_node("ConvTranspose", ["image", "w"], ["logits"], name="up", kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Sigmoid", ["logits"], ["y"], name="sigmoid"),
        helper.make_node("Identity", ["logits"], ["evidence"], name="shown"),
    ]
    shape = [1, 1, 12, 12]
    return graph(nodes, IMAGE, {"y": shape, "evidence": shape}, w=RNG.normal(size=(2, 1, 2, 2)).astype(np.float32))


def test_a_graph_that_reads_what_nothing_makes_is_converted_another_way(monkeypatch: pytest.MonkeyPatch) -> None:
    from ai_edge_litert.tools.flatbuffer_utils import convert_object_to_bytearray
    from ai_edge_quantizer.utils.tfl_flatbuffer_utils import read_model

    parsed = read_model(flatbuffer("small.f32.tflite"))
    made = {int(o) for op in parsed.subgraphs[0].operators for o in op.outputs}
    lost = next(op for op in parsed.subgraphs[0].operators if int(op.inputs[0]) in made).inputs[0]
    assert convert._never_made(flatbuffer("small.f32.tflite")) == []
    name = parsed.subgraphs[0].tensors[lost].name.decode()
    for op in parsed.subgraphs[0].operators:
        op.outputs = [o if o != lost else parsed.subgraphs[0].outputs[0] for o in op.outputs]
    broken = bytes(convert_object_to_bytearray(parsed))
    asked: list[Any] = []
    given = [broken, flatbuffer("small.f32.tflite")]

    def call(*a: Any, files: dict[str, bytes], **k: Any) -> toolchain.Answer:
        asked.append(onnx.load_model_from_string(files["model.onnx"]))
        return toolchain.Answer({}, {"model.tflite": given[len(asked) - 1]})

    monkeypatch.setattr(toolchain, "call", call)
    model = shown()
    assert convert._flatbuffer(model) == given[1]
    assert [n.op_type for n in asked[0].graph.node] == ["ConvTranspose", "Sigmoid", "Identity"]
    assert [n.op_type for n in asked[1].graph.node] == ["ConvTranspose", "Sigmoid", "Mul"]
    feed = {"image": RNG.normal(size=(1, 2, 6, 6)).astype(np.float32)}
    for key, values in answers(model, feed).items():
        np.testing.assert_array_equal(answers(asked[1], feed)[key], values)
    asked.clear()
    given[1] = broken
    with pytest.raises(ConverterFailed, match="nothing makes") as caught:
        convert._flatbuffer(model)
    assert caught.value.value == name


@pytest.mark.toolchain("onnx2tf")
def test_logits_that_are_evidence_too_survive_onnx2tf() -> None:
    model = shown()
    exact = convert.to_tflite_f32(model, signature_of(model))
    assert min(convert.sqnr_db(exact, model, signature_of(model), images(4, (1, 2, 6, 6))).values()) > 90


@pytest.mark.toolchain("onnx2tf")
def test_a_graph_that_onnx2tf_cannot_convert_is_a_failure_with_its_words() -> None:
    with pytest.raises(ConverterFailed, match=r"to_tflite\.py ended with 1: .+"):
        toolchain.call("onnx2tf", "to_tflite.py", {}, files={"model.onnx": b"not a model"})


# -- Movidius, TensorRT ---------------------------------------------------------------------------------------------


@pytest.mark.toolchain("myriad")
def test_the_movidius_plugin_takes_every_layer_of_the_fused_map() -> None:
    blob = convert.to_myriad(square())
    assert convert.to_myriad(square()) == blob
    told = convert.myriad_query(blob)
    assert told["passed"]
    assert told["supported"] == told["layers"] > 3
    assert told["runtime"].startswith("2021.4.2")


@pytest.mark.toolchain("myriad")
def test_a_layer_that_the_stick_cannot_is_named() -> None:
    nodes = [helper.make_node("Erf", ["image"], ["e"], name="erf"), helper.make_node("Mul", ["e", "image"], ["y"], name="mul")]
    told = convert.myriad_query(convert.to_myriad(graph(nodes, IMAGE, {"y": [1, 2, 6, 6]})))
    assert told["passed"] is (not told["unsupported"])
    assert told["layers"] == told["supported"] + len(told["unsupported"])


def q_dq(weight_type: type, activation_type: type, bias: bool) -> bytes:
    """One convolution between Q and DQ; `bias` as Int32 behind DQ, the way CPU runtimes like it."""
    zero = {"ws": np.float32(0.1), "as": np.float32(0.05), "bs": np.float32(0.005)}
    stored: dict[str, Any] = {**zero, "wz": weight_type(0), "az": activation_type(0), "bz": np.int32(0)}
    stored["w"] = RNG.integers(-100, 100, (3, 1, 3, 3)).astype(weight_type)
    stored["b"] = np.arange(3, dtype=np.int32) if bias else np.arange(3, dtype=np.float32)
    nodes = [
        helper.make_node("QuantizeLinear", ["image", "as", "az"], ["q"], name="q"),
        helper.make_node("DequantizeLinear", ["q", "as", "az"], ["d"], name="d"),
        helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["dw"], name="dw"),
        *([helper.make_node("DequantizeLinear", ["b", "bs", "bz"], ["db"], name="bias_of_conv")] if bias else []),
        helper.make_node("Conv", ["d", "dw", "db" if bias else "b"], ["y"], name="conv", pads=[1, 1, 1, 1]),
    ]
    return bytes(graph(nodes, {"image": [1, 1, 8, 8]}, {"y": [1, 3, 8, 8]}, opset=13, **stored).SerializeToString())


@pytest.mark.toolchain("tensorrt-rtx")
def test_tensorrt_parses_and_builds_the_symmetric_flavour() -> None:
    told = convert.tensorrt_gate(q_dq(np.int8, np.int8, bias=False))
    assert told["passed"]
    assert told["engine_bytes"] > 1000
    assert told["platform"] == "SM86"
    assert told["layer_types"]["QUANTIZE"] == 1
    assert told["layer_types"]["CONVOLUTION"] == 1
    json.dumps(told)


@pytest.mark.toolchain("tensorrt-rtx")
def test_tensorrt_refuses_the_cpu_flavour_and_names_the_node() -> None:
    with pytest.raises(GraphUnsupported, match="TensorRT") as caught:
        convert.tensorrt_gate(q_dq(np.int8, np.int8, bias=True))
    assert "bias_of_conv" in caught.value.value
    with pytest.raises(GraphUnsupported, match="parse"):
        convert.tensorrt_gate(b"not a model")


def test_a_converted_graph_that_does_not_run_is_the_converters_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """LiteRT says RuntimeError; whoever compiles hears of a converter, and the other targets go on."""

    def dies(*arguments: object) -> None:
        raise RuntimeError("Input tensor 576 lacks data\nNode number 3")

    monkeypatch.setattr(convert, "_flatbuffer", lambda model: b"")
    monkeypatch.setattr(convert, "_ports", dies)
    with pytest.raises(ConverterFailed, match="the TFLite graph does not run: Input tensor 576 lacks data"):
        convert.to_tflite_f32(None, None)  # type: ignore[arg-type]
