"""The card of a foreign model: what its ONNX file does not say, in a TOML file that a person can read and correct.

Hides the file's format and its checks. `drafting` makes a first card by looking at the graph.
"""

from __future__ import annotations

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
    check(card)
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


def check(card: Card) -> None:
    """Hold the fields against each other: what each allows and all together forbid. Raises CardInvalid."""
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


# -- writing --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Note:
    """How one field was guessed, and how sure that is."""

    sure: Sure
    why: str


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
