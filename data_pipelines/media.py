"""One thing with frames: a picture, a video, or numbered pictures. A picture is a video of one frame.

The members of a sample become a `Media`, which knows how many frames it has and when they are shown, and decodes those that
are asked for; `clips.py` says which. Nothing here is random and nothing reads files.

Of the members of a sample, the first of these that is there is its media, and the others are not read:

1. a video: `mp4`, `webm`, ... in the order of `VIDEOS`; a picture beside it is its thumbnail;
2. numbered pictures: `000001.jpg 000002.jpg ...`, three digits or more, all of one width and one suffix (`scan.py` refuses
   shards where they are not). They are a video's frames in the order of their numbers. Where numbers are missing there is
   no frame; `times` are the numbers, counted from the first, at one a second since nothing tells the rate. So `unit: frames`
   counts the pictures that exist, and `unit: seconds` counts numbers and shows the picture before a gap;
3. a picture: `jpg`, `png`, ... in the order of `PICTURES`.

Legend: n frames asked for, T frames of a clip, H W rows cols.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

import numpy as np

from data_pipelines.decode import PICTURES, BadSample, decode_image, reducible_size
from data_pipelines.settings import DataSettings
from data_pipelines.video import arranged, fill_gaps, open_video

VIDEOS = ("mp4", "webm", "mkv", "mov", "avi", "m4v", "mpg", "mpeg", "ts", "m2ts", "ogv", "flv", "wmv", "3gp")
"""Members that hold a video; of several the first in this list is the sample's."""
NUMBERED = re.compile(rf"(\d{{3,}})\.({'|'.join(PICTURES)})")
"""Members that are one frame each."""

Reduce = Callable[[int, int], int]
"""(rows, cols) of a picture -> at which part of its size it may be decoded: 1, 2, 4 or 8."""


class Media(Protocol):
    """Frames of one sample."""

    frames: int
    """How many there are, at least 1."""
    times: np.ndarray
    """float64 [frames]: when each is shown, in seconds, ascending."""

    def read(self, indices: Sequence[int]) -> np.ndarray:
        """uint8 [n, H, W, 3], contiguous and writable: the frames with these numbers, in this order; a number may come
        more than once. Raises `BadSample` when they do not decode."""
        ...

    def close(self) -> None:
        """Give memory back; nothing can be read afterwards."""
        ...


class Still:
    """A picture. `full`: its (rows, cols) when it was decoded at a part of them."""

    frames = 1

    def __init__(self, image: np.ndarray, full: tuple[int, int] | None = None):
        self.image, self.times, self.full = image, np.zeros(1), full

    def read(self, indices: Sequence[int]) -> np.ndarray:
        if len(indices) == 1:
            return self.image[None]
        return np.repeat(self.image[None], len(indices), axis=0)

    def close(self) -> None:
        pass


class NumberedPictures:
    """Pictures that are the frames of a video; only those that are asked for are decoded, and only these need bytes."""

    def __init__(self, members: Mapping[str, bytes], settings: DataSettings):
        names = sorted(members)
        self.pictures, self.settings = [members[name] for name in names], settings
        self.frames, self.times = len(names), numbered_times(names)

    def read(self, indices: Sequence[int]) -> np.ndarray:
        """See `Media.read`. A picture that does not decode is replaced as a video's frame (`fill_gaps`)."""
        wanted = sorted({int(i) for i in indices})
        found: dict[int, np.ndarray] = {}
        why = ""
        for i in wanted:
            try:
                found[i] = _decode(self.pictures[i], self.settings)
            except BadSample as error:
                why = str(error)
        sizes = sorted({image.shape[:2] for image in found.values()})
        if len(sizes) > 1:
            raise BadSample(f"its numbered pictures have several sizes ({sizes[0]} and {sizes[-1]} rows and columns)")
        return arranged(fill_gaps(found, wanted, why), indices)

    def close(self) -> None:
        self.pictures = []


def _decode(data: bytes, settings: DataSettings, reduce: int = 1) -> np.ndarray:
    return decode_image(data, decoder=settings.decoder, exif=settings.exif, max_pixels=settings.max_pixels, reduce=reduce)


def _still(data: bytes, settings: DataSettings, reduce: Reduce | None) -> Still:
    full = reducible_size(data, settings.exif) if reduce is not None else None
    part = reduce(*full) if reduce is not None and full is not None else 1
    return Still(_decode(data, settings, part), full if part > 1 else None)


def numbered_members(kinds: Iterable[str]) -> list[str]:
    """The numbered pictures among a sample's members, in order; empty when there are none, or of several widths or
    suffixes."""
    found = [(name, match) for name in kinds if (match := NUMBERED.fullmatch(name))]
    forms = {(len(match[1]), match[2]) for _, match in found}
    return sorted(name for name, _ in found) if len(forms) == 1 else []


def numbered_times(names: Sequence[str]) -> np.ndarray:
    """float64 [frames]: when numbered pictures (in order) are shown, by their names alone."""
    numbers = np.array([int(name.partition(".")[0]) for name in names], dtype=np.float64)
    return numbers - numbers[0]


def media_members(kinds: Sequence[str]) -> list[str]:
    """Of a sample's members those that hold its picture or video; empty when there is none."""
    if video := next((kind for kind in VIDEOS if kind in kinds), None):
        return [video]
    return numbered_members(kinds) or next(([kind] for kind in PICTURES if kind in kinds), [])


def open_media(members: Mapping[str, bytes], settings: DataSettings, reduce: Reduce | None = None) -> Media:
    """The media in the bytes of `media_members`. Raises `BadSample` when they are not one. `reduce` is asked about
    single pictures that can be decoded at a part of their size."""
    chosen = media_members(list(members))
    if not chosen:
        raise BadSample(f"no picture or video among its members ({', '.join(members) or 'none'})")
    if chosen[0] in VIDEOS:
        return open_video(members[chosen[0]], settings)
    if NUMBERED.fullmatch(chosen[0]):
        return NumberedPictures({name: members[name] for name in chosen}, settings)
    return _still(members[chosen[0]], settings, reduce)
