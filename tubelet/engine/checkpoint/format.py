"""The format of a checkpoint, version 2: JSON and safetensors only, whatever the engine and the number of ranks.

    step-00012000/
      rank-00000.safetensors ...   flat fp32 tensors of a rank as they are: `master.<i>`, `<kind>.<i>` for each optimizer
                                   state tensor of the flat's size (exp_avg, exp_avg_sq, momentum_buffer), `ema.<i>`;
                                   `<kind>.<i>` in its own shape for state of another (Adafactor's rows and columns)
      buffers.safetensors          the module's persistent buffers (BatchNorm statistics and the like)
      frozen.safetensors           full values of parameters that are not trained
      index.json                   `Index`: the rule by which parameters lie in the flat tensors; groups, steps
      manifest.json                what the folder holds, with sizes and SHA-256; written last: with it the checkpoint exists

An element of a parameter is found by (name, position in the flattened parameter), so a reader with another layout
computes the slices it needs and reads those. What no slot of the layout covers is padding and means nothing. Format 1
differs in the index only: it lists the slots of every rank.
The index is in `index.py`, safetensors in `tensors.py`. Not here: writing (`save.py`), choosing among folders
(`folder.py`), reading into an engine (`load.py`).
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from tubelet.engine.checkpoint import place
from tubelet.errors import CheckpointError

FORMAT = 2  # what is written; all from 1 on are read
MANIFEST, INDEX, BUFFERS, FROZEN, LATEST = ("manifest.json", "index.json", "buffers.safetensors", "frozen.safetensors",
                                            "latest")
ENGINES = ("zero", "plain")
_FILE = re.compile(r"[A-Za-z0-9][\w.-]*")  # directly in the folder


def folder_name(step: int) -> str:
    """12000 -> step-00012000."""
    return f"step-{step:08d}"


def rank_file(rank: int) -> str:
    """3 -> rank-00003.safetensors."""
    return f"rank-{rank:05d}.safetensors"


def rank_of(name: str) -> int | None:
    """rank-00003.safetensors -> 3; None for any other name."""
    found = re.fullmatch(r"rank-(\d{5,9})\.safetensors", name)
    return int(found[1]) if found and rank_file(int(found[1])) == name else None


def seal(content: dict[str, Any]) -> str:
    """The manifest as text, with a SHA-256 over its own content, so that damage to it is seen too."""
    content = json.loads(json.dumps(content, default=str))  # what a reader will see: tuples are lists, keys are strings
    return json.dumps({**content, "sha256": _digest(content)}, indent=1) + "\n"


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_json(path: Path) -> Any:
    """A JSON file of a checkpoint, on a disk or in a store. Raises `CheckpointError` that names it when it is missing,
    cannot be read or is not JSON."""
    try:
        return json.loads(place.read(path))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.", "check the path") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON ({error}).", "another checkpoint of the run") from None


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint: `format`, `step`, `samples`, `files`, `world_size`, `engine`, `versions`, `created`
    and the keys of the caller's `extra`. Raises `CheckpointError` when it is missing, damaged, of another format, or of
    another step than its folder's name says."""
    folder = place.place(folder)
    path = folder / MANIFEST
    if not place.exists(path):
        raise CheckpointError(f"{folder} has no {MANIFEST}, so it is no finished checkpoint.",
                              "a folder whose save has finished (`tubelet ckpt info` on the run lists them)")
    content = read_json(path)
    try:
        version = content["format"]
        if version in range(1, FORMAT + 1):
            if content.pop("sha256") != _digest(content):
                raise ValueError("its content does not agree with its own SHA-256")
            _check(content, folder.name)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged or no manifest ({type(error).__name__}: {error}).",
                              "another checkpoint of the run") from None
    if version not in range(1, FORMAT + 1):
        raise CheckpointError(f"{folder} has format {version!r}, this version of Tubelet reads formats 1 to {FORMAT}.",
                              "the version of Tubelet that wrote it (see `versions` in its manifest.json)")
    return content


def _check(content: dict[str, Any], folder: str) -> None:
    """Raise one of Python's ordinary errors where a manifest's values cannot be: readers need not look again."""
    for name, entry in content["files"].items():
        if not _FILE.fullmatch(name) or type(entry["bytes"]) is not int or entry["bytes"] < 0 \
                or not re.fullmatch("[0-9a-f]{64}", entry["sha256"]):
            raise ValueError(f"file entry {name!r}")
    step, world, engine = content["step"], content["world_size"], content["engine"]
    if type(step) is not int or type(world) is not int or step < 0 or world < 1:
        raise ValueError(f"step {step!r}, world_size {world!r}")
    named = re.search(r"step-(\d{8,})(?:-\d+)?$", folder)
    if named and int(named[1]) != step:
        raise ValueError(f"it is of step {step}, the folder of step {int(named[1])}: the name was changed")
    if engine["kind"] not in ENGINES:
        raise ValueError(f"engine {engine['kind']!r} is none of {', '.join(ENGINES)}")
    if not {"stage", "precision"} <= engine.keys() or not isinstance(content["created"], str):
        raise ValueError("`engine` or `created`")
    content["versions"].items()
