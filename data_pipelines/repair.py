"""Writing shards again without what is wrong in them. The originals are never touched.

What `survey.py` can still read and `verify.py` finds good is written in its old order, members byte for byte as they were:
tails that were cut lose their last sample, members that did not stand together are brought together, of samples that come
twice the first stays. Everything left out is a line in OUT/removed.jsonl. The same shards give the same bytes.
"""

from __future__ import annotations

import io
import os
import shutil
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from data_pipelines.decode import read_class_map
from data_pipelines.index import known_shards
from data_pipelines.indexing import check_label_rule, write_index
from data_pipelines.progress import track
from data_pipelines.reader import Reader
from data_pipelines.shards import base_name, is_remote, missing, resolve_shards
from data_pipelines.side_by_side import in_processes
from data_pipelines.survey import Found, survey_shard, unsafe_name
from data_pipelines.verify import Checks, Report, check_sample, verify
from tubelet.errors import DataError, Problems
from tubelet.files import append_jsonl, fsync_dir


@dataclass
class _Judged:
    """A shard after the first pass."""

    url: str
    kept: list[tuple[Found, bytes | None]]
    """Good samples with the hash of their media."""
    removed: list[dict[str, Any]]
    faults: list[str]
    apart: int
    renamed: int


@dataclass(frozen=True)
class Repaired:
    """What `repair` did."""

    kept: int
    removed: int
    regrouped: int
    """Samples whose members did not stand together."""
    renamed: int
    """Samples whose names were absolute or climbed with `..`."""
    dropped_shards: list[str]
    """Shards of which nothing was left."""
    report: Report
    """A verification of what was written."""


def repair(shards: str | Sequence[str], out: str | Path, *, index_dir: str | None = None, label: str | None = None,
           class_map: str | None = None, num_classes: int = 0, decode: bool = False, duplicates: bool = False,
           split: str = "train", processes: int = 1) -> Repaired:
    """`tubelet data repair SHARDS OUT`: writes the good samples into the new folder `out`, whole or not at all, with
    indexes and removed.jsonl, and verifies them. What is checked is what `verify` checks.

    Raises `DataError` when nothing good is left, or `out` is not empty.
    """
    out = Path(out).expanduser().absolute()
    urls = resolve_shards(shards, index_dir)
    _check_names(urls, out)
    rule, classes = label or "cls", None
    try:
        known = known_shards(urls, index_dir)
        rule, classes = label or known.label, known.classes
    except DataError:
        pass  # a damaged index is no obstacle: a new one is written
    check_label_rule(rule)
    checks = Checks(rule, class_map, num_classes or len(classes or []), decode, duplicates)
    judged = list(track(in_processes(partial(_judge, checks=checks), urls, processes), len(urls), "reading shards"))
    if duplicates:
        _drop_duplicates(judged)
    kept = [shard for shard in judged if shard.kept]
    if not kept:
        removed = [row["reason"] for shard in judged for row in shard.removed]
        reasons = list(dict.fromkeys([*(fault for shard in judged for fault in shard.faults), *removed]))
        raise DataError(f"Nothing good is left of {len(urls)} shard(s): {'; '.join(reasons[:5]) or 'they are empty'}.",
                        "check --label; `tubelet data verify` names every fault")
    temporary = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        write = partial(_write, folder=temporary)
        for _ in track(in_processes(write, kept, processes), len(kept), "writing shards"):
            pass
        write_index(temporary, [str(temporary / base_name(shard.url)) for shard in kept], beside_shards=True, label=rule,
                    split=split, classes=classes, processes=processes)
        rows = [row for shard in judged
                for row in [*({"shard": base_name(shard.url), "reason": fault} for fault in shard.faults), *shard.removed]]
        append_jsonl(temporary / "removed.jsonl", rows)
        if out.exists():
            out.rmdir()
        os.rename(temporary, out)
        fsync_dir(out.parent)
    except OSError as error:
        raise DataError(f"{out} cannot be written: {error.strerror or error}.", "check space and permissions") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    report = verify(str(out), label=rule, class_map=class_map, num_classes=checks.num_classes, decode=decode,
                    duplicates=duplicates, processes=processes)
    return Repaired(sum(len(shard.kept) for shard in kept), sum(len(shard.removed) for shard in judged),
                    sum(shard.apart for shard in kept), sum(shard.renamed for shard in kept),
                    [base_name(shard.url) for shard in judged if not shard.kept], report)


def _check_names(urls: list[str], out: Path) -> None:
    problems = Problems(DataError, "These shards cannot be repaired:")
    problems.items += missing(urls)
    names = [base_name(url) for url in urls]
    twice = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
    if twice:
        problems.add(f"{len(twice)} name(s) of shards come from several folders, the first is {twice[0]}.",
                     "repair each folder by itself")
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        problems.add(f"{out} is there and not empty; the originals are never written over.", "another folder")
    problems.raise_if_any()


def _judge(url: str, checks: Checks) -> _Judged:
    survey = survey_shard(url)
    found = _Judged(url, [], [], survey.faults, 0, 0)
    reader, class_map = Reader(60.0 if is_remote(url) else 1.0), read_class_map(checks.class_map)
    keys: set[str] = set()
    for sample in survey.samples:
        wrong, _, digest = check_sample(sample, url, reader, checks, class_map)
        name = _safe(sample.key) if unsafe_name(sample.key) else sample.key
        if not name:
            wrong.append("its name is a path out of the folder")
        elif not wrong and name in keys:
            wrong.append("a sample with this key stands before it")
        if wrong:
            found.removed.append({"shard": base_name(url), "key": sample.key, "reason": "; ".join(wrong),
                                  "offset": min((place for place, _ in sample.members.values()), default=None)})
            continue
        keys.add(name)
        found.apart += sample.apart
        found.renamed += name != sample.key
        found.kept.append((Found(name, sample.members), digest))
    reader.close()
    return found


def _safe(key: str) -> str:
    return "/".join(part for part in key.split("/") if part not in ("", ".", ".."))


def _drop_duplicates(judged: list[_Judged]) -> None:
    first: dict[bytes, str] = {}
    for shard in judged:
        kept = []
        for sample, digest in shard.kept:
            where = f"{sample.key} of {base_name(shard.url)}"
            if digest is None or first.setdefault(digest, where) == where:
                kept.append((sample, digest))
                continue
            shard.removed.append({"shard": base_name(shard.url), "key": sample.key,
                                  "reason": f"the same content as {first[digest]}",
                                  "offset": min(place for place, _ in sample.members.values())})
        shard.kept = kept


def _write(shard: _Judged, folder: Path) -> None:
    """One shard: plain headers (owner, times and modes of the originals say nothing to a loader), members as they were."""
    reader = Reader(60.0 if is_remote(shard.url) else 1.0)
    with open(folder / base_name(shard.url), "wb") as file:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as tar:
            for sample, _ in shard.kept:
                for extension, (offset, size) in sample.members.items():
                    info = tarfile.TarInfo(f"{sample.key}.{extension}")
                    info.size, info.mode = size, 0o644
                    tar.addfile(info, io.BytesIO(reader.read(shard.url, offset, size)))
        file.flush()
        os.fsync(file.fileno())
    reader.close()
