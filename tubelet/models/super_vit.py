"""SuperViT (Lin et al., "Super Vision Transformer", arXiv 2205.11397): one ViT that runs at several image sizes and with
several shares of its tokens, both chosen at the call.

Images are shrunk inside the model; the patch stays as large, so a smaller image has fewer patches, and each size has its
own position table. In three of the blocks the patches that the class token looks at least are left behind. Everything else
is DeiT-S or LV-ViT-S. Not here: which sizes and shares a training step draws, and the paper's losses.

Legend: B batch, N = 1 + H * W tokens with the class token, D width, K classes, h heads, d head width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm
from timm.models import build_model_with_cfg
from timm.models.vision_transformer import Attention
from torch import nn

from tubelet.errors import ConfigError
from tubelet.models.lv_vit import Box, LVViT, Output, ScaledBlock, check_patches, mix_tokens
from tubelet.models.position import ResizeMethod, resample_pos_embed
from tubelet.models.weights import Note, Report, load_weights

PAPER_DROP_AT = (3, 6, 9)


class RankingAttention(Attention):
    """timm's attention, which can also say how much the class token looks at each patch."""

    def forward_ranked(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, N, D] -> (output [B, N, D], scores [B, N - 1]: the class token's softmax row, mean over heads, in fp32).

        Only that row is computed, N * D multiply-adds; the attention matrix is never there. Dropout of attention acts on
        the output, not on the scores, and no gradient flows through them.
        """
        batch, count, _ = x.shape
        qkv = self.qkv(x).reshape(batch, count, 3, self.num_heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # [B, h, N, d] each
        q, k = self.q_norm(q), self.k_norm(k)
        drop = self.attn_drop.p if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=drop, scale=self.scale)
        y = self.proj_drop(self.proj(self.norm(y.transpose(1, 2).reshape(batch, count, -1))))
        with torch.no_grad():
            row = (q[:, :, :1] * self.scale) @ k.transpose(-2, -1)  # [B, h, 1, N]
            scores = row.float().softmax(-1).mean(1)[:, 0, 1:]
        return y, scores


def num_kept(keep: float, count: int) -> int:
    """Patches kept of `count` tokens: ceil(keep * count), the class token counted in, as the released code does (EViT
    leaves it out: 99 instead of 98 patches of 196 at keep 0.5). Never more than there are."""
    return min(math.ceil(keep * count), count - 1)


def kept_tokens(scores: torch.Tensor, number: int) -> torch.Tensor:
    """Scores [B, N - 1] -> token numbers [B, 1 + number]: the class token's 0, then the best patches, best first."""
    best = scores.topk(number, dim=1, sorted=True).indices + 1
    return torch.cat([torch.zeros_like(best[:, :1]), best], dim=1)


class RankingBlock(ScaledBlock):
    """A block that drops tokens between attention and MLP when `keep` is below 1."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **{**kwargs, "attn_layer": RankingAttention})

    def forward(self, x: torch.Tensor, keep: float = 1.0) -> torch.Tensor:  # type: ignore[override]
        if keep == 1:
            return super().forward(x)
        y, scores = self.attn.forward_ranked(self.norm1(x))  # type: ignore[operator]
        x = x + self.drop_path1(self.ls1(y)) / self.skip_lam
        index = kept_tokens(scores, num_kept(keep, x.shape[1]))
        x = x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x)))) / self.skip_lam


class SuperViT(LVViT):
    """`model(images, size=160, keep=0.7)`: images of any size, shrunk (or grown) to `size`; `keep` in (0, 1].

    `img_size` is the largest size, `sizes` are all of them; left out, they keep the paper's proportions: 8, 10, 12 and 14
    patches a side for 224 pixels. `size` and `keep` given here are for calls that do not say theirs (the largest; 1).
    `drop_at`: blocks that drop tokens, the paper's 3, 6 and 9 at any depth. Further arguments are those of `LVViT`.

    Tokens left after dropping stand in the order of their scores, so output="dense" needs keep 1.
    A backward pass gives gradients to the table of its size only; to train at one size, build with sizes=[that size], since
    data-parallel engines wait for the gradients of all.
    """

    def __init__(self, img_size: int | tuple[int, int] = 224, patch_size: int = 16, *, sizes: Sequence[int] | None = None,
                 size: int | None = None, keep: float = 1.0, drop_at: Sequence[int] | None = None, depth: int = 12,
                 **kwargs: Any):
        largest = _square(img_size)
        check_patches((largest, largest), patch_size)
        sizes = paper_sizes(largest, patch_size) if sizes is None else sorted(set(sizes))
        for one in sizes:
            check_patches((one, one), patch_size)
        if not sizes or sizes[-1] != largest:
            raise ConfigError(f"`img_size` = {largest}, but the largest of `sizes` = {list(sizes)} is "
                              f"{max(sizes, default='none')}.", f"img_size={max(sizes, default=largest)}")
        drop_at = [i for i in PAPER_DROP_AT if i < depth] if drop_at is None else drop_at
        if any(not 0 <= i < depth for i in drop_at):
            raise ConfigError(f"`drop_at` = {list(drop_at)}: the model has the blocks 0 to {depth - 1}.",
                              "drop_at=[3, 6, 9], or a greater depth")
        for fixed in ("pos_embed", "no_embed_class", "strict_img_size", "block_fn", "attn_layer"):
            if kwargs.pop(fixed, None):
                raise ConfigError(f"`{fixed}` is set, but each size of a SuperViT has a learned position table with a row "
                                  "for the class token.", f"leave {fixed} out")
        super().__init__(largest, patch_size, depth=depth, pos_embed="none", strict_img_size=False, block_fn=RankingBlock,
                         **{**kwargs, "weight_init": "skip"})
        self.drop_at, self.sizes = frozenset(drop_at), tuple(sizes)
        self.pos_embed_list = nn.ParameterList(
            nn.Parameter(torch.zeros(1, 1 + (one // patch_size) ** 2, self.embed_dim)) for one in sizes)
        self.size, self.keep = self._choice(size or largest, keep)
        mode = kwargs.get("weight_init", "")
        self.weight_init_mode = "reset" if mode == "skip" else mode
        if mode != "skip":
            self.init_weights(needs_reset=False)

    @torch.no_grad()
    def init_weights(self, mode: str = "", needs_reset: bool = True) -> None:
        """As `LVViT`; the position tables are drawn independently of each other (truncated normal 0.02)."""
        super().init_weights(mode, needs_reset)
        for table in self.pos_embed_list:
            nn.init.trunc_normal_(table, std=0.02)

    def _choice(self, size: int, keep: float) -> tuple[int, float]:
        if size not in self.sizes:
            raise ConfigError(f"`size` = {size}, but this model has position tables for {', '.join(map(str, self.sizes))} "
                              "pixels only.", f"size={min(self.sizes, key=lambda known: abs(known - size))}")
        if not 0 < keep <= 1:
            raise ConfigError(f"`keep` = {keep}: it is a share of the tokens, above 0 and at most 1.", "keep=0.5, 0.7 or 1")
        return size, keep

    def resize(self, x: torch.Tensor, size: int) -> torch.Tensor:
        """Images [B, 3, H, W] -> [B, 3, size, size], bilinear with the corners kept and without antialiasing, as the
        paper's code does: mixing and erasing come before it, at full size."""
        if x.shape[-2:] == (size, size):
            return x
        return F.interpolate(x, size=(size, size), mode="bilinear", align_corners=True)

    def _pos_embed(self, x: torch.Tensor) -> torch.Tensor:
        table = self.pos_embed_list[self.sizes.index(round(math.sqrt(x.shape[1])) * self.patch_embed.patch_size[0])]
        return self.pos_drop(torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1) + table)  # type: ignore

    def forward_features(self, x: torch.Tensor, box: Box | None = None, *,  # type: ignore[override]
                         size: int | None = None, keep: float | None = None) -> torch.Tensor:
        """Images -> normalised tokens [B, N', D], the class token first. `box` counts patches of the largest size."""
        size, keep = self._choice(self.size if size is None else size, self.keep if keep is None else keep)
        x = self.patch_embed(self.resize(x, size))
        x = self._mixed(x, size, box)
        x = self._pos_embed(x)
        for index, block in enumerate(self.blocks):
            x = self._run(block, x, keep if index in self.drop_at else 1.0)
        return self.norm(x)

    def forward(self, x: torch.Tensor, *, size: int | None = None, keep: float | None = None,  # type: ignore[override]
                output: Output = "combined", box: Box | None = None) -> Any:
        if output == "dense" and (keep or self.keep) != 1:
            raise ConfigError(f"`output` = 'dense' with `keep` = {keep or self.keep}: dropped tokens give no answer and the "
                              "others stand in the order of their scores.", "keep=1")
        answer = self.forward_head(self.forward_features(x, box, size=size, keep=keep), output=output)
        if not isinstance(answer, tuple):
            return answer
        return answer[0], self._mixed(answer[1], size or self.size, box)

    def _mixed(self, x: torch.Tensor, size: int, box: Box | None) -> torch.Tensor:
        if box is None:
            return x
        patch = self.patch_embed.patch_size[0]
        grid = size // patch
        return mix_tokens(x, (grid, grid), scale_box(box, self.sizes[-1] // patch, grid))

    def forward_intermediates(self, x: torch.Tensor, *args: Any, size: int | None = None, **kwargs: Any) -> Any:
        """timm's: outputs of the blocks at keep 1, where tokens are a grid."""
        size, _ = self._choice(size or self.size, 1.0)
        return super().forward_intermediates(self.resize(x, size), *args, **kwargs)

    def set_input_size(self, img_size: Any = None, patch_size: Any = None) -> None:
        raise ConfigError(f"A SuperViT has position tables for {', '.join(map(str, self.sizes))} pixels; "
                          f"`set_input_size` to {img_size} has no single one to resize.",
                          "model.img_size when it is built; loading weights resizes the tables")

    @torch.jit.ignore  # type: ignore[arg-type]
    def no_weight_decay(self) -> set[str]:
        """The class token alone: the released code meant to name the tables as well, but by a name that none of them has,
        so the published models were trained with decayed tables."""
        return {"cls_token"}

    def adapt_weights(self, given: Mapping[str, torch.Tensor], method: ResizeMethod, note: Note) -> dict[str, torch.Tensor]:
        """Tables for our sizes from those of `given`: the one of this grid, else the largest resampled. A plain ViT has
        one, `pos_embed`. Called by `load_weights`, which puts what `note` is told into its report."""
        given = dict(given)
        tables = {name: given.pop(name) for name in [*given]
                  if name == "pos_embed" or name.startswith("pos_embed_list.")}
        sides = {math.isqrt(max(table.shape[1] - 1, 0)) if table.ndim == 3 else 0: table for table in tables.values()}
        if not sides or any(table.shape != (1, side**2 + 1, self.embed_dim) for side, table in sides.items()):
            return given | tables  # nothing that could be resized: the caller's error names them
        best = max(sides)
        for number, size in enumerate(self.sizes):
            side, name = size // self.patch_embed.patch_size[0], f"pos_embed_list.{number}"
            if side in sides:
                given[name] = sides[side]
                continue
            given[name] = resample_pos_embed(sides[best], (best, best), (side, side), 1, method)
            note(name, f"{best} x {best} -> {side} x {side}, {method}")
        return given

    def load_official(self, state: Mapping[str, torch.Tensor]) -> Report:
        """Copy a checkpoint of the released code into the model, or one of a plain DeiT-S, whose table is resized."""
        return load_weights(self, state, head="keep", allow_new=(r"num_batches_tracked$",))


def paper_sizes(largest: int, patch_size: int) -> list[int]:
    """The paper's four sizes in pixels, 4/7, 5/7, 6/7 and 7/7 of the largest in whole patches."""
    return sorted({max(round(largest / patch_size * part / 7), 1) * patch_size for part in (4, 5, 6, 7)})


def scale_box(box: Box, largest: int, grid: int) -> Box:
    """A MixToken box of the largest grid on a smaller one, cut down to whole patches; it may become empty. (The division
    is the released code's: from 14 to 12, an edge at 14 comes to 11.)"""
    top, left, bottom, right = (int(edge // (largest / grid)) for edge in box)
    return top, left, bottom, right


def _square(img_size: int | Sequence[int]) -> int:
    height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
    if height != width:
        raise ConfigError(f"`img_size` = {height} x {width}: the sizes of a SuperViT are squares.", f"img_size={height}")
    return height


def create_super_vit(name: str, *, norm_eps: float, pretrained: bool = False, **kwargs: Any) -> SuperViT:
    """The model behind a registered SuperViT name; `kwargs` win over the name's own row."""
    kwargs.setdefault("norm_layer", partial(LayerNorm, eps=norm_eps))
    return build_model_with_cfg(SuperViT, name, pretrained,
                                feature_cfg={"out_indices": 3, "feature_cls": "getter"}, **kwargs)
