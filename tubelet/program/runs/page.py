"""One run on a page: `tubelet runs show RUN`."""

from __future__ import annotations

import shlex
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tubelet.console import print_table
from tubelet.engine.console import duration
from tubelet.engine.curves import Curves, read_curves
from tubelet.files import human_bytes
from tubelet.program.runs import reading
from tubelet.program.runs.chosen import chosen, words
from tubelet.program.runs.reading import Row, ago, clock, shown
from tubelet.program.runs.standing import End, Standing, end_of, open_run, read_events, standing
from tubelet.program.runs.told import HISTORY, event_words
from tubelet.redact import redact, redacted
from tubelet.runs import Attempt

SLOW_DATA = 20.0
"""Per cent of a step spent waiting for data from which on it is worth a warning."""


@dataclass
class Page:
    """Everything that `show` prints."""

    run: Standing
    attempts: list[tuple[Attempt, End]]
    settings: list[tuple[str, Any, Any]]
    events: list[Row]
    checkpoints: list[reading.Checkpoint]
    unfinished: list[str]
    best: Row
    curves: Curves
    last: Row
    """The newest log line."""
    dirty: bool
    """Whether the newest start ran code that was not committed."""

    def warnings(self) -> list[str]:
        """What somebody should look at, in sentences."""
        run, counts = self.run, Counter(str(row.get("event")) for row in self.events)
        found = []
        killed = sum(end.state in ("killed", "lost") for _, end in self.attempts)
        if killed:
            found.append(f"{killed} start(s) left no record of their end: killed (memory, a node, SIGKILL)")
        if run.without_progress:
            found.append(f"{run.without_progress} restart(s) followed a start that had saved nothing new")
        found += [f"checkpoint {item.name}: {item.problem}" for item in self.checkpoints if item.problem]
        if self.unfinished and run.state not in ("running", "running?"):
            found.append(f"saves that never finished: {', '.join(self.unfinished)}")
        found += [f"{counts[kind]} {text}" for kind, text in (
            ("skipped", "update(s) skipped because a loss or gradient was not finite"), ("rollback", "rollback(s)"),
            ("stall", "stall(s): see logs/stacks-rank-*.txt"), ("straggler", "time(s) a rank was slow"),
            ("code_changed", "time(s) the code changed between starts")) if counts[kind]]
        wait, bad = reading.number(self.last, "perf/data_wait_pct"), reading.number(self.last, "data/bad_samples")
        if wait is not None and wait > SLOW_DATA:
            found.append(f"{wait:.0f} % of a step waits for data: `tubelet data bench` says where the time goes")
        if bad:
            found.append(f"{bad:.0f} sample(s) could not be read: see ledger-rank-*.jsonl")
        if self.dirty:
            found.append(f"the newest start ran uncommitted changes: attempts/{run.attempts:04d}.diff")
        return found


def read_page(folder: Path) -> Page:
    """Read everything about a run. Raises `PermissionError` when its files may not be read."""
    run, now = open_run(folder), time.time()
    found = standing(folder, now)
    config = reading.all_settings(folder / "config.yaml")
    attempts = run.attempts()
    ends = [(attempt, end_of(run, attempt)) for attempt in attempts]
    if attempts and (found.state in ("running", "running?") or found.state in ("lost", "lost?") and not ends[-1][1].time):
        ends[-1] = (attempts[-1], End(found.state, found.note, step=found.step))  # its files tell whether it lives
    place = reading.checkpoint_place(folder, config)
    published, unfinished = reading.step_folders(place) if isinstance(place, Path) else ([], [])
    checkpoints = [reading.read_checkpoint(path) for path in published] or [item for item in [found.checkpoint] if item]
    curves = read_curves(folder / "metrics.jsonl")
    return Page(found, ends, chosen(config) if config else [], read_events(folder), checkpoints,
                [path.name for path in unfinished], reading.read_json(Path(place) / "best.json") if published else {},
                curves, curves.rows[-1] if curves.rows else {},
                bool(attempts) and (folder / "attempts" / f"{attempts[-1].number:04d}.diff").exists())


def to_json(page: Page) -> Row:
    """The page as plain values."""
    return redacted({
        **page.run.to_json(), "warnings": page.warnings(),
        "settings": {key: value for key, value, _ in page.settings},
        "attempts": [{**vars(attempt), "end": vars(end)} for attempt, end in page.attempts],
        "events": page.events,
        "checkpoints": [{"name": item.name, "step": item.step, "time": item.time, "bytes": item.bytes,
                         "problem": item.problem} for item in page.checkpoints],
        "unfinished": page.unfinished, "best": page.best or None,
        "results": {name: {"step": points[-1][0], "latest": points[-1][1], "best": best_of(name, points)[1]}
                    for name, points in page.curves.evaluation.items()},
        "goodput_shares": page.run.report.shares() if page.run.report else None})


def show(page: Page, everything: bool = False) -> None:
    """Print the page; `everything`: all settings that were set, all starts and events instead of the newest."""
    most = 10**9 if everything else 12
    _head(page)
    _table("Settings that are not the default", ("setting", "value", "default"),
           [(key, words(value), words(default)) for key, value, default in page.settings], 10**9)
    _table("Starts", ("start", "when", "length", "host", "job", "processes", "commit", "end"),
           [_attempt(attempt, end) for attempt, end in page.attempts], most)
    _table("Checkpoints", ("checkpoint", "when", "size", "is"), _checkpoints(page), most)
    _table("Evaluation", ("metric", "latest", "at step", "best", "at step"), _results(page.curves), 10**9)
    news = [row for row in page.events if everything or row.get("event") not in HISTORY]
    _table("Events" if everything else "What happened", ("when", "what"),
           [(clock(reading.time_of(row)), redact(event_words(row))) for row in news], most)
    if page.run.report:
        print_table(f"\n{page.run.report.title()}", ("", "share", "time"), page.run.report.rows())
    for number, text in enumerate(page.warnings()):
        print("" if number else "\nWarnings\n", end="")
        print(f"  {text}")


def _head(page: Page) -> None:
    run, now = page.run, time.time()
    total = f" of {run.total_steps} ({100 * (run.step or 0) / run.total_steps:.1f} %)" if run.total_steps else ""
    note = f": {run.note}" if run.note else ""
    rows = [("state", f"{run.state}{note}")]
    if run.attempts:
        speed = f", {run.rate:.1f} {run.unit}/s" if run.rate is not None else ""
        loss = f", loss {shown(run.loss)}" if run.loss is not None else ""
        rows.append(("step", f"{run.step if run.step is not None else 0}{total}{loss}{speed}"))
    if run.seconds_left is not None:
        rows.append(("left", f"{duration(run.seconds_left)} without evaluations and saves"))
    if run.last_sign:
        rows.append(("last sign", f"{ago(now - run.last_sign)} ago"))
    if page.attempts:
        attempt = page.attempts[-1][0]
        command = attempt.command
        if command and command[0].endswith("__main__.py"):
            command = ["python", "-m", Path(command[0]).parent.name, *command[1:]]
        rows += [("command", redact(shlex.join(command))),
                 ("where", f"host {attempt.host}, {attempt.world_size} process{'es' * (attempt.world_size != 1)}, user "
                           f"{attempt.user}" + (f", job {attempt.job}" if attempt.job else "")),
                 ("code", f"commit {attempt.commit or '?'}" + (", with uncommitted changes" if page.dirty else ""))]
    elif run.job:
        rows.append(("job", run.job))
    versions = page.checkpoints[-1].manifest.get("versions") if page.checkpoints else None
    if isinstance(versions, dict):
        rows.append(("versions", ", ".join(f"{name} {version}" for name, version in versions.items())))
    print_table(str(run.folder), ("", ""), rows)


def _table(title: str, columns: Sequence[str], rows: list[tuple[str, ...]], most: int) -> None:
    """A table of the newest rows without empty columns; nothing for no rows."""
    if not rows:
        return
    if len(rows) > most:
        title, rows = f"{title} (the last {most} of {len(rows)}; --all shows all)", rows[-most:]
    kept = [number for number in range(len(columns)) if any(row[number] for row in rows)]
    print_table(f"\n{title}", [columns[number] for number in kept], [[row[number] for number in kept] for row in rows])


def _attempt(attempt: Attempt, end: End) -> tuple[str, ...]:
    length = duration(max(end.time - attempt.time, 0)) if end.time else ""
    step = f" at step {end.step}" if end.step is not None else ""
    code = f" (exit code {end.code})" if end.code is not None else ""
    note = f": {end.note}" if end.note else ""
    return (f"{attempt.number}", clock(attempt.time), length, attempt.host, attempt.job, f"{attempt.world_size}",
            attempt.commit[:10], redact(f"{end.state}{step}{code}{note}"))


def _checkpoints(page: Page) -> list[tuple[str, ...]]:
    rows = []
    for item in page.checkpoints:
        said = [item.problem or ("published; its files have their sizes" if item.bytes else f"in {page.run.place}")]
        if page.best.get("folder") == item.name:
            said.append(f"the best: {page.best.get('metric')} {shown(reading.number(page.best, 'value'))}")
        rows.append((item.name, clock(item.time), human_bytes(item.bytes) if item.bytes else "", "; ".join(said)))
    doing = "being written, or never finished" if page.run.state in ("running", "running?") else "never finished"
    return rows + [(name, "", "", doing) for name in page.unfinished]


def _results(curves: Curves) -> list[tuple[str, ...]]:
    rows = []
    for name, points in curves.evaluation.items():
        step, value = best_of(name, points)
        rows.append((name, shown(points[-1][1]), f"{points[-1][0]}", shown(value), f"{step}"))
    return rows


def best_of(name: str, points: Sequence[tuple[int, float]]) -> tuple[int, float]:
    """(step, value) of the best evaluation: the smallest of a loss or of bad samples, the largest of anything else."""
    leaf = name.rsplit("/", 1)[-1]
    least = "loss" in leaf or "bad" in leaf
    return min(points, key=lambda point: point[1] if least else -point[1])
