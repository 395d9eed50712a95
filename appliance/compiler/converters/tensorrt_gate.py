"""Does TensorRT's parser and builder take a Q/DQ graph? in/model.onnx -> a JSON answer. TensorRT-RTX does both without a GPU.

`in/tensorrt_build.py` is the file that builds engines on a device; the same code runs here with another TensorRT.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any


def main() -> None:
    spec = importlib.util.spec_from_file_location("tensorrt_build", "in/tensorrt_build.py")
    assert spec is not None  # noqa: S101 - a path was given; for the type checker
    assert spec.loader is not None  # noqa: S101
    shared: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(shared)
    import tensorrt_rtx as trt

    request = json.loads(Path("request.json").read_text())
    answer: dict[str, Any] = {"version": trt.__version__, "platform": request["compute_capability"], "passed": False, "errors": []}
    try:
        built = shared.build(trt, Path("in/model.onnx").read_bytes(), compute_capability=request["compute_capability"])
    except shared.BuildRefused as refusal:
        answer.update(what=str(refusal), errors=refusal.errors)
    else:
        answer.update(
            passed=True,
            layers=built.layers,
            layer_types=built.layer_types,
            engine_bytes=len(built.engine),
            warnings=built.log,
        )
    Path("out/answer.json").write_text(json.dumps(answer))


if __name__ == "__main__":
    main()
