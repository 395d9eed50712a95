"""Converters that cannot live in this environment, each in one of its own, asked through files and held to limits.

Hides three things: where the environments are and whether they are what the pinned requirements say; how one is made; and how
a script in one is called. A call is a typed question (JSON and files) in a scratch folder and a typed answer of the same kind.
A converter may crash, hang, flood the disk or answer nonsense: each is ConverterFailed with its last lines, and nothing of it
stays behind, neither files nor processes.

`python -m appliance.compiler.toolchain [NAME ...]` makes them (`make toolchains` calls it); exit code 1 where one is missing.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from appliance.backends import _toolchains
from appliance.errors import ConverterFailed, GraphUnsupported

CONVERTERS = Path(__file__).with_name("converters")
MAX_ANSWER_BYTES = 1 << 20
MAX_OUT_BYTES = 2 << 30
MAX_OUT_FILES = 16
MEMORY_BYTES = 16 << 30  # of address space: TensorRT reserves much more than it touches
_TAIL_BYTES = 4096
_POLL_S = 0.05
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True)
class Toolchain:
    """An environment: the Python versions that can hold it, best first, and what it is for. Its requirements, every one
    pinned, stand in converters/NAME.txt."""

    name: str
    pythons: tuple[str, ...]
    purpose: str
    # Distributions that name a newer Python than the first one found may still run on it.
    ignore_requires_python: bool = False

    @property
    def requirements(self) -> Path:
        return CONVERTERS / f"{self.name}.txt"


TOOLCHAINS = {
    t.name: t
    for t in (
        Toolchain("onnx2tf", ("3.12", "3.11"), "ONNX to FP32 TFLite; its pins of numpy and onnx are not ours", True),
        Toolchain("tensorrt-rtx", ("3.11", "3.12", "3.13", "3.10"), "parser and builder of the TensorRT graph, without a GPU"),
        Toolchain("myriad", ("3.9",), "OpenVINO 2021.4, the last generation with a Movidius plugin that this wheel holds"),
    )
}


@dataclass(frozen=True)
class State:
    """One environment on this machine, for `spinebox doctor`. `python` is what it would be made with, where it is not ready."""

    name: str
    ready: bool
    reason: str
    path: Path


@dataclass(frozen=True)
class Answer:
    values: dict[str, Any]
    files: dict[str, bytes] = field(default_factory=dict)


# -- making ---------------------------------------------------------------------------------------------------------


def _stamp(toolchain: Toolchain) -> str:
    return hashlib.sha256(toolchain.requirements.read_bytes()).hexdigest()


def state(name: str) -> State:
    """Whether environment `name` is there, and made from today's requirements."""
    toolchain, path = TOOLCHAINS[name], _toolchains.folder() / name
    stamp = path / ".stamp"
    if not _toolchains.interpreter(name).exists():
        return State(name, False, "not made; run `make toolchains`", path)
    if not stamp.is_file() or stamp.read_text().strip() != _stamp(toolchain):
        return State(name, False, "made from other requirements; run `make toolchains`", path)
    return State(name, True, toolchain.purpose, path)


def find_python(versions: Sequence[str]) -> Path | None:
    """An interpreter of one of `versions` ("3.12"), best first; a name on the path may be a shim that does not work, so each is
    asked."""
    for version in versions:
        candidates = [shutil.which(f"python{version}"), *sorted(map(str, Path("/usr").glob(f"*/bin/python{version}")))]
        roots = [Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv") / "versions", Path.home() / ".local/share/uv/python"]
        candidates += [str(p) for root in roots for p in sorted(root.glob(f"*{version}.*/bin/python{version}"), reverse=True)]
        for candidate in candidates:
            if candidate is None:
                continue
            command = [candidate, "-c", "import sys, venv, ensurepip; print('%d.%d' % sys.version_info[:2])"]
            with contextlib.suppress(OSError, subprocess.SubprocessError):
                told = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False).stdout.strip()
                if told == version:
                    return Path(candidate)
    return None


def make(name: str) -> State:
    """Make environment `name` where it is not ready. Raises ConverterFailed where no interpreter fits or pip fails."""
    found = state(name)
    if found.ready:
        return found
    toolchain = TOOLCHAINS[name]
    python = find_python(toolchain.pythons)
    if python is None:
        wanted = " or ".join(toolchain.pythons)
        raise ConverterFailed(f"toolchain {name} needs Python {wanted}, and none was found", remedy=f"Install Python {wanted}.")
    root = _toolchains.folder()
    root.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".part-{name}-", dir=root))
    try:
        _pip(name, [str(python), "-m", "venv", str(scratch / "env")])
        options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--no-cache-dir"]
        options += ["--ignore-requires-python"] * toolchain.ignore_requires_python
        inner = str(scratch / "env/bin/python")
        _pip(name, [inner, "-m", "pip", "install", *options, "-r", str(toolchain.requirements)])
        (scratch / "env/.stamp").write_text(_stamp(toolchain) + "\n")
        old = root / name
        if old.exists():
            old.rename(scratch / "old")
        # An environment is found through its own path, so only the scripts in bin/ mind the move; none of them is called.
        with contextlib.suppress(OSError):  # somebody else made it meanwhile: theirs stays
            (scratch / "env").rename(old)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return state(name)


def _pip(name: str, command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=3600)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if not line.startswith("WARNING")]
        raise ConverterFailed(f"toolchain {name} cannot be made: {' / '.join(lines[-3:])}", value=" ".join(command[:4]))


# -- calling --------------------------------------------------------------------------------------------------------


def call(
    name: str, script: str, request: Mapping[str, Any], *, files: Mapping[str, bytes] | None = None, timeout_s: float = 300.0
) -> Answer:
    """Ask converters/`script` in environment `name`. Raises ConverterFailed, GraphUnsupported (the converter named a node)."""
    found = state(name)
    if not found.ready:
        raise ConverterFailed(f"toolchain {name}: {found.reason}", value=found.path, remedy="Run `make toolchains`.")
    return ask(_toolchains.interpreter(name), CONVERTERS / script, request, files=files, timeout_s=timeout_s)


def ask(
    python: Path,
    script: Path,
    request: Mapping[str, Any],
    *,
    files: Mapping[str, bytes] | None = None,
    timeout_s: float = 300.0,
    memory_bytes: int = MEMORY_BYTES,
    max_out_bytes: int = MAX_OUT_BYTES,
) -> Answer:
    """Run `script` with `python` in a scratch folder and read its answer.

    The script finds `request.json` and the `files` under `in/` in its working folder; it leaves `out/answer.json`, an object,
    and whatever files it likes beside it. {"refused": {"what": ..., "node": ...}} is GraphUnsupported. It sees no environment
    variable of ours, gets `timeout_s`, `memory_bytes` of address space and `max_out_bytes` on disk, and is killed with
    everything it started. Raises ConverterFailed with its last lines for everything else than a good answer.
    """
    with tempfile.TemporaryDirectory(prefix="spinebox-converter-", ignore_cleanup_errors=True) as folder:
        root = Path(folder)
        for part in ("in", "out", "tmp"):
            (root / part).mkdir()
        for name, data in (files or {}).items():
            if not _NAME.fullmatch(name):
                raise ConverterFailed("a converter's input has no plain file name", value=name)
            (root / "in" / name).write_bytes(data)
        (root / "request.json").write_text(json.dumps(dict(request), allow_nan=False))
        tail = _run([str(python), "-s", str(script)], root, script.name, timeout_s, memory_bytes, max_out_bytes)
        return _answer(root / "out", script.name, tail, max_out_bytes)


def _run(command: list[str], root: Path, label: str, timeout_s: float, memory_bytes: int, max_out_bytes: int) -> str:
    """Run to the end, within the limits; the last lines of standard error."""
    environment = {
        "PATH": f"{Path(command[0]).parent}:/usr/bin:/bin",
        "HOME": str(root / "tmp"),
        "TMPDIR": str(root / "tmp"),
        "LANG": "C.UTF-8",
        # Sets iterate in the same order every time, so that the same question has the same answer, byte for byte.
        "PYTHONHASHSEED": "0",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    end_of_errors = bytearray()
    process = subprocess.Popen(
        command,
        cwd=root,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    # From outside: code between fork and exec may deadlock in a process that has threads.
    for limit, value in ((resource.RLIMIT_AS, memory_bytes), (resource.RLIMIT_FSIZE, max_out_bytes), (resource.RLIMIT_CORE, 0)):
        with contextlib.suppress(ProcessLookupError):
            resource.prlimit(process.pid, limit, (value, value))
    reader = threading.Thread(target=_drain, args=(process, end_of_errors), daemon=True)
    reader.start()
    why = ""
    end = time.monotonic() + timeout_s
    try:
        while process.poll() is None and not why:
            if time.monotonic() > end:
                why = f"did not answer within {timeout_s:g} s"
            elif _used(root) > max_out_bytes:
                why = f"wrote more than {max_out_bytes} bytes"
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_POLL_S)
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        reader.join(1.0)
    tail = bytes(end_of_errors).decode(errors="replace").strip()
    if not why and process.returncode:
        why = f"ended with {process.returncode}" if process.returncode > 0 else f"was ended by signal {-process.returncode}"
    if why:
        raise ConverterFailed(f"converter {label} {why}: {_last(tail)}")
    return tail


def _drain(process: subprocess.Popen[bytes], kept: bytearray) -> None:
    """Keep the end of standard error, however much there is."""
    assert process.stderr is not None  # noqa: S101 - opened as a pipe; for the type checker
    with process.stderr:
        while chunk := os.read(process.stderr.fileno(), 65536):
            kept += chunk
            del kept[:-_TAIL_BYTES]


def _used(root: Path) -> int:
    total = 0
    for folder, _, names in os.walk(root):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(folder, name)).st_blocks * 512  # noqa: PTH118 - thousands of them, ten times a second
    return total


def _last(tail: str) -> str:
    return " / ".join(line.strip() for line in tail.splitlines()[-3:]) or "it said nothing"


def _answer(out: Path, label: str, tail: str, max_out_bytes: int) -> Answer:
    entries = sorted(out.iterdir())
    sizes = [e.lstat().st_size for e in entries]
    if any(e.is_symlink() or not e.is_file() or not _NAME.fullmatch(e.name) for e in entries):
        raise ConverterFailed(f"converter {label} left something that is not a plain file", value=[e.name[:64] for e in entries][:8])
    if len(entries) > MAX_OUT_FILES or sum(sizes) > max_out_bytes:
        raise ConverterFailed(f"converter {label} left too much", value=f"{len(entries)} files, {sum(sizes)} bytes")
    path = out / "answer.json"
    if not path.exists():
        raise ConverterFailed(f"converter {label} ended without an answer: {_last(tail)}")
    if path.stat().st_size > MAX_ANSWER_BYTES:
        raise ConverterFailed(f"converter {label} answered too much", value=f"{path.stat().st_size} bytes")
    try:
        values = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ConverterFailed(f"converter {label} answered something that is not JSON") from error
    if not isinstance(values, dict):
        raise ConverterFailed(f"converter {label} answered something that is not an object", value=type(values).__name__)
    refused = values.get("refused")
    if isinstance(refused, dict):
        raise GraphUnsupported(f"converter {label}: {str(refused.get('what'))[:500]}", value=str(refused.get("node"))[:200])
    return Answer(values, {e.name: e.read_bytes() for e in entries if e.name != "answer.json"})


def main(argv: Sequence[str] | None = None) -> int:
    """Make the named environments, or all; one line each. 0 where all are ready."""
    names = list(sys.argv[1:] if argv is None else argv) or list(TOOLCHAINS)
    missing = 0
    for name in names:
        if name not in TOOLCHAINS:
            print(f"{name:14} no such toolchain; there are {', '.join(TOOLCHAINS)}")
            missing += 1
            continue
        try:
            found = make(name)
        except ConverterFailed as error:
            print(f"{name:14} missing: {error.what}")
            missing += 1
        else:
            print(f"{name:14} ready: {found.path}")
    return 1 if missing else 0


if __name__ == "__main__":
    raise SystemExit(main())
