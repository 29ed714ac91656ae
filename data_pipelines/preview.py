"""A contact sheet: samples as a model will see them, after decoding, augmentation and mixing, with their labels beneath.

The batch comes from the training loader itself, so what is drawn is what a run with this recipe and seed trains on first.
A clip is a row of its frames. The same recipe, seed and shards give the same picture.

Legend: m samples, T frames, H W rows cols.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data_pipelines.decode import BadSample
from data_pipelines.loader import TrainLoader
from data_pipelines.mix import in_pairs, mixes
from data_pipelines.recipe import Recipe
from tubelet.batching import micro_batch_multiple
from tubelet.dist import World
from tubelet.errors import DataError

if TYPE_CHECKING:
    from PIL import Image

FRAMES = 8  # of a longer clip so many are drawn, evenly chosen
LEAST, MOST, SHEET = 96, 256, 1600  # pixels of a frame's side, and about of the sheet's width
GAP, LINE = 6, 14
GROUND, TEXT, FAINT, WRONG = (24, 24, 24), (235, 235, 235), (150, 150, 150), (255, 120, 110)


@dataclass(frozen=True)
class Tile:
    """One sample of the sheet."""

    x: int
    """Global sample number."""
    key: str
    shard: str
    label: str
    bad: str
    """Why another sample stands in its place; empty when none does."""


def preview(recipe: Recipe, out: str | Path, *, count: int = 32, first: int = 0, original: bool = False) -> list[Tile]:
    """`tubelet data preview`: draws the `count` samples from global sample number `first` on as a PNG; returns what was
    drawn. Both are rounded up to whole pairs and repeats. `original` puts each sample as it is in the shard beside it."""
    data = recipe.data.model_copy(update={"workers": 0, "lanes": None})
    multiple = micro_batch_multiple(in_pairs(data.augment), data.repeats)
    count, first = -(-count // multiple) * multiple, -(-first // multiple) * multiple
    classes = recipe.model.num_classes or (_class_count(recipe) if mixes(data.augment) else 0)
    loader = TrainLoader(data, seed=recipe.seed, img_size=recipe.model.img_size, num_classes=classes,
                         global_batch_size=count, micro_batch_size=count, world=World())
    try:
        batch = next(loader.batches(first))
        places = loader.order.place(batch["ids"].numpy())
        tiles = [_tile(loader, batch, places, slot) for slot in range(count)]
        cells = [_frames(batch["pixels"][slot].numpy()) for slot in range(count)]
        if original:
            height = cells[0][0].shape[0]
            cells = [[*_original(loader, places, slot, height), *cell] for slot, cell in enumerate(cells)]
    finally:
        loader.close()
    _draw(cells, tiles).save(out, "PNG")
    return tiles


def _class_count(recipe: Recipe) -> int:
    from data_pipelines.index import open_source

    return max(len(open_source(item, index_dir=recipe.data.index_dir).classes or []) for item in recipe.data.train)


def _tile(loader: TrainLoader, batch: dict[str, Any], places: Any, slot: int) -> Tile:
    source = loader.sources[int(places.source[slot])]
    found = source.describe(int(places.shard[slot]), int(places.index[slot]))
    x, names, label = int(places.x[slot]), source.index.classes or [], batch["labels"][slot]

    def name(number: int) -> str:
        return f"{number} {names[number]}" if 0 <= number < len(names) else str(number)

    if label.ndim:
        shares = sorted(((float(share), k) for k, share in enumerate(label.tolist()) if share > 0), reverse=True)[:2]
        text = " + ".join(f"{share:.0%} {name(k)}" for share, k in shares)
    else:
        text = name(int(label))
    bad = next((str(row["error"]) for row in batch["bad"] if row["x"] == x), "")
    return Tile(x, str(found["key"]), str(found["shard"]), text, bad)


def _frames(pixels: np.ndarray) -> list[np.ndarray]:
    """uint8 [3, H, W] or [3, T, H, W] -> a few pictures [H, W, 3], small ones enlarged by whole steps."""
    clip = pixels[:, None] if pixels.ndim == 3 else pixels
    chosen = np.unique(np.linspace(0, clip.shape[1] - 1, min(FRAMES, clip.shape[1])).round().astype(int))
    pictures = [clip[:, t].transpose(1, 2, 0) for t in chosen]
    side = max(clip.shape[2:])
    if side > MOST:
        return [_fit(picture, round(picture.shape[0] * MOST / side)) for picture in pictures]
    step = -(-LEAST // side)
    return [picture.repeat(step, axis=0).repeat(step, axis=1) for picture in pictures]


def _original(loader: TrainLoader, places: Any, slot: int, height: int) -> list[np.ndarray]:
    """The sample as it is in the shard, of a video its middle frame; a grey box when it does not decode."""
    place = int(places.source[slot]), int(places.shard[slot]), int(places.index[slot])
    try:
        raw = next(loader.samples.fetch([place], lambda _, frames, times: [np.array([frames // 2])]))
        media = loader.samples.media(raw)
        try:
            return [_fit(media.read([media.frames // 2])[0], height)]
        finally:
            media.close()
    except BadSample:
        return [np.full((height, height, 3), 90, dtype=np.uint8)]


def _fit(picture: np.ndarray, height: int) -> np.ndarray:
    """Scaled to this height; of very wide pictures the middle."""
    from PIL import Image

    rows, cols = picture.shape[:2]
    width = max(1, round(cols * height / rows))
    scaled = np.asarray(Image.fromarray(np.ascontiguousarray(picture)).resize((width, height), Image.Resampling.LANCZOS))
    cut = max(0, width - 2 * height) // 2
    return scaled[:, cut:width - cut]


def _draw(cells: Sequence[Sequence[np.ndarray]], tiles: Sequence[Tile]) -> Image.Image:
    from PIL import Image, ImageDraw, ImageFont

    if not cells:
        raise DataError("There is nothing to draw.", "--count 32")
    height = max(picture.shape[0] for cell in cells for picture in cell)
    width = max(sum(picture.shape[1] + 2 for picture in cell) for cell in cells)
    columns = max(1, min(len(cells), SHEET // (width + GAP)))
    rows = -(-len(cells) // columns)
    step = height + 2 * LINE + GAP
    sheet = Image.new("RGB", (columns * (width + GAP) + GAP, rows * step + GAP), GROUND)
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=11)
    for slot, (cell, tile) in enumerate(zip(cells, tiles)):
        left, top = GAP + slot % columns * (width + GAP), GAP + slot // columns * step
        at = left
        for picture in cell:
            sheet.paste(Image.fromarray(np.ascontiguousarray(picture)), (at, top))
            at += picture.shape[1] + 2
        lines = [(tile.label, TEXT), (f"{'BAD ' * bool(tile.bad)}{tile.x}: {tile.key}", WRONG if tile.bad else FAINT)]
        for number, (text, colour) in enumerate(lines):
            while text and pen.textlength(text, font=font) > width:
                text = text[:-1]
            pen.text((left, top + height + number * LINE), text, fill=colour, font=font)
    return sheet
