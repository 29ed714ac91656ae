"""`tubelet data`: write, index, verify and repair shards, look at them, and say how a run would read them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from data_pipelines.write_cli import write
from tubelet.files import human_bytes

if TYPE_CHECKING:
    from data_pipelines.verify import Report

app = typer.Typer(help="Write, index, verify and repair WebDataset shards; look at them before and while they are used.",
                  no_args_is_help=True, add_completion=False)

Target = Annotated[list[str], typer.Argument(metavar="SHARDS|CONFIG", help="Shards, or a recipe; key=value overrides it")]
Config = Annotated[str | None, typer.Option(help="A recipe whose settings are used, with SHARDS as its data")]
Shards = Annotated[list[str], typer.Argument(help="Shards: x-{0000..0063}.tar, a folder, URLs, made-up:...; several joined")]
IndexDir = Annotated[str | None, typer.Option(help="Folder for indexes that do not lie beside their shards")]
Label = Annotated[str | None, typer.Option(help="Where the label is: cls, txt or json:path.to.field")]
Processes = Annotated[int, typer.Option(help="Shards looked at side by side", min=1)]
Decode = Annotated[bool, typer.Option("--decode", help="Decode every picture too, of videos three frames")]
Duplicates = Annotated[bool, typer.Option("--duplicates", help="Look for samples with the same content")]
NumClasses = Annotated[int, typer.Option(help="Class numbers must be below this; 0: as classes.json says", min=0)]
ClassMap = Annotated[str | None, typer.Option(help="JSON file {raw label: class number}")]
Split = Annotated[str, typer.Option(help="Name of the split in _info.json")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there")]


app.command()(write)


@app.command("index")
def index_command(shards: Shards, index_dir: IndexDir = None, label: Label = None, overwrite: Overwrite = False,
                  split: Split = "train", processes: Processes = 1) -> None:
    """Index tars that somebody else wrote, from their headers; beside them, or in --index-dir (remote ones: there, or in
    the user's cache)."""
    from data_pipelines.indexing import build_index
    from data_pipelines.shards import read_index_json

    for path in build_index(shards, index_dir=index_dir, label=label or "cls", overwrite=overwrite, processes=processes,
                            split=split):
        index = read_index_json(path)
        print(f"{path}: {index['num_samples']} samples in {len(index['shards'])} shard(s), {human_bytes(index['bytes'])}")


@app.command()
def verify(shards: Shards, decode: Decode = False, duplicates: Duplicates = False, num_classes: NumClasses = 0,
           label: Label = None, class_map: ClassMap = None,
           checksums: Annotated[bool, typer.Option(help="Hash shards that a checksums.sha256 lists")] = True,
           index_dir: IndexDir = None, processes: Processes = 1, json: Json = False) -> None:
    """Check sizes, indexes, headers, labels (and content) of every sample; exit code 1 when anything is wrong."""
    from json import dumps

    from data_pipelines import verify as room

    report = room.verify(shards, index_dir=index_dir, label=label, class_map=class_map, num_classes=num_classes,
                         decode=decode, duplicates=duplicates, checksums=checksums, processes=processes)
    if not json:
        _print_verified(report, decode)
        return
    print(dumps(report.as_json(), indent=1))
    if report.num_problems:
        raise typer.Exit(1)


def _print_verified(report: Report, decode: bool) -> None:
    """The report on a screen. Ends the command with exit code 1 when anything is wrong."""
    from data_pipelines.info import class_rows
    from data_pipelines.verify import summary
    from tubelet.console import print_table

    rows = summary(report)
    print_table("Shards", ["shard", "samples", "bytes", "state"],
                [(name, samples, human_bytes(nbytes), state) for name, samples, nbytes, state in rows])
    if report.labels:
        print_table("Classes", ["class", "samples", "share"], class_rows(report.labels, report.classes))
    for shard in report.shards:
        for problem in shard.problems:
            print(f"problem: {shard.url}: {problem}")
        if shard.hidden:
            print(f"problem: {shard.url}: ... and {shard.hidden} more")
    for note in report.notes:
        print(f"note: {note}")
    total = sum(row[1] for row in rows)
    if report.num_problems:
        print(f"{report.num_problems} problem(s) in {total} samples of {len(rows)} shard(s)")
        raise typer.Exit(1)
    print(f"{total} samples of {len(report.labels)} classes in {len(rows)} shard(s) are well"
          + ("" if decode else "; pictures were not decoded (--decode)"))


@app.command()
def info(shards: Shards, label: Label = None, class_map: ClassMap = None,
         classes: Annotated[bool, typer.Option("--classes", help="Read every label and count the classes")] = False,
         probe: Annotated[int, typer.Option(help="Samples that are opened for their sizes", min=0)] = 64,
         index_dir: IndexDir = None, json: Json = False) -> None:
    """What shards hold: samples, bytes, classes, members, sizes, and the digest that a resume compares."""
    from json import dumps

    from data_pipelines import info as room
    from data_pipelines.index import open_source
    from data_pipelines.samples import Source
    from data_pipelines.settings import SourceSettings
    from tubelet.console import print_table

    rule = {"label": label} if label else {}  # else that of the index
    settings = SourceSettings.model_validate({"shards": shards, "class_map": class_map, **rule})
    source = Source(settings, open_source(settings, index_dir=index_dir))
    found = room.describe(source, classes=classes, probe=probe, index_dir=index_dir)
    if json:
        print(dumps(found.as_json(), indent=1))
        return
    print_table("Source", ["what", "value"], room.info_rows(found))
    if found.classes:
        print_table("Classes", ["class", "samples", "share"], room.class_rows(found.classes, found.names))


@app.command()
def plan(target: Target,
         nodes: Annotated[int, typer.Option(help="Nodes of the job", min=1)] = 1,
         gpus_per_node: Annotated[int, typer.Option(help="GPUs, hence ranks, of each", min=1)] = 1,
         global_batch: Annotated[int | None, typer.Option(help="global_batch_size; default: the recipe's", min=1)] = None,
         micro_batch: Annotated[int | None, typer.Option(help="micro_batch_size; default: the recipe's", min=1)] = None,
         workers: Annotated[int | None, typer.Option(help="data.workers; default: the recipe's", min=0)] = None,
         need: Annotated[float | None, typer.Option(help="Images/s that one GPU trains, for the bytes per second")] = None,
         cores: Annotated[int | None, typer.Option(help="CPU cores of a node; default: of this machine", min=1)] = None,
         shm_gb: Annotated[float | None, typer.Option(help="/dev/shm of a node in 1e9 bytes; default: free here")] = None,
         quality: Annotated[bool, typer.Option("--quality", help="Measure how well these shards are shuffled, too")] = False,
         plot: Annotated[str | None, typer.Option(help="With --quality: a picture of it, e.g. shuffle.png")] = None,
         index_dir: IndexDir = None, json: Json = False) -> None:
    """Do shards, lanes, workers, ranks and batch fit, and what to change? Exit code 1 when a job cannot run like this."""
    from dataclasses import replace
    from json import dumps

    from data_pipelines import plan as room
    from data_pipelines.recipe import parse_target, read_recipe
    from tubelet.console import print_table

    recipe = read_recipe(parse_target(target), index_dir)
    if workers is not None:
        recipe.data.workers = workers
    machine = room.this_machine(recipe.data.cache.folder)
    machine = replace(machine, cores=cores or machine.cores,
                      shm_bytes=machine.shm_bytes if shm_gb is None else int(shm_gb * 1e9))
    found = room.plan_data(
        recipe.data, nodes=nodes, gpus_per_node=gpus_per_node, global_batch_size=global_batch or recipe.global_batch_size,
        micro_batch_size=micro_batch or recipe.micro_batch_size, max_micro_batch_size=recipe.max_micro_batch_size,
        img_size=recipe.model.img_size, num_classes=recipe.model.num_classes, images_per_s=need, machine=machine)
    measured = None
    if (quality or plot) and found.runs:
        from data_pipelines.quality import measure_recipe

        measured = measure_recipe(recipe, global_batch or recipe.global_batch_size, found.micro_batch_size or 1)
    if json:
        print(dumps({**found.as_json(), **({"quality": measured.as_json()} if measured else {})}, indent=1))
    else:
        print_table("Plan", ["what", "value"], room.plan_rows(found))
        if measured:
            print_table(measured.title, measured.columns, measured.rows())
        for item in found.advice:
            print(f"{'problem' if item.fatal else 'warning'}: {item.problem}\n  Try: {item.hint}")
        print("this job can run" if found.runs else "this job cannot run")
    if plot and measured:
        from data_pipelines.quality import draw

        draw([measured], plot)
    if not found.runs:
        raise typer.Exit(1)


@app.command()
def repair(shards: Shards,
           out: Annotated[str, typer.Argument(metavar="OUT", help="New folder of the good samples")],
           decode: Decode = False, duplicates: Duplicates = False, num_classes: NumClasses = 0, label: Label = None,
           class_map: ClassMap = None, split: Split = "train", index_dir: IndexDir = None, processes: Processes = 1) -> None:
    """Write shards again without what is wrong in them (listed in OUT/removed.jsonl); the originals stay as they are."""
    from data_pipelines import repair as room

    found = room.repair(shards, out, index_dir=index_dir, label=label, class_map=class_map, num_classes=num_classes,
                        decode=decode, duplicates=duplicates, split=split, processes=processes)
    print(f"{out}: {found.kept} samples kept, {found.removed} left out (see removed.jsonl), {found.regrouped} brought "
          f"together, {found.renamed} renamed")
    if found.dropped_shards:
        print(f"nothing good was left of {len(found.dropped_shards)} shard(s): {', '.join(found.dropped_shards[:10])}")
    _print_verified(found.report, decode)


@app.command()
def preview(target: Target,
            out: Annotated[str, typer.Option(help="The picture")] = "preview.png",
            config: Config = None,
            count: Annotated[int, typer.Option(help="Samples", min=1)] = 32,
            first: Annotated[int, typer.Option(help="Global sample number of the first one", min=0)] = 0,
            seed: Annotated[int | None, typer.Option(help="Of order and augmentation; default: the recipe's", min=0)] = None,
            original: Annotated[bool, typer.Option("--original", help="Each sample as it is, beside it")] = False,
            index_dir: IndexDir = None) -> None:
    """Draw samples as a model will see them, after augmentation, with their labels."""
    from data_pipelines import preview as room
    from data_pipelines.recipe import parse_target, read_recipe

    recipe = read_recipe(parse_target(target, config), index_dir)
    if seed is not None:
        recipe.seed = seed
    tiles = room.preview(recipe, out, count=count, first=first, original=original)
    bad = [tile for tile in tiles if tile.bad]
    for tile in bad:
        print(f"bad: {tile.key} of {tile.shard}: {tile.bad}; a substitute is shown")
    print(f"{out}: {len(tiles)} samples from number {tiles[0].x} on")


@app.command()
def bench(target: Target, config: Config = None,
          workers: Annotated[int | None, typer.Option(help="data.workers; default: the recipe's", min=0)] = None,
          batches: Annotated[int, typer.Option(help="Micro-batches that are measured", min=1)] = 8,
          need: Annotated[float | None, typer.Option(help="Samples/s that one GPU trains")] = None,
          index_dir: IndexDir = None, json: Json = False) -> None:
    """Where the time of a batch goes: fetch, decode, augment, collate, transfer; what a GPU of --need samples/s wants."""
    from json import dumps

    from data_pipelines import bench as room
    from data_pipelines.recipe import parse_target, read_recipe
    from tubelet.console import print_table

    recipe = read_recipe(parse_target(target, config), index_dir)
    found = room.bench(recipe, batches=batches, workers=workers, need=need)
    if json:
        print(dumps({**found.as_json(), "verdict": room.verdict(found)}, indent=1))
        return
    print_table(f"{found.samples} samples in micro batches of {found.micro_batch_size}, "
                f"{human_bytes(found.sample_bytes)} each", ["stage", "CPU ms", "wall ms", "share"], room.bench_rows(found))
    if found.throughput is not None:
        print(f"loader with {found.workers} worker(s): {found.throughput:,.0f} samples/s; first micro batch after "
              f"{found.first_seconds:.2f} s")
    if found.bad:
        print(f"note: {found.bad} samples did not decode and are left out")
    for line in room.verdict(found):
        print(line)
