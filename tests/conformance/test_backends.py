"""What every backend promises, held against each one that is available here, with one small graph."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from small_graph import HERE, HW, SIGNATURE, an_image, by_hand, small_model

from appliance import backends
from appliance.backends import Probe
from appliance.errors import BackendFailed, BackendUnavailable

AVAILABLE = [n for n in backends.names() if backends.probe(n).available]
REAL = [n for n in AVAILABLE if n != "null"]
GRAPH = small_model().SerializeToString()
# What a backend opens, by its FORMAT. A device has no converter, so the TFLite engine is a file.
BLOBS = {"onnx": GRAPH, "onnx-symmetric": GRAPH, "any": GRAPH, "tflite": (HERE / "small.f32.tflite").read_bytes()}


def blob_of(name: str) -> bytes:
    return BLOBS[backends.load(name).FORMAT]


@pytest.fixture(params=AVAILABLE)
def any_session(request: pytest.FixtureRequest) -> Iterator[Any]:
    module = backends.load(request.param)
    session = module.open(module.build(blob_of(request.param)), SIGNATURE, precision="f32", threads=1)
    yield session
    session.close()


@pytest.fixture(params=REAL)
def session(request: pytest.FixtureRequest) -> Iterator[Any]:
    module = backends.load(request.param)
    session = module.open(module.build(blob_of(request.param)), SIGNATURE, precision="f32", threads=1)
    yield session
    session.close()


def test_the_runtimes_of_the_test_environment_are_here() -> None:
    """Without this, a machine that lost a runtime would pass by testing less."""
    assert {"null", "onnxruntime", "openvino", "tflite"} <= set(AVAILABLE), {n: backends.probe(n).reason for n in backends.names()}


@pytest.mark.parametrize("name", backends.names())
def test_the_shape_of_a_backend_module(name: str) -> None:
    module = backends.load(name)
    assert isinstance(module.REQUIRES, tuple)
    state = module.probe()
    assert isinstance(state, Probe)
    assert state.name == name
    assert state.reason
    if state.available:
        assert state.version
    assert callable(module.build)
    assert callable(module.open)


def test_f32_equals_the_sumby_hand(session: Any) -> None:
    image = an_image(1)
    out = session.run({"image": image})
    expected = by_hand(image)
    assert set(out) == set(expected)
    for name, values in expected.items():
        assert out[name].dtype == np.float32
        np.testing.assert_allclose(out[name], values, atol=1e-4)


def test_names_shapes_and_types_are_those_of_the_signature(any_session: Any) -> None:
    out = any_session.run({"image": an_image(2)})
    assert {n: v.shape for n, v in out.items()} == {t.name: t.shape for t in SIGNATURE.outputs}
    assert all(v.dtype == np.float32 for v in out.values())


def test_outputs_stay_valid_after_the_next_call(session: Any) -> None:
    first = session.run({"image": an_image(3)})
    kept = {n: v.copy() for n, v in first.items()}
    second = session.run({"image": an_image(4)})
    assert not np.array_equal(first["features"], second["features"])
    for name, values in kept.items():
        np.testing.assert_array_equal(first[name], values)


def test_outputs_belong_to_the_caller(any_session: Any) -> None:
    image = an_image(3)
    first = any_session.run({"image": image})
    kept = {n: v.copy() for n, v in first.items()}
    for values in first.values():
        values[...] = 7.0
    again = any_session.run({"image": image})
    for name, values in kept.items():
        np.testing.assert_array_equal(again[name], values)


def test_the_input_is_left_as_it_is(any_session: Any) -> None:
    image = an_image(5)
    kept = image.copy()
    any_session.run({"image": image})
    np.testing.assert_array_equal(image, kept)


@pytest.mark.parametrize("shape", [(1, 1, 6, 10), (1, 3, *HW), (2, 1, *HW), HW])
def test_a_wrong_shape_is_a_failure(any_session: Any, shape: tuple[int, ...]) -> None:
    with pytest.raises(BackendFailed):
        any_session.run({"image": np.zeros(shape, np.float32)})


def test_a_missing_or_misnamed_input_is_a_failure(any_session: Any) -> None:
    with pytest.raises(BackendFailed):
        any_session.run({})
    with pytest.raises(BackendFailed):
        any_session.run({"picture": an_image(1)})


def test_a_failure_does_not_spoil_the_session(session: Any) -> None:
    image = an_image(6)
    with pytest.raises(BackendFailed):
        session.run({"image": np.zeros((1, 1, 3, 3), np.float32)})
    np.testing.assert_allclose(session.run({"image": image})["mean"], by_hand(image)["mean"], atol=1e-4)


BROKEN = {"nothing": b"", "text": b"not a model", "half a graph": GRAPH[: len(GRAPH) // 2], "zeros": bytes(1000)}


@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("blob", BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_blob_is_a_failure_of_open_and_of_build(name: str, blob: bytes) -> None:
    module = backends.load(name)
    with pytest.raises(BackendFailed, match=name):
        module.open(blob, SIGNATURE, precision="f32", threads=1)
    with pytest.raises(BackendFailed, match=name):
        module.build(blob)


@pytest.mark.parametrize("name", REAL)
def test_int8_of_a_float_graph_is_the_float_graph(name: str) -> None:
    """The precision of an INT8 engine is in its graph; what stayed in float is computed in f32."""
    session = backends.load(name).open(blob_of(name), SIGNATURE, precision="int8", threads=1)
    image = an_image(8)
    np.testing.assert_allclose(session.run({"image": image})["features"], by_hand(image)["features"], atol=1e-4)
    session.close()


def test_bf16_is_openvino_only_and_refused_elsewhere() -> None:
    image = an_image(9)
    session = backends.load("openvino").open(GRAPH, SIGNATURE, precision="bf16", threads=1)
    np.testing.assert_allclose(session.run({"image": image})["features"], by_hand(image)["features"], atol=0.1)
    with pytest.raises(BackendFailed, match="bf16"):
        backends.load("onnxruntime").open(GRAPH, SIGNATURE, precision="bf16", threads=1)


def test_null_answers_zeros() -> None:
    out = backends.load("null").open(b"anything", SIGNATURE, precision="int8", threads=0).run({"image": an_image(1)})
    assert all(not v.any() for v in out.values())


def test_null_replays_what_was_recorded() -> None:
    from appliance.backends import null

    recorded = {"mean": np.array([[1.0, 2.0, 3.0]], np.float32)}
    out = null.Session(SIGNATURE, replay=recorded).run({"image": an_image(1)})
    np.testing.assert_array_equal(out["mean"], recorded["mean"])
    assert not out["features"].any()
    for replay in ({"mean": np.zeros((1, 4), np.float32)}, {"other": np.zeros((1, 3), np.float32)}):
        with pytest.raises(BackendFailed, match="does not fit"):
            null.Session(SIGNATURE, replay=replay)


# -- choosing -------------------------------------------------------------------------------------------------------


def _states(monkeypatch: pytest.MonkeyPatch, available: set[str]) -> None:
    monkeypatch.setattr(backends, "probe", lambda name: Probe(name, name in available, f"state of {name}", "1"))


def test_an_unknown_backend_is_named_with_the_known_ones() -> None:
    for call in (backends.load, backends.choose):
        with pytest.raises(BackendUnavailable, match="onnxruntime") as caught:
            call("abacus")
        assert caught.value.value == "abacus"


def test_auto_takes_the_first_available_of_the_preference_and_never_null(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "null" not in backends.PREFERENCE
    for only in backends.PREFERENCE:
        _states(monkeypatch, {only, "null"})
        assert backends.choose("auto") == only
    _states(monkeypatch, set(backends.PREFERENCE))
    assert backends.choose("auto") == backends.PREFERENCE[0]


def test_nothing_available_says_why_for_each(monkeypatch: pytest.MonkeyPatch) -> None:
    _states(monkeypatch, {"null"})
    with pytest.raises(BackendUnavailable) as caught:
        backends.choose("auto")
    assert all(f"state of {n}" in caught.value.what for n in backends.PREFERENCE)
    with pytest.raises(BackendUnavailable, match="state of openvino"):
        backends.choose("openvino")


@pytest.mark.parametrize("name", REAL)
def test_a_runtime_that_cannot_be_imported_is_unavailable_with_the_reason(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = backends.load(name)

    def absent(wanted: str) -> Any:
        raise ImportError(f"No module named {wanted!r}")

    monkeypatch.setattr(module.importlib, "import_module", absent)
    if hasattr(module, "_core"):
        monkeypatch.setattr(module, "_core", None)
    state = module.probe()
    assert not state.available
    assert "cannot be imported" in state.reason


@pytest.mark.parametrize("name", REAL)
def test_a_runtime_that_computes_wrongly_is_unavailable(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = backends.load(name)
    monkeypatch.setattr(module, "TINY_OUTPUT", module.TINY_OUTPUT + 0.01)
    state = module.probe()
    assert not state.available
    assert "wrong answer" in state.reason
