"""A process per node that fetches what its ranks will read soon into the node's cache of remote shards.

A source with shuffle windows is fetched window by window, each as its one or two byte ranges, in the order of their first
sample, and a window is thrown away when a finished step has passed its last one: with lanes no node fetches what another
one does. A source that is one plain permutation needs every shard from its first batches on: its shards are fetched
whole, in the order of first need, and kept.

The fetcher looks across the seam of an epoch, since the order is arithmetic. After a resume, windows that began before
the position are not fetched: their rest is read sample by sample. Nothing depends on the fetcher; what it has not
fetched yet, or could not, readers get by range requests.
"""

from __future__ import annotations

import ctypes
import logging
import multiprocessing
import multiprocessing.sharedctypes
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data_pipelines.cache import Cache, DiskError, NoRoom, open_cache
from data_pipelines.index import SourceIndex, stamps_of
from data_pipelines.order import Order, Window
from data_pipelines.settings import CacheSettings, DataSettings
from data_pipelines.shards import is_remote
from data_pipelines.workers import _IGNORED, _watch
from tubelet.dist import World
from tubelet.errors import DataError
from tubelet.files import human_bytes

if TYPE_CHECKING:
    from data_pipelines.samples import Source

log = logging.getLogger(__name__)

_LOOK = 2**16  # samples whose places are computed at once when whole shards are put in order
_PAUSE = 0.02  # seconds between looks at the position
_REST, _LONG_REST = 1.0, 30.0  # seconds without new transfers when there is no room, and when the disk cannot be written


class Ahead:
    """The running fetcher, as the training process sees it."""

    def __init__(self, process: Any, position: Any):
        self._process, self._position = process, position

    def consumed(self, seen: int) -> None:
        """Finished steps have consumed the samples before `seen`: windows that end there may go."""
        self._position[0] = seen

    def wait(self, seconds: float) -> bool:
        """Waits until everything within `data.cache.ahead` batches was fetched or given up; False after `seconds`."""
        deadline = time.monotonic() + seconds
        while self._position[1] < self._position[0]:
            if time.monotonic() > deadline or not self._process.is_alive():
                return False
            time.sleep(0.01)
        return True

    @property
    def alive(self) -> bool:
        """False once the process has left."""
        return self._process.is_alive()

    def close(self) -> None:
        """Ends the fetcher; half a piece that it leaves is gone on with by the next one."""
        if self._process.is_alive():
            self._process.terminate()
            self._process.join(5)
            if self._process.is_alive():
                self._process.kill()
        self._process.join(5)


def start_ahead(order: Order, sources: Sequence[Source], settings: DataSettings, world: World, seen: int, *,
                global_batch_size: int) -> Ahead | None:
    """Starts the fetcher of this node at sample number `seen`; None on ranks that are not the first of their node, without
    remote shards, and without `data.cache.folder`. `sources` as `order.sources`. Ranks of a node are neighbours."""
    indexes = [source.index for source in sources]
    cache = open_cache(settings.cache, stamps_of(indexes))
    if cache is None or world.local_rank:
        return None
    share = global_batch_size // world.size
    mine = range(world.rank * share, (world.rank + world.local_size) * share)
    plan = Plan(order, indexes, settings.cache, mine, global_batch_size, seen)
    position = multiprocessing.sharedctypes.RawArray(ctypes.c_int64, [seen, -1])  # and up to where all is fetched
    process = multiprocessing.get_context("fork").Process(
        target=_run, args=(plan, cache, position, settings.io_timeout_seconds, os.getpid()), daemon=True, name="ahead")
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _IGNORED)  # blocked from its first instruction on
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    return Ahead(process, position)


@dataclass(eq=False)
class Piece:
    """One byte range of a shard to fetch; `last` is the last sample number that needs it, None when it is kept."""

    url: str
    start: int
    stop: int
    source: int
    last: int | None


@dataclass
class Plan:
    """What this node needs, in the order in which it needs it."""

    order: Order
    indexes: list[SourceIndex]
    settings: CacheSettings
    slots: range
    """Places of this node's ranks in a global batch."""
    global_batch_size: int
    begin: int
    """Position at the start."""
    kinds: dict[int, str] = field(default_factory=dict)
    """`windows` or `shards` by number of the remote sources."""

    def __post_init__(self) -> None:
        for number, index in enumerate(self.indexes):
            if not any(is_remote(info.url) for info in index.shards):
                continue
            windowed, wanted = self.order.has_windows(number), self.settings.fetch
            if wanted == "windows" and not windowed:
                log.warning("source `%s` has no shuffle windows to fetch (data.cache.fetch=windows): its samples are read "
                            "by range", index.name)
                continue
            self.kinds[number] = "windows" if windowed and wanted != "shards" else "shards"

    def batch(self, at: int, known: set[Window]) -> Iterator[Piece]:
        """Pieces that the global batch from `at` on is the first to need; `known` remembers windows."""
        for window in self.order.windows(np.arange(at + self.slots.start, at + self.slots.stop, dtype=np.int64)):
            if window in known or window.source not in self.kinds or not self.order.has_windows(window.source):
                continue
            known.add(window)
            first, last = self.order.span(window)
            whole = self.kinds[window.source] == "shards"
            if first < self.begin and not whole:
                continue  # half used: fetching it anew at every lane at once would cost a window of the whole job
            yield from self.pieces(window, None if whole else last)

    def pieces(self, window: Window, last: int | None) -> Iterator[Piece]:
        index = self.indexes[window.source]
        for shard, low, high in self.order.pieces(window):
            info = index.shards[shard]
            if not is_remote(info.url):
                continue
            if last is None:
                yield Piece(info.url, 0, info.nbytes, window.source, None)
                continue
            ends = [index.sample(shard, at).members.values() for at in (low, high)]
            start, stop = min(o for o, _ in ends[0]), max(o + n for o, n in ends[1])
            yield Piece(info.url, start, stop, window.source, last)

    def whole_shards(self) -> Iterator[Piece]:
        """Shards of plain permutations by first need, as many as the limit holds."""
        plain = {k for k, kind in self.kinds.items() if kind == "shards" and not self.order.has_windows(k)}
        if not plain:
            return
        left, size = self.settings.limit_gb * 1e9, sum(self.indexes[k].nbytes for k in plain)
        if size > left:
            log.warning("%s of shards do not fit into data.cache.limit_gb=%g: the rest is read by range each time",
                        human_bytes(size), self.settings.limit_gb)
        for source, shard in self._by_need(plain):
            info = self.indexes[source].shards[shard]
            if is_remote(info.url) and info.nbytes <= left:
                left -= info.nbytes
                yield Piece(info.url, 0, info.nbytes, source, None)

    def _by_need(self, plain: set[int]) -> Iterator[tuple[int, int]]:
        """(source, shard) in the order in which this node's samples of one epoch first need them; each once."""
        missing = {(k, shard) for k in plain for shard, count in enumerate(self.indexes[k].counts) if count}
        epoch = max(len(self.indexes[k]) / self.order.weights()[self.indexes[k].name] for k in plain) * self.order.repeats
        batches, at = max(1, _LOOK // len(self.slots)), self.begin - self.begin % self.global_batch_size
        while missing and at < self.begin + epoch:
            starts = at + np.arange(batches, dtype=np.int64) * self.global_batch_size
            x = (starts[:, None] + np.arange(self.slots.start, self.slots.stop, dtype=np.int64)).ravel()
            places = self.order.place(x)
            code = places.source << 40 | places.shard
            _, first = np.unique(code, return_index=True)
            for n in np.sort(first).tolist():
                found = int(places.source[n]), int(places.shard[n])
                if found in missing:
                    missing.remove(found)
                    yield found
            at += batches * self.global_batch_size
        yield from sorted(missing)  # this node meets them in a later epoch


class Fetcher:
    """The loop of the process: what is in use, what is under way, what waits."""

    def __init__(self, plan: Plan, cache: Cache, io_timeout_seconds: float):
        self.plan, self.cache, self.seconds = plan, cache, io_timeout_seconds
        self.at = plan.begin
        self.known: set[Window] = set()
        self.queue: deque[Piece] = deque()
        self.shards = plan.whole_shards()
        self.running: dict[Future[Path | None], Piece] = {}
        self.windows: dict[Path, int] = {}  # pieces in use or under way, and the last sample that needs each
        self.pinned: set[Path] = set()  # these and whole shards; room for a shard is made among shards only
        self.said: set[type[DataError]] = set()
        self.rest = 0.0  # no new transfers until then
        self.pool = ThreadPoolExecutor(plan.settings.connections, thread_name_prefix="ahead")

    def turn(self, seen: int) -> bool:
        """One look: drops what `seen` has passed, starts what may start. True when nothing within reach is left to do."""
        self._drop(seen)
        size = self.plan.global_batch_size
        self.at = max(self.at, seen)
        while self.at < seen + self.plan.settings.ahead * size:
            self.queue.extend(self.plan.batch(self.at, self.known))
            self.at += size
        while len(self.running) < self.plan.settings.connections and time.monotonic() >= self.rest:
            piece = self.queue.popleft() if self.queue else next(self.shards, None)
            if piece is None:
                break
            if piece.last is not None and piece.last < seen:
                continue
            path = self.cache.place(piece.url, piece.start, piece.stop)
            if piece.last is not None:
                self.windows[path] = piece.last
            self.pinned.add(path)
            task = self.pool.submit(self.cache.fetch, piece.url, piece.start, piece.stop, seconds=self.seconds,
                                    keep=self.windows if piece.last is None else self.pinned,
                                    storage=self.plan.indexes[piece.source].storage)
            self.running[task] = piece
        if self.running:
            wait(self.running, timeout=_PAUSE, return_when=FIRST_COMPLETED)
        for task in [task for task in self.running if task.done()]:
            self._finish(task, self.running.pop(task))
        return not self.running and not self.queue

    def _finish(self, task: Future[Path | None], piece: Piece) -> None:
        try:
            path = task.result()
        except DataError as error:
            if type(error) not in self.said:  # readers meet a real problem themselves, and stop the run if it lasts
                log.warning("reading ahead: %s", error)
                self.said.add(type(error))
            if isinstance(error, (NoRoom, DiskError)):
                self.rest = time.monotonic() + (_REST if isinstance(error, NoRoom) else _LONG_REST)
                if piece.last is not None:
                    self.queue.appendleft(piece)
            self._unpin(self.cache.place(piece.url, piece.start, piece.stop))
            return
        if path is None:  # another process is fetching it
            self.queue.append(piece)
            time.sleep(_PAUSE)

    def _unpin(self, path: Path) -> None:
        self.windows.pop(path, None)
        self.pinned.discard(path)

    def _drop(self, seen: int) -> None:
        for path in [path for path, last in self.windows.items() if last < seen]:
            self._unpin(path)
            self.cache.drop(path)
        if len(self.known) > 2 * len(self.windows) + 100_000:
            self.known = {window for window in self.known if self.plan.order.span(window)[1] >= seen}


def _run(plan: Plan, cache: Cache, position: Any, io_timeout_seconds: float, parent: int) -> None:
    threading.Thread(target=_watch, args=(parent,), daemon=True).start()
    fetcher = Fetcher(plan, cache, io_timeout_seconds)
    while True:
        try:
            seen = int(position[0])
            if fetcher.turn(seen):
                position[1] = seen
                time.sleep(_PAUSE)
        except DataError as error:  # an index that cannot be read: readers will say so and stop
            log.warning("reading ahead has stopped: %s", error)
            return
