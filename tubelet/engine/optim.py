"""Parameter groups and optimizers.

Parameters are grouped by weight decay and by nothing else, so that a group is one long flat tensor under ZeRO; layer-wise
learning rates are the optimizers' own matter (`optim_flat.py`). Not here: the schedule (`schedule.py`), clipping and
skipping (the engines).

Decay is decoupled for every optimizer but LAMB: a step first multiplies a decayed weight by `1 - lr * weight_decay`. That
is AdamW's rule (arXiv 1711.05101) and big_vision's for Adam, Adafactor, Lion and SGD; big_vision's own numbers are this
coefficient times the peak learning rate. LAMB's paper adds `weight_decay * weight` to the update before it is scaled.
The papers' SGD recipes fine-tune without decay, where it makes no difference.
"""

from __future__ import annotations

import re
from fnmatch import fnmatch
from typing import Any

import torch
from torch import nn

from tubelet.engine.protocol import Engine
from tubelet.engine.settings import EngineSettings, OptimizerSettings
from tubelet.errors import ConfigError, Problems, nearest

WHOLE_TENSORS = ("adafactor", "lamb")
"""Optimizers that look at whole tensors: the plain engine gives them keys of the parameters' own shapes."""


def check_optimizer(settings: EngineSettings) -> None:
    """Raise `ConfigError` for an optimizer that the engine cannot run. Needs no model and no process group."""
    name = settings.optimizer.name
    if settings.engine == "zero" and name in WHOLE_TENSORS:
        what = ("factors its second moment by rows and columns" if name == "adafactor" else
                "scales updates by the norm of each tensor")
        raise ConfigError(f"optimizer.name is {name}, which {what}, but ZeRO cuts tensors into flat pieces, where these do "
                          "not exist.", "engine=plain, or optimizer.name=adamw (with the same decay; tune lr anew)")


def parameter_groups(module: nn.Module, settings: OptimizerSettings) -> list[dict[str, Any]]:
    """Optimizer groups of the trained parameters, in the order of their first member; freezes what `frozen` matches.

    Keys: `params`, `param_names`, `name`, `weight_decay` and `lr_scales`: of each parameter the scale of the learning
    rate. Members stand by rising scale, so that a flat has one stretch for each scale. Decayed are tensors of two or more
    dimensions named `...weight` that the model's `no_weight_decay()` does not list: not biases, norms, position tables,
    tokens and pooling probes (the rule of big_vision, which decays what flax names `kernel`). `head_weight_decay` is for
    the classifier's weight alone; the kernels of a pooling head count as body (Scaling Vision Transformers, 2106.04560,
    section 3.1).
    """
    problems = Problems(ConfigError)
    freeze(module, settings.frozen, problems)
    heads = classifier_weights(module)
    scales = _layer_scales(module, settings.layer_decay, problems)
    if settings.head_weight_decay is not None and not heads:
        problems.add(f"optimizer.head_weight_decay is {settings.head_weight_decay}, but this model has no classifier.",
                     "optimizer.head_weight_decay=null, or model.num_classes above 0")
    trained = [(name, param) for name, param in module.named_parameters() if param.requires_grad and param.numel()]
    if not trained and not problems:
        problems.add("No parameter is left to train: all of them are frozen.", "fewer patterns in optimizer.frozen")
    problems.raise_if_any()

    undecayed = _undecayed(module)
    groups: dict[float, dict[str, Any]] = {}
    for name, param in trained:
        decay = settings.weight_decay
        if name in heads and settings.head_weight_decay is not None:
            decay = settings.head_weight_decay
        if param.ndim <= 1 or not name.endswith("weight") or any(fnmatch(name, pattern) for pattern in undecayed):
            decay = 0.0
        group = groups.setdefault(decay, {"name": f"wd{decay:g}", "weight_decay": decay, "members": []})
        group["members"].append((scales.get(name, 1.0), name, param))
    for group in groups.values():
        members = sorted(group.pop("members"), key=lambda member: member[0])  # stable: else in the model's order
        group["lr_scales"], group["param_names"], group["params"] = map(list, zip(*members))
    return list(groups.values())


def freeze(module: nn.Module, patterns: list[str], problems: Problems) -> None:
    """Stop the gradient of parameters whose name one of the regular expressions finds; one that finds none is an error."""
    names = [name for name, _ in module.named_parameters()]
    for pattern in patterns:
        try:
            found = re.compile(pattern)
        except re.error as error:
            problems.add(f"optimizer.frozen: {pattern!r} is not a regular expression ({error}).",
                         "escape special characters, e.g. `blocks\\.0\\.`")
            continue
        matched = {name for name in names if found.search(name)}
        if not matched:
            near = nearest(pattern.strip("^$"), names, 3) or names[:3]
            problems.add(f"optimizer.frozen: {pattern!r} matches none of the {len(names)} parameters.",
                         f"one that matches names such as {', '.join(near)}")
        for name, param in module.named_parameters():
            if name in matched:
                param.requires_grad_(False)


def classifier_weights(module: nn.Module) -> set[str]:
    """Names of the classifier's weights: what timm's `get_classifier()` returns, else layers named head, fc, classifier."""
    names = {id(param): name for name, param in module.named_parameters()}
    if hasattr(module, "get_classifier"):
        found = module.get_classifier()  # type: ignore[operator]
        parts = found if isinstance(found, (tuple, list)) else [found]  # distilled models return two
        return {names[id(param)] for part in parts if isinstance(part, nn.Module)
                for leaf, param in part.named_parameters() if leaf.endswith("weight") and param.ndim > 1}
    return {name for name in names.values() if re.search(r"(^|\.)(head|fc|classifier)\.weight$", name)}


def _undecayed(module: nn.Module) -> list[str]:
    """Patterns from `no_weight_decay()` of the model and of models inside it (ViViT holds a ViT)."""
    patterns = []
    for prefix, part in module.named_modules():
        if hasattr(part, "no_weight_decay"):
            patterns += [f"{prefix}.{name}" if prefix else name for name in part.no_weight_decay()]  # type: ignore
    return patterns


def _layer_scales(module: nn.Module, layer_decay: float, problems: Problems) -> dict[str, float]:
    """Learning-rate scale by parameter name: layer_decay ** (layers above it), as BEiT (arXiv 2106.08254) and timm."""
    if layer_decay == 1.0:
        return {}
    if not hasattr(module, "group_matcher"):
        problems.add(f"optimizer.layer_decay is {layer_decay}, but {type(module).__name__} does not say what its layers "
                     "are (it has no group_matcher).", "optimizer.layer_decay=1, or a timm model")
        return {}
    from timm.models import group_parameters

    layer = group_parameters(module, module.group_matcher(coarse=False), reverse=True)  # type: ignore[operator]
    top = max(layer.values())  # type: ignore[union-attr]
    return {name: layer_decay ** (top - number) for name, number in layer.items()}  # type: ignore[union-attr]


def build_optimizer(groups: list[dict[str, Any]], settings: OptimizerSettings,
                    device: torch.device) -> torch.optim.Optimizer:
    """An optimizer over `parameter_groups`; takes `lr_scales` out of the groups and keeps them itself.

    All but `WHOLE_TENSORS` work element by element, so they can run on flat shards. `adam` and `adamw` are the same
    computation here, because decay is always decoupled. Before each step `set_learning_rate` must be called.
    """
    from tubelet.engine import optim_flat

    scales = {name: scale for group in groups for name, scale in zip(group["param_names"], group.pop("lr_scales"))}
    lr, betas = settings.lr, (settings.betas[0], settings.betas[1])
    if settings.name in ("adamw", "adam"):
        # Fused on GPUs only: on a CPU it rounds by position in the flat, and two layouts would drift apart.
        optimizer: optim_flat.Scaled = optim_flat.AdamW(groups, lr=lr, betas=betas, eps=settings.eps,
                                                        fused=True if device.type == "cuda" else None)
    elif settings.name == "sgd":
        optimizer = optim_flat.SGDW(groups, lr=lr, momentum=settings.momentum)
    elif settings.name == "lion":
        optimizer = optim_flat.Lion(groups, lr=lr, betas=betas)
    elif settings.name == "adafactor":
        optimizer = optim_flat.Adafactor(groups, lr=lr, betas=betas)
    else:
        optimizer = optim_flat.Lamb(groups, lr=lr, betas=betas, eps=settings.eps)
    optimizer.scales = {} if set(scales.values()) == {1.0} else scales
    return optimizer


def set_learning_rate(engine: Engine, lr: float) -> None:
    """The learning rate of the next step: `lr` times its scale in each place. The engines' `step` calls it."""
    optimizer: Any = engine.optimizer
    optimizer.bind(engine)
    for group in optimizer.param_groups:
        group["lr"] = lr
