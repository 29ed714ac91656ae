"""Plain Vision Transformers on timm's `VisionTransformer`, and the papers' initial weights.

Papers: "An Image is Worth 16x16 Words" (2020), "Scaling Vision Transformers" (2021). Names and sizes: names.py.
The module itself is timm's, so timm's weights, hooks and layer names fit; what is ours is the initialisation.
Not here: the representation layer ("pre-logits"), which later work drops and timm has removed.

Legend: B batch, H W rows cols, N tokens, D width, K classes, h heads, d head width.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from timm.layers import LayerNorm2d, LayerScale
from timm.models import build_model_with_cfg
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import nn

from tubelet.models.names import SIZES, resolve_name

__all__ = ["HEADS", "SIZES", "create_vit", "init_head", "init_weights", "papers_init_fits", "resolve_name"]

# The three ways the papers pool, as keyword arguments of any ViT here. timm would move the final LayerNorm behind the
# average (`fc_norm`); the papers normalise all tokens, then average. GELU is the exact one unless
# act_layer="gelu_tanh", which is what the published JAX weights were trained with (features differ by 1e-3 of a std).
HEADS: dict[str, dict[str, Any]] = {
    "token": {"class_token": True, "global_pool": "token"},
    "gap": {"class_token": False, "global_pool": "avg", "fc_norm": False},
    "map": {"class_token": False, "global_pool": "map"},
}


def size_kwargs(size: str) -> dict[str, Any]:
    """timm's keyword arguments for one row of the size table."""
    row = SIZES[size]
    return {"embed_dim": row.width, "depth": row.depth, "num_heads": row.heads, "mlp_ratio": row.mlp / row.width}


def create_vit(name: str, *, size: str, patch_size: int, pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """The model behind a registered plain ViT name; `kwargs` go to timm's `VisionTransformer` and win."""
    arguments = {**size_kwargs(size), "patch_size": patch_size, **kwargs}
    return build_model_with_cfg(VisionTransformer, name, pretrained, pretrained_filter_fn=checkpoint_filter_fn,
                                feature_cfg={"out_indices": 3, "feature_cls": "getter"}, **arguments)


# ------------------------------------------------------------------------------------------------ initial weights

# parameters that a model owns without a layer around them
_LOOSE = {"cls_token", "reg_token", "pos_embed", "latent", "temporal_cls_token", "temporal_pos_embed"}
_NORMS = (nn.LayerNorm, nn.GroupNorm, LayerNorm2d)


def papers_init_fits(model: nn.Module) -> bool:
    """Whether `init_weights` knows every parameter of this model: a ViT made of the papers' parts, or one that says
    so by `papers_init`."""
    if not isinstance(model, VisionTransformer) and not getattr(model, "papers_init", False):
        return False
    for module in model.modules():
        own = {name for name, _ in module.named_parameters(recurse=False)}
        if own and not own <= _LOOSE and not isinstance(module, (nn.Linear, nn.Conv2d, nn.Conv3d, LayerScale, *_NORMS)):
            return False
    return True


@torch.no_grad()
def init_weights(model: nn.Module, head_init: str = "default", head_bias: float = 0.0, scheme: str = "paper") -> None:
    """Give every parameter its initial value, drawing from torch's CPU generator in the order of the module tree.

    ================================  =============================================================================
    tensor                            scheme="paper": big_vision and the authors' JAX code
    ================================  =============================================================================
    patch kernel, other convolutions  LeCun normal, cut at two standard deviations; biases 0
    q, k, v kernels                   Xavier uniform, each projection by itself (fan-out D, not the fused 3D: that
                                      would make them sqrt(2) too small); biases 0
    attention output                  Xavier uniform; bias 0
    MLP (blocks, MAP head, TokenLearner 1.1, TokenFuser)   Xavier uniform; biases N(0, 1e-6 ** 2)
    mixing layer of the TokenFuser    0, so that the block around it starts as the identity
    LayerNorm, GroupNorm              scale 1, bias 0; last norm of a residual ResNet branch: scale 0
    LayerScale                        its `init_values`
    position table                    N(0, 0.02 ** 2)
    class token, registers            0, and N(0, 1e-6 ** 2)
    probe of the MAP head             Xavier uniform
    classifier, head_init="zero"      weight 0, bias `head_bias` (the papers)
    classifier, head_init="default"   truncated normal 0.02 (timm's), bias `head_bias`
    ================================  =============================================================================

    scheme="timm" leaves everything but the classifier as timm made it (the way for models that are not ViTs).
    """
    if scheme == "paper":
        assert papers_init_fits(model), f"no paper's initialisation for {type(model).__name__}"
        for name, module in model.named_modules():
            _init_module(name, module)
    init_head(model, head_init, head_bias)


def _init_module(name: str, module: nn.Module) -> None:
    leaf = name.rpartition(".")[2]
    if isinstance(module, nn.Linear):
        if leaf == "mix":
            nn.init.zeros_(module.weight)
        else:
            parts = {"qkv": 3, "kv": 2}.get(leaf, 1)
            for part in module.weight.chunk(parts):
                nn.init.xavier_uniform_(part)
        if module.bias is not None:
            nn.init.normal_(module.bias, std=1e-6) if "mlp" in name.split(".") else nn.init.zeros_(module.bias)
    elif isinstance(module, (nn.Conv2d, nn.Conv3d)):
        fan_in = module.weight[0].numel()
        std = math.sqrt(1 / fan_in) / 0.87962566103423978  # what cutting at two deviations takes away
        nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, _NORMS):
        if module.weight is not None:
            nn.init.constant_(module.weight, 0.0 if leaf == "norm3" else 1.0)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, LayerScale):
        nn.init.constant_(module.gamma, module.init_values)
    else:
        for loose, parameter in module.named_parameters(recurse=False):
            if loose.endswith("pos_embed"):
                nn.init.normal_(parameter, std=0.02)
            elif loose == "reg_token":
                nn.init.normal_(parameter, std=1e-6)
            elif loose == "latent":
                nn.init.xavier_uniform_(parameter[0])
            else:
                nn.init.zeros_(parameter)


@torch.no_grad()
def init_head(model: nn.Module, head_init: str = "zero", head_bias: float = 0.0) -> None:
    """Set the classifier(s): weight zero or truncated normal 0.02, bias `head_bias`. Without a classifier, nothing."""
    heads = model.get_classifier()  # type: ignore[operator]
    for head in heads if isinstance(heads, (tuple, list)) else [heads]:
        for module in head.modules() if isinstance(head, nn.Module) else ():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.zeros_(module.weight) if head_init == "zero" else nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.constant_(module.bias, head_bias)
