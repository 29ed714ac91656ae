"""Weights from anywhere: into a fresh model with a table of what happened to each tensor, or to be evaluated."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tubelet import dist
from tubelet.engine.checkpoint.folder import choose, published, step_of
from tubelet.engine.checkpoint.format import read_manifest
from tubelet.engine.checkpoint.index import Index
from tubelet.engine.checkpoint.load import assemble
from tubelet.engine.checkpoint.place import home, sizes
from tubelet.errors import CheckpointError, ConfigError
from tubelet.models.build import build_model, model_cfg
from tubelet.models.cost import input_shape
from tubelet.models.from_image import from_image
from tubelet.models.settings import ModelSettings
from tubelet.models.weights import load_weights, read_weights
from tubelet.program.settings import InitSettings


def begin_from_weights(model: Any, init: InitSettings, settings: ModelSettings, seed: int, *,
                       speaks: bool) -> dict[str, Any]:
    """Load `init.weights` into `model` on every rank, print the table, return the picture settings that go with them."""
    folder = checkpoint_folder(init.weights or "")
    state, source = dist.together(lambda: find_weights(init, folder, settings, seed))
    if of_pictures(model, state, source):
        report = dist.together(lambda: from_image(
            model, state, kernel=init.inflate, positions="resize", method=init.resize, source=source,
            head="keep" if init.head == "keep" else "replace", head_bias=settings.head_bias))
    else:
        report = dist.together(lambda: load_weights(model, state, source=source, method=init.resize, head=init.head,
                                                    head_bias=settings.head_bias, patch_kernel=init.patch_kernel))
    if speaks:
        report.show(f"weights from {init.weights}")
    return source


def of_pictures(model: Any, state: dict[str, Any], source: dict[str, Any]) -> bool:
    """True when the model takes clips and these weights are those of a model that takes pictures."""
    if len(input_shape(model)) != 4:
        return False
    if len(source.get("input_size") or ()) in (3, 4):
        return len(source["input_size"]) == 3
    own = model.state_dict()
    flat = any(own[name].ndim == 5 and tensor.ndim == 4 for name, tensor in state.items() if name in own)
    return flat or any(name.startswith("time_embed") or ".temporal_" in f".{name}" for name in own.keys() - state.keys())


def find_weights(init: InitSettings, folder: Path | None, settings: ModelSettings,
                 seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """(full fp32 state dict, picture settings) of what `init.weights` names; `folder`: the checkpoint, if it is one."""
    if init.weights == "made-up":
        return made_up_weights(settings, seed)
    if folder is None:
        return read_weights(init.weights or "")
    return dict(assemble(folder, which=init.which)), read_manifest(folder)["model_cfg"]


def checkpoint_folder(name: str) -> Path | None:
    """The sharded checkpoint a path means: a step folder, or a run's newest one that verifies; None for anything else.

    All ranks call it: each verifies its share of the files.
    """
    if name.startswith(("http://", "https://")) or name.partition(":")[0] in ("made-up", "timm"):
        return None
    path = home(name)
    step = step_of(path) >= 0 and bool(sizes(path))
    if not step and not published(path):
        return None
    folder, notes = choose(path.parent, only=path) if step else choose(path)
    if folder is None:
        raise CheckpointError(f"No checkpoint at {path} verifies: {' '.join(notes)}", f"`tubelet ckpt verify {path}`")
    return folder


def made_up_weights(settings: ModelSettings, seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Random weights of the same model at half the size with another head, so that --tiny really resizes and replaces."""
    size = settings.img_size
    half = size // 2 if isinstance(size, int) else (size[0] // 2, size[1] // 2)
    other = settings.model_copy(update={"img_size": half, "num_classes": settings.num_classes + 1})
    try:
        model = build_model(other, seed=seed + 1)
    except ConfigError:  # a model without tables, whose stages halve the picture further than this
        model = build_model(other.model_copy(update={"img_size": size}), seed=seed + 1)
    return model.state_dict(), model_cfg(model)


@dataclass
class Found:
    """A trained model somewhere, described so that it can be built again."""

    model: ModelSettings
    state: dict[str, Any]
    cfg: dict[str, Any]
    what: str
    augment: dict[str, Any] = field(default_factory=dict)
    objective: dict[str, Any] = field(default_factory=dict)
    clip: dict[str, Any] = field(default_factory=dict)


def describe(name: str, which: Literal["auto", "weights", "ema"] = "auto") -> Found:
    """Model settings, weights and picture settings of a run, a checkpoint, an export or a timm model."""
    folder = checkpoint_folder(name)
    if folder is not None:
        manifest = read_manifest(folder)
        config = manifest["config"]
        kind = "moving average" if which == "ema" or (which == "auto" and Index.read(folder).ema) else "weights"
        return Found(ModelSettings(**config["model"]), dict(assemble(folder, which=which)), manifest["model_cfg"],
                     f"{kind} of {folder.name}", config["data"]["augment"], config["objective"],
                     config["data"].get("clip", {}))
    state, cfg = read_weights(name)
    if "architecture" not in cfg:
        raise CheckpointError(f"{name} has no config.json beside it, so its model is not known.",
                              "a folder written by `tubelet ckpt export`, or fine-tune from it with a config of its own")
    arguments = dict(cfg.get("model_args") or {})
    picture = {**cfg, **(cfg.get("pretrained_cfg") or {})}
    size = arguments.pop("img_size", None) or picture["input_size"][-2:]
    size = tuple(size) if isinstance(size, (list, tuple)) else size
    model = ModelSettings(name=picture["architecture"], img_size=size, num_classes=picture["num_classes"], kwargs=arguments)
    return Found(model, state, picture, "export" if not name.startswith("timm:") else "timm weights")
