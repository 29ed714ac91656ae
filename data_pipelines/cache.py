"""Byte ranges of remote shards on a disk of the node, shared by all ranks and workers there, and by other jobs.

    FOLDER/shards/<hash of URL and content>/<start>-<stop>         a piece: exactly these bytes of the shard
                                            <start>-<stop>.part    one that is being fetched, or was when its process died
    FOLDER/shards/lock                                             held while room is made and while a piece gets its name

A piece appears by rename, so it is whole or not there; its size is looked at again when it is opened. Whoever fetches one
holds a lock on its `.part`, hence two never fetch the same; a `.part` left behind is gone on with where it ends. Readers
need no lock: what is thrown away (the least recently used first) stays readable for those that hold it open.

Only fetchers (ahead.py) write here. A disk that is full or cannot be written is said once and reading goes on without.
"""

from __future__ import annotations

import bisect
import fcntl
import hashlib
import logging
import os
import time
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from data_pipelines.remote import Storage, read_range
from data_pipelines.settings import CacheSettings
from data_pipelines.trouble import persist
from tubelet.errors import DataError
from tubelet.files import human_bytes
from tubelet.redact import identity

log = logging.getLogger(__name__)

SWEEP_SECONDS = 86400.0  # a .part that nobody went on with for so long is thrown away
WAIT_SECONDS = 60.0  # for bytes that are on their way
_TOUCH_SECONDS = 60.0  # use is noted this often


class DiskError(DataError):
    """The cache cannot be written."""


class NoRoom(DataError):
    """All that the cache holds is in use."""


def open_cache(settings: CacheSettings, stamps: Mapping[str, str]) -> Cache | None:
    """The cache of the settings; None without a folder or without remote shards (`index.stamps_of`)."""
    if settings.folder is None or not stamps:
        return None
    return Cache(Path(settings.folder).expanduser(), int(settings.limit_gb * 1e9), stamps)


@dataclass
class _Listing:
    """Pieces of one shard as the folder was when last looked at."""

    folder: Path
    seen: int = -2
    """mtime_ns of the folder then; -1: too fresh to be sure that nothing came after the look."""
    pieces: list[tuple[int, int]] | None = None
    parts: list[tuple[int, int]] | None = None


class Cache:
    """`stamps`: what the content of each remote shard is known by, by URL; a changed shard has another folder."""

    def __init__(self, folder: Path, limit_bytes: int, stamps: Mapping[str, str]):
        self.folder, self.limit_bytes, self.stamps = Path(folder) / "shards", limit_bytes, stamps
        self._listings: OrderedDict[str, _Listing] = OrderedDict()

    # ------------------------------------------------------------------------------------------------------- reading

    def read(self, url: str, offset: int, size: int) -> bytes | None:
        """The bytes, if a piece holds them or the one that will is on its way; else None."""
        listing = self._listing(url)
        for _ in range(3):
            found = _covering(listing.pieces, offset, offset + size)
            if found is not None:
                data = self._read_piece(listing.folder / f"{found[0]}-{found[1]}", found, offset, size)
                if data is not None:
                    return data
                listing.seen = -2  # thrown away or damaged: look again
            if not self._look(listing):
                break
        coming = _covering(listing.parts, offset, offset + size)
        return None if coming is None else self._read_part(listing.folder, coming, offset, size)

    def holds(self, url: str, start: int, stop: int) -> bool:
        """True when one piece has all these bytes."""
        listing = self._listing(url)
        self._look(listing)
        return _covering(listing.pieces, start, stop) is not None

    def _listing(self, url: str) -> _Listing:
        found = self._listings.get(url)
        if found is None:
            found = self._listings[url] = _Listing(self.path(url))
            while len(self._listings) > 8192:
                self._listings.popitem(last=False)
        return found

    def place(self, url: str, start: int, stop: int) -> Path:
        """Where a piece is, or will be."""
        return self.path(url) / f"{start}-{stop}"

    def path(self, url: str) -> Path:
        """The folder of a shard's pieces."""
        text = f"{identity(url)}\n{self.stamps.get(url, '')}"
        return self.folder / hashlib.sha256(text.encode()).hexdigest()[:24]

    def _look(self, listing: _Listing) -> bool:
        """List the folder if it changed since the last look; False when it did not."""
        try:
            changed = os.stat(listing.folder).st_mtime_ns
        except OSError:
            changed = -3
        if listing.seen == changed:
            return False
        settled = time.time_ns() - changed > 50_000_000  # clocks of file systems tick in milliseconds
        pieces, parts = [], []
        with suppress(OSError):
            for name in os.listdir(listing.folder):
                bounds = _bounds(name)
                if bounds is not None:
                    (parts if name.endswith(".part") else pieces).append(bounds)
        known = listing.pieces, listing.parts
        listing.pieces, listing.parts, listing.seen = sorted(pieces), sorted(parts), changed if settled else -1
        return known != (listing.pieces, listing.parts)

    def _read_piece(self, path: Path, bounds: tuple[int, int], offset: int, size: int) -> bytes | None:
        try:  # opened each time: 10 us, and threads and forks share nothing
            handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            state = os.fstat(handle)
            if state.st_size != bounds[1] - bounds[0]:
                path.unlink(missing_ok=True)
                return None
            if abs(time.time() - state.st_mtime) > _TOUCH_SECONDS:
                with suppress(OSError):  # of another user's piece it may not be noted
                    os.utime(handle)
            data = os.pread(handle, size, offset - bounds[0])
            return data if len(data) == size else None
        except OSError:
            return None
        finally:
            os.close(handle)

    def _read_part(self, folder: Path, bounds: tuple[int, int], offset: int, size: int) -> bytes | None:
        """From a piece that somebody is fetching: as soon as it has grown far enough."""
        deadline = time.monotonic() + WAIT_SECONDS
        try:
            handle = os.open(folder / f"{bounds[0]}-{bounds[1]}.part", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return self._read_piece(folder / f"{bounds[0]}-{bounds[1]}", bounds, offset, size)  # renamed meanwhile
        try:
            while True:
                idle = _lock(handle, fcntl.LOCK_SH)
                if os.fstat(handle).st_size >= offset + size - bounds[0]:
                    data = os.pread(handle, size, offset - bounds[0])
                    return data if len(data) == size else None
                if idle or time.monotonic() > deadline:
                    return None
                time.sleep(0.005)
        except OSError:
            return None
        finally:
            os.close(handle)

    # ------------------------------------------------------------------------------------------------------- writing

    def fetch(self, url: str, start: int, stop: int, *, storage: Storage | None, seconds: float,
              keep: Collection[Path] = ()) -> Path | None:
        """Makes the bytes [start, stop) a piece, unless one has them; its path, or None when another process is at it.
        Raises `NoRoom` when there is none beside `keep` (paths in use; may change meanwhile), `DiskError` when the disk is
        the trouble, else as reading does."""
        folder = self.path(url)
        final = folder / f"{start}-{stop}"
        if final.exists():
            return final
        if self.holds(url, start, stop):
            return final
        part = folder / f"{start}-{stop}.part"
        handle = -1
        try:
            with self._locked():  # the .part that others count must be there before they look
                if not self._make_room(stop - start, keep, part):
                    raise NoRoom(f"The cache of remote shards in {self.folder} has no room for {human_bytes(stop - start)} "
                                 f"beside what is in use; its limit is {human_bytes(self.limit_bytes)}.",
                                 "data.cache.limit_gb=... for more; until then the rest is read by range requests")
                folder.mkdir(parents=True, exist_ok=True)
                handle = os.open(part, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
                if not _lock(handle, fcntl.LOCK_EX):
                    return None
            if final.exists():
                part.unlink(missing_ok=True)
                return final
            self._fill(handle, url, start, stop, storage, seconds)
            os.fdatasync(handle)  # after a power cut a piece may not be zeros of the right length
            with self._locked():  # a piece renamed while others count would be seen under neither name
                os.replace(part, final)
            return final
        except OSError as error:
            raise _disk(self.folder, error) from None
        except DiskError:
            part.unlink(missing_ok=True)
            raise
        finally:
            if handle >= 0:
                os.close(handle)

    def _fill(self, handle: int, url: str, start: int, stop: int, storage: Storage | None, seconds: float) -> None:
        size = os.fstat(handle).st_size
        if size > stop - start:
            os.ftruncate(handle, 0)
            size = 0
        written = size

        def write(chunk: bytes) -> None:
            nonlocal written
            view = memoryview(chunk)
            try:
                while view:
                    count = os.write(handle, view)
                    written += count
                    view = view[count:]
            except OSError as error:  # not the network's fault: trying again would not help
                raise _disk(self.folder, error) from None

        def attempt() -> None:
            read_range(url, start + written, stop, write, storage)
            if written != stop - start:
                raise OSError(f"got {written} of {stop - start} bytes (the file is shorter than its index says)")

        persist(attempt, url, f"{stop - start} bytes at offset {start}", seconds, progress=lambda: written)

    def drop(self, path: Path) -> None:
        """Throw a piece away; those that hold it open can go on reading it."""
        with suppress(OSError):
            path.unlink(missing_ok=True)

    def make_room(self, nbytes: int, keep: Collection[Path] = ()) -> bool:
        """Throws away what was used longest ago until `nbytes` more fit; False when `keep` and what is being fetched
        leave no room. Old leftovers go first."""
        with self._locked():
            return self._make_room(nbytes, keep)

    def _make_room(self, nbytes: int, keep: Collection[Path], own: Path | None = None) -> bool:
        found, used, now = [], 0, time.time()
        for path, state in self._files():
            bounds = _bounds(path.name)
            if bounds is None:
                continue
            size = state.st_size
            if path == own:
                continue  # counted in nbytes
            if path.suffix == ".part":
                if _is_locked(path):
                    size = bounds[1] - bounds[0]  # what it will be
                elif now - state.st_mtime > SWEEP_SECONDS and _unlink_idle(path):
                    continue
            used += size
            found.append((state.st_mtime, size, path))
        for _, size, path in sorted(found, key=lambda item: item[0]):
            if used + nbytes <= self.limit_bytes:
                break
            if path in keep or path.suffix == ".part" and not _unlink_idle(path):
                continue
            self.drop(path)
            used -= size
        return used + nbytes <= self.limit_bytes

    def _files(self) -> Iterator[tuple[Path, os.stat_result]]:
        for folder in sorted(path for path in self.folder.iterdir() if path.is_dir()):
            with suppress(OSError), os.scandir(folder) as entries:
                for entry in entries:
                    with suppress(OSError):
                        yield folder / entry.name, entry.stat()

    @contextmanager
    def _locked(self) -> Iterator[None]:
        self.folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)


def _covering(pieces: list[tuple[int, int]] | None, start: int, stop: int) -> tuple[int, int] | None:
    """A piece with all of [start, stop). Pieces of different epochs overlap, so all that begin before may do."""
    if not pieces:
        return None
    for at in range(bisect.bisect_right(pieces, (start, 1 << 62)) - 1, -1, -1):
        if pieces[at][1] >= stop:
            return pieces[at]
    return None


def _bounds(name: str) -> tuple[int, int] | None:
    first, _, last = name.removesuffix(".part").partition("-")
    return (int(first), int(last)) if first.isdigit() and last.isdigit() else None


def _lock(handle: int, kind: int) -> bool:
    try:
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False


def _is_locked(path: Path) -> bool:
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return not _lock(handle, fcntl.LOCK_SH)
    finally:
        os.close(handle)


def _unlink_idle(path: Path) -> bool:
    """Throw a .part away unless somebody is fetching it."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return True
    try:
        if not _lock(handle, fcntl.LOCK_EX):
            return False
        path.unlink(missing_ok=True)
        return True
    finally:
        os.close(handle)


def _disk(folder: Path, error: OSError) -> DiskError:
    try:
        free = os.statvfs(folder)
        room = f" ({human_bytes(free.f_bavail * free.f_frsize)} free)"
    except OSError:
        room = ""
    return DiskError(f"The cache of remote shards in {folder} cannot be written: {error.strerror or error}{room}.",
                     "data.cache.folder=FOLDER on a local disk with room, or a smaller data.cache.limit_gb; reading goes on "
                     "without the cache")
