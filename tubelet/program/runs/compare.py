"""Several runs side by side: settings that differ, results, versions, curves. `tubelet runs compare A B`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tubelet import files
from tubelet.console import print_table
from tubelet.errors import RunError, nearest
from tubelet.program.runs import reading
from tubelet.program.runs.chosen import different, words
from tubelet.program.runs.page import best_of
from tubelet.program.runs.picture import Drawn, metrics_of
from tubelet.program.runs.reading import Row, number, shown, whole
from tubelet.program.runs.standing import Standing, find_run, open_run, standing
from tubelet.runs import Attempt

DEFAULT = ("train/loss", "perf/samples_per_sec")
"""Metrics that are drawn unless others are asked for, with the accuracies (or losses) of evaluations between them."""
MEAN_OF = 0.02
"""The loss at a step is the mean of the log lines of the last fiftieth of the steps up to it."""


@dataclass
class Compared:
    """One of the runs."""

    label: str
    run: Standing
    config: Row
    rows: list[Row]
    attempt: Attempt | None

    @property
    def drawn(self) -> Drawn:
        """What the picture needs."""
        return Drawn(self.label, self.rows, whole(self.config.get("global_batch_size")) or 0)

    def loss_at(self, step: int) -> float | None:
        """The training loss around a step."""
        near = [value for row in self.rows if (value := number(row, "train/loss")) is not None
                and (1 - MEAN_OF) * step <= (whole(row.get("step")) or 0) <= step]
        return sum(near) / len(near) if near else None


def read(names: Sequence[str]) -> list[Compared]:
    """The named runs. Raises `RunError` for what is no run, for one run twice, and for fewer than two."""
    folders = [find_run(name) for name in names]
    if len(folders) < 2:
        raise RunError(f"{len(folders)} run was named, a comparison needs two or more.",
                       f"`tubelet runs compare {names[0]} OTHER`, or `tubelet runs show {names[0]}`")
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise RunError("The same run was named twice.", "different runs")
    labels = [folder.resolve().name for folder in folders]
    if len(set(labels)) < len(labels):
        labels = [str(folder) for folder in folders]
    return [_read(label, folder) for label, folder in zip(labels, folders)]


def _read(label: str, folder: Path) -> Compared:
    try:
        attempts = open_run(folder).attempts()
        return Compared(label, standing(folder), reading.all_settings(folder / "config.yaml"),
                        [row for row in files.read_jsonl(folder / "metrics.jsonl") if isinstance(row, dict)],
                        attempts[-1] if attempts else None)
    except PermissionError as error:
        raise RunError(f"{error.filename or folder} may not be read by this user.", "its owner, or `chmod -R g+rX` by them"
                       ) from None


def choose_metrics(runs: Sequence[Compared], wanted: Sequence[str]) -> list[str]:
    """The metrics to draw. Raises `RunError` for one that no run has."""
    known = list(dict.fromkeys(name for run in runs for name in metrics_of(run.rows)))
    unknown = [name for name in wanted if name not in known]
    if unknown:
        close = [name for name in known if name.startswith(unknown[0])][:4] or nearest(unknown[0], known, 3)
        hint = " or ".join(f"--metric {name}" for name in close or known[:6])
        raise RunError(f"No run here has logged `{unknown[0]}`.", hint or "runs that have logged something")
    if wanted:
        return list(dict.fromkeys(wanted))
    judged = [name for name in known if name.startswith(("val/", "val_ema/"))]
    judged = [name for name in judged if "acc1" in name.rsplit("/", 1)[-1]] or [
        name for name in judged if "loss" in name.rsplit("/", 1)[-1]]
    return [name for name in (DEFAULT[0], *judged[:4], *DEFAULT[1:]) if name in known]


def settings_rows(runs: Sequence[Compared]) -> list[tuple[str, str, list[Any]]]:
    """(key, resume class, values) of the settings that differ."""
    return different([run.config for run in runs]) if all(run.config for run in runs) else []


def result_rows(runs: Sequence[Compared]) -> list[tuple[str, list[str]]]:
    """(what, its value in each run)."""
    steps = [run.run.step for run in runs if run.run.step]
    common = min(steps) if len(steps) == len(runs) else None
    rows: list[tuple[str, list[str]]] = [
        ("state", [run.run.state for run in runs]),
        ("step", [f"{run.run.step if run.run.step is not None else 0}" + (f" of {run.run.total_steps}" if run.run.total_steps
                                                                       else "") for run in runs]),
        ("training loss, last", [shown(run.run.loss) for run in runs])]
    if common:
        rows.append((f"training loss at step {common}", [shown(run.loss_at(common)) for run in runs]))
    rows += _judged(runs)
    rows += [("samples/s", [shown(run.run.rate, ".1f") for run in runs]),
             ("goodput", [f"{100 * run.run.goodput:.1f} %" if run.run.goodput is not None else "" for run in runs]),
             ("restarts", [f"{run.run.restarts}" for run in runs]),
             ("host", [run.run.host for run in runs]),
             ("processes", [f"{run.attempt.world_size}" if run.attempt else "" for run in runs]),
             ("commit", [run.attempt.commit[:10] if run.attempt else "" for run in runs])]
    manifests = [run.run.checkpoint.manifest if run.run.checkpoint else {} for run in runs]
    versions = [found if isinstance(found := manifest.get("versions"), dict) else {} for manifest in manifests]
    for name in dict.fromkeys(name for one in versions for name in one):
        rows.append((name, [str(one.get(name, "")) for one in versions]))
    return [row for row in rows if any(row[1])]


def _judged(runs: Sequence[Compared]) -> list[tuple[str, list[str]]]:
    rows = []
    for name in dict.fromkeys(name for run in runs for name in metrics_of(run.rows)):
        if not name.startswith(("val/", "val_ema/")) or name.endswith("bad_samples"):
            continue
        found = [[(int(step), value) for step, value in run.drawn.points(name, "step")] for run in runs]
        rows.append((f"{name}, last", [shown(points[-1][1]) if points else "" for points in found]))
        best = [best_of(name, points) if points else None for points in found]
        rows.append((f"{name}, best", [f"{shown(one[1])} at step {one[0]}" if one else "" for one in best]))
    return rows


def show(runs: Sequence[Compared]) -> None:
    """Print the tables."""
    labels = [run.label for run in runs]
    rows = settings_rows(runs)
    lacking = [run.label for run in runs if not run.config]
    if lacking:
        print(f"settings are not compared: {', '.join(lacking)} has no config.yaml that can be read")
    elif rows:
        print_table("Settings that differ (on a resume: free to change, recorded, or fixed)",
                    ("setting", "on resume", *labels), [(key, kind, *map(words, values)) for key, kind, values in rows])
    else:
        print("All settings are equal, but for the runs' names.")
    print_table("\nResults", ("", *labels), [(what, *values) for what, values in result_rows(runs)])


def to_json(runs: Sequence[Compared]) -> Row:
    """The tables as plain values."""
    return {"runs": [run.run.to_json() for run in runs],
            "settings": {key: {"resume": kind, "values": [words(value, 10**6) for value in values]}
                         for key, kind, values in settings_rows(runs)},
            "results": dict(result_rows(runs))}
