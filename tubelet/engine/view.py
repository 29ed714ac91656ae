"""What a run shows while it trains: the trainer says what happened, this decides what is measured, written and printed.

Trackers (TensorBoard, JSON lines, W&B), the console, pictures of inputs, histograms, the profiler, time by phase and
goodput, the run card. Nothing here changes training. Methods that all ranks must call say so.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from tubelet import dist
from tubelet.engine.card import write_card
from tubelet.engine.console import Console
from tubelet.engine.goodput import Goodput
from tubelet.engine.metrics import Meter, peak_tflops
from tubelet.engine.phases import Phases
from tubelet.engine.profiler import Profiler
from tubelet.engine.protocol import Batch, Engine
from tubelet.engine.settings import EngineSettings
from tubelet.engine.state import TrainState
from tubelet.engine.stragglers import spread
from tubelet.engine.trackers import Trackers
from tubelet.runs import Run


class View:
    """One a run and rank; only rank 0 writes and speaks."""

    def __init__(self, settings: EngineSettings, *, run: Run, world: dist.World, engine: Engine, phases: Phases,
                 total_steps: int, flops_per_sample: float, manifest: dict[str, Any]):
        self.settings, self.run, self.world, self.engine, self.phases = settings, run, world, engine, phases
        self.total_steps, self.flops_per_sample, self.manifest = total_steps, flops_per_sample, manifest
        self.peak = settings.peak_tflops or peak_tflops(engine.device)
        self.meter = Meter(engine.device, world)
        self.profiler = Profiler(settings.log, run.folder, world, engine.device)
        self.goodput = Goodput(run, phases)
        self.first_step = self.lost = 0
        self.step_seconds = 0.0
        self.results: dict[str, float] = {}

    def open(self, state: TrainState) -> None:
        """Logs; what was logged after the step that is restored goes, so no curve overlaps."""
        name, speaks = self.run.settings.name, self.world.speaks
        self.first_step = state.step
        self.trackers = Trackers(self.run.folder, self.settings.log, step=state.step, enabled=speaks, name=name,
                                 config=self.manifest.get("config") or {})
        self.console = Console(total=self.total_steps, step=state.step, enabled=speaks, title=name)
        self._start_counting()
        self._card(state)

    def _start_counting(self) -> None:
        self.meter.reset()
        self._own, self._events = 0.0, []
        self._since, self._before = time.perf_counter(), self.phases.seconds()

    @contextmanager
    def own_time(self) -> Iterator[None]:
        """Around the forward pass: time in which this rank waits for no other (but for ZeRO-3's gathering), which is what
        tells a slow rank from those that wait for it."""
        if self.engine.device.type == "cuda":
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            yield
            last.record()
            self._events.append((first, last))  # read when logging, which waits for the device anyway
            return
        started = time.perf_counter()
        yield
        self._own += time.perf_counter() - started

    def advance(self, state: TrainState, batches: Sequence[Batch]) -> None:
        """A step is done."""
        settings = self.settings
        self.meter.steps += 1
        self.meter.samples += settings.global_batch_size
        self.console.advance(state.step)
        log, number = settings.log, state.step - self.first_step
        if self.world.speaks and (number == 1 or (log.images_every and state.step % log.images_every == 0)):
            self.trackers.images(state.step, "inputs", batches[0]["pixels"])
        if log.histograms_every and state.step % log.histograms_every == 0:
            self._histograms(state.step)

    def _histograms(self, step: int) -> None:
        """One parameter after the other, gathered on rank 0. All ranks call it."""
        with self.phases("log"):
            for name, value in self.engine.full_state_dict():
                if value is not None and value.is_floating_point():
                    self.trackers.histograms(step, {f"weights/{name}": value})

    def log(self, state: TrainState, values: dict[str, float]) -> None:
        """Scalars and a console line. All ranks call it."""
        steps = max(self.meter.steps, 1)
        spent = {name: value - self._before.get(name, 0.0) for name, value in self.phases.seconds().items()}
        own = self._own + sum(first.elapsed_time(last) for first, last in self._events) / 1000
        self.meter.data_seconds = spent["data"]
        self.meter.other_seconds = spent["save"] + spent["evaluate"] + spent["restore"]
        values = self.meter.read(self.flops_per_sample, self.peak) | values
        self.step_seconds = values["perf/step_time"]
        found, slow = spread(own / steps, spent["data"] / steps, self.world, self.settings.watch.straggler_ratio)
        values |= found
        self.trackers.write(state.step, values)
        self.console.report(state.step, values)
        if slow:
            self.console.say(f"warning: {slow}")
        self._start_counting()

    def evaluated(self, state: TrainState, results: dict[str, float]) -> None:
        """The results of an evaluation."""
        if results:
            self.results = results
            self.trackers.write(state.step, results)
            shown = "  ".join(f"{name} {value:.4f}" for name, value in results.items())
            self.console.say(f"step {state.step}  {shown}")
        self._card(state)

    def saved(self, state: TrainState, *, stall: float | None = None, whole: float | None = None) -> None:
        """A save was begun (`stall`: seconds that training stood still) or published (`whole`: from start to end)."""
        values = {"ckpt/stall_seconds": stall, "ckpt/save_seconds": whole}
        self.trackers.write(state.step, {name: value for name, value in values.items() if value is not None})
        self.trackers.flush()
        if whole is not None:
            self._account(state)
            self._card(state)

    def rewind(self, state: TrainState, lost: int) -> None:
        """The run went back to `state`, `lost` steps earlier."""
        self.lost += lost
        self.trackers.rewind(state.step)
        self.console.advance(state.step)
        self._start_counting()

    def _account(self, state: TrainState) -> None:
        if self.world.speaks:
            self.goodput.write(state.step, redone_steps=self.lost, communication=self.profiler.communication_share())

    def _card(self, state: TrainState) -> None:
        if self.world.speaks:
            write_card(self.run, manifest=self.manifest, state=state, results=self.results, goodput=self.goodput)

    def end(self, state: TrainState, results: dict[str, float]) -> None:
        """The job ends: the last accounts."""
        self.results = results or self.results
        self._account(state)
        if self.world.speaks:
            self.console.say(self.goodput.text())
        self._card(state)
        self.console.close()
        self.trackers.close()
