"""A Subject small enough to be compiled in a second or two: three convolutions, global average pooling, four classes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from appliance import backends
from appliance.compiler.heatmap import attach_cam
from appliance.compiler.signature import REFERENCE, signature_of
from appliance.compiler.subject import Array, MapSpec, Progress, Subject
from calibration import merkle
from models.evaluate import Runner, Scores

SIDE, CLASSES = 32, 4


def graph(seed: int = 0, spiky: float = 0.0) -> object:
    """`spiky` > 0 makes one channel of the second layer so large that its activation's eight bits cannot hold the others beside it."""
    rng = np.random.default_rng(seed)
    widths = (1, 8, 16, 16)
    nodes, tensors = [], []
    for i in range(3):
        w = rng.normal(0, 1.4 / np.sqrt(9 * widths[i]), (widths[i + 1], widths[i], 3, 3)).astype(np.float32)
        if spiky and i == 1:
            w[0] *= spiky
        if spiky and i == 2:
            w[:, 0] /= spiky  # it counts as much as the others: eight bits can hold neither it nor them
        tensors += [numpy_helper.from_array(w, f"w{i}"), numpy_helper.from_array(np.zeros(widths[i + 1], np.float32), f"b{i}")]
        stride = 1 if i == 0 else 2
        nodes.append(
            helper.make_node(
                "Conv", [f"r{i}" if i else "image", f"w{i}", f"b{i}"], [f"c{i}"], f"conv{i}", pads=[1] * 4, strides=[stride] * 2
            )
        )
        # Equalisation goes through a ReLU, and would mend what is spiky; it does not go through a Clip.
        limits = ["zero", "far"] if spiky else []
        nodes.append(helper.make_node("Clip" if spiky else "Relu", [f"c{i}", *limits], [f"r{i + 1}"], f"relu{i}"))
    if spiky:
        tensors += [numpy_helper.from_array(np.float32(v), n) for n, v in (("zero", 0.0), ("far", 1e6))]
    head = rng.normal(0, 1, (CLASSES, widths[-1])).astype(np.float32)
    tensors += [numpy_helper.from_array(head, "head"), numpy_helper.from_array(np.zeros(CLASSES, np.float32), "bias")]
    nodes.append(helper.make_node("GlobalAveragePool", ["r3"], ["pool"], "pool"))
    nodes.append(helper.make_node("Flatten", ["pool"], ["flat"], "flat"))
    nodes.append(helper.make_node("Gemm", ["flat", "head", "bias"], ["logits"], "gemm", transB=1))
    given = [helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 1, SIDE, SIDE])]
    made = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, CLASSES])]
    return helper.make_model(
        helper.make_graph(nodes, "toy", given, made, tensors), opset_imports=[helper.make_opsetid("", 18)], ir_version=8
    )


def image(seed: int) -> Array:
    """A few bright ellipses on shading, in [-1, 1]."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:SIDE, :SIDE] / SIDE
    out = rng.uniform(-1, 0) + rng.uniform(-0.5, 0.5) * x + rng.uniform(-0.5, 0.5) * y
    for _ in range(int(rng.integers(1, 5))):
        cx, cy, a, b = rng.uniform(0.1, 0.9), rng.uniform(0.1, 0.9), rng.uniform(0.05, 0.3), rng.uniform(0.05, 0.3)
        out = np.where(((x - cx) / a) ** 2 + ((y - cy) / b) ** 2 < 1, rng.uniform(-1, 1), out)
    return np.clip(out, -1, 1).astype(np.float32)[None, None]


@dataclass
class ToyCalibration:
    seeds: tuple[int, ...]
    flipped: int = -1  # of which image one byte is another
    source: str = "synthetic images"

    @property
    def count(self) -> int:
        return len(self.seeds)

    @property
    def root(self) -> str:
        return merkle.root([hashlib.sha256(x.tobytes()).hexdigest() for x in self.inputs()])

    def to_csv(self) -> bytes:
        return ("item,sha256\n" + "".join(f"{s},{hashlib.sha256(image(s).tobytes()).hexdigest()}\n" for s in self.seeds)).encode()

    def inputs(self) -> Iterator[Array]:
        for i, seed in enumerate(self.seeds):
            x = image(seed)
            if i == self.flipped:
                x.reshape(-1).view(np.uint8)[0] ^= 1
            yield x


@dataclass
class ToyExaminer:
    """Accuracy against the float model's own answers on images where it is sure of them."""

    model: object
    seeds: Sequence[int]
    source: str = "agreement with FP32"
    calls: int = 0
    _samples: list[tuple[Array, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        session = backends.load(REFERENCE).open(self.model.SerializeToString(), signature_of(self.model), precision="f32", threads=1)
        logits = np.stack([session.run({"image": image(s)})["logits"][0] for s in self.seeds])
        order = np.sort(logits, axis=1)
        sure = order[:, -1] - order[:, -2] > 0.1 * logits.std()
        self._samples = [(image(s), int(z.argmax())) for s, z, keep in zip(self.seeds, logits, sure, strict=True) if keep]
        session.close()

    @property
    def identity(self) -> str:
        return hashlib.sha256(repr(list(self.seeds)).encode() + self.model.SerializeToString()).hexdigest()

    def scores(self, run: Runner, progress: Progress | None = None) -> Scores:
        self.calls += 1
        right = np.array([int(run({"image": x})["logits"][0].argmax()) == label for x, label in self._samples], float)
        out = Scores("accuracy", source=self.source)
        out.add("accuracy", range(len(right)), lambda i: float(right[i].mean()))
        if progress:
            progress(1, 1)
        return out

    baseline = scores


def subject(seed: int = 0, *, spiky: float = 0.0, flipped: int = -1) -> Subject:
    model, bias = attach_cam(graph(seed, spiky))
    return Subject(
        name="toy",
        version="1",
        task="classification",
        model=model,
        source_sha256=hashlib.sha256(graph(seed, spiky).SerializeToString()).hexdigest(),
        classes=tuple("abcd"),
        preprocess={"range": [-1, 1]},
        heatmap=MapSpec("cam", "cam", "relu2", cam_bias=tuple(bias)),
        calibration=ToyCalibration(tuple(range(100, 112)), flipped),
        examiner=ToyExaminer(model, range(1000, 1120)),
        validator=ToyExaminer(model, range(2000, 2080)),
        golden=[image(1), image(2)],
    )
