"""The process that writes checkpoints while training goes on.

`python -m tubelet.engine.writer MEMORY PARENT` gets the staging buffer of one rank as an open file (`MEMORY`, its number)
and takes jobs as JSON lines on its standard input: which bytes of the buffer become which files. It answers each with one
line: sizes and hashes, or the error. It imports neither torch nor numpy, so that it is there at once and small; it is no
part of `tubelet.engine.checkpoint` because that package imports torch. It ignores the signals that ask a job to leave (the
rank decides what is still saved) and dies with its rank. Not here: the buffer (`checkpoint/staging.py`) and what makes the
files a checkpoint (`checkpoint/save.py`).
"""

from __future__ import annotations

import functools
import importlib.util
import json
import mmap
import os
import select
import signal
import sys
import time
from pathlib import Path
from typing import Any

from tubelet import faults, files
from tubelet.dist import die_with_parent
from tubelet.errors import TubeletError

IGNORED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
CHUNK = 1 << 23


def _orphaned() -> bool:
    """True when the rank's end of the pipe is closed: nobody wants the answer."""
    poll = select.poll()
    poll.register(sys.stdin.fileno(), select.POLLHUP)
    return any(event & select.POLLHUP for _, event in poll.poll(0))


def write_range(path: Any, view: memoryview, begin: int, end: int, point: str | None = None) -> dict[str, Any]:
    """Write bytes [begin, end) of the buffer as a durable file; returns {"bytes", "sha256"}. The fault point `point` is
    passed when half of them are written."""
    chunk = min(CHUNK, max(1, (end - begin + 1) // 2))
    with files.HashingFile(path) as file:
        for start in range(begin, end, chunk):
            stop = min(start + chunk, end)
            if point and 2 * (stop - begin) > end - begin:
                faults.point(point)
                point = None
            file.write(view[start:stop])
            if _orphaned():
                os._exit(1)
    return {"bytes": file.nbytes, "sha256": file.sha256}


@functools.cache
def _place() -> Any:
    """`tubelet.engine.checkpoint.place` without the package around it, which imports torch. Only for object stores."""
    path = Path(__file__).parent / "checkpoint" / "place.py"
    spec = importlib.util.spec_from_file_location("tubelet_checkpoint_place", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _folder(job: dict[str, Any]) -> Any:
    if job["remote"]:
        return _place().place(job["folder"], job["storage"])
    folder = Path(job["folder"])
    folder.mkdir(exist_ok=True)  # rank 0 has made it; on a network file system this host may not know yet
    return folder


def _write(path: Any, item: dict[str, Any], view: memoryview, remote: bool) -> dict[str, Any]:
    def write() -> dict[str, Any]:
        return write_range(path, view, item["begin"], item["end"], item["point"])

    return _place().patiently(path, "writing", write) if remote else write()


def work(job: dict[str, Any], memory: int) -> dict[str, Any]:
    """Write the files of one job; an error becomes part of the answer."""
    name, records, started = "", {}, time.monotonic()
    try:
        # Mapped anew for each job, because the buffer may have grown; freed with the last reference to a part of it.
        view = memoryview(mmap.mmap(memory, os.fstat(memory).st_size, access=mmap.ACCESS_READ))
        folder = _folder(job)
        for item in job["files"]:
            name = item["name"]
            if item["before"]:
                faults.point(item["before"])
            records[name] = _write(folder / name, item, view, job["remote"])
    except TubeletError as error:
        return {"error": {"problem": error.problem, "hint": error.hint}}
    except OSError as error:
        return {"error": {"errno": error.errno, "text": error.strerror or str(error), "file": name}}
    except Exception as error:
        return {"error": {"errno": None, "text": f"{type(error).__name__}: {error}", "file": name}}
    return {"files": records, "seconds": time.monotonic() - started}


def main() -> None:
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, IGNORED)  # the parent held them back until here
    memory, parent = int(sys.argv[1]), int(sys.argv[2])
    die_with_parent()
    if os.getppid() != parent:
        return  # it was gone before we asked to die with it
    os.nice(5)  # training comes first
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a store's driver prints is no answer
    for line in sys.stdin.buffer:
        answers.write(json.dumps(work(json.loads(line), memory)) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
