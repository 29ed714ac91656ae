"""safetensors files, written in a stream and hashed on the way. Reading them is in `reader.py`."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

import torch

from tubelet import faults
from tubelet.files import HashingFile

_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64", torch.int64: "I64",
           torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL"}
_CHUNK = 1 << 24  # bytes that pass through host memory at once
_SMALL = 1 << 20  # bytes below which neighbours are joined


@dataclass
class Entry:
    """A tensor to be written; `read` is called when its turn has come, so that only one need be in memory."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]

    @cached_property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def entry(name: str, tensor: torch.Tensor, *, flat: bool = False) -> Entry:
    """An entry for a tensor that is already there; `flat` writes it as one dimension."""
    shape = (tensor.numel(),) if flat else tuple(tensor.shape)
    return Entry(name, tensor.dtype, shape, lambda: tensor)


class Plan:
    """A safetensors file of `entries` but for its metadata, worked out once for any number of saves."""

    def __init__(self, entries: Iterable[Entry]):
        self.entries = sorted(entries, key=lambda item: -item.dtype.itemsize)  # so that each is aligned for its type
        self._starts = list(accumulate((item.nbytes for item in self.entries), initial=0))
        rows = {item.name: {"dtype": _DTYPES[item.dtype], "shape": list(item.shape),
                            "data_offsets": [start, start + item.nbytes]} for item, start in zip(self.entries, self._starts)}
        self._rows = json.dumps(rows, separators=(",", ":"))[1:]
        self.nbytes = self._starts[-1]

    def image(self, metadata: dict[str, str]) -> tuple[bytes, list[tuple[Entry, int]], int]:
        """(header, [(entry, where its bytes begin in the file)], size of the file)."""
        text = f'{{"__metadata__":{json.dumps(metadata, separators=(",", ":"))}'
        data = f"{text}{',' * bool(self.entries)}{self._rows}".encode()
        data += b" " * (-len(data) % 8)
        header = len(data).to_bytes(8, "little") + data
        return header, [(item, len(header) + start) for item, start in zip(self.entries, self._starts)], (
            len(header) + self._starts[-1])


def image(entries: Iterable[Entry], metadata: dict[str, str]) -> tuple[bytes, list[tuple[Entry, int]], int]:
    """The file that `write_safetensors` would write, as a plan: see `Plan.image`."""
    return Plan(entries).image(metadata)


def write_safetensors(path: Path, entries: Iterable[Entry], metadata: dict[str, str]) -> dict[str, Any]:
    """Write and fsync a safetensors file in a stream; returns {"bytes", "sha256"} of what was written.

    Tensors on the CPU are written from where they lie, so they must not change meanwhile. Not the library's `save_file`:
    that wants all tensors in host memory, hashes nothing and makes files that only their owner can read.
    """
    return write_image(path, *image(entries, metadata))


@torch.no_grad()
def write_image(path: Path, header: bytes, places: list[tuple[Entry, int]], size: int, point: str | None = None,
                check: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """`write_safetensors` of a plan that `image` made. `point` names a fault point that is passed when half of the bytes
    are written. `check` may raise; it is called before the file is made, and in an object store before the object is."""
    check()
    with HashingFile(path, exclusive=True) as file:
        for data in _joined(chain([memoryview(header)], _pieces(places))):
            if point and file.nbytes + len(data) >= size // 2:
                faults.point(point)
                point = None
            file.write(data)
        if file.remote:
            check()
    return {"bytes": file.nbytes, "sha256": file.sha256}


def _pieces(places: list[tuple[Entry, int]]) -> Iterator[memoryview]:
    for item, _ in places:
        tensor = item.read().detach()
        assert tensor.numel() == math.prod(item.shape) and tensor.dtype == item.dtype, item.name
        for part in tensor.reshape(-1).split(_CHUNK // item.dtype.itemsize) if tensor.numel() else ():
            yield part.cpu().contiguous().view(torch.uint8).numpy().data


def _joined(pieces: Iterable[memoryview]) -> Iterator[memoryview | bytes]:
    """The same bytes, small neighbours as one: each piece costs a call of the kernel and a hand-over to the hashing thread,
    which a model's hundreds of biases are not worth."""
    waiting: list[memoryview] = []
    count = 0
    for piece in pieces:
        if len(piece) < _SMALL:
            waiting.append(piece)
            count += len(piece)
        if waiting and (len(piece) >= _SMALL or count >= _SMALL):
            yield b"".join(waiting)
            waiting, count = [], 0
        if len(piece) >= _SMALL:
            yield piece
    if waiting:
        yield b"".join(waiting)
