"""Writing a checkpoint: every rank its own flat tensors, rank 0 the rest, and one rename that makes it exist.

Nothing is gathered, so disk bandwidth is that of all ranks together. Two ways: synchronous, in which training waits until
the files are on disk and host memory for a few chunks is enough; and asynchronous, in which training waits for a copy of
the state (`staging.py`), a process beside it writes the files (`tubelet/engine/writer.py`) and a later, short act of all
ranks publishes them. Both write the same bytes. Save between steps only (gradients and half-accumulated steps are not
saved). Not here: which checkpoints are kept (`folder.py`), what a rank writes (`describe.py`).
"""

from __future__ import annotations

import errno
import functools
import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import torch

from tubelet import __version__, dist, faults, files
from tubelet.engine.checkpoint import folder as folders
from tubelet.engine.checkpoint import place
from tubelet.engine.checkpoint.describe import Contents
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
from tubelet.engine.checkpoint.staging import NoMemoryError, Outgoing, Staging, Writer, need_memory
from tubelet.engine.checkpoint.tensors import Plan, entry, write_image
from tubelet.engine.protocol import Engine
from tubelet.engine.settings import CheckpointSettings
from tubelet.engine.writer import need_claim
from tubelet.errors import CheckpointError, SupersededError

T = TypeVar("T")

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@dataclass
class _Save:
    """One save on its way. `content` is the manifest but for its files (rank 0)."""

    step: int
    folder: Path
    ema: list[torch.Tensor] | None
    extra: dict[str, Any]
    frozen: dict[str, torch.Tensor]
    started: float
    seconds: float = 0.0
    """What this rank has taken to copy and write it."""
    outgoing: list[Outgoing] = field(default_factory=list)
    content: dict[str, Any] = field(default_factory=dict)
    needed: int = 0
    """Bytes of all ranks together."""
    begun: bool = False
    """The folder may hold something of this save (rank 0)."""


class Saver:
    """Saves the state of one engine into `target`, a run's folder or a place on an object store. All ranks build one.

    `before_commit` runs on rank 0 before anything is written and again right before the manifest appears, and may raise:
    then this save is not published. `attempt` is noted in the manifest; `claim` is the file by which it holds the run
    (`Run.claim`), which every rank looks at before it makes a file. A save that fails removes what it wrote; earlier
    checkpoints are untouched, and the next save begins afresh. A writing process that has not answered after
    `timeout_seconds` of waiting in `finish` counts as failed.
    """

    def __init__(self, target: Path, engine: Engine, settings: CheckpointSettings, *,
                 before_commit: Callable[[], None] | None = None, attempt: int = 0, claim: Path | None = None,
                 timeout_seconds: float = 3600.0):
        self.target = target if place.is_remote(target) else Path(target).absolute()
        self.engine, self.settings, self.before_commit = engine, settings, before_commit
        self.attempt, self.claim, self.timeout_seconds = attempt, claim, timeout_seconds
        in_process = getattr(target, "protocol", "") == "memory"  # fsspec's own memory: another process has another
        self.asynchronous = settings.asynchronous and not in_process
        self.last_seconds = 0.0
        self._saving: _Save | None = None
        self._contents: Contents | None = None
        self._staging: Staging | None = None
        self._writer: Writer | None = None

    @property
    def in_flight(self) -> int | None:
        """The step that is being written; None when nothing is. Equal on all ranks."""
        return self._saving.step if self._saving else None

    def start(self, step: int, ema: list[torch.Tensor] | None, extra: dict[str, Any]) -> None:
        """Save the state as it is now. All ranks call it between steps; a failure on one is raised on all.

        Synchronous: returns when `step-XXXXXXXX` is published. Asynchronous: returns when the copy is taken and handed to
        the writer; call `finish` when all ranks are `ready`. A save that is still in flight is finished first; if it failed,
        its error is raised here and the new one is not begun. `ema` holds one tensor for each of `engine.flats()`. `extra`
        is JSON and becomes part of the manifest. BatchNorm statistics are averaged over ranks first. Call it from the main
        thread: the writer dies with the thread that started it.
        """
        self.finish()
        saving = self._begin(step, ema, extra)
        with self._failing(saving):
            if self.asynchronous and self._hand(saving):
                self._saving, saving.seconds = saving, time.perf_counter() - saving.started
                faults.point("save.handed")
                return
            self._together(saving, lambda: self._describe(saving))
            self._together(saving, lambda: self._prepare(saving))
            self._publish(saving, lambda: self._write(saving))

    def _hand(self, saving: _Save) -> bool:
        """Copy the state aside and have it written; False when there is no memory for that, on all ranks alike."""
        try:
            if self._staging is None:
                self._together(saving, lambda: self._describe(saving))
                self._make_staging(need_memory(Staging.room(saving.outgoing)))
            orders = self._together(saving, lambda: self._stage(saving))
            saving.outgoing, saving.ema, saving.frozen = [], None, {}  # they go on changing; nothing may read them any more
        except NoMemoryError as error:
            self._stop_staging(error)
            return False
        assert self._writer is not None
        self._writer.hand(orders)
        return True

    def ready(self) -> bool:
        """True when this rank's writer is done with the save in flight, or has failed; True when nothing is in flight. No
        communication, no waiting."""
        return self._saving is None or self._writer is None or self._writer.ready()

    def finish(self) -> Path | None:
        """Wait for the writers of all ranks and publish the save in flight; returns its folder, None if there was none. All
        ranks call it. Raises on all ranks what went wrong on any."""
        saving, self._saving = self._saving, None
        if saving is None:
            return None
        with self._failing(saving):
            self._publish(saving, lambda: self._written(saving))
        return saving.folder

    def close(self) -> None:
        """End the writer and give the buffer back. What is in flight is not published: `finish` first."""
        self._saving = None
        if self._writer is not None:
            self._writer.close()
        if self._staging is not None:
            self._staging.close()
        self._writer = self._staging = None

    # ------------------------------------------------------------------------------------------- what is saved

    def _begin(self, step: int, ema: list[torch.Tensor] | None, extra: dict[str, Any]) -> _Save:
        """The part of a save in which ranks communicate about the state itself; it has nothing of its own to fail by."""
        started = time.perf_counter()
        if self._contents is None or self._contents.engine is not self.engine:
            self._contents = Contents(self.engine)
        return _Save(step, self.target / folder_name(step), ema, extra, self._contents.settle(), started)

    def _describe(self, saving: _Save) -> None:
        """What is written, without a copy of it. No communication, so that an error on one rank keeps no other waiting."""
        contents, rank = self._contents, self.engine.world.rank
        assert contents is not None
        metadata = {"format": "pt", "tubelet_format": str(FORMAT), "step": str(saving.step)}
        shared = contents.take(saving.ema, saving.frozen)
        saving.needed = contents.needed + sum(value.nbytes for value in (*shared.values(), *saving.frozen.values()))
        saving.outgoing = [Outgoing.tensors(rank_file(rank), contents.plan, metadata, "save.shard")]
        if rank == 0:
            saving.outgoing += [
                *(Outgoing.tensors(name, Plan(entry(key, value) for key, value in values.items()), metadata)
                  for name, values in ((BUFFERS, shared), (FROZEN, saving.frozen))),
                Outgoing.text(INDEX, contents.index_text(), before="save.index")]
            saving.content = self._content(saving.step, saving.extra)

    def _content(self, step: int, extra: dict[str, Any]) -> dict[str, Any]:
        engine = self.engine
        content = {
            "format": FORMAT, "step": step, "samples": (extra.get("state") or {}).get("seen"),
            "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "world_size": engine.world.size,
            "engine": {"kind": engine.kind, "stage": engine.stage, "precision": engine.precision},
            "versions": _versions(), "files": {}, "attempt": self.attempt,
        }
        clash = content.keys() & extra.keys()
        assert not clash, f"extra state would hide {clash} of the manifest"
        return {**content, **json.loads(json.dumps(extra, default=str))}  # as it is now, whatever the caller does to it

    # ------------------------------------------------------------------------------------------- writing

    def _prepare(self, saving: _Save) -> None:
        place.make_folder(self.target)
        if self.engine.world.rank == 0:
            if self.before_commit is not None:
                self.before_commit()
            saving.begun = True
            faults.point("save.begin")
            if place.is_remote(self.target) or os.path.lexists(saving.folder):
                folders.make_room(self.target, saving.folder)
            else:
                saving.folder.mkdir()  # its name is made durable when it is published
            _check_space(self.target, saving.needed)  # here alone: another rank would count what rank 0 is removing

    def _make_staging(self, sharers: int) -> None:
        self._staging = Staging(self.engine.device, sharers)
        self._writer = Writer(self._staging)

    def _stop_staging(self, why: NoMemoryError) -> None:
        """From now on saves are synchronous, on all ranks; said once."""
        self.close()
        self.asynchronous = False
        if self.engine.world.speaks:
            print(f"warning: {why.problem} So saving is synchronous: training waits for the disk. Try: "
                  "checkpoint.asynchronous=false (says nothing), fewer data.workers, or more memory a node", flush=True)

    def _stage(self, saving: _Save) -> dict[str, Any]:
        """The copy; returns the writer's orders."""
        assert self._staging is not None
        self._describe(saving)
        self._staging.reserve(Staging.room(saving.outgoing))
        self._prepare(saving)
        files_there = self._staging.copy(saving.outgoing)
        return {"folder": str(saving.folder), "remote": place.is_remote(self.target), "files": files_there,
                "storage": dict(getattr(self.target, "storage_options", {})), "claim": self.claim and str(self.claim)}

    def _write(self, saving: _Save) -> dict[str, Any]:
        """The files of this rank, straight from its tensors."""
        place.make_folder(saving.folder)
        records = {item.name: self._write_one(saving.folder / item.name, item) for item in saving.outgoing}
        saving.seconds = time.perf_counter() - saving.started
        return records

    def _write_one(self, path: Path, item: Outgoing) -> dict[str, Any]:
        if item.before:
            faults.point(item.before)

        return place.patiently(path, "writing", lambda: write_image(
            path, item.header, item.places, item.size, item.point, lambda: need_claim(self.claim)))

    def _written(self, saving: _Save) -> dict[str, Any]:
        """What this rank's writer answers; an error of its becomes the one that writing here would have raised."""
        assert self._writer is not None
        answer = self._writer.answer(self.timeout_seconds)
        if "files" in answer:
            saving.seconds += answer["seconds"]
            return answer["files"]
        error = answer["error"]
        if "superseded" in error:
            raise SupersededError(error["superseded"], error["hint"])
        if "problem" in error:
            raise CheckpointError(error["problem"], error["hint"])
        if error["errno"] is None:
            raise CheckpointError(f"The checkpoint could not be written to {self.target}: {error['text']}. Earlier "
                                  "checkpoints are untouched.", "start the run again; checkpoint.asynchronous=false writes "
                                  "without that process; the node's log tells whether memory ran out")
        raise OSError(error["errno"], error["text"])

    # ------------------------------------------------------------------------------------------- publishing

    def _publish(self, saving: _Save, write: Callable[[], dict[str, Any]]) -> None:
        records = self._together(saving, write)
        told, written = dist.gather((records, saving.seconds)), time.perf_counter()
        self._together(saving, lambda: self._commit(saving, [records for records, _ in told]))
        if self.engine.world.rank == 0:
            folders.mark_written(saving.folder)
            _try(lambda: folders.drop_aside(saving.folder))
            _try(lambda: place.publish(self.target / LATEST, f"{saving.folder.name}\n".encode()))
        # without the time in which it lay there, written, until the loop came by (an evaluation, say)
        self.last_seconds = max(seconds for _, seconds in told) + time.perf_counter() - written

    def _commit(self, saving: _Save, records: list[dict[str, Any]]) -> None:
        if self.engine.world.rank != 0:
            return
        written = {name: record for own in records for name, record in own.items()}
        saving.content["files"] = {name: written[name] for name in sorted(written)}
        faults.point("save.manifest")
        data, final = seal(saving.content).encode(), saving.folder / MANIFEST
        temporary = final.with_name(f"{MANIFEST}.tmp")
        if not place.is_remote(final):  # all that can fail or take long comes before the last question who owns the run
            with files.HashingFile(temporary) as file:
                file.write(data)
            files.fsync_dir(saving.folder)
        if self.before_commit is not None:
            self.before_commit()
        faults.point("save.commit")
        if place.is_remote(final):
            place.publish(final, data, before_try=self.before_commit)  # an outage may outlast our claim
        else:
            os.replace(temporary, final)
            files.fsync_dir(saving.folder)
            files.fsync_dir(self.target)
        faults.point("save.published")

    # ------------------------------------------------------------------------------------------- failing

    def _together(self, saving: _Save, action: Callable[[], T]) -> T:
        return dist.together(lambda: _say_disk(action, self.target, saving.needed))

    @contextmanager
    def _failing(self, saving: _Save) -> Iterator[None]:
        """A save that fails (on all ranks together) removes what it wrote."""
        try:
            yield
        except SupersededError:
            raise  # another attempt owns the folder now, maybe this very step: touch nothing
        except Exception:
            if self.engine.world.rank == 0 and saving.begun:
                _try(lambda: self._bring_back(saving))
            dist.barrier()
            raise

    def _bring_back(self, saving: _Save) -> None:
        if self.before_commit is not None:
            self.before_commit()  # or it would remove what another attempt is saving under this name
        folders.bring_back(self.target, saving.folder)


def save(run: Path, engine: Engine, *, step: int, ema: list[torch.Tensor] | None, extra: dict[str, Any],
         before_commit: Callable[[], None] | None = None) -> Path:
    """Publish `run/step-XXXXXXXX` at once and return it: a `Saver` for one synchronous save. All ranks call it."""
    Saver(run, engine, CheckpointSettings(asynchronous=False), before_commit=before_commit).start(step, ema, extra)
    return Path(run) / folder_name(step) if not place.is_remote(run) else run / folder_name(step)


@functools.cache
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
    if place.is_remote(run):
        return
    free = shutil.disk_usage(run).free
    if free < needed:
        raise OSError(errno.ENOSPC, "not enough free space")


def _say_disk(action: Callable[[], Any], run: Path, needed: int) -> Any:
    """Run `action`; an error of the file system becomes a `CheckpointError` with the numbers a user needs."""
    try:
        return action()
    except OSError as error:
        if place.is_remote(run):
            raise CheckpointError(f"The checkpoint could not be written to {run}: {error.strerror or error}. Earlier "
                                  "checkpoints are untouched.", "check the store; then start the run again") from None
        if error.errno == errno.EEXIST:
            raise CheckpointError(f"The checkpoint could not be written to {run}: {error.filename or 'a file of it'} is "
                                  "there already, although this save began with an empty folder, so another process is "
                                  "writing it. Earlier checkpoints are untouched.", "see `attempts/` in the run's folder for"
                                  " other jobs of this run and stop them; then start the run again") from None
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
        with place.in_a_hurry():
            action()
    except (OSError, CheckpointError, SupersededError):
        pass
