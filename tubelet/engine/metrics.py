"""What a run measures about itself: means of losses, images/s, data wait, MFU, memory.

Tags: `train/*`, `val/*`, `perf/*`, `memory/*`, `system/*`, `ckpt/*`, `goodput/*`, `data/*`, `samples_seen`; the x-axis is
always `state.step`. Where they are written: `trackers`; what a person reads: `console`.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch

from tubelet import dist
from tubelet.engine.peaks import PEAK_TFLOPS, gpu_kind


def peak_tflops(device: torch.device) -> float | None:
    """Nominal dense bf16 peak of a known GPU, None for CPUs and unknown devices (MFU is then not reported)."""
    if device.type != "cuda":
        return None
    kind = gpu_kind(torch.cuda.get_device_name(device))
    return PEAK_TFLOPS[kind] if kind else None


class Meter:
    """What happened since the last log line. Losses are summed in float64 on the device, without waiting for it; `read`
    waits."""

    def __init__(self, device: torch.device, world: dist.World):
        self.device, self.world = device, world
        self.reset()

    def reset(self) -> None:
        """Begin a new interval."""
        self.sums: dict[str, torch.Tensor] = {}
        self.micro_batches = self.steps = self.samples = 0
        self.data_seconds = self.other_seconds = 0.0
        self.started = time.perf_counter()

    def add(self, output: dict[str, torch.Tensor]) -> None:
        """The objective's outputs for one micro-batch: every 0-d tensor in it is averaged. Never waits for the device."""
        for name, value in output.items():
            if value.ndim == 0:
                value = value.detach().double()
                self.sums[name] = self.sums[name] + value if name in self.sums else value
        self.micro_batches += 1

    def read(self, flops_per_sample: float, peak: float | None) -> dict[str, float]:
        """Means over all ranks' micro-batches since `reset`, rates, and memory of the rank that uses most. All ranks call
        it. `peak` in TFLOP/s of one device; None = no MFU."""
        names = sorted(self.sums)
        local = torch.stack([self.sums[name] for name in names]).tolist() if names else []  # one wait for all of them
        totals = dist.sums([*local, float(self.micro_batches)])
        seconds = time.perf_counter() - self.started - self.other_seconds
        slowest, data_wait, *memory = dist.maxima([seconds, self.data_seconds, *self.memory()])
        values = {f"train/{name}": total / max(totals[-1], 1) for name, total in zip(names, totals)}
        rate = self.samples / slowest
        per_device = rate / self.world.size
        values |= {"perf/samples_per_sec": rate, "perf/samples_per_sec_per_gpu": per_device,
                   "perf/step_time": slowest / max(self.steps, 1), "perf/data_wait_pct": 100 * data_wait / slowest,
                   "perf/tflops": per_device * flops_per_sample / 1e12}
        if peak:
            values["perf/mfu"] = values["perf/tflops"] / peak
        values["system/rss_gib"] = memory[0] / 2**30
        if self.device.type == "cuda":
            values |= {"memory/max_allocated_gib": memory[1] / 2**30, "memory/max_reserved_gib": memory[2] / 2**30}
        return values

    def memory(self) -> list[float]:
        """Bytes: host memory of this rank and its workers; on a GPU also the most that was allocated and reserved."""
        used = [float(resident_bytes(os.getpid()))]
        if self.device.type == "cuda":
            used += [torch.cuda.max_memory_allocated(self.device), torch.cuda.max_memory_reserved(self.device)]
        return used


def resident_bytes(pid: int) -> int:
    """Resident memory of a process and all below it (data workers, the checkpoint writer); 0 where there is no /proc.

    Pages that a fork shares are counted once for each process: what the sum could come to, not what the kernel charges. The
    exact figure (smaps_rollup) walks page tables, which takes tens of ms a process at these sizes."""
    total = 0
    try:
        total = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        for task in os.listdir(f"/proc/{pid}/task"):
            for child in Path(f"/proc/{pid}/task/{task}/children").read_text().split():
                total += resident_bytes(int(child))
    except (OSError, ValueError, IndexError):
        pass  # it ended meanwhile
    return total
