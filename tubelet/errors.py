"""How an error is worded, and who says it.

Every error meant for a user names the option or the thing, the rule, the values, and ends with "Try: ..." (the next
step). Our own mistakes are `assert`s and ordinary exceptions with a traceback; theirs are a `TubeletError`, printed
without one. Several problems that can be known together are reported together (`Problems`).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from tubelet.redact import redact

EXIT_ERROR = 1
EXIT_PREEMPTED = 85  # saved, restart me
EXIT_INTERRUPTED = 130  # Ctrl-C, as shells have it
EXIT_SUPERSEDED = 86  # a newer attempt owns this run folder
EXIT_LOST = 87  # a rank or the connection to it was lost, or a collective timed out: the run can be started again

BEGUN = "tubelet_run_begun"
"""Attribute of an error: the number of this start if it had claimed the run folder, whose logs are its own then; else 0."""
OWN = "tubelet_own_error"
"""Attribute of an error: True when one rank may have it alone, with no log to write it to yet."""


class TubeletError(Exception):
    """A problem a user can act on. `problem` says what, by which rule, with which values; `hint` what to do next."""

    exit_code = EXIT_ERROR

    def __init__(self, problem: str, hint: str = ""):
        self.problem = redact(problem.strip())  # URLs hold tokens, and errors are printed, logged and sent around
        self.hint = redact(hint.strip())
        super().__init__(self.problem, self.hint)  # both, so that the error survives pickling between ranks and workers

    def __str__(self) -> str:
        return f"{self.problem}\n  Try: {self.hint}" if self.hint else self.problem


class ConfigError(TubeletError):
    """Settings that cannot be, alone or together."""


class DataError(TubeletError):
    """Shards, indexes, samples or labels that are not what they should be."""


class CheckpointError(TubeletError):
    """A checkpoint that is damaged, foreign or unsuitable."""


class RunError(TubeletError):
    """A run folder that must not be used as asked."""


class SupersededError(RunError):
    """Another attempt has taken over this run folder: leave without writing."""

    exit_code = EXIT_SUPERSEDED


class LostError(TubeletError):
    """Another rank, or the connection to it, is gone or silent: the run itself is well, and can be started again."""

    exit_code = EXIT_LOST


class LateError(LostError):
    """A collective timed out: the rank that says so has waited longest for the one that is missing. It closes its
    connections, so that the others then hear of a lost rank and take this one for it."""


class DeviceError(LostError):
    """This rank's own device failed, by no fault of the program: what other ranks then say is its consequence."""


class Problems:
    """Collects problems so that they are raised once, together.

    >>> problems = Problems(ConfigError); problems.add("`a` is 3, must be even", "a=4"); problems.raise_if_any()
    """

    def __init__(self, kind: type[TubeletError] = TubeletError, title: str = ""):
        self.kind, self.title = kind, title
        self.items: list[TubeletError] = []

    def add(self, problem: str, hint: str = "") -> None:
        self.items.append(self.kind(problem, hint))

    def __bool__(self) -> bool:
        return bool(self.items)

    def raise_if_any(self) -> None:
        if not self.items:
            return
        if len(self.items) == 1:
            raise self.items[0]
        lines = [self.title or f"{len(self.items)} problems:"]
        for number, item in enumerate(self.items, 1):
            body = str(item).replace("\n", "\n    ")
            lines.append(f"  {number}. {body}")
        raise self.kind("\n".join(lines))


def nearest(name: str, known: Iterable[str], count: int = 1) -> list[str]:
    """The known names most like `name` (for "did you mean"), best first; empty when none is close."""
    known = list(known)
    found = difflib.get_close_matches(name, known, n=count, cutoff=0.6)
    if not found:  # a right leaf under a wrong parent is close too
        found = [k for k in known if k.rsplit(".", 1)[-1] == name.rsplit(".", 1)[-1]][:count]
    return found
