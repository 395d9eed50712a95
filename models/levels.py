"""Which disc is which: names counted upwards from the sacrum, where it is in view; never a guess.

The detector's boxes go in; a column of discs and vertebrae with levels, or with None and the reason, comes out.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kernels.nms import iou_matrix

DISC_LEVELS = ("L5/S1", "L4/L5", "L3/L4", "L2/L3", "L1/L2", "T12/L1", "T11/T12", "T10/T11", "T9/T10", "T8/T9", "T7/T8", "T6/T7")
VERTEBRA_LEVELS = ("L5", "L4", "L3", "L2", "L1", "T12", "T11", "T10", "T9", "T8", "T7", "T6")
# On training patients the sacrum scores 0.39 or more where it is in view (one miss in 63), 0.31 or less where it was cut off.
SACRUM_SCORE = 0.35
# A second place that looks like the sacrum this much: in 5 of 171 patients, all with an unusual lumbosacral junction, among
# them the only one whose levels were named wrongly.
RIVAL_SCORE = 0.25
SKIP_RATIO = 1.55  # a gap of more than this many typical gaps hides a disc that was not found


@dataclass(frozen=True)
class Column:
    """Indices into the boxes given, lowest first, with a level or None for each, and the reason in words."""

    discs: tuple[int, ...]
    disc_levels: tuple[str | None, ...]
    vertebrae: tuple[int, ...]
    vertebra_levels: tuple[str | None, ...]
    reason: str


def _centres(boxes: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.asarray((boxes[:, :2] + boxes[:, 2:]) / 2, dtype=np.float32)


def name_levels(
    discs: NDArray[np.float32], vertebrae: NDArray[np.float32], sacra: NDArray[np.float32], sacrum_scores: NDArray[np.float32]
) -> Column:
    """Boxes N x 4 (x0, y0, x1, y1; y down, head up) of each kind -> a named column.

    Where two separate places score as a sacrum, nothing is named. Else the best sacrum box of at least SACRUM_SCORE anchors
    the count: the disc whose centre is nearest to the middle of its upper edge, within one disc width, is L5/S1; discs below
    it belong to the sacrum and are left out. Two vertebrae between neighbouring discs mean that one disc was not found, and
    its level is skipped. A gap that is too long without such evidence ends the naming there.
    """
    d, v = _centres(discs), _centres(vertebrae)
    order = [int(i) for i in np.argsort(-d[:, 1], kind="stable")] if len(d) else []
    v_order = [int(i) for i in np.argsort(-v[:, 1], kind="stable")] if len(v) else []
    unnamed = (None,) * len(order), (None,) * len(v_order)

    def without_names(reason: str) -> Column:
        return Column(tuple(order), unnamed[0], tuple(v_order), unnamed[1], reason)

    if not order:
        return without_names("No disc was found.")
    if not len(sacra) or float(sacrum_scores.max()) < SACRUM_SCORE:
        return without_names("The sacrum is not in view, so levels cannot be counted; discs are numbered from the lowest.")
    s = sacra[int(sacrum_scores.argmax())]
    apart = iou_matrix(s[None], sacra)[0] < 0.3
    if bool((apart & (sacrum_scores >= RIVAL_SCORE)).any()):
        return without_names(
            "Two places look like the top of the sacrum (a transitional vertebra, perhaps), so levels are not named; "
            "discs are numbered from the lowest."
        )
    top = np.array([(s[0] + s[2]) / 2, s[1] + 0.15 * (s[3] - s[1])])
    width = float(np.median(discs[:, 2] - discs[:, 0]))
    distance = np.linalg.norm(d - top, axis=1)
    anchor = int(distance.argmin())
    if distance[anchor] > 1.0 * width:
        return without_names("The sacrum was found, but no disc lies on it; discs are numbered from the lowest.")
    if any(d[anchor, 1] < y < top[1] for y in v[:, 1]):
        # A vertebra between the two is L5, so the disc is L4/L5 at the lowest: every name would be one too low.
        return without_names("A vertebra lies between the sacrum and the lowest disc found; discs are numbered from the lowest.")
    order = [i for i in order if d[i, 1] <= d[anchor, 1]]
    v_order = [i for i in v_order if v[i, 1] < d[anchor, 1]]
    steps = [float(np.linalg.norm(d[b] - d[a])) for a, b in itertools.pairwise(order)]
    typical = float(np.median(steps)) if steps else 0.0

    names: list[str | None] = [DISC_LEVELS[0]]
    level: int | None = 0
    reason = "Levels are counted upwards from the sacrum."
    for step, (a, b) in zip(steps, itertools.pairwise(order), strict=True):
        if level is not None:
            between = sum(1 for i in v_order if d[b, 1] < v[i, 1] < d[a, 1])
            # Upper vertebrae are shorter, so a normal gap never exceeds the ratio; a missed disc makes it about two.
            if step <= SKIP_RATIO * typical:
                level += 1
            elif between == 2:
                level += 2
                reason = "Levels are counted upwards from the sacrum; one disc between two vertebrae was not found."
            else:
                level = None
                reason = "Levels are counted upwards from the sacrum as far as the column is unbroken; above that they are unnamed."
        names.append(DISC_LEVELS[level] if level is not None and level < len(DISC_LEVELS) else None)
    v_names = [_vertebra_level(v[i], [d[j] for j in order], names, typical) for i in v_order]
    return Column(tuple(order), tuple(names), tuple(v_order), tuple(v_names), reason)


def _vertebra_level(centre: NDArray[np.float32], discs: list[NDArray[np.float32]], names: list[str | None], typical: float) -> str | None:
    """A vertebra is named by the disc next below it, or, for the lowest it lacks, by the one next above."""
    below = [i for i, c in enumerate(discs) if c[1] > centre[1]]
    if not below:
        return None
    i = max(below)  # the highest disc that still lies below: discs are ordered upwards
    name = names[i]
    if name is None or (typical and float(np.linalg.norm(discs[i] - centre)) > typical):
        return None
    return VERTEBRA_LEVELS[DISC_LEVELS.index(name)]
