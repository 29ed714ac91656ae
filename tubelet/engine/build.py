"""From settings to an engine, with everything that cannot be reported together."""

from __future__ import annotations

import torch
from torch import nn

from tubelet.dist import World
from tubelet.engine.optim import check_optimizer, parameter_groups
from tubelet.engine.precision import check_precision, resolve_precision
from tubelet.engine.protocol import Engine
from tubelet.engine.settings import EngineSettings
from tubelet.errors import ConfigError, Problems

__all__ = ["build_engine", "resolve_precision"]


def build_engine(module: nn.Module, settings: EngineSettings, *, world: World, device: torch.device,
                 micro_batch_size: int) -> Engine:
    """The engine that `settings.engine` names, around `module`, which it freezes in part, groups and moves to `device`.

    All ranks call it, after `tubelet.dist.start`, with equal weights in `module` (rank 0's are broadcast). Raises
    `ConfigError` with all incompatible settings.
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
    problems.raise_if_any()
    if settings.engine == "plain":
        from tubelet.engine.plain import PlainEngine as Chosen
    else:
        from tubelet.engine.zero.engine import ZeroEngine as Chosen
    return Chosen(module, settings, world=world, device=device, micro_batch_size=micro_batch_size,
                  accumulation=accumulation)
