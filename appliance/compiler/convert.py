"""From the float graph to what the other runtimes open: TensorFlow Lite, Movidius; and the gate of the TensorRT graph.

Hides which converter does it, in which environment, and what each of them changes unasked: names, order, layout. Whatever
comes back is run beside the float graph before it counts: a conversion that computes something else is ConverterFailed here,
never a surprise in a gate.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from appliance import backends
from appliance.backends import Signature, Tensor, _tensorrt_build, myriad, tflite
from appliance.backends._sealed import unseal
from appliance.compiler import downgrade, toolchain
from appliance.compiler.signature import signature_of
from appliance.errors import CalibrationInvalid, ConverterFailed, GraphUnsupported

Array = NDArray[np.float32]
Inputs = Callable[[], Iterator[Array]]
PARITY = 1e-3  # of an output's largest value: the same arithmetic in another order
HALF_PARITY = 0.05  # of the same: weights rounded to 11 bits, through some fifty layers
GATE_CAPABILITY = "SM86"  # the oldest that is still sold
SENSELESS_DB = 5.0  # below this signal-to-noise ratio an INT8 output holds nothing: the quantiser failed, not the calibration
_SEEDS = (11, 12)
_CHECKED = 4  # calibration inputs on which INT8 is held beside float
_MAX_CANDIDATES = 64
# They move values and compute nothing: what is true of their input is true of their output.
_ONLY_MOVE = ("Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Identity", "Dropout")
_FUSED = ("Relu", "Clip", "LeakyRelu")
_LAYOUT_OPS = ("TRANSPOSE", "RESHAPE", "SQUEEZE", "EXPAND_DIMS")


# -- TensorFlow Lite ------------------------------------------------------------------------------------------------


def to_tflite_f32(model: Any, signature: Signature) -> bytes:
    """`model` as a float blob of the tflite backend. Raises ConverterFailed, GraphUnsupported."""
    flat = _flatbuffer(model)
    with _mapped():
        inputs, outputs = _ports(flat, model, signature)
    return tflite.wrap(flat, inputs, outputs)


def to_tflite(model: Any, inputs: Inputs, signature: Signature, keep_float: Sequence[str] = ()) -> bytes:
    """`model` as an INT8 blob of the tflite backend: s8 activations for each tensor, s8 weights for each output channel.

    `inputs` gives the calibration inputs (batch 1, the layout of the graph's first input). In float stay the border, whatever
    makes an output and all that follows it (a score and a box must not share a range, a heatmap is evidence), and the nodes
    named in `keep_float`. The same arguments give the same bytes. Raises ConverterFailed, GraphUnsupported, CalibrationInvalid.
    """
    if len(signature.inputs) != 1:
        raise GraphUnsupported("only graphs of one input can be calibrated", value=[t.name for t in signature.inputs])
    flat = _flatbuffer(model)
    with _mapped():
        entries, outputs = _ports(flat, model, signature)
        kept = _kept_tensors(flat, model, signature, entries, keep_float)
        quantised = _quantise(flat, entries[0], inputs, kept)
        blob = tflite.wrap(quantised, entries, outputs)
        _sensible(blob, model, signature, inputs)
    return blob


@contextlib.contextmanager
def _mapped() -> Iterator[None]:
    """LiteRT and the quantiser speak in RuntimeError and ValueError: a converted graph that does not run is the converter's fault."""
    try:
        yield
    except (RuntimeError, ValueError, KeyError, IndexError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConverterFailed(f"the TFLite graph does not run: {first}") from error


def _flatbuffer(model: Any) -> bytes:
    flat = _onnx2tf(model)
    if _never_made(flat):
        flat = _onnx2tf(_without_idle_outputs(model))
        if lost := _never_made(flat):
            raise ConverterFailed("onnx2tf wrote a graph that reads what nothing makes", value=lost[0])
    return flat


def _onnx2tf(model: Any) -> bytes:
    answer = toolchain.call("onnx2tf", "to_tflite.py", {}, files={"model.onnx": model.SerializeToString(deterministic=True)})
    if "model.tflite" not in answer.files:
        raise ConverterFailed("onnx2tf wrote no model", value=sorted(answer.files))
    return answer.files["model.tflite"]


def _never_made(flat: bytes) -> list[str]:
    """Names of tensors that an operator reads, though nothing makes them and nothing is stored in them."""
    from ai_edge_quantizer.utils.tfl_flatbuffer_utils import read_model

    try:
        parsed = read_model(flat)
        graph = parsed.subgraphs[0]
    except Exception:  # noqa: BLE001 - what is no flatbuffer is told by the interpreter that shall open it
        return []
    there = {int(i) for i in graph.inputs} | {int(o) for op in graph.operators for o in op.outputs}
    there |= {i for i, t in enumerate(graph.tensors) if parsed.buffers[t.buffer].data is not None or t.isVariable}
    read = sorted({int(i) for op in graph.operators for i in op.inputs if int(i) >= 0})
    return [graph.tensors[i].name.decode() for i in read if i not in there]


def _without_idle_outputs(model: Any) -> Any:
    """A copy in which no output is made by an Identity, but by a multiplication with one: onnx2tf 2.6.9 may give an output that only
    repeats an inner value the place of that value, and forget who else reads it."""
    out = onnx.ModelProto()
    out.CopyFrom(model)
    outputs = {o.name for o in out.graph.output}
    idle = [n for n in out.graph.node if n.op_type == "Identity" and n.output[0] in outputs]
    for node in idle:
        node.op_type = "Mul"
        node.input.append(f"{node.name}.one")
        out.graph.initializer.append(onnx.numpy_helper.from_array(np.array(1.0, np.float32), f"{node.name}.one"))
    return out


def _reference(model: Any, signature: Signature) -> backends.Session:
    return backends.load("onnxruntime").open(model.SerializeToString(), signature, precision="f32", threads=0)


def _random(signature: Signature, seed: int) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    return {t.name: rng.normal(size=t.shape).astype(np.float32) for t in signature.inputs}


def _interpreter(flat: bytes) -> Any:
    from ai_edge_litert.interpreter import Interpreter

    try:
        interpreter = Interpreter(model_content=flat, num_threads=1)
        interpreter.allocate_tensors()
    except Exception as error:
        raise ConverterFailed(f"LiteRT cannot open what onnx2tf wrote: {str(error).strip().splitlines()[-1:]}") from error
    return interpreter


def _axes(shape: tuple[int, ...], layout: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Every permutation that turns `shape` into `layout`, the identity first, then in order."""
    if sorted(shape) != sorted(layout) or len(shape) > 5:
        return []
    return [p for p in itertools.permutations(range(len(shape))) if tuple(shape[a] for a in p) == layout]


def _ports(flat: bytes, model: Any, signature: Signature) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Where each tensor of `signature` lies in the flatbuffer and in which layout: found by computing. Raises ConverterFailed
    where no arrangement gives the float graph's values."""
    interpreter = _interpreter(flat)
    inner, outer = interpreter.get_input_details(), interpreter.get_output_details()
    if len(inner) != len(signature.inputs) or len(outer) != len(signature.outputs):
        raise ConverterFailed("TFLite has other inputs or outputs than the graph", value=f"{len(inner)} and {len(outer)}")
    choices = []
    for k, tensor in enumerate(signature.inputs):
        named = [i for i, d in enumerate(inner) if _plain(d["name"]) == tensor.name] or [k]
        layout = tuple(int(v) for v in inner[named[0]]["shape"])
        choices.append([(named[0], axes) for axes in _axes(tensor.shape, layout)])
        if not choices[-1]:
            raise ConverterFailed(f"TFLite input {tensor.name} has another size", value=f"{tensor.shape} became {layout}")
    reference = _reference(model, signature)
    feeds = [_random(signature, seed) for seed in _SEEDS]
    wanted = [reference.run(feed) for feed in feeds]
    reference.close()
    worst: dict[str, float] = {}
    for arrangement in itertools.islice(itertools.product(*choices), _MAX_CANDIDATES):
        if len({i for i, _ in arrangement}) != len(arrangement):
            continue
        found = []
        for feed in feeds:
            for tensor, (index, axes) in zip(signature.inputs, arrangement, strict=True):
                interpreter.set_tensor(inner[index]["index"], np.ascontiguousarray(feed[tensor.name].transpose(axes)))
            interpreter.invoke()
            found.append([interpreter.get_tensor(d["index"]) for d in outer])
        outputs = _match_outputs(signature.outputs, [_plain(d["name"]) for d in outer], found, wanted, worst)
        if outputs is not None:
            inputs = [_entry(t, index, axes) for t, (index, axes) in zip(signature.inputs, arrangement, strict=True)]
            return inputs, outputs
    name = max(worst, key=lambda n: worst[n], default="")
    raise ConverterFailed("TFLite computes other values than the ONNX graph", value=f"{name}: {worst.get(name, np.nan):.3g} of its range")


def _match_outputs(
    tensors: Sequence[Tensor], names: list[str], found: list[list[Any]], wanted: list[dict[str, Array]], worst: dict[str, float]
) -> list[dict[str, Any]] | None:
    """The place and layout of each output, or None where one is nowhere. `worst` keeps the least distance seen for each."""
    entries, taken = [], set()
    for tensor in tensors:
        order = sorted(range(len(names)), key=lambda i: (names[i] != tensor.name, i))
        best = None
        for index in (i for i in order if i not in taken):
            layout = tuple(int(v) for v in found[0][index].shape)
            for axes in _axes(tensor.shape, layout):
                distance = max(_distance(f[index].transpose(np.argsort(axes)), w[tensor.name]) for f, w in zip(found, wanted, strict=True))
                worst[tensor.name] = min(worst.get(tensor.name, np.inf), distance)
                if distance <= PARITY:
                    best = (index, axes)
                    break
            if best:
                break
        if best is None:
            return None
        taken.add(best[0])
        entries.append(_entry(tensor, *best))
    return entries


def _distance(found: Any, wanted: Array) -> float:
    """Largest difference, as a part of the largest value that is wanted; NaN where only one of both is not finite is infinity."""
    if not np.array_equal(np.isfinite(found), np.isfinite(wanted)):
        return float("inf")
    difference = np.abs(np.nan_to_num(found) - np.nan_to_num(wanted)).max(initial=0.0)
    return float(difference / max(float(np.abs(np.nan_to_num(wanted)).max(initial=0.0)), 1e-6))


def _entry(tensor: Tensor, index: int, axes: tuple[int, ...]) -> dict[str, Any]:
    return {"name": tensor.name, "shape": list(tensor.shape), "index": index, "axes": list(axes)}


def _plain(name: str) -> str:
    """TensorFlow's decoration off: serving_default_image:0 -> image."""
    return name.removeprefix("serving_default_").partition(":")[0]


def _kept_tensors(flat: bytes, model: Any, signature: Signature, entries: list[dict[str, Any]], keep_float: Sequence[str]) -> set[int]:
    """Tensors of the flatbuffer that hold the outputs of the nodes `keep_float`, or of the activations fused into them.

    The converter names its tensors as it likes, so they are found by computing: the same values, in whatever order. Raises
    ConverterFailed for a node that is not in the graph or whose values are nowhere in the flatbuffer.
    """
    nodes = {n.name: n for n in model.graph.node}
    unknown = set(keep_float) - nodes.keys()
    if unknown:
        raise ConverterFailed("a node that shall stay in float is not in the graph", value=sorted(unknown)[0])
    candidates = {}
    for name in sorted(set(keep_float)):
        if nodes[name].op_type not in _ONLY_MOVE:
            made = set(nodes[name].output)
            candidates[name] = made | {o for n in model.graph.node if n.op_type in _FUSED and n.input[0] in made for o in n.output}
    if not candidates:
        return set()
    exposed = onnx.ModelProto()
    exposed.CopyFrom(model)
    listed = {o.name for o in model.graph.output}
    exposed.graph.output.extend(onnx.ValueInfoProto(name=n) for n in sorted(set().union(*candidates.values()) - listed))
    feed = _random(signature, _SEEDS[0])
    reference = _reference(exposed, signature)
    wanted = {n: np.sort(v, axis=None) for n, v in reference.run(feed).items()}
    reference.close()
    found = _inner_values(flat, feed, entries)
    kept: set[int] = set()
    for name, outputs in candidates.items():
        at = {i for i, v in found.items() for o in outputs if v.size == wanted[o].size and _distance(v, wanted[o]) <= PARITY}
        if not at:
            raise ConverterFailed("a node that shall stay in float is not to be found in the TFLite model", value=name)
        kept |= at
    return kept


def _inner_values(flat: bytes, feed: dict[str, Array], entries: list[dict[str, Any]]) -> dict[int, Any]:
    """The sorted values of every float tensor that an operator of the flatbuffer makes, by index."""
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    with _quiet():  # it warns that keeping every tensor takes memory
        interpreter = Interpreter(
            model_content=flat,
            num_threads=1,
            experimental_preserve_all_tensors=True,
            experimental_op_resolver_type=OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES,
        )
    interpreter.allocate_tensors()
    details = interpreter.get_input_details()
    for entry in entries:
        x = feed[entry["name"]].transpose(entry["axes"])
        interpreter.set_tensor(details[entry["index"]]["index"], np.ascontiguousarray(x))
    interpreter.invoke()
    made = {int(o) for op in interpreter._get_ops_details() for o in op["outputs"]}
    floats = [d["index"] for d in interpreter.get_tensor_details() if d["index"] in made and d["dtype"] == np.float32]
    return {int(i): np.sort(interpreter.get_tensor(i), axis=None) for i in floats}


def _float_tensors(flat: bytes, kept: set[int]) -> list[str]:
    """Names of the output tensors of every operator that stays in float: the makers of `kept`, the makers of outputs seen through
    layout operators, and all that follows one of the latter."""
    from ai_edge_litert.schema_py_generated import BuiltinOperator
    from ai_edge_quantizer.utils.tfl_flatbuffer_utils import read_model

    kinds = {v: k for k, v in vars(BuiltinOperator).items() if isinstance(v, int)}
    parsed = read_model(flat)
    graph = parsed.subgraphs[0]
    codes = [max(int(c.builtinCode), int(c.deprecatedBuiltinCode)) for c in parsed.operatorCodes]
    maker = {int(o): op for op in graph.operators for o in op.outputs}
    names = {i: t.name.decode() for i, t in enumerate(graph.tensors)}
    floats: set[int] = set()
    for output in map(int, graph.outputs):
        floats.add(output)
        while output in maker and kinds.get(codes[maker[output].opcodeIndex]) in _LAYOUT_OPS:
            output = int(maker[output].inputs[0])
            floats.add(output)
    for op in graph.operators:  # in the order of execution
        made = {int(o) for o in op.outputs}
        if made & floats or any(int(i) in floats and int(i) in maker for i in op.inputs):
            floats |= made
    return sorted(names[i] for i in floats | kept if i in maker)


def _quantise(flat: bytes, entry: dict[str, Any], inputs: Inputs, kept: set[int]) -> bytes:
    from ai_edge_quantizer import quantizer, recipe
    from ai_edge_quantizer.calibrator import Calibrator
    from ai_edge_quantizer.utils import qsv_utils

    engine = quantizer.Quantizer(bytearray(flat))
    engine.load_quantization_recipe(recipe.static_wi8_ai8())
    for border in ("INPUT", "OUTPUT"):
        engine.update_quantization_recipe(".*", border, algorithm_key="no_quantize")
    for name in _float_tensors(flat, kept):
        engine.update_quantization_recipe(f"(?:^|;){re.escape(name)}(?:;|$)", "*", algorithm_key="no_quantize")
    (signature,) = _interpreter(flat).get_signature_list().items()
    key, (name, *_) = signature[0], signature[1]["inputs"]
    with _quiet():
        # Extremes, as for the other runtimes; the tool's own moving average forgets the first images.
        calibrator = Calibrator(flat, num_threads=1, qsv_update_func=qsv_utils.min_max_update)
        count = 0
        for x in inputs():
            if not np.isfinite(x).all():
                raise CalibrationInvalid("a calibration image holds NaN or infinite values")
            # One by one: the tool turns what it is given into a list.
            calibrator.calibrate({key: [{name: np.ascontiguousarray(x.transpose(entry["axes"]))}]}, engine._recipe_manager)
            count += 1
        if not count:
            raise CalibrationInvalid("a calibration set needs at least one image")
        try:
            return bytes(engine.quantize(calibrator.get_model_qsvs(), enable_progress_report=False).quantized_model)
        except Exception as error:
            raise ConverterFailed(f"ai-edge-quantizer failed: {str(error).strip().splitlines()[-1:]}") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the tool's progress bars and its warning about a mode that it chose itself."""
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _sensible(blob: bytes, model: Any, signature: Signature, inputs: Inputs) -> None:
    """Raise ConverterFailed where an INT8 output has nothing to do with the float one."""
    for name, ratio in sqnr_db(blob, model, signature, itertools.islice(inputs(), _CHECKED)).items():
        if ratio < SENSELESS_DB:
            raise ConverterFailed("the INT8 TFLite model has lost an output", value=f"{name}: {ratio:.1f} dB")


def sqnr_db(blob: bytes, model: Any, signature: Signature, inputs: Iterator[Array]) -> dict[str, float]:
    """Signal to quantisation noise of each output of a tflite blob against the float graph, in dB over all `inputs`."""
    reference = _reference(model, signature)
    session = tflite.open(blob, signature, threads=1)
    signal = dict.fromkeys((t.name for t in signature.outputs), 0.0)
    noise = dict(signal)
    try:
        for x in inputs:
            feed = {signature.inputs[0].name: x}
            wanted, found = reference.run(feed), session.run(feed)
            for name in signal:
                signal[name] += float(np.square(wanted[name], dtype=np.float64).sum())
                noise[name] += float(np.square(found[name].astype(np.float64) - wanted[name]).sum())
    finally:
        reference.close()
        session.close()
    return {n: float(10 * np.log10(max(signal[n], 1e-30) / max(noise[n], 1e-30))) for n in signal}


# -- Movidius -------------------------------------------------------------------------------------------------------


def to_myriad(model: Any) -> bytes:
    """`model` (float32, fixed shapes) as an FP16 blob of the myriad backend, by the old runtime's own reader. Checked on that
    runtime's CPU plugin against the float graph.

    Raises GraphUnsupported naming a node that has no opset 13 or half-precision form, ConverterFailed.
    """
    signature = signature_of(model)
    half = downgrade.to_half(downgrade.to_opset13(model))
    answer = toolchain.call("myriad", "to_myriad.py", {}, files={"model.onnx": half.SerializeToString(deterministic=True)})
    if not {"model.xml", "model.bin"} <= set(answer.files):
        raise ConverterFailed("the old runtime wrote no IR", value=sorted(answer.files))
    blob = myriad.wrap(answer.files["model.xml"], answer.files["model.bin"], signature)
    reference = _reference(model, signature)
    session = myriad.open(blob, signature, device="CPU")
    try:
        for seed in _SEEDS:
            feed = _random(signature, seed)
            wanted, found = reference.run(feed), session.run(feed)
            for t in signature.outputs:
                distance = _distance(found[t.name], wanted[t.name])
                if distance > HALF_PARITY:
                    raise ConverterFailed(
                        "the FP16 IR computes other values than the ONNX graph", value=f"{t.name}: {distance:.3g} of its range"
                    )
    finally:
        reference.close()
        session.close()
    return blob


def myriad_query(blob: bytes) -> dict[str, Any]:
    """What the Movidius plugin says of a blob of `to_myriad`, without a stick: "runtime", "layers" and "supported" (counts),
    "unsupported" ({"name", "type"} each), "passed". Raises ConverterFailed, BackendFailed (the blob is damaged)."""
    _, parts = unseal(myriad.SEALED, blob, "myriad")
    files = {"model.xml": parts["xml"], "model.bin": parts["bin"]}
    values = toolchain.call("myriad", "myriad_query.py", {}, files=files).values
    supported, unsupported = len(values["supported"]), values["unsupported"]
    return {
        "runtime": values["runtime"],
        "layers": supported + len(unsupported),
        "supported": supported,
        "unsupported": unsupported,
        "passed": not unsupported and supported > 0,
    }


# -- TensorRT -------------------------------------------------------------------------------------------------------


def tensorrt_gate(symmetric_graph: bytes) -> dict[str, Any]:
    """Does TensorRT take this Q/DQ graph? Parsed and built by TensorRT-RTX, which needs no GPU for it, with the very code that a
    device builds with. What it builds is for a card of the field's desktops, never for a Jetson: those build their own.

    "passed", "version", "platform" (compute capability built for), "layers", "layer_types", "engine_bytes", "warnings". Raises
    GraphUnsupported with the parser's errors and their nodes, ConverterFailed where the tool itself fails.
    """
    shared = Path(_tensorrt_build.__file__).read_bytes()
    files = {"model.onnx": symmetric_graph, "tensorrt_build.py": shared}
    answer = toolchain.call("tensorrt-rtx", "tensorrt_gate.py", {"compute_capability": GATE_CAPABILITY}, files=files).values
    if not answer.get("passed"):
        errors = answer.get("errors") or [{}]
        listed = "; ".join(f"{e.get('operator')} {e.get('node')}: {e.get('what')}" for e in errors[:3])
        raise GraphUnsupported(f"TensorRT: {answer.get('what')}: {listed[:600]}", value=", ".join(str(e.get("node")) for e in errors))
    return answer
