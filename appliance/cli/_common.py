"""What every command shares: errors as one line with an exit code, progress with the time left, the usual options."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from appliance.errors import BackendUnavailable, SpineboxError
from appliance.report import DISCLAIMER

F = TypeVar("F", bound=Callable[..., Any])
say = Console(stderr=True)
# Piped into a file, a table keeps its columns.
out = Console(width=None if sys.stdout.isatty() else 150)


def explained(command: F) -> F:
    """Turn an error of the tree into one line on stderr (or JSON on stdout) and its exit code."""

    @wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            try:
                return command(*args, **kwargs)
            except ModuleNotFoundError as error:
                # A device has what it runs on, not what compiles.
                package = (error.name or "").partition(".")[0]
                raise BackendUnavailable(
                    f"this command needs the package {package}, which is not installed",
                    value=package,
                    remedy="Install what compiling needs: pip install 'spinebox[compile]'.",
                ) from error
        except SpineboxError as error:
            if kwargs.get("as_json"):
                click.echo(json.dumps({"error": error.to_json(), "disclaimer": DISCLAIMER}))
            click.echo(f"spinebox: {error}", err=True)
            raise SystemExit(error.exit_code) from error

    return wrapped  # type: ignore[return-value]


def progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(), console=say
    )


bundle_option = click.option(
    "--bundle",
    "bundle_path",
    type=click.Path(path_type=Path),
    default=None,
    help="Bundle folder or .spinebox file. [default: the one that ships]",
)
backend_option = click.option(
    "--backend", default="auto", show_default=True, help="Runtime to use for every model; `spinebox doctor` lists them."
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON for machines.")
