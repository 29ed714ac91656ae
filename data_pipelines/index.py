"""The index of a source: which shards, how many samples in each, and where every sample's bytes lie.

Beside each shard stands `<shard>.idx` (scan.py), and in the folder one `index.json` (shard names, bytes, counts, SHA-256
of the .idx files, label rule), `_info.json` (timm and Hugging Face read it) and `classes.json` (names by class number,
when known). Shards without an index get one in the user's cache, or under `data.index_dir`, in a folder named by a hash
of the shard list: local ones are built when first opened, remote ones by `tubelet data index`.

The order of samples is computed from the counts, so a shard that changed size, vanished or was cut short is an error when
the source is opened, never a surprise later. Nothing here reads what is inside a member.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.indexing import cached_folder, index_command, write_index
from data_pipelines.once import build_once, cache_folder
from data_pipelines.remote import Stat, Storage, read_file, stat
from data_pipelines.scan import SampleRef, ShardTable, read_idx
from data_pipelines.settings import SourceSettings
from data_pipelines.shards import (
    INDEX_NAME,
    base_name,
    beside,
    by_folder,
    folder_of,
    is_remote,
    missing,
    read_index_json,
    resolve_shards,
)
from data_pipelines.trouble import persist
from tubelet.dist import World
from tubelet.errors import DataError, Problems

TABLE_BYTES = 128 * 2**20  # memory a process gives to .idx tables
MANY_SHARDS = 2048  # beyond this only rank 0 asks for sizes: thousands of ranks would storm the file system
OPEN_SECONDS = 20.0  # patience with storage while a source is opened: somebody may be waiting at a terminal
READ_SECONDS = 300.0  # and in the middle of a run


@dataclass(frozen=True)
class ShardInfo:
    """One shard as its index describes it."""

    name: str
    """Base name, without folder or host: data may move."""
    url: str
    nbytes: int
    count: int
    """Samples."""
    idx: str
    """Path or URL of its .idx file."""
    idx_sha256: str
    tag: str = ""
    """ETag, checksum or time of a remote shard, when it was asked for; changes with its content."""


class SourceIndex:
    """One source, opened. Holds no list of samples; .idx tables are read when asked for and the last ones kept.

    It can be sent to worker processes: tables stay behind.
    """

    def __init__(self, name: str, infos: Sequence[ShardInfo], label: str = "cls", classes: list[str] | None = None, *,
                 storage: Storage | None = None, copies: Path | None = None):
        self.name = name
        self.storage = dict(storage or {})
        """Options of the file system of remote shards."""
        self.copies = copies
        """Folder where .idx files of remote shards are kept, so that not every worker of a node downloads them."""
        self.shards = list(infos)
        self.counts = np.array([info.count for info in infos], dtype=np.int64)
        self.label = label
        """Where the label is: `cls`, `txt` or `json:path.to.field`."""
        self.classes = classes
        """Class names by number, when known."""
        self._tables: OrderedDict[int, ShardTable] = OrderedDict()
        self._held = 0

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tables": OrderedDict(), "_held": 0}

    def __len__(self) -> int:
        return int(self.counts.sum())

    @property
    def nbytes(self) -> int:
        """Bytes of all shards."""
        return sum(info.nbytes for info in self.shards)

    @property
    def sample_bytes(self) -> float:
        """Mean bytes of shard per sample."""
        return self.nbytes / max(1, len(self))

    def table(self, shard: int) -> ShardTable:
        """The table of a shard's samples. Raises `DataError` when its .idx file is not the one the index means."""
        found = self._tables.get(shard)
        if found is None:
            info = self.shards[shard]
            content = self._idx(info)
            if content is None:
                raise DataError(f"{info.idx} is missing, the index of shard {info.name}.", _anew(info))
            if hashlib.sha256(content).hexdigest() != info.idx_sha256:
                raise DataError(f"{info.idx} is not the file that {INDEX_NAME} lists (its SHA-256 differs).",
                                f"copy it again, or {_anew(info)}")
            found = read_idx(content, info.idx)
            self._tables[shard] = found
            self._held += found.nbytes
            while self._held > TABLE_BYTES and len(self._tables) > 1:
                self._held -= self._tables.popitem(last=False)[1].nbytes
        else:
            self._tables.move_to_end(shard)
        return found

    def _idx(self, info: ShardInfo) -> bytes | None:
        if not is_remote(info.idx) or self.copies is None:
            return _read_bytes(info.idx, self.storage, READ_SECONDS)
        copy = self.copies / f"{info.idx_sha256}.idx"
        try:
            content = copy.read_bytes()
            if hashlib.sha256(content).hexdigest() == info.idx_sha256:
                return content
        except OSError:
            pass
        content = _read_bytes(info.idx, self.storage, READ_SECONDS)
        try:
            temporary = copy.with_name(f".{copy.name}.{os.getpid()}.tmp")
            self.copies.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(content or b"")
            os.replace(temporary, copy)
        except OSError:
            pass  # a full or read-only disk: it is downloaded again next time
        return content

    def sample(self, shard: int, index: int) -> SampleRef:
        """Key, URL and members {extension: (offset, size)} of sample `index` of shard number `shard`."""
        return self.table(shard).sample(index, self.shards[shard].url)

    def digest(self) -> str:
        """SHA-256 of the ordered list of (shard base name, samples, bytes): equal data, wherever it lies."""
        text = "".join(f"{info.name}\t{info.count}\t{info.nbytes}\n" for info in self.shards)
        return hashlib.sha256(text.encode()).hexdigest()


def open_source(settings: SourceSettings, *, index_dir: str | None = None, world: World | None = None) -> SourceIndex:
    """Opens a source: finds, or for local shards builds, its index, and compares every shard's size with it.

    Any rank may call it alone; nothing in it is a collective. A rank that is not the first of its node leaves the
    building of an index to that one for a while. With more than 2048 shards only rank 0 compares sizes, so an error may
    come on rank 0 alone: call it inside `dist.together`.
    """
    urls = resolve_shards(settings.shards, index_dir)
    known = known_shards(urls, index_dir, settings.storage)
    if known.lacking:
        _add_cached(known, _cached_index(known.lacking, settings, index_dir, world))
    infos = [known.infos[url] for url in urls]
    if not sum(info.count for info in infos):
        raise DataError(f"Source `{settings.name}` holds no samples: {len(infos)} shard(s), all empty "
                        f"({infos[0].url}{' ...' if len(infos) > 1 else ''}).",
                        "check `shards`; a sample is a group of members such as 0001.jpg and 0001.cls")
    if world is None or world.rank == 0 or len(infos) <= MANY_SHARDS:
        tags: dict[str, str] = {}
        check_sizes(infos, settings.storage, tags).raise_if_any()
        if len(infos) <= MANY_SHARDS:  # on all ranks or on none: the tag is part of a shard's name in the node's cache
            infos = [replace(info, tag=tags.get(info.url, "")) for info in infos]
    label = settings.label if "label" in settings.model_fields_set else known.label
    return SourceIndex(settings.name, infos, label, known.classes, storage=settings.storage,
                       copies=cache_folder(index_dir) / "idx")


def storage_of(indexes: Iterable[SourceIndex]) -> dict[str, Storage]:
    """For `Reader`: options of the file systems, by folder of the shards."""
    return {folder_of(info.url): index.storage for index in indexes if index.storage
            for info in index.shards if is_remote(info.url)}


def stamps_of(indexes: Iterable[SourceIndex]) -> dict[str, str]:
    """For `Cache`: what a remote shard's content is known by, by URL. A shard that changes gets another one."""
    return {info.url: f"{info.nbytes}-{info.idx_sha256}-{info.tag}" for index in indexes for info in index.shards
            if is_remote(info.url)}


# ------------------------------------------------------------------------------------------------------ finding one


@dataclass
class Known:
    """What indexes say of some shards."""

    infos: dict[str, ShardInfo]
    """By path or URL."""
    lacking: list[str]
    """Paths and URLs without an index."""
    label: str = "cls"
    classes: list[str] | None = None


def known_shards(urls: Sequence[str], index_dir: str | None = None, storage: Storage | None = None) -> Known:
    """Looks for indexes beside the shards, then in the cache; builds none. Damaged or lacking entries are a `DataError`."""
    known = Known({}, [])
    problems = Problems(DataError, "Shards do not agree with their index:")
    for folder, members in by_folder(urls).items():
        content = _read_bytes(beside(members[0], INDEX_NAME), storage)
        if content is None:
            known.lacking += members
            continue
        index = read_index_json(content, beside(members[0], INDEX_NAME))
        listed = {entry["name"]: entry for entry in index["shards"]}
        known.label = index.get("label", "cls")
        strange = [url for url in members if base_name(url) not in listed]
        gone = missing(strange)  # braces that run past the last shard are the common case
        problems.items += gone
        if len(strange) > len(gone):
            there = [url for url in strange if is_remote(url) or os.path.exists(url)]
            last = index["shards"][-1]["name"] if index["shards"] else "nothing"
            problems.add(f"{len(there)} shard(s) are not in {folder}/{INDEX_NAME}: the first is {base_name(there[0])}, "
                         f"its last one is {last}.", f"the shards it lists, or {index_command([folder])} --overwrite "
                         "(another index is another order of samples)")
        for url in members:
            entry = listed.get(base_name(url))
            if entry is None:
                continue
            known.infos[url] = _info(entry, url, beside(url, f"{entry['name']}.idx"))
        if known.classes is None:
            known.classes = _read_classes(beside(members[0], "classes.json"), storage)
    problems.raise_if_any()
    if known.lacking and (folder := cached_folder(known.lacking, index_dir)).exists():
        _add_cached(known, folder)
    return known


def _add_cached(known: Known, folder: Path) -> None:
    index = read_index_json(folder / INDEX_NAME)
    known.label = index.get("label", "cls")
    for url, entry in zip(known.lacking, index["shards"]):
        known.infos[url] = _info(entry, url, str(folder / entry["idx"]))
    known.lacking = []


def _info(entry: dict[str, Any], url: str, idx: str) -> ShardInfo:
    return ShardInfo(entry["name"], url, int(entry["bytes"]), int(entry["samples"]), idx, entry["idx_sha256"])


def _cached_index(urls: list[str], settings: SourceSettings, index_dir: str | None, world: World | None) -> Path:
    folder = cached_folder(urls, index_dir)
    remote = [url for url in urls if is_remote(url)]
    if remote:
        words = [settings.shards] if isinstance(settings.shards, str) else list(settings.shards)
        raise DataError(f"{len(remote)} remote shard(s) of source `{settings.name}` have no index, the first is "
                        f"{remote[0]}; looked beside them and in {folder}.",
                        index_command(words, index_dir) + "  (once; it reads the headers of every shard)")
    absent = Problems(DataError, f"Shards of source `{settings.name}` are missing:")
    absent.items += missing(urls)
    absent.raise_if_any()
    patience = 10.0 if world is not None and world.local_rank else 0.0

    def build(temporary: Path) -> None:
        print(f"# building the index of {len(urls)} shards once, in {folder} (`{index_command([folder_of(urls[0])])}` "
              "would keep it beside them)", file=sys.stderr, flush=True)
        write_index(temporary, urls, beside_shards=False)

    return build_once(folder, build, patience)


def _anew(info: ShardInfo) -> str:
    """What to do for a new index of a shard and those it was indexed with."""
    if folder_of(info.idx) == folder_of(info.url):
        return f"{index_command([folder_of(info.url)])} --overwrite"
    return f"remove {folder_of(info.idx)}" + (", then tubelet data index" if is_remote(info.url) else " and start again")


def check_sizes(infos: Sequence[ShardInfo], storage: Storage | None = None, tags: dict[str, str] | None = None) -> Problems:
    """Every shard that vanished or whose size is not the one in the index, as problems (none: all is well). Fills `tags`
    with those of remote shards."""
    problems = Problems(DataError, "Shards are not what their index says:")
    gone = {info.url for info in infos if not is_remote(info.url) and not os.path.exists(info.url)}
    problems.items += missing(info.url for info in infos if info.url in gone)
    for info, found in _stats([info for info in infos if info.url not in gone], storage):
        if isinstance(found, DataError):
            problems.items.append(found)
        elif found.size != info.nbytes:
            what = "cut short" if found.size < info.nbytes else "longer than it was"
            problems.add(f"{info.url} has {found.size} bytes, its index says {info.nbytes}: it is {what}.",
                         f"copy the shard again; if it was meant to change: {_anew(info)}")
        elif tags is not None:
            tags[info.url] = found.tag
    return problems


def _stats(infos: Sequence[ShardInfo], storage: Storage | None) -> Iterator[tuple[ShardInfo, Stat | DataError]]:
    remote = [info for info in infos if is_remote(info.url)]
    for info in infos:
        if not is_remote(info.url):
            yield info, Stat(os.stat(info.url).st_size)
    if not remote:
        return

    def ask(info: ShardInfo) -> Stat | DataError:
        try:
            return persist(lambda: stat(info.url, storage), info.url, "its size", OPEN_SECONDS)
        except DataError as error:
            return error

    with ThreadPoolExecutor(min(16, len(remote))) as pool:
        failures = 0
        for info, found in zip(remote, pool.map(ask, remote)):
            yield info, found
            failures += isinstance(found, DataError)
            if failures == 10:  # a network that is down would say the same of every shard
                pool.shutdown(cancel_futures=True)
                return


def _read_bytes(url: str, storage: Mapping[str, Any] | None = None, seconds: float | None = None, *,
                optional: bool = False) -> bytes | None:
    """Content of a small file, local or remote; None when there is none."""
    if is_remote(url):
        return persist(lambda: read_file(url, storage, optional=optional), url, "the whole file", seconds or OPEN_SECONDS)
    try:
        return Path(url).read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DataError(f"{url} cannot be read: {error.strerror}.", "check the path and its permissions") from None


def _read_classes(url: str, storage: Storage | None = None) -> list[str] | None:
    content = _read_bytes(url, storage, optional=True)
    if content is None:
        return None
    try:
        found = json.loads(content)
    except ValueError:
        found = None
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise DataError(f"{url} must be a JSON list of class names by number.", "remove it, or write it again")
    return found
