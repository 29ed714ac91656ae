"""UniFormer XXS and XS: the attention stages rank their tokens and let the less wanted half share one computation.

Papers: Li et al., TPAMI 2023 (section on light models), after Evo-ViT (Xu et al., AAAI 2022). A class token joins in
stage 3; how much it attends to each position is a running score. A block computes the better half of the positions and
one token that stands for the rest, and adds this token's changes to all of the rest. Scores are passed from block to
block (in the authors' code they are a module's global variable). Not here: layer scale, which no released light model has.

Legend: B batch, H W rows cols, N tokens, D width, K classes, h heads.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Attention, Mlp, trunc_normal_
from torch import nn

from tubelet.errors import ConfigError
from tubelet.models.uniformer import Box, UniFormer, check_input, init_weights
from tubelet.models.uniformer_blocks import BlockNorm, channels_first, drop_path, position_conv, run_block


class RankingAttention(Attention):
    """Self-attention that also returns how much the first token attends to the others, mean over heads [B, N - 1].

    Only that row of the attention matrix is computed a second time; the matrix itself never exists.
    """

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        batch, count, dim = x.shape
        q, k, v = self.qkv(x).reshape(batch, count, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        row = (self.scale * q[:, :, :1] @ k.transpose(-2, -1)).softmax(-1)[:, :, 0, 1:].mean(1)
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=self.attn_drop.p if self.training else 0.0)
        return self.proj_drop(self.proj(x.transpose(1, 2).reshape(batch, count, dim))), row


class RankingBlock(nn.Module):
    """(class token [B, 1, D], map [B, D, H, W], scores [B, H * W] or None) -> the same three.

    `keep`: share of the positions that are computed one by one (rounded down). Scores move half of the way to what this
    block's class token attends to; those of the rest stay.
    """

    def __init__(self, dim: int, num_heads: int, keep: float, mlp_ratio: float = 3.0, drop: float = 0.0,
                 attn_drop: float = 0.0, path: float = 0.0):
        super().__init__()
        self.keep = keep
        self.pos_embed = position_conv(dim, 2)
        self.norm1 = BlockNorm(dim)
        self.attn = RankingAttention(dim, num_heads, qkv_bias=True, attn_drop=attn_drop, proj_drop=drop)
        self.norm2 = BlockNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=drop)
        self.drop_path = drop_path(path)

    def forward(self, cls: torch.Tensor, x: torch.Tensor, scores: torch.Tensor | None,
                ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        x = (x + self.pos_embed(x)).movedim(1, -1)  # [B, H, W, D]
        shape, x = x.shape, x.flatten(1, 2)
        if scores is None:  # the first block of stage 3 has nothing to rank by
            x, _, _, scores = self._update(torch.cat([cls, x], dim=1))
            return x[:, :1], channels_first(x[:, 1:].reshape(shape)), scores
        order = scores.argsort(dim=1, descending=True)
        x, scores = _take(x, order), scores.gather(1, order)
        count = int(x.shape[1] * self.keep)
        rest, rest_scores = x[:, count:], scores[:, count:]
        weights = rest_scores / rest_scores.sum(dim=1, keepdim=True)
        speaker = (weights.unsqueeze(-1) * rest).sum(dim=1, keepdim=True)
        y, mixed, changed, row = self._update(torch.cat([cls, x[:, :count], speaker], dim=1))
        rest = rest + mixed[:, -1:] + changed[:, -1:]  # without drop path, as the authors have it
        scores = torch.cat([0.5 * scores[:, :count] + 0.5 * row[:, :-1], rest_scores], dim=1)
        back = order.argsort(dim=1)  # the next position encoding needs the map in order
        x = _take(torch.cat([y[:, 1:-1], rest], dim=1), back)
        return y[:, :1], channels_first(x.view(shape)), scores.gather(1, back)

    def _update(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """(tokens after the block, what attention added, what the MLP added, the class token's row)."""
        mixed, row = self.attn(self.norm1(x))
        x = x + self.drop_path(mixed)
        changed = self.mlp(self.norm2(x))
        return x + self.drop_path(changed), mixed, changed, row


def _take(x: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    return x.gather(1, order.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


class UniFormerLight(UniFormer):
    """Images [B, 3, H, W] -> logits [B, K]: of the pooled map in evaluation; in training the mean of these and the class
    token's, so that both classifiers learn. `separate` gives the two apart: the authors' loss is half of the
    cross-entropy of each."""

    def __init__(self, img_size: int | tuple[int, int] = 224, in_chans: int = 3, num_classes: int = 1000, *,
                 depths: tuple[int, ...] = (2, 5, 8, 2), dims: tuple[int, ...] = (56, 112, 224, 448), head_dim: int = 28,
                 mlp_ratio: float = 3.0, stem: Any = "overlapped_first", keep: float = 0.5, drop_rate: float = 0.0,
                 pos_drop_rate: float = 0.0, proj_drop_rate: float = 0.0, attn_drop_rate: float = 0.0,
                 drop_path_rate: float = 0.0):
        if not 0 < keep < 1:
            raise ConfigError(f"`keep` = {keep}: a share of the positions above 0 and below 1 is computed one by one.",
                              "keep=0.5")
        super().__init__(img_size, in_chans, num_classes, depths=depths, dims=dims, head_dim=head_dim, stem=stem,
                         mlp_ratio=mlp_ratio, drop_rate=drop_rate, pos_drop_rate=pos_drop_rate,
                         proj_drop_rate=proj_drop_rate, drop_path_rate=drop_path_rate)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dims[2]))
        self.cls_upsample = nn.Linear(dims[2], dims[3])
        paths = iter(torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist()[depths[0] + depths[1]:])
        for number, (dim, depth) in enumerate(zip(dims[2:], depths[2:]), 3):
            setattr(self, f"blocks{number}", nn.ModuleList(
                RankingBlock(dim, dim // head_dim, keep, mlp_ratio, proj_drop_rate, attn_drop_rate, next(paths))
                for _ in range(depth)))
        self.norm_cls = nn.LayerNorm(dims[3])
        self.head_cls = nn.Linear(dims[3], num_classes) if num_classes else nn.Identity()
        init_weights(self)
        trunc_normal_(self.cls_token, std=0.02)  # zeros in the authors' code; a token of zeros has no LayerNorm to speak of

    def _both(self, x: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(class token, map) after each stage; before stage 3 the token is the learned one."""
        cls = self.cls_token.expand(x.shape[0], -1, -1)
        scores: torch.Tensor | None = None
        for number in range(1, 5):
            x = getattr(self, f"patch_embed{number}")(x)
            if number == 1:
                x = self.pos_drop(x)
            if number == 4:
                cls = self.cls_upsample(cls)
            for block in getattr(self, f"blocks{number}"):
                if number < 3:
                    x = run_block(self, block, x)
                else:
                    cls, x, scores = run_block(self, block, cls, x, scores)
            if number == 3 and scores is not None:  # positions of stage 4 are 2 x 2 of stage 3; the sum stays
                pooled = F.avg_pool2d(scores.view(-1, 1, *x.shape[2:]), 2).flatten(1)
                scores = pooled * (scores.sum(1, keepdim=True) / pooled.sum(1, keepdim=True))
            yield cls, x

    def _stages(self, x: torch.Tensor, box: Box | None = None) -> Iterator[torch.Tensor]:
        for _, y in self._both(x):
            yield y

    def forward(self, x: torch.Tensor, separate: bool = False) -> Any:
        """Logits [B, K]; with `separate` the tuple (of the map, of the class token)."""
        check_input(self, x)
        *_, (cls, x) = self._both(x)
        logits = self.forward_head(self.norm(x))
        if not (separate or self.training):
            return logits
        of_token = self.head_cls(self.norm_cls(cls[:, 0]))
        return (logits, of_token) if separate else (logits + of_token) / 2

    @torch.jit.ignore  # type: ignore[arg-type]
    def no_weight_decay(self) -> set[str]:
        return {"cls_token"}

    @torch.jit.ignore  # type: ignore[arg-type]
    def get_classifier(self) -> Any:
        return self.head, self.head_cls
