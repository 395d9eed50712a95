"""Golden inputs: exact on every machine, small, and strict enough to catch an engine whose 8-bit products saturate."""

from __future__ import annotations

import json
import zlib
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from appliance import golden as device
from appliance.compiler import golden
from appliance.errors import BundleCorrupt, CalibrationInvalid

rng = np.random.default_rng(5)
CHANNELS, OUT, TAPS = 8, 4, 64
WEIGHTS = rng.integers(-127, 128, (OUT, TAPS)).astype(np.int8)
W_SCALE = 0.01


def _image(seed: int, shape: tuple[int, ...] = (1, 1, 16, 64)) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)


def _products(x: np.ndarray) -> np.ndarray:
    """u8 activations of each row, TAPS wide."""
    return np.clip(np.round((x.reshape(-1, TAPS) + 1) * 127.5), 0, 255).astype(np.int64)


def float_net(feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    x = feed["image"].reshape(-1, TAPS)
    return {"y": (x @ (WEIGHTS.T * W_SCALE)).astype(np.float32)[None]}


def _answer(accumulated: np.ndarray) -> dict[str, np.ndarray]:
    zero = 127.5 * WEIGHTS.astype(np.float64).sum(1)
    return {"y": ((accumulated - zero) / 127.5 * W_SCALE).astype(np.float32)[None]}


def exact_net(feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """INT8 with 32-bit accumulation: what the graph says."""
    return _answer(_products(feed["image"]) @ WEIGHTS.T.astype(np.int64))


def saturating_net(feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """vpmaddubsw: two u8 x s8 products are added in 16 bits, which saturate, before they are widened."""
    u = _products(feed["image"])[:, None]
    pairs = (u * WEIGHTS.astype(np.int64)[None]).reshape(u.shape[0], OUT, TAPS // 2, 2).sum(-1)
    return _answer(np.clip(pairs, -(2**15), 2**15 - 1).sum(-1))


INPUTS = [_image(i) for i in range(3)]
GOLDEN = golden.make(INPUTS, float_net, exact_net, target="toy int8")


def test_the_engine_that_it_was_made_for_is_accepted() -> None:
    verdict = golden.check(GOLDEN, exact_net)
    assert verdict.passed is True
    assert verdict.value is not None
    assert 0.2 < verdict.value < 1 / golden.MARGIN  # the margin, and the floor of half precision
    assert verdict.details["inputs"] == 3
    assert device.accept(GOLDEN, float_net).accepted


def test_a_cpu_whose_products_saturate_is_caught() -> None:
    """Fails if the tolerance is widened by an order of magnitude, or if it were measured on the saturating CPU itself."""
    verdict = golden.check(GOLDEN, saturating_net)
    assert verdict.passed is False
    assert "output y" in verdict.note
    assert verdict.value is not None
    assert verdict.value > 3
    fooled = golden.make(INPUTS, float_net, saturating_net, target="toy int8")
    assert golden.check(fooled, saturating_net).passed is True


@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        ("missing", lambda y: {}),
        ("another shape", lambda y: {"y": y["y"][:, :-1]}),
        ("not a number", lambda y: {"y": np.where(np.arange(y["y"].size).reshape(y["y"].shape) == 0, np.nan, y["y"])}),
        ("infinite", lambda y: {"y": y["y"] * np.float32(np.inf)}),
        ("one value far off", lambda y: {"y": y["y"] + 50.0 * (np.arange(y["y"].size).reshape(y["y"].shape) == 7)}),
        ("all a little off", lambda y: {"y": y["y"] + GOLDEN.outputs["y"].tolerance.rms * 1.2}),
        ("rows swapped", lambda y: {"y": y["y"][:, ::-1]}),
    ],
)
def test_a_wrong_answer_is_refused(name: str, spoil) -> None:
    found = golden.check(GOLDEN, lambda feed: spoil(exact_net(feed)))
    assert found.passed is False, name
    json.dumps(found.to_json(), allow_nan=False)


def test_inputs_are_the_same_bits_after_the_file() -> None:
    again = device.Golden.from_bytes(GOLDEN.to_bytes())
    for i in range(3):
        assert again.feed(i)["image"].tobytes() == GOLDEN.feed(i)["image"].tobytes()
        assert np.abs(again.feed(i)["image"] - INPUTS[i]).max() <= again.step / 2 + 1e-6
    assert again.to_bytes() == GOLDEN.to_bytes()
    assert golden.check(again, exact_net) == golden.check(GOLDEN, exact_net)


def test_making_it_twice_gives_the_same_bytes() -> None:
    assert golden.make(INPUTS, float_net, exact_net, target="toy int8").to_bytes() == GOLDEN.to_bytes()


def test_size_is_bounded_by_leaving_inputs_out_never_the_first() -> None:
    one = golden.make(INPUTS, float_net, exact_net, target="t", max_bytes=1)
    assert len(one.inputs) == 1
    many = golden.make([_image(i, (1, 1, 128, 128)) for i in range(20)], float_net, exact_net, target="t")
    assert 1 < len(many.inputs) < 20
    assert len(many.to_bytes()) <= golden.MAX_BYTES


def test_a_large_output_is_kept_at_its_largest_places_too() -> None:
    def net(feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        y = np.zeros((1, 3, 100, 100), np.float32)
        y[0, 1, 40:44, 50:54] = feed["image"].mean() + 9
        return {"dense": y}

    made = golden.make([_image(1)], net, net, target="t")
    assert made.outputs["dense"].places.size == device.MAX_VALUES

    def without(feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"dense": np.zeros((1, 3, 100, 100), np.float32)}

    assert golden.check(made, net).passed is True
    assert golden.check(made, without).passed is False


@pytest.mark.parametrize(
    ("inputs", "net"),
    [
        ([], float_net),
        ([_image(1), _image(2, (1, 1, 8, 64))], float_net),
        ([np.full((1, 1, 16, 64), np.nan, np.float32)], float_net),
        ([_image(1)], lambda feed: {"y": np.full((1, 4), np.inf, np.float32)}),
        ([_image(1)], lambda feed: {"y": np.full((1, 4), 1e6, np.float32)}),
    ],
    ids=["none", "shapes", "NaN input", "infinite output", "beyond half precision"],
)
def test_what_cannot_be_golden_is_refused(inputs: list[np.ndarray], net) -> None:
    with pytest.raises(CalibrationInvalid):
        golden.make(inputs, net, net, target="t")


def test_a_constant_input_is_fed_as_it_is() -> None:
    made = golden.make([np.full((1, 1, 16, 64), -1, np.float32)], float_net, exact_net, target="t")
    assert (made.feed(0)["image"] == -1).all()


# -- hostile files ----------------------------------------------------------------------------------------------------


def _file(change, payload: bytes | None = None) -> bytes:
    content = GOLDEN.to_bytes()
    end = content.index(b"\n", len(device.MAGIC))
    header = json.loads(content[len(device.MAGIC) : end])
    change(header)
    return device.MAGIC + json.dumps(header).encode() + b"\n" + (content[end + 1 :] if payload is None else payload)


HOSTILE = {
    "empty": b"",
    "another file": b"PK\x03\x04" + bytes(100),
    "no header": device.MAGIC,
    "header of no end": device.MAGIC + b"[" * 5000 + b"\n",
    "header is a list": device.MAGIC + b"[]\n",
    "truncated": GOLDEN.to_bytes()[:-20],
    "something after the end": GOLDEN.to_bytes() + b"x",
    "bomb": _file(lambda h: None, zlib.compress(bytes(100 << 20))),
    "inputs of a terabyte": _file(lambda h: h["input"].update(shape=[3, 65536, 65536, 256])),
    "no inputs": _file(lambda h: h["input"].update(shape=[0, 1, 16, 64])),
    "shape is text": _file(lambda h: h["input"].update(shape="16")),
    "shape is true": _file(lambda h: h["input"].update(shape=[True, 1, 16, 64])),
    "no outputs": _file(lambda h: h.update(outputs=[])),
    "output twice": _file(lambda h: h["outputs"].append(h["outputs"][0])),
    "places outside": _file(lambda h: h["outputs"][0].update(shape=[1, 2, 2])),
    "infinite tolerance": _file(lambda h: h["outputs"][0].update(max_abs=float("inf"))),
    "tolerance is text": _file(lambda h: h["outputs"][0].update(rms="1e9")),
    "negative tolerance": _file(lambda h: h["outputs"][0].update(rms=-1)),
    "step not a number": _file(lambda h: h["input"].update(step=float("nan"))),
    "name is a number": _file(lambda h: h["input"].update(name=3)),
    "pickle": b"\x80\x04\x95" + bytes(50),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_refused(name: str) -> None:
    with pytest.raises(BundleCorrupt):
        device.Golden.from_bytes(HOSTILE[name])


@settings(max_examples=150, deadline=None)
@given(st.integers(0, len(GOLDEN.to_bytes()) - 1), st.integers(0, 255))
def test_one_changed_byte_never_crashes(at: int, value: int) -> None:
    content = bytearray(GOLDEN.to_bytes())
    content[at] = value
    try:
        read = device.Golden.from_bytes(bytes(content))
    except BundleCorrupt:
        return
    assert set(read.outputs)
    assert len(read.inputs) <= device.MAX_INPUTS


def test_the_largest_value_of_a_tolerance_counts_and_so_does_the_mean() -> None:
    """Each of the two bounds refuses alone: dropping either from the rule fails here."""
    wanted = GOLDEN.outputs["y"]
    loose_rms = replace(GOLDEN, outputs={"y": replace(wanted, tolerance=replace(wanted.tolerance, rms=1e9))})
    loose_max = replace(GOLDEN, outputs={"y": replace(wanted, tolerance=replace(wanted.tolerance, max_abs=1e9))})
    assert not device.accept(loose_rms, saturating_net).accepted
    assert not device.accept(loose_max, saturating_net).accepted


def test_a_hundred_values_that_happen_to_agree_do_not_make_a_narrow_tolerance() -> None:
    """Half of the places off by one step each: the largest equals the spread, and the next runtime's largest will not."""
    steps = 0.01 * np.where(np.arange(96) % 2, 1.0, -1.0).astype(np.float32)

    def fp32(feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"y": np.zeros((1, 96), np.float32)}

    def as_written(feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"y": steps[None]}

    def another(scale: float) -> bool:
        spread = np.random.default_rng(3).normal(0, 0.01, 96).astype(np.float32)
        return golden.check(found, lambda feed: {"y": scale * spread[None]}).passed is True

    found = golden.make(INPUTS[:1], fp32, as_written, target="toy int8")
    tolerance = found.outputs["y"].tolerance
    assert tolerance.max_abs == pytest.approx(golden.MARGIN * golden.LARGEST_OF_FEW * 0.01, rel=1e-2)
    assert tolerance.rms == pytest.approx(golden.MARGIN * 0.01, rel=1e-2)
    assert another(1.0)
    assert not another(2.0)  # a wider spread is refused as ever, by the spread
