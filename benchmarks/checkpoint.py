"""Saving against what a disk and a memory copy cost.

    python benchmarks/checkpoint.py [--quick] [--pairs N] [--only zero-2] [--dir FOLDER_ON_THE_DISK]

The state is that of a ViT under AdamW with a moving average, about 300 MB a rank, in ZeRO stage 1 on one and on two ranks
and in the plain engine (hundreds of small tensors instead of a few large ones) on one. Pairs side by side, ABBA, one disk:

1. a synchronous save, from the call to the published manifest, against writing the same bytes with fsync and nothing else
   (no hash, no manifest, no agreement of ranks). Wanted: at least 0.8 times its speed.
2. an asynchronous save, from the call to its return, against copying the same tensors into the same staging buffers.
   Wanted: at most 1.25 times as long.
3. steps of training while the writer works, against steps without; reported, not judged.

A time is that of the slowest rank. Where other programs use the machine, look at the CPU time of the calling thread beside
it (2.); writing has no such measure, for hash and disk work beside each other. Every pair's checkpoint is verified; the
first synchronous and asynchronous ones, of one state, must be equal file by file, and what is restored from the last must be
the state to the bit.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import machine, ratio, write_result

from tubelet import dist
from tubelet.dist import World
from tubelet.engine import checkpoint
from tubelet.engine.build import build_engine
from tubelet.engine.checkpoint.save import Saver
from tubelet.engine.ema import ShardedEma
from tubelet.engine.settings import CheckpointSettings, EngineSettings

CASES = [("zero", 1), ("zero", 2), ("plain", 1)]  # engine, ranks
SPEED, COPY = 0.8, 1.25  # what is wanted
CHUNK = 1 << 23
MICRO_BATCH = 4


class State:
    """An engine that has taken a step, its average, and how to take another."""

    def __init__(self, kind: str, world: World, device: torch.device, quick: bool):
        from timm.models.vision_transformer import VisionTransformer

        depth = (2 if quick else 10) * world.size
        module = VisionTransformer(img_size=32, patch_size=16, embed_dim=384, num_heads=6, depth=depth, num_classes=1000)
        settings = EngineSettings.model_validate({
            "global_batch_size": MICRO_BATCH * world.size, "engine": kind, "optimizer": {"name": "adamw", "lr": 1e-3},
            "precision": "fp32"})
        self.world = world
        self.engine = build_engine(module, settings, world=world, device=device, micro_batch_size=MICRO_BATCH)
        self.ema = ShardedEma(self.engine, 0.99)
        self.pixels = torch.randn(MICRO_BATCH, 3, 32, 32)
        self.step()

    def step(self) -> None:
        self.engine.backward(self.engine.model(self.pixels).float().square().mean())  # type: ignore[attr-defined]
        self.engine.step(1e-3)
        self.ema.update()

    def bits(self) -> bytes:
        """A hash of the masters, moments and average of this rank."""
        import hashlib

        digest = hashlib.sha256()
        for number, flat in enumerate(self.engine.flats()):
            moments = self.engine.optimizer.state[flat.key]
            for value in (flat.master, moments["exp_avg"], moments["exp_avg_sq"], self.ema.tensors()[number]):
                for slot in flat.slots:
                    digest.update(value.detach().reshape(-1)[slot.offset : slot.offset + slot.length].numpy().data)
        return digest.digest()


def timed_both(action: Callable[[], Any]) -> tuple[float, float]:
    """(seconds, CPU seconds of the calling thread) of the slowest rank; all begin together."""
    dist.barrier()
    begun, spent = time.perf_counter(), time.thread_time()
    action()
    seconds, cpu = dist.maxima([time.perf_counter() - begun, time.thread_time() - spent])
    return seconds, cpu


def timed(action: Callable[[], Any]) -> float:
    return timed_both(action)[0]


def settle() -> None:
    """What earlier measurements left to the disk is written."""
    dist.barrier()
    os.sync()
    time.sleep(0.1)


class Bench:
    def __init__(self, state: State, root: Path):
        self.state, self.root, self.number = state, root, 0
        self.slow = Saver(root / "runs", state.engine, CheckpointSettings(asynchronous=False))
        self.quick = Saver(root / "runs", state.engine, CheckpointSettings(asynchronous=True))

    def start(self, saver: Saver) -> None:
        saver.start(self.number, self.state.ema.tensors(), {"state": {"seen": self.number}})

    def save_at_once(self) -> None:
        self.start(self.slow)

    def save_aside(self) -> None:
        self.start(self.quick)

    def clear(self) -> None:
        """The checkpoint of the last pair is verified, and goes."""
        if self.state.world.rank == 0:
            problems = checkpoint.verify(self.folder)
            assert not problems, problems
            shutil.rmtree(self.folder)
        settle()

    @property
    def folder(self) -> Path:
        return self.root / "runs" / f"step-{self.number:08d}"

    def prepare(self) -> dict[str, Any]:
        """A first save of each way, which must be the same bytes; then what the plain ways are given."""
        hashes = []
        for saver in (self.slow, self.quick):
            self.start(saver)
            saver.finish()
            hashes.append(checkpoint.read_manifest(self.folder)["files"])
            self.clear()
        assert hashes[0] == hashes[1], "both ways write the same bytes"
        saving = self.quick._begin(self.number, self.state.ema.tensors(), {})
        self.quick._describe(saving)
        staging = self.quick._staging
        assert staging is not None
        orders = staging.copy(saving.outgoing)
        whole = staging._bytes.numpy().data
        self.ranges = [(order["name"], whole[order["begin"] : order["end"]]) for order in orders]
        self.copies = []
        for order, item in zip(orders, saving.outgoing):
            for entry, place in item.places:
                begin = order["begin"] + place
                there = staging._bytes[begin : begin + entry.nbytes].view(entry.dtype)
                self.copies.append((there, entry.read().detach().reshape(-1)))
        return {"bytes_a_rank": sum(item.size for item in saving.outgoing), "tensors_a_rank": len(self.copies)}

    def write_plainly(self) -> None:
        for name, view in self.ranges:
            with open(self.root / f"plain-{self.state.world.rank}-{name}", "wb", buffering=0) as file:
                for start in range(0, len(view), CHUNK):
                    file.write(view[start : start + CHUNK])
                os.fsync(file.fileno())
        dist.barrier()

    def copy_plainly(self) -> None:
        for there, tensor in self.copies:
            there.copy_(tensor)

    def speed(self) -> tuple[float, float]:
        """(seconds of a synchronous save, of plain writing)."""
        self.number += 1
        times = {}
        for ours in ((True, False) if self.number % 2 else (False, True)):
            times[ours] = timed(self.save_at_once if ours else self.write_plainly)
            if ours:
                self.clear()
            else:
                for name, _ in self.ranges:
                    (self.root / f"plain-{self.state.world.rank}-{name}").unlink()
                settle()
        return times[True], times[False]

    def copy(self) -> tuple[float, float, float, float]:
        """(seconds of an asynchronous save until it returns, of a plain copy, CPU seconds of the one, of the other)."""
        self.number += 1
        times = {}
        for ours in ((True, False) if self.number % 2 else (False, True)):
            times[ours] = timed_both(self.save_aside if ours else self.copy_plainly)
            if ours:
                self.quick.finish()
                self.clear()
        return times[True][0], times[False][0], times[True][1], times[False][1]

    def steps(self, count: int) -> dict[str, Any]:
        """Seconds of `count` steps each, while the writer works and without; and how many it worked for."""
        self.number += 1
        times, busy, spent = {}, 0, 0.0
        for ours in ((True, False) if self.number % 2 else (False, True)):
            if ours:
                self.start(self.quick)
            times[ours] = []
            for _ in range(count):
                busy += ours and not self.quick.ready()
                times[ours].append(timed(self.state.step))
            if ours:
                spent = timed(self.quick.finish)
                self.clear()
        busy = int(dist.maxima([float(busy)])[0])
        return {"while_writing": times[True], "without": times[False], "steps_while_writing": busy, "publish_seconds": spent}


def measure(world: World, device: torch.device, kind: str, pairs: int, quick: bool, root: Path) -> dict[str, Any]:
    state = State(kind, world, device, quick)
    bench = Bench(state, root)
    row: dict[str, Any] = {"engine": kind, "ranks": world.size, **bench.prepare()}
    bench.speed(), bench.copy()  # page cache, page tables
    speeds, copies = [bench.speed() for _ in range(pairs)], [bench.copy() for _ in range(pairs)]
    blocks = [bench.steps(4 if quick else 12) for _ in range(3 if quick else 5)]
    bench.number += 1  # what is restored is the state at the call, although training went on meanwhile
    before = state.bits()
    bench.start(bench.quick)
    state.step()
    assert state.bits() != before
    folder = bench.quick.finish()
    assert folder is not None
    checkpoint.restore(folder, state.engine, state.ema.tensors())
    assert state.bits() == before, "the restored state is another"
    bench.quick.close()
    row["sync_seconds"], row["plain_write_seconds"] = map(list, zip(*speeds))
    names = ("async_call_seconds", "plain_copy_seconds", "async_call_cpu_seconds", "plain_copy_cpu_seconds")
    row |= dict(zip(names, map(list, zip(*copies))))
    row["sync_speed"] = ratio(row["sync_seconds"], row["plain_write_seconds"])
    row["async_cost"] = ratio(row["plain_copy_seconds"], row["async_call_seconds"])
    row["async_cost_cpu"] = ratio(row["plain_copy_cpu_seconds"], row["async_call_cpu_seconds"])
    row["steps"] = blocks
    slow = [statistics.median(block["while_writing"][: max(1, block["steps_while_writing"])])
            / statistics.median(block["without"]) for block in blocks]
    row["step_slow_down"] = {"median": statistics.median(slow), "min": min(slow), "max": max(slow)}
    row["publish_ms"] = statistics.median(block["publish_seconds"] for block in blocks) * 1e3
    row["kept"] = row["sync_speed"]["median"] >= SPEED and row["async_cost"]["median"] <= COPY
    return row


def _child(rank: int, size: int, port: int, words: tuple[Any, ...], results: Any) -> None:
    torch.set_num_threads(1)
    world = World(rank, size, rank, size, "127.0.0.1", port)
    row = measure(world, dist.start(world), *words)
    if rank == 0:
        results.put(row)
    dist.barrier()
    dist.stop()


def run_case(kind: str, size: int, pairs: int, quick: bool, root: Path) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    results, port = context.Queue(), dist.free_port()
    processes = [context.Process(target=_child, args=(rank, size, port, (kind, pairs, quick, root), results))
                 for rank in range(size)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise SystemExit(f"{kind} on {size} ranks failed")
    return results.get(timeout=10)


def main() -> None:
    parser = argparse.ArgumentParser(description="Saving against what a disk and a memory copy cost.")
    parser.add_argument("--quick", action="store_true", help="a fifth of the bytes, 3 pairs: a look, not a result")
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--dir", default=None, help="a folder on the disk to measure")
    parser.add_argument("--only", default="", help="e.g. zero-2")
    arguments = parser.parse_args()
    os.environ.update(OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu", CUDA_VISIBLE_DEVICES="")
    record = {"benchmark": "checkpoint", "quick": arguments.quick, **machine(["torch", "deepspeed", "timm"]), "wanted":
              {"sync_speed_at_least": SPEED, "async_cost_at_most": COPY}, "results": []}
    for kind, size in CASES:
        if arguments.only not in f"{kind}-{size}":
            continue
        with tempfile.TemporaryDirectory(dir=arguments.dir) as root:
            row = run_case(kind, size, 3 if arguments.quick else arguments.pairs, arguments.quick, Path(root))
        record["results"].append(row)
        speed, cost, slow = (row[name] for name in ("sync_speed", "async_cost", "step_slow_down"))
        print(f"{kind:5s} {size} rank(s), {row['bytes_a_rank'] / 1e6:.0f} MB in {row['tensors_a_rank']} tensors a rank: "
              f"synchronous {speed['median']:.2f}x a plain write ({speed['min']:.2f}-{speed['max']:.2f}), asynchronous call "
              f"{cost['median']:.2f}x a plain copy ({cost['min']:.2f}-{cost['max']:.2f}), CPU of the "
              f"thread {row['async_cost_cpu']['median']:.2f}x, steps while it writes "
              f"{slow['median']:.2f}x, publishing {row['publish_ms']:.0f} ms", flush=True)
    record["loadavg_after"] = list(os.getloadavg())
    path = write_result("checkpoint-quick" if arguments.quick else "checkpoint", record)
    kept = all(row["kept"] for row in record["results"])
    print(f"{path} written; {SPEED:g}x and {COPY:g}x: {'kept' if kept else 'MISSED'}")
    sys.exit(0 if kept else 1)


if __name__ == "__main__":
    main()
