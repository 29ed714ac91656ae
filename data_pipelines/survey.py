"""What can still be read of a damaged shard: every member whose header and bytes are whole, grouped into samples.

`scan.py` refuses a shard at its first fault, since a run must not guess. Here the reading goes on behind every fault, each
of which is named with its place: a cut tail, blocks that are no header, tars that were joined, links, members that do not
stand together, keys that come twice. `verify` reports what is found, `repair` writes the good part again.
"""

from __future__ import annotations

import io
import tarfile
from dataclasses import dataclass, field
from typing import BinaryIO

from data_pipelines.scan import _META, _NAME, Headers, _check_dots, open_shard
from tubelet.errors import TubeletError

BLOCK = 512
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")


@dataclass
class Found:
    """One sample as it stands in the shard."""

    key: str
    members: dict[str, tuple[int, int]] = field(default_factory=dict)
    """{extension: (offset, size)} of whole members, in the order of the shard."""
    faults: list[str] = field(default_factory=list)
    """Why it cannot be used as it is; empty when its headers are fine."""
    apart: bool = False
    """Its members do not stand together; grouped they are whole."""


@dataclass
class Survey:
    """One shard, read to its end."""

    url: str
    nbytes: int = 0
    samples: list[Found] = field(default_factory=list)
    """In the order of their first members."""
    faults: list[str] = field(default_factory=list)
    """Of the shard as a whole."""
    others: int = 0
    """Members that are no part of a sample: folders, hidden files, `__meta__`, names without an extension."""


def survey_shard(url: str) -> Survey:
    """Reads all headers of a shard, whatever its state. A shard that cannot be opened is one fault."""
    found = Survey(url)
    try:
        with open_shard(url) as file:
            found.nbytes = file.seek(0, io.SEEK_END)
            file.seek(0)
            if file.read(6).startswith(_COMPRESSED):
                found.faults.append("it is compressed, so no sample can be read by its position; gunzip it")
            else:
                _read(file, found)
    except OSError as error:
        found.faults.append(f"it cannot be read: {error.strerror or error}")
    except (tarfile.TarError, ValueError, OverflowError, IndexError, RecursionError) as error:  # not one header with sense
        found.faults.append(f"it is damaged or cut short: {error}")
    for sample in found.samples:
        if any("." in extension for extension in sample.members):
            try:
                _check_dots(url, sample.key, list(sample.members))
            except TubeletError as error:
                sample.faults.append(error.problem.removeprefix(f"{url}: "))
    return found


def unsafe_name(key: str) -> bool:
    """True for a key that is an absolute path or climbs with `..`: harmless here, but not to those who unpack the tar."""
    return key.startswith("/") or ".." in key.split("/")


def _read(file: BinaryIO, found: Survey) -> None:
    """Walk from header to header; blocks that are none are skipped (`ignore_zeros`), and what they were is said."""
    tar = tarfile.open(fileobj=io.BytesIO(bytes(2 * BLOCK)), mode="r:", ignore_zeros=True, errorlevel=0)
    file.seek(0)
    # only now: opening reads the first header, and one that fails there could not be passed
    tar.fileobj, tar.offset = Headers(file, found.nbytes), 0  # type: ignore[assignment]
    latest: dict[str, Found] = {}
    last: Found | None = None
    expected = 0
    while True:
        try:
            member = tar.next()
        except (MemoryError, OSError):
            raise
        except Exception as error:  # TarError, and of headers without sense ValueError, OverflowError, RecursionError, ...
            found.faults.append(f"it is damaged or cut short at byte {tar.offset}: {error}")
            tar.offset += BLOCK
            if tar.offset >= found.nbytes:
                break
            continue
        if member is None:
            break
        tar.members = []  # type: ignore[attr-defined]  # tarfile keeps every header otherwise
        if member.offset > expected:
            found.faults.append(_gap(file, expected, member.offset))
        end = member.offset_data + (member.size if member.isreg() else 0)
        expected = end + -end % BLOCK
        if member.size < 0 or end > found.nbytes:
            found.faults.append(f"it is damaged or cut short: {member.name} at byte {member.offset} wants {member.size} "
                                f"bytes, {found.nbytes - member.offset_data} are left")
            tar.offset = expected = member.offset_data + -member.offset_data % BLOCK  # look for headers behind it
            last = _mark(found, latest, member.name, "its last bytes are missing: the shard is cut there") or last
            continue
        if member.isdir() or _META.match(member.name):
            found.others += 1
            continue
        match = _NAME.match(member.name)
        if match is None:
            found.others += 1
            continue
        if not member.isreg() or member.issparse():
            last = _mark(found, latest, member.name, f"{member.name} is a link or sparse, its content is not in its place")
            continue
        last = _place(found, latest, last, match[1], match[2].lower(), (member.offset_data, member.size))
    _check_tail(file, found, expected)


def _place(found: Survey, latest: dict[str, Found], last: Found | None, key: str, extension: str,
           where: tuple[int, int]) -> Found:
    sample = latest.get(key)
    if sample is None or extension in sample.members:  # a second member of this kind begins another sample of this key
        sample = Found(key)
        found.samples.append(sample)
        latest[key] = sample
    elif sample is not last:
        sample.apart = True
    sample.members[extension] = where
    return sample


def _mark(found: Survey, latest: dict[str, Found], name: str, fault: str) -> Found | None:
    match = _NAME.match(name)
    if match is None:
        return None
    sample = latest.get(match[1])
    if sample is None:
        sample = latest[match[1]] = Found(match[1])
        found.samples.append(sample)
    sample.faults.append(fault)
    return sample


def _gap(file: BinaryIO, start: int, stop: int) -> str:
    file.seek(start)
    place = start
    while place < stop:
        chunk = file.read(min(2**20, stop - place))
        if not chunk:
            break
        if any(chunk):
            return f"it is damaged: {stop - start} bytes from byte {start} on are no tar header"
        place += len(chunk)
    return f"it has more data after its end-of-archive mark at byte {start} (tars joined with cat?)"


def _check_tail(file: BinaryIO, found: Survey, expected: int) -> None:
    file.seek(min(expected, found.nbytes))
    block = file.read(BLOCK)
    if len(block) < BLOCK:
        if not any("cut short" in fault for fault in found.faults):
            found.faults.append(f"it is damaged or cut short: no end-of-archive mark at byte {expected} of {found.nbytes}")
        return
    while block:
        if any(block):
            found.faults.append(f"it is damaged or cut short: what follows byte {expected} is no tar header")
            return
        block = file.read(2**20)
