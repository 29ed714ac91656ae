"""Which stage, which micro-batch, with or without recomputation: every way that there is, and the one to take.

The rule. Stages cost time, memory is free until it is full: of the ways in the order plain engine (if the config has it, it
is alone), ZeRO-1, 2, 3, first without recomputation and then with it, the first one is taken at which a micro-batch of
`ENOUGH` samples fits (or all that a rank gets), with the largest micro-batch that divides the global batch; if no way has
that, the one with the largest micro-batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tubelet.batching import divisors
from tubelet.engine.build import check_combination
from tubelet.engine.optim import check_optimizer
from tubelet.engine.precision import check_precision
from tubelet.engine.settings import ActivationCheckpointing, EngineSettings
from tubelet.errors import ConfigError
from tubelet.program.plan.facts import Facts
from tubelet.program.plan.gpus import Gpu
from tubelet.program.plan.memory import Inside, Memory, State, Way

ENOUGH = 8
OUTSIDE = 1.5 * 2**30
"""Assumed bytes of a GPU that no tensor gets: the CUDA context, NCCL's and cuBLAS's buffers."""


@dataclass(frozen=True)
class Geometry:
    """A cluster as far as a plan cares."""

    nodes: int
    gpus_per_node: int

    @property
    def world(self) -> int:
        return self.nodes * self.gpus_per_node


@dataclass(frozen=True)
class Option:
    """One way to run, sized."""

    way: Way
    recompute: ActivationCheckpointing | None
    settings: EngineSettings
    state: State
    inside: Inside
    sample_bytes: int
    """Activations of one sample."""
    micro: int
    """The largest micro-batch that fits; 0 = none does. `sized` for another one."""
    needed: int
    """Bytes with that micro-batch, or with the smallest one when none fits; the margin is not in it."""
    at: int = 1
    """The micro-batch that `needed` is for."""
    why_not: str = ""
    """Why this way is not offered at all; the sizes are then without meaning."""

    @property
    def name(self) -> str:
        return self.way.name + (" + recomputation" if self.recompute else "")


def budget(gpu: Gpu, margin: float) -> int:
    """Bytes that tensors may take: the memory without what lies outside, and without the margin for fragmentation."""
    return int((gpu.memory_gib * 2**30 - OUTSIDE) * (1 - margin))


def memory_at(facts: Facts, settings: EngineSettings, way: Way, micro: int) -> Memory:
    """The memory of a way with that micro-batch, whose number of micro-batches a step follows."""
    several = settings.global_batch_size // (micro * way.world)
    return Memory(facts, settings, Way(way.engine, way.stage, way.precision, way.world, several, way.gpu))


def needed_bytes(memory: Memory, sample_bytes: int, micro: int) -> int:
    """The peak of a step in bytes."""
    return memory.state().total + memory.inside().above(sample_bytes * micro)


def options(facts: Facts, settings: EngineSettings, where: Geometry, gpu: Gpu, *, margin: float,
            multiple: int) -> list[Option]:
    """Every stage (or the plain engine), without and with recomputation, each with its largest micro-batch."""
    stages = [0] if settings.engine == "plain" else [1, 2, 3]
    recompute = settings.activation_checkpointing or ActivationCheckpointing()
    return [option_of(facts, settings, where, gpu, stage, kind, margin, multiple)
            for kind in (None, recompute) for stage in stages]


def option_of(facts: Facts, settings: EngineSettings, where: Geometry, gpu: Gpu, stage: int,
              recompute: ActivationCheckpointing | None, margin: float, multiple: int) -> Option:
    """One way (stage 0 = the plain engine) with its largest micro-batch."""
    own = settings.model_copy(update={
        "activation_checkpointing": recompute, "zero": settings.zero.model_copy(update={"stage": stage or 1})})
    way = Way(own.engine, stage, "fp32", where.world)
    try:
        way = Way(own.engine, stage, check_precision(facts.module, own, torch.device("cuda")), where.world)
        gpu.check(way.precision)
        check_optimizer(own)
        for problem in check_combination(own, facts.module, torch.device("cuda")):
            raise problem
    except ConfigError as error:
        return Option(way, recompute, own, State(0, 0, 0, 0, 0, 0, 0), Inside(0, 0, 0), 0, 0, 0, why_not=str(error))
    sample = facts.activations(way.precision, recompute)
    room = budget(gpu, margin)
    fitting = [m for m in divisors(own.global_batch_size // where.world) if m % multiple == 0]
    chosen = 0
    for micro in fitting:
        if needed_bytes(memory_at(facts, own, way, micro), sample, micro) <= room:
            chosen = micro
    return sized(facts, own, way, recompute, sample, chosen or fitting[0], fits=bool(chosen))


def sized(facts: Facts, settings: EngineSettings, way: Way, recompute: ActivationCheckpointing | None, sample: int,
          micro: int, *, fits: bool) -> Option:
    """The option of that way with that micro-batch."""
    memory = memory_at(facts, settings, way, micro)
    return Option(memory.way, recompute, settings, memory.state(), memory.inside(), sample, micro if fits else 0,
                  needed_bytes(memory, sample, micro), at=micro)


def pick(found: list[Option], share: int) -> Option | None:
    """The way to take, or None when nothing fits; `share` = samples of a step on one rank."""
    fitting = [option for option in found if option.micro]
    if not fitting:
        return None
    enough = [option for option in fitting if option.micro >= min(ENOUGH, share)]
    return enough[0] if enough else max(fitting, key=lambda option: option.micro)


def reasons(found: list[Option], chosen: Option | None, gpu: Gpu, margin: float, share: int) -> list[str]:
    """Why that one, in sentences; or what is missing and what would help."""
    room = budget(gpu, margin)
    if chosen is None:
        return _missing(found, gpu, room)
    said = []
    for option in found:
        if option == chosen:
            break
        if option.why_not:
            said.append(f"{option.name} is not offered: {option.why_not.splitlines()[0]}")
        elif not option.micro:
            said.append(f"{option.name} does not fit: the smallest micro-batch needs {gib(option.needed)} of "
                        f"{gib(room)} GiB.")
        else:
            said.append(f"{option.name} leaves room for a micro-batch of {option.micro} only.")
    first = "is the first that fits" if said else "is tried first and fits"
    said.append(f"{chosen.name} {first}, with a micro-batch of {chosen.micro} x {share // chosen.micro} a rank: "
                f"{gib(chosen.needed)} of {gib(room)} GiB ({gpu.memory_gib:g} GiB without {gib(OUTSIDE)} for CUDA and NCCL "
                f"and a margin of {margin:.0%} for fragmentation).")
    return said


def _missing(found: list[Option], gpu: Gpu, room: int) -> list[str]:
    offered = [option for option in found if not option.why_not]
    if not offered:
        return [f"{option.name} is not offered: {option.why_not}" for option in found]
    best = min(offered, key=lambda option: option.needed)
    said = [f"Nothing fits: {best.name} with its smallest micro-batch comes closest and needs {gib(best.needed)} GiB, "
            f"{gib(best.needed - room)} GiB more than the {gib(room)} GiB that a {gpu.name} leaves."]
    sharded = best.state.masters + best.state.moments + best.state.average
    sharded += best.state.weights if best.way.stage == 3 else 0
    helps = []
    if best.way.engine == "plain":
        helps.append("engine=zero, which shards the optimizer over the ranks")
    elif sharded > best.needed - room:
        helps.append(f"{-(-sharded // max(1, room - best.needed + sharded))} times as many GPUs, which share the "
                     f"{gib(sharded)} GiB of this rank that are sharded")
    if best.at > 1 and best.sample_bytes * best.at > best.needed - room:
        helps.append("a smaller micro-batch, if the global batch size allows one")
    if best.settings.ema:
        helps.append("ema=null")
    helps.append("a GPU with more memory (--gpu h200 has 139.8 GiB)" if gpu.memory_gib < 130 else "a smaller model")
    return [*said, "What would help: " + "; ".join(helps) + "."]


def as_given(facts: Facts, settings: EngineSettings, where: Geometry, micro: int) -> Option:
    """The config as it stands, whether it fits or not. Raises `ConfigError` as a run would."""
    way = Way(settings.engine, settings.zero.stage if settings.engine == "zero" else 0,
              check_precision(facts.module, settings, torch.device("cuda")), where.world)
    check_optimizer(settings)
    for problem in check_combination(settings, facts.module, torch.device("cuda")):
        raise problem
    recompute = settings.activation_checkpointing
    return sized(facts, settings, way, recompute, facts.activations(way.precision, recompute), micro, fits=True)


def gib(nbytes: float) -> str:
    """Bytes in GiB with a sensible number of digits."""
    value = nbytes / 2**30
    if not nbytes:
        return "0"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 0.1 else f"{value:.4f}"


