"""Launchers that wait for the job start it again by themselves: under one job's name, as often as `restart.*` allows."""

from __future__ import annotations

import math
import os
import socket
import time

from launch.request import Request
from launch.restarts import code_that_counts, decide, newest_attempt
from tubelet import first_error
from tubelet.runs import scheduler_job

END = "TUBELET_END_TIME"
"""Environment variable: when the job must have left, in seconds since 1970; it saves and leaves in time."""


class Restarts:
    """The starts of one job: what each gets in its environment, and whether there is another."""

    def __init__(self, request: Request):
        self.request = request
        own = f"{request.launcher}-{socket.gethostname()}-{os.getpid()}-{time.time():.0f}"
        self.job = scheduler_job(os.environ)[0] or own
        """What all starts have in common, so that each may follow the one before; the scheduler's job when we run in one."""
        self.count = self.code = 0
        seconds = request.settings.seconds
        self.end = {} if seconds is None else {END: f"{time.time() + seconds:.0f}"}
        self._newest = self._attempt()
        self.broken: int | None = None
        """The rank whose device was the first thing that failed in the last start."""

    def _attempt(self) -> int:
        return newest_attempt(self.request.run_folder) if self.request.run_folder else 0

    def environment(self) -> dict[str, str]:
        """Variables of the next start."""
        return {"TUBELET_JOB": self.job, "TUBELET_RESTARTS": str(self.count), **self.end}

    def seconds_left(self) -> float:
        """Until the job's time is over."""
        return float(self.end[END]) - time.time() if self.end else math.inf

    def over(self) -> bool:
        """Whether the job's time is over, so that there can be no other start; says so."""
        if self.seconds_left() > 0:
            return False
        print(f"launch: not started again, since its time is over (--time {self.request.settings.time}).\n"
              "  Try: the same command again: it resumes", flush=True)
        return True

    def again(self, code: int, node: str = "", how: str = "") -> bool:
        """Decide, after a rank or a host was lost, whether the job is started again; says so. A program without a run folder
        is not: it has nothing to go on from. `self.code` is then the job's: what the run has written of its own end counts
        more than what its launcher saw, since a connection may break a moment after all was saved."""
        folder, self.code = self.request.run_folder, code
        if folder is None:
            return False
        before, self._newest = self._newest, self._attempt()
        attempt = self._newest if self._newest != before else 0
        error = first_error.read(folder, attempt) if attempt else None
        self.broken = int(error["rank"]) if error and error.get("device") else None
        if error:
            node = ""  # the run knows better where it began
        if self.seconds_left() <= 0:  # there is no other start to decide about, only how this one ended
            self.code, finished = code_that_counts(folder, attempt, code, error)
            if not finished:
                self.over()
            return False
        decision = decide(folder, code, self.request.settings.restart, job=self.job, attempt=attempt, node=node, how=how)
        print(f"launch: {decision.said}", flush=True)
        self.count += decision.restart
        self.code = decision.code
        return decision.restart
