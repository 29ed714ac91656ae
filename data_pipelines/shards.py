"""Names of shards: what a user writes in `data.train` becomes an ordered list of paths and URLs.

`x-{0000..0063}.tar` (braces as in a shell), a folder, a list, several joined by `::`, `~`, `file://`, and any URL that
fsspec knows (`http(s)://`, `s3://`, `gs://`, `hf://` ...). `pipe:` (a shell command) is refused. A folder stands for the
shards its `index.json` lists, in that order, or without one for its `*.tar` files by name. Made-up sets
(`made-up:...`) are written by `made_up` before they get here.
"""

from __future__ import annotations

import bisect
import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from data_pipelines.once import cache_folder
from tubelet.errors import DataError, Problems, nearest

INDEX_NAME = "index.json"
_NAMED = 5  # missing shards of one folder that an error names
_NOT_SHARDS = (".csv", ".tsv", ".json", ".jsonl", ".parquet", ".npz", ".yaml", ".yml", ".jpg", ".jpeg",
               ".png", ".mp4", ".idx")


def is_remote(url: str) -> bool:
    """True for anything that is not a path of this machine's file system."""
    return "://" in url


def base_name(url: str) -> str:
    """The file name of a path or URL, without a query (`?token=...`)."""
    return (urlsplit(url).path if is_remote(url) else url).rstrip("/").rsplit("/", 1)[-1]


def folder_of(url: str) -> str:
    """The folder of a path or URL, without its file name and query."""
    if not is_remote(url):
        return os.path.dirname(url)
    return url.split("?")[0].rsplit("/", 1)[0]


def beside(url: str, name: str) -> str:
    """The path or URL of the file `name` in the folder of `url` (a query is kept: it may be a token)."""
    query = urlsplit(url).query if is_remote(url) else ""
    return f"{folder_of(url)}/{name}" + (f"?{query}" if query else "")


def resolve_shards(shards: str | Sequence[str], index_dir: str | None = None) -> list[str]:
    """Paths and URLs of all shards, in order; made-up sets among them are written first."""
    words = [piece.strip() for text in ([shards] if isinstance(shards, str) else shards) for piece in text.split("::")]
    if not any(word.startswith("made-up:") for word in words):
        return expand(shards)
    from data_pipelines.made_up import ensure_made_up  # lazily: it writes shards, hence indexes

    folder = cache_folder(index_dir) / "made-up"
    return [url for word in words
            for url in (ensure_made_up(word, folder) if word.startswith("made-up:") else expand(word))]


def expand(shards: str | Sequence[str]) -> list[str]:
    """The paths (absolute) and URLs of shards, in the order that was written. Raises one `DataError` for all problems."""
    words = [shards] if isinstance(shards, str) else list(shards)
    found: list[str] = []
    problems = Problems(DataError, "The shards cannot be listed:")
    for word in (piece.strip() for text in words for piece in text.split("::")):
        try:
            found += _expand_one(word)
        except DataError as error:
            problems.items.append(error)
    repeated = sorted(url for url, times in Counter(found).items() if times > 1)
    if repeated:
        problems.add(f"{len(repeated)} shard(s) are named twice, the first is {repeated[0]}.",
                     "name each shard once; `weight` of a source makes its samples more frequent")
    problems.raise_if_any()
    return found


def _expand_one(word: str) -> list[str]:
    if not word:
        raise DataError("The list of shards has an empty name in it.", "write path/x-{0000..0063}.tar, a folder, or URLs")
    if word.startswith("pipe:"):
        raise DataError(f"`{word[:100]}` runs a shell command; shards are read by position, which a pipe cannot do.",
                        "a URL (https://, s3://, gs://, hf://), or copy the shards to a disk first")
    word = word.removeprefix("file://")
    names = _braces(word)
    remote = is_remote(word)
    if remote:
        _check_protocol(word)
    urls: list[str] = []
    for name in names:
        if not remote:
            name = os.path.abspath(os.path.expanduser(name))
            if os.path.isdir(name):
                urls += folder_shards(name)
                continue
        if base_name(name).endswith((".gz", ".tgz", ".bz2", ".xz", ".zst")):
            raise DataError(f"{name} is compressed, so no sample can be read by its position.",
                            "gunzip it: pictures are compressed already, the .tar is hardly larger")
        if base_name(name).lower().endswith(_NOT_SHARDS):
            raise DataError(f"{name} is not a shard (a .tar file).",
                            "the folder of the .tar files; `tubelet data write` makes shards of lists, pictures and videos")
        if remote and not base_name(name).endswith(".tar"):
            raise DataError(f"{name} does not end in .tar; a folder of another machine cannot be listed.",
                            f"{name.rstrip('/')}/NAME-{{00000..00063}}.tar")
        urls.append(name)
    return urls


def _braces(word: str) -> list[str]:
    if "{" not in word and "}" not in word:
        return [word]
    from braceexpand import UnbalancedBracesError, braceexpand  # type: ignore[attr-defined]

    try:
        return list(braceexpand(word))
    except UnbalancedBracesError:
        raise DataError(f"`{word}` has braces that do not match.", "x-{0000..0063}.tar") from None


def _check_protocol(url: str) -> None:
    import fsspec

    protocol = url.split("://")[0]
    if protocol not in fsspec.available_protocols():
        close = nearest(protocol, fsspec.available_protocols())
        raise DataError(f"`{protocol}://` in {url} is not a protocol that fsspec knows.",
                        f"{close[0]}://" if close else "https://, s3://, gs://, hf:// or a path")


def folder_shards(folder: str) -> list[str]:
    """Shards of a local folder: what its index lists, else its *.tar files by name."""
    index = os.path.join(folder, INDEX_NAME)
    on_disk = sorted(name for name in os.listdir(folder) if name.endswith(".tar"))
    if os.path.exists(index):
        listed = [entry["name"] for entry in read_index_json(index)["shards"]]
        unknown = sorted(set(on_disk) - set(listed))
        if unknown:
            raise DataError(f"{folder} holds {len(unknown)} shard(s) that its {INDEX_NAME} does not list, the first is "
                            f"{unknown[0]}; they would never be read.",
                            f"`tubelet data index {folder} --overwrite` (another index is another order of samples), or "
                            "move them away")
        return [os.path.join(folder, name) for name in listed]
    if not on_disk:
        others = sorted(os.listdir(folder))[:5]
        inside = f"; it holds {', '.join(others)}" if others else "; it is empty"
        raise DataError(f"{folder} holds no .tar shards{inside}.",
                        "the folder of the .tar files, or `tubelet data write` to make shards of pictures")
    return [os.path.join(folder, name) for name in on_disk]


def read_index_json(content: str | Path | bytes, name: str = "") -> dict[str, Any]:
    """An index.json (its path, or its bytes and where they are from), checked. Raises `DataError` that names it."""
    name = name or str(content)
    try:
        data = json.loads(content if isinstance(content, bytes) else Path(content).read_bytes())
        if data["format"] != 1 or not all({"name", "bytes", "samples", "idx_sha256"} <= set(s) for s in data["shards"]):
            raise ValueError("unknown format")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{name} is not an index of shards ({error}).",
                        f"`tubelet data index {name.rpartition('/')[0]} --overwrite`") from None
    return data


def missing(urls: Iterable[str]) -> list[DataError]:
    """Errors for the local shards that do not exist. Of each folder the first few are named, with the names nearest to
    them, and the rest counted: a data set that moved has many, and the hundredth says no more than the first."""
    found = []
    for folder, gone in by_folder([url for url in urls if not is_remote(url) and not os.path.exists(url)]).items():
        if not os.path.isdir(folder):
            more = f" ({len(gone)} shards are looked for there)" if len(gone) > 1 else ""
            found.append(DataError(f"{gone[0]} does not exist: there is no folder {folder}{more}.", "check the path"))
            continue
        known = sorted(name for name in os.listdir(folder) if name.endswith(".tar"))
        for url in gone[:_NAMED]:
            close = nearest(base_name(url), _around(known, base_name(url)), 3)
            hint = (f"one of {', '.join(close)} in {folder}" if close else
                    f"{folder} holds {known[0]} ... {known[-1]}" if known else f"{folder} holds no .tar files")
            found.append(DataError(f"{url} does not exist.", hint))
        if len(gone) > _NAMED:
            found.append(DataError(f"{len(gone) - _NAMED} more shards of {folder} do not exist, to {gone[-1]}.",
                                   f"the folder holds {len(known)} .tar files"))
    return found


def _around(known: list[str], name: str) -> list[str]:
    """Of very many sorted names those near `name`: comparing a name with another takes some 20 us."""
    at = bisect.bisect(known, name)
    return known if len(known) <= 1000 else known[max(0, at - 500):at + 500]


def by_folder(urls: Sequence[str]) -> dict[str, list[str]]:
    """Paths and URLs grouped by the folder they lie in."""
    groups: dict[str, list[str]] = {}
    for url in urls:
        groups.setdefault(folder_of(url), []).append(url)
    return groups
