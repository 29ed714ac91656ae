"""One sample: where the index says it lies -> its bytes -> picture and label."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from data_pipelines.decode import PICTURES, BadSample, check_label, decode_image, label_member, read_class_map, read_label
from data_pipelines.reader import Reader
from data_pipelines.settings import DataSettings, SourceSettings
from tubelet.errors import DataError

if TYPE_CHECKING:
    from data_pipelines.index import SourceIndex


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


class Samples:
    """Reads and decodes the samples of some sources. `num_classes` 0 accepts any label."""

    def __init__(self, sources: Sequence[Source], settings: DataSettings, num_classes: int):
        self.sources, self.settings, self.num_classes = list(sources), settings, num_classes
        self.reader = Reader(settings.io_timeout_seconds)

    def load(self, source: int, shard: int, index: int) -> tuple[np.ndarray, int]:
        """(uint8 picture [H, W, 3], label). Raises `BadSample` for content that does not decode, `DataError` for storage
        that fails and for labels outside the classes."""
        mine, settings = self.sources[source], self.settings
        ref = mine.index.sample(shard, index)
        picture = next((kind for kind in PICTURES if kind in ref.members), None)
        label_in = label_member(mine.index.label)  # the rule of the source, or else of its index
        if picture is None:
            raise BadSample(f"no picture among its members ({', '.join(ref.members) or 'none'})")
        if label_in not in ref.members:
            raise BadSample(f"no `{label_in}` member for the label (it has {', '.join(ref.members)})")
        data = self.reader.read_members(ref.url, {kind: ref.members[kind] for kind in (picture, label_in)})
        image = decode_image(data[picture], decoder=settings.decoder, exif=settings.exif,
                             max_pixels=settings.max_pixels)
        where = f"sample {ref.key} of {ref.url} (source `{mine.settings.name}`)"
        try:
            label = read_label(data[label_in], mine.index.label, mine.class_map)
        except DataError as error:
            raise DataError(f"{error.problem.rstrip('.')}: {where}.", error.hint) from None
        check_label(label, self.num_classes, where)
        return image, label
