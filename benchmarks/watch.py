"""A daemon watched while it works: memory of each process, descriptors, temperature; and whether memory grows.

Hides psutil, the thermal zones and where the daemon tells which process is its worker. `slope` is pure.
"""

from __future__ import annotations

import contextlib
import csv
import json
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from appliance.errors import UsageError
from benchmarks.peers.served import Served

THERMAL = Path("/sys/class/thermal")
BATCHES = 20  # of samples, whose means are nearly independent
WARM_SHARE = 0.1  # of the time, left out: caches fill, allocators settle
RESAMPLED = 4000


@dataclass(frozen=True)
class Row:
    """One sample: seconds since the start, resident MB of the daemon, of its worker, of everything else it started (the standby, the
    decoders), open descriptors of the daemon and of all it started, number of processes, CPU seconds, the hottest zone in degrees Celsius
    (None: no such file)."""

    at_s: float
    segment: int
    daemon_mb: float
    worker_mb: float
    others_mb: float
    daemon_fds: int
    others_fds: int
    processes: int
    cpu_s: float
    temperature_c: float | None
    worker_pid: int


def temperature_c(folder: Path = THERMAL) -> float | None:
    """The hottest thermal zone; None where the board tells none."""
    found = []
    for path in folder.glob("thermal_zone*/temp"):
        with contextlib.suppress(OSError, ValueError):
            found.append(int(path.read_text()) / 1e3)
    return max(found, default=None)


@dataclass(frozen=True)
class Workers:
    """What /readyz says of the process that owns the engines and of the warm one behind it; 0 where there is none."""

    pid: int
    standby: int


def workers(served: Served) -> Workers:
    """Raises UsageError where the daemon does not tell its worker: it has none, and cannot be tried in this way."""
    _, body = served.get("/readyz")
    engine = json.loads(body).get("engine") or {}
    worker = engine.get("worker")
    if not isinstance(worker, dict) or "pid" not in worker:
        raise UsageError(
            "this daemon does not say which process owns its engines",
            value="GET /readyz",
            remedy="Try a daemon that answers engine.worker.pid there.",
        )
    return Workers(int(worker["pid"] or 0), int(worker.get("standby") or 0))


class Watch:
    """Samples a daemon every `every_s` seconds on a thread of its own, between enter and exit. `rows` grows; `path` is a CSV that is
    appended to as it does, so that what was measured outlives whoever measures."""

    def __init__(self, served: Served, every_s: float, path: Path | None = None, segment: int = 0, since_s: float = 0.0) -> None:
        self.rows: list[Row] = []
        self._served, self._every_s, self._path = served, every_s, path
        self._segment, self._since_s = segment, since_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def __enter__(self) -> Watch:
        if self._path is not None and not self._path.exists():
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("w", newline="") as f:
                csv.writer(f).writerow([c.name for c in fields(Row)])
        self._began = time.monotonic()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(30)

    def _run(self) -> None:
        due = self._began
        while not self._stop.wait(max(0.0, due - time.monotonic())):
            due += self._every_s
            # A worker that is being replaced may be gone before it is looked at; the next sample sees its successor.
            with contextlib.suppress(psutil.Error, OSError, ValueError, UsageError):
                self._keep(self._sample())

    def _sample(self) -> Row:
        pid = 0
        with contextlib.suppress(UsageError):  # a daemon without a worker is watched all the same
            pid = workers(self._served).pid
        whole = self._served.sample()
        worker_mb = 0.0
        with contextlib.suppress(psutil.Error):
            worker_mb = psutil.Process(pid).memory_info().rss / 2**20 if pid else 0.0
        return Row(
            at_s=round(self._since_s + time.monotonic() - self._began, 3),
            segment=self._segment,
            daemon_mb=round(whole.root_mb, 3),
            worker_mb=round(worker_mb, 3),
            others_mb=round(max(0.0, whole.rest_mb - worker_mb), 3),
            daemon_fds=whole.root_fds,
            others_fds=whole.rest_fds,
            processes=whole.processes,
            cpu_s=round(whole.cpu_s, 3),
            temperature_c=temperature_c(),
            worker_pid=pid,
        )

    def _keep(self, row: Row) -> None:
        self.rows.append(row)
        if self._path is not None:
            with self._path.open("a", newline="") as f:
                csv.writer(f).writerow(["" if v is None else v for v in asdict(row).values()])


def read(path: Path) -> list[Row]:
    """Rows of a CSV that `Watch` wrote; a last line that was cut off is left out."""
    out = []
    with path.open(newline="") as f:
        for found in csv.DictReader(f):
            try:
                out.append(
                    Row(
                        at_s=float(found["at_s"]),
                        segment=int(found["segment"]),
                        daemon_mb=float(found["daemon_mb"]),
                        worker_mb=float(found["worker_mb"]),
                        others_mb=float(found["others_mb"]),
                        daemon_fds=int(found["daemon_fds"]),
                        others_fds=int(found["others_fds"]),
                        processes=int(found["processes"]),
                        cpu_s=float(found["cpu_s"]),
                        temperature_c=float(found["temperature_c"]) if found["temperature_c"] else None,
                        worker_pid=int(found["worker_pid"]),
                    )
                )
            except (TypeError, ValueError):
                continue
    return out


def slope(at_s: Sequence[float], values: Sequence[float], seed: int = 1) -> dict[str, Any] | None:
    """Growth per hour with its 95 % interval; None where there are fewer than 20 samples.

    The first tenth of the time is left out. What remains is averaged in 20 batches, because neighbouring samples are alike, and a
    straight line is fitted to the batch means; the interval is the percentile bootstrap over batches. `grows` says that all of
    it is above zero.
    """
    times, y = np.asarray(at_s, float) / 3600, np.asarray(values, float)
    if len(times) < BATCHES:
        return None
    late = times >= times[0] + WARM_SHARE * (times[-1] - times[0])
    times, y = times[late], y[late]
    count = min(BATCHES, len(times) // 2)
    if count < 5:
        return None
    x = np.array([part.mean() for part in np.array_split(times, count)])
    m = np.array([part.mean() for part in np.array_split(y, count)])

    def fit(i: Any) -> float:
        spread = x[i] - x[i].mean()
        return float((spread * m[i]).sum() / max((spread**2).sum(), 1e-30))

    rng = np.random.default_rng(seed)
    drawn = [fit(i) for i in rng.integers(0, count, (RESAMPLED, count)) if len(set(i)) > 1]
    low, high = (float(v) for v in np.percentile(drawn, [2.5, 97.5]))
    found = {"per_hour": fit(np.arange(count)), "low": low, "high": high}
    return {**{k: round(v, 3) for k, v in found.items()}, "first": round(float(m[0]), 2), "last": round(float(m[-1]), 2), "grows": low > 0}


def memory(rows: Sequence[Row]) -> dict[str, Any]:
    """Slopes in MB an hour of the daemon, its worker and all together, and of the daemon's descriptors, in the longest unbroken segment."""
    if not rows:
        return {}
    longest = max({r.segment for r in rows}, key=lambda s: sum(r.segment == s for r in rows))
    own = [r for r in rows if r.segment == longest]
    at = [r.at_s for r in own]
    return {
        "samples": len(own),
        "minutes": round((at[-1] - at[0]) / 60, 2),
        "daemon_mb": slope(at, [r.daemon_mb for r in own]),
        "worker_mb": slope(at, [r.worker_mb for r in own]),
        "all_mb": slope(at, [r.daemon_mb + r.worker_mb + r.others_mb for r in own]),
        "daemon_fds": slope(at, [r.daemon_fds for r in own]),
        "most_mb": max(r.daemon_mb + r.worker_mb + r.others_mb for r in own),
        "most_fds": max(r.daemon_fds + r.others_fds for r in own),
        "hottest_c": max((r.temperature_c for r in own if r.temperature_c is not None), default=None),
    }
