"""How a run stands: its state, how far it is, its last checkpoint, its restarts. One `Standing` a run folder."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tubelet import first_error
from tubelet.engine.goodput import Report, records, report
from tubelet.errors import EXIT_INTERRUPTED, EXIT_PREEMPTED, EXIT_SUPERSEDED, RunError, nearest
from tubelet.files import read_jsonl
from tubelet.program.runs import again, reading
from tubelet.program.runs.reading import Checkpoint, Row
from tubelet.redact import redact
from tubelet.runs import Attempt, Run, RunSettings, alive

STATES = {
    "queued": "handed to a scheduler or to be started again by its launcher, and not yet started",
    "running": "its process lives on this host",
    "running?": "on another host, and its files changed lately",
    "saved": "saved and left with exit code 85, and nobody has put down that it is started again",
    "stopped": "could go on from its checkpoint, but its launcher does not start it again",
    "finished": "reached its last step",
    "failed": "ended with an error",
    "interrupted": "saved and left after Ctrl-C",
    "superseded": "a newer start owned the folder",
    "lost": "no record of its end, and its process is gone",
    "lost?": "on another host, no record of its end, and its files have not changed for long",
    "no access": "its files may not be read",
    "damaged": "its files make no sense",
}
"""State -> what it means."""
SILENT_SECONDS = 600.0
"""A run on another host whose files have not changed for so long (or for five times its longest pause between two log
lines) is taken for lost. Only a guess: its clock may be another one, and it may be evaluating."""
SETTINGS = ("total_steps", "epochs", "global_batch_size", "checkpoint")


@dataclass
class Standing:
    """What one row of `tubelet runs` is made of."""

    name: str
    folder: Path
    state: str
    note: str = ""
    """Why it is in this state, or where it runs."""
    host: str = ""
    job: str = ""
    attempts: int = 0
    started: float = 0.0
    """When its newest start began, or it was submitted; seconds since 1970, as all times here."""
    last_sign: float = 0.0
    """When one of its files changed."""
    step: int | None = None
    total_steps: int | None = None
    loss: float | None = None
    rate: float | None = None
    """Samples a second at the last log line."""
    unit: str = "images"
    seconds_left: float | None = None
    """At the speed of the last log lines, without evaluations and saves; None unless it runs."""
    checkpoint: Checkpoint | None = None
    place: str = ""
    """Where its checkpoints lie when that is not its folder."""
    without_progress: int = 0
    """Restarts after a start that left no new checkpoint."""
    goodput: float | None = None
    """0..1."""
    report: Report | None = field(default=None, repr=False)

    @property
    def restarts(self) -> int:
        """Starts after the first."""
        return max(self.attempts - 1, 0)

    def to_json(self) -> Row:
        """Plain values; what is not known or not finite is null."""
        row: Row = {key: value for key, value in vars(self).items() if key not in ("checkpoint", "report", "attempts")}
        row |= {"folder": str(self.folder), "restarts": self.restarts, "checkpoint": None}
        if self.checkpoint:
            row["checkpoint"] = {key: getattr(self.checkpoint, key) for key in ("name", "step", "time", "bytes", "problem")}
        return {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()}


@dataclass(frozen=True)
class End:
    """How a start ended or stands."""

    state: str
    note: str = ""
    time: float | None = None
    step: int | None = None
    code: int | None = None


# -------------------------------------------------------------------------------------------------------- finding


def find_run(named: str, home: str = "runs") -> Path:
    """The folder of the run that somebody names: a path, or the name of a run in `runs/`. Raises `RunError`."""
    for folder in (Path(named), Path(home, named)):
        if is_run(folder):
            return folder
    above = Path(named).parent if os.sep in named.rstrip(os.sep) else Path(home)
    others = [folder.name for folder in run_folders(above)] if above.is_dir() else []
    close = nearest(Path(named).name, others, 3)
    inside = f"{len(run_folders(Path(named)))} runs in it" if Path(named).is_dir() and run_folders(Path(named)) else ""
    what = f"{named} is no run" + (f", but a folder with {inside}" if inside else
                                   ": there is no such folder" if not Path(named).exists() else
                                   ": it has neither attempts/ nor launch/submitted.json")
    raise RunError(f"{what}.", f"`tubelet runs {named}`" if inside else " or ".join(str(above / name) for name in close)
                   or "runs/NAME; `tubelet runs DIR` lists the runs of a folder")


def is_run(folder: Path) -> bool:
    """Whether it was started or submitted. Raises `RunError` when that may not be known."""
    try:
        return (folder / "attempts").is_dir() or (folder / "launch" / "submitted.json").is_file()
    except PermissionError:
        raise RunError(f"{folder} may not be read by this user.", "its owner, or `chmod -R g+rX` by them") from None


def run_folders(above: Path) -> list[Path]:
    """The run folders in a folder, and those in it that may not be read; by name."""
    found = []
    for entry in os.scandir(above):
        with contextlib.suppress(RunError):
            if not entry.is_dir() or not is_run(Path(entry.path)):
                continue
        if entry.is_dir():
            found.append(Path(entry.path))
    return sorted(found)


def open_run(folder: Path) -> Run:
    """A `Run` of a folder whatever its name, for methods that only read."""
    folder = Path(os.path.abspath(folder))
    return Run(RunSettings.model_construct(name=folder.name, dir=str(folder.parent)))


# --------------------------------------------------------------------------------------------------------- states


def end_of(run: Run, attempt: Attempt, *, last: bool = False, silent: float = 0.0, patience: float = SILENT_SECONDS) -> End:
    """How a start ended; of the `last` one without a record whether it runs: on another host by how long its files are
    `silent`, in seconds."""
    path = run.folder / "attempts" / f"{attempt.number:04d}.end.json"
    record = reading.read_json(path)
    if record:
        code, how = record.get("code"), str(record.get("how", "ended"))
        state = {EXIT_INTERRUPTED: "interrupted", EXIT_SUPERSEDED: "superseded"}.get(code, how)  # type: ignore[arg-type]
        if code == EXIT_PREEMPTED:
            state = "saved" if last else "preempted"
        note = reading.first_line(redact(record["error"])) if record.get("error") else ""
        return End(state, note, reading.number(record, "time"), reading.whole(record.get("step")), code)
    if path.exists():
        return End("lost" if last else "killed", "the record of its end is damaged")
    lives = alive(attempt) if last else False
    error = None if lives else first_error.read(run.folder, attempt.number)
    if isinstance(error, dict):  # it could tell its end no more, as when a rank is lost
        note = f"rank {error.get('rank')} on {error.get('host')}: {error.get('error', '').removeprefix('error: ')}"
        return End("failed", reading.first_line(redact(note)), reading.number(error, "time"), code=error.get("code"))
    if not last:
        return End("killed", "left no word")
    if lives is not None:
        return End("running", f"pid {attempt.pid}") if lives else End("lost", f"process {attempt.pid} is gone")
    note = f"host {attempt.host}, last sign {reading.ago(silent)} ago"
    return End("running?" if silent < patience else "lost?", note)


def standing(folder: Path, now: float | None = None) -> Standing:
    """How a run stands. A folder that cannot be read has a state that says so; nothing is raised."""
    now = time.time() if now is None else now
    try:
        return _standing(folder, now)
    except PermissionError as error:
        return Standing(folder.name, folder, "no access", f"{error.filename or folder} may not be read")
    except Exception as error:  # one strange folder must not hide the others
        return Standing(folder.name, folder, "damaged", reading.first_line(f"{type(error).__name__}: {error}"))


def _standing(folder: Path, now: float) -> Standing:
    run = open_run(folder)
    if (folder / "attempts").is_dir():
        os.listdir(folder / "attempts")  # glob, which `attempts` uses, takes a folder that may not be read for empty
    attempts = run.attempts()
    settings = reading.some_settings(folder / "config.yaml", SETTINGS)
    rows = reading.read_tail(folder / "metrics.jsonl", _has_two_log_lines).rows
    found, over = Standing(folder.name, folder, "queued", attempts=len(attempts)), 0.0
    _progress(found, rows, settings)
    _checkpoint(found, settings)
    if attempts:
        last = attempts[-1]
        found.started, found.host, found.job = last.time, last.host, last.job
        found.last_sign = last_sign(folder, last.number)
        found.report = read_report(run)
        found.goodput = found.report.goodput if found.report and found.report.total else None
        found.without_progress = without_progress(run, attempts, found.checkpoint)
        ended = end_of(run, last, last=True, silent=max(now - found.last_sign, 0.0), patience=_patience(rows))
        found.state, found.note = ended.state, ended.note
        over = ended.time or found.last_sign
        if ended.step is not None and ended.state == "finished":
            found.step = ended.step
    _next(found, attempts[-1].number if attempts else 0, over, now)
    if found.state in ("running", "running?") and found.step is not None and found.total_steps:
        speed = _step_seconds(rows)
        found.seconds_left = max(found.total_steps - found.step, 0) * speed if speed else None
    return found


def _has_two_log_lines(rows: list[Row]) -> bool:
    return len(log_lines(rows)) > 1


def log_lines(rows: list[Row]) -> list[Row]:
    """The rows of training that are whole."""
    return [row for row in rows
            if reading.whole(row.get("step")) is not None and reading.number(row, "train/loss") is not None]


def _progress(found: Standing, rows: list[Row], settings: Row) -> None:
    lines = log_lines(rows)
    found.total_steps = total_steps(settings, lines)
    if not lines:
        return
    last = lines[-1]
    found.step = reading.whole(last.get("step"))
    found.loss, found.rate = reading.number(last, "train/loss"), reading.number(last, "perf/samples_per_sec")


def total_steps(settings: Row, lines: list[Row]) -> int | None:
    """The last step of a run: as its settings say, or from `epochs` and how far in the data its log lines are."""
    given, epochs, batch = (settings.get(key) for key in ("total_steps", "epochs", "global_batch_size"))
    if isinstance(given, int):
        return given
    seen, done = (reading.number(lines[-1], name) for name in ("samples_seen", "train/epoch")) if lines else (None, None)
    if isinstance(epochs, (int, float)) and isinstance(batch, int) and batch and seen and done:
        return max(1, round(epochs * round(seen / done) / batch))
    return None


def _checkpoint(found: Standing, settings: Row) -> None:
    place = reading.checkpoint_place(found.folder, settings)
    found.place = "" if place == found.folder else str(place)
    if isinstance(place, str):
        found.checkpoint = reading.told_checkpoint(found.folder)
        return
    published, _ = reading.step_folders(place)
    found.checkpoint = reading.read_checkpoint(published[-1]) if published else None
    manifest = found.checkpoint.manifest if found.checkpoint else {}
    found.total_steps = found.total_steps or reading.whole(manifest.get("total_steps"))
    with contextlib.suppress(KeyError, TypeError):
        found.unit = "clips" if manifest["config"]["data"]["clip"]["frames"] > 1 else "images"


def last_sign(folder: Path, number: int) -> float:
    """When the files that a running job writes changed last, in seconds since 1970."""
    found = 0.0
    for name in ("metrics.jsonl", "events.jsonl", f"attempts/{number:04d}.json", f"attempts/goodput-{number:04d}.json"):
        with contextlib.suppress(OSError):
            found = max(found, os.stat(folder / name).st_mtime)
    return found


def _patience(rows: list[Row]) -> float:
    times = [moment for moment in map(reading.time_of, rows) if moment]
    return max([SILENT_SECONDS, *(5 * min(b - a, 3600) for a, b in zip(times, times[1:]))])


def _step_seconds(rows: list[Row]) -> float | None:
    found = [value for value in (reading.number(row, "perf/step_time") for row in rows) if value]
    return statistics.median(found) if found else None


def _next(found: Standing, number: int, over: float, now: float) -> None:
    """What follows the newest start, `number`, which ended at `over`: a launcher has handed the run to a scheduler (again),
    or has put down whether it starts it again. A name that Kubernetes was given once more is a new job after that."""
    submitted = reading.read_json(found.folder / "launch" / "submitted.json")
    row = again.decision(found.folder, number, found.started, found.job, found.state)
    job, at = str(submitted.get("job", "")), reading.number(submitted, "time") or 0.0
    before = max(over if job and job == found.job else found.started, reading.number(row, "time") or 0.0)
    if found.state == "running" or (found.state == "running?" and not row):
        return
    if submitted and (at > before or not (found.attempts or row)):
        found.state, found.job, found.started = "queued", job, at
        found.note = " ".join(filter(None, [job, f"submitted {reading.ago(now - at)} ago" if at else ""]))
    elif row:
        found.state, found.note = again.decided(row, submitted, found.state, found.note, now)
        found.job = str(row.get("job") or found.job)
    elif found.state == "saved":
        found.note = again.undecided(found.job, submitted, now - over)


def read_report(run: Run) -> Report | None:
    """The goodput of all starts; None when they kept no record, or a damaged one."""
    try:
        starts = records(run)
        return report(starts) if any(start.seconds for start in starts) else None
    except (TypeError, ValueError, AttributeError):
        return None


def without_progress(run: Run, attempts: list[Attempt], checkpoint: Checkpoint | None) -> int:
    """How many restarts followed a start that left no checkpoint newer than the one it began from."""
    begun = []
    for attempt in attempts:
        kept = reading.read_json(run.folder / "attempts" / f"goodput-{attempt.number:04d}.json")
        begun.append(reading.whole(kept.get("first_step")))  # None: it never got as far as training
    if not any(first is not None for first in begun):
        return 0  # nobody kept a record
    reached, count = checkpoint.step if checkpoint else 0, 0
    for number in range(len(attempts) - 1, -1, -1):
        first = begun[number]
        if number < len(attempts) - 1 and (first is None or reached <= first):
            count += 1
        reached = first if first is not None else reached
    return count


def read_events(folder: Path) -> list[Row]:
    """All events of a run, oldest first."""
    return read_jsonl(folder / "events.jsonl")


def as_json(value: Any) -> str:
    """JSON that every reader takes: NaN and infinities are null."""
    return json.dumps(_finite(value), indent=1, default=str)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def replaced(name: str) -> bool:
    """Whether a folder is what `run.overwrite=true` kept of an older run."""
    return bool(re.search(r"\.replaced-\d+$", name))
