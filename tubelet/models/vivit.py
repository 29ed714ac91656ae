"""ViViT (Arnab et al., ICCV 2021): four ways for a ViT to attend to a clip, and its beginning from an image ViT.

Blocks are timm's; what a clip adds stands here: tubelets instead of patches, and attention over time. TokenLearner
works on each frame's tokens (Ryoo et al. 2021, section 4). State-dict keys of the image parts are timm's, so an image
ViT's weights fit by name. Not here: TimeSformer (timesformer.py), the authors' names for weights (vivit_official.py),
sinusoidal position tables.

Legend: B batch, T frames or slices of frames, H W rows cols, N tokens of one slice, D width, h heads, d head width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.layers import Attention, LayerNorm, calculate_drop_path_rates, get_act_layer, get_norm_layer
from timm.layers.drop import DropPath
from timm.models import build_model_with_cfg
from timm.models.vision_transformer import Block
from torch import nn
from torch.utils.checkpoint import checkpoint

from tubelet.errors import ConfigError, Problems
from tubelet.models.token_learner import TokenFuser, TokenLearnerV10, TokenLearnerV11
from tubelet.models.vit import init_weights, size_kwargs

Factorisation = Literal["joint", "encoder", "attention", "dot"]
Layer = Callable[[torch.Tensor], torch.Tensor]


# ------------------------------------------------------------------------------------------------- tokens of a clip


def sampled_frames(num_frames: int, count: int) -> list[int]:
    """Numbers of `count` frames that divide a clip into `count + 1` equal parts ("uniform frame sampling")."""
    if count == num_frames:
        return [*range(count)]
    return [min(round(num_frames * (i + 1) / (count + 1)), num_frames - 1) for i in range(count)]


def pair(size: int | Sequence[int]) -> tuple[int, int]:
    """(height, width) of a square's side, or of the two."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


class TubeletEmbed(nn.Module):
    """Clips [B, C, T, H, W] -> tokens [B, T / t, N, D], rows first: a 3-D convolution whose stride is its kernel.

    With `sample_frames` that many frames are picked and each is embedded as an image.
    """

    def __init__(self, img_size: int | tuple[int, int], patch_size: int | tuple[int, int], num_frames: int,
                 tubelet_size: int, in_chans: int, embed_dim: int, sample_frames: int = 0):
        super().__init__()
        self.img_size, self.patch_size = pair(img_size), pair(patch_size)
        self.num_frames = num_frames
        self.frames = sampled_frames(num_frames, sample_frames) if sample_frames else None
        tubelet_size = 1 if sample_frames else tubelet_size
        self.grid_size = ((sample_frames or num_frames) // tubelet_size, self.img_size[0] // self.patch_size[0],
                          self.img_size[1] // self.patch_size[1])
        kernel = (tubelet_size, *self.patch_size)
        self.proj = nn.Conv3d(in_chans, embed_dim, kernel, kernel)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        check_clip(x, self.proj.in_channels, self.num_frames, self.img_size)
        if self.frames is not None:
            x = x[:, :, self.frames]
        return self.proj(x).flatten(3).permute(0, 2, 3, 1)


def check_patches(problems: Problems, img_size: int | Sequence[int], patch_size: int | Sequence[int]) -> None:
    """Add a problem for each side that is no multiple of its patch, but for TokenLearner's L/10 at 224 pixels."""
    for side, patch in zip(pair(img_size), pair(patch_size)):
        if patch < 1 or side < patch or (side % patch and (side, patch) != (224, 10)):
            problems.add(f"`img_size` = {side} is not a multiple of `patch_size` = {patch}.",
                         f"img_size={max(1, round(side / max(1, patch))) * max(1, patch)}")


def check_clip(x: torch.Tensor, channels: int, num_frames: int, img_size: tuple[int, int]) -> None:
    """Raise `ConfigError` unless `x` is [B, channels, num_frames, *img_size]."""
    if x.ndim != 5 or x.shape[1] != channels:
        raise ConfigError(f"A clip of shape {list(x.shape)} was given; this model takes [batch, {channels}, frames, "
                          "height, width].", "x.unsqueeze(2) makes an image a clip of one frame")
    if x.shape[2] != num_frames:
        raise ConfigError(f"A clip of {x.shape[2]} frames was given, the model was built for {num_frames}.",
                          f"model.kwargs.num_frames={x.shape[2]}, or clips of {num_frames} frames")
    if tuple(x.shape[3:]) != img_size:
        raise ConfigError(f"Frames of {x.shape[3]} x {x.shape[4]} pixels were given, the model was built for {img_size[0]} "
                          f"x {img_size[1]}.", f"model.img_size=[{x.shape[3]},{x.shape[4]}]")


# --------------------------------------------------------------------------------------------- attention in two axes


def over_space(layer: Layer, x: torch.Tensor) -> torch.Tensor:
    """Apply a layer on sequences to each slice's tokens. [B, T, N, D] -> [B, T, N, D]."""
    return layer(x.flatten(0, 1)).unflatten(0, x.shape[:2])


def over_time(layer: Layer, x: torch.Tensor) -> torch.Tensor:
    """Apply a layer on sequences to each position's tokens over time. [B, T, N, D] -> [B, T, N, D]."""
    x = x.transpose(1, 2)
    return layer(x.flatten(0, 1)).unflatten(0, x.shape[:2]).transpose(1, 2)


class FactorisedBlock(Block):
    """Model 3: one attention within each slice, one over time at each position, one MLP; each with its own norm.

    "time_space" is the order of the authors' code, "space_time" that of the paper's equations.
    """

    def __init__(self, dim: int, num_heads: int, order: Literal["time_space", "space_time"] = "time_space", **kwargs: Any):
        super().__init__(dim, num_heads, **kwargs)
        self.order = order.split("_")
        layers = {key: kwargs[key] for key in ("qkv_bias", "proj_drop", "attn_drop") if key in kwargs}
        self.temporal_norm1 = kwargs.get("norm_layer", LayerNorm)(dim)
        self.temporal_attn = Attention(dim, num_heads, **layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        for axis in self.order:
            if axis == "time":
                x = x + self.drop_path1(over_time(self.temporal_attn, self.temporal_norm1(x)))
            else:
                x = x + self.drop_path1(over_space(self.attn, self.norm1(x)))
        return x + self.drop_path2(self.mlp(self.norm2(x)))


class FactorisedDotAttention(Attention):
    """Model 4: the first half of the heads attends over time at each position, the second half within each slice.

    [B, T, N, D] -> [B, T, N, D]; parameters are those of plain attention.
    """

    def forward(self, x: torch.Tensor, attn_mask: torch.Tensor | None = None,  # type: ignore[override]
                is_causal: bool = False) -> torch.Tensor:
        half = self.num_heads // 2
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim))  # [B, T, N, 3, h, d]
        time = qkv[..., :half, :].permute(3, 0, 2, 4, 1, 5)  # [3, B, N, h / 2, T, d]
        space = qkv[..., half:, :].permute(3, 0, 1, 4, 2, 5)  # [3, B, T, h / 2, N, d]
        time = self._attend(time).permute(0, 3, 1, 2, 4)
        space = self._attend(space).permute(0, 1, 3, 2, 4)
        x = torch.cat([time, space], dim=3).flatten(3)  # [B, T, N, h * d]
        return self.proj_drop(self.proj(x))

    def _attend(self, qkv: torch.Tensor) -> torch.Tensor:
        batch = qkv.shape[1:3]
        q, k, v = qkv.flatten(1, 2).unbind(0)  # four dimensions: with five, CUDA's fused kernels are not taken
        drop = self.attn_drop.p if self.training else 0.0
        return F.scaled_dot_product_attention(q, k, v, dropout_p=drop).unflatten(0, batch)


# ----------------------------------------------------------------------------------------------------------- ViViT


class ViViT(nn.Module):
    """A video transformer: clips [B, C, T, H, W] -> logits [B, K].

    `factorisation`: "joint" is the paper's model 1 (one encoder over all tokens), "encoder" model 2 (an image encoder
    on each slice, then `temporal_depth` blocks over the slices; 0 averages them: the paper's baseline), "attention"
    model 3, "dot" model 4. The first two have class tokens and pool by them unless `class_token=False`; the last two
    and models with TokenLearner have none and average. Tokens are ordered time first, then rows.

    `sample_frames`: embed so many frames, each as an image, instead of tubelets. `num_tokens` > 0: a TokenLearner right
    before block `at` keeps that many tokens a slice (models 1 and 2), `fuser` as in `TokenLearnerViT`. Stochastic depth
    drops residual branches per clip (in model 2's image encoder per slice) at a rate that grows linearly over each
    encoder's blocks; `drop_path_rescale=False` leaves the others unscaled as the authors' code does, True divides
    them by the share that is kept, as timm does.
    """

    def __init__(self, img_size: int | tuple[int, int] = 224, patch_size: int | tuple[int, int] = 16, *,
                 num_frames: int = 32, tubelet_size: int = 2, sample_frames: int = 0,
                 factorisation: Factorisation = "joint", temporal_depth: int = 4,
                 attention_order: Literal["time_space", "space_time"] = "time_space", in_chans: int = 3,
                 num_classes: int = 400, class_token: bool | None = None, global_pool: Literal["token", "avg"] | None = None,
                 embed_dim: int = 768, depth: int = 12, num_heads: int = 12, mlp_ratio: float = 4.0,
                 num_tokens: int = 0, at: int | None = None, version: Literal["1.0", "1.1"] = "1.1",
                 pool: Literal["sum", "mean"] = "sum", bottleneck: int = 64, fuser: bool = False, drop_rate: float = 0.0,
                 pos_drop_rate: float = 0.0, proj_drop_rate: float = 0.0, attn_drop_rate: float = 0.0,
                 drop_path_rate: float = 0.0, drop_path_rescale: bool = True, act_layer: Any = None, norm_layer: Any = None,
                 weight_init: Literal["", "skip"] = ""):
        super().__init__()
        at = depth // 2 if at is None else at
        whole = factorisation in ("joint", "encoder")
        class_token = whole and not num_tokens and global_pool != "avg" if class_token is None else class_token
        global_pool = global_pool or ("token" if class_token else "avg")
        _check(locals())
        self.factorisation, self.num_classes, self.global_pool = factorisation, num_classes, global_pool
        self.num_features = self.embed_dim = self.head_hidden_size = embed_dim
        self.num_prefix_tokens, self.grad_checkpointing = int(class_token), False
        self.at, self.num_tokens = at, num_tokens
        act: Any = get_act_layer(act_layer) or nn.GELU
        norm: Any = get_norm_layer(norm_layer) or LayerNorm

        self.patch_embed = TubeletEmbed(img_size, patch_size, num_frames, tubelet_size, in_chans, embed_dim, sample_frames)
        slices, positions = self.patch_embed.grid_size[0], self.patch_embed.grid_size[1] * self.patch_embed.grid_size[2]
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim)) if class_token else None
        rows = positions if factorisation == "encoder" else slices * positions
        self.pos_embed = nn.Parameter(torch.zeros(1, rows + self.num_prefix_tokens, embed_dim))
        self.pos_drop = nn.Dropout(pos_drop_rate)

        def blocks(cls: type[Block], count: int, **more: Any) -> nn.ModuleList:
            rates: Any = calculate_drop_path_rates(drop_path_rate, count)
            return nn.ModuleList(cls(
                embed_dim, num_heads, mlp_ratio=mlp_ratio, qkv_bias=True, proj_drop=proj_drop_rate, attn_drop=attn_drop_rate,
                drop_path=rates[i], act_layer=act, norm_layer=norm, **more) for i in range(count))

        if factorisation == "attention":
            self.blocks = blocks(FactorisedBlock, depth, order=attention_order)
        else:
            self.blocks = blocks(Block, depth, **({"attn_layer": FactorisedDotAttention} if factorisation == "dot" else {}))
        self.norm = norm(embed_dim)
        count = 0 if not num_tokens else depth - at if fuser else 1
        self.token_learners = nn.ModuleList(
            TokenLearnerV10(embed_dim, num_tokens, pool, act, norm) if version == "1.0" else
            TokenLearnerV11(embed_dim, num_tokens, bottleneck, proj_drop_rate, act, norm) for _ in range(count))
        self.token_fusers = nn.ModuleList(
            TokenFuser(embed_dim, num_tokens, bottleneck, proj_drop_rate, act, norm) for _ in range(count if fuser else 0))
        self.temporal_cls_token = self.temporal_pos_embed = self.temporal_norm = None
        self.temporal_blocks = nn.ModuleList()
        if factorisation == "encoder" and temporal_depth:
            self.temporal_cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim)) if class_token else None
            self.temporal_pos_embed = nn.Parameter(torch.zeros(1, slices + self.num_prefix_tokens, embed_dim))
            self.temporal_blocks = blocks(Block, temporal_depth)
            self.temporal_norm = norm(embed_dim)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(embed_dim, num_classes) if num_classes else nn.Identity()
        for module in self.modules():
            if isinstance(module, DropPath):
                module.scale_by_keep = drop_path_rescale
        if weight_init != "skip":
            init_weights(self, "zero")

    def _positions(self, x: torch.Tensor, token: torch.Tensor | None, table: torch.Tensor) -> torch.Tensor:
        if token is not None:
            x = torch.cat([token.expand(x.shape[0], -1, -1), x], dim=1)
        return self.pos_drop(x + table)

    def _run(self, stage: Callable[..., torch.Tensor], *args: Any) -> torch.Tensor:
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(stage, *args, use_reentrant=False)  # type: ignore[return-value]
        return stage(*args)

    def _stage(self, index: int, x: torch.Tensor) -> torch.Tensor:
        """Block `index` with the TokenLearner and fuser around it, which see one slice at a time."""
        block = self.blocks[index]
        if not self.num_tokens or index < self.at:
            return block(x)
        if not len(self.token_fusers):
            return block(self._learn(0, x) if index == self.at else x)
        number, positions = index - self.at, self.patch_embed.grid_size[1] * self.patch_embed.grid_size[2]
        tokens = block(self._learn(number, x))
        fused = self.token_fusers[number](tokens.reshape(-1, self.num_tokens, self.embed_dim),
                                          x.reshape(-1, positions, self.embed_dim))
        return x + fused.reshape(x.shape)

    def _learn(self, number: int, x: torch.Tensor) -> torch.Tensor:
        """[B, T * N, D] -> [B, T * S, D], and [B * T, N, D] -> [B * T, S, D]."""
        _, rows, cols = self.patch_embed.grid_size
        tokens = self.token_learners[number](x.reshape(-1, rows * cols, self.embed_dim), (rows, cols))
        return tokens.reshape(x.shape[0], -1, self.embed_dim)

    def _pool(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, 0] if self.global_pool == "token" else x[:, self.num_prefix_tokens:].mean(dim=1)

    def forward_slices(self, x: torch.Tensor) -> torch.Tensor:
        """Model 2's image encoder: clips -> one feature a slice [B, T, D]."""
        x = self.patch_embed(x)
        batch = x.shape[:2]
        x = self._positions(x.flatten(0, 1), self.cls_token, self.pos_embed)
        for index in range(len(self.blocks)):
            x = self._run(self._stage, index, x)
        return self._pool(self.norm(x)).unflatten(0, batch)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Clips -> normalised tokens: [B, T * N, D] behind a class token if there is one; for model 2 [B, T, D]
        likewise, or the features of the slices when there are no temporal blocks."""
        if self.factorisation == "encoder":
            x = self.forward_slices(x)
            if self.temporal_pos_embed is None or self.temporal_norm is None:
                return x
            x = self._positions(x, self.temporal_cls_token, self.temporal_pos_embed)
            for block in self.temporal_blocks:
                x = self._run(block, x)
            return self.temporal_norm(x)
        x = self.patch_embed(x)
        slices, positions = x.shape[1:3]
        x = self._positions(x.flatten(1, 2), self.cls_token, self.pos_embed)
        if self.factorisation != "joint":
            x = x.unflatten(1, (slices, positions))
        for index in range(len(self.blocks)):
            x = self._run(self._stage, index, x)
        x = self.norm(x)
        return x.flatten(1, 2) if self.factorisation != "joint" else x

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        baseline = self.factorisation == "encoder" and not len(self.temporal_blocks)
        x = self.head_drop(x.mean(dim=1) if baseline else self._pool(x))
        return x if pre_logits else self.head(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))

    # ------------------------------------------------------------------------------------------ timm's surface

    papers_init = True  # vit.init_weights knows all parts

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: Literal["token", "avg"] | None = None) -> None:
        if global_pool == "token" and not self.num_prefix_tokens:
            raise ConfigError("`global_pool` = 'token', but this model has no class token.", "global_pool=avg")
        self.num_classes, self.global_pool = num_classes, global_pool or self.global_pool
        self.head = nn.Linear(self.embed_dim, num_classes) if num_classes else nn.Identity()

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        return {"pos_embed", "cls_token", "temporal_pos_embed", "temporal_cls_token"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's groups for layer-wise learning rates: stem, blocks, then the temporal encoder's blocks."""
        around = [(rf"^token_(?:learners|fusers)\.{number}\.", (self.at + number,))
                  for number in range(len(self.token_learners))]
        return {"stem": r"^cls_token|^pos_embed|^patch_embed",
                "blocks": [(r"^blocks\.(\d+)", None), (r"^norm\.", (99999,)), *around],
                "temporal": [(r"^temporal_blocks\.(\d+)", None), (r"^temporal_(?:cls_token|pos_embed)", (0,)),
                             (r"^temporal_norm\.", (99999,))]}

    # ------------------------------------------------------------- weights of other clips, and the authors' names

    def adapt_weights(self, given: Mapping[str, torch.Tensor], method: Any, note: Callable[[str, str], None]) -> dict[
            str, torch.Tensor]:
        """Position tables for our size and length from those of `given`, for `weights.load_weights`."""
        from tubelet.models.clip_tables import fit_table, fit_times  # they stand on the module that loads weights

        given, (slices, rows, cols) = dict(given), self.patch_embed.grid_size
        if ("cls_token" in given) == bool(self.num_prefix_tokens):
            per_table = 1 if self.factorisation == "encoder" else slices
            fit_table(given, (per_table, rows, cols), self.num_prefix_tokens, method, note)
            fit_times(given, "temporal_pos_embed", self.state_dict(), self.num_prefix_tokens, "linear_align_corners", note)
        return given

    def official_state_dict(self) -> dict[str, torch.Tensor]:
        """The weights under the names and in the shapes of the authors' code."""
        from tubelet.models import vivit_official

        return vivit_official.official_state_dict(self)

    def load_official(self, state: Mapping[str, torch.Tensor]) -> Any:
        """The inverse: a `weights.Report`, or a `CheckpointError` that lists what does not fit."""
        from tubelet.models import vivit_official

        return vivit_official.load_official(self, state)


def _check(given: dict[str, Any]) -> None:
    """Raise one `ConfigError` for all arguments that do not fit together; each names the numbers that clash."""
    problems = Problems(ConfigError, "This ViViT cannot be built:")
    for option, allowed in (("factorisation", ("joint", "encoder", "attention", "dot")), ("version", ("1.0", "1.1")),
                            ("attention_order", ("time_space", "space_time")), ("pool", ("sum", "mean")),
                            ("global_pool", ("token", "avg")), ("weight_init", ("", "skip"))):
        if given[option] not in allowed:
            problems.add(f"`{option}` = {given[option]!r} is not one of {', '.join(map(repr, allowed))}.",
                         f"{option}={allowed[0]}")
    frames, tubelet, sample = given["num_frames"], given["tubelet_size"], given["sample_frames"]
    if sample and not 0 < sample <= frames:
        problems.add(f"`sample_frames` = {sample} of `num_frames` = {frames}: no more can be picked than there are.",
                     f"sample_frames={max(1, frames // 4)}")
    elif not sample and (tubelet < 1 or frames < tubelet or frames % tubelet):
        problems.add(f"`num_frames` = {frames} is not a multiple of `tubelet_size` = {tubelet}.",
                     f"num_frames={max(1, frames // max(1, tubelet)) * max(1, tubelet)}")
    check_patches(problems, given["img_size"], given["patch_size"])
    dim, heads = given["embed_dim"], given["num_heads"]
    if heads < 1 or dim % heads:
        problems.add(f"`embed_dim` = {dim} is not a multiple of `num_heads` = {heads}.", f"embed_dim={64 * max(1, heads)}")
    elif given["factorisation"] == "dot" and heads % 2:
        problems.add(f"`num_heads` = {heads} cannot be halved between time and space.", f"num_heads={heads + 1}")
    whole = given["factorisation"] in ("joint", "encoder")
    if given["class_token"] and (not whole or given["num_tokens"]):
        problems.add("`class_token` is set, but models 3 and 4 and models with TokenLearner have none.", "class_token=false")
    elif given["global_pool"] == "token" and not given["class_token"]:
        problems.add("`global_pool` = 'token', but there is no class token.", "global_pool=avg")
    if given["num_tokens"] and not whole:
        problems.add(f"`num_tokens` = {given['num_tokens']}: learned tokens have no positions to attend over time at.",
                     "factorisation=joint or encoder")
    elif given["num_tokens"] and not 0 <= given["at"] < given["depth"]:
        problems.add(f"`at` = {given['at']}: the TokenLearner stands before one of the {given['depth']} blocks 0 to "
                     f"{given['depth'] - 1}.", f"at={given['depth'] // 2}")
    elif given["fuser"] and not given["num_tokens"]:
        problems.add("`fuser` is set without learned tokens (`num_tokens` = 0).", "num_tokens=8")
    problems.raise_if_any()


# ---------------------------------------------------------------------------------------------------- by its name


def create_video(cls: type[nn.Module], name: str, pretrained: bool, arguments: dict[str, Any]) -> nn.Module:
    """timm's builder for a model of clips, whose cfg then says (C, T, H, W) as the model was built."""
    if arguments.pop("features_only", False):
        raise ConfigError(f"`features_only` is set, but {name} has no feature maps of one frame.", "forward_features()")
    overlay = {**(arguments.pop("pretrained_cfg_overlay", None) or {}), "input_size": None}  # timm insists on three
    model = build_model_with_cfg(cls, name, pretrained, pretrained_cfg_overlay=overlay, **arguments)
    embed: Any = model.patch_embed
    size = (embed.proj.in_channels, embed.num_frames, *embed.img_size)
    model.pretrained_cfg = model.default_cfg = {**model.pretrained_cfg, "input_size": size}  # type: ignore[assignment]
    return model


def create_vivit(name: str, *, size: str, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """The model behind a registered ViViT name; `kwargs` win over the name's own row."""
    return create_video(ViViT, name, pretrained, {**size_kwargs(size), **kwargs})
