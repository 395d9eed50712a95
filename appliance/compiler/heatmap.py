"""Attach the fused heatmap: the explanation becomes a second output of the same pass.

For features F (C x h x w), global average pooling and a linear layer W, b:  logit_k = W_k . mean(F) + b_k
= mean(W_k . F) + b_k, so the 1x1 convolution cam = W * F is the class activation map (Zhou et al., CVPR 2016), equal to
Grad-CAM (Selvaraju et al., ICCV 2017) before its ReLU up to the constant 1 / (h w). The graph's own pooling and linear layer
are replaced by mean(cam) + b, which computes the same logits from the map itself.

`attach_cam` does this for the heads of the trained families. `attach` takes any network: it differentiates the head in reverse,
from the logits to the pooled features p, and writes what is not constant of it into the graph. Grad-CAM's weights are the mean
of d logit_k / d F over the map, which is d logit_k / d p up to 1 / (h w), so map = (d logit / d p) F. Where the head is linear
the derivative is a constant and the map is the CAM. What has no pooled head gets the last convolution's own logits, else a
map that knows no class, else none; MapSpec says which, and never calls one by the name of another.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from appliance.compiler.graph import drop_dead, fresh, infer, reads, replace, upstream
from appliance.compiler.subject import MapSpec
from appliance.errors import GraphUnsupported

CAM = "cam"
PREFIX = "heatmap."  # of the names of nodes that make a map; they stay in float
MAX_PRODUCTS = 1 << 25  # of the map of every class; above, the map is of the highest class only
Vector = NDArray[np.float32]
Shapes = dict[str, tuple[int, ...]]


def attach_cam(model: Any, logits: str = "logits") -> tuple[Any, list[float]]:
    """A copy of `model` with output `cam` (N x classes x h x w) beside `logits`, and the head's bias.

    Accepts ReduceMean over (2, 3) or GlobalAveragePool (with Flatten, Reshape or Squeeze), then Gemm, or MatMul and Add.
    Raises GraphUnsupported naming the node where the head is anything else.
    """
    out = onnx.ModelProto()
    out.CopyFrom(model)
    graph = out.graph
    makers = {o: n for n in graph.node for o in n.output}
    tensors = {t.name: t for t in graph.initializer}

    def array(name: str) -> Any:
        if name not in tensors:
            raise GraphUnsupported("the head's weights are computed, not stored", value=name)
        return numpy_helper.to_array(tensors[name])

    head = makers.get(logits)
    dead = []
    if head is not None and head.op_type == "Gemm":
        attributes = {a.name: helper.get_attribute_value(a) for a in head.attribute}
        if attributes.get("alpha", 1.0) != 1.0 or attributes.get("beta", 1.0) != 1.0 or attributes.get("transA", 0):
            raise GraphUnsupported("the head scales its product", value=head.name)
        weight = array(head.input[1])
        weight = weight if attributes.get("transB", 0) else weight.T
        bias = array(head.input[2]) if len(head.input) > 2 else np.zeros(weight.shape[0], np.float32)
        dead.append(head)
        pooled = head.input[0]
    elif head is not None and head.op_type == "Add":
        product, bias_name = (head.input[0], head.input[1]) if head.input[1] in tensors else (head.input[1], head.input[0])
        matmul = makers.get(product)
        if matmul is None or matmul.op_type != "MatMul":
            raise GraphUnsupported("the head is not linear", value=head.name)
        weight, bias = array(matmul.input[1]).T, array(bias_name)
        dead += [head, matmul]
        pooled = matmul.input[0]
    else:
        raise GraphUnsupported("the head is not a linear layer", value=head.op_type if head is not None else f"no node makes {logits}")
    while pooled in makers and makers[pooled].op_type in ("Flatten", "Reshape", "Squeeze"):
        dead.append(makers[pooled])
        pooled = makers[pooled].input[0]
    pool = makers.get(pooled)
    if pool is None or pool.op_type not in ("ReduceMean", "GlobalAveragePool"):
        raise GraphUnsupported("no global average pooling before the linear layer", value=pool.op_type if pool is not None else pooled)
    if pool.op_type == "ReduceMean":
        axes = sorted(int(a) % 4 for a in array(pool.input[1])) if len(pool.input) > 1 else []
        if axes != [2, 3]:
            raise GraphUnsupported("the pooling is not over rows and columns", value=axes)
    dead.append(pool)
    features = pool.input[0]
    dead_ids = {id(n) for n in dead}
    for node in graph.node:
        if id(node) not in dead_ids and any(o in node.input for n in dead for o in n.output):
            raise GraphUnsupported("something else reads the head's inner values", value=node.name)
    inner = {o for n in dead for o in n.output} - {logits}
    for value in graph.output:
        if value.name in inner:
            raise GraphUnsupported("something else reads the head's inner values", value=f"output {value.name}")
    kept = [n for n in graph.node if id(n) not in dead_ids]
    del graph.node[:]
    graph.node.extend(kept)
    graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(weight[:, :, None, None], np.float32), "cam.weight"))
    graph.initializer.append(numpy_helper.from_array(np.asarray(bias, np.float32), "cam.bias"))
    graph.initializer.append(numpy_helper.from_array(np.array([2, 3], np.int64), "cam.axes"))
    graph.node.extend(
        [
            helper.make_node("Conv", [features, "cam.weight"], [CAM], name="cam", kernel_shape=[1, 1]),
            helper.make_node("ReduceMean", [CAM, "cam.axes"], ["cam.mean"], name="cam.mean", keepdims=0),
            helper.make_node("Add", ["cam.mean", "cam.bias"], [logits], name="cam.logits"),
        ]
    )
    shape = [1, int(weight.shape[0]), "cam_h", "cam_w"]
    graph.output.append(helper.make_tensor_value_info(CAM, onnx.TensorProto.FLOAT, shape))
    used = {i for n in graph.node for i in n.input}
    live = [t for t in graph.initializer if t.name in used]
    del graph.initializer[:]
    graph.initializer.extend(live)
    return onnx.shape_inference.infer_shapes(out), [float(b) for b in bias]


# -- any network ----------------------------------------------------------------------------------------------------


class _NoMap(Exception):
    """This kind of map does not fit this network; the reason is for the MapSpec of the next kind."""


def attach(model: Any, task: str, outputs: Mapping[str, str], classes: int = 0) -> tuple[Any, MapSpec]:
    """A copy of `model` (fixed shapes, batch 1, NCHW inside) with the best map that its head allows, and what kind that is.

    `outputs` are the card's roles, `classes` their number where known. The other outputs stay what they were up to rounding.
    Never raises for a head that it does not know: the map is then an activation map, or unavailable with the reason.
    """
    kinds: dict[str, Callable[[_Graph], MapSpec]] = {
        "classification": lambda g: _class_map(g, outputs["main"]),
        "segmentation": lambda g: _dense_map(g, outputs["main"]),
        "detection": lambda g: _box_map(g, outputs, classes),
    }
    reason = f"a network of task {task} has no class to explain"
    if task in kinds:
        out = _Graph(model)
        try:
            spec = kinds[task](out)
            return out.finished(), spec
        except _NoMap as why:
            reason = str(why)
    out = _Graph(model)
    try:
        spec = _activation_map(out, list(dict.fromkeys(outputs.values())), reason)
        return out.finished(), spec
    except _NoMap as why:
        return model, MapSpec("unavailable", None, "", f"{reason}; {why}")


def map_nodes(model: Any) -> tuple[str, ...]:
    """Names of the nodes that `attach` wrote: evidence is not quantised."""
    return tuple(n.name for n in model.graph.node if n.name.startswith(PREFIX))


class _Graph:
    """A graph under the knife: its shapes, who makes what, and a pen for new nodes."""

    def __init__(self, model: Any) -> None:
        self.model = onnx.ModelProto()
        self.model.CopyFrom(model)
        self.graph = self.model.graph
        inferred = infer(self.model).graph
        self.shapes: Shapes = {
            v.name: tuple(int(d.dim_value) for d in v.type.tensor_type.shape.dim)
            for v in (*inferred.input, *inferred.value_info, *inferred.output)
        }
        self.makers = {o: n for n in self.graph.node for o in n.output}
        self.weights = {t.name: t for t in self.graph.initializer}
        self.opset = next(int(o.version) for o in self.model.opset_import if o.domain in ("", "ai.onnx"))
        self.used = set(self.makers) | set(self.weights) | {v.name for v in self.graph.input}
        self.new: list[Any] = []
        input_shape = next((self.shapes[v.name] for v in self.graph.input if len(self.shapes[v.name]) == 4), ())
        self.input_hw = input_shape[2:]

    def weight(self, name: str) -> Any:
        return numpy_helper.to_array(self.weights[name])

    def constant(self, array: Any, hint: str = "constant") -> str:
        name = fresh(f"{PREFIX}{hint}", self.used)
        self.used.add(name)
        tensor = numpy_helper.from_array(np.ascontiguousarray(array), name)
        self.graph.initializer.append(tensor)
        self.weights[name] = tensor
        return name

    def node(self, kind: str, inputs: Sequence[str], output: str | None = None, **attributes: Any) -> str:
        name = fresh(f"{PREFIX}{kind.lower()}", self.used)
        self.used.add(name)
        self.new.append(helper.make_node(kind, list(inputs), [output or name], name=name, **attributes))
        return output or name

    def reduce(self, kind: str, x: str, axes: Sequence[int], keep: int, output: str | None = None) -> str:
        """Axes were an attribute up to opset 17 and are an input since."""
        if self.opset >= 18:
            return self.node(kind, [x, self.constant(np.array(axes, np.int64), "axes")], output, keepdims=keep)
        return self.node(kind, [x], output, axes=list(axes), keepdims=keep)

    def reshape(self, x: str, shape: Sequence[int], output: str | None = None) -> str:
        return self.node("Reshape", [x, self.constant(np.array(shape, np.int64), "shape")], output)

    def free_name(self, name: str) -> str:
        out = fresh(name, self.used)
        self.used.add(out)
        return out

    def show(self, name: str, shape: Sequence[int]) -> str:
        """Make `name` an output of the graph."""
        if name not in {o.name for o in self.graph.output}:
            self.graph.output.append(helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, list(shape)))
        return name

    def axes_of(self, node: Any) -> list[int]:
        said = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        if "axes" in said:
            return [int(a) for a in said["axes"]]
        if len(node.input) > 1 and node.input[1] in self.weights:
            return [int(a) for a in self.weight(node.input[1]).ravel()]
        return list(range(len(self.shapes.get(node.input[0], ()))))

    def finished(self) -> Any:
        """New nodes put behind what they read, dead ones dropped, shapes inferred and checked."""
        self.graph.node.extend(self.new)
        waiting, made = list(self.graph.node), set(self.weights) | {v.name for v in self.graph.input}
        # Old nodes are in order already; a new one may replace the maker of a value that old ones read.
        order: list[Any] = []
        while waiting:
            rest = []
            for n in waiting:
                if reads(n) <= made:
                    order.append(n)
                    made.update(n.output)
                else:
                    rest.append(n)
            if len(rest) == len(waiting):
                raise GraphUnsupported("the map cannot be put in order", value=rest[0].name)
            waiting = rest
        replace(self.graph.node, order)
        drop_dead(self.graph)
        del self.graph.value_info[:]
        onnx.checker.check_model(self.model)
        return infer(self.model)


SHAPING = ("Identity", "Dropout", "Reshape", "Flatten", "Squeeze", "Unsqueeze")
ENDING = ("Softmax", "LogSoftmax", "Sigmoid")


def _attributes(node: Any) -> dict[str, Any]:
    return {a.name: helper.get_attribute_value(a) for a in node.attribute}


def _class_map(g: _Graph, output: str) -> MapSpec:
    """CAM or Grad-CAM of a head: pool, then anything that `_Derivative` knows, then the logits."""
    logits = output
    while logits in g.makers and g.makers[logits].op_type in (*ENDING, *SHAPING) and _pooled(g, g.makers[logits].input[0]) is None:
        logits = g.makers[logits].input[0]
    head, pool, features = _head(g, logits)
    _, channels, rows, columns = g.shapes[features]
    count = int(np.prod(g.shapes[logits]))
    if count > MAX_CLASSES:
        raise _NoMap(f"{count} classes are too many for a map of each")
    widest = max([channels, *(int(np.prod(g.shapes[i])) for n in head for i in n.input if i in g.shapes and i not in g.weights)])
    top = count * channels * max(rows * columns, widest) > MAX_PRODUCTS
    backward = _Derivative(g, logits, count, top)
    jacobian, bias = backward.through(head, pool)
    spec_note = "of the highest class only" if top else ""
    shown = 1 if top else count
    if isinstance(jacobian, str):
        name = g.free_name("grad_cam")
        _weigh(g, jacobian, features, name, shown)
        return MapSpec("grad-cam", g.show(name, (1, shown, rows, columns)), features, spec_note)
    name = g.free_name(CAM)
    if top:
        _weigh(g, backward.lift(jacobian, channels), features, name, 1)
        return MapSpec("cam", g.show(name, (1, 1, rows, columns)), features, spec_note)
    g.node("Conv", [features, g.constant(jacobian[:, :, None, None], "weight")], name, kernel_shape=[1, 1])
    # The logits come out of the map itself, so that the two cannot disagree.
    old = g.makers[logits]
    old.output[list(old.output).index(logits)] = g.free_name(f"{PREFIX}replaced")
    mean = g.reduce("ReduceMean", name, [2, 3], 0)
    g.reshape(g.node("Add", [mean, g.constant(bias[None], "bias")]), g.shapes[logits], logits)
    return MapSpec("cam", g.show(name, (1, count, rows, columns)), features, cam_bias=tuple(float(b) for b in bias))


def _weigh(g: _Graph, jacobian: str, features: str, name: str, shown: int) -> None:
    """name = jacobian (shown x C) times features (1 x C x h x w)."""
    _, channels, rows, columns = g.shapes[features]
    product = g.node("MatMul", [jacobian, g.reshape(features, [channels, rows * columns])])
    g.reshape(product, [1, shown, rows, columns], name)


def _pooled(g: _Graph, name: str) -> str | None:
    """The features (N x C x h x w) whose mean over rows and columns `name` is, or None where it is no such mean."""
    node = g.makers.get(name)
    if node is None or not node.input:
        return None
    source = node.input[0]
    shape = g.shapes.get(source, ())
    attributes = _attributes(node)
    if node.op_type == "GlobalAveragePool" and len(shape) == 4:
        return str(source)
    if node.op_type == "AveragePool" and len(shape) == 4:
        full = list(attributes.get("kernel_shape", [])) == list(shape[2:])
        return source if full and not any(attributes.get("pads", [0])) and g.shapes[name][2:] == (1, 1) else None
    if node.op_type != "ReduceMean":
        return None
    axes = sorted(a % max(len(shape), 1) for a in g.axes_of(node))
    behind = g.makers.get(source)
    if len(shape) == 4 and axes == [2, 3]:
        return str(source)
    if len(shape) == 4 and axes == [1, 2] and behind is not None and behind.op_type == "Transpose":
        return behind.input[0] if list(_attributes(behind).get("perm", [])) == [0, 2, 3, 1] else None
    if len(shape) == 3 and axes == [2] and behind is not None and behind.op_type in ("Reshape", "Flatten"):
        before = g.shapes.get(behind.input[0], ())
        return behind.input[0] if len(before) == 4 and before[:2] == shape[:2] else None
    return None


def _head(g: _Graph, logits: str) -> tuple[list[Any], str, str]:
    """Nodes between pooling and logits in order, the pooled value, the features. Raises _NoMap where there is another way round."""
    found: list[Any] = []
    pools: dict[str, str] = {}
    waiting, seen = [logits], set()
    while waiting:
        name = waiting.pop()
        if name in seen or name in g.weights or not name:
            continue
        seen.add(name)
        features = _pooled(g, name)
        if features is not None:
            pools[name] = features
            continue
        node = g.makers.get(name)
        if node is None or (len(g.shapes.get(name, ())) == 4 and np.prod(g.shapes[name][2:]) > 1):
            raise _NoMap("no global average pooling lies before the logits")
        if node.op_type not in KNOWN:
            raise _NoMap(f"the head has a {node.op_type} ({node.name}) before its logits")
        if node.name not in {n.name for n in found}:
            found.append(node)
        waiting.extend(node.input)
    if len(pools) != 1:
        raise _NoMap("the logits come from more than one pooling")
    names = {n.name for n in found}
    ((pool, features),) = pools.items()
    if len(g.shapes.get(features, ())) != 4 or np.prod(g.shapes[features][2:]) <= 1:
        raise _NoMap("what is pooled has one row and one column only")
    return [n for n in g.graph.node if n.name in names], pool, features


Jacobian = NDArray[np.float32] | str | None  # a constant, a value of the graph, or the identity


class _Derivative:
    """Reverse-mode differentiation of a head, K logits by its inner widths: constants stay arrays, the rest becomes nodes."""

    def __init__(self, g: _Graph, logits: str, count: int, top: bool) -> None:
        self.g = g
        self.logits = logits
        self.count = count
        self.top = top
        self.best = ""

    def through(self, head: Sequence[Any], pool: str) -> tuple[NDArray[np.float32] | str, Vector]:
        """d logits / d pooled, K x C, and the constant part of the logits (right where the first is an array)."""
        at: dict[str, Jacobian] = {self.logits: None}
        bias = np.zeros(self.count, np.float32)
        for node in reversed(head):
            out = node.output[0]
            if out not in at:
                continue
            outer = at.pop(out)
            pieces, constant = self._back(node, outer)
            if constant is not None:
                bias = bias + constant
            for name, piece in pieces:
                at[name] = self._sum(at[name], piece, self._width(name)) if name in at else piece
        if set(at) != {pool}:
            raise _NoMap("the head reads something besides the pooled features")
        found = at[pool]
        width = self._width(pool)
        return (np.eye(width, dtype=np.float32) if found is None else found), np.asarray(bias, np.float32)

    def _width(self, name: str) -> int:
        return int(np.prod(self.g.shapes[name]))

    def lift(self, jacobian: Jacobian, width: int) -> str:
        """As a value of the graph: all K rows, or the row of the highest logit."""
        if isinstance(jacobian, str):
            return jacobian
        array = np.eye(width, dtype=np.float32) if jacobian is None else jacobian
        name = self.g.constant(array.astype(np.float32), "jacobian")
        if not self.top:
            return name
        if not self.best:
            flat = self.g.reshape(self.logits, [1, self.count])
            self.best = self.g.node("ArgMax", [flat], axis=1, keepdims=0)
        return self.g.node("Gather", [name, self.best], axis=0)

    def _sum(self, a: Jacobian, b: Jacobian, width: int) -> Jacobian:
        if isinstance(a, str) or isinstance(b, str):
            return self.g.node("Add", [self.lift(a, width), self.lift(b, width)])
        eye = np.eye(width, dtype=np.float32)
        return np.asarray((eye if a is None else a) + (eye if b is None else b), np.float32)

    def _matrix(self, outer: Jacobian, weight: Vector) -> Jacobian:
        if isinstance(outer, str):
            return self.g.node("MatMul", [outer, self.g.constant(weight.astype(np.float32), "weight")])
        return weight if outer is None else np.asarray(outer @ weight, np.float32)

    def _scale(self, outer: Jacobian, factor: Vector) -> Jacobian:
        if isinstance(outer, str):
            return self.g.node("Mul", [outer, self.g.constant(factor[None].astype(np.float32), "factor")])
        return np.asarray(np.diag(factor) if outer is None else outer * factor, np.float32)

    def _dot(self, outer: Jacobian, constant: Vector) -> Vector | None:
        """What a constant that is added adds to the logits; None where that depends on the image."""
        if isinstance(outer, str):
            return None
        return constant if outer is None else np.asarray(outer @ constant, np.float32)

    def _constant(self, name: str, like: str) -> Vector:
        """A stored operand, spread to the size of the value `like`."""
        array = np.asarray(self.g.weight(name), np.float32)
        try:
            return np.asarray(np.broadcast_to(array, self.g.shapes[like]).reshape(-1), np.float32)
        except ValueError as error:
            raise _NoMap(f"the constant {name} does not fit {like}") from error

    def _flat(self, name: str) -> str:
        return self.g.reshape(name, [1, self._width(name)])

    def _back(self, node: Any, outer: Jacobian) -> tuple[list[tuple[str, Jacobian]], Vector | None]:
        """The derivative at each input that is no constant, and what the node adds to the logits whatever the image."""
        kind, g = node.op_type, self.g
        inputs = list(node.input)
        stored = [i in g.weights for i in inputs]
        attributes = _attributes(node)
        if kind in SHAPING:
            return [(inputs[0], outer)], None
        if kind in ("Gemm", "MatMul", "Conv"):
            weight, bias = self._linear(node, attributes)
            return [(inputs[0], self._matrix(outer, weight))], None if bias is None else self._dot(outer, bias)
        if kind == "BatchNormalization":
            if not all(stored[1:]):
                raise _NoMap(f"{node.name} normalises by values that are computed")
            scale, shift, mean, variance = (np.asarray(g.weight(i), np.float32) for i in inputs[1:5])
            factor = scale / np.sqrt(variance + attributes.get("epsilon", 1e-5))
            return [(inputs[0], self._scale(outer, factor))], self._dot(outer, shift - mean * factor)
        if kind in ("Add", "Sub", "Mul", "Div"):
            return self._arithmetic(kind, inputs, stored, node.output[0], outer)
        slope = self._slope(kind, inputs, attributes)
        return [(inputs[0], g.node("Mul", [self.lift(outer, self._width(inputs[0])), slope]))], None

    def _linear(self, node: Any, attributes: Mapping[str, Any]) -> tuple[Vector, Vector | None]:
        g, inputs = self.g, list(node.input)
        if len(inputs) < 2 or inputs[1] not in g.weights or (len(inputs) > 2 and inputs[2] and inputs[2] not in g.weights):
            raise _NoMap(f"the weights of {node.name} are computed, not stored")
        weight = np.asarray(g.weight(inputs[1]), np.float32)
        bias: Vector | None = None
        if len(inputs) > 2 and inputs[2]:
            bias = self._constant(inputs[2], node.output[0]) if node.op_type == "Gemm" else np.asarray(g.weight(inputs[2]), np.float32)
        if node.op_type == "Conv":
            if attributes.get("group", 1) != 1 or any(k != 1 for k in weight.shape[2:]) or any(attributes.get("pads", [0])):
                raise _NoMap(f"{node.name} is no plain 1 x 1 convolution")
            return weight.reshape(weight.shape[:2]), bias
        if weight.ndim != 2:
            raise _NoMap(f"{node.name} is no product with a matrix")
        if node.op_type == "MatMul":
            return weight.T, None
        if attributes.get("transA", 0):
            raise _NoMap(f"{node.name} transposes its input")
        weight = weight if attributes.get("transB", 0) else weight.T
        scaled = None if bias is None else bias * np.float32(attributes.get("beta", 1.0))
        return weight * np.float32(attributes.get("alpha", 1.0)), scaled

    def _arithmetic(
        self, kind: str, inputs: list[str], stored: list[bool], out: str, outer: Jacobian
    ) -> tuple[list[tuple[str, Jacobian]], Vector | None]:
        a, b = inputs
        for name, is_stored in zip(inputs, stored, strict=True):
            if not is_stored and self._width(name) != self._width(out):
                raise _NoMap(f"{name} is spread over {out}")
        minus = np.full(self._width(out), -1.0, np.float32)
        if not any(stored):
            if kind in ("Add", "Sub"):
                return [(a, outer), (b, outer if kind == "Add" else self._scale(outer, minus))], None
            if kind == "Mul":
                lifted = self.lift(outer, self._width(out))
                return [(x, self.g.node("Mul", [lifted, self._flat(y)])) for x, y in ((a, b), (b, a))], None
            raise _NoMap(f"{out} divides by a value that is computed")
        constant = self._constant(b if stored[1] else a, out)
        moving = a if stored[1] else b
        if kind == "Add":
            return [(moving, outer)], self._dot(outer, constant)
        if kind == "Sub":
            if stored[1]:
                return [(moving, outer)], self._dot(outer, -constant)
            return [(moving, self._scale(outer, minus))], self._dot(outer, constant)
        if kind == "Mul":
            return [(moving, self._scale(outer, constant))], None
        if not stored[1]:
            raise _NoMap(f"{out} divides by a value that is computed")
        return [(moving, self._scale(outer, np.asarray(1.0 / constant, np.float32)))], None

    def _slope(self, kind: str, inputs: list[str], attributes: Mapping[str, Any]) -> str:
        """The derivative of an elementwise function at its input, 1 x width."""
        g = self.g
        h = self._flat(inputs[0])

        def number(value: float) -> str:
            return g.constant(np.array(value, np.float32), "number")

        def between(low: float, high: float, inside: str, below: float = 0.0, above: float = 0.0) -> str:
            high_part = g.node("Where", [g.node("Less", [h, number(high)]), inside, number(above)])
            return g.node("Where", [g.node("Greater", [h, number(low)]), high_part, number(below)])

        if kind == "Relu":
            return g.node("Sign", [g.node("Relu", [h])])
        if kind in ("LeakyRelu", "Elu"):
            alpha = float(attributes.get("alpha", 0.01 if kind == "LeakyRelu" else 1.0))
            below = number(alpha) if kind == "LeakyRelu" else g.node("Mul", [g.node("Exp", [h]), number(alpha)])
            return g.node("Where", [g.node("Greater", [h, number(0.0)]), number(1.0), below])
        if kind == "Clip":
            ends = [-np.inf, np.inf]
            for i, name in enumerate(inputs[1:3]):
                if name:
                    if name not in g.weights:
                        raise _NoMap(f"the bounds of a Clip are computed ({name})")
                    ends[i] = float(g.weight(name))
            return between(max(ends[0], -3e38), min(ends[1], 3e38), number(1.0))
        if kind == "Sigmoid":
            s = g.node("Sigmoid", [h])
            return g.node("Sub", [s, g.node("Mul", [s, s])])
        if kind == "Tanh":
            t = g.node("Tanh", [h])
            return g.node("Sub", [number(1.0), g.node("Mul", [t, t])])
        if kind == "Softplus":
            return g.node("Sigmoid", [h])
        if kind == "HardSigmoid":
            alpha, beta = float(attributes.get("alpha", 0.2)), float(attributes.get("beta", 0.5))
            return between(-beta / alpha, (1.0 - beta) / alpha, number(alpha))
        if kind == "HardSwish":
            line = g.node("Add", [g.node("Mul", [h, number(1 / 3)]), number(0.5)])
            return between(-3.0, 3.0, line, above=1.0)
        square = g.node("Mul", [h, h])
        if kind == "Erf":
            return g.node("Mul", [g.node("Exp", [g.node("Neg", [square])]), number(2.0 / np.sqrt(np.pi))])
        if kind == "Gelu" and attributes.get("approximate", b"none") == b"none":
            bell = g.node("Exp", [g.node("Mul", [square, number(-0.5)])])
            density = g.node("Mul", [g.node("Mul", [h, bell]), number(1.0 / np.sqrt(2.0 * np.pi))])
            error = g.node("Erf", [g.node("Mul", [h, number(np.sqrt(0.5))])])
            return g.node("Add", [g.node("Mul", [g.node("Add", [error, number(1.0)]), number(0.5)]), density])
        raise _NoMap(f"the derivative of {kind} is not known")


KNOWN = (
    *SHAPING, "Gemm", "MatMul", "Conv", "BatchNormalization", "Add", "Sub", "Mul", "Div", "Relu", "LeakyRelu", "Elu", "Clip", "Sigmoid",
    "Tanh", "Softplus", "HardSigmoid", "HardSwish", "Erf", "Gelu",
)  # fmt: skip
MAX_CLASSES = 4096


def _dense_map(g: _Graph, output: str) -> MapSpec:
    """The logits of a network that answers for every pixel, before Softmax, Sigmoid, ArgMax and enlargement."""
    name = output
    while name in g.makers and g.makers[name].op_type in (*ENDING, "ArgMax", "Resize", "Identity", "Cast", "Squeeze"):
        name = g.makers[name].input[0]
    shape = g.shapes.get(name, ())
    if len(shape) != 4 or np.prod(shape[2:]) <= 1 or name not in g.makers:
        raise _NoMap(f"the output is no map of classes (shape {list(shape)})")
    maker = g.makers[name].name
    if name == output:
        return MapSpec("class-evidence", output, maker)
    shown = g.node("Identity", [name], g.free_name("evidence"))
    return MapSpec("class-evidence", g.show(shown, shape), maker)


def _last_convolutions(g: _Graph, outputs: Sequence[str]) -> list[Any]:
    """Convolutions on the way back from the outputs that no other convolution lies behind, finest map first."""
    found: dict[str, Any] = {}
    waiting, seen = list(outputs), set()
    while waiting:
        name = waiting.pop()
        node = g.makers.get(name)
        if node is None or name in seen:
            continue
        seen.add(name)
        shape = g.shapes.get(node.output[0], ())
        if node.op_type == "Conv" and _is_map(g, shape):
            found[node.name] = node
        else:
            waiting.extend(reads(node))
    order = {n.name: i for i, n in enumerate(g.graph.node)}
    return sorted(found.values(), key=lambda n: (-int(np.prod(g.shapes[n.output[0]][2:])), order[n.name]))


def after_last_convolutions(model: Any, task: str, outputs: Mapping[str, str]) -> tuple[str, ...]:
    """Names of a detector's nodes that turn what its last convolutions say into boxes: a box in pixels needs more than 8 bits."""
    if task != "detection":
        return ()
    g = _Graph(model)
    last = _last_convolutions(g, list(outputs.values()))
    before = {n.name for c in last for n in upstream(g.makers, c.output[0])}
    return tuple(n.name for n in g.graph.node if n.name not in before) if last else ()


def _is_map(g: _Graph, shape: Sequence[int]) -> bool:
    """Rows and columns that are those of the input, the same whole number of times smaller."""
    if len(shape) != 4 or len(g.input_hw) != 2 or min(shape[2:]) < 2:
        return False
    stride = round(g.input_hw[0] / shape[2])
    return all(-(-side // stride) == small or side // stride == small for side, small in zip(g.input_hw, shape[2:], strict=True))


def _box_map(g: _Graph, outputs: Mapping[str, str], classes: int) -> MapSpec:
    """Class logits of a dense detector at every place: the highest over scales and anchors."""
    if classes < 1:
        raise _NoMap("the card does not say how many classes the boxes have")
    last = _last_convolutions(g, list(outputs.values()))
    if not last:
        raise _NoMap("no convolution lies before the boxes")
    boxes = _box_count(g, outputs, classes)
    for unit, first in ((5 + classes, 5), (classes, 0)):
        fitting = [n for n in last if g.shapes[n.output[0]][1] % unit == 0]
        widths = sorted({g.shapes[n.output[0]][1] for n in fitting})
        for group in (fitting, *([n for n in fitting if g.shapes[n.output[0]][1] == w] for w in widths)):
            places = sum(int(np.prod(g.shapes[n.output[0]][1:])) // unit for n in group)
            plain = all(g.shapes[n.output[0]][1] == unit for n in group)
            if group and (places == boxes if boxes else plain):
                return _highest(g, group, unit, first, classes)
    raise _NoMap("the last convolutions do not add up to the boxes")


def _box_count(g: _Graph, outputs: Mapping[str, str], classes: int) -> int:
    """How many boxes a dense output answers; 0 where the graph has chosen among them already."""
    if any(n.op_type in ("NonMaxSuppression", "TopK") for o in outputs.values() for n in upstream(g.makers, o)):
        return 0
    shape = g.shapes[outputs.get("main", outputs.get("scores", ""))]
    return max((int(d) for d in shape[1:] if d not in (classes, classes + 4, classes + 5)), default=0)


def _highest(g: _Graph, group: Sequence[Any], unit: int, first: int, classes: int) -> MapSpec:
    rows, columns = g.shapes[group[0].output[0]][2:]
    planes = []
    for node in group:
        name = node.output[0]
        _, channels, h, w = g.shapes[name]
        if channels != classes:
            name = g.reshape(name, [1, channels // unit, unit, h, w])
            ends = [g.constant(np.array([v], np.int64), "slice") for v in (first, first + classes, 2)]
            name = g.reduce("ReduceMax", g.node("Slice", [name, *ends]), [1], 0)
        if (h, w) != (rows, columns):
            scales = g.constant(np.array([1, 1, rows / h, columns / w], np.float32), "scales")
            name = g.node("Resize", [name, "", scales], mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor")
            if (int(h * (rows / h)), int(w * (columns / w))) != (rows, columns):
                raise _NoMap("the scales do not divide each other")
        planes.append(name)
    shown = g.node("Max", planes, g.free_name("evidence"))
    layer = ", ".join(n.name for n in group)
    return MapSpec("class-evidence", g.show(shown, (1, classes, rows, columns)), layer)


SPATIAL = (
    "Conv", "Relu", "LeakyRelu", "PRelu", "Elu", "Clip", "Add", "Mul", "HardSwish", "Gelu", "BatchNormalization", "Concat", "MaxPool",
    "AveragePool", "ConvTranspose",
)  # fmt: skip
COMPUTING = ("Conv", "ConvTranspose", "Gemm", "MatMul")


def _activation_map(g: _Graph, outputs: Sequence[str], reason: str) -> MapSpec:
    """Mean of |features| of the last layer that keeps rows and columns; it knows no class."""
    if not g.input_hw:
        raise _NoMap("the input is no image")
    behind = {n.name for o in outputs for n in upstream(g.makers, o)}
    nodes = [n for n in g.graph.node if n.name in behind]
    total = sum(n.op_type in COMPUTING for n in nodes)
    after = 0
    for node in reversed(nodes):
        shape = g.shapes.get(node.output[0], ())
        if node.op_type in SPATIAL and _is_map(g, shape) and shape[1] > 1 and node.output[0] not in outputs:
            if after > total / 2:
                break
            name = g.free_name("activation")
            g.reduce("ReduceMean", g.node("Abs", [node.output[0]]), [1], 1, name)
            return MapSpec("activation", g.show(name, (1, 1, *shape[2:])), node.name, reason)
        after += node.op_type in COMPUTING
    raise _NoMap("no features that keep rows and columns lie in its second half")
