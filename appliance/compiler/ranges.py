"""What every activation was seen to hold, in memory that does not grow with the number of images, and the ranges drawn from it.

Hides the streaming histogram and the estimators. A bin is as wide as a power of two and begins at a multiple of its width, and
the width is the smallest that covers all values with `BINS` bins. So a histogram depends on the values alone: neither on their
order nor on how they were dealt out over images, and widening it merges neighbours without moving a single count.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from appliance import backends
from appliance.backends import Signature, Tensor
from appliance.errors import CalibrationInvalid, GraphUnsupported

Array = NDArray[np.float32]
Range = tuple[float, float]
Ranges = dict[str, Range]
BINS = 2048
LEVELS = 256
# A pass gives out at most this much of the inner values at once; a larger network is run in several passes an image.
PASS_BYTES = 128 << 20
_FINEST = -100  # exponent of the finest bin: far below what a float32 network tells apart
_LARGEST_INDEX = 2.0**40
_CHUNK = 1 << 20  # values sorted into bins at once: bounds the temporary arrays


@dataclass
class Histogram:
    """Counts of bins of width 2 ** exponent, the first beginning at `first` widths; exact extremes, moments, zeros.

    `mean_low` and `mean_high` are the averages of each image's extremes, every image weighing the same.
    """

    exponent: int = _FINEST
    first: int = 0
    counts: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    low: float = math.inf
    high: float = -math.inf
    count: int = 0
    zeros: int = 0
    images: int = 0
    total: float = 0.0
    squares: float = 0.0
    mean_low: float = 0.0
    mean_high: float = 0.0

    def add(self, values: Array) -> None:
        """The values of one image. Raises ValueError for NaN or infinite ones and for none."""
        flat = np.ascontiguousarray(values, np.float32).ravel()
        if not flat.size:
            raise ValueError("no values")
        low, high = float(flat.min()), float(flat.max())
        if not (math.isfinite(low) and math.isfinite(high)):
            raise ValueError("NaN or infinite values")
        self._cover(low, high)
        for start in range(0, flat.size, _CHUNK):
            # In double precision a float32 over a power of two is exact, and the smallest negative one is still negative.
            part = flat[start : start + _CHUNK].astype(np.float64)
            index = np.floor(part * 2.0**-self.exponent).astype(np.int64) - self.first
            self.counts += np.bincount(index, minlength=len(self.counts))
            self.total += float(part.sum())
            self.squares += float(np.dot(part, part))
        self.zeros += int(flat.size - np.count_nonzero(flat))
        self.count += flat.size
        self.images += 1
        self.mean_low += (low - self.mean_low) / self.images
        self.mean_high += (high - self.mean_high) / self.images

    def _cover(self, low: float, high: float) -> None:
        """Widen so that `low` and `high` have bins."""
        self.low, self.high = min(self.low, low), max(self.high, high)
        exponent = self.exponent
        while True:
            width = 2.0**exponent
            first, last = math.floor(self.low / width), math.floor(self.high / width)
            if last - first < BINS and max(abs(first), abs(last)) < _LARGEST_INDEX:
                break
            exponent += 1
        counts = np.zeros(last - first + 1, np.int64)
        if self.count:
            old = (np.arange(len(self.counts)) + self.first) >> (exponent - self.exponent)
            np.add.at(counts, old - first, self.counts)
        self.exponent, self.first, self.counts = exponent, first, counts

    @property
    def edges(self) -> NDArray[np.float64]:
        """The bins' borders, one more than bins."""
        return np.asarray((np.arange(len(self.counts) + 1) + self.first) * 2.0**self.exponent, np.float64)

    @property
    def mean(self) -> float:
        return self.total / self.count

    @property
    def variance(self) -> float:
        return max(0.0, self.squares / self.count - self.mean**2)

    def to_json(self) -> dict[str, Any]:
        out: dict[str, Any] = {k: getattr(self, k) for k in _SCALARS}
        return out | {"counts": [int(c) for c in self.counts]}

    def summary(self) -> dict[str, Any]:
        """As `to_json`, without the bins: what a bundle keeps."""
        return {k: getattr(self, k) for k in _SCALARS if k not in ("exponent", "first")}

    @classmethod
    def from_json(cls, data: Any) -> Histogram:
        """Raises CalibrationInvalid for what `to_json` does not give."""
        try:
            counts = data["counts"]
            whole = all(isinstance(c, int) and c >= 0 for c in counts) and 0 < len(counts) <= BINS
            numbers = {k: data[k] for k in _SCALARS}
            sound = all(isinstance(v, (int, float)) and math.isfinite(v) for v in numbers.values())
            if not (whole and sound and sum(counts) == numbers["count"] and -200 < numbers["exponent"] < 200):
                raise ValueError("the counts contradict each other")
            return cls(**numbers, counts=np.array(counts, np.int64))
        except (TypeError, KeyError, ValueError) as error:
            raise CalibrationInvalid(f"not a histogram of a calibration record: {error}") from error


_SCALARS = ("exponent", "first", "low", "high", "count", "zeros", "images", "total", "squares", "mean_low", "mean_high")


# -- estimators ---------------------------------------------------------------------------------------------------------


def min_max(h: Histogram) -> Range:
    return h.low, h.high


def moving_average(h: Histogram) -> Range:
    """The average of each image's extremes: one odd image counts once, not for ever."""
    return h.mean_low, h.mean_high


def percentile(h: Histogram, share: float) -> Range:
    """Leaves out at most `1 - share` of all values on either side, to a bin's border."""
    beyond = (1.0 - share) * h.count
    edges = h.edges
    below = np.cumsum(h.counts)
    above = np.cumsum(h.counts[::-1])
    low = edges[int(np.searchsorted(below, beyond, side="right"))]
    high = edges[len(h.counts) - int(np.searchsorted(above, beyond, side="right"))]
    return max(h.low, float(low)), min(h.high, float(high))


def mean_square(h: Histogram) -> Range:
    """The range with the smallest expected squared error of 256 levels.

    Error = step^2 / 12 for each value inside (a zero has none: it is always a level) + squared distance of each value outside.
    Both sides are searched in turn, in hundredths of the extremes, until neither moves.
    """
    edges = h.edges
    centres = np.clip((edges[:-1] + edges[1:]) / 2, h.low, h.high)
    counts = h.counts.astype(np.float64)
    share = 1.0 - h.zeros / h.count

    def error(low: float, high: float) -> float:
        step = (max(high, 0.0) - min(low, 0.0)) / (LEVELS - 1)
        beyond = np.maximum(centres - max(high, 0.0), 0.0) + np.maximum(min(low, 0.0) - centres, 0.0)
        return float((counts * beyond**2).sum()) + share * h.count * step**2 / 12

    grid = np.linspace(0.1, 1.0, 91)
    low, high = h.low, h.high
    for _ in range(4):
        before = low, high
        if h.high > 0:
            high = h.high * float(grid[int(np.argmin([error(low, h.high * g) for g in grid]))])
        if h.low < 0:
            low = h.low * float(grid[int(np.argmin([error(h.low * g, high) for g in grid]))])
        if (low, high) == before:
            break
    return low, high


def entropy(h: Histogram) -> Range:
    """The threshold on magnitudes that loses the least information (Kullback-Leibler), as in TensorRT's calibrator.

    Source: S. Migacz, "8-bit inference with TensorRT", GTC 2017: 128 levels, what is outside counts to the last bin, and the
    bin of zeros is not asked (it is set to its neighbour).
    """
    index = np.arange(len(h.counts)) + h.first
    magnitude = np.where(index >= 0, index, -index - 1)
    counts = np.bincount(magnitude, weights=h.counts).astype(np.float64) if magnitude.max() < 4 * BINS else h.counts.astype(np.float64)
    levels = LEVELS // 2
    if magnitude.max() >= 4 * BINS or len(counts) <= levels:
        return min_max(h)  # far from zero or nearly constant: there is no tail to cut
    counts[0] = counts[1]
    bins = len(counts)
    best, threshold = math.inf, bins
    for cut in [*range(levels, bins, max(1, bins // LEVELS)), bins]:
        reference = counts[:cut].copy()
        reference[-1] += counts[cut:].sum()
        starts = (np.arange(levels) * cut) // levels
        filled = counts[:cut] > 0
        sums = np.add.reduceat(counts[:cut], starts)
        spread = np.repeat(sums / np.maximum(np.add.reduceat(filled.astype(np.float64), starts), 1.0), np.diff([*starts, cut]))
        guess = np.where(filled, spread, 0.0)
        p, q = reference / reference.sum(), guess / max(guess.sum(), 1e-300)
        asked = p > 0
        loss = float((p[asked] * np.log(p[asked] / np.maximum(q[asked], 1e-12))).sum())
        if loss < best:
            best, threshold = loss, cut
    limit = threshold * 2.0**h.exponent
    return max(h.low, -limit), min(h.high, limit)


ESTIMATORS: dict[str, Callable[[Histogram], Range]] = {
    "min-max": min_max,
    "moving-average": moving_average,
    "percentile-99.9": lambda h: percentile(h, 0.999),
    "percentile-99.99": lambda h: percentile(h, 0.9999),
    "percentile-99.999": lambda h: percentile(h, 0.99999),
    "entropy": entropy,
    "mse": mean_square,
}


# -- collecting ---------------------------------------------------------------------------------------------------------


def float_tensors(model: Any) -> dict[str, tuple[int, ...]]:
    """Every float32 input and inner tensor that shape inference can name, with its shape (0 where it is not fixed)."""
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True)
    stored = {t.name for t in model.graph.initializer}
    out = {}
    for value in (*inferred.graph.input, *inferred.graph.value_info, *inferred.graph.output):
        tensor = value.type.tensor_type
        if tensor.elem_type == onnx.TensorProto.FLOAT and value.name not in stored:
            out[value.name] = tuple(int(d.dim_value) for d in tensor.shape.dim)
    return out


def with_outputs(model: Any, values: Iterable[tuple[str, tuple[int, ...]]]) -> Any:
    """A copy of `model` that gives out these inner tensors too."""
    out = onnx.ModelProto()
    out.CopyFrom(model)
    there = {o.name for o in out.graph.output}
    for name, shape in values:
        if name not in there:
            dims = [d or None for d in shape]
            out.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, dims))
    return out


def open_float(model: Any, threads: int = 0) -> Any:
    """A session of the reference runtime on a graph with whatever outputs it has."""

    def tensors(values: Any) -> tuple[Tensor, ...]:
        return tuple(Tensor(v.name, tuple(int(d.dim_value) for d in v.type.tensor_type.shape.dim)) for v in values)

    signature = Signature(tensors(model.graph.input), tensors(model.graph.output))
    return backends.load("onnxruntime").open(model.SerializeToString(), signature, precision="f32", threads=threads)


def checked(inputs: Iterable[Array]) -> Iterable[Array]:
    """The inputs one by one. Raises CalibrationInvalid for none, and for one that is not finite."""
    none = True
    for x in inputs:
        none = False
        if not np.isfinite(x).all():
            raise CalibrationInvalid("a calibration image holds NaN or infinite values")
        yield x
    if none:
        raise CalibrationInvalid("a calibration set needs at least one image")


def collect(
    model: Any, inputs: Iterable[Array], tensors: Sequence[str] | None = None, progress: Callable[[], None] | None = None
) -> dict[str, Histogram]:
    """A histogram of each of `tensors` (default: every float activation), from one run of the float graph for each input.

    Raises CalibrationInvalid where there is no input, or values are not finite (naming the tensor), GraphUnsupported for a
    tensor that the graph does not have.
    """
    shapes = float_tensors(model)
    wanted = list(shapes) if tensors is None else list(dict.fromkeys(tensors))
    missing = [t for t in wanted if t not in shapes]
    if missing:
        raise GraphUnsupported("the graph has no float tensor of this name", value=missing[0])
    name = model.graph.input[0].name
    out = {t: Histogram() for t in wanted}

    def add(tensor: str, values: Array) -> None:
        try:
            out[tensor].add(values)
        except ValueError as error:
            raise CalibrationInvalid("the network gives NaN or infinite values on the calibration images", value=tensor) from error

    groups: list[list[str]] = [[]]
    held = 0
    for tensor in wanted:
        if tensor == name:
            continue
        size = 4 * math.prod(shapes[tensor]) if shapes[tensor] else 4
        if held + size > PASS_BYTES and groups[-1]:
            groups.append([])
            held = 0
        groups[-1].append(tensor)
        held += size
    sessions = [(group, open_float(with_outputs(_bare(model), [(t, shapes[t]) for t in group]))) for group in groups if group]
    try:
        for x in checked(inputs):
            if name in out:
                add(name, x)
            for group, session in sessions:
                values = session.run({name: x})
                for tensor in group:
                    add(tensor, values[tensor])
            if progress:
                progress()
    finally:
        for _, session in sessions:
            session.close()
    return out


def _bare(model: Any) -> Any:
    """Without the notes of shape inference: some exporters leave wrong ones, and a session would believe them."""
    out = onnx.ModelProto()
    out.CopyFrom(model)
    del out.graph.value_info[:]
    return out


def with_channel_means(model: Any, tensors: Iterable[str]) -> tuple[Any, dict[str, str]]:
    """A copy of `model` that also gives the mean of each channel (axis 1; the last one for two axes) of `tensors`, and the
    names of those outputs: small ones, so that means cost no copy of the tensor itself."""
    shapes = float_tensors(model)
    out = onnx.ModelProto()
    out.CopyFrom(model)
    names = {}
    for tensor in tensors:
        rank = len(shapes[tensor])
        axes = [a for a in range(rank) if a != min(1, rank - 1)]
        names[tensor] = f"{tensor}.channel_mean"
        stored = f"{tensor}.channel_axes"
        out.graph.initializer.append(onnx.numpy_helper.from_array(np.array(axes, np.int64), stored))
        by_input = next(o.version for o in out.opset_import if o.domain in ("", "ai.onnx")) >= 18
        if by_input:
            node = onnx.helper.make_node("ReduceMean", [tensor, stored], [names[tensor]], keepdims=0)
        else:
            del out.graph.initializer[-1]
            node = onnx.helper.make_node("ReduceMean", [tensor], [names[tensor]], axes=axes, keepdims=0)
        out.graph.node.append(node)
        out.graph.output.append(onnx.helper.make_tensor_value_info(names[tensor], onnx.TensorProto.FLOAT, [None]))
    return out, names
