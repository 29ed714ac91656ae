"""Typed settings of the model. No torch here."""

from __future__ import annotations

from typing import Any, Literal

from tubelet.config import Settings, fixed


class ModelSettings(Settings):
    """Which model, and at which size."""

    name: str = fixed()
    """timm name, ours or timm's own (`tubelet models` lists them); paper names such as ViT-L/16 are aliases."""
    img_size: int | tuple[int, int] = fixed(224)
    """Input size in pixels, or [height, width]."""
    num_classes: int = fixed(1000, ge=0)
    """Width of the classifier; 0 = none."""
    drop_rate: float = fixed(0.0, ge=0, lt=1)
    """Dropout (after dense layers and the position table)."""
    drop_path_rate: float = fixed(0.0, ge=0, lt=1)
    """Stochastic depth, growing linearly to this rate in the last block."""
    head_init: Literal["default", "zero"] = fixed("default")
    """`zero` = classifier weight zero (and bias `head_bias`), as the ViT papers do."""
    head_bias: float = fixed(0.0)
    """Initial classifier bias; -10 for sigmoid pre-training on many classes, -6.9 for ImageNet-1k sigmoid."""
    mean: tuple[float, float, float] | None = fixed(None)
    """Per-channel mean the pixels (0..1) are normalised with; null = that of the loaded weights, else the model's own."""
    std: tuple[float, float, float] | None = fixed(None)
    """Per-channel standard deviation; null as for `mean`."""
    crop_pct: float | None = fixed(None, gt=0, le=1)
    """Share of the short side that the evaluation crop covers; null as for `mean`."""
    kwargs: dict[str, Any] = fixed({})
    """Further keyword arguments of the timm model, e.g. {class_token: false, global_pool: map}."""
