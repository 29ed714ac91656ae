"""Mixup (Zhang et al. 2018, arXiv 1710.09412) and CutMix (Yun et al. 2019, arXiv 1905.04899) between neighbours; boxes for
MixToken (Jiang et al. 2021, arXiv 2104.10858), which mixes tokens inside the model.

Sample x is mixed with the neighbour x ^ 1; with R repeats, where x div R is the picture, with the same repeat of the
neighbouring picture. Both use the random numbers of the pair's lower x, hence the same lambda and box, so a pair is
mixed the same way in whatever micro-batch, rank or worker it lies; each gets lambda * own + (1 - lambda) * partner. All
frames of a clip are mixed alike. Label smoothing is the objective's.

Legend: m micro-batch, T frames, K classes, H W rows cols.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from data_pipelines.draws import MIX, generator, sample_seed
from data_pipelines.settings import AugmentSettings
from tubelet.errors import ConfigError, Problems

if TYPE_CHECKING:
    import torch


def mixes(settings: AugmentSettings) -> bool:
    """Whether these settings mix pixels at all; labels are then soft."""
    return (settings.mixup_alpha > 0 or settings.cutmix_alpha > 0) and settings.mix_prob > 0


def mixes_tokens(settings: AugmentSettings) -> bool:
    """Whether batches carry `mix_boxes`; labels stay class numbers."""
    return settings.mixtoken_alpha > 0 and settings.mix_prob > 0


def in_pairs(settings: AugmentSettings) -> bool:
    """Whether a sample and its partner must lie in one micro-batch."""
    return mixes(settings) or mixes_tokens(settings)


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
    """Mix uint8 pixels [m, 3, H, W] or [m, 3, T, H, W] in place; labels int64 [m] -> soft fp32 [m, K]. `ids` must be
    consecutive and hold every partner (a multiple of 2 * repeats at both ends)."""
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
            own, theirs = (pixels[which][..., top:bottom, left:right] for which in (slot, other))
            kept = own.clone()
            own.copy_(theirs)
            theirs.copy_(kept)
        own, others = soft[slot].clone(), soft[other].clone()
        soft[slot] = own * plan.lam + others * (1 - plan.lam)
        soft[other] = others * plan.lam + own * (1 - plan.lam)
    return soft


def mix_boxes(ids: np.ndarray, settings: AugmentSettings, *, seed: int, repeats: int = 1) -> np.ndarray:
    """MixToken boxes, float64 [m, 3]: (side, y, x) of each sample, equal for a sample and its partner.

    `side` is the box's height and width before it is cut off at the edges, as a fraction of the picture's: its square is
    1 - Beta(alpha, alpha); 0 = not mixed. `y`, `x` in [0, 1) is its centre. Fractions, since models mix at different
    strides; `token_box` makes tokens of them.
    """
    rows: dict[int, tuple[float, float, float]] = {}
    for x in map(int, ids):
        lower = min(x, partner(x, repeats))
        if lower not in rows:
            draw = generator(sample_seed(seed, lower, MIX))
            mixed, _ = draw.random_sample(2)
            side = math.sqrt(1 - float(draw.beta(settings.mixtoken_alpha, settings.mixtoken_alpha)))
            rows[lower] = (side if mixed < settings.mix_prob else 0.0, draw.random_sample(), draw.random_sample())
    return np.array([rows[min(x, partner(x, repeats))] for x in map(int, ids)])


def token_box(row: Sequence[float] | np.ndarray, grid: tuple[int, int]) -> tuple[int, int, int, int]:
    """(top, left, bottom, right) in tokens of a grid [rows, cols], the last two excluded, of one row of `mix_boxes`; may be
    empty. Distributed as the released code draws its box, with int(count * side) tokens around a uniform token. The share
    of tokens that stay a sample's own weighs its class label.
    """
    side, *centre = row
    edges = []
    for count, place in zip(grid, centre, strict=True):
        half, middle = int(count * side) // 2, int(count * place)
        edges.append((max(middle - half, 0), min(middle + half, count)))
    (top, bottom), (left, right) = edges
    return top, left, bottom, right


def check_mixing(settings: AugmentSettings, num_classes: int) -> None:
    """Raises `ConfigError` when labels cannot be mixed, or are mixed in two ways."""
    problems = Problems(ConfigError)
    if mixes(settings) and num_classes < 1:
        problems.add("`data.augment` mixes samples (mixup_alpha, cutmix_alpha), but `model.num_classes` is 0, so "
                     "there are no labels to mix.", "data.augment.mixup_alpha=0 data.augment.cutmix_alpha=0")
    if settings.mixtoken_alpha > 0 and (settings.mixup_alpha > 0 or settings.cutmix_alpha > 0):
        problems.add(f"`data.augment.mixtoken_alpha` is {settings.mixtoken_alpha:g}, so tokens are mixed in the model; "
                     f"pixels cannot be mixed too (mixup_alpha {settings.mixup_alpha:g}, cutmix_alpha "
                     f"{settings.cutmix_alpha:g}).",
                     "data.augment.mixup_alpha=0 data.augment.cutmix_alpha=0, or data.augment.mixtoken_alpha=0")
    problems.raise_if_any()
