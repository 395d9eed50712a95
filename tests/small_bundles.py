"""Small whole bundles for tests: real in every field, with bytes in place of graphs."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from appliance import signing
from appliance.bundle import new_bundle
from appliance.errors import SpineboxError

GRAPH = bytes(range(256)) * 4
PATH = "models/segmenter/int8.onnx"
METRIC = {"name": "dice_mean", "value": 0.91, "low": 0.90, "high": 0.92, "images": 64, "patients": 6}
VERDICT = {"gate": "task", "passed": True, "note": "fell by 0.10 points", "value": 0.001, "low": -0.002, "high": 0.004, "limit": 0.01}
ENGINE = {
    "graph": PATH,
    "precision": "int8",
    "passed": True,
    "verified": "ran on this machine",
    "golden": "golden/segmenter.npz",
    "metrics": [{**METRIC, "value": 0.909}],
    "verdicts": [VERDICT],
}
REFUSED = {
    **ENGINE,
    "passed": False,
    "verdicts": [{**VERDICT, "passed": False, "note": "fell by 62.00 points", "value": 0.62, "low": 0.5, "high": 0.7}],
}
ABSENT = {
    **ENGINE,
    "graph": None,
    "golden": None,
    "precision": "fp16",
    "passed": None,
    "verified": "no device here; the graph was query-checked",
    "metrics": [],
    "verdicts": [],
}
MODEL: dict[str, Any] = {
    "version": "1",
    "task": "segmentation",
    "classes": ["background", "vertebra", "disc", "canal"],
    "inputs": [{"name": "image", "shape": [1, 1, 8, 8]}],
    "outputs": [{"name": "logits", "shape": [1, 4, 4, 4]}],
    "preprocess": {"fit": "letterbox", "input_hw": [8, 8]},
    "heatmap": {"kind": "class-evidence", "output": "logits", "layer": "head", "reason": ""},
    "cam_bias": None,
    "float_share": 0.02,
    "source_sha256": "ab" * 32,
    "card": "cards/segmenter.json",
    "calibration": {
        "manifest": "calibration/segmenter.csv",
        "record": "calibration/segmenter.json",
        "root": "cd" * 32,
        "images": 4,
        "source": "phantoms",
    },
    "temperature": None,
    "metrics": {"source": "phantoms", "fp32": [METRIC]},
    "engines": {"onnxruntime": ENGINE, "openvino": ENGINE},
}
PROFILE = {
    "device": {"cores": 2},
    "models": {
        "segmenter": {
            "choice": {"backend": "onnxruntime", "precision": "int8", "reason": "fastest here of those that passed"},
            "losers": [{"backend": "openvino", "precision": "int8", "reason": "slower here"}],
            "engines": {
                "onnxruntime int8": {"a": {"median_ms": 10.0, "p99_ms": 11.0}, "b": {"median_ms": 6.5, "p99_ms": 7.0}, "ratio": 1.54},
                "openvino int8": {"a": {"median_ms": 10.0, "p99_ms": 11.0}, "b": {"median_ms": 8.0, "p99_ms": 9.0}, "ratio": 1.25},
                "openvino bf16": {"b": {"median_ms": 7.0}, "ratio": 1.4},
            },
        }
    },
}


def manifest(name: str = "tiny") -> dict[str, Any]:
    """What the compiler hands to `Writer.finish`."""
    fields = {"name": name, "spinebox": "0.1.0", "tools": {"onnx": "1.23.2"}, "max_drop": 0.01, "sbom": "sbom.json"}
    return {**fields, "models": {"segmenter": copy.deepcopy(MODEL)}}


def write(
    root: Path,
    name: str = "tiny",
    *,
    graph: bytes = GRAPH,
    profile: dict[str, Any] | None = None,
    change: Callable[[dict[str, Any]], object] = lambda m: None,
    signed: bool = True,
) -> Path:
    """A bundle signed with the (scratch) author's key; `change` may alter the manifest before it is written."""
    with new_bundle(root) as writer:
        writer.add(PATH, graph)
        writer.add("cards/segmenter.json", b"{}")
        writer.add("calibration/segmenter.csv", b"item,sha256\nphantom:1,00\n")
        writer.add("calibration/segmenter.json", b"{}")
        writer.add("golden/segmenter.npz", b"golden")
        writer.add("sbom.json", b"{}")
        fields = manifest(name)
        change(fields)
        writer.finish(fields, signing.author_key() if signed else None, profile)
    return root


@contextmanager
def refused(kind: type[SpineboxError], words: str) -> Iterator[pytest.ExceptionInfo[SpineboxError]]:
    """As `pytest.raises`, but `words` must be in what the error says: its value names a scratch folder, which is named like the test."""
    with pytest.raises(kind) as caught:
        yield caught
    assert re.search(words, caught.value.what), caught.value.what
