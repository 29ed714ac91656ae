"""What `tubelet data write` can read: class folders, lists of files, arrays, made-up sets. Tars of others: `repack.py`.

Listing looks at names and sizes only and costs one `stat` an entry; nothing is opened before its sample is written. A
listing is flat arrays, never an object per entry: the text of its path and 28 bytes beside it (8 more for the order in which
they are written). A file that cannot be used (missing, empty, unknown by its name) is in `refused`, never dropped
without a word; whether that stops the work is for `write.py` to say.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.decode import PICTURES, BadSample
from data_pipelines.made_up import PictureSet, encode_png, made_up
from data_pipelines.media import VIDEOS
from tubelet import safe_io
from tubelet.errors import DataError, Problems, TubeletError, nearest
from tubelet.files import sha256_file

TABLES = (".csv", ".tsv", ".jsonl", ".parquet")
EMPTY, ABSENT, FOREIGN = "is empty (0 bytes)", "does not exist", "is not a picture or video by its name"
SHOWN = 20  # problems of one kind that are listed before the rest is only counted

Members = dict[str, bytes]


class Texts:
    """Many short texts in one buffer; 8 bytes each beside their UTF-8, where a `str` in a list takes about 60."""

    def __init__(self) -> None:
        self.data, self.ends = bytearray(), array("q")

    def append(self, text: str) -> None:
        self.data += text.encode("utf-8", "surrogateescape")
        self.ends.append(len(self.data))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, i: int) -> str:
        low = self.ends[i - 1] if i else 0
        return self.data[low : self.ends[i]].decode("utf-8", "surrogateescape")


@dataclass
class Inputs:
    """Samples that can be written, one at a time, in any order.

    `sample(i)` -> (a name for the key or "", members by extension); raises `BadSample` when it cannot be read.
    """

    count: int
    sample: Callable[[int], tuple[str, Members]]
    name: Callable[[int], str]
    """What a sample is called when it is refused: its path, or its key and shard."""
    digest: str
    """SHA-256 over names, sizes and labels: another digest is another input."""
    label: str = "cls"
    """Rule by which a reader finds the class number: `cls`, `txt` or `json:path.to.field`."""
    classes: list[str] | None = None
    """Class names by number, when known."""
    refused: list[tuple[str, str]] = field(default_factory=list)
    """(path, reason) of what is not among the samples."""
    notes: list[str] = field(default_factory=list)
    """What the person who writes it should know."""


@dataclass(frozen=True)
class Columns:
    """Which columns of a list mean what."""

    path: str = "path"
    label: str = "label"
    keep: tuple[str, ...] = ()
    """Further columns, which go into a `json` member."""


def read_inputs(source: str, *, label: str | None = None, columns: Columns = Columns()) -> Inputs:
    """What IN of `tubelet data write IN OUT` names, with all its problems in one `DataError`. `label` is for tars."""
    if source.startswith("made-up:"):
        return from_pictures(made_up(source), source)
    from data_pipelines.repack import list_tars, names_tars

    if names_tars(source):
        return list_tars(source, label=label)
    if label:
        raise DataError(f"`--label {label}` says where the label is in tars, but {source} is no set of tars.",
                        "leave it out; the column of a list is named by --label-column")
    path = Path(source).expanduser()
    if not path.exists():
        beside = sorted(p.name for p in path.parent.iterdir()) if path.parent.is_dir() else []
        close = nearest(path.name, beside, 3)
        raise DataError(f"{source} does not exist.", f"one of {', '.join(close)}" if close else
                        "a folder of class folders, a .csv, .tsv, .jsonl, .parquet or .npz file, tars, or made-up:fractals")
    if path.is_dir():
        return _class_folders(path)
    if path.suffix == ".npz":
        return from_pictures(_arrays(path), source, sha256_file(path))
    if path.suffix in TABLES:
        return _table(path, columns)
    raise DataError(f"{source} is neither a folder nor .csv, .tsv, .jsonl, .parquet, .npz or .tar.",
                    "a folder of class folders, or a table with the columns path,label")


def from_pictures(pictures: PictureSet, name: str, digest: str = "") -> Inputs:
    """Inputs of pictures that are encoded when asked for; `digest` of what they are made of, where `name` does not say."""
    def sample(i: int) -> tuple[str, Members]:
        extension, data, stem = pictures.sample(i)
        return stem, {extension: data, "cls": str(int(pictures.labels[i])).encode()}

    found = hashlib.sha256(f"{name} {digest} {pictures.classes}".encode() + pictures.labels.tobytes()).hexdigest()
    return Inputs(len(pictures.labels), sample, lambda i: f"{name}, number {i}", found,
                  classes=pictures.classes, notes=list(pictures.notes))


# ---------------------------------------------------------------------------------------------------- files


class FileTable:
    """Paths below a folder with sizes and class numbers, flat; it fills as a list is read."""

    def __init__(self, root: Path):
        self.root, self.paths = str(root), Texts()
        self.sizes, self.codes, self.extra = array("q"), array("i"), Texts()
        self.refused: list[tuple[str, str]] = []

    def add(self, name: str, code: int, extra: str = "") -> bool:
        """Take in the file `name` with the class `code`, unless it cannot be used."""
        path = os.path.join(self.root, name)
        reason, size = "", 0
        if extension(name) not in PICTURES + VIDEOS:
            reason = FOREIGN
        try:
            size = os.stat(path).st_size
            reason = reason or ("" if size else EMPTY)
        except OSError as error:
            reason = ABSENT if isinstance(error, FileNotFoundError) else f"cannot be read: {error.strerror}"
        if reason:
            self.refused.append((path, reason))
            return False
        self.paths.append(name)
        self.sizes.append(size)
        self.codes.append(code)
        if extra:
            self.extra.append(extra)
        return True

    def inputs(self, labels: np.ndarray, classes: list[str] | None, notes: list[str]) -> Inputs:
        """`labels` int64 [n]: class number of every file taken in."""
        def sample(i: int) -> tuple[str, Members]:
            name = self.paths[i]
            path = os.path.join(self.root, name)
            try:
                with open(path, "rb") as file:
                    data = file.read()
            except OSError as error:
                raise BadSample(f"cannot be read: {error.strerror or error}") from None
            if len(data) != self.sizes[i]:
                raise DataError(f"{path} has {len(data)} bytes, and had {self.sizes[i]} when the input was listed.",
                                "write again once nothing changes the input any more")
            kind = extension(name)
            members = {"jpg" if kind == "jpeg" else kind: data, "cls": str(int(labels[i])).encode()}
            if len(self.extra):
                members["json"] = self.extra[i].encode()
            return os.path.splitext(os.path.basename(name))[0], members

        digest = hashlib.sha256(json.dumps(classes).encode())
        for part in (self.paths.data, self.paths.ends, self.sizes, self.extra.data, self.extra.ends, labels):
            digest.update(np.frombuffer(part, dtype=np.uint8).data if len(part) else b"")
            digest.update(b"|")
        return Inputs(len(self.paths), sample, lambda i: os.path.join(self.root, self.paths[i]), digest.hexdigest(),
                      classes=classes, refused=self.refused, notes=notes)


def extension(name: str) -> str:
    """The last extension of a file name, lower case, without the dot."""
    return os.path.splitext(name)[1][1:].lower()


def _class_folders(root: Path) -> Inputs:
    problems = Problems(DataError, f"{root} cannot be written as shards:")
    folders = sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    table, others, tars = FileTable(root), 0, ""
    for label, folder in enumerate(folders):
        before = len(table.paths) + len(table.refused)
        for where, inner, names in os.walk(root / folder, followlinks=True):
            inner.sort()
            below = os.path.relpath(where, root)
            for name in sorted(names):
                if name.startswith(".") or extension(name) not in PICTURES + VIDEOS:
                    others += 1
                    tars = tars or (folder if name.endswith(".tar") else "")
                    continue
                table.add(os.path.join(below, name), label)
        if len(table.paths) + len(table.refused) == before:
            problems.add(f"The class folder {root / folder} holds no picture or video.", f"{root / tars}, whose tars can be "
                         "written anew" if tars else "remove it, or add its pictures")
    if not folders:
        loose = any(extension(path.name) in PICTURES + VIDEOS for path in root.iterdir())
        what = "pictures or videos, but no class folders" if loose else "no class folders"
        problems.add(f"{root} holds {what}; each folder in it is one class.",
                     "a table instead: a .csv with the columns path,label")
    if problems:  # a folder without classes and its unreadable files are told together
        add_refused(problems, table.refused)
    problems.raise_if_any()
    notes = [f"{others} files that are neither pictures nor videos were left out"] if others else []
    return table.inputs(np.array(table.codes, dtype=np.int64), folders, notes)


def add_refused(problems: Problems, refused: Sequence[tuple[str, str]]) -> None:
    """Each refused file as a problem; of more than a score of one kind the rest is counted."""
    hints = {EMPTY: "remove it, or copy it again", ABSENT: "paths are relative to the folder of the list",
             FOREIGN: f"one of {', '.join(PICTURES + VIDEOS)}"}
    kinds: dict[str, list[tuple[str, str]]] = {}
    for path, reason in refused:
        kinds.setdefault(reason if reason in hints else "", []).append((path, reason))
    for kind, items in kinds.items():
        for path, reason in items[:SHOWN]:
            problems.add(f"{path} {reason}.", hints.get(kind, "--on-error skip to write the others; refused.jsonl lists it"))
        if len(items) > SHOWN:
            problems.add(f"... and {len(items) - SHOWN} more of this kind.", "--on-error skip to write the others")


# ---------------------------------------------------------------------------------------------------- lists


def _rows(path: Path, columns: Columns) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number, row) of a list, read as a stream."""
    try:
        yield from _read_rows(path, columns)
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not a list in UTF-8 ({error}).", "a header line path,label, one line per file") from None


def _read_rows(path: Path, columns: Columns) -> Iterator[tuple[int, dict[str, Any]]]:
    if path.suffix == ".parquet":
        yield from _parquet_rows(path, columns)
    elif path.suffix == ".jsonl":
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise DataError(f"{path}, line {number} is not JSON ({error}).",
                                    '{"path": "a/b.jpg", "label": 3}') from None
                yield number, row if isinstance(row, dict) else {}
    else:
        with open(path, newline="", encoding="utf-8-sig") as file:
            yield from enumerate(csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ","), 1)


def _parquet_rows(path: Path, columns: Columns) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise DataError(f"Reading {path} takes pyarrow, which is not installed.", "pip install tubelet[parquet]") from None
    try:
        with parquet.ParquetFile(path) as file:
            wanted = [name for name in (columns.path, columns.label, *columns.keep) if name in file.schema_arrow.names]
            number = 0
            for batch in file.iter_batches(10_000, columns=wanted or None):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (ArrowException, OSError) as error:
        raise DataError(f"{path} is not a parquet file ({str(error).splitlines()[0]}).", "copy it again") from None


def _table(path: Path, columns: Columns) -> Inputs:
    table, codes = FileTable(path.parent), dict[str, int]()
    lacking: list[str] = []
    negative: list[str] = []
    count = 0
    for number, row in _rows(path, columns):
        count += 1
        name, raw = row.get(columns.path), row.get(columns.label)
        absent = [column for column in columns.keep if column not in row]
        unknown = [column for column in (columns.path, columns.label, *columns.keep) if column not in row]
        if count == 1 and unknown and path.suffix != ".jsonl":  # a table's columns are those of its header: said once
            lack = " and no column ".join(f"`{column}`" for column in unknown)
            raise DataError(f"{path} has no column {lack}; its columns are {', '.join(map(str, row)) or 'none'}.",
                            "a header line with path,label, or --path-column and --label-column to name others")
        if name in (None, "") or raw in (None, "") or absent:
            lack = " or no ".join(f"`{column}`" for column in [columns.path, columns.label, *absent]
                                  if row.get(column) in (None, ""))
            lacking.append(f"{path}, row {number} has no {lack} (its columns are {', '.join(map(str, row)) or 'none'}).")
            continue
        text = str(raw).strip()
        if re.fullmatch(r"-\d+", text):
            negative.append(f"{path}, row {number}: the label is {text}.")
        extra = json.dumps({column: row[column] for column in columns.keep}, default=str, ensure_ascii=False)
        table.add(str(name), codes.setdefault(text, len(codes)), extra if columns.keep else "")
    if not count:
        raise DataError(f"{path} has no rows.", "a header line path,label and one line per picture")
    problems = Problems(DataError, f"{path} cannot be written as shards:")
    both = f"the columns {columns.path},{columns.label} in every row, or --path-column and --label-column to name others"
    for texts, hint in ((lacking, both), (negative, "class numbers count from 0")):
        for text in texts[:SHOWN]:
            problems.add(text, hint)
        if len(texts) > SHOWN:
            problems.add(f"... and {len(texts) - SHOWN} more of this kind.")
    if problems:
        add_refused(problems, table.refused)
    problems.raise_if_any()
    if all(re.fullmatch(r"\d+", text) for text in codes):
        classes, numbers = None, [int(text) for text in codes]
    else:
        classes = sorted(codes)
        place = {name: number for number, name in enumerate(classes)}
        numbers = [place[text] for text in codes]
    labels = np.array(numbers, dtype=np.int64)[np.array(table.codes, dtype=np.int64)]
    return table.inputs(labels, classes, [])


def _arrays(path: Path) -> PictureSet:
    try:
        arrays = safe_io.read_npz(path)
    except TubeletError as error:
        raise DataError(error.problem, error.hint) from None
    problems = Problems(DataError, f"{path} cannot be written as shards:")
    if not {"images", "labels"} <= set(arrays):
        raise DataError(f"{path} holds {', '.join(arrays) or 'nothing'}; `images` and `labels` are needed.",
                        "np.savez(path, images=uint8 [N, H, W, 3], labels=int [N])")
    images, labels = arrays["images"], arrays["labels"]
    if images.dtype != np.uint8 or not (images.ndim == 3 or (images.ndim == 4 and images.shape[3] == 3)):
        problems.add(f"`images` is {images.dtype} {list(images.shape)}, must be uint8 [N, H, W, 3] or [N, H, W].",
                     "channels last, values 0..255")
    if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1]:
        problems.add(f"`labels` is {labels.dtype} {list(labels.shape)}, must be integers [{images.shape[0]}].",
                     "one class number per picture")
    elif len(labels) and labels.min() < 0:
        problems.add(f"`labels` has {int((labels < 0).sum())} below 0, the least is {labels.min()}.",
                     "class numbers count from 0")
    problems.raise_if_any()
    return PictureSet(labels.astype(np.int64), lambda i: ("png", encode_png(images[i]), ""))
