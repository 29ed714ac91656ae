"""Hybrids (ResNet below, ViT above) and BiT ResNets of the papers' tables that timm has no name for, from timm's parts.

Papers: ViT (2020), section 4.1 and table 2; BiT (Kolesnikov et al. 2020), section 3. timm has the released ones
(`names.ALIASES`). A hybrid's "/16" is its total stride: stages (3, 4, 9) end at 16, (3, 4, 6, 3) at 32; its patches are
single positions of the map. Its stem has the norm after the convolution; a BiT ResNet has it before. They do not mix.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from timm.layers import HybridEmbed, StdConv2d, StdConv2dSame
from timm.models import build_model_with_cfg
from timm.models.resnetv2 import ResNetV2
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn

from tubelet.models.vit import size_kwargs


def create_hybrid(name: str, *, size: str, layers: tuple[int, ...], pretrained: bool = False, in_chans: int = 3,
                  **kwargs: Any) -> VisionTransformer:
    """A ResNet of `layers` blocks a stage (without its classifier) under the ViT of that size."""
    backbone = ResNetV2(layers=list(layers), num_classes=0, global_pool="", in_chans=in_chans, preact=False,
                        stem_type="same", conv_layer=partial(StdConv2dSame, eps=1e-8))
    arguments = {**size_kwargs(size), "patch_size": 1, "in_chans": in_chans, **kwargs}
    return build_model_with_cfg(VisionTransformer, name, pretrained, pretrained_filter_fn=checkpoint_filter_fn,
                                feature_cfg={"out_indices": 3, "feature_cls": "getter"},
                                embed_layer=partial(HybridEmbed, backbone=backbone), **arguments)


def create_bit(name: str, *, layers: tuple[int, ...], width_factor: int, pretrained: bool = False,
               **kwargs: Any) -> ResNetV2:
    """A BiT ResNet: pre-activation, GroupNorm, standardised convolutions; `width_factor` 2 in "R50x2"."""
    return build_model_with_cfg(ResNetV2, name, pretrained, feature_cfg={"flatten_sequential": True}, layers=layers,
                                width_factor=width_factor, stem_type="fixed", conv_layer=partial(StdConv2d, eps=1e-8),
                                **kwargs)
