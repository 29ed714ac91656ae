"""Start a program on many processes, here or on a cluster.

    python -m launch {local,hostfile,slurm,k8s} [resources] [--dry-run] -- PROGRAM CONFIG [key=value ...]

PROGRAM is pretrain, finetune, evaluate, doctor, data or models. The same words for resources hold for every launcher; a site
keeps its defaults in one YAML (--site FILE, $TUBELET_SITE, ./site.yaml, ~/.config/tubelet/site.yaml). The program's
configuration is checked before anything is queued.
"""

from __future__ import annotations

import sys

if __name__ == "__main__":  # the imports below take a while, and nothing has been started yet that could be saved
    from tubelet.leaving import leave_at_once

    leave_at_once()

import importlib
from collections.abc import Sequence

from tubelet.errors import EXIT_INTERRUPTED, ConfigError, TubeletError, nearest
from tubelet.redact import redact

LAUNCHERS = {
    "local": ("launch.local", "this machine, through torchrun"),
    "hostfile": ("launch.hostfile", "the hosts of DeepSpeed's hostfile, through ssh or pdsh"),
    "slurm": ("launch.slurm", "sbatch and srun, one task a GPU; requeued by itself"),
    "k8s": ("launch.k8s", "a Kubernetes JobSet"),
}
"""Launcher -> (module with `render(request) -> str` and `run(request) -> int`, what it is)."""


def usage(launcher: str = "") -> str:
    """The text of `--help`: of all launchers, or of one with every setting that concerns it."""
    rows = "\n".join(f"  {name:<10} {what}" for name, (_, what) in LAUNCHERS.items())
    text = f"{__doc__}\nlaunchers:\n{rows}\n"
    if not launcher:
        return text + "\n`python -m launch LAUNCHER --help` lists the settings.\n"
    from launch.request import SECTIONS
    from launch.settings import LaunchSettings
    from tubelet.config import _settings_in, known_fields

    lines = ["", f"settings of `{launcher}` (options, or keys of the site's YAML):"]
    for key, info in known_fields(LaunchSettings):
        section, _, leaf = key.rpartition(".")
        if _settings_in(info.annotation) or (section in SECTIONS.values() and section and section != SECTIONS[launcher]):
            continue
        name = (leaf if section == SECTIONS[launcher] else key).replace("_", "-")
        default = "required" if info.is_required() else repr(info.get_default(call_default_factory=True))
        lines.append(f"  --{name} ({default})\n      {' '.join((info.description or '').split())}")
    return text + "\n".join(lines) + "\n"


def main(words: Sequence[str] | None = None) -> int:
    """`launch`, with errors said as everywhere. Returns the exit code."""
    try:
        return launch(sys.argv[1:] if words is None else words)
    except TubeletError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED


def launch(words: Sequence[str]) -> int:
    """Read the command line, check everything, and start or print. Returns the exit code."""
    from launch.request import read_request, split

    own = split(words)[0]
    if not own or own[0] in ("-h", "--help"):
        print(usage(), end="")
        return 0 if own else 2
    if own[0] not in LAUNCHERS:
        close = nearest(own[0], LAUNCHERS)
        raise ConfigError(f"`{own[0]}` is not a launcher.", close[0] if close else ", ".join(LAUNCHERS))
    if "-h" in own or "--help" in own:
        print(usage(own[0]), end="")
        return 0
    request = read_request(own[0], words[1:])
    module = importlib.import_module(LAUNCHERS[own[0]][0])
    if request.dry_run:
        print(redact(module.render(request)))  # a URL among the words may hold a token
        return 0
    return module.run(request)


if __name__ == "__main__":
    sys.exit(main())
