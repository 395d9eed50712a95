"""What the discs of a T2 slice look like, in numbers: brightness against fluid and marrow, heights, the side of the canal.

Hides the frame that each disc is measured in (its own long axis, the canal behind it) and where around it is sampled. Every
number is a ratio, so neither the scanner's units nor the pixel spacing has a part in it. NaN says that it could not be measured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from kernels import mask as km
from kernels import rank
from kernels.nms import iou_matrix

Box = tuple[float, float, float, float]
Floats = NDArray[np.float64]

# Pictures exported from a workstation are windowed until 5 to 8 % of their pixels are white, a scanner's object is not. Both are
# cut at the same share, so that fluid is as bright in one as in the other.
WINDOW = (1.0, 95.0)
LEAST_OVERLAP = 0.15  # of a box and the region that is taken for its disc
LEAST_PIXELS = 12
LOOSE = (1.2, 1.6)  # a drawn box over the extents of the region in it, median of the training slices
BINS = 9  # along a disc
FLUID = 85.0  # percentile of the canal: nerve roots are darker than the fluid
FLOOR = 0.05  # of the window; what is darker is no reference

# Names of the numbers by what they are about. Lengths are shares of the disc's depth (front to back); brightness is that of the
# window (black 0, white 1) over the fluid's ("_fluid") or over that of the marrow above and below ("_marrow").
GROUPS: dict[str, tuple[str, ...]] = {
    "brightness": (
        "median_fluid", "median_marrow", "bright_fluid", "dark_fluid", "nucleus_fluid", "nucleus_marrow", "nucleus_bright_fluid",
        "nucleus_bright_marrow", "front_fluid", "back_fluid", "contrast_fluid", "contrast_marrow", "contrast_annulus", "cleft_fluid",
        "uneven_fluid", "steep_fluid", "centre", "width", "fluid_marrow",
    ),
    "height": (
        "height", "height_front", "height_middle", "height_back", "height_least", "height_gap", "lens", "depth_column", "box_ratio",
        "incline_deg",
    ),
    "canal": (
        "canal_width", "canal_narrowing", "canal_signal", "canal_indent", "canal_gap", "behind_fluid", "behind_dark_fluid",
        "behind_bright_fluid", "bulge_back", "bulge_front", "step_back", "step_front",
    ),
    "end plates": ("plate_above_fluid", "plate_below_fluid", "plate_change_fluid", "marrow_step_fluid"),
    "column": tuple(
        f"{name}_{how}"
        for name in ("median_fluid", "nucleus_marrow", "contrast_fluid", "height_back", "height_gap")
        for how in ("share", "mean", "above", "below", "rank")
    ),
}  # fmt: skip
NAMES: tuple[str, ...] = tuple(name for names in GROUPS.values() for name in names)
_PLACE = {name: i for i, name in enumerate(NAMES)}


@dataclass(frozen=True)
class Scene:
    """One slice on its working pixels: H x W in [-1, 1], its index mask, and the separate discs and bodies of that mask."""

    normalised: NDArray[np.float32]
    mask: NDArray[np.uint8]
    discs: Sequence[km.Component]
    bodies: Sequence[km.Component]

    @classmethod
    def of(cls, normalised: NDArray[np.float32], mask: NDArray[np.uint8]) -> Scene:
        found = km.discs(mask)
        return cls(normalised, mask, found, km.bodies(mask, found))


@dataclass(frozen=True)
class _Frame:
    """A disc's own axes: `u` to the back, `v` upwards, from the middle of its depth. Pixels; `mid` and `tall` by bins along u."""

    centre: Floats
    u: Floats
    v: Floats
    depth: float
    height: float
    at: Floats
    mid: Floats
    tall: Floats


class _Frames:
    """The frames of N discs beside each other, so that a zone of all of them is sampled at once: points are x and y, each
    N x rows x columns in pixels."""

    def __init__(self, frames: Sequence[_Frame]) -> None:
        self._frames = frames
        self.depth, self.height = (np.array([getattr(f, name) for f in frames]) for name in ("depth", "height"))
        self._axes = [[np.array([getattr(f, name)[k] for f in frames])[:, None, None] for name in ("centre", "u", "v")] for k in (0, 1)]

    def zone(self, along: Floats, across: Floats) -> tuple[Floats, Floats]:
        """A rectangle at each disc: N x columns `along` u and N x rows `across` v, in pixels."""
        return self._points(along[:, None, :], across[:, :, None])

    def inside(self, along: Floats, across: Floats) -> tuple[Floats, Floats]:
        """Within the discs: `along` in half depths, `across` in half heights of the place, about a disc's middle line."""
        t = along * self.depth[:, None] / 2
        middle = np.stack([np.interp(at, f.at, f.mid) for at, f in zip(t, self._frames, strict=True)])
        half = np.stack([np.interp(at, f.at, np.maximum(f.tall, 1.0)) / 2 for at, f in zip(t, self._frames, strict=True)])
        return self._points(t[:, None, :], middle[:, None, :] + across[:, None] * half[:, None, :])

    def _points(self, along: Floats, across: Floats) -> tuple[Floats, Floats]:
        x, y = (centre + along * u + across * v for centre, u, v in self._axes)
        return x, y


def describe(scene: Scene, boxes: Sequence[Box], places: Sequence[int]) -> Floats:
    """N discs x len(NAMES) float64, NaN where something was not seen.

    `boxes` (x0, y0, x1, y1) are in the scene's pixels; `places` count the column from below, so that discs are neighbours where
    their places differ by one. A disc that has no region of its own is measured within its box, as an ellipse.
    """
    out = np.full((len(boxes), len(NAMES)), np.nan)
    if not len(boxes):
        return out
    image = window(scene.normalised)
    canal = _Canal(image, scene.mask == km.CANAL)
    points = [_points(box, region, scene.mask.shape) for box, region in zip(boxes, _regions(boxes, scene.discs), strict=True)]
    side = canal.side([p.mean(axis=0) for p in points])
    frames = [_frame(p, side or 1) for p in points]
    around = [canal.behind(frame) for frame in frames]
    together = _Frames(frames)
    zones = _zones(image, together)
    for i, (row, frame, box, behind) in enumerate(zip(out, frames, boxes, around, strict=True)):
        _brightness(row, zones.of(i), behind.fluid)
        _heights(row, frame, box)
    if side:
        reach = _reach(scene, together)
        for i, (row, frame, behind) in enumerate(zip(out, frames, around, strict=True)):
            _back(row, zones.of(i), frame, behind)
            _borders(row, frame, {name: tuple(float(v) for v in values[:, i]) for name, values in reach.items()})
    else:  # nothing tells front from back
        out[:, [_PLACE[n] for n in ("front_fluid", "back_fluid", "height_front", "height_back", "centre", "incline_deg")]] = np.nan
    _column(out, frames, places)
    return out


def window(normalised: NDArray[np.float32]) -> NDArray[np.float32]:
    """H x W in [-1, 1] -> [0, 1], cut at the percentiles WINDOW of the pixels above the minimum."""
    sample = normalised[::2, ::2]
    sample = sample[sample > normalised.min()]
    if sample.size < 16:
        sample = normalised.ravel()
    low, high = rank.percentiles(sample, WINDOW)
    out = np.asarray(normalised - low, np.float32)
    out /= max(high - low, 1e-6)
    return np.asarray(np.clip(out, 0.0, 1.0, out=out), np.float32)


def _sample(image: NDArray[np.float32], x: Floats, y: Floats) -> NDArray[np.float32]:
    """Bilinear values at points ... x columns (in pixel edges), NaN outside the image."""
    across, down = (v.reshape(-1, v.shape[-1]).astype(np.float32) - np.float32(0.5) for v in (x, y))
    found = cv2.remap(image, across, down, cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT, borderValue=float("nan"))
    return np.asarray(found, np.float32).reshape(x.shape)


def _mean(values: NDArray[np.floating]) -> float:
    seen = values[np.isfinite(values)]
    return float(seen.mean()) if seen.size else float("nan")


def _means(values: NDArray[np.floating]) -> Floats:
    """Mean of each column over what is seen of it; NaN where nothing is."""
    seen = np.isfinite(values)
    count = seen.sum(axis=0)
    return np.asarray(np.where(count > 0, np.where(seen, values, 0.0).sum(axis=0) / np.maximum(count, 1), np.nan), np.float64)


def _median(values: NDArray[np.floating]) -> float:
    seen = values[np.isfinite(values)]
    return rank.median(seen) if seen.size else float("nan")


def _middle(a: float, b: float) -> float:
    """Mean of what is known of two numbers."""
    return b if math.isnan(a) else a if math.isnan(b) else (a + b) / 2


# -- frames ---------------------------------------------------------------------------------------------------------


def _regions(boxes: Sequence[Box], discs: Sequence[km.Component]) -> list[km.Component | None]:
    """The region of each box: greatest overlap first, each region once."""
    out: list[km.Component | None] = [None] * len(boxes)
    if not discs or not boxes:
        return out
    overlaps = iou_matrix(np.array(boxes, np.float32), np.array([c.box for c in discs], np.float32))
    free = set(range(len(discs)))
    for flat in np.argsort(-overlaps, axis=None, kind="stable"):
        i, j = divmod(int(flat), len(discs))
        if overlaps[i, j] < LEAST_OVERLAP:
            break
        if out[i] is None and j in free and discs[j].area >= LEAST_PIXELS:
            out[i] = discs[j]
            free.remove(j)
    return out


def _points(box: Box, region: km.Component | None, shape: tuple[int, ...]) -> Floats:
    """Pixel centres of a disc, N x 2 (x, y); within its box, where there is no region."""
    if region is not None:
        x0, y0, x1, y1 = (int(v) for v in region.box)
        ys, xs = np.nonzero(region.pixels[y0:y1, x0:x1])
        return np.asarray(np.stack([xs + x0, ys + y0], 1) + 0.5, np.float64)
    cx, cy = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    half_w, half_h = max((box[2] - box[0]) / 2 / LOOSE[0], 2.0), max((box[3] - box[1]) / 2 / LOOSE[1], 1.0)
    # No more cells than the image has: a box may be as large as somebody says.
    steps = [np.linspace(-1, 1, int(np.clip(2 * half, 5, 256))) for half in (half_w, half_h)]
    x, y = np.meshgrid(*steps)
    inside = x**2 + y**2 <= 1
    points = np.stack([cx + x[inside] * half_w, cy + y[inside] * half_h], 1)
    return np.asarray(np.clip(points, 0.5, [shape[1] - 0.5, shape[0] - 0.5]), np.float64)


def _frame(points: Floats, side: int) -> _Frame:
    """`side` 1 where the back is to the right."""
    centre = points.mean(axis=0)
    spread = np.cov((points - centre).T) + 1e-6 * np.diag([2.0, 1.0])
    u = np.linalg.eigh(spread)[1][:, 1]
    if u[0] * side < 0 or (u[0] == 0 and side < 0):
        u = -u
    v = np.array([-u[1], u[0]])
    if v[1] > 0:
        v = -v
    along = (points - centre) @ u
    low, high = rank.percentiles(along, (2, 98))
    low, high = low - 0.5, high + 0.5
    depth = max(high - low, 2.0)
    centre = centre + u * (low + high) / 2
    along, across = (points - centre) @ u, (points - centre) @ v
    edges = np.linspace(-depth / 2, depth / 2, BINS + 1)
    order = np.argsort(along)
    ends = np.append(along[order].searchsorted(edges[:-1]), along[order].searchsorted(edges[-1], "right"))
    counts = np.diff(ends)
    sums = np.diff(np.append(0.0, across[order].cumsum())[ends])
    mid = np.where(counts > 0, sums / np.maximum(counts, 1), 0.0)
    return _Frame(centre, u, v, depth, len(points) / depth, (edges[:-1] + edges[1:]) / 2, mid, counts * BINS / depth)


@dataclass(frozen=True)
class _Behind:
    """The canal's pixels near a disc, in its frame, and how bright the fluid is there, else in the whole canal; NaN without one."""

    along: Floats
    across: Floats
    values: Floats
    fluid: float


class _Canal:
    """Pixels of the canal, for looking up what lies behind a disc."""

    def __init__(self, image: NDArray[np.float32], canal: NDArray[np.bool_]) -> None:
        rows, columns = km.bounds(canal)
        ys, xs = np.nonzero(canal[rows, columns])
        ys, xs = ys + rows.start, xs + columns.start
        self.points = np.stack([xs, ys], 1) + 0.5
        self.values = image[ys, xs].astype(np.float64)
        self.reach = 0.05 * canal.shape[0]  # rows above and below a disc's middle that count as beside it
        self.fluid = rank.percentile(self.values, FLUID) if len(ys) >= 30 else float("nan")

    def side(self, centres: Sequence[Floats]) -> int:
        """1 where the canal runs to the right of the discs, -1 to the left, 0 where that is not seen."""
        votes = 0.0
        for centre in centres:
            beside = np.abs(self.points[:, 1] - centre[1]) < self.reach
            if beside.any():
                votes += float(np.sign(self.points[beside, 0].mean() - centre[0]))
        return int(np.sign(votes))

    def behind(self, frame: _Frame) -> _Behind:
        offset = self.points - frame.centre
        along, across = offset @ frame.u, offset @ frame.v
        near = (np.abs(across) < 0.8 * frame.depth) & (along > 0) & (along < 1.5 * frame.depth)
        values = self.values[near]
        fluid = rank.percentile(values, FLUID) if values.size > 20 else self.fluid
        return _Behind(along[near], across[near], values, fluid if np.isnan(fluid) else max(fluid, FLOOR))


# -- numbers --------------------------------------------------------------------------------------------------------


def _set(row: Floats, **values: float) -> None:
    for name, value in values.items():
        row[_PLACE[name]] = value


@dataclass(frozen=True)
class _Zones:
    """What the image shows in and around discs, each N x rows x columns: within the disc, in the marrow above and below it, at its
    end plates, just behind it, and further behind."""

    inner: NDArray[np.float32]
    above: NDArray[np.float32]
    below: NDArray[np.float32]
    upper_rim: NDArray[np.float32]
    lower_rim: NDArray[np.float32]
    behind: NDArray[np.float32]
    beyond: NDArray[np.float32]

    def of(self, disc: int) -> _Zones:
        return _Zones(*(getattr(self, name)[disc] for name in self.__dataclass_fields__))


_ALONG, _ACROSS = np.linspace(-0.9, 0.9, 37), np.linspace(-0.7, 0.7, 11)  # of a disc's half depth and half height


def _zones(image: NDArray[np.float32], frames: _Frames) -> _Zones:
    depth, height = frames.depth[:, None], frames.height[:, None]
    marrow = np.linspace(frames.height / 2 + 0.15 * frames.depth, frames.height / 2 + 0.5 * frames.depth, 9, axis=1)
    rim = np.linspace(frames.height / 2 + 0.05 * frames.depth, frames.height / 2 + 0.12 * frames.depth, 4, axis=1)
    along = np.linspace(-0.3, 0.3, 13) * depth
    rows = np.linspace(-0.5, 0.5, 7) * height
    return _Zones(
        _sample(image, *frames.inside(_ALONG, _ACROSS)),
        *(_sample(image, *frames.zone(along, across)) for across in (marrow, -marrow, rim, -rim)),
        *(_sample(image, *frames.zone(away * depth, rows)) for away in (np.linspace(0.5, 0.625, 6), np.linspace(0.55, 0.8, 11))),
    )


def _brightness(row: Floats, zones: _Zones, fluid: float) -> None:
    t, inner = _ALONG, zones.inner
    seen = inner[np.isfinite(inner)]
    if not seen.size:
        return
    nucleus, core = inner[2:9, 9:28], inner[2:9]
    middle, front, back = _mean(nucleus), _mean(core[:, :5]), _mean(core[:, 32:])
    bright = rank.percentile(nucleus[np.isfinite(nucleus)], 90) if np.isfinite(nucleus).any() else float("nan")
    profile = _means(core)
    weight = np.nan_to_num(profile) + 1e-6
    upper, lower = _median(zones.above), _median(zones.below)
    marrow = _middle(upper, lower)
    marrow = marrow if np.isnan(marrow) else max(marrow, FLOOR)
    plates = _median(zones.upper_rim) - upper, _median(zones.lower_rim) - lower
    contrast = middle - min(front, back)
    median, (high, low) = rank.median(seen), rank.percentiles(seen, (90, 10))
    _set(
        row,
        median_fluid=median / fluid,
        median_marrow=median / marrow,
        bright_fluid=high / fluid,
        dark_fluid=low / fluid,
        nucleus_fluid=middle / fluid,
        nucleus_marrow=middle / marrow,
        nucleus_bright_fluid=bright / fluid,
        nucleus_bright_marrow=bright / marrow,
        front_fluid=front / fluid,
        back_fluid=back / fluid,
        contrast_fluid=contrast / fluid,
        contrast_marrow=contrast / marrow,
        contrast_annulus=middle / max((front + back) / 2, FLOOR),
        cleft_fluid=(_mean(inner[[2, 8], 12:25]) - _mean(inner[5, 12:25])) / fluid,
        uneven_fluid=float(np.nanstd(nucleus)) / fluid if np.isfinite(nucleus).any() else float("nan"),
        steep_fluid=float(np.abs(np.diff(weight)).max()) / fluid,
        centre=float((t * weight).sum() / weight.sum()),
        width=float((t**2 * weight).sum() / weight.sum()),
        fluid_marrow=fluid / marrow,
        plate_above_fluid=plates[0] / fluid,
        plate_below_fluid=plates[1] / fluid,
        plate_change_fluid=max(abs(plates[0]), abs(plates[1])) / fluid,
        marrow_step_fluid=(upper - lower) / fluid,
    )


def _heights(row: Floats, f: _Frame, box: Box) -> None:
    ends = float(f.tall[[0, 1, 7, 8]].mean())
    _set(
        row,
        height=f.height / f.depth,
        height_front=float(f.tall[1:3].mean()) / f.depth,
        height_middle=float(f.tall[3:6].mean()) / f.depth,
        height_back=float(f.tall[6:8].mean()) / f.depth,
        height_least=float(f.tall[1:8].min()) / f.depth,
        lens=float(f.tall[3:6].mean()) / max(ends, 0.1),
        box_ratio=(box[3] - box[1]) / max(box[2] - box[0], 1.0),
        incline_deg=float(np.degrees(np.arctan2(-f.u[1], abs(f.u[0])))),
    )


def _back(row: Floats, zones: _Zones, f: _Frame, behind: _Behind) -> None:
    along, across, values, fluid = behind.along, behind.across, behind.values, behind.fluid
    half = max(f.height / 2, 1.5)
    level, clear = np.abs(across) < half, np.abs(across) > f.height / 2 + 0.2 * f.depth
    beyond = 0.6 * f.depth - f.height / 2  # of the canal's rows on each side that count as clear of the disc
    width = float(level.sum()) / (2 * half)
    if values.size:
        _set(row, canal_width=width / f.depth)
    if clear.sum() > 20 and beyond > 1:
        _set(row, canal_narrowing=width / (float(clear.sum()) / (2 * beyond)))
    if level.sum() > 4:
        front = rank.percentile(along[level], 5)
        _set(row, canal_gap=front / f.depth - 0.5)
        borders = [rank.percentile(along[part], 5) for part in (clear & (across > 0), clear & (across < 0)) if part.sum() > 4]
        if borders:
            _set(row, canal_indent=(front - float(np.mean(borders))) / f.depth)
        if clear.sum() > 5:
            _set(row, canal_signal=float(values[level].mean()) / max(float(values[clear].mean()), FLOOR))
    profile = _means(zones.beyond)
    profile = profile[np.isfinite(profile)]
    _set(row, behind_fluid=_mean(zones.behind) / fluid)
    if profile.size:
        _set(row, behind_dark_fluid=float(profile.min()) / fluid, behind_bright_fluid=float(profile.max()) / fluid)


def _reach(scene: Scene, frames: _Frames) -> dict[str, Floats]:
    """By side, "back" and "front": how far the body above, the body below and the disc itself reach to it, 3 x N in pixels."""
    together = np.zeros(scene.mask.shape, bool)
    for body in scene.bodies:
        together |= body.pixels
    bodies = together.astype(np.float32)
    outlines = cv2.GaussianBlur((scene.mask == km.DISC).astype(np.float32), (0, 0), 0.8)
    beside = np.linspace(frames.height / 2 + 0.12 * frames.depth, frames.height / 2 + 0.3 * frames.depth, 6, axis=1)
    within = np.linspace(-0.3, 0.3, 5) * frames.height[:, None]
    lines = ((bodies, beside), (bodies, -beside), (outlines, within))
    return {
        name: np.stack([_edge(region, frames, across, sign) for region, across in lines]) for name, sign in (("back", 1), ("front", -1))
    }


def _borders(row: Floats, f: _Frame, reach: dict[str, tuple[float, ...]]) -> None:
    """How far the disc bulges beyond its neighbours, and how far these stand out against each other."""
    for name, (above, below, own) in reach.items():
        if not np.isnan([above, below]).all():
            _set(row, **{f"bulge_{name}": (own - _middle(above, below)) / f.depth})
        _set(row, **{f"step_{name}": (above - below) / f.depth})


_REACH = np.linspace(0, 0.7, 85)  # of a disc's depth


def _edge(region: NDArray[np.float32], frames: _Frames, across: Floats, sign: int) -> Floats:
    """How far from each disc's middle a region reaches to one side, median of some lines; NaN where fewer than two meet it."""
    distance = _REACH * frames.depth[:, None]
    inside = _sample(region, *frames.zone(sign * distance, across)) > 0.5
    met: NDArray[np.bool_] = np.asarray(inside.any(axis=2))
    last = inside.shape[2] - 1 - inside[:, :, ::-1].argmax(axis=2)
    reached = np.take_along_axis(distance, last, axis=1)
    return np.array([rank.median(far[seen]) if seen.sum() >= 2 else np.nan for far, seen in zip(reached, met, strict=True)])


def _column(out: Floats, frames: Sequence[_Frame], places: Sequence[int]) -> None:
    """What a disc is beside the others of its column."""
    at = {place: i for i, place in enumerate(places)}
    depths = np.array([f.depth for f in frames])
    for i, place in enumerate(places):
        beside = [j for j in (at.get(place + 1), at.get(place - 1)) if j is not None]
        _set(out[i], depth_column=frames[i].depth / float(np.median(depths)))
        if beside:
            gap = float(np.mean([np.hypot(*(frames[j].centre - frames[i].centre)) for j in beside]))
            _set(out[i], height_gap=frames[i].height / max(gap, 1.0))
    for name in ("median_fluid", "nucleus_marrow", "contrast_fluid", "height_back", "height_gap"):
        values = out[:, _PLACE[name]].copy()
        seen = values[np.isfinite(values)]
        if not seen.size:
            continue
        most, mean = max(float(seen.max()), 1e-3), float(seen.mean())
        for i, place in enumerate(places):
            found = {"mean": mean}
            if np.isfinite(values[i]):
                found |= {"share": float(values[i]) / most, "rank": float((seen <= values[i]).mean())}
            found |= {how: float(values[at[p]]) for how, p in (("above", place + 1), ("below", place - 1)) if p in at}
            _set(out[i], **{f"{name}_{how}": value for how, value in found.items()})
