"""`python -m launch.node`: what one node of several runs, started there by `launch hostfile` or by Kubernetes.

    python -m launch.node --rank I --nodes N --processes 8 --endpoint HOST:PORT --id ID [...] -- PROGRAM [words ...]

torchrun with the static rendezvous: node 0 keeps the store, ranks are in the order of the nodes. Signals reach the workers
however they come: to this process, as lines of the file `--orders`, or by the end of standard input (`--leave-with-stdin`),
which is how the end of the one who started us over ssh is noticed. They then save and leave.
"""

from __future__ import annotations

import os
import signal
import sys

if __name__ == "__main__":  # as every program: a signal before its handlers are there is no error
    from tubelet.leaving import leave_at_once

    leave_at_once()

import argparse
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from launch.request import MODULES, split
from launch.restarting import END
from launch.restarts import attempt_of, decide
from launch.settings import RestartSettings
from launch.workers import supervise, threads, torchrun
from tubelet.errors import EXIT_LOST, ConfigError, RunError, TubeletError
from tubelet.runs import scheduler_job

JOIN_SECONDS = 300
"""How long the nodes wait for each other at the start."""


def parse(words: Sequence[str]) -> argparse.Namespace:
    """The options before `--`; `--rank` may name an environment variable, such as JOB_COMPLETION_INDEX."""
    parser = argparse.ArgumentParser("python -m launch.node", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", required=True, help="number of this node from 0, or the variable that holds it")
    parser.add_argument("--nodes", type=int, required=True, help="number of nodes")
    parser.add_argument("--processes", required=True, help="processes of every node, or of each: 8,8,4")
    parser.add_argument("--devices", default="", help="GPUs of each node where not all are used: 0.1/2.3 (empty = all)")
    parser.add_argument("--endpoint", required=True, help="HOST:PORT of node 0, at which the ranks meet")
    parser.add_argument("--id", required=True, help="id of this start of the job")
    parser.add_argument("--cpus-per-task", type=int, default=None, help="cores of a process")
    parser.add_argument("--seconds", type=int, default=None, help="the job saves and leaves before so many seconds are over")
    parser.add_argument("--run", default="", help="the run's folder: node 0 asks whether a restarted job has got anywhere")
    parser.add_argument("--max-without-progress", type=int, default=3, help="as restart.max_without_progress")
    parser.add_argument("--env-file", default="", help="variables as DeepSpeed's .deepspeed_env has them")
    parser.add_argument("--orders", default="", help="file whose lines are numbers of signals to pass on")
    parser.add_argument("--leave-with-stdin", action="store_true", help="save and leave when standard input ends")
    return parser.parse_args(list(words))


def main(words: Sequence[str] | None = None) -> int:
    """Run this node's workers to their end; returns the exit code of the node."""
    own, program = split(sys.argv[1:] if words is None else words)
    options = parse(own)
    if not program or program[0] not in MODULES:
        raise ConfigError("No program was given after `--`.", "-- pretrain CONFIG [key=value ...]")
    text = str(os.environ.get(options.rank, options.rank))
    if not text.isdigit() or int(text) >= options.nodes:
        raise ConfigError(f"--rank {options.rank}" + f" = {text!r}" * (text != options.rank) +
                          f" is not a number below --nodes {options.nodes}.", "0 on the first node")
    rank = int(text)
    if options.env_file:
        os.environ.update(read_env_file(Path(options.env_file)))
    if options.run and rank == 0:
        check_progress(Path(options.run), options.max_without_progress)
    if options.seconds is not None:
        os.environ[END] = f"{time.time() + options.seconds:.0f}"
    counts, devices = options.processes.split(","), options.devices.split("/")
    processes = int(counts[rank] if len(counts) > 1 else counts[0])
    if len(devices) > rank and devices[rank]:
        os.environ["CUDA_VISIBLE_DEVICES"] = devices[rank].replace(".", ",")
    os.environ.update(threads(processes, options.cpus_per_task, os.environ))
    address, _, port = options.endpoint.rpartition(":")
    command = [*torchrun(), f"--nnodes={options.nodes}", f"--node-rank={rank}", f"--nproc-per-node={processes}",
               "--rdzv-backend=static", f"--rdzv-endpoint={address}:{port}", f"--rdzv-id={options.id}",
               f"--rdzv-conf=timeout={JOIN_SECONDS}", "-m", MODULES[program[0]], *program[1:]]
    orders = Orders(Path(options.orders) if options.orders else None, options.leave_with_stdin)
    return supervise(command, os.environ, orders=orders, output=pass_through if options.leave_with_stdin else None).code


def check_progress(folder: Path, most: int) -> None:
    """For schedulers that restart a job without asking: raises `RunError` when this is a restart that must not be. How the
    start before ended is what the run itself has written down; with nothing there it was lost."""
    job, restarts = scheduler_job(os.environ)
    if not restarts:
        return
    settings = RestartSettings(max_without_progress=most)
    decision = decide(folder, EXIT_LOST, settings, job=job, attempt=attempt_of(folder, job, restarts - 1))
    print(f"launch: {decision.said}", flush=True)
    if not decision.restart:
        raise RunError("This job is not started again; see above.", "mend it, delete the job and submit it again")


def read_env_file(path: Path) -> dict[str, str]:
    """KEY=VALUE lines, as DeepSpeed reads them."""
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise ConfigError(f"--env-file {path} cannot be read here: {error.strerror}.",
                          "a folder that all nodes share") from None
    pairs = [line.partition("=") for line in lines]
    return {key: value for key, equals, value in pairs if equals}


class Orders:
    """Signals to pass on that come by a file or by the end of standard input; each is given once."""

    def __init__(self, path: Path | None, with_stdin: bool):
        self.path, self.seen, self.ended = path, 0, threading.Event()
        self._said_end = False
        if with_stdin:
            threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        while os.read(0, 4096):
            pass
        self.ended.set()

    def __call__(self) -> int | None:
        if self.path is not None:
            try:
                lines = self.path.read_text().split("\n")[:-1]  # whole ones
            except (OSError, ValueError):
                lines = []  # a shared disk that is away for a moment
            if len(lines) > self.seen:
                self.seen += 1
                return int(lines[self.seen - 1])
        if self.ended.is_set() and not self._said_end:
            self._said_end = True
            return signal.SIGTERM
        return None


def pass_through(stream: IO[bytes]) -> None:
    """Everything from `stream` to standard output. When nobody listens any more it is read all the same: a worker that is
    about to save must not die of its own output."""
    heard = True
    while data := os.read(stream.fileno(), 1 << 16):
        while data and heard:
            try:
                data = data[os.write(1, data):]
            except OSError:
                heard = False


if __name__ == "__main__":
    try:
        sys.exit(main())
    except TubeletError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)
