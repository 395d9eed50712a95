"""From a float graph and its ranges to a Q/DQ graph, in two flavours: what CPU runtimes want, and what TensorRT wants.

"u8": u8 activations, s8 weights for each output channel, 32-bit bias; every runtime on a CPU takes it.
"symmetric": s8 activations and weights with zero points of 0, bias in float, Q/DQ only where a weighted layer reads; what
TensorRT's explicit quantisation asks for. Both come from one record of ranges, so nobody calibrates twice.

The rewriting is ONNX Runtime's. What is ours is what stays in float, always: whatever makes a graph output (a score and a box
must not share a range, and a heatmap is evidence), and everything that no weighted layer comes after, because there the
answer itself is computed and eight bits save nothing. An operator that we do not know stays in float too.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationMethod, QuantType
from onnxruntime.quantization.calibrate import TensorsData
from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

from appliance.compiler import ranges as measured
from appliance.compiler.ranges import Ranges as Ranges
from appliance.errors import GraphUnsupported

Flavour = Literal["u8", "symmetric"]
WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
# Clip and Relu are among them so that they become the saturation of their own range: else the values before them would be
# measured and rounded, most of which they throw away.
REMOVABLE = ("Clip", "Relu")
ARITHMETIC = ("Add", "Mul", "Concat", "Split", "LeakyRelu", "Sigmoid", "GlobalAveragePool")
# Their output has the range of their input.
MOVING = ("MaxPool", "AveragePool", "Resize", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Slice")
U8_OPS = (*WEIGHTED, *REMOVABLE, *ARITHMETIC, *MOVING)
OLDEST_OPSET = 13  # the first whose DequantizeLinear has a scale for each channel


def measure_ranges(model: Any, inputs: Iterable[NDArray[np.float32]], progress: Callable[[], None] | None = None) -> Ranges:
    """Smallest and largest value of every activation over the calibration inputs; memory does not grow with their number.

    Raises CalibrationInvalid where there is no input, or where values are not finite.
    """
    found = measured.collect(model, inputs, progress=progress)
    return {name: measured.min_max(h) for name, h in found.items()}


@dataclass(frozen=True)
class Layer:
    """One weighted node that can be quantised, and the activations that are quantised for its sake."""

    name: str
    weight: str
    tensors: tuple[str, ...]


@dataclass(frozen=True)
class Layout:
    """What quantising a graph would quantise. `model` is the float graph as the quantiser sees it, `activations` each tensor
    with the one whose range it has, `rounded` each layer's weights after a round trip through s8."""

    model: Any
    activations: dict[str, str]
    layers: dict[str, Layer]
    rounded: dict[str, NDArray[np.float32]]
    float_nodes: frozenset[str]

    @cached_property
    def graph(self) -> _Graph:
        return _Graph(self.model)

    @property
    def tensors(self) -> list[str]:
        """The activations that need a range."""
        return sorted(set(self.activations.values()))


class _Graph:
    """A normalised copy of a model, and who makes and reads what in it."""

    def __init__(self, model: Any) -> None:
        self.model = normalised(model)
        graph = self.model.graph
        self.nodes = list(graph.node)
        self.stored = {t.name: t for t in graph.initializer}
        self.outputs = {o.name for o in graph.output}
        self.shapes = measured.float_tensors(self.model)
        self.makers = {o: n for n in self.nodes for o in n.output if o}
        self.readers: dict[str, list[Any]] = {}
        for node in self.nodes:
            for tensor in node.input:
                self.readers.setdefault(tensor, []).append(node)

    def is_layer(self, node: Any) -> bool:
        """A weighted node whose weights are stored, in a form that a scale for each output channel fits."""
        if node.op_type not in WEIGHTED or len(node.input) < 2 or node.input[1] not in self.stored or node.input[0] in self.stored:
            return False
        weight = self.stored[node.input[1]]
        if weight.data_type != TensorProto.FLOAT or node.input[0] not in self.shapes or node.output[0] not in self.shapes:
            return False
        if node.op_type in ("Gemm", "MatMul") and len(weight.dims) != 2:
            return False
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        if node.op_type == "ConvTranspose" and attributes.get("group", 1) != 1:
            return False
        if len(node.input) < 3 or not node.input[2]:
            return True
        if node.input[2] not in self.stored:
            return False
        channels = weight.dims[channel_axis(node)]
        return list(self.stored[node.input[2]].dims) == [channels]

    def float_names(self, ops: Collection[str], keep: Collection[str]) -> set[str]:
        """Names of the nodes that stay in float, among all nodes."""
        layers = {n.name for n in self.nodes if self.is_layer(n)}
        before_a_layer: set[str] = set()  # tensors from which a weighted layer can still be reached
        out: set[str] = set()
        for node in reversed(self.nodes):
            reaches = any(o in before_a_layer for o in node.output)
            if node.name in layers or reaches:
                before_a_layer.update(node.input)
            gives = any(o in self.outputs for o in node.output)
            known = node.op_type in ops and (node.op_type not in WEIGHTED or node.name in layers)
            if gives or not reaches or not known or not self._plain(node):
                out.add(node.name)
        # What adds to, joins or moves the output of a layer in float stays in float with it, else it would round what the
        # layer was kept for.
        out |= set(keep)
        held = {o for n in self.nodes if n.name in keep for o in n.output}
        for node in self.nodes:
            if node.op_type not in WEIGHTED and any(t in held for t in node.input):
                out.add(node.name)
                held.update(node.output)
        return out

    def _plain(self, node: Any) -> bool:
        """Whether every input that could be rounded is an activation: a stored summand or factor is left as it is."""
        if node.op_type in WEIGHTED:
            return True
        if node.op_type in ("Add", "Mul", "Concat"):
            return all(t in self.shapes for t in node.input)
        return bool(node.input) and node.input[0] in self.shapes


def channel_axis(node: Any) -> int:
    """The axis of a weighted node's weights that runs over its output channels."""
    if node.op_type == "Conv":
        return 0
    if node.op_type == "Gemm":
        return 0 if any(a.name == "transB" and a.i for a in node.attribute) else 1
    return 1


def normalised(model: Any) -> Any:
    """A copy in which every node has a name, constants are stored, no two layers share weights, and a graph output that inner
    nodes read too is read by them through an Identity, so that nothing rounds what the graph gives out.

    Raises GraphUnsupported for an opset that cannot be brought to `OLDEST_OPSET`.
    """
    out = onnx.ModelProto()
    out.CopyFrom(model)
    if next((o.version for o in out.opset_import if o.domain in ("", "ai.onnx")), 0) < OLDEST_OPSET:
        try:
            out = onnx.version_converter.convert_version(out, OLDEST_OPSET)
        except Exception as error:
            raise GraphUnsupported(f"the graph's opset is below {OLDEST_OPSET} and cannot be raised: {error}") from error
    graph = out.graph
    nodes, taken = [], {n.name for n in graph.node}
    for i, node in enumerate(graph.node):
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            tensor = graph.initializer.add()
            tensor.CopyFrom(node.attribute[0].t)
            tensor.name = node.output[0]
            continue
        if not node.name:
            node.name = f"node_{i}"
            while node.name in taken:
                node.name += "_"
            taken.add(node.name)
        nodes.append(node)
    read = {t for n in nodes if n.op_type != "Identity" for t in n.input}  # one Identity is enough, also the second time
    stored = {t.name: t for t in graph.initializer}
    extra = []
    for value in graph.output:
        if value.name in read:
            inner = f"{value.name}.inner"
            for node in nodes:
                for k, tensor in enumerate(node.input):
                    if tensor == value.name:
                        node.input[k] = inner
            extra.append((value.name, helper.make_node("Identity", [value.name], [inner], name=inner)))
    seen: set[str] = set()
    for node in nodes:
        if node.op_type in WEIGHTED and len(node.input) > 1 and node.input[1] in stored:
            if node.input[1] in seen:
                twin = graph.initializer.add()
                twin.CopyFrom(stored[node.input[1]])
                twin.name = f"{node.input[1]}.{node.name}"
                node.input[1] = twin.name
            seen.add(node.input[1])
    ordered = []
    for node in nodes:
        ordered.append(node)
        ordered.extend(identity for output, identity in extra if output in node.output)
    kept = [n.SerializeToString() for n in ordered]
    del graph.node[:]
    for blob in kept:
        graph.node.add().ParseFromString(blob)
    return out


def float_nodes(model: Any) -> list[str]:
    """Names of the nodes that stay in float whatever the ranges are: those that make a graph output, those that no weighted
    layer comes after, and those of operators that are not quantised."""
    graph = _Graph(model)
    names = graph.float_names(U8_OPS, ())
    return [n.name for n in graph.nodes if n.name in names]


def quantise(model: Any, ranges: Ranges, *, flavour: Flavour = "u8", keep_float: Collection[str] = ()) -> tuple[Any, float]:
    """The Q/DQ graph, and the share of weights that stayed in float. `keep_float` names further nodes that must.

    Nodes without a name are called node_0, node_1 ... by their place, here and in every answer of this module. Raises
    GraphUnsupported where the quantiser cannot rewrite the graph.
    """
    graph = _Graph(model)
    known = _with_removed(graph, ranges)
    ops = U8_OPS if flavour == "u8" else WEIGHTED
    excluded = graph.float_names(ops, keep_float)
    for node in graph.nodes:
        touched = (t for t in (*node.input, *node.output) if t in graph.shapes)
        if node.name not in excluded and any(t not in known for t in touched):
            excluded.add(node.name)  # never seen during calibration
    out = _rewritten(graph.model, known, flavour, ops, excluded)
    layers = [n for n in graph.nodes if n.op_type in WEIGHTED and len(n.input) > 1 and n.input[1] in graph.stored]
    sizes = {n.name: int(np.prod(graph.stored[n.input[1]].dims)) for n in layers}
    kept = sum(size for name, size in sizes.items() if name in excluded)
    return out, kept / max(sum(sizes.values()), 1)


def _with_removed(graph: _Graph, ranges: Ranges) -> Ranges:
    """The ranges, and those that follow from them: what feeds nothing but a Clip or Relu has the range that this lets through,
    and what only moves values has that of its input."""
    known = {k: v for k, v in ranges.items() if k in graph.shapes}
    for node in graph.nodes:
        source = node.input[0] if node.input else ""
        if node.op_type in REMOVABLE and source not in known and node.output[0] in known and len(graph.readers.get(source, ())) == 1:
            known[source] = known[node.output[0]]
    for node in graph.nodes:
        if node.op_type in (*MOVING, "Split", "Identity") and node.input[0] in known:
            for output in node.output:
                known.setdefault(output, known[node.input[0]])
    return known


def _rewritten(model: Any, ranges: Ranges, flavour: Flavour, ops: Collection[str], excluded: Collection[str]) -> Any:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    data = TensorsData(CalibrationMethod.MinMax, {k: (np.float32(low), np.float32(high)) for k, (low, high) in ranges.items()})
    options: dict[str, Any] = {"ActivationSymmetric": False, "WeightSymmetric": True, "QDQOpTypePerChannelSupportToAxis": {"MatMul": 1}}
    if flavour == "symmetric":
        # TensorRT refuses a 32-bit bias that is dequantised, and wants a layer's output whole: it fuses what follows the layer
        # and rounds once, where the next layer reads.
        options |= {"ActivationSymmetric": True, "QuantizeBias": False, "OpTypesToExcludeOutputQuantization": list(ops)}
    kind = QuantType.QUInt8 if flavour == "u8" else QuantType.QInt8
    try:
        with _quiet():
            quantiser = QDQQuantizer(
                copy,
                per_channel=True,
                # Processors without VNNI add two products in 16 bits and cut off what does not fit: 255 * 127 * 2 does not, 255 * 63 * 2
                # does. Measured, that costs 9 to 14 dB; seven bits cost 3 to 5, and give every runtime the same answer.
                reduce_range=flavour == "u8",
                weight_qType=QuantType.QInt8,
                activation_qType=kind,
                tensors_range=data,
                nodes_to_quantize=[],
                nodes_to_exclude=sorted(excluded),
                op_types_to_quantize=list(ops),
                extra_options=options,
            )
            quantiser.quantize_model()
            quantiser.model.topological_sort()
        out = quantiser.model.model
        for node in out.graph.node:
            node.doc_string = ""
        _guard(out.graph)
        onnx.checker.check_model(out)
    except Exception as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise GraphUnsupported(f"the graph cannot be quantised: {first}", remedy="Name the nodes to keep in float in the card.") from error
    return out


def _guard(graph: Any) -> None:
    """Put a Sum of one summand before each layer in float that lies between rounded activations.

    ONNX Runtime 1.31 (WeightBiasQuantization) rounds the float weights of a layer that it finds between Dequantize and
    QuantizeLinear, with one scale for all channels: what was kept in float to save the metric would be lost without a word.
    The Sum ends that pattern in the graph itself, for whatever session options the runtime is opened with.
    """
    makers = {o: n for n in graph.node for o in n.output}
    readers: dict[str, list[Any]] = {}
    for node in graph.node:
        for tensor in node.input:
            readers.setdefault(tensor, []).append(node)

    def dequantised(tensor: str) -> bool:
        return tensor in makers and makers[tensor].op_type == "DequantizeLinear"

    def rounded(tensor: str) -> bool:
        return any(n.op_type == "QuantizeLinear" or (n.op_type in REMOVABLE and rounded(n.output[0])) for n in readers.get(tensor, ()))

    for at, node in reversed(list(enumerate(graph.node))):
        if node.op_type in WEIGHTED and dequantised(node.input[0]) and not dequantised(node.input[1]) and rounded(node.output[0]):
            guard = helper.make_node("Sum", [node.input[0]], [f"{node.name}.guard"], name=f"{node.name}.guard")
            node.input[0] = guard.output[0]
            graph.node.insert(at, guard)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The quantiser speaks to the root logger of what it leaves alone; that is what the float share is for."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(level)


# -- what would be quantised --------------------------------------------------------------------------------------------


def layout(model: Any, keep_float: Collection[str] = ()) -> Layout:
    """What `quantise(model, ..., flavour="u8")` quantises, read from a graph that it rewrites with ranges of no meaning."""
    graph = _Graph(model)
    excluded = graph.float_names(U8_OPS, keep_float)
    q = _rewritten(graph.model, dict.fromkeys(graph.shapes, (-8.0, 8.0)), "u8", U8_OPS, excluded)
    activations = {n.input[0]: n.input[1].removesuffix("_scale") for n in q.graph.node if n.op_type == "QuantizeLinear"}
    # A graph input keeps its name; an activation that the quantiser renamed does not.
    activations = {k.removesuffix("_QuantizeLinear_Input"): v for k, v in activations.items()}
    layers = {}
    for node in graph.nodes:
        if node.name in excluded or not graph.is_layer(node):
            continue
        tensors = [node.input[0], node.output[0]]
        readers = graph.readers.get(node.output[0], [])
        if len(readers) == 1 and readers[0].op_type in REMOVABLE:
            tensors.append(readers[0].output[0])
        layers[node.name] = Layer(node.name, node.input[1], tuple(t for t in tensors if t in activations))
    return Layout(graph.model, activations, layers, _rounded(q, {v.weight: k for k, v in layers.items()}), frozenset(excluded))


def _rounded(q: Any, weights: dict[str, str]) -> dict[str, NDArray[np.float32]]:
    """Layer name -> its weights as the Q/DQ graph `q` gives them to it; `weights` maps a stored tensor to its layer."""
    stored = {t.name: t for t in q.graph.initializer}
    out = {}
    for node in q.graph.node:
        weight = node.input[0].removesuffix("_quantized")
        if node.op_type == "DequantizeLinear" and weight in weights:
            values = numpy_helper.to_array(stored[node.input[0]]).astype(np.float32)
            scale = numpy_helper.to_array(stored[node.input[1]]).astype(np.float32)
            if scale.ndim:
                axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
                scale = scale.reshape([-1 if a == axis else 1 for a in range(values.ndim)])
            out[weights[weight]] = values * scale
    return out


def quantised_with(plan: Layout, keep_float: Collection[str]) -> frozenset[str]:
    """Which of the layout's activations are still quantised where these further layers stay in float."""
    graph = plan.graph
    excluded = set(plan.float_nodes) | graph.float_names(U8_OPS, keep_float)
    on: set[str] = set()
    for node in graph.nodes:
        if node.name in excluded:
            continue
        tensors = [*node.input, *node.output]
        if node.op_type in MOVING and node.input[0] not in on:
            continue
        if node.op_type in REMOVABLE:
            maker = graph.makers.get(node.input[0])
            # Merged into the layer before it, or left alone with it.
            if maker is None or maker.name in excluded:
                continue
        on.update(t for t in tensors if t in plan.activations)
    return frozenset(on)
