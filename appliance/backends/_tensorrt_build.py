"""Parse a Q/DQ graph and build an engine with whatever TensorRT is given: the device's own, or TensorRT-RTX without a GPU.

Imports nothing of Spinebox and no TensorRT: the module is an argument, so the code that runs on a Jetson is the code that the
compiler's gate runs in another environment. Networks are strongly typed (the only kind since TensorRT 11): what is INT8 is what
stands between Q and DQ, nothing else, and no precision flag is set.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

WORKSPACE_BYTES = 1 << 30
OPTIMISATION_LEVEL = 3  # of 0 to 5; TensorRT's own default, pinned
_MAX_ERRORS = 20
_MAX_LINES = 200


class Built(NamedTuple):
    """`engine` and `timing_cache` are opaque bytes; `layers` is of the network as parsed, `log` the builder's last lines."""

    engine: bytes
    timing_cache: bytes
    layers: int
    layer_types: dict[str, int]
    log: list[str]


class BuildRefused(Exception):
    """The parser or the builder said no. `errors` are {"node", "operator", "what"}."""

    def __init__(self, what: str, errors: list[dict[str, str]]) -> None:
        super().__init__(what)
        self.errors = errors


def logger_of(trt: Any) -> Any:
    """A logger that keeps the last lines instead of printing them, warnings and worse: `logger.lines`."""

    class Kept(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.lines: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR, trt.ILogger.WARNING) and len(self.lines) < _MAX_LINES:
                self.lines.append(f"{severity.name}: {message[:400]}")

    return Kept()


def parse(trt: Any, builder: Any, logger: Any, graph: bytes) -> Any:
    """`graph` as a network, and the parser, whose weights the network borrows. Raises BuildRefused with the parser's errors."""
    flags = 0
    strong = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    if strong is not None:
        flags |= 1 << int(strong)
    network = builder.create_network(flags)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(graph):
        errors = [parser.get_error(i) for i in range(min(parser.num_errors, _MAX_ERRORS))]
        raise BuildRefused(
            "the parser refused the graph", [{"node": e.node_name(), "operator": e.node_operator(), "what": e.desc()[:400]} for e in errors]
        )
    return network, parser


def build(trt: Any, graph: bytes, *, timing_cache: bytes = b"", compute_capability: str = "", logger: Any = None) -> Built:
    """An engine for the device at hand, or for `compute_capability` ("SM86") where this TensorRT can build for one that is not.

    `timing_cache` of an earlier build on the same device makes the next one faster and alike. Raises BuildRefused.
    """
    logger = logger or logger_of(trt)
    builder = trt.Builder(logger)
    network, parser = parse(trt, builder, logger, graph)
    types: dict[str, int] = {}
    for i in range(network.num_layers):
        kind = network.get_layer(i).type.name
        types[kind] = types.get(kind, 0) + 1
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, WORKSPACE_BYTES)
    config.builder_optimization_level = OPTIMISATION_LEVEL
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    cache = None
    if compute_capability:
        config.num_compute_capabilities = 1
        if not config.set_compute_capability(getattr(trt.ComputeCapability, compute_capability), 0):
            raise BuildRefused(f"this TensorRT cannot build for {compute_capability}", [])
    else:
        cache = config.create_timing_cache(timing_cache)
        if not config.set_timing_cache(cache, False) and timing_cache:
            # From another device or version: an empty one is as good as none.
            cache = config.create_timing_cache(b"")
            config.set_timing_cache(cache, False)
    plan = builder.build_serialized_network(network, config)
    del parser
    if plan is None:
        raise BuildRefused("the builder refused the graph", [_from_log(line) for line in logger.lines[-_MAX_ERRORS:]])
    kept = config.get_timing_cache() if cache is not None else None
    return Built(bytes(plan), bytes(kept.serialize()) if kept is not None else b"", network.num_layers, types, list(logger.lines[-20:]))


def _from_log(line: str) -> dict[str, str]:
    """The builder names nodes in its log only, in brackets or quotes."""
    found = re.search(r"\[?node[ _]?(?:name)?[:\s]+\"?([^\]\"\s]+)|\{ForeignNode\[([^\]]+)\]", line, re.IGNORECASE)
    return {"node": next((g for g in found.groups() if g), "") if found else "", "operator": "", "what": line}
