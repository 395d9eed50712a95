"""The gates that compare numbers: the task metric against FP32, every target against one reference, and the latency profile.

Hides what "worse" means. A gate refuses, passes, or says that it could not judge; whether a pass is proven is said beside it,
because few patients prove little. Times are a profile, not a judgement: they belong to the machine, not to the bundle.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from appliance.compiler.subject import Array, Explainer
from appliance.compiler.verdict import Verdict
from kernels.compare import Distance, decided, distance, overlap
from models.evaluate import Runner, Scores, paired_drop

MAX_DROP = 0.01  # of Dice, mAP50 or accuracy
LEAST_FOR_P99, LEAST_FOR_P999 = 100, 1000  # runs: below, the percentile would be the slowest run by another name
Outputs = Mapping[str, Array]


# -- task -----------------------------------------------------------------------------------------------------------


def task_gate(fp32: Scores, int8: Scores, max_drop: float = MAX_DROP, *, strict: bool = False) -> Verdict:
    """How far the main metric fell, on the same resampled patients, against `max_drop` (a share: 0.01 is one point).

    Refused where the measured drop is above the limit, or where its 95 % interval lies above it. Passed and proven where the
    whole interval lies at or below the limit; passed, not proven, where the interval reaches above it: with few patients most
    honest engines stand there. `strict` refuses what is not proven. No verdict where the metric could not be measured.
    ValueError where the two are not of the same samples.
    """
    main = fp32[fp32.main]
    kept = {"metric": main.name, "images": main.images, "patients": main.patients, "source": fp32.source, "strict": strict}
    if not (math.isfinite(main.value) and math.isfinite(int8[fp32.main].value)):
        return Verdict("task", None, f"{main.name} is undefined on these samples", limit=max_drop, details=kept)
    fall = paired_drop(fp32, int8)
    proven = fall.high <= max_drop
    said = (
        f"{fall.name} fell by {fall.value * 100:.2f} points [{fall.low * 100:.2f}, {fall.high * 100:.2f}] of {max_drop * 100:.2f} allowed"
    )
    if fall.low > max_drop:
        passed, note = False, f"{said}: above the limit with confidence"
    elif fall.value > max_drop:
        passed, note = False, f"{said}: above the limit"
    elif proven:
        passed, note = True, f"{said}: proven"
    else:
        passed, note = not strict, f"{said}: {'refused, because' if strict else 'passed,'} not proven on {fall.patients} patients"
    others = {m.name: asdict(paired_drop(fp32, int8, m.name)) for m in fp32.metrics if m.name != fall.name and math.isfinite(m.value)}
    details = {
        **kept,
        "proven": proven,
        "fp32": _finite(asdict(main)),
        "int8": _finite(asdict(int8[fall.name])),
        "other_metrics": _finite(others),
    }
    return Verdict("task", passed, note, fall.value, fall.low, fall.high, max_drop, details)


def _finite(value: Any) -> Any:
    """NaN and infinity as None: canonical JSON has neither."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# -- parity ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ParityLimit:
    """Bounds on an output's Distance, and on the overlap where it is a map of yes and no (`kernels.compare.decided`). The worst
    input counts, because one wrong answer is one patient."""

    sqnr_db: float
    max_share: float
    cosine: float
    overlap: float


# Proposals, not yet measured over all targets: `docs/gates.md`.
PARITY: dict[str, ParityLimit] = {
    "f32": ParityLimit(60.0, 0.005, 0.9999, 0.999),
    "fp16": ParityLimit(30.0, 0.05, 0.999, 0.99),
    "bf16": ParityLimit(20.0, 0.15, 0.99, 0.97),
    "int8": ParityLimit(15.0, 0.50, 0.97, 0.90),
}


@dataclass(frozen=True)
class HeatmapLimit:
    """Bounds on what a person sees of two maps: median rank correlation, and share of peaks in the same place."""

    spearman: float
    peak_share: float


PARITY_HEATMAP: dict[str, HeatmapLimit] = {
    "f32": HeatmapLimit(0.999, 1.0),
    "fp16": HeatmapLimit(0.99, 0.95),
    "bf16": HeatmapLimit(0.97, 0.90),
    "int8": HeatmapLimit(0.95, 0.85),
}


def parity(
    targets: Mapping[str, Sequence[Outputs]],
    reference: Sequence[Outputs],
    precision: Mapping[str, str],
    *,
    explainer: Explainer | None = None,
    input_hw: tuple[int, int] | None = None,
) -> Verdict:
    """The same inputs over all targets: each target's outputs, in the order of the inputs, against the reference's (FP32).

    `precision` says for each target which row of PARITY holds it. With an explainer and the input's rows and columns the
    heatmaps are compared too, for the class that the reference answers. The value is how many comparisons broke their bound.
    ValueError where a target answered another number of inputs.
    """
    if not reference or not targets:
        return Verdict("parity", None, "there is nothing to compare", limit=0.0)
    report: dict[str, Any] = {}
    broken: list[str] = []
    for target, answers in sorted(targets.items()):
        if len(answers) != len(reference):
            raise ValueError(f"{target} answered {len(answers)} inputs, the reference {len(reference)}")
        limit = PARITY[precision[target]]
        entry: dict[str, Any] = {"precision": precision[target], "limit": asdict(limit), "outputs": {}}
        for name in sorted(reference[0]):
            missing = np.full(1, np.nan, np.float32)
            pairs = [(r[name], a.get(name, missing)) for r, a in zip(reference, answers, strict=True)]
            worst = _worst([distance(*pair) for pair in pairs])
            entry["outputs"][name] = _finite(asdict(worst))
            if all(decided(r) for r, _ in pairs):
                least = min(overlap(*pair) for pair in pairs)
                entry["outputs"][name]["overlap"] = least
                if least < limit.overlap:
                    broken.append(f"{target} {name} (overlap {least:.3f})")
            elif worst.sqnr_db < limit.sqnr_db or worst.max_share > limit.max_share or worst.cosine < limit.cosine:
                broken.append(f"{target} {name} ({worst.sqnr_db:.1f} dB, {worst.max_share:.3f} of the range, cosine {worst.cosine:.4f})")
        if explainer is not None and input_hw is not None:
            entry["heatmap"] = _heatmap(explainer, reference, answers, input_hw, target, precision[target], broken)
        report[target] = entry
    note = f"{len(report)} targets within their bounds on {len(reference)} inputs" if not broken else f"beyond bounds: {'; '.join(broken)}"
    return Verdict("parity", not broken, note, float(len(broken)), limit=0.0, details={"inputs": len(reference), "targets": report})


def _worst(distances: Sequence[Distance]) -> Distance:
    return Distance(
        min(d.sqnr_db for d in distances),
        max(d.max_share for d in distances),
        max(d.rms_share for d in distances),
        min(d.cosine for d in distances),
    )


def _heatmap(
    explainer: Explainer,
    reference: Sequence[Outputs],
    answers: Sequence[Outputs],
    input_hw: tuple[int, int],
    target: str,
    precision: str,
    broken: list[str],
) -> dict[str, Any]:
    from appliance.compiler.xai import PEAK_PX, agreement, defined

    limit = PARITY_HEATMAP[precision]
    found = []
    for r, a in zip(reference, answers, strict=True):
        wanted = explainer.target(dict(r))
        raw = explainer.map(dict(r), wanted)
        if defined(raw):
            found.append(agreement(raw, explainer.map(dict(a), wanted), input_hw))
    if not found:
        return {"maps": 0, "limit": asdict(limit)}
    rank = float(np.median([f.spearman for f in found]))
    peaks = float(np.mean([f.peak_px <= PEAK_PX for f in found]))
    if rank < limit.spearman or peaks < limit.peak_share:
        broken.append(f"{target} heatmap (Spearman {rank:.3f}, {peaks:.0%} of the peaks in place)")
    return {"maps": len(found), "spearman_median": rank, "peak_share": peaks, "limit": asdict(limit)}


# -- latency --------------------------------------------------------------------------------------------------------


def latency_profile(
    run: Runner,
    feed: dict[str, Array],
    cold_open: Callable[[], Runner],
    *,
    runs: int = 200,
    cold_runs: int = 5,
    warm: int = 5,
) -> dict[str, Any]:
    """Milliseconds of one engine on this machine, warm and cold, as JSON for profile.json.

    Cold is from opening the engine to its first answer, in a process that has the runtime loaded already: `cold_open` returns
    the new engine's run. A percentile that the number of runs cannot carry is None: p99 needs 100 runs, p99.9 needs 1000.
    The slowest run stands beside it. ValueError for no runs.
    """
    if runs < 1 or cold_runs < 1:
        raise ValueError("a profile needs at least one run, warm and cold")
    for _ in range(warm):
        run(feed)
    warm_ms = [_timed(lambda: run(feed)) for _ in range(runs)]
    cold_ms, first_ms = [], []
    for _ in range(cold_runs):
        began = time.perf_counter()
        opened = cold_open()
        middle = time.perf_counter()
        opened(feed)
        first_ms.append((time.perf_counter() - middle) * 1e3)
        cold_ms.append((time.perf_counter() - began) * 1e3)
    return {"warm": _percentiles(warm_ms), "cold": _percentiles(cold_ms), "cold_first_run": _percentiles(first_ms)}


def _timed(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return (time.perf_counter() - began) * 1e3


def _percentiles(ms: Sequence[float]) -> dict[str, Any]:
    def at(percent: float, least: int) -> float | None:
        return float(np.percentile(ms, percent)) if len(ms) >= least else None

    return {
        "runs": len(ms),
        "latency_ms_p50": at(50, 1),
        "latency_ms_p99": at(99, LEAST_FOR_P99),
        "latency_ms_p99_9": at(99.9, LEAST_FOR_P999),
        "latency_ms_max": float(max(ms)),
    }
