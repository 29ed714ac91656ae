"""Tars of others as the input of `tubelet data write`: every member is kept, samples are permuted and dealt out anew.

A folder of .tar files (img2dataset, video2dataset, open_clip, timm with `_info.json`, a Hugging Face data set), one .tar,
a brace expansion or URLs. What stands beside them (`.parquet`, `_stats.json`) is left out: its columns are in the `json`
members already. Only headers are read while listing; a listing keeps what an .idx file holds, about 45 bytes for a sample
of three members.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np

from data_pipelines.decode import label_member, raw_label
from data_pipelines.indexing import check_label_rule
from data_pipelines.inputs import Inputs, Members
from data_pipelines.media import media_members
from data_pipelines.progress import track
from data_pipelines.reader import Reader
from data_pipelines.scan import SampleRef, ShardTable, idx_bytes, scan_shard
from data_pipelines.shards import INDEX_NAME, base_name, expand, folder_of, is_remote, missing, read_index_json
from tubelet import safe_io
from tubelet.errors import DataError, Problems, TubeletError
from tubelet.redact import identity

RETRY_SECONDS = 300.0  # a read from remote storage is tried again for this long


def names_tars(source: str) -> bool:
    """Whether IN means tars: a folder that holds some, names that end in .tar, or URLs."""
    path = os.path.expanduser(source)
    if os.path.isdir(path):
        return any(name.endswith(".tar") for name in os.listdir(path))
    return source.endswith(".tar") or "::" in source or is_remote(source) or source.startswith("pipe:")


def list_tars(source: str, *, label: str | None = None) -> Inputs:
    """The samples of tars. `label` None takes the rule of their index.json, else `cls` where they have such members."""
    urls = expand(source)
    problems = Problems(DataError, f"{source} cannot be written anew:")
    problems.items += missing(urls)
    problems.raise_if_any()
    tables: list[ShardTable] = []
    for url in track(urls, len(urls), "reading headers"):
        try:
            tables.append(scan_shard(url)[0])
        except TubeletError as error:
            problems.add(error.problem, error.hint)
    problems.raise_if_any()
    folder = folder_of(urls[0])
    rule = label or _rule(folder, tables, source)
    check_label_rule(rule)
    ends = np.cumsum([len(table) for table in tables])
    kept: list[np.ndarray] = []
    refused: list[tuple[str, str]] = []
    for number, (table, url) in enumerate(zip(tables, urls)):
        reasons = _reasons(table, label_member(rule))
        kept.append(np.flatnonzero(reasons == 0) + int(ends[number - 1] if number else 0))
        for i in np.flatnonzero(reasons):
            ref = table.sample(int(i), url)
            members = ", ".join(ref.members)
            refused.append((f"{identity(url)}, sample {ref.key}", {
                1: f"has no picture or video among its members ({members})", 2: "has an empty picture or video (0 bytes)",
                3: f"has no `{label_member(rule)}` member for the label (it has {members})"}[int(reasons[i])]))
    rows = np.concatenate(kept)

    def reference(i: int) -> SampleRef:
        row = int(rows[i])
        shard = int(np.searchsorted(ends, row, side="right"))
        return tables[shard].sample(row - int(ends[shard - 1] if shard else 0), urls[shard])

    def sample(i: int) -> tuple[str, Members]:
        ref = reference(i)
        members = dict(_reader(os.getpid()).read_members(ref.url, ref.members))
        raw_label(members[label_member(rule)], rule)  # it may be a name, for a class map; but something must stand there
        return ref.key.rsplit("/", 1)[-1], members

    def name(i: int) -> str:
        ref = reference(i)
        return f"{identity(ref.url)}, sample {ref.key}"

    digest = hashlib.sha256(rule.encode())
    for table, url in zip(tables, urls):
        digest.update(base_name(url).encode() + hashlib.sha256(idx_bytes(table)).digest())
    return Inputs(len(rows), sample, name, digest.hexdigest(), rule, _classes(folder), refused, _beside(folder))


@cache
def _reader(pid: int) -> Reader:
    """One reader per process: descriptors of a parent are not shared."""
    return Reader(RETRY_SECONDS)


def _rule(folder: str, tables: Sequence[ShardTable], source: str) -> str:
    index = os.path.join(folder, INDEX_NAME)
    if not is_remote(folder) and os.path.exists(index):
        return str(read_index_json(index)["label"])
    kinds = sorted({kind for table in tables for kind in table.vocabulary})
    if "cls" in kinds:
        return "cls"
    raise DataError(f"No sample of {source} has a `cls` member, its class number (they have {', '.join(kinds) or 'none'}).",
                    "--label txt or --label json:path.to.field to say where the label is")


def _classes(folder: str) -> list[str] | None:
    path = Path(folder) / "classes.json"
    if is_remote(folder) or not path.exists():
        return None
    classes = safe_io.read_json(path)
    if not isinstance(classes, list):
        raise DataError(f"{path} must be a list of class names, but holds a {type(classes).__name__}.", "remove it")
    return [str(name) for name in classes]


def _beside(folder: str) -> list[str]:
    if is_remote(folder):
        return []
    kinds = sorted({Path(name).suffix for name in os.listdir(folder)} & {".parquet", ".csv", ".txt"})
    return [f"{', '.join('*' + kind for kind in kinds)} beside the tars are left out; members are kept"] if kinds else []


def _reasons(table: ShardTable, label_in: str) -> np.ndarray:
    """uint8 [n]: 0 fine, 1 no media, 2 empty media, 3 no label. Arrays: a loop over 10 M samples takes a minute."""
    media = np.array([bool(media_members([kind])) for kind in table.vocabulary] or [False])[table.extensions]
    labels = np.array([kind == label_in for kind in table.vocabulary] or [False])[table.extensions]
    ends = table.member_ends.astype(np.int64)

    def of_samples(flags: np.ndarray) -> np.ndarray:
        total = np.concatenate([[0], np.cumsum(flags)])
        return total[ends] - total[np.concatenate([[0], ends[:-1]])] if len(ends) else np.zeros(0, dtype=np.int64)

    some, full = of_samples(media), of_samples(media & (table.sizes > 0))
    return np.select([some == 0, full == 0, of_samples(labels) == 0], [1, 2, 3], 0).astype(np.uint8)
