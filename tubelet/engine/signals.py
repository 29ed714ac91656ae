"""Signals become a flag that the loop reads at step boundaries.

TERM, USR1 and USR2 mean "save and leave with 85", however often they come; the first INT (Ctrl-C) means "save and
leave with 130", a second within 5 seconds leaves at once. A timer leaves by force when saving takes too long.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from types import FrameType

from tubelet.errors import EXIT_INTERRUPTED, EXIT_PREEMPTED

_WATCHED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)


class StopFlag:
    """Installed as a context manager around the loop; `code` is 0 until a signal asked this process to stop."""

    def __init__(self, grace_seconds: float):
        self.grace_seconds = grace_seconds
        self.code = 0
        self.reason = ""
        self._interrupted_at = -1e9
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopFlag:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._receive) for number in _WATCHED}
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _receive(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if number == signal.SIGINT:
            if now - self._interrupted_at < 5:
                os.write(2, b"second Ctrl-C: leaving at once, unsaved steps are lost\n")
                os._exit(EXIT_INTERRUPTED)
            self._interrupted_at = now
        if not self.code:
            self.code = EXIT_INTERRUPTED if number == signal.SIGINT else EXIT_PREEMPTED
            self.reason = signal.Signals(number).name
            timer = threading.Timer(self.grace_seconds, self._leave_by_force)
            timer.daemon = True
            timer.start()

    def _leave_by_force(self) -> None:
        sys.stderr.write(f"{self.reason} came {self.grace_seconds:.0f} s ago (preempt_grace_seconds) and saving has not "
                         "finished: leaving by force; the newest published checkpoint is intact\n")
        sys.stderr.flush()
        os._exit(1)
