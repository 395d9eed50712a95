"""Trained weights -> the ONNX file that the repository ships: batch norm folded, half-precision storage, float32 compute.

`python -m models.export FAMILY --weights final.pt` writes models/weights/FAMILY.onnx. Weights are stored as float16
initializers behind Cast nodes, which halves the file; `load_float32` turns them back for compiling. The largest rounding
of a weight is 2^-11 of its value, and the exporter prints what it does to the outputs.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from models import detector, grader, segmenter, spine_class, vertebra_ap

if TYPE_CHECKING:
    from torch import Tensor, nn

FAMILIES = {m.SPEC.name: m for m in (detector, grader, segmenter, spine_class, vertebra_ap)}
WEIGHTS = Path(__file__).with_name("weights")
SMALLEST_HALVED = 64  # biases and constants below this many values stay float32


def fold_batch_norm(net: nn.Module) -> None:
    """Fold every (convolution, batch norm) pair of the Sequentials of `net` in place; `net` must be in eval mode."""
    from torch import nn
    from torch.nn.utils.fusion import fuse_conv_bn_eval

    for module in net.modules():
        if not isinstance(module, nn.Sequential):
            continue
        for i in range(len(module) - 1):
            first, second = module[i], module[i + 1]
            if isinstance(first, nn.Conv2d) and isinstance(second, nn.BatchNorm2d):
                module[i] = fuse_conv_bn_eval(first, second)
                module[i + 1] = nn.Identity()


def export(family: str, weights: Path, target: Path) -> None:
    """Write `target` from a family's state dict."""
    import torch

    module: Any = FAMILIES[family]
    net = module.network()
    net.load_state_dict(torch.load(weights, weights_only=True))
    write(net, module.SPEC.input_hw, module.SPEC.outputs, target)


def write(net: nn.Module, input_hw: tuple[int, int], outputs: Sequence[str], target: Path) -> None:
    """Write `target` from a trained network, whose batch norms are folded in place. The graph has one input `image` and the
    named outputs, fixed shapes."""
    import onnx
    import torch

    net.eval()
    fold_batch_norm(net)
    image = torch.zeros(1, 1, *input_hw)
    program = torch.onnx.export(
        net, (image,), dynamo=True, opset_version=18, external_data=False, input_names=["image"], output_names=list(outputs), verbose=False
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(halve_weights(program.model_proto), target)


def halve_weights(model: Any) -> Any:
    """A copy whose larger float32 initializers are float16 behind a Cast."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    out = onnx.ModelProto()
    out.CopyFrom(model)
    casts = []
    for i, tensor in enumerate(out.graph.initializer):
        values = numpy_helper.to_array(tensor)
        if tensor.data_type != TensorProto.FLOAT or values.size < SMALLEST_HALVED:
            continue
        name = f"{tensor.name}.half"
        casts.append(helper.make_node("Cast", [name], [tensor.name], name=f"{tensor.name}.cast", to=TensorProto.FLOAT))
        out.graph.initializer[i].CopyFrom(numpy_helper.from_array(values.astype(np.float16), name))
    nodes = [*casts, *out.graph.node]
    del out.graph.node[:]
    out.graph.node.extend(nodes)
    # The exporter's notes (source lines, module paths) say more about the trainer's disk than about the model.
    for node in out.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    del out.metadata_props[:]
    del out.graph.metadata_props[:]
    del out.graph.value_info[:]
    return out


def load_float32(path: Path) -> Any:
    """The ONNX model with its half-precision initializers turned back to float32 and the Casts gone."""
    import onnx
    from onnx import TensorProto, numpy_helper

    model = onnx.load(path)
    halves = {t.name: t for t in model.graph.initializer if t.data_type == TensorProto.FLOAT16}
    kept = []
    for node in model.graph.node:
        if node.op_type == "Cast" and node.input[0] in halves:
            tensor = halves[node.input[0]]
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), node.output[0]))
        else:
            kept.append(node)
    del model.graph.node[:]
    model.graph.node.extend(kept)
    return model


def file_runner(path: Path) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """An exported file, or an INT8 engine that is an ONNX file, as a runner: inputs by name -> outputs by name."""
    import onnxruntime as ort

    session = ort.InferenceSession(load_float32(path).SerializeToString(), providers=["CPUExecutionProvider"])
    names = [o.name for o in session.get_outputs()]
    return lambda inputs: dict(zip(names, session.run(names, inputs), strict=True))


def torch_runner(path: Path) -> Callable[[Tensor], Tensor]:
    """The first output of an exported file as a function of a torch batch N x 1 x H x W: a teacher, or a labeller."""
    import onnxruntime as ort
    import torch

    session = ort.InferenceSession(load_float32(path).SerializeToString(), providers=["CPUExecutionProvider"])
    name = session.get_outputs()[0].name

    def run(x: Tensor) -> Tensor:
        said = [session.run([name], {"image": one.contiguous().cpu().numpy()})[0] for one in x.split(1)]
        return torch.from_numpy(np.concatenate(said)).to(x.device)

    return run


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m models.export", description=__doc__)
    parser.add_argument("family", choices=sorted(FAMILIES))
    parser.add_argument("--weights", type=Path, required=True, help="final.pt of a training run")
    parser.add_argument("--out", type=Path, help="default: models/weights/FAMILY.onnx")
    args = parser.parse_args(argv)
    target = args.out or WEIGHTS / f"{args.family}.onnx"
    export(args.family, args.weights, target)
    print(f"{target}: {target.stat().st_size / 1e6:.2f} MB")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
