"""Another bundle under load: taken over where it proves itself, left where it is otherwise.

Hides the order of checks: the signature, whether it is another one at all, its golden inputs (its engines open only with them right),
and the latency that the device's record has proven of the engines in use. Only then does it take over; nothing that failed is served.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from appliance.bundle import Bundle, open_bundle
from appliance.certificate import DeviceRecord, Subject
from appliance.errors import SpineboxError, SwapRefused
from appliance.workers import Plan, Worker

log = logging.getLogger("spinebox.swap")

PASSES_S = 600.0
QUANTILE = 0.99


class Swapping(Protocol):
    """What is asked of `appliance.device.Device`."""

    def swap(self, plan: Plan, accept: Any) -> Mapping[str, Any]: ...


def proven_limits_ms(folder: Path, bundle: Bundle, up: Mapping[str, Any], threads: int) -> dict[str, float]:
    """The limit of the certificate of each engine in use that proves its p99 on this device; `folder` has the device's record, `up` is
    what the worker says of itself."""
    record = DeviceRecord.open(folder)
    found = {}
    for model, backend in up["used"].items():
        build = bundle.engine(model).builds.get(backend)
        if build is None:
            continue
        subject = Subject(model, backend, up["versions"][backend], build.precision, threads, record.fingerprint, bundle.digest)
        certificate = record.find(subject, QUANTILE)
        if certificate is not None and certificate.proven:
            found[model] = certificate.limit_ms
    return found


class Swaps:
    """The bundle that is served and what became of the last attempt to serve another.

    `path` may be a link: it is followed when the daemon starts and when `ask` is called, never in between, so that a worker which is
    started anew has the bundle of the one before. `limits_ms` are what the engines in use have proven, by model: nothing is asked of the
    latency of others.
    """

    def __init__(self, device: Swapping, path: Path, plan: Plan) -> None:
        self._device, self._path, self._plan = device, path, plan
        self.limits_ms: Mapping[str, float] = {}
        self._lock = threading.Lock()
        self._running = False
        self.bundle: Bundle = open_bundle(plan.bundle)
        self.last: dict[str, Any] | None = None

    def ask(self) -> None:
        """Look for another bundle at the path and let it take over, in a thread of its own; nothing where that is being done already."""
        with self._lock:
            if self._running:
                log.warning("another bundle is being swapped in already")
                return
            self._running = True
        threading.Thread(target=self._run, name="swap", daemon=True).start()

    def now(self) -> None:
        """What `ask` does, here. Raises BundleError, BackendError, SwapRefused; the bundle before is then served on."""
        root = self._path.resolve()
        found = open_bundle(root)
        if found.digest == self.bundle.digest:
            self._note("unchanged", found, None)
            return
        plan = replace(self._plan, bundle=root)
        try:
            self._device.swap(plan, self._accept)
        except SpineboxError as error:
            self._note("refused", found, error)
            raise
        self._plan, self.bundle = plan, found
        self._note("swapped", found, None)

    # -- inside ---------------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self.now()
        except SpineboxError as error:
            if self.last is None or self.last["error"] is None:
                self._note("refused", None, error)
            log.error("the bundle at %s is not served: %s", self._path, error)
        finally:
            self._running = False

    def _accept(self, worker: Worker) -> None:
        """Every model must keep to what its predecessor has proven here: as many passes in a row prove the same of it."""
        for model, limit_ms in self.limits_ms.items():
            if model not in worker.up["used"]:
                continue
            told = worker.ask({"op": "passes", "model": model, "limit_ms": limit_ms}, PASSES_S)
            if told["passes"] < told["needed"]:
                raise SwapRefused(
                    f"{model} took {told['longest_ms']:.1f} ms in pass {told['passes'] + 1} of {told['needed']}; the one in use has proven "
                    f"{limit_ms:.1f} ms",
                    value=model,
                )

    def _note(self, outcome: str, bundle: Bundle | None, error: SpineboxError | None) -> None:
        at = datetime.now(UTC).isoformat(timespec="seconds")
        digest = None if bundle is None else bundle.digest
        self.last = {"outcome": outcome, "digest": digest, "at": at, "error": None if error is None else error.to_json()}
        log.info("bundle at %s: %s", self._path, outcome)
