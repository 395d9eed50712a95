"""study under attack: files made to exhaust memory, time or the stack, and codec processes that die, hang or lie."""

from __future__ import annotations

import os
import signal
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pydicom
import pytest

from appliance import _codec, study
from appliance.errors import (
    BackendUnavailable,
    InvalidStudy,
    NoPixels,
    NotAnImage,
    OutOfTime,
    SpineboxError,
    StudyTooLarge,
    TruncatedStudy,
    UndecodablePixels,
)

FILES = Path(pydicom.__file__).parent / "data" / "test_files"
MIB = 1 << 20
SHORT = study.Limits(decode_timeout_s=0.5)


def element(group: int, number: int, vr: str, value: bytes) -> bytes:
    """One explicit little-endian element, even length."""
    value += b"\0" * (len(value) % 2)
    head = struct.pack("<HH", group, number) + vr.encode()
    if vr in ("OB", "OW", "SQ", "UN", "UT"):
        return head + b"\0\0" + struct.pack("<I", len(value)) + value
    return head + struct.pack("<H", len(value)) + value


def short(group: int, number: int, value: int) -> bytes:
    return element(group, number, "US", struct.pack("<H", value))


def file_of(body: bytes, syntax: str = "1.2.840.10008.1.2.1") -> bytes:
    return b"\0" * 128 + b"DICM" + element(2, 0x10, "UI", syntax.encode()) + body


def image_head(rows: int = 4, columns: int = 4, inside: bytes = b"") -> bytes:
    """The elements of an MR image up to the pixel data; `inside` comes between groups 0010 and 0028."""
    return (
        element(0x08, 0x16, "UI", b"1.2.840.10008.5.1.4.1.1.4")
        + element(0x08, 0x60, "CS", b"MR")
        + inside
        + short(0x28, 2, 1)
        + element(0x28, 4, "CS", b"MONOCHROME2")
        + short(0x28, 0x10, rows)
        + short(0x28, 0x11, columns)
        + short(0x28, 0x100, 16)
        + short(0x28, 0x101, 16)
        + short(0x28, 0x102, 15)
        + short(0x28, 0x103, 0)
    )


def image(inside: bytes = b"", syntax: str = "1.2.840.10008.1.2.1") -> bytes:
    return file_of(image_head(inside=inside) + element(0x7FE0, 0x10, "OW", bytes(32)), syntax)


def encapsulated(frame: bytes, rows: int, columns: int, syntax: str) -> bytes:
    frame += b"\0" * (len(frame) % 2)
    pixels = struct.pack("<HH", 0x7FE0, 0x10) + b"OB\0\0\xff\xff\xff\xff"
    pixels += b"\xfe\xff\x00\xe0\0\0\0\0" + b"\xfe\xff\x00\xe0" + struct.pack("<I", len(frame)) + frame + b"\xfe\xff\xdd\xe0\0\0\0\0"
    return file_of(image_head(rows, columns) + pixels, syntax)


def peak_of(data: bytes, tmp_path: Path) -> tuple[str, int, float]:
    """Read `data` in a process of its own: (error code or "read", MiB above the idle peak of both processes, seconds)."""
    file = tmp_path / "attack"
    file.write_bytes(data)
    script = (
        "import re, resource, sys, time\n"
        "from pathlib import Path\n"
        "from appliance import _codec, study\n"
        "from appliance.errors import SpineboxError\n"
        # Not ru_maxrss, which a process takes over from the one that started it.
        "def high_mib(): return int(re.search(r'VmHWM:\\s+(\\d+)', Path('/proc/self/status').read_text())[1]) >> 10\n"
        "data = Path(sys.argv[1]).read_bytes()\n"
        "study.warm_up()\n"
        "worker = _codec._pool.idle[-1].process.pid\n"
        "worker_mib = int(Path(f'/proc/{worker}/statm').read_text().split()[1]) * resource.getpagesize() >> 20\n"
        "before, start = high_mib(), time.monotonic()\n"
        "try: study.read(data); code = 'read'\n"
        "except SpineboxError as error: code = error.code\n"
        "seconds = time.monotonic() - start\n"
        "after = high_mib()\n"
        "_codec._pool.stop()\n"
        "child = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss\n"
        "print(code, after - before + max(0, (child >> 10) - worker_mib), seconds)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(file)], capture_output=True, text=True, timeout=120, check=True)
    code, peak, seconds = done.stdout.split()
    return code, int(peak), float(seconds)


# --- Bombs -------------------------------------------------------------------------------------------------------------------


def deflated_bomb(block: bytes, times: int) -> bytes:
    """`block` inflated `times` over: after a full flush a deflate stream repeats without referring back."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    first = packer.compress(image_head(inside=b"")[:40]) + packer.flush(zlib.Z_FULL_FLUSH)
    packed = packer.compress(block) + packer.flush(zlib.Z_FULL_FLUSH)
    return file_of(first + packed * times + packer.flush(), "1.2.840.10008.1.2.1.99")


def test_a_deflated_bomb_stops_at_the_limit(tmp_path: Path) -> None:
    data = deflated_bomb(bytes(16 * MIB), 100)
    assert len(data) < 2 * MIB
    code, peak, seconds = peak_of(data, tmp_path)
    assert code == "study.too-large"
    assert peak < 220  # of 1600
    assert seconds < 10


def test_a_deflated_file_within_the_limit_is_read() -> None:
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    body = image_head(inside=element(0x09, 0x10, "UN", bytes(MIB))) + element(0x7FE0, 0x10, "OW", bytes(32))
    assert study.read(file_of(packer.compress(body) + packer.flush(), "1.2.840.10008.1.2.1.99")).pixels.shape == (4, 4)
    assert study.read(file_of(zlib.compress(body), "1.2.840.10008.1.2.1.99")).pixels.shape == (4, 4)


def test_an_rle_bomb_is_refused_by_its_size(tmp_path: Path) -> None:
    frame = struct.pack("<16I", 2, 64, 66, *[0] * 13) + b"\x81\x00" * 2
    code, peak, _ = peak_of(encapsulated(frame, 65535, 65535, "1.2.840.10008.1.2.5"), tmp_path)
    assert (code, peak < 20) == ("study.too-large", True)
    code, peak, _ = peak_of(encapsulated(frame, 4096, 4096, "1.2.840.10008.1.2.5"), tmp_path)
    assert code == "study.undecodable"
    assert peak < 200


def test_a_jpeg_2000_that_claims_a_huge_image(tmp_path: Path) -> None:
    data = bytearray((FILES / "MR_small_jp2klossless.dcm").read_bytes())
    size = data.index(b"\xff\x4f\xff\x51") + 8
    data[size : size + 8] = struct.pack(">II", 60000, 60000)  # the image
    data[size + 16 : size + 24] = struct.pack(">II", 60000, 60000)  # one tile as large
    code, peak, seconds = peak_of(bytes(data), tmp_path)
    assert code == "study.undecodable"
    assert peak < 600
    assert seconds < 20


def test_pictures_that_claim_or_hold_too_much(tmp_path: Path) -> None:
    done, png = cv2.imencode(".png", np.zeros((4096, 4096), dtype=np.uint8))
    assert done
    plain = png.tobytes()
    # A text chunk of 200 MiB once inflated, in front of the pixels.
    packed = b"Comment\0\0" + zlib.compress(bytes(200 * MIB), 9)
    chunk = struct.pack(">I", len(packed)) + b"zTXt" + packed + struct.pack(">I", zlib.crc32(b"zTXt" + packed))
    for data in (plain, plain[:33] + chunk + plain[33:]):
        code, peak, seconds = peak_of(data, tmp_path)
        assert code in ("read", "study.undecodable")
        assert peak < 400
        assert seconds < 10
    wide = plain[:16] + struct.pack(">II", 1 << 30, 1) + plain[24:]
    assert peak_of(wide, tmp_path)[0] == "study.too-large"


def test_a_jpeg_of_countless_scans_runs_out_of_time() -> None:
    done, data = cv2.imencode(".jpg", np.zeros((4000, 4000), dtype=np.uint8), [cv2.IMWRITE_JPEG_PROGRESSIVE, 1])
    assert done
    jpeg = data.tobytes()
    last = jpeg.rindex(b"\xff\xda")
    attack = jpeg[:last] + jpeg[last:-2] * 3000 + b"\xff\xd9"
    start = time.monotonic()
    with pytest.raises(UndecodablePixels) as caught:
        study.read(attack, study.Limits(decode_timeout_s=1.0))
    assert time.monotonic() - start < 5
    assert caught.value.value == "1 s"
    assert study.read(jpeg).pixels.shape == (4000, 4000)


@pytest.mark.parametrize("depth", [33, 500, 20_000])
@pytest.mark.parametrize("vr", ["SQ", "UN", "implicit"])
def test_deep_nesting_is_refused(depth: int, vr: str) -> None:
    implicit = vr != "SQ"
    one = b"\x09\x00\x10\x10" + (b"" if implicit else b"SQ\0\0") + b"\xff\xff\xff\xff" + b"\xfe\xff\x00\xe0\xff\xff\xff\xff"
    end = b"\xfe\xff\x0d\xe0\0\0\0\0\xfe\xff\xdd\xe0\0\0\0\0"
    outer = b"\x09\x00\x10\x10UN\0\0\xff\xff\xff\xff\xfe\xff\x00\xe0\xff\xff\xff\xff" if vr == "UN" else one
    with pytest.raises(StudyTooLarge, match="nested deeper than 32"):
        study.read(image(outer + one * (depth - 1) + end * depth))
    assert study.read(image(outer + one * 31 + end * 32)).pixels.shape == (4, 4)


def test_deep_nesting_of_stated_lengths_is_refused() -> None:
    nested = b""
    for _ in range(33):
        nested = element(0x09, 0x1010, "SQ", b"\xfe\xff\x00\xe0" + struct.pack("<I", len(nested)) + nested)
    with pytest.raises(StudyTooLarge, match="nested"):
        study.read(image(nested))


def test_countless_elements_are_refused_quickly() -> None:
    attack = image(element(0x09, 0x11, "LO", b"") * 8_000_000)[: 63 * MIB]
    start = time.monotonic()
    with pytest.raises(StudyTooLarge, match="elements"):
        study.read(attack)
    assert time.monotonic() - start < 5


def test_countless_fragments_and_chunks_are_refused_quickly() -> None:
    pixels = struct.pack("<HH", 0x7FE0, 0x10) + b"OB\0\0\xff\xff\xff\xff" + b"\xfe\xff\x00\xe0\0\0\0\0" * 6_000_000
    start = time.monotonic()
    with pytest.raises(StudyTooLarge, match="elements"):
        study.read(file_of(image_head() + pixels, "1.2.840.10008.1.2.5"))
    done, png = cv2.imencode(".png", np.zeros((4, 4), dtype=np.uint8))
    assert done
    empty = b"\0\0\0\0teXt" + struct.pack(">I", zlib.crc32(b"teXt"))
    with pytest.raises(StudyTooLarge, match="chunks"):
        study.read(png.tobytes()[:33] + empty * 4_000_000 + png.tobytes()[33:])
    assert time.monotonic() - start < 10


def test_lengths_that_reach_beyond_their_parent_or_the_file() -> None:
    beyond = b"\x09\x00\x10\x10SQ\0\0" + struct.pack("<I", 1 << 31)
    with pytest.raises(TruncatedStudy):
        study.read(image(beyond))
    # Inside a sequence of known length the damage is contained, and said.
    broken = element(0x09, 0x1010, "SQ", b"\xfe\xff\x00\xe0\xff\xff\xff\xff" + b"\x09\x00\x11\x10UN\0\0\xff\xff\xff\x7f")
    instance = study.read(image(broken))
    assert instance.pixels.shape == (4, 4)
    assert any("sequence was skipped" in note for note in instance.notes)
    item = element(0x09, 0x1010, "SQ", b"\xfe\xff\x00\xe0" + struct.pack("<I", 1 << 30) + bytes(8))
    assert study.read(image(item)).notes
    with pytest.raises((InvalidStudy, TruncatedStudy)):
        study.read(image(b"\x09\x00\x10\x10SQ\0\0\xff\xff\xff\xff" + bytes(40)))


def test_items_and_delimiters_where_none_belong() -> None:
    with pytest.raises(InvalidStudy, match="outside any sequence"):
        study.read(image(b"\xfe\xff\x00\xe0\x08\0\0\0" + bytes(8)))
    assert study.read(image(b"\xfe\xff\xdd\xe0\0\0\0\0")).notes == ("a delimiter outside any sequence",)


def test_pixel_data_nested_in_an_icon_is_not_the_image() -> None:
    icon = (
        image_head(2, 2)
        + struct.pack("<HH", 0x7FE0, 0x10)
        + b"OB\0\0\xff\xff\xff\xff"
        + b"\xfe\xff\x00\xe0\0\0\0\0\xfe\xff\xdd\xe0\0\0\0\0"
    )
    item = b"\xfe\xff\x00\xe0\xff\xff\xff\xff" + icon + b"\xfe\xff\x0d\xe0\0\0\0\0"
    sequence = b"\x09\x00\x10\x10SQ\0\0\xff\xff\xff\xff" + item + b"\xfe\xff\xdd\xe0\0\0\0\0"
    assert study.read(image(sequence)).pixels.shape == (4, 4)
    with pytest.raises(NoPixels):
        study.read(file_of(image_head(inside=sequence)))


def test_numbers_made_to_be_slow_or_strange() -> None:
    for slope in (b"9" * 900, b"1_0", b"0x10", b"\xd9\xa1", b"1e99999"):
        with pytest.raises(InvalidStudy):
            study.read(image().replace(short(0x28, 0x103, 0), short(0x28, 0x103, 0) + element(0x28, 0x1053, "DS", slope)))
    frames = element(0x28, 8, "IS", b"9" * 5000)
    with pytest.raises(InvalidStudy):
        study.read(image(frames))


# --- The codec process -------------------------------------------------------------------------------------------------------

COMPRESSED = (FILES / "MR_small_jpeg_ls_lossless.dcm").read_bytes()


@pytest.fixture
def fresh_pool(monkeypatch: pytest.MonkeyPatch) -> Iterator[_codec.Pool]:
    pool = _codec.Pool()
    monkeypatch.setattr(_codec, "_pool", pool)
    yield pool
    pool.stop()


def codec(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, body: str) -> None:
    """Put a script in the codec's place; it has a socket `s` and has said that it is ready."""
    script = tmp_path / "codec.py"
    script.write_text(
        "import os, socket, struct, sys, time\n"
        "s = socket.socket(fileno=os.dup(0))\n"
        "s.sendall(b'SBXR')\n"
        "RESPONSE = struct.Struct('<4sB1sBIIIQ')\n"
        "s.recv(100)\n" + body
    )
    monkeypatch.setattr(_codec._decode, "__file__", str(script))


def test_a_warm_process_is_used_again_and_is_fast(fresh_pool: _codec.Pool) -> None:
    study.read(COMPRESSED)
    first = fresh_pool.idle[0].process.pid
    times = []
    for _ in range(20):
        start = time.perf_counter()
        study.read(COMPRESSED)
        times.append(time.perf_counter() - start)
    assert fresh_pool.idle[0].process.pid == first
    assert sorted(times)[10] < 0.05


def test_a_file_that_fails_ends_its_process(fresh_pool: _codec.Pool) -> None:
    study.warm_up()
    first = fresh_pool.idle[0].process
    at = COMPRESSED.index(b"\xff\xd8\xff")
    with pytest.raises(UndecodablePixels):
        study.read(COMPRESSED[:at] + bytes(60) + COMPRESSED[at + 60 :])
    assert first.poll() is not None
    assert study.read(COMPRESSED).pixels.shape == (64, 64)


def test_an_idle_process_that_was_killed_is_replaced(fresh_pool: _codec.Pool) -> None:
    study.warm_up()
    process = fresh_pool.idle[0].process
    process.kill()
    process.wait()
    assert study.read(COMPRESSED).pixels.shape == (64, 64)


def test_a_process_that_stops_is_given_up(fresh_pool: _codec.Pool) -> None:
    study.warm_up()
    process = fresh_pool.idle[0].process
    os.kill(process.pid, signal.SIGSTOP)
    start = time.monotonic()
    with pytest.raises(UndecodablePixels) as caught:
        study.read(COMPRESSED, SHORT)
    assert caught.value.value == "0.5 s"
    assert time.monotonic() - start < 3
    assert process.poll() is not None
    assert study.read(COMPRESSED).pixels.shape == (64, 64)


@pytest.mark.parametrize(
    "body",
    [
        "os.abort()",
        "sys.exit(0)",
        "time.sleep(60)",
        "s.sendall(b'x' * 100); time.sleep(60)",
        "s.sendall(RESPONSE.pack(b'SBXD', 0, b'u', 2, 64, 64, 1, 1 << 60)); time.sleep(60)",
        "s.sendall(RESPONSE.pack(b'SBXD', 0, b'O', 8, 64, 64, 1, 32768) + bytes(32768)); time.sleep(60)",
        "s.sendall(RESPONSE.pack(b'SBXD', 0, b'u', 2, 64, 63, 1, 8192) + bytes(8192)); time.sleep(60)",
        "s.sendall(RESPONSE.pack(b'SBXD', 0, b'u', 2, 32, 128, 1, 8192) + bytes(8192)); time.sleep(60)",
        "s.sendall(RESPONSE.pack(b'SBXD', 0, b'u', 2, 0, 0, 1, 0)); time.sleep(60)",
        "s.sendall(RESPONSE.pack(b'SBXD', 1, b'u', 1, 0, 0, 0, 1 << 40)); time.sleep(60)",
        "s.sendall(RESPONSE.pack(b'SBXD', 1, b'u', 1, 0, 0, 0, 3) + b'\\xff\\xfe\\xfd'); time.sleep(60)",
        "s.sendall(RESPONSE.pack(b'SBXD', 2, b'u', 1, 0, 0, 0, 0)); time.sleep(60)",
    ],
)
def test_a_codec_that_dies_hangs_or_lies(fresh_pool: _codec.Pool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, body: str) -> None:
    with monkeypatch.context() as patch:
        codec(patch, tmp_path, body)
        with pytest.raises(UndecodablePixels):
            study.read(COMPRESSED, SHORT)
    fresh_pool.stop()
    assert study.read(COMPRESSED).pixels.shape == (64, 64)


def test_a_codec_that_cannot_start(fresh_pool: _codec.Pool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = tmp_path / "codec.py"
    script.write_text("raise SystemExit(1)")
    with monkeypatch.context() as patch:
        patch.setattr(_codec._decode, "__file__", str(script))
        with pytest.raises(BackendUnavailable):
            study.read(COMPRESSED)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", str(tmp_path / "none"))
        with pytest.raises(BackendUnavailable):
            study.read(COMPRESSED)
    assert study.read(COMPRESSED).pixels.shape == (64, 64)


def test_a_missing_codec_is_the_boxes_fault(fresh_pool: _codec.Pool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    codec(monkeypatch, tmp_path, "s.sendall(RESPONSE.pack(b'SBXD', 3, b'u', 1, 0, 0, 0, 4) + b'gdcm'); time.sleep(60)")
    with pytest.raises(BackendUnavailable) as caught:
        study.read(COMPRESSED)
    assert "gdcm" in caught.value.value


def test_many_threads_share_two_processes(fresh_pool: _codec.Pool) -> None:
    expected = study.read(COMPRESSED).pixels
    good, bad = [], []

    def work(number: int) -> None:
        for _ in range(10):
            try:
                if number % 4 == 0:
                    study.read(COMPRESSED[:3000] + bytes(len(COMPRESSED) - 3000))
                else:
                    good.append(bool(np.array_equal(study.read(COMPRESSED).pixels, expected)))
            except SpineboxError:
                bad.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(good) == 60
    assert all(good)
    assert set(bad) <= {0, 4}
    assert len(fresh_pool.idle) <= 2


def test_when_every_process_is_busy_the_answer_is_to_wait(fresh_pool: _codec.Pool) -> None:
    with fresh_pool.slots, fresh_pool.slots, pytest.raises(OutOfTime):
        study.read(COMPRESSED, study.Limits(decode_timeout_s=0.1))


def test_a_forked_child_has_its_own_processes(fresh_pool: _codec.Pool) -> None:
    study.warm_up()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            empty = not _codec._pool.idle
            code = 0 if empty and study.read(COMPRESSED).pixels.shape == (64, 64) else 2
            _codec._pool.stop()
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    assert study.read(COMPRESSED).pixels.shape == (64, 64)


def test_the_process_ends_with_its_parent() -> None:
    script = (
        "import os\nfrom appliance import _codec, study\nstudy.warm_up()\nprint(_codec._pool.idle[0].process.pid, flush=True)\nos._exit(0)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    process = Path(f"/proc/{int(done.stdout)}")
    for _ in range(100):
        if not process.exists() or ") Z " in (process / "stat").read_text():
            return
        time.sleep(0.05)
    pytest.fail("the codec process outlives its parent")


def test_limits_of_the_process_are_set(fresh_pool: _codec.Pool) -> None:
    study.read(COMPRESSED)
    text = Path(f"/proc/{fresh_pool.idle[0].process.pid}/limits").read_text()
    soft = {line[:26].strip(): line[26:].split()[0] for line in text.splitlines()}
    assert int(soft["Max address space"]) < 4 << 30
    assert int(soft["Max cpu time"]) < 60
    assert soft["Max core file size"] == "0"
    assert soft["Max file size"] == "0"


def test_a_named_pipe_that_nobody_fills(tmp_path: Path) -> None:
    pipe = tmp_path / "p"
    os.mkfifo(pipe)
    with pytest.raises(NotAnImage):
        study.read_path(pipe)
    with pytest.raises(NotAnImage):
        study.read_path(Path("/dev/zero"))
