"""Bytes of a sample by (URL, offset, size): local files with `pread`, anything else by range request through fsspec.

A read either gives exactly the bytes that the index promises or fails; it is tried again with growing pauses until
`data.io_timeout_seconds` have passed, then it is a `DataError`. Content is never judged here: trouble with storage must
not make a sample "bad", or the order of samples would depend on the weather.

Shards stay open in a list of the most recently used: a one-node job on a large data set has hundreds open per rank.
"""

from __future__ import annotations

import logging
import os
import random
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

from tubelet.errors import DataError

log = logging.getLogger(__name__)

_GAP = 64 * 1024  # members of a sample that lie closer than this are read in one go: a request costs more than bytes
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 20.0  # seconds


class Reader:
    """Reads from many shards; one per process (made after the fork, or before: descriptors and clients stay apart)."""

    def __init__(self, io_timeout_seconds: float, *, sleep: Callable[[float], None] = time.sleep,
                 clock: Callable[[], float] = time.monotonic):
        self.io_timeout_seconds = io_timeout_seconds
        self._sleep, self._clock = sleep, clock
        self._open: OrderedDict[str, int] = OrderedDict()
        self._most_open = 0  # found out at the first open
        self._clients: dict[tuple[int, str], tuple[Any, str]] = {}
        self._jitter = random.Random()  # of its own: nothing here may touch the global generators

    def read(self, url: str, offset: int, size: int) -> bytes:
        """Exactly `size` bytes from `offset` on. Raises `DataError` once the time for retries is over."""
        deadline, pause, tries = self._clock() + self.io_timeout_seconds, _FIRST_PAUSE, 0
        while True:
            tries += 1
            try:
                return self._read_once(url, offset, size)
            except (DataError, KeyboardInterrupt, MemoryError):
                raise
            except Exception as error:  # storage clients raise many kinds: OSError, aiohttp, botocore, ...
                self._forget(url)
                if self._clock() >= deadline:
                    raise DataError(
                        f"Reading {url} failed for {self.io_timeout_seconds:g} s ({tries} times): {size} bytes at offset "
                        f"{offset}: {type(error).__name__}: {error}.",
                        "check that the shard is there and readable from this node (`tubelet data verify`); a run that "
                        "is started again goes on where it stopped; data.io_timeout_seconds=... waits longer") from None
                if tries == 1:
                    log.warning("reading %s at %d failed (%s: %s); trying again for up to %g s", url, offset,
                                type(error).__name__, error, self.io_timeout_seconds)
                # Jitter, so that a thousand readers do not come back at once.
                self._sleep(min(pause * self._jitter.uniform(0.5, 1.5), max(deadline - self._clock(), 0.0)))
                pause = min(pause * 2, _LONGEST_PAUSE)

    def read_members(self, url: str, members: Mapping[str, tuple[int, int]]) -> dict[str, bytes]:
        """Several members {name: (offset, size)} of one shard; neighbours in one read."""
        found: dict[str, bytes] = {}
        for run in _runs(members):
            start = members[run[0]][0]
            stop = max(members[name][0] + members[name][1] for name in run)
            block = self.read(url, start, stop - start)
            for name in run:
                offset, size = members[name]
                found[name] = block[offset - start:offset - start + size]
        return found

    def close(self) -> None:
        """Close every descriptor."""
        for handle in self._open.values():
            os.close(handle)
        self._open.clear()
        self._clients.clear()

    def _read_once(self, url: str, offset: int, size: int) -> bytes:
        path = local_path(url)
        data = self._read_remote(url, offset, size) if path is None else _pread(self._handle(path), offset, size)
        if len(data) != size:
            short = "the file is shorter than its index says" if len(data) < size else "range requests are not honoured"
            raise OSError(f"got {len(data)} of {size} bytes ({short})")
        return data

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

    def _forget(self, url: str) -> None:
        handle = self._open.pop(local_path(url) or "", None)  # a stale handle (NFS) never recovers; a new one may
        if handle is not None:
            os.close(handle)

    def _read_remote(self, url: str, offset: int, size: int) -> bytes:
        # A client made before a fork would share its sockets and event loop with the parent: hence the process id.
        key = (os.getpid(), url)
        if key not in self._clients:
            self._clients[key] = filesystem(url)
        fs, path = self._clients[key]
        return fs.cat_file(path, start=offset, end=offset + size)


def filesystem(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL, and the path in it. Raises `DataError` when its package is not installed."""
    from fsspec.core import url_to_fs

    try:
        return url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise DataError(f"{url} cannot be read: {error}.",
                        "install the fsspec package of this kind of storage (s3fs, gcsfs, adlfs, huggingface_hub, "
                        "aiohttp for http), or copy the shards to a local disk") from None


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


def _runs(members: Mapping[str, tuple[int, int]]) -> list[list[str]]:
    """Member names by offset, those close together in one list."""
    runs: list[list[str]] = []
    reached = 0
    for name in sorted(members, key=lambda name: members[name]):
        offset, size = members[name]
        if runs and offset - reached <= _GAP:
            runs[-1].append(name)
        else:
            runs.append([name])
        reached = max(reached, offset + size)
    return runs
