"""Multiply-accumulates and stored values of an ONNX graph with fixed shapes: what a network costs before any machine is asked."""

from __future__ import annotations

from typing import Any

import numpy as np

from appliance.compiler.graph import infer


def parameters(model: Any) -> int:
    """Stored float values: weights, biases, folded constants."""
    from onnx import TensorProto

    return sum(int(np.prod(t.dims)) for t in model.graph.initializer if t.data_type in (TensorProto.FLOAT, TensorProto.FLOAT16))


def macs(model: Any) -> int:
    """Multiply-accumulates of one inference: convolutions, matrix products and fully connected layers; a bias, an activation and
    an addition cost none. Raises ModelInvalid where shapes contradict each other, ValueError naming a node whose shape is open."""
    graph = infer(model).graph
    shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in (*graph.input, *graph.value_info, *graph.output)}
    shapes |= {t.name: list(t.dims) for t in graph.initializer}

    def shape(node: Any, name: str) -> list[int]:
        found = shapes.get(name, [])
        if not found or any(d <= 0 for d in found):
            raise ValueError(f"{node.name or node.op_type}: the shape of {name} is not fixed")
        return found

    total = 0
    for node in graph.node:
        if node.op_type == "Conv":
            # Every output value is a product over the kernel and the channels of its group.
            total += int(np.prod(shape(node, node.output[0]))) * int(np.prod(shape(node, node.input[1])[1:]))
        elif node.op_type == "ConvTranspose":
            # Every input value is spread over the kernel and the output channels of its group.
            total += int(np.prod(shape(node, node.input[0]))) * int(np.prod(shape(node, node.input[1])[1:]))
        elif node.op_type in ("Gemm", "MatMul"):
            turned = node.op_type == "Gemm" and any(a.name == "transA" and a.i for a in node.attribute)
            inner = shape(node, node.input[0])[0 if turned else -1]
            total += int(np.prod(shape(node, node.output[0]))) * inner
    return total
