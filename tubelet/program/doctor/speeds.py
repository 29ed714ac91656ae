"""How fast each rank's device computes and copies, all ranks at once as in training."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from tubelet.engine.metrics import peak_tflops
from tubelet.program.doctor.findings import Finding, outliers

GPU_SIDE, CPU_SIDE = 8192, 768  # rows and columns of the matrices


def measure(device: Any, seconds: float) -> dict[str, Any]:
    """{"tflops", "copy_gb", "to_device_gb" (GPU), "peak"} of this rank's device; about `seconds` of work. All ranks call it
    at the same time."""
    import torch

    if device.type == "cuda":
        return _gpu(device, seconds)
    return {"tflops": _cpu_matmul(seconds / 2), "copy_gb": _cpu_copy(seconds / 4), "peak": None, "kind": "cpu",
            "threads": torch.get_num_threads()}


def _best(action: Callable[[], Any], seconds: float) -> float:
    """Seconds of the fastest call; at least three."""
    action()
    fastest, until, calls = float("inf"), time.perf_counter() + seconds, 0
    while calls < 3 or time.perf_counter() < until:
        begun = time.perf_counter()
        action()
        fastest = min(fastest, time.perf_counter() - begun)
        calls += 1
    return fastest


def _cpu_matmul(seconds: float) -> float:
    import torch

    a, b = torch.rand(CPU_SIDE, CPU_SIDE), torch.rand(CPU_SIDE, CPU_SIDE)
    out = torch.empty_like(a)
    return 2 * CPU_SIDE**3 / _best(lambda: torch.mm(a, b, out=out), seconds) / 1e12


def _cpu_copy(seconds: float) -> float:
    import torch

    a = torch.ones(16 * 2**20)  # 64 MiB, more than caches hold
    b = torch.empty_like(a)
    return 2 * a.nbytes / _best(lambda: b.copy_(a), seconds) / 1e9


def _gpu(device: Any, seconds: float) -> dict[str, Any]:
    import torch

    name = torch.cuda.get_device_name(device)
    found = {"tflops": _gpu_matmul(device, seconds), **_gpu_copies(device), "peak": peak_tflops(device), "kind": name}
    torch.cuda.empty_cache()  # NCCL wants its buffers next
    return found


def _gpu_seconds(action: Callable[[], Any], calls: int) -> float:
    """Seconds a call, by the device's clock."""
    import torch

    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(calls):
        action()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / calls


def _gpu_matmul(device: Any, seconds: float) -> float:
    """TFLOP/s in bf16 over some seconds: a GPU that gets hot, or is capped, slows down only then."""
    import torch

    a = torch.randn(GPU_SIDE, GPU_SIDE, device=device, dtype=torch.bfloat16)
    b, out = torch.randn_like(a), torch.empty_like(a)

    def multiply() -> None:
        torch.mm(a, b, out=out)

    _gpu_seconds(multiply, 3)
    once = _gpu_seconds(multiply, 3)
    return 2 * GPU_SIDE**3 / _gpu_seconds(multiply, max(5, int(seconds / once))) / 1e12


def _gpu_copies(device: Any) -> dict[str, float]:
    """GB/s within the device (read and write), and from page-locked memory of the host."""
    import torch

    size = min(2**30, torch.cuda.mem_get_info(device)[0] // 8)
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    pinned = torch.empty(min(size, 256 * 2**20), dtype=torch.uint8).pin_memory()
    head = target[:len(pinned)]
    times = []
    for action in (lambda: target.copy_(source), lambda: head.copy_(pinned, non_blocking=True)):
        _gpu_seconds(action, 2)
        times.append(_gpu_seconds(action, 8))
    return {"copy_gb": 2 * size / times[0] / 1e9, "to_device_gb": len(pinned) / times[1] / 1e9}


def judge(measured: dict[str, dict[str, Any]]) -> list[Finding]:
    """`measured`: by rank, in words. Ranks with the same kind of device are compared; CPUs, whose cores ranks share,
    generously."""
    failed = {label: mine["error"] for label, mine in measured.items() if "error" in mine}
    found = [Finding("speed", "device", "fail", f"{label}: {text}", "the device computes",
                     "nvidia-smi and dmesg on that host; drain it", [label]) for label, text in failed.items()]
    kinds = dict.fromkeys(mine["kind"] for label, mine in measured.items() if label not in failed)
    for kind in kinds:
        mine = {label: item for label, item in measured.items() if item.get("kind") == kind}
        cpu = kind == "cpu"
        warn, fail = (0.5, 0.0) if cpu else (0.9, 0.7)
        suffix = f", {kind}" if len(kinds) > 1 else ""
        hint = ("another program on that host? top" if cpu else
                "nvidia-smi -q -d PERFORMANCE,CLOCK on that host (heat, power cap); leave it out of the job")
        one = outliers("speed", f"matmul{suffix}", {label: item["tflops"] for label, item in mine.items()}, unit="TFLOP/s",
                       warn=warn, fail=fail, hint=hint)
        peak = next(iter(mine.values()))["peak"]
        if peak:
            one.value += f" ({min(item['tflops'] for item in mine.values()) / peak:.0%} of the peak)"
        found.append(one)
        for key, name in (("copy_gb", "memory"), ("to_device_gb", "host to device")):
            values = {label: item[key] for label, item in mine.items() if key in item}
            if values:
                found.append(outliers("speed", f"{name}{suffix}", values, unit="GB/s", warn=warn, fail=0.0, hint=hint))
    return found
