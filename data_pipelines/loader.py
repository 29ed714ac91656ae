"""Batches for training and evaluation.

Training: this process does the arithmetic of the order (`order.py`) and hands workers the places of one micro-batch at a
time; a worker reads, decodes, augments and mixes it. Ranks, workers, prefetching and restarts cannot change a batch.

Evaluation: every sample exactly once over all ranks, padded so that all ranks have the same number of batches.

Legend: G global batch, W ranks, m micro-batch, R repeats, x global sample number, K classes, H W rows cols.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data_pipelines.augment import EvalTransform, TrainTransform, as_pair, sample_seed
from data_pipelines.decode import BadSample, decoder_version, require_decoder
from data_pipelines.index import open_source
from data_pipelines.ledger import Ledger
from data_pipelines.mix import check_mixing, mix_batch, mixes
from data_pipelines.order import Order, OrderSource
from data_pipelines.samples import Samples, Source
from data_pipelines.settings import DataSettings, SourceSettings
from data_pipelines.workers import stream, working_on
from tubelet.batching import check_batches, micro_batch_multiple
from tubelet.config import flatten
from tubelet.dist import World
from tubelet.errors import ConfigError, DataError

if TYPE_CHECKING:
    from collections.abc import Generator

log = logging.getLogger(__name__)

SPARES = 8  # substitutes tried for one bad sample: with 10 % bad all fail once in 10**8

Batch = dict[str, Any]


class TrainLoader:
    """Training batches of this rank (`tubelet.engine.protocol.Loader`).

    `recorded` is what a checkpoint holds of `recorded_state()`; None at the first start of a run.
    """

    def __init__(self, settings: DataSettings, *, seed: int, img_size: int | tuple[int, int], num_classes: int,
                 global_batch_size: int, micro_batch_size: int, world: World, recorded: dict[str, Any] | None = None,
                 device_type: str = "cpu"):
        self.settings, self.seed, self.world = settings, seed, world
        self.global_batch_size, self.micro_batch_size = global_batch_size, micro_batch_size
        self.multiple = micro_batch_multiple(mixes(settings.augment), settings.repeats)
        check_batches(global_batch_size, micro_batch_size, world.size, self.multiple)
        check_mixing(settings.augment, num_classes)
        require_decoder(settings.decoder)
        transform = TrainTransform(settings.augment, img_size)
        self.sources = _open(settings.train, settings, world)
        self.order = Order(
            [OrderSource(s.settings.name, s.index.counts, s.settings.weight, s.index.sample_bytes) for s in self.sources],
            seed=seed, global_batch_size=global_batch_size, lanes=settings.lanes, window=settings.window,
            repeats=settings.repeats, shuffle=settings.shuffle, resolved=(recorded or {}).get("order"))
        self.samples = Samples(self.sources, settings, num_classes)
        self._work = _TrainBatches(self.samples, self.order, settings, transform, seed, num_classes)
        self.size = self.order.size * settings.repeats
        self.ledger = Ledger(None, world.rank, settings.max_bad_fraction, world.size)
        self.fingerprint = _fingerprint(self.order, self.sources)
        self._pin = device_type == "cuda" and settings.pin_memory
        self._running: Generator[Batch, None, None] | Iterator[Batch] | None = None
        if world.speaks:
            for note in self._notes(recorded or {}):
                log.warning("note: %s", note)

    def recorded_state(self) -> dict[str, Any]:
        """What a checkpoint must keep besides the position, as plain JSON values: resolved lanes and windows of the order
        (never recomputed from defaults), and the decoder, whose change is said."""
        return {"order": self.order.resolved(), "decoder": decoder_version(self.settings)}

    def batches(self, seen: int) -> Iterator[Batch]:
        """This rank's micro-batches from global sample number `seen` on, without end; ends those of an earlier call.

        `ids` int64 [m] are global sample numbers; `pixels` uint8 [m, 3, H, W]; `labels` int64 [m], or fp32 [m, K] when
        samples are mixed; `bad` rows for `consume`. Trouble with storage or workers is raised by `next`, on this rank only.
        """
        if seen % self.multiple:
            raise ConfigError(f"The run stands at sample {seen}, but mixing (and `data.repeats`) needs a position that is "
                              f"a multiple of {self.multiple}.", "the augmentation and repeats that the run was started "
                              "with; or init.from_run with data.restart_order=true")
        self.close()
        self.ledger.forget(seen)
        self._running = stream(self._work, self._tasks(seen), workers=self.settings.workers,
                               prefetch=self.settings.prefetch, pin_memory=self._pin, describe=self._describe)
        return self._running

    def consume(self, batch: Batch) -> None:
        """A finished step has consumed this micro-batch: its bad samples are counted now."""
        self.ledger.add(batch.get("bad", ()))

    def audit(self, seen: int) -> dict[str, float]:
        """Scalars of the data: bad samples over all ranks, and epochs per source of a mixture. Writes the ledger; raises
        `DataError` on all ranks alike when too many samples were bad. All ranks call it."""
        values = self.ledger.audit(seen)
        if len(self.sources) > 1:
            values |= {f"data/epoch/{name}": epochs for name, epochs in self.order.epochs(seen).items()}
        return values

    def set_ledger(self, folder: str | Path | None, seen: int = 0) -> None:
        """Keep the ledger in `folder`; lines there from `seen` on are forgotten."""
        self.ledger = Ledger(folder, self.world.rank, self.settings.max_bad_fraction, self.world.size)
        self.ledger.forget(seen)

    def close(self) -> None:
        """End the workers and close the shards."""
        running, self._running = self._running, None
        if running is not None:
            running.close()  # type: ignore[union-attr] - `stream` is a generator
        self.samples.reader.close()

    def _tasks(self, seen: int) -> Iterator[np.ndarray]:
        """int64 [m, 5] per micro-batch: x, source, epoch, shard, index."""
        share = self.global_batch_size // self.world.size
        while True:
            first = seen + self.world.rank * share
            places = self.order.place(np.arange(first, first + share, dtype=np.int64))
            table = np.stack([places.x, places.source, places.epoch, places.shard, places.index], axis=1)
            for start in range(0, share, self.micro_batch_size):
                yield table[start:start + self.micro_batch_size]
            seen += self.global_batch_size

    def _describe(self, x: int) -> str:
        places = self.order.place(np.array([x]))
        found = self.sources[int(places.source[0])].describe(int(places.shard[0]), int(places.index[0]))
        return f"sample {x}: {found['key']} of {found['shard']} (source `{found['source']}`)"

    def _notes(self, recorded: dict[str, Any]) -> Iterator[str]:
        decoder = decoder_version(self.settings)
        if recorded.get("decoder", decoder) != decoder:
            yield (f"the run was decoded by {recorded['decoder']} until now and goes on with {decoder}: the order of "
                   "samples is the same, pixels may differ by rounding")
        nodes, shards = self.world.size // max(self.world.local_size, 1), sum(len(s.index.shards) for s in self.sources)
        if shards < nodes:
            yield f"{shards} shards for {nodes} nodes: every node reads every shard"
        if len(self.sources) > 1:
            yield "mixture: " + ", ".join(f"{name} {share:.4%}" for name, share in self.order.weights().items())


class _TrainBatches:
    """places of a micro-batch -> batch; runs in the workers and holds nothing that changes."""

    def __init__(self, samples: Samples, order: Order, settings: DataSettings, transform: TrainTransform, seed: int,
                 num_classes: int):
        self.samples, self.order, self.settings, self.transform = samples, order, settings, transform
        self.seed, self.num_classes = seed, num_classes

    def __call__(self, places: np.ndarray) -> Batch:
        import torch

        m, repeats, augment = len(places), self.settings.repeats, self.settings.augment
        pixels = torch.empty((m, 3, *self.transform.size), dtype=torch.uint8)
        labels = torch.empty(m, dtype=torch.int64)
        bad: list[dict[str, Any]] = []
        number, image, label, row = -1, np.empty(0), 0, None
        for slot, (x, source, _, shard, index) in enumerate(places.tolist()):
            working_on(x)
            if x // repeats != number:  # repeats are neighbours: decoded once, augmented apart
                number = x // repeats
                image, label, row = self.load(number, source, shard, index)
            if row is not None:
                bad.append({"x": x, **row})
            pixels[slot] = self.transform(image, sample_seed(self.seed, x))
            labels[slot] = label
        target = labels
        if mixes(augment):
            target = mix_batch(pixels, labels, places[:, 0], augment, seed=self.seed, num_classes=self.num_classes,
                               repeats=repeats)
        return {"ids": torch.from_numpy(places[:, 0].copy()), "pixels": pixels, "labels": target, "bad": bad}

    def load(self, number: int, source: int, shard: int, index: int) -> tuple[np.ndarray, int, dict[str, Any] | None]:
        """(picture, label, None), or those of the substitute and the ledger row (without x). `number` is x // R."""
        try:
            return *self.samples.load(source, shard, index), None
        except BadSample as error:
            reason = str(error)
        mine, reasons = self.samples.sources[source], [reason]
        for attempt in range(SPARES):
            spare = self.order.spare(number, source, attempt)
            try:
                image, label = self.samples.load(source, *spare)
            except BadSample as error:
                reasons.append(str(error))
                continue
            other = mine.describe(*spare)
            return image, label, {**mine.describe(shard, index), "error": reason,
                                  "substitute": f"{other['shard']}/{other['key']}"}
        found = mine.describe(shard, index)
        raise DataError(f"Sample {found['key']} of {found['shard']} (source `{found['source']}`) and {SPARES} substitutes "
                        f"of the same source do not decode; reasons: {'; '.join(dict.fromkeys(reasons))}.",
                        "check `label` of this source and `data.decoder`; `tubelet data verify` on its shards")


class EvalLoader:
    """One validation set (`tubelet.engine.protocol.EvalLoader`): iterating gives this rank's batches of `batch_size`.

    `ids` are sample numbers in index order, -1 with `valid` False is padding. A damaged sample keeps its id, is not
    valid, and is listed in `bad` and in the log: a validation set is never mended by substitutes, so its count tells.
    """

    def __init__(self, settings: SourceSettings, data: DataSettings, *, img_size: int | tuple[int, int],
                 num_classes: int, batch_size: int, world: World, crop_pct: float = 0.875, device_type: str = "cpu"):
        require_decoder(data.decoder)
        self.name, self.data, self.world, self.crop_pct = settings.name, data, world, crop_pct
        self.img_size, self.batch_size = as_pair(img_size), batch_size
        sources = _open([settings], data, world)
        self.samples = Samples(sources, data, num_classes)
        self._ends = np.cumsum(sources[0].index.counts)
        self.size = int(self._ends[-1]) if len(self._ends) else 0
        if not self.size:
            raise DataError(f"Validation set `{self.name}` holds no samples ({settings.shards}).",
                            "remove it from data.val, or check its `shards`")
        self._pin = device_type == "cuda" and data.pin_memory
        self._share = -(-self.size // world.size)
        self.num_batches = -(-self._share // batch_size)

    def __iter__(self) -> Iterator[Batch]:
        transform = EvalTransform(self.data.augment, self.img_size, crop_pct=self.crop_pct)
        batches = stream(lambda numbers: self._batch(numbers, transform), list(self._tasks()), pin_memory=self._pin,
                         workers=min(self.data.workers, self.num_batches), prefetch=self.data.prefetch,
                         describe=self._describe)
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

        pixels = torch.zeros((len(numbers), 3, *self.img_size), dtype=torch.uint8)
        labels = torch.zeros(len(numbers), dtype=torch.int64)
        valid = torch.zeros(len(numbers), dtype=torch.bool)
        bad = []
        for slot, number in enumerate(numbers.tolist()):
            if number < 0:
                continue
            working_on(number)
            try:
                image, labels[slot] = self.samples.load(0, *self._place(number))
            except BadSample as error:
                bad.append({"x": number, **self.samples.sources[0].describe(*self._place(number)), "error": str(error)})
                continue
            pixels[slot], valid[slot] = transform(image), True
        return {"ids": torch.from_numpy(numbers.copy()), "pixels": pixels, "labels": labels, "valid": valid, "bad": bad}

    def _describe(self, number: int) -> str:
        found = self.samples.sources[0].describe(*self._place(number))
        return f"sample {number}: {found['key']} of {found['shard']} (validation set `{self.name}`)"


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


def _open(settings: list[SourceSettings], data: DataSettings, world: World) -> list[Source]:
    """Sources with their indexes, sorted by name as the order numbers them."""
    return [Source(item, open_source(item, index_dir=data.index_dir, world=world))
            for item in sorted(settings, key=lambda item: item.name)]
