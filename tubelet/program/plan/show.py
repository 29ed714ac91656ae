"""A plan as tables and sentences, and as JSON."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import Any

from tubelet.console import print_table
from tubelet.files import human_bytes
from tubelet.program.plan.choose import Option, budget, gib
from tubelet.program.plan.make import Plan


def show(plan: Plan) -> None:
    """Print it, readable at 100 columns."""
    facts = plan.facts
    frozen = sum(item.numel for item in facts.frozen)
    print(f"{plan.settings.model.name}: {facts.parameters:,} parameters" + (f", {frozen:,} frozen" if frozen else "")
          + f"; {facts.flops / 1e9:,.1f} GFLOPs to train on one of {facts.unit}; "
          f"{plan.where.nodes} node(s) x {plan.where.gpus_per_node} {plan.gpu.name} of {plan.gpu.memory_gib:g} GiB\n")
    print_table(
        "Memory of one rank in GiB, at the largest micro-batch that fits (-: none does, sizes at the smallest)",
        ["way", "batch", "weights", "optimizer", "average", "gradients", "activations", "other", "peak"],
        (_memory_row(option) for option in plan.options))
    _say("optimizer: fp32 masters and moments; gradients: what stays of them and of their buckets between steps; other: "
         "gradients, buckets, copies and gathered weights inside of a step, beside activations")
    print()
    print_table(f"The config as it stands: {plan.given.name}, micro-batch {plan.given.micro}", ["", ""],
                _wrapped(_given_rows(plan)))
    print()
    for sentence in plan.reasons:
        _say(f"- {sentence}")
    if plan.chosen is not None:
        print(f"\nTake: {plan.overrides}\n")
        print_table(f"With {plan.chosen.name}, micro-batch {plan.chosen.micro}", ["", ""], _wrapped(_run_rows(plan)))
    for note in plan.notes:
        _say(f"note: {note}")


def _say(sentence: str) -> None:
    print(textwrap.fill(sentence, 100, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False))


def _wrapped(rows: Iterable[list[str]]) -> Iterator[list[str]]:
    """Rows of (what, text) with the text in lines of at most 78 characters."""
    for what, text in rows:
        lines = textwrap.wrap(text, 78, break_long_words=False, break_on_hyphens=False)
        yield from ([what if number == 0 else "", line] for number, line in enumerate(lines))


def _memory_row(option: Option) -> list[str]:
    if option.why_not:
        return [option.name, "-", "not offered", *[""] * 6]
    state = option.state
    activations = option.sample_bytes * option.at
    beside = option.needed - state.total - activations
    return [option.name, str(option.micro or "-"), gib(state.weights + state.buffers), gib(state.masters + state.moments),
            gib(state.average), gib(state.gradients + state.buckets), gib(activations), gib(beside), gib(option.needed)]


def _given_rows(plan: Plan) -> Iterable[list[str]]:
    room, needed = budget(plan.gpu, plan.margin), plan.given.needed
    yield ["peak of a rank", f"{gib(needed)} of {gib(room)} GiB: " + ("fits" if needed <= room else
                                                                      f"{gib(needed - room)} GiB too much")]
    yield ["between steps", f"{gib(plan.given.state.total)} GiB"]
    yield ["activations", f"{plan.given.sample_bytes / 2**20:,.1f} MiB a sample in {plan.given.way.precision}"]


def _run_rows(plan: Plan) -> Iterable[list[str]]:
    speed, chosen, settings, feed, unit = plan.speed, plan.chosen, plan.settings, plan.feed, plan.facts.unit
    assert speed is not None and chosen is not None and feed is not None and plan.saving is not None
    n = settings.global_batch_size // (chosen.micro * plan.where.world)
    yield ["batch", f"{settings.global_batch_size} = {chosen.micro} x {n} x {plan.where.world} ranks"]
    yield ["speed", f"{speed.samples_per_second:,.0f} {unit}/s ({speed.samples_per_second / plan.where.world:,.1f} a GPU), "
                    f"{seconds(speed.step)} a step"]
    yield ["MFU", f"{speed.mfu.value:.1%}: {speed.mfu.source}"]
    if chosen.recompute:
        yield ["HFU", f"{speed.hfu:.1%}: with what is recomputed, which `perf/mfu` of a run leaves out too"]
    yield ["FLOPs of a step", f"{plan.facts.flops * settings.global_batch_size / 1e12:,.1f} TFLOPs"]
    if plan.total_steps:
        yield ["duration", f"{plan.total_steps:,} steps: {duration(plan.total_steps * speed.step)}, "
                           f"{plan.total_steps * speed.step * plan.where.world / 3600:,.0f} GPU hours"]
    yield ["sent by a rank", f"{human_bytes(speed.traffic.gradients)} of gradients and {human_bytes(speed.traffic.weights)} "
                             f"of weights a step; {speed.exposed / speed.step:.1%} of a step waits for it (assumed: "
                             f"{plan.network_gbps:g} GB/s a node, gradients hidden by the backward pass)"]
    saving = plan.saving
    yield ["checkpoint", f"{human_bytes(saving.nbytes)}, {saving.seconds:.1f} s to disk at {plan.disk_gbps:g} GB/s a node, "
                         f"training waits {saving.stall:.2f} s" + (f"; {saving.count:,} of them" if saving.count else "")]
    yield ["disk", f"{human_bytes(saving.kept_bytes)} for {saving.kept.count:,}: {saving.kept.why}"]
    yield ["data a node", f"{feed.samples_per_second:,.0f} {unit}/s"
           + (f", {human_bytes(feed.bytes_per_second)}/s" if feed.bytes_per_second else "")
           + f": {feed.cores:.1f} cores of {feed.per_core:,.0f} {unit}/s each; {feed.workers} workers in the config"]
    yield ["", feed.per_core_source]
    if feed.plan is not None:
        shards = sum(source.shards for source in feed.plan.sources)
        yield ["shards, lanes", f"{shards:,} shards, {feed.plan.lanes:,} lanes, "
                                f"{feed.plan.steps_per_epoch:,.1f} steps an epoch"]


def seconds(value: float) -> str:
    """0.0304 -> 30.4 ms."""
    return f"{value:.2f} s" if value >= 1 else f"{1000 * value:.2f} ms"


def duration(value: float) -> str:
    """Seconds in words: 3.2 days, 4.5 hours, 12 minutes, 20 seconds."""
    for size, name in ((86_400, "days"), (3600, "hours"), (60, "minutes")):
        if value >= size:
            return f"{value / size:.1f} {name}"
    return f"{value:.1f} seconds"


def as_json(plan: Plan) -> dict[str, Any]:
    """All numbers in bytes, seconds and samples."""
    return {
        "model": plan.settings.model.name, "parameters": plan.facts.parameters,
        "trained_parameters": plan.facts.trained_elements, "flops_per_sample": plan.facts.flops,
        "gpu": {**asdict(plan.gpu), "peak_tflops": plan.gpu.peak_tflops},
        "nodes": plan.where.nodes, "gpus_per_node": plan.where.gpus_per_node,
        "global_batch_size": plan.settings.global_batch_size, "budget_bytes": budget(plan.gpu, plan.margin),
        "options": [_option(option) for option in plan.options], "given": _option(plan.given),
        "chosen": _option(plan.chosen) if plan.chosen else None, "overrides": plan.overrides if plan.chosen else None,
        "reasons": plan.reasons, "total_steps": plan.total_steps,
        "speed": {**asdict(plan.speed), "step": plan.speed.step} if plan.speed else None,
        "seconds": plan.total_steps * plan.speed.step if plan.total_steps and plan.speed else None,
        "checkpoint": asdict(plan.saving) if plan.saving else None,
        "feed": {key: value for key, value in asdict(plan.feed).items() if key != "plan"} if plan.feed else None,
        "data": plan.feed.plan.as_json() if plan.feed and plan.feed.plan else None, "notes": plan.notes}


def _option(option: Option) -> dict[str, Any]:
    if option.why_not:
        return {"name": option.name, "why_not": option.why_not}
    return {"name": option.name, "engine": option.way.engine, "stage": option.way.stage, "precision": option.way.precision,
            "recompute": option.recompute.model_dump() if option.recompute else None,
            "micro_batch_size": option.micro or None,
            "state_bytes": {**asdict(option.state), "total": option.state.total}, "inside_bytes": asdict(option.inside),
            "activation_bytes_per_sample": option.sample_bytes, "peak_bytes": option.needed,
            "micro_batches": option.way.accumulation}
