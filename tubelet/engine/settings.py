"""Typed settings of the engine: optimizer, schedule, precision, ZeRO, EMA, checkpoints, logging. No torch here."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import field_validator, model_validator

from tubelet.config import Settings, fixed, free, recorded


class OptimizerSettings(Settings):
    """The optimizer and its weight decay."""

    name: Literal["adamw", "adam", "sgd", "lion", "adafactor", "lamb"] = fixed("adamw")
    """`sgd` is SGD with momentum; `adafactor` is big_vision's. `adafactor` and `lamb` look at whole tensors, which ZeRO cuts
    into flat pieces, so they need engine=plain."""
    lr: float = recorded(gt=0)
    """Peak learning rate; the schedule multiplies it."""
    betas: tuple[float, float] = recorded((0.9, 0.999))
    """Averages of AdamW, Adam, Lion and LAMB; Adafactor's momentum and the cap of its second average."""
    eps: float = recorded(1e-8, gt=0)
    """Floor of the denominator of AdamW, Adam and LAMB."""
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
    """ema = decay * ema + (1 - decay) * weights, after each applied update (the papers' "Polyak averaging")."""
    warmup: bool = recorded(False)
    """Begin with a short memory: the decay of update n is min(decay, (1 + n) / (10 + n)). Without it the initial weights
    keep a share of decay ** updates."""


class ZeroSettings(Settings):
    """DeepSpeed ZeRO."""

    stage: Literal[1, 2, 3] = free(1)
    """1 shards optimizer state, 2 gradients too, 3 parameters too. May change on resume."""
    grad_accum_dtype: Literal["auto", "fp32", "bf16"] = recorded("auto")
    """Where micro-batch gradients are added up in bf16 runs: `auto` = as the parameters. fp32 costs 4 bytes a weight (over
    the ranks at stages 2 and 3) and needs stage 2 or 3."""
    config: str | dict[str, Any] | None = free(None)
    """DeepSpeed JSON (file or mapping) merged over what we derive; keys owned by our own settings are refused."""

    @field_validator("stage", mode="before")
    @classmethod
    def _stage_zero(cls, value: Any) -> Any:
        if value in (0, "0"):
            raise ValueError("ZeRO stage 0 lets a NaN gradient into the weights; use stage 1, or engine=plain")
        return value


class ActivationCheckpointing(Settings):
    """Forget activations in the forward pass and compute them again in the backward pass."""

    mode: Literal["full", "selective"] = free("full")
    """`full` = keep a block's input only (about a third more FLOPs); `selective` = also keep the results of matrix products
    and attention, and compute the cheap rest again."""
    every: int = free(1, ge=1)
    """Of every `every` blocks one is treated so; 1 = all of them."""


class CompileSettings(Settings):
    """`torch.compile` of each block of the model."""

    backend: str = free("inductor")
    """`inductor`; `aot_eager` and `eager` to look for mistakes."""
    mode: Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] = free("default")
    """As `torch.compile`'s."""


class GuardSettings(Settings):
    """What happens when the loss or a gradient is not finite, or the loss jumps. An update whose loss or gradient is not
    finite on any rank is always skipped on all."""

    max_skipped: int = free(5, ge=1)
    """This many skipped updates in a row: go back to the last good checkpoint and leave the data since out."""
    loss_spike: float | None = free(None, gt=1)
    """Go back also when the loss of a step is above this many times the median of the last `window`; null = off."""
    window: int = free(100, ge=4)
    """Steps that the median of `loss_spike` looks back at; before so many are seen nothing is a spike."""
    max_rollbacks: int = free(3, ge=0)
    """Going back more often than this between two new checkpoints stops the run with an error; 0 = stop at once."""


class BestSettings(Settings):
    """Keep the checkpoint that evaluates best."""

    metric: str = free("val/acc1")
    """Name of a scalar of the evaluation, such as `val/acc1` or `val_ema/loss`."""
    mode: Literal["max", "min"] = free("max")
    """Whether more is better."""


class CheckpointSettings(Settings):
    """Where checkpoints go and how they are written. How often and how many: `save_every`, `keep_last`, ..."""

    dir: str | None = free(None)
    """Folder or URL (`s3://bucket/runs/x`, `gs://`, ...) that gets the `step-*` folders; null = the run's folder."""
    storage: dict[str, Any] = free({})
    """Options for fsspec when `dir` is a URL, such as `endpoint_url`; keep secrets in the environment."""
    asynchronous: bool = free(True)
    """Copy the state aside and go on training while a process of its own writes it. Costs host memory for one copy of this
    rank's part of the checkpoint."""
    best: BestSettings | None = free(None)
    """Also keep the checkpoint with the best evaluation; null = off."""


class LogSettings(Settings):
    """What is shown beside the console line and the scalars of every `log_every` steps."""

    tensorboard: bool = free(True)
    """Write `tensorboard/`; `metrics.jsonl` is always written."""
    wandb: dict[str, Any] | None = free(None)
    """Arguments of `wandb.init` (`project: NAME`, `entity`, `mode: offline` ...) when the package is installed; null = off.
    A resumed run goes on in the same W&B run; steps that W&B has seen are not sent again."""
    images_every: int | None = free(None, gt=0)
    """Show a sheet of augmented inputs every this many steps (and at the first), also as a file in `inputs/`; null = at
    the first step only."""
    histograms_every: int | None = free(None, gt=0)
    """Histograms of weights every this many steps, counted where the shards are; null = never."""
    profile_start: int | None = free(None, ge=0)
    """Step at which torch's profiler begins (counted from the start of this job, so that a resumed run can be profiled
    too); its trace goes to `profile/`. null = off."""
    profile_steps: int = free(3, gt=0)
    """Steps that are profiled, on rank 0."""
    communication_every: int | None = free(500, gt=0)
    """One step in so many is profiled lightly on rank 0 to learn the share of communication, which costs up to a second;
    null = never."""


class WatchSettings(Settings):
    """Hangs and stragglers."""

    heartbeat_seconds: float = free(10.0, gt=0)
    """How often a rank tells the others where it is."""
    stall_seconds: float = free(300.0, gt=0)
    """Without a step for so long every rank writes the stacks of its threads to `logs/` and the rank that is missing is
    named. Starting, saving and evaluating are given their own time-outs instead."""
    exit_seconds: float | None = free(None, gt=0)
    """Leave with exit code 87 so long after the stacks were written, so that a scheduler can restart the job; null = the
    collective time-out decides."""
    straggler_ratio: float = free(1.3, gt=1)
    """Say which rank is slow when its own time a step (without waiting for others) is above this many times the median."""


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
    activation_checkpointing: ActivationCheckpointing | None = free(None)
    """Trade FLOPs for activation memory; null = off. Changes no result."""
    compile: CompileSettings | None = free(None)
    """`torch.compile` each block; null = off."""
    sync_batch_norm: bool = recorded(False)
    """BatchNorm's batch statistics over the micro-batches of all ranks (UniFormer on few samples a rank)."""
    optimizer: OptimizerSettings = recorded()
    """The optimizer and its weight decay."""
    schedule: ScheduleSettings = ScheduleSettings()
    """Learning-rate schedule."""
    clip_grad: float | None = recorded(1.0, gt=0)
    """Global-norm gradient clipping; null = off."""
    ema: EmaSettings | None = recorded(None)
    """Moving average of the weights; null = off."""
    guard: GuardSettings = GuardSettings()
    """What happens when the loss or a gradient is not finite, or the loss jumps."""
    deterministic: bool = free(False)
    """Deterministic GPU kernels (slower): bit-equal runs on GPUs too."""
    save_every: int = free(1000, gt=0)
    """Checkpoint every this many steps, and at the end."""
    save_every_minutes: float | None = free(None, gt=0)
    """Checkpoint also when this many minutes have passed since the last one."""
    keep_last: int = free(3, ge=1)
    """Newest verified checkpoints to keep."""
    keep_every: int | None = free(None, gt=0)
    """Checkpoints whose step is a multiple of this are kept for good; a multiple of `save_every`, for it saves none."""
    keep_milestones: int | None = free(None, ge=1)
    """Of the checkpoints that `keep_every` keeps, the newest so many; null = all."""
    checkpoint: CheckpointSettings = CheckpointSettings()
    """Where checkpoints go and how they are written."""
    eval_every: int | None = free(None, gt=0)
    """Evaluate every this many steps; null = at the end only."""
    log_every: int = free(50, gt=0)
    """Steps between log lines, scalars and checks of the bad-sample budget (the only host syncs)."""
    preempt_grace_seconds: float = free(240.0, gt=0)
    """After TERM / USR1 / USR2 the process leaves by force when saving has not finished within this time."""
    time_limit_minutes: float | None = free(None, gt=0)
    """The job ends so many minutes after its start; null = ask the scheduler (SLURM). The run is saved and left with exit
    code 85 before that."""
    time_limit_margin_seconds: float = free(120.0, ge=0)
    """How long before the job's end to begin leaving, beside what a save has taken so far."""
    timeout_seconds: float = free(600.0, gt=0)
    """Collective time-out of training."""
    start_timeout_seconds: float = free(3600.0, gt=0)
    """Collective time-out of starting and ending: how long ranks wait for one that builds an index or reads weights."""
    save_timeout_seconds: float = free(3600.0, gt=0)
    """Collective time-out of saving and restoring."""
    eval_timeout_seconds: float = free(3600.0, gt=0)
    """Collective time-out of evaluating: how long ranks that are done wait for the others."""
    log: LogSettings = LogSettings()
    """What is shown beside the console line and the scalars."""
    watch: WatchSettings = WatchSettings()
    """Hangs and stragglers."""
    digest: bool = free(False)
    """Write a SHA-256 of what every step was trained on to `digest.jsonl` (to compare two runs; costs CPU time)."""
    peak_tflops: float | None = free(None, gt=0)
    """Dense peak of one device in TFLOP/s for MFU; null = from a table of known GPUs, none on CPUs."""

    @model_validator(mode="after")
    def _milestones_are_of_something(self) -> EngineSettings:
        if self.keep_milestones is not None and self.keep_every is None:
            raise ValueError(f"keep_milestones={self.keep_milestones} says how many of the checkpoints stay that keep_every "
                             "keeps, and that is null, so none would; give keep_every too, or keep_last alone")
        return self
