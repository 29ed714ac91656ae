"""What a model costs, by arithmetic: nothing is allocated or computed (torch's meta device), any timm model works.

A MAC is one multiply-add. "GFLOPs" are 2 * MACs in the scaling paper and MACs in the ViViT and TokenLearner papers, so
this module says MACs. Convolutions, linear layers and both products of attention are counted, norms and softmax not.
Attention is counted in full: N * N positions, twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
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


def macs(model: nn.Module, img_size: int | Sequence[int] | None = None) -> int:
    """Multiply-adds of one forward pass of one sample. The model may be on any device, and is not touched.

    A ViT counts at the `img_size` it was built for; models without a fixed size (ResNets) at any.
    """
    state = {name: torch.empty_like(tensor, device="meta", dtype=torch.float32 if tensor.is_floating_point() else None)
             for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    pixels = torch.empty((1, *input_shape(model, img_size)), device="meta")
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            functional_call(model, state, (pixels,))
    finally:
        model.train(was_training)
    return counter.get_total_flops() // 2


def flops_per_sample_training(model: nn.Module, img_size: int | Sequence[int] | None = None) -> int:
    """Floating-point operations to train on one sample: 2 per MAC, forward once, backward twice the forward.

    This is what model FLOPs utilisation is measured against, so recomputing activations does not add to it.
    """
    return 6 * macs(model, img_size)
