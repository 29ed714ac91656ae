"""Weights from anywhere: into a fresh model with a table of what happened to each tensor, or to be evaluated."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tubelet import dist
from tubelet.engine.checkpoint.folder import published, verify
from tubelet.engine.checkpoint.load import assemble, has_ema, read_manifest
from tubelet.errors import CheckpointError
from tubelet.models.build import build_model, model_cfg
from tubelet.models.settings import ModelSettings
from tubelet.models.weights import load_weights, read_weights
from tubelet.program.settings import InitSettings


def begin_from_weights(model: Any, init: InitSettings, settings: ModelSettings, seed: int, *, speaks: bool) -> dict[str, Any]:
    """Load `init.weights` into `model` on every rank, print the table, return the picture settings that go with them."""
    state, source = dist.together(lambda: find_weights(init, settings, seed))
    report = dist.together(lambda: load_weights(model, state, method=init.resize, head=init.head))
    if speaks:
        report.show(f"weights from {init.weights}")
    return source


def find_weights(init: InitSettings, settings: ModelSettings, seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """(full fp32 state dict, picture settings) of what `init.weights` names."""
    name = init.weights or ""
    if name == "made-up":
        return made_up_weights(settings, seed)
    folder = checkpoint_folder(name)
    if folder is None:
        return read_weights(name)
    return dict(assemble(folder, which=init.which)), read_manifest(folder)["model_cfg"]


def checkpoint_folder(name: str) -> Path | None:
    """The sharded checkpoint a path means: a step folder, or a run's newest one that verifies; None for anything else."""
    path = Path(name)
    if path.name.startswith("step-") and path.is_dir():
        problems = verify(path)
        if problems:
            raise CheckpointError(f"{path} does not verify: {'; '.join(problems[:3])}.", f"`tubelet ckpt verify {path}`")
        return path
    steps = published(path) if path.is_dir() else []
    for folder in reversed(steps):
        if not verify(folder):
            return folder
    if steps:
        raise CheckpointError(f"None of the {len(steps)} checkpoints in {path} verifies.", f"`tubelet ckpt verify {path}`")
    return None


def made_up_weights(settings: ModelSettings, seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Random weights of the same model at half the size with another head, so that --tiny really resizes and replaces."""
    size = settings.img_size
    half = size // 2 if isinstance(size, int) else (size[0] // 2, size[1] // 2)
    other = settings.model_copy(update={"img_size": half, "num_classes": settings.num_classes + 1})
    model = build_model(other, seed=seed + 1)
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


def describe(name: str, which: str = "auto") -> Found:
    """Model settings, weights and picture settings of a run, a checkpoint, an export or a timm model."""
    folder = checkpoint_folder(name)
    if folder is not None:
        manifest = read_manifest(folder)
        config = manifest["config"]
        kind = "moving average" if which == "ema" or (which == "auto" and has_ema(folder)) else "weights"
        return Found(ModelSettings(**config["model"]), dict(assemble(folder, which=which)), manifest["model_cfg"],
                     f"{kind} of {folder.name}", config["data"]["augment"], config["objective"])
    state, cfg = read_weights(name)
    arguments = dict(cfg.get("model_args") or {})
    picture = {**cfg, **(cfg.get("pretrained_cfg") or {})}
    size = arguments.pop("img_size", None) or picture["input_size"][-2:]
    size = tuple(size) if isinstance(size, (list, tuple)) else size
    model = ModelSettings(name=picture["architecture"], img_size=size, num_classes=picture["num_classes"], kwargs=arguments)
    return Found(model, state, picture, "export" if not name.startswith("timm:") else "timm weights")
