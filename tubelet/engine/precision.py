"""What `precision: auto` means, which precision goes with which engine and model, and where gradients are added up."""

from __future__ import annotations

import torch
from torch import nn

from tubelet.engine.batch_norm import has_batch_norm
from tubelet.engine.settings import EngineSettings
from tubelet.errors import ConfigError


def resolve_precision(settings: EngineSettings, device: torch.device) -> str:
    """`fp32`, `amp` or `bf16`; `auto` = bf16 on a GPU under zero, amp on a GPU under plain, fp32 elsewhere."""
    if settings.precision != "auto":
        return settings.precision
    if device.type != "cuda":
        return "fp32"
    return "bf16" if settings.engine == "zero" else "amp"


def check_precision(module: nn.Module, settings: EngineSettings, device: torch.device) -> str:
    """The resolved precision, or `ConfigError` when the engine or the model cannot run in it."""
    precision = resolve_precision(settings, device)
    if precision == "bf16" and settings.engine == "plain":
        raise ConfigError("precision=bf16 (bf16 parameters, fp32 masters) needs engine=zero.",
                          "precision=amp: fp32 parameters with bf16 autocast")
    if precision == "bf16" and has_batch_norm(module):
        raise ConfigError(f"precision={settings.precision} (bf16 parameters) cannot train a model with BatchNorm: its "
                          "statistics stay fp32 beside bf16 weights.", "precision=amp")
    return precision


def check_grad_accum_dtype(settings: EngineSettings, precision: str) -> None:
    """`ConfigError` when `zero.grad_accum_dtype` is not what the engine can do in the resolved `precision`.

    Parameters in fp32 add up their gradients in fp32 in every engine, so fp32 is then as good as auto.
    """
    asked = settings.zero.grad_accum_dtype
    if precision != "bf16" and asked == "bf16":
        raise ConfigError(f"zero.grad_accum_dtype is bf16, but parameters are fp32 with precision={precision} "
                          f"(engine={settings.engine}) and so are their gradients.", "zero.grad_accum_dtype=auto")
    if precision == "bf16" and settings.engine == "zero" and settings.zero.stage == 1 and asked == "fp32":
        raise ConfigError("zero.grad_accum_dtype is fp32 at zero.stage=1 with bf16 parameters: DeepSpeed would switch to "
                          "its BF16_Optimizer, another class with another layout of its state, which cannot be saved and "
                          "resumed here.", "zero.stage=2, or zero.grad_accum_dtype=auto")
