"""The environments of the peers: made on demand, one each, because together they back-solve to broken versions.

Hides venv and pip. An environment is a folder with a stamp that says from which requirements it was made; it is made anew when they
change. Spinebox itself is installed beside the peer, editable, so that both run the code of this tree.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

from rich.console import Console

from appliance.errors import UsageError

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
REQUIREMENTS = HERE / "requirements"
STAMP = "spinebox-peer.stamp"
EXTRAS = ("onnxruntime", "openvino")
INSTALL_S = 1800


def names() -> tuple[str, ...]:
    """Every environment that can be made."""
    return tuple(sorted(p.stem for p in REQUIREMENTS.glob("*.txt")))


def wanted(name: str) -> str:
    """What the environment is made from, as a digest: the peer's pins and spinebox's own. Raises UsageError for an unknown name."""
    path = REQUIREMENTS / f"{name}.txt"
    if not path.exists():
        raise UsageError("no such peer's environment", value=name, remedy=f"Choose one of: {', '.join(names())}.")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    own = [str(ROOT), project["dependencies"], [project["optional-dependencies"][e] for e in EXTRAS], sys.version]
    return hashlib.sha256(path.read_bytes() + json.dumps(own).encode()).hexdigest()


def python_of(name: str, folder: Path) -> Path:
    return folder / name / "bin" / "python"


def ready(name: str, folder: Path) -> bool:
    """Whether the environment is there and made from today's requirements."""
    stamp = folder / name / STAMP
    return stamp.exists() and stamp.read_text() == wanted(name) and python_of(name, folder).exists()


def ensure(name: str, folder: Path, console: Console | None = None) -> Path:
    """The Python of the environment `name` under `folder`, made where it is not ready (a minute or two, some 500 MB).

    Raises UsageError with pip's last lines where it cannot be made; what was half made is removed.
    """
    if ready(name, folder):
        return python_of(name, folder)
    console = console or Console(stderr=True)
    place = folder / name
    python = python_of(name, folder)
    steps = (
        ("a fresh environment", [sys.executable, "-m", "venv", "--clear", str(place)]),
        (
            "spinebox and the peer, pinned",
            [
                str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check",
                "-r", str(REQUIREMENTS / f"{name}.txt"), "-e", f"{ROOT}[{','.join(EXTRAS)}]",
            ],
        ),
        ("what does not fit together", [str(python), "-m", "pip", "--disable-pip-version-check", "check"]),
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    for number, (what, command) in enumerate(steps, 1):
        with console.status(f"{name}: {what} ({number} of {len(steps)})"):
            done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_S, check=False)
        if done.returncode:
            shutil.rmtree(place, ignore_errors=True)
            last = " / ".join((done.stderr or done.stdout).strip().splitlines()[-3:])
            raise UsageError(f"the environment of {name} cannot be made: {last}", value=str(place), remedy="Look at pip's message.")
    (place / STAMP).write_text(wanted(name))
    console.print(f"{name}: environment ready in {place}", highlight=False)
    return python
