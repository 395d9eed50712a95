"""Which engine a device should run: the fastest of those that passed, measured in pairs on this machine.

There is no universally fastest runtime, so nothing is assumed: every engine that passed is timed against one reference, two
sessions at a time, interleaved. Where a bundle is compiled the reference is FP32, and what float and bf16 would take is measured
beside the engines to say what INT8 is worth there; a device that measures a bundle anew has no float weights, and takes its first
engine. Times differ from run to run; they are no part of a bundle's identity and go into its profile.
"""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from appliance import backends, golden
from appliance.backends import Session
from appliance.bundle import Build, Bundle, Engine
from appliance.errors import BackendFailed, BackendUnavailable
from benchmarks.harness import Pair, interleaved

CLOSE = 0.03  # of the reference's time: nearer than this is a tie on a noisy machine
Opener = Callable[[], Session]


@dataclass(frozen=True)
class Timed:
    """One engine against the float reference, and its own profile (cold start, tail)."""

    backend: str
    precision: str
    pair: Pair
    profile: dict[str, Any]

    @property
    def label(self) -> str:
        return f"{self.backend} {self.precision}"


def time_pair(reference: Opener, engine: Opener, feed: Mapping[str, Any], runs: int) -> Pair:
    """Two sessions in the process, nothing else: more distort each other."""
    a = reference()
    try:
        b = engine()
        try:
            return interleaved(lambda: a.run(dict(feed)), lambda: b.run(dict(feed)), runs)
        finally:
            b.close()
    finally:
        a.close()


def choose(
    timed: Sequence[Timed], passed: Sequence[str], refused: Mapping[str, str], reference: str = "FP32 on ONNX Runtime"
) -> dict[str, Any] | None:
    """{choice, losers} of one model: the greatest ratio among `passed`; within CLOSE of it the usual preference decides, so that
    noise does not. `refused` maps a backend to why it cannot be chosen. None where nothing passed."""
    able = [t for t in timed if t.precision in ("int8", "fp16") and t.backend in passed]
    if not able:
        return None
    best = max(t.pair.ratio for t in able)
    order = {name: i for i, name in enumerate(backends.PREFERENCE)}
    tied = sorted((t for t in able if 1 / t.pair.ratio - 1 / best <= CLOSE), key=lambda t: order.get(t.backend, len(order)))
    winner = tied[0]
    reason = f"{winner.pair.ratio:.2f} times as fast as {reference} ({winner.pair.b.median_ms:.2f} ms)"
    if len(tied) > 1:
        reason += f"; within {CLOSE:.0%} of {', '.join(t.backend for t in tied[1:])}"
    losers = []
    for t in sorted(timed, key=lambda t: -t.pair.ratio):
        if t is winner:
            continue
        if t.precision in ("f32", "bf16"):
            why = f"{t.pair.b.median_ms:.2f} ms; measured for comparison, its float weights are not in the bundle"
        elif t.backend in passed:
            why = f"{t.pair.b.median_ms:.2f} ms, {t.pair.ratio:.2f} times as fast as {reference}"
        else:
            why = refused.get(t.backend, "it passed no gate here")
        losers.append({"backend": t.backend, "precision": t.precision, "reason": why})
    timed_here = {t.backend for t in timed if t.precision in ("int8", "fp16")}
    losers += [{"backend": b, "precision": "", "reason": why} for b, why in refused.items() if b not in timed_here]
    return {"choice": {"backend": winner.backend, "precision": winner.precision, "reason": reason}, "losers": losers}


def engines_of(timed: Sequence[Timed]) -> dict[str, Any]:
    """ "backend precision" -> its pair and profile, as the profile keeps them."""
    return {t.label: {**asdict(t.pair), "latency": t.profile} for t in timed}


def this_device(targets: Sequence[str]) -> dict[str, Any]:
    """What the times belong to: processor, cores that may be used, versions of the runtimes."""
    try:
        found = re.search(r"^model name\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        cpu = found.group(1) if found else platform.machine()
    except OSError:
        cpu = platform.processor() or platform.machine()
    runtimes = {name: backends.probe(name).version or "" for name in dict.fromkeys(targets)}
    return {"cpu": cpu, "machine": platform.machine(), "cores": len(os.sched_getaffinity(0)), "runtimes": runtimes}


def measure_again(bundle: Bundle, runs: int, say: Callable[[str, int, int], None]) -> dict[str, Any]:
    """The profile of a bundle on this device: every engine that it may run here and whose golden inputs it answers, timed.

    An engine that nobody could judge where it was compiled is judged by its golden inputs alone. Raises BackendUnavailable where
    a model has no engine that runs here.
    """
    models: dict[str, Any] = {}
    seen: list[str] = []
    for name in bundle.manifest["models"]:
        entry = bundle.engine(name)
        rng = np.random.default_rng(1)
        feed = {t.name: rng.uniform(-1, 1, t.shape).astype(np.float32) for t in entry.signature.inputs}
        openers: dict[tuple[str, str], Opener] = {}
        refused: dict[str, str] = {}
        for build in entry.order():
            state = backends.probe(build.backend)
            if not state.available:
                refused[build.backend] = state.reason
                continue

            open_it = _opener(bundle, entry, build)
            why = _refusal(bundle, build.golden, open_it)
            if why is None:
                openers[build.backend, build.precision] = open_it
            else:
                refused[build.backend] = why
        if not openers:
            raise BackendUnavailable(f"no engine of {name} can run here ({'; '.join(f'{k}: {v}' for k, v in refused.items())})", value=name)
        (first, _), reference = next(iter(openers.items()))
        timed = []
        for i, ((backend, precision), open_it) in enumerate(openers.items()):
            say(f"{name}: {backend}", i, len(openers))
            timed.append(Timed(backend, precision, time_pair(reference, open_it, feed, runs), {}))
        seen += [backend for backend, _ in openers]
        chosen = choose(timed, [backend for backend, _ in openers], refused, f"the first, {first}")
        models[name] = {**(chosen or {}), "engines": engines_of(timed)}
    return {"device": this_device(seen), "models": models}


def _opener(bundle: Bundle, entry: Engine, build: Build) -> Opener:
    return lambda: backends.load(build.backend).open(bundle.read(build.graph), entry.signature, precision=build.precision, threads=0)


def _refusal(bundle: Bundle, path: str | None, opener: Opener) -> str | None:
    """Why an engine cannot be believed here; None where it can."""
    if path is None:
        return "it has no golden inputs"
    try:
        session = opener()
        try:
            found = golden.accept(golden.Golden.from_bytes(bundle.read(path)), session.run)
        finally:
            session.close()
    except BackendFailed as error:
        return error.what
    return None if found.accepted else found.note
