"""Small shards for tests, written with tarfile alone, and what is in them."""

import io
import tarfile

import numpy as np
from PIL import Image


def image_bytes(rng, kind="jpg", size=None):
    """A smooth random picture of about 40 x 50 pixels."""
    height, width = size or (int(rng.randint(36, 48)), int(rng.randint(44, 60)))
    coarse = Image.fromarray(rng.randint(0, 256, (6, 8, 3)).astype(np.uint8))
    buffer = io.BytesIO()
    coarse.resize((width, height), Image.Resampling.BICUBIC).save(buffer, {"jpg": "JPEG", "png": "PNG"}[kind])
    return buffer.getvalue()


def write_tar(path, members):
    """`members`: [(name, bytes)], in this order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def write_shards(folder, counts, *, classes=7, seed=0, damage=(), size=None):
    """One tar per count in `folder`; pictures whose running number is in `damage` are cut in half. Returns the folder."""
    rng, number = np.random.RandomState(seed), 0
    for shard, count in enumerate(counts):
        members = []
        for _ in range(count):
            kind = "png" if number % 5 == 4 else "jpg"
            data, label = image_bytes(rng, kind, size), int(rng.randint(classes))
            if number in damage:
                data = data[:len(data) // 2]
            members += [(f"s{number:05d}.cls", str(label).encode()), (f"s{number:05d}.{kind}", data)]
            number += 1
        write_tar(folder / f"shard-{shard:04d}.tar", members)
    return folder


def read_shards(folder):
    """[[(key, bytes of its picture or video, label) of a sample] of a shard], read back with tarfile."""
    shards = []
    for path in sorted(folder.glob("*.tar")):
        samples = {}
        with tarfile.open(path) as tar:
            for member in tar.getmembers():
                key, _, kind = member.name.partition(".")
                samples.setdefault(key, {})[kind] = tar.extractfile(member).read()
        shards.append([(key, next(found[kind] for kind in ("jpg", "png", "mp4") if kind in found), int(found["cls"]))
                       for key, found in samples.items()])
    return shards
