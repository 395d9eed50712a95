"""A first card of a foreign model, guessed from its graph.

Hides the rules of thumb: what a shape, the last nodes, the metadata and the names of a graph say of its task, decoder, classes and
preprocessing. A draft says for every field how it was guessed and how sure that is; a wrong guess of the preprocessing costs
accuracy that no gate against the float model can see, so a person should read what is marked "low".
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from appliance.compiler import graph
from appliance.compiler.card import MAX_CLASSES, MAX_SIDE, MAX_TEXT, Card, Note, Sure, check, shape_of
from appliance.errors import GraphUnsupported
from models import foreign as decode

# Rows and columns tried, in this order, for an input whose size is free.
SIZES: Final = {"detection": ((640, 640), (320, 320)), "classification": ((224, 224), (48, 192)), "ctc": ((48, 320), (32, 320))}
OTHER_SIZES: Final = ((640, 640), (512, 512), (224, 224), (256, 256), (48, 320), (32, 320))


def draft(model: Any, name: str) -> tuple[Card, dict[str, Note]]:
    """A card guessed from a loaded graph, with a Note for each field that was guessed.

    Runs the model once for each size it tries where the input's size is free. Raises GraphUnsupported where no input could be
    an image or an array of numbers, or where no size runs.
    """
    notes: dict[str, Note] = {}
    said = _metadata(model)
    inputs = graph.real_inputs(model)
    main, layout = _main_input(inputs, notes)
    constants = _guess_constants(inputs, main, notes)
    shape, shapes = _guess_shape(model, main, layout, constants, said, notes)
    task, decoder, outputs = _guess_task(model, shapes, layout, shape, said, notes)
    extra = _guess_extra(decoder, outputs, shapes, notes)
    classes = _guess_classes(said, task, decoder, outputs, shapes, extra, notes)
    pre = _guess_preprocess(model, main, layout, shape, task, decoder, said, notes)
    box, normalised = _guess_box(decoder, notes)
    card = Card(
        name=re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip("-.")[:64] or "model",
        task=task,  # type: ignore[arg-type]
        decoder=decoder,
        classes=classes,
        input_name=main.name,
        layout=layout,
        shape=shape,
        outputs=outputs,
        box=box,
        normalised=normalised,
        extra=extra,
        constants=constants,
        licence=said.get("license", "")[:MAX_TEXT],
        **pre,
    )
    check(card)
    return card, notes


def _metadata(model: Any) -> dict[str, str]:
    return {p.key: p.value for p in model.metadata_props if len(p.key) < 100 and len(p.value) < 1 << 20}


def _literal(text: str | None) -> Any:
    """A Python literal out of a model's metadata, or None. `ast.literal_eval` builds values and runs nothing."""
    if text is None or len(text) > 1 << 18 or text.count("(") + text.count("[") + text.count("{") > 1000:
        return None
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None


def _main_input(inputs: Sequence[Any], notes: dict[str, Note]) -> tuple[Any, str]:
    for value in inputs:
        dims = shape_of(value)
        if len(dims) == 4:
            channels_first, channels_last = dims[1] in (1, 3), dims[3] in (1, 3)
            layout = "NHWC" if channels_last and not channels_first else "NCHW"
            sure: Sure = "high" if channels_first != channels_last else "low"
            notes["layout"] = Note(sure, f"sizes {dims} (0 is free) of input {value.name}")
            return value, layout
    numeric = [v for v in inputs if v.type.tensor_type.elem_type in graph.NUMPY_TYPES and v.type.tensor_type.HasField("shape")]
    if not numeric:
        raise GraphUnsupported("no input could be an image or an array of numbers", value=[v.name for v in inputs])
    first = max(numeric, key=lambda v: (math.prod(d or 1 for d in shape_of(v)[1:]), -numeric.index(v)))
    notes["layout"] = Note("medium", f"no input has four dimensions; {first.name} is the largest")
    return first, "none"


def _guess_constants(inputs: Sequence[Any], main: Any, notes: dict[str, Note]) -> dict[str, float | tuple[float, ...]]:
    out: dict[str, float | tuple[float, ...]] = {}
    for value in inputs:
        if value.name == main.name:
            continue
        name = value.name.lower()
        dims = [d or 1 for d in shape_of(value)]
        if ("shape" in name or "size" in name) and math.prod(dims) == 2:
            out[value.name] = (640.0, 640.0)
        elif "scale" in name:
            out[value.name] = 1.0
        elif name in ("sr", "sample_rate"):
            out[value.name] = 16000.0
        else:
            out[value.name] = 0.0
        notes["constants"] = Note("low", "a second input gets a fixed value, guessed from its name")
    return out


def _guess_shape(
    model: Any, main: Any, layout: str, constants: Mapping[str, Any], said: Mapping[str, str], notes: dict[str, Note]
) -> tuple[tuple[int, ...], dict[str, tuple[int, ...]]]:
    """The input's shape, and the shapes of the outputs for it."""
    dims = shape_of(main)
    if dims and dims[0] > 1:
        raise GraphUnsupported("the graph takes only a fixed batch other than 1", value=f"{main.name}: {dims}")
    tries: list[tuple[list[int], Sure, str]] = []
    if layout == "none":
        fixed = [d or (1 if i == 0 else 256) for i, d in enumerate(dims)]
        free = any(d == 0 for d in dims[1:])
        tries.append((fixed, "low" if free else "high", "free sizes set to 256" if free else "fixed in the graph"))
    else:
        rows, columns, channel = (2, 3, 1) if layout == "NCHW" else (1, 2, 3)
        imgsz = _literal(said.get("imgsz"))
        sizes: list[tuple[tuple[int, int], Sure, str]] = []
        if isinstance(imgsz, list) and len(imgsz) == 2 and all(isinstance(v, int) and 0 < v <= MAX_SIDE for v in imgsz):
            sizes.append(((imgsz[0], imgsz[1]), "high", "imgsz in the metadata"))
        if dims[rows] and dims[columns]:
            sizes.insert(0, ((dims[rows], dims[columns]), "high", "fixed in the graph"))
        guess = _kind_of_outputs(model)
        if guess == "classification" and model.graph.output[0].type.tensor_type.shape.dim[-1].dim_value == 2 and not dims[rows]:
            # Two classes at any size is mostly whether a line of text stands on its head.
            sizes.append(((48, 192), "low", "the input's size is free; that of lines of text, for two classes"))
        sizes += [(s, "low", "the input's size is free; a usual one that runs") for s in (*SIZES.get(guess, ()), *OTHER_SIZES)]
        for (h, w), sure, why in sizes:
            shape = [1, 0, 0, 0]
            shape[channel], shape[rows], shape[columns] = dims[channel] or 3, dims[rows] or h, dims[columns] or w
            if not any(t[0] == shape for t in tries):
                tries.append((shape, sure, why))
    reasons = []
    for shape, sure, why in tries:
        try:
            found = graph.output_shapes(model, {main.name: shape}, dict(constants))
        except GraphUnsupported as error:
            reasons.append(f"{shape}: {error.what}")
            continue
        notes["shape"] = Note(sure, why)
        return tuple(shape), found
    raise GraphUnsupported("the model runs at no size that was tried", value="; ".join(reasons))


def _kind_of_outputs(model: Any) -> str:
    """What the declared outputs look like before a size is known."""
    shapes = [shape_of(o) for o in model.graph.output]
    last = shapes[0] if shapes else []
    if len(shapes) == 1 and len(last) == 2:
        return "classification"
    if len(last) == 3 and (last[2] > 1000 or "CTC" in model.graph.name):
        return "ctc"
    if len(last) == 3 or len(shapes) > 1:
        return "detection"
    return "segmentation"


def _guess_task(
    model: Any,
    shapes: Mapping[str, tuple[int, ...]],
    layout: str,
    input_shape: Sequence[int],
    said: Mapping[str, str],
    notes: dict[str, Note],
) -> tuple[str, str, dict[str, str]]:
    makers = {o: n for n in model.graph.node for o in n.output}
    names = list(shapes)
    first = names[0]
    shape = shapes[first]
    last_ops = _last_ops(makers, first)

    def answer(task: str, decoder: str, outputs: dict[str, str], sure: Sure, why: str) -> tuple[str, str, dict[str, str]]:
        notes["task"] = notes["decoder"] = notes["outputs"] = Note(sure, why)
        return task, decoder, outputs

    maps = [s for s in shapes.values() if len(s) == 4 and min(s[2:]) > 1]
    if len({s[2:] for s in maps}) > 1:
        roles = {"main": first} | {f"other_{i}": n for i, n in enumerate(names[1:16], 1)}
        return answer("tensor", "cosine", roles, "medium", f"maps at several scales {dict(shapes)}: fidelity to the float model only")
    if layout == "none":
        return answer("tensor", "cosine", {"main": first}, "medium", "the input is no image: fidelity to the float model only")
    if len(names) >= 3 and (found := _box_outputs(shapes)):
        return answer("detection", "boxes-scores", found, "medium", f"outputs {dict(shapes)} look like boxes, scores and classes")
    if len(names) == 2 and (found := _box_outputs(shapes)):
        return answer("detection", "boxes-scores", found, "medium", f"outputs {dict(shapes)} look like boxes and scores")
    if len({s[1] for s in shapes.values() if len(s) == 3}) > 2:
        roles = {"main": first} | {f"other_{i}": n for i, n in enumerate(names[1:16], 1)}
        return answer("tensor", "cosine", roles, "medium", f"rows at several scales {dict(shapes)}: fidelity to the float model only")
    before = graph.upstream(makers, first)
    inside = any(n.op_type in ("NonMaxSuppression", "TopK") for n in before)
    h, w = (input_shape[1], input_shape[2]) if layout == "NHWC" else (input_shape[2], input_shape[3])
    if len(shape) == 3 and shape[2] > 5 and not inside and shape[1] in (n := len(decode.yolox_cells((h, w))), 3 * n):
        # Where no exponential is taken, sizes are still logarithms and centres still counted from their cell.
        kind = "yolox" if shape[1] == n and not any(x.op_type in ("Exp", "Pow") for x in before) else "yolov5"
        said_so = f"output {shape}: 5 + {shape[2] - 5} for each of {shape[1]} cells of strides 8, 16 and 32"
        return answer("detection", kind, {"main": first}, "medium", said_so)
    if len(shape) in (2, 3) and shape[-1] in (6, 7) and (len(shape) == 3 or inside):
        return answer("detection", "nms", {"main": first}, "high" if inside else "medium", f"output {shape}: rows of box, score, class")
    if len(shape) == 2:
        if "Softmax" in last_ops:
            return answer("classification", "probabilities", {"main": first}, "high", f"output {shape} after a Softmax")
        if "Sigmoid" in last_ops:
            return answer("classification", "sigmoid-probabilities", {"main": first}, "medium", f"output {shape} after a Sigmoid")
        if shape[1] == 1:
            return answer("classification", "sigmoid", {"main": first}, "medium", f"output {shape}: the logit of a yes or no")
        return answer("classification", "softmax", {"main": first}, "medium", f"output {shape}: logits of one class among {shape[1]}")
    if len(shape) == 4 and shape[2:] == (1, 1):
        return answer("classification", "softmax", {"main": first}, "medium", f"output {shape}: one value a class")
    if len(shape) == 3:
        a, b = shape[1], shape[2]
        if said.get("task") == "detect" or (a < b and a > 4 and b >= 100 and b > 4 * a and "Softmax" not in last_ops):
            return answer(
                "detection", "yolov8", {"main": first}, "high" if said.get("task") == "detect" else "medium",
                f"output {shape}: 4 + {a - 4} classes for each of {b} boxes",
            )  # fmt: skip
        if a > b > 5 and a >= 100 and "Softmax" not in last_ops:
            return answer("detection", "yolov5", {"main": first}, "medium", f"output {shape}: 5 + {b - 5} for each of {a} boxes")
        if "Softmax" in last_ops or b > 30:
            return answer("tensor", "ctc", {"main": first}, "medium", f"output {shape}: {a} steps of {b} letters")
    if len(shape) == 4:
        if shape[1] == 1:
            if "Sigmoid" in last_ops:
                return answer("segmentation", "probability", {"main": first}, "high", f"output {shape} after a Sigmoid")
            return answer("segmentation", "sigmoid", {"main": first}, "medium", f"output {shape}: logits of one class")
        if shape[1] <= 300 and min(shape[2:]) >= 8:
            if "Sigmoid" in last_ops:
                return answer("segmentation", "probability", {"main": first}, "medium", f"output {shape} after a Sigmoid")
            return answer("segmentation", "argmax", {"main": first}, "medium", f"output {shape}: {shape[1]} classes for each pixel")
    roles = {"main": first} | {f"other_{i}": n for i, n in enumerate(names[1:16], 1)}
    return answer("tensor", "cosine", roles, "low", f"outputs {dict(shapes)} are of no known kind: fidelity to the float model only")


def _last_ops(makers: Mapping[str, Any], name: str) -> list[str]:
    """Kinds of the last nodes, looking through those that only rearrange."""
    out: list[str] = []
    while name in makers and len(out) < 8:
        node = makers[name]
        out.append(node.op_type)
        if node.op_type not in ("Identity", "Cast", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Transpose", "Dropout"):
            break
        name = node.input[0]
    return out


def _box_outputs(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str] | None:
    """Roles of separate outputs: boxes N x 4, scores N or N x classes, labels N, and a count; by name first, then by shape."""
    boxes = [n for n, s in shapes.items() if len(s) in (2, 3) and s[-1] == 4]
    if not boxes:
        return None
    rows = shapes[boxes[0]][-2]
    rest = [n for n in shapes if n not in boxes]
    out = {"boxes": boxes[0]}
    flat = [n for n in rest if len(shapes[n]) <= 2 and shapes[n][-1:] == (rows,)]
    dense = [n for n in rest if len(shapes[n]) == 3 and rows in shapes[n][1:]]
    for n in flat:
        named = n.lower()
        if ("class" in named or "label" in named) and "classes" not in out:
            out["classes"] = n
        elif "scores" not in out:
            out["scores"] = n
        elif "classes" not in out:
            out["classes"] = n
    if dense and "scores" not in out:
        out["scores"] = dense[0]
    counts = [n for n in rest if math.prod(shapes[n]) == 1 and n not in out.values()]
    if counts and flat:
        out["count"] = counts[0]
    if "scores" not in out or (out["scores"] in flat and "classes" not in out):
        return None
    return out


def _guess_extra(decoder: str, outputs: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]], notes: dict[str, Note]) -> int:
    """Mask coefficients of each box, where another output holds as many prototypes of masks."""
    if decoder not in ("yolov5", "yolov8"):
        return 0
    main = shapes[outputs["main"]]
    after = main[2] - 5 if decoder == "yolov5" else main[1] - 4
    prototypes = [s[1] for n, s in shapes.items() if n != outputs["main"] and len(s) == 4 and min(s[2:]) > 1 and s[1] < after]
    if prototypes:
        notes["extra"] = Note("medium", f"another output holds {prototypes[0]} prototypes of masks; their coefficients are not read")
    return prototypes[0] if prototypes else 0


def _guess_classes(
    said: Mapping[str, str],
    task: str,
    decoder: str,
    outputs: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]],
    extra: int,
    notes: dict[str, Note],
) -> tuple[str, ...]:
    count = 0
    if task != "tensor" and decoder not in ("nms", "labels"):
        shape = shapes[outputs.get("main", next(iter(outputs.values())))]
        dense = {"yolov5": shape[-1] - 5, "yolox": shape[-1] - 5, "yolov8": shape[1] - 4}
        count = dense[decoder] - extra if decoder in dense else shape[1]
        if decoder == "boxes-scores":
            scores = shapes[outputs["scores"]]
            count = scores[2] if len(scores) == 3 and "classes" not in outputs else 0
    if task == "tensor":
        return ()
    names = _literal(said.get("names"))
    if isinstance(names, dict):
        names = [names[k] for k in sorted(names)] if all(isinstance(k, int) for k in names) else None
    if (
        isinstance(names, list)
        and all(isinstance(n, str) and len(n) <= MAX_TEXT for n in names)
        and len(names) <= MAX_CLASSES
        and count in (0, len(names))
    ):
        notes["classes"] = Note("high", "names in the metadata")
        return tuple(names)
    if 0 < count <= MAX_CLASSES:
        notes["classes"] = Note("low", f"the output has {count} classes; the file does not name them")
        return tuple(f"class_{i}" for i in range(count))
    return ()


def _guess_preprocess(
    model: Any, main: Any, layout: str, shape: Sequence[int], task: str, decoder: str, said: Mapping[str, str], notes: dict[str, Note]
) -> dict[str, Any]:
    if layout == "none":
        return {"colour": "none", "scale": 1.0, "resize": "none"}
    channels = shape[1] if layout == "NCHW" else shape[3]
    grey = channels == 1
    out: dict[str, Any] = {"colour": "grey" if grey else "rgb", "resize": "stretch", "scale": 1.0 / 255.0}
    notes["resize"] = Note("low", "not in the file; stretched to size")
    built_in = _built_in_normalisation(model, main.name)
    if main.type.tensor_type.elem_type != 1:
        notes["colour"] = notes["scale"] = Note("high" if grey else "medium", "the graph takes whole numbers, so pixels as they are")
        return out | {"scale": 1.0}
    if decoder == "yolox":
        notes["colour"] = notes["scale"] = notes["resize"] = Note("medium", "as YOLOX is trained: BGR, pixels as they are, top left on 114")
        return out | {"colour": "grey" if grey else "bgr", "scale": 1.0, "resize": "letterbox-corner", "pad": 114.0}
    if said.get("author") == "Ultralytics" or (decoder in ("yolov5", "yolov8") and task == "detection"):
        known: Sure = "high" if said.get("author") == "Ultralytics" else "medium"
        notes["colour"] = notes["scale"] = notes["resize"] = Note(known, "as YOLO exports are trained: RGB, 0 to 1, letterbox on 114")
        return out | {"resize": "letterbox", "pad": 114.0}
    if built_in:
        notes["scale"] = Note("medium", f"the graph normalises by itself ({built_in}), so pixels as they are")
        notes["colour"] = Note("low", "not in the file")
        return out | {"scale": 1.0}
    if model.producer_name == "PaddlePaddle" or any(n.name.startswith("p2o.") for n in model.graph.node):
        notes["colour"] = notes["scale"] = Note("medium", "exported from Paddle, whose text models take BGR from -1 to 1")
        return out | {"colour": "grey" if grey else "bgr", "mean": (0.5,), "std": (0.5,)}
    if grey:
        notes["scale"] = Note("low", "not in the file; grey from 0 to 1")
        return out
    notes["colour"] = notes["scale"] = Note("low", "not in the file; mean and deviation of ImageNet, RGB, as most are trained")
    mean, std = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)) if channels == 3 else ((0.0,), (1.0,))
    return out | {"mean": mean, "std": std}


def _built_in_normalisation(model: Any, name: str) -> str:
    """Kind of the arithmetic with constants that the graph does on its input before the first other node; "" where none."""
    stored = {t.name for t in model.graph.initializer} | {n.output[0] for n in model.graph.node if n.op_type == "Constant"}
    for _ in range(6):
        readers = [n for n in model.graph.node if name in n.input]
        if len(readers) != 1:
            return ""
        node = readers[0]
        if node.op_type in ("Sub", "Div", "Mul", "Add", "BatchNormalization") and all(i == name or i in stored for i in node.input):
            return str(node.op_type)
        if node.op_type not in ("Cast", "Transpose", "Identity"):
            return ""
        name = node.output[0]
    return ""


def _guess_box(decoder: str, notes: dict[str, Note]) -> tuple[str, bool]:
    if decoder == "yolox":
        notes["box"] = Note("medium", "no exponential in the graph: sizes are logarithms, centres are counted from their cell")
        return "cxcywh", False
    if decoder in ("yolov5", "yolov8"):
        notes["box"] = Note("medium", "YOLO exports give centre and size in pixels of the input")
        return "cxcywh", False
    if decoder in ("nms", "boxes-scores"):
        notes["box"] = Note("low", "not in the file; corners in pixels of the input")
        return "xyxy", False
    return "cxcywh", False
