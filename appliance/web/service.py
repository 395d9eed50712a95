"""From bytes to a kept answer.

Hides the order of keeping and computing (keep the bytes while they are computed, keep the answer, then answer), what is given again,
and what is tried again. Where the disk takes too long, the answer is given in time and says that it is not kept yet; until it is, it is
held here, and found as if it were. Who may compute, with how much, and when, is the device's affair. Knows nothing of HTTP.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import logging
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Protocol

from appliance import kept
from appliance.budget import RUNGS, SHED, Budget, Deadline, Wanted
from appliance.device import Answer, Unanswered
from appliance.dispatch import Ticket
from appliance.errors import JournalError, Quarantined, Refusal, SpineboxError, StudyError, StudyUnknown, error_from_json
from appliance.journal import ID_LENGTH, Journal, StoredStudy, clean_name, stamp
from appliance.report import Report

log = logging.getLogger("spinebox.web")

# A study that was being computed when the process died this often is taken to be the cause.
MAX_ATTEMPTS = 3


# An answer leaves so long before its deadline, kept or not: what making and sending it takes.
SENDING_MS = 12.0
MOST_HELD_BYTES = 64 * 2**20  # of answers not kept yet; beyond, answers wait for the disk


class Computing(Protocol):
    """What the service needs of `appliance.device.Device`."""

    def answer(
        self,
        data: bytes,
        wanted: Wanted,
        deadline: Deadline,
        *,
        digest: str,
        ticket: Ticket | None,
        gone: Callable[[], bool],
        admitted: Callable[[], None],
        readable: Callable[[], None],
    ) -> Answer: ...
    def announce(self, size: int, deadline: Deadline) -> Ticket: ...
    def delivered(self, ms: float) -> None: ...


@dataclass(frozen=True)
class Answered:
    """`fresh`: computed now, and the device was done with it at `computed_s` on the monotonic clock."""

    study: StoredStudy
    fresh: bool
    computed_s: float | None = None


@dataclass(frozen=True)
class _Held:
    """An answer on its way to the disk."""

    study: StoredStudy
    data: bytes
    artefacts: Mapping[str, bytes]

    @property
    def size(self) -> int:
        return len(self.data) + sum(map(len, self.artefacts.values()))


@dataclass(frozen=True)
class _Asked:
    """One study to be computed: `keep()` makes its bytes durable in the background, once."""

    digest: str
    data: bytes
    name: str
    deadline: Deadline
    received: datetime
    receive_ms: float | None
    keep: Callable[[], Future[str]]

    @property
    def study_id(self) -> str:
        return self.digest[:ID_LENGTH]


class Service:
    """What the routes ask. `read(data) -> instance` raises StudyError; an instance is passed on unread. `close` ends it."""

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
        # Before a request is admitted there is little to do, but ten threads that do it at once take turns at every step of it, and the
        # last is told after ten times as long that it comes too late.
        self._reception = threading.Lock()
        self._keeper = ThreadPoolExecutor(max_workers=2, thread_name_prefix="keeper")
        self._holding = threading.Lock()
        self._held: dict[str, _Held] = {}

    def close(self) -> None:
        """Wait until everything that was answered is kept; nothing may be asked any more."""
        self._keeper.shutdown()

    def announce(self, size: int, deadline: Deadline) -> Ticket:
        """Keep a place for a request whose body, of `size` bytes, is still coming in. Raises OutOfTime where it need not come."""
        return self._device.announce(size, deadline)

    def answer(
        self,
        data: bytes,
        name: str,
        deadline: Deadline,
        wanted: Wanted | None = None,
        gone: Callable[[], bool] = lambda: False,
        ticket: Ticket | None = None,
        receive_ms: float | None = None,
    ) -> Answered:
        """The study, and what was done for it. An answer to the same bytes that has all that is wanted is given again; a refusal,
        or an answer that was cut short, is tried again and kept only if it is no worse. Where the disk would make it late, the
        answer is given before it is kept (`study.kept`). `receive_ms`, where it is known, is the stage before the first of the device.

        Raises StudyError, Refusal (OutOfTime where it cannot be in time), BackendError, JournalError; each error of a readable
        image is kept as the study's refusal.
        """
        wanted = wanted or Wanted()
        with contextlib.ExitStack() as reception:
            reception.enter_context(self._reception)
            digest = hashlib.sha256(data).hexdigest()
            stored = self._stored(digest[:ID_LENGTH])
            if stored is not None and self._has(stored, wanted):
                return Answered(stored, False)
            if stored is not None and stored.error is not None and stored.error["code"] == Quarantined.code:
                raise error_from_json(stored.error)  # also after a restart
            return self._compute(self._asked(digest, data, name, deadline, receive_ms), wanted, gone, ticket, reception.close)

    def get(self, study_id: str) -> StoredStudy:
        """Raises StudyUnknown."""
        held = self._held.get(study_id)
        return self.journal.get(study_id) if held is None else held.study

    def source(self, study_id: str) -> bytes:
        """The bytes that were sent. Raises StudyUnknown, JournalCorrupt."""
        held = self._held.get(study_id)
        return self.journal.blob(self.journal.get(study_id).digest) if held is None else held.data

    def sent(self, answered: Answered) -> None:
        """The answer is ready to be sent: what keeping and writing it took is left free of the next one's budget."""
        if answered.computed_s is not None and answered.study.kept:
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
                    digest = self.journal.get(study.id).digest
                    asked = self._asked(digest, self.journal.blob(digest), study.name, deadline)
                    self._compute(asked, Wanted())
            except StudyError as exc:
                self._refuse(study.id, exc, deadline, None)
            except SpineboxError as exc:
                log.warning("pending study %s: %s", study.id, exc)
            done += 1
        return done

    def picture(self, study_id: str, draw: Callable[[kept.Render, Any, Report], bytes | None]) -> bytes:
        """A picture of an answer, drawn from what was kept: no inference, the same answer. `draw` gives None where there is no such
        picture. Raises StudyUnknown, JournalCorrupt, StudyError."""
        held = self._held.get(study_id)
        stored = self.journal.get(study_id) if held is None else held.study
        if stored.report is None:
            raise StudyUnknown("this study has no answer to draw", value=study_id)
        if held is not None:
            evidence = held.artefacts.get(kept.EVIDENCE)
        else:
            evidence = self.journal.blob(stored.artefacts[kept.EVIDENCE]) if kept.EVIDENCE in stored.artefacts else None
        report = kept.unpack(stored.report, evidence)
        with self._drawing:  # one at a time: a radiograph is large
            instance = self._read(self.journal.blob(stored.digest) if held is None else held.data)
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
            return self.get(study_id)
        except StudyUnknown:
            return None

    def _asked(self, digest: str, data: bytes, name: str, deadline: Deadline, receive_ms: float | None = None) -> _Asked:
        keeping: list[Future[str]] = []
        received = datetime.now(UTC)

        def keep() -> Future[str]:
            if not keeping:
                keeping.append(self._keeper.submit(self.journal.accept, data, name, received))
            return keeping[0]

        return _Asked(digest, data, name, deadline, received, receive_ms, keep)

    def _compute(
        self,
        asked: _Asked,
        wanted: Wanted,
        gone: Callable[[], bool] = lambda: False,
        ticket: Ticket | None = None,
        admitted: Callable[[], None] = lambda: None,
    ) -> Answered:
        """Compute and keep; an earlier, better answer stays. Raises what the device raised, after keeping it."""
        read = threading.Event()

        def readable() -> None:
            read.set()
            asked.keep()

        try:
            answer = self._device.answer(
                asked.data,
                wanted,
                asked.deadline,
                digest=asked.digest,
                ticket=ticket,
                gone=gone,
                admitted=admitted,
                readable=readable,
            )
        except Unanswered as exc:
            if exc.source is None and not _is_study(exc.error):
                raise exc.error from exc
            return self._refused(asked, exc.error, exc.source)
        except SpineboxError as exc:
            if not read.is_set():
                raise
            return self._refused(asked, exc, {})  # what became of it is kept with it
        return self._given(asked, answer, time.monotonic())

    def _refused(self, asked: _Asked, error: SpineboxError, source: Mapping[str, Any] | None) -> Answered:
        """Keep the refusal and raise it; where an earlier answer is there, that is given."""
        asked.keep().result()
        if self._refuse(asked.study_id, error, asked.deadline, source):
            raise error
        return Answered(self.get(asked.study_id), False)

    def _given(self, asked: _Asked, answer: Answer, computed_s: float) -> Answered:
        """Keep the answer and give it: kept if the disk allows it in time. An answer that is late already waits for the disk."""
        accepted = asked.keep()
        if asked.receive_ms is not None:
            answer.report["timing_ms"] = {"receive": round(asked.receive_ms, 3), **answer.report["timing_ms"]}
        with self._holding:
            earlier = self._stored(asked.study_id)
            if earlier is not None and _is_answer(earlier) and _poorness(earlier.report or {}) <= _poorness(answer.report):
                return Answered(earlier, False)
            held = _Held(_study(asked, answer, earlier), asked.data, answer.artefacts)
            full = sum(h.size for h in self._held.values()) > MOST_HELD_BYTES
            self._held[asked.study_id] = held
        keeping = self._keeper.submit(self._keep, asked, held, accepted)
        left_ms = asked.deadline.left_ms() - SENDING_MS
        try:
            elapsed_ms = keeping.result(None if full or left_ms <= 0 else left_ms / 1e3)
        except TimeoutError:
            keeping.add_done_callback(_tell)
            return Answered(dataclasses.replace(held.study, elapsed_ms=asked.deadline.elapsed_ms()), True, computed_s)
        return Answered(dataclasses.replace(held.study, elapsed_ms=elapsed_ms, kept=True), True, computed_s)

    def _keep(self, asked: _Asked, held: _Held, accepted: Future[str]) -> float:
        """Wait for the disk; the milliseconds that are kept as taken."""
        taken_ms: list[float] = []

        def elapsed_ms() -> float:
            taken_ms.append(asked.deadline.elapsed_ms())
            return taken_ms[0]

        try:
            accepted.result()
            report = held.study.report or {}
            budget_ms = asked.deadline.budget.total_ms
            self.journal.complete(asked.study_id, report, held.artefacts, budget_ms=budget_ms, elapsed_ms=elapsed_ms)
        finally:
            with self._holding:
                if self._held.get(asked.study_id) is held:
                    del self._held[asked.study_id]
        return taken_ms[0]

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


def _study(asked: _Asked, answer: Answer, earlier: StoredStudy | None) -> StoredStudy:
    """The row that the journal will have; the same bytes keep their first name and moment."""
    return StoredStudy(
        id=asked.study_id,
        name=clean_name(asked.name) if earlier is None else earlier.name,
        size=len(asked.data),
        received_at=stamp(asked.received) if earlier is None else earlier.received_at,
        status=str(answer.report["status"]),
        budget_ms=asked.deadline.budget.total_ms,
        elapsed_ms=asked.deadline.elapsed_ms(),
        kept=False,
        digest=asked.digest,
        report=answer.report,
    )


def _tell(keeping: Future[float]) -> None:
    if (error := keeping.exception()) is not None:
        log.error("an answer that was given could not be kept: %s", error)
    else:
        log.warning("the disk was slow: an answer was given before it was kept")


def _is_study(error: SpineboxError) -> bool:
    """422: an image, but one that must not be answered; the history shows it. The rest is no study at all."""
    return isinstance(error, StudyError) and error.http_status == 422


def _is_answer(stored: StoredStudy) -> bool:
    return stored.status in ("complete", "partial")


def _poorness(report: Mapping[str, Any]) -> int:
    return len(SHED.get(report.get("rung", ""), ()))
