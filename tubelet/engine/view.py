"""What a run shows while it trains: the trainer says what happened, this decides what is measured, written and printed.

Trackers (TensorBoard, JSON lines, W&B), the console, pictures of inputs, histograms, the profiler, time by phase and
goodput, the run card. Nothing here changes training. Methods that all ranks must call say so.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from tubelet import dist
from tubelet.engine import histograms
from tubelet.engine.card import CardFacts, write_card
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
                 total_steps: int, flops_per_sample: float, manifest: dict[str, Any], clips: bool = False):
        self.settings, self.run, self.world, self.engine, self.phases = settings, run, world, engine, phases
        self.total_steps, self.flops_per_sample, self.manifest = total_steps, flops_per_sample, manifest
        self.peak = settings.peak_tflops or peak_tflops(engine.device)
        self.meter = Meter(engine.device, world)
        self.profiler = Profiler(settings.log, run.folder, world, engine.device)
        self.unit = "clips" if clips else "images"
        parameters = sum(math.prod(shape) for shape in engine.shapes().values())
        name = torch.cuda.get_device_name(engine.device) if engine.device.type == "cuda" else "CPU"
        self.facts = CardFacts(manifest, parameters, flops_per_sample or None, world.size, name, total_steps, self.unit)
        self.first_step = 0
        self.step_seconds = 0.0
        self._slow = (-1, 0)  # rank, and at how many log steps in a row
        self.results: dict[str, float] = {}

    def open(self, state: TrainState) -> None:
        """All ranks call it. Logs; what was logged after the step that is restored goes, so no curve overlaps."""
        name, speaks = self.run.settings.name, self.world.speaks
        self.first_step = state.step
        self.trackers = dist.together(lambda: Trackers(
            self.run.folder, self.settings.log, step=state.step, enabled=speaks, name=name,
            config=self.manifest.get("config") or {}))
        self.console = Console(total=self.total_steps, step=state.step, enabled=speaks, title=name, unit=self.unit)
        self.goodput = Goodput(self.run, self.phases, first_step=state.step, enabled=speaks,
                               communication=self.profiler.communication_share)
        self._start_counting()
        self._card(state)

    def _start_counting(self) -> None:
        self.meter.reset()
        self._own, self._events = 0.0, []
        self._since, self._before = time.perf_counter(), self.phases.seconds()

    @contextmanager
    def own_time(self) -> Iterator[None]:
        """Around the forward pass: time in which this rank waits for no other (but for ZeRO-3's gathering), which, with what
        it waits for its data, tells a slow rank from those that wait for it."""
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
        """A step is done. All ranks call it."""
        settings = self.settings
        self.meter.steps += 1
        self.meter.samples += settings.global_batch_size
        self.console.advance(state.step)
        log, number = settings.log, state.step - self.first_step
        if self.world.speaks and (number == 1 or (log.images_every and state.step % log.images_every == 0)):
            self.trackers.images(state.step, "inputs", batches[0]["pixels"])
        if log.histograms_every and state.step % log.histograms_every == 0:
            with self.phases("log"):
                self.trackers.histograms(state.step, histograms.of_weights(self.engine))

    def log(self, state: TrainState, values: dict[str, float]) -> None:
        """Scalars and a console line. All ranks call it."""
        steps = max(self.meter.steps, 1)
        spent = {name: value - self._before.get(name, 0.0) for name, value in self.phases.seconds().items()}
        own = self._own + sum(first.elapsed_time(last) for first, last in self._events) / 1000
        self.meter.data_seconds = spent["data"]
        self.meter.other_seconds = spent["save"] + spent["evaluate"] + spent["restore"]
        values = self.meter.read(self.flops_per_sample, self.peak) | values
        self.step_seconds = values["perf/step_time"]
        waited = spent["data"] / steps  # for its own data: the others wait for it then
        found, slow = spread(own / steps + waited, waited, self.world, self.settings.watch.straggler_ratio)
        values |= found
        self.trackers.write(state.step, values)
        self.console.report(state.step, values)
        self._tell_slow(state, int(found["perf/slowest_rank"]), slow)
        self.goodput.write(state.step, least_seconds=60)
        self._start_counting()

    def _tell_slow(self, state: TrainState, rank: int, sentence: str | None) -> None:
        """A rank that is slow at three log steps in a row is named; once, until another is or it has recovered."""
        self._slow = (rank, self._slow[1] + 1 if sentence and self._slow[0] == rank else int(bool(sentence)))
        if self._slow[1] == 3 and self.world.speaks and sentence:
            self.console.say(f"warning: {sentence}")
            self.run.event("straggler", step=state.step, rank=rank, what=sentence)

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
            self._card(state)

    def rewind(self, step: int, to: int) -> None:
        """The run went back from `step` to `to`."""
        self.goodput.rewind(step, to)
        self.trackers.rewind(to)
        self.console.rewind(to)
        self._start_counting()

    def _card(self, state: TrainState, final: bool = False) -> None:
        if self.world.speaks:
            self.goodput.write(state.step)
            report = self.goodput.report()
            write_card(self.run, self.facts, step=state.step, results=self.results, goodput=report, final=final)
            if not final and state.step > self.first_step:
                self.trackers.write(state.step, report.scalars())

    def end(self, state: TrainState, results: dict[str, float]) -> None:
        """The job ends, saved: the last accounts. Rank 0 takes a second for the plots."""
        self.results = results or self.results
        self.profiler.close()
        self._card(state, final=True)
        self.console.close()
        if self.world.speaks:
            self.goodput.report().show()
        self.trackers.close()
