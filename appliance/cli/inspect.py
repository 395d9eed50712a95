"""`spinebox inspect` and the commands about keys, signatures and the single-file form.

Hides how a bundle is shown: one row for each engine of each model, from the manifest what is true everywhere, from the profile what
is true of one device. Whatever a bundle says is printed as plain text: it may come from a stranger.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
from rich.table import Table
from rich.text import Text

from appliance import backends, reliability, signing
from appliance.bundle import PROFILE, SIGNATURE, Bundle, check_installable, open_bundle, pack, read_bundle, sign_bundle, unpack
from appliance.cli._common import explained, json_option, out, say
from appliance.errors import SpineboxError, UsageError
from appliance.reliability import Reliability
from appliance.report import DISCLAIMER

_bundle_argument = click.argument("bundle_path", metavar="BUNDLE", type=click.Path(path_type=Path))


# -- rows ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One engine of one model. `metric` is the family's main one; `drop` its loss against FP32 with a 95 % interval where known."""

    model: str
    backend: str
    precision: str
    state: str  # "picked", "passed", "refused", "not judged", "reference", "compared"
    why: str
    metric: str = ""
    value: float | None = None
    low: float | None = None
    high: float | None = None
    drop: float | None = None
    drop_low: float | None = None
    drop_high: float | None = None
    size_bytes: int | None = None
    latency_ms_p50: float | None = None
    latency_ms_p99: float | None = None
    ratio: float | None = None
    gates: tuple[tuple[str, bool | None, str], ...] = ()


def rows_of(bundle: Bundle) -> list[Row]:
    """FP32 first, then every engine of the manifest, then what the profile timed beside them; model by model."""
    return [row for name in sorted(bundle.manifest["models"]) for row in _rows_of_model(bundle, name)]


def _rows_of_model(bundle: Bundle, name: str) -> list[Row]:
    entry = bundle.manifest["models"][name]
    profile = bundle.profile.get("models", {}).get(name, {})
    times: Mapping[str, Any] = profile.get("engines", {})
    fp32 = entry["metrics"]["fp32"][0] if entry["metrics"]["fp32"] else None
    metric = fp32["name"] if fp32 else ""
    reference_ms = next((t for v in times.values() if (t := _part(v, "a", "median_ms")) is not None), None)
    measured = {"value": fp32["value"], "low": fp32["low"], "high": fp32["high"], "drop": 0.0} if fp32 else {}
    rows = [
        Row(
            name,
            "onnxruntime",
            "f32",
            "reference",
            f"measured on {entry['metrics']['source']}",
            metric,
            **measured,
            latency_ms_p50=reference_ms,
            ratio=1.0 if reference_ms is not None else None,
        )
    ]
    losers = {(x["backend"], x["precision"]): x["reason"] for x in profile.get("losers", [])}
    choice = profile.get("choice", {})
    shown = {"onnxruntime f32"}
    for backend, engine in sorted(entry["engines"].items()):
        key = f"{backend} {engine['precision']}"
        shown.add(key)
        state = {True: "passed", False: "refused", None: "not judged"}[engine["passed"]]
        why = losers.get((backend, engine["precision"]), "") or engine["verified"]
        if state == "passed" and choice.get("backend") == backend and choice.get("precision") == engine["precision"]:
            state, why = "picked", choice["reason"]
        elif state == "refused":
            why = "; ".join(f"{v['gate']} gate: {v['note']}" for v in engine["verdicts"] if v["passed"] is False) or why
        elif state == "not judged":
            why = f"not run here: {engine['verified']}"
        rows.append(_engine_row(bundle, name, backend, engine, state, why, metric, fp32, times.get(key, {})))
    for key in sorted(set(times) - shown):
        backend, _, precision = key.partition(" ")
        why = losers.get((backend, precision), "timed for comparison")
        rows.append(Row(name, backend, precision, "compared", why, **_times(times[key])))
    return rows


def _engine_row(
    bundle: Bundle,
    name: str,
    backend: str,
    engine: Mapping[str, Any],
    state: str,
    why: str,
    metric: str,
    fp32: Any,
    times: Mapping[str, Any],
) -> Row:
    found = next((m for m in engine["metrics"] if m["name"] == metric), None)
    task: Mapping[str, Any] = next((v for v in engine["verdicts"] if v["gate"] == "task"), {})
    drop = _number(task.get("value"))
    if drop is None and found and fp32:
        drop = fp32["value"] - found["value"]
    return Row(
        name,
        backend,
        engine["precision"],
        state,
        why,
        metric if found else "",
        found["value"] if found else None,
        found["low"] if found else None,
        found["high"] if found else None,
        drop,
        _number(task.get("low")),
        _number(task.get("high")),
        bundle.manifest["files"][engine["graph"]]["bytes"] if engine["graph"] else None,
        gates=tuple((v["gate"], v["passed"], v["note"]) for v in engine["verdicts"]),
        **_times(times),
    )


def _times(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Of the pair: `a` is the FP32 reference, `b` the engine; the two ran interleaved, so their ratio holds on a noisy machine."""
    times = {"latency_ms_p50": _part(entry, "b", "median_ms"), "latency_ms_p99": _part(entry, "b", "p99_ms")}
    return {**times, "ratio": _number(entry.get("ratio"))}


def _part(entry: Mapping[str, Any], side: str, key: str) -> float | None:
    found = entry.get(side)
    return _number(found.get(key)) if isinstance(found, dict) else None


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


# -- tables and picture -------------------------------------------------------------------------------------------------


def plain(text: object, most: int = 400) -> Text:
    """Text of a bundle for a terminal: no markup, no control characters, not without end."""
    words = "".join(c if c.isprintable() else "?" for c in str(text))
    return Text(words if len(words) <= most else words[: most - 3] + "...")


SHORT = {"heatmap": "map", "confidence": "conf", "golden": "gold", "parity": "par"}


def table(bundle: Bundle) -> Table:
    """Model x target: main metric, drop in points, size, latency, ratio, gates, state.

    Below the model's name stand its metric and the share of its weights that stayed in float: the layers are chosen once, for
    every target in eight bits.
    """
    legend = f"in float: share of the weights. gates: + passed, ! refused, ? not judged. {DISCLAIMER}"
    shown = Table(title=Text(f"bundle {bundle.manifest['name']} {bundle.digest[:12]}"), caption=legend, show_lines=False)
    whole = ("model", "engine", "value [95 %]", "drop [95 %]", "ms p50", "state")
    for column in ("model", "engine", "value [95 %]", "drop [95 %]", "MB", "ms p50", "ratio", "gates", "state"):
        right = column in ("MB", "ms p50", "ratio")
        least = 18 if column == "gates" else 5 if right else None
        shown.add_column(column, justify="right" if right else "left", overflow="fold", no_wrap=column in whole, min_width=least)
    last = ""
    below: list[str] = []
    for row in rows_of(bundle):
        if row.model != last:
            if last:
                shown.add_section()
            share = bundle.manifest["models"][row.model]["float_share"]
            below = [row.model, row.metric, f"{_share(share)} in float"]
            last = row.model
        shown.add_row(
            plain(below.pop(0) if below else "", 24),
            plain(f"{row.backend} {row.precision}"),
            plain(_interval(row.value, row.low, row.high)),
            plain("" if row.state == "reference" else _points(row.drop, row.drop_low, row.drop_high)),
            f"{row.size_bytes / 1e6:.2f}" if row.size_bytes is not None else "",
            f"{row.latency_ms_p50:.1f}" if row.latency_ms_p50 is not None else "",
            f"{row.ratio:.2f}" if row.ratio is not None else "",
            plain(" ".join(f"{SHORT.get(gate, gate)}{ {True: '+', False: '!', None: '?'}[passed] }" for gate, passed, _ in row.gates)),
            Text(row.state, style={"picked": "bold green", "refused": "bold red"}.get(row.state, "")),
        )
    return shown


def _interval(value: float | None, low: float | None, high: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.3f}" + (f" [{low:.3f}, {high:.3f}]" if low is not None and high is not None else "")


def _share(share: float) -> str:
    """In per cent; a few biases in float are not "0 %"."""
    return "<1 %" if 0 < share < 0.01 else f"{100 * share:.0f} %"


def _points(drop: float | None, low: float | None, high: float | None) -> str:
    if drop is None:
        return ""
    return f"{drop * 100:+.2f}" + (f" [{low * 100:+.2f}, {high * 100:+.2f}]" if low is not None and high is not None else "")


def picture(bundle: Bundle) -> bytes:
    """PNG: latency against loss, one panel a model; engines without a time or a loss are named beside it."""
    from appliance.compiler import pareto

    rows = rows_of(bundle)
    panels = []
    for name in sorted(bundle.manifest["models"]):
        own = [r for r in rows if r.model == name]
        points, missing = [], []
        for r in own:
            if _drawable(r.latency_ms_p50, r.drop, r.drop_low, r.drop_high):
                state: Any = r.state
                points.append(pareto.Point(r.backend, r.precision, r.latency_ms_p50 or 0.0, r.drop or 0.0, state, r.drop_low, r.drop_high))
            elif r.state != "compared":
                absent = "time" if r.latency_ms_p50 is None else "loss" if r.drop is None else "plausible figure"
                missing.append(f"{r.backend} {r.precision}: no {absent}")
        metric = own[0].metric or "the metric"
        panels.append(pareto.Panel(name, metric, float(bundle.manifest["max_drop"]), points, missing))
    return pareto.draw(panels, f"{bundle.manifest['name']} {bundle.digest[:12]}: latency against loss")


def reliability_picture(bundle: Bundle) -> bytes | None:
    """PNG: how sure each engine said it was against how often it was right; None where the bundle records it of none."""
    from appliance.compiler import diagram

    rows = diagram.rows_of(bundle.manifest["models"])
    if not rows:
        return None
    return diagram.draw(rows, f"{bundle.manifest['name']} {bundle.digest[:12]}: how far its percentages can be believed")


def believed(bundle: Bundle) -> dict[str, dict[str, Reliability]]:
    """What the bundle records of the percentages of each engine that no gate refused, by model and backend; models without any left out."""
    out: dict[str, dict[str, Reliability]] = {}
    for name, model in sorted(bundle.manifest["models"].items()):
        found = {b: reliability.of_engine(e) for b, e in sorted(model["engines"].items()) if e["passed"] is not False}
        if any(r.heads for r in found.values()):
            out[name] = {b: r for b, r in found.items() if r.heads}
    return out


def _drawable(latency_ms: float | None, *losses: float | None) -> bool:
    """Whether figures that a stranger may have written fit on axes: a time up to an hour, losses up to the whole metric."""
    main = losses[0]
    return latency_ms is not None and main is not None and 0 <= latency_ms <= 3.6e6 and all(x is None or -1 <= x <= 1 for x in losses)


def summary(bundle: Bundle) -> dict[str, Any]:
    """Everything that `inspect` knows, as JSON."""
    signer = None
    if bundle.signer is not None:
        signer = {"key_id": bundle.signer.id, "name": bundle.signer.name, "trusted": bundle.trusted}
    manifest = bundle.manifest
    return {
        "disclaimer": DISCLAIMER,
        "bundle": bundle.identity,
        "signer": signer,
        "installable": _installable(bundle),
        "calibration_root": manifest["calibration_root"],
        "calibration": {name: m["calibration"] for name, m in manifest["models"].items()},
        "tools": manifest["tools"],
        "max_drop": manifest["max_drop"],
        "files": manifest["files"],
        "profile": {"problem": bundle.profile_problem, "device": bundle.profile.get("device", {})},
        "models": {
            name: {k: m[k] for k in ("version", "task", "inputs", "outputs", "heatmap", "preprocess", "source_sha256", "float_share")}
            for name, m in manifest["models"].items()
        },
        "engines": [asdict(row) for row in rows_of(bundle)],
        "reliability": {name: {b: r.to_json() for b, r in of.items()} for name, of in believed(bundle).items()},
    }


def _installable(bundle: Bundle) -> dict[str, Any]:
    document = bundle.part(SIGNATURE)
    try:
        check_installable(bundle.manifest, None if document is None else json.loads(document), signing.trusted_keys())
    except SpineboxError as error:
        return {"ok": False, **error.to_json()}
    return {"ok": True}


# -- differences --------------------------------------------------------------------------------------------------------


def differences(a: Bundle, b: Bundle) -> list[dict[str, str]]:
    """What differs between two bundles, as {what, old, new}; empty where they are the same."""
    if a.digest == b.digest:
        return []
    one, two = _facts(a), _facts(b)
    return [
        {"what": what, "old": one.get(what, "absent"), "new": two.get(what, "absent")}
        for what in [*one, *(w for w in two if w not in one)]
        if one.get(what) != two.get(what)
    ]


def _facts(bundle: Bundle) -> dict[str, str]:
    m = bundle.manifest
    facts = {key: str(m[key]) for key in ("name", "spinebox", "preprocess", "max_drop", "calibration_root")}
    facts["signer"] = bundle.signer.id if bundle.signer else "nobody"
    facts |= {f"tool {tool}": version for tool, version in m["tools"].items()}
    for name, model in m["models"].items():
        facts[f"{name}: trained file"] = model["source_sha256"]
        facts[f"{name}: calibration root"] = model["calibration"]["root"]
        facts[f"{name}: calibration images"] = f"{model['calibration']['images']} {model['calibration']['source']}"
        for key in ("version", "task", "inputs", "outputs", "preprocess", "heatmap", "temperature", "float_share"):
            facts[f"{name}: {key}"] = json.dumps(model[key], sort_keys=True)
        for metric in model["metrics"]["fp32"]:
            facts[f"{name}: {metric['name']} FP32"] = f"{metric['value']:.6f}"
        for backend, engine in model["engines"].items():
            graph = engine["graph"]
            facts[f"{name} on {backend}: graph"] = m["files"][graph]["sha256"] if graph else "none"
            facts[f"{name} on {backend}: precision"] = engine["precision"]
            facts[f"{name} on {backend}: passed"] = {True: "passed", False: "refused", None: "not judged"}[engine["passed"]]
            for metric in engine["metrics"]:
                facts[f"{name} on {backend}: {metric['name']}"] = f"{metric['value']:.6f}"
    named = {e["graph"] for model in m["models"].values() for e in model["engines"].values()}
    facts |= {f"file {path}": entry["sha256"] for path, entry in m["files"].items() if path not in named}
    return facts


# -- commands -----------------------------------------------------------------------------------------------------------


@click.command()
@_bundle_argument
@click.option("--picture", "picture_path", type=click.Path(path_type=Path, dir_okay=False), help="Write latency against loss as PNG.")
@click.option(
    "--reliability", "reliability_path", type=click.Path(path_type=Path, dir_okay=False), help="Write the reliability diagrams as PNG."
)
@click.option("--diff", "other_path", type=click.Path(path_type=Path), help="Name what changed from BUNDLE to this other bundle.")
@json_option
@explained
def inspect(bundle_path: Path, picture_path: Path | None, reliability_path: Path | None, other_path: Path | None, as_json: bool) -> None:
    """What is in BUNDLE (a folder or a .spinebox file), who signed it, and why each engine was picked or refused.

    Every digest is checked. The bundle may be unsigned or of a stranger's models; whether this device may run it is said too.
    Gates are marked + passed, ! refused, ? not judged.
    """
    bundle = read_bundle(bundle_path)
    changed = differences(bundle, read_bundle(other_path)) if other_path is not None else None
    if picture_path is not None:
        write_picture(picture_path, picture(bundle))
    if reliability_path is not None:
        drawn = reliability_picture(bundle)
        if drawn is None:
            raise UsageError("the bundle records no reliability diagram", value=bundle_path, remedy="Compile it again.")
        write_picture(reliability_path, drawn)
    if as_json:
        click.echo(json.dumps(summary(bundle) | ({} if changed is None else {"differences": changed})))
        return
    if changed is not None:
        _print_differences(changed)
        return
    out.print(table(bundle))
    for row in rows_of(bundle):
        out.print(plain(f"  {row.model}, {row.backend} {row.precision}: {row.state}, {row.why}"), highlight=False, soft_wrap=True)
    for name, of in believed(bundle).items():
        backend = bundle.profile.get("models", {}).get(name, {}).get("choice", {}).get("backend", "")
        backend = backend if backend in of else next(iter(of))
        out.print(plain(f"  {name} on {backend}, how far its percentages can be believed:"), highlight=False, soft_wrap=True)
        for words in [*of[backend].words, *([of[backend].reason] if of[backend].reason else [])]:
            out.print(plain(f"    {words}"), highlight=False, soft_wrap=True)
    found = summary(bundle)
    lines = [f"digest            {bundle.digest}", f"signed by         {_signed_by(bundle)}"]
    lines.append(f"calibration root  {bundle.manifest['calibration_root']}")
    lines += [f"  {n:<15} {c['root']}  {c['images']} images, {c['source']}" for n, c in found["calibration"].items()]
    lines.append("tools             " + ", ".join(f"{tool} {version}" for tool, version in sorted(bundle.manifest["tools"].items())))
    device = json.dumps(found["profile"]["device"], sort_keys=True)
    lines.append(f"profile           {bundle.profile_problem or device}")
    state = found["installable"]
    lines.append(f"this device       {'may run it' if state['ok'] else 'may not run it: ' + state['message'] + '. ' + state['remedy']}")
    for line in lines:
        out.print(plain(line, 2000), highlight=False, soft_wrap=True)


def _signed_by(bundle: Bundle) -> str:
    if bundle.signer is None:
        return "nobody"
    return f"key {bundle.signer.id} ({bundle.signer.name}, trusted)" if bundle.trusted else f"key {bundle.signer.id}, not trusted here"


def _print_differences(changed: list[dict[str, str]]) -> None:
    if not changed:
        out.print("the two bundles are the same", highlight=False)
        return
    shown = Table(title=f"{len(changed)} differences")
    for column in ("what", "old", "new"):
        shown.add_column(column, overflow="fold")
    for c in changed:
        shown.add_row(plain(c["what"]), plain(c["old"], 80), plain(c["new"], 80))
    out.print(shown)


def write_picture(path: Path, data: bytes) -> None:
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_bytes(data)
        part.replace(path)
    except OSError as error:
        raise UsageError(
            f"the picture cannot be written: {error.strerror}", value=path, remedy="Name a file in a folder of yours."
        ) from error


@click.command()
@click.argument("path", required=False, type=click.Path(path_type=Path, dir_okay=False))
@click.option("--passphrase", "ask", is_flag=True, help="Ask for a passphrase; without it SPINEBOX_PASSPHRASE is taken where it is set.")
@json_option
@explained
def keygen(path: Path | None, ask: bool, as_json: bool) -> None:
    """Make an Ed25519 key pair: the private key at PATH (mode 0600, never overwritten), the public one beside it as .pub.

    Without PATH it is the author's own key, with which `spinebox compile` and `spinebox sign` sign.
    Give the .pub file to whoever runs your bundles; it belongs into /etc/spinebox/trusted or ~/.config/spinebox/trusted there.
    """
    path = path or signing.author_path()
    passphrase = click.prompt("Passphrase", hide_input=True, confirmation_prompt=True).encode() if ask else signing.environment_passphrase()
    key = signing.generate(path, passphrase)
    public = path.with_suffix(".pub")
    if as_json:
        click.echo(json.dumps({"key_id": key.id, "private": str(path), "public": str(public)}))
    else:
        out.print(f"key {key.id}\n  private {path}\n  public  {public}", highlight=False, markup=False, soft_wrap=True)


@click.command()
@_bundle_argument
@click.option("--key", "key_path", type=click.Path(path_type=Path), help="Private key. [default: the author's own, made on first use]")
@json_option
@explained
def sign(bundle_path: Path, key_path: Path | None, as_json: bool) -> None:
    """Sign BUNDLE (a folder or a .spinebox file) in place; its digest stays the same.

    A key with a passphrase needs SPINEBOX_PASSPHRASE in the environment. An earlier signature is replaced.
    """
    key = signing.load_private(key_path, signing.environment_passphrase()) if key_path else signing.author_key()
    signer = sign_bundle(bundle_path, key)
    digest = read_bundle(bundle_path).digest
    if as_json:
        click.echo(json.dumps({"digest": digest, "key_id": signer.id}))
    else:
        say.print(f"{bundle_path}: {digest[:12]} signed with key {signer.id}", highlight=False, markup=False)


@click.command()
@_bundle_argument
@json_option
@explained
def verify(bundle_path: Path, as_json: bool) -> None:
    """Whether this device may run BUNDLE: every digest, the signature and its key, formats, sizes, golden outputs.

    Exit code 0 where it may; 5 with the reason where not.
    """
    bundle = open_bundle(bundle_path)
    assert bundle.signer is not None  # noqa: S101 - open_bundle raises otherwise
    usable = sorted({b for n in bundle.manifest["models"] for b in bundle.engine(n).builds if backends.probe(b).available})
    if as_json:
        click.echo(json.dumps({"ok": True, **bundle.identity, "key_id": bundle.signer.id, "backends": usable}))
    else:
        out.print(plain(f"{bundle_path}: {bundle.digest[:12]} is whole, signed by {_signed_by(bundle)}; runs on {', '.join(usable)}", 2000))


@click.command("pack")
@_bundle_argument
@click.option("--out", "out_path", type=click.Path(path_type=Path, dir_okay=False), help="File to write. [default: NAME.spinebox]")
@click.option("--without-profile", is_flag=True, help=f"Leave {PROFILE} out: two compiles of the same inputs then give the same file.")
@json_option
@explained
def pack_(bundle_path: Path, out_path: Path | None, without_profile: bool, as_json: bool) -> None:
    """Write the single-file form of BUNDLE, with the same digest and signature; every command opens it as it is.

    The same folder gives the same bytes.
    """
    bundle = read_bundle(bundle_path)
    target = out_path or Path(f"{bundle.manifest['name']}.spinebox")
    pack(bundle, target, with_profile=not without_profile)
    _told(target, bundle, as_json)


@click.command("unpack")
@_bundle_argument
@click.option("--out", "out_path", required=True, type=click.Path(path_type=Path, file_okay=False), help="Folder to write.")
@json_option
@explained
def unpack_(bundle_path: Path, out_path: Path, as_json: bool) -> None:
    """Write the folder form of a .spinebox file, with the same digest and signature.

    Every path and digest is checked before the folder appears; nothing is left behind on failure.
    """
    bundle = read_bundle(bundle_path)
    unpack(bundle, out_path)
    _told(out_path, bundle, as_json)


def _told(target: Path, bundle: Bundle, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps({"path": str(target), "digest": bundle.digest}))
    else:
        say.print(f"{target}: {bundle.digest[:12]}", highlight=False, markup=False)


COMMANDS = (inspect, keygen, sign, verify, pack_, unpack_)
