"""The Open Inference Protocol, version 2, over REST: tensors in, tensors out. Hides the wire form, binary tensors and Flask.

Written after the protocol's `inference_rest.md` and Triton's binary tensor data extension. What the protocol leaves open is decided
as Triton does, so that its clients work unchanged. Only FP32 in the fixed shapes of an engine's signature is taken. A binary tensor
is copied once on its way in, out of the socket's buffer, and once on its way out, into the answer.

Every error leaves as {"error": "[code] what (value: ...). remedy"} with the HTTP status of its class. Values that are not finite are
refused: no engine was measured with them.
"""

from __future__ import annotations

import functools
import itertools
import json
import logging
import math
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, NoReturn, Protocol

import numpy as np
from flask import Flask, Response, request
from numpy.typing import NDArray

from appliance.budget import Budget, Deadline
from appliance.errors import BackendFailed, SpineboxError, UsageError
from appliance.web.server import GONE, STARTED_S

log = logging.getLogger("spinebox.web")

FORMATS = {"onnxruntime": "onnx", "openvino": "onnx", "tflite": "flatbuffer", "tensorrt": "plan", "myriad": "ir"}  # of a platform's name
EXTENSIONS = ("binary_tensor_data",)
DATATYPE = "FP32"
ITEM_BYTES = 4
MAX_BUDGET_MS = 60_000.0
MAX_TENSORS = 64  # inputs, and outputs asked for
MAX_RANK = 8
MAX_DEPTH = 12  # of the JSON: the request, its inputs, a tensor, and one level a dimension of its data
MAX_OBJECTS = 4 * MAX_TENSORS
MAX_ID = 256  # characters
MAX_PARAMETERS = 32  # of one object
# What a request's JSON may have beside the numbers, and what one number may take: sign, 17 digits, exponent, separator.
HEADER_BYTES = 64 << 10
NUMBER_BYTES = 32
MAX_JSON_BYTES = 8 << 20  # parsed, it takes about ten times that; larger tensors come as binary data
RETRY_AFTER_MS = 2000.0

_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+(?:"|\Z|\\\Z)', re.DOTALL)  # also one that never ends, so that the scan stays linear
_INFER = re.compile(r"/v2/models/([^/]+)(?:/versions/([^/]+))?/infer/?")
_OTHERS = bytes(set(range(256)) - set(b"[]{}"))
_ROUND = bytes.maketrans(b"{}", b"[]")
# Parameters that would change what the answer means, and that no engine here has. Others that are not known are ignored.
_REFUSED = ("classification", "shared_memory_region", "shared_memory_byte_size", "shared_memory_offset", "sequence_id")
_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")


@dataclass(frozen=True)
class TensorInfo:
    """One input or output: `datatype` as the protocol names it ("FP32"), `shape` fixed."""

    name: str
    datatype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class ModelInfo:
    """One engine as a client sees it. `platform` is "<runtime>_<format>", as "onnxruntime_onnx"."""

    name: str
    version: str
    platform: str
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]


class Inferring(Protocol):
    """What answers: the dispatcher with its engines, or a double of it."""

    def models(self) -> Mapping[str, ModelInfo]:
        """Every model by its name."""
        ...

    def ready(self) -> bool:
        """Whether `infer` would be tried now."""
        ...

    def infer(
        self, model: str, inputs: Mapping[str, NDArray[np.float32]], deadline: Deadline, gone: Callable[[], bool]
    ) -> Mapping[str, NDArray[np.float32]]:
        """All inputs of `model` by name, in the shapes of its signature, finite, contiguous -> all its outputs by name.

        The inputs belong to the request and may be kept until the call returns. Raises errors of the tree; OutOfTime where the
        deadline cannot be met.
        """
        ...


class OfDevice:
    """`appliance.device.Device` as Inferring: its engines, each of the version of its bundle."""

    def __init__(self, device: Any) -> None:
        self.device = device
        self._told: tuple[Mapping[str, Any], dict[str, ModelInfo]] = ({}, {})

    def models(self) -> Mapping[str, ModelInfo]:
        """Made anew where another worker is up: it may have another bundle, or other runtimes."""
        up, made = self.device.up(), self._told
        if made[0] is not up:
            made = self._told = (up, self._made(up))
        return made[1]

    def _made(self, up: Mapping[str, Any]) -> dict[str, ModelInfo]:
        version = str(up.get("bundle", {}).get("digest", ""))[:12]
        return {
            name: ModelInfo(
                name,
                version,
                f"{(used := up['used'].get(name, ''))}_{FORMATS.get(used, 'any')}",
                tuple(TensorInfo(t, DATATYPE, tuple(shape)) for t, shape in sides["inputs"]),
                tuple(TensorInfo(t, DATATYPE, tuple(shape)) for t, shape in sides["outputs"]),
            )
            for name, sides in up.get("models", {}).items()
        }

    def ready(self) -> bool:
        return bool(self.device.ready())

    def infer(
        self, model: str, inputs: Mapping[str, NDArray[np.float32]], deadline: Deadline, gone: Callable[[], bool]
    ) -> Mapping[str, NDArray[np.float32]]:
        answers: Mapping[str, NDArray[np.float32]] = self.device.infer(model, inputs, deadline, gone)
        return answers


class _Refused(Exception):
    """An error of the tree with another HTTP status than its own (404 of a model, 415 of an encoding)."""

    def __init__(self, error: SpineboxError, status: int) -> None:
        super().__init__(str(error))
        self.error, self.status = error, status


@dataclass(frozen=True)
class _Asked:
    """What a request says: tensors by name, and (name, as binary data) of every output wanted. `timeout_ms` where it has one."""

    id: str | None
    inputs: dict[str, NDArray[np.float32]]
    outputs: list[tuple[str, bool]]
    timeout_ms: float | None


@dataclass(frozen=True)
class _Answer:
    """Body and headers of an inference."""

    body: bytes
    headers: list[tuple[str, str]]


def add_v2(
    app: Flask,
    device: Inferring,
    default_budget_ms: float,
    *,
    admit: Callable[[Mapping[str, Any]], bool] | None = None,
    headers: Mapping[str, str] | None = None,
) -> None:
    """Add the routes under /v2 to `app`. A request that names no budget gets `default_budget_ms`.

    With `admit`, which says of a WSGI environment whether the application's own guards let it pass, inferences are answered before Flask
    is entered, with `headers` beside their own: Flask costs as much as a small model. What it does not admit Flask refuses.
    """
    server = {"name": "spinebox", "version": version("spinebox"), "extensions": list(EXTENSIONS)}

    def ready(name: str, asked: str | None = None) -> Response:
        model = _model(device, name, asked)
        state = device.ready()
        return _json({"name": model.name, "ready": state}, 200 if state else 503)

    def server_ready() -> Response:
        state = device.ready()
        return _json({"live": True, "ready": state}, 200 if state else 503)

    def inference(environ: Mapping[str, Any], name: str, asked: str | None) -> _Answer:
        model = _model(device, name, asked)
        wants = _parse(environ, model)
        deadline = _deadline(environ, default_budget_ms, wants.timeout_ms)
        return _answer(model, wants, device.infer(model.name, wants.inputs, deadline, environ.get(GONE, _stays)))

    def infer(name: str, asked: str | None = None) -> Response:
        answer = inference(request.environ, name, asked)
        return Response(answer.body, headers=answer.headers)

    def metadata(name: str, asked: str | None = None) -> Response:
        return _json(_metadata(_model(device, name, asked)))

    _route(app, "/v2", "GET", lambda: _json(server))
    _route(app, "/v2/health/live", "GET", lambda: _json({"live": True}))
    _route(app, "/v2/health/ready", "GET", server_ready)
    _route(app, "/v2/repository/index", "POST", lambda: _json(_index(device)))
    for rule in ("/v2/models/<name>", "/v2/models/<name>/versions/<asked>"):
        _route(app, rule, "GET", metadata)
        _route(app, f"{rule}/ready", "GET", ready)
        _route(app, f"{rule}/infer", "POST", infer)
    if admit is not None:
        app.wsgi_app = _Short(app.wsgi_app, inference, admit, headers or {})  # type: ignore[method-assign]
    # Everything else under /v2 is answered in the protocol's shape too, which the application's own 404 does not have.
    _route(app, "/v2/<path:rest>", None, _nowhere)


class _Short:
    """WSGI before Flask, for the one address whose time counts."""

    def __init__(
        self,
        rest: Callable[..., Any],
        inference: Callable[[Mapping[str, Any], str, str | None], _Answer],
        admit: Callable[[Mapping[str, Any]], bool],
        headers: Mapping[str, str],
    ) -> None:
        self._rest, self._inference, self._admit = rest, inference, admit
        self._headers = [*headers.items(), ("Cache-Control", "no-store")]

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        found = _INFER.fullmatch(environ["PATH_INFO"]) if environ["REQUEST_METHOD"] == "POST" else None
        if found is None or not self._admit(environ):
            answered: Iterable[bytes] = self._rest(environ, start_response)
            return answered
        try:
            answer = self._inference(environ, found[1], found[2])
        except Exception as exc:  # noqa: BLE001 - `_failed` logs what is no error of the tree
            response = _failed(exc, environ["REQUEST_METHOD"], environ["PATH_INFO"])
            response.headers.extend(self._headers)
            failed: Iterable[bytes] = response(environ, start_response)
            return failed
        start_response("200 OK", [*answer.headers, ("Content-Length", str(len(answer.body))), *self._headers])
        return [answer.body]


def error_response(error: SpineboxError, status: int | None = None) -> Response:
    """`error` in the protocol's shape, with its own HTTP status unless another is given."""
    status = error.http_status if status is None else status
    response = _json({"error": str(error)}, status)
    if status == 503:
        response.headers["Retry-After"] = str(max(1, math.ceil((error.retry_after_ms or RETRY_AFTER_MS) / 1e3)))
    return response


def _route(app: Flask, rule: str, method: str | None, view: Callable[..., Response]) -> None:
    """`view` under `rule`, its errors in the protocol's shape; other methods than `method` too (None: all are the view's)."""

    @functools.wraps(view)
    def answered(**named: str) -> Response:
        try:
            if method is not None and request.method != method and (method, request.method) != ("GET", "HEAD"):
                error = UsageError("this address does not take this method", value=request.method, remedy=f"Use {method}.")
                response = error_response(error, 405)
                response.headers["Allow"] = method
                return response
            return view(**named)
        except Exception as exc:  # noqa: BLE001 - `_failed` logs what is no error of the tree
            return _failed(exc, request.method, request.path)

    app.add_url_rule(rule, f"v2 {rule}", answered, methods=_METHODS, strict_slashes=False, provide_automatic_options=False)


def _failed(exc: Exception, method: str, path: str) -> Response:
    """What a request is told of an exception; called where it is handled."""
    if isinstance(exc, _Refused):
        return error_response(exc.error, exc.status)
    if isinstance(exc, SpineboxError):
        return error_response(exc)
    log.exception("%s %s failed", method, path)
    return error_response(SpineboxError("an unexpected failure inside the appliance", value=type(exc).__name__))


def _nowhere(rest: str) -> NoReturn:
    remedy = "GET /v2 says what is served; POST /v2/repository/index lists the models."
    raise _Refused(UsageError("there is nothing at this address", value=f"/v2/{rest}", remedy=remedy), 404)


def _json(value: object, status: int = 200) -> Response:
    return Response(json.dumps(value, separators=(",", ":")), status, mimetype="application/json")


def _stays() -> bool:
    return False


# --- models ------------------------------------------------------------------------------------------------------------


def _model(device: Inferring, name: str, asked: str | None) -> ModelInfo:
    models = device.models()
    model = models.get(name)
    if model is None:
        names = ", ".join(sorted(models)) or "none"
        raise _Refused(UsageError("there is no such model", value=name, remedy=f"Ask for one of: {names}."), 404)
    if asked is not None and asked != model.version:
        remedy = f"Ask for version {model.version}, or name none."
        raise _Refused(UsageError(f"the model {name} has no such version", value=asked, remedy=remedy), 404)
    return model


def _metadata(model: ModelInfo) -> dict[str, Any]:
    def tensors(infos: Sequence[TensorInfo]) -> list[dict[str, Any]]:
        return [{"name": t.name, "datatype": t.datatype, "shape": list(t.shape)} for t in infos]

    return {
        "name": model.name,
        "versions": [model.version],
        "platform": model.platform,
        "inputs": tensors(model.inputs),
        "outputs": tensors(model.outputs),
    }


def _index(device: Inferring) -> list[dict[str, str]]:
    """Triton's index of the model repository. The body may be absent, or {"ready": bool}: only those that are."""
    text, _ = _head(request.environ, HEADER_BYTES)
    asked = _loads(text, MAX_OBJECTS) if text.strip() else {}
    only_ready = asked.get("ready", False)
    if type(only_ready) is not bool:
        raise UsageError("ready is true or false", value=only_ready, remedy="Leave it out to list every model.")
    state, reason = ("READY", "") if device.ready() else ("UNAVAILABLE", "the engines are not ready")
    listed = [] if only_ready and reason else list(device.models().values())
    return [{"name": m.name, "version": m.version, "state": state, "reason": reason} for m in listed]


# --- the body ----------------------------------------------------------------------------------------------------------


def _head(environ: Mapping[str, Any], most_bytes: int) -> tuple[bytes, int]:
    """(the JSON, how many bytes of tensors follow it). Those are read by `_rest`, once the JSON has said what they are."""
    encoding = environ.get("HTTP_CONTENT_ENCODING", "").strip().lower()
    if encoding not in ("", "identity"):
        error = UsageError("compressed requests are not taken", value=encoding, remedy="Send the body without Content-Encoding.")
        raise _Refused(error, 415)
    length = _whole(environ.get("CONTENT_LENGTH") or "0", "Content-Length")
    named = environ.get("HTTP_INFERENCE_HEADER_CONTENT_LENGTH")
    split = length if named is None else _whole(named, "Inference-Header-Content-Length")
    if split > length:
        remedy = "Give the length of the JSON alone; Content-Length counts the tensors too."
        raise UsageError("Inference-Header-Content-Length is more than the body has", value=f"{split} of {length} bytes", remedy=remedy)
    if split == 0 and length:
        remedy = "Send the JSON of the request before the tensors; raw tensors without it are not taken."
        raise UsageError("the request has no JSON", value="Inference-Header-Content-Length: 0", remedy=remedy)
    if split > most_bytes:
        remedy = "Send the tensors as binary data (binary_data_size and Inference-Header-Content-Length)."
        raise _Refused(UsageError(f"the JSON is longer than {most_bytes} bytes", value=f"{split} bytes", remedy=remedy), 413)
    text: bytes = environ["wsgi.input"].read(split)
    _check_length(len(text), split)
    return text, length - split


def _rest(environ: Mapping[str, Any], count: int) -> NDArray[np.uint8]:
    """The next `count` bytes of the body: the one copy that a binary tensor gets, to where it is aligned."""
    data = np.empty(count, np.uint8)
    view, filled = data.data, 0
    while filled < count and (more := environ["wsgi.input"].readinto(view[filled:])):
        filled += more
    _check_length(filled, count)
    return data


def _check_length(got: int, wanted: int) -> None:
    if got < wanted:
        raise UsageError("the body is shorter than declared", value=f"{got} of {wanted} bytes", remedy="Send it again.")


def _whole(text: str, name: str) -> int:
    if not re.fullmatch(r"[0-9]{1,12}", text):
        raise UsageError(f"{name} is a number of bytes", value=text, remedy="Send it once, in digits.")
    return int(text)


# --- the JSON ----------------------------------------------------------------------------------------------------------


def _loads(text: bytes, most_lists: int) -> dict[str, Any]:
    """The request as an object. Depth and counts are known before anything is built from it."""
    brackets = _STRING.sub(b"", text).translate(None, _OTHERS)
    if brackets.count(b"{") > MAX_OBJECTS or brackets.count(b"[") > most_lists:
        what = f"the JSON has more than {MAX_OBJECTS} objects or {most_lists} lists"
        value = f"{brackets.count(b'{')} objects, {brackets.count(b'[')} lists"
        raise UsageError(what, value=value, remedy="Send the tensors that the model's metadata names, flat or as binary data.")
    brackets = brackets.translate(_ROUND)
    for _ in range(MAX_DEPTH):
        brackets = brackets.replace(b"[]", b"")  # one level
    try:
        if b"[]" in brackets:
            raise RecursionError
        value = json.loads(text.decode(), object_pairs_hook=_object, parse_constant=_no_number)
    except RecursionError:
        raise UsageError(f"the JSON is nested deeper than {MAX_DEPTH}", remedy="Send data flat, in row-major order.") from None
    except ValueError as exc:
        raise UsageError("the request is not valid JSON", value=exc, remedy="See the protocol's inference request object.") from exc
    if type(value) is not dict:
        raise UsageError("the request is a JSON object", value=type(value).__name__, remedy="See the protocol's inference request object.")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        twice = next(k for i, (k, _) in enumerate(pairs) if any(k == other for other, _ in pairs[:i]))
        raise ValueError(f"the key {twice!r} stands twice in one object")
    return made


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a number of JSON")


def _parse(environ: Mapping[str, Any], model: ModelInfo) -> _Asked:
    elements = sum(math.prod(t.shape) for t in model.inputs)
    text, follow = _head(environ, min(HEADER_BYTES + NUMBER_BYTES * elements, MAX_JSON_BYTES))
    lists = sum(math.prod(t.shape[:k]) for t in model.inputs for k in range(len(t.shape)))
    asked = _loads(text, lists + 4 * MAX_TENSORS)
    request_id = asked.get("id")
    if request_id is not None and (type(request_id) is not str or len(request_id) > MAX_ID):
        raise UsageError(f"id is text of at most {MAX_ID} characters", value=request_id, remedy="Leave it out, or shorten it.")
    parameters = _parameters(asked, "the request")
    entries = _named(asked.get("inputs"), "inputs")
    outputs = _outputs(_named(asked.get("outputs", []), "outputs"), _flag(parameters, "binary_data_output", False), model)
    spans = _spans(entries, follow, model)
    return _Asked(request_id, _inputs(entries, spans, _rest(environ, follow), model), outputs, _timeout_ms(parameters))


def _named(entries: object, what: str) -> list[dict[str, Any]]:
    """`entries` as a list of objects that each have a name of their own."""
    if type(entries) is not list or len(entries) > MAX_TENSORS:
        raise UsageError(f"{what} is a list of at most {MAX_TENSORS} tensors", value=_short(entries), remedy="See the model's metadata.")
    for entry in entries:
        if type(entry) is not dict or type(entry.get("name")) is not str:
            raise UsageError(f"each of {what} is an object with a name", value=_short(entry), remedy="See the model's metadata.")
    names = [e["name"] for e in entries]
    if len(set(names)) != len(names):
        twice = next(n for n in names if names.count(n) > 1)
        raise UsageError(f"a tensor stands twice in {what}", value=twice, remedy="Send each once.")
    return entries


def _parameters(entry: Mapping[str, Any], whose: str) -> dict[str, Any]:
    parameters = entry.get("parameters", {})
    if type(parameters) is not dict or len(parameters) > MAX_PARAMETERS:
        remedy = "Leave parameters out, or send an object."
        raise UsageError(f"the parameters of {whose} are at most {MAX_PARAMETERS} in an object", value=_short(parameters), remedy=remedy)
    for name, value in parameters.items():
        if type(value) not in (str, int, float, bool):
            raise UsageError(f"a parameter of {whose} is text, a number, true or false", value=f"{name}: {_short(value)}")
        if name in _REFUSED:
            raise UsageError(f"{whose} asks for what is not served", value=name, remedy=f"Leave the parameter {name} out.")
    return parameters


def _flag(parameters: Mapping[str, Any], name: str, default: bool) -> bool:
    value = parameters.get(name, default)
    if type(value) is not bool:
        raise UsageError(f"{name} is true or false", value=_short(value), remedy="Leave it out for JSON.")
    return value


def _timeout_ms(parameters: Mapping[str, Any]) -> float | None:
    """Triton's `timeout` of a request is in microseconds; 0 means none."""
    value = parameters.get("timeout", 0)
    if type(value) is not int or value < 0:
        raise UsageError("timeout is a whole number of microseconds", value=_short(value), remedy="Leave it out for the default.")
    return value / 1e3 if value else None


def _short(value: object) -> str:
    """A value from outside for an error: never the text of a whole tensor."""
    if isinstance(value, list | dict):
        return f"{'a list' if isinstance(value, list) else 'an object'} of {len(value)}"
    return "null" if value is None else str(value)[:200]


# --- tensors in --------------------------------------------------------------------------------------------------------


def _spans(entries: list[dict[str, Any]], follow: int, model: ModelInfo) -> dict[str, slice]:
    """Where in the binary data each input lies that lies there. Judges everything that can be judged without the numbers."""
    known = {t.name: t for t in model.inputs}
    names = [e["name"] for e in entries]
    for name in names:
        if name not in known:
            raise UsageError(f"the model {model.name} has no such input", value=name, remedy=f"Its inputs are: {', '.join(known)}.")
    for name in known:
        if name not in names:
            raise UsageError("an input is missing", value=name, remedy=f"Send all of: {', '.join(known)}.")
    spans: dict[str, slice] = {}
    start = 0
    for entry in entries:
        info = known[entry["name"]]
        _check_form(entry, info)
        size = _parameters(entry, f"the input {info.name}").get("binary_data_size")
        if (size is None) == ("data" not in entry):
            remedy = "Send either data, or binary_data_size and the bytes after the JSON."
            raise UsageError("an input has data or binary_data_size, one of the two", value=info.name, remedy=remedy)
        if size is None:
            continue
        wanted = ITEM_BYTES * math.prod(info.shape)
        if type(size) is not int or size != wanted:
            remedy = f"{DATATYPE} of {_dims(info.shape)} is {wanted} bytes."
            raise UsageError(f"the binary_data_size of {info.name} does not fit its shape", value=_short(size), remedy=remedy)
        spans[info.name] = slice(start, start + size)
        start += size
    if start != follow:
        what = f"the binary data is {'shorter' if follow < start else 'longer'} than its tensors"
        remedy = "Send every tensor's bytes after the JSON, in the order of the inputs, and Inference-Header-Content-Length."
        raise UsageError(what, value=f"{follow} bytes for {start}", remedy=remedy)
    return spans


def _inputs(
    entries: list[dict[str, Any]], spans: Mapping[str, slice], rest: NDArray[np.uint8], model: ModelInfo
) -> dict[str, NDArray[np.float32]]:
    known = {t.name: t for t in model.inputs}
    tensors: dict[str, NDArray[np.float32]] = {}
    for entry in entries:
        info = known[entry["name"]]
        span = spans.get(info.name)
        values = _from_json(entry["data"], info) if span is None else rest[span].view("<f4").reshape(info.shape)
        if not _finite(values):
            remedy = "Send finite numbers only; nothing is known of an engine's answer to others."
            bad = int(np.flatnonzero(~np.isfinite(values))[0])
            raise UsageError(f"the input {info.name} holds a value that is not a finite {DATATYPE}", value=f"element {bad}", remedy=remedy)
        tensors[info.name] = values.astype(np.float32, copy=False)
    return tensors


def _check_form(entry: Mapping[str, Any], info: TensorInfo) -> None:
    """Datatype and shape as the signature has them. A shape is compared, never multiplied: no product can overflow."""
    datatype = entry.get("datatype")
    if datatype != info.datatype or datatype != DATATYPE:
        remedy = f"Convert it; engines take {DATATYPE}."
        raise UsageError(f"the input {info.name} is {info.datatype}", value=_short(datatype), remedy=remedy)
    shape = entry.get("shape")
    if type(shape) is not list or len(shape) > MAX_RANK or any(type(d) is not int for d in shape) or tuple(shape) != info.shape:
        value = _dims(shape) if type(shape) is list and len(shape) <= MAX_RANK else _short(shape)
        raise UsageError(f"the input {info.name} has the shape {_dims(info.shape)}", value=value, remedy="Engines have fixed shapes.")


def _dims(shape: Sequence[object]) -> str:
    return "[" + ", ".join(_short(d)[:24] for d in shape) + "]"


def _from_json(data: object, info: TensorInfo) -> NDArray[np.float32]:
    """Numbers, nested as the shape says or flat, -> float32. Text, true, false and null are not coerced."""
    shape = info.shape
    remedy = f"Send {math.prod(shape)} numbers, flat or nested as {_dims(shape)}, or binary data."
    level: list[Any] = [data]
    nested = len(shape) > 1 and type(data) is list and len(data) == shape[0] and all(type(row) is list for row in data)
    for wanted in shape if nested else (math.prod(shape),):
        if any(type(row) is not list or len(row) != wanted for row in level):
            raise UsageError(f"the data of {info.name} does not have its shape", value=_short(data), remedy=remedy)
        level = list(itertools.chain.from_iterable(level))
    if not set(map(type, level)) <= {int, float}:
        odd = next(v for v in level if type(v) not in (int, float))
        raise UsageError(f"the data of {info.name} holds what is not a number", value=_short(odd), remedy=remedy)
    try:
        with np.errstate(over="ignore"):  # the caller refuses what became infinite
            return np.array(level, np.float32).reshape(shape)
    except OverflowError:
        return np.full(shape, np.inf, np.float32)


def _finite(values: NDArray[np.float32]) -> bool:
    """Whether every value is: a sum is not where one of them is not, and costs a third of looking at each."""
    with np.errstate(all="ignore"):
        total = float(values.sum())
    return math.isfinite(total) or bool(np.isfinite(values).all())


# --- time --------------------------------------------------------------------------------------------------------------


def _deadline(environ: Mapping[str, Any], default_ms: float, timeout_ms: float | None) -> Deadline:
    """The header's budget, else the request's `timeout`, else the default; started with the request."""
    text = environ.get("HTTP_X_LATENCY_BUDGET_MS")
    try:
        total_ms = float(text) if text is not None else timeout_ms if timeout_ms is not None else default_ms
    except ValueError:
        total_ms = math.nan
    if not 1 <= total_ms <= MAX_BUDGET_MS:
        what = f"a latency budget lies in 1 to {MAX_BUDGET_MS:g} ms"
        raise UsageError(what, value=text if text is not None else f"{total_ms:g}", remedy="Leave it out for the default.")
    started_s = environ.get(STARTED_S)
    return Deadline(Budget(total_ms), started_s=time.monotonic() if started_s is None else started_s)


# --- tensors out -------------------------------------------------------------------------------------------------------


def _outputs(entries: list[dict[str, Any]], binary: bool, model: ModelInfo) -> list[tuple[str, bool]]:
    known = [t.name for t in model.outputs]
    for entry in entries:
        if entry["name"] not in known:
            remedy = f"Its outputs are: {', '.join(known)}."
            raise UsageError(f"the model {model.name} has no such output", value=entry["name"], remedy=remedy)
    if not entries:
        return [(name, binary) for name in known]
    return [(e["name"], _flag(_parameters(e, f"the output {e['name']}"), "binary_data", binary)) for e in entries]


def _answer(model: ModelInfo, wants: _Asked, answers: Mapping[str, NDArray[np.float32]]) -> _Answer:
    outputs: list[dict[str, Any]] = []
    parts: list[Any] = [b""]
    for name, binary in wants.outputs:
        values = answers.get(name)
        if values is None:
            raise BackendFailed(f"the model {model.name} did not answer with one of its outputs", value=name)
        values = np.ascontiguousarray(values, "<f4")
        output: dict[str, Any] = {"name": name, "datatype": DATATYPE, "shape": list(values.shape)}
        if binary:
            output["parameters"] = {"binary_data_size": values.nbytes}
            parts.append(values.reshape(-1).data)
        else:
            if not _finite(values):
                remedy = "Ask for the output as binary data; JSON has no such numbers."
                raise BackendFailed(f"the model {model.name} answered with a value that is not finite", value=name, remedy=remedy)
            output["data"] = values.reshape(-1).tolist()
        outputs.append(output)
    head: dict[str, Any] = {"model_name": model.name, "model_version": model.version}
    if wants.id is not None:
        head["id"] = wants.id
    parts[0] = json.dumps({**head, "outputs": outputs}, separators=(",", ":")).encode()
    if len(parts) == 1:
        return _Answer(parts[0], [("Content-Type", "application/json")])
    headers = [("Content-Type", "application/octet-stream"), ("Inference-Header-Content-Length", str(len(parts[0])))]
    return _Answer(b"".join(parts), headers)
