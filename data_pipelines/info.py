"""What shards hold, as far as an index and a few samples can tell: nothing here reads a data set from end to end.

Counts, bytes and members come from .idx files (of at most `MANY` shards, evenly chosen); sizes of pictures from their
headers and of videos from their first frames, of a sample of N. Only `classes` reads every label, once.
"""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from data_pipelines.decode import PICTURES, BadSample, jpeg_header, label_member, read_label
from data_pipelines.index import SourceIndex, storage_of
from data_pipelines.labels import NO_LABEL, all_labels
from data_pipelines.media import media_members, open_media
from data_pipelines.order import PLAIN_LIMIT, default_window
from data_pipelines.reader import Reader
from data_pipelines.samples import Source
from data_pipelines.settings import DataSettings
from tubelet.files import human_bytes

MANY = 200  # shards whose .idx files are read
PERCENTILES = (0, 5, 50, 95, 100)
SHOWN = 5  # classes at each end


@dataclass
class Info:
    """What is known of a source. Percentiles are the 0th, 5th, 50th, 95th and 100th."""

    shards: int
    samples: int
    nbytes: int
    samples_per_shard: list[float]
    sample_bytes: list[float]
    """Percentiles of a sample's members together."""
    members: dict[str, int]
    """Samples that have this member, among `looked_at`."""
    looked_at: int
    """Samples whose index entries were read."""
    media: dict[str, Any]
    """Percentiles of a sample of pictures or videos: width, height, and of videos frames, seconds, fps."""
    label: str
    names: list[str] | None
    """Class names by number."""
    classes: dict[int, int] | None
    """Samples per class number; None when labels were not read."""
    unlabelled: int
    order: str
    digest: str
    why_unlabelled: str = ""
    """What is wrong with the first label that breaks the rule."""

    @property
    def entropy(self) -> float | None:
        """Bits of the classes' distribution."""
        return class_entropy(self.classes) if self.classes else None

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "entropy": self.entropy}


def describe(source: Source, *, classes: bool = False, probe: int = 64, index_dir: str | None = None) -> Info:
    """`tubelet data info`. `probe` samples are opened for their sizes; `classes` reads (and caches) every label."""
    index = source.index
    filled = np.flatnonzero(index.counts)
    looked = np.unique(filled[np.linspace(0, len(filled) - 1, min(MANY, len(filled))).astype(int)])
    members: Counter[str] = Counter()
    sizes = []
    for shard in looked.tolist():
        table = index.table(shard)
        owner = np.repeat(np.arange(len(table)), np.diff(table.member_ends.astype(np.int64), prepend=0))
        sizes.append(np.bincount(owner, table.sizes.astype(np.float64), minlength=len(table)))
        for number, count in enumerate(np.bincount(table.extensions, minlength=len(table.vocabulary)).tolist()):
            members[table.vocabulary[number]] += count
    labels = all_labels(source, index_dir) if classes else None
    found, unlabelled = None, 0
    if labels is not None:
        unlabelled = int((labels == NO_LABEL).sum())
        found = {int(k): int(n) for k, n in zip(*np.unique(labels[labels != NO_LABEL], return_counts=True))}
    why = _why_unlabelled(source, int(np.argmax(labels == NO_LABEL))) if labels is not None and unlabelled else ""
    order = ("one permutation per epoch" if len(index) <= PLAIN_LIMIT else
             f"lanes, each shuffled in windows of {default_window(index.sample_bytes)} samples")
    return Info(len(index.shards), len(index), index.nbytes, _percentiles(index.counts), _percentiles(np.concatenate(sizes)),
                dict(members.most_common()), int(index.counts[looked].sum()), _media(index, probe), index.label,
                index.classes, found, unlabelled, order, index.digest(), why)


def _why_unlabelled(source: Source, number: int) -> str:
    """Why sample `number` of a source, in index order, has no class number."""
    index = source.index
    ends = np.cumsum(index.counts)
    shard = int(np.searchsorted(ends, number, side="right"))
    ref = index.sample(shard, number - int(ends[shard] - index.counts[shard]))
    member = label_member(index.label)
    if member not in ref.members:
        return f"no `{member}` member"
    reader = Reader(30.0, storage=storage_of([index]))
    try:
        read_label(reader.read_members(ref.url, {member: ref.members[member]})[member], index.label, source.class_map)
    except BadSample as error:
        return str(error)
    finally:
        reader.close()
    return ""


def _percentiles(values: Sequence[float] | np.ndarray) -> list[float]:
    return [round(float(value), 3) for value in np.percentile(values, PERCENTILES)]


def _media(index: SourceIndex, probe: int) -> dict[str, Any]:
    """Sizes of `probe` samples at equal distances in the source."""
    numbers = np.unique(np.linspace(0, len(index) - 1, min(probe, len(index))).astype(np.int64)) if probe else []
    ends = np.cumsum(index.counts)
    settings = DataSettings.model_validate({"train": "unused"})
    values: dict[str, list[float]] = {}
    failed, reader = 0, Reader(30.0, storage=storage_of([index]))
    for number in map(int, numbers):
        shard = int(np.searchsorted(ends, number, side="right"))
        ref = index.sample(shard, number - int(ends[shard] - index.counts[shard]))
        kinds = media_members(list(ref.members))
        try:
            content = reader.read_members(ref.url, {kind: ref.members[kind] for kind in kinds})
            for name, value in _measure(content, settings).items():
                values.setdefault(name, []).append(value)
        except BadSample:
            failed += 1
    reader.close()
    return {"probed": len(numbers), "failed": failed, **{name: _percentiles(found) for name, found in values.items()}}


def _measure(content: Mapping[str, bytes], settings: DataSettings) -> dict[str, float]:
    if len(content) == 1 and next(iter(content)) in PICTURES:
        width, height = picture_size(next(iter(content.values())))
        return {"width": width, "height": height}
    media = open_media(content, settings)
    try:
        height, width = media.read([0]).shape[1:3]
        found = {"width": float(width), "height": float(height), "frames": float(media.frames)}
        if media.frames > 1 and media.times[-1] > media.times[0]:
            fps = (media.frames - 1) / float(media.times[-1] - media.times[0])
            found |= {"fps": fps, "seconds": media.frames / fps}
        return found
    finally:
        media.close()


def picture_size(data: bytes) -> tuple[int, int]:
    """(width, height) from the header of a picture; nothing is decoded. Raises `BadSample`."""
    if data.startswith(b"\xff\xd8\xff"):
        height, width, _ = jpeg_header(data)
        return width, height
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.size
    except Exception as error:  # PIL raises many kinds
        raise BadSample(re.sub(r" ?<_io\.BytesIO object at 0x\w+>", "", str(error))[:200]) from None


# ---------------------------------------------------------------------------------------------------- printing


def class_entropy(classes: Mapping[int, int]) -> float:
    """Bits of a distribution given as counts."""
    share = np.array([count for count in classes.values() if count], dtype=np.float64)
    share /= share.sum()
    return float(-(share * np.log2(share)).sum())


def class_rows(classes: Mapping[int, int], names: Sequence[str] | None = None) -> list[tuple[str, str, str]]:
    """(class, samples, share) of the largest and smallest classes, and a row that sums up."""
    ordered = sorted(classes.items(), key=lambda item: (-item[1], item[0]))
    total = sum(classes.values())

    def row(value: int, count: int) -> tuple[str, str, str]:
        name = f" {names[value]}" if names and 0 <= value < len(names) else ""
        return f"{value}{name}", str(count), f"{count / total:.3%}"

    rows = [row(*item) for item in (ordered if len(ordered) <= 2 * SHOWN + 1 else ordered[:SHOWN])]
    if len(ordered) > 2 * SHOWN + 1:
        rows += [(f"... {len(ordered) - 2 * SHOWN} more", "", ""), *(row(*item) for item in ordered[-SHOWN:])]
    even = f", {class_entropy(classes):.2f} bits of {np.log2(len(ordered)):.2f}" if len(ordered) > 1 else ""
    return [*rows, (f"{len(ordered)} classes{even}", str(total), "")]


def info_rows(info: Info) -> list[tuple[str, str]]:
    """What `tubelet data info` prints, (what, value)."""
    def spread(values: Sequence[float], show: Any = lambda value: f"{value:.4g}") -> str:
        return " / ".join(show(value) for value in values)

    names = info.names or []
    rows = [("shards", str(info.shards)), ("samples", str(info.samples)), ("bytes", human_bytes(info.nbytes)),
            ("percentiles", " / ".join(map(str, PERCENTILES))),
            ("samples per shard", spread(info.samples_per_shard, lambda value: f"{value:.0f}")),
            ("bytes per sample", spread(info.sample_bytes, human_bytes)),
            ("members", ", ".join(f"{kind} ({count / info.looked_at:.1%})" for kind, count in info.members.items()))]
    for name in ("width", "height", "frames", "seconds", "fps"):
        if name in info.media:
            rows.append((name, spread(info.media[name])))
    rows.append(("looked at", f"{info.looked_at} index entries, {info.media['probed']} samples"
                 + (f", of which {info.media['failed']} do not open" if info.media["failed"] else "")))
    shown = ", ".join(names[:8]) + (" ..." if len(names) > 8 else "")
    rows += [("label", info.label), ("class names", f"{len(names)} ({shown})" if names else "no classes.json"),
             ("order", info.order), ("digest", info.digest)]
    if info.unlabelled:
        rows.append(("without a label", str(info.unlabelled)))
        rows.append(("such as", f"{info.why_unlabelled} (--label, --class-map)"))
    return rows
