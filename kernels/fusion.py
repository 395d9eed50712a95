"""The grade of a disc from everything known of its column: a small forest over the network's logits and measured numbers.

Hides the trees, what stands in for a number that is missing, and how a file is read without trusting it. The forest was grown by
`models/fusion.py` on the ranked probability score, so each leaf holds the shares of grades above 1, 2, 3 and 4, and these never
rise: the answer is ordinal by construction. Evaluation is numpy alone.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from kernels import appearance

Floats = NDArray[np.float64]
FORMAT = "1"
GRADES, FLAGS = 5, 3
TARGETS = GRADES - 1 + FLAGS
SMOOTHING = 0.004  # added to each probability: no grade is impossible because few examples did not show it
MOST_BYTES = 16 << 20  # of a file, unpacked
MOST_NODES, MOST_TREES = 1_000_000, 5000

# Without a reference brightness there is no measured number to speak of; what stands in for it would mislead.
NEEDED = ("median_fluid", "median_marrow")
_BESIDE = ("grade", "herniation", "narrowing", "bulging")
# Columns of a row, by what they are about.
GROUPS: dict[str, tuple[str, ...]] = {
    "network": (*(f"network_{k}" for k in range(1, GRADES + 1)), *(f"network_{name}" for name in _BESIDE)),
    "neighbours": (*(f"{side}_{name}" for side in ("above", "below") for name in _BESIDE), "beside_less_own", "column_grade"),
    "level": ("level",),
    **appearance.GROUPS,
}
NAMES: tuple[str, ...] = tuple(name for names in GROUPS.values() for name in names)


def rows(logits: NDArray[np.floating], looks: Floats, places: Sequence[int], levels: Sequence[int | None]) -> NDArray[np.float32]:
    """N x len(NAMES) of the N discs of one column, NaN where something is not known.

    `logits` N x 8 of the network (five grades, three flags); `looks` as `appearance.describe` gives them; `places` count the
    column from below, neighbours differ by one; `levels` 1 for L5/S1, upwards, None where the level is not known.
    """
    z = np.asarray(logits, np.float64)
    shares = _log_softmax(z[:, :GRADES])
    grade = np.exp(shares) @ np.arange(1.0, GRADES + 1)
    clipped = np.maximum(shares, -8.0)
    own = np.column_stack([clipped - clipped.mean(axis=1, keepdims=True), grade, z[:, GRADES:]])
    told = np.column_stack([grade, z[:, GRADES:]])
    at = {place: i for i, place in enumerate(places)}
    beside = np.full((len(z), 2, told.shape[1]), np.nan)
    for i, place in enumerate(places):
        for side, neighbour in enumerate((place + 1, place - 1)):
            if neighbour in at:
                beside[i, side] = told[at[neighbour]]
    seen = np.isfinite(beside[:, :, 0])
    count = seen.sum(axis=1)
    near = np.where(count > 0, np.where(seen, beside[:, :, 0], 0.0).sum(axis=1) / np.maximum(count, 1) - grade, np.nan)
    column = np.full(len(z), grade.mean() if len(z) else np.nan)
    level = np.array([np.nan if k is None else float(k) for k in levels])
    return np.column_stack([own, beside.reshape(len(z), -1), near, column, level, looks]).astype(np.float32)


def _log_softmax(z: Floats) -> Floats:
    shifted = z - z.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))


@dataclass(frozen=True, eq=False)
class Fusion:
    """A forest of T trees with M nodes together, over len(NAMES) columns.

    `feature` M int16, -1 at a leaf; a row goes to node `child` where its number is at most `threshold`, else to `child` + 1;
    children stand behind their parents. `value` M x 7: shares of grade > 1, > 2, > 3, > 4 and of each flag among the examples that
    came to a node. `roots` T. `fill` stands in for numbers that are missing. `grader` is the SHA-256 of the network's file whose
    logits it belongs to.
    """

    fill: NDArray[np.float32]
    feature: NDArray[np.int16]
    threshold: NDArray[np.float32]
    child: NDArray[np.int32]
    value: NDArray[np.float32]
    roots: NDArray[np.int32]
    grader: str

    def __post_init__(self) -> None:
        """ValueError for anything that is no forest over NAMES: a walk must end, and end in shares."""
        nodes, trees = len(self.feature), len(self.roots)
        if not 0 < trees <= MOST_TREES or not 0 < nodes <= MOST_NODES:
            raise ValueError(f"{trees} trees with {nodes} nodes")
        if self.fill.shape != (len(NAMES),) or self.threshold.shape != (nodes,) or self.child.shape != (nodes,):
            raise ValueError("its arrays do not belong together")
        if self.value.shape != (nodes, TARGETS) or self.feature.ndim != 1 or self.roots.ndim != 1:
            raise ValueError("its arrays do not belong together")
        if not all(np.isfinite(a).all() for a in (self.fill, self.threshold, self.value)):
            raise ValueError("it holds what is no number")
        inner = self.feature >= 0
        if self.feature.min() < -1 or self.feature.max() >= len(NAMES):
            raise ValueError("it asks for a column that there is not")
        # Children behind their parents: no walk goes round.
        if (self.child[inner] <= np.flatnonzero(inner)).any() or (self.child[inner] + 1 >= nodes).any():
            raise ValueError("a branch leads nowhere")
        if (self.roots < 0).any() or (self.roots >= nodes).any():
            raise ValueError("a tree begins nowhere")
        falling = np.diff(self.value[:, : GRADES - 1], axis=1)
        if self.value.min() < 0 or self.value.max() > 1 or (falling > 1e-6).any():
            raise ValueError("its leaves hold no shares")

    # -- answers

    @staticmethod
    def usable(x: NDArray[np.floating]) -> NDArray[np.bool_]:
        """N: whether a row knows enough (NEEDED) to be fused."""
        return np.asarray(np.isfinite(x[:, [NAMES.index(name) for name in NEEDED]]).all(axis=1))

    def shares(self, x: NDArray[np.floating]) -> Floats:
        """N x len(NAMES), NaN where not known -> N x 7 means over the trees: P(grade > 1..4), then each flag."""
        filled = self._filled(x)
        at = np.broadcast_to(self.roots, (len(filled), len(self.roots))).copy()
        who = np.arange(len(filled))[:, None]
        while (inner := self.feature[at] >= 0).any():
            at = np.where(inner, self.child[at] + (filled[who, self.feature[at]] > self.threshold[at]), at)
        return np.asarray(self.value[at].mean(axis=1), np.float64)

    def logits(self, network: NDArray[np.floating], x: NDArray[np.floating], found: Floats | None = None) -> NDArray[np.float32]:
        """N x 8 fused logits beside the network's own N x 8: softmax of the first five are the fused probabilities, the sigmoid of
        the others those of the flags.

        The five keep the network's log sum of exponentials, so that its energy still tells discs from other things. A row that is
        not `usable` keeps the network's logits. `found` are the `shares` of these rows, where they are known.
        """
        fused = self.as_logits(network, self.shares(x) if found is None else found)
        return np.where(self.usable(x)[:, None], fused, np.asarray(network, np.float32))

    @staticmethod
    def as_logits(network: NDArray[np.floating], found: Floats) -> NDArray[np.float32]:
        """As `logits`, from the shares N x 7."""
        above = np.column_stack([np.ones(len(found)), found[:, : GRADES - 1], np.zeros(len(found))])
        p = (np.maximum(-np.diff(above, axis=1), 0.0) + SMOOTHING) / (1 + GRADES * SMOOTHING)
        flags = (found[:, GRADES - 1 :] + SMOOTHING) / (1 + 2 * SMOOTHING)
        z = np.asarray(network, np.float64)[:, :GRADES]
        energy = np.logaddexp.reduce(z, axis=1, keepdims=True)
        return np.column_stack([np.log(p) + energy, np.log(flags / (1 - flags))]).astype(np.float32)

    def parts(self, x: NDArray[np.floating]) -> tuple[float, dict[str, Floats]]:
        """What the expected grade consists of: the forest's mean, and for each of GROUPS what its numbers added, N each.

        Each branch of each tree changes the expected grade of those who take it; the change belongs to the number that was asked
        for. The mean and all parts add up to 1 + the sum of P(grade > k), exactly.
        """
        return self.explained(x)[1:]

    def explained(self, x: NDArray[np.floating]) -> tuple[Floats, float, dict[str, Floats]]:
        """`shares`, then `parts`, out of one walk."""
        filled = self._filled(x)
        grade = self._grades
        at = np.broadcast_to(self.roots, (len(filled), len(self.roots))).copy()
        row = np.arange(len(filled))[:, None]
        cells, changes = [np.zeros(0, np.intp)], [np.zeros(0)]
        while (inner := self.feature[at] >= 0).any():
            column = np.maximum(self.feature[at], 0)
            to = np.where(inner, self.child[at] + (filled[row, column] > self.threshold[at]), at)
            cells.append((row * len(NAMES) + column).ravel())
            changes.append((grade[to] - grade[at]).ravel())
            at = to
        size = len(filled) * len(NAMES)
        by_column = np.bincount(np.concatenate(cells), np.concatenate(changes), size).reshape(len(filled), len(NAMES)) / len(self.roots)
        ends = np.cumsum([len(names) for names in GROUPS.values()])
        parts = {name: p.sum(axis=1) for name, p in zip(GROUPS, np.split(by_column, ends[:-1], axis=1), strict=True)}
        return np.asarray(self.value[at].mean(axis=1), np.float64), float(grade[self.roots].mean()), parts

    @cached_property
    def _grades(self) -> Floats:
        """M: the expected grade among the examples that came to each node."""
        return np.asarray(1.0 + self.value[:, : GRADES - 1].astype(np.float64).sum(axis=1))

    def _filled(self, x: NDArray[np.floating]) -> NDArray[np.float32]:
        x = np.asarray(x, np.float32)
        return np.where(np.isfinite(x), x, self.fill)

    # -- files

    def to_bytes(self) -> bytes:
        """An .npz file that `read` reads."""
        out = io.BytesIO()
        np.savez_compressed(
            out, format=np.array(FORMAT), names=np.array(NAMES), grader=np.array(self.grader), fill=self.fill, feature=self.feature,
            threshold=self.threshold, child=self.child, value=self.value, roots=self.roots,
        )  # fmt: skip
        return out.getvalue()


_KINDS = {"fill": "f4", "feature": "i2", "threshold": "f4", "child": "i4", "value": "f4", "roots": "i4"}


def read(blob: bytes) -> Fusion:
    """What `to_bytes` wrote. ValueError for anything else, before more than MOST_BYTES are unpacked."""
    try:
        with zipfile.ZipFile(io.BytesIO(blob)) as packed:
            if sum(i.file_size for i in packed.infolist()) > MOST_BYTES:
                raise ValueError(f"it unpacks to more than {MOST_BYTES} bytes")
        with np.load(io.BytesIO(blob), allow_pickle=False) as stored:
            texts = {name: stored[name] for name in ("format", "names", "grader")}
            arrays = {name: stored[name] for name in _KINDS}
    # The last is what zipfile raises for an archive compressed in a way that it does not know.
    except (zipfile.BadZipFile, KeyError, OSError, EOFError, NotImplementedError) as error:
        raise ValueError(f"it is no file of a fusion: {error}") from error
    if any(a.dtype.kind != "U" for a in texts.values()) or any(a.dtype != np.dtype(_KINDS[n]) for n, a in arrays.items()):
        raise ValueError("its arrays are of the wrong kind")
    if str(texts["format"]) != FORMAT or tuple(texts["names"].ravel()) != NAMES:
        raise ValueError("it was fitted to other columns than this version measures")
    return Fusion(grader=str(texts["grader"]), **arrays)
