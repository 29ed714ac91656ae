"""Typed settings of the objective (model + batch -> loss). No torch here."""

from __future__ import annotations

from typing import Literal

from tubelet.config import Settings, fixed, free, recorded


class ObjectiveSettings(Settings):
    """What is minimised."""

    name: Literal["softmax", "sigmoid"] = fixed("softmax")
    """`softmax` = cross-entropy; `sigmoid` = binary cross-entropy *summed* over classes, as big_vision does."""
    label_smoothing: float = recorded(0.0, ge=0, lt=1)
    """Share of the target spread evenly over all classes."""
    average: Literal["logits", "probabilities"] = free("logits")
    """What is averaged over the views of a sample in evaluation: ViViT and UniFormer average logits, others
    probabilities."""
