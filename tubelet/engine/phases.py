"""Where this rank is and how its time was spent: one clock for the watchdog, the meter and the goodput report.

The main thread marks what it does with `with phases("data"):`; any thread may read. Nothing is sent, printed or synchronised
here: time that a GPU works on after the call returned shows where the main thread waits for it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal, get_args

PhaseName = Literal["start", "restore", "data", "compute", "save", "evaluate", "log", "wait"]
LONG = ("start", "restore", "save", "evaluate")
"""Phases with a time limit of their own. What is marked inside one (waiting for ranks while saving, reading while
evaluating) shows in `Phases.name`, but its time counts to the long phase: the goodput report asks what a save has cost."""


@dataclass(frozen=True)
class Standing:
    """Where a rank is at one moment. Times are in seconds."""

    step: int
    name: str
    """The innermost phase."""
    owner: str
    """The phase that the time counts to: the long phase around `name`, or `name` itself."""
    seconds: float
    """How long `name` has been running."""
    idle: float
    """Time since the last progress: a finished step, a batch of an evaluation, or a long phase that began or ended."""


class Phases:
    """The phase that this rank's main thread is in. A job begins in `start`, which ends when the first batch is asked for;
    whatever is marked by nothing counts to `compute` from then on."""

    NAMES: tuple[PhaseName, ...] = get_args(PhaseName)
    """`wait` = agreeing with other ranks over the control group (`dist.mark_waits`)."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self.clock = clock
        self.step = 0
        """The last finished step."""
        self.finished = 0
        """Steps finished by this process."""
        self.name = self.owner = "start"
        self.since = self.moved_at = self._counted_until = clock()
        self._seconds: dict[str, float] = dict.fromkeys(self.NAMES, 0.0)
        self._outer: list[tuple[str, str, float]] = []
        self._phases = {name: _Phase(self, name) for name in self.NAMES}

    def __call__(self, name: PhaseName) -> AbstractContextManager[None]:
        """A context manager for one of `NAMES`; entering and leaving it costs about a microsecond. Nested phases: the inner
        time is not counted to the outer phase, except inside a long one (`LONG`)."""
        return self._phases[name]

    def moved(self, step: int) -> None:
        """A step was finished: this is the progress that the watchdog looks for."""
        self.step = step
        self.finished += 1
        self.moved_at = self.clock()

    def progress(self) -> None:
        """A long phase has done a part of its work, such as a batch of an evaluation: it may take as long as that lasts."""
        self.moved_at = self.clock()

    def goes_on(self, step: int) -> None:
        """The job goes on from `step`, which another has finished; it has not done one itself, so it is still starting."""
        self.step, self.moved_at = step, self.clock()

    def seconds(self) -> dict[str, float]:
        """Seconds since the start by phase, the running one included; they add up to the time that has passed."""
        found = dict(self._seconds)
        found[self.owner] += self.clock() - self._counted_until
        return found

    def standing(self) -> Standing:
        """Where this rank is now. Made for other threads: each value is right, though two may be a moment apart."""
        now = self.clock()
        return Standing(self.step, self.name, self.owner, max(0.0, now - self.since), max(0.0, now - self.moved_at))


class _Phase:
    """One name's context manager, made once and entered often: this is run several times a step."""

    __slots__ = ("phases", "name", "long")

    def __init__(self, phases: Phases, name: str):
        self.phases, self.name, self.long = phases, name, name in LONG

    def __enter__(self) -> None:
        phases = self.phases
        now = phases.clock()
        phases._seconds[phases.owner] += now - phases._counted_until
        phases._counted_until = now
        if not phases._outer and phases.owner == "start" and self.name == "data":
            phases.name = phases.owner = "compute"
            phases.moved_at = now
        phases._outer.append((phases.name, phases.owner, phases.since))
        phases.name, phases.since = self.name, now
        if self.long:
            phases.owner, phases.moved_at = self.name, now
        elif phases.owner not in LONG:
            phases.owner = self.name

    def __exit__(self, *exc: object) -> None:
        phases = self.phases
        now = phases.clock()
        phases._seconds[phases.owner] += now - phases._counted_until
        phases._counted_until = now
        phases.name, phases.owner, since = phases._outer.pop()
        phases.since = since if phases._outer else now
        if self.long:
            phases.moved_at = now
