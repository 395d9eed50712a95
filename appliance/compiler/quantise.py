"""Calibrate once, then write the CPU flavour of the Q/DQ graph: u8 activations, s8 weights for each output channel.

The ranges are a record of their own, so a second flavour (symmetric, for TensorRT) needs no second calibration. The graph
rewriting is ONNX Runtime's; what is ours is the record and what stays in float: every node that makes a graph output (a
score and a box must not share a range, and a heatmap is evidence), and the map's own convolution.
"""

from __future__ import annotations

import itertools
import tempfile
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantType
from onnxruntime.quantization.calibrate import TensorsData, create_calibrator
from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

from appliance.errors import CalibrationInvalid

Ranges = dict[str, tuple[float, float]]
# Clip is among them so that ReLU6 becomes the saturation of its own range: else the values before it would be measured and
# rounded, most of which it throws away.
QUANTISED_OPS = ("Conv", "Clip", "Add", "Concat", "Resize", "MaxPool", "GlobalAveragePool")


def measure_ranges(model: Any, inputs: Iterable[NDArray[np.float32]], progress: Callable[[], None] | None = None) -> Ranges:
    """Smallest and largest value of every activation over the calibration inputs; memory does not grow with their number.

    Raises CalibrationInvalid where there is no input, or where values are not finite.
    """
    rest = iter(inputs)
    first = next(rest, None)
    if first is None:
        raise CalibrationInvalid("a calibration set needs at least one image")

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.rest = itertools.chain([first], rest)

        def get_next(self) -> dict[str, NDArray[np.float32]] | None:
            x = next(self.rest, None)
            if x is None:
                return None
            # The calibrator skips NaN when it takes extremes over images, so one bad image would pass unseen.
            if not np.isfinite(x).all():
                raise CalibrationInvalid("a calibration image holds NaN or infinite values")
            if progress:
                progress()
            return {model.graph.input[0].name: x}

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        onnx.save(model, path)
        calibrator = create_calibrator(path, list(QUANTISED_OPS), str(Path(folder) / "augmented.onnx"), CalibrationMethod.MinMax)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # NaN has its own message below
            calibrator.collect_data(Reader())
            found = calibrator.compute_data()
    ranges = {name: (float(np.min(data.range_value[0])), float(np.max(data.range_value[1]))) for name, data in found.items()}
    bad = [name for name, (low, high) in ranges.items() if not (np.isfinite(low) and np.isfinite(high))]
    if bad:
        raise CalibrationInvalid("the network gives NaN or infinite values on the calibration images", value=bad[0])
    return ranges


def float_nodes(model: Any) -> list[str]:
    """Names of the nodes that stay in float: whatever makes a graph output."""
    outputs = {o.name for o in model.graph.output}
    return [n.name for n in model.graph.node if any(o in outputs for o in n.output)]


def quantise(model: Any, ranges: Ranges) -> tuple[Any, float]:
    """The CPU Q/DQ graph, and the share of convolution weights that stayed in float."""
    for i, node in enumerate(model.graph.node):
        node.name = node.name or f"node_{i}"
    excluded = float_nodes(model)  # by name, so after every node has one
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    data = TensorsData(CalibrationMethod.MinMax, {k: (np.float32(low), np.float32(high)) for k, (low, high) in ranges.items()})
    quantiser = QDQQuantizer(
        copy,
        per_channel=True,
        reduce_range=False,
        weight_qType=QuantType.QInt8,
        activation_qType=QuantType.QUInt8,
        tensors_range=data,
        nodes_to_quantize=[],
        nodes_to_exclude=excluded,
        op_types_to_quantize=list(QUANTISED_OPS),
        extra_options={"ActivationSymmetric": False, "WeightSymmetric": True},
    )
    quantiser.quantize_model()
    quantiser.model.topological_sort()
    out = quantiser.model.model
    for node in out.graph.node:
        node.doc_string = ""
    sizes = {t.name: int(np.prod(t.dims)) for t in model.graph.initializer}
    convolutions = [n for n in model.graph.node if n.op_type == "Conv"]
    total = sum(sizes.get(n.input[1], 0) for n in convolutions)
    kept = sum(sizes.get(n.input[1], 0) for n in convolutions if n.name in excluded)
    onnx.checker.check_model(out)
    return out, kept / max(total, 1)
