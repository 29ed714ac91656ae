"""The order of 10^9 samples in 10^5 unequal shards, as one of 4,096 ranks sees it: memory, look-ups, batches, and proof.

    python benchmarks/order.py [--quick]

Asked for: under 100 MB of memory a rank, a random look-up under 1 ms, a running batch of G = 4,096 under 20 ms. Times are
CPU milliseconds of this process, medians. Proof: 24 whole lanes hold exactly the samples of their piece of the epoch,
each once, compared with plain arithmetic on the shards' counts; the parts of the ranks of a batch are disjoint and make up
the batch, whatever the number of ranks. Raw numbers go to benchmarks/results/order.json (order-quick.json).
"""

import argparse
import json
import os
import platform
import statistics
import time
import tracemalloc
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from common import commit

from data_pipelines.order import Order, OrderSource

HERE = Path(__file__).parent
SAMPLES, SHARDS, G, RANKS = 10**9, 10**5, 4096, 4096


def unequal_counts() -> np.ndarray:
    """int64 [SHARDS], from 0 to about 30,000, that sum to SAMPLES."""
    rng = np.random.Generator(np.random.PCG64(0))
    counts = np.floor(rng.dirichlet(np.full(SHARDS, 2.0)) * SAMPLES).astype(np.int64)
    counts[rng.integers(SHARDS, size=100)] = 0
    counts[np.argmax(counts)] += SAMPLES - counts.sum()
    return counts


def rss() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def place_ms(order: Order, x: np.ndarray) -> float:
    begin = time.process_time_ns()
    order.place(x)
    return (time.process_time_ns() - begin) / 1e6


def memory_of_a_rank(counts: np.ndarray) -> dict:
    """Bytes that an order takes after 64 batches of one rank, and in the worst case of a process that asks for them all."""
    found = {}
    for who, share in (("rank", G // RANKS), ("whole batches", G)):
        tracemalloc.start()
        before = rss()
        order = Order([OrderSource("main", counts)], seed=1, global_batch_size=G)
        for step in range(64):
            order.place(np.arange(step * G, step * G + share, dtype=np.int64))
        kept, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        found[who] = {"kept_bytes": kept, "peak_bytes": peak, "rss_difference_bytes": rss() - before}
    return found


def lanes_hold_their_piece_once(order: Order, counts: np.ndarray, lanes: list[int], epoch: int) -> int:
    """Samples compared. Every sample of the chosen lanes of an epoch, against the row that they must cut out."""
    row = order._inner[0]
    shards, ends = row.row(epoch)  # the permutation of the shards alone is taken from it
    assert np.array_equal(np.sort(shards), np.arange(SHARDS)) and np.array_equal(ends, np.cumsum(counts[shards]))
    short, longer, compared = SAMPLES // row.lanes, SAMPLES % row.lanes, 0
    for lane in lanes:
        length, start = short + (lane < longer), lane * short + min(lane, longer)
        places = order.place(epoch * SAMPLES + lane + row.lanes * np.arange(length, dtype=np.int64))
        assert (places.epoch == epoch).all()
        position = np.empty(SHARDS, dtype=np.int64)
        position[shards] = np.arange(SHARDS)
        q = (ends[position[places.shard]] - counts[places.shard]) + places.index
        assert (places.index >= 0).all() and (places.index < counts[places.shard]).all()
        assert np.array_equal(np.sort(q), np.arange(start, start + length)), f"lane {lane}"
        compared += length
    return compared


def ranks_make_up_the_batch(order: Order, seen: int) -> None:
    whole = order.place(np.arange(seen, seen + G, dtype=np.int64))
    for ranks in (2, 64, RANKS):
        share = G // ranks
        fresh = Order([OrderSource("main", order._inner[0].counts)], seed=1, global_batch_size=G)
        parts = [fresh.place(np.arange(seen + r * share, seen + (r + 1) * share, dtype=np.int64)) for r in range(ranks)]
        for field in ("x", "source", "epoch", "shard", "index"):
            assert np.array_equal(np.concatenate([getattr(part, field) for part in parts]), getattr(whole, field))
    pairs = np.stack([whole.shard, whole.index])
    assert np.unique(pairs, axis=1).shape[1] == G or len(np.unique(whole.epoch)) > 1  # within an epoch none comes twice


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer repeats and 4 lanes")
    quick = parser.parse_args().quick
    runs, num_lanes = (5, 4) if quick else (41, 24)
    load, counts = list(os.getloadavg()), unequal_counts()
    memory = memory_of_a_rank(counts)
    order = Order([OrderSource("main", counts)], seed=1, global_batch_size=G)
    rng = np.random.Generator(np.random.PCG64(1))
    order.place(np.arange(G, dtype=np.int64))
    lookup = [place_ms(order, rng.integers(0, SAMPLES, 1)) for _ in range(runs * 25)]
    seen = 123 * G
    order.place(np.arange(seen, seen + G, dtype=np.int64))
    running = []
    for _ in range(runs):
        seen += G
        running.append(place_ms(order, np.arange(seen, seen + G, dtype=np.int64)))
    resumed, resumed_rank = [], []
    for part in range(max(5, runs // 4)):
        at = (SAMPLES * (part + 1) // 12) // G * G
        for share, times in ((G, resumed), (G // 64, resumed_rank)):
            fresh = Order([OrderSource("main", counts)], seed=1, global_batch_size=G)
            times.append(place_ms(fresh, np.arange(at, at + share, dtype=np.int64)))
    lanes = sorted({0, 1, SAMPLES % G - 1, SAMPLES % G, G - 1} | {int(lane) for lane in rng.choice(G, 19, replace=False)})
    lanes = lanes[:num_lanes]
    compared = lanes_hold_their_piece_once(order, counts, lanes, epoch=2)
    for at in (0, 5 * G, SAMPLES // G * G, 3 * SAMPLES // G * G):  # the last two: batches over the seam of an epoch
        ranks_make_up_the_batch(order, at)
    rows = [("memory of a rank, kept (MB)", memory["rank"]["kept_bytes"] / 1e6, 100),
            ("memory of a rank, resident (MB)", memory["rank"]["rss_difference_bytes"] / 1e6, 100),
            ("memory, all 4,096 of each batch (MB)", memory["whole batches"]["peak_bytes"] / 1e6, 100),
            ("random look-up (ms)", statistics.median(lookup), 1),
            ("running batch of 4,096 (ms)", statistics.median(running), 20),
            ("first batch of 4,096 after a resume (ms)", statistics.median(resumed), None),
            ("first 64 of a rank after a resume (ms)", statistics.median(resumed_rank), None)]
    for title, value, limit in rows:
        verdict = "" if limit is None else f"  (under {limit}: {'kept' if value < limit else 'MISSED'})"
        print(f"{title:42s} {value:9.3f}{verdict}")
    print(f"{len(lanes)} whole lanes, {compared} samples: each once; ranks 2, 64 and 4,096: disjoint and complete")
    record = {"benchmark": "order", "quick": quick, "commit": commit(), "cpu": platform.processor(),
              "cores": os.cpu_count(), "numpy": np.__version__, "python": platform.python_version(),
              "loadavg_before": load, "loadavg_after": list(os.getloadavg()), "samples": SAMPLES, "shards": SHARDS,
              "global_batch": G, "ranks": RANKS, "metric": "CPU milliseconds of the process", "memory": memory,
              "random_lookup_ms": lookup, "running_batch_ms": running, "first_batch_after_resume_ms": resumed,
              "first_64_of_a_rank_after_resume_ms": resumed_rank, "lanes_proven": lanes, "samples_compared": compared,
              "rows": [{"what": title, "value": value, "limit": limit} for title, value, limit in rows]}
    path = HERE / "results" / ("order-quick.json" if quick else "order.json")
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"{path.relative_to(HERE.parent)} written")


if __name__ == "__main__":
    main()
