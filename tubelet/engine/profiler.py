"""torch's profiler: a window of steps that a person asks for, and a light look at one step in many for communication.

Rank 0 alone is profiled: a trace is tens of megabytes, and one rank waits for the others in the same collectives. Beginning
and ending a profiled step waits for the GPU; other steps are not touched.

    profile/step-*.trace.json.gz     the window, for chrome://tracing or ui.perfetto.dev
    profile/step-*.operators.txt     its most expensive operators
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from tubelet.dist import World
from tubelet.engine.settings import LogSettings

Interval = tuple[float, float]
"""[begin, end) in any one unit."""

_NOTHING = nullcontext()


class Profiler:
    """Wraps every training step (`with profiler.step(n):`); rank 0 only, on other ranks it does nothing."""

    def __init__(self, settings: LogSettings, folder: Path, world: World, device: torch.device):
        self.settings, self.folder, self.device = settings, folder / "profile", device
        self.window: profile | None = None
        self.first = settings.profile_start if world.speaks else None
        self.end = -1 if self.first is None else self.first + settings.profile_steps
        self.every = settings.communication_every if world.speaks else None
        self.shares: list[float] = []
        self.idle = not world.speaks or (self.first is None and self.every is None)

    def step(self, number: int) -> AbstractContextManager[Any]:
        """The context of one training step; `number` counts the steps of this job from 0. Costs less than a microsecond for
        a step that is not profiled."""
        if self.idle:
            return _NOTHING
        if self.first is not None and self.first <= number < self.end:
            return _Around(lambda: self._begin(number), lambda failed: self._end_window(number, failed))
        if self.every is not None and number % self.every == self.every // 2:  # not the first: it compiles and allocates
            return _Sample(self)
        return _NOTHING

    def communication_share(self) -> float | None:
        """Exposed communication's share of the sampled steps' time (0..1), their mean; None before a step was sampled.

        On CPUs gloo's operations, on GPUs NCCL's kernels, as far as no computation runs at the same time; waiting for a
        slower rank inside a collective is part of it."""
        return sum(self.shares) / len(self.shares) if self.shares else None

    def close(self) -> None:
        """Write the window that a job's end cut short. May be called twice."""
        if self.window is not None:
            self._write(self.first or 0)

    # ------------------------------------------------------------------------------------------------ the window

    def _begin(self, number: int) -> None:
        if self.window is None:
            self.window = _profile(self.device, record_shapes=True)
            self.window.start()

    def _end_window(self, number: int, failed: bool) -> None:
        if self.window is not None and (failed or number + 1 >= self.end):
            self._write(self.first or 0)

    def _write(self, first: int) -> None:
        window, self.window, self.first = self.window, None, None
        assert window is not None
        try:
            window.stop()
            self.folder.mkdir(parents=True, exist_ok=True)
            stem = self.folder / f"step-{first:08d}"
            window.export_chrome_trace(f"{stem}.trace.json.gz")
            order = "self_cpu_time_total" if self.device.type == "cpu" else f"self_{self.device.type}_time_total"
            operators = window.key_averages().table(sort_by=order, row_limit=40, max_name_column_width=80)
            Path(f"{stem}.operators.txt").write_text(operators + "\n")
            print(f"profile of {self.end - first} steps: {stem}.trace.json.gz, {stem.name}.operators.txt", flush=True)
        except Exception as error:  # a look at the run must not end it
            print(f"warning: the profile could not be written: {type(error).__name__}: {error}", flush=True)


class _Around:
    """Two calls around a step. `after(failed)` is told whether the step raised."""

    def __init__(self, before: Callable[[], None], after: Callable[[bool], None]):
        self.before, self.after = before, after

    def __enter__(self) -> None:
        self.before()

    def __exit__(self, kind: object, *rest: object) -> None:
        self.after(kind is not None)


class _Sample:
    """One step under the light profiler: names and times only."""

    def __init__(self, profiler: Profiler):
        self.profiler = profiler

    def __enter__(self) -> None:
        _wait(self.profiler.device)  # kernels of the step before would count otherwise
        self.profile = _profile(self.profiler.device)
        self.profile.start()
        self.started = time.perf_counter()

    def __exit__(self, kind: object, *rest: object) -> None:
        _wait(self.profiler.device)
        seconds = time.perf_counter() - self.started
        self.profile.stop()
        if kind is not None:
            return
        try:
            share = communication_of(_events(self.profile), seconds)
        except Exception as error:
            print(f"warning: the share of communication stays unknown: {type(error).__name__}: {error}", flush=True)
            self.profiler.every = None
        else:
            self.profiler.shares.append(share)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _profile(device: torch.device, **options: Any) -> profile:
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # it writes to stderr at every start otherwise
    gpu = device.type == "cuda"
    return profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])], **options)


# ------------------------------------------------------------------------------------------------- reading a sample

Event = tuple[str, float, float, bool]
"""(name, begin, end in seconds, runs on a GPU)."""


def _events(done: profile) -> list[Event]:
    """The events of a finished profile. The raw records are read: with the end of the profile this takes about a second for
    100k events (20k operators); `profile.events()` builds a tree of Python objects, which takes many times as long."""
    results = getattr(done.profiler, "kineto_results", None)
    assert results is not None
    found = []
    for event in results.events():
        gpu = event.device_type() == torch.autograd.DeviceType.CUDA
        if not (gpu and event.is_user_annotation()):  # on a GPU's timeline ranges lie over the kernels within them
            found.append((event.name(), event.start_ns() / 1e9, (event.start_ns() + event.duration_ns()) / 1e9, gpu))
    return found


def communication_of(events: Iterable[Event], seconds: float) -> float:
    """Share (0..1) of `seconds` in which communication runs and no computation does.

    On a GPU: NCCL's kernels against all others (copies too). Without any GPU event: gloo's operations against torch's
    operators; those that only start or await a collective are `c10d::*` and no computation."""
    events = list(events)
    on_gpu = any(gpu for *_, gpu in events)
    talk, work = [], []
    for name, begin, end, gpu in events:
        if gpu != on_gpu:
            continue
        if on_gpu:
            (talk if name.startswith(("ncclDevKernel", "ncclKernel")) else work).append((begin, end))
        elif name.startswith("gloo:"):
            talk.append((begin, end))
        elif name.startswith("aten::"):
            work.append((begin, end))
    return min(exposed(talk, work) / seconds, 1.0) if seconds > 0 else 0.0


def merged(intervals: Iterable[Interval]) -> list[Interval]:
    """The union as disjoint intervals in order."""
    found: list[Interval] = []
    for begin, end in sorted(intervals):
        if found and begin <= found[-1][1]:
            found[-1] = found[-1][0], max(found[-1][1], end)
        elif end > begin:
            found.append((begin, end))
    return found


def exposed(talk: Iterable[Interval], work: Iterable[Interval]) -> float:
    """Length of the union of `talk` that `work` does not cover."""
    talking = merged(talk)
    both = merged(talking + merged(work))
    length = sum(end - begin for begin, end in both)
    return length - sum(end - begin for begin, end in merged(work))
