"""Where checkpoints lie: a folder on a disk, or a prefix of an object store, used alike through a few functions.

A local place is a `pathlib.Path`; a URL (`s3://`, `gs://`, `memory://`, whatever fsspec knows) is a `UPath`, which has
Path's interface. The difference that matters is what can be made to happen at one instant: on a disk a rename, in a store
the PUT of one small object. A checkpoint's manifest is published by either, so a half-written checkpoint is never seen.

Stores fail now and then: each call is tried again for some minutes, and what remains is a `StoreError` with the URL, its
secrets blotted out. Errors of a local file system pass as the `OSError` they are. Credentials come from the environment,
as the drivers find them. The invisible parts that a killed upload leaves in S3 are removed by a lifecycle rule of the
bucket.

Not here: what a checkpoint consists of (`format.py`, `folder.py`). No torch: the writing process imports this too.
"""

from __future__ import annotations

import errno
import hashlib
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from tubelet import files
from tubelet.errors import CheckpointError, ConfigError, TubeletError, nearest
from tubelet.redact import redact

T = TypeVar("T")


class StoreError(CheckpointError):
    """A store that did not answer, or refused: it says nothing about the checkpoints in it."""


PAUSES = (0.5, 2.0, 5.0, 10.0, 20.0)
"""Seconds between the tries of one call to a store, beside what its driver does by itself; the last one comes again and
again."""
PATIENCE_SECONDS = 300.0
"""How long after it first failed a call is tried again: stores have outages of minutes, and a run must not end of one; but
one that is gone, or hangs, must not take hours to be noticed."""
HURRY_SECONDS = 15.0
"""The same for what can as well be done another time."""
SAY_SECONDS = 5.0
"""The first pause of so many seconds is said, by the rank that speaks: all GPUs may be waiting for it."""
PART = 16 * 2**20
"""Bytes a request when a file is read from its beginning to its end."""

_CACHING = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oss", "oci"}  # drivers that remember listings
_FINAL = {errno.EINVAL, errno.EPERM, errno.EACCES, errno.ENAMETOOLONG, errno.EROFS, errno.ENOSPC}


def place(url: str | Path, storage: Mapping[str, Any] | None = None) -> Path:
    """The folder a setting or an argument means: `runs/x` or `file:///runs/x` as a Path, another URL as a UPath.

    `storage` are options of the fsspec driver (`endpoint_url`). Nothing is looked up or connected to. Raises `ConfigError`
    when the kind of URL is unknown or its driver is not installed.
    """
    text = str(url)
    if is_remote(url) or "://" not in text:
        return url if isinstance(url, Path) or is_remote(url) else Path(text)  # type: ignore[return-value]
    protocol, _, rest = text.partition("://")
    if protocol in ("file", "local"):
        return Path(rest)
    import fsspec
    from upath import UPath

    try:
        fsspec.get_filesystem_class(protocol)
        found = UPath(text.rstrip("/"), **_options(protocol, storage or {}))
    except ImportError as error:
        raise ConfigError(f"{redact(text)} cannot be used: {error}.", "pip install 'tubelet[remote]' (S3, Google Cloud "
                          "Storage), or the fsspec driver of this store") from None
    except ValueError as error:
        known = fsspec.available_protocols()
        close = nearest(protocol, known)
        raise ConfigError(f"{redact(text)} cannot be used: {str(error).rstrip('.')}.",
                          f"{close[0]}://..." if close else "s3://bucket/runs/x, gs://bucket/runs/x, or a folder") from None
    return found  # type: ignore[return-value]


def home(named: str | Path) -> Path:
    """Where the step folders lie that a user means by a name: the name itself, or, for the folder of a run that keeps its
    checkpoints elsewhere (`checkpoint.dir` in its config.yaml), that place. Not for the folders of a job in progress."""
    path = place(named)
    config = path / "config.yaml"
    if is_remote(path) or not config.is_file():
        return path
    from tubelet.config import read_yaml  # not above: the writing process takes this file alone

    try:
        settings = read_yaml(config).get("checkpoint") or {}
    except TubeletError:
        return path  # a file that some other program calls so
    return place(settings["dir"], settings.get("storage")) if settings.get("dir") else path


def _options(protocol: str, storage: Mapping[str, Any]) -> dict[str, Any]:
    options = dict(storage)
    if protocol in _CACHING:
        options.setdefault("use_listings_cache", False)  # other processes write here too
    if protocol in ("s3", "s3a"):
        options["config_kwargs"] = {"connect_timeout": 10, "read_timeout": 60, "retries": {"total_max_attempts": 2},
                                    **options.get("config_kwargs", {})}
    return options


def is_remote(path: object) -> bool:
    """True for a place in an object store."""
    return hasattr(path, "storage_options")


def key(path: Path) -> str:
    """One name for one place, however it was written."""
    return str(path) if is_remote(path) else str(path.resolve())


# ------------------------------------------------------------------------------------------------- errors of stores


@contextmanager
def store_errors(path: Path, doing: str) -> Iterator[None]:
    """What a store's driver raises inside becomes a `StoreError` that names the place; local errors pass as they are.
    A missing file stays a FileNotFoundError. `doing`: "reading", "writing"."""
    try:
        yield
    except (CheckpointError, FileNotFoundError):
        raise
    except Exception as error:  # drivers raise many kinds: OSError, botocore, aiohttp, gcsfs, ...
        if not is_remote(path):
            raise
        raise _worded(path, doing, error, 1) from None


def _worded(path: Path, doing: str, error: BaseException, tries: int) -> StoreError:
    text = redact(f"{type(error).__name__}: {error}"[:400]).rstrip(".: ")
    denied = isinstance(error, PermissionError) or _status(error) in (401, 403) or "Credentials" in type(error).__name__
    often = f" ({tries} times)" if tries > 1 else ""
    return StoreError(
        f"{doing[0].upper()}{doing[1:]} {path} failed{often}: {text}.",
        "credentials in the environment or credential files of this node that may read and write there, not in settings"
        if denied else "check the URL, `checkpoint.storage` (endpoint_url ...) and this node's network; checkpoints that "
        "are already published are untouched, and a run that is started again goes on from the newest")


def _status(error: BaseException) -> int:
    found = getattr(error, "status", None) or getattr(error, "code", None)
    reply = getattr(error, "response", None)
    if isinstance(reply, dict):
        found = reply.get("ResponseMetadata", {}).get("HTTPStatusCode") or found
    return int(found) if isinstance(found, (int, str)) and str(found).isdigit() else 0


def _hopeless(error: BaseException) -> bool:
    status, name = _status(error), type(error).__name__
    return (isinstance(error, (PermissionError, TypeError, ValueError, AttributeError, ImportError, IsADirectoryError))
            or isinstance(error, OSError) and error.errno in _FINAL
            or 400 <= status < 500 and status not in (408, 429) or "Credentials" in name
            or name.startswith("NotImplemented"))  # a store that is for reading only


_hurry = False


@contextmanager
def in_a_hurry() -> Iterator[None]:
    """Calls inside are tried again for `HURRY_SECONDS` only: tidying up, for which all ranks would wait."""
    global _hurry
    before, _hurry = _hurry, True
    try:
        yield
    finally:
        _hurry = before


def patiently(path: Path, doing: str, action: Callable[[], T]) -> T:
    """`action()`; on a store it is tried again for `PATIENCE_SECONDS` (see `in_a_hurry`), unless the error says that it is
    no use."""
    if not is_remote(path):
        return action()
    until, tries, told = 0.0, 0, False
    while True:
        tries += 1
        try:
            return action()
        except (TubeletError, FileNotFoundError):
            raise
        except Exception as error:
            until = until or time.monotonic() + (HURRY_SECONDS if _hurry else PATIENCE_SECONDS)  # an upload may be longer
            pause = PAUSES[min(tries, len(PAUSES)) - 1]
            left = until - time.monotonic()
            if _hopeless(error) or left < pause:
                raise _worded(path, doing, error, tries) from None
            if pause >= SAY_SECONDS and not told and os.environ.get("RANK", "0") == "0":
                told = True
                print(f"warning: {_worded(path, doing, error, tries).problem} Trying again for {left:.0f} s.", flush=True)
        time.sleep(pause * random.Random().uniform(0.5, 1.0))  # its own generator: nothing here moves others'


# ------------------------------------------------------------------------------------------------- looking and reading


def size(path: Path) -> int | None:
    """Bytes of a file; None when there is no file of that name."""
    if not is_remote(path):
        try:
            return path.stat().st_size if path.is_file() else None
        except FileNotFoundError:
            return None
    try:
        info = patiently(path, "reading", lambda: path.fs.info(path.path))  # type: ignore[attr-defined]
    except FileNotFoundError:
        return None
    return int(info["size"]) if info["type"] == "file" else None


def exists(path: Path) -> bool:
    """Whether there is a file of that name."""
    return size(path) is not None


def _listed(folder: Path) -> list[tuple[str, str, int]]:
    """[(name, "file" | "directory", bytes)] of what lies directly in a folder of a store."""
    def look() -> list[dict[str, Any]]:
        fs = folder.fs  # type: ignore[attr-defined]
        fs.invalidate_cache()
        return fs.ls(folder.path, detail=True)  # type: ignore[attr-defined]

    try:
        found = patiently(folder, "listing", look)
    except (FileNotFoundError, NotADirectoryError):
        return []
    own = folder.path.strip("/")  # type: ignore[attr-defined]
    return [(item["name"].rstrip("/").rpartition("/")[2], item["type"], int(item.get("size") or 0))
            for item in found if item["name"].strip("/") != own]  # some tools put an empty object where a folder begins


def sizes(folder: Path) -> dict[str, int]:
    """{name: bytes} of the files directly in a folder; {} when it does not exist."""
    if is_remote(folder):
        return {name: count for name, kind, count in _listed(folder) if kind == "file"}
    try:
        return {item.name: item.stat().st_size for item in os.scandir(folder) if item.is_file()}
    except (FileNotFoundError, NotADirectoryError):
        return {}


def folders(path: Path) -> list[Path]:
    """Folders directly in a place, by name; [] when it does not exist."""
    if is_remote(path):
        return [path / name for name in sorted(name for name, kind, _ in _listed(path) if kind == "directory")]
    try:
        return sorted(path / item.name for item in os.scandir(path) if item.is_dir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def read(path: Path, start: int = 0, stop: int | None = None) -> bytes:
    """Bytes [start, stop) of a file, fewer where it ends earlier. Raises FileNotFoundError when there is none."""
    if not is_remote(path):
        with open(path, "rb") as file:
            file.seek(start)
            return file.read() if stop is None else file.read(max(0, stop - start))
    if stop is not None and stop <= start:
        return b""
    return patiently(path, "reading", lambda: path.fs.cat_file(path.path, start=start, end=stop))  # type: ignore[attr-defined]


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex; reads all of it, one part at a time."""
    if not is_remote(path):
        return files.sha256_file(path)
    digest, position, end = hashlib.sha256(), 0, size(path)
    if end is None:
        raise FileNotFoundError(errno.ENOENT, "no such object", str(path))
    while position < end:
        part = read(path, position, min(end, position + PART))
        if not part:
            break  # it has shrunk since; the digest says so
        digest.update(part)
        position += len(part)
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------- writing and removing


def publish(path: Path, data: bytes, before_try: Callable[[], None] | None = None) -> None:
    """Make a small file appear at one instant, whole and durable: locally written beside and renamed, remotely one PUT.
    `before_try` is called before each try of that and may raise: a store may answer minutes after the first."""
    def put() -> None:
        if before_try is not None:
            before_try()
        path.fs.pipe_file(path.path, data)  # type: ignore[attr-defined]

    if is_remote(path):
        patiently(path, "writing", put)
    else:
        files.write_atomic(path, data)


def fsync_dir(path: Path) -> None:
    """Make the names in a local folder durable; a store's are."""
    if not is_remote(path):
        files.fsync_dir(path)


def make_folder(path: Path) -> None:
    """A local folder with its parents; a store has none to make. Any rank may call it: on a network file system it also
    ends this host's belief that the folder does not exist."""
    if not is_remote(path):
        path.mkdir(parents=True, exist_ok=True)


def check_writable(path: Path) -> None:
    """Raise `CheckpointError` unless files can be made and removed in this folder, which is made if need be. Rank 0 calls it
    when a run begins, so that a mistake shows then and not at the first save. Two requests to a store; leaves nothing."""
    probe, failed = path / f".tubelet-probe-{os.getpid()}", ""
    hint = "checkpoint.dir=... (or run.dir) with a place that this user may write to"
    try:
        make_folder(path)
        publish(probe, b"may this run write here?")
        if is_remote(probe):
            patiently(probe, "removing", lambda: probe.fs.rm_file(probe.path))  # type: ignore[attr-defined]
        else:
            probe.unlink()
    except StoreError as error:
        failed, hint = f"cannot be used. {error.problem}", f"checkpoint.dir=... that this run may write to; {error.hint}"
    except FileNotFoundError as error:  # a store has no folders that could be missing
        failed = ("cannot be written: its bucket does not exist." if is_remote(path)
                  else f"cannot be written ({error.strerror or error}).")
    except OSError as error:
        failed = "is a file, not a folder." if path.is_file() else f"cannot be written ({error.strerror or error})."
    if failed:
        if not is_remote(path):  # a disk that is full makes the file and takes no bytes
            for left in (probe, probe.with_name(f"{probe.name}.tmp")):
                with suppress(OSError):
                    left.unlink()
        raise CheckpointError(f"The place for checkpoints {path} {failed}", hint)


def remove_file(path: Path) -> None:
    """Remove a file; one that is not there is no error."""
    try:
        if is_remote(path):
            patiently(path, "removing", lambda: path.fs.rm_file(path.path))  # type: ignore[attr-defined]
        else:
            path.unlink()
    except FileNotFoundError:
        pass


def remove_folder(folder: Path, passed: Callable[[], None] = lambda: None) -> None:
    """Remove a folder and all in it, the folder itself last; `passed` is called after each file. What somebody still reads
    over a network file system stays behind without an error."""
    if is_remote(folder):
        def remove() -> None:
            fs = folder.fs  # type: ignore[attr-defined]
            fs.invalidate_cache()
            fs.rm(folder.path, recursive=True)  # type: ignore[attr-defined]

        try:
            patiently(folder, "removing", remove)
        except FileNotFoundError:
            pass
        passed()
        return
    try:
        for path in sorted(folder.iterdir()):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
            passed()
        folder.rmdir()
    except OSError:
        pass


def move(source: Path, target: Path, last: str) -> None:
    """Give a folder another name beside its old one: locally one rename, remotely every object is copied (by the store, no
    bytes pass through here) with the one called `last` at the end, then removed with that one first. So a folder under
    either name has its `last` only while it is whole. What was at `target` before is replaced."""
    if not is_remote(source):
        os.rename(source, target)
        files.fsync_dir(target.parent)
        return
    names = sorted(sizes(source), key=lambda name: (name == last, name))
    remove_file(target / last)
    remove_folder(target)
    for name in names:
        one, other = source / name, target / name
        patiently(one, "copying", lambda one=one, other=other: one.fs.cp_file(one.path, other.path))  # type: ignore[attr-defined]
    remove_file(source / last)
    remove_folder(source)
