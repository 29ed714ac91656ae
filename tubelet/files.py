"""Files that are either whole or not there: atomic writing, fsync, hashes, exclusive creation, JSON lines."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import json
import os
import queue
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

_WORTH_A_THREAD = 1 << 20  # bytes of one piece from which on it is hashed beside the writing
_PIECES_AHEAD = 4  # pieces that may wait for their hash: what a writer keeps alive beside the one it makes
_BEGIN_WRITING = 1 << 23  # bytes after which the disk may begin


def fsync_dir(path: str | Path) -> None:
    """Make the names in a folder durable (a rename is not, until its folder is synced)."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomic(path: str | Path, content: bytes | str) -> None:
    """Write beside, fsync, rename over: a reader sees the old file or the new one, never a part."""
    path = Path(path)
    data = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f"{path.name}.tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    fsync_dir(path.parent)


def write_json(path: str | Path, value: Any) -> None:
    """`value` as indented JSON, atomically."""
    write_atomic(path, json.dumps(value, indent=1, sort_keys=False, default=str) + "\n")


def create_exclusive(path: str | Path, content: str) -> bool:
    """Create `path` with `content` unless it exists; of many callers exactly one gets True."""
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    except FileExistsError:
        return False
    with os.fdopen(handle, "w") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    fsync_dir(Path(path).parent)
    return True


def append_jsonl(path: str | Path, rows: Iterable[dict[str, Any]]) -> None:
    """Append rows to a JSON-lines file; each row is one write, so a kill leaves at most one cut line at the end."""
    with open(path, "a") as file:
        for row in rows:
            file.write(json.dumps(row, default=str) + "\n")


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file; a missing file is empty. A line that a kill has cut, or that is no mapping, is left
    out: the next start writes on behind it."""
    try:
        return parse_jsonl(Path(path).read_text(errors="replace"))
    except FileNotFoundError:
        return []


def parse_jsonl(text: str | bytes) -> list[dict[str, Any]]:
    """The rows of some lines of a JSON-lines file; what is no mapping, or was cut, is left out."""
    rows = []
    for line in text.splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def keep_jsonl(path: str | Path, limit: int, key: str = "step") -> None:
    """Drop rows whose `key` is above `limit`: what a killed attempt wrote after the checkpoint that is resumed."""
    rows = read_jsonl(path)
    if rows:
        write_atomic(path, "".join(json.dumps(row) + "\n" for row in rows if row.get(key, 0) <= limit))


def sha256_file(path: str | Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class HashingFile:
    """A binary file for writing that hashes what goes through it and is durable when closed.

    `with HashingFile(path) as file: file.write(...)` then `file.sha256`, `file.nbytes`. Large pieces are hashed by a second
    thread while this one writes, so they must not change before the file is closed. The kernel is asked to begin writing
    early, so that the fsync at the end finds little left. `exclusive`: a file of that name must not be there yet, or it is
    a FileExistsError. A `UPath` on an object store is written through its own `open`: there the object exists once it is
    closed, and not at all after an error; it replaces one that is there.
    """

    def __init__(self, path: str | Path, *, exclusive: bool = False):
        self.remote = hasattr(path, "storage_options")
        mode = "xb" if exclusive else "wb"
        self.file: Any = path.open("wb") if self.remote else open(path, mode)  # type: ignore[union-attr]
        self._digest = hashlib.sha256()
        self._pieces: queue.Queue[Any] = queue.Queue(_PIECES_AHEAD)
        self._thread: threading.Thread | None = None
        self._begun = 0  # bytes that the kernel was told to write
        self.nbytes = 0

    def write(self, data: bytes | memoryview) -> int:
        count = memoryview(data).nbytes
        if self._thread is None and count >= _WORTH_A_THREAD:
            self._thread = threading.Thread(target=self._hash, name="hash", daemon=True)
            self._thread.start()
        if self._thread is None:
            self._digest.update(data)
        else:
            self._pieces.put(data)
        self.file.write(data)
        self.nbytes += count
        if not self.remote and self.nbytes - self._begun >= _BEGIN_WRITING:
            begin_writing(self.file.fileno(), self._begun, self.nbytes - self._begun)
            self._begun = self.nbytes
        return count

    def _hash(self) -> None:
        while (data := self._pieces.get()) is not None:
            self._digest.update(data)

    def _hashed(self) -> None:
        if self._thread is not None:
            self._pieces.put(None)
            self._thread.join()
            self._thread = None

    @property
    def sha256(self) -> str:
        self._hashed()
        return self._digest.hexdigest()

    def __enter__(self) -> HashingFile:
        return self

    def __exit__(self, *exc: object) -> None:
        try:
            if exc[0] is not None and self.remote:
                _forget_upload(self.file)
            elif exc[0] is None and not self.remote:
                self.file.flush()
                os.fsync(self.file.fileno())
        finally:
            self._hashed()
            self.file.close()


def _forget_upload(file: Any) -> None:
    """Give up a half-written object: closing it would publish what is there."""
    try:
        file.discard()
    except Exception:
        pass  # a store that writes at closing time only, or one that does not answer
    finally:
        file.closed = True  # or the garbage collector would close it


def begin_writing(handle: int, start: int, count: int) -> None:
    """Ask the kernel to begin writing these bytes of an open file to the disk, and go on (Linux; elsewhere nothing)."""
    try:
        call = _libc().sync_file_range
    except AttributeError:
        return
    call(ctypes.c_int(handle), ctypes.c_int64(start), ctypes.c_int64(count), ctypes.c_uint(2))  # SYNC_FILE_RANGE_WRITE


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


def human_bytes(count: float) -> str:
    """1536 -> '1.5 KiB'."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(count) < 1024 or unit == "TiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError
