"""Attach the fused class activation map: the explanation becomes a second output of the same pass.

For features F (C x h x w), global average pooling and a linear layer W, b:  logit_k = W_k . mean(F) + b_k
= mean(W_k . F) + b_k, so the 1x1 convolution cam = W * F is the class activation map (Zhou et al., CVPR 2016), equal to
Grad-CAM (Selvaraju et al., ICCV 2017) before its ReLU up to the constant 1 / (h w). The graph's own pooling and linear layer
are replaced by mean(cam) + b, which computes the same logits from the map itself.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from appliance.errors import GraphUnsupported

CAM = "cam"


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
