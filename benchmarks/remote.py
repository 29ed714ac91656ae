"""Remote reading, counted at a real HTTP server (nginx on loopback): bytes per epoch of simulated nodes.

    python benchmarks/remote.py [--samples 6000] [--out benchmarks/results/remote.json]

Nodes, each with a fetcher and a disk of its own, read one epoch of a laned source by windows; the server's access log says
how many bytes of shards left it (target for two nodes: within 1 % of the data set's size) and in how many requests. Beside
it: the part of the data set that a node's disk held at most, and the median milliseconds that the reading of a batch took
once the fetcher had caught up. Then the same without a cache, as a plain permutation that keeps whole shards (every node
needs all of them), and through a server that is slow to answer (a proxy adds 20 ms to each request).

What is fetched ahead when the reading stops belongs to the next epoch: the run stops where the look-ahead meets the end.
Times are of this machine and its loopback; the bytes and requests are exact.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from little_shards import write_tar
from servers import nginx, proxy

from data_pipelines.ahead import start_ahead
from data_pipelines.cache import open_cache
from data_pipelines.index import open_source, stamps_of, storage_of
from data_pipelines.indexing import build_index
from data_pipelines.order import Order, OrderSource
from data_pipelines.reader import Reader
from data_pipelines.samples import Source
from data_pipelines.settings import CacheSettings, DataSettings, SourceSettings
from tubelet.dist import World
from tubelet.files import write_json

G, LANES, WINDOW, SHARD, BYTES, AHEAD = 64, 256, 16, 500, 20_000, 8


def write_data(folder: Path, samples: int) -> None:
    rng = np.random.RandomState(0)
    for shard in range(samples // SHARD):
        members = []
        for number in range(SHARD):
            members += [(f"s{shard:03d}{number:05d}.cls", b"3"),
                        (f"s{shard:03d}{number:05d}.jpg", rng.bytes(int(rng.randint(BYTES // 2, BYTES * 3 // 2))))]
        write_tar(folder / f"shard-{shard:04d}.tar", members)
    build_index(str(folder))


def order_of(source: Source, laned: bool) -> Order:
    size = len(source.index)
    inner = {"share": LANES, "lanes": LANES, "window": WINDOW} if laned else {"share": LANES, "lanes": 1, "window": size}
    return Order([OrderSource("main", source.index.counts)], seed=0, global_batch_size=G,
                 resolved={"lanes": LANES, "sources": {"main": inner}})


def read_node(url: str, shards: int, folder: Path, node: int, nodes: int, *, laned: bool, cached: bool) -> dict[str, float]:
    """One node reads its part of an epoch."""
    settings = SourceSettings(name="main", shards=f"{url}/shard-{{0000..{shards - 1:04d}}}.tar")
    source = Source(settings, open_source(settings, index_dir=str(folder / "index")))
    order = order_of(source, laned)
    data = DataSettings(train=[settings], cache=CacheSettings(folder=str(folder) if cached else None, ahead=AHEAD))
    ahead = start_ahead(order, [source], data, World(node, nodes, 0, 1), 0, global_batch_size=G)
    cache = open_cache(data.cache, stamps_of([source.index]))
    reader = Reader(60.0, storage=storage_of([source.index]), cache=cache)
    waits, held, end = [], 0, order.size // G * G - AHEAD * G
    if ahead is not None:
        ahead.wait(60)
    for seen in range(0, end, G):
        started = time.perf_counter()
        x = np.arange(seen + node * G // nodes, seen + (node + 1) * G // nodes)
        places = order.place(x)
        refs = [source.index.sample(shard, index) for shard, index in zip(places.shard.tolist(), places.index.tolist())]
        reader.read_many([(ref.url, *place) for ref in refs for place in ref.members.values()])
        waits.append((time.perf_counter() - started) * 1e3)
        if ahead is not None and cache is not None:
            ahead.consumed(seen + G)
            ahead.wait(60)  # a step of training would take longer than this
            held = max(held, sum(path.stat().st_size for path in cache.folder.glob("*/*") if path.exists()))
    if ahead is not None:
        ahead.close()
    reader.close()
    return {"batch_ms": statistics.median(waits), "held_bytes": held, "batches": len(waits)}


def measure(web, url: str, shards: int, root: Path, name: str, nodes: int, *, laned: bool, cached: bool) -> dict:
    log, size = len(web.log()), sum(path.stat().st_size for path in Path(web.folder).glob("*.tar"))
    rows = [read_node(url, shards, root / name / str(node), node, nodes, laned=laned, cached=cached)
            for node in range(nodes)]
    asked = [row for row in web.log()[log:] if row[1].endswith(".tar") and row[4] != "bytes=0-0"]
    fetched = sum(row[3] for row in asked)
    found = {"run": name, "nodes": nodes, "bytes_fetched": fetched, "data_set_bytes": size,
             "ratio": round(fetched / size, 4), "requests": len(asked),
             "batch_ms": round(statistics.median(row["batch_ms"] for row in rows), 2),
             "most_held": round(max(row["held_bytes"] for row in rows) / size, 3)}
    print(json.dumps(found), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=6000)
    parser.add_argument("--out", default="benchmarks/results/remote.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        root, shards = Path(temporary), options.samples // SHARD
        write_data(root / "data", options.samples)
        with nginx(root / "data", root / "nginx") as web, proxy(web.port) as (slow, faults):
            faults.first_byte_seconds = 0.02
            rows = [measure(web, url, shards, root, name, nodes, laned=laned, cached=cached)
                    for name, url, nodes, laned, cached in (
                        ("windows, 2 nodes", web.url, 2, True, True), ("windows, 4 nodes", web.url, 4, True, True),
                        ("no cache, 2 nodes", web.url, 2, True, False), ("shards, 2 nodes", web.url, 2, False, True),
                        ("windows, 20 ms server", slow, 1, True, True), ("no cache, 20 ms server", slow, 1, True, False))]
    write_json(options.out, {"samples": options.samples, "global_batch": G, "lanes": LANES, "window": WINDOW,
                             "cores": os.cpu_count(), "rows": rows})


if __name__ == "__main__":
    main()
