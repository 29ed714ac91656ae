"""TimeSformer (Bertasius, Wang and Torresani, ICML 2021): attention over time, then over space, in every block.

The comparison that the video papers make: "divided" attention, "joint" over all tokens, and "space", which sees single
frames and averages them. State-dict keys are the released code's, which are timm's for the parts of an image ViT. Not
here: tubelets (frames are embedded as images); the beginning from an image ViT (from_image.py, where a table for
another grid is resampled in 2-D, not to the nearest row of the flattened table as the released loader does).

Legend: B batch, T frames, H W rows cols, N tokens of one frame, D width, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from timm.layers import Attention, LayerNorm, PatchEmbed, calculate_drop_path_rates, get_act_layer, get_norm_layer
from timm.models.vision_transformer import Block
from torch import nn
from torch.utils.checkpoint import checkpoint

from tubelet.errors import ConfigError, Problems
from tubelet.models.clip_tables import fit_times
from tubelet.models.position import ResizeMethod
from tubelet.models.vit import size_kwargs
from tubelet.models.vivit import check_clip, check_patches, create_video, over_space, over_time
from tubelet.models.weights import Note, Report, load_weights

AttentionType = Literal["divided", "joint", "space"]


class DividedBlock(Block):
    """Time attention of the patch tokens, space attention of each frame with the class token, MLP.

    The class token takes no part in time attention, and what each frame's space attention adds to it is averaged.
    `temporal_fc` stands behind the stochastic depth and starts at zero, so that at first this is an image ViT's block.
    """

    def __init__(self, dim: int, num_heads: int, **kwargs: Any):
        super().__init__(dim, num_heads, **kwargs)
        layers = {key: kwargs[key] for key in ("qkv_bias", "proj_drop", "attn_drop") if key in kwargs}
        self.temporal_norm1 = kwargs.get("norm_layer", LayerNorm)(dim)
        self.temporal_attn = Attention(dim, num_heads, **layers)
        self.temporal_fc = nn.Linear(dim, dim)

    def forward(self, token: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        """(class token [B, 1, D], patches [B, T, N, D]) -> the same."""
        # stochastic depth draws once per position here and once per frame below, as in the released code
        x = x + over_time(lambda y: self.temporal_fc(self.drop_path1(self.temporal_attn(self.temporal_norm1(y)))), x)
        frames = torch.cat([token.unsqueeze(1).expand(-1, x.shape[1], -1, -1), x], dim=2)  # [B, T, 1 + N, D]
        added = over_space(lambda y: self.drop_path1(self.attn(self.norm1(y))), frames)
        token, x = token + added[:, :, 0].mean(dim=1, keepdim=True), x + added[:, :, 1:]
        # per clip from here on: class token and patches are dropped together
        flat = torch.cat([token, x.flatten(1, 2)], dim=1)
        flat = flat + self.drop_path2(self.mlp(self.norm2(flat)))
        return flat[:, :1], flat[:, 1:].unflatten(1, x.shape[1:3])


class TimeSformer(nn.Module):
    """A video transformer: clips [B, C, T, H, W] -> logits [B, K], by the class token.

    `attention`: "divided", "joint" or "space". Stochastic depth rescales as timm's does. `img_size` and `num_frames`
    are those of the position tables, and of every clip.
    """

    def __init__(self, img_size: int | tuple[int, int] = 224, patch_size: int | tuple[int, int] = 16, *, num_frames: int = 8,
                 attention: AttentionType = "divided", in_chans: int = 3, num_classes: int = 400, embed_dim: int = 768,
                 depth: int = 12, num_heads: int = 12, mlp_ratio: float = 4.0, drop_rate: float = 0.0,
                 pos_drop_rate: float = 0.0, proj_drop_rate: float = 0.0, attn_drop_rate: float = 0.0,
                 drop_path_rate: float = 0.0, act_layer: Any = None, norm_layer: Any = None,
                 weight_init: Literal["", "skip"] = ""):
        super().__init__()
        _check(attention, num_frames, img_size, patch_size, embed_dim, num_heads)
        self.attention, self.num_frames, self.num_classes = attention, num_frames, num_classes
        self.num_features = self.embed_dim = self.head_hidden_size = embed_dim
        self.num_prefix_tokens, self.grad_checkpointing, self.global_pool = 1, False, "token"
        act: Any = get_act_layer(act_layer) or nn.GELU
        norm: Any = get_norm_layer(norm_layer) or LayerNorm
        self.patch_embed = PatchEmbed(img_size, patch_size, in_chans, embed_dim)  # type: ignore[arg-type]
        self.patch_embed.num_frames = num_frames  # type: ignore[assignment]
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.patch_embed.num_patches, embed_dim))
        self.time_embed = nn.Parameter(torch.zeros(1, num_frames, embed_dim)) if attention != "space" else None
        self.pos_drop, self.time_drop = nn.Dropout(pos_drop_rate), nn.Dropout(pos_drop_rate)
        rates: Any = calculate_drop_path_rates(drop_path_rate, depth)
        self.blocks = nn.ModuleList((DividedBlock if attention == "divided" else Block)(
            embed_dim, num_heads, mlp_ratio=mlp_ratio, qkv_bias=True, proj_drop=proj_drop_rate, attn_drop=attn_drop_rate,
            drop_path=rates[i], act_layer=act, norm_layer=norm) for i in range(depth))
        self.norm = norm(embed_dim)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(embed_dim, num_classes) if num_classes else nn.Identity()
        if weight_init != "skip":
            self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """The released code's: truncated normal 0.02, biases and time table zero, `temporal_fc` zero in every block."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if name.endswith("temporal_fc"):
                    nn.init.zeros_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.trunc_normal_(self.cls_token, std=0.02)

    def _run(self, block: nn.Module, *args: torch.Tensor) -> Any:
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *args, use_reentrant=False)
        return block(*args)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Clips -> normalised tokens behind a class token: [B, 1 + T * N, D] in the order of time, then rows ("space":
        [B, 1 + N, D], averages over the frames)."""
        check_clip(x, self.patch_embed.proj.in_channels, self.num_frames, self.patch_embed.img_size)  # type: ignore[arg-type]
        batch = x.shape[0]
        x = self.patch_embed(x.transpose(1, 2).flatten(0, 1))
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        x = self.pos_drop(x + self.pos_embed)  # [B * T, 1 + N, D]
        if self.time_embed is None:
            for block in self.blocks:
                x = self._run(block, x)
            return self.norm(x.unflatten(0, (batch, -1)).mean(dim=1))
        x = x.unflatten(0, (batch, -1))
        token, x = x[:, 0, :1], self.time_drop(x[:, :, 1:] + self.time_embed.unsqueeze(2))
        if self.attention == "divided":
            for block in self.blocks:
                token, x = self._run(block, token, x)
            return self.norm(torch.cat([token, x.flatten(1, 2)], dim=1))
        x = torch.cat([token, x.flatten(1, 2)], dim=1)
        for block in self.blocks:
            x = self._run(block, x)
        return self.norm(x)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        x = self.head_drop(x[:, 0])
        return x if pre_logits else self.head(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))

    # ------------------------------------------------------------------------------------------ timm's surface

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        if global_pool not in (None, "token"):
            raise ConfigError(f"`global_pool` = {global_pool!r}: a TimeSformer classifies by its class token.",
                              "global_pool=token")
        self.num_classes = num_classes
        self.head = nn.Linear(self.embed_dim, num_classes) if num_classes else nn.Identity()

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        return {"pos_embed", "cls_token", "time_embed"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return {"stem": r"^cls_token|^pos_embed|^time_embed|^patch_embed",
                "blocks": [(r"^blocks\.(\d+)", None), (r"^norm\.", (99999,))]}

    # ------------------------------------------------------------- weights of other clips, and the authors' names

    def adapt_weights(self, given: Mapping[str, torch.Tensor], method: ResizeMethod, note: Note) -> dict[str, torch.Tensor]:
        """The time table for our length from that of `given`, for `weights.load_weights`, which resizes the other."""
        given = dict(given)
        fit_times(given, "time_embed", self.state_dict(), 0, "nearest", note)
        return given

    def official_state_dict(self) -> dict[str, torch.Tensor]:
        """The weights under the released code's names, which are ours (its files put `model.` before each)."""
        return {name: tensor.detach().clone() for name, tensor in self.state_dict().items()}

    def load_official(self, state: Mapping[str, torch.Tensor]) -> Report:
        """The inverse; raises `CheckpointError` that lists what does not fit, and has changed nothing then."""
        return load_weights(self, state, head="keep")


def _check(attention: str, num_frames: int, img_size: Any, patch_size: Any, embed_dim: int, num_heads: int) -> None:
    problems = Problems(ConfigError, "This TimeSformer cannot be built:")
    if attention not in ("divided", "joint", "space"):
        problems.add(f"`attention` = {attention!r} is not one of 'divided', 'joint', 'space'.", "attention=divided")
    if num_frames < 1:
        problems.add(f"`num_frames` = {num_frames}: a clip has at least one frame.", "num_frames=8")
    check_patches(problems, img_size, patch_size)
    if num_heads < 1 or embed_dim % num_heads:
        problems.add(f"`embed_dim` = {embed_dim} is not a multiple of `num_heads` = {num_heads}.",
                     f"embed_dim={64 * max(1, num_heads)}")
    problems.raise_if_any()


def create_timesformer(name: str, *, size: str, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """The model behind a registered TimeSformer name; `kwargs` win over the name's own row."""
    return create_video(TimeSformer, name, pretrained, {**size_kwargs(size), **kwargs})
