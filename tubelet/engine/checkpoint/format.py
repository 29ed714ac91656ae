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

from tubelet import safe_io
from tubelet.errors import CheckpointError, TubeletError

FORMAT = 2  # what is written; all from 1 on are read
MANIFEST, INDEX, BUFFERS, FROZEN, LATEST = ("manifest.json", "index.json", "buffers.safetensors", "frozen.safetensors",
                                            "latest")


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


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint: `format`, `step`, `samples`, `files`, `world_size`, `engine`, `versions`, `created`
    and the keys of the caller's `extra`. Raises `CheckpointError` when it is missing, damaged or of another format."""
    path = Path(folder) / MANIFEST
    if not path.exists():
        raise CheckpointError(f"{folder} has no {MANIFEST}, so it is no finished checkpoint.",
                              "a folder whose save has finished (`tubelet ckpt info` on the run lists them)")
    try:
        content = safe_io.read_json(path)
        version, recorded, files = content["format"], content.pop("sha256"), content["files"]
        if version in range(1, FORMAT + 1) and recorded != _digest(content):
            raise ValueError("its content does not agree with its own SHA-256")
        for name, entry in files.items():
            if Path(name).name != name or not isinstance(entry["bytes"], int) or not isinstance(entry["sha256"], str):
                raise ValueError(f"file entry {name!r}")
    except TubeletError as error:
        raise CheckpointError(error.problem, error.hint) from None
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged or no manifest ({type(error).__name__}: {error}).",
                              "another checkpoint of the run") from None
    if version not in range(1, FORMAT + 1):
        raise CheckpointError(f"{folder} has format {version!r}, this version of Tubelet reads formats 1 to {FORMAT}.",
                              "the version of Tubelet that wrote it (see `versions` in its manifest.json)")
    return content
