"""What `benchmarks.levels` counts: a name is right by the place of its drawn box alone, and whoever says nothing is not wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from appliance.errors import SpineNotFound
from appliance.report import Finding, Report
from benchmarks import levels
from models import data

BOXES = np.array([[10, 10 + 30 * k, 60, 30 + 30 * k] for k in range(4)], np.float32)  # from the top down


class Scripted:
    """Finds the boxes it is given, lowest first, under the names it is given."""

    def __init__(self, names: dict[int, str | None], moved: float = 2.0) -> None:
        self.names, self.moved = names, moved

    def run(self, instance: Any) -> Report:
        if not self.names:
            raise SpineNotFound("nothing")
        found = []
        for number, name in self.names.items():
            box = tuple(float(v) + self.moved for v in BOXES[::-1][number])
            found.append(Finding("disc", 0.9, box, number + 1, name))  # type: ignore[arg-type]
        return Report(status="complete", protocol="lumbar-mri-sagittal", source={}, findings=tuple(found))


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "lumbar_mri/midsagittal").mkdir(parents=True)
    cv2.imwrite(str(tmp_path / "lumbar_mri/midsagittal/7_t2.png"), np.tile(np.arange(150, dtype=np.uint8), (150, 1)))
    monkeypatch.setattr(data, "disc_boxes", lambda root: {"7_t2.png": BOXES})
    return tmp_path


@pytest.mark.parametrize(
    ("names", "moved", "became"),
    [
        ({0: "L5/S1", 1: "L4/L5", 2: "L3/L4", 3: "L2/L3"}, 2.0, ["right"] * 4),
        ({0: "L4/L5", 1: "L3/L4", 2: "L2/L3", 3: "L1/L2"}, 2.0, ["wrong"] * 4),
        ({0: "L5/S1", 1: None, 3: "L2/L3"}, 2.0, ["right", "not named", "not found", "right"]),
        ({0: "L5/S1", 1: "L4/L5", 2: "L3/L4", 3: "L2/L3"}, 500.0, ["not found"] * 4),
        ({}, 2.0, ["refused"] * 4),
    ],
)
def test_what_becomes_of_each_disc(root: Path, names: dict[int, str | None], moved: float, became: list[str]) -> None:
    assert levels.discs(Scripted(names, moved), root, "7_t2.png") == became  # type: ignore[arg-type]
