"""Everything of a plan, put together."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from data_pipelines.mix import in_pairs
from tubelet.batching import micro_batch_multiple
from tubelet.engine.settings import EngineSettings
from tubelet.errors import ConfigError
from tubelet.program.plan.choose import Geometry, Option, as_given, memory_at, options, pick, reasons
from tubelet.program.plan.facts import Facts, facts_of
from tubelet.program.plan.feed import Feed, feed_of
from tubelet.program.plan.gpus import Gpu
from tubelet.program.plan.measured import read_calibration
from tubelet.program.plan.speed import Mfu, Saving, Speed, choose_mfu, saving, speed, total_steps
from tubelet.program.settings import ProgramSettings, micro_batch_of


@dataclass(frozen=True)
class Assumed:
    """What a plan takes from the command line instead of its tables."""

    mfu: Mfu | None = None
    """Of the config as it stands; None: a calibration's, or the table's."""
    calibration: Path | None = None
    """What `--calibrate` wrote, or will."""
    network_gbps: float | None = None
    """GB/s that a node sends to others."""
    disk_gbps: float = 2.0
    """GB/s that a node writes checkpoints with."""
    cores: int | None = None
    """Of a node."""
    per_core: float | None = None
    margin: float = 0.08


@dataclass
class Plan:
    """What `tubelet plan` found. `chosen` is None when nothing fits; what follows from it is then None too."""

    settings: ProgramSettings
    facts: Facts
    gpu: Gpu
    where: Geometry
    margin: float
    network_gbps: float
    disk_gbps: float
    options: list[Option]
    given: Option
    chosen: Option | None
    reasons: list[str]
    speed: Speed | None = None
    saving: Saving | None = None
    feed: Feed | None = None
    total_steps: int | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def overrides(self) -> str:
        """The chosen way as overrides for the command line."""
        assert self.chosen is not None
        words = [f"micro_batch_size={self.chosen.micro}"]
        if self.chosen.way.engine == "zero":
            words.append(f"zero.stage={self.chosen.way.stage}")
        recompute, had = self.chosen.recompute, self.settings.activation_checkpointing
        if recompute is None and had is not None:
            words.append("activation_checkpointing=null")
        elif recompute is not None and had is None:
            words.append(f"activation_checkpointing='{{mode: {recompute.mode}}}'")
        return " ".join(words)


def make_plan(settings: ProgramSettings, gpu: Gpu, where: Geometry, assumed: Assumed) -> Plan:
    """Count, size, choose, predict. Raises `ConfigError` for what a run would refuse as well."""
    if not 0 <= assumed.margin < 1:
        raise ConfigError(f"--margin is {assumed.margin:g}, a share of memory between 0 and 1.", "--margin 0.08")
    micro = micro_batch_of(settings, where.world)
    facts = facts_of(settings.model, settings.optimizer)
    given = as_given(facts, settings, where, micro)
    gpu.check(given.way.precision)
    multiple = micro_batch_multiple(in_pairs(settings.data.augment), settings.data.repeats)
    found = options(facts, settings, where, gpu, margin=assumed.margin, multiple=multiple)
    share = settings.global_batch_size // where.world
    chosen = pick(found, share)
    network = assumed.network_gbps or gpu.network_gbps * where.gpus_per_node / 8
    plan = Plan(settings, facts, gpu, where, assumed.margin, network, assumed.disk_gbps, found, given, chosen,
                reasons(found, chosen, gpu, assumed.margin, share))
    known, why = assumed.mfu, ""
    if known is None and assumed.calibration is not None:
        known, why = read_calibration(assumed.calibration, settings, gpu, facts.input_shape, given.way.precision)
    if chosen is not None:
        _predict(plan, chosen, assumed, known)
    plan.notes += [why] if why else []
    return plan


def _predict(plan: Plan, chosen: Option, assumed: Assumed, known: Mfu | None) -> None:
    settings, facts, own = plan.settings, plan.facts, chosen.settings
    memory = memory_at(facts, own, chosen.way, chosen.micro)
    mfu = choose_mfu(facts, own, plan.gpu, chosen.way.precision, known=known, known_of=settings)
    plan.speed = speed(facts, own, memory, plan.gpu, mfu, nodes=plan.where.nodes, network_gbps=plan.network_gbps)
    plan.feed = feed_of(settings, nodes=plan.where.nodes, gpus_per_node=plan.where.gpus_per_node,
                        samples_per_second=plan.speed.samples_per_second, micro=chosen.micro, cores=assumed.cores,
                        per_core=assumed.per_core)
    plan.total_steps = total_steps(settings, plan.feed.samples)
    plan.saving = saving(memory, own, nodes=plan.where.nodes, disk_gbps=assumed.disk_gbps, total_steps=plan.total_steps)
    plan.notes = [*plan.feed.notes, *_notes(settings, facts, plan)]


def _notes(settings: EngineSettings, facts: Facts, plan: Plan) -> list[str]:
    said = ["Peaks were read in the sources of DeepSpeed and of the model, and not yet compared with a GPU; "
            "`--calibrate` on one compares."]
    if settings.compile is not None:
        said.append("compile: activations are counted uncompiled; the compiler usually keeps fewer.")
    if plan.total_steps is None:
        said.append("The run's length is in epochs of data that is not here: its duration is not known.")
    if settings.sync_batch_norm:
        said.append("sync_batch_norm: its collectives in every layer are not in the bytes sent.")
    return said
