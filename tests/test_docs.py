"""What is written must be true of the code: error codes, backends, decisions, links; and nothing of a machine leaks."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from appliance import backends
from appliance.errors import SpineboxError, all_errors

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md")])
LINK = re.compile(r"!?\[[^\]]*\]\(([^()\s]+)\)")


def error_row(error: type[SpineboxError]) -> str:
    return f"| `{error.code}` | {error.__name__} | {error.http_status} | {error.exit_code} | {error.default_remedy} |"


def test_every_error_code_is_documented_as_it_is() -> None:
    """Tests of other rooms may add classes of their own to the tree; only those of the package count."""
    own = [e for e in all_errors() if e.__module__.startswith("appliance.")]
    written = [line for line in (DOCS / "errors.md").read_text().splitlines() if line.startswith("| `")]
    assert written == [error_row(e) for e in own]


def test_every_backend_file_is_documented() -> None:
    text = (DOCS / "backends.md").read_text()
    written = re.findall(r"^\| `(\w+)\.py` \|", text, flags=re.MULTILINE)
    assert sorted(written) == sorted(backends.names())
    for name in backends.names():
        module = backends.load(name)
        if module.REQUIRES:
            line = next(row for row in text.splitlines() if row.startswith(f"| `{name}.py`"))
            assert f"spinebox[{name}]" in line


def test_decisions_are_numbered_uniquely_and_say_why() -> None:
    files = sorted((DOCS / "decisions").iterdir())
    names = [f.name for f in files]
    assert all(re.fullmatch(r"\d{4}-[a-z0-9-]+\.md", n) for n in names), names
    numbers = [int(n[:4]) for n in names]
    assert numbers == list(range(1, len(numbers) + 1))
    for file, number in zip(files, numbers, strict=True):
        lines = file.read_text().splitlines()
        assert lines[0].startswith(f"# {number}. "), file.name
        sections = [x for x in lines if x.startswith("## ")]
        assert sections[:3] == ["## Context", "## Decision", "## Consequence"], file.name
        assert sections[3:] in ([], ["## What would change our mind"]), file.name


def broken_links(text: str, folder: Path) -> list[str]:
    """Targets of Markdown links in `text` that are neither addresses, anchors, nor files below `folder`."""
    bare = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    out = []
    for target in LINK.findall(bare):
        if re.match(r"[a-z][a-z0-9+.-]*:", target) or target.startswith("#"):
            continue
        path = folder / target.partition("#")[0]
        if target.startswith("/") or not path.resolve().is_relative_to(ROOT) or not path.exists():
            out.append(target)
    return out


@pytest.mark.parametrize("page", PAGES, ids=[str(p.relative_to(ROOT)) for p in PAGES])
def test_links_point_to_files(page: Path) -> None:
    assert broken_links(page.read_text(), page.parent) == []


def test_a_broken_link_is_seen(tmp_path: Path) -> None:
    fenced = "\n```\n[h](no)\n```"
    text = "[a](LICENSE) ![b](docs/no.png) [c](https://example.org/x) [d](#part) [e](/etc/passwd) [f](../x) [g](docs/errors.md#top)"
    assert broken_links(text + fenced, ROOT) == ["docs/no.png", "/etc/passwd", "../x"]


MENTION = re.compile(r"`((?:appliance|kernels|models|calibration|benchmarks|tests|docs|systemd)/[A-Za-z0-9_./-]+)`")


@pytest.mark.parametrize("page", PAGES, ids=[str(p.relative_to(ROOT)) for p in PAGES])
def test_files_that_a_page_mentions_exist(page: Path) -> None:
    """A path in backticks is a promise; one with a word in capitals is a pattern."""
    mentioned = [m for m in MENTION.findall(page.read_text()) if not re.search(r"[A-Z]{3}", m)]
    assert [m for m in mentioned if not (ROOT / m).exists()] == []


def test_nothing_tracked_names_a_folder_of_the_makers_machine() -> None:
    needle = "/{}/".format("work").encode()  # put together here, so that this file does not hold it
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout.split(b"\0")
    files = [ROOT / name.decode() for name in tracked if name]
    assert len(files) > 50
    found = [str(f.relative_to(ROOT)) for f in files if f.is_file() and needle in f.read_bytes()]
    assert found == []
