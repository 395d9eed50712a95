"""Which radiographs are of one person, and the split that keeps them together: `python -m calibration.radiographs --data DIR`.

Hides how persons are told apart without a patient number. File names of one set carry one in part (`sunhl-1th-DATE-NUMBER`);
every pair of pictures is compared too (`calibration.duplicates`), at a looser limit than "the same picture": to put two
strangers on one side costs nothing, to part one person does. The publishers' `valid` folder stays the test side as it is;
what training shares with it is withdrawn. Writes models/split_radiographs.json, which the networks' training and evaluation read.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from calibration.duplicates import Fingerprint, candidates, fingerprint, likeness
from models import radiographs
from models.data import read_grey

ALIKE = 0.70  # correlation; pairs of one name came to .71 where the two copies were equalised differently
SEED = 20261124
VALIDATION_SHARE = 7  # one group in seven of the training pictures chooses
TEST_SHARE = 4  # one in four of each class judges
SIDES = ("boxes_train", "boxes_validation", "boxes_withdrawn", "boxes_test", "class_train", "class_withdrawn", "class_test")
_PERSON = re.compile(r"sunhl-1th-\d+-\w+-\d{4}-(\d+)-")


def name_key(name: str) -> str:
    """What a file name says of its person: equal keys are one person. Copies of one export differ after `.rf.`."""
    found = _PERSON.match(name)
    return f"sunhl {found.group(1)}" if found else name.split(".rf.")[0]


def groups(keys: Sequence[str], pairs: Iterable[tuple[int, int]]) -> list[int]:
    """A group's number for each picture: joined by equal key or by a pair; numbered by first appearance."""
    parent = list(range(len(keys)))

    def top(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    first: dict[str, int] = {}
    for i, key in enumerate(keys):
        parent[top(i)] = top(first.setdefault(key, i))
    for i, j in pairs:
        parent[top(i)] = top(j)
    numbers: dict[int, int] = {}
    return [numbers.setdefault(top(i), len(numbers)) for i in range(len(keys))]


def alike(prints: Sequence[Fingerprint], limit: float = ALIKE) -> list[tuple[int, int]]:
    """Pairs i < j whose fine detail correlates by at least `limit`."""
    return [(i, j) for i, j in candidates(prints, prints) if i < j and likeness(prints[i], prints[j]) >= limit]


def make_split(root: Path) -> dict[str, dict[str, int]]:
    """Side -> {digest of the file: group}; deterministic."""
    boxed, classed = radiographs.boxed_paths(root), radiographs.classed_paths(root)
    paths = [*boxed, *classed]
    prints = [fingerprint(read_grey(p).astype(np.float32)) for p in paths]
    keys = [name_key(p.name) if p in set(boxed) else f"class {p.name}" for p in paths]
    return assign(boxed, classed, dict(zip(paths, groups(keys, alike(prints)), strict=True)))


def assign(boxed: Sequence[Path], classed: Sequence[Path], group: Mapping[Path, int]) -> dict[str, dict[str, int]]:
    """Every picture to its side, given its group. Raises ValueError where one group has two classes that would be parted.

    The classifier stands on the detector's trunk, so nobody whose boxes teach may judge the class, and nobody who judges boxes
    may teach it.
    """
    sides: dict[str, dict[str, int]] = {name: {} for name in SIDES}
    judged = {group[p] for p in boxed if p.parent.parent.name == "valid"}
    for path in boxed:
        number = group[path]
        if path.parent.parent.name == "valid":
            side = "boxes_test"
        elif number in judged:
            side = "boxes_withdrawn"
        else:
            first = min(radiographs.digest(p) for p in boxed if group[p] == number)
            chooses = hashlib.sha256(f"{SEED} {first}".encode()).digest()[0] % VALIDATION_SHARE == 0
            side = "boxes_validation" if chooses else "boxes_train"
        sides[side][radiographs.digest(path)] = number
    taught = {*sides["boxes_train"].values(), *sides["boxes_validation"].values()}
    rng = np.random.default_rng(SEED)
    for kind in radiographs.CLASSES:
        own = [p for p in classed if p.parent.name == kind]
        numbers = sorted({group[p] for p in own})
        wanted, taken = round(len(own) / TEST_SHARE), 0
        for i in rng.permutation(len(numbers)):
            members = [p for p in own if group[p] == numbers[i]]
            drawn = taken + len(members) <= wanted
            taken += len(members) if drawn else 0
            side = "class_test" if drawn else "class_train"
            if drawn and numbers[i] in taught:
                side = "class_train"
            elif not drawn and numbers[i] in judged:
                side = "class_withdrawn"
            for path in members:
                sides[side][radiographs.digest(path)] = numbers[i]
    shared = set(sides["class_train"].values()) & set(sides["class_test"].values())
    if shared:
        raise ValueError(f"groups {sorted(shared)} are on both sides of the classes")
    return sides


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m calibration.radiographs", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds spine_xray_ap/ and spine_xray_class/")
    parser.add_argument("--out", type=Path, default=radiographs.SPLIT_FILE)
    args = parser.parse_args(argv)
    sides = make_split(args.data)
    text = json.dumps({"seed": SEED, "alike": ALIKE, "sides": {k: dict(sorted(v.items())) for k, v in sides.items()}}, indent=0)
    part = args.out.with_suffix(".part")
    part.write_text(text + "\n")
    part.replace(args.out)
    for side, members in sides.items():
        print(f"{side}: {len(members)} pictures of {len(set(members.values()))} groups", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
