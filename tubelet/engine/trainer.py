"""THE loop. Both programs run it; what differs between them is passed in.

Legend: G global batch, m micro-batch, n micro-batches per rank and step, W ranks: G = n * m * W. `state.step` counts
global batches consumed; learning rate, evaluation, saving and every x-axis are functions of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from tubelet import dist
from tubelet.engine.checkpoint.folder import prune
from tubelet.engine.checkpoint.load import FROM_SETTINGS, restore
from tubelet.engine.checkpoint.save import save as save_checkpoint
from tubelet.engine.digest import DigestFile
from tubelet.engine.ema import ShardedEma
from tubelet.engine.evaluate import evaluate, to_device
from tubelet.engine.metrics import Console, Meter, Scalars, peak_tflops
from tubelet.engine.protocol import Batch, Engine, EvalLoader, Loader, StepResult
from tubelet.engine.schedule import learning_rate
from tubelet.engine.settings import EngineSettings
from tubelet.engine.signals import StopFlag
from tubelet.errors import EXIT_PREEMPTED, TubeletError
from tubelet.runs import Run
from tubelet.seeding import hash_seed


@dataclass
class TrainState:
    """Everything beside weights, moments and EMA that is needed to go on. Saved in every checkpoint's manifest."""

    step: int = 0
    """Global batches consumed and not rolled back."""
    seen: int = 0
    """Samples consumed by finished steps: the position in the data."""
    skipped_steps: int = 0
    """Batches consumed without an update, because the gradient was not finite."""


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


class Stopped(Exception):  # not an error: saved and asked to leave
    """Raised on all ranks after a signal, once everything is saved."""

    def __init__(self, code: int, reason: str):
        super().__init__(reason)
        self.code, self.reason = code, reason


class Trainer:
    """Owns the state of a run in progress and the acts of a step."""

    def __init__(self, settings: EngineSettings, *, run: Run, world: dist.World, engine: Engine, objective: Any,
                 loader: Loader, micro_batch_size: int, total_steps: int, beginning: Beginning, manifest: dict[str, Any],
                 eval_loaders: Sequence[EvalLoader] = (), flops_per_sample: float = 0.0, input_shape: Sequence[int] = (),
                 on_eval: Callable[[Any, int, Scalars], None] | None = None):
        self.settings, self.run, self.world, self.engine, self.objective = settings, run, world, engine, objective
        self.loader, self.eval_loaders, self.on_eval = loader, eval_loaders, on_eval
        self.total_steps, self.flops_per_sample, self.input_shape = total_steps, flops_per_sample, input_shape
        self.micro_batch_size = micro_batch_size
        self.accumulation = settings.global_batch_size // (micro_batch_size * world.size)
        self.beginning, self.manifest = beginning, manifest
        self.state = beginning.state or TrainState()
        self.ema = ShardedEma(engine, settings.ema.decay) if settings.ema else None
        self.peak = settings.peak_tflops or peak_tflops(engine.device)
        self.meter = Meter(engine.device, world)
        self.trouble: TubeletError | None = None
        self.saved_step, self.saved_at = -1, time.monotonic()
        self.results: dict[str, float] = {}

    def fit(self) -> dict[str, float]:
        """Train until `total_steps`; returns the last evaluation. All ranks call it. Raises `Stopped` on a signal."""
        settings, state = self.settings, self.state
        self.begin()
        self.rehearse()
        self.open_logs()
        stream = self.loader.batches(state.seen)
        with StopFlag(settings.preempt_grace_seconds) as stop:
            while state.step < self.total_steps:
                batches = self.fetch(stream)
                leave, save_now = self.agree(stop)  # all ranks decide together, at a step boundary
                if save_now or leave:
                    self.save()
                if leave:
                    self.leave(leave, stop.reason)
                result = self.train_step(batches)  # forward, backward n times; clip, update
                self.advance(batches, result)  # state, EMA, ledger
                if state.step % settings.log_every == 0 or state.step == self.total_steps:
                    self.log(result)
                if self.due(settings.eval_every):
                    self.evaluate()
                if self.due(settings.save_every):
                    self.save()
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
            average = self.ema.tensors() if self.ema else None
            restored = restore(self.beginning.folder, self.engine, average, keep=FROM_SETTINGS)  # weight decay may change
            if self.world.speaks:
                restored.show(self.beginning.kind, self.beginning.folder, asdict(self.state))
                self.run.event(self.beginning.kind, folder=str(self.beginning.folder), **asdict(self.state))
        if self.beginning.kind == "resume":
            self.saved_step = self.state.step

    def rehearse(self) -> None:
        """One forward pass on zeros, so that shape errors and out-of-memory show before the first batch is read."""
        if not self.input_shape:
            return
        size = self.micro_batch_size
        batch = {"ids": torch.arange(size), "pixels": torch.zeros(size, *self.input_shape, dtype=torch.uint8),
                 "labels": torch.zeros(size, dtype=torch.int64), "valid": torch.ones(size, dtype=torch.bool)}
        self.engine.eval()
        with torch.no_grad():
            self.objective.evaluate(self.engine.model, to_device(batch, self.engine.device))
        self.engine.train()

    def open_logs(self) -> None:
        """Scalars, digest and console; what was logged after the restored step is dropped, so no curve overlaps."""
        step, speaks = self.state.step, self.world.speaks
        self.scalars = Scalars(self.run.folder, step=step, enabled=speaks)
        self.digest = DigestFile(self.run.folder, step, speaks) if self.settings.digest else None
        self.console = Console(total=self.total_steps, step=step, enabled=speaks, title=self.run.settings.name)
        self.meter.reset()

    def fetch(self, stream: Iterator[Batch]) -> list[Batch]:
        """This rank's n micro-batches of the next step. A reader's failure is kept for `agree`, so that no rank hangs."""
        started = time.perf_counter()
        try:
            return [next(stream) for _ in range(self.accumulation)]
        except TubeletError as error:
            self.trouble = error
            return []
        finally:
            self.meter.data_seconds += time.perf_counter() - started

    def agree(self, stop: StopFlag) -> tuple[int, bool]:
        """(exit code to leave with or 0, whether to save now), equal on all ranks; a few bytes over the network."""
        minutes = self.settings.save_every_minutes
        due = bool(minutes) and self.world.speaks and time.monotonic() - self.saved_at > 60 * (minutes or 0)
        code, trouble, save_now = dist.maxima([float(stop.code), float(self.trouble is not None), float(due)])
        if trouble:
            self.save()
            dist.together(self.raise_trouble)
        return int(code), bool(save_now)

    def raise_trouble(self) -> None:
        if self.trouble is not None:
            raise self.trouble

    def train_step(self, batches: Sequence[Batch]) -> StepResult:
        """One update from one global batch. Random numbers depend on (seed, step, micro-batch) alone, not on ranks."""
        first = self.world.rank * self.accumulation
        for number, batch in enumerate(batches):
            torch.manual_seed(hash_seed(self.settings.seed, self.state.step, first + number))
            output = self.objective(self.engine.model, to_device(batch, self.engine.device))
            self.engine.backward(output["loss"])
            self.meter.add(output)
        self.lr = learning_rate(self.state.step, self.settings.schedule, self.settings.optimizer.lr, self.total_steps)
        return self.engine.step(self.lr)

    def advance(self, batches: Sequence[Batch], result: StepResult) -> None:
        """The step is done: count it. A skipped update consumed its batch all the same; the EMA is left alone then."""
        state = self.state
        state.step += 1
        state.seen += self.settings.global_batch_size
        state.skipped_steps += not result.applied
        if self.ema and result.applied:
            self.ema.update()
        for batch in batches:
            self.loader.consume(batch)
        if self.digest:
            self.digest.write(state.step, batches)
        self.meter.steps += 1
        self.meter.samples += self.settings.global_batch_size
        self.console.advance(state.step)

    def log(self, result: StepResult) -> None:
        """Scalars and a console line (all ranks participate: sums over ranks, and the bad-sample budget)."""
        state = self.state
        values = self.meter.read(self.flops_per_sample, self.peak)
        values |= {"train/lr": self.lr, "train/grad_norm": float(result.grad_norm),
                   "train/skipped_steps": state.skipped_steps,
                   "train/epoch": state.seen / self.loader.size, "samples_seen": state.seen}
        values |= self.loader.audit(state.seen)
        self.scalars.write(state.step, values)
        self.console.report(state.step, values)
        self.meter.reset()

    def due(self, every: int | None) -> bool:
        return bool(every) and self.state.step % (every or 1) == 0 and self.state.step < self.total_steps

    def evaluate(self) -> None:
        """All validation sets, with the weights and with their average (all ranks participate)."""
        started = time.perf_counter()
        results = self.evaluate_weights("val")
        if self.ema:
            with self.ema.swapped():
                results |= self.evaluate_weights("val_ema")
        if self.on_eval:
            self.on_eval(self.engine.model, self.state.step, self.scalars)
        if results:
            self.scalars.write(self.state.step, results)
            shown = "  ".join(f"{name} {value:.4f}" for name, value in results.items())
            self.console.say(f"step {self.state.step}  {shown}")
        self.results = results
        self.meter.other_seconds += time.perf_counter() - started

    def evaluate_weights(self, prefix: str) -> dict[str, float]:
        results = {}
        for loader in self.eval_loaders:
            group = prefix if len(self.eval_loaders) == 1 else f"{prefix}/{loader.name}"
            found = evaluate(self.engine, self.objective, loader)
            results |= {f"{group}/{name}": value for name, value in found.items()}
        return results

    def save(self) -> None:
        """Publish a checkpoint of this step, then prune (all ranks participate; a failure on one is raised on all)."""
        if self.saved_step == self.state.step:
            return
        started = time.perf_counter()
        extra = {**self.manifest, "state": asdict(self.state), "total_steps": self.total_steps}
        save_checkpoint(self.run.folder, self.engine, step=self.state.step, ema=self.ema.tensors() if self.ema else None,
                        extra=extra, before_commit=self.run.check_current)
        dist.together(self.prune)
        self.saved_step, self.saved_at = self.state.step, time.monotonic()
        seconds = time.perf_counter() - started
        self.meter.other_seconds += seconds
        self.scalars.write(self.state.step, {"ckpt/save_seconds": seconds})
        self.scalars.flush()

    def prune(self) -> None:
        if self.world.speaks:
            prune(self.run.folder, keep_last=self.settings.keep_last, keep_every=self.settings.keep_every,
                  before_delete=self.run.check_current)

    def leave(self, code: int, reason: str) -> None:
        """Everything is saved: say so and stop on all ranks together."""
        self.close()
        if self.world.speaks:
            restart = "the scheduler may restart it" if code == EXIT_PREEMPTED else "start it again to go on"
            print(f"{reason or 'a signal on another rank'}: saved at step {self.state.step}, leaving with exit code "
                  f"{code}; {restart}", flush=True)
            self.run.end("preempted", code, step=self.state.step)
        dist.barrier()
        raise Stopped(code, reason)

    def finish(self) -> None:
        """The last evaluation and checkpoint."""
        self.evaluate()
        self.save()
        told = self.loader.summary()
        if told:
            self.console.say(told)
        self.close()
        if self.world.speaks:
            self.run.end("finished", 0, step=self.state.step, results=self.results)
        dist.barrier()

    def close(self) -> None:
        self.console.close()
        self.scalars.close()
        self.loader.close()
