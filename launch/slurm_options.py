"""Options of sbatch: how they are written into a script, which ones a script sets, and what else would override them.

sbatch takes options from its environment too, and believes that more than the script: a SBATCH_TIMELIMIT in somebody's
profile would end a job hours before the time that the script asks for, and SBATCH_NO_REQUEUE would let it never start again.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable, Mapping

KEPT = ("SLURM_CONF", "SLURM_CLUSTERS", "SLURM_TIME_FORMAT")
"""Variables that say which SLURM is meant, not what another job has."""
_ASKING = ("SLURM_", "SQUEUE_", "SINFO_", "SCONTROL_")
"""Beginnings of variables that are options of another job, or hide something from who asks (SQUEUE_STATES)."""
_NEVER = ("SBATCH_ARRAY_INX", "SBATCH_SIGNAL", "SBATCH_WAIT")
"""What no script here leaves open: many jobs would write one run folder, a program would die of a signal that it does not
know, and sbatch would stay until the job has ended."""
_VARIABLES = {"time": "TIMELIMIT", "array": "ARRAY_INX", "mem": "MEM_PER_NODE"}
"""Option -> what follows SBATCH_, where it is not the option's own name."""
_INSTEAD = (("MEM_PER_NODE", "MEM_PER_CPU", "MEM_PER_GPU"), ("REQUEUE", "NO_REQUEUE"), ("NO_REQUEUE", "REQUEUE"),
            ("CPUS_PER_TASK", "CPUS_PER_GPU"), ("GPUS_PER_NODE", "GPUS", "GPUS_PER_TASK", "GRES"),
            ("GRES", "GPUS", "GPUS_PER_NODE", "GPUS_PER_TASK"))
"""The first of each, when the script sets it, is contradicted by the others."""
_SHORT = {"A": "account", "C": "constraint", "D": "chdir", "G": "gpus", "J": "job-name", "N": "nodes", "a": "array",
          "c": "cpus-per-task", "e": "error", "n": "ntasks", "o": "output", "p": "partition", "q": "qos", "t": "time",
          "w": "nodelist", "x": "exclude"}


def _whole(option: str) -> bool:
    """--name=value, whose value may be quoted as one word."""
    name, equals, value = option.partition("=")
    return bool(name.startswith("--") and " " not in name and equals and not set("'\"") & set(value))


def quoted(option: str) -> str:
    """An option as a #SBATCH line takes it: `--comment=two words` -> `--comment='two words'`. One with quotes of its own, or
    a short one with its value, is taken word by word."""
    name, equals, value = option.partition("=")
    if _whole(option):
        return f"{name}={shlex.quote(value)}"
    try:
        return " ".join(quoted(word) if _whole(word) else shlex.quote(word) for word in shlex.split(option))
    except ValueError:  # an odd quote
        return f"{name}{equals}{shlex.quote(value)}" if equals else shlex.quote(option)


def given(options: Iterable[str]) -> dict[str, str]:
    """{long name: value} of options as they stand behind #SBATCH, of which the last counts; "" for one without a value."""
    found: dict[str, str] = {}
    for option in options:
        words = shlex.split(option)
        while words:
            word = words.pop(0)
            if word.startswith("--"):
                name, equals, value = word[2:].partition("=")
            else:
                name, value = _SHORT.get(word[1:2], word[1:2]), word[2:]
                equals = value
            found[name] = words.pop(0) if not equals and words and not words[0].startswith("-") else value
    return found


def for_asking(env: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment in which SLURM's commands answer what they are asked and nothing else."""
    return {key: value for key, value in env.items() if not key.startswith(_ASKING) or key in KEPT}


def overriding(options: Iterable[str], env: Mapping[str, str] = os.environ) -> list[str]:
    """Names of the variables by which sbatch would do something else than these options of a script say."""
    names = {_VARIABLES.get(name, name.upper().replace("-", "_")) for name in given(options)}
    names |= {other for first, *others in _INSTEAD if first in names for other in others}
    found = []
    for key in sorted(env):
        other_gres = key == "SBATCH_GRES" and "gres" not in given(options) and "gpu" not in env[key]  # a local disk, say
        if key in _NEVER or (key.startswith("SBATCH_") and key.removeprefix("SBATCH_") in names and not other_gres):
            found.append(key)
    return found


def for_sbatch(options: Iterable[str], env: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment in which sbatch does what the options of a script say; what they leave open it may still say."""
    left_out = set(overriding(list(options), env))
    return {key: value for key, value in for_asking(env).items() if key not in left_out}
