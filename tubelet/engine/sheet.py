"""Pictures of what goes into the model: a batch drawn as one sheet.

Legend: N samples, T frames, H W rows cols.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from PIL import Image

IMAGES, CLIPS = 32, 8
"""So many samples of a batch are drawn: pictures, or clips (each a row of its frames)."""
FRAMES = 8
"""Of a longer clip so many frames are drawn, evenly chosen."""
SHEET, GAP = 1600, 4
"""About the sheet's largest width in pixels (tiles are made smaller for it, never larger), and the pixels between tiles."""
GROUND = 24


def draw(pixels: torch.Tensor) -> np.ndarray:
    """uint8 [N, 3, H, W] or [N, 3, T, H, W] on any device -> the sheet, uint8 [rows, cols, 3]. Reads the pixels from the
    device, which waits for it."""
    assert pixels.dtype == torch.uint8 and pixels.ndim in (4, 5) and pixels.shape[1] == 3, (pixels.dtype, pixels.shape)
    if pixels.ndim == 5:
        frames = _evenly(pixels.shape[2], FRAMES)
        clips = pixels[:CLIPS][:, :, frames].permute(0, 2, 3, 4, 1).cpu().numpy()  # [N, T, H, W, 3]
        return _lay([list(clip) for clip in clips])
    tiles = list(pixels[:IMAGES].permute(0, 2, 3, 1).cpu().numpy())  # [N, H, W, 3]
    columns = math.ceil(math.sqrt(len(tiles)))
    return _lay([tiles[start:start + columns] for start in range(0, len(tiles), columns)])


def _evenly(count: int, most: int) -> list[int]:
    """At most `most` of range(count), evenly chosen, the first and the last among them."""
    most = min(count, most)
    return [round(i * (count - 1) / max(most - 1, 1)) for i in range(most)]


def _lay(rows: list[list[np.ndarray]]) -> np.ndarray:
    """Rows of equal tiles on a dark ground; the last row may be shorter."""
    columns = max(len(row) for row in rows)
    height, width = rows[0][0].shape[:2]
    scale = min(1.0, (SHEET / columns - GAP) / width)
    size = max(1, int(height * scale)), max(1, int(width * scale))
    shape = GAP + len(rows) * (size[0] + GAP), GAP + columns * (size[1] + GAP), 3
    sheet = np.full(shape, GROUND, dtype=np.uint8)
    for y, row in enumerate(rows):
        for x, tile in enumerate(row):
            top, left = GAP + y * (size[0] + GAP), GAP + x * (size[1] + GAP)
            if size != (height, width):
                tile = np.asarray(Image.fromarray(tile).resize((size[1], size[0]), Image.Resampling.BOX))
            sheet[top:top + size[0], left:left + size[1]] = tile
    return sheet
