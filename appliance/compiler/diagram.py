"""The picture of a reliability diagram: how sure an engine said it was, against how often it was right.

Hides matplotlib. One row of panels an engine, one panel a head; hollow grey is before the temperature, blue after it, bars below are
how many answers each point is of.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from appliance import reliability
from appliance.reliability import Bin, Head
from appliance.report import DISCLAIMER

MOST_ROWS = 12
MOST_COLUMNS = 6
BEFORE, AFTER = "#8a8a8a", "#1f77b4"
BARS = 0.24  # height of the fullest bin's bar, of the panel
PANEL = (3.7, 3.9)  # inches


@dataclass(frozen=True)
class Row:
    """One engine: its heads, at least one of them with bins."""

    title: str
    heads: Sequence[Head]


def rows_of(models: Mapping[str, Any]) -> list[Row]:
    """A row for each engine of a manifest's models that no gate refused and that has a record with bins, by name."""
    out = []
    for name, model in sorted(models.items()):
        for backend, engine in sorted(model["engines"].items()):
            heads = [h for h in reliability.of_engine(engine).heads if h.after]
            if heads and engine["passed"] is not False:
                out.append(Row(f"{name} on {backend} {engine['precision']}", heads))
    return out


def draw(rows: Sequence[Row], title: str) -> bytes:
    """PNG. More than MOST_ROWS engines or MOST_COLUMNS heads are cut, and the title says so. ValueError for no row."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    if not rows:
        raise ValueError("there is no reliability diagram to draw")
    shown = rows[:MOST_ROWS]
    columns = min(MOST_COLUMNS, max(len(r.heads) for r in shown))
    lines = _lines(shown, columns)
    size = (max(PANEL[0] * columns, 7.5), PANEL[1] * len(lines) + 1.75)
    figure, axes = plt.subplots(len(lines), columns, figsize=size, dpi=110, squeeze=False)
    try:
        for places, line in zip(axes, lines, strict=True):
            for axis, (name, head) in zip(places, line, strict=False):
                _panel(axis, name, head)
            for axis in places[len(line) :]:
                axis.axis("off")
        cut = len(rows) > MOST_ROWS or any(len(r.heads) > MOST_COLUMNS for r in shown)
        figure.suptitle(_plain(title + (" (not all of them)" if cut else "")), fontsize=13)
        words = (
            "On the dashed line percentages are true; below it they are too high. Blue: after the temperature, with the 95 % interval.",
            "Hollow: before it. Bars and numbers: how many answers each point is of.",
        )
        inch = 1 / size[1]
        figure.text(0.5, 0.5 * inch, "\n".join(words), ha="center", va="bottom", fontsize=9)
        figure.text(0.5, 0.16 * inch, DISCLAIMER, ha="center", fontsize=10, weight="bold", color="#a00000")
        figure.tight_layout(rect=(0, 0.92 * inch, 1, 1 - 0.4 * inch))
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", metadata={"Software": None})
    finally:
        plt.close(figure)
    return buffer.getvalue()


def _lines(rows: Sequence[Row], columns: int) -> list[list[tuple[str, Head]]]:
    """(engine, head) of each panel, line by line: an engine's heads stay together, and engines of few heads share a line."""
    lines: list[list[tuple[str, Head]]] = []
    for row in rows:
        panels = [(row.title, head) for head in row.heads[:columns]]
        if lines and len(lines[-1]) + len(panels) <= columns:
            lines[-1] += panels
        else:
            lines.append(panels)
    return lines


def _panel(axis: Any, title: str, head: Head) -> None:
    several = head.kind == "softmax"
    axis.set_title(_plain(f"{title}\n{head.name}"), fontsize=10, pad=20)
    off, before, chance = (f"{100 * x:.0f}" for x in (head.error.value, head.error_before.value, head.chance))
    words = f"T {head.temperature:.2f}; off by {off} points, {before} before; by chance up to {chance}"
    axis.text(0.5, 1.02, words, transform=axis.transAxes, ha="center", va="bottom", fontsize=8, color="#333333")
    axis.set_xlabel("how sure it said it was, %" if several else f"what it gave for {_plain(head.name)}, %", fontsize=9)
    axis.set_ylabel("how often it was right, %" if several else "how many had it, %", fontsize=9)
    axis.tick_params(labelsize=8)
    axis.set_xlim(0, 100)
    axis.set_ylim(-100 * BARS - 9, 104)
    axis.set_yticks([0, 20, 40, 60, 80, 100])
    axis.grid(alpha=0.25)
    axis.plot([0, 100], [0, 100], color="#888888", linestyle="--", linewidth=1, zorder=1)
    axis.axhline(0, color="#888888", linewidth=0.8)
    _counts(axis, head.after)
    axis.plot(*_points(head.before), color=BEFORE, marker="o", markerfacecolor="none", linewidth=1, markersize=5, alpha=0.8, zorder=2)
    for b in head.after:
        if b.observed.low is not None and b.observed.high is not None:
            axis.plot([100 * b.confidence] * 2, [100 * b.observed.low, 100 * b.observed.high], color=AFTER, alpha=0.45, linewidth=1.4)
    axis.plot(*_points(head.after), color=AFTER, marker="o", linewidth=1.4, markersize=5.5, zorder=3)


def _points(bins: Sequence[Bin]) -> tuple[list[float], list[float]]:
    return [100 * b.confidence for b in bins], [100 * b.observed.value for b in bins]


def _counts(axis: Any, bins: Sequence[Bin]) -> None:
    most = max(b.count for b in bins)
    floor = -100 * BARS - 2
    for b in bins:
        height = 100 * BARS * 0.8 * b.count / most
        axis.bar(100 * b.confidence, height, width=6, bottom=floor, color=AFTER, alpha=0.3, zorder=1)
        axis.text(100 * b.confidence, floor - 1, f"{b.count}", ha="center", va="top", fontsize=6.5, color="#333333")


def _plain(text: str) -> str:
    """Printable ASCII, which every font has, and no dollar sign: matplotlib reads mathematics between two of them."""
    return "".join(c if " " <= c <= "~" or c == "\n" else "?" for c in text.replace("$", "?"))[:200]
