"""Training with DeepSpeed ZeRO (arXiv 1910.02054): the default engine.

DeepSpeed shards optimizer state (stage 1), gradients (2) and parameters (3), accumulates, reduces, clips and skips.
Not used of it: its optimizers (they compile code at start), schedulers, data loaders, checkpoints (`checkpoint.py` is
ours) and stage 0, which lets a NaN gradient into the weights. The model is built whole on each rank and then sharded,
so it must fit into the memory of one host once per rank.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from tubelet.dist import World
from tubelet.engine.batch_norm import average_statistics
from tubelet.engine.blocks import blocks_of
from tubelet.engine.optim import build_optimizer, parameter_groups, set_learning_rate
from tubelet.engine.precision import check_precision
from tubelet.engine.protocol import StepResult
from tubelet.engine.settings import EngineSettings
from tubelet.engine.zero.deepspeed_config import derive
from tubelet.engine.zero.shards import InShards, Shards

_joined: Any = None  # the process group that DeepSpeed's module-level state belongs to


class ZeroEngine(InShards):
    """`Engine` on DeepSpeed. All ranks build it, after `tubelet.dist.start`; the module moves to `device`."""

    kind = "zero"
    replicated = False

    def __init__(self, module: nn.Module, settings: EngineSettings, *, world: World, device: torch.device,
                 micro_batch_size: int, accumulation: int):
        self.module, self.world, self.device, self.accumulation = module, world, device, accumulation
        self.stage, self.precision = settings.zero.stage, check_precision(module, settings, device)
        groups = parameter_groups(module, settings.optimizer)
        trained = [param for group in groups for param in group["params"]]
        self._shapes = {name: tuple(param.shape) for group in groups
                        for name, param in zip(group["param_names"], group["params"])}
        config = derive(settings, self.precision, world_size=world.size, micro_batch_size=micro_batch_size,
                        accumulation=accumulation, numel=sum(param.numel() for param in trained), gpu=device.type == "cuda",
                        largest_block=max((_numel(block) for _, block in blocks_of(module)), default=0))
        optimizer = build_optimizer(groups, settings.optimizer, device)
        names = {param: name for name, param in module.named_parameters()}
        # DeepSpeed casts the parameters and then moves them: these stay where the module was built, until `widen`.
        originals = {names[param]: param.data for param in trained} if self.precision == "bf16" else {}
        if self.stage == 3:
            _gather_by_block(module)
        self.deepspeed = _initialize(module, optimizer, config)
        self.model = self.deepspeed
        if self.precision == "bf16":
            self.deepspeed.register_forward_pre_hook(_inputs_to_bf16, with_kwargs=True)
        self.optimizer = self.deepspeed.optimizer.optimizer
        self._shards = Shards(self.deepspeed.optimizer, self.stage, module, names, world.size)
        if originals:
            self._shards.widen(originals)
        self._backwards = 0

    # ------------------------------------------------------------------------------------------------- a step

    def backward(self, loss: torch.Tensor) -> None:
        assert self._backwards < self.accumulation, "backward was called more often than the step has micro-batches"
        self.deepspeed.backward(loss)
        self._backwards += 1
        if self._backwards < self.accumulation:
            self.deepspeed.step()  # not a boundary: only counts the micro-batch

    def step(self, lr: float) -> StepResult:
        assert self._backwards == self.accumulation, f"{self._backwards} of {self.accumulation} micro-batches were seen"
        set_learning_rate(self, lr)
        self.deepspeed.step()
        self._backwards = 0
        norm = self.deepspeed.get_global_grad_norm()
        return StepResult(applied=self.deepspeed.was_step_applied(), grad_norm=norm)  # type: ignore[arg-type]

    # ------------------------------------------------------------------------------------------------- shards

    def full_state_dict(self) -> Iterator[tuple[str, torch.Tensor | None]]:
        average_statistics(self.module)
        return self._shards.full_state_dict()

    # ------------------------------------------------------------------------------------------------- modes

    def train(self) -> None:
        self.deepspeed.train()

    def eval(self) -> None:
        """Also averages BatchNorm statistics over ranks, so that all ranks judge the same model. All ranks call it."""
        average_statistics(self.module)
        self.deepspeed.eval()

    def close(self) -> None:
        """Remove DeepSpeed's hooks; for programs (and tests) that build several engines."""
        self.deepspeed.destroy()


def _inputs_to_bf16(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    def cast(value: Any) -> Any:
        floating = isinstance(value, torch.Tensor) and value.is_floating_point()
        return value.to(torch.bfloat16) if floating else value

    return tuple(cast(value) for value in args), {name: cast(value) for name, value in kwargs.items()}


def _numel(module: nn.Module) -> int:
    return sum(param.numel() for param in module.parameters())


def _gather_by_block(module: nn.Module) -> None:
    """Stage 3 gathers and releases a block's parameters together, by one hook instead of one for each of its
    layers: fewer and larger messages, less Python. A compiler then meets no hook inside of a block."""
    from deepspeed.utils import set_z3_leaf_module

    for _, block in blocks_of(module):
        set_z3_leaf_module(block, True)


@contextlib.contextmanager
def _reduced_one_by_one() -> Iterator[None]:
    """Gradients of leaf modules are reduced as they appear, like all others.

    DeepSpeed would reduce them in a backward hook of the module. That hook comes before the gradients when the module's
    input needs none (a frozen stem), and more than once when the module runs more than once in a micro-batch; both end in
    errors (0.19.8). It is meant for experts that a batch may not take, which no block here is.
    """
    from deepspeed.runtime.zero import stage3

    theirs = stage3.z3_leaf_parameter
    stage3.z3_leaf_parameter = lambda param: False
    try:
        yield
    finally:
        stage3.z3_leaf_parameter = theirs


def _initialize(module: nn.Module, optimizer: torch.optim.Optimizer, config: dict[str, Any]) -> Any:
    """`deepspeed.initialize` on the process group that exists, without its compiler, its MPI discovery and its noise."""
    global _joined
    import deepspeed
    import deepspeed.ops
    from deepspeed.comm import comm
    from deepspeed.runtime import torch_autocast
    from deepspeed.utils import groups
    from deepspeed.utils import logger as deepspeed_logger

    deepspeed_logger.setLevel(logging.WARNING)
    # Every collective of DeepSpeed says that torch's function of that name is deprecated.
    warnings.filterwarnings("ignore", category=FutureWarning, message=r".*(all_gather|reduce_scatter).*")
    # Without this the first engine on a CPU compiles a shared-memory collective that training never calls (45 s), and
    # without a compiler it fails.
    setattr(deepspeed.ops, "__compatible_ops__", {})  # noqa: B010 - a lazy attribute of the module
    default_group = torch.distributed.group.WORLD
    if _joined is not default_group:  # DeepSpeed keeps groups at module level; those of an earlier start are dead
        comm.cdb = None
        groups._release_process_group_references()
        backend = torch.distributed.get_backend()
        comm.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
        _joined = default_group
    torch_autocast.TORCH_AUTOCAST_INITIALIZED = False  # never reset there: an earlier amp engine would leave its mark
    if optimizer.__class__.__module__.startswith("tubelet."):
        deepspeed_logger.setLevel(logging.ERROR)  # "untested optimizer": tested here
    try:
        with _reduced_one_by_one():
            engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)  # type: ignore[arg-type]
    finally:
        deepspeed_logger.setLevel(logging.WARNING)
    return engine
