"""BatchNorm on several ranks: its running statistics, and layers whose batch is the micro-batches of all ranks.

Without synchronised layers each rank updates the statistics from its own samples. Their update is linear in what a batch
measured, so averaging over ranks now and then gives the same result as averaging once at the end: it may happen at any
time and as often as one likes. Synchronised layers hold equal statistics on all ranks at every moment.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def has_batch_norm(module: nn.Module) -> bool:
    """True when a layer of `module` keeps running statistics of batches."""
    return any(isinstance(part, _BatchNorm) and part.running_mean is not None for part in module.modules())


@torch.no_grad()
def average_statistics(module: nn.Module) -> None:
    """Running means and variances become their mean over ranks. All ranks call it; without BatchNorm it does nothing.

    Synchronised layers are left alone: theirs are equal already, and a mean of equal numbers may round.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    statistics = [buffer for part in module.modules() if isinstance(part, _BatchNorm) and not _is_synchronised(part)
                  for buffer in (part.running_mean, part.running_var) if buffer is not None]
    if not statistics:
        return
    joined = torch.cat([buffer.float().flatten() for buffer in statistics])
    dist.all_reduce(joined)
    joined /= dist.get_world_size()
    for buffer, piece in zip(statistics, joined.split([buffer.numel() for buffer in statistics])):
        buffer.copy_(piece.view_as(buffer))


def _is_synchronised(part: nn.Module) -> bool:
    return isinstance(part, (nn.SyncBatchNorm, SummedBatchNorm))


# ------------------------------------------------------------------------------------------------ one batch of all


def synchronise_batch_norm(module: nn.Module, device: torch.device) -> None:
    """BatchNorm layers measure the micro-batches of all ranks together from now on, in training mode.

    On GPUs they become torch's SyncBatchNorm (timm's where an activation is part of the layer), on CPUs, where torch's
    refuses to run, `SummedBatchNorm`. Parameters, buffers and their names stay the same objects, so call it before or after
    weights are loaded, but before an engine is made. Every training forward pass gathers 2 numbers a channel and rank, every
    backward pass sums as many, and so does every recomputation: all ranks must run the same layers.
    """
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, _BatchNorm) and child.running_mean is not None and not _is_synchronised(child):
                setattr(parent, name, _on_gpu(child) if device.type == "cuda" else _on_cpu(child))


def _on_gpu(layer: _BatchNorm) -> nn.Module:
    from timm.layers import convert_sync_batchnorm

    return convert_sync_batchnorm(layer).train(layer.training)  # type: ignore[return-value]


def _on_cpu(layer: _BatchNorm) -> nn.Module:
    new = SummedBatchNorm(layer.num_features, layer.eps, layer.momentum, layer.affine)
    new.weight, new.bias = layer.weight, layer.bias
    new.running_mean, new.running_var, new.num_batches_tracked = (layer.running_mean, layer.running_var,
                                                                  layer.num_batches_tracked)
    for name in ("drop", "act"):  # what timm's layers do behind the normalisation
        if hasattr(layer, name):
            setattr(new, name, getattr(layer, name))
    return new.train(layer.training)


class SummedBatchNorm(_BatchNorm):
    """BatchNorm over the batches of all ranks by two collectives of the default group; runs on any device.

    [B, C, ...] -> the same shape. The formula is torch's: the biased variance normalises, the unbiased one over all ranks
    goes into the running statistics. Sums are fp32 (fp64 for fp64), whatever the input.
    """

    def _check_input_dim(self, input: torch.Tensor) -> None:
        """Any number of dimensions from two on."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return self._behind(super().forward(input))
        assert self.running_mean is not None and self.running_var is not None
        y, mean, variance, count = _Normalise.apply(input, self.weight, self.bias, self.eps)  # type: ignore[misc]
        with torch.no_grad():
            factor = self.momentum
            if self.num_batches_tracked is not None:
                self.num_batches_tracked.add_(1)
                factor = 1 / float(self.num_batches_tracked) if factor is None else factor
            factor = 0.0 if factor is None else factor
            if factor:  # recomputation sets it to 0: a batch counts once
                self.running_mean.mul_(1 - factor).add_(mean, alpha=factor)
                self.running_var.mul_(1 - factor).add_(variance * (count / (count - 1).clamp(min=1)), alpha=factor)
        return self._behind(y)

    def _behind(self, y: torch.Tensor) -> torch.Tensor:
        return self.act(self.drop(y)) if hasattr(self, "act") else y  # type: ignore[operator]


class _Normalise(torch.autograd.Function):
    """(input, weight, bias, eps) -> normalised input, and the mean, biased variance and count over all ranks."""

    @staticmethod
    def forward(ctx: Any, input: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None,
                eps: float) -> tuple[torch.Tensor, ...]:
        x = input.to(torch.promote_types(input.dtype, torch.float32))
        dims = [0, *range(2, x.ndim)]
        own_variance, own_mean = torch.var_mean(x, dims, correction=0)
        own = torch.cat([own_mean, own_variance, own_mean.new_tensor([x.numel() / x.shape[1]])])
        rows = _gather(own)  # [W, 2 C + 1]
        counts = rows[:, -1:]
        count = counts.sum()
        means, variances = rows[:, :-1].chunk(2, dim=1)
        mean = (means * counts).sum(0) / count
        variance = ((variances + (means - mean) ** 2) * counts).sum(0) / count  # exact: no difference of large squares
        scale = torch.rsqrt(variance + eps)
        shape = [1, -1] + [1] * (x.ndim - 2)
        normal = (x - mean.view(shape)) * scale.view(shape)
        y = normal if weight is None else normal * weight.view(shape).to(x)
        y = y if bias is None else y + bias.view(shape).to(x)
        ctx.save_for_backward(input, weight, mean, scale, count)
        ctx.mark_non_differentiable(mean, variance, count)
        return y.to(input.dtype), mean, variance, count

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        input, weight, mean, scale, count = ctx.saved_tensors
        x = input.to(mean.dtype)
        dims, shape = [0, *range(2, x.ndim)], [1, -1] + [1] * (x.ndim - 2)
        normal, grad = (x - mean.view(shape)) * scale.view(shape), grad.to(mean.dtype)
        own_bias, own_weight = grad.sum(dims), (grad * normal).sum(dims)  # this rank's part: the engine averages gradients
        sums = torch.cat([own_bias, own_weight])
        if dist.is_initialized():
            dist.all_reduce(sums)
        of_bias, of_weight = (sums / count).chunk(2)
        of_input = grad - of_bias.view(shape) - normal * of_weight.view(shape)
        of_input = of_input * (scale if weight is None else scale * weight.to(scale)).view(shape)
        if weight is None:
            return of_input.to(input.dtype), None, None, None
        return of_input.to(input.dtype), own_weight.to(weight.dtype), own_bias.to(weight.dtype), None


def _gather(own: torch.Tensor) -> torch.Tensor:
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return own[None]
    rows = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, own)
    return torch.stack(rows)
