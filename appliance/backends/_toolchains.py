"""Where the environments of other interpreters lie: old runtimes and converters that cannot live beside this one."""

from __future__ import annotations

import os
from pathlib import Path


def folder() -> Path:
    """$XDG_CACHE_HOME/spinebox/toolchains, or the same below ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "spinebox" / "toolchains"


def interpreter(name: str) -> Path:
    """The Python of environment `name`; it need not exist."""
    return folder() / name / "bin" / "python"
