"""What the time of a run was spent on, over all its starts: the goodput report.

Each start keeps `attempts/goodput-NNNN.json` (rank 0's clock by phase, the steps it did); the report reads all of them with
the records of their beginning and end. Its kinds of time, which add up to the whole:

    data           waiting for samples
    compute        forward, backward and update, without
    communication  collectives that no computation hides (`Profiler.communication_share`), and agreeing with other ranks
    checkpoint     what a save keeps the loop from its work
    evaluation
    restart        start-up, restoring, the time in which a scheduler's job was down, and whatever was done for steps that
                   were done again
    other          logging, and what nothing was marked for

Goodput is the compute phase (with the communication inside it) of the steps that still count, of all the time. A run that is
started again by hand was nobody's job in between: that time is not counted.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from tubelet.console import print_table
from tubelet.runs import Attempt, Run

KINDS: tuple[str, ...] = ("data", "compute", "communication", "checkpoint", "evaluation", "restart", "other")
_STEPPING = ("data", "compute", "communication", "other")
"""Kinds that a step done for nothing has cost too."""


class Clock(Protocol):
    """What is read of `phases.Phases`."""

    def seconds(self) -> dict[str, float]: ...


@dataclass
class Record:
    """One start as the report sees it. Times in seconds since 1970."""

    number: int
    started: float
    ended: float
    """When it ended, or was last heard of."""
    job: str = ""
    seconds: dict[str, float] = field(default_factory=dict)
    """Seconds by phase."""
    first_step: int = 0
    last_step: int = 0
    redone_steps: int = 0
    """Steps that this start has gone back over itself (after a spike or a series of skipped updates)."""
    communication: float = 0.0
    """Exposed communication's share of the compute phase."""

    @property
    def steps(self) -> int:
        """Steps done, the ones gone back over too."""
        return max(self.last_step - self.first_step, 0) + self.redone_steps


@dataclass(frozen=True)
class Report:
    """Seconds by kind over all starts."""

    seconds: dict[str, float]
    productive: float
    """Seconds of the compute phase for steps that still count."""
    attempts: int
    steps: int
    """Steps that count."""
    redone_steps: int
    """Steps that were done and do not count: lost with a killed job, or gone back over."""

    @property
    def total(self) -> float:
        return sum(self.seconds.values())

    @property
    def goodput(self) -> float:
        """0..1."""
        return self.productive / self.total if self.total else 0.0

    def shares(self) -> dict[str, float]:
        """Per cent by kind; they add up to 100 (all 0 before any time has passed)."""
        return {kind: 100 * self.seconds[kind] / self.total if self.total else 0.0 for kind in KINDS}

    def scalars(self) -> dict[str, float]:
        """`goodput/<kind>_pct` and `goodput/goodput_pct`."""
        return {**{f"goodput/{kind}_pct": share for kind, share in self.shares().items()},
                "goodput/goodput_pct": 100 * self.goodput}

    def rows(self) -> list[tuple[str, str, str]]:
        """(kind, share, time) as text, the goodput last."""
        from tubelet.engine.console import duration

        shares = self.shares()
        rows = [(kind, f"{shares[kind]:.1f} %", duration(self.seconds[kind])) for kind in KINDS]
        return [*rows, ("goodput", f"{100 * self.goodput:.1f} %", duration(self.productive))]

    def show(self) -> None:
        """Print the table; rank 0, at the end of a job."""
        print_table(self.title(), ("", "share", "time"), self.rows())

    def title(self) -> str:
        """What the table is of."""
        from tubelet.engine.console import duration

        again = f", {self.redone_steps} of them again" if self.redone_steps else ""
        return (f"Goodput: {duration(self.total)} in {self.attempts} start{'s' * (self.attempts != 1)}, "
                f"{self.steps + self.redone_steps} steps{again}")


class Goodput:
    """Keeps this start's record; rank 0 only (on other ranks every call does nothing). `phases` is the job's `Phases`.

    `first_step` is the step that this start goes on from. `communication` tells the exposed communication's share of the
    compute phase (0..1), None while unknown."""

    def __init__(self, run: Run, phases: Clock, *, first_step: int = 0, enabled: bool = True,
                 communication: Callable[[], float | None] = lambda: None):
        self.run, self.phases, self.communication = run, phases, communication
        self.first_step, self.redone_steps = first_step, 0
        self.enabled = enabled and run.attempt is not None
        self.process_started = process_started(os.getpid())
        self.written = -float("inf")
        self.write(first_step)

    def rewind(self, step: int, to: int) -> None:
        """The run went back from `step` to `to`: what lies between is done again."""
        self.redone_steps += step - to

    def write(self, step: int, redone_steps: int = 0, *, least_seconds: float = 0.0) -> None:
        """Write the record as of `step`; `redone_steps` as `rewind` counts them. With `least_seconds` a record that is not
        older than this is left: so it may be called at every log step. What happens after the last record of a job that is
        killed is known to the report by the next start only."""
        if not self.enabled or time.monotonic() - self.written < least_seconds:
            return
        assert self.run.attempt is not None
        self.written = time.monotonic()
        self.redone_steps += redone_steps
        record = {"time": time.time(), "process_started": self.process_started, "first_step": self.first_step,
                  "step": step, "redone_steps": self.redone_steps, "seconds": self.phases.seconds(),
                  "communication_share": self.communication()}
        path = _path(self.run, self.run.attempt)
        temporary = path.with_name(f"{path.name}.tmp")
        try:  # not fsynced: it is written often, and a report that misses a minute is no harm
            temporary.write_text(json.dumps(record))
            os.replace(temporary, path)
        except OSError as error:
            print(f"warning: {path}: {error}; the goodput report will miss this time", flush=True)
            self.enabled = False  # said once

    def report(self) -> Report:
        """The report over all starts so far. Reads a small file for each."""
        return report(records(self.run))


def _path(run: Run, attempt: Attempt) -> Path:
    return run.folder / "attempts" / f"goodput-{attempt.number:04d}.json"  # not NNNN.*.json, which are starts


def process_started(pid: int) -> float | None:
    """When a process started, in seconds since 1970 (to 10 ms); None where /proc does not tell."""
    try:
        ticks = int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[19])
        uptime = float(Path("/proc/uptime").read_text().split()[0])
        return time.time() - uptime + ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return None


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def records(run: Run) -> list[Record]:
    """One record a start, oldest first. A start that was killed before its first record has no seconds and no steps."""
    found = []
    step = 0
    for attempt in run.attempts():
        kept = _read(_path(run, attempt))
        ended = _read(run.folder / "attempts" / f"{attempt.number:04d}.end.json")
        started = min(attempt.time, kept.get("process_started") or attempt.time)
        first = kept.get("first_step", step)  # nothing known: it has not moved
        step = kept.get("step", first)
        found.append(Record(attempt.number, started, max(ended.get("time", 0.0), kept.get("time", 0.0), attempt.time),
                            attempt.job, kept.get("seconds", {}), first, step, kept.get("redone_steps", 0),
                            kept.get("communication_share") or 0.0))
    return found


def report(starts: Sequence[Record]) -> Report:
    """The report of these starts, oldest first."""
    seconds = dict.fromkeys(KINDS, 0.0)
    productive, kept_steps, lost_steps = 0.0, 0, 0
    reached = float("inf")  # the lowest step that a later start went on from
    following: Record | None = None
    for start in reversed(starts):
        kept = max(0, min(start.last_step, int(min(reached, 2**62))) - start.first_step)
        lost = start.steps - kept
        spent = _spent(start)
        useful = kept / start.steps if start.steps else 1.0
        productive += useful * start.seconds.get("compute", 0.0)
        for kind in KINDS:
            fraction = useful if kind in _STEPPING else 1.0
            seconds[kind] += spent[kind] * fraction
            seconds["restart"] += spent[kind] * (1 - fraction)
        if following is not None and start.job and start.job == following.job:
            seconds["restart"] += max(0.0, following.started - start.ended)
        kept_steps, lost_steps = kept_steps + kept, lost_steps + lost
        reached, following = min(reached, start.first_step), start
    return Report(seconds, productive, len(starts), kept_steps, lost_steps)


def _spent(start: Record) -> dict[str, float]:
    """Seconds of one start by kind, as if every step counted; they add up to its length."""
    phase = {name: start.seconds.get(name, 0.0) for name in
             ("start", "restore", "data", "compute", "save", "evaluate", "log", "wait")}
    length = max(start.ended - start.started, sum(phase.values()))
    unmarked = length - sum(phase.values())
    hidden = phase["compute"] * min(max(start.communication, 0.0), 1.0)
    spent = {"data": phase["data"], "compute": phase["compute"] - hidden, "communication": hidden + phase["wait"],
             "checkpoint": phase["save"], "evaluation": phase["evaluate"], "restart": phase["start"] + phase["restore"],
             "other": phase["log"]}
    # Before the clock began a process imports and joins the others; what came after the last record, or left none, was lost.
    spent["restart"] += unmarked
    return spent
