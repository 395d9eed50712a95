"""A trained network of the shelf -> its ONNX file: `python -m models.shelf.export NAME --weights final.pt --out NAME.onnx`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from models.compress import fit
from models.export import write
from models.shelf.design import shelf


def export(name: str, weights: Path, target: Path, **variant: Any) -> None:
    """Write `target` from a state dict; `variant` goes to `network()`, and tensors that a smaller variant lacks are left out."""
    import torch

    entry = shelf()[name]
    net = entry.network(**variant)
    state = torch.load(weights, weights_only=True)
    fit(net, {k: v for k, v in state.items() if k in net.state_dict()})
    write(net, entry.design.spec.input_hw, entry.design.outputs, target)


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
