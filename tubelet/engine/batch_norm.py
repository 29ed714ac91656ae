"""BatchNorm's running statistics on several ranks.

Each rank updates them from its own samples. Their update is linear in what a batch measured, so averaging over ranks now
and then gives the same result as averaging once at the end: it may happen at any time and as often as one likes.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def has_batch_norm(module: nn.Module) -> bool:
    """True when a layer of `module` keeps running statistics of batches."""
    return any(isinstance(part, _BatchNorm) and part.running_mean is not None for part in module.modules())


@torch.no_grad()
def average_statistics(module: nn.Module) -> None:
    """Running means and variances become their mean over ranks. All ranks call it; without BatchNorm it does nothing."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    statistics = [buffer for part in module.modules() if isinstance(part, _BatchNorm)
                  for buffer in (part.running_mean, part.running_var) if buffer is not None]
    if not statistics:
        return
    joined = torch.cat([buffer.float().flatten() for buffer in statistics])
    dist.all_reduce(joined)
    joined /= dist.get_world_size()
    for buffer, piece in zip(statistics, joined.split([buffer.numel() for buffer in statistics])):
        buffer.copy_(piece.view_as(buffer))
