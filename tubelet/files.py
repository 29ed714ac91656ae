"""Files that are either whole or not there: atomic writing, fsync, hashes, exclusive creation, JSON lines."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any


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
    """The rows of a JSON-lines file; a last line cut short by a kill is dropped, a missing file is empty."""
    try:
        lines = Path(path).read_text().splitlines()
    except FileNotFoundError:
        return []
    rows = []
    for number, line in enumerate(lines):
        try:
            rows.append(json.loads(line))
        except ValueError:
            if number != len(lines) - 1:
                continue  # a line cut by an earlier kill, written over by the next attempt
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
    """A binary file for writing that hashes what goes through it and is fsynced when closed.

    `with HashingFile(path) as file: file.write(...)` then `file.sha256`, `file.nbytes`.
    """

    def __init__(self, path: str | Path):
        self.file = open(path, "wb")
        self._digest = hashlib.sha256()
        self.nbytes = 0

    def write(self, data: bytes | memoryview) -> int:
        self._digest.update(data)
        self.nbytes += memoryview(data).nbytes
        return self.file.write(data)

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()

    def __enter__(self) -> HashingFile:
        return self

    def __exit__(self, *exc: object) -> None:
        try:
            if exc[0] is None:
                self.file.flush()
                os.fsync(self.file.fileno())
        finally:
            self.file.close()


def human_bytes(count: float) -> str:
    """1536 -> '1.5 KiB'."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(count) < 1024 or unit == "TiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError
