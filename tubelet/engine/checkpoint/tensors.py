"""safetensors files, written in a stream and hashed on the way. Reading them is in `reader.py`."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from tubelet import faults
from tubelet.files import HashingFile

_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64", torch.int64: "I64",
           torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL"}
_CHUNK = 1 << 24  # bytes that pass through host memory at once


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


def _ordered(entries: Iterable[Entry]) -> list[Entry]:
    return sorted(entries, key=lambda item: -item.dtype.itemsize)  # so that every tensor is aligned for its type


def _header(entries: list[Entry], metadata: dict[str, str]) -> bytes:
    header: dict[str, Any] = {"__metadata__": metadata}
    place = 0
    for item in entries:
        header[item.name] = {"dtype": _DTYPES[item.dtype], "shape": list(item.shape),
                             "data_offsets": [place, place + item.nbytes]}
        place += item.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def safetensors_bytes(entries: Iterable[Entry], metadata: dict[str, str]) -> int:
    """Size of the file `write_safetensors` would write."""
    entries = _ordered(entries)
    return len(_header(entries, metadata)) + sum(item.nbytes for item in entries)


def image(entries: Iterable[Entry], metadata: dict[str, str]) -> tuple[bytes, list[tuple[Entry, int]], int]:
    """The same file as a plan: (header, [(entry, where its bytes begin in the file)], size of the file)."""
    entries = _ordered(entries)
    header = _header(entries, metadata)
    places, place = [], len(header)
    for item in entries:
        places.append((item, place))
        place += item.nbytes
    return header, places, place


def write_safetensors(path: Path, entries: Iterable[Entry], metadata: dict[str, str]) -> dict[str, Any]:
    """Write and fsync a safetensors file in a stream; returns {"bytes", "sha256"} of what was written.

    Tensors on the CPU are written from where they lie, so they must not change meanwhile. Not the library's `save_file`:
    that wants all tensors in host memory, hashes nothing and makes files that only their owner can read.
    """
    return write_image(path, *image(entries, metadata))


@torch.no_grad()
def write_image(path: Path, header: bytes, places: list[tuple[Entry, int]], size: int,
                point: str | None = None) -> dict[str, Any]:
    """`write_safetensors` of a plan that `image` made. `point` names a fault point that is passed when half of the bytes
    are written."""
    with HashingFile(path) as file:
        file.write(header)
        for item, _ in places:
            tensor = item.read().detach()
            assert tensor.numel() == math.prod(item.shape) and tensor.dtype == item.dtype, item.name
            for part in tensor.reshape(-1).split(_CHUNK // item.dtype.itemsize) if tensor.numel() else ():
                data = part.cpu().contiguous().view(torch.uint8).numpy().data
                if point and file.nbytes + len(data) >= size // 2:
                    faults.point(point)
                    point = None
                file.write(data)
    return {"bytes": file.nbytes, "sha256": file.sha256}
