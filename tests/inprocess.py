"""A device without a worker process, for tests of what lies above it: one study at a time, computed where it is asked."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Mapping
from typing import Any

from appliance import kept
from appliance.budget import Deadline, Wanted
from appliance.device import Answer, Unanswered
from appliance.errors import SpineboxError, error_from_json
from appliance.report import Report


class InProcess:
    """`read(data) -> instance` raises StudyError; `run(instance, deadline) -> Report` raises Refusal, BackendError."""

    def __init__(self, read: Callable[[bytes], Any], run: Callable[[Any, Deadline], Report]) -> None:
        self._read, self._run = read, run
        self._lock = threading.Lock()
        self.delivered_ms: list[float] = []
        self.wanted: list[Wanted] = []
        self.announced: list[tuple[int, Deadline]] = []
        self.ticket: Any = None
        self.tickets: list[Any] = []  # that requests came with

    def answer(
        self,
        data: bytes,
        wanted: Wanted,
        deadline: Deadline,
        *,
        digest: str,
        ticket: Any,
        gone: Callable[[], bool],
        admitted: Callable[[], None],
        readable: Callable[[], None],
    ) -> Answer:
        assert digest == hashlib.sha256(data).hexdigest()
        self.wanted.append(wanted)
        self.tickets.append(ticket)
        admitted()
        with self._lock:
            source: Mapping[str, Any] | None = None
            try:
                instance = self._read(data)
                source = dict(instance.source)
                readable()
                report = self._run(instance, deadline)
            except SpineboxError as error:
                raise Unanswered(error, None if source is None else dict(source)) from error
            except Exception as exc:
                error = SpineboxError("an unexpected failure inside the appliance", value=type(exc).__name__)
                raise Unanswered(error, dict(source or {})) from exc
            if report.status == "refused":
                raise Unanswered(error_from_json(report.error or {}), dict(instance.source))
            evidence = kept.pack(report)
            return Answer(report.to_json(), {kept.EVIDENCE: evidence} if evidence else {}, 0.0)

    def announce(self, size: int, deadline: Deadline) -> Any:
        self.announced.append((size, deadline))
        return self.ticket

    def delivered(self, ms: float) -> None:
        self.delivered_ms.append(ms)
