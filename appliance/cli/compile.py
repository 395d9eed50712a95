"""`spinebox compile`: trained ONNX in, a signed INT8 bundle out, or a refusal that names the gate."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
from rich.progress import TaskID
from rich.table import Table

from appliance.cli._common import explained, json_option, out, progress, say
from appliance.cli.inspect import picture as draw
from appliance.cli.inspect import reliability_picture, table, write_picture
from appliance.errors import GateRefused, UsageError

_file = click.Path(path_type=Path, exists=True, dir_okay=False)
_folder = click.Path(path_type=Path, exists=True, file_okay=False)


@click.command("compile")
@click.argument("model", required=False, type=_file)
@click.option("--out", "out_dir", required=True, type=click.Path(path_type=Path, file_okay=False), help="Folder of the new bundle.")
@click.option("--card", type=_file, default=None, help="Card of MODEL; `spinebox card MODEL` drafts one. [default: the draft]")
@click.option("--calibration", type=_folder, default=None, help="Images to calibrate MODEL on. [default: synthetic ones]")
@click.option("--evaluation", type=_folder, default=None, help="Images to measure MODEL on, none of them calibrated on.")
@click.option("--weights", type=_folder, default=None, help="Folder of FAMILY.onnx, where no MODEL is given. [default: the shipped ones]")
@click.option(
    "--data",
    type=_folder,
    default=None,
    help="Training data (holds lumbar_mri/): calibrate on its training patients, gate on its held-out ones. Without it, phantoms.",
)
@click.option(
    "--protocol",
    "protocols",
    multiple=True,
    type=click.Choice(["lumbar-mri-sagittal", "spine-xray-ap"]),
    default=("lumbar-mri-sagittal",),
    show_default=True,
    help="Whose families to compile, where no MODEL is given; may be repeated. Radiographs need --data.",
)
@click.option("--images", type=click.IntRange(1, 5000), default=64, show_default=True, help="Calibration images for each model.")
@click.option("--max-drop", type=click.FloatRange(0, 1), default=0.01, show_default=True, help="Largest loss of Dice, mAP50 or accuracy.")
@click.option(
    "--targets", default="auto", show_default=True, help="Runtimes, comma-separated, or auto: every one that can be built for here."
)
@click.option("--without", multiple=True, help="Runtimes to leave out of auto, comma-separated; may be repeated.")
@click.option("--name", default=None, help="Name of the bundle. [default: lumbar-mri, or the model's]")
@click.option("--key", type=_file, default=None, help="Private key to sign with. [default: this machine's author key]")
@click.option("--fresh", is_flag=True, help="Use nothing kept from earlier compiles, and keep nothing.")
@click.option("--picture", type=click.Path(path_type=Path, dir_okay=False), default=None, help="Draw latency against loss into this PNG.")
@click.option(
    "--reliability",
    type=click.Path(path_type=Path, dir_okay=False),
    default=None,
    help="Draw how sure the engines were against how often they were right into this PNG.",
)
@json_option
@explained
def compile_(
    model: Path | None,
    out_dir: Path,
    card: Path | None,
    calibration: Path | None,
    evaluation: Path | None,
    weights: Path | None,
    data: Path | None,
    protocols: tuple[str, ...],
    images: int,
    max_drop: float,
    targets: str,
    without: tuple[str, ...],
    name: str | None,
    key: Path | None,
    fresh: bool,
    picture: Path | None,
    reliability: Path | None,
    as_json: bool,
) -> None:
    """Compile trained ONNX models into a signed INT8 bundle; refuse what lost more than --max-drop.

    \b
      spinebox compile --out bundle --data DIR                the shipped families, gated on held-out patients
      spinebox compile model.onnx --out bundle                a model of your own, its card drafted from its graph
      spinebox compile model.onnx --card card.toml --calibration images --evaluation others --out bundle

    Every stage is kept by content: an interrupted compile goes on where it stopped, a second one takes seconds. Ends with a
    table: metric with 95 % interval in FP32 and INT8 for each runtime, size, latency, the gates, what was picked and why.
    """
    from appliance.compiler import families, frontal, pipeline
    from appliance.compiler.build import TARGETS
    from appliance.compiler.cache import Cache, default_folder
    from models.export import WEIGHTS

    wanted = None if targets == "auto" else tuple(t.strip() for t in targets.split(",") if t.strip())
    if wanted == ():
        raise UsageError("no target is named", value=targets)
    left_out = [t.strip() for part in without for t in part.split(",") if t.strip()]
    unknown = [t for t in left_out if t not in TARGETS]
    if unknown or (left_out and wanted is not None):
        raise UsageError("--without names runtimes to leave out of --targets auto", value=", ".join(left_out))
    stray = [n for n, v in (("--card", card), ("--calibration", calibration), ("--evaluation", evaluation)) if v is not None]
    if model is None and stray:
        raise UsageError(f"{stray[0]} belongs to a MODEL, and none is given", value=stray[0])
    if model is not None and (data is not None or weights is not None):
        raise UsageError("--data and --weights are of the shipped families, not of a MODEL", value=model)
    if "spine-xray-ap" in protocols and model is None and not frontal.there(data):
        raise UsageError(
            "radiographs are compiled from radiographs: the folder does not hold them", value=data, remedy="Name it with --data."
        )
    with progress() as bar:
        whole: TaskID = bar.add_task("compile", total=None)
        part: TaskID = bar.add_task("reading", total=1)

        def step(stage: str, done: int, total: int) -> None:
            bar.update(part, description=f"{stage:<44}", completed=done, total=max(total, 1))

        def overall(done: int, total: int) -> None:
            bar.update(whole, completed=done, total=total)

        order = pipeline.Order(
            max_drop=max_drop,
            targets=wanted,
            without=tuple(left_out),
            cache=Cache(None if fresh else default_folder()),
            say=step,
            overall=overall,
            key=key,
        )
        try:
            if model is not None:
                outcome = pipeline.compile_model(out_dir, model, card, calibration, evaluation, order, name=name, images=images)
            else:
                trained, called = weights or WEIGHTS, name or ("lumbar-mri" if protocols == ("lumbar-mri-sagittal",) else "spine")
                names = tuple(n for p in dict.fromkeys(protocols) for n in families.PROTOCOLS[p])
                outcome = pipeline.compile_families(out_dir, data, order, images=images, weights=trained, name=called, names=names)
        except GateRefused as error:
            if error.rows and not as_json:
                out.print(_table(error.rows))
            raise
    if picture is not None:
        write_picture(picture, draw(outcome.bundle))
    drawn = reliability_picture(outcome.bundle) if reliability is not None else None
    if reliability is not None and drawn is not None:
        write_picture(reliability, drawn)
    elif reliability is not None:
        say.print(
            f"{reliability} is not written: no gate judged the percentages of any model", markup=False, highlight=False, soft_wrap=True
        )
    if as_json:
        click.echo(
            json.dumps(
                {
                    "bundle": outcome.bundle.identity,
                    "evaluated_on": outcome.evaluated_on,
                    "models": outcome.bundle.manifest["models"],
                    "profile": outcome.bundle.profile,
                }
            )
        )
        return
    out.print(table(outcome.bundle))
    out.print(f"{out_dir}: bundle {outcome.bundle.digest[:12]}, measured on {outcome.evaluated_on}", highlight=False)
    out.print(f"`spinebox inspect {out_dir}` shows every gate.", highlight=False)


@click.command()
@click.argument("bundle_path", metavar="BUNDLE", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--runs", type=click.IntRange(3, 10_000), default=60, show_default=True, help="Runs of each engine, interleaved in pairs.")
@json_option
@explained
def choose(bundle_path: Path, runs: int, as_json: bool) -> None:
    """Time the engines of BUNDLE on this device and keep the fastest of each model as the bundle's choice.

    The bundle itself stays as it is, with its digest and signature: only its profile is written. An engine is timed where its
    runtime is here and it answers its golden inputs.
    """
    from appliance.bundle import open_bundle, write_profile
    from appliance.compiler.choice import measure_again

    bundle = open_bundle(bundle_path)
    with progress() as bar:
        part = bar.add_task("timing", total=1)

        def step(stage: str, done: int, total: int) -> None:
            bar.update(part, description=f"{stage:<44}", completed=done, total=max(total, 1))

        profile = measure_again(bundle, runs, step)
    write_profile(bundle_path, profile)
    if as_json:
        click.echo(json.dumps(profile))
        return
    for name, entry in profile["models"].items():
        out.print(f"{name}: {entry['choice']['backend']}, {entry['choice']['reason']}", highlight=False)


def _table(rows: Any) -> Table:
    """What was measured before the refusal: no bundle was written that `inspect` could show."""
    grid = Table(title="FP32 beside INT8, refused")
    for column in ("model", "engine", "metric", "value [95 %]", "drop", ""):
        grid.add_column(column, justify="right" if column == "drop" else "left")
    for row in rows:
        main = row.metrics[0] if row.metrics else None
        grid.add_row(
            row.model,
            f"{row.target} {row.precision}",
            main.name if main else "",
            f"{main.value:.3f} [{main.low:.3f}, {main.high:.3f}]" if main else "",
            f"{row.drop * 100:+.2f}" if row.drop is not None else "",
            f"refused: {row.note}" if row.passed is False else row.note,
        )
    return grid
