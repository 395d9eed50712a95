"""The Open Inference Protocol over a real server: with tritonclient as it is published, with curl, and with bytes that no client sends."""

from __future__ import annotations

import json
import re
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tritonclient.http as triton
from flask import Flask
from hypothesis import given, settings
from hypothesis import strategies as st
from tritonclient.utils import InferenceServerException

from appliance import backends
from appliance.backends import Signature, Tensor, null
from appliance.backends._tiny import TINY_INPUT, TINY_ONNX, TINY_OUTPUT
from appliance.bundle import SHIPPED, open_bundle
from appliance.errors import OutOfTime, SpineboxError, UsageError
from appliance.web import Server, v2
from appliance.web.v2 import ModelInfo, TensorInfo, add_v2

DOC = Path(__file__).parent.parent / "docs" / "open-inference.md"


def tensor(name: str, *shape: int) -> TensorInfo:
    return TensorInfo(name, "FP32", shape)


class Device:
    """A double of the dispatcher: `tiny` on ONNX Runtime, `sum` of two inputs in numpy, `grader` as it ships, on the null backend."""

    def __init__(self) -> None:
        signature = Signature((Tensor("image", (1, 4)),), (Tensor("out", (1, 4)),))
        self.tiny = backends.load("onnxruntime").open(TINY_ONNX, signature, precision="f32", threads=1)
        shipped = open_bundle(SHIPPED).engine("grader").signature
        self.grader = null.Session(shipped)
        self.known = {
            "tiny": ModelInfo("tiny", "1", "onnxruntime_onnx", (tensor("image", 1, 4),), (tensor("out", 1, 4),)),
            "sum": ModelInfo("sum", "3", "null_any", (tensor("a", 2, 3), tensor("b", 3)), (tensor("sum", 2, 3), tensor("mean"))),
            "grader": ModelInfo(
                "grader",
                "1",
                "null_any",
                tuple(tensor(t.name, *t.shape) for t in shipped.inputs),
                tuple(tensor(t.name, *t.shape) for t in shipped.outputs),
            ),
        }
        self.up = True
        self.fails: Exception | None = None
        self.deadlines = []
        self.gone = []
        self.inputs = {}
        self.lock = threading.Lock()

    def models(self):
        return self.known

    def ready(self):
        return self.up

    def infer(self, model, inputs, deadline, gone):
        self.deadlines.append(deadline)
        self.gone.append(gone())
        self.inputs = inputs
        if self.fails is not None:
            raise self.fails
        with self.lock:
            if model == "sum":
                total = inputs["a"] + inputs["b"]
                return {"sum": total, "mean": np.float32(total.mean())}
            return (self.tiny if model == "tiny" else self.grader).run(dict(inputs))


@pytest.fixture
def device() -> Device:
    return Device()


@pytest.fixture(params=["through Flask", "before Flask"])
def app(device, request) -> Flask:
    """The routes, and the short way that inferences take where the application lets it: they are one to a client."""
    app = Flask("box")
    app.url_map.merge_slashes = False
    more = {"admit": lambda environ: True, "headers": {"X-Own": "1"}} if request.param == "before Flask" else {}
    add_v2(app, device, 3000.0, **more)
    return app


@pytest.fixture
def server(app) -> Iterator[Server]:
    made = Server(app, port=0)
    thread = threading.Thread(target=made.run)
    thread.start()
    yield made
    made.stop()
    thread.join(10)
    assert not thread.is_alive()


@pytest.fixture
def client(server) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(f"127.0.0.1:{server.port}") as made:
        yield made


def image(values=TINY_INPUT, binary=True, name="image", datatype="FP32"):
    return triton.InferInput(name, list(values.shape), datatype).set_data_from_numpy(values, binary_data=binary)


# --- tritonclient ------------------------------------------------------------------------------------------------------


def test_metadata_health_and_index(client, device):
    about = client.get_server_metadata()
    assert about["name"] == "spinebox"
    assert about["extensions"] == ["binary_tensor_data"]
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", about["version"])
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("tiny")
    assert client.is_model_ready("tiny", "1")
    assert not client.is_model_ready("tiny", "2")
    assert not client.is_model_ready("nobody")
    expected = {
        "name": "sum",
        "versions": ["3"],
        "platform": "null_any",
        "inputs": [{"name": "a", "datatype": "FP32", "shape": [2, 3]}, {"name": "b", "datatype": "FP32", "shape": [3]}],
        "outputs": [{"name": "sum", "datatype": "FP32", "shape": [2, 3]}, {"name": "mean", "datatype": "FP32", "shape": []}],
    }
    assert client.get_model_metadata("sum") == expected
    assert client.get_model_metadata("sum", "3") == expected
    listed = client.get_model_repository_index()
    assert [(m["name"], m["version"], m["state"]) for m in listed] == [
        ("tiny", "1", "READY"),
        ("sum", "3", "READY"),
        ("grader", "1", "READY"),
    ]
    device.up = False
    assert client.is_server_live()
    assert not client.is_server_ready()
    assert not client.is_model_ready("tiny")
    assert {m["state"] for m in client.get_model_repository_index()} == {"UNAVAILABLE"}


@pytest.mark.parametrize("binary_in", [True, False])
@pytest.mark.parametrize("binary_out", [True, False])
@pytest.mark.parametrize("version", ["", "1"])
def test_infer_in_binary_and_in_json(client, binary_in, binary_out, version):
    outputs = [triton.InferRequestedOutput("out", binary_data=binary_out)]
    answer = client.infer("tiny", [image(binary=binary_in)], model_version=version, outputs=outputs, request_id="study 7")
    np.testing.assert_array_equal(answer.as_numpy("out"), TINY_OUTPUT)
    said = answer.get_response()
    assert (said["model_name"], said["model_version"], said["id"]) == ("tiny", "1", "study 7")
    (output,) = said["outputs"]
    assert (output["datatype"], output["shape"]) == ("FP32", [1, 4])
    assert ("data" in output, output.get("parameters")) == ((False, {"binary_data_size": 16}) if binary_out else (True, None))


def test_all_outputs_where_none_is_named(client):
    a, b = np.arange(6, dtype=np.float32).reshape(2, 3), np.full(3, 0.5, np.float32)
    answer = client.infer("sum", [image(b, name="b"), image(a, name="a")])  # in another order than the signature's
    np.testing.assert_array_equal(answer.as_numpy("sum"), a + b)
    np.testing.assert_allclose(answer.as_numpy("mean"), 3.0)
    assert "id" not in answer.get_response()
    assert [o["name"] for o in answer.get_response()["outputs"]] == ["sum", "mean"]


def test_some_outputs_in_the_order_asked_and_mixed_forms(client):
    a, b = np.ones((2, 3), np.float32), np.ones(3, np.float32)
    inputs = [image(a, name="a", binary=False), image(b, name="b")]  # one in JSON, the other in binary
    only = client.infer("sum", inputs, outputs=[triton.InferRequestedOutput("mean")])
    assert only.as_numpy("sum") is None
    assert only.as_numpy("mean") == 2.0
    wanted = [triton.InferRequestedOutput("mean", binary_data=False), triton.InferRequestedOutput("sum", binary_data=True)]
    both = client.infer("sum", inputs, outputs=wanted)
    assert [o["name"] for o in both.get_response()["outputs"]] == ["mean", "sum"]
    np.testing.assert_array_equal(both.as_numpy("sum"), a + b)
    np.testing.assert_array_equal(both.as_numpy("mean"), 2.0)


def test_many_requests_over_several_connections_at_once(server):
    """tritonclient's own `async_infer` runs in greenlets; threads with a client each are what a clinic has."""
    wrong = []

    def ask(seed: int) -> None:
        rng = np.random.default_rng(seed)
        with triton.InferenceServerClient(f"127.0.0.1:{server.port}") as own:
            for k in range(20):
                a, b = rng.random((2, 3), np.float32), rng.random(3, np.float32)
                answer = own.infer("sum", [image(a, name="a"), image(b, name="b")], request_id=f"{seed}.{k}")
                if not (np.array_equal(answer.as_numpy("sum"), a + b) and answer.get_response()["id"] == f"{seed}.{k}"):
                    wrong.append((seed, k))

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize(
    ("model", "inputs", "version", "outputs", "status", "words"),
    [
        ("nobody", [image()], "", None, "404", "no such model (value: nobody). Ask for one of: grader, sum, tiny."),
        ("tiny", [image()], "9", None, "404", "no such version (value: 9). Ask for version 1"),
        ("tiny", [image(name="picture")], "", None, "400", "no such input (value: picture). Its inputs are: image."),
        ("tiny", [image(), image()], "", None, "400", "a tensor stands twice in inputs (value: image)"),
        ("sum", [image(np.ones(3, np.float32), name="b")], "", None, "400", "an input is missing (value: a)"),
        ("tiny", [image(np.ones(4, np.float32))], "", None, "400", "has the shape [1, 4] (value: [4])"),
        ("tiny", [image(np.ones((2, 4), np.float32))], "", None, "400", "has the shape [1, 4] (value: [2, 4])"),
        ("tiny", [image(np.ones((1, 4)), datatype="FP64")], "", None, "400", "the input image is FP32 (value: FP64). Convert it"),
        ("tiny", [image(np.ones((1, 4), np.uint8), datatype="UINT8")], "", None, "400", "the input image is FP32 (value: UINT8)"),
        ("tiny", [image()], "", ["grade"], "400", "no such output (value: grade). Its outputs are: out."),
        ("tiny", [image()], "", ["out", "out"], "400", "a tensor stands twice in outputs (value: out)"),
        ("tiny", [image(np.full((1, 4), np.nan, np.float32))], "", None, "400", "not a finite FP32 (value: element 0)"),
        ("tiny", [image(np.array([[0, 1, -np.inf, 2]], np.float32))], "", None, "400", "not a finite FP32 (value: element 2)"),
    ],
)
def test_what_tritonclient_may_get_wrong(client, device, model, inputs, version, outputs, status, words):
    wanted = None if outputs is None else [triton.InferRequestedOutput(name) for name in outputs]
    with pytest.raises(InferenceServerException) as caught:
        client.infer(model, inputs, model_version=version, outputs=wanted)
    assert caught.value.status() == status
    assert "[usage.invalid]" in caught.value.message()
    assert words in caught.value.message()
    assert device.deadlines == []


def test_what_no_engine_here_has_is_refused(client):
    with pytest.raises(InferenceServerException, match="classification"):
        client.infer("tiny", [image()], outputs=[triton.InferRequestedOutput("out", class_count=2)])
    with pytest.raises(InferenceServerException, match="sequence_id"):
        client.infer("tiny", [image()], sequence_id=4, sequence_start=True)
    shared = triton.InferInput("image", [1, 4], "FP32")
    shared.set_shared_memory("region", 16)
    with pytest.raises(InferenceServerException, match="shared_memory_region"):
        client.infer("tiny", [shared])
    with pytest.raises(InferenceServerException, match="nothing at this address"):
        client.load_model("tiny")
    assert client.infer("tiny", [image()], priority=1, parameters={"colour": "grey"}).as_numpy("out") is not None


@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
def test_a_compressed_body_is_refused_clearly(client, algorithm):
    with pytest.raises(InferenceServerException, match=f"compressed requests are not taken .value: {algorithm}") as caught:
        client.infer("tiny", [image()], request_compression_algorithm=algorithm)
    assert caught.value.status() == "415"
    answer = client.infer("tiny", [image()], response_compression_algorithm=algorithm)  # asked for, and not given
    np.testing.assert_array_equal(answer.as_numpy("out"), TINY_OUTPUT)


def test_the_budget_is_the_headers_then_the_timeouts_then_the_default(client, device):
    client.infer("tiny", [image()], headers={"X-Latency-Budget-Ms": "250"}, timeout=700_000)
    client.infer("tiny", [image()], timeout=700_000)
    client.infer("tiny", [image()], timeout=0)
    client.infer("tiny", [image()])
    assert [d.budget.total_ms for d in device.deadlines] == [250.0, 700.0, 3000.0, 3000.0]
    for text in ("0", "-5", "nan", "inf", "1e9", "soon", "", "60001", "0.5"):
        with pytest.raises(InferenceServerException, match="a latency budget lies in 1 to 60000 ms") as caught:
            client.infer("tiny", [image()], headers={"X-Latency-Budget-Ms": text})
        assert caught.value.status() == "400"
    for timeout in (-1, 500, 10**12):
        with pytest.raises(InferenceServerException, match=r"microseconds|latency budget"):
            client.infer("tiny", [image()], timeout=timeout)
    assert len(device.deadlines) == 4


def test_the_clock_and_the_clients_presence_come_from_the_server(app, device):
    body = json.dumps({"inputs": [{"name": "image", "datatype": "FP32", "shape": [1, 4], "data": [0, 0, 0, 0]}]})
    began = time.monotonic() - 5
    answer = app.test_client().post(
        "/v2/models/tiny/infer", data=body, environ_overrides={"spinebox.started_s": began, "spinebox.gone": lambda: True}
    )
    assert answer.status_code == 200
    assert device.deadlines[0].started_s == began
    assert device.gone == [True]
    app.test_client().post("/v2/models/tiny/infer", data=body)
    assert abs(device.deadlines[1].started_s - time.monotonic()) < 5
    assert device.gone == [True, False]


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (OutOfTime("no time", value="40 ms"), "503", "[refused.out-of-time] no time (value: 40 ms). Send it again"),
        (UsageError("no"), "400", "[usage.invalid] no."),
        (SpineboxError("odd"), "500", "[internal] odd."),
        (ZeroDivisionError("secret"), "500", "[internal] an unexpected failure inside the appliance (value: ZeroDivisionError)"),
    ],
)
def test_errors_of_the_device_keep_code_and_status(client, device, error, status, words):
    device.fails = error
    with pytest.raises(InferenceServerException) as caught:
        client.infer("tiny", [image()])
    assert caught.value.status() == status
    assert words in caught.value.message()
    assert "secret" not in caught.value.message()


def test_a_refusal_for_time_says_when_to_come_back(app, device):
    device.fails = OutOfTime("no time")
    body = json.dumps({"inputs": [{"name": "image", "datatype": "FP32", "shape": [1, 4], "data": [0, 0, 0, 0]}]})
    assert app.test_client().post("/v2/models/tiny/infer", data=body).headers["Retry-After"] == "2"
    device.fails.retry_after_ms = 4100.0
    assert app.test_client().post("/v2/models/tiny/infer", data=body).headers["Retry-After"] == "5"


def test_an_engine_that_answers_wrongly_is_a_failure(client, device):
    device.infer = lambda *_: {"sum": np.ones((2, 3), np.float32)}
    inputs = [image(np.ones((2, 3), np.float32), name="a"), image(np.ones(3, np.float32), name="b")]
    with pytest.raises(InferenceServerException, match=r"backend.failed.*did not answer with one of its outputs .value: mean"):
        client.infer("sum", inputs)
    device.infer = lambda *_: {"out": np.array([[1, np.inf, 0, 0]], np.float32)}
    with pytest.raises(InferenceServerException, match=r"not finite .value: out.. Ask for the output as binary data"):
        client.infer("tiny", [image()], outputs=[triton.InferRequestedOutput("out", binary_data=False)])
    assert np.isinf(client.infer("tiny", [image()]).as_numpy("out")[0, 1])
    device.infer = lambda *_: {"out": np.arange(8, dtype=np.float64).reshape(1, 8)[:, ::2]}  # neither float32 nor contiguous
    np.testing.assert_array_equal(client.infer("tiny", [image()]).as_numpy("out"), [[0, 2, 4, 6]])


# --- the wire ----------------------------------------------------------------------------------------------------------


def entry(**changes) -> dict:
    made = {"name": "image", "datatype": "FP32", "shape": [1, 4], "parameters": {"binary_data_size": 16}, **changes}
    return {k: v for k, v in made.items() if v is not ...}


DATA = struct.pack("<4f", *TINY_INPUT[0])


def post(app: Flask, body: bytes, path="/v2/models/tiny/infer", **headers: str):
    return app.test_client().post(path, data=body, headers={k.replace("_", "-"): v for k, v in headers.items()})


def ask(app: Flask, *inputs: dict, data: bytes = DATA, path="/v2/models/tiny/infer", split: int | None = None, **more):
    head = json.dumps({"inputs": list(inputs), **more}).encode()
    return post(app, head + data, path, **{"Inference-Header-Content-Length": str(len(head) if split is None else split)})


def refused(answer, status: int, words: str) -> None:
    assert answer.status_code == status, answer.data
    assert answer.mimetype == "application/json"
    said = answer.get_json()
    assert list(said) == ["error"]
    assert words in said["error"]
    assert said["error"].startswith("[usage.invalid] ")
    assert len(answer.data) < 1500


def test_the_wire_form_is_the_published_one(app, device):
    """The examples of the two specifications, with our tensors in place of theirs."""
    answer = ask(app, entry(), outputs=[{"name": "out", "parameters": {"binary_data": True}}], id="42")
    assert answer.status_code == 200
    assert answer.mimetype == "application/octet-stream"
    split = int(answer.headers["Inference-Header-Content-Length"])
    assert int(answer.headers["Content-Length"]) == len(answer.data) == split + 16
    assert json.loads(answer.data[:split]) == {
        "model_name": "tiny",
        "model_version": "1",
        "id": "42",
        "outputs": [{"name": "out", "datatype": "FP32", "shape": [1, 4], "parameters": {"binary_data_size": 16}}],
    }
    assert answer.data[split:] == TINY_OUTPUT.astype("<f4").tobytes()
    assert device.inputs["image"].flags.aligned
    assert device.inputs["image"].flags.c_contiguous
    assert device.inputs["image"].dtype == np.float32

    plain = post(app, json.dumps({"inputs": [entry(parameters=..., data=[[-1, 0.25, 0.75, 2]])]}).encode())
    assert plain.mimetype == "application/json"
    assert "Inference-Header-Content-Length" not in plain.headers
    assert plain.get_json()["outputs"] == [{"name": "out", "datatype": "FP32", "shape": [1, 4], "data": [0.0, 0.0, 0.5, 3.0]}]
    # The default of all outputs, and one that says otherwise.
    either = ask(app, entry(), parameters={"binary_data_output": True}, outputs=[{"name": "out", "parameters": {"binary_data": False}}])
    assert either.get_json()["outputs"][0]["data"] == [0.0, 0.0, 0.5, 3.0]
    assert ask(app, entry(), parameters={"binary_data_output": True}, outputs=[]).data.endswith(TINY_OUTPUT.tobytes())
    assert ask(app, entry(), id="").get_json()["id"] == ""


@pytest.mark.parametrize(
    ("inputs", "data", "words"),
    [
        ([entry(parameters={"binary_data_size": 12})], DATA[:12], "FP32 of [1, 4] is 16 bytes"),
        ([entry(parameters={"binary_data_size": -16})], DATA, "does not fit its shape (value: -16)"),
        ([entry(parameters={"binary_data_size": 2**63})], DATA, "does not fit its shape"),
        ([entry(parameters={"binary_data_size": 16.0})], DATA, "does not fit its shape"),
        ([entry(parameters={"binary_data_size": "16"})], DATA, "does not fit its shape"),
        ([entry(parameters={"binary_data_size": True})], DATA, "does not fit its shape (value: True)"),
        ([entry(parameters={"binary_data_size": None})], DATA, "a parameter of the input image is text, a number"),
        ([entry()], DATA[:-1], "the binary data is shorter than its tensors (value: 15 bytes for 16)"),
        ([entry()], b"", "the binary data is shorter than its tensors"),
        ([entry(parameters=..., data=[0, 0, 0, 0])], DATA, "the binary data is longer than its tensors (value: 16 bytes for 0)"),
        ([entry(data=[0, 0, 0, 0])], DATA, "one of the two (value: image)"),
        ([entry(parameters=...)], DATA, "one of the two (value: image)"),
        ([entry(parameters=[])], DATA, "in an object (value: a list of 0)"),
        ([entry(parameters={str(i): 0 for i in range(33)})], DATA, "at most 32"),
        ([entry(datatype=...)], DATA, "is FP32 (value: null)"),
        ([entry(datatype="BYTES")], DATA, "is FP32 (value: BYTES)"),
        ([entry(shape=...)], DATA, "has the shape [1, 4] (value: null)"),
        ([entry(shape="1,4")], DATA, "has the shape [1, 4] (value: 1,4)"),
        ([entry(shape=[True, 4])], DATA, "has the shape [1, 4] (value: [True, 4])"),
        ([entry(shape=[1.0, 4])], DATA, "has the shape [1, 4]"),
        ([entry(shape=[-1, 4])], DATA, "has the shape [1, 4] (value: [-1, 4])"),
        ([entry(shape=[0, 4])], DATA, "has the shape [1, 4] (value: [0, 4])"),
        ([entry(shape=[2**62, 4, 2**62, 2**62])], DATA, "has the shape [1, 4]"),
        ([entry(shape=[2**32, 2**32 + 4])], DATA, "has the shape [1, 4]"),
        ([entry(shape=[10**4000, 4])], DATA, "has the shape [1, 4]"),
        ([entry(shape=[1] * 100 + [4])], DATA, "has the shape [1, 4] (value: a list of 101)"),
        ([entry(name=3)], DATA, "each of inputs is an object with a name"),
        (["image"], DATA, "each of inputs is an object with a name (value: image)"),
        ([], DATA, "an input is missing (value: image)"),
        ([entry(name=f"i{i}") for i in range(65)], DATA, "a list of at most 64 tensors"),
        ([entry()], struct.pack("<4I", 0, 0x7F800001, 0, 0), "not a finite FP32 (value: element 1)"),  # a signalling NaN
    ],
)
def test_inputs_that_do_not_add_up(app, device, inputs, data, words):
    refused(ask(app, *inputs, data=data), 400, words)
    assert device.deadlines == []


def test_two_tensors_cannot_share_bytes(app):
    """Each size is right and the body holds only one of them: the second would overlap the first."""
    a = entry(name="a", shape=[2, 3], parameters={"binary_data_size": 24})
    b = entry(name="b", shape=[3], parameters={"binary_data_size": 12})
    both = struct.pack("<9f", *range(9))
    refused(ask(app, a, b, data=both[:24], path="/v2/models/sum/infer"), 400, "shorter than its tensors (value: 24 bytes for 36)")
    refused(ask(app, a, b, data=both + b"\0", path="/v2/models/sum/infer"), 400, "longer than its tensors (value: 37 bytes for 36)")
    assert ask(app, a, b, data=both, path="/v2/models/sum/infer").get_json()["outputs"][0]["data"] == [6, 8, 10, 9, 11, 13]
    assert ask(app, b, a, data=both, path="/v2/models/sum/infer").get_json()["outputs"][0]["data"] == [3, 5, 7, 6, 8, 10]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ([0, 0, 0], "does not have its shape"),
        ([0, 0, 0, 0, 0], "does not have its shape"),
        ([[0, 0], [0, 0]], "does not have its shape"),
        ([[0, 0, 0, 0], []], "does not have its shape"),
        ([[[0, 0, 0, 0]]], "does not have its shape"),
        ([[0, 0, 0, [0]]], "holds what is not a number (value: a list of 1)"),
        ({"0": 1}, "does not have its shape (value: an object of 1)"),
        ("0000", "does not have its shape"),
        (None, "does not have its shape (value: null)"),
        (7, "does not have its shape"),
        ([], "does not have its shape"),
        (["0", "1", "2", "3"], "holds what is not a number (value: 0)"),
        ([True, 1, 2, 3], "holds what is not a number (value: True)"),
        ([None, 1, 2, 3], "holds what is not a number (value: null)"),
        ([1e39, 0, 0, 0], "not a finite FP32 (value: element 0)"),
        ([0, 10**400, 0, 0], "not a finite FP32"),
    ],
)
def test_data_in_json_that_is_no_tensor(app, data, words):
    refused(post(app, json.dumps({"inputs": [entry(parameters=..., data=data)]}).encode()), 400, words)


def body(text: str) -> bytes:
    return ('{"inputs": [{"name": "image", "datatype": "FP32", "shape": [1, 4], "data": ' + text + "}]}").encode()


@pytest.mark.parametrize(
    ("raw", "status", "words"),
    [
        (b"", 400, "not valid JSON"),
        (b"null", 400, "is a JSON object (value: NoneType)"),
        (b"[]", 400, "is a JSON object (value: list)"),
        (b"{}", 400, "inputs is a list of at most 64 tensors (value: null)"),
        (b'{"inputs": {}}', 400, "inputs is a list"),
        (b'{"inputs": [], "inputs": []}', 400, "the key 'inputs' stands twice"),
        (b"\xff\xfe{}", 400, "not valid JSON"),
        ("{}".encode("utf-16"), 400, "not valid JSON"),
        (body("[NaN, 0, 0, 0]"), 400, "NaN is not a number of JSON"),
        (body("[0, -Infinity, 0, 0]"), 400, "-Infinity is not a number of JSON"),
        (body("[1e999, 0, 0, 0]"), 400, "not a finite FP32"),
        (body("[" + "9" * 5000 + ", 0, 0, 0]"), 400, "not valid JSON"),
        (body("[0, 0, 0, 0"), 400, "not valid JSON"),
        (body("[" * 9 + "]" * 9), 400, "does not have its shape"),  # three levels are the request's own
        (body("[" * 10 + "]" * 10), 400, "nested deeper than 12"),
        (body("[" * 200 + "]" * 200), 400, "nested deeper than 12"),
        (b"[" * 250, 400, "not valid JSON"),
        (b"[" * 60_000, 400, "more than 256 objects or"),
        (b'{"a":' * 200 + b"0" + b"}" * 200, 400, "nested deeper than 12"),
        (b'{"a":' * 10_000, 400, "more than 256 objects or"),
        (b'{"x": [' + b"[]," * 20_000 + b"[]]}", 400, "more than 256 objects or"),
        (b'"' + b'\\"' * 32_000, 400, "not valid JSON"),  # a text that never ends, each quote of which could begin one
        (b'{"inputs": [], "id": 7}', 400, "id is text"),
        (b'{"inputs": [], "id": "' + b"x" * 257 + b'"}', 400, "id is text of at most 256"),
        (b'{"inputs": [], "id": null, "parameters": 4}', 400, "the parameters of the request"),
        (b'{"inputs": [], "parameters": {"binary_data_output": 1}}', 400, "binary_data_output is true or false"),
        (body("[0, 0, 0, 0]").replace(b"{", b'{"outputs": 5, ', 1), 400, "outputs is a list"),
        (body("[0, 0, 0, 0]").replace(b"{", b'{"parameters": {"binary_data_output": 1}, ', 1), 400, "binary_data_output is true or false"),
        (body("[0, 0, 0, 0]").replace(b"{", b'{"parameters": {"timeout": 1.5}, ', 1), 400, "timeout is a whole number"),
        (b" " * 70_000, 413, "the JSON is longer than"),
    ],
)
def test_json_that_is_none(app, raw, status, words):
    began = time.perf_counter()
    refused(post(app, raw), status, words)
    assert time.perf_counter() - began < 1


def test_brackets_within_text_are_no_depth(app):
    request_id = '[[[[[[[[[[[[[[{{"\\' * 10
    answer = post(app, json.dumps({"id": request_id, "inputs": [entry(parameters=..., data=[0, 0, 0, 0])]}).encode())
    assert answer.get_json()["id"] == request_id


@pytest.mark.parametrize("split", ["-1", "+5", "1e2", "0x10", "", " ", "9" * 13, "12, 12", "²"])
def test_a_header_length_that_is_no_number(app, split):
    refused(post(app, b"{}" + DATA, **{"Inference-Header-Content-Length": split}), 400, "is a number of bytes")


def test_header_lengths_that_are_not_the_jsons(app):
    head = json.dumps({"inputs": [entry()]}).encode()
    refused(ask(app, entry(), split=len(head) + 17), 400, f"more than the body has (value: {len(head) + 17} of {len(head) + 16} bytes)")
    refused(ask(app, entry(), split=len(head) + 16), 400, "not valid JSON")
    refused(ask(app, entry(), split=len(head) - 1), 400, "not valid JSON")
    refused(ask(app, entry(), split=0, data=b""), 400, "the request has no JSON")
    refused(post(app, head + DATA), 400, "not valid JSON")  # binary data without the header


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=80), st.integers(0, 100), st.integers(0, 200))
def test_any_bytes_get_an_answer_in_shape(garbage, where, split):
    app = Flask("box")
    add_v2(app, _Still(), 3000.0)
    head = json.dumps({"inputs": [entry()]}).encode()
    mixed = head[:where] + garbage + head[where:] + DATA
    answer = post(app, mixed, **{"Inference-Header-Content-Length": str(split)})
    assert answer.status_code in (200, 400, 413)
    assert ("error" in answer.get_json()) == (answer.status_code != 200)


class _Still:
    def models(self):
        return {"tiny": ModelInfo("tiny", "1", "null_any", (tensor("image", 1, 4),), (tensor("out", 1, 4),))}

    def ready(self):
        return True

    def infer(self, model, inputs, deadline, gone):
        return {"out": np.zeros((1, 4), np.float32)}


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=4, max_size=4), st.booleans())
def test_every_finite_float32_survives_json_and_binary(values, nested):
    app, device = Flask("box"), _Echo()
    add_v2(app, device, 3000.0)
    asked = np.array([values], np.float32)
    data = asked.tolist() if nested else asked[0].tolist()
    answer = post(app, json.dumps({"inputs": [entry(parameters=..., data=data)]}).encode())
    assert np.array(answer.get_json()["outputs"][0]["data"], np.float32).tobytes() == asked.tobytes()
    answer = ask(app, entry(), data=asked.tobytes(), parameters={"binary_data_output": True})
    assert answer.data.endswith(asked.tobytes())


class _Echo(_Still):
    def infer(self, model, inputs, deadline, gone):
        return {"out": inputs["image"]}


@pytest.mark.parametrize("path", ["/v2/", "/v2/health/live/", "/v2/models/tiny/"])
def test_a_slash_at_the_end_does_no_harm(app, path):
    assert app.test_client().get(path).status_code == 200


@pytest.mark.parametrize(
    "path", ["/v2/models", "/v2/models/tiny/config", "/v2/models/tiny/versions/1/x", "/v2/health", "/v2/models//infer"]
)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_other_addresses_are_refused_in_shape(app, path, method):
    refused(app.test_client().open(path, method=method), 404, "nothing at this address")


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", "/v2/models/tiny/infer", "POST"),
        ("DELETE", "/v2/models/tiny/versions/1/infer", "POST"),
        ("POST", "/v2", "GET"),
        ("POST", "/v2/health/ready", "GET"),
        ("GET", "/v2/repository/index", "POST"),
        ("OPTIONS", "/v2/models/tiny", "GET"),
    ],
)
def test_other_methods_are_refused_in_shape(app, method, path, allowed):
    answer = app.test_client().open(path, method=method)
    refused(answer, 405, f"(value: {method}). Use {allowed}.")
    assert answer.headers["Allow"] == allowed


def test_index_asks_only_for_the_ready(app, device):
    client = app.test_client()
    assert len(client.post("/v2/repository/index", data=b'{"ready": true}').get_json()) == 3
    device.up = False
    assert client.post("/v2/repository/index", data=b'{"ready": true}').get_json() == []
    assert len(client.post("/v2/repository/index", data=b"{}").get_json()) == 3
    refused(client.post("/v2/repository/index", data=b'{"ready": 1}'), 400, "ready is true or false")
    refused(client.post("/v2/repository/index", data=b"[1]"), 400, "is a JSON object")
    refused(client.post("/v2/repository/index", data=b"x" * (v2.HEADER_BYTES + 1)), 413, "the JSON is longer")


def test_a_body_that_ends_early_is_never_computed(server, device):
    """The server waits for what was declared; a client that ends before never reaches the engines."""
    head = json.dumps({"inputs": [entry()]}).encode()
    with socket.create_connection(("127.0.0.1", server.port)) as raw:
        raw.sendall(
            b"POST /v2/models/tiny/infer HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: %d\r\n"
            b"Inference-Header-Content-Length: %d\r\n\r\n" % (len(head) + 16, len(head))
        )
        raw.sendall(head + DATA[:8])
        raw.shutdown(socket.SHUT_WR)
        raw.settimeout(5)
        assert b" 200 " not in raw.recv(1000)
    assert device.deadlines == []


def test_a_stream_that_holds_less_than_declared_is_refused(app):
    head = json.dumps({"inputs": [entry()]}).encode()
    answer = app.test_client().post(
        "/v2/models/tiny/infer",
        data=head + DATA[:8],
        headers={"Inference-Header-Content-Length": str(len(head))},
        environ_overrides={"CONTENT_LENGTH": str(len(head) + 16)},
    )
    refused(answer, 400, "shorter than declared")


def test_a_large_tensor_comes_whole(server, device):
    """Larger than any buffer on its way, and in two forms."""
    info = ModelInfo("wide", "1", "null_any", (tensor("image", 1, 1, 384, 384),), (tensor("map", 1, 1, 384, 384),))
    device.known = {"wide": info}
    device.infer = lambda model, inputs, deadline, gone: {"map": inputs["image"]}
    values = np.random.default_rng(0).standard_normal((1, 1, 384, 384), np.float32)
    with triton.InferenceServerClient(f"127.0.0.1:{server.port}") as client:
        np.testing.assert_array_equal(client.infer("wide", [image(values)]).as_numpy("map"), values)
        outputs = [triton.InferRequestedOutput("map", binary_data=False)]
        np.testing.assert_array_equal(client.infer("wide", [image(values, binary=False)], outputs=outputs).as_numpy("map"), values)


# --- the page ----------------------------------------------------------------------------------------------------------


def example(language: str, port: int) -> str:
    (code,) = re.findall(rf"```{language}\n(.*?)```", DOC.read_text(), re.DOTALL)
    assert "127.0.0.1:8080" in code
    return code.replace("127.0.0.1:8080", f"127.0.0.1:{port}")


def test_the_pages_example_for_tritonclient_runs(server, device, capsys):
    exec(example("python", server.port), {})
    assert "'grader'" in capsys.readouterr().out
    assert [d.budget.total_ms for d in device.deadlines] == [1000.0]


def test_the_pages_example_for_curl_runs(server, device, tmp_path):
    code = example("sh", server.port)
    done = subprocess.run(["sh", "-ec", code], cwd=tmp_path, capture_output=True, text=True, check=True, timeout=30)
    index, end = json.JSONDecoder().raw_decode(done.stdout)
    assert [m["name"] for m in index] == ["tiny", "sum", "grader"]
    answer = json.loads(done.stdout[end:])
    assert answer["outputs"] == [{"name": "logits", "datatype": "FP32", "shape": [1, 8], "data": [0.0] * 8}]
    assert len(device.deadlines) == 1


def test_the_page_lists_every_route(app):
    listed = set(re.findall(r"^\| (GET|POST) \| `(/v2[^`]*)` \|", DOC.read_text(), re.MULTILINE))
    rules = {r.rule for r in app.url_map.iter_rules() if r.rule.startswith("/v2") and "rest" not in r.rule}
    written = set()
    for _, address in listed:
        address = address.replace("NAME", "<name>")
        written |= {address.replace("[/versions/VERSION]", v) for v in ("", "/versions/<asked>")}
    assert written == rules


def test_what_is_not_admitted_before_flask_is_flasks_to_refuse(device):
    app, asked = Flask("box"), []
    admitted = [True]

    @app.before_request
    def guard():
        return ("no", 403)

    add_v2(app, device, 3000.0, admit=lambda environ: asked.append(environ["PATH_INFO"]) or admitted[0], headers={"X-Own": "1"})
    answer = ask(app, entry(), data=DATA)
    assert (answer.status_code, answer.headers["X-Own"], answer.headers["Cache-Control"]) == (200, "1", "no-store")
    wrong = post(app, b"{}")
    assert (wrong.status_code, wrong.headers["X-Own"]) == (400, "1")
    admitted[0] = False
    assert ask(app, entry(), data=DATA).status_code == 403
    assert app.test_client().get("/v2/models/tiny").status_code == 403  # never asked: it is Flask's
    assert asked == ["/v2/models/tiny/infer"] * 3
