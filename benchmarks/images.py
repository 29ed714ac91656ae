"""Images per second and core, JPEG bytes to augmented uint8 batches of 224 pixels: our loader beside a bare loop, timm's
WebDataset reader, and ImageFolder + DataLoader.

Every loader runs in a process of its own, takes turns with the others (A B C D, D C B A, ...), warms up and is then measured
by the CPU seconds of its whole tree of processes over the same number of pictures. All crop by area 0.08..1 and flip;
timm and ImageFolder go through PIL with their own transforms, as their users do. Run it by `benchmarks/loader.py images`.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from common import machine, ratio, run_apart, tree_cpu_seconds, write_result

BATCH, WORKERS = 64, 2
SCALE, RATIO = (0.08, 1.0), (0.75, 4 / 3)


def bare(shards: Path, photos: Path) -> Iterator[int]:
    """One process, one loop: file bytes -> decode_jpeg -> crop -> antialiased bicubic resize -> flip -> batch."""
    import numpy as np
    import torch
    import torch.nn.functional as F
    from torchvision.io import ImageReadMode, decode_jpeg
    from torchvision.transforms import RandomResizedCrop

    paths = sorted(photos.rglob("*.jpg"))
    order = np.random.RandomState(0).permutation(len(paths))
    batch, slot = torch.empty(BATCH, 3, 224, 224, dtype=torch.uint8), 0
    while True:
        for number in order:
            data = torch.from_numpy(np.fromfile(paths[number], dtype=np.uint8))
            image = decode_jpeg(data, mode=ImageReadMode.RGB)
            top, left, rows, cols = RandomResizedCrop.get_params(image, list(SCALE), list(RATIO))
            view = image[None, :, top:top + rows, left:left + cols]
            view = F.interpolate(view, (224, 224), mode="bicubic", antialias=True)[0]
            batch[slot] = view.flip(-1) if torch.rand(()) < 0.5 else view
            slot += 1
            if slot == BATCH:
                yield BATCH
                slot = 0


def ours(shards: Path, photos: Path, workers: int = WORKERS) -> Iterator[int]:
    """TrainLoader."""
    from data_pipelines.loader import TrainLoader
    from data_pipelines.settings import DataSettings
    from tubelet.dist import World

    settings = DataSettings(train=[str(shards)], workers=workers, augment={"scale": SCALE, "ratio": RATIO})  # type: ignore[arg-type]
    loader = TrainLoader(settings, seed=0, img_size=224, num_classes=10, global_batch_size=BATCH, micro_batch_size=BATCH,
                         world=World())
    for batch in loader.batches(0):
        yield len(batch["pixels"])


def timm_wds(shards: Path, photos: Path) -> Iterator[int]:
    """timm's WebDataset reader with its own training transform (PIL) and uint8 collation."""
    from timm.data import create_dataset, create_loader

    dataset = create_dataset("wds/photos", root=str(shards), split="train", is_training=True, batch_size=BATCH,
                             num_samples=None)
    loader = create_loader(dataset, (3, 224, 224), BATCH, is_training=True, use_prefetcher=False, scale=SCALE, ratio=RATIO,
                           interpolation="bicubic", num_workers=WORKERS, color_jitter=0.0, re_prob=0.0,
                           persistent_workers=True)
    while True:
        for pixels, _ in loader:
            yield len(pixels)


def image_folder(shards: Path, photos: Path) -> Iterator[int]:
    """torchvision's ImageFolder and DataLoader with the transforms of its examples (PIL)."""
    import torch
    from torchvision import datasets, transforms

    transform = transforms.Compose([
        transforms.RandomResizedCrop(224, SCALE, RATIO, interpolation=transforms.InterpolationMode.BICUBIC),
        transforms.RandomHorizontalFlip(), transforms.ToTensor(),
        transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))])
    loader = torch.utils.data.DataLoader(datasets.ImageFolder(str(photos), transform), BATCH, shuffle=True,
                                         num_workers=WORKERS, persistent_workers=True, drop_last=True)
    while True:
        for pixels, _ in loader:
            yield len(pixels)


def image_folder_uint8(shards: Path, photos: Path) -> Iterator[int]:
    """ImageFolder and DataLoader with torchvision's v2 transforms on decoded tensors, uint8 all the way."""
    import torch
    from torchvision import datasets
    from torchvision.io import ImageReadMode, decode_image
    from torchvision.transforms import InterpolationMode, v2

    transform = v2.Compose([v2.RandomResizedCrop(224, SCALE, RATIO, interpolation=InterpolationMode.BICUBIC, antialias=True),
                            v2.RandomHorizontalFlip()])
    data = datasets.ImageFolder(str(photos), transform, loader=lambda path: decode_image(path, mode=ImageReadMode.RGB))
    loader = torch.utils.data.DataLoader(data, BATCH, shuffle=True, num_workers=WORKERS, persistent_workers=True,
                                         drop_last=True)
    while True:
        for pixels, _ in loader:
            yield len(pixels)


LOADERS = {"ours": ours, "bare loop": bare, "timm wds": timm_wds, "ImageFolder": image_folder,
           "ImageFolder v2 uint8": image_folder_uint8,
           "ours, one process": lambda shards, photos: ours(shards, photos, workers=0)}


def measure(name: str, shards: Path, photos: Path, warm: int, count: int) -> dict[str, float]:
    """CPU milliseconds and wall seconds of `count` pictures after `warm` ones."""
    import torch

    torch.set_num_threads(1)
    stream, seen = LOADERS[name](shards, photos), 0
    while seen < warm:
        seen += next(stream)
    cpu, wall, seen = tree_cpu_seconds(), time.perf_counter(), 0
    while seen < count:
        seen += next(stream)
    return {"cpu_ms": (tree_cpu_seconds() - cpu) * 1e3 / seen, "img_per_s": seen / (time.perf_counter() - wall)}


def main(cache: Path, pairs: int, count: int = 1920) -> None:
    """All loaders, `pairs` times in turns."""
    from photos import photo_set, photo_shards

    photos = photo_set(cache, 3000)
    shards = photo_shards(cache, photos)
    raw: dict[str, list[float]] = {name: [] for name in LOADERS}
    wall: dict[str, list[float]] = {name: [] for name in LOADERS}
    for turn in range(pairs):
        for name in [*LOADERS] if turn % 2 == 0 else [*LOADERS][::-1]:
            found = run_apart(__file__, name, str(shards), str(photos), str(count // 3), str(count))
            raw[name].append(found["cpu_ms"])
            wall[name].append(found["img_per_s"])
    files = [path.stat().st_size for path in photos.rglob("*.jpg")]
    record = {"benchmark": "images", **machine(["torch", "torchvision", "timm", "webdataset", "pillow"]), "pairs": pairs,
              "pictures": len(files), "bytes_per_picture": sum(files) / len(files), "batch": BATCH, "workers": WORKERS,
              "measured": count, "cpu_ms_per_image": raw, "images_per_s_wall": wall,
              "against": {name: ratio(raw["ours"], raw[name]) for name in LOADERS if name != "ours"}}
    print(f"{'JPEG -> uint8 224':30s} {'CPU ms/image':>12s} {'images/s/core':>14s} {'ours is x':>10s} {'(range)':>13s}")
    for name in LOADERS:
        middle = sorted(raw[name])[len(raw[name]) // 2]
        versus = ratio(raw["ours"], raw[name])
        print(f"{name:30s} {middle:12.3f} {1e3 / middle:14.0f} {versus['median']:10.2f} "
              f"({versus['min']:.2f}-{versus['max']:.2f})")
    kept = record["against"]["bare loop"]["median"]
    print(f"against the bare loop: {kept:.3f} of its speed (at least 0.85: {'kept' if kept >= 0.85 else 'MISSED'})")
    write_result("images", record)


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5]))))
