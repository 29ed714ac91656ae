"""How many checkpoints of a run lie on its disk at a time, before there is one: for who asks whether there is room.

The rule itself is `folder.prunable`; this is its arithmetic. Not counted are folders set aside when a run goes back.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from tubelet.engine.settings import EngineSettings


@dataclass(frozen=True)
class Kept:
    """Checkpoints on the disk when most are there, the one being written included."""

    count: int
    why: str
    """What they are, in words."""
    complete: bool = True
    """False: milestones come to them whose number nobody knows, since the run's length is not known."""


def kept_checkpoints(settings: EngineSettings, total_steps: int | None) -> Kept:
    """At most so many, at the end of a run of `total_steps` (None: not known). Milestones count beside the newest, although
    some may be both."""
    count, why, complete = settings.keep_last, [f"keep_last={settings.keep_last}"], True
    if settings.keep_every is not None:
        milestones = _milestones(settings, settings.keep_every, total_steps)
        complete = milestones is not None
        count += milestones or 0
        why.append(f"{milestones} of keep_every={settings.keep_every}" if complete else
                   f"those of keep_every={settings.keep_every} (not counted: the run's length is not known here)")
    if settings.checkpoint.best is not None:
        count += 1
        why.append("the best")
    return Kept(count + 1, f"{', '.join(why)} and the one being written", complete)


def _milestones(settings: EngineSettings, keep_every: int, total_steps: int | None) -> int | None:
    if total_steps is None:
        return settings.keep_milestones
    # Only what is saved can be kept; evaluations and the clock save at steps that nobody knows beforehand.
    regular = settings.save_every_minutes is None and settings.checkpoint.best is None
    found = total_steps // (math.lcm(keep_every, settings.save_every) if regular else keep_every)
    return found if settings.keep_milestones is None else min(found, settings.keep_milestones)
