"""When the job ends, and when to leave so that everything is saved before.

The end is read once, at the start: a requeued job is a new start and reads a new one. Leaving is a saved stop with exit
code 85, as after a signal; for schedulers that send none, or too late for a large checkpoint.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Mapping
from datetime import datetime

from tubelet.engine.settings import EngineSettings

ASK_SECONDS = 10.0
"""How long the scheduler's commands may take."""


class Deadline:
    """The end of this job by the clock; `end` is in unix seconds, None when nothing says when (or to a rank that does not
    speak, where only the scheduler's commands know).

    `time_limit_minutes`, where it is set. Else what ends first: the scheduler's job (SLURM: its variable, else `scontrol`,
    else `squeue`, asked by the rank that speaks), or the time in the variable TUBELET_END_TIME (unix seconds or ISO time),
    which is that of a launcher's `--time`, also inside of an allocation, and of any other scheduler. Each rank may build one
    without the others; ranks agree on `due` in the loop. Errors of a scheduler's commands mean "unknown".
    """

    def __init__(self, settings: EngineSettings, env: Mapping[str, str] = os.environ, *, speaks: bool = True,
                 now: Callable[[], float] = time.time):
        self.margin = settings.time_limit_margin_seconds
        self._now = now
        self._asked = False
        self._short = ""
        self.end, self.source = _end(settings.time_limit_minutes, env, speaks, now())
        left = None if self.end is None else self.end - now()
        if left is not None and left <= 0:
            self._short = (f"{self.source} says that this job has ended at {_clock(self.end)}, which cannot be, so no time "
                           "limit is kept. Try: time_limit_minutes= of this job")
            self.end = None
        elif left is not None and left < 2 * self.margin:
            self.margin = left / 4
            self._short = (f"the job ends in {left:.0f} s ({self.source}): no room for `time_limit_margin_seconds` "
                           f"{settings.time_limit_margin_seconds:g}, {self.margin:.0f} s are kept. Try: a longer job, or a "
                           "smaller time_limit_margin_seconds")

    def due(self, save_seconds: float, step_seconds: float) -> bool:
        """Time to save and leave: the margin, one and a half of the longest save so far and two steps are left at most.

        Every job gets one step: the first question is answered with False, or a job shorter than a save would be
        restarted for ever without getting on.
        """
        first, self._asked = not self._asked, True
        if self.end is None or first:
            return False
        return self._now() >= self.end - self.margin - 1.5 * save_seconds - 2 * step_seconds

    @property
    def reason(self) -> str:
        """For the line that says why the run leaves."""
        return f"time limit: the job ends at {_clock(self.end)}" if self.end is not None else ""

    def notes(self, save_seconds: float = 0.0) -> list[str]:
        """What to say at the start: when the job ends and who says so, and a warning when that is too soon.
        `save_seconds` is what a save took before (0 = unknown)."""
        if self.end is None:
            return [f"warning: {self._short}"] if self._short else []
        lines = [f"{self.reason} ({self.source}); the run is saved and left with exit code 85 before that"]
        left = self.end - self._now()
        if self._short:
            lines.append(f"warning: {self._short}")
        elif left < self.margin + 1.5 * save_seconds:
            lines.append(f"warning: the job ends in {left:.0f} s, a save takes {save_seconds:.0f} s and "
                         f"`time_limit_margin_seconds` is {self.margin:g}: hardly a step will be trained. Try: a longer "
                         "job, or a smaller time_limit_margin_seconds")
        return lines


def _end(minutes: float | None, env: Mapping[str, str], speaks: bool, now: float) -> tuple[float | None, str]:
    if minutes is not None:
        began = _number(env.get("SLURM_JOB_START_TIME"), now) or _process_started(now)
        return began + 60 * minutes, "time_limit_minutes"
    own = env.get("TUBELET_END_TIME", "")
    ends = [_end_of_slurm(env, speaks, now), (_number(own, None) or _parse(own), "TUBELET_END_TIME")]
    known = [(end, source) for end, source in ends if end is not None]
    ahead = [(end, source) for end, source in known if end > now]  # the others are left over from something else
    return min(ahead or known, default=(None, "TUBELET_END_TIME"))


def _end_of_slurm(env: Mapping[str, str], speaks: bool, now: float) -> tuple[float | None, str]:
    job = env.get("SLURM_JOB_ID", "")
    given = _number(env.get("SLURM_JOB_END_TIME"), None) if job else None
    if given and given > now:  # a shell that outlived its job keeps the old one
        return given, "SLURM_JOB_END_TIME"
    return (_ask_slurm(job, env) if job and speaks else None) or (None, "")


def _ask_slurm(job: str, env: Mapping[str, str]) -> tuple[float, str] | None:
    """One question to the controller. It is busy on large clusters, so one rank asks, once."""
    if env.get("SLURM_ARRAY_JOB_ID"):  # one task has the number of the whole array, which would be answered for all of them
        job = f"{env['SLURM_ARRAY_JOB_ID']}_{env.get('SLURM_ARRAY_TASK_ID', '')}"
    for command in (["scontrol", "show", "job", "-o", job], ["squeue", "-h", "-j", job, "-o", "%e"]):
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=ASK_SECONDS, env=dict(env))
        except (OSError, subprocess.SubprocessError):
            continue
        words = [word.removeprefix("EndTime=") for word in done.stdout.split()
                 if command[0] == "squeue" or word.startswith("EndTime=")]
        end = _parse(words[0]) if words and done.returncode == 0 else None
        if end:
            return end, command[0]
    return None


def _parse(text: str) -> float | None:
    """Unix seconds of an ISO time (local when it names no zone); None for "Unknown", "N/A", "NONE" or nothing."""
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        return None


def _number(text: str | None, latest: float | None) -> float | None:
    """Unix seconds, when it is a plain number in this century and not after `latest`."""
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if 1e9 < value < (4e9 if latest is None else latest + 1) else None


def _process_started(now: float) -> float:
    """When this process began, which under a slow import of torch is long before this line."""
    try:
        with open("/proc/self/stat") as file:
            ticks = int(file.read().rpartition(")")[2].split()[19])
        with open("/proc/uptime") as file:
            age = float(file.read().split()[0]) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return now
    return now - age if 0 <= age < 600 else now  # older: the trainer runs in somebody's long-lived process


def _clock(end: float | None) -> str:
    """The wall clock here, with the date when it is another day's."""
    if end is None:
        return "?"
    when = datetime.fromtimestamp(end)
    return when.strftime("%H:%M" if when.date() == datetime.now().date() else "%Y-%m-%d %H:%M")
