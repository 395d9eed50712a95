"""Training: `python -m models.train FAMILY --data DIR` -> a checkpoint that resumes, a learning curve, an ONNX file.

Hides the loop: seeded batches and seeded dropout (step i is the same whether the run was interrupted or not, so a run that was
killed ends in the same bytes on a CPU), a background thread that makes the batches, bf16 autocast where the device has it, an
exponential moving average of the weights, cosine decay, atomic checkpoints. What differs between families lies in `models/recipes.py`.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import math
import os
import queue
import sys
import threading
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np

from appliance.errors import CheckpointInvalid, SpineboxError, TrainingDiverged, UsageError
from models import recipes_ap
from models.recipes import NAMES, Batch, Recipe
from models.recipes import RECIPES as LUMBAR

RECIPES = {**LUMBAR, **recipes_ap.RECIPES}
SEED = 20261122
DEVICES = ("cpu", "cuda", "auto")
CHECKPOINT_EVERY_S = 60.0
EMA_DECAY = 0.995
LOG_EVERY = 20  # steps
LOG_HEAD = "step,loss,seconds\n"


def batches(recipe: Recipe, seed: int, start: int) -> Generator[tuple[int, Batch]]:
    """Batches start, start + 1, ... made ahead by one thread; batch i depends on (seed, i) alone.

    What goes wrong while one is made is raised here, with a note of its step.
    """
    ahead: queue.Queue[tuple[int, Batch] | Exception] = queue.Queue(maxsize=3)
    stop = threading.Event()

    def make() -> None:
        step = start
        try:
            for step in range(start, recipe.steps):
                item = recipe.batch(np.random.default_rng([seed, step]), step)
                while not stop.is_set():
                    try:
                        ahead.put((step, item), timeout=0.5)
                        break
                    except queue.Full:
                        continue
                if stop.is_set():
                    return
        except Exception as error:  # noqa: BLE001 - handed to the consumer, which raises it
            error.add_note(f"while batch {step} of seed {seed} was made")
            ahead.put(error)

    threading.Thread(target=make, daemon=True).start()
    try:
        for _ in range(start, recipe.steps):
            item = ahead.get()
            if isinstance(item, Exception):
                raise item
            yield item
    finally:
        stop.set()


def step_seed(seed: int, step: int) -> int:
    """Seed of whatever is random inside the network at one step: depends on (seed, step) alone, as the batch does."""
    return int(np.random.SeedSequence([seed, step, 1]).generate_state(1, np.uint64)[0] >> 1)


def write_whole(state: Any, target: Path) -> None:
    """torch.save that leaves the old file or the new one, whatever is cut off in between."""
    import torch

    part = target.with_suffix(".part")
    with part.open("wb") as f:
        torch.save(state, f)
        f.flush()
        os.fsync(f.fileno())
    part.replace(target)


def read_checkpoint(path: Path, run: dict[str, Any]) -> dict[str, Any]:
    """The checkpoint of `run` (recipe, steps, seed). Raises CheckpointInvalid where it is broken or another run's."""
    import torch

    try:
        saved: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
        step = int(saved["step"])
    except Exception as error:  # torch raises many kinds for a broken file
        raise CheckpointInvalid("the checkpoint cannot be read", value=path) from error
    theirs = saved.get("run", run)
    other = [f"{k} {theirs.get(k)}, not {v}" for k, v in run.items() if theirs.get(k) != v]
    if other or not 0 <= step <= run["steps"]:
        raise CheckpointInvalid("the checkpoint is of another run", value=f"{path}: {'; '.join(other) or f'step {step}'}")
    return saved


def diverged(work: Path, seed: int, step: int, batch: Batch, loss: float, gradient: float) -> TrainingDiverged:
    """The error of a step whose loss or gradient is not finite. Everything about its batch goes to WORK/diverged.json: the
    weights of the last checkpoint stay as they were, and `batches` makes this very batch again."""
    names = [str(n) for n in batch.get(NAMES, np.zeros(0, str))]
    broken = [i for i, x in enumerate(batch["image"]) if not np.isfinite(x).all()]
    # JSON has no NaN.
    record = {"seed": seed, "step": step, "loss": str(loss), "gradient_norm": str(gradient), "files": names, "pixels_not_finite": broken}
    part = work / "diverged.part"
    part.write_text(json.dumps(record, indent=1) + "\n")
    part.replace(work / "diverged.json")
    first = [names[i] for i in broken if i < len(names)] or names
    value = f"seed {seed}, step {step}, files {', '.join(first) or 'not named by this recipe'}"
    what = "the loss is" if not math.isfinite(loss) else "the gradient's norm is"
    number = loss if not math.isfinite(loss) else gradient
    return TrainingDiverged(f"{what} {number} at step {step}; its batch is listed in {work / 'diverged.json'}", value=value)


def device_named(name: str) -> str:
    """ "cpu" or "cuda" for what was asked for ("auto" takes a GPU where one is). Raises UsageError where there is none."""
    import torch

    if name != "cpu" and torch.cuda.is_available():
        return "cuda"
    if name == "cuda":
        raise UsageError("torch sees no CUDA device", value=torch.__version__, remedy="Take --device cpu, or a torch built for CUDA.")
    return "cpu"


def train(recipe: Recipe, work: Path, seed: int, init: Path | None, threads: int, device: str = "cpu") -> dict[str, Any]:
    """Run or resume `recipe` with checkpoints in `work`; returns the averaged state dict at the end.

    `init` starts from another run's final weights, by name, where shapes agree. Killed at any time and called again with the
    same arguments, it ends in the same state as a run that was never killed (same machine, same number of threads). On a GPU
    (`device` "cuda") the batches and seeds are the same, but sums are taken in no fixed order: it ends close by, not in the same bytes.
    What is returned lies on the CPU.
    Raises TrainingDiverged at the first loss or gradient that is not finite, before it reaches the weights, and
    CheckpointInvalid where `work` holds something else than this run.
    """
    import torch
    from tqdm import tqdm

    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    work.mkdir(parents=True, exist_ok=True)
    checkpoint = work / "checkpoint.pt"
    run = {"recipe": recipe.name, "steps": recipe.steps, "seed": seed}
    saved = read_checkpoint(checkpoint, run) if checkpoint.exists() else None
    net = recipe.network(pretrained=saved is None).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    if init and saved is None:
        start_from = torch.load(init, weights_only=True, map_location=device)
        own = net.state_dict()
        fits = {k: v for k, v in start_from.items() if k in own and own[k].shape == v.shape}
        net.load_state_dict(fits, strict=False)
        print(f"started from {init}: {len(fits)} of {len(own)} tensors fit", file=sys.stderr)
    decay = [p for p in net.parameters() if p.ndim > 1]
    plain = [p for p in net.parameters() if p.ndim <= 1]
    groups = [{"params": decay, "weight_decay": 0.02}, {"params": plain, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=recipe.learning_rate)
    average = {k: v.detach().clone() for k, v in net.state_dict().items()}
    start, spent = 0, 0.0
    running: list[float] = []
    if saved is not None:
        try:
            net.load_state_dict(saved["net"])
            optimiser.load_state_dict(saved["optimiser"])
            start, spent = int(saved["step"]), float(saved["seconds"])
            for k, v in average.items():
                v.copy_(saved["average"][k])
        except (KeyError, RuntimeError, ValueError) as error:
            raise CheckpointInvalid("the checkpoint does not fit this network", value=checkpoint) from error
        running = list(saved.get("running", []))
        print(f"resumed at step {start} of {recipe.steps}", file=sys.stderr)
    log = work / "log.csv"
    cut_log(log, start)
    began = last_saved = time.monotonic()

    def save(step: int) -> None:
        state = {"net": net.state_dict(), "optimiser": optimiser.state_dict(), "average": average, "running": running}
        write_whole(state | {"run": run, "step": step, "seconds": spent + time.monotonic() - began}, checkpoint)

    # Emulated, bf16 takes two to ten times as long as float32 (measured on AVX2).
    half = device == "cuda" or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    own = {k: v for k, v in net.state_dict(keep_vars=True).items() if v.dtype.is_floating_point}
    counters = {k: v for k, v in net.state_dict(keep_vars=True).items() if not v.dtype.is_floating_point}
    net.train()
    bar = tqdm(total=recipe.steps, initial=start, unit="step", desc=recipe.name, mininterval=5.0)
    # Closed, so that the thread behind it ends with this call however it ends.
    with contextlib.closing(batches(recipe, seed, start)) as made:
        for step, batch in made:
            warm = min(1.0, (step + 1) / 50)
            lr = recipe.learning_rate * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / recipe.steps)))
            for group in optimiser.param_groups:
                group["lr"] = lr
            torch.manual_seed(step_seed(seed, step))
            tensors = {k: torch.from_numpy(v).to(device) for k, v in batch.items() if k != NAMES}
            tensors["image"] = tensors["image"].contiguous(memory_format=torch.channels_last)
            with torch.autocast(device, torch.bfloat16, enabled=half):
                out = net(tensors["image"])
            with torch.device(device):  # what a loss makes for itself lies where the network does
                loss = recipe.loss(out, tensors)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            gradient = float(torch.nn.utils.clip_grad_norm_(net.parameters(), 5.0))
            running.append(loss.item())
            if not (math.isfinite(running[-1]) and math.isfinite(gradient)):
                raise diverged(work, seed, step, batch, running[-1], gradient)
            optimiser.step()
            keep = min(EMA_DECAY, (step + 1) / (step + 20))
            with torch.no_grad():
                torch._foreach_lerp_([average[k] for k in own], list(own.values()), 1.0 - keep)
                for k, v in counters.items():
                    average[k].copy_(v)
            if (step + 1) % LOG_EVERY == 0 or step + 1 == recipe.steps:
                with log.open("a", newline="") as f:
                    row = [step + 1, f"{np.mean(running):.5f}", f"{spent + time.monotonic() - began:.1f}"]
                    csv.writer(f, lineterminator="\n").writerow(row)
                bar.set_postfix(loss=f"{np.mean(running):.3f}")
                running = []
            if time.monotonic() - last_saved > CHECKPOINT_EVERY_S:
                save(step + 1)
                last_saved = time.monotonic()
            bar.update()
    bar.close()
    save(recipe.steps)
    average = {k: v.cpu() for k, v in average.items()}
    write_whole(average, work / "final.pt")
    return average


def cut_log(log: Path, start: int) -> None:
    """Take the rows after step `start` out of a learning curve, whole or torn: a killed run goes on from its checkpoint, and
    writes them again."""
    rows = log.read_text().splitlines(keepends=True)[1:] if log.exists() else []
    kept = [
        r for r in rows if r.count(",") == 2 and r.endswith("\n") and r.partition(",")[0].isdigit() and int(r.partition(",")[0]) <= start
    ]
    part = log.with_suffix(".part")
    part.write_text(LOG_HEAD + "".join(kept))
    part.replace(log)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m models.train", description=__doc__)
    parser.add_argument("family", choices=sorted(RECIPES), help="what to train")
    parser.add_argument("--data", type=Path, required=True, help="folder that holds lumbar_mri/, spine_xray_ap/, spine_xray_class/")
    parser.add_argument("--work", type=Path, default=Path.home() / ".cache/spinebox/train", help="checkpoints and logs")
    parser.add_argument("--steps", type=int, help="shorten or lengthen the recipe")
    parser.add_argument("--init", type=Path, help="start from another run's final.pt")
    parser.add_argument("--pseudo", type=Path, help="folder of pseudo-labels made by `python -m models.pseudo`")
    parser.add_argument("--run", default="", help="name of this run's folder; default: the family")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 2)
    parser.add_argument("--device", choices=DEVICES, default="cpu", help="where the network runs; only a CPU ends in the same bytes again")
    args = parser.parse_args(argv)
    try:
        recipe = RECIPES[args.family](args.data, args.pseudo, args.steps)
        train(recipe, args.work / (args.run or args.family), args.seed, args.init, args.threads, device_named(args.device))
    except SpineboxError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
