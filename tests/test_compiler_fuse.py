"""Arithmetic beside a layer goes into it, and the graph still answers what it answered."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from appliance.compiler.fuse import fuse
from tests import foreign_models as fm

RNG = np.random.default_rng(5)
X = RNG.normal(size=(1, 4, 9, 9)).astype(np.float32)


def graph(nodes: list[Any], weights: dict[str, np.ndarray], rank: int = 4) -> Any:
    """A graph from `image`, 1 x 4 x 9 x 9, to `out`."""
    g = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, X.shape)],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, [None] * rank)],
        [numpy_helper.from_array(np.asarray(v, np.float32), k) for k, v in weights.items()],
    )
    model = helper.make_model(g, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    onnx.checker.check_model(model)
    return model


def fused(model: Any, x: np.ndarray = X) -> list[str]:
    """The operators that are left; the answers have been compared."""
    before = fm.run(model, x)["out"]
    fuse(model)
    onnx.checker.check_model(model, full_check=True)
    np.testing.assert_allclose(fm.run(model, x)["out"], before, rtol=1e-4, atol=1e-4)
    return [n.op_type for n in model.graph.node]


def conv(name: str, source: str, target: str, *, bias: bool = False, pads: int = 0, group: int = 1) -> Any:
    inputs = [source, f"{name}.w", *([f"{name}.b"] if bias else [])]
    return helper.make_node("Conv", inputs, [target], name=name, pads=[pads] * 4, group=group)


def weight(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1,), (), (1, 6, 1, 1), (6, 1, 1)])
def test_scales_and_shifts_after_a_convolution(bias: bool, shape: tuple[int, ...]) -> None:
    nodes = [
        conv("c", "image", "a", bias=bias, pads=1),
        helper.make_node("Mul", ["s", "a"], ["b"]),
        helper.make_node("Add", ["b", "t"], ["d"]),
        helper.make_node("Sub", ["d", "u"], ["out"]),
    ]
    weights = {"c.w": weight(6, 4, 3, 3), "s": weight(*shape), "t": weight(*shape), "u": weight(*shape)}
    assert fused(graph(nodes, weights | ({"c.b": weight(6)} if bias else {}))) == ["Conv"]


def test_a_constant_from_which_is_subtracted_is_no_shift() -> None:
    nodes = [conv("c", "image", "a"), helper.make_node("Sub", ["t", "a"], ["out"])]
    assert fused(graph(nodes, {"c.w": weight(6, 4, 3, 3), "t": weight(1)})) == ["Conv", "Sub"]


@pytest.mark.parametrize("group", [1, 2, 4])
def test_a_transposed_convolution_and_its_batch_norm(group: int) -> None:
    nodes = [
        helper.make_node("ConvTranspose", ["image", "w"], ["a"], strides=[2, 2], group=group),
        helper.make_node("Add", ["a", "t"], ["b"]),
        helper.make_node("BatchNormalization", ["b", "g", "h", "m", "v"], ["c"], name="bn"),
        helper.make_node("Relu", ["c"], ["out"]),
    ]
    channels = 3 * group
    weights = {"w": weight(4, 3, 2, 2), "t": weight(1, channels, 1, 1), **{k: weight(channels) for k in "ghm"}}
    assert fused(graph(nodes, weights | {"v": np.abs(weight(channels)) + 0.1})) == ["ConvTranspose", "Relu"]


@pytest.mark.parametrize("transposed", [0, 1])
def test_a_fully_connected_layer(transposed: int) -> None:
    nodes = [
        helper.make_node("GlobalAveragePool", ["image"], ["p"]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("Gemm", ["f", "w", "b"], ["a"], transB=transposed),
        helper.make_node("Mul", ["a", "s"], ["m"]),
        helper.make_node("Add", ["m", "t"], ["out"]),
    ]
    weights = {"w": weight(5, 4) if transposed else weight(4, 5), "b": weight(5), "s": weight(5), "t": weight(1, 5)}
    assert fused(graph(nodes, weights, rank=2)) == ["GlobalAveragePool", "Flatten", "Gemm"]


def test_a_layer_that_others_read_too_keeps_its_numbers() -> None:
    nodes = [
        conv("c", "image", "a"),
        helper.make_node("Mul", ["a", "s"], ["b"]),
        helper.make_node("Add", ["a", "b"], ["out"]),
    ]
    assert fused(graph(nodes, {"c.w": weight(6, 4, 3, 3), "s": weight(1)})) == ["Conv", "Mul", "Add"]


def test_weights_that_two_layers_share_are_changed_for_one_only() -> None:
    nodes = [
        helper.make_node("Conv", ["image", "w"], ["a"]),
        helper.make_node("Conv", ["image", "w"], ["b"]),
        helper.make_node("Mul", ["a", "s"], ["c"]),
        helper.make_node("Add", ["b", "c"], ["out"]),
    ]
    assert fused(graph(nodes, {"w": weight(6, 4, 3, 3), "s": np.array([3.0])})) == ["Conv", "Conv", "Add"]


def test_before_a_convolution_only_what_padding_allows() -> None:
    weights = {"s": np.array([1.7]), "t": weight(1, 4, 1, 1), "c.w": weight(6, 4, 3, 3), "c.b": weight(6)}
    nodes = [helper.make_node("Mul", ["image", "s"], ["a"]), helper.make_node("Add", ["a", "t"], ["b"])]
    assert fused(graph([*nodes, conv("c", "b", "out", bias=True)], weights)) == ["Conv"]
    assert fused(graph([*nodes, conv("c", "b", "out", bias=True, pads=1)], weights)) == ["Add", "Conv"]  # zeros are added after the shift


def test_a_shift_before_grouped_convolutions_that_share_it() -> None:
    nodes = [
        helper.make_node("Add", ["t", "image"], ["a"]),
        conv("c", "a", "b", group=2),
        conv("d", "a", "e", bias=True),
        helper.make_node("Add", ["b", "e"], ["out"]),
    ]
    weights = {"t": weight(4, 1, 1), "c.w": weight(6, 2, 3, 3), "d.w": weight(6, 4, 3, 3), "d.b": weight(6)}
    assert fused(graph(nodes, weights)) == ["Conv", "Conv", "Add"]


def test_a_factor_for_each_channel_stays_before_a_convolution() -> None:
    nodes = [helper.make_node("Mul", ["image", "s"], ["a"]), conv("c", "a", "out")]
    assert fused(graph(nodes, {"s": weight(1, 4, 1, 1), "c.w": weight(6, 4, 3, 3)})) == ["Mul", "Conv"]


PIECES = {"three": 3.0, "zero": 0.0, "six": 6.0, "sixth": 1 / 6}


@pytest.mark.parametrize("first", [True, False])
def test_hard_swish_in_pieces(first: bool) -> None:
    nodes = [
        helper.make_node("Add", ["image", "three"], ["a"]),
        helper.make_node("Clip", ["a", "zero", "six"], ["b"]),
        *(
            [helper.make_node("Mul", ["image", "b"], ["c"]), helper.make_node("Mul", ["c", "sixth"], ["out"])]
            if first
            else [helper.make_node("Mul", ["b", "sixth"], ["c"]), helper.make_node("Mul", ["image", "c"], ["out"])]
        ),
    ]
    model = graph(nodes, {k: np.array(v) for k, v in PIECES.items()})
    assert fused(model) == ["HardSwish"]
    assert model.opset_import[0].version == 14


def test_hard_sigmoid_in_pieces_keeps_its_own_slope() -> None:
    nodes = [
        helper.make_node("Add", ["image", "two"], ["a"]),
        helper.make_node("Clip", ["a", "zero", "five"], ["b"]),
        helper.make_node("Mul", ["b", "fifth"], ["out"]),
    ]
    model = graph(nodes, {"two": np.array(2.0), "zero": np.array(0.0), "five": np.array(5.0), "fifth": np.array(0.2)})
    assert fused(model) == ["HardSigmoid"]


@pytest.mark.parametrize("wrong", [{"six": 5.0}, {"zero": 0.5}, {"sixth": 0.2}])
def test_what_is_nearly_a_hard_swish_stays_in_pieces(wrong: dict[str, float]) -> None:
    nodes = [
        helper.make_node("Add", ["image", "three"], ["a"]),
        helper.make_node("Clip", ["a", "zero", "six"], ["b"]),
        helper.make_node("Mul", ["image", "b"], ["c"]),
        helper.make_node("Mul", ["c", "sixth"], ["out"]),
    ]
    assert "HardSwish" not in fused(graph(nodes, {k: np.array(v) for k, v in (PIECES | wrong).items()}))


def test_pieces_that_a_graph_gives_out_stay() -> None:
    nodes = [
        conv("c", "image", "out"),
        helper.make_node("Mul", ["out", "s"], ["scaled"]),
    ]
    model = graph(nodes, {"c.w": weight(6, 4, 3, 3), "s": weight(1)})
    model.graph.output.append(helper.make_tensor_value_info("scaled", TensorProto.FLOAT, [None] * 4))
    assert fused(model) == ["Conv", "Mul"]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.sampled_from(["Mul", "Add", "Sub", "Conv", "Padded", "Relu", "Norm", "Swish"]), min_size=1, max_size=9), st.integers(0, 99)
)
def test_any_chain_keeps_its_answer(kinds: list[str], seed: int) -> None:
    rng = np.random.default_rng(seed)
    nodes, weights, at = [], {k: np.array(v) for k, v in PIECES.items()}, "image"
    for i, kind in enumerate([*kinds, "Relu"]):
        to = "out" if i == len(kinds) else f"v{i}"
        if kind in ("Mul", "Add", "Sub"):
            weights[f"k{i}"] = rng.normal(1.0, 0.3, [(), (1, 4, 1, 1)][int(rng.integers(2))])
            nodes.append(helper.make_node(kind, [at, f"k{i}"], [to]))
        elif kind in ("Conv", "Padded"):
            side = 1 if kind == "Conv" else 3
            weights[f"n{i}.w"] = rng.normal(0, 0.5, (4, 4, side, side))
            nodes.append(conv(f"n{i}", at, to, pads=side // 2))
        elif kind == "Norm":
            for part in "ghm":
                weights[f"{part}{i}"] = rng.normal(1.0, 0.2, 4)
            weights[f"var{i}"] = rng.uniform(0.5, 2.0, 4)
            nodes.append(helper.make_node("BatchNormalization", [at, f"g{i}", f"h{i}", f"m{i}", f"var{i}"], [to], name=f"bn{i}"))
        elif kind == "Swish":
            nodes += [
                helper.make_node("Add", [at, "three"], [f"a{i}"]),
                helper.make_node("Clip", [f"a{i}", "zero", "six"], [f"b{i}"]),
                helper.make_node("Mul", [at, f"b{i}"], [f"c{i}"]),
                helper.make_node("Mul", [f"c{i}", "sixth"], [to]),
            ]
        else:
            nodes.append(helper.make_node(kind, [at], [to]))
        at = to
    model = graph(nodes, weights)
    before = len(model.graph.node)
    assert len(fused(model)) <= before
    once = model.SerializeToString(deterministic=True)
    fuse(model)
    assert model.SerializeToString(deterministic=True) == once  # nothing is left to do
