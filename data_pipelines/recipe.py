"""What of a recipe the data needs: for commands that look at data as a run would read it, without the run.

The programs check a whole recipe (`tubelet/program/settings.py`), which this room may not know. Here the `data:` section is
checked in full, and of the rest only the few numbers below are read; wrong keys elsewhere are the program's to refuse.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from data_pipelines.settings import DataSettings
from tubelet.config import Settings, check, flatten, free, merge, parse_overrides, read_yaml
from tubelet.errors import ConfigError


class _Model(Settings):
    model_config = {**Settings.model_config, "extra": "ignore"}
    img_size: int | tuple[int, int] = free(224)
    num_classes: int = free(1000, ge=0)


class Recipe(Settings):
    """The data of a run, and the numbers around it that decide how it is read. Other keys of a recipe are ignored."""

    model_config = {**Settings.model_config, "extra": "ignore"}
    data: DataSettings = free()
    """As in the recipe."""
    model: _Model = _Model()
    """Image size and number of classes."""
    seed: int = free(0, ge=0)
    """Of the order and the augmentation."""
    global_batch_size: int = free(256, gt=0)
    """Samples per update."""
    micro_batch_size: int | Literal["auto"] = free("auto")
    """Samples per forward pass on one rank."""
    max_micro_batch_size: int = free(64, gt=0)
    """Upper bound for `auto`."""


@dataclass(frozen=True)
class Target:
    """What a command line named: shards, or a recipe (`config`) with overrides."""

    shards: list[str]
    config: str | None
    overrides: list[str]


def parse_target(words: Sequence[str], config: str | None = None) -> Target:
    """Sorts words into shards, one CONFIG.yaml and key=value overrides. A URL with `=` in its query is a shard."""
    shards: list[str] = []
    overrides: list[str] = []
    for word in words:
        key, equals, _ = word.partition("=")
        if equals and key.replace(".", "").replace("_", "").isalnum() and not word.startswith("made-up:"):
            overrides.append(word)
        elif word.endswith((".yaml", ".yml")) and config is None:
            config = word
        else:
            shards.append(word)
    if not shards and config is None:
        raise ConfigError("Neither shards nor a config were given.",
                          "a folder of shards, x-{0000..0063}.tar, or CONFIG.yaml")
    return Target(shards, config, overrides)


def read_recipe(target: Target, index_dir: str | None = None) -> Recipe:
    """The recipe of a command line. Shards take the place of its `data.train`; without a config everything else is a
    default, and `model.num_classes` 0 (any label is accepted)."""
    values: dict[str, Any] = read_yaml(target.config) if target.config else {"model": {"num_classes": 0}}
    sources = {key: str(target.config) for key in flatten(values)}
    for key, value in parse_overrides(target.overrides).items():
        layer: Any = value
        for part in reversed(key.split(".")):
            layer = {part: layer}
        values = merge(values, layer)
        sources.update({k: "command line" for k in flatten(value, key)})
    if target.shards:
        values = {**values, "data": {**(values.get("data") or {}), "train": [{"name": "main", "shards": target.shards}]}}
    if index_dir:
        values["data"] = {**values["data"], "index_dir": index_dir}
    return check(Recipe, values, sources)
