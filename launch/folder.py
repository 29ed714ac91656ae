"""What a launcher asks of a run's folder before anything starts: may it be written, and does no other job write it?"""

from __future__ import annotations

import os
import time
from pathlib import Path

from launch.request import Request
from tubelet import files
from tubelet.errors import RunError
from tubelet.runs import Attempt, Run, RunSettings, scheduler_job


def the_run(request: Request) -> Run | None:
    """The run of a request, wherever the command was typed; None for programs without one."""
    if request.training is None or request.run_folder is None:
        return None
    return Run(RunSettings(**{**request.training.run.model_dump(), "dir": str(request.run_folder.parent)}))


def check_owner(request: Request, job: str = "") -> None:
    """Raises `RunError` when another job may still be writing the run's folder, as far as this host can tell."""
    if run := the_run(request):
        run.check_owner(job or scheduler_job(os.environ)[0])


def open_attempt(request: Request) -> Attempt | None:
    """The newest start of the run when it left no record of its end: it may still be running, perhaps on another host."""
    run = the_run(request)
    attempts = run.attempts() if run else []
    return attempts[-1] if run and attempts and not run.ended(attempts[-1]) else None


def prepare(folder: Path) -> None:
    """Make a launcher's folder and try it: a file is written and removed. Raises `RunError`."""
    probe = folder / f".probe-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise RunError(f"{folder} cannot be written: {error.strerror or error}.",
                       "another run.dir= (shared by all nodes), or free space and permissions there") from None


def submitted(folder: Path, job: str, launcher: str) -> None:
    """Leave in a launcher's folder which job was started, for those who look at the run."""
    files.write_json(folder / "submitted.json", {"job": job, "time": time.time(), "launcher": launcher})
