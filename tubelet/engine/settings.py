"""Typed settings of the engine: optimizer, schedule, precision, ZeRO, EMA, checkpoints, logging. No torch here."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import field_validator

from tubelet.config import Settings, fixed, free, recorded


class OptimizerSettings(Settings):
    """The optimizer and its weight decay."""

    name: Literal["adamw", "adam", "sgd", "lion"] = fixed("adamw")
    """`sgd` is SGD with momentum. Adafactor and LAMB have no meaning on flat ZeRO partitions and are not offered yet."""
    lr: float = recorded(gt=0)
    """Peak learning rate; the schedule multiplies it."""
    betas: tuple[float, float] = recorded((0.9, 0.999))
    """Adam's / Lion's averages."""
    eps: float = recorded(1e-8, gt=0)
    """Adam's denominator floor."""
    momentum: float = recorded(0.9, ge=0, lt=1)
    """SGD's momentum."""
    weight_decay: float = recorded(0.0, ge=0)
    """Decoupled decay of weights with two or more dimensions, relative to the learning rate (torch's meaning). Biases,
    norms, position tables and tokens are not decayed."""
    head_weight_decay: float | None = recorded(None, ge=0)
    """Decay of the classifier's weight; null = `weight_decay` (ViT-G: body 0.03, head 3.0)."""
    layer_decay: float = recorded(1.0, gt=0, le=1)
    """Learning rate of a layer = lr * layer_decay ** (layers above it); 1 = off."""
    frozen: list[str] = fixed([])
    """Regular expressions of parameter names that are not trained (searched, e.g. `^patch_embed`)."""


class ScheduleSettings(Settings):
    """Learning rate as a pure function of the step: lr(step) = optimizer.lr * s(step)."""

    name: Literal["cosine", "linear", "rsqrt", "constant"] = recorded("cosine")
    """Main phase. `rsqrt` = 1 / sqrt(1 + (t - warmup) / timescale), as big_vision."""
    warmup_steps: int = recorded(0, ge=0)
    """Linear warm-up from 0."""
    cooldown_steps: int = recorded(0, ge=0)
    """Linear cool-down to 0 at the end (`rsqrt` and `constant`)."""
    timescale: float = recorded(10_000.0, gt=0)
    """Time scale of `rsqrt` in steps."""
    final_lr: float = recorded(0.0, ge=0)
    """Learning rate (absolute) that `cosine` and `linear` end at."""


class EmaSettings(Settings):
    """Exponential moving average of the fp32 weights, kept on each rank's shard."""

    decay: float = recorded(0.9999, gt=0, lt=1)
    """ema = decay * ema + (1 - decay) * weights, after each applied update."""


class ZeroSettings(Settings):
    """DeepSpeed ZeRO."""

    stage: Literal[1, 2, 3] = free(1)
    """1 shards optimizer state, 2 gradients too, 3 parameters too. May change on resume."""
    config: str | dict[str, Any] | None = free(None)
    """DeepSpeed JSON (file or mapping) merged over what we derive; keys owned by our own settings are refused."""

    @field_validator("stage", mode="before")
    @classmethod
    def _stage_zero(cls, value: Any) -> Any:
        if value in (0, "0"):
            raise ValueError("ZeRO stage 0 lets a NaN gradient into the weights; use stage 1, or engine=plain")
        return value


class EngineSettings(Settings):
    """How to train: batch, precision, engine, optimizer, schedule, saving, logging. Mixed into each program's settings."""

    seed: int = fixed(0, ge=0)
    """Seed of the order of samples, their augmentation, the model's initial weights and drop path."""
    total_steps: int | None = recorded(None, gt=0)
    """Length in global batches (a skipped update counts). Give this or `epochs`."""
    epochs: float | None = recorded(None, gt=0)
    """Length in passes over the training data; total_steps = round(epochs * samples / global_batch_size)."""
    global_batch_size: int = recorded(gt=0)
    """Samples per update over all ranks. World size and accumulation never change it."""
    micro_batch_size: int | Literal["auto"] = recorded("auto")
    """Samples per forward pass on one rank; `auto` = largest divisor of global_batch_size / world size that is at
    most `max_micro_batch_size`."""
    max_micro_batch_size: int = recorded(64, gt=0)
    """Upper bound for `micro_batch_size: auto`."""
    engine: Literal["zero", "plain"] = free("zero")
    """`zero` = DeepSpeed ZeRO; `plain` = one GPU or DDP through Accelerate."""
    precision: Literal["auto", "fp32", "amp", "bf16"] = recorded("auto")
    """`fp32`; `amp` = fp32 parameters with bf16 autocast; `bf16` = bf16 parameters, fp32 masters (zero only);
    `auto` = bf16 on a GPU under zero, amp on a GPU under plain, fp32 on a CPU."""
    zero: ZeroSettings = ZeroSettings()
    """DeepSpeed ZeRO."""
    optimizer: OptimizerSettings = recorded()
    """The optimizer and its weight decay."""
    schedule: ScheduleSettings = ScheduleSettings()
    """Learning-rate schedule."""
    clip_grad: float | None = recorded(1.0, gt=0)
    """Global-norm gradient clipping; null = off."""
    ema: EmaSettings | None = recorded(None)
    """Moving average of the weights; null = off."""
    deterministic: bool = free(False)
    """Deterministic GPU kernels (slower): bit-equal runs on GPUs too."""
    save_every: int = free(1000, gt=0)
    """Checkpoint every this many steps, and at the end."""
    save_every_minutes: float | None = free(None, gt=0)
    """Checkpoint also when this many minutes have passed since the last one."""
    keep_last: int = free(3, ge=1)
    """Newest verified checkpoints to keep."""
    keep_every: int | None = free(None, gt=0)
    """Checkpoints whose step is a multiple of this are kept for good."""
    eval_every: int | None = free(None, gt=0)
    """Evaluate every this many steps; null = at the end only."""
    log_every: int = free(50, gt=0)
    """Steps between log lines, scalars and checks of the bad-sample budget (the only host syncs)."""
    preempt_grace_seconds: float = free(240.0, gt=0)
    """After TERM / USR1 / USR2 the process leaves by force when saving has not finished within this time."""
    timeout_seconds: float = free(600.0, gt=0)
    """Collective time-out of training."""
    digest: bool = free(False)
    """Write a SHA-256 of what every step was trained on to `digest.jsonl` (to compare two runs; costs CPU time)."""
    peak_tflops: float | None = free(None, gt=0)
    """Dense peak of one device in TFLOP/s for MFU; null = from a table of known GPUs, none on CPUs."""
