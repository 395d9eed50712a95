"""Could the slip of L5 be measured without an outline of S1? Three places that might stand for S1's posterior upper corner, on phantoms.

`python -m benchmarks.sacral_corner` draws phantoms with slips of L5 and takes the corner from what the appliance has: where the
disc L5/S1 ends, where the top of the sacrum's box meets the end plate, where the canal lies behind it. Each is compared with the
phantom's closed form, from exact masks and boxes and through the shipped networks. docs/measurements.md says what follows.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from rich.table import Table

from appliance import backends
from appliance.bundle import open_bundle
from appliance.measurements import SLIP_FLOOR, Part, Scale, _find_plates, _Node, _ordered, _side_of_canal
from appliance.protocols import lumbar_mri as protocol
from kernels import mask as km
from kernels.corners import Field, Plate
from kernels.measure import meyerding
from kernels.nms import iou_matrix
from kernels.preprocess import letterbox, normalise
from models import detector, phantom, segmenter
from models.levels import name_levels

SEED = 9_700_000  # neither trained, tuned nor measured on
LEVELS = ("L2", "L3", "L4", "L5")
PLACES = ("end of the disc", "top of the sacrum's box", "canal, less its usual distance")


@dataclass(frozen=True)
class Seen:
    """What the appliance has of one phantom: named regions, the canal, the sacrum's box (x0, y0, x1, y1) in pixels."""

    mask: NDArray[np.uint8]
    parts: list[Part]
    sacrum: Any


def exact(truth: phantom.Truth) -> Seen:
    discs = km.discs(truth.mask)
    parts = []
    for label, regions, wanted in (("disc", discs, truth.discs), ("vertebra", km.bodies(truth.mask, discs), truth.vertebrae)):
        overlaps = iou_matrix(np.array([w.box_px for w in wanted], np.float32), np.array([c.box for c in regions], np.float32))
        parts += [Part((label, k), w.level, regions[int(row.argmax())]) for k, (w, row) in enumerate(zip(wanted, overlaps, strict=True))]
    return Seen(truth.mask, parts, truth.sacrum_box)


def through(sessions: dict[str, Any], image: NDArray[np.float32]) -> Seen | None:
    """None where no sacrum was found."""
    x, back = letterbox(normalise(image), detector.SPEC.input_hw)
    boxes = protocol._split(detector.decode(sessions["detector"].run({"image": x})), back)
    mask, _ = segmenter.decode(sessions["segmenter"].run({"image": x})["logits"], back)
    column = name_levels(boxes.discs, boxes.vertebrae, boxes.sacra, boxes.sacrum_scores)
    structures = protocol._structures(mask)
    parts = protocol._parts(column, protocol._regions(boxes, column, structures))
    return Seen(mask, parts, boxes.sacra[int(boxes.sacrum_scores.argmax())]) if len(boxes.sacra) else None


def slips(seen: Seen, truth: phantom.Truth) -> list[float] | None:
    """The slip of L5 in mm by each of PLACES; None where L5 or the disc below it was not measured."""
    scale = Scale.of(1.0, truth.spacing_mm, "patient")
    nodes = _ordered(seen.parts, scale.spacing)
    canal = Field(seen.mask == km.CANAL, scale.spacing)
    side = _side_of_canal(nodes, canal)
    for node in nodes:
        _find_plates(node, scale.spacing, side, seen.mask.shape)
    named: dict[str, _Node] = {n.part.level: n for n in nodes if n.part.level and n.quad}
    if not side or "L5" not in named or "L5/S1" not in named:
        return None
    above, plate = named["L5"].quad.lower, named["L5/S1"].quad.lower  # type: ignore[union-attr]
    usual = np.nanmedian([_to_canal(canal, named[n].quad.upper) for n in LEVELS if n in named])  # type: ignore[union-attr]
    to_top = (float(seen.sacrum[1]) * scale.spacing[0] - plate.middle[1]) / plate.direction[1]
    corners = (plate.back, plate.middle + to_top * plate.direction, plate.back + (_to_canal(canal, plate) - usual) * plate.direction)
    return [-float((above.back - corner) @ plate.direction) for corner in corners]


def _to_canal(canal: Field, plate: Plate) -> float:
    return float(canal.chords(plate.back[None], plate.direction, 60.0)[0, 0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--phantoms", type=int, default=60)
    parser.add_argument("--bundle", type=Path, default=None, help="the shipped one where none is named")
    args = parser.parse_args()
    bundle = open_bundle(args.bundle)
    sessions = {}
    for name in ("detector", "segmenter"):
        engine = bundle.engine(name)
        graph = bundle.read(engine.builds["onnxruntime"].graph)
        sessions[name] = backends.load("onnxruntime").open(graph, engine.signature, precision="int8", threads=0)
    found: dict[str, list[tuple[list[float], float, float]]] = {"exact masks and boxes": [], "networks": []}
    for i in track(range(args.phantoms), "phantoms", console=Console(stderr=True)):
        rng = np.random.default_rng(SEED + i)
        moved = float(rng.uniform(-5, 16)) if rng.uniform() < 0.67 else 0.0
        bent = phantom.Deformity({"L5/S1": moved} if moved else {}, {}, {})
        image, truth = phantom.draw(rng, weighting="T2" if i % 4 else "T1", hw=(512, 512), deformity=bent)
        disc = next(d for d in truth.discs if d.level == "L5/S1")
        for name, seen in (("exact masks and boxes", exact(truth)), ("networks", through(sessions, image))):
            measured = slips(seen, truth) if seen is not None else None
            if measured is not None:
                found[name].append((measured, disc.slip_mm, disc.slip_mm / disc.slip_percent * 100))
    table = Table(title=f"slip of L5, {args.phantoms} phantoms")
    for column in (
        "from",
        "corner",
        "measured",
        "bias mm",
        "MAE mm",
        "p95 mm",
        "mm lost per mm",
        "grade right",
        "slips missed",
        "none called one",
    ):
        table.add_column(column)
    for name, rows in found.items():
        true, length = (np.array([r[k] for r in rows]) for k in (1, 2))
        want = np.array([meyerding(s, SLIP_FLOOR) for s in true / length])
        for k, place in enumerate(PLACES):
            said = np.array([r[0][k] for r in rows])
            known = np.isfinite(said)
            off = (said - true)[known]
            got = np.array([meyerding(s, SLIP_FLOOR) for s in (said / length)[known]])
            real = want[known]
            shares = (float((got == real).mean()), float((got[real > 0] == 0).mean()), float((got[real == 0] > 0).mean()))
            lost = -float(np.polyfit(true[known], off, 1)[0])
            figures = [f"{v:.2f}" for v in (off.mean(), np.abs(off).mean(), np.percentile(np.abs(off), 95), lost)]
            table.add_row(name, place, f"{known.sum()} of {args.phantoms}", *figures, *(f"{v:.0%}" for v in shares))
    Console(width=170).print(table)


if __name__ == "__main__":
    main()
