"""How ranks tell each other where they are while their main threads may be blocked: a store and a thread of their own.

Rank 0 serves a TCPStore; the server is a C++ thread, which answers whatever Python does. Every `seconds` each rank sets one
key (about 60 bytes) and reads two: the alarm and rank 0's own beat; rank 0 alone reads all. Measured for one beat of 4096
ranks: 30 us of CPU time on each, and on rank 0's host 130 ms of the server and 30 ms of Python, so 1.6 % of one core at
10 s. Python's lock is held for about 20 ms of that.

A call to a store whose process is stopped never returns, whatever its time-out: that is why this thread does nothing
but talk, and why who judges (`tubelet.engine.watchdog`) only looks at what it left behind.
"""

from __future__ import annotations

import json
import math
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from types import FrameType
from typing import Any

from tubelet import dist
from tubelet.engine.phases import Phases

_MEETING = timedelta(seconds=60)
_COLLECTIVES = (os.path.join("torch", "distributed"), os.path.join("deepspeed", "comm"))


@dataclass(frozen=True)
class Beat:
    """What one rank said of itself. Times in seconds at the moment it spoke."""

    number: int = 0
    """Counts up: a beat that stays the same means a rank that fell silent."""
    step: int = 0
    name: str = "start"
    owner: str = "start"
    seconds: float = 0.0
    idle: float = 0.0
    """Time since its last progress (`Standing.idle`)."""
    place: str = ""
    """Where its main thread is, once it has been idle for half of `limit`."""
    collective: bool = False
    """Whether that place is a collective: it waits for others."""
    limit: float = math.inf
    """How long it may be idle."""
    left: bool = False
    """It has left the loop in good order and is not watched any more."""

    def encode(self) -> str:
        return json.dumps(list(self.__dict__.values()), separators=(",", ":"))

    @classmethod
    def decode(cls, raw: bytes) -> Beat:
        return cls(*json.loads(raw))


@dataclass
class Heard:
    """The last beat of a rank and when it came."""

    rank: int
    beat: Beat = field(default_factory=Beat)
    raw: bytes = b""
    at: float = 0.0

    def hear(self, raw: bytes, now: float) -> None:
        if raw != self.raw:
            self.raw, self.beat, self.at = raw, Beat.decode(raw), now

    def silent(self, now: float) -> float:
        """Seconds since it was last heard of."""
        return max(0.0, now - self.at)

    def idle(self, now: float) -> float:
        """Seconds without progress: of a silent rank nothing newer is known."""
        return self.beat.idle + self.silent(now)

    def late(self, now: float) -> bool:
        """Whether it has been idle for longer than it may."""
        return not self.beat.left and self.idle(now) >= self.beat.limit


def place_of(frame: FrameType | None) -> tuple[str, bool]:
    """(where a thread is in words, whether that is a collective): the innermost function of torch.distributed or of
    DeepSpeed's comm when there is one, else the innermost line."""
    inner = frame
    while frame is not None:
        code = frame.f_code
        if any(part in code.co_filename for part in _COLLECTIVES) and code.co_name != "wrapper":
            return code.co_name, True
        frame = frame.f_back
    if inner is None:
        return "", False
    return f"{os.path.basename(inner.f_code.co_filename)}:{inner.f_lineno} in {inner.f_code.co_name}", False


class Heartbeat:
    """This rank's side of the exchange. `open` is for all ranks together; the rest never blocks and never raises."""

    def __init__(self, phases: Phases, world: dist.World, seconds: float, limit: Callable[[], float]):
        self.phases, self.world, self.seconds, self.limit = phases, world, seconds, limit
        self.main = threading.main_thread().ident
        self.others: dict[int, Heard] = {}
        """What was heard: of every other rank on rank 0, of rank 0 on the others."""
        self.processes: list[tuple[str, int]] = []
        """(host, pid) of every rank."""
        self.alarm = False
        """Whether rank 0 has raised the alarm; every rank reads it."""
        self.token = ""
        """Equal on all ranks and different for every job, for names of files."""
        self._number, self._stop, self._wake = 0, False, threading.Event()
        self._store: Any = None
        self._thread = threading.Thread(target=self._run, name="tubelet-heartbeat", daemon=True)

    def open(self) -> None:
        """Meet at rank 0's store and begin. All ranks call it. A rank that cannot reach the store is not watched by the
        others, and a warning says so."""
        trouble = ""
        port, self.token = dist.broadcast((self._serve() if self.world.speaks else 0, time.strftime("%Y%m%d-%H%M%S")))
        if port and not self.world.speaks:
            trouble = self._connect(port)
        elif not port and self.world.size > 1:
            trouble = "rank 0 cannot open a port"
        if trouble and (port or self.world.speaks):  # a firewall between the hosts: training goes on, less well watched
            host = dist.host(self.world.rank)
            print(f"warning: rank {self.world.rank} on host {host} cannot reach the heartbeats of rank 0 ({trouble}): it is "
                  "not watched for hangs", flush=True)
        told = dist.gather((dist.host(self.world.rank), os.getpid(), self._store is not None))
        self.processes = [(name, pid) for name, pid, _ in told]
        now = time.monotonic()
        reached = [rank for rank, (_, _, reached) in enumerate(told) if reached and rank != self.world.rank]
        watched = reached if self.world.speaks else [rank for rank in reached if rank == 0]
        self.others = {rank: Heard(rank, at=now) for rank in watched}
        if self._store is not None and self.others:
            self._thread.start()

    def _serve(self) -> int:
        """Rank 0's store; returns its port, 0 when there is none."""
        from torch.distributed import TCPStore

        if self.world.size == 1:
            return 0
        try:
            self._store = TCPStore(self.world.address, 0, None, True, _MEETING, wait_for_workers=False)
            self._store.set("alarm", "0")
            self._store.set("beat/0", self._own().encode())
        except RuntimeError:
            self._store = None
        return self._store.port if self._store is not None else 0

    def _connect(self, port: int) -> str:
        from torch.distributed import TCPStore

        try:
            self._store = TCPStore(self.world.address, port, None, False, _MEETING, wait_for_workers=False)
            self._store.set(f"beat/{self.world.rank}", self._own().encode())
        except RuntimeError as error:
            self._store = None
            return str(error).splitlines()[0][:200]
        return ""

    def close(self) -> None:
        """Say goodbye and stop; waits at most two seconds for a thread that may be blocked in the network."""
        self._stop = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(2.0)

    def ring(self, alarm: bool) -> None:
        """Rank 0: raise or end the alarm; every rank hears of it at its next beat."""
        self.alarm = alarm
        self._wake.set()

    def _own(self, left: bool = False) -> Beat:
        now = self.phases.standing()
        place, collective, limit = "", False, self.limit()
        if now.idle > 0.5 * limit and self.main is not None:
            place, collective = place_of(sys._current_frames().get(self.main))
        self._number += 1
        return Beat(self._number, now.step, now.name, now.owner, round(now.seconds, 1), round(now.idle, 2), place,
                    collective or now.name == "wait", limit, left)

    def own(self) -> Heard:
        """This rank, as heard this moment."""
        return Heard(self.world.rank, self._own(), at=time.monotonic())

    def _run(self) -> None:
        try:
            while not self._stop:
                self._talk()
                self._wake.wait(self.seconds)
                self._wake.clear()
            self._store.set(f"beat/{self.world.rank}", self._own(left=True).encode())
        except Exception:  # the store is gone with rank 0: nothing is heard any more, and the judge sees that
            pass

    def _talk(self) -> None:
        store = self._store
        store.set(f"beat/{self.world.rank}", self._own().encode())
        if self.world.speaks:
            store.set("alarm", "1" if self.alarm else "0")
        ranks = list(self.others)
        raws = store.multi_get([*(f"beat/{rank}" for rank in ranks), "alarm"])
        now = time.monotonic()
        for rank, raw in zip(ranks, raws):
            self.others[rank].hear(raw, now)
        if not self.world.speaks:
            self.alarm = raws[-1] == b"1"
