"""GPUs by the numbers of their data sheets, and what part of the peak is assumed where nothing was measured.

Two words for that part. MFU (model FLOPs utilisation) counts what the model needs, so recomputing activations lowers it: it
is what a run logs as `perf/mfu`. HFU (hardware FLOPs utilisation) counts the recomputed ones too. Both are shares of the
peak in bf16, in every precision, as a run has them.

Memory is what the driver leaves to programs in GiB. Peaks are dense (never the 2:4-sparse figure), in TFLOP/s; those in bf16
are the run's own (tubelet/engine/peaks.py). `hbm_gbps` is the memory's, `link_gbps` what one GPU sends to others of its node
(NVLink, else PCIe), both in GB/s; `network_gbps` what a node of eight usually sends to other nodes in GB/s (eight adapters
of 400 Gbit/s are 400 GB/s).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from tubelet.engine.peaks import PEAK_TFLOPS
from tubelet.errors import ConfigError, nearest


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU. Units: see the module."""

    name: str
    memory_gib: float
    fp32_tflops: float
    """Without TF32, which is off unless somebody turns it on."""
    hbm_gbps: float
    link_gbps: float
    network_gbps: float
    bf16: bool = True
    """Whether it has units for bf16."""
    hopper: bool = False
    """So fast that kernels which only move memory cost a larger share: the same code reaches less of the peak."""

    @property
    def peak_tflops(self) -> float:
        """What MFU is measured against; of a V100 its fp16 units."""
        return PEAK_TFLOPS[self.name]

    def check(self, precision: str) -> None:
        """`ConfigError` where it has no units for `precision` (resolved)."""
        if precision != "fp32" and not self.bf16:
            raise ConfigError(f"precision={precision} needs bf16, which a {self.name} does not have (its tensor cores know "
                              "fp16, which is not offered).", "precision=fp32, or another --gpu")


GPUS = {gpu.name: gpu for gpu in (
    Gpu("h100", 79.1, 67, 3350, 450, 400, hopper=True),
    Gpu("h100-pcie", 79.1, 51, 2000, 63, 50, hopper=True),
    Gpu("h100-nvl", 93.1, 60, 3900, 300, 50, hopper=True),
    Gpu("h200", 139.8, 67, 4800, 450, 400, hopper=True),
    Gpu("h200-nvl", 139.8, 60, 4800, 450, 50, hopper=True),
    Gpu("gh200", 94.5, 67, 4000, 450, 50, hopper=True),
    Gpu("b200", 178.4, 80, 8000, 900, 400, hopper=True),
    Gpu("a100", 79.2, 19.5, 2039, 300, 200),
    Gpu("a100-40", 39.4, 19.5, 1555, 300, 200),
    Gpu("l40s", 44.5, 91.6, 864, 31, 50),
    Gpu("l40", 44.5, 90.5, 864, 31, 50),
    Gpu("l4", 22.0, 30.3, 300, 31, 12.5),
    Gpu("a10", 22.0, 31.2, 600, 31, 12.5),
    Gpu("v100", 31.7, 15.7, 900, 150, 12.5, bf16=False),
    Gpu("rtx4090", 23.5, 82.6, 1008, 31, 12.5),
    Gpu("rtx3090", 23.6, 35.6, 936, 31, 12.5),
)}

ALIASES = {"h100-sxm": "h100", "h100-80": "h100", "a100-80": "a100", "4090": "rtx4090", "3090": "rtx3090", "v100-32": "v100"}


def find_gpu(name: str, memory_gib: float | None = None) -> Gpu:
    """The GPU of that name, with another memory size where one is given. Raises `ConfigError` that names the nearest."""
    word = name.lower().replace("_", "-").replace(" ", "-")
    word = ALIASES.get(word, word)
    if word not in GPUS:
        close = nearest(word, GPUS, 2)
        raise ConfigError(f"--gpu {name} is not in the table.", f"{' or '.join(close)}" if close else
                          f"one of {', '.join(GPUS)}; or one of them with --gpu-memory GIB and --mfu")
    return replace(GPUS[word], memory_gib=memory_gib) if memory_gib else GPUS[word]


# Assumed HFU (FLOPs / dense peak), by kind of model: (Hopper and later, others). Published: ViT-g/14 44.5 % on A100
# and 28.9 % on H100 (NeMo), ViT-L/16 about 45 % on A100 and 24.5 % on H100 (DINOv2, DINOv3), A100 timm eager about 50 %;
# UniFormer's depth-wise convolutions move memory more than they compute. None of them was measured with this code.
_ASSUMED = {"wide ViT": (0.38, 0.45), "ViT": (0.32, 0.42), "narrow ViT": (0.22, 0.33), "convolutional": (0.12, 0.18)}
_ASSUMED_FP32 = 0.6
"""Of the fp32 units."""
COMPILED = 1.15
"""Assumed gain of `compile` (9 to 21 % are published for ViTs)."""


def assumed_hfu(gpu: Gpu, width: int, convolutional: bool, precision: str, compiled: bool) -> tuple[float, str]:
    """(HFU, of what kind of model it is assumed)."""
    kind = "convolutional" if convolutional else "wide ViT" if width >= 1280 else "ViT" if width >= 768 else "narrow ViT"
    if precision == "fp32":
        share = _ASSUMED_FP32 * (0.5 if convolutional else 1.0)
        return share * gpu.fp32_tflops / gpu.peak_tflops, f"{kind}, fp32 units"
    value = _ASSUMED[kind][0 if gpu.hopper else 1]
    return value * (COMPILED if compiled else 1.0), f"{kind}{', compiled' if compiled else ''}"
