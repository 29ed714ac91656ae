"""The frame around a program: command line in, exit code out, errors said once.

Exit codes: 0 finished, 85 saved and to be restarted, 86 another attempt has the run, 130 interrupted and saved, others
are errors. Errors of any rank go to `logs/rank-NNNN.txt` with the host name; the first of them is printed.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from tubelet import dist, files
from tubelet.errors import EXIT_ERROR, TubeletError
from tubelet.program.settings import ProgramSettings, help_text, load_command, parse_command


def run_program(name: str, what: str, cls: type[ProgramSettings], words: Sequence[str]) -> int:
    """Parse, check, train, report. Returns the exit code of this process."""
    rank = int(next((os.environ[key] for key in dist._RANK if os.environ.get(key, "").isdigit()), 0))
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
        folder = Path(loaded.settings.run.dir) / loaded.settings.run.name
        from tubelet.program.train import train  # torch: --help and configuration errors come before it

        train(loaded, world)
        code = 0
    except Exception as error:
        code = getattr(error, "code", None) or report(error, rank, folder)
        everywhere = hasattr(error, "code") or (dist.EXIT_DIR in os.environ and dist.all_failing())
    return _leave(rank, code, everywhere)


def report(error: Exception, rank: int, folder: Path | None) -> int:
    """Write this rank's error to its log and print it if it is the first of this start. Returns the exit code."""
    known = isinstance(error, TubeletError)
    text = f"error: {error}" if known else "".join(traceback.format_exception(error)).rstrip()
    where = f"[rank {rank} on {socket.gethostname()}]"
    first = rank == 0
    logs = folder / "logs" if folder else None
    if logs and logs.is_dir():
        try:
            with open(logs / f"rank-{rank:04d}.txt", "a") as file:
                file.write(f"{where} {''.join(traceback.format_exception(error))}\n")
            newest = max((path.stem for path in (logs.parent / "attempts").glob("[0-9]*.yaml")), default="0000")
            first = files.create_exclusive(logs / f"first-error-{newest}.txt", f"{where} {text}\n")
        except OSError:
            pass  # a full disk must not hide the error
    if first:
        print(f"{text}" if known and rank == 0 else f"{where} {text}", file=sys.stderr, flush=True)
    return error.exit_code if isinstance(error, TubeletError) else EXIT_ERROR


def _meet_launcher(world: dist.World) -> None:
    """Tell `launch local` our pid, so that it signals workers directly, and die with the process that started us."""
    folder = os.environ.get(dist.EXIT_DIR)
    if folder:
        dist.die_with_parent()  # no orphans when the launcher is killed
        Path(folder, f"rank-{world.rank}.pid").write_text(str(os.getpid()))


def _leave(rank: int, code: int, everywhere: bool) -> int:
    """Hand the exit code to `launch local`. torchrun would turn a non-zero code into 1 and a page of its own; it needs to
    hear of one only to end the other ranks, so not when all leave together."""
    folder = os.environ.get(dist.EXIT_DIR)
    if folder:
        Path(folder, f"rank-{rank}.code").write_text(str(code))
        if everywhere:
            return 0
    return code


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
