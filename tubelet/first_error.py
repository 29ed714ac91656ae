"""The first error of a start, kept in `logs/` of the run folder: which rank failed first, on which host, with which code.

`first-error-NNNN.txt` is for people and `first-error-NNNN.json` for launchers; NNNN is the number of the start. Exactly one
rank of a start writes them. A rank that only lost another one (exit code 87) waits for a moment before it does
(`seconds_before`), so that the error that this one may have had stands there and not its consequence.
"""

from __future__ import annotations

import json
import socket
import time
from pathlib import Path
from typing import Any

from tubelet import files
from tubelet.errors import EXIT_LOST, DeviceError, LateError, LostError, TubeletError
from tubelet.redact import redact

COMMON_SECONDS = 0.5
"""How long ranks wait with what all raise together, which rank 0 says."""
LOST_SECONDS = 1.5
"""How long a rank waits with a connection that was closed: what the other one had to say comes first."""


def seconds_before(error: BaseException, rank: int) -> float:
    """How long a rank leaves it to others to call their error the first. Rank 0 hears most of the others, so it comes first
    among equals; who waited in vain comes before who was left by that one, and a device that failed before both."""
    if isinstance(error, DeviceError):
        return 0.0
    if isinstance(error, LostError):
        return (0.0 if isinstance(error, LateError) else LOST_SECONDS) + COMMON_SECONDS * (1 + (rank > 0))
    return COMMON_SECONDS if rank and isinstance(error, TubeletError) else 0.0


def keep(folder: Path, start: int, *, rank: int, code: int, error: str, device: bool = False) -> bool:
    """Write `error` down as the first of start number `start` (0 = the newest) of the run in `folder`; False when another
    rank has done so. `device`: it was this rank's device that failed. Raises `OSError`."""
    host, text, path = socket.gethostname(), redact(error), _path(folder, start)
    if not files.create_exclusive(path.with_suffix(".txt"), f"[rank {rank} on {host}] {text}\n"):
        return False
    record = {"rank": rank, "host": host, "code": code, "error": text, "time": time.time(), "device": device}
    files.create_exclusive(path, json.dumps(record) + "\n")
    return True


def read(folder: Path, start: int = 0) -> dict[str, Any] | None:
    """{"rank", "host", "code", "error", "time", "device"} of the first error of a start (0 = the newest); or None."""
    try:
        return json.loads(_path(folder, start).read_text())
    except (OSError, ValueError):
        return None


def is_of_its_node(record: dict[str, Any]) -> bool:
    """Whether a first error happened where its rank ran: one that only lost another rank says nothing of its own node."""
    return int(record["code"]) != EXIT_LOST or bool(record.get("device"))


def _path(folder: Path, start: int) -> Path:
    newest = max((int(path.stem) for path in (folder / "attempts").glob("[0-9]*.yaml")), default=0)
    return folder / "logs" / f"first-error-{start or newest:04d}.json"
