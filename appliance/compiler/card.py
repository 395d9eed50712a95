"""The card of a foreign model: what its ONNX file does not say, in a TOML file that a person can read and correct.

Hides the file's format, its checks, and how a first draft is guessed from the graph. A draft says for every field how it was
guessed and how sure that is; a wrong guess of the preprocessing costs accuracy that no gate against the float model can see,
so a person should read what is marked "low".
"""

from __future__ import annotations

import ast
import json
import math
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Final, Literal

from appliance.compiler import graph
from appliance.errors import CardInvalid, GraphUnsupported
from models import foreign as decode

FORMAT: Final = 1
MAX_BYTES: Final = 1 << 20
MAX_CLASSES: Final = 100_000
MAX_SIDE: Final = 8192
MAX_INPUT_VALUES: Final = 1 << 26
MAX_TEXT: Final = 500
MAX_CONSTANTS: Final = 16
MAX_CONSTANT_VALUES: Final = 4096

Sure = Literal["high", "medium", "low"]
DECODERS: Final = {
    "classification": ("softmax", "probabilities", "sigmoid", "sigmoid-probabilities"),
    "detection": ("yolov5", "yolov8", "yolox", "nms", "nms-class-first", "boxes-scores"),
    "segmentation": ("argmax", "sigmoid", "probability", "labels"),
    "tensor": ("cosine", "ctc"),
}
LAYOUTS: Final = ("NCHW", "NHWC", "none")
COLOURS: Final = ("rgb", "bgr", "grey", "none")
RESIZES: Final = ("letterbox", "letterbox-corner", "stretch", "crop", "none")
BOXES: Final = ("cxcywh", "xyxy", "yxyx")
# Rows and columns tried, in this order, for an input whose size is free.
SIZES: Final = {"detection": ((640, 640), (320, 320)), "classification": ((224, 224), (48, 192)), "ctc": ((48, 320), (32, 320))}
OTHER_SIZES: Final = ((640, 640), (512, 512), (224, 224), (256, 256), (48, 320), (32, 320))


@dataclass(frozen=True)
class Card:
    """`shape` is the graph's own input with batch 1, in its own layout. `engine_shape` is what the engine takes: NCHW.

    An image becomes the input by: resize, colour order, then (pixel * scale - mean) / std per channel; pixels are 0 to 255.
    """

    name: str
    task: Literal["classification", "detection", "segmentation", "tensor"]
    decoder: str
    input_name: str
    shape: tuple[int, ...]
    outputs: Mapping[str, str]  # role -> name of the graph's output
    version: str = "1"
    classes: tuple[str, ...] = ()
    layout: str = "NCHW"
    colour: str = "rgb"
    scale: float = 1.0 / 255.0
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    resize: str = "stretch"
    pad: float = 0.0
    box: str = "cxcywh"
    normalised: bool = False  # boxes in [0, 1] of the input, not in its pixels
    score_limit: float = 0.25
    iou_limit: float = 0.45
    max_boxes: int = 100
    extra: int = 0  # numbers of each box after its class scores that are not read: mask coefficients, key points
    constants: Mapping[str, float | tuple[float, ...]] = field(default_factory=dict)
    labels: str = ""  # below the evaluation folder: a CSV of file,label; a folder of YOLO .txt; a folder of mask PNGs
    licence: str = ""

    @property
    def is_image(self) -> bool:
        return self.layout != "none"

    @property
    def engine_shape(self) -> tuple[int, ...]:
        if self.layout == "NHWC":
            n, h, w, c = self.shape
            return n, c, h, w
        return self.shape

    @property
    def input_hw(self) -> tuple[int, int]:
        return self.engine_shape[2], self.engine_shape[3]

    @property
    def channels(self) -> int:
        return self.engine_shape[1]

    @property
    def output_names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(self.outputs.values()))

    def input_range(self) -> tuple[float, float]:
        """Smallest and largest value that a preprocessed image can have; [0, 1] for what is no image."""
        if not self.is_image:
            return 0.0, 1.0
        ends = [(p * self.scale - m) / s for p in (0.0, 255.0) for m in self.mean for s in self.std]
        return min(ends), max(ends)

    def preprocess(self) -> dict[str, Any]:
        """What whoever runs the engine must do with an image, as JSON."""
        return {
            "shape": list(self.engine_shape), "colour": self.colour, "scale": self.scale, "mean": list(self.mean), "std": list(self.std),
            "resize": self.resize, "pad": self.pad,
        }  # fmt: skip

    def to_json(self) -> dict[str, Any]:
        return {f.name: _plain(getattr(self, f.name)) for f in fields(self)}


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(v) for v in value]
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    return value


# -- the file -------------------------------------------------------------------------------------------------------


class _Table:
    """One table of the file: every key is taken once, with its type and limits; what is left over is unknown."""

    def __init__(self, where: str, values: Any) -> None:
        if not isinstance(values, dict):
            raise CardInvalid("a table is expected", value=where)
        self.where = where
        self.values = dict(values)

    def _path(self, key: str) -> str:
        return f"{self.where}.{key}" if self.where else key

    def fail(self, key: str, what: str, value: object) -> CardInvalid:
        return CardInvalid(f"{self._path(key)} {what}", value=value)

    def text(self, key: str, default: str | None = None, one_of: Sequence[str] = ()) -> str:
        value = self._take(key, default)
        if not isinstance(value, str) or len(value) > MAX_TEXT or any(ord(c) < 32 for c in value):
            raise self.fail(key, f"must be text of at most {MAX_TEXT} letters", value)
        if one_of and value not in one_of:
            raise self.fail(key, f"must be one of {', '.join(one_of)}", value)
        return value

    def number(self, key: str, low: float, high: float, default: float | None = None) -> float:
        value = self._take(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or not low <= value <= high:
            raise self.fail(key, f"must be a number between {low:g} and {high:g}", value)
        return float(value)

    def count(self, key: str, low: int, high: int, default: int | None = None) -> int:
        value = self._take(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.fail(key, f"must be a whole number between {low} and {high}", value)
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self._take(key, default)
        if not isinstance(value, bool):
            raise self.fail(key, "must be true or false", value)
        return value

    def list_of(self, key: str, kind: Callable[[Any], bool], what: str, most: int, default: Sequence[Any] | None = None) -> tuple[Any, ...]:
        value = self._take(key, default)
        if not isinstance(value, list | tuple) or len(value) > most or not all(kind(v) for v in value):
            raise self.fail(key, f"must be a list of at most {most} {what}", value)
        return tuple(value)

    def _take(self, key: str, default: Any) -> Any:
        if key in self.values:
            return self.values.pop(key)
        if default is None:
            raise self.fail(key, "is missing", None)
        return default

    def finish(self) -> None:
        if self.values:
            raise CardInvalid("the card has a key that no card has", value=self._path(sorted(self.values)[0]))


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and abs(value) < 1e9


def _side(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= 1 << 20


def _text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= MAX_TEXT


def read_card(path: Path) -> Card:
    """Raises CardInvalid naming the field that is missing, unknown, of the wrong type or beyond its limit."""
    try:
        if not path.is_file() or path.stat().st_size > MAX_BYTES:
            raise CardInvalid(f"a card is a file of at most {MAX_BYTES:,} bytes", value=path)
        text = path.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CardInvalid(f"the card cannot be read: {error}", value=path) from error
    return parse_card(text)


def parse_card(text: str) -> Card:
    """As `read_card`, from the text."""
    try:
        content = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise CardInvalid(f"the card is no TOML: {str(error) or 'nested too deep'}") from error
    top = _Table("", content)
    top.count("format", FORMAT, FORMAT)
    task = top.text("task", one_of=tuple(DECODERS))
    inp = _Table("input", top._take("input", None))
    layout = inp.text("layout", "NCHW", LAYOUTS)
    image = layout != "none"
    shape = inp.list_of("shape", _side, "sizes", graph.MAX_RANK)
    outputs = top._take("outputs", None)
    if not isinstance(outputs, dict) or not 1 <= len(outputs) <= 16 or not all(_text(v) for v in outputs.values()):
        raise CardInvalid("outputs must be a table of role = name", value=outputs)
    detection = _Table("detection", top._take("detection", {}))
    evaluation = _Table("evaluation", top._take("evaluation", {}))
    constants = _Table("constants", top._take("constants", {}))
    card = Card(
        name=top.text("name"),
        version=top.text("version", "1"),
        licence=top.text("licence", ""),
        task=task,  # type: ignore[arg-type]
        decoder=top.text("decoder", one_of=DECODERS[task]),
        classes=top.list_of("classes", _text, "names", MAX_CLASSES, ()),
        input_name=inp.text("name"),
        layout=layout,
        shape=shape,
        colour=inp.text("colour", "rgb" if image else "none", COLOURS),
        scale=inp.number("scale", 1e-9, 1e6, 1.0),
        mean=inp.list_of("mean", _number, "numbers", 16, (0.0,)),
        std=inp.list_of("std", _number, "numbers", 16, (1.0,)),
        resize=inp.text("resize", "stretch" if image else "none", RESIZES),
        pad=inp.number("pad", 0, 255, 0.0),
        outputs=dict(outputs),
        box=detection.text("box", "cxcywh", BOXES),
        normalised=detection.flag("normalised", False),
        score_limit=detection.number("score_limit", 0, 1, 0.25),
        iou_limit=detection.number("iou_limit", 0, 1, 0.45),
        max_boxes=detection.count("max_boxes", 1, 10_000, 100),
        extra=detection.count("extra", 0, 10_000, 0),
        constants=_constants(constants),
        labels=evaluation.text("labels", ""),
    )
    for table in (top, inp, detection, evaluation):
        table.finish()
    _check(card)
    return card


def _constants(table: _Table) -> dict[str, float | tuple[float, ...]]:
    if len(table.values) > MAX_CONSTANTS:
        raise CardInvalid(f"constants has more than {MAX_CONSTANTS} entries", value=len(table.values))
    out: dict[str, float | tuple[float, ...]] = {}
    for key in list(table.values):
        if _number(table.values[key]):
            out[key] = table.number(key, -1e9, 1e9)
        else:
            out[key] = table.list_of(key, _number, "numbers", MAX_CONSTANT_VALUES)
    return out


def _check(card: Card) -> None:
    """What each field allows and all together forbid."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", card.name):
        raise CardInvalid("name must be a word of letters, digits, dots and dashes", value=card.name)
    if math.prod(card.shape) > MAX_INPUT_VALUES:
        raise CardInvalid(f"input.shape has more than {MAX_INPUT_VALUES:,} values", value=list(card.shape))
    if not card.shape or card.shape[0] != 1:
        raise CardInvalid("input.shape must begin with a batch of 1", value=list(card.shape))
    if card.is_image:
        if len(card.shape) != 4:
            raise CardInvalid("input.shape must have four sizes for an image", value=list(card.shape))
        if max(card.input_hw) > MAX_SIDE:
            raise CardInvalid(f"input.shape has more than {MAX_SIDE} rows or columns", value=list(card.shape))
        want = 1 if card.colour == "grey" else 3
        if card.colour == "none" or card.channels != want:
            raise CardInvalid(
                "input.colour does not fit the channels", value=f"colour {card.colour}, {card.channels} channels ({card.layout})"
            )
        if card.resize == "none":
            raise CardInvalid("input.resize must say how an image is brought to size", value=card.resize)
        for name, values in (("mean", card.mean), ("std", card.std)):
            if len(values) not in (1, card.channels):
                raise CardInvalid(
                    f"input.{name} must have one value, or one for each channel", value=f"{list(values)}, {card.channels} channels"
                )
    elif card.task != "tensor":
        raise CardInvalid("input.layout is none, so the task can only be tensor", value=card.task)
    if any(s <= 0 for s in card.std):
        raise CardInvalid("input.std must be above 0", value=list(card.std))
    roles = {"boxes-scores": ("boxes", "scores")}.get(card.decoder, ("main",))
    missing = [r for r in roles if r not in card.outputs]
    allowed = {"boxes-scores": ("boxes", "scores", "classes", "count")}.get(card.decoder, ("main",))
    unknown = [r for r in card.outputs if r not in allowed and card.task != "tensor"]
    if missing or unknown:
        raise CardInvalid(f"outputs of decoder {card.decoder} are {', '.join(allowed)}", value=f"missing {missing}, unknown {unknown}")
    labels = Path(card.labels)
    if labels.is_absolute() or ".." in labels.parts:
        raise CardInvalid("evaluation.labels must lie below the evaluation folder", value=card.labels)


def check_against(card: Card, model: Any) -> None:
    """Hold the card against the graph as loaded. Raises CardInvalid naming the field and both values."""
    inputs = {v.name: v for v in graph.real_inputs(model)}
    if card.input_name not in inputs:
        raise CardInvalid("input.name is not an input of the graph", value=f"card {card.input_name}, graph {sorted(inputs)}")
    dims = shape_of(inputs[card.input_name])
    if dims and len(dims) != len(card.shape):
        raise CardInvalid("input.shape has another number of dimensions than the graph", value=f"card {list(card.shape)}, graph {dims}")
    for i, (mine, its) in enumerate(zip(card.shape, dims, strict=False)):
        if its and mine != its:
            if i == 0:
                raise GraphUnsupported("the graph takes only a fixed batch other than 1", value=f"{card.input_name}: {dims}")
            letter = card.layout[i] if card.is_image else str(i)
            word = {"C": "channels", "H": "rows", "W": "columns"}.get(letter, f"size {letter}")
            raise CardInvalid(
                f"input.shape: {word} of the card (layout {card.layout}) are not the graph's",
                value=f"card {list(card.shape)}, graph {dims}",
            )
    others = sorted(set(inputs) - {card.input_name} - set(card.constants))
    if others:
        raise CardInvalid("the graph has another input; give it a constant", value=f"constants.{others[0]}, graph {sorted(inputs)}")
    strange = sorted(set(card.constants) - set(inputs))
    if strange:
        raise CardInvalid("constants names no input of the graph", value=f"card {strange[0]}, graph {sorted(inputs)}")
    made = {o for n in model.graph.node for o in n.output}
    for role, name in card.outputs.items():
        if name not in made:
            raise CardInvalid(f"outputs.{role} is not in the graph", value=f"card {name}, graph {[o.name for o in model.graph.output]}")


def check_outputs(card: Card, shapes: Mapping[str, Sequence[int]]) -> None:
    """Hold the card against the shapes of the prepared graph. Raises CardInvalid naming the field and both values."""
    main = list(shapes[card.outputs.get("main", card.output_names[0])])
    said = len(card.classes)
    its: int | None = None
    more = f" + {card.extra}" if card.extra else ""
    if card.decoder in ("yolov5", "yolox"):
        _expect(len(main) == 3 and main[2] > 5 + card.extra, card, f"1 x boxes x (5 + classes{more})", main)
        its = main[2] - 5 - card.extra
        if card.decoder == "yolox":
            cells = decode.yolox_cells(card.input_hw)
            _expect(main[1] == len(cells), card, f"{len(cells)} boxes, one for each cell of strides 8, 16 and 32", main)
    elif card.decoder == "yolov8":
        _expect(len(main) == 3 and main[1] > 4 + card.extra, card, f"1 x (4 + classes{more}) x boxes", main)
        its = main[1] - 4 - card.extra
    elif card.decoder in ("nms", "nms-class-first"):
        _expect(len(main) in (2, 3) and main[-1] in (6, 7), card, "boxes x 6 or 7", main)
    elif card.decoder == "boxes-scores":
        boxes = list(shapes[card.outputs["boxes"]])
        _expect(boxes[-1] == 4, card, "boxes with four corners", boxes)
        if "classes" not in card.outputs:
            scores = list(shapes[card.outputs["scores"]])
            _expect(len(scores) == 3, card, "scores 1 x boxes x classes, or an output classes", scores)
            its = scores[2] if scores[1] == boxes[-2] else scores[1]
    elif card.task == "classification":
        _expect(math.prod(main[2:]) == 1 and len(main) >= 2, card, "1 x classes", main)
        its = main[1]
    elif card.task == "segmentation":
        _expect(len(main) in (3, 4), card, "1 x classes x rows x columns", main)
        if card.decoder in ("argmax", "sigmoid", "probability") and len(main) == 4:
            its = main[1]
    elif card.decoder == "ctc":
        _expect(len(main) == 3, card, "1 x steps x letters", main)
    if said and its is not None and said != its:
        raise CardInvalid("classes are not as many as the graph's", value=f"card {said}, graph {its} (output {main})")


def _expect(fits: bool, card: Card, what: str, found: Sequence[int]) -> None:
    if not fits:
        raise CardInvalid(f"decoder {card.decoder} needs {what}", value=f"card {card.decoder}, graph {list(found)}")


def shape_of(value: Any) -> list[int]:
    """Declared sizes, 0 where free."""
    return [int(d.dim_value) for d in value.type.tensor_type.shape.dim]


# -- the draft ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Note:
    """How one field was guessed, and how sure that is."""

    sure: Sure
    why: str


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
    _check(card)
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
    if isinstance(names, list) and all(_text(n) for n in names) and len(names) <= MAX_CLASSES and count in (0, len(names)):
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


# -- writing --------------------------------------------------------------------------------------------------------


def to_toml(card: Card, notes: Mapping[str, Note] | None = None) -> str:
    """The card as a file that `parse_card` reads back to the same Card, with the notes as comments."""
    notes = notes or {}

    def comment(key: str) -> list[str]:
        note = notes.get(key)
        return [f"# {note.sure}: {_one_line(note.why)}"] if note else []

    def line(key: str, value: Any, note: str | None = None) -> list[str]:
        return [*comment(note or key), f"{_key(key)} = {_toml(value)}"]

    out = ["# Card of a foreign model. Each comment says how sure the guess below it is, and why.", f"format = {FORMAT}"]
    out += line("name", card.name) + line("version", card.version)
    if card.licence:
        out += line("licence", card.licence)
    out += line("task", card.task) + line("decoder", card.decoder)
    out += line("classes", card.classes)
    out += ["", "[input]", *line("name", card.input_name, "input_name"), *line("layout", card.layout), *line("shape", card.shape)]
    if card.is_image:
        out += [*line("colour", card.colour), "# value = (pixel * scale - mean) / std, pixels from 0 to 255"]
        out += [*line("scale", card.scale), *line("mean", card.mean), *line("std", card.std)]
        out += [*line("resize", card.resize), *line("pad", card.pad)]
    out += ["", "[outputs]", *comment("outputs"), *(f"{_key(r)} = {_toml(n)}" for r, n in card.outputs.items())]
    if card.task == "detection":
        out += ["", "[detection]", *line("box", card.box), *line("normalised", card.normalised)]
        out += [*line("score_limit", card.score_limit), *line("iou_limit", card.iou_limit), *line("max_boxes", card.max_boxes)]
        out += line("extra", card.extra) if card.extra else []
    if card.constants:
        out += ["", "[constants]", *comment("constants"), *(f"{_key(k)} = {_toml(v)}" for k, v in card.constants.items())]
    if card.labels:
        out += ["", "[evaluation]", *line("labels", card.labels)]
    return "\n".join(out) + "\n"


def _one_line(text: str) -> str:
    return re.sub(r"[\x00-\x1f\x7f]+", " ", text)[:200]


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else _toml(name)


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        # JSON's escapes are TOML's, except that JSON leaves DEL as it is and TOML forbids it.
        return json.dumps(value, ensure_ascii=True).replace("\x7f", "\\u007f") if value.isascii() else _quoted(value)
    if isinstance(value, tuple | list):
        return "[" + ", ".join(_toml(v) for v in value) + "]"
    return repr(value)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
