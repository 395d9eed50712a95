"""A Report as pictures: the page's layers, the overlay that leaves the appliance, the label image.

Hides colours, fonts and layout. Every picture that can be downloaded carries the disclaimer as pixels (the
overlay) and as PNG text (all); the base and heatmap layers and the labels are pure source pixels, because coordinates and
values in them must match the report, so there it is PNG text only and the page shows it permanently beside them.
Deterministic: the same arguments give the same bytes.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import cv2
import numpy as np
from numpy.typing import NDArray

from appliance import _png
from appliance.errors import UsageError
from appliance.report import DISCLAIMER, Finding, Frontal, Line, Measurement, Omission, Report
from appliance.study import Instance
from kernels.preprocess import normalise

Image = NDArray[np.uint8]
Colour = tuple[int, int, int]
Polygon = NDArray[np.float64]

LEAST_SIDE, MOST_SIDE = 1000, 2400  # of the image within the overlay; of the whole overlay
MOST_IMAGE_SIDE = 1760  # leaves room for the panel
SMALLEST_OVERLAY = 256  # below, the disclaimer cannot be read
SURE_FLAG = 0.5
MOST_LABELS, MOST_NOTES, MOST_CHARACTERS = 24, 8, 320


def _bgr(code: str) -> Colour:
    """ "#f0a830" -> (blue, green, red), each 0 to 255."""
    return int(code[5:7], 16), int(code[3:5], 16), int(code[1:3], 16)


# The page's colours: one per structure, told apart with every kind of colour vision, and not by colour alone.
_PAGE, _SURFACE, _LINE = _bgr("#0d1116"), _bgr("#171d24"), _bgr("#3a4654")
_TEXT, _MUTED, _WARN = _bgr("#eef2f6"), _bgr("#b3bfcc"), _bgr("#ffe08a")
_FLAG = _bgr("#ffc233")
_STRUCTURE = {"vertebra": _bgr("#56b4e9"), "disc": _bgr("#f0a830")}
_VERTEBRA_NAME = _bgr("#cfeaff")
_MEASURE = _bgr("#b8f28c")
_BOW_ROOM = 170  # for the bow of an angle and its words, 1/1000 of the usual size
_GRADE = tuple(_bgr(c) for c in ("#fff2cc", "#ffd37a", "#f7a541", "#d9701e", "#a63d09"))
_GRADE_TEXT = (*(_bgr("#1a1206"),) * 3, _bgr("#120b02"), _bgr("#ffffff"))
_STRIP, _STRIP_TEXT = _bgr("#3d2f00"), _bgr("#ffe08a")
_STATUS = {
    "complete": (_bgr("#12442f"), _bgr("#9df0c3")),
    "partial": (_bgr("#4a3900"), _bgr("#ffe08a")),
    "refused": (_bgr("#551d24"), _bgr("#ffc2c8")),
}
_KIND = {"cam": "Exact CAM", "class-evidence": "class evidence"}
_PROTOCOL = {"lumbar-mri-sagittal": "Lumbar MRI, sagittal", "spine-xray-ap": "Spine radiograph, frontal"}
_SHED = {"heatmap": "the heatmap", "masks": "the outlines", "grades": "the grades"}


_TEXT_CHUNK = ("Disclaimer", DISCLAIMER)


# --- Evidence colours --------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _heat_table() -> Image:
    """256 x 4: blue, green, red, alpha of each evidence value. No evidence is transparent; Turbo, as in the page's legend."""
    values = np.arange(256, dtype=np.uint8)
    colours = cv2.applyColorMap(values[:, None], cv2.COLORMAP_TURBO)[:, 0]
    alpha = np.rint(255 * (values / 255.0) ** 0.8).astype(np.uint8)
    return np.concatenate([colours, alpha[:, None]], axis=1)


def _levels(values: NDArray[np.float32]) -> Image:
    """[0, 1] -> 0 to 255."""
    return np.asarray(cv2.convertScaleAbs(np.clip(values, 0.0, 1.0), alpha=255.0), np.uint8)


def _shown_evidence(report: Report) -> tuple[list[NDArray[np.float32]], str]:
    """The maps that the overlay shows, and how its legend calls them: exact maps of the discs before the general one."""
    available = [(h, h.values) for h in report.heatmaps if h.values is not None]
    cams = [(h, values) for h, values in available if h.kind == "cam"]
    if cams:
        targets = f"{len(cams)} discs, each for its own grade" if len(cams) > 1 else cams[0][0].target
        return [values for _, values in cams], f"{_KIND['cam']}: {targets}"
    if available:
        heatmap, values = available[0]
        return [values], f"{_KIND[heatmap.kind].capitalize()}: {heatmap.target}"
    return [], ""


def _combined(maps: Sequence[NDArray[np.float32]]) -> Image:
    """Greatest evidence of one or more maps, 0 to 255; a CAM is zero outside its own crop."""
    out = _levels(maps[0])
    for values in maps[1:]:
        cv2.max(out, _levels(values), out)
    return out


# --- Text and shapes ---------------------------------------------------------------------------------------------------------

_fonts = threading.Lock()
_face: cv2.FontFace | None = None


def warm_up() -> None:
    """Load the font, 0.03 to 0.3 s once in a process, so that the first picture does not pay for it."""
    _width("0", 16, 400)


def _font() -> cv2.FontFace:
    """OpenCV's built-in variable TrueType font. The caller holds the lock: its glyph cache is not ours to trust to threads."""
    global _face
    if _face is None:
        _face = cv2.FontFace("sans")
    return _face


@lru_cache(maxsize=2048)
def _width(text: str, size: int, weight: int) -> int:
    with _fonts:
        box = cv2.getTextSize((1, 1), text, (0, 0), _font(), size, weight)
    return int(box[0] + box[2])


def _text(image: Image, text: str, x: float, baseline: float, size: int, colour: Colour, weight: int = 400) -> int:
    """Draw; returns the x at which the text ends."""
    with _fonts:
        cv2.putText(image, text, (round(x), round(baseline)), colour, _font(), size, weight)
    return round(x) + _width(text, size, weight)


def _clean(text: str) -> str:
    """One line of printable characters, of bounded length: parts of it may come from a file."""
    line = " ".join("".join(c if c.isprintable() else " " for c in str(text)[: 4 * MOST_CHARACTERS]).split())
    return line if len(line) <= MOST_CHARACTERS else line[: MOST_CHARACTERS - 3] + "..."


def _wrapped(text: str, room: int, size: int, weight: int = 400) -> list[str]:
    """Lines no wider than `room` pixels; a word that is wider alone is broken."""
    lines: list[str] = []
    line = ""
    for word in _clean(text).split(" "):
        longer = f"{line} {word}" if line else word
        if _width(longer, size, weight) <= room:
            line = longer
            continue
        if line:
            lines.append(line)
        while len(word) > 1 and _width(word, size, weight) > room:
            cut = max(1, min(len(word) - 1, int(len(word) * room / _width(word, size, weight))))
            lines.append(word[:cut])
            word = word[cut:]
        line = word
    return [*lines, line] if line else lines


def _filled(height: int, width: int, colour: Colour) -> Image:
    out: Image = np.empty((height, width, 3), np.uint8)
    # By rows: many times as fast as by pixels.
    out[0] = colour
    out[1:] = out[0]
    return out


# The four quarters of a circle, each in seven points, clockwise from the right: 4 x 7 x 2.
_TURNS = np.arange(4)[:, None] * np.pi / 2 + np.linspace(0, np.pi / 2, 7)
_ROUND = np.stack([np.cos(_TURNS), np.sin(_TURNS)], 2)


def _plate(image: Image, box: tuple[float, float, float, float], colour: Colour, radius: float, alpha: float = 1.0) -> None:
    """A rounded rectangle (x0, y0, x1, y1), blended."""
    x0, y0 = max(0, math.floor(box[0])), max(0, math.floor(box[1]))
    x1, y1 = min(image.shape[1], math.ceil(box[2])), min(image.shape[0], math.ceil(box[3]))
    if x1 <= x0 or y1 <= y0:
        return
    radius = min(radius, (box[2] - box[0]) / 2, (box[3] - box[1]) / 2)
    left, top, right, bottom = box[0] + radius, box[1] + radius, box[2] - radius, box[3] - radius
    centres = np.array([[[right, bottom]], [[left, bottom]], [[left, top]], [[right, top]]])
    points = (centres + radius * _ROUND).reshape(-1, 2) - [x0 + 0.5, y0 + 0.5]
    cover = np.zeros((y1 - y0, x1 - x0), np.uint8)
    cv2.fillConvexPoly(cover, np.rint(points * 16).astype(np.int32), 255, cv2.LINE_AA, 4)
    part = image[y0:y1, x0:x1]
    share = (cover.astype(np.float32) * np.float32(alpha / 255))[..., None]
    part[...] = (part + share * (np.asarray(colour, np.float32) - part) + np.float32(0.5)).astype(np.uint8)


def _smooth(polygon: Polygon, step: float, sigma: float) -> Polygon:
    """A closed polygon resampled every `step` and smoothed by `sigma`, both in its own unit: steps of a mask's pixels vanish."""
    closed = np.concatenate([polygon, polygon[:1]])
    along = np.concatenate([[0.0], np.cumsum(np.hypot(*np.diff(closed, axis=0).T))])
    count = int(min(2000, along[-1] / step))
    if count < 8:
        return polygon
    t = np.linspace(0, along[-1], count, endpoint=False)
    points = np.stack([np.interp(t, along, closed[:, k]) for k in (0, 1)], 1)
    radius = min(count // 2, max(1, int(3 * sigma / step)))
    kernel = np.exp(-0.5 * (np.arange(-radius, radius + 1) * step / sigma) ** 2)
    kernel /= kernel.sum()
    around = np.concatenate([points[-radius:], points, points[:radius]])
    return np.stack([np.convolve(around[:, k], kernel, "valid") for k in (0, 1)], 1)


def _dashes(polygon: Polygon, dash: float, gap: float) -> list[Polygon]:
    """A closed polygon as open pieces of about `dash`, about `gap` apart."""
    closed = np.concatenate([polygon, polygon[:1]])
    along = np.concatenate([[0.0], np.cumsum(np.hypot(*np.diff(closed, axis=0).T))])
    count = max(1, round(along[-1] / (dash + gap)))
    period = along[-1] / count
    starts = np.arange(count) * period
    stops = starts + period * dash / (dash + gap)
    # Where a dash goes round a corner of the polygon it has a point of its own.
    first, behind = np.searchsorted(along, starts, "right"), np.searchsorted(along, stops, "left")
    pieces = [np.concatenate([[a], along[i:j], [b]]) for a, b, i, j in zip(starts, stops, first, behind, strict=True)]
    t = np.concatenate(pieces)
    points = np.stack([np.interp(t, along, closed[:, k]) for k in (0, 1)], 1)
    return np.split(points, np.cumsum([len(p) for p in pieces])[:-1])


def _lines(image: Image, pieces: Sequence[Polygon], closed: bool, colour: Colour, width: int) -> None:
    """Polylines through points in pixel edges."""
    fixed = np.rint((np.concatenate(pieces) - 0.5) * 16).astype(np.int32)[:, None]
    ends = np.cumsum([len(p) for p in pieces])
    cv2.polylines(image, np.split(fixed, ends[:-1]), closed, colour, width, cv2.LINE_AA, 4)


def _rectangle(image: Image, box: tuple[float, float, float, float], colour: Colour, width: int, alpha: float) -> None:
    """A thin frame inside the box, blended so that what it crosses stays visible."""
    x0, x1 = (int(np.clip(round(v), 0, image.shape[1])) for v in (box[0], box[2]))
    y0, y1 = (int(np.clip(round(v), 0, image.shape[0])) for v in (box[1], box[3]))
    if x1 - x0 < 2 * width or y1 - y0 < 2 * width:
        return
    tint = np.asarray(colour, np.float32) * np.float32(alpha)
    for part in (
        image[y0 : y0 + width, x0:x1],
        image[y1 - width : y1, x0:x1],
        image[y0 + width : y1 - width, x0 : x0 + width],
        image[y0 + width : y1 - width, x1 - width : x1],
    ):
        part[...] = (part * np.float32(1 - alpha) + tint).astype(np.uint8)


# --- Layout of the overlay ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Frame:
    """Source pixel edges -> image pixel edges, physical aspect kept. `unit` is what 1/1000 of the usual size is here."""

    width: int
    height: int
    scale_x: float
    scale_y: float
    unit: float

    def points(self, polygon: Sequence[tuple[float, float]]) -> Polygon:
        return np.asarray(polygon, np.float64).reshape(-1, 2) * [self.scale_x, self.scale_y]

    def box(self, box: tuple[float, float, float, float]) -> tuple[float, float, float, float]:
        return box[0] * self.scale_x, box[1] * self.scale_y, box[2] * self.scale_x, box[3] * self.scale_y

    def size(self, size: float) -> int:
        return max(10, round(size * self.unit))


def _frame(instance: Instance) -> _Frame:
    rows, columns = instance.pixels.shape
    row_mm, column_mm = instance.spacing_mm or (1.0, 1.0)
    tall, wide = rows * row_mm, columns * column_mm
    side = min(MOST_IMAGE_SIDE, max(LEAST_SIDE, rows, columns))
    per_mm = side / max(tall, wide)
    width, height = max(1, round(wide * per_mm)), max(1, round(tall * per_mm))
    return _Frame(width, height, width / columns, height / rows, side / LEAST_SIDE)


def _grey(instance: Instance) -> Image:
    return np.asarray(cv2.convertScaleAbs(normalise(instance.pixels) + np.float32(1.0), alpha=127.5), np.uint8)


def _resized(image: Image, width: int, height: int) -> Image:
    if image.shape[:2] == (height, width):
        return image
    shrink = width * height < image.shape[0] * image.shape[1]
    return np.asarray(cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA if shrink else cv2.INTER_CUBIC), np.uint8)


def _blended(grey: Image, evidence: Image | None, strength: float) -> Image:
    """H x W grey and evidence -> H x W x 3, evidence over grey by its alpha times `strength`."""
    out = np.asarray(cv2.cvtColor(grey, cv2.COLOR_GRAY2BGR), np.uint8)
    if evidence is None or strength == 0:
        return out
    # Without evidence the grey is as it was, and exact maps lie along the discs only.
    x, y, wide, tall = cv2.boundingRect(evidence)
    grey, evidence = grey[y : y + tall, x : x + wide], evidence[y : y + tall, x : x + wide]
    if not evidence.size:
        return out
    table = _heat_table()
    alpha = table[:, 3] * np.float32(strength / 255)
    # Premultiplied tables: two look-ups, one product, one sum, all in bytes.
    colours = np.rint(table[:, :3] * alpha[:, None]).astype(np.uint8)
    through = np.rint((1 - alpha) * 255).astype(np.uint8)
    behind = cv2.multiply(grey, cv2.LUT(evidence, through), scale=1 / 255)
    tint = cv2.LUT(cv2.cvtColor(evidence, cv2.COLOR_GRAY2BGR), colours[None])
    out[y : y + tall, x : x + wide] = cv2.add(cv2.cvtColor(behind, cv2.COLOR_GRAY2BGR), tint)
    return out


def _draw_structures(image: Image, frame: _Frame, report: Report, boxes: bool, outlines: bool) -> None:
    width = frame.size(10) // 5
    if boxes:
        for finding in report.findings:
            _rectangle(image, frame.box(finding.box_px), _STRUCTURE[finding.label], max(1, round(frame.unit)), 0.55 if outlines else 0.9)
    if not outlines:
        return
    # Vertebrae first: where two outlines touch, the disc's stays whole.
    for finding in sorted(report.findings, key=lambda f: f.label != "vertebra"):
        if len(finding.outline_px) < 3:
            continue
        scale = math.sqrt(frame.scale_x * frame.scale_y)
        polygon = _smooth(frame.points(finding.outline_px), max(5.0 * frame.unit, scale), max(2.0, 0.75 * scale))
        _lines(image, [polygon], True, _PAGE, width + 2)
        if finding.label == "disc":
            _lines(image, [polygon], True, _STRUCTURE["disc"], width)
        else:
            _lines(image, _dashes(polygon, 14 * frame.unit, 7 * frame.unit), False, _STRUCTURE["vertebra"], width)


# --- Measurements ------------------------------------------------------------------------------------------------------------


def _measured(found: Finding | Report, name: str) -> Measurement | None:
    return next((m for m in found.measurements if m.name == name), None)


def _amount(measurement: Measurement, digits: int = 1) -> str:
    """A value with its unit, as it is written for a person."""
    unit = {"deg": "°", "mm2": " mm²", "px2": " px²", "ratio": "", "grade": ""}.get(measurement.unit, f" {_clean(measurement.unit)}")
    return f"{measurement.value:.{digits}f}{unit}".replace("-", "−")


def _draw_measures(image: Image, frame: _Frame, report: Report, shift: int) -> None:
    """End plates, the lordosis angle, the canal at each disc, slips and fractures, as lines with few words. `shift` is where the
    image begins."""
    for finding in report.findings[:64]:
        if wedge := _measured(finding, "wedge_angle"):
            for line in wedge.lines_px:
                _stroke(image, frame, line, shift, 1)
    lordosis = _measured(report, "lumbar_lordosis")
    if lordosis and len(lordosis.lines_px) == 2:
        _draw_angle(image, frame, lordosis, shift, "Lordosis")
    for angle in report.measurements[:MOST_LABELS]:
        if angle.name == "cobb_angle" and len(angle.lines_px) == 2:
            _draw_angle(image, frame, angle, shift, "Cobb")
    narrowest = _measured(report, "canal_diameter_narrowest")
    for finding in report.findings[:64]:
        canal = _measured(finding, "canal_diameter")
        if canal and canal.lines_px:
            _draw_canal(image, frame, canal, shift, bool(narrowest and narrowest.lines_px == canal.lines_px))
        _draw_grade(image, frame, finding, shift)


def _ends(frame: _Frame, line: Line, shift: int) -> Polygon:
    return np.asarray(frame.points(line) + np.array([shift, 0.0]))


def _stroke(image: Image, frame: _Frame, line: Line, shift: int, width: float) -> None:
    thick = max(1, round(width * frame.unit))
    points = _ends(frame, line, shift)
    _lines(image, [points], False, _PAGE, thick + 2)
    _lines(image, [points], False, _MEASURE, thick)


def _tag(image: Image, frame: _Frame, text: str, x: float, middle: float, right: bool, size: float = 15, weight: int = 500) -> None:
    """Words on a plate, beginning at `x`, or ending there where not `right`; kept within the image."""
    pixels = frame.size(size)
    wide = _width(text, pixels, weight)
    start = min(max(x if right else x - wide, 0.4 * pixels), image.shape[1] - wide - 0.4 * pixels)
    middle = min(max(middle, 0.8 * pixels), image.shape[0] - 0.8 * pixels)
    _plate(
        image, (start - 0.3 * pixels, middle - 0.72 * pixels, start + wide + 0.3 * pixels, middle + 0.72 * pixels), _PAGE, 0.3 * pixels, 0.7
    )
    _text(image, text, start, middle + 0.36 * pixels, pixels, _MEASURE, weight)


def _draw_angle(image: Image, frame: _Frame, measurement: Measurement, shift: int, name: str) -> None:
    """Cobb's way: both end plates, drawn on past their second ends (the back, or a curve's hollow side), and the angle between."""
    lines = [_ends(frame, line, shift) for line in measurement.lines_px]
    to_right = bool(lines[0][1, 0] > lines[0][0, 0])
    # As far as the image goes, with room for the bow and its words.
    room = (image.shape[1] - _BOW_ROOM * frame.unit) if to_right else _BOW_ROOM * frame.unit
    share = 1.5
    for front, back in lines:
        across = float(back[0] - front[0])
        if across:
            share = min(share, max(0.1, float(room - back[0]) / across))
    reach = []
    for line, (front, back) in zip(measurement.lines_px, lines, strict=True):
        end = back + share * (back - front)
        _stroke(image, frame, line, shift, 3)
        dashes = [np.stack([back + a * (end - back), back + (a + 0.07) * (end - back)]) for a in np.linspace(0.02, 0.93, 10)]
        _lines(image, dashes, False, _PAGE, max(1, round(frame.unit)) + 2)
        _lines(image, dashes, False, _MEASURE, max(1, round(1.5 * frame.unit)))
        reach.append(end)
    upper, lower = reach
    # A bow between the two ends says what the words are about.
    bulge = 0.07 * float(np.hypot(*(lower - upper))) * (1 if to_right else -1)
    middle = (upper + lower) / 2 + [bulge, 0.0]
    t = np.linspace(0, 1, 24)[:, None]
    bow = (1 - t) ** 2 * upper + 2 * t * (1 - t) * (2 * middle - (upper + lower) / 2) + t**2 * lower
    _lines(image, [bow], False, _PAGE, max(1, round(frame.unit)) + 2)
    _lines(image, [bow], False, _MEASURE, max(1, round(frame.unit)))
    text = f"{name} {_amount(measurement, 0)}"
    _tag(image, frame, text, middle[0] + (10 if to_right else -10) * frame.unit, middle[1], to_right, 18, 600)


def _draw_canal(image: Image, frame: _Frame, canal: Measurement, shift: int, narrowest: bool) -> None:
    _stroke(image, frame, canal.lines_px[0], shift, 3 if narrowest else 2)
    front, back = _ends(frame, canal.lines_px[0], shift)
    to_right = bool(back[0] > front[0])
    text = _amount(canal) + (" narrowest" if narrowest else "")
    _tag(image, frame, text, back[0] + (9 if to_right else -9) * frame.unit, back[1], to_right, 15, 650 if narrowest else 450)


def _draw_grade(image: Image, frame: _Frame, finding: Finding, shift: int) -> None:
    """A slip or a loss of height that has a grade: the step at the back, or the words under the vertebra's name."""
    meyerding, slip = _measured(finding, "meyerding_grade"), _measured(finding, "slip_percent")
    if meyerding and slip and meyerding.value >= 1 and len(slip.lines_px) == 2:
        for line in slip.lines_px:
            _stroke(image, frame, line, shift, 4)
    loss, genant = _measured(finding, "height_loss"), _measured(finding, "genant_grade")
    if loss and genant and genant.value >= 1:
        x0, y0, x1, y1 = frame.box(finding.box_px)
        text = f"−{loss.value:.0f} %"
        wide = _width(text, frame.size(15), 600)
        _tag(image, frame, text, (x0 + x1 - wide) / 2 + shift, (y0 + y1) / 2 + 1.5 * frame.size(17), True, 15, 600)


# --- Labels beside the column ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Label:
    """Words for one disc. `anchor` is the point of the disc that its line leads to, in image pixels."""

    name: str
    grade: int | None
    flags: str
    anchor: tuple[float, float]
    anterior_left: bool
    size: int

    @property
    def chip(self) -> str:
        return f"Pf {self.grade}" if self.grade else ""

    @property
    def small(self) -> int:
        return max(9, round(0.82 * self.size))

    @property
    def chip_width(self) -> int:
        return _width(self.chip, self.small, 650) + self.size * 2 // 3 if self.grade else 0

    @property
    def width(self) -> int:
        first = _width(self.name, self.size, 600) + (self.chip_width + self.size // 2 if self.grade else 0)
        return max(first, _width(self.flags, self.small, 500) if self.flags else 0) + self.size

    @property
    def height(self) -> int:
        return round(1.7 * self.size) + (round(1.15 * self.small) if self.flags else 0)


def _name(finding: Finding) -> str:
    """The level, or the number that is no level."""
    return finding.level or f"#{finding.number}"


def _flags(finding: Finding) -> str:
    return ", ".join(name for name, probability in finding.flags.items() if probability >= SURE_FLAG)


def _discs(report: Report) -> list[Finding]:
    """From the top of the image downwards, at most MOST_LABELS."""
    found = [f for f in report.findings if f.label == "disc"]
    return sorted(found, key=lambda f: f.box_px[1] + f.box_px[3])[:MOST_LABELS]


def _anterior_left(report: Report) -> bool:
    """The side away from the canal, where labels hide least; left, as sagittal slices are shown, where that is unknown."""
    discs = [f for f in report.findings if f.label == "disc"]
    if report.mask is None or not discs:
        return True
    canal = np.flatnonzero((report.mask.values == 3).any(axis=0))
    if not len(canal):
        return True
    return float(np.median(canal)) >= float(np.median([(f.box_px[0] + f.box_px[2]) / 2 for f in discs]))


def _spread(wanted: Sequence[float], heights: Sequence[int], gap: float, room: float) -> list[float]:
    """Tops of boxes as near as possible to those wanted (ascending), not overlapping, within [0, room] where they fit."""
    if not wanted:
        return []
    offsets = np.concatenate([[0.0], np.cumsum([h + gap for h in heights])])[:-1]
    # Without their own heights the tops must only not decrease: pool neighbours that do (isotonic least squares).
    pools: list[tuple[float, int]] = []
    for value in np.asarray(wanted) - offsets:
        pools.append((float(value), 1))
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (a, n), (b, m) = pools[-2], pools[-1]
            pools[-2:] = [((a * n + b * m) / (n + m), n + m)]
    last = room - offsets[-1] - heights[-1]
    level = [min(max(value, 0.0), max(last, 0.0)) for value, n in pools for _ in range(n)]
    return [float(v) for v in np.asarray(level) + offsets]


def _labels(frame: _Frame, report: Report) -> list[_Label]:
    discs = _discs(report)
    left = _anterior_left(report)
    size = frame.size(21)
    for attempt in range(8):
        out = []
        for finding in discs:
            box = frame.box(finding.box_px)
            points = frame.points(finding.outline_px)
            if len(points) >= 3:
                x, y = points[int(points[:, 0].argmin() if left else points[:, 0].argmax())]
            else:
                x, y = (box[0] if left else box[2]), (box[1] + box[3]) / 2
            grade = finding.pfirrmann.grade if finding.pfirrmann else None
            out.append(_Label(_name(finding), grade, _flags(finding), (float(x), float(y)), left, size))
        out.sort(key=lambda label: label.anchor[1])
        if sum(label.height + size // 4 for label in out) <= frame.height or size <= 10 or attempt == 7:
            break
        size = max(10, round(size * 0.85))
    return out


def _label_room(frame: _Frame, report: Report, labels: Sequence[_Label]) -> tuple[int, float]:
    """(width that the image must grow by, x of the labels' edge that faces the column)."""
    if not labels:
        return 0, 0.0
    lead = 30 * frame.unit
    boxes = [frame.box(f.box_px) for f in report.findings]
    widest = max(label.width for label in labels)
    if labels[0].anterior_left:
        edge = min(b[0] for b in boxes) - lead
        return max(0, math.ceil(widest + 8 - edge)), edge
    edge = max(b[2] for b in boxes) + lead
    return max(0, math.ceil(edge + widest + 8 - frame.width)), edge


def _draw_labels(image: Image, frame: _Frame, labels: Sequence[_Label], edge: float, shift: int) -> None:
    """Labels in one column, each with a line to its disc. `shift` is where the image begins."""
    tops = _spread(
        [label.anchor[1] - 0.85 * label.size for label in labels], [label.height for label in labels], 4 * frame.unit, image.shape[0]
    )
    for label, top in zip(labels, tops, strict=True):
        size = label.size
        x1 = round(edge + shift) if label.anterior_left else round(edge + shift) + label.width
        x0 = x1 - label.width
        middle = top + 0.85 * size
        near = x1 if label.anterior_left else x0
        end = (label.anchor[0] + shift, label.anchor[1])
        line = np.array([[near, middle], [near + (12 if label.anterior_left else -12) * frame.unit, middle], end])
        _lines(image, [line], False, _PAGE, max(1, round(frame.unit)) + 2)
        _lines(image, [line], False, _STRUCTURE["disc"], max(1, round(frame.unit)))
        cv2.circle(
            image,
            (round((end[0] - 0.5) * 16), round((end[1] - 0.5) * 16)),
            round(3.2 * frame.unit * 16),
            _STRUCTURE["disc"],
            -1,
            cv2.LINE_AA,
            4,
        )
        _plate(image, (x0, top, x1, top + label.height), _PAGE, 0.35 * size, 0.82)
        x = x0 + size // 2
        end_x = _text(image, label.name, x, middle + 0.36 * size, size, _TEXT, 600)
        if label.grade:
            c0 = end_x + size // 2
            _draw_chip(image, c0, middle, label.chip_width, label.grade, label.chip, label.small)
        if label.flags:
            _text(image, label.flags, x, middle + 0.36 * size + 1.3 * label.small, label.small, _FLAG, 500)


def _draw_chip(image: Image, x: float, middle: float, width: float, grade: int, text: str, size: int) -> None:
    """A plate in the colour of the grade, with a rim so that the darkest stands out too."""
    half = 0.72 * size
    _plate(image, (x, middle - half, x + width, middle + half), _GRADE[3] if grade == 5 else _GRADE[grade - 1], 0.3 * size)
    if grade == 5:
        _plate(image, (x + 1.5, middle - half + 1.5, x + width - 1.5, middle + half - 1.5), _GRADE[4], 0.25 * size)
    _text(image, text, x + (width - _width(text, size, 650)) / 2, middle + 0.36 * size, size, _GRADE_TEXT[grade - 1], 650)


def _draw_vertebra_names(image: Image, frame: _Frame, report: Report, shift: int) -> None:
    size = frame.size(17)
    for finding in report.findings[:64]:
        if finding.label != "vertebra" or not finding.level:
            continue
        x0, y0, x1, y1 = frame.box(finding.box_px)
        wide = _width(finding.level, size, 600)
        if y1 - y0 < 1.6 * size or x1 - x0 < wide + size:
            continue
        x, y = (x0 + x1) / 2 + shift, (y0 + y1) / 2
        _plate(image, (x - wide / 2 - 0.4 * size, y - 0.75 * size, x + wide / 2 + 0.4 * size, y + 0.75 * size), _PAGE, 0.35 * size, 0.6)
        _text(image, finding.level, x - wide / 2, y + 0.36 * size, size, _VERTEBRA_NAME, 600)


# --- Panel and strip ---------------------------------------------------------------------------------------------------------


class _Panel:
    """The column of words and keys beside the image. It grows downwards; `used` is its height so far."""

    def __init__(self, frame: _Frame) -> None:
        self.frame = frame
        self.width = frame.size(350)
        self.margin = frame.size(20)
        self.room = self.width - 2 * self.margin
        # Tall enough for anything the limits on text let through; cut to what was used.
        self.image = _filled(frame.size(4000), self.width, _SURFACE)
        self.used = self.margin

    def words(self, text: str, size: float, colour: Colour, weight: int = 400, after: float = 6) -> None:
        pixels = self.frame.size(size)
        for line in _wrapped(text, self.room, pixels, weight):
            self.used += round(1.3 * pixels)
            _text(self.image, line, self.margin, self.used - 0.3 * pixels, pixels, colour, weight)
        self.used += round(after * self.frame.unit)

    def heading(self, text: str) -> None:
        self.used += self.frame.size(8)
        cv2.line(self.image, (self.margin, self.used), (self.width - self.margin, self.used), _LINE, max(1, round(self.frame.unit)))
        self.used += self.frame.size(10)
        self.words(text, 16, _MUTED, 600, 5)

    def row(self) -> float:
        """Room for one line of 18; returns its middle."""
        height = self.frame.size(27)
        self.used += height
        return self.used - height / 2

    def put(
        self, text: str, x: float, middle: float, size: float = 18, colour: Colour = _TEXT, weight: int = 400, right: bool = False
    ) -> int:
        pixels = self.frame.size(size)
        start = x - _width(text, pixels, weight) if right else x
        return _text(self.image, text, start, middle + 0.36 * pixels, pixels, colour, weight)


def _panel(frame: _Frame, report: Report, boxes: bool, outlines: bool, grades: bool, measures: bool, maps: bool, kind: str) -> _Panel:
    panel = _Panel(frame)
    _panel_head(panel, report)
    if report.frontal is not None and grades:
        _panel_frontal(panel, report.frontal)
    discs = _discs(report)
    if grades and any(f.pfirrmann or f.measurements for f in discs):
        _panel_discs(panel, discs)
    if report.findings and (boxes or outlines):
        panel.heading("Structures")
        for label, name in (("disc", "Disc"), ("vertebra", "Vertebra")):
            if report.frontal is None or label == "vertebra":  # a frontal radiograph shows no discs of their own
                _panel_structure(panel, label, name, boxes, outlines)
    if grades and any(f.pfirrmann for f in discs):
        panel.heading("Pfirrmann grade")
        _panel_scale(panel)
    if measures:
        _panel_measures(panel, report)
    if report.status != "refused":
        _panel_heat(panel, report, maps, kind)
    _panel_words(panel, report)
    panel.used += panel.margin
    return panel


def _panel_head(panel: _Panel, report: Report) -> None:
    size = panel.frame.size(26)
    panel.used += size
    _text(panel.image, "Spinebox", panel.margin, panel.used, size, _TEXT, 700)
    fill, ink = _STATUS[report.status]
    small = panel.frame.size(16)
    word = report.status.capitalize()
    wide = _width(word, small, 600) + 1.2 * small
    middle, right = panel.used - 0.36 * size, panel.width - panel.margin
    _plate(panel.image, (right - wide, middle - 0.8 * small, right, middle + 0.8 * small), fill, 0.4 * small)
    _text(panel.image, word, right - wide + 0.6 * small, middle + 0.36 * small, small, ink, 600)
    panel.used += panel.frame.size(8)
    protocol = _PROTOCOL.get(report.protocol, report.protocol)
    weighting = f", {report.weighting}-weighted" if report.weighting else ""
    panel.words(f"{protocol}{weighting}", 18, _MUTED, after=4)
    if report.error:
        panel.words(report.error.get("message", ""), 18, _STATUS["refused"][1], 600)
        panel.words(report.error.get("remedy", ""), 17, _TEXT)
        panel.words("No findings are shown; that says nothing about the spine.", 17, _MUTED)
    if report.shed:
        panel.words(f"Left out to be in time: {', '.join(_SHED.get(s, s) for s in report.shed)}; rung {report.rung}.", 17, _WARN)


def _panel_discs(panel: _Panel, discs: Sequence[Finding]) -> None:
    """A table: level, grade, how probable it is, height."""
    unit, right = panel.frame.unit, panel.width - panel.margin
    chip, probable = panel.margin + 92 * unit, panel.margin + 212 * unit
    panel.heading("Discs")
    middle: float = panel.used - panel.frame.size(16)
    graded = any(f.pfirrmann for f in discs)
    if graded:
        panel.put("grade", chip - 6 * unit, middle, 15, _MUTED)
        panel.put("probability", probable, middle, 15, _MUTED, right=True)
    if any(f.measurements for f in discs):
        panel.put("height", right, middle, 15, _MUTED, right=True)
    for finding in discs:
        middle = panel.row()
        panel.put(_name(finding), panel.margin, middle, weight=600)
        if finding.pfirrmann:
            grade = finding.pfirrmann.grade
            _draw_chip(panel.image, chip, middle, 28 * unit, grade, str(grade), panel.frame.size(16))
            if len(finding.pfirrmann.probabilities) >= grade:
                panel.put(f"{100 * finding.pfirrmann.probabilities[grade - 1]:.0f} %", probable, middle, 17, _MUTED, right=True)
        elif graded:
            panel.put("not graded", chip, middle, 16, _MUTED)
        height = next((m for m in finding.measurements if m.name == "disc_height"), None)
        if height:
            panel.put(f"{height.value:.1f} {_clean(height.unit)}", right, middle, 17, _MUTED, right=True)


def _panel_frontal(panel: _Panel, frontal: Frontal) -> None:
    """Curves with their margins, the severity, and each class as a bar."""
    unit, right = panel.frame.unit, panel.width - panel.margin
    panel.heading("Curves, Cobb angle")
    for curve in frontal.curves:
        middle = panel.row()
        panel.put(curve.region.capitalize(), panel.margin, middle, 17)
        panel.put(f"{curve.angle_deg:.0f}° ± {math.ceil(curve.margin_deg)}°", right, middle, 17, _MEASURE, 600, right=True)
        words = f"vertebrae {curve.upper} to {curve.lower}, apex {curve.apex}, convex to the {curve.convex}"
        panel.words(words, 15, _MUTED, after=3)
    if not frontal.curves:
        panel.words("No curve was measured.", 17, _TEXT, after=3)
    if frontal.severity:
        middle = panel.row()
        panel.put("Severity", panel.margin, middle, 17)
        panel.put(frontal.severity, right, middle, 17, _TEXT, 600, right=True)
    panel.heading("Class of the picture")
    for name, probability in frontal.probabilities.items():
        middle = panel.row()
        chosen = name == frontal.name
        panel.put(name.capitalize(), panel.margin, middle, 17, _TEXT if chosen else _MUTED, 600 if chosen else 400)
        x0, x1 = panel.margin + 160 * unit, right - 56 * unit
        _plate(panel.image, (x0, middle - 5 * unit, x1, middle + 5 * unit), _LINE, 5 * unit)
        if (x1 - x0) * probability >= 2:
            _plate(panel.image, (x0, middle - 5 * unit, x0 + (x1 - x0) * probability, middle + 5 * unit), _MEASURE, 5 * unit)
        panel.put(f"{100 * probability:.0f} %", right, middle, 17, _TEXT if chosen else _MUTED, right=True)


def _panel_structure(panel: _Panel, label: str, name: str, boxes: bool, outlines: bool) -> None:
    middle = panel.row()
    unit, left = panel.frame.unit, float(panel.margin)
    colour = _STRUCTURE[label]
    if outlines:
        ends = np.array([[left, middle], [left + 44 * unit, middle]])
        pieces = [ends]
        if label == "vertebra":
            pieces = [np.array([[left + a * unit, middle], [left + (a + 11) * unit, middle]]) for a in (0, 16.5, 33)]
        _lines(panel.image, pieces, False, colour, panel.frame.size(10) // 5 + 1)
    if boxes:
        x = left + (58 if outlines else 0) * unit
        _rectangle(panel.image, (x, middle - 8 * unit, x + 26 * unit, middle + 8 * unit), colour, max(1, round(unit)), 0.7)
    start = left + (58 if outlines else 0) * unit + (40 if boxes else 0) * unit
    words = " and ".join(w for w, on in (("outline", outlines), ("box", boxes)) if on)
    end = panel.put(name, start, middle, weight=500)
    panel.put(words, end + 8 * unit, middle, 16, _MUTED)


def _panel_scale(panel: _Panel) -> None:
    unit = panel.frame.unit
    middle = panel.row()
    size = panel.frame.size(16)
    start = panel.margin + panel.put("healthy", panel.margin, middle, 16, _MUTED) - panel.margin + 10 * unit
    for grade in range(1, 6):
        _draw_chip(panel.image, start + (grade - 1) * 32 * unit, middle, 28 * unit, grade, str(grade), size)
    panel.put("collapsed", start + 5 * 32 * unit + 6 * unit, middle, 16, _MUTED)


_GENANT = ("none", "mild", "moderate", "severe")


def _panel_measures(panel: _Panel, report: Report) -> None:
    """What concerns the whole column, then whatever has a grade, then what could not be measured and why."""
    lines = []
    if lordosis := _measured(report, "lumbar_lordosis"):
        lines.append(("Lordosis L1 to S1", _amount(lordosis)))
    if canal := _measured(report, "canal_diameter_narrowest"):
        level, _, missing = canal.where.partition("; ")
        lines.append((f"Narrowest canal{f', {level}' if level else ''}", _amount(canal)))
    for finding in report.findings:
        meyerding, slip, share = (_measured(finding, n) for n in ("meyerding_grade", "slip", "slip_percent"))
        if meyerding and share and meyerding.value >= 1:
            lines.append((f"{_name(finding)} slip, Meyerding {meyerding.value:.0f}", _amount(slip) if slip else _amount(share, 0)))
        genant, loss = _measured(finding, "genant_grade"), _measured(finding, "height_loss")
        if genant and loss and genant.value >= 1:
            lines.append((f"{_name(finding)} height, Genant {_GENANT[min(3, int(genant.value))]}", f"−{loss.value:.0f} %"))
    if not lines and not report.omitted:
        return
    panel.heading("Measurements")
    right = panel.width - panel.margin
    for text, amount in lines[:MOST_LABELS]:
        middle = panel.row()
        panel.put(text, panel.margin, middle, 17)
        panel.put(amount, right, middle, 17, _MEASURE, right=True)
    if canal and missing:
        panel.words(f"Canal {missing}.", 16, _MUTED, after=3)
    for text in _omissions(report.omitted)[:MOST_NOTES]:
        panel.words(text, 16, _MUTED, after=3)


def _omissions(omitted: Sequence[Omission]) -> list[str]:
    """One sentence for each reason."""
    by_reason: dict[str, list[str]] = {}
    for o in omitted:
        by_reason.setdefault(o.reason, []).append(o.name.replace("_", " "))
    return [f"Not measured: {', '.join(names)}; {reason}." for reason, names in by_reason.items()]


def _panel_heat(panel: _Panel, report: Report, maps: bool, kind: str) -> None:
    withheld = [h for h in report.heatmaps if h.values is None]
    if not maps and not withheld:
        return
    panel.heading("Heatmap")
    if maps:
        unit = panel.frame.unit
        middle = panel.row()
        first = panel.put("none", panel.margin, middle, 16, _MUTED) + 10 * unit
        last = panel.width - panel.margin - _width("most", panel.frame.size(16), 400) - 10 * unit
        x0, x1, y0, y1 = round(first), round(last), round(middle - 8 * unit), round(middle + 8 * unit)
        ramp = np.linspace(0, 255, x1 - x0).astype(np.uint8)
        entry = _heat_table()[ramp].astype(np.float32)
        share = entry[:, 3:] / 255
        colours = entry[:, :3] * share + np.asarray(_LINE, np.float32) * (1 - share)
        panel.image[y0:y1, x0:x1] = colours.astype(np.uint8)[None]
        panel.put("most", last + 10 * unit, middle, 16, _MUTED)
        panel.used += panel.frame.size(3)
        panel.words(kind, 17, _TEXT, after=3)
    for heatmap in withheld[:3]:
        panel.words(f"Withheld for {heatmap.target}: {heatmap.reason or 'no reason given'}", 16, _WARN, after=3)
    if len(withheld) > 3:
        panel.words(f"{len(withheld) - 3} more are withheld.", 16, _WARN, after=3)


def _panel_words(panel: _Panel, report: Report) -> None:
    notes = list(report.notes)
    if not notes and not report.naming:
        return
    panel.heading("Notes")
    if report.naming:
        panel.words(report.naming, 17, _TEXT)
    for note in notes[:MOST_NOTES]:
        panel.words(note, 17, _WARN)
    if len(notes) > MOST_NOTES:
        panel.words(f"{len(notes) - MOST_NOTES} more notes are in the report.", 17, _WARN)


def _provenance(instance: Instance, report: Report) -> str:
    """What computed this, short enough for one line."""
    parts = []
    digest = report.bundle.get("digest")
    if digest:
        parts.append(f"bundle {str(digest)[:12]}")
    backends = report.engine.get("backends")
    if isinstance(backends, dict) and backends:
        names = "+".join(sorted({str(v) for v in backends.values()}))
        parts.append(f"{names} {str(report.engine.get('precision', '')).upper()}".strip())
    if instance.sha256:
        parts.append(f"image {instance.sha256[:12]}")
    return _clean("  ·  ".join(parts))


def _strip(width: int, provenance: str) -> Image:
    """The disclaimer as a bar of `width` pixels, what computed the picture beside it, below it, or left out where it cannot fit."""
    size = max(10, min(30, round(width / 66)))
    while size > 8 and _width(DISCLAIMER, size, 700) > width - size:
        size -= 1
    small = max(9, round(0.8 * size))
    beside = _width(DISCLAIMER, size, 700) + _width(provenance, small, 400) + 3 * size <= width
    below = [] if beside else _wrapped(provenance, width - size, small)[:3]
    height = round(1.9 * size) + round(1.4 * small) * len(below)
    out = _filled(height, width, _STRIP)
    baseline = round(1.32 * size)
    _text(out, DISCLAIMER, size // 2, baseline, size, _STRIP_TEXT, 700)
    if beside:
        _text(out, provenance, width - size // 2 - _width(provenance, small, 400), baseline, small, _STRIP_TEXT)
    for i, line in enumerate(below):
        _text(out, line, size // 2, baseline + round(1.4 * small) * (i + 1), small, _STRIP_TEXT)
    return out


# --- The pictures ------------------------------------------------------------------------------------------------------------


def base_png(instance: Instance, max_side: int | None = None) -> bytes:
    """The source as an 8-bit grey PNG of the source's size, shrunk where its longer side exceeds `max_side` pixels.

    The window is the networks': 1st to 99.5th percentile. Nothing is burned in, so that report coordinates are picture
    coordinates: it is the layer under the page, which shows the disclaimer itself; the PNG's text carries it too.
    Raises UsageError where `max_side` is below 1.
    """
    if max_side is not None and max_side < 1:
        raise UsageError("max_side must be at least 1 pixel", value=max_side)
    grey = _grey(instance)
    rows, columns = grey.shape
    if max_side is not None and max(rows, columns) > max_side:
        factor = max_side / max(rows, columns)
        grey = _resized(grey, max(1, round(columns * factor)), max(1, round(rows * factor)))
    return _png.encode(grey, text=_TEXT_CHUNK)


def overlay_png(
    instance: Instance,
    report: Report,
    *,
    boxes: bool = True,
    outlines: bool = True,
    grades: bool = True,
    measures: bool = True,
    heatmap: float = 0.45,
    max_side: int | None = None,
) -> bytes:
    """The reading as one colour PNG: image with its findings, a panel of keys and words, the disclaimer below.

    The image is shown in its physical aspect, its longer side 1000 to 1760 pixels; the whole is at most 2400 pixels, or
    `max_side` where that is less. `grades` switches all words beside the column, `measures` the
    lines and words of measurements; `heatmap` in [0, 1] is its opacity, 0
    leaves it out. Shown are the exact maps of all discs together, or the segmenter's evidence where there are none.
    Raises UsageError for a `heatmap` outside [0, 1], a `max_side` below 256, and arrays of another size than the image.
    """
    if not 0.0 <= heatmap <= 1.0:
        raise UsageError("the heatmap's opacity must lie in [0, 1]", value=heatmap)
    if max_side is not None and max_side < SMALLEST_OVERLAY:
        raise UsageError(f"max_side must be at least {SMALLEST_OVERLAY} pixels, or the disclaimer cannot be read", value=max_side)
    frame = _frame(instance)
    outlines = outlines and any(f.outline_px for f in report.findings)
    maps, kind = _shown_evidence(report) if heatmap > 0 else ([], "")
    for array in (*maps, report.mask.values if report.mask else None):
        if array is not None and array.shape != instance.pixels.shape:
            raise UsageError("the report is about an image of another size", value=f"{array.shape} against {instance.pixels.shape}")
    evidence = _combined(maps) if maps else None
    if evidence is not None:
        evidence = np.asarray(cv2.resize(evidence, (frame.width, frame.height), interpolation=cv2.INTER_LINEAR), np.uint8)
    image = _blended(_resized(_grey(instance), frame.width, frame.height), evidence, heatmap)
    _draw_structures(image, frame, report, boxes, outlines)

    labels = _labels(frame, report) if grades else []
    extra, edge = _label_room(frame, report, labels)
    panel = _panel(frame, report, boxes, outlines, grades, measures, bool(maps), kind)
    left = extra if labels and labels[0].anterior_left else 0
    height = max(frame.height, min(panel.used, panel.image.shape[0]))
    canvas: Image = np.zeros((height, frame.width + extra + panel.width, 3), np.uint8)
    top = (height - frame.height) // 2
    canvas[top : top + frame.height, left : left + frame.width] = image
    # A band of the canvas as high as the image: labels may use what the image grew by, not what lies above or below it.
    band = canvas[top : top + frame.height, : frame.width + extra]
    if measures:
        _draw_measures(band, frame, report, left)
    if labels:
        _draw_vertebra_names(band, frame, report, left)
        _draw_labels(band, frame, labels, edge, left)
    canvas[:, frame.width + extra :] = panel.image[:height]
    return _png.encode(_finished(canvas, _provenance(instance, report), min(MOST_SIDE, max_side or MOST_SIDE)), text=_TEXT_CHUNK)


def _finished(canvas: Image, provenance: str, most: int) -> Image:
    """Shrunk so that it fits with its strip, which is drawn at its final size and so stays legible."""
    height, width = canvas.shape[:2]
    fit = min(1.0, most / width, most / height)
    for _ in range(16):
        strip = _strip(max(1, round(width * fit)), provenance)
        if round(height * fit) + strip.shape[0] <= most:
            break
        fit *= 0.999 * (most - strip.shape[0]) / round(height * fit)
    shrunk = _resized(canvas, strip.shape[1], max(1, round(height * fit)))
    return np.concatenate([shrunk, strip])[:most]


def heatmap_png(report: Report, index: int) -> bytes:
    """One map of `report.heatmaps` as a PNG of the source's size: colour and alpha by value, from a palette; zero is transparent.

    Raises UsageError for an index that is not there and for a withheld map; the message says why it is withheld.
    """
    if not 0 <= index < len(report.heatmaps):
        raise UsageError(f"there is no heatmap {index}; the report has {len(report.heatmaps)}", value=index)
    heatmap = report.heatmaps[index]
    if heatmap.values is None:
        raise UsageError(f"the heatmap for {heatmap.target} is withheld: {heatmap.reason or 'no reason given'}", value=index)
    return _png.encode(_levels(heatmap.values), _heat_table(), _TEXT_CHUNK)


def labels_png(report: Report) -> bytes:
    """The mask as a one-channel 8-bit PNG of the source's size: 0 background, 1 vertebra, 2 disc, 3 canal.

    Grey and not palette, so that every reader gives these values; it looks black. Raises UsageError where masks were shed.
    """
    if report.mask is None:
        raise UsageError("there are no labels: the masks were shed", value=report.rung, remedy="Send the image again with more time.")
    classes = ", ".join(f"{i} {name}" for i, name in enumerate(report.mask.classes))
    return _png.encode(np.ascontiguousarray(report.mask.values), text=("Comment", f"{DISCLAIMER} Values: {classes}."))
