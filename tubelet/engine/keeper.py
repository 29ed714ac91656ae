"""The run's checkpoints as the loop sees them: begin a save, publish it when its files are written, prune, go back."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from tubelet import dist, files
from tubelet.engine.checkpoint.folder import (
    choose,
    prune,
    published,
    read_best,
    set_rolled_back,
    step_of,
    write_best,
)
from tubelet.engine.checkpoint.format import folder_name, read_manifest
from tubelet.engine.checkpoint.place import StoreError, in_a_hurry, place
from tubelet.engine.checkpoint.save import Saver
from tubelet.engine.checkpoint.verifying import is_published
from tubelet.engine.guard import JUMPS
from tubelet.engine.protocol import Engine
from tubelet.engine.settings import EngineSettings
from tubelet.engine.state import TrainState
from tubelet.errors import CheckpointError
from tubelet.runs import Run

SAVING = "saving.json"
"""In the run's folder: how long a save of the last start took, so that the next one knows it before its own first."""


def target_of(settings: EngineSettings, run: Run) -> Path:
    """Where this run's checkpoints lie: `checkpoint.dir`, or the run's folder."""
    return place(settings.checkpoint.dir or run.folder, settings.checkpoint.storage)


def finish_going_back(run: Run, target: Path) -> list[str]:
    """What an attempt that was killed on its way back left undone: it had written down where it goes on, and not yet set
    aside the checkpoints after that place, of which the newest would be resumed. All ranks call it before they choose one.

    Returns a sentence for each that is set aside now. Such a checkpoint is of the attempt that went back, or an earlier one,
    and its state does not know of the jump.
    """
    def stale(jump: dict[str, Any], path: Path) -> bool:
        try:
            manifest = read_manifest(path)
        except StoreError:
            raise
        except CheckpointError:
            return False  # `choose` says what is wrong with it
        known, made = (manifest.get("state") or {}).get("jumps") or [], {key: jump[key] for key in ("step", "seen", "to")}
        return manifest.get("attempt", 0) <= jump["attempt"] and made not in known

    def act() -> list[str]:
        last = files.read_jsonl(run.folder / JUMPS)[-1:] if run.attempt is not None else []
        if not last or "attempt" not in last[0]:
            return []
        step = last[0]["step"]
        if not any(stale(last[0], path) for path in published(target) if step_of(path) > step):
            return []
        aside = set_rolled_back(target, step, before_move=run.check_current)
        return [f"checkpoint {path.name} was made before the run went back to step {step}: set aside." for path in aside]

    return dist.broadcast(dist.together(act))


class Keeper:
    """One a run; all ranks build it and call everything of it in step, unless it says otherwise."""

    def __init__(self, run: Run, settings: EngineSettings, engine: Engine, manifest: dict[str, Any]):
        self.run, self.settings, self.engine, self.manifest = run, settings, engine, manifest
        self.target = target_of(settings, run)
        self.saver = Saver(self.target, engine, settings.checkpoint, before_commit=run.check_current,
                           attempt=run.attempt.number if run.attempt else 0, claim=run.claim,
                           timeout_seconds=0.8 * settings.save_timeout_seconds)  # before the other ranks give up
        self.doubtful_from: int | None = None
        """The step from which on updates are in doubt: the newest checkpoint below it, or of it, is not pruned.
        None = all is well."""
        self.saved_step = -1
        self.saved_at = time.monotonic()
        self.longest_seconds = dist.broadcast(_saves_took(run) if engine.world.rank == 0 else 0.0)
        """What a save takes at most, from its beginning to its publication; before this start's first one, what it took the
        start before; 0 = unknown. Beside the checkpoints, not in them: equal runs have equal checkpoints."""
        self._longest_here = 0.0
        self._told: set[type] = set()
        if engine.world.speaks:
            _say_rare_milestones(settings)

    def resumed(self, state: TrainState) -> None:
        """The run goes on from its own checkpoint of `state.step`. If that one was judged the best only after it had been
        written (by a start that found it there, unevaluated), the record knows and the state in it does not."""
        self.saved_step = state.step
        self.doubtful_from = state.skipping_from if state.skipping_from >= 0 else None
        recorded = dist.broadcast(dist.together(lambda: read_best(self.target) if self.engine.world.rank == 0 else None))
        if recorded and recorded["step"] == state.step and self.settings.checkpoint.best is not None \
                and recorded["metric"] == self.settings.checkpoint.best.metric:
            state.best = {key: recorded[key] for key in ("metric", "value", "step")}

    def start(self, state: TrainState, average: Sequence[torch.Tensor] | None, total_steps: int) -> None:
        """Begin a checkpoint of `state`, between steps; one that is being written is published first. Returns when the
        state has been copied aside, or, written synchronously, when it is published."""
        if self.saved_step == state.step:
            return
        self.publish()
        if state.step > state.trouble_step and self.doubtful_from is None:
            state.rollbacks = 0  # beyond the trouble it last went back for
        extra = {**self.manifest, "state": asdict(state), "total_steps": total_steps}
        self.saver.start(state.step, list(average) if average is not None else None, extra)
        self.saved_step, self.saved_at, self._best = state.step, time.monotonic(), dict(state.best)
        if self.saver.in_flight is None:
            self._published()

    def name_best(self, state: TrainState) -> None:
        """The checkpoint of this step, begun before it was evaluated, is the best one."""
        self._best = dict(state.best)
        if self.saver.in_flight is None:
            dist.together(self._tidy)

    def ready(self) -> bool:
        """This rank's files are written. No communication."""
        return self.saver.in_flight is not None and self.saver.ready()

    def publish(self) -> bool:
        """Wait for the checkpoint that is being written and publish it; False when there is none. A failure on one rank is
        raised on all."""
        if self.saver.in_flight is None:
            return False
        self.saver.finish()
        self._published()
        return True

    def _published(self) -> None:
        took = self.saver.last_seconds
        self.longest_seconds = max(self.longest_seconds, took)
        if took > self._longest_here:
            self._longest_here = took
            if self.engine.world.rank == 0 and self.run.attempt is not None:
                with suppress(OSError):  # the checkpoint is safe, which counts
                    files.write_json(self.run.folder / SAVING, {"attempt": self.run.number, "longest_seconds": took})
        dist.together(self._tidy)

    def _tidy(self) -> None:
        """The checkpoint is safe by now: no trouble with others ends the run, except that they are another attempt's."""
        if self.engine.world.rank != 0:
            return
        try:
            with in_a_hurry():
                self._tidy_up()
        except (CheckpointError, OSError) as error:
            if type(error) not in self._told:
                self._told.add(type(error))
                print(f"warning: old checkpoints in {self.target} could not be tidied up; the new one is safe, and the next "
                      f"save tries again. {error if isinstance(error, CheckpointError) else error.strerror or error}",
                      flush=True)

    def _tidy_up(self) -> None:
        best, settings, protect = self._best, self.settings, []
        recorded = read_best(self.target) or {}
        if best and any(recorded.get(key) != best[key] for key in best):  # or a kill, or going back, came in between
            folder = self.target / folder_name(best["step"])
            try:
                write_best(self.target, folder, best["metric"], best["value"])
            except StoreError:
                raise  # it is not recorded yet and would be pruned
            except CheckpointError:
                if best["step"] == self.saved_step:
                    raise
        if self.doubtful_from is not None:  # where the run would go back to
            there = [path for path in published(self.target) if step_of(path) <= self.doubtful_from]
            protect = ([path for path in there if step_of(path) < self.doubtful_from] or there)[-1:]
        prune(self.target, keep_last=settings.keep_last, keep_every=settings.keep_every, protect=protect,
              keep_milestones=settings.keep_milestones, idle=self.saver.in_flight is None,
              before_delete=self.run.check_current)

    def before(self, *steps: int) -> tuple[Path, TrainState]:
        """The newest checkpoint that verifies and is below the first of `steps`, or else below the next one, and its state.
        Raises `CheckpointError` when there is none."""
        notes: list[str] = []
        for step in dict.fromkeys(steps):
            folder, notes = choose(self.target, before=step)
            if folder is not None:
                return folder, TrainState(**read_manifest(folder)["state"])
        raise CheckpointError(f"There is no checkpoint before step {steps[-1]} to go back to. {' '.join(notes)}".rstrip(),
                              "a smaller save_every, a smaller learning rate or a longer warm-up; the data of the steps "
                              f"is named in {self.run.folder / 'events.jsonl'}")

    def went_back(self, state: TrainState) -> list[str]:
        """Checkpoints after `state.step` are no longer this run's: they are set aside. Returns their names."""
        self.saved_step = state.step

        def rename() -> list[str]:
            if self.engine.world.rank != 0:
                return []
            self.run.check_current()
            return [f"step {step_of(path)}" if step_of(path) >= 0 else path.name
                    for path in set_rolled_back(self.target, state.step, before_move=self.run.check_current)]

        def best_is_gone() -> bool:
            best = state.best if self.engine.world.rank == 0 else {}
            return bool(best) and not is_published(self.target / folder_name(best["step"]))

        aside = dist.together(rename)
        if dist.broadcast(dist.together(best_is_gone)):
            state.best = {}  # pruned for the sake of one that is set aside now: the next evaluation is the best
        return aside

    def close(self) -> None:
        """End the writer; what is not published by now never is."""
        self.saver.close()


def _saves_took(run: Run) -> float:
    """Seconds of the longest save of the last start that saved; 0 when nobody knows."""
    try:
        took = float(json.loads((run.folder / SAVING).read_text())["longest_seconds"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return 0.0
    return took if 0 <= took < math.inf else 0.0


def _say_rare_milestones(settings: EngineSettings) -> None:
    """`keep_every` keeps what is saved, and saves nothing itself."""
    every, save_every = settings.keep_every, settings.save_every
    regular = settings.save_every_minutes is None and settings.checkpoint.best is None  # else there are other steps too
    if every and every % save_every and regular:
        print(f"note: keep_every={every} is no multiple of save_every={save_every}, so only one checkpoint in "
              f"{math.lcm(every, save_every)} steps is kept for good. Try: "
              f"keep_every={-(-every // save_every) * save_every}", flush=True)
