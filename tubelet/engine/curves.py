"""The curves of a run, from `metrics.jsonl`, and a picture of them for the run card."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tubelet import files

Points = list[tuple[int, float]]
"""(step, value), steps ascending."""

POINTS = 600
"""A curve is drawn with about so many points, each the mean of its stretch of steps."""
INK, FAINT, GRID = "#333333", "#888888", "#e6e6e6"
COLORS = ("#1f6fb4", "#d1603d", "#2f8f5b", "#7b5ea7", "#b08c2a", "#5b8a9a")
_MARK = re.compile(r"^val(_ema)?/")


@dataclass
class Curves:
    """Rows of training and points of evaluation."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    evaluation: dict[str, Points] = field(default_factory=dict)
    """Finite values alone: others cannot be drawn."""
    results: dict[str, float] = field(default_factory=dict)
    """The newest evaluation as it was written, whatever its values."""

    @property
    def steps(self) -> list[int]:
        return [row["step"] for row in self.rows]

    def points(self, name: str) -> Points:
        """A scalar of training; values that are not finite are left out."""
        return [(row["step"], row[name]) for row in self.rows if name in row and math.isfinite(row[name])]

    def sampled(self, most: int) -> list[dict[str, Any]]:
        """At most `most` rows, evenly chosen, the last among them."""
        count = len(self.rows)
        picked = range(count) if count <= most else [round(i * (count - 1) / (most - 1)) for i in range(most)]
        return [self.rows[number] for number in picked]


def read_curves(path: Path, until: int | None = None) -> Curves:
    """The curves in a `metrics.jsonl`, up to step `until`; no rows when there is none. Takes about 10 us a row."""
    found = Curves()
    for row in files.read_jsonl(path):
        if not isinstance(row.get("step"), int) or (until is not None and row["step"] > until):
            continue
        if isinstance(row.get("train/loss"), (int, float)):
            found.rows.append(row)
        results = {name: float(value) for name, value in row.items()
                   if _MARK.match(name) and isinstance(value, (int, float))}
        found.results = results or found.results
        for name, value in results.items():
            if math.isfinite(value):
                found.evaluation.setdefault(name, []).append((row["step"], value))
    return found


def binned(points: Sequence[tuple[int, float]], most: int = POINTS) -> Points:
    """At most `most` points, each the mean of its neighbours; short curves as they are."""
    if len(points) <= most:
        return list(points)
    size = math.ceil(len(points) / most)
    groups = [points[start:start + size] for start in range(0, len(points), size)]
    return [(group[-1][0], sum(value for _, value in group) / len(group)) for group in groups]


def smoothed(points: Points) -> Points:
    """The mean of a stretch of a thirtieth of the curve around each point, shorter at both ends."""
    sums = [0.0]
    for _, value in points:
        sums.append(sums[-1] + value)
    reach, count = max(len(points) // 60, 1), len(points)
    found = []
    for number, (step, _) in enumerate(points):
        here = min(reach, number, count - 1 - number)  # as far to both sides, or a falling curve would be bent
        first, last = number - here, number + here + 1
        found.append((step, (sums[last] - sums[first]) / (last - first)))
    return found


def draw_curves(curves: Curves, path: Path, unit: str) -> bool:
    """Draw loss, learning rate, throughput and evaluation into one PNG, whole or not at all; False without matplotlib or
    without two log steps to draw a line through."""
    if len(curves.rows) < 2:
        return False
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # no window system, no global state
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(10, 6.2), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 2, sharex=True)
    _loss(axes[0][0], curves)
    _line(axes[0][1], binned(curves.points("train/lr")), "learning rate", COLORS[1])
    axes[0][1].yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    _throughput(axes[1][0], curves, unit)
    _evaluation(axes[1][1], curves)
    for axis in axes[1]:
        axis.set_xlabel("step", color=INK)
        axis.xaxis.set_major_formatter(lambda value, _: short(value))
    temporary = path.with_name(f".{path.name}.tmp")
    figure.savefig(temporary, format="png")
    os.replace(temporary, path)
    return True


def short(value: float) -> str:
    """12500 -> '12.5k', for an axis."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def style(axis: Any, title: str) -> None:
    """The look of every panel: title, grid, frame."""
    axis.set_title(title, loc="left", fontsize=11, color=INK)
    axis.grid(True, color=GRID, linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color(FAINT)
    axis.tick_params(colors=INK, labelsize=9)


def _plot(axis: Any, points: Points, color: str, **options: Any) -> None:
    axis.plot([step for step, _ in points], [value for _, value in points], color=color, **options)


def _line(axis: Any, points: Points, title: str, color: str) -> None:
    style(axis, title)
    _plot(axis, points, color, linewidth=1.6)


def _loss(axis: Any, curves: Curves) -> None:
    points = curves.points("train/loss")
    style(axis, "training loss")
    if len(points) < 50:
        return _plot(axis, points, COLORS[0], linewidth=1.6)
    _plot(axis, binned(points), COLORS[0], linewidth=0.8, alpha=0.35)
    _plot(axis, binned(smoothed(points)), COLORS[0], linewidth=1.8)
    low, high = min(value for _, value in points), percentile([value for _, value in points], 0.995)
    if high > low:  # a single spike must not press the curve flat
        axis.set_ylim(low - 0.05 * (high - low), high + 0.1 * (high - low))


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which a share (0..1) of the values lies."""
    return sorted(values)[min(int(share * len(values)), len(values) - 1)]


def _throughput(axis: Any, curves: Curves, unit: str) -> None:
    points = binned(curves.points("perf/samples_per_sec"))
    _line(axis, points, f"throughput, {unit}/s", COLORS[2])
    axis.set_ylim(0, 1.08 * max((value for _, value in points), default=1.0) or 1.0)


def _evaluation(axis: Any, curves: Curves) -> None:
    """Accuracies where there are any, otherwise losses: one unit a panel."""
    names = [name for name in curves.evaluation if "acc1" in name.rsplit("/", 1)[-1]]
    names = names or [name for name in curves.evaluation if "acc" in name.rsplit("/", 1)[-1]] or list(curves.evaluation)
    style(axis, "evaluation" if names else "evaluation: none yet")
    for number, name in enumerate(names[:len(COLORS)]):
        _plot(axis, curves.evaluation[name], COLORS[number], linewidth=1.6, marker="o", markersize=3, label=name)
    if names:
        axis.legend(frameon=False, fontsize=9, labelcolor=INK)
