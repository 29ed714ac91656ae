"""Curves of several runs in one PNG. Needs matplotlib (`pip install 'tubelet[demo]'`)."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tubelet.engine.curves import COLORS, INK, binned, percentile, short, smoothed, style
from tubelet.errors import RunError
from tubelet.program.runs.reading import Row, number, whole

AXES = {"step": "step", "samples": "samples seen", "time": "hours of training (without evaluations, saves and restarts)"}
"""What curves may be drawn over -> the axis's label."""
STYLES = ("-", "--", ":", "-.")
FEW = 60
"""A curve of fewer points is drawn as it is."""
EXACT = ("train/lr", "train/epoch", "samples_seen")
"""Scalars that have no noise to smooth."""
DECADES = 10.0
"""A loss that falls by more than this factor is drawn on a logarithmic axis."""

Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Drawn:
    """A run to be drawn."""

    label: str
    rows: Sequence[Row]
    batch: int
    """Samples of a step, for rows that do not tell the samples seen."""

    def points(self, metric: str, axis: str) -> Points:
        """(where on the axis, value) of a scalar; values that are not finite are left out. An evaluation of a step comes
        after its log line."""
        found, last, hours = [], 0, 0.0
        for row in self.rows:
            step = whole(row.get("step"))
            if step is None:
                continue
            seconds = number(row, "perf/step_time")
            if seconds is not None:
                hours += max(step - last, 0) * seconds / 3600
                last = step
            value = number(row, metric)
            if value is not None and math.isfinite(value):
                samples = number(row, "samples_seen") or step * self.batch
                found.append((float({"step": step, "samples": samples, "time": hours}[axis]), value))
        return found


def metrics_of(rows: Sequence[Row]) -> list[str]:
    """Names of the scalars in these rows."""
    return list(dict.fromkeys(name for row in rows for name in row if name not in ("step", "time")))


def need_matplotlib() -> None:
    """Raise `RunError` when pictures cannot be drawn."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise RunError("A picture of the curves needs matplotlib, which is not installed.",
                       "pip install 'tubelet[demo]', or --no-picture for the tables alone") from None


def draw(runs: Sequence[Drawn], metrics: Sequence[str], path: Path, *, axis: str = "step", smooth: bool = True) -> None:
    """One panel a metric, one line a run, the legend above; whole or not at all. Raises `RunError` when the file cannot be
    written."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    columns = 1 if len(metrics) == 1 else 2
    lines = math.ceil(len(metrics) / columns)
    beside = _beside([run.label for run in runs], 62 * columns)
    figure = Figure(figsize=(5.4 * columns + 0.6, 3.1 * lines + 0.4 + 0.25 * math.ceil(len(runs) / beside)), dpi=110,
                    layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(lines, columns, squeeze=False, sharex=True).ravel()
    for panel, metric in zip(panels, metrics):
        _panel(panel, metric, [run.points(metric, axis) for run in runs], smooth)
    for panel in panels[len(metrics):]:
        panel.set_visible(False)
    for panel in panels[max(0, len(metrics) - columns):len(metrics)]:
        panel.set_xlabel(AXES[axis], color=INK)
    handles = [Line2D([], [], linewidth=2.2, **_look(count)) for count in range(len(runs))]
    figure.legend(handles, [run.label for run in runs], loc="outside upper left", ncols=beside, frameon=False, fontsize=9,
                  labelcolor=INK)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        figure.savefig(temporary, format="png")
        os.replace(temporary, path)
    except OSError as error:
        raise RunError(f"{path} cannot be written: {error.strerror or error}.", "--out another.png") from None


def _beside(labels: Sequence[str], room: int) -> int:
    """How many labels of a legend stand beside each other in a row of so many letters."""
    return max(1, min(len(labels), room // (max(map(len, labels)) + 8)))


def _look(count: int) -> dict[str, Any]:
    return {"color": COLORS[count % len(COLORS)], "linestyle": STYLES[count // len(COLORS) % len(STYLES)]}


def _panel(panel: Any, metric: str, curves: Sequence[Points], smooth: bool) -> None:
    """One line a run; runs without this metric have none."""
    title = TITLES.get(metric, metric)
    if not any(curves):
        style(panel, f"{title}: nothing finite")
        return
    alike = len(curves) > 1 and all(points == curves[0] for points in curves)
    style(panel, f"{title} (the same in all)" if alike else title)
    low, high = _range(curves, every=metric in EXACT)
    for count, points in enumerate(curves[:1] if alike else curves):
        look = {"color": INK} if alike else _look(count)
        if smooth and len(points) >= FEW and metric not in EXACT:
            _plot(panel, binned(points), linewidth=0.7, alpha=0.3, **look)  # type: ignore[arg-type]
            points = smoothed([(where, min(max(value, low), high)) for where, value in points])  # type: ignore[misc]
        mark = "o" if len(points) < FEW // 2 else None
        _plot(panel, binned(points), linewidth=1.7, marker=mark, markersize=3, **look)  # type: ignore[arg-type]
    _limits(panel, metric, low, high)
    panel.xaxis.set_major_formatter(lambda value, _: short(value))
    panel.tick_params(labelbottom=True)  # of inner panels too, although all share the axis


def _range(curves: Sequence[Points], every: bool = False) -> tuple[float, float]:
    """What the panel must show: of long curves not the rarest values (unless `every`), since a spike would press all of
    them flat."""
    found: list[float] = []
    for values in ([value for _, value in points] for points in curves if points):
        found += values if every or len(values) < FEW else [percentile(values, 0.005), percentile(values, 0.995)]
    return min(found), max(found)


def _plot(panel: Any, points: Sequence[tuple[float, float]], **look: Any) -> None:
    panel.plot([where for where, _ in points], [value for _, value in points], **look)


def _limits(panel: Any, metric: str, low: float, high: float) -> None:
    """The panel's vertical axis; a loss over more than a decade is drawn by its logarithm."""
    if "loss" in metric and 0 < low and high / low > DECADES:
        from matplotlib.ticker import LogLocator, NullFormatter

        panel.set_yscale("log")
        panel.set_ylim(low / 1.15, high * 1.15)
        panel.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        panel.yaxis.set_minor_formatter(NullFormatter())
    elif metric.startswith("perf/") and low >= 0:
        panel.set_ylim(0, 1.08 * high or 1.0)
    elif high > low:
        panel.set_ylim(low - 0.05 * (high - low), high + 0.08 * (high - low))
    panel.yaxis.set_major_formatter(lambda value, _: f"{value:g}" if abs(value) < 1e4 else short(value))


TITLES = {"train/loss": "training loss", "train/lr": "learning rate", "train/grad_norm": "gradient norm",
          "perf/samples_per_sec": "throughput, samples/s", "perf/step_time": "time of a step, s",
          "perf/data_wait_pct": "waiting for data, % of a step", "perf/mfu": "MFU, share of the device's peak",
          "system/rss_gib": "host memory, GiB", "memory/max_allocated_gib": "GPU memory, GiB"}
"""Scalars that have another name in a picture."""

