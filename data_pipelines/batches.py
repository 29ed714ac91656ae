"""Places of a micro-batch -> training batch: what a loader process does. It holds nothing that changes.

Legend: m micro-batch, R repeats, x global sample number, T frames, H W rows cols, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from data_pipelines.augment import TrainTransform, sample_seed
from data_pipelines.crops import Fractions
from data_pipelines.decode import BadSample
from data_pipelines.mix import mix_batch, mix_boxes, mixes, mixes_tokens
from data_pipelines.order import Order
from data_pipelines.samples import Raw, Samples, training_clips
from data_pipelines.settings import DataSettings
from data_pipelines.token_labels import move
from data_pipelines.workers import working_on
from tubelet.errors import DataError

if TYPE_CHECKING:
    import torch

SPARES = 8  # substitutes tried for one bad sample: with 10 % bad all fail once in 10**8
CLIP = 3  # which random numbers choose frames; see augment.py for the others

Batch = dict[str, Any]


@dataclass
class Sample:
    """A decoded sample: one clip for each of its repeats."""

    clips: Sequence[np.ndarray]
    """uint8 [H, W, 3], or [T, H, W, 3]."""
    label: int
    full: tuple[int, int] | None = None
    """The picture's (rows, cols), when it was decoded at a part of them."""
    token_map: np.ndarray | None = None
    row: dict[str, Any] | None = None
    """Its row in the ledger, without x, when it stands in for a bad one."""


class TrainBatches:
    """int64 [m, 5] (x, source, epoch, shard, index) -> batch."""

    def __init__(self, samples: Samples, order: Order, settings: DataSettings, transform: TrainTransform, seed: int,
                 num_classes: int):
        self.samples, self.order, self.settings, self.transform = samples, order, settings, transform
        self.seed, self.num_classes = seed, num_classes

    def __call__(self, places: np.ndarray) -> Batch:
        import torch

        m, repeats, augment, frames = len(places), self.settings.repeats, self.settings.augment, self.settings.clip.frames
        ids = places[:, 0]
        pixels = new_batch((m, 3, *([frames] if frames > 1 else []), *self.transform.size))
        labels = torch.empty(m, dtype=torch.int64)
        batch: Batch = {"ids": torch.from_numpy(ids.copy()), "pixels": pixels, "labels": labels, "bad": []}
        maps: list[np.ndarray] = []
        boxes: list[Fractions] = []
        starts = np.flatnonzero(np.diff(ids // repeats, prepend=-1))  # repeats are neighbours: decoded once
        working_on(int(ids[0]))
        raws = self.samples.fetch(tuple(row[[1, 3, 4]].tolist()) for row in places[starts])
        for slots, raw in zip(np.split(np.arange(m), starts[1:]), raws):
            xs = ids[slots].tolist()
            working_on(xs[0])
            sample = self.load(raw, places[slots[0]].tolist(), xs)
            for slot, x, clip in zip(slots, xs, sample.clips):
                done = self.transform.apply(clip, sample_seed(self.seed, x), full=sample.full, out=pixels[slot])
                labels[slot] = sample.label
                if sample.token_map is not None:
                    maps.append(move(sample.token_map, done))
                    boxes.append(done.box)
                if sample.row is not None:
                    batch["bad"].append({"x": x, **sample.row})
        if maps:
            batch["token_labels"], batch["token_boxes"] = stacked(maps), torch.tensor(boxes, dtype=torch.float32)
        if mixes(augment):
            batch["labels"] = mix_batch(pixels, labels, ids, augment, seed=self.seed, num_classes=self.num_classes,
                                        repeats=repeats)
        if mixes_tokens(augment):
            batch["mix_boxes"] = torch.from_numpy(mix_boxes(ids, augment, seed=self.seed, repeats=repeats))
        return batch

    def load(self, raw: Raw, place: Sequence[int], xs: Sequence[int]) -> Sample:
        """The sample at `place` (x, source, epoch, shard, index), or its substitute with a row for the ledger."""
        try:
            return self.decode(raw, xs)
        except BadSample as error:
            reasons = [str(error)]
        _, source, _, shard, index = place
        mine, found = self.samples.sources[source], self.samples.sources[source].describe(shard, index)
        for attempt in range(SPARES):
            spare = self.order.spare(xs[0] // self.settings.repeats, source, attempt)
            try:
                sample = self.decode(next(self.samples.fetch([(source, *spare)])), xs)
            except BadSample as error:
                reasons.append(str(error))
                continue
            other = mine.describe(*spare)
            sample.row = {**found, "error": reasons[0], "substitute": f"{other['shard']}/{other['key']}"}
            return sample
        raise DataError(f"Sample {found['key']} of {found['shard']} (source `{found['source']}`) and {SPARES} substitutes "
                        f"of the same source do not decode; reasons: {'; '.join(dict.fromkeys(reasons))}.",
                        "check `label` of this source and `data.decoder`; `tubelet data verify` on its shards")

    def decode(self, raw: Raw, xs: Sequence[int]) -> Sample:
        """Clips for the global sample numbers `xs` (its repeats), and the label. Raises `BadSample`."""
        def reduce(rows: int, cols: int) -> int:
            return min(self.transform.reduce(rows, cols, sample_seed(self.seed, x)) for x in xs)

        media = self.samples.media(raw, reduce)
        try:
            clips = training_clips(media, self.settings.clip, [sample_seed(self.seed, x, CLIP) for x in xs])
        finally:
            media.close()
        return Sample(clips, self.samples.label(raw), getattr(media, "full", None), self.samples.token_map(raw))


def new_batch(shape: tuple[int, ...]) -> torch.Tensor:
    """An uninitialised uint8 tensor; in a loader process in shared memory from the start, which saves the copy that sending
    it would take (a tenth of the time of a picture)."""
    import torch
    from torch.utils.data import get_worker_info

    if get_worker_info() is None:
        return torch.empty(shape, dtype=torch.uint8)
    storage = torch.UntypedStorage._new_shared(math.prod(shape), device="cpu")
    return torch.empty(0, dtype=torch.uint8).set_(storage, 0, shape)  # type: ignore[call-overload]


def stacked(maps: Sequence[np.ndarray]) -> torch.Tensor:
    """Maps of token labels as one tensor. Raises `DataError` when they are not all of one shape."""
    import torch

    shapes = sorted({tensor.shape for tensor in maps})
    if len(shapes) > 1:
        raise DataError(f"Maps of token labels have the shapes {', '.join(map(str, shapes))}; a batch needs one.",
                        "annotate all pictures at one resolution")
    return torch.from_numpy(np.stack(maps))
