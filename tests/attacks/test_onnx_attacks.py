"""Broken and hostile ONNX files: each is refused with the node, tensor or file named; nothing outside the folder is read."""

# ruff: noqa: E501 - one hostile graph a line reads best

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from appliance.cli.card import card as card_command
from appliance.compiler import graph
from appliance.errors import CompileError, GraphUnsupported, ModelInvalid

node = helper.make_node
WEIGHT = np.arange(1 * 3 * 3 * 3, dtype=np.float32).reshape(1, 3, 3, 3)


def model(nodes: list[Any] | None = None, weights: dict[str, np.ndarray] | None = None, opset: int = 17, **kwargs: Any) -> Any:
    nodes = [node("Conv", ["x", "w"], ["y"], name="conv")] if nodes is None else nodes
    weights = {"w": WEIGHT} if weights is None else weights
    made = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(a, n) for n, a in weights.items()],
        **kwargs,
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def saved(folder: Path, m: Any) -> Path:
    path = folder / "m.onnx"
    path.write_bytes(m.SerializeToString())
    return path


def external(location: str, offset: str = "0", length: str | None = None) -> Any:
    m = model()
    tensor = m.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        if value is not None:
            tensor.external_data.add(key=key, value=value)
    return m


def test_a_sound_file_is_read(tmp_path: Path) -> None:
    read = graph.read_model(saved(tmp_path, model()))
    assert [n.name for n in read.graph.node] == ["conv"]


def test_external_data_beside_the_model_is_read(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "w.bin").write_bytes(b"????" + WEIGHT.tobytes())
    read = graph.read_model(saved(tmp_path, external("deep/w.bin", "4", str(WEIGHT.nbytes))))
    np.testing.assert_array_equal(numpy_helper.to_array(read.graph.initializer[0]), WEIGHT)


@pytest.mark.parametrize(
    ("location", "offset", "length"),
    [
        ("../secret.bin", "0", None),
        ("/etc/passwd", "0", None),
        ("a/../../secret.bin", "0", None),
        ("", "0", None),
        ("w\\..\\secret.bin", "0", None),
        (".", "0", None),
        ("w.bin\0.txt", "0", None),
        ("link.bin", "0", None),
        ("linked/secret.bin", "0", None),
        ("fifo", "0", None),
        ("folder", "0", None),
        ("absent.bin", "0", None),
        ("w.bin", "-4", None),
        ("w.bin", "4", None),
        ("w.bin", "0", "4"),
        ("w.bin", "0", str(1 << 62)),
        ("w.bin", str(1 << 70), None),
        ("w.bin", "zero", None),
    ],
)
def test_external_data_stays_in_the_folder(tmp_path: Path, location: str, offset: str, length: str | None) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (tmp_path / "secret.bin").write_bytes(WEIGHT.tobytes())
    (home / "w.bin").write_bytes(WEIGHT.tobytes())
    (home / "link.bin").symlink_to(tmp_path / "secret.bin")
    (home / "linked").symlink_to(tmp_path)
    (home / "folder").mkdir()
    os.mkfifo(home / "fifo")
    with pytest.raises(ModelInvalid):
        graph.read_model(saved(home, external(location, offset, length)))


def _nested(depth: int) -> Any:
    inner = helper.make_graph([node("Relu", ["x"], ["r"])], "g0", [], [helper.make_tensor_value_info("r", TensorProto.FLOAT, None)])
    for i in range(1, depth):
        step = (
            node("If", ["c"], [f"o{i}"], then_branch=inner, else_branch=inner) if i < 3 else node("If", ["c"], [f"o{i}"], then_branch=inner)
        )
        inner = helper.make_graph([step], f"g{i}", [], [helper.make_tensor_value_info(f"o{i}", TensorProto.FLOAT, None)])
    return model([node("If", ["c"], ["y"], name="if", then_branch=inner, else_branch=inner)], {"c": np.array(True)})


def _named_twice() -> Any:
    m = model()
    m.graph.output.append(m.graph.output[0])
    return m


def _with(change: Callable[[Any], Any]) -> Any:
    m = model()
    change(m)
    return m


def _sparse(m: Any) -> None:
    sparse = m.graph.sparse_initializer.add()
    sparse.values.CopyFrom(numpy_helper.from_array(np.ones(1, np.float32), "sparse_w"))
    sparse.indices.CopyFrom(numpy_helper.from_array(np.zeros(1, np.int64), "sparse_i"))
    sparse.dims.append(4)


def _laughs(m: Any) -> None:
    """Each function calls the one below twice: 2^40 nodes when written out."""
    for i in range(40):
        body = (
            [node("Relu", ["a"], ["b"])]
            if i == 0
            else [node(f"f{i - 1}", ["a"], ["t"], domain="f"), node(f"f{i - 1}", ["t"], ["b"], domain="f")]
        )
        opsets = [helper.make_opsetid("", 17), helper.make_opsetid("f", 1)]
        m.functions.append(helper.make_function("f", f"f{i}", ["a"], ["b"], body, opsets))
    m.opset_import.append(helper.make_opsetid("f", 1))
    m.graph.node.append(node("f39", ["y"], ["z"], domain="f"))


def _recursive(m: Any) -> None:
    body = [node("f", ["a"], ["b"], domain="f")]
    m.functions.append(helper.make_function("f", "f", ["a"], ["b"], body, [helper.make_opsetid("f", 1)]))
    m.opset_import.append(helper.make_opsetid("f", 1))
    m.graph.node.append(node("f", ["y"], ["z"], domain="f"))


def _dims(*dims: int) -> Callable[[Any], None]:
    def change(m: Any) -> None:
        del m.graph.initializer[0].dims[:]
        m.graph.initializer[0].dims.extend(dims)

    return change


def _bad_weight(value: float) -> Any:
    return model(weights={"w": np.where(WEIGHT == 5, np.float32(value), WEIGHT)})


HOSTILE: dict[str, tuple[Callable[[], Any], type[CompileError], str]] = {
    "a circle": (lambda: model([node("Add", ["x", "b"], ["a"], name="first"), node("Relu", ["a"], ["b"], name="second"), node("Relu", ["b"], ["y"])]), ModelInvalid, "first"),
    "a node that reads itself": (lambda: model([node("Add", ["x", "y"], ["y"], name="self")]), ModelInvalid, "self"),
    "a missing weight": (lambda: model(weights={}), ModelInvalid, "conv.*reads w"),
    "a missing input": (lambda: model([node("Conv", ["image", "w"], ["y"], name="conv")]), ModelInvalid, "reads image"),
    "nothing makes the output": (lambda: model([node("Conv", ["x", "w"], ["z"], name="conv")]), ModelInvalid, "y"),
    "an output named twice": (_named_twice, ModelInvalid, "named twice"),
    "a tensor made twice": (lambda: model([node("Relu", ["x"], ["y"], name="a"), node("Abs", ["x"], ["y"], name="b")]), ModelInvalid, "node a and node b"),
    "a node that makes its input anew": (lambda: model([node("Relu", ["x"], ["x"], name="a"), node("Relu", ["x"], ["y"])]), ModelInvalid, "made twice"),
    "a weight stored twice": (lambda: _with(lambda m: m.graph.initializer.append(m.graph.initializer[0])), ModelInvalid, "stored twice"),
    "NaN": (lambda: _bad_weight(np.nan), ModelInvalid, "NaN.*w"),
    "infinity": (lambda: _bad_weight(np.inf), ModelInvalid, "infinite.*w"),
    "NaN in an attribute": (lambda: model([node("Constant", [], ["c"], name="c", value=numpy_helper.from_array(np.array([np.nan], np.float32))), node("Add", ["x", "c"], ["y"])]), ModelInvalid, "node c"),
    "an unknown operator": (lambda: model([node("Frobnicate", ["x"], ["y"], name="frob")]), GraphUnsupported, "Frobnicate 'frob'"),
    "an operator newer than its set": (lambda: model([node("Gelu", ["x"], ["y"], name="g")]), GraphUnsupported, "opset 17.*Gelu"),
    "an unknown domain": (lambda: _with(lambda m: (m.opset_import.append(helper.make_opsetid("com.evil", 1)), m.graph.node.append(node("Run", ["y"], ["z"], name="run", domain="com.evil")))), GraphUnsupported, "com.evil"),
    "quantised already": (lambda: model([node("QuantizeLinear", ["x", "s", "z"], ["q"], name="q"), node("DequantizeLinear", ["q", "s", "z"], ["y"])], {"s": np.float32(1), "z": np.uint8(0)}), GraphUnsupported, "quantised already"),
    "shapes that contradict": (lambda: model([node("MatMul", ["x", "w"], ["y"], name="product")], {"w": np.ones((5, 5), np.float32)}), ModelInvalid, "contradict.*product"),
    "channels that contradict": (lambda: model(weights={"w": np.ones((1, 4, 3, 3), np.float32)}), ModelInvalid, "channels.*conv"),
    "a declared shape that is wrong": (lambda: _with(lambda m: m.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 1, 99, 99]))), ModelInvalid, "contradict"),
    "operator set 10": (lambda: model(opset=10), GraphUnsupported, "opset 10"),
    "operator set 22": (lambda: model(opset=22), GraphUnsupported, "opset 22"),
    "no operator set": (lambda: _with(lambda m: m.ClearField("opset_import")), ModelInvalid, "one version"),
    "two operator sets": (lambda: _with(lambda m: m.opset_import.append(helper.make_opsetid("ai.onnx", 15))), ModelInvalid, "one version"),
    "deep subgraphs": (lambda: _nested(12), GraphUnsupported, "deep"),
    "sparse weights": (lambda: _with(_sparse), GraphUnsupported, "sparse_w"),
    "functions that double forty times": (lambda: _with(_laughs), GraphUnsupported, "written out"),
    "a function that calls itself": (lambda: _with(_recursive), ModelInvalid, "calls itself"),
    "negative sizes": (lambda: _with(_dims(1, -3, 3, 3)), ModelInvalid, "w"),
    "absurd sizes": (lambda: _with(_dims(1 << 40, 1 << 40)), ModelInvalid, "values"),
    "sizes whose product wraps to what is held": (lambda: _with(_dims(27, (1 << 63) - 1, 2)), ModelInvalid, "values"),
    "fewer values than the shape says": (lambda: _with(_dims(1, 3, 3, 4)), ModelInvalid, "another number of values"),
    "a hundred dimensions": (lambda: _with(_dims(*[1] * 100)), ModelInvalid, "dimensions"),
    "an unknown type": (lambda: _with(lambda m: setattr(m.graph.initializer[0], "data_type", 99)), ModelInvalid, "type"),
    "an absurd input": (lambda: _with(lambda m: m.graph.input[0].CopyFrom(helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 1 << 40, 8]))), ModelInvalid, "absurd"),
    "an empty graph": (lambda: onnx.ModelProto(), ModelInvalid, "no ONNX file"),
    "no input": (lambda: _with(lambda m: m.graph.ClearField("input")), ModelInvalid, "no input"),
    "no output": (lambda: _with(lambda m: m.graph.ClearField("output")), ModelInvalid, "no output"),
    "too many nodes": (lambda: model([node("Relu", ["x" if i == 0 else f"t{i}"], [f"t{i + 1}" if i < graph.MAX_NODES else "y"]) for i in range(graph.MAX_NODES + 1)]), GraphUnsupported, "nodes"),
    "a name without end": (lambda: model([node("Conv", ["x", "w" * 5000], ["y"])], {"w" * 5000: WEIGHT}), ModelInvalid, "longer than"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_graphs_are_refused_by_name(tmp_path: Path, name: str) -> None:
    make, kind, says = HOSTILE[name]
    with pytest.raises(kind, match=f"(?s){says}") as caught:
        graph.read_model(saved(tmp_path, make()))
    assert type(caught.value) is kind
    assert caught.value.remedy


def test_message_carries_the_value() -> None:
    """`match` above searches the whole message; the value is part of it."""
    assert "conv" in str(ModelInvalid("what", value="conv"))


@pytest.mark.parametrize("content", [b"", b"\0" * 100, b"not a model", b"\x08\x07\x12" + b"\xff" * 50, b"\x3a" * 4000])
def test_bytes_that_are_no_model(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(content)
    with pytest.raises(ModelInvalid):
        graph.read_model(path)


def test_half_a_file(tmp_path: Path) -> None:
    whole = model().SerializeToString()
    path = tmp_path / "m.onnx"
    for cut in range(0, len(whole) - 1, 17):
        path.write_bytes(whole[:cut])
        with pytest.raises(CompileError):
            graph.read_model(path)


def test_what_is_no_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", tmp_path, tmp_path / "absent.onnx", Path("/dev/zero")):
        with pytest.raises(ModelInvalid):
            graph.read_model(path)


def test_more_than_two_gigabytes_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    with path.open("wb") as file:
        file.truncate((1 << 31) + 5)
    before = time.monotonic()
    with pytest.raises(ModelInvalid, match="larger than"):
        graph.read_model(path)
    assert time.monotonic() - before < 1.0


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 1 << 32), flips=st.integers(1, 6))
def test_flipped_bytes_are_read_or_refused(tmp_path: Path, seed: int, flips: int) -> None:
    rng = random.Random(seed)
    data = bytearray(model().SerializeToString())
    for _ in range(flips):
        data[rng.randrange(len(data))] = rng.randrange(256)
    path = tmp_path / "m.onnx"
    path.write_bytes(data)
    try:
        read = graph.read_model(path)
    except CompileError:
        return
    onnx.checker.check_model(read)


# -- the process that may die ---------------------------------------------------------------------------------------


def test_an_error_in_the_process_comes_back_as_itself(tmp_path: Path) -> None:
    with pytest.raises(GraphUnsupported, match="opset 22") as caught:
        graph.load_model(saved(tmp_path, model(opset=22)))
    assert "17 is a good choice" in caught.value.remedy


def _constant_bomb() -> Any:
    """100 bytes that fold to 16 GiB of zeros."""
    return model(
        [
            node("ConstantOfShape", ["s"], ["big"], name="bomb"),
            node("ReduceSum", ["big"], ["r"], keepdims=0),
            node("Add", ["x", "r"], ["y"]),
        ],
        {"s": np.array([1 << 16, 1 << 16], np.int64)},
    )


def test_constants_that_fold_to_gigabytes(tmp_path: Path) -> None:
    loaded = graph.load_model(saved(tmp_path, _constant_bomb()))
    with pytest.raises(CompileError):
        graph.output_shapes(loaded, {"x": (1, 3, 8, 8)})


def test_a_loop_without_end_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    body = helper.make_graph(
        [node("Identity", ["c"], ["d"]), node("Identity", ["v"], ["u"])],
        "body",
        [helper.make_tensor_value_info("i", TensorProto.INT64, []), helper.make_tensor_value_info("c", TensorProto.BOOL, []), helper.make_tensor_value_info("v", TensorProto.FLOAT, [1, 3, 8, 8])],
        [helper.make_tensor_value_info("d", TensorProto.BOOL, []), helper.make_tensor_value_info("u", TensorProto.FLOAT, [1, 3, 8, 8])],
    )  # fmt: skip
    endless = model([node("Loop", ["", "true", "x"], ["y"], name="loop", body=body)], {"true": np.array(True)})
    with pytest.raises(ModelInvalid, match="more than 3 s"):
        graph._isolated("probe", {"feeds": {"x": [1, 3, 8, 8]}, "constants": {}}, endless, timeout_s=3.0)


def test_a_crash_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader that dies of a segmentation fault, which a script plays here."""
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\nkill -SEGV $$\n")
    script.chmod(0o755)
    path = saved(tmp_path, model())
    monkeypatch.setattr(graph.sys, "executable", str(script))
    with pytest.raises(ModelInvalid, match=r"crashed the load process \(signal 11\).*m.onnx"):
        graph.load_model(path)


def test_the_command_ends_with_its_exit_code(tmp_path: Path) -> None:
    result = CliRunner().invoke(card_command, [str(saved(tmp_path, _bad_weight(np.nan))), "--out", str(tmp_path / "card.toml")])
    assert result.exit_code == ModelInvalid.exit_code != 0
    assert "NaN" in result.output
    assert not (tmp_path / "card.toml").exists()
