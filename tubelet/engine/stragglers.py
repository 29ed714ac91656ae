"""The spread of step times over ranks, and which rank is slow. One small gather at a log step; nothing in between."""

from __future__ import annotations

import statistics

from tubelet import dist

NOISE_SECONDS = 0.01
"""A rank is called slow only when it costs the others more than this a step."""


def spread(own_seconds_per_step: float, data_seconds_per_step: float, world: dist.World, ratio: float
           ) -> tuple[dict[str, float], str | None]:
    """(scalars, a sentence that names the slow rank or None), equal on all ranks. All ranks call it, at log steps.

    `own_seconds_per_step` is this rank's own time without waiting for others (in synchronous training all ranks take
    equally long with it): its forward pass and its wait for data; `data_seconds_per_step` is the latter. A rank is slow
    when its own time is above `ratio` times the median of all ranks (`watch.straggler_ratio`; the lower one of two, so
    that two ranks can be told apart). Scalars: `perf/step_time_min`, `_median`, `_max` in seconds and
    `perf/slowest_rank`.
    """
    told = dist.gather((own_seconds_per_step, data_seconds_per_step))
    own = [seconds for seconds, _ in told]
    slowest = max(range(len(own)), key=lambda rank: own[rank])
    median = statistics.median_low(own)
    values = {"perf/step_time_min": min(own), "perf/step_time_median": median, "perf/step_time_max": own[slowest],
              "perf/slowest_rank": float(slowest)}
    slow = [rank for rank, seconds in enumerate(own) if seconds > ratio * median and seconds - median > NOISE_SECONDS]
    if not slow or world.size == 1:
        return values, None
    data = told[slowest][1]
    why = ", most of it waiting for data" if data > 0.5 * own[slowest] else ""
    more = f"; {len(slow) - 1} more are slow" if len(slow) > 1 else ""
    return values, (f"rank {slowest} on host {dist.host(slowest)} is slow: {own[slowest]:.3g} s a step of its own{why}, "
                    f"{own[slowest] / max(median, 1e-9):.1f} times the median {median:.3g} s "
                    f"(watch.straggler_ratio={ratio:g}){more}")
