"""`index.json`: which slice of which parameter lies where in the files of all ranks, groups and step counts."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tubelet import safe_io
from tubelet.engine.checkpoint.format import FORMAT, INDEX
from tubelet.engine.protocol import Slot
from tubelet.errors import CheckpointError, TubeletError


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
