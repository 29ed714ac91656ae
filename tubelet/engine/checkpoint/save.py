"""Writing a checkpoint: every rank its own flat tensors, rank 0 the rest, and one rename that makes it exist.

Nothing is gathered, so a save costs host memory for one chunk of one tensor, and disk bandwidth is that of all ranks
together. It is synchronous: training waits until the files are on disk. Call it between steps only (gradients and
half-accumulated steps are not saved).
"""

from __future__ import annotations

import errno
import os
import platform
import shutil
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from tubelet import __version__, dist, faults, files
from tubelet.engine.batch_norm import average_statistics
from tubelet.engine.checkpoint import folder as folders
from tubelet.engine.checkpoint.describe import buffers, describe, rank_entries
from tubelet.engine.checkpoint.format import (
    BUFFERS,
    FORMAT,
    FROZEN,
    INDEX,
    LATEST,
    MANIFEST,
    folder_name,
    rank_file,
    seal,
)
from tubelet.engine.checkpoint.tensors import entry, safetensors_bytes, write_safetensors
from tubelet.engine.protocol import Engine
from tubelet.errors import CheckpointError, SupersededError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def save(run: Path, engine: Engine, *, step: int, ema: list[torch.Tensor] | None, extra: dict[str, Any],
         before_commit: Callable[[], None] | None = None) -> Path:
    """Publish `run/step-XXXXXXXX` and return it. All ranks call it; a failure on one is raised on all.

    `ema` holds one tensor for each of `engine.flats()`. `extra` is JSON and becomes part of the manifest. `before_commit`
    runs on rank 0 before anything is written and again right before the manifest is renamed, and may raise: then this
    save is not published. A save that fails removes what it wrote; earlier checkpoints are untouched. BatchNorm
    statistics are averaged over ranks first.
    """
    run = Path(run)
    folder = run / folder_name(step)
    average_statistics(engine.module)
    frozen, shared = engine.frozen(), buffers(engine.module)
    index = describe(engine, ema is not None, frozen, shared)
    rank = engine.world.rank
    contents = {rank_file(rank): rank_entries(engine, index, ema)}
    if rank == 0:
        contents |= {BUFFERS: [entry(name, value) for name, value in shared.items()],
                     FROZEN: [entry(name, value) for name, value in frozen.items()]}
    index_text = index.to_json()
    own = sum(safetensors_bytes(items, _metadata(step)) for items in contents.values())
    needed = int(dist.sums([float(own + (rank == 0) * len(index_text))])[0])

    def prepare() -> None:
        if rank == 0:
            run.mkdir(parents=True, exist_ok=True)
            if before_commit is not None:
                before_commit()
            faults.point("save.begin")
            folders.make_room(run, folder)

    def write() -> dict[str, dict[str, Any]]:
        _check_space(run, needed)
        return {name: write_safetensors(folder / name, items, _metadata(step),
                                        point="save.shard" if name == rank_file(rank) else None)
                for name, items in contents.items()}

    try:
        dist.together(lambda: _say_disk(prepare, run, needed))
        records = dist.gather(dist.together(lambda: _say_disk(write, run, needed)))

        def commit() -> None:
            if rank == 0:
                written = {name: record for own in records for name, record in own.items()}
                _commit(run, folder, engine, step, extra, written, index_text, before_commit)

        dist.together(lambda: _say_disk(commit, run, needed))
    except SupersededError:
        raise  # another attempt owns the folder now, maybe this very step: touch nothing
    except Exception:
        if rank == 0:
            _try(lambda: folders.bring_back(run, folder))
        dist.barrier()
        raise
    if rank == 0:
        folders.mark_written(folder)
        _try(lambda: folders.drop_aside(folder))
        _try(lambda: files.write_atomic(run / LATEST, folder.name + "\n"))
    return folder


def _commit(run: Path, folder: Path, engine: Engine, step: int, extra: dict[str, Any], written: dict[str, Any],
            index_text: str, before_commit: Callable[[], None] | None) -> None:
    faults.point("save.index")
    with files.HashingFile(folder / INDEX) as file:
        file.write(index_text.encode())
    written[INDEX] = {"bytes": file.nbytes, "sha256": file.sha256}
    content = {
        "format": FORMAT, "step": step, "samples": (extra.get("state") or {}).get("seen"),
        "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "world_size": engine.world.size,
        "engine": {"kind": engine.kind, "stage": engine.stage, "precision": engine.precision},
        "versions": _versions(), "files": {name: written[name] for name in sorted(written)},
    }
    clash = content.keys() & extra.keys()
    assert not clash, f"extra state would hide {clash} of the manifest"
    faults.point("save.manifest")
    temporary = folder / f"{MANIFEST}.tmp"
    with files.HashingFile(temporary) as file:
        file.write(seal({**content, **extra}).encode())
    files.fsync_dir(folder)
    if before_commit is not None:
        before_commit()
    faults.point("save.commit")
    os.replace(temporary, folder / MANIFEST)
    files.fsync_dir(folder)
    files.fsync_dir(run)
    faults.point("save.published")


def _metadata(step: int) -> dict[str, str]:
    return {"format": "pt", "tubelet_format": str(FORMAT), "step": str(step)}


def _versions() -> dict[str, str]:
    found = {"tubelet": __version__, "python": platform.python_version()}
    for package in ("torch", "deepspeed", "timm", "webdataset", "accelerate", "safetensors"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


# ------------------------------------------------------------------------------------------------- full disks


def _check_space(run: Path, needed: int) -> None:
    """Refuse before writing when the file system cannot hold what all ranks are about to write."""
    free = shutil.disk_usage(run).free
    if free < needed:
        raise OSError(errno.ENOSPC, "not enough free space")


def _say_disk(action: Callable[[], Any], run: Path, needed: int) -> Any:
    """Run `action`; an error of the file system becomes a `CheckpointError` with the numbers a user needs."""
    try:
        return action()
    except OSError as error:
        free = shutil.disk_usage(run if run.exists() else run.parent).free
        full = error.errno in _FULL
        problem = (f"The checkpoint could not be written to {run}: {error.strerror or error}. It needs "
                   f"{files.human_bytes(needed)}, {files.human_bytes(free)} are free. Earlier checkpoints are untouched.")
        raise CheckpointError(problem, f"free space or raise the quota, `tubelet ckpt prune {run} --keep-last 1`, or a "
                              "run.dir on another disk; then start the run again" if full else
                              "check the file system and the permissions of the folder; then start the run again") from None


def _try(action: Callable[[], Any]) -> None:
    """Tidying up that must not turn a published checkpoint into a failure, or hide the error that is on its way."""
    try:
        action()
    except OSError:
        pass
