"""The order of samples: a pure function from a global sample number x to (source, epoch, shard, index).

The stream is one infinite sequence of sample numbers; a global batch is [seen, seen + G), a rank's part a contiguous
piece of it. Nothing here knows ranks, workers, micro-batches or restarts, so none of them can change the order, and the
only state to save is `seen`.

    x, repeat = divmod(x, R)                     R neighbours in x are one sample (repeated augmentation)
    u, c = divmod(x, C);  k = layout[c]          row and lane; a lane belongs to one source of the mixture for good
    p = u * C_k + (lanes of k left of c)         number in the source k, which has C_k lanes
    e, y = divmod(p, N);  i, l = divmod(y, n)    epoch; place in lane l of the n the epoch's row is cut into
    window j of the lane (w samples, at a phase that differs from lane to lane) is shuffled by (seed, k, e, l, j)
    the row is the source's shards, permuted by (seed, k, e), laid end to end

Sources of up to 4 M samples have one lane and one window: a plain permutation per epoch. Larger ones are read in windows
that are contiguous byte ranges of one shard (two at its end), and no two ranks read the same lane when the number of
lanes C is a multiple of the global batch.

Mixtures give each source whole lanes, placed by earliest deadline first in the windows of proportionate fairness (Baruah,
Cohen, Plaxton, Varvel 1996): the count of every source is within one sample of its share at every x.

Random words are raw Philox4x64-10 words with explicit key and counter, which NumPy keeps fixed across releases (unlike the
methods of its Generator). Not here: sources that grow or change weight in the middle of a run; they are another order
and a resume with them is refused by the fingerprint.
"""

from __future__ import annotations

import heapq
import zlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from tubelet.errors import ConfigError, DataError, Problems

ROW, WINDOW, SPARE = 1, 2, 3  # what random words are for; part of their key
PLAIN_LIMIT = 2**22  # up to this many samples a source is one plain permutation: 0.6 s and 16 MB an epoch
WINDOW_BYTES = 32 * 2**20
PHASE = 2654435769  # 2**32 / golden ratio: neighbouring lanes start their windows far apart


@dataclass(frozen=True)
class OrderSource:
    """What the order needs to know of a source."""

    name: str
    counts: np.ndarray
    """int64 [shards]: samples per shard, in the order of the index; zeros are allowed."""
    weight: float = 1.0
    """Share of the mixture relative to the other sources' weights."""
    sample_bytes: float = 100_000.0
    """Mean bytes of a sample; decides the default window."""


@dataclass(frozen=True, order=True)
class Window:
    """A shuffle window: neighbours in the epoch's row of a source, hence one byte range of a shard, or a few at its end."""

    source: int
    epoch: int
    lane: int
    number: int


@dataclass(frozen=True)
class Places:
    """Where samples are: int64 arrays of one length. `source` counts through `Order.sources`, which are sorted by name."""

    x: np.ndarray
    source: np.ndarray
    epoch: np.ndarray
    shard: np.ndarray
    index: np.ndarray


def words(seed: int, purpose: int, source: int, counter: tuple[int, int, int], count: int) -> np.ndarray:
    """uint64 [count]: raw Philox4x64-10 words; `source` is the crc32 of a source's name."""
    key = np.array([seed, purpose << 32 | source], dtype=np.uint64)
    start = np.array([0, *counter], dtype=np.uint64)
    return np.random.Philox(key=key, counter=start).random_raw(count)


def permutation(count: int, seed: int, purpose: int, source: int, counter: tuple[int, int, int]) -> np.ndarray:
    """int64 [count]: the permutation that sorts `count` random words (stable, so ties cannot depend on the machine)."""
    return np.argsort(words(seed, purpose, source, counter, count), kind="stable")


def shares(weights: Sequence[float], lanes: int) -> list[int]:
    """Whole lanes per source by largest remainder; their sum is `lanes`. A share below one lane gives 0."""
    exact = [Fraction(str(weight)) for weight in weights]  # the decimals that were written, not their binary neighbours
    ideal = [weight * lanes / sum(exact) for weight in exact]
    found = [int(share) for share in ideal]
    by_remainder = sorted(range(len(ideal)), key=lambda k: (found[k] - ideal[k], k))
    for k in by_remainder[: lanes - sum(found)]:
        found[k] += 1
    return found


def fair_layout(lanes_of: Sequence[int]) -> np.ndarray:
    """int64 [C]: the source of every lane, so that any prefix holds each source's share to less than one lane.

    Lane number i of source k may stand in [floor(i C / C_k), ceil((i + 1) C / C_k)); earliest deadline first fills all of
    these windows because the shares add up to C.
    """
    total = sum(lanes_of)
    layout = np.empty(total, dtype=np.int64)
    placed = [0] * len(lanes_of)
    waiting = [(0, k) for k in range(len(lanes_of))]  # (release, source)
    ready: list[tuple[int, int]] = []  # (deadline, source)
    for slot in range(total):
        while waiting and waiting[0][0] <= slot:
            _, k = heapq.heappop(waiting)
            heapq.heappush(ready, (-(-(placed[k] + 1) * total // lanes_of[k]), k))
        _, k = heapq.heappop(ready)
        layout[slot] = k
        placed[k] += 1
        if placed[k] < lanes_of[k]:
            heapq.heappush(waiting, (placed[k] * total // lanes_of[k], k))
    return layout


def default_window(sample_bytes: float) -> int:
    """Samples in a shuffle window: 32 MiB worth of them, a power of two in 16..1024."""
    wanted = int(WINDOW_BYTES / max(sample_bytes, 1.0))
    return min(1024, max(16, 1 << max(wanted.bit_length() - 1, 0)))


class _Row:
    """One source's order inside: place in the epoch -> (shard, index). Holds the tables of a few epochs and windows."""

    def __init__(self, source: OrderSource, seed: int, lanes: int, window: int, shuffle: bool):
        self.counts = np.ascontiguousarray(source.counts, dtype=np.int64)
        self.size = int(self.counts.sum())
        self.ends = np.cumsum(self.counts)
        self.key = zlib.crc32(source.name.encode())
        self.seed, self.lanes, self.window, self.shuffle = seed, lanes, window, shuffle
        self._rows: OrderedDict[int, tuple[np.ndarray, np.ndarray]] = OrderedDict()
        self._windows: OrderedDict[tuple[int, int, int], np.ndarray] = OrderedDict()

    def row(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(shards in the order of this epoch, where each ends in the row)."""
        if not self.shuffle:
            return np.arange(len(self.counts)), self.ends
        if epoch not in self._rows:
            order = permutation(len(self.counts), self.seed, ROW, self.key, (epoch, 0, 0))
            self._rows[epoch] = order, np.cumsum(self.counts[order])
            if len(self._rows) > 3:  # a batch on a seam needs two
                self._rows.popitem(last=False)
        self._rows.move_to_end(epoch)
        return self._rows[epoch]

    def shuffled(self, epoch: int, lane: int, window: int, length: int) -> np.ndarray:
        """The permutation of one window of one lane."""
        key = epoch, lane, window
        found = self._windows.get(key)
        if found is None:
            found = permutation(length, self.seed, WINDOW, self.key, key).astype(np.int32)
            self._windows[key] = found
            if len(self._windows) > 2 * self.lanes:  # fewer than a process's lanes would sort a window per sample
                self._windows.popitem(last=False)
        else:
            self._windows.move_to_end(key)
        return found

    def cut(self, lane: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of lanes (int64): where each starts in the row, how long it is, and the phase of its windows."""
        short, longer = divmod(self.size, self.lanes)
        phase = ((lane * PHASE) % 2**32 * self.window) >> 32 if self.window < short else np.zeros_like(lane)
        return lane * short + np.minimum(lane, longer), short + (lane < longer), phase

    def bounds(self, lane: int, window: int) -> tuple[int, int, int]:
        """(where the lane starts in the row, first place of the window in the lane, the place after its last)."""
        start, length, phase = (int(each[0]) for each in self.cut(np.array([lane], dtype=np.int64)))
        low, high = window * self.window - phase, (window + 1) * self.window - phase
        return start, max(low, 0), min(high, length)

    def place(self, p: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(epoch, shard, index) of the numbers `p` in the source."""
        epoch, y = np.divmod(p, self.size)
        i, lane = np.divmod(y, self.lanes)
        start, length, phase = self.cut(lane)
        q = start + i
        if self.shuffle:
            w = self.window
            j = (i + phase) // w
            low = np.maximum(j * w - phase, 0)
            high = np.minimum((j + 1) * w - phase, length)
            windows = self.size // self.lanes // w + 3  # no lane has more
            code = (epoch * self.lanes + lane) * windows + j
            _, first, group = np.unique(code, return_index=True, return_inverse=True)
            by_group = np.argsort(group, kind="stable")
            bounds = np.append(np.searchsorted(group[by_group], np.arange(len(first))), len(p))
            for g, at in enumerate(first):
                members = by_group[bounds[g] : bounds[g + 1]]
                inside = self.shuffled(int(epoch[at]), int(lane[at]), int(j[at]), int(high[at] - low[at]))
                q[members] = start[at] + low[at] + inside[i[members] - low[at]]
        shard, index = np.empty_like(q), np.empty_like(q)
        for e in np.unique(epoch).tolist():
            chosen = np.flatnonzero(epoch == e)
            order, ends = self.row(e)
            t = np.searchsorted(ends, q[chosen], side="right")  # right: an empty shard ends where it begins
            shard[chosen] = order[t]
            index[chosen] = q[chosen] - (ends[t] - self.counts[order[t]])
        return epoch, shard, index


class Order:
    """The order of one run.

    `lanes` must be a multiple of the global batch (over `repeats`); None takes global_batch * ceil(4096 / global_batch).
    `window` holds for sources above 4 M samples; None takes 32 MiB worth of samples. `resolved` is what a checkpoint
    recorded (`Order.resolved()`): lanes and windows are then taken from it, so that neither a new global batch nor new
    defaults move the order of a run that exists. With shuffle=False rows are read in index order.
    """

    VERSION = 1

    def __init__(self, sources: Sequence[OrderSource], *, seed: int, global_batch_size: int, lanes: int | None = None,
                 window: int | None = None, repeats: int = 1, shuffle: bool = True,
                 resolved: Mapping[str, Any] | None = None):
        self.sources = sorted(sources, key=lambda source: source.name)
        self.seed, self.repeats, self.shuffle = seed, repeats, shuffle
        _check(self.sources, seed, global_batch_size, lanes, repeats)
        names = [source.name for source in self.sources]
        if resolved is not None:
            if sorted(resolved["sources"]) != names:
                raise DataError(f"The run was started with the source(s) {', '.join(sorted(resolved['sources']))}, now "
                                f"there are {', '.join(names)}: that is another order of samples.",
                                "give the same `data.train` sources, or data.restart_order=true to begin it anew")
            self.lanes = int(resolved["lanes"])
            parts = [resolved["sources"][name] for name in names]
            self.share = [int(part["share"]) for part in parts]
            inner = [(int(part["lanes"]), int(part["window"])) for part in parts]
        else:
            self.lanes = lanes or global_batch_size * -(-4096 // global_batch_size)
            self.share = _checked_shares(self.sources, self.lanes, global_batch_size)
            inner = [_inner(source, share, window) for source, share in zip(self.sources, self.share)]
        self._inner = [_Row(source, seed, n, w, shuffle) for source, (n, w) in zip(self.sources, inner)]
        self._layout = fair_layout(self.share)
        self._before = np.empty(self.lanes, dtype=np.int64)
        for k in range(len(names)):
            mine = self._layout == k
            self._before[mine] = np.arange(self.share[k])

    @property
    def size(self) -> int:
        """Samples in all sources together."""
        return sum(row.size for row in self._inner)

    def place(self, x: np.ndarray) -> Places:
        """Where the samples with the global numbers `x` (int64, any order, any length) are."""
        x = np.asarray(x, dtype=np.int64)
        assert x.ndim == 1 and (not len(x) or x.min() >= 0)
        u, c = np.divmod(x // self.repeats, self.lanes)
        source = self._layout[c]
        epoch, shard, index = np.empty_like(x), np.empty_like(x), np.empty_like(x)
        for k in np.unique(source).tolist():
            chosen = np.flatnonzero(source == k)
            p = u[chosen] * self.share[k] + self._before[c[chosen]]
            epoch[chosen], shard[chosen], index[chosen] = self._inner[k].place(p)
        return Places(x, source, epoch, shard, index)

    def windows(self, x: np.ndarray) -> list[Window]:
        """The windows that the samples with the global numbers `x` (int64) come from, in the order of their first one."""
        u, c = np.divmod(np.asarray(x, dtype=np.int64) // self.repeats, self.lanes)
        source = self._layout[c]
        found = np.empty((len(u), 4), dtype=np.int64)
        for k in np.unique(source).tolist():
            row, chosen = self._inner[k], np.flatnonzero(source == k)
            epoch, y = np.divmod(u[chosen] * self.share[k] + self._before[c[chosen]], row.size)
            i, lane = np.divmod(y, row.lanes)
            number = (i + row.cut(lane)[2]) // row.window
            found[chosen] = np.stack([np.full_like(epoch, k), epoch, lane, number], axis=1)
        _, first = np.unique(found, axis=0, return_index=True)
        return [Window(*found[at].tolist()) for at in np.sort(first).tolist()]

    def span(self, window: Window) -> tuple[int, int]:
        """The first and the last global sample number x that come from a window."""
        row = self._inner[window.source]
        _, low, high = row.bounds(window.lane, window.number)
        lanes = np.flatnonzero(self._layout == window.source)
        ends = []
        for place in (low, high - 1):
            u, before = divmod(window.epoch * row.size + place * row.lanes + window.lane, self.share[window.source])
            ends.append((u * self.lanes + int(lanes[before])) * self.repeats)
        return ends[0], ends[1] + self.repeats - 1

    def pieces(self, window: Window) -> list[tuple[int, int, int]]:
        """[(shard, first index, last index)] of a window: what must be read for it, in row order."""
        row = self._inner[window.source]
        start, low, high = row.bounds(window.lane, window.number)
        order, ends = row.row(window.epoch)
        q, found = start + low, []
        while q < start + high:
            t = int(np.searchsorted(ends, q, side="right"))
            stop, first = min(int(ends[t]), start + high), int(ends[t] - row.counts[order[t]])
            found.append((int(order[t]), q - first, stop - first - 1))
            q = stop
        return found

    def has_windows(self, source: int) -> bool:
        """False for a source that is one plain permutation: its samples come from anywhere."""
        row = self._inner[source]
        return row.lanes > 1 or row.window < row.size

    def spare(self, x: int, source: int, attempt: int) -> tuple[int, int]:
        """(shard, index) of the sample that stands in for a bad one at x: any sample of the same source, uniformly.

        A function of (seed, x, attempt) alone; drawn from the whole source because bad samples come in clumps.
        """
        row = self._inner[source]
        q = int(words(self.seed, SPARE, row.key, (x, attempt, 0), 1)[0]) % row.size
        shard = int(np.searchsorted(row.ends, q, side="right"))
        return shard, q - int(row.ends[shard] - row.counts[shard])

    def counts(self, seen: int) -> dict[str, int]:
        """Samples of each source among the first `seen`; exact, and within one (times `repeats`) of its share."""
        full, rest = divmod(seen, self.repeats)
        u, c = divmod(full, self.lanes)
        left = np.bincount(self._layout[:c], minlength=len(self.sources))
        found = {source.name: (u * self.share[k] + int(left[k])) * self.repeats
                 for k, source in enumerate(self.sources)}
        found[self.sources[int(self._layout[c])].name] += rest
        return found

    def epochs(self, seen: int) -> dict[str, float]:
        """Epochs of each source that the first `seen` samples are."""
        counts = self.counts(seen)
        return {source.name: counts[source.name] / (row.size * self.repeats)
                for source, row in zip(self.sources, self._inner)}

    def weights(self) -> dict[str, float]:
        """The weights the run really has: whole lanes over all lanes."""
        return {source.name: share / self.lanes for source, share in zip(self.sources, self.share)}

    def resolved(self) -> dict[str, Any]:
        """What a checkpoint must record and hand back as `resolved`; plain numbers, fit for JSON."""
        parts = {source.name: {"share": share, "lanes": row.lanes, "window": row.window}
                 for source, share, row in zip(self.sources, self.share, self._inner)}
        return {"lanes": self.lanes, "sources": parts}

    def fingerprint_part(self) -> dict[str, Any]:
        """What of the order must be equal on resume; the digests of the sources' shards stand beside it."""
        return {"version": self.VERSION, "seed": self.seed, "repeats": self.repeats, "shuffle": self.shuffle,
                **self.resolved()}


def _check(sources: Sequence[OrderSource], seed: int, global_batch_size: int, lanes: int | None, repeats: int) -> None:
    problems = Problems(DataError, "The order of samples cannot be built:")
    if not sources:
        problems.add("`data.train` has no source.", "data.train=path/to/shards")
    names = [source.name for source in sources]
    keys = {zlib.crc32(name.encode()) for name in names}
    if len(keys) < len(names):
        problems.add(f"Sources are told apart by (the crc32 of) their names, and {', '.join(names)} are not all different.",
                     "give each source another `name`")
    for source in sources:
        if not int(np.sum(source.counts)):
            problems.add(f"Source `{source.name}` holds no samples ({len(source.counts)} shards).",
                         "remove it, or check its `shards`; `tubelet data info` shows what is there")
        if not source.weight > 0:
            problems.add(f"`weight` of source `{source.name}` is {source.weight}, must be above 0.",
                         "remove a source that is not wanted")
    if not 0 <= seed < 2**64:
        problems.items.append(ConfigError(f"`seed` is {seed}, must be in 0..2**64-1.", "seed=0"))
    if global_batch_size % repeats:
        problems.items.append(ConfigError(
            f"`global_batch_size` {global_batch_size} is not a multiple of `data.repeats` {repeats}.",
            f"global_batch_size={max(1, global_batch_size // repeats) * repeats}"))
    elif lanes and lanes % (global_batch_size // repeats):
        step = global_batch_size // repeats
        near = sorted({max(1, lanes // step) * step, -(-lanes // step) * step})
        what = "`global_batch_size`" if repeats == 1 else "`global_batch_size` / `data.repeats`"
        problems.items.append(ConfigError(
            f"`data.lanes` is {lanes}, must be a multiple of {what} {step}, or ranks would change lanes every batch.",
            f"data.lanes={' or '.join(map(str, near))}, or null for the default"))
    problems.raise_if_any()


def _checked_shares(sources: Sequence[OrderSource], lanes: int, global_batch_size: int) -> list[int]:
    total = sum(Fraction(str(source.weight)) for source in sources)
    problems = Problems(ConfigError, "Sources whose share of the mixture is below one lane:")
    for source in sources:
        part = Fraction(str(source.weight)) / total
        if part * lanes < 1:
            enough = -(-part.denominator // part.numerator)
            enough = -(-enough // global_batch_size) * global_batch_size
            problems.add(f"`weight` {source.weight:g} of source `{source.name}` is {float(part):.3g} of the mixture, "
                         f"below 1 / `data.lanes` = 1/{lanes}.", f"data.lanes={enough}, or a larger weight")
    problems.raise_if_any()
    return shares([source.weight for source in sources], lanes)


def _inner(source: OrderSource, share: int, window: int | None) -> tuple[int, int]:
    """(lanes, window) inside a source."""
    size = int(np.sum(source.counts))
    if size <= PLAIN_LIMIT:
        return 1, size
    return share, min(window or default_window(source.sample_bytes), size)
