"""Golden numbers: what the discs of two phantoms look like. A forest was fitted to what these numbers mean, so that they may not
drift unseen. `make golden` writes them anew; then the fusion must be fitted anew too."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from kernels.appearance import NAMES, Scene, describe
from kernels.preprocess import normalise
from models import phantom

HERE = Path(__file__).parent
SEEDS = (61, 62)


@pytest.mark.parametrize("seed", SEEDS)
def test_appearance(seed: int) -> None:
    path = HERE / f"appearance-{seed}.json"
    image, truth = phantom.draw(np.random.default_rng(seed), weighting="T2")
    boxes = [d.box_px for d in truth.discs]
    looks = describe(Scene.of(normalise(image), truth.mask), boxes, range(len(boxes)))
    found = {name: [None if np.isnan(v) else round(float(v), 4) for v in column] for name, column in zip(NAMES, looks.T, strict=True)}
    if os.environ.get("SPINEBOX_GOLDEN") == "write":
        path.write_text(json.dumps(found, indent=1) + "\n")
    golden = json.loads(path.read_text())
    assert list(found) == list(golden)
    for name, values in golden.items():
        np.testing.assert_allclose(
            np.array(found[name], float), np.array(values, float), atol=0.5 if name == "incline_deg" else 0.01, err_msg=name
        )
