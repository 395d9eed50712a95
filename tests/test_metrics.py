"""What /metrics says, read back with Prometheus' own parsers; names bounded, threads counted, documentation compared."""

from __future__ import annotations

import importlib
import itertools
import math
import pkgutil
import re
import threading
import time
from pathlib import Path

import prometheus_client
import pytest
from flask import Flask
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics_families
from prometheus_client.parser import text_string_to_metric_families

from appliance import protocols
from appliance.budget import RUNGS
from appliance.errors import all_errors
from appliance.web.metrics import MOST_NAMES, OTHER, SERIES, STAGES, Metrics, add_metrics

ROOT = Path(__file__).parent.parent
DOC = ROOT / "docs" / "metrics.md"
PROTOCOLS = ("lumbar-mri-sagittal", "spine-xray-ap")


@pytest.fixture
def metrics() -> Metrics:
    return Metrics(PROTOCOLS)


def samples(metrics: Metrics) -> dict[str, dict[tuple[tuple[str, str], ...], float]]:
    """name -> labels -> value, as the text format has them."""
    found: dict[str, dict[tuple[tuple[str, str], ...], float]] = {}
    for family in text_string_to_metric_families(metrics.scrape()[0].decode()):
        for sample in family.samples:
            found.setdefault(sample.name, {})[tuple(sorted(sample.labels.items()))] = sample.value
    return found


def value(metrics: Metrics, name: str, **labels: str) -> float:
    return samples(metrics)[name][tuple(sorted(labels.items()))]


def answer(metrics: Metrics, protocol="lumbar-mri-sagittal", rung="full", on_time=True, total_ms=250.0, queue_ms=30.0, **stages_ms: float):
    metrics.answered(protocol, rung, on_time=on_time, total_ms=total_ms, queue_ms=queue_ms, stages_ms=stages_ms)


def test_answers_by_rung_and_whether_on_time(metrics):
    answer(metrics, detector=20.0, decode=4.0)
    answer(metrics, detector=40.0, total_ms=350.0)
    answer(metrics, rung="no-heatmap", on_time=False, total_ms=2999.0)
    common = {"protocol": "lumbar-mri-sagittal", "rung": "full"}
    assert value(metrics, "spinebox_answers_total", **common, on_time="true") == 2
    assert value(metrics, "spinebox_answers_total", protocol="lumbar-mri-sagittal", rung="no-heatmap", on_time="false") == 1
    assert value(metrics, "spinebox_answer_seconds_sum", **common) == pytest.approx(0.6)
    assert value(metrics, "spinebox_answer_seconds_bucket", **common, le="0.3") == 1
    assert value(metrics, "spinebox_answer_seconds_bucket", **common, le="0.4") == 2
    assert value(metrics, "spinebox_queue_seconds_count") == 3
    assert value(metrics, "spinebox_queue_seconds_sum") == pytest.approx(0.09)
    assert value(metrics, "spinebox_stage_seconds_count", stage="detector") == 2
    assert value(metrics, "spinebox_stage_seconds_sum", stage="detector") == pytest.approx(0.06)
    assert value(metrics, "spinebox_stage_seconds_bucket", stage="decode", le="0.005") == 1


def test_refusals_by_code_and_whether_promised(metrics):
    metrics.refused("refused.out-of-time", admitted=False, ms=20.0)
    metrics.refused("refused.out-of-time", admitted=False, ms=20.1)
    metrics.refused("backend.failed", admitted=True, ms=800.0)
    assert value(metrics, "spinebox_refusals_total", code="refused.out-of-time", admitted="false") == 2
    assert value(metrics, "spinebox_refusals_total", code="backend.failed", admitted="true") == 1
    assert value(metrics, "spinebox_refusal_seconds_bucket", admitted="false", le="0.02") == 1  # the promise is an edge
    assert value(metrics, "spinebox_refusal_seconds_count", admitted="true") == 1


def test_predictions_and_their_misses(metrics):
    metrics.predicted("detector", 40.0, 30.0)
    metrics.predicted("detector", 40.0, 40.0)
    metrics.predicted("detector", 40.0, 50.0)
    assert value(metrics, "spinebox_prediction_misses_total", stage="detector") == 1
    assert value(metrics, "spinebox_prediction_ratio_count", stage="detector") == 3
    assert value(metrics, "spinebox_prediction_ratio_sum", stage="detector") == pytest.approx(3.0)
    assert value(metrics, "spinebox_prediction_ratio_bucket", stage="detector", le="1.0") == 2
    metrics.predicted("render", 5.0, 1.0)
    assert value(metrics, "spinebox_prediction_misses_total", stage="render") == 0  # there, so that a share of it is 0


def test_the_state_is_the_last_one_and_restarts_only_grow(metrics):
    state = {"waiting": 3, "inflated": 1, "worker_restarts": 2, "outage_ms": 1500.0, "power_factor": 1.25}
    metrics.state(**state)
    metrics.state(**{**state, "waiting": 0, "worker_restarts": 5})
    assert value(metrics, "spinebox_waiting_requests") == 0
    assert value(metrics, "spinebox_inflated_costs") == 1
    assert value(metrics, "spinebox_worker_restarts_total") == 5
    assert value(metrics, "spinebox_worker_outage_seconds") == 1.5
    assert value(metrics, "spinebox_power_factor_ratio") == 1.25
    metrics.state(**{**state, "worker_restarts": 4, "outage_ms": None})
    assert value(metrics, "spinebox_worker_restarts_total") == 5
    assert value(metrics, "spinebox_worker_outage_seconds") == 0


def test_what_shares_are_made_of_is_there_before_anything_happened(metrics):
    found = samples(metrics)
    assert found["spinebox_answers_total"]
    assert found["spinebox_refusals_total"]
    assert set(found["spinebox_answers_total"].values()) == set(found["spinebox_refusals_total"].values()) == {0}
    assert value(metrics, "spinebox_power_factor_ratio") == 1


def test_names_from_outside_make_no_series(metrics):
    def series() -> int:
        return sum(len(labels) for labels in samples(metrics).values())

    def everything(n: int) -> None:
        answer(metrics, protocol=f"p{n}", rung=f"r{n}", **{f"s{n}": 1.0, "detector": 1.0})
        metrics.refused(f"c{n}", admitted=n % 2 == 0, ms=1.0)
        metrics.predicted(f"s{n}", 1.0, 1.0)

    everything(0)
    everything(1)
    before = series()
    for n in range(2, 500):
        everything(n)
    assert series() == before
    assert value(metrics, "spinebox_answers_total", protocol=OTHER, rung=OTHER, on_time="true") == 500
    assert value(metrics, "spinebox_stage_seconds_count", stage=OTHER) == 500
    assert value(metrics, "spinebox_stage_seconds_count", stage="detector") == 500
    assert value(metrics, "spinebox_refusals_total", code=OTHER, admitted="true") == 250
    assert value(metrics, "spinebox_prediction_ratio_count", stage=OTHER) == 500


def test_the_most_series_that_there_can_be():
    """Every known name once: a scrape stays small whatever happens."""
    metrics = Metrics(PROTOCOLS)
    for protocol in (*PROTOCOLS, "x"):
        for rung in (*RUNGS, "x"):
            for on_time in (True, False):
                answer(metrics, protocol, rung, on_time, **dict.fromkeys((*STAGES, "x"), 1.0))
    for stage in (*STAGES, "x"):
        metrics.predicted(stage, 1.0, 1.0)
    for code in (*(e.code for e in all_errors()), "x"):
        for admitted in (True, False):
            metrics.refused(code, admitted=admitted, ms=1.0)
    assert sum(len(labels) for labels in samples(metrics).values()) < 1500
    with pytest.raises(ValueError, match=f"more than the {MOST_NAMES}"):
        Metrics(f"p{i}" for i in range(MOST_NAMES + 1))


@pytest.mark.parametrize("ms", [-1.0, math.nan, math.inf])
def test_what_is_no_time_is_not_counted_at_all(metrics, ms):
    before = samples(metrics)
    for call in (
        lambda: answer(metrics, total_ms=ms),
        lambda: answer(metrics, queue_ms=ms),
        lambda: answer(metrics, detector=ms),
        lambda: metrics.refused("internal", admitted=False, ms=ms),
        lambda: metrics.predicted("detector", 1.0, ms),
        lambda: metrics.predicted("detector", ms, 1.0),
        lambda: metrics.state(waiting=9, inflated=9, worker_restarts=9, outage_ms=ms, power_factor=9.0),
    ):
        with pytest.raises(ValueError, match="no time in milliseconds"):
            call()
    with pytest.raises(ValueError, match="0 ms cannot be judged"):
        metrics.predicted("detector", 0.0, 1.0)
    after = samples(metrics)
    own = {name: labels for name, labels in after.items() if name.startswith("spinebox")}
    assert own == {name: labels for name, labels in before.items() if name.startswith("spinebox")}


def test_threads_lose_nothing(metrics):
    def work(number: int) -> None:
        for k in range(400):
            answer(metrics, on_time=k % 2 == 0, rung=RUNGS[k % 3], detector=10.0)
            metrics.refused("refused.out-of-time", admitted=False, ms=1.0)
            metrics.predicted("detector", 10.0, 11.0)
            metrics.state(waiting=k, inflated=0, worker_restarts=k, outage_ms=None, power_factor=1.0)
            if k % 100 == number:
                metrics.scrape()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(samples(metrics)["spinebox_answers_total"].values()) == 1600
    assert value(metrics, "spinebox_stage_seconds_count", stage="detector") == 1600
    assert value(metrics, "spinebox_refusals_total", code="refused.out-of-time", admitted="false") == 1600
    assert value(metrics, "spinebox_prediction_misses_total", stage="detector") == 1600
    assert value(metrics, "spinebox_worker_restarts_total") == 399


def test_two_scrapes_at_once_count_a_restart_once(metrics, monkeypatch):
    counter = metrics._series["worker_restarts_total"]
    inc = counter.inc
    monkeypatch.setattr(counter, "inc", lambda amount: (time.sleep(0.02), inc(amount)))
    state = {"waiting": 0, "inflated": 0, "outage_ms": None, "power_factor": 1.0}
    threads = [threading.Thread(target=metrics.state, kwargs={**state, "worker_restarts": 5}) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert value(metrics, "spinebox_worker_restarts_total") == 5


# --- the route ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def client(metrics):
    app = Flask("box")
    collected = []

    def collect() -> None:
        collected.append(True)
        if len(collected) == 3:
            raise RuntimeError("the worker is away")
        metrics.state(waiting=len(collected), inflated=0, worker_restarts=0, outage_ms=None, power_factor=1.0)

    add_metrics(app, metrics, collect)
    return app.test_client()


def test_gauges_are_refreshed_before_each_scrape_and_a_failure_is_counted(client, metrics):
    for expected in (1, 2):
        text = client.get("/metrics").get_data(as_text=True)
        assert f"\nspinebox_waiting_requests {expected}.0\n" in text
        assert "\nspinebox_collect_failures_total 0.0\n" in text
    broken = client.get("/metrics")
    assert broken.status_code == 200
    assert "\nspinebox_waiting_requests 2.0\n" in broken.get_data(as_text=True)
    assert "\nspinebox_collect_failures_total 1.0\n" in broken.get_data(as_text=True)
    assert client.post("/metrics").status_code == 405


def test_the_format_is_what_the_scraper_asks_for(client, metrics):
    answer(metrics, detector=10.0)
    plain = client.get("/metrics")
    assert plain.content_type == "text/plain; version=0.0.4; charset=utf-8"
    families = {f.name for f in text_string_to_metric_families(plain.get_data(as_text=True))}
    # What Prometheus 3 sends.
    accept = (
        "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.5,application/openmetrics-text;version=0.0.1;q=0.4,"
        "text/plain;version=1.0.0;escaping=allow-utf-8;q=0.3,text/plain;version=0.0.4;q=0.2,*/*;q=0.1"
    )
    asked = client.get("/metrics", headers={"Accept": accept})
    assert asked.content_type == "application/openmetrics-text; version=1.0.0; charset=utf-8"
    assert asked.get_data(as_text=True).endswith("# EOF\n")
    found = {f.name: f for f in openmetrics_families(asked.get_data(as_text=True))}
    assert {s.name.removesuffix("_total") for s in SERIES} <= set(found)
    assert {s.name.removesuffix("_total") for s in SERIES} <= families
    assert found["spinebox_answers"].type == "counter"
    assert client.get("/metrics", headers={"Accept": "application/openmetrics-text"}).content_type == asked.content_type
    odd = ("", "x" * 100_000, ";;,,=", *(f"application/openmetrics-text;version={v}" for v in ("", "x", "9.0.0", "1.0.0x")))
    for accept in odd:
        assert client.get("/metrics", headers={"Accept": accept}).content_type == plain.content_type


def test_nothing_is_shared_with_the_process(metrics):
    other = Metrics(PROTOCOLS)
    answer(metrics)
    assert sum(samples(other)["spinebox_answers_total"].values()) == 0
    assert "spinebox" not in prometheus_client.generate_latest(prometheus_client.REGISTRY).decode()


def test_memory_and_descriptors_stand_beside_them(metrics):
    assert value(metrics, "process_resident_memory_bytes") > 1e6
    assert value(metrics, "process_open_fds") > 2


# --- names and documentation -------------------------------------------------------------------------------------------


def test_names_follow_prometheus_rules():
    """https://prometheus.io/docs/practices/naming: base units, _total for counters only."""
    for series in SERIES:
        assert re.fullmatch(r"spinebox_[a-z]+(_[a-z]+)*", series.name)
        assert series.name.endswith("_total") == (series.kind == "counter"), series.name
        assert not re.search(r"_(ms|milliseconds|percent|count|sum|bucket)\b", series.name), series.name
        assert (series.kind == "histogram") == bool(series.edges), series.name
        assert list(series.edges) == sorted(set(series.edges))
        if series.kind == "histogram":
            assert series.name.endswith(("_seconds", "_ratio")), series.name


def test_work_has_edges_from_5_ms_to_3_s_close_enough_to_read_a_quantile():
    (edges,) = {s.edges for s in SERIES if s.name in ("spinebox_answer_seconds", "spinebox_stage_seconds")}
    assert (edges[0], edges[-1]) == (0.005, 3.0)
    assert max(b / a for a, b in itertools.pairwise(edges)) <= 2


def test_every_stage_of_the_code_has_a_name_of_its_own():
    timed = {
        name
        for path in (ROOT / "appliance").rglob("*.py")
        for name in re.findall(r"""\.stage\("(\w+)"\)|timing_ms\["(\w+)"\] =""", path.read_text())
        for name in name
        if name
    }
    assert {"preprocess", "detector", "decode"} <= timed
    assert timed <= set(STAGES)
    stretches = set()
    for module in pkgutil.iter_modules(protocols.__path__):
        paths = getattr(importlib.import_module(f"appliance.protocols.{module.name}"), "PATHS", {})
        stretches |= {stretch for path in paths.values() for stretch in path}
    assert stretches <= set(STAGES)


def row(name: str, kind: str, labels: tuple[str, ...], meaning: str) -> str:
    return f"| `{name}` | {kind} | {', '.join(f'`{label}`' for label in labels)} | {meaning} |"


def test_the_page_has_every_series_as_it_is(metrics):
    written = [line for line in DOC.read_text().splitlines() if line.startswith("| `")]
    assert written == [row(s.name, s.kind, s.labels, s.meaning) for s in SERIES]
    # And the registry has what SERIES says, with its labels, and nothing else of ours.
    answer(metrics, detector=1.0)
    metrics.refused("internal", admitted=False, ms=1.0)
    metrics.predicted("detector", 1.0, 2.0)
    found = []
    for family in metrics.registry.collect():
        if family.name.startswith("spinebox"):
            labels = {tuple(k for k in s.labels if k != "le") for s in family.samples}
            assert len(labels) == 1, family.name
            found.append(row(family.name + "_total" * (family.type == "counter"), family.type, labels.pop(), family.documentation))
    assert found == written


def test_the_queries_of_the_page_ask_for_what_there_is(metrics):
    answer(metrics, detector=1.0)
    metrics.refused("internal", admitted=False, ms=1.0)
    metrics.predicted("detector", 1.0, 2.0)
    there = samples(metrics)
    queries = re.findall(r"```promql\n(.*?)```", DOC.read_text(), re.DOTALL)
    assert len(queries) >= 6
    for query in queries:
        for name, selector in re.findall(r"((?:spinebox|process)_\w+)(?:\{(.*?)\})?", query):
            assert name in there, name
            for label, wanted in re.findall(r'(\w+)="(\w+)"', selector):
                assert any((label, wanted) in labels for labels in there[name]), (name, label, wanted)


def test_the_shares_of_the_page_computed_by_hand(metrics):
    """The first two queries, over a known history: 6 on time, 1 late, 2 refused on arrival, 1 refused after it was admitted."""
    for k in range(7):
        answer(metrics, on_time=k > 0, rung=RUNGS[k % 3])
    for k in range(3):
        metrics.refused("refused.out-of-time", admitted=k == 0, ms=5.0)

    def total(name: str, **labels: str) -> float:
        return sum(v for found, v in samples(metrics)[name].items() if set(labels.items()) <= set(found))

    offered = total("spinebox_answers_total") + total("spinebox_refusals_total")
    assert total("spinebox_answers_total", on_time="true") / offered == 0.6
    missed = total("spinebox_answers_total", on_time="false") + total("spinebox_refusals_total", admitted="true")
    assert missed / (total("spinebox_answers_total") + total("spinebox_refusals_total", admitted="true")) == 0.25
