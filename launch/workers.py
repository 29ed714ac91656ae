"""torchrun and its workers on one node, supervised: signals go to the workers, exit codes come back.

torchrun dies of USR1 and orphans its workers, ends a save that takes longer than 30 s, and turns every non-zero code into 1.
So it ignores what it is not to hear, workers write their pids and exit codes into a small folder, and signals are passed to
them directly. When this process is killed, torchrun and the workers die with it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, NamedTuple

from launch.request import Request
from tubelet import dist
from tubelet.errors import EXIT_INTERRUPTED, EXIT_LOST, EXIT_PREEMPTED, EXIT_SUPERSEDED

FORWARDED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP)
"""What is passed on to the workers; HUP as TERM."""
SHUTDOWN_SECONDS = 30
"""How long torchrun lets the other workers of its node end by themselves after one has failed."""
CHOSEN = (0, EXIT_PREEMPTED, EXIT_SUPERSEDED, EXIT_INTERRUPTED)
"""Codes with which a rank leaves because it was meant to."""


class Ended(NamedTuple):
    """How a start on one node ended: its exit code, and whether it had been asked to."""

    code: int
    asked: bool


def environment(request: Request, env: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What all processes of a job get beside the environment `env`, whichever node they are on."""
    given = {key: env[key] for key in DEFAULTS if key in env}
    return {**_TORCHRUN, **DEFAULTS, **given, **request.settings.environment}


_TORCHRUN = {"TORCHELASTIC_SIGNALS_TO_HANDLE": "SIGQUIT",  # the others are ours
             "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(SHUTDOWN_SECONDS), "PYTHONUNBUFFERED": "1"}
DEFAULTS = {"TORCH_NCCL_DUMP_ON_TIMEOUT": "1", "PYTORCH_ALLOC_CONF": "expandable_segments:True"}


def threads(processes: int, cpus_per_task: int | None, env: Mapping[str, str]) -> dict[str, str]:
    """OMP_NUM_THREADS of so many processes on this node: ranks that each take every core are many times slower."""
    cores = cpus_per_task or max(1, (os.cpu_count() or 1) // processes)
    return {"OMP_NUM_THREADS": env.get("OMP_NUM_THREADS", str(cores))}


def with_setup(setup: str, command: Sequence[str]) -> list[str]:
    """`command` after the shell lines `setup`, in one shell that it replaces; `command` itself when there are none."""
    return ["bash", "-c", f'{setup.strip()}\nexec "$@"', "bash", *command] if setup.strip() else list(command)


def supervise(command: Sequence[str], env: Mapping[str, str], *, cwd: str | None = None,
              orders: Callable[[], int | None] = lambda: None, output: Callable[[IO[bytes]], None] | None = None) -> Ended:
    """Run torchrun to its end; its code is 0, 85, 86, 130, 87 when a rank was lost, or the first failing rank's.

    `orders` is asked a few times a second for a signal to pass on, beside those that this process gets; SIGKILL ends all.
    `output` reads what all of it says, in a thread; None = it goes where this process's own goes.
    """
    with tempfile.TemporaryDirectory(prefix="tubelet-launch-") as folder:
        # A session of its own: a terminal's Ctrl-C or a group signal reaches the workers once, through us.
        process = subprocess.Popen(command, env={**env, dist.EXIT_DIR: folder}, start_new_session=True, preexec_fn=_in_child,
                                   cwd=cwd, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE if output else None,
                                   stderr=subprocess.STDOUT if output else None)
        reader = threading.Thread(target=output, args=(process.stdout,), daemon=True) if output else None
        if reader:
            reader.start()
        asked, told = 0, set[int]()

        def forward(number: int, frame: object) -> None:
            nonlocal asked
            asked = number = signal.SIGTERM if number == signal.SIGHUP else number  # a closed terminal: save and leave
            told.clear()  # every signal is passed on: a second Ctrl-C means something
            _pass_on(folder, number, told)

        before = {number: signal.signal(number, forward) for number in FORWARDED}
        try:
            while process.poll() is None:
                ordered = orders()
                if ordered == signal.SIGKILL:
                    _pass_on(folder, signal.SIGKILL, set())
                    os.killpg(process.pid, signal.SIGKILL)
                elif ordered:
                    forward(ordered, None)
                if asked:
                    _pass_on(folder, asked, told)  # also to a worker that was not there yet when it came
                _wait(process, 0.2 if asked or output else 2.0)
        finally:
            for number, handler in before.items():  # once asked, a late one must not spoil the exit code
                signal.signal(number, signal.SIG_IGN if asked else handler)
            if process.poll() is None:  # something went wrong in here
                os.killpg(process.pid, signal.SIGKILL)
        if reader:
            reader.join(5)  # a grandchild may keep the pipe open
        codes = {path.stem: int(path.read_text() or 1) for path in sorted(Path(folder).glob("rank-*.code"))}
        silent = sum(path.stem not in codes for path in Path(folder).glob("rank-*.pid"))
        return Ended(exit_code(process.returncode, list(codes.values()), bool(asked), silent), bool(asked))


def _in_child() -> None:
    """Between fork and exec: torchrun ignores what we pass on, since SLURM signals every process of a job step; workers
    inherit that and install handlers of their own, so that a signal before then is not their death."""
    dist.die_with_parent()
    for number in FORWARDED:
        signal.signal(number, signal.SIG_IGN)


def _wait(process: subprocess.Popen[bytes], seconds: float) -> None:
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        pass


def _pass_on(folder: str, number: int, told: set[int]) -> None:
    """Signal every worker that has said its pid and is not in `told`."""
    for path in Path(folder).glob("rank-*.pid"):
        pid = int(path.read_text())
        if pid not in told:
            told.add(pid)
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue


def exit_code(torchrun: int, workers: Sequence[int], asked: bool = False, silent: int = 0) -> int:
    """What a start on one node says: an error before anything else, then a loss, then what the ranks agree on.

    `silent`: workers that had begun and ended without a code, so were killed. One rank that left while starting, because it
    was asked to, took the others with it: torchrun's own failure and their silence are no news then.
    """
    errors = [code for code in workers if code not in (*CHOSEN, EXIT_LOST)]
    if errors:
        return errors[0]
    if asked and any(code in CHOSEN[1:] for code in workers):
        return max(code for code in workers if code in CHOSEN)
    if EXIT_LOST in workers or silent:
        return EXIT_LOST
    if torchrun:
        return torchrun if torchrun > 0 else 128 - torchrun
    return max(workers, default=0)


def joined(codes: Sequence[int], asked: bool = False) -> int:
    """The exit code of a whole job from those of its nodes, by the same rule; 255 (ssh lost the node) and deaths by a signal
    (128 and more) count as lost."""
    lost = [code for code in codes if code == EXIT_LOST or (code > 128 and code != EXIT_INTERRUPTED)]
    errors = [code for code in codes if code not in CHOSEN and code not in lost]
    return exit_code(0, errors + [EXIT_LOST] * bool(lost) + [code for code in codes if code in CHOSEN], asked)


def torchrun(python: str = "") -> list[str]:
    """torchrun of a Python; the one that runs this when none is given. It never restarts workers itself (its default): a new
    start must go through the launcher, which looks at why the last one ended and whether it got anywhere."""
    return [python or sys.executable, "-m", "torch.distributed.run"]
