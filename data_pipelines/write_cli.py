"""`tubelet data write`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tubelet.files import human_bytes


def write(source: Annotated[str, typer.Argument(metavar="IN", help="A folder of class folders; a .csv, .tsv or .jsonl with "
                            "path and label; an .npz with images and labels; made-up:fractals?n=2000&size=64&classes=10"
                            "&seed=0, made-up:digits?split=train&size=32, made-up:photos?n=200&size=64&classes=10")],
          out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder of the shards; made, or empty")],
          shard_size: Annotated[int, typer.Option(help="Samples per shard")] = 5000,
          seed: Annotated[int, typer.Option(help="Of the permutation in which samples are packed", min=0)] = 0,
          name: Annotated[str | None, typer.Option(help="Shards are NAME-00000.tar; default: OUT's name")] = None,
          split: Annotated[str | None, typer.Option(help="Name of the split in _info.json")] = None,
          overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is there")] = False) -> None:
    """Write shards from pictures: permuted, indexed, the same bytes for the same input, whole or not at all."""
    from data_pipelines.write import write_shards

    split = split or ("test" if source.startswith("made-up:") and "split=test" in source else "train")
    index = write_shards(source, out, shard_size=shard_size, seed=seed, name=name, split=split, overwrite=overwrite)
    print(f"{out}: {index['num_samples']} samples in {len(index['shards'])} shard(s), {human_bytes(index['bytes'])}")
