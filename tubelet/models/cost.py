"""What a model costs, by arithmetic: nothing is allocated or computed (torch's meta device), any timm model works.

A MAC is one multiply-add. "GFLOPs" are 2 * MACs in the scaling paper and MACs in the ViViT and TokenLearner papers, so
this module says MACs. Convolutions, linear layers and both products of attention are counted, norms and softmax not.
Attention is counted in full: N * N positions, twice.

Activations are what a training step has to remember per sample, beside weights, gradients and optimizer. Attention is
fused (FlashAttention, Dao et al. 2022): q, k, v, the output and one number a row are kept, never N * N of anything.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode


def num_parameters(model: nn.Module) -> int:
    """Parameters, trainable or not, each shared one once."""
    return sum(parameter.numel() for parameter in model.parameters())


def input_shape(model: nn.Module, img_size: int | Sequence[int] | None = None) -> tuple[int, ...]:
    """(channels, ..., height, width) of one sample; `img_size` replaces the height and width the model says it has."""
    cfg: dict[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    shape = tuple(cfg.get("input_size", (3, 224, 224)))
    embed_size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    if img_size is None:
        img_size = embed_size if isinstance(embed_size, tuple) and len(embed_size) == 2 else shape[-2:]
    height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
    return (*shape[:-2], height, width)


def macs(model: nn.Module, img_size: int | Sequence[int] | None = None, *, norms: bool = False) -> int:
    """Multiply-adds of one forward pass of one sample. The model may be on any device, and is not touched.

    A ViT counts at the `img_size` it was built for; models without a fixed size (ResNets) at any. `norms` adds 5 for each
    number that leaves a LayerNorm and 2 for a BatchNorm, as fvcore counts and the LV-ViT and UniFormer papers print.
    """
    extra = 0

    def count_norm(module: nn.Module, _: Any, output: torch.Tensor) -> None:
        nonlocal extra
        extra += output.numel() * (5 if isinstance(module, nn.LayerNorm) else 2)

    kinds = (nn.LayerNorm, nn.modules.batchnorm._BatchNorm) if norms else ()
    hooks = [module.register_forward_hook(count_norm) for module in model.modules() if isinstance(module, kinds)]
    state, pixels = _shadow(model), torch.empty((1, *input_shape(model, img_size)), device="meta")
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            functional_call(model, state, (pixels,))
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    return counter.get_total_flops() // 2 + extra


def _shadow(model: nn.Module) -> dict[str, torch.Tensor]:
    """The model's parameters and buffers without memory, in fp32."""
    return {name: torch.empty_like(tensor, device="meta", dtype=torch.float32 if tensor.is_floating_point() else None)
            for name, tensor in (*model.named_parameters(), *model.named_buffers())}


def flops_per_sample_training(model: nn.Module, img_size: int | Sequence[int] | None = None) -> int:
    """Floating-point operations to train on one sample: 2 per MAC, forward once, backward twice the forward.

    This is what model FLOPs utilisation is measured against, so recomputing activations does not add to it.
    """
    return 6 * macs(model, img_size)


# ---------------------------------------------------------------------------------------------------- activations


def activation_bytes(model: nn.Module, img_size: int | Sequence[int] | None = None, dtype_bytes: int = 2,
                     checkpointing: bool = False) -> int:
    """Bytes of activations that training keeps per sample; `dtype_bytes` 2 for bf16, 4 for fp32.

    Without checkpointing: what autograd has saved when the forward pass is over, each storage once, the pixels included.
    With checkpointing (the model's own `set_grad_checkpointing`): the peak of the backward pass, which is the kept
    inputs of the blocks, all of the one block that is being recomputed, and the gradients in flight.
    The model may be on any device, and is not touched. Temporary results and the allocator's padding are not in it.
    """
    counts = [_kept(model, img_size, dtype_bytes, batch, checkpointing) for batch in (2, 3)]
    return counts[1] - counts[0]  # what does not grow with the batch (weights in other types, their gradients) drops out


def _kept(model: nn.Module, img_size: int | Sequence[int] | None, dtype_bytes: int, batch: int, checkpointing: bool) -> int:
    state, shape = _shadow(model), input_shape(model, img_size)
    for name, parameter in model.named_parameters():
        state[name].requires_grad_(parameter.requires_grad)
    own = {tensor.untyped_storage()._cdata for tensor in state.values()}
    saved: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    modes = [(module, module.training) for module in model.modules()]
    was = [(module, module.grad_checkpointing) for module in model.modules() if hasattr(module, "grad_checkpointing")]
    model.train()
    try:
        if hasattr(model, "set_grad_checkpointing"):
            model.set_grad_checkpointing(checkpointing)  # type: ignore[operator]
        pixels = torch.empty((batch, *shape), device="meta")
        if checkpointing:
            with _Live(dtype_bytes) as live, _fused():
                inside = {f"model.{name}": tensor for name, tensor in state.items()}
                functional_call(_Step(model), inside, (pixels.requires_grad_(),))
            return live.peak
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), _fused():
            result = functional_call(model, state, (pixels,))
        count = sum(_bytes(tensor, dtype_bytes) for key, tensor in saved.items() if key not in own)
        del result  # the graph, and with it the storages whose addresses are keys here, live until now
        return count
    finally:
        for module, training in modes:
            module.training = training
        for module, value in was:
            module.grad_checkpointing = value  # type: ignore[assignment]


class _Step(nn.Module):
    """Forward and backward in one call: blocks are recomputed while the shadows of the weights are still in place."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, pixels: torch.Tensor) -> None:
        outputs = [leaf for leaf in tree_leaves(self.model(pixels)) if isinstance(leaf, torch.Tensor)]
        torch.autograd.grad(torch.stack([leaf.sum() for leaf in outputs]).sum(), pixels)  # weights' would be constants


def _bytes(tensor: torch.Tensor, dtype_bytes: int) -> int:
    count = tensor.untyped_storage().nbytes()
    return count // tensor.element_size() * dtype_bytes if tensor.is_floating_point() else count


_library = torch.library.Library("tubelet", "FRAGMENT")
_library.define("fused_attention(Tensor query, Tensor key, Tensor value, float dropout_p=0.0) -> (Tensor, Tensor)")


@torch.library.impl(_library, "fused_attention", "Meta")
def _fused_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
                     dropout_p: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    *batch, heads, rows, _ = query.shape  # heads side by side in memory, so that joining them copies nothing
    out = query.new_empty(*batch, rows, heads, value.shape[-1]).transpose(-2, -3)
    return out, torch.empty(query.shape[:-1], dtype=torch.int32, device=query.device)  # fp32 in every precision: 4 bytes


FUSED_ATTENTION = torch.ops.tubelet.fused_attention.default
"""Stands for torch's fused kernels while activations are counted: an operation, so that who keeps what such kernels return
(selective recomputation) can know it. Its fourth argument is `dropout_p`."""


class _FusedAttention(torch.autograd.Function):
    """What a fused kernel keeps for its backward pass; nothing is computed."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, dropout_p: float) -> torch.Tensor:
        out, lse = FUSED_ATTENTION(query, key, value, dropout_p)
        ctx.save_for_backward(query, key, value, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return *(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3]), None


@contextlib.contextmanager
def _fused() -> Iterator[None]:
    """On the meta device torch would choose the attention that keeps the N * N matrix. (A TorchFunctionMode would be off
    while autograd recomputes blocks, so the function itself is exchanged.)"""
    real = F.scaled_dot_product_attention

    def fused(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: Any = None, dropout_p: float = 0.0,
              **kwargs: Any) -> torch.Tensor:
        return _FusedAttention.apply(query, key, value, dropout_p)  # type: ignore[return-value]

    F.scaled_dot_product_attention = fused
    try:
        yield
    finally:
        F.scaled_dot_product_attention = real


class _Live(TorchDispatchMode):
    """The largest sum of storages alive at one time, as far as they were made inside."""

    def __init__(self, dtype_bytes: int):
        super().__init__()
        self.dtype_bytes, self.now, self.peak = dtype_bytes, 0, 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.known:
                    count = _bytes(tensor, self.dtype_bytes)
                    self.known.add(storage._cdata)
                    self.now += count
                    weakref.finalize(storage, self._freed, storage._cdata, count)
        self.peak = max(self.peak, self.now)
        return result

    def _freed(self, key: int, count: int) -> None:
        self.known.discard(key)
        self.now -= count
