"""How long a step takes and what it sends: arithmetic from a share of the peak (MFU, HFU: gpus.py) that was measured or is
assumed.

Legend: P trained elements, W ranks, G global batch, n micro-batches a step, e bytes of a parameter while training.

What a rank sends in a step (tests/test_plan_network.py counts real collectives). An all-reduce of S bytes sends
2 S (W - 1) / W by the ring algorithm, a reduce-scatter or an all-gather S (W - 1) / W:

======== ============================================================== ==================================================
engine   gradients                                                      weights
======== ============================================================== ==================================================
plain    an all-reduce of 4 P                                           none
ZeRO-1   an all-reduce of P in their type, once a step                  an all-gather of e P
ZeRO-2   the same in each of the n micro-batches: DeepSpeed 0.19         an all-gather of e P
         all-reduces its buckets at this stage too, and keeps its part
ZeRO-3   a reduce-scatter of P in each micro-batch                      gathered in each forward pass, and in each backward
                                                                        pass those that were released between (small models
                                                                        stay); small parameters once a step
======== ============================================================== ==================================================

A ring crosses each border between nodes once, so a node sends to others as much as one rank does; the slower of the two
links counts. Gradients are assumed to travel beside the backward pass of the micro-batches in which they are sent, and
stage 3's parameters beside both passes; the all-gather after an update waits.
"""

from __future__ import annotations

from dataclasses import dataclass

from tubelet.engine.checkpoint.kept import Kept, kept_checkpoints
from tubelet.engine.settings import EngineSettings
from tubelet.program.plan.facts import Facts
from tubelet.program.plan.gpus import Gpu, assumed_hfu
from tubelet.program.plan.memory import FP32, Memory

PCIE_GBPS = 25.0
"""Assumed: what a GPU copies to its host's memory, in GB/s."""


@dataclass(frozen=True)
class Mfu:
    """Model FLOPs utilisation as a run logs it (`perf/mfu`: what is recomputed does not count), and where it is from."""

    value: float
    source: str


@dataclass(frozen=True)
class Traffic:
    """Bytes that one rank sends in a step."""

    gradients: float
    weights: float

    @property
    def total(self) -> float:
        return self.gradients + self.weights


@dataclass(frozen=True)
class Speed:
    """One step. Seconds; samples are images or clips."""

    compute: float
    """Forward and backward passes and the update; recomputation included."""
    exposed: float
    """Waiting for other ranks that nothing hides."""
    traffic: Traffic
    samples_per_second: float
    mfu: Mfu
    """Of forward and backward passes and the update: the `perf/mfu` of a run that waits for nobody."""
    hfu: float
    """The same with what is recomputed."""

    @property
    def step(self) -> float:
        return self.compute + self.exposed


def peak_tflops(settings: EngineSettings, gpu: Gpu) -> float:
    """What a run measures its MFU against."""
    return settings.peak_tflops or gpu.peak_tflops


def choose_mfu(facts: Facts, settings: EngineSettings, gpu: Gpu, precision: str, *, known: Mfu | None = None,
               known_of: EngineSettings | None = None) -> Mfu:
    """Given by hand or measured (`known`, of a job with the settings `known_of`), else assumed. A way that recomputes more
    or less than that job is taken to have the HFU of it."""
    if known is None:
        value, kind = assumed_hfu(gpu, facts.width, facts.convolutional, precision, settings.compile is not None)
        return Mfu(value * gpu.peak_tflops / peak_tflops(settings, gpu) / recomputed(settings),
                   f"assumed for a {kind} on a {gpu.name}; nothing was measured")
    ratio = recomputed(known_of or settings) / recomputed(settings)
    if ratio == 1:
        return known
    return Mfu(known.value * ratio, f"{known.source}: {known.value:.1%} with the config's recomputation, and this way "
                                    f"recomputes {'less' if ratio > 1 else 'more'}")


def recomputed(settings: EngineSettings) -> float:
    """Time of a step over that of one that recomputes nothing. `selective` repeats what is cheap (assumed)."""
    recompute = settings.activation_checkpointing
    if recompute is None:
        return 1.0
    return 1 + (1 / 3 if recompute.mode == "full" else 0.08) / recompute.every


def traffic(memory: Memory) -> Traffic:
    """What a rank sends in a step, by the table above."""
    way, facts = memory.way, memory.facts
    once, n = (way.world - 1) / way.world, way.accumulation
    if way.engine == "plain":
        return Traffic(2 * once * FP32 * facts.trained_elements, 0)
    sent = sum(item.numel * (2 if way.precision == "amp" and item.low else memory.element) for item in facts.trained)
    if way.stage < 3:
        whole = memory.element * sum(map(memory.aligned, facts.groups))
        return Traffic(2 * once * sent * (1 if way.stage == 1 else n), once * whole)
    limit = memory.zero["stage3_param_persistence_threshold"]
    gathered = sum(way.world * memory.piece(item) * _gather_bytes(memory, item.low)
                   for item in (*facts.trained, *facts.frozen) if item.numel > limit)
    kept = sum(item.numel * memory.element for item in (*facts.trained, *facts.frozen) if item.numel <= limit)
    elements = sum(item.numel for item in (*facts.trained, *facts.frozen) if item.numel > limit)
    reach = min(memory.zero["stage3_max_reuse_distance"], 2 * memory.zero["stage3_max_live_parameters"])
    stays = min(1.0, reach / 2 / max(1, elements))  # of a block x elements before the end 2 x pass until it comes again
    return Traffic(once * sent * n, once * (gathered * n * (2 - stays) + kept))


def _gather_bytes(memory: Memory, low: bool) -> int:
    return 2 if memory.way.precision == "amp" and low else memory.element


def speed(facts: Facts, settings: EngineSettings, memory: Memory, gpu: Gpu, mfu: Mfu, *, nodes: int,
          network_gbps: float) -> Speed:
    """The predicted step of `settings.global_batch_size` samples."""
    way = memory.way
    each = settings.global_batch_size / way.world
    compute = each * facts.flops / (mfu.value * peak_tflops(settings, gpu) * 1e12)
    sent = traffic(memory)
    link = 1e9 * (min(gpu.link_gbps, network_gbps) if nodes > 1 else gpu.link_gbps)
    gradients, weights = sent.gradients / link, sent.weights / link
    backward = compute * 2 / 3
    if way.engine == "plain" or way.stage == 1:
        backward /= way.accumulation  # they travel in the last micro-batch only
    if way.engine == "zero" and way.stage == 3:
        exposed = max(0.0, gradients + weights - compute)
    else:
        exposed = max(0.0, gradients - backward) + weights
    return Speed(compute, exposed, sent, settings.global_batch_size / (compute + exposed), mfu,
                 mfu.value * recomputed(settings))


@dataclass(frozen=True)
class Saving:
    """One checkpoint."""

    nbytes: int
    seconds: float
    """Until it is on disk."""
    stall: float
    """That training waits."""
    count: int
    """Of the whole run."""
    kept: Kept
    """On disk at a time."""
    kept_bytes: int


def saving(memory: Memory, settings: EngineSettings, *, nodes: int, disk_gbps: float, total_steps: int | None) -> Saving:
    """Size and time of a checkpoint; `disk_gbps` is what one node writes in GB/s. The node and the rank that write most are
    waited for."""
    written = memory.written_bytes()
    each = len(written) // nodes
    seconds = max(sum(written[node * each:(node + 1) * each]) for node in range(nodes)) / (disk_gbps * 1e9)
    stall = max(written) / (PCIE_GBPS * 1e9) if settings.checkpoint.asynchronous else seconds
    count = -(-total_steps // settings.save_every) if total_steps else 0
    kept = kept_checkpoints(settings, total_steps)
    return Saving(sum(written), seconds, stall, count, kept, sum(written) * kept.count)


def total_steps(settings: EngineSettings, samples: int | None) -> int | None:
    """Steps of the run; None when it is as long as a number of epochs of data that nobody can count here."""
    if settings.total_steps:
        return settings.total_steps
    if samples is None or not settings.epochs:
        return None
    return max(1, round(settings.epochs * samples / settings.global_batch_size))


