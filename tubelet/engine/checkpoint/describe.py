"""What a checkpoint of an engine holds: its index, and the tensors that this rank writes."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import nn

from tubelet.engine.checkpoint.index import FlatInfo, GroupInfo, Index
from tubelet.engine.checkpoint.tensors import Entry, entry
from tubelet.engine.protocol import Engine, Flat

# Keys of an optimizer group that belong to the running job, not to the state of training.
RUNNING_KEYS = {"params", "param_names", "name", "foreach", "fused", "capturable", "differentiable", "maximize",
                "decoupled_weight_decay", "_ds_source_param_group_id"}


def buffers(module: nn.Module) -> dict[str, torch.Tensor]:
    """The module's persistent buffers by name: what its state dict holds beside parameters."""
    parameters = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    return {name: value.detach() for name, value in module.state_dict(keep_vars=True).items() if name not in parameters}


def flat_state(engine: Engine, flat: Flat) -> tuple[dict[str, torch.Tensor], float | None]:
    """(state tensors of the flat's size by kind, the optimizer's step count) of one flat; ({}, None) before its first
    step."""
    kinds, step = {}, None
    for name, value in engine.optimizer.state.get(flat.key, {}).items():
        if name == "step":
            step = float(value)
        elif value is not None:
            # Losing an unknown kind of state would be silent, so it is our mistake, loudly.
            assert isinstance(value, torch.Tensor) and value.numel() == flat.master.numel(), (
                f"optimizer state {name!r} of {type(engine.optimizer).__name__} has no place in a checkpoint")
            kinds[name] = value
    return kinds, step


def describe(engine: Engine, has_ema: bool, frozen: dict[str, torch.Tensor], shared: dict[str, torch.Tensor]) -> Index:
    """The index of the engine as it stands, equal on all ranks. Needs no communication."""
    shapes, layouts, flats = engine.shapes(), engine.layouts(), engine.flats()
    assert layouts[engine.world.rank] == [flat.slots for flat in flats], "layouts() and flats() disagree"
    # Kinds and steps come from every flat, also from those that another rank writes.
    states = [flat_state(engine, flat) for flat in flats]
    infos = [FlatInfo(flat.group, list(kinds), step) for flat, (kinds, step) in zip(flats, states)]
    members: list[dict[str, None]] = [{} for _ in engine.optimizer.param_groups]
    for own in layouts:
        for info, slots in zip(infos, own, strict=True):
            members[info.group].update(dict.fromkeys(slot.name for slot in slots))
    groups = [GroupInfo({key: json_value(value) for key, value in group.items() if key not in RUNNING_KEYS},
                        [name for name in shapes if name in names])
              for group, names in zip(engine.optimizer.param_groups, members)]
    if engine.replicated:
        ranks = [{number: slots for number, slots in enumerate(own) if number % engine.world.size == rank}
                 for rank, own in enumerate(layouts)]
    else:
        ranks = [dict(enumerate(own)) for own in layouts]
    known = {*shapes, *frozen, *shared}
    order = [name for name in engine.module.state_dict(keep_vars=True) if name in known]  # tied weights: first name only
    index = Index(
        shapes=dict(shapes), frozen={name: tuple(value.shape) for name, value in frozen.items()},
        buffers={name: tuple(value.shape) for name, value in shared.items()}, order=order,
        optimizer=type(engine.optimizer).__name__, ema=has_ema, flats=infos, groups=groups, ranks=ranks)
    problems = index.problems()
    assert not problems, problems
    return index


def rank_entries(engine: Engine, index: Index, ema: list[torch.Tensor] | None) -> list[Entry]:
    entries, flats = [], engine.flats()
    for number in index.ranks[engine.world.rank]:
        flat = flats[number]
        entries.append(entry(f"master.{number}", flat.master, flat=True))
        entries += [entry(f"{kind}.{number}", value, flat=True) for kind, value in flat_state(engine, flat)[0].items()]
        if ema is not None:
            entries.append(entry(f"ema.{number}", ema[number], flat=True))
    return entries


def json_value(value: Any) -> Any:
    """A group's hyper-parameter as JSON: tuples are lists, one-element tensors numbers."""
    if isinstance(value, torch.Tensor):
        return value.item()
    return json.loads(json.dumps(value))
