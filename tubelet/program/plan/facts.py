"""What a plan must know of a model: its weights as the engines will group them, its cost, its activations. Meta device."""

from __future__ import annotations

import copy
import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tubelet.engine import selective
from tubelet.engine.blocks import apply_activation_checkpointing, blocks_of
from tubelet.engine.optim import parameter_groups
from tubelet.engine.settings import ActivationCheckpointing, OptimizerSettings
from tubelet.models.build import build_meta
from tubelet.models.cost import FUSED_ATTENTION, activation_bytes, flops_per_sample_training, input_shape
from tubelet.models.settings import ModelSettings

selective.keep_also(FUSED_ATTENTION, 3)


@dataclass(frozen=True)
class Weight:
    """One parameter."""

    shape: tuple[int, ...]
    group: int | None
    """Its optimizer group; None = frozen."""
    low: bool
    """Its layer is a dense or a convolution, which autocast runs in bf16."""

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


class Facts:
    """A model, counted. `module` is on the meta device; frozen parameters are frozen in it."""

    def __init__(self, model: nn.Module, optimizer: OptimizerSettings, img_size: Any = None):
        groups = parameter_groups(model, optimizer)
        self.module, self.img_size = model, img_size
        places = {id(param): index for index, group in enumerate(groups) for param in group["params"]}
        low = {id(param) for part in model.modules() if type(part) in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
               for param in part.parameters(recurse=False)}

        def weight(param: nn.Parameter) -> Weight:
            return Weight(tuple(param.shape), places.get(id(param)), id(param) in low)

        self.groups = [[weight(param) for param in group["params"]] for group in groups]
        """Trained parameters as the optimizer's groups have them, in their order."""
        self.frozen = [weight(param) for param in model.parameters() if id(param) not in places]
        self.trained = [item for group in self.groups for item in group]
        self.buffer_bytes = sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
        persistent = {name for name, value in model.state_dict(keep_vars=True).items()
                      if not isinstance(value, nn.Parameter)}
        self.saved_buffer_bytes = sum(value.numel() * value.element_size() for name, value in model.named_buffers()
                                      if name in persistent)
        blocks = [part for _, part in blocks_of(model)]
        self.largest_block = max((sum(param.numel() for param in part.parameters()) for part in blocks), default=0)
        self.input_shape = input_shape(model, img_size)
        self.unit = "clips" if len(self.input_shape) == 4 else "images"
        self.layer_decay = optimizer.layer_decay

    @property
    def parameters(self) -> int:
        return sum(item.numel for item in (*self.trained, *self.frozen))

    @property
    def trained_elements(self) -> int:
        return sum(item.numel for item in self.trained)

    @property
    def convolutional(self) -> bool:
        """More convolutions than a patch embedding and what TokenLearners have: its blocks hold some."""
        return any(isinstance(part, (nn.Conv2d, nn.Conv3d)) for _, block in blocks_of(self.module)
                   for part in block.modules())

    @property
    def width(self) -> int:
        return int(getattr(self.module, "embed_dim", None) or getattr(self.module, "num_features", 0) or 0)

    @functools.cached_property
    def flops(self) -> int:
        """Floating-point operations to train on one sample, nothing recomputed."""
        return flops_per_sample_training(self.module, self.img_size)

    @property
    def frames(self) -> int:
        return self.input_shape[1] if len(self.input_shape) == 4 else 1

    def activations(self, precision: str, checkpointing: ActivationCheckpointing | None) -> int:
        """Bytes that one sample takes at the peak of forward and backward, its pixels in uint8 and fp32 included.

        Counted on the model as the engine changes it (`every` and `selective` too). `amp` keeps the inputs of LayerNorms in
        fp32: 2 bytes more for each of their numbers (an estimate when blocks are recomputed: counted for kept inputs only).
        """
        key = (checkpointing.mode, checkpointing.every) if checkpointing else None
        nbytes = self._counted(key)
        pixels = 5 * math.prod(self.input_shape)
        if precision == "fp32":
            return 2 * nbytes + pixels
        if precision == "amp":
            share = 1.0 if key is None else nbytes / max(1, self._counted(None))
            return nbytes + int(2 * self._normed * share) + pixels
        return nbytes + pixels

    @functools.cache  # noqa: B019 - one object a program
    def _counted(self, key: tuple[str, int] | None) -> int:
        """Bytes in bf16, pixels as the model gets them included."""
        if key is None:
            return activation_bytes(self.module, self.img_size)
        changed = copy.deepcopy(self.module)
        apply_activation_checkpointing(changed, ActivationCheckpointing(mode=key[0], every=key[1]))  # type: ignore[arg-type]
        # Behind the wrapper the model's own `set_grad_checkpointing` is not seen, so what is counted is what the engine did.
        return activation_bytes(_Bare(changed, self.input_shape), None, checkpointing=True)

    @functools.cached_property
    def _normed(self) -> int:
        """Numbers that enter LayerNorms for one sample."""
        found = 0

        def count(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            nonlocal found
            found += inputs[0].numel()

        hooks = [part.register_forward_pre_hook(count) for part in self.module.modules() if isinstance(part, nn.LayerNorm)]
        try:
            with torch.no_grad():
                self.module(torch.empty((1, *self.input_shape), device="meta"))
        finally:
            for hook in hooks:
                hook.remove()
        return found


class _Bare(nn.Module):
    """A model of which only `forward` and the input's shape are seen."""

    def __init__(self, inner: nn.Module, shape: tuple[int, ...]):
        super().__init__()
        self.inner = inner
        self.pretrained_cfg: Any = {"input_size": shape}

    def forward(self, pixels: torch.Tensor) -> Any:
        return self.inner(pixels)


def facts_of(model: ModelSettings, optimizer: OptimizerSettings) -> Facts:
    """Build the model on the meta device and count it. Raises `ConfigError` as a run would."""
    return Facts(build_meta(model), optimizer, model.img_size)
