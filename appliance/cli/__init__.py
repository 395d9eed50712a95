"""`spinebox`: the only module that sees every room.

Each command hides one job: `run` reads images and writes reports, `serve` brings the appliance up, `compile` makes a bundle,
`doctor` says what works here, `phantom` draws synthetic studies. Errors leave as one line with code, value and remedy, and
with the exit code of the error tree; `--json` gives the same to machines.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import platform
import re
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import click
from rich.table import Table

from appliance import backends, reliability, render, study
from appliance.budget import Budget
from appliance.bundle import SHIPPED, Bundle, open_bundle
from appliance.cli._common import backend_option, bundle_option, explained, json_option, out, progress, say
from appliance.cli.calibrate import calibrate, prove
from appliance.cli.card import card
from appliance.cli.certify import certify
from appliance.cli.compile import choose, compile_
from appliance.cli.inspect import inspect, keygen, pack_, sign, unpack_, verify
from appliance.engine import PROTOCOL, PROTOCOLS, Engine, refused_report
from appliance.errors import BundleError, SpineboxError, UsageError
from appliance.report import DISCLAIMER, Report


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(version("spinebox"), prog_name="spinebox")
def main() -> None:
    """Lumbar MRI and spine radiographs in; what they show found, measured, graded and explained out. No internet, no GPU.

    \b
      spinebox serve --demo                 bring the appliance up with a demonstration study
      spinebox run slice.dcm --out reports  read images, write a report for each
      spinebox doctor                       what works on this machine, and why not

    Research use only. Not for diagnosis.
    """


# -- run ----------------------------------------------------------------------------------------------------------------


def write_report(folder: Path, instance: study.Instance | None, report: Report) -> None:
    """report.json last, so that its presence says that the pictures are there."""
    folder.mkdir(parents=True, exist_ok=True)
    if instance is not None and report.status != "refused":
        _write(folder / "overlay.png", render.overlay_png(instance, report))
        if report.mask is not None:
            _write(folder / "labels.png", render.labels_png(report))
    _write(folder / "report.json", (json.dumps(report.to_json(), indent=1) + "\n").encode())


def _write(path: Path, content: bytes) -> None:
    part = path.with_name(f".{path.name}.part")
    part.write_bytes(content)
    part.replace(path)


def _folder_names(files: list[Path]) -> list[str]:
    """The stem of each input; where two share one, `-2`, `-3`, ... follow in order, so that no report overwrites another."""
    seen: dict[str, int] = {}
    names = []
    for file in files:
        # Only a known image suffix is cut: DICOM files are often named by a UID, whose last part is no suffix.
        stem = file.stem if re.fullmatch(r"\.(dcm|dicom|ima|png|jpe?g)", file.suffix, re.IGNORECASE) else file.name
        seen[stem] = seen.get(stem, 0) + 1
        names.append(stem if seen[stem] == 1 else f"{stem}-{seen[stem]}")
    return names


@main.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--out", "out_dir", required=True, type=click.Path(path_type=Path, file_okay=False), help="Folder for the reports.")
@bundle_option
@backend_option
@click.option("--budget-ms", type=float, default=10_000.0, show_default=True, help="Time for one image; less sheds heatmap, then masks.")
@click.option("--threads", type=click.IntRange(0, 256), default=0, help="Threads of the runtime; 0 leaves it the choice.")
@click.option("--resume", is_flag=True, help="Skip images whose report.json is there already.")
@json_option
@explained
def run(
    files: tuple[Path, ...],
    out_dir: Path,
    bundle_path: Path | None,
    backend: str,
    budget_ms: float,
    threads: int,
    resume: bool,
    as_json: bool,
) -> None:
    """Read FILES (DICOM, PNG, JPEG, or folders of them) and write DIR/<stem>/report.json, overlay.png and labels.png.

    One image is in memory at a time, so a folder of any size runs. An image that cannot be answered gets a report.json with
    status "refused" and the error; the exit code is that of the first such error, 0 where all were answered.
    """
    budget = _budget(budget_ms)
    inputs = study.find_inputs(files)
    if not inputs:
        raise UsageError("no DICOM, PNG or JPEG file was found", value=", ".join(str(f) for f in files))
    names = _folder_names(inputs)
    exit_code, answered, skipped = 0, 0, 0
    lines: list[dict[str, Any]] = []
    with Engine(open_bundle(bundle_path), backend, threads) as engine, progress() as bar:
        task = bar.add_task("reading", total=len(inputs))
        for path, name in zip(inputs, names, strict=True):
            if resume and (out_dir / name / "report.json").exists():
                skipped += 1
                bar.advance(task)
                continue
            instance: study.Instance | None = None
            began = time.perf_counter()
            try:
                instance = study.read_path(path)
                read_ms = (time.perf_counter() - began) * 1e3
                report = engine.run(instance, budget.start())
                report.timing_ms["read"] = read_ms
                answered += 1
            except SpineboxError as error:
                report = refused_report(error, dict(instance.source) if instance else {})
                exit_code = exit_code or error.exit_code
                bar.console.print(f"{path}: {error}", style="red", markup=False, highlight=False)
            write_report(out_dir / name, instance, report)
            lines.append({"file": str(path), "report": str(out_dir / name / "report.json"), "status": report.status})
            bar.advance(task)
    if as_json:
        click.echo(json.dumps({"answered": answered, "refused": len(lines) - answered, "skipped": skipped, "reports": lines}))
    else:
        say.print(f"{answered} answered, {len(lines) - answered} refused, {skipped} skipped -> {out_dir}", highlight=False)
        say.print(DISCLAIMER)
    raise SystemExit(exit_code)


def _budget(budget_ms: float) -> Budget:
    try:
        return Budget(budget_ms)
    except ValueError as error:
        raise UsageError("the budget is out of range", value=budget_ms, remedy="Give milliseconds between 0 and 600000.") from error


# -- serve --------------------------------------------------------------------------------------------------------------


SPARE_THREADS = 8  # of the server, for whoever asks for health, pictures and pages
ENGINES = "engines"  # in the data directory: what the runtimes compiled, for the next start
COSTS = "costs.json"  # in the data directory: what work took on this device
MEMORY_SHARE = 0.6  # of the memory that may be used, for one worker


def _default_data_dir() -> Path:
    return Path(os.environ.get("XDG_DATA_HOME", str(Path.home() / ".local/share"))) / "spinebox"


@main.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to bind; the page has no login, so keep it local.")
@click.option("--port", default=8080, show_default=True, type=click.IntRange(0, 65535), help="0 takes any free port.")
@click.option("--data-dir", type=click.Path(path_type=Path, file_okay=False), default=None, help="Where studies and reports are kept.")
@click.option("--demo", is_flag=True, help="Answer the synthetic demonstration study first.")
@click.option("--budget-ms", type=float, default=3000.0, show_default=True, help="Time for one study where the request names none.")
@click.option("--threads", type=click.IntRange(0, 256), default=0, help="Threads of the runtime; 0 takes the processors it may use.")
@click.option("--standby/--no-standby", default=True, help="Keep a second, warm worker; takes the memory of one more.", show_default=True)
@click.option("--memory-mb", type=click.IntRange(256, 1 << 20), default=None, help="A worker that takes more is replaced.  [default: 60 %]")
@click.option("--blocking-ms", type=click.FloatRange(0.1, 600_000), default=None, help="Serve only engines certified to p99.9 below it.")
@bundle_option
@backend_option
@explained
def serve(
    host: str,
    port: int,
    data_dir: Path | None,
    demo: bool,
    budget_ms: float,
    threads: int,
    standby: bool,
    memory_mb: int | None,
    blocking_ms: float | None,
    bundle_path: Path | None,
    backend: str,
) -> None:
    """Bring the appliance up: kiosk page and API on http://127.0.0.1:8080, until Ctrl-C or SIGTERM.

    SIGHUP looks for another bundle at the same path (a link that was turned, say) and lets it take over without losing a request.
    """
    from appliance import power, web
    from appliance.device import Device
    from appliance.dispatch import Dispatcher
    from appliance.journal import Journal
    from appliance.swap import Swaps, proven_limits_ms
    from appliance.workers import Plan, Workers

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    sys.setswitchinterval(0.001)  # a refusal must not wait five times as long for the interpreter as it takes to make
    budget = _budget(budget_ms)
    folder = data_dir or _default_data_dir()
    path = bundle_path or SHIPPED
    threads = threads or power.cpu_threads()
    memory_bytes = (memory_mb << 20) if memory_mb else int(MEMORY_SHARE * power.memory_limit_bytes())
    plan = Plan(path.resolve(), backend, threads, memory_bytes, folder / ENGINES, folder, blocking_ms)
    # Below the server's threads: whoever is refused is told by the dispatcher, which knows for how long.
    dispatcher = Dispatcher(most_queued=web.THREADS - SPARE_THREADS)
    workers = Workers(plan, standby=standby, lost=dispatcher.close_for)
    metrics = web.Metrics(p.NAME for p in PROTOCOLS)
    board = power.Watch()
    device = Device(workers, dispatcher, costs_path=folder / COSTS, watcher=metrics, power_factor=board.factor)
    swaps = Swaps(device, path, plan)  # what is wrong with the bundle is said here, before a process is started
    with Journal(folder) as journal, device:
        study.warm_up()
        render.warm_up()
        up = workers.up()
        swaps.limits_ms = proven_limits_ms(folder, swaps.bundle, up, threads)
        reads = tuple(p.READS for p in PROTOCOLS if p.NAME in up["protocols"])
        settings = web.WebSettings(host=host, budget_ms=budget.total_ms, protocol=PROTOCOL, reads=reads, version=version("spinebox"))

        def engines() -> dict[str, Any]:
            return {"bundle": swaps.bundle.identity, "engines": reliability.engines(swaps.bundle.manifest["models"], workers.up()["used"])}

        app = web.create_app(
            device=device,
            read=study.read,
            render=render,
            journal=journal,
            health=lambda: {**device.health(), "power": board.now.words, "last_swap": swaps.last},
            engines=engines,
            inferring=web.OfDevice(device),
            metrics=metrics,
            state=device.state,
            settings=settings,
        )

        def bound(server: web.Server) -> None:
            used = ", ".join(f"{family} on {name}" for family, name in up["used"].items())
            say.print(f"Spinebox is up: [bold]{server.url}[/bold]   ({used})", highlight=False)
            say.print(f"Studies are kept in {folder}. Stop with Ctrl-C. {DISCLAIMER}", highlight=False, markup=False)

        try:
            if demo:
                _answer_demo(app, budget)
            web.finish_pending(app)
            gc.collect()
            gc.freeze()  # what is there now stays: the collector need not walk over it in the middle of an answer
            web.serve(app, host, port, max_bytes=settings.max_bytes, door=web.door(app), bound=bound, hangup=swaps.ask)
        finally:
            web.finish_keeping(app)


def _answer_demo(app: Any, budget: Budget) -> None:
    """Put the demonstration study through the same door as any other; answered once, it is kept."""
    from models import phantom

    image, truth = phantom.demo()
    app.extensions["spinebox"].answer(phantom.write_dicom(image, truth), "demonstration.dcm", budget.start())


# -- doctor -------------------------------------------------------------------------------------------------------------


def cpu_abilities() -> dict[str, Any]:
    """Model name and the INT8 and bf16 instructions of the CPU, as Linux tells them."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return {"model": platform.processor() or platform.machine(), "int8": [], "bf16": []}
    flags = set(" ".join(re.findall(r"^(?:flags|Features)\s*:\s*(.*)$", text, re.MULTILINE)).split())
    model = re.search(r"^model name\s*:\s*(.*)$", text, re.MULTILINE)
    return {
        "model": model.group(1) if model else platform.machine(),
        "int8": sorted(flags & {"avx2", "avx_vnni", "avx512_vnni", "amx_int8", "asimddp", "i8mm"}),
        "bf16": sorted(flags & {"avx512_bf16", "amx_bf16", "bf16"}),
    }


def _toolchains() -> dict[str, Any]:
    """The converters' environments of a machine that compiles; a device has and needs none."""
    from appliance.compiler import toolchain

    return {name: toolchain.state(name) for name in toolchain.TOOLCHAINS}


def _diagnose(bundle_path: Path | None) -> dict[str, Any]:
    report: dict[str, Any] = {
        "spinebox": version("spinebox"),
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "cpu": cpu_abilities(),
        "packages": {},
        "backends": {},
    }
    for package in ("numpy", "opencv-python-headless", "pydicom", "python-gdcm", "flask", "waitress"):
        try:
            report["packages"][package] = version(package)
        except PackageNotFoundError:
            report["packages"][package] = None
    for name in backends.names():
        state = backends.probe(name)
        report["backends"][name] = {
            "available": state.available,
            "reason": state.reason,
            "version": state.version,
            "details": state.details,
        }
    report["toolchains"] = {name: {"ready": found.ready, "reason": found.reason} for name, found in _toolchains().items()}
    bundle: dict[str, Any] = {"path": str(bundle_path or SHIPPED)}
    try:
        opened: Bundle = open_bundle(bundle_path)
        bundle |= {"ok": True, **opened.identity, "files": opened.manifest["files"]}
        bundle["models"] = {k: {"version": m["version"], "choice": opened.engine(k).choice} for k, m in opened.manifest["models"].items()}
    except BundleError as error:
        bundle |= {"ok": False, "error": error.to_json()}
    report["bundle"] = bundle
    report["ready"] = bool(bundle["ok"]) and any(report["backends"][n]["available"] for n in backends.PREFERENCE)
    return report


@main.command()
@bundle_option
@json_option
@explained
def doctor(bundle_path: Path | None, as_json: bool) -> None:
    """What works on this machine: each backend with its reason, the CPU's INT8 abilities, the bundle and its digests.

    Exit code 0 where the appliance could serve, 6 where no runtime works, 5 where the bundle does not open.
    """
    found = _diagnose(bundle_path)
    if as_json:
        click.echo(json.dumps(found, indent=1))
    else:
        cpu = found["cpu"]
        out.print(f"Spinebox {found['spinebox']}, Python {found['python']}, {found['cores']} cores, {cpu['model']}", highlight=False)
        out.print(f"INT8: {', '.join(cpu['int8']) or 'none known'}   bf16: {', '.join(cpu['bf16']) or 'none'}", highlight=False)
        table = Table(title="backends")
        for column in ("backend", "state", "version", "reason"):
            table.add_column(column)
        for name, state in found["backends"].items():
            table.add_row(name, "ready" if state["available"] else "absent", state["version"] or "", state["reason"])
        out.print(table)
        made = [name for name, state in found["toolchains"].items() if state["ready"]]
        out.print(f"converters, for compiling only: {', '.join(made) or 'none made; `make toolchains` makes them'}", highlight=False)
        bundle = found["bundle"]
        if bundle["ok"]:
            table = Table(title=f"bundle {bundle['name']} {bundle['digest'][:12]} (every digest checked)")
            for column in ("file", "bytes", "SHA-256"):
                table.add_column(column)
            for path, entry in bundle["files"].items():
                table.add_row(path, f"{entry['bytes']:,}", entry["sha256"][:16])
            out.print(table)
        else:
            out.print(f"bundle: {bundle['error']['message']} ({bundle['error']['value']}). {bundle['error']['remedy']}", style="red")
        out.print("ready" if found["ready"] else "not ready", style="green" if found["ready"] else "red")
    raise SystemExit(0 if found["ready"] else 5 if not found["bundle"]["ok"] else 6)


@main.command(context_settings={"ignore_unknown_options": True, "help_option_names": []})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def phantom(arguments: tuple[str, ...]) -> None:
    """Draw synthetic lumbar MRI studies with exact truth: `spinebox phantom --help`."""
    from models import phantom as drawing

    raise SystemExit(drawing.main(list(arguments)))


for command in (calibrate, card, certify, choose, compile_, inspect, keygen, pack_, prove, sign, unpack_, verify):
    main.add_command(command)
