"""From bytes to a kept answer, one study at a time.

Hides the order of keeping and computing (keep the bytes, compute, keep the answer, only then answer), who waits for the
one engine, and what is tried again. Knows nothing of HTTP.
"""

from __future__ import annotations

import collections
import contextlib
import logging
import statistics
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from appliance.budget import Budget, Deadline
from appliance.errors import JournalError, OutOfTime, Refusal, SpineboxError, StudyError, StudyUnknown, all_errors
from appliance.journal import Journal, StoredStudy, study_id_of
from appliance.report import Report
from appliance.web import kept

log = logging.getLogger("spinebox.web")

# A study that was being computed when the process died this often is taken to be the cause.
MAX_ATTEMPTS = 3


class Service:
    """What the routes ask.

    `read(data) -> instance` raises StudyError; `run(instance, deadline) -> Report` raises Refusal, BackendError. An
    instance is passed on unread but for its `source` dict. `max_waiting` studies may wait for the one being computed.
    """

    def __init__(
        self,
        *,
        read: Callable[[bytes], Any],
        run: Callable[[Any, Deadline], Report],
        render: kept.Render,
        journal: Journal,
        max_waiting: int,
        protocol: str,
    ) -> None:
        self._read, self._run, self._render = read, run, render
        self.journal = journal
        self._max_waiting = max_waiting
        self._protocol = protocol
        self._engine = threading.Lock()
        self._drawing = threading.Lock()
        self._queue = threading.Lock()
        self._inside = 0
        # What drawing and keeping took after the last answers; the engine gets that much less of the budget.
        self._after_ms: collections.deque[float] = collections.deque(maxlen=7)

    def answer(self, data: bytes, name: str, deadline: Deadline) -> tuple[str, bool]:
        """(study id, whether it was computed now). A full answer to the same bytes is given again; a refusal, or an answer
        that was cut short, is tried again and kept only if it is no worse.

        Raises StudyError, Refusal (OutOfTime where too many wait), BackendError, JournalError; each error of a readable
        image is kept as the study's refusal.
        """
        study_id = study_id_of(data)
        if self._answered_in_full(study_id):
            return study_id, False
        with self._turn(deadline):
            if self._answered_in_full(study_id):
                return study_id, False
            try:
                instance = self._read(data)
            except StudyError as exc:
                # 422: an image, but one that must not be answered; the history shows it. The rest is no study at all.
                if exc.http_status == 422:
                    self._refuse(self.journal.accept(data, name), exc, deadline, None)
                raise
            return study_id, self._compute(self.journal.accept(data, name), instance, deadline)

    def finish_pending(self, budget_ms: float) -> int:
        """Answer what a crash left unanswered; returns how many. A refusal counts as one, and is kept."""
        done = 0
        for study in self.journal.pending():
            deadline = Budget(budget_ms).start()
            with self._engine:
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
                        self._compute_kept(study.id, deadline)
                except SpineboxError as exc:
                    log.warning("pending study %s: %s", study.id, exc)
                done += 1
        return done

    def _compute_kept(self, study_id: str, deadline: Deadline) -> None:
        try:
            instance = self._read(self.journal.blob(self.journal.get(study_id).digest))
        except SpineboxError as exc:
            self._refuse(study_id, exc, deadline, None)
            raise
        self._compute(study_id, instance, deadline)

    def overlay(self, study_id: str, *, boxes: bool, outlines: bool, grades: bool, measures: bool, heatmap: float) -> bytes:
        """The overlay with other switches, drawn from what was kept: no inference, the same answer."""
        stored = self.journal.get(study_id)
        if stored.report is None or stored.status == "refused":
            raise StudyUnknown("this study has no answer to draw", value=study_id)
        evidence = stored.artefacts.get(kept.EVIDENCE)
        report = kept.unpack(stored.report, self.journal.blob(evidence) if evidence else None)
        with self._drawing:  # one at a time: a radiograph is large
            instance = self._read(self.journal.blob(stored.digest))
            return self._render.overlay_png(
                instance, report, boxes=boxes, outlines=outlines, grades=grades, measures=measures, heatmap=heatmap
            )

    # --- inside --------------------------------------------------------------------------------------------------------

    def _answered_in_full(self, study_id: str) -> bool:
        stored = self._stored(study_id)
        return stored is not None and _is_answer(stored) and not (stored.report or {}).get("shed")

    def _stored(self, study_id: str) -> StoredStudy | None:
        try:
            return self.journal.get(study_id)
        except StudyUnknown:
            return None

    @contextlib.contextmanager
    def _turn(self, deadline: Deadline) -> Iterator[None]:
        with self._queue:
            if self._inside > self._max_waiting:
                raise OutOfTime("the appliance is busy", value=f"{self._inside} studies", remedy="Send it again in a few seconds.")
            self._inside += 1
        try:
            if not self._engine.acquire(timeout=max(0.0, deadline.left_ms() / 1e3)):
                raise OutOfTime("another study took the time", value=f"{deadline.budget.total_ms:g} ms allowed")
            try:
                yield
            finally:
                self._engine.release()
        finally:
            with self._queue:
                self._inside -= 1

    def _compute(self, study_id: str, instance: Any, deadline: Deadline) -> bool:
        """Run and keep. False where an earlier, better answer stays. Raises what the engine raised, after keeping it."""
        try:
            report = self._run(instance, self._for_engine(deadline))
            answered_ms = deadline.elapsed_ms()
            if report.status == "refused":
                raise error_from_json(report.error or {})
            pictures = kept.artefacts(self._render, instance, report)
        except SpineboxError as exc:
            if self._refuse(study_id, exc, deadline, instance):
                raise
            return False
        except Exception as exc:
            # A bug must neither lose the study nor look like an empty answer.
            log.exception("study %s failed", study_id)
            error = SpineboxError("an unexpected failure inside the appliance", value=type(exc).__name__)
            self._refuse(study_id, error, deadline, None)
            raise error from exc
        earlier = self._stored(study_id)
        if earlier is not None and _is_answer(earlier) and len((earlier.report or {}).get("shed", ())) <= len(report.shed):
            return False
        self.journal.complete(study_id, report.to_json(), pictures, budget_ms=deadline.budget.total_ms, elapsed_ms=deadline.elapsed_ms)
        self._after_ms.append(deadline.elapsed_ms() - answered_ms)
        return True

    def _for_engine(self, deadline: Deadline) -> Deadline:
        """The same start, less the usual time of drawing and keeping; at most half, so that one slow disk cannot refuse all."""
        total_ms = deadline.budget.total_ms
        reserve_ms = min(statistics.median(self._after_ms), total_ms / 2) if self._after_ms else 0.0
        return Deadline(Budget(total_ms - reserve_ms), started_s=deadline.started_s)

    def _refuse(self, study_id: str, error: SpineboxError, deadline: Deadline, instance: Any | None) -> bool:
        """Keep a refusal; False where an earlier answer stays. A journal that fails here must not hide the first error."""
        pictures: dict[str, bytes] = {}
        source: dict[str, Any] = {}
        if instance is not None:
            source = dict(instance.source)
            with contextlib.suppress(SpineboxError):
                pictures[kept.BASE] = self._render.base_png(instance)
        report = Report(status="refused", protocol=self._protocol, source=source, error=error.to_json())
        try:
            return self.journal.fail(
                study_id,
                error.to_json(),
                report_json=report.to_json(),
                artefacts=pictures,
                budget_ms=deadline.budget.total_ms,
                elapsed_ms=deadline.elapsed_ms,
            )
        except JournalError as exc:
            log.error("the refusal of study %s could not be kept: %s", study_id, exc)
            return True


def _is_answer(stored: StoredStudy) -> bool:
    return stored.status in ("complete", "partial")


def error_from_json(error: Mapping[str, str]) -> SpineboxError:
    """{"code", "message", "value", "remedy"} -> the error of that code, a Refusal where the code is unknown."""
    kinds = {kind.code: kind for kind in all_errors()}
    kind = kinds.get(error.get("code", ""), Refusal)
    return kind(error.get("message", "refused"), value=error.get("value"), remedy=error.get("remedy"))
