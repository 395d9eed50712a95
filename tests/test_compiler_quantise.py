"""Ranges are what was seen, the Q/DQ graph is close to the float one, and what must stay in float does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from appliance import backends
from appliance.backends import Signature, Tensor
from appliance.compiler.quantise import float_nodes, measure_ranges, quantise
from appliance.errors import CalibrationInvalid

SIDE = 24
node = helper.make_node


def _net(spoil: float | None = None) -> Any:
    """Convolution, ReLU6, depthwise convolution, ReLU6, addition, 1x1 head: the shape of the families' networks, small."""
    rng = np.random.default_rng(4)
    arrays = {
        "w1": rng.normal(0, 1.2, (8, 1, 3, 3)),
        "b1": rng.normal(0, 0.5, 8),
        "w2": rng.normal(0, 0.4, (8, 1, 3, 3)),
        "b2": rng.normal(0, 0.2, 8),
        "w3": rng.normal(0, 0.4, (3, 8, 1, 1)),
        "b3": rng.normal(0, 0.2, 3),
        "zero": np.array(0.0),
        "six": np.array(6.0),
    }
    # Channels of very different size: one scale for all of them would lose the small one.
    arrays["w1"][0] *= 0.02
    if spoil is not None:
        arrays["w2"][0, 0, 1, 1] = spoil
    nodes = [
        node("Conv", ["image", "w1", "b1"], ["c1"], name="c1", pads=[1, 1, 1, 1], strides=[2, 2]),
        node("Clip", ["c1", "zero", "six"], ["r1"], name="r1"),
        node("Conv", ["r1", "w2", "b2"], ["c2"], name="c2", pads=[1, 1, 1, 1], group=8),
        node("Clip", ["c2", "zero", "six"], ["r2"], name="r2"),
        node("Add", ["r1", "r2"], ["sum"], name="sum"),
        node("Conv", ["sum", "w3", "b3"], ["logits"], name="head"),
    ]
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 1, SIDE, SIDE])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, 3, SIDE // 2, SIDE // 2])],
        [numpy_helper.from_array(np.asarray(a, np.float32), n) for n, a in arrays.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(model)
    return model


def _images(count: int = 6, seed: int = 0) -> Iterator[np.ndarray]:
    rng = np.random.default_rng(seed)
    for _ in range(count):
        yield rng.uniform(-1, 1, (1, 1, SIDE, SIDE)).astype(np.float32)


def _all(model: Any, image: np.ndarray) -> list[np.ndarray]:
    options = ort.SessionOptions()
    # Without VNNI the fast u8 x s8 kernels of x86 saturate in 16 bits; what is judged here is the graph.
    options.add_session_config_entry("session.x64quantprecision", "1")
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return [np.asarray(v) for v in session.run(None, {"image": image})]


def _run(model: Any, image: np.ndarray) -> np.ndarray:
    return _all(model, image)[0]


@cache
def _both() -> tuple[Any, Any, float]:
    model = _net()
    quantised, share = quantise(model, measure_ranges(model, _images()))
    return model, quantised, share


def test_ranges_are_the_extremes_over_all_images() -> None:
    model = _net()
    seen: list[np.ndarray] = []
    calls = 0

    def count() -> None:
        nonlocal calls
        calls += 1

    def images() -> Iterator[np.ndarray]:
        for x in _images():
            seen.append(x)
            yield x

    ranges = measure_ranges(model, images(), count)
    assert calls == len(seen) == 6
    assert ranges["image"] == (float(min(x.min() for x in seen)), float(max(x.max() for x in seen)))
    logits = [_run(model, x) for x in seen]
    assert ranges["logits"] == pytest.approx((min(v.min() for v in logits), max(v.max() for v in logits)), abs=1e-4)
    assert ranges["r1"][0] >= 0
    assert ranges["r1"][1] <= 6
    assert ranges["c1"][0] < 0


def test_the_quantised_network_answers_nearly_the_same() -> None:
    model, quantised, _ = _both()
    for image in _images(4, seed=9):
        expected, got = _run(model, image), _run(quantised, image)
        spread = float(expected.max() - expected.min())
        assert float(np.abs(got - expected).max()) < 0.04 * spread
        assert float(np.abs(got - expected).mean()) < 0.01 * spread
        assert not np.array_equal(got, expected)
        assert float((got.argmax(1) == expected.argmax(1)).mean()) > 0.95


def test_relu6_has_become_the_range_of_its_pair() -> None:
    _, quantised, _ = _both()
    kinds = [n.op_type for n in quantised.graph.node]
    assert "Clip" not in kinds
    assert kinds.count("Conv") == 3
    assert kinds.count("QuantizeLinear") >= 4


def test_weights_are_s8_for_each_channel_and_activations_u8() -> None:
    _, quantised, _ = _both()
    tensors = {t.name: t for t in quantised.graph.initializer}
    makers = {o: n for n in quantised.graph.node for o in n.output}
    for name in ("c1", "c2"):
        conv = next(n for n in quantised.graph.node if n.name == name)
        weight = makers[conv.input[1]]
        assert weight.op_type == "DequantizeLinear"
        assert tensors[weight.input[0]].data_type == TensorProto.INT8
        assert numpy_helper.to_array(tensors[weight.input[1]]).shape == (8,)
        assert not numpy_helper.to_array(tensors[weight.input[2]]).any()
        activation = makers[conv.input[0]]
        assert activation.op_type == "DequantizeLinear"
        assert tensors[activation.input[2]].data_type == TensorProto.UINT8


def test_what_makes_an_output_stays_in_float() -> None:
    model, quantised, share = _both()
    assert float_nodes(model) == ["head"]
    makers = {o: n for n in quantised.graph.node for o in n.output}
    head = makers["logits"]
    assert head.op_type == "Conv"
    assert head.input[1] not in makers
    np.testing.assert_array_equal(
        numpy_helper.to_array(next(t for t in quantised.graph.initializer if t.name == head.input[1])),
        numpy_helper.to_array(next(t for t in model.graph.initializer if t.name == "w3")),
    )
    assert share == pytest.approx(24 / (72 + 72 + 24))


def test_an_unnamed_node_that_makes_an_output_stays_in_float_too() -> None:
    model = _net()
    for n in model.graph.node:
        n.name = ""
    quantised, share = quantise(model, measure_ranges(model, _images()))
    makers = {o: n for n in quantised.graph.node for o in n.output}
    assert makers["logits"].op_type == "Conv"
    assert makers["logits"].input[1] not in makers
    assert share == pytest.approx(24 / 168)


def test_the_same_twice_gives_the_same_bytes() -> None:
    blobs = []
    for _ in range(2):
        model = _net()
        quantised, _ = quantise(model, measure_ranges(model, _images()))
        blobs.append(quantised.SerializeToString(deterministic=True))
    assert blobs[0] == blobs[1]


@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
def test_every_runtime_opens_the_one_graph_and_agrees(target: str) -> None:
    model, quantised, _ = _both()
    signature = Signature((Tensor("image", (1, 1, SIDE, SIDE)),), (Tensor("logits", (1, 3, SIDE // 2, SIDE // 2)),))
    module = backends.load(target)
    session = module.open(module.build(quantised.SerializeToString()), signature, precision="int8", threads=1)
    for image in _images(2, seed=5):
        expected = _run(model, image)
        spread = float(expected.max() - expected.min())
        assert float(np.abs(session.run({"image": image})["logits"] - expected).max()) < 0.04 * spread
    session.close()


def test_no_image_measures_nothing() -> None:
    with pytest.raises(CalibrationInvalid, match="at least one image"):
        measure_ranges(_net(), iter(()))


@pytest.mark.parametrize("spoil", [float("nan"), float("inf")])
def test_a_broken_network_is_refused(spoil: float) -> None:
    with pytest.raises(CalibrationInvalid, match="NaN or infinite"):
        measure_ranges(_net(spoil), _images(2))


def test_one_bad_image_among_good_ones_is_refused() -> None:
    images = list(_images(3))
    images[1][0, 0, 3, 3] = np.nan
    with pytest.raises(CalibrationInvalid, match="image holds NaN"):
        measure_ranges(_net(), images)


def test_a_failing_source_is_not_the_end_of_the_data() -> None:
    def broken() -> Iterator[np.ndarray]:
        yield next(_images(1))
        raise CalibrationInvalid("the second image is not the one of the manifest")

    source: Callable[[], Iterator[np.ndarray]] = broken
    with pytest.raises(CalibrationInvalid, match="second image"):
        measure_ranges(_net(), source())


# -- the second flavour, further operators, layers kept in float ---------------------------------------------------------


def _made_by(model: Any) -> dict[str, Any]:
    return {o: n for n in model.graph.node for o in n.output}


def test_the_symmetric_flavour_is_what_tensorrt_takes() -> None:
    """Zero points of 0, s8 on both sides, bias in float, and Q/DQ only where a layer reads."""
    model = _net()
    ranges = measure_ranges(model, _images())
    quantised, share = quantise(model, ranges, flavour="symmetric")
    tensors = {t.name: numpy_helper.to_array(t) for t in quantised.graph.initializer}
    makers = _made_by(quantised)
    for n in quantised.graph.node:
        if n.op_type in ("QuantizeLinear", "DequantizeLinear"):
            assert tensors[n.input[2]].dtype == np.int8
            assert not tensors[n.input[2]].any()
    convolutions = [n for n in quantised.graph.node if n.op_type == "Conv" and n.name != "head"]
    assert len(convolutions) == 2
    for n in convolutions:
        assert makers[n.input[0]].op_type == makers[n.input[1]].op_type == "DequantizeLinear"
        assert tensors[n.input[2]].dtype == np.float32
    reads = {n.input[0] for n in quantised.graph.node if n.op_type == "QuantizeLinear"}
    assert not reads & {"c1", "c2", "r2", "sum"}
    image_scale = tensors[next(n for n in quantised.graph.node if n.op_type == "QuantizeLinear" and n.input[0] == "image").input[1]]
    assert float(image_scale) == pytest.approx(max(map(abs, ranges["image"])) / 127, rel=0.01)
    assert share == pytest.approx(24 / 168)
    for image in _images(2, seed=9):
        expected = _run(model, image)
        assert float(np.abs(_run(quantised, image) - expected).max()) < 0.05 * float(np.ptp(expected))


def test_a_layer_that_is_kept_stays_in_float_with_what_adds_to_it() -> None:
    model = _net()
    ranges = measure_ranges(model, _images())
    quantised, share = quantise(model, ranges, keep_float=("c2",))
    makers = _made_by(quantised)
    conv = next(n for n in quantised.graph.node if n.name == "c2")
    assert conv.input[1] not in makers
    assert makers["r2"].op_type == "Clip"
    assert not {n.input[0] for n in quantised.graph.node if n.op_type == "QuantizeLinear"} & {"r2", "sum"}
    assert share == pytest.approx((24 + 72) / 168)
    everything, _ = quantise(model, ranges)
    errors = [float(np.abs(_run(q, x) - _run(model, x)).mean()) for q in (everything, quantised) for x in _images(1, seed=2)]
    assert errors[1] < errors[0]


def _odd_net(opset: int = 18) -> Any:
    """What strangers' graphs hold: a stored constant behind a node, shared weights, SiLU, ConvTranspose, pooling, Split, an operator
    without an 8-bit form, an inner tensor that is an output too, Gemm, MatMul with a bias of its own, unnamed nodes."""
    rng = np.random.default_rng(5)
    arrays = {
        "w": rng.normal(0, 0.5, (4, 4, 3, 3)),
        "wt": rng.normal(0, 0.5, (4, 4, 2, 2)),
        "w0": rng.normal(0, 0.5, (4, 1, 3, 3)),
        "g": rng.normal(0, 0.3, (8, 4)),
        "gb": rng.normal(0, 0.3, 8),
        "m": rng.normal(0, 0.3, (8, 8)),
        "mb": rng.normal(0, 0.3, 8),
        "m2": rng.normal(0, 0.3, (8, 3)),
    }
    halves = numpy_helper.from_array(np.array([2, 2], np.int64), "halves")
    nodes = [
        node("Constant", [], ["two"], value=numpy_helper.from_array(np.array(2.0, np.float32))),
        node("Conv", ["image", "w0"], ["a"], pads=[1, 1, 1, 1]),
        node("Sigmoid", ["a"], ["s"]),
        node("Mul", ["a", "s"], ["silu"]),
        node("MaxPool", ["silu"], ["p"], kernel_shape=[2, 2], strides=[2, 2]),
        node("Conv", ["p", "w"], ["b"], pads=[1, 1, 1, 1]),
        node("HardSwish", ["b"], ["h"]),
        node("Conv", ["h", "w"], ["c"], pads=[1, 1, 1, 1]),
        node("LeakyRelu", ["c"], ["lr"]),
        node("Split", ["lr", "halves"], ["l", "r"], axis=1),
        node("Concat", ["r", "l"], ["cat"], axis=1),
        node("ConvTranspose", ["cat", "wt"], ["up"], strides=[2, 2]),
        node("Mul", ["up", "two"], ["scaled"]),
        node("GlobalAveragePool", ["scaled"], ["gap"]),
        node("Flatten", ["gap"], ["flat"]),
        node("Gemm", ["flat", "g", "gb"], ["hidden"], transB=1),
        node("Relu", ["hidden"], ["act"]),
        node("MatMul", ["act", "m"], ["mm"]),
        node("Add", ["mm", "mb"], ["mmb"]),
        node("MatMul", ["mmb", "m2"], ["logits"]),
        node("Softmax", ["logits"], ["scores"]),
    ]
    graph = helper.make_graph(
        nodes,
        "odd",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 1, SIDE, SIDE])],
        [
            helper.make_tensor_value_info("scores", TensorProto.FLOAT, [1, 3]),
            helper.make_tensor_value_info("lr", TensorProto.FLOAT, [1, 4, SIDE // 2, SIDE // 2]),
        ],
        [numpy_helper.from_array(np.asarray(a, np.float32), n) for n, a in arrays.items()] + [halves],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)
    onnx.checker.check_model(model)
    return model


@pytest.mark.parametrize("flavour", ["u8", "symmetric"])
def test_a_strangers_operators_do_not_stop_it(flavour: Any) -> None:
    model = _odd_net()
    before = model.SerializeToString(deterministic=True)
    quantised, share = quantise(model, measure_ranges(model, _images()), flavour=flavour)
    assert model.SerializeToString(deterministic=True) == before
    tensors = {t.name: numpy_helper.to_array(t) for t in quantised.graph.initializer}
    makers = _made_by(quantised)
    layers = [n for n in quantised.graph.node if n.op_type in ("Conv", "ConvTranspose", "Gemm", "MatMul")]
    assert len(layers) == 7
    in_eight_bits = [n for n in layers if n.input[1] in makers]
    # What makes the output `lr` is an activation of its own; the last MatMul has no layer after it.
    assert [n.op_type for n in layers if n not in in_eight_bits] == ["MatMul"]
    for n in in_eight_bits:
        assert tensors[makers[n.input[1]].input[1]].size > 1
    assert 0 < share < 0.2
    for image in _images(3, seed=9):
        for got, want in zip(_all(quantised, image), _all(model, image), strict=True):
            assert float(np.abs(got - want).max()) < 0.25 * float(np.ptp(want)) + 1e-3


def test_an_output_that_inner_nodes_read_is_not_rounded_for_them() -> None:
    model = _odd_net()
    quantised, _ = quantise(model, measure_ranges(model, _images()))
    assert _made_by(quantised)["lr"].op_type == "LeakyRelu"


def test_a_graph_of_an_older_opset_is_raised() -> None:
    model = _net()
    model.opset_import[0].version = 12
    quantised, _ = quantise(model, measure_ranges(model, _images()))
    assert quantised.graph.node
    assert next(o.version for o in quantised.opset_import if o.domain == "") >= 13


def test_a_tensor_that_calibration_never_saw_stays_in_float() -> None:
    model = _net()
    ranges = measure_ranges(model, _images())
    del ranges["sum"]
    quantised, _ = quantise(model, ranges)
    assert "sum" not in {n.input[0] for n in quantised.graph.node if n.op_type == "QuantizeLinear"}
