"""Indexed masks -> separate structures: which pixels are one disc, which are one vertebral body, and their outlines.

Classes are fixed: 0 background, 1 vertebra (with posterior elements), 2 disc, 3 canal.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

Window = tuple[slice, slice]  # rows and columns of an image

VERTEBRA, DISC, CANAL = 1, 2, 3
MAX_COMPONENTS = 256
OUTLINE_ZOOM = 8
MAX_ASPECT = 8.0  # a pixel's longer side over its shorter one; more is a wrong header, and costs memory without end


@dataclass(frozen=True)
class Component:
    """One connected region. `box` is (x0, y0, x1, y1) in pixel edges; `pixels` is the H x W boolean region."""

    box: tuple[float, float, float, float]
    area: int
    centre: tuple[float, float]
    pixels: NDArray[np.bool_]

    @property
    def window(self) -> Window:
        """The rows and columns of `box`: what `bounds` would look for in `pixels`."""
        x0, y0, x1, y1 = (int(v) for v in self.box)
        return slice(y0, y1), slice(x0, x1)


def bounds(region: NDArray[np.bool_]) -> Window:
    """(rows, columns) of the smallest rectangle around a region, H x W; empty slices for an empty one."""
    x, y, w, h = cv2.boundingRect(np.ascontiguousarray(region).view(np.uint8))
    return slice(y, y + h), slice(x, x + w)


def _grown(window: Window, by: tuple[int, int]) -> Window:
    """A window with rows and columns more on each side, where the image has them."""
    rows, columns = (slice(max(part.start - more, 0), part.stop + more) for part, more in zip(window, by, strict=True))
    return rows, columns


def components(region: NDArray[np.bool_], min_area: int = 1) -> list[Component]:
    """8-connected regions of at least `min_area` pixels, largest first, at most MAX_COMPONENTS."""
    rows, columns = bounds(region)
    # Labels are given by blocks of 2 x 2: from an even corner on they come in the order that the whole image's would have.
    top, left = rows.start & ~1, columns.start & ~1
    part = region[top : rows.stop, left : columns.stop]
    if not part.size:
        return []
    count, labels, stats, centres = cv2.connectedComponentsWithStats(part.astype(np.uint8), connectivity=8)
    order = sorted(range(1, count), key=lambda i: -int(stats[i, cv2.CC_STAT_AREA]))[:MAX_COMPONENTS]
    out = []
    for i in order:
        x, y, w, h, area = (int(v) for v in stats[i])
        if area < min_area:
            break
        # By way of the sum of its coordinates, a whole number: then a centre does not depend on where the corner lies.
        cx, cy = ((round(float(c) * area) + edge * area) / area + 0.5 for c, edge in zip(centres[i], (left, top), strict=True))
        pixels = np.zeros(region.shape, bool)
        np.equal(labels[y : y + h, x : x + w], i, out=pixels[top + y : top + y + h, left + x : left + x + w])
        out.append(Component((left + x, top + y, left + x + w, top + y + h), area, (cx, cy), pixels))
    return out


def discs(mask: NDArray[np.uint8]) -> list[Component]:
    """Disc regions from the lowest upwards; specks below a quarter of the median are dropped."""
    found = components(mask == DISC, min_area=12)
    if not found:
        return []
    typical = float(np.median([c.area for c in found[: max(3, len(found) // 2)]]))
    return sorted((c for c in found if c.area >= 0.25 * typical), key=lambda c: -c.centre[1])


def bodies(
    mask: NDArray[np.uint8], found_discs: list[Component] | None = None, spacing: tuple[float, float] = (1.0, 1.0)
) -> list[Component]:
    """Vertebral bodies from the lowest upwards, cut free from pedicles and spinous processes.

    `found_discs` are those of `discs(mask)`, where they are known already. `spacing` (row, column) says how far pixels are from
    square, at most MAX_ASPECT; its unit does not matter.

    An opening with a disc of 0.4 disc widths (about 14 mm, thicker than a pedicle, thinner than a body) cuts bridges;
    what then touches a disc is a body, the rest are posterior elements.
    """
    found_discs = discs(mask) if found_discs is None else found_discs
    if not found_discs:
        return []
    # From here on lengths are in the finer of the two spacings; with square pixels that is a pixel.
    row, column = (min(s / min(spacing), MAX_ASPECT) for s in spacing)
    width = float(np.median([max((c.box[2] - c.box[0]) * column, (c.box[3] - c.box[1]) * row) for c in found_discs]))
    kernel, high, wide = _ellipse(0.4 * width, row, column)
    # One pixel more on each side: only at the image's own edge does the structure reach the window's.
    window = _grown(bounds((mask == VERTEBRA) | (mask == DISC)), (1, 1))
    vertebra, disc = ((mask[window] == kind).astype(np.uint8) for kind in (VERTEBRA, DISC))
    # The image edge is no edge of a body: pad by replication so that a cut body survives the opening.
    padded = cv2.copyMakeBorder(vertebra, high, high, wide, wide, cv2.BORDER_REPLICATE)
    opened = np.zeros(mask.shape, bool)
    opened[window] = cv2.morphologyEx(padded, cv2.MORPH_OPEN, kernel)[high:-high, wide:-wide] > 0
    near = cv2.dilate(disc, _ellipse(0.3 * width, row, column)[0]) > 0
    touching = [c for c in components(opened, min_area=12) if bool((c.pixels[window] & near).any())]
    if not touching:
        return []
    largest = touching[0].area
    grown, *_ = _ellipse(5.0, row, column)
    times = max(1, max(high, wide) // 8)
    reach = (times * (grown.shape[0] // 2), times * (grown.shape[1] // 2))
    out = []
    for c in touching:
        if c.area < 0.15 * largest:
            continue
        # Opening rounds the corners off: grow back inside the mask.
        around = _grown(c.window, reach)
        part = cv2.dilate(c.pixels[around].astype(np.uint8), grown, iterations=times) & (mask[around] == VERTEBRA)
        pixels = np.zeros(mask.shape, bool)
        pixels[around] = part > 0
        rows, columns = bounds(part > 0)
        top, left = around[0].start, around[1].start
        box = (float(left + columns.start), float(top + rows.start), float(left + columns.stop), float(top + rows.stop))
        out.append(Component(box, cv2.countNonZero(part), c.centre, pixels))
    return sorted(out, key=lambda c: -c.centre[1])


def _ellipse(across: float, row: float, column: float) -> tuple[NDArray[np.uint8], int, int]:
    """A disc of diameter `across` as a kernel, with its odd numbers of rows and columns, three at least."""
    high, wide = (max(3, int(across / s) | 1) for s in (row, column))
    return np.asarray(cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (wide, high)), np.uint8), high, wide


def outline(pixels: NDArray[np.bool_], tolerance_px: float = 0.75, window: Window | None = None) -> tuple[tuple[float, float], ...]:
    """The largest outer contour as a closed polygon, N x 2 (x, y) in pixel edges; empty for an empty region. `window` is that of the
    region, where it is known.

    OpenCV's contours run through the centres of the outermost pixels, half a pixel inside the region on every side, which
    is an eighth of a thin disc's area. The region is enlarged first, so that the polygon runs a sixteenth inside instead.
    """
    rows, columns = window or bounds(pixels)
    part = pixels[rows, columns].astype(np.uint8)
    if not part.size:
        return ()
    y0, x0 = rows.start, columns.start
    big = cv2.resize(part, None, fx=OUTLINE_ZOOM, fy=OUTLINE_ZOOM, interpolation=cv2.INTER_NEAREST)
    contours, _ = cv2.findContours(big, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    polygon = cv2.approxPolyDP(max(contours, key=cv2.contourArea), tolerance_px * OUTLINE_ZOOM, True)
    return tuple(((float(x) + 0.5) / OUTLINE_ZOOM + x0, (float(y) + 0.5) / OUTLINE_ZOOM + y0) for x, y in polygon[:, 0, :])
