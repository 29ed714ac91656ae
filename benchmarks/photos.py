"""Real photographs for the loader's benchmarks: tiles of Debian's wallpaper packages, as class folders and as shards.

The packages (mate-backgrounds, ukui-wallpapers) are downloaded and unpacked by this file, never installed or committed.
"""

from __future__ import annotations

import io
import subprocess
from pathlib import Path

import numpy as np
from PIL import Image

PACKAGES = ("mate-backgrounds", "ukui-wallpapers")


def originals(cache: Path) -> list[Path]:
    """Large photographs, unpacked into `cache` once."""
    folder = cache / "wallpapers"
    if not (folder / "done").exists():
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(["apt-get", "download", *PACKAGES], cwd=folder, check=True, capture_output=True)
        for package in folder.glob("*.deb"):
            subprocess.run(["dpkg-deb", "-x", str(package), str(folder)], check=True)
        (folder / "done").touch()
    photographs = sorted(path for path in folder.rglob("nature/*.jpg") if not path.is_symlink())  # the rest is drawn
    found = [path for path in photographs if "_" not in path.stem]  # one size of each
    if not found:
        raise SystemExit(f"{folder} holds no photographs; remove it and try again")
    return found


def photo_set(cache: Path, count: int, size: tuple[int, int] = (500, 375), quality: int = 90, classes: int = 10) -> Path:
    """`count` JPEG tiles of about `size` (width, height) from the photographs: folders 0 ... classes - 1 under one folder.

    A tile is a random crop at 0.8 to 1 of the height, resized with antialiasing; nothing is flipped or coloured.
    """
    folder = cache / f"photos-{count}-{size[0]}x{size[1]}-q{quality}"
    if (folder / "done").exists():
        return folder / "train"
    rng, paths = np.random.RandomState(0), originals(cache)
    for number in range(count):
        if number % 50 == 0 or number < len(paths):
            picture = Image.open(paths[number % len(paths)]).convert("RGB")
        width, height = picture.size
        rows = int(min(height, width * size[1] / size[0]) * rng.uniform(0.8, 1.0))
        cols = int(rows * size[0] / size[1])
        left, top = rng.randint(0, width - cols + 1), rng.randint(0, height - rows + 1)
        # every third one stands upright or has another aspect, as in ImageNet
        shape = size if number % 3 else (size[1], size[0]) if number % 2 else (size[0], int(size[1] * 0.89))
        tile = picture.crop((left, top, left + cols, top + rows)).resize(shape, Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        tile.save(buffer, "JPEG", quality=quality)
        path = folder / "train" / f"{number % classes:03d}" / f"{number:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(buffer.getvalue())
    (folder / "done").touch()
    return folder / "train"


def photo_shards(cache: Path, photos: Path, shard_size: int = 500) -> Path:
    """The same pictures as WebDataset shards with our index and timm's `_info.json`."""
    from data_pipelines.write import write_shards

    out = photos.parent / "shards"
    if not (out / "index.json").exists():
        write_shards(str(photos), out, shard_size=shard_size, name="photos")
    return out
