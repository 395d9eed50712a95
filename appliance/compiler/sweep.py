"""How many calibration images are enough: ranges and the quantised network's error on growing prefixes of one set.

Hides what "enough" means. Every prefix is measured, and the network rounded to its ranges runs on images that no prefix holds.
A size is enough where neither it nor any larger one is far from what all images give, in the ranges and in the error. The
rounding is computed in float, so the answer does not depend on the processor: where INT8 products saturate (x86 without VNNI)
that error would drown the one that is looked for.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from appliance.compiler.probe import Loss, Probe
from appliance.compiler.quantise import Ranges, layout, measure_ranges
from appliance.errors import CalibrationInvalid
from appliance.report import DISCLAIMER

SMALLEST = 8
RANGE_TOLERANCE = 0.05  # of a range's width, median over tensors
ERROR_TOLERANCE = 0.10  # of the error with all images
Array = NDArray[np.float32]
Progress = Callable[[str, int, int], None]  # stage, done, total


@dataclass(frozen=True)
class Size:
    """One prefix. `range_change`: how far its ranges are from those of all images, as a share of their width, median over the
    tensors, and `range_change_p95` its 95th percentile. `error`: root of the noise power of the INT8 outputs over the
    variance of the FP32 outputs, on the images held back."""

    images: int
    range_change: float
    range_change_p95: float
    error: float


@dataclass(frozen=True)
class Sweep:
    """`enough`: the smallest size from which on nothing changes by more than the tolerances; None where only all images do."""

    sizes: tuple[Size, ...]
    held_back: int
    enough: int | None

    def to_json(self) -> dict[str, Any]:
        rows = [asdict(s) for s in self.sizes]
        return {"sizes": rows, "held_back": self.held_back, "enough": self.enough, "tolerances": [RANGE_TOLERANCE, ERROR_TOLERANCE]}

    def sentence(self) -> str:
        most = self.sizes[-1].images
        if self.enough is None:
            return f"{most} images are not shown to be enough: the last step still changed the engine. Name more."
        within = f"ranges and error stay within {RANGE_TOLERANCE:.0%} and {ERROR_TOLERANCE:.0%}"
        return f"{self.enough} images are enough: from there to {most}, {within}."


def prefixes(count: int) -> list[int]:
    """8, 16, 32, ... and `count` itself. Raises CalibrationInvalid for fewer than 16: two sizes are needed to compare."""
    if count < 2 * SMALLEST:
        raise CalibrationInvalid(
            f"a size sweep needs at least {2 * SMALLEST} images besides those held back", value=count, remedy="Name more images."
        )
    out = [SMALLEST]
    while out[-1] * 2 < count:
        out.append(out[-1] * 2)
    return [*out, count]


def sweep(model: Any, inputs: Sequence[Array], held_back: Sequence[Array], progress: Progress | None = None) -> Sweep:
    """`model`: float32 ONNX. `inputs`: in an order of which every prefix is a fair sample (`calibration.strata.choose`);
    `held_back`: other patients' inputs, at least one. Raises CalibrationInvalid, GraphUnsupported, BackendFailed.
    """
    sizes = prefixes(len(inputs))
    if not held_back:
        raise CalibrationInvalid("a size sweep needs images that are held back", remedy="Name more images.")
    say = progress or _silent
    plan = layout(model)
    every: list[Ranges] = []
    errors: list[float] = []
    with Probe(plan) as probe:
        loss = Loss(probe, held_back)
        for size in sizes:
            done = 0

            def one_more(size: int = size) -> None:
                nonlocal done
                done += 1
                say(f"ranges of {size} images", done, size)

            every.append(measure_ranges(plan.model, iter(inputs[:size]), one_more))
            say(f"error of {size} images", 0, 1)
            errors.append(float(np.sqrt(loss(every[-1]))))
            say(f"error of {size} images", 1, 1)
    rows = []
    for size, ranges, error in zip(sizes, every, errors, strict=True):
        change = _changes(ranges, every[-1])
        rows.append(Size(size, float(np.median(change)), float(np.percentile(change, 95)), error))
    return Sweep(tuple(rows), len(held_back), enough(rows))


def _silent(stage: str, done: int, total: int) -> None:
    del stage, done, total


def enough(rows: Sequence[Size]) -> int | None:
    """The smallest size that, with every larger one, is within both tolerances of the largest; None where that is the largest."""
    last = rows[-1]
    good = None
    for row in reversed(rows[:-1]):
        if row.range_change > RANGE_TOLERANCE or abs(row.error - last.error) > ERROR_TOLERANCE * max(last.error, 1e-9):
            break
        good = row.images
    return good


def _changes(ranges: Ranges, all_of_them: Ranges) -> NDArray[np.float64]:
    """Of each tensor, the two ends' movement over the width."""
    out = []
    for name, (low, high) in all_of_them.items():
        a, b = ranges.get(name, (0.0, 0.0))
        out.append((abs(a - low) + abs(b - high)) / max(high - low, 1e-12) if high > low else 0.0)
    return np.array(out or [0.0])


def picture(result: Sweep, title: str) -> bytes:
    """PNG: ranges and error against the number of images, on a logarithmic axis."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.2), dpi=120, layout="constrained")
    left = figure.subplots()
    right = left.twinx()
    counts = [s.images for s in result.sizes]
    left.plot(counts, [100 * s.range_change for s in result.sizes], "o-", color="#1b6ca8", label="ranges, median change [%]")
    left.plot(counts, [100 * s.range_change_p95 for s in result.sizes], "o:", color="#1b6ca8", label="ranges, 95th percentile [%]")
    right.plot(counts, [100 * s.error for s in result.sizes], "s-", color="#c1440e", label="INT8 error on held-back images [%]")
    left.axhline(100 * RANGE_TOLERANCE, color="#1b6ca8", linewidth=0.8, alpha=0.5)
    if result.enough is not None:
        left.axvline(result.enough, color="grey", linestyle="--", linewidth=1, label=f"{result.enough} are enough")
    left.set_xscale("log", base=2)
    left.set_xticks(counts, [str(c) for c in counts])
    left.minorticks_off()
    left.set_xlabel("calibration images")
    left.set_ylabel("change of ranges to those of all images [%]", color="#1b6ca8")
    right.set_ylabel("output error [%]", color="#c1440e")
    left.set_ylim(bottom=0)
    right.set_ylim(bottom=0)
    handles = [*left.get_legend_handles_labels()[0], *right.get_legend_handles_labels()[0]]
    left.legend(handles=handles, fontsize=8, loc="upper right")
    left.set_title(title, fontsize=10)
    figure.text(0.99, 0.005, DISCLAIMER, fontsize=6, ha="right", color="grey")
    content = io.BytesIO()
    figure.savefig(content, format="png", metadata={"Software": None})
    return content.getvalue()
