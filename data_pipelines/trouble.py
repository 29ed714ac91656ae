"""What a failed read means, and trying it again: which errors are worth patience, and what to say when it is over.

An error says what to do about it, with every secret blotted out. Reading itself is remote.py and reader.py.
"""

from __future__ import annotations

import logging
import random
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from tubelet.errors import DataError
from tubelet.redact import redact

log = logging.getLogger(__name__)

T = TypeVar("T")

_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 20.0  # seconds


class RangeError(OSError):
    """A server that does not give the range it was asked for."""


@dataclass(frozen=True)
class Trouble:
    """A failed request in words; `final` when trying again cannot help."""

    text: str
    hint: str
    final: bool


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def http_status(error: BaseException) -> int | None:
    """HTTP status behind an exception of aiohttp, botocore, gcsfs or huggingface_hub."""
    for each in _chain(error):
        reply = getattr(each, "response", None)
        found = reply.get("ResponseMetadata", {}).get("HTTPStatusCode") if isinstance(reply, dict) else None
        code = getattr(each, "code", None) if type(each).__module__.startswith("gcsfs") else None  # aiohttp's lies: 400
        for value in (getattr(each, "status", None), code, found, getattr(reply, "status_code", None)):
            if isinstance(value, (int, str)) and str(value).isdigit() and 300 <= int(value) < 600:
                return int(value)
    return None


def trouble(error: BaseException, url: str) -> Trouble:
    """What a failed request means and what to do."""
    status, kinds = http_status(error), {type(each).__name__ for each in _chain(error)}
    worded = next((each for each in _chain(error) if str(each)), error)  # fsspec wraps a time-out and drops its words
    text = redact(f"{type(worded).__name__}: {worded}"[:400]).rstrip(".: ")
    if url.startswith("hf://") and (status in (401, 403) or kinds & {"RepositoryNotFoundError", "GatedRepoError"}):
        return Trouble(f"status {status or 401} of the Hub (no such repository, or it is private or gated): {text}",
                       "check the name; HF_TOKEN or `hf auth login` for private ones; accept a gated set's terms", True)
    if status in (401, 403, 407) or isinstance(error, PermissionError) or kinds & {"NoCredentialsError"}:
        return Trouble(f"access denied{f' (status {status})' if status else ''}: {text}",
                       "credentials in the environment or credential files of this node, not in settings (README, remote "
                       "shards); a signed URL may have expired; storage={anon: true} for public buckets", True)
    if status in (404, 410) or isinstance(error, FileNotFoundError):
        return Trouble(f"there is no such file{f' (status {status})' if status else ''}: {text}",
                       "check the name, the bucket and the revision; `tubelet data verify` looks at every shard", True)
    if status == 416:
        return Trouble(f"the file is shorter than its index says (status 416): {text}",
                       "copy the shard again, or `tubelet data index SHARDS --overwrite` if it was meant to change", True)
    if isinstance(error, RangeError):
        return Trouble(str(error), "a server that honours range requests (nginx, S3 ... do); or copy the shards to a disk",
                       True)
    if status == 429 or (status or 0) >= 500:
        return Trouble(f"the server is overloaded or broken (status {status}): {text}",
                       "data.io_timeout_seconds=... waits longer; fewer data.cache.connections ask for less", False)
    if kinds & {"BadHttpMessage", "BadStatusLine", "InvalidHeader", "LineTooLong", "TransferEncodingError"}:
        return Trouble(f"the answer is garbled: {text}", "check proxies between this node and the server", False)
    if status is not None and status >= 400:
        return Trouble(f"the request was refused (status {status}): {text}", "check the URL and data.train[].storage", True)
    if isinstance(error, (TypeError, AttributeError)):
        return Trouble(f"this kind of storage cannot be read so: {text}",
                       "https://, s3://, gs:// or hf://; or copy the shards to a disk", True)
    found = {type(each) for each in _chain(error)}
    if any(issubclass(kind, ssl.SSLError) for kind in found) or any("Certificate" in kind for kind in kinds):
        return Trouble(f"the TLS connection cannot be made: {text}",
                       "check the host name and the node's certificates (SSL_CERT_FILE) and clock", False)
    if any(issubclass(kind, socket.gaierror) for kind in found) or kinds & {"ClientConnectorDNSError"}:
        return Trouble(f"the host name is not known: {text}", "check the URL, and name resolution on this node", False)
    if any(issubclass(kind, ConnectionRefusedError) for kind in found) or "EndpointConnectionError" in kinds:
        return Trouble(f"nothing answers there: {text}", "check host and port, firewall and proxy of this node", False)
    if any(issubclass(kind, TimeoutError) for kind in found) or any("Timeout" in kind for kind in kinds):
        return Trouble(f"time-out: {text}", "check this node's network; data.io_timeout_seconds=... waits longer", False)
    return Trouble(text, "", False)


def persist(attempt: Callable[[], T], url: str, what: str, seconds: float, *, progress: Callable[[], int] = lambda: 0,
            sleep: Callable[[float], None] = time.sleep, clock: Callable[[], float] = time.monotonic) -> T:
    """attempt(), again and again with growing pauses until `seconds` have passed without `progress` (bytes so far); then,
    or at once for what no patience heals, a `DataError`. `url` and `what` name the thing: a path or URL, and the bytes."""
    deadline, pause, tries, before = clock() + seconds, _FIRST_PAUSE, 0, progress()
    remote = "://" in url and not url.startswith("file://")
    jitter = random.Random()  # of its own: nothing here may touch the global generators
    while True:
        tries += 1
        try:
            return attempt()
        except (DataError, KeyboardInterrupt, MemoryError):
            raise
        except Exception as error:  # storage clients raise many kinds: OSError, aiohttp, botocore, ...
            found = trouble(error, url) if remote else Trouble(f"{type(error).__name__}: {error}".rstrip("."), "", False)
        if progress() > before:
            before, deadline, pause = progress(), clock() + seconds, _FIRST_PAUSE
        if found.final or clock() >= deadline:
            failed = "failed" if found.final else f"failed for {seconds:g} s ({tries} times)"
            raise DataError(f"Reading {url} {failed}: {what}: {found.text}.", found.hint or _GENERAL)
        if tries == 1:
            log.warning("reading %s (%s) failed (%s); trying again for up to %g s", redact(url), what, found.text, seconds)
        # Jitter, so that a thousand readers do not come back at once.
        sleep(min(pause * jitter.uniform(0.5, 1.5), max(deadline - clock(), 0.0)))
        pause = min(pause * 2, _LONGEST_PAUSE)


_GENERAL = ("check that the shard is there and readable from this node (`tubelet data verify`); a run that is started again "
            "goes on where it stopped; data.io_timeout_seconds=... waits longer")
