"""A graph for a reader that knows nothing newer than ONNX opset 13, in half precision: what Movidius' old runtime takes.

Hides what changed between 13 and 21 for the operators that image networks use. The old reader does not refuse a newer graph:
it falls back to 13 and silently reads, say, a ReduceMean without its axes. So every operator that it may meet is listed here,
and any other is refused by its node's name.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from appliance.errors import GraphUnsupported

OPSET = 13
MIN_OPSET = 11
_IR_VERSION = 7
# Their meaning did not change from 11 or 13 on, for float tensors.
_NAMES = (
    "Abs Add AveragePool BatchNormalization Cast Clip Concat Constant Conv ConvTranspose DepthToSpace Div Dropout Elu Equal Erf Exp "
    "Expand Flatten Floor Gather Gemm GlobalAveragePool GlobalMaxPool HardSigmoid HardSwish Identity InstanceNormalization "
    "LeakyRelu Log MatMul "
    "Max MaxPool Min Mul Neg PRelu Pow Reciprocal ReduceSum Relu Reshape Resize Shape Sigmoid Slice Softmax Softplus SpaceToDepth Split "
    "Sqrt Squeeze Sub Tanh Tile Transpose Unsqueeze Where Pad ConstantOfShape ReduceMean ReduceMax ReduceMin ReduceL2 ReduceProd"
)
_SAME = frozenset(_NAMES.split())
_AXES_WERE_ATTRIBUTES = ("ReduceMean", "ReduceMax", "ReduceMin", "ReduceL2", "ReduceProd")
# Attributes of later opsets, each with the value that means what opset 13 does anyway.
_LATER: dict[str, dict[str, object]] = {
    "Reshape": {"allowzero": 0},
    "Resize": {"antialias": 0, "keep_aspect_ratio_policy": b"stretch"},
    "BatchNormalization": {"training_mode": 0},
    "AveragePool": {"dilations": None},
    "Split": {"num_outputs": None},
    "Shape": {"start": 0, "end": None},
    "Cast": {"saturate": 1},
}
_NEW_VALUES = {("Pad", "mode"): (b"wrap",), ("Resize", "coordinate_transformation_mode"): (b"half_pixel_symmetric",)}
_FLOAT_INPUTS = {"Resize": (1, 2)}  # regions and scales are float32 whatever the image is


def to_opset13(model: Any) -> Any:
    """A copy of `model` (default domain, opset 11 to 21) that means the same at opset 13. Raises GraphUnsupported, naming the node."""
    versions = {o.domain: o.version for o in model.opset_import}
    version = versions.get("", versions.get("ai.onnx", 0))
    if version < MIN_OPSET:
        raise GraphUnsupported("the graph's opset is too old", value=version)
    out = onnx.ModelProto()
    out.CopyFrom(model)
    stored = {t.name: t for t in out.graph.initializer}
    for node in out.graph.node:
        where = node.name or f"{node.op_type} {next(iter(node.output), '')}"
        if node.domain not in ("", "ai.onnx") or node.op_type not in _SAME:
            raise GraphUnsupported(f"operator {node.op_type} has no form at opset {OPSET}", value=where)
        if version <= OPSET:
            continue
        for name, meant in _LATER.get(node.op_type, {}).items():
            for attribute in [a for a in node.attribute if a.name == name]:
                _drop(node, attribute, meant, where)
        if node.op_type in _AXES_WERE_ATTRIBUTES:
            _axes_to_attribute(node, stored, where)
        if node.op_type == "Resize" and any(a.name == "axes" for a in node.attribute):
            raise GraphUnsupported("Resize over some axes has no form at opset 13", value=where)
        if node.op_type == "Pad" and len(node.input) > 3 and node.input[3]:
            raise GraphUnsupported("Pad over some axes has no form at opset 13", value=where)
        for attribute in node.attribute:
            if (node.op_type, attribute.name) in _NEW_VALUES and attribute.s in _NEW_VALUES[node.op_type, attribute.name]:
                raise GraphUnsupported(f"{node.op_type} in mode {attribute.s.decode()} has no form at opset {OPSET}", value=where)
    _spell_out_hard_activations(out)
    _drop_unread(out)
    del out.opset_import[:]
    out.opset_import.append(helper.make_opsetid("", min(version, OPSET)))
    out.ir_version = _IR_VERSION
    return out


def _drop(node: Any, attribute: Any, meant: object, where: str) -> None:
    value = helper.get_attribute_value(attribute)
    if attribute.name == "num_outputs":
        fine = value == len(node.output)  # equal parts; a rest in the last one is refused by the reader's own shape check
    elif attribute.name == "dilations":
        fine = set(value) == {1}
    else:
        fine = value == meant
    if not fine:
        raise GraphUnsupported(f"{node.op_type} with {attribute.name}={value!r} has no form at opset {OPSET}", value=where)
    node.attribute.remove(attribute)


def _axes_to_attribute(node: Any, stored: dict[str, Any], where: str) -> None:
    name = node.input[1] if len(node.input) > 1 else ""
    stated = any(a.name == "axes" for a in node.attribute)  # opset 17 and before
    if not name:
        axes: list[int] = []
    elif name in stored:
        axes = [int(a) for a in numpy_helper.to_array(stored[name]).reshape(-1)]
    else:
        raise GraphUnsupported(f"the axes of {node.op_type} are computed, not stored", value=where)
    for attribute in [a for a in node.attribute if a.name == "noop_with_empty_axes"]:
        if helper.get_attribute_value(attribute) and not axes and not stated:
            raise GraphUnsupported(f"{node.op_type} over no axes has no form at opset {OPSET}", value=where)
        node.attribute.remove(attribute)
    del node.input[1:]
    if axes:
        node.attribute.append(helper.make_attribute("axes", axes))


def _spell_out_hard_activations(model: Any) -> None:
    """HardSwish came with opset 14, and Movidius' plugin has no HardSigmoid: clip(alpha * x + beta, 0, 1), times x for the former,
    whose alpha is 1/6 and beta 1/2, says the ONNX standard."""
    nodes = []
    bounds = {f"hard.{k}": v for k, v in (("zero", 0.0), ("one", 1.0))}
    used: dict[str, float] = {}
    for node in model.graph.node:
        if node.op_type not in ("HardSwish", "HardSigmoid"):
            nodes.append(node)
            continue
        swish = node.op_type == "HardSwish"
        own = {"alpha": 1 / 6 if swish else 0.2, "beta": 0.5}
        own |= {} if swish else {a.name: float(a.f) for a in node.attribute}
        x, y, name = node.input[0], node.output[0], node.name or node.output[0]
        used |= bounds | {f"{name}.alpha": own["alpha"], f"{name}.beta": own["beta"]}
        nodes += [
            helper.make_node("Mul", [x, f"{name}.alpha"], [f"{y}.scaled"], name=f"{name}.scaled"),
            helper.make_node("Add", [f"{y}.scaled", f"{name}.beta"], [f"{y}.shifted"], name=f"{name}.shifted"),
            helper.make_node("Clip", [f"{y}.shifted", *bounds], [f"{y}.gate" if swish else y], name=f"{name}.gate"),
        ]
        if swish:
            nodes.append(helper.make_node("Mul", [x, f"{y}.gate"], [y], name=f"{name}.product"))
    model.graph.initializer.extend(numpy_helper.from_array(np.array(v, np.float32), k) for k, v in used.items())
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def _drop_unread(model: Any) -> None:
    read = {i for n in model.graph.node for i in n.input} | {o.name for o in model.graph.output}
    live = [t for t in model.graph.initializer if t.name in read]
    del model.graph.initializer[:]
    model.graph.initializer.extend(live)


def to_half(model: Any) -> Any:
    """A copy of `model` that computes in float16 between float32 inputs and outputs of the same names.

    Raises GraphUnsupported where a weight does not fit float16 (largest 65504), or where a node casts or makes constants in a
    type of its own choosing that would meet float16.
    """
    out = onnx.ModelProto()
    out.CopyFrom(model)
    graph = out.graph
    del graph.value_info[:]
    kept = {n.input[i] for n in graph.node for i in _FLOAT_INPUTS.get(n.op_type, ()) if i < len(n.input)}
    halved = {n.input[i] for n in graph.node for i in range(len(n.input)) if i not in _FLOAT_INPUTS.get(n.op_type, ())}
    for tensor in list(graph.initializer):
        if tensor.data_type != TensorProto.FLOAT or (tensor.name in kept and tensor.name not in halved):
            continue
        if tensor.name in kept:
            raise GraphUnsupported("a constant is both a scale of Resize and a value", value=tensor.name)
        tensor.CopyFrom(_half(tensor))
    for node in graph.node:
        for attribute in node.attribute:
            if node.op_type == "Constant" and attribute.name == "value" and attribute.t.data_type == TensorProto.FLOAT:
                if node.output[0] not in kept:
                    attribute.t.CopyFrom(_half(attribute.t, node.output[0]))
            elif attribute.type == onnx.AttributeProto.GRAPH or (
                node.op_type == "Constant" and attribute.name in ("value_float", "value_floats")
            ):
                raise GraphUnsupported(f"{node.op_type} with {attribute.name} has no half-precision form", value=node.name)
            elif node.op_type == "Cast" and attribute.name == "to" and attribute.i == TensorProto.FLOAT:
                attribute.i = TensorProto.FLOAT16
    names = {v.name for v in graph.input if v.type.tensor_type.elem_type == TensorProto.FLOAT}
    made = {v.name for v in graph.output if v.type.tensor_type.elem_type == TensorProto.FLOAT}
    for node in graph.node:
        for at, name in enumerate(node.input):
            if name in names or name in made:
                node.input[at] = f"{name}.half"
        for at, name in enumerate(node.output):
            if name in made:
                node.output[at] = f"{name}.half"
    first = [helper.make_node("Cast", [n], [f"{n}.half"], name=f"{n}.to_half", to=TensorProto.FLOAT16) for n in sorted(names)]
    last = [helper.make_node("Cast", [f"{n}.half"], [n], name=f"{n}.to_float", to=TensorProto.FLOAT) for n in sorted(made)]
    nodes = [*first, *graph.node, *last]
    del graph.node[:]
    graph.node.extend(nodes)
    return out


def _half(tensor: Any, name: str = "") -> Any:
    values = numpy_helper.to_array(tensor)
    limit = float(np.finfo(np.float16).max)
    # A bound of Clip is often the largest float32: it bounds nothing, and the largest float16 does not either.
    if values.size == 1 and np.isfinite(values).all():
        values = np.clip(values, -limit, limit)
    if not np.isfinite(values).all() or np.abs(values).max(initial=0.0) > limit:
        raise GraphUnsupported("a weight does not fit half precision", value=tensor.name or name)
    return numpy_helper.from_array(values.astype(np.float16), tensor.name)
