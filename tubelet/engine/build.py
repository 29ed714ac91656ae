"""From settings to an engine, with everything that cannot be reported together.

What can be combined. "yes": run on two ranks against the same engine bare, losses and gradient norms, with a small ViT +
TokenLearner (UniFormer where there is BatchNorm); tests/test_blocks.py and test_sync_batch_norm.py keep a part of it.
Everything else is refused before training, with the reason and a way out.

============================== ============ ============ =================== ===================
with                           plain        ZeRO-1, 2    ZeRO-3              why not
============================== ============ ============ =================== ===================
fp32, amp                      yes          yes          yes
bf16                           no           yes          yes                 no fp32 masters
recompute full                 yes          yes          yes
recompute selective            yes          yes          yes
compile                        yes          yes          yes
compile and recompute          yes          yes          yes
sync_batch_norm                yes          yes          yes
sync_batch_norm and recompute  yes          yes          yes
sync_batch_norm and compile    no           no           no                  collectives in blocks
grad_accum_dtype fp32 in bf16  no bf16      ZeRO-2       yes                 BF16_Optimizer at 1
============================== ============ ============ =================== ===================

BatchNorm runs in fp32 and amp, not in bf16; synchronised it was run in fp32 only. Not run on GPUs so far: overlap, torch's
SyncBatchNorm, `compile.mode` other than default.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from tubelet.dist import World
from tubelet.engine.batch_norm import has_batch_norm, synchronise_batch_norm
from tubelet.engine.blocks import apply_activation_checkpointing, apply_compile, need_blocks
from tubelet.engine.optim import check_optimizer, parameter_groups
from tubelet.engine.precision import check_grad_accum_dtype, check_precision, resolve_precision
from tubelet.engine.protocol import Engine
from tubelet.engine.settings import EngineSettings
from tubelet.errors import ConfigError, Problems

__all__ = ["build_engine", "check_combination", "resolve_precision"]


def build_engine(module: nn.Module, settings: EngineSettings, *, world: World, device: torch.device,
                 micro_batch_size: int) -> Engine:
    """The engine that `settings.engine` names, around `module`, which it changes as the settings ask: freezes it in part,
    synchronises its BatchNorm, has its blocks recompute and compile, groups its parameters and moves it to `device`.

    Names of parameters and the state dict stay as they were. All ranks call it, after `tubelet.dist.start`, with equal
    weights in `module` (rank 0's are broadcast). Raises `ConfigError` with all incompatible settings; `module` is then as it
    was but for what is frozen.
    """
    accumulation, rest = divmod(settings.global_batch_size, micro_batch_size * world.size)
    problems = Problems(ConfigError)
    if rest or not accumulation:
        problems.add(f"`global_batch_size` is {settings.global_batch_size}, but {world.size} ranks x micro batch "
                     f"{micro_batch_size} = {world.size * micro_batch_size} must divide it.",
                     "another micro_batch_size, or micro_batch_size=auto")
    if settings.engine == "plain" and settings.zero.config is not None:
        problems.add("zero.config is given, but engine=plain does not run DeepSpeed.", "engine=zero, or zero.config=null")
    for check in (lambda: check_precision(module, settings, device), lambda: parameter_groups(module, settings.optimizer),
                  lambda: check_optimizer(settings)):
        try:
            check()
        except ConfigError as error:
            problems.items.append(error)
    if settings.engine == "zero":
        from tubelet.engine.zero.deepspeed_config import check_user_config, read_user_config

        try:
            check_user_config(read_user_config(settings), problems)
        except ConfigError as error:
            problems.items.append(error)
    problems.items += check_combination(settings, module, device)
    problems.raise_if_any()
    if settings.sync_batch_norm:
        synchronise_batch_norm(module, device)
    if settings.activation_checkpointing:
        apply_activation_checkpointing(module, settings.activation_checkpointing)
    if settings.compile:
        apply_compile(module, settings.compile)
    if settings.engine == "plain":
        from tubelet.engine.plain import PlainEngine as Chosen
    else:
        from tubelet.engine.zero.engine import ZeroEngine as Chosen
    return Chosen(module, settings, world=world, device=device, micro_batch_size=micro_batch_size,
                  accumulation=accumulation)


def check_combination(settings: EngineSettings, module: nn.Module, device: torch.device) -> list[ConfigError]:
    """What of these settings does not go together, or not with this model; [] when all is well. Changes nothing."""
    problems = Problems(ConfigError)
    checks: list[Callable[[], object]] = [lambda: check_grad_accum_dtype(settings, resolve_precision(settings, device))]
    if settings.activation_checkpointing:
        checks.append(lambda: need_blocks(module, "activation_checkpointing"))
    if settings.compile:
        checks.append(lambda: need_blocks(module, "compile"))
    for check in checks:
        try:
            check()
        except ConfigError as error:
            problems.items.append(error)
    if settings.sync_batch_norm and not has_batch_norm(module):
        problems.add(f"sync_batch_norm is set, but {type(module).__name__} has no BatchNorm.", "sync_batch_norm=false")
    if settings.sync_batch_norm and settings.compile:
        problems.add("sync_batch_norm and compile are both set: the collectives of a synchronised layer cut every compiled "
                     "block in pieces.", "compile=null, or sync_batch_norm=false with more samples a rank")
    return problems.items  # type: ignore[return-value]
