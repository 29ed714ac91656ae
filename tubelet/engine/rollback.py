"""Going back to the last good checkpoint, when skipping updates was not enough (`guard.py` decides that)."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tubelet import dist
from tubelet.engine.checkpoint.load import FROM_SETTINGS, restore
from tubelet.engine.digest import DigestFile
from tubelet.engine.guard import Guard, record_jump
from tubelet.engine.state import TrainState
from tubelet.errors import RunError, TubeletError

if TYPE_CHECKING:
    from tubelet.engine.trainer import Trainer


def go_back(trainer: Trainer, reason: str) -> None:
    """Restore the last good checkpoint and leave out the data that was consumed since (all ranks participate).

    Raises `RunError` when the run has gone back `guard.max_rollbacks` times without getting past the trouble, and what
    the keeper raises when there is no checkpoint to go back to.
    """
    state, trouble = trainer.state, trainer.guard.first_step
    trainer.publish()
    rollbacks = state.rollbacks + 1
    if rollbacks > trainer.settings.guard.max_rollbacks:
        raise RunError(f"Training does not go on: {reason}, after the run had gone back {state.rollbacks} time(s) "
                       f"(guard.max_rollbacks={trainer.settings.guard.max_rollbacks}) without getting past step {trouble}.",
                       "a smaller optimizer.lr or a longer schedule.warmup_steps; what happened is in "
                       f"{trainer.run.folder}/events.jsonl")
    with trainer.phases("restore"), dist.patience("save"):
        folder, found = _checkpoint_before(trainer, trouble, reason)
        restore(folder, trainer.engine, trainer.ema.tensors() if trainer.ema else None, keep=FROM_SETTINGS)
        jump = {"step": found.step, "seen": found.seen, "to": state.seen}
        step, lost = state.step, state.step - found.step
        for name, value in asdict(found).items():
            setattr(state, name, value)
        state.seen, state.rollbacks, state.trouble_step = jump["to"], rollbacks, trouble
        state.jumps = [*found.jumps, jump]
        told = {**jump, "rollbacks": rollbacks, "trouble_step": trouble, "reason": reason}
        dist.together(lambda: _remember(trainer, told))
        aside = trainer.keeper.went_back(state)
    if trainer.world.speaks:
        trainer.run.event("rollback", reason=reason, folder=str(folder), steps_lost=lost, set_aside=aside, **jump)
        trainer.view.console.say(f"warning: {reason}. Back to step {state.step} ({folder.name}); samples {jump['seen']} to "
                                 f"{jump['to']} are left out, {lost} steps are lost")
    _begin_anew(trainer, step)


def _checkpoint_before(trainer: Trainer, trouble: int, reason: str) -> tuple[Path, TrainState]:
    """The newest good checkpoint from before the trouble; an older one each time that the run went back in vain. When
    nothing older is left (`keep_last` is small): once more from the same one, or the one that the step of the trouble began
    with. It may be what caused the trouble, but it does not hold that step's update."""
    state = trainer.state
    earlier = state.jumps[-1]["step"] if state.rollbacks and state.jumps else trouble
    try:
        return trainer.keeper.before(min(trouble, earlier), trouble, trouble + 1)
    except TubeletError as error:
        raise type(error)(f"Training does not go on: {reason}. {error.problem}", error.hint) from None


def _remember(trainer: Trainer, jump: dict[str, Any]) -> None:
    if trainer.world.speaks:
        trainer.run.check_current()  # the job that has taken over must not jump for our sake
        record_jump(trainer.run.folder, {**jump, "attempt": trainer.run.number})


def _begin_anew(trainer: Trainer, left_at: int) -> None:
    """Everything that knows of the steps up to `left_at` forgets those that were given up."""
    state = trainer.state
    trainer.last_applied = None
    trainer.guard = Guard(trainer.settings.guard, state)  # it knows what the run knew at that checkpoint
    trainer.keeper.doubtful_from = None
    trainer.view.rewind(left_at, state.step)
    if trainer.digest:
        trainer.digest = DigestFile(trainer.run.folder, state.step, trainer.world.speaks)
    trainer.stream = trainer.loader.batches(state.seen)
