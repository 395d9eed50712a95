"""What single backends promise beyond the common contract: sealed blobs, tensor mappings, devices, the old runtime's process."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_graph import HERE, SIGNATURE, an_image, by_hand, deeper_model, small_model

from appliance import backends
from appliance.backends import Signature, Tensor, _toolchains, myriad, onnxruntime, openvino, tensorrt, tflite
from appliance.backends._enginecache import EngineCache, Key
from appliance.backends._sealed import seal, unseal
from appliance.errors import BackendFailed, BackendUnavailable

F32 = (HERE / "small.f32.tflite").read_bytes()
INT8 = (HERE / "small.int8.tflite").read_bytes()
MAGIC = b"SPXTEST\n"


# -- sealed blobs ---------------------------------------------------------------------------------------------------


@given(parts=st.dictionaries(st.text(min_size=1, max_size=8), st.binary(max_size=300), max_size=4), note=st.text(max_size=20))
def test_what_is_sealed_comes_back(parts: dict[str, bytes], note: str) -> None:
    blob = seal(MAGIC, {"note": note}, parts)
    assert unseal(MAGIC, blob, "test") == ({"note": note}, parts)
    assert seal(MAGIC, {"note": note}, parts) == blob


@given(data=st.data())
def test_a_damaged_blob_is_refused(data: st.DataObject) -> None:
    """Every byte counts but the zeros between parts: whatever comes back despite a change is what was sealed."""
    parts = {"a": bytes(range(100)), "b": b"xyz"}
    blob = bytearray(seal(MAGIC, {"k": 1}, parts))
    at = data.draw(st.integers(0, len(blob) - 1))
    blob[at] ^= data.draw(st.integers(1, 255))
    try:
        header, found = unseal(MAGIC, bytes(blob), "test")
    except BackendFailed:
        return
    assert found == parts or set(found) != set(parts)  # the names themselves are in the header, which the bundle's digest covers
    assert header.keys() <= {"k"} or header != {"k": 1}


@given(cut=st.integers(0, 10_000))
def test_a_cut_blob_is_refused(cut: int) -> None:
    blob = seal(MAGIC, {}, {"a": bytes(100), "b": b"xyz"})
    with pytest.raises(BackendFailed, match="test"):
        unseal(MAGIC, blob[: cut % len(blob)], "test")
    with pytest.raises(BackendFailed, match="left over"):
        unseal(MAGIC, blob + b"\0", "test")


HEADERS = {
    "no parts": b"{}",
    "not an object": b"[]",
    "nested": b"[" * 50_000,
    "negative": json.dumps({"parts": [{"name": "a", "bytes": -5, "sha256": ""}]}).encode(),
    "huge": json.dumps({"parts": [{"name": "a", "bytes": 1 << 60, "sha256": ""}]}).encode(),
    "many parts": json.dumps({"parts": [{"name": str(i), "bytes": 0, "sha256": ""} for i in range(9)]}).encode(),
    "infinite": b'{"parts": [{"name": "a", "bytes": 1e999, "sha256": ""}]}',
}


@pytest.mark.parametrize("text", HEADERS.values(), ids=HEADERS.keys())
def test_a_hostile_header_is_refused(text: bytes) -> None:
    with pytest.raises(BackendFailed):
        unseal(MAGIC, MAGIC + len(text).to_bytes(4, "little") + text, "test")
    with pytest.raises(BackendFailed, match="cut short"):
        unseal(MAGIC, MAGIC + b"\xff\xff\xff\xff" + text, "test")


# -- TensorFlow Lite ------------------------------------------------------------------------------------------------


def test_int8_is_close_to_float_and_deterministic() -> None:
    reference = onnxruntime.open(deeper_model().SerializeToString(), SIGNATURE, precision="f32", threads=1)
    with pytest.raises(BackendFailed, match="bf16"):
        tflite.open(INT8, SIGNATURE, precision="bf16")
    session = tflite.open(INT8, SIGNATURE, threads=1)
    image = an_image(20)
    wanted, found, again = reference.run({"image": image}), session.run({"image": image}), session.run({"image": image})
    for name, values in wanted.items():
        assert not np.array_equal(found[name], values)  # it is quantised
        noise = np.square(found[name] - values).sum()
        assert 10 * np.log10(np.square(values).sum() / noise) > 25
        np.testing.assert_array_equal(found[name], again[name])


def altered(change: Any, blob: bytes = F32) -> bytes:
    header, parts = unseal(tflite.MAGIC, blob, "test")
    change(header)
    return seal(tflite.MAGIC, header, parts)


def _entry(kind: str, **values: Any) -> Any:
    return lambda header: header[kind][0].update(values)


WRONG = {
    "axes twice": _entry("outputs", axes=[0, 0, 1, 2]),
    "too few axes": _entry("outputs", axes=[0, 1]),
    "another layout": _entry("outputs", axes=[0, 2, 1, 3]),
    "a far position": _entry("outputs", index=9),
    "a negative position": _entry("outputs", index=-1),
    "text for a number": _entry("inputs", index="first"),
    "another shape": _entry("inputs", shape=[1, 1, 10, 12]),
    "another name": _entry("inputs", name="picture"),
    "no outputs": lambda header: header.pop("outputs"),
    "fewer outputs": lambda header: header["outputs"].pop(),
    "not a list": lambda header: header.update(inputs={"image": 0}),
    "not an object": lambda header: header.update(inputs=["image"]),
    "very many axes": _entry("inputs", shape=[1] * 40, axes=list(range(40))),
}


@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG.keys())
def test_a_mapping_that_does_not_fit_is_refused_before_anything_runs(change: Any) -> None:
    with pytest.raises(BackendFailed, match="tflite"):
        tflite.open(altered(change), SIGNATURE)


def test_a_flatbuffer_that_is_not_one_is_refused() -> None:
    header, _ = unseal(tflite.MAGIC, F32, "test")
    for flat in (b"", b"TFL3", bytes(2000), b"\x1c\0\0\0TFL3" + bytes(100)):
        with pytest.raises(BackendFailed, match="tflite"):
            tflite.open(seal(tflite.MAGIC, header, {"tflite": flat}), SIGNATURE)


def test_a_signature_of_another_model_is_refused() -> None:
    other = Signature(SIGNATURE.inputs, (Tensor("features", (1, 3, 10, 12)), SIGNATURE.outputs[1]))
    with pytest.raises(BackendFailed, match="other inputs or outputs"):
        tflite.open(F32, other)


def test_the_older_runtime_is_taken_where_it_is_the_only_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """tflite-runtime has the same interpreter under another name."""
    import ai_edge_litert.interpreter as real

    asked = []

    def only_old(name: str) -> Any:
        asked.append(name)
        if name.startswith("ai_edge_litert"):
            raise ImportError(f"No module named {name!r}")
        return real

    monkeypatch.setattr(tflite.importlib, "import_module", only_old)
    assert tflite._runtime() == (real, "tflite-runtime")
    assert asked == ["ai_edge_litert.interpreter", "tflite_runtime.interpreter"]
    session = tflite.open(F32, SIGNATURE)
    np.testing.assert_allclose(session.run({"image": an_image(1)})["mean"], by_hand(an_image(1))["mean"], atol=1e-4)


# -- devices --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "parsed"),
    [
        ("openvino", ("openvino", "")),
        ("openvino:GPU", ("openvino", "GPU")),
        ("openvino:AUTO:NPU,CPU", ("openvino", "AUTO:NPU,CPU")),
        ("tensorrt:GPU.1", ("tensorrt", "GPU.1")),
        ("auto", ("auto", "")),
    ],
)
def test_a_backend_as_a_person_writes_it(spec: str, parsed: tuple[str, str]) -> None:
    assert backends.parse(spec) == parsed


def test_an_unknown_backend_in_a_spec_is_named() -> None:
    with pytest.raises(BackendUnavailable, match="no such backend"):
        backends.parse("abacus:GPU")


@pytest.mark.parametrize("device", ["CPU", "AUTO", "AUTO:NPU,CPU", "AUTO:GPU,CPU"])
def test_openvino_runs_on_the_device_asked_for_or_falls_back_where_that_is_asked_for(device: str) -> None:
    session = openvino.open(small_model().SerializeToString(), SIGNATURE, precision="f32", threads=1, device=device)
    image = an_image(1)
    np.testing.assert_allclose(session.run({"image": image})["features"], by_hand(image)["features"], atol=1e-2)
    session.close()


def test_auto_over_devices_that_are_not_here_says_so() -> None:
    with pytest.raises(BackendFailed, match="none of these"):
        openvino.open(small_model().SerializeToString(), SIGNATURE, precision="f32", device="AUTO:NPU,GPU.7")


@pytest.mark.parametrize("device", ["cpu", "TPU", "CPU;", "AUTO:", "AUTO:CPU,", "../CPU", "GPU.123", "AUTO:" + ",".join(["CPU"] * 9)])
def test_a_device_that_is_none_is_refused_by_name(device: str) -> None:
    for module in (openvino, onnxruntime, tflite):
        with pytest.raises(BackendFailed) as caught:
            module.open(F32 if module is tflite else small_model().SerializeToString(), SIGNATURE, precision="f32", device=device)
        assert caught.value.value == device[:200]


@pytest.mark.parametrize("device", ["CPU", "GPU.x", "GPU.-1", "cuda"])
def test_tensorrt_knows_its_devices(device: str) -> None:
    with pytest.raises(BackendFailed, match="GPU"):
        tensorrt._number(device)
    assert [tensorrt._number(d) for d in ("", "GPU", "GPU.1")] == [0, 0, 1]


def test_a_compiled_model_is_kept_and_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blob, image = small_model().SerializeToString(), an_image(3)

    def answer() -> dict[str, np.ndarray]:
        session = openvino.open(blob, SIGNATURE, precision="f32", threads=1, cache=tmp_path)
        try:
            return session.run({"image": image})
        finally:
            session.close()

    first = answer()
    (kept,) = tmp_path.glob("*.engine")
    real = openvino._runtime()

    class NoCompiler:
        """The Core, but compiling is an error: what runs now was kept."""

        def __getattr__(self, name: str) -> Any:
            assert name != "compile_model"
            return getattr(real, name)

    with monkeypatch.context() as patch:
        patch.setattr(openvino, "_core", NoCompiler())
        second = answer()
    for name, values in first.items():
        np.testing.assert_array_equal(second[name], values)
    kept.write_bytes(kept.read_bytes()[:-7])  # torn: compiled again
    np.testing.assert_array_equal(answer()["mean"], first["mean"])
    assert len(list(tmp_path.glob("*.engine"))) == 1


def test_a_kept_model_that_openvino_does_not_take_back_is_compiled_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EngineCache, "get", lambda self, key: b"whole, but not a model")
    dropped: list[Key] = []
    monkeypatch.setattr(EngineCache, "drop", lambda self, key: dropped.append(key))
    session = openvino.open(small_model().SerializeToString(), SIGNATURE, precision="f32", cache=tmp_path)
    np.testing.assert_allclose(session.run({"image": an_image(1)})["mean"], by_hand(an_image(1))["mean"], atol=1e-4)
    assert len(dropped) == 1


# -- the old runtime's process --------------------------------------------------------------------------------------

FAKE = """
import sys, struct, json, time, os
from pathlib import Path
FRAME = struct.Struct("<4sIQ")
def answer(header, payload=b"", magic=b"SPXW"):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    sys.stdout.buffer.write(FRAME.pack(magic, len(text), len(payload)) + text + payload); sys.stdout.buffer.flush()
def question():
    magic, h, p = FRAME.unpack(sys.stdin.buffer.read(FRAME.size))
    return json.loads(sys.stdin.buffer.read(h)), sys.stdin.buffer.read(p)
question(); answer({})
question()
"""
BLOB = myriad.wrap(b"<net/>", bytes(100), SIGNATURE)
MISBEHAVIOUR = {
    "hangs": ("time.sleep(60)", "in time"),
    "dies": ("print('libusb: gone', file=sys.stderr); os._exit(9)", "died.*libusb"),
    "crashes": ("os.kill(os.getpid(), 11)", "died"),
    "another magic": ("answer({}, magic=b'HTTP'); time.sleep(60)", "nonsense"),
    "a huge header": ("sys.stdout.buffer.write(FRAME.pack(b'SPXW', 1 << 31, 0)); sys.stdout.buffer.flush(); time.sleep(60)", "nonsense"),
    "a huge payload": ("sys.stdout.buffer.write(FRAME.pack(b'SPXW', 2, 1 << 62)); sys.stdout.buffer.flush(); time.sleep(60)", "nonsense"),
    "not JSON": ("answer(b'{nope')", "cannot be read"),
    "nested JSON": ("answer(b'[' * 60000)", "cannot be read"),
    "a list": ("answer([])", "failed"),
    "half an answer": (
        "sys.stdout.buffer.write(FRAME.pack(b'SPXW', 2, 100) + b'{}' + bytes(50)); sys.stdout.buffer.flush(); os._exit(0)",
        "died",
    ),
    "too little": ("answer({}, bytes(8))", "another size"),
    "an error": ("answer({'error': 'Can not init Myriad device: NC_ERROR'})", "NC_ERROR"),
}


@pytest.fixture
def fake_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """This interpreter in place of the old one, and a script that misbehaves in place of the worker."""

    def install(source: str) -> None:
        script = tmp_path / "worker.py"
        script.write_text(FAKE + source)
        monkeypatch.setattr(myriad, "WORKER", script)

    monkeypatch.setattr(_toolchains, "interpreter", lambda name: Path(sys.executable))
    monkeypatch.setattr(myriad, "RUN_S", 1.0)
    return install


@pytest.mark.parametrize(("source", "complaint"), MISBEHAVIOUR.values(), ids=MISBEHAVIOUR.keys())
def test_a_worker_that_misbehaves_is_a_failure_in_time(fake_worker: Any, source: str, complaint: str) -> None:
    fake_worker(source)
    header, parts = unseal(myriad.SEALED, BLOB, "test")
    assert header
    session = myriad.Session({"device": "CPU", "format": "ir", "first_bytes": 6}, parts["xml"], SIGNATURE, run_s=1.0)
    process = session._process._process
    began = time.monotonic()
    with pytest.raises(BackendFailed, match=f"(?s){complaint}"):
        session.run({"image": an_image(1)})
    assert time.monotonic() - began < 5
    if complaint not in ("failed", "another size", "NC_ERROR"):
        assert process.poll() is not None  # what broke the protocol is not asked again
        with pytest.raises(BackendFailed):
            session.run({"image": an_image(1)})
    session.close()
    assert process.poll() is not None


def test_a_worker_that_reads_nothing_does_not_hang_the_caller(fake_worker: Any) -> None:
    fake_worker("time.sleep(60)")
    session = myriad.Session({"device": "CPU", "format": "ir", "first_bytes": 0}, b"", SIGNATURE, run_s=0.5)
    wide = Signature((Tensor("image", (1, 1, 2048, 2048)),), SIGNATURE.outputs)
    session._signature = wide  # more than a pipe holds
    with pytest.raises(BackendFailed, match="in time"):
        session.run({"image": np.zeros((1, 1, 2048, 2048), np.float32)})
    session.close()


def test_without_its_environment_myriad_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    state = myriad.probe()
    assert not state.available
    assert "make toolchains" in state.reason
    with pytest.raises(BackendUnavailable):
        myriad.open(BLOB, SIGNATURE)


def test_myriad_is_fp16_on_a_stick_or_the_old_cpu() -> None:
    for options, complaint in (({"precision": "int8"}, "FP16 only"), ({"device": "NPU"}, "MYRIAD or CPU")):
        with pytest.raises(BackendFailed, match=complaint):
            myriad.open(BLOB, SIGNATURE, **options)  # type: ignore[arg-type]
    with pytest.raises(BackendFailed, match="other inputs"):
        myriad.open(BLOB, dataclasses.replace(SIGNATURE, inputs=()))


@pytest.fixture(scope="module")
def old_cpu() -> Iterator[Any]:
    """The small graph as FP16 IR on the old runtime's CPU plugin: protocol, worker and graph are real, the stick is not."""
    from appliance.compiler import convert

    session = myriad.open(convert.to_myriad(small_model()), SIGNATURE, device="CPU")
    yield session
    session.close()


@pytest.mark.toolchain("myriad")
def test_the_old_runtime_gives_the_sum_by_hand(old_cpu: Any) -> None:
    image = an_image(1)
    kept = image.copy()
    first = old_cpu.run({"image": image})
    for name, values in by_hand(image).items():
        assert first[name].dtype == np.float32
        np.testing.assert_allclose(first[name], values, atol=5e-3)  # weights of eleven bits
    copies = {n: v.copy() for n, v in first.items()}
    old_cpu.run({"image": an_image(2)})
    for name, values in copies.items():
        np.testing.assert_array_equal(first[name], values)
    np.testing.assert_array_equal(image, kept)
    with pytest.raises(BackendFailed):
        old_cpu.run({"image": np.zeros((1, 1, 3, 3), np.float32)})
    with pytest.raises(BackendFailed):
        old_cpu.run({})
    np.testing.assert_array_equal(old_cpu.run({"image": image})["mean"], copies["mean"])


@pytest.mark.toolchain("myriad")
def test_the_old_runtime_killed_in_the_middle_is_a_failure() -> None:
    from appliance.compiler import convert

    session = myriad.open(convert.to_myriad(small_model()), SIGNATURE, device="CPU")
    os.kill(session._process._process.pid, signal.SIGKILL)
    with pytest.raises(BackendFailed, match=r"died|ended"):
        session.run({"image": an_image(1)})
    session.close()


@pytest.mark.toolchain("myriad")
def test_the_old_runtime_refuses_a_broken_ir_with_its_own_words() -> None:
    with pytest.raises(BackendFailed, match="myriad failed"):
        myriad.build(BLOB)
    assert "stick" in myriad.probe().reason or myriad.probe().available


def test_openvino_reports_to_nobody(tmp_path: Path) -> None:
    """Its tools send usage statistics when they are imported, and keep a client's number in the home folder."""
    code = (
        "import sys, threading, time\n"
        "from appliance import backends\n"
        "assert backends.probe('openvino').available, backends.probe('openvino').reason\n"
        "time.sleep(0.5)\n"
        "print([n for n in sys.modules if n.startswith('openvino_telemetry.')], threading.active_count())\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ, "HOME": str(tmp_path)}, timeout=120
    )
    assert found.stdout.split() == ["[]", "1"]
    assert list(tmp_path.iterdir()) == []
