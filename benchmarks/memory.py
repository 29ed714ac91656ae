"""Does the memory of loader workers grow? Many samples through the training loader, watched from outside.

    python benchmarks/memory.py [--quick] [--samples 200000] [--only WORD] [--out FILE.json]

Four cases, two workers each: `pictures`, tiny JPEGs through the whole loader (index, order, read, decode, augment, collate,
shared memory), so that any leak per sample shows; `large`, pictures of 1 to 6 megapixels, so that an allocator that keeps
what it was given shows; `arrays`, of 3 to 25 MB as a video decoder gives them, batches of 19 MB; `clips`, H.264 files of
several sizes through the whole loader, two clips of each, so that a decoder that is not given back shows. Resident (RSS) and
private (USS) bytes of each worker and of the parent are read after every batch, or 500 times; of ten readings the smallest
counts, since the others catch a picture or batch in passing. The growth is Theil and Sen's slope over the
points after the first fifth, times their span, in percent of the median: under 2 % is asked for.
"""

import argparse
import io
import json
import os
import platform
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from common import commit
from PIL import Image

from data_pipelines.loader import TrainLoader
from data_pipelines.settings import DataSettings
from data_pipelines.workers import stream
from tubelet.dist import World

HERE = Path(__file__).parent
WORKERS, POINTS, LIMIT = 2, 50, 2.0


def write_shards(folder: Path, shards: int, per_shard: int, sizes: list[tuple[int, int]]) -> None:
    """Shards of a few different JPEGs over and over."""
    rng = np.random.RandomState(0)
    pictures = []
    for width, height in sizes:
        coarse = Image.fromarray(rng.randint(0, 256, (12, 16, 3), dtype=np.uint8)).resize((width, height))
        buffer = io.BytesIO()
        coarse.save(buffer, "JPEG", quality=90)
        pictures.append(buffer.getvalue())
    folder.mkdir()
    number = 0
    for shard in range(shards):
        with tarfile.open(folder / f"{shard:04d}.tar", "w") as tar:
            for _ in range(per_shard):
                for suffix, data in (("cls", b"%d" % (number % 10)), ("jpg", pictures[number % len(pictures)])):
                    member = tarfile.TarInfo(f"{number:07d}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
                number += 1


def bytes_of(pid: int) -> tuple[int, int]:
    """(resident, private) bytes of a process."""
    found = {}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        name, value, *_ = line.split()
        found[name] = int(value) * 1024
    return found["Rss:"], found["Private_Clean:"] + found["Private_Dirty:"]


def loader_pids() -> list[int]:
    listed = subprocess.run(["ps", "--ppid", str(os.getpid()), "-o", "pid=,comm="], capture_output=True, text=True).stdout
    return sorted(int(line.split()[0]) for line in listed.splitlines() if "pt_data_worker" in line)


def growth(samples: list[int], values: list[int]) -> float:
    """Percent of the median that Theil and Sen's line rises over the samples after the first fifth."""
    x, y = (np.array(what[len(what) // 5:], dtype=np.float64) for what in (samples, values))
    i, j = np.triu_indices(len(x), 1)
    return float(np.median((y[j] - y[i]) / (x[j] - x[i])) * (x[-1] - x[0]) / np.median(y) * 100)


def write_videos(folder: Path) -> None:
    """A shard of 24 videos of 48 frames, of several sizes."""
    from data_pipelines.made_up import encode_mp4, moving

    folder.mkdir()
    with tarfile.open(folder / "0000.tar", "w") as tar:
        for number in range(24):
            film = encode_mp4(moving(0, number, number % 3, 3, (64, 96, 128, 160)[number % 4], 48), fps=24, gop=16)
            for suffix, data in (("cls", b"1"), ("mp4", film)):
                member = tarfile.TarInfo(f"{number:07d}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def from_loader(folder: Path, img_size: int, micro_batch: int, **options):
    settings = DataSettings.model_validate({"train": [str(folder)], "workers": WORKERS,
                                            "index_dir": str(folder.parent / "index"), **options})
    loader = TrainLoader(settings, seed=0, img_size=img_size, num_classes=10, global_batch_size=micro_batch,
                         micro_batch_size=micro_batch, world=World())
    return loader.batches(0), loader.close


def make_clip(task: int) -> torch.Tensor:
    """Frames of changing size, as decoded, and the batch made of them."""
    rng = np.random.RandomState(task)
    batch = torch.empty((8, 3, 16, 224, 224), dtype=torch.uint8)
    for slot in range(8):
        frames = np.full((int(rng.randint(16, 49)), 240, int(rng.randint(300, 700)), 3), slot, dtype=np.uint8)
        batch[slot] = torch.from_numpy(np.ascontiguousarray(frames[:16, :224, :224])).permute(3, 0, 1, 2)
    return batch


def from_arrays():
    batches = stream(make_clip, iter(range(1 << 60)), workers=WORKERS)
    return batches, batches.close  # type: ignore[attr-defined]


def watch(title: str, batches, close, size: int, samples: int) -> dict:
    every, seen, readings, pids = max(1, samples // (10 * POINTS) // size) * size, 0, [], []
    begun = time.perf_counter()
    for _ in batches:
        seen += size
        if seen % every == 0:
            pids = pids or loader_pids()
            readings.append((seen, [bytes_of(pid) for pid in (*pids, os.getpid())]))
        if seen >= samples:
            break
    seconds = time.perf_counter() - begun
    close()
    width = max(1, len(readings) // POINTS)
    points = [(part[-1][0], [tuple(map(min, zip(*who))) for who in zip(*(found for _, found in part))])
              for part in (readings[i:i + width] for i in range(0, len(readings), width))]
    at = [seen for seen, _ in points]
    processes = []
    for number, who in enumerate([*(f"worker {i}" for i in range(len(pids))), "parent"]):
        rss, private = ([found[number][kind] for _, found in points] for kind in (0, 1))
        processes.append({"process": who, "rss_growth_percent": growth(at, rss),
                          "private_growth_percent": growth(at, private), "rss_bytes": rss, "private_bytes": private})
    worst = max(p["rss_growth_percent"] for p in processes[:-1])
    for p in processes:
        print(f"{title:10s} {p['process']:9s} {seen:8d} samples  RSS {p['rss_bytes'][len(at) // 5] / 1e6:7.1f} -> "
              f"{p['rss_bytes'][-1] / 1e6:7.1f} MB, growth {p['rss_growth_percent']:6.2f} %  (private "
              f"{p['private_growth_percent']:6.2f} %)", flush=True)
    return {"case": title, "samples": seen, "seconds": seconds, "at_samples": at, "processes": processes,
            "worst_worker_growth_percent": worst, "limit_percent": LIMIT, "kept": worst < LIMIT}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tenth of the samples")
    parser.add_argument("--samples", type=int, default=200_000, help="of the case `pictures`")
    parser.add_argument("--only", default="")
    parser.add_argument("--out", default=None)
    arguments = parser.parse_args()
    samples = arguments.samples // 10 if arguments.quick else arguments.samples
    torch.set_num_threads(1)
    load, results = list(os.getloadavg()), []
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        cases = [("pictures", samples, 64, [(40, 32), (48, 36), (32, 32), (36, 44)], (20, 1000), 16),
                 ("large", samples // 100, 8, [(1200, 900), (1600, 1200), (2800, 2100), (1920, 1080)], (4, 10), 224)]
        for title, count, micro_batch, sizes, shards, img_size in cases:
            if arguments.only in title:
                write_shards(root / title, *shards, sizes)
                results.append(watch(title, *from_loader(root / title, img_size, micro_batch), micro_batch, count))
        if arguments.only in "arrays":
            results.append(watch("arrays", *from_arrays(), 8, samples // 25))
        if arguments.only in "clips":
            write_videos(root / "clips")
            clips = from_loader(root / "clips", 64, 8, clip={"frames": 8, "stride": 2}, repeats=2)
            results.append(watch("clips", *clips, 8, samples // 25))
    record = {"benchmark": "memory", "quick": arguments.quick, "commit": commit(), "machine": platform.processor(),
              "cores": os.cpu_count(), "workers": WORKERS, "loadavg_before": load, "loadavg_after": list(os.getloadavg()),
              "torch": torch.__version__, "python": platform.python_version(), "glibc": platform.libc_ver()[1],
              "malloc_environment": {k: v for k, v in os.environ.items() if k.startswith("MALLOC_")}, "results": results}
    path = Path(arguments.out or HERE / "results" / ("memory-quick.json" if arguments.quick else "memory.json"))
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    kept = all(row["kept"] for row in results)
    print(f"{path} written; growth under {LIMIT:g} %: {'kept' if kept else 'MISSED'}")
    sys.exit(0 if kept else 1)


if __name__ == "__main__":
    main()
