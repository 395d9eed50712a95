"""The XAI report card: does the heatmap of an engine still say what the heatmap of FP32 said, and does it say anything at all?

Hides the measures, their sampling and their limits. Three questions, one row for each measure:

    agreement      the same evidence in the same places as FP32: rank correlation, SSIM, overlap, transport, peak
    faithfulness   what it points to matters to the engine's own answer: deletion, insertion, better than a random map
    sense          it points to the anatomy, stays under small changes of the image, depends on the weights, adds up to the logit

A measure that nothing fails measures nothing. So the card also judges engines that are broken on purpose (negative controls);
one that passes makes the card itself void. Maps are compared as they are shown: negative evidence cut off, peak at one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from appliance.compiler.subject import Array, Explained, Explainer, MapSpec
from appliance.compiler.verdict import Verdict
from kernels.heatmap import cam_residual, positive_unit
from models.evaluate import Runner

SEED = 20261124
LEAST_SIDE = 3  # cells: a text line's map has one row, and SSIM looks at 3 x 3 at least
GRID = 64  # cells of the longer side on which maps are compared
COARSE = 8  # cells a side for exact optimal transport: a linear programme of COARSE^4 unknowns
TOP = 0.10  # share of the cells that "the hottest region" means
PEAK_PX = 15.0
PEAK_RIVAL = 0.95  # a place of FP32's map this near to its maximum counts as a peak: a spine has several discs, and a page many lines
REMOVED = (0.0, 0.02, 0.05, 0.10, 0.20, 0.35, 0.50, 0.75, 1.0)  # shares of the image, for deletion and insertion
ROAD_REMOVED = (0.05, 0.10, 0.20, 0.30)
ROAD_SIDE = 96  # pixels a side on which missing pixels are solved for
ROAD_NOISE = 0.01
CONTROL_SAMPLES = 16
POINTING_P = 0.05  # a fall of the pointing game that chance gives more often is none
ROUND = 8  # inputs that deletion and insertion ask at a time, until their limits lie outside their intervals
SURE = 0.95  # of an interval
LARGE_SIDE = 256  # pixels


@dataclass(frozen=True)
class Limits:
    """Every threshold of the card. `docs/gates.md` says what each was measured on."""

    spearman_median: float = 0.98
    spearman_p5: float = 0.95
    ssim_median: float = 0.95
    ssim_p5: float = 0.89
    overlap_median: float = 0.87
    overlap_p5: float = 0.65
    transport_px: float = 2.0
    peak_share: float = 0.90
    deletion_rise: float = 0.02
    insertion_fall: float = 0.02
    road_p: float = 0.01
    pointing_fall: float = 0.10
    mass_fall: float = 0.02
    stability_fall: float = 0.02
    randomised_last: float = 0.85
    randomised_half: float = 0.50
    residual: float = 1e-2


# A dense head shows evidence in a few cells: ranks and overlap of its worst maps are of a handful of cells and say nothing, so
# they are measured and not limited; one cell of the detector's map is 8 px.
LIMITS: dict[str, Limits] = {
    "class-evidence": Limits(spearman_median=0.90, spearman_p5=-1.0, overlap_p5=0.0, transport_px=8.0, peak_share=0.90, stability_fall=0.05)
}


@dataclass(frozen=True)
class Effort:
    """How much is measured: evaluation inputs at most for each part. The parts that run the network often get fewer; `faithfulness`
    is asked in rounds and ends as soon as its intervals leave no doubt."""

    agreement: int = 200
    faithfulness: int = 64
    road: int = 24
    stability: int = 16
    randomised: int = 40
    transport: int = 16

    @classmethod
    def of(cls, input_hw: tuple[int, int]) -> Effort:
        """A network of large images runs ten times as long, so it is asked less often."""
        return cls() if max(input_hw) <= LARGE_SIDE else cls(40, 40, 16, 8, 8, 16)


@dataclass(frozen=True)
class Row:
    """One line of the card. `passed` None: could not be judged, `note` says why. `fp32` is the same measure of FP32, where it has one.

    `at_least` says on which side of `limit` a good value lies.
    """

    name: str
    value: float | None
    limit: float
    at_least: bool
    passed: bool | None
    note: str = ""
    fp32: float | None = None


@dataclass(frozen=True)
class Control:
    """An engine broken on purpose. `caught` names the rows that it failed; None where it could not be made here."""

    name: str
    caught: tuple[str, ...] | None
    note: str = ""


@dataclass(frozen=True)
class Card:
    """The whole report card of one engine. `images` and `patients` were judged; `undefined` of FP32's maps hold no evidence."""

    kind: str
    layer: str
    images: int
    patients: int
    undefined: int
    rows: tuple[Row, ...]
    controls: tuple[Control, ...]
    note: str = ""

    @property
    def broken(self) -> list[str]:
        """Negative controls that the card let through."""
        return [c.name for c in self.controls if c.caught == ()]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class _Case:
    """One sample with what FP32 says of it."""

    sample: Explained
    target: int
    outputs: dict[str, Array]
    map: Array


@dataclass
class Agreement:
    """Of two maps. The worst of each where the second map holds no evidence."""

    spearman: float = -1.0
    ssim: float = 0.0
    overlap: float = 0.0
    peak_px: float = float("inf")


# -- maps -----------------------------------------------------------------------------------------------------------


def defined(raw: Array) -> bool:
    """Whether a map can be shown at all: finite, something positive in it, and not the same everywhere."""
    return bool(raw.size and np.isfinite(raw).all() and raw.max() > 0 and raw.max() - raw.min() > 1e-9 * max(1.0, float(np.abs(raw).max())))


def on_grid(raw: Array, longer: int = GRID) -> Array:
    """h x w -> the same map with `longer` cells on its longer side and LEAST_SIDE on the other at least: by area where it shrinks,
    bilinear where it grows."""
    height, width = raw.shape
    scale = longer / max(height, width)
    size = (max(LEAST_SIDE, round(width * scale)), max(LEAST_SIDE, round(height * scale)))
    if size == (width, height):
        return np.asarray(raw, np.float32)
    return np.asarray(cv2.resize(raw, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR), np.float32)


def spearman(a: Array, b: Array) -> float:
    """Rank correlation; 0 where one of the two is constant."""
    from scipy.stats import rankdata

    ra, rb = (rankdata(v.ravel()).astype(np.float64) for v in (a, b))
    ra, rb = ra - ra.mean(), rb - rb.mean()
    length = float(np.sqrt((ra @ ra) * (rb @ rb)))
    return float(ra @ rb) / length if length > 0 else 0.0


def overlap_of_top(a: Array, b: Array, share: float = TOP, rival: float = 1.0) -> float:
    """Intersection over union of the hottest cells. Cells that tie with the last one all belong: a plateau is not sharpened.

    Where less than `share` of a map holds evidence, it is the hottest `share` of those cells. A hot cell of one map is found in the
    other where that is at least `rival` of its own last hot cell: on a plateau that is not quite flat, which cells are the hottest
    is chance.
    """

    def hottest(v: Array) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        limit = float(np.quantile(v, 1.0 - share, method="higher"))
        if limit <= 0 < v.max():
            limit = float(np.quantile(v[v > 0], 1.0 - share, method="higher"))
        return np.asarray(v >= limit), np.asarray(v >= rival * limit)

    (x, near_x), (y, near_y) = hottest(a), hottest(b)
    missed = int((x & ~near_y).sum()) + int((y & ~near_x).sum())
    return 1.0 - missed / int((x | y).sum())


def peak_px(reference: Array, other: Array, input_hw: tuple[int, int]) -> float:
    """Input pixels from the peak of `other` to the nearest peak of `reference`. Of a plateau the farthest cell counts: it could
    be meant as well as any other."""
    step_y, step_x = input_hw[0] / reference.shape[0], input_hw[1] / reference.shape[1]
    scale = np.array([step_y, step_x])
    mine = np.argwhere(other >= other.max() - 1e-6 * float(np.ptp(other))) * scale
    theirs = np.argwhere(reference >= PEAK_RIVAL * reference.max()) * scale
    return float(np.sqrt(((mine[:, None] - theirs[None]) ** 2).sum(-1)).min(1).max())


def transport_px(a: Array, b: Array, input_hw: tuple[int, int]) -> float:
    """Wasserstein-1 distance of two non-negative maps as distributions, in input pixels, exact on COARSE x COARSE cells."""
    from scipy.stats import wasserstein_distance_nd

    def mass(v: Array) -> NDArray[np.float64]:
        return np.asarray(cv2.resize(v, (COARSE, COARSE), interpolation=cv2.INTER_AREA), np.float64).ravel()

    where = np.argwhere(np.ones((COARSE, COARSE), bool)) * np.array([input_hw[0] / COARSE, input_hw[1] / COARSE])
    p, q = mass(a), mass(b)
    return float(wasserstein_distance_nd(where, where, p, q)) if p.sum() > 0 and q.sum() > 0 else float("inf")


def agreement(reference: Array, other: Array, input_hw: tuple[int, int], *, dense: bool = False) -> Agreement:
    """`dense`: the map is the logits of a dense head, so ranks are taken of what is shown; how sure it is that the background
    is background is nobody's evidence."""
    from skimage.metrics import structural_similarity

    if not defined(other):
        return Agreement()
    a, b = on_grid(reference), on_grid(other)
    shown_a, shown_b = positive_unit(a), positive_unit(b)
    window = min(7, min(shown_a.shape) - 1 + min(shown_a.shape) % 2)  # odd, and no larger than the map
    return Agreement(
        spearman(shown_a, shown_b) if dense else spearman(a, b),
        float(structural_similarity(shown_a, shown_b, data_range=1.0, win_size=window)),
        overlap_of_top(shown_a, shown_b, rival=PEAK_RIVAL if dense else 1.0),
        peak_px(shown_a, shown_b, input_hw),
    )


# -- rows -----------------------------------------------------------------------------------------------------------


def _row(name: str, value: float | None, limit: float, at_least: bool, note: str = "", fp32: float | None = None) -> Row:
    if value is None or not np.isfinite(value):
        # An infinite distance is a verdict; a value that is missing is none.
        passed = None if value is None or np.isnan(value) else False
        return Row(name, None, limit, at_least, passed, note or ("beyond any bound" if passed is False else "undefined"), fp32)
    return Row(name, value, limit, at_least, value >= limit if at_least else value <= limit, note, fp32)


def agreement_rows(found: Sequence[Agreement], limits: Limits) -> list[Row]:
    """The rows that compare maps one by one; none where nothing was compared."""
    if not found:
        return []
    of = {k: np.array([getattr(f, k) for f in found]) for k in ("spearman", "ssim", "overlap", "peak_px")}
    p5 = {k: float(np.percentile(of[k], 5)) for k in ("spearman", "ssim", "overlap")}
    return [
        _row("spearman_median", float(np.median(of["spearman"])), limits.spearman_median, True),
        _row("spearman_p5", p5["spearman"], limits.spearman_p5, True),
        _row("ssim_median", float(np.median(of["ssim"])), limits.ssim_median, True),
        _row("ssim_p5", p5["ssim"], limits.ssim_p5, True),
        _row("top10_iou_median", float(np.median(of["overlap"])), limits.overlap_median, True),
        _row("top10_iou_p5", p5["overlap"], limits.overlap_p5, True),
        _row(f"peak_within_{PEAK_PX:.0f}_px", float((of["peak_px"] <= PEAK_PX).mean()), limits.peak_share, True),
    ]


@dataclass
class _Bench:
    """Everything that the parts of one card share."""

    explainer: Explainer
    fp32: Runner
    engine: Runner
    input_name: str
    dense: bool
    cases: list[_Case]
    limits: Limits
    effort: Effort

    def ask(self, run: Runner, x: Array) -> dict[str, Array]:
        return run({self.input_name: np.ascontiguousarray(x, np.float32)})

    def rank(self, a: Array, b: Array) -> float:
        a, b = on_grid(a), on_grid(b)
        return spearman(positive_unit(a), positive_unit(b)) if self.dense else spearman(a, b)

    def hw(self, case: _Case) -> tuple[int, int]:
        return plane_hw(case.sample.x)


def plane_hw(x: Array) -> tuple[int, int]:
    """Rows and columns of a network input, 1 x C x H x W or 1 x H x W x C."""
    return (int(x.shape[1]), int(x.shape[2])) if _channels_last(x) else (int(x.shape[2]), int(x.shape[3]))


def _channels_last(x: Array) -> bool:
    return bool(x.shape[-1] <= 4 < x.shape[1])


def _blend(x: Array, other: Array, where: NDArray[np.bool_]) -> Array:
    """`x` with the pixels of `where` (H x W) taken from `other`."""
    mask = where[None, :, :, None] if _channels_last(x) else where[None, None]
    return np.where(mask, other, x).astype(np.float32)


def _each_channel(x: Array, change: Callable[[Array], Array]) -> Array:
    planes = np.moveaxis(x[0], -1, 0) if _channels_last(x) else x[0]
    out = np.stack([change(np.ascontiguousarray(p)) for p in planes])[None].astype(np.float32)
    return np.moveaxis(out, 1, -1) if _channels_last(x) else out


def _order(raw: Array, hw: tuple[int, int]) -> NDArray[np.int64]:
    """Pixels of the input, hottest first; ties in reading order, so the answer never depends on the machine."""
    size = (hw[1], hw[0])
    return np.argsort(-cv2.resize(raw, size, interpolation=cv2.INTER_LINEAR).ravel(), kind="stable")


def _curve(bench: _Bench, run: Runner, case: _Case, order: NDArray[np.int64], hw: tuple[int, int], insert: bool) -> float:
    """Area under the score as the hottest pixels leave the image, or enter a blurred one (Petsiuk et al., BMVC 2018)."""
    x = case.sample.x
    if insert:
        other = _each_channel(x, lambda p: np.asarray(cv2.GaussianBlur(p, (0, 0), max(hw) / 16), np.float32))
    else:
        other = _each_channel(x, lambda p: np.full_like(p, p.mean()))
    scores = []
    for share in REMOVED:
        where = np.zeros(hw[0] * hw[1], bool)
        where[order[: round(share * order.size)]] = True
        where = where.reshape(hw)
        mixed = _blend(other, x, where) if insert else _blend(x, other, where)
        scores.append(bench.explainer.score(bench.ask(run, mixed), case.target))
    return float(np.trapezoid(scores, REMOVED))


@dataclass(frozen=True)
class Fall:
    """Mean of paired differences of `count` inputs, and half of its SURE interval over patients; infinite below three patients."""

    value: float
    half: float
    count: int

    @classmethod
    def of(cls, differences: Sequence[float], groups: Sequence[int]) -> Fall:
        """Inputs of one patient are not independent: the variance is that of patients' sums, with as many degrees of freedom as
        there are patients less one (Liang and Zeger, Biometrika 73, 1986; Bell and McCaffrey, Survey Methodology 28, 2002)."""
        from scipy.stats import t

        off = np.array(differences, np.float64)
        _, patient = np.unique(np.array(groups), return_inverse=True)
        mean, patients = float(off.mean()), int(patient.max()) + 1
        if patients < 3:
            return cls(mean, float("inf"), off.size)
        sums = np.bincount(patient, off - mean)
        error = float(np.sqrt(patients / (patients - 1) * (sums @ sums))) / off.size
        return cls(mean, float(t.ppf(0.5 + SURE / 2, patients - 1)) * error, off.size)

    def decides(self, limit: float) -> bool:
        """Whether the limit lies outside the interval."""
        return abs(self.value - limit) > self.half

    def row(self, name: str, limit: float, fp32: float) -> Row:
        """Refused where the fall is beyond the limit and more than chance. Where it is beyond the limit and the interval too wide to
        say that, the row is not judged: neither verdict could be told from a throw of dice."""
        wide = self.half > limit
        passed = True if self.value <= limit else False if not wide or self.value > self.half else None
        interval = f"{self.value - self.half:.3f} to {self.value + self.half:.3f}" if np.isfinite(self.half) else "unknown"
        note = f"{SURE:.0%} interval {interval}, {self.count} inputs{', too few to resolve the limit' if wide else ''}"
        return Row(name, self.value, limit, False, passed, note, fp32)


def _deletion_rows(bench: _Bench) -> list[Row]:
    """Each network with its own map: an INT8 map may explain only the INT8 network.

    Inputs are asked ROUND at a time until both limits lie outside their intervals, or there are no more: a clear case is cheap, a
    close one is looked at in full.
    """
    areas: dict[tuple[str, bool], list[float]] = {(who, insert): [] for who in ("fp32", "int8") for insert in (False, True)}
    limits = (bench.limits.deletion_rise, bench.limits.insertion_fall)
    groups: list[int] = []
    falls: list[Fall] = []
    for asked, case in enumerate(bench.cases[: bench.effort.faithfulness], 1):
        hw = bench.hw(case)
        own = bench.explainer.map(bench.ask(bench.engine, case.sample.x), case.target)
        if defined(own):
            groups.append(case.sample.group)
            for who, run, raw in (("fp32", bench.fp32, case.map), ("int8", bench.engine, own)):
                order = _order(raw, hw)
                for insert in (False, True):
                    areas[who, insert].append(_curve(bench, run, case, order, hw, insert))
        if groups and (asked % ROUND == 0 or asked == min(len(bench.cases), bench.effort.faithfulness)):
            gained = np.array(areas["int8", False]) - np.array(areas["fp32", False])
            lost = np.array(areas["fp32", True]) - np.array(areas["int8", True])
            falls = [Fall.of(gained.tolist(), groups), Fall.of(lost.tolist(), groups)]
            if all(f.decides(limit) for f, limit in zip(falls, limits, strict=True)):
                break
    names = ("deletion_rise", "insertion_fall")
    if not falls:
        return [_row(n, None, limit, False, "no map of the engine holds evidence") for n, limit in zip(names, limits, strict=True)]
    before = [float(np.mean(areas["fp32", insert])) for insert in (False, True)]
    return [f.row(n, limit, fp32) for f, n, limit, fp32 in zip(falls, names, limits, before, strict=True)]


def impute(plane: Array, missing: NDArray[np.bool_], rng: np.random.Generator) -> Array:
    """Missing pixels as the noisy weighted mean of their eight neighbours, solved for at once (ROAD: Rong et al., ICML 2022).

    A removed region then carries neither its content nor its outline. Weights are 1/6 for edge neighbours, 1/12 for corner ones.
    """
    from scipy.sparse import csc_matrix
    from scipy.sparse.linalg import spsolve

    height, width = plane.shape
    index = np.full(plane.shape, -1)
    rows, columns = np.nonzero(missing)
    if not rows.size or rows.size == plane.size:
        return np.full_like(plane, plane.mean()) if rows.size else plane.copy()
    index[rows, columns] = np.arange(rows.size)
    right = np.zeros(rows.size)
    weight_sum = np.zeros(rows.size)
    entries: list[tuple[NDArray[np.int64], NDArray[np.int64], float]] = []
    for dy, dx in ((dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1) if dy or dx):
        weight = 1 / 6 if not (dy and dx) else 1 / 12
        y, x = rows + dy, columns + dx
        inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
        own = np.flatnonzero(inside)
        weight_sum[own] += weight
        neighbour = index[y[own], x[own]]
        known = neighbour < 0
        right[own[known]] += weight * plane[y[own[known]], x[own[known]]]
        entries.append((own[~known], neighbour[~known], -weight))
    diagonal = np.arange(rows.size)
    values = np.concatenate([weight_sum, *(np.full(r.size, w) for r, _, w in entries)])
    i = np.concatenate([diagonal, *(r for r, _, _ in entries)])
    j = np.concatenate([diagonal, *(c for _, c, _ in entries)])
    solved = spsolve(csc_matrix((values, (i, j)), shape=(rows.size, rows.size)), right)
    out = plane.copy()
    out[rows, columns] = solved + rng.normal(0, ROAD_NOISE, rows.size)
    return out


def _removed(x: Array, where: NDArray[np.bool_], rng: np.random.Generator) -> Array:
    """`where` is on a small grid of ROAD_SIDE at most; only its pixels change."""
    height, width = plane_hw(x)

    def change(plane: Array) -> Array:
        small = np.asarray(cv2.resize(plane, (where.shape[1], where.shape[0]), interpolation=cv2.INTER_AREA), np.float32)
        return np.asarray(cv2.resize(impute(small, where, rng), (width, height), interpolation=cv2.INTER_LINEAR), np.float32)

    full = cv2.resize(where.astype(np.uint8), (width, height), interpolation=cv2.INTER_NEAREST) > 0
    return _blend(x, _each_channel(x, change), full)


def _road_row(bench: _Bench) -> Row:
    """Where FP32's own map is no better than a random one, the engine is not to blame: the row is not judged, and says so."""
    p, note = _road(bench, bench.engine)
    if p is not None and p > bench.limits.road_p:
        reference, _ = _road(bench, bench.fp32)
        if reference is not None and reference > bench.limits.road_p:
            why = f"FP32's map is no better than a random one either (p {reference:.2g}, INT8 {p:.2g})"
            return _row("road_p", None, bench.limits.road_p, False, why, reference)
    return _row("road_p", p, bench.limits.road_p, False, note)


def _road(bench: _Bench, run: Runner) -> tuple[float | None, str]:
    """Mean score left after the hottest pixels are removed, by a network's map against a random one of the same values.

    A random map is the same map with its cells shuffled: equally rough, equally peaked, only elsewhere.
    """
    from scipy.stats import wilcoxon

    rng = np.random.default_rng(SEED)
    real: list[float] = []
    random: list[float] = []
    for case in bench.cases[: bench.effort.road]:
        own = bench.explainer.map(bench.ask(run, case.sample.x), case.target)
        if not defined(own):
            continue
        hw = bench.hw(case)
        scale = min(1.0, ROAD_SIDE / max(hw))
        small = (max(8, round(hw[0] * scale)), max(8, round(hw[1] * scale)))
        coarse = on_grid(own, 16) if max(own.shape) > 16 else own  # cells that are shuffled
        for raw, scores in ((own, real), (rng.permutation(coarse.ravel()).reshape(coarse.shape), random)):
            order = _order(raw, small)
            left = []
            for share in ROAD_REMOVED:
                where = np.zeros(order.size, bool)
                where[order[: round(share * order.size)]] = True
                left.append(bench.explainer.score(bench.ask(run, _removed(case.sample.x, where.reshape(small), rng)), case.target))
            scores.append(float(np.mean(left)))
    gain = np.array(random) - np.array(real)
    if len(gain) < 8 or not np.any(gain):
        return None, f"{len(gain)} maps are too few for a paired test, 8 are needed"
    p = float(wilcoxon(gain, alternative="greater").pvalue)
    return p, f"score falls {float(gain.mean()):.3f} further than by a random map, {len(gain)} maps"


def _truth_rows(bench: _Bench) -> list[Row]:
    """Pointing game (Zhang et al., IJCV 2018) and relevance mass (Arras et al., Information Fusion 2022) in the truth region."""
    hits: dict[str, list[float]] = {"fp32": [], "int8": []}
    mass: dict[str, list[float]] = {"fp32": [], "int8": []}
    for case in bench.cases[: bench.effort.agreement]:
        truth = case.sample.truth
        if truth is None or not truth.any():
            continue
        size = (truth.shape[1], truth.shape[0])
        own = bench.explainer.map(bench.ask(bench.engine, case.sample.x), case.target)
        for who, raw in (("fp32", case.map), ("int8", own)):
            if not defined(raw):
                hits[who].append(0.0)
                mass[who].append(0.0)
                continue
            shown = positive_unit(np.asarray(cv2.resize(raw, size, interpolation=cv2.INTER_LINEAR), np.float32))
            hits[who].append(float(truth[np.unravel_index(int(shown.argmax()), shown.shape)]))
            mass[who].append(float(shown[truth].sum() / max(float(shown.sum()), 1e-12)))
    if not hits["fp32"]:
        why = "no truth region is known for these inputs"
        return [
            _row("pointing_fall", None, bench.limits.pointing_fall, False, why),
            _row("mass_fall", None, bench.limits.mass_fall, False, why),
        ]
    a, b = float(np.mean(mass["fp32"])), float(np.mean(mass["int8"]))
    return [
        _pointing_row(hits, bench.limits.pointing_fall),
        _row("mass_fall", a - b, bench.limits.mass_fall, False, f"INT8 {b:.3f}, FP32 {a:.3f}", a),
    ]


def _pointing_row(hits: Mapping[str, Sequence[float]], limit: float) -> Row:
    """Hits are yes or no, and a few dozen of them step over the limit by one peak: a fall counts where it is also more than chance.

    Exact one-sided McNemar test on the inputs that only one of the two hits (Biometrics 1947 gave the pairing, the binomial is exact).
    """
    from scipy.stats import binomtest

    fp32, int8 = np.array(hits["fp32"]), np.array(hits["int8"])
    lost, won = int(((fp32 > 0) & (int8 <= 0)).sum()), int(((fp32 <= 0) & (int8 > 0)).sum())
    a, b = float(fp32.mean()), float(int8.mean())
    p = float(binomtest(lost, lost + won, 0.5, alternative="greater").pvalue) if lost + won else 1.0
    note = f"INT8 {b:.3f}, FP32 {a:.3f}; lost {lost}, won {won}, p {p:.2g}"
    return Row("pointing_fall", a - b, limit, False, a - b <= limit or p > POINTING_P, note, a)


def _changes(rng: np.random.Generator) -> dict[str, Callable[[Array], Array]]:
    """Small changes of an image that change no diagnosis; each acts on one H x W plane, whatever its range."""

    def gamma(power: float) -> Callable[[Array], Array]:
        def change(p: Array) -> Array:
            low, high = float(p.min()), float(p.max())
            return low + (high - low) * ((p - low) / max(high - low, 1e-12)) ** power

        return change

    def noise(p: Array) -> Array:
        return p + rng.normal(0, 0.01 * max(float(np.ptp(p)), 1e-12), p.shape).astype(np.float32)

    return {"gamma": gamma(1.02), "gamma_down": gamma(0.98), "shift": lambda p: np.roll(p, (2, 2), (0, 1)), "noise": noise}


def _stability_rows(bench: _Bench) -> list[Row]:
    """Rank correlation of a network's map with its own map after a small change, INT8 beside FP32."""
    rng = np.random.default_rng(SEED)
    found: dict[tuple[str, str], list[float]] = {}
    for case in bench.cases[: bench.effort.stability]:
        hw = bench.hw(case)
        own = bench.explainer.map(bench.ask(bench.engine, case.sample.x), case.target)
        for name, change in _changes(rng).items():
            x = _each_channel(case.sample.x, change)
            for who, run, raw in (("fp32", bench.fp32, case.map), ("int8", bench.engine, own)):
                moved = bench.explainer.map(bench.ask(run, x), case.target)
                a, b = (np.asarray(cv2.resize(m, (hw[1], hw[0])), np.float32) for m in (raw, moved))
                if name == "shift":
                    a, b = a[4:-6, 4:-6], b[6:-4, 6:-4]
                value = bench.rank(a, b) if np.isfinite(b).all() and np.isfinite(a).all() else 0.0
                found.setdefault((who, name.partition("_")[0]), []).append(value)
    rows: list[Row] = []
    for name in ("gamma", "shift", "noise"):
        before, after = (float(np.median(found[who, name])) for who in ("fp32", "int8"))
        note = f"INT8 {after:.3f}, FP32 {before:.3f}"
        rows.append(_row(f"stability_{name}_fall", before - after, bench.limits.stability_fall, False, note, before))
    return rows


def _randomised_rows(bench: _Bench, model: Any | None, open_float: Callable[[bytes], Runner] | None, output: str | None) -> list[Row]:
    """Sanity check of Adebayo et al. (NeurIPS 2018): a map that stays when the weights are shuffled explains no network.

    Weights are shuffled from the output downwards: the last convolution or linear layer, then the upper half of them.
    """
    names = ("randomised_last", "randomised_half")
    if model is None or open_float is None or output is None:
        return [_row(n, None, getattr(bench.limits, n), False, "the float graph was not given") for n in names]
    rows: list[Row] = []
    for name, share in zip(names, (0.0, 0.5), strict=True):
        run = open_float(randomised(model, share, output))
        values = []
        for case in bench.cases[: bench.effort.randomised]:
            raw = bench.explainer.map(bench.ask(run, case.sample.x), case.target)
            values.append(abs(bench.rank(case.map, raw)) if np.isfinite(raw).all() else 0.0)
        rows.append(_row(name, float(np.median(values)), getattr(bench.limits, name), False))
    return rows


def _residual_row(bench: _Bench, spec: MapSpec) -> Row | None:
    if spec.kind != "cam" or spec.cam_bias is None or spec.output is None:
        return None
    bias = np.asarray(spec.cam_bias, np.float32)
    worst = 0.0
    for case in bench.cases[: bench.effort.agreement]:
        outputs = bench.ask(bench.engine, case.sample.x)
        cam = outputs[spec.output][0]
        logits = [v[0] for k, v in outputs.items() if k != spec.output and v.shape == (1, bias.size)]
        if len(logits) != 1:
            return _row("residual", None, bench.limits.residual, False, "no single output holds the logits of the map's classes")
        found = _off(bench.explainer, cam, bias, logits[0])
        worst = max(worst, found) if np.isfinite(found) else float("inf")
    return _row("residual", worst, bench.limits.residual, False)


def _off(explainer: Explainer, cam: Array, bias: Array, given: Array) -> float:
    """How far the map is from adding up to what the graph gives out: logits, or the probabilities made from them."""
    from appliance.compiler.explainers import ClassifierExplainer, sigmoid, softmax

    if not isinstance(explainer, ClassifierExplainer) or not explainer.probabilities:
        return float(cam_residual(cam, bias, given))
    logits = cam.mean(axis=(1, 2)) + bias
    return float(np.abs((softmax(logits) if explainer.exclusive else sigmoid(logits)) - given).max())


# -- broken on purpose ----------------------------------------------------------------------------------------------


def randomised(model: Any, share: float, output: str, seed: int = SEED) -> bytes:
    """A copy of an ONNX graph with the weights of the last `share` of the convolutions and linear layers that `output` is made
    by shuffled, one at least."""
    from onnx import ModelProto, numpy_helper

    out = ModelProto()
    out.CopyFrom(model)
    weights = {t.name: t for t in out.graph.initializer}
    needed = {output}
    above = []
    for node in reversed(out.graph.node):
        if needed.intersection(node.output):
            needed.update(node.input)
            above.append(node)
    layers = [n.input[1] for n in reversed(above) if n.op_type in ("Conv", "Gemm", "MatMul") and len(n.input) > 1 and n.input[1] in weights]
    rng = np.random.default_rng(seed)
    for name in layers[-max(1, round(share * len(layers))) :]:
        values = numpy_helper.to_array(weights[name])
        weights[name].CopyFrom(numpy_helper.from_array(rng.permutation(values.ravel()).reshape(values.shape), name))
    return bytes(out.SerializeToString(deterministic=True))


def permuted(model: Any, output: str, seed: int = SEED) -> bytes | None:
    """A copy of a graph whose convolution of `output` reads its input channels in a wrong order; None where no stored weight makes it."""
    from onnx import ModelProto, numpy_helper

    out = ModelProto()
    out.CopyFrom(model)
    weights = {t.name: t for t in out.graph.initializer}
    maker = next((n for n in out.graph.node if output in n.output), None)
    if maker is None or maker.op_type != "Conv" or maker.input[1] not in weights:
        return None
    values = numpy_helper.to_array(weights[maker.input[1]])
    order = np.random.default_rng(seed).permutation(values.shape[1])
    weights[maker.input[1]].CopyFrom(numpy_helper.from_array(np.ascontiguousarray(values[:, order]), maker.input[1]))
    return bytes(out.SerializeToString(deterministic=True))


def clipped(quantised: Any, inputs: Sequence[dict[str, Array]], open_graph: Callable[[bytes], Runner], percentile: float = 95.0) -> bytes:
    """A copy of a Q/DQ graph whose activations are clipped at a percentile of what they are on `inputs`: a bad calibration.

    Only unsigned 8-bit quantisers with a stored scale are narrowed; weights stay.
    """
    from onnx import ModelProto, TensorProto, helper, numpy_helper

    probe = ModelProto()
    probe.CopyFrom(quantised)
    stored = {t.name: t for t in probe.graph.initializer}
    activations = {
        n.input[0]: (n.input[1], n.input[2])
        for n in probe.graph.node
        if n.op_type == "QuantizeLinear" and n.input[0] not in stored and n.input[1] in stored and len(n.input) > 2 and n.input[2] in stored
    }
    known = {o.name for o in probe.graph.output} | {i.name for i in probe.graph.input}
    probe.graph.output.extend(helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in activations if n not in known)
    run = open_graph(bytes(probe.SerializeToString()))
    seen: dict[str, float] = {}
    for feed in inputs:
        values = {**feed, **run(feed)}
        for name in activations:
            seen[name] = max(seen.get(name, 0.0), float(np.percentile(values[name], percentile)))
    out = ModelProto()
    out.CopyFrom(quantised)
    tensors = {t.name: t for t in out.graph.initializer}
    for name, (scale_name, zero_name) in activations.items():
        scale, zero = numpy_helper.to_array(tensors[scale_name]), numpy_helper.to_array(tensors[zero_name])
        high = float(scale) * (255 - int(zero))
        if zero.dtype != np.uint8 or high <= 0:
            continue
        narrow = np.asarray(float(scale) * min(1.0, max(seen[name], 0.01 * high) / high), np.float32)
        tensors[scale_name].CopyFrom(numpy_helper.from_array(narrow.reshape(scale.shape), scale_name))
    return bytes(out.SerializeToString(deterministic=True))


def _simulated(bench: _Bench, spec: MapSpec) -> dict[str, Callable[[_Case], Array | None]]:
    """Broken engines that need no graph: FP32's own answers, spoilt."""

    def clip(case: _Case) -> Array:
        values = case.outputs.get(spec.output or "")
        if values is None:
            return np.minimum(case.map, np.percentile(case.map, 95)).astype(np.float32)
        # One range for all channels, as a quantiser has it.
        narrow = np.minimum(values, np.percentile(values, 95)).astype(np.float32)
        return bench.explainer.map({**case.outputs, str(spec.output): narrow}, case.target)

    def permute(case: _Case) -> Array | None:
        values = case.outputs.get(spec.output or "")
        if values is None or values.ndim != 4 or min(values.shape[1], values.shape[-1]) < 2:
            return None
        axis = -1 if values.shape[-1] < min(values.shape[1:3]) else 1
        return bench.explainer.map({**case.outputs, str(spec.output): np.roll(values, 1, axis=axis)}, case.target)

    return {"map's range clipped at p95": clip, "map of another channel": permute}


def _controls(bench: _Bench, spec: MapSpec, engines: Mapping[str, Runner]) -> list[Control]:
    some = bench.cases[:CONTROL_SAMPLES]
    makers: dict[str, Callable[[_Case], Array | None]] = dict(_simulated(bench, spec))
    for name, run in engines.items():
        makers[name] = lambda case, run=run: bench.explainer.map(bench.ask(run, case.sample.x), case.target)  # type: ignore[misc]
    out = []
    for name, make in makers.items():
        maps = [make(case) for case in some]
        if any(m is None for m in maps):
            out.append(Control(name, None, "the map's output has no channels to permute"))
            continue
        rows = agreement_rows(
            [agreement(c.map, m, bench.hw(c), dense=bench.dense) for c, m in zip(some, maps, strict=True) if m is not None], bench.limits
        )
        out.append(Control(name, tuple(r.name for r in rows if r.passed is False)))
    return out


# -- the card -------------------------------------------------------------------------------------------------------


def report_card(
    explainer: Explainer,
    fp32: Runner,
    engine: Runner,
    spec: MapSpec,
    *,
    input_name: str = "image",
    model: Any | None = None,
    open_float: Callable[[bytes], Runner] | None = None,
    bad_engines: Mapping[str, Runner] | None = None,
    limits: Limits | None = None,
    effort: Effort | None = None,
) -> Card:
    """The card of one engine's heatmap against FP32's, on the explainer's samples.

    `model` is the float graph (for the weight checks), `open_float` opens such a graph's bytes. `bad_engines` are negative
    controls beside the simulated ones: engines that are really broken. Raises what the runners raise.
    """
    samples = list(explainer.samples())
    # Samples come sorted, by class or by patient, and several parts ask the first few: those must be of all kinds.
    samples = [samples[i] for i in np.random.default_rng(SEED).permutation(len(samples))]
    limits = limits or LIMITS.get(spec.kind, Limits())
    effort = effort or (Effort.of(plane_hw(samples[0].x)) if samples else Effort())
    cases: list[_Case] = []
    undefined = 0
    for sample in samples[: effort.agreement]:
        outputs = fp32({input_name: sample.x})
        target = explainer.target(outputs)
        raw = explainer.map(outputs, target)
        if defined(raw):
            cases.append(_Case(sample, target, outputs, raw))
        else:
            undefined += 1
    images, patients = len(cases), len({c.sample.group for c in cases})
    if not cases:
        note = "no FP32 map of these inputs holds evidence" if samples else "there is no input to explain"
        return Card(spec.kind, spec.layer, 0, 0, undefined, (), (), note)
    bench = _Bench(explainer, fp32, engine, input_name, spec.kind == "class-evidence", cases, limits, effort)
    own = [explainer.map(bench.ask(engine, c.sample.x), c.target) for c in cases]
    rows = agreement_rows([agreement(c.map, m, bench.hw(c), dense=bench.dense) for c, m in zip(cases, own, strict=True)], limits)
    transport = [
        transport_px(positive_unit(c.map), positive_unit(m), bench.hw(c)) if defined(m) else float("inf")
        for c, m in list(zip(cases, own, strict=True))[: effort.transport]
    ]
    rows.append(_row("wasserstein1_px_median", float(np.median(transport)), limits.transport_px, False))
    rows += _deletion_rows(bench)
    rows.append(_road_row(bench))
    rows += _truth_rows(bench)
    rows += _stability_rows(bench)
    rows += _randomised_rows(bench, model, open_float, spec.output)
    residual = _residual_row(bench, spec)
    rows += [residual] if residual else []
    controls = dict(bad_engines or {})
    if model is not None and open_float is not None and spec.output is not None:
        wrong = permuted(model, spec.output)
        if wrong is not None:
            controls["permuted channels"] = open_float(wrong)
    return Card(spec.kind, spec.layer, images, patients, undefined, tuple(rows), tuple(_controls(bench, spec, controls)))


def heatmap_gate(card: Card) -> Verdict:
    """Refuses a card with a failed row, and a card that cannot tell good from bad. The value is the count of failed rows."""
    details = card.to_json()
    if card.kind == "unavailable" or not card.rows:
        return Verdict("heatmap", None, card.note or "this graph has no heatmap", details=details)
    failed = [r for r in card.rows if r.passed is False]
    judged = [r for r in card.rows if r.passed is not None]
    if card.broken:
        note = f"the card cannot tell good from bad: it passed {', '.join(card.broken)}"
        return Verdict("heatmap", False, note, float(len(failed)), limit=0.0, details=details)
    if not any(c.caught for c in card.controls):
        return Verdict("heatmap", False, "no negative control could be made, so the card proves nothing", limit=0.0, details=details)
    if failed:
        named = ", ".join(f"{r.name} {_said(r)}" for r in failed)
        return Verdict(
            "heatmap", False, f"{len(failed)} of {len(judged)} rows failed: {named}", float(len(failed)), limit=0.0, details=details
        )
    note = f"{len(judged)} rows passed on {card.images} inputs, {len(card.controls)} negative controls failed as they must"
    return Verdict("heatmap", True, note, 0.0, limit=0.0, details=details)


def _said(row: Row) -> str:
    sign = "<" if row.at_least else ">"
    return f"{row.note} (limit {row.limit:g})" if row.value is None else f"{row.value:.3g} {sign} {row.limit:g}"
