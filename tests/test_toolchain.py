"""Environments of converters, and what a converter can do to whoever calls it: real scripts, run by this interpreter."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

from appliance.compiler import toolchain
from appliance.compiler.toolchain import TOOLCHAINS, Answer, Toolchain, ask, find_python, make, state
from appliance.errors import ConverterFailed, GraphUnsupported

PYTHON = Path(sys.executable)


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where converters get their folders, so that a test can see what is left."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def run(tmp_path: Path, source: str, **options: Any) -> Answer:
    script = tmp_path / "converter.py"
    script.write_text("import json, os, sys, time\nfrom pathlib import Path\n" + source)
    return ask(PYTHON, script, options.pop("request", {}), **{"timeout_s": 20.0, **options})


ANSWER = "Path('out/answer.json').write_text(json.dumps({}))\n"


def test_a_question_and_its_answer(tmp_path: Path, scratch: Path) -> None:
    source = """
request = json.loads(Path('request.json').read_text())
Path('out/twice.bin').write_bytes(Path('in/data.bin').read_bytes() * request['times'])
Path('out/answer.json').write_text(json.dumps({'asked': request, 'inputs': sorted(os.listdir('in'))}))
"""
    answer = run(tmp_path, source, request={"times": 2}, files={"data.bin": b"ab\0"})
    assert answer.values == {"asked": {"times": 2}, "inputs": ["data.bin"]}
    assert answer.files == {"twice.bin": b"ab\0ab\0"}
    assert list(scratch.iterdir()) == []


BAD = {
    "crash": ("print('first', file=sys.stderr); raise ValueError('the node Foo_7 is bad')", "ended with 1.*Foo_7"),
    "exit status": ("print('why not', file=sys.stderr); sys.exit(3)", "ended with 3.*why not"),
    "signal": ("os.kill(os.getpid(), 11)", "signal 11.*said nothing"),
    "answers and crashes": (ANSWER + "sys.exit(4)", "ended with 4"),
    "no answer": ("print('done', file=sys.stderr)", "without an answer.*done"),
    "not JSON": ("Path('out/answer.json').write_text('{')", "not JSON"),
    "bytes": ("Path('out/answer.json').write_bytes(bytes(range(256)))", "not JSON"),
    "nested": ("Path('out/answer.json').write_text('[' * 100_000)", "not JSON"),
    "a list": ("Path('out/answer.json').write_text('[1]')", "not an object"),
    "a large answer": ("Path('out/answer.json').write_text(json.dumps({'a': 'x' * 2_000_000}))", "answered too much"),
    "many files": (ANSWER + "[Path(f'out/{i}').write_text('') for i in range(40)]", "left too much"),
    "a link": (ANSWER + "os.symlink('/etc/passwd', 'out/model.tflite')", "not a plain file"),
    "the answer is a link": ("os.symlink('/etc/hostname', 'out/answer.json')", "not a plain file"),
    "a folder": (ANSWER + "os.mkdir('out/folder')", "not a plain file"),
    "an odd name": (ANSWER + "Path('out/..a b').write_text('')", "not a plain file"),
    "memory": ("x = bytearray(3 << 30)\n" + ANSWER, "ended with 1.*MemoryError"),
}


@pytest.mark.parametrize(("source", "complaint"), BAD.values(), ids=BAD.keys())
def test_a_bad_converter_is_a_failure_that_leaves_nothing(tmp_path: Path, scratch: Path, source: str, complaint: str) -> None:
    with pytest.raises(ConverterFailed) as caught:
        run(tmp_path, source, memory_bytes=1 << 30)
    assert re.search(complaint, caught.value.what, re.DOTALL), caught.value.what
    assert "converter.py" in caught.value.what
    assert list(scratch.iterdir()) == []


def _alive(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


def test_a_hanging_converter_is_ended_with_what_it_started(tmp_path: Path, scratch: Path) -> None:
    pids = tmp_path / "pids"
    source = f"""
import signal, subprocess
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])
Path({str(pids)!r}).write_text(f'{{os.getpid()}} {{child.pid}}')
print('half way', file=sys.stderr, flush=True)
time.sleep(60)
"""
    began = time.monotonic()
    with pytest.raises(ConverterFailed, match=r"within 1\.5 s.*half way"):
        run(tmp_path, source, timeout_s=1.5)
    assert time.monotonic() - began < 10
    found = [int(p) for p in pids.read_text().split()]
    deadline = time.monotonic() + 5
    while any(map(_alive, found)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(_alive, found))
    assert list(scratch.iterdir()) == []


def test_what_outlives_a_converter_is_ended_too(tmp_path: Path, scratch: Path) -> None:
    source = """
import subprocess
child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])
Path('out/answer.json').write_text(json.dumps({'pid': child.pid}))
"""
    began = time.monotonic()
    pid = run(tmp_path, source).values["pid"]
    assert time.monotonic() - began < 10  # it holds standard error open
    deadline = time.monotonic() + 5
    while _alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _alive(pid)


FLOODS = {
    "one file": "f = open('out/big', 'wb')\nwhile True: f.write(bytes(1 << 20))",
    "many files": "for i in range(100_000): Path(f'tmp/{i}').write_bytes(bytes(1 << 16))",
}


@pytest.mark.parametrize("source", FLOODS.values(), ids=FLOODS.keys())
def test_a_flood_is_stopped(tmp_path: Path, scratch: Path, source: str) -> None:
    with pytest.raises(ConverterFailed):
        run(tmp_path, source, max_out_bytes=8 << 20)
    assert list(scratch.iterdir()) == []


def test_chatter_is_drained_and_its_end_is_kept(tmp_path: Path, scratch: Path) -> None:
    source = "sys.stderr.write('x' * 5_000_000 + '\\nthe end\\n'); print('y' * 5_000_000); sys.exit(1)"
    with pytest.raises(ConverterFailed, match="the end") as caught:
        run(tmp_path, source)
    assert len(caught.value.what) < 5000


def test_a_converter_sees_nothing_of_ours(tmp_path: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPINEBOX_SECRET", "hidden")
    monkeypatch.setenv("PYTHONPATH", "/nowhere")
    source = "Path('out/answer.json').write_text(json.dumps({'env': dict(os.environ), 'in': sys.stdin.read(), 'hash': hash('a')}))"
    first, second = run(tmp_path, source).values, run(tmp_path, source).values
    assert "SPINEBOX_SECRET" not in first["env"]
    assert "PYTHONPATH" not in first["env"]
    assert first["env"]["HOME"].startswith(str(scratch))
    assert first["in"] == ""
    assert first["hash"] == second["hash"]  # sets iterate alike in every call


def test_a_refusal_names_the_node(tmp_path: Path, scratch: Path) -> None:
    with pytest.raises(GraphUnsupported, match="no such operator") as caught:
        run(tmp_path, "Path('out/answer.json').write_text(json.dumps({'refused': {'what': 'no such operator', 'node': 'Foo_7'}}))")
    assert caught.value.value == "Foo_7"


@pytest.mark.parametrize("name", ["../escape", "a/b", "", ".hidden", "x" * 65])
def test_inputs_have_plain_names(tmp_path: Path, scratch: Path, name: str) -> None:
    with pytest.raises(ConverterFailed, match="plain file name"):
        run(tmp_path, ANSWER, files={name: b""})


# -- environments ---------------------------------------------------------------------------------------------------


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Toolchain:
    """A toolchain without requirements, in a cache folder of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(toolchain, "CONVERTERS", tmp_path)
    made = Toolchain("tiny", (f"{sys.version_info[0]}.{sys.version_info[1]}",), "a test")
    (tmp_path / "tiny.txt").write_text("")
    monkeypatch.setattr(toolchain, "TOOLCHAINS", {"tiny": made, "never": Toolchain("never", ("2.3",), "no such Python")})
    (tmp_path / "never.txt").write_text("")
    return made


@pytest.fixture
def quick_venv(monkeypatch: pytest.MonkeyPatch) -> None:
    """A real environment, but without pip, which takes longer to unpack than everything else: there is nothing to install."""

    def without_pip(name: str, command: list[str]) -> None:
        if "pip" not in command:
            subprocess.run([*command, "--without-pip"], check=True)

    monkeypatch.setattr(toolchain, "_pip", without_pip)


@pytest.mark.usefixtures("quick_venv")
def test_an_environment_is_made_once_and_again_when_its_requirements_change(own: Toolchain, tmp_path: Path) -> None:
    assert not state("tiny").ready
    assert "make toolchains" in state("tiny").reason
    (tmp_path / "hello.py").write_text(
        "from pathlib import Path\nimport sys\nPath('out/answer.json').write_text('{\"p\": \"%s\"}' % sys.prefix)"
    )
    with pytest.raises(ConverterFailed, match="not made"):
        toolchain.call("tiny", "hello.py", {})
    made = make("tiny")
    assert made.ready
    assert toolchain.call("tiny", "hello.py", {}).values["p"] == str(made.path)
    marker = made.path / "marker"
    marker.touch()
    assert make("tiny").ready
    assert marker.exists()  # not made again
    (tmp_path / "tiny.txt").write_text("# another\n")
    assert "other requirements" in state("tiny").reason
    assert make("tiny").ready
    assert not marker.exists()
    assert [p.name for p in made.path.parent.iterdir()] == ["tiny"]  # no scratch left


def test_a_missing_interpreter_is_named_and_the_others_go_on(
    own: Toolchain, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(toolchain, "make", lambda name: state(name) if name == "tiny" else make(name))
    assert toolchain.main(["never", "tiny", "unknown"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "Python 2.3" in lines[0]
    assert lines[1].startswith("tiny")
    assert "no such toolchain" in lines[2]
    assert toolchain.main(["tiny"]) == 0


def test_requirements_that_cannot_be_had_leave_nothing(own: Toolchain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_pip(name: str, command: list[str]) -> None:
        if "pip" in command:
            raise ConverterFailed("toolchain cannot be made")
        subprocess.run([*command, "--without-pip"], check=True)

    monkeypatch.setattr(toolchain, "_pip", no_pip)
    with pytest.raises(ConverterFailed):
        make("tiny")
    assert list((tmp_path / "cache/spinebox/toolchains").iterdir()) == []
    assert not state("tiny").ready


def test_a_name_on_the_path_is_asked_what_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shims of version managers stand on the path and fail."""
    shim = tmp_path / "python3.77"
    shim.write_text("#!/bin/sh\necho 'command not found' >&2\nexit 127\n")
    shim.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path))
    assert find_python(["3.77"]) is None
    ours = f"{sys.version_info[0]}.{sys.version_info[1]}"
    found = find_python(["3.77", ours])
    assert found is not None
    told = subprocess.run([found, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == ours


@pytest.mark.parametrize("name", TOOLCHAINS)
def test_every_requirement_is_pinned(name: str) -> None:
    lines = TOOLCHAINS[name].requirements.read_text().splitlines()
    assert lines
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.+!-]+", line) for line in lines), lines


def test_converters_import_nothing_of_ours() -> None:
    for path in toolchain.CONVERTERS.glob("*.py"):
        assert not re.search(r"^\s*(?:from|import) (?:appliance|kernels|models|calibration|benchmarks)\b", path.read_text(), re.MULTILINE)
