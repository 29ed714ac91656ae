"""What a recipe needs of the hosts: its shards readable and fast, room for its checkpoints and batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from data_pipelines.bench import bench
from data_pipelines.index import known_shards, storage_of
from data_pipelines.indexing import index_command
from data_pipelines.mix import in_pairs
from data_pipelines.plan import plan_data
from data_pipelines.reader import Reader
from data_pipelines.recipe import Recipe
from data_pipelines.samples import Source, open_sources
from data_pipelines.settings import DataSettings
from data_pipelines.shards import folder_of, is_remote, missing, resolve_shards
from tubelet.batching import micro_batch_multiple
from tubelet.config import check
from tubelet.dist import World
from tubelet.errors import TubeletError
from tubelet.program.doctor.findings import Finding, at_least, equal, some
from tubelet.program.settings import ProgramSettings

_PATIENCE = 15.0  # seconds for storage that does not answer; a run waits longer
_STATE_BYTES = {"adamw": 8, "adam": 8, "lamb": 8, "sgd": 4, "lion": 4, "adafactor": 4}
"""Bytes of optimizer state a weight, in fp32 (Adafactor's rows and columns are small beside its momentum)."""


def checkpoint_bytes(settings: ProgramSettings) -> float:
    """About how many bytes one checkpoint takes: fp32 weights, optimizer state, moving average; counted on a model without
    memory. Imports timm."""
    from tubelet.models.build import build_meta
    from tubelet.models.cost import num_parameters

    each = 4 + _STATE_BYTES[settings.optimizer.name] + (4 if settings.ema else 0)
    return float(num_parameters(build_meta(settings.model)) * each)


def look(settings: ProgramSettings, *, nodes: int, ranks: int, seed: int, quick: bool) -> dict[str, Any]:
    """What this node finds about the recipe's data, read as a run would read it; `seed` makes nodes read other samples.
    {"error", "hint"} when the shards cannot be opened or read, {"unindexed", "hint"} when a run would index them first."""
    try:
        data = settings.data.model_copy(update={"io_timeout_seconds": _PATIENCE})
        if lacking := _unindexed(data):
            return lacking
        sources = open_sources(data.train, data, World())
        sources += open_sources(data.val, data, World())
        found: dict[str, Any] = {"digests": {f"{s.settings.name} ({len(s.index):,} samples)": s.index.digest()
                                             for s in sources}}
        found["bytes_read"] = _read_some(sources)
        found |= _plan(settings, sources[:len(data.train)], nodes, ranks)
        measured = bench(_recipe(settings, data, seed), batches=2 if quick else 4, workers=0 if quick else None)
        return {**found, "rate": measured.throughput, "per_core": measured.per_core, "workers": measured.workers,
                "fetch_ms": measured.wall_ms("fetch"), "slowest": measured.slowest, "bad": measured.bad,
                "samples": measured.samples}
    except TubeletError as error:
        return {"error": error.problem, "hint": error.hint}
    except OSError as error:
        return {"error": str(error), "hint": "the path, the rights and the mount on that host"}


def _unindexed(data: DataSettings) -> dict[str, Any]:
    """What there is to say of local shards without an index, {} when all have one. Opening them would build it, which takes
    as long as reading them, while all ranks wait."""
    for source in [*data.train, *data.val]:
        lacking = known_shards(resolve_shards(source.shards, data.index_dir), data.index_dir, source.storage).lacking
        if lacking and not any(map(is_remote, lacking)) and not missing(lacking):  # of those, opening says what is wrong
            words = [source.shards] if isinstance(source.shards, str) else source.shards
            if not data.index_dir:  # beside the shards, a folder at a time
                words = list(dict.fromkeys(map(folder_of, lacking)))
            command = index_command(words, data.index_dir)
            return {"unindexed": f"{len(lacking):,} shard(s) of source `{source.name}` have no index, the first is "
                                 f"{lacking[0]}",
                    "hint": f"{command}  (once), then the doctor again"}
    return {}


def _recipe(settings: ProgramSettings, data: Any, seed: int) -> Recipe:
    values = {**settings.model_dump(mode="json"), "data": data.model_dump(mode="json"), "seed": settings.seed + seed}
    recipe = check(Recipe, values)
    small = max(16, micro_batch_multiple(in_pairs(data.augment), data.repeats))  # enough to time, and soon done
    return recipe.model_copy(update={"micro_batch_size": "auto", "max_micro_batch_size": small})


def _read_some(sources: Sequence[Source]) -> int:
    """Read the ends of the first, middle and last shard of each source; returns the bytes. Raises `DataError`."""
    reader = Reader(_PATIENCE, storage=storage_of([source.index for source in sources]))
    count = 0
    try:
        for source in sources:
            shards = source.index.shards
            for number in sorted({0, len(shards) // 2, len(shards) - 1}):
                info = shards[number]
                piece = min(info.nbytes, 64 * 1024)
                if piece:
                    count += len(reader.read(info.url, 0, piece)) + len(reader.read(info.url, info.nbytes - piece, piece))
    finally:
        reader.close()
    return count


def _plan(settings: ProgramSettings, sources: Sequence[Source], nodes: int, ranks: int) -> dict[str, Any]:
    plan = plan_data(settings.data, nodes=nodes, gpus_per_node=ranks, global_batch_size=settings.global_batch_size,
                     micro_batch_size=settings.micro_batch_size, max_micro_batch_size=settings.max_micro_batch_size,
                     img_size=settings.model.img_size, num_classes=settings.model.num_classes,
                     sources=[source.index for source in sources])
    advice = [[item.problem, item.hint, item.fatal] for item in plan.advice if "/dev/shm" not in item.problem]
    return {"advice": advice, "shm": plan.shm_bytes,
            "epoch_samples": round(plan.steps_per_epoch * settings.global_batch_size)}


def judge(looked: dict[str, dict[str, Any]], need: float | None) -> list[Finding]:
    """`looked` by host; `need`: samples per second that one rank trains, when it was given."""
    bad = {label: mine for label, mine in looked.items() if "error" in mine}
    new = {label: mine for label, mine in looked.items() if "unindexed" in mine}
    well = {label: mine for label, mine in looked.items() if label not in bad and label not in new}
    found = []
    if new:
        mine = next(iter(new.values()))
        found.append(Finding("data", "without an index", "warn", f"{mine['unindexed']} ({some(list(new))}); they were not "
                             "read", "shards have an index: else the first ranks of a run build it while all others wait",
                             mine["hint"], list(new)))
    if bad:
        mine = next(iter(bad.values()))
        found.append(Finding("data", "shards", "fail", f"{mine['error']} ({some(list(bad))})",
                             "every node opens the index and reads the first, middle and last shard", mine["hint"],
                             list(bad), {label: item["error"] for label, item in bad.items()}))
    if not well:
        return found
    first = next(iter(well.values()))
    if not bad and not new:
        found.append(Finding("data", "shards", "ok", ", ".join(first["digests"]),
                             "every node opens the index and reads the first, middle and last shard"))
    found.append(equal("data", "index", {label: " ".join(mine["digests"].values()) for label, mine in well.items()},
                       show=lambda text: f"digest {text[:12]}", hint="the same shards for all nodes (data.train, a stale "
                       "copy or mirror); `tubelet data info` on both hosts"))
    return [*found, *_rates(well, need), *_advice(well)]


def _rates(well: dict[str, dict[str, Any]], need: float | None) -> list[Finding]:
    rates = {label: float(mine["rate"]) for label, mine in well.items() if mine.get("rate")}
    found = []
    if rates:
        workers = next(iter(well.values()))["workers"]
        what = f"samples/s of one rank's loader with {workers} worker(s), decoded and augmented, alone on its node"
        found.append(at_least("data", "reading", rates, show=lambda value: f"{value:,.0f}", what=what, warn=need or 0.0,
                              rule=f"at least --need {need:g}" if need else "told; --need SAMPLES_PER_SECOND judges it",
                              hint=f"`tubelet data bench` on that host says which stage is slow (here: "
                              f"{next(iter(well.values()))['slowest']})"))
    spoilt = {label: mine["bad"] for label, mine in well.items() if mine["bad"]}
    if spoilt:
        found.append(Finding("data", "samples", "warn", f"{sum(spoilt.values())} of the samples read do not decode "
                             f"({some(list(spoilt))})", "samples decode", "tubelet data verify --decode",
                             list(spoilt), spoilt))
    return found


def _advice(well: dict[str, dict[str, Any]]) -> list[Finding]:
    """What `tubelet data plan` would say of this job, once for all hosts that it holds for."""
    hosts: dict[tuple[str, str, bool], list[str]] = {}
    for label, mine in well.items():
        for problem, hint, fatal in mine["advice"]:
            hosts.setdefault((problem, hint, fatal), []).append(label)
    return [Finding("plan", "data", "fail" if fatal else "warn", problem, "as `tubelet data plan` counts", hint, labels)
            for (problem, hint, fatal), labels in hosts.items()]
