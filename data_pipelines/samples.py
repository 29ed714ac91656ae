"""Samples: where the index says they lie -> their bytes -> media, label, token labels.

Fetching and decoding are apart: the bytes of a micro-batch are asked for together, so that remote ones travel side by
side, and decoded one sample after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from data_pipelines.cache import open_cache
from data_pipelines.clips import draw_clip
from data_pipelines.decode import BadSample, check_label, label_member, read_class_map, read_label
from data_pipelines.draws import generator
from data_pipelines.index import open_source, stamps_of, storage_of
from data_pipelines.media import NUMBERED, VIDEOS, Media, Reduce, media_members, numbered_times, open_media
from data_pipelines.reader import Reader
from data_pipelines.settings import ClipSettings, DataSettings, SourceSettings
from data_pipelines.token_labels import read_token_map
from tubelet.dist import World
from tubelet.errors import DataError

if TYPE_CHECKING:
    from data_pipelines.index import SourceIndex
    from data_pipelines.scan import SampleRef

AT_ONCE, BYTES_AT_ONCE = 64, 64 * 2**20  # samples and bytes that are asked for together

Place = tuple[int, int, int]
"""(source, shard, index)."""
Choose = Callable[[int, int, np.ndarray], Sequence[np.ndarray]]
"""(place's running number, frames, times) -> the frames of each clip that will be cut."""


@dataclass
class Source:
    """A source with its index."""

    settings: SourceSettings
    index: SourceIndex

    def __post_init__(self) -> None:
        self.class_map = read_class_map(self.settings.class_map)

    def describe(self, shard: int, index: int) -> dict[str, str | int]:
        """Name, shard, key and offset of a sample, for messages and the ledger."""
        ref = self.index.sample(shard, index)
        offset = min((offset for offset, _ in ref.members.values()), default=0)
        return {"source": self.settings.name, "shard": self.index.shards[shard].name, "key": ref.key, "offset": offset}


@dataclass
class Raw:
    """The bytes of one sample."""

    source: int
    key: str
    url: str
    members: dict[str, bytes] = field(default_factory=dict)
    media: list[str] = field(default_factory=list)
    """Names of what holds the picture or video. Of numbered pictures some may not be among `members`: nobody wants them."""
    problem: str | None = None
    """Why it is a bad sample, when a member that is needed is not there."""


def open_sources(settings: Sequence[SourceSettings], data: DataSettings, world: World) -> list[Source]:
    """Sources with their indexes, sorted by name as the order numbers them."""
    return [Source(item, open_source(item, index_dir=data.index_dir, world=world))
            for item in sorted(settings, key=lambda item: item.name)]


def has_videos(sources: Sequence[Source]) -> bool:
    """Whether the first sample of any source is a video."""
    firsts = [(source, int(np.flatnonzero(source.index.counts)[0])) for source in sources]
    return any(media_members(list(source.index.sample(shard, 0).members))[:1] in [[kind] for kind in VIDEOS]
               for source, shard in firsts)


class Samples:
    """Reads and decodes the samples of some sources. `num_classes` 0 accepts any label."""

    def __init__(self, sources: Sequence[Source], settings: DataSettings, num_classes: int):
        self.sources, self.settings, self.num_classes = list(sources), settings, num_classes
        indexes = [source.index for source in self.sources]
        self.reader = Reader(settings.io_timeout_seconds, storage=storage_of(indexes),
                             cache=open_cache(settings.cache, stamps_of(indexes)), connections=settings.cache.connections)

    def fetch(self, places: Iterable[Place], choose: Choose) -> Iterator[Raw]:
        """The bytes of samples, in order; of numbered pictures, which tell their times by their names, only those that
        `choose` wants. Raises `DataError` for storage that fails."""
        waiting: list[tuple[Raw, SampleRef]] = []
        size = 0
        for number, place in enumerate(places):
            raw, ref = self._wanted(place, partial(choose, number))
            waiting.append((raw, ref))
            size += sum(ref.members[kind][1] for kind in raw.members)
            if len(waiting) == AT_ONCE or size >= BYTES_AT_ONCE:
                yield from self._read(waiting)
                waiting, size = [], 0
        yield from self._read(waiting)

    def _wanted(self, place: Place, choose: Callable[[int, np.ndarray], Sequence[np.ndarray]]) -> tuple[Raw, SampleRef]:
        source, shard, index = place
        mine = self.sources[source]
        ref = mine.index.sample(shard, index)
        raw = Raw(source, ref.key, ref.url, media=media_members(list(ref.members)))
        needed = {"the label": label_member(mine.index.label)}  # the rule of the source, or else of its index
        if self.settings.token_labels:
            needed["the token labels"] = self.settings.token_labels
        if not raw.media:
            raw.problem = f"no picture or video among its members ({', '.join(ref.members) or 'none'})"
        for what, kind in needed.items():
            if kind not in ref.members and not raw.problem:
                raw.problem = f"no `{kind}` member for {what} (it has {', '.join(ref.members)})"
        if raw.problem:
            return raw, ref
        media = raw.media
        if NUMBERED.fullmatch(media[0]):
            try:
                media = [media[i] for i in np.unique(np.concatenate(choose(len(media), numbered_times(media))))]
            except BadSample as error:  # too short
                raw.problem = str(error)
                return raw, ref
        raw.members = dict.fromkeys([*media, *needed.values()], b"")
        return raw, ref

    def _read(self, waiting: list[tuple[Raw, SampleRef]]) -> Iterator[Raw]:
        found = iter(self.reader.read_many([(ref.url, *ref.members[kind]) for raw, ref in waiting for kind in raw.members]))
        for raw, _ in waiting:
            for kind in raw.members:
                raw.members[kind] = next(found)
        for raw, _ in waiting:
            yield raw

    def label(self, raw: Raw) -> int:
        """The class number. Raises `BadSample` when it breaks the label rule, `DataError` when it is none of the classes."""
        mine = self.sources[raw.source]
        where = f"sample {raw.key} of {raw.url} (source `{mine.settings.name}`)"
        try:
            label = read_label(raw.members[label_member(mine.index.label)], mine.index.label, mine.class_map)
        except DataError as error:
            raise DataError(f"{error.problem.rstrip('.')}: {where}.", error.hint) from None
        check_label(label, self.num_classes, where)
        return label

    def media(self, raw: Raw, reduce: Reduce | None = None) -> Media:
        """The picture or video. Raises `BadSample` when the bytes are none, or members are missing. `reduce` (see
        `open_media`) counts only under `data.reduced_decode`."""
        if raw.problem:
            raise BadSample(raw.problem)
        members = {kind: raw.members.get(kind, b"") for kind in raw.media}
        return open_media(members, self.settings, reduce if self.settings.reduced_decode else None)

    def token_map(self, raw: Raw) -> np.ndarray | None:
        """The map of token labels, if the settings name one. Raises `BadSample`."""
        kind = self.settings.token_labels
        return read_token_map(raw.members[kind], self.num_classes) if kind else None


def cut_clips(media: Media, chosen: Sequence[np.ndarray]) -> list[np.ndarray]:
    """uint8 [T, H, W, 3], or the picture [H, W, 3] of a single frame, for each list of frame numbers; what several clips
    share is decoded once."""
    wanted, inverse = np.unique(np.concatenate(chosen), return_inverse=True)
    frames = media.read(wanted.tolist())
    ends = np.cumsum([len(numbers) for numbers in chosen])[:-1]
    return [frames[mine] if len(mine) > 1 else frames[mine[0]] for mine in np.split(inverse, ends)]


def draw_clips(frames: int, times: np.ndarray, settings: ClipSettings, seeds: Sequence[int]) -> list[np.ndarray]:
    """int64 [T] for each seed: frames of a training clip."""
    return [draw_clip(frames, times, settings, generator(seed)) for seed in seeds]


def training_clips(media: Media, settings: ClipSettings, seeds: Sequence[int]) -> list[np.ndarray]:
    """One clip for each seed: uint8 [T, H, W, 3], or [H, W, 3] when a clip has one frame.

    A picture in a run of clips stands still; a video in a run of pictures gives one frame.
    """
    if media.frames == 1 and settings.frames == 1:  # a picture for an image model: nothing to draw, nothing to copy
        image = media.read([0])[0]
        return [image] * len(seeds)
    return cut_clips(media, draw_clips(media.frames, media.times, settings, seeds))
