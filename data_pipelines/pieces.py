"""Shards that many machines write together: the plan they share, the record of each finished shard, and the last step.

    OUT.unfinished/plan.json              what is written, by which settings; whoever comes first lays it down
    OUT.unfinished/NAME-00000.tar         a shard, renamed into place when it is whole
    OUT.unfinished/NAME-00000.done.json   its size, digest, and what was refused; written after the shard

The content of a shard follows from the plan and the input alone, so it does not matter who writes it, when, or how often.
`finish` indexes the shards and takes plan and records away; the folder then gets its name OUT in one rename, so that OUT
is only ever there as a whole. Nothing here knows a scheduler: pieces need no order and talk only through the folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from data_pipelines.indexing import write_index
from data_pipelines.shards import INDEX_NAME
from tubelet import safe_io
from tubelet.errors import DataError, Problems
from tubelet.files import fsync_dir, sha256_file, write_atomic

PLAN, CHECKSUMS, REFUSED = "plan.json", "checksums.sha256", "refused.jsonl"
KNOWN = (INDEX_NAME, "_info.json", "classes.json", CHECKSUMS, REFUSED)
SHOWN = 20  # missing shards that are named before the rest is only counted


@dataclass(frozen=True)
class Plan:
    """What is written; equal in all pieces."""

    name: str
    """Shards are `name-00000.tar` ..."""
    samples: int
    shard_size: int
    seed: int
    split: str
    label: str
    classes: list[str] | None
    check: bool
    """Whether every sample is decoded."""
    made: dict[str, Any]
    """Settings and versions of the re-encoding; {} without."""
    digest: str
    """Of the listing of the input."""
    pieces: int = 1
    """N of the first piece; only for the words of messages, later ones may divide the work otherwise."""
    refused: list[tuple[str, str]] = field(default_factory=list)
    """(path, reason) of what the listing left out."""

    @property
    def shards(self) -> int:
        return -(-self.samples // self.shard_size)

    @property
    def fixed(self) -> dict[str, Any]:
        """What must be equal for two pieces to be of one set."""
        return {key: value for key, value in asdict(self).items() if key not in ("pieces", "refused")}

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps(self.fixed, sort_keys=True).encode()).hexdigest()

    def shard(self, number: int) -> str:
        return f"{self.name}-{number:05d}.tar"


@dataclass(frozen=True)
class Done:
    """A finished shard, or with `nbytes` 0 one that was not published because some samples were refused."""

    number: int
    nbytes: int
    sha256: str
    samples: int
    refused: list[tuple[str, str]]


def unfinished(out: Path) -> Path:
    """The folder in which the pieces of `out` gather."""
    return out.with_name(f"{out.name}.unfinished")


def temporary(path: Path) -> Path:
    """A name beside `path` that no other process uses; never taken for a shard."""
    return path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}.tmp")


def share_plan(folder: Path, plan: Plan) -> None:
    """Lays down the plan, or compares it with the one that is there. Raises `DataError` with every difference."""
    folder.mkdir(parents=True, exist_ok=True)
    path, new = folder / PLAN, temporary(folder / PLAN)
    write_atomic(new, json.dumps(asdict(plan), indent=1) + "\n")
    try:
        os.link(new, path)  # of many first ones exactly one succeeds, and nobody reads half a plan
        fsync_dir(folder)
        return
    except FileExistsError:
        pass
    except OSError:  # a file system without hard links: two first pieces of one moment both write, which is the same plan or
        if not path.exists():  # is noticed by the comparison of the next piece
            os.replace(new, path)
            return
    finally:
        new.unlink(missing_ok=True)
    there = read_plan(folder)
    said = {"digest": "the input is not what it was when the first piece listed it"}
    problems = Problems(DataError, f"This piece is not of the set that is begun in {folder}:")
    for key, value in plan.fixed.items():
        before = there.fixed[key]
        if value != before and key in said:
            problems.add(f"`{key}`: {said[key]} ({there.samples} samples then, {plan.samples} now).", "put the input back")
        elif value != before and not (key in ("samples", "classes") and plan.digest != there.digest):
            problems.add(f"`{key}` is {_short(value)}, the other pieces have {_short(before)}.",
                         f"the same settings in all pieces, or remove {folder} to begin anew")
    problems.raise_if_any()


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."


def read_plan(folder: Path) -> Plan:
    """The plan that lies in the folder of the pieces."""
    path = folder / PLAN
    try:
        values = safe_io.read_json(path)
        return Plan(**{**values, "refused": [(name, reason) for name, reason in values["refused"]]})
    except (KeyError, TypeError, ValueError):
        raise DataError(f"{path} is not a plan that this version wrote.", f"remove {folder} to begin anew") from None


def record(folder: Path, plan: Plan, done: Done) -> None:
    """Notes that a shard is finished; call it after the shard has its name."""
    path = folder / f"{plan.shard(done.number)[:-4]}.done.json"
    new = temporary(path)
    write_atomic(new, json.dumps(asdict(done)) + "\n")
    os.replace(new, path)


def finished(folder: Path, plan: Plan, number: int) -> Done | None:
    """The record of a shard that is there with the size it was written with, else None."""
    path = folder / f"{plan.shard(number)[:-4]}.done.json"
    try:
        values = json.loads(path.read_text())
        done = Done(**{**values, "refused": [(name, reason) for name, reason in values["refused"]]})
        return done if (folder / plan.shard(number)).stat().st_size == done.nbytes else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def share(plan: Plan, piece: tuple[int, int] | None) -> list[int]:
    """The shards a piece writes: every N-th, so that a set that grows in size along its list burdens all alike."""
    return list(range(plan.shards)) if piece is None else list(range(piece[0], plan.shards, piece[1]))


def finish(folder: Path, plan: Plan, processes: int = 1) -> dict[str, Any]:
    """Indexes the shards, adds checksums and the list of what was refused, and removes plan and records; returns index.json.

    Raises `DataError` that lists the missing pieces. Safe to repeat after a kill at any instant.
    """
    found = [finished(folder, plan, number) for number in range(plan.shards)]
    _check_complete(folder, plan, found)
    done = [shard for shard in found if shard is not None]
    refused = [*plan.refused, *(item for shard in done for item in shard.refused)]
    if not sum(shard.samples for shard in done):
        raise DataError(f"All {len(refused)} samples were refused, so there is nothing to write.", "check the input")
    made = {"seed": plan.seed, "shard_size": plan.shard_size, "refused": len(refused), "plan": plan.fingerprint, **plan.made}
    urls = [str(folder / plan.shard(shard.number)) for shard in done]
    index = write_index(folder, urls, beside_shards=True, label=plan.label, split=plan.split, classes=plan.classes,
                        processes=processes, made=made)
    changed = [entry["name"] for entry, shard in zip(index["shards"], done) if entry["samples"] != shard.samples]
    if changed:
        raise DataError(f"{folder / changed[0]} does not hold the samples it was written with.",
                        f"remove it and run its piece again ({_piece(plan, changed[0])})")
    if refused:
        write_atomic(folder / REFUSED, "".join(json.dumps({"path": path, "reason": reason}, ensure_ascii=False) + "\n"
                                               for path, reason in refused))
    sums = {plan.shard(shard.number): shard.sha256 for shard in done}
    names = [f"{name}.idx" for name in sums] + [name for name in KNOWN if name != CHECKSUMS and (folder / name).exists()]
    sums |= {name: sha256_file(folder / name) for name in names}
    write_atomic(folder / CHECKSUMS, "".join(f"{sums[name]}  {name}\n" for name in sorted(sums)))
    (folder / PLAN).unlink(missing_ok=True)  # from here on the folder only waits for its name
    tidy(folder)
    return index


def tidy(folder: Path) -> None:
    """Removes records, and what killed pieces left behind."""
    for path in folder.iterdir():
        if path.name.endswith((".done.json", ".tmp")):
            path.unlink()
    fsync_dir(folder)


def _piece(plan: Plan, name: str) -> str:
    return f"--piece {int(name[:-4].rsplit('-', 1)[1]) % plan.pieces}/{plan.pieces}"


def _check_complete(folder: Path, plan: Plan, found: Sequence[Done | None]) -> None:
    lacking = [number for number, shard in enumerate(found) if shard is None]
    if not lacking:
        return
    pieces = sorted({number % plan.pieces for number in lacking})
    shown = ", ".join(f"{piece}/{plan.pieces}" for piece in pieces[:SHOWN]) + (" ..." if len(pieces) > SHOWN else "")
    names = ", ".join(plan.shard(number) for number in lacking[:3]) + (" ..." if len(lacking) > 3 else "")
    raise DataError(f"{folder}: {len(lacking)} of {plan.shards} shards are missing ({names}), of the piece(s) {shown}.",
                    "run these pieces (again): what they have finished is not written twice")
