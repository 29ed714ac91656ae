"""Learning rate as a pure function of the step (big_vision `create_learning_rate_schedule`; 2106.04560, section 3.5).

With t the step, w warm-up, c cool-down, T total steps, p = clip((t - w) / (T - w), 0, 1):

    cosine    f + (1 - f) * (1 + cos(pi p)) / 2       f = final_lr / lr
    linear    f + (1 - f) * (1 - p)
    rsqrt     1 / sqrt(1 + max(0, t - w) / timescale)
    constant  1

each times min(1, t / w), and `rsqrt` and `constant` also times min(1, (T - t) / c). The main phase of those two does not
depend on T, so one run can be cooled down from several of its checkpoints.
"""

from __future__ import annotations

import math

from tubelet.engine.settings import ScheduleSettings
from tubelet.errors import ConfigError, Problems


def learning_rate(step: int, settings: ScheduleSettings, base_lr: float, total_steps: int) -> float:
    """Learning rate of the update that turns step `step` into `step + 1`; 0 at step 0 when there is a warm-up."""
    warmup, cooldown = settings.warmup_steps, settings.cooldown_steps
    progress = min(1.0, max(0.0, (step - warmup) / max(1, total_steps - warmup)))
    if settings.name == "cosine":
        lr = settings.final_lr + (base_lr - settings.final_lr) * 0.5 * (1 + math.cos(math.pi * progress))
    elif settings.name == "linear":
        lr = settings.final_lr + (base_lr - settings.final_lr) * (1 - progress)
    elif settings.name == "rsqrt":
        lr = base_lr / math.sqrt(1 + max(0, step - warmup) / settings.timescale)
    else:
        lr = base_lr
    if warmup:
        lr *= min(1.0, step / warmup)
    if cooldown and settings.name in ("rsqrt", "constant"):
        lr *= min(1.0, max(0, total_steps - step) / cooldown)
    return lr


def check_schedule(settings: ScheduleSettings, total_steps: int | None, base_lr: float | None = None) -> None:
    """Raise `ConfigError` when schedule settings contradict each other; all of them at once.

    `total_steps` None (not known before the data is counted) leaves out what depends on it.
    """
    problems = Problems(ConfigError)
    warmup, cooldown, name = settings.warmup_steps, settings.cooldown_steps, settings.name
    if total_steps is not None and warmup + cooldown > total_steps:
        parts = f"schedule.warmup_steps {warmup}" + (f" + schedule.cooldown_steps {cooldown}" if cooldown else "")
        problems.add(f"{parts} do not fit into {total_steps} steps in all.",
                     f"schedule.warmup_steps={max(1, total_steps // 20)}, or more steps")
    if name in ("cosine", "linear") and cooldown:
        problems.add(f"schedule.cooldown_steps is {cooldown}, but `{name}` decays by itself and has no cool-down.",
                     "schedule.cooldown_steps=0, or schedule.name=rsqrt or constant")
    if name in ("rsqrt", "constant") and settings.final_lr:
        problems.add(f"schedule.final_lr is {settings.final_lr}, but `{name}` ends at 0 after its cool-down, or nowhere.",
                     "schedule.final_lr=0, or schedule.name=cosine or linear")
    if base_lr is not None and settings.final_lr > base_lr:
        problems.add(f"schedule.final_lr {settings.final_lr} is above optimizer.lr {base_lr}.",
                     "schedule.final_lr is absolute, not a share of optimizer.lr")
    problems.raise_if_any()
