"""How well is it shuffled? Our order, full random order and webdataset's shard shuffle with a buffer, on written shards.

    python benchmarks/shuffle.py [--quick] [--samples N]

Made-up fractals of 16 pixels, 100 classes, are written twice: sorted by class (as a folder of class folders would be packed
in order) and permuted while packing (as `tubelet data write` does). Labels are read back through the index. For each the
class entropy of batches, micro-batches and 20 batches in a row is measured, and how many samples of a batch share a shard. A
third part has the size of ImageNet-21k (14 M samples, 21 841 classes in 2 800 sorted shards), where the order is windowed;
it exists as counts only. Results go to benchmarks/results/shuffle.json and .png (shuffle-quick.* with --quick).
"""

import argparse
import json
import os
import platform
import subprocess
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

from data_pipelines.index import open_source
from data_pipelines.indexing import write_index
from data_pipelines.made_up import encode_png, fractal
from data_pipelines.order import Order, OrderSource, permutation
from data_pipelines.quality import (
    BATCHES,
    Quality,
    QualityReport,
    draw,
    judge,
    measure_source,
    our_batches,
    random_batches,
    webdataset_batches,
)
from data_pipelines.samples import Source
from data_pipelines.settings import SourceSettings

HERE = Path(__file__).parent
CLASSES, PER_SHARD = 100, 500


def write(folder: Path, labels: np.ndarray, numbers: np.ndarray) -> Source:
    """Shards of PER_SHARD samples in the order of `numbers`. Pictures of one class are copies of ten: only labels matter."""
    from webdataset.writer import TarWriter

    folder.mkdir(parents=True)
    pictures = {(k, i): encode_png(fractal(0, 10 * k + i, k, 16)) for k in range(CLASSES) for i in range(10)}
    urls = []
    for start in range(0, len(numbers), PER_SHARD):
        urls.append(str(folder / f"s-{start // PER_SHARD:05d}.tar"))
        with open(urls[-1], "wb") as file, TarWriter(file, encoder=False, mtime=0, compress=False) as tar:
            for number in numbers[start:start + PER_SHARD].tolist():
                label = int(labels[number])
                tar.write({"__key__": f"{number:08d}", "png": pictures[label, number % 10], "cls": b"%d" % label})
    write_index(folder, urls, beside_shards=True)
    settings = SourceSettings(shards=str(folder))
    return Source(settings, open_source(settings))


def written(title: str, source: Source, batch: int, micro: int) -> QualityReport:
    order = Order([OrderSource("main", source.index.counts)], seed=0, global_batch_size=batch)
    return measure_source(source, order, global_batch_size=batch, micro_batch_size=micro, streams=(8, 64),
                          buffers=(1000, 10_000), title=title)


def full_size(batch: int, micro: int, buffers: tuple[int, ...]) -> QualityReport:
    counts, per_class = np.full(2800, 5000), 641
    order = Order([OrderSource("main", counts)], seed=0, global_batch_size=batch)

    def judged(name: str, shard: np.ndarray, index: np.ndarray) -> Quality:
        return judge(name, (shard * 5000 + index) // per_class, shard, micro)

    found = [judged("full random", *random_batches(counts, batch, BATCHES, 0)),
             judged("tubelet", *our_batches(order, batch, BATCHES)[1:])]
    for streams in (8, 64):
        for buffer in buffers:
            found.append(judged(f"webdataset, {streams} streams, buffer {buffer}",
                                *webdataset_batches(counts, batch, BATCHES, streams=streams, buffer=buffer, seed=0)))
    return QualityReport("14 M samples, 21 841 sorted classes", batch, micro, BATCHES, found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--samples", type=int, default=0)
    options = parser.parse_args()
    samples = options.samples or (20_000 if options.quick else 100_000)
    batch, micro = (512, 64) if options.quick else (1024, 64)
    begun = time.time()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TUBELET_CACHE"] = f"{folder}/cache"
        labels = np.sort(np.arange(samples) % CLASSES)
        sets = {"sorted": np.arange(samples), "permuted": permutation(samples, 0, 4, 0, (0, 0, 0))}
        reports = [written(f"{samples} samples, {name}", write(Path(folder) / name, labels, numbers), batch, micro)
                   for name, numbers in sets.items()]
    reports.append(full_size(4096, 64, (1000,) if options.quick else (1000, 10_000)))
    for report in reports:
        print(f"\n### {report.title}, batches of {report.global_batch_size} in micro batches of {report.micro_batch_size}\n")
        print("| " + " | ".join(report.columns) + " |\n" + "|---" * len(report.columns) + "|")
        for row in report.rows():
            print("| " + " | ".join(row) + " |")
    name = "shuffle-quick" if options.quick else "shuffle"
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=HERE).stdout.strip()
    (HERE / "results").mkdir(exist_ok=True)
    (HERE / f"results/{name}.json").write_text(json.dumps(
        {"commit": commit, "python": platform.python_version(), "numpy": np.__version__,
         "seconds": round(time.time() - begun), "reports": [report.as_json() for report in reports]}, indent=1) + "\n")
    draw(reports, str(HERE / f"results/{name}.png"))


if __name__ == "__main__":
    main()
