"""What differs between two checkpoints, whatever engines and numbers of ranks wrote them: for `tubelet ckpt diff`.

Tensors are compared one at a time, so memory for two copies of the largest one is enough. "Equal" is about the state that
training goes on from: tensors, step counts, hyper-parameters, counters and the order of the data. Settings, versions and
engines are told too, but two checkpoints may differ in them and still be the same state.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tubelet.config import flatten
from tubelet.console import print_table
from tubelet.engine.checkpoint.folder import newest, verify
from tubelet.engine.checkpoint.format import BUFFERS
from tubelet.engine.checkpoint.load import Source
from tubelet.errors import CheckpointError

_CHUNK = 1 << 22  # elements compared at once, in float64
_SHOWN = 20  # rows of a printed section; JSON has all
_WORDS = {"master": "weights", "ema": "EMA"}
TOLD_ONLY = ("engine", "settings", "versions")  # sections that do not make two checkpoints different


@dataclass
class Distance:
    """How far tensors of A and B are apart."""

    count: int = 0
    equal: int = 0
    """How many of `count` tensors are equal bit by bit."""
    max_abs: float = 0.0
    """Largest |a - b| of an element; nan if one is nan on one side."""
    squares: float = 0.0
    """Sum of (a - b)^2."""
    size: float = 0.0
    """Sum of a^2."""

    @property
    def relative(self) -> float:
        """|a - b| / |a| in the Euclidean norm; inf where A is all zeros and B is not."""
        if not self.squares:
            return 0.0
        return math.sqrt(self.squares / self.size) if self.size else math.inf

    def add(self, other: Distance) -> None:
        """Count another tensor in."""
        self.count, self.equal = self.count + other.count, self.equal + other.equal
        self.max_abs = other.max_abs if math.isnan(other.max_abs) else max(self.max_abs, other.max_abs)
        self.squares, self.size = self.squares + other.squares, self.size + other.size


@dataclass
class Diff:
    """What `diff` found. `sections`: the keys that differ of `engine`, `settings`, `versions`, `state`, `data` and
    `optimizer`, with the values of A and B (None = not there)."""

    a: Path
    b: Path
    steps: tuple[int, int]
    sections: dict[str, dict[str, tuple[Any, Any]]] = field(default_factory=dict)
    only_a: list[str] = field(default_factory=list)
    only_b: list[str] = field(default_factory=list)
    shapes: dict[str, tuple[list[int], list[int]]] = field(default_factory=dict)
    kinds: dict[str, Distance] = field(default_factory=dict)
    one_sided: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Kind -> how many tensors of common parameters only A has and only B has (moments of what was frozen in the other)."""
    most: list[tuple[str, str, Distance]] = field(default_factory=list)
    """(kind, name, distance) of the most different tensors: weights first, then by relative difference."""

    @property
    def equal(self) -> bool:
        """Training would go on from the same state."""
        told = any(keys for section, keys in self.sections.items() if section not in TOLD_ONLY)
        tensors = all(found.equal == found.count for found in self.kinds.values())
        return not (told or self.only_a or self.only_b or self.shapes or self.one_sided) and tensors

    def to_json(self) -> dict[str, Any]:
        """Everything, as JSON; numbers that JSON has no word for are "nan" and "inf"."""
        return {
            "a": str(self.a), "b": str(self.b), "equal": self.equal, **self.sections,
            "parameters": {"only_a": self.only_a, "only_b": self.only_b, "shapes": self.shapes},
            "tensors": {kind: {"count": found.count, "equal": found.equal, "max_abs": _number(found.max_abs),
                               "relative": _number(found.relative)} for kind, found in self.kinds.items()},
            "one_sided": self.one_sided,
            "most_different": [{"kind": kind, "name": name, "max_abs": _number(one.max_abs),
                                "relative": _number(one.relative)} for kind, name, one in self.most]}

    def show(self) -> None:
        """Print tables and a last line with the verdict."""
        print(f"A: {self.a}\nB: {self.b}")
        rows = [(section, key, _short(a), _short(b))
                for section, keys in self.sections.items() for key, (a, b) in keys.items()]
        rows += [("shape", name, _short(a), _short(b)) for name, (a, b) in self.shapes.items()]
        rows += [("parameter", name, "there", "-") for name in self.only_a]
        rows += [("parameter", name, "-", "there") for name in self.only_b]
        if rows:
            left = [("...", f"{len(rows) - _SHOWN} more (--json has all)", "", "")] if len(rows) > _SHOWN else []
            print_table("beside the tensors", ("what", "which", "A", "B"), rows[:_SHOWN] + left)
        names = dict.fromkeys([*self.kinds, *self.one_sided])
        found = [(kind, self.kinds.get(kind, Distance()), self.one_sided.get(kind, (0, 0))) for kind in names]
        print_table("tensors", ("kind", "in both", "equal", "max abs", "relative", "only in A", "only in B"),
                    [(kind, one.count, one.equal, f"{one.max_abs:.3g}", f"{one.relative:.3g}", a, b)
                     for kind, one, (a, b) in found])
        if self.most:
            print_table("most different", ("kind", "parameter", "max abs", "relative"),
                        [(kind, name, f"{one.max_abs:.3g}", f"{one.relative:.3g}") for kind, name, one in self.most])
        same = sum(found.equal for found in self.kinds.values())
        print("equal: the same state" if self.equal else
              f"different: {same} of {sum(found.count for found in self.kinds.values())} tensors are equal bit by bit")


def diff(a: str | Path, b: str | Path, *, top: int = 10) -> Diff:
    """Compare two checkpoints (of a run, its newest). `top`: how many of the most different tensors to name.

    Sizes and places are checked first, hashes are not; raises `CheckpointError` when one of the two is damaged.
    """
    one, other = _open(a), _open(b)
    found = Diff(one.folder, other.folder, (one.manifest["step"], other.manifest["step"]), _sections(one, other))
    here, there = one.shapes() | one.index.buffers, other.shapes() | other.index.buffers
    found.only_a = [name for name in here if name not in there]
    found.only_b = [name for name in there if name not in here]
    common = [name for name in one.index.order if name in there]
    found.shapes = {name: (list(here[name]), list(there[name])) for name in common if here[name] != there[name]}
    _compare_tensors(found, one, other, [name for name in common if name not in found.shapes], top)
    return found


def _compare_tensors(found: Diff, one: Source, other: Source, names: list[str], top: int) -> None:
    unequal: list[tuple[bool, float, str, str, Distance]] = []  # a heap of `top`; (kind, name) is there once
    for name in names:
        here, there = _kinds(one, name), _kinds(other, name)
        for kind in dict.fromkeys(here + there):
            word = _WORDS.get(kind, kind)
            if not (kind in here and kind in there):
                counts = found.one_sided.get(word, (0, 0))
                found.one_sided[word] = (counts[0] + (kind in here), counts[1] + (kind in there))
                continue
            distance = compare(_tensor(one, kind, name), _tensor(other, kind, name))
            found.kinds.setdefault(word, Distance()).add(distance)
            if not distance.equal and top:
                relative = math.inf if math.isnan(distance.relative) else distance.relative
                row = (kind == "master", relative, word, name, distance)
                (heapq.heappush if len(unequal) < top else heapq.heappushpop)(unequal, row)
    found.most = [row[2:] for row in sorted(unequal, key=lambda row: row[:4], reverse=True)]


def _open(path: str | Path) -> Source:
    folder = newest(path)
    problems = verify(folder, deep=False)
    if problems:
        raise CheckpointError(f"{folder} is not whole: {'; '.join(problems[:4])}.", "another checkpoint of the run")
    return Source(folder)


# ------------------------------------------------------------------------------------------------- tensors


def _kinds(source: Source, name: str) -> list[str]:
    info = source.info(name)
    if name in source.index.buffers:
        return ["buffers"]
    if info is None:  # frozen: no average and no moments
        return ["master"]
    return ["master", *["ema"] * source.index.ema, *info.kinds, *info.shaped]


def _tensor(source: Source, kind: str, name: str) -> torch.Tensor:
    if kind == "buffers":
        return source.reader.tensor(BUFFERS, name)
    info = source.info(name)
    return source.shaped(kind, name) if info and kind in info.shaped else source.full(kind, name)


def compare(a: torch.Tensor, b: torch.Tensor) -> Distance:
    """Of two tensors on the CPU; with other shapes or types they are compared by value, and equal only if those agree."""
    found = Distance(count=1)
    if a.shape != b.shape:
        found.max_abs = found.squares = math.inf
        return found
    same = a.dtype == b.dtype
    for left, right in zip(a.reshape(-1).split(_CHUNK), b.reshape(-1).split(_CHUNK)):
        if a.dtype == b.dtype and torch.equal(left.view(torch.uint8), right.view(torch.uint8)):
            found.size += float(left.double().square().sum())
            continue
        same, x, y = False, left.double(), right.double()
        gap = torch.where(x == y, 0.0, (x - y).abs())  # an infinity that both have is no difference
        gap = torch.where(x.isnan() & y.isnan(), 0.0, gap)
        found.max_abs = max(found.max_abs, float(gap.max())) if not gap.isnan().any() else math.nan
        found.squares, found.size = found.squares + float(gap.square().sum()), found.size + float(x.square().sum())
    found.equal = int(same)
    return found


# ------------------------------------------------------------------------------------------------- beside the tensors


def _sections(one: Source, other: Source) -> dict[str, dict[str, tuple[Any, Any]]]:
    left, right = _plain(one), _plain(other)
    found = {section: _unequal(left[section], right[section]) for section in left}
    found["optimizer"] |= _hyper_parameters(one, other)
    return found


def _unequal(left: dict[str, Any], right: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    return {key: (left.get(key), right.get(key)) for key in dict.fromkeys([*left, *right])
            if left.get(key) != right.get(key)}


def _plain(source: Source) -> dict[str, dict[str, Any]]:
    """What a checkpoint says of itself, section by section, as flat mappings."""
    manifest, index = source.manifest, source.index
    state = {"step": manifest["step"], "seen": manifest.get("samples"), "total_steps": manifest.get("total_steps"),
             **(manifest.get("state") or {})}
    state.pop("recent_losses", None)  # means over ranks, whose last digits depend on how many there are
    return {
        "engine": {**manifest["engine"], "ranks": manifest["world_size"]},
        "settings": flatten(manifest.get("config") or {}),
        "versions": dict(manifest["versions"]),
        "state": flatten(state),
        "data": flatten((manifest.get("data") or {}).get("fingerprint") or {}),
        "optimizer": {"name": index.optimizer, "EMA": index.ema, "frozen parameters": len(index.frozen)},
    }


def _hyper_parameters(one: Source, other: Source) -> dict[str, tuple[Any, Any]]:
    """{"weight_decay of 12 parameter(s), first head.weight": its values}. By parameter: engines cut groups differently."""
    left, right, found = _per_parameter(one), _per_parameter(other), {}
    common = [name for name in left if name in right]
    for key in dict.fromkeys(key for name in common for key in (*left[name], *right[name])):
        apart = [name for name in common if left[name].get(key) != right[name].get(key)]
        if apart:
            pair = (left[apart[0]].get(key), right[apart[0]].get(key))
            found[f"{key} of {len(apart)} parameter(s), first {apart[0]}"] = pair
    return found


def _per_parameter(source: Source) -> dict[str, dict[str, Any]]:
    """Hyper-parameters and step count of each trained parameter."""
    found = {name: dict(group.hyper) for group in source.index.groups for name in group.members}
    for name, own in found.items():
        info = source.info(name)
        if info and info.step is not None:
            own["step"] = info.step
    return found


def _number(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


def _short(value: Any) -> str:
    text = "-" if value is None else str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
