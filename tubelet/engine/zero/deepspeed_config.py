"""The DeepSpeed configuration: what we derive from our settings, what `zero.config` may add, and what it may not.

A key is refused when one of our settings owns it, when what it turns on is not offered (the error says why), and when it
is none we know: DeepSpeed itself ignores unknown top-level keys without a word.
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

_BUCKET = 200_000_000  # elements in a reduce or gather bucket: 0.4 GB in bf16 each


def derive(settings: EngineSettings, precision: str, *, world_size: int, micro_batch_size: int, accumulation: int,
           numel: int) -> dict[str, Any]:
    """The configuration for `deepspeed.initialize`; `numel` is the number of trained elements (bounds the buckets).

    Raises `ConfigError` with all that is wrong in `zero.config`. `precision` is resolved: fp32, amp or bf16.
    """
    bucket = min(_BUCKET, max(2, numel + numel % 2))  # DeepSpeed allocates buckets whole, and wants them even
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
        "zero_optimization": {
            "stage": settings.zero.stage,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
            "contiguous_gradients": True,
            "round_robin_gradients": False,  # only helps offloading
            "stage3_prefetch_bucket_size": min(50_000_000, bucket),
        },
    }
    user = read_user_config(settings)
    problems = Problems(ConfigError, "zero.config cannot be used as it is:")
    check_user_config(user, settings.zero.stage, problems)
    problems.raise_if_any()
    _merge(config, user)
    _check_zero_section(config["zero_optimization"])
    return config


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


def check_user_config(user: dict[str, Any], stage: int, problems: Problems) -> None:
    """Add a problem for every key of `zero.config` that is owned by us, not offered, or unknown."""
    for key, value in _leaves(user):
        if key == "optimizer" and isinstance(value, dict) and str(value.get("type", "")).lower() == "muon":
            problems.add("zero.config: Muon is not offered: its momentum cannot be resumed at another stage or world size.",
                         "optimizer.name=adamw")
        elif key in OWNED:
            problems.add(f"zero.config: `{key}` = {value!r} is ours to set.", f"our setting instead: {OWNED[key]}")
        elif key in REFUSED:
            if value not in (None, False, 0) and not (key.endswith("hpz_partition_size") and value == 1):
                problems.add(f"zero.config: `{key}` = {value!r}: {REFUSED[key]}.", "remove the key")
        elif key == "data_types.grad_accum_dtype" and stage == 1:
            problems.add(f"zero.config: `{key}` = {value!r}: at stage 1 DeepSpeed would switch to another optimizer class, "
                         "whose state is laid out differently.", "zero.stage=2, or remove the key")
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
