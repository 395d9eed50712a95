"""One image in, one Report out: the bundle's engines opened on this device, and the protocol that an image is answered by.

Hides which backend runs, what a run will cost, and how the protocol is chosen; what an answer consists of is each protocol's
own (`appliance.protocols`). Constructing an `Engine` is free; entering it touches the device: sessions open, warm up, and are
timed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from appliance import backends, golden
from appliance.backends import Session
from appliance.budget import RUNGS, SHED, Budget, Deadline, choose_rung
from appliance.bundle import Build, Bundle
from appliance.bundle import Engine as BundleEngine
from appliance.errors import BackendFailed, BackendUnavailable, BundleCorrupt, EngineTooSlow, OutOfTime, SpineNotFound, WrongModality
from appliance.protocols import Bench, ProtocolModule, lumbar_mri, spine_xray_ap
from appliance.report import Report
from appliance.study import Instance
from kernels import fusion

# In the order in which a picture without a header is shown to them. A bundle that holds the engines of none is asked for
# those of the last, which says what is missing.
PROTOCOLS: tuple[ProtocolModule, ...] = (spine_xray_ap, lumbar_mri)
PROTOCOL = lumbar_mri.NAME  # of a refusal before any protocol was chosen
WARM_RUNS = 5


class Steer(Protocol):
    """Who decides between the stretches of a protocol's path: `richest` is the rung that was asked for, `rung` the one to begin
    with, and `go_on(protocol, stretch, rung)` is asked after each stretch but the last for the rung to go on with."""

    @property
    def richest(self) -> str: ...
    @property
    def rung(self) -> str: ...
    def go_on(self, protocol: ProtocolModule, stretch: str, rung: str) -> str: ...


class Engine:
    """The appliance's answer machine: `with Engine(bundle) as engine: report = engine.run(instance, deadline)`.

    `backend` "auto" takes each model's choice from the bundle's profile where it is available, else the first that passed its
    gates and is. `threads` 0 leaves the count to the runtime. `cache` is a folder for compiled engines, so that the next start is
    quicker. `barred(model, build)` says why an engine must not be used on this device, "" where it may. Not thread-safe: one owner
    calls `run`.
    """

    def __init__(
        self,
        bundle: Bundle,
        backend: str = "auto",
        threads: int = 0,
        cache: Path | None = None,
        barred: Callable[[str, Build], str] | None = None,
    ) -> None:
        self.bundle = bundle
        self.backend = backend
        self.threads = threads
        self.cache = cache
        self._barred = barred
        self.used: dict[str, str] = {}
        self.precisions: dict[str, str] = {}
        self.expected_ms: dict[str, float] = {}
        self.protocols: tuple[ProtocolModule, ...] = ()
        self._sessions: dict[str, Session] = {}
        self._failed: set[tuple[str, str]] = set()
        self._fusions: dict[str, fusion.Fusion] = {}

    def __enter__(self) -> Engine:
        try:
            self.protocols = tuple(p for p in PROTOCOLS if set(p.FAMILIES) <= set(self.bundle.manifest["models"])) or PROTOCOLS[-1:]
            families = tuple(dict.fromkeys(f for p in self.protocols for f in p.FAMILIES))
            # One after the other: OpenVINO 2026.4 has been seen to deadlock where two threads make their first inference.
            for family in families:
                self._use(self.bundle.engine(family))
                self._read_fusion(family)
                self._warm_up(family)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        for session in self._sessions.values():
            session.close()
        self._sessions = {}

    def _use(self, entry: BundleEngine) -> None:
        build, self._sessions[entry.name] = self._open(entry)
        self.used[entry.name] = build.backend
        self.precisions[entry.name] = build.precision

    def fall_back(self, family: str) -> str | None:
        """Give up the engine of a family that failed while it ran (its device may be gone) and open the next that can run here:
        its backend, or None where there is no other; then the failed one stays. What failed is not tried again by this Engine."""
        before = self._sessions[family]
        self._failed.add((family, self.used[family]))
        try:
            self._use(self.bundle.engine(family))
        except BackendUnavailable:
            return None
        before.close()
        self._warm_up(family)
        return self.used[family]

    def _builds(self, entry: BundleEngine) -> list[tuple[Build, str]]:
        """The builds to try with the device each runs on: of the backend that was asked for, else in the bundle's own order."""
        if self.backend == "auto":
            return [(b, "") for b in entry.order()]
        name, device = backends.parse(self.backend)
        backends.choose(name)
        if name in entry.builds:
            return [(entry.builds[name], device)]
        if not backends.load(name).REQUIRES:  # the null backend answers without a graph
            return [(Build(name, "", "int8", None), device)]
        raise BackendUnavailable(f"the bundle has no engine of {entry.name} for {name} that its gates let pass", value=name)

    def _open(self, entry: BundleEngine) -> tuple[Build, Session]:
        """The first build that opens here and answers its golden inputs as it should.

        What passed its gates on one machine can still be wrong on another: a processor whose 8-bit products saturate, a runtime
        of another version, a cached engine of another driver. Raises BackendUnavailable with every reason.
        """
        reasons, barred = [], False
        for build, device in self._builds(entry):
            if (entry.name, build.backend) in self._failed:
                reasons.append(f"{build.backend}: it failed while it ran")
                continue
            state = backends.probe(build.backend)
            if not state.available:
                reasons.append(f"{build.backend}: {state.reason}")
                continue
            if self._barred is not None and (why := self._barred(entry.name, build)):
                reasons.append(f"{build.backend}: {why}")
                barred = True
                continue
            graph = self.bundle.read(build.graph) if build.graph else b""
            module = backends.load(build.backend)
            try:
                session = module.open(
                    graph, entry.signature, precision=build.precision, threads=self.threads, device=device, cache=self.cache
                )
            except BackendFailed as error:
                reasons.append(f"{build.backend}: {error.what}")
                continue
            if build.golden is None:
                return build, session
            try:
                found = golden.accept(golden.Golden.from_bytes(self.bundle.read(build.golden)), session.run)
            except BackendFailed as error:
                found = golden.Acceptance(False, error.what, {})
            if found.accepted:
                return build, session
            session.close()
            reasons.append(f"{build.backend}: {found.note}")
        kind = EngineTooSlow if barred else BackendUnavailable
        raise kind(f"no engine of {entry.name} can run here ({'; '.join(reasons) or 'none passed its gates'})", value=entry.name)

    def _read_fusion(self, family: str) -> None:
        """What the logits of a family are fused with, where the bundle holds it. Raises BundleCorrupt."""
        path = self.bundle.manifest["models"][family].get("fusion")
        if path is None:
            return
        try:
            self._fusions[family] = fusion.read(self.bundle.read(path))
        except ValueError as error:
            raise BundleCorrupt(f"the fusion of {family} cannot be used: {error}", value=path) from error

    def _precision(self, families: Sequence[str]) -> str:
        kinds = {self.precisions[f] for f in families}
        return kinds.pop() if len(kinds) == 1 else "mixed"

    def _warm_up(self, family: str) -> None:
        """First runs allocate; later ones are timed, so that a deadline can be judged before work starts."""
        blank = {t.name: np.zeros(t.shape, np.float32) for t in self.bundle.engine(family).signature.inputs}
        times = []
        for _ in range(WARM_RUNS):
            began = time.perf_counter()
            self._sessions[family].run(blank)
            times.append((time.perf_counter() - began) * 1e3)
        self.expected_ms[family] = statistics.median(times[1:])

    def rung_ms(self, protocol: ProtocolModule) -> dict[str, float]:
        """Expected milliseconds of each rung of a protocol's ladder."""
        return protocol.rung_ms(self.expected_ms)

    # -- one run ----------------------------------------------------------------------------------------------------

    def infer(self, family: str, inputs: dict[str, NDArray[np.float32]]) -> dict[str, NDArray[np.float32]]:
        """One inference of one engine, nothing before or after it. Raises KeyError for a family that is not open, BackendFailed."""
        return self._sessions[family].run(inputs)

    def run(self, instance: Instance, deadline: Deadline | None = None, steer: Steer | None = None) -> Report:
        """The Report of one image, complete or partial.

        The protocol is the one for the modality that the header states; where it states none, each is asked in turn whether
        the pixels show its kind of image. Without `steer` the rung is chosen once, by what is left of `deadline`; with it the
        deadline is its own affair. Raises WrongModality (no protocol for it in this bundle, or an unknown picture),
        SpineNotFound, OutOfTime (with the numbers), BackendFailed. Never answers an empty list of findings.
        """
        if not self._sessions:
            raise BackendFailed("the engine is not open", remedy="Use it as a context manager.")
        fitting = [p for p in self.protocols if instance.modality is None or instance.modality in p.MODALITIES]
        if not fitting:
            reads = " and ".join(p.READS for p in self.protocols)
            lacks = "radiographs" if instance.modality in ("CR", "DX") else "images of this modality"
            raise WrongModality(f"this bundle reads {reads} only; it has no engine for {lacks}", value=instance.modality)
        deadline = deadline or Budget().start()
        refusals: list[WrongModality | SpineNotFound] = []
        for protocol in fitting:
            try:
                protocol.check(instance)
                return self._run(protocol, instance, steer or self._once(protocol, deadline))
            except (WrongModality, SpineNotFound) as error:
                refusals.append(error)
        if len(refusals) == 1:
            raise refusals[0]
        reasons = "; ".join(f"as {p.READS}: {e.what}" for p, e in zip(fitting, refusals, strict=True))
        stated = instance.modality or "no modality stated"
        raise WrongModality(f"this picture is not a protocol that I know ({reasons})", value=stated) from refusals[-1]

    def _once(self, protocol: ProtocolModule, deadline: Deadline) -> Steer:
        expected = self.rung_ms(protocol)
        rung = choose_rung(deadline.left_ms(), expected)
        if rung is None:
            raise OutOfTime(
                f"{deadline.left_ms():.0f} ms were left of {deadline.budget.total_ms:.0f}; the fastest answer takes about "
                f"{expected['detection-only']:.0f} ms here",
                value=f"{deadline.budget.total_ms:.0f} ms",
            )
        return _Fixed(rung)

    def _run(self, protocol: ProtocolModule, instance: Instance, steer: Steer) -> Report:
        reached = steer.rung

        def go_on(stretch: str, rung: str) -> str:
            nonlocal reached
            reached = steer.go_on(protocol, stretch, rung)
            return reached

        bench = Bench(self._sessions, self.bundle.manifest["models"], self.used, fusions=self._fusions, go_on=go_on)
        with bench.clock.stage("engine_total"):
            report = protocol.run(bench, instance, steer.rung)
        shed = tuple(part for part in SHED[reached] if part not in SHED[steer.richest])
        return replace(
            report,
            status="partial" if shed else report.status,
            rung=reached,
            asked=steer.richest,
            shed=shed,
            shed_reasons=dict.fromkeys(shed, "too little time was left"),
            timing_ms=bench.clock.ms,
            engine={
                "backends": {f: self.used[f] for f in protocol.FAMILIES},
                "precision": self._precision(protocol.FAMILIES),
                "threads": self.threads,
            },
            bundle=self.bundle.identity,
        )


@dataclass(frozen=True)
class _Fixed:
    """One rung from the first stretch to the last, chosen for want of time from all of them."""

    rung: str
    richest: str = RUNGS[0]

    def go_on(self, protocol: ProtocolModule, stretch: str, rung: str) -> str:
        del protocol, stretch
        return rung


def refused_report(error: Any, source: dict[str, Any] | None = None) -> Report:
    """The record of a refusal: no findings, and the error says why."""
    return Report(status="refused", protocol=PROTOCOL, source=source or {}, error=error.to_json(), naming="")
