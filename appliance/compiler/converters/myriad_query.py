"""Which layers of an IR does the Movidius plugin take? in/model.xml, in/model.bin -> {"supported": [...], "unsupported": [...]}.

The plugin compiles the graph for the stick to find out, so the answer needs no stick. "Unsupported" are {"name", "type"}.
"""

from __future__ import annotations

import ctypes
import json
import xml.etree.ElementTree as ET
from pathlib import Path

NOT_LAYERS = ("Const", "Result", "Parameter")


def main() -> None:
    import libusb_package

    # The plugin wants libusb by name; one that is loaded already is taken.
    ctypes.CDLL(str(libusb_package.get_library_path()), mode=ctypes.RTLD_GLOBAL)
    from openvino.inference_engine import IECore

    core = IECore()
    network = core.read_network("in/model.xml", "in/model.bin")
    taken = {name for name, device in core.query_network(network, "MYRIAD").items() if device == "MYRIAD"}
    layers = [(str(e.get("name")), str(e.get("type"))) for e in ET.parse("in/model.xml").getroot().iter("layer")]  # noqa: S314 - written by the runtime a moment ago
    real = [(n, t) for n, t in layers if t not in NOT_LAYERS]
    answer = {
        "runtime": core.get_versions("MYRIAD")["MYRIAD"].build_number,
        "supported": sorted(n for n, _ in real if n in taken),
        "unsupported": sorted(({"name": n, "type": t} for n, t in real if n not in taken), key=lambda e: e["name"]),
    }
    Path("out/answer.json").write_text(json.dumps(answer))


if __name__ == "__main__":
    main()
