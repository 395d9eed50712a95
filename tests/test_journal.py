"""What was acknowledged is there afterwards: across restarts, kills, full disks and cuts between any two steps."""

from __future__ import annotations

import errno
import hashlib
import os
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest

from appliance import journal as journal_module
from appliance.errors import DiskFull, JournalCorrupt, JournalError, StudyUnknown, UsageError
from appliance.journal import ID_LENGTH, Journal, clean_name, study_id_of

WHEN = datetime(2026, 3, 4, 5, 6, 7, tzinfo=UTC)
ANSWER = {"status": "complete", "findings": [{"label": "disc", "level": "L5/S1"}], "notes": ["très bien"]}
ERROR = {"code": "refused.no-spine", "message": "no spine", "value": "", "remedy": "send a spine"}


@pytest.fixture
def journal(tmp_path):
    with Journal(tmp_path / "data", reserve_bytes=0) as opened:
        yield opened


def reopened(journal: Journal) -> Journal:
    journal.close()
    return Journal(journal.data_dir, reserve_bytes=0).open()


def test_a_restart_shows_the_same(journal):
    study = journal.accept(b"bytes of a study", "knee/../../L spine.dcm", WHEN)
    journal.complete(study, ANSWER, {"overlay.png": b"picture", "labels.png": b"labels"}, budget_ms=3000, elapsed_ms=lambda: 12.5)
    before = journal.get(study)
    with reopened(journal) as again:
        after = again.get(study)
        assert after == before
        assert after.report == ANSWER
        assert after.received_at == "2026-03-04T05:06:07.000+00:00"
        assert (after.name, after.size, after.status, after.budget_ms, after.elapsed_ms) == ("L spine.dcm", 16, "complete", 3000, 12.5)
        assert again.blob(after.digest) == b"bytes of a study"
        assert {name: again.blob(digest) for name, digest in after.artefacts.items()} == {
            "overlay.png": b"picture",
            "labels.png": b"labels",
        }
        assert again.verify().intact


def test_the_same_bytes_are_one_study(journal):
    first = journal.accept(b"same", "a.dcm", WHEN)
    journal.complete(first, ANSWER, {})
    assert journal.accept(b"same", "b.dcm") == first == study_id_of(b"same")
    assert len(first) == ID_LENGTH
    assert journal.count() == 1
    assert journal.get(first).name == "a.dcm"
    assert journal.get(first).status == "complete"


def test_the_list_is_newest_first_and_limited(journal):
    ids = [journal.accept(bytes([i]), f"{i}.png", WHEN) for i in range(5)]
    assert [s.id for s in journal.list(limit=3)] == ids[:1:-1]
    assert [s.id for s in journal.list(limit=3, offset=3)] == ids[1::-1]
    for limit, offset in ((0, 0), (201, 0), (1, -1), (1, 2**62)):
        with pytest.raises(UsageError):
            journal.list(limit, offset)


def test_a_refusal_is_kept_but_never_replaces_an_answer(journal):
    study = journal.accept(b"noise", "noise.png")
    assert journal.fail(study, ERROR, artefacts={"base.png": b"grey"}, elapsed_ms=lambda: 1.0)
    assert (journal.get(study).status, journal.get(study).error) == ("refused", ERROR)
    assert journal.list()[0].error == ERROR
    journal.complete(study, ANSWER, {})
    assert (journal.get(study).status, journal.get(study).error, journal.get(study).artefacts) == ("complete", None, {})
    assert not journal.fail(study, ERROR)
    assert journal.get(study).report == ANSWER


def test_what_was_accepted_and_not_answered_is_pending_after_a_restart(journal):
    done, lost, refused = (journal.accept(data, "x", WHEN) for data in (b"1", b"2", b"3"))
    journal.complete(done, ANSWER, {})
    journal.fail(refused, ERROR)
    with reopened(journal) as again:
        assert [(s.id, s.attempts) for s in again.pending()] == [(lost, 1)]
        assert again.attempt(lost) == 2
        with reopened(again) as third:
            assert third.pending()[0].attempts == 2
            third.complete(lost, ANSWER, {})
            assert third.pending() == ()


@pytest.mark.parametrize(
    "bad", ["", "../../etc/passwd", "A" * ID_LENGTH, "g" * ID_LENGTH, "0" * (ID_LENGTH + 1), "0" * ID_LENGTH + "\n", "%"]
)
def test_an_id_is_checked_before_any_use(journal, bad):
    for call in (journal.get, journal.attempt, lambda i: journal.fail(i, ERROR), lambda i: journal.complete(i, ANSWER, {})):
        with pytest.raises(StudyUnknown):
            call(bad)
    with pytest.raises(StudyUnknown):
        journal.blob(bad)
    with pytest.raises(StudyUnknown):
        journal.get("0" * ID_LENGTH)


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("../../etc/passwd", "passwd"),
        ("C:\\scans\\Müller.dcm", "Müller.dcm"),
        ("a\x00b\r\n\tc.png", "ab c.png"),
        ("cod\u202egnp.exe", "codgnp.exe"),
        ("", "unnamed"),
        ("..///", "unnamed"),
        ("\u200b\u200b", "unnamed"),
        ("x" * 5000, "x" * 120),
    ],
)
def test_names_are_labels_not_paths(journal, name, kept):
    assert clean_name(name) == kept
    assert journal.get(journal.accept(name.encode() + b"-", name)).name == kept


def test_bad_answers_are_not_kept(journal):
    study = journal.accept(b"1", "x")
    for report in ({"status": "refused"}, {}, {"status": "complete", "x": float("nan")}, {"status": "complete", "x": object()}):
        with pytest.raises(JournalError):
            journal.complete(study, report, {})
    for name in ("../x.png", "x", ".png", "a/b.png", "x" * 50 + ".png"):
        with pytest.raises(JournalError):
            journal.complete(study, ANSWER, {name: b""})
    with pytest.raises(JournalError):
        journal.complete(study, ANSWER, {f"heatmap-{i}.png": b"" for i in range(101)})
    with pytest.raises(UsageError):
        journal.accept(b"", "empty")
    assert [s.id for s in journal.pending()] == [study]


def test_only_the_owner_can_read_it(journal):
    journal.complete(journal.accept(b"patient", "x"), ANSWER, {"overlay.png": b"p"})
    for path in [journal.data_dir, *journal.data_dir.rglob("*")]:
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode == (0o700 if path.is_dir() else 0o600), path


def test_one_process_owns_a_data_directory(journal):
    with pytest.raises(UsageError, match="another process"):
        Journal(journal.data_dir).open()
    with reopened(journal) as again:
        assert again.count() == 0


def test_the_settings_that_survive_a_power_cut_are_on(journal):
    assert journal._db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert journal._db.execute("PRAGMA synchronous").fetchone() == (2,)


# --- damage ------------------------------------------------------------------------------------------------------------


def test_a_changed_bit_is_noticed(journal):
    study = journal.accept(b"pixels", "x")
    digest = journal.get(study).digest
    path = journal.data_dir / "blobs" / digest[:2] / digest[2:]
    path.write_bytes(b"pixelz")
    with pytest.raises(JournalCorrupt, match="changed"):
        journal.blob(digest)
    assert journal.verify().corrupt == (digest,)
    assert not journal.verify().intact
    journal.accept(b"pixels", "x")  # sent again: healed
    assert journal.blob(digest) == b"pixels"
    path.unlink()
    with pytest.raises(JournalCorrupt, match="missing"):
        journal.blob(digest)
    assert journal.verify().missing == (digest,)


def test_a_damaged_or_foreign_database_is_said_to_be_so(tmp_path):
    garbage = tmp_path / "garbage"
    garbage.mkdir()
    (garbage / "spinebox.db").write_bytes(b"this is not SQLite at all" * 1000)
    with pytest.raises(JournalCorrupt):
        Journal(garbage).open()
    assert (garbage / "spinebox.db").read_bytes().startswith(b"this is")  # never overwritten

    foreign = tmp_path / "foreign"
    foreign.mkdir()
    with sqlite3.connect(foreign / "spinebox.db") as db:
        db.execute("CREATE TABLE music (title TEXT)")
    db.close()
    with pytest.raises(JournalCorrupt, match="not a Spinebox"):
        Journal(foreign).open()

    newer = Journal(tmp_path / "newer").open()
    newer._db.execute("PRAGMA user_version = 99")
    with pytest.raises(JournalCorrupt, match="newer"):
        reopened(newer)
    # The lock of the failed opening is free again.
    with sqlite3.connect(tmp_path / "newer" / "spinebox.db") as db:
        db.execute(f"PRAGMA user_version = {journal_module.SCHEMA_VERSION}")
    db.close()
    Journal(tmp_path / "newer").open().close()


def test_a_page_overwritten_under_the_database_is_found(journal):
    for i in range(50):
        journal.accept(bytes([i]), f"{i}" * 100)
    journal.close()
    path = journal.data_dir / "spinebox.db"
    content = bytearray(path.read_bytes())
    content[4096 * 2 :] = b"\xff" * (len(content) - 4096 * 2)
    path.write_bytes(content)
    with Journal(journal.data_dir, reserve_bytes=0) as again, pytest.raises(JournalCorrupt):
        again.list(200)


def test_a_data_directory_that_cannot_be_made_is_an_error_with_a_remedy(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(JournalError) as caught:
        Journal(tmp_path / "file" / "data").open()
    assert caught.value.remedy
    with pytest.raises(JournalError, match="not open"):
        Journal(tmp_path / "x").list()


# --- full disk ---------------------------------------------------------------------------------------------------------


def test_a_disk_full_while_writing_acknowledges_nothing(journal, monkeypatch):
    kept = journal.accept(b"before", "x")
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")))
        with pytest.raises(DiskFull):
            journal.accept(b"during", "x")
        with pytest.raises(DiskFull):
            journal.complete(kept, ANSWER, {"overlay.png": b"new"})
    assert [s.id for s in journal.list()] == [kept]
    assert list((journal.data_dir / "tmp").iterdir()) == []
    assert journal.verify().orphans == ()
    assert journal.get(journal.accept(b"during", "x")).status == "accepted"


def test_sqlite_itself_full_leaves_no_half_written_row(journal):
    kept = journal.accept(b"before", "x")
    (pages,) = journal._db.execute("PRAGMA page_count").fetchone()
    journal._db.execute(f"PRAGMA max_page_count = {pages}")
    big = {"status": "complete", "notes": ["x" * 200_000]}
    with pytest.raises(DiskFull):
        journal.complete(kept, big, {"overlay.png": b"o"})
    assert (journal.get(kept).status, journal.get(kept).artefacts) == ("accepted", {})
    journal._db.execute("PRAGMA max_page_count = 1000000")
    journal.complete(kept, big, {"overlay.png": b"o"})
    assert journal.get(kept).status == "complete"


def test_the_last_space_is_not_used_up(tmp_path):
    with Journal(tmp_path, reserve_bytes=2**62) as journal:
        with pytest.raises(DiskFull):
            journal.accept(b"x", "x")
        with pytest.raises(DiskFull):
            journal.probe()
        assert journal.list() == ()
    with Journal(tmp_path, reserve_bytes=0) as journal:
        journal.probe()


# --- cuts between the steps --------------------------------------------------------------------------------------------


class PowerCut(BaseException):
    """Not an Exception: nothing in the journal may catch it and go on."""


def cut_at(monkeypatch, step: int) -> list[str]:
    """Let `step` calls of the file system through, then cut the power; returns the calls seen."""
    seen: list[str] = []

    def wrap(module, name):
        real = getattr(module, name)

        def call(*args, **kwargs):
            if len(seen) == step:
                raise PowerCut(name)
            seen.append(name)
            return real(*args, **kwargs)

        monkeypatch.setattr(module, name, call)

    for name in ("write", "fsync", "replace"):
        wrap(os, name)
    return seen


def test_a_cut_between_any_two_steps_of_accept_leaves_all_or_nothing(tmp_path, monkeypatch):
    step, outcomes = 0, []
    while True:
        journal = Journal(tmp_path / str(step), reserve_bytes=0).open()
        earlier = journal.accept(b"earlier", "x")
        with monkeypatch.context() as patch:
            cut_at(patch, step)
            try:
                journal.accept(b"interrupted", "x")
                finished = True
            except PowerCut:
                finished = False
        with reopened(journal) as again:
            assert [s.id for s in again.list()] == [study_id_of(b"interrupted")] * finished + [earlier]
            check = again.verify()
            assert check.intact
            assert list((again.data_dir / "tmp").iterdir()) == []
            assert again.get(again.accept(b"interrupted", "x")).status == "accepted"
            assert again.verify().orphans == ()
        outcomes.append(finished)
        if finished:
            break
        step += 1
    assert step >= 4  # write, fsync, rename, fsync of the folder at the least: the loop cut something


def test_a_cut_between_any_two_steps_of_complete_leaves_the_old_or_the_new(tmp_path, monkeypatch):
    step = 0
    while True:
        journal = Journal(tmp_path / str(step), reserve_bytes=0).open()
        study = journal.accept(b"study", "x")
        with monkeypatch.context() as patch:
            cut_at(patch, step)
            try:
                journal.complete(study, ANSWER, {"overlay.png": b"o", "labels.png": b"l"})
                finished = True
            except PowerCut:
                finished = False
        with reopened(journal) as again:
            stored = again.get(study)
            assert stored.status == ("complete" if finished else "accepted")
            assert set(stored.artefacts) == ({"overlay.png", "labels.png"} if finished else set())
            assert [s.id for s in again.pending()] == ([] if finished else [study])
            assert again.verify().intact
        if finished:
            break
        step += 1
    assert step >= 8


def test_the_blob_is_durable_before_its_row(journal, monkeypatch):
    order: list[str] = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, real=real, name=name: (order.append(name), real(*a))[1])
    journal._db.set_trace_callback(lambda sql: order.append(sql.split()[0]) if sql.split()[0] in ("INSERT", "COMMIT") else None)
    journal.accept(b"new", "x")
    # The file, its name, the folder(s) that hold the name, and only then the row.
    assert order == ["fsync", "replace", "fsync", "fsync", "INSERT", "COMMIT"]


CHILD = """
import os, sys
from pathlib import Path
from appliance.journal import Journal
with Journal(sys.argv[1], reserve_bytes=0) as journal:
    i = 0
    while True:
        study = journal.accept(f"study {i} ".encode() * (1 + i * 37 % 5000), f"{i}.dcm")
        os.write(1, f"accepted {study}\\n".encode())
        if i % 2:
            journal.complete(study, {"status": "complete", "i": i}, {"overlay.png": os.urandom(2000)})
            os.write(1, f"complete {study}\\n".encode())
        i += 1
"""


@pytest.mark.parametrize("delay_s", [0.2, 0.45])
def test_kill_9_loses_nothing_that_was_acknowledged(tmp_path, delay_s):
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(tmp_path)], stdout=subprocess.PIPE, cwd=Path(__file__).parents[1])
    first = child.stdout.readline()
    time.sleep(delay_s)
    child.send_signal(signal.SIGKILL)
    lines = (first + child.stdout.read()).splitlines()
    child.stdout.close()
    child.wait()
    if not first:
        pytest.fail("the child never acknowledged anything")
    said = [line.split() for line in lines if len(line) == len(b"accepted ") + ID_LENGTH]
    with Journal(tmp_path, reserve_bytes=0) as journal:
        for what, study in said:
            stored = journal.get(study.decode())
            assert hashlib.sha256(journal.blob(stored.digest)).hexdigest().startswith(stored.id)
            if what == b"complete":
                assert stored.status == "complete"
                assert len(journal.blob(stored.artefacts["overlay.png"])) == 2000
        assert len(said) > 3
        assert journal.verify().intact
        assert all(s.status == "accepted" for s in journal.pending())


def test_threads_may_accept_and_complete_at_once(journal):
    failures: list[BaseException] = []
    acknowledged: list[str] = []

    def work(number: int) -> None:
        try:
            for i in range(8):
                study = journal.accept(f"shared {i}".encode() if i % 2 else f"own {number} {i}".encode(), f"{number}.png")
                journal.complete(study, ANSWER, {"overlay.png": f"{i}".encode()})
                acknowledged.append(study)
                assert journal.get(study).status == "complete"
                journal.list()
        except BaseException as exc:  # noqa: BLE001 - handed to the test's own thread
            failures.append(exc)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert failures == []
    assert journal.count() == len(set(acknowledged)) == 6 * 4 + 4
    assert journal.verify().intact


def test_readers_wait_for_no_writer(journal):
    study = journal.accept(b"bytes of a study", "a.dcm", WHEN)
    held, leave = threading.Event(), threading.Event()

    def write():
        with journal._transaction() as db:
            db.execute("UPDATE study SET name = 'other' WHERE id = ?", (study,))
            held.set()
            assert leave.wait(20)

    writer = threading.Thread(target=write)
    writer.start()
    assert held.wait(20)
    reader = threading.Thread(target=lambda: seen.append((journal.get(study).name, journal.count(), len(journal.list()))))
    seen = []
    reader.start()
    reader.join(10)
    try:
        assert seen == [("a.dcm", 1, 1)]  # what was committed last
    finally:
        leave.set()
        writer.join(20)
        reader.join(20)
    assert journal.get(study).name == "other"
