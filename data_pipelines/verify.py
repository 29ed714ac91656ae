"""Verifying shards: do sizes, indexes, headers, labels and pictures hold what a run will rely on?

Everything is looked at and every problem is named; nothing is mended. Without an index the headers alone are checked.
Members that a loader would never read (a `.pyd`, a `.pkl`) are only listed: no member's content is ever run.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from data_pipelines.decode import (
    PICTURES,
    BadSample,
    check_label,
    decode_image,
    label_member,
    read_class_map,
    read_label,
)
from data_pipelines.index import ShardInfo, SourceIndex, known_shards
from data_pipelines.indexing import check_label_rule
from data_pipelines.progress import track
from data_pipelines.reader import Reader
from data_pipelines.scan import ShardTable, idx_bytes, scan_shard
from data_pipelines.shards import base_name, is_remote, missing, resolve_shards
from tubelet.errors import DataError, TubeletError

SHOWN = 10  # problems of one shard that are worded; the rest is counted
UNSAFE = {"pyd", "pkl", "pickle", "pth", "pt"}  # WebDataset's own decoder would unpickle these


@dataclass
class ShardReport:
    """What was found in one shard."""

    url: str
    samples: int = 0
    nbytes: int = 0
    problems: list[str] = field(default_factory=list)
    hidden: int = 0
    """Problems beyond the first ten."""
    labels: Counter[int] = field(default_factory=Counter)
    extensions: Counter[str] = field(default_factory=Counter)
    keys: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.uint64))
    """uint64 [n]: the first bytes of each key's hash."""

    def add(self, problem: str) -> None:
        if len(self.problems) < SHOWN:
            self.problems.append(problem)
        else:
            self.hidden += 1


@dataclass
class Report:
    """What was found in all shards."""

    shards: list[ShardReport]
    indexed: bool
    label: str
    classes: list[str] | None
    notes: list[str]
    """Things worth knowing that are not wrong."""

    @property
    def num_problems(self) -> int:
        return sum(len(shard.problems) + shard.hidden for shard in self.shards)


@dataclass(frozen=True)
class Checks:
    """How thoroughly: `num_classes` 0 accepts any class number; `decode` decodes every picture."""

    label: str
    class_map: str | None
    num_classes: int
    decode: bool


def verify(shards: str | Sequence[str], *, index_dir: str | None = None, label: str | None = None,
           class_map: str | None = None, num_classes: int = 0, decode: bool = False, processes: int = 1) -> Report:
    """`tubelet data verify`: checks every sample of the shards. `label` None takes the rule their index names.

    Raises `DataError` only when it cannot even be said which shards are meant.
    """
    urls = resolve_shards(shards, index_dir)
    known = known_shards(urls, index_dir)
    rule = label or known.label
    check_label_rule(rule)
    read_class_map(class_map)
    if not num_classes and known.classes:
        num_classes = len(known.classes)
    check = partial(_verify_one, checks=Checks(rule, class_map, num_classes, decode))
    jobs = [(url, known.infos.get(url)) for url in urls]
    found = list(track(_run(check, jobs, processes), len(jobs), "verifying shards"))
    if not any(shard.samples or shard.problems for shard in found):
        found[0].add("no shard holds a sample; a sample is a group of members such as 0001.jpg and 0001.cls")
    return Report(found, not known.lacking, rule, known.classes, _notes(found, known.lacking))


def _run(check: partial[ShardReport], jobs: list[tuple[str, ShardInfo | None]], processes: int) -> Iterable[ShardReport]:
    if processes <= 1 or len(jobs) <= 1:
        yield from map(check, jobs)
        return
    with ProcessPoolExecutor(min(processes, len(jobs))) as pool:
        yield from pool.map(check, jobs)


def _notes(found: list[ShardReport], lacking: list[str]) -> list[str]:
    notes = []
    if lacking:
        notes.append(f"{len(lacking)} shard(s) have no index, so their size cannot be compared with anything; "
                     "`tubelet data index` makes one")
    keys = np.concatenate([shard.keys for shard in found]) if found else np.empty(0, dtype=np.uint64)
    repeated = len(keys) - len(np.unique(keys))
    if repeated:
        notes.append(f"{repeated} key(s) stand in more than one shard: harmless unless a shard was copied twice")
    unsafe = sum((shard.extensions for shard in found), Counter())
    unsafe = {kind: count for kind, count in unsafe.items() if kind.rpartition(".")[2] in UNSAFE}
    if unsafe:
        notes.append("members that could run code when unpickled are never read: "
                     + ", ".join(f"{count} .{kind}" for kind, count in sorted(unsafe.items())))
    return notes


def _verify_one(job: tuple[str, ShardInfo | None], checks: Checks) -> ShardReport:
    url, info = job
    report = ShardReport(url)
    gone = missing([url])
    if gone:
        report.add(f"{gone[0].problem} {gone[0].hint}")
        return report
    try:
        table, report.nbytes = scan_shard(url)
    except TubeletError as error:
        report.add(error.problem)
        return report
    report.samples = len(table)
    if info is not None:
        _compare(report, table, info)
    _check_samples(report, table, checks)
    return report


def _compare(report: ShardReport, table: ShardTable, info: ShardInfo) -> None:
    if info.nbytes != report.nbytes:
        report.add(f"it has {report.nbytes} bytes, its index says {info.nbytes}")
    if info.count != len(table):
        report.add(f"it has {len(table)} samples, its index says {info.count}")
    try:
        SourceIndex("", [info]).table(0)
    except TubeletError as error:
        report.add(error.problem)
        return
    if hashlib.sha256(idx_bytes(table)).hexdigest() != info.idx_sha256:
        report.add("keys, members or offsets are not those of its .idx file: the shard was changed after it was indexed")


def _check_samples(report: ShardReport, table: ShardTable, checks: Checks) -> None:
    reader = Reader(60.0 if is_remote(report.url) else 1.0)
    class_map = read_class_map(checks.class_map)
    label_in = label_member(checks.label)
    keys = np.empty(len(table), dtype=np.uint64)
    for number in range(len(table)):
        ref = table.sample(number, report.url)
        keys[number] = int.from_bytes(hashlib.blake2b(ref.key.encode("utf-8", "surrogateescape"), digest_size=8).digest())
        report.extensions.update(list(ref.members))
        picture = next((kind for kind in PICTURES if kind in ref.members), None)
        wrong = []
        if picture is None:
            wrong.append(f"no picture among its members ({', '.join(ref.members)})")
        elif not ref.members[picture][1]:
            wrong.append("its picture is empty (0 bytes)")
        if label_in not in ref.members:
            wrong.append(f"no `{label_in}` member for the label (it has {', '.join(ref.members)})")
        try:
            if label_in in ref.members:
                value = read_label(reader.read(ref.url, *ref.members[label_in]), checks.label, class_map)
                report.labels[value] += 1
                check_label(value, checks.num_classes, "it")
            if checks.decode and picture is not None and ref.members[picture][1]:
                decode_image(reader.read(ref.url, *ref.members[picture]))
        except BadSample as error:
            wrong.append(str(error))
        except DataError as error:
            wrong.append(error.problem)
        for what in wrong:
            report.add(f"sample {ref.key}: {what}")
    reader.close()
    report.keys = keys


def summary(report: Report) -> list[tuple[str, int, int, str]]:
    """Rows (shard, samples, bytes, "ok" or how many problems) of the table that is printed."""
    return [(base_name(shard.url), shard.samples, shard.nbytes,
             "ok" if not shard.problems else f"{len(shard.problems) + shard.hidden} problem(s)") for shard in report.shards]
