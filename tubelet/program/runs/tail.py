"""The last lines of a run, and the next ones as they come: `tubelet runs tail RUN [--follow]`.

Log lines and events are merged by the time they were written at. A new start of the run, or going back, writes
`metrics.jsonl` anew without the rows that no longer count: that is seen by the file's inode, and what was printed before is
not printed again.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tubelet.files import parse_jsonl
from tubelet.program.runs import reading
from tubelet.program.runs.reading import Row
from tubelet.program.runs.standing import SETTINGS, standing, total_steps
from tubelet.program.runs.told import event_words, row_words
from tubelet.redact import redact

POLL_SECONDS = 0.5


class Follower:
    """What is appended to a JSON-lines file, row by row, whatever happens to the file in between."""

    def __init__(self, path: Path, after: reading.Tail):
        self.path, self.offset, self.inode = path, after.offset, after.inode
        self.newest = max((reading.time_of(row) or 0.0 for row in after.rows), default=0.0)

    def read(self) -> list[Row]:
        """The rows that are new and whole since the last call."""
        try:
            with open(self.path, "rb") as file:
                found = os.fstat(file.fileno())
                anew = bool(self.inode) and (found.st_ino != self.inode or found.st_size < self.offset)
                self.inode, self.offset = found.st_ino, 0 if anew else self.offset
                file.seek(self.offset)
                text = file.read(found.st_size - self.offset)
        except FileNotFoundError:
            return []
        text = text[:text.rfind(b"\n") + 1]
        self.offset += len(text)
        rows = parse_jsonl(text)
        if anew:  # it begins with rows that were there before
            rows = [row for row in rows if (reading.time_of(row) or 0.0) > self.newest]
        self.newest = max([self.newest, *(reading.time_of(row) or 0.0 for row in rows)])
        return rows


class Lines:
    """The lines of one run, oldest first."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.unit = standing(folder).unit
        self.settings: Row = {}
        self.finished = False

    def words(self, row: Row) -> str:
        """A row of either file as a line; "" when it is not shown."""
        if "event" in row:
            self.finished = row["event"] == "end" and row.get("how") == "finished"
            text = event_words(row)
            if row["event"] == "start":
                self.settings = {}  # read again: it may be longer now
        else:
            self.settings = self.settings or reading.some_settings(self.folder / "config.yaml", SETTINGS)
            text = row_words(row, total_steps(self.settings, [row]), self.unit)
        moment = reading.time_of(row)
        when = time.strftime("%m-%d %H:%M:%S", time.localtime(moment)) if moment else " " * 14
        return redact(f"{when}  {text}") if text else ""

    def merged(self, *files: list[Row]) -> list[str]:
        """Rows of several files as lines in the order they were written; a row of no known time stays behind the one before
        it in its file."""
        timed = []
        for rows in files:
            last = 0.0
            for row in rows:
                last = reading.time_of(row) or last
                timed.append((last, row))
        timed.sort(key=lambda item: item[0])
        return [line for line in (self.words(row) for _, row in timed) if line]


def tail(folder: Path, count: int) -> tuple[list[str], Callable[[], Iterator[list[str]]]]:
    """(the last `count` lines, what follows them): the second gives lists of new lines for ever, and ends when the run has
    finished."""
    lines = Lines(folder)

    def is_enough(rows: list[Row]) -> bool:
        return sum(bool(row_words(row, None, "")) for row in rows) >= count

    metrics = reading.read_tail(folder / "metrics.jsonl", is_enough)
    events = reading.read_tail(folder / "events.jsonl", lambda rows: len(rows) >= count)
    followers = [Follower(folder / "metrics.jsonl", metrics), Follower(folder / "events.jsonl", events)]
    found = lines.merged(metrics.rows, events.rows)

    def follow() -> Iterator[list[str]]:
        while not lines.finished:
            new = lines.merged(*(follower.read() for follower in followers))
            if new:
                yield new
            elif not lines.finished:
                time.sleep(POLL_SECONDS)

    return found[-count:] if count else [], follow
