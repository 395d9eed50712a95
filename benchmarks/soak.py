"""The daemon at its rated load for long: does memory grow, do descriptors leak, are deadlines missed, does it get hot?

Studies arrive open loop at 0.7 of the capacity that one client measured first. Every few seconds memory, descriptors and temperature
are looked at; every slice of the load is summed. Both are appended to files as they come, so an interrupted soak keeps what it has, and
`--resume` goes on until the minutes are full (with a new daemon, which starts a new segment; slopes are of the longest one).

  python -m benchmarks.soak --quick                  1 minute
  python -m benchmarks.soak --minutes 60 --out benchmarks/results --picture docs/soak.png
  python -m benchmarks.soak --minutes 60 --resume

Each study stays in the daemon's journal: an hour takes some GB under --data-dir. Writes soak.csv (a row per look), soak-load.csv (a row
per slice), soak.json and a picture.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from appliance.errors import UsageError
from benchmarks import frame
from benchmarks.arrivals import poisson
from benchmarks.load import capacity, machine
from benchmarks.openloop import Pool, offer, summarise
from benchmarks.peers.served import Served
from benchmarks.watch import Row, Watch, memory, read

RATED = 0.7
SLICE_COLUMNS = (
    "at_s", "segment", "seconds", "offered", "on_time", "admitted", "late_among_admitted", "refused", "unanswered", "failed",
    "latency_ms_p50", "latency_ms_p99", "refusal_ms_p99", "sender_lateness_ms_p99", "disk_free_gb",
)  # fmt: skip
LEAST_FREE_GB = 2.0


def totals(slices: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Counts over all slices, and the shares that follow from them."""
    out: dict[str, Any] = {
        name: sum(int(s[name]) for s in slices)
        for name in ("offered", "on_time", "admitted", "late_among_admitted", "refused", "unanswered", "failed")
    }
    out["minutes"] = round(sum(float(s["seconds"]) for s in slices) / 60, 2)
    out["on_time_share"] = out["on_time"] / out["offered"] if out["offered"] else None
    out["late_share_of_admitted"] = out["late_among_admitted"] / out["admitted"] if out["admitted"] else None
    for name in ("latency_ms_p99", "refusal_ms_p99", "sender_lateness_ms_p99"):
        values = [float(s[name]) for s in slices if s[name] not in ("", None)]
        out[f"{name}_worst_slice"] = max(values, default=None)
    return out


def slices_of(path: Path) -> list[dict[str, str]]:
    """Slices that are kept; a last line that was cut off is left out."""
    if not path.exists():
        return []
    with path.open(newline="") as f:
        return [row for row in csv.DictReader(f) if row.get("disk_free_gb")]


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    looks, loads = args.out / "soak.csv", args.out / "soak-load.csv"
    args.out.mkdir(parents=True, exist_ok=True)
    if not args.resume:
        for path in (looks, loads):
            path.unlink(missing_ok=True)
    done = slices_of(loads)
    segment = 1 + max((int(s["segment"]) for s in done), default=-1)
    already_s = sum(float(s["seconds"]) for s in done)
    if not loads.exists():
        with loads.open("w", newline="") as f:
            csv.writer(f).writerow(SLICE_COLUMNS)
    left_s = args.minutes * 60 - already_s
    alone: dict[str, float] | None = None
    rate = args.rate
    if left_s > 0:
        with contextlib.ExitStack() as stack:
            bar = stack.enter_context(
                Progress(
                    TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
                    console=console, refresh_per_second=1, transient=True,
                )
            )  # fmt: skip
            task = bar.add_task("drawing phantoms", total=args.pictures)
            pool = Pool(args.pictures, progress=lambda: bar.advance(task))
            bar.update(task, description="starting the daemon")
            served = stack.enter_context(
                Served("spinebox", peers=Path("build/peers"), threads=args.threads, data_dir=args.data_dir, console=bar.console)
            )
            alone = capacity(served, pool, args.alone)
            rate = args.rate or RATED * alone["per_s"]
            bar.reset(task, total=args.minutes * 60, completed=already_s, description=f"{rate:.2f} studies a second")
            stack.enter_context(Watch(served, args.sample_s, looks, segment, already_s))
            number = 0
            while left_s > 0:
                seconds = min(args.slice_s, left_s)
                schedule = poisson(rate, seconds, args.seed + 1000 * segment + number)
                number += 1
                if schedule:
                    free_gb = _slice(served, pool, schedule, seconds, already_s, segment, loads)
                    if free_gb < LEAST_FREE_GB:
                        raise UsageError("the disk is nearly full", value=f"{free_gb:.1f} GB left", remedy="Name a larger one: --data-dir.")
                left_s -= seconds
                already_s += seconds
                bar.advance(task, seconds)
    found = {
        "machine": machine(),
        "settings": {"minutes": args.minutes, "rate_per_s": None if rate is None else round(rate, 3), "sample_s": args.sample_s},
        "capacity": alone,
        "segments": segment + (1 if alone else 0),
        "load": totals(slices_of(loads)),
        "memory": memory(read(looks)) if looks.exists() else {},
    }
    (args.out / "soak.json").write_text(json.dumps(found, indent=1) + "\n")
    return found


def _slice(served: Served, pool: Pool, schedule: Any, seconds: float, at_s: float, segment: int, path: Path) -> float:
    """Offer one slice, append its sums; returns the GB free on the daemon's disk."""
    sums = summarise(offer(served.host, served.port, schedule, served.maker(pool)))
    assert served.data_dir is not None
    free_gb = shutil.disk_usage(served.data_dir).free / 2**30
    row = {**sums, "at_s": round(at_s, 1), "segment": segment, "seconds": seconds, "disk_free_gb": round(free_gb, 2)}
    with path.open("a", newline="") as f:
        csv.DictWriter(f, SLICE_COLUMNS, extrasaction="ignore").writerow({k: "" if row[k] is None else row[k] for k in SLICE_COLUMNS})
    return free_gb


def picture(rows: Sequence[Row], slices: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Memory of each process, descriptors, and deadline misses over time, one below the other."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (top, middle, bottom) = plt.subplots(
        3, 1, figsize=(9.5, 8), sharex=True, layout="constrained", height_ratios=(3, 1.3, 1.7)
    )  # fmt: skip
    at = np.array([r.at_s for r in rows]) / 60
    lines = (
        ("worker (engines)", [r.worker_mb for r in rows], "#D55E00", "--"),
        ("standby and decoders", [r.others_mb for r in rows], "#009E73", "-."),
        ("daemon", [r.daemon_mb for r in rows], "#0072B2", "-"),
    )
    for name, values, colour, style in lines:
        if any(values):
            top.plot(at, values, color=colour, linestyle=style, linewidth=1.6, label=name)
    top.set(ylabel="resident memory, MB", title="The daemon at 0.7 of its capacity")
    top.set_ylim(bottom=0)
    top.legend(frameon=False, ncols=3, loc="lower right")
    middle.plot(at, [r.daemon_fds for r in rows], color="#0072B2", linewidth=1.4)
    middle.set(ylabel="daemon's descriptors")
    middle.set_ylim(bottom=0)
    if any(r.temperature_c is not None for r in rows):
        hot = middle.twinx()
        hot.plot(at, [np.nan if r.temperature_c is None else r.temperature_c for r in rows], color="#E69F00", linestyle=":", linewidth=1.6)
        hot.set_ylabel("hottest zone, °C (dotted)")
    ends = [(float(s["at_s"]) + float(s["seconds"])) / 60 for s in slices]
    for name, key, colour, marker in (
        ("late or unanswered", "late_among_admitted", "#D55E00", "x"),
        ("refused", "refused", "#0072B2", "o"),
    ):
        shares = [100 * int(s[key]) / max(1, int(s["offered"])) for s in slices]
        bottom.plot(ends, shares, color=colour, marker=marker, markersize=4, linewidth=1.2, label=name)
    bottom.set(xlabel="minutes", ylabel="share of offered, %")
    bottom.set_ylim(-0.2, max(1.0, bottom.get_ylim()[1]))  # points at 0 are whole, and no axis where there was nothing
    bottom.legend(frameon=False, ncols=2, loc="upper right")
    for panel in (top, middle, bottom):
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def show(found: Mapping[str, Any], console: Console) -> None:
    a, m = found["load"], found["memory"]
    share = a["late_share_of_admitted"]
    console.print(
        f"{a['minutes']} minutes, {a['offered']} studies offered: {a['on_time']} answered on time, {a['refused']} refused, "
        f"{a['late_among_admitted']} of {a['admitted']} admitted late ({'–' if share is None else f'{100 * share:.3f} %'}), "
        f"{a['unanswered']} without an answer",
        highlight=False,
    )
    for name in ("daemon_mb", "worker_mb", "all_mb", "daemon_fds"):
        if m.get(name):
            s = m[name]
            word = "grows" if s["grows"] else "no growth seen"
            console.print(
                f"{name}: {s['first']:g} -> {s['last']:g}; {s['per_hour']:+g} an hour (95 %: {s['low']:+g} to {s['high']:+g}): {word}",
                highlight=False,
            )
    if m.get("hottest_c") is not None:
        console.print(f"hottest zone: {m['hottest_c']:.1f} °C", highlight=False)


def main(argv: Sequence[str] | None = None) -> int:
    parser = frame.parser("benchmarks.soak", __doc__, quick="1 minute, slices of 15 s, a look a second")
    parser.add_argument("--minutes", type=float, default=60.0, help="of load, those before --resume included (default: %(default)s)")
    parser.add_argument("--resume", action="store_true", help="go on where the files in --out end")
    parser.add_argument("--rate", type=float, help="studies a second, in place of 0.7 of the capacity measured first")
    parser.add_argument("--slice-s", type=float, default=60.0, help="seconds of load summed together (default: %(default)s)")
    parser.add_argument("--sample-s", type=float, default=5.0, help="seconds between two looks (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of the arrivals (default: %(default)s)")
    parser.add_argument("--alone", type=int, default=30, help="answers to one client that give the capacity (default: %(default)s)")
    parser.add_argument("--pictures", type=int, default=12, help="phantoms drawn; noise and UID differ (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=0, help="of the runtime; 0 leaves it the choice (default: %(default)s)")
    parser.add_argument("--data-dir", type=Path, help="the daemon's; a temporary one where left out")
    parser.add_argument("--picture", type=Path, help="where the picture goes (default: soak.png beside them)")
    args = parser.parse_args(argv)
    if args.quick:
        args.minutes, args.slice_s, args.sample_s, args.alone = 1.0, 15.0, 1.0, 8
    if min(args.minutes, args.slice_s, args.sample_s) <= 0 or args.alone < 1 or (args.rate is not None and args.rate <= 0):
        parser.error("--minutes, --slice-s, --sample-s, --alone and --rate must be positive")

    def draw() -> None:
        picture(read(args.out / "soak.csv"), slices_of(args.out / "soak-load.csv"), args.picture or args.out / "soak.png")

    return frame.carry_out(args, run, show, draw)[0]


if __name__ == "__main__":
    raise SystemExit(main())
