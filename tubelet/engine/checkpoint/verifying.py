"""Which checkpoints a run holds, whether they are whole, and which one to resume.

A checkpoint exists for readers from the moment it holds `manifest.json`, and no longer once that name is gone. `latest`
is a hint for people and shell scripts; nothing here reads it. All of it works on a disk and on an object store
(`place.py`). Removing is in `folder.py`.
"""

from __future__ import annotations

import hashlib
import math
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from tubelet import dist
from tubelet.engine.checkpoint import place
from tubelet.engine.checkpoint.format import BUFFERS, FROZEN, INDEX, MANIFEST, rank_file, rank_of, read_manifest
from tubelet.engine.checkpoint.index import Index
from tubelet.engine.checkpoint.reader import Reader
from tubelet.errors import CheckpointError

T = TypeVar("T")

VISIBLE_SECONDS = 30.0
"""How long a rank waits for what rank 0 sees already: network file systems show new names and sizes to other hosts later."""

_STEP = re.compile(r"step-(\d{8,})")
_known_whole: set[str] = set()  # checkpoints this process published or verified; spares reading them again before pruning
_known_sizes: dict[str, dict[str, int]] = {}  # {file: bytes} by the manifests of milestones
_known_damaged: dict[str, str] = {}  # those that were found damaged, with the SHA-256 of the manifest that said so


def step_of(folder: Path) -> int:
    """12000 of `step-00012000`; -1 for any other name."""
    found = _STEP.fullmatch(folder.name)
    return int(found[1]) if found else -1


def steps(run: Path) -> list[Path]:
    """The run's step folders, published or not, oldest first."""
    return sorted((path for path in place.folders(run) if step_of(path) >= 0), key=step_of)


def is_published(folder: Path) -> bool:
    """Whether its save finished; whether it is still whole is `verify`'s question."""
    return place.exists(folder / MANIFEST)


def published(run: str | Path) -> list[Path]:
    """The run's checkpoints that were published, oldest first."""
    return [path for path in steps(place.place(run)) if is_published(path)]


def newest(path: str | Path) -> Path:
    """The step folder a path or URL means: itself, or a run's newest published one. Raises `CheckpointError` if neither."""
    path = place.place(path)
    if step_of(path) >= 0 or is_published(path):
        return path
    found = published(path)
    if not found:
        raise CheckpointError(f"{path} is neither a checkpoint nor a run folder that holds one.",
                              "runs/<name>, or runs/<name>/step-00001000")
    return found[-1]


# ------------------------------------------------------------------------------------------------- verifying


@dataclass(frozen=True)
class Seen:
    """A checkpoint as one process sees it: for several ranks what rank 0 sees is what there is."""

    manifest: dict[str, Any]
    sizes: dict[str, int]
    index_sha256: str


def look(folder: Path) -> Seen:
    """What is there, by reading the two JSON files and the sizes of the others. Raises `CheckpointError`."""
    manifest = read_manifest(folder)
    try:
        text = place.read(folder / INDEX)
    except OSError as error:
        why = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror or error})"
        raise CheckpointError(f"{INDEX} {why}", "another checkpoint of the run") from None
    return Seen(manifest, place.sizes(folder), hashlib.sha256(text).hexdigest())


def verify(folder: str | Path, *, deep: bool = True) -> list[str]:
    """Problems of a checkpoint in words; empty = whole.

    Looks at every file's size, its SHA-256 (`deep`, reads everything), the tensors in it and whether every element of every
    parameter has exactly one place. One process calls it; `choose` shares the work among ranks.
    """
    folder = place.place(folder)
    try:
        return _problems(folder, look(folder), deep)
    except CheckpointError as error:
        return [error.problem]


def _problems(folder: Path, seen: Seen, deep: bool, rank: int = 0, world: int = 1, patience: float = 0.0) -> list[str]:
    """Of one rank's share of the files (and, on rank 0, of the whole). Waits `patience` seconds in all for this rank to see
    what `seen` says."""
    until = time.monotonic() + patience
    index = _index(folder, seen, until, rank)
    named = seen.manifest["files"]
    problems = _about_all(seen.manifest, index) if rank == 0 else []
    for name in sorted(named)[rank::world]:
        try:
            problems += _file_problems(folder, name, seen, index, deep, until)
        except place.StoreError:
            raise  # no answer is no damage
        except CheckpointError as error:
            problems.append(error.problem)
        except OSError as error:
            problems.append(f"{name} cannot be read ({error.strerror or error})")
    return problems


def _index(folder: Path, seen: Seen, until: float, rank: int) -> Index:
    """The index, once this rank sees it and the manifest as rank 0 does: from then on it can be read like any file."""
    def same() -> bytes | None:
        try:
            text = place.read(folder / INDEX)
            ours = seen.manifest if rank == 0 else read_manifest(folder)
        except place.StoreError:
            raise
        except (OSError, CheckpointError):
            return None
        return text if ours == seen.manifest and hashlib.sha256(text).hexdigest() == seen.index_sha256 else None

    text = _wait(same, until)
    if text is None:
        raise CheckpointError(f"rank {rank} does not see {MANIFEST} and {INDEX} as rank 0 does",
                              "a file system that all nodes share")
    recorded = seen.manifest["files"].get(INDEX)
    if recorded is None:
        raise CheckpointError(f"{INDEX} is not in the manifest", "another checkpoint of the run")
    if len(text) != recorded["bytes"]:
        raise CheckpointError(f"{INDEX} has {len(text)} bytes, the manifest says {recorded['bytes']}")
    if seen.index_sha256 != recorded["sha256"]:
        raise CheckpointError(f"{INDEX} is damaged: its SHA-256 is not the manifest's", "another checkpoint of the run")
    return Index.parse(folder / INDEX, text)


def _wait(attempt: Callable[[], T | None], until: float) -> T | None:
    """attempt() until it gives something, with growing pauses; None when time is up."""
    pause = 0.02
    while (found := attempt()) is None and time.monotonic() < until:
        time.sleep(min(pause, max(0.0, until - time.monotonic())))
        pause = min(2 * pause, 1.0)
    return found


def _about_all(manifest: dict[str, Any], index: Index) -> list[str]:
    named, world = manifest["files"], manifest["world_size"]
    expected = [rank_file(number) for number in range(min(world, len(named) + 1))]  # a lie must not take memory
    expected += [name for name, wanted in ((BUFFERS, index.buffers), (FROZEN, index.frozen)) if wanted]
    problems = [f"{name} is not in the manifest" for name in expected if name not in named]
    problems += [f"{name} is none of the {world} ranks' files" for name in named if (rank_of(name) or 0) >= world]
    if index.num_ranks != world:
        problems.append(f"{INDEX} describes {index.num_ranks} ranks, the manifest {world}")
    return problems


def _file_problems(folder: Path, name: str, seen: Seen, index: Index, deep: bool, until: float) -> list[str]:
    path, recorded = folder / name, seen.manifest["files"][name]
    wanted = recorded["bytes"]
    patient = until if seen.sizes.get(name) == wanted else 0.0
    size = wanted if _wait(lambda: place.size(path) == wanted or None, patient) else place.size(path)
    if size is None:
        return [f"{name} is missing"]
    if size != wanted:
        return [f"{name} has {size} bytes, the manifest says {wanted}"]
    if deep and place.sha256(path) != recorded["sha256"]:
        return [f"{name} is damaged: its SHA-256 is not the manifest's"]
    if not name.endswith(".safetensors"):
        return []
    reader = Reader(folder)
    step = reader.metadata(name).get("step")
    if step is not None and step != str(seen.manifest["step"]):
        return [f"{name} was written for step {step}, the manifest is of step {seen.manifest['step']}"]
    return _tensor_problems(reader, name, index)


def _tensor_problems(reader: Reader, name: str, index: Index) -> list[str]:
    there, rank = reader.names(name), rank_of(name)
    if rank is None:
        shapes = index.buffers if name == BUFFERS else index.frozen if name == FROZEN else {}
        return [f"{name} lacks {tensor} of shape {list(shape)}" for tensor, shape in shapes.items()
                if tensor not in there or reader.shape(name, tensor) != shape]
    if rank >= index.num_ranks:
        return []
    problems = []
    for tensor, least in index.tensors(rank).items():
        kind, _, flat = tensor.rpartition(".")
        dtype = getattr(torch, index.flats[int(flat)].dtypes.get(kind, "float32"))
        if tensor not in there or math.prod(reader.shape(name, tensor)) < least:
            problems.append(f"{name} lacks {tensor} with {least} elements")
        elif reader.dtype(name, tensor) != dtype:
            problems.append(f"{tensor} in {name} is {reader.dtype(name, tensor)}, not {dtype}")
    return problems


# ------------------------------------------------------------------------------------------------- choosing


def choose(run: str | Path, *, before: int | None = None, only: Path | None = None) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that verifies (None if there is none), and sentences about those that were passed over.

    All ranks call it and get the same answer: rank 0 says what there is, each rank verifies its share of the files, waiting
    a while for those that it does not see yet, and what one rank rejects all reject. `before` looks only at steps below it,
    `only` at one folder. Raises `CheckpointError` when a store does not answer: the run must not go on from an older one
    because of that.
    """
    run = place.place(run)
    rank, world = _rank_and_world()
    candidates, notes = dist.broadcast(dist.together(lambda: _candidates(run, before, only) if rank == 0 else ([], [])))
    for number, folder in enumerate(candidates):
        seen = dist.broadcast(dist.together(lambda folder=folder: _safely(lambda: look(folder), rank) if rank == 0 else []))
        found = [seen] if isinstance(seen, list) else dist.gather(dist.together(lambda folder=folder, seen=seen: _safely(
            lambda: _problems(folder, seen, True, rank, world, VISIBLE_SECONDS if rank else 0.0), rank)))
        problems = list(dict.fromkeys(problem for own in found for problem in own))
        if not problems:
            mark_written(folder)
            return folder, notes
        then = f"{candidates[number + 1].name} is tried instead" if number + 1 < len(candidates) else "there is no other"
        shown = "; ".join(problems[:4]) + (f"; and {len(problems) - 4} more" if len(problems) > 4 else "")
        notes = [*notes, f"checkpoint {folder} is rejected: {shown}. {then[0].upper()}{then[1:]}."]
    return None, notes


def _candidates(run: Path, before: int | None, only: Path | None) -> tuple[list[Path], list[str]]:
    """Newest first, and a sentence for each save that did not finish."""
    if only is not None:
        return [place.place(only)], []
    wanted = [(path, is_published(path)) for path in steps(run) if before is None or step_of(path) < before]
    notes = [f"checkpoint {path} is passed over: it has no {MANIFEST}, its save did not finish."
             for path, finished in wanted if not finished]
    return [path for path, finished in reversed(wanted) if finished], notes


def _rank_and_world() -> tuple[int, int]:
    import torch.distributed

    started = torch.distributed.is_available() and torch.distributed.is_initialized()
    return (torch.distributed.get_rank(), torch.distributed.get_world_size()) if started else (0, 1)


def _safely(action: Callable[[], T], rank: int) -> T | list[str]:
    """`action()`; whatever is wrong with the checkpoint is a problem in words."""
    try:
        return action()
    except place.StoreError:
        raise
    except CheckpointError as error:
        return [error.problem]
    except Exception as error:  # a damaged file can fail in any way
        return [f"rank {rank} cannot verify it ({type(error).__name__}: {error})"]


def mark_written(folder: Path) -> None:
    """This process has published or verified `folder`: `still_whole` then compares sizes, not every byte again."""
    forget_written(folder)
    _known_whole.add(place.key(folder))


def forget_written(folder: Path) -> None:
    """`folder` is about to change or go."""
    key = place.key(folder)
    _known_whole.discard(key)
    _known_sizes.pop(key, None)
    _known_damaged.pop(key, None)


def still_whole(folder: Path, *, deep: bool = True) -> bool:
    """Whether a published checkpoint verifies, as rank 0 asks before it removes others, while all ranks wait.

    For one that this process has published or verified manifest, index and one listing say so: all files are there in full,
    whatever the number of ranks. Any other is read whole, once: that one is damaged is remembered too. Without `deep` the
    listing alone is asked. Raises `CheckpointError` only when a store does not answer.
    """
    key = place.key(folder)
    try:
        if key in _known_whole:
            patience = VISIBLE_SECONDS if _rank_and_world()[1] > 1 else 0.0  # for files of other hosts
            whole = bool(_wait(lambda: _agrees(look(folder)) or None, time.monotonic() + patience))
            if not whole:  # it may be that not all is visible yet: the next time it is read whole
                forget_written(folder)
        elif not deep:
            return _wanted(folder, key).items() <= place.sizes(folder).items()
        elif _known_damaged.get(key) == _manifest_sha256(folder):
            return False
        else:
            whole = not _problems(folder, look(folder), True)
            if whole:
                _known_whole.add(key)
            else:
                forget_written(folder)
                _known_damaged[key] = _manifest_sha256(folder)
    except place.StoreError:
        raise
    except (CheckpointError, OSError):
        return False  # its manifest is damaged or gone, which is seen as quickly the next time
    return whole


def _agrees(seen: Seen) -> bool:
    named = seen.manifest["files"]
    return named[INDEX]["sha256"] == seen.index_sha256 and all(seen.sizes.get(name) == entry["bytes"]
                                                               for name, entry in named.items())


def _wanted(folder: Path, key: str) -> dict[str, int]:
    """{file: bytes} of a checkpoint by its manifest, that one too; read once."""
    if key not in _known_sizes:
        named = read_manifest(folder)["files"]
        _known_sizes[key] = {name: entry["bytes"] for name, entry in named.items()} | {
            MANIFEST: place.size(folder / MANIFEST) or 0}
    return _known_sizes[key]


def _manifest_sha256(folder: Path) -> str:
    return hashlib.sha256(place.read(folder / MANIFEST)).hexdigest()
