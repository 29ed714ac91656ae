"""Settings of runs: which differ from their defaults, and which differ between runs."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic.fields import FieldInfo
from pydantic_core import to_jsonable_python

from tubelet.config import Settings, flatten, known_fields, resume_class
from tubelet.redact import redact

REQUIRED = "required"
"""Stands for the default of a setting that has none."""
_OWN = ("run.name", "run.dir")


def settings_class(config: Mapping[str, Any]) -> type[Settings]:
    """The class of a run's settings. They lie above this floor, so they are imported by name; no torch comes with them."""
    program, name = ("finetune", "FinetuneSettings") if "from_scratch" in config else ("pretrain", "PretrainSettings")
    return getattr(importlib.import_module(f"{program}.settings"), name)


def default_of(fields: Mapping[str, FieldInfo], key: str) -> Any:
    """The default of a dotted key, as plain values; `REQUIRED` when it has none, None for what lies in something that is
    off by default and for keys that are no setting. For an entry of a list it is that of such entries."""
    parts = [part for part in key.split(".") if not part.isdigit()]
    for length in range(len(parts) if "." in key and len(parts) < key.count(".") + 1 else 1, len(parts) + 1):
        info = fields.get(".".join(parts[:length]))
        if info is None:
            return None
        if not info.is_required():
            value = to_jsonable_python(info.get_default(call_default_factory=True))
            for part in parts[length:]:
                value = value.get(part) if isinstance(value, dict) else None
            return value
    return REQUIRED


def chosen(config: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """(key, value, default) of every setting that is not its default, in the order of the file."""
    fields = dict(known_fields(settings_class(config)))
    found = [(key, value, default_of(fields, key)) for key, value in flatten(config).items() if key not in _OWN]
    return [row for row in found if row[1] != row[2]]


def different(configs: Sequence[dict[str, Any]]) -> list[tuple[str, str, list[Any]]]:
    """(key, resume class, its value in each run) of every setting that is not the same in all, but for the runs' names.

    A setting that a run's file lacks, because it is of an earlier version or lies in something that is off there, is taken
    for its default."""
    flat = [flatten(config) for config in configs]
    cls = settings_class(dict.fromkeys(key for config in configs for key in config))
    fields = dict(known_fields(cls))
    found = []
    for key in dict.fromkeys(key for one in flat for key in one):
        if key in _OWN:
            continue
        if any(key not in one for one in flat) and any(other.startswith(f"{key}.") for one in flat for other in one):
            continue  # on in one run and off in another: its parts say so
        values = [one[key] if key in one else default_of(fields, key) for one in flat]
        if any(value != values[0] for value in values):
            found.append((key, resume_class(cls, key), values))
    return found


def words(value: Any, most: int = 60) -> str:
    """A setting's value for a table, secrets blotted out."""
    text = redact("null" if value is None else str(value).lower() if isinstance(value, bool) else value)
    return text if len(text) <= most else f"{text[:most - 3]}..."
