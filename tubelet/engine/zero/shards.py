"""Where the elements of every parameter lie in DeepSpeed's flat tensors (the rules are in `engine/layout.py`); and how to
read and write them.

At stages 1 and 2 a flat is a group; at stage 3 it is a sub-group, of which `sub_group_size` may make several of a group.

DeepSpeed's own accessors are not used: with several groups `safe_get_full_optimizer_state` fails, with round-robin order
`safe_get_full_fp32_param` reads the wrong places, and `safe_set_full_*` fails where N does not divide n (0.19.8).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from tubelet.engine.layout import Cut, Layout, Pieces
from tubelet.engine.protocol import Flat

EXPECTED = {1: "DeepSpeedZeroOptimizer", 2: "DeepSpeedZeroOptimizer", 3: "DeepSpeedZeroOptimizer_Stage3"}


class Shards:
    """The flat tensors of one DeepSpeed ZeRO optimizer. `names`: parameter -> name, of the bare module."""

    def __init__(self, zero: Any, stage: int, module: nn.Module, names: dict[nn.Parameter, str], world_size: int):
        found = type(zero).__name__
        if found != EXPECTED[stage]:  # other classes keep their state under other names: better loud than wrong
            raise RuntimeError(f"ZeRO stage {stage} built a {found}; only {EXPECTED[stage]} of deepspeed 0.19 is known here")
        self.zero, self.stage, self.module, self.names, self.world_size = zero, stage, module, names, world_size
        self.rank = dist.get_rank()

    def keys(self) -> list[torch.Tensor]:
        """The tensors the inner optimizer steps on, in the order of the flats."""
        return self.zero.single_partition_of_fp32_groups if self.stage < 3 else self.zero.fp32_partitioned_groups_flat

    def flats(self) -> list[Flat]:
        flats = []
        for index, key in enumerate(self.keys()):
            group = index if self.stage < 3 else self.zero.sub_group_to_group_id[index]
            flats.append(Flat(master=key.detach(), key=key, group=group, slots=self.layout.slots(self.rank, index)))
        return flats

    @cached_property
    def layout(self) -> Layout:
        """The rule in this optimizer's own numbers; it never changes."""
        zero = self.zero
        if self.stage == 3:
            sizes = {self.names[param]: param.ds_numel for params in zero.fp16_groups for param in params}
            layout = Pieces(self.world_size, sizes, self._named(zero.fp16_groups))
        else:  # the round-robin lists are the order in memory, whether or not `round_robin_gradients` is on
            groups = zero.round_robin_bit16_groups
            sizes = {self.names[param]: param.numel() for params in groups for param in params}
            layout = Cut(self.world_size, sizes, self._named(groups), zero.round_robin_bit16_offsets, zero.partition_size)
        problems = layout.problems()
        assert not problems, problems
        return layout

    def _named(self, groups: list[list[Any]]) -> list[list[str]]:
        return [[self.names[param] for param in params] for params in groups]

    # ------------------------------------------------------------------------------------------------- writing

    def begin_load(self) -> None:
        """Stage 3 releases parameters it keeps whole, or their stale copies would be used after the masters change."""
        if self.stage == 3:
            self.zero.checkpoint_event_prologue()

    def refresh(self) -> None:
        """Working weights follow the masters; DeepSpeed's links follow the optimizer state."""
        zero = self.zero
        if self.stage == 3:
            zero.checkpoint_event_prologue()
            for index in range(len(zero.fp16_groups)):
                zero._reassign_or_swap_out_partitioned_parameters(index)
            zero.checkpoint_event_epilogue()
            return
        zero.update_lp_params()
        # DeepSpeed links state when the first group has stepped, so the links of the others are missing, and after a
        # load they would keep the old state alive.
        if all(zero.optimizer.state.get(key) for key in self.keys()):
            zero._hp_optimizer_states_linked = False
            zero._lazy_init_hp_params_optimizer_state()

    @torch.no_grad()
    def widen(self, originals: dict[str, torch.Tensor]) -> None:
        """Give bf16 masters the digits that DeepSpeed rounded away: it makes them from the bf16 copy of the model.

        Only elements that round to what the master holds are taken, so a rank whose model was built differently from
        rank 0's (DeepSpeed broadcasts rank 0's) cannot disturb anything; the working weights stay as they are.
        """
        for flat in self.flats():
            for slot in flat.slots:
                master = flat.master.narrow(0, slot.offset, slot.length)
                original = originals[slot.name].flatten()[slot.start : slot.start + slot.length].to(master)
                same = original.to(torch.bfloat16).to(master.dtype) == master
                master.copy_(torch.where(same, original, master))

    # ------------------------------------------------------------------------------------------------- reading

    @torch.no_grad()
    def collect(self, name: str) -> torch.Tensor | None:
        """One parameter from the pieces of all ranks: flat fp32 on the CPU of rank 0, None elsewhere. All ranks call it.

        The piece's owner broadcasts it, so no rank ever holds more than one piece of one parameter.
        """
        keys = self.keys()
        full = torch.empty(self.layout.sizes[name]) if self.rank == 0 else None
        for owner, index, slot in self.layout.pieces(name):
            if self.rank == owner:
                piece = keys[index].detach()[slot.offset : slot.offset + slot.length].contiguous()
            else:
                piece = torch.empty(slot.length, device=keys[0].device)
            if owner != 0:
                dist.broadcast(piece, src=owner)
            if full is not None:
                full[slot.start : slot.start + slot.length] = piece.cpu()
        return full

    @torch.no_grad()
    def read_frozen(self, param: Any) -> torch.Tensor:
        """Full value of a parameter that is not trained, fp32 on the CPU. All ranks call it."""
        if self.stage < 3:
            return param.detach().float().cpu().clone()
        own = param.ds_tensor.detach()
        pieces = [torch.empty_like(own) for _ in range(self.world_size)]
        dist.all_gather(pieces, own)
        return torch.cat(pieces)[: param.ds_numel].view(param.ds_shape).float().cpu()

    @torch.no_grad()
    def write_frozen(self, param: Any, value: torch.Tensor) -> None:
        """Put a full value back; stage 3 wants `begin_load` before and `refresh` after."""
        if self.stage < 3:
            param.data.copy_(value)
            return
        own = param.ds_tensor
        piece = value.flatten()[self.rank * own.numel() : (self.rank + 1) * own.numel()]
        own.data[: piece.numel()].copy_(piece)

    def full_state_dict(self) -> Iterator[tuple[str, torch.Tensor | None]]:
        """See `Engine.full_state_dict`."""
        for name, tensor in self.module.state_dict(keep_vars=True).items():
            if not isinstance(tensor, nn.Parameter):  # a buffer: rank 0's
                value = tensor.detach().cpu().clone()
                yield name, (value.float() if value.is_floating_point() else value) if self.rank == 0 else None
            elif self.names[tensor] in self.layout.sizes:  # tied parameters have one name here and several in the state
                shape = tensor.ds_shape if self.stage == 3 else tensor.shape  # type: ignore[attr-defined]
                value = self.collect(self.names[tensor])
                yield name, value.view(shape) if value is not None else None
            else:
                value = self.read_frozen(tensor)
                yield name, value if self.rank == 0 else None


class InShards:
    """What every engine around DeepSpeed's optimizer answers from its shards, ours and a stock one alike. Its class sets
    `module`, `_shards`, and `_shapes` (of what is trained, by name)."""

    module: nn.Module
    _shards: Shards
    _shapes: dict[str, tuple[int, ...]]

    def flats(self) -> list[Flat]:
        return self._shards.flats()

    def layout(self) -> Layout:
        return self._shards.layout

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return dict(self._shapes)

    def frozen(self) -> dict[str, torch.Tensor]:
        """In bf16 runs these values have the digits of bf16 only: there is no master of what is not trained."""
        return {name: self._shards.read_frozen(param) for name, param in self._frozen()}

    def load_frozen(self, values: dict[str, torch.Tensor]) -> None:
        self._shards.begin_load()
        for name, param in self._frozen():
            self._shards.write_frozen(param, values[name])
        self._shards.refresh()

    def _frozen(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, param) for name, param in self.module.named_parameters() if name not in self._shapes]

    def begin_load(self) -> None:
        self._shards.begin_load()

    def refresh(self) -> None:
        self._shards.refresh()
