"""Work on many shards by forked processes, for commands: results in order, and Ctrl-C or an error ends all of them at once.

Training has workers of its own (`workers.py`).
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

A = TypeVar("A")
B = TypeVar("B")


def in_processes(work: Callable[[A], B], items: Sequence[A], processes: int) -> Iterator[B]:
    """work(item) for every item, in order; in this process when one is enough."""
    if min(processes, len(items)) <= 1:
        yield from map(work, items)
        return
    with pool_of(min(processes, len(items))) as pool:
        yield from pool.map(work, items)


@contextmanager
def pool_of(processes: int, begin: Callable[..., None] | None = None, *words: Any) -> Iterator[ProcessPoolExecutor]:
    """Forked processes that each call begin(*words) first. Left by an exception it kills them, whatever they are at."""
    # Forked: what the parent has read is shared instead of pickled to every process. They hold one end of a pipe, which
    # tells them when the other one is closed, also because the parent was killed: waiting for work they would not see it.
    hears, alive = os.pipe()
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("fork"), _begin, (hears, alive, begin, words))
    try:
        yield pool
        pool.shutdown()
    finally:
        os.close(alive)
        pool.shutdown(cancel_futures=True)
        os.close(hears)


def _begin(hears: int, alive: int, begin: Callable[..., None] | None, words: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group: the parent says what happens
    os.close(alive)
    threading.Thread(target=_leave_with, args=(hears,), daemon=True).start()
    if begin is not None:
        begin(*words)


def _leave_with(hears: int) -> None:
    os.read(hears, 1)
    os._exit(1)
