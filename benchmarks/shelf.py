"""Measure a trained network of the shelf: `python -m benchmarks.shelf NAME ... --data DIR` -> models/shelf/runs/NAME.json.

The network stands in for the shipped family of its task: the same calibration images, the same held-out patients, the same
measures. INT8 is the compiler's own, in its quick form: one estimator of ranges for the whole network, nothing adjusted; where
that loses more than a point, the fewest layers that mend it on validation patients stay in float. Times are pairs with the shipped
family's INT8 engine on ONNX Runtime, interleaved in one process. `--shipped FAMILY` reads the same of the signed bundle.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from appliance import backends
from appliance.backends import Session, Signature
from appliance.bundle import open_bundle
from appliance.compiler import build, choice, families, gates, heatmap, quantise, search, xai
from appliance.compiler.build import Prepared
from appliance.compiler.cache import Cache, sha256
from appliance.compiler.signature import REFERENCE, signature_of
from appliance.compiler.subject import Array, MapSpec, Progress, Subject
from appliance.errors import SpineboxError
from benchmarks.macs import macs, parameters
from models import evaluate
from models.export import load_float32
from models.shelf.design import TASKS, Network, shelf
from models.shelf.export import export, save_untrained
from models.train import SEED

RUNS = Path(__file__).parent.parent / "models/shelf/runs"
TARGETS = ("onnxruntime", "openvino", "tflite")
IMAGES = 32  # of calibration
LATENCY_RUNS = 60
Opener = Callable[[], Session]
Openers = dict[str, tuple[Opener, int]]  # runtime -> how to open its engine, and the engine's bytes
EFFORT = xai.Effort(agreement=24, faithfulness=6, road=6, stability=6, randomised=4, transport=6)
EXACT = 1e-3  # of the largest logit: mean(cam) + b against the logit


@dataclass
class ShelfExaminer:
    """A family's examiner for a network whose head has a decoding of its own."""

    inner: families.FamilyExaminer
    entry: Network

    @property
    def source(self) -> str:
        return self.inner.source

    @property
    def identity(self) -> str:
        return self.inner.identity

    def scores(self, run: evaluate.Runner, progress: Progress | None = None) -> evaluate.Scores:
        if self.entry.decode is None:
            return self.inner.scores(run, progress)
        out = evaluate.evaluate_detector(run, self.inner.samples, progress, self.entry.decode)  # type: ignore[arg-type]
        out.source = self.source
        return out

    baseline = scores


def explained(model: Any, entry: Network) -> tuple[Any, MapSpec]:
    """The float graph with the map that its design declares. Raises GraphUnsupported where the head allows no such map."""
    design = entry.design
    if design.heatmap_output in design.outputs:
        # A map that the network gives out itself is the whole logit: nothing is added to its mean.
        bias = (0.0,) * len(design.spec.classes) if design.heatmap_kind == "cam" else None
        return model, MapSpec(design.heatmap_kind, design.heatmap_output, design.heatmap_layer, cam_bias=bias)
    return heatmap.attach(model, "classification", {"main": "logits"}, len(design.spec.classes))


@cache
def task_subject(family: str, root: Path | None) -> Subject:
    """The shipped family's Subject: its images are read once for all networks of a process."""
    return families.subjects(root, IMAGES, names=(family,))[0]


def stand_in(entry: Network, model: Any, root: Path | None) -> Subject:
    """The family's Subject with this network's float graph in it. `root` None: phantoms."""
    family = task_subject(entry.design.family, root)
    graph, spec = explained(model, entry)
    found = replace(
        family,
        name=entry.name,
        model=graph,
        heatmap=spec,
        source_sha256=sha256(model.SerializeToString(deterministic=True)),
        keep_float=heatmap.map_nodes(graph),
        confidence=None,
        card={},
    )
    for side in ("examiner", "validator"):
        inner = getattr(family, side)
        if inner is not None:
            setattr(found, side, ShelfExaminer(inner, entry))
    return found


def renamed(run: evaluate.Runner, entry: Network) -> evaluate.Runner:
    """What the family's explainer reads, under the name by which it asks."""
    own, asked = entry.design.heatmap_output, entry.design.spec.heatmap_output
    if own == asked or asked is None:
        return run

    def answer(feed: dict[str, Array]) -> dict[str, Array]:
        outputs = run(feed)
        return {**outputs, asked: outputs[own]}

    return answer


def residual(run: evaluate.Runner, spec: MapSpec, inputs: Sequence[Array]) -> float | None:
    """Largest |mean(cam) + b - logit| as a share of the largest logit; None for another kind of map."""
    if spec.kind != "cam" or spec.output is None or spec.cam_bias is None:
        return None
    worst = largest = 0.0
    for x in inputs:
        out = run({"image": x})
        said = out[spec.output].mean((2, 3)) + np.array(spec.cam_bias, np.float32)
        worst = max(worst, float(np.abs(said - out["logits"]).max()))
        largest = max(largest, float(np.abs(out["logits"]).max()))
    return worst / max(largest, 1e-9)


def opened(session: Session) -> Any:
    return closing(session)


class Measurement:
    """One network before every runtime; `record` is what the table is made from."""

    def __init__(self, subject: Subject, entry: Network | None, cache: Cache, say: Callable[[str], None]) -> None:
        self.subject, self.entry, self.cache, self.say = subject, entry, cache, say
        self.signature = signature_of(subject.model)
        self.float_blob: bytes = subject.model.SerializeToString(deterministic=True)
        self.few = search.spread(subject.calibration.inputs, subject.calibration.count, 8)

    def open_float(self) -> Session:
        return backends.load(REFERENCE).open(self.float_blob, self.signature, precision="f32", threads=0)

    def fp32(self) -> evaluate.Scores:
        self.say("measure FP32")
        with opened(self.open_float()) as session:
            scores = self.subject.examiner.baseline(session.run)
        scores.source = self.subject.examiner.source
        return scores

    def prepare(self) -> tuple[Prepared, list[tuple[str, float]]]:
        self.say("calibrate")
        subject = self.subject
        found = search.prepare_int8(
            subject.model, subject.calibration.inputs, keep_float=subject.keep_float, count=subject.calibration.count, effort="quick"
        )
        prepared = Prepared(
            subject.model, found.model, found.record.ranges, tuple(subject.keep_float), self.signature, subject.calibration.inputs,
            subject.calibration.root,
        )  # fmt: skip
        return prepared, found.record.ranking

    def reverts(self, prepared: Prepared, ranking: Sequence[tuple[str, float]]) -> frozenset[str]:
        """Layers that stay in float, chosen on validation patients; none where nothing helps or nobody can choose."""
        validator = self.subject.validator
        if validator is None:
            return frozenset()
        self.say("revert the fewest layers")
        with opened(self.open_float()) as session:
            before = validator.baseline(session.run)

        def passes(kept: frozenset[str]) -> bool:
            graph, _ = quantise.quantise(prepared.adjusted, prepared.ranges, keep_float=(*prepared.keep_float, *kept))
            blob = graph.SerializeToString(deterministic=True)
            with opened(backends.load(REFERENCE).open(blob, self.signature, precision="int8", threads=0)) as session:
                return gates.task_gate(before, validator.scores(session.run)).passed is not False

        return search.fewest_reverts(ranking, passes).keep or frozenset()

    def engines(self, openers: Openers, fp32: evaluate.Scores) -> dict[str, Any]:
        """Metric, fall against FP32 and gate of every engine."""
        out: dict[str, Any] = {}
        for target, (opener, size) in openers.items():
            self.say(f"measure {target}")
            try:
                with opened(opener()) as session:
                    scores = self.subject.examiner.scores(session.run)
                    left = residual(session.run, self.subject.heatmap, self.few)
            except SpineboxError as error:
                out[target] = {"failed": error.what}
                continue
            scores.source = fp32.source
            gate = gates.task_gate(fp32, scores)
            out[target] = {
                "metrics": [asdict(m) for m in scores.metrics],
                "drop": asdict(evaluate.paired_drop(fp32, scores)),
                "passed": gate.passed,
                "note": gate.note,
                "bytes": size,
                "cam_residual": left,
            }
        return out

    def card(self, opener: Opener) -> dict[str, Any] | None:
        explainer = self.subject.explainer
        if explainer is None:
            return None
        self.say("explain")
        held: list[Session] = []

        def open_float(blob: bytes) -> evaluate.Runner:
            held.append(backends.load(REFERENCE).open(blob, self.signature, precision="f32", threads=0))
            return self._as_asked(held[-1].run)

        try:
            with opened(self.open_float()) as float_session, opened(opener()) as session:
                found = xai.report_card(
                    explainer,
                    self._as_asked(float_session.run),
                    self._as_asked(session.run),
                    self.subject.heatmap,
                    model=self.subject.model,
                    open_float=open_float,
                    effort=EFFORT,
                )
        finally:
            for s in held:
                s.close()
        verdict = xai.heatmap_gate(found)
        return {"passed": verdict.passed, "note": verdict.note, "images": found.images, "patients": found.patients}

    def _as_asked(self, run: evaluate.Runner) -> evaluate.Runner:
        return run if self.entry is None else renamed(run, self.entry)


def timed_in_pairs(signature: Signature, openers: dict[str, Opener], reference: Opener, say: Callable[[str], None]) -> dict[str, Any]:
    """Each engine in a pair with the shipped one; `ratio` above 1: faster than the shipped one."""
    rng = np.random.default_rng(1)
    feed = {t.name: rng.uniform(-1, 1, t.shape).astype(np.float32) for t in signature.inputs}
    out: dict[str, Any] = {}
    for name, opener in openers.items():
        say(f"time {name}")
        pair = choice.time_pair(reference, opener, feed, LATENCY_RUNS)
        out[name] = {
            "ratio": pair.ratio, "ratio_p25": pair.ratio_p25, "ratio_p75": pair.ratio_p75, "latency_ms_p50": pair.b.median_ms,
            "reference_ms_p50": pair.a.median_ms,
        }  # fmt: skip
    return out


def build_all(prepared: Prepared, kept: Cache, say: Callable[[str], None]) -> tuple[Openers, dict[str, str]]:
    """(openers with sizes, reasons of those that cannot be built here)."""
    made: Openers = {}
    missing: dict[str, str] = {}
    for target in TARGETS:
        say(f"build {target}")
        try:
            built = build.build(target, prepared, kept)
            made[target] = (built.open, len(built.blob))
        except SpineboxError as error:
            missing[target] = f"{error.what}{f' ({error.value})' if error.value else ''}"
    return made, missing


def shipped_openers(family: str) -> Openers:
    """The engines of the shipped bundle that this machine can run, by runtime."""
    bundle = open_bundle()
    entry = bundle.engine(family)
    out: Openers = {}
    for made in entry.order():
        if made.backend in TARGETS and made.precision == "int8" and backends.probe(made.backend).available:
            blob = bundle.read(made.graph)
            out[made.backend] = (build.opener(made.backend, blob, entry.signature, made.precision), len(blob))
    return out


def _finish(
    m: Measurement, facts: dict[str, Any], engines: dict[str, Any], fp32: evaluate.Scores, openers: Openers, reference: Opener
) -> dict[str, Any]:
    timed = {t: openers[t][0] for t in engines if "failed" not in engines[t]}
    with opened(m.open_float()) as session:
        left = residual(session.run, m.subject.heatmap, m.few)
    return {
        **facts,
        "parameters": parameters(m.subject.model),
        "macs": macs(m.subject.model),
        "float_bytes": len(m.float_blob),
        "measured_on": m.subject.examiner.source,
        "fp32": [asdict(x) for x in fp32.metrics],
        "int8": engines,
        "heatmap": {
            "kind": m.subject.heatmap.kind,
            "layer": m.subject.heatmap.layer if m.entry is None else m.entry.design.heatmap_layer,
            "cam_residual_fp32": left,
            "card": m.card(openers[REFERENCE][0]) if REFERENCE in timed else None,
        },
        "latency": timed_in_pairs(
            m.signature, {"onnxruntime f32": m.open_float, **{f"{t} int8": o for t, o in timed.items()}}, reference, m.say
        ),
        "device": choice.this_device(TARGETS),
    }


def compiled(m: Measurement, facts: dict[str, Any], reference: Opener) -> dict[str, Any]:
    """The record of a network that is quantised here; times are ratios to `reference`. Raises what the compiler raises."""
    fp32 = m.fp32()
    prepared, ranking = m.prepare()
    openers, missing = build_all(prepared, m.cache, m.say)
    engines = m.engines(openers, fp32)
    kept: frozenset[str] = frozenset()
    plain: dict[str, Any] | None = None
    if engines.get(REFERENCE, {}).get("passed") is False:
        kept = m.reverts(prepared, ranking)
        if kept:
            plain = engines
            openers, missing = build_all(replace(prepared, keep_float=tuple(sorted({*prepared.keep_float, *kept}))), m.cache, m.say)
            engines = m.engines(openers, fp32)
    record = _finish(m, facts, engines, fp32, openers, reference)
    record["not_built"] = missing
    record["layers_in_float"] = {"kept": len(kept), "of": len(ranking)}
    if plain is not None:
        record["int8_before_reverts"] = plain
    return record


def measure(
    name: str, onnx_file: Path, facts: dict[str, Any], root: Path | None, kept: Cache, say: Callable[[str], None]
) -> dict[str, Any]:
    """The record of one network of the shelf, from its exported float graph."""
    entry = shelf()[name]
    m = Measurement(stand_in(entry, load_float32(onnx_file), root), entry, kept, say)
    return compiled(m, facts, shipped_openers(entry.design.family)[REFERENCE][0])


def cost(name: str, onnx_file: Path, facts: dict[str, Any], kept: Cache, timed: bool, say: Callable[[str], None]) -> dict[str, Any]:
    """The record of a network that is not trained yet: what it costs, and no word on how good it is. Ranges are of two phantoms.
    Without `timed` no times are in it: on a busy machine they would say nothing."""
    entry = shelf()[name]
    graph, spec = explained(load_float32(onnx_file), entry)
    signature, inputs = signature_of(graph), families.golden_inputs(entry.design.spec)
    ranges = quantise.measure_ranges(graph, inputs)
    prepared = Prepared(graph, graph, ranges, heatmap.map_nodes(graph), signature, lambda: iter(inputs), "two phantoms")
    openers, missing = build_all(prepared, kept, say)
    blob = graph.SerializeToString(deterministic=True)
    plain = build.opener(REFERENCE, blob, signature, "f32")
    residuals = {}
    for target, opener in {"fp32": plain, **{t: o for t, (o, _) in openers.items()}}.items():
        with opened(opener()) as session:
            residuals[target] = residual(session.run, spec, inputs)
    engines = {"onnxruntime f32": plain, **{f"{t} int8": o for t, (o, _) in openers.items()}}
    reference = shipped_openers(entry.design.family)[REFERENCE][0]
    return {
        **facts,
        "parameters": parameters(graph),
        "macs": macs(graph),
        "float_bytes": len(blob),
        "measured_on": None,
        "fp32": [],
        "int8": {t: {"metrics": [], "passed": None, "bytes": size, "cam_residual": residuals[t]} for t, (_, size) in openers.items()},
        "heatmap": {"kind": spec.kind, "layer": entry.design.heatmap_layer, "cam_residual_fp32": residuals["fp32"], "card": None},
        "latency": timed_in_pairs(signature, engines, reference, say) if timed else {},
        "device": choice.this_device(TARGETS),
        "not_built": missing,
    }


def shipped(family: str) -> dict[str, Any]:
    """The same record of a shipped family, read from the signed bundle: what its compile measured, nothing measured again.

    The bundle times every engine in a pair with FP32; a speed is the quotient of two such pairs.
    """
    bundle = open_bundle()
    entry, engines = bundle.manifest["models"][family], bundle.profile["models"][family]["engines"]
    model, _ = families.float_model(family)
    own = {t: e for t, e in entry["engines"].items() if t in TARGETS}
    by_ort = engines[f"{REFERENCE} int8"]["ratio"]
    latency = {
        f"{t} int8": {
            **{k: engines[f"{t} int8"][k] / by_ort for k in ("ratio", "ratio_p25", "ratio_p75")},
            "latency_ms_p50": engines[f"{t} int8"]["b"]["median_ms"],
        }
        for t in own
        if f"{t} int8" in engines
    }
    plain = {"ratio": 1 / by_ort, "ratio_p25": 1 / by_ort, "ratio_p75": 1 / by_ort}
    return {
        "network": f"shipped-{family}",
        "family": family,
        "weights_sha256": entry["source_sha256"],
        "bundle": bundle.digest,
        "parameters": parameters(model),
        "macs": macs(model),
        "float_bytes": len(model.SerializeToString(deterministic=True)),
        "measured_on": entry["metrics"]["source"],
        "fp32": entry["metrics"]["fp32"],
        "int8": {t: {"metrics": e["metrics"], "passed": e["passed"], "note": _refusal(e)} for t, e in own.items() if e["metrics"]},
        "heatmap": {**entry["heatmap"], "card": _verdict(own[REFERENCE], "heatmap")},
        "latency": {"onnxruntime f32": {**plain, "latency_ms_p50": engines[f"{REFERENCE} int8"]["a"]["median_ms"]}, **latency},
        "device": bundle.profile["device"],
    }


def _verdict(engine: dict[str, Any], gate: str) -> dict[str, Any] | None:
    return next(({"passed": v["passed"], "note": v["note"]} for v in engine["verdicts"] if v["gate"] == gate), None)


def _refusal(engine: dict[str, Any]) -> str:
    return "; ".join(v["note"] for v in engine["verdicts"] if v["passed"] is False)


def write(record: dict[str, Any], name: str, folder: Path = RUNS) -> Path:
    """Write a record, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f"{name}.part"
    part.write_text(json.dumps(gates._finite(record), indent=1, allow_nan=False) + "\n")
    return part.replace(folder / f"{name}.json")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.shelf", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("names", nargs="+", metavar="NAME", help="networks of the shelf, or families with --shipped")
    parser.add_argument("--data", type=Path, help="folder that holds lumbar_mri/; --untrained and --shipped need none")
    parser.add_argument("--work", type=Path, default=Path.home() / ".cache/spinebox/train/shelf", help="where the runs' folders lie")
    parser.add_argument("--run", help="name of the run's folder and of the record; default: the network")
    parser.add_argument("--depth", type=int, help="UNet++ only: answer at this depth")
    parser.add_argument("--untrained", action="store_true", help="what networks cost, with seeded weights, before they are trained")
    parser.add_argument("--no-times", action="store_true", help="with --untrained: leave the times out")
    parser.add_argument("--shipped", action="store_true", help="read the records of the shipped families of these names from the bundle")
    args = parser.parse_args(argv)
    known = TASKS if args.shipped else shelf()
    for name in args.names:
        if name not in known:
            parser.error(f"there is no {name}; there are {', '.join(sorted(known))}")
    if args.data is None and not (args.shipped or args.untrained):
        parser.error("measuring needs --data")
    for name in args.names:
        print(_measured(name, args), flush=True)
    return 0


def _measured(name: str, args: argparse.Namespace) -> Path:
    """Measure one network of the command line, and write its record."""

    def say(stage: str) -> None:
        print(f"{name}: {stage}", flush=True)

    nothing_kept = Cache(None)
    if args.shipped:
        return write(shipped(name), f"shipped-{name}")
    if args.untrained:
        return _cost(name, nothing_kept, not args.no_times, say)
    run = args.run or name
    facts = json.loads((args.work / run / "run.json").read_text())
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "float.onnx"
        export(name, args.work / run / "final.pt", target, **({"depth": args.depth} if args.depth else {}))
        record = measure(name, target, facts, args.data, nothing_kept, say)
    if args.depth:
        record["depth"], run = args.depth, f"{run}-depth-{args.depth}"
    return write(record, run)


def _cost(name: str, kept: Cache, timed: bool, say: Callable[[str], None]) -> Path:
    design = shelf()[name].design
    with tempfile.TemporaryDirectory() as folder:
        weights, target = Path(folder) / "seeded.pt", Path(folder) / "float.onnx"
        facts = {"network": name, "family": design.family, "start": design.start, "steps": 0}
        facts["weights_sha256"] = save_untrained(name, SEED, weights)
        export(name, weights, target)
        return write(cost(name, target, facts, kept, timed, say), name)


if __name__ == "__main__":
    raise SystemExit(main())
