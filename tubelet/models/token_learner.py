"""TokenLearner (Ryoo et al., NeurIPS 2021): a few tokens learned from all positions, and ViTs that go on with them.

The modules follow the released code: v1.0 (convolutions, sigmoid, sum), v1.1 (MLP, softmax over positions) and the
TokenFuser. `TokenLearnerViT` is timm's `VisionTransformer` with them in its row of blocks; state-dict keys of the
plain parts are timm's. Not here: video (tokens are learned per frame there) and the paper's X(2+1)D models.

Legend: B batch, H W rows cols, N = H * W positions, S learned tokens, D width.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from timm.layers import LayerNorm, Mlp, get_act_layer, get_norm_layer
from timm.models import build_model_with_cfg
from timm.models._features import feature_take_indices
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import nn
from torch.utils.checkpoint import checkpoint

from tubelet.errors import ConfigError
from tubelet.models.vit import size_kwargs

LayerType = Any  # timm's: a name, a class, or None for the default


class TokenLearnerV10(nn.Module):
    """v1.0: weights from four 3 x 3 convolutions (without bias) over the normalised grid, sigmoid, then a sum.

    [B, N, D] with N = H * W in rows -> [B, S, D]. Tokens grow with N under pool="sum" (the released code): going from
    224 to 512 pixels makes them 5.2 times larger, which the LayerNorms behind absorb. pool="mean" is the paper's
    formula and does not grow.
    """

    def __init__(self, dim: int, num_tokens: int, pool: Literal["sum", "mean"] = "sum",
                 act_layer: LayerType = nn.GELU, norm_layer: LayerType = LayerNorm):
        super().__init__()
        self.pool = pool
        self.norm = norm_layer(dim)
        self.attention = nn.Sequential(
            nn.Conv2d(dim, num_tokens, 3, padding=1, bias=False), act_layer(),
            nn.Conv2d(num_tokens, num_tokens, 3, padding=1, bias=False), act_layer(),
            nn.Conv2d(num_tokens, num_tokens, 3, padding=1, bias=False), act_layer(),
            nn.Conv2d(num_tokens, num_tokens, 3, padding=1, bias=False))

    def forward(self, x: torch.Tensor, grid_size: tuple[int, int]) -> torch.Tensor:
        batch, count, dim = x.shape
        grid = self.norm(x).transpose(1, 2).reshape(batch, dim, *grid_size)  # [B, D, H, W]
        weights = self.attention(grid).sigmoid().flatten(2)  # [B, S, N]
        if self.pool == "mean":
            weights = weights / count
        return weights @ x  # the values are not normalised


class TokenLearnerV11(nn.Module):
    """v1.1: weights from an MLP over the normalised tokens, softmax over positions, so each token is a weighted mean.

    [B, N, D] -> [B, S, D]; any N, any order of positions.
    """

    def __init__(self, dim: int, num_tokens: int, bottleneck: int = 64, drop: float = 0.0,
                 act_layer: LayerType = nn.GELU, norm_layer: LayerType = LayerNorm):
        super().__init__()
        self.norm = norm_layer(dim)
        self.mlp = Mlp(dim, bottleneck, num_tokens, act_layer=act_layer, drop=drop)

    def forward(self, x: torch.Tensor, grid_size: tuple[int, int] | None = None) -> torch.Tensor:
        weights = self.mlp(self.norm(x)).transpose(1, 2).softmax(dim=-1)  # [B, S, N], over positions, not over tokens
        return weights @ x


class TokenFuser(nn.Module):
    """Mixes S tokens and spreads them over N positions: (tokens [B, S, D], x [B, N, D]) -> [B, N, D].

    The caller adds the result to `x`. It is exactly zero at first (`mix` starts at zero); the LayerNorm behind `mix`
    then sees zero variance and multiplies its gradient by 1 / sqrt(eps) = 1000, so keep gradient clipping on.
    """

    def __init__(self, dim: int, num_tokens: int, bottleneck: int = 64, drop: float = 0.0,
                 act_layer: LayerType = nn.GELU, norm_layer: LayerType = LayerNorm):
        super().__init__()
        self.norm1 = norm_layer(dim)
        self.mix = nn.Linear(num_tokens, num_tokens)
        self.norm2 = norm_layer(dim)
        self.norm = norm_layer(dim)
        self.mlp = Mlp(dim, bottleneck, num_tokens, act_layer=act_layer, drop=drop)
        self.drop = nn.Dropout(drop)
        nn.init.zeros_(self.mix.weight)
        nn.init.zeros_(self.mix.bias)

    def forward(self, tokens: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        tokens = self.norm1(tokens).transpose(1, 2)  # [B, D, S]
        tokens = self.norm2(self.mix(tokens).transpose(1, 2))  # [B, S, D]
        weights = self.mlp(self.norm(x)).sigmoid()  # [B, N, S]
        return self.drop(weights @ tokens)


class TokenLearnerViT(VisionTransformer):
    """A ViT without class token that learns `num_tokens` tokens from its positions right before block `at`.

    Without fuser the blocks from `at` on see S tokens. With fuser each of them is TokenLearner -> block -> TokenFuser
    around a residual, so the length stays N. The head averages whatever tokens are left after the final LayerNorm.
    `at=None` is after half of the blocks. Further arguments are those of timm's `VisionTransformer`.
    """

    def __init__(self, img_size: int | tuple[int, int] = 224, patch_size: int | tuple[int, int] = 16, *,
                 num_tokens: int = 8, at: int | None = None, version: Literal["1.0", "1.1"] = "1.1",
                 pool: Literal["sum", "mean"] = "sum", bottleneck: int = 64, fuser: bool = False, embed_dim: int = 768,
                 depth: int = 12, global_pool: Literal["avg", "avgmax", "max", "map"] = "avg", fc_norm: bool = False,
                 proj_drop_rate: float = 0.0, patch_drop_rate: float = 0.0, norm_layer: LayerType = None,
                 act_layer: LayerType = None, weight_init: Literal["skip", "reset", "jax", "jax_nlhb", "moco", ""] = "",
                 **kwargs: Any):
        at = depth // 2 if at is None else at
        _check(num_tokens, at, depth, version, pool, global_pool, patch_drop_rate, kwargs)
        super().__init__(img_size, patch_size, embed_dim=embed_dim, depth=depth, global_pool=global_pool,
                         fc_norm=fc_norm, class_token=False, proj_drop_rate=proj_drop_rate, norm_layer=norm_layer,
                         patch_drop_rate=patch_drop_rate, act_layer=act_layer, weight_init="skip", **kwargs)
        self.at, self.num_tokens = at, num_tokens
        layers = {"act_layer": get_act_layer(act_layer) or nn.GELU, "norm_layer": get_norm_layer(norm_layer) or LayerNorm}

        def learner() -> nn.Module:
            if version == "1.0":
                return TokenLearnerV10(embed_dim, num_tokens, pool, **layers)
            return TokenLearnerV11(embed_dim, num_tokens, bottleneck, proj_drop_rate, **layers)

        count = depth - at if fuser else 1
        self.token_learners = nn.ModuleList(learner() for _ in range(count))
        self.token_fusers = nn.ModuleList(
            TokenFuser(embed_dim, num_tokens, bottleneck, proj_drop_rate, **layers) for _ in range(count if fuser else 0))
        self.weight_init_mode = "reset" if weight_init == "skip" else weight_init
        if weight_init != "skip":
            self.init_weights(needs_reset=False)

    def init_weights(self, mode: str = "", needs_reset: bool = True) -> None:
        """timm's initialisation, after which the fusers start at zero again. `build_model` uses the papers' instead."""
        super().init_weights(mode, needs_reset)
        for fuser in getattr(self, "token_fusers", ()):
            nn.init.zeros_(fuser.mix.weight)

    def _stage(self, index: int, x: torch.Tensor, grid_size: tuple[int, int]) -> torch.Tensor:
        """Block `index` with what stands before and behind it. [B, N or S, D] -> [B, N or S, D]."""
        block = self.blocks[index]
        if index < self.at:
            return block(x)
        if len(self.token_fusers):
            number = index - self.at
            tokens = block(self.token_learners[number](x, grid_size))
            return x + self.token_fusers[number](tokens, x)
        return block(self.token_learners[0](x, grid_size) if index == self.at else x)

    def _embed(self, x: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int]]:
        x = self.patch_embed(x)
        height, width = x.shape[1:3] if self.dynamic_img_size else self.patch_embed.grid_size
        x = self.norm_pre(self.patch_drop(self._pos_embed(x)))
        return x, (height, width)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """Images [B, 3, H, W] -> normalised tokens [B, S, D] ([B, N, D] with fuser)."""
        x, grid_size = self._embed(x)
        for index in range(len(self.blocks)):
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(self._stage, index, x, grid_size, use_reentrant=False)
            else:
                x = self._stage(index, x, grid_size)
        return self.norm(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(self, x: torch.Tensor, indices: int | list[int] | None = None,  # type: ignore[override]
                              return_prefix_tokens: bool = False, norm: bool = False, stop_early: bool = False,
                              output_fmt: str = "NCHW", intermediates_only: bool = False, output_dict: bool = False,
                              ) -> Any:
        """timm's: outputs of the blocks in `indices`. Learned tokens have no grid, so they come as NLC only."""
        take, last = feature_take_indices(len(self.blocks), indices)
        if output_fmt == "NCHW" and not len(self.token_fusers) and last >= self.at:
            raise ConfigError(f"Block {last} works on {self.num_tokens} learned tokens, which have no rows and columns.",
                              f'output_fmt="NLC", or indices below {self.at}')
        x, grid_size = self._embed(x)
        found: list[torch.Tensor] = []
        for index in range(last + 1 if stop_early else len(self.blocks)):
            x = self._stage(index, x, grid_size)
            if index in take:
                found.append(self.norm(x) if norm else x)
        if output_fmt == "NCHW":
            found = [y.transpose(1, 2).unflatten(2, grid_size).contiguous() for y in found]
        if output_dict:
            features = {} if intermediates_only else {"image_features": self.norm(x)}
            return {"image_intermediates": found, **features}
        return found if intermediates_only else (self.norm(x), found)

    @torch.jit.ignore  # type: ignore[arg-type]
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's groups for layer-wise learning rates; TokenLearners and fusers belong to the block they surround."""
        groups = super().group_matcher(coarse)
        around = [(rf"^token_(?:learners|fusers)\.{number}\.", (self.at + number,))
                  for number in range(len(self.token_learners))]
        return {**groups, "blocks": [*groups["blocks"], *around]}


def _check(num_tokens: int, at: int, depth: int, version: str, pool: str, global_pool: str, patch_drop_rate: float,
           kwargs: dict[str, Any]) -> None:
    if not 0 <= at < depth:
        raise ConfigError(f"`at` = {at}: the TokenLearner stands before one of the {depth} blocks 0 to {depth - 1}.",
                          f"at={depth // 2}")
    if num_tokens < 1:
        raise ConfigError(f"`num_tokens` = {num_tokens}: at least one token must be learned.", "num_tokens=8 or 16")
    for option, value, allowed in (("version", version, ("1.0", "1.1")), ("pool", pool, ("sum", "mean")),
                                   ("global_pool", global_pool, ("avg", "avgmax", "max", "map", ""))):
        if value not in allowed:
            raise ConfigError(f"`{option}` = {value!r} is not one of {', '.join(map(repr, allowed))} "
                              "(a TokenLearner ViT has no class token).", f"{option}={allowed[0]}")
    if patch_drop_rate and version == "1.0":
        raise ConfigError(f"`patch_drop_rate` = {patch_drop_rate}: TokenLearner 1.0 needs all positions of the grid.",
                          'version="1.1", or patch_drop_rate=0')
    for option in ("class_token", "reg_tokens"):
        if kwargs.pop(option, None):
            raise ConfigError(f"`{option}` is set, but a TokenLearner ViT has only positions and learned tokens.",
                              f"leave {option} out")


def create_token_learner_vit(name: str, *, size: str, pretrained: bool = False, **kwargs: Any) -> TokenLearnerViT:
    """The model behind a registered TokenLearner name; `kwargs` win over the name's own row."""
    arguments = {**size_kwargs(size), **kwargs}
    return build_model_with_cfg(TokenLearnerViT, name, pretrained, pretrained_filter_fn=checkpoint_filter_fn,
                                feature_cfg={"out_indices": 3, "feature_cls": "getter"}, **arguments)
