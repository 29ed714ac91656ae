"""Resampling what depends on the grid of patches: position tables in 2-D and in time, patch kernels, 2-D -> 3-D.

Papers: ViT (2020), section 3.2; FlexiViT (Beyer et al. 2023), section 3.4; ViViT (Arnab et al. 2021), section 3.4;
I3D (Carreira and Zisserman 2017), section 2.4. Functions of tensors only: which tensor of a model they are for is
known to weights.py and to the models. Arithmetic is fp32 (the pseudo-inverse fp64), results have the tensor's dtype.

Legend: T frames, H W rows cols, N tokens, D width, O I channels out and in of a kernel.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F

from tubelet.errors import TubeletError

ResizeMethod = Literal["bicubic_antialias", "bilinear_align_corners"]
TimeMethod = Literal["linear_align_corners", "nearest"]
InflateMode = Literal["central", "average"]


def resample_pos_embed(table: torch.Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int], num_prefix: int = 0,
                       method: ResizeMethod = "bicubic_antialias") -> torch.Tensor:
    """A table [1, num_prefix + H * W, D] for `old_grid` -> the table for `new_grid`; (rows, cols), rows first.

    Prefix rows (class token, registers) are copied bit for bit. Arithmetic is fp32, the result has the table's dtype.
    "bicubic_antialias" is what timm does; "bilinear_align_corners" what the ViT, SViT and ViViT code does
    (`scipy.ndimage.zoom(order=1)`: corners stay where they are). They differ by up to a standard deviation, so
    results of a paper are repeated with its own method only.
    """
    if method not in get_args(ResizeMethod):
        raise TubeletError(f"`{method}` is no way to resample a position table.", " or ".join(get_args(ResizeMethod)))
    rows = table.shape[1] - num_prefix
    if table.ndim != 3 or rows != old_grid[0] * old_grid[1] or min(new_grid) < 1:
        raise TubeletError(
            f"A position table of shape {list(table.shape)} with {num_prefix} prefix rows is not a grid of {old_grid[0]} x "
            f"{old_grid[1]} patches (for one of {new_grid[0]} x {new_grid[1]}).",
            "check img_size and patch_size of the model that the weights come from")
    if old_grid == new_grid:
        return table
    prefix, grid = table[:, :num_prefix], table[:, num_prefix:]
    # a smooth resize is written as size=, never scale_factor=: with a factor the grid itself is recomputed from it
    image = grid.float().reshape(1, *old_grid, -1).permute(0, 3, 1, 2)  # [1, D, H, W]
    if method == "bicubic_antialias":
        image = F.interpolate(image, size=new_grid, mode="bicubic", antialias=True, align_corners=False)
    else:
        image = F.interpolate(image, size=new_grid, mode="bilinear", align_corners=True)
    grid = image.permute(0, 2, 3, 1).reshape(1, new_grid[0] * new_grid[1], -1).to(table.dtype)
    return torch.cat([prefix, grid], dim=1)


def resample_temporal(table: torch.Tensor, new_frames: int, num_prefix: int = 0,
                      method: TimeMethod = "linear_align_corners") -> torch.Tensor:
    """A table over time [1, num_prefix + T, D] -> [1, num_prefix + new_frames, D].

    "linear_align_corners" (ViViT: first and last frame keep their rows) or "nearest" (TimeSformer's released code).
    Prefix rows are copied bit for bit.
    """
    if method not in get_args(TimeMethod):
        raise TubeletError(f"`{method}` is no way to resample a table over time.", " or ".join(get_args(TimeMethod)))
    frames = table.shape[1] - num_prefix if table.ndim == 3 else 0
    if frames < 1 or new_frames < 1:
        raise TubeletError(f"A time table of shape {list(table.shape)} with {num_prefix} prefix rows cannot become one of "
                           f"{new_frames} frames: both need at least one frame.", "check num_frames of both models")
    if frames == new_frames:
        return table
    rows = table[:, num_prefix:].float().transpose(1, 2)  # [1, D, T]
    if method == "nearest":
        rows = F.interpolate(rows, size=new_frames, mode="nearest")
    else:
        rows = F.interpolate(rows, size=new_frames, mode="linear", align_corners=True)
    return torch.cat([table[:, :num_prefix], rows.transpose(1, 2).to(table.dtype)], dim=1)


def tile_frames(table: torch.Tensor, frames: int, num_prefix: int = 0) -> torch.Tensor:
    """An image's table [1, num_prefix + N, D] -> a clip's [1, num_prefix + frames * N, D], frame-major: each frame gets
    the same rows (ViViT's way to begin from an image model); prefix rows stand once."""
    return torch.cat([table[:, :num_prefix], table[:, num_prefix:].repeat(1, frames, 1)], dim=1)


def inflate_kernel(weight: torch.Tensor, frames: int, mode: InflateMode = "central") -> torch.Tensor:
    """An image kernel [O, I, h, w] -> a clip kernel [O, I, frames, h, w] that answers a still clip alike.

    "central": zero but for frame `frames // 2` (ViViT's default); "average": repeated and divided by `frames` (I3D).
    """
    if mode not in get_args(InflateMode):
        raise TubeletError(f"`{mode}` is no way to inflate a kernel.", " or ".join(get_args(InflateMode)))
    if weight.ndim != 4 or frames < 1:
        raise TubeletError(f"A kernel of shape {list(weight.shape)} cannot be inflated to {frames} frames: it must be "
                           "[out, in, rows, cols], and there must be at least one frame.", "an image model's kernel")
    if mode == "average":
        return (weight.float() / frames).to(weight.dtype).unsqueeze(2).repeat(1, 1, frames, 1, 1)
    inflated = weight.new_zeros(*weight.shape[:2], frames, *weight.shape[2:])
    inflated[:, :, frames // 2] = weight
    return inflated


def resample_patch_kernel(weight: torch.Tensor, new_size: tuple[int, int]) -> torch.Tensor:
    """A patch kernel [O, I, h, w] -> [O, I, *new_size] by FlexiViT's pseudo-inverse resize.

    The new kernel answers a resized patch as the old one answered the patch: exactly when the patch grows, and in the
    least-squares sense (patches of white noise) when it shrinks. Patches are resized bicubically with antialiasing.
    """
    if weight.ndim != 4 or min(new_size) < 1:
        raise TubeletError(f"A kernel of shape {list(weight.shape)} cannot become one of {tuple(new_size)} pixels: it must "
                           "be [out, in, rows, cols].", "an image model's patch kernel, and a positive patch_size")
    old_size = (weight.shape[2], weight.shape[3])
    if old_size == tuple(new_size):
        return weight
    count = old_size[0] * old_size[1]
    basis = torch.eye(count, dtype=torch.float64, device=weight.device).reshape(count, 1, *old_size)
    resize = F.interpolate(basis, size=tuple(new_size), mode="bicubic", antialias=True, align_corners=False).flatten(1)
    kernel = weight.double().flatten(2) @ torch.linalg.pinv(resize).T  # resize: [old pixels, new pixels]
    return kernel.unflatten(2, tuple(new_size)).to(weight.dtype)
