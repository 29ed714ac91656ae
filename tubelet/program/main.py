"""The frame around a program: command line in, exit code out, errors said once.

Exit codes: 0 finished, 85 saved and to be restarted, 86 another attempt has the run, 87 a rank or the connection to it was
lost or a collective timed out (start it again), 130 interrupted and saved, others are errors. Errors of any rank go to
`logs/rank-NNNN.txt` with the host name; the first of them is printed, and kept as `logs/first-error-NNNN`.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import MutableMapping, Sequence
from pathlib import Path

from tubelet import dist, first_error
from tubelet.engine.signals import StopFlag, Stopped, rank_of_environment, tell_launcher
from tubelet.errors import (
    BEGUN,
    EXIT_ERROR,
    EXIT_LOST,
    EXIT_SUPERSEDED,
    OWN,
    ConfigError,
    DeviceError,
    Problems,
    TubeletError,
)
from tubelet.program.settings import ProgramSettings, help_text, load_command, parse_command
from tubelet.redact import redact


def run_program(name: str, what: str, cls: type[ProgramSettings], words: Sequence[str]) -> int:
    """Parse, check, train, report. Returns the exit code of this process.

    From the first line on a signal ends it with the code that belongs to the signal, whatever it is importing or waiting
    for; `arm` of the flag, called by the trainer, changes that to "save first".
    """
    with StopFlag().starts() as stop:
        rank = rank_of_environment()
        folder: Path | None = None
        everywhere = False
        try:
            world = dist.resolve()
            _meet_launcher(world)
            command = parse_command(words)
            if command.help:
                print(help_text(name, what, cls) if rank == 0 else "", end="\n" if rank == 0 else "")
                return 0
            loaded = load_command(cls, command)
            if command.print_config:
                print(loaded.as_yaml() if rank == 0 else "", end="")
                return 0
            for warning in meet_accelerate(os.environ):
                print(f"warning: {warning}" if rank == 0 else "", end="\n" if rank == 0 else "", flush=True)
            folder = Path(loaded.settings.run.dir) / loaded.settings.run.name
            stop.raise_if_asked()
            from tubelet.program.train import train  # torch: --help and configuration errors come before it

            stop.raise_if_asked()
            train(loaded, world, stop)
            code = 0
        except Exception as error:
            if isinstance(error, Stopped) and stop.starting and rank == 0:
                print(f"{error.reason} while starting: leaving with exit code {error.code}", flush=True)
            code = error.code if isinstance(error, Stopped) else report(
                dist.explain(error) or error, rank, folder, start=getattr(error, BEGUN, 0), own=getattr(error, OWN, False))
            everywhere = isinstance(error, Stopped) or (
                dist.EXIT_DIR in os.environ and code != EXIT_LOST and dist.all_failing())
        return _leave(code, everywhere)


def report(error: Exception, rank: int, folder: Path | None, start: int = 0, own: bool = False) -> int:
    """Write this rank's error to its log and print it if it is the first of this start. Returns the exit code.

    `start`: the number of this start, 0 before it has claimed the run's folder (the logs there are then of another start,
    and its first error too). Errors before that are the same on all ranks and rank 0 speaks, but for those that are this
    rank's `own` and those that nobody foresaw.
    """
    known = isinstance(error, TubeletError)
    text = f"error: {error}" if known else "".join(traceback.format_exception(error)).rstrip()
    where = f"[rank {rank} on {socket.gethostname()}]"
    code = error.exit_code if isinstance(error, TubeletError) else EXIT_ERROR
    first = rank == 0 or own or not known
    if folder and start and (folder / "logs").is_dir():
        try:
            with open(folder / "logs" / f"rank-{rank:04d}.txt", "a") as file:
                file.write(f"{where} {redact(''.join(traceback.format_exception(error)))}\n")
            if code != EXIT_SUPERSEDED:  # nothing went wrong
                time.sleep(0 if own else first_error.seconds_before(error, rank))
                first = first_error.keep(folder, start, rank=rank, code=code, error=text,
                                         device=isinstance(error, DeviceError))
        except OSError:
            pass  # a full disk must not hide the error
    if first:
        print(f"{text}" if known and rank == 0 else f"{where} {text}", file=sys.stderr, flush=True)
    return code


def meet_accelerate(env: MutableMapping[str, str]) -> list[str]:
    """`accelerate launch` hands its choices over in variables that every `Accelerator` obeys. Ours are in the recipe, so
    they are removed from `env`; returns sentences on those that said something else. Raises `ConfigError` for an engine
    of Accelerate's own, which would train another way than the recipe says."""
    problems = Problems(ConfigError)
    for key, flag in _ACCELERATE_ENGINES.items():
        if env.get(key, "").lower() in ("1", "true", "yes", "y", "t", "on"):
            problems.add(f"`accelerate launch` sets {key}={env[key]}, but the recipe chooses the engine: engine=zero runs "
                         "DeepSpeed itself, engine=plain runs Accelerate without plugins.",
                         f"`accelerate launch` without {flag} (or without it in the file of `accelerate config`), and "
                         "engine=zero zero.stage=1, 2 or 3 to shard")
    problems.raise_if_any()
    said = [f"`accelerate launch` sets {key}={env[key]}, which is not read; {instead} decides"
            for key, (instead, silent) in _ACCELERATE_CHOICES.items() if env.get(key, silent[0]).lower() not in silent]
    if env.get("ACCELERATE_USE_CPU", "").lower() == "true":
        if env.get("MASTER_ADDR") and not any(key in env for key in dist._RANK):
            said.append("`accelerate launch --cpu` starts one process whatever --num_processes says (it would need mpirun). "
                        "Try: --multi_gpu --num_processes N, which runs on CPUs too, or `python -m launch local --nproc N`")
        env["CUDA_VISIBLE_DEVICES"] = ""  # --cpu on a machine with GPUs, said in the way that torch and DeepSpeed obey
    for key in [key for key in env if key.startswith("ACCELERATE_")]:
        del env[key]
    return said


_ACCELERATE_ENGINES = {"ACCELERATE_USE_DEEPSPEED": "--use_deepspeed", "ACCELERATE_USE_FSDP": "--use_fsdp",
                       "ACCELERATE_USE_MEGATRON_LM": "--use_megatron_lm",
                       "ACCELERATE_USE_PARALLELISM_CONFIG": "--use_parallelism_config"}
_ACCELERATE_CHOICES = {"ACCELERATE_MIXED_PRECISION": ("precision=", ("no",)),
                       "ACCELERATE_DYNAMO_BACKEND": ("compile=", ("no",)),
                       "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ("global_batch_size=", ("1",))}


def _meet_launcher(world: dist.World) -> None:
    """Tell `launch local` our pid, so that it signals workers directly, and die with the process that started us."""
    folder = os.environ.get(dist.EXIT_DIR)
    if folder:
        dist.die_with_parent()  # no orphans when the launcher is killed
        whole = Path(folder, f"rank-{world.rank}.pid")
        part = whole.with_suffix(".part")
        part.write_text(str(os.getpid()))
        part.rename(whole)  # the launcher must not read half a number, and signal someone else


def _leave(code: int, everywhere: bool) -> int:
    """Hand the exit code to `launch local`. torchrun would turn a non-zero code into 1 and a page of its own; it needs to
    hear of one only to end the other ranks, so not when all leave together."""
    tell_launcher(code)
    return 0 if everywhere and dist.EXIT_DIR in os.environ else code


def finish(code: int) -> None:
    """Leave the process. After an error peers may hang in a collective, so nothing is waited for."""
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)  # what had to be saved is saved: a late signal must not spoil the exit code
    sys.stdout.flush()
    sys.stderr.flush()
    if code:
        os._exit(code)
    dist.stop() if "torch" in sys.modules else None
    sys.exit(code)
