"""`spinebox card`: the card of a foreign model, drafted from its graph."""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import asdict
from pathlib import Path

import click

from appliance.cli._common import explained, json_option, say
from appliance.errors import CompileDiskFull, UsageError


@click.command()
@click.argument("model", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option(
    "--out", "target", type=click.Path(path_type=Path, dir_okay=False), default=None, help="Write the card there. [default: stdout]"
)
@click.option("--name", default=None, help="Name of the model in bundles. [default: the file's]")
@click.option("--force", is_flag=True, help="Overwrite --out where it is there already.")
@json_option
@explained
def card(model: Path, target: Path | None, name: str | None, force: bool, as_json: bool) -> None:
    """Draft the card of MODEL, an ONNX file, by looking at its graph; each field says how it was guessed and how sure that is.

    Read what is marked "low" before `spinebox compile MODEL --card CARD`: the file does not say it.
    """
    from appliance.compiler.card import to_toml
    from appliance.compiler.drafting import draft
    from appliance.compiler.graph import load_model

    if target is not None and target.exists() and not force:
        raise UsageError("the card is there already", value=target, remedy="Name another file, or give --force.")
    made, notes = draft(load_model(model), name or model.stem)
    text = to_toml(made, notes)
    if target is not None:
        _write(target, text)
    if as_json:
        click.echo(json.dumps({"card": made.to_json(), "notes": {k: asdict(n) for k, n in notes.items()}, "toml": text}))
    elif target is None:
        click.echo(text, nl=False)
    unsure = sorted(k for k, n in notes.items() if n.sure == "low")
    say.print(f"{target or 'card'}: {made.task}, {made.decoder}, input {list(made.shape)}", highlight=False, markup=False)
    if unsure:
        say.print(f"Guessed without evidence, so look at: {', '.join(unsure)}", style="yellow", highlight=False, markup=False)


def _write(path: Path, text: str) -> None:
    """Whole or not at all. Raises CompileDiskFull."""
    part = ""
    try:
        handle, part = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        Path(part).chmod(0o644)
        Path(part).replace(path)
    except OSError as error:
        if part:
            Path(part).unlink(missing_ok=True)
        raise CompileDiskFull(f"the card cannot be written: {error.strerror}", value=path) from error
