"""What a run in progress is: its counts, where it began, and how it is left."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class TrainState:
    """Everything beside weights, moments and EMA that is needed to go on. Saved in every checkpoint's manifest."""

    step: int = 0
    """Global batches consumed and not rolled back."""
    seen: int = 0
    """Samples consumed by finished steps, or jumped over: the position in the data."""
    skipped_steps: int = 0
    """Batches consumed without an update, because the loss or the gradient was not finite."""
    jumps: list[dict[str, Any]] = field(default_factory=list)
    """Data left out by going back: {"step", "seen", "to"}: at `step` the position went from `seen` to `to`."""
    rollbacks: int = 0
    """Times the run went back and has not saved anything beyond the trouble since."""
    trouble_step: int = -1
    """The step whose trouble it last went back for."""
    evaluated_step: int = field(default=-1, compare=False)
    """The step of the newest evaluation; -1 before the first."""
    best: dict[str, Any] = field(default_factory=dict)
    """The best evaluation so far: {"metric", "value", "step"}; {} before the first and without `checkpoint.best`."""
    recent_losses: list[float] = field(default_factory=list, compare=False)
    """Losses of the newest steps that were not skipped, at most `guard.window`: what a loss is compared with. Saved, because
    a run that starts again or goes back would otherwise not see a spike for as many steps."""
    skipping_from: int = -1
    """The first step of a series of skipped updates that has not ended; -1 when there is none."""


@dataclass
class Beginning:
    """Where weights and position come from, decided once by the program (see `Trainer.begin`)."""

    kind: str
    """"resume", "fork", "weights" or "scratch"."""
    folder: Path | None = None
    """The checkpoint to restore, for "resume" and "fork"."""
    state: TrainState | None = None
    notes: Sequence[str] = ()
    """Sentences for the user: rejected checkpoints, changed settings."""
