"""What serving costs one client: the small model bare, behind this appliance's Open Inference Protocol, and behind other servers.

One inference of one model (--model; the detector takes 590 kB and gives 424, the grader 66 and 2) by the same build of the same engine
with the same threads everywhere. All contestants are up at once and asked in an order shuffled anew each round, so a slow moment of the
machine meets all of them. Each has one connection that is kept open. The bare engine runs in this process.

  python -m benchmarks.overhead --quick          80 rounds of bare, Spinebox and the null server, under a minute
  python -m benchmarks.overhead                  500 rounds of all; makes the peers' environments

Writes overhead.csv (a row per answer) and overhead.json. What is aimed at: over the bare engine at most 2 ms at the median, and p99 - p50
at most half of LitServe's.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import gc
import http.client
import json
import os
import random
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from appliance.errors import UsageError
from benchmarks import frame
from benchmarks.load import machine
from benchmarks.peers.served import SYSTEMS, Served
from benchmarks.peers.work import MODEL, SmallModel

CONTESTANTS = ("bare", "null", "spinebox", "fastapi", "litserve", "bentoml")
GOAL_MS = 2.0
GOAL_TAIL = 0.5
RESAMPLED = 2000
Ask = Callable[[bytes], bytes]


class Client:
    """One connection that is kept open. `ask` posts one body and gives the answer's; raises UsageError for anything but 200."""

    def __init__(self, host: str, port: int, path: str, headers: Mapping[str, str]) -> None:
        self._connection = http.client.HTTPConnection(host, port, timeout=60)
        self._path, self._headers = path, dict(headers)

    def ask(self, body: bytes) -> tuple[bytes, Mapping[str, str]]:
        self._connection.request("POST", self._path, body, self._headers)
        answer = self._connection.getresponse()
        content = answer.read()
        if answer.status != 200:
            raise UsageError(f"{self._path} answered {answer.status}", value=content[:200].decode(errors="replace"))
        return content, {k.lower(): v for k, v in answer.getheaders()}

    def close(self) -> None:
        self._connection.close()


def v2_request(model: SmallModel, data: bytes) -> tuple[dict[str, str], bytes]:
    """The Open Inference Protocol's request with binary tensors: a JSON header, then the bytes; outputs asked for as binary too."""
    (tensor,) = model.signature.inputs
    asked = {
        "inputs": [{"name": tensor.name, "datatype": "FP32", "shape": list(tensor.shape), "parameters": {"binary_data_size": len(data)}}],
        "outputs": [{"name": t.name, "parameters": {"binary_data": True}} for t in model.signature.outputs],
    }
    head = json.dumps(asked).encode()
    return {"Inference-Header-Content-Length": str(len(head)), "Content-Type": "application/octet-stream"}, head + data


def asker(name: str, served: Served, model: SmallModel, called: str, data: bytes, stack: contextlib.ExitStack) -> Ask:
    """How contestant `name` is asked for one inference of `data`: what the client itself must do to ask is part of it."""
    if name == "spinebox":
        headers, _ = v2_request(model, data)
        client = Client(served.host, served.port, f"/v2/models/{called}/infer", headers)

        def infer(body: bytes) -> bytes:
            content, found = client.ask(v2_request(model, body)[1])
            return content[int(found["inference-header-content-length"]) :]
    else:
        kind = served.system.encode(b"")[0]
        client = Client(served.host, served.port, served.system.path, {"Content-Type": kind})

        def infer(body: bytes) -> bytes:
            return client.ask(served.system.encode(body)[1])[0]

    stack.callback(client.close)
    return infer


def check(asks: Mapping[str, Ask], data: bytes, expected: bytes) -> None:
    """Every contestant must do the work: its outputs are the bare engine's. Raises UsageError."""
    for name, ask in asks.items():
        if name == "null":
            continue
        got = np.frombuffer(ask(data), np.float32)
        want = np.frombuffer(expected, np.float32)
        if got.shape != want.shape or not np.allclose(got, want, rtol=1e-3, atol=1e-3):
            raise UsageError(f"{SYSTEMS[name].title if name in SYSTEMS else name} does not answer what the bare engine does", value=name)


def race(asks: Mapping[str, Ask], inputs: Sequence[bytes], rounds: int, seed: int, told: Callable[[], object]) -> dict[str, list[float]]:
    """Milliseconds of each contestant, `rounds` of them, the order shuffled within each round."""
    rng = random.Random(seed)  # noqa: S311 - an order, not a secret
    times: dict[str, list[float]] = {name: [] for name in asks}
    gc.collect()
    gc.disable()
    try:
        for number in range(rounds):
            order = list(asks)
            rng.shuffle(order)
            for name in order:
                data = inputs[number % len(inputs)]
                began = time.perf_counter()
                asks[name](data)
                times[name].append((time.perf_counter() - began) * 1e3)
            told()
    finally:
        gc.enable()
    return times


def sums(times: Mapping[str, Sequence[float]], seed: int = 1) -> dict[str, Any]:
    """p50, p99 and p99 - p50 of each, with 95 % bootstrap intervals over rounds; and the median over rounds of what each took beyond the
    bare engine in the same round."""
    rng = np.random.default_rng(seed)
    rounds = len(next(iter(times.values())))
    drawn = rng.integers(0, rounds, (RESAMPLED, rounds))
    out: dict[str, Any] = {}
    bare = np.asarray(times["bare"]) if "bare" in times else None
    for name, found in times.items():
        own = np.asarray(found)
        p50, p99 = np.percentile(own, [50, 99])
        many = np.percentile(own[drawn], [50, 99], axis=1)
        row: dict[str, Any] = {"p50_ms": p50, "p99_ms": p99, "tail_ms": p99 - p50, "rounds": rounds}
        for key, values in (("p50_ms", many[0]), ("p99_ms", many[1]), ("tail_ms", many[1] - many[0])):
            row[f"{key}_interval"] = [float(v) for v in np.percentile(values, [2.5, 97.5])]
        if bare is not None and name not in ("bare", "null"):  # the null server does not run the engine
            over = own - bare
            row["over_bare_ms"] = float(np.median(over))
            row["over_bare_ms_interval"] = [float(v) for v in np.percentile(np.median(over[drawn], axis=1), [2.5, 97.5])]
            row["p50_over_bare_p50_ms"] = float(p50 - np.median(bare))
        out[name] = {k: [round(v, 3) for v in x] if isinstance(x, list) else round(float(x), 3) for k, x in row.items()}
        out[name]["rounds"] = rounds
    return out


def goals(found: Mapping[str, Any]) -> dict[str, bool]:
    """Which of the goals can be judged from these contestants, and whether they hold."""
    out = {}
    if "spinebox" in found and "bare" in found:
        out[f"over the bare engine at most {GOAL_MS:g} ms at p50"] = found["spinebox"]["p50_over_bare_p50_ms"] <= GOAL_MS
    if "spinebox" in found and "litserve" in found:
        out["p99 - p50 at most half of LitServe's"] = found["spinebox"]["tail_ms"] <= GOAL_TAIL * found["litserve"]["tail_ms"]
    return out


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    rng = np.random.default_rng(args.seed)
    os.environ[MODEL] = args.model  # of this process and of every peer
    with contextlib.ExitStack() as stack:
        model = SmallModel(args.threads)
        stack.callback(model.close)
        (tensor,) = model.signature.inputs
        inputs = [rng.standard_normal(tensor.shape).astype(np.float32).tobytes() for _ in range(8)]
        asks: dict[str, Ask] = {}
        for name in args.contestants:
            if name == "bare":
                asks[name] = model.infer
                continue
            with console.status(f"starting {SYSTEMS[name].title}"):
                served = stack.enter_context(Served(name, peers=args.peers, mode="infer", threads=args.threads, console=console))
            asks[name] = asker(name, served, model, args.model, inputs[0], stack)
        check(asks, inputs[0], model.infer(inputs[0]))
        bar = stack.enter_context(
            Progress(
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
                console=console, refresh_per_second=1, transient=True,
            )
        )  # fmt: skip
        task = bar.add_task("rounds", total=args.rounds)
        race(asks, inputs, args.warm, args.seed, lambda: None)
        times = race(asks, inputs, args.rounds, args.seed + 1, lambda: bar.advance(task))
    args.out.mkdir(parents=True, exist_ok=True)
    with (args.out / "overhead.csv").open("w", newline="") as f:
        out = csv.writer(f)
        out.writerow(["round", *times])
        out.writerows([i, *(f"{times[n][i]:.4f}" for n in times)] for i in range(args.rounds))
    found = sums(times)
    answer = {
        "machine": machine(),
        "model": {"name": args.model, "input": list(tensor.shape), "outputs": {t.name: list(t.shape) for t in model.signature.outputs}},
        "threads": args.threads,
        "contestants": found,
        "goals": goals(found),
    }
    (args.out / "overhead.json").write_text(json.dumps(answer, indent=1) + "\n")
    return answer


def show(found: Mapping[str, Any], console: Console) -> None:
    shown = Table(title="one client, small model, ms (95 % interval)")
    for column in ("", "p50", "p99", "p99 - p50", "over bare, median of rounds"):
        shown.add_column(column)

    def with_interval(row: Mapping[str, Any], key: str) -> str:
        low, high = row[f"{key}_interval"]
        return f"{row[key]:.2f} ({low:.2f} to {high:.2f})"

    for name, row in found["contestants"].items():
        over = with_interval(row, "over_bare_ms") if "over_bare_ms" in row else "–"
        title = SYSTEMS[name].title if name in SYSTEMS else "bare engine, in process"
        shown.add_row(title, *(with_interval(row, k) for k in ("p50_ms", "p99_ms", "tail_ms")), over)
    console.print(shown)
    for what, held in found["goals"].items():
        console.print(f"{what}: {'yes' if held else 'NO'}", style=None if held else "bold red", highlight=False)


def main(argv: Sequence[str] | None = None) -> int:
    parser = frame.parser("benchmarks.overhead", __doc__, quick="80 rounds of bare, null and spinebox")
    parser.add_argument("--contestants", default=",".join(CONTESTANTS), help="comma-separated (default: %(default)s)")
    parser.add_argument("--model", default="detector", help="detector, segmenter, grader, ... (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=500, help="(default: %(default)s)")
    parser.add_argument("--warm", type=int, default=10, help="rounds before them that do not count (default: %(default)s)")
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--threads", type=int, default=cores, help="of every contestant's runtime (default: all processors, %(default)s)")
    parser.add_argument("--peers", type=Path, default=Path("build/peers"), help="folder of their environments (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of inputs and orders (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.quick:
        args.rounds, args.contestants = min(args.rounds, 80), "bare,null,spinebox"
    args.contestants = [c.strip() for c in args.contestants.split(",") if c.strip()]
    unknown = [c for c in args.contestants if c != "bare" and c not in SYSTEMS]
    if unknown or not args.contestants or args.rounds < 2 or args.warm < 0:
        parser.error(f"not known: {', '.join(unknown)}" if unknown else "no contestants, or fewer than 2 rounds")
    return frame.carry_out(args, run, show)[0]


if __name__ == "__main__":
    raise SystemExit(main())
