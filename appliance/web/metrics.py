"""What Prometheus reads at /metrics: whether promises are kept, and what work costs. Hides prometheus-client.

The series stand in `SERIES` and in docs/metrics.md, and a test compares the two. Names follow Prometheus' rules: base units, `_total`
for what only grows. A label takes only the names that are known beforehand; others are counted as "other", so that nothing from
outside can make series. The registry is this object's own: two applications in one process do not see each other.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from flask import Flask, Response, request
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.openmetrics import exposition as openmetrics

from appliance.budget import RUNGS
from appliance.errors import all_errors

log = logging.getLogger("spinebox.web")

OTHER: Final = "other"
OPENMETRICS: Final = "application/openmetrics-text; version=1.0.0; charset=utf-8"
MOST_NAMES = 64  # that one label may have
# Every stage that a protocol times, the stretches of its paths, and what stands around them (`appliance.protocols`,
# `appliance.worker`); "infer" is the bare engine of the Open Inference Protocol.
STAGES: tuple[str, ...] = (
    "receive", "read", "preprocess", "detector", "segmenter", "grader", "spine_class", "vertebra_ap", "decode", "measure", "heatmap",
    "engine_total", "render", "encode", "infer", "detect", "segment", "grade", "explain", "close",
)  # fmt: skip

# Budgets go from 200 ms to a few seconds, single stages from a few ms. Each histogram has an edge at what is promised: refusals in
# 20 ms, predictions that hold (1).
_WORK_S = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6, 1.0, 1.5, 3.0)
_SHORT_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.6, 1.0, 3.0)
_RATIO = (0.1, 0.25, 0.5, 0.7, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0, 4.0)


@dataclass(frozen=True)
class Series:
    """One family of time series: `kind` is counter, gauge or histogram, `edges` a histogram's upper bounds."""

    name: str
    kind: str
    labels: tuple[str, ...]
    meaning: str
    edges: tuple[float, ...] = ()


SERIES: tuple[Series, ...] = (
    Series("spinebox_answers_total", "counter", ("protocol", "rung", "on_time"), "Requests answered, on time or late."),
    Series("spinebox_answer_seconds", "histogram", ("protocol", "rung"), "From a request's first byte to its answer.", _WORK_S),
    Series("spinebox_queue_seconds", "histogram", (), "What an answered request waited for the engines.", _SHORT_S),
    Series("spinebox_stage_seconds", "histogram", ("stage",), "Each stage of an answer.", _WORK_S),
    Series("spinebox_answers_before_kept_total", "counter", (), "Answers given before the disk had them, lest they be late."),
    Series("spinebox_refusals_total", "counter", ("code", "admitted"), "Requests refused, before or after they were admitted."),
    Series("spinebox_refusal_seconds", "histogram", ("admitted",), "From a request's first byte to its refusal.", _SHORT_S),
    Series("spinebox_prediction_ratio", "histogram", ("stage",), "Measured time over predicted time.", _RATIO),
    Series("spinebox_prediction_misses_total", "counter", ("stage",), "Predictions that the measured time exceeded."),
    Series("spinebox_waiting_requests", "gauge", (), "Admitted requests that wait for the engines."),
    Series("spinebox_inflated_costs", "gauge", (), "Costs whose predictions are lengthened because they drifted."),
    Series("spinebox_worker_restarts_total", "counter", (), "Times that the process of the engines was started anew."),
    Series("spinebox_worker_outage_seconds", "gauge", (), "The last time without engines; 0 where there was none."),
    Series("spinebox_power_factor_ratio", "gauge", (), "What heat and power multiply predictions by; 1 at full speed."),
    Series("spinebox_collect_failures_total", "counter", (), "Scrapes whose gauges could not be refreshed and may be old."),
)
_KINDS = {"counter": Counter, "gauge": Gauge, "histogram": Histogram}


class Metrics:
    """Counts of one appliance. Every method may be called from any thread.

    `protocols`, `rungs`, `stages` and `codes` are the names that labels may take, at most MOST_NAMES each. Times are in ms, finite and
    not negative; ValueError where one is not, and nothing is counted then.
    """

    def __init__(
        self,
        protocols: Iterable[str],
        *,
        rungs: Iterable[str] = RUNGS,
        stages: Iterable[str] = STAGES,
        codes: Iterable[str] | None = None,
    ) -> None:
        codes = (e.code for e in all_errors()) if codes is None else codes
        names = {"protocol": protocols, "rung": rungs, "stage": stages, "code": codes}
        self._names = {label: frozenset(known) for label, known in names.items()}
        for label, known in self._names.items():
            if len(known) > MOST_NAMES:
                raise ValueError(f"{len(known)} names are more than the {MOST_NAMES} that the label {label} may have")
        self.registry = CollectorRegistry(auto_describe=False)
        ProcessCollector(registry=self.registry)  # memory, descriptors and processor time, under the names that everybody uses
        self._series: dict[str, Any] = {}
        for series in SERIES:
            more = {"buckets": series.edges} if series.edges else {}
            made = _KINDS[series.kind](series.name, series.meaning, series.labels, registry=self.registry, **more)
            self._series[series.name.removeprefix("spinebox_")] = made
        self._restarts = 0
        self._lock = threading.Lock()
        self._begin()

    def _begin(self) -> None:
        """Series that shares are made of are there from the start, with 0: a query divides by a sum that exists."""
        for protocol in (*self._names["protocol"], OTHER):
            for on_time in (True, False):
                self._series["answers_total"].labels(protocol, OTHER, _word(on_time))
        for admitted in (True, False):
            self._series["refusals_total"].labels(OTHER, _word(admitted))
            self._series["refusal_seconds"].labels(_word(admitted))
        self._series["power_factor_ratio"].set(1.0)

    def answered(
        self,
        protocol: str,
        rung: str,
        *,
        on_time: bool,
        total_ms: float,
        queue_ms: float,
        stages_ms: Mapping[str, float],
        kept: bool = True,
    ) -> None:
        """A request was answered on `rung`, `total_ms` after its first byte; of that it waited `queue_ms` for the engines. `kept`:
        whether the disk had the answer by then."""
        total_s, queue_s = _seconds(total_ms), _seconds(queue_ms)
        stages_s = [(self._known("stage", stage), _seconds(ms)) for stage, ms in stages_ms.items()]
        names = self._known("protocol", protocol), self._known("rung", rung)
        self._series["answers_total"].labels(*names, _word(on_time)).inc()
        self._series["answer_seconds"].labels(*names).observe(total_s)
        self._series["queue_seconds"].observe(queue_s)
        self._series["answers_before_kept_total"].inc(not kept)
        for stage, seconds in stages_s:
            self._series["stage_seconds"].labels(stage).observe(seconds)

    def refused(self, code: str, *, admitted: bool, ms: float) -> None:
        """A request was refused with the error `code`, `ms` after its first byte; `admitted` where it had been promised an answer."""
        seconds = _seconds(ms)
        self._series["refusals_total"].labels(self._known("code", code), _word(admitted)).inc()
        self._series["refusal_seconds"].labels(_word(admitted)).observe(seconds)

    def predicted(self, stage: str, predicted_ms: float, ms: float) -> None:
        """`stage` was predicted to take `predicted_ms` (more than 0) and took `ms`."""
        predicted_s, seconds = _seconds(predicted_ms), _seconds(ms)
        if predicted_s == 0:
            raise ValueError("a prediction of 0 ms cannot be judged")
        stage = self._known("stage", stage)
        self._series["prediction_ratio"].labels(stage).observe(seconds / predicted_s)
        self._series["prediction_misses_total"].labels(stage).inc(seconds > predicted_s)

    def state(self, *, waiting: int, inflated: int, worker_restarts: int, outage_ms: float | None, power_factor: float) -> None:
        """What is so now. `worker_restarts` counts since the daemon started; `outage_ms` is the length of the last time without
        engines, None where there was none."""
        outage_s = 0.0 if outage_ms is None else _seconds(outage_ms)
        with self._lock:  # two scrapes at once would count a restart twice
            self._series["worker_restarts_total"].inc(max(0, worker_restarts - self._restarts))
            self._restarts = max(self._restarts, worker_restarts)
        self._series["waiting_requests"].set(waiting)
        self._series["inflated_costs"].set(inflated)
        self._series["worker_outage_seconds"].set(outage_s)
        self._series["power_factor_ratio"].set(power_factor)

    def scrape(self, accept: str = "", collect: Callable[[], None] | None = None) -> tuple[bytes, str]:
        """(the text, its content type): OpenMetrics where `accept` asks for it, else Prometheus' text format. `collect` refreshes the
        gauges; where it fails the counters are still worth reading, and the failure is counted."""
        if collect is not None:
            try:
                collect()
            except Exception:
                log.exception("the gauges of /metrics could not be refreshed")
                self._series["collect_failures_total"].inc()
        asked = _wants_openmetrics(accept)
        encode: Callable[[CollectorRegistry], bytes] = openmetrics.generate_latest if asked else generate_latest
        return encode(self.registry), OPENMETRICS if asked else CONTENT_TYPE_PLAIN_0_0_4

    def _known(self, label: str, name: str) -> str:
        return name if name in self._names[label] else OTHER


def add_metrics(app: Flask, metrics: Metrics, collect: Callable[[], None]) -> None:
    """Add GET /metrics to `app`; `collect` is called before each scrape and calls `metrics.state`."""

    @app.get("/metrics")
    def scraped() -> Response:
        text, content_type = metrics.scrape(request.headers.get("Accept", "")[:1000], collect)
        return Response(text, content_type=content_type)


def _wants_openmetrics(accept: str) -> bool:
    """Whether `accept` has OpenMetrics 1.0.0 in it. The library's own choice fails on versions that are no numbers, and repeats others."""
    for kind in accept.replace(" ", "").lower().split(","):
        name, *parameters = kind.split(";")
        version = next((p.removeprefix("version=") for p in parameters if p.startswith("version=")), "1.0.0")
        if name == "application/openmetrics-text" and version == "1.0.0":
            return True
    return False


def _word(value: bool) -> str:
    return "true" if value else "false"


def _seconds(ms: float) -> float:
    if not (math.isfinite(ms) and ms >= 0):
        raise ValueError(f"{ms} is no time in milliseconds")
    return ms / 1e3
