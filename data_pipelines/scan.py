"""One tar shard -> where every sample's members lie, from its headers alone; and the .idx file that keeps it.

Grouping is WebDataset's: the key of a member is its path up to the first dot of its file name, members of a sample stand
together, extensions are lower-case, `__meta__` members and names without an extension are not samples. What WebDataset
reads wrongly without a word is refused here: a shard that is cut short, a key that comes back later, names with dots that
would merge several files into one sample, links, concatenated tars. Headers are parsed by the standard library's tarfile
(GNU long names, PAX, base-256 sizes). No member's content is read, so nothing in a shard can run.
"""

from __future__ import annotations

import io
import re
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from data_pipelines.media import numbered_members
from data_pipelines.remote import open_file
from data_pipelines.shards import is_remote
from tubelet import safe_io
from tubelet.errors import DataError, TubeletError

_NAME = re.compile(r"^((?:.*/|)[^./][^/.]*)[.]([^/]+)$")  # WebDataset's rule, which also skips hidden files
LONGEST_HEADER = 4 * 2**20  # bytes of a long name or PAX header; real ones have a few hundred
_META = re.compile(r"__[^/]*__($|/)")


@dataclass(frozen=True)
class SampleRef:
    """Where one sample lies: for each member extension its byte (offset, size) in the shard at `url`."""

    key: str
    url: str
    members: dict[str, tuple[int, int]]


@dataclass
class ShardTable:
    """The samples of one shard as arrays; n samples, m members."""

    keys: np.ndarray
    """uint8: the keys' UTF-8 bytes, one after the other."""
    key_ends: np.ndarray
    """[n]: where each key ends in `keys`."""
    member_ends: np.ndarray
    """[n]: where each sample's members end in the three arrays below."""
    extensions: np.ndarray
    """[m]: number of each member's extension in `vocabulary`."""
    offsets: np.ndarray
    """[m]: first byte of each member's content in the shard."""
    sizes: np.ndarray
    """[m]: bytes of each member's content."""
    vocabulary: list[str]

    def __len__(self) -> int:
        return len(self.key_ends)

    @property
    def nbytes(self) -> int:
        """Bytes this table takes in memory."""
        return sum(array.nbytes for array in (self.keys, self.key_ends, self.member_ends, self.extensions, self.offsets,
                                              self.sizes))

    def sample(self, index: int, url: str) -> SampleRef:
        """Sample number `index` of the shard."""
        if not 0 <= index < len(self):
            raise IndexError(f"{url} has samples 0..{len(self) - 1}, not {index}")
        first = int(self.key_ends[index - 1]) if index else 0
        key = self.keys[first : int(self.key_ends[index])].tobytes().decode("utf-8", "surrogateescape")
        low = int(self.member_ends[index - 1]) if index else 0
        members = {self.vocabulary[int(self.extensions[i])]: (int(self.offsets[i]), int(self.sizes[i]))
                   for i in range(low, int(self.member_ends[index]))}
        return SampleRef(key, url, members)


def open_shard(url: str) -> BinaryIO:
    """A shard, seekable, for reading."""
    if not is_remote(url):
        return open(url, "rb")
    return open_file(url)


def scan_shard(url: str) -> tuple[ShardTable, int]:
    """(table of the samples, bytes of the file) of a shard. Raises `DataError` that names what is wrong with it."""
    try:
        with open_shard(url) as file:
            nbytes = file.seek(0, io.SEEK_END)
            file.seek(0)
            return _scan(file, url, nbytes), nbytes
    except (TubeletError, MemoryError):
        raise
    except tarfile.TarError as error:
        raise _broken(url, str(error)) from None
    except OSError as error:
        raise DataError(f"{url} cannot be read: {error.strerror or error}.", "check the path and its permissions") from None
    except RecursionError:
        raise _broken(url, "a chain of extended headers without end") from None
    except Exception as error:  # what tarfile lets through of headers without sense: ValueError, IndexError, ...
        raise _broken(url, f"a header without sense ({type(error).__name__}: {str(error)[:100]})") from None


class Headers(io.RawIOBase):
    """A shard as tarfile may see it: sizes in headers are a stranger's, and tarfile reads and seeks as they say."""

    def __init__(self, file: BinaryIO, nbytes: int):
        super().__init__()
        self.file, self.nbytes = file, nbytes

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= LONGEST_HEADER:
            raise tarfile.ReadError(f"an extended header of {size} bytes")
        return self.file.read(size)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence != io.SEEK_SET or not 0 <= offset <= self.nbytes:
            raise tarfile.ReadError(f"a header tells of a place at byte {offset} of {self.nbytes}")
        return self.file.seek(offset)

    def tell(self) -> int:
        return self.file.tell()

    def seekable(self) -> bool:
        return True


def _broken(url: str, what: str) -> DataError:
    return DataError(f"{url} is damaged or cut short: {what}.", "copy or write this shard again")


def _scan(file: BinaryIO, url: str, nbytes: int) -> ShardTable:
    if file.read(6).startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")):
        raise DataError(f"{url} is compressed, so no sample can be read by its position.",
                        "gunzip it: pictures are compressed already, the .tar is hardly larger")
    file.seek(0)
    rows: list[tuple[str, dict[str, tuple[int, int]]]] = []
    seen: set[str] = set()
    tar, reached = tarfile.open(fileobj=Headers(file, nbytes), mode="r:", errorlevel=2), -1
    while (member := tar.next()) is not None:
        if tar.offset <= reached or member.size < 0:  # a negative size leads back, and round for ever
            raise _broken(url, f"member {member.name[:200]!r} has {member.size} bytes")
        reached = tar.offset
        tar.members = []  # type: ignore[attr-defined]  # tarfile keeps every header otherwise
        if member.isdir() or _META.match(member.name):
            continue
        if not member.isreg() or member.issparse():
            kind = "a sparse file" if member.isreg() else "a link or device, whose content is not in its place"
            raise DataError(f"{url}: member {member.name} is {kind}.",
                            "write the shard with `tar --hard-dereference -h`, or `tubelet data write`")
        match = _NAME.match(member.name)
        if match is None:
            continue
        key, extension = match[1], match[2].lower()
        if not rows or rows[-1][0] != key:
            if key in seen:
                raise DataError(f"{url}: the members of sample {key} do not stand together ({member.name} comes after "
                                "other samples), or two samples have this key.",
                                "write the shard with `tar --sort=name`, or `tubelet data write`")
            seen.add(key)
            rows.append((key, {}))
        members = rows[-1][1]
        if extension in members:
            raise DataError(f"{url}: sample {key} has two members .{extension}; which one is meant cannot be known.",
                            "give each sample a key of its own")
        members[extension] = (member.offset_data, member.size)
    _check_end(file, url, tar.offset, nbytes)
    for key, members in rows:
        if any("." in extension for extension in members):
            _check_dots(url, key, list(members))
    return _table(rows)


def _check_end(file: BinaryIO, url: str, offset: int, nbytes: int) -> None:
    """tarfile stops at anything that is not a header; only zero blocks are an end."""
    file.seek(offset)
    block = file.read(512)
    if len(block) < 512 or any(block):
        raise _broken(url, f"no end-of-archive mark at byte {offset} of {nbytes}")
    while chunk := file.read(2**20):
        if any(chunk):
            raise DataError(f"{url} has more data after its end-of-archive mark; what follows would never be read "
                            "(tars joined with cat?).", "keep them as separate shards")


def _check_dots(url: str, key: str, extensions: list[str]) -> None:
    """`v_1.0.mp4` and `v_1.1.mp4` have the key `v_1`: two videos would be one sample. `a.left.png a.cls` is fine, and so
    are numbered pictures that are a video's frames: `a.000.jpg a.001.jpg a.cls` (see `media`)."""
    frames = set(numbered_members(extensions))
    groups: dict[str, set[str]] = {}
    for extension in extensions:
        if extension not in frames:
            middle, _, last = extension.rpartition(".")
            groups.setdefault(middle, set()).add(last)
    bare = groups.get("")
    # a second group with all that the bare names have is another sample; so are numbers (v_1.0 and v_1.1)
    merged = any(bare is None or bare <= kinds or middle[0].isdigit() for middle, kinds in groups.items() if middle)
    if merged:
        names = ", ".join(f"{key.rsplit('/', 1)[-1]}.{extension}" for extension in extensions[:4])
        raise DataError(f"{url}: names with dots before the extension ({names}) are one sample `{key}` by WebDataset's "
                        "rule, which ends the key at the first dot.",
                        "rename the files without dots (v_1.0.mp4 -> v_1_0.mp4) and write the shards again; numbered "
                        "pictures of one video need three digits or more, all equally many, and one suffix")


def _smallest(values: list[int]) -> np.ndarray:
    array = np.asarray(values, dtype=np.int64)
    return array.astype(np.min_scalar_type(int(array.max()))) if len(array) else array.astype(np.uint8)


def _table(rows: list[tuple[str, dict[str, tuple[int, int]]]]) -> ShardTable:
    keys = [key.encode("utf-8", "surrogateescape") for key, _ in rows]
    vocabulary = sorted({extension for _, members in rows for extension in members})
    number = {extension: i for i, extension in enumerate(vocabulary)}
    places = [place for _, members in rows for place in members.values()]
    return ShardTable(
        keys=np.frombuffer(b"".join(keys), dtype=np.uint8),
        key_ends=_smallest(np.cumsum([len(key) for key in keys], dtype=np.int64).tolist()),
        member_ends=_smallest(np.cumsum([len(members) for _, members in rows], dtype=np.int64).tolist()),
        extensions=_smallest([number[extension] for _, members in rows for extension in members]),
        offsets=_smallest([offset for offset, _ in places]),
        sizes=_smallest([size for _, size in places]),
        vocabulary=vocabulary)


# ---------------------------------------------------------------------------------------------------- the .idx file


def idx_bytes(table: ShardTable) -> bytes:
    """The .idx file of a shard: an .npz of plain arrays, not compressed so that its bytes never depend on a zlib."""
    arrays: dict[str, Any] = {name: getattr(table, name)
                              for name in ("keys", "key_ends", "member_ends", "extensions", "offsets", "sizes")}
    text = "\n".join(table.vocabulary).encode("utf-8", "surrogateescape")
    buffer = io.BytesIO()
    np.savez(buffer, vocabulary=np.frombuffer(text, dtype=np.uint8), **arrays)
    return buffer.getvalue()


def read_idx(content: bytes, name: str | Path) -> ShardTable:
    """The table in the bytes of an .idx file. Raises `DataError` when it is not one."""
    try:
        arrays = safe_io.read_npz(content)
        text = arrays.pop("vocabulary").tobytes().decode("utf-8", "surrogateescape")
        return ShardTable(**arrays, vocabulary=text.split("\n") if text else [])
    except (TubeletError, KeyError, TypeError) as error:
        raise DataError(f"{name} is not the index of a shard ({getattr(error, 'problem', error)}).",
                        "`tubelet data index SHARDS --overwrite`") from None
