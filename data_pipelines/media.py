"""One thing with frames: a picture, a video, or numbered pictures. A picture is a video of one frame.

The members of a sample become a `Media`, which knows how many frames it has and when they are shown, and decodes those that
are asked for; `clips.py` says which. Nothing here is random and nothing reads files.

Legend: n frames asked for, T frames of a clip, H W rows cols.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from data_pipelines.decode import PICTURES, BadSample, decode_image
from data_pipelines.settings import DataSettings


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
    """A picture."""

    frames = 1

    def __init__(self, image: np.ndarray):
        self.image, self.times = image, np.zeros(1)

    def read(self, indices: Sequence[int]) -> np.ndarray:
        if len(indices) == 1:
            return self.image[None]
        return np.repeat(self.image[None], len(indices), axis=0)

    def close(self) -> None:
        pass


def media_members(kinds: Sequence[str]) -> list[str]:
    """Of a sample's members those that hold its picture or video; empty when there is none."""
    return next(([kind] for kind in PICTURES if kind in kinds), [])


def open_media(members: Mapping[str, bytes], settings: DataSettings) -> Media:
    """The media in the bytes of `media_members`. Raises `BadSample` when they are not one."""
    for kind in PICTURES:
        if kind in members:
            return Still(decode_image(members[kind], decoder=settings.decoder, exif=settings.exif,
                                      max_pixels=settings.max_pixels))
    raise BadSample(f"no picture or video among its members ({', '.join(members) or 'none'})")
