"""`python -m launch slurm`: a batch script, checked against the cluster, submitted, and requeued by itself.

    python -m launch slurm --nodes 4 --time 1-00:00:00 --partition gpu -- pretrain CONFIG [key=value ...]

The script and the job's output lie in `launch/` of the run's folder. With --sweep or --array one array job runs many
commands. `--dry-run` prints every script that would be submitted, and how.
"""

from __future__ import annotations

import fcntl
import getpass
import os
import shlex
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from launch import folder
from launch.request import Request
from launch.slurm_checks import check, check_commands, claim, cluster, output_folders, test_only
from launch.slurm_options import for_sbatch, overriding
from launch.slurm_script import options, script
from launch.sweep import finish_words, piece_words
from tubelet import files
from tubelet.errors import ConfigError, RunError
from tubelet.redact import redact

SUBMITTED = "submitted.json"


@dataclass(frozen=True)
class Job:
    """One script that is submitted."""

    request: Request
    path: Path
    after: bool = False
    """Only when all tasks of the one before have ended well."""


def jobs(request: Request) -> list[Job]:
    """What is submitted for a request: one job, and for shards that are written in pieces the one that finishes them."""
    place, slurm = request.launch_folder, request.settings.slurm
    if slurm.array and request.training is not None:
        raise ConfigError(f"--array {slurm.array}: `{request.program}` would write one run folder from {slurm.array} jobs.",
                          "--sweep key=a,b,c (a run of its own for each value), or no --array")
    found = [Job(request, place / f"{request.name}.sbatch")]
    last = finish_words(piece_words(request.words, slurm.array)) if slurm.array and request.program == "data" else []
    if last:
        output = slurm.output or str(place / "slurm-%j.out")
        alone = slurm.model_copy(update={"array": None, "parallel": None, "output": output})
        settings = request.settings.model_copy(update={"slurm": alone, "name": f"{request.name}-finish"})
        finish = replace(request, words=last, settings=settings)
        found.append(Job(finish, place / f"{finish.name}.sbatch", after=True))
    return found


def render(request: Request) -> str:
    """Every script that would be submitted, each followed by the command that would do so."""
    return "\n".join(f"{script(job.request, hide=True)}# submitted with: {shlex.join(_sbatch(job, 'JOB'))}"
                     for job in jobs(request))


def _sbatch(job: Job, before: str) -> list[str]:
    after = [f"--dependency=afterok:{before}", "--kill-on-invalid-dep=yes"] if job.after else []
    return ["sbatch", "--parsable", *after, str(job.path)]


def run(request: Request) -> int:
    """Check, submit, and say how to follow and stop the job. Returns 0. Raises `TubeletError` before anything is queued."""
    made = jobs(request)
    check_commands()
    check(request)
    for job in made:
        test_only(job.request)
    with _one_at_a_time(request.launch_folder):
        for its in request.runs or [request]:
            claim(its)
        number = ""
        for place in output_folders(request):
            folder.prepare(place)
        for job in made:
            _write(job.path, script(job.request))
            number = _submit(job, number)
            _note(job.request, number)
            _say(job.request, number)
    return 0


@contextmanager
def _one_at_a_time(place: Path) -> Iterator[None]:
    """Two people who submit the same run at the same moment do so one after the other; the second is then refused."""
    folder.prepare(place)
    with open(place / ".submitting", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            pass  # a file system without locks
        yield


def _write(path: Path, text: str) -> None:
    """The script, for its owner's eyes alone: `environment` may hold secrets."""
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o700), "w") as file:
        file.write(text)


def _submit(job: Job, before: str) -> str:
    """Submit a script; returns the job's number. Raises `RunError` with what sbatch said."""
    words = _sbatch(job, before)
    done = subprocess.run(words, capture_output=True, text=True, env=for_sbatch(options(job.request)))
    if done.returncode:
        raise RunError(f"`{shlex.join(words)}` failed: {redact(done.stderr.strip())}.",
                       f"what sbatch asks for; the script is {job.path}")
    return done.stdout.split(";")[0].strip()  # NUMBER;CLUSTER in a federation


def _note(request: Request, number: str) -> None:
    """For those who look at a run: which job was submitted for it."""
    record = {"job": f"slurm-{number}", "time": time.time(), "launcher": "slurm", "cluster": cluster(),
              "user": getpass.getuser()}
    for index, run in enumerate(request.runs):
        folder.prepare(run.launch_folder)
        files.write_json(run.launch_folder / SUBMITTED, {**record, "job": f"slurm-{number}_{index}"})
    if not request.runs and request.training is not None:
        files.write_json(request.launch_folder / SUBMITTED, record)


def _say(request: Request, number: str) -> None:
    settings, tasks = request.settings, len(request.runs) or request.settings.slurm.array
    where = f"{settings.nodes} node(s) x {settings.tasks_per_node} process(es)" + (f", {tasks} tasks" if tasks else "")
    print(f"submitted job {number}: {' '.join(dict.fromkeys([request.program, request.name]))}, {where}")
    output = settings.slurm.output or str(request.launch_folder / f"slurm-%A{'_%a' if tasks else ''}.out")
    for pattern, text in (("%A", number), ("%j", "*" if tasks else number), ("%a", "*"), ("%x", request.name),
                          ("%u", getpass.getuser())):
        output = output.replace(pattern, text)
    print(f"  output: tail -F {Path(request.workdir, output)}\n  state:  squeue -j {number}")
    if ignored := overriding(options(request)):
        print(f"  {', '.join(ignored)} of the environment: not used, the script says otherwise")
    if request.training is None:
        print(f"  stop:   scancel {number}")
        return
    print(f"  stop:   scancel {number} (saves if that takes less than the cluster's KillWait)\n"
          f"  save and start again: scancel --signal=USR1 {number}", flush=True)
    for run in request.runs:
        print(f"  run:    {run.run_folder}")
