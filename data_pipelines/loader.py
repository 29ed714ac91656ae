"""Batches for training, in the order of samples.

This process does the arithmetic of the order (`order.py`) and hands workers the places of one micro-batch at a time; a
worker reads, decodes, augments and mixes it (`batches.py`). Ranks, workers, prefetching and restarts cannot change a
batch. Evaluation is in `evaluation.py`.

Legend: G global batch, W ranks, m micro-batch, R repeats, x global sample number, T frames, K classes, H W rows cols.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data_pipelines.ahead import Ahead, start_ahead
from data_pipelines.augment import TrainTransform
from data_pipelines.batches import Batch, TrainBatches, places_table
from data_pipelines.decode import decoder_version, require_decoder
from data_pipelines.ledger import Ledger
from data_pipelines.mix import check_mixing, in_pairs
from data_pipelines.order import Order, OrderSource
from data_pipelines.samples import Samples, Source, has_videos, open_sources
from data_pipelines.settings import DataSettings
from data_pipelines.token_labels import check_token_labels
from data_pipelines.video import require_video_decoder, video_decoder_version
from data_pipelines.workers import stream
from tubelet.batching import check_batches, micro_batch_multiple
from tubelet.config import flatten
from tubelet.dist import World
from tubelet.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Generator

log = logging.getLogger(__name__)


class TrainLoader:
    """Training batches of this rank (`tubelet.engine.protocol.Loader`).

    `recorded` is what a checkpoint holds of `recorded_state()`; None at the first start of a run.
    """

    def __init__(self, settings: DataSettings, *, seed: int, img_size: int | tuple[int, int], num_classes: int,
                 global_batch_size: int, micro_batch_size: int, world: World, recorded: dict[str, Any] | None = None,
                 device_type: str = "cpu"):
        self.settings, self.seed, self.world, self.img_size = settings, seed, world, img_size
        self.global_batch_size, self.micro_batch_size = global_batch_size, micro_batch_size
        self.multiple = micro_batch_multiple(in_pairs(settings.augment), settings.repeats)
        check_batches(global_batch_size, micro_batch_size, world.size, self.multiple)
        check_mixing(settings.augment, num_classes)
        check_token_labels(settings)
        require_decoder(settings.decoder, settings.reduced_decode)
        transform = TrainTransform(settings.augment, img_size)
        self.sources = open_sources(settings.train, settings, world)
        self.decoder = decoder_version(settings)  # other ones, and other versions, may give other pixels
        if has_videos(self.sources):
            require_video_decoder(settings.video_decoder)
            self.decoder += f", {video_decoder_version(settings.video_decoder)}"
        self.order = Order(
            [OrderSource(s.settings.name, s.index.counts, s.settings.weight, s.index.sample_bytes) for s in self.sources],
            seed=seed, global_batch_size=global_batch_size, lanes=settings.lanes, window=settings.window,
            repeats=settings.repeats, shuffle=settings.shuffle, resolved=(recorded or {}).get("order"))
        self.samples = Samples(self.sources, settings, num_classes)
        self._work = TrainBatches(self.samples, self.order, settings, transform, seed, num_classes)
        self.size = self.order.size * settings.repeats
        self.ledger = Ledger(None, world.rank, settings.max_bad_fraction, world.size)
        self.fingerprint = _fingerprint(self.order, self.sources)
        self._ahead: Ahead | None = None
        self.give_up: Callable[[], bool] = lambda: False
        self._pin = device_type == "cuda" and settings.pin_memory
        self._running: Generator[Batch, None, None] | Iterator[Batch] | None = None
        if world.speaks:
            for note in self._notes(recorded or {}):
                log.warning("note: %s", note)

    def set_colors(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Mean and standard deviation of the data's normalisation (0..1): the colours that augmentation fills and erases
        with. Before `batches`."""
        self._work.transform = TrainTransform(self.settings.augment, self.img_size, mean=tuple(mean), std=tuple(std))

    def recorded_state(self) -> dict[str, Any]:
        """What a checkpoint must keep besides the position, as plain JSON values: resolved lanes and windows of the order
        (never recomputed from defaults), and the decoder, whose change is said."""
        return {"order": self.order.resolved(), "decoder": self.decoder}

    def batches(self, seen: int) -> Iterator[Batch]:
        """This rank's micro-batches from global sample number `seen` on, without end; ends those of an earlier call.

        `ids` int64 [m] are global sample numbers; `pixels` uint8 [m, 3, H, W], or [m, 3, T, H, W] for clips; `labels`
        int64 [m], or fp32 [m, K] when samples are mixed; `bad` rows for `consume`. Trouble with storage or workers is
        raised by `next`, on this rank only.
        """
        if seen % self.multiple:
            raise ConfigError(f"The run stands at sample {seen}, but mixing (and `data.repeats`) needs a position that is "
                              f"a multiple of {self.multiple}.", "the augmentation and repeats that the run was started "
                              "with; or init.from_run with data.restart_order=true")
        self.close()
        self.ledger.forget(seen)
        self._running = stream(self._work, self._tasks(seen), workers=self.settings.workers,
                               prefetch=self.settings.prefetch, pin_memory=self._pin, describe=self.describe,
                               timeout=self.settings.worker_patience, give_up=lambda: self.give_up())
        self._ahead = start_ahead(self.order, self.sources, self.settings, self.world, seen,
                                  global_batch_size=self.global_batch_size)
        return self._running

    def consume(self, batch: Batch) -> None:
        """A finished step has consumed this micro-batch: its bad samples are counted now, and the fetcher goes on."""
        if self._ahead is not None:  # at each step, not when it is logged: the fetcher would stand still in between
            after = int(batch["ids"][-1]) + 1
            share = self.global_batch_size // self.world.size
            self._ahead.consumed(after - (self.world.rank + 1) * share + self.global_batch_size)
        self.ledger.add(batch.get("bad", ()))

    def audit(self, seen: int) -> dict[str, float]:
        """Scalars of the data: bad samples over all ranks, and epochs and samples per source of a mixture. Writes the
        ledger; raises `DataError` on all ranks alike when too many samples were bad. All ranks call it."""
        values = self.ledger.audit(seen)
        if len(self.sources) > 1:
            values |= {f"data/epoch/{name}": epochs for name, epochs in self.order.epochs(seen).items()}
            values |= {f"data/samples/{name}": float(count) for name, count in self.order.counts(seen).items()}
        return values

    def summary(self) -> str | None:
        """The bad samples of the whole job in a line, None when there were none. All ranks call it."""
        return self.ledger.summary()

    def set_ledger(self, folder: str | Path | None, seen: int = 0) -> None:
        """Keep the ledger in `folder`; lines there from `seen` on are forgotten."""
        self.ledger = Ledger(folder, self.world.rank, self.settings.max_bad_fraction, self.world.size)
        self.ledger.forget(seen)

    def close(self) -> None:
        """End the workers and close the shards."""
        running, self._running = self._running, None
        if running is not None:
            running.close()  # type: ignore[union-attr] - `stream` is a generator
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None
        self.samples.reader.close()

    def _tasks(self, seen: int) -> Iterator[np.ndarray]:
        """int64 [m, 5] per micro-batch: x, source, epoch, shard, index."""
        share = self.global_batch_size // self.world.size
        while True:
            first = seen + self.world.rank * share
            table = places_table(self.order.place(np.arange(first, first + share, dtype=np.int64)))
            for start in range(0, share, self.micro_batch_size):
                yield table[start:start + self.micro_batch_size]
            seen += self.global_batch_size

    def describe(self, x: int) -> str:
        """Which sample global sample number `x` is, in words: key, shard, source."""
        places = self.order.place(np.array([x]))
        found = self.sources[int(places.source[0])].describe(int(places.shard[0]), int(places.index[0]))
        return f"sample {x}: {found['key']} of {found['shard']} (source `{found['source']}`)"

    def _notes(self, recorded: dict[str, Any]) -> Iterator[str]:
        if recorded.get("decoder", self.decoder) != self.decoder:
            yield (f"the run was decoded by {recorded['decoder']} until now and goes on with {self.decoder}: the order of "
                   "samples is the same, pixels may differ by rounding")
        nodes, shards = self.world.size // max(self.world.local_size, 1), sum(len(s.index.shards) for s in self.sources)
        if shards < nodes:
            yield f"{shards} shards for {nodes} nodes: every node reads every shard"
        if len(self.sources) > 1:
            yield "mixture: " + ", ".join(f"{name} {share:.4%}" for name, share in self.order.weights().items())


def compare_fingerprints(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What differs between the data of a checkpoint and the data now, one sentence each; empty when a resume may go on."""
    a, b = flatten(old), flatten(new)
    found = []
    for name in sorted({*old.get("sources", {}), *new.get("sources", {})}):
        was, now = name in old.get("sources", {}), name in new.get("sources", {})
        if was != now:
            found.append(f"source `{name}`: {'is gone' if was else 'is new'}")
            a = {key: value for key, value in a.items() if not key.startswith(f"sources.{name}.")}
            b = {key: value for key, value in b.items() if not key.startswith(f"sources.{name}.")}
    meaning = {"digest": " (names, samples or bytes of its shards differ)"}
    for key in sorted({*a, *b}):
        if a.get(key) != b.get(key):
            words = meaning.get(key.rpartition(".")[2], "")
            found.append(f"{key}: the checkpoint has {_short(a.get(key))}, now {_short(b.get(key))}{words}")
    return found


def _short(value: Any) -> str:
    text = "nothing" if value is None else str(value)
    return text if len(text) <= 20 else text[:12] + "..."


def _fingerprint(order: Order, sources: list[Source]) -> dict[str, Any]:
    part = order.fingerprint_part()
    for source in sources:
        part["sources"][source.settings.name] |= {"digest": source.index.digest(),
                                                  "samples": int(source.index.counts.sum()),
                                                  "shards": len(source.index.shards)}
    return part
