"""Geometry of pictures and clips: which part is cut, and how it is resized.

Inception crop: Szegedy et al. 2015 (arXiv 1409.4842) with torchvision's sampling. `resmall` and `resize`: big_vision's
names for the crops of the ViT and BiT papers. `jitter`: the short side is drawn, then a crop, as SlowFast does.

Resizing is torch's antialiased uint8 kernel: 0.2 ms a 224-pixel crop against 0.9 ms for PIL, within rounding of it. Its
result lies plane by plane already: the flip and the copy into the batch cost 10 microseconds together.

Legend: T frames, H W rows cols. Everything here takes [3, H, W] or [T, 3, H, W].
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from data_pipelines.draws import index

if TYPE_CHECKING:
    import torch

Size = tuple[int, int]
"""(rows, cols)."""
Fractions = tuple[float, float, float, float]
"""(y, x, height, width) of a box in fractions of a picture's height and width."""


class Cut(NamedTuple):
    """A crop: `box` of the picture is resized to `scaled`, and the wanted size is cut from that at (`top`, `left`)."""

    box: tuple[int, int, int, int]
    """(top, left, rows, cols) in pixels of the whole picture."""
    scaled: Size
    top: int = 0
    left: int = 0

    def fractions(self, picture: Size, size: Size) -> Fractions:
        """Where the crop of `size` lies in the whole picture."""
        top, left, rows, cols = self.box
        y, x = rows / self.scaled[0], cols / self.scaled[1]  # pixels of the picture per pixel of the result
        return ((top + self.top * y) / picture[0], (left + self.left * x) / picture[1],
                size[0] * y / picture[0], size[1] * x / picture[1])


def as_pair(size: int | tuple[int, int] | list[int]) -> Size:
    """224 -> (224, 224); (height, width) stays."""
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


# ---------------------------------------------------------------------------------------------------- which part


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
            return index(draw, height - rows + 1), index(draw, width - cols + 1), rows, cols
    rows, cols = height, width
    if width / height < ratio[0]:
        rows = min(height, round(width / ratio[0]))
    elif width / height > ratio[1]:
        cols = min(width, round(height * ratio[1]))
    return (height - rows) // 2, (width - cols) // 2, rows, cols


def cover(height: int, width: int, target: Size) -> Size:
    """Smallest size of the same aspect that covers the target: the short side for a square one."""
    if target[0] * width >= target[1] * height:  # rows decide
        return target[0], max(target[1], int(target[0] * width / height))
    return max(target[0], int(target[1] * height / width)), target[1]


def center_cut(height: int, width: int, size: Size, crop_pct: float) -> Cut:
    """Scaled to cover floor(size / crop_pct), then the middle."""
    larger = cover(height, width, (math.floor(size[0] / crop_pct), math.floor(size[1] / crop_pct)))
    top, left = (round((larger[axis] - size[axis]) / 2) for axis in (0, 1))
    return Cut((0, 0, height, width), larger, top, left)


def three_cuts(height: int, width: int, size: Size, crop_pct: float) -> list[Cut]:
    """Scaled as by `center_cut`, then three crops along the longer side: left, centre, right or top, middle, bottom.
    The second is the centre crop; of a square picture they lie side by side."""
    middle = center_cut(height, width, size, crop_pct)
    spare = middle.scaled[0] - size[0], middle.scaled[1] - size[1]
    ends = [(0, middle.left), (spare[0], middle.left)] if spare[0] > spare[1] else [(middle.top, 0), (middle.top, spare[1])]
    first, last = (Cut(middle.box, middle.scaled, *place) for place in ends)
    return [first, middle, last]


# ---------------------------------------------------------------------------------------------------- pixels


def take(pixels: torch.Tensor, cut: Cut, size: Size, interpolation: str, reduced: int = 1) -> torch.Tensor:
    """The crop, [..., *size]. `reduced` = 2, 4 or 8: the pixels are those of the whole picture, whose coordinates the cut
    has, decoded at this part of its size."""
    top, left, rows, cols = cut.box
    if reduced > 1:
        pixels = _resize_part(pixels, (top / reduced, left / reduced, rows / reduced, cols / reduced), cut.scaled,
                              interpolation)
    else:
        pixels = resize(pixels[..., top:top + rows, left:left + cols], cut.scaled, interpolation)
    if cut.scaled == size:
        return pixels
    return pixels[..., cut.top:cut.top + size[0], cut.left:cut.left + size[1]]


def resize(pixels: torch.Tensor, size: Size, interpolation: str) -> torch.Tensor:
    """uint8 [..., H, W] -> uint8 [..., *size]; antialiased except `nearest`, which takes the pixel under each centre."""
    import torch.nn.functional as F

    if extent(pixels) == tuple(size):
        return pixels
    frames = pixels if pixels.ndim == 4 else pixels[None]
    if interpolation == "nearest":
        frames = F.interpolate(frames, size, mode="nearest-exact")
    else:
        frames = F.interpolate(frames, size, mode=interpolation, antialias=True, align_corners=False)
    return frames if pixels.ndim == 4 else frames[0]


def _resize_part(pixels: torch.Tensor, box: Fractions, size: Size, interpolation: str) -> torch.Tensor:
    """The part (top, left, rows, cols), whose edges may lie within pixels: PIL can, torch's kernel cannot."""
    from PIL import Image

    top, left, rows, cols = box
    first, start = math.floor(top), math.floor(left)  # the filter must not see what lies outside, as in `take`
    pixels = pixels[..., first:math.ceil(top + rows), start:math.ceil(left + cols)]
    edges = (left - start, top - first, left + cols - start, top + rows - first)
    wanted, resample = (size[1], size[0]), pil_filter(interpolation)
    frames = [np.array(Image.fromarray(frame.permute(1, 2, 0).numpy()).resize(wanted, resample, edges))
              for frame in (pixels if pixels.ndim == 4 else pixels[None])]
    return to_planes(np.stack(frames)) if pixels.ndim == 4 else to_planes(frames[0])


def pil_filter(interpolation: str) -> int:
    """PIL's number of a filter."""
    from PIL import Image

    return Image.Resampling[interpolation.upper()]


def extent(pixels: torch.Tensor) -> Size:
    """(H, W)."""
    return pixels.shape[-2], pixels.shape[-1]


def to_planes(image: np.ndarray) -> torch.Tensor:
    """uint8 array [..., H, W, 3] -> tensor [..., 3, H, W] over the same memory: the layout torch's resize kernel is fast
    on."""
    import torch

    pixels = torch.from_numpy(image)
    return pixels.permute(2, 0, 1) if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2)
