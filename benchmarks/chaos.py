"""Workers killed under load: was every request answered once or refused with a code, and how long was nobody answered in time?

The daemon gets studies at 0.7 of its capacity, open loop, while the process that owns its engines is killed over and over: most times
with SIGKILL, a share of the times with SIGSTOP, which is a hang that nobody reports. Its pid is read anew from GET /readyz each time.
Afterwards every request is held against what its client saw and against the daemon's journal.

  python -m benchmarks.chaos --quick            8 kills, 1 to 2 minutes
  python -m benchmarks.chaos                    100 kills, some 10 minutes
  python -m benchmarks.chaos --gap-s 2 --out benchmarks/results

Writes chaos.csv (a row per request), chaos-kills.csv, chaos-memory.csv and chaos.json. Exit code 1 where a request was lost or
answered twice, or where an outage was longer than 2 s.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import os
import random
import signal
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from appliance.errors import SpineboxError, UsageError
from appliance.journal import study_id_of
from benchmarks import frame
from benchmarks.arrivals import Arrival, poisson
from benchmarks.load import capacity, machine
from benchmarks.openloop import Outcome, Pool, Request, account, offer, summarise, write_rows
from benchmarks.peers.served import Served
from benchmarks.watch import Watch, memory, workers

RATED = 0.7
OUTAGE_S = 2.0
RECOVER_S = 30.0  # a worker that is not replaced by then is given up
PAGE = 200


@dataclass(frozen=True)
class Kill:
    """One kill: when (s after the start of the offering), whom, how, and when /readyz named another worker (None: never)."""

    at_s: float
    pid: int
    how: str
    replaced_s: float | None


def outages(kills: Sequence[Kill], rows: Sequence[Outcome]) -> list[dict[str, Any]]:
    """For each kill: seconds to the end of the next answer on time, whatever was asked before (`any_s`), and of a request that was
    sent after the kill (`sent_after_s`, which is the outage: an answer may have been on its way already). None where none came before
    the offering ended. Times include waiting for somebody to ask: at a rate r the next request comes after 1/r on average."""
    ends = sorted((r.ended_s, r.offered_s + r.lateness_ms / 1e3) for r in rows if r.on_time)
    out = []
    for kill in kills:
        after = [(end, sent) for end, sent in ends if end > kill.at_s]
        fresh = [end for end, sent in after if sent > kill.at_s]
        out.append(
            {
                **asdict(kill),
                "any_s": round(after[0][0] - kill.at_s, 3) if after else None,
                "sent_after_s": round(fresh[0] - kill.at_s, 3) if fresh else None,
            }
        )
    return out


class Killer:
    """Kills the worker `count` times, `gap_s` apart, each time only after another one has taken over. Runs on a thread of its own."""

    def __init__(
        self, served: Served, count: int, gap_s: float, stop_share: float, done: threading.Event, told: Callable[[], object], seed: int
    ) -> None:
        self.kills: list[Kill] = []
        self.failure = ""
        self.began_s = 0.0  # of the offering, on the monotonic clock
        self._served, self._count, self._gap_s, self._stop_share, self._done, self._told = served, count, gap_s, stop_share, done, told
        self._rng = random.Random(seed)  # noqa: S311 - which signal, not a secret
        self._stopped: list[int] = []
        self.thread = threading.Thread(target=self._run, name="killer", daemon=True)

    def _run(self) -> None:
        try:
            for _ in range(self._count):
                # Not in step with anything: between half and one and a half gaps.
                if self._done.wait(self._gap_s * self._rng.uniform(0.5, 1.5)):
                    return
                self._kill()
                self._told()
        except (SpineboxError, OSError, ValueError) as error:
            self.failure = f"{type(error).__name__}: {error}"
        finally:
            for pid in self._stopped:  # a stopped process that nobody ended would stay for ever
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGCONT)
            self._done.set()

    def _kill(self) -> None:
        pid = self._worker()
        how = signal.SIGSTOP if self._rng.random() < self._stop_share else signal.SIGKILL
        at = time.monotonic()
        os.kill(pid, how)
        if how == signal.SIGSTOP:
            self._stopped.append(pid)
        replaced = None
        while time.monotonic() - at < RECOVER_S:
            with contextlib.suppress(OSError, ValueError):
                now = workers(self._served).pid
                if now and now != pid:
                    replaced = time.monotonic() - at
                    break
            time.sleep(0.04)
        self.kills.append(Kill(round(at - self.began_s, 4), pid, how.name, None if replaced is None else round(replaced, 3)))
        if replaced is None:
            raise UsageError(f"no other worker took over within {RECOVER_S:g} s of {how.name}", value=f"pid {pid}")

    def _worker(self) -> int:
        until = time.monotonic() + RECOVER_S
        while time.monotonic() < until:
            if (pid := workers(self._served).pid) > 0:
                return pid
            time.sleep(0.05)
        raise UsageError("the daemon has no worker to kill", value="GET /readyz")


def journal(served: Served) -> dict[str, list[str]]:
    """Study id -> status of every entry that the daemon's journal lists under it."""
    out: dict[str, list[str]] = defaultdict(list)
    offset, total = 0, 1
    while offset < total:
        status, body = served.get(f"/api/studies?limit={PAGE}&offset={offset}", timeout_s=60)
        if status != 200:
            raise UsageError("the journal cannot be listed", value=f"HTTP {status}")
        page = json.loads(body)
        total = int(page["total"])
        for study in page["studies"]:
            out[study["id"]].append(study["status"])
        offset += PAGE
    return dict(out)


def maker(served: Served, pool: Pool) -> Callable[[Arrival], Request]:
    """Requests that know the appliance's id of their study, so that one without an answer is found in the journal."""

    def make(arrival: Arrival) -> Request:
        data = pool.study()
        return served.request(data, arrival.deadline_ms, study_id_of(data))

    return make


def verdict(found: dict[str, Any]) -> list[str]:
    """What was promised and did not hold, in words; empty where all held."""
    out = []
    accounts = found["account"]
    if accounts["lost"]:
        out.append(f"{accounts['lost']} requests got neither an answer nor a refusal with a code")
    if accounts["doubled"]:
        out.append(f"{accounts['doubled']} requests were answered twice")
    if accounts["unkept"]:
        out.append(f"{accounts['unkept']} answers are not in the journal")
    longest = found["outage_s"]["most"]
    if longest is None or longest > OUTAGE_S:
        out.append(f"the longest outage was {longest} s, not at most {OUTAGE_S:g}")
    if found["stopped_early"]:
        out.append(found["stopped_early"])
    return out


def sums(kills: Sequence[Kill], rows: Sequence[Outcome], kept: dict[str, list[str]]) -> dict[str, Any]:
    """Kills, what became of the requests, and the outages together."""
    each = outages(kills, rows)
    times = sorted(k["sent_after_s"] for k in each if k["sent_after_s"] is not None)
    never = sum(k["sent_after_s"] is None for k in each)
    return {
        "kills": len(kills),
        "by": dict(Counter(k.how for k in kills)),
        "account": account(rows, kept),
        "outage_s": {
            "median": times[len(times) // 2] if times else None,
            "p90": times[int(0.9 * (len(times) - 1))] if times else None,
            "most": times[-1] if times and not never else None,
            "over_2_s": sum(t > OUTAGE_S for t in times) + never,
        },
        "replaced_s_most": max((k.replaced_s for k in kills if k.replaced_s is not None), default=None),
        "requests": summarise(rows),
    }


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Start a daemon, kill its workers under load, account for everything."""
    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(
            Progress(
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
                console=console, refresh_per_second=2, transient=True,
            )
        )  # fmt: skip
        task = bar.add_task("drawing phantoms", total=args.pictures)
        pool = Pool(args.pictures, progress=lambda: bar.advance(task))
        bar.update(task, description="starting the daemon")
        served = stack.enter_context(Served("spinebox", peers=Path("build/peers"), threads=args.threads, console=bar.console))
        workers(served)  # said now, not after the capacity was measured
        alone = capacity(served, pool, args.alone)
        rate = RATED * alone["per_s"]
        bar.reset(task, total=args.kills, description=f"killing workers at {rate:.2f} requests a second")
        done = threading.Event()
        killer = Killer(served, args.kills, args.gap_s, args.stop_share, done, lambda: bar.advance(task), args.seed)
        # Long enough for every kill and its recovery; the killer ends the offering when it is done.
        seconds = args.kills * (args.gap_s * 1.5 + RECOVER_S)
        schedule = poisson(rate, min(seconds, 6 * 3600), args.seed)
        before = len(journal(served))
        end = threading.Event()

        def ender() -> None:
            done.wait()
            time.sleep(args.gap_s)  # the last outage must end before the offering does
            end.set()

        with Watch(served, args.sample_s, _fresh(args.out / "chaos-memory.csv")) as watch:
            killer.began_s = time.monotonic() + 0.2
            killer.thread.start()
            threading.Thread(target=ender, name="ender", daemon=True).start()
            rows = offer(served.host, served.port, schedule, maker(served, pool), stop=end)
            done.set()
            killer.thread.join(60)
        kept = journal(served)
        found = {
            "machine": machine(),
            "settings": {"kills": args.kills, "gap_s": args.gap_s, "stop_share": args.stop_share, "rate_per_s": round(rate, 3)},
            "capacity": alone,
            **sums(killer.kills, rows, kept),
            "journal_before": before,
            "memory": memory(watch.rows),
            "stopped_early": killer.failure,
        }
    found["failed"] = verdict(found)
    write_rows(args.out / "chaos.csv", [({"system": "spinebox", "load": RATED, "pattern": "poisson", "repetition": 1}, rows)])
    with (args.out / "chaos-kills.csv").open("w", newline="") as f:
        each = outages(killer.kills, rows)
        out = csv.DictWriter(f, list(each[0]) if each else ["at_s"])
        out.writeheader()
        out.writerows(each)
    (args.out / "chaos.json").write_text(json.dumps(found, indent=1) + "\n")
    return found


def _fresh(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    return path


def show(found: dict[str, Any], console: Console) -> None:
    a, o, m = found["account"], found["outage_s"], found["memory"]
    console.print(
        f"{found['kills']} kills ({', '.join(f'{v} {k}' for k, v in found['by'].items())}), {a['sent']} requests", highlight=False
    )
    console.print(
        f"answered {a['answered']}, refused with a code {a['refused_with_code']}, lost {a['lost']}, answered twice {a['doubled']}, "
        f"answered but not kept {a['unkept']}; kept but not heard by the client {a['unheard']}",
        highlight=False,
    )
    console.print(
        f"outage, kill to the next on-time answer of a later request: median {o['median']} s, p90 {o['p90']} s, most {o['most']} s, "
        f"over {OUTAGE_S:g} s: {o['over_2_s']}; another worker named after {found['replaced_s_most']} s at most",
        highlight=False,
    )
    for name in ("daemon_mb", "daemon_fds"):
        if m.get(name):
            s = m[name]
            console.print(
                f"{name}: {s['first']:g} -> {s['last']:g}, {(s['last'] - s['first']) / max(1, found['kills']):+.3f} a kill", highlight=False
            )
    for line in found["failed"]:
        console.print(line, style="bold red", markup=False, highlight=False)


def main(argv: Sequence[str] | None = None) -> int:
    parser = frame.parser("benchmarks.chaos", __doc__, quick="8 kills, 3 s apart")
    parser.add_argument("--kills", type=int, default=100, help="(default: %(default)s)")
    parser.add_argument("--gap-s", type=float, default=4.0, help="mean seconds between a recovery and the next kill (default: %(default)s)")
    parser.add_argument("--stop-share", type=float, default=0.2, help="of the kills that are SIGSTOP, a hang (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of arrivals, gaps and signals (default: %(default)s)")
    parser.add_argument("--alone", type=int, default=20, help="answers to one client that give the capacity (default: %(default)s)")
    parser.add_argument("--sample-s", type=float, default=1.0, help="seconds between two looks at memory (default: %(default)s)")
    parser.add_argument("--pictures", type=int, default=12, help="phantoms drawn; noise and UID differ (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=0, help="of the runtime; 0 leaves it the choice (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.quick:
        args.kills, args.gap_s, args.alone = 8, 3.0, 8
    if args.kills < 1 or args.gap_s <= 0 or not 0 <= args.stop_share <= 1 or args.alone < 1 or args.sample_s <= 0:
        parser.error("--kills, --gap-s, --alone and --sample-s must be positive, --stop-share a share")
    code, found = frame.carry_out(args, run, show)
    return code or int(bool(found["failed"]))


if __name__ == "__main__":
    raise SystemExit(main())
