"""A tiny model that a probe runs: out = relu(2 * image - 1), opset 13, made with onnx.helper. Loading it proves a runtime."""

from __future__ import annotations

import base64

import numpy as np

TINY_ONNX = base64.b64decode(
    "CAgSCHNwaW5lYm94OpABChQKBWltYWdlCgN0d28SAWEiA011bAoQCgFhCgNvbmUSAWIiA1N1YgoOCgFiEgNvdXQiBFJlbHUSBHRpbnkqDwgBEA"
    "EiBAAAAEBCA3R3byoPCAEQASIEAACAP0IDb25lWhcKBWltYWdlEg4KDAgBEggKAggBCgIIBGIVCgNvdXQSDgoMCAESCAoCCAEKAggEQgQKABAN"
)
TINY_INPUT = np.array([[-1.0, 0.25, 0.75, 2.0]], np.float32)
TINY_OUTPUT = np.array([[0.0, 0.0, 0.5, 3.0]], np.float32)
