"""A checkpoint as ordinary weights: safetensors plus timm's `config.json`, for timm, fine-tuning and other people.

Tensors are read, cast and written one at a time, so a model of any size is exported in the memory of its largest tensor
(and of its copy, where that is cast or lies in several pieces).
"""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path
from typing import Any, Literal

import torch

from tubelet import files
from tubelet.engine.checkpoint import place
from tubelet.engine.checkpoint.folder import verify
from tubelet.engine.checkpoint.format import BUFFERS, MANIFEST
from tubelet.engine.checkpoint.load import Source, which_weights
from tubelet.engine.checkpoint.tensors import Entry, image
from tubelet.errors import CheckpointError

WEIGHTS = "model.safetensors"
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def export(folder: Path, out: Path, *, which: Literal["weights", "ema", "auto"] = "auto",
           dtype: Literal["fp32", "bf16"] = "fp32", max_file_bytes: int = 5 * 10**9) -> Path:
    """Write `out/model.safetensors`, `config.json` and a small `README.md`; returns `out`. One process calls it.

    `timm.create_model("local-dir:OUT", pretrained=True)` then rebuilds the model (after `import tubelet.models`, if the
    architecture is one of ours). `which="auto"` takes the moving average if there is one. Above `max_file_bytes` the
    weights are cut into several files with the usual index beside them, which Tubelet reads and timm does not.
    The checkpoint is verified first; raises `CheckpointError` if it is damaged.
    """
    folder, out = place.place(folder), local_folder(out)
    if dtype not in _DTYPES:
        raise CheckpointError(f"`dtype` is {dtype!r}; it is fp32 or bf16.", "dtype=fp32")
    problems = verify(folder)
    if problems:
        raise CheckpointError(f"{folder} is not whole, so it is not exported: {'; '.join(problems[:4])}.",
                              "another checkpoint of the run (`tubelet ckpt verify RUN --all`)")
    source = Source(folder)
    kind = which_weights(source, which)
    config = hub_config(source)
    out.mkdir(parents=True, exist_ok=True)
    written = _write_weights(source, out, kind, _DTYPES[dtype], max_file_bytes)
    files.write_json(out / "config.json", config)
    files.write_atomic(out / "README.md", _card(source, config, kind, dtype, written))
    return out


def local_folder(named: str | Path) -> Path:
    """Where an export goes. Raises `CheckpointError` for a URL, which would become a local folder `s3:`, and for a folder of
    the run's own, whose README.md and config an export would replace."""
    out = Path(named)
    if "://" in str(named) or out.parts[:1] and re.fullmatch(r"[a-z0-9+]{2,}:", out.parts[0]):  # a Path has lost a slash
        raise CheckpointError(f"An export is written to a folder on a disk, and {named} is a URL.",
                              "a local folder, which you then copy there (aws s3 cp --recursive, gsutil -m cp -r)")
    if (out / MANIFEST).exists():
        raise CheckpointError(f"{out} is itself a checkpoint.", "another folder for the export")
    if (out / "attempts").is_dir() or any(out.glob("step-*/")):
        raise CheckpointError(f"{out} is the folder of a run, whose README.md an export would replace.",
                              f"another folder for the export, such as {out / 'export'}")
    return out


def _entries(source: Source, kind: Literal["master", "ema"], dtype: torch.dtype) -> list[Entry]:
    entries = []
    for name in source.index.order:
        if name in source.index.buffers:
            entries.append(Entry(name, source.reader.dtype(BUFFERS, name), source.reader.shape(BUFFERS, name),
                                 lambda name=name: source.reader.tensor(BUFFERS, name)))
        else:
            entries.append(Entry(name, dtype, source.shapes()[name],
                                 lambda name=name: source.full(kind, name).to(dtype)))
    return entries


def _write_weights(source: Source, out: Path, kind: Literal["master", "ema"], dtype: torch.dtype,
                   max_file_bytes: int) -> list[str]:
    shards: list[list[Entry]] = [[]]
    for item in _entries(source, kind, dtype):
        if shards[-1] and sum(other.nbytes for other in shards[-1]) + item.nbytes > max_file_bytes:
            shards.append([])
        shards[-1].append(item)
    for old in [*out.glob("model-*-of-*.safetensors"), *out.glob(f"{WEIGHTS}*")]:
        old.unlink()  # of an earlier export: another number of files would leave a mixture
    names = [WEIGHTS] if len(shards) == 1 else [f"model-{n:05d}-of-{len(shards):05d}.safetensors"
                                                for n in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards):
        temporary = out / f"{name}.tmp"
        _write_file(temporary, shard)
        os.replace(temporary, out / name)
    if len(shards) > 1:
        files.write_json(out / f"{WEIGHTS}.index.json", {
            "metadata": {"total_size": sum(item.nbytes for shard in shards for item in shard)},
            "weight_map": {item.name: name for name, shard in zip(names, shards) for item in shard}})
    files.fsync_dir(out)
    return names


@torch.no_grad()
def _write_file(path: Path, entries: list[Entry]) -> None:
    """Tensor by tensor, and fsynced. Unlike a checkpoint's files it is not hashed, which would keep several in memory."""
    header, places, _ = image(entries, {"format": "pt"})
    with open(path, "wb") as file:
        file.write(header)
        for item, _ in places:
            value = item.read()
            assert tuple(value.shape) == item.shape and value.dtype == item.dtype, item.name
            if value.numel():
                file.write(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)
            del value  # before the next one is read
        file.flush()
        os.fsync(file.fileno())


def hub_config(source: Source) -> dict[str, Any]:
    """timm's `config.json`, from the manifest: its own `hub_config` if the program saved one, with the picture settings
    of `model_cfg`; else from `model_cfg` and the run's model settings."""
    manifest = source.manifest
    pictures = dict(manifest.get("model_cfg") or {})
    model = (manifest.get("config") or {}).get("model") or {}
    config = dict(manifest.get("hub_config") or {})
    architecture = config.get("architecture") or pictures.pop("architecture", None) or model.get("name")
    if not architecture:
        raise CheckpointError(f"{source.folder}: the manifest does not say which model this is, so no config.json can be "
                              "written.", "a checkpoint that `tubelet pretrain` or `tubelet finetune` wrote")
    if "model_args" not in config:
        config["model_args"] = dict(model.get("kwargs") or {})
        if model.get("img_size") and any(name.endswith("pos_embed") for name in source.index.order):
            size = model["img_size"]
            config["model_args"]["img_size"] = [size, size] if isinstance(size, int) else list(size)
    pictures = {**(config.get("pretrained_cfg") or {}), **pictures}
    pictures.pop("architecture", None)
    pictures["custom_load"] = False  # the file holds timm's own names
    classes = pictures.get("num_classes", model.get("num_classes"))
    config |= {"architecture": str(architecture).split(".")[0], "num_classes": classes}
    pool = config["model_args"].get("global_pool", pictures.get("global_pool"))
    if pool is not None:
        config.setdefault("global_pool", pool)
    config["pretrained_cfg"] = {**pictures, "num_classes": classes}
    return config


def _card(source: Source, config: dict[str, Any], kind: str, dtype: str, written: list[str]) -> str:
    manifest, cfg = source.manifest, config["pretrained_cfg"]
    count = sum(math.prod(shape) for shape in source.shapes().values())
    samples = f", {manifest['samples']:,} samples" if manifest.get("samples") else ""
    weights = "moving average of the weights" if kind == "ema" else "weights"
    if len(written) == 1:
        use = ('```python\nimport timm\nimport tubelet.models  # registers our architectures\n\n'
               'model = timm.create_model("local-dir:PATH/TO/THIS/FOLDER", pretrained=True)\n```\n')
    else:
        use = (f"The weights are in {len(written)} files with `{WEIGHTS}.index.json`; `init.weights=THIS/FOLDER` of "
               "Tubelet reads them. timm wants one file: export again with a larger `--max-file-gb`.\n")
    pictures = "".join(f"- {key}: {cfg[key]}\n" for key in ("input_size", "mean", "std", "crop_pct", "interpolation")
                       if cfg.get(key) is not None)
    return (f"---\nlibrary_name: timm\n---\n# {config['architecture']}\n\n"
            f"{weights[0].upper()}{weights[1:]} after {manifest['step']:,} steps{samples}; {count:,} parameters, {dtype}, "
            f"{config['num_classes']} classes.\n\nPictures go in as:\n\n{pictures}\n{use}\n"
            f"Exported by Tubelet {manifest['versions'].get('tubelet', '?')} from `{source.folder.parent.name}/"
            f"{source.folder.name}`.\n\n<details><summary>Settings of the run</summary>\n\n```json\n"
            f"{json.dumps(manifest.get('config') or {}, indent=1)}\n```\n</details>\n")
