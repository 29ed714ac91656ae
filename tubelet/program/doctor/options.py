"""The command line of the doctor, checked. No torch here: a mistake is said at once."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tubelet.config import free, parse_overrides
from tubelet.errors import ConfigError, nearest
from tubelet.program.settings import ProgramSettings, load_command, parse_command

CHECKS = ("speed", "network", "clock", "folder", "data")
"""What ranks do together, in this order; `--skip` takes these names."""


class Recipe(ProgramSettings):
    """A recipe of either program; what is wrong with its beginning the program says."""

    from_scratch: bool = free(False)
    """Of fine-tuning."""


@dataclass
class Options:
    """What the command line said."""

    settings: ProgramSettings | None = None
    folder: str = "runs"
    """The run folder, or the one that holds runs."""
    config: str = ""
    quick: bool = False
    seconds: float = 60.0
    """How long a rank is waited for, at the start and in each check."""
    need: float | None = None
    """Samples per second that one rank trains."""
    skip: tuple[str, ...] = ()
    say: Callable[[str], None] = lambda text: None
    """Progress, for a person who waits."""


def read_options(words: Sequence[str], *, quick: bool = False, timeout: float = 60.0, need: float = 0.0,
                 skip: str = "") -> Options:
    """The command line, checked. Raises `ConfigError`."""
    left_out = tuple(name.strip() for name in skip.split(",") if name.strip())
    for name in left_out:
        if name not in CHECKS:
            close = nearest(name, CHECKS)
            raise ConfigError(f"--skip {name} is none of the checks.", close[0] if close else ", ".join(CHECKS))
    options = Options(quick=quick, seconds=timeout, need=need or None, skip=left_out)
    words = [word for word in words if not word.startswith(("--local_rank", "--local-rank"))]
    if any("=" not in word and not word.startswith("-") for word in words):
        command = parse_command(words)
        settings = load_command(Recipe, command).settings
        options.settings, options.config = settings, command.config
        options.folder = os.path.join(settings.run.dir, settings.run.name)
        return options
    for key, value in parse_overrides(words).items():
        if key != "run.dir":
            raise ConfigError(f"`{key}` is a setting of a recipe, and none was named.",
                              f"tubelet doctor configs/pretrain/vit_b16_i21k.yaml {key}=...; without one only run.dir=")
        options.folder = str(value)
    return options
