"""The picture of a choice: latency against loss, one panel a model, with the Pareto front drawn through what passed.

Hides matplotlib. Points keep their colour by backend and their shape by precision, so that pictures of two bundles compare.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from appliance.report import DISCLAIMER

State = Literal["picked", "passed", "refused", "not judged", "reference"]
MOST_PANELS = 24
COLUMNS = 3
_COLOURS = {"onnxruntime": "#1f77b4", "openvino": "#d95f02", "tflite": "#2ca02c", "tensorrt": "#7b3294", "myriad": "#8c564b"}
_OTHER = "#444444"
_SHAPES = {"int8": "o", "fp16": "s", "f32": "^", "bf16": "D"}


@dataclass(frozen=True)
class Point:
    """One engine: `loss` of the main metric against FP32 (0.01 is one point), `low` and `high` its 95 % interval."""

    backend: str
    precision: str
    latency_ms: float
    loss: float
    state: State
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Panel:
    """One model: its points, the name of its main metric, the largest loss allowed, and what could not be drawn, in words."""

    title: str
    metric: str
    limit: float
    points: Sequence[Point]
    missing: Sequence[str] = ()


def front(points: Iterable[Point]) -> list[Point]:
    """The passed engines that no other passed engine beats in both latency and loss, fastest first."""
    out: list[Point] = []
    usable = [p for p in points if p.state in ("picked", "passed", "reference")]
    for point in sorted(usable, key=lambda p: (p.latency_ms, p.loss)):
        if not out or point.loss < out[-1].loss:
            out.append(point)
    return out


def draw(panels: Sequence[Panel], title: str) -> bytes:
    """PNG. More than MOST_PANELS models are cut, and the title says so."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    shown = panels[:MOST_PANELS]
    columns = max(1, min(COLUMNS, len(shown)))
    rows = max(1, math.ceil(len(shown) / columns))
    figure, axes = plt.subplots(rows, columns, figsize=(max(5.6 * columns, 7.5), 4.3 * rows + 1.0), dpi=110, squeeze=False)
    try:
        for axis, panel in zip(axes.flat, shown, strict=False):
            _panel(axis, panel)
        for axis in axes.flat[len(shown) :]:
            axis.axis("off")
        cut = f" (the first {MOST_PANELS} of {len(panels)} models)" if len(panels) > MOST_PANELS else ""
        bottom = 0.75 / (4.3 * rows + 1.0)
        figure.suptitle(_plain(title + cut), fontsize=13)
        words = "Lower left is better. Bars: 95 % interval over patients. Star: picked. Hollow: refused or not judged. Dashed: limit."
        figure.text(0.5, bottom * 0.62, words, ha="center", fontsize=9)
        figure.text(0.5, bottom * 0.18, DISCLAIMER, ha="center", fontsize=10, weight="bold", color="#a00000")
        figure.tight_layout(rect=(0, bottom, 1, 0.99))
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", metadata={"Software": None})
    finally:
        plt.close(figure)
    return buffer.getvalue()


def _panel(axis: Any, panel: Panel) -> None:
    axis.set_title(_plain(panel.title), fontsize=11)
    axis.set_xlabel("latency, median ms on the device of the profile")
    axis.set_ylabel(f"loss of {_plain(panel.metric)}, points")
    axis.grid(alpha=0.25)
    axis.axhline(panel.limit * 100, color="#a00000", linestyle="--", linewidth=1)
    axis.axhline(0, color="#888888", linewidth=0.8)
    ahead = front(panel.points)
    if len(ahead) > 1:
        x, y = [p.latency_ms for p in ahead], [p.loss * 100 for p in ahead]
        axis.step(x, y, where="post", color="#888888", linewidth=1.2, zorder=1)
    kept = [p for p in panel.points if p.state not in ("refused", "not judged")]
    top = max([e * 100 for p in kept for e in (p.loss, p.high) if e is not None] + [panel.limit * 300])
    for point in panel.points:
        _point(axis, point, top)
    if panel.points:
        axis.set_xlim(0, max(p.latency_ms for p in panel.points) * 1.2 or 1.0)
        ends = [min(e * 100, top) for p in panel.points for e in (p.loss, p.low, p.high) if e is not None]
        low, high = min(*ends, 0), max(*ends, panel.limit * 100, 1e-3)
        axis.set_ylim(low - 0.1 * (high - low), high + 0.34 * (high - low))
        _labels(axis, panel.points, top)
    if panel.missing:
        text = "\n".join(_plain(m)[:90] for m in list(panel.missing)[:8])
        axis.text(0.98, 0.98, text, transform=axis.transAxes, ha="right", va="top", fontsize=7, color="#555555")


def _point(axis: Any, point: Point, top: float) -> None:
    """A ruined engine would squeeze the others to a line: above `top` it stands at the edge, and its label says how far it is."""
    colour = _COLOURS.get(point.backend, _OTHER)
    if point.low is not None and point.high is not None:
        ends = [min(point.low * 100, top), min(point.high * 100, top)]
        axis.plot([point.latency_ms] * 2, ends, color=colour, alpha=0.55, linewidth=1.4, zorder=2)
    hollow = point.state in ("refused", "not judged")
    axis.scatter(
        [point.latency_ms],
        [min(point.loss * 100, top)],
        marker="*" if point.state == "picked" else _SHAPES.get(point.precision, "o"),
        s=210 if point.state == "picked" else 62,
        facecolors="none" if hollow else colour,
        edgecolors=colour,
        linewidths=1.4,
        zorder=3,
    )


def _labels(axis: Any, points: Sequence[Point], top: float) -> None:
    """Above each point, on three levels in turn, so that neighbours do not cover each other."""
    most = axis.get_xlim()[1]
    for k, p in enumerate(sorted(points, key=lambda p: (p.latency_ms, p.loss))):
        words = f"{p.backend} {p.precision}" + (f", {p.state}" if p.state in ("refused", "not judged") else "")
        words += f", loss {p.loss * 100:.1f}" if p.loss * 100 > top else ""
        share = p.latency_ms / most
        axis.annotate(
            _plain(words),
            (p.latency_ms, min(p.loss * 100, top)),
            xytext=(0, 14 + 13 * (k % 3)),
            textcoords="offset points",
            ha="left" if share < 0.2 else "right" if share > 0.78 else "center",
            va="bottom",
            fontsize=8,
            color=_COLOURS.get(p.backend, _OTHER),
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.8},
            arrowprops={"arrowstyle": "-", "color": _COLOURS.get(p.backend, _OTHER), "alpha": 0.4, "linewidth": 0.8},
        )


def _plain(text: str) -> str:
    """Printable ASCII, which every font has, and no dollar sign: matplotlib reads mathematics between two of them."""
    return "".join(c if " " <= c <= "~" and c != "$" else "?" for c in text)[:200]
