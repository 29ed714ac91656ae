"""Work done ahead of time by forked processes, results in order: what both loaders stand on.

Built on torch's DataLoader (queues, shared memory, pinning), with the behaviour of the processes made explicit:

* they ignore TERM, USR1, USR2 and INT, which schedulers send to whole process groups: a worker that dies of one would
  take the training with it while it saves. They leave when their parent asks (its TERM) or is gone;
* what goes wrong in one of them comes back as an error with the sample it was at, raised where the result is fetched:
  never from a signal handler in the middle of a backward pass or a save, as torch's own handler for dead children does.

Forked rather than spawned: a fork shares the tables of the order and the imported decoders with its parent and starts in
milliseconds, which evaluation pays every time. Workers never touch a GPU.
"""

from __future__ import annotations

import ctypes
import functools
import multiprocessing.sharedctypes
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from tubelet.errors import DataError, TubeletError

_IGNORED = {signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT}

_slot: Any = None  # in a worker: where it writes down the sample it is at, in memory shared with the parent


def working_on(x: int) -> None:
    """Write down which sample this process is at, for the error if it dies."""
    if _slot is not None:
        _slot[1] = x


@dataclass(frozen=True)
class _Failure:
    """An exception on its way from a worker: torch would rebuild it from its text alone and lose the hint."""

    kind: type[TubeletError]
    problem: str
    hint: str


class _Work:
    """The function as the map-style data set that torch's DataLoader wants; its "index" is the task."""

    def __init__(self, function: Callable[[Any], Any]):
        self.function = function

    def __getitem__(self, task: Any) -> Any:
        try:
            return self.function(task)
        except TubeletError as error:
            return _Failure(type(error), error.problem, error.hint)
        except Exception as error:
            where = f" at sample {_slot[1]}" if _slot is not None else ""
            return _Failure(DataError, f"Loading failed{where} with {type(error).__name__}: {error}\n"
                            + traceback.format_exc(), "report it with the text above")


def stream(function: Callable[[Any], Any], tasks: Iterable[Any], *, workers: int, prefetch: int = 2,
           pin_memory: bool = False, describe: Callable[[int], str] = str) -> Iterator[Any]:
    """function(task) for every task, in order; `tasks` may be endless and is walked in this process.

    `workers` = 0 computes here. `prefetch` tasks per worker are handed out ahead. `describe` words the sample number that
    a dead worker was at. Close the iterator (or drop it) to end the workers.
    """
    from torch import Generator
    from torch.utils.data import DataLoader

    slots = multiprocessing.sharedctypes.RawArray(ctypes.c_int64, 2 * max(workers, 1))
    loader = DataLoader(
        _Work(function), batch_size=None, sampler=tasks, collate_fn=_as_it_is, num_workers=workers,  # type: ignore[arg-type]
        prefetch_factor=prefetch if workers else None, pin_memory=pin_memory,
        multiprocessing_context="fork" if workers else None,
        worker_init_fn=functools.partial(_enter, slots=slots, parent=os.getpid()),
        generator=Generator())  # of its own: a new iterator would draw from the training's generator otherwise
    iterator = _start(loader)
    try:
        while True:
            try:
                result = next(iterator)
            except StopIteration:
                return
            except RuntimeError as error:
                raise _dead(error, slots, describe) from None
            if isinstance(result, _Failure):
                raise result.kind(result.problem, result.hint)
            yield result
    finally:
        del iterator  # ends the workers: asks, waits, then sends TERM


def _start(loader: Any) -> Iterator[Any]:
    """iter(loader), with the signals already blocked when the processes are forked, and the parent's handlers kept."""
    if not loader.num_workers:
        return iter(loader)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _IGNORED)
    main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGCHLD)
    try:
        return iter(loader)
    finally:
        if main and before is not None:
            signal.signal(signal.SIGCHLD, before)  # torch's raises wherever the program happens to be
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _as_it_is(result: Any) -> Any:
    return result


def _enter(worker_id: int, *, slots: Any, parent: int) -> None:
    """First act of a worker. The signals are blocked since before the fork, in every thread it will have."""
    global _slot
    _slot = (ctypes.c_int64 * 2).from_buffer(slots, 16 * worker_id)
    _slot[0], _slot[1] = os.getpid(), -1
    threading.Thread(target=_watch, args=(parent,), daemon=True).start()


def _watch(parent: int) -> None:
    """Leave when the parent says so or is gone. Torch's own check runs only while a worker waits for tasks: one that is
    stuck in a full queue or in a read would outlive a killed parent."""
    wait = getattr(signal, "sigtimedwait", None)  # not on macOS
    while os.getppid() == parent:
        if wait is None:
            time.sleep(1.0)
            continue
        info = wait(_IGNORED, 1.0)
        if info is not None and info.si_signo == signal.SIGTERM and info.si_pid == parent:
            break
    sys.stderr.flush()
    os._exit(0)


def _dead(error: RuntimeError, slots: Any, describe: Callable[[int], str]) -> Exception:
    listed = re.search(r"pid\(?s?\)?:? ([\d, ]+)", str(error))
    if listed is None:
        return error
    at = dict(zip(slots[0::2], slots[1::2]))
    pids = [int(pid) for pid in re.findall(r"\d+", listed[1])]
    said = [f"process {pid}" + (f", last at {describe(at[pid])}" if at.get(pid, -1) >= 0 else "") for pid in pids]
    return DataError(f"A loader process died: {'; '.join(said)}.",
                     "look for the out-of-memory killer (`dmesg`) and at the size of /dev/shm; data.workers=... for "
                     "fewer processes; data.workers=0 shows the error of a sample that crashes its decoder")
