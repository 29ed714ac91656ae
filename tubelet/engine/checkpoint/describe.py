"""What a checkpoint of an engine holds: its index, and the tensors that this rank writes."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from tubelet.engine.checkpoint.index import FlatInfo, GroupInfo, Index
from tubelet.engine.checkpoint.tensors import Entry, entry
from tubelet.engine.protocol import Engine, Flat

# Keys of an optimizer group that belong to the running job, not to the state of training.
RUNNING_KEYS = {"params", "param_names", "name", "foreach", "fused", "capturable", "differentiable", "maximize",
                "decoupled_weight_decay", "momentum_dtype", "_ds_source_param_group_id"}


def buffers(module: nn.Module) -> dict[str, torch.Tensor]:
    """The module's persistent buffers by name: what its state dict holds beside parameters."""
    parameters = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    return {name: value.detach() for name, value in module.state_dict(keep_vars=True).items() if name not in parameters}


@dataclass
class FlatState:
    """What the optimizer keeps of one flat; all empty before its first step."""

    kinds: dict[str, torch.Tensor] = field(default_factory=dict)
    """State tensors of the flat's own shape."""
    shaped: dict[str, torch.Tensor] = field(default_factory=dict)
    """State tensors of another shape."""
    step: float | int | None = None


def flat_state(engine: Engine, flat: Flat) -> FlatState:
    found = FlatState()
    for name, value in engine.optimizer.state.get(flat.key, {}).items():
        if name == "step":
            found.step = value if isinstance(value, int) else float(value)
        elif value is not None:
            # Losing an unknown kind of state would be silent, so it is our mistake, loudly.
            same = isinstance(value, torch.Tensor) and value.shape == flat.key.shape
            assert same or (isinstance(value, torch.Tensor) and engine.replicated and len(flat.slots) == 1), (
                f"optimizer state {name!r} of {type(engine.optimizer).__name__} has no place in a checkpoint")
            (found.kinds if same else found.shaped)[name] = value
    return found


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
    groups = [GroupInfo({key: json_value(value) for key, value in group.items() if key not in RUNNING_KEYS},
                        [name for name in shapes if name in names])
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


def rank_entries(engine: Engine, index: Index, ema: list[torch.Tensor] | None) -> list[Entry]:
    """The tensors of this rank's file; `index` is `describe`'s."""
    entries, flats = [], engine.flats()
    for number in index.layout.writes(engine.world.rank):
        flat, state = flats[number], flat_state(engine, flats[number])
        entries.append(entry(f"master.{number}", flat.master, flat=True))
        entries += [entry(f"{kind}.{number}", value, flat=True) for kind, value in state.kinds.items()]
        entries += [entry(f"{kind}.{number}", value) for kind, value in state.shaped.items()]
        if ema is not None:
            entries.append(entry(f"ema.{number}", ema[number], flat=True))
    return entries


def json_value(value: Any) -> Any:
    """A group's hyper-parameter as JSON: tuples are lists, one-element tensors numbers."""
    if isinstance(value, torch.Tensor):
        return value.item()
    return json.loads(json.dumps(value))
