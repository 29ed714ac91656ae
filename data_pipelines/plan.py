"""Before a job: do shards, lanes, workers, ranks and batch fit each other and a node, and what would have to change?

Pure arithmetic on the indexes of the sources; nothing is decoded and torch is not imported. Numbers marked "about" follow
from means: with G dividing C a node of M has C / M lanes, of which each stands in one window, so it holds C w / M samples
and has min(C/M (1 + w/s), S/M + C/G) shards open (w window, s samples per shard, S shards).

Legend: G global batch, W ranks, M nodes, m micro-batch, C lanes, N samples, T frames.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from data_pipelines.index import SourceIndex, open_source
from data_pipelines.mix import in_pairs, mixes
from data_pipelines.order import PLAIN_LIMIT, Order, OrderSource
from data_pipelines.settings import DataSettings
from data_pipelines.shards import is_remote
from tubelet.batching import divisors, micro_batch_multiple, resolve_micro_batch
from tubelet.dist import World
from tubelet.errors import TubeletError
from tubelet.files import human_bytes

COVER = 8  # shards under a micro-batch, below which its samples are visibly alike on sorted data
FEW_BYTES, MANY_BYTES = 16 * 2**20, 8 * 2**30  # sizes of shards that file systems and copies suffer from


@dataclass(frozen=True)
class Advice:
    """One thing that does not fit. A run cannot start when it is `fatal`."""

    problem: str
    hint: str
    fatal: bool = False


@dataclass(frozen=True)
class Machine:
    """A node. None = not known, and not judged."""

    cores: int | None = None
    shm_bytes: int | None = None
    """Free bytes of /dev/shm, through which workers hand over batches."""
    open_files: int | None = None
    """Hard limit of open files per process, to which a run raises its own."""
    cache_bytes: int | None = None
    """Bytes that `data.cache.folder` may grow to on its disk: free ones, and those that it holds already."""


@dataclass(frozen=True)
class SourcePlan:
    """One source of the mixture on this job."""

    name: str
    samples: int
    shards: int
    nbytes: int
    share: float
    """Of the samples of a batch."""
    lanes: int
    """1 = a plain permutation per epoch."""
    window: int
    steps_per_epoch: float
    open_per_node: int
    open_per_rank: int
    held_per_node: float
    """Bytes of the open windows (of a plain permutation: of everything, any sample may be next)."""
    window_lasts: float
    """Steps."""
    whole_shard_extra: float
    """Bytes per epoch that a second node fetches too when whole shards are fetched, over all bytes; 0 by ranges."""
    cover: float
    """Shards under a micro-batch, about."""


@dataclass(frozen=True)
class DataPlan:
    """What `plan_data` found."""

    nodes: int
    gpus_per_node: int
    global_batch_size: int
    micro_batch_size: int | None
    """None when nothing fits."""
    workers: int
    """Per rank."""
    lanes: int
    sources: list[SourcePlan]
    steps_per_epoch: float
    """Of all sources together, N R / G."""
    sample_bytes: float
    """Mean bytes of shard per sample, by the sources' shares."""
    shm_bytes: int | None
    """Batches in flight on one node."""
    bytes_per_second: float | None
    """Of one node at the wanted rate; None when none was given."""
    fitting_nodes: list[int]
    """Numbers of nodes of this kind, up to 256, that divide the global batch."""
    advice: list[Advice] = field(default_factory=list)

    @property
    def runs(self) -> bool:
        """Whether a run can start like this."""
        return not any(item.fatal for item in self.advice)

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "runs": self.runs}


def this_machine(cache: str | None = None) -> Machine:
    """The machine that this process runs on; `cache` is `data.cache.folder`."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    shm = shutil.disk_usage("/dev/shm").free if os.path.isdir("/dev/shm") else None
    try:
        import resource

        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        files = None if hard == resource.RLIM_INFINITY else hard
    except ImportError:  # not a POSIX system
        files = None
    return Machine(cores, shm, files, _room(Path(cache).expanduser()) if cache else None)


def _room(folder: Path) -> int | None:
    held = 0
    for path, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):  # a run may be at work in it
                held += os.lstat(os.path.join(path, name)).st_blocks * 512
    there = next((parent for parent in (folder, *folder.absolute().parents) if parent.is_dir()), None)
    try:
        return shutil.disk_usage(there).free + held if there else None
    except OSError:
        return None


def plan_data(data: DataSettings, *, nodes: int, gpus_per_node: int, global_batch_size: int,
              micro_batch_size: int | Literal["auto"] = "auto", max_micro_batch_size: int = 64,
              img_size: int | tuple[int, int] = 224, num_classes: int = 0, images_per_s: float | None = None,
              machine: Machine | None = None, sources: Sequence[SourceIndex] | None = None) -> DataPlan:
    """How a job of `nodes` x `gpus_per_node` ranks would read this data. `images_per_s` is what one GPU trains;
    `sources` are the opened `data.train`, opened here when None (which raises `DataError` for damaged ones).

    Whatever does not fit comes back as advice, never as an exception.
    """
    world, advice = nodes * gpus_per_node, []
    if sources is None:
        sources = [open_source(item, index_dir=data.index_dir, world=World()) for item in data.train]
    weights = {item.name: item.weight for item in data.train}
    mixing = mixes(data.augment)
    micro: int | None = None
    try:
        micro = resolve_micro_batch(global_batch_size, micro_batch_size, max_micro_batch_size, world,
                                    micro_batch_multiple(in_pairs(data.augment), data.repeats))
    except TubeletError as error:
        advice.append(Advice(error.problem, error.hint, fatal=True))
    order = None
    try:
        order = Order([OrderSource(s.name, s.counts, weights[s.name], s.sample_bytes) for s in sources], seed=0,
                      global_batch_size=global_batch_size, lanes=data.lanes, window=data.window, repeats=data.repeats)
    except TubeletError as error:
        advice.append(Advice(error.problem, error.hint, fatal=True))
    plans = [_plan_source(s, data, order, nodes, gpus_per_node, global_batch_size, micro) for s in
             sorted(sources, key=lambda s: s.name)] if order else []
    size = sum(len(s) for s in sources)
    mean = sum(plan.share * plan.nbytes / plan.samples for plan in plans) if plans else 0.0
    shm = _in_flight(data, micro, gpus_per_node, img_size, num_classes, mixing) if micro else None
    plan = DataPlan(
        nodes, gpus_per_node, global_batch_size, micro, data.workers, order.lanes if order else 0, plans,
        size * data.repeats / global_batch_size, mean, shm,
        images_per_s * gpus_per_node * mean / data.repeats if images_per_s else None,
        [n for n in divisors(global_batch_size) if n <= 256 and global_batch_size % (n * gpus_per_node) == 0], advice)
    advice += _about_order(plan, size, data)
    advice += _about_machine(plan, this_machine(data.cache.folder) if machine is None else machine, data)
    advice += _about_storage(plan, list(sources), data)
    return plan


def _plan_source(source: SourceIndex, data: DataSettings, order: Order, nodes: int, gpus: int, batch: int,
                 micro: int | None) -> SourcePlan:
    part = order.resolved()["sources"][source.name]
    samples, shards = len(source), int((source.counts > 0).sum())
    per_shard, share = samples / shards, part["share"] / order.lanes
    lanes, window, ranks = part["lanes"], part["window"], nodes * gpus
    laned = lanes > 1
    rounds = order.lanes * data.repeats / batch  # C / G: consecutive batches that walk once over the lanes

    def opened(pieces: int) -> int:
        if not laned:
            return shards
        return math.ceil(min(lanes / pieces * (1 + window / per_shard), shards / pieces + max(rounds, 1), shards))

    extra = min((max(rounds, 1) * nodes - 1) / shards, nodes - 1) if laned else float(nodes - 1)
    under = (micro or batch // ranks or 1) / data.repeats
    cover = under * samples / (order.lanes * per_shard) if laned else min(under * share, shards)
    return SourcePlan(
        source.name, samples, shards, source.nbytes, share, lanes, window, samples * data.repeats / (batch * share),
        opened(nodes), opened(ranks),
        min(lanes * window * source.sample_bytes / nodes, float(source.nbytes)) if laned else float(source.nbytes),
        (window * rounds if laned else samples * data.repeats / (batch * share)), extra, cover)


def _in_flight(data: DataSettings, micro: int, gpus: int, img_size: int | tuple[int, int], classes: int,
               mixing: bool) -> int:
    height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
    sample = 3 * data.clip.frames * height * width + 16 + (4 * classes if mixing else 0)
    waiting = data.workers * data.prefetch + 1 if data.workers else 0  # and the one that is being handed over
    return gpus * waiting * micro * sample


def _about_order(plan: DataPlan, size: int, data: DataSettings) -> list[Advice]:
    found = []
    ranks, batch = plan.nodes * plan.gpus_per_node, plan.global_batch_size
    if batch % ranks and plan.fitting_nodes:
        found.append(Advice(f"{plan.nodes} nodes x {plan.gpus_per_node} GPUs = {ranks} ranks do not divide "
                            f"`global_batch_size` {batch}.",
                            f"{', '.join(map(str, plan.fitting_nodes))} nodes; a batch with many divisors (such as 3840 "
                            "= 2^8 x 3 x 5) fits more numbers of nodes"))
    if size and size * data.repeats < batch:
        found.append(Advice(f"The data has {size} samples, fewer than `global_batch_size` {batch}: a batch holds some "
                            "samples more than once.", f"global_batch_size={max(1, size)} or less"))
    for source in plan.sources:
        name = f" of source `{source.name}`" if len(plan.sources) > 1 else ""
        if source.lanes > 1 and plan.lanes * data.repeats % batch:
            found.append(Advice(f"`data.lanes` {plan.lanes} is not a multiple of `global_batch_size` {batch}: ranks change "
                                f"lanes every batch, and every node reads most windows{name}.",
                                f"data.lanes={batch * -(-plan.lanes // batch)}"))
        if source.lanes > 1 and source.cover < COVER:
            wanted = max(batch, math.floor(plan.lanes * source.cover / COVER / batch) * batch)
            hint = "shuffle the samples while packing (`tubelet data write` does), or smaller shards"
            if wanted < plan.lanes:
                hint = f"data.lanes={wanted}; or {hint}"
            found.append(Advice(f"A micro-batch covers about {source.cover:.1f} shards{name} (m N / (C s)), fewer than "
                                f"{COVER}: on sorted shards BatchNorm and mixing see few classes at a time.", hint))
        each = source.samples // (plan.nodes * 4)
        if source.shards < plan.nodes:
            found.append(Advice(f"{source.shards} shard(s){name} for {plan.nodes} nodes: every node reads every shard.",
                                f"`tubelet data write --shard-size {each}`" if each >= 16 else "fewer nodes"))
    return found


def _about_machine(plan: DataPlan, machine: Machine, data: DataSettings) -> list[Advice]:
    found = []
    processes = plan.gpus_per_node * (plan.workers + 1)
    if machine.cores is not None and processes > machine.cores:
        fits = machine.cores // plan.gpus_per_node - 1
        found.append(Advice(f"{plan.gpus_per_node} ranks x ({plan.workers} workers + the training process) = {processes} "
                            f"processes, the node has {machine.cores} cores.",
                            f"data.workers={fits}" if fits > 0 else "fewer ranks per node, or a node with more cores"))
    if plan.shm_bytes is not None and machine.shm_bytes is not None and plan.shm_bytes > machine.shm_bytes:
        per_worker = plan.shm_bytes / max(1, plan.workers * data.prefetch + 1)
        fits = int(machine.shm_bytes / per_worker - 1) // data.prefetch
        found.append(Advice(f"Batches in flight take {human_bytes(plan.shm_bytes)} of /dev/shm on a node, "
                            f"{human_bytes(machine.shm_bytes)} are free: workers would die of a bus error.",
                            "docker run --shm-size, or a memory emptyDir at /dev/shm"
                            + (f"; or data.workers={fits}" if fits > 0 else "; or a smaller micro batch or data.prefetch=1"),
                            fatal=True))
    if machine.cache_bytes is not None and data.cache.limit_gb * 1e9 > machine.cache_bytes:
        fits = math.floor(0.9 * machine.cache_bytes / 1e9)
        limit = human_bytes(data.cache.limit_gb * 1e9)
        found.append(Advice(f"`data.cache.limit_gb` {data.cache.limit_gb:g} is {limit}, but the disk of `data.cache.folder` "
                            f"{data.cache.folder} has room for {human_bytes(machine.cache_bytes)}: it "
                            "runs full before anything is dropped.",
                            f"data.cache.limit_gb={fits}, or a folder on a larger disk" if fits else
                            "a folder on a larger disk"))
    if machine.open_files is not None:
        keeps = max(8, min(machine.open_files // 2, 16_384))  # as the reader does
        needs = sum(source.open_per_rank for source in plan.sources)
        if needs > keeps:
            found.append(Advice(f"About {needs} shards are open per rank, but the limit of open files "
                                f"({machine.open_files}) lets a process keep {keeps}: shards are opened again and again.",
                                f"ulimit -n {2 * needs} (or LimitNOFILE of the scheduler's service)"))
    return found


def _about_storage(plan: DataPlan, sources: list[SourceIndex], data: DataSettings) -> list[Advice]:
    found = []
    by_name = {source.name: source for source in sources}
    needed = 0.0
    for mine in plan.sources:
        shards = by_name[mine.name].shards
        mean = mine.nbytes / mine.shards
        if mean < FEW_BYTES and mine.shards > 1000:
            found.append(Advice(f"Source `{mine.name}` has {mine.shards} shards of {human_bytes(mean)}: many small files.",
                                "shards of 256 MiB to 1 GiB (`tubelet data write --shard-size`)"))
        if mean > MANY_BYTES:
            found.append(Advice(f"Source `{mine.name}` has shards of {human_bytes(mean)}, which copy and repair badly.",
                                "shards of 256 MiB to 1 GiB (`tubelet data write --shard-size`)"))
        if any(is_remote(info.url) for info in shards):
            windows = data.cache.fetch == "windows" or (data.cache.fetch == "auto" and mine.samples > PLAIN_LIMIT)
            ahead = data.cache.ahead * plan.global_batch_size * mine.share * mine.nbytes / mine.samples / plan.nodes
            # a window is dropped when its last row has passed, and the next one is there before: both lie on the disk
            needed += mine.held_per_node + ahead if windows and mine.lanes > 1 else mine.open_per_node * mean
            if windows and mine.lanes == 1:
                found.append(Advice(f"`data.cache.fetch` is windows, but source `{mine.name}` ({mine.samples} samples) is "
                                    "one permutation without windows.", "data.cache.fetch=auto"))
    limit = data.cache.limit_gb * 1e9
    if needed and data.cache.folder is None and any(mine.lanes == 1 for mine in plan.sources):
        found.append(Advice("Remote shards without `data.cache.folder`: every epoch reads each sample by a request of its "
                            "own.", f"data.cache.folder=/a/local/disk (about {human_bytes(needed)} per node)"))
    if needed > limit and data.cache.folder is not None:
        found.append(Advice(f"The cache of a node needs about {human_bytes(needed)}, `data.cache.limit_gb` "
                            f"{data.cache.limit_gb:g} is {human_bytes(limit)}: what was fetched goes before it is used.",
                            f"data.cache.limit_gb={math.ceil(needed * 1.1 / 1e9)}, or more nodes"))
    return found


def _steps(count: float) -> str:
    return f"{count:,.1f}" if count >= 10 else f"{count:.3g}"


def plan_rows(plan: DataPlan) -> list[tuple[str, str]]:
    """What `tubelet data plan` prints, (what, value)."""
    ranks = plan.nodes * plan.gpus_per_node
    rows = [("job", f"{plan.nodes} node(s) x {plan.gpus_per_node} GPU(s) = {ranks} rank(s), {plan.workers} workers each")]
    if plan.micro_batch_size:
        pieces = plan.global_batch_size // (plan.micro_batch_size * ranks)
        rows.append(("batch", f"{plan.global_batch_size} = {plan.micro_batch_size} x {pieces} x {ranks} ranks"))
    rows += [("nodes that fit", ", ".join(map(str, plan.fitting_nodes)) or "none"), ("lanes", str(plan.lanes)),
             ("steps per epoch", _steps(plan.steps_per_epoch)), ("bytes per sample", human_bytes(plan.sample_bytes))]
    if plan.bytes_per_second is not None:
        rows.append(("reading", f"{human_bytes(plan.bytes_per_second)}/s per node, "
                                f"{human_bytes(plan.bytes_per_second * plan.nodes)}/s in all"))
    if plan.shm_bytes is not None:
        rows.append(("/dev/shm per node", human_bytes(plan.shm_bytes)))
    for source in plan.sources:
        rows += [(f"source {source.name}", f"{source.samples:,} samples in {source.shards:,} shards, "
                                           f"{human_bytes(source.nbytes)}, {source.share:.4%} of a batch"),
                 ("  epoch", f"{_steps(source.steps_per_epoch)} steps"),
                 ("  order", f"{source.lanes} lanes, windows of {source.window} samples that last "
                             f"{source.window_lasts:,.0f} steps" if source.lanes > 1 else "one permutation per epoch"),
                 ("  shards open", f"about {source.open_per_node:,} per node, {source.open_per_rank:,} per rank"),
                 ("  bytes held", f"{human_bytes(source.held_per_node)} per node"),
                 ("  read twice", f"{source.whole_shard_extra:.1%} more when whole shards are fetched, 0 by ranges"),
                 ("  under a micro batch", f"about {source.cover:.1f} shards")]
    return rows
