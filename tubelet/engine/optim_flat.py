"""Optimizers that work on flat tensors, where one flat may need several learning rates; and two that need whole tensors.

Under ZeRO a parameter group is one flat tensor, with a reduction, a gathering and a pass of the optimizer of its own. One
group for each layer, which is what layer-wise learning rates need in plain PyTorch, would make dozens of them. So groups
are made by weight decay alone, and the optimizer applies the scale of the learning rate place by place: parameters stand
in a group by rising scale, so a flat has one stretch for each scale, and each scale costs one call over the stretches
(views) of all flats of a group. State keeps the flat's size and its one step count, so a checkpoint sees nothing of it.

`AdamW`, `SGDW` and `Lion` are torch's and timm's, which also compute the update of a stretch: the same bits as one group
for each scale on a CPU. `Adafactor` and `Lamb` look at whole tensors and are for the plain engine. Not here: which
parameter gets which scale (`optim.py`).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.optim import lion as timm_lion
from timm.optim import sgdw as timm_sgdw
from torch.optim.adamw import adamw

from tubelet.engine.protocol import Engine, Flat

Stretch = tuple[int, int, float]
"""(first element, end, scale of the learning rate) in a flat."""
Place = tuple[torch.Tensor, slice | None]
"""(key, a stretch of it); None = all of it."""


def stretches(flat: Flat, scales: Mapping[str, float]) -> list[Stretch]:
    """The stretches of equal scale of a flat, in order; together they cover it, since a pause goes to what is before it."""
    found: list[Stretch] = []
    for slot in sorted(flat.slots, key=lambda slot: slot.offset):
        scale = scales[slot.name]
        if not found or found[-1][2] != scale:
            first = slot.offset if found else 0
            if found:
                found[-1] = (found[-1][0], first, found[-1][2])
            found.append((first, flat.master.numel(), scale))
    return found


class Scaled(torch.optim.Optimizer):
    """What the optimizers here share: a learning rate that is `group["lr"]` times the scale of the place."""

    scales: Mapping[str, float] = {}
    """Scale by parameter name; empty = 1 everywhere. `build_optimizer` sets it."""
    _places: dict[torch.Tensor, list[Stretch]] | None = None
    _by_scale: Sequence[tuple[list[torch.Tensor], list[tuple[float, list[Place]]]]] = ()

    def bind(self, engine: Engine) -> None:
        """Learn where the parameters lie, once; `set_learning_rate` calls it before every step."""
        if self.scales and self._places is None:
            self._places = {flat.key: stretches(flat, self.scales) for flat in engine.flats()}
            self._by_scale = []

    def scale(self, key: torch.Tensor) -> float:
        """Scale of a flat that is one whole parameter."""
        return self.stretches_of(key)[0][2] if self.scales else 1.0

    def stretches_of(self, key: torch.Tensor) -> list[Stretch]:
        assert self._places is not None, "bind() comes before the first step"
        return self._places[key]

    def live(self, group: dict[str, Any]) -> list[torch.Tensor]:
        """The keys of a group that have a gradient, their state begun."""
        keys = [key for key in group["params"] if key.grad is not None]
        for key in keys:
            state = self.state[key]
            if not state:
                self.begin(state, key, group)
        return keys

    def begin(self, state: dict[str, Any], key: torch.Tensor, group: dict[str, Any]) -> None:
        """Fill in the state of a tensor before its first step."""
        raise AssertionError(f"{type(self).__name__} does not say how its state begins")

    def by_scale(self, keys: Sequence[torch.Tensor]) -> list[tuple[float, list[Place]]]:
        """(scale, its stretches in all keys). Found once for the same keys: of a model's parameters, which the plain engine
        steps on, there are hundreds."""
        for known, places in self._by_scale:
            if len(known) == len(keys) and all(map(operator.is_, known, keys)):
                return places
        found: dict[float, list[Place]] = {}
        for key in keys:
            places = self.stretches_of(key)
            for first, end, scale in places:
                found.setdefault(scale, []).append((key, slice(first, end) if len(places) > 1 else None))
        # which keys are asked for hardly changes: those of a group, or of each part of it that ZeRO-3 steps on
        self._by_scale = [*self._by_scale, (list(keys), list(found.items()))][-64:]
        return list(found.items())

    def views(self, places: list[Place], *kinds: str) -> list[list[torch.Tensor]]:
        """Weights, gradients and the named state tensors of the stretches."""
        wholes: list[list[torch.Tensor]] = [[key for key, _ in places], [key.grad for key, _ in places]]  # type: ignore
        states = [self.state[key] for key, _ in places]
        wholes += [[state[kind] for state in states] for kind in kinds]
        if all(cut is None for _, cut in places):
            return wholes
        return [[whole if cut is None else whole.detach()[cut] for whole, (_, cut) in zip(own, places)] for own in wholes]


class AdamW(Scaled, torch.optim.AdamW):
    """torch's AdamW (arXiv 1711.05101)."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        if not self.scales:
            torch.optim.AdamW.step(self)
            return
        for group in self.param_groups:
            several: dict[torch.Tensor, None] = {}
            for scale, places in self.by_scale(self.live(group)):
                # torch counts every tensor of its list on by one: of a flat in several stretches it gets copies, and the
                # flat's own count follows below
                steps = [self.state[key]["step"] for key, _ in places]
                cuts = [key for key, cut in places if cut is not None]
                if cuts:
                    steps = [step if cut is None else step.clone() for step, (_, cut) in zip(steps, places)]
                    several.update(dict.fromkeys(cuts))
                weights, grads, means, squares = self.views(places, "exp_avg", "exp_avg_sq")
                adamw(
                    weights, grads, means, squares, [], steps, foreach=group["foreach"], fused=group["fused"],
                    amsgrad=False, beta1=group["betas"][0], beta2=group["betas"][1], lr=group["lr"] * scale,
                    weight_decay=group["weight_decay"], eps=group["eps"], maximize=False)
            for key in several:
                self.state[key]["step"] += 1

    def begin(self, state: dict[str, Any], key: torch.Tensor, group: dict[str, Any]) -> None:
        state["step"] = torch.zeros((), device=key.device if group["fused"] else "cpu")
        state["exp_avg"], state["exp_avg_sq"] = _zeros(key), _zeros(key)


class SGDW(Scaled, timm_sgdw.SGDW):
    """timm's SGD with momentum and decoupled decay."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        if not self.scales:
            timm_sgdw.SGDW.step(self)
            return
        for group in self.param_groups:
            for scale, places in self.by_scale(self.live(group)):
                # momentum from zero is the first gradient itself, which is how timm begins
                weights, grads, momenta = self.views(places, "momentum_buffer")
                timm_sgdw.sgdw(
                    weights, grads, momenta, has_sparse_grad=False, foreach=group["foreach"],  # type: ignore[arg-type]
                    weight_decay=group["weight_decay"], momentum=group["momentum"], lr=group["lr"] * scale, dampening=0.0,
                    nesterov=False, caution=False, maximize=False)

    def begin(self, state: dict[str, Any], key: torch.Tensor, group: dict[str, Any]) -> None:
        state["momentum_buffer"] = _zeros(key)


class Lion(Scaled, timm_lion.Lion):
    """timm's Lion (arXiv 2302.06675)."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        if not self.scales:
            timm_lion.Lion.step(self)
            return
        for group in self.param_groups:
            for scale, places in self.by_scale(self.live(group)):
                timm_lion.lion(
                    *self.views(places, "exp_avg"), foreach=group["foreach"],  # type: ignore[arg-type]
                    beta1=group["betas"][0], beta2=group["betas"][1], lr=group["lr"] * scale,
                    weight_decay=group["weight_decay"], caution=False, maximize=False)

    def begin(self, state: dict[str, Any], key: torch.Tensor, group: dict[str, Any]) -> None:
        state["exp_avg"] = _zeros(key)


class Adafactor(Scaled):
    """big_vision's Adafactor (arXiv 2106.04560, section 3.4): the second moment factored, the first kept in bf16.

    With t the number of the update from 1 on, b = min(betas[1], 1 - t ** -0.8), G = g * g + 1e-30, and d0, d1 the largest
    and the second largest axis of a tensor:

        row = b row + (1 - b) mean_d0(G)    col = b col + (1 - b) mean_d1(G)
        u = g * (row / mean_d1(row)) ** -1/2 * col ** -1/2        (both axes of 32 elements or more; else u = g / sqrt(v)
        m = betas[0] m + (1 - betas[0]) u                          with v the average of G)
        w = w - lr (m + weight_decay w)

    No bias correction, no clipping of updates, no scaling by the weights. Only the stored m is rounded to bf16; timm's
    class of this name also steps by the rounded one. State of a factored tensor: `exp_avg_sq_r` and `exp_avg_sq_c` of its
    shape with one axis of length 1, `exp_avg` bf16. A matrix that fuses what flax keeps apart (timm's qkv) is factored as
    the one matrix that it is here.
    """

    LEAST = 32  # elements of an axis that is worth factoring

    def __init__(self, groups: Any, lr: float, betas: tuple[float, float] = (0.9, 0.999), weight_decay: float = 0.0):
        super().__init__(groups, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    def begin(self, state: dict[str, Any], key: torch.Tensor, group: dict[str, Any]) -> None:
        state["step"], axes = torch.zeros(()), self.axes(key.shape)
        if axes is None:
            state["exp_avg_sq"] = _zeros(key)
        else:
            for kind, axis in zip(("exp_avg_sq_r", "exp_avg_sq_c"), axes):
                shape = list(key.shape)
                shape[axis] = 1
                state[kind] = torch.zeros(shape, device=key.device)
        state["exp_avg"] = torch.zeros_like(key, dtype=torch.bfloat16, requires_grad=False)

    def axes(self, shape: Sequence[int]) -> tuple[int, int] | None:
        """(largest axis, second largest), the later of equal ones first; None for a tensor that is not factored."""
        order = sorted(range(len(shape)), key=lambda axis: (shape[axis], axis))
        return (order[-1], order[-2]) if len(order) > 1 and shape[order[-2]] >= self.LEAST else None

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for key in self.live(group):
                state, lr = self.state[key], group["lr"] * self.scale(key)
                state["step"] += 1
                update = self._preconditioned(key.grad, state, group["betas"][1])  # type: ignore[arg-type]
                update = state["exp_avg"].float().lerp_(update, 1 - group["betas"][0])
                state["exp_avg"].copy_(update)
                if group["weight_decay"]:
                    key.mul_(1 - lr * group["weight_decay"])
                key.add_(update, alpha=-lr)

    def _preconditioned(self, grad: torch.Tensor, state: dict[str, Any], most: float) -> torch.Tensor:
        rest = 1 - min(most, 1 - float(state["step"]) ** -0.8)
        square, axes = grad.square() + 1e-30, self.axes(grad.shape)
        if axes is None:
            return grad * state["exp_avg_sq"].lerp_(square, rest).rsqrt()
        largest, second = axes
        row = state["exp_avg_sq_r"].lerp_(square.mean(largest, keepdim=True), rest)
        col = state["exp_avg_sq_c"].lerp_(square.mean(second, keepdim=True), rest)
        return grad * (row / row.mean(second, keepdim=True)).rsqrt() * col.rsqrt()


class Lamb(Scaled):
    """LAMB (arXiv 1904.00962, version 5, algorithm 2): Adam's direction r, scaled tensor by tensor.

        u = r + weight_decay w    w = w - lr * (|w| / |u|) u        the ratio is 1 where either norm is 0

    Tensors without decay (biases, norms) are not scaled, as in NVIDIA's and timm's. Gradients are not clipped here.
    """

    def __init__(self, groups: Any, lr: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-6,
                 weight_decay: float = 0.0):
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def begin(self, state: dict[str, Any], key: torch.Tensor, group: dict[str, Any]) -> None:
        state["step"], state["exp_avg"], state["exp_avg_sq"] = torch.zeros(()), _zeros(key), _zeros(key)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            together: dict[float, list[torch.Tensor]] = {}  # tensors that were frozen once have counts of their own
            for key in self.live(group):
                self.state[key]["step"] += 1
                together.setdefault(float(self.state[key]["step"]), []).append(key)
            for count, keys in together.items():
                self._update(keys, count, group)

    def _update(self, keys: list[torch.Tensor], count: float, group: dict[str, Any]) -> None:
        (beta1, beta2), decay = group["betas"], group["weight_decay"]
        weights, grads = [key.detach() for key in keys], [key.grad for key in keys]
        means = [self.state[key]["exp_avg"] for key in keys]
        squares = [self.state[key]["exp_avg_sq"] for key in keys]
        torch._foreach_lerp_(means, grads, 1 - beta1)  # type: ignore[arg-type]
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, grads, grads, value=1 - beta2)  # type: ignore[arg-type]
        updates = torch._foreach_sqrt(squares)
        torch._foreach_div_(updates, math.sqrt(1 - beta2**count))
        torch._foreach_add_(updates, group["eps"])
        updates = torch._foreach_div(means, updates)
        torch._foreach_div_(updates, 1 - beta1**count)
        rates = [group["lr"] * self.scale(key) for key in keys]
        if not decay:
            torch._foreach_mul_(updates, [-rate for rate in rates])
            torch._foreach_add_(weights, updates)
            return
        torch._foreach_add_(updates, weights, alpha=decay)
        ratios = _trust(torch.stack(torch._foreach_norm(weights)), torch.stack(torch._foreach_norm(updates)))
        torch._foreach_mul_(updates, list((ratios * torch.tensor(rates, device=ratios.device)).unbind()))
        torch._foreach_sub_(weights, updates)


def _trust(weights: torch.Tensor, updates: torch.Tensor) -> torch.Tensor:
    return torch.where((weights > 0) & (updates > 0), weights / updates, 1.0)


def _zeros(key: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(key, memory_format=torch.contiguous_format, requires_grad=False)
