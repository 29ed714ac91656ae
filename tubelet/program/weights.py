"""Weights from anywhere into a fresh model, with a table of what happened to each tensor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tubelet import dist
from tubelet.engine import checkpoint
from tubelet.errors import CheckpointError
from tubelet.models.build import build_model, model_cfg
from tubelet.models.settings import ModelSettings
from tubelet.models.weights import load_weights, read_weights
from tubelet.program.settings import InitSettings


def begin_from_weights(model: Any, init: InitSettings, settings: ModelSettings, seed: int, cfg: dict[str, Any], *,
                       speaks: bool) -> dict[str, Any]:
    """Load `init.weights` into `model` on every rank, print the table, return the picture settings that go with them."""
    state, source = dist.together(lambda: find_weights(init, settings, seed))
    report = dist.together(lambda: load_weights(model, state, method=init.resize, head=init.head))
    if speaks:
        report.show(f"weights from {init.weights}")
    return {**cfg, **{key: source[key] for key in ("mean", "std", "crop_pct", "interpolation") if source.get(key)}}


def find_weights(init: InitSettings, settings: ModelSettings, seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """(full fp32 state dict, picture settings) of what `init.weights` names."""
    name = init.weights or ""
    if name == "made-up":
        return made_up_weights(settings, seed)
    folder = checkpoint_folder(name)
    if folder is None:
        return read_weights(name)
    return dict(checkpoint.assemble(folder, which=init.which)), checkpoint.read_manifest(folder)["model_cfg"]


def checkpoint_folder(name: str) -> Path | None:
    """The sharded checkpoint a path means: a step folder, or a run's newest one that verifies; None for anything else."""
    path = Path(name)
    if (path / "manifest.json").exists():
        return path
    steps = checkpoint.published(path) if path.is_dir() else []
    for folder in reversed(steps):
        if not checkpoint.verify(folder):
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
