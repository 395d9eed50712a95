"""What a Subject says of any family that this project trained, whatever it looks at: its graph's digest, preprocessing and card."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from appliance.compiler.subject import MapSpec, Subject
from kernels.preprocess import PERCENTILES, PREPROCESS_VERSION
from models.family import Spec


def subject(spec: Spec, model: Any, heatmap: MapSpec, weights: Path, fit: str = "letterbox", **rest: Any) -> Subject:
    """`fit` says how an image becomes the input; `rest` are the Subject's fields that differ from family to family."""
    card = weights / f"{spec.name}.json"
    return Subject(
        name=spec.name,
        version=spec.version,
        task=spec.task,
        model=model,
        source_sha256=hashlib.sha256((weights / f"{spec.name}.onnx").read_bytes()).hexdigest(),
        classes=spec.classes,
        preprocess={
            "version": PREPROCESS_VERSION,
            "percentiles": list(PERCENTILES),
            "range": [-1, 1],
            "fit": fit,
            "input_hw": list(spec.input_hw),
        },
        heatmap=heatmap,
        card=json.loads(card.read_text()) if card.exists() else {},
        **rest,
    )
