"""Decoded picture or clip -> tensor of fixed size: the transforms of training and of evaluation.

Order of operations, torchvision's and timm's: crop, flip, RandAugment or colour jitter, erasing. With `crop_last`: flip,
RandAugment or colour jitter, crop, erasing. All frames of a clip get the same crop, flip, operations, magnitudes and box.

Every random number of a sample comes from its own seed, hash(seed, x) where x is the global sample number: never from the
rank, the worker, the batch or what was drawn before. Order of draws: crop, then flip, in one stream; the filter,
RandAugment, colour jitter, erasing and its noise have one each (`draws.py`), so an option does not move the draws of
others.

Which part is cut: `crops.py`. Colours: `colors.py`. Mixing of samples: `mix.py`. Normalisation happens on the device.

Legend: T frames, H W rows cols.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from data_pipelines.colors import RandAugment, jitter_colors
from data_pipelines.crops import (
    Cut,
    Fractions,
    Size,
    as_pair,
    center_cut,
    cover,
    extent,
    inception_box,
    take,
    three_cuts,
    to_planes,
)
from data_pipelines.draws import AUGMENT, INTERPOLATION, MIX, generator, index, sample_seed, stream
from data_pipelines.erase import erase, erasing_boxes, noise_table
from data_pipelines.settings import AugmentSettings
from tubelet.errors import ConfigError, DataError, Problems

if TYPE_CHECKING:
    import torch

__all__ = ["AUGMENT", "MIX", "Augmented", "EvalTransform", "TrainTransform", "as_pair", "generator", "sample_seed"]

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
REDUCTIONS = (8, 4, 2)


class Augmented(NamedTuple):
    """A sample after augmentation, and what was done to its geometry, for whatever rides along (`token_labels.py`)."""

    pixels: torch.Tensor
    """uint8 [3, height, width], or [3, T, height, width]."""
    flipped: bool
    box: Fractions
    """(y, x, height, width) of the crop in fractions of the picture; when flipped, of the flipped picture."""
    sources: Callable[[int, int], np.ndarray] | None = None
    """With RandAugment before the crop: (rows, cols) of a map -> which cell of the flipped map each cell shows
    (`RandAugment.sources`); None = the same one."""


class TrainTransform:
    """A picture uint8 [H, W, 3] -> uint8 tensor [3, height, width], or a clip [T, H, W, 3] -> [3, T, height, width], with
    the random numbers of one seed.

    `fill` is the colour that RandAugment's shifts uncover (null = the mean, as in timm's recipes); `mean` and `std` of the
    data's normalisation shape the noise of erasing.
    """

    def __init__(self, settings: AugmentSettings, img_size: int | tuple[int, int], *, crop_pct: float = 0.875,
                 fill: tuple[int, int, int] | None = None, mean: tuple[float, ...] = IMAGENET_MEAN,
                 std: tuple[float, ...] = IMAGENET_STD):
        self.settings, self.size, self.crop_pct = settings, as_pair(img_size), crop_pct
        larger = settings.resize
        self.larger = (larger, larger) if larger else (round(self.size[0] * 448 / 384), round(self.size[1] * 448 / 384))
        _check(settings, self.size, self.larger)
        red, green, blue = fill or (round(255 * value) for value in mean)
        self.rand_augment = RandAugment(settings.rand_augment, self.size, (red, green, blue), settings.interpolation) \
            if settings.rand_augment else None
        color = np.round(255 * np.array(mean)).astype(np.uint8)[:, None]
        self.noise = noise_table(mean, std) if settings.erasing and settings.erasing_mode == "pixel" else color
        if settings.color_jitter:
            import torchvision.transforms.v2  # noqa: F401 - takes a second: before workers are forked

    def __call__(self, image: np.ndarray, seed: int, *, full: Size | None = None,
                 out: torch.Tensor | None = None) -> torch.Tensor:
        """As `apply`, the pixels alone."""
        return self.apply(image, seed, full=full, out=out).pixels

    def apply(self, image: np.ndarray, seed: int, *, full: Size | None = None, out: torch.Tensor | None = None) -> Augmented:
        """`full`: the picture's (rows, cols) when it was decoded at the part of its size that `reduce` named. `out`: where
        the pixels go, e.g. a slot of the batch; of a clip this saves a copy."""
        settings, pixels, reduced = self.settings, to_planes(image), 1
        picture = extent(pixels)
        if full is not None and full != picture:
            picture, reduced = full, _reduction(full, picture)
        draw = generator(seed)
        cut = self._cut(*picture, draw)
        flipped = bool(draw.random_sample() < settings.hflip)
        box = cut.fractions(picture, self.size)
        if settings.crop_last:
            pixels = self._recolored(pixels.flip(-1) if flipped else pixels, seed)
            pixels = take(pixels, cut, self.size, self._filter(seed), reduced)
        else:
            pixels = take(pixels, cut, self.size, self._filter(seed), reduced)
            pixels = self._recolored(pixels.flip(-1) if flipped else pixels, seed)
            box = (box[0], 1 - box[1] - box[3], box[2], box[3]) if flipped else box
        pixels = finished(pixels, out)
        if settings.erasing:
            boxes = erasing_boxes(*self.size, settings.erasing, settings.erasing_count, seed)
            erase(pixels, boxes, self.noise, seed)
        moved = partial(self.rand_augment.sources, seed) if self.rand_augment is not None and settings.crop_last else None
        return Augmented(pixels, flipped, box, moved)

    def reduce(self, height: int, width: int, seed: int) -> int:
        """8, 4 or 2 when a picture of this size may be decoded at that part of it, since the crop of this seed then still
        has as many pixels as are wanted of it; else 1. With `crop_last` always 1: colours are then those of the picture as
        it is. With repeats take the least of all."""
        settings = self.settings
        least = min(self.size) if settings.crop in ("inception", "jitter") else 0
        if settings.crop_last or settings.crop == "none" or min(height, width) < 2 * least:
            return 1  # decided without a draw for pictures that are small already
        cut = self._cut(height, width, generator(seed))
        rows, cols = cut.box[2:]
        return next((part for part in REDUCTIONS if rows >= part * cut.scaled[0] and cols >= part * cut.scaled[1]), 1)

    def _cut(self, rows: int, cols: int, draw: np.random.RandomState) -> Cut:
        settings, size, whole = self.settings, self.size, (0, 0, rows, cols)
        if settings.crop == "inception":
            return Cut(inception_box(rows, cols, settings.scale, settings.ratio, draw), size)
        if settings.crop == "center":
            return center_cut(rows, cols, size, self.crop_pct)
        if settings.crop == "none":
            if (rows, cols) != size:
                raise DataError(f"`data.augment.crop` is none, but a picture has {rows}x{cols} pixels (height x "
                                f"width) and the model takes {size[0]}x{size[1]}.",
                                "data.augment.crop=inception (or resize), or pack pictures of the model's size")
            return Cut(whole, size)
        larger = self.larger
        if settings.crop == "resmall":
            larger = cover(rows, cols, larger)
        elif settings.crop == "jitter":
            low, high = settings.short_side
            side = round(low + (high - low) * draw.random_sample())
            larger = cover(rows, cols, (side, side))
        top, left = (index(draw, larger[axis] - size[axis] + 1) for axis in (0, 1))
        return Cut(whole, larger, top, left)

    def _filter(self, seed: int) -> str:
        if self.settings.interpolation != "random":
            return self.settings.interpolation
        return "bilinear" if stream(seed, INTERPOLATION).random_sample() < 0.5 else "bicubic"

    def _recolored(self, pixels: torch.Tensor, seed: int) -> torch.Tensor:
        if self.rand_augment is not None:
            return self.rand_augment(pixels, seed)
        return jitter_colors(pixels, self.settings.color_jitter, seed) if self.settings.color_jitter else pixels


class EvalTransform:
    """A picture uint8 [H, W, 3] -> uint8 tensor [3, height, width], or a clip [T, H, W, 3] -> [3, T, height, width];
    nothing random.

    `center`: short side to floor(size / crop_pct), then the centre, as timm evaluates. `resize`: straight to the size.
    `crops` = 3: `views` gives three crops along the longer side.
    """

    def __init__(self, settings: AugmentSettings, img_size: int | tuple[int, int], *, crop_pct: float = 0.875,
                 crops: int = 1):
        self.settings, self.size, self.crop_pct, self.crops = settings, as_pair(img_size), crop_pct, crops
        if crops not in (1, 3):
            raise ConfigError(f"`data.clip.test_crops` is {crops}; it must be 1 or 3.", "data.clip.test_crops=3")
        if crops == 3 and settings.eval_crop == "resize":
            raise ConfigError("`data.clip.test_crops` is 3, but with `data.augment.eval_crop` = resize the whole picture is "
                              "squeezed into the size and no longer side is left.",
                              "data.augment.eval_crop=center, or data.clip.test_crops=1")

    def __call__(self, image: np.ndarray, *, out: torch.Tensor | None = None) -> torch.Tensor:
        """One view: the centre (of three the middle one), or the whole picture with `resize`."""
        pixels = to_planes(image)
        rows, cols = extent(pixels)
        whole = self.settings.eval_crop == "resize"
        cut = Cut((0, 0, rows, cols), self.size) if whole else center_cut(rows, cols, self.size, self.crop_pct)
        return finished(take(pixels, cut, self.size, self._filter), out)

    def views(self, image: np.ndarray) -> list[torch.Tensor]:
        """All views of a picture or clip: one, or left, centre, right (top, middle, bottom when it is higher than wide)."""
        if self.crops == 1:
            return [self(image)]
        pixels = to_planes(image)
        first, *others = three_cuts(*extent(pixels), self.size, self.crop_pct)
        scaled = take(pixels, Cut(first.box, first.scaled), first.scaled, self._filter)
        return [finished(scaled[..., cut.top:cut.top + self.size[0], cut.left:cut.left + self.size[1]])
                for cut in (first, *others)]

    @property
    def _filter(self) -> str:
        return "bicubic" if self.settings.interpolation == "random" else self.settings.interpolation


def finished(pixels: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """[3, h, w] or frames [T, 3, h, w] -> contiguous [3, h, w] or [3, T, h, w], in `out` when that is given."""
    import torch

    if pixels.ndim == 4:
        pixels = pixels.transpose(0, 1)
    if out is not None:
        return out.copy_(pixels)
    return pixels.contiguous(memory_format=torch.contiguous_format)


def _reduction(full: Size, found: Size) -> int:
    """2, 4 or 8: the part of its size that a picture was decoded at; libjpeg rounds up."""
    fitting = [part for part in sorted(REDUCTIONS) if tuple(-(-side // part) for side in full) == found]
    assert fitting, f"{found} is not 1/2, 1/4 or 1/8 of {full}"
    return fitting[0]


def _check(settings: AugmentSettings, size: Size, larger: Size) -> None:
    problems = Problems(ConfigError)
    if settings.crop in ("resmall", "resize") and (larger[0] < size[0] or larger[1] < size[1]):
        problems.add(f"`data.augment.resize` is {settings.resize}, but crops of the image size {size[0]}x{size[1]} are cut "
                     "from it.", f"data.augment.resize={round(max(size) * 448 / 384)}, or null")
    for option, (low, high), most in (("scale", settings.scale, 1.0), ("ratio", settings.ratio, math.inf)):
        if not 0 < low <= high <= most:
            limit = " and at most 1" if most == 1.0 else ""
            problems.add(f"`data.augment.{option}` is [{low}, {high}]; it must be a range above 0{limit}.",
                         f"data.augment.{option}={list(AugmentSettings.model_fields[option].default)}")
    low, high = settings.short_side
    if settings.crop == "jitter" and not max(size) <= low <= high:
        problems.add(f"`data.augment.short_side` is [{low}, {high}]; it must be a range from {max(size)} on, since crops of "
                     f"{size[0]}x{size[1]} are cut from it.",
                     f"data.augment.short_side=[{round(max(size) * 256 / 224)}, {round(max(size) * 320 / 224)}]")
    if settings.color_jitter and settings.rand_augment:
        problems.add(f"`data.augment.color_jitter` is {settings.color_jitter} and `data.augment.rand_augment` is "
                     f"{settings.rand_augment!r}; only one of them changes colours (timm drops the jitter silently).",
                     "data.augment.color_jitter=0, or data.augment.rand_augment=null")
    problems.raise_if_any()
