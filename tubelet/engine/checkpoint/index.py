"""`index.json`: by which rule the parameters lie in the files of all ranks, groups and step counts.

Format 2 holds the rule (`tubelet/engine/layout.py`); format 1 listed every slot of every rank and is still read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tubelet.engine.checkpoint import place
from tubelet.engine.checkpoint.format import FORMAT, INDEX
from tubelet.engine.layout import Layout, Listed, from_json
from tubelet.errors import CheckpointError

_STATE_DTYPES = {"float64", "float16", "bfloat16"}


@dataclass
class FlatInfo:
    """What is common to flat tensor i of all ranks."""

    group: int
    kinds: list[str]
    """Optimizer state tensors of the flat's size; empty before the first step."""
    step: float | int | None
    """The optimizer's own step count, an int if it keeps it as such (most keep a tensor); None before the first step and
    for optimizers that keep none."""
    shaped: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Optimizer state of another shape than the flat's (Adafactor's rows and columns): kind -> shape. Only where the flat
    is one whole parameter."""
    dtypes: dict[str, str] = field(default_factory=dict)
    """torch's names of the types of those kinds that are not float32, such as "bfloat16"."""


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
    layout: Layout

    @property
    def num_ranks(self) -> int:
        """How many ranks wrote files."""
        return self.layout.num_ranks

    def to_json(self, known: dict[str, str] | None = None) -> str:
        """The text of `index.json`. `known`: rows of an earlier text that have not changed since; those that are not in it
        are made and put into it."""
        known, number = {} if known is None else known, {name: i for i, name in enumerate(self.shapes)}
        rows: dict[str, Callable[[], Any]] = {
            "format": lambda: FORMAT, "names": lambda: list(self.shapes), "shapes": lambda: list(self.shapes.values()),
            "frozen": lambda: self.frozen, "buffers": lambda: self.buffers,
            "order": lambda: [number.get(name, name) for name in self.order], "optimizer": lambda: self.optimizer,
            "ema": lambda: self.ema,
            "groups": lambda: [{"hyper": g.hyper, "members": [number[n] for n in g.members]} for g in self.groups],
            "flats": lambda: [{key: value for key, value in vars(flat).items() if key not in ("shaped", "dtypes") or value}
                              for flat in self.flats],
            "layout": lambda: self.layout.to_json(number)}
        for key, make in rows.items():
            if key not in known:
                known[key] = f' {json.dumps(key)}: {json.dumps(make(), separators=(",", ":"))}'
        return "{\n" + ",\n".join(known[key] for key in rows) + "\n}\n"

    @classmethod
    def read(cls, folder: Path) -> Index:
        """The index of a folder. Raises `CheckpointError` when it is not one."""
        try:
            return cls.parse(folder / INDEX, place.read(folder / INDEX))
        except OSError as error:
            raise CheckpointError(f"{folder / INDEX} cannot be read: {error.strerror or error}.",
                                  "another checkpoint of the run") from None

    @classmethod
    def parse(cls, path: Path, text: bytes) -> Index:
        """The index in a file's bytes; `path` is for errors. Raises `CheckpointError` when it is not one."""
        try:
            index = cls.from_json(json.loads(text))
        except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError, RecursionError) as error:
            raise CheckpointError(f"{path} is not an index of format 1 to {FORMAT} ({type(error).__name__}: {error}).",
                                  "another checkpoint of the run") from None
        problems = index.problems()
        if problems:
            raise CheckpointError(f"{path} contradicts itself: {'; '.join(problems[:5])}.", "another checkpoint of the run")
        return index

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Index:
        """Of parsed JSON, format 1 or 2; raises the ordinary errors of Python when it is neither."""
        names = [str(name) for name in data["names"]]
        shapes = dict(zip(names, map(_shape, data["shapes"]), strict=True))
        if len(shapes) != len(names):
            raise ValueError("a parameter is named twice")
        flats = [_flat_info(flat) for flat in data["flats"]]
        rule = {"rule": Listed.rule, "slots": data["ranks"]} if data["format"] == 1 else data["layout"]
        return cls(
            shapes=shapes, frozen={name: _shape(shape) for name, shape in data["frozen"].items()},
            buffers={name: _shape(shape) for name, shape in data["buffers"].items()},
            order=[names[key] if isinstance(key, int) else str(key) for key in data["order"]],
            optimizer=str(data["optimizer"]), ema=bool(data["ema"]), flats=flats,
            groups=[GroupInfo(dict(g["hyper"]), [names[i] for i in g["members"]]) for g in data["groups"]],
            layout=from_json(rule, names, {name: math.prod(shape) for name, shape in shapes.items()}, len(flats)))

    def problems(self) -> list[str]:
        """What is wrong with it, in words: every element of every parameter must lie in exactly one place."""
        problems = self.layout.problems()
        if self.layout.num_flats != len(self.flats):
            problems.append(f"{self.layout.num_flats} flats have a place, {len(self.flats)} are described")
        grouped = sorted(name for group in self.groups for name in group.members)
        if grouped != sorted(self.shapes):
            problems.append("the groups' members are not the trained parameters")
        if any(not 0 <= flat.group < len(self.groups) for flat in self.flats):
            problems.append("a flat belongs to no group")
        for number, flat in enumerate(self.flats):
            if flat.shaped and not problems and len(self.layout.members(number)) != 1:
                problems.append(f"flat {number} has state of another shape and is not one parameter")
        unknown = {*self.order} - {*self.shapes, *self.frozen, *self.buffers}
        if unknown:
            problems.append(f"{', '.join(sorted(unknown)[:3])}: in the order and nowhere else")
        return problems

    def tensors(self, rank: int) -> dict[str, int]:
        """Name -> least number of elements of every tensor that must stand in a rank's file."""
        own: dict[str, int] = {}
        for flat in self.layout.writes(rank):
            least, info = self.layout.least(rank, flat), self.flats[flat]
            for kind in ["master", *info.kinds, *["ema"] * self.ema]:
                own[f"{kind}.{flat}"] = least
            own |= {f"{kind}.{flat}": math.prod(shape) for kind, shape in info.shaped.items()}
        return own


def _flat_info(data: dict[str, Any]) -> FlatInfo:
    step = data["step"]
    if not {*data.get("dtypes", {}).values()} <= _STATE_DTYPES:
        raise ValueError(f"types {data['dtypes']}")
    return FlatInfo(int(data["group"]), [str(kind) for kind in data["kinds"]],
                    step if step is None or isinstance(step, int) else float(step),
                    {str(kind): _shape(shape) for kind, shape in data.get("shaped", {}).items()},
                    {str(kind): str(dtype) for kind, dtype in data.get("dtypes", {}).items()})


def _shape(value: Any) -> tuple[int, ...]:
    shape = tuple(int(size) for size in value)
    if any(size < 0 for size in shape):
        raise ValueError(f"shape {shape}")
    return shape
