"""`python -m launch local --nproc 2 -- pretrain CONFIG [key=value ...]`: start a program on many processes.

SLURM, hostfile and Kubernetes launchers have their place in this folder and are not built yet.
"""

from __future__ import annotations

import sys

if __name__ == "__main__":  # the imports below take half a second, and nothing has been started yet that could be saved
    from tubelet.leaving import leave_at_once

    leave_at_once()

import importlib
from collections.abc import Sequence
from typing import Annotated

import typer

from launch import local as local_launcher
from tubelet.console import run_app
from tubelet.errors import ConfigError, nearest
from tubelet.program.settings import load_command, micro_batch_of, parse_command

PROGRAMS = {"pretrain": "PretrainSettings", "finetune": "FinetuneSettings"}
app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def _root() -> None:
    """Start a program on many processes."""


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def local(
    context: typer.Context,
    nproc: Annotated[int, typer.Option(min=1, help="Processes on this machine; one a GPU.")] = 1,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would run, and stop.")] = False,
) -> None:
    """On this machine, through torchrun: `local --nproc 2 -- pretrain configs/pretrain/vit_b16_i21k.yaml --tiny`."""
    program, words = _check(context.args, nproc)
    if dry_run:
        print(local_launcher.describe(local_launcher.torchrun_command(program, words, nproc),
                                      local_launcher.environment(nproc)))
        return
    code = local_launcher.run_local(program, words, nproc)
    if code:
        raise typer.Exit(code)


def _check(words: Sequence[str], nproc: int) -> tuple[str, list[str]]:
    """The program and its words, after its settings were read: a typo must not cost a start of many processes."""
    if not words or words[0] not in PROGRAMS:
        given = words[0] if words else "nothing"
        close = nearest(given, PROGRAMS)
        raise ConfigError(f"`{given}` is not a program.", f"-- {close[0] if close else 'pretrain'} CONFIG [key=value ...]")
    program, rest = words[0], list(words[1:])
    command = parse_command(rest)
    if not command.help:
        cls = getattr(importlib.import_module(f"{program}.settings"), PROGRAMS[program])
        settings = load_command(cls, command).settings
        micro_batch_of(settings, nproc)
    return program, rest


if __name__ == "__main__":
    sys.exit(run_app(app, None, "launch"))
