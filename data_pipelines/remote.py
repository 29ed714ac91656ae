"""Bytes of remote files: `http(s)://`, `s3://`, `gs://`, `hf://` and whatever else fsspec knows.

fsspec opens the connections and finds the credentials (environment or credential files, never settings). What matters
for long runs is done here: transfers are read as they arrive, so that one that breaks goes on at the byte where it broke;
libraries do not retry behind our back; time-outs are set; a client made before a fork is never used after it. `hf://` is
resolved to its `https://` address.

Retrying and what errors mean is trouble.py. Caching is cache.py, deciding what to read reader.py.
"""

from __future__ import annotations

import io
import json
import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

from data_pipelines.trouble import RangeError, http_status, persist
from tubelet.errors import DataError

Storage = Mapping[str, Any]
"""`SourceSettings.storage`: options of the fsspec file system."""

CONNECT_SECONDS, READ_SECONDS = 10, 60  # to connect; without a single byte
SLOWEST, SLOW_SECONDS = 1024, 60  # bytes per second over this many seconds, below which a transfer is broken off
PART = 8 * 2**20  # bytes per request where a library gives no stream

_PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "hf": "huggingface_hub", "http": "aiohttp",
             "https": "aiohttp", "az": "adlfs", "abfs": "adlfs", "abfss": "adlfs"}


@dataclass(frozen=True)
class Stat:
    """What a store says of a file; `tag` (ETag, checksum or time) changes with its content, "" when it has none."""

    size: int
    tag: str = ""


# ------------------------------------------------------------------------------------------------------------ clients


class _Clients:
    """File systems of this process by protocol and options."""

    def __init__(self) -> None:
        self.pid, self.lock, self.made = os.getpid(), threading.Lock(), {}
        self.resolved: dict[str, tuple[Any, str]] = {}


_clients = _Clients()
_inherited: list[_Clients] = []  # of the parent: never used, and never finalised, which would speak on its sockets


def _mine() -> _Clients:
    global _clients
    if _clients.pid != os.getpid():
        _inherited.append(_clients)
        _clients = _Clients()
    return _clients


def filesystem(url: str, storage: Storage | None = None) -> tuple[Any, str]:
    """The fsspec file system of a URL, made in this process, and the path in it. Raises `DataError` when the protocol is
    unknown or its package is not installed."""
    protocol = url.partition("://")[0]
    mine = _mine()
    key = protocol, json.dumps(storage or {}, sort_keys=True, default=str)
    try:
        with mine.lock:
            if key not in mine.made:
                mine.made[key] = _make(protocol, dict(storage or {}))
            fs = mine.made[key]
        if protocol == "hf":
            return _hub(mine, url, fs)
        return fs, fs._strip_protocol(url)
    except (ImportError, ValueError) as error:
        package = _PACKAGES.get(protocol)
        raise DataError(f"{url} cannot be read: {error}.",
                        (f"pip install {package}" if package else "the fsspec package of this kind of storage") +
                        ", or copy the shards to a local disk") from None


def _make(protocol: str, options: dict[str, Any]) -> Any:
    import fsspec

    if protocol in ("http", "https", "hf"):
        import aiohttp

        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS, sock_read=READ_SECONDS)
        client = {"timeout": timeout, "trust_env": True}  # proxies, and ~/.netrc for credentials
        if protocol != "hf":
            client |= options.pop("client_kwargs", {})
            return fsspec.filesystem("http", skip_instance_cache=True, client_kwargs=client, **options)
        from huggingface_hub import HfFileSystem

        return HfFileSystem(skip_instance_cache=True, **options), fsspec.filesystem(
            "http", skip_instance_cache=True, client_kwargs=client)
    if protocol in ("s3", "s3a"):
        options["config_kwargs"] = {"connect_timeout": CONNECT_SECONDS, "read_timeout": READ_SECONDS,
                                    "retries": {"total_max_attempts": 1}, **options.get("config_kwargs", {})}
    fs = fsspec.filesystem(protocol, skip_instance_cache=True, **options)
    if hasattr(fs, "retries"):
        fs.retries = 1
    return fs


def _hub(mine: _Clients, url: str, made: tuple[Any, Any]) -> tuple[Any, str]:
    """Files of the Hub are read by their https address: it streams, and the library's own retries stay out of it."""
    if url not in mine.resolved:
        from huggingface_hub import hf_hub_url

        found = made[0].resolve_path(url)
        mine.resolved[url] = made[1], hf_hub_url(found.repo_id, found.path_in_repo, repo_type=found.repo_type,
                                                 revision=found.revision, endpoint=made[0].endpoint)
    return mine.resolved[url]


def _headers(url: str) -> dict[str, str]:
    """Request headers of a URL as the user wrote it: the Hub's token. aiohttp keeps it from hosts it is redirected to."""
    if not url.startswith("hf://"):
        return {}
    from huggingface_hub.utils import build_hf_headers

    return build_hf_headers()


# ------------------------------------------------------------------------------------------------------------ reading


def read_range(url: str, start: int, stop: int, sink: Callable[[bytes], Any], storage: Storage | None = None) -> None:
    """Gives the bytes [start, stop) to `sink` as they arrive; after an exception the caller knows how far it came. May
    end early without one, when the file does."""
    if start >= stop:
        return
    fs, path = filesystem(url, storage)
    if _streams_http(fs):
        _sync(fs, _http_range, fs, path, start, stop, sink, _headers(url))
    elif "s3" in _protocols(fs):
        _sync(fs, _s3_range, fs, path, start, stop, sink)
    else:
        while start < stop:
            end = min(stop, start + PART)
            data = fs.cat_file(path, start=start, end=end)
            if len(data) > end - start:
                raise RangeError(f"got {len(data)} of {end - start} bytes (range requests are not honoured)")
            sink(data)
            start += len(data)
            if start < end:
                return


def stat(url: str, storage: Storage | None = None) -> Stat:
    """Size and tag of a remote file, by one small request."""
    fs, path = filesystem(url, storage)
    if _streams_http(fs):  # a range of one byte: signed URLs often allow GET alone, and HEAD through the Hub loses the size
        return _sync(fs, _http_stat, fs, path, _headers(url))
    info = fs.info(path)
    tag = next((str(info[name]) for name in ("ETag", "etag", "md5Hash", "mtime", "LastModified", "created")
                if info.get(name)), "")
    return Stat(int(info["size"]), tag)


def read_file(url: str, storage: Storage | None = None, *, optional: bool = False) -> bytes | None:
    """A whole small file; None when there is none. `optional`: nor when it is forbidden, which is what S3 says of a file
    that does not exist to those who may not list the bucket."""
    fs, path = filesystem(url, storage)
    try:
        if _streams_http(fs):
            found: list[bytes] = []
            _sync(fs, _http_range, fs, path, 0, None, found.append, _headers(url))
            return b"".join(found)
        return fs.cat_file(path)
    except Exception as error:
        status = http_status(error)
        if status == 404 or isinstance(error, FileNotFoundError) and status is None:
            return None
        if optional and (status == 403 or isinstance(error, PermissionError)):
            return None
        raise


def open_file(url: str, storage: Storage | None = None, seconds: float = 60.0) -> BinaryIO:
    """A remote file for reading and seeking, by blocks of 64 KiB; each is tried for `seconds`."""
    return io.BufferedReader(_Seekable(url, storage, seconds), 64 * 1024)  # type: ignore[return-value]


class _Seekable(io.RawIOBase):
    def __init__(self, url: str, storage: Storage | None, seconds: float):
        self.url, self.storage, self.seconds, self.at = url, storage, seconds, 0
        self.size = persist(lambda: stat(url, storage), url, "its size", seconds).size

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.at = max(0, offset + (0, self.at, self.size)[whence])
        return self.at

    def readinto(self, buffer: Any) -> int:
        size = max(0, min(len(buffer), self.size - self.at))
        got = bytearray()

        def attempt() -> None:
            read_range(self.url, self.at + len(got), self.at + size, got.extend, self.storage)
            if len(got) != size:
                raise OSError(f"got {len(got)} of {size} bytes")

        persist(attempt, self.url, f"{size} bytes at offset {self.at}", self.seconds, progress=lambda: len(got))
        buffer[:size] = got
        self.at += size
        return size


def _streams_http(fs: Any) -> bool:
    return "http" in _protocols(fs)


def _protocols(fs: Any) -> tuple[str, ...]:
    return (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)


def _sync(fs: Any, function: Callable[..., Any], *args: Any) -> Any:
    from fsspec.asyn import sync

    return sync(fs.loop, function, *args)


class _Pace:
    """Breaks off a transfer that dribbles: each byte resets a socket's time-out, so that alone would wait for ever."""

    def __init__(self) -> None:
        self.since, self.got = time.monotonic(), 0

    def add(self, count: int) -> None:
        self.got += count
        took = time.monotonic() - self.since
        if took > SLOW_SECONDS:
            if self.got < SLOWEST * took:
                raise TimeoutError(f"only {self.got} bytes in {took:.0f} s")
            self.since, self.got = time.monotonic(), 0


async def _http_range(fs: Any, url: str, start: int, stop: int | None, sink: Callable[[bytes], Any],
                      headers: dict[str, str]) -> None:
    session = await fs.set_session()
    options = dict(fs.kwargs)
    headers = {**options.pop("headers", {}), **headers, "Accept-Encoding": "identity"}
    if stop is not None:
        headers["Range"] = f"bytes={start}-{stop - 1}"
    pace, left = _Pace(), float("inf") if stop is None else stop - start
    async with session.get(fs.encode_url(url), headers=headers, **options) as reply:
        reply.raise_for_status()
        if stop is not None:
            _check_range(reply, start, stop)
        async for chunk in reply.content.iter_any():
            chunk = chunk if len(chunk) <= left else chunk[:int(left)]
            sink(chunk)
            pace.add(len(chunk))
            left -= len(chunk)
            if left <= 0:
                return


def _check_range(reply: Any, start: int, stop: int) -> None:
    if reply.headers.get("Content-Encoding", "identity") not in ("identity", ""):
        raise RangeError(f"the server compresses what it sends ({reply.headers['Content-Encoding']})")
    if reply.status == 206:
        given = reply.headers.get("Content-Range", "")
        if given and not given.replace("bytes ", "").startswith(f"{start}-"):
            raise RangeError(f"asked for bytes {start}-{stop - 1}, got Content-Range {given}")
    elif start or reply.content_length != stop:
        raise RangeError(f"the server ignores the Range header (status {reply.status} with the whole file of "
                         f"{reply.content_length} bytes for bytes {start}-{stop - 1})")


async def _http_stat(fs: Any, url: str, headers: dict[str, str]) -> Stat:
    session = await fs.set_session()
    options = dict(fs.kwargs)
    headers = {**options.pop("headers", {}), **headers, "Accept-Encoding": "identity", "Range": "bytes=0-0"}
    async with session.get(fs.encode_url(url), headers=headers, **options) as reply:
        total = reply.headers.get("Content-Range", "").rpartition("/")[2]
        if reply.status != 416:  # an empty file has no byte 0
            reply.raise_for_status()
        size = int(total) if total.isdigit() else reply.content_length if reply.status == 200 else None
        if size is None:
            raise RangeError("the server does not say how large the file is")
        tag = reply.headers.get("ETag") or reply.headers.get("Last-Modified") or ""
        reply.close()  # a server without ranges is about to send the whole file
        return Stat(size, tag)


async def _s3_range(fs: Any, path: str, start: int, stop: int, sink: Callable[[bytes], Any]) -> None:
    bucket, key, version = fs.split_path(path)
    reply = await fs._call_s3("get_object", Bucket=bucket, Key=key, Range=f"bytes={start}-{stop - 1}",
                              **({"VersionId": version} if version else {}))
    body, pace, left = reply["Body"], _Pace(), stop - start
    try:
        given = reply.get("ContentRange", "")
        if not given.replace("bytes ", "").startswith(f"{start}-"):
            raise RangeError(f"asked for bytes {start}-{stop - 1}, got Content-Range {given or 'nothing'}")
        while left > 0 and (chunk := await body.read(min(left, 2**20))):
            sink(chunk)
            pace.add(len(chunk))
            left -= len(chunk)
    finally:
        body.close()
