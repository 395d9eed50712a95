"""The probe is the Q/DQ graph, fed instead of built; what is chosen by it lowers the loss, and no more layers revert than must."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from appliance.bundle import canonical
from appliance.compiler import adjust, ranges, search
from appliance.compiler.probe import Loss, Probe, scale_and_zero, sqnr_db
from appliance.compiler.quantise import layout, quantise
from appliance.errors import CalibrationInvalid

SIDE = 16
node = helper.make_node


@cache
def _model(hard: bool = True) -> Any:
    """Seven convolutions with ReLU, ReLU6, a residual and two outputs. `hard`: channels of one layer differ by 2 ** 7, and a
    few weights make rare large values, so that plain extremes are a bad choice."""
    rng = np.random.default_rng(8)
    shapes = {
        "w1": (8, 1, 3, 3),
        "w2": (8, 1, 3, 3),
        "w3": (8, 8, 1, 1),
        "w4": (8, 8, 3, 3),
        "w5": (4, 8, 1, 1),
        "w6": (3, 4, 1, 1),
        "w7": (2, 4, 3, 3),
    }
    arrays = {k: rng.normal(0, 1.5 / math.sqrt(np.prod(s[1:])), s) for k, s in shapes.items()}
    arrays |= {k.replace("w", "b"): rng.normal(0, 0.2, s[0]) for k, s in shapes.items()}
    if hard:
        factors = 2.0 ** rng.integers(-5, 2, 8)
        arrays["w3"] *= factors[:, None, None, None]
        arrays["b3"] *= factors
        arrays["w4"] /= factors[None, :, None, None]
    arrays |= {"zero": np.array(0.0), "six": np.array(6.0)}
    nodes = [
        node("Conv", ["image", "w1", "b1"], ["c1"], name="c1", pads=[1, 1, 1, 1]),
        node("Clip", ["c1", "zero", "six"], ["r1"], name="r1"),
        node("Conv", ["r1", "w2", "b2"], ["c2"], name="c2", pads=[1, 1, 1, 1], group=8),
        node("Add", ["r1", "c2"], ["a2"], name="a2"),
        node("Conv", ["a2", "w3", "b3"], ["c3"], name="c3"),
        node("Relu", ["c3"], ["r3"], name="r3"),
        node("Conv", ["r3", "w4", "b4"], ["c4"], name="c4", pads=[1, 1, 1, 1]),
        node("Relu", ["c4"], ["r4"], name="r4"),
        node("Conv", ["r4", "w5", "b5"], ["c5"], name="c5"),
        node("Conv", ["c5", "w6", "b6"], ["scores"], name="c6"),
        node("Conv", ["c5", "w7", "b7"], ["boxes"], name="c7", pads=[1, 1, 1, 1]),
    ]
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 1, SIDE, SIDE])],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, c, SIDE, SIDE]) for n, c in (("scores", 3), ("boxes", 2))],
        [numpy_helper.from_array(np.asarray(a, np.float32), n) for n, a in arrays.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(model)
    return model


def _images(count: int = 10, seed: int = 0) -> list[np.ndarray]:
    """Noise with one bright speck in some images: the tail that min-max falls for."""
    rng = np.random.default_rng(seed)
    out = []
    for i in range(count):
        x = rng.normal(0, 0.3, (1, 1, SIDE, SIDE)).astype(np.float32)
        if i % 3 == 0:
            x[0, 0, 4, 5] = 6.0
        out.append(x)
    return out


def _inputs() -> Iterator[np.ndarray]:
    return iter(_images())


def _run(model: Any, x: np.ndarray, optimised: bool = True) -> dict[str, np.ndarray]:
    options = ort.SessionOptions()
    options.add_session_config_entry("session.x64quantprecision", "1")
    if not optimised:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return dict(zip([o.name for o in session.get_outputs()], session.run(None, {"image": x}), strict=True))


@cache
def _seen() -> tuple[Any, dict[str, ranges.Histogram], ranges.Ranges]:
    plan = layout(_model())
    seen = ranges.collect(plan.model, _images(), plan.tensors)
    return plan, seen, {k: ranges.min_max(h) for k, h in seen.items()}


# -- the probe ----------------------------------------------------------------------------------------------------------


def test_with_everything_off_the_probe_is_the_float_network() -> None:
    plan, _, r = _seen()
    with Probe(plan) as probe:
        for x in _images(3, seed=4):
            found, expected = probe.run(x, r, layers=(), activations=()), _run(_model(), x)
            for name, values in expected.items():
                # Runtimes sum in another order where they fuse differently; nothing is rounded to eight bits.
                np.testing.assert_allclose(found[name], values, rtol=0, atol=2e-6 * float(np.abs(values).max()))


@pytest.mark.parametrize("keep", [(), ("c2",), ("c1", "c4"), ("c3", "c5"), ("c1", "c2", "c3", "c4", "c5")])
def test_the_probe_is_the_graph_that_would_be_built(keep: tuple[str, ...]) -> None:
    plan, _, r = _seen()
    model, _ = quantise(_model(), r, keep_float=keep)
    rounded = {n.input[0].removesuffix("_QuantizeLinear_Input") for n in model.graph.node if n.op_type == "QuantizeLinear"}
    with Probe(plan) as probe:
        choice = probe.without(keep)
        assert choice["activations"] == rounded
        for x in _images(2, seed=6):
            found, reference = probe.run(x, r, **choice), probe.run(x, r, layers=(), activations=())
            for optimised in (False, True):
                built = _run(model, x, optimised)
                for name in found:
                    noise = float(np.abs(found[name] - reference[name]).mean())
                    # They differ where a value lay on the border of two levels: far less than what rounding costs.
                    assert float(np.abs(built[name] - found[name]).mean()) <= 0.15 * noise + 1e-6, (name, optimised)


@given(st.floats(-1e4, 1e4, width=32), st.floats(0, 1e4, width=32))
def test_scale_and_zero_point_are_those_of_the_quantiser(low: float, width: float) -> None:
    scale, zero = scale_and_zero(low, low + width)
    assert scale > 0
    if width or low:
        # Zero is a level, and both ends lie within a level of the range.
        assert (0 - int(zero)) * float(scale) <= min(low, 0) + float(scale)
        assert (255 - int(zero)) * float(scale) >= max(low + width, 0) - float(scale)


def test_shifts_move_channels_and_means_are_theirs() -> None:
    plan, _, r = _seen()
    x = _images(1)[0]
    with Probe(plan, shifts=True) as probe:
        still = probe.run(x, r, layers=(), activations=())
        moved = probe.run(x, r, layers=(), activations=(), shifts={"c5": np.array([1, 0, -2, 0], np.float32)})
    name = probe.means["c5"]
    np.testing.assert_allclose(moved[name] - still[name], [1, 0, -2, 0], atol=1e-4)


# -- the search ---------------------------------------------------------------------------------------------------------


def test_the_loss_is_noise_over_signal() -> None:
    plan, _, r = _seen()
    with Probe(plan) as probe:
        loss = Loss(probe, _images(3))
        assert loss(r, layers=(), activations=()) == pytest.approx(0.0, abs=1e-10)
        assert 0 < loss(r) < 1
        twice = [{k: v * 0 + v.mean() for k, v in t.items()} for t in loss.truth]
        assert 0.5 < loss.of(twice) <= 1.01  # an output that says only its mean has lost all its signal
    assert sqnr_db(0.001) == pytest.approx(30.0)


def test_the_chosen_estimators_lose_less_than_any_single_one() -> None:
    plan, seen, r = _seen()
    with Probe(plan) as probe:
        loss = Loss(probe, _images(4))
        chosen, its = search.choose_estimators(loss, seen)
        everywhere = {e: loss({n: f(h) for n, h in seen.items()}) for e, f in ranges.ESTIMATORS.items()}
        assert loss(its) <= min(everywhere.values())
        assert loss(its) < 0.95 * loss(r)
    assert set(chosen) == set(seen) == set(its)
    assert all(its[n] == ranges.ESTIMATORS[e](seen[n]) for n, e in chosen.items())


def test_large_inputs_get_fewer_runs_where_estimators_differ_most(monkeypatch: pytest.MonkeyPatch) -> None:
    plan, seen, _ = _seen()
    images = _images(4)
    runs = []
    for usual in (images[0].size, images[0].size // 100):
        monkeypatch.setattr(search, "USUAL_VALUES", usual)
        with Probe(plan) as probe:
            loss = Loss(probe, images)
            chosen, its = search.choose_estimators(loss, seen)
            runs.append(probe.runs)
            assert loss(its) <= min(loss({n: f(h) for n, h in seen.items()}) for f in ranges.ESTIMATORS.values())
            assert set(chosen) == set(seen) == set(its)
    single = len(images) * (1 + len(ranges.ESTIMATORS))
    assert runs[1] - single <= search.MAX_RUNS // 100 + len(images) * search.MAX_RUNS // 200 + search.SCREENED < runs[0] - single


def test_the_most_sensitive_layer_comes_first() -> None:
    """A layer whose input is measured far too wide loses nearly everything, and is ranked so."""
    plan, _, r = _seen()
    with Probe(plan) as probe:
        loss = Loss(probe, _images(2))
        ranking = search.rank_layers(loss, r | {"r3": (0.0, 5000.0)})
    assert {n for n, _ in ranking} == set(plan.layers)
    assert {ranking[0][0], ranking[1][0]} == {"c3", "c4"}  # who writes it and who reads it
    assert [v for _, v in ranking] == sorted((v for _, v in ranking), reverse=True)
    assert ranking[1][1] > 10 * ranking[2][1]


@given(st.integers(0, 200), st.integers(0, 201))
@settings(deadline=None)
def test_no_more_layers_revert_than_must_and_few_trials_find_it(layers: int, needed: int) -> None:
    ranking = [(f"n{i}", 1.0 / (i + 1)) for i in range(layers)]
    tried: list[frozenset[str]] = []

    def passes(keep: frozenset[str]) -> bool:
        tried.append(keep)
        return len(keep) >= needed

    found = search.fewest_reverts(ranking, passes)
    assert len(tried) == len(found.trials) <= math.ceil(math.log2(layers + 1)) + 1
    if needed > layers:
        assert found.keep is None
    else:
        assert found.keep == frozenset(n for n, _ in ranking[:needed])
        assert found.keep in tried


def test_a_failure_that_is_known_is_not_measured_again() -> None:
    tried: list[int] = []
    search.fewest_reverts([("a", 2.0), ("b", 1.0)], lambda keep: bool(tried.append(len(keep))) or len(keep) > 1, plain_failed=True)
    assert 0 not in tried


# -- adjustments --------------------------------------------------------------------------------------------------------


def test_equalisation_goes_through_relu_and_nothing_else() -> None:
    found = adjust.pairs(layout(_model()).model)
    assert [(p.first, p.second) for p in found] == [("c3", "c4"), ("c4", "c5")]  # c1: Clip; c2: Add; c5: read twice


def test_equalisation_keeps_the_function_and_levels_the_channels() -> None:
    model = layout(_model()).model
    found = adjust.pairs(model)
    level = adjust.equalised(model, found)
    assert adjust.is_same_function(model, level, _images(1)[0])
    arrays = {t.name: numpy_helper.to_array(t) for t in level.graph.initializer}
    ours = np.abs(arrays["w3"]).reshape(8, -1).max(1)
    theirs = np.abs(np.moveaxis(arrays["w4"], 1, 0)).reshape(8, -1).max(1)
    np.testing.assert_allclose(ours, theirs, rtol=0.05)
    broken = onnx.ModelProto()
    broken.CopyFrom(level)
    next(t for t in broken.graph.initializer if t.name == "b4").CopyFrom(numpy_helper.from_array(arrays["b4"] + 1, "b4"))
    assert not adjust.is_same_function(model, broken, _images(1)[0])


def test_equalisation_through_a_depthwise_layer_keeps_the_function() -> None:
    model = onnx.ModelProto()
    model.CopyFrom(layout(_model()).model)
    pair = adjust.Pair("c3", "depthwise")
    rng = np.random.default_rng(2)
    model.graph.initializer.append(numpy_helper.from_array(rng.normal(size=(8, 1, 3, 3)).astype(np.float32), "wd"))
    at = next(i for i, n in enumerate(model.graph.node) if n.name == "c4")
    model.graph.node[at].input[0] = "d"
    model.graph.node.insert(at, node("Conv", ["r3", "wd"], ["d"], name="depthwise", group=8, pads=[1, 1, 1, 1]))
    assert pair in adjust.pairs(model)
    assert adjust.is_same_function(model, adjust.equalised(model, [pair]), _images(1)[0])


def test_equalisation_is_kept_where_it_helps() -> None:
    images = _images(4)
    model, change = adjust.equalise(_model(), images)
    assert change.layers
    assert change.after < change.before
    assert adjust.is_same_function(_model(), model, images[0])


def test_bias_correction_takes_the_mean_shift_out() -> None:
    """A layer whose range is cut at its upper end gives too little, everywhere; the bias gives it back."""
    plan, _, r = _seen()
    cut = r | {"r4": (0.0, 0.5 * r["r4"][1])}
    model, change = adjust.correct_bias(plan, cut, _images(8, seed=3))
    assert change.layers
    assert change.after < 0.9 * change.before
    bias = change.layers[0].replace("c", "b")
    before, after = (numpy_helper.to_array(next(t for t in m.graph.initializer if t.name == bias)) for m in (plan.model, model))
    assert not np.array_equal(before, after)
    x = _images(1, seed=11)[0]
    plain, corrected = (quantise(m, cut)[0] for m in (plan.model, model))
    errors = [sum(float(((_run(q, x)[k] - v) ** 2).mean()) for k, v in _run(_model(), x).items()) for q in (plain, corrected)]
    assert errors[1] < errors[0]


# -- all of it ----------------------------------------------------------------------------------------------------------


@cache
def _prepared() -> tuple[search.Prepared, list[tuple[int, int]]]:
    steps: list[tuple[int, int]] = []
    return search.prepare_int8(_model(), _inputs, lambda done, total: steps.append((done, total)), count=10), steps


def test_the_whole_search_beats_plain_extremes_on_other_images() -> None:
    prepared, steps = _prepared()
    plain, _ = quantise(_model(), _seen()[2])
    ours, _ = quantise(prepared.model, prepared.record.ranges)
    symmetric, _ = quantise(prepared.model, prepared.record.ranges, flavour="symmetric")

    def error(model: Any) -> float:
        return sum(float(((_run(model, x)[k] - v) ** 2).mean()) for x in _images(6, seed=77) for k, v in _run(_model(), x).items())

    assert error(ours) < 0.9 * error(plain)
    plain_symmetric, _ = quantise(_model(), _seen()[2], flavour="symmetric")
    assert error(symmetric) < error(plain_symmetric)
    assert [d for d, _ in steps] == sorted(d for d, _ in steps)
    assert steps[-1] == (1000, 1000)
    assert prepared.report["images"] == 10


def test_quick_adjusts_nothing_and_ranks_all_the_same() -> None:
    quick = search.prepare_int8(_model(), _inputs, effort="quick")
    assert len(set(quick.record.estimators.values())) == 1
    assert not quick.report["adjustments"]
    assert {n for n, _ in quick.record.ranking} == set(layout(_model()).layers)
    weights = [numpy_helper.to_array(next(t for t in m.graph.initializer if t.name == "w4")) for m in (quick.model, _model())]
    np.testing.assert_array_equal(*weights)


def test_the_same_inputs_give_the_same_record_and_graph() -> None:
    first, _ = _prepared()
    second = search.prepare_int8(_model(), _inputs)
    assert canonical(first.record.to_json()) == canonical(second.record.to_json())
    assert first.model.SerializeToString(deterministic=True) == second.model.SerializeToString(deterministic=True)
    blobs = [quantise(p.model, p.record.ranges)[0].SerializeToString(deterministic=True) for p in (first, second)]
    assert blobs[0] == blobs[1]


def test_a_record_comes_back_from_json() -> None:
    record = _prepared()[0].record
    text = canonical(record.to_json())
    back = search.Record.from_json(json.loads(text))
    assert canonical(back.to_json()) == text
    assert back.ranges == record.ranges
    assert back.ranking == record.ranking
    slim = record.to_json(bins=False)
    assert all("counts" not in t["seen"] for t in slim["tensors"].values())


@pytest.mark.parametrize("path", [("tensors",), ("ranking",), ("losses",), ("images",)])
def test_a_damaged_record_is_refused(path: tuple[str, ...]) -> None:
    data = json.loads(canonical(_prepared()[0].record.to_json()))
    data[path[0]] = None
    with pytest.raises(CalibrationInvalid):
        search.Record.from_json(data)


def test_no_image_and_one_image() -> None:
    with pytest.raises(CalibrationInvalid, match="at least one image"):
        search.prepare_int8(_model(), lambda: iter(()))
    one = search.prepare_int8(_model(), lambda: iter(_images(1)))
    assert quantise(one.model, one.record.ranges)[0].graph.node
    record = search.calibrate(_model(), _inputs)
    assert record.ranking
    assert set(record.ranges) == set(record.estimators)


def test_a_bad_image_is_refused_wherever_it_stands() -> None:
    images = _images(5)
    images[3][0, 0, 0, 0] = np.nan
    with pytest.raises(CalibrationInvalid, match="NaN"):
        search.prepare_int8(_model(), lambda: iter(images))
