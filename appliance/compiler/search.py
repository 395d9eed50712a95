"""What is ours in quantising: which range for which tensor, which layers are sensitive, and how few of them must stay in float.

Every choice is made by what it does to the network's outputs (`probe.Loss`), on calibration images alone. Which layers stay in
float is then decided by the caller's own measure, and needs no more than log2(layers) of it: the ranking is made once, and only
the length of its head is searched.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from appliance.compiler import adjust
from appliance.compiler import ranges as measured
from appliance.compiler.probe import Loss, Probe, sqnr_db
from appliance.compiler.quantise import Layout, layout
from appliance.compiler.ranges import ESTIMATORS, Array, Histogram, Range, Ranges
from appliance.errors import CalibrationInvalid

Inputs = Callable[[], Iterator[Array]]
Progress = Callable[[int, int], None]
Effort = Literal["full", "quick"]
SCREENED = 2  # images on which a tensor's estimators are compared first
CONFIRMED = 4  # images on which a better one must be better too
MAX_RUNS = 400  # of the screening, so that a deep network costs no more than this
USUAL_VALUES = 3 * 384 * 384  # of an input: a larger one gets fewer runs, because each takes longer
_WORTH = 0.98  # a better loss is at most this much of the one before: less is the noise of rounding
_SAME = 0.02  # ranges that differ by less of their width are one candidate


@dataclass
class Record:
    """The calibration record: what was seen, which range was drawn from it for each tensor, and what each step was worth.

    `losses` are `probe.Loss` values on images that chose nothing; `ranking` is (layer, its loss alone), the worst first.
    """

    histograms: dict[str, Histogram]
    estimators: dict[str, str]
    ranges: Ranges
    losses: dict[str, float] = field(default_factory=dict)
    ranking: list[tuple[str, float]] = field(default_factory=list)
    images: int = 0

    def to_json(self, bins: bool = True) -> dict[str, Any]:
        """Canonical JSON's values; `bins` False leaves the counts out, for a bundle. `from_json` needs them."""
        return {
            "images": self.images,
            "tensors": {
                name: {
                    "range": list(self.ranges[name]),
                    "estimator": self.estimators[name],
                    "seen": h.to_json() if bins else h.summary(),
                }
                for name, h in self.histograms.items()
            },
            "losses": self.losses,
            "ranking": [list(r) for r in self.ranking],
        }

    @classmethod
    def from_json(cls, data: Any) -> Record:
        """Raises CalibrationInvalid for what `to_json` does not give."""
        try:
            tensors = data["tensors"]
            ranges = {name: (float(t["range"][0]), float(t["range"][1])) for name, t in tensors.items()}
            if any(not (math.isfinite(low) and math.isfinite(high) and low <= high) for low, high in ranges.values()):
                raise ValueError("a range is no range")
            estimators = {name: str(t["estimator"]) for name, t in tensors.items()}
            histograms = {name: Histogram.from_json(t["seen"]) for name, t in tensors.items()}
            losses = {str(k): float(v) for k, v in data["losses"].items()}
            ranking = [(str(name), float(loss)) for name, loss in data["ranking"]]
            return cls(histograms, estimators, ranges, losses, ranking, int(data["images"]))
        except (TypeError, KeyError, ValueError, IndexError, AttributeError) as error:
            raise CalibrationInvalid(f"not a calibration record: {error}") from error


@dataclass(frozen=True)
class Prepared:
    """`model` is the adjusted float graph from which both flavours are written with `record.ranges`; `report` is JSON.

    `uncorrected` is the same with the biases that it was trained with. A corrected bias answers the rounding of its layer: where
    that layer is then kept in float, the correction is an error. Mixed precision starts from here, and ends in `corrected`.
    """

    model: Any
    uncorrected: Any
    record: Record
    report: dict[str, Any]


class _Steps:
    """Progress over stages whose lengths are not known beforehand: each has its share of a thousand."""

    def __init__(self, progress: Progress | None) -> None:
        self.progress = progress
        self.begun, self.share, self.total, self.done = 0, 0, 1, 0

    def stage(self, share: int, total: int) -> None:
        self.begun += self.share
        self.share, self.total, self.done = share, max(1, total), 0
        self._say()

    def step(self) -> None:
        self.done = min(self.done + 1, self.total)
        self._say()

    def _say(self) -> None:
        if self.progress:
            self.progress(min(1000, self.begun + self.share * self.done // self.total), 1000)

    def finish(self) -> None:
        if self.progress:
            self.progress(1000, 1000)


# -- estimators ---------------------------------------------------------------------------------------------------------


def candidates(h: Histogram) -> dict[str, Range]:
    """The ranges that the estimators draw, without those that hardly differ from one before them."""
    out: dict[str, Range] = {}
    width = max(h.high, 0.0) - min(h.low, 0.0)
    for name, estimate in ESTIMATORS.items():
        low, high = estimate(h)
        if all(abs(low - a) + abs(high - b) > _SAME * width for a, b in out.values()):
            out[name] = (low, high)
    return out


def _apart(a: Range, b: Range, h: Histogram) -> float:
    """How far two ranges lie apart, as a share of what was seen."""
    return (abs(a[0] - b[0]) + abs(a[1] - b[1])) / max(max(h.high, 0.0) - min(h.low, 0.0), 1e-12)


def choose_estimators(
    loss: Loss, histograms: dict[str, Histogram], step: Callable[[], None] | None = None, *, per_tensor: bool = True
) -> tuple[dict[str, str], Ranges]:
    """For each tensor the estimator that loses least: the best single one for all, then tensor by tensor in the graph's order.

    A change is screened on `SCREENED` images and kept only where it also lowers the loss on all images of `loss`. `per_tensor`
    False stops at the best single one.
    """
    options = {name: candidates(h) for name, h in histograms.items()}
    everywhere = {e: {n: ESTIMATORS[e](h) for n, h in histograms.items()} for e in ESTIMATORS}
    worth = {e: loss(r) for e, r in everywhere.items()}
    order = sorted(ESTIMATORS, key=lambda e: worth[e])  # stable, so that equals keep their order
    start = order[0]
    ranges, chosen = dict(everywhere[start]), dict.fromkeys(histograms, start)
    if not per_tensor:
        return chosen, ranges
    best, screen = worth[start], loss(ranges, SCREENED)
    runs = int(MAX_RUNS * min(1.0, USUAL_VALUES / loss.images[0].size))
    allowed = max(1, runs // (SCREENED * max(1, len(options))))
    tensors = [t for t in loss.probe.plan.activations if t in options]
    if runs < MAX_RUNS:
        # Where estimators agree on a range there is little to choose: the others first, and no more than there is time for.
        differ = {t: max(_apart(r, ranges[t], histograms[t]) for r in options[t].values()) for t in tensors}
        worth_it = sorted(tensors, key=lambda t: -differ[t])[: max(1, runs // SCREENED)]
        tensors = [t for t in tensors if t in set(worth_it)]
    for name in tensors:
        width = max(histograms[name].high, 0.0) - min(histograms[name].low, 0.0)
        others = [(e, options[name][e]) for e in order if e in options[name]]
        others = [(e, r) for e, r in others if abs(r[0] - ranges[name][0]) + abs(r[1] - ranges[name][1]) > _SAME * width]
        found = [(loss(ranges | {name: r}, SCREENED), e, r) for e, r in others[:allowed]]
        found = sorted((f for f in found if f[0] < _WORTH * screen), key=lambda f: (f[0], f[1]))
        for its_screen, estimator, its_range in found[:1]:
            its_loss = loss(ranges | {name: its_range})
            if its_loss < _WORTH * best:
                ranges[name], chosen[name], best, screen = its_range, estimator, its_loss, its_screen
        if step:
            step()
    return chosen, ranges


# -- sensitivity and mixed precision ------------------------------------------------------------------------------------


def rank_layers(loss: Loss, ranges: Ranges, step: Callable[[], None] | None = None) -> list[tuple[str, float]]:
    """Each layer with the loss of quantising it alone, its activations with it; the most sensitive first."""
    out = []
    for name, layer in loss.probe.plan.layers.items():
        out.append((name, loss(ranges, layers=(name,), activations=layer.tensors)))
        if step:
            step()
    return sorted(out, key=lambda r: (-r[1], r[0]))


@dataclass(frozen=True)
class Reverts:
    """`keep` is what must stay in float, or None where not even all layers of the ranking are enough; each trial is a number
    of reverted layers and whether it passed."""

    keep: frozenset[str] | None
    trials: tuple[tuple[int, bool], ...]


def fewest_reverts(
    ranking: Sequence[tuple[str, float]], passes: Callable[[frozenset[str]], bool], *, plain_failed: bool = False
) -> Reverts:
    """The shortest head of the ranking that passes when its layers stay in float.

    `passes` is one validation: it gets the layers to keep and says whether the metric is inside the gate. Bisection, so
    ceil(log2(layers + 1)) calls, and one more for no layer at all unless the caller knows that this failed.
    """
    names = [name for name, _ in ranking]
    trials: list[tuple[int, bool]] = []

    def attempt(count: int) -> bool:
        passed = passes(frozenset(names[:count]))
        trials.append((count, passed))
        return passed

    if not plain_failed and attempt(0):
        return Reverts(frozenset(), tuple(trials))
    low, high = 0, len(names) + 1  # `low` fails, `high` passes or is out of the question
    while high - low > 1:
        middle = (low + high) // 2
        if attempt(middle):
            high = middle
        else:
            low = middle
    return Reverts(frozenset(names[:high]) if high <= len(names) else None, tuple(trials))


# -- all of it ----------------------------------------------------------------------------------------------------------


def spread(inputs: Inputs, total: int, count: int) -> list[Array]:
    """`count` of `total` inputs, evenly spread, in order."""
    wanted = set(np.unique(np.linspace(0, total - 1, min(count, total)).round().astype(int)).tolist())
    return [np.array(x, np.float32) for i, x in enumerate(inputs()) if i in wanted]


def calibrate(model: Any, inputs: Inputs, progress: Progress | None = None, *, keep_float: Collection[str] = ()) -> Record:
    """Histograms of all activations, the estimator of each tensor, the ranking of the layers; the float graph is left alone.

    Raises CalibrationInvalid for no input and for values that are not finite, GraphUnsupported.
    """
    steps = _Steps(progress)
    plan = layout(model, keep_float)
    record = _calibrated(plan, inputs, steps, shares=(350, 500, 150))
    steps.finish()
    return record


def prepare_int8(
    model: Any,
    inputs: Inputs,
    progress: Progress | None = None,
    *,
    keep_float: Collection[str] = (),
    count: int = 0,
    effort: Effort = "full",
) -> Prepared:
    """The single entry: equalise where it helps, calibrate, correct the bias where it helps, rank the layers.

    `inputs` gives the network inputs, 1 x C x H x W float32, anew at each call; `count` is their number where it is known, for
    the progress. `effort` "quick" takes the best single estimator, adjusts nothing, and ranks: where plain INT8 is good enough,
    or a few layers in float make it so, the rest is not worth its time. `model` is left alone. Raises CalibrationInvalid,
    GraphUnsupported, BackendFailed. The same model and inputs give the same answer.
    """
    steps = _Steps(progress)
    steps.stage(50, 1)
    total = count or sum(1 for _ in inputs())
    few = list(measured.checked(spread(inputs, total, CONFIRMED)))
    changes: list[adjust.Change] = []
    adjusted = model
    if effort == "full":
        adjusted, change = adjust.equalise(model, few, keep_float)
        changes.append(change)
    plan = uncorrected = layout(adjusted, keep_float)
    record = _calibrated(plan, inputs, steps, shares=(300, 400, 0), total=total, per_tensor=effort == "full")
    if effort == "full":
        steps.stage(150, adjust.WAVES + 1)
        adjusted, change = adjust.correct_bias(plan, record.ranges, spread(inputs, total, 2 * CONFIRMED), steps.step)
        changes.append(change)
        plan = layout(adjusted, keep_float)
    steps.stage(100, len(plan.layers))
    with Probe(uncorrected) as probe:
        record.ranking = rank_layers(Loss(probe, few[: SCREENED if effort == "full" else 1]), record.ranges, steps.step)
    steps.finish()
    report = {
        "images": record.images,
        "effort": effort,
        "layers": len(plan.layers),
        "tensors": len(plan.activations),
        "estimators": {e: sum(1 for v in record.estimators.values() if v == e) for e in ESTIMATORS},
        "sqnr_db": {k: round(sqnr_db(v), 3) for k, v in record.losses.items()},
        "adjustments": [c.to_json() for c in changes],
    }
    return Prepared(plan.model, uncorrected.model, record, report)


def corrected(model: Any, ranges: Ranges, inputs: Inputs, total: int, keep_float: Collection[str]) -> Any:
    """`Prepared.uncorrected` with the biases of those layers corrected that `keep_float` leaves in eight bits."""
    return adjust.correct_bias(layout(model, keep_float), ranges, spread(inputs, total, 2 * CONFIRMED))[0]


def _calibrated(
    plan: Layout, inputs: Inputs, steps: _Steps, shares: tuple[int, int, int], total: int = 0, per_tensor: bool = True
) -> Record:
    total = total or sum(1 for _ in inputs())
    steps.stage(shares[0], total)
    histograms = measured.collect(plan.model, inputs(), plan.tensors, steps.step)
    steps.stage(shares[1], len(histograms))
    # Evenly spread, then dealt out: what chooses and what checks come from the whole set.
    dealt = spread(inputs, total, 2 * CONFIRMED)
    choosing, checking = dealt[::2], dealt[1::2] or dealt
    if not per_tensor:
        choosing, checking = choosing[:SCREENED], []
    with Probe(plan) as probe:
        loss = Loss(probe, choosing)
        chosen, ranges = choose_estimators(loss, histograms, steps.step, per_tensor=per_tensor)
        losses: dict[str, float] = {}
        if checking:
            check = Loss(probe, checking)
            everywhere = {e: {n: ESTIMATORS[e](h) for n, h in histograms.items()} for e in ESTIMATORS}
            losses = {e: check(r) for e, r in everywhere.items()}
            losses["chosen"] = check(ranges)
            best = min(ESTIMATORS, key=lambda e: (losses[e], list(ESTIMATORS).index(e)))
            # A choice that does not carry over to other images was luck.
            if losses[best] < losses["chosen"]:
                chosen, ranges = dict.fromkeys(histograms, best), everywhere[best]
                losses["chosen"] = losses[best]
        ranking: list[tuple[str, float]] = []
        if shares[2]:
            steps.stage(shares[2], len(plan.layers))
            ranking = rank_layers(Loss(probe, choosing[:SCREENED]), ranges, steps.step)
    return Record(histograms, chosen, ranges, losses, ranking, total)
