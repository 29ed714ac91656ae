"""Writing WebDataset shards from pictures: class folders, a CSV or JSONL table, arrays in an .npz, or a made-up set.

Samples are permuted by a seed (class folders in order give shards of one class, which no shuffle window repairs) and packed
by webdataset's TarWriter with mtime 0, fixed owner and sorted names: the same input gives the same bytes. Existing picture
files are copied unchanged; arrays become PNG. Shards, .idx files, index.json, _info.json and classes.json appear together,
by one rename.

A sample is `00000012_name.jpg` and `00000012_name.cls` (the class number in ASCII).
"""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.decode import PICTURES
from data_pipelines.indexing import write_index
from data_pipelines.made_up import PictureSet, encode_png, made_up
from data_pipelines.order import permutation
from data_pipelines.progress import track
from data_pipelines.shards import INDEX_NAME
from tubelet import safe_io
from tubelet.errors import DataError, Problems, TubeletError, nearest
from tubelet.files import fsync_dir

WRITE = 4  # purpose of the random words that permute; see order.py for the others
SHOWN = 20  # problems of one kind that are listed before the rest is only counted


def write_shards(source: str, out: str | Path, *, shard_size: int = 5000, seed: int = 0, name: str | None = None,
                 split: str = "train", overwrite: bool = False) -> dict[str, Any]:
    """`tubelet data write IN OUT`: writes the folder `out` whole or not at all; returns its index.json.

    `shard_size` in samples. `overwrite` replaces a folder only when nothing but shards and their indexes is in it.
    """
    out = Path(out).expanduser().absolute()
    if shard_size < 1:
        raise DataError(f"`--shard-size` is {shard_size}, must be at least 1 sample.", "--shard-size 5000")
    _check_target(out, overwrite)
    pictures = read_pictures(source)
    temporary = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        index = write_into(temporary, pictures, name=name or out.name, shard_size=shard_size, seed=seed, split=split)
        old = out.with_name(f".{out.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        if out.exists():
            os.rename(out, old)
        os.rename(temporary, out)
        fsync_dir(out.parent)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise DataError(f"{out} cannot be written: {error.strerror or error}.", "check space and permissions") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return index


def write_into(folder: Path, pictures: PictureSet, *, name: str, shard_size: int, seed: int,
               split: str = "train") -> dict[str, Any]:
    """Shards `name-00000.tar` ... and their index into an existing folder; returns index.json."""
    from webdataset.writer import TarWriter

    total = len(pictures.labels)
    if not total:
        raise DataError("There is no picture to write.", "check the input")
    stem = re.sub(r"[^\w-]", "_", name) or "data"  # braces or dots in a name would be read as something else
    numbers = permutation(total, seed, WRITE, 0, (0, 0, 0)).tolist()
    samples = track(_samples(pictures, numbers), total, "writing samples")
    urls = []
    for shard in range(-(-total // shard_size)):
        path = folder / f"{stem}-{shard:05d}.tar"
        urls.append(str(path))
        with open(path, "wb") as file:
            with TarWriter(file, encoder=False, mtime=0, user="tubelet", group="tubelet", compress=False) as tar:
                for _ in range(min(shard_size, total - shard * shard_size)):
                    tar.write(next(samples))
            file.flush()
            os.fsync(file.fileno())
    for _ in samples:
        raise AssertionError("samples left over")
    return write_index(folder, urls, beside_shards=True, split=split, classes=pictures.classes)


def _samples(pictures: PictureSet, numbers: list[int]) -> Iterator[dict[str, Any]]:
    digits = max(8, len(str(len(numbers))))
    for place, number in enumerate(numbers):
        extension, data, stem = pictures.sample(number)
        stem = re.sub(r"[^A-Za-z0-9_-]", "_", stem)[:60]
        yield {"__key__": f"{place:0{digits}d}" + (f"_{stem}" if stem else ""), extension: data,
               "cls": str(int(pictures.labels[number])).encode()}


def _check_target(out: Path, overwrite: bool) -> None:
    if not out.exists():
        return
    if not out.is_dir():
        raise DataError(f"{out} is a file; shards go into a folder.", "another name")
    inside = sorted(path.name for path in out.iterdir())
    if inside and not overwrite:
        raise DataError(f"{out} is not empty ({', '.join(inside[:3])}{' ...' if len(inside) > 3 else ''}).",
                        "--overwrite to replace it, or another folder")
    ours = (".tar", ".tar.idx")
    foreign = [n for n in inside if not n.endswith(ours) and n not in (INDEX_NAME, "_info.json", "classes.json")]
    if foreign:
        raise DataError(f"{out} holds more than shards and their index ({', '.join(foreign[:3])}), so it is not replaced.",
                        "another folder, or move those files away")


# ---------------------------------------------------------------------------------------------------- inputs


def read_pictures(source: str) -> PictureSet:
    """What IN of `tubelet data write IN OUT` names, with all its problems in one `DataError`."""
    if source.startswith("made-up:"):
        return made_up(source)
    path = Path(source).expanduser()
    if not path.exists():
        beside = sorted(p.name for p in path.parent.iterdir()) if path.parent.is_dir() else []
        close = nearest(path.name, beside, 3)
        raise DataError(f"{source} does not exist.", f"one of {', '.join(close)}" if close else
                        "a folder of class folders, a .csv, .jsonl or .npz file, or made-up:fractals")
    if path.is_dir():
        return _class_folders(path)
    if path.suffix == ".npz":
        return _arrays(path)
    if path.suffix in (".csv", ".tsv", ".jsonl"):
        return _table(path)
    raise DataError(f"{source} is neither a folder nor .csv, .tsv, .jsonl or .npz.",
                    "a folder of class folders, or a table with the columns path,label")


def _files_set(paths: list[Path], labels: np.ndarray, classes: list[str] | None, notes: tuple[str, ...]) -> PictureSet:
    def sample(i: int) -> tuple[str, bytes, str]:
        extension = paths[i].suffix[1:].lower()
        return "jpg" if extension == "jpeg" else extension, paths[i].read_bytes(), paths[i].stem

    return PictureSet(labels, sample, classes, notes)


def _class_folders(root: Path) -> PictureSet:
    problems = Problems(DataError, f"{root} cannot be written as shards:")
    folders = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    paths: list[Path] = []
    labels: list[int] = []
    others = 0
    for label, folder in enumerate(folders):
        before = len(paths)
        for where, inner, names in os.walk(folder, followlinks=True):
            inner.sort()
            for name in sorted(names):
                if name.startswith(".") or name.rpartition(".")[2].lower() not in PICTURES:
                    others += 1
                    continue
                paths.append(Path(where) / name)
                labels.append(label)
        if len(paths) == before:
            problems.add(f"The class folder {folder} holds no picture.", "remove it, or add its pictures")
    if not folders:
        loose = any(path.suffix[1:].lower() in PICTURES for path in root.iterdir())
        what = "pictures, but no class folders" if loose else "no class folders"
        problems.add(f"{root} holds {what}; each folder in it is one class.",
                     "a table instead: a .csv with the columns path,label")
    empty = [path for path in paths if path.stat().st_size == 0]
    _add_some(problems, [f"{path} is empty (0 bytes)." for path in empty], "remove it, or copy it again")
    problems.raise_if_any()
    notes = (f"{others} files that are not pictures were left out",) if others else ()
    return _files_set(paths, np.array(labels, dtype=np.int64), [folder.name for folder in folders], notes)


def _add_some(problems: Problems, texts: list[str], hint: str) -> None:
    for text in texts[:SHOWN]:
        problems.add(text, hint)
    if len(texts) > SHOWN:
        problems.add(f"... and {len(texts) - SHOWN} more of this kind.")


def _rows(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".jsonl":
        rows = []
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise DataError(f"{path}, line {number} is not JSON ({error}).", '{"path": "a/b.jpg", "label": 3}') from None
            rows.append(row if isinstance(row, dict) else {})
        return rows
    with open(path, newline="") as file:
        return list(csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ","))


def _table(path: Path) -> PictureSet:
    rows = _rows(path)
    if not rows:
        raise DataError(f"{path} has no rows.", "a header line path,label and one line per picture")
    problems = Problems(DataError, f"{path} cannot be written as shards:")
    lacking = [number for number, row in enumerate(rows, 1)
               if row.get("path") in (None, "") or row.get("label") in (None, "")]
    _add_some(problems, [f"{path}, row {number} has no `path` or no `label` (its columns are "
                         f"{', '.join(map(str, rows[number - 1])) or 'none'})." for number in lacking],
              "the columns path,label in every row")
    problems.raise_if_any()
    paths = [path.parent / str(row["path"]) for row in rows]
    absent = [p for p in paths if not p.is_file()]
    _add_some(problems, [f"{p} does not exist." for p in absent], f"paths are relative to {path.parent}")
    foreign = [p for p in paths if p.suffix[1:].lower() not in PICTURES]
    _add_some(problems, [f"{p} is not a picture by its name." for p in foreign], f"one of {', '.join(PICTURES)}")
    empty = [p for p in paths if p.is_file() and p.stat().st_size == 0]
    _add_some(problems, [f"{p} is empty (0 bytes)." for p in empty], "remove it, or copy it again")
    raw = [str(row["label"]).strip() for row in rows]
    if all(re.fullmatch(r"-?\d+", label) for label in raw):
        labels, classes = np.array([int(label) for label in raw], dtype=np.int64), None
        negative = [number for number, label in enumerate(labels, 1) if label < 0]
        _add_some(problems, [f"{path}, row {number}: the label is {labels[number - 1]}." for number in negative],
                  "class numbers count from 0")
    else:
        classes = sorted(set(raw))
        number_of = {name: k for k, name in enumerate(classes)}
        labels = np.array([number_of[label] for label in raw], dtype=np.int64)
    problems.raise_if_any()
    return _files_set(paths, labels, classes, ())


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
