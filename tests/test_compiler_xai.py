"""The report card: its measures by hand, each row failed by the engine that deserves it, and the card failed by loose limits."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.stats import spearmanr

from appliance import backends
from appliance.backends import Signature
from appliance.compiler import explainers, xai
from appliance.compiler.heatmap import attach_cam
from appliance.compiler.subject import Explained, MapSpec
from appliance.errors import GraphUnsupported
from models import data, grader, phantom
from models.evaluate import Crop, Runner, Slice
from models.export import WEIGHTS, load_float32

Outputs = dict[str, np.ndarray]
SIDE, CELLS = 64, 16
HW = (SIDE, SIDE)
W = np.array([[3.0, -0.5, 2.0, -0.2], [-1.0, 0.3, -0.2, 0.1]], np.float32)
B = np.array([-0.2, 0.1], np.float32)
SPEC = MapSpec("cam", "cam", "toy", cam_bias=tuple(float(b) for b in B))


# -- a toy network whose map is exact: bright blobs are class 0 -----------------------------------------------------


def toy(feed: Outputs) -> Outputs:
    x = cv2.resize(feed["image"][0, 0], (CELLS, CELLS), interpolation=cv2.INTER_AREA)
    smooth = cv2.GaussianBlur(x, (0, 0), 2)
    features = np.stack([np.maximum(v, 0) for v in (x, -x, x - smooth, smooth - x)])
    cam = np.tensordot(W, features, 1).astype(np.float32) * 6
    return {"cam": cam[None], "logits": (cam.mean((1, 2)) + B)[None]}


def blob(seed: int) -> Explained:
    rng = np.random.default_rng(seed)
    y, x = rng.uniform(14, SIDE - 14, 2)
    rows, columns = np.mgrid[:SIDE, :SIDE]
    distance = np.hypot(rows - y, columns - x)
    image = 1.6 * np.exp(-((distance / 7) ** 2)) - 0.1 + cv2.GaussianBlur(rng.normal(0, 0.3, HW), (0, 0), 2)
    return Explained(image.astype(np.float32)[None, None], seed // 2, distance < 10)


SAMPLES = tuple(blob(i) for i in range(24))
EXPLAINER = explainers.ClassifierExplainer(SAMPLES, SPEC, "logits")
EFFORT = xai.Effort(24, 6, 12, 4, 4, 4)


def card(engine: Runner, **more: Any) -> xai.Card:
    return xai.report_card(more.pop("explainer", EXPLAINER), toy, engine, SPEC, effort=EFFORT, **more)


@cache
def good() -> xai.Card:
    return card(toy)


def failed(found: xai.Card) -> set[str]:
    return {r.name for r in found.rows if r.passed is False}


def test_an_equal_engine_passes_and_the_controls_fail() -> None:
    found = good()
    assert failed(found) == set()
    assert found.broken == []
    assert {c.name for c in found.controls} == {"map's range clipped at p95", "map of another channel"}
    assert all(c.caught for c in found.controls)
    assert found.images == 24
    assert found.patients == 12
    verdict = xai.heatmap_gate(found)
    assert verdict.passed is True, verdict.note
    json.dumps(verdict.to_json(), allow_nan=False)


def test_a_slightly_rounded_engine_passes() -> None:
    def rounded(feed: Outputs) -> Outputs:
        out = toy(feed)
        step = float(np.abs(out["cam"]).max()) / 255
        cam = np.round(out["cam"] / step) * step
        return {"cam": cam, "logits": cam.mean((2, 3)) + B}

    assert failed(card(rounded)) == set()


def spoilt(change: Callable[[np.ndarray, np.random.Generator], np.ndarray], consistent: bool = True) -> Runner:
    rng = np.random.default_rng(8)

    def run(feed: Outputs) -> Outputs:
        out = toy(feed)
        cam = np.asarray(change(out["cam"], rng), np.float32)
        return {"cam": cam, "logits": cam.mean((2, 3)) + B if consistent else out["logits"]}

    return run


DESERVES: dict[str, tuple[Runner, set[str]]] = {
    "noise": (
        spoilt(lambda c, rng: c + rng.normal(0, 1.0, c.shape)),
        {"spearman_median", "spearman_p5", "ssim_median", "ssim_p5", "stability_gamma_fall", "stability_noise_fall"},
    ),
    "saturation": (
        spoilt(lambda c, rng: np.minimum(c, np.percentile(c, 90, axis=(2, 3), keepdims=True))),
        {"ssim_p5", "peak_within_15_px"},
    ),
    "moved": (
        spoilt(lambda c, rng: np.roll(c, (6, 6), (2, 3))),
        {
            "peak_within_15_px",
            "wasserstein1_px_median",
            "pointing_fall",
            "mass_fall",
            "top10_iou_median",
            "insertion_fall",
            "road_p",
            "deletion_rise",
        },
    ),
    "turned round": (
        spoilt(lambda c, rng: -c + c.max()),
        {"spearman_median", "insertion_fall", "pointing_fall", "mass_fall"},
    ),
    "shuffled": (
        spoilt(lambda c, rng: rng.permutation(c.reshape(2, -1), axis=1).reshape(c.shape)),
        {
            "spearman_median",
            "top10_iou_p5",
            "stability_gamma_fall",
            "stability_shift_fall",
            "stability_noise_fall",
            "wasserstein1_px_median",
            "road_p",
        },
    ),
    "does not add up": (spoilt(lambda c, rng: c * 1.05, consistent=False), {"residual"}),
    "constant": (spoilt(lambda c, rng: np.full_like(c, 2.0)), {"spearman_median", "peak_within_15_px", "wasserstein1_px_median"}),
    "all zero": (spoilt(lambda c, rng: np.zeros_like(c)), {"spearman_median", "ssim_median", "top10_iou_median", "pointing_fall"}),
    "not a number": (spoilt(lambda c, rng: np.full_like(c, np.nan)), {"spearman_median", "ssim_median", "residual"}),
}


@pytest.mark.parametrize("name", DESERVES)
def test_a_bad_engine_fails_the_rows_that_it_deserves(name: str) -> None:
    engine, deserved = DESERVES[name]
    found = card(engine)
    assert deserved <= failed(found), sorted(deserved - failed(found))
    verdict = xai.heatmap_gate(found)
    assert verdict.passed is False
    text = json.dumps(verdict.to_json(), allow_nan=False)
    assert "NaN" not in text


def test_every_measured_row_is_failed_by_some_engine() -> None:
    rows = {r.name for r in good().rows if r.passed is not None}
    assert rows <= set().union(*(deserved for _, deserved in DESERVES.values()))


def test_a_card_that_passes_a_negative_control_is_itself_refused() -> None:
    """Weaken the limits of agreement and the controls pass: the card says that it is worth nothing, whatever the engine."""
    loose = xai.Limits(-2, -2, -2, -2, -2, -2, 1e9, -1)
    found = card(toy, limits=loose)
    assert set(found.broken) == {"map's range clipped at p95", "map of another channel"}
    verdict = xai.heatmap_gate(found)
    assert verdict.passed is False
    assert "cannot tell good from bad" in verdict.note


def test_a_bad_engine_given_as_control_that_passes_breaks_the_card() -> None:
    found = card(toy, bad_engines={"not bad at all": toy})
    assert found.broken == ["not bad at all"]
    assert xai.heatmap_gate(found).passed is False


def test_a_card_without_controls_proves_nothing() -> None:
    verdict = xai.heatmap_gate(replace(good(), controls=(xai.Control("x", None, "not made"),)))
    assert verdict.passed is False
    assert "no negative control" in verdict.note


# These look at more than their limit: at FP32, or at chance.
OTHERWISE = ("randomised_last", "randomised_half", "road_p", "pointing_fall", "deletion_rise", "insertion_fall")


@pytest.mark.parametrize("name", [f.name for f in fields(xai.Limits) if f.name not in OTHERWISE])
def test_each_limit_reaches_its_row(name: str) -> None:
    """Set out of reach, every single limit refuses even an equal engine."""
    base = xai.Limits()
    at_least = getattr(base, name) > 0.5 and name != "transport_px"
    cheap = xai.Effort(8, 2, 8, 2, 1, 1)
    found = xai.report_card(EXPLAINER, toy, toy, SPEC, limits=replace(base, **{name: 1.01 if at_least else -1.0}), effort=cheap)
    assert len(failed(found)) == (3 if name == "stability_fall" else 1)


def test_every_kind_of_map_has_limits_that_its_controls_fail() -> None:
    """Looser limits of dense heads must still tell a clipped map, and another class's, from the real one."""
    dense = xai.LIMITS["class-evidence"]
    found = card(toy, limits=dense)
    assert found.broken == []
    assert all(c.caught for c in found.controls)
    for name in ("saturation", "moved", "shuffled"):
        assert failed(card(DESERVES[name][0], limits=dense)), name


@pytest.mark.parametrize(
    ("lost", "won", "of", "passed"),
    [(2, 0, 40, True), (5, 0, 40, False), (12, 4, 100, False), (12, 9, 100, True), (0, 0, 9, True), (9, 0, 9, False)],
)
def test_a_fall_of_the_pointing_game_counts_where_it_is_more_than_chance(lost: int, won: int, of: int, passed: bool) -> None:
    both = of - lost - won
    hits = {"fp32": [1.0] * (lost + both) + [0.0] * won, "int8": [0.0] * lost + [1.0] * (both + won)}
    row = xai._pointing_row(hits, 0.02)
    assert row.passed is passed
    assert row.value == pytest.approx((lost - won) / of)
    assert f"lost {lost}, won {won}" in row.note


def test_the_interval_of_a_fall_is_students_over_patients() -> None:
    """One input of each patient: the textbook interval. The same inputs twice over, under the same patients, know no more."""
    differences = [0.03, -0.01, 0.02, 0.00, 0.05, 0.01]
    once = xai.Fall.of(differences, range(6))
    low, high = stats.t.interval(0.95, 5, np.mean(differences), stats.sem(differences))
    assert (once.value - once.half, once.value + once.half) == pytest.approx((low, high))
    twice = xai.Fall.of(differences * 2, [*range(6)] * 2)
    assert (twice.value, twice.half) == pytest.approx((once.value, once.half))
    assert twice.half > xai.Fall.of(differences * 2, range(12)).half
    assert xai.Fall.of([0.1] * 9, [1, 2] * 4 + [1]).half == float("inf")


@pytest.mark.parametrize(
    ("value", "half", "passed"),
    [
        (0.019, 0.01, True),
        (0.021, 0.01, False),  # the limit itself decides, wherever it can be resolved
        (0.021, 0.02, False),
        (0.019, 0.09, True),
        (0.021, 0.0209, False),  # wide, and still more than chance
        (0.079, 0.09, None),
        (0.079, float("inf"), None),
    ],
)
def test_a_fall_beyond_its_limit_refuses_unless_it_may_be_chance(value: float, half: float, passed: bool | None) -> None:
    row = xai.Fall(value, half, 6).row("insertion_fall", 0.02, 0.5)
    assert row.passed is passed
    assert (row.value, row.limit, row.fp32) == (value, 0.02, 0.5)
    assert "6 inputs" in row.note
    assert ("too few" in row.note) == (half > 0.02)


def unsure(spread: float, count: int = 48) -> tuple[explainers.ClassifierExplainer, Runner]:
    """Inputs of as many patients, and an engine that is more sure of one half of them and less of the other, by `spread`."""
    samples = tuple(replace(blob(i), group=i) for i in range(count))
    signs = {s.x.tobytes(): sign for s, sign in zip(samples, np.random.default_rng(1).choice([-1.0, 1.0], count), strict=True)}
    sign = 0.0

    def run(feed: Outputs) -> Outputs:
        nonlocal sign
        sign = signs.get(feed["image"].tobytes(), sign)  # a picture is asked for as it is before it is asked for in part
        out = toy(feed)
        shift = np.array([[sign * spread, -sign * spread]], np.float32)
        return {"cam": out["cam"] + shift[..., None, None], "logits": out["logits"] + shift}

    return explainers.ClassifierExplainer(samples, SPEC, "logits"), run


@pytest.mark.parametrize(("spread", "asked"), [(0.0, 8), (0.05, 16), (2.0, 48)])
def test_inputs_are_asked_until_a_fall_can_be_told_from_chance(spread: float, asked: int) -> None:
    explainer, engine = unsure(spread)
    found = xai.report_card(explainer, toy, engine, SPEC, effort=xai.Effort(48, 48, 8, 1, 1, 1))
    rows = {r.name: r for r in found.rows}
    counts = {int(rows[n].note.split(", ")[1].split()[0]) for n in ("deletion_rise", "insertion_fall")}
    assert counts == {asked}, rows["insertion_fall"]


def test_a_card_asks_inputs_of_all_kinds_first() -> None:
    """Samples come sorted by class; a part that asks six of them must not see one class alone."""
    samples = [replace(blob(i), group=i // 24) for i in range(48)]
    group = {s.x.tobytes(): s.group for s in samples}
    seen: list[int] = []

    def engine(feed: Outputs) -> Outputs:
        seen.extend(group[key] for key in [feed["image"].tobytes()] if key in group)
        return toy(feed)

    explainer = explainers.ClassifierExplainer(tuple(samples), SPEC, "logits")
    xai.report_card(explainer, toy, engine, SPEC, effort=xai.Effort(6, 1, 1, 1, 1, 1))
    assert set(seen[:6]) == {0, 1}


def test_nothing_to_explain_is_not_judged() -> None:
    empty = card(toy, explainer=explainers.ClassifierExplainer((), SPEC, "logits"))
    assert xai.heatmap_gate(empty).passed is None
    blank = (Explained(np.full((1, 1, SIDE, SIDE), -1, np.float32), 0),)
    flat = card(toy, explainer=explainers.ClassifierExplainer(blank, SPEC, "logits"))
    assert flat.undefined == 1
    assert xai.heatmap_gate(flat).passed is None


def test_without_truth_pointing_is_not_judged() -> None:
    bare = tuple(replace(s, truth=None) for s in SAMPLES)
    found = card(toy, explainer=explainers.ClassifierExplainer(bare, SPEC, "logits"))
    rows = {r.name: r for r in found.rows}
    assert rows["pointing_fall"].passed is None
    assert "no truth region" in rows["pointing_fall"].note
    assert xai.heatmap_gate(found).passed is True


def test_the_card_is_the_same_twice() -> None:
    assert card(toy) == good()


# -- measures -------------------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(-5, 5), st.integers(-5, 5)), min_size=3, max_size=30))
def test_spearman_is_scipys(pairs: list[tuple[int, int]]) -> None:
    a, b = (np.array([p[i] for p in pairs], np.float32) for i in (0, 1))
    if np.ptp(a) and np.ptp(b):
        assert xai.spearman(a, b) == pytest.approx(float(spearmanr(a, b).statistic))
    else:
        assert xai.spearman(a, b) == 0.0


def test_overlap_by_hand() -> None:
    a = np.zeros((10, 10), np.float32)
    a[0] = np.arange(1, 11)
    b = np.roll(a, 5, axis=1)
    b[0, :5] = 0
    assert xai.overlap_of_top(a, a) == 1.0
    # ten cells against the hottest of the five that hold anything
    assert xai.overlap_of_top(a, b) == pytest.approx(0.1)


def test_on_a_plateau_a_rival_is_found() -> None:
    rng = np.random.default_rng(0)
    a, b, other = np.zeros((3, 20, 20), np.float32)
    a[:, :5], b[:, :5] = rng.uniform(0.97, 1.0, (2, 20, 5))
    other[:, 10:15] = 1.0
    assert xai.overlap_of_top(a, b) < 0.5  # which of a hundred alike are the hottest forty is chance
    assert xai.overlap_of_top(a, b, rival=0.95) == 1.0
    assert xai.overlap_of_top(a, other, rival=0.95) == 0.0
    b[:10, :5] = 0.5
    assert 0.4 < xai.overlap_of_top(a, b, rival=0.95) < 0.8  # half of the region has gone


def test_a_plateau_has_no_peak_of_its_own() -> None:
    a = np.zeros((8, 8), np.float32)
    a[2, 2] = 1.0
    assert xai.peak_px(a, a, (64, 64)) == 0.0
    flat = a.copy()
    flat[2, 5] = 1.0
    assert xai.peak_px(a, flat, (64, 64)) == 24.0
    assert xai.peak_px(flat, a, (64, 64)) == 0.0  # one of two peaks is a peak


def test_transport_is_the_way_that_the_mass_goes() -> None:
    a, b = np.zeros((2, 8, 8), np.float32)
    a[2, 2], b[2, 5] = 1.0, 4.0
    assert xai.transport_px(a, a, (128, 64)) == pytest.approx(0.0, abs=1e-9)
    assert xai.transport_px(a, b, (128, 64)) == pytest.approx(24.0)
    assert xai.transport_px(a.T.copy(), b.T.copy(), (128, 64)) == pytest.approx(48.0)
    assert xai.transport_px(a, np.zeros_like(a), (64, 64)) == float("inf")


@settings(max_examples=20, deadline=None)
@given(st.floats(-1, 1), st.floats(-0.1, 0.1), st.integers(0, 100))
def test_imputation_continues_a_plane(level: float, slope: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    plane = (level + slope * np.add.outer(np.arange(20.0), 2 * np.arange(20.0))).astype(np.float32)
    missing = rng.random(plane.shape) < 0.4
    missing[[0, -1]] = missing[:, [0, -1]] = False
    filled = xai.impute(plane, missing, rng)
    assert np.array_equal(filled[~missing], plane[~missing])
    assert np.abs(filled - plane).max() < 6 * xai.ROAD_NOISE


def test_imputation_of_everything_and_of_nothing() -> None:
    rng = np.random.default_rng(0)
    plane = np.arange(16, dtype=np.float32).reshape(4, 4)
    assert np.array_equal(xai.impute(plane, np.zeros((4, 4), bool), rng), plane)
    assert np.allclose(xai.impute(plane, np.ones((4, 4), bool), rng), plane.mean())


@given(st.sampled_from([np.nan, np.inf, -np.inf, 0.0, -3.0]), st.integers(1, 9))
def test_a_map_without_evidence_is_undefined(value: float, side: int) -> None:
    assert not xai.defined(np.full((side, side), value, np.float32))


# -- the real networks, on phantoms -------------------------------------------------------------------------------------


@cache
def drawn() -> tuple[tuple[np.ndarray, phantom.Truth], ...]:
    return tuple(phantom.draw(np.random.default_rng(600 + i), weighting="T2") for i in range(2))


def crops() -> list[Crop]:
    return [
        Crop(i, image, d.box_px, data.Grading(d.pfirrmann, d.herniation, d.narrowing, d.bulging))
        for i, (image, truth) in enumerate(drawn())
        for d in truth.discs
    ]


def phantoms() -> tuple[Slice, ...]:
    return tuple(
        Slice(f"phantom-{i}", i, image, truth.mask, np.array([d.box_px for d in truth.discs], np.float32))
        for i, (image, truth) in enumerate(drawn())
    )


def open_graph(graph: bytes) -> Runner:
    return backends.load("onnxruntime").open(graph, Signature((), ()), precision="f32", threads=1).run


@pytest.fixture(scope="module")
def real() -> tuple[Any, Any, MapSpec, explainers.GraderExplainer]:
    model, bias = attach_cam(load_float32(WEIGHTS / "grader.onnx"))
    quantised = onnx.load(Path(WEIGHTS) / "bundle" / "models" / "grader" / "int8.onnx")
    explainer = explainers.explain_grader(crops(), 12)
    return model, quantised, MapSpec("cam", "cam", "features", cam_bias=tuple(bias)), explainer


def test_the_real_card_holds_float_against_itself_and_fails_what_is_broken(real: Any) -> None:
    model, quantised, spec, explainer = real
    feeds = [{"image": s.x} for s in explainer.samples()[:3]]
    fp32 = open_graph(model.SerializeToString())
    bad = {
        "clipped ranges": open_graph(xai.clipped(quantised, feeds, open_graph)),
        "permuted INT8": open_graph(xai.permuted(quantised, "cam") or b""),
    }
    found = xai.report_card(
        explainer, fp32, fp32, spec, model=model, open_float=open_graph, bad_engines=bad, effort=xai.Effort(12, 2, 8, 2, 6, 2)
    )
    assert found.broken == []
    assert {c.name for c in found.controls} >= {"clipped ranges", "permuted INT8", "permuted channels"}
    assert all(len(c.caught or ()) >= 5 for c in found.controls if c.name in (*bad, "permuted channels"))
    rows = {r.name: r for r in found.rows}
    for name in ("randomised_last", "randomised_half", "residual"):
        assert rows[name].passed is True, rows[name]
    assert {n for n in failed(found) if not n.startswith("road")} == set()


def test_a_map_that_ignores_the_weights_fails_the_randomisation_check(real: Any) -> None:
    model, _, spec, explainer = real

    class EdgeDetector(explainers.GraderExplainer):
        """Looks at the picture, whatever the network says: what Adebayo et al. warn of."""

        def map(self, outputs: Outputs, target: int) -> np.ndarray:
            return np.add.outer(np.arange(8.0), np.arange(8.0)).astype(np.float32) + 0.01 * outputs["cam"][0, target]

    fp32 = open_graph(model.SerializeToString())
    effort = xai.Effort(4, 1, 1, 1, 4, 1)
    found = xai.report_card(EdgeDetector(explainer.explained), fp32, fp32, spec, model=model, open_float=open_graph, effort=effort)
    assert {"randomised_last", "randomised_half"} <= failed(found)


def test_sabotage_is_the_same_bytes_twice_and_leaves_the_original_alone(real: Any) -> None:
    model, quantised, _, _ = real
    before = model.SerializeToString(deterministic=True), quantised.SerializeToString(deterministic=True)
    assert xai.randomised(model, 0.5, "cam") == xai.randomised(model, 0.5, "cam") != xai.randomised(model, 0.0, "cam")
    assert xai.permuted(model, "cam") == xai.permuted(model, "cam")
    assert xai.permuted(model, "logits") is None
    assert (model.SerializeToString(deterministic=True), quantised.SerializeToString(deterministic=True)) == before


# -- explainers -----------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 5), min_size=1, max_size=60), st.integers(1, 30))
def test_samples_are_spread_over_patients(groups: list[int], count: int) -> None:
    chosen = explainers.pick(groups, count)
    assert len(chosen) == len(set(chosen)) == min(count, len(groups))
    assert len({groups[i] for i in chosen}) == min(len(set(groups)), len(chosen))
    assert chosen == explainers.pick(groups, count)


def test_the_truth_of_a_crop_is_its_disc() -> None:
    made = explainers.explain_grader(crops()[:5]).samples()
    for sample in made:
        assert sample.x.shape == (1, 1, *grader.SPEC.input_hw)
        assert sample.truth is not None
        rows, columns = np.nonzero(sample.truth)
        assert abs(rows.mean() + 0.5 - 64) < 1
        assert abs(columns.mean() + 0.5 - 64) < 1
        assert np.ptp(columns) + 1 <= round(128 / grader.CROP_WIDTHS) + 1


def test_the_truth_of_a_slice_lies_where_the_discs_are() -> None:
    slices = list(phantoms())
    by_mask = explainers.explain_segmenter(slices).samples()
    by_box = explainers.explain_detector(slices).samples()
    for a, b in zip(by_mask, by_box, strict=True):
        assert a.truth is not None
        assert b.truth is not None
        assert a.x.shape == (1, 1, *a.truth.shape)
        # Boxes hold their discs: nearly all of the mask, and not much more than it.
        assert (a.truth & b.truth).sum() / a.truth.sum() > 0.95
        assert (a.truth & b.truth).sum() / b.truth.sum() > 0.35


@pytest.mark.parametrize("family", ["detector", "segmenter"])
def test_maps_of_dense_families_find_the_discs(family: str) -> None:
    samples = phantoms()[:1]
    explainer = explainers.family_explainer(family, samples)
    run = open_graph(load_float32(WEIGHTS / f"{family}.onnx").SerializeToString())
    for sample in explainer.samples():
        outputs = run({"image": sample.x})
        raw = explainer.map(outputs, explainer.target(outputs))
        assert xai.defined(raw)
        assert sample.truth is not None
        shown = cv2.resize(raw, sample.truth.shape[::-1])
        assert shown[sample.truth].mean() > shown[~sample.truth].mean() + 2
        assert 0.5 < explainer.score(outputs, explainer.target(outputs)) <= 1


def test_an_unknown_family_has_no_explainer() -> None:
    with pytest.raises(ValueError, match="no explainer"):
        explainers.family_explainer("hips", [])


DENSE = MapSpec("class-evidence", "y", "head")


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("exclusive", [False, True])
def test_a_strangers_dense_head(last: bool, exclusive: bool) -> None:
    y = np.zeros((1, 3, 6, 8), np.float32)
    y[0, 0] = 4.0  # background, sure everywhere
    y[0, 2, 3, 5] = 9.0
    y = np.moveaxis(y, 1, -1) if last else y
    made = explainers.explain(DENSE, explainers.held([y]), exclusive=exclusive, background=0, channels_last=last)
    assert made.target({"y": y}) == 2
    raw = made.map({"y": y}, 2)
    assert raw.shape == (6, 8)
    assert np.unravel_index(raw.argmax(), raw.shape) == (3, 5)
    assert raw[3, 5] == (5.0 if exclusive else 9.0)
    assert 0 <= made.score({"y": y}, 2) <= 1


def test_a_strangers_classifier_with_one_map_for_all() -> None:
    spec = MapSpec("activation", "features_mean", "last")
    made = explainers.explain(spec, explainers.held([np.ones((1, 3, 8, 8), np.float32)]), scores="p", probabilities=True)
    outputs = {"p": np.array([[0.1, 0.7, 0.2]], np.float32), "features_mean": np.ones((1, 1, 4, 4), np.float32)}
    assert made.target(outputs) == 1
    assert made.score(outputs, 1) == pytest.approx(0.7)
    assert made.map(outputs, 1).shape == (4, 4)


def test_a_graph_without_a_map_has_no_explainer() -> None:
    with pytest.raises(GraphUnsupported, match="no heatmap"):
        explainers.explain(MapSpec("unavailable", None, "", "its head is an attention block"), ())


@pytest.mark.parametrize("shape", [(1, 96), (96, 1), (1, 24), (2, 2), (1, 1)])
def test_maps_of_a_row_or_a_cell_are_compared_too(shape: tuple[int, int]) -> None:
    raw = np.arange(1, shape[0] * shape[1] + 1, dtype=np.float32).reshape(shape)
    same = xai.agreement(raw, raw, (32, 96))
    assert same.ssim == pytest.approx(1.0) or shape == (1, 1)  # one cell is a constant map: it holds no evidence
    assert xai.agreement(raw, raw[::-1, ::-1].copy(), (32, 96)).ssim <= same.ssim


@pytest.mark.parametrize(("exclusive", "honest"), [(True, True), (True, False), (False, True)])
def test_a_map_may_add_up_to_probabilities(exclusive: bool, honest: bool) -> None:
    """A graph that ends in Softmax or Sigmoid gives no logits out; its map must still explain what it gives."""
    squash = explainers.softmax if exclusive else explainers.sigmoid
    explainer = explainers.ClassifierExplainer(SAMPLES, SPEC, "p", exclusive=exclusive, probabilities=True)

    def run(feed: Outputs) -> Outputs:
        out = toy(feed)
        logits = out["logits"][0] + (0.0 if honest else np.array([0.3, 0.0]))
        return {"cam": out["cam"], "p": squash(logits)[None].astype(np.float32)}

    found = xai.report_card(explainer, run, run, SPEC, effort=EFFORT)
    assert next(r for r in found.rows if r.name == "residual").passed is honest
