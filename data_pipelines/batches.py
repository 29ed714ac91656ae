"""Places of a micro-batch -> training batch: what a loader process does. It holds nothing that changes.

Legend: m micro-batch, R repeats, x global sample number, T frames, H W rows cols, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from data_pipelines.augment import TrainTransform, sample_seed
from data_pipelines.crops import Fractions
from data_pipelines.decode import BadSample
from data_pipelines.mix import mix_batch, mix_boxes, mixes, mixes_tokens
from data_pipelines.order import Order, Places
from data_pipelines.samples import Raw, Samples, draw_clips, training_clips
from data_pipelines.settings import DataSettings
from data_pipelines.token_labels import move
from data_pipelines.workers import working_on
from tubelet.errors import DataError

if TYPE_CHECKING:
    import torch

SPARES = 8  # substitutes tried for one bad sample: with 10 % bad all fail once in 10**8
CLIP = 3  # which random numbers choose frames; see augment.py for the others

Batch = dict[str, Any]
Moved = tuple[np.ndarray, Fractions]
"""A map of token labels as its picture lies, and where the crop was."""


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
        ids, moved = places[:, 0], []
        batch = self.begin(ids)
        working_on(int(ids[0]))
        groups = self.groups(ids)
        raws = self.fetch([places[slots[0]].tolist() for slots in groups], [ids[slots].tolist() for slots in groups])
        for slots, raw in zip(groups, raws):
            xs = ids[slots].tolist()
            working_on(xs[0])
            sample = self.load(raw, places[slots[0]].tolist(), xs)
            moved += self.augment(sample, xs, batch, slots)
            if sample.row is not None:
                batch["bad"] += [{"x": x, **sample.row} for x in xs]
        return self.finish(batch, moved)

    def begin(self, ids: np.ndarray) -> Batch:
        """An empty batch for these global sample numbers."""
        import torch

        return {"ids": torch.from_numpy(ids.copy()), "labels": torch.zeros(len(ids), dtype=torch.int64), "bad": [],
                "pixels": new_batch(len(ids), self.settings.clip.frames, self.transform.size)}

    def groups(self, ids: np.ndarray) -> list[np.ndarray]:
        """Slots of the repeats of one sample, which are neighbours: it is fetched and decoded once."""
        starts = np.flatnonzero(np.diff(ids // self.settings.repeats, prepend=-1))
        return np.split(np.arange(len(ids)), starts[1:])

    def fetch(self, places: Sequence[Sequence[int]], xs: Sequence[Sequence[int]]) -> Iterator[Raw]:
        """The bytes of the samples at `places` (x, source, epoch, shard, index); `xs` are the repeats of each."""
        def choose(number: int, frames: int, times: np.ndarray) -> list[np.ndarray]:
            return draw_clips(frames, times, self.settings.clip, self._clip_seeds(xs[number]))
        return self.samples.fetch([(place[1], place[3], place[4]) for place in places], choose)

    def augment(self, sample: Sample, xs: Sequence[int], batch: Batch, slots: Sequence[int] | np.ndarray) -> list[Moved]:
        """Fills the slots of one sample; returns its maps of token labels, if there are any."""
        moved = []
        for slot, x, clip in zip(slots, xs, sample.clips):
            done = self.transform.apply(clip, sample_seed(self.seed, x), full=sample.full, out=batch["pixels"][slot])
            batch["labels"][slot] = sample.label
            if sample.token_map is not None:
                moved.append((move(sample.token_map, done), done.box))
        return moved

    def finish(self, batch: Batch, moved: Sequence[Moved]) -> Batch:
        """Token labels as tensors, and what mixes samples."""
        import torch

        augment, repeats, ids = self.settings.augment, self.settings.repeats, batch["ids"].numpy()
        if moved:
            batch["token_labels"] = stacked([tensor for tensor, _ in moved])
            batch["token_boxes"] = torch.tensor([box for _, box in moved], dtype=torch.float32)
        if mixes(augment):
            batch["labels"] = mix_batch(batch["pixels"], batch["labels"], ids, augment, seed=self.seed,
                                        num_classes=self.num_classes, repeats=repeats)
        if mixes_tokens(augment):
            batch["mix_boxes"] = torch.from_numpy(mix_boxes(ids, augment, seed=self.seed, repeats=repeats))
        return batch

    def load(self, raw: Raw, place: Sequence[int], xs: Sequence[int]) -> Sample:
        """The sample at `place` (x, source, epoch, shard, index), or its substitute with a row for the ledger."""
        try:
            return self.decode(raw, xs)
        except BadSample as error:
            reasons = [str(error)]
        x, source, epoch, shard, index = place
        mine, found = self.samples.sources[source], self.samples.sources[source].describe(shard, index)
        for attempt in range(SPARES):
            spare = self.order.spare(xs[0] // self.settings.repeats, source, attempt)
            try:
                sample = self.decode(next(self.fetch([(x, source, epoch, *spare)], [xs])), xs)
            except BadSample as error:
                reasons.append(str(error))
                continue
            other = mine.describe(*spare)
            sample.row = {**found, "error": reasons[0], "substitute": f"{other['shard']}/{other['key']}"}
            return sample
        raise DataError(f"Sample {found['key']} of {found['shard']} (source `{found['source']}`) and {SPARES} substitutes "
                        f"of the same source do not decode; reasons: {'; '.join(dict.fromkeys(reasons))}.",
                        "check `label` and `class_map` of this source, and `data.decoder`; `tubelet data verify` on "
                        "its shards")

    def decode(self, raw: Raw, xs: Sequence[int]) -> Sample:
        """Clips for the global sample numbers `xs` (its repeats), and the label. Raises `BadSample`."""
        def reduce(rows: int, cols: int) -> int:
            return min(self.transform.reduce(rows, cols, sample_seed(self.seed, x)) for x in xs)

        media = self.samples.media(raw, reduce)
        try:
            clips = training_clips(media, self.settings.clip, self._clip_seeds(xs))
        finally:
            media.close()
        return Sample(clips, self.samples.label(raw), getattr(media, "full", None), self.samples.token_map(raw))

    def _clip_seeds(self, xs: Sequence[int]) -> list[int]:
        return [sample_seed(self.seed, x, CLIP) for x in xs]


def places_table(places: Places) -> np.ndarray:
    """int64 [n, 5]: x, source, epoch, shard, index."""
    return np.stack([places.x, places.source, places.epoch, places.shard, places.index], axis=1)


def new_batch(count: int, frames: int, size: tuple[int, int]) -> torch.Tensor:
    """uint8 [count, 3, *size], or [count, 3, frames, *size] for clips, uninitialised; in a loader process in
    shared memory from the start, which saves the copy that sending it would take (a tenth of the time of a picture)."""
    import torch
    from torch.utils.data import get_worker_info

    shape = (count, 3, *([frames] if frames > 1 else []), *size)
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
