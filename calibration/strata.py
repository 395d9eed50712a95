"""Which images to take: proportional over nested strata, patients spread, seeded by content.

Hides apportionment. Nothing here depends on the order or the names of files: two folders with the same images give the same
choice, whatever the file system calls them and in whichever order it lists them.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

BINS = 3  # of mean and of contrast: dark, middle, bright


@dataclass(frozen=True)
class Candidate:
    """One image that may be chosen. `key` is its digest; `patient` may be "" (then nobody else's); `strata` from coarse to fine."""

    key: str
    patient: str
    strata: tuple[str, ...]


def apportion(sizes: Mapping[str, int], count: int) -> dict[str, int]:
    """Seats of each stratum: largest remainders (Hare quota), at least one each where `count` allows, never more than it holds.

    Ties go to the larger stratum, then to the first name. The seats are `count`, or all there is where that is less.
    """
    total = sum(sizes.values())
    count = min(count, total)
    if not count:
        return dict.fromkeys(sizes, 0)
    # Integers: a remainder of floats would make ties depend on rounding.
    seats = {name: count * size // total for name, size in sizes.items()}
    by_remainder = sorted(sizes, key=lambda n: (-(count * sizes[n] % total), -sizes[n], n))
    for name in by_remainder[: count - sum(seats.values())]:
        seats[name] += 1
    empty = sorted((n for n in sizes if sizes[n] and not seats[n]), key=lambda n: (-sizes[n], n))
    for name in empty:
        richest = max(seats, key=lambda n: (seats[n], -sizes[n], n))
        if seats[richest] < 2:
            break
        seats[richest] -= 1
        seats[name] += 1
    return seats


def choose(candidates: Sequence[Candidate], count: int, seed: int, fine: int = 0) -> list[Candidate]:
    """`count` of the candidates (all, where there are fewer), in the order in which they were taken.

    Seats are apportioned over the first stratum, within each over the second, and so on, so that the coarse strata are all
    there even where `count` is smaller than the number of fine ones. Within a stratum the patient with the fewest images
    chosen so far goes first, then the order of SHA-256(seed, digest). Of the `fine` last strata only the seats count: which of
    them goes next is left to the patients. The order is such that any prefix is a fair sample too.
    """
    order = {c.key: hashlib.sha256(f"{seed}:{c.key}".encode()).digest() for c in candidates}
    if len(order) != len(candidates):
        raise ValueError("two candidates have the same key")
    per_cell = _seats(candidates, count, 0)
    cells: dict[tuple[str, ...], list[Candidate]] = defaultdict(list)
    for c in sorted(candidates, key=lambda c: order[c.key]):
        cells[c.strata].append(c)
    taken: Counter[str] = Counter()
    chosen: list[Candidate] = []
    wanted: Counter[tuple[str, ...]] = Counter()
    children: dict[tuple[str, ...], set[tuple[str, ...]]] = defaultdict(set)
    for cell, seats in per_cell.items():
        for depth in range(len(cell) + 1):
            wanted[cell[:depth]] += seats
            if depth and seats:
                children[cell[: depth - 1]].add(cell[:depth])
    given: Counter[tuple[str, ...]] = Counter()
    depth = len(candidates[0].strata) - fine if candidates else 0

    def behind(cell: tuple[str, ...]) -> float:
        return (given[cell] + 0.5) / wanted[cell]

    for _ in range(wanted[()]):
        # From the coarsest level down, what is furthest behind its share goes next.
        stratum: tuple[str, ...] = ()
        while len(stratum) < depth:
            stratum = min((c for c in children[stratum] if given[c] < wanted[c]), key=lambda c: (behind(c), c))
        open_ = [c for c in cells if c[:depth] == stratum and given[c] < wanted[c]]
        pool = [(taken[c.patient] if c.patient else 0, behind(cell), order[c.key], c) for cell in open_ for c in cells[cell]]
        best = min(pool, key=lambda row: row[:3])[3]
        cells[best.strata].remove(best)
        for level in range(1, len(best.strata) + 1):
            given[best.strata[:level]] += 1
        taken[best.patient] += 1
        chosen.append(best)
    return chosen


def _seats(candidates: Sequence[Candidate], count: int, level: int) -> dict[tuple[str, ...], int]:
    if not candidates:
        return {}
    if level == len(candidates[0].strata):
        return {candidates[0].strata: min(count, len(candidates))}
    groups: dict[str, list[Candidate]] = defaultdict(list)
    for c in candidates:
        groups[c.strata[level]].append(c)
    seats = apportion({name: len(group) for name, group in groups.items()}, count)
    out: dict[tuple[str, ...], int] = {}
    for name in sorted(groups):
        out |= _seats(groups[name], seats[name], level + 1)
    return out


def bins(values: Sequence[float], name: str) -> list[str]:
    """Each value's quantile bin, as "mean 2/3". Equal values share a bin, so the order of the values does not matter."""
    array: NDArray[np.float64] = np.asarray(values, dtype=np.float64)
    if not array.size:
        return []
    edges = np.quantile(array, np.arange(1, BINS) / BINS)
    return [f"{name} {int(i) + 1}/{BINS}" for i in np.searchsorted(edges, array, side="left")]
