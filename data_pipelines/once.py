"""Folders that are built once, whoever asks first: indexes and made-up sets in the user's cache.

Many ranks on many nodes ask at the same moment, on a shared file system or not. One of them creates a lock exclusively,
builds beside and renames; the others wait on the folder, not in a collective (an hour of indexing must not trip a
time-out of the process group). The builder touches its lock; a lock that nobody touches any more is taken over.
"""

from __future__ import annotations

import os
import shutil
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

from tubelet.errors import DataError
from tubelet.files import create_exclusive, fsync_dir

HEARTBEAT_SECONDS = 5.0
STALE_SECONDS = 60.0


def cache_folder(chosen: str | None = None) -> Path:
    """Where indexes and made-up sets go: `chosen`, else $TUBELET_CACHE, else $XDG_CACHE_HOME/tubelet or ~/.cache/tubelet."""
    if chosen:
        return Path(chosen).expanduser().absolute()
    if os.environ.get("TUBELET_CACHE"):
        return Path(os.environ["TUBELET_CACHE"]).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser().absolute() / "tubelet"


def build_once(folder: Path, build: Callable[[Path], object], patience: float = 0.0) -> Path:
    """`folder`, complete; `build(temporary)` fills a temporary folder that is renamed to it, in one process only.

    `patience`: seconds to leave the first go to somebody else (ranks other than the first of a node), so that progress
    is printed by the rank that speaks. When a build fails its process raises, and a waiting one tries in its turn.
    """
    lock = folder.with_name(f"{folder.name}.lock")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{folder.parent} cannot be made, to keep indexes and made-up sets in: {error.strerror}.",
                        "data.index_dir=FOLDER, or export TUBELET_CACHE=FOLDER, that can be written") from None
    token = f"{socket.gethostname()} {os.getpid()} {time.time_ns()}"
    until = time.monotonic() + patience
    watched: tuple[str, float] | None = None  # the lock as we last saw it change
    changed = time.monotonic()
    while not folder.exists():
        seen = _look(lock)
        now = time.monotonic()
        if seen is None:
            if now >= until and create_exclusive(lock, token):
                _build(folder, build, lock)
                return folder
        elif seen != watched:
            watched, changed = seen, now
        elif now - changed > STALE_SECONDS or _dead_here(seen[0]):
            lock.unlink(missing_ok=True)  # at worst two build, and the second rename is dropped
        time.sleep(0.05 if now - changed < 5 else 0.5)
    return folder


def _dead_here(token: str) -> bool:
    """True when the lock's owner was a process of this host that is gone: a killed job must not cost a minute."""
    host, pid, *_ = [*token.split(), "", ""]
    if host != socket.gethostname() or not pid.isdigit():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False


def _look(lock: Path) -> tuple[str, float] | None:
    try:
        return lock.read_text(), lock.stat().st_mtime
    except OSError:
        return None


def _build(folder: Path, build: Callable[[Path], object], lock: Path) -> None:
    if folder.exists():  # finished between our look and our lock
        lock.unlink(missing_ok=True)
        return
    temporary = folder.with_name(f".{folder.name}.{socket.gethostname()}-{os.getpid()}.tmp")
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(HEARTBEAT_SECONDS):
            try:
                os.utime(lock)
            except OSError:
                return

    heart = threading.Thread(target=beat, daemon=True)
    heart.start()
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        build(temporary)
        fsync_dir(temporary)
        try:
            os.rename(temporary, folder)
        except OSError:
            if not folder.exists():
                raise
        fsync_dir(folder.parent)
    finally:
        stop.set()
        heart.join()
        shutil.rmtree(temporary, ignore_errors=True)
        lock.unlink(missing_ok=True)
