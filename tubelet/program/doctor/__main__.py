"""`python -m tubelet.program.doctor [CONFIG key=value ...]`: one rank of an examination, as a launcher starts it."""

import os
import signal
import sys


def _leave(number: int, frame: object) -> None:
    os._exit(130 if number == signal.SIGINT else 1)  # nothing to save, and not to be started again


def main() -> int:
    """Run as this rank; returns the exit code."""
    from tubelet.console import run_app
    from tubelet.program.doctor.cli import app

    words = sys.argv[1:]
    alone = [] if any(word.startswith("--nproc") for word in words) else ["--nproc=0"]
    return run_app(app, [*words, *alone], "tubelet doctor")


if __name__ == "__main__":
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(each, _leave)
    from tubelet.program.main import finish

    finish(main())
