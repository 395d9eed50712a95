"""Small foreign models made on the spot, in the layouts that exporters write. Not a test itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

node = helper.make_node
SIDE, CLASSES = 64, 3


def build(
    nodes: Sequence[Any],
    weights: dict[str, np.ndarray],
    shape: Sequence[Any],
    outputs: Sequence[str],
    *,
    opset: int = 17,
    kind: int = TensorProto.FLOAT,
    ranks: Sequence[int] = (),
    kinds: Sequence[int] = (),
    metadata: dict[str, str] | None = None,
) -> Any:
    """A model with input `image` of `shape`; every output's sizes are left free."""
    ranks = ranks or [0] * len(outputs)
    kinds = kinds or [TensorProto.FLOAT] * len(outputs)
    graph = helper.make_graph(
        list(nodes),
        "net",
        [helper.make_tensor_value_info("image", kind, list(shape))],
        [
            helper.make_tensor_value_info(o, k, [f"{o}_{i}" for i in range(r)] if r else None)
            for o, r, k in zip(outputs, ranks, kinds, strict=True)
        ],
        [numpy_helper.from_array(np.asarray(a), n) for n, a in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=7 if opset < 13 else 8)
    helper.set_model_props(model, metadata or {})
    return model


def _rng() -> np.random.Generator:
    return np.random.default_rng(7)


def convolution(out: int, into: int, size: int = 3) -> np.ndarray:
    scale = np.sqrt(2 / (into * size * size))
    return (_rng().normal(size=(out, into, size, size)) * scale).astype(np.float32)


def classifier(opset: int = 17, layout: str = "NCHW", kind: int = TensorProto.FLOAT, batch: Any = "n", side: Any = "s") -> Any:
    """Conv, batch norm, Relu, pool, linear, Softmax; NHWC and whole numbers turned at the front, as TensorFlow exports are."""
    at, front = "image", []
    if kind != TensorProto.FLOAT:
        front.append(node("Cast", [at], ["float"], name="cast", to=TensorProto.FLOAT))
        front.append(node("Mul", ["float", "by255"], ["unit"], name="unit"))
        at = "unit"
    if layout == "NHWC":
        front.append(node("Transpose", [at], ["nchw"], name="nchw", perm=[0, 3, 1, 2]))
        at = "nchw"
    nodes = [
        *front,
        node("Conv", [at, "w1"], ["c1"], name="c1", pads=[1, 1, 1, 1], strides=[2, 2]),
        node("BatchNormalization", ["c1", "g", "b", "m", "v"], ["n1"], name="n1"),
        node("Relu", ["n1"], ["r1"], name="r1"),
        node("Conv", ["r1", "w2"], ["c2"], name="c2", pads=[1, 1, 1, 1], strides=[2, 2]),
        node("Relu", ["c2"], ["r2"], name="r2"),
        node("GlobalAveragePool", ["r2"], ["p"], name="p"),
        node("Flatten", ["p"], ["f"], name="f"),
        node("Gemm", ["f", "w3", "b3"], ["logits"], name="fc", transB=1),
        node("Softmax", ["logits"], ["probabilities"], name="softmax", axis=1),
    ]
    weights = {
        "w1": convolution(8, 3), "g": np.full(8, 1.5, np.float32), "b": np.full(8, 0.1, np.float32), "m": np.full(8, 0.05, np.float32),
        "v": np.full(8, 0.7, np.float32), "w2": convolution(12, 8), "w3": _rng().normal(size=(CLASSES, 12)).astype(np.float32) * 3,
        "b3": np.zeros(CLASSES, np.float32),
    }  # fmt: skip
    if kind != TensorProto.FLOAT:
        weights["by255"] = np.array(1 / 255, np.float32)
    shape = [batch, 3, side, side] if layout == "NCHW" else [batch, side, side, 3]
    return build(nodes, weights, shape, ["probabilities"], opset=opset, kind=kind, ranks=[2])


def detector(layout: str, metadata: dict[str, str] | None = None, chosen: bool = False) -> Any:
    """Two scales of one convolution each. "yolov8": 1 x (4 + nc) x A. "yolov5": 1 x A x (5 + nc) with three anchors a place.

    `chosen` puts NonMaxSuppression inside: rows of box, score, class, as many as there are.
    """
    unit = 5 + CLASSES if layout == "yolov5" else CLASSES
    anchors = 3 if layout == "yolov5" else 1
    nodes = [
        node("Conv", ["image", "w1"], ["c1"], name="stem", pads=[1, 1, 1, 1], strides=[4, 4]),
        node("Relu", ["c1"], ["r1"], name="stem_relu"),
        node("Conv", ["r1", "w2"], ["c2"], name="deep", pads=[1, 1, 1, 1], strides=[2, 2]),
        node("Relu", ["c2"], ["r2"], name="deep_relu"),
    ]
    weights: dict[str, np.ndarray] = {"w1": convolution(8, 3), "w2": convolution(8, 8), "side": np.array(SIDE, np.float32)}
    parts = []
    for i, features in enumerate(("r1", "r2")):
        weights[f"k{i}"] = convolution(unit * anchors, 8, 1) * 2
        nodes.append(node("Conv", [features, f"k{i}"], [f"s{i}"], name=f"head{i}"))
        if layout == "yolov5":
            weights[f"shape{i}"] = np.array([1, anchors, unit, -1], np.int64)
            nodes += [
                node("Reshape", [f"s{i}", f"shape{i}"], [f"q{i}"], name=f"q{i}"),
                node("Transpose", [f"q{i}"], [f"t{i}"], name=f"t{i}", perm=[0, 1, 3, 2]),
                node("Reshape", [f"t{i}", "rows"], [f"part{i}"], name=f"part{i}"),
            ]
            weights["rows"] = np.array([1, -1, unit], np.int64)
        else:
            weights["flat"] = np.array([1, unit, -1], np.int64)
            weights["flat4"] = np.array([1, 4, -1], np.int64)
            weights[f"kb{i}"] = convolution(4, 8, 1)[::-1].copy()
            nodes += [
                node("Conv", [features, f"kb{i}"], [f"b{i}"], name=f"box{i}"),
                node("Reshape", [f"s{i}", "flat"], [f"part{i}"], name=f"part{i}"),
                node("Reshape", [f"b{i}", "flat4"], [f"boxes{i}"], name=f"boxes{i}"),
            ]
        parts.append(f"part{i}")
    if layout == "yolov5":
        weights |= {"split": np.array([4, 1 + CLASSES], np.int64)}
        nodes += [
            node("Concat", parts, ["all"], name="all", axis=1),
            node("Sigmoid", ["all"], ["sure"], name="sure"),
            node("Split", ["sure", "split"], ["xywh", "rest"], name="split_boxes", axis=2),
            node("Mul", ["xywh", "side"], ["boxes"], name="pixels"),
            node("Concat", ["boxes", "rest"], ["out"], name="out", axis=2),
        ]
    else:
        nodes += [
            node("Concat", parts, ["scores"], name="scores", axis=2),
            node("Concat", ["boxes0", "boxes1"], ["raw"], name="raw", axis=2),
            node("Sigmoid", ["raw"], ["unit"], name="unit"),
            node("Mul", ["unit", "side"], ["boxes"], name="pixels"),
            node("Sigmoid", ["scores"], ["sure"], name="sure"),
            node("Concat", ["boxes", "sure"], ["out"], name="out", axis=1),
        ]
    if not chosen:
        return build(nodes, weights, [1, 3, SIDE, SIDE], ["out"], ranks=[3], metadata=metadata)
    weights |= {
        "most": np.array([20], np.int64), "iou": np.array([0.5], np.float32), "least": np.array([0.5], np.float32),
        "one": np.array([1], np.int64), "two": np.array([2], np.int64), "zero": np.array([0], np.int64), "last": np.array([9], np.int64),
        "axis1": np.array([1], np.int64),
    }  # fmt: skip
    nodes += [
        node("Transpose", ["boxes"], ["boxes_last"], name="boxes_last", perm=[0, 2, 1]),
        node("NonMaxSuppression", ["boxes_last", "sure", "most", "iou", "least"], ["picked"], name="nms", center_point_box=1),
        node("Slice", ["picked", "two", "last", "axis1"], ["index"], name="index"),
        node("Slice", ["picked", "one", "two", "axis1"], ["class_column"], name="class_column"),
        node("Squeeze", ["index", "axis1"], ["index_flat"], name="index_flat"),
        node("Squeeze", ["boxes_last", "zero"], ["box_table"], name="box_table"),
        node("Gather", ["box_table", "index_flat"], ["box_rows"], name="box_rows", axis=0),
        node("Transpose", ["sure"], ["sure_last"], name="sure_last", perm=[0, 2, 1]),
        node("Squeeze", ["sure_last", "zero"], ["sure_table"], name="sure_table"),
        node("Gather", ["sure_table", "index_flat"], ["sure_rows"], name="sure_rows", axis=0),
        node("ReduceMax", ["sure_rows"], ["best"], name="best", axes=[1], keepdims=1),
        node("Cast", ["class_column"], ["class_float"], name="class_float", to=TensorProto.FLOAT),
        node("Concat", ["box_rows", "best", "class_float"], ["rows_out"], name="rows_out", axis=1),
    ]
    return build(nodes, weights, [1, 3, SIDE, SIDE], ["rows_out"], ranks=[2], metadata=metadata)


def segmenter(end: str | None = None, channels: int = CLASSES) -> Any:
    """Convolutions and an enlargement; `end` Sigmoid, or ArgMax, which answers whole numbers."""
    nodes = [
        node("Conv", ["image", "w1"], ["c1"], name="c1", pads=[1, 1, 1, 1], strides=[2, 2]),
        node("Relu", ["c1"], ["r1"], name="r1"),
        node("Conv", ["r1", "w2"], ["c2"], name="c2"),
        node("Resize", ["c2", "", "scales"], ["up" if end else "out"], name="up", mode="linear"),
    ]
    weights = {"w1": convolution(8, 3), "w2": convolution(channels, 8, 1), "scales": np.array([1, 1, 2, 2], np.float32)}
    kinds = [TensorProto.FLOAT]
    if end == "ArgMax":
        nodes.append(node("ArgMax", ["up"], ["out"], name="argmax", axis=1, keepdims=0))
        kinds = [TensorProto.INT64]
    elif end:
        nodes.append(node(end, ["up"], ["out"], name="end"))
    return build(nodes, weights, ["n", 3, "h", "w"], ["out"], ranks=[3 if end == "ArgMax" else 4], kinds=kinds)


def run(model: Any, x: np.ndarray, name: str = "image") -> dict[str, np.ndarray]:
    import onnxruntime as ort

    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [o.name for o in session.get_outputs()]
    return dict(zip(names, session.run(names, {name: x}), strict=True))


def save(model: Any, path: Any) -> Any:
    onnx.save(model, path)
    return path
