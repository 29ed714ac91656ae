"""`tubelet doctor [CONFIG key=value ...]`: are these hosts fit for a job?

Alone it starts a few ranks on this machine. Under any launcher (`python -m launch slurm --nodes 4 -- doctor CONFIG`,
torchrun, srun, ...) every rank runs `python -m tubelet.program.doctor`, and they examine all nodes together. Exit codes:
0 nothing failed (warnings do not count), 1 something did, 2 the command line or the CONFIG is wrong.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from tubelet import dist
from tubelet.errors import EXIT_ERROR, TubeletError

if TYPE_CHECKING:
    from tubelet.program.doctor.assembly import Assembly
    from tubelet.program.doctor.options import Options
    from tubelet.program.doctor.report import Report

EXIT_USAGE = 2
app = typer.Typer(add_completion=False)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def doctor(
    context: typer.Context,
    words: Annotated[list[str] | None, typer.Argument(
        metavar="[CONFIG] [key=value ...]", help="A recipe: its run folder, shards, model and batch are looked at too. "
        "Without one: run.dir=FOLDER, the folder that will hold runs")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Smaller measurements: under 10 s on a healthy node")] = False,
    json: Annotated[str, typer.Option(metavar="FILE|-", help="Write JSON to a file beside the table, or (-) to standard "
                                      "output instead of it")] = "",
    timeout: Annotated[float, typer.Option(min=1, help="Seconds that a rank is waited for")] = 60.0,
    need: Annotated[float, typer.Option(min=0, help="Samples per second that one rank trains: warn when its loader gives "
                                        "less")] = 0.0,
    skip: Annotated[str, typer.Option(metavar="NAMES", help="Leave out: speed, network, clock, folder, data")] = "",
    nproc: Annotated[int, typer.Option(min=-1, help="Ranks on this machine when no launcher started this; -1: one a GPU, or "
                                       "2 without; 0: this process alone")] = -1,
) -> None:
    """Are these hosts fit for a job? Versions, GPUs, network, clocks, run folder, shards, limits; alone for this machine,
    under a launcher for all nodes. Exit code 0: nothing failed, 1: something did, 2: wrong command line or CONFIG."""
    from tubelet.program.doctor.options import read_options

    given = [*(words or []), *context.args]
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # pages of C++ frames about what is said in a sentence
    try:
        options = read_options(given, quick=quick, timeout=timeout, need=need, skip=skip)
        world = dist.resolve()
    except TubeletError as error:
        if dist._first(os.environ, dist._RANK) in (None, 0):
            print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(EXIT_USAGE) from None
    if world.size == 1 and nproc:  # inside an allocation too, whose variables a shell has
        flags = [*(["--quick"] if quick else []), f"--timeout={timeout:g}", f"--need={need:g}", f"--skip={skip}",
                 f"--json={json}"]
        raise typer.Exit(start_ranks([*given, *flags], nproc if nproc > 0 else _ranks_here()))
    raise typer.Exit(run(world, options, json))


def _ranks_here() -> int:
    from tubelet.program.doctor.gpus import visible

    return visible() or 2


def start_ranks(words: Sequence[str], count: int) -> int:
    """`count` ranks of the doctor on this machine; returns rank 0's exit code."""
    port, processes = dist.free_port(), []
    inherited = {key: value for key, value in os.environ.items() if key != "SLURM_STEP_ID"}  # they are no tasks of SLURM's
    for rank in range(count):
        env = {**inherited, "RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_RANK": str(rank), "NODE_RANK": "0",
               "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        processes.append(subprocess.Popen([sys.executable, "-m", "tubelet.program.doctor", *words], env=env,
                                          preexec_fn=dist.die_with_parent))
    try:
        code = processes[0].wait()
        for process in processes[1:]:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
    finally:
        for process in processes:
            process.kill()
    return code if code >= 0 else EXIT_ERROR


# ------------------------------------------------------------------------------------------------------- a rank


def run(world: dist.World, options: Options, json: str) -> int:
    """Examine as this rank, let rank 0 print; returns the exit code, the same on all ranks that met."""
    from tubelet.engine.signals import tell_launcher
    from tubelet.program.doctor.examine import examine, progress
    from tubelet.program.main import _leave, _meet_launcher

    _meet_launcher(world)
    options.say = progress(world.speaks)
    with _quiet_stdout() as out:
        def emergency(report: Report | None) -> None:
            """A check hangs: say what is known."""
            if report is not None:
                out.publish(report, json)
            tell_launcher(EXIT_ERROR)

        report, assembly = examine(world, options, emergency)
        code = out.publish(report, json) if report is not None else 1
    return _leave(_part(world, assembly, code), everywhere=not assembly.missing and assembly.problem is None)


def _part(world: dist.World, assembly: Assembly, code: int) -> int:
    """Leave together: a rank that went first would make launchers end the others before rank 0 has printed."""
    if world.size == 1:
        return code
    if world.speaks:
        assembly.say("done", code)
        assembly.hear_all("left", [rank for rank in assembly.notes if rank], 5.0)  # the store is this process'
        return code
    if assembly.problem is not None and assembly.store is None:
        print(f"[rank {world.rank} on {assembly.nodes[0].label}] {assembly.problem}", file=sys.stderr, flush=True)
        return 1
    told = assembly.hear("done", 2 * assembly.seconds + 90)
    assembly.say(f"left/{world.rank}", True)
    return 1 if told is None else told


class _Output:
    """The real standard output, while everything else that writes there (gloo and NCCL do) goes to standard error."""

    def __init__(self) -> None:
        sys.stdout.flush()
        self.kept = os.dup(1)
        os.dup2(2, 1)

    def restore(self) -> None:
        if self.kept >= 0:
            sys.stdout.flush()
            os.dup2(self.kept, 1)
            os.close(self.kept)
            self.kept = -1

    def publish(self, report: Report, json: str) -> int:
        """Print the table or JSON, write the file; returns the exit code."""
        from tubelet.program.doctor.report import show, write_json

        self.restore()
        if json != "-":
            show(report)
        try:
            if json:
                write_json(report, json, sys.stdout)
        except TubeletError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        return report.exit_code


@contextlib.contextmanager
def _quiet_stdout() -> Iterator[_Output]:
    out = _Output()
    try:
        yield out
    finally:
        out.restore()
