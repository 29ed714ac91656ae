"""Progress of long work: a bar on a terminal, now and then a plain line elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")

LINE_SECONDS = 10.0


def track(items: Iterable[T], total: int, what: str) -> Iterator[T]:
    """Yields the items and says on standard error how many of `total` are done; in a log nothing in the first 10 s."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import track as rich_track

        yield from rich_track(items, description=what, total=total, console=Console(stderr=True), transient=True)
        return
    begun = said = time.monotonic()
    for done, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now - said >= LINE_SECONDS:
            said = now
            left = (now - begun) / done * (total - done)
            print(f"# {what}: {done} of {total}, about {left:.0f} s left", file=sys.stderr, flush=True)
