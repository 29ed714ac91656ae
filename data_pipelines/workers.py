"""Work done ahead of time by forked processes, results in order: what both loaders stand on.

Built on torch's DataLoader (queues, shared memory, pinning), with the behaviour of the processes made explicit:

* they ignore TERM, USR1, USR2 and INT, which schedulers send to whole process groups: a worker that dies of one would
  take the training with it while it saves. They leave when their parent asks (its TERM) or is gone;
* what goes wrong in one of them comes back as an error with the sample it was at, raised where the result is fetched:
  never from a signal handler in the middle of a backward pass or a save, as torch's own handler for dead children does;
* one that dies or gives nothing is named with its exit signal, its sample and its Python stack;
* closing takes seconds, whatever they are at: who does not leave by himself is killed.

Forked, not spawned or served by a fork server. Measured with two workers in a process that has torch, DeepSpeed and
timm: a fork starts in 0.05-0.1 s, whatever the size of the index, which it shares; a fork server with the modules
preloaded in 0.7 s (1.0-1.5 s with 100,000 shards, whose list is pickled to each worker) after a first start of 5 s, with
45-70 MB more per worker and 500 MB for the server; spawning takes 8 s. Evaluation pays that each time. What makes a fork
unsafe is kept out of the workers: they never touch CUDA or a process group, have one thread in torch (OpenMP's pool does
not survive a fork), do not touch torch's default generator (its lock may be held at the fork), open files and clients of
their own, and print and flush nothing on their way out. NCCL asks the InfiniBand driver for fork support itself. One
thing cannot be kept out: a thread of C++ (gloo's, say) that takes the interpreter's lock for the first time holds, for
some nanoseconds, a lock that a forked Python waits for before anything else (CPython 3.11). Such a child never begins.
It is known by that, and the workers are forked anew with the tasks that have no answer yet.
"""

from __future__ import annotations

import ctypes
import faulthandler
import functools
import glob
import itertools
import logging
import math
import multiprocessing
import multiprocessing.context
import multiprocessing.sharedctypes
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from tubelet.errors import DataError, TubeletError

log = logging.getLogger(__name__)

_IGNORED = {signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT}
_ASK = signal.SIGQUIT  # asks a worker for its stack, as it does of a Java machine

BEGIN_SECONDS = 30.0  # a worker begins in a tenth of a second; on a machine out of breath, in some
BEGINNINGS = 4  # how often workers are forked anew because one never began; each may take twice as long as the one before
TICK_SECONDS = 2.0  # while waiting, how often it is looked whether a worker died
CLOSE_SECONDS = 1.5  # workers may finish the sample they are at, then they are killed

_trim_heap = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it
_slot: Any = None  # in a worker: where it writes down the sample it is at, in memory shared with the parent
_PID, _SAMPLE, _SINCE = range(3)  # of a slot; _SINCE is 0 while the worker has nothing to do


def working_on(x: int) -> None:
    """Write down which sample this process is at, for the error if it dies or stalls."""
    if _slot is not None:
        _slot[_SAMPLE], _slot[_SINCE] = x, time.monotonic_ns()


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
            if _slot is not None:
                _slot[_SINCE] = time.monotonic_ns()
            return self.function(task)
        except TubeletError as error:
            return _Failure(type(error), error.problem, error.hint)
        except Exception as error:
            where = f" at sample {_slot[_SAMPLE]}" if _slot is not None else ""
            return _Failure(DataError, f"Loading failed{where} with {type(error).__name__}: {error}\n"
                            + traceback.format_exc(), "report it with the text above")
        finally:
            if _slot is not None:
                _slot[_SINCE] = 0
                _trim()


def stream(function: Callable[[Any], Any], tasks: Iterable[Any], *, workers: int, prefetch: int = 2,
           pin_memory: bool = False, describe: Callable[[int], str] = str,
           timeout: float | None = None, give_up: Callable[[], bool] = lambda: False) -> Iterator[Any]:
    """function(task) for every task, in order; `tasks` may be endless and is walked in this process.

    `workers` = 0 computes here. `prefetch` tasks per worker are handed out ahead. `describe` words the sample number that
    a dead worker was at. `timeout`: seconds to wait for a result before the workers count as stalled, which raises
    `DataError` (None: for ever). `give_up` is asked every `TICK_SECONDS` that a result is waited for (not with 0 workers);
    when it says yes, the stream ends there. Close the iterator (or drop it) to end the workers: it takes a few seconds at
    most.
    """
    from torch import Generator
    from torch.utils.data import DataLoader

    rest, handed = iter(tasks), deque[Any]()

    def hand(tasks: Iterable[Any]) -> Iterator[Any]:
        for task in tasks:
            handed.append(task)
            yield task

    for number in range(BEGINNINGS + 1):
        crew = _Crew(workers, describe, timeout, give_up)
        unanswered = list(handed)
        handed.clear()
        loader = DataLoader(
            _Work(function), batch_size=None, sampler=hand(itertools.chain(unanswered, rest)),  # type: ignore[arg-type]
            collate_fn=_as_it_is, num_workers=workers, prefetch_factor=prefetch if workers else None, pin_memory=pin_memory,
            timeout=min(TICK_SECONDS, timeout or TICK_SECONDS) if workers else 0,
            multiprocessing_context=_Context(crew) if workers else None,
            worker_init_fn=functools.partial(_enter, crew=crew),
            generator=Generator())  # of its own: a new iterator would draw from the training's generator otherwise
        crew.begin(_start(loader), BEGIN_SECONDS * 2**number if number < BEGINNINGS else None)
        try:
            while True:
                try:
                    result = crew.wait()
                except StopIteration:
                    return
                except _NeverBegan as stuck:
                    log.warning("%s; its kind is forked anew", stuck)
                    break
                handed.popleft()
                if isinstance(result, _Failure):
                    raise result.kind(result.problem, result.hint)
                yield result
        finally:
            crew.end()


class _NeverBegan(Exception):
    """A worker that was forked has not run a line of Python."""


class _Crew:
    """The workers of one stream, as their parent sees them: who is at which sample, who died, who stalls."""

    def __init__(self, workers: int, describe: Callable[[int], str], timeout: float | None, give_up: Callable[[], bool]):
        self.describe, self.timeout, self.give_up = describe, timeout, give_up
        self.slots = multiprocessing.sharedctypes.RawArray(ctypes.c_int64, 3 * max(workers, 1))
        # One file for all their stacks, without a name: nothing is left behind. The children inherit its descriptor.
        self.stacks = tempfile.TemporaryFile(buffering=0) if workers else None
        self.iterator: Any = None  # held here alone: a local of a function would live on in the traceback of its error
        self.processes: Sequence[Any] = []
        self.begin_until = math.inf

    def begin(self, iterator: Iterator[Any], seconds: float | None) -> None:
        """`seconds`: a worker that has not begun by then never will; None = that is not asked."""
        self.iterator, self.processes = iterator, list(getattr(iterator, "_workers", []))
        self.begin_until = time.monotonic() + seconds if seconds else math.inf

    def wait(self) -> Any:
        """The next result. Raises `DataError` when a worker has died, or none gave it in time, `_NeverBegan` when one never
        ran, and `StopIteration` at the end or when it was given up."""
        begun = time.monotonic()
        while True:
            try:
                return next(self.iterator)
            except (RuntimeError, OSError, EOFError) as error:  # the last two: it died while it handed a tensor over
                lost = None if "timed out after" in str(error) else self._died(error)
            if lost is not None:
                raise lost  # here, where it has no context: torch's error would keep the queues open
            if self.give_up():
                raise StopIteration
            if time.monotonic() > self.begin_until:
                for process, at in zip(self.processes, range(0, len(self.slots), 3)):
                    if not self.slots[at + _PID]:
                        raise _NeverBegan(f"loader process {process.pid} has not begun ({_kernel_state(process.pid)})")
                self.begin_until = math.inf
            if self.timeout and time.monotonic() - begun >= self.timeout:
                raise self._stalled()

    def end(self) -> None:
        """End the workers: torch asks and joins one after the other, each up to 5 s, so a timer kills them all before."""
        iterator, self.iterator = self.iterator, None
        shut_down = getattr(iterator, "_shutdown_workers", None)
        if shut_down is None:  # computed in this process
            return
        timer = threading.Timer(CLOSE_SECONDS, self._kill)
        timer.daemon = True
        if sys.is_finalizing():  # the program ends with this stream still open: a thread would never start, nor torch wait
            shut_down = self._kill
        else:
            timer.start()
        try:
            shut_down()
        finally:
            timer.cancel()
            for process in self.processes:  # killed between making a shared tensor and unlinking its name
                for name in glob.glob(f"/dev/shm/torch_{process.pid}_*"):
                    with suppress(OSError):
                        os.unlink(name)
            self.processes = []
            if self.stacks is not None:
                self.stacks.close()

    def _kill(self) -> None:
        for process in self.processes:
            if process.exitcode is None:
                with suppress(OSError):
                    os.kill(process.pid, signal.SIGKILL)

    def _died(self, error: Exception) -> Exception:
        until = time.monotonic() + 1.0
        while not (dead := [p for p in self.processes if p.exitcode is not None]) and time.monotonic() < until:
            time.sleep(0.05)
        if not dead and "in pin memory thread" in str(error):
            return error  # of the device, not of the loader
        if not dead:
            return DataError(f"The loader processes gave no batch: {type(error).__name__}: {error}",
                             "the error says what ran out (open files: `ulimit -n`; shared memory: `df /dev/shm`); "
                             "data.workers=0 shows an error of a process in this one")
        told, hints = [], []
        for process in dead:
            x = next((self.slots[i + _SAMPLE] for i in range(0, len(self.slots), 3)
                      if self.slots[i + _PID] == process.pid), -1)
            name = _signal_name(process.exitcode)
            hints.append(_HINTS.get(name, ""))
            told.append(f"process {process.pid}" + (f", last at {self._worded(x)}" if x >= 0 else "")
                        + (f", killed by {name}" if name else f", with exit code {process.exitcode}"))
        stack = self._written(0)
        return DataError(f"A loader process died: {'; '.join(told)}." + (f"\n{stack}" if stack else ""),
                         "; ".join(dict.fromkeys(filter(None, hints))) or "data.workers=0 shows the error in this process")

    def _stalled(self) -> Exception:
        now, told, stacks = time.monotonic_ns(), [], []
        for process, at in zip(self.processes, range(0, len(self.slots), 3)):
            x, since = self.slots[at + _SAMPLE], self.slots[at + _SINCE]
            what = f"process {process.pid}"
            if not self.slots[at + _PID]:
                what += " has not begun"
                stacks.append(f"Process {process.pid}: {self._stack(process.pid)}")
            elif since:
                what += f" since {(now - since) / 1e9:.0f} s" + (f" at {self._worded(x)}" if x >= 0 else " at a batch")
                stacks.append(f"Process {process.pid}: {self._stack(process.pid)}")
            else:
                what += " is idle" + (f", last at {self._worded(x)}" if x >= 0 else "")
            told.append(what)
        return DataError(f"The loader gave no batch for {self.timeout:g} s (`data.worker_timeout_seconds`): "
                         + "; ".join(told) + "." + "".join(f"\n{stack}" for stack in stacks),
                         "the stack says whether storage hangs or a decoder never ends; the run goes on where it stopped "
                         "when it is started again; data.worker_timeout_seconds=... waits longer")

    def _worded(self, x: int) -> str:
        """describe(x), unless that takes too long: it may read an index from the storage that hangs."""
        found = [f"sample {x}"]

        def ask() -> None:
            with suppress(Exception):  # the number must do
                found.append(self.describe(x))

        thread = threading.Thread(target=ask, daemon=True)
        thread.start()
        thread.join(5.0)
        return found[-1]

    def _stack(self, pid: int) -> str:
        """Ask a living worker for its Python stack; faulthandler answers from a C signal handler, without the GIL."""
        assert self.stacks is not None
        size = os.fstat(self.stacks.fileno()).st_size
        with suppress(OSError):
            os.kill(pid, _ASK)
        for _ in range(20):
            time.sleep(0.05)
            text = self._written(size)
            if text.endswith("\n") and text == self._written(size):
                return text
        return f"it does not answer ({_kernel_state(pid)})"

    def _written(self, start: int) -> str:
        if self.stacks is None:
            return ""
        handle = self.stacks.fileno()
        text = os.pread(handle, 20_000, start).decode(errors="replace")
        return text if len(text) < 20_000 else text[:20_000] + "..."


_HINTS = {
    "SIGKILL": "look for the out-of-memory killer (`dmesg`); data.workers=... or data.prefetch=1 take less memory",
    "SIGBUS": "/dev/shm is full (`df /dev/shm`; Docker: --shm-size) or a shard shrank while it was read; fewer "
              "data.workers or data.prefetch=1",
    "SIGSEGV": "a decoder crashed: try another data.decoder or data.video_decoder, and report the sample",
    "SIGABRT": "a decoder crashed: try another data.decoder or data.video_decoder, and report the sample",
}


def _signal_name(exitcode: int | None) -> str:
    try:
        return signal.Signals(-exitcode).name if exitcode is not None and exitcode < 0 else ""
    except ValueError:
        return f"signal {-exitcode}" if exitcode else ""


def _kernel_state(pid: int) -> str:
    """What Linux says of a process: `D (disk sleep)` is storage that hangs, `T (stopped)` a stop signal."""
    try:
        with open(f"/proc/{pid}/status") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("State"))
    except (OSError, StopIteration):
        return "its state is unknown"


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


class _Context(multiprocessing.context.ForkContext):
    """multiprocessing's "fork", with workers that prepare themselves before torch's code runs in them."""

    def __init__(self, crew: _Crew):
        super().__init__()
        self.crew = crew

    def Process(self, *args: Any, **kwargs: Any) -> _Worker:  # type: ignore[override]
        return _Worker(self.crew, os.getpid(), *args, **kwargs)


class _Worker(multiprocessing.context.ForkProcess):
    """One worker. The signals are blocked since before the fork, in every thread it will have."""

    def __init__(self, crew: _Crew, parent: int, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.crew, self.parent = crew, parent

    def run(self) -> None:
        import torch

        assert self.crew.stacks is not None
        faulthandler.disable()  # of the parent's; torch sets its own handlers over it
        faulthandler.register(_ASK, self.crew.stacks, all_threads=False)
        # Torch seeds its default generator first of all, and waits for ever when a thread of the parent was drawing from it
        # at the fork (seen: a start that hangs in torch.manual_seed). Here it seeds another one, which nothing uses.
        torch.random.default_generator = torch.Generator()
        threading.Thread(target=_watch, args=(self.parent,), daemon=True).start()
        super().run()


def _trim() -> None:
    """Give free memory back to the kernel. Decoded clips of changing size tear glibc's heap to pieces that it keeps (seen:
    1 MB more per clip, without end); mapping large arrays by themselves would cost a third more time per picture."""
    if _trim_heap is not None:
        _trim_heap(0)


def _enter(worker_id: int, *, crew: _Crew) -> None:
    """After torch's preparations, before the first task."""
    global _slot
    _slot = (ctypes.c_int64 * 3).from_buffer(crew.slots, 24 * worker_id)
    _slot[_PID], _slot[_SAMPLE], _slot[_SINCE] = os.getpid(), -1, 0
    assert crew.stacks is not None
    faulthandler.enable(crew.stacks, all_threads=False)


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
    os._exit(0)  # nothing is flushed: a thread of the parent may have held a lock of stderr at the fork
