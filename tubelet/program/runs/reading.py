"""What the files of a run folder tell, read as little of as will do: a run of weeks logs a hundred thousand rows.

Everything here may be written by a job at this moment, or have been cut short by a kill: what cannot be parsed is passed
over. Nothing is written, and nothing imports torch (`tubelet.engine.checkpoint` does, so a checkpoint's manifest is read
here as the JSON it is; whether every byte of a checkpoint is right says `tubelet ckpt verify`).
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from tubelet.config import parse_yaml
from tubelet.errors import ConfigError
from tubelet.files import parse_jsonl

PIECE = 1 << 14
"""Bytes of the end of a file that are read first: about 25 rows of metrics."""

SEARCHED = 1 << 24
"""Bytes of the end of a file that are looked through for something rare: about 25,000 rows of metrics, in 10 ms."""
_SAVES = re.compile(rb'"ckpt/')
_BACK = re.compile(rb'"event": ?"(?:resume|rollback)"')

Row = dict[str, Any]


# ----------------------------------------------------------------------------------------------------- JSON lines


@dataclass
class Tail:
    """The last rows of a JSON-lines file, and where the next one begins."""

    rows: list[Row] = field(default_factory=list)
    offset: int = 0
    """Bytes up to the end of the last whole line."""
    inode: int = 0


def read_tail(path: Path, enough: Callable[[list[Row]], bool] = bool, *, only: re.Pattern[bytes] | None = None,
              most: int | None = None) -> Tail:
    """Rows from the end of a file, as many as it takes to be `enough`, at most those in `most` bytes (None: all), and `only`
    lines in which that is found. A missing file has none."""
    try:
        with open(path, "rb") as file:
            found = os.fstat(file.fileno())
            piece = PIECE
            while True:
                start = max(0, found.st_size - piece)
                file.seek(start)
                text = file.read(found.st_size - start)
                whole = text[:text.rfind(b"\n") + 1]  # the last line may be being written
                text = whole[whole.find(b"\n") + 1:] if start else whole
                rows = parse_jsonl(b"\n".join(filter(only.search, text.split(b"\n"))) if only else text)
                if enough(rows) or not start or (most and piece >= most):
                    return Tail(rows, start + len(whole), found.st_ino)
                piece *= 4
    except FileNotFoundError:
        return Tail()


def read_json(path: Path) -> Row:
    """A JSON file that holds a mapping; {} when it is missing or damaged."""
    try:
        found = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def number(row: Row, name: str) -> float | None:
    """A scalar of a row; None when there is none, or something else stands there. It may be NaN."""
    value = row.get(name)
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def whole(value: Any) -> int | None:
    """`value` when it is a count, else None."""
    return value if type(value) is int and value >= 0 else None


def time_of(row: Row) -> float | None:
    """When a row of metrics or an event was written, in seconds since 1970; None when it does not say."""
    found = number(row, "time")
    if found is None and isinstance(row.get("at"), str):
        with contextlib.suppress(ValueError):
            return datetime.fromisoformat(row["at"]).timestamp()
    return found


# ------------------------------------------------------------------------------------------------------- settings


def some_settings(path: Path, keys: Iterable[str]) -> Row:
    """The named top-level settings of a `config.yaml`; {} when there is none. Only their lines are parsed: a whole file
    takes 10 ms, and there may be hundreds."""
    try:
        text = path.read_text(errors="replace")
    except (FileNotFoundError, NotADirectoryError):
        return {}
    wanted = "|".join(map(re.escape, keys))
    blocks = re.findall(rf"^(?:{wanted}):.*\n?(?:[ \t].*\n?)*", text, re.M)
    try:
        found = getattr(yaml, "CSafeLoader", yaml.SafeLoader)("".join(blocks)).get_single_data()  # in C: ten times as quick
    except yaml.YAMLError:
        return {}
    return found if isinstance(found, dict) else {}


def all_settings(path: Path) -> Row:
    """All settings of a `config.yaml`; {} when there is none or it is damaged."""
    try:
        found = parse_yaml(path.read_text(errors="replace"))
    except (FileNotFoundError, NotADirectoryError, ConfigError):
        return {}
    return found if isinstance(found, dict) else {}


# ---------------------------------------------------------------------------------------------------- checkpoints


@dataclass(frozen=True)
class Checkpoint:
    """A published checkpoint, or one that a store holds and that only the log tells of."""

    name: str
    step: int
    time: float | None
    """When it was published, in seconds since 1970."""
    bytes: int = 0
    problem: str = ""
    """What is wrong with it as far as sizes tell; "" = its files are there in full length."""
    manifest: Row = field(default_factory=dict, compare=False, repr=False)


def checkpoint_place(folder: Path, settings: Row) -> str | Path:
    """Where a run's checkpoints lie: a folder, or the URL of a store, which is not asked."""
    kept = settings.get("checkpoint")
    given = kept.get("dir") if isinstance(kept, dict) else None
    if not isinstance(given, str) or not given:
        return folder
    protocol, separator, rest = given.partition("://")
    if not separator:
        return Path(given)
    return Path(rest) if protocol in ("file", "local") else given


def step_folders(place: Path) -> tuple[list[Path], list[Path]]:
    """(published checkpoints, saves that are being written or never finished), oldest first."""
    try:
        names = [entry.name for entry in os.scandir(place)]
    except (FileNotFoundError, NotADirectoryError):
        return [], []
    found = sorted((int(name[5:]), name) for name in names if re.fullmatch(r"step-\d{8,}", name))
    folders = [place / name for _, name in found]
    published = [path for path in folders if os.path.exists(path / "manifest.json")]
    return published, [path for path in folders if path not in published]


def read_checkpoint(folder: Path) -> Checkpoint:
    """A published checkpoint: its manifest, and whether its files have the sizes that it names."""
    step = int(folder.name[5:])
    try:
        written = os.stat(folder / "manifest.json").st_mtime
        sizes = {entry.name: entry.stat().st_size for entry in os.scandir(folder)}
    except FileNotFoundError:  # pruned meanwhile
        return Checkpoint(folder.name, step, None, problem="it was removed just now")
    manifest = read_json(folder / "manifest.json")
    files = manifest.get("files")
    if not isinstance(files, dict) or not all(isinstance(entry, dict) for entry in files.values()):
        return Checkpoint(folder.name, step, written, problem="its manifest.json is damaged")
    wrong = [name for name, entry in files.items() if sizes.get(name) != entry.get("bytes")]
    problem = f"{wrong[0]} is missing or cut short" if wrong else ""
    return Checkpoint(folder.name, step, written, sum(sizes.values()), problem, manifest)


def told_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest checkpoint that the files of a run tell of, for one that keeps them in a store."""
    back = read_tail(folder / "events.jsonl", only=_BACK, most=SEARCHED).rows
    read = whole(back[-1].get("step")) if back else None
    rows = read_tail(folder / "metrics.jsonl", lambda rows: logged_checkpoint(rows, read) is not None, only=_SAVES,
                     most=SEARCHED).rows
    found = logged_checkpoint(rows, read)
    if read is not None and (found is None or found.step < read):
        return Checkpoint(f"step-{read:08d}", read, None)
    return found


def logged_checkpoint(rows: Iterable[Row], read: int | None = None) -> Checkpoint | None:
    """The newest checkpoint in the log: begun (`ckpt/stall_seconds`) and later published (`ckpt/save_seconds`). The second
    row of one that the run has `read` since, to go on from it, was dropped then if it came at a later step."""
    begun: int | None = None
    found: Checkpoint | None = None
    for row in rows:
        if "ckpt/stall_seconds" in row:
            begun = whole(row.get("step"))
        if begun is not None and ("ckpt/save_seconds" in row or begun == read):
            found = Checkpoint(f"step-{begun:08d}", begun, time_of(row))
    return found


# ---------------------------------------------------------------------------------------------------------- words


def ago(seconds: float) -> str:
    """7500 -> '2 h'."""
    for unit, size in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= size * (2 if unit == "d" else 1):
            return f"{seconds / size:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"


def clock(seconds: float | None) -> str:
    """Seconds since 1970 -> '2026-11-21 12:31'."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds)) if seconds else "?"


def shown(value: float | None, form: str = ".4f") -> str:
    """A number for a table; "" for None."""
    if value is None:
        return ""
    if not math.isfinite(value) or value == 0 or form != ".4f" or 1e-3 <= abs(value) < 1e6:
        return f"{value:{form}}"
    return f"{value:.3e}"


def first_line(text: object, most: int = 100) -> str:
    """The first line of a text, cut to so many characters."""
    lines = str(text).strip().splitlines() or [""]
    return lines[0] if len(lines[0]) <= most else lines[0][:most - 3] + "..."
