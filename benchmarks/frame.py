"""What the command lines of the serving benchmarks have in common: their help, where results go, and how sums are told."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from appliance.errors import SpineboxError

Found = dict[str, Any]


def parser(module: str, described: str | None, quick: str) -> argparse.ArgumentParser:
    """With --out, --quick and --json; `quick` says what is less then."""
    shape = argparse.RawDescriptionHelpFormatter
    made = argparse.ArgumentParser(prog=f"python -m {module}", description=described, formatter_class=shape)
    made.add_argument("--out", type=Path, default=Path("out"), help="folder of the results (default: %(default)s)")
    made.add_argument("--quick", action="store_true", help=quick)
    made.add_argument("--json", action="store_true", help="print JSON for machines")
    return made


def carry_out(
    args: argparse.Namespace,
    run: Callable[[argparse.Namespace, Console], Found],
    show: Callable[[Found, Console], None],
    draw: Callable[[], None] = lambda: None,
) -> tuple[int, Found]:
    """Run, draw, and tell: a table, or JSON where that was asked for. The exit code, and the sums ({} where it failed)."""
    console = Console(stderr=args.json)
    try:
        found = run(args, console)
    except SpineboxError as error:
        Console(stderr=True).print(str(error), style="red", markup=False, highlight=False)
        return error.exit_code, {}
    draw()
    if args.json:
        print(json.dumps(found))
    else:
        show(found, console)
        console.print(f"written to {args.out}", highlight=False)
    return 0, found
