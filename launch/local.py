"""`python -m launch local`: N processes on this machine through torchrun, without ssh.

torchrun starts and watches the workers. Signals are passed to the workers directly (torchrun dies of USR1 and orphans
them), and exit codes come back through a small folder, since torchrun turns every non-zero code into 1.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from launch.request import MODULES, Request
from tubelet import dist

_FORWARDED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP)


def torchrun_command(request: Request) -> list[str]:
    """The command that is run."""
    if not request.settings.container and not request.settings.python:
        head = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    else:
        head = [request.python, "-m", "torch.distributed.run", "--standalone"]
    command = [*head, f"--nproc-per-node={request.settings.tasks_per_node}", "-m", MODULES[request.program], *request.words]
    return request.wrapped(command)


def environment(request: Request) -> dict[str, str]:
    """What the workers get beside the caller's environment."""
    cores = request.settings.cpus_per_task or max(1, (os.cpu_count() or 1) // request.settings.tasks_per_node)
    return {"TORCHELASTIC_SIGNALS_TO_HANDLE": "SIGQUIT",  # the others are ours; torchrun would kill a save after 30 s
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(cores)), "PYTHONUNBUFFERED": "1",
            "TORCH_NCCL_DUMP_ON_TIMEOUT": os.environ.get("TORCH_NCCL_DUMP_ON_TIMEOUT", "1"),
            "PYTORCH_ALLOC_CONF": os.environ.get("PYTORCH_ALLOC_CONF", "expandable_segments:True"),
            **request.settings.environment}


def render(request: Request) -> str:
    """The whole thing as one line of shell."""
    return " ".join([*(f"{key}={shlex.quote(value)}" for key, value in environment(request).items()),
                     shlex.join(torchrun_command(request))])


def run(request: Request) -> int:
    """Run to the end; returns 0, 85, 86, 130, or the first failing rank's code."""
    with tempfile.TemporaryDirectory(prefix="tubelet-launch-") as folder:
        env = {**os.environ, **environment(request), dist.EXIT_DIR: folder}
        # A session of its own: a terminal's Ctrl-C or a group signal reaches the workers once, through us.
        process = subprocess.Popen(torchrun_command(request), env=env, start_new_session=True, preexec_fn=_in_child)
        asked, told = 0, set[int]()

        def forward(number: int, frame: object) -> None:
            nonlocal asked
            asked = number = signal.SIGTERM if number == signal.SIGHUP else number  # a closed terminal: save and leave
            told.clear()  # every signal is passed on: a second Ctrl-C means something
            _pass_on(folder, number, told)

        before = {number: signal.signal(number, forward) for number in _FORWARDED}
        try:
            while process.poll() is None:
                if asked:
                    _pass_on(folder, asked, told)  # also to a worker that was not there yet when it came
                _wait(process, 0.2 if asked else 2.0)
        finally:
            for number, handler in before.items():  # once asked, a late one must not spoil the exit code
                signal.signal(number, signal.SIG_IGN if asked else handler)
        codes = [int(path.read_text() or 1) for path in sorted(Path(folder).glob("rank-*.code"))]
        return _exit_code(process.returncode, codes, bool(asked))


def _in_child() -> None:
    """Between fork and exec: torchrun ignores what we pass on, since SLURM signals every process of a job step; workers
    inherit that and install handlers of their own, so that a signal before then is not their death."""
    dist.die_with_parent()
    for number in _FORWARDED:
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


def _exit_code(torchrun: int, workers: Sequence[int], asked: bool = False) -> int:
    """What the whole start says: an error before anything else, then what the ranks agree on. One rank that left while
    starting, because it was asked to, took the others with it: torchrun's own failure is no news then."""
    errors = [code for code in workers if code not in (0, 85, 86, 130)]
    if errors:
        return errors[0]
    if torchrun and not (asked and any(workers)):
        return torchrun if torchrun > 0 else 128 - torchrun
    return max(workers, default=0)
