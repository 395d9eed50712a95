"""How wrong the measurements are: against the exact truth of phantoms, against themselves, and against human outlines.

`python -m benchmarks.measurements` draws phantoms with slips, fractures and stenoses, and measures them twice: from their exact
masks (what the geometry costs) and through the shipped networks (what the appliance says). Each figure is compared with the
closed form of the phantom. The same phantoms, moved by parts of a pixel, turned and with more noise, give the repeatability.
With `--data` the network's outlines are compared with a radiologist's on held-out patients: bias and limits of agreement.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

from appliance.bundle import open_bundle
from appliance.engine import Engine
from appliance.errors import SpineboxError
from appliance.measurements import LUMBAR, Part, measure
from appliance.report import Measurement, Report
from appliance.study import Instance
from kernels import mask as km
from kernels.nms import iou_matrix
from models import data, phantom

SEED = 9_300_000  # far from any that trained or tuned
Values = dict[tuple[str, str], float]
NAMES = (
    "disc_height", "disc_height_index", "disc_height_anterior", "disc_height_middle", "disc_height_posterior", "disc_angle",
    "segment_angle", "slip", "slip_percent", "meyerding_grade", "canal_diameter", "vertebral_height_anterior",
    "vertebral_height_middle", "vertebral_height_posterior", "vertebral_height_ratio_anterior", "vertebral_height_ratio_middle",
    "vertebral_height_ratio_posterior", "wedge_angle", "height_loss", "genant_grade", "lumbar_lordosis",
    "canal_diameter_narrowest",
)  # fmt: skip
LEAST_IOU = 0.5


# -- truth ----------------------------------------------------------------------------------------------------------


def deformity(rng: np.random.Generator) -> phantom.Deformity:
    """A slip at one lumbar disc in two phantoms of three, a fracture and a stenosis in every other."""
    discs, bodies = ("L4/L5", "L3/L4", "L2/L3"), ("L4", "L3", "L2", "L1", "T12")
    slip, height, stenosis = {}, {}, {}
    if rng.uniform() < 0.67:
        slip[str(rng.choice(discs))] = float(rng.uniform(-5, 16))
    if rng.uniform() < 0.5:
        anterior = float(rng.uniform(0, 0.5))
        height[str(rng.choice(bodies))] = (anterior, float(rng.uniform(0, 0.45)) if rng.uniform() < 0.4 else 0.0)
    if rng.uniform() < 0.5:
        stenosis[str(rng.choice(discs))] = float(rng.uniform(1, 5))
    return phantom.Deformity(slip, height, stenosis)


def draw(index: int) -> tuple[NDArray[np.float32], phantom.Truth]:
    rng = np.random.default_rng(SEED + index)
    return phantom.draw(rng, weighting="T2" if index % 4 else "T1", hw=(512, 512), deformity=deformity(rng))


def truth_values(truth: phantom.Truth) -> Values:
    """(level, name) -> value by the definitions of docs/measurements.md, from the phantom's closed form."""
    out: Values = {}
    bodies = {v.level: v for v in truth.vertebrae}
    order = [v.level for v in truth.vertebrae]
    for i, v in enumerate(truth.vertebrae):
        front, middle, back = v.heights_mm
        for name, value in zip(("anterior", "middle", "posterior"), v.heights_mm, strict=True):
            out[v.level, f"vertebral_height_{name}"] = value
        ratios = [front / back, middle / back]
        beside = [truth.vertebrae[j].heights_mm[2] for j in (i - 1, i + 1) if 0 <= j < len(order)]
        if beside:
            ratios.append(back / float(np.mean(beside)))
        for name, value in zip(("anterior", "middle", "posterior"), ratios, strict=False):
            out[v.level, f"vertebral_height_ratio_{name}"] = value
        loss = max(0.0, 1 - min(ratios))
        out[v.level, "wedge_angle"] = v.wedge_deg
        out[v.level, "height_loss"] = 100 * loss
        out[v.level, "genant_grade"] = float(np.searchsorted([0.20, 0.25, 0.40 + 1e-12], loss, side="right"))
    for d in truth.discs:
        above, below = d.level.split("/")
        for name, value in zip(("anterior", "middle", "posterior"), d.heights_mm, strict=True):
            out[d.level, f"disc_height_{name}"] = value
        out[d.level, "disc_height"] = d.mean_height_mm
        beside = [float(np.mean(bodies[name].heights_mm)) for name in (above, below) if name in bodies]
        if beside:
            out[d.level, "disc_height_index"] = d.mean_height_mm / float(np.mean(beside))
        out[d.level, "disc_angle"], out[d.level, "segment_angle"] = d.angle_deg, d.segment_deg
        out[d.level, "canal_diameter"] = d.canal_mm
        if below != "S1":
            size = abs(d.slip_percent) / 100
            out[d.level, "slip"], out[d.level, "slip_percent"] = d.slip_mm, d.slip_percent
            out[d.level, "meyerding_grade"] = 0.0 if size < 0.08 else float(min(5, max(1, np.ceil(4 * size))))
    out["", "lumbar_lordosis"] = truth.lordosis_deg
    out["", "canal_diameter_narrowest"] = min((d.canal_mm for d in truth.discs if d.level in LUMBAR), default=np.nan)
    return out


# -- what is measured -----------------------------------------------------------------------------------------------


def named(measurements: Sequence[Measurement], level: str) -> Values:
    return {(level, m.name): m.value for m in measurements if m.name in NAMES}


def from_mask(mask: NDArray[np.uint8], spacing: tuple[float, float], levels: dict[str, Any]) -> Values:
    """Measurements of a mask whose structures are named by `levels`: {"L4/L5": box in pixels, "L5": box ...}."""
    discs = km.discs(mask)
    found = [("disc", c) for c in discs] + [("vertebra", c) for c in km.bodies(mask, discs)]
    parts = []
    for level, box in levels.items():
        label = "disc" if "/" in level else "vertebra"
        mine = [c for kind, c in found if kind == label]
        if not mine:
            continue
        overlap = iou_matrix(np.array([box], np.float32), np.array([c.box for c in mine], np.float32))[0]
        if overlap.max() >= LEAST_IOU:
            parts.append(Part((label, len(parts)), level, mine[int(overlap.argmax())]))
    one, whole = measure(parts, mask == km.CANAL, 1.0, spacing, "patient")
    out = named(whole.measurements, "")
    for part in parts:
        out |= named(one[part.key].measurements, part.level or "")
    return out


def levels_of(truth: phantom.Truth) -> dict[str, Any]:
    return {d.level: d.box_px for d in truth.discs} | {v.level: v.box_px for v in truth.vertebrae}


def from_report(report: Report) -> Values:
    out = named(report.measurements, "")
    for finding in report.findings:
        if finding.level:
            out |= named(finding.measurements, finding.level)
    return out


def instance(image: NDArray[np.float32], spacing: tuple[float, float], weighting: str | None) -> Instance:
    return Instance(image, spacing, "MR", "sagittal", weighting, "", "array", {}, "patient")


# -- against the truth, and against itself --------------------------------------------------------------------------


@dataclass(frozen=True)
class Moved:
    """A phantom moved by a fraction of a pixel, turned, and with more noise."""

    matrix: NDArray[np.float64]
    image: NDArray[np.float32]
    mask: NDArray[np.uint8]

    def box(self, box: Any) -> tuple[float, float, float, float]:
        """The same box around its moved centre: the turn is too small to change its shape."""
        x0, y0, x1, y1 = box
        x, y = self.matrix @ [(x0 + x1) / 2, (y0 + y1) / 2, 1.0]
        return (float(x) - (x1 - x0) / 2, float(y) - (y1 - y0) / 2, float(x) + (x1 - x0) / 2, float(y) + (y1 - y0) / 2)


def moved(image: NDArray[np.float32], mask: NDArray[np.uint8], rng: np.random.Generator) -> Moved:
    rows, columns = mask.shape
    matrix = np.asarray(cv2.getRotationMatrix2D((columns / 2, rows / 2), float(rng.uniform(-3, 3)), 1.0), np.float64)
    matrix[:, 2] += rng.uniform(-1, 1, 2)
    # Coordinates are pixel edges here and pixel centres in OpenCV.
    centred = matrix.copy()
    centred[:, 2] += matrix[:, :2] @ [0.5, 0.5] - 0.5
    image = cv2.warpAffine(image, centred, (columns, rows), flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE)
    noisy = image + np.float32(0.01 * np.percentile(image, 99.5)) * rng.standard_normal(image.shape, dtype=np.float32)
    planes = [cv2.warpAffine((mask == k).astype(np.float32), centred, (columns, rows), borderMode=cv2.BORDER_REPLICATE) for k in range(4)]
    return Moved(matrix, np.maximum(noisy, 0), np.argmax(planes, 0).astype(np.uint8))


def error_rows(pairs: Sequence[tuple[Values, Values]]) -> list[dict[str, Any]]:
    """(measured, truth) of each image -> one row for each measurement."""
    errors, offered = defaultdict(list), defaultdict(int)
    for found, truth in pairs:
        for key, value in truth.items():
            offered[key[1]] += 1
            if key in found:
                errors[key[1]].append(found[key] - value)
    rows = []
    for name in NAMES:
        e = np.array(errors[name])
        row: dict[str, Any] = {"name": name, "measured": len(e), "offered": offered[name]}
        if len(e):
            size = np.abs(e)
            row |= {
                "bias": float(e.mean()),
                "mae": float(size.mean()),
                "p95": float(np.percentile(size, 95)),
                "exact": float((size < 0.5).mean()),
            }
        rows.append(row)
    return rows


def repeatability_rows(series: Sequence[Sequence[Values]]) -> list[dict[str, Any]]:
    """Repeated measurements of each image -> the repeatability coefficient: 95 % of pairs differ by less (Bland and Altman, 1999)."""
    rows = []
    for name in NAMES:
        variances, weights, complete, seen = [], [], 0, 0
        for repeats in series:
            for key in {k for values in repeats for k in values if k[1] == name}:
                values = [v[key] for v in repeats if key in v]
                seen += 1
                complete += len(values) == len(repeats)
                if len(values) > 1:
                    variances.append(float(np.var(values, ddof=1)))
                    weights.append(len(values) - 1)
        row: dict[str, Any] = {"name": name, "structures": seen, "always_measured": complete}
        if variances:
            row["coefficient"] = 1.96 * float(np.sqrt(2 * np.average(variances, weights=weights)))
        rows.append(row)
    return rows


def agreement_rows(pairs: Sequence[tuple[Values, Values]]) -> list[dict[str, Any]]:
    """(network, human) of each image -> bias and 95 % limits of agreement."""
    both = defaultdict(list)
    network, human = defaultdict(int), defaultdict(int)
    for a, b in pairs:
        for key, value in a.items():
            network[key[1]] += 1
            if key in b:
                both[key[1]].append(value - b[key])
        for key in b:
            human[key[1]] += 1
    rows = []
    for name in NAMES:
        d = np.array(both[name])
        row: dict[str, Any] = {"name": name, "both": len(d), "network": network[name], "human": human[name]}
        if len(d) > 1:
            spread = 1.96 * float(d.std(ddof=1))
            row |= {
                "bias": float(d.mean()),
                "low": float(d.mean()) - spread,
                "high": float(d.mean()) + spread,
                "exact": float((np.abs(d) < 0.5).mean()),
            }
        rows.append(row)
    return rows


# -- real outlines --------------------------------------------------------------------------------------------------


def real_pairs(root: Path, engine: Engine, console: Console) -> tuple[list[tuple[Values, Values]], int]:
    """(network, human) measurements of every held-out slice with outlines, and the number of patients. Structures and their names
    are the engine's; the human outline that a box is about stands in for the network's."""
    spacings = {row["new_file_name"]: json.loads(row["PixelSpacing"].replace("[.", "[0.").replace(" .", " 0.")) for row in _scans(root)}
    test = data.split()["test"]
    files = [p for p in sorted((root / "lumbar_mri/t2space/images").glob("*.png")) if data.patient_of(p) in test]
    out, patients = [], set()
    for path in track(files, "held-out slices", console=console):
        row_mm, column_mm = spacings[path.stem.split("_slice")[0]]
        image = data.read_grey(path).astype(np.float32)
        human_mask = data.read_mask(root / "lumbar_mri/t2space/masks" / path.name)
        try:
            report = engine.run(instance(image, (row_mm, column_mm), "T2"))
        except SpineboxError:
            continue
        patients.add(data.patient_of(path))
        names = {(f.label, f.number): f.level or f"{f.label} {f.number}" for f in report.findings}
        network = named(report.measurements, "")
        for f in report.findings:
            network |= named(f.measurements, names[f.label, f.number])
        out.append((network, human_values(report, human_mask, (row_mm, column_mm))))
    return out, len(patients)


def human_values(report: Report, mask: NDArray[np.uint8], spacing: tuple[float, float]) -> Values:
    discs = km.discs(mask)
    regions = {"disc": discs, "vertebra": km.bodies(mask, discs)}
    parts = []
    for f in report.findings:
        mine = regions[f.label]
        if not mine:
            continue
        overlap = iou_matrix(np.array([f.box_px], np.float32), np.array([c.box for c in mine], np.float32))[0]
        if overlap.max() >= LEAST_IOU:
            parts.append(Part((f.label, f.number), f.level, mine[int(overlap.argmax())]))
    one, whole = measure(parts, mask == km.CANAL, 1.0, spacing, "patient")
    out = named(whole.measurements, "")
    for part in parts:
        out |= named(one[part.key].measurements, part.level or f"{part.key[0]} {part.key[1]}")
    return out


def _scans(root: Path) -> Iterator[dict[str, str]]:
    with (root / "lumbar_mri/scans.csv").open(newline="", encoding="utf-8") as file:
        yield from csv.DictReader(file)


# -- tables ---------------------------------------------------------------------------------------------------------


def unit_of(name: str) -> str:
    if "ratio" in name or name.endswith("index"):
        return ""
    if name.endswith(("angle", "lordosis")):
        return "deg"
    return "%" if name.endswith(("percent", "loss")) else "mm"


def _is_grade(name: str) -> bool:
    return name.endswith("grade")


def _figure(value: float, name: str) -> str:
    return f"{value:.3f}" if unit_of(name) == "" else f"{value:.2f}"


def error_table(mask: Sequence[dict[str, Any]], engine: Sequence[dict[str, Any]]) -> list[str]:
    lines = [
        "| measurement | unit | exact masks: measured | bias | MAE | p95 | networks: measured | bias | MAE | p95 |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for a, b in zip(mask, engine, strict=True):
        name = a["name"]
        cells = [f"`{name}`", "grade" if _is_grade(name) else unit_of(name) or "ratio"]
        for row in (a, b):
            cells.append(f"{row['measured']} of {row['offered']}")
            if "bias" not in row:
                cells += ["-"] * 3
            elif _is_grade(name):
                cells += [f"{100 * row['exact']:.0f} % right", "", ""]
            else:
                cells += [_figure(row[k], name) for k in ("bias", "mae", "p95")]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def repeatability_table(mask: Sequence[dict[str, Any]], engine: Sequence[dict[str, Any]]) -> list[str]:
    lines = ["| measurement | unit | exact masks | networks | measured every time |", "|---|---|---|---|---|"]
    for a, b in zip(mask, engine, strict=True):
        name = a["name"]
        cells = [_figure(r["coefficient"], name) if "coefficient" in r else "-" for r in (a, b)]
        unit = "grade" if _is_grade(name) else unit_of(name) or "ratio"
        lines.append(f"| `{name}` | {unit} | {cells[0]} | {cells[1]} | {b['always_measured']} of {b['structures']} |")
    return lines


def agreement_table(rows: Sequence[dict[str, Any]]) -> list[str]:
    lines = ["| measurement | unit | pairs | only network | only human | bias | limits of agreement |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        name = row["name"]
        if "bias" not in row:
            bias, limits = "-", "-"
        elif _is_grade(name):
            bias, limits = f"{100 * row['exact']:.0f} % the same", ""
        else:
            bias, limits = _figure(row["bias"], name), f"{_figure(row['low'], name)} to {_figure(row['high'], name)}"
        unit = "grade" if _is_grade(name) else unit_of(name) or "ratio"
        only = row["network"] - row["both"], row["human"] - row["both"]
        lines.append(f"| `{name}` | {unit} | {row['both']} | {only[0]} | {only[1]} | {bias} | {limits} |")
    return lines


def rewritten(text: str, tables: dict[str, list[str]]) -> str:
    """A page whose tables between `<!-- NAME -->` and `<!-- end -->` are these."""
    for name, lines in tables.items():
        head, mark, rest = text.partition(f"<!-- {name} -->\n")
        _, end, tail = rest.partition("<!-- end -->")
        if not mark or not end:
            raise ValueError(f"the page has no place for the table {name}")
        text = head + mark + "\n".join(lines) + "\n" + end + tail
    return text


# -- command --------------------------------------------------------------------------------------------------------


def run(count: int, repeats: int, root: Path | None, console: Console) -> dict[str, Any]:
    """Every figure as JSON. `repeats` phantoms are measured six times each."""
    mask_pairs, engine_pairs = [], []
    mask_series, engine_series = [], []
    refused = 0
    with Engine(open_bundle(), "onnxruntime") as engine:

        def answer(image: NDArray[np.float32], truth: phantom.Truth) -> Values:
            nonlocal refused
            try:
                return from_report(engine.run(instance(image, truth.spacing_mm, truth.weighting)))
            except SpineboxError:
                refused += 1
                return {}

        for i in track(range(count), "phantoms", console=console):
            image, truth = draw(i)
            known = truth_values(truth)
            mask_pairs.append((from_mask(truth.mask, truth.spacing_mm, levels_of(truth)), known))
            engine_pairs.append((answer(image, truth), known))
        for i in track(range(repeats), "repeats", console=console):
            image, truth = draw(count + i)
            rng = np.random.default_rng(SEED + count + i)
            variants = [moved(image, truth.mask, rng) for _ in range(6)]
            levels = levels_of(truth)
            mask_series.append([from_mask(v.mask, truth.spacing_mm, {n: v.box(b) for n, b in levels.items()}) for v in variants])
            engine_series.append([answer(v.image, truth) for v in variants])
        result: dict[str, Any] = {
            "phantoms": count,
            "repeated": repeats,
            "refused": refused,
            "bundle": engine.bundle.identity,
            "errors": {"mask": error_rows(mask_pairs), "engine": error_rows(engine_pairs)},
            "repeatability": {"mask": repeatability_rows(mask_series), "engine": repeatability_rows(engine_series)},
        }
        if root is not None:
            pairs, patients = real_pairs(root, engine, console)
            result["agreement"] = {"slices": len(pairs), "patients": patients, "rows": agreement_rows(pairs)}
    return result


def tables_of(result: dict[str, Any]) -> dict[str, list[str]]:
    out = {
        "errors": error_table(result["errors"]["mask"], result["errors"]["engine"]),
        "repeatability": repeatability_table(result["repeatability"]["mask"], result["repeatability"]["engine"]),
    }
    if "agreement" in result:
        out["agreement"] = agreement_table(result["agreement"]["rows"])
    return out


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.measurements", description=__doc__)
    parser.add_argument("--phantoms", type=int, default=120)
    parser.add_argument("--repeats", type=int, default=24, help="phantoms that are measured six times each")
    parser.add_argument("--data", type=Path, help="folder that holds lumbar_mri/: compare with human outlines of held-out patients")
    parser.add_argument("--out", type=Path, help="write every figure as JSON")
    parser.add_argument("--recorded", type=Path, help="take the figures from such a file instead of measuring")
    parser.add_argument("--page", type=Path, help="rewrite the tables of docs/measurements.md")
    args = parser.parse_args(argv)
    console = Console(stderr=True)
    result = json.loads(args.recorded.read_text()) if args.recorded else run(args.phantoms, args.repeats, args.data, console)
    if args.out:
        part = args.out.with_suffix(".part")
        part.write_text(json.dumps(result, indent=1) + "\n")
        part.replace(args.out)
    tables = tables_of(result)
    if args.page:
        args.page.write_text(rewritten(args.page.read_text(), tables))
    for name, lines in tables.items():
        print(f"\n{name}\n" + "\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
