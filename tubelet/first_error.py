"""The first error of a start, kept in `logs/` of the run folder: which rank failed first, on which host, with which code.

`first-error-NNNN.txt` is for people and `first-error-NNNN.json` for launchers; NNNN is the number of the start. Exactly one
rank of a start writes them. A rank that only lost another one (exit code 87) waits for a moment before it does, so that the
error that this one may have had stands there and not its consequence.
"""

from __future__ import annotations

import json
import socket
import time
from pathlib import Path
from typing import Any

from tubelet import files
from tubelet.errors import EXIT_LOST
from tubelet.redact import redact

LOST_SECONDS = 1.5
"""How long rank 0 waits with the loss of another rank; the others, who hear of less than rank 0 does, twice as long."""
COMMON_SECONDS = 0.5
"""How long the others wait with what all ranks raise together, which rank 0 says."""


def keep(folder: Path, start: int, *, rank: int, code: int, error: str, common: bool = False) -> bool:
    """Write `error` down as the first of start number `start` (0 = the newest) of the run in `folder`; False when another
    rank has done so. Waits up to 3 s with the loss of another rank or what is `common` to all ranks. Raises `OSError`."""
    if code == EXIT_LOST:
        time.sleep(LOST_SECONDS if rank == 0 else 2 * LOST_SECONDS)
    elif rank and common:
        time.sleep(COMMON_SECONDS)
    host, text, path = socket.gethostname(), redact(error), _path(folder, start)
    if not files.create_exclusive(path.with_suffix(".txt"), f"[rank {rank} on {host}] {text}\n"):
        return False
    record = {"rank": rank, "host": host, "code": code, "error": text, "time": time.time()}
    files.create_exclusive(path, json.dumps(record) + "\n")
    return True


def read(folder: Path, start: int = 0) -> dict[str, Any] | None:
    """{"rank", "host", "code", "error", "time"} of the first error of a start (0 = the newest); None when it had none."""
    try:
        return json.loads(_path(folder, start).read_text())
    except (OSError, ValueError):
        return None


def _path(folder: Path, start: int) -> Path:
    newest = max((int(path.stem) for path in (folder / "attempts").glob("[0-9]*.yaml")), default=0)
    return folder / "logs" / f"first-error-{start or newest:04d}.json"
