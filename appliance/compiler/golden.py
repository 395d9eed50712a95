"""Making golden inputs: which inputs, which places of the outputs, and how much an engine of one target may differ.

The tolerance comes from the engine's graph computed as it is written, not from whatever this machine's kernels make of it: a
CPU whose 8-bit products saturate would otherwise write its own error into the tolerance and be accepted for it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from appliance.compiler.subject import Array
from appliance.compiler.verdict import Verdict
from appliance.errors import CalibrationInvalid
from appliance.golden import MAX_INPUTS, MAX_VALUES, Expected, Golden, Tolerance, accept
from models.evaluate import Runner

SEED = 20261124
MAX_BYTES = 200_000  # of one file; the first input is always kept
MARGIN = 1.5  # measured difference to tolerance: runtimes round in different places
LARGEST_OF_FEW = 3.0  # standard deviations: what the largest of a few hundred roundings comes to, wherever this sample's largest lay
HALF_STEP = 2.0**-11  # relative rounding of float16
LARGEST_HALF = 65504.0
TINY = 1e-30


def make(
    inputs: Sequence[Array],
    fp32: Runner,
    as_written: Runner,
    *,
    target: str,
    input_name: str = "image",
    margin: float = MARGIN,
    max_bytes: int = MAX_BYTES,
) -> Golden:
    """Golden inputs of one target: as many of `inputs` (equal shapes, batch 1) as fit into `max_bytes`, one at least.

    `fp32` gives the expected outputs; `as_written` runs the target's own graph with reference arithmetic. Both get the inputs
    rounded to 256 levels over their common range, which are the golden inputs from then on. Raises CalibrationInvalid for no
    input, inputs that are not alike, or outputs that are not finite or beyond half precision.
    """
    if not inputs:
        raise CalibrationInvalid("golden inputs need at least one image")
    given = [np.asarray(x, np.float32) for x in inputs[:MAX_INPUTS]]
    if len({x.shape for x in given}) != 1 or not all(np.isfinite(x).all() for x in given):
        raise CalibrationInvalid("golden inputs have one shape and finite values", value=sorted({x.shape for x in given}))
    low, high = min(float(x.min()) for x in given), max(float(x.max()) for x in given)
    step = float(np.float32((high - low) / 255 or 1.0))
    low = float(np.float32(low))
    levels = np.stack([np.clip(np.round((x - low) / step), 0, 255).astype(np.uint8) for x in given])
    best = _measured(levels[:1], low, step, fp32, as_written, target, input_name, margin)
    count = 1
    while count < len(levels):
        more = _measured(levels[: count + 1], low, step, fp32, as_written, target, input_name, margin)
        if len(more.to_bytes()) > max_bytes:
            break
        best, count = more, count + 1
    return best


def _measured(
    levels: np.ndarray[tuple[int, ...], np.dtype[np.uint8]],
    low: float,
    step: float,
    fp32: Runner,
    as_written: Runner,
    target: str,
    input_name: str,
    margin: float,
) -> Golden:
    bare = Golden(input_name, low, step, levels, {}, target)
    feeds = [bare.feed(i) for i in range(len(levels))]
    reference, engine = [fp32(f) for f in feeds], [as_written(f) for f in feeds]
    outputs: dict[str, Expected] = {}
    for name in sorted(reference[0]):
        flat = np.stack([r[name].reshape(-1) for r in reference])
        other = np.stack([e[name].reshape(-1) for e in engine])
        if not np.isfinite(flat).all() or not np.isfinite(other).all() or np.abs(flat).max() > LARGEST_HALF:
            raise CalibrationInvalid("a golden output is not finite or beyond half precision", value=name)
        places = _places(flat, name)
        values = flat[:, places].astype(np.float16)
        difference = other[:, places].astype(np.float64) - values.astype(np.float64)
        # Even an engine equal to FP32 lies half a step of float16 away.
        floor = HALF_STEP * float(np.abs(flat).max()) + 1e-5
        rms = float(np.sqrt((difference**2).mean()))
        # A grader's logits are a hundred values: their largest difference is a matter of luck, their spread is not.
        largest = max(float(np.abs(difference).max()), LARGEST_OF_FEW * rms)
        tolerance = Tolerance(margin * largest + floor, margin * rms + floor)
        outputs[name] = Expected(tuple(reference[0][name].shape), places.astype(np.uint32), values, tolerance)
    return Golden(input_name, low, step, levels, outputs, target)


def _places(flat: np.ndarray[tuple[int, ...], np.dtype[np.float32]], name: str) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    """All places, or MAX_VALUES of them: half where the outputs are largest (where answers are made), half anywhere, seeded."""
    size = flat.shape[1]
    if size <= MAX_VALUES:
        return np.arange(size)
    rng = np.random.default_rng([SEED, *name.encode()])
    largest = np.argsort(-np.abs(flat).max(axis=0), kind="stable")[: MAX_VALUES // 2]
    rest = np.setdiff1d(np.arange(size), largest)
    return np.sort(np.concatenate([largest, rng.choice(rest, MAX_VALUES - largest.size, replace=False)]))


def check(golden: Golden, run: Runner) -> Verdict:
    """The gate: an engine against its golden inputs. The value is its largest difference as a share of the tolerance."""
    found = accept(golden, run)
    shares = [max(f.max_abs / max(f.tolerance.max_abs, TINY), f.rms / max(f.tolerance.rms, TINY)) for f in found.outputs.values()]
    worst = max(shares)
    details = {
        n: {"max_abs": _finite(f.max_abs), "rms": _finite(f.rms), "max_abs_limit": f.tolerance.max_abs, "rms_limit": f.tolerance.rms}
        for n, f in found.outputs.items()
    }
    kept = {"target": golden.target, "inputs": len(golden.inputs), "outputs": details}
    return Verdict("golden", found.accepted, found.note, _finite(worst), limit=1.0, details=kept)


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None
