"""Changes of the float graph that make it lose less in eight bits, each kept only where the measured loss falls.

Cross-layer equalisation (Nagel et al., ICCV 2019) moves scale from one layer's channels to the next one's, through nothing or
a ReLU, without changing what the network computes. It is not done through Clip or ReLU6, which it would change.
Bias correction (the same paper, the empirical form) takes the mean shift that rounding causes in each output channel out of
the layer's bias. Both flavours are written from the adjusted graph, so both profit.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from appliance.compiler import ranges as measured
from appliance.compiler.probe import Loss, Probe, sqnr_db
from appliance.compiler.quantise import Layout, layout, normalised
from appliance.compiler.ranges import Array, Ranges

WAVES = 8  # groups of neighbouring layers that bias correction treats at once
MAX_PAIRS = 4  # tried one by one, where all at once did not help
_LARGEST_SHIFT = 64.0  # of a channel's scale: beyond it one of the two layers has a dead channel
_ROUNDS = 20


@dataclass(frozen=True)
class Change:
    """What one adjustment did: loss on the images that judged it (see `probe.Loss`), and the layers that it changed."""

    name: str
    before: float
    after: float
    layers: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "sqnr_db_before": round(sqnr_db(self.before), 3),
            "sqnr_db_after": round(sqnr_db(self.after), 3),
            "layers": list(self.layers),
        }


# -- cross-layer equalisation -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """Two convolutions with nothing or a ReLU between them, and nobody else who reads what is between."""

    first: str
    second: str


def pairs(model: Any) -> list[Pair]:
    """Every pair of the graph whose channels can be rescaled without changing the function. `model` is normalised."""
    graph = model.graph
    stored = {t.name for t in graph.initializer}
    readers: dict[str, list[Any]] = {}
    for node in graph.node:
        for tensor in node.input:
            readers.setdefault(tensor, []).append(node)
    outputs = {o.name for o in graph.output}
    out = []
    for node in graph.node:
        if node.op_type != "Conv" or any(t not in stored for t in node.input[1:] if t):
            continue
        tensor = node.output[0]
        while True:
            after = readers.get(tensor, [])
            if tensor in outputs or len(after) != 1 or after[0].op_type not in ("Relu", "LeakyRelu", "Conv"):
                break
            if after[0].op_type == "Conv":
                if after[0].input[0] == tensor and after[0].input[1] in stored and len(readers[after[0].input[1]]) == 1:
                    out.append(Pair(node.name, after[0].name))
                break
            tensor = after[0].output[0]
    own = {n.name: [t for t in n.input[1:] if t] for n in graph.node}
    return [p for p in out if all(len(readers[t]) == 1 for t in own[p.first])]


def _groups(node: Any) -> int:
    return next((int(a.i) for a in node.attribute if a.name == "group"), 1)


def equalised(model: Any, chosen: Sequence[Pair]) -> Any:
    """A copy in which each pair's channels have the same largest weight on both sides: s = sqrt(r1 / r2) leaves the first
    layer's channel and enters the second's. Chains are gone through until they settle."""
    out = onnx.ModelProto()
    out.CopyFrom(model)
    nodes = {n.name: n for n in out.graph.node}
    stored = {t.name: t for t in out.graph.initializer}
    arrays: dict[str, NDArray[np.float64]] = {}
    for pair in chosen:
        for name in (*nodes[pair.first].input[1:], nodes[pair.second].input[1]):
            if name:
                arrays[name] = numpy_helper.to_array(stored[name]).astype(np.float64)
    for _ in range(_ROUNDS):
        largest = 1.0
        for pair in chosen:
            first, second = nodes[pair.first], nodes[pair.second]
            w1, w2 = arrays[first.input[1]], arrays[second.input[1]]
            groups = _groups(second)
            per_group = w2.shape[1]
            # Input channel c of a grouped convolution is column c % per_group of the filters of group c // per_group.
            split = w2.reshape(groups, -1, *w2.shape[1:])
            r1 = np.abs(w1).reshape(len(w1), -1).max(1)
            r2 = np.abs(np.moveaxis(split, 2, 1)).reshape(groups * per_group, -1).max(1)
            alive = (r1 > 0) & (r2 > 0)
            s = np.ones(len(w1))
            s[alive] = np.clip(np.sqrt(r1[alive] / r2[alive]), 1 / _LARGEST_SHIFT, _LARGEST_SHIFT)
            arrays[first.input[1]] = w1 / s.reshape(-1, *[1] * (w1.ndim - 1))
            if len(first.input) > 2 and first.input[2]:
                arrays[first.input[2]] = arrays[first.input[2]] / s
            scaled = split * s.reshape(groups, 1, per_group, *[1] * (w2.ndim - 2))
            arrays[second.input[1]] = scaled.reshape(w2.shape)
            largest = max(largest, float(s.max()), float((1 / s).max()))
        if largest < 1.01:
            break
    for name, values in arrays.items():
        stored[name].CopyFrom(numpy_helper.from_array(np.ascontiguousarray(values, np.float32), name))
    return out


def equalise(model: Any, images: Sequence[Array], keep_float: Collection[str] = ()) -> tuple[Any, Change]:
    """`model` with the pairs equalised that lower the loss on `images`: all, else those that help one by one."""
    base = normalised(model)
    found = pairs(base)

    def loss(candidate: Any) -> float:
        plan = layout(candidate, keep_float)
        seen = measured.collect(plan.model, images, plan.tensors)
        with Probe(plan) as probe:
            return Loss(probe, images)({name: measured.min_max(h) for name, h in seen.items()})

    if not found:
        return base, Change("cross-layer equalisation", 1.0, 1.0, ())
    before = loss(base)
    everything = equalised(base, found)
    best, after, kept = base, before, list[Pair]()
    attempt = loss(everything)
    if attempt < before:
        best, after, kept = everything, attempt, found
    elif len(found) > 1:
        for pair in found[:MAX_PAIRS]:
            candidate = equalised(base, [*kept, pair])
            attempt = loss(candidate)
            if attempt < after:
                best, after, kept = candidate, attempt, [*kept, pair]
    return best, Change("cross-layer equalisation", before, after, tuple(f"{p.first} -> {p.second}" for p in kept))


# -- bias correction ----------------------------------------------------------------------------------------------------


def correct_bias(
    plan: Layout, ranges: Ranges, images: Sequence[Array], progress: Callable[[], None] | None = None, waves: int = WAVES
) -> tuple[Any, Change]:
    """The plan's float graph with corrected biases. Shifts are measured on the even images, and judged on the odd ones.

    Layers are corrected in the order of the graph, a wave of neighbours at a time, so that a later one does not correct again
    what an earlier one already has.
    """
    nodes = {n.name: n for n in plan.graph.nodes}
    names = [n for n in plan.layers if _takes_bias(nodes[n])]
    even = range(0, len(images), 2)
    odd = [i for i in range(len(images)) if i % 2] or list(even)
    with Probe(plan, shifts=True) as probe:
        judge = Loss(probe, [images[i] for i in odd])
        truth = _means(probe, [probe.run(images[i], {}, layers=(), activations=()) for i in even])

        def attempt(shifts: dict[str, Array]) -> tuple[float, dict[str, NDArray[np.float64]]]:
            found = [probe.run(x, ranges, shifts=shifts) for x in images]
            if progress:
                progress()
            return judge.of([found[i] for i in odd]), _means(probe, [found[i] for i in even])

        shifts: dict[str, Array] = {}
        loss, means = attempt(shifts)
        before = loss
        size = max(1, -(-len(names) // waves))
        for start in range(0, len(names), size):
            wave = names[start : start + size]
            tried = shifts | {n: (shifts.get(n, np.float32(0)) + truth[n] - means[n]).astype(np.float32) for n in wave}
            candidate, its_means = attempt(tried)
            if candidate < loss:
                shifts, loss, means = tried, candidate, its_means
    return _shifted(plan.model, shifts), Change("bias correction", before, loss, tuple(shifts))


def _takes_bias(node: Any) -> bool:
    return node.op_type in ("Conv", "ConvTranspose") or (
        node.op_type == "Gemm" and not any(a.name in ("alpha", "beta") and a.f != 1.0 for a in node.attribute)
    )


def _means(probe: Probe, found: Sequence[dict[str, Array]]) -> dict[str, NDArray[np.float64]]:
    return {name: np.mean([f[output].astype(np.float64) for f in found], axis=0) for name, output in probe.means.items()}


def _shifted(model: Any, shifts: dict[str, Array]) -> Any:
    out = onnx.ModelProto()
    out.CopyFrom(model)
    stored = {t.name: t for t in out.graph.initializer}
    readers: dict[str, int] = {}
    for node in out.graph.node:
        for tensor in node.input:
            readers[tensor] = readers.get(tensor, 0) + 1
    for node in out.graph.node:
        shift = shifts.get(node.name)
        if shift is None:
            continue
        values = np.ascontiguousarray(shift, np.float32).reshape(-1)
        has = len(node.input) > 2 and bool(node.input[2])
        if has:
            values = numpy_helper.to_array(stored[node.input[2]]) + values
        if has and readers[node.input[2]] == 1:
            stored[node.input[2]].CopyFrom(numpy_helper.from_array(values, node.input[2]))
            continue
        name = f"{node.name}.bias"
        out.graph.initializer.append(numpy_helper.from_array(values, name))
        kept = list(node.input[:2])
        del node.input[:]
        node.input.extend([*kept, name])
    onnx.checker.check_model(out)
    return out


def is_same_function(a: Any, b: Any, x: Array, tolerance: float = 1e-3) -> bool:
    """Whether two float graphs give the same outputs for `x`, within `tolerance` of each output's spread."""
    name = a.graph.input[0].name
    first, second = measured.open_float(a), measured.open_float(b)
    try:
        left, right = first.run({name: x}), second.run({name: x})
    finally:
        first.close()
        second.close()
    return all(float(np.abs(left[k] - right[k]).max()) <= tolerance * max(float(np.ptp(left[k])), 1e-6) for k in left)
