"""A video transformer's beginning: the weights of an image ViT (ViViT, section 3.4; TimeSformer's released loader).

For models whose blocks and names are an image ViT's with something added for time: ViViT and TimeSformer. Weights of
clips go in by `weights.load_weights`.

Legend: T slices of frames, H W rows cols, N tokens, D width.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from torch import nn

from tubelet.errors import CheckpointError, ConfigError
from tubelet.models.position import InflateMode, ResizeMethod, inflate_kernel, resample_pos_embed, tile_frames
from tubelet.models.uniformer import UniFormer
from tubelet.models.uniformer import from_image as inflate_uniformer
from tubelet.models.weights import Report, Row, State, _shape, _source_grid, load_weights

Positions = Literal["tile", "resize"]
Temporal = Literal["identity", "copy"]


def from_image(model: nn.Module, state: Mapping[str, torch.Tensor], *, kernel: InflateMode = "central",
               positions: Positions = "tile", temporal: Temporal = "identity",
               method: ResizeMethod = "bilinear_align_corners", head: Literal["replace", "auto", "keep"] = "replace",
               head_bias: float = 0.0, source: Mapping[str, Any] | None = None) -> Report:
    """Begin a video model with an image ViT's weights (timm's names), and say what was done with every tensor.

    `kernel`: which frames of a tubelet the patch kernel looks at ("central" or "average", see `inflate_kernel`).
    `positions`: every slice gets the image's table; "tile" wants the same grid of patches, "resize" resamples it first
    by `method` (`source["input_size"]` tells the image's grid if it is not square). `temporal`: attention over time
    begins as a copy of the image's attention, and with "identity" what it adds is zero, so that the model begins as the
    image ViT on each slice. Only the layer behind the attention is zeroed: with all of q, k, v and output at zero, as
    the paper words it, no gradient but that of one bias would ever be other than zero. The classifier is a new one,
    unless `head` says otherwise. Model 2's temporal encoder, time tables and TimeSformer's rest stay as they were made.

    The image's class token is taken over, or dropped with its row of the table if this model has none. Raises
    `CheckpointError` that lists all that does not fit; nothing has been changed then.
    """
    if isinstance(model, UniFormer):  # other names, no tables: every kernel is inflated
        return inflate_uniformer(model, state, kernel, head, head_bias, source)
    for option, value, allowed in (("positions", positions, Positions), ("temporal", temporal, Temporal)):
        if value not in get_args(allowed):
            raise ConfigError(f"`{option}` = {value!r} is not one of {', '.join(map(repr, get_args(allowed)))}.",
                              f"{option}={get_args(allowed)[0]}")
    given, wanted, done = dict(state), model.state_dict(), {}
    dropped: list[Row] = []
    if "cls_token" in given and "cls_token" not in wanted:
        dropped.append(Row("cls_token", "dropped", f"{_shape(given.pop('cls_token'))}, the model has no class token"))
        if "pos_embed" in given and _source_grid(given["pos_embed"].shape[1] - 1, given, source or {}):
            given["pos_embed"] = given["pos_embed"][:, 1:]
            dropped.append(Row("pos_embed[0]", "dropped", "the class token's row of the position table"))
    elif "cls_token" in wanted and "cls_token" not in given:
        raise CheckpointError("The model has a class token, the image's weights have none.",
                              "model.kwargs.class_token=false, or weights of an image ViT with class token")
    if "pos_embed" in given:
        given["pos_embed"], done["pos_embed"] = _positions(model, given, positions, method, source or {})
    _time_attention(given, wanted, temporal, done)
    name, own = "patch_embed.proj.weight", wanted["patch_embed.proj.weight"]
    if name in given and own.ndim == 5 and given[name].ndim == 4:
        done[name] = ("resized", f"{_shape(given[name])} -> {own.shape[2]} frames, {kernel}")
        given[name] = inflate_kernel(given[name], own.shape[2], kernel)
    report = load_weights(model, given, head=head, head_bias=head_bias, allow_new=(
        r"^temporal_", r"^time_embed$", r"^blocks\.\d+\.temporal_"))
    report.rows = dropped + [Row(row.name, *done[row.name]) if row.name in done else row for row in report.rows]
    return report


def _positions(model: Any, given: State, positions: str, method: ResizeMethod, source: Mapping[str, Any]) -> tuple[
        torch.Tensor, tuple[str, str]]:
    """The image's table for all slices of the model, and a word on it."""
    table, (rows, cols) = given["pos_embed"], model.patch_embed.grid_size[-2:]
    prefix = int("cls_token" in given)
    old = _source_grid(table.shape[1] - prefix, given, source)
    if old is None:
        raise CheckpointError(f"The image's position table has {table.shape[1]} rows, {prefix} of them for a class token: "
                              f"the rest is no square of patches, the model has {rows} x {cols}.",
                              "source={'input_size': (3, height, width)} of the image's weights")
    if old != (rows, cols) and positions == "tile":
        raise CheckpointError(f"The image's weights have {old[0]} x {old[1]} patches, a slice of the model {rows} x {cols}.",
                              'positions="resize"')
    changed = [f"{old[0]} x {old[1]} -> {rows} x {cols}, {method}"] if old != (rows, cols) else []
    table = resample_pos_embed(table, old, (rows, cols), prefix, method)
    slices = (model.pos_embed.shape[1] - prefix) // (rows * cols)
    if slices > 1:
        table = tile_frames(table, slices, prefix)
        changed.append(f"the same rows for each of {slices} slices")
    return table, ("resized" if changed else "loaded", "; ".join(changed) or _shape(table))


def _time_attention(given: State, wanted: Mapping[str, torch.Tensor], temporal: str,
                    done: dict[str, tuple[str, str]]) -> None:
    """Add what attention over time begins with to `given`."""
    for name in wanted:
        match = re.fullmatch(r"(blocks\.\d+)\.temporal_(attn|norm1|fc)\.(.+)", name)
        if not match:
            continue
        block, part, leaf = match.groups()
        twin, has_fc = f"{block}.{part}.{leaf}", f"{block}.temporal_fc.weight" in wanted
        if temporal == "identity" and (part == "fc" or (part == "attn" and leaf.startswith("proj.") and not has_fc)):
            given[name] = torch.zeros_like(wanted[name], device="cpu")
            done[name] = ("new", f"{_shape(wanted[name])}, zero: attention over time adds nothing at first")
        elif twin in given and (part == "attn" or has_fc):  # ViViT's own norm stays as made, TimeSformer's is copied
            given[name] = given[twin]
            done[name] = ("loaded", f"{_shape(given[twin])}, a copy of {block.partition('.')[0]}.*.{part}.{leaf}")
