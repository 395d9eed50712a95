"""The map goes into the graph, the logits stay what they were, and a head it cannot explain is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from appliance.compiler import heatmap
from appliance.compiler.heatmap import CAM, attach, attach_cam, map_nodes
from appliance.errors import GraphUnsupported

CHANNELS, CLASSES, SIDE = 6, 4, 16
RNG = np.random.default_rng(11)
CONV = RNG.normal(size=(CHANNELS, 1, 3, 3)).astype(np.float32)
WEIGHT = RNG.normal(size=(CLASSES, CHANNELS)).astype(np.float32)
BIAS = RNG.normal(size=CLASSES).astype(np.float32)
FLAT = np.array([-1, CHANNELS], np.int64)
AXES = np.array([2, 3], np.int64)
node = helper.make_node


def _net(head: list[onnx.NodeProto], extra: dict[str, np.ndarray] | None = None, outputs: tuple[str, ...] = ("logits",)) -> Any:
    nodes = [
        node("Conv", ["image", "conv.w"], ["conv"], name="conv", pads=[1, 1, 1, 1], strides=[2, 2]),
        node("Relu", ["conv"], ["features"], name="relu"),
        *head,
    ]
    arrays = {"conv.w": CONV, "w": WEIGHT, "wt": np.ascontiguousarray(WEIGHT.T), "b": BIAS, "flat": FLAT, "axes": AXES, **(extra or {})}
    used = {i for n in nodes for i in n.input}
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 1, SIDE, SIDE])],
        [helper.make_tensor_value_info(o, TensorProto.FLOAT, [1, CLASSES if o == "logits" else CHANNELS]) for o in outputs],
        [numpy_helper.from_array(a, n) for n, a in arrays.items() if n in used],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(model)
    return model


def _mean(**attributes: Any) -> onnx.NodeProto:
    return node("ReduceMean", ["features", "axes"], ["pooled"], name="pool", **attributes)


GAP = node("GlobalAveragePool", ["features"], ["gap"], name="pool")
HEADS: dict[str, Callable[[], Any]] = {
    "ReduceMean, Gemm": lambda: _net([_mean(keepdims=0), node("Gemm", ["pooled", "w", "b"], ["logits"], transB=1)]),
    "ReduceMean over negative axes": lambda: _net(
        [_mean(keepdims=0), node("Gemm", ["pooled", "w", "b"], ["logits"], transB=1)], {"axes": np.array([-1, -2], np.int64)}
    ),
    "ReduceMean kept, Reshape, Gemm untransposed": lambda: _net(
        [_mean(keepdims=1), node("Reshape", ["pooled", "flat"], ["r"]), node("Gemm", ["r", "wt", "b"], ["logits"])]
    ),
    "GlobalAveragePool, Flatten, Gemm": lambda: _net(
        [GAP, node("Flatten", ["gap"], ["f"], axis=1), node("Gemm", ["f", "w", "b"], ["logits"], transB=1)]
    ),
    "GlobalAveragePool, Squeeze, MatMul, Add": lambda: _net(
        [GAP, node("Squeeze", ["gap", "axes"], ["s"]), node("MatMul", ["s", "wt"], ["m"]), node("Add", ["m", "b"], ["logits"])]
    ),
    "Add with the bias first": lambda: _net(
        [_mean(keepdims=0), node("MatMul", ["pooled", "wt"], ["m"]), node("Add", ["b", "m"], ["logits"])]
    ),
    "no bias": lambda: _net([_mean(keepdims=0), node("Gemm", ["pooled", "w"], ["logits"], transB=1)]),
}


def _run(model: Any, image: np.ndarray) -> dict[str, np.ndarray]:
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [o.name for o in session.get_outputs()]
    return dict(zip(names, session.run(names, {"image": image}), strict=True))


@pytest.mark.parametrize("name", HEADS)
def test_logits_stay_and_the_map_adds_up_to_them(name: str) -> None:
    model = HEADS[name]()
    before = model.SerializeToString()
    with_cam, bias = attach_cam(model)
    assert model.SerializeToString() == before
    onnx.checker.check_model(with_cam, full_check=True)
    image = np.random.default_rng(2).normal(size=(1, 1, SIDE, SIDE)).astype(np.float32)
    old, new = _run(model, image)["logits"], _run(with_cam, image)
    assert new["logits"].shape == old.shape == (1, CLASSES)
    np.testing.assert_allclose(new["logits"], old, atol=1e-5)
    assert new[CAM].shape == (1, CLASSES, SIDE // 2, SIDE // 2)
    np.testing.assert_allclose(new[CAM].mean((2, 3)) + np.array(bias, np.float32), new["logits"], atol=1e-5)
    np.testing.assert_allclose(bias, np.zeros(CLASSES) if name == "no bias" else BIAS, atol=1e-7)


@pytest.mark.parametrize("name", HEADS)
def test_nothing_of_the_old_head_is_left(name: str) -> None:
    with_cam, _ = attach_cam(HEADS[name]())
    kinds = [n.op_type for n in with_cam.graph.node]
    assert not set(kinds) & {"Gemm", "MatMul", "GlobalAveragePool", "Flatten", "Reshape", "Squeeze"}
    used = {i for n in with_cam.graph.node for i in n.input}
    assert all(t.name in used for t in with_cam.graph.initializer)
    assert [o.name for o in with_cam.graph.output] == ["logits", CAM]


def test_the_map_is_that_of_its_class_and_place() -> None:
    with_cam, _ = attach_cam(HEADS["ReduceMean, Gemm"]())
    image = np.zeros((1, 1, SIDE, SIDE), np.float32)
    image[0, 0, 4, 12] = 5.0
    cam = _run(with_cam, image)[CAM][0]
    padded = np.pad(image[0, 0], 1)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3))[::2, ::2]
    features = np.maximum(np.einsum("hwij,cij->chw", windows, CONV[:, 0]), 0)
    np.testing.assert_allclose(cam, np.einsum("kc,chw->khw", WEIGHT, features), atol=1e-4)


HIDDEN = {
    "w1": RNG.normal(size=(5, CHANNELS)).astype(np.float32),
    "b1": np.zeros(5, np.float32),
    "w2": RNG.normal(size=(CLASSES, 5)).astype(np.float32),
}
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "a hidden layer": (
        lambda: _net(
            [
                _mean(keepdims=0),
                node("Gemm", ["pooled", "w1", "b1"], ["h"], transB=1),
                node("Relu", ["h"], ["a"]),
                node("Gemm", ["a", "w2", "b"], ["logits"], transB=1),
            ],
            HIDDEN,
        ),
        "pooling",
    ),
    "maximum pooling": (
        lambda: _net(
            [node("GlobalMaxPool", ["features"], ["p"]), node("Flatten", ["p"], ["f"]), node("Gemm", ["f", "w", "b"], ["logits"], transB=1)]
        ),
        "pooling",
    ),
    "mean over rows only": (
        lambda: _net(
            [
                node("ReduceMean", ["features", "rows"], ["p"], keepdims=0),
                node("Flatten", ["p"], ["f"]),
                node("Gemm", ["f", "wide", "b"], ["logits"], transB=1),
            ],
            {"rows": np.array([2], np.int64), "wide": RNG.normal(size=(CLASSES, CHANNELS * SIDE // 2)).astype(np.float32)},
        ),
        "not over rows and columns",
    ),
    "a softmax at the end": (
        lambda: _net([_mean(keepdims=0), node("Gemm", ["pooled", "w", "b"], ["l"], transB=1), node("Softmax", ["l"], ["logits"])]),
        "not a linear layer",
    ),
    "a scaled product": (
        lambda: _net([_mean(keepdims=0), node("Gemm", ["pooled", "w", "b"], ["logits"], transB=1, alpha=0.5)]),
        "scales its product",
    ),
    "a sum of two things": (
        lambda: _net(
            [_mean(keepdims=0), node("Relu", ["pooled"], ["r"]), node("Add", ["r", "one"], ["logits"])],
            {"one": np.ones(CHANNELS, np.float32)},
        ),
        "not linear",
    ),
    "weights that are computed": (
        lambda: _net([_mean(keepdims=0), node("Relu", ["w"], ["w.r"]), node("Gemm", ["pooled", "w.r", "b"], ["logits"], transB=1)]),
        "computed, not stored",
    ),
    "pooled values that something else reads": (
        lambda: _net(
            [
                _mean(keepdims=0),
                node("Gemm", ["pooled", "w", "b"], ["logits"], transB=1),
                node("Relu", ["pooled"], ["embedding"], name="spy"),
            ],
            outputs=("logits", "embedding"),
        ),
        "something else reads",
    ),
    "pooled values that are an output themselves": (
        lambda: _net([_mean(keepdims=0), node("Gemm", ["pooled", "w", "b"], ["logits"], transB=1)], outputs=("logits", "pooled")),
        "something else reads",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_head_without_an_exact_map_is_refused(name: str) -> None:
    make, reason = REFUSED[name]
    with pytest.raises(GraphUnsupported, match=reason):
        attach_cam(make())


def test_a_graph_without_such_an_output_is_refused() -> None:
    with pytest.raises(GraphUnsupported, match="grades"):
        attach_cam(HEADS["no bias"](), logits="grades")


# -- any network ----------------------------------------------------------------------------------------------------

HIDDEN_WIDTH = 5
W1 = 0.3 * RNG.normal(size=(HIDDEN_WIDTH, CHANNELS)).astype(np.float32)
B1 = 0.3 * RNG.normal(size=HIDDEN_WIDTH).astype(np.float32)
W2 = RNG.normal(size=(CLASSES, HIDDEN_WIDTH)).astype(np.float32)
LAYERS = {"w1": W1, "b1": B1, "w2": W2, "k1": W1[:, :, None, None], "k2": W2[:, :, None, None], "six": np.array(6, np.float32)}
LAYERS |= {"three": np.array(3, np.float32), "zero": np.array(0, np.float32), "s2": np.array(np.sqrt(2), np.float32)}
LAYERS |= {"one": np.array(1, np.float32), "half": np.array(0.5, np.float32)}
BN = {"s": np.array([1.5, -0.5, 2, 1, 0.7]), "t": np.arange(5) / 3, "m": np.arange(5) / 7, "v": np.arange(5) + 0.5}
LAYERS |= {k: v.astype(np.float32) for k, v in BN.items()}

# Each makes "a" from "h", both 1 x HIDDEN_WIDTH.
ACTIVATIONS: dict[str, list[onnx.NodeProto]] = {
    "Relu": [node("Relu", ["h"], ["a"])],
    "Relu6": [node("Clip", ["h", "zero", "six"], ["a"])],
    "LeakyRelu": [node("LeakyRelu", ["h"], ["a"], alpha=0.1)],
    "Elu": [node("Elu", ["h"], ["a"], alpha=0.7)],
    "Sigmoid": [node("Sigmoid", ["h"], ["a"])],
    "Tanh": [node("Tanh", ["h"], ["a"])],
    "Softplus": [node("Softplus", ["h"], ["a"])],
    "HardSigmoid": [node("HardSigmoid", ["h"], ["a"], alpha=0.3, beta=0.4)],
    "HardSwish": [node("HardSwish", ["h"], ["a"])],
    "HardSwish in pieces": [
        node("Add", ["h", "three"], ["h3"]),
        node("Clip", ["h3", "zero", "six"], ["hc"]),
        node("Mul", ["h", "hc"], ["hm"]),
        node("Div", ["hm", "six"], ["a"]),
    ],
    "SiLU": [node("Sigmoid", ["h"], ["hs"]), node("Mul", ["h", "hs"], ["a"])],
    "Gelu in pieces": [
        node("Div", ["h", "s2"], ["hd"]),
        node("Erf", ["hd"], ["he"]),
        node("Add", ["he", "one"], ["ho"]),
        node("Mul", ["h", "ho"], ["hm"]),
        node("Mul", ["hm", "half"], ["a"]),
    ],
    "a residual and batch norm": [
        node("BatchNormalization", ["h", "s", "t", "m", "v"], ["hb"]),
        node("Relu", ["hb"], ["hr"]),
        node("Sub", ["h", "hr"], ["hx"]),
        node("Mul", ["hx", "hx"], ["hq"]),
        node("Add", ["hq", "h"], ["a"]),
    ],
}


def _hidden(activation: list[onnx.NodeProto], ending: str | None = None) -> Any:
    head = [
        GAP,
        node("Flatten", ["gap"], ["f"]),
        node("Gemm", ["f", "w1", "b1"], ["h"], name="fc1", transB=1),
        *[onnx.NodeProto.FromString(n.SerializeToString()) for n in activation],
        node("Gemm", ["a", "w2", "b"], ["l" if ending else "logits"], name="fc2", transB=1),
        *([node(ending, ["l"], ["logits"])] if ending else []),
    ]
    for i, n in enumerate(head):
        n.name = n.name or f"head_{i}"
    return _net(head, LAYERS)


def _features(model: Any, image: np.ndarray) -> np.ndarray:
    opened = onnx.ModelProto()
    opened.CopyFrom(model)
    opened.graph.output.append(helper.make_tensor_value_info("features", TensorProto.FLOAT, None))
    return _run(opened, image)["features"][0]


def _by_differences(activation: list[onnx.NodeProto], features: np.ndarray) -> np.ndarray:
    """Grad-CAM's map up to 1 / (h w), its gradient by central differences in float64."""
    graph = helper.make_graph(
        [
            node("Gemm", ["p", "w1", "b1"], ["h"], transB=1),
            *[onnx.NodeProto.FromString(n.SerializeToString()) for n in activation],
            node("Gemm", ["a", "w2", "b"], ["logits"], transB=1),
        ],
        "head",
        [helper.make_tensor_value_info("p", TensorProto.DOUBLE, [1, CHANNELS])],
        [helper.make_tensor_value_info("logits", TensorProto.DOUBLE, [1, CLASSES])],
        [numpy_helper.from_array(a.astype(np.float64), n) for n, a in {**LAYERS, "b": BIAS}.items()],
    )
    head = ReferenceEvaluator(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9))
    p = features.astype(np.float64).mean((1, 2))
    step = 1e-3  # the evaluator rounds Erf to float32, so a smaller one measures rounding
    slope = np.zeros((CLASSES, CHANNELS))
    for c in range(CHANNELS):
        ends = [head.run(None, {"p": (p + s * step * np.eye(CHANNELS)[c])[None]})[0][0] for s in (1, -1)]
        slope[:, c] = (ends[0] - ends[1]) / (2 * step)
    return np.einsum("kc,chw->khw", slope, features)


@pytest.mark.parametrize("ending", [None, "Softmax"])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_grad_cam_in_the_graph_equals_finite_differences(name: str, ending: str | None) -> None:
    model = _hidden(ACTIVATIONS[name], ending)
    image = np.random.default_rng(5).normal(size=(1, 1, SIDE, SIDE)).astype(np.float32)
    out, spec = attach(model, "classification", {"main": "logits"})
    assert (spec.kind, spec.output, spec.cam_bias) == ("grad-cam", "grad_cam", None)
    old, new = _run(model, image)["logits"], _run(out, image)
    np.testing.assert_allclose(new["logits"], old, atol=1e-6)
    expected = _by_differences(ACTIVATIONS[name], _features(model, image))
    assert np.abs(expected).max() > 1e-3
    np.testing.assert_allclose(new["grad_cam"][0], expected, atol=2e-4 * max(1.0, np.abs(expected).max()))


def test_convolutions_after_the_pool_are_a_head_too() -> None:
    """MobileNetV3: pool, 1 x 1 convolution, HardSwish, 1 x 1 convolution, flatten."""
    model = _net(
        [
            GAP,
            node("Conv", ["gap", "k1", "b1"], ["h"], name="k1"),
            node("HardSwish", ["h"], ["a"], name="act"),
            node("Conv", ["a", "k2", "b"], ["k"], name="k2"),
            node("Flatten", ["k"], ["logits"], name="flat"),
        ],
        LAYERS,
    )
    image = np.random.default_rng(5).normal(size=(1, 1, SIDE, SIDE)).astype(np.float32)
    out, spec = attach(model, "classification", {"main": "logits"})
    assert spec.kind == "grad-cam"
    expected = _by_differences(ACTIVATIONS["HardSwish"], _features(model, image))
    np.testing.assert_allclose(_run(out, image)["grad_cam"][0], expected, atol=1e-3)


LINEAR: dict[str, Callable[[], Any]] = {
    **HEADS,
    "two linear layers": lambda: _hidden([node("Identity", ["h"], ["a"])]),
    "an average pool over the whole map": lambda: _net(
        [
            node("AveragePool", ["features"], ["p"], name="pool", kernel_shape=[SIDE // 2, SIDE // 2]),
            node("Flatten", ["p"], ["f"], name="f"),
            node("Gemm", ["f", "w", "b"], ["logits"], name="fc", transB=1),
        ]
    ),
    "dropout before, sigmoid behind": lambda: _net(
        [
            GAP,
            node("Flatten", ["gap"], ["f"], name="f"),
            node("Dropout", ["f"], ["d"], name="d"),
            node("Gemm", ["d", "w", "b"], ["l"], name="fc", transB=1),
            node("Sigmoid", ["l"], ["logits"], name="end"),
        ]
    ),
    "scaled": lambda: _net([_mean(keepdims=0), node("Gemm", ["pooled", "w", "b"], ["logits"], name="fc", transB=1, alpha=0.5, beta=2.0)]),
}


def _named(model: Any) -> Any:
    for i, n in enumerate(model.graph.node):
        n.name = n.name or f"n{i}"
    return model


@pytest.mark.parametrize("name", LINEAR)
def test_a_linear_head_gets_the_exact_map(name: str) -> None:
    model = _named(LINEAR[name]())
    image = np.random.default_rng(6).normal(size=(1, 1, SIDE, SIDE)).astype(np.float32)
    out, spec = attach(model, "classification", {"main": "logits"})
    assert spec.kind == "cam"
    assert spec.cam_bias is not None
    new = _run(out, image)
    np.testing.assert_allclose(new["logits"], _run(model, image)["logits"], atol=2e-5)
    logits = new["cam"][0].mean((1, 2)) + np.array(spec.cam_bias)
    shown = 1 / (1 + np.exp(-logits)) if "sigmoid" in name else logits
    np.testing.assert_allclose(shown, new["logits"][0], atol=2e-5)
    assert all(n.startswith("heatmap.") for n in map_nodes(out))
    assert set(map_nodes(out)) & {n.name for n in out.graph.node if "cam" in n.output}


def test_too_many_classes_for_a_map_of_each_get_that_of_the_highest(monkeypatch: pytest.MonkeyPatch) -> None:
    image = np.random.default_rng(6).normal(size=(1, 1, SIDE, SIDE)).astype(np.float32)
    for model, key in ((_named(HEADS["no bias"]()), "cam"), (_hidden(ACTIVATIONS["SiLU"]), "grad_cam")):
        whole = _run(attach(model, "classification", {"main": "logits"})[0], image)
        with monkeypatch.context() as patch:
            patch.setattr(heatmap, "MAX_PRODUCTS", 10)
            out, spec = attach(model, "classification", {"main": "logits"})
        assert "highest class" in spec.reason
        top = _run(out, image)[key]
        assert top.shape[1] == 1
        np.testing.assert_allclose(top[0, 0], whole[key][0, int(whole["logits"].argmax())], atol=1e-5)


def test_a_squeeze_and_excitation_block_does_not_pass_for_the_head() -> None:
    model = _net(
        [
            node("GlobalAveragePool", ["features"], ["se"], name="se"),
            node("Sigmoid", ["se"], ["gate"], name="gate"),
            node("Mul", ["features", "gate"], ["gated"], name="gated"),
            node("GlobalAveragePool", ["gated"], ["gap"], name="pool"),
            node("Flatten", ["gap"], ["f"], name="f"),
            node("Gemm", ["f", "w", "b"], ["logits"], name="fc", transB=1),
        ]
    )
    out, spec = attach(model, "classification", {"main": "logits"})
    assert (spec.kind, spec.layer) == ("cam", "gated")
    onnx.checker.check_model(out, full_check=True)


def test_a_head_that_is_not_known_gets_a_map_that_says_so() -> None:
    flat = RNG.normal(size=(CLASSES, CHANNELS * SIDE * SIDE // 4)).astype(np.float32)
    model = _net(
        [node("Flatten", ["features"], ["f"], name="f"), node("Gemm", ["f", "flat_w", "b"], ["logits"], name="fc", transB=1)],
        {"flat_w": flat},
    )
    out, spec = attach(model, "classification", {"main": "logits"})
    assert (spec.kind, spec.output, spec.layer) == ("activation", "activation", "relu")
    assert "pooling" in spec.reason
    image = np.random.default_rng(6).normal(size=(1, 1, SIDE, SIDE)).astype(np.float32)
    np.testing.assert_allclose(_run(out, image)["activation"][0, 0], np.abs(_features(model, image)).mean(0), atol=1e-5)


def test_a_dense_head_shows_its_logits() -> None:
    net = _net([node("Sigmoid", ["features"], ["mask"], name="end")], outputs=("mask",))
    net.graph.output[0].CopyFrom(helper.make_tensor_value_info("mask", TensorProto.FLOAT, [1, CHANNELS, SIDE // 2, SIDE // 2]))
    out, spec = attach(net, "segmentation", {"main": "mask"})
    assert (spec.kind, spec.output, spec.layer) == ("class-evidence", "evidence", "relu")
    image = np.random.default_rng(6).normal(size=(1, 1, SIDE, SIDE)).astype(np.float32)
    new = _run(out, image)
    np.testing.assert_allclose(1 / (1 + np.exp(-new["evidence"])), new["mask"], atol=1e-6)


def test_what_is_no_image_has_no_map() -> None:
    graph = helper.make_graph(
        [node("Gemm", ["x", "w"], ["y"], name="fc")],
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 2])],
        [numpy_helper.from_array(np.ones((4, 2), np.float32), "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    out, spec = attach(model, "tensor", {"main": "y"})
    assert out is model
    assert (spec.kind, spec.output) == ("unavailable", None)
    assert "no image" in spec.reason
