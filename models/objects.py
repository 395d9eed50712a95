"""Boxes to learn from: masks, pseudo-masks and drawn rectangles -> labelled point sets that survive rotation.

A box rotated as a rectangle grows; the structure in it does not. So every object is kept as points whose extents are its
box: the contour of its region where a mask is known, else the ellipse inscribed in the drawn rectangle. Nothing on a
device imports this module.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from kernels import mask as km
from kernels.nms import iou_matrix
from kernels.preprocess import normalise
from models import data

VERTEBRA, DISC, SACRUM = 0, 1, 2
Points = NDArray[np.float32]


@dataclass
class Labelled:
    """One image in [-1, 1] with its objects (class, points N x 2 in pixel edges) and which classes are fully known."""

    image: NDArray[np.float32]
    objects: list[tuple[int, Points]] = field(default_factory=list)
    known: tuple[float, float, float] = (1.0, 1.0, 1.0)
    drawn: bool = False


def contour_points(pixels: NDArray[np.bool_]) -> Points:
    contours, _ = cv2.findContours(pixels.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    points = max(contours, key=len)[:, 0, :].astype(np.float32)
    low, high = points.min(0), points.max(0)
    # Contours run through pixel centres; boxes through edges: stretch by one pixel about the middle.
    return (points - (low + high) / 2) * ((high - low + 1) / np.maximum(high - low, 1)) + (low + high) / 2 + 0.5


def ellipse_points(box: NDArray[np.float32]) -> Points:
    t = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    centre, half = (box[:2] + box[2:]) / 2, (box[2:] - box[:2]) / 2
    return np.asarray(centre + np.stack([np.cos(t), np.sin(t)], 1) * half, dtype=np.float32)


def fit_points(points: Points, box: NDArray[np.float32]) -> Points:
    """Stretch and shift points until their extents are `box`: a contour's shape in a drawn rectangle."""
    low, high = points.min(0), points.max(0)
    return np.asarray((points - low) / np.maximum(high - low, 1e-3) * (box[2:] - box[:2]) + box[:2], dtype=np.float32)


def sacrum_points(disc: km.Component, posterior_right: bool) -> Points:
    """The first sacral segment as a quadrilateral below the L5/S1 disc: as high as 0.75 of the disc is long, tapering.

    SPIDER's masks leave the sacrum out; this construction is close enough to learn that it is there.
    """
    ys, xs = np.nonzero(disc.pixels)
    points = np.stack([xs, ys], 1).astype(np.float32) + 0.5
    centre = points.mean(0)
    _, vectors = np.linalg.eigh(np.cov((points - centre).T))
    along = vectors[:, 1].astype(np.float32)
    if along[0] < 0:
        along = -along
    down = np.array([-along[1], along[0]], np.float32)
    if down[1] < 0:
        down = -down
    u = (points - centre) @ along
    v = (points - centre) @ down
    half, low = float(np.percentile(np.abs(u), 96)), float(np.percentile(v, 90))
    depth = 1.5 * half
    anterior, posterior = (-half, half) if posterior_right else (half, -half)
    corners = [(anterior, low), (posterior, low), (posterior * 0.75, low + depth), (anterior * 0.55, low + depth)]
    return np.array([centre + a * along + b * down for a, b in corners], np.float32)


def from_mask(image: NDArray[np.uint8], mask: NDArray[np.uint8], graded: int) -> Labelled:
    """Objects of an index mask; the sacrum is known only where the discs are as many as graded, so the lowest is L5/S1."""
    found, bodies = km.discs(mask), km.bodies(mask)
    objects = [(DISC, contour_points(c.pixels)) for c in found] + [(VERTEBRA, contour_points(c.pixels)) for c in bodies]
    complete = len(found) == graded and bool(found)
    if complete:
        canal_x = np.nonzero(mask == km.CANAL)[1]
        right = not canal_x.size or float(canal_x.mean()) > float(np.mean([c.centre[0] for c in found]))
        objects.append((SACRUM, sacrum_points(found[0], right)))
    return Labelled(normalise(image.astype(np.float32)), objects, (1.0, 1.0, 1.0 if complete else 0.0))


def drawn_margin(root: Path, pseudo: Path) -> NDArray[np.float64]:
    """Median ratio (width, height) of drawn disc rectangles to the regions in them, over training slices with both."""
    ratios = []
    for path in sorted(pseudo.glob("*.png")):
        boxes = data.disc_boxes(root).get(path.name)
        if boxes is None or data.patient_of(path) not in data.split()["train"]:
            continue
        for c in km.discs(data.read_grey(path)):
            overlaps = iou_matrix(np.array([c.box], np.float32), boxes)[0]
            if overlaps.max() > 0.4:
                b = boxes[overlaps.argmax()]
                ratios.append([(b[2] - b[0]) / (c.box[2] - c.box[0]), (b[3] - b[1]) / (c.box[3] - c.box[1])])
    return np.median(np.array(ratios), axis=0)


def midsagittal(root: Path, pseudo: Path, path: Path, margin: NDArray[np.float64]) -> Labelled | None:
    """A mid-sagittal slice: drawn disc boxes where they are, else regions grown by `margin`; None where nothing is known."""
    image = data.read_grey(path)
    graded = len(data.gradings(root).get(data.patient_of(path), {}))
    drawn = data.disc_boxes(root).get(path.name)
    mask_path = pseudo / path.name
    if not mask_path.exists():
        if drawn is None or len(drawn) != graded:
            return None
        out = Labelled(normalise(image.astype(np.float32)), [(DISC, ellipse_points(b)) for b in drawn], (0.0, 1.0, 0.0))
        out.drawn = True
        return out
    out = from_mask(image, data.read_grey(mask_path), graded)
    objects: list[tuple[int, Points]] = []
    taken: set[int] = set()
    for kind, points in out.objects:
        if kind != DISC:
            objects.append((kind, points))
            continue
        low, high = points.min(0), points.max(0)
        if drawn is not None:
            overlaps = iou_matrix(np.concatenate([low, high])[None], drawn)[0]
            if overlaps.max() > 0.3:
                taken.add(int(overlaps.argmax()))
                objects.append((DISC, fit_points(points, drawn[overlaps.argmax()])))
                continue
        objects.append((DISC, ((points - (low + high) / 2) * margin + (low + high) / 2).astype(np.float32)))
    if drawn is not None:
        objects += [(DISC, ellipse_points(b)) for i, b in enumerate(drawn) if i not in taken]
    out.objects, out.drawn = objects, drawn is not None
    return out
