"""`tubelet data write`."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from tubelet.errors import DataError
from tubelet.files import human_bytes

IN = ("A folder of class folders (pictures, videos); a .csv, .tsv, .jsonl or .parquet with path and label; an .npz with "
      "images and labels; tars of others (a folder, x-{0000..0063}.tar, URLs); "
      "made-up:fractals?n=2000&size=64&classes=10&seed=0, "
      "made-up:digits?split=train&size=32, made-up:photos?n=200&size=64&classes=10, "
      "made-up:videos?n=40&size=48&frames=24&classes=5")


def write(source: Annotated[str, typer.Argument(metavar="IN", help=IN)],
          out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder of the shards; made, or empty")],
          shard_size: Annotated[int, typer.Option(help="Samples per shard")] = 5000,
          seed: Annotated[int, typer.Option(help="Of the permutation in which samples are packed", min=0)] = 0,
          name: Annotated[str | None, typer.Option(help="Shards are NAME-00000.tar; default: OUT's name")] = None,
          split: Annotated[str | None, typer.Option(help="Name of the split in _info.json")] = None,
          overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is there")] = False,
          processes: Annotated[int, typer.Option(help="Shards written side by side; same bytes for any number", min=1)] = 1,
          piece: Annotated[str | None, typer.Option(metavar="I/N", help="Write only the shards I, I + N, ... (I from 0), "
                           "e.g. $SLURM_ARRAY_TASK_ID/64; finished ones are kept. Then --finish")] = None,
          finish: Annotated[bool, typer.Option("--finish", help="Last step after all pieces: index, checksums, and OUT "
                            "gets its name")] = False,
          on_error: Annotated[Literal["stop", "skip"], typer.Option(help="What cannot be used: stop and list it, or leave "
                              "it out and name it in refused.jsonl")] = "stop",
          check: Annotated[bool, typer.Option("--check", help="Decode every sample")] = False,
          label: Annotated[str | None, typer.Option(help="Of tars: cls, txt or json:path.to.field")] = None,
          path_column: Annotated[str, typer.Option(help="Of lists: the column with the path")] = "path",
          label_column: Annotated[str, typer.Option(help="Of lists: the column with the label")] = "label",
          keep_columns: Annotated[str, typer.Option(metavar="A,B", help="Of lists: columns to keep in a json member")] = "",
          resize: Annotated[int | None, typer.Option(help="Short side of pictures at most, in pixels")] = None,
          format: Annotated[Literal["jpg", "webp", "png"] | None, typer.Option(help="Type of all pictures")] = None,
          quality: Annotated[int | None, typer.Option(help="Of jpg and webp, 1..100; 90 unless given")] = None,
          video_short_side: Annotated[int | None, typer.Option(help="Videos become H.264, short side at most this")] = None,
          keyframes: Annotated[int | None, typer.Option(help="Videos become H.264 with a keyframe every so many frames; 32 "
                               "unless given")] = None,
          crf: Annotated[int, typer.Option(help="Of videos: 0..51, smaller is better")] = 23,
          preset: Annotated[str, typer.Option(help="Of videos: x264's preset")] = "veryfast") -> None:
    """Write shards: permuted, indexed, checksummed, the same bytes for the same input, whole or not at all."""
    from data_pipelines.inputs import Columns
    from data_pipelines.transcode import Treatment
    from data_pipelines.write import finish_pieces, write_shards

    if finish and piece:
        raise DataError("`--finish` is a step of its own, after all pieces.", "--piece I/N on all machines, then --finish")
    if finish:
        index = finish_pieces(out, overwrite=overwrite, processes=processes)
        return _say(out, index, None)
    split = split or ("test" if source.startswith("made-up:") and "split=test" in source else "train")
    columns = Columns(path_column, label_column, tuple(filter(None, (column.strip() for column in keep_columns.split(",")))))
    begun = time.monotonic()
    report = write_shards(
        source, out, shard_size=shard_size, seed=seed, name=name, split=split, overwrite=overwrite, processes=processes,
        piece=_piece(piece), on_error=on_error, check=check, label=label, columns=columns,
        treatment=Treatment(resize, format, quality, video_short_side, keyframes, crf, preset))
    seconds = time.monotonic() - begun
    for note in report["notes"]:
        print(f"note: {note}")
    if piece is None:
        return _say(out, report, seconds)
    print(f"{out}, piece {piece}: {report['written']} of {report['shards']} shard(s) written now, {report['samples']} "
          f"samples, {human_bytes(report['bytes'])}{_speed(report['samples'], report['bytes'], seconds)}")


def _say(out: Path, index: dict[str, Any], seconds: float | None) -> None:
    speed = _speed(index["num_samples"], index["bytes"], seconds) if seconds else ""
    print(f"{out}: {index['num_samples']} samples in {len(index['shards'])} shard(s), {human_bytes(index['bytes'])}{speed}")
    refused = index.get("made", {}).get("refused", 0)
    if refused:
        print(f"{refused} sample(s) were refused; {out / 'refused.jsonl'} says which and why")


def _speed(samples: int, nbytes: int, seconds: float) -> str:
    return f"; {samples / seconds:.0f} samples/s, {nbytes / seconds / 1e6:.1f} MB/s" if samples else ""


def _piece(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None:
        raise DataError(f"`--piece` is {text}, must be I/N with I from 0 to N - 1.",
                        "--piece $SLURM_ARRAY_TASK_ID/64 with sbatch --array=0-63")
    return int(match[1]), int(match[2])
