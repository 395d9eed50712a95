"""Routes: HTTP in, JSON and pictures out. Hides Flask.

Every error, also of Flask and of unknown routes, leaves as {"error": {code, message, value, remedy}, "disclaimer"}.
Patient data is never cached, never framed, and never handed to another origin or to a foreign Host name.
"""

from __future__ import annotations

import ipaddress
import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qs, urlsplit

from flask import Flask, Response, g, jsonify, render_template, request
from werkzeug.exceptions import HTTPException

from appliance import kept
from appliance.budget import SHED, Budget, Deadline, Wanted
from appliance.errors import NotAnImage, OutOfTime, SpineboxError, StudyTooLarge, StudyUnknown, UsageError
from appliance.journal import Journal, StoredStudy, Summary, study_id_of
from appliance.report import DISCLAIMER, Report
from appliance.web.metrics import Metrics, add_metrics
from appliance.web.server import COMPLETED_S, GONE, MULTIPART_BYTES, STARTED_S, TICKET, Door, Held, Knock
from appliance.web.service import Computing, Service
from appliance.web.v2 import MAX_BUDGET_MS, Inferring, add_v2, error_response

log = logging.getLogger("spinebox.web")

RAW_TYPES = ("application/dicom", "image/png", "image/jpeg", "application/octet-stream")
LOOPBACK = ("127.0.0.1", "localhost", "::1")
EVERYWHERE = ("0.0.0.0", "::")  # noqa: S104 - compared, not bound
RETRY_AFTER_S = 2  # where nobody knows better
BUDGET_HEADER = "X-Latency-Budget-Ms"
BUDGET_ENVIRON = "HTTP_" + BUDGET_HEADER.upper().replace("-", "_")
STUDIES = "/api/studies"

_SECURITY = {
    "Content-Security-Policy": "default-src 'self'; object-src 'none'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
}


@dataclass(frozen=True)
class WebSettings:
    """`host` is the address bound; `allowed_hosts` are further names under which browsers may reach it. `max_bytes` bounds
    one file, `budget_ms` is given to a request that names none. `reads` says which images are answered, each kind in words that stand
    within a sentence; the start page shows them."""

    host: str = "127.0.0.1"
    allowed_hosts: tuple[str, ...] = ()
    max_bytes: int = 64 * 2**20
    budget_ms: float = 3000.0
    protocol: str = "lumbar-mri-sagittal"
    reads: tuple[str, ...] = ("sagittal lumbar MRI",)
    version: str = ""


class _Refused(Exception):
    """An error of the tree with another HTTP status than its own (404 of a route, 403 of a foreign origin)."""

    def __init__(self, error: SpineboxError, status: int) -> None:
        super().__init__(str(error))
        self.error, self.status = error, status


def create_app(
    *,
    device: Computing,
    read: Callable[[bytes], Any],
    render: kept.Render,
    journal: Journal,
    health: Callable[[], Mapping[str, Any]],
    engines: Callable[[], Mapping[str, Any]] | None = None,
    inferring: Inferring | None = None,
    metrics: Metrics | None = None,
    state: Callable[[], Mapping[str, Any]] = dict,
    settings: WebSettings | None = None,
) -> Flask:
    """The WSGI application over an open journal.

    `device` computes (`appliance.device.Device`); `read` is `appliance.study.read` and `render` the module `appliance.render`:
    pictures are drawn from what was kept. `health` returns at least {"ready": bool}, and whatever else /readyz may show. `engines`
    returns {"bundle", "engines"}: whose engines are in use, and what `appliance.reliability.engines` says of them. `inferring`
    answers /v2 and `metrics` is shown at /metrics where they are given; `state` refreshes its gauges (`Metrics.state`).
    """
    settings = settings or WebSettings()
    app = Flask(__name__)
    app.config["MAX_CONTENT_LENGTH"] = settings.max_bytes + MULTIPART_BYTES
    app.config["MAX_FORM_PARTS"] = 8
    app.json.sort_keys = False  # type: ignore[attr-defined]
    # Werkzeug would answer a doubled slash with an HTML redirect.
    app.url_map.merge_slashes = False
    service = Service(device=device, read=read, render=render, journal=journal, protocol=settings.protocol)
    app.extensions["spinebox"] = service
    app.extensions["spinebox-settings"] = settings
    app.extensions["spinebox-metrics"] = counts = metrics or Metrics((settings.protocol,))
    _add_guards(app, settings)
    _add_errors(app)
    _add_studies(app, service, settings, counts)
    _add_pictures(app, service)
    _add_health(app, journal, health)

    if inferring is not None:

        def admit(environ: Mapping[str, Any]) -> bool:
            return _host_allowed(environ.get("HTTP_HOST", ""), settings) and _same_origin(environ)

        add_v2(app, inferring, settings.budget_ms, admit=admit, headers=_SECURITY)
    if metrics is not None:
        add_metrics(app, metrics, lambda: metrics.state(**state()))

    @app.get("/api/engines")
    def in_use() -> Response:
        """The engines that answer, and how far the percentages of each can be believed."""
        return jsonify({"disclaimer": DISCLAIMER, "bundle": None, "engines": [], **(engines() if engines is not None else {})})

    @app.get("/")
    def kiosk() -> str:
        return render_template("index.html", disclaimer=DISCLAIMER, settings=settings, reads=_sentence(settings.reads))

    return app


def _sentence(kinds: tuple[str, ...]) -> str:
    """("sagittal MRI", "radiographs") -> "Sagittal MRI or radiographs"."""
    words = " or ".join(filter(None, (", ".join(kinds[:-1]), kinds[-1] if kinds else "")))
    return words[:1].upper() + words[1:]


def finish_pending(app: Flask) -> int:
    """Answer what a crash left unanswered, with the default budget each; returns how many. Call it before or while serving."""
    service: Service = app.extensions["spinebox"]
    settings: WebSettings = app.extensions["spinebox-settings"]
    return service.finish_pending(settings.budget_ms)


def door(app: Flask) -> Door:
    """What the server is to ask when a request's header is there: a study that could not be answered in time need not come in. The same
    bytes as those of a kept answer are not known yet, and are told to come again too."""
    service: Service = app.extensions["spinebox"]
    settings: WebSettings = app.extensions["spinebox-settings"]
    metrics: Metrics = app.extensions["spinebox-metrics"]

    def ask(knock: Knock) -> Held | None:
        if (knock.method, knock.path) != ("POST", STUDIES):
            return None
        environ = {f"HTTP_{name}": value for name, value in knock.headers.items()}
        if not _host_allowed(environ.get("HTTP_HOST", ""), settings) or not _same_origin(environ):
            return None
        try:
            total_ms = _budget_ms(
                environ.get(BUDGET_ENVIRON), parse_qs(knock.query, keep_blank_values=True).get("budget_ms", [None])[0], settings
            )
        except (UsageError, ValueError):
            return None  # what is wrong is said when all is there
        deadline = Deadline(Budget(total_ms), started_s=knock.started_s)
        try:
            return service.announce(knock.size, deadline)
        except OutOfTime as error:
            metrics.refused(error.code, admitted=False, ms=deadline.elapsed_ms())
            raise

    return ask


def finish_keeping(app: Flask) -> None:
    """Wait until everything that was answered is kept. To be called when nothing is served any more, before the journal is closed."""
    service: Service = app.extensions["spinebox"]
    service.close()


# --- guards ------------------------------------------------------------------------------------------------------------


def _host_name(header: str) -> str:
    """ "[::1]:8080" -> "::1", "Box.local:80" -> "box.local"."""
    name = header.strip().lower()
    if name.startswith("["):
        return name[1:].partition("]")[0]
    return name.rpartition(":")[0] if name.count(":") == 1 else name


def _host_allowed(header: str, settings: WebSettings) -> bool:
    """A page on another site can make its own name point here (DNS rebinding); it cannot make its name an allowed one."""
    name = _host_name(header)
    if name in LOOPBACK or name in settings.allowed_hosts or name == settings.host.strip("[]").lower():
        return name not in EVERYWHERE
    if settings.host.strip("[]") in EVERYWHERE:
        # Reached by one of the box's own addresses; an address cannot be rebound.
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True
    return False


def _same_origin(environ: Mapping[str, Any]) -> bool:
    if environ.get("HTTP_SEC_FETCH_SITE", "same-origin") not in ("same-origin", "none"):
        return False
    origin = environ.get("HTTP_ORIGIN")
    if origin is None:
        return True
    try:
        return bool(urlsplit(str(origin)).netloc.lower() == str(environ.get("HTTP_HOST", "")).strip().lower() != "")
    except ValueError:
        return False


def _add_guards(app: Flask, settings: WebSettings) -> None:
    @app.before_request
    def guard() -> None:
        g.arrived_s = request.environ.get(STARTED_S) or time.monotonic()
        host = request.environ.get("HTTP_HOST", "")
        if not _host_allowed(host, settings):
            remedy = "Open the appliance by its own address, or add this name to its allowed hosts."
            raise _Refused(UsageError("this name is not one of the appliance's", value=host, remedy=remedy), 421)
        if request.method not in ("GET", "HEAD", "OPTIONS") and not _same_origin(request.environ):
            remedy = "Send it from the appliance's own page, or from a program without an Origin header."
            raise _Refused(UsageError("another site may not send studies", value=request.headers.get("Origin"), remedy=remedy), 403)

    @app.after_request
    def secure(response: Response) -> Response:
        response.headers.extend({k: v for k, v in _SECURITY.items() if k not in response.headers})
        response.headers["Cache-Control"] = "no-cache" if request.endpoint == "static" else "no-store"
        return response


def _error_response(error: SpineboxError, status: int) -> Response:
    if request.path == "/v2" or request.path.startswith("/v2/"):
        return error_response(error, status)
    body: dict[str, Any] = {"error": error.to_json(), "disclaimer": DISCLAIMER}
    if g.get("study_id") is not None:
        body["id"] = g.study_id  # the refusal is kept, and shown, under this id
    if status == 503:
        body["admitted"] = error.admitted  # whether an answer had been promised before this
    response = jsonify(body)
    response.status_code = status
    if status == 503:
        after_ms = error.retry_after_ms
        response.headers["Retry-After"] = str(RETRY_AFTER_S if after_ms is None else max(1, math.ceil(after_ms / 1e3)))
    return response


def _add_errors(app: Flask) -> None:
    @app.errorhandler(SpineboxError)
    def known(error: SpineboxError) -> Response:
        return _error_response(error, error.http_status)

    @app.errorhandler(_Refused)
    def refused(exc: _Refused) -> Response:
        return _error_response(exc.error, exc.status)

    @app.errorhandler(HTTPException)
    def of_http(exc: HTTPException) -> Response:
        status = exc.code or 500
        error: SpineboxError
        if status == 413:
            limit = app.extensions["spinebox-settings"].max_bytes
            error = StudyTooLarge("the request is larger than the limit", value=f"{limit} bytes")
        elif status == 404:
            error = UsageError("there is nothing at this address", value=request.path, remedy="GET /api/studies lists what is kept.")
        elif status == 405:
            error = UsageError("this address does not take this method", value=request.method, remedy="See the Allow header.")
        else:
            error = UsageError("the request cannot be understood", value=exc.name, remedy="Send one file, as the documentation shows.")
        response = _error_response(error, status)
        if status == 405:
            response.headers["Allow"] = ", ".join(sorted(getattr(exc, "valid_methods", None) or ()))
        return response

    @app.errorhandler(Exception)
    def unknown(exc: Exception) -> Response:
        log.exception("%s %s failed", request.method, request.path)
        return _error_response(SpineboxError("an unexpected failure inside the appliance", value=type(exc).__name__), 500)


# --- studies -----------------------------------------------------------------------------------------------------------


def _number(text: str, name: str, low: float, high: float) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not low <= value <= high:
        raise UsageError(f"{name} must be a number from {low:g} to {high:g}", value=text, remedy="Leave it out for the default.")
    return value


def _receive_ms(environ: Mapping[str, Any]) -> float | None:
    """From a request's first byte to its last."""
    started_s, completed_s = environ.get(STARTED_S), environ.get(COMPLETED_S)
    return None if started_s is None or completed_s is None else float(max(0.0, completed_s - started_s) * 1e3)


def _budget_ms(header: str | None, parameter: str | None, settings: WebSettings) -> float:
    asked = header or parameter
    return settings.budget_ms if asked is None else _number(asked, f"{BUDGET_HEADER} or budget_ms", 1, MAX_BUDGET_MS)


def _whole(name: str, default: int, low: int, high: int) -> int:
    text = request.args.get(name)
    if text is None:
        return default
    value = _number(text, name, low, high)
    if value != int(value):
        raise UsageError(f"{name} must be a whole number", value=text, remedy="Leave it out for the default.")
    return int(value)


def _parts(name: str) -> list[str] | None:
    """`must=detect,segment`: the names; None where the request says nothing."""
    text = request.args.get(name)
    return None if text is None else [part.strip() for part in text.split(",") if part.strip()]


def _never() -> bool:
    return False


def _switch(name: str) -> bool:
    text = request.args.get(name, "1")
    if text not in ("0", "1"):
        raise UsageError(f"{name} must be 0 or 1", value=text, remedy="Leave it out for the default.")
    return text == "1"


def _body(settings: WebSettings) -> tuple[bytes, str]:
    """(the file's bytes, its name) of a multipart or a raw request."""
    kind = request.mimetype
    if kind == "multipart/form-data":
        files = list(request.files.items(multi=True))
        if len(files) != 1 or files[0][0] != "file":
            raise UsageError(
                "a multipart request carries exactly one file, in the field 'file'",
                value=", ".join(f"{field}: {part.filename}" for field, part in files) or "no file",
                remedy="Send one file per request: curl -F file=@image.dcm .../api/studies",
            )
        data, name = files[0][1].read(), files[0][1].filename or ""
    elif kind in RAW_TYPES:
        data, name = request.get_data(cache=False), request.args.get("name", "")
    else:
        remedy = "Send multipart/form-data with a field 'file', or the bytes as " + ", ".join(RAW_TYPES) + "."
        raise _Refused(UsageError("this content type is not taken", value=kind or "none", remedy=remedy), 415)
    if len(data) > settings.max_bytes:
        raise StudyTooLarge("the file is larger than the limit", value=f"{len(data)} of {settings.max_bytes} bytes")
    if not data:
        raise _Refused(NotAnImage("the file is empty", value="0 bytes"), 400)
    return data, name


def _links(study_id: str, report: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Where an answer and its pictures are; null for what it does not have."""
    here = f"/api/studies/{study_id}"
    found: dict[str, Any] = {"self": here}
    if report is None:
        return found
    answered = report["status"] in ("complete", "partial")
    masked = answered and report.get("frontal") is None and "masks" not in SHED.get(report.get("rung", ""), ())
    return found | {
        "report": f"{here}/report.json",
        "source": f"{here}/source",
        # Of a refused image too, where it could be read.
        "base": f"{here}/base.png" if "rows" in report.get("source", {}) else None,
        "overlay": f"{here}/overlay.png" if answered else None,
        "labels": f"{here}/labels.png" if masked else None,
        # As many as the report has heatmaps, in its order; null where one was withheld.
        "heatmaps": [f"{here}/heatmap/{i}.png" if h["available"] else None for i, h in enumerate(report.get("heatmaps", ()))],
    }


def _about(study: Summary) -> dict[str, Any]:
    late = study.elapsed_ms is not None and study.budget_ms is not None and study.elapsed_ms > study.budget_ms
    return {
        "name": study.name,
        "size": study.size,
        "received_at": study.received_at,
        "budget_ms": study.budget_ms,
        "elapsed_ms": None if study.elapsed_ms is None else round(study.elapsed_ms, 1),
        "late": late,
        "kept": study.kept,
    }


def _study_links(stored: StoredStudy) -> dict[str, Any]:
    """As many keys for a study that is not computed yet as for any other."""
    if stored.report is not None:
        return _links(stored.id, stored.report)
    empty = _links(stored.id, {"status": stored.status})
    return empty | {"report": None}


def _study_json(stored: StoredStudy) -> dict[str, Any]:
    report = stored.report or {"disclaimer": DISCLAIMER, "status": stored.status, "error": stored.error}
    return {**report, "id": stored.id, "links": _study_links(stored), "study": _about(stored)}


def _add_studies(app: Flask, service: Service, settings: WebSettings, metrics: Metrics) -> None:
    @app.post(STUDIES)
    def create() -> tuple[Response, int]:
        total_ms = _budget_ms(request.headers.get(BUDGET_HEADER), request.args.get("budget_ms"), settings)
        wanted = Wanted.of(_parts("must"), _parts("may"))
        deadline = Deadline(Budget(total_ms), started_s=g.arrived_s)
        data, name = _body(settings)
        try:
            of_server = request.environ
            answered = service.answer(
                data, name, deadline, wanted, of_server.get(GONE, _never), of_server.get(TICKET), _receive_ms(of_server)
            )
        except SpineboxError as error:
            metrics.refused(error.code, admitted=error.admitted, ms=deadline.elapsed_ms())
            if error.admitted or not isinstance(error, OutOfTime):  # who is turned away at the door is not kept
                g.study_id = _kept_id(service.journal, data)
            raise
        study = answered.study
        response = jsonify(_study_json(study))
        response.headers["Location"] = f"/api/studies/{study.id}"
        service.sent(answered)
        if answered.fresh and study.report is not None:
            _count(metrics, study, deadline)
        return response, 201 if answered.fresh and study.kept else 200

    @app.get(STUDIES)
    def history() -> Response:
        limit, offset = _whole("limit", 50, 1, 200), _whole("offset", 0, 0, 10**9)
        studies = [
            {"id": s.id, "status": s.status, "error": s.error, "study": _about(s), "links": _links(s.id)}
            for s in service.journal.list(limit, offset)
        ]
        total = service.journal.count()
        return jsonify({"disclaimer": DISCLAIMER, "total": total, "limit": limit, "offset": offset, "studies": studies})

    @app.get("/api/studies/<study_id>")
    def one(study_id: str) -> Response:
        return jsonify(_study_json(service.get(study_id)))

    @app.get("/api/studies/<study_id>/report.json")
    def report(study_id: str) -> Response:
        """The report alone, exactly as docs/report.schema.json has it; the other routes add id, links and study."""
        stored = service.get(study_id)
        if stored.report is None:
            raise StudyUnknown("this study is not computed yet", value=study_id, remedy="Ask again in a few seconds.")
        return jsonify(stored.report)


def _count(metrics: Metrics, study: StoredStudy, deadline: Deadline) -> None:
    report = study.report or {}
    times = dict(report["timing_ms"])
    metrics.answered(
        report["protocol"],
        report["rung"],
        on_time=deadline.left_ms() >= 0,
        total_ms=deadline.elapsed_ms(),
        queue_ms=times.pop("queue", 0.0),
        stages_ms=times,
        kept=study.kept,
    )


def _kept_id(journal: Journal, data: bytes) -> str | None:
    try:
        return journal.get(study_id_of(data)).id
    except SpineboxError:
        return None


def _add_pictures(app: Flask, service: Service) -> None:
    @app.get("/api/studies/<study_id>/overlay.png")
    def overlay(study_id: str) -> Response:
        heatmap = _number(request.args.get("heatmap", "0.45"), "heatmap", 0, 1)
        switches = {name: _switch(name) for name in ("boxes", "outlines", "grades", "measures")}

        def draw(render: kept.Render, instance: Any, report: Report) -> bytes | None:
            return None if report.status == "refused" else render.overlay_png(instance, report, **switches, heatmap=heatmap)

        return _png(service.picture(study_id, draw))

    @app.get("/api/studies/<study_id>/base.png")
    def base(study_id: str) -> Response:
        return _png(service.picture(study_id, lambda render, instance, _: render.base_png(instance)))

    @app.get("/api/studies/<study_id>/labels.png")
    def labels(study_id: str) -> Response:
        return _png(service.picture(study_id, lambda render, _, report: render.labels_png(report) if report.mask is not None else None))

    @app.get("/api/studies/<study_id>/heatmap/<int:index>.png")
    def heatmap(study_id: str, index: int) -> Response:
        def draw(render: kept.Render, _: Any, report: Report) -> bytes | None:
            there = index < len(report.heatmaps) and report.heatmaps[index].values is not None
            return render.heatmap_png(report, index) if there else None

        return _png(service.picture(study_id, draw))

    @app.get("/api/studies/<study_id>/source")
    def source(study_id: str) -> Response:
        response = Response(service.source(study_id), mimetype="application/octet-stream")
        response.headers.set("Content-Disposition", "attachment", filename=f"{study_id}.bin")
        return response


def _png(drawn: bytes) -> Response:
    return Response(drawn, mimetype="image/png")


def _add_health(app: Flask, journal: Journal, health: Callable[[], Mapping[str, Any]]) -> None:
    @app.get("/healthz")
    def alive() -> Response:
        return jsonify({"status": "alive"})

    @app.get("/readyz")
    def ready() -> tuple[Response, int]:
        lacking: list[dict[str, str]] = []
        engine: dict[str, Any] = {}
        try:
            engine = dict(health())
            if not engine.get("ready"):
                lacking.append({"what": "engine", "why": str(engine.get("reason") or "it is not loaded")})
        except Exception as exc:  # a health check that fails is itself the answer
            log.exception("the engine's health check failed")
            lacking.append({"what": "engine", "why": str(exc) if isinstance(exc, SpineboxError) else type(exc).__name__})
        try:
            journal.probe()
        except SpineboxError as exc:
            lacking.append({"what": "journal", "why": str(exc)})
        body = jsonify({"ready": not lacking, "not_ready": lacking, "engine": engine, "disclaimer": DISCLAIMER})
        return body, 503 if lacking else 200
