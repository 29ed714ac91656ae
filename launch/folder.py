"""What a launcher asks of a run's folder before anything starts: may it be written, and does no other job write it?"""

from __future__ import annotations

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
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


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold a launcher's folder, so that no other launcher starts the same run in the seconds before the run itself says who
    writes it. Raises `RunError` when another one does; on a disk without locks the run alone decides."""
    with open(folder / ".lock", "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            who = file.read() or "it has just begun"
            raise RunError(f"{folder} is held by another launcher that is still running: {who}.",
                           "end that one first; or run.take_over=true; or another run.name") from None
        except OSError:
            pass
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def submitted(folder: Path, job: str, launcher: str) -> None:
    """Leave in a launcher's folder which job was started, for those who look at the run."""
    files.write_json(folder / "submitted.json", {"job": job, "time": time.time(), "launcher": launcher})
