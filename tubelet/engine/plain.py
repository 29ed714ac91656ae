"""One GPU, or several with DistributedDataParallel, through Accelerate; and the CPU.

Every rank holds all weights and moments. Of Accelerate only process control, autocast and the DDP wrapping are used:
its DeepSpeed plugin and its data preparation would bypass our own.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tubelet.dist import World
from tubelet.engine.batch_norm import average_statistics
from tubelet.engine.layout import Layout, Whole
from tubelet.engine.optim import WHOLE_TENSORS, build_optimizer, parameter_groups, set_learning_rate
from tubelet.engine.precision import check_precision
from tubelet.engine.protocol import Flat, Slot, StepResult
from tubelet.engine.settings import EngineSettings


class PlainEngine:
    """`Engine` on Accelerate. All ranks build it, after `tubelet.dist.start`; the module moves to `device`."""

    kind = "plain"
    stage = 0
    replicated = True

    def __init__(self, module: nn.Module, settings: EngineSettings, *, world: World, device: torch.device,
                 micro_batch_size: int, accumulation: int):
        self.module, self.world, self.device, self.accumulation = module, world, device, accumulation
        self.precision, self.clip_grad = check_precision(module, settings, device), settings.clip_grad
        module.to(device)
        for param in module.parameters():
            param.data = param.data.contiguous()  # flats are views of it; channels-last weights are copied
        groups = parameter_groups(module, settings.optimizer)  # before wrapping: DDP must know what is frozen
        self.accelerator = _accelerator(device, self.precision)
        with warnings.catch_warnings():  # Accelerate would have buffers sent at the start only, by another name
            warnings.simplefilter("ignore", FutureWarning)
            self.model = self.accelerator.prepare_model(module)
        self._ddp = self.model if isinstance(self.model, DistributedDataParallel) else None
        # The optimizer steps on the flat views, so that moments are flat as the protocol says; Adafactor and LAMB see the
        # shapes. Nothing of Accelerate's wrapper around an optimizer (gradient scaling, XLA) is needed.
        self._flats = _flatten(groups, shaped=settings.optimizer.name in WHOLE_TENSORS)
        self.optimizer = build_optimizer(groups, settings.optimizer, device)
        self._params = {name: param for name, param in module.named_parameters() if param.requires_grad}
        self._backwards = 0
        self._synchronise_next()

    # ------------------------------------------------------------------------------------------------- a step

    def backward(self, loss: torch.Tensor) -> None:
        assert self._backwards < self.accumulation, "backward was called more often than the step has micro-batches"
        self.accelerator.backward(loss / self.accumulation)
        self._backwards += 1
        self._synchronise_next()

    def _synchronise_next(self) -> None:
        """DDP reduces gradients in the last micro-batch of a step only. It decides this in the forward pass, which is
        the objective's, so the switch is set beforehand (`no_sync` is the same switch as a context)."""
        if self._ddp is not None:
            self._ddp.require_backward_grad_sync = self._backwards % self.accumulation == self.accumulation - 1

    @torch.no_grad()
    def step(self, lr: float) -> StepResult:
        assert self._backwards == self.accumulation, f"{self._backwards} of {self.accumulation} micro-batches were seen"
        grads = []
        for flat in self._flats:
            param = self._params[flat.slots[0].name]
            # A parameter that took no part has a zero gradient, as under ZeRO: it still decays.
            grad = torch.zeros_like(flat.key) if param.grad is None else param.grad.reshape(flat.key.shape)
            flat.key.grad = grad
            grads.append(grad)
        # After the reduction all ranks hold equal gradients, so they decide alike without asking.
        norm = float(torch.nn.utils.get_total_norm(grads))
        applied = math.isfinite(norm)
        if applied:
            if self.clip_grad and norm + 1e-6 > self.clip_grad:
                torch._foreach_mul_(grads, self.clip_grad / (norm + 1e-6))
            set_learning_rate(self, lr)
            self.optimizer.step()
        for flat in self._flats:
            flat.key.grad = None
        for param in self._params.values():
            param.grad = None
        self._backwards = 0
        self._synchronise_next()
        return StepResult(applied, norm if applied else math.inf)

    # ------------------------------------------------------------------------------------------------- shards

    def flats(self) -> list[Flat]:
        return self._flats

    def layout(self) -> Layout:
        sizes = {name: param.numel() for name, param in self._params.items()}
        return Whole(self.world.size, sizes, [[slot.name for slot in flat.slots] for flat in self._flats])

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(param.shape) for name, param in self._params.items()}

    def frozen(self) -> dict[str, torch.Tensor]:
        return {name: param.detach().float().cpu().clone() for name, param in self._frozen()}

    @torch.no_grad()
    def load_frozen(self, values: dict[str, torch.Tensor]) -> None:
        for name, param in self._frozen():
            param.copy_(values[name])

    def _frozen(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, param) for name, param in self.module.named_parameters() if name not in self._params]

    def begin_load(self) -> None:
        """Nothing to release: masters are the model's own storage."""

    def refresh(self) -> None:
        """Nothing to follow: masters are the model's own storage."""

    def full_state_dict(self) -> Iterator[tuple[str, torch.Tensor | None]]:
        average_statistics(self.module)
        for name, tensor in self.module.state_dict().items():
            if self.world.rank != 0:
                yield name, None
            else:
                value = tensor.detach().cpu().clone()
                yield name, value.float() if value.is_floating_point() else value

    # ------------------------------------------------------------------------------------------------- modes

    def train(self) -> None:
        self.model.train()

    def eval(self) -> None:
        """Also averages BatchNorm statistics over ranks, so that all ranks judge the same model. All ranks call it."""
        average_statistics(self.module)
        self.model.eval()

    def close(self) -> None:
        """Let go of what Accelerate keeps; for programs (and tests) that build several engines."""
        self.accelerator.free_memory()


def _flatten(groups: list[dict[str, Any]], *, shaped: bool) -> list[Flat]:
    """A flat for each parameter, over its own storage; the groups' `params` become their keys, of the parameters' shapes
    where `shaped`."""
    flats = []
    for index, group in enumerate(groups):
        keys = []
        for name, param in zip(group["param_names"], group["params"]):
            key = (param.data.view(param.shape) if shaped else param.data.view(-1)).requires_grad_()
            keys.append(key)
            flats.append(Flat(master=key.detach().view(-1), key=key, group=index, slots=[Slot(name, 0, key.numel(), 0)]))
        group["params"] = keys
    return flats


def _accelerator(device: torch.device, precision: str) -> Any:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedDataParallelKwargs

    AcceleratorState._reset_state(True)  # it is shared by the process and refuses another precision or process group
    # Models with paths that a batch may not take leave parameters without a gradient; looking for them costs one walk
    # over the graph a step. BatchNorm statistics are averaged when they are needed (batch_norm.py), not sent every step.
    ddp = DistributedDataParallelKwargs(find_unused_parameters=True, broadcast_buffers=False, gradient_as_bucket_view=True)
    return Accelerator(cpu=device.type == "cpu", mixed_precision="bf16" if precision == "amp" else "no",
                       kwargs_handlers=[ddp])
