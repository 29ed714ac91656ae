"""Which checkpoints a run folder holds, whether they are whole, which one to resume, which ones to remove.

A checkpoint exists for readers from the moment it holds `manifest.json`, and no longer once that name is gone. `latest`
is a hint for people and shell scripts; nothing here reads it.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Collection
from pathlib import Path

from tubelet import dist, faults, files
from tubelet.engine.checkpoint.format import INDEX, MANIFEST, rank_file, read_manifest
from tubelet.engine.checkpoint.index import Index
from tubelet.engine.checkpoint.tensors import Reader
from tubelet.errors import CheckpointError

_STEP = re.compile(r"step-(\d{8,})")
_REPLACED = "replaced-"

_written_here: set[Path] = set()  # folders this process published or verified; spares reading them again before pruning


def step_of(folder: Path) -> int:
    """12000 of `step-00012000`; -1 for any other name."""
    found = _STEP.fullmatch(folder.name)
    return int(found[1]) if found else -1


def _steps(run: Path) -> list[Path]:
    return sorted((path for path in Path(run).glob("step-*") if step_of(path) >= 0 and path.is_dir()), key=step_of)


def published(run: Path) -> list[Path]:
    """The run's checkpoints that were published, oldest first; whether they are still whole is `verify`'s question."""
    return [path for path in _steps(run) if (path / MANIFEST).is_file()]


def newest(path: Path) -> Path:
    """The step folder a path means: itself, or a run's newest published one. Raises `CheckpointError` if neither."""
    path = Path(path)
    if step_of(path) >= 0 or (path / MANIFEST).exists():
        return path
    steps = published(path)
    if not steps:
        raise CheckpointError(f"{path} is neither a checkpoint nor a run folder that holds one.",
                              "runs/<name>, or runs/<name>/step-00001000")
    return steps[-1]


# ------------------------------------------------------------------------------------------------- verifying


def verify(folder: Path, *, deep: bool = True, rank: int = 0, world: int = 1) -> list[str]:
    """Problems of a checkpoint in words; empty = whole.

    Looks at every file's size, its SHA-256 (`deep`, reads everything), the tensors in it and, on rank 0, whether every
    element of every parameter has exactly one place. With `world` > 1 only this rank's share of the files is looked at.
    """
    folder = Path(folder)
    try:
        manifest = read_manifest(folder)
        index = Index.read(folder)
    except CheckpointError as error:
        return [error.problem]
    named = sorted(manifest["files"])
    problems = []
    if rank == 0:
        expected = {INDEX, *(rank_file(number) for number in range(manifest["world_size"]))}
        problems += [f"{name} is not in the manifest" for name in sorted(expected - set(named))]
        if len(index.ranks) != manifest["world_size"]:
            problems.append(f"{INDEX} describes {len(index.ranks)} ranks, the manifest {manifest['world_size']}")
    for name in named[rank::world]:
        try:
            problems += _verify_file(folder, name, manifest["files"][name], index, deep)
        except CheckpointError as error:
            problems.append(error.problem)
        except OSError as error:
            problems.append(f"{name} cannot be read ({error.strerror or error})")
    return problems


def _verify_file(folder: Path, name: str, recorded: dict, index: Index, deep: bool) -> list[str]:
    path = folder / name
    if not path.is_file():
        return [f"{name} is missing"]
    size = path.stat().st_size
    if size != recorded["bytes"]:
        return [f"{name} has {size} bytes, the manifest says {recorded['bytes']}"]
    if (deep or name == INDEX) and files.sha256_file(path) != recorded["sha256"]:
        return [f"{name} is damaged: its SHA-256 is not the manifest's"]
    for rank in range(len(index.ranks)):
        if name == rank_file(rank):
            reader = Reader(folder)
            there = reader.names(name)
            return [f"{name} lacks {tensor} with {least} elements" for tensor, least in index.tensors(rank).items()
                    if tensor not in there or reader.shape(name, tensor)[0] < least]
    return []


def choose(run: Path, *, before: int | None = None, only: Path | None = None) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that verifies (None if there is none), and sentences about those that were passed over.

    All ranks call it and get the same answer: rank 0 proposes, each rank verifies its share of the files, and what one
    rank rejects all reject. `before` looks only at steps below it, `only` at one folder.
    """
    run = Path(run)
    rank, world = _place()
    candidates, notes = dist.broadcast(_candidates(run, before, only) if rank == 0 else ([], []))
    for number, folder in enumerate(candidates):
        found = dist.gather(_verify_safely(folder, rank, world))
        problems = list(dict.fromkeys(problem for own in found for problem in own))
        if not problems:
            _written_here.add(folder.resolve())
            return folder, notes
        then = f"{candidates[number + 1].name} is tried instead" if number + 1 < len(candidates) else "there is no other"
        shown = "; ".join(problems[:4]) + (f"; and {len(problems) - 4} more" if len(problems) > 4 else "")
        notes = [*notes, f"checkpoint {folder} is rejected: {shown}. {then[0].upper()}{then[1:]}."]
    return None, notes


def _candidates(run: Path, before: int | None, only: Path | None) -> tuple[list[Path], list[str]]:
    """Newest first, and a sentence for each save that did not finish."""
    if only is not None:
        return [Path(only)], []
    wanted = [path for path in _steps(run) if before is None or step_of(path) < before]
    notes = [f"checkpoint {path} is passed over: it has no {MANIFEST}, its save did not finish."
             for path in wanted if not (path / MANIFEST).is_file()]
    return [path for path in reversed(wanted) if (path / MANIFEST).is_file()], notes


def _place() -> tuple[int, int]:
    import torch.distributed

    started = torch.distributed.is_available() and torch.distributed.is_initialized()
    return (torch.distributed.get_rank(), torch.distributed.get_world_size()) if started else (0, 1)


def _verify_safely(folder: Path, rank: int, world: int) -> list[str]:
    """`verify` of this rank's share; whatever goes wrong is a problem in words, so that no rank leaves the others."""
    try:
        return verify(folder, rank=rank, world=world)
    except Exception as error:  # a damaged file can fail in any way
        return [f"rank {rank} cannot verify it ({type(error).__name__}: {error})"]


def mark_written(folder: Path) -> None:
    """This process has just published `folder`: `prune` then checks sizes and places, not every byte again."""
    _written_here.add(folder.resolve())


# ------------------------------------------------------------------------------------------------- removing


def prunable(run: Path, *, keep_last: int, keep_every: int | None = None,
             protect: Collection[Path] = ()) -> list[Path]:
    """What `prune` would remove, oldest first. Reads all bytes of checkpoints that this process has not written."""
    assert keep_last >= 1
    kept_by_name = {Path(path).resolve() for path in protect}
    good: list[int] = []  # steps of verified checkpoints, newest first; older ones need not be read
    removed = []
    for folder in reversed(_steps(run)):
        step, where = step_of(folder), folder.resolve()
        is_published = (folder / MANIFEST).is_file()
        if len(good) < keep_last:
            if is_published and not verify(folder, deep=where not in _written_here):
                good.append(step)
            elif good and not is_published and where not in kept_by_name:
                removed.append(folder)  # a save that never finished, and a later one did
            continue
        if where not in kept_by_name and not (is_published and keep_every and step % keep_every == 0):
            removed.append(folder)
    if good:  # set aside by a save that was killed, and never written again
        removed += [path for path in sorted(Path(run).glob(f"{_REPLACED}step-*"))
                    if step_of(path.with_name(path.name[len(_REPLACED):])) < good[0] and path.resolve() not in kept_by_name]
    return removed[::-1]


def prune(run: Path, *, keep_last: int, keep_every: int | None = None, protect: Collection[Path] = (),
          before_delete: Callable[[], None] | None = None) -> list[Path]:
    """Remove old checkpoints and saves that never finished; returns what was removed. Rank 0 calls it.

    Kept are the `keep_last` newest that verify, those whose step is a multiple of `keep_every`, and those in
    `protect`. Nothing is removed unless a newer checkpoint verifies. `before_delete` runs before each removal and
    may raise (the check that this attempt still owns the run).
    """
    removed = prunable(run, keep_last=keep_last, keep_every=keep_every, protect=protect)
    for folder in removed:
        if before_delete is not None:
            before_delete()
        remove(folder)
    if removed:
        files.fsync_dir(run)
    return removed


def remove(folder: Path) -> None:
    """Remove a checkpoint: first it stops being one (the manifest is renamed away, durably), then its files go."""
    _written_here.discard(folder.resolve())
    if (folder / MANIFEST).exists():
        os.replace(folder / MANIFEST, folder / f"{MANIFEST}.removed")
        files.fsync_dir(folder)
    faults.point("prune.manifest")
    try:
        for path in sorted(folder.iterdir()):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
            faults.point("prune.files")
        folder.rmdir()
    except OSError:
        pass  # a file that somebody still reads over NFS; it is no checkpoint any more, and the next pruning tries again


def make_room(run: Path, folder: Path) -> None:
    """An empty `folder` for a new save. What a killed attempt left there goes; a published checkpoint of the same step
    (one that was rejected on resume) is set aside until the new one is published."""
    if (folder / MANIFEST).exists():
        drop_aside(folder)
        os.rename(folder, _aside(folder))
    elif folder.exists():
        remove(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files.fsync_dir(run)


def drop_aside(folder: Path) -> None:
    """The new checkpoint is published: the one it replaces goes."""
    if _aside(folder).exists():
        remove(_aside(folder))


def bring_back(run: Path, folder: Path) -> None:
    """The save failed: remove what it wrote, unless it is published all the same, and put back what was set aside."""
    if (folder / MANIFEST).exists():
        return
    if folder.exists():
        remove(folder)
    if _aside(folder).exists():
        os.rename(_aside(folder), folder)
    files.fsync_dir(run)


def _aside(folder: Path) -> Path:
    return folder.with_name(_REPLACED + folder.name)
