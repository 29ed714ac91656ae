"""The ledger of samples that did not decode: one line each, counted when a step consumes them, never before.

`ledger-rank-0000.jsonl` in the run's folder, one file per rank; a line is
`{x, source, shard, key, offset, error, substitute}`. Lines are keyed by the global sample number x: on resume, lines of
samples that are not consumed yet (x >= seen) are forgotten, also those of ranks that no longer exist. `summary` words the
totals of a job, by source and kind of damage. Evaluation counts with a ledger without a folder.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tubelet import dist
from tubelet.errors import DataError
from tubelet.files import append_jsonl, read_jsonl, write_atomic

log = logging.getLogger(__name__)

ENOUGH = 10  # bad samples below this number stop nothing: a small run would stop at its first one
KINDS = 100  # (source, kind of damage) pairs that a rank keeps apart; a job has a handful
SHARDS = 500  # shards that a rank remembers per kind
SHOWN = 6  # kinds that the summary words


@dataclass
class _Kind:
    """Bad samples of one source with one kind of damage."""

    count: int = 0
    shards: set[str] = field(default_factory=set)


class Ledger:
    """This rank's bad samples. Without a folder they are only counted."""

    def __init__(self, folder: str | Path | None, rank: int, max_bad_fraction: float, world_size: int = 1):
        self.folder = Path(folder) if folder is not None else None
        self.rank, self.world_size, self.max_bad_fraction = rank, world_size, max_bad_fraction
        self._waiting: list[dict[str, Any]] = []  # consumed, not written yet
        self._kinds: dict[tuple[str, str], _Kind] = {}
        self._seen = 0  # at the last audit
        self._failed = False  # the last writing

    def add(self, rows: Iterable[dict[str, Any]]) -> None:
        """Rows of a consumed micro-batch; written at the next audit."""
        for row in rows:
            self._waiting.append(row)
            self._count(row)

    def forget(self, seen: int) -> None:
        """Go back to a position: rows with x >= seen are dropped, the others counted anew.

        Each rank does this for its own file and for those of vanished ranks whose number is its own modulo W.
        """
        self._waiting, self._kinds = [row for row in self._waiting if row["x"] < seen], {}
        for row in self._waiting:
            self._count(row)
        for path in self._files():
            rows = read_jsonl(path)
            kept = {row["x"]: row for row in rows if row["x"] < seen}  # by x: written twice is still one sample
            if len(kept) != len(path.read_text().splitlines()):
                write_atomic(path, "".join(json.dumps(row) + "\n" for row in kept.values()))
            for row in kept.values():
                self._count(row)

    def audit(self, seen: int) -> dict[str, float]:
        """Write what waits and sum over ranks. All ranks call it, and all raise `DataError` alike when over budget."""
        last = self._waiting[-1:]
        self._write()
        self._seen = seen
        mine: dict[str, int] = {}
        for (source, _), kind in self._kinds.items():
            mine[source] = mine.get(source, 0) + kind.count
        bad = round(dist.sums([float(sum(mine.values()))])[0])
        fraction = bad / seen if seen else 0.0
        if bad >= ENOUGH and bad > self.max_bad_fraction * seen:
            where = f" See {self.folder}/ledger-rank-*.jsonl." if self.folder is not None else ""
            shown = f" Sources on this rank: {mine}." if mine else ""
            shown += f" The latest: {last[0]['key']} in {last[0]['shard']}: {last[0]['error']}." if last else ""
            raise DataError(f"{bad} of {seen} samples did not decode ({fraction:.3%}); `data.max_bad_fraction` is "
                            f"{self.max_bad_fraction:g}.{shown}{where}",
                            "mend or leave out the shards named there (`tubelet data verify`), or raise "
                            "data.max_bad_fraction")
        return {"data/bad_samples": float(bad), "data/bad_fraction": fraction}

    def _write(self) -> None:
        """Append what waits. A disk that takes no more is no reason to end a job, which one rank's error would: it is said
        once, and the rows wait for the next time."""
        try:
            if self._waiting and self.folder is not None:
                append_jsonl(self._path(self.rank), self._waiting)
        except OSError as error:
            if not self._failed:
                log.warning("%s could not be written (%s); its lines wait in memory", self._path(self.rank),
                            error.strerror or error)
            self._failed = True
            return
        self._waiting, self._failed = [], False

    def summary(self) -> str | None:
        """The totals of the job in one line, e.g. "bad samples: 12 of 5,000,000 (0.00024 %): 9 image file is truncated
        (main, 3 shards), ..."; None when none was bad. All ranks call it and get the same, as of the last `audit`."""
        mine = [(*key, kind.count, sorted(kind.shards)) for key, kind in self._kinds.items()]
        total: dict[tuple[str, str], _Kind] = {}
        for source, what, count, shards in (row for rows in dist.gather(mine) for row in rows):
            kind = total.setdefault((source, what), _Kind())
            kind.count += count
            kind.shards.update(shards)
        if not total:
            return None
        bad = sum(kind.count for kind in total.values())
        ordered = sorted(total.items(), key=lambda item: (-item[1].count, item[0]))
        told = [f"{kind.count:,} {what} ({source}, {len(kind.shards):,} shard{'s' if len(kind.shards) > 1 else ''})"
                for (source, what), kind in ordered[:SHOWN]]
        rest = sum(kind.count for _, kind in ordered[SHOWN:])
        told += [f"{rest:,} of {len(ordered) - SHOWN} other kinds"] if rest else []
        share = f" of {self._seen:,} ({bad / self._seen * 100:.2g} %)" if self._seen else ""
        return f"bad samples: {bad:,}{share}: {', '.join(told)}"

    def _count(self, row: dict[str, Any]) -> None:
        key = str(row["source"]), kind_of(str(row["error"]))
        if key not in self._kinds and len(self._kinds) >= KINDS:
            key = key[0], "(other damage)"
        kind = self._kinds.setdefault(key, _Kind())
        kind.count += 1
        if len(kind.shards) < SHARDS:
            kind.shards.add(str(row["shard"]))

    def _path(self, rank: int) -> Path:
        assert self.folder is not None
        return self.folder / f"ledger-rank-{rank:04d}.jsonl"

    def _files(self) -> list[Path]:
        """The files that this rank answers for: its own, and those of former ranks."""
        if self.folder is None:
            return []
        found = [path for path in sorted(self.folder.glob("ledger-rank-*.jsonl"))
                 if path.stem.rpartition("-")[2].isdigit()]
        return [path for path in found if int(path.stem.rpartition("-")[2]) % self.world_size == self.rank]


def kind_of(error: str) -> str:
    """The kind of damage that an error tells of: its text without the numbers and names of one sample."""
    text = re.sub(r"'[^']*'|\"[^\"]*\"", "'...'", error.partition("\n")[0])
    text = re.sub(r"(?<![A-Za-z])-?\d[\d.,x]*", "#", text)
    return re.sub(r"^(OSError|RuntimeError|SyntaxError|ValueError): ", "", text)[:100].strip(" .") or "no reason given"
