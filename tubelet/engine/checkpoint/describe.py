"""What a checkpoint of an engine holds: its index, and the tensors that this rank writes."""

from __future__ import annotations

import json
import operator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from tubelet.engine.batch_norm import average_statistics, has_batch_norm
from tubelet.engine.checkpoint.index import FlatInfo, GroupInfo, Index
from tubelet.engine.checkpoint.tensors import Entry, Plan, entry
from tubelet.engine.protocol import Engine, Flat

# Keys of an optimizer group that belong to the running job, not to the state of training.
RUNNING_KEYS = {"params", "param_names", "name", "foreach", "fused", "capturable", "differentiable", "maximize",
                "decoupled_weight_decay", "momentum_dtype", "_ds_source_param_group_id"}


def buffers(module: nn.Module) -> dict[str, torch.Tensor]:
    """The module's persistent buffers by name: what its state dict holds beside parameters."""
    return {name: value.detach() for name, value in _buffers(module).items()}


def _buffers(module: nn.Module) -> dict[str, torch.Tensor]:
    parameters = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    return {name: value for name, value in module.state_dict(keep_vars=True).items() if name not in parameters}


@dataclass
class FlatState:
    """What the optimizer keeps of one flat; all empty before its first step."""

    kinds: dict[str, torch.Tensor] = field(default_factory=dict)
    """State tensors of the flat's own shape."""
    shaped: dict[str, torch.Tensor] = field(default_factory=dict)
    """State tensors of another shape."""
    step: float | int | None = None


def flat_state(engine: Engine, flat: Flat) -> FlatState:
    kept = engine.optimizer.state.get(flat.key, {})
    found = FlatState(step=_step(kept))
    for name, value in kept.items():
        if name != "step" and value is not None:
            # Losing an unknown kind of state would be silent, so it is our mistake, loudly.
            same = isinstance(value, torch.Tensor) and value.shape == flat.key.shape
            assert same or (isinstance(value, torch.Tensor) and engine.replicated and len(flat.slots) == 1), (
                f"optimizer state {name!r} of {type(engine.optimizer).__name__} has no place in a checkpoint")
            (found.kinds if same else found.shaped)[name] = value
    return found


def _step(state: dict[str, Any]) -> float | int | None:
    value = state.get("step")
    return value if value is None or isinstance(value, int) else float(value)


def _hyper(group: dict[str, Any]) -> dict[str, Any]:
    return {key: json_value(value) for key, value in group.items() if key not in RUNNING_KEYS}


def _flat_info(flat: Flat, state: FlatState) -> FlatInfo:
    return FlatInfo(flat.group, list(state.kinds), state.step,
                    {kind: tuple(value.shape) for kind, value in state.shaped.items()},
                    {kind: str(value.dtype).removeprefix("torch.") for kind, value in state.kinds.items()
                     if value.dtype != torch.float32})


def group_members(engine: Engine) -> list[set[str]]:
    """Names of the parameters of each optimizer group; a rank may hold nothing of some of them."""
    layout = engine.layout()
    members: list[set[str]] = [set() for _ in engine.optimizer.param_groups]
    for number, flat in enumerate(engine.flats()):
        members[flat.group].update(layout.members(number))
    return members


def describe(engine: Engine, has_ema: bool, frozen: dict[str, torch.Tensor], shared: dict[str, torch.Tensor]) -> Index:
    """The index of the engine as it stands, equal on all ranks. Needs no communication."""
    shapes, layout, flats = engine.shapes(), engine.layout(), engine.flats()
    for number, flat in enumerate(flats):
        assert layout.slots(engine.world.rank, number) == flat.slots, f"layout() and flats() disagree on flat {number}"
    # Kinds and steps come from every flat, also from those that another rank writes.
    infos = [_flat_info(flat, flat_state(engine, flat)) for flat in flats]
    groups = [GroupInfo(_hyper(group), [name for name in shapes if name in names])
              for group, names in zip(engine.optimizer.param_groups, group_members(engine))]
    known = {*shapes, *frozen, *shared}
    order = [name for name in engine.module.state_dict(keep_vars=True) if name in known]  # tied weights: first name only
    index = Index(
        shapes=dict(shapes), frozen={name: tuple(value.shape) for name, value in frozen.items()},
        buffers={name: tuple(value.shape) for name, value in shared.items()}, order=order,
        optimizer=type(engine.optimizer).__name__, ema=has_ema, flats=infos, groups=groups, layout=layout)
    problems = index.problems()
    assert not problems, problems
    return index


def rank_entries(engine: Engine, index: Index, ema: list[torch.Tensor] | None,
                 masters: list[torch.Tensor] | None = None) -> list[Entry]:
    """The tensors of this rank's file; `index` is `describe`'s. With `masters` the entries read the masters from there when
    their turn has come, so that the list may be filled anew before each save."""
    entries, flats = [], engine.flats()
    if masters is None:
        masters = [flat.master for flat in flats]
    for number in index.layout.writes(engine.world.rank):
        flat, state = flats[number], flat_state(engine, flats[number])
        entries.append(Entry(f"master.{number}", flat.master.dtype, (flat.master.numel(),),
                             partial(masters.__getitem__, number)))
        entries += [entry(f"{kind}.{number}", value, flat=True) for kind, value in state.kinds.items()]
        entries += [entry(f"{kind}.{number}", value) for kind, value in state.shaped.items()]
        if ema is not None:
            entries.append(entry(f"ema.{number}", ema[number], flat=True))
    return entries


class Contents:
    """What the checkpoints of one engine hold, save after save. All ranks build one.

    Names, shapes and places are worked out at the first save, and again when the engine has other tensors than at the one
    before. All other saves ask for step counts, hyper-parameters and the tensors themselves only: a model of hundreds of
    small tensors is described ten times as fast then, and training waits for it.
    """

    def __init__(self, engine: Engine):
        self.engine = engine
        trained = engine.shapes()
        self._any_frozen = any(name not in trained for name, _ in engine.module.named_parameters())
        self._batch_norm = has_batch_norm(engine.module)
        self._buffers = _Buffers(engine.module)
        self._seen: list[Any] = []
        self._masters: list[torch.Tensor] = []

    def settle(self) -> dict[str, torch.Tensor]:
        """All that needs communication: BatchNorm statistics are averaged over ranks, frozen parameters gathered (and
        returned). All ranks call it before `take`."""
        if self._batch_norm:
            average_statistics(self.engine.module)
        return self.engine.frozen() if self._any_frozen else {}

    def take(self, ema: list[torch.Tensor] | None, frozen: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Look at the state as it is now; returns the buffers. `plan`, `needed` and `index_text` are of it then, until the
        next call. No communication. `frozen` is what `settle` gave."""
        flats, shared = self.engine.flats(), self._buffers.read()
        seen = self._tensors(flats, ema)
        self._masters[:] = [flat.master for flat in flats]
        if len(seen) != len(self._seen) or not all(map(operator.is_, seen, self._seen)):
            self._index = describe(self.engine, ema is not None, frozen, shared)
            self.plan = Plan(rank_entries(self.engine, self._index, ema, self._masters))
            self._seen, self._rows = seen, {}
        self._flats, self._index.buffers = flats, {name: tuple(value.shape) for name, value in shared.items()}
        return shared

    plan: Plan
    """This rank's file."""

    def _tensors(self, flats: list[Flat], ema: list[torch.Tensor] | None) -> list[Any]:
        """What makes a description hold: the same objects."""
        state, found = self.engine.optimizer.state, [ema is None, *(ema or ())]  # a key stands for its master
        for flat in flats:
            found.append(flat.key)
            found += [value for kind, value in state.get(flat.key, {}).items() if kind != "step"]
        return found

    @property
    def needed(self) -> int:
        """Bytes of the tensors of all ranks together: known without asking them, because where ranks share the work their
        flats are of one size, and where each holds everything so does this one."""
        engine, plan = self.engine, self.plan
        if not engine.replicated:
            return plan.nbytes * engine.world.size
        return sum(value.nbytes for value in self._seen if isinstance(value, torch.Tensor))

    def index_text(self) -> str:
        """`index.json`."""
        engine, index = self.engine, self._index
        for info, flat in zip(index.flats, self._flats):
            info.step = _step(engine.optimizer.state.get(flat.key, {}))
        for info, group in zip(index.groups, engine.optimizer.param_groups):
            info.hyper = _hyper(group)
        for row in ("flats", "groups", "buffers"):
            self._rows.pop(row, None)
        return index.to_json(self._rows)


class _Buffers:
    """A module's persistent buffers, read again and again without walking over the module."""

    def __init__(self, module: nn.Module):
        self.module, self._parts = module, list(module.modules())
        self._find()

    def _find(self) -> None:
        self._there = self._which()
        owners = {id(value): (part, name) for part in self._parts for name, value in part._buffers.items()}
        self._owners = {name: owners.get(id(value)) for name, value in _buffers(self.module).items()}

    def _which(self) -> list[bool]:
        return [value is None for part in self._parts if part._buffers for value in part._buffers.values()]

    def read(self) -> dict[str, torch.Tensor]:
        """As `buffers`."""
        if self._which() != self._there:  # one was made, or given up
            self._find()
        if None in self._owners.values():  # the module makes up a part of its state when it is asked for it
            return buffers(self.module)
        return {name: part._buffers[leaf].detach() for name, (part, leaf) in self._owners.items()}  # type: ignore[union-attr, misc]


def json_value(value: Any) -> Any:
    """A group's hyper-parameter as JSON: tuples are lists, one-element tensors numbers."""
    if isinstance(value, torch.Tensor):
        return value.item()
    if value is None or type(value) in (bool, int, float, str):
        return value
    return json.loads(json.dumps(value))
