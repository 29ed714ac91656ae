"""A checkpoint in DeepSpeed's own format, for people who go on without us: `tubelet ckpt export --to deepspeed`.

The files are DeepSpeed's business, so DeepSpeed writes them: as many processes as the other job will have ranks build its
engine around a module that has the checkpoint's names and shapes and computes nothing, load the state and call
`save_checkpoint`. No model code is needed, and no GPU. What the other job must have in common with ours to load it (the
parameter groups, their order, the optimizer) stands in `tubelet.json` and `README.md` beside the files.

    OUT/latest  OUT/zero_to_fp32.py  OUT/tubelet.json  OUT/README.md
    OUT/global_stepN/mp_rank_00_model_states.pt (and one a rank at stage 3)
    OUT/global_stepN/zero_pp_rank_R_mp_rank_00_optim_states.pt (bf16_zero_pp_... in bf16)

`python -m tubelet.engine.zero.stock ORDER`, one rank, is started by `export`. Not here: weights alone
(`checkpoint/export.py`).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

import tubelet
from tubelet import dist, files
from tubelet.engine.checkpoint import place
from tubelet.engine.checkpoint.folder import verify
from tubelet.engine.checkpoint.format import BUFFERS
from tubelet.engine.checkpoint.load import Source, restore
from tubelet.engine.zero.engine import _initialize
from tubelet.engine.zero.shards import InShards, Shards
from tubelet.errors import CheckpointError, TubeletError

OPTIMIZERS = ("AdamW", "Lion", "SGDW")
"""Class names of ours whose state the class of that name in torch or timm reads as its own."""


def export(folder: Path, out: Path, *, ranks: int = 1, stage: int | None = None) -> Path:
    """Write what `deepspeed.initialize(...)[0].load_checkpoint(out)` loads on `ranks` ranks at ZeRO `stage` (1, 2 or 3; None
    = the checkpoint's own, 1 where it has none): weights, moments, steps and hyper-parameters. Returns `out / tag`.

    One process calls it; it starts `ranks` others on this host, each of which builds the whole model once. The checkpoint
    is verified first. The moving average is no part of that format. `latest` is written last: without it nothing is loaded.
    Raises `CheckpointError`.
    """
    folder, out = place.place(folder), Path(out)
    problems = verify(folder)
    if problems:
        raise CheckpointError(f"{folder} is not whole, so it is not exported: {'; '.join(problems[:4])}.",
                              "another checkpoint of the run (`tubelet ckpt verify RUN --all`)")
    source = Source(folder)
    stage = int(stage or source.manifest["engine"]["stage"] or 1)
    _check(source, ranks, stage)
    target = out / f"global_step{source.manifest['step']}"
    if target.exists():
        raise CheckpointError(f"{target} is there already; files of another number of ranks would mix with the new ones.",
                              "remove it, or another folder for the export")
    out.mkdir(parents=True, exist_ok=True)
    order = {"folder": str(folder), "storage": dict(getattr(folder, "storage_options", {})), "out": str(out.absolute()),
             "tag": target.name, "stage": stage, "ranks": ranks}
    _run_ranks(order)
    files.write_json(out / "tubelet.json", _described(source, ranks, stage))
    files.write_atomic(out / "README.md", _readme(source, ranks, stage))
    files.write_atomic(out / "latest", target.name)
    return target


def _check(source: Source, ranks: int, stage: int) -> None:
    index = source.index
    if ranks < 1 or stage not in (1, 2, 3):
        raise CheckpointError(f"--ranks is {ranks} and --stage {stage}: at least one rank, and stage 1, 2 or 3.",
                              "--ranks 8 --stage 1")
    if index.optimizer not in OPTIMIZERS or any(info.shaped for info in index.flats):
        raise CheckpointError(f"The state of {index.optimizer} has no place in DeepSpeed's format: there each rank holds a "
                              f"cut of it, as {', '.join(OPTIMIZERS)} can have it.",
                              "--to safetensors, which takes the weights alone")
    if not index.shapes:
        raise CheckpointError(f"{source.folder} holds no trained parameters.", "--to safetensors")


def clipping(manifest: dict[str, Any]) -> float:
    """`clip_grad` of the run in DeepSpeed's words: 0 = none."""
    return (manifest.get("config") or {}).get("clip_grad") or 0.0


def _described(source: Source, ranks: int, stage: int) -> dict[str, Any]:
    manifest, index = source.manifest, source.index
    return {"step": manifest["step"], "samples": manifest.get("samples"), "ranks": ranks, "stage": stage,
            "precision": manifest["engine"]["precision"], "optimizer": index.optimizer,
            "groups": [{"hyper": group.hyper, "params": group.members} for group in index.groups],
            "frozen": list(index.frozen), "config": manifest.get("config")}


def _readme(source: Source, ranks: int, stage: int) -> str:
    manifest, optimizer = source.manifest, source.index.optimizer
    made = "torch.optim.AdamW" if optimizer == "AdamW" else f"timm.optim.{optimizer}"
    precision = ', "bf16": {"enabled": True}' if manifest["engine"]["precision"] == "bf16" else ""
    clip = clipping(manifest)
    scaled = ((manifest.get("config") or {}).get("optimizer") or {}).get("layer_decay", 1.0) != 1.0
    note = ("\nThis run trained with `optimizer.layer_decay`: each parameter had a learning rate of its own, which a group "
            "here does not say. Weights and moments are exact; the learning rates are yours to set.\n" if scaled else "")
    return (f"# Step {manifest['step']:,} in DeepSpeed's format\n\nFor {ranks} rank(s) at ZeRO stage {stage}, written by "
            f"DeepSpeed {version('deepspeed')}. Weights, moments, steps and hyper-parameters; no moving average.\n\n"
            "```python\nimport json, deepspeed, torch\n\nsaid = json.load(open(\"tubelet.json\"))\n"
            "names = dict(model.named_parameters())  # the same model; freeze what `said[\"frozen\"]` names\n"
            "groups = [{\"params\": [names[name] for name in group[\"params\"]]} for group in said[\"groups\"]]\n"
            f"engine, *_ = deepspeed.initialize(model=model, optimizer={made}(groups, lr=1e-3), config={{\n"
            f"    \"train_batch_size\": ..., \"gradient_clipping\": {clip}{precision},\n"
            "    \"zero_allow_untested_optimizer\": True,\n"
            f"    \"zero_optimization\": {{\"stage\": {stage}}}}})\n"
            "engine.load_checkpoint(\"THIS_FOLDER\")\n```\n"
            "\nGroups, their order and the order inside them must be these. `python zero_to_fp32.py . OUT` makes plain "
            f"weights.\nLoad it only if you trust where it comes from: these are pickles.\n{note}")


# ------------------------------------------------------------------------------------------------- the processes


def _run_ranks(order: dict[str, Any]) -> None:
    """One process a rank, all on this host's CPUs; an error in one ends all and is raised."""
    size = order["ranks"]
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    root = str(Path(tubelet.__file__).resolve().parent.parent)
    env = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "WORLD_SIZE": str(size),
           "LOCAL_WORLD_SIZE": str(size), "TORCHELASTIC_USE_AGENT_STORE": "True", "DS_ACCELERATOR": "cpu",
           "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])}
    words = [sys.executable, "-m", "tubelet.engine.zero.stock", json.dumps(order)]
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder) / f"{rank}" for rank in range(size)]
        ranks = [subprocess.Popen(words, env={**env, "RANK": str(rank), "LOCAL_RANK": str(rank)}, stdin=subprocess.DEVNULL,
                                  stdout=log.open("wb"), stderr=subprocess.STDOUT) for rank, log in enumerate(logs)]
        try:
            while any(process.poll() is None for process in ranks) and not any(process.poll() for process in ranks):
                time.sleep(0.05)
            if any(process.poll() for process in ranks):
                time.sleep(0.5)  # for the word of the others, which may be the better one
            failed = [(process.poll() or 0, log) for process, log in zip(ranks, logs) if process.poll()]
        finally:
            for process in ranks:
                process.kill()
                process.wait()
        if failed:
            raise _worded(failed)


def _worded(failed: list[tuple[int, Path]]) -> CheckpointError:
    for _, log in failed:
        for line in log.read_text(errors="replace").splitlines():
            if line.startswith('{"problem"'):
                return CheckpointError(**json.loads(line))
    code, log = failed[0]
    how = "was killed (out of memory, perhaps)" if code == -9 else f"ended with code {code}"
    tail = log.read_text(errors="replace").strip().splitlines()[-8:]
    return CheckpointError("\n".join([f"A process that writes DeepSpeed's files {how}:", *tail]),
                           "fewer --ranks, if memory is short: each builds the whole model")


def main(order: dict[str, Any]) -> None:
    """One rank of an export."""
    world = dist.resolve()
    device = dist.start(world)
    try:
        source = dist.together(lambda: Source(place.place(order["folder"], order["storage"])))
        engine = StockEngine(source, order["stage"], world, device)
        restore(source.folder, engine, None)  # type: ignore[arg-type]
        engine.count(source.manifest)
        engine.deepspeed.save_checkpoint(order["out"], tag=order["tag"], save_latest=False, client_state={
            "tubelet": json.loads(json.dumps({"step": source.manifest["step"], "state": source.manifest.get("state")}))})
    except TubeletError as error:
        print(json.dumps({"problem": error.problem, "hint": error.hint}), flush=True)
        sys.exit(1)
    finally:
        dist.stop()


# ------------------------------------------------------------------------------------------------- the engine


class StockEngine(InShards):
    """DeepSpeed's engine as anybody builds it, with as much of `Engine` as `restore` needs. All ranks build one."""

    kind, replicated = "zero", False

    def __init__(self, source: Source, stage: int, world: dist.World, device: torch.device):
        self.world, self.device, self.stage = world, device, stage
        self.precision = source.manifest["engine"]["precision"]
        self.module = skeleton(source)
        params = dict(self.module.named_parameters())
        self._shapes = dict(source.index.shapes)
        groups = [{"params": [params[name] for name in group.members], **_values(group.hyper)}
                  for group in source.index.groups if group.members]
        names = {param: name for name, param in params.items()}
        config = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1,
                  "zero_allow_untested_optimizer": True, "steps_per_print": None,
                  "gradient_clipping": clipping(source.manifest),  # it is saved, and a load goes by that
                  "bf16": {"enabled": self.precision == "bf16"}, "zero_optimization": {"stage": stage}}
        self.deepspeed = _initialize(self.module, _optimizer(source.index.optimizer, groups), config)
        self.optimizer = self.deepspeed.optimizer.optimizer
        self._shards = Shards(self.deepspeed.optimizer, stage, self.module, names, world.size)

    def count(self, manifest: dict[str, Any]) -> None:
        """DeepSpeed's own counters."""
        state = manifest.get("state") or {}
        self.deepspeed.global_steps = self.deepspeed.micro_steps = manifest["step"]
        self.deepspeed.global_samples = int(manifest.get("samples") or 0)
        self.deepspeed.skipped_steps = int(state.get("skipped_steps") or 0)


def skeleton(source: Source) -> nn.Module:
    """A module with the parameters and buffers of a checkpoint, all zero, by name and in their order. It has no forward."""
    root, index = nn.Module(), source.index
    for name in index.order:
        *path, leaf = name.split(".")
        owner = root
        for part in path:
            if part not in owner._modules:
                owner.add_module(part, nn.Module())
            owner = owner.get_submodule(part)
        if name in index.buffers:
            shape, dtype = source.reader.shape(BUFFERS, name), source.reader.dtype(BUFFERS, name)
            owner.register_buffer(leaf, torch.zeros(shape, dtype=dtype))
        else:
            values = torch.zeros({**index.shapes, **index.frozen}[name])
            owner.register_parameter(leaf, nn.Parameter(values, requires_grad=name in index.shapes))
    return root


def _values(hyper: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in hyper.items()}


def _optimizer(name: str, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    if name == "AdamW":
        return torch.optim.AdamW(groups)
    import timm.optim

    return getattr(timm.optim, name)(groups, lr=groups[0]["lr"])


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
