"""The map goes into the graph, the logits stay what they were, and a head it cannot explain is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from appliance.compiler.heatmap import CAM, attach_cam
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
