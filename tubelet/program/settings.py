"""Settings that both programs share, and how a command line gives them. No torch here: `launch` reads this too.

    python -m pretrain CONFIG [key=value ...] [--tiny] [--print-config]
"""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import model_validator

from data_pipelines.settings import DataSettings
from tubelet.batching import micro_batch_multiple, resolve_micro_batch
from tubelet.config import Loaded, Settings, fixed, free, known_fields, load, merge, read_yaml
from tubelet.engine.settings import EngineSettings
from tubelet.errors import ConfigError
from tubelet.models.settings import ModelSettings
from tubelet.objectives.settings import ObjectiveSettings
from tubelet.runs import RunSettings


class InitSettings(Settings):
    """Where the first weights come from; a run that has checkpoints of its own resumes them instead."""

    weights: str | None = free(None)
    """Weights only: a run (`runs/x`), one of its checkpoints (`runs/x/step-00001000`), a folder or file of an export
    (`model.safetensors`), `timm:NAME`, a `.pth` of tensors; `made-up` = random ones of another size (for --tiny)."""
    which: Literal["auto", "weights", "ema"] = free("auto")
    """From our checkpoints: the moving average when there is one (`auto`), or one of the two by name."""
    head: Literal["auto", "replace", "keep"] = free("auto")
    """`replace` = a new zero classifier; `keep` = load it; `auto` = keep it when the number of classes agrees."""
    resize: Literal["bicubic_antialias", "bilinear_align_corners"] = free("bicubic_antialias")
    """How a position table of another grid is resampled: as timm does, or as the papers' code does."""
    patch_kernel: Literal["refuse", "resample"] = free("refuse")
    """Weights of another patch size: refuse them, or resample the patch kernel (FlexiViT's pseudo-inverse resize)."""
    inflate: Literal["central", "average"] = free("central")
    """Weights of a picture model in a video model: the middle frame of a kernel gets the picture's (`central`, ViViT),
    or every frame its share (`average`, UniFormer's own)."""
    from_run: str | None = free(None)
    """Fork: weights, moments, EMA and data position of another run or one of its checkpoints, under this run's
    schedule."""

    @model_validator(mode="after")
    def _one_beginning(self) -> InitSettings:
        if self.weights and self.from_run:
            raise ValueError("init.weights takes weights only and init.from_run the whole state; give one of them")
        return self


class ProgramSettings(EngineSettings):
    """Everything a run is made of."""

    run: RunSettings
    """Name and folder of the run."""
    init: InitSettings = InitSettings()
    """Where the first weights come from."""
    model: ModelSettings = fixed()
    """Which model, and at which size."""
    data: DataSettings = fixed()
    """Training and validation data."""
    objective: ObjectiveSettings = ObjectiveSettings()
    """What is minimised."""

    @model_validator(mode="after")
    def _length_is_given_once(self) -> ProgramSettings:
        if (self.total_steps is None) == (self.epochs is None):
            raise ValueError(f"give either total_steps or epochs, not {'both' if self.epochs else 'neither'}")
        return self


def micro_batch_of(settings: ProgramSettings, world_size: int) -> int:
    """The micro-batch size of these settings on that many ranks; `ConfigError` names what would fit."""
    augment = settings.data.augment
    pairs = bool(augment.mixup_alpha or augment.cutmix_alpha or augment.mixtoken_alpha)
    multiple = micro_batch_multiple(pairs, settings.data.repeats)
    return resolve_micro_batch(settings.global_batch_size, settings.micro_batch_size, settings.max_micro_batch_size,
                               world_size, multiple)


P = TypeVar("P", bound=ProgramSettings)


@dataclass
class Command:
    """A command line, taken apart."""

    config: str
    overrides: list[str]
    tiny: bool = False
    print_config: bool = False
    help: bool = False


def parse_command(words: Sequence[str]) -> Command:
    """Words after the program's name. Launchers' `--local_rank=N` is accepted and ignored."""
    command = Command("", [])
    for word in words:
        if word in ("-h", "--help"):
            command.help = True
        elif word == "--tiny":
            command.tiny = True
        elif word == "--print-config":
            command.print_config = True
        elif word.startswith(("--local_rank", "--local-rank")):
            continue
        elif not command.config and not word.startswith("-") and "=" not in word:
            command.config = word
        else:
            command.overrides.append(word)
    if not command.config and not command.help:
        raise ConfigError("No config file was given.", "python -m pretrain configs/pretrain/vit_b16_i21k.yaml --tiny")
    return command


def load_command(cls: type[P], command: Command) -> Loaded[P]:
    """The checked settings of a command line; one `ConfigError` lists everything that is wrong."""
    if not command.tiny:
        return load(cls, command.config, command.overrides)
    tiny = find_tiny(command.config)
    return load(cls, command.config, command.overrides, lambda data: tiny_layer(data, tiny), str(tiny))


def find_tiny(config: str) -> Path:
    """`tiny.yaml` in the config's folder or the nearest one above it."""
    for folder in Path(config).resolve().parents:
        if (folder / "tiny.yaml").exists():
            return Path(os.path.relpath(folder / "tiny.yaml"))
    raise ConfigError(f"--tiny needs a tiny.yaml in the folder of {config} or above it.", "use a config under configs/")


def tiny_layer(data: dict[str, Any], tiny: Path) -> dict[str, Any]:
    """What `--tiny` lays over a recipe: configs/tiny.yaml, and the shape of the recipe's schedule in few steps."""
    layer = copy.deepcopy(read_yaml(tiny))
    schedule = data.get("schedule") or {}
    short = {"warmup_steps": 1, "cooldown_steps": 2, "timescale": 2.0}
    layer["schedule"] = {key: value for key, value in short.items() if schedule.get(key)}
    if (data.get("init") or {}).get("weights"):
        layer["init"] = {"weights": "made-up"}
    families, clips = layer.pop("families"), layer.pop("clips")
    name = (data.get("model") or {}).get("name", "")
    layer = merge(layer, {"model": {"kwargs": next(kwargs for start, kwargs in families.items() if name.startswith(start))}})
    if "clip" in (data.get("data") or {}):
        layer = merge(layer, clips)
        layer["model"]["kwargs"]["num_frames"] = clips["data"]["clip"]["frames"]
    if "tokenlearner" in name:
        layer["model"]["kwargs"]["at"] = layer["model"]["kwargs"]["depth"] // 2
    if not (data.get("data") or {}).get("val"):
        layer.get("data", {}).pop("val", None)
    name = (data.get("run") or {}).get("name", "run")
    layer["run"] = {"name": f"{name}-tiny"}
    return layer


def help_text(program: str, what: str, cls: type[ProgramSettings]) -> str:
    """Usage, and every setting with its default and help."""
    lines = [f"usage: python -m {program} CONFIG [key=value ...] [--tiny] [--print-config]", "", what, "",
             "  CONFIG          a YAML file, e.g. under configs/",
             "  key=value       overrides a setting (also --key value); values are YAML",
             "  --tiny          the same recipe with a tiny model, made-up data and a few steps",
             "  --print-config  print the resolved settings with their sources, and stop", "", "settings:"]
    for key, info in known_fields(cls):
        resume = (info.json_schema_extra or {}).get("resume", "")  # type: ignore[union-attr]
        default = "required" if info.is_required() else repr(info.default)
        if resume:
            text = " ".join((info.description or "").split())
            lines.append(f"  {key} ({default}; {resume})\n      {text}")
    return "\n".join(lines)
