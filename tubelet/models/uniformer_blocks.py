"""The parts of a UniFormer, each written once for images (`ndim` 2) and clips (`ndim` 3): embeddings and blocks.

Paper: "UniFormer: Unifying Convolution and Self-attention for Visual Recognition" (Li et al., ICLR 2022, TPAMI 2023).
A block is a depthwise convolution as position encoding, then token mixing, then an MLP, each around a residual. Mixing is
local (a depthwise 5 x 5 (x 5) convolution, BatchNorm) in the early stages, self-attention (LayerNorm) in the late ones.
Three epsilons: BatchNorm 1e-5, LayerNorm of the embeddings 1e-5, LayerNorm in the blocks 1e-6.
Not here: the blocks of XXS and XS, which rank their tokens (uniformer_light.py).

Legend: B batch, T frames, H W rows cols, N tokens, D width, h heads, d head width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Attention, DropPath, Mlp
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

CONVS = {2: nn.Conv2d, 3: nn.Conv3d}
NORMS = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
BlockNorm = partial(nn.LayerNorm, eps=1e-6)


class PatchEmbed(nn.Module):
    """Convolution with kernel = stride, then LayerNorm over channels. [B, I, (T,) H, W] -> [B, D, (T',) H/k, W/k].

    Clips: `frames` is the kernel's length in time (odd, padded by half of it), `frame_stride` its step.
    """

    def __init__(self, in_chans: int, dim: int, size: int, ndim: int, frames: int = 1, frame_stride: int = 1):
        super().__init__()
        time = ndim - 2  # 0 or 1 leading time dimensions
        self.norm = nn.LayerNorm(dim)
        self.proj = CONVS[ndim](in_chans, dim, (frames,) * time + (size, size), (frame_stride,) * time + (size, size),
                                (frames // 2,) * time + (0, 0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return channels_first(self.norm(self.proj(x).movedim(1, -1)))


class OverlappedEmbed(nn.Module):
    """3 x 3 convolutions of stride 2 with BatchNorm, GELU between them: two for stage 1 (stride 4), else one."""

    def __init__(self, in_chans: int, dim: int, first: bool):
        super().__init__()
        conv = partial(nn.Conv2d, kernel_size=3, stride=2, padding=1)
        start = [conv(in_chans, dim // 2), nn.BatchNorm2d(dim // 2), nn.GELU()] if first else []
        self.proj = nn.Sequential(*start, conv(dim // 2 if first else in_chans, dim), nn.BatchNorm2d(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(x)


class ConvMlp(nn.Module):
    """The MLP as convolutions of size 1, with the names of timm's `Mlp`."""

    def __init__(self, dim: int, hidden: int, ndim: int, drop: float = 0.0):
        super().__init__()
        self.fc1 = CONVS[ndim](dim, hidden, 1)
        self.act = nn.GELU()
        self.fc2 = CONVS[ndim](hidden, dim, 1)
        self.drop = nn.Dropout(drop)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


def position_conv(dim: int, ndim: int) -> nn.Module:
    """The position encoding: a depthwise 3 x 3 (x 3) convolution that the block adds to its input."""
    return CONVS[ndim](dim, dim, 3, padding=1, groups=dim)


def channels_first(x: torch.Tensor) -> torch.Tensor:
    """[B, (T,) H, W, D] -> [B, D, (T,) H, W]."""
    return x.movedim(-1, 1).contiguous()


def drop_path(rate: float) -> nn.Module:
    return DropPath(rate) if rate else nn.Identity()


def layer_scales(block: nn.Module, shape: tuple[int, ...], init_values: float | None) -> None:
    """Give `block` the parameters gamma_1 and gamma_2; None instead of them without layer scale."""
    for number in (1, 2):
        gamma = None if init_values is None else nn.Parameter(torch.full(shape, init_values))
        block.register_parameter(f"gamma_{number}", gamma)


def scaled(x: torch.Tensor, gamma: torch.Tensor | None) -> torch.Tensor:
    return x if gamma is None else x * gamma


class LocalBlock(nn.Module):
    """Mixing by convolutions 1 -> depthwise 5 -> 1 without activation. [B, D, (T,) H, W] -> the same shape."""

    gamma_1: torch.Tensor | None
    gamma_2: torch.Tensor | None

    def __init__(self, dim: int, ndim: int, mlp_ratio: float = 4.0, drop: float = 0.0, path: float = 0.0,
                 init_values: float | None = None):
        super().__init__()
        conv = CONVS[ndim]
        self.pos_embed = position_conv(dim, ndim)
        self.norm1 = NORMS[ndim](dim)
        self.conv1 = conv(dim, dim, 1)
        self.attn = conv(dim, dim, 5, padding=2, groups=dim)
        self.conv2 = conv(dim, dim, 1)
        self.norm2 = NORMS[ndim](dim)
        self.mlp = ConvMlp(dim, int(dim * mlp_ratio), ndim, drop)
        self.drop_path = drop_path(path)
        layer_scales(self, (1, dim) + (1,) * ndim, init_values)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.pos_embed(x)
        x = x + self.drop_path(scaled(self.conv2(self.attn(self.conv1(self.norm1(x)))), self.gamma_1))
        return x + self.drop_path(scaled(self.mlp(self.norm2(x)), self.gamma_2))


class GlobalBlock(nn.Module):
    """Mixing by self-attention over all positions, of all frames together. [B, D, (T,) H, W] -> the same shape.

    `window` > 0 (images): attention within windows of that many rows and columns. The map is padded with zeros at the
    right and bottom after the LayerNorm, and padding takes part in the softmax, as the authors have it.
    """

    gamma_1: torch.Tensor | None
    gamma_2: torch.Tensor | None

    def __init__(self, dim: int, num_heads: int, ndim: int, mlp_ratio: float = 4.0, drop: float = 0.0,
                 attn_drop: float = 0.0, path: float = 0.0, init_values: float | None = None, window: int = 0):
        super().__init__()
        self.window = window
        self.pos_embed = position_conv(dim, ndim)
        self.norm1 = BlockNorm(dim)
        self.attn = Attention(dim, num_heads, qkv_bias=True, attn_drop=attn_drop, proj_drop=drop)
        self.norm2 = BlockNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=drop)
        self.drop_path = drop_path(path)
        layer_scales(self, (dim,), init_values)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = (x + self.pos_embed(x)).movedim(1, -1)  # [B, (T,) H, W, D]
        shape, x = x.shape, x.flatten(1, -2)  # [B, N, D]
        x = x + self.drop_path(scaled(self._attend(self.norm1(x), shape), self.gamma_1))
        x = x + self.drop_path(scaled(self.mlp(self.norm2(x)), self.gamma_2))
        return channels_first(x.view(shape))

    def _attend(self, x: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        if not self.window:
            return self.attn(x)
        batch, height, width, dim = shape
        side = self.window
        x = F.pad(x.view(shape), (0, 0, 0, -width % side, 0, -height % side))
        rows, cols = x.shape[1] // side, x.shape[2] // side
        x = x.view(batch, rows, side, cols, side, dim).transpose(2, 3).reshape(-1, side * side, dim)
        x = self.attn(x).view(batch, rows, cols, side, side, dim).transpose(2, 3)
        return x.reshape(batch, rows * side, cols * side, dim)[:, :height, :width].flatten(1, 2)


class SplitBlock(nn.Module):
    """The paper's comparison: attention over the frames of each position, then over the positions of each frame.

    [B, D, T, H, W] -> the same shape. The residual of the second attention is the block's input, not the result of the
    first: so the authors' code. The first attention starts at a constant: its qkv is 0, its output kernel all ones.
    """

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float = 4.0, drop: float = 0.0, attn_drop: float = 0.0,
                 path: float = 0.0):
        super().__init__()
        attention = partial(Attention, dim, num_heads, qkv_bias=True, attn_drop=attn_drop, proj_drop=drop)
        self.pos_embed = position_conv(dim, 3)
        self.t_norm, self.t_attn = BlockNorm(dim), attention()
        self.norm1, self.attn = BlockNorm(dim), attention()
        self.norm2, self.mlp = BlockNorm(dim), Mlp(dim, int(dim * mlp_ratio), drop=drop)
        self.drop_path = drop_path(path)

    def init_temporal(self) -> None:
        for tensor, value in ((self.t_attn.qkv.weight, 0.0), (self.t_attn.qkv.bias, 0.0), (self.t_attn.proj.weight, 1.0),
                              (self.t_attn.proj.bias, 0.0)):
            nn.init.constant_(tensor, value)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = (x + self.pos_embed(x)).movedim(1, -1)  # [B, T, H, W, D]
        batch, frames, height, width, dim = x.shape
        over_time = x.flatten(2, 3).transpose(1, 2).reshape(-1, frames, dim)  # [B * H * W, T, D]
        over_time = over_time + self.drop_path(self.t_attn(self.t_norm(over_time)))
        over_space = over_time.view(batch, -1, frames, dim).transpose(1, 2).reshape(-1, height * width, dim)
        residual = x.reshape(-1, height * width, dim)  # [B * T, H * W, D]
        y = (residual + self.drop_path(self.attn(self.norm1(over_space)))).view(batch, -1, dim)
        y = y + self.drop_path(self.mlp(self.norm2(y)))
        return channels_first(y.view(batch, frames, height, width, dim))


# ------------------------------------------------------------------------------------------------- recomputation


@contextlib.contextmanager
def _without_statistics(block: nn.Module) -> Iterator[None]:
    """BatchNorm's running statistics see a batch once, though the block is computed twice."""
    norms = [module for module in block.modules() if isinstance(module, _BatchNorm)]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:  # they stay arguments, since recomputation must save the same tensors
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before):
            norm.momentum, norm.num_batches_tracked = momentum, count


def run_block(model: Any, block: nn.Module, *inputs: Any) -> Any:
    """`block(*inputs)`, recomputed in the backward pass when the model checkpoints."""
    if not (model.grad_checkpointing and torch.is_grad_enabled()):
        return block(*inputs)
    if torch.compiler.is_compiling():  # the compiler recomputes without touching the statistics again
        return checkpoint(block, *inputs, use_reentrant=False)
    return checkpoint(block, *inputs, use_reentrant=False,
                      context_fn=lambda: (contextlib.nullcontext(), _without_statistics(block)))
