"""Time to the first batch after resuming at 0 %, 50 % and 99 % of an epoch of 1,000,000 samples, through the real loader.

    python benchmarks/resume.py [--quick] [--samples 1000000] [--runs 7]

The shards hold a few tiny JPEGs over and over (100 shards of 10,000 samples by hard links: an index of their own each, the
bytes once), so that the position is what differs. Each run opens the loader (start-up: indexes, order) and takes the first
batch of a rank, 64 pictures of 224 by two workers; the positions take turns. Asked for: flat within 20 % (medians of the CPU
milliseconds of this process and its workers, which other programs on the machine disturb least), and under 1 s beyond
start-up (the quickest run by the clock). Raw numbers go to benchmarks/results/resume.json (resume-quick.json).
"""

import argparse
import io
import json
import os
import platform
import statistics
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

from data_pipelines.indexing import build_index
from data_pipelines.loader import TrainLoader
from data_pipelines.settings import DataSettings
from tubelet.dist import World

HERE = Path(__file__).parent
SHARDS, MICRO_BATCH, G = 100, 64, 1024
POSITIONS = {"0 %": 0.0, "50 %": 0.5, "99 %": 0.99}


def write_set(folder: Path, samples: int) -> None:
    """One shard of tiny pictures and links to it, indexed."""
    folder.mkdir()
    rng, pictures = np.random.RandomState(0), []
    for _ in range(8):
        buffer = io.BytesIO()
        Image.fromarray(rng.randint(0, 256, (6, 8, 3), dtype=np.uint8)).resize((64, 48)).save(buffer, "JPEG", quality=90)
        pictures.append(buffer.getvalue())
    first = folder / "0000.tar"
    with tarfile.open(first, "w") as tar:
        for number in range(samples // SHARDS):
            for suffix, data in (("cls", b"%d" % (number % 10)), ("jpg", pictures[number % 8])):
                member = tarfile.TarInfo(f"{number:06d}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    build_index(str(folder))
    index = json.loads((folder / "index.json").read_text())
    for shard in range(1, SHARDS):
        os.link(first, folder / f"{shard:04d}.tar")
        os.link(folder / "0000.tar.idx", folder / f"{shard:04d}.tar.idx")
        index["shards"].append({**index["shards"][0], "name": f"{shard:04d}.tar"})
    index["num_samples"] *= SHARDS
    index["bytes"] *= SHARDS
    (folder / "index.json").write_text(json.dumps(index))


def cpu() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def one_run(folder: Path, share: float, samples: int) -> dict:
    seen = int(samples * share) // G * G
    begun, spent = time.perf_counter(), cpu()
    settings = DataSettings(train=[str(folder)], workers=2)  # type: ignore[arg-type]
    loader = TrainLoader(settings, seed=0, img_size=224, num_classes=10, global_batch_size=G, micro_batch_size=MICRO_BATCH,
                         world=World(3, 8, 3, 8))
    opened = time.perf_counter()
    batch = next(loader.batches(seen))
    first = time.perf_counter()
    assert int(batch["ids"][0]) == seen + 3 * G // 8 and len(batch["ids"]) == MICRO_BATCH and not batch["bad"]
    loader.close()
    return {"start_up_ms": (opened - begun) * 1e3, "first_batch_ms": (first - opened) * 1e3, "cpu_ms": (cpu() - spent) * 1e3}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="50,000 samples, 3 runs: a look, not a result")
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--runs", type=int, default=9)
    arguments = parser.parse_args()
    samples, runs = (50_000, 3) if arguments.quick else (arguments.samples, arguments.runs)
    torch.set_num_threads(1)
    load, raw = list(os.getloadavg()), {name: [] for name in POSITIONS}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "set"
        write_set(folder, samples)
        one_run(folder, 0.3, samples)  # imports and the page cache
        for run in range(runs):
            names = list(POSITIONS) if run % 2 == 0 else list(POSITIONS)[::-1]
            for name in names:
                raw[name].append(one_run(folder, POSITIONS[name], samples))
    medians = {name: {what: statistics.median(run[what] for run in found) for what in found[0]}
               for name, found in raw.items()}
    quickest = {name: min(run["first_batch_ms"] for run in found) for name, found in raw.items()}
    print(f"{'position':10s} {'start-up ms':>12s} {'first batch ms':>15s} {'(quickest)':>11s} {'CPU ms':>8s}")
    for name, row in medians.items():
        print(f"{name:10s} {row['start_up_ms']:12.0f} {row['first_batch_ms']:15.0f} {quickest[name]:11.0f} "
              f"{row['cpu_ms']:8.0f}")
    spent = [row["cpu_ms"] for row in medians.values()]
    spread, under = max(spent) / min(spent) - 1, max(quickest.values()) < 1000
    print(f"spread of CPU time {spread:.1%} (within 20 %: {'kept' if spread <= 0.2 else 'MISSED'}); under 1 s: "
          f"{'kept' if under else 'MISSED'}")
    record = {"benchmark": "resume", "quick": arguments.quick, "commit": commit(), "cpu": platform.processor(),
              "cores": os.cpu_count(), "loadavg_before": load, "loadavg_after": list(os.getloadavg()),
              "torch": torch.__version__, "python": platform.python_version(), "samples": samples, "shards": SHARDS,
              "global_batch": G, "micro_batch": MICRO_BATCH, "workers": 2, "raw": raw, "medians": medians,
              "quickest_first_batch_ms": quickest, "cpu_spread": spread}
    path = HERE / "results" / ("resume-quick.json" if arguments.quick else "resume.json")
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"{path.relative_to(HERE.parent)} written; load {load[0]:.1f} -> {os.getloadavg()[0]:.1f}")
    sys.exit(0 if spread <= 0.2 and under else 1)


if __name__ == "__main__":
    main()
