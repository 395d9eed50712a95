"""Names and fixed shapes of an ONNX graph, as backends want them."""

from __future__ import annotations

from typing import Any

import onnx

from appliance.backends import Signature, Tensor
from appliance.errors import GraphUnsupported

REFERENCE = "onnxruntime"  # runs the float graph that every engine is held against


def signature_of(model: Any) -> Signature:
    """Inputs and outputs of a graph; initialisers that are listed among the inputs do not count.

    Shape inference fills in what the graph leaves symbolic. Raises GraphUnsupported naming a tensor without a fixed shape.
    """
    inferred = onnx.shape_inference.infer_shapes(model)
    known = {v.name: v for v in inferred.graph.value_info}
    stored = {t.name for t in model.graph.initializer}

    def dims_of(value: Any) -> list[int]:
        return [d.dim_value for d in value.type.tensor_type.shape.dim]

    def tensor(value: Any) -> Tensor:
        dims = dims_of(value)
        if any(d <= 0 for d in dims) and value.name in known:
            # A declared output may name its rows and columns; the inferred twin has them in numbers.
            dims = dims_of(known[value.name])
        if not dims or any(d <= 0 for d in dims):
            raise GraphUnsupported(f"{value.name} has no fixed shape", value=dims, remedy="Fix every dimension in the card.")
        return Tensor(value.name, tuple(int(d) for d in dims))

    inputs = tuple(tensor(v) for v in inferred.graph.input if v.name not in stored)
    return Signature(inputs, tuple(tensor(v) for v in inferred.graph.output))
