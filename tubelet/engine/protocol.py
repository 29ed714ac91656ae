"""What the trainer, the checkpoints and the two engines promise each other.

Legend: W world size, m micro-batch size, n micro-batches per rank and step (G = n * m * W).

An engine keeps fp32 *masters* as a list of flat 1-D tensors per rank (`Flat`). Each flat holds pieces (`Slot`) of
parameters. Moving averages and optimizer moments are flat tensors of the same length, so one list of slots describes
them all; that is why checkpoints, EMA and export need to know nothing of ZeRO.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from tubelet.dist import World

if TYPE_CHECKING:
    from tubelet.engine.layout import Layout


@dataclass(frozen=True)
class Slot:
    """A piece of a parameter: `flat[offset : offset + length]` is `param.flatten()[start : start + length]`.

    Everything in a flat that no slot covers is padding: never compared, hashed, saved with meaning or written.
    """

    name: str
    start: int
    length: int
    offset: int


@dataclass
class Flat:
    """One flat tensor of this rank."""

    master: torch.Tensor
    """fp32 [numel]; the truth about the weights. Written in place only (it may alias the model's own storage)."""
    key: torch.Tensor
    """The tensor under which `optimizer.state` keeps this flat's moments and step (often `master` itself)."""
    group: int
    """Index of its group in `optimizer.param_groups`."""
    slots: list[Slot] = field(default_factory=list)


@dataclass(frozen=True)
class StepResult:
    """What an optimizer step did. All ranks hold equal values."""

    applied: bool
    """False when the gradient was not finite: weights, moments and the optimizer's own step are untouched."""
    grad_norm: torch.Tensor | float
    """Global gradient norm before clipping (inf or nan when not finite). Reading a tensor with `float` waits for the
    device, so it is read when it is logged."""


class Engine(Protocol):
    """Forward, backward, step and shards. Two implementations: `zero.engine.ZeroEngine` and `plain.PlainEngine`."""

    kind: str
    """"zero" or "plain"."""
    stage: int
    """ZeRO stage; 0 for the plain engine."""
    precision: str
    """"fp32", "amp" or "bf16"."""
    world: World
    device: torch.device
    module: nn.Module
    """The bare model (its parameters may be low precision, sharded or empty)."""
    model: nn.Module
    """What the objective calls; runs the engine's hooks, casts inputs, autocasts."""
    optimizer: torch.optim.Optimizer
    """The torch optimizer over the flats. Groups carry `name` and `weight_decay`."""
    replicated: bool
    """True when every rank holds all flats (plain engine): a save then splits the writing over ranks."""

    def backward(self, loss: torch.Tensor) -> None:
        """Gradient of one micro-batch's mean loss; the engine divides by n. Called n times a step, on all ranks."""
        ...

    def step(self, lr: float) -> StepResult:
        """Clip, then update at learning rate `lr`, times each parameter's own scale, unless the gradient is not finite
        on any rank."""
        ...

    def flats(self) -> list[Flat]:
        """This rank's flat masters, in a fixed order."""
        ...

    def layout(self) -> Layout:
        """By which rule parameters lie in the flats of every rank; `layout().slots(rank, i)` is `flats()[i].slots` there.
        Known without communication."""
        ...

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Full shape of every trainable parameter by name (ZeRO-3 parameters are empty in `module`)."""
        ...

    def frozen(self) -> dict[str, torch.Tensor]:
        """Full values of parameters that are not trained, by name, in fp32 on the CPU. All ranks call it."""
        ...

    def load_frozen(self, values: dict[str, torch.Tensor]) -> None:
        """Put back what `frozen()` gave. All ranks call it."""
        ...

    def refresh(self) -> None:
        """After masters (or optimizer state) were written in place: the working weights follow. All ranks call it."""
        ...

    def begin_load(self) -> None:
        """Before masters are written in place (ZeRO-3 releases persistent parameters). All ranks call it."""
        ...

    def full_state_dict(self) -> Iterator[tuple[str, torch.Tensor | None]]:
        """(name, full fp32 CPU tensor on rank 0, None elsewhere) of all parameters and buffers, in the module's order.
        All ranks iterate it in step."""
        ...

    def train(self) -> None: ...

    def eval(self) -> None: ...


Batch = dict[str, Any]
"""A micro-batch: `ids` int64 [m], `pixels` uint8 [m, 3, H, W] or [m, 3, T, H, W], `labels` int64 [m] or fp32 [m, K];
evaluation adds `valid` bool [m] (False = padding that only keeps ranks in step) and may give V views of each sample, one
after the other in `pixels` [m * V, ...] (`views` is V then); training may add `bad`, a list of ledger rows."""


class Loader(Protocol):
    """Training data as the trainer sees it."""

    fingerprint: dict[str, Any]
    """What must be equal on resume for the order of samples to be the same."""
    size: int
    """Samples in one epoch (summed over sources)."""
    give_up: Callable[[], bool]
    """Set by the trainer. Asked now and then while a batch is waited for; when it says yes, the stream ends."""

    def batches(self, seen: int) -> Iterator[Batch]:
        """This rank's micro-batches from global sample number `seen` on, without end. O(1) in `seen`."""
        ...

    def describe(self, x: int) -> str:
        """Which sample global sample number `x` is, in words: key, shard."""
        ...

    def consume(self, batch: Batch) -> None:
        """A finished step has consumed this micro-batch: its bad samples are counted now."""
        ...

    def audit(self, seen: int) -> dict[str, float]:
        """Sum bad samples over ranks, write the ledger, raise on all ranks alike when over budget. All ranks call it."""
        ...

    def summary(self) -> str | None:
        """The bad samples of the whole job in a line; None when there were none. All ranks call it."""
        ...

    def close(self) -> None: ...


class EvalLoader(Protocol):
    """One validation set: every sample exactly once over all ranks, the same number of batches on every rank."""

    name: str
    size: int
    protocol: str
    """Clips x crops that a sample is seen in, such as "4x3", which its metrics then carry in their names; "" = one."""

    def __iter__(self) -> Iterator[Batch]: ...
