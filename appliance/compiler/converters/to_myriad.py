"""ONNX (opset 13, float16 inside) -> IR with OpenVINO 2021.4: in/model.onnx -> out/model.xml, out/model.bin. No stick needed."""

from __future__ import annotations

import json
from pathlib import Path


def main() -> None:
    from openvino.inference_engine import IECore

    core = IECore()
    network = core.read_network("in/model.onnx")
    network.serialize("out/model.xml", "out/model.bin")
    version = core.get_versions("CPU")["CPU"].build_number
    Path("out/answer.json").write_text(json.dumps({"tool": f"openvino {version}"}))


if __name__ == "__main__":
    main()
