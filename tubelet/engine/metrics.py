"""What a run reports: scalars to TensorBoard and JSON lines, a progress bar or plain lines, images/s and MFU.

Tags: `train/*`, `val/*`, `perf/*`, `memory/*`, `system/*`, `ckpt/*`, `data/*`, `samples_seen`; the x-axis is always
`state.step`. On resume both sinks drop what lies after the restored step, so curves never overlap.
"""

from __future__ import annotations

import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch

from tubelet import dist, files

# Dense bf16 peaks in TFLOP/s (never the 2:4-sparse figure), from the vendors' data sheets.
PEAK_TFLOPS = {"H200": 989.0, "H100": 989.0, "GH200": 989.0, "H800": 989.0, "A100": 312.0, "A800": 312.0, "B200": 2250.0,
               "L40S": 362.0, "L4": 121.0, "A10": 125.0, "V100": 125.0, "4090": 165.0, "3090": 71.0}


def peak_tflops(device: torch.device) -> float | None:
    """Nominal dense bf16 peak of a known GPU, None for CPUs and unknown devices (MFU is then not reported)."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in PEAK_TFLOPS.items() if key in name), None)


class Scalars:
    """Rank 0's TensorBoard and `metrics.jsonl`; on other ranks every call does nothing."""

    def __init__(self, folder: Path, *, step: int, enabled: bool):
        self.enabled = enabled
        if not enabled:
            return
        from torch.utils.tensorboard import SummaryWriter

        self.path = folder / "metrics.jsonl"
        files.keep_jsonl(self.path, step)
        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else None)

    def write(self, step: int, values: dict[str, float]) -> None:
        """One row of scalars at `step`."""
        if not self.enabled:
            return
        for tag, value in values.items():
            self.writer.add_scalar(tag, value, step)
        files.append_jsonl(self.path, [{"step": step, **values}])

    def flush(self) -> None:
        if self.enabled:
            self.writer.flush()

    def close(self) -> None:
        if self.enabled:
            self.writer.close()


class Meter:
    """What happened since the last log line. Losses are summed in float64 on the device; reading them is the sync."""

    def __init__(self, device: torch.device, world: dist.World):
        self.device, self.world = device, world
        self.reset()

    def reset(self) -> None:
        self.sums: dict[str, torch.Tensor] = {}
        self.micro_batches = self.steps = self.samples = 0
        self.data_seconds = self.other_seconds = 0.0
        self.started = time.perf_counter()

    def add(self, output: dict[str, torch.Tensor]) -> None:
        """The objective's outputs for one micro-batch: every 0-d tensor in it is averaged."""
        for name, value in output.items():
            if value.ndim == 0:
                value = value.detach().double()
                self.sums[name] = self.sums[name] + value if name in self.sums else value
        self.micro_batches += 1

    def read(self, flops_per_sample: float, peak: float | None) -> dict[str, float]:
        """Means over all ranks' micro-batches since `reset`, and rates. All ranks call it."""
        names = sorted(self.sums)
        totals = dist.sums([float(self.sums[name]) for name in names] + [float(self.micro_batches)])
        slowest, data_wait = dist.maxima([time.perf_counter() - self.started - self.other_seconds, self.data_seconds])
        values = {f"train/{name}": total / totals[-1] for name, total in zip(names, totals)}
        rate = self.samples / slowest
        per_device = rate / self.world.size
        values |= {"perf/samples_per_sec": rate, "perf/samples_per_sec_per_gpu": per_device,
                   "perf/step_time": slowest / max(self.steps, 1), "perf/data_wait_pct": 100 * data_wait / slowest,
                   "perf/tflops": per_device * flops_per_sample / 1e12,
                   "system/rss_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}
        if peak:
            values["perf/mfu"] = values["perf/tflops"] / peak
        if self.device.type == "cuda":
            values["memory/max_allocated_gib"] = torch.cuda.max_memory_allocated(self.device) / 2**30
            values["memory/max_reserved_gib"] = torch.cuda.max_memory_reserved(self.device) / 2**30
        return values


def duration(seconds: float) -> str:
    """93784 -> '1d 02:03:04'."""
    days, rest = divmod(int(seconds), 86_400)
    clock = f"{rest // 3600:02d}:{rest % 3600 // 60:02d}:{rest % 60:02d}"
    return f"{days}d {clock}" if days else clock


class Console:
    """A progress bar on a terminal, otherwise one plain line per log; speaks on rank 0 only."""

    def __init__(self, *, total: int, step: int, enabled: bool, title: str):
        self.enabled, self.total = enabled, total
        self.bar: Any = None
        if enabled and sys.stderr.isatty():
            from rich.console import Console as Terminal
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self.bar = Progress(TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn(),
                                TextColumn("{task.fields[note]}"), TimeRemainingColumn(),
                                console=Terminal(stderr=True))
            self.task = self.bar.add_task(title, total=total, completed=step, note="")
            self.bar.start()

    def say(self, text: str) -> None:
        """A sentence for the user."""
        if self.bar:
            self.bar.console.print(text)
        elif self.enabled:
            print(text, flush=True)

    def advance(self, step: int) -> None:
        if self.bar:
            self.bar.update(self.task, completed=step)

    def report(self, step: int, values: dict[str, float]) -> None:
        """The values of one log line."""
        if not self.enabled:
            return
        eta = duration((self.total - step) * values.get("perf/step_time", 0))
        memory = values.get("memory/max_allocated_gib", values["system/rss_gib"])
        mfu = f"  mfu {values['perf/mfu']:.1%}" if "perf/mfu" in values else ""
        rates = (f"{values['perf/samples_per_sec']:.1f} images/s{mfu}  data wait {values['perf/data_wait_pct']:.0f}%  "
                 f"mem {memory:.1f} GiB")
        line = (f"loss {values['train/loss']:.4f}  lr {values['train/lr']:.2e}  "
                f"grad norm {values['train/grad_norm']:.3f}")
        if self.bar:
            self.bar.update(self.task, completed=step, note=f"{line}  {rates}")
        else:
            print(f"step {step}/{self.total}  {line}  {rates}  eta {eta}", flush=True)

    def close(self) -> None:
        if self.bar:
            self.bar.stop()
            self.bar = None
