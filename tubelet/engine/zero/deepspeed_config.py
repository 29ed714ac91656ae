"""The DeepSpeed configuration: what we derive from our settings, what `zero.config` may add, and what it may not.

A key is refused when one of our settings owns it, when what it turns on is not offered (the error says why), and when it
is none we know: DeepSpeed itself ignores unknown top-level keys without a word.

What is derived from the model, P its trained elements and B those of its largest block (`blocks.py`); sizes are elements:

================================== ============================= =========================================================
key of `zero_optimization`         value                         why
================================== ============================= =========================================================
reduce_bucket_size                 P / 8, 5e6 to 1e8, at most P  a buffer of this size (two with overlap) in the gradients'
                                                                 dtype; at most an eighth of the gradients wait to be sent
                                                                 when the backward pass is over
allgather_bucket_size              P, at most 2e8                stages 1 and 2: more updated weights in one call than
                                                                 this need nothing but memory
overlap_comm                       GPUs, more than one rank      reduces on a stream of its own beside the backward pass;
                                                                 on a CPU it would be one more copy
contiguous_gradients               true                          no fragments of memory from gradients
stage3_prefetch_bucket_size        B, at most 1e8                gathers the next block while this one computes
stage3_param_persistence_threshold P / 1000, 1e4 to 1e5          norms, biases and tokens stay whole on every rank: a
                                                                 gathering each would cost more than under 1 % of P
stage3_max_live_parameters         2 B + prefetch, 1e8 to 1e9    gathered elements at one time
stage3_max_reuse_distance          as max_live_parameters        small models stay gathered between forward and backward
sub_group_size                     2e8                           stage 3: the optimizer steps on so much of a rank's part
                                                                 at a time, beside it fp32 gradients of this size (0.8 GB)
data_types.grad_accum_dtype        `zero.grad_accum_dtype`       given when it is not `auto`
================================== ============================= =========================================================

Stage 3 gathers each block as one (a "leaf module"): engine.py.
"""

from __future__ import annotations

import copy
from typing import Any

from tubelet import safe_io
from tubelet.engine.settings import EngineSettings
from tubelet.errors import ConfigError, Problems, TubeletError, nearest

OWNED = {
    "train_batch_size": "global_batch_size",
    "train_micro_batch_size_per_gpu": "micro_batch_size",
    "gradient_accumulation_steps": "global_batch_size and micro_batch_size",
    "managed_gradient_accumulation": "global_batch_size and micro_batch_size",
    "bf16": "precision",
    "bfloat16": "precision",
    "torch_autocast": "precision",
    "optimizer": "optimizer.name, optimizer.lr, ...",
    "zero_allow_untested_optimizer": "optimizer.name",
    "scheduler": "schedule.name, ...",
    "gradient_clipping": "clip_grad",
    "checkpoint": "save_every, keep_last, ... (checkpoints are our own format)",
    "data_types.grad_accum_dtype": "zero.grad_accum_dtype",
    "zero_optimization.stage": "zero.stage",
}
"""DeepSpeed key -> our setting."""

_OFFLOAD = "offload to CPU or disk is not offered: it needs DeepSpeed's own compiled optimizers"
_QUANTIZED = "ZeRO++ is not offered: open reports of runs that do not converge, and it excludes amp"
_MICS = "MiCS was removed from DeepSpeed 0.19"
REFUSED = {
    "fp16": "fp16 is not offered: its loss scaling would have to be saved and resumed; bf16 has the range of fp32",
    "amp": "Apex amp was removed from DeepSpeed 0.19",
    "data_types.param_dtype": "the dtype of parameters follows `precision`",
    "data_types.buffer_dtype": "buffers stay fp32, or BatchNorm statistics would lose their digits",
    "zero_optimization.offload_param": _OFFLOAD,
    "zero_optimization.offload_optimizer": _OFFLOAD,
    "zero_optimization.cpu_offload": _OFFLOAD,
    "zero_optimization.cpu_offload_param": _OFFLOAD,
    "zero_optimization.cpu_offload_use_pin_memory": _OFFLOAD,
    "zero_optimization.zenflow": _OFFLOAD,
    "zero_optimization.zero_hpz_partition_size": _QUANTIZED,
    "zero_optimization.zero_quantized_weights": _QUANTIZED,
    "zero_optimization.zero_quantized_nontrainable_weights": _QUANTIZED,
    "zero_optimization.zero_quantized_gradients": _QUANTIZED,
    "zero_optimization.zeropp_loco_param": _QUANTIZED,
    "zero_optimization.mics_shard_size": _MICS,
    "zero_optimization.mics_hierarchical_params_gather": _MICS,
    "zero_optimization.elastic_checkpoint": "checkpoints are our own format and load at any world size",
    "zero_optimization.compute_grad_norm": "the gradient norm decides whether an update is applied",
    "zero_optimization.legacy_stage1": "DeepSpeed no longer has it",
}
"""DeepSpeed key -> why not. Values that turn the thing off (false, null, 0, hpz 1) are let through."""

ALLOWED = ("zero_optimization", "communication_data_type", "data_types", "comms_logger", "flops_profiler",
           "wall_clock_breakdown", "memory_breakdown", "dump_state", "steps_per_print", "timers", "disable_python_gc")
"""Top-level keys that `zero.config` may hold."""


def derive(settings: EngineSettings, precision: str, *, world_size: int, micro_batch_size: int, accumulation: int,
           numel: int, largest_block: int = 0, gpu: bool = False) -> dict[str, Any]:
    """The configuration for `deepspeed.initialize`.

    `numel` is the number of trained elements, `largest_block` that of the largest block (0: it has none), `precision` is
    resolved: fp32, amp or bf16. Raises `ConfigError` with all that is wrong in `zero.config`.
    """
    config: dict[str, Any] = {
        "train_batch_size": micro_batch_size * accumulation * world_size,
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": settings.clip_grad or 0.0,
        "bf16": {"enabled": precision == "bf16"},
        "torch_autocast": {"enabled": precision == "amp", "dtype": "bfloat16"},
        "zero_allow_untested_optimizer": True,  # Lion and SGD; every optimizer here works element by element
        "steps_per_print": None,
        "timers": {"throughput": {"enabled": False}},  # it would synchronise the device every step
        "zero_optimization": {"stage": settings.zero.stage,
                              **_sizes(numel, largest_block, settings.zero.stage, overlap=gpu and world_size > 1)},
    }
    if settings.zero.grad_accum_dtype != "auto":
        config["data_types"] = {"grad_accum_dtype": settings.zero.grad_accum_dtype}
    user = read_user_config(settings)
    problems = Problems(ConfigError, "zero.config cannot be used as it is:")
    check_user_config(user, problems)
    problems.raise_if_any()
    _merge(config, user)
    _check_zero_section(config["zero_optimization"])
    return config


def _sizes(numel: int, block: int, stage: int, *, overlap: bool) -> dict[str, Any]:
    """The table above."""
    whole = max(2, numel + numel % 2)  # DeepSpeed allocates buckets whole, and wants them even
    block = block or numel
    sizes: dict[str, Any] = {
        "reduce_bucket_size": min(_within(numel // 16 * 2, 5_000_000, 100_000_000), whole),
        "overlap_comm": overlap,
        "contiguous_gradients": True,
        "round_robin_gradients": False,  # only helps offloading
    }
    if stage < 3:
        return {**sizes, "allgather_bucket_size": min(200_000_000, whole)}
    prefetch = min(block, 100_000_000)
    live = _within(2 * block + prefetch, 100_000_000, 1_000_000_000)
    return {**sizes, "stage3_prefetch_bucket_size": prefetch, "stage3_max_live_parameters": live,
            "stage3_max_reuse_distance": live, "sub_group_size": 200_000_000,
            "stage3_param_persistence_threshold": _within(numel // 1000, 10_000, 100_000)}


def _within(value: int, low: int, high: int) -> int:
    return min(max(value, low), high)


def read_user_config(settings: EngineSettings) -> dict[str, Any]:
    """The mapping in `zero.config`, read from its JSON file where it names one; {} when there is none."""
    given = settings.zero.config
    if given is None:
        return {}
    if isinstance(given, dict):
        return copy.deepcopy(given)
    try:
        found = safe_io.read_json(given)
    except TubeletError as error:
        raise ConfigError(f"zero.config: {error.problem}", error.hint) from None
    if not isinstance(found, dict):
        raise ConfigError(f"zero.config: {given} holds a {type(found).__name__}, not a mapping.", "write {...} in it")
    return found


def check_user_config(user: dict[str, Any], problems: Problems) -> None:
    """Add a problem for every key of `zero.config` that is owned by us, not offered, or unknown."""
    for key, value in _leaves(user):
        if key in ("zero_optimization", "data_types"):
            problems.add(f"zero.config: `{key}` = {value!r} is no mapping.", f"`{key}: {{...}}`, or remove the key")
        elif key == "optimizer" and isinstance(value, dict) and str(value.get("type", "")).lower() == "muon":
            problems.add("zero.config: Muon is not offered: its momentum cannot be resumed at another stage or world size.",
                         "optimizer.name=adamw")
        elif key in OWNED:
            problems.add(f"zero.config: `{key}` = {value!r} is ours to set.", f"our setting instead: {OWNED[key]}")
        elif key in REFUSED:
            if value not in (None, False, 0) and not (key.endswith("hpz_partition_size") and value == 1):
                problems.add(f"zero.config: `{key}` = {value!r}: {REFUSED[key]}.", "remove the key")
        elif key.split(".")[0] not in ALLOWED:
            near = nearest(key, [*ALLOWED, *OWNED])
            hint = f"did you mean `{near[0]}`?" if near else f"keys that can be given: {', '.join(ALLOWED)}"
            problems.add(f"zero.config: `{key}` is not a key that DeepSpeed would act on here.", hint)


def _leaves(user: dict[str, Any]) -> list[tuple[str, Any]]:
    """(dotted key, value): two levels deep under `zero_optimization` and `data_types`, one level elsewhere."""
    found: list[tuple[str, Any]] = []
    for key, value in user.items():
        if key in ("zero_optimization", "data_types") and isinstance(value, dict):
            found += [(f"{key}.{inner}", item) for inner, item in value.items()]
        else:
            found.append((key, value))
    return found


def _merge(into: dict[str, Any], user: dict[str, Any]) -> None:
    for key, value in user.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value


def _check_zero_section(section: dict[str, Any]) -> None:
    """Let DeepSpeed's own model of the section judge names and types now, in our words, not on all ranks later."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from pydantic import ValidationError

    known = [field.alias or name for name, field in DeepSpeedZeroConfig.model_fields.items()]
    known += list(DeepSpeedZeroConfig.model_fields)
    problems = Problems(ConfigError)
    for name in section:
        if name not in known:
            near = nearest(name, known)
            problems.add(f"zero.config: `zero_optimization.{name}` is unknown to DeepSpeed.",
                         f"did you mean `{near[0]}`?" if near else "remove the key")
    problems.raise_if_any()
    try:
        DeepSpeedZeroConfig(**section)
    except ValidationError as error:
        for item in error.errors():
            place = ".".join(str(part) for part in item["loc"])
            problems.add(f"zero.config: `zero_optimization.{place}` = {item['input']!r}: {item['msg']}.",
                         "correct the value, or remove the key")
        problems.raise_if_any()
