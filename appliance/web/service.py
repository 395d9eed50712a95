"""From bytes to a kept answer.

Hides the order of keeping and computing (keep the bytes while they are computed, keep the answer, only then answer), what is given
again, and what is tried again. Who may compute, with how much, and when, is the device's affair. Knows nothing of HTTP.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

from appliance import kept
from appliance.budget import RUNGS, SHED, Budget, Deadline, Wanted
from appliance.device import Answer, Unanswered
from appliance.errors import JournalError, Quarantined, Refusal, SpineboxError, StudyError, StudyUnknown, error_from_json
from appliance.journal import Journal, StoredStudy, study_id_of
from appliance.report import Report

log = logging.getLogger("spinebox.web")

# A study that was being computed when the process died this often is taken to be the cause.
MAX_ATTEMPTS = 3


class Computing(Protocol):
    """What the service needs of `appliance.device.Device`."""

    def answer(
        self, data: bytes, wanted: Wanted, deadline: Deadline, *, gone: Callable[[], bool], readable: Callable[[], None]
    ) -> Answer: ...
    def delivered(self, ms: float) -> None: ...


@dataclass(frozen=True)
class Answered:
    """`fresh`: computed now, and the device was done with it at `computed_s` on the monotonic clock."""

    study_id: str
    fresh: bool
    computed_s: float | None = None


class Service:
    """What the routes ask. `read(data) -> instance` raises StudyError; an instance is passed on unread."""

    def __init__(
        self,
        *,
        device: Computing,
        read: Callable[[bytes], Any],
        render: kept.Render,
        journal: Journal,
        protocol: str,
    ) -> None:
        self._device, self._read, self._render = device, read, render
        self.journal = journal
        self._protocol = protocol
        self._drawing = threading.Lock()
        self._keeper = ThreadPoolExecutor(max_workers=2, thread_name_prefix="keeper")

    def answer(
        self, data: bytes, name: str, deadline: Deadline, wanted: Wanted | None = None, gone: Callable[[], bool] = lambda: False
    ) -> Answered:
        """The study's id, and what was done for it. An answer to the same bytes that has all that is wanted is given again; a refusal,
        or an answer that was cut short, is tried again and kept only if it is no worse.

        Raises StudyError, Refusal (OutOfTime where it cannot be in time), BackendError, JournalError; each error of a readable
        image is kept as the study's refusal.
        """
        wanted = wanted or Wanted()
        study_id = study_id_of(data)
        stored = self._stored(study_id)
        if stored is not None and self._has(stored, wanted):
            return Answered(study_id, False)
        if stored is not None and stored.error is not None and stored.error["code"] == Quarantined.code:
            raise error_from_json(stored.error)  # also after a restart
        return self._compute(study_id, data, name, deadline, wanted, gone)

    def sent(self, answered: Answered) -> None:
        """The answer is ready to be sent: what keeping and writing it took is left free of the next one's budget."""
        if answered.computed_s is not None:
            self._device.delivered((time.monotonic() - answered.computed_s) * 1e3)

    def finish_pending(self, budget_ms: float) -> int:
        """Answer what a crash left unanswered; returns how many. A refusal counts as one, and is kept."""
        done = 0
        for study in self.journal.pending():
            deadline = Budget(budget_ms).start()
            try:
                if study.attempts >= MAX_ATTEMPTS:
                    error = Refusal(
                        "the appliance stopped each time it computed this study",
                        value=f"{study.attempts} times",
                        remedy="Report this with the log; send the image in another format.",
                    )
                    self._refuse(study.id, error, deadline, None)
                else:
                    self.journal.attempt(study.id)
                    data = self.journal.blob(self.journal.get(study.id).digest)
                    self._compute(study.id, data, study.name, deadline, Wanted(), lambda: False)
            except StudyError as exc:
                self._refuse(study.id, exc, deadline, None)
            except SpineboxError as exc:
                log.warning("pending study %s: %s", study.id, exc)
            done += 1
        return done

    def picture(self, study_id: str, draw: Callable[[kept.Render, Any, Report], bytes | None]) -> bytes:
        """A picture of an answer, drawn from what was kept: no inference, the same answer. `draw` gives None where there is no such
        picture. Raises StudyUnknown, JournalCorrupt, StudyError."""
        stored = self.journal.get(study_id)
        if stored.report is None:
            raise StudyUnknown("this study has no answer to draw", value=study_id)
        evidence = stored.artefacts.get(kept.EVIDENCE)
        report = kept.unpack(stored.report, self.journal.blob(evidence) if evidence else None)
        with self._drawing:  # one at a time: a radiograph is large
            instance = self._read(self.journal.blob(stored.digest))
            drawn = draw(self._render, instance, report)
        if drawn is None:
            raise StudyUnknown(
                "this study has no such picture", value=study_id, remedy="Its report says what was shed or withheld, and why."
            )
        return drawn

    # --- inside --------------------------------------------------------------------------------------------------------

    def _has(self, stored: StoredStudy, wanted: Wanted) -> bool:
        """Whether the kept answer is at least as rich as what is wanted."""
        if not _is_answer(stored):
            return False
        rung = (stored.report or {}).get("rung")
        return rung in RUNGS and RUNGS.index(rung) <= RUNGS.index(wanted.rungs()[0])

    def _stored(self, study_id: str) -> StoredStudy | None:
        try:
            return self.journal.get(study_id)
        except StudyUnknown:
            return None

    def _compute(self, study_id: str, data: bytes, name: str, deadline: Deadline, wanted: Wanted, gone: Callable[[], bool]) -> Answered:
        """Compute and keep; an earlier, better answer stays. Raises what the device raised, after keeping it."""
        keeping: list[Future[str]] = []

        def keep() -> None:
            """The bytes are made durable while they are computed."""
            if not keeping:
                keeping.append(self._keeper.submit(self.journal.accept, data, name))

        try:
            answer = self._device.answer(data, wanted, deadline, gone=gone, readable=keep)
        except Unanswered as exc:
            if exc.source is None and not _is_study(exc.error):
                raise exc.error from exc
            keep()
            keeping[0].result()
            if self._refuse(study_id, exc.error, deadline, exc.source):
                raise exc.error from exc
            return Answered(study_id, False)
        except SpineboxError as exc:
            if keeping:  # it was read: what became of it is kept with it
                keeping[0].result()
                if not self._refuse(study_id, exc, deadline, {}):
                    return Answered(study_id, False)
            raise
        computed_s = time.monotonic()
        keep()
        keeping[0].result()
        earlier = self._stored(study_id)
        if earlier is not None and _is_answer(earlier) and _poorness(earlier.report or {}) <= _poorness(answer.report):
            return Answered(study_id, False)
        self.journal.complete(study_id, answer.report, answer.artefacts, budget_ms=deadline.budget.total_ms, elapsed_ms=deadline.elapsed_ms)
        return Answered(study_id, True, computed_s)

    def _refuse(self, study_id: str, error: SpineboxError, deadline: Deadline, source: Mapping[str, Any] | None) -> bool:
        """Keep a refusal; False where an earlier answer stays. A journal that fails here must not hide the first error."""
        report = Report(status="refused", protocol=self._protocol, source=dict(source or {}), error=error.to_json())
        try:
            return self.journal.fail(
                study_id,
                error.to_json(),
                report_json=report.to_json(),
                budget_ms=deadline.budget.total_ms,
                elapsed_ms=deadline.elapsed_ms,
            )
        except JournalError as exc:
            log.error("the refusal of study %s could not be kept: %s", study_id, exc)
            return True


def _is_study(error: SpineboxError) -> bool:
    """422: an image, but one that must not be answered; the history shows it. The rest is no study at all."""
    return isinstance(error, StudyError) and error.http_status == 422


def _is_answer(stored: StoredStudy) -> bool:
    return stored.status in ("complete", "partial")


def _poorness(report: Mapping[str, Any]) -> int:
    return len(SHED.get(report.get("rung", ""), ()))
