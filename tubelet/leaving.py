"""What a signal does before a program has begun: nothing can be saved, so it ends with the code that belongs to it."""

from __future__ import annotations

import os
import signal

CODES = {signal.SIGTERM: 85, signal.SIGUSR1: 85, signal.SIGUSR2: 85, signal.SIGINT: 130}
"""As `errors.EXIT_PREEMPTED` and `EXIT_INTERRUPTED`; imports nothing, so that it is there in the first milliseconds."""


def leave_at_once() -> None:
    """Until the program installs its own handlers. For the first line of a `__main__`."""
    for number, code in CODES.items():
        signal.signal(number, lambda *_, code=code: os._exit(code))
