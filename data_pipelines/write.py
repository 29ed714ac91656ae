"""Writing WebDataset shards: folders, lists, arrays, tars of others or made-up sets, by one process or on many machines.

Samples are permuted by a seed (class folders in order give shards of one class, which no shuffle window repairs) and packed
by webdataset's TarWriter with mtime 0, fixed owner and sorted names: the same input gives the same bytes, however many
processes or pieces write it. Files are copied unchanged unless a `Treatment` says otherwise; arrays become PNG. Shards,
.idx files, index.json, _info.json, classes.json and checksums.sha256 appear together, by one rename.

A sample is `00000012_name.jpg` and `00000012_name.cls` (the class number in ASCII); of tars all members are kept. A sample
that cannot be used stops the work with all of them listed, or is left out and named in refused.jsonl (`on_error`). Its
number then stays unused, so that nothing else moves: what a shard holds never depends on another shard.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import shutil
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

import numpy as np

from data_pipelines import pieces
from data_pipelines.decode import BadSample
from data_pipelines.inputs import Columns, Inputs, add_refused, from_pictures, read_inputs
from data_pipelines.made_up import PictureSet
from data_pipelines.order import permutation
from data_pipelines.pieces import Done, Plan
from data_pipelines.progress import track
from data_pipelines.shards import INDEX_NAME, read_index_json
from data_pipelines.side_by_side import pool_of
from data_pipelines.transcode import Treatment, treat
from tubelet.errors import DataError, Problems
from tubelet.files import HashingFile, fsync_dir

WRITE = 4  # purpose of the random words that permute; see order.py for the others
CLOSE_SECONDS = 1.0  # for the sample that a process is at when the work is stopped
OnError = Literal["stop", "skip"]


@dataclass(frozen=True)
class Job:
    """Everything a process needs to write any shard of a plan."""

    folder: Path
    plan: Plan
    inputs: Inputs
    order: np.ndarray
    """int64 [samples]: which sample of the input stands at each place."""
    treatment: Treatment
    on_error: OnError


def write_shards(source: str, out: str | Path, *, shard_size: int = 5000, seed: int = 0, name: str | None = None,
                 split: str = "train", overwrite: bool = False, processes: int = 1, piece: tuple[int, int] | None = None,
                 on_error: OnError = "stop", check: bool = False, treatment: Treatment = Treatment(),
                 label: str | None = None, columns: Columns = Columns()) -> dict[str, Any]:
    """`tubelet data write IN OUT`: writes the folder `out` whole or not at all; returns its index.json.

    `shard_size` in samples. `overwrite` replaces a folder only when nothing but shards and their indexes is in it. `check`
    decodes every sample. `label` is for tars. With `piece` (I, N) only the shards I, I + N, ... are written, into
    OUT.unfinished, and {"shards", "written", "samples", "bytes"} of this piece is returned; `finish_pieces` comes last.
    "notes" in either: what the person who writes should know.
    """
    out = Path(out).expanduser().absolute()
    _check_options(shard_size, piece, processes, on_error)
    treatment.check()
    if piece is None:
        _check_target(out, overwrite)
        if pieces.unfinished(out).exists():
            raise DataError(f"Pieces of {out} are being written in {pieces.unfinished(out)}.",
                            "--piece I/N to go on, --finish when all are done, or remove that folder")
    inputs = read_inputs(source, label=label, columns=columns)
    plan = _plan(inputs, name or out.name, shard_size, seed, split, check, treatment, piece)
    if piece is not None:
        if _is_finished(out, plan):  # a job that a scheduler started again
            return {"shards": len(pieces.share(plan, piece)), "written": 0, "samples": 0, "bytes": 0, "notes": inputs.notes}
        _check_target(out, overwrite)
    problems = Problems(DataError, f"{source} cannot be written as shards:")
    if on_error == "stop":
        add_refused(problems, inputs.refused)
    elif not inputs.count:
        problems.add(f"None of the {len(inputs.refused)} samples of {source} can be used.", "check the input")
    problems.raise_if_any()
    staging = out.with_name(f".{out.name}.tmp") if piece is None else pieces.unfinished(out)
    try:
        if piece is not None:
            pieces.share_plan(staging, plan)
            job = _job(staging, plan, inputs, treatment, on_error)
            mine = pieces.share(plan, piece)
            todo = [number for number in mine if pieces.finished(staging, plan, number) is None]
            done = _write_all(job, todo, processes)
            return {"shards": len(mine), "written": len(done), "samples": sum(shard.samples for shard in done),
                    "bytes": sum(shard.nbytes for shard in done), "notes": inputs.notes}
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        job = _job(staging, plan, inputs, treatment, on_error)
        _write_all(job, range(plan.shards), processes)
        index = pieces.finish(staging, plan, processes)
        _replace(staging, out)
        return {**index, "notes": inputs.notes}
    except OSError as error:
        raise DataError(f"{out} cannot be written: {error.strerror or error}.", "check space and permissions") from None
    finally:
        if piece is None:
            shutil.rmtree(staging, ignore_errors=True)


def finish_pieces(out: str | Path, *, overwrite: bool = False, processes: int = 1) -> dict[str, Any]:
    """`--finish`: makes `out` of its pieces once all are written; returns index.json. Raises `DataError` that lists what is
    missing. The input is not read again."""
    out = Path(out).expanduser().absolute()
    staging = pieces.unfinished(out)
    if not staging.exists():
        if (out / INDEX_NAME).exists():
            return read_index_json(out / INDEX_NAME)
        raise DataError(f"There are no pieces of {out}: {staging} does not exist.", "--piece I/N first, on any machines")
    _check_target(out, overwrite)
    try:
        if (staging / pieces.PLAN).exists():
            index = pieces.finish(staging, pieces.read_plan(staging), processes)
        else:  # killed before the rename: only that is left to do
            index = read_index_json(staging / INDEX_NAME)
            pieces.tidy(staging)
        _replace(staging, out)
    except OSError as error:
        raise DataError(f"{out} cannot be written: {error.strerror or error}.", "check space and permissions") from None
    return index


def write_into(folder: Path, pictures: PictureSet, *, name: str, shard_size: int, seed: int,
               split: str = "train") -> dict[str, Any]:
    """Shards `name-00000.tar` ... and their index into an existing folder; returns index.json."""
    inputs = from_pictures(pictures, name)
    plan = _plan(inputs, name, shard_size, seed, split, False, Treatment(), None)
    job = _job(folder, plan, inputs, Treatment(), "stop")
    _write_all(job, range(plan.shards), 1)
    return pieces.finish(folder, plan)


def _plan(inputs: Inputs, name: str, shard_size: int, seed: int, split: str, check: bool, treatment: Treatment,
          piece: tuple[int, int] | None) -> Plan:
    if not inputs.count and not inputs.refused:
        raise DataError("There is no picture or video to write.", "check the input")
    stem = re.sub(r"[^\w-]", "_", name) or "data"  # braces or dots in a name would be read as something else
    return Plan(stem, inputs.count, shard_size, seed, split, inputs.label, inputs.classes, check, treatment.made(),
                inputs.digest, piece[1] if piece else 1, inputs.refused)


def _job(folder: Path, plan: Plan, inputs: Inputs, treatment: Treatment, on_error: OnError) -> Job:
    order = permutation(plan.samples, plan.seed, WRITE, 0, (0, 0, 0))
    return Job(folder, plan, inputs, order, treatment, on_error)


def _is_finished(out: Path, plan: Plan) -> bool:
    index = out / INDEX_NAME
    return index.exists() and read_index_json(index).get("made", {}).get("plan") == plan.fingerprint


# ---------------------------------------------------------------------------------------------------- one shard


def _write_shard(job: Job, number: int) -> Generator[None, None, Done]:
    """Writes one shard under its name when it is whole; yields after every sample."""
    from webdataset.writer import TarWriter

    plan = job.plan
    path = job.folder / plan.shard(number)
    new = pieces.temporary(path)
    first = number * plan.shard_size
    last = min(first + plan.shard_size, plan.samples)
    refused: list[tuple[str, str]] = []
    try:
        with HashingFile(new) as file:
            with TarWriter(cast(BinaryIO, file), encoder=False, mtime=0, user="tubelet", group="tubelet",
                           compress=False) as tar:
                for place in range(first, last):
                    try:
                        tar.write(_sample(job, place))
                    except BadSample as error:
                        refused.append((job.inputs.name(int(job.order[place])), str(error)))
                    yield
        if refused and job.on_error == "stop":
            return Done(number, 0, "", 0, refused)
        os.replace(new, path)
        fsync_dir(job.folder)
    finally:
        new.unlink(missing_ok=True)
    done = Done(number, file.nbytes, file.sha256, last - first - len(refused), refused)
    pieces.record(job.folder, plan, done)
    return done


def _sample(job: Job, place: int) -> dict[str, Any]:
    stem, members = job.inputs.sample(int(job.order[place]))
    members = treat(members, job.treatment, job.plan.check)
    stem = re.sub(r"[^A-Za-z0-9_-]", "_", stem)[:60]
    digits = max(8, len(str(job.plan.samples)))
    return {"__key__": f"{place:0{digits}d}" + (f"_{stem}" if stem else ""), **members}


# ---------------------------------------------------------------------------------------------------- all shards


def _write_all(job: Job, numbers: Sequence[int], processes: int) -> list[Done]:
    """Writes these shards. Raises one `DataError` for everything that was refused, after all of them were tried."""
    import webdataset.writer  # noqa: F401  # before the fork: it imports torch, once for all processes

    done: list[Done] = []
    plan = job.plan
    total = sum(min(plan.shard_size, plan.samples - number * plan.shard_size) for number in numbers)
    steps = _here(job, numbers, done) if min(processes, len(numbers)) <= 1 else _side_by_side(job, numbers, processes, done)
    for _ in track(steps, total, "writing samples"):
        pass
    if job.on_error == "stop":
        problems = Problems(DataError, "Samples that cannot be written:")
        add_refused(problems, [item for shard in sorted(done, key=lambda shard: shard.number) for item in shard.refused])
        problems.raise_if_any()
    return done


def _here(job: Job, numbers: Sequence[int], done: list[Done]) -> Iterator[None]:
    for number in numbers:
        done.append((yield from _write_shard(job, number)))


_shared: tuple[Job, Any, Any] | None = None  # in a worker: the job, samples done by all, and whether to stop


def _begin(job: Job, count: Any, stop: Any) -> None:
    global _shared
    _shared = job, count, stop


def _write_in_worker(number: int) -> Done | None:
    assert _shared is not None
    job, count, stop = _shared
    steps = _write_shard(job, number)
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value
        with count.get_lock():
            count.value += 1
        if stop.value:
            steps.close()
            return None


def _side_by_side(job: Job, numbers: Sequence[int], processes: int, done: list[Done]) -> Iterator[None]:
    context = multiprocessing.get_context("fork")
    count, stop = context.Value("q", 0), context.Value("b", 0)
    said = 0
    with pool_of(min(processes, len(numbers)), _begin, job, count, stop) as pool:  # forked: samples may be closures
        futures = [pool.submit(_write_in_worker, number) for number in numbers]
        waiting = set(futures)
        try:
            while waiting:
                _, waiting = wait(waiting, 0.5, FIRST_EXCEPTION)
                failed = next((future for future in futures if future.done() and future.exception()), None)
                if failed is not None:
                    failed.result()
                now = count.value
                for _ in range(now - said):
                    yield
                said = now
        finally:  # before they are killed they may finish the sample they are at and remove the shard they began
            stop.value = 1
            wait([future for future in futures if not future.cancel()], CLOSE_SECONDS)
        done += [shard for future in futures if (shard := future.result()) is not None]


# ---------------------------------------------------------------------------------------------------- the folder


def _check_options(shard_size: int, piece: tuple[int, int] | None, processes: int, on_error: str) -> None:
    problems = Problems(DataError, "Shards cannot be written so:")
    if shard_size < 1:
        problems.add(f"`--shard-size` is {shard_size}, must be at least 1 sample.", "--shard-size 5000")
    if processes < 1:
        problems.add(f"`--processes` is {processes}, must be at least 1.", "--processes 8")
    if on_error not in ("stop", "skip"):
        problems.add(f"`--on-error` is {on_error}, must be stop or skip.", "--on-error skip")
    if piece is not None and not 0 <= piece[0] < piece[1]:
        rule = (f"pieces of {piece[1]} count from 0 to {piece[1] - 1}" if piece[1] > 0 else
                "N must be at least 1; pieces count from 0")
        problems.add(f"`--piece` is {piece[0]}/{piece[1]}; {rule}.",
                     "--piece $SLURM_ARRAY_TASK_ID/64 with sbatch --array=0-63")
    problems.raise_if_any()


def _replace(staging: Path, out: Path) -> None:
    old = out.with_name(f".{out.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        os.rename(out, old)
    os.rename(staging, out)
    fsync_dir(out.parent)
    shutil.rmtree(old, ignore_errors=True)


def _check_target(out: Path, overwrite: bool) -> None:
    if not out.exists():
        return
    if not out.is_dir():
        raise DataError(f"{out} is a file; shards go into a folder.", "another name")
    inside = sorted(path.name for path in out.iterdir())
    if inside and not overwrite:
        raise DataError(f"{out} is not empty ({', '.join(inside[:3])}{' ...' if len(inside) > 3 else ''}).",
                        "--overwrite to replace it, or another folder")
    foreign = [n for n in inside if not n.endswith((".tar", ".tar.idx")) and n not in pieces.KNOWN]
    if foreign:
        raise DataError(f"{out} holds more than shards and their index ({', '.join(foreign[:3])}), so it is not replaced.",
                        "another folder, or move those files away")
