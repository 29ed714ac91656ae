"""The table of `tubelet runs`."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from tubelet.console import print_table
from tubelet.engine.console import duration
from tubelet.errors import RunError, nearest
from tubelet.program.runs.reading import ago, shown
from tubelet.program.runs.standing import STATES, Standing, is_run, replaced, run_folders, standing

COLUMNS = ("run", "state", "step", "%", "loss", "images/s", "ETA", "checkpoint", "restarts", "goodput")
_SORTS: dict[str, Callable[[Standing], Any]] = {
    "newest": lambda run: -run.started,
    "name": lambda run: run.name,
    "state": lambda run: list(STATES).index(run.state) if run.state in STATES else len(STATES),
    "step": lambda run: -(run.step or 0),
    "loss": lambda run: run.loss if run.loss is not None and math.isfinite(run.loss) else math.inf,
    "rate": lambda run: -(run.rate or 0),
    "eta": lambda run: run.seconds_left if run.seconds_left is not None else math.inf,
    "checkpoint": lambda run: -(run.checkpoint.time or 0) if run.checkpoint else math.inf,
    "restarts": lambda run: -run.restarts,
    "goodput": lambda run: -(run.goodput or 0),
}
SORTS = tuple(_SORTS)


def find(above: Path, pattern: str = "*", hidden: bool = False) -> tuple[list[Path], int]:
    """(run folders whose name matches, how many replaced ones were left out). `above` may be a run itself. Raises
    `RunError` when there is no such folder, or no run in it."""
    try:
        if is_run(above):
            return [above], 0
        everything = run_folders(above)
    except FileNotFoundError:
        hint = "the folder that holds the runs (`run.dir`, runs/ by default): `tubelet runs DIR`"
        if commands := nearest(str(above), ("list", "show", "tail", "compare")):
            hint = f"`tubelet runs {commands[0]} ...`, or {hint}"
        raise RunError(f"There is no folder {above}.", hint) from None
    except NotADirectoryError:
        raise RunError(f"{above} is a file.", "the folder that holds the runs: `tubelet runs DIR`") from None
    except PermissionError:
        raise RunError(f"{above} may not be read by this user.", "its owner, or `chmod g+rx` by them") from None
    if not everything:
        raise RunError(f"{above} holds no run: none of its folders has attempts/ or launch/submitted.json.",
                       "the folder that holds the runs (`run.dir`), or start one: `tubelet pretrain CONFIG`")
    found = [path for path in everything if fnmatch(path.name, pattern)]
    if not found:
        close = nearest(pattern.strip("*"), [path.name for path in everything], 3)
        raise RunError(f"None of the {len(everything)} runs in {above} is called `{pattern}`.",
                       " or ".join(close) or f"`tubelet runs {above}`, or '*part-of-the-name*'")
    kept = found if hidden else [path for path in found if not replaced(path.name)]
    return kept, len(found) - len(kept)


def standings(folders: Sequence[Path], states: Sequence[str] = (), sort: str = "newest") -> list[Standing]:
    """How these runs stand, those in one of `states` (all if none is named), sorted. Raises `RunError` for words that are
    no state and no order."""
    unknown = [word for word in states if word not in STATES]
    if unknown:
        close = nearest(unknown[0], STATES, 2)
        raise RunError(f"`--state {unknown[0]}` is no state of a run.", " or ".join(close) or ", ".join(STATES))
    if sort not in _SORTS:
        raise RunError(f"`--sort {sort}` is no order.", " or ".join(nearest(sort, SORTS)) or ", ".join(SORTS))
    now = time.time()
    found = [run for run in (standing(folder, now) for folder in folders) if not states or run.state in states]
    return sorted(found, key=lambda run: (_SORTS[sort](run), run.name))


def show_list(title: str, runs: Sequence[Standing]) -> None:
    """Print the table, without the columns that nobody has anything in, and below it why runs stand as they do."""
    now = time.time()
    rows = [_row(run, now) for run in runs]
    kept = [number for number, name in enumerate(COLUMNS) if name in ("run", "state", "step") or any(
        row[number] for row in rows)]
    print_table(title, [COLUMNS[number] for number in kept], [[row[number] for number in kept] for row in rows])
    for run in runs:
        if run.note and run.state != "running":
            print(f"  {run.name} {run.state}: {run.note}")
        if run.checkpoint and run.checkpoint.problem:
            print(f"  {run.name}: checkpoint {run.checkpoint.name} is damaged: {run.checkpoint.problem}")


def _row(run: Standing, now: float) -> tuple[str, ...]:
    total = f"/{run.total_steps}" if run.total_steps else ""
    share = f"{100 * (run.step or 0) / run.total_steps:.0f}" if run.total_steps and run.attempts else ""
    rate = shown(run.rate, ".1f") + (f" {run.unit}" if run.rate is not None and run.unit != "images" else "")
    restarts = f"{run.restarts}" if run.attempts else ""
    if run.without_progress:
        restarts += f" ({run.without_progress} without progress)"
    return (run.name, run.state, f"{run.step if run.step is not None else 0}{total}" if run.attempts else "", share,
            shown(run.loss), rate, _left(run.seconds_left),
            checkpoint_words(run, now), restarts, f"{100 * run.goodput:.0f} %" if run.goodput is not None else "")


def _left(seconds: float | None) -> str:
    """Without seconds when it is hours: '1d 04:20 h', '00:20:31'."""
    if seconds is None:
        return ""
    return duration(seconds) if seconds < 3600 else duration(seconds)[:-3] + " h"


def checkpoint_words(run: Standing, now: float) -> str:
    """'1200, 5 min ago', and what is wrong with it."""
    found = run.checkpoint
    if found is None:
        return "none" if run.attempts else ""
    words = f"{found.step}" + (f", {ago(now - found.time)} ago" if found.time else "")
    return words + (", DAMAGED" if found.problem else "")
