"""Our calibration and mixed-precision search against the peers', on the same model, images, metric and allowed drop.

Two comparisons, each contestant in a process (and environment) of its own, in turns:

(a) `accuracy`: NNCF's `quantize_with_accuracy_control` against `prepare_int8` and `fewest_reverts`. Both quantise the shipped
    segmenter until its masks agree with the FP32 masks on all but `--max-drop` of the pixels, which plain INT8 does not reach.
    Both validate with OpenVINO on the same images. Counted: images that went through the validation function, FP32's own
    included, and seconds from the float model to the model that passes.
(b) `memory`: ONNX Runtime's entropy calibration of `--images` images against our histograms of the same: the peak of the
    resident memory above what the process had before its first image. On the segmenter ONNX Runtime needs some 0.4 GB an image,
    more than most machines have for 200; so the model is the grader, whose inputs are a ninth as large.

NNCF needs an environment of its own, because it brings its own versions:

    python3.11 -m venv peers/nncf
    peers/nncf/bin/pip install nncf==3.4.0 openvino==2026.4.1 onnx==1.23.2
    python -m benchmarks.quantisation --nncf-python peers/nncf/bin/python

Without `--data` the images are phantoms of fixed seeds; calibration and validation never share one.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from rich.console import Console
from rich.table import Table

from appliance import backends
from appliance.backends import Session
from calibration import sets
from models import grader, phantom, segmenter
from models.export import WEIGHTS, load_float32
from models.family import Spec

SHAPE = (1, 1, *segmenter.SPEC.input_hw)
VALIDATION_SEED = 7_000_000  # far from every calibration seed
MAX_SECONDS = 3600

# Runs in the peer's environment, which cannot import this project: it gets a folder with model and images and prints JSON.
NNCF = """
import json, sys, time
import numpy as np, openvino, nncf
folder = sys.argv[1]
calibration, validation, max_drop, shape = json.loads(sys.argv[2])
size = int(np.prod(shape))
def images(name, count):
    return [np.fromfile(f"{folder}/{name}", "<f4", size, offset=4 * size * i).reshape(shape) for i in range(count)]
began = time.perf_counter()
core = openvino.Core()
core.set_property("CPU", {"INFERENCE_PRECISION_HINT": "f32"})
model = core.read_model(f"{folder}/model.onnx")
truth = np.load(f"{folder}/truth.npy", allow_pickle=False)
counts = {"images": 0, "calls": 0}
def validate(compiled, data):
    counts["calls"] += 1
    each = []
    for index in data:
        counts["images"] += 1
        each.append(float((compiled(held[index])[0].argmax(1) == truth[index]).mean()))
    return float(np.mean(each)), each
held = images("validation.raw", validation)
found = nncf.quantize_with_accuracy_control(
    model,
    nncf.Dataset(images("calibration.raw", calibration)),
    nncf.Dataset(list(range(validation)), lambda i: held[i]),
    lambda compiled, data: validate(compiled, range(validation) if data is None else data),
    max_drop=max_drop,
    subset_size=calibration,
)
seconds = time.perf_counter() - began
used = dict(counts)
compiled = core.compile_model(found, "CPU")
final, _ = validate(compiled, range(validation))
print(json.dumps({"seconds": seconds, "validation_images": used["images"], "validation_calls": used["calls"], "drop": 1 - final}))
"""


# -- the images, once for all contestants -------------------------------------------------------------------------------


def _write(path: Path, items: list[str], spec: Spec, root: Path | None) -> None:
    with path.open("wb") as f:
        for item in items:
            f.write(np.ascontiguousarray(sets.prepare(item, spec, root), "<f4").tobytes())


def _read(path: Path, spec: Spec = segmenter.SPEC) -> Iterator[np.ndarray]:
    """One image at a time, so that a contestant's memory is its own."""
    shape = (1, 1, *spec.input_hw)
    size = int(np.prod(shape))
    for i in range(path.stat().st_size // (4 * size)):
        yield np.fromfile(path, "<f4", size, offset=4 * size * i).reshape(shape)


def prepare_crops(folder: Path, count: int) -> None:
    """The grader and `count` disc crops of phantoms, into `folder`."""
    (folder / "model.onnx").write_bytes(load_float32(WEIGHTS / "grader.onnx").SerializeToString())
    items: list[str] = []
    seed = sets.SEED
    while len(items) < count:
        _, truth = phantom.draw(np.random.default_rng(seed))
        items += [f"phantom:{seed}#{','.join(f'{v:.1f}' for v in d.box_px)}" for d in truth.discs]
        seed += 1
    _write(folder / "calibration.raw", items[:count], grader.SPEC, None)


def _open(blob: bytes) -> Session:
    from appliance.compiler.pipeline import signature_of

    module = backends.load("openvino")
    return module.open(module.build(blob), signature_of(load_float32(WEIGHTS / "segmenter.onnx")), precision="f32", threads=0)


def prepare(folder: Path, calibration: int, validation: int, root: Path | None) -> None:
    """Model, images and FP32 masks, into `folder`."""
    blob = load_float32(WEIGHTS / "segmenter.onnx").SerializeToString()
    (folder / "model.onnx").write_bytes(blob)
    items = sets.select(root, calibration + (validation if root else 0))
    if root is None:
        chosen, held = items, [f"phantom:{VALIDATION_SEED + i}" for i in range(validation)]
    else:
        # Evenly spread: every prefix of the selection is a fair sample, and so is what is dealt out of it.
        places = {round(i * (len(items) - 1) / max(1, validation - 1)) for i in range(validation)}
        held = [item for i, item in enumerate(items) if i in places]
        chosen = [item for i, item in enumerate(items) if i not in places]
    _write(folder / "calibration.raw", chosen, segmenter.SPEC, root)
    _write(folder / "validation.raw", held, segmenter.SPEC, root)
    session = _open(blob)
    masks = [session.run({"image": x})["logits"].argmax(1)[0].astype(np.uint8) for x in _read(folder / "validation.raw")]
    session.close()
    np.save(folder / "truth.npy", np.array(masks), allow_pickle=False)


# -- contestants, each a process ----------------------------------------------------------------------------------------


def ours_accuracy(folder: Path, max_drop: float) -> dict[str, Any]:
    from appliance.compiler.quantise import quantise
    from appliance.compiler.search import fewest_reverts, prepare_int8

    began = time.perf_counter()
    model = load_float32(WEIGHTS / "segmenter.onnx")
    truth = np.load(folder / "truth.npy", allow_pickle=False)
    held = list(_read(folder / "validation.raw"))
    counts = {"images": 0, "calls": 0}

    def drop(blob: bytes) -> float:
        counts["calls"] += 1
        session = _open(blob)
        each = []
        for x, mask in zip(held, truth, strict=True):
            counts["images"] += 1
            each.append(float((session.run({"image": x})["logits"].argmax(1)[0] == mask).mean()))
        session.close()
        return 1.0 - float(np.mean(each))

    def passes(keep: frozenset[str]) -> bool:
        graph, _ = quantise(prepared.model, prepared.record.ranges, keep_float=keep)
        drops[keep] = drop(graph.SerializeToString())
        return drops[keep] <= max_drop

    drops: dict[frozenset[str], float] = {}
    drop(model.SerializeToString())
    prepared = prepare_int8(model, lambda: _read(folder / "calibration.raw"), effort="quick")
    found = fewest_reverts(prepared.record.ranking, passes)
    return {
        "seconds": time.perf_counter() - began,
        "validation_images": counts["images"],
        "validation_calls": counts["calls"],
        "drop": drops[found.keep] if found.keep is not None else None,
        "reverted": None if found.keep is None else len(found.keep),
        "plain_drop": drops[frozenset()],
        "trials": found.trials,
    }


def _above_baseline(work: Callable[[], object]) -> dict[str, Any]:
    """Runs `work`; the peak of resident memory above what the process has now, megabytes. `ru_maxrss` is in kilobytes on Linux."""
    baseline = psutil.Process().memory_info().rss
    began = time.perf_counter()
    work()
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": seconds, "peak_above_baseline_mb": (peak - baseline) / 1e6, "baseline_mb": baseline / 1e6}


def ours_memory(folder: Path) -> dict[str, Any]:
    from appliance.compiler import ranges
    from appliance.compiler.quantise import layout

    plan = layout(load_float32(WEIGHTS / "grader.onnx"))
    # Opened once before, as the other has: what is compared is what the images cost.
    ranges.open_float(plan.model).close()

    def work() -> None:
        for h in ranges.collect(plan.model, _read(folder / "calibration.raw", grader.SPEC), plan.tensors).values():
            ranges.entropy(h)

    return _above_baseline(work)


def ort_memory(folder: Path) -> dict[str, Any]:
    from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod
    from onnxruntime.quantization.calibrate import create_calibrator

    from appliance.compiler.quantise import U8_OPS

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.rest = _read(folder / "calibration.raw", grader.SPEC)

        def get_next(self) -> dict[str, np.ndarray] | None:
            x = next(self.rest, None)
            return None if x is None else {"image": x}

    calibrator = create_calibrator(
        folder / "model.onnx", list(U8_OPS), str(folder / "augmented.onnx"), CalibrationMethod.Entropy, extra_options={"symmetric": False}
    )

    def work() -> None:
        calibrator.collect_data(Reader())
        calibrator.compute_data()

    return _above_baseline(work)


ROLES: dict[str, Callable[[Path, float], dict[str, Any]]] = {
    "ours-accuracy": ours_accuracy,
    "ours-memory": lambda folder, _: ours_memory(folder),
    "ort-memory": lambda folder, _: ort_memory(folder),
}


# -- the referee --------------------------------------------------------------------------------------------------------


def _child(command: list[str]) -> dict[str, Any]:
    done = subprocess.run(command, capture_output=True, text=True, timeout=MAX_SECONDS, check=False)
    if done.returncode:
        raise SystemExit(f"a contestant failed: {' '.join(command[:3])}\n{done.stderr[-2000:]}")
    answer: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return answer


def _role(name: str, folder: Path, max_drop: float) -> dict[str, Any]:
    return _child([sys.executable, "-m", "benchmarks.quantisation", "--role", name, "--folder", str(folder), "--max-drop", str(max_drop)])


def _in_turns(contestants: dict[str, Callable[[], dict[str, Any]]], rounds: int, console: Console) -> dict[str, list[dict[str, Any]]]:
    rng = random.Random(1)  # noqa: S311 - an order, not a secret
    out: dict[str, list[dict[str, Any]]] = {name: [] for name in contestants}
    for number in range(rounds):
        for name in rng.sample(list(contestants), len(contestants)):
            console.print(f"round {number + 1} of {rounds}: {name}")
            out[name].append(contestants[name]())
    return out


def _median(rows: list[dict[str, Any]], key: str) -> float:
    return float(np.median([r[key] for r in rows]))


def _table(title: str, found: dict[str, list[dict[str, Any]]], keys: tuple[str, ...], console: Console) -> dict[str, float]:
    """Prints the medians, and gives ours as a share of the peer's for each key."""
    table = Table(title=title)
    for heading in ("contestant", *keys):
        table.add_column(heading)
    for name, rows in found.items():
        table.add_row(name, *[f"{_median(rows, k):.5g}" for k in keys])
    peer, ours = list(found)
    shares = {k: _median(found[ours], k) / max(_median(found[peer], k), 1e-9) for k in keys}
    table.add_row("ours / peer", *[f"{shares[k]:.3f}" for k in keys])
    console.print(table)
    return shares


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quantisation", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=["accuracy", "memory"], help="one of the two comparisons")
    parser.add_argument("--nncf-python", type=Path, help="the interpreter of NNCF's environment; without it (a) is left out, and said so")
    parser.add_argument("--data", type=Path, help="training data; its training patients only (default: phantoms)")
    parser.add_argument("--calibration", type=int, default=64, help="calibration images of (a)")
    parser.add_argument("--validation", type=int, default=32, help="validation images of (a)")
    parser.add_argument("--max-drop", type=float, default=0.001, help="share of pixels that may differ from FP32 in (a)")
    parser.add_argument("--images", type=int, default=200, help="calibration images of (b), disc crops of phantoms")
    parser.add_argument("--rounds", type=int, default=3, help="how often each contestant runs")
    parser.add_argument("--out", type=Path, help="write everything as JSON here")
    parser.add_argument("--role", choices=sorted(ROLES), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.role:
        print(json.dumps(ROLES[args.role](args.folder, args.max_drop)))
        return 0
    console = Console()
    result: dict[str, Any] = {"source": "phantoms" if args.data is None else "training patients"}
    if args.only != "memory" and args.nncf_python is None:
        console.print("(a) is left out: name NNCF's environment with --nncf-python (how to make it: --help)")
    elif args.only != "memory":
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            prepare(folder, args.calibration, args.validation, args.data)
            numbers = [str(folder), json.dumps([args.calibration, args.validation, args.max_drop, SHAPE])]
            contestants = {
                "nncf": lambda: _child([str(args.nncf_python), "-c", NNCF, *numbers]),
                "ours": lambda: _role("ours-accuracy", folder, args.max_drop),
            }
            found = _in_turns(contestants, args.rounds, console)
        keys = ("validation_images", "seconds", "drop")
        shares = _table(f"INT8 within {args.max_drop:.4f} of FP32", found, keys, console)
        result["accuracy"] = {"settings": vars(args) | {"nncf_python": "", "data": "", "out": ""}, "runs": found, "ours_over_peer": shares}
    if args.only != "accuracy":
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            prepare_crops(folder, args.images)
            contestants = {
                "onnxruntime": lambda: _role("ort-memory", folder, args.max_drop),
                "ours": lambda: _role("ours-memory", folder, args.max_drop),
            }
            found = _in_turns(contestants, args.rounds, console)
        shares = _table(f"Calibration of {args.images} images", found, ("peak_above_baseline_mb", "seconds"), console)
        result["memory"] = {"images": args.images, "runs": found, "ours_over_peer": shares}
    if args.out:
        args.out.write_text(json.dumps(result, indent=1, default=str) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
