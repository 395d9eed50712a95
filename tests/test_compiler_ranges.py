"""Histograms in bounded memory count what NumPy counts, in whatever order; estimators stay inside what was seen."""

from __future__ import annotations

import json
import random
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from appliance.bundle import canonical
from appliance.compiler import ranges
from appliance.compiler.ranges import BINS, ESTIMATORS, Histogram
from appliance.errors import CalibrationInvalid, GraphUnsupported

FLOATS = st.floats(-1e6, 1e6, width=32)
FEW = settings(max_examples=30, deadline=None)  # the estimators search; a busy machine must not fail them
IMAGES = st.lists(st.lists(FLOATS, min_size=1, max_size=40), min_size=1, max_size=6)


def _of(images: list[list[float]] | list[np.ndarray]) -> Histogram:
    h = Histogram()
    for x in images:
        h.add(np.asarray(x, np.float32))
    return h


def _normal(scale: float = 1.0, count: int = 20_000, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, scale, count).astype(np.float32)


@given(IMAGES)
@FEW
def test_merged_bins_hold_what_numpy_counts_at_once(images: list[list[float]]) -> None:
    h = _of(images)
    everything = np.concatenate([np.asarray(x, np.float32) for x in images]).astype(np.float64)
    # NumPy closes the last bin; ours are all open above, so one empty bin is put behind.
    edges = np.append(h.edges, h.edges[-1] + 2.0**h.exponent)
    expected, _ = np.histogram(everything, edges)
    assert expected[-1] == 0
    np.testing.assert_array_equal(h.counts, expected[:-1])
    assert (h.low, h.high) == (everything.min(), everything.max())
    assert h.count == everything.size
    assert h.zeros == int((everything == 0).sum())
    assert h.mean == pytest.approx(everything.mean(), rel=1e-5, abs=1e-5 * np.abs(everything).max() + 1e-30)
    assert h.mean_low == pytest.approx(np.mean([min(np.float32(v) for v in x) for x in images]), rel=1e-6, abs=1e-9)


@given(IMAGES, st.integers(0, 1000))
@FEW
def test_the_order_of_images_does_not_matter(images: list[list[float]], seed: int) -> None:
    shuffled = list(images)
    random.Random(seed).shuffle(shuffled)
    a, b = _of(images), _of(shuffled)
    np.testing.assert_array_equal(a.counts, b.counts)
    assert (a.exponent, a.first) == (b.exponent, b.first)
    for name in ("min-max", "percentile-99.9", "percentile-99.99", "percentile-99.999", "mse", "entropy"):
        assert ESTIMATORS[name](a) == ESTIMATORS[name](b)


@given(IMAGES)
@FEW
def test_memory_is_bounded(images: list[list[float]]) -> None:
    assert 0 < len(_of(images).counts) <= BINS


def test_bins_stay_as_fine_as_they_can() -> None:
    h = _of([_normal(s, seed=i) for i, s in enumerate((1e-3, 1.0, 100.0))])
    assert BINS // 2 - 2 <= len(h.counts) <= BINS


@given(IMAGES)
@FEW
def test_every_estimator_stays_inside_what_was_seen(images: list[list[float]]) -> None:
    h = _of(images)
    for name, estimate in ESTIMATORS.items():
        low, high = estimate(h)
        assert h.low <= low <= high <= h.high or (h.low > 0 or h.high < 0), name
        assert np.isfinite([low, high]).all(), name


@pytest.mark.parametrize("value", [0.0, 5.0, -3.25, 1e-30, 3e38])
def test_a_constant_tensor_has_its_value_as_range(value: float) -> None:
    h = _of([np.full(10, value, np.float32), np.full(7, value, np.float32)])
    for name, estimate in ESTIMATORS.items():
        low, high = estimate(h)
        assert min(low, 0.0) <= np.float32(value) <= max(high, 0.0) or name == "mse"
        assert np.isfinite([low, high]).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="NaN or infinite"):
        Histogram().add(np.array([0.0, bad, 1.0], np.float32))


def test_percentiles_cut_the_share_that_they_name() -> None:
    x = _normal(count=200_000)
    h = _of([x])
    for share in (0.999, 0.9999):
        low, high = ranges.percentile(h, share)
        width = 2.0**h.exponent
        beyond = round((1 - share) * x.size)
        assert (x < low).sum() <= beyond <= (x < low + 2 * width).sum() + 1
        assert (x > high).sum() <= beyond <= (x > high - 2 * width).sum() + 1
    assert ranges.percentile(h, 0.99) != ranges.min_max(h)


def _squared_error(x: np.ndarray, low: float, high: float) -> float:
    low, high = min(low, 0.0), max(high, 0.0)
    step = (high - low) / 255
    return float(((np.clip(np.round(x / step), np.round(low / step), np.round(high / step)) * step - x) ** 2).mean())


def test_the_mse_range_rounds_better_than_the_extremes_and_the_percentiles() -> None:
    x = np.concatenate([_normal(count=200_000), [12.0]]).astype(np.float32)
    h = _of([x])
    best = _squared_error(x, *ranges.mean_square(h))
    assert best < 0.9 * _squared_error(x, *ranges.min_max(h))
    assert best <= 1.05 * min(_squared_error(x, *ESTIMATORS[n](h)) for n in ESTIMATORS)


def test_entropy_cuts_a_long_tail_and_leaves_an_even_spread() -> None:
    tail = np.abs(np.random.default_rng(0).standard_cauchy(50_000).clip(-500, 500)).astype(np.float32)
    assert ranges.entropy(_of([tail]))[1] < 0.5 * tail.max()
    even = np.linspace(0, 1, 50_000).astype(np.float32)
    assert ranges.entropy(_of([even]))[1] > 0.95


def test_a_histogram_comes_back_from_json() -> None:
    h = _of([_normal(), _normal(3.0, seed=1)])
    text = canonical(h.to_json())
    back = Histogram.from_json(json.loads(text))
    assert canonical(back.to_json()) == text
    assert {n: e(back) for n, e in ESTIMATORS.items()} == {n: e(h) for n, e in ESTIMATORS.items()}
    assert "counts" not in h.summary()


@pytest.mark.parametrize(
    "change",
    [{"counts": []}, {"counts": [-1, 3]}, {"counts": [1] * (BINS + 1)}, {"count": 3}, {"low": None}, {"exponent": 4000}, {"counts": "x"}],
)
def test_a_damaged_histogram_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(CalibrationInvalid):
        Histogram.from_json(_of([_normal()]).to_json() | change)


# -- collecting from a network ------------------------------------------------------------------------------------------


def _net(scale: float = 2.0) -> Any:
    graph = helper.make_graph(
        [helper.make_node("Mul", ["x", "k"], ["y"]), helper.make_node("Relu", ["y"], ["z"]), helper.make_node("Neg", ["z"], ["out"])],
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 4, 5])],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, [1, 3, 4, 5])],
        [numpy_helper.from_array(np.array(scale, np.float32), "k")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def _images(count: int = 3) -> list[np.ndarray]:
    rng = np.random.default_rng(3)
    return [rng.normal(size=(1, 3, 4, 5)).astype(np.float32) for _ in range(count)]


def test_every_activation_is_seen_and_only_those_asked_for() -> None:
    model, images = _net(), _images()
    found = ranges.collect(model, images)
    assert set(found) == {"x", "y", "z", "out"}
    assert found["y"].low == 2 * min(float(i.min()) for i in images)
    assert found["z"].low == 0.0
    assert found["z"].images == 3
    assert set(ranges.collect(model, images, ["z"])) == {"z"}
    assert not model.graph.value_info
    assert len(model.graph.output) == 1


def test_several_passes_see_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = ranges.collect(_net(), _images())
    monkeypatch.setattr(ranges, "PASS_BYTES", 8)
    parts = ranges.collect(_net(), _images())
    assert {k: canonical(h.to_json()) for k, h in whole.items()} == {k: canonical(h.to_json()) for k, h in parts.items()}


def test_the_tensor_that_is_not_finite_is_named() -> None:
    with pytest.raises(CalibrationInvalid, match="NaN or infinite") as caught:
        ranges.collect(_net(3e38), [np.full((1, 3, 4, 5), 100.0, np.float32)])
    assert caught.value.value == "y"


def test_no_image_and_a_bad_image_are_refused() -> None:
    with pytest.raises(CalibrationInvalid, match="at least one image"):
        ranges.collect(_net(), [])
    with pytest.raises(CalibrationInvalid, match="image holds NaN"):
        ranges.collect(_net(), [np.full((1, 3, 4, 5), np.nan, np.float32)])
    with pytest.raises(GraphUnsupported, match="no float tensor"):
        ranges.collect(_net(), _images(), ["nobody"])


@pytest.mark.parametrize("opset", [13, 18])
def test_channel_means_are_outputs_of_their_own(opset: int) -> None:
    base = _net()
    base.opset_import[0].version = opset
    model, names = ranges.with_channel_means(base, ["z"])
    onnx.checker.check_model(model)
    session = ranges.open_float(model, 1)
    x = _images(1)[0]
    np.testing.assert_allclose(session.run({"x": x})[names["z"]], np.maximum(2 * x, 0).mean((0, 2, 3)), rtol=1e-5)
    session.close()
