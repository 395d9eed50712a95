"""Compression as steps of a recipe: structured channel pruning, knowledge distillation, quantisation-aware fine-tuning.

`python -m models.compress STEP NAME --data DIR --of RUN` trains one compressed network of the shelf with the loop of
`models/train.py` and leaves `final.pt` and `run.json` as `models/shelf/train.py` does. Each step is a recipe around the family's own
recipe: the batches stay, the network or the loss changes. `more` changes nothing and trains as long: what a step is worth is its
distance to that.

Pruning takes hidden channels of inverted residuals, whose number nobody outside the block sees. Importance is the depthwise batch
norm's scale (Liu et al., "Network slimming", ICCV 2017), or the squared first Taylor term of the loss (Molchanov et al.,
"Importance estimation for neural network pruning", CVPR 2019). Distillation is after Hinton et al., "Distilling the knowledge in a
neural network", 2015. Quantisation-aware fine-tuning rounds as `appliance/compiler/quantise.py` will: weights to s8 of reduced range
for each output channel, activations to u8; gradients pass straight through (Bengio et al., 2013).
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from models import teacher as large
from models.export import WEIGHTS, torch_runner
from models.recipes import Batch
from models.shelf.train import ShelfRecipe, recipe, run
from models.train import DEVICES, SEED, device_named

if TYPE_CHECKING:
    from torch import Tensor, nn

STEPS = ("more", "prune", "distil", "qat")
FINE_TUNING = 40  # steps
RATE = 5e-4  # of fine-tuning
MULTIPLE = 8  # channels kept come in eights: what a vector register holds
TAYLOR_BATCHES = 4
TEMPERATURE, TEACHER_SHARE = 3.0, 0.7
WEIGHT_LEVELS, ACTIVATION_LEVELS = 64, 255
RANGE_DECAY = 0.95


# -- pruning --------------------------------------------------------------------------------------------------------


def hidden_blocks(net: nn.Module) -> dict[str, nn.Sequential]:
    """Bodies of the inverted residuals that expand: name -> Sequential of expansion, depthwise, (attention,) projection."""
    from torch import nn

    out: dict[str, nn.Sequential] = {}
    for name, module in net.named_modules():
        body = getattr(module, "body", None)
        if not isinstance(body, nn.Sequential) or len(body) < 3 or not all(isinstance(body[i], nn.Sequential) for i in (0, 1, -1)):
            continue
        first, middle = body[0][0], body[1][0]  # type: ignore[index]
        if first.kernel_size == (1, 1) and first.groups == 1 and middle.groups == middle.in_channels == first.out_channels:
            out[name] = body
    return out


def importance_by_scale(net: nn.Module) -> dict[str, Tensor]:
    """|scale| of the depthwise batch norm for each hidden channel of each block."""
    return {name: body[1][1].weight.detach().abs() for name, body in hidden_blocks(net).items()}  # type: ignore[index,union-attr,misc]


def importance_by_taylor(net: nn.Module, loss: Callable[[Any, dict[str, Tensor]], Tensor], batches: Iterable[Batch]) -> dict[str, Tensor]:
    """(scale d loss/d scale + shift d loss/d shift)^2 of the depthwise batch norm, summed over batches; weights are left alone."""
    import torch

    blocks = hidden_blocks(net)
    sums = {name: torch.zeros_like(body[1][1].weight) for name, body in blocks.items()}  # type: ignore[index,union-attr,arg-type]
    net.eval()  # the running statistics are those that the network will be used with
    for batch in batches:
        tensors = {k: torch.from_numpy(v) for k, v in batch.items() if v.dtype.kind != "U"}
        net.zero_grad(set_to_none=True)
        loss(net(tensors["image"]), tensors).backward()
        for name, body in blocks.items():
            norm: Any = body[1][1]  # type: ignore[index]
            sums[name] += (norm.weight.grad * norm.weight.detach() + norm.bias.grad * norm.bias.detach()).square()
    net.zero_grad(set_to_none=True)
    return sums


def prune(net: nn.Module, importance: dict[str, Tensor], share: float) -> dict[str, int]:
    """Take the least important `share` of all hidden channels out of `net`, in place; block -> channels kept.

    Importance is compared over blocks after division by each block's own length, so that a block of large values does not survive
    whole. A block keeps MULTIPLE channels at least. ValueError for a share outside [0, 1).
    """
    import torch

    if not 0 <= share < 1:
        raise ValueError(f"a share of {share} cannot be pruned")
    level = {name: v / v.norm().clamp(min=1e-12) for name, v in importance.items()}
    everything = torch.cat(list(level.values()))
    # By order, not by a limit: many channels may be worth exactly nothing.
    stays = torch.zeros(len(everything), dtype=torch.bool)
    stays[everything.argsort(descending=True, stable=True)[: len(everything) - int(share * len(everything))]] = True
    counts = dict(zip(level, (int(part.sum()) for part in stays.split([len(v) for v in level.values()])), strict=True))
    kept: dict[str, int] = {}
    for name, body in hidden_blocks(net).items():
        values, wanted = level[name], counts[name]
        count = min(len(values), max(MULTIPLE, -(-wanted // MULTIPLE) * MULTIPLE))
        keep_channels(body, values.topk(count).indices.sort().values)
        kept[name] = count
    return kept


def keep_channels(body: nn.Sequential, index: Tensor) -> None:
    """Leave only the hidden channels `index` in one block."""
    import torch

    def narrowed(conv: Any, rows: bool, columns: bool) -> None:
        weight = conv.weight.detach()
        weight = weight[index] if rows else weight
        conv.weight = torch.nn.Parameter((weight[:, index] if columns else weight).contiguous())
        if rows and conv.bias is not None:
            conv.bias = torch.nn.Parameter(conv.bias.detach()[index])
        conv.out_channels, conv.in_channels = conv.weight.shape[0], conv.weight.shape[1] * conv.groups

    def normalised(norm: Any) -> None:
        norm.weight, norm.bias = (torch.nn.Parameter(v.detach()[index]) for v in (norm.weight, norm.bias))
        norm.running_mean, norm.running_var = norm.running_mean[index], norm.running_var[index]
        norm.num_features = len(index)

    expand, depthwise, project = body[0], body[1], body[-1]
    narrowed(expand[0], True, False)  # type: ignore[index]
    normalised(expand[1])  # type: ignore[index]
    depthwise[0].groups = len(index)  # type: ignore[index,union-attr]
    narrowed(depthwise[0], True, False)  # type: ignore[index]
    normalised(depthwise[1])  # type: ignore[index]
    for attention in list(body)[2:-1]:
        narrowed(attention.down, False, True)
        narrowed(attention.up, True, False)
    narrowed(project[0], False, True)  # type: ignore[index]


def fit(net: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    """`net` with as many hidden channels as a pruned state dict has, and its values loaded."""
    import torch

    for name, body in hidden_blocks(net).items():
        count = state[f"{name}.body.0.0.weight"].shape[0]
        if count < body[0][0].out_channels:  # type: ignore[index,union-attr,operator]
            keep_channels(body, torch.arange(count))
    net.load_state_dict(state)
    return net


# -- quantisation-aware fine-tuning -----------------------------------------------------------------------------------


def round_like_int8(net: nn.Module) -> nn.Module:
    """`net` with the rounding of INT8 in its forward pass: weights of every convolution before a batch norm, and what comes out of
    that pair and its activation. The last layer stays in float, as it does in the engines. `unrounded` undoes it."""
    import torch
    from torch import nn
    from torch.nn.utils import parametrize

    class RoundWeight(nn.Module):
        """Symmetric, a scale for each output channel: folding a batch norm only changes that scale."""

        def forward(self, weight: Tensor) -> Tensor:
            scale = weight.detach().abs().flatten(1).amax(1).clamp(min=1e-8) / WEIGHT_LEVELS
            zero = torch.zeros(len(scale), dtype=torch.int32, device=weight.device)
            return torch.fake_quantize_per_channel_affine(weight, scale, zero, 0, -WEIGHT_LEVELS, WEIGHT_LEVELS)

    def round_output(module: Any, _inputs: Any, out: Tensor) -> Tensor:
        if module.training:
            seen = torch.stack([out.detach().amin().clamp(max=0), out.detach().amax().clamp(min=1e-6)]).float()
            first = bool((module.seen_range == 0).all())
            module.seen_range.copy_(seen if first else torch.lerp(seen, module.seen_range, RANGE_DECAY))
        low, high = (float(v) for v in module.seen_range)
        scale = max(high - low, 1e-6) / ACTIVATION_LEVELS
        zero = min(max(round(-low / scale), 0), ACTIVATION_LEVELS)
        return torch.fake_quantize_per_tensor_affine(out, scale, zero, 0, ACTIVATION_LEVELS)

    for module in list(net.modules()):
        if (
            isinstance(module, nn.Sequential)
            and len(module) > 1
            and isinstance(module[0], nn.Conv2d)
            and isinstance(module[1], nn.BatchNorm2d)
        ):
            parametrize.register_parametrization(module[0], "weight", RoundWeight())
            module.register_buffer("seen_range", torch.zeros(2))
            module.register_forward_hook(round_output)
    return net


def unrounded(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict that a network without the rounding takes."""
    tail = ".parametrizations.weight.original"
    kept = {k: v for k, v in state.items() if not k.endswith(".seen_range")}
    return {f"{k.removesuffix(tail)}.weight" if k.endswith(tail) else k: v for k, v in kept.items()}


# -- recipes --------------------------------------------------------------------------------------------------------


class Continued(ShelfRecipe):
    """Fine-tuning of a trained network: what every step but distillation starts from."""

    def __init__(self, base: ShelfRecipe, weights: Path) -> None:
        super().__init__(base.entry, base.base)
        self.weights, self.learning_rate = weights, RATE

    def trained(self) -> nn.Module:
        import torch

        return fit(self.entry.network(), torch.load(self.weights, weights_only=True))

    def network(self, pretrained: bool) -> nn.Module:
        del pretrained
        return self.trained()


class Pruned(Continued):
    """A share of the hidden channels gone, then fine-tuning. The choice is made again at each start, from the same weights and
    seeded batches, so that an interrupted run finds its own shape."""

    def __init__(self, base: ShelfRecipe, weights: Path, share: float, by: str, seed: int) -> None:
        super().__init__(base, weights)
        self.share, self.by, self.seed = share, by, seed

    def network(self, pretrained: bool) -> nn.Module:
        del pretrained
        net = self.trained()
        if self.by == "taylor":
            batches = (self.batch(np.random.default_rng([self.seed, 1, i]), i) for i in range(TAYLOR_BATCHES))
            importance = importance_by_taylor(net, self.loss, batches)
        else:
            importance = importance_by_scale(net)
        prune(net, importance, self.share)
        return net


class Rounded(Continued):
    """Fine-tuning under the rounding of INT8."""

    def network(self, pretrained: bool) -> nn.Module:
        del pretrained
        return round_like_int8(self.trained())


class Distilled(ShelfRecipe):
    """The task's loss beside the distance to what a teacher says of the same crop: five grades as one softened distribution, three
    flags as probabilities. For graders."""

    def __init__(self, base: ShelfRecipe, teacher: Callable[[Tensor], Tensor]) -> None:
        super().__init__(base.entry, base.base)
        self.teacher = teacher

    def loss(self, out: Any, batch: dict[str, Tensor]) -> Tensor:
        return taught(super().loss(out, batch), out, batch["image"], self.teacher)


def taught(own: Tensor, out: Tensor, image: Tensor, teacher: Callable[[Tensor], Tensor]) -> Tensor:
    """The labels' loss and the distance to what `teacher` says of the same crops, weighed together."""
    import torch

    with torch.no_grad():
        said = teacher(image)
    return (1 - TEACHER_SHARE) * own + TEACHER_SHARE * distance_to_teacher(out.float(), said.float())


def distance_to_teacher(logits: Tensor, said: Tensor) -> Tensor:
    """N x 8 logits of student and teacher: T^2 KL over the grades, half the cross-entropy over the flags, mean over the batch."""
    from torch.nn import functional as f

    soft = f.kl_div((logits[:, :5] / TEMPERATURE).log_softmax(1), (said[:, :5] / TEMPERATURE).softmax(1), reduction="batchmean")
    return TEMPERATURE**2 * soft + 0.5 * f.binary_cross_entropy_with_logits(logits[:, 5:], said[:, 5:].sigmoid())


def command_of(args: argparse.Namespace) -> str:
    """What follows `python -m models.compress` in the command that makes this run again; folders are left to whoever calls it."""
    out = [args.step, args.name, "--data DIR --pseudo DIR"]
    out += [f"--{k} {v}" for k in ("of", "run", "steps") if (v := getattr(args, k))]
    if args.step == "prune":
        out += [f"--share {args.share:g} --by {args.by}"]
    out += [f"--teacher {t}" for t in args.teacher]
    return " ".join(out)


def main(argv: list[str] | None = None) -> int:
    import torch

    parser = argparse.ArgumentParser(prog="python -m models.compress", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("step", choices=STEPS)
    parser.add_argument("name", help="a network of the shelf")
    parser.add_argument("--data", type=Path, required=True, help="folder that holds lumbar_mri/")
    parser.add_argument("--pseudo", type=Path, help="folder of pseudo-labels made by `python -m models.pseudo`")
    parser.add_argument("--work", type=Path, default=Path.home() / ".cache/spinebox/train/shelf", help="checkpoints and logs")
    parser.add_argument("--of", help="run that is compressed; default: the network's own")
    parser.add_argument("--run", help="name of the new run; default: NAME-STEP")
    parser.add_argument("--steps", type=int, help="shorten or lengthen the step")
    parser.add_argument("--share", type=float, default=0.4, help="prune: share of the hidden channels to take out")
    parser.add_argument("--by", choices=("scale", "taylor"), default="taylor", help="prune: importance")
    parser.add_argument(
        "--teacher", action="append", default=[],
        help="distil: run of a large grader that teaches (`python -m models.crossval --variant large --fold all`); given again, the "
        "mean of all; default: the shipped grader",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 2)
    parser.add_argument("--device", choices=DEVICES, default="cpu", help="where the network runs; only a CPU ends in the same bytes again")
    args = parser.parse_args(argv)
    device = device_named(args.device)
    steps = args.steps or (None if args.step == "distil" else FINE_TUNING)
    base = recipe(args.name, args.data, args.pseudo, steps)
    weights = args.work / (args.of or args.name) / "final.pt"
    made: ShelfRecipe
    if args.step == "distil":
        if base.entry.design.family != "grader":
            parser.error("only graders are distilled")
        if args.teacher:
            said = f"distilled from {len(args.teacher)} large graders, same steps"
            made = Distilled(base, large.committee([args.work / t / "final.pt" for t in args.teacher], device))
        else:
            made, said = Distilled(base, torch_runner(WEIGHTS / "grader.onnx")), "distilled from the shipped grader, same steps"
    elif args.step == "prune":
        made = Pruned(base, weights, args.share, args.by, args.seed)
        said = f"{args.share:.0%} of the hidden channels pruned by {args.by}, {made.steps} steps of fine-tuning"
    elif args.step == "qat":
        made, said = Rounded(base, weights), f"quantisation-aware, {base.steps} steps of fine-tuning"
    else:
        made, said = Continued(base, weights), f"nothing changed, {base.steps} steps more"
    work = args.work / (args.run or f"{args.name}-{args.step}")
    state = run(made, work, args.seed, args.threads, device)
    torch.save(unrounded(state), work / "final.pt")
    facts = json.loads((work / "run.json").read_text())
    facts["compression"] = {"step": said, "of": args.of or args.name, "command": command_of(args), "teachers": args.teacher}
    (work / "run.json").write_text(json.dumps(facts, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
