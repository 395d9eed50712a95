"""The process that owns OpenVINO 2021.4, run by the Python 3.9 of the `myriad` toolchain; imports nothing of Spinebox.

Reads frames from standard input and answers each with one frame on standard output:

    magic (4) | header length (4) | payload length (8), little-endian | header, a JSON object | payload, raw bytes

    {"op": "hello"}                                         -> {"runtime", "plugin", "plugin_error", "devices"}
    {"op": "load", "device", "format", "first_bytes",
     "inputs": [{"name", "shape"}], "outputs": [...]}       -> {}    payload: xml and bin of an IR, or an ONNX file
    {"op": "run"}, payload: inputs in order, float32        -> {}    payload: outputs in order, float32

A failure is {"error": text}. End of input ends the process.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import struct
import sys
from typing import Any, BinaryIO

FRAME = struct.Struct("<4sIQ")
MAGIC = b"SPXW"
MAX_HEADER_BYTES = 1 << 16
MAX_PAYLOAD_BYTES = 1 << 30
_ERROR_CHARACTERS = 600


def read_exactly(stream: BinaryIO, count: int) -> bytes:
    data = stream.read(count)
    if len(data) != count:
        raise EOFError
    return data


def receive(stream: BinaryIO) -> tuple[dict[str, Any], bytes]:
    magic, header_bytes, payload_bytes = FRAME.unpack(read_exactly(stream, FRAME.size))
    if magic != MAGIC or header_bytes > MAX_HEADER_BYTES or payload_bytes > MAX_PAYLOAD_BYTES:
        raise EOFError
    return json.loads(read_exactly(stream, header_bytes)), read_exactly(stream, payload_bytes)


def send(stream: BinaryIO, header: dict[str, Any], payload: bytes = b"") -> None:
    text = json.dumps(header).encode()
    stream.write(FRAME.pack(MAGIC, len(text), len(payload)) + text + payload)
    stream.flush()


class Worker:
    def __init__(self) -> None:
        # The plugin wants libusb by name; one that is loaded already is taken, so no system package is needed.
        with contextlib.suppress(Exception):
            import libusb_package

            ctypes.CDLL(str(libusb_package.get_library_path()), mode=ctypes.RTLD_GLOBAL)
        from openvino.inference_engine import IECore

        self.core = IECore()
        self.executable: Any = None
        self.inputs: list[tuple[str, tuple[int, ...]]] = []
        self.outputs: list[tuple[str, tuple[int, ...]]] = []

    def hello(self) -> dict[str, Any]:
        answer: dict[str, Any] = {"runtime": self.core.get_versions("CPU")["CPU"].build_number, "plugin": True, "plugin_error": ""}
        try:
            self.core.get_versions("MYRIAD")
        except Exception as error:  # noqa: BLE001 - the vendor raises RuntimeError for everything
            answer.update(plugin=False, plugin_error=str(error).strip()[:_ERROR_CHARACTERS])
        answer["devices"] = list(self.core.available_devices)
        return answer

    def load(self, header: dict[str, Any], payload: bytes) -> None:
        cut = int(header["first_bytes"])
        if header["format"] == "ir":
            network = self.core.read_network(model=payload[:cut], weights=payload[cut:], init_from_buffer=True)
        else:
            network = self.core.read_network(model=payload, weights=b"", init_from_buffer=True)
        self.inputs = [(t["name"], tuple(t["shape"])) for t in header["inputs"]]
        self.outputs = [(t["name"], tuple(t["shape"])) for t in header["outputs"]]
        found_in = {n: tuple(i.tensor_desc.dims) for n, i in network.input_info.items()}
        found_out = {n: tuple(d.shape) for n, d in network.outputs.items()}
        if found_in != dict(self.inputs) or found_out != dict(self.outputs):
            raise ValueError(f"the network has inputs {found_in} and outputs {found_out}")
        for info in network.input_info.values():
            info.precision = "FP32"
        for data in network.outputs.values():
            data.precision = "FP32"
        # On processors with AVX512-BF16 the old plugin computes in bfloat16 unasked; half precision is what is promised.
        config = {"ENFORCE_BF16": "NO"} if header["device"] == "CPU" else {}
        self.executable = self.core.load_network(network, header["device"], config)

    def run(self, payload: bytes) -> bytes:
        import numpy as np

        feed, at = {}, 0
        for name, shape in self.inputs:
            count = int(np.prod(shape))
            feed[name] = np.frombuffer(payload, "<f4", count, at).reshape(shape)
            at += 4 * count
        found = self.executable.infer(feed)
        return b"".join(np.ascontiguousarray(found[name], "<f4").tobytes() for name, _ in self.outputs)


def main() -> None:
    # Native code prints to standard output; the frames go another way, and what is printed joins the log.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    worker = Worker()
    while True:
        try:
            header, payload = receive(sys.stdin.buffer)
        except EOFError:
            return
        try:
            if header["op"] == "hello":
                send(answers, worker.hello())
            elif header["op"] == "load":
                worker.load(header, payload)
                send(answers, {})
            elif header["op"] == "run":
                send(answers, {}, worker.run(payload))
            else:
                send(answers, {"error": f"no such operation: {header['op']}"})
        except Exception as error:  # noqa: BLE001 - whatever the vendor raises is an answer, not an end
            send(answers, {"error": f"{type(error).__name__}: {str(error).strip()[-_ERROR_CHARACTERS:]}"})


if __name__ == "__main__":
    main()
