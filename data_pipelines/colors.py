"""Colours and warps of pictures and clips: RandAugment and colour jitter, the same for all frames of a clip.

RandAugment (Cubuk et al. 2019, arXiv 1909.13719) is timm's, on PIL pictures; it draws nothing from the pixels, so with the
same seed each frame gets the same operations and magnitudes. Colour jitter is torchvision's with timm's parameters.

Legend: T frames, H W rows cols.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from data_pipelines.crops import Size, pil_filter, to_planes
from data_pipelines.draws import COLORS, stream
from tubelet.errors import ConfigError
from tubelet.seeding import hash_seed

if TYPE_CHECKING:
    import torch

_GEOMETRIC = ("Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY", "TranslateXRel", "TranslateYRel")


class RandAugment:
    """timm's RandAugment by its string. `fill` is the colour that shifts uncover; `size` the model's, for timm's absolute
    shifts; `interpolation` `random` draws bilinear or bicubic for each operation."""

    def __init__(self, text: str, size: Size, fill: tuple[int, int, int], interpolation: str):
        self.text, self.translate = text, int(min(size) * 0.45)
        hints: dict[str, Any] = {"img_mean": fill}
        if interpolation != "random":
            hints["interpolation"] = pil_filter(interpolation)
        self.operations = self._build(hints)
        # One draw among filters stays one draw, so that pictures and maps see the same random numbers.
        nearest = pil_filter("nearest")
        filters = (nearest, nearest) if interpolation == "random" else nearest
        self.warps = self._build({"img_mean": 0, "interpolation": filters})
        for operation in self.warps.ops:
            if operation.name not in _GEOMETRIC:
                operation.aug_fn = _Ignored(operation.aug_fn)

    def _build(self, hints: dict[str, Any]) -> Any:
        from timm.data.auto_augment import rand_augment_transform

        try:
            return rand_augment_transform(self.text, {"translate_const": self.translate, **hints})
        except (AssertionError, ValueError, KeyError, IndexError) as error:
            raise ConfigError(f"`data.augment.rand_augment` is {self.text!r}, which timm does not understand "
                              f"({type(error).__name__} {error}).", "rand-m9-mstd0.5-inc1") from None

    def __call__(self, pixels: torch.Tensor, seed: int) -> torch.Tensor:
        """uint8 [3, H, W] or [T, 3, H, W], all frames alike."""
        from PIL import Image

        frames = []
        with _kept_globals():
            for frame in pixels if pixels.ndim == 4 else pixels[None]:
                _seed_globals(hash_seed(seed))  # timm draws from `random` and `numpy.random`
                picture = self.operations(Image.fromarray(frame.permute(1, 2, 0).contiguous().numpy()))
                frames.append(np.array(picture))
        return to_planes(np.stack(frames)) if pixels.ndim == 4 else to_planes(frames[0])

    def sources(self, seed: int, rows: int, cols: int) -> np.ndarray:
        """int64 [rows, cols]: the number (row * cols + col) of the cell of a map that each cell shows after the geometric
        operations of this seed, nearest by its centre; -1 = from outside the picture. Angles are those of the map's grid, as
        in the released code of token labeling: a picture that is not square turns a little differently."""
        from PIL import Image

        cells = Image.fromarray(np.arange(1, rows * cols + 1, dtype=np.int32).reshape(rows, cols))  # 0 = outside
        with _kept_globals():
            _seed_globals(hash_seed(seed))
            return np.array(self.warps(cells)).astype(np.int64) - 1


class _Ignored:
    """An operation that leaves a map alone but draws what it always draws."""

    def __init__(self, operation: Any):
        self.operation = operation

    def __call__(self, image: Any, *args: Any, **options: Any) -> Any:
        from PIL import Image

        self.operation(Image.new("RGB", (2, 2)), *args, **options)
        return image


def jitter_colors(pixels: torch.Tensor, strength: float, seed: int) -> torch.Tensor:
    """Brightness, contrast and saturation of uint8 [3, H, W] or [T, 3, H, W] in random order, each by a factor uniform in
    max(0, 1 - strength)..1 + strength; contrast around each frame's own mean."""
    import torch
    from torchvision.transforms.v2 import functional

    draw = stream(seed, COLORS)
    changes = functional.adjust_brightness, functional.adjust_contrast, functional.adjust_saturation
    low, high = max(0.0, 1 - strength), 1 + strength
    factors = low + (high - low) * draw.random_sample(3)
    order, frames = np.argsort(draw.random_sample(3)), []
    for frame in pixels if pixels.ndim == 4 else pixels[None]:  # all at once they leave the cache: 1.5 times as long
        for number in order:
            frame = changes[number](frame, float(factors[number]))
        frames.append(frame)
    return torch.stack(frames) if pixels.ndim == 4 else frames[0]


@contextmanager
def _kept_globals() -> Iterator[None]:
    """Give `random` and `numpy.random` back as they were: with `data.workers=0` this is the training process."""
    before = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])


def _seed_globals(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
