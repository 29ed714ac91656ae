"""The repeated blocks of a model, recomputation of their activations, and their compilation.

A block is treated by giving this one module another `forward`: its class, its parameters' names, its hooks and the
state dict stay as they are. Hooks, and with them all that DeepSpeed does around a block, remain outside of what is
recomputed or compiled. Recomputation goes inside of compilation, as the compiler wants it.

Not here: which combinations are offered (build.py), and the models' own `grad_checkpointing`, which is left off.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from tubelet.engine import selective
from tubelet.engine.settings import ActivationCheckpointing, CompileSettings
from tubelet.errors import ConfigError

_LIST = re.compile(r"block|layer|stage")
"""How lists of blocks are called: `blocks`, `blocks3`, `temporal_blocks`, `layers`, `layer1`, `stages`."""


def blocks_of(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """(name, block) of the repeated residual blocks of a model, in the order of its modules; [] when none is recognised.

    The rule: a block is made of parts, it stands in a list (ModuleList, Sequential, or a module called a stage) whose name
    says block, layer or stage, and no other such module is inside of it. That finds the blocks of the ViTs, the video
    models, ConvNeXt, Swin, ResNet and most of timm; it passes over stems, TokenLearners and heads. Only names and types
    are looked at, so a model on the meta device will do.
    """
    found: dict[str, nn.Module] = {}
    for path, holder in module.named_modules():
        words = [word for word in path.split(".") if not word.isdigit()]
        is_list = isinstance(holder, (nn.ModuleList, nn.Sequential)) and bool(words) and bool(_LIST.search(words[-1]))
        if not is_list and not type(holder).__name__.endswith("Stage"):
            continue
        for name, child in holder.named_children():
            composed = any(True for _ in child.children()) and any(True for _ in child.parameters())
            if composed and not isinstance(child, (nn.ModuleList, nn.Sequential)) and (is_list or not _between_stages(name)):
                found[f"{path}.{name}" if path else name] = child
    inside = {id(child) for child in found.values()}
    return [(name, child) for name, child in found.items()
            if not any(id(part) in inside for part in child.modules() if part is not child)]


def _between_stages(name: str) -> bool:
    """Whether a child of a stage is no block but makes the map smaller before them."""
    return bool(re.search(r"down|embed|pool|norm", name))


def need_blocks(module: nn.Module, option: str) -> list[tuple[str, nn.Module]]:
    """`blocks_of`, or `ConfigError` that names the model when there are none."""
    blocks = blocks_of(module)
    if not blocks:
        raise ConfigError(f"{option} is set, but no repeated blocks are known in {type(module).__name__} (a list of "
                          "modules called blocks, layers or stages).", f"{option}=null, or another model")
    return blocks


# ---------------------------------------------------------------------------------------------- recomputation


def apply_activation_checkpointing(module: nn.Module, settings: ActivationCheckpointing) -> None:
    """From now on every `settings.every`-th block forgets its activations and computes them again in the backward pass.

    Results and gradients stay the same to the bit: random numbers (drop path, dropout) are drawn again as they were, and
    BatchNorm's running statistics see a batch once. Without gradients nothing changes. Raises `ConfigError` when the model
    has no known blocks.
    """
    for _, block in need_blocks(module, "activation_checkpointing")[:: settings.every]:
        block.forward = _Recomputed(block.forward, block, settings.mode == "selective")


class _Recomputed:
    """A block's `forward` that keeps its inputs only (and with `products` what selective.py keeps)."""

    def __init__(self, forward: Callable[..., Any], block: nn.Module, products: bool):
        self.forward, self.block, self.products = forward, block, products

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.forward(*args, **kwargs)
        if torch.compiler.is_compiling():  # the compiler recomputes without touching the statistics again
            if self.products:
                return checkpoint(self.forward, *args, use_reentrant=False, context_fn=selective.compiled_contexts, **kwargs)
            return checkpoint(self.forward, *args, use_reentrant=False, **kwargs)
        forward, first, again = self.forward, contextlib.nullcontext(), contextlib.nullcontext()
        if self.products:
            first, again = selective.contexts()
            forward = functools.partial(_kept_from, self.forward, first)
        again = _without_statistics(self.block, again)
        return checkpoint(forward, *args, use_reentrant=False, context_fn=lambda: (first, again), **kwargs)


def _kept_from(forward: Callable[..., Any], keep: selective.Keep, *args: Any, **kwargs: Any) -> Any:
    return keep.returned(forward(*args, **kwargs))


@contextlib.contextmanager
def _without_statistics(block: nn.Module, inner: Any) -> Iterator[None]:
    norms = [part for part in block.modules() if isinstance(part, _BatchNorm)]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:  # the statistics stay arguments, since recomputation must save the same tensors
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        with inner:
            yield
    finally:
        for norm, (momentum, count) in zip(norms, before):
            norm.momentum, norm.num_batches_tracked = momentum, count


# ------------------------------------------------------------------------------------------------- compilation


def apply_compile(module: nn.Module, settings: CompileSettings) -> None:
    """From now on every block runs compiled; the first steps compile. Call it after `apply_activation_checkpointing`.

    Under inductor random numbers are drawn as without a compiler (`fallback_random`), so drop path is the same function of
    (seed, step, micro-batch) whether a run is compiled or not: `compile` may change on resume. It costs a kernel of its own
    for each draw. Raises `ConfigError` when the model has no known blocks.
    """
    blocks = need_blocks(module, "compile")
    # Blocks of one class share their compiled code, in one variant for each drop path rate, mode and shape. Past the limit
    # the compiler would run the rest uncompiled without an error.
    limit = 8 + 8 * len(blocks)
    for _, block in blocks:
        block.forward = _Compiled(block.forward, settings.backend, settings.mode, limit)


class _Compiled:
    """A block's `forward`, compiled at its first call. Copies compile anew: they are about another block."""

    def __init__(self, forward: Callable[..., Any], backend: str, mode: str, limit: int):
        self.forward, self.backend, self.mode, self.limit = forward, backend, mode, limit
        self._compiled: Callable[..., Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_compiled": None}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._compiled is None:
            self._compiled = _compiled(self.forward, self.backend, self.mode, self.limit)
        return self._compiled(*args, **kwargs)


def _compiled(forward: Callable[..., Any], backend: str, mode: str, limit: int) -> Callable[..., Any]:
    compiler: Callable[..., Any] = torch.compile
    if "recompile_limit" in inspect.signature(torch.compile).parameters:
        compiler = functools.partial(compiler, recompile_limit=limit)
    else:  # torch before 2.13 has one limit for all that is compiled
        config: Any = importlib.import_module("torch._dynamo.config")
        config.recompile_limit = max(config.recompile_limit, limit)
    if backend != "inductor":
        return compiler(forward, backend=backend, dynamic=False)
    from torch._inductor import list_mode_options

    options = {**list_mode_options(mode), "fallback_random": True}
    return compiler(forward, backend=backend, dynamic=False, options=options)
