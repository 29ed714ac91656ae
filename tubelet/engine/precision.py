"""What `precision: auto` means, and which precision goes with which engine and model."""

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
