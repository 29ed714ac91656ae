"""`tubelet ckpt`: look at checkpoints, compare, verify, export and prune them. PATH is a run's folder or a checkpoint."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from tubelet.console import print_table
from tubelet.errors import EXIT_ERROR, CheckpointError, TubeletError
from tubelet.files import human_bytes

app = typer.Typer(help="Look at checkpoints, compare, verify, export and prune them. PATH is a run folder (then its newest "
                       "checkpoint is meant) or one of its checkpoints.", no_args_is_help=True, add_completion=False)

EXIT_DIFFERENT, EXIT_TROUBLE = 1, 2  # of `diff`, as the tool of that name has them

PathArgument = Annotated[str, typer.Argument(metavar="PATH", help="runs/NAME or runs/NAME/step-00001000, or a URL of such a "
                                             "place (s3://...; AWS_ENDPOINT_URL and the like in the environment)")]


@app.command()
def info(path: PathArgument) -> None:
    """What a checkpoint holds, and which others the run has."""
    from tubelet.engine.checkpoint import place
    from tubelet.engine.checkpoint.folder import newest, published, read_best, step_of
    from tubelet.engine.checkpoint.format import read_manifest
    from tubelet.engine.checkpoint.index import Index

    folder = newest(place.home(path))
    manifest, index = read_manifest(folder), Index.read(folder)
    engine, model = manifest["engine"], (manifest.get("config") or {}).get("model") or {}
    values = sum(math.prod(shape) for shape in {**index.shapes, **index.frozen}.values())
    rows: list[tuple[str, Any]] = [
        ("step", manifest["step"]), ("samples", manifest.get("samples")), ("written", manifest["created"]),
        ("engine", f"{engine['kind']}, stage {engine['stage']}, {engine['precision']}, {manifest['world_size']} rank(s)"),
        ("model", f"{model.get('name', '?')}, {len(index.shapes)} trained and {len(index.frozen)} frozen parameters, "
                  f"{values:,} values, {len(index.buffers)} buffers"),
        ("optimizer", f"{index.optimizer}, {len(index.groups)} group(s), " + (", ".join(
            dict.fromkeys(kind for flat in index.flats for kind in [*flat.kinds, *flat.shaped])) or "no state yet")),
        ("EMA", "yes" if index.ema else "no"),
        ("size", f"{human_bytes(sum(f['bytes'] for f in manifest['files'].values()))} in {len(manifest['files'])} files"),
        ("versions", ", ".join(f"{name} {version}" for name, version in manifest["versions"].items())),
    ]
    print_table(str(folder), ("what", "value"), rows)
    whole = published(folder.parent)
    others = [step.name for step in whole if step.name != folder.name]
    unfinished = [step.name for step in place.folders(folder.parent) if step_of(step) >= 0 and step not in whole]
    best = read_best(folder.parent)
    if others:
        print(f"others in {folder.parent}: {', '.join(others)}")
    if unfinished:
        print(f"unfinished saves: {', '.join(unfinished)}")
    if best:
        print(f"best: {best['folder']} ({best['metric']} {best['value']:g})")


@app.command()
def verify(
    path: PathArgument,
    all_: Annotated[bool, typer.Option("--all", help="every checkpoint of the run")] = False,
    quick: Annotated[bool, typer.Option(help="sizes and places only; do not read and hash every byte")] = False,
) -> None:
    """Check sizes, hashes and that every element of every parameter is there; exit code 1 on problems."""
    from tubelet.engine.checkpoint import place
    from tubelet.engine.checkpoint.folder import newest, published
    from tubelet.engine.checkpoint.folder import verify as verify_folder

    folders = published(place.home(path)) if all_ else [newest(place.home(path))]
    if not folders:
        raise CheckpointError(f"{path} holds no checkpoint.", "runs/NAME, a folder with step-* in it")
    rows, bad = [], 0
    for folder in folders:
        problems = verify_folder(folder, deep=not quick)
        bad += bool(problems)
        rows += [(folder.name, "damaged", problem) for problem in problems] or [(folder.name, "whole", "")]
    print_table(str(folders[0].parent), ("checkpoint", "is", "problem"), rows)
    if bad:
        raise typer.Exit(EXIT_ERROR)


@app.command()
def export(
    path: PathArgument,
    out: Annotated[str, typer.Argument(metavar="OUT", help="folder to write to, on a disk")],
    to: Annotated[str, typer.Option(help="safetensors (weights, for timm and others) or deepspeed (weights and optimizer, "
                                         "for DeepSpeed's own load_checkpoint)")] = "safetensors",
    which: Annotated[str, typer.Option(help="safetensors: ema, weights or auto (the average if there is one)")] = "auto",
    dtype: Annotated[str, typer.Option(help="safetensors: fp32 or bf16")] = "fp32",
    max_file_gb: Annotated[float, typer.Option(help="safetensors: cut the weights into files of at most this size")] = 5.0,
    ranks: Annotated[int | None, typer.Option(help="deepspeed: how many ranks will load it (1)")] = None,
    stage: Annotated[int | None, typer.Option(help="deepspeed: at which ZeRO stage, 1, 2 or 3 (the run's own)")] = None,
) -> None:
    """Write the weights for timm and others (model.safetensors, config.json, README.md), or everything in DeepSpeed's own
    format (`--to deepspeed`)."""
    from tubelet.engine.checkpoint import place
    from tubelet.engine.checkpoint.export import local_folder
    from tubelet.engine.checkpoint.folder import newest

    if to not in ("safetensors", "deepspeed"):
        raise CheckpointError(f"`--to {to}` is not a format that can be written; there are safetensors and deepspeed.",
                              "--to safetensors")
    given = {"--which": which != "auto", "--dtype": dtype != "fp32", "--max-file-gb": max_file_gb != 5.0} if (
        to == "deepspeed") else {"--ranks": ranks is not None, "--stage": stage is not None}
    if any(given.values()):
        said = ", ".join(name for name, there in given.items() if there)
        raise CheckpointError(f"{said}: has no meaning with `--to {to}`.",
                              "leave them out; DeepSpeed's format holds the weights themselves, all digits, one file a rank"
                              if to == "deepspeed" else "--to deepspeed, or leave them out")
    folder, there = newest(place.home(path)), local_folder(out)
    if to == "deepspeed":
        from tubelet.engine.zero.stock import export as write_stock

        written = write_stock(folder, there, ranks=1 if ranks is None else ranks, stage=stage)
        print(f"{folder} -> {written}: {', '.join(sorted(item.name for item in written.iterdir()))}; how to load it: "
              f"{there / 'README.md'}")
        return
    from tubelet.engine.checkpoint.export import export as write

    write(folder, there, which=which, dtype=dtype, max_file_bytes=int(max_file_gb * 10**9))  # type: ignore[arg-type]
    names = sorted(item.name for item in there.iterdir() if item.name.startswith(("model", "config", "README")))
    print(f"{folder} -> {there}: {', '.join(names)}")


@app.command()
def diff(
    a: Annotated[str, typer.Argument(metavar="A", help="runs/NAME (its newest checkpoint) or runs/NAME/step-00001000, or a "
                                                       "URL")],
    b: Annotated[str, typer.Argument(metavar="B", help="likewise; other engines and numbers of ranks are fine")],
    json_: Annotated[bool, typer.Option("--json", help="print everything as JSON")] = False,
    top: Annotated[int, typer.Option(min=0, help="how many of the most different tensors to name")] = 10,
) -> None:
    """What differs between two checkpoints. Exit code 0: the same state of training (settings and versions may differ);
    1: different; 2: an error."""
    from tubelet.engine.checkpoint import place
    from tubelet.engine.checkpoint.diff import diff as compare

    try:
        found = compare(place.home(a), place.home(b), top=top)
    except TubeletError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(EXIT_TROUBLE) from None
    if json_:
        print(json.dumps(found.to_json(), indent=1))
    else:
        found.show()
    if not found.equal:
        raise typer.Exit(EXIT_DIFFERENT)


@app.command()
def prune(
    path: Annotated[str, typer.Argument(metavar="RUN", help="runs/NAME, or the URL of a run's checkpoints")],
    keep_last: Annotated[int | None, typer.Option(min=1, help="newest verified checkpoints to keep (the run's own "
                                                              "keep_last)")] = None,
    keep_every: Annotated[int | None, typer.Option(min=0, help="keep steps that are multiples of this (the run's own "
                                                               "keep_every); 0 = no milestones are kept")] = None,
    keep_milestones: Annotated[int | None, typer.Option(min=1, help="of those keep the newest so many only (the run's own "
                                                                    "keep_milestones)")] = None,
    dry_run: Annotated[bool, typer.Option(help="say what would be removed")] = False,
) -> None:
    """Remove old checkpoints and saves that never finished, by the run's own rules unless others are given; those to be kept
    are verified first. The best one is kept."""
    from tubelet.engine.checkpoint import place
    from tubelet.engine.checkpoint.folder import prunable
    from tubelet.engine.checkpoint.folder import prune as remove

    run = place.home(path)
    if not place.folders(run) and not run.is_dir():
        raise CheckpointError(f"{path} is not a run folder.", "runs/NAME")
    rules = _rules(path, run)
    if keep_every is not None:
        rules |= {"keep_every": keep_every, "keep_milestones": None}  # other milestones than the run's: all of them
    rules |= {name: value for name, value in (("keep_last", keep_last), ("keep_milestones", keep_milestones)) if value}
    if rules["keep_last"] is None:
        raise CheckpointError(f"{path} does not say how many checkpoints its run keeps.", "--keep-last 3")
    if keep_milestones and not rules["keep_every"]:
        raise CheckpointError(f"--keep-milestones {keep_milestones} says how many of the milestones stay, and without "
                              "--keep-every there are none.", "--keep-every 10000, or leave it out")
    said = ", ".join(f"{name}={value}" for name, value in rules.items() if value)
    found = prunable(run, **rules)
    if not found:
        print(f"nothing to remove ({said})")
        return
    print(f"{'would remove' if dry_run else 'removing'} {', '.join(folder.name for folder in found)} ({said})", flush=True)
    if not dry_run:
        print(f"removed {', '.join(folder.name for folder in remove(run, **rules)) or 'none'}")


def _rules(path: str, run: Path) -> dict[str, Any]:
    """keep_last, keep_every and keep_milestones of a run, as its last start had them; None = not given or not known."""
    from tubelet.config import read_yaml
    from tubelet.engine.checkpoint import place
    from tubelet.engine.checkpoint.folder import published
    from tubelet.engine.checkpoint.format import read_manifest

    named, newest = place.place(path) / "config.yaml", published(run)[-1:]
    settings = read_yaml(named) if not place.is_remote(named) and named.is_file() else {}
    if "keep_last" not in settings and newest:  # a place outside the run's folder
        settings = read_manifest(newest[0]).get("config") or {}
    return {name: settings.get(name) for name in ("keep_last", "keep_every", "keep_milestones")}
