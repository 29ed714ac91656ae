"""The format of a checkpoint, version 1: JSON and safetensors only, whatever the engine and the number of ranks.

    step-00012000/
      rank-00000.safetensors ...   flat fp32 tensors of a rank as they are: `master.<i>`, `<kind>.<i>` for each optimizer
                                   state tensor of the flat's size (exp_avg, exp_avg_sq, momentum_buffer), `ema.<i>`
      buffers.safetensors          the module's persistent buffers (BatchNorm statistics and the like)
      frozen.safetensors           full values of parameters that are not trained
      index.json                   `Index`: which slice of which parameter lies where; groups, steps
      manifest.json                what the folder holds, with sizes and SHA-256; written last: with it the checkpoint exists

An element of a parameter is found by (name, position in the flattened parameter), so a reader with another layout
computes the slices it needs and reads those. What no slot of the index covers is padding and means nothing.
Not here: writing (`save.py`), choosing among folders (`folder.py`), reading into an engine (`load.py`).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from tubelet import safe_io
from tubelet.engine.protocol import Slot
from tubelet.errors import CheckpointError, TubeletError
from tubelet.files import HashingFile

FORMAT = 1
MANIFEST, INDEX, BUFFERS, FROZEN, LATEST = ("manifest.json", "index.json", "buffers.safetensors", "frozen.safetensors",
                                            "latest")


def folder_name(step: int) -> str:
    """12000 -> step-00012000."""
    return f"step-{step:08d}"


def rank_file(rank: int) -> str:
    """3 -> rank-00003.safetensors."""
    return f"rank-{rank:05d}.safetensors"


# ------------------------------------------------------------------------------------------------- the index


@dataclass
class FlatInfo:
    """What is common to flat tensor i of all ranks."""

    group: int
    kinds: list[str]
    """Optimizer state tensors of the flat's size; empty before the first step."""
    step: float | None
    """The optimizer's own step count; None before the first step and for optimizers that keep none."""


@dataclass
class GroupInfo:
    """A parameter group: hyper-parameters, and the names of its members (groups are matched by these)."""

    hyper: dict[str, Any]
    members: list[str]


@dataclass
class Index:
    """Where every element of every trained parameter lies."""

    shapes: dict[str, tuple[int, ...]]
    """Trained parameters and their shapes."""
    frozen: dict[str, tuple[int, ...]]
    buffers: dict[str, tuple[int, ...]]
    order: list[str]
    """All of these in the order of the module's state dict."""
    optimizer: str
    ema: bool
    flats: list[FlatInfo]
    groups: list[GroupInfo]
    ranks: list[dict[int, list[Slot]]] = field(default_factory=list)
    """ranks[r][i] = slots of flat i as written in rank r's file. A replicated engine writes each flat once."""

    def to_json(self) -> str:
        number = {name: i for i, name in enumerate(self.shapes)}
        ranks = [{str(flat): [[number[s.name], s.start, s.length, s.offset] for s in slots] for flat, slots in own.items()}
                 for own in self.ranks]
        head = {"format": FORMAT, "names": list(self.shapes), "shapes": list(self.shapes.values()),
                "frozen": self.frozen, "buffers": self.buffers, "order": self.order, "optimizer": self.optimizer,
                "ema": self.ema, "flats": [asdict(flat) for flat in self.flats],
                "groups": [{"hyper": g.hyper, "members": [number[n] for n in g.members]} for g in self.groups],
                "slots": "per rank and flat: [parameter, start in it, length, offset in the flat]"}
        rows = [f' {json.dumps(key)}: {json.dumps(value)}' for key, value in head.items()]  # a line a key, a line a rank
        rows.append(' "ranks": [\n' + ",\n".join(json.dumps(own, separators=(",", ":")) for own in ranks) + "\n ]")
        return "{\n" + ",\n".join(rows) + "\n}\n"

    @classmethod
    def read(cls, folder: Path) -> Index:
        """The index of a folder. Raises `CheckpointError` when it is not one."""
        path = folder / INDEX
        try:
            data = safe_io.read_json(path)
            names = [str(name) for name in data["names"]]
            index = cls(
                shapes=dict(zip(names, map(_shape, data["shapes"]), strict=True)),
                frozen={name: _shape(shape) for name, shape in data["frozen"].items()},
                buffers={name: _shape(shape) for name, shape in data["buffers"].items()},
                order=list(data["order"]), optimizer=str(data["optimizer"]), ema=bool(data["ema"]),
                flats=[FlatInfo(int(f["group"]), [str(kind) for kind in f["kinds"]],
                                None if f["step"] is None else float(f["step"])) for f in data["flats"]],
                groups=[GroupInfo(dict(g["hyper"]), [names[i] for i in g["members"]]) for g in data["groups"]],
                ranks=[{int(flat): [Slot(names[n], int(start), int(length), int(offset))
                                    for n, start, length, offset in slots] for flat, slots in own.items()}
                       for own in data["ranks"]])
        except TubeletError as error:
            raise CheckpointError(error.problem, error.hint) from None
        except (KeyError, TypeError, ValueError, IndexError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{path} is not an index of format {FORMAT} ({type(error).__name__}: {error}).",
                                  "another checkpoint of the run") from None
        problems = index.problems()
        if problems:
            raise CheckpointError(f"{path} contradicts itself: {'; '.join(problems[:5])}.", "another checkpoint of the run")
        return index

    def pieces(self) -> dict[str, list[tuple[int, int, Slot]]]:
        """For each trained parameter its pieces by start: (rank, flat, slot)."""
        found: dict[str, list[tuple[int, int, Slot]]] = {name: [] for name in self.shapes}
        for rank, own in enumerate(self.ranks):
            for flat, slots in own.items():
                for slot in slots:
                    found[slot.name].append((rank, flat, slot))
        for pieces in found.values():
            pieces.sort(key=lambda piece: piece[2].start)
        return found

    def problems(self) -> list[str]:
        """What is wrong with it, in words: every element of every parameter must lie in exactly one place."""
        problems = []
        for name, pieces in self.pieces().items():
            position = 0
            for _, flat, slot in pieces:
                if slot.start != position or slot.length <= 0 or slot.offset < 0:
                    problems.append(f"{name}: element {min(position, slot.start)} lies in "
                                    f"{'no place' if slot.start > position else 'two places'}")
                    break
                if not 0 <= flat < len(self.flats):
                    problems.append(f"{name}: flat {flat} is not described")
                    break
                position += slot.length
            else:
                if position != math.prod(self.shapes[name]):
                    problems.append(f"{name}: {position} of {math.prod(self.shapes[name])} elements have a place")
        grouped = sorted(name for group in self.groups for name in group.members)
        if grouped != sorted(self.shapes):
            problems.append("the groups' members are not the trained parameters")
        if any(not 0 <= flat.group < len(self.groups) for flat in self.flats):
            problems.append("a flat belongs to no group")
        return problems

    def tensors(self, rank: int) -> dict[str, int]:
        """Name -> least number of elements of every tensor that must stand in a rank's file."""
        own: dict[str, int] = {}
        for flat, slots in self.ranks[rank].items():
            least = max((slot.offset + slot.length for slot in slots), default=0)
            for kind in ["master", *self.flats[flat].kinds, *["ema"] * self.ema]:
                own[f"{kind}.{flat}"] = least
        return own


def _shape(value: Any) -> tuple[int, ...]:
    shape = tuple(int(size) for size in value)
    if any(size < 0 for size in shape):
        raise ValueError(f"shape {shape}")
    return shape


# ------------------------------------------------------------------------------------------------- the manifest


def seal(content: dict[str, Any]) -> str:
    """The manifest as text, with a SHA-256 over its own content, so that damage to it is seen too."""
    content = json.loads(json.dumps(content, default=str))  # what a reader will see: tuples are lists, keys are strings
    return json.dumps({**content, "sha256": _digest(content)}, indent=1) + "\n"


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint: `format`, `step`, `samples`, `files`, `world_size`, `engine`, `versions`, `created`
    and the keys of the caller's `extra`. Raises `CheckpointError` when it is missing, damaged or of another format."""
    path = Path(folder) / MANIFEST
    if not path.exists():
        raise CheckpointError(f"{folder} has no {MANIFEST}, so it is no finished checkpoint.",
                              "a folder whose save has finished (`tubelet ckpt info` on the run lists them)")
    try:
        content = safe_io.read_json(path)
        version, recorded, files = content["format"], content.pop("sha256"), content["files"]
        if version == FORMAT and recorded != _digest(content):
            raise ValueError("its content does not agree with its own SHA-256")
        for name, entry in files.items():
            if Path(name).name != name or not isinstance(entry["bytes"], int) or not isinstance(entry["sha256"], str):
                raise ValueError(f"file entry {name!r}")
    except TubeletError as error:
        raise CheckpointError(error.problem, error.hint) from None
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged or no manifest ({type(error).__name__}: {error}).",
                              "another checkpoint of the run") from None
    if version != FORMAT:
        raise CheckpointError(f"{folder} has format {version!r}, this version of Tubelet reads format {FORMAT}.",
                              "the version of Tubelet that wrote it (see `versions` in its manifest.json)")
    return content


# ------------------------------------------------------------------------------------------------- safetensors

_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64", torch.int64: "I64",
           torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL"}
_CHUNK = 1 << 24  # elements that pass through host memory at once


@dataclass
class Entry:
    """A tensor to be written; `read` is called when its turn has come, so that only one need be in memory."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]

    @property
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


@torch.no_grad()
def write_safetensors(path: Path, entries: Iterable[Entry], metadata: dict[str, str]) -> dict[str, Any]:
    """Write and fsync a safetensors file in a stream; returns {"bytes", "sha256"} of what was written.

    Not the library's `save_file`: that wants all tensors in host memory, hashes nothing and makes files that only their
    owner can read.
    """
    entries = _ordered(entries)
    with HashingFile(path) as file:
        file.write(_header(entries, metadata))
        for item in entries:
            tensor = item.read().detach()
            assert tensor.numel() == math.prod(item.shape) and tensor.dtype == item.dtype, item.name
            for part in tensor.reshape(-1).split(_CHUNK) if tensor.numel() else ():
                file.write(part.cpu().contiguous().view(torch.uint8).numpy().data)
    return {"bytes": file.nbytes, "sha256": file.sha256}


class Reader:
    """safetensors files of one folder, opened when first needed; slices are read without the rest."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._open: dict[str, Any] = {}

    def file(self, name: str) -> Any:
        """The open file; raises `CheckpointError` naming it when it cannot be read."""
        if name not in self._open:
            from safetensors import SafetensorError, safe_open

            path = self.folder / name
            try:
                self._open[name] = safe_open(str(path), framework="pt")
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{path} cannot be read as safetensors ({error}).",
                                      "another checkpoint of the run") from None
        return self._open[name]

    def names(self, file: str) -> set[str]:
        return set(self.file(file).keys())

    def shape(self, file: str, name: str) -> tuple[int, ...]:
        return tuple(self.file(file).get_slice(name).get_shape())

    def slice(self, file: str, name: str, start: int, stop: int) -> torch.Tensor:
        """Elements [start, stop) of a one-dimensional tensor."""
        return self.file(file).get_slice(name)[start:stop]

    def tensor(self, file: str, name: str) -> torch.Tensor:
        return self.file(file).get_tensor(name)
