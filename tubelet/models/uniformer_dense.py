"""UniFormer as a backbone for detection, segmentation and pose: four maps, each normalised over channels.

Paper: Li et al., TPAMI 2023. Weights of the classifier fit (their last BatchNorm and head are left over, four LayerNorms
are new). Not here: the detectors and decoders. The released code has no "dilated" attention either.

Legend: B batch, T frames, H W rows cols, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from timm.models._features import FeatureInfo
from torch import nn

from tubelet.errors import ConfigError
from tubelet.models.uniformer import UniFormer, check_input, init_weights, official_key
from tubelet.models.uniformer_blocks import channels_first
from tubelet.models.weights import Report, load_weights


class UniFormerFeatures(UniFormer):
    """Images [B, 3, H, W] -> maps at strides 4, 8, 16 and 32 (those in `out_indices`), [B, D, H/4, W/4] and so on.

    Made by `timm.create_model("uniformer_small", features_only=True, attention="hybrid", window_size=14)`; the
    arguments are those of `UniFormer`. Any size from 32 pixels on; rows and columns that a stride leaves over are cut off.
    A window larger than the map answers differently from attention over the whole map (padding takes part), so at 224
    pixels, where stage 3 has 14 x 14 positions, windows of 14 or divisors of 14 are the ones without padding.
    """

    def __init__(self, img_size: int | tuple[int, int] = 224, in_chans: int = 3, num_classes: int = 0, *,
                 out_indices: tuple[int, ...] = (0, 1, 2, 3), dims: tuple[int, ...] = (64, 128, 320, 512), **kwargs: Any):
        if kwargs.pop("aux_head", False):
            raise ConfigError("`features_only` is set, but a token-labeled UniFormer has no form for dense prediction.",
                              "the name without _tl")
        if not out_indices or any(index not in range(4) for index in out_indices):
            raise ConfigError(f"`out_indices` = {tuple(out_indices)}: the four maps are 0 to 3.", "out_indices=(0, 1, 2, 3)")
        super().__init__(img_size, in_chans, 0, dims=dims, **kwargs)
        del self.norm, self.head
        for number, dim in enumerate(dims, 1):
            self.add_module(f"norm{number}", nn.LayerNorm(dim, eps=1e-6))
        self.out_indices = tuple(out_indices)
        self.feature_info = FeatureInfo(self.feature_info, self.out_indices)
        init_weights(self)

    def forward_features(self, x: torch.Tensor, box: Any = None) -> torch.Tensor:
        """The last of the maps."""
        return self.forward(x)[-1]

    def forward(self, x: torch.Tensor, separate: bool = False) -> list[torch.Tensor]:
        check_input(self, x, whole=False)
        maps = []
        for index, y in enumerate(self._stages(x)):
            if index in self.out_indices:
                maps.append(channels_first(getattr(self, f"norm{index + 1}")(y.movedim(1, -1))))
        return maps

    @torch.jit.ignore  # type: ignore[arg-type]
    def get_classifier(self) -> Any:
        return nn.Identity()

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        if num_classes:
            raise ConfigError(f"`num_classes` = {num_classes}, but a backbone has no classifier.", "num_classes=0")

    def load_official(self, state: Mapping[str, torch.Tensor]) -> Report:
        """Load a backbone's or a classifier's weights; of the latter, the norms of the four maps are new."""
        return load_weights(self, state, key_map=official_key, head="keep",
                            allow_new=(r"num_batches_tracked$", r"^norm[1-4]\."), allow_dropped=(r"^norm\.", r"^head\."))
