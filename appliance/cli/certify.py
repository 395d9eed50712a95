"""`spinebox certify`: how slow an engine can be on this device, proven by straight passes and signed into the device's record."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from appliance import power
from appliance.certificate import DRIFTED, TIME_LIMIT_S, Certificate, DeviceRecord, Subject, auto_limit_ms, measure, percentile
from appliance.cli._common import backend_option, bundle_option, explained, json_option, out, progress, say
from appliance.errors import BackendError, UsageError
from appliance.power import Power

Feed = dict[str, NDArray[np.float32]]


def _limit(context: click.Context, parameter: click.Parameter, value: str) -> float | None:
    del context, parameter
    if value == "auto":
        return None
    try:
        limit = float(value)
    except ValueError:
        limit = math.nan
    if not 0 < limit <= 600_000:
        raise click.BadParameter("milliseconds above 0 and up to 600000, or auto")
    return limit


@click.command()
@bundle_option
@backend_option
@click.option("--model", "models", multiple=True, metavar="NAME", help="Only this model; may be repeated. [default: every one in use]")
@click.option("--threads", type=click.IntRange(0, 256), default=0, help="Threads of the runtime; 0 takes the CPUs that it may use.")
@click.option(
    "--limit-ms",
    default="auto",
    show_default=True,
    callback=_limit,
    help="What every pass must keep to; auto takes twice the p99 of 200 passes that are not counted.",
)
@click.option("--quantile", type=click.Choice(["0.99", "0.999"]), default="0.99", show_default=True, help="Which quantile to prove.")
@click.option(
    "--confidence", type=click.FloatRange(0.5, 0.9999), default=0.99, show_default=True, help="How sure: .99 takes 459 or 4603 passes."
)
@click.option(
    "--time-limit-s", type=click.FloatRange(1, 86_400), default=TIME_LIMIT_S, show_default=True, help="Longest time of one model."
)
@click.option("--data-dir", type=click.Path(path_type=Path, file_okay=False), default=None, help="Where the device's record is kept.")
@click.option("--show", is_flag=True, help="Measure nothing; print the record.")
@json_option
@explained
def certify(
    bundle_path: Path | None,
    backend: str,
    models: tuple[str, ...],
    threads: int,
    limit_ms: float | None,
    quantile: str,
    confidence: float,
    time_limit_s: float,
    data_dir: Path | None,
    show: bool,
    as_json: bool,
) -> None:
    """Prove how slow the engines of a bundle can be on this device, and sign it into the device's record.

    Every model is run as the appliance runs it, with all engines open, on its golden inputs: so many passes in a row within the limit
    prove the quantile. It stops at the first pass over the limit, and says what is proven all the same. Exit code 0 where everything
    asked for is proven, 6 where not.
    """
    from appliance.cli import _default_data_dir

    folder = data_dir or _default_data_dir()
    if show:
        _show(DeviceRecord.open(folder), bundle_path, as_json)
        return
    made = _measure(DeviceRecord.open(folder), bundle_path, backend, models, threads, limit_ms, float(quantile), confidence, time_limit_s)
    if as_json:
        click.echo(json.dumps({"record": str(folder), "certificates": [_for_machines(c) for c in made]}))
    else:
        out.print(table(made))
        _sentences(made)
        say.print(f"signed into the record of {folder}", highlight=False, markup=False)
    raise SystemExit(0 if all(c.proven for c in made) else BackendError.exit_code)


def _measure(
    record: DeviceRecord,
    bundle_path: Path | None,
    backend: str,
    models: Sequence[str],
    threads: int,
    limit_ms: float | None,
    quantile: float,
    confidence: float,
    time_limit_s: float,
) -> list[Certificate]:
    from appliance import backends
    from appliance.bundle import open_bundle
    from appliance.engine import Engine

    bundle = open_bundle(bundle_path)
    if record.ignored:
        say.print(f"{record.ignored}; it will be replaced", style="yellow", highlight=False, markup=False)
    threads = threads or power.cpu_threads()
    state = power.read()
    for words in state.words:
        say.print(words, style="yellow", highlight=False, markup=False)
    made: list[Certificate] = []
    with Engine(bundle, backend, threads) as engine, progress() as bar:
        unknown = [m for m in models if m not in engine.used]
        if unknown:
            remedy = f"Choose among: {', '.join(engine.used)}."
            raise UsageError("the bundle's protocols use no such model", value=", ".join(unknown), remedy=remedy)
        for model in dict.fromkeys(models or engine.used):
            name = engine.used[model]
            subject = Subject(
                model=model,
                backend=name,
                runtime=backends.probe(name).version or "",
                precision=engine.precisions[model],
                threads=threads,
                device=record.fingerprint,
                bundle=bundle.digest,
            )
            feeds = itertools.cycle(_feeds(bundle, model, name))
            task = bar.add_task(f"{model} on {name}", total=None)

            def once(model: str = model, feeds: Any = feeds) -> object:
                return engine.infer(model, next(feeds))

            chosen = auto_limit_ms(once) if limit_ms is None else limit_ms
            found = measure(
                once,
                subject,
                chosen,
                quantile,
                confidence,
                attempt=record.attempt(subject, quantile),
                time_limit_s=time_limit_s,
                progress=_advance(bar, task),
                notes=lambda: _notes(state),
            )
            record = record.keep(found)
            made.append(found)
    return made


def _notes(before: Power) -> tuple[str, ...]:
    """What the board says after a measurement that began in the state `before`."""
    now = power.read()
    return tuple(dict.fromkeys((*before.words, *now.words, *now.risen(before))))


def _advance(bar: Any, task: Any) -> Callable[[int, int], None]:
    return lambda done, needed: bar.update(task, completed=done, total=needed)


def _feeds(bundle: Any, model: str, backend: str) -> list[Feed]:
    """The golden inputs of the engine, which are real images; where it has none, noise over the input's range, always the same."""
    from appliance import golden

    entry = bundle.engine(model)
    build = entry.builds.get(backend)
    if build is not None and build.golden is not None:
        found = golden.Golden.from_bytes(bundle.read(build.golden))
        return [found.feed(i) for i in range(len(found.inputs))]
    rng = np.random.default_rng(1)
    return [{t.name: rng.uniform(-1, 1, t.shape).astype(np.float32) for t in entry.signature.inputs}]


def table(certificates: Sequence[Certificate]) -> Table:
    """Times in ms, and what they prove."""
    grid = Table(title="latency certificates (ms)")
    for column in ("model", "engine", "p50", "p99", "longest", "limit", "passes", "proven"):
        grid.add_column(column, justify="left" if column in ("model", "engine", "proven") else "right")
    for c in certificates:
        s = c.subject
        proven = f"{percentile(c.quantile)} <= {c.max_ms:.1f}" if c.proven else f"no; {percentile(c.proven_quantile)} <= {c.limit_ms:.1f}"
        grid.add_row(
            s.model,
            f"{s.backend} {s.precision}, {s.threads} threads",
            *(f"{ms:.2f}" for ms in (c.p50_ms, c.p99_ms, c.max_ms, c.limit_ms)),
            f"{c.passes} of {c.needed}",
            proven,
            style=None if c.proven else "yellow",
        )
    return grid


def _sentences(certificates: Sequence[Certificate]) -> None:
    for c in certificates:
        out.print(c.words, highlight=False, markup=False, soft_wrap=True)
        if not 1 / DRIFTED < c.drift < DRIFTED:
            words = f"  its last quarter took {c.drift:.2f} times as long as its first: the passes were not alike, so the proof is weaker"
            out.print(words, style="yellow", highlight=False, markup=False, soft_wrap=True)


def _for_machines(c: Certificate) -> dict[str, Any]:
    told = {"proven": c.proven, "bound_ms": c.bound_ms, "needed": c.needed, "proven_quantile": c.proven_quantile, "words": c.words}
    return {**c.to_json(), **told}


def _show(record: DeviceRecord, bundle_path: Path | None, as_json: bool) -> None:
    from appliance.bundle import open_bundle

    digest = open_bundle(bundle_path).digest
    own = [c for c in record.certificates if c.subject.device == record.fingerprint and c.subject.bundle == digest]
    others = len(record.certificates) - len(own)
    if as_json:
        told = {"device": record.device, "ignored": record.ignored, "others": others}
        click.echo(json.dumps({**told, "certificates": [_for_machines(c) for c in own]}))
        return
    if record.ignored:
        say.print(record.ignored, style="yellow", highlight=False, markup=False)
    if own:
        out.print(table(own))
        _sentences(own)
    else:
        out.print("nothing is certified here of this bundle; run `spinebox certify`", highlight=False, markup=False)
    if others:
        out.print(f"{others} more are of another bundle, or of this device as it was before", highlight=False, markup=False)
