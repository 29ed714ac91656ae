"""THE loop. Both programs run it; what differs between them is passed in.

Legend: G global batch, m micro-batch, n micro-batches per rank and step, W ranks: G = n * m * W. `state.step` counts
global batches consumed; learning rate, evaluation, saving and every x-axis are functions of it.

Between two steps all ranks agree in one small sum (`agree`): has anybody been asked to leave, failed to read, finished
writing, and what was the mean loss. Everything else that a step costs beside forward, backward and update happens at log
steps.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from tubelet import dist, first_error
from tubelet.engine.card import last_results
from tubelet.engine.checkpoint.load import FROM_SETTINGS, restore
from tubelet.engine.deadline import Deadline
from tubelet.engine.digest import DigestFile
from tubelet.engine.ema import ShardedEma
from tubelet.engine.evaluate import Evaluation, need_metric, to_device
from tubelet.engine.guard import Guard, LossProbe, poisoned
from tubelet.engine.keeper import Keeper
from tubelet.engine.phases import Phases
from tubelet.engine.protocol import Batch, Engine, EvalLoader, Loader, StepResult
from tubelet.engine.rollback import go_back
from tubelet.engine.schedule import learning_rate
from tubelet.engine.settings import EngineSettings
from tubelet.engine.signals import StopFlag, Stopped
from tubelet.engine.skipped import tell_skipped
from tubelet.engine.state import Beginning, TrainState
from tubelet.engine.trackers import Trackers
from tubelet.engine.view import View
from tubelet.engine.watchdog import Watchdog
from tubelet.errors import EXIT_INTERRUPTED, EXIT_LOST, EXIT_PREEMPTED, DataError
from tubelet.runs import Run
from tubelet.seeding import hash_seed, seed_torch

__all__ = ["Beginning", "Stopped", "TrainState", "Trainer"]


@dataclass
class Verdict:
    """What all ranks do at a step boundary, decided by all together."""

    leave: int = 0
    """Exit code to leave with after saving; 0 = go on."""
    save: bool = False
    publish: bool = False
    """The checkpoint in flight is written on all ranks."""
    back: str | None = None
    """Why to go back to an earlier checkpoint."""
    reason: str = ""


class Trainer:
    """Owns the state of a run in progress and the acts of a step."""

    def __init__(self, settings: EngineSettings, *, run: Run, world: dist.World, engine: Engine, objective: Any,
                 loader: Loader, micro_batch_size: int, total_steps: int, beginning: Beginning, manifest: dict[str, Any],
                 eval_loaders: Sequence[EvalLoader] = (), flops_per_sample: float = 0.0, input_shape: Sequence[int] = (),
                 on_eval: Callable[[Any, int, Trackers], None] | None = None, phases: Phases | None = None,
                 stop: StopFlag | None = None):
        self.settings, self.run, self.world, self.engine, self.objective = settings, run, world, engine, objective
        self.loader, self.on_eval = loader, on_eval
        self.total_steps, self.input_shape, self.micro_batch_size = total_steps, input_shape, micro_batch_size
        self.accumulation = settings.global_batch_size // (micro_batch_size * world.size)
        self.beginning, self.state = beginning, beginning.state or TrainState()
        self.phases, self.stop = phases or Phases(), stop
        self.ema = ShardedEma(engine, settings.ema) if settings.ema else None
        self.evaluation = Evaluation(engine, objective, eval_loaders, self.ema, self.phases.progress)
        self.guard, self.probe = Guard(settings.guard, self.state), LossProbe(engine.device)
        self.keeper = Keeper(run, settings, engine, manifest)
        self.deadline = Deadline(settings, speaks=world.speaks)
        self.view = View(settings, run=run, world=world, engine=engine, phases=self.phases, total_steps=total_steps,
                         flops_per_sample=flops_per_sample, manifest=manifest, clips=len(input_shape) == 4)
        self.trouble: Exception | None = None
        self.results: dict[str, float] = {}

    def fit(self) -> dict[str, float]:
        """Train until `total_steps`; returns the last evaluation. All ranks call it. Raises `Stopped` on a signal."""
        settings, state = self.settings, self.state
        with self.watched() as stop:
            self.stop = stop
            self.begin()
            self.rehearse()
            self.open()
            stop.raise_if_asked(together=True)
            stop.arm(settings.preempt_grace_seconds)  # from here on there are steps to lose
            while True:
                batches = self.fetch()  # nothing at the end
                verdict = self.agree(stop)  # all ranks decide together, at a step boundary
                if verdict.back:
                    go_back(self, verdict.back)  # to the last good checkpoint, leaving out the data since
                    continue
                if verdict.publish:
                    self.publish()
                if self.due(settings.eval_every) and not verdict.leave and not self.evaluate():
                    verdict = self.agree(stop)  # it was given up, because somebody asked to leave meanwhile
                if verdict.leave or self.due(settings.save_every) or verdict.save and state.step < self.total_steps:
                    self.save()
                if verdict.leave:
                    self.leave(verdict)
                if state.step == self.total_steps:
                    break
                result = self.train_step(batches)  # forward, backward n times; clip, update
                self.advance(batches, result)  # state, EMA, ledger
                if state.step % settings.log_every == 0 or state.step == self.total_steps:
                    self.log(result)
            self.finish()
        return self.results

    # ------------------------------------------------------------------------------- the acts, in the order of fit

    def begin(self) -> None:
        """Put the weights in place. The program decided which, in this order: 1 the run's own newest verified
        checkpoint; 2 `init.from_run`, another run's weights, moments, EMA and position; 3 `init.weights`, weights only
        (already in the model); 4 from scratch (already in the model)."""
        for note in self.beginning.notes if self.world.speaks else ():
            print(note, flush=True)
        if self.beginning.folder is not None:
            with self.phases("restore"), dist.patience("save"):
                average = self.ema.tensors() if self.ema else None
                restored = restore(self.beginning.folder, self.engine, average, keep=FROM_SETTINGS)
            if self.world.speaks:
                counts = {name: getattr(self.state, name) for name in ("step", "seen", "skipped_steps")}
                restored.show(self.beginning.kind, self.beginning.folder, counts)
                self.run.event(self.beginning.kind, folder=str(self.beginning.folder), **counts)
        if self.beginning.kind == "resume":
            self.keeper.resumed(self.state)

    def rehearse(self) -> None:
        """One forward pass on zeros, so that shape errors and out-of-memory show before the first batch is read."""
        if not self.input_shape:
            return
        size = self.micro_batch_size
        batch = {"ids": torch.arange(size), "pixels": torch.zeros(size, *self.input_shape, dtype=torch.uint8),
                 "labels": torch.zeros(size, dtype=torch.int64), "valid": torch.ones(size, dtype=torch.bool)}
        self.engine.eval()
        with torch.no_grad():
            measured = self.objective.evaluate(self.engine.model, to_device(batch, self.engine.device))
        self.engine.train()
        if self.settings.checkpoint.best and self.evaluation.loaders:
            need_metric(self.settings.checkpoint.best, self.evaluation.names(measured))

    def open(self) -> None:
        """Logs and data; what was logged after the restored step is dropped, so no curve overlaps."""
        self.view.open(self.state)
        if self.state.evaluated_step == self.state.step:  # by an earlier start: it is not evaluated again
            self.results = dist.broadcast(dist.together(
                lambda: last_results(self.run.folder, self.state.step) if self.world.speaks else {}))
        for note in self.deadline.notes(self.keeper.longest_seconds) if self.world.speaks else ():
            print(note, flush=True)
        self.digest = DigestFile(self.run.folder, self.state.step, self.world.speaks) if self.settings.digest else None
        self.loader.give_up = self.to_leave
        self.stream = self.loader.batches(self.state.seen)
        self.phases.goes_on(self.state.step)

    def fetch(self) -> list[Batch]:
        """This rank's n micro-batches of the next step. A reader's failure is kept for `agree`, so that no rank hangs."""
        if self.state.step == self.total_steps:
            return []
        with self.phases("data"):
            try:
                return [next(self.stream) for _ in range(self.accumulation)]
            except StopIteration:  # given up: this rank was asked to leave while it waited, which `agree` tells the others
                return []
            except Exception as error:  # whatever it is: the others must hear of it, and what was trained is saved
                self.trouble = error
                return []

    def agree(self, stop: StopFlag) -> Verdict:
        """What to do at this boundary, equal on all ranks: the one collective that a step costs beside training."""
        loss = self.probe.read() if self.last_applied is not None else 0.0
        bad, minutes = not math.isfinite(loss), self.settings.save_every_minutes
        speaks, late = self.world.speaks, self.late()
        old = speaks and bool(minutes) and time.monotonic() - self.keeper.saved_at > 60 * (minutes or 0)
        asked, interrupted, failed, late, old, ready, nonfinite, total = dist.sums([
            float(stop.code == EXIT_PREEMPTED), float(stop.code == EXIT_INTERRUPTED), float(self.trouble is not None),
            float(late), float(old), float(self.keeper.ready()), float(bad), 0.0 if bad else loss])
        verdict = Verdict(save=bool(old), publish=ready == self.world.size)
        if self.last_applied is not None:
            mean = math.nan if nonfinite else total / self.world.size
            verdict.back = self.guard.judge(self.state.step - 1, mean, self.last_applied)
            self.keeper.doubtful_from = self.guard.first_step if verdict.back else self.guard.doubtful_from
            self.last_applied = None
        if failed:
            if self.state.step and not verdict.back:  # a checkpoint of step 0 would only pin the settings
                self.save()
            self.publish()
            dist.together(self.raise_trouble)
        if asked or interrupted or late:
            verdict.leave = EXIT_INTERRUPTED if interrupted else EXIT_PREEMPTED
            verdict.reason = stop.reason or ("a signal on another rank" if asked or interrupted else self.deadline.reason)
        return verdict

    def to_leave(self) -> bool:
        """Whether to wait for no batch and stop evaluating. A job trains one step, however soon it ends: see `due`."""
        return bool(self.stop and self.stop.code) or self.state.step > self.view.first_step and self.late()

    def late(self) -> bool:
        """On the rank that speaks: whether the job ends so soon that it is time to save and leave."""
        return self.world.speaks and self.deadline.due(self.keeper.longest_seconds, self.view.step_seconds)

    last_applied: bool | None = None  # of the step that `agree` has not judged yet

    def raise_trouble(self) -> None:
        if self.trouble is not None:
            raise self.trouble

    def train_step(self, batches: Sequence[Batch]) -> StepResult:
        """One update from one global batch. Random numbers depend on (seed, step, micro-batch) alone, not on ranks."""
        first = self.world.rank * self.accumulation
        self.losses = []
        with self.phases("compute"), self.view.profiler.step(self.state.step - self.view.first_step):
            for number, batch in enumerate(batches):
                seed_torch(hash_seed(self.settings.seed, self.state.step, first + number), self.engine.device)
                with self.view.own_time():
                    output = self.objective(self.engine.model, to_device(batch, self.engine.device))
                self.engine.backward(poisoned(output["loss"]))
                self.view.meter.add(output)
                self.losses.append(output["loss"].detach())
            self.lr = learning_rate(self.state.step, self.settings.schedule, self.settings.optimizer.lr, self.total_steps)
            self.probe.put(self.losses)  # before the step, which waits for the gradient norm: reading it then costs no wait
            result = self.engine.step(self.lr)
        return result

    def advance(self, batches: Sequence[Batch], result: StepResult) -> None:
        """The step is done: count it. A skipped update consumed its batch all the same; the EMA is left alone then."""
        state = self.state
        if not result.applied:
            tell_skipped(self, batches)
        state.step += 1
        state.seen += self.settings.global_batch_size
        state.skipped_steps += not result.applied
        self.last_applied = result.applied
        if self.ema and result.applied:
            self.ema.update(state.step - state.skipped_steps)
        for batch in batches:
            self.loader.consume(batch)
        if self.digest:
            self.digest.write(state.step, batches)
        self.phases.moved(state.step)
        self.view.advance(state, batches)

    def log(self, result: StepResult) -> None:
        """Scalars and a console line (all ranks participate: sums over ranks, and the bad-sample budget)."""
        with self.phases("log"):
            state = self.state
            values = {"train/lr": self.lr, "train/grad_norm": float(result.grad_norm),
                      "train/skipped_steps": state.skipped_steps, "train/epoch": state.seen / self.loader.size,
                      "samples_seen": state.seen}
            try:
                values |= self.loader.audit(state.seen)
            except DataError as error:  # too many bad samples: `agree` has this step judged and saved, then raises it
                self.trouble = error
            self.view.log(state, values)

    def due(self, every: int | None) -> bool:
        """Whether something that happens every so many steps happens now; at the end `finish` does everything."""
        return bool(every) and 0 < self.state.step < self.total_steps and self.state.step % (every or 1) == 0

    def evaluate(self) -> bool:
        """All validation sets, with the weights and with their average (all ranks participate). False: given up on all
        ranks, because one was asked to leave or the job ends; a job that goes on from this step evaluates anew."""
        if self.state.evaluated_step == self.state.step:
            return True
        with self.phases("evaluate"), dist.patience("evaluate"):
            try:
                results = self.evaluation.run(self.to_leave)
            except DataError:  # on all ranks alike: the validation set is to blame, not what was trained
                self.keep_all()
                raise
            if self.on_eval and results is not None:
                self.on_eval(self.engine.model, self.state.step, self.view.trackers)
        if results is None:
            return False
        self.state.evaluated_step, self.results = self.state.step, results
        self.view.evaluated(self.state, results)
        self.remember_best(results)
        return True

    def remember_best(self, results: dict[str, float]) -> None:
        """`checkpoint.best`: an evaluation better than all before is saved at once, and kept."""
        wanted, best = self.settings.checkpoint.best, self.state.best
        if wanted is None or not results:
            return
        if wanted.metric not in results:
            self.keep_all()  # the name was wrong, not what was trained
            need_metric(wanted, results)
        value = results[wanted.metric]
        if not math.isfinite(value):
            return  # nothing would ever be better
        if best and best.get("metric") == wanted.metric:
            better = value > best["value"] if wanted.mode == "max" else value < best["value"]
            if not better:
                return
        self.state.best = {"metric": wanted.metric, "value": value, "step": self.state.step}
        if self.keeper.saved_step == self.state.step:  # by a job that left before it could evaluate
            self.keeper.name_best(self.state)
        self.save()

    def save(self) -> None:
        """Begin a checkpoint of this step; it is published now, or at a later boundary when its files are written (all
        ranks participate; a failure on one is raised on all)."""
        step = self.state.step
        if self.keeper.saved_step == step:
            return
        with self.phases("save"), dist.patience("save"):
            started = time.perf_counter()
            self.keeper.start(self.state, self.ema.tensors() if self.ema else None, self.total_steps)
            self.view.saved(self.state, stall=time.perf_counter() - started, whole=self.keeper.saver.last_seconds
                            if self.keeper.saver.in_flight is None else None)

    def publish(self) -> None:
        """Publish the checkpoint that is being written, if there is one, then prune (all ranks participate)."""
        with self.phases("save"), dist.patience("save"):
            if self.keeper.publish():
                self.view.saved(self.state, whole=self.keeper.saver.last_seconds)

    def keep_all(self) -> None:
        """Save this step and wait until it is published."""
        self.save()
        self.publish()

    def leave(self, verdict: Verdict) -> None:
        """Save, wait for it, say so and stop on all ranks together."""
        self.publish()
        if self.stop:
            self.stop.saved()
        self.close()
        if self.world.speaks:
            restart = "the scheduler may restart it" if verdict.leave == EXIT_PREEMPTED else "start it again to go on"
            print(f"{verdict.reason}: saved at step {self.state.step}, leaving with exit code {verdict.leave}; {restart}",
                  flush=True)
            self.run.end("preempted", verdict.leave, step=self.state.step)
        self.view.end(self.state, self.results)
        dist.barrier()
        raise Stopped(verdict.leave, verdict.reason)

    def finish(self) -> None:
        """The last evaluation and checkpoint."""
        done = self.evaluate()
        self.keep_all()
        if not done and self.stop:
            self.leave(self.agree(self.stop))
        told = self.loader.summary()
        if told:
            self.view.console.say(told)
        self.close()
        if self.world.speaks:
            self.run.end("finished", 0, step=self.state.step, results=self.results)
        self.view.end(self.state, self.results)
        dist.barrier()

    def close(self) -> None:
        self.keeper.close()
        self.loader.close()

    def lost(self, sentence: str) -> None:
        """The watchdog is about to end this process: write down that this start failed, and why."""
        first_error.keep(self.run.folder, self.run.number, rank=self.world.rank, code=EXIT_LOST, error=sentence)
        self.run.end("failed", EXIT_LOST, error=sentence)  # of rank 0: another host may then go on with the run

    @contextmanager
    def watched(self) -> Iterator[StopFlag]:
        """The loop's surroundings: signals become a flag, and somebody looks on whether all ranks move."""
        settings, limits, share = self.settings, self.settings.watch.stall_seconds, 0.9  # before the collectives give up
        with ExitStack() as stack:
            stop = self.stop or stack.enter_context(StopFlag(settings.preempt_grace_seconds))
            dist.mark_waits(self.phases("wait"))
            stack.enter_context(Watchdog(
                self.phases, settings.watch, self.world, folder=self.run.folder, event=self.run.event, lost=self.lost,
                limits={"start": max(limits, share * settings.start_timeout_seconds),
                        "restore": share * settings.save_timeout_seconds, "save": share * settings.save_timeout_seconds,
                        "evaluate": share * settings.eval_timeout_seconds}))
            stack.enter_context(dist.patience("train"))
            yield stop
