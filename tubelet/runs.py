"""The run folder: who may write it, what exists, what may change on resume.

    runs/<name>/
      attempts/0001.json ...   one a start: host, pid, scheduler job, commit; 0001.diff, 0001.yaml, 0001.end.json beside
      step-00001000/ ...       checkpoints (exist for readers once they hold `manifest.json`)
      events.jsonl             what happened to the run: starts, resumes, changed settings, skipped data, ends
      metrics.jsonl  tensorboard/  logs/rank-0000.txt  ledger-rank-0000.jsonl

A run is a name, never a timestamp: starting it again resumes it. Every start creates the next attempt exclusively; only
the newest attempt may publish or prune, which is checked right before each of both.
"""

from __future__ import annotations

import getpass
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from tubelet import files
from tubelet.config import Difference, Settings, differences, free
from tubelet.errors import RunError, SupersededError
from tubelet.redact import redacted


class RunSettings(Settings):
    """Which run this is, and what may be done to its folder."""

    name: str = free(pattern=r"^[\w.+-]+$")
    """Name of the run; its folder is `<dir>/<name>`. Starting the same name again resumes it."""
    dir: str = free("runs")
    """Folder that holds runs; on a cluster it must be shared by all nodes."""
    overwrite: bool = free(False)
    """Start from scratch although the folder holds checkpoints. The old folder is kept as `<name>.replaced-N`."""
    take_over: bool = free(False)
    """Take the folder over from another job that may still be running; that one then stops with exit code 86."""


@dataclass
class Attempt:
    """One start of a run."""

    number: int
    host: str
    pid: int
    pid_started: str
    job: str
    restarts: int
    world_size: int
    time: float
    user: str
    command: list[str] = field(default_factory=list)
    commit: str = ""


def scheduler_job(env: Mapping[str, str]) -> tuple[str, int]:
    """(job id, restart count) of the scheduler that started us; ("", 0) when there is none.

    A requeued SLURM job keeps its id, so its next start may supersede the one before.
    """
    if env.get("TUBELET_JOB"):
        return env["TUBELET_JOB"], int(env.get("TUBELET_RESTARTS", 0))
    if env.get("SLURM_ARRAY_JOB_ID"):
        return (f"slurm-{env['SLURM_ARRAY_JOB_ID']}_{env.get('SLURM_ARRAY_TASK_ID', '')}",
                int(env.get("SLURM_RESTART_COUNT", 0)))
    if env.get("SLURM_JOB_ID") and "SLURM_STEP_ID" in env:
        return f"slurm-{env['SLURM_JOB_ID']}", int(env.get("SLURM_RESTART_COUNT", 0))
    return "", 0


def _pid_started(pid: int) -> str:
    """When a process started, in clock ticks since boot; with the pid it names a process for good. "" when it is gone. One
    that has ended and that nobody has waited for is gone too: the first process of many containers waits for none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        ended = fields[0] in "ZX" and len(os.listdir(f"/proc/{pid}/task")) <= 1  # else other threads still run
    except (OSError, IndexError):
        return ""
    return "" if ended else fields[19]


def _git(*words: str) -> str:
    root = Path(__file__).resolve().parent.parent
    try:
        done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout if done.returncode == 0 else ""


def alive(attempt: Attempt) -> bool | None:
    """Whether the process of an attempt still runs; None on another host, which cannot tell."""
    if attempt.host != socket.gethostname():
        return None
    started = _pid_started(attempt.pid)
    return bool(started) and started == attempt.pid_started


class Run:
    """A run folder. All methods are for rank 0 unless they only read."""

    def __init__(self, settings: RunSettings):
        self.settings = settings
        self.folder = Path(settings.dir) / settings.name
        self.attempt: Attempt | None = None
        self.number = 0
        """The number of this start, on every rank of a program once the folder is claimed; 0 before."""

    def has_checkpoints(self) -> bool:
        """True when the folder holds at least one published checkpoint, verified or not."""
        return any(self.folder.glob("step-*/manifest.json"))

    def attempts(self) -> list[Attempt]:
        """All starts so far, oldest first. An attempt file cut short by a full disk counts as an unknown owner."""
        found = []
        for path in sorted((self.folder / "attempts").glob("[0-9]*.json")):
            if path.name.endswith(".end.json"):
                continue
            try:
                data = json.loads(path.read_text())
                found.append(Attempt(**data))
            except (ValueError, TypeError, OSError):
                found.append(Attempt(int(path.stem), "?", 0, "", "", 0, 0, 0.0, "?"))
        return found

    def ended(self, attempt: Attempt) -> bool:
        """True when the attempt left a record of its end."""
        return (self.folder / "attempts" / f"{attempt.number:04d}.end.json").exists()

    # ------------------------------------------------------------------------------------------- ownership

    def begin(self, world_size: int, config_yaml: str, elsewhere: Callable[[], str] = lambda: "") -> Attempt:
        """Claim the folder for this start. Raises `RunError` when another job may still be writing it.

        `elsewhere` names the place outside the folder that holds checkpoints of the run, which overwriting would not set
        aside ("" = there are none).
        """
        with self._writing():
            return self._begin(world_size, config_yaml, elsewhere)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """An error of the file system becomes one that names the setting."""
        try:
            yield
        except OSError as error:
            where = f" at {error.filename}" if error.filename else ""
            raise RunError(f"`run.dir` is {self.settings.dir}, and the run folder {self.folder} cannot be written there "
                           f"({error.strerror or error}{where}).",
                           "run.dir=... on a disk with room that this user may write to and all nodes see") from None

    def _begin(self, world_size: int, config_yaml: str, elsewhere: Callable[[], str]) -> Attempt:
        job, restarts = scheduler_job(os.environ)
        self.check_owner(job)
        attempts = self.attempts()
        same_job = bool(attempts and job and attempts[-1].job == job)
        if self.settings.overwrite and not same_job and (place := elsewhere()):
            raise RunError(f"run.overwrite=true keeps the old run by renaming its folder; its checkpoints lie in {place}.",
                           "another checkpoint.dir; or move or remove them there; or another run.name")
        if self.settings.overwrite and self.has_checkpoints() and not same_job:
            attempts = self._set_aside()
        (self.folder / "attempts").mkdir(parents=True, exist_ok=True)
        (self.folder / "logs").mkdir(exist_ok=True)
        number = attempts[-1].number + 1 if attempts else 1
        attempt = Attempt(number, socket.gethostname(), os.getpid(), _pid_started(os.getpid()), job, restarts, world_size,
                          time.time(), getpass.getuser(), redacted(sys.argv), _git("rev-parse", "HEAD").strip())
        stem = self.folder / "attempts" / f"{number:04d}"
        if not files.create_exclusive(stem.with_suffix(".json"), json.dumps(asdict(attempt), indent=1)):
            raise RunError(f"Another job started on {self.folder} at the same moment (attempt {number:04d}).",
                           "let that one run, or choose another run.name")
        files.write_atomic(stem.with_suffix(".yaml"), config_yaml)
        files.write_atomic(self.folder / "config.yaml", config_yaml)
        diff = _git("diff", "HEAD")
        if diff:
            files.write_atomic(stem.with_suffix(".diff"), diff)
        self.attempt, self.number = attempt, number
        self._warn_if_code_changed(attempts, attempt, diff)
        self.event("start", attempt=number, host=attempt.host, world_size=world_size, commit=attempt.commit)
        return attempt

    def check_owner(self, job: str) -> None:
        """Raises `RunError` when another job than `job` may still be writing the folder, as far as this host can tell."""
        if attempts := self.attempts():
            self._may_follow(attempts[-1], job)

    def _may_follow(self, last: Attempt, job: str) -> None:
        if self.ended(last) or self.settings.take_over or (job and last.job == job):
            return
        if (runs := alive(last)) is False:
            return  # that process is gone
        if runs:
            state = f"process {last.pid} on this host, which is still running"
        else:
            state = f"process {last.pid} on host {last.host}" + (f" (job {last.job})" if last.job else "")
            state += ", of which this host cannot tell whether it still runs"
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(last.time))
        raise RunError(f"Run folder {self.folder} belongs to attempt {last.number:04d}: {state} (started {when}). "
                       "Two jobs must never write one run folder.",
                       "stop that job first; or run.take_over=true (it then leaves with exit code 86); or another run.name")

    def _set_aside(self) -> list[Attempt]:
        number = 1
        while (target := self.folder.with_name(f"{self.folder.name}.replaced-{number}")).exists():
            number += 1
        os.rename(self.folder, target)
        print(f"run.overwrite=true: the old run was kept as {target}", flush=True)
        return []

    def _warn_if_code_changed(self, before: list[Attempt], now: Attempt, diff: str) -> None:
        if not before:
            return
        old_diff = self.folder / "attempts" / f"{before[-1].number:04d}.diff"
        old = old_diff.read_text() if old_diff.exists() else ""
        if before[-1].commit != now.commit or old != diff:
            what = f"commit {before[-1].commit[:10] or '?'} -> {now.commit[:10] or '?'}" if (
                before[-1].commit != now.commit) else "uncommitted changes differ"
            print(f"warning: the code changed since attempt {before[-1].number:04d} ({what}); "
                  f"see {self.folder}/attempts/", flush=True)
            self.event("code_changed", before=before[-1].commit, now=now.commit)

    def check_current(self) -> None:
        """Raise `SupersededError` (exit 86) unless this attempt is the newest. Called before each publish and prune."""
        assert self.attempt is not None
        newest = max((int(path.stem) for path in (self.folder / "attempts").glob("[0-9]*.json")
                      if not path.name.endswith(".end.json")), default=0)
        if newest != self.attempt.number:
            raise SupersededError(f"Attempt {newest:04d} has taken over {self.folder}; this is attempt "
                                  f"{self.attempt.number:04d}, which leaves without writing.",
                                  "nothing, if you restarted the run elsewhere; its checkpoints are untouched")

    @property
    def claim(self) -> Path | None:
        """The file by which this attempt holds the folder, on every rank; None before it is claimed. The attempt has lost
        the run once this file is gone (the folder was set aside), or the one of the next number is there."""
        return self.folder.absolute() / "attempts" / f"{self.number:04d}.json" if self.number else None

    def end(self, how: str, code: int, **details: Any) -> None:
        """Record how this attempt ended, so that the next start need not guess."""
        if self.attempt is None:
            return
        record = {"how": how, "code": code, "time": time.time(), **details}
        path = self.folder / "attempts" / f"{self.attempt.number:04d}.end.json"
        try:
            files.write_json(path, record)
        except OSError as error:  # a full disk must not hide why the run ends, nor change its exit code
            print(f"warning: {path} could not be written: {error.strerror or error}", flush=True)
        self.event("end", attempt=self.attempt.number, how=how, code=code, **details)

    def event(self, kind: str, **details: Any) -> None:
        """Append one line to `events.jsonl`; it is printed instead when the disk takes no more."""
        stamp = datetime.now().astimezone().isoformat(timespec="milliseconds")
        row = {"event": kind, "at": stamp, **details}
        try:
            files.append_jsonl(self.folder / "events.jsonl", [row])
        except OSError as error:  # no reason to end a job, which one rank's error would
            print(f"warning: events.jsonl could not be written ({error.strerror or error}): "
                  f"{json.dumps(row, default=str)}", flush=True)


def check_changes(cls: type[Settings], saved: dict, now: dict, run: str) -> list[Difference]:
    """The recorded settings that changed since the checkpoint; raises one `RunError` listing every fixed one."""
    changed = differences(cls, saved, now)
    fixed = [item for item in changed if item.resume == "fixed"]
    if fixed:
        lines = "\n".join(f"    {item.key}: checkpoint {item.old!r}, now {item.new!r}" for item in fixed)
        raise RunError(f"{run} cannot be resumed: {len(fixed)} fixed setting{'s' * (len(fixed) > 1)} changed.\n{lines}",
                       "set them back; or a new run.name with init.from_run= (keeps moments) or init.weights= (weights "
                       "only); or run.overwrite=true to begin anew")
    return [item for item in changed if item.resume == "recorded"]
