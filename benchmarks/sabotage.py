"""Engines that are broken on purpose, each put before every gate: which one notices, and does the honest engine pass beside them?

`python -m benchmarks.sabotage` breaks the grader on phantoms; `--data` takes held-out patients. Every line is one engine that
went through the pipeline's own judgement. Exit code 1 where a broken engine passed, or the honest one did not.

    clipped ranges             activations cut at their 95th percentile: a bad calibration
    permuted map channels      the map of another grade is shown, the logits are right
    wrong preprocessing        the device scales images to 0..1, the network learnt -1..1
    foreign calibration set    ranges from noise in the place of spines, with a manifest that is in order
    swapped calibration set    the manifest is of one set, the pixels of another
    flipped byte               one byte of one calibration image
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from appliance import backends
from appliance.backends import Session
from appliance.compiler import build, families, pipeline, xai
from appliance.compiler.build import Built
from appliance.compiler.cache import Cache, default_folder
from appliance.compiler.signature import REFERENCE
from appliance.compiler.subject import Array, Subject
from appliance.errors import CalibrationInvalid
from calibration import merkle

FAMILY = "grader"


@dataclass(frozen=True)
class Outcome:
    """`caught` names the gates that refused; empty where the engine passed. `note` is what the first of them said."""

    name: str
    caught: tuple[str, ...]
    note: str


class _Scaled:
    """A session whose images were prepared wrongly."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def run(self, inputs: dict[str, Array]) -> dict[str, Array]:
        return self._session.run({k: (v + 1) / 2 for k, v in inputs.items()})

    def close(self) -> None:
        self._session.close()


@dataclass(frozen=True)
class _Noise:
    """A calibration set of noise, its digests its own."""

    like: Any
    source: str = "noise"

    @property
    def count(self) -> int:
        return int(self.like.count)

    @property
    def root(self) -> str:
        from calibration.sets import digest

        return merkle.root([digest(x) for x in self.inputs()])

    def to_csv(self) -> bytes:
        return b""

    def inputs(self) -> Iterator[Array]:
        rng = np.random.default_rng(0)
        for x in self.like.inputs():
            yield np.clip(rng.normal(0, 0.05, x.shape), -1, 1).astype(np.float32)


def _judge(compile_: pipeline.Compile, name: str, built: Built) -> Outcome:
    refused = [v for v in compile_.examine(built).verdicts if v.passed is False]
    return Outcome(name, tuple(v.gate for v in refused), refused[0].note if refused else "")


def outcomes(root: Path | None, images: int, cache: Cache, say: Callable[[str], None] = lambda _: None) -> list[Outcome]:
    """The honest engine first, then each broken one."""
    import onnx

    (subject,) = families.subjects(root, images, names=(FAMILY,))
    order = pipeline.Order(cache=cache, say=lambda stage, *_: say(stage))

    def compiling(of: Subject) -> pipeline.Compile:
        return pipeline.Compile(of, order, (REFERENCE,), {}, pipeline.Steps(order, 1))

    out: list[Outcome] = []
    with closing(compiling(subject)) as honest:
        base = honest.prepare()
        built = build.build(REFERENCE, base, cache)
        out.append(_judge(honest, "honest", built))

        def opened(blob: bytes) -> Built:
            return replace(built, blob=blob, open=build.opener(REFERENCE, blob, base.signature, "int8"))

        feeds = [{honest.input_name: x} for x in base.inputs()][: pipeline.CLIPPED_ON]
        graph = onnx.load_from_string(built.blob)
        exact: list[Session] = []

        def as_written(blob: bytes) -> Any:
            exact.append(backends.load(REFERENCE).open(blob, base.signature, precision="as-written", threads=0))
            return exact[-1].run

        out.append(_judge(honest, "clipped ranges", opened(xai.clipped(graph, feeds, as_written))))
        for session in exact:
            session.close()
        out.append(_judge(honest, "permuted map channels", opened(_other_map(graph))))
        wrong = replace(built, blob=built.blob + b"", open=lambda: _Scaled(built.open()), examined_on="wrong preprocessing")
        out.append(_judge(honest, "wrong preprocessing", wrong))
    with closing(compiling(replace(subject, calibration=_Noise(subject.calibration)))) as foreign:
        out.append(_judge(foreign, "foreign calibration set", build.build(REFERENCE, foreign.prepare(), cache)))
    out += [_swapped(subject), _flipped(subject)]
    return out


def _other_map(graph: Any) -> bytes:
    """The graph with the map's channels given out in another order; the logits are computed from the right ones."""
    import onnx
    from onnx import helper, numpy_helper

    out = onnx.ModelProto()
    out.CopyFrom(graph)
    maker = next(n for n in out.graph.node if "cam" in n.output)
    channels = next(o for o in out.graph.output if o.name == "cam").type.tensor_type.shape.dim[1].dim_value
    for node in out.graph.node:
        for i, name in enumerate(node.input):
            if name == "cam":
                node.input[i] = "cam.right"
    maker.output[list(maker.output).index("cam")] = "cam.right"
    order = np.roll(np.arange(channels), 1)
    out.graph.initializer.append(numpy_helper.from_array(order.astype(np.int64), "cam.order"))
    out.graph.node.append(helper.make_node("Gather", ["cam.right", "cam.order"], ["cam"], "cam.permuted", axis=1))
    return bytes(out.SerializeToString(deterministic=True))


def _swapped(subject: Subject) -> Outcome:
    """Digests in another order than the images: each image is then not the one that the manifest names."""
    made: Any = subject.calibration
    turned = replace(made, manifest=replace(made.manifest, sha256=(*made.manifest.sha256[1:], made.manifest.sha256[0])))
    try:
        for _ in turned.inputs():
            pass
    except CalibrationInvalid as error:
        return Outcome("swapped calibration set", ("calibration",), f"{error.what} ({error.value})")
    return Outcome("swapped calibration set", (), "")


def _flipped(subject: Subject) -> Outcome:
    """One byte of one image changes the root, and with it the identity of the engine and of the bundle."""
    from calibration.sets import digest

    inputs = list(subject.calibration.inputs())
    before = merkle.root([digest(x) for x in inputs])
    inputs[-1].reshape(-1).view(np.uint8)[0] ^= 1
    after = merkle.root([digest(x) for x in inputs])
    return Outcome("flipped byte", ("identity",) if before != after else (), f"root {before[:12]} became {after[:12]}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sabotage", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="training data (holds lumbar_mri/); phantoms without it")
    parser.add_argument("--images", type=int, default=64, help="calibration images")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    console = Console(stderr=True)
    with console.status("judging") as status:
        found = outcomes(args.data, args.images, Cache(default_folder()), lambda stage: status.update(stage))
    good = [o for o in found if bool(o.caught) != (o.name == "honest")]
    if args.json:
        print(json.dumps([o.__dict__ for o in found]))
    else:
        table = Table(title=f"{FAMILY}: {'held-out patients' if args.data else 'phantoms'}")
        for column in ("engine", "refused by", "what the first gate said"):
            table.add_column(column, overflow="fold")
        for o in found:
            table.add_row(o.name, ", ".join(o.caught) or "-", o.note)
        Console(width=140).print(table)
    return 0 if len(good) == len(found) else 1


if __name__ == "__main__":
    raise SystemExit(main())
