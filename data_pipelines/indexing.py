"""Making the index of shards: scan their headers, write .idx files and index.json, beside them or in the cache.

`tubelet data write` and the first opening of local shards use `write_index`; `tubelet data index` is `build_index`.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_pipelines.once import build_once, cache_folder
from data_pipelines.progress import track
from data_pipelines.scan import idx_bytes, scan_shard
from data_pipelines.shards import INDEX_NAME, base_name, by_folder, expand, is_remote, missing, resolve_shards
from data_pipelines.side_by_side import in_processes
from tubelet.errors import DataError, Problems, TubeletError
from tubelet.files import write_atomic, write_json
from tubelet.redact import identity, redact


def cached_folder(urls: Sequence[str], index_dir: str | None) -> Path:
    """Where the index of these shards is kept when it does not lie beside them."""
    digest = hashlib.sha256("\n".join(map(identity, urls)).encode()).hexdigest()[:20]  # signatures change from job to job
    return cache_folder(index_dir) / "index" / digest


def index_command(words: Sequence[str], index_dir: str | None = None) -> str:
    where = f" --index-dir {shlex.quote(index_dir)}" if index_dir else ""
    return "tubelet data index " + " ".join(shlex.quote(word) for word in words) + where


def _scan_one(job: tuple[str, str]) -> tuple[str, int, int, str] | tuple[str, str, str]:
    """In a worker process: scan, write the .idx file; a problem comes back as text, so that all are reported together."""
    url, idx = job
    try:
        table, nbytes = scan_shard(url)
        content = idx_bytes(table)
        write_atomic(idx, content)
        return url, nbytes, len(table), hashlib.sha256(content).hexdigest()
    except TubeletError as error:
        return url, error.problem, error.hint


def write_index(folder: Path, urls: Sequence[str], *, beside_shards: bool, label: str = "cls", split: str = "train",
                classes: Sequence[str] | None = None, processes: int = 1,
                made: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Scans the shards and writes .idx files, index.json, _info.json (and classes.json) into `folder`; returns index.json.

    `beside_shards`: `folder` is the shards' own. `processes` > 1 scans in that many processes. All damaged shards are
    reported together, and index.json is written last, only when there are none. `made` is recorded there: how the shards
    were written.
    """
    idx = [f"{base_name(url)}.idx" if beside_shards else f"{i:05d}-{base_name(url)}.idx" for i, url in enumerate(urls)]
    jobs = [(url, str(folder / name)) for url, name in zip(urls, idx)]
    problems = Problems(DataError, "Shards that cannot be indexed:")
    entries = []
    for name, result in zip(idx, track(in_processes(_scan_one, jobs, processes), len(jobs), "indexing shards")):
        if len(result) == 3:
            problems.add(result[1], result[2])
            continue
        url, nbytes, samples, digest = result
        entry: dict[str, Any] = {"name": base_name(url), "bytes": nbytes, "samples": samples, "idx_sha256": digest}
        entries.append(entry if beside_shards else {**entry, "idx": name, "url": redact(url)})
    problems.raise_if_any()
    total = sum(entry["samples"] for entry in entries)
    index = {"format": 1, "label": label, "num_samples": total, "bytes": sum(entry["bytes"] for entry in entries),
             "shards": entries} | ({"made": dict(made)} if made else {})
    write_json(folder / "_info.json", {"splits": {split: {
        "name": split, "num_samples": total, "filenames": [entry["name"] for entry in entries],
        "shard_lengths": [entry["samples"] for entry in entries]}}})
    if classes is not None:
        write_json(folder / "classes.json", list(classes))
    write_json(folder / INDEX_NAME, index)
    return index


def build_index(shards: str | Sequence[str], *, index_dir: str | None = None, label: str = "cls", overwrite: bool = False,
                processes: int = 1, split: str = "train") -> list[Path]:
    """`tubelet data index`: indexes tars somebody else wrote. Returns the index.json files written, one per folder.

    Local shards get it beside them; with `index_dir`, and for remote shards always, it goes where `open_source` looks.
    """
    check_label_rule(label)
    urls = _listed_anew(shards) if overwrite and not index_dir else resolve_shards(shards, index_dir)
    absent = Problems(DataError, "Shards are missing:")
    absent.items += missing(urls)
    absent.raise_if_any()
    if index_dir is not None or any(map(is_remote, urls)):
        folder = cached_folder(urls, index_dir)
        if folder.exists():
            if not overwrite:
                raise DataError(f"{folder} is already the index of these shards.", "--overwrite to build it anew")
            old = folder.with_name(f".{folder.name}.old")  # out of the way whole: nobody may meet half a folder
            shutil.rmtree(old, ignore_errors=True)
            os.rename(folder, old)
            shutil.rmtree(old)
        build_once(folder, lambda new: write_index(new, urls, beside_shards=False, label=label, split=split,
                                                   processes=processes))
        return [folder / INDEX_NAME]
    groups = {Path(folder): members for folder, members in by_folder(urls).items()}
    there = [folder for folder in groups if (folder / INDEX_NAME).exists()]
    if there and not overwrite:
        raise DataError(f"{there[0] / INDEX_NAME} exists; another index is another order of samples.",
                        "--overwrite to build it anew")
    for folder, members in groups.items():
        try:
            (folder / INDEX_NAME).unlink(missing_ok=True)
            write_index(folder, members, beside_shards=True, label=label, split=split, processes=processes)
        except PermissionError as error:
            raise DataError(f"{error.filename} cannot be written.", "--index-dir FOLDER, and data.index_dir=FOLDER in "
                            "the run") from None
    return [folder / INDEX_NAME for folder in groups]


def _listed_anew(shards: str | Sequence[str]) -> list[str]:
    """As `expand`, but a folder stands for the .tar files that are in it now, not for what its old index lists."""
    words = [piece.strip() for text in ([shards] if isinstance(shards, str) else shards) for piece in text.split("::")]
    found: list[str] = []
    for word in words:
        path = Path(word.removeprefix("file://")).expanduser().absolute()
        if not is_remote(word) and path.is_dir():
            tars = sorted(str(p) for p in path.glob("*.tar"))
            found += tars or expand(word)
        else:
            found += expand(word)
    return found


def check_label_rule(label: str) -> None:
    """Raises `DataError` unless it is `cls`, `txt` or `json:path.to.field`."""
    if label in ("cls", "txt") or (label.startswith("json:") and len(label) > 5):
        return
    raise DataError(f"`label` is `{label}`, must be cls, txt or json:path.to.field.", "cls (a class number in 0001.cls)")
