"""Verifying shards: do sizes, indexes, headers, labels and content hold what a run will rely on?

Everything is looked at and every problem is named; nothing is mended (`repair.py` does). Without an index the headers alone
are checked. Members that a loader would never read (a `.pyd`, a `.pkl`) are only listed: no member's content is ever run.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.decode import BadSample, check_label, label_member, read_class_map, read_label
from data_pipelines.index import ShardInfo, SourceIndex, known_shards
from data_pipelines.indexing import check_label_rule
from data_pipelines.media import media_members, open_media
from data_pipelines.progress import track
from data_pipelines.reader import Reader
from data_pipelines.scan import ShardTable, idx_bytes, scan_shard
from data_pipelines.settings import DataSettings
from data_pipelines.shards import base_name, is_remote, missing, resolve_shards
from data_pipelines.side_by_side import in_processes
from data_pipelines.survey import Found, survey_shard, unsafe_name
from tubelet.errors import DataError, TubeletError
from tubelet.files import sha256_file

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
    contents: list[tuple[str, bytes]] = field(default_factory=list)
    """(key, hash of picture or video), when duplicates are looked for."""

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

    @property
    def labels(self) -> Counter[int]:
        """Samples per class number."""
        return sum((shard.labels for shard in self.shards), Counter())

    def as_json(self) -> dict[str, Any]:
        """Everything found, as plain values."""
        shards = [{"url": shard.url, "samples": shard.samples, "bytes": shard.nbytes, "problems": shard.problems,
                   "hidden": shard.hidden} for shard in self.shards]
        return {"problems": self.num_problems, "samples": sum(shard.samples for shard in self.shards),
                "indexed": self.indexed, "label": self.label, "notes": self.notes,
                "classes": {str(value): count for value, count in sorted(self.labels.items())}, "shards": shards}


@dataclass(frozen=True)
class Checks:
    """How thoroughly: `num_classes` 0 accepts any class number; `decode` decodes every picture, and of videos the first,
    middle and last frame; `duplicates` hashes the content of all media."""

    label: str
    class_map: str | None = None
    num_classes: int = 0
    decode: bool = False
    duplicates: bool = False
    media: DataSettings = field(default_factory=lambda: DataSettings.model_validate({"train": "unused"}))


def verify(shards: str | Sequence[str], *, index_dir: str | None = None, label: str | None = None,
           class_map: str | None = None, num_classes: int = 0, decode: bool = False, duplicates: bool = False,
           checksums: bool = True, processes: int = 1) -> Report:
    """`tubelet data verify`: checks every sample of the shards. `label` None takes the rule their index names;
    `checksums` compares whole files with a `checksums.sha256` beside them, where there is one.

    Raises `DataError` only when it cannot even be said which shards are meant.
    """
    urls = resolve_shards(shards, index_dir)
    known = known_shards(urls, index_dir)
    rule = label or known.label
    check_label_rule(rule)
    read_class_map(class_map)
    if not num_classes and known.classes:
        num_classes = len(known.classes)
    check = partial(_verify_one, checks=Checks(rule, class_map, num_classes, decode, duplicates))
    sums = _checksums(urls) if checksums else {}
    jobs = [(url, known.infos.get(url), sums.get(url)) for url in urls]
    found = list(track(in_processes(check, jobs, processes), len(jobs), "verifying shards"))
    if not any(shard.samples or shard.problems for shard in found):
        found[0].add("no shard holds a sample; a sample is a group of members such as 0001.jpg and 0001.cls")
    _add_duplicates(found)
    return Report(found, not known.lacking, rule, known.classes, _notes(found, known.lacking))


Job = tuple[str, ShardInfo | None, str | None]
"""URL of a shard, what its index says, its SHA-256 in checksums.sha256."""


def _checksums(urls: list[str]) -> dict[str, str]:
    """SHA-256 by URL, from the checksums.sha256 beside local shards (as `sha256sum` writes it)."""
    found: dict[str, str] = {}
    for folder in {Path(url).parent for url in urls if not is_remote(url)}:
        try:
            lines = (folder / "checksums.sha256").read_text().splitlines()
        except OSError:
            continue
        for line in lines:
            digest, _, name = line.strip().partition(" ")
            found[str(folder / name.lstrip(" *"))] = digest.lower()
    return found


def _add_duplicates(found: list[ShardReport]) -> None:
    first: dict[bytes, str] = {}
    for shard in found:
        for key, digest in shard.contents:
            where = first.setdefault(digest, f"{key} of {base_name(shard.url)}")
            if where != f"{key} of {base_name(shard.url)}":
                shard.add(f"sample {key}: the same content as {where}")


def _notes(found: list[ShardReport], lacking: list[str]) -> list[str]:
    notes = []
    if lacking:
        notes.append(f"{len(lacking)} shard(s) have no index, so their size cannot be compared with anything; "
                     "`tubelet data index` makes one")
    empty = [base_name(shard.url) for shard in found if not shard.samples and not shard.problems]
    if empty:
        notes.append(f"{len(empty)} shard(s) hold no sample: {', '.join(empty[:5])}{' ...' if len(empty) > 5 else ''}")
    keys = np.concatenate([shard.keys for shard in found]) if found else np.empty(0, dtype=np.uint64)
    repeated = len(keys) - len(np.unique(keys))
    if repeated:
        notes.append(f"{repeated} key(s) stand in more than one shard: harmless unless a shard was copied twice")
    extensions = sum((shard.extensions for shard in found), Counter())
    total = sum(shard.samples for shard in found)
    lacking_some = [f".{kind} ({total - count} of {total})" for kind, count in sorted(extensions.items())
                    if 0.9 * total <= count < total and not media_members([kind])]
    if lacking_some:
        notes.append(f"members that some samples lack: {', '.join(lacking_some)}")
    unsafe = {kind: count for kind, count in extensions.items() if kind.rpartition(".")[2] in UNSAFE}
    if unsafe:
        notes.append("members that could run code when unpickled are never read: "
                     + ", ".join(f"{count} .{kind}" for kind, count in sorted(unsafe.items())))
    return notes


def _verify_one(job: Job, checks: Checks) -> ShardReport:
    url, info, digest = job
    report = ShardReport(url)
    gone = missing([url])
    if gone:
        report.add(f"{gone[0].problem} {gone[0].hint}")
        return report
    if digest is not None and (real := sha256_file(url)) != digest:
        report.add(f"its SHA-256 is {real[:12]}..., checksums.sha256 says {digest[:12]}...: it was changed or badly copied")
    try:
        table, report.nbytes = scan_shard(url)
    except TubeletError as error:
        _verify_damaged(report, error, checks)
        return report
    if info is not None:
        _compare(report, table, info)
    samples = (Found(ref.key, ref.members) for ref in (table.sample(number, url) for number in range(len(table))))
    _check_samples(report, samples, checks)
    return report


def _verify_damaged(report: ShardReport, error: TubeletError, checks: Checks) -> None:
    """Of a shard that no index can be made of: all of its faults, not only the first."""
    survey = survey_shard(report.url)
    report.nbytes = survey.nbytes
    if not survey.faults and not any(sample.faults or sample.apart for sample in survey.samples):
        report.add(error.problem)
    for fault in survey.faults:
        report.add(fault)
    seen: set[str] = set()
    for sample in survey.samples:
        if sample.apart:
            report.add(f"sample {sample.key}: its members do not stand together")
        if sample.key in seen:
            report.add(f"sample {sample.key}: this key comes twice in the shard")
        seen.add(sample.key)
    _check_samples(report, survey.samples, checks)


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


def _check_samples(report: ShardReport, samples: Iterable[Found], checks: Checks) -> None:
    reader = Reader(60.0 if is_remote(report.url) else 1.0)
    class_map = read_class_map(checks.class_map)
    keys: list[int] = []
    for sample in samples:
        report.samples += 1
        keys.append(int.from_bytes(hashlib.blake2b(sample.key.encode("utf-8", "surrogateescape"), digest_size=8).digest()))
        report.extensions.update(list(sample.members))
        wrong, label, digest = check_sample(sample, report.url, reader, checks, class_map)
        if unsafe_name(sample.key):
            wrong.append("its name is absolute or climbs with `..`; whoever unpacks the tar may overwrite files")
        if label is not None:
            report.labels[label] += 1
        if digest is not None:
            report.contents.append((sample.key, digest))
        for what in wrong:
            report.add(f"sample {sample.key}: {what}")
    reader.close()
    report.keys = np.array(keys, dtype=np.uint64)


def check_sample(sample: Found, url: str, reader: Reader, checks: Checks,
                 class_map: Mapping[str, int] | None) -> tuple[list[str], int | None, bytes | None]:
    """(what is wrong with a sample, its label when it can be read, hash of its media when duplicates are looked for)."""
    wrong, label, digest = list(sample.faults), None, None
    kinds, label_in = media_members(list(sample.members)), label_member(checks.label)
    if not kinds:
        wrong.append(f"no picture or video among its members ({', '.join(sample.members) or 'none'})")
    for kind in kinds:
        if not sample.members[kind][1]:
            wrong.append(f"its {'picture' if len(kinds) == 1 else kind} is empty (0 bytes)")
    if label_in not in sample.members:
        wrong.append(f"no `{label_in}` member for the label (it has {', '.join(sample.members) or 'none'})")
    try:
        if label_in in sample.members:
            label = read_label(reader.read(url, *sample.members[label_in]), checks.label, class_map)
            check_label(label, checks.num_classes, "it")
    except BadSample as error:
        wrong.append(str(error))
    except DataError as error:
        wrong.append(error.problem)
    if (checks.decode or checks.duplicates) and kinds and all(sample.members[kind][1] for kind in kinds):
        try:
            content = reader.read_members(url, {kind: sample.members[kind] for kind in kinds})
            if checks.duplicates:
                digest = hashlib.blake2b(b"".join(content[kind] for kind in kinds), digest_size=16).digest()
            if checks.decode:
                decode_ends(content, checks.media)
        except BadSample as error:
            wrong.append(str(error))
        except DataError as error:
            wrong.append(error.problem)
    return wrong, label, digest


def decode_ends(content: Mapping[str, bytes], settings: DataSettings) -> None:
    """Decodes a picture, or the first, middle and last frame of a video. Raises `BadSample`."""
    media = open_media(content, settings)
    try:
        media.read(sorted({0, media.frames // 2, media.frames - 1}))
    finally:
        media.close()


def summary(report: Report) -> list[tuple[str, int, int, str]]:
    """Rows (shard, samples, bytes, "ok" or how many problems) of the table that is printed."""
    return [(base_name(shard.url), shard.samples, shard.nbytes,
             "ok" if not shard.problems else f"{len(shard.problems) + shard.hidden} problem(s)") for shard in report.shards]
