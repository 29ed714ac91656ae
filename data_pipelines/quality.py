"""How well are these shards shuffled? Measured on the labels of real batches, beside full random order and webdataset.

* class entropy of a batch, of a micro-batch and of 20 batches in a row, in bits: sorted shards show as a low entropy;
* mates: how many other samples of one's batch (micro-batch) come from the same shard; near-duplicates lie in one shard;
* shards that a batch is drawn from.

webdataset's order is that of its own code, run on sample numbers instead of pictures: every stream (a loader worker of a
rank) takes every S-th shard, shuffles its list, and its samples in a buffer; a batch takes G / S samples of each of the S
streams, one after another.

Legend: G global batch, m micro-batch, S streams.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from data_pipelines.labels import NO_LABEL, all_labels, labels_at
from data_pipelines.order import PLAIN_LIMIT, Order, OrderSource
from data_pipelines.recipe import Recipe
from data_pipelines.samples import Source
from tubelet.batching import divisors
from tubelet.errors import DataError

BATCHES = 20


@dataclass(frozen=True)
class Quality:
    """One order, judged; means over the batches."""

    name: str
    batch_bits: float
    micro_bits: float
    many_bits: float
    """Class entropy of all batches together."""
    batch_mates: float
    micro_mates: float
    shards_in_batch: float


@dataclass(frozen=True)
class QualityReport:
    """Orders side by side on one data set."""

    title: str
    global_batch_size: int
    micro_batch_size: int
    num_batches: int
    orders: list[Quality]
    columns = ("order", "batch, bits", "micro batch, bits", "all batches, bits", "mates in batch", "in micro batch",
               "shards in batch")

    def rows(self) -> list[tuple[str, ...]]:
        """For a table with `columns`."""
        return [(q.name, *(f"{value:.2f}" for value in (q.batch_bits, q.micro_bits, q.many_bits, q.batch_mates,
                                                        q.micro_mates)), f"{q.shards_in_batch:.0f}") for q in self.orders]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


# ---------------------------------------------------------------------------------------------------- the measures


def entropy(labels: np.ndarray) -> float:
    """Bits of the distribution of these class numbers."""
    share = np.unique(labels, return_counts=True)[1] / len(labels)
    return float(-(share * np.log2(share)).sum())


def mates(shards: np.ndarray) -> float:
    """Mean number of other samples from one's own shard."""
    count = np.unique(shards, return_counts=True)[1].astype(np.float64)
    return float((count * (count - 1)).sum() / len(shards))


def judge(name: str, labels: np.ndarray, shards: np.ndarray, micro_batch_size: int) -> Quality:
    """Judges batches: labels and shard numbers, both [batches, G]."""
    small_labels = labels.reshape(-1, micro_batch_size)
    small_shards = shards.reshape(-1, micro_batch_size)
    return Quality(name, float(np.mean([entropy(row) for row in labels])),
                   float(np.mean([entropy(row) for row in small_labels])), entropy(labels.reshape(-1)),
                   float(np.mean([mates(row) for row in shards])), float(np.mean([mates(row) for row in small_shards])),
                   float(np.mean([len(np.unique(row)) for row in shards])))


# ---------------------------------------------------------------------------------------------------- the orders


def our_batches(order: Order, batch: int, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(source, shard, index), each [count, batch]: batches from a quarter of the first epoch on."""
    first = order.size * order.repeats // 4 // batch * batch
    places = order.place(np.arange(first, first + count * batch))
    shape = count, batch
    return places.source.reshape(shape), places.shard.reshape(shape), places.index.reshape(shape)


def random_batches(counts: np.ndarray, batch: int, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(shard, index), each [count, batch]: what a permutation of the whole epoch gives, without building it."""
    size = int(counts.sum())
    chosen: list[int] = []
    draw = random.Random(seed)
    while len(chosen) < count * batch:  # a data set smaller than this goes round again
        chosen += draw.sample(range(size), min(size, count * batch - len(chosen)))
    return _locate(counts, np.array(chosen, dtype=np.int64).reshape(count, batch))


def _locate(counts: np.ndarray, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    ends = np.cumsum(counts)
    shard = np.searchsorted(ends, numbers, side="right")
    return shard, numbers - (ends[shard] - counts[shard])


def webdataset_stream(counts: Sequence[int], stream: int, streams: int, buffer: int, seed: int) -> Iterator[int]:
    """Sample numbers (through all shards) as one loader worker of webdataset yields them, epoch after epoch.

    `WebDataset(urls, shardshuffle=len(urls), seed=seed).shuffle(buffer, seed=...)`: as there, every epoch has the same
    shards in the same order.
    """
    from webdataset.filters import _shuffle

    starts = np.concatenate([[0], np.cumsum(counts)]).tolist()
    draw = random.Random(f"{seed} {stream}")
    while True:
        mine = itertools.islice(range(len(counts)), stream, None, streams)  # split_by_node, then split_by_worker
        shards = _shuffle(mine, bufsize=len(counts), seed=seed)
        numbers = (number for shard in shards for number in range(starts[shard], starts[shard] + counts[shard]))
        yield from _shuffle(numbers, bufsize=buffer, rng=draw) if buffer else numbers


def webdataset_batches(counts: np.ndarray, batch: int, count: int, *, streams: int, buffer: int,
                       seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(shard, index), each [count, batch]: batches after every stream's buffer has filled, or a quarter of its epoch."""
    share, sizes = batch // streams, counts.tolist()
    parts = []
    for stream in range(streams):
        mine = sum(sizes[stream::streams])
        skip = min(2 * buffer, mine // 4)  # reads two for each it gives until it is full
        numbers = webdataset_stream(sizes, stream, streams, buffer, seed)
        parts.append(list(itertools.islice(numbers, skip, skip + count * share)))
    together = np.array(parts, dtype=np.int64).reshape(streams, count, share).transpose(1, 0, 2).reshape(count, batch)
    return _locate(counts, together)


# ---------------------------------------------------------------------------------------------------- together


def measure_source(source: Source, order: Order, *, global_batch_size: int, micro_batch_size: int, seed: int = 0,
                   streams: Sequence[int] = (8, 64), buffers: Sequence[int] = (1000, 10_000),
                   index_dir: str | None = None, title: str = "") -> QualityReport:
    """Judges our order (of this one source), full random order and webdataset's on the labels of a source.

    `streams` that do not divide the batch, or outnumber the shards (webdataset then fails), are left out.
    """
    counts = source.index.counts
    size, batch = int(counts.sum()), global_batch_size
    batches = max(1, min(BATCHES, size // (2 * batch)))
    known = all_labels(source, index_dir) if size <= PLAIN_LIMIT else None
    starts = np.cumsum(counts) - counts

    def judged(name: str, shard: np.ndarray, index: np.ndarray) -> Quality:
        flat = shard.reshape(-1), index.reshape(-1)
        labels = known[starts[flat[0]] + flat[1]] if known is not None else labels_at(source, *flat)
        if (labels == NO_LABEL).all():
            raise DataError(f"No sample of source `{source.settings.name}` has a label by the rule `{source.index.label}`.",
                            "--label, or `label` of the source: cls, txt or json:path.to.field")
        return judge(name, labels.reshape(shard.shape), shard, micro_batch_size)

    _, shard, index = our_batches(order, batch, batches)
    found = [judged("full random", *random_batches(counts, batch, batches, seed)), judged("tubelet", shard, index)]
    usable = [s for s in streams if batch % s == 0 and s <= len(counts)] or [max(
        s for s in divisors(batch) if s <= len(counts))]
    for s in usable:
        for buffer in buffers:
            drawn = webdataset_batches(counts, batch, batches, streams=s, buffer=buffer, seed=seed)
            found.append(judged(f"webdataset, {s} streams, buffer {buffer}", *drawn))
    return QualityReport(title or f"Shuffle of {source.settings.name}", batch, micro_batch_size, batches, found)


def measure_recipe(recipe: Recipe, global_batch_size: int, micro_batch_size: int) -> QualityReport:
    """As `measure_source`, for the first source of a recipe's `data.train` and the order it would have alone."""
    from data_pipelines.index import open_source

    settings, data = recipe.data.train[0], recipe.data
    source = Source(settings, open_source(settings, index_dir=data.index_dir))
    order = Order([OrderSource(settings.name, source.index.counts, 1.0, source.index.sample_bytes)], seed=recipe.seed,
                  global_batch_size=global_batch_size, lanes=data.lanes, window=data.window, repeats=1,
                  shuffle=data.shuffle)
    return measure_source(source, order, global_batch_size=global_batch_size, micro_batch_size=micro_batch_size,
                          seed=recipe.seed, index_dir=data.index_dir,
                          title=f"Shuffle of source `{settings.name}`, batches of {global_batch_size} in micro batches of "
                                f"{micro_batch_size}")


def draw(reports: Sequence[QualityReport], path: str) -> None:
    """A picture of reports: class entropy and mates of every order, one column of panels per report."""
    try:
        import matplotlib
        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        raise DataError("A plot is drawn by matplotlib, which is not installed.", "pip install tubelet[demo]") from None
    figure, axes = pyplot.subplots(2, len(reports), figsize=(6 * len(reports) + 2, 7.5), squeeze=False, layout="constrained")
    for column, report in enumerate(reports):
        names = [q.name for q in report.orders]
        places = np.arange(len(names))
        top, bottom = axes[0][column], axes[1][column]
        for shift, (label, values) in enumerate([("batch", [q.batch_bits for q in report.orders]),
                                                 ("micro batch", [q.micro_bits for q in report.orders]),
                                                 (f"{report.num_batches} batches", [q.many_bits for q in report.orders])]):
            top.barh(places + 0.27 * (shift - 1), values, 0.25, label=label)
        top.set(title=f"{report.title}\nclass entropy, bits (more is better)", yticks=places, yticklabels=names)
        for shift, (label, values) in enumerate([("batch", [q.batch_mates for q in report.orders]),
                                                 ("micro batch", [q.micro_mates for q in report.orders])]):
            bottom.barh(places + 0.36 * (shift - 0.5), values, 0.34, label=label)
        bottom.set(title="samples from one's own shard (fewer is better)", yticks=places, yticklabels=names, xscale="symlog")
        for panel in (top, bottom):
            panel.invert_yaxis()
            panel.legend(loc="upper center", bbox_to_anchor=(0.5, -0.07), ncols=3, fontsize=8, frameon=False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
