"""The model card that travels in a bundle: what the trained model's own card says, and what became of it in INT8.

Hides the layout of the two forms, JSON for machines and Markdown for people; both say the same. Times are not in it: they belong
to a device.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import zip_longest
from typing import Any

from appliance import reliability
from appliance.bundle import canonical
from appliance.reliability import Bin, Reliability, percent
from appliance.report import DISCLAIMER

MAP_WORDS = {
    "cam": "class activation map: exact, its mean plus the bias is the logit",
    "grad-cam": "Grad-CAM through the head, in closed form",
    "class-evidence": "logits of the last convolution: where the network sees the class",
    "activation": "mean of the last features: where the network looks, whatever the class",
    "unavailable": "none",
}
_UNKNOWN = "not stated"


def make(name: str, entry: Mapping[str, Any], card: Mapping[str, Any], max_drop: float) -> tuple[bytes, bytes]:
    """JSON and Markdown of one model's card.

    `entry` is its entry in the manifest (`card` may be missing); `card` is the trained model's own card, of which `data`, `licence`,
    `trunk`, `split`, `limits` and `notes` are taken where they are there.
    """
    document = {
        "disclaimer": DISCLAIMER,
        "name": name,
        "version": entry["version"],
        "task": entry["task"],
        "classes": entry["classes"],
        "source_sha256": entry["source_sha256"],
        "data": card.get("data", _UNKNOWN),
        "licence": card.get("licence", _UNKNOWN),
        "trunk": card.get("trunk", ""),
        "split": card.get("split", _UNKNOWN),
        "limits": list(card.get("limits", [])),
        "notes": list(card.get("notes", [])),
        "preprocess": entry["preprocess"],
        "calibration": {k: entry["calibration"][k] for k in ("images", "root", "source")},
        "max_drop": max_drop,
        "metrics": entry["metrics"],
        "heatmap": entry["heatmap"],
        "temperature": entry["temperature"],
        "float_share": entry["float_share"],
        "engines": {b: {k: e[k] for k in ("precision", "passed", "verified", "metrics", "verdicts")} for b, e in entry["engines"].items()},
    }
    return canonical(document), _markdown(document).encode()


def _markdown(d: Mapping[str, Any]) -> str:
    split = d["split"]
    said = ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in split.items()) if isinstance(split, dict) else split
    lines = [f"# {_cell(d['name'])}, version {_cell(d['version'])}", "", f"**{d['disclaimer']}**", ""]
    lines += ["| | |", "|---|---|"]
    lines += _rows(
        [
            ("task", d["task"]),
            ("classes", ", ".join(d["classes"][:50]) + (f" and {len(d['classes']) - 50} more" if len(d["classes"]) > 50 else "")),
            ("training data", d["data"]),
            ("licence", d["licence"]),
            *([("trunk", d["trunk"])] if d["trunk"] else []),
            ("split", said),
            ("trained file", f"SHA-256 {d['source_sha256']}"),
            ("calibrated on", f"{d['calibration']['images']} images, {d['calibration']['source']}; root {d['calibration']['root']}"),
            ("measured on", d["metrics"]["source"]),
            ("weights left in float", f"{d['float_share']:.1%}"),
        ]
    )
    lines += ["", "## Limits", ""]
    lines += [f"- {_line(x)}" for x in d["limits"]] or ["- The author states none."]
    engines = sorted(d["engines"].items())
    heads = ["FP32", *[f"{b} {e['precision'].upper()}" for b, e in engines]]
    lines += ["", "## Metrics", "", "Value with its 95 % interval over patients; higher is better.", ""]
    lines += _table(["metric", *heads], _metric_rows([d["metrics"]["fp32"], *[e["metrics"] for _, e in engines]]))
    lines += ["", "## Gates", "", f"The largest loss allowed of the main metric is {d['max_drop'] * 100:g} points.", ""]
    lines += _table(
        ["engine", "state", "verified", "gates"],
        [[f"{b} {e['precision']}", state(e["passed"]), e["verified"], gates(e["verdicts"])] for b, e in engines],
    )
    heat = d["heatmap"]
    lines += ["", "## Heatmap", "", f"{heat['kind']}: {MAP_WORDS.get(heat['kind'], '')}."]
    if heat["layer"]:
        lines.append(f"It looks at the layer `{_line(heat['layer'])}`.")
    if heat["reason"]:
        lines.append(_line(heat["reason"]))
    for backend, engine in engines:
        for verdict in engine["verdicts"]:
            if verdict["gate"] == "heatmap":
                lines += ["", f"Report card on {backend}: {state(verdict['passed'])}. {_line(verdict['note'])}"]
                details = verdict.get("details") or {}
                lines += ["", *_table(["figure", "value"], [[k, _value(v)] for k, v in sorted(details.items())])] if details else []
    lines += _confidence(engines)
    if d["notes"]:
        lines += ["", "## Notes", "", *[f"- {_line(x)}" for x in d["notes"]]]
    return "\n".join(lines) + "\n"


def _confidence(engines: Iterable[tuple[str, Mapping[str, Any]]]) -> list[str]:
    """How far the percentages of each engine can be believed; nothing where no gate judged it.

    The bins are those of one engine, the first that passed: the JSON form has them all.
    """
    judged = [(f"{b} {e['precision'].upper()}", e, reliability.of_engine(e)) for b, e in engines]
    known = [(name, e, found) for name, e, found in judged if found.heads]
    if not known:
        return []
    lines = ["", "## Confidence", "", "Off by: expected calibration error, in points, with its 95 % interval over patients.", ""]
    heads = ["head", "engine", "temperature", "off by, before", "off by", "by chance up to", "answers"]
    lines += _table(heads, [row for name, _, found in known for row in _calibration_rows(name, found)])
    shown, found = next(((name, r) for name, e, r in known if e["passed"]), (known[0][0], known[0][2]))
    for head in found.heads:
        if head.after:
            lines += ["", f"{_line(head.name)} on {shown}, with 95 % intervals of what was right:", ""]
            lines += _table(["said", "right", "said before the temperature", "right"], _bin_rows(head.before, head.after))
    return [*lines, "", *[f"- {_line(words)}" for words in found.words], *([f"- No diagram: {found.reason}."] if found.reason else [])]


def _calibration_rows(name: str, found: Reliability) -> list[list[str]]:
    def points(share: reliability.Share) -> str:
        interval = f" [{100 * share.low:.1f}, {100 * share.high:.1f}]" if share.low is not None and share.high is not None else ""
        return f"{100 * share.value:.1f}{interval}"

    return [
        [h.name, name, f"{h.temperature:.2f}", points(h.error_before), points(h.error), f"{100 * h.chance:.1f}", f"{h.count} {h.samples}"]
        for h in found.heads
    ]


def _bin_rows(before: Iterable[Bin], after: Iterable[Bin]) -> list[list[str]]:
    """The two diagrams side by side, bin by bin; their bins need not be as many."""

    def row(b: Bin) -> list[str]:
        low, high = (100 * (x or 0.0) for x in (b.observed.low, b.observed.high))
        return [percent(b.confidence), f"{percent(b.observed.value)} [{low:.0f}, {high:.0f}] of {b.count}"]

    sides = [[row(b) for b in bins] for bins in (after, before)]
    return [[*a, *b] for a, b in zip_longest(*sides, fillvalue=["", ""])]


def state(passed: bool | None) -> str:
    """ "passed", "refused" or "not judged"."""
    return {True: "passed", False: "refused", None: "not judged"}[passed]


def gates(verdicts: Iterable[Mapping[str, Any]]) -> str:
    """Every gate with what it said, in one line."""
    return "; ".join(f"{v['gate']} {state(v['passed'])}" + (f" ({v['note']})" if v["passed"] is not True else "") for v in verdicts)


def _metric_rows(columns: list[list[Mapping[str, Any]]]) -> list[list[str]]:
    names = list(dict.fromkeys(m["name"] for column in columns for m in column))
    by_name = [{m["name"]: m for m in column} for column in columns]
    return [[name, *[interval(c.get(name)) for c in by_name]] for name in names]


def interval(metric: Mapping[str, Any] | None) -> str:
    """`0.912 [0.893, 0.930]`; empty where there is no metric."""
    if metric is None:
        return ""
    low, high = metric.get("low"), metric.get("high")
    return f"{metric['value']:.3f}" + (f" [{low:.3f}, {high:.3f}]" if low is not None and high is not None else "")


def _value(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else value if isinstance(value, str) else canonical(value).decode()


def _table(heads: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads), *[f"| {' | '.join(_cell(c) for c in row)} |" for row in rows]]


def _rows(pairs: list[tuple[str, Any]]) -> list[str]:
    return [f"| {k} | {_cell(v)} |" for k, v in pairs]


def _line(value: Any) -> str:
    return " ".join((value if isinstance(value, str) else canonical(value).decode()).split())


def _cell(value: Any) -> str:
    return _line(value).replace("|", "\\|")
