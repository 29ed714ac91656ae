"""`tubelet plan CONFIG [key=value ...] --nodes N --gpus-per-node M --gpu h100`: does it fit, how fast, what does it need?"""

from __future__ import annotations

import importlib
import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from tubelet.config import read_yaml
from tubelet.errors import EXIT_ERROR, ConfigError, nearest
from tubelet.program.settings import Command, ProgramSettings, load_command, parse_command

PROGRAMS = {"pretrain": "PretrainSettings", "finetune": "FinetuneSettings"}
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def plan(
    context: typer.Context,
    config: Annotated[str, typer.Argument(help="a config of pretrain or finetune; key=value and --tiny as there")],
    nodes: Annotated[int, typer.Option(min=1, help="nodes")] = 1,
    gpus_per_node: Annotated[int, typer.Option(min=1, help="GPUs of a node, one rank each")] = 8,
    gpu: Annotated[str, typer.Option(help="h100, h100-pcie, h100-nvl, h200, h200-nvl, gh200, b200, a100, a100-40, l40s, "
                                          "l40, l4, a10, v100, rtx4090, rtx3090")] = "h100",
    gpu_memory: Annotated[float | None, typer.Option(min=1, help="GiB of a GPU, instead of the table's")] = None,
    margin: Annotated[float, typer.Option(help="share of memory left for fragmentation")] = 0.08,
    mfu: Annotated[float | None, typer.Option(min=0.01, max=1, help="what a run of this config logs as perf/mfu, instead of "
                                                   "an assumed share of the peak")] = None,
    calibration: Annotated[Path, typer.Option(help="what --calibrate writes; read when it is there")]
    = Path("calibration.json"),
    network_gbps: Annotated[float | None, typer.Option(min=0.01, help="GB/s that a node sends to others")] = None,
    disk_gbps: Annotated[float, typer.Option(min=0.001, help="GB/s that a node writes checkpoints with")] = 2.0,
    cores: Annotated[int | None, typer.Option(min=1, help="cores of a node, to judge the loader")] = None,
    images_per_core: Annotated[float | None, typer.Option(min=0.1, help="what `tubelet data bench` measured")] = None,
    program: Annotated[str, typer.Option(help="pretrain or finetune, where the config does not tell")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
    calibrate: Annotated[bool, typer.Option("--calibrate", help="run the real engine here on random batches, and print "
                                            "predicted against measured")] = False,
    seconds: Annotated[float, typer.Option(min=1, help="how long --calibrate runs")] = 60.0,
) -> None:
    """Say before a job whether it fits and what it needs, with no GPU: parameters and memory of a rank for every ZeRO stage,
    the largest micro-batch with and without activation checkpointing, speed, duration, checkpoints, network, data. Picks a
    stage and a micro-batch and says why. Exit code 1 when nothing fits."""
    command = parse_command([config, *context.args])
    settings = load_settings(command, program)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from tubelet.program.plan.gpus import find_gpu

    card = find_gpu(gpu, gpu_memory)
    if calibrate:
        _calibrate(settings, calibration, seconds, as_json)
        return
    _quiet_deepspeed()
    from tubelet.program.plan.choose import Geometry
    from tubelet.program.plan.make import Assumed, make_plan
    from tubelet.program.plan.show import as_json as to_json
    from tubelet.program.plan.show import show
    from tubelet.program.plan.speed import Mfu

    given = Mfu(mfu, "given by --mfu") if mfu is not None else None
    found = make_plan(settings, card, Geometry(nodes, gpus_per_node), Assumed(
        given, calibration, network_gbps, disk_gbps, cores, images_per_core, margin))
    if as_json:
        print(json.dumps(to_json(found), indent=1))
    else:
        show(found)
    if found.chosen is None:
        raise typer.Exit(EXIT_ERROR)


def load_settings(command: Command, program: str = "auto") -> ProgramSettings:
    """The settings of whichever program the config is for."""
    if program == "auto":
        program = program_of(command.config)
    if program not in PROGRAMS:
        close = nearest(program, PROGRAMS)
        raise ConfigError(f"--program {program} is neither pretrain nor finetune.",
                          f"--program {(close or ['pretrain'])[0]}")
    cls: Any = getattr(importlib.import_module(f"{program}.settings"), PROGRAMS[program])
    return load_command(cls, command).settings


def program_of(config: str) -> str:
    """By what is written in it, else by its folder: only fine-tuning knows `from_scratch` or begins from weights."""
    data = read_yaml(config)
    if "from_scratch" in data or (data.get("init") or {}).get("weights") or (data.get("init") or {}).get("from_run"):
        return "finetune"
    return "finetune" if "finetune" in Path(config).parts else "pretrain"


def _quiet_deepspeed() -> None:
    """A plan asks DeepSpeed for its checks of settings, for which it need not look for accelerators and say so."""
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def _calibrate(settings: ProgramSettings, path: Path, seconds: float, as_json: bool) -> None:
    from tubelet.program.plan.calibrate import calibrate, show_calibration

    found = calibrate(settings, seconds)
    if as_json:
        print(json.dumps(found, indent=1))
    else:
        show_calibration(found)
    path.write_text(json.dumps(found, indent=1) + "\n")
    if not as_json:
        print(f"\n{path} written: `tubelet plan` takes its MFU for the same job on the same GPU")
