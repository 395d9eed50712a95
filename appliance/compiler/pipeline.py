"""The whole compile: three trained families in, one bundle out, or a refusal that says by how much.

For each family: attach the heatmap, choose and hash the calibration images, measure ranges once, quantise, prove that every
available runtime opens the graph, measure FP32 beside INT8 on held-out patients, refuse a drop above the limit, time FP32
against each engine in pairs, choose. The bundle's manifest holds what identifies it; `profile.json` beside it holds the
times of this machine, which are no part of its identity.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from appliance import backends, signing
from appliance.backends import Signature, Tensor
from appliance.bundle import Bundle, Writer, canonical, new_bundle, open_bundle
from appliance.compiler import modelcard, sbom
from appliance.compiler.heatmap import CAM, attach_cam
from appliance.compiler.quantise import measure_ranges, quantise
from appliance.compiler.verdict import Verdict
from appliance.errors import BackendUnavailable, GateRefused, GraphUnsupported
from benchmarks.harness import Pair, interleaved
from calibration import sets
from models import data, detector, evaluate, grader, phantom, segmenter
from models.export import WEIGHTS, load_float32
from models.family import Spec

FAMILIES: dict[str, Spec] = {m.SPEC.name: m.SPEC for m in (detector, segmenter, grader)}
TARGETS = ("onnxruntime", "openvino")
REFERENCE = "onnxruntime"
MAX_DROP = 0.01  # of Dice, mAP50 or accuracy
Say = Callable[[str, int, int], None]  # stage, done, total
Measure = Callable[[str, evaluate.Runner], evaluate.Scores]


@dataclass
class Row:
    """One line of the closing table: one engine of one family."""

    family: str
    engine: str
    precision: str
    megabytes: float
    metrics: list[evaluate.Metric] = field(default_factory=list)
    drop: float | None = None
    passed: bool | None = None
    pair: Pair | None = None
    chosen: bool = False


@dataclass
class Outcome:
    bundle: Bundle | None
    rows: list[Row]
    evaluated_on: str


def signature_of(model: Any) -> Signature:
    """Names and fixed shapes of a graph. Raises GraphUnsupported for a shape that is not fixed."""

    def tensor(value: Any) -> Tensor:
        dims = [d.dim_value for d in value.type.tensor_type.shape.dim]
        if not dims or any(d <= 0 for d in dims):
            raise GraphUnsupported(f"{value.name} has no fixed shape", value=dims)
        return Tensor(value.name, tuple(int(d) for d in dims))

    return Signature(tuple(tensor(v) for v in model.graph.input), tuple(tensor(v) for v in model.graph.output))


def _silent(stage: str, done: int, total: int) -> None:
    del stage, done, total


@dataclass
class _Job:
    """What every family of one compile shares."""

    root: Path | None
    images: int
    max_drop: float
    weights: Path
    say: Say
    latency_runs: int
    targets: list[str]
    writer: Writer
    detect: evaluate.Runner | None = None
    rows: list[Row] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    profile: dict[str, Any] = field(default_factory=lambda: {"device": {"cores": os.cpu_count()}, "models": {}})
    bill: list[sbom.Model] = field(default_factory=list)


def compile_bundle(
    out: Path,
    *,
    root: Path | None,
    images: int = 64,
    max_drop: float = MAX_DROP,
    weights: Path = WEIGHTS,
    name: str = "lumbar-mri",
    say: Say = _silent,
    latency_runs: int = 30,
    key: signing.PrivateKey | None = None,
) -> Outcome:
    """Compile `weights`/FAMILY.onnx into a bundle at `out`.

    `root` is the folder of the training data (calibration on training patients, gates on held-out ones); None calibrates
    and gates on phantoms, and the manifest says so. Signed with `key`, else the author's own.

    Raises GateRefused (with `rows` on the error) where a metric fell by more than `max_drop`, GraphUnsupported, KeyUnusable,
    CalibrationInvalid, BackendFailed. Nothing is left at `out` on failure.
    """
    targets = [t for t in TARGETS if backends.probe(t).available]
    if REFERENCE not in targets:
        raise BackendUnavailable("compiling needs ONNX Runtime as its FP32 reference", value=REFERENCE)
    with new_bundle(out) as writer:
        job = _Job(root, images, max_drop, weights, say, latency_runs, targets, writer)
        entries = {family: _compile_family(family, spec, job) for family, spec in FAMILIES.items()}
        if job.refused:
            error = GateRefused("; ".join(job.refused), value=f"limit {max_drop * 100:.1f} points")
            error.rows = job.rows
            raise error
        tools = {p: version(p) for p in ("onnx", "onnxruntime", "numpy")}
        writer.add("sbom.json", sbom.make(name, version("spinebox"), tools, job.bill))
        manifest = {"name": name, "spinebox": version("spinebox"), "models": entries, "max_drop": max_drop, "tools": tools}
        writer.finish({**manifest, "sbom": "sbom.json"}, key or signing.author_key(), job.profile)
    return Outcome(open_bundle(out), job.rows, "phantoms" if root is None else "held-out patients")


def _compile_family(family: str, spec: Spec, job: _Job) -> dict[str, Any]:
    """One family through every stage; its manifest entry. Fills `job` with rows, refusals and times."""
    job.say(f"{family}: attach heatmap", 0, 1)
    source = job.weights / f"{family}.onnx"
    model = load_float32(source)
    bias: list[float] | None = None
    if spec.heatmap_kind == "cam":
        model, bias = attach_cam(model)
    float_blob = model.SerializeToString()
    signature = signature_of(_with_cam_shape(model))
    reference = backends.load(REFERENCE).open(float_blob, signature, precision="f32", threads=0)
    if family == "detector":
        job.detect = reference.run

    job.say(f"{family}: choose calibration images", 0, 1)
    crops = _crop_items(job.root, job.detect, job.images) if family == "grader" and job.detect else []
    calibration = sets.make(spec, sets.select(job.root, job.images, crops), job.root)
    count = len(calibration.items)
    done = 0

    def one_more() -> None:
        nonlocal done
        done += 1
        job.say(f"{family}: measure ranges", done, count)

    ranges = measure_ranges(model, calibration.inputs(spec, job.root), one_more)
    job.say(f"{family}: quantise", 0, 1)
    quantised, float_share = quantise(model, ranges)
    blob = quantised.SerializeToString(deterministic=True)

    job.say(f"{family}: read evaluation images", 0, 1)
    samples = evaluate.samples(family, job.root, job.detect)

    def measure(label: str, run: evaluate.Runner) -> evaluate.Scores:
        return evaluate.evaluate(
            family, run, job.root, job.detect, lambda d, total: job.say(f"{family}: evaluate {label}", d, total), samples
        )

    fp32 = measure("FP32", reference.run)
    candidates = [_gate(family, target, blob, signature, fp32, measure, job) for target in job.targets]
    job.rows += [Row(family, REFERENCE, "f32", len(float_blob) / 1e6, fp32.metrics), *candidates]
    if "openvino" in job.targets:
        job.rows += [Row(family, "openvino", p, len(float_blob) / 1e6) for p in ("f32", "bf16")]
    for row in (r for r in job.rows if r.family == family and (r.engine, r.precision) != (REFERENCE, "f32")):
        job.say(f"{family}: time {row.engine} {row.precision}", 0, 1)
        row.pair = _time(float_blob, blob if row.precision == "int8" else float_blob, row, signature, job.latency_runs)

    passed = [r for r in candidates if r.passed]
    if not passed:
        return {}
    best = max(passed, key=lambda r: r.pair.ratio if r.pair else 0.0)
    best.chosen = True
    job.profile["models"][family] = _profile(job, family, best)
    add = job.writer.add
    graph = add(f"models/{family}/int8.onnx", blob)
    card_path = source.with_suffix(".json")
    card = json.loads(card_path.read_text()) if card_path.exists() else {}
    entry: dict[str, Any] = {
        "version": spec.version,
        "task": spec.task,
        "classes": list(spec.classes),
        "inputs": [{"name": t.name, "shape": list(t.shape)} for t in signature.inputs],
        "outputs": [{"name": t.name, "shape": list(t.shape)} for t in signature.outputs],
        "preprocess": {"fit": "disc crop" if family == "grader" else "letterbox", "input_hw": list(spec.input_hw)},
        "heatmap": {"kind": spec.heatmap_kind, "output": spec.heatmap_output, "layer": spec.heatmap_layer, "reason": ""},
        "cam_bias": bias,
        "float_share": round(float_share, 5),
        "source_sha256": hashlib.sha256(source.read_bytes()).hexdigest(),
        "calibration": {
            "manifest": add(f"calibration/{family}.csv", calibration.to_csv()),
            "record": add(f"calibration/{family}.ranges.json", canonical({k: list(v) for k, v in ranges.items()})),
            "root": calibration.root,
            "images": count,
            "source": "phantoms" if job.root is None else "training patients",
        },
        "golden": add(f"golden/{family}.npz", _golden(signature, reference.run)),
        "temperature": None,
        "metrics": {"source": fp32.source, "fp32": [asdict(m) for m in fp32.metrics]},
        "engines": {r.engine: _engine(r, fp32.main, job.max_drop, graph) for r in candidates},
    }
    as_json, as_markdown = modelcard.make(family, entry, card, job.max_drop)
    add(f"cards/{family}.md", as_markdown)
    job.bill.append(sbom.Model(family, spec.version, spec.task, entry["source_sha256"], {graph: hashlib.sha256(blob).hexdigest()}, card))
    return {**entry, "card": add(f"cards/{family}.json", as_json)}


def _engine(row: Row, main: str, max_drop: float, graph: str) -> dict[str, Any]:
    note = f"{main} fell by {(row.drop or 0) * 100:.2f} points"
    verdict = Verdict("task", row.passed, note, value=row.drop, limit=max_drop)
    return {
        "graph": graph,
        "precision": row.precision,
        "passed": row.passed,
        "verified": "ran on this machine",
        "metrics": [asdict(m) for m in row.metrics],
        "verdicts": [verdict.to_json()],
    }


def _profile(job: _Job, family: str, best: Row) -> dict[str, Any]:
    times: dict[str, Any] = {}
    losers = []
    for row in job.rows:
        if row.family != family or row.pair is None:
            continue
        times[f"{row.engine} {row.precision}"] = {
            "latency_ms_p50": row.pair.b.median_ms,
            "latency_ms_p99": row.pair.b.p99_ms,
            "reference_ms_p50": row.pair.a.median_ms,
            "ratio": row.pair.ratio,
            "ratio_p25": row.pair.ratio_p25,
            "ratio_p75": row.pair.ratio_p75,
            "runs": row.pair.b.runs,
        }
        if row is not best:
            why = "refused by its gates" if row.passed is False else "slower here" if row.passed else "float, measured for comparison"
            losers.append({"backend": row.engine, "precision": row.precision, "reason": why})
    choice = {"backend": best.engine, "precision": best.precision, "reason": "fastest here of those that passed"}
    return {"choice": choice, "losers": losers, "engines": times}


def _golden(signature: Signature, run: evaluate.Runner) -> bytes:
    """Inputs without a patient in them, of a fixed seed, and the float network's answers, every 16th value, as npz."""
    (tensor,) = signature.inputs
    x = (np.random.default_rng(7).integers(0, 256, tensor.shape).astype(np.float32) / 127.5 - 1).astype(np.float32)
    outputs = {f"output_{k}": v.reshape(-1)[::16].astype(np.float16) for k, v in run({tensor.name: x}).items()}
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, input=np.round((x + 1) * 127.5).astype(np.uint8), **outputs)
    return buffer.getvalue()


def _gate(family: str, target: str, blob: bytes, signature: Signature, fp32: evaluate.Scores, measure: Measure, job: _Job) -> Row:
    """Build for one runtime, measure on the same samples as FP32, and judge the drop of the family's main metric."""
    module = backends.load(target)
    session = module.open(module.build(blob), signature, precision="int8", threads=0)
    try:
        result = measure(f"{target} INT8", session.run)
    finally:
        session.close()
    drop = fp32[fp32.main].value - result[result.main].value
    if drop > job.max_drop:
        job.refused.append(f"{family} on {target}: {result.main} fell by {drop * 100:.2f} points")
    return Row(family, target, "int8", len(blob) / 1e6, result.metrics, drop, drop <= job.max_drop)


def _with_cam_shape(model: Any) -> Any:
    """Shape inference leaves the map's rows and columns symbolic in the declared output; the inferred one has them."""
    import onnx

    inferred = onnx.shape_inference.infer_shapes(model)
    by_name = {v.name: v for v in inferred.graph.value_info}
    for value in inferred.graph.output:
        if value.name == CAM:
            source = by_name.get(CAM, value)
            value.type.CopyFrom(source.type)
    return inferred


def _crop_items(root: Path | None, detect: evaluate.Runner, count: int) -> list[str]:
    """Items for a family that looks at discs: boxes that the FP32 detector finds on T2 images of training patients."""
    items: list[str] = []
    if root is None:
        for item in sets.select(None, max(4, count // 4)):
            seed = int(item.removeprefix("phantom:"))
            _, truth = phantom.draw(np.random.default_rng(seed))
            if truth.weighting == "T2":
                items += [f"{item}#{_text(d.box_px)}" for d in truth.discs]
        return items
    for path in sorted((root / "lumbar_mri/midsagittal").glob("*_t2*.png")):
        if data.patient_of(path) in data.split()["train"]:
            boxes = evaluate.find_discs(detect, data.read_grey(path).astype(np.float32))
            items += [f"midsagittal/{path.name}#{_text(b)}" for b in boxes]
    return items


def _text(box: tuple[float, ...]) -> str:
    return ",".join(f"{v:.1f}" for v in box)


def _time(reference: bytes, blob: bytes, row: Row, signature: Signature, runs: int) -> Pair:
    """FP32 on the reference runtime against one engine: two sessions in the process, nothing else."""
    rng = np.random.default_rng(1)
    feed = {t.name: rng.uniform(-1, 1, t.shape).astype(np.float32) for t in signature.inputs}
    a = backends.load(REFERENCE).open(reference, signature, precision="f32", threads=0)
    b = backends.load(row.engine).open(blob, signature, precision=row.precision, threads=0)
    try:
        return interleaved(lambda: a.run(feed), lambda: b.run(feed), runs)
    finally:
        a.close()
        b.close()
