"""Classification: (model, batch) -> loss. Softmax cross-entropy, or sigmoid cross-entropy summed over classes.

The sum (big_vision, "Scaling Vision Transformers" 2021) is not torch's mean: with K classes its gradient is K times
larger. Pixels come as uint8 and are normalised here, on the device. Not here: mixing of samples (the loader's work).

Legend: B batch, T frames, H W rows cols, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from tubelet.objectives.settings import ObjectiveSettings


def normalise(pixels: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """uint8 [B, 3, H, W] or [B, 3, T, H, W] -> (x / 255 - mean) / std in fp32."""
    shape = (1, -1) + (1,) * (pixels.ndim - 2)
    return pixels.float().div_(255).sub_(mean.view(shape)).div_(std.view(shape))


def softmax_loss(logits: torch.Tensor, labels: torch.Tensor, label_smoothing: float = 0.0) -> torch.Tensor:
    """Cross-entropy per sample [B]. Labels int64 [B] or distributions [B, K]."""
    return F.cross_entropy(logits, labels if labels.ndim == 1 else labels.to(logits.dtype), reduction="none",
                           label_smoothing=label_smoothing)


def sigmoid_loss(logits: torch.Tensor, labels: torch.Tensor, label_smoothing: float = 0.0) -> torch.Tensor:
    """Binary cross-entropy per sample, summed over classes, [B]. Labels int64 [B], or [B, K] with any number of ones."""
    num_classes = logits.shape[-1]
    targets = F.one_hot(labels, num_classes) if labels.ndim == 1 else labels
    targets = targets.to(logits.dtype)
    if label_smoothing:
        targets = targets * (1 - label_smoothing) + label_smoothing / num_classes
    # torch's own form subtracts 10 from 10.00005 at a bias of -10: in fp32 1 % of each of thousands of terms is lost
    return -(targets * F.logsigmoid(logits) + (1 - targets) * F.logsigmoid(-logits)).sum(dim=-1)


class Classification:
    """The objective of pretraining and fine-tuning on labels.

    `mean` and `std` (of pixels scaled to 0..1) are the model's `pretrained_cfg`'s. Nothing in here is random.
    """

    def __init__(self, settings: ObjectiveSettings, num_classes: int, mean: Sequence[float], std: Sequence[float]):
        self.settings, self.num_classes = settings, num_classes
        self.mean, self.std = torch.tensor(mean, dtype=torch.float32), torch.tensor(std, dtype=torch.float32)
        self.per_sample: Callable[..., torch.Tensor] = softmax_loss if settings.name == "softmax" else sigmoid_loss

    def logits(self, model: Any, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels (uint8, or floats that are normalised already) -> logits [B, K] in at least fp32."""
        if self.mean.device != pixels.device:
            self.mean, self.std = self.mean.to(pixels.device), self.std.to(pixels.device)
        if not pixels.is_floating_point():
            pixels = normalise(pixels, self.mean, self.std)
        weight = next(model.parameters(), None)  # bf16 or float64 models take their own type; autocast keeps fp32
        logits = model(pixels if weight is None else pixels.to(weight.dtype))
        return logits if logits.dtype == torch.float64 else logits.float()

    def __call__(self, model: Any, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        """The micro-batch's mean loss, with gradient, and its accuracy (against the largest label when soft)."""
        logits, labels = self.logits(model, batch["pixels"]), batch["labels"]
        loss = self.per_sample(logits, labels, self.settings.label_smoothing).mean()
        with torch.no_grad():
            hard = labels if labels.ndim == 1 else labels.argmax(dim=-1)
            accuracy = (logits.argmax(dim=-1) == hard).float().mean()
        return {"loss": loss, "accuracy": accuracy}

    def averaged(self, logits: torch.Tensor, views: int) -> torch.Tensor:
        """Logits [B * V, K] of V views of each sample -> [B, K]: their mean, or the logarithm of the mean of what they
        give (softmax or sigmoid)."""
        if views == 1:
            return logits
        logits = logits.view(-1, views, logits.shape[-1])
        if self.settings.average == "logits":
            return logits.mean(dim=1)
        if self.settings.name == "softmax":
            return logits.log_softmax(dim=-1).logsumexp(dim=1) - math.log(views)
        yes, no = (F.logsigmoid(sign * logits).logsumexp(dim=1) for sign in (1, -1))
        return yes - no  # the logit of the mean probability

    @torch.no_grad()
    def evaluate(self, model: Any, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Sums over the samples that are `valid` (all when the batch does not say): loss without label smoothing,
        acc1, acc5 (5 or all classes), count; float64, so that sums of many batches stay exact. Of a sample with several
        views, their logits (or probabilities) are averaged first."""
        logits, labels = self.averaged(self.logits(model, batch["pixels"]), batch.get("views", 1)), batch["labels"]
        valid = batch.get("valid")
        valid = torch.ones(len(labels), dtype=torch.bool, device=labels.device) if valid is None else valid
        labels = labels.where(valid.view(-1, *[1] * (labels.ndim - 1)), 0)  # padding may carry any label
        loss = self.per_sample(logits, labels).double().where(valid, 0.0)  # where, not times: padding may be nan
        hard = labels if labels.ndim == 1 else labels.argmax(dim=-1)
        first = logits.argmax(dim=-1) == hard  # not the first of topk, which breaks ties its own way
        five = (logits.topk(min(5, logits.shape[-1]), dim=-1).indices == hard[:, None]).any(dim=-1) | first
        return {"loss": loss.sum(), "acc1": (first & valid).sum().double(), "acc5": (five & valid).sum().double(),
                "count": valid.sum().double()}
