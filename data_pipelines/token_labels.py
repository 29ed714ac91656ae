"""Maps of token labels (Jiang et al. 2021, "All Tokens Matter", arXiv 2104.10858): what an annotator saw where in a picture.

A map is a member of its sample, a `.npy` of float16 or float32: [2, k, R, C] = the k greatest logits of each cell and their
classes (as in the released label data, 2 x 5 x 18 x 18), or [K, R, C] = all logits. It covers the whole picture, rows first.

It rides along: flipped with its picture, warped by RandAugment's geometric operations (rotation, shears, shifts: nearest
cell, logits 0 from outside), as in the released code; colours, erasing and the crop leave it alone. The crop's box in
fractions rides along instead, and `pool` cuts it out of the map on the device (the RoIAlign of Yun et al. 2021,
"Re-labeling ImageNet", arXiv 2101.05022). RandAugment after the crop would warp the crop but not the map, so token labels
with RandAugment need `crop_last`. The loss is the objective's.

Legend: B batch, k labels of a cell, K classes, R C rows cols of a map, S side of the pooled map.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from data_pipelines.augment import Augmented
from data_pipelines.decode import BadSample
from data_pipelines.mix import mixes
from data_pipelines.settings import DataSettings
from tubelet.errors import ConfigError, Problems, TubeletError
from tubelet.safe_io import read_npy

if TYPE_CHECKING:
    import torch


def check_token_labels(data: DataSettings) -> None:
    """Raises `ConfigError` for settings under which maps would not fit their pictures."""
    if data.token_labels is None:
        return
    problems, augment = Problems(ConfigError), data.augment
    if augment.rand_augment and not augment.crop_last:
        problems.add(f"`data.token_labels` is {data.token_labels} and `data.augment.rand_augment` is "
                     f"{augment.rand_augment!r}, which would warp the crop but not the map.",
                     "data.augment.crop_last=true, or data.augment.rand_augment=null")
    if mixes(augment):
        problems.add(f"`data.token_labels` is {data.token_labels}, but pixels are mixed (mixup_alpha "
                     f"{augment.mixup_alpha:g}, cutmix_alpha {augment.cutmix_alpha:g}) and maps are not.",
                     "data.augment.mixup_alpha=0 data.augment.cutmix_alpha=0 data.augment.mixtoken_alpha=1")
    if data.clip.frames > 1:
        problems.add(f"`data.token_labels` is {data.token_labels}, a map of a picture, but `data.clip.frames` is "
                     f"{data.clip.frames}.", "data.token_labels=null")
    problems.raise_if_any()


def read_token_map(data: bytes, num_classes: int = 0) -> np.ndarray:
    """Bytes of a map -> float32 [2, k, R, C] or [K, R, C]. Raises `BadSample` when they are none, or name a class outside
    0..num_classes-1 (0 = not checked)."""
    try:
        found = read_npy(data)
    except TubeletError as error:
        raise BadSample(f"token labels: {error.problem}") from None
    dense = found.ndim == 3
    shaped = dense or found.ndim == 4 and found.shape[0] == 2
    if found.dtype not in (np.float16, np.float32) or not found.size or not shaped:
        raise BadSample(f"token labels: {found.dtype} {list(found.shape)}, not float16 or float32 [2, k, rows, cols] or "
                        "[classes, rows, cols]")
    found = found.astype(np.float32)
    if not np.isfinite(found).all():
        raise BadSample("token labels: not all numbers are finite")
    if dense:
        if num_classes and len(found) != num_classes:
            raise BadSample(f"token labels: {len(found)} classes, not {num_classes}")
        return found
    classes = found[1]
    if (classes != np.floor(classes)).any() or classes.min() < 0 or num_classes and classes.max() >= num_classes:
        raise BadSample(f"token labels: classes {classes.min():g}..{classes.max():g} are not whole numbers within "
                        f"0..{num_classes - 1 if num_classes else ''}")
    return found


def move(token_map: np.ndarray, augmented: Augmented) -> np.ndarray:
    """The map of the picture as it was before its crop: flipped and warped as `augmented` says. A copy."""
    moved = token_map[..., ::-1] if augmented.flipped else token_map
    if augmented.sources is None:
        return np.ascontiguousarray(moved)
    rows, cols = moved.shape[-2:]
    cells = augmented.sources(rows, cols).reshape(-1)
    moved = moved.reshape(*moved.shape[:-2], rows * cols)[..., np.maximum(cells, 0)]
    logits = moved[0] if token_map.ndim == 4 else moved
    logits[..., cells < 0] = 0
    return moved.reshape(token_map.shape)


def pool(maps: torch.Tensor, boxes: torch.Tensor, size: int, num_classes: int, *, swapped: bool = False) -> torch.Tensor:
    """Logits fp32 [B, K, S, S] of crops: maps [B, 2, k, R, C] or [B, K, R, C], boxes [B, 4] = (y, x, height, width) in
    fractions. Classes that a cell does not name have logit 0; softmax comes after.

    `swapped` takes (y, x) for (x, y) as the released code does, with which all published numbers were trained.
    """
    import torch
    from torchvision.ops import roi_align

    dense = maps.float()
    if maps.ndim == 5:
        dense = dense.new_zeros((len(maps), num_classes, *maps.shape[-2:])).scatter_(1, maps[:, 1].long(), dense[:, 0])
    y, x, height, width = boxes.to(dense).unbind(1)
    rows, cols = maps.shape[-2:]
    if swapped:
        x, y, width, height = y, x, height, width
    corners = torch.stack([x * cols, y * rows, (x + width) * cols, (y + height) * rows], 1) - 0.5  # cells have area
    numbers = torch.arange(len(maps), device=corners.device, dtype=corners.dtype)[:, None]
    return roi_align(dense, torch.cat([numbers, corners], 1), (size, size), sampling_ratio=-1, aligned=False)
