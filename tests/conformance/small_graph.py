"""The one small graph that every backend is held against, and the engines of it that a test cannot make by itself.

    python tests/conformance/small_graph.py

writes small.f32.tflite and small.int8.tflite anew with the compiler's own converter; it needs `make toolchains`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from appliance.backends import Signature, Tensor

HERE = Path(__file__).parent
HW = (12, 10)
SIGNATURE = Signature((Tensor("image", (1, 1, *HW)),), (Tensor("features", (1, 3, *HW)), Tensor("mean", (1, 3))))
_RNG = np.random.default_rng(3)
WEIGHT = _RNG.normal(size=(3, 1, 3, 3)).astype(np.float32)
BIAS = _RNG.normal(size=3).astype(np.float32)


def small_model() -> onnx.ModelProto:
    """Convolution, ReLU, mean over rows and columns; opset 13."""
    nodes = [
        helper.make_node("Conv", ["image", "w", "b"], ["conv"], name="conv", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["conv"], ["features"], name="relu"),
        helper.make_node("ReduceMean", ["features"], ["mean"], name="mean", axes=[2, 3], keepdims=0),
    ]
    inputs = [helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 1, *HW])]
    outputs = [helper.make_tensor_value_info(t.name, TensorProto.FLOAT, list(t.shape)) for t in SIGNATURE.outputs]
    graph = helper.make_graph(nodes, "small", inputs, outputs, [numpy_helper.from_array(WEIGHT, "w"), numpy_helper.from_array(BIAS, "b")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    onnx.checker.check_model(model)
    return model


def deeper_model() -> onnx.ModelProto:
    """The small graph after one more convolution, which an INT8 engine quantises: what makes an output stays in float."""
    model = small_model()
    rng = np.random.default_rng(5)
    first = numpy_helper.from_array(rng.normal(size=(4, 1, 3, 3)).astype(np.float32), "w0")
    second = numpy_helper.from_array(rng.normal(size=(1, 4, 3, 3)).astype(np.float32), "w1")
    model.graph.initializer.extend([first, second])
    nodes = [
        helper.make_node("Conv", ["image", "w0"], ["conv0"], name="conv0", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["conv0"], ["relu0"], name="relu0"),
        helper.make_node("Conv", ["relu0", "w1"], ["conv1"], name="conv1", pads=[1, 1, 1, 1]),
    ]
    old = list(model.graph.node)
    old[0].input[0] = "conv1"
    del model.graph.node[:]
    model.graph.node.extend([*nodes, *old])
    onnx.checker.check_model(model)
    return model


def by_hand(image: np.ndarray) -> dict[str, np.ndarray]:
    padded = np.pad(image[0, 0].astype(np.float64), 1)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3))
    features = np.maximum(np.einsum("hwij,kij->khw", windows, WEIGHT[:, 0].astype(np.float64)) + BIAS[:, None, None], 0)
    return {"features": features[None], "mean": features.mean((1, 2))[None]}


def an_image(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, (1, 1, *HW)).astype(np.float32)


def engines() -> dict[str, bytes]:
    """File name -> bytes, by the compiler's converter."""
    from appliance.compiler import convert

    return {
        "small.f32.tflite": convert.to_tflite_f32(small_model(), SIGNATURE),
        "small.int8.tflite": convert.to_tflite(deeper_model(), lambda: (an_image(i) for i in range(8)), SIGNATURE),
    }


if __name__ == "__main__":
    for name, blob in engines().items():
        (HERE / name).write_bytes(blob)
        print(f"{name}: {len(blob)} bytes")
