"""A float graph with fewer places to round: arithmetic that exporters leave beside a layer goes into the layer.

Every value between two nodes costs eight bits where it is quantised. Batch norms, learnt scales and shifts beside a convolution,
and activations written out in pieces give some exporters six such values where one is meant. Each rewriting here is exact but
for float rounding; what is not exact (a shift before a convolution that pads with zeros) is left alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

Array = NDArray[np.float64]
LAYERS = ("Conv", "ConvTranspose", "Gemm")
_OPSET_HARD_SWISH = 14
_SMALLEST = 1e-4  # a factor below this is not divided by
_CLOSE = 1e-4  # of a constant that makes an activation what it is


def fuse(model: Any) -> None:
    """Rewrite `model` in place. It has been through ONNX Runtime's basic optimisation, so constants are stored."""
    view = _View(model)
    for steps in (_ACTIVATIONS, _AFFINE):
        while _pass(view, steps):
            pass
    view.finish()


def _pass(view: _View, steps: Sequence[Callable[[_View, Any], bool]]) -> bool:
    changed = False
    for node in list(view.nodes.values()):
        for step in steps:
            if id(node) in view.nodes and step(view, node):
                changed = True
    return changed


class _View:
    """The graph's nodes in order, who makes and who reads a value, and the stored constants; kept true through every change."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.nodes = {id(n): n for n in model.graph.node}
        self._alive = list(model.graph.node)  # an id is that of a living object only
        self.stored = {t.name: t for t in model.graph.initializer}
        self.outputs = {o.name for o in model.graph.output}
        inferred = onnx.shape_inference.infer_shapes(model)
        self.ranks = {
            v.name: len(v.type.tensor_type.shape.dim)
            for v in (*inferred.graph.input, *inferred.graph.value_info, *inferred.graph.output)
            if v.type.tensor_type.HasField("shape")
        }
        # What a subgraph reads counts as needed, so that nothing is taken from under it.
        self.outputs |= {t for n in self._alive for a in n.attribute for g in (a.g, *a.graphs) for m in g.node for t in m.input}
        self.used = {o for n in self._alive for o in n.output} | set(self.stored) | {v.name for v in model.graph.input}
        self._makers: dict[str, Any] = {}
        self._readers: dict[str, dict[int, Any]] = {}
        for node in self._alive:
            self._enter(node)

    def _enter(self, node: Any) -> None:
        self._makers.update(dict.fromkeys((o for o in node.output if o), node))
        for tensor in node.input:
            self._readers.setdefault(tensor, {})[id(node)] = node

    def _leave(self, node: Any) -> None:
        for output in node.output:
            self._makers.pop(output, None)
        for tensor in node.input:
            self._readers.get(tensor, {}).pop(id(node), None)

    def become(self, node: Any, kind: str, inputs: list[str], **attributes: Any) -> None:
        """Make another operator of a node, in its place."""
        self._leave(node)
        node.op_type = kind
        del node.input[:], node.attribute[:]
        node.input.extend(inputs)
        node.attribute.extend(helper.make_attribute(k, v) for k, v in attributes.items())
        self._enter(node)

    def read(self, node: Any, inputs: list[str]) -> None:
        """Let a node read other values."""
        self._leave(node)
        del node.input[:]
        node.input.extend(inputs)
        self._enter(node)

    def insert(self, node: Any, before: Any) -> None:
        self._alive.append(node)
        self.used.update(node.output)
        items = list(self.nodes.items())
        at = next(i for i, (_, n) in enumerate(items) if n is before)
        self.nodes = dict([*items[:at], (id(node), node), *items[at:]])
        self._enter(node)

    def remove(self, node: Any) -> None:
        self._leave(node)
        del self.nodes[id(node)]

    def maker(self, tensor: str) -> Any | None:
        return self._makers.get(tensor)

    def readers(self, tensor: str) -> list[Any]:
        return list(self._readers.get(tensor, {}).values())

    def only_reader(self, tensor: str) -> Any | None:
        """The one node that reads a value which nobody else needs."""
        found = self.readers(tensor)
        return found[0] if len(found) == 1 and tensor not in self.outputs and list(found[0].input).count(tensor) == 1 else None

    def only_for(self, tensor: str, node: Any) -> bool:
        return self.only_reader(tensor) is node

    def constant(self, name: str) -> Array | None:
        tensor = self.stored.get(name)
        if tensor is None or tensor.data_type != TensorProto.FLOAT:
            return None
        return np.asarray(numpy_helper.to_array(tensor), np.float64)

    def number(self, name: str) -> float | None:
        value = self.constant(name)
        return float(value.reshape(-1)[0]) if value is not None and value.size == 1 else None

    def fresh(self, hint: str) -> str:
        """A name that nothing has yet."""
        name, i = hint, 2
        while name in self.used:
            name, i = f"{hint}_{i}", i + 1
        self.used.add(name)
        return name

    def store(self, hint: str, value: Array) -> str:
        """A new constant: one that others share is never changed."""
        name = self.fresh(hint)
        tensor = numpy_helper.from_array(np.ascontiguousarray(value, np.float32), name)
        self.model.graph.initializer.append(tensor)
        self.stored[name] = self.model.graph.initializer[-1]
        return name

    def drop(self, node: Any, instead: str) -> None:
        """Take `node` out; whoever read its output reads `instead`. A graph output keeps its name: the maker of `instead`, which
        nobody else reads, gets it."""
        output = node.output[0]
        self.remove(node)
        if output in self.outputs:
            maker = self._makers[instead]
            self._leave(maker)
            for i, name in enumerate(maker.output):
                if name == instead:
                    maker.output[i] = output
            self._enter(maker)
            return
        for other in self.readers(output):
            self.read(other, [instead if name == output else name for name in other.input])

    def finish(self) -> None:
        kept = [n.SerializeToString() for n in self.nodes.values()]
        graph = self.model.graph
        del graph.node[:]
        for blob in kept:
            graph.node.add().ParseFromString(blob)
        read = {t for n in graph.node for t in n.input} | self.outputs
        live = [t.SerializeToString() for t in graph.initializer if t.name in read]
        del graph.initializer[:]
        for blob in live:
            graph.initializer.add().ParseFromString(blob)
        del graph.value_info[:]


def _attributes(node: Any) -> dict[str, Any]:
    return {a.name: helper.get_attribute_value(a) for a in node.attribute}


def _with_constant(view: _View, node: Any, kinds: tuple[str, ...]) -> tuple[str, str] | None:
    """(value, constant) of a node that joins the two; a subtrahend counts, a minuend does not."""
    if node is None or node.op_type not in kinds or len(node.input) != 2:
        return None
    first, second = node.input
    if view.constant(second) is not None and first not in view.stored:
        return first, second
    if node.op_type in ("Add", "Mul") and view.constant(first) is not None and second not in view.stored:
        return second, first
    return None


# -- activations in pieces ----------------------------------------------------------------------------------------------


def _is(value: float | None, wanted: float) -> bool:
    return value is not None and abs(value - wanted) <= _CLOSE * max(1.0, abs(wanted))


def _hard_sigmoid(view: _View, node: Any) -> bool:
    """clip(x + b, 0, m) / m, also where x is multiplied in before the division, is HardSigmoid with alpha 1 / m and beta b / m."""
    if node.op_type != "Clip" or len(node.input) < 3 or not _is(view.number(node.input[1]), 0.0):
        return False
    top, plus = view.number(node.input[2]), view.maker(node.input[0])
    found = _with_constant(view, plus, ("Add",))
    if top is None or top <= 0 or found is None or view.only_reader(node.input[0]) is None:
        return False
    x, shift = found[0], view.number(found[1])
    after = view.only_reader(node.output[0])
    if shift is None or after is None or after.op_type != "Mul":
        return False
    scaled = _with_constant(view, after, ("Mul",))
    if scaled is None:  # x * clip(...) first: the division is one node further
        after_that: Any = view.only_reader(after.output[0])
        scaled = _with_constant(view, after_that, ("Mul",))
        if x not in after.input or scaled is None or not _is(view.number(scaled[1]), 1 / top):
            return False
        view.drop(after_that, after.output[0])
    elif _is(view.number(scaled[1]), 1 / top):
        view.drop(after, node.output[0])
    else:
        return False
    view.become(node, "HardSigmoid", [x], alpha=1 / top, beta=shift / top)
    view.remove(plus)
    return True


def _hard_swish(view: _View, node: Any) -> bool:
    """x * HardSigmoid(x) with alpha 1 / 6 and beta 1 / 2 is HardSwish, says the ONNX standard."""
    if node.op_type != "HardSigmoid":
        return False
    own = {"alpha": 0.2, "beta": 0.5, **_attributes(node)}
    after = view.only_reader(node.output[0])
    x = node.input[0]
    if not (_is(own["alpha"], 1 / 6) and _is(own["beta"], 0.5)) or after is None or after.op_type != "Mul" or x not in after.input:
        return False
    version = next(o for o in view.model.opset_import if o.domain in ("", "ai.onnx"))
    if version.version < _OPSET_HARD_SWISH - 1:
        return False
    version.version = max(version.version, _OPSET_HARD_SWISH)  # 13 to 14 changed nothing in a float graph at inference
    view.become(after, "HardSwish", [x])
    view.remove(node)
    return True


# -- scales and shifts --------------------------------------------------------------------------------------------------


def _batch_norm(view: _View, node: Any) -> bool:
    """Fixed statistics after a layer: y = x * s + t for each channel, which the next step puts into it."""
    if node.op_type != "BatchNormalization" or len([o for o in node.output if o]) != 1 or view.ranks.get(node.input[0], 0) < 2:
        return False
    if _layer(view, view.maker(node.input[0])) is None or view.only_reader(node.input[0]) is None:
        return False
    parameters = [view.constant(t) for t in node.input[1:5]]
    if any(p is None for p in parameters):
        return False
    gamma, beta, mean, variance = (np.asarray(p) for p in parameters)
    shape = (1, -1, *[1] * (view.ranks[node.input[0]] - 2))
    scale = gamma / np.sqrt(variance + float(_attributes(node).get("epsilon", 1e-5)))
    shift = beta - mean * scale
    factor, summand = view.store(f"{node.name}.scale", scale.reshape(shape)), view.store(f"{node.name}.shift", shift.reshape(shape))
    middle = view.fresh(f"{node.output[0]}.scaled")
    view.ranks[middle] = len(shape)
    view.insert(helper.make_node("Mul", [node.input[0], factor], [middle], name=f"{node.name}.mul"), node)
    view.become(node, "Add", [middle, summand])
    return True


def _per_channel(value: Array, channels: int, rank: int) -> Array | None:
    """`value` as one number for each channel (axis 1 of `rank`), or None where it is not that."""
    if value.ndim > rank:
        return None
    if value.size == 1:
        return np.full(channels, float(value.reshape(-1)[0]))
    shape = (1,) * (rank - value.ndim) + value.shape
    return value.reshape(-1) if shape[1] == channels and value.size == channels else None


def _over_outputs(node: Any, weight: Array) -> tuple[int, Callable[[Array], Array]] | None:
    """Channels that a layer gives, and what brings a factor for each into the shape of its weights."""
    own = _attributes(node)
    if node.op_type == "Conv":
        return weight.shape[0], lambda v: v.reshape(-1, *[1] * (weight.ndim - 1))
    if node.op_type == "ConvTranspose":
        groups = int(own.get("group", 1))
        shape = (groups, 1, weight.shape[1], *[1] * (weight.ndim - 2))

        def spread(v: Array) -> Array:
            full = np.broadcast_to(v.reshape(shape), (groups, weight.shape[0] // groups, *shape[2:]))
            return full.reshape(weight.shape[0], *shape[2:])

        return groups * weight.shape[1], spread
    if any(abs(float(own.get(k, 1.0)) - 1.0) > 0 for k in ("alpha", "beta")) or own.get("transA"):
        return None
    return (weight.shape[0], lambda v: v.reshape(-1, 1)) if own.get("transB") else (weight.shape[1], lambda v: v.reshape(1, -1))


def _layer(view: _View, node: Any | None) -> tuple[Array, Array | None] | None:
    """(weights, bias or None) of a layer whose parameters are stored."""
    if node is None or node.op_type not in LAYERS or len(node.input) < 2 or node.input[0] in view.stored:
        return None
    weight = view.constant(node.input[1])
    has = len(node.input) > 2 and bool(node.input[2])
    bias = view.constant(node.input[2]) if has else None
    return None if weight is None or (has and bias is None) else (weight, bias)


def _put(view: _View, node: Any, weight: Array | None, bias: Array | None) -> None:
    first, second = node.input[:2]
    third = node.input[2] if len(node.input) > 2 else ""
    if weight is not None:
        second = view.store(f"{second}.folded", weight)
    if bias is not None:
        third = view.store(f"{node.name or node.output[0]}.bias", bias)
    view.read(node, [first, second, third] if third else [first, second])


def _into_layer_before(view: _View, node: Any) -> bool:
    """Layer, then a factor or a summand for each channel: both become the layer's own."""
    found = _with_constant(view, node, ("Add", "Mul", "Sub"))
    if found is None or not view.only_for(found[0], node):
        return False
    layer: Any = view.maker(found[0])
    parameters = _layer(view, layer)
    if parameters is None:
        return False
    weight, bias = parameters
    shape = _over_outputs(layer, weight)
    if shape is None:
        return False
    channels, spread = shape
    value = _per_channel(np.asarray(view.constant(found[1])), channels, 2 if layer.op_type == "Gemm" else weight.ndim)
    old = np.zeros(channels) if bias is None else np.broadcast_to(bias.reshape(-1), (channels,))
    if value is None or (bias is not None and bias.size not in (1, channels)):
        return False
    if node.op_type == "Mul":
        _put(view, layer, weight * spread(value), None if bias is None else old * value)
    else:
        _put(view, layer, None, old + value if node.op_type == "Add" else old - value)
    view.drop(node, found[0])
    return True


def _convolutions_after(view: _View, tensor: str) -> list[Any]:
    """All readers of a value, where they are convolutions that read it as their image, and nobody else needs it; else none."""
    found = view.readers(tensor)
    if tensor in view.outputs or any(n.op_type != "Conv" or n.input[0] != tensor or _layer(view, n) is None for n in found):
        return []
    return found


def _into_layer_after(view: _View, node: Any) -> bool:
    """One factor, or a summand for each channel where nothing is padded, then convolutions: it becomes theirs.

    A factor of its own for each channel stays: it would make weights of very different size share one scale.
    """
    found = _with_constant(view, node, ("Add", "Mul"))
    layers = _convolutions_after(view, node.output[0]) if found else []
    if found is None or not layers:
        return False
    value = np.asarray(view.constant(found[1]))
    if node.op_type == "Mul":
        factor = view.number(found[1])
        if factor is None or value.ndim > view.ranks.get(found[0], 0):
            return False
        for layer in layers:
            _put(view, layer, np.asarray(view.constant(layer.input[1])) * factor, None)
        view.drop(node, found[0])
        return True
    if any(any(_attributes(n).get("pads", ())) or _attributes(n).get("auto_pad", b"NOTSET") != b"NOTSET" for n in layers):
        return False
    biases = []
    for layer in layers:
        weight, bias = _layer(view, layer) or (value, None)
        groups = int(_attributes(layer).get("group", 1))
        per_channel = _per_channel(value, weight.shape[1] * groups, weight.ndim)
        if per_channel is None:
            return False
        taps = weight.reshape(*weight.shape[:2], -1).sum(2).reshape(groups, -1, weight.shape[1])
        shift = (taps * per_channel.reshape(groups, 1, -1)).sum(2).reshape(-1)
        biases.append(shift + (0.0 if bias is None else bias))
    for layer, bias in zip(layers, biases, strict=True):
        _put(view, layer, None, bias)
    view.drop(node, found[0])
    return True


def _factor_behind_summand(view: _View, node: Any) -> bool:
    """x * s + t before convolutions that pad is (x + t / s) * s, and the factor is the convolutions' own then."""
    found = _with_constant(view, node, ("Add",))
    multiply: Any = view.maker(found[0]) if found else None
    inner = _with_constant(view, multiply, ("Mul",))
    if found is None or inner is None or not view.only_for(found[0], node):
        return False
    factor = view.number(inner[1])
    if factor is None or abs(factor) < _SMALLEST or not _convolutions_after(view, node.output[0]):
        return False
    summand = view.store(f"{found[1]}.scaled", np.asarray(view.constant(found[1])) / factor)
    # The two nodes change their work, not their places.
    view.become(multiply, "Add", [inner[0], summand])
    view.become(node, "Mul", [found[0], inner[1]])
    return True


_ACTIVATIONS = (_hard_sigmoid, _hard_swish)
_AFFINE = (_batch_norm, _into_layer_before, _into_layer_after, _factor_behind_summand)
