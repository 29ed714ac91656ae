"""Resampling learned position tables when the grid of patches changes. Papers: ViT 2020, section 3.2; timm.

Legend: N tokens, D width.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F

from tubelet.errors import TubeletError

ResizeMethod = Literal["bicubic_antialias", "bilinear_align_corners"]


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
