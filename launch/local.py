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

from tubelet import dist

_FORWARDED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP)


def torchrun_command(program: str, words: Sequence[str], nproc: int) -> list[str]:
    """The command that is run."""
    head = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={nproc}"]
    return [*head, "-m", program, *words]


def environment(nproc: int) -> dict[str, str]:
    """What the workers get beside the caller's environment."""
    cores = max(1, (os.cpu_count() or 1) // nproc)
    return {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(cores)), "PYTHONUNBUFFERED": "1",
            "TORCH_NCCL_DUMP_ON_TIMEOUT": os.environ.get("TORCH_NCCL_DUMP_ON_TIMEOUT", "1"),
            "PYTORCH_ALLOC_CONF": os.environ.get("PYTORCH_ALLOC_CONF", "expandable_segments:True")}


def describe(command: Sequence[str], extra: dict[str, str]) -> str:
    """The whole thing as one line of shell."""
    return " ".join([*(f"{key}={shlex.quote(value)}" for key, value in extra.items()), shlex.join(command)])


def run_local(program: str, words: Sequence[str], nproc: int) -> int:
    """Run to the end; returns 0, 85, 86, 130, or the first failing rank's code."""
    with tempfile.TemporaryDirectory(prefix="tubelet-launch-") as folder:
        env = {**os.environ, **environment(nproc), dist.EXIT_DIR: folder}
        # a session of its own: a terminal's Ctrl-C or a group signal reaches the workers once, through us
        process = subprocess.Popen(torchrun_command(program, words, nproc), env=env, start_new_session=True,
                                   preexec_fn=dist.die_with_parent)

        def forward(number: int, frame: object) -> None:
            number = signal.SIGTERM if number == signal.SIGHUP else number  # a closed terminal: save and leave
            for path in Path(folder).glob("rank-*.pid"):
                try:
                    os.kill(int(path.read_text()), number)
                except (ProcessLookupError, ValueError):
                    continue

        before = {number: signal.signal(number, forward) for number in _FORWARDED}
        try:
            code = process.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        return _exit_code(code, [int(path.read_text() or 1) for path in sorted(Path(folder).glob("rank-*.code"))])


def _exit_code(torchrun: int, workers: Sequence[int]) -> int:
    errors = [code for code in workers if code not in (0, 85, 86, 130)]
    if errors:
        return errors[0]
    if torchrun:
        return torchrun if torchrun > 0 else 128 - torchrun
    return max(workers, default=0)
