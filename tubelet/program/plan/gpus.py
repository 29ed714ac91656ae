"""GPUs by the numbers of their data sheets, and what part of the peak is assumed where nothing was measured.

Memory is what the driver leaves to programs in GiB. Peaks are dense (never the 2:4-sparse figure), in TFLOP/s. `hbm_gbps` is
the memory's, `link_gbps` what one GPU sends to others of its node (NVLink, else PCIe), both in GB/s; `network_gbps` what a
node of eight usually sends to other nodes in GB/s (eight adapters of 400 Gbit/s are 400 GB/s).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from tubelet.errors import ConfigError, nearest


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU. Units: see the module."""

    name: str
    memory_gib: float
    bf16_tflops: float | None
    """None: it has no bf16 units."""
    fp32_tflops: float
    """Without TF32, which is off unless somebody turns it on."""
    hbm_gbps: float
    link_gbps: float
    network_gbps: float
    hopper: bool = False
    """So fast that kernels which only move memory cost a larger share: the same code reaches less of the peak."""

    def peak(self, precision: str) -> float:
        """TFLOP/s of the units that `precision` (resolved) uses; `ConfigError` where there are none."""
        if precision == "fp32":
            return self.fp32_tflops
        if self.bf16_tflops is None:
            raise ConfigError(f"precision={precision} needs bf16, which a {self.name} does not have (its tensor cores know "
                              "fp16, which is not offered).", "precision=fp32, or another --gpu")
        return self.bf16_tflops


GPUS = {gpu.name: gpu for gpu in (
    Gpu("h100", 79.1, 989, 67, 3350, 450, 400, True),
    Gpu("h100-pcie", 79.1, 756, 51, 2000, 63, 50, True),
    Gpu("h200", 139.8, 989, 67, 4800, 450, 400, True),
    Gpu("b200", 178.4, 2250, 80, 8000, 900, 400, True),
    Gpu("a100", 79.2, 312, 19.5, 2039, 300, 200),
    Gpu("a100-40", 39.4, 312, 19.5, 1555, 300, 200),
    Gpu("l40s", 44.5, 362, 91.6, 864, 31, 50),
    Gpu("l4", 22.0, 121, 30.3, 300, 31, 12.5),
    Gpu("a10", 22.0, 125, 31.2, 600, 31, 12.5),
    Gpu("v100", 31.7, None, 15.7, 900, 150, 12.5),
    Gpu("rtx4090", 23.5, 165, 82.6, 1008, 31, 12.5),
    Gpu("rtx3090", 23.6, 71, 35.6, 936, 31, 12.5),
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


# Assumed MFU (model FLOPs / dense peak), by kind of model: (Hopper and later, others). Published: ViT-g/14 44.5 % on A100
# and 28.9 % on H100 (NeMo), ViT-L/16 about 45 % on A100 and 24.5 % on H100 (DINOv2, DINOv3), A100 timm eager about 50 %;
# UniFormer's depth-wise convolutions move memory more than they compute. None of them was measured with this code.
_ASSUMED = {"wide ViT": (0.38, 0.45), "ViT": (0.32, 0.42), "narrow ViT": (0.22, 0.33), "convolutional": (0.12, 0.18)}
_ASSUMED_FP32 = 0.6
COMPILED = 1.15
"""Assumed gain of `compile` (9 to 21 % are published for ViTs)."""


def assumed_mfu(gpu: Gpu, width: int, convolutional: bool, precision: str, compiled: bool) -> tuple[float, str]:
    """(MFU, of what kind of model it is assumed)."""
    kind = "convolutional" if convolutional else "wide ViT" if width >= 1280 else "ViT" if width >= 768 else "narrow ViT"
    if precision == "fp32":
        return _ASSUMED_FP32 * (0.5 if convolutional else 1.0), f"{kind}, fp32 units"
    value = _ASSUMED[kind][0 if gpu.hopper else 1]
    return value * (COMPILED if compiled else 1.0), f"{kind}{', compiled' if compiled else ''}"
