"""The whole compile: subjects in, one signed bundle out, or a refusal that names the gate.

For each model: prepare (equalise, calibrate, choose ranges, correct biases), build for every target, put every engine before
the gates; where none or not the first runtime's engine passes, revert the fewest layers to float and try again. Then time what passed, in
pairs, and choose. Every stage is kept by content (`cache`), so an interrupted compile goes on and a second one takes seconds.
The manifest holds what identifies the bundle; times and the choice lie beside it in its profile, because they are this
machine's.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from appliance import backends, signing
from appliance.backends import Session
from appliance.bundle import Bundle, Writer, canonical, new_bundle, open_bundle
from appliance.compiler import (
    adjust,
    alike,
    build,
    choice,
    confidence,
    families,
    gates,
    golden,
    modelcard,
    probe,
    quantise,
    ranges,
    sbom,
    search,
    xai,
)
from appliance.compiler.build import Built, Prepared
from appliance.compiler.cache import Cache, code_digest, sha256
from appliance.compiler.choice import Timed
from appliance.compiler.remembered import Remembered
from appliance.compiler.signature import REFERENCE, signature_of
from appliance.compiler.subject import Array, Subject
from appliance.compiler.verdict import Verdict, refusals
from appliance.errors import BackendFailed, BackendUnavailable, ConverterFailed, GateRefused, GraphUnsupported
from benchmarks.harness import Pair
from kernels import compare
from models import evaluate
from models.export import WEIGHTS

MAX_DROP = 0.01  # of Dice, mAP50 or accuracy
WIDER = 4  # times as many layers in float, where the fewest that the tuning images ask for were refused all the same
AIM = 0.8  # of the limit, where layers are reverted: the gate's images are others than those the reverts are chosen on
CLIPPED_ON = 8  # inputs that the deliberately bad calibration looks at
Say = Callable[[str, int, int], None]  # stage, done, total
Overall = Callable[[int, int], None]  # stages done, stages in all
# What a stage's answer depends on besides its inputs.
_QUANTISING: tuple[ModuleType, ...] = (adjust, probe, quantise, ranges, search)
_JUDGING: tuple[ModuleType, ...] = (compare, confidence, evaluate, gates, golden, xai)


def _silent(stage: str, done: int, total: int) -> None:
    del stage, done, total


def _quiet(done: int, total: int) -> None:
    del done, total


@dataclass(frozen=True)
class Order:
    """How to compile. `targets` None: every one that can be built here, `without` excepted; named ones must all succeed. `key`
    None: this machine's author key."""

    max_drop: float = MAX_DROP
    targets: tuple[str, ...] | None = None
    without: tuple[str, ...] = ()
    cache: Cache = field(default_factory=lambda: Cache(None))
    say: Say = _silent
    overall: Overall = _quiet
    key: Path | None = None
    latency_runs: int = 40
    profile_runs: int = 200
    effort: xai.Effort | None = None  # None: as the size of the input suggests


@dataclass
class Row:
    """One line of the closing table: one engine of one model, or (float) what it is held against. `drop` is a share of the main
    metric; `passed` None says that no gate judged it on its own device."""

    model: str
    target: str
    precision: str
    megabytes: float
    metrics: list[evaluate.Metric] = field(default_factory=list)
    drop: float | None = None
    passed: bool | None = None
    note: str = ""
    pair: Any = None
    chosen: bool = False


@dataclass(frozen=True)
class Outcome:
    bundle: Bundle
    rows: list[Row]
    evaluated_on: str


@dataclass(frozen=True)
class Examined:
    """What the gates said of one engine, and its golden inputs as a file."""

    metrics: list[dict[str, Any]]
    verdicts: list[Verdict]
    temperature: dict[str, Any] | None
    golden: bytes
    passed: bool | None


# -- what may be compiled -----------------------------------------------------------------------------------------------


def compile_families(
    out: Path,
    root: Path | None,
    order: Order,
    *,
    images: int = 64,
    weights: Path = WEIGHTS,
    name: str = "lumbar-mri",
    names: Sequence[str] = tuple(families.LUMBAR),
) -> Outcome:
    """The trained families of `weights`. `root` is the folder of the training data (calibration on training patients, gates on
    held-out ones); None calibrates and gates on phantoms, and the manifest says so. Raises as `compile_subjects`, ModelInvalid."""
    order.say("read the trained models and their images", 0, 1)
    return compile_subjects(out, families.subjects(root, images, weights, names), order, name)


def compile_model(
    out: Path,
    model: Path,
    card: Path | None,
    calibration: Path | None,
    evaluation: Path | None,
    order: Order,
    *,
    name: str | None = None,
    images: int = 64,
) -> Outcome:
    """A stranger's ONNX file, by its card or, without one, by the card that its graph suggests. Raises as `compile_subjects`,
    ModelInvalid, CardInvalid, GraphUnsupported."""
    from appliance.compiler import card as cards
    from appliance.compiler import foreign

    order.say("read the model", 0, 1)
    described = cards.read_card(card) if card is not None else None
    subject = foreign.subject(model, described, calibration, evaluation, images=images)
    return compile_subjects(out, [subject], order, name or subject.name)


def compile_subjects(out: Path, subjects: Sequence[Subject], order: Order, name: str) -> Outcome:
    """Compile into one bundle at `out`, signed.

    Raises GateRefused (with `rows`) where a model has no engine that passed, or a target that was named did not pass;
    BackendUnavailable where a named target cannot be built here; CalibrationInvalid, GraphUnsupported, ConverterFailed,
    BackendFailed, KeyUnusable, CompileDiskFull. Nothing is left at `out` on failure.
    """
    for target in order.targets or ():
        if reason := build.buildable(target):
            raise BackendUnavailable(f"{target} engines cannot be built here: {reason}", value=target)
    if reason := build.buildable(REFERENCE):
        raise BackendUnavailable("compiling needs ONNX Runtime as its FP32 reference", value=reason)
    wanted = [t for t in build.TARGETS if t not in order.without] if order.targets is None else order.targets
    asked = {t: "not asked for" if t not in wanted else build.buildable(t) for t in build.TARGETS}
    missing = {t: reason for t, reason in asked.items() if reason is not None}
    targets = [t for t in build.TARGETS if t not in missing]
    key = signing.load_private(order.key) if order.key is not None else signing.author_key()
    steps = Steps(order, len(subjects) * (3 + 2 * len(targets)))
    rows: list[Row] = []
    with new_bundle(out) as writer:
        entries: dict[str, Any] = {}
        profiles: dict[str, Any] = {}
        bill: list[sbom.Model] = []
        refused: list[str] = []
        built_all: list[Built] = []
        for subject in subjects:
            with closing(Compile(subject, order, targets, missing, steps)) as one:
                one.run()
                rows += one.rows
                built_all += one.built.values()
                refused += one.refused
                if not one.refused:
                    entries[subject.name], bill_entry = one.write(writer, order.max_drop)
                    bill.append(bill_entry)
                    profiles[subject.name] = one.profile
        if refused:
            error = GateRefused("; ".join(refused), value=f"limit {order.max_drop * 100:.1f} points")
            error.rows = rows
            raise error
        tools = {p: version(p) for p in ("onnx", "onnxruntime", "numpy", "opencv-python-headless")}
        for built in built_all:
            if built.runs_here and built.target not in tools:
                tools[built.target] = backends.probe(built.target).version or "unknown"
        writer.add("sbom.json", sbom.make(name, version("spinebox"), tools, bill))
        manifest = {"name": name, "spinebox": version("spinebox"), "models": entries, "max_drop": order.max_drop, "tools": tools}
        device = choice.this_device([b.target for b in built_all if b.runs_here])
        writer.finish({**manifest, "sbom": "sbom.json"}, key, {"device": device, "models": profiles})
    sources = sorted({s.examiner.source for s in subjects})
    return Outcome(open_bundle(out), rows, ", ".join(sources))


class Steps:
    """Counts stages, for the bar that says how much of the whole is done."""

    def __init__(self, order: Order, total: int) -> None:
        self._order, self._done, self._total = order, 0, total

    def done(self) -> None:
        self._done += 1
        self._total = max(self._total, self._done)
        self._order.overall(self._done, self._total)


# -- one model ----------------------------------------------------------------------------------------------------------


class Compile:
    """One subject through every stage. `run` fills `rows`, `refused`, `built`, `examined` and `profile`; `write` puts it into a
    bundle."""

    def __init__(self, subject: Subject, order: Order, targets: Sequence[str], missing: Mapping[str, str], steps: Steps) -> None:
        self.subject, self.order, self.targets, self.missing, self.steps = subject, order, targets, missing, steps
        self.signature = signature_of(subject.model)
        self.input_name = self.signature.inputs[0].name
        self.float_blob: bytes = subject.model.SerializeToString(deterministic=True)
        self.rows: list[Row] = []
        self.refused: list[str] = []
        self.built: dict[str, Built] = {}
        self.examined: dict[str, Examined] = {}
        self.failed: dict[str, str] = {}  # target -> why it could not be built
        self.reverts: dict[str, Any] | None = None
        self.profile: dict[str, Any] = {}
        self._open: list[Session] = []

    def close(self) -> None:
        for session in self._open:
            session.close()

    def _say(self, stage: str) -> Callable[[int, int], None]:
        label = f"{self.subject.name}: {stage}"
        self.order.say(label, 0, 1)
        return lambda done, total: self.order.say(label, done, total)

    # -- what stages share

    def open_float(self, blob: bytes) -> Session:
        session = backends.load(REFERENCE).open(blob, self.signature, precision="f32", threads=0)
        self._open.append(session)
        return session

    @cached_property
    def reference(self) -> Session:
        return Remembered(self.open_float(self.float_blob))

    @cached_property
    def fp32(self) -> evaluate.Scores:
        return self.subject.examiner.baseline(self.reference.run, self._say("evaluate FP32"))

    @cached_property
    def _float_key(self) -> dict[str, Any]:
        return {
            "float": sha256(self.float_blob),
            "examiner": self.subject.examiner.identity,
            "resamples": evaluate.RESAMPLES,
            "runtime": backends.probe(REFERENCE).version,
            "code": code_digest(*_JUDGING),
        }

    @cached_property
    def fp32_metrics(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.order.cache.json("fp32", self._float_key, lambda: [asdict(m) for m in self.fp32.metrics])
        return found

    # -- stages

    def run(self) -> None:
        base = self.prepare()
        self.steps.done()
        self._build_and_examine(base)
        if self._reverts_wanted() and (self.subject.validator or self.subject.tuner) and self._int8_here():
            reverted = self._fewest_reverts(base)
            while reverted:
                self._build_and_examine(self._with_float(base, reverted))
                reverted = self._wider(reverted) if self._reverts_wanted() else frozenset()
        self._judge()
        if not self.refused:
            self._time()
        self.steps.done()

    @cached_property
    def _prepared_key(self) -> dict[str, Any]:
        return {
            "float": sha256(self.float_blob),
            "calibration": self.subject.calibration.root,
            "keep_float": sorted(self.subject.keep_float),
            "runtime": backends.probe(REFERENCE).version,
            "code": code_digest(*_QUANTISING),
        }

    def prepare(self) -> Prepared:
        """Ranges, equalised weights and corrected biases; one record for every target."""
        import onnx

        subject = self.subject
        progress = self._say("calibrate")

        def make() -> dict[str, bytes]:
            found = search.prepare_int8(
                subject.model, subject.calibration.inputs, progress, keep_float=subject.keep_float, count=subject.calibration.count
            )
            # The bins served to draw the ranges; a bundle carries what was drawn.
            record = canonical(found.record.to_json(bins=False))
            ranges = canonical({name: list(r) for name, r in found.record.ranges.items()})
            model, plain = (m.SerializeToString(deterministic=True) for m in (found.model, found.uncorrected))
            return {"model": model, "uncorrected": plain, "record": record, "ranges": ranges, "report": canonical(found.report)}

        parts = self.order.cache.parts("prepare", self._prepared_key, make)
        self.record_blob, self.report = parts["record"], json.loads(parts["report"])
        self.ranking = [(str(name), float(loss)) for name, loss in json.loads(parts["record"])["ranking"]]
        drawn = {name: (float(low), float(high)) for name, (low, high) in json.loads(parts["ranges"]).items()}
        adjusted, self.uncorrected = (onnx.load_model_from_string(parts[k]) for k in ("model", "uncorrected"))
        return Prepared(
            subject.model, adjusted, drawn, tuple(subject.keep_float), self.signature, subject.calibration.inputs,
            subject.calibration.root,
        )  # fmt: skip

    def _build_and_examine(self, prepared: Prepared) -> None:
        for target in self.targets:
            self._say(f"build {target}")
            try:
                self.built[target] = build.build(target, prepared, self.order.cache)
                self.steps.done()
                self.examined[target] = self.examine(self.built[target])
            except (ConverterFailed, GraphUnsupported, BackendFailed) as error:
                # A graph that one converter or runtime does not take costs that target, unless it was asked for by name.
                if self.order.targets is not None or target == REFERENCE:
                    raise
                self.failed[target] = f"{error.what}{f' ({error.value})' if error.value else ''}"
                self.built.pop(target, None)
            self.steps.done()

    def examine(self, built: Built) -> Examined:
        """One engine before every gate. Kept by the bytes of the engine, of the float graph and of the evaluation."""
        key = {
            **self._float_key,
            "engine": built.sha256,
            "target": built.target,
            "on": built.examined_on,
            "engine_runtime": backends.probe(built.target).version,
            "max_drop": self.order.max_drop,
            "fitted_on": self.subject.fitted_on,
            "effort": asdict(self.order.effort) if self.order.effort else None,
            "golden": sha256(b"".join(np.ascontiguousarray(x).tobytes() for x in self.subject.golden)),
        }
        parts = self.order.cache.parts("examine", key, lambda: self._judged(built))
        said = json.loads(parts["said"])
        verdicts = [Verdict(**v) for v in said["verdicts"]]
        refusing = any(v.passed is False for v in verdicts)
        # An engine that its own device never ran may be refused here, but not passed.
        passed = False if refusing else True if built.runs_here else None
        temperatures = next((v.details.get("temperatures") for v in verdicts if v.gate == "confidence"), None)
        return Examined(said["metrics"], verdicts, temperatures, parts["golden"], passed)

    def _judged(self, built: Built) -> dict[str, bytes]:
        subject, name = self.subject, f"{built.target} {built.precision}"
        with closing(Remembered(built.open())) as session:
            progress = self._say(f"evaluate {name}")
            scores = subject.examiner.scores(session.run, progress)
            scores.source = subject.examiner.source
            verdicts = [gates.task_gate(self.fp32, scores, self.order.max_drop)]
            self._say(f"explain {name}")
            verdicts.append(self._heatmap(built, session))
            self._say(f"confidence {name}")
            if subject.confidence is not None:
                verdicts.append(subject.confidence(self.reference.run, session.run))
            self._say(f"golden inputs of {name}")
            file = self._golden(built, session)
            verdicts.append(golden.check(file, session.run))
            verdicts.append(self._parity(built, session))
        said = {
            "metrics": [asdict(m) for m in scores.metrics],
            "verdicts": [v.to_json() for v in verdicts],
        }
        return {"said": canonical(said), "golden": file.to_bytes()}

    def _heatmap(self, built: Built, session: Session) -> Verdict:
        spec = self.subject.heatmap
        if self.subject.explainer is None or spec.output is None:
            return Verdict("heatmap", None, spec.reason or f"no inputs were given on which a map of kind {spec.kind} can be judged")
        card = xai.report_card(
            self.subject.explainer,
            self.reference.run,
            session.run,
            spec,
            input_name=self.input_name,
            model=self.subject.model,
            open_float=lambda blob: self.open_float(blob).run,
            bad_engines=self._badly_calibrated(built),
            effort=self.order.effort,
        )
        return xai.heatmap_gate(card)

    def _badly_calibrated(self, built: Built) -> dict[str, evaluate.Runner]:
        """A really broken engine for the card to fail, where the graph is one that can be broken: activations clipped at their
        95th percentile."""
        import onnx

        if built.path != "int8.onnx" or self.subject.explainer is None:
            return {}

        def exact(blob: bytes) -> evaluate.Runner:
            session = backends.load(REFERENCE).open(blob, self.signature, precision="as-written", threads=0)
            self._open.append(session)
            return session.run

        feeds = [{self.input_name: s.x} for s in self.subject.explainer.samples()[:CLIPPED_ON]]
        return {"clipped at p95": exact(xai.clipped(onnx.load_from_string(built.blob), feeds, exact))} if feeds else {}

    def _golden(self, built: Built, session: Session) -> Any:
        """The tolerance is that of the graph computed as it is written, where ONNX Runtime can do that; else of this engine."""
        if built.path.endswith(".onnx"):
            with closing(backends.load(REFERENCE).open(built.blob, self.signature, precision="as-written", threads=0)) as exact:
                return golden.make(self.subject.golden, self.reference.run, exact.run, target=built.target, input_name=self.input_name)
        return golden.make(self.subject.golden, self.reference.run, session.run, target=built.target, input_name=self.input_name)

    def _parity(self, built: Built, session: Session) -> Verdict:
        feeds = [{self.input_name: x} for x in self.subject.golden]
        reference = [self.reference.run(f) for f in feeds]
        answers = {built.target: [session.run(f) for f in feeds]}
        return gates.parity(answers, reference, {built.target: built.precision})

    # -- mixed precision

    def _int8_here(self) -> bool:
        return any(b.runs_here and b.precision == "int8" for b in self.built.values())

    def _passed(self) -> list[str]:
        return [t for t, e in self.examined.items() if e.passed]

    def _reverts_wanted(self) -> bool:
        """Where nothing passed, and where the graph of the runtime that every device has was refused: LiteRT alone serves few."""
        first = self.examined.get(REFERENCE)
        return not self._passed() or (first is not None and first.passed is False)

    def _fewest_reverts(self, base: Prepared) -> frozenset[str]:
        """Layers to keep in float so that the validation patients lose no more than is allowed, and their maps look as FP32's do; the
        measured ones never tune."""
        validator, tuner = self.subject.validator, self.subject.tuner
        progress = self._say("revert the fewest layers")
        before = validator.baseline(self.reference.run) if validator is not None else None
        look = alike.Lookalike(tuner, self.reference.run, self.subject.heatmap, self.input_name) if tuner is not None else None

        trials = 0

        def passes(reverted: frozenset[str]) -> bool:
            nonlocal trials
            trials += 1
            progress(trials, len(self.ranking).bit_length() + 1)
            graph, _ = quantise.quantise(self.uncorrected, base.ranges, keep_float=(*base.keep_float, *reverted))
            blob = graph.SerializeToString(deterministic=True)
            with closing(backends.load(REFERENCE).open(blob, self.signature, precision="int8", threads=0)) as session:
                if validator is not None and before is not None:
                    scores = validator.scores(session.run)
                    if gates.task_gate(before, scores, AIM * self.order.max_drop).passed is False:
                        return False
                return look is None or look(session.run)

        # All in eight bits has just been refused, whatever these images would say of it.
        found = search.fewest_reverts(self.ranking, passes, plain_failed=True)
        self.reverts = {"trials": [list(t) for t in found.trials], "layers": len(self.ranking), "kept_float": []}
        return found.keep or frozenset()

    def _wider(self, reverted: frozenset[str]) -> frozenset[str]:
        """WIDER times as many layers, the most sensitive of the calibration's ranking; none where that would be more than half. Which
        they are the calibration says; the gate's images only say that the fewest did not do."""
        count = WIDER * len(reverted)
        return frozenset(name for name, _ in self.ranking[:count]) if count <= len(self.ranking) // 2 else frozenset()

    def _with_float(self, base: Prepared, reverted: frozenset[str]) -> Prepared:
        """The same record with more layers in float, and the biases of the others corrected anew."""
        import onnx

        self.reverts = {**(self.reverts or {}), "kept_float": sorted(reverted)}
        keep, total = tuple(sorted({*base.keep_float, *reverted})), self.subject.calibration.count
        blob = self.order.cache.blob(
            "correct",
            {**self._prepared_key, "keep_float": list(keep)},
            lambda: search.corrected(self.uncorrected, base.ranges, base.inputs, total, keep).SerializeToString(deterministic=True),
        )
        return replace(base, adjusted=onnx.load_model_from_string(blob), keep_float=keep)

    # -- judgement and choice

    def _judge(self) -> None:
        reference = [evaluate.Metric(**m) for m in self.fp32_metrics]
        self.rows.append(Row(self.subject.name, REFERENCE, "f32", len(self.float_blob) / 1e6, reference, passed=True))
        for target, found in self.examined.items():
            built = self.built[target]
            metrics = [evaluate.Metric(**m) for m in found.metrics]
            note = "" if found.passed else "; ".join(refusals(found.verdicts)) if found.passed is False else built.verified
            drop = reference[0].value - metrics[0].value
            self.rows.append(Row(self.subject.name, target, built.precision, len(built.blob) / 1e6, metrics, drop, found.passed, note))
        self.rows += [Row(self.subject.name, t, "", 0.0, passed=None, note=f"not built: {why}") for t, why in self.failed.items()]
        if not self._passed():
            said = [f"{t}: {'; '.join(refusals(e.verdicts)) or 'not run here'}" for t, e in self.examined.items()]
            self.refused.append(f"{self.subject.name}: no engine passed ({' | '.join(said)})")
        elif self.order.targets is not None:
            self.refused += [
                f"{self.subject.name} on {t}: {'; '.join(refusals(e.verdicts))}" for t, e in self.examined.items() if e.passed is False
            ]

    def _time(self) -> None:
        rng = np.random.default_rng(1)
        feed: dict[str, Array] = {t.name: rng.uniform(-1, 1, t.shape).astype(np.float32) for t in self.signature.inputs}
        self.close()
        self._open.clear()
        self.__dict__.pop("reference", None)
        openers: dict[tuple[str, str], Callable[[], Session]] = {(t, b.precision): b.open for t, b in self.built.items() if b.runs_here}
        if "openvino" in self.targets:
            for precision in ("f32", "bf16"):
                openers["openvino", precision] = build.opener("openvino", self.float_blob, self.signature, precision)
        timed = []
        blobs = {(t, b.precision): b.sha256 for t, b in self.built.items()}
        for i, ((target, precision), opener) in enumerate(openers.items()):
            self._say("time engines in pairs")(i, len(openers))
            key = {
                **self._float_key,
                "engine": blobs.get((target, precision), sha256(self.float_blob)),
                "target": target,
                "precision": precision,
                "device": choice.this_device([REFERENCE, target]),
                "runs": [self.order.latency_runs, self.order.profile_runs],
            }
            own = (target, precision) in blobs
            kept = self.order.cache.json("time", key, lambda opener=opener, own=own: self._measured(opener, feed, own))  # type: ignore[misc]
            pair = Pair.from_json(kept["pair"])
            timed.append(Timed(target, precision, pair, kept["profile"]))
            row = next((r for r in self.rows if (r.target, r.precision) == (target, precision)), None)
            if row is None:
                row = Row(self.subject.name, target, precision, len(self.float_blob) / 1e6, note="for comparison")
                self.rows.append(row)
            row.pair = pair
        why = {t: "; ".join(refusals(e.verdicts)) or self.built[t].verified for t, e in self.examined.items() if not e.passed}
        why |= {t: f"not built: {w}" for t, w in (*self.failed.items(), *self.missing.items())}
        chosen = choice.choose(timed, self._passed(), why)
        assert chosen is not None  # noqa: S101 - something passed, else this model was refused; for the type checker
        self.profile = {**chosen, "engines": choice.engines_of(timed)}
        for row in self.rows:
            row.chosen = (row.target, row.precision) == (chosen["choice"]["backend"], chosen["choice"]["precision"])

    def _measured(self, opener: Callable[[], Session], feed: dict[str, Array], profiled: bool) -> dict[str, Any]:
        """Times of one engine, as JSON; `spinebox choose` measures them again."""
        reference = build.opener(REFERENCE, self.float_blob, self.signature, "f32")
        pair = choice.time_pair(reference, opener, feed, self.order.latency_runs)
        return {"pair": asdict(pair), "profile": _profile(opener, feed, self.order.profile_runs) if profiled else {}}

    # -- the entry

    def write(self, writer: Writer, max_drop: float) -> tuple[dict[str, Any], sbom.Model]:
        subject, name = self.subject, self.subject.name
        graphs: dict[str, str] = {}
        engines: dict[str, Any] = {}
        for target, found in self.examined.items():
            built = self.built[target]
            path = f"models/{name}/{built.path}"
            # What was refused is told, not shipped.
            graph = None
            if found.passed is not False:
                graph = path if path in graphs else writer.add(path, built.blob)
                graphs[path] = built.sha256
            engines[target] = {
                "graph": graph,
                "precision": built.precision,
                "passed": found.passed,
                "verified": built.verified,
                "metrics": found.metrics,
                "verdicts": [v.to_json() for v in found.verdicts],
                "golden": writer.add(f"golden/{name}.{target}.bin", found.golden) if graph is not None else None,
            }
        for target, why in (*self.failed.items(), *self.missing.items()):
            engines[target] = {
                "graph": None,
                "precision": "fp16" if target == "myriad" else "int8",
                "passed": None,
                "verified": f"not built: {why}",
                "metrics": [],
                "verdicts": [],
                "golden": None,
            }
        first = self._passed()[0]
        entry: dict[str, Any] = {
            "version": subject.version,
            "task": subject.task,
            "classes": list(subject.classes),
            "inputs": [{"name": t.name, "shape": list(t.shape)} for t in self.signature.inputs],
            "outputs": [{"name": t.name, "shape": list(t.shape)} for t in self.signature.outputs],
            "preprocess": subject.preprocess,
            "heatmap": {
                "kind": subject.heatmap.kind,
                "output": subject.heatmap.output,
                "layer": subject.heatmap.layer,
                "reason": subject.heatmap.reason,
            },
            "cam_bias": list(subject.heatmap.cam_bias) if subject.heatmap.cam_bias is not None else None,
            # Chosen once for every target; a converter of its own does not tell it.
            "float_share": round(next((b.float_share for b in self.built.values() if b.float_share is not None), 0.0), 5),
            "reverts": self.reverts,
            "source_sha256": subject.source_sha256,
            "calibration": {
                "manifest": writer.add(f"calibration/{name}.csv", subject.calibration.to_csv()),
                "record": writer.add(f"calibration/{name}.record.json", self.record_blob),
                "report": self.report,
                "root": subject.calibration.root,
                "images": subject.calibration.count,
                "source": subject.calibration.source,
            },
            "temperature": self.examined[first].temperature,
            "metrics": {"source": subject.examiner.source, "fp32": self.fp32_metrics},
            "engines": engines,
        }
        if subject.fusion is not None:
            entry["fusion"] = writer.add(f"models/{name}/fusion.npz", subject.fusion)
        as_json, as_markdown = modelcard.make(name, entry, subject.card, max_drop)
        writer.add(f"cards/{name}.md", as_markdown)
        entry["card"] = writer.add(f"cards/{name}.json", as_json)
        return entry, sbom.Model(name, subject.version, subject.task, subject.source_sha256, graphs, subject.card)


def _profile(opener: Callable[[], Session], feed: dict[str, Array], runs: int) -> dict[str, Any]:
    """Cold and warm latency of one engine, alone in the process but for the reference's remains."""
    opened: list[Session] = []

    def cold() -> evaluate.Runner:
        opened.append(opener())
        return opened[-1].run

    with closing(opener()) as session:
        try:
            return gates.latency_profile(session.run, feed, cold, runs=runs)
        finally:
            for extra in opened:
                extra.close()
