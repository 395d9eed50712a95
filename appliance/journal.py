"""What the appliance has acknowledged, kept so that a power cut cannot take it back.

Hides SQLite, the layout of the data directory and the order of the flushes. A study's bytes go to a temporary file,
fsync, rename, fsync of the folder, and only then into a row (WAL, `synchronous=FULL`); whoever holds an id holds a promise.

    <data_dir>/spinebox.db     rows: studies and the names of their artefacts
    <data_dir>/blobs/ab/cd...  contents, named by their own SHA-256, so a changed bit is noticed when read
    <data_dir>/tmp/            files not finished yet; emptied when the journal is opened
    <data_dir>/lock            held while open: one process owns a data directory

Folders are 0700 and files 0600: names and pixels are patient data. Nothing is ever deleted but temporary files.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import sqlite3
import threading
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from appliance.errors import DiskFull, JournalCorrupt, JournalError, SpineboxError, StudyUnknown, UsageError

SCHEMA_VERSION = 1
ID_LENGTH = 32  # hex digits of the SHA-256: 128 bits, so two studies do not meet by accident or by cheap design
MAX_NAME = 120
MAX_LIST = 200
MAX_JSON_BYTES = 16 * 2**20
MAX_ARTEFACTS = 100
# Left free for the artefacts of what was accepted, and for SQLite's log.
RESERVE_BYTES = 32 * 2**20

_ID = re.compile(rf"[0-9a-f]{{{ID_LENGTH}}}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_ARTEFACT = re.compile(r"[a-z0-9][a-z0-9-]{0,39}\.[a-z0-9]{1,8}")

_SCHEMA = """
CREATE TABLE study (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    digest TEXT NOT NULL,
    name TEXT NOT NULL,
    size INTEGER NOT NULL,
    received_at TEXT NOT NULL,
    status TEXT NOT NULL CHECK (status IN ('accepted', 'complete', 'partial', 'refused')),
    attempts INTEGER NOT NULL DEFAULT 1,
    report TEXT,
    error TEXT,
    budget_ms REAL,
    elapsed_ms REAL
) STRICT;
CREATE TABLE artefact (
    study TEXT NOT NULL REFERENCES study (id),
    name TEXT NOT NULL,
    digest TEXT NOT NULL,
    PRIMARY KEY (study, name)
) STRICT;
"""
_SUMMARY_COLUMNS = ("id", "name", "size", "received_at", "status", "attempts", "error", "budget_ms", "elapsed_ms")
_SUMMARY = ", ".join(_SUMMARY_COLUMNS)


@dataclass(frozen=True)
class Summary:
    """One line of the history. `received_at` is ISO 8601 in UTC; `status` is "accepted" (not answered yet), "complete",
    "partial" or "refused" (then `error` has code, message, value, remedy). `budget_ms`, `elapsed_ms`: allowed and taken. `kept`: False
    for an answer that is not on the disk yet; all that a journal gives is."""

    id: str
    name: str
    size: int
    received_at: str
    status: str
    attempts: int = 1
    error: dict[str, str] | None = None
    budget_ms: float | None = None
    elapsed_ms: float | None = None
    kept: bool = True


@dataclass(frozen=True)
class StoredStudy(Summary):
    """One study with all that is kept of it: `digest` of its bytes, the report, and artefact name -> blob digest."""

    digest: str = ""
    report: dict[str, Any] | None = None
    artefacts: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Verification:
    """What `verify` found. `orphans` are blobs without a row (a crash between the two): harmless, and never acknowledged."""

    studies: int
    blobs: int
    missing: tuple[str, ...]
    corrupt: tuple[str, ...]
    orphans: tuple[str, ...]
    database: str

    @property
    def intact(self) -> bool:
        return not self.missing and not self.corrupt and self.database == "ok"


def study_id_of(data: bytes) -> str:
    """The id that `accept` gives these bytes."""
    return hashlib.sha256(data).hexdigest()[:ID_LENGTH]


def stamp(now: datetime) -> str:
    """A moment as `received_at` has it."""
    return now.astimezone(UTC).isoformat(timespec="milliseconds")


def clean_name(name: str) -> str:
    """A file name from outside -> a label for people: no path, no control or direction characters, at most 120 long.

    It is shown, never opened.
    """
    last = re.split(r"[/\\]", unicodedata.normalize("NFC", name[:4096]))[-1]
    # Categories C*: control, format (with the direction overrides that disguise an extension), surrogate, unassigned.
    kept = "".join(" " if c.isspace() else c for c in last if c.isspace() or not unicodedata.category(c).startswith("C"))
    return " ".join(kept.split())[:MAX_NAME].strip() or "unnamed"


@contextlib.contextmanager
def _mapped(doing: str) -> Iterator[None]:
    """OSError and sqlite3.Error -> the tree of `appliance.errors`."""
    try:
        yield
    except SpineboxError:
        raise
    except OSError as exc:
        if exc.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull(f"no space left while {doing}", value=exc.strerror) from exc
        raise JournalError(
            f"the data directory failed while {doing}",
            value=exc.strerror or exc,
            remedy="Check that the disk is sound, mounted for writing, and owned by the user that runs the appliance.",
        ) from exc
    except sqlite3.Error as exc:
        primary = (getattr(exc, "sqlite_errorcode", 0) or 0) & 0xFF
        if primary == sqlite3.SQLITE_FULL:
            raise DiskFull(f"no space left while {doing}", value=exc) from exc
        if primary in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            raise JournalCorrupt(f"the journal's database is damaged, found while {doing}", value=exc) from exc
        raise JournalError(
            f"the journal's database failed while {doing}",
            value=exc,
            remedy="Check that the disk is sound, mounted for writing, and owned by the user that runs the appliance.",
        ) from exc


def _fsync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _to_text(value: Mapping[str, Any], what: str) -> str:
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError) as exc:
        raise JournalError(f"the {what} cannot be written as JSON", value=exc) from exc
    if len(text.encode()) > MAX_JSON_BYTES:
        raise JournalError(f"the {what} is larger than {MAX_JSON_BYTES} bytes", value=len(text))
    return text


def _from_text(text: str | None, study_id: str) -> dict[str, Any] | None:
    if text is None:
        return None
    try:
        value = json.loads(text)
    except ValueError as exc:
        raise JournalCorrupt("a stored report is not JSON", value=study_id) from exc
    if not isinstance(value, dict):
        raise JournalCorrupt("a stored report is not an object", value=study_id)
    return value


def _summary_fields(row: Sequence[Any]) -> dict[str, Any]:
    fields = dict(zip(_SUMMARY_COLUMNS, row, strict=True))
    fields["error"] = _from_text(fields["error"], fields["id"])
    return fields


def _make_folder(path: Path) -> None:
    """Like `mkdir -p`, 0700, each new name flushed into its parent."""
    if path.is_dir():
        return
    _make_folder(path.parent)
    path.mkdir(mode=0o700, exist_ok=True)
    _fsync_folder(path.parent)


class Journal:
    """The store under one data directory; safe to share between threads, owned by one process at a time.

    Constructing touches nothing; `open` (or `with`) creates the directory, takes the lock and checks the schema.
    Raises UsageError where another process holds the directory, JournalCorrupt for a database that is damaged, foreign or
    from a newer version, DiskFull and JournalError for what the disk says.
    """

    def __init__(self, data_dir: Path | str, *, reserve_bytes: int = RESERVE_BYTES) -> None:
        self.data_dir = Path(data_dir)
        self._reserve = reserve_bytes
        self._mutex = threading.RLock()
        self._db: sqlite3.Connection | None = None
        # Readers have a connection of their own: whoever asks must not wait for somebody else's flush.
        self._read_mutex = threading.Lock()
        self._reads: sqlite3.Connection | None = None
        self._lock_fd: int | None = None

    @property
    def _blobs(self) -> Path:
        return self.data_dir / "blobs"

    @property
    def _tmp(self) -> Path:
        return self.data_dir / "tmp"

    # --- opening and closing -------------------------------------------------------------------------------------------

    def open(self) -> Journal:
        with self._mutex, _mapped("opening the journal"):
            if self._db is not None:
                return self
            try:
                self._open()
            except BaseException:
                self.close()
                raise
        return self

    def _open(self) -> None:
        for folder in (self.data_dir, self._blobs, self._tmp):
            _make_folder(folder)
        for folder in (self._blobs, self._tmp):
            folder.chmod(0o700)
        self._lock_fd = os.open(self.data_dir / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            raise UsageError(
                "another process uses this data directory",
                value=self.data_dir,
                remedy="Stop the other Spinebox, or give this one its own --data-dir.",
            ) from exc
        for left_over in self._tmp.iterdir():
            left_over.unlink()
        path = self.data_dir / "spinebox.db"
        # SQLite gives its log the permissions of the database: make that file first, for its owner alone.
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
        path.chmod(0o600)
        self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=5.0)
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = FULL")
        self._db.execute("PRAGMA foreign_keys = ON")
        self._migrate(self._db)
        self._reads = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=5.0)
        self._reads.execute("PRAGMA query_only = ON")
        _fsync_folder(self.data_dir)

    def _migrate(self, db: sqlite3.Connection) -> None:
        (version,) = db.execute("PRAGMA user_version").fetchone()
        (tables,) = db.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if version == SCHEMA_VERSION:
            return
        if version > SCHEMA_VERSION:
            raise JournalCorrupt(
                f"the data directory was written by a newer Spinebox (schema {version}, this one knows {SCHEMA_VERSION})",
                value=self.data_dir,
                remedy="Install that version again, or start with a new directory with --data-dir.",
            )
        if tables:
            raise JournalCorrupt("the database in the data directory is not a Spinebox journal", value=self.data_dir)
        db.executescript(f"BEGIN IMMEDIATE; {_SCHEMA} PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;")

    def close(self) -> None:
        with self._mutex, self._read_mutex:
            if self._reads is not None:
                self._reads.close()
                self._reads = None
            if self._db is not None:
                self._db.close()
                self._db = None
            if self._lock_fd is not None:
                os.close(self._lock_fd)
                self._lock_fd = None

    def __enter__(self) -> Journal:
        return self.open()

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    # --- blobs ---------------------------------------------------------------------------------------------------------

    def _blob_path(self, digest: str) -> Path:
        return self._blobs / digest[:2] / digest[2:]

    def _store_blobs(self, contents: list[bytes]) -> list[str]:
        """Every content durable under its digest when this returns, or nothing acknowledged."""
        free = os.statvfs(self._blobs)
        if free.f_bavail * free.f_frsize < self._reserve + sum(map(len, contents)):
            raise DiskFull("the disk of the data directory is nearly full", value=f"{free.f_bavail * free.f_frsize} bytes free")
        digests = [hashlib.sha256(content).hexdigest() for content in contents]
        folders: set[Path] = set()
        for digest, content in zip(digests, contents, strict=True):
            path = self._blob_path(digest)
            folders.add(path.parent)
            if not path.parent.is_dir():
                path.parent.mkdir(mode=0o700, exist_ok=True)
                folders.add(self._blobs)
            self._place(path, content)
        for folder in sorted(folders):
            _fsync_folder(folder)
        return digests

    def _place(self, path: Path, content: bytes) -> None:
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_size == len(content) and path.read_bytes() == content:
                # It may be there from a run that died before its flush: flush again, a row is about to promise it.
                descriptor = os.open(path, os.O_RDONLY)
                try:
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)
                return
        temporary = self._tmp / secrets.token_hex(16)
        try:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                view = memoryview(content)
                while view:
                    view = view[os.write(descriptor, view) :]
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            os.replace(temporary, path)  # noqa: PTH105 - one seam for the tests that cut the power here
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise

    def blob(self, digest: str) -> bytes:
        """The content with this SHA-256. Raises StudyUnknown for no digest, JournalCorrupt where it is gone or changed."""
        if not _DIGEST.fullmatch(digest):
            raise StudyUnknown("this is not the digest of anything kept", value=digest)
        with _mapped("reading a blob"):
            try:
                content = self._blob_path(digest).read_bytes()
            except FileNotFoundError as exc:
                raise JournalCorrupt("a kept file is missing", value=digest) from exc
        if hashlib.sha256(content).hexdigest() != digest:
            raise JournalCorrupt("a kept file has changed on the disk", value=digest)
        return content

    # --- writing -------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._mutex:
            db = self._connection()
            db.execute("BEGIN IMMEDIATE")
            try:
                yield db
                db.execute("COMMIT")
            except BaseException:
                # SQLite rolls some failures back by itself.
                if db.in_transaction:
                    db.execute("ROLLBACK")
                raise

    def _connection(self) -> sqlite3.Connection:
        if self._db is None:
            raise JournalError("the journal is not open")
        return self._db

    @contextlib.contextmanager
    def _reader(self) -> Iterator[sqlite3.Connection]:
        """The connection that sees what was committed last."""
        with self._read_mutex:
            if self._reads is None:
                self._connection()  # says that the journal is not open
            assert self._reads is not None  # noqa: S101 - opened and closed with the other
            yield self._reads

    def accept(self, data: bytes, name: str, now: datetime | None = None) -> str:
        """Keep these bytes for good and return the study's id; the same bytes have the same id, and their first name.

        When this returns, a power cut does not lose them. Raises DiskFull (nothing kept), JournalError.
        """
        if not data:
            raise UsageError("a study has at least one byte", remedy="Send the file's content.")
        received = stamp(now or datetime.now(UTC))
        with _mapped("keeping a study"):
            self._connection()
            (digest,) = self._store_blobs([data])
            study_id = digest[:ID_LENGTH]
            with self._transaction() as db:
                row = db.execute("SELECT digest FROM study WHERE id = ?", (study_id,)).fetchone()
                if row is None:
                    db.execute(
                        "INSERT INTO study (id, digest, name, size, received_at, status) VALUES (?, ?, ?, ?, ?, 'accepted')",
                        (study_id, digest, clean_name(name), len(data), received),
                    )
                elif row[0] != digest:
                    raise JournalCorrupt("two different studies have the same id", value=study_id)
        return study_id

    def complete(
        self,
        study_id: str,
        report_json: Mapping[str, Any],
        artefacts: Mapping[str, bytes],
        *,
        budget_ms: float | None = None,
        elapsed_ms: Callable[[], float] | None = None,
    ) -> None:
        """Keep the answer: the report (status "complete" or "partial") and its pictures by name ("overlay.png").

        `elapsed_ms` is asked last, so that the time kept holds the flushes too. Replaces an earlier answer or refusal.
        """
        status = report_json.get("status")
        if status not in ("complete", "partial"):
            raise JournalError("only a complete or partial report is an answer", value=status)
        self._finish(study_id, str(status), report_json, None, artefacts, budget_ms, elapsed_ms)

    def fail(
        self,
        study_id: str,
        error_json: Mapping[str, str],
        *,
        report_json: Mapping[str, Any] | None = None,
        artefacts: Mapping[str, bytes] | None = None,
        budget_ms: float | None = None,
        elapsed_ms: Callable[[], float] | None = None,
    ) -> bool:
        """Keep why there is no answer (code, message, value, remedy). False where an answer is there: it stays."""
        return self._finish(study_id, "refused", report_json, error_json, artefacts or {}, budget_ms, elapsed_ms)

    def _finish(
        self,
        study_id: str,
        status: str,
        report: Mapping[str, Any] | None,
        error: Mapping[str, str] | None,
        artefacts: Mapping[str, bytes],
        budget_ms: float | None,
        elapsed_ms: Callable[[], float] | None,
    ) -> bool:
        if len(artefacts) > MAX_ARTEFACTS:
            raise JournalError("too many artefacts for one study", value=len(artefacts))
        for name in artefacts:
            if not _ARTEFACT.fullmatch(name):
                raise JournalError("an artefact's name is not allowed", value=name)
        report_text = None if report is None else _to_text(report, "report")
        error_text = None if error is None else _to_text(error, "error")
        known = self.get(study_id)
        if status == "refused" and known.status in ("complete", "partial"):
            return False
        with _mapped("keeping an answer"):
            digests = self._store_blobs(list(artefacts.values()))
            with self._transaction() as db:
                db.execute("DELETE FROM artefact WHERE study = ?", (study_id,))
                db.executemany(
                    "INSERT INTO artefact (study, name, digest) VALUES (?, ?, ?)",
                    [(study_id, name, digest) for name, digest in zip(artefacts, digests, strict=True)],
                )
                db.execute(
                    "UPDATE study SET status = ?, report = ?, error = ?, budget_ms = ?, elapsed_ms = ? WHERE id = ?",
                    (status, report_text, error_text, budget_ms, elapsed_ms() if elapsed_ms else None, study_id),
                )
        return True

    def attempt(self, study_id: str) -> int:
        """Count one more try at a pending study, before it is made; returns the new count (the first try counted 1).

        Durable before the try, so that a study which kills the process is not tried for ever.
        """
        self.get(study_id)
        with _mapped("counting an attempt"), self._transaction() as db:
            db.execute("UPDATE study SET attempts = attempts + 1 WHERE id = ?", (study_id,))
            (attempts,) = db.execute("SELECT attempts FROM study WHERE id = ?", (study_id,)).fetchone()
        return int(attempts)

    def probe(self) -> None:
        """Raises what a study would meet now: DiskFull, JournalError or JournalCorrupt; returns where one could be kept."""
        with _mapped("trying the data directory"):
            free = os.statvfs(self._blobs)
            if free.f_bavail * free.f_frsize < self._reserve:
                raise DiskFull("the disk of the data directory is nearly full", value=f"{free.f_bavail * free.f_frsize} bytes free")
            trial = self._tmp / secrets.token_hex(16)
            try:
                os.close(os.open(trial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
            finally:
                trial.unlink(missing_ok=True)
            with self._transaction() as db:
                db.execute("SELECT count(*) FROM sqlite_master").fetchone()

    # --- reading -------------------------------------------------------------------------------------------------------

    def get(self, study_id: str) -> StoredStudy:
        """Raises StudyUnknown for anything that is not the id of a kept study."""
        if not _ID.fullmatch(study_id):
            raise StudyUnknown("this is not a study's id", value=study_id)
        with _mapped("reading a study"), self._reader() as db:
            row = db.execute(f"SELECT {_SUMMARY}, digest, report FROM study WHERE id = ?", (study_id,)).fetchone()  # noqa: S608
            artefacts = dict(db.execute("SELECT name, digest FROM artefact WHERE study = ? ORDER BY name", (study_id,)).fetchall())
        if row is None:
            raise StudyUnknown("no study with this id is kept", value=study_id)
        *summary, digest, report = row
        return StoredStudy(**_summary_fields(summary), digest=digest, report=_from_text(report, study_id), artefacts=artefacts)

    def _summaries(self, tail: str, values: tuple[Any, ...]) -> tuple[Summary, ...]:
        with _mapped("listing studies"), self._reader() as db:
            rows = db.execute(f"SELECT {_SUMMARY} FROM study {tail}", values).fetchall()  # noqa: S608
        return tuple(Summary(**_summary_fields(row)) for row in rows)

    def list(self, limit: int = 50, offset: int = 0) -> tuple[Summary, ...]:
        """The newest first, in the order of arrival (a box without a network may have a wrong clock). 1 <= limit <= 200."""
        if not 1 <= limit <= MAX_LIST or not 0 <= offset < 2**62:
            raise UsageError(f"limit must lie in 1 to {MAX_LIST} and offset must not be negative", value=f"{limit}, {offset}")
        return self._summaries("ORDER BY seq DESC LIMIT ? OFFSET ?", (limit, offset))

    def pending(self) -> tuple[Summary, ...]:
        """What was accepted and has neither answer nor refusal, the oldest first: the daemon finishes it at its start."""
        return self._summaries("WHERE status = 'accepted' ORDER BY seq", ())

    def count(self) -> int:
        with _mapped("counting studies"), self._reader() as db:
            (count,) = db.execute("SELECT count(*) FROM study").fetchone()
        return int(count)

    def verify(self) -> Verification:
        """Read everything: SQLite's own check, and every blob against its digest. Takes as long as the disk needs."""
        with _mapped("verifying the journal"):
            with self._mutex:
                db = self._connection()
                database = "; ".join(str(row[0]) for row in db.execute("PRAGMA integrity_check").fetchmany(10))
                wanted = {row[0] for row in db.execute("SELECT digest FROM study UNION SELECT digest FROM artefact")}
                (studies,) = db.execute("SELECT count(*) FROM study").fetchone()
            missing, corrupt = [], []
            for digest in sorted(wanted):
                if not self._blob_path(digest).is_file():
                    missing.append(digest)
                    continue
                try:
                    self.blob(digest)
                except JournalCorrupt:
                    corrupt.append(digest)
            found = {f"{path.parent.name}{path.name}" for path in self._blobs.glob("??/*")}
        return Verification(studies, len(wanted), tuple(missing), tuple(corrupt), tuple(sorted(found - wanted)), database)
