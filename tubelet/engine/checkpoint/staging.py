"""The copy of a rank's state that is written while training goes on, and the handle of the process that writes it.

The copy lies in one anonymous piece of shared memory (a memfd: nothing in /dev/shm that a killed run could leave behind) as
the very bytes of the files, so the writer needs to know no tensors. It is made once and used again by every save; on a GPU
host it is page-locked, so that copies run at the speed of the bus. Not here: what is saved and when (`save.py`), and the
writing itself (`tubelet/engine/writer.py`).
"""

from __future__ import annotations

import json
import mmap
import os
import select
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import tubelet
from tubelet import dist, faults, files
from tubelet.engine import writer
from tubelet.engine.checkpoint.tensors import Entry, Plan
from tubelet.errors import CheckpointError
from tubelet.memory import available_memory

_PAGE = 4096
_VIEWS = 100_000  # remembered at most
_KILL_SECONDS = 10.0  # for a process to end that was killed
_SPARE = 1.02  # a little more than asked for, so that a longer header does not make the buffer grow
_SHARE = 0.9  # of a host's available memory that the copies of its ranks may take: data workers grow too


class NoMemoryError(CheckpointError):
    """There is not enough memory for a copy of the state; saving without one is possible."""


@dataclass
class Outgoing:
    """A file to be written: safetensors of `entries` under `header`, or just `header` (then it is any file)."""

    name: str
    header: bytes
    places: list[tuple[Entry, int]] = field(default_factory=list)
    size: int = 0
    before: str | None = None
    """Fault point passed before the file is opened."""
    point: str | None = None
    """Fault point passed when the file is half written."""

    @classmethod
    def tensors(cls, name: str, plan: Plan, metadata: dict[str, str], point: str | None = None) -> Outgoing:
        header, places, size = plan.image(metadata)
        return cls(name, header, places, size, point=point)

    @classmethod
    def text(cls, name: str, text: str, before: str | None = None) -> Outgoing:
        data = text.encode()
        return cls(name, data, size=len(data), before=before)


def _cuda() -> Any:
    return torch.cuda.cudart()


def size_for(count: int) -> int:
    """Bytes of the buffer that is made for `count` bytes of files."""
    return -(-int(count * _SPARE) // _PAGE) * _PAGE


def need_memory(count: int) -> int:
    """Whether every host can hold the copies of all its ranks, `count` bytes of files on this one. All ranks call it before
    any of them takes memory: each would see less than there was, and a host with enough for all seem too small.

    Returns the number of ranks on this host. Raises `NoMemoryError` on all ranks alike.
    """
    host = socket.gethostname()
    everyone = dist.gather((host, size_for(count), available_memory()))
    short = []
    for name in dict.fromkeys(name for name, _, _ in everyone):
        own = [(size, free) for other, size, free in everyone if other == name]
        wanted, free = sum(size for size, _ in own), min(free for _, free in own)
        if wanted > _SHARE * free:
            short.append(f"{name}: {files.human_bytes(wanted)} for {len(own)} rank(s), {files.human_bytes(free)} available")
    if short:
        more = f" and {len(short) - 3} more hosts" if len(short) > 3 else ""
        raise NoMemoryError(f"The memory for a copy of the state is lacking ({'; '.join(short[:3])}{more}).")
    return sum(name == host for name, _, _ in everyone)


class Staging:
    """The buffer. `sharers` ranks of this host are assumed to want as much at the same time when it must grow."""

    def __init__(self, device: torch.device, sharers: int = 1):
        self.device, self.sharers = device, sharers
        self.memory = os.memfd_create("tubelet-checkpoint")
        self.size = 0
        self._pinned = False
        self._views: dict[tuple[int, int, torch.dtype], torch.Tensor] = {}
        self._mapped: mmap.mmap | None = None
        self._bytes = torch.empty(0, dtype=torch.uint8)

    def reserve(self, count: int) -> None:
        """Room for `count` bytes; raises `NoMemoryError` when it cannot be had (what is there stays usable). Call
        `need_memory` on all ranks before it is called for the first time."""
        if count <= self.size:
            return
        size = size_for(count)
        sharers = self.sharers if self.size else 1  # at first `need_memory` has asked, and others may have taken theirs
        free = available_memory()
        if (size - self.size) * sharers > free:
            raise _short(size, f"{files.human_bytes(free)} available")  # asking would wake the kernel's killer
        try:
            os.posix_fallocate(self.memory, 0, size)
            mapped = mmap.mmap(self.memory, size)
        except (OSError, OverflowError) as error:
            raise _short(size, str(error)) from None
        mapped.madvise(mmap.MADV_DONTFORK)  # workers that fork later do not keep it alive
        self._unpin()
        self._bytes = torch.frombuffer(mapped, dtype=torch.uint8)
        self._mapped, self.size = mapped, size
        self._views.clear()
        if self.device.type == "cuda":
            self._pin()

    @staticmethod
    def room(outgoing: list[Outgoing]) -> int:
        """Bytes that these files need, each from the beginning of a page."""
        return sum(-(-item.size // _PAGE) * _PAGE for item in outgoing)

    @torch.no_grad()
    def copy(self, outgoing: list[Outgoing]) -> list[dict[str, Any]]:
        """Put the files into the buffer; returns the writer's orders. `reserve(room(...))` comes first. When it returns,
        the tensors may change."""
        orders, begin = [], 0
        for item in outgoing:
            end = begin + item.size
            self._bytes[begin : begin + len(item.header)] = torch.frombuffer(bytearray(item.header), dtype=torch.uint8)
            for entry, place in item.places:
                if not entry.nbytes:
                    continue
                tensor, there = entry.read(), self._view(begin + place, entry.nbytes, entry.dtype)
                assert tensor.numel() == there.numel() and tensor.dtype == entry.dtype, entry.name
                (there if tensor.dim() == 1 else there.view(tensor.shape)).copy_(tensor, non_blocking=True)
            orders.append({"name": item.name, "begin": begin, "end": end, "before": item.before, "point": item.point})
            faults.point("stage.copy")
            begin = -(-end // _PAGE) * _PAGE
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return orders

    def _view(self, begin: int, count: int, dtype: torch.dtype) -> torch.Tensor:
        """Bytes of the buffer as a 1-D tensor; remembered, because an engine with thousands of tensors asks for the same
        ones at every save."""
        key = (begin, count, dtype)
        if key not in self._views:
            if len(self._views) > _VIEWS:
                self._views.clear()  # headers that change their length move everything
            self._views[key] = self._bytes[begin : begin + count].view(dtype)
        return self._views[key]

    def _pin(self) -> None:
        """Lock the pages, so that copies from the device run at the speed of the bus. A refusal (a low limit on locked
        memory) only makes them slower."""
        self._pinned = int(_cuda().cudaHostRegister(self._bytes.data_ptr(), self.size, 0)) == 0
        if not self._pinned:
            try:  # the refusal stays with CUDA as its last error, and the next kernel would be blamed for it
                torch.zeros(1, device=self.device)
            except RuntimeError:
                pass

    def _unpin(self) -> None:
        if self._pinned:
            self._pinned = False
            _cuda().cudaHostUnregister(self._bytes.data_ptr())

    def close(self) -> None:
        """Give the memory back."""
        if self.memory < 0:
            return
        self._unpin()
        self._views.clear()
        self._bytes, self._mapped, self.size = torch.empty(0, dtype=torch.uint8), None, 0
        os.close(self.memory)
        self.memory = -1


def _short(size: int, why: str) -> NoMemoryError:
    return NoMemoryError(f"The memory for a copy of the state is lacking ({socket.gethostname()}: "
                         f"{files.human_bytes(size)} for a rank, {why}).")


class Writer:
    """The writing process of this rank: started when there is work, and again when it has gone."""

    def __init__(self, staging: Staging):
        self.staging = staging
        self.process: subprocess.Popen[bytes] | None = None
        self._heard = b""
        self._answer: dict[str, Any] | None = None

    def hand(self, job: dict[str, Any]) -> None:
        """Begin a job. Whatever goes wrong, also now, is its answer."""
        self._answer = None
        line = json.dumps(job).encode() + b"\n"
        for _ in range(2):
            try:
                if self.process is None or self.process.poll() is not None:
                    self._start()
                assert self.process is not None and self.process.stdin is not None
                self.process.stdin.write(line)
                self.process.stdin.flush()
                return
            except BrokenPipeError:  # killed since the last save
                self.close()
            except OSError as error:
                self._answer = {"error": {"errno": error.errno, "text": f"no process for writing ({error})", "file": ""}}
                return
        self._answer = _gone(None)

    def _start(self) -> None:
        self.close()
        root = str(Path(tubelet.__file__).resolve().parent.parent)
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        words = [sys.executable, "-m", writer.__name__, str(self.staging.memory), str(os.getpid())]
        held = signal.pthread_sigmask(signal.SIG_BLOCK, writer.IGNORED)  # until the child ignores them
        try:
            self.process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd="/",
                                            pass_fds=[self.staging.memory],
                                            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)})
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, held)
        assert self.process.stdout is not None
        os.set_blocking(self.process.stdout.fileno(), False)

    def ready(self) -> bool:
        """The job is done, or has failed. Does not block."""
        return self._listen(0)

    def answer(self, timeout_seconds: float) -> dict[str, Any]:
        """The answer to the job: {"files": {name: {"bytes", "sha256"}}, "seconds"} or {"error": {"errno", "text", "file"}},
        also when the process is gone or does not answer within the time (then it is killed)."""
        until = time.monotonic() + timeout_seconds
        while not self._listen(0.5):
            if time.monotonic() > until:
                self.close()
                text = f"the writing process did not answer within {timeout_seconds:g} s"
                self._answer = {"error": {"errno": None, "text": text, "file": ""}}
        assert self._answer is not None
        return self._answer

    def _listen(self, seconds: float) -> bool:
        if self._answer is not None:
            return True
        process = self.process
        assert process is not None and process.stdout is not None, "no job was handed over"
        ended = process.poll() is not None  # asked before reading: what it said before it went still counts
        poll = select.poll()  # not `select`: that ends at handle 1023, and a rank of thousands has more of them
        poll.register(process.stdout, select.POLLIN)
        poll.poll(0 if ended else 1000 * seconds)
        data = process.stdout.read()
        self._heard += data or b""
        while self._answer is None and b"\n" in self._heard:
            line, _, self._heard = self._heard.partition(b"\n")
            if line.startswith(b"{"):  # else the site's start-up code has printed something
                self._answer = json.loads(line)
        if self._answer is None and (ended or data == b""):
            self._answer = _gone(process.wait())
            self.close()
        return self._answer is not None

    def close(self) -> None:
        """End the process; what it has not written stays unwritten."""
        process, self.process, self._heard = self.process, None, b""
        if process is None:
            return
        process.kill()
        try:
            process.wait(_KILL_SECONDS)
        except subprocess.TimeoutExpired:
            pass  # it waits for a disk that does not answer, where no signal reaches it; nobody publishes what it writes
        for pipe in (process.stdin, process.stdout):
            try:
                if pipe is not None:
                    pipe.close()
            except OSError:
                pass  # a line that nobody read


def _gone(code: int | None) -> dict[str, Any]:
    how = f"ended with code {code}" if code is None or code >= 0 else f"was killed by {signal.Signals(-code).name}"
    more = " (out of memory, perhaps)" if code == -signal.SIGKILL else ""
    return {"error": {"errno": None, "text": f"the writing process {how}{more}", "file": ""}}
