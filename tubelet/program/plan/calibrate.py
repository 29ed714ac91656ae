"""A minute of the real thing on one device: the engine, the objective and the loop on random batches, against the plan.

The job is the config's on one rank: same model, optimizer, precision, stage and recomputation, a micro-batch that fits, at
most two micro-batches a step. The data is made up beforehand, so the loader costs nothing.
"""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from data_pipelines.mix import in_pairs
from tubelet import dist
from tubelet.batching import divisors, micro_batch_multiple
from tubelet.console import print_table
from tubelet.engine.build import build_engine, resolve_precision
from tubelet.engine.peaks import gpu_kind
from tubelet.engine.protocol import Batch
from tubelet.engine.settings import LogSettings
from tubelet.engine.signals import StopFlag
from tubelet.engine.trainer import Beginning, Trainer
from tubelet.models.build import build_model, model_cfg
from tubelet.objectives.classification import Classification
from tubelet.program.plan.choose import Geometry, budget, gib, needed_bytes, option_of
from tubelet.program.plan.count import living_bytes
from tubelet.program.plan.facts import Facts, facts_of
from tubelet.program.plan.gpus import GPUS, Gpu
from tubelet.program.plan.measured import what_decides
from tubelet.program.plan.memory import Memory, Way
from tubelet.program.plan.speed import choose_mfu, recomputed
from tubelet.program.settings import ProgramSettings
from tubelet.program.train import quiet
from tubelet.runs import Run, RunSettings

CPU_MICRO, WARM_UP = 4, 2


def calibrate(settings: ProgramSettings, seconds: float) -> dict[str, Any]:
    """Run, and return predicted and measured numbers: bytes, samples a second, MFU (None on a CPU, whose peak is not known).

    Starts a process group of one and leaves it again.
    """
    cuda = torch.cuda.is_available()
    if not cuda:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    facts = facts_of(settings.model, settings.optimizer)
    gpu = _this_gpu() if cuda else None
    own = _on_one_rank(settings, facts, gpu)
    micro = int(own.micro_batch_size)
    device = dist.start(dist.World())
    try:
        quiet()
        with tempfile.TemporaryDirectory() as folder:
            measured = _measure(own, facts, micro, device, folder, seconds)
    finally:
        dist.stop()
    return _compared(own, facts, gpu, micro, measured)


def _this_gpu() -> Gpu | None:
    """The device at hand as the table has it, with the memory it really has; None for one that is not there."""
    kind = gpu_kind(torch.cuda.get_device_name(0))
    total = torch.cuda.get_device_properties(0).total_memory / 2**30
    return replace(GPUS[kind], memory_gib=total) if kind in GPUS else None


def _on_one_rank(settings: ProgramSettings, facts: Facts, gpu: Gpu | None) -> ProgramSettings:
    """The job on one rank, with the largest micro-batch that should fit on a GPU and with a few samples on a CPU. Nothing
    else is chosen: what is measured is the config's own way, not one that a plan would prefer."""
    multiple = micro_batch_multiple(in_pairs(settings.data.augment), settings.data.repeats)
    quiet_log = LogSettings(tensorboard=False, communication_every=None)
    own = settings.model_copy(update={"log": quiet_log, "digest": False, "total_steps": 10**6, "epochs": None,
                                      "log_every": 10**6})
    fitting = [m for m in divisors(settings.global_batch_size) if m % multiple == 0] or [multiple]
    if gpu is None:
        micro = max([m for m in fitting if m <= CPU_MICRO], default=fitting[0])
    else:
        stage = own.zero.stage if own.engine == "zero" else 0
        found = option_of(facts, own, Geometry(1, 1), gpu, stage, own.activation_checkpointing, 0.08, multiple)
        micro = found.micro or fitting[0]
        if own.micro_batch_size != "auto":
            micro = max([m for m in fitting if m <= min(micro, int(own.micro_batch_size))], default=fitting[0])
    several = 2 if settings.global_batch_size >= 2 * micro else 1
    return own.model_copy(update={"global_batch_size": several * micro, "micro_batch_size": micro})


class MadeUp:
    """A loader that has its one micro-batch already."""

    fingerprint: dict[str, Any] = {}
    size = 1 << 30

    def __init__(self, micro: int, shape: tuple[int, ...], num_classes: int, device: torch.device):
        self.give_up: Callable[[], bool] = lambda: False
        draw = torch.Generator().manual_seed(0)
        pixels = torch.randint(0, 256, (micro, *shape), dtype=torch.uint8, generator=draw)
        labels = torch.randint(max(1, num_classes), (micro,), generator=draw)
        self.batch = {"ids": torch.arange(micro), "pixels": pixels.to(device), "labels": labels.to(device)}

    def batches(self, seen: int) -> Iterator[Batch]:
        """The same micro-batch for ever."""
        while True:
            yield dict(self.batch)

    def describe(self, x: int) -> str:
        """A sample's number."""
        return str(x)

    def consume(self, batch: Batch) -> None:
        """Nothing is ever bad."""

    def audit(self, seen: int) -> dict[str, float]:
        """Nothing to count."""
        return {}

    def summary(self) -> str | None:
        """Nothing to say."""
        return None

    def close(self) -> None:
        """Nothing to close."""


def _measure(own: ProgramSettings, facts: Facts, micro: int, device: torch.device, folder: str,
             seconds: float) -> dict[str, Any]:
    """Bytes between steps and at the peak, steps and the time that they took."""
    before = living_bytes()
    run = Run(RunSettings(name="calibration", dir=folder))
    run.begin(1, "")
    model = build_model(own.model, seed=own.seed)
    cfg = model_cfg(model)
    engine = build_engine(model, own, world=dist.World(), device=device, micro_batch_size=micro)
    objective = Classification(own.objective, own.model.num_classes, cfg["mean"], cfg["std"])
    loader = MadeUp(micro, facts.input_shape, own.model.num_classes, device)
    with contextlib.redirect_stdout(io.StringIO()):  # what a run would say of itself is of no interest here
        trainer = Trainer(own, run=run, world=dist.World(), engine=engine, objective=objective, loader=loader,
                          micro_batch_size=micro, total_steps=10**6, beginning=Beginning("scratch"), manifest={"config": {}})
        trainer.begin()
        trainer.open()
        stop, steps, begun = StopFlag(60), 0, time.perf_counter()
        started = begun
        while steps < WARM_UP + 1 or time.perf_counter() - begun < seconds:
            if steps == WARM_UP:
                _wait(device)
                started = time.perf_counter()
            batches = trainer.fetch()
            trainer.agree(stop)
            trainer.advance(batches, trainer.train_step(batches))
            steps += 1
        _wait(device)
        ended = time.perf_counter()
    held = torch.cuda.memory_allocated(device) if device.type == "cuda" else living_bytes() - before
    inputs = sum(tensor.numel() * tensor.element_size() for tensor in loader.batch.values())
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    trainer.close()
    return {"state": held - inputs, "peak": peak, "steps": steps - WARM_UP, "seconds": ended - started, "device": name}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _compared(own: ProgramSettings, facts: Facts, gpu: Gpu | None, micro: int, measured: dict[str, Any]) -> dict[str, Any]:
    precision = resolve_precision(own, torch.device("cuda" if measured["peak"] is not None else "cpu"))
    several = own.global_batch_size // micro
    way = Way(own.engine, own.zero.stage if own.engine == "zero" else 0, precision, 1, several, measured["peak"] is not None)
    memory = Memory(facts, own, way)
    rate = own.global_batch_size * measured["steps"] / measured["seconds"]
    peak = own.peak_tflops or (gpu.peak_tflops if gpu else None)
    mfu = rate * facts.flops / (peak * 1e12) if peak else None
    assumed = choose_mfu(facts, own, gpu, precision).value if gpu else None
    expected = assumed * peak * 1e12 / facts.flops if assumed and peak else None
    return {
        "device": measured["device"], "gpu": gpu.name if gpu else None,
        **what_decides(own, facts.input_shape, precision), "way": way.name,
        "micro_batch_size": micro, "global_batch_size": own.global_batch_size,
        "steps": measured["steps"], "step_seconds": measured["seconds"] / measured["steps"],
        "samples_per_second": rate, "predicted_samples_per_second": expected, "gflops": rate * facts.flops / 1e9,
        "mfu": mfu, "assumed_mfu": assumed, "hfu": mfu * recomputed(own) if mfu else None,
        "assumed_hfu": assumed * recomputed(own) if assumed else None, "state_bytes": measured["state"],
        "predicted_state_bytes": memory.state().total, "peak_bytes": measured["peak"],
        "predicted_peak_bytes": needed_bytes(memory, facts.activations(precision, own.activation_checkpointing), micro)
        if measured["peak"] is not None else None, "budget_bytes": budget(gpu, 0.08) if gpu else None}


def show_calibration(found: dict[str, Any]) -> None:
    """Predicted beside measured."""

    def row(what: str, predicted: Any, measured: Any, text: Any) -> list[str]:
        ratio = f"{measured / predicted:.3f}" if predicted and measured else ""
        return [what, text(predicted) if predicted else "-", text(measured) if measured else "-", ratio]

    print_table(
        f"{found['model']} on {found['device']}: {found['way']}{' + recomputation' if found['recompute'] else ''} in "
        f"{found['precision']}, micro-batch "
        f"{found['micro_batch_size']}, {found['steps']} steps of {found['global_batch_size']}",
        ["", "predicted", "measured", "measured / predicted"],
        [row("samples a second", found["predicted_samples_per_second"], found["samples_per_second"], lambda x: f"{x:,.2f}"),
         row("MFU", found["assumed_mfu"], found["mfu"], lambda x: f"{x:.1%}"),
         *([row("HFU", found["assumed_hfu"], found["hfu"], lambda x: f"{x:.1%}")] if found["recompute"] else []),
         row("GFLOP/s", None, found["gflops"], lambda x: f"{x:,.1f}"),
         row("seconds a step", None, found["step_seconds"], lambda x: f"{x:.4f}"),
         row("GiB between steps", found["predicted_state_bytes"], found["state_bytes"], gib),
         row("GiB at the peak", found["predicted_peak_bytes"], found["peak_bytes"], gib)])
    if found["peak_bytes"] is None:
        print("  On a CPU there is no allocator that keeps a peak and no peak of FLOP/s to measure against.")
