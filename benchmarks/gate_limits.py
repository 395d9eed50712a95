"""What the limits of the heatmap gate were set on: each row of the card for good engines and for engines broken by degrees.

    python -m benchmarks.gate_limits FAMILY --data FOLDER [--held-out] [--images 40]

Limits are chosen on training patients; held-out ones are only reported. Without a folder, phantoms are measured. The broken
engines are real ones: the float graph with noise on the features that the map looks at, the INT8 graph with 16 levels for
each activation, with ranges clipped at their 95th percentile, and the map's convolution reading its channels in a wrong order.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from appliance import backends
from appliance.backends import Signature
from appliance.compiler import explainers, xai
from appliance.compiler.heatmap import attach_cam
from appliance.compiler.subject import MapSpec
from kernels import mask as km
from models import data, detector, evaluate, grader, segmenter
from models.evaluate import Crop, Runner, Slice
from models.export import WEIGHTS, load_float32
from models.family import Spec

SPECS: dict[str, Spec] = {m.SPEC.name: m.SPEC for m in (detector, segmenter, grader)}
NOISE = 0.20  # of each feature's value
NARROWED_BY = 17  # 256 levels to 16


def open_graph(graph: bytes, backend: str = "onnxruntime") -> Runner:
    return backends.load(backend).open(graph, Signature((), ()), precision="int8", threads=0).run


def open_exact(graph: bytes) -> Runner:
    """A Q/DQ graph computed as it is written: no fused integer kernel, so nothing saturates that the graph does not clip."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    names = [o.name for o in session.get_outputs()]
    return lambda feed: dict(zip(names, session.run(names, feed), strict=True))


def noisy(model: Any, output: str) -> bytes:
    """The float graph with NOISE times a standard normal multiplied onto the features that `output` is made from."""
    from onnx import ModelProto, helper, numpy_helper

    out = ModelProto()
    out.CopyFrom(model)
    place, maker = next((i, n) for i, n in enumerate(out.graph.node) if output in n.output)
    clean = maker.input[0]
    maker.input[0] = "noise.out"
    out.graph.initializer.append(numpy_helper.from_array(np.array(1.0, np.float32), "noise.one"))
    nodes = [
        helper.make_node("RandomNormalLike", [clean], ["noise.draw"], scale=NOISE, seed=1.0),
        helper.make_node("Add", ["noise.draw", "noise.one"], ["noise.factor"]),
        helper.make_node("Mul", [clean, "noise.factor"], ["noise.out"]),
    ]
    for offset, node in enumerate(nodes):
        out.graph.node.insert(place + offset, node)
    return bytes(out.SerializeToString())


def four_bit(quantised: Any) -> bytes:
    """The INT8 graph with 16 levels for each activation, over the same ranges."""
    from onnx import ModelProto, numpy_helper

    out = ModelProto()
    out.CopyFrom(quantised)
    tensors = {t.name: t for t in out.graph.initializer}
    done: set[str] = set()
    stored = set(tensors)
    for node in out.graph.node:
        if node.op_type != "QuantizeLinear" or node.input[0] in stored or node.input[1] in done or node.input[1] not in tensors:
            continue
        done.add(node.input[1])
        for name, change in ((node.input[1], lambda v: v * NARROWED_BY), (node.input[2], lambda v: np.round(v / NARROWED_BY))):
            values = numpy_helper.to_array(tensors[name])
            tensors[name].CopyFrom(numpy_helper.from_array(np.asarray(change(values), values.dtype).reshape(values.shape), name))
    return bytes(out.SerializeToString())


def training_samples(family: str, root: Path, detect: Runner, most: int) -> list[Crop] | list[Slice]:
    """Images of training patients, read as the held-out ones are."""
    train = data.split()["train"]
    if family != "grader":
        paths = [p for p in sorted((root / "lumbar_mri/t2space/images").glob("*.png")) if data.patient_of(p) in train]
        chosen = [paths[i] for i in explainers.pick([data.patient_of(p) for p in paths], most)]
        out = []
        for path in chosen:
            mask = data.read_mask(root / "lumbar_mri/t2space/masks" / path.name)
            boxes = np.array([c.box for c in km.discs(mask)], np.float32).reshape(-1, 4)
            out.append(Slice(path.name, data.patient_of(path), data.read_grey(path).astype(np.float32), mask, boxes))
        return out
    paths = [p for p in sorted((root / "lumbar_mri/midsagittal").glob("*_t2.png")) if data.patient_of(p) in train]
    crops: list[Crop] = []
    for path in (paths[i] for i in explainers.pick([data.patient_of(p) for p in paths], 2 * most)):
        patient = data.patient_of(path)
        table = data.gradings(root).get(patient, {})
        pixels = data.read_grey(path).astype(np.float32)
        boxes_found = evaluate.find_discs(detect, pixels)
        if table and len(boxes_found) == len(table):
            crops += [Crop(patient, pixels, b, table[i + 1]) for i, b in enumerate(boxes_found) if i + 1 in table]
    return crops


def variants(model: Any, quantised: Any, output: str, feeds: list[dict[str, Any]]) -> dict[str, Callable[[], Runner]]:
    whole = quantised.SerializeToString()
    wrong = xai.permuted(quantised, output)
    out: dict[str, Callable[[], Runner]] = {
        "INT8, as written": lambda: open_exact(whole),
        "INT8, ONNX Runtime": lambda: open_graph(whole),
        "INT8, OpenVINO": lambda: open_graph(whole, "openvino"),
        "20 % noise": lambda: open_graph(noisy(model, output)),
        "16 levels": lambda: open_exact(four_bit(quantised)),
        "clipped at p95": lambda: open_exact(xai.clipped(quantised, feeds, open_exact)),
    }
    if wrong is not None:
        out["permuted channels"] = lambda: open_exact(wrong)
    return out


def table(family: str, root: Path | None, held_out: bool, most: int, bundle: Path) -> str:
    """A Markdown table: a column for each engine, a row for each measure of the card."""
    import onnx

    spec = SPECS[family]
    detect = open_graph(load_float32(WEIGHTS / "detector.onnx").SerializeToString())
    model: Any = load_float32(WEIGHTS / f"{family}.onnx")
    bias: tuple[float, ...] | None = None
    if spec.heatmap_kind == "cam":
        model, cam_bias = attach_cam(model)
        bias = tuple(cam_bias)
    quantised = onnx.load(bundle / f"models/{family}/int8.onnx")
    samples: Any = evaluate.samples(family, root, detect) if root is None or held_out else training_samples(family, root, detect, most)
    explainer = explainers.family_explainer(family, samples, most)
    where = MapSpec(spec.heatmap_kind, spec.heatmap_output, spec.heatmap_layer, cam_bias=bias)
    feeds = [{"image": e.x} for e in explainer.samples()[:8]]
    fp32 = open_graph(model.SerializeToString())
    cards = {}
    for name, make in variants(model, quantised, str(spec.heatmap_output), feeds).items():
        first = name == "INT8, as written"
        effort = xai.Effort(agreement=most) if spec.task == "classification" else xai.Effort(most, 2, 8, 2, 2 if first else 1, 4)
        cards[name] = xai.report_card(explainer, fp32, make(), where, model=model if first else None, open_float=open_graph, effort=effort)
    first_card = next(iter(cards.values()))
    lines = [
        f"{family}: {first_card.images} inputs of {first_card.patients} patients, {first_card.undefined} maps without evidence",
        "",
        "| row | limit | " + " | ".join(cards) + " |",
        "|---|---|" + "---|" * len(cards),
    ]
    for i, row in enumerate(first_card.rows):
        sign = "≥" if row.at_least else "≤"
        cells = [_cell(c.rows[i]) for c in cards.values()]
        lines.append(f"| {row.name} | {sign} {row.limit:g} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "Controls: " + "; ".join(f"{c.name}: {'not made' if c.caught is None else len(c.caught)} rows" for c in first_card.controls),
    ]
    return "\n".join(lines)


def _cell(row: xai.Row) -> str:
    if row.value is None:
        return row.note if row.passed is False else "-"
    return f"{row.value:.3g}" if row.passed else f"**{row.value:.3g}**"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("family", choices=sorted(SPECS))
    parser.add_argument("--data", type=Path)
    parser.add_argument("--held-out", action="store_true")
    parser.add_argument("--images", type=int, default=40)
    parser.add_argument("--bundle", type=Path, default=WEIGHTS / "bundle")
    given = parser.parse_args()
    print(table(given.family, given.data, given.held_out, given.images, given.bundle))


if __name__ == "__main__":
    main()
