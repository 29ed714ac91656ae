"""Reading safetensors files by slices, on disks and object stores alike.

Not the library's `safe_open`: that maps files into memory, so that exporting a large checkpoint counts as using all of it,
and it cannot read from a store. A slice is one `pread` into the tensor's own memory, or one ranged GET that fetches a
little more, from which the slices that follow are served. Headers are checked like a stranger's: nothing in one can make
this read outside its file or take memory beyond the file's size.
"""

from __future__ import annotations

import json
import math
import os
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tubelet.engine.checkpoint import place
from tubelet.errors import CheckpointError

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64, "I64": torch.int64,
          "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}
MAX_HEADER = 100_000_000  # bytes, as the library has it
_FIRST_READ = 64 * 1024  # of a remote file: its header, most often whole
_AHEAD = 2 * 2**20  # bytes of one GET at least; about what a store sends in the time that another request would wait
_ANOTHER = "another checkpoint of the run"
_OPEN_FILES = 32  # a checkpoint of thousands of ranks must not use up the process's file handles


@dataclass(frozen=True)
class Place:
    """Where a tensor lies: type, shape, bytes [start, stop) of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass
class File:
    """A file's header, checked, and the piece of it that was fetched last (stores only)."""

    path: Path
    tensors: dict[str, Place]
    metadata: dict[str, str]
    ahead: tuple[int, bytes] = field(default=(0, b""))


class Reader:
    """safetensors files of one folder, opened when first needed; slices are read without the rest.

    Every method raises a `CheckpointError` that names the file when it cannot be read, is damaged, or lacks the tensor.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._files: dict[str, File] = {}
        self._handles: OrderedDict[str, int] = OrderedDict()

    def __del__(self) -> None:
        for handle in self._handles.values():
            os.close(handle)

    def file(self, name: str) -> File:
        """The file's header."""
        if name not in self._files:
            path = self.folder / name
            try:
                self._files[name] = self._read_header(name, path)
            except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
                why = (error.strerror if isinstance(error, OSError) else None) or error
                raise CheckpointError(f"{path} cannot be read as safetensors ({why}).", _ANOTHER) from None
        return self._files[name]

    def names(self, file: str) -> set[str]:
        return set(self.file(file).tensors)

    def metadata(self, file: str) -> dict[str, str]:
        """What the file says of itself: `tubelet_format`, `step`."""
        return self.file(file).metadata

    def shape(self, file: str, name: str) -> tuple[int, ...]:
        return self._place(file, name).shape

    def dtype(self, file: str, name: str) -> torch.dtype:
        return self._place(file, name).dtype

    def slice(self, file: str, name: str, start: int, stop: int) -> torch.Tensor:
        """Elements [start, stop) of a one-dimensional tensor, fewer where it ends earlier."""
        found = self._place(file, name)
        if len(found.shape) != 1:
            raise CheckpointError(f"{self.folder / file}: `{name}` has shape {list(found.shape)}, not one dimension.",
                                  _ANOTHER)
        stop = max(start, min(stop, found.shape[0]))
        width = found.dtype.itemsize
        return self._tensor(file, found, found.start + start * width, found.start + stop * width, (stop - start,))

    def tensor(self, file: str, name: str) -> torch.Tensor:
        """A whole tensor in its shape."""
        found = self._place(file, name)
        return self._tensor(file, found, found.start, found.stop, found.shape)

    # --------------------------------------------------------------------------------------------- bytes

    def _place(self, file: str, name: str) -> Place:
        try:
            return self.file(file).tensors[name]
        except KeyError:
            raise CheckpointError(f"{self.folder / file} holds no tensor `{name}`.", _ANOTHER) from None

    def _tensor(self, file: str, found: Place, start: int, stop: int, shape: tuple[int, ...]) -> torch.Tensor:
        out = torch.empty(shape, dtype=found.dtype)
        if stop > start:
            try:
                self._fill(file, start, out.reshape(-1).view(torch.uint8).numpy().data)
            except OSError as error:
                raise CheckpointError(f"{self.folder / file} cannot be read ({error.strerror or error}).",
                                      _ANOTHER) from None
        return out

    def _fill(self, name: str, start: int, out: memoryview) -> None:
        """Bytes of a file from `start` on, as many as `out` has."""
        if not place.is_remote(self.folder):
            self._pread(name, start, out)
            return
        file, stop = self._files[name], start + len(out)
        begin, data = file.ahead
        if not begin <= start <= stop <= begin + len(data):
            begin, data = start, place.read(file.path, start, max(stop, start + _AHEAD))
            if len(data) < len(out):
                raise OSError(f"it ends at byte {start + len(data)}")
            file.ahead = (begin, data if len(data) <= _AHEAD else b"")  # a large slice is not read twice: let it go
        out[:] = data[start - begin : stop - begin]

    def _pread(self, name: str, start: int, out: memoryview) -> None:
        handle, done = self._handle(name), 0
        while done < len(out):
            count = os.preadv(handle, [out[done:]], start + done)
            if not count:
                raise OSError(f"it ends at byte {start + done}")
            done += count

    def _handle(self, name: str) -> int:
        if name not in self._handles:
            if len(self._handles) >= _OPEN_FILES:
                os.close(self._handles.popitem(last=False)[1])
            self._handles[name] = os.open(self.folder / name, os.O_RDONLY | os.O_CLOEXEC)
        self._handles.move_to_end(name)
        return self._handles[name]

    # --------------------------------------------------------------------------------------------- headers

    def _read_header(self, name: str, path: Path) -> File:
        remote = place.is_remote(path)
        total = place.size(path)
        if total is None:
            raise FileNotFoundError(2, "no such file")
        first = place.read(path, 0, min(total, _FIRST_READ)) if remote else self._bytes(name, 0, min(total, 8))
        length = int.from_bytes(first[:8], "little")
        if len(first) < 8 or length > min(MAX_HEADER, total - 8):
            raise ValueError(f"a header of {length} bytes in a file of {total}")
        text = first[8 : 8 + length]
        if len(text) < length:
            rest = 8 + len(text), 8 + length
            text += place.read(path, *rest) if remote else self._bytes(name, *rest)
        tensors, metadata = parse_header(text, total)
        return File(path, tensors, metadata, (0, first) if remote else (0, b""))

    def _bytes(self, name: str, start: int, stop: int) -> bytes:
        out = bytearray(stop - start)
        self._pread(name, start, memoryview(out))
        return bytes(out)


def parse_header(text: bytes, total: int) -> tuple[dict[str, Place], dict[str, str]]:
    """Tensors and metadata of a safetensors header (without its length) in a file of `total` bytes.

    Raises ValueError, KeyError or TypeError unless the tensors fill the rest of the file without gap or overlap, as the
    format demands.
    """
    header: dict[str, Any] = json.loads(text)
    if not isinstance(header, dict):
        raise ValueError("its header is not a mapping")
    metadata = header.pop("__metadata__", None) or {}
    begin, tensors = 8 + len(text), {}
    for name, entry in header.items():
        dtype, shape, (start, stop) = DTYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
        if not all(type(number) is int and number >= 0 for number in (*shape, start, stop)):
            raise ValueError(f"`{name}` has shape {list(shape)} at [{start}, {stop}]")
        if stop - start != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"`{name}` of shape {list(shape)} has {stop - start} bytes")
        tensors[name] = Place(dtype, shape, begin + start, begin + stop)
    position = begin
    for found in sorted(tensors.values(), key=lambda item: (item.start, item.stop)):
        if found.start != position:
            raise ValueError("its tensors leave a gap or overlap")
        position = found.stop
    if position != total:
        raise ValueError(f"its tensors end at byte {position}, the file at {total}")
    return tensors, {str(name): str(value) for name, value in dict(metadata).items()}
