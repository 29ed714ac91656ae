"""Where the time of a batch goes, and which stage starves a GPU.

The parts of the loader are run one after another on the micro-batches that a run would read first: fetch (bytes from
storage), decode (to pixels), augment (crop, flip, colours), collate (into the batch, mixing), transfer (to a GPU, where
there is one). CPU milliseconds of this process are what stays the same on a busy machine; wall minus CPU is waiting, mostly
for storage. Then the real loader runs with its workers.

Legend: m micro-batch, R repeats, x global sample number.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from data_pipelines.augment import TrainTransform
from data_pipelines.batches import TrainBatches, places_table
from data_pipelines.decode import BadSample
from data_pipelines.loader import TrainLoader
from data_pipelines.mix import in_pairs
from data_pipelines.plan import this_machine
from data_pipelines.recipe import Recipe
from tubelet.batching import micro_batch_multiple, resolve_micro_batch
from tubelet.dist import World

if TYPE_CHECKING:
    import torch

STAGES = ("fetch", "decode", "augment", "collate", "transfer")
NEEDS_CPU = STAGES[:4]  # what workers do


@dataclass
class Stage:
    """One stage; seconds in all."""

    cpu: float = 0.0
    wall: float = 0.0


@dataclass
class Bench:
    """What `bench` measured. Milliseconds are per sample that a model sees (an augmented repeat is one)."""

    samples: int
    micro_batch_size: int
    sample_bytes: float
    """Mean bytes fetched per sample."""
    stages: dict[str, Stage]
    device: str | None
    """The GPU of `transfer`; None = there is none."""
    bad: int
    """Samples that did not decode, left out."""
    workers: int
    throughput: float | None
    """Samples per second of the loader with its workers; None when it was not run."""
    first_seconds: float | None
    """From asking to its first micro-batch."""
    cores: int | None
    need: float | None
    """Samples per second that one GPU trains."""

    def cpu_ms(self, stage: str) -> float:
        return 1e3 * self.stages[stage].cpu / self.samples

    def wall_ms(self, stage: str) -> float:
        return 1e3 * self.stages[stage].wall / self.samples

    @property
    def per_core(self) -> float:
        """Samples per second that one core prepares when nothing waits."""
        return 1e3 / max(sum(map(self.cpu_ms, NEEDS_CPU)), 1e-9)

    def cost_ms(self, stage: str) -> float:
        """What a stage costs a worker that has a core of its own: waiting counts only where it is for storage."""
        return self.wall_ms(stage) if stage == "fetch" else self.cpu_ms(stage)

    @property
    def per_worker(self) -> float:
        """Samples per second of one worker with a core of its own, waiting for storage included."""
        return 1e3 / max(sum(map(self.cost_ms, NEEDS_CPU)), 1e-9)

    @property
    def slowest(self) -> str:
        """The stage that costs a worker most."""
        return max(NEEDS_CPU, key=self.cost_ms)

    def as_json(self) -> dict[str, Any]:
        stages = {name: {"cpu_ms": self.cpu_ms(name), "wall_ms": self.wall_ms(name)} for name in self.stages}
        return {**asdict(self), "stages": stages, "per_core": self.per_core, "per_worker": self.per_worker,
                "slowest": self.slowest}


def bench(recipe: Recipe, *, batches: int = 8, workers: int | None = None, need: float | None = None) -> Bench:
    """`tubelet data bench`: stages over `batches` micro-batches, then the loader over as many per worker. `workers` None
    takes those of the recipe; `need` is what one GPU trains per second."""
    data = recipe.data if workers is None else recipe.data.model_copy(update={"workers": workers})
    multiple = micro_batch_multiple(in_pairs(data.augment), data.repeats)
    micro = resolve_micro_batch(recipe.global_batch_size, recipe.micro_batch_size, recipe.max_micro_batch_size, 1, multiple)
    loader = TrainLoader(data, seed=recipe.seed, img_size=recipe.model.img_size, num_classes=recipe.model.num_classes,
                         global_batch_size=recipe.global_batch_size, micro_batch_size=micro, world=World(),
                         device_type=_device()[0])
    try:
        warnings.filterwarnings("ignore", category=UserWarning, module=r"torch\.")  # on the number of workers: asked for
        found = _stages(recipe, loader, micro, batches, need)
        _whole(found, loader, micro, max(batches, 2 * data.workers * data.prefetch))
    finally:
        loader.close()
    return found


def _device() -> tuple[str, str | None]:
    import torch

    return ("cuda", torch.cuda.get_device_name()) if torch.cuda.is_available() else ("cpu", None)


def _stages(recipe: Recipe, loader: TrainLoader, micro: int, batches: int, need: float | None) -> Bench:
    import torch

    settings = loader.settings
    transform = TrainTransform(settings.augment, recipe.model.img_size)
    work = TrainBatches(loader.samples, loader.order, settings, transform, recipe.seed, recipe.model.num_classes)
    kind, device = _device()
    found = Bench(0, micro, 0.0, {name: Stage() for name in STAGES}, device, 0, settings.workers, None, None,
                  this_machine().cores, need)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a worker
    try:
        for number in range(batches + 1):
            if number == 1:  # the first one imports, opens shards and warms caches
                found.samples, found.sample_bytes, found.bad = 0, 0.0, 0
                found.stages = {name: Stage() for name in STAGES}
            places = loader.order.place(np.arange(number * micro, (number + 1) * micro, dtype=np.int64))
            pixels = _prepare(found, work, places_table(places))
            if kind == "cuda":
                waiting = pixels.pin_memory() if settings.pin_memory else pixels
                with _timed(found.stages["transfer"]):
                    waiting.to("cuda", non_blocking=True)
                    torch.cuda.synchronize()
    finally:
        torch.set_num_threads(threads)
    found.sample_bytes /= max(found.samples, 1)
    return found


def _prepare(found: Bench, work: TrainBatches, places: np.ndarray) -> torch.Tensor:
    """One micro-batch by the steps of `TrainBatches.__call__`, each on its clock; returns its pixels."""
    ids, moved = places[:, 0], []
    groups = work.groups(ids)
    xs = [ids[slots].tolist() for slots in groups]
    with _timed(found.stages["collate"]):
        batch = work.begin(ids)
    with _timed(found.stages["fetch"]):
        raws = list(work.fetch([places[slots[0]].tolist() for slots in groups], xs))
    found.samples += len(ids)
    found.sample_bytes += sum(len(data) for raw in raws for data in raw.members.values())
    for slots, mine, raw in zip(groups, xs, raws):
        try:
            with _timed(found.stages["decode"]):
                sample = work.decode(raw, mine)
            with _timed(found.stages["augment"]):
                moved += work.augment(sample, mine, batch, slots)
        except BadSample:
            found.bad += len(slots)
    with _timed(found.stages["collate"]):
        work.finish(batch, moved)
    return batch["pixels"]


@contextmanager
def _timed(stage: Stage) -> Iterator[None]:
    wall, cpu = time.perf_counter(), time.process_time()
    try:
        yield
    finally:
        stage.cpu += time.process_time() - cpu
        stage.wall += time.perf_counter() - wall


def _whole(found: Bench, loader: TrainLoader, micro: int, batches: int) -> None:
    """The loader as a run uses it. What its workers had ready before the clock starts is not counted: as many
    micro-batches as they may hold are taken first."""
    held = loader.settings.workers * loader.settings.prefetch
    asked = time.perf_counter()
    stream = loader.batches(0)
    next(stream)
    found.first_seconds = time.perf_counter() - asked
    for _ in range(held):
        next(stream)
    begun = time.perf_counter()
    for _ in range(batches):
        next(stream)
    found.throughput = batches * micro / (time.perf_counter() - begun)


def verdict(found: Bench) -> list[str]:
    """What the numbers mean, in sentences."""
    lines = [f"one core prepares {found.per_core:,.0f} samples/s; {found.slowest} takes longest "
             f"({found.cost_ms(found.slowest):.2f} of {1e3 / found.per_worker:.2f} ms)"]
    waited = sum(found.wall_ms(name) - found.cpu_ms(name) for name in NEEDS_CPU[1:])
    if waited > 0.25 * 1e3 / found.per_worker:
        lines.append(f"{waited:.2f} ms per sample went by without this process on a core: the machine is busy with others")
    if found.device is None:
        lines.append("transfer: there is no GPU here")
    if found.need:
        cores = found.need / found.per_core
        workers = math.ceil(found.need / found.per_worker)
        lines.append(f"a GPU that needs {found.need:,.0f} samples/s: {cores:.1f} of these cores, data.workers={workers}")
        if found.throughput is not None:
            enough = "enough" if found.throughput >= found.need else f"{found.throughput / found.need:.0%} of that"
            lines.append(f"the loader with {found.workers} worker(s) gives {found.throughput:,.0f} samples/s: {enough}")
        if found.throughput is not None and found.throughput < found.need:
            lines.append(_advice(found))
    return lines


def _advice(found: Bench) -> str:
    if found.slowest == "fetch":
        return "fetch limits: data.cache.folder on a local disk, more workers, or faster storage"
    if found.cores is not None and found.need is not None and found.need / found.per_core > found.cores:
        hint = {"decode": "smaller pictures or videos (`tubelet data write --resize`), data.reduced_decode=true",
                "augment": "a cheaper augmentation"}.get(found.slowest, "fewer samples per core")
        return f"{found.slowest} limits and this machine has {found.cores} cores: {hint}"
    return f"{found.slowest} limits: more data.workers"


def bench_rows(found: Bench) -> list[tuple[str, ...]]:
    """(stage, CPU ms, wall ms, share of the workers' time) per sample."""
    total, wall = 1e3 / found.per_worker, sum(map(found.wall_ms, NEEDS_CPU))
    rows = []
    for name in STAGES:
        if name == "transfer" and found.device is None:
            rows.append((name, "none", "none", ""))
            continue
        share = f"{found.cost_ms(name) / total:.1%}" if name in NEEDS_CPU else ""
        rows.append((name, f"{found.cpu_ms(name):.3f}", f"{found.wall_ms(name):.3f}", share))
    rows.append(("together", f"{sum(map(found.cpu_ms, NEEDS_CPU)):.3f}", f"{wall:.3f}", ""))
    return rows
