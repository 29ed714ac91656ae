"""What an earlier `--calibrate` left behind."""

from __future__ import annotations

from pathlib import Path

from tubelet import safe_io
from tubelet.errors import ConfigError
from tubelet.program.plan.gpus import Gpu
from tubelet.program.plan.speed import Mfu
from tubelet.program.settings import ProgramSettings


def read_calibration(path: Path, settings: ProgramSettings, gpu: Gpu) -> tuple[Mfu | None, str]:
    """(its MFU, ""), or (None, why it was not taken); (None, "") when there is no file. Raises `ConfigError` for one that is
    not ours."""
    if not path.exists():
        return None, ""
    found = safe_io.read_json(path)
    if not isinstance(found, dict) or not {"gpu", "model", "mfu", "device"} <= found.keys():
        raise ConfigError(f"--calibration {path} is not what `tubelet plan --calibrate` writes.",
                          "another file, or move it away")
    if found["mfu"] is None or found["gpu"] != gpu.name or found["model"] != settings.model.name:
        return None, (f"{path} was measured with {found['model']} on {found['device']}: its MFU is not taken for "
                      f"{settings.model.name} on {gpu.name}.")
    return Mfu(float(found["mfu"]), f"measured on {found['device']} by --calibrate ({path})"), ""
