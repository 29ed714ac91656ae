"""Random erasing (Zhong et al. 2017, arXiv 1708.04896) with timm's sampling, on uint8 pixels.

The box is drawn as timm draws it: area 0.02..1/3 of the picture (divided by the number of boxes), aspect log-uniform in
0.3..1/0.3, ten attempts, strictly smaller than the picture. Of a clip it is a cube: the same box in every frame, noise drawn
for each pixel of each frame, as SlowFast's cube mode does (which tries a hundred times).

timm erases after normalisation, with N(0, 1). Here pixels are still bytes, so `pixel` draws N(mean, std) of the data's
normalisation, rounded and cut off at 0 and 255. With ImageNet's values that cuts off 2.8 to 4.0 % of the numbers, those more
than 1.8 to 2.6 standard deviations away; normalised they have means of 0.002 to 0.013 and standard deviations of 0.965 to
0.975 instead of 0 and 1.
`const` is the mean colour, timm's zero after normalisation.

Legend: T frames, h w rows cols of the tensor.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from data_pipelines.draws import ERASING, NOISE, index, stream
from tubelet.seeding import hash_seed

if TYPE_CHECKING:
    import torch

AREA, ASPECT, ATTEMPTS = (0.02, 1 / 3), (0.3, 1 / 0.3), 10


def erasing_boxes(height: int, width: int, probability: float, count: int, seed: int) -> list[tuple[int, int, int, int]]:
    """(top, left, bottom, right) of the boxes to erase, at most `count`; mostly one, often none."""
    draw = stream(seed, ERASING)
    if draw.random_sample() >= probability:
        return []
    number, found = 1 + index(draw, count), []
    for _ in range(number):
        for _ in range(ATTEMPTS):
            area = height * width * (AREA[0] + (AREA[1] - AREA[0]) * draw.random_sample()) / number
            low, high = math.log(ASPECT[0]), math.log(ASPECT[1])
            aspect = math.exp(low + (high - low) * draw.random_sample())
            rows, cols = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if rows < height and cols < width:
                top, left = index(draw, height - rows + 1), index(draw, width - cols + 1)
                found.append((top, left, top + rows, left + cols))
                break
    return found


def erase(pixels: torch.Tensor, boxes: list[tuple[int, int, int, int]], table: np.ndarray, seed: int) -> None:
    """Erase the boxes of uint8 [3, h, w] or [3, T, h, w] in place; `table` is `noise_table`'s, or [3, 1], one colour."""
    import torch

    plain = table.shape[1] == 1
    noise = np.random.Philox(key=hash_seed(seed, NOISE)) if boxes and not plain else None
    for top, left, bottom, right in boxes:
        part = pixels[..., top:bottom, left:right]
        if noise is None:
            part.copy_(torch.from_numpy(table).view(3, *[1] * (part.ndim - 1)))
            continue
        frames = part.movedim(0, -3)  # [3, rows, cols] or [T, 3, rows, cols]: numbers of frame 0 come first
        # four 16-bit numbers of each 64: a tenth of the cost of normal numbers
        raw = noise.random_raw(-(-part.numel() // 4)).view(np.uint16)[:part.numel()].reshape(frames.shape)
        for channel in range(3):
            frames[..., channel, :, :] = torch.from_numpy(table[channel][raw[..., channel, :, :]])


def noise_table(mean: tuple[float, ...], std: tuple[float, ...]) -> np.ndarray:
    """uint8 [3, 65536]: an evenly drawn column is a byte of N(mean, std), rounded and cut off at 0 and 255."""
    tables = []
    for center, spread in zip(mean, std, strict=True):
        edges = [0.5 * (1 + math.erf(((value + 0.5) / 255 - center) / (spread * math.sqrt(2)))) for value in range(255)]
        places = np.round(65536 * np.array([0.0, *edges, 1.0])).astype(np.int64)
        tables.append(np.repeat(np.arange(256, dtype=np.uint8), np.diff(places)))
    return np.stack(tables)
