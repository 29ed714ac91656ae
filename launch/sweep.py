"""Sweeps and pieces: one command line that stands for many, as the tasks of one array job.

    --sweep optimizer.lr=1e-3,3e-3 --sweep seed=0,1    four runs, each in a run folder of its own: NAME-lr1e-3-seed0, ...
    --array 16 -- data write IN OUT                     sixteen pieces (`--piece {index}/{count}`), then `--finish`
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tubelet.errors import ConfigError, Problems

if TYPE_CHECKING:
    from tubelet.program.settings import ProgramSettings

LIMIT = 1000
"""Most runs of one sweep: more are a slip, and SLURM's own limit of array tasks is 1001 unless a site raised it."""
INDEX, COUNT = "{index}", "{count}"


@dataclass(frozen=True)
class Point:
    """One run of a sweep."""

    suffix: str
    """What its name gets after a hyphen (`lr1e-3-seed0`)."""
    words: list[str]
    """The swept settings as `key=value`."""


def points(sweep: Sequence[str]) -> list[Point]:
    """All combinations of `key=a,b,...`, the last key running fastest. Raises `ConfigError`."""
    axes, problems = [], Problems(ConfigError)
    for text in sweep:
        key, equals, values = text.partition("=")
        found = split_values(values)
        if not key or not equals or not found or "" in found:
            problems.add(f"`--sweep {text}` names no values.", "--sweep optimizer.lr=1e-3,3e-3")
        elif len(set(found)) < len(found):
            problems.add(f"`--sweep {text}` has a value twice; two jobs must not write one run folder.", "each value once")
        elif key in [known for known, _ in axes]:
            problems.add(f"`--sweep {key}=` is given twice.", f"--sweep {key}=a,b,c")
        else:
            axes.append((key, found))
    problems.raise_if_any()
    leaves = [key.rpartition(".")[2] for key, _ in axes]
    labels = [leaf if leaves.count(leaf) == 1 else key for leaf, (key, _) in zip(leaves, axes)]
    made = [Point("-".join(_safe(f"{label}{value}") for label, value in zip(labels, values)),
                  [f"{key}={value}" for (key, _), value in zip(axes, values)])
            for values in itertools.product(*(values for _, values in axes))]
    if len(made) > LIMIT:
        raise ConfigError(f"The sweep has {len(made)} combinations, at most {LIMIT} are one job.",
                          "fewer values, or two sweeps")
    names = [point.suffix for point in made]
    for name in sorted({name for name in names if names.count(name) > 1}):
        problems.add(f"Two combinations of the sweep would both be named {name}.", "values that differ in letters or digits")
    problems.raise_if_any()
    return made


def split_values(text: str) -> list[str]:
    """Split at commas outside of brackets and quotes: `a,[b,c]` -> `a`, `[b,c]`."""
    return [item.strip() for item in re.findall(r"(?:\[[^\]]*\]|\{[^}]*\}|'[^']*'|\"[^\"]*\"|[^,])+|(?<=,)(?=,|$)|^$", text)]


def _safe(text: str) -> str:
    """As part of a run's name."""
    return re.sub(r"[^\w.+-]+", "_", text).strip("_")


def load_points(sweep: Sequence[str], words: Sequence[str], load: Callable[[Sequence[str]], ProgramSettings | None]
                ) -> list[tuple[list[str], ProgramSettings, list[str]]]:
    """(words, settings, swept settings alone) of each run of a sweep, named after its values unless the sweep names runs
    itself. `load` checks the words of one run. Raises one `ConfigError` for all that is wrong with any of them."""
    found, problems, said = [], Problems(ConfigError), set[str]()
    for point in points(sweep):
        own = [*words, *point.words]
        try:
            training = load(own)
        except ConfigError as error:
            if str(error) not in said:  # what is wrong with every combination is said once
                said.add(str(error))
                problems.add(f"{' '.join(point.words)}: {error.problem}", error.hint)
            continue
        if training is None:
            raise ConfigError("--sweep with --help or --print-config would start nothing.", "one of the two")
        if not any(word.startswith("run.name=") for word in point.words):
            training.run.name = f"{training.run.name}-{point.suffix}"
            own.append(f"run.name={training.run.name}")
        found.append((own, training, point.words))
    problems.raise_if_any()
    return found


def piece_words(words: Sequence[str], count: int) -> list[str]:
    """Words of one task of `--array COUNT`: `{count}` is filled in; `data write` need not be told of its `--piece`."""
    words = [word.replace(COUNT, str(count)) for word in words]
    if words[:1] == ["write"] and not any(word.split("=")[0] in ("--piece", "--finish") for word in words):
        words += ["--piece", f"{INDEX}/{count}"]
    if not any(INDEX in word for word in words):
        raise ConfigError(f"All {count} tasks of `--array {count}` would do the same: no word holds {INDEX}.",
                          f"a word with {INDEX} (from 0 on), such as --piece {INDEX}/{COUNT}")
    return words


def finish_words(words: Sequence[str]) -> list[str]:
    """Words of the step after all pieces of `data write`; [] when there is none."""
    if words[:1] != ["write"]:
        return []
    kept, skip = [], False
    for word in words:
        if not skip and not word.startswith("--piece="):
            kept += [word] * (word != "--piece")
        skip = word == "--piece" and not skip
    return [*kept, "--finish"] if len(kept) < len(words) else []
