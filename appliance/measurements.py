"""Lengths, angles and grades of a lumbar column seen from the side, from its separate discs and bodies and the canal.

Hides which end plate belongs to which measurement, which side is the front, and when geometry does not allow an answer: then
the measurement is omitted with the reason, never guessed. docs/measurements.md defines each and states its error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from appliance.report import Line, Measurement, Omission
from kernels import mask as km
from kernels.corners import Field, Plate, Quad, Shape, Vector, quads
from kernels.measure import Chord, Size, canal_chords, disc_size, gaps, genant, heights, meyerding, opening_deg, slip

# Millimetres of a detector or of a film are magnified by an unknown factor.
IN_PATIENT = (None, "patient", "calibrated")
PIXEL_NOTE = "The image states no pixel spacing: lengths are in pixels, and angles take the pixels as square."
# About 3 mm, the least that is commonly called a slip; docs/measurements.md has the repeatability that it must exceed.
SLIP_FLOOR = 0.08
LEAST_VOTES = 0.75  # of the structures must see the canal on the same side
REACH = 2.0  # depths behind a structure, within which its canal lies
# What a vertebral body of the lumbar and lower thoracic spine cannot look like: height over depth, degrees between its end
# plates, longer over shorter of them, distance of its edge from straight sides over its depth.
BODY_RATIO, BODY_WEDGE_DEG, BODY_TAPER, BODY_RESIDUAL = (0.2, 1.25), 35.0, 1.2, 0.045
DISC_RATIO, DISC_RESIDUAL = 0.8, 0.05

Key = tuple[Literal["disc", "vertebra"], int]


@dataclass(frozen=True)
class Part:
    """One disc or one body. `key` is how the caller knows it; `level` as in a Finding; `region` on the working pixels."""

    key: Key
    level: str | None
    region: km.Component


@dataclass
class Measured:
    """What could be measured of one structure, or of the column, and what not."""

    measurements: list[Measurement] = field(default_factory=list)
    omitted: list[Omission] = field(default_factory=list)

    def omit(self, names: Sequence[str], reason: str) -> None:
        self.omitted += [Omission(name, reason) for name in names]


@dataclass(frozen=True)
class Scale:
    """From millimetres (or what stands for them) on the working pixels to units, and to source pixels for drawing.

    `spacing` is (row, column) of a working pixel. `unit` is "mm", "px", or None where a length has no meaning because pixels are
    not square and their size in the patient is unknown.
    """

    spacing: tuple[float, float]
    source: tuple[float, float]
    unit: str | None
    per_unit: float

    @classmethod
    def of(cls, scale: float, spacing_mm: tuple[float, float] | None, kind: str | None) -> Scale:
        row, column = spacing_mm or (1.0, 1.0)
        working = (row / scale, column / scale)
        if spacing_mm is None:
            return cls(working, (row, column), "px", 1.0)
        if kind in IN_PATIENT:
            return cls(working, (row, column), "mm", 1.0)
        square = abs(row / column - 1) < 1e-3
        return cls(working, (row, column), "px" if square else None, column)

    def line(self, a: Vector, b: Vector) -> Line:
        (ax, ay), (bx, by) = ((float(p[0]) / self.source[1], float(p[1]) / self.source[0]) for p in (a, b))
        return (ax, ay), (bx, by)

    def plate(self, plate: Plate) -> Line:
        return self.line(plate.front, plate.back)

    def length(self, out: Measured, name: str, value: float, lines: tuple[Line, ...] = (), where: str = "", power: int = 1) -> None:
        if self.unit is None:
            out.omit([name], "the spacing is that of the detector or of a film and the pixels are not square, so no length can be told")
            return
        unit = self.unit + ("2" if power == 2 else "")
        out.measurements.append(Measurement(name, value / self.per_unit**power, unit, lines, where))


DISC_GAPS = ("disc_height_anterior", "disc_height_middle", "disc_height_posterior")
BODY_HEIGHTS = ("vertebral_height_anterior", "vertebral_height_middle", "vertebral_height_posterior")
BODY_RATIOS = ("vertebral_height_ratio_anterior", "vertebral_height_ratio_middle")
BODY_REST = ("vertebral_height_ratio_posterior", "wedge_angle", "height_loss", "genant_grade")
SLIPS = ("slip", "slip_percent", "meyerding_grade")
OF_DISC = (
    "disc_height",
    "disc_depth",
    "disc_area",
    "disc_height_index",
    *DISC_GAPS,
    "disc_angle",
    "segment_angle",
    *SLIPS,
    "canal_diameter",
)
OF_BODY = (*BODY_HEIGHTS, *BODY_RATIOS, *BODY_REST)
LUMBAR = ("L5/S1", "L4/L5", "L3/L4", "L2/L3", "L1/L2")
CUT_OFF = "it is cut off by the edge of the image"
ODD_PIXELS = f"a pixel is more than {km.MAX_ASPECT:g} times as long as wide, so its spacing cannot be true"
NO_FRONT = "the canal is not seen on one side of the column, so front and back cannot be told"


@dataclass
class _Node:
    """One structure on its way: its place in the column and its end plates, or why it has none."""

    part: Part
    centre: Vector
    up: Vector
    quad: Quad | None = None
    problem: str = ""

    @property
    def is_disc(self) -> bool:
        return self.part.key[0] == "disc"


def measure(
    parts: Sequence[Part],
    canal: NDArray[np.bool_],
    scale: float,
    spacing_mm: tuple[float, float] | None,
    spacing_kind: str | None,
) -> tuple[dict[Key, Measured], Measured]:
    """Measurements of each part by its key, and of the whole column.

    `parts` are discs and bodies of one column in any order, their regions and `canal` H x W on working pixels, `scale` of which
    are one source pixel; `spacing_mm` (row, column) and `spacing_kind` are the source's, as in `appliance.study.Instance`.
    """
    sizes = Scale.of(scale, spacing_mm, spacing_kind)
    if max(sizes.spacing) > km.MAX_ASPECT * min(sizes.spacing):
        return _nothing(parts, ODD_PIXELS)
    nodes = _ordered(parts, sizes.spacing)
    canal_field = Field(canal, sizes.spacing)
    side = _side_of_canal(nodes, canal_field)
    _find_plates(nodes, sizes.spacing, side, canal.shape)
    out = {node.part.key: Measured() for node in nodes}
    whole = Measured()
    discs, bodies = [n for n in nodes if n.is_disc], [n for n in nodes if not n.is_disc]
    for node in bodies:
        _measure_body(out[node.part.key], node, _beside(node, bodies), sizes, side)
    narrowest: tuple[Chord, str] | None = None
    missing = []
    chords = _canal_chords(discs, canal_field) if side else {}
    for node in discs:
        above, below = _neighbours(node, bodies)
        found = out[node.part.key]
        _measure_disc(found, node, above, below, sizes, side)
        chord = chords.get(node.part.key)
        _measure_canal(found, node, chord, sizes, side)
        level = node.part.level or ""
        # Above the lumbar discs a slice often leaves the canal.
        if chord is None and level in LUMBAR:
            missing.append(level)
        if chord and (not level or level in LUMBAR) and (narrowest is None or chord.length < narrowest[0].length):
            narrowest = chord, level
    _measure_column(whole, discs, bodies, sizes, side)
    if narrowest:
        chord, level = narrowest
        # A stenosis that closes the outline is not measured, and must not pass for a wide canal.
        level += f"; not measured at {', '.join(missing)}" if missing else ""
        sizes.length(whole, "canal_diameter_narrowest", chord.length, (sizes.line(chord.front, chord.back),), level)
    else:
        whole.omit(["canal_diameter_narrowest"], "the canal was not measured at any lumbar disc")
    return out, whole


def not_outlined(label: Literal["disc", "vertebra"]) -> Measured:
    """What is said of a structure that was found but has no region of its own."""
    out = Measured()
    out.omit(OF_DISC if label == "disc" else OF_BODY, "it was not outlined")
    return out


def _nothing(parts: Sequence[Part], reason: str) -> tuple[dict[Key, Measured], Measured]:
    """Every measurement omitted for one reason."""
    out = {part.key: Measured() for part in parts}
    for part in parts:
        out[part.key].omit(OF_DISC if part.key[0] == "disc" else OF_BODY, reason)
    whole = Measured()
    whole.omit(["lumbar_lordosis", "canal_diameter_narrowest"], reason)
    return out, whole


# -- the column -----------------------------------------------------------------------------------------------------


def _ordered(parts: Sequence[Part], spacing: tuple[float, float]) -> list[_Node]:
    """From the lowest upwards, each with the direction of the column where it stands."""
    per = np.array([spacing[1], spacing[0]])
    centres = [np.asarray(p.region.centre, np.float64) * per for p in parts]
    order = sorted(range(len(parts)), key=lambda i: -centres[i][1])
    nodes = []
    for place, i in enumerate(order):
        low, high = order[max(place - 1, 0)], order[min(place + 1, len(order) - 1)]
        run = centres[high] - centres[low]
        up = run / np.hypot(*run) if run.any() else np.array([0.0, -1.0])
        nodes.append(_Node(parts[i], centres[i], up))
    return nodes


def _side_of_canal(nodes: Sequence[_Node], canal: Field) -> int:
    """1 where the canal lies to the right of the column seen with its head up, -1 to the left, 0 where that cannot be told."""
    if canal.count < 8 or not nodes:
        return 0
    centres, ups = np.stack([n.centre for n in nodes]), np.stack([n.up for n in nodes])
    boxes = np.array([n.part.region.box for n in nodes])
    sides = (boxes[:, 2:] - boxes[:, :2]) * [canal.spacing[1], canal.spacing[0]]
    # Every structure is asked at as many places, as far as it is deep.
    share = np.linspace(0, REACH, 96)[:, None] * sides.max(1)
    right = np.stack([-ups[:, 1], ups[:, 0]], 1)
    seen = [(canal.at(centres + way * share[:, :, None] * right) >= 0.5).sum(0) for way in (1, -1)]
    votes = [1 if r > other else -1 for r, other in zip(*seen, strict=True) if r != other]
    if not votes or abs(sum(votes)) < (2 * LEAST_VOTES - 1) * len(votes):
        return 0
    return 1 if sum(votes) > 0 else -1


def _find_plates(nodes: Sequence[_Node], spacing: tuple[float, float], side: int, shape: tuple[int, ...]) -> None:
    whole = []
    for node in nodes:
        x0, y0, x1, y1 = node.part.region.box
        if x0 <= 0 or y0 <= 0 or x1 >= shape[1] or y1 >= shape[0]:
            node.problem = CUT_OFF
        else:
            whole.append(node)
    for node, found in zip(whole, quads([_shape(node, side) for node in whole], spacing), strict=True):
        node.problem = _disc_problem(found) if node.is_disc else _body_problem(found, node.up)
        if not node.problem:
            node.quad = found


def _shape(node: _Node, side: int) -> Shape:
    right = np.array([-node.up[1], node.up[0]])
    region = node.part.region
    return Shape(region.pixels, node.up, right if side >= 0 else -right, not node.is_disc, region.window)


def _disc_problem(found: Quad | None) -> str:
    """Why these are not the borders of a disc; nothing where they are."""
    if found is None or found.residual > DISC_RESIDUAL * found.upper.length or found.height > DISC_RATIO * found.upper.length:
        return "its outline does not have the two borders of a disc"
    return ""


def _body_problem(found: Quad | None, up: Vector) -> str:
    """Why these are not the end plates of a vertebral body; nothing where they are."""
    if found is None or found.residual > BODY_RESIDUAL * found.upper.length:
        return "its outline does not have the straight sides of a vertebral body"
    longer, shorter = max(found.upper.length, found.lower.length), min(found.upper.length, found.lower.length)
    ratio = found.height / longer
    if not BODY_RATIO[0] <= ratio <= BODY_RATIO[1]:
        return f"its height is {ratio:.2f} of its depth, which no single vertebral body has"
    taper = longer / shorter
    if taper > BODY_TAPER:
        return f"one of its end plates is {taper:.2f} times as long as the other, so a pedicle or a neighbour is part of it"
    if abs(opening_deg(found.upper, found.lower, up)) > BODY_WEDGE_DEG:
        return f"its end plates open by more than {BODY_WEDGE_DEG:.0f} degrees, so one of them is not an end plate"
    return ""


def _beside(node: _Node, bodies: Sequence[_Node]) -> list[_Node]:
    """The bodies next above and next below, where their end plates were found and no body is missing in between."""
    place = next(i for i, b in enumerate(bodies) if b is node)
    out = []
    for i in (place - 1, place + 1):
        if 0 <= i < len(bodies) and node.quad and (quad := bodies[i].quad):
            apart = float(np.hypot(*(bodies[i].centre - node.centre)))
            if apart < 1.1 * (quad.height + node.quad.height):
                out.append(bodies[i])
    return out


def _neighbours(disc: _Node, bodies: Sequence[_Node]) -> tuple[_Node | None, _Node | None]:
    """The body above a disc and the one below it: the nearest on its side, if it is not further off than a body's height."""
    out: list[_Node | None] = []
    for sign in (1, -1):
        on_side = [b for b in bodies if sign * float((b.centre - disc.centre) @ disc.up) > 0]
        nearest = min(on_side, key=lambda b: float(np.hypot(*(b.centre - disc.centre))), default=None)
        if nearest is not None:
            rows = (nearest.part.region.box[3] - nearest.part.region.box[1], disc.part.region.box[3] - disc.part.region.box[1])
            columns = nearest.part.region.box[2] - nearest.part.region.box[0]
            off = np.abs(np.asarray(nearest.part.region.centre) - np.asarray(disc.part.region.centre))
            if off[1] > 0.8 * (rows[0] + rows[1]) or off[0] > 1.5 * columns:
                nearest = None
        out.append(nearest)
    return out[0], out[1]


# -- one structure --------------------------------------------------------------------------------------------------


def _measure_body(out: Measured, node: _Node, beside: Sequence[_Node], sizes: Scale, side: int) -> None:
    quad = node.quad
    if quad is None:
        out.omit(OF_BODY, node.problem)
        return
    front, middle, back = heights(quad.upper, quad.lower)
    lines = [
        sizes.line(a, b)
        for a, b in (
            (quad.upper.front, quad.lower.front),
            (quad.upper.middle, quad.lower.middle),
            (quad.upper.back, quad.lower.back),
        )
    ]
    if not side:
        sizes.length(out, BODY_HEIGHTS[1], middle, (lines[1],))
        out.omit([BODY_HEIGHTS[0], BODY_HEIGHTS[2], *BODY_RATIOS, *BODY_REST], NO_FRONT)
        return
    for name, value, line in zip(BODY_HEIGHTS, (front, middle, back), lines, strict=True):
        sizes.length(out, name, value, (line,))
    ratios = {"anterior": front / back, "middle": middle / back}
    backs = [heights(b.quad.upper, b.quad.lower)[2] for b in beside if b.quad]
    if backs:
        ratios["posterior"] = back / float(np.mean(backs))
    for name, ratio in ratios.items():
        out.measurements.append(Measurement(f"vertebral_height_ratio_{name}", ratio, "ratio"))
    if not backs:
        out.omit(["vertebral_height_ratio_posterior"], "no vertebra next to it was measured")
    plates = (sizes.plate(quad.upper), sizes.plate(quad.lower))
    out.measurements.append(Measurement("wedge_angle", opening_deg(quad.upper, quad.lower, node.up), "deg", plates))
    worst = min(ratios, key=lambda name: ratios[name])
    loss = max(0.0, 1 - ratios[worst])
    reference = "the posterior height of the vertebrae next to it" if worst == "posterior" else "its own posterior height"
    where = f"{worst} height against {reference}" if loss else ""
    out.measurements.append(Measurement("height_loss", 100 * loss, "%", where=where))
    out.measurements.append(Measurement("genant_grade", float(genant(loss)), "grade", where=where))


def _size_of(out: Measured, node: _Node, sizes: Scale) -> Size:
    region = node.part.region
    size = disc_size(region.pixels[region.window], sizes.spacing)
    sizes.length(out, "disc_height", size.height)
    sizes.length(out, "disc_depth", size.depth)
    sizes.length(out, "disc_area", size.area, power=2)
    return size


def _lower_plate(disc: _Node, below: _Node | None) -> tuple[Plate | None, str]:
    """The end plate under a disc, or why there is none. The sacrum is not segmented: its end plate is the lower border of L5/S1."""
    if disc.part.level == "L5/S1":
        return (disc.quad.lower, "") if disc.quad else (None, f"of the disc: {disc.problem}")
    if below is None:
        return None, "the vertebra below was not outlined"
    return (below.quad.upper, "") if below.quad else (None, f"of the vertebra below: {below.problem}")


def _measure_disc(out: Measured, node: _Node, above: _Node | None, below: _Node | None, sizes: Scale, side: int) -> None:
    if node.problem == CUT_OFF:
        out.omit([name for name in OF_DISC if name != "canal_diameter"], CUT_OFF)
        return
    size = _size_of(out, node, sizes)
    sacral = node.part.level == "L5/S1"
    bodies = [b.quad for b in (above, None if sacral else below) if b and b.quad]
    if bodies and size.height > 0:
        vertebral = float(np.mean([heights(q.upper, q.lower) for q in bodies]))
        where = "" if len(bodies) == 2 else "against one vertebra, the other is not measured"
        out.measurements.append(Measurement("disc_height_index", size.height / vertebral, "ratio", where=where))
    else:
        out.omit(["disc_height_index"], "no vertebra next to it was measured")
    top = above.quad.lower if above and above.quad else None
    problem = "the vertebra above was not outlined" if above is None else f"of the vertebra above: {above.problem}" if not top else ""
    bottom, below_problem = _lower_plate(node, below)
    problem = problem or below_problem
    if top is None or bottom is None:
        out.omit([*DISC_GAPS, "disc_angle", "segment_angle", *SLIPS], problem)
        return
    front, middle, back = gaps(top, bottom)
    ends = ((top.front, bottom.front), (top.middle, bottom.middle), (top.back, bottom.back))
    if not side:
        sizes.length(out, DISC_GAPS[1], middle, (sizes.line(*ends[1]),))
        out.omit([DISC_GAPS[0], DISC_GAPS[2], "disc_angle", "segment_angle", *SLIPS], NO_FRONT)
        return
    for name, value, (a, b) in zip(DISC_GAPS, (front, middle, back), ends, strict=True):
        sizes.length(out, name, value, (sizes.line(a, b),))
    plates = (sizes.plate(top), sizes.plate(bottom))
    out.measurements.append(Measurement("disc_angle", opening_deg(top, bottom, node.up), "deg", plates))
    upper = above.quad.upper if above and above.quad else top
    lower = bottom if sacral else below.quad.lower if below and below.quad else bottom
    where = "to the upper end plate of S1" if sacral else ""
    outer = (sizes.plate(upper), sizes.plate(lower))
    out.measurements.append(Measurement("segment_angle", opening_deg(upper, lower, node.up), "deg", outer, where))
    if sacral:
        out.omit(SLIPS, "S1 is not segmented, so its posterior corner is not known")
    else:
        _measure_slip(out, top, bottom, sizes)


def _measure_slip(out: Measured, top: Plate, bottom: Plate, sizes: Scale) -> None:
    moved = slip(top, bottom)
    share = moved / bottom.length
    grade = meyerding(share, SLIP_FLOOR)
    foot = bottom.back - moved * bottom.direction
    lines = (sizes.line(bottom.back, foot), sizes.line(foot, top.back))
    sizes.length(out, "slip", moved, lines)
    out.measurements.append(Measurement("slip_percent", 100 * share, "%", lines))
    word = ("anterolisthesis" if moved > 0 else "retrolisthesis") if grade else f"below {100 * SLIP_FLOOR:.0f} %, which counts as none"
    out.measurements.append(Measurement("meyerding_grade", float(grade), "grade", where=word))


def _canal_chords(discs: Sequence[_Node], canal: Field) -> dict[Key, Chord | None]:
    """The canal's least diameter at each disc whose borders were found."""
    seen = [(node.part.key, node.quad.upper, node.quad.lower, node.quad.height) for node in discs if node.quad]
    if not seen:
        return {}
    keys, upper, lower, heights_mm = zip(*seen, strict=True)
    along = np.array([a.direction + b.direction for a, b in zip(upper, lower, strict=True)])
    back = along / np.hypot(along[:, 0], along[:, 1])[:, None]
    at = np.array([(a.back + b.back) / 2 for a, b in zip(upper, lower, strict=True)])
    depth = np.array([(a.length + b.length) / 2 for a, b in zip(upper, lower, strict=True)])
    return dict(zip(keys, canal_chords(canal, at, back, np.array(heights_mm), depth), strict=True))


def _measure_canal(out: Measured, node: _Node, chord: Chord | None, sizes: Scale, side: int) -> None:
    if not side:
        out.omit(["canal_diameter"], NO_FRONT)
    elif node.quad is None:
        out.omit(["canal_diameter"], f"of the disc: {node.problem}")
    elif chord is None:
        out.omit(["canal_diameter"], "the canal is not seen along the whole height of this disc")
    else:
        sizes.length(out, "canal_diameter", chord.length, (sizes.line(chord.front, chord.back),))


# -- the whole ------------------------------------------------------------------------------------------------------


def _measure_column(out: Measured, discs: Sequence[_Node], bodies: Sequence[_Node], sizes: Scale, side: int) -> None:
    first = next((b for b in bodies if b.part.level == "L1"), None)
    sacral = next((d for d in discs if d.part.level == "L5/S1"), None)
    name = ["lumbar_lordosis"]
    if sacral is None:
        out.omit(name, "the upper end plate of S1 is not known: no disc is named L5/S1")
    elif first is None:
        out.omit(name, "no vertebra is named L1")
    elif not side:
        out.omit(name, NO_FRONT)
    elif sacral.quad is None:
        out.omit(name, f"of the disc L5/S1: {sacral.problem}")
    elif first.quad is None:
        out.omit(name, f"of L1: {first.problem}")
    else:
        above, below = first.quad.upper, sacral.quad.lower
        lines = (sizes.plate(above), sizes.plate(below))
        out.measurements.append(
            Measurement(name[0], opening_deg(above, below, np.array([0.0, -1.0])), "deg", lines, "upper end plates of L1 and S1")
        )
