"""A trained network of the shelf -> its ONNX file: `python -m models.shelf.export NAME --weights final.pt --out NAME.onnx`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kernels.preprocess import letterbox, normalise
from models import grader, phantom
from models.compress import fit
from models.export import write
from models.shelf.design import shelf
from models.shelf.train import digest

if TYPE_CHECKING:
    from torch import nn

PHANTOMS = 4


def export(name: str, weights: Path, target: Path, **variant: Any) -> None:
    """Write `target` from a state dict; `variant` goes to `network()`, and tensors that a smaller variant lacks are left out."""
    import torch

    entry = shelf()[name]
    net = entry.network(**variant)
    state = torch.load(weights, weights_only=True)
    fit(net, {k: v for k, v in state.items() if k in net.state_dict()})
    write(net, entry.design.spec.input_hw, entry.design.outputs, target)


def untrained(name: str, seed: int) -> nn.Module:
    """The network with seeded weights and batch norms that have seen phantoms: what it costs can be measured before it is trained.

    With the statistics of a new network hardly anything but biases would reach the output.
    """
    import torch
    from torch import nn

    torch.manual_seed(seed)
    spec = shelf()[name].design.spec
    images = []
    for i in range(PHANTOMS):
        pixels, truth = phantom.draw(np.random.default_rng([seed, i]), weighting="T2")
        x = normalise(pixels)
        images.append(grader.crop(x, truth.discs[i].box_px) if spec.name == grader.SPEC.name else letterbox(x, spec.input_hw)[0][0])
    net = shelf()[name].network().train()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the mean over what is seen
        if isinstance(module, nn.Dropout | nn.Dropout2d):
            module.eval()
    with torch.no_grad():
        net(torch.from_numpy(np.stack(images)))
    return net.eval()


def save_untrained(name: str, seed: int, target: Path) -> str:
    """Write the state dict of `untrained` to `target`; returns its digest."""
    import torch

    state = untrained(name, seed).state_dict()
    torch.save(state, target)
    return digest(state)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m models.shelf.export", description=__doc__)
    parser.add_argument("name", choices=sorted(shelf()))
    parser.add_argument("--weights", type=Path, required=True, help="final.pt of a training run")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    export(args.name, args.weights, args.out)
    print(f"{args.out}: {args.out.stat().st_size / 1e6:.2f} MB")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
