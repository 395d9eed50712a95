"""What may leave a site of a calibration set: hashes, intensity statistics, counts. And how far two sets are from each other.

Hides the file's form and its checks; it comes from elsewhere, so every number of it is looked at. No pixel, name, date or UID is
in it: what is written is taken from `Image` field by field, and `Image` knows no more of a DICOM header than fixed words.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from appliance.bundle import canonical
from appliance.errors import CalibrationInvalid, UsageError
from calibration.folders import PERCENTS, Image
from calibration.sets import MAX_ITEMS, SEED, CalibrationSet

FORMAT = "spinebox calibration statistics 1"
MAX_BYTES = 32 << 20
SHUFFLES = 400
Values = NDArray[np.float64]
_SHA256 = re.compile(r"[0-9a-f]{64}")


def export(manifest: CalibrationSet, images: Sequence[Image]) -> dict[str, Any]:
    """The statistics of a set, JSON-ready; `images` are those of the manifest, in its order."""
    members = [
        {
            "sha256": sha256,
            "source_sha256": image.source_sha256,
            "rows": image.rows,
            "columns": image.columns,
            "spacing_mm": list(image.spacing_mm) if image.spacing_mm else None,
            "mean": image.mean,
            "contrast": image.contrast,
            "percentiles": list(image.percentiles),
        }
        for sha256, image in zip(manifest.sha256, images, strict=True)
    ]
    return {
        "format": FORMAT,
        "root": manifest.root,
        "preprocess": manifest.preprocess,
        "input": list(manifest.input_hw),
        "percents": list(PERCENTS),
        "strata": dict(sorted(Counter(manifest.strata).items())),
        "images": sorted(members, key=lambda m: str(m["sha256"])),
    }


def read(path: Path) -> dict[str, Any]:
    """Another site's statistics, checked. Raises UsageError where there is no such file, CalibrationInvalid naming the field."""
    try:
        with path.open("rb") as f:
            content = f.read(MAX_BYTES + 1)
    except OSError as error:
        raise UsageError(f"the statistics cannot be read: {error.strerror}", value=path, remedy="Check the name.") from error
    if len(content) > MAX_BYTES:
        raise CalibrationInvalid(f"calibration statistics have at most {MAX_BYTES} bytes", value=path)
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise CalibrationInvalid(f"the statistics are not JSON: {error}", value=path, remedy=_AGAIN) from error
    return check(value)


_AGAIN = "Write them again with `spinebox calibrate --export-statistics`."


def check(value: Any) -> dict[str, Any]:
    """The value, where it is what `export` writes and nothing else. Raises CalibrationInvalid naming the field."""

    def need(field: str, holds: bool, seen: object) -> None:
        if not holds:
            raise CalibrationInvalid(f"the statistics have no valid {field}", value=seen, remedy=_AGAIN)

    top = {"format", "root", "preprocess", "input", "percents", "strata", "images"}
    need("fields", isinstance(value, dict) and set(value) == top, sorted(value) if isinstance(value, dict) else type(value).__name__)
    need("format", value["format"] == FORMAT, value["format"])
    need("root", _hex(value["root"]), value["root"])
    need("percents", value["percents"] == list(PERCENTS), value["percents"])
    need("input", _numbers(value["input"], 2, 0, 1e5), value["input"])
    need("preprocess", isinstance(value["preprocess"], str) and len(value["preprocess"]) <= 200, value["preprocess"])
    images, strata = value["images"], value["strata"]
    need("images", isinstance(images, list) and 1 <= len(images) <= MAX_ITEMS, type(images).__name__)
    counted = isinstance(strata, dict) and all(type(n) is int and n > 0 for n in strata.values())
    need("strata", counted and sum(strata.values()) == len(images), strata)
    keys = {"sha256", "source_sha256", "rows", "columns", "spacing_mm", "mean", "contrast", "percentiles"}
    for at, image in enumerate(images):
        need(f"image {at}", isinstance(image, dict) and set(image) == keys, image)
        need(f"digest of image {at}", _hex(image["sha256"]) and _hex(image["source_sha256"]), image["sha256"])
        need(f"size of image {at}", _numbers([image["rows"], image["columns"]], 2, 1, 1e5), image["rows"])
        need(f"spacing_mm of image {at}", image["spacing_mm"] is None or _numbers(image["spacing_mm"], 2, 0, 100), image["spacing_mm"])
        need(f"mean of image {at}", _numbers([image["mean"], image["contrast"]], 2, -1, 1), image["mean"])
        need(f"percentiles of image {at}", _numbers(image["percentiles"], len(PERCENTS), -1, 1), image["percentiles"])
    checked: dict[str, Any] = value
    return checked


def _hex(value: object) -> bool:
    return isinstance(value, str) and _SHA256.fullmatch(value) is not None


def _numbers(value: object, count: int, low: float, high: float) -> bool:
    return (
        isinstance(value, list)
        and len(value) == count
        and all(isinstance(v, int | float) and not isinstance(v, bool) and low <= v <= high for v in value)
    )


def to_bytes(statistics: dict[str, Any]) -> bytes:
    return canonical(statistics)


# -- comparison -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Difference:
    """How far two sets are apart in one quantity.

    `distance` is the Wasserstein-1 distance in the quantity's own unit; `chance` the 95th percentile of that distance when the
    images of both are dealt out at random; `differs` where the distance is above it.
    """

    quantity: str
    theirs: float  # medians, to read the distance by
    ours: float
    distance: float
    chance: float

    @property
    def differs(self) -> bool:
        return self.distance > self.chance


@dataclass(frozen=True)
class Comparison:
    """`shared`: images that both hold. `strata`: total variation distance of the shares of strata, 0 alike, 1 disjoint."""

    differences: tuple[Difference, ...]
    strata: float
    shared: int
    same_preprocessing: bool

    @property
    def alike(self) -> bool:
        return self.same_preprocessing and not any(d.differs for d in self.differences)

    def to_json(self) -> dict[str, Any]:
        rows = [{**vars(d), "differs": d.differs} for d in self.differences]
        return {
            "alike": self.alike,
            "differences": rows,
            "strata": self.strata,
            "shared": self.shared,
            "same_preprocessing": self.same_preprocessing,
        }


def compare(theirs: dict[str, Any], ours: dict[str, Any], seed: int = SEED) -> Comparison:
    """How far another site's images are from ours, by what both exported.

    Quantities: the intensity distribution (W1 between the mean quantile functions of the normalised pixels), and over the
    images mean, contrast, rows, columns and spacing. Where no image of one side states its spacing it is left out.
    """
    a, b = theirs["images"], ours["images"]
    rng = np.random.default_rng(seed)
    curves = np.array([i["percentiles"] for i in (*a, *b)], np.float64)
    out = [_difference("intensity", curves, len(a), _between_curves, rng)]
    for name, of in _QUANTITIES.items():
        left, right = ([of(i) for i in side] for side in (a, b))
        known = [v for v in left if v is not None], [v for v in right if v is not None]
        if known[0] and known[1]:
            out.append(_difference(name, np.array([*known[0], *known[1]], np.float64)[:, None], len(known[0]), _wasserstein, rng))
    shares = [{k: n / sum(s["strata"].values()) for k, n in s["strata"].items()} for s in (theirs, ours)]
    variation = sum(abs(shares[0].get(k, 0.0) - shares[1].get(k, 0.0)) for k in {*shares[0], *shares[1]}) / 2
    same = (theirs["preprocess"], theirs["input"]) == (ours["preprocess"], ours["input"])
    shared = len({i["source_sha256"] for i in a} & {i["source_sha256"] for i in b})
    return Comparison(tuple(out), round(variation, 6), shared, same)


_QUANTITIES: dict[str, Callable[[dict[str, Any]], float | None]] = {
    "mean": lambda i: float(i["mean"]),
    "contrast": lambda i: float(i["contrast"]),
    "rows": lambda i: float(i["rows"]),
    "columns": lambda i: float(i["columns"]),
    "spacing_mm": lambda i: float(i["spacing_mm"][0]) if i["spacing_mm"] else None,
}


def _difference(name: str, values: Values, count: int, distance: Callable[[Values, Values], float], rng: np.random.Generator) -> Difference:
    """`values` N x K, the first `count` rows theirs. Chance by permutation (Fisher), seeded."""
    seen = distance(values[:count], values[count:])
    dealt = []
    for _ in range(SHUFFLES):
        order = rng.permutation(len(values))
        dealt.append(distance(values[order[:count]], values[order[count:]]))
    middle = values.shape[1] // 2
    return Difference(
        name,
        round(float(np.median(values[:count, middle])), 6),
        round(float(np.median(values[count:, middle])), 6),
        round(seen, 6),
        round(float(np.quantile(dealt, 0.95)), 6),
    )


def _between_curves(a: Values, b: Values) -> float:
    gap = np.abs(a.mean(axis=0) - b.mean(axis=0))
    share = np.array(PERCENTS) / 100
    return float(np.trapezoid(gap, share) / (share[-1] - share[0]))


def _wasserstein(a: Values, b: Values) -> float:
    """W1 of two samples on the line: the area between their distribution functions (Vallender, 1974)."""
    x, y = np.sort(a.ravel()), np.sort(b.ravel())
    both = np.sort(np.concatenate([x, y]))
    steps = np.diff(both)
    left, right = np.searchsorted(x, both[:-1], "right") / len(x), np.searchsorted(y, both[:-1], "right") / len(y)
    return float(np.sum(np.abs(left - right) * steps))
