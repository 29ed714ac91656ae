"""Decoded picture -> fixed-size tensor: crops, resizing, flips, RandAugment; and the transform of evaluation.

Every random number of a sample comes from its own generator, seeded with hash(seed, x) where x is the global sample
number: never from the rank, the worker, the batch or what was drawn before. Generators are NumPy's `RandomState`, whose
methods NumPy has frozen, over Philox, which costs 9 microseconds to seed (Mersenne Twister: 97).

Inception crop: Szegedy et al. 2015 (arXiv 1409.4842) with torchvision's sampling. RandAugment: Cubuk et al. 2019
(arXiv 1909.13719), timm's. `resmall` and `resize`: big_vision's names for the crops of the ViT and BiT papers. Mixing
of samples is in `mix.py`; normalisation happens on the device.

Resizing is torch's antialiased uint8 kernel: 0.33 ms a 224-pixel crop against 0.9 ms for PIL, within rounding of it.

Legend: H W rows cols.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from data_pipelines.settings import AugmentSettings
from tubelet.errors import ConfigError, DataError
from tubelet.seeding import hash_seed

if TYPE_CHECKING:
    import torch

# What a random number is for, the second part of its hash: purposes never share a stream.
AUGMENT, MIX = 1, 2


def sample_seed(seed: int, x: int, purpose: int = AUGMENT) -> int:
    """The seed of one sample's random numbers: a function of the run's seed and the global sample number alone."""
    return hash_seed(seed, purpose, x)


def generator(seed: int) -> np.random.RandomState:
    """Random numbers for one sample; the same on every machine and NumPy version."""
    return np.random.RandomState(np.random.Philox(key=seed))  # type: ignore[arg-type] - any bit generator is accepted


def as_pair(size: int | tuple[int, int] | list[int]) -> tuple[int, int]:
    """224 -> (224, 224); (height, width) stays."""
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


class TrainTransform:
    """uint8 [H, W, 3] -> uint8 tensor [3, height, width], with the random numbers of one seed.

    `fill` is the colour that RandAugment's shifts uncover; ImageNet's mean, as in timm's recipes.
    """

    def __init__(self, settings: AugmentSettings, img_size: int | tuple[int, int], *, crop_pct: float = 0.875,
                 fill: tuple[int, int, int] = (124, 116, 104)):
        self.settings, self.size, self.crop_pct = settings, as_pair(img_size), crop_pct
        larger = settings.resize
        self.larger = (larger, larger) if larger else (round(self.size[0] * 448 / 384), round(self.size[1] * 448 / 384))
        if settings.crop in ("resmall", "resize") and (self.larger[0] < self.size[0] or self.larger[1] < self.size[1]):
            raise ConfigError(f"`data.augment.resize` is {larger}, but crops of the image size "
                              f"{self.size[0]}x{self.size[1]} are cut from it.",
                              f"data.augment.resize={round(max(self.size) * 448 / 384)}, or null")
        _check_ranges(settings)
        self.rand_augment = _rand_augment(settings, self.size, fill) if settings.rand_augment else None

    def __call__(self, image: np.ndarray, seed: int) -> torch.Tensor:
        import torch

        draw = generator(seed)
        pixels = self._crop(to_planes(image), draw)
        if draw.random_sample() < self.settings.hflip:
            pixels = pixels.flip(-1)
        if self.rand_augment is not None:
            from PIL import Image

            with seeded_globals(hash_seed(seed)):  # timm draws from `random` and `numpy.random`
                picture = self.rand_augment(Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy()))
            pixels = to_planes(np.array(picture))
        return pixels.contiguous(memory_format=torch.contiguous_format)

    def _crop(self, pixels: torch.Tensor, draw: np.random.RandomState) -> torch.Tensor:
        settings, (height, width), (rows, cols) = self.settings, self.size, extent(pixels)
        if settings.crop == "inception":
            top, left, rows, cols = inception_box(rows, cols, settings.scale, settings.ratio, draw)
            return resize(pixels[:, top:top + rows, left:left + cols], self.size, settings.interpolation)
        if settings.crop == "center":
            return center(pixels, self.size, self.crop_pct, settings.interpolation)
        if settings.crop == "none":
            if (rows, cols) != self.size:
                raise DataError(f"`data.augment.crop` is none, but a picture has {rows}x{cols} pixels (height x "
                                f"width) and the model takes {height}x{width}.",
                                "data.augment.crop=inception (or resize), or pack pictures of the model's size")
            return pixels
        larger = cover(rows, cols, self.larger) if settings.crop == "resmall" else self.larger
        pixels = resize(pixels, larger, settings.interpolation)
        top, left = (_index(draw, larger[axis] - self.size[axis] + 1) for axis in (0, 1))
        return pixels[:, top:top + height, left:left + width]


class EvalTransform:
    """uint8 [H, W, 3] -> uint8 tensor [3, height, width]; nothing random.

    `center`: short side to floor(size / crop_pct), then the centre, as timm evaluates. `resize`: straight to the size.
    """

    def __init__(self, settings: AugmentSettings, img_size: int | tuple[int, int], *, crop_pct: float = 0.875):
        self.settings, self.size, self.crop_pct = settings, as_pair(img_size), crop_pct

    def __call__(self, image: np.ndarray) -> torch.Tensor:
        import torch

        pixels, interpolation = to_planes(image), self.settings.interpolation
        if self.settings.eval_crop == "resize":
            pixels = resize(pixels, self.size, interpolation)
        else:
            pixels = center(pixels, self.size, self.crop_pct, interpolation)
        return pixels.contiguous(memory_format=torch.contiguous_format)


# ---------------------------------------------------------------------------------------------------- geometry


def inception_box(height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float],
                  draw: np.random.RandomState) -> tuple[int, int, int, int]:
    """(top, left, rows, cols): area uniform in `scale` of the picture, aspect (width / height) log-uniform in `ratio`.

    As torchvision's RandomResizedCrop: ten attempts, then the largest centred box within the aspect range.
    """
    for _ in range(10):
        area = height * width * (scale[0] + (scale[1] - scale[0]) * draw.random_sample())
        low, high = math.log(ratio[0]), math.log(ratio[1])
        aspect = math.exp(low + (high - low) * draw.random_sample())
        rows, cols = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
        if 0 < rows <= height and 0 < cols <= width:
            return _index(draw, height - rows + 1), _index(draw, width - cols + 1), rows, cols
    rows, cols = height, width
    if width / height < ratio[0]:
        rows = min(height, round(width / ratio[0]))
    elif width / height > ratio[1]:
        cols = min(width, round(height * ratio[1]))
    return (height - rows) // 2, (width - cols) // 2, rows, cols


def _index(draw: np.random.RandomState, count: int) -> int:
    """Uniform in 0..count-1."""
    return min(int(draw.random_sample() * count), count - 1)


def cover(height: int, width: int, target: tuple[int, int]) -> tuple[int, int]:
    """Smallest size of the same aspect that covers the target: the short side for a square one."""
    if target[0] * width >= target[1] * height:  # rows decide
        return target[0], max(target[1], int(target[0] * width / height))
    return max(target[0], int(target[1] * height / width)), target[1]


def center(pixels: torch.Tensor, size: tuple[int, int], crop_pct: float, interpolation: str) -> torch.Tensor:
    """[3, H, W] scaled to cover floor(size / crop_pct), then cut from the middle."""
    larger = cover(*extent(pixels), (math.floor(size[0] / crop_pct), math.floor(size[1] / crop_pct)))
    pixels = resize(pixels, larger, interpolation)
    top, left = (round((larger[axis] - size[axis]) / 2) for axis in (0, 1))
    return pixels[:, top:top + size[0], left:left + size[1]]


def resize(pixels: torch.Tensor, size: tuple[int, int], interpolation: str) -> torch.Tensor:
    """uint8 [3, H, W] -> uint8 [3, *size]; antialiased except `nearest`, which takes the pixel under each centre."""
    import torch.nn.functional as F

    if extent(pixels) == tuple(size):
        return pixels
    if interpolation == "nearest":
        return F.interpolate(pixels[None], size, mode="nearest-exact")[0]
    return F.interpolate(pixels[None], size, mode=interpolation, antialias=True, align_corners=False)[0]


def extent(pixels: torch.Tensor) -> tuple[int, int]:
    """(H, W) of [3, H, W]."""
    return pixels.shape[1], pixels.shape[2]


def to_planes(image: np.ndarray) -> torch.Tensor:
    """uint8 array [H, W, 3] -> tensor [3, H, W] over the same memory: the layout torch's resize kernel is fast on."""
    import torch

    return torch.from_numpy(image).permute(2, 0, 1)


# ---------------------------------------------------------------------------------------------------- RandAugment


def _rand_augment(settings: AugmentSettings, size: tuple[int, int], fill: tuple[int, int, int]) -> Any:
    from PIL import Image
    from timm.data.auto_augment import rand_augment_transform

    filters = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC,
               "nearest": Image.Resampling.NEAREST}
    hints = {"translate_const": int(min(size) * 0.45), "img_mean": fill,
             "interpolation": filters[settings.interpolation]}
    try:
        return rand_augment_transform(settings.rand_augment or "", hints)
    except (AssertionError, ValueError, KeyError, IndexError) as error:
        raise ConfigError(f"`data.augment.rand_augment` is {settings.rand_augment!r}, which timm does not understand "
                          f"({type(error).__name__} {error}).", "rand-m9-mstd0.5-inc1") from None


@contextmanager
def seeded_globals(seed: int) -> Iterator[None]:
    """Seed `random` and `numpy.random` inside, and give both back as they were: with `data.workers=0` this is the
    training process."""
    before = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])


def _check_ranges(settings: AugmentSettings) -> None:
    for option, (low, high), most in (("scale", settings.scale, 1.0), ("ratio", settings.ratio, math.inf)):
        if not 0 < low <= high <= most:
            limit = " and at most 1" if most == 1.0 else ""
            raise ConfigError(f"`data.augment.{option}` is [{low}, {high}]; it must be a range above 0{limit}.",
                              f"data.augment.{option}={list(AugmentSettings.model_fields[option].default)}")
