"""LV-ViT (Jiang et al., "All Tokens Matter: Token Labeling for Training Better Vision Transformers", NeurIPS 2021).

A ViT with a stem of convolutions, residual branches divided by a constant, a second classifier that reads every patch
token, and MixToken, which mixes images after the stem so that no patch holds two of them. It is timm's
`VisionTransformer` with these parts, so timm's names and hooks fit; keys are those of the released checkpoints.
Not here: the label maps and the loss of the paper. Names: lv_vit_names.py.

Legend: B batch, H W rows cols, N = H * W patch tokens, D width, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, Literal

import torch
from timm.layers import LayerNorm, PatchEmbed
from timm.models import build_model_with_cfg
from timm.models.vision_transformer import Block, VisionTransformer, checkpoint_filter_fn
from torch import nn
from torch.utils.checkpoint import checkpoint

from tubelet.errors import ConfigError
from tubelet.models.weights import Report, load_weights

Box = tuple[int, int, int, int]
"""A rectangle of the grid of patches: (top, left, bottom, right), in patches, the last two excluded."""
Output = Literal["combined", "class", "dense"]


def draw_mix_box(grid_size: tuple[int, int]) -> Box:
    """A MixToken box for one batch: its share of the grid uniform in 0..1 (Beta(1, 1)) before it is cut at the edges,
    its centre uniform. Draws from torch's CPU generator; the box may be empty."""
    share = float(torch.rand(()))
    edges = []
    for count in grid_size:
        half = int(count * share**0.5) // 2
        centre = int(torch.randint(count, ()))
        edges.append((max(centre - half, 0), min(centre + half, count)))
    (top, bottom), (left, right) = edges
    return top, left, bottom, right


def box_share(box: Box, grid_size: tuple[int, int]) -> float:
    """The part of an image's tokens that stay its own, "lambda": its class label weighs this, its partner's the rest."""
    top, left, bottom, right = box
    return 1 - (bottom - top) * (right - left) / (grid_size[0] * grid_size[1])


def mix_tokens(x: torch.Tensor, grid_size: tuple[int, int], box: Box) -> torch.Tensor:
    """Tokens inside the box from the image at the same place of the flipped batch. [B, N, D] -> [B, N, D].

    Doing it twice undoes it. In an odd batch the middle image is its own partner.
    """
    top, left, bottom, right = box
    rows, cols = (torch.arange(count, device=x.device) for count in grid_size)
    inside = ((rows >= top) & (rows < bottom))[:, None] & ((cols >= left) & (cols < right))[None, :]
    return torch.where(inside.reshape(1, -1, 1), x.flip(0), x)


class ConvStem(PatchEmbed):
    """The stem called "4_2": three convolutions at half resolution, then one that makes the patches.

    [B, 3, H * P, W * P] -> [B, N, D]. P is even: the last kernel covers P / 2 positions of the half-size map.
    """

    def __init__(self, img_size: int | tuple[int, int] = 224, patch_size: int | tuple[int, int] = 16, in_chans: int = 3,
                 embed_dim: int = 384, hidden: int = 64, bias: bool = True, dynamic_img_pad: bool = False,
                 strict_img_size: bool = True, device: Any = None, dtype: Any = None):
        super().__init__(img_size, patch_size, in_chans, embed_dim, bias=bias,  # type: ignore[arg-type]
                         strict_img_size=strict_img_size, device=device, dtype=dtype)
        height, width = int(self.patch_size[0]), int(self.patch_size[1])
        if height % 2 or width % 2:
            raise ConfigError(f"`patch_size` = {patch_size}: the stem halves the image first, so it must be even.",
                              "patch_size=16")
        dd = {"device": device, "dtype": dtype}
        self.conv1 = nn.Conv2d(in_chans, hidden, 7, stride=2, padding=3, bias=False, **dd)
        self.conv2 = nn.Conv2d(hidden, hidden, 3, padding=1, bias=False, **dd)
        self.conv3 = nn.Conv2d(hidden, hidden, 3, padding=1, bias=False, **dd)
        self.bn1, self.bn2, self.bn3 = (nn.BatchNorm2d(hidden, **dd) for _ in range(3))
        half = height // 2, width // 2
        self.proj = nn.Conv2d(hidden, embed_dim, half, stride=half, bias=bias, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        check_pixels(self, x)
        for conv, norm in ((self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)):
            x = norm(conv(x)).relu()
        return self.proj(x).flatten(2).transpose(1, 2)

    def set_input_size(self, img_size: Any = None, patch_size: Any = None) -> None:
        if patch_size is not None and tuple(patch_size) != self.patch_size:
            raise ConfigError(f"`patch_size` = {patch_size}: a stem made for patches of {self.patch_size[0]} pixels keeps "
                              "them.", "a new model with this patch_size")
        super().set_input_size(img_size)


def check_pixels(embed: PatchEmbed, x: torch.Tensor) -> None:
    """Images must be of the size that the model was built for."""
    if tuple(x.shape[-2:]) != embed.img_size and embed.strict_img_size:
        raise ConfigError(f"Images of {x.shape[-2]} x {x.shape[-1]} pixels, but the model was built for "
                          f"{embed.img_size[0]} x {embed.img_size[1]}.",  # type: ignore[index]
                          f"model.img_size={x.shape[-1]}; position tables of loaded weights are resized to it")


def check_patches(img_size: tuple[int, int], patch_size: int | tuple[int, int]) -> None:
    """Patches must cover the images: these models would drop what is left over without a word."""
    patch = patch_size if isinstance(patch_size, tuple) else (patch_size, patch_size)
    if any(size % side for size, side in zip(img_size, patch)):
        near = " or ".join(str(count * patch[0]) for count in dict.fromkeys(
            (max(img_size[0] // patch[0], 1), img_size[0] // patch[0] + 1)))
        raise ConfigError(f"`img_size` = {img_size[0]} x {img_size[1]} is no multiple of `patch_size` = {patch[0]} x "
                          f"{patch[1]}.", f"img_size={near}")


class ScaledBlock(Block):
    """timm's block with both residual branches divided by `skip_lam`: x + f(LN(x)) / skip_lam."""

    def __init__(self, *args: Any, skip_lam: float = 1.0, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.skip_lam = skip_lam

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x)))) / self.skip_lam
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x)))) / self.skip_lam


class LVViT(VisionTransformer):
    """A ViT with LV-ViT's parts, each of which can be left out.

    `stem`: channels of the convolutions before the patches, 0 = none. `aux_head`: the classifier of patch tokens.
    `aux_weight`: what its greatest answer over all patches weighs in the prediction. Further arguments are those of
    timm's `VisionTransformer`.

    One forward pass, three outputs:

    - "combined", the default: class logits + `aux_weight` * (greatest auxiliary logit of each class). [B, K]
    - "class": class logits alone, [B, K].
    - "dense", for training with token labels: (class logits [B, K], auxiliary logits [B, N, K]).

    `box` (see `draw_mix_box`) mixes each image with its partner in the flipped batch after the stem. Auxiliary logits
    come back un-mixed, so token labels need no mixing; class labels do, by `box_share`.
    """

    def __init__(self, img_size: int | tuple[int, int] = 224, patch_size: int | tuple[int, int] = 16, *, stem: int = 64,
                 skip_lam: float = 2.0, aux_head: bool = True, aux_weight: float = 0.5, num_classes: int = 1000,
                 embed_dim: int = 384, num_heads: int = 6, norm_layer: Any = None, block_fn: type[ScaledBlock] = ScaledBlock,
                 strict_img_size: bool = True, pos_embed: str = "learn",
                 weight_init: Literal["skip", "reset", "jax", "jax_nlhb", "moco", ""] = "", **kwargs: Any):
        check_patches((img_size, img_size) if isinstance(img_size, int) else (img_size[0], img_size[1]), patch_size)
        _check(embed_dim, num_heads, skip_lam, kwargs)
        embed = partial(ConvStem, hidden=stem) if stem else PatchEmbed
        super().__init__(img_size, patch_size, num_classes=num_classes, embed_dim=embed_dim, num_heads=num_heads,
                         norm_layer=norm_layer or partial(LayerNorm, eps=1e-5), pos_embed=pos_embed,
                         embed_layer=partial(embed, strict_img_size=strict_img_size),
                         block_fn=partial(block_fn, skip_lam=skip_lam), weight_init="skip", **kwargs)  # type: ignore[arg-type]
        self.aux_head = self._classifier() if aux_head else None
        self.aux_weight = aux_weight
        self.weight_init_mode = "reset" if weight_init == "skip" else weight_init
        if weight_init != "skip":
            self.init_weights(needs_reset=False)

    def _classifier(self) -> nn.Module:
        return nn.Linear(self.embed_dim, self.num_classes) if self.num_classes else nn.Identity()

    @torch.no_grad()
    def init_weights(self, mode: str = "", needs_reset: bool = True) -> None:
        """timm's initialisation (truncated normal 0.02 for dense layers and tables); the class token is drawn alike."""
        super().init_weights(mode, needs_reset)
        nn.init.trunc_normal_(self.cls_token, std=0.02)  # type: ignore[arg-type]

    def forward_features(self, x: torch.Tensor, box: Box | None = None) -> torch.Tensor:  # type: ignore[override]
        """Images [B, 3, H * P, W * P] -> normalised tokens [B, 1 + N, D], the class token first."""
        x = self.patch_embed(x)
        if box is not None:
            x = mix_tokens(x, self.patch_embed.grid_size, box)  # type: ignore[arg-type]
        x = self.norm_pre(self.patch_drop(self._pos_embed(x)))
        for block in self.blocks:
            x = self._run(block, x)
        return self.norm(x)

    def _run(self, block: nn.Module, *args: Any) -> torch.Tensor:
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *args, use_reentrant=False)  # type: ignore[return-value]
        return block(*args)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False, output: Output = "combined") -> Any:
        """Normalised tokens -> logits; with `pre_logits` (or without classes) the class token [B, D], with global_pool=""
        of `reset_classifier` every token. Auxiliary logits stay mixed here."""
        if not self.global_pool:
            return self.head_drop(x) if pre_logits else self.head(self.head_drop(x))
        token = self.head_drop(x[:, 0])
        if pre_logits:
            return token
        if output not in ("combined", "class", "dense"):
            raise ConfigError(f"`output` = {output!r} is not one of 'combined', 'class', 'dense'.", 'output="combined"')
        logits = self.head(token)
        if output == "dense":
            if self.aux_head is None:
                raise ConfigError("`output` = 'dense', but this model has no auxiliary head to answer for each patch.",
                                  'aux_head=True when it is built, or output="class"')
            return logits, self.aux_head(self.head_drop(x[:, 1:]))
        if output == "class" or self.aux_head is None or not self.num_classes:
            return logits
        return logits + self.aux_weight * self.aux_head(self.head_drop(x[:, 1:])).amax(1)

    def forward(self, x: torch.Tensor, *, output: Output = "combined", box: Box | None = None) -> Any:  # type: ignore[override]
        x = self.forward_features(x, box)
        return self._unmixed(self.forward_head(x, output=output), self.patch_embed.grid_size, box)  # type: ignore[arg-type]

    @staticmethod
    def _unmixed(answer: Any, grid_size: tuple[int, int], box: Box | None) -> Any:
        if box is None or not isinstance(answer, tuple):
            return answer
        return answer[0], mix_tokens(answer[1], grid_size, box)

    @torch.jit.ignore  # type: ignore[arg-type]
    def get_classifier(self) -> Any:
        """The classifier; with an auxiliary head both, class token's first."""
        return self.head if self.aux_head is None else (self.head, self.aux_head)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """New classifier(s) for other classes; 0 = none. `global_pool`: "token", or "" for all tokens."""
        if global_pool not in (None, "token", ""):
            raise ConfigError(f"`global_pool` = {global_pool!r}: this model reads its class token.", "global_pool=token")
        super().reset_classifier(num_classes, global_pool)
        if self.aux_head is not None:
            like = self.cls_token
            self.aux_head = self._classifier().to(like.device, like.dtype)  # type: ignore[union-attr]

    def official_state_dict(self) -> dict[str, torch.Tensor]:
        """The released code's layout; its names are ours."""
        return dict(self.state_dict())

    def load_official(self, state: Mapping[str, torch.Tensor]) -> Report:
        """Copy a checkpoint of the released code into the model; a position table of another grid is resized.

        Raises `CheckpointError` with everything that is missing, unexpected or of another shape.
        """
        return load_weights(self, state, head="keep", allow_new=(r"num_batches_tracked$",))


def _check(embed_dim: int, num_heads: int, skip_lam: float, kwargs: dict[str, Any]) -> None:
    if embed_dim % num_heads:
        raise ConfigError(f"`embed_dim` = {embed_dim} cannot be split among `num_heads` = {num_heads}.",
                          f"num_heads={next(n for n in range(num_heads, 0, -1) if embed_dim % n == 0)}")
    if skip_lam <= 0:
        raise ConfigError(f"`skip_lam` = {skip_lam}: residual branches are divided by it, so it must be positive.",
                          "skip_lam=1 (plain ViT) or 2")
    for option, only in (("class_token", True), ("global_pool", "token"), ("reg_tokens", 0), ("patch_drop_rate", 0),
                         ("dynamic_img_size", False), ("dynamic_img_pad", False), ("embed_norm_layer", None),
                         ("pre_norm", False), ("embed_layer", None)):
        if kwargs.get(option, only) != only:
            raise ConfigError(f"`{option}` = {kwargs[option]!r}: this model answers from its class token and from every "
                              f"patch of a fixed grid, so only {only!r} fits.", f"leave {option} out")
        kwargs.pop(option, None)


def create_lv_vit(name: str, *, pretrained: bool = False, **kwargs: Any) -> LVViT:
    """The model behind a registered LV-ViT name; `kwargs` win over the name's own row."""
    return build_model_with_cfg(LVViT, name, pretrained, pretrained_filter_fn=checkpoint_filter_fn,
                                feature_cfg={"out_indices": 3, "feature_cls": "getter"}, **kwargs)
