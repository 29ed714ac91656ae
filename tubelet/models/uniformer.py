"""UniFormer for images and clips: four stages, convolution in the first two, self-attention in the last two.

Papers: Li et al., ICLR 2022 (video) and TPAMI 2023 (image, token labeling, dense prediction). State-dict keys and shapes
are the authors' own. Blocks: uniformer_blocks.py; XXS and XS: uniformer_light.py; backbones that return four maps:
uniformer_dense.py; sizes and names: uniformer_names.py. Not here: the loss of token labeling.

Legend: B batch, T frames, H W rows cols, N tokens, D width, K classes, d head width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from timm.layers import trunc_normal_
from timm.models import build_model_with_cfg
from torch import nn

from tubelet.errors import CheckpointError, ConfigError, Problems
from tubelet.models.position import InflateMode, inflate_kernel
from tubelet.models.uniformer_blocks import (
    NORMS,
    GlobalBlock,
    LocalBlock,
    OverlappedEmbed,
    PatchEmbed,
    SplitBlock,
    run_block,
)
from tubelet.models.uniformer_names import UNIFORMERS
from tubelet.models.weights import Report, Row, load_weights

STRIDE = 32  # pixels per position of the last stage
Box = tuple[int, int, int, int]


class UniFormer(nn.Module):
    """Images [B, 3, H, W] (`ndim` 2) or clips [B, 3, T, H, W] (`ndim` 3) -> logits [B, K].

    `stem`: "plain" (kernel = stride, LayerNorm), "overlapped" (3 x 3 convolutions, BatchNorm) or "overlapped_first" (so
    in stage 1 only). `layer_scale`: "" none, "global" in the attention blocks, "all". `attention` of stage 3 in images:
    over the whole map, in windows of `window_size`, or "hybrid" (every fourth block over the whole map). `split`:
    attention over time, then space. `temporal_embed`: embeddings 2 to 4 look at three frames (the authors' "STD").

    `aux_head` is the second classifier of token labeling: its largest logits over positions are added, halved, to the
    first one's. `model(x, separate=True)` gives both and the box of MixToken instead (see `forward`).
    """

    def __init__(self, img_size: int | tuple[int, int] = 224, in_chans: int = 3, num_classes: int = 1000, *,
                 depths: tuple[int, ...] = (3, 4, 8, 3), dims: tuple[int, ...] = (64, 128, 320, 512), head_dim: int = 64,
                 mlp_ratio: float = 4.0, stem: Literal["plain", "overlapped", "overlapped_first"] = "plain",
                 layer_scale: Literal["", "global", "all"] = "", init_values: float = 1e-6, ndim: Literal[2, 3] = 2,
                 num_frames: int = 16, split: bool = False, temporal_embed: bool = False, aux_head: bool = False,
                 attention: Literal["global", "window", "hybrid"] = "global", window_size: int = 14,
                 global_pool: Literal["avg"] = "avg", drop_rate: float = 0.0, pos_drop_rate: float = 0.0,
                 proj_drop_rate: float = 0.0, attn_drop_rate: float = 0.0, drop_path_rate: float = 0.0):
        super().__init__()
        size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
        _check(size, depths, dims, head_dim, stem, layer_scale, ndim, num_frames, split, temporal_embed, aux_head,
               attention, window_size, global_pool)
        self.ndim, self.head_dim, self.num_classes, self.global_pool = ndim, head_dim, num_classes, global_pool
        self.num_features = self.head_hidden_size = dims[3]
        self.input_size = (in_chans, *((num_frames,) if ndim == 3 else ()), *size)
        self.split, self.grad_checkpointing = split, False
        self.feature_info: Any = [{"num_chs": dim, "reduction": 4 * 2**index, "module": f"blocks{index + 1}"}
                                  for index, dim in enumerate(dims)]
        paths = iter(torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist())
        for index, (dim, depth) in enumerate(zip(dims, depths)):
            below = dims[index - 1] if index else in_chans
            if stem == "overlapped" or (stem == "overlapped_first" and not index):
                embed: nn.Module = OverlappedEmbed(below, dim, first=not index)
            else:
                frames, frame_stride = (3, 1 if index else 2) if not index or temporal_embed else (1, 1)
                embed = PatchEmbed(below, dim, 2 if index else 4, ndim, frames, frame_stride)
            self.add_module(f"patch_embed{index + 1}", embed)
            heads, blocks = dim // head_dim, []
            for number in range(depth):
                common = {"mlp_ratio": mlp_ratio, "drop": proj_drop_rate, "path": next(paths)}
                gamma = init_values if layer_scale == "all" or (layer_scale and index >= 2) else None
                if index < 2:
                    blocks.append(LocalBlock(dim, ndim, init_values=gamma, **common))
                elif split:
                    blocks.append(SplitBlock(dim, heads, attn_drop=attn_drop_rate, **common))
                else:
                    windowed = index == 2 and (attention == "window" or (attention == "hybrid" and (number + 1) % 4))
                    blocks.append(GlobalBlock(dim, heads, ndim, attn_drop=attn_drop_rate, init_values=gamma,
                                              window=window_size if windowed else 0, **common))
            self.add_module(f"blocks{index + 1}", nn.ModuleList(blocks))
        self.pos_drop = nn.Dropout(pos_drop_rate)
        self.norm = NORMS[ndim](dims[3])
        self.head_drop = nn.Dropout(drop_rate)
        self.head = _classifier(dims[3], num_classes)
        self.aux_head = _classifier(dims[3], num_classes) if aux_head else None
        init_weights(self)
        self.register_state_dict_post_hook(_record_head_dim)
        self.register_load_state_dict_pre_hook(_check_head_dim)

    # ---------------------------------------------------------------------------------------------- forward

    def _stages(self, x: torch.Tensor, box: Box | None = None) -> Iterator[torch.Tensor]:
        """The map after each stage; `box` (rows, cols of stage 1) is taken from the neighbour in the flipped batch."""
        for number in range(1, 5):
            x = getattr(self, f"patch_embed{number}")(x)
            if number == 1:
                x = self.pos_drop(_swap(x, box) if box else x)
            for block in getattr(self, f"blocks{number}"):
                x = run_block(self, block, x)
            yield x

    def forward_features(self, x: torch.Tensor, box: Box | None = None) -> torch.Tensor:
        """Normalised map of the last stage [B, D, (T/2,) H/32, W/32]."""
        check_input(self, x)
        *_, x = self._stages(x, box)
        return self.norm(x)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """A map -> logits [B, K], or the mean over positions [B, D]."""
        pooled = x.flatten(2).mean(-1)
        if pre_logits:
            return pooled
        logits = self.head(self.head_drop(pooled))
        if isinstance(self.aux_head, nn.Linear):
            logits = logits + 0.5 * self.aux_head(x.flatten(2).transpose(1, 2)).amax(1)
        return logits

    def forward(self, x: torch.Tensor, separate: bool = False) -> Any:
        """Logits; with `separate` (token labeling) the tuple (logits [B, K] of the pooled map, logits [B, N, K] of each
        position, box of MixToken in positions).

        Training with `separate` mixes: after the first embedding a box is taken from the neighbour in the flipped batch,
        and the positions' logits are put back. As in the authors' code the box is drawn on the 8 times finer map and
        rounded down, so a small one mixes pixels while the box returned is empty.
        """
        if not separate:
            return self.forward_head(self.forward_features(x))
        if self.aux_head is None:
            raise ConfigError("`separate` is set, but this UniFormer has one classifier.", "a model whose name ends in _tl")
        box = mix_box(x.shape[-2] // 4, x.shape[-1] // 4) if self.training else None
        x = self.forward_features(x, box)
        logits = self.head(self.head_drop(x.flatten(2).mean(-1)))
        top, left, bottom, right = (edge // 8 for edge in box or (0, 0, 0, 0))
        tokens = self.aux_head(_swap(x, (top, left, bottom, right)).flatten(2).transpose(1, 2))
        return logits, tokens, (top, left, bottom, right)

    def forward_intermediates(self, x: torch.Tensor, indices: int | list[int] | None = None, norm: bool = False,
                              stop_early: bool = False, output_fmt: str = "NCHW", intermediates_only: bool = False) -> Any:
        """timm's: the maps after the stages in `indices` (0 to 3; an integer is the last so many), `norm` only of the
        last one."""
        check_input(self, x)
        take = list(range(4))[-indices:] if isinstance(indices, int) else [i % 4 for i in indices or range(4)]
        found = []
        last = x
        for index, last in enumerate(self._stages(x)):
            if index in take:
                found.append(self.norm(last) if norm and index == 3 else last)
            if stop_early and intermediates_only and index == max(take):
                break
        return found if intermediates_only else (self.norm(last), found)

    # ---------------------------------------------------------------------------------------- timm's surface

    @torch.jit.ignore  # type: ignore[arg-type]
    def no_weight_decay(self) -> set[str]:
        """Nothing by name: the authors spare 1-D parameters only, and decay the depthwise position kernels."""
        return set()

    @torch.jit.ignore  # type: ignore[arg-type]
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's groups for layer-wise rates: a stage (coarse) or a block; an embedding goes with the block behind it."""
        blocks = r"^(?:patch_embed|blocks)(\d+)" if coarse else [
            (r"^patch_embed(\d+)", (0,)), (r"^blocks(\d+)\.(\d+)", None), (r"^cls_token", (3, 0)),
            (r"^cls_upsample", (4, 0)), (r"^(?:norm|head|aux_head)", (99999,))]
        return {"stem": r"^patch_embed1", "blocks": blocks}

    @torch.jit.ignore  # type: ignore[arg-type]
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass."""
        self.grad_checkpointing = enable

    @torch.jit.ignore  # type: ignore[arg-type]
    def get_classifier(self) -> Any:
        """The classifier, or both of a token-labeled model."""
        return self.head if self.aux_head is None else (self.head, self.aux_head)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """New classifier(s) for `num_classes`, 0 for none."""
        if global_pool not in (None, "avg"):
            raise ConfigError(f"`global_pool` = {global_pool!r}: a UniFormer averages all positions.", 'global_pool="avg"')
        self.num_classes = num_classes
        for name in ("head", "aux_head", "head_cls"):
            if isinstance(getattr(self, name, None), nn.Module):
                head = _classifier(self.num_features, num_classes).to(self.norm.weight.device)
                init_weights(head)
                setattr(self, name, head)

    # --------------------------------------------------------------------------------------- official layout

    def official_state_dict(self) -> dict[str, torch.Tensor]:
        """The authors' layout, which is ours; the head width is in its metadata."""
        return self.state_dict()

    def load_official(self, state: Mapping[str, torch.Tensor]) -> Report:
        """Load weights of the authors or of MMAction2; raises `CheckpointError` for what does not fit."""
        return load_weights(self, state, key_map=official_key, head="keep", allow_new=(r"num_batches_tracked$",))

    def check_source(self, state: Mapping[str, Any], source: Mapping[str, Any]) -> None:
        """Raises `CheckpointError` when weights are known to be for heads of another width.

        Known from the metadata of a state dict that a UniFormer here wrote, or from the cfg of the weights: `head_dim`
        (every cfg of a UniFormer has it) or, without, the name they were trained under.
        """
        _check_head_dim(self, state, "", getattr(state, "_metadata", {}).get("", {}))
        row = UNIFORMERS.get(source.get("architecture", ""))
        given = source.get("head_dim") or (source.get("model_args") or {}).get("head_dim") or (row and row.head_dim)
        _check_head_dim(self, state, "", {"head_dim": given})


def official_key(name: str) -> str:
    """The name here of a tensor of the authors' weights (the same) or of MMAction2's."""
    return name.removeprefix("backbone.").replace("cls_head.fc_cls.", "head.")


# ------------------------------------------------------------------------------------------------- parts of a model


def _classifier(dim: int, num_classes: int) -> nn.Module:
    return nn.Linear(dim, num_classes) if num_classes else nn.Identity()


@torch.no_grad()
def init_weights(model: nn.Module) -> None:
    """The authors' initial weights: dense layers truncated normal 0.02, bias 0; convolutions and norms are torch's."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            trunc_normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)
    for module in model.modules():
        if isinstance(module, SplitBlock):
            module.init_temporal()


def mix_box(height: int, width: int) -> Box:
    """MixToken's box (top, left, bottom, right): a uniform share of the map, its centre anywhere, clipped."""
    share = float(torch.rand(()))
    rows, cols = (int(side * math.sqrt(1 - share)) for side in (height, width))
    row, col = int(torch.randint(height, ())), int(torch.randint(width, ()))
    return (max(row - rows // 2, 0), max(col - cols // 2, 0), min(row + rows // 2, height), min(col + cols // 2, width))


def _swap(x: torch.Tensor, box: Box) -> torch.Tensor:
    top, left, bottom, right = box
    mixed = x.clone()
    mixed[..., top:bottom, left:right] = x.flip(0)[..., top:bottom, left:right]
    return mixed


def check_input(model: UniFormer, x: torch.Tensor, whole: bool = True) -> None:
    """Raises `ConfigError` unless the model can take `x`; `whole`: no pixel may be left over at the edge."""
    shape = tuple(x.shape)
    if len(shape) != model.ndim + 2 or shape[1] != model.input_size[0]:
        wanted = f"[B, {model.input_size[0]}, {'T, ' * (model.ndim - 2)}H, W]"
        raise ConfigError(f"This UniFormer takes {wanted}, and was given {list(shape)}.",
                          "uniformer_video_* for clips, the other names for images")
    for word, pixels in (("rows", shape[-2]), ("columns", shape[-1])):
        if pixels < STRIDE or (whole and pixels % STRIDE):
            near = max(1, round(pixels / STRIDE)) * STRIDE
            raise ConfigError(f"The image has {pixels} {word}, which is no multiple of the {STRIDE} pixels that one "
                              "position of the last stage stands for.", f"img_size={near}")
    if model.ndim == 3 and shape[2] % 2:
        raise ConfigError(f"The clip has {shape[2]} frames; the first embedding takes them by 2.",
                          f"{shape[2] + 1} frames (the papers: 8, 16, 32)")


def _check(size: tuple[int, ...], depths: tuple[int, ...], dims: tuple[int, ...], head_dim: int, stem: str,
           layer_scale: str, ndim: int, num_frames: int, split: bool, temporal_embed: bool, aux_head: bool, attention: str,
           window_size: int, global_pool: str) -> None:
    problems = Problems(ConfigError)
    for option, value, allowed in (("stem", stem, ("plain", "overlapped", "overlapped_first")),
                                   ("layer_scale", layer_scale, ("", "global", "all")), ("ndim", ndim, (2, 3)),
                                   ("attention", attention, ("global", "window", "hybrid")),
                                   ("global_pool", global_pool, ("avg",))):
        if value not in allowed:
            problems.add(f"`{option}` = {value!r} is not one of {', '.join(map(repr, allowed))}.",
                         f"{option}={allowed[0]!r}")
    for option, row in (("depths", depths), ("dims", dims)):
        if len(row) != 4 or min(row) < 1:
            problems.add(f"`{option}` = {tuple(row)}: a UniFormer has four stages, none of them empty.",
                         f"{option}={(3, 4, 8, 3) if option == 'depths' else (64, 128, 320, 512)}")
    for dim in dims[2:4]:
        if head_dim < 1 or dim % head_dim:
            problems.add(f"`head_dim` = {head_dim} does not divide the width {dim} of an attention stage.",
                         f"head_dim={math.gcd(*dims[2:4])}, or one of its divisors")
    if any(side < STRIDE or side % STRIDE for side in size):
        problems.add(f"`img_size` = {' x '.join(map(str, size))}: every side must be a multiple of {STRIDE} pixels.",
                     f"img_size={max(1, round(size[0] / STRIDE)) * STRIDE}")
    if ndim == 3 and (num_frames < 2 or num_frames % 2):
        problems.add(f"`num_frames` = {num_frames}: the first embedding takes frames by 2.", "num_frames=8, 16 or 32")
    if ndim == 3:
        for option, is_set in (("stem", stem != "plain"), ("layer_scale", layer_scale), ("aux_head", aux_head),
                               ("attention", attention != "global")):
            if is_set:
                problems.add(f"`{option}` is set, but a UniFormer for clips has no such form.", f"leave {option} out")
    for option, is_set in (("split", split), ("temporal_embed", temporal_embed)):
        if is_set and ndim == 2:
            problems.add(f"`{option}` is set, but images have no frames.", "ndim=3")
    if attention != "global" and window_size < 1:
        problems.add(f"`window_size` = {window_size}: a window has at least one position.", "window_size=14")
    problems.raise_if_any()


# -------------------------------------------------------------------------------------------------- head width


def _record_head_dim(module: Any, state: dict[str, Any], prefix: str, metadata: dict[str, Any]) -> None:
    metadata["head_dim"] = module.head_dim


def _check_head_dim(module: Any, state: Mapping[str, Any], prefix: str, metadata: Mapping[str, Any], *_: Any) -> None:
    given = metadata.get("head_dim")
    if given is not None and given != module.head_dim:
        raise CheckpointError(f"These weights were trained with heads of {given}, the model has heads of "
                              f"{module.head_dim}. No tensor's shape shows it; the answers would be wrong.",
                              f"head_dim={given}, or the name that has it (`tubelet models uniformer`)")


# ------------------------------------------------------------------------------------------------------ making


def create_uniformer(name: str, *, pretrained: bool = False, light: bool = False, features_only: bool = False,
                     **kwargs: Any) -> nn.Module:
    """The model behind a registered UniFormer name; `kwargs` win over its row.

    `features_only`: the backbone for dense prediction (`uniformer_dense.UniFormerFeatures`), which also takes
    `out_indices`.
    """
    from tubelet.models.uniformer_dense import UniFormerFeatures
    from tubelet.models.uniformer_light import UniFormerLight

    if light and features_only:
        raise ConfigError(f"`features_only` is set, but {name} ranks its tokens and has no form for dense prediction.",
                          "uniformer_small or uniformer_base")
    cls = UniFormerLight if light else UniFormerFeatures if features_only else UniFormer
    if (given := kwargs.get("pretrained_cfg")) and not isinstance(given, str):  # of an export
        given = dict(given) if isinstance(given, Mapping) else vars(given)
        channels, *frames, height, width = given["input_size"]
        kwargs.update({"num_frames": frames[0]} if frames and "num_frames" not in kwargs else {})
        kwargs["pretrained_cfg"] = {key: value for key, value in given.items() if key != "head_dim"} | {
            "input_size": (channels, height, width)}  # timm knows three numbers, and no width of heads
    model: Any = build_model_with_cfg(cls, name, pretrained, **kwargs)
    model.pretrained_cfg = model.default_cfg = {**model.pretrained_cfg, "input_size": model.input_size,
                                                    "head_dim": model.head_dim}
    return model


def from_image(model: UniFormer, state: Mapping[str, torch.Tensor], kernel: InflateMode = "central",
               head: Literal["auto", "replace", "keep"] = "auto", head_bias: float = 0.0,
               source: Mapping[str, Any] | None = None) -> Report:
    """Load an image UniFormer's weights into a video UniFormer, inflating every kernel in time, and say what was done.

    "central" (MMAction2): a still clip is answered as its image, exactly. "average" (the authors): not so, because time
    is padded with zeros. `source` is the cfg of the weights. Weights trained with token labeling or layer scale are no
    start for video, say the authors.
    """
    if model.ndim != 3:
        raise ConfigError("Image weights are inflated into a UniFormer for clips; this one takes images.",
                          "uniformer_video_small or uniformer_video_base, or load_official for an image model")
    model.check_source(state, source or {})
    wanted, given, changed = model.state_dict(), {}, {}
    for name, tensor in state.items():
        own = wanted.get(official_key(name))
        if own is not None and own.ndim == 5 and tensor.ndim == 4:
            given[name] = inflate_kernel(tensor, own.shape[2], kernel)
            changed[official_key(name)] = f"{_shape(tensor)} -> {_shape(given[name])}, {kernel}"
        else:
            given[name] = tensor
    report = load_weights(model, given, key_map=official_key, head=head, head_bias=head_bias,
                          allow_new=(r"num_batches_tracked$", r"\.t_(?:norm|attn)\."))
    report.rows = [Row(row.name, "resized", changed[row.name]) if row.name in changed else row for row in report.rows]
    return report


def _shape(tensor: torch.Tensor) -> str:
    return " x ".join(map(str, tensor.shape))
