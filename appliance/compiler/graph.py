"""A stranger's ONNX file -> a float32 graph that the compiler can trust: one image in, fixed shapes, constants folded.

Hides every way in which such a file can be broken or hostile. What C++ code does with it (checker, shape inference, version
converter, constant folding) runs in a process of its own, with limits of memory and time, so that a crash or a hang there is
an error here. External data is read by this module alone, from regular files inside the model's own folder.

`load_model` answers what the file says, checked. `prepare` makes of it what the card says. Inside is always NCHW float32: where
the source takes NHWC or integers, a Transpose or a Cast stands at the front, and the optimiser cancels what it can.
"""

from __future__ import annotations

import json
import os
import resource
import stat
import subprocess
import sys
import tempfile
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from appliance.compiler.fuse import fuse
from appliance.errors import CardInvalid, CompileDiskFull, CompileError, GraphUnsupported, ModelInvalid

if TYPE_CHECKING:
    from appliance.compiler.card import Card

OPSETS = (11, 21)
OPSET_QUANTISED = 13  # the first with scales per channel
MAX_BYTES = (1 << 31) - 1  # protobuf's own limit; external data counts too
MAX_NODES = 20_000
MAX_TENSORS = 50_000
MAX_DEPTH = 8  # of subgraphs
MAX_RANK = 8
MAX_VALUES = 1 << 29  # of one tensor
MAX_NAME = 1000
MEMORY_BYTES = 12 << 30
TIMEOUT_S = 300.0
PARITY = 1e-3  # largest difference of prepared and original, as a share of the largest value
QUANTISED = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "ConvInteger", "MatMulInteger")
# What comes out has a size that depends on what goes in.
DATA_DEPENDENT = ("NonMaxSuppression", "NonZero", "Unique", "Compress", "If", "Loop", "Scan")
_HALVES = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
NUMPY_TYPES = {
    TensorProto.FLOAT: "float32",
    TensorProto.DOUBLE: "float64",
    TensorProto.UINT8: "uint8",
    TensorProto.INT8: "int8",
    TensorProto.INT32: "int32",
    TensorProto.INT64: "int64",
    TensorProto.BOOL: "bool",
}
_REMEDY_QUANTISED = "Compile the float model that this one was made from."

Array = NDArray[Any]


# -- the door -------------------------------------------------------------------------------------------------------


def load_model(path: Path) -> Any:
    """The ModelProto of `path`: checked, functions inlined, external data read in, half precision turned to float32, opset >= 13.

    Raises ModelInvalid for a file that is broken, hostile or too large, GraphUnsupported for one that is neither but that this
    compiler cannot take. Both name the node, tensor or file at fault.
    """
    return _parse(_isolated("load", {"path": str(path.absolute())}), str(path))


def prepare(model: Any, card: Card) -> Any:
    """A copy of `model` as the card says: batch 1, fixed shapes, float32 NCHW input, outputs of the card, constants folded.

    An output whose length depends on the image (non-maximum suppression inside) is cut or filled with zeros to
    `card.max_boxes` rows. Node names are unique. The same model and card give the same bytes. The result has been run
    beside the original in ONNX Runtime. Raises GraphUnsupported, ModelInvalid, CardInvalid.
    """
    plan = {
        "name": card.input_name,
        "shape": list(card.engine_shape),
        "layout": card.layout,
        "constants": {k: (list(v) if isinstance(v, tuple) else v) for k, v in card.constants.items()},
        "outputs": list(card.output_names),
        "rows": card.max_boxes,
        "spread": [float(v) for v in card.input_range()],
    }
    return _parse(_isolated("prepare", plan, model), card.name)


def output_shapes(model: Any, feeds: dict[str, Sequence[int]], constants: dict[str, Any] | None = None) -> dict[str, tuple[int, ...]]:
    """Shapes of all outputs for inputs of the shapes `feeds`, by running the model once. Raises GraphUnsupported where it does not run."""
    plan = {"feeds": {k: list(v) for k, v in feeds.items()}, "constants": constants or {}}
    found = json.loads(_isolated("probe", plan, model))
    return {k: tuple(v) for k, v in found.items()}


def _parse(data: bytes, where: str) -> Any:
    model = onnx.ModelProto()
    try:
        model.ParseFromString(data)
    except Exception as error:
        raise ModelInvalid("this is no ONNX file, or its end is missing", value=where) from error
    return model


def _isolated(job: str, plan: dict[str, Any], model: Any | None = None, timeout_s: float = TIMEOUT_S) -> bytes:
    """Run `job` of this module in a process of its own and give back its bytes; its error is raised here as its own class."""
    root = str(Path(__file__).resolve().parents[2])
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")} | {"PYTHONPATH": root, "PYTHONHASHSEED": "0"}
    with tempfile.TemporaryDirectory(prefix="spinebox-graph-") as folder:
        answer = Path(folder) / "answer"
        try:
            (Path(folder) / "plan").write_text(json.dumps(plan))
            if model is not None:
                (Path(folder) / "model").write_bytes(model.SerializeToString())
        except OSError as error:
            raise CompileDiskFull(f"a model cannot be handed on: {error.strerror}", value=folder) from error
        except ValueError as error:
            raise ModelInvalid("the model is larger than 2 GiB", value=plan.get("name")) from error
        command = [sys.executable, "-P", "-X", "faulthandler=0", "-m", "appliance.compiler.graph", job, folder, str(int(timeout_s))]
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment, start_new_session=True
        )
        try:
            status = process.wait(timeout_s)
        except subprocess.TimeoutExpired as error:
            raise ModelInvalid(f"reading the model takes more than {timeout_s:.0f} s", value=plan.get("path", plan.get("name"))) from error
        finally:
            process.kill()
            process.wait()
        if status == 0 and answer.exists():
            return answer.read_bytes()
        told = Path(folder) / "error"
        if told.exists():
            said = json.loads(told.read_text())
            known = {c.code: c for c in (ModelInvalid, GraphUnsupported, CardInvalid)}
            raise known.get(said["code"], ModelInvalid)(said["message"], value=said["value"] or None, remedy=said["remedy"])
    how = f"signal {-status}" if status < 0 else f"exit code {status}"
    raise ModelInvalid(f"the model crashed the {job} process ({how})", value=plan.get("path", plan.get("name")))


def main(argv: Sequence[str]) -> int:
    """The other side of `_isolated`: JOB FOLDER SECONDS."""
    job, folder, seconds = argv[0], Path(argv[1]), int(argv[2])
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds * 4, seconds * 4))
    plan = json.loads((folder / "plan").read_text())
    try:
        if job == "load":
            answer = read_model(Path(plan["path"])).SerializeToString()
        else:
            model = _parse((folder / "model").read_bytes(), "model")
            answer = (
                _prepare(model, plan, folder).SerializeToString(deterministic=True)
                if job == "prepare"
                else json.dumps(_probe(model, plan)).encode()
            )
        (folder / "answer").write_bytes(answer)
    except CompileError as error:
        (folder / "error").write_text(json.dumps(error.to_json()))
        return 1
    except MemoryError:
        limit = ModelInvalid(f"the model needs more than {MEMORY_BYTES >> 30} GiB to be read", value=plan.get("path", plan.get("name")))
        (folder / "error").write_text(json.dumps(limit.to_json()))
        return 1
    return 0


# -- reading --------------------------------------------------------------------------------------------------------


def read_model(path: Path) -> Any:
    """As `load_model`, in this process: for the process that may die, and for tests of what Python itself refuses."""
    model = _parse(_read_regular(path, MAX_BYTES), path.name)
    if not model.graph.node and not model.graph.output:
        raise ModelInvalid("this is no ONNX file, or its graph is empty", value=path.name)
    _check_text(model)
    opset = _opset(model)
    _check_names(model)
    _read_external(model, path.parent)
    model.ClearField("training_info")
    if model.functions:
        model = _inline(model)
    _check_operators(model, opset)
    _check_tensors(model)
    _check_values(model)
    _order(model.graph, frozenset(), 0)
    _forget_free_dimensions(model)
    _check_whole(model)
    if opset < OPSET_QUANTISED:
        model = _convert(model)
    to_float32(model)
    name_nodes(model)
    return model


def _read_regular(path: Path, limit: int, directory: int | None = None, name: str | None = None) -> bytes:
    """A regular file's bytes. With `directory`, `name` is opened inside it and no symbolic link is followed."""
    shown = name or path.name
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        handle = os.open(path, flags) if directory is None else os.open(name or "", flags | os.O_NOFOLLOW, dir_fd=directory)
    except (OSError, ValueError) as error:
        raise ModelInvalid(f"a file cannot be opened: {getattr(error, 'strerror', None) or error}", value=shown) from error
    state = os.fstat(handle)
    if not stat.S_ISREG(state.st_mode):
        os.close(handle)
        raise ModelInvalid("not a regular file", value=shown)
    with os.fdopen(handle, "rb") as file:
        if state.st_size > limit:
            raise ModelInvalid(f"the file is larger than {limit:,} bytes", value=f"{shown}: {state.st_size:,}")
        return file.read(limit + 1)


def _check_text(model: Any) -> None:
    """Every name must be text: protobuf hands out what is not UTF-8 as bytes."""

    def texts(graph: Any) -> Iterator[Any]:
        yield graph.name
        for value in (*graph.input, *graph.output, *graph.value_info):
            yield value.name
        for tensor in graph.initializer:
            yield from (tensor.name, *(e.key for e in tensor.external_data), *(e.value for e in tensor.external_data))
        yield from of_nodes(graph.node)

    def of_nodes(nodes: Iterable[Any]) -> Iterator[Any]:
        for node in nodes:
            yield from (node.name, node.op_type, node.domain, *node.input, *node.output, *(a.name for a in node.attribute))

    found: list[Any] = [*(o.domain for o in model.opset_import), *(x for p in model.metadata_props for x in (p.key, p.value))]
    found += [x for g in _graphs(model.graph) for x in texts(g)]
    for function in model.functions:
        found += [function.name, function.domain, *function.input, *function.output, *of_nodes(function.node)]
    for text in found:
        if not isinstance(text, str):
            raise ModelInvalid("a name in the file is no text", value=text)


def _opset(model: Any) -> int:
    versions = [o.version for o in model.opset_import if o.domain in ("", "ai.onnx")]
    if len(versions) != 1:
        raise ModelInvalid("the file must name one version of the ONNX operators", value=versions)
    if not OPSETS[0] <= versions[0] <= OPSETS[1]:
        raise GraphUnsupported(
            f"operator set {versions[0]} is not between {OPSETS[0]} and {OPSETS[1]}",
            value=f"opset {versions[0]}",
            remedy=f"Export the model again with an opset between {OPSETS[0]} and {OPSETS[1]}; 17 is a good choice.",
        )
    return int(versions[0])


def _graphs(graph: Any, depth: int = 0) -> Iterator[Any]:
    """`graph` and its subgraphs. Raises GraphUnsupported where they are nested too deep."""
    if depth > MAX_DEPTH:
        raise GraphUnsupported(f"subgraphs are nested more than {MAX_DEPTH} deep", value=graph.name)
    yield graph
    for node in graph.node:
        for inner in _subgraphs(node):
            yield from _graphs(inner, depth + 1)


def _subgraphs(node: Any) -> list[Any]:
    out = []
    for a in node.attribute:
        if a.type == onnx.AttributeProto.GRAPH:
            out.append(a.g)
        out.extend(a.graphs)
    return out


def _tensors(model: Any) -> Iterator[tuple[str, Any]]:
    """Every stored tensor with the name to blame: initialisers, and attributes of nodes, in every subgraph and function."""

    def attributes(nodes: Iterable[Any]) -> Iterator[tuple[str, Any]]:
        for node in nodes:
            for a in node.attribute:
                if a.HasField("t"):
                    yield f"{a.name} of node {node.name or node.op_type}", a.t
                for t in a.tensors:
                    yield f"{a.name} of node {node.name or node.op_type}", t

    for graph in _graphs(model.graph):
        yield from ((t.name, t) for t in graph.initializer)
        yield from attributes(graph.node)
    for function in model.functions:
        yield from attributes(function.node)
        for node in function.node:
            for inner in _subgraphs(node):
                for graph in _graphs(inner):
                    yield from ((t.name, t) for t in graph.initializer)
                    yield from attributes(graph.node)


def _check_names(model: Any) -> None:
    """Counts, sizes and kinds that can be refused before anything is read or computed."""
    nodes = 0
    for graph in _graphs(model.graph):
        nodes += len(graph.node)
        if graph.sparse_initializer:
            raise GraphUnsupported(
                "sparse weights cannot be compiled", value=graph.sparse_initializer[0].values.name, remedy="Export with dense weights."
            )
    if nodes > MAX_NODES:
        raise GraphUnsupported(f"the graph has more than {MAX_NODES:,} nodes", value=f"{nodes:,}")
    if not model.graph.input:
        raise ModelInvalid("the graph has no input", value=model.graph.name)
    if not model.graph.output:
        raise ModelInvalid("the graph has no output", value=model.graph.name)
    doubled = [n for n, c in Counter(v.name for v in model.graph.output).items() if c > 1]
    if doubled:
        raise ModelInvalid("an output is named twice", value=doubled[0])
    count, total = 0, 0
    for name, tensor in _tensors(model):
        count += 1
        if len(name) > MAX_NAME:
            raise ModelInvalid(f"a name is longer than {MAX_NAME} letters", value=name)
        if len(tensor.dims) > MAX_RANK or any(d < 0 for d in tensor.dims):
            raise ModelInvalid("a tensor has dimensions that no tensor has", value=f"{name}: {list(tensor.dims)[:10]}")
        values = 1
        for d in tensor.dims:
            values *= d
        if values > MAX_VALUES:
            raise ModelInvalid(f"a tensor has more than {MAX_VALUES:,} values", value=f"{name}: {list(tensor.dims)}")
        total += values
        if total > 2 * MAX_VALUES:
            raise ModelInvalid(f"the tensors have more than {2 * MAX_VALUES:,} values together", value=name)
    if count > MAX_TENSORS:
        raise GraphUnsupported(f"the file has more than {MAX_TENSORS:,} tensors", value=f"{count:,}")


def _item_bytes(tensor: Any, name: str) -> int:
    try:
        return int(helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)
    except (KeyError, TypeError, ValueError) as error:
        raise ModelInvalid("a tensor has a type that ONNX does not know", value=f"{name}: {tensor.data_type}") from error


def _read_external(model: Any, folder: Path) -> None:
    """Weights beside the model become weights inside it: only regular files below its folder, never through a link."""
    total = 0
    held: dict[str, bytes] = {}
    for name, tensor in _tensors(model):
        if tensor.data_location != TensorProto.EXTERNAL:
            continue
        said = {e.key: e.value for e in tensor.external_data}
        location = said.get("location", "")
        parts = location.split("/")
        if not location or "\\" in location or "\0" in location or location.startswith("/") or any(p in ("", ".", "..") for p in parts):
            raise ModelInvalid("external data must lie in the model's own folder", value=f"{name}: {location or 'no location'}")
        try:
            offset, length = int(said.get("offset", "0")), int(said.get("length", "-1"))
        except ValueError as error:
            raise ModelInvalid("the place of external data is no number", value=f"{name}: {location}") from error
        if tensor.data_type == TensorProto.STRING:
            raise ModelInvalid("text cannot lie in external data", value=name)
        need = int(np.prod(tensor.dims, dtype=np.int64)) * _item_bytes(tensor, name)
        total += need
        if total > MAX_BYTES:
            raise ModelInvalid(f"model and external data are larger than {MAX_BYTES:,} bytes together", value=name)
        if location not in held:
            held[location] = _read_below(folder, parts)
        data = held[location]
        if offset < 0 or length not in (-1, need) or offset + need > len(data):
            where = f"{name}: {location} [{offset}, {offset + max(length, need)}) of {len(data)} bytes, {need} needed"
            raise ModelInvalid("external data does not fit the tensor", value=where)
        tensor.ClearField("external_data")
        tensor.ClearField("data_location")
        tensor.raw_data = data[offset : offset + need]


def _read_below(folder: Path, parts: list[str]) -> bytes:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for part in parts[:-1]:
            try:
                inner = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=handle)
            except OSError as error:
                raise ModelInvalid(f"the folder of external data cannot be opened: {error.strerror}", value="/".join(parts)) from error
            os.close(handle)
            handle = inner
        return _read_regular(folder, MAX_BYTES, handle, parts[-1])
    finally:
        os.close(handle)


def _inline(model: Any) -> Any:
    """Local functions written out where they are called; refused where that would be more than MAX_NODES or never end."""
    functions = {(f.domain, f.name): f for f in model.functions}
    sizes: dict[tuple[str, str], int] = {}

    def size(key: tuple[str, str], path: tuple[tuple[str, str], ...]) -> int:
        if key in path or len(path) > 100:
            raise ModelInvalid("a function calls itself", value=key[1])
        if key not in sizes:
            sizes[key] = written_out(functions[key].node, (*path, key))
        return sizes[key]

    def written_out(nodes: Iterable[Any], path: tuple[tuple[str, str], ...]) -> int:
        total = 0
        for node in nodes:
            key = (node.domain, node.op_type)
            total += size(key, path) if key in functions else 1
            total += sum(written_out(inner.node, path) for inner in _subgraphs(node))
            if total > MAX_NODES:
                raise GraphUnsupported(f"its functions written out have more than {MAX_NODES:,} nodes", value=node.name or node.op_type)
        return total

    written_out(model.graph.node, ())
    from onnx import inliner

    try:
        return inliner.inline_local_functions(model)
    except Exception as error:
        raise GraphUnsupported(f"its functions cannot be written out: {_first_line(error)}", value=model.functions[0].name) from error


def _check_operators(model: Any, opset: int) -> None:
    for graph in _graphs(model.graph):
        for node in graph.node:
            name = f"{node.op_type} {node.name!r}"
            if node.op_type in QUANTISED or node.op_type.startswith("QLinear"):
                raise GraphUnsupported("the model is quantised already", value=name, remedy=_REMEDY_QUANTISED)
            if node.domain not in ("", "ai.onnx"):
                raise GraphUnsupported(
                    f"operators of domain {node.domain} cannot be compiled", value=name, remedy="Export with standard ONNX operators only."
                )
            try:
                onnx.defs.get_schema(node.op_type, opset, "")
            except onnx.defs.SchemaError as error:
                raise GraphUnsupported(f"ONNX has no such operator at opset {opset}", value=name) from error


def _check_tensors(model: Any) -> None:
    """What a tensor says of itself must be what it holds."""
    for name, tensor in _tensors(model):
        size = _item_bytes(tensor, name)
        values = int(np.prod(tensor.dims, dtype=np.int64))
        if tensor.data_type == TensorProto.STRING:
            if len(tensor.string_data) != values:
                raise ModelInvalid("a tensor holds another number of values than its shape says", value=name)
            continue
        raw = tensor.HasField("raw_data")
        held = len(tensor.raw_data) // max(size, 1) if raw else -1
        if raw and held != values and tensor.data_type not in (TensorProto.INT4, TensorProto.UINT4, TensorProto.FLOAT4E2M1):
            raise ModelInvalid(
                "a tensor holds another number of values than its shape says", value=f"{name}: {held} for {list(tensor.dims)}"
            )
        try:
            numpy_helper.to_array(tensor)
        except Exception as error:
            raise ModelInvalid(
                "a tensor holds another number of values than its shape says", value=f"{name}: {list(tensor.dims)}"
            ) from error


def _check_values(model: Any) -> None:
    """Weights must be finite. An infinite scalar is a bound or a mask, not a weight."""
    for name, tensor in _tensors(model):
        if tensor.data_type not in (TensorProto.FLOAT, TensorProto.DOUBLE, *_HALVES):
            continue
        values = numpy_helper.to_array(tensor).astype(np.float32)
        if np.isnan(values).any():
            raise ModelInvalid("a weight is NaN", value=name)
        if values.size > 1 and np.isinf(values).any():
            raise ModelInvalid("a weight is infinite", value=name)


def _order(graph: Any, outer: frozenset[str], depth: int) -> None:
    """Sort nodes so that each comes after what it reads; name what is missing, made twice, or goes round in a circle."""
    made: dict[str, str] = {}

    def make(name: str, by: str) -> None:
        if name in made or name in outer:
            raise ModelInvalid(f"a tensor is made twice, by {made.get(name, 'an outer graph')} and {by}", value=name)
        made[name] = by

    for value in graph.input:
        make(value.name, "an input")
    inputs = set(made)
    stored: set[str] = set()
    for tensor in graph.initializer:
        if tensor.name in stored:
            raise ModelInvalid("a weight is stored twice", value=tensor.name)
        stored.add(tensor.name)
        if tensor.name not in inputs:
            make(tensor.name, "a weight")
    given = set(made)
    for i, node in enumerate(graph.node):
        for out in node.output:
            if out:
                make(out, f"node {node.name or f'{node.op_type} #{i}'}")
    for i, node in enumerate(graph.node):
        for name in reads(node):
            if name not in made and name not in outer:
                raise ModelInvalid(
                    "a node reads what nothing makes: a weight or an input is missing", value=f"{_label(node, i)} reads {name}"
                )
    for value in graph.output:
        if value.name not in made and value.name not in outer:
            raise ModelInvalid("nothing makes this output", value=value.name)

    readers: dict[str, list[int]] = {}
    waits = []
    for i, node in enumerate(graph.node):
        needs = {n for n in reads(node) if n in made and n not in given}
        waits.append(len(needs))
        for name in needs:
            readers.setdefault(name, []).append(i)
    ready = deque(i for i, w in enumerate(waits) if w == 0)
    done: list[int] = []
    while ready:
        i = ready.popleft()
        done.append(i)
        for out in graph.node[i].output:
            for reader in readers.get(out, ()):
                waits[reader] -= 1
                if waits[reader] == 0:
                    ready.append(reader)
    if len(done) < len(graph.node):
        finished = set(done)
        stuck = [_label(n, i) for i, n in enumerate(graph.node) if i not in finished]
        raise ModelInvalid("nodes read each other in a circle", value=", ".join(stuck[:6]))
    if done != sorted(done) and any(_early(graph, given, outer)):
        replace(graph.node, [graph.node[i] for i in done])
    inside = outer | frozenset(made)
    for node in graph.node:
        for inner in _subgraphs(node):
            _order(inner, inside, depth + 1)


def _early(graph: Any, given: set[str], outer: frozenset[str]) -> Iterator[bool]:
    """True for each node that stands before one whose value it reads."""
    seen = set(given)
    for node in graph.node:
        yield any(n not in seen and n not in outer for n in reads(node))
        seen.update(node.output)


def _label(node: Any, i: int) -> str:
    return f"{node.op_type} {node.name!r}" if node.name else f"{node.op_type} #{i}"


def reads(node: Any) -> set[str]:
    """Every tensor of this graph or an outer one that `node` reads, also from inside its subgraphs."""
    names = {n for n in node.input if n}
    for inner in _subgraphs(node):
        own = {v.name for v in inner.input} | {t.name for t in inner.initializer} | {o for n in inner.node for o in n.output}
        for n in inner.node:
            names |= reads(n) - own
        names |= {v.name for v in inner.output} - own
    return names


def _forget_free_dimensions(model: Any) -> None:
    """-1 and 0 stand for "any" in some exporters; ONNX's own word is no value at all."""
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        if value.type.HasField("tensor_type"):
            for d in value.type.tensor_type.shape.dim:
                if d.HasField("dim_value") and d.dim_value <= 0:
                    d.ClearField("dim_value")
                elif d.HasField("dim_value") and d.dim_value > MAX_VALUES:
                    raise ModelInvalid("a dimension is absurd", value=f"{value.name}: {d.dim_value}")


def _check_whole(model: Any) -> None:
    """ONNX's checker, then strict shape inference. An output without a declared shape, which the checker refuses, gets its own."""
    bare = [o for o in model.graph.output if o.type.HasField("tensor_type") and not o.type.tensor_type.HasField("shape")]
    if bare:
        found = {o.name: o for o in infer(model).graph.output}
        for value in bare:
            value.CopyFrom(found[value.name])
            # Where nobody knows even the number of dimensions, "no dimensions" is all that the checker takes.
            value.type.tensor_type.shape.SetInParent()
    try:
        onnx.checker.check_model(model)
    except onnx.checker.ValidationError as error:
        raise ModelInvalid(f"ONNX's checker refuses the graph: {_first_line(error)}", value=model.graph.name) from error
    for value in bare:
        if not value.type.tensor_type.shape.dim:
            value.type.tensor_type.ClearField("shape")
    _check_channels(infer(model).graph)


def _check_channels(graph: Any) -> None:
    """ONNX's shape inference does not compare a convolution's channels with its weights; runtimes do, and less clearly."""
    shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in (*graph.input, *graph.value_info)}
    weights = {t.name: list(t.dims) for t in graph.initializer}
    for node in graph.node:
        if node.op_type not in ("Conv", "ConvTranspose") or node.input[1] not in weights:
            continue
        kernel, given = weights[node.input[1]], shapes.get(node.input[0], [])
        group = next((a.i for a in node.attribute if a.name == "group"), 1)
        want = kernel[0] if node.op_type == "ConvTranspose" else kernel[1] * group
        if len(given) > 1 and given[1] and given[1] != want:
            raise ModelInvalid(
                "a convolution takes other channels than it gets", value=f"{node.op_type} {node.name!r}: {want}, gets {given[1]}"
            )


def infer(model: Any) -> Any:
    """Strict shape inference. Raises ModelInvalid naming the node whose shapes contradict each other."""
    try:
        return onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    except Exception as error:
        raise ModelInvalid(f"shapes or types contradict each other: {_first_line(error)}", value=model.graph.name) from error


def _first_line(error: BaseException) -> str:
    lines = [x.strip() for x in str(error).splitlines() if x.strip()]
    telling = [x for x in lines if "node name" in x or "Error" in x] or lines or [type(error).__name__]
    return telling[-1][:300]


def _convert(model: Any) -> Any:
    from onnx import version_converter

    try:
        out = version_converter.convert_version(model, OPSET_QUANTISED)
        onnx.checker.check_model(out)
    except Exception as error:
        raise GraphUnsupported(
            f"the graph cannot be raised to opset {OPSET_QUANTISED}: {_first_line(error)}",
            value=model.graph.name,
            remedy=f"Export the model again with opset {OPSET_QUANTISED} or above.",
        ) from error
    return out


def to_float32(model: Any) -> None:
    """Half-precision weights, casts and values become float32, in place. Float16 weights behind Casts are the common case."""
    for _, tensor in _tensors(model):
        if tensor.data_type in _HALVES:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name))
    for graph in _graphs(model.graph):
        for node in graph.node:
            for a in node.attribute:
                if a.name in ("to", "dtype", "output_dtype") and a.i in _HALVES:
                    a.i = TensorProto.FLOAT
        for value in (*graph.input, *graph.output, *graph.value_info):
            if value.type.tensor_type.elem_type in _HALVES:
                value.type.tensor_type.elem_type = TensorProto.FLOAT


# -- preparing ------------------------------------------------------------------------------------------------------


def real_inputs(model: Any) -> list[Any]:
    """Graph inputs that are no weights; before IR version 4 weights were listed as inputs too."""
    stored = {t.name for t in model.graph.initializer}
    return [v for v in model.graph.input if v.name not in stored]


def _fill(value: Any, plain: Any, name: str) -> Any:
    """The card's constant for input `name` as a tensor of its type: a number fills its shape, a list is its values."""
    kind = value.type.tensor_type.elem_type
    if kind not in NUMPY_TYPES:
        raise CardInvalid("a constant of this type cannot be given", value=f"constants.{name}: type {kind}")
    dims = [d.dim_value or 1 for d in value.type.tensor_type.shape.dim]
    array = np.asarray(plain, dtype=np.float64)
    if array.ndim == 0:
        array = np.full(dims, float(array))
    if array.size != int(np.prod(dims)):
        raise CardInvalid("a constant has another number of values than its input", value=f"constants.{name}: {array.size} for {dims}")
    return numpy_helper.from_array(array.reshape(dims).astype(NUMPY_TYPES[kind]), name)


def _bind_constants(model: Any, constants: dict[str, Any]) -> None:
    for value in real_inputs(model):
        if value.name in constants:
            model.graph.initializer.append(_fill(value, constants[value.name], value.name))
    replace(model.graph.input, real_inputs(model))


def _probe(model: Any, plan: dict[str, Any]) -> dict[str, list[int]]:
    _bind_constants(model, plan["constants"])
    kinds = {v.name: v.type.tensor_type.elem_type for v in real_inputs(model)}
    feeds = {}
    for name, shape in plan["feeds"].items():
        if kinds.get(name) not in NUMPY_TYPES:
            raise GraphUnsupported("an input has a type that no image has", value=f"{name}: {kinds.get(name)}")
        feeds[name] = _noise(shape, kinds[name], (0.0, 1.0))
    return {k: list(np.shape(v)) for k, v in _run(model, feeds).items()}


def _noise(shape: Sequence[int], kind: int, spread: Sequence[float]) -> Array:
    rng = np.random.default_rng(20261124)
    return np.asarray(rng.uniform(spread[0], spread[1], tuple(shape)).astype(NUMPY_TYPES[kind]))


def _run(model: Any, feeds: dict[str, Array]) -> dict[str, Array]:
    """One pass in ONNX Runtime. Raises GraphUnsupported with its reason."""
    from appliance import backends
    from appliance.errors import BackendError

    try:
        session = backends.load("onnxruntime").open(model.SerializeToString(), backends.Signature((), ()), precision="f32", threads=1)
        return dict(session.run(feeds))
    except BackendError as error:
        raise GraphUnsupported(f"ONNX Runtime does not run the model: {error.what}", value=model.graph.name) from error


def _prepare(source: Any, plan: dict[str, Any], folder: Path) -> Any:
    model = onnx.ModelProto()
    model.CopyFrom(source)
    graph = model.graph
    _bind_constants(model, plan["constants"])
    inputs = {v.name: v for v in graph.input}
    if plan["name"] not in inputs:
        raise CardInvalid("the graph has no such input", value=f"input.name = {plan['name']}, the graph has {sorted(inputs)}")
    extra = sorted(set(inputs) - {plan["name"]})
    if extra:
        raise CardInvalid("the graph has a second input; give it a constant", value=f"constants.{extra[0]}")
    _fix_input(graph, plan)
    made = {o for n in graph.node for o in n.output}
    missing = [o for o in plan["outputs"] if o not in made]
    if missing:
        raise CardInvalid("the graph has no such output", value=f"{missing[0]}, the graph has {[o.name for o in graph.output]}")
    kinds = {v.name: v for v in graph.output}
    del graph.output[:]
    for name in plan["outputs"]:
        value = kinds.get(name) or helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
        value.type.tensor_type.ClearField("shape")
        graph.output.append(value)
    del graph.value_info[:]
    drop_dead(graph)
    model.ir_version = max(model.ir_version, 8)
    model = _simplify(model, folder)
    _multiply(model.graph)
    fuse(model)
    _finish_outputs(model, plan)
    _tidy(model)
    _check_whole(model)
    _compare(source, model, plan)
    return model


def _fix_input(graph: Any, plan: dict[str, Any]) -> None:
    """Give the input its fixed shape; in front of a graph that takes NHWC or integers, what turns float32 NCHW into that."""
    value = next(v for v in graph.input if v.name == plan["name"])
    kind = value.type.tensor_type.elem_type
    if kind not in NUMPY_TYPES:
        raise GraphUnsupported("an input has a type that no image has", value=f"{plan['name']}: {kind}")
    rank = len(value.type.tensor_type.shape.dim)
    shape = list(plan["shape"])
    if rank and rank != len(shape):
        raise CardInvalid("the input's number of dimensions", value=f"card {shape}, graph {rank} dimensions")
    nhwc = plan["layout"] == "NHWC"
    source_shape = [shape[i] for i in (0, 2, 3, 1)] if nhwc else shape
    for i, d in enumerate(value.type.tensor_type.shape.dim):
        if d.dim_value and d.dim_value != source_shape[i]:
            raise CardInvalid(
                "the card's input shape is not the graph's", value=f"dimension {i}: card {source_shape[i]}, graph {d.dim_value}"
            )
    value.CopyFrom(helper.make_tensor_value_info(plan["name"], TensorProto.FLOAT, shape))
    if not nhwc and kind == TensorProto.FLOAT:
        return
    used = {o for n in graph.node for o in n.output} | {t.name for t in graph.initializer}
    inner = fresh(f"{plan['name']}.source", used)
    rename_reads(graph, plan["name"], inner)
    steps = []
    at = plan["name"]
    if nhwc:
        step = inner if kind == TensorProto.FLOAT else fresh(f"{plan['name']}.nhwc", used)
        steps.append(helper.make_node("Transpose", [at], [step], name=step, perm=[0, 2, 3, 1]))
        at = step
    if kind != TensorProto.FLOAT:
        steps.append(helper.make_node("Cast", [at], [inner], name=inner, to=kind))
    replace(graph.node, [*steps, *graph.node])


def replace(field: Any, items: Iterable[Any]) -> None:
    """Make `items`, some of which may lie in `field` already, all that a repeated field holds."""
    copies = []
    for item in items:
        copy = type(item)()
        copy.CopyFrom(item)
        copies.append(copy)
    del field[:]
    field.extend(copies)


def fresh(name: str, used: Iterable[str]) -> str:
    """`name`, or the first of `name_2`, `name_3`, ... that is not in `used`."""
    taken = used if isinstance(used, set | dict) else set(used)
    out, i = name, 2
    while out in taken:
        out, i = f"{name}_{i}", i + 1
    return out


def rename_reads(graph: Any, old: str, new: str) -> None:
    """Whoever reads `old`, also in a subgraph that has no value of that name itself, reads `new`."""
    for node in graph.node:
        for i, name in enumerate(node.input):
            if name == old:
                node.input[i] = new
        for inner in _subgraphs(node):
            own = {v.name for v in inner.input} | {t.name for t in inner.initializer}
            if old not in own:
                rename_reads(inner, old, new)
                for value in inner.output:
                    if value.name == old:
                        value.name = new


def drop_dead(graph: Any) -> None:
    """Remove nodes and weights that no output needs."""
    needed = {o.name for o in graph.output}
    kept = []
    for node in reversed(graph.node):
        if any(o in needed for o in node.output):
            kept.append(node)
            needed |= reads(node)
    replace(graph.node, kept[::-1])
    replace(graph.initializer, [t for t in graph.initializer if t.name in needed])


def _simplify(model: Any, folder: Path) -> Any:
    """ONNX Runtime's basic optimisation: constants folded, batch norm into convolutions, idle nodes gone; standard operators only."""
    from onnxruntime.quantization.quant_utils import optimize_model

    before, after = folder / "before.onnx", folder / "after.onnx"
    before.write_bytes(model.SerializeToString(deterministic=True))
    try:
        optimize_model(before, after)
    except Exception as error:
        raise GraphUnsupported(f"ONNX Runtime does not take the graph: {_first_line(error)}", value=model.graph.name) from error
    out = _parse(after.read_bytes(), "optimised graph")
    # Fusions over other domains would tie the graph to one runtime.
    if any(n.domain not in ("", "ai.onnx") for g in _graphs(out.graph) for n in g.node):
        return model
    return out


def _multiply(graph: Any) -> None:
    """Division by a stored float becomes multiplication: quantisers know the one and leave the other in float."""
    weights = {t.name: t for t in graph.initializer}
    used = {o for n in graph.node for o in n.output} | set(weights)
    for node in graph.node:
        divisor = weights.get(node.input[1]) if node.op_type == "Div" else None
        if divisor is None or divisor.data_type != TensorProto.FLOAT:
            continue
        values = numpy_helper.to_array(divisor)
        if not values.all():
            continue
        name = fresh(f"{divisor.name}.inverse", used)
        used.add(name)
        graph.initializer.append(numpy_helper.from_array(np.asarray(1.0 / values, np.float32), name))
        node.op_type = "Mul"
        node.input[1] = name
    drop_dead(graph)


def _finish_outputs(model: Any, plan: dict[str, Any]) -> None:
    """Every output gets a fixed shape and float32."""
    graph = model.graph
    inferred = {v.name: v for v in infer(model).graph.output}
    used = {o for n in graph.node for o in n.output} | {t.name for t in graph.initializer}
    measured: dict[str, Array] = {}
    makers = {o: n for n in graph.node for o in n.output}
    for value in graph.output:
        name = value.name
        tensor = inferred[name].type.tensor_type
        dims = [d.dim_value for d in tensor.shape.dim] if tensor.HasField("shape") else None
        kind = tensor.elem_type
        steps: list[Any] = []
        if dims is None or 0 in dims:
            measured = measured or _run(model, {plan["name"]: _noise(plan["shape"], TensorProto.FLOAT, plan["spread"])})
            found = list(np.shape(measured[name]))
            if dims is None:
                dims = [0] * len(found)
            if not any(n.op_type in DATA_DEPENDENT for n in upstream(makers, name)):
                dims = found
        free = [i for i, d in enumerate(dims) if d == 0]
        if len(free) > 1:
            raise GraphUnsupported("an output's shape depends on the image", value=f"{name}: {dims}")
        at = fresh(f"{name}.source", used)
        if free:
            steps, dims, at_now = _fixed_rows(graph, at, dims, free[0], plan["rows"], kind, used)
        else:
            at_now = at
        if kind != TensorProto.FLOAT:
            if kind not in NUMPY_TYPES:
                raise GraphUnsupported("an output has a type that no number has", value=f"{name}: {kind}")
            step = fresh(f"{name}.float", used)
            steps.append(helper.make_node("Cast", [at_now], [step], name=step, to=TensorProto.FLOAT))
        if steps:
            for node in graph.node:
                for i, o in enumerate(node.output):
                    if o == name:
                        node.output[i] = at
            rename_reads(graph, name, at)
            steps[-1].output[0] = name
            graph.node.extend(steps)
        value.CopyFrom(helper.make_tensor_value_info(name, TensorProto.FLOAT, dims))


def _fixed_rows(graph: Any, at: str, dims: list[int], axis: int, rows: int, kind: int, used: set[str]) -> tuple[list[Any], list[int], str]:
    """Nodes that append `rows` rows of zeros along `axis` and keep the first `rows`."""
    dims = [rows if i == axis else d for i, d in enumerate(dims)]
    names = {k: fresh(f"{at}.{k}", used) for k in ("zeros", "longer", "from", "to", "axis", "first", "shape", "fixed")}
    constants = (
        ("zeros", np.zeros(dims, NUMPY_TYPES[kind])), ("from", np.array([0])), ("to", np.array([rows])), ("axis", np.array([axis])),
        ("shape", np.array(dims)),
    )  # fmt: skip
    graph.initializer.extend(numpy_helper.from_array(a if k == "zeros" else a.astype(np.int64), names[k]) for k, a in constants)
    steps = [
        helper.make_node("Concat", [at, names["zeros"]], [names["longer"]], name=names["longer"], axis=axis),
        helper.make_node("Slice", [names["longer"], names["from"], names["to"], names["axis"]], [names["first"]], name=names["first"]),
        helper.make_node("Reshape", [names["first"], names["shape"]], [names["fixed"]], name=names["fixed"]),
    ]
    return steps, dims, names["fixed"]


def upstream(makers: dict[str, Any], name: str) -> list[Any]:
    """Every node that `name` depends on, nearest first."""
    found: list[Any] = []
    seen: set[str] = set()
    waiting = deque([name])
    while waiting:
        at = waiting.popleft()
        if at in seen or at not in makers:
            continue
        node = makers[at]
        seen.update(node.output)
        found.append(node)
        waiting.extend(reads(node))
    return found


def _tidy(model: Any) -> None:
    """Unique node names, no notes of an exporter, one operator set, shapes of values inferred anew."""
    name_nodes(model)
    for graph in _graphs(model.graph):
        for node in graph.node:
            node.doc_string = ""
            del node.metadata_props[:]
    model.doc_string = model.producer_name = model.producer_version = model.domain = ""
    model.graph.doc_string = ""
    model.graph.name = "prepared"
    del model.metadata_props[:]
    del model.graph.metadata_props[:]
    del model.graph.value_info[:]
    version = next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx"))
    del model.opset_import[:]
    model.opset_import.append(helper.make_opsetid("", version))
    model.ir_version = min(model.ir_version, 10)


def name_nodes(model: Any) -> None:
    """A name for every node that has none, and another for one that shares it: ONNX allows both, runtimes and quantisers do not."""
    names: set[str] = set()
    for graph in _graphs(model.graph):
        for i, node in enumerate(graph.node):
            node.name = fresh(node.name or f"{node.op_type}_{i}", names)
            names.add(node.name)


def _compare(source: Any, model: Any, plan: dict[str, Any]) -> None:
    """Both graphs on one random input. Raises GraphUnsupported naming the output that differs."""
    original = onnx.ModelProto()
    original.CopyFrom(source)
    _bind_constants(original, plan["constants"])
    listed = {o.name for o in original.graph.output}
    original.graph.output.extend(o for o in model.graph.output if o.name not in listed)
    kind = next(v for v in original.graph.input if v.name == plan["name"]).type.tensor_type.elem_type
    x = _noise(plan["shape"], kind, plan["spread"])
    old = _run(original, {plan["name"]: x.transpose(0, 2, 3, 1) if plan["layout"] == "NHWC" else x})
    new = _run(model, {plan["name"]: x.astype(np.float32)})
    for name in plan["outputs"]:
        a, b = np.asarray(old[name], np.float32), new[name]
        if a.shape != b.shape:
            rows = tuple(slice(0, min(p, q)) for p, q in zip(a.shape, b.shape, strict=True))
            a, b = a[rows], b[rows]
        limit = PARITY * max(1e-3, float(np.abs(a).max(initial=0.0)))
        if not np.allclose(a, b, rtol=PARITY, atol=limit):
            worst = float(np.abs(a - b).max())
            raise GraphUnsupported("the prepared graph does not give what the original gives", value=f"{name}: off by {worst:.3g}")


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
