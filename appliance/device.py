"""The device: bytes and a deadline in, an answer in time or a refusal at once out.

Composes who may use it (`appliance.dispatch`), what that costs (`appliance.costs`) and who does the work (`appliance.workers`). Hides
how a request's cost is foreseen, how it is steered between stretches of work, what happens when a worker or an engine is lost in the
middle of it, and which inputs are not tried any more.
"""

from __future__ import annotations

import collections
import hashlib
import json
import logging
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from appliance import study
from appliance.budget import RUNGS, SHED, Deadline, Wanted
from appliance.costs import CostModel, Key
from appliance.dispatch import OWN, Dispatcher, Ticket, Turn, Way
from appliance.engine import PROTOCOLS
from appliance.errors import BackendFailed, CostsInvalid, Quarantined, RequestGone, SpineboxError, WorkerLost, error_from_json
from appliance.kept import EVIDENCE
from appliance.protocols import ProtocolModule
from appliance.workers import Plan, Worker, Workers

log = logging.getLogger("spinebox.device")

DELIVER = Key("deliver")  # from the worker's last word to the answer kept and ready to be sent
DELIVER_MS = 20.0  # until that has been measured
MOST_DELIVER_MS = 50.0  # where the disk takes longer than this, the answer does not wait for it
TRANSIT_MS = 8.0  # between the sockets and whoever waits behind them; the client's clock runs there too
HANG_MS, HANG_TIMES, HANG_MS_PER_MEGAPIXEL = 1000.0, 4.0, 1000.0  # a stretch that takes longer is taken to hang
MEASURE_S = 120.0
FALL_BACK_MS = 2000.0  # to open the next engine of a model
CRASHES = 2  # of workers over the same bytes, after which they are not tried again
MOST_SUSPECTS = 1024
UNMEASURED_MS = 500.0  # of a stretch of which nothing at all is known
OTHER_ENGINE = 2.0  # an engine that took over may be so much slower than the one that failed, until it has been seen
_HALF_OCTAVE = math.log(2) / 2
_BY_NAME: dict[str, ProtocolModule] = {p.NAME: p for p in PROTOCOLS}


class Watcher(Protocol):
    """Who is told what was foreseen and what then happened, for the metrics."""

    def predicted(self, stage: str, predicted_ms: float, ms: float) -> None: ...


@dataclass(frozen=True)
class Answer:
    """`report` is the Report's JSON with what was shed and why; `artefacts` what is kept beside it; `waited_ms` the time in the queue."""

    report: dict[str, Any]
    artefacts: dict[str, bytes]
    waited_ms: float


class Unanswered(Exception):
    """An image that the engine refused: `error` says why, `source` is what the image says of itself, None where it could not be read."""

    def __init__(self, error: SpineboxError, source: dict[str, Any] | None) -> None:
        super().__init__(str(error))
        self.error, self.source = error, source
        error.admitted = True


@dataclass(frozen=True)
class _Kind:
    """What is known of an image before it is read: the protocols that may answer it, and its size class (half octaves of pixels)."""

    protocols: tuple[ProtocolModule, ...]
    size: int
    pixels: int

    @property
    def sure(self) -> bool:
        return len(self.protocols) == 1


class Device:
    """`with Device(workers, dispatcher, costs_path) as device:` opens what it is made of and closes it. Thread-safe.

    `power_factor` says by how much heat or a frequency cap slow the device now, 1.0 where nothing does; what was so when costs were
    measured is in them.
    """

    def __init__(
        self,
        workers: Workers,
        dispatcher: Dispatcher,
        *,
        costs_path: Path | None = None,
        watcher: Watcher | None = None,
        power_factor: Callable[[], float] = lambda: 1.0,
    ) -> None:
        self.workers, self.dispatcher = workers, dispatcher
        self._costs_path, self._watcher, self._power_factor = costs_path, watcher, power_factor
        self._costs = CostModel()
        self._lock = threading.Lock()  # of the costs and the suspects
        self._suspects: collections.OrderedDict[str, int] = collections.OrderedDict()

    def __enter__(self) -> Device:
        self.workers.__enter__()
        try:
            self._load()
            if not self._all_known():
                self.measure()
        except BaseException:
            self.workers.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.workers.__exit__()
        self.save()

    # -- what it is asked -----------------------------------------------------------------------------------------------

    def announce(self, size: int, deadline: Deadline) -> Ticket:
        """A request is on its way whose body has `size` bytes: its place is kept for a moment. Raises OutOfTime where whatever it
        turns out to be cannot be answered in time."""
        pixels = size // 2  # as many as there can be, or fewer than there are: what is not known must not refuse
        serving = self._serving()
        least_ms = min(self._way(_Kind((p,), _size(pixels), pixels), RUNGS[-1]).cost_ms for p in serving)
        return self.dispatcher.announce(self._until_s(deadline), least_ms)

    def answer(
        self,
        data: bytes,
        wanted: Wanted,
        deadline: Deadline,
        *,
        digest: str | None = None,
        ticket: Ticket | None = None,
        gone: Callable[[], bool] = lambda: False,
        admitted: Callable[[], None] = lambda: None,
        readable: Callable[[], None] = lambda: None,
    ) -> Answer:
        """The answer to one image, `digest` its SHA-256 where that is known, `ticket` what `announce` gave. `admitted()` is called once
        it waits for its turn, `readable()` once it was read, before it is computed.

        Raises OutOfTime at once where it cannot be in time, Unanswered for what the engine refused, RequestGone, Quarantined,
        WorkerLost where the second worker was lost too or no time is left for it.
        """
        digest = digest or hashlib.sha256(data).hexdigest()
        self._refuse_suspect(digest)
        kind = self._kind(data)
        allowed = wanted.rungs()
        with self.dispatcher.turn(self._until_s(deadline), self._ways(kind, allowed), gone, admitted, ticket) as turn:
            errand = _Errand(self, data, kind, allowed, turn, self._until_s(deadline), gone, readable)
            try:
                return self._twice(errand, digest, deadline)
            except SpineboxError as error:
                error.admitted = True
                raise

    def _twice(self, errand: _Errand, digest: str, deadline: Deadline) -> Answer:
        """Once, and once more where a worker or an engine was lost and time is left."""
        try:
            return errand.run(errand.turn.way)
        except WorkerLost as error:
            self._suspect(digest, errand, error)
            wait_ms = self.workers.wait_ms()
        except BackendFailed as error:
            errand.turn.hold(FALL_BACK_MS)
            self._fall_back(error)
            wait_ms = 0.0
        ways = [Way(w.rung, (("start", wait_ms), *w.stretches)) for w in self._ways(errand.kind, errand.allowed)]
        way = errand.turn.again(ways)
        if way is None:
            total_ms = deadline.budget.total_ms
            raise WorkerLost("the process that owns the engines was lost, and no time is left to try again", value=f"{total_ms:g} ms")
        try:
            return errand.run(Way(way.rung, way.stretches[1:]))
        except WorkerLost as error:
            self._suspect(digest, errand, error)
            raise

    def infer(
        self, model: str, inputs: Mapping[str, NDArray[np.float32]], deadline: Deadline, gone: Callable[[], bool] = lambda: False
    ) -> dict[str, NDArray[np.float32]]:
        """One inference of one engine, in its turn. Raises OutOfTime, RequestGone, BackendFailed, WorkerLost."""
        key = self._infer_key(model)
        way = Way("infer", ((model, self._predicted_ms(key)),))
        until_s = deadline.started_s + deadline.budget.total_ms / 1e3
        with self.dispatcher.turn(until_s, (way,), gone), self.workers.held(until_s) as worker:
            question = {"op": "infer", "model": model, "inputs": worker.give_arrays(inputs)}
            told = worker.ask(question, max(HANG_MS, HANG_TIMES * way.cost_ms) / 1e3)
            self.judge(key, way.cost_ms, told["ms"])
            return worker.made_arrays(told["outputs"])

    def up(self) -> Mapping[str, Any]:
        """What the worker at work says of itself: engines, protocols, signatures, bundle. The same object as long as it is so."""
        return self.workers.up()

    def ready(self) -> bool:
        """Whether a worker is there."""
        return self.workers.health()["pid"] is not None

    def state(self) -> dict[str, Any]:
        """What is so now, for the metrics: queue, inflated costs, restarts, the last outage, heat and power."""
        worker = self.workers.health()
        with self._lock:
            inflated = len(self._costs.alarms())
        return {
            "waiting": self.dispatcher.waiting(),
            "inflated": inflated,
            "worker_restarts": worker["restarts"],
            "outage_ms": worker["last_outage_ms"],
            "power_factor": self._power_factor(),
        }

    def delivered(self, ms: float) -> None:
        """What keeping and sending the last answer took."""
        with self._lock:
            self._costs.observe(DELIVER, ms)

    def measure(self) -> None:
        """Take the time of every stretch on synthetic images, as at the first start with a bundle on a device."""
        with self.workers.held(time.monotonic() + MEASURE_S) as worker:
            told = worker.ask({"op": "measure"}, MEASURE_S)
            (text,) = worker.made([told["bytes"]])
        self._take_over(json.loads(text))

    def _take_over(self, measured: Sequence[Sequence[Any]]) -> None:
        """Begin anew with what a worker measured: [protocol, stretch, pixels, ms] each."""
        costs = CostModel()
        costs.slowed = self._power_factor()
        for protocol, stretch, pixels, ms in measured:
            costs.observe(self._infer_key(stretch) if protocol == "infer" else self._key(protocol, stretch, _size(pixels), sure=True), ms)
        with self._lock:
            self._costs = costs
        self.save()

    def save(self) -> None:
        """Keep the costs for the next start. A disk that fails costs the measurement only."""
        if self._costs_path is None:
            return
        try:
            with self._lock:
                self._costs.save(self._costs_path, self._fingerprint())
        except OSError as error:
            log.warning("the measured costs could not be kept: %s", error)

    def health(self) -> dict[str, Any]:
        """For /readyz: engines, expected times of each rung, the worker, inflated costs."""
        up = self.workers.up()
        worker = self.workers.health()
        with self._lock:
            alarms = {" ".join(filter(None, (k.engine, k.stage))): round(factor, 3) for k, factor in self._costs.alarms().items()}
        return {
            "ready": worker["pid"] is not None,
            "reason": None if worker["pid"] is not None else "the engines are being started",
            "backends": up.get("used", {}),
            "expected_ms": {
                name: {r: round(self._way(_Kind((_BY_NAME[name],), _size(1 << 18), 1 << 18), r).cost_ms, 1) for r in RUNGS}
                for name in up.get("protocols", ())
            },
            "worker": worker,
            "waiting": self.dispatcher.waiting(),
            "slower_than_measured": alarms,
            "power_factor": round(self._power_factor(), 3),
            "bundle": up.get("bundle"),
        }

    def swap(self, plan: Plan, accept: Callable[[Worker], None] | None = None) -> Mapping[str, Any]:
        """Another bundle takes over under load, after `accept` has seen its worker and its costs were measured. Raises what it was
        refused with."""

        def measured(worker: Worker) -> None:
            if accept is not None:
                accept(worker)
            told = worker.ask({"op": "measure"}, MEASURE_S)
            found.extend(json.loads(worker.made([told["bytes"]])[0]))

        found: list[list[Any]] = []
        up = self.workers.swap(plan, measured)
        self._take_over(found)
        return up

    # -- costs ----------------------------------------------------------------------------------------------------------

    def judge(self, key: Key, predicted_ms: float, ms: float) -> None:
        with self._lock:
            if self._costs.judge(key, predicted_ms, ms):
                log.warning("%s takes longer than predicted: %.1f ms, not %.1f; its cost is raised", key, ms, predicted_ms)
        if self._watcher is not None:
            self._watcher.predicted(key.stage.rstrip("?"), max(predicted_ms, 0.001), ms)

    def remaining(self, kind: _Kind, protocol: ProtocolModule, rung: str, done: str, allowed: Sequence[str]) -> list[Way]:
        """After the stretch `done` of `rung`: the ways in which `protocol` can still end, richest first."""
        path = protocol.PATHS[rung]
        behind = path[: path.index(done) + 1]
        rungs = [r for r in allowed[allowed.index(rung) :] if protocol.PATHS[r][: len(behind)] == behind]
        return [Way(r, tuple((s, self.stretch_ms(kind, protocol, s)) for s in protocol.PATHS[r][len(behind) :])) for r in rungs]

    def stretch_ms(self, kind: _Kind, protocol: ProtocolModule, stretch: str) -> float:
        return self._predicted_ms(self.stretch_key(kind, protocol, stretch))

    def stretch_key(self, kind: _Kind, protocol: ProtocolModule, stretch: str) -> Key:
        return self._key(protocol.NAME, stretch, kind.size, kind.sure or stretch != protocol.PATHS[RUNGS[0]][0])

    def _ways(self, kind: _Kind, allowed: Sequence[str]) -> list[Way]:
        return [self._way(kind, rung) for rung in allowed]

    def _way(self, kind: _Kind, rung: str) -> Way:
        """Of a picture that does not say what it is, the dearest of the protocols; it may be shown to all before one answers."""
        found = [Way(rung, tuple((s, self.stretch_ms(kind, p, s)) for s in p.PATHS[rung])) for p in kind.protocols]
        return max(found, key=lambda way: way.cost_ms)

    def _predicted_ms(self, key: Key) -> float:
        with self._lock:
            found_ms = self._costs.predicted_ms(key) if self._costs.known(key) else self._foreseen_ms(key)
            return found_ms * max(1.0, self._power_factor() / self._costs.slowed)

    def _foreseen_ms(self, key: Key) -> float:
        """Of a size not seen yet, the nearest size's, larger by as many pixels; of an engine that just took over, OTHER_ENGINE times what
        the one before it took; of a picture without header, all protocols' beginnings."""
        if key.stage.endswith("?"):
            stage = key.stage.rstrip("?")
            begun = {k.engine: self._foreseen_ms(Key(stage, k.engine, key.shape)) for k in self._known_as(stage)}
            return sum(begun.values()) if begun else UNMEASURED_MS
        what = key.engine.partition(" ")[0]
        same = [k for k in self._known_as(key.stage) if k.engine == key.engine]
        others = [k for k in self._known_as(key.stage) if k.engine.partition(" ")[0] == what]
        if not same and not others:
            return UNMEASURED_MS
        best = min(same or others, key=lambda k: abs(k.shape[0] - key.shape[0]) if key.shape else 0)
        larger = max(1.0, math.exp((key.shape[0] - best.shape[0]) * _HALF_OCTAVE)) if key.shape else 1.0
        return self._costs.predicted_ms(best) * larger * (1.0 if same else OTHER_ENGINE)

    def _known_as(self, stage: str) -> list[Key]:
        """What has been measured of this stage, whatever the engine and the size."""
        return [k for k in self._costs.measured() if k.stage == stage and self._costs.known(k)]

    def _key(self, protocol: str, stretch: str, size: int, sure: bool) -> Key:
        used = self.workers.up().get("used", {})
        engines = "+".join(used.get(f, "") for f in _BY_NAME[protocol].FAMILIES)
        return Key(stretch if sure else f"{stretch}?", f"{protocol} {engines}", (size,), self.workers.plan.threads)

    def _infer_key(self, model: str) -> Key:
        return Key(model, f"infer {self.workers.up().get('used', {}).get(model, '')}", (), self.workers.plan.threads)

    def _kind(self, data: bytes) -> _Kind:
        seen = study.glance(data)
        serving = self._serving()
        fitting = tuple(p for p in serving if seen.modality in p.MODALITIES) or serving
        return _Kind(fitting, _size(seen.pixels), seen.pixels)

    def _serving(self) -> tuple[ProtocolModule, ...]:
        return tuple(_BY_NAME[name] for name in self.workers.up().get("protocols", ())) or tuple(PROTOCOLS)

    def _until_s(self, deadline: Deadline) -> float:
        """When the worker must be done: the usual worst time of keeping and sending is left for that, at most half of all."""
        with self._lock:
            deliver_ms = self._costs.predicted_ms(DELIVER) if self._costs.known(DELIVER) else DELIVER_MS
        deliver_ms = min(deliver_ms, MOST_DELIVER_MS) + TRANSIT_MS
        return deadline.started_s + (deadline.budget.total_ms - min(deliver_ms, deadline.budget.total_ms / 2)) / 1e3

    def _fingerprint(self) -> str:
        up = self.workers.up()
        facts = [up.get("bundle", {}).get("digest"), up.get("used"), self.workers.plan.threads, _processor()]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def _load(self) -> None:
        if self._costs_path is None:
            return
        try:
            self._costs = CostModel.load(self._costs_path, self._fingerprint())
        except CostsInvalid as error:
            log.warning("%s", error)

    def _all_known(self) -> bool:
        """Whether every stretch of every protocol has been measured with the engines in use, at some size."""
        return all(
            any(k.engine == self._key(name, stretch, 0, sure=True).engine for k in self._known_as(stretch))
            for name in self.workers.up().get("protocols", ())
            for stretch in {s for path in _BY_NAME[name].PATHS.values() for s in path}
        )

    # -- what went wrong ------------------------------------------------------------------------------------------------

    def _suspect(self, digest: str, errand: _Errand, error: WorkerLost) -> None:
        """Count one worker lost over these bytes, if it had seen them. Raises Quarantined where it was one too many."""
        if not errand.seen:
            return
        errand.seen = False
        with self._lock:
            self._suspects[digest] = self._suspects.pop(digest, 0) + 1
            while len(self._suspects) > MOST_SUSPECTS:
                self._suspects.popitem(last=False)
        log.warning("lost a worker over %s: %s", digest[:16], error)
        self._refuse_suspect(digest)

    def _refuse_suspect(self, digest: str) -> None:
        with self._lock:
            crashes = self._suspects.get(digest, 0)
        if crashes >= CRASHES:
            raise Quarantined("the engines were lost each time that they saw this image", value=f"{crashes} times")

    def _fall_back(self, error: BackendFailed) -> None:
        """Let the worker open the next engine of the model that failed. Raises the failure again where there is none."""
        if error.family is None:
            raise error
        with self.workers.held(time.monotonic() + MEASURE_S) as worker:
            told = worker.ask({"op": "fall_back", "model": error.family}, MEASURE_S)
            if told["backend"] is None:
                raise error
            worker.up = {**worker.up, "used": told["used"]}
        log.error("the engine of %s failed (%s); %s serves it now", error.family, error.what, told["backend"])


@dataclass
class _Errand:
    """One request at the worker: what it is told between stretches, and what becomes of its words."""

    device: Device
    data: bytes
    kind: _Kind
    allowed: Sequence[str]
    turn: Turn
    until_s: float
    gone: Callable[[], bool]
    readable: Callable[[], None]
    seen: bool = False  # whether a worker was given the bytes

    def run(self, way: Way) -> Answer:
        with self.device.workers.held(self.until_s) as worker:
            self.seen = True
            worker.give(self.data)
            worker.send({"op": "answer", "bytes": len(self.data), "rung": way.rung, "richest": self.allowed[0]})
            protocol, ahead = self.kind.protocols[-1], way
            while True:
                told = worker.receive(self._limit_ms(ahead.stretches[0][1] if ahead.stretches else 0.0) / 1e3)
                if told["at"] == "read":
                    self.readable()
                elif told["at"] == "stretch":
                    protocol = _BY_NAME[told["protocol"]]
                    self._judge(protocol, told)
                    ahead = self._next(worker, protocol, told)
                elif told["at"] == "done":
                    self._judge(protocol, told)
                    return self._taken(worker, told)
                elif told["at"] == "refused":
                    error = error_from_json(told["error"])
                    if isinstance(error, BackendFailed) and told["family"]:
                        error.family = told["family"]
                        raise error
                    raise Unanswered(error, told["source"])
                else:
                    raise RequestGone("the client went away while its study was computed")

    def _next(self, worker: Worker, protocol: ProtocolModule, told: Mapping[str, Any]) -> Way:
        ways = self.device.remaining(self.kind, protocol, told["rung"], told["stretch"], self.allowed)
        ahead = self.turn.keep(ways)
        worker.send({"drop": True} if self.gone() else {"rung": ahead.rung})
        return ahead

    def _judge(self, protocol: ProtocolModule, told: Mapping[str, Any]) -> None:
        key = self.device.stretch_key(self.kind, protocol, told["stretch"])
        self.device.judge(key, self.device.stretch_ms(self.kind, protocol, told["stretch"]), told["ms"])

    def _limit_ms(self, predicted_ms: float) -> float:
        return max(HANG_MS, HANG_TIMES * predicted_ms) + HANG_MS_PER_MEGAPIXEL * self.kind.pixels / 1e6

    def _taken(self, worker: Worker, told: Mapping[str, Any]) -> Answer:
        text, evidence = worker.made([told["report"], told["evidence"]])
        worker.tidy(max(len(text) + len(evidence), len(self.data)))
        report = json.loads(text)
        report["timing_ms"]["queue"] = round(self.turn.waited_ms, 3)
        report["shed_reasons"] = {part: _why(part, self.turn.shed) for part in report["shed"]}
        return Answer(report, {EVIDENCE: evidence} if evidence else {}, self.turn.waited_ms)


def _why(part: str, shed: Mapping[str, str]) -> str:
    """Why a part is not in an answer: why the poorest rung that has it was not given."""
    having = [r for r in RUNGS if part not in SHED[r]]
    return next((shed[r] for r in reversed(having) if r in shed), OWN)


def _size(pixels: int) -> int:
    """Half octaves of the number of pixels; what is smaller than 256 x 256 costs what that costs."""
    return round(math.log(max(pixels, 1 << 16)) / _HALF_OCTAVE)


def _processor() -> str:
    """What the processor calls itself: costs measured on another hold no more."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "Model"))), "")
