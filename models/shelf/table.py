"""The shelf as a page and a picture, from the recorded runs alone: `python -m models.shelf.table` writes models/README.md and
docs/shelf.png.

A record is one JSON file below models/shelf/runs/, written by `python -m benchmarks.shelf`. A network without one has a row that
says so. Nothing here measures anything.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from models.crossval import command_of
from models.shelf.design import NOTHING, TASKS, Design, shelf

HERE = Path(__file__).parent
RUNS = HERE / "runs"
PAGE = HERE.parent / "README.md"
PICTURE = HERE.parent.parent / "docs/shelf.png"
RUNTIMES = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO", "tflite": "LiteRT"}
MAIN = {"grader": "Pfirrmann exact", "detector": "disc mAP50", "segmenter": "mean Dice"}
HEADS = {"grader": "Graders", "detector": "Detectors", "segmenter": "Segmenters"}
NEEDED = ("network", "family", "weights_sha256", "parameters", "macs", "measured_on", "fp32", "int8", "heatmap", "latency", "device")
STEADY = 1.5  # quartiles of the neighbouring ratios further apart than this: the machine was busy, and the median says nothing
MAX_RECORD_BYTES = 1 << 20
Record = Mapping[str, Any]


def records(folder: Path = RUNS) -> dict[str, Record]:
    """Every record by its file's name. Raises ValueError naming a file that is no record or of no network that is known."""
    out: dict[str, Record] = {}
    for path in sorted(folder.glob("*.json")):
        if path.stat().st_size > MAX_RECORD_BYTES:
            raise ValueError(f"{path.name}: too large for a record")
        found = json.loads(path.read_text())
        missing = [k for k in NEEDED if k not in found]
        if missing:
            raise ValueError(f"{path.name}: no record of a run, it lacks {', '.join(missing)}")
        network, family = found["network"], found["family"]
        known = network == f"shipped-{family}" if network not in shelf() else shelf()[network].design.family == family
        if family not in TASKS or not known:
            raise ValueError(f"{path.name}: there is no network {network} for {family}")
        out[path.stem] = found
    return out


def _metric(found: Sequence[Mapping[str, Any]] | None) -> str:
    """The first of the metrics, with its interval."""
    if not found:
        return "-"
    m = found[0]
    return f"{m['value']:.3f} [{m['low']:.3f}, {m['high']:.3f}]"


def _int8(record: Record, runtime: str) -> str:
    found = record["int8"].get(runtime)
    if found is None:
        return "not built"
    if "failed" in found:
        return "failed"
    if not found["metrics"]:
        return "builds"
    gate = {True: "", False: " (gate missed)", None: ""}[found["passed"]]
    return f"{_metric(found['metrics'])}{gate}"


def _ratio(record: Record, engine: str) -> str:
    found = record["latency"].get(engine)
    if found is None:
        return "-"
    return f"{found['ratio']:.2f}" if found["ratio_p75"] <= STEADY * found["ratio_p25"] else "unsteady"


def _count(value: float) -> str:
    return f"{value / 1e6:.2f} M" if value < 1e9 else f"{value / 1e9:.2f} G"


def _heatmap(kind: str, record: Record | None) -> str:
    card = (record or {}).get("heatmap", {}).get("card")
    if record is None or card is None:
        return f"{kind}, no card"
    said = {True: "card passed", False: "card failed", None: "card undecided"}[card["passed"]]
    return f"{kind}, {said}"


def _columns(record: Record) -> list[str]:
    return [
        _count(record["parameters"]),
        _count(record["macs"]),
        _metric(record["fp32"]),
        *(_int8(record, r) for r in RUNTIMES),
        _ratio(record, "onnxruntime f32"),
        *(_ratio(record, f"{r} int8") for r in RUNTIMES),
    ]


def _title(record: Record) -> str:
    network = record["network"]
    title = shelf()[network].design.title if network in shelf() else f"shipped {record['family']}"
    return f"{title}, depth {record['depth']}" if "depth" in record else title


def _budget(record: Record | None) -> str:
    if record is None or "steps" not in record:
        return "as its card says"
    if not record["steps"]:
        return "not yet trained"
    where = f" on {record['trained_on']}" if "trained_on" in record else ""
    return f"{record['steps']} steps, {record['seconds']:.0f} s{where}"


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [_row(head), _row("---" for _ in head), *(_row(r) for r in rows)]


def family_table(family: str, found: Mapping[str, Record]) -> list[str]:
    """Rows of one task: the shipped family, every network of the shelf, trained or not; the best FP32 first."""
    head = [
        "network", "starts from", "budget", "parameters", "MACs", f"{MAIN[family]}, FP32", *(f"INT8 {r}" for r in RUNTIMES.values()),
        "speed FP32", *(f"speed INT8 {r}" for r in RUNTIMES.values()), "heatmap",
    ]  # fmt: skip
    done, waiting = [], []
    for record in found.values():
        if record["family"] != family or "compression" in record:
            continue
        start = record.get("start", "ImageNet (its trunk)")
        start = "nothing" if start == NOTHING else "ImageNet (its trunk)"
        cells = [_title(record), start, _budget(record), *_columns(record), _heatmap(record["heatmap"]["kind"], record)]
        done.append((-(record["fp32"][0]["value"] or 0.0) if record["fp32"] else 1.0, cells))
    measured = {r["network"] for r in found.values() if "compression" not in r}
    for name, entry in shelf().items():
        design = entry.design
        if design.family == family and name not in measured:
            start = "nothing" if design.start == NOTHING else "ImageNet (its trunk)"
            blank = ["-"] * (len(head) - 4)
            waiting.append([design.title, start, "not yet trained", *blank, _heatmap(design.heatmap_kind, None)])
    return _table(head, [*(cells for _, cells in sorted(done, key=lambda d: (d[0], d[1][0]))), *waiting])


def compression_table(found: Mapping[str, Record]) -> list[str]:
    """Each compressed network below the one that it was made from."""
    rows = []
    steps = [r for r in found.values() if "compression" in r]
    for base in dict.fromkeys(r["compression"]["of"] for r in steps):
        family = [("as trained", found[base])] if base in found else []
        family += [(r["compression"]["step"], r) for r in steps if r["compression"]["of"] == base]
        for step, record in family:
            engine = record["int8"].get("onnxruntime", {})
            size = f"{engine['bytes'] / 1e6:.2f} MB" if "bytes" in engine else "-"
            cells = [_title(record), step, _count(record["parameters"]), _count(record["macs"]), _metric(record["fp32"])]
            rows.append([*cells, _int8(record, "onnxruntime"), size, _ratio(record, "onnxruntime int8"), _ratio(record, "openvino int8")])
    if not rows:
        return ["No compressed network has been measured yet."]
    head = ["network", "step", "parameters", "MACs", "FP32", "INT8 ONNX Runtime", "INT8 file", "speed ONNX Runtime", "speed OpenVINO"]
    return _table(head, rows)


def compression_commands(found: Mapping[str, Record]) -> list[str]:
    """The commands that make each compressed network again, in a block; nothing where none is measured."""
    steps = {name: r["compression"] for name, r in found.items() if "compression" in r}
    teachers = dict.fromkeys(t for c in steps.values() for t in c.get("teachers", ()))
    lines = [f"python -m models.crossval {command_of(t)}" for t in teachers]
    lines += [f"python -m models.compress {c['command']}" for c in steps.values() if "command" in c]
    measured = [f"python -m benchmarks.shelf {found[name]['network']} --run {name} --data DIR" for name in steps]
    return ["```", *lines, *measured, "```", ""] if steps else []


def _design_lines(name: str, design: Design, record: Record | None) -> list[str]:
    out = [f"### {design.title}", "", f"`models/shelf/{name}.py`. {design.paper}.", ""]
    out += [f"- {d}" for d in design.differences]
    note = f" ({design.heatmap_note})" if design.heatmap_note else ""
    out.append(f"- Heatmap: {design.heatmap_kind} of `{design.heatmap_layer}`{note}.")
    start = "nothing: there are no weights for one channel and this width" if design.start == NOTHING else design.start
    out.append(f"- Starts from {start}. Code: {design.licence}.")
    if record is not None and "seed" in record:
        out.append(
            f"- Seed {record['seed']}, batch {record['batch_size']}, learning rate {record['learning_rate']:g}; weights "
            f"`{record['weights_sha256'][:16]}`; layers kept in float: {record['layers_in_float']['kept']} of "
            f"{record['layers_in_float']['of']}."
        )
        card = record["heatmap"].get("card")
        if card is not None and card["passed"] is not True:
            out.append(f"- Report card of the heatmap: {card['note']}.")
    untrained = record is None or not record.get("steps", 1)
    if untrained:
        out.append("- Not yet trained.")
    for target, why in (record or {}).get("not_built", {}).items():
        out.append(f"- INT8 for {RUNTIMES[target]} was not built{' from untrained weights' if untrained else ''}: {why}.")
    for target, engine in (record or {}).get("int8", {}).items():
        if "failed" in engine:
            out.append(f"- INT8 on {RUNTIMES[target]} failed: {engine['failed']}.")
    steps = f" --steps {record['steps']}" if record is not None and record.get("steps") else ""
    out += [
        "",
        "```",
        f"python -m models.shelf.train {name} --data DIR --pseudo DIR{steps}",
        f"python -m benchmarks.shelf {name} --data DIR",
        "```",
        "",
    ]
    return out


INTRO = """# The model shelf

Light networks that reviews of the field name, on the tasks of the shipped families: the same batches, the same loss, the same budget
for every network of a task, the same unseen patients.
This page is written by `python -m models.shelf.table` from the records in `models/shelf/runs`; no figure in it was typed.

## How to read it

- Every metric is of the held-out patients of `models/split.json`, with a 95 % interval that resamples whole patients. Nothing was
  chosen on them.
- Every network of a task had the same number of steps; seconds are of a machine that it shared with other trainings. Detectors and
  segmenters of the shelf start from nothing, the shipped ones from ImageNet weights and learnt longer: that difference is in the
  tables beside the networks' own.
- INT8 is the compiler's quick form. Where the main metric falls by more than a point, the fewest layers that mend it on validation
  patients stay in float; "gate missed" says that a gate refused it even so.
- Speed is how many times as fast as the shipped family's INT8 engine on ONNX Runtime: both run interleaved in one process with two
  threads, median of the ratios of neighbouring runs. Above 1 is faster; "unsteady" where the quartiles are a factor of 1.5 apart.
- The row of a shipped family is read from the signed bundle: what its own compile measured. Its speeds are quotients of two pairs
  with FP32.
- A network that is not yet trained has its cost and no metric. "Builds" says that its INT8 engine was made and runs.
- MACs are multiply-accumulates of one inference at the family's input size.
- Pseudo-labels of detectors and segmenters come from the shipped segmenter (`python -m models.pseudo`).
- The heatmap's kind is its honest name: a "cam" adds up to the logit exactly, "class-evidence" is a dense head's own logits.
- Weights of these networks are not in the repository; the command below each network makes them again.
- Data: SPIDER lumbar spine MRI, CC BY 4.0 (van der Graaf et al., Scientific Data 2024, doi 10.1038/s41597-024-03090-w).
"""
CAVEAT = "Reported in the reviews, on other data, other splits and often by other definitions: what a reader expects, no comparison."


def page(found: Mapping[str, Record], literature: Sequence[Mapping[str, str]]) -> str:
    """The whole of models/README.md."""
    lines = [INTRO]
    devices = sorted({r["device"]["cpu"] for r in found.values() if r["latency"]})
    if devices:
        lines += [f"Times were measured on: {'; '.join(devices)}.", ""]
    if any(r["fp32"] for r in found.values()):
        lines += ["![accuracy against latency](../docs/shelf.png)", ""]
    for family, head in HEADS.items():
        lines += [f"## {head}", "", *family_table(family, found), ""]
        lines += [CAVEAT, ""]
        own = [r for r in literature if r["family"] == family]
        lines += [
            *_table(["task", "modality", "system", "reported"], ([r[k] for k in ("task", "modality", "system", "reported")] for r in own)),
            "",
        ]
    lines += ["## Compression", "", "Each step is one of the recipe's (`models/compress.py`), measured as the networks above.", ""]
    lines += [*compression_table(found), "", *compression_commands(found), "## The networks", ""]
    for name, entry in shelf().items():
        lines += _design_lines(name, entry.design, found.get(name))
    return "\n".join(lines).rstrip() + "\n"


def read_literature(path: Path = HERE / "literature.csv") -> list[dict[str, str]]:
    with path.open() as f:
        return list(csv.DictReader(f))


def draw(found: Mapping[str, Record], target: Path) -> None:
    """Main metric against latency, one panel a task; a line joins FP32 and INT8 of one network on ONNX Runtime."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    plain = {n: r for n, r in found.items() if "compression" not in r and r["fp32"]}
    shown = [f for f in HEADS if any(r["family"] == f for r in plain.values())]
    figure, panels = plt.subplots(1, len(shown), figsize=(5.6 * len(shown), 4.8), dpi=110, squeeze=False)
    colours = plt.get_cmap("tab10")
    for axes, family in zip(panels[0], shown, strict=True):
        own = sorted((r for r in plain.values() if r["family"] == family), key=_title)
        for i, record in enumerate(own):
            colour = "black" if record["network"].startswith("shipped") else colours(i % 10)
            # Of pairs, not in milliseconds: networks were measured on different days and loads.
            points = [(1 / record["latency"]["onnxruntime f32"]["ratio"], record["fp32"][0], "o", "none")]
            engine, timed = record["int8"].get("onnxruntime", {}), record["latency"].get("onnxruntime int8")
            if timed is not None:
                points.append((1 / timed["ratio"], engine["metrics"][0], "o", colour))
            axes.plot([p[0] for p in points], [p[1]["value"] for p in points], color=colour, linewidth=0.8, alpha=0.6)
            for k, (share, m, marker, face) in enumerate(points):
                spread = [[m["value"] - m["low"]], [m["high"] - m["value"]]]
                label = _title(record) if k == len(points) - 1 else None
                axes.errorbar(
                    share, m["value"], yerr=spread, fmt=marker, color=colour, markerfacecolor=face, capsize=2, elinewidth=0.8, label=label
                )
        axes.set_xlim(left=0)
        axes.set_xlabel("latency on ONNX Runtime, as a share of the shipped INT8")
        axes.set_ylabel(f"{MAIN[family]}, held-out patients")
        axes.set_title(f"{HEADS[family]}: hollow FP32, filled INT8", fontsize=10)
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncol=3)
    figure.tight_layout()
    figure.savefig(target)
    plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m models.shelf.table", description=__doc__)
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--picture", type=Path, default=PICTURE)
    args = parser.parse_args(argv)
    found = records()
    if any(r["fp32"] for r in found.values()):
        draw(found, args.picture)
    args.page.write_text(page(found, read_literature()))
    print(f"{args.page}: {len(found)} records")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
