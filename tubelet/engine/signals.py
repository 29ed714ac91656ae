"""Signals become a flag that the loop reads at step boundaries.

TERM, USR1 and USR2 mean "save and leave with 85", however often they come; the first INT (Ctrl-C) means "save and
leave with 130", a second within 5 seconds leaves at once. Two clocks run from the first signal on: while the program
starts it leaves after `START_SECONDS` with the code it was asked for, since nothing new could be saved; in the loop it
leaves by force after `preempt_grace_seconds`.

Python runs a signal's handler between two of its own instructions. A rank that waits in a collective, or for a slow
disk, gets to none for minutes, so a thread that is woken by the C handler itself keeps the clocks. What is decided
after a flag was set (agreeing, saving) is the trainer's; nothing here communicates but `raise_if_asked`.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import threading
import time
from pathlib import Path
from types import FrameType

from tubelet import dist
from tubelet.errors import EXIT_INTERRUPTED, EXIT_LOST, EXIT_PREEMPTED

WATCHED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)
"""The signals that ask a program to save and leave."""
START_SECONDS = 5.0
"""While the program starts: how long a rank may take to reach a place where it can leave in order."""
TWICE_SECONDS = 5.0
"""A second Ctrl-C within this time leaves at once."""
SAME_SECONDS = 0.1
"""One Ctrl-C may arrive twice, from the terminal and from a launcher that passes it on; so soon it is the same."""


class Stopped(Exception):  # not an error: asked to leave, and all that could be saved is saved
    """Raised on all ranks after a signal, once everything is saved. `code` is the exit code."""

    def __init__(self, code: int, reason: str):
        super().__init__(reason)
        self.code, self.reason = code, reason


def rank_of_environment() -> int:
    """This process's rank before settings and torch are known; 0 when nothing says so."""
    return int(next((os.environ[key] for key in dist._RANK if os.environ.get(key, "").isdigit()), 0))


def tell_launcher(code: int) -> None:
    """Leave the exit code where `launch local` finds it: torchrun turns every code but 0 into 1."""
    folder = os.environ.get(dist.EXIT_DIR)
    if folder:
        try:
            Path(folder, f"rank-{rank_of_environment()}.code").write_text(str(code))
        except OSError:
            pass  # the launcher has gone


class StopFlag:
    """A context manager around the whole program; `code` is 0 until a signal asked this process to stop.

    It watches only when it is entered in the main thread. `reason` names the signal.
    """

    def __init__(self, grace_seconds: float = 240.0):
        self.grace_seconds = grace_seconds
        self.code = 0
        self.reason = ""
        self.starting = self._saved = False
        self._asked_at: float | None = None
        self._interrupted_at = -1e9
        self._before: dict[int, object] = {}
        self._thread: threading.Thread | None = None
        self._over = False
        self._fork = threading.local()  # of the thread that forks: the signals it let through before

    # --------------------------------------------------------------------------------- what the program calls

    def starts(self) -> StopFlag:
        """The program is starting: until `arm`, a signal leaves with its code at once or after `START_SECONDS`."""
        self.starting = True
        return self

    def arm(self, grace_seconds: float | None = None) -> None:
        """From here on there are steps to lose: a signal waits for the loop to save, for at most so many seconds from the
        signal on. Call `raise_if_asked` right before."""
        self.grace_seconds = self.grace_seconds if grace_seconds is None else grace_seconds
        self.starting = False
        self._wake()

    def saved(self) -> None:
        """All that could be lost is saved: what is left to do may be cut short, and the exit code is the one asked for."""
        self._saved = True

    def raise_if_asked(self, together: bool = False) -> None:
        """While starting: leave when a signal came. Raises `Stopped`.

        Alone (before the process group exists) a rank just goes: every rank gets the signal. With `together`, all ranks
        call it and leave if any of them was asked, so that nobody waits for one that has gone.
        """
        code = int(dist.maxima([float(self.code)])[0]) if together else self.code
        if code:
            raise Stopped(code, self.reason or "a signal on another rank")

    # --------------------------------------------------------------------------------------------- signals

    def __enter__(self) -> StopFlag:
        if threading.current_thread() is not threading.main_thread():
            return self
        self._reads, self._writes = socket.socketpair()
        self._reads.setblocking(False)
        self._writes.setblocking(False)
        self._wakeup_before = signal.set_wakeup_fd(self._writes.fileno(), warn_on_full_buffer=False)
        self._before = {number: signal.signal(number, self._receive) for number in WATCHED}
        self._owner = os.getpid()
        # A forked child has the same socket: a signal to it must not count as one of ours, not even in its first moment.
        os.register_at_fork(before=self._before_fork, after_in_parent=self._unblock, after_in_child=self._forked)
        self._thread = threading.Thread(target=self._watch, name="signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._thread is None:
            return
        thread, self._thread = self._thread, None
        for number, handler in self._before.items():
            # Once asked, late signals must not spoil the exit code of a process that is about to end.
            signal.signal(number, signal.SIG_IGN if self.code else handler)  # type: ignore[arg-type]
        signal.set_wakeup_fd(self._wakeup_before, warn_on_full_buffer=False)
        self._over = True  # said, not shown by closing the socket: a forked worker that still lives has its other end too
        try:
            self._writes.send(b"\0")
        except BlockingIOError:
            pass  # full: it is awake
        thread.join()
        self._writes.close()
        self._reads.close()

    def _before_fork(self) -> None:
        if self._thread is not None:
            self._fork.mask = signal.pthread_sigmask(signal.SIG_BLOCK, WATCHED)

    def _unblock(self) -> None:
        mask = self._fork.__dict__.pop("mask", None)
        if mask is not None:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def _forked(self) -> None:
        if self._thread is not None and os.getpid() != self._owner:
            signal.set_wakeup_fd(-1)
            self._thread = None
        self._unblock()

    def _wake(self) -> None:
        if self._thread is not None:
            try:
                self._writes.send(b"\0")  # no signal has this number: look at the clock again
            except BlockingIOError:
                pass  # full: it is awake

    def _receive(self, number: int, frame: FrameType | None) -> None:
        """In the main thread, between two instructions. The thread may have been here first."""
        self._ask(number)

    def _ask(self, number: int) -> None:
        if not self.code:
            self._asked_at = time.monotonic()
            self.reason = signal.Signals(number).name
            self.code = EXIT_INTERRUPTED if number == signal.SIGINT else EXIT_PREEMPTED

    # ---------------------------------------------------------------------------------- the thread with the clocks

    def _watch(self) -> None:
        while True:
            select.select([self._reads], [], [], self._remaining())
            try:
                arrived = self._reads.recv(4096)
            except BlockingIOError:
                arrived = b"\0"
            if self._over:
                return
            for number in arrived:
                if number in WATCHED:
                    self._ask(number)
                if number == signal.SIGINT:
                    self._interrupted()
            if self._remaining() == 0:
                self._leave_by_force()

    def _remaining(self) -> float | None:
        """Seconds until this process leaves by force; None without a signal."""
        if self._asked_at is None:
            return None
        limit = START_SECONDS if self.starting else self.grace_seconds
        return max(0.0, self._asked_at + limit - time.monotonic())

    def _interrupted(self) -> None:
        now = time.monotonic()
        if SAME_SECONDS < now - self._interrupted_at < TWICE_SECONDS:
            self._exit(EXIT_INTERRUPTED, "second Ctrl-C: leaving at once, unsaved steps are lost")
        if now - self._interrupted_at > SAME_SECONDS:
            self._interrupted_at = now

    def _leave_by_force(self) -> None:
        if self.starting:
            self._exit(self.code, f"{self.reason} while starting: leaving with exit code {self.code}, nothing was trained "
                                  "since the newest checkpoint" if rank_of_environment() == 0 else "")
        since = f"{self.reason} came {self.grace_seconds:.0f} s ago (preempt_grace_seconds)"
        if self._saved:
            self._exit(self.code, f"{since}: everything is saved, leaving before the last accounts are written")
        # The run itself is well: a launcher may start it again, as after a lost rank, as long as it gets on.
        self._exit(EXIT_INTERRUPTED if self.code == EXIT_INTERRUPTED else EXIT_LOST,
                   f"{since} and saving has not finished: leaving by force; the newest published checkpoint is intact")

    def _exit(self, code: int, words: str) -> None:
        tell_launcher(code)
        try:
            os.write(2, f"{words}\n".encode() if words else b"")  # no locks here: the main thread may hold any of them
        finally:
            # `launch local` signals every rank and reads the codes: torchrun need not hear of a failure.
            os._exit(0 if self.starting and dist.EXIT_DIR in os.environ else code)
