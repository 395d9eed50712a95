"""One session in which every quantisation of a graph can be tried: what is rounded, and to which range, is fed, not built.

Each activation goes through `If(flag) DequantizeLinear(QuantizeLinear(x, scale, zero)) else x`, each layer stands twice behind
an `If`, once with its weights rounded to s8. Building and opening a Q/DQ graph takes seconds; feeding another choice takes
none, so estimators can be chosen for each tensor, layers ranked and mixed precisions tried by what they do to the outputs.

A layer is behind the `If` as a whole because constant weights are laid out for the processor once; weights that are chosen or
fed at run time made the whole network about twice as slow, and so did `Where` in the place of `If` (decision 12).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization.quant_utils import compute_scale_zp

from appliance.compiler.quantise import Layout, quantised_with
from appliance.compiler.ranges import Array, Ranges, open_float, with_channel_means

_ON, _OFF = np.array(True), np.array(False)
_U8_LOW, _U8_HIGH = np.array(0, np.uint8), np.array(255, np.uint8)


def scale_and_zero(low: float, high: float) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """What ONNX Runtime's quantiser makes of a range for u8."""
    zero, scale = compute_scale_zp(np.array(low, np.float32), np.array(high, np.float32), _U8_LOW, _U8_HIGH)
    return np.asarray(scale, np.float32), np.asarray(zero, np.uint8)


class Probe:
    """`shifts` adds an input to each layer that is added to its channels, and `means` an output with its channels' means: what
    bias correction needs. A context manager: leaving it frees the session."""

    def __init__(self, plan: Layout, *, shifts: bool = False) -> None:
        self.plan = plan
        self.outputs = [o.name for o in plan.model.graph.output]
        self.input = plan.model.graph.input[0].name
        self.means: dict[str, str] = {}
        self.runs = 0
        self._shifts: dict[str, NDArray[np.float32]] = {}
        model = _probe_graph(plan, self._shifts if shifts else None)
        if shifts:
            model, means = with_channel_means(model, [_output(plan, name) for name in plan.layers])
            self.means = {name: means[_output(plan, name)] for name in plan.layers}
        self._session = open_float(model)

    def __enter__(self) -> Probe:
        return self

    def __exit__(self, *exc: object) -> None:
        self._session.close()

    def run(
        self,
        x: Array,
        ranges: Ranges,
        *,
        layers: Collection[str] | None = None,
        activations: Collection[str] | None = None,
        shifts: Mapping[str, Array] | None = None,
    ) -> dict[str, Array]:
        """The outputs, with these layers' weights and these activations rounded (None: all). `ranges` holds every tensor of
        `plan.tensors`; those of activations that are not rounded may be missing. Raises BackendFailed."""
        layers = self.plan.layers if layers is None else layers
        activations = self.plan.activations if activations is None else activations
        feed: dict[str, Any] = {self.input: x}
        made: dict[str, tuple[Any, Any]] = {}
        for tensor, source in self.plan.activations.items():
            on = tensor in activations
            if source not in made:
                made[source] = scale_and_zero(*ranges.get(source, (0.0, 1.0)))
                feed[f"{source}.scale"], feed[f"{source}.zero"] = made[source]
            feed[f"{tensor}.on"] = _ON if on else _OFF
        for name in self.plan.layers:
            feed[f"{name}.in_s8"] = _ON if name in layers else _OFF
        for name, zero in self._shifts.items():
            given = (shifts or {}).get(name)
            feed[f"{name}.shift"] = zero if given is None else np.asarray(given, np.float32).reshape(zero.shape)
        self.runs += 1
        return dict(self._session.run(feed))

    def without(self, keep_float: Collection[str]) -> dict[str, frozenset[str]]:
        """The arguments of `run` under which these layers are in float, as `quantise(keep_float=...)` would leave them."""
        held = frozenset(keep_float)
        return {"layers": frozenset(self.plan.layers) - held, "activations": quantised_with(self.plan, held)}


class Loss:
    """How far the outputs are from the float outputs on a few images: noise power over signal power, the mean over outputs.

    -10 log10 of it is the SQNR in decibels. The signal of an output is its variance over all images (its mean square where
    it is constant), so outputs of different size weigh the same.
    """

    def __init__(self, probe: Probe, images: Sequence[Array]) -> None:
        self.probe = probe
        self.images = list(images)
        self.truth = [probe.run(x, {}, layers=(), activations=()) for x in self.images]
        self.power = {}
        for name in probe.outputs:
            values = [t[name].astype(np.float64) for t in self.truth]
            mean = float(np.mean([v.mean() for v in values]))
            power = float(np.mean([((v - mean) ** 2).mean() for v in values]))
            self.power[name] = power or float(np.mean([(v**2).mean() for v in values])) or 1.0

    def __call__(self, ranges: Ranges, first: int | None = None, **choice: Any) -> float:
        """The loss of one quantisation, on the `first` images (None: all); `choice` as `Probe.run` takes it."""
        count = len(self.images) if first is None else min(first, len(self.images))
        return self.of([self.probe.run(x, ranges, **choice) for x in self.images[:count]])

    def of(self, found: Sequence[Mapping[str, Array]]) -> float:
        """The loss of outputs that were computed elsewhere, for the first images in order."""
        ratios = []
        for name in self.probe.outputs:
            noise = [float(((g[name].astype(np.float64) - t[name]) ** 2).mean()) for g, t in zip(found, self.truth, strict=False)]
            ratios.append(float(np.mean(noise)) / self.power[name])
        return float(np.mean(ratios))


def sqnr_db(loss: float) -> float:
    """Signal to quantisation noise in decibels."""
    return float(-10.0 * np.log10(max(loss, 1e-12)))


def _output(plan: Layout, layer: str) -> str:
    return str(next(n.output[0] for n in plan.graph.nodes if n.name == layer))


def _probe_graph(plan: Layout, shifts: dict[str, NDArray[np.float32]] | None) -> Any:
    """The graph with its flags, scales, zero points (and shifts, whose zeros are put into `shifts`) as inputs."""
    model = onnx.ModelProto()
    model.CopyFrom(plan.model)
    graph = model.graph
    stored = {t.name: t for t in graph.initializer}
    for node in graph.node:
        for k, tensor in enumerate(node.input):
            if tensor in plan.activations:
                node.input[k] = f"{tensor}.probed"

    def feed(name: str, kind: int, shape: Sequence[int] = ()) -> str:
        graph.input.append(helper.make_tensor_value_info(name, kind, shape))
        return name

    for source in plan.tensors:
        feed(f"{source}.scale", TensorProto.FLOAT)
        feed(f"{source}.zero", TensorProto.UINT8)

    def probed(tensor: str) -> Any:
        source, flag = plan.activations[tensor], feed(f"{tensor}.on", TensorProto.BOOL)
        scale, zero = f"{source}.scale", f"{source}.zero"
        quantised, back, same = f"{tensor}.u8", f"{tensor}.u8.float", f"{tensor}.same"
        then = helper.make_graph(
            [
                helper.make_node("QuantizeLinear", [tensor, scale, zero], [quantised]),
                helper.make_node("DequantizeLinear", [quantised, scale, zero], [back]),
            ],
            "rounded",
            [],
            [helper.make_tensor_value_info(back, TensorProto.FLOAT, None)],
        )
        other = helper.make_graph(
            [helper.make_node("Identity", [tensor], [same])], "same", [], [helper.make_tensor_value_info(same, TensorProto.FLOAT, None)]
        )
        return helper.make_node("If", [flag], [f"{tensor}.probed"], name=f"{tensor}.probe", then_branch=then, else_branch=other)

    def branch(node: Any, tag: str, weight: NDArray[np.float32]) -> Any:
        twin = onnx.NodeProto()
        twin.CopyFrom(node)
        twin.output[0] = f"{node.output[0]}.{tag}"
        twin.input[1] = f"{node.input[1]}.{tag}"
        constants = [numpy_helper.from_array(np.ascontiguousarray(weight), twin.input[1])]
        if len(node.input) > 2 and node.input[2]:
            twin.input[2] = f"{node.input[2]}.{tag}"
            constants.append(numpy_helper.from_array(numpy_helper.to_array(stored[node.input[2]]), twin.input[2]))
        return helper.make_graph([twin], tag, [], [helper.make_tensor_value_info(twin.output[0], TensorProto.FLOAT, None)], constants)

    nodes = [probed(t) for t in plan.activations if t == graph.input[0].name]
    for node in list(graph.node):
        if node.name in plan.layers:
            flag = feed(f"{node.name}.in_s8", TensorProto.BOOL)
            then = branch(node, "s8", plan.rounded[node.name])
            other = branch(node, "f32", numpy_helper.to_array(stored[node.input[1]]))
            made = node.output[0] if shifts is None else f"{node.output[0]}.unshifted"
            nodes.append(helper.make_node("If", [flag], [made], name=node.name, then_branch=then, else_branch=other))
            if shifts is not None:
                zeros = np.zeros(_shift_shape(plan, node), np.float32)
                shifts[node.name] = zeros
                nodes.append(helper.make_node("Add", [made, feed(f"{node.name}.shift", TensorProto.FLOAT, zeros.shape)], list(node.output)))
        else:
            nodes.append(node)
        nodes += [probed(o) for o in node.output if o in plan.activations]
    blobs = [n.SerializeToString() for n in nodes]
    del graph.node[:]
    for blob in blobs:
        graph.node.add().ParseFromString(blob)
    used = {t for n in graph.node for t in n.input}
    live = [t.SerializeToString() for t in graph.initializer if t.name in used]
    del graph.initializer[:]
    for blob in live:
        graph.initializer.add().ParseFromString(blob)
    return model


def _shift_shape(plan: Layout, node: Any) -> tuple[int, ...]:
    """One value for each output channel, shaped so that it adds to the layer's output."""
    channels = plan.rounded[node.name].shape[0 if node.op_type == "Conv" else 1]
    if node.op_type == "Gemm":
        channels = plan.rounded[node.name].shape[0 if any(a.name == "transB" and a.i for a in node.attribute) else 1]
    rank = plan.rounded[node.name].ndim if node.op_type in ("Conv", "ConvTranspose") else 1
    return (1, channels, *[1] * (rank - 2)) if rank > 1 else (channels,)
