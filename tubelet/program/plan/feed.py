"""What the data must deliver: samples and bytes a second, cores, and whether shards, lanes and ranks fit each other."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from data_pipelines.index import known_shards
from data_pipelines.indexing import index_command
from data_pipelines.plan import DataPlan, Machine, plan_data
from data_pipelines.settings import DataSettings
from data_pipelines.shards import is_remote, missing, resolve_shards
from tubelet.errors import DataError, Problems, TubeletError
from tubelet.program.settings import ProgramSettings

_PICTURE_MS, _PICTURE_BYTES, _MS_A_BYTE = 1.31, 31_000, 8.0e-6
_FRAME_MS = 2.1


@dataclass(frozen=True)
class Feed:
    """What one node's loader must do."""

    samples_per_second: float
    """Of one node."""
    per_core: float
    """Samples a second that one core prepares."""
    per_core_source: str
    workers: int
    """Of one node, as the config has them."""
    cores: float
    """That the loader of one node needs at this speed."""
    samples: int | None
    bytes_per_second: float | None
    """Of one node; None when the data is not known here."""
    plan: DataPlan | None
    notes: list[str] = field(default_factory=list)


def assumed_per_core(frames: int, sample_bytes: float) -> tuple[float, str]:
    """Samples a second and core, and what that is from."""
    if frames > 1:
        return 1e3 / (_FRAME_MS * frames), (f"assumed: {_FRAME_MS} ms of a core for each of {frames} frames (H.264, "
                                            "340x256, a key frame every 32 to 250 frames)")
    milliseconds = _PICTURE_MS + max(0.0, sample_bytes - _PICTURE_BYTES) * _MS_A_BYTE
    what = f"{sample_bytes / 1000:.0f} KB" if sample_bytes else "31 KB"
    return 1e3 / milliseconds, (f"assumed: {milliseconds:.2f} ms of a core for a JPEG of {what} "
                                "(benchmarks/results/images.json: 1.31 ms at 31 KB); `tubelet data bench` measures")


def _here(data: DataSettings) -> None:
    """Raises `DataError` when a source's folder is not there: a recipe for a cluster names hundreds of thousands of shards,
    and looking for each would take a minute."""
    for source in data.train:
        for shards in [source.shards] if isinstance(source.shards, str) else source.shards:
            for part in shards.split("::"):
                folder = Path(part.partition("{")[0] or ".").parent
                if not is_remote(part) and not part.startswith("made-up:") and not folder.is_dir():
                    raise DataError(f"{folder}/ of source `{source.name}` is not here.")


def _indexed(data: DataSettings) -> None:
    """Raises `DataError` when shards have no index: making one reads the headers of every shard, which is nothing to do
    unasked on a login node."""
    for source in data.train:
        lacking = known_shards(resolve_shards(source.shards, data.index_dir), data.index_dir, source.storage).lacking
        if lacking:
            absent = Problems(DataError, f"Shards of source `{source.name}` are missing:")
            absent.items += missing(url for url in lacking if not is_remote(url))
            absent.raise_if_any()
            words = [source.shards] if isinstance(source.shards, str) else list(source.shards)
            raise DataError(f"{len(lacking)} shard(s) of source `{source.name}` have no index, the first is {lacking[0]}.",
                            f"{index_command(words, data.index_dir)}  (once; it reads the headers of every shard)")


def feed_of(settings: ProgramSettings, *, nodes: int, gpus_per_node: int, samples_per_second: float, micro: int,
            cores: int | None, per_core: float | None) -> Feed:
    """`samples_per_second`: of the whole job. Data that is not here becomes a note, never an error."""
    each = samples_per_second / nodes
    plan, notes = None, []
    try:
        _here(settings.data)
        _indexed(settings.data)
        plan = plan_data(settings.data, nodes=nodes, gpus_per_node=gpus_per_node,
                         global_batch_size=settings.global_batch_size, micro_batch_size=micro,
                         img_size=settings.model.img_size, num_classes=settings.model.num_classes,
                         images_per_s=each / gpus_per_node, machine=Machine(cores=cores))
    except (TubeletError, OSError) as error:
        first = (error.problem if isinstance(error, TubeletError) else str(error)).splitlines()[0]
        hint = f" Try: {error.hint.splitlines()[0]}" if isinstance(error, TubeletError) and error.hint else ""
        notes.append(f"Shards against lanes, bytes a second and the length of an epoch are not known here: {first}{hint}")
    found, source = assumed_per_core(settings.data.clip.frames, plan.sample_bytes if plan else 0.0)
    if per_core:
        found, source = per_core, "given by --images-per-core"
    workers = settings.data.workers * gpus_per_node
    needed = each / found
    if needed > workers:
        more = -(-int(needed * 1.1 + 1) // gpus_per_node)
        notes.append(f"The loader needs {needed:.1f} cores a node, but {gpus_per_node} ranks x data.workers="
                     f"{settings.data.workers} are {workers} processes: data.workers={more}, if the node has the cores.")
    if cores is not None and needed + gpus_per_node > cores:
        notes.append(f"The loader needs {needed:.1f} cores a node and training one a GPU, the node has {cores}.")
    for advice in plan.advice if plan else ():
        notes.append(f"{advice.problem} Try: {advice.hint}.")
    samples = round(plan.steps_per_epoch * settings.global_batch_size) if plan else None
    return Feed(each, found, source, workers, needed, samples, plan.bytes_per_second if plan else None, plan, notes)
