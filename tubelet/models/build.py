"""Settings -> a model, the same on every rank; and what is to be remembered about its pictures and its shape."""

from __future__ import annotations

import copy
import functools
import inspect
import warnings
from typing import Any

import timm
import torch
from timm.layers import PatchEmbed
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from tubelet.errors import ConfigError, Problems, nearest
from tubelet.models.cost import input_shape
from tubelet.models.names import register, resolve_name
from tubelet.models.settings import ModelSettings
from tubelet.models.vit import init_head, init_weights, papers_init_fits

register()

# Arguments that settings of their own set, and how they are called there.
_OWNED = {"img_size": "model.img_size", "num_classes": "model.num_classes", "drop_rate": "model.drop_rate",
          "drop_path_rate": "model.drop_path_rate", "pretrained": "init.weights", "checkpoint_path": "init.weights",
          "device": "", "dtype": "precision", "features_only": "", "pretrained_cfg": "", "pretrained_cfg_overlay": ""}
_PICTURE_KEYS = ("mean", "std", "crop_pct")

# (patch, pixels) at which the papers leave pixels at the right and the bottom unused (VALID convolutions): the scaling
# paper's /14 and /28 at 384, TokenLearner's L/14 at 512 and L/10 at 224 and 512.
UNEVEN = {(14, 384), (28, 384), (14, 512), (10, 224), (10, 512)}


def build_model(settings: ModelSettings, *, seed: int) -> nn.Module:
    """The model on the CPU in fp32 with its initial weights: a function of (settings, seed), equal on all ranks.

    ViTs get the papers' initial weights (see `vit.init_weights`), unless `model.kwargs.weight_init` names one of
    timm's; other models keep their own. The classifier follows `head_init` and `head_bias`. torch's random state is
    left as it was.
    """
    ours = papers_init_fits(build_meta(settings)) and "weight_init" not in settings.kwargs
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _create(settings, **({"weight_init": "skip"} if ours else {}))
        if ours:
            init_weights(model, settings.head_init, settings.head_bias)
        elif settings.head_init == "zero" or settings.head_bias:
            init_head(model, settings.head_init, settings.head_bias)
    return _finish(model, settings)


def build_meta(settings: ModelSettings) -> nn.Module:
    """The same model without memory (meta device): for counting, for shapes, for checking settings."""
    skip = {} if "weight_init" in settings.kwargs else {"weight_init": "skip"}  # there is nothing to initialise
    with torch.device("meta"):
        return _finish(_create(settings, **skip), settings)


def _create(settings: ModelSettings, **extra: Any) -> nn.Module:
    name = resolve_name(settings.name)
    asked = {"img_size": settings.img_size, "drop_path_rate": settings.drop_path_rate, "drop_rate": settings.drop_rate}
    known = _arguments_of(name)
    arguments = {**settings.kwargs, **{key: value for key, value in extra.items() if known and key in known}}
    if known is not None:
        _check_kwargs(name, settings, known)
        arguments |= {key: value for key, value in asked.items() if key in known and (value or key == "img_size")}
        if settings.drop_rate and "pos_drop_rate" in known:  # timm's own drop_rate is the dropout before the classifier
            del arguments["drop_rate"]
            arguments = {"pos_drop_rate": settings.drop_rate, "proj_drop_rate": settings.drop_rate, **arguments}
    else:
        arguments |= {key: value for key, value in asked.items() if value and key != "img_size"}
    try:
        model = timm.create_model(name, num_classes=settings.num_classes, **arguments)
    except (TypeError, AssertionError, ValueError) as error:  # how timm says that arguments do not fit together
        raise ConfigError(f"`model.name` = {name} cannot be built with img_size {settings.img_size}, num_classes "
                          f"{settings.num_classes} and model.kwargs {settings.kwargs}: {error}",
                          "other values in model.kwargs") from error
    _check_patches(model)
    return model


def _check_patches(model: nn.Module) -> None:
    embed = getattr(model, "patch_embed", None)
    if not isinstance(embed, PatchEmbed) or embed.img_size is None or embed.dynamic_img_pad:
        return
    problems, img_size = Problems(ConfigError), tuple(embed.img_size)  # type: ignore[arg-type]
    for patch, pixels in sorted(set(zip(embed.patch_size, img_size))):
        if pixels % patch and (patch, pixels) in UNEVEN:
            warnings.warn(f"{pixels} pixels are no multiple of patches of {patch}: as in the paper, {pixels // patch} "
                          f"patches are taken and the last {pixels % patch} pixels are not seen.", stacklevel=2)
        elif pixels % patch:
            below, above = pixels // patch * patch, (pixels // patch + 1) * patch
            problems.add(f"`model.img_size` = {pixels} is not a multiple of the patch size {patch}.",
                         f"model.img_size={f'{below} or ' if below else ''}{above}, or another model.kwargs.patch_size")
    problems.raise_if_any()


@functools.cache
def _arguments_of(name: str) -> set[str] | None:
    """Keyword arguments of the class behind a timm name; None when they cannot be known (it takes a config object)."""
    with torch.device("meta"):
        try:
            cls = type(timm.create_model(name, depth=1))  # for speed; ours and timm's ViTs know `depth`
        except TypeError:
            cls = type(timm.create_model(name))
    found: set[str] = set()
    for parent in cls.__mro__:
        if "__init__" not in parent.__dict__:
            continue
        parameters = inspect.signature(parent.__init__).parameters.values()
        found |= {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)} - {"self"}
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            return None if "cfg" in found else found
    return None


def _check_kwargs(name: str, settings: ModelSettings, known: set[str]) -> None:
    problems = Problems(ConfigError)
    for key in settings.kwargs:
        if key in _OWNED:
            where = _OWNED[key]
            problems.add(f"`model.kwargs.{key}` is not set here.", f"`{where}` instead" if where else f"leave out {key}")
        elif key not in known:
            close = "".join(f"{word}; " for word in nearest(key, known - set(_OWNED)))
            listed = ", ".join(sorted(known - set(_OWNED)))
            problems.add(f"`model.kwargs.{key}` is not an argument of {name}.", f"{close}the arguments are: {listed}")
    for key in ("drop_rate", "drop_path_rate"):
        if getattr(settings, key) and key not in known:
            problems.add(f"`model.{key}` = {getattr(settings, key)}, but {name} has no such option.", f"model.{key}=0")
    problems.raise_if_any()


def _finish(model: nn.Module, settings: ModelSettings) -> nn.Module:
    cfg = copy.deepcopy(dict(getattr(model, "pretrained_cfg", None) or {}))
    size = settings.img_size
    cfg["input_size"] = (*input_shape(model)[:-2], *((size, size) if isinstance(size, int) else size))
    cfg["num_classes"] = settings.num_classes
    model.pretrained_cfg = model.default_cfg = cfg  # type: ignore[assignment]
    set_picture_cfg(model, settings)
    return model


def set_picture_cfg(model: nn.Module, settings: ModelSettings, source: dict[str, Any] | None = None) -> list[str]:
    """Decide mean, std, crop_pct (and take over interpolation and label names): the settings' values, else those of
    `source` (the cfg of loaded weights), else the model's own. Returns sentences to warn with: an overridden mean or
    std means that loaded weights see other numbers than they were trained on.
    """
    cfg: dict[str, Any] = dict(model.pretrained_cfg)  # type: ignore[arg-type]
    warnings = []
    for key in _PICTURE_KEYS:
        own, loaded = getattr(settings, key), (source or {}).get(key)
        if own is not None:
            if key != "crop_pct" and loaded is not None and [float(v) for v in loaded] != [float(v) for v in own]:
                warnings.append(f"`model.{key}` = {list(own)} overrides {list(loaded)}, which the loaded weights were "
                                "trained with.")
            cfg[key] = own
        elif loaded is not None:
            cfg[key] = loaded
    if source:
        kept = ["interpolation"] + ["label_names", "label_descriptions"] * (
            source.get("num_classes") == cfg.get("num_classes"))
        cfg |= {key: source[key] for key in kept if source.get(key) is not None}
    model.pretrained_cfg = model.default_cfg = cfg  # type: ignore[assignment]
    return warnings


def model_cfg(model: nn.Module) -> dict[str, Any]:
    """timm's `pretrained_cfg` of this model as plain JSON values: architecture, classes, input size, mean, std,
    crop_pct, interpolation, label names. Saved in checkpoints, taken over by fine-tuning and evaluation."""
    cfg: dict[str, Any] = dict(model.pretrained_cfg)  # type: ignore[arg-type]
    sources = ("url", "file", "hf_hub_id", "hf_hub_filename", "source", "state_dict", "custom_load", "tag", "license",
               "origin_url")  # of weights that timm offers under this name, not of ours
    return {key: list(value) if isinstance(value, tuple) else value for key, value in cfg.items()
            if key not in sources and value is not None}


def hub_config(model: nn.Module, settings: ModelSettings) -> dict[str, Any]:
    """The content of a timm `config.json` beside exported weights: `timm.create_model("local-dir:FOLDER")` rebuilds
    the model from it once `tubelet.models` is imported."""
    cfg = model_cfg(model)
    arguments = {**settings.kwargs}
    if isinstance(model, VisionTransformer) or getattr(getattr(model, "patch_embed", None), "img_size", None):
        arguments["img_size"] = list(cfg["input_size"][-2:])
    architecture = cfg.pop("architecture", resolve_name(settings.name).split(".")[0])
    return {"architecture": architecture, "num_classes": settings.num_classes,
            "num_features": getattr(model, "num_features", None), "model_args": arguments, "pretrained_cfg": cfg}
