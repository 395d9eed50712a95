"""Training: `python -m models.train FAMILY --data DIR` -> a checkpoint that resumes, a learning curve, an ONNX file.

Hides the loop: seeded batches (step i is the same whether the run was interrupted or not), a background thread that
makes them, bf16 autocast where the CPU has it, an exponential moving average of the weights, cosine decay, atomic
checkpoints. What differs between families lies in `models/recipes.py`.
"""

from __future__ import annotations

import argparse
import csv
import math
import os
import queue
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from models import recipes_ap
from models.recipes import RECIPES as LUMBAR
from models.recipes import Batch, Recipe

RECIPES = {**LUMBAR, **recipes_ap.RECIPES}
SEED = 20261122
CHECKPOINT_EVERY_S = 60.0
EMA_DECAY = 0.995


def batches(recipe: Recipe, seed: int, start: int) -> Iterator[tuple[int, Batch]]:
    """Batches start, start + 1, ... made ahead by one thread; batch i depends on (seed, i) alone."""
    ahead: queue.Queue[tuple[int, Batch] | Exception] = queue.Queue(maxsize=3)
    stop = threading.Event()

    def make() -> None:
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


def train(recipe: Recipe, work: Path, seed: int, init: Path | None, threads: int) -> dict[str, Any]:
    """Run or resume `recipe` with checkpoints in `work`; returns the averaged state dict at the end.

    `init` starts from another run's final weights, by name, where shapes agree.
    """
    import torch
    from tqdm import tqdm

    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    work.mkdir(parents=True, exist_ok=True)
    checkpoint = work / "checkpoint.pt"
    net = recipe.network(pretrained=not checkpoint.exists()).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if init and not checkpoint.exists():
        start_from = torch.load(init, weights_only=True)
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
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        net.load_state_dict(saved["net"])
        optimiser.load_state_dict(saved["optimiser"])
        average, start, spent = saved["average"], int(saved["step"]), float(saved["seconds"])
        print(f"resumed at step {start} of {recipe.steps}", file=sys.stderr)

    log = work / "log.csv"
    if not log.exists():
        log.write_text("step,loss,seconds\n")
    began = last_saved = time.monotonic()

    def save(step: int) -> None:
        part = checkpoint.with_suffix(".part")
        torch.save(
            {
                "net": net.state_dict(),
                "optimiser": optimiser.state_dict(),
                "average": average,
                "step": step,
                "seconds": spent + time.monotonic() - began,
            },
            part,
        )
        part.replace(checkpoint)

    # Emulated, bf16 takes two to ten times as long as float32 (measured on AVX2).
    half = bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    net.train()
    running: list[float] = []
    bar = tqdm(total=recipe.steps, initial=start, unit="step", desc=recipe.name, mininterval=5.0)
    for step, batch in batches(recipe, seed, start):
        warm = min(1.0, (step + 1) / 50)
        lr = recipe.learning_rate * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / recipe.steps)))
        for group in optimiser.param_groups:
            group["lr"] = lr
        tensors = {k: torch.from_numpy(v) for k, v in batch.items()}
        tensors["image"] = tensors["image"].contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            out = net(tensors["image"])
        loss = recipe.loss(out, tensors)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 5.0)
        optimiser.step()
        keep = min(EMA_DECAY, (step + 1) / (step + 20))
        with torch.no_grad():
            for k, v in net.state_dict().items():
                if v.dtype.is_floating_point:
                    average[k].lerp_(v, 1.0 - keep)
                else:
                    average[k].copy_(v)
        running.append(loss.item())
        if (step + 1) % 20 == 0 or step + 1 == recipe.steps:
            with log.open("a") as f:
                csv.writer(f).writerow([step + 1, f"{np.mean(running):.5f}", f"{spent + time.monotonic() - began:.1f}"])
            bar.set_postfix(loss=f"{np.mean(running):.3f}")
            running = []
        if time.monotonic() - last_saved > CHECKPOINT_EVERY_S:
            save(step + 1)
            last_saved = time.monotonic()
        bar.update()
    bar.close()
    save(recipe.steps)
    torch.save(average, work / "final.pt")
    return average


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
    args = parser.parse_args(argv)
    recipe = RECIPES[args.family](args.data, args.pseudo, args.steps)
    train(recipe, args.work / (args.run or args.family), args.seed, args.init, args.threads)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
