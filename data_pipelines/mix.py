"""Mixup (Zhang et al. 2018, arXiv 1710.09412) and CutMix (Yun et al. 2019, arXiv 1905.04899) between neighbours.

Sample x is mixed with the neighbour x ^ 1; with R repeats, where x div R is the picture, with the same repeat of the
neighbouring picture. Both use the random numbers of the pair's lower x, hence the same lambda and box, so a pair is
mixed the same way in whatever micro-batch, rank or worker it lies; each gets lambda * own + (1 - lambda) * partner.
Label smoothing is the objective's.

Legend: m micro-batch, K classes, H W rows cols.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from data_pipelines.augment import MIX, generator, sample_seed
from data_pipelines.settings import AugmentSettings
from tubelet.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np
    import torch


def mixes(settings: AugmentSettings) -> bool:
    """Whether these settings mix at all; labels are then soft."""
    return (settings.mixup_alpha > 0 or settings.cutmix_alpha > 0) and settings.mix_prob > 0


def partner(x: int, repeats: int = 1) -> int:
    """The global sample number that x is mixed with; partner(partner(x)) == x."""
    return (x // repeats ^ 1) * repeats + x % repeats


@dataclass(frozen=True)
class Mix:
    """How one pair is mixed."""

    lam: float
    """Share of a sample's own label, and of its own pixels."""
    box: tuple[int, int, int, int] | None = None
    """CutMix: (top, left, bottom, right) that comes from the partner; None = mixup."""


def draw_mix(settings: AugmentSettings, seed: int, lower: int, height: int, width: int) -> Mix | None:
    """The mix of the pair whose lower global sample number is `lower`; None = it stays as it is."""
    draw = generator(sample_seed(seed, lower, MIX))
    mixed, cut = draw.random_sample(2)
    if mixed >= settings.mix_prob:
        return None
    if settings.cutmix_alpha > 0 and (settings.mixup_alpha == 0 or cut < settings.mix_switch_prob):
        return Mix(*_cut(draw, settings.cutmix_alpha, height, width))
    return Mix(float(draw.beta(settings.mixup_alpha, settings.mixup_alpha)))


def _cut(draw: np.random.RandomState, alpha: float, height: int,
         width: int) -> tuple[float, tuple[int, int, int, int]]:
    """(lambda, box): the box covers 1 - Beta(alpha, alpha) of the picture around a uniform centre, cut off at its
    edges; lambda is then corrected to what is left."""
    side = math.sqrt(1 - float(draw.beta(alpha, alpha)))
    rows, cols = int(height * side), int(width * side)
    y, x = int(draw.random_sample() * height), int(draw.random_sample() * width)
    top, bottom = max(y - rows // 2, 0), min(y + rows // 2, height)
    left, right = max(x - cols // 2, 0), min(x + cols // 2, width)
    return 1 - (bottom - top) * (right - left) / (height * width), (top, left, bottom, right)


def mix_batch(pixels: torch.Tensor, labels: torch.Tensor, ids: np.ndarray, settings: AugmentSettings, *, seed: int,
              num_classes: int, repeats: int = 1) -> torch.Tensor:
    """Mix uint8 pixels [m, 3, H, W] in place; labels int64 [m] -> soft fp32 [m, K]. `ids` must be consecutive and hold
    every partner (a multiple of 2 * repeats at both ends)."""
    import torch

    soft = torch.nn.functional.one_hot(labels, num_classes).float()
    first = int(ids[0])
    for slot, x in enumerate(map(int, ids)):
        other = partner(x, repeats) - first
        if other < slot:
            continue  # done with its partner
        plan = draw_mix(settings, seed, x, *pixels.shape[-2:])
        if plan is None:
            continue
        if plan.box is None:
            a, b = pixels[slot].float(), pixels[other].float()
            # products rounded one by one, no fused multiply-add: the same on every machine
            pixels[slot] = (a * plan.lam + b * (1 - plan.lam)).round_()
            pixels[other] = (b * plan.lam + a * (1 - plan.lam)).round_()
        else:
            top, left, bottom, right = plan.box
            kept = pixels[slot, :, top:bottom, left:right].clone()
            pixels[slot, :, top:bottom, left:right] = pixels[other, :, top:bottom, left:right]
            pixels[other, :, top:bottom, left:right] = kept
        own, others = soft[slot].clone(), soft[other].clone()
        soft[slot] = own * plan.lam + others * (1 - plan.lam)
        soft[other] = others * plan.lam + own * (1 - plan.lam)
    return soft


def check_mixing(settings: AugmentSettings, num_classes: int) -> None:
    """Raises `ConfigError` when labels cannot be mixed."""
    if mixes(settings) and num_classes < 1:
        raise ConfigError("`data.augment` mixes samples (mixup_alpha, cutmix_alpha), but `model.num_classes` is 0, so "
                          "there are no labels to mix.", "data.augment.mixup_alpha=0 data.augment.cutmix_alpha=0")
