"""The shipped radiograph networks in float, through the protocol: phantoms are answered, other pictures are not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import cv2
import numpy as np
import pytest

from appliance import backends, study
from appliance.compiler.heatmap import attach_cam
from appliance.compiler.signature import signature_of
from appliance.errors import SpineNotFound
from appliance.protocols import Bench, spine_xray_ap
from kernels.heatmap import cam_residual
from kernels.preprocess import letterbox, normalise
from models import phantom, phantom_ap, spine_class
from models.export import WEIGHTS, load_float32
from models.phantom_ap import Swing


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    sessions, bias = {}, []
    for family in spine_xray_ap.FAMILIES:
        graph: Any = load_float32(WEIGHTS / f"{family}.onnx")
        if family == "spine_class":
            graph, bias = attach_cam(graph)
        runtime = backends.load("onnxruntime")
        sessions[family] = runtime.open(graph.SerializeToString(), signature_of(graph), precision="f32", threads=0)
    yield Bench(sessions, {"spine_class": {"cam_bias": bias, "temperature": None}})
    for session in sessions.values():
        session.close()


def picture(pixels: np.ndarray) -> study.Instance:  # type: ignore[type-arg]
    grey = np.rint((pixels - pixels.min()) / max(float(np.ptp(pixels)), 1e-6) * 255).astype(np.uint8)
    return study.read(cv2.imencode(".png", grey)[1].tobytes())


@pytest.mark.parametrize("major", [15.0, 35.0, 60.0])
def test_a_phantom_is_measured(bench: Bench, major: float) -> None:
    swings = (Swing(0, -major / 4), Swing(5, major / 2), Swing(12, -major / 2), Swing(16, 0.0))
    image, truth = phantom_ap.draw(np.random.default_rng(31), (900, 500), swings)
    report = spine_xray_ap.run(bench, picture(image), "full")
    assert report.status == "complete"
    assert report.frontal is not None
    assert 15 <= len(report.findings) <= 19
    assert max(c.angle_deg for c in report.frontal.curves) == pytest.approx(max(c.angle_deg for c in truth.curves), abs=6.0)
    assert report.frontal.severity == {15.0: "mild", 35.0: "moderate", 60.0: "severe"}[major]
    assert [h.kind for h in report.heatmaps] == ["cam", "class-evidence"]


@pytest.mark.parametrize("kind", ["noise", "text", "gradient", "lumbar MRI", "lying down"])
def test_another_picture_is_refused(bench: Bench, kind: str) -> None:
    rng = np.random.default_rng(3)
    pixels: Any = np.zeros((640, 400), np.float32)
    if kind == "noise":
        pixels = rng.normal(0, 1, (640, 400))
    elif kind == "text":
        pixels = np.zeros((640, 400), np.uint8)
        for line in range(20):
            cv2.putText(pixels, "seen on the ward and sent home", (10, 30 + 30 * line), cv2.FONT_HERSHEY_SIMPLEX, 0.6, 255, 1)
    elif kind == "gradient":
        pixels = np.tile(np.linspace(0, 1, 400), (640, 1))
    elif kind == "lumbar MRI":
        pixels = phantom.draw(rng, weighting="T2")[0]
    else:
        pixels = phantom_ap.draw(np.random.default_rng(31), (900, 500))[0][::-1].T
    with pytest.raises(SpineNotFound):
        spine_xray_ap.run(bench, picture(np.asarray(pixels)), "full")


def test_the_map_adds_up_to_the_logit_for_any_input(bench: Bench) -> None:
    for seed in range(3):
        image, _ = phantom_ap.draw(np.random.default_rng(seed), (512, 288))
        out = bench.infer("spine_class", letterbox(normalise(image), spine_class.SPEC.input_hw)[0])
        assert cam_residual(out["cam"][0], np.asarray(bench.models["spine_class"]["cam_bias"], np.float32), out["logits"][0]) < 1e-3
        assert out["pooled"].shape == (1, 80)
