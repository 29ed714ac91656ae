"""Bytes of a sample by (URL, offset, size): local files with `pread`, anything else from the node's cache (cache.py) or by
range request (remote.py).

A read either gives exactly the bytes that the index promises or fails; it is tried again with growing pauses until
`data.io_timeout_seconds` have passed without progress, then it is a `DataError`. Content is never judged here: trouble
with storage must not make a sample "bad", or the order of samples would depend on the weather.

Shards stay open in a list of the most recently used: a one-node job on a large data set has hundreds open per rank.
"""

from __future__ import annotations

import os
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from data_pipelines.remote import Storage, filesystem, read_range
from data_pipelines.shards import folder_of
from data_pipelines.trouble import persist

if TYPE_CHECKING:
    from data_pipelines.cache import Cache

__all__ = ["Reader", "filesystem", "local_path", "raise_open_files"]

_GAP = 64 * 1024  # members of a sample that lie closer than this are read in one go: a request costs more than bytes


class Reader:
    """Reads from many shards; one per process (made after the fork, or before: descriptors and clients stay apart).

    `storage`: options of the file systems of remote shards, by the folder of their URLs (`index.storage_of`). `cache` is
    looked into before anything is asked of the network. `connections`: transfers at the same time in `read_many`.
    """

    def __init__(self, io_timeout_seconds: float, *, storage: Mapping[str, Storage] | None = None,
                 cache: Cache | None = None, connections: int = 8, sleep: Callable[[float], None] = time.sleep,
                 clock: Callable[[], float] = time.monotonic):
        self.io_timeout_seconds, self.connections = io_timeout_seconds, connections
        self.storage, self.cache = storage or {}, cache
        self._sleep, self._clock = sleep, clock
        self._open: OrderedDict[str, int] = OrderedDict()
        self._most_open = 0  # found out at the first open
        self._threads: tuple[int, ThreadPoolExecutor] | None = None  # and the process they belong to

    def read(self, url: str, offset: int, size: int) -> bytes:
        """Exactly `size` bytes from `offset` on. Raises `DataError` once the time for retries is over, or at once for what
        no patience heals (403, 404)."""
        path = local_path(url)
        if path is not None:
            return persist(lambda: self._read_local(path, offset, size), url, f"{size} bytes at offset {offset}",
                           self.io_timeout_seconds, sleep=self._sleep, clock=self._clock)
        if self.cache is not None and (found := self.cache.read(url, offset, size)) is not None:
            return found
        return self._read_remote(url, offset, size)

    def read_members(self, url: str, members: Mapping[str, tuple[int, int]]) -> dict[str, bytes]:
        """Several members {name: (offset, size)} of one shard; neighbours in one read."""
        names = list(members)
        return dict(zip(names, self.read_many([(url, *members[name]) for name in names])))

    def read_many(self, requests: Sequence[tuple[str, int, int]]) -> list[bytes]:
        """The bytes of many (url, offset, size), in their order: neighbours of one shard in one read, remote ones at the
        same time. Raises as `read`."""
        found: dict[int, bytes] = {}
        if self.cache is not None:  # one by one: neighbours may lie in two pieces
            for number, (url, offset, size) in enumerate(requests):
                if local_path(url) is None and (data := self.cache.read(url, offset, size)) is not None:
                    found[number] = data
        runs = _runs(requests, [number for number in range(len(requests)) if number not in found])
        remote = [run for run in runs if local_path(requests[run[0]][0]) is None]
        if len(remote) > 1 and self.connections > 1:
            for run, parts in zip(remote, self._pool().map(lambda run: self._read_run(requests, run), remote)):
                found |= zip(run, parts)
            runs = [run for run in runs if run[0] not in found]
        for run in runs:
            found |= zip(run, self._read_run(requests, run))
        return [found[number] for number in range(len(requests))]

    def close(self) -> None:
        """Close every descriptor, end the threads."""
        for handle in self._open.values():
            os.close(handle)
        self._open.clear()
        if self._threads is not None and self._threads[0] == os.getpid():
            self._threads[1].shutdown(wait=False, cancel_futures=True)
        self._threads = None

    def _read_run(self, requests: Sequence[tuple[str, int, int]], run: list[int]) -> list[bytes]:
        """Neighbours of one shard."""
        url, start, _ = requests[run[0]]
        stop = max(requests[number][1] + requests[number][2] for number in run)
        block = self.read(url, start, stop - start)
        if len(run) == 1:
            return [block]
        return [block[offset - start:offset - start + size] for _, offset, size in (requests[number] for number in run)]

    def _pool(self) -> ThreadPoolExecutor:
        if self._threads is None or self._threads[0] != os.getpid():  # threads do not survive a fork
            self._threads = os.getpid(), ThreadPoolExecutor(self.connections, thread_name_prefix="read")
        return self._threads[1]

    def _read_local(self, path: str, offset: int, size: int) -> bytes:
        try:
            return _whole(_pread(self._handle(path), offset, size), size)
        except OSError:
            self._forget(path)
            raise

    def _read_remote(self, url: str, offset: int, size: int) -> bytes:
        got = bytearray()  # survives a broken transfer, which goes on where it stopped

        def attempt() -> bytes:
            read_range(url, offset + len(got), offset + size, got.extend, self.storage.get(folder_of(url)))
            return _whole(bytes(got), size)

        return persist(attempt, url, f"{size} bytes at offset {offset}", self.io_timeout_seconds,
                       progress=lambda: len(got), sleep=self._sleep, clock=self._clock)

    def _handle(self, path: str) -> int:
        handle = self._open.get(path)
        if handle is not None:
            self._open.move_to_end(path)
            return handle
        self._most_open = self._most_open or raise_open_files()
        while len(self._open) >= self._most_open:
            os.close(self._open.popitem(last=False)[1])
        handle = self._open[path] = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        return handle

    def _forget(self, path: str) -> None:
        handle = self._open.pop(path, None)  # a stale handle (NFS) never recovers; a new one may
        if handle is not None:
            os.close(handle)


def local_path(url: str) -> str | None:
    """The path of a local shard; None for a remote one."""
    if url.startswith("file://"):
        return url.removeprefix("file://")
    return None if "://" in url else url


def raise_open_files() -> int:
    """Raise this process's soft limit of open files to its hard one, and say how many shards may stay open."""
    try:
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = min(hard, 65_536) if hard != resource.RLIM_INFINITY else 65_536
        if soft < wanted:
            try:
                resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
                soft = wanted
            except (ValueError, OSError):
                pass  # some containers forbid it: fewer shards stay open then
    except ImportError:  # not a POSIX system
        soft = 256
    return max(8, min(soft // 2, 16_384))


def _pread(handle: int, offset: int, size: int) -> bytes:
    data = os.pread(handle, size, offset)
    while 0 < len(data) < size:  # interrupted, or above the kernel's 2 GiB per call
        more = os.pread(handle, size - len(data), offset + len(data))
        if not more:
            break
        data += more
    return data


def _whole(data: bytes, size: int) -> bytes:
    if len(data) != size:
        short = "the file is shorter than its index says" if len(data) < size else "range requests are not honoured"
        raise OSError(f"got {len(data)} of {size} bytes ({short})")
    return data


def _runs(requests: Sequence[tuple[str, int, int]], chosen: Sequence[int]) -> list[list[int]]:
    """The chosen requests' numbers by shard and offset, those close together in one list."""
    runs: list[list[int]] = []
    reached, last = 0, None
    for number in sorted(chosen, key=requests.__getitem__):
        url, offset, size = requests[number]
        if runs and url == last and offset - reached <= _GAP:
            runs[-1].append(number)
            reached = max(reached, offset + size)
        else:
            runs.append([number])
            reached, last = offset + size, url
    return runs
