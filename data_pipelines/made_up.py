"""Made-up pictures and videos: data sets that need no download, drawn from formulas by (seed, sample number).

* `fractals`: every class is one random iterated function system of 2-8 contracting affine maps; its pictures are point
  clouds of the attractor with the maps' parameters, rotation, flip and colours varied (Kataoka et al., "Pre-training
  without natural images", ACCV 2020; singular values as in Anderson and Farrell, "Improving fractal pre-training", WACV
  2022). Learning the classes teaches shapes, since colours say nothing.
* `digits`: scikit-learn's 1 797 handwritten digits (8 x 8 grey), enlarged; a fixed stratified split, a fifth is the test.
* `photos`: smooth random colours with one blob whose hue is the class; JPEG of varying aspect, for tiny runs.
* `videos`: a blob that drifts over still smooth colours and comes in again at the other side; its direction and speed are
  the class, so no single frame tells it. H.264 in mp4, 25 frames a second, a keyframe at least every 12;
  an odd size is one larger.

A set is named by a word: `made-up:fractals?n=2000&size=64&classes=10&seed=0`. The same word gives the same pictures: random
numbers are raw Philox words (the bytes of videos are those of one version of x264). Here nothing is written but by
`ensure_made_up`.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import numpy as np

from data_pipelines.once import build_once
from data_pipelines.order import words
from data_pipelines.shards import folder_shards
from tubelet.errors import DataError, Problems, nearest

VERSION = 1  # part of the cache's name; raise it when any picture changes
OPTIONS = {
    "fractals": {"n": 2000, "size": 64, "classes": 10, "seed": 0},
    "digits": {"split": "train", "size": 32},
    "photos": {"n": 200, "size": 64, "classes": 10, "seed": 0},
    "videos": {"n": 40, "size": 48, "frames": 24, "classes": 5, "seed": 0},
}
_FRACTAL_CLASS, _FRACTAL, _PHOTO, _DIGITS, _VIDEO = 16, 17, 18, 19, 20  # what random words are for; part of their key


@dataclass(frozen=True)
class PictureSet:
    """Pictures with labels, encoded one at a time. `sample(i)` -> (extension, bytes, a name for the key or "")."""

    labels: np.ndarray
    """int64 [n]"""
    sample: Callable[[int], tuple[str, bytes, str]]
    classes: list[str] | None = None
    """Class names by number, when known."""
    notes: tuple[str, ...] = ()
    """What the person who writes it should know."""


def encode_png(image: np.ndarray) -> bytes:
    """PNG of a uint8 picture [H, W, 3] or [H, W]; lossless."""
    return _encode(image, "PNG", compress_level=4)


def _encode(image: np.ndarray, kind: str, **options: int) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, kind, **options)
    return buffer.getvalue()


def uniform(seed: int, purpose: int, number: int, count: int, draw: int = 0) -> np.ndarray:
    """float64 [count] in [0, 1): numbers that belong to (seed, purpose, number, draw), whatever else is drawn."""
    return (words(seed, purpose, 0, (number, draw, 0), count) >> np.uint64(11)) * 2.0**-53


def parse_spec(spec: str) -> tuple[str, dict[str, int | str]]:
    """`made-up:KIND?option=value&...` -> (kind, all options with their defaults). Raises `DataError` for what is unknown."""
    kind, _, query = spec.removeprefix("made-up:").partition("?")
    if kind not in OPTIONS:
        close = nearest(kind, OPTIONS)
        raise DataError(f"`{spec}`: there is no made-up set `{kind}`.", f"made-up:{close[0]}" if close else
                        "one of " + ", ".join(f"made-up:{name}" for name in OPTIONS))
    options: dict[str, int | str] = dict(OPTIONS[kind])
    problems = Problems(DataError, f"`{spec}`:")
    for key, value in parse_qsl(query, keep_blank_values=True):
        if key not in options:
            problems.add(f"`{spec}`: `{kind}` has no option `{key}`.", f"one of {', '.join(options)}")
        elif key == "split":
            if value not in ("train", "test"):
                problems.add(f"`{spec}`: `split` is {value}, must be train or test.", "split=train")
            options[key] = value
        else:
            least = 0 if key == "seed" else 1
            if not value.isdigit() or int(value) < least:
                problems.add(f"`{spec}`: `{key}` is {value}, must be a whole number of at least {least}.",
                             f"{key}={OPTIONS[kind][key]}")
            else:
                options[key] = int(value)
    problems.raise_if_any()
    return kind, options


def made_up(spec: str) -> PictureSet:
    """The set a word names."""
    kind, options = parse_spec(spec)
    if kind == "digits":
        return _digits(str(options["split"]), int(options["size"]))
    n, size, classes, seed = (int(options[key]) for key in ("n", "size", "classes", "seed"))
    labels = np.arange(n, dtype=np.int64) % classes
    if kind == "videos":
        frames = int(options["frames"])
        return PictureSet(labels, lambda i: ("mp4", encode_mp4(moving(seed, i, i % classes, classes, size, frames)), ""),
                          [f"drift {k}" for k in range(classes)])
    if kind == "fractals":
        return PictureSet(labels, lambda i: ("png", encode_png(fractal(seed, i, i % classes, size)), ""),
                          [f"fractal {k}" for k in range(classes)])
    return PictureSet(labels, lambda i: ("jpg", _encode(photo(seed, i, i % classes, classes, size), "JPEG", quality=90), ""),
                      [f"hue {360 * k // classes}" for k in range(classes)])


def ensure_made_up(spec: str, folder: Path) -> list[str]:
    """Paths of the shards of a made-up set, written once below `folder` under a name that follows from the word.

    Any number of processes may ask at once: one writes, the others wait (`once.build_once`).
    """
    from data_pipelines.write import write_into  # lazily: writing indexes what it wrote, and the index asks for made-up sets

    kind, options = parse_spec(spec)
    text = f"{VERSION} {kind} " + " ".join(f"{key}={options[key]}" for key in sorted(options))
    target = folder / f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"

    def build(temporary: Path) -> None:
        pictures = made_up(spec)
        shard_size = min(1000, max(8, -(-len(pictures.labels) // 4)))
        write_into(temporary, pictures, name=kind, shard_size=shard_size, seed=0)

    return folder_shards(str(build_once(target, build)))


# ---------------------------------------------------------------------------------------------------- fractals


@lru_cache(maxsize=4096)
def _system(seed: int, label: int) -> np.ndarray:
    """float64 [maps, 6]: the affine maps (a b c d e f; x' = a x + b y + e, y' = c x + d y + f) of a class.

    The singular values of all maps together are drawn so that the attractor is neither dust nor a disc; draws whose
    attractor still fills too little of its box are drawn again.
    """
    for draw in range(50):
        u = uniform(seed, _FRACTAL_CLASS, label, 64, draw)
        maps = 2 + int(u[0] * 7)
        # sum of (s1 + 2 s2) over the maps lies in this range for attractors that look like something
        wanted = 0.5 * (5 + maps) + 0.5 * u[1]
        s1, s2 = np.sort(u[2 : 2 + 2 * maps].reshape(2, maps), axis=0)[::-1]
        scale = wanted / float((s1 + 2 * s2).sum())
        s1, s2 = np.minimum(s1 * scale, 0.9), np.minimum(s2 * scale, 0.85)
        turn, tilt = u[20 : 20 + 2 * maps].reshape(2, maps) * 2 * np.pi
        sign = np.where(u[38 : 38 + maps] < 0.5, -1.0, 1.0)
        a = s1 * np.cos(turn) * np.cos(tilt) - sign * s2 * np.sin(turn) * np.sin(tilt)
        b = -s1 * np.cos(turn) * np.sin(tilt) - sign * s2 * np.sin(turn) * np.cos(tilt)
        c = s1 * np.sin(turn) * np.cos(tilt) + sign * s2 * np.cos(turn) * np.sin(tilt)
        d = -s1 * np.sin(turn) * np.sin(tilt) + sign * s2 * np.cos(turn) * np.cos(tilt)
        e, f = u[47 : 47 + 2 * maps].reshape(2, maps) * 2 - 1
        system = np.stack([a, b, c, d, e, f], axis=1)
        if draw == 49 or _filled(system, seed, label) > 0.12:
            return system
    raise AssertionError


def _filled(system: np.ndarray, seed: int, label: int) -> float:
    x, y, _ = _cloud(system, uniform(seed, _FRACTAL_CLASS, label, 256 * 16, 99).reshape(16, 256), 8)
    column, row, inside = _pixels(x, y, 24)
    return len(np.unique(row[inside] * 24 + column[inside])) / 24**2


def _cloud(system: np.ndarray, u: np.ndarray, kept: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Chaos game of many walkers: x, y and the map last used, of the last `kept` steps; `u` [steps, walkers] in [0, 1)."""
    a, b, c, d, e, f = system.T
    area = np.abs(a * d - b * c) + 0.02
    chosen = np.searchsorted(np.cumsum(area / area.sum())[:-1], u, side="right")
    x = np.zeros(u.shape[1])
    y = np.zeros(u.shape[1])
    xs, ys = [], []
    for step, k in enumerate(chosen):
        x, y = a[k] * x + b[k] * y + e[k], c[k] * x + d[k] * y + f[k]
        if step >= len(u) - kept:
            xs.append(x)
            ys.append(y)
    return np.concatenate(xs), np.concatenate(ys), chosen[-kept:].ravel()


def _pixels(x: np.ndarray, y: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Columns, rows, and which points are inside: the box of nearly all points fills nine tenths of the picture."""
    few = slice(None, None, max(1, len(x) // 2048))
    (x0, x1), (y0, y1) = np.percentile(x[few], (1, 99)), np.percentile(y[few], (1, 99))
    scale = 0.9 * size / max(x1 - x0, y1 - y0, 1e-9)
    column = ((x - (x0 + x1) / 2) * scale + size / 2).astype(np.int64)
    row = ((y - (y0 + y1) / 2) * scale + size / 2).astype(np.int64)
    return column, row, (column >= 0) & (column < size) & (row >= 0) & (row < size)


def fractal(seed: int, number: int, label: int, size: int) -> np.ndarray:
    """uint8 [size, size, 3]: picture `number` of the class `label`."""
    system = _system(seed, label)
    u = uniform(seed, _FRACTAL, number, 128)
    varied = system * (1 + 0.2 * (u[: system.size].reshape(system.shape) - 0.5))
    kept = 8
    walkers = max(256, 3 * size * size // kept)
    x, y, used = _cloud(varied, uniform(seed, _FRACTAL, number, 18 * walkers, 1).reshape(18, walkers), kept)
    angle = (u[64] - 0.5) * np.pi / 3
    x, y = x * np.cos(angle) - y * np.sin(angle), x * np.sin(angle) + y * np.cos(angle)
    if u[65] < 0.5:
        x = -x
    column, row, inside = _pixels(x, y, size)
    place = row[inside] * size + column[inside]
    colours = 0.25 + 0.75 * u[66 : 66 + 3 * len(system)].reshape(-1, 3)  # one per map, of this picture only
    used = used[inside]
    count = np.bincount(place, minlength=size * size)
    light = np.log1p(count) / np.log1p(max(1, int(count.max())))
    paint = np.stack([np.bincount(place, colours[used, channel], size * size) for channel in range(3)], axis=1)
    ground = 0.3 * u[100:103]
    pictured = paint / np.maximum(count, 1)[:, None]
    light = np.where(count > 0, 0.35 + 0.65 * light, 0)[:, None]
    return ((ground * (1 - light) + pictured * light) * 255).astype(np.uint8).reshape(size, size, 3)


# ---------------------------------------------------------------------------------------------------- photos, digits


def photo(seed: int, number: int, label: int, classes: int, size: int) -> np.ndarray:
    """uint8 [H, W, 3], the short side is `size` and the long one up to a third more: a blob of the class's hue on smooth
    random colours."""
    from PIL import Image

    u = uniform(seed, _PHOTO, number, 64)
    longer = size + int(u[0] * size / 3)
    height, width = (size, longer) if u[1] < 0.5 else (longer, size)
    few = (u[2:50].reshape(4, 4, 3) * 160 + 48).astype(np.uint8)
    ground = np.asarray(Image.fromarray(few).resize((width, height), Image.Resampling.BICUBIC), dtype=np.float32)
    hue = 2 * np.pi * label / classes
    colour = 127.5 + 127.5 * np.cos(hue - np.array([0, 2, 4]) * np.pi / 3)
    rows, columns = np.mgrid[:height, :width] / size
    centre_row, centre_column = (0.3 + 0.4 * u[50:52]) * (height / size, width / size)
    distance = (rows - centre_row) ** 2 + (columns - centre_column) ** 2
    cover = np.exp(-((distance / (0.25 + 0.1 * u[52]) ** 2) ** 2))[..., None]
    return np.clip(ground * (1 - cover) + colour * cover, 0, 255).astype(np.uint8)


def _digits(split: str, size: int) -> PictureSet:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise DataError("made-up:digits comes with scikit-learn, which is not installed.",
                        "pip install tubelet[demo]") from None
    from PIL import Image

    found = load_digits()
    labels = np.asarray(found.target, dtype=np.int64)  # type: ignore[union-attr]
    pictures = np.asarray(found.images, dtype=np.float64)  # type: ignore[union-attr]  # [1797, 8, 8], 0..16
    chosen = []
    for k in range(10):
        members = np.flatnonzero(labels == k)
        members = members[np.argsort(words(0, _DIGITS, 0, (k, 0, 0), len(members)), kind="stable")]
        held_out = round(len(members) / 5)
        chosen.append(members[:held_out] if split == "test" else members[held_out:])
    numbers = np.sort(np.concatenate(chosen))

    def sample(i: int) -> tuple[str, bytes, str]:
        grey = Image.fromarray((pictures[numbers[i]] * (255 / 16)).round().astype(np.uint8))
        large = grey.resize((size, size), Image.Resampling.BICUBIC)
        return "png", encode_png(np.asarray(large)), ""

    return PictureSet(labels[numbers], sample, [str(k) for k in range(10)])


# ---------------------------------------------------------------------------------------------------- videos


def drift(label: int, classes: int) -> tuple[float, float]:
    """(rows, columns) that the blob of a class moves from frame to frame, as parts of the size: up to eight directions, and
    as many speeds as it takes."""
    speeds = -(-classes // 8)
    directions = -(-classes // speeds)
    angle, speed = 2 * np.pi * (label % directions) / directions, (1 + label // directions) / (16 * speeds)
    return float(speed * np.sin(angle)), float(speed * np.cos(angle))


def moving(seed: int, number: int, label: int, classes: int, size: int, frames: int) -> np.ndarray:
    """uint8 [T, size, size, 3] (an even size): video `number` of the class `label`."""
    from PIL import Image

    size += size % 2
    u = uniform(seed, _VIDEO, number, 64)
    few = (u[:48].reshape(4, 4, 3) * 120).astype(np.uint8)
    ground = np.asarray(Image.fromarray(few).resize((size, size), Image.Resampling.BICUBIC), dtype=np.float32)
    colour, start = 155 + 100 * u[48:51], u[51:53]
    where = start + np.arange(frames)[:, None] * drift(label, classes)  # [T, 2], uniform on the torus in every frame
    grid = (np.arange(size) + 0.5) / size
    away = np.abs((grid - where[:, :, None] + 0.5) % 1 - 0.5)  # [T, 2, size]: rows, columns
    distance = away[:, 0, :, None] ** 2 + away[:, 1, None, :] ** 2
    cover = np.exp(-((distance / (0.12 + 0.06 * u[53]) ** 2) ** 2))[..., None]
    return np.clip(ground * (1 - cover) + colour * cover, 0, 255).astype(np.uint8)


def encode_mp4(images: np.ndarray, fps: int = 25, gop: int = 12) -> bytes:
    """H.264 in mp4 of uint8 [T, H, W, 3] (even H and W); one thread and no date in it: the same bytes each time."""
    from fractions import Fraction

    import av

    buffer = io.BytesIO()
    options = {"preset": "veryfast", "crf": "18", "x264-params": "threads=1:cpu-independent=1:log-level=error"}
    with av.open(buffer, "w", format="mp4", options={"fflags": "+bitexact"}) as file:
        stream: Any = file.add_stream("libx264", rate=fps, options=options)
        stream.height, stream.width, stream.pix_fmt, stream.gop_size = images.shape[1], images.shape[2], "yuv420p", gop
        for i, image in enumerate(images):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            frame.pts, frame.time_base = i, Fraction(1, fps)
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return buffer.getvalue()
