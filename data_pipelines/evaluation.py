"""Batches for evaluation: every sample exactly once over all ranks, padded so that all ranks have the same number.

A video may be seen in several views: `clip.test_clips` clips at equal distances, each in `clip.test_crops` crops.

Legend: B samples of a batch, V views of a sample, T frames, H W rows cols.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

import numpy as np

from data_pipelines.augment import EvalTransform, as_pair
from data_pipelines.batches import Batch, new_batch
from data_pipelines.clips import test_clips
from data_pipelines.decode import BadSample, require_decoder
from data_pipelines.samples import Raw, Samples, cut_clips, has_videos, open_sources
from data_pipelines.settings import DataSettings, SourceSettings
from data_pipelines.video import require_video_decoder
from data_pipelines.workers import stream, working_on
from tubelet.dist import World
from tubelet.errors import DataError

log = logging.getLogger(__name__)


class EvalLoader:
    """One validation set (`tubelet.engine.protocol.EvalLoader`): iterating gives this rank's batches.

    `batch_size` counts views, so a batch holds max(1, batch_size // V) samples: `pixels` uint8 [B * V, 3, H, W] (or
    [B * V, 3, T, H, W]), the views of a sample one after the other; `ids`, `labels`, `valid` [B]; `views` is V.
    `ids` are sample numbers in index order, -1 with `valid` False is padding. A damaged sample keeps its id, is not
    valid, and is listed in `bad` and in the log: a validation set is never mended by substitutes, so its count tells.
    """

    def __init__(self, settings: SourceSettings, data: DataSettings, *, img_size: int | tuple[int, int],
                 num_classes: int, batch_size: int, world: World, crop_pct: float = 0.875, device_type: str = "cpu"):
        self.name, self.data, self.world, self.crop_pct = settings.name, data, world, crop_pct
        self.clips, self.crops = data.clip.test_clips, data.clip.test_crops
        self.views = self.clips * self.crops
        self.protocol = f"{self.clips}x{self.crops}" if self.views > 1 or data.clip.frames > 1 else ""
        self.img_size, self.batch_size = as_pair(img_size), max(1, batch_size // self.views)
        sources = open_sources([settings], data, world)
        require_decoder(data.decoder)
        if has_videos(sources):
            require_video_decoder(data.video_decoder)
        self.samples = Samples(sources, data, num_classes)
        self._ends = np.cumsum(sources[0].index.counts)
        self.size = int(self._ends[-1]) if len(self._ends) else 0
        if not self.size:
            raise DataError(f"Validation set `{self.name}` holds no samples ({settings.shards}).",
                            "remove it from data.val, or check its `shards`")
        self._pin = device_type == "cuda" and data.pin_memory
        self._share = -(-self.size // world.size)
        self.num_batches = -(-self._share // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        transform = EvalTransform(self.data.augment, self.img_size, crop_pct=self.crop_pct, crops=self.crops)
        batches = stream(lambda numbers: self._batch(numbers, transform), list(self._tasks()), pin_memory=self._pin,
                         workers=min(self.data.workers, self.num_batches), prefetch=self.data.prefetch,
                         describe=self._describe, timeout=self.data.worker_patience)
        for batch in batches:
            for row in batch["bad"]:
                log.warning("validation set %s: sample %s of %s is damaged and not counted: %s", self.name, row["key"],
                            row["shard"], row["error"])
            yield batch

    def _tasks(self) -> Iterator[np.ndarray]:
        first = self.world.rank * self._share
        numbers = np.full(self.num_batches * self.batch_size, -1, dtype=np.int64)
        mine = np.arange(first, max(first, min(first + self._share, self.size)))
        numbers[:len(mine)] = mine
        yield from numbers.reshape(self.num_batches, self.batch_size)

    def _place(self, number: int) -> tuple[int, int]:
        shard = int(np.searchsorted(self._ends, number, side="right"))
        return shard, number - int(self._ends[shard - 1] if shard else 0)

    def _batch(self, numbers: np.ndarray, transform: EvalTransform) -> Batch:
        import torch

        count = len(numbers)
        pixels = new_batch(count * self.views, self.data.clip.frames, self.img_size).zero_()
        labels = torch.zeros(count, dtype=torch.int64)
        valid = torch.zeros(count, dtype=torch.bool)
        bad = []
        mine = numbers[numbers >= 0].tolist()  # padding stands at the end
        raws = self.samples.fetch(((0, *self._place(number)) for number in mine), self._choose)
        for slot, (number, raw) in enumerate(zip(mine, raws)):
            working_on(number)
            try:
                clips = self._clips(raw)
                labels[slot] = self.samples.label(raw)
            except BadSample as error:
                bad.append({"x": number, **self.samples.sources[0].describe(*self._place(number)), "error": str(error)})
                continue
            views = [view for clip in clips for view in transform.views(clip)]
            for place, view in enumerate(views):
                pixels[slot * self.views + place] = view
            valid[slot] = True
        return {"ids": torch.from_numpy(numbers.copy()), "pixels": pixels, "labels": labels, "valid": valid, "bad": bad,
                "views": self.views}

    def _clips(self, raw: Raw) -> list[np.ndarray]:
        """The clips of one sample, uint8 [T, H, W, 3], or [H, W, 3] when a clip has one frame."""
        media = self.samples.media(raw)
        try:
            return cut_clips(media, self._choose(0, media.frames, media.times))
        finally:
            media.close()

    def _choose(self, _: int, frames: int, times: np.ndarray) -> list[np.ndarray]:
        return list(test_clips(frames, times, self.data.clip))

    def _describe(self, number: int) -> str:
        found = self.samples.sources[0].describe(*self._place(number))
        return f"sample {number}: {found['key']} of {found['shard']} (validation set `{self.name}`)"
