"""The ledger of samples that did not decode: one line each, counted when a step consumes them, never before.

`ledger-rank-0000.jsonl` in the run's folder, one file per rank; a line is
`{x, source, shard, key, offset, error, substitute}`. Lines are keyed by the global sample number x: on resume, lines of
samples that are not consumed yet (x >= seen) are forgotten, also those of ranks that no longer exist.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tubelet import dist
from tubelet.errors import DataError
from tubelet.files import append_jsonl, read_jsonl, write_atomic

ENOUGH = 10  # bad samples below this number stop nothing: a small run would stop at its first one


class Ledger:
    """This rank's bad samples. Without a folder they are only counted."""

    def __init__(self, folder: str | Path | None, rank: int, max_bad_fraction: float, world_size: int = 1):
        self.folder = Path(folder) if folder is not None else None
        self.rank, self.world_size, self.max_bad_fraction = rank, world_size, max_bad_fraction
        self._waiting: list[dict[str, Any]] = []  # consumed, not written yet
        self._sources: dict[str, int] = {}

    def add(self, rows: Iterable[dict[str, Any]]) -> None:
        """Rows of a consumed micro-batch; written at the next audit."""
        for row in rows:
            self._waiting.append(row)
            self._sources[row["source"]] = self._sources.get(row["source"], 0) + 1

    def forget(self, seen: int) -> None:
        """Go back to a position: rows with x >= seen are dropped, the others counted anew.

        Each rank does this for its own file and for those of vanished ranks whose number is its own modulo W.
        """
        self._waiting, self._sources = [row for row in self._waiting if row["x"] < seen], {}
        for row in self._waiting:
            self._sources[row["source"]] = self._sources.get(row["source"], 0) + 1
        for path in self._files():
            rows = read_jsonl(path)
            kept = {row["x"]: row for row in rows if row["x"] < seen}  # by x: written twice is still one sample
            if len(kept) != len(path.read_text().splitlines()):
                write_atomic(path, "".join(json.dumps(row) + "\n" for row in kept.values()))
            for row in kept.values():
                self._sources[row["source"]] = self._sources.get(row["source"], 0) + 1

    def audit(self, seen: int) -> dict[str, float]:
        """Write what waits and sum over ranks. All ranks call it, and all raise `DataError` alike when over budget."""
        if self._waiting and self.folder is not None:
            append_jsonl(self._path(self.rank), self._waiting)
        last, self._waiting = self._waiting[-1:] if self._waiting else [], []
        bad = round(dist.sums([float(sum(self._sources.values()))])[0])
        fraction = bad / seen if seen else 0.0
        if bad >= ENOUGH and bad > self.max_bad_fraction * seen:
            where = f" See {self.folder}/ledger-rank-*.jsonl." if self.folder is not None else ""
            shown = f" Sources on this rank: {self._sources}." if self._sources else ""
            shown += f" The latest: {last[0]['key']} in {last[0]['shard']}: {last[0]['error']}." if last else ""
            raise DataError(f"{bad} of {seen} samples did not decode ({fraction:.3%}); `data.max_bad_fraction` is "
                            f"{self.max_bad_fraction:g}.{shown}{where}",
                            "mend or leave out the shards named there (`tubelet data verify`), or raise "
                            "data.max_bad_fraction")
        return {"data/bad_samples": float(bad), "data/bad_fraction": fraction}

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
