"""What an earlier `--calibrate` left behind, and whether it was measured with this job."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tubelet import safe_io
from tubelet.errors import ConfigError
from tubelet.program.plan.gpus import Gpu
from tubelet.program.plan.speed import Mfu
from tubelet.program.settings import ProgramSettings


def what_decides(settings: ProgramSettings, input_shape: tuple[int, ...], precision: str) -> dict[str, Any]:
    """What of a job decides its MFU on one device, as JSON has it: jobs that agree in it are one to a calibration."""
    recompute, compiled = settings.activation_checkpointing, settings.compile
    return {"model": settings.model.name, "input_shape": list(input_shape), "engine": settings.engine,
            "precision": precision, "recompute": recompute.model_dump() if recompute else None,
            "compile": compiled.model_dump() if compiled else None}


def read_calibration(path: Path, settings: ProgramSettings, gpu: Gpu, input_shape: tuple[int, ...],
                     precision: str) -> tuple[Mfu | None, str]:
    """(its MFU, ""), or (None, why it was not taken); (None, "") when there is no file. Raises `ConfigError` for one that is
    not ours."""
    if not path.exists():
        return None, ""
    found = safe_io.read_json(path)
    if not isinstance(found, dict) or not {"gpu", "model", "mfu", "device"} <= found.keys():
        raise ConfigError(f"--calibration {path} is not what `tubelet plan --calibrate` writes.",
                          "another file, or move it away")
    said = f"{path} was measured with {found['model']} on {found['device']}: its MFU is not taken"
    if found["mfu"] is None:
        return None, f"{said}, as none is known of that device."
    wanted = {"gpu": gpu.name, **what_decides(settings, input_shape, precision)}
    other = [f"{key} {_word(found.get(key, 'not recorded'))} there and {_word(value)} here" for key, value in wanted.items()
             if found.get(key, "not recorded") != value]
    if other:
        return None, f"{said}, since it was another job: {'; '.join(other)}."
    return Mfu(float(found["mfu"]), f"measured on {found['device']} by --calibrate ({path})"), ""


def _word(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(f"{key}={item}" for key, item in value.items())
    return " x ".join(map(str, value)) if isinstance(value, list) else "off" if value is None else str(value)
