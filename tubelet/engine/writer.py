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
from tubelet.errors import SupersededError, TubeletError

IGNORED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
CHUNK = 1 << 23


def _orphaned() -> bool:
    """True when the rank's end of the pipe is closed: nobody wants the answer."""
    poll = select.poll()
    poll.register(sys.stdin.fileno(), select.POLLHUP)
    return any(event & select.POLLHUP for _, event in poll.poll(0))


def superseded(claim: str | Path | None) -> bool:
    """Whether another attempt has taken the run over. `claim`: the file by which ours holds it (`Run.claim`), None = there
    are no attempts. Two look-ups, whatever the number of attempts."""
    if claim is None:
        return False
    path = Path(claim)
    return path.with_name(f"{int(path.stem) + 1:04d}.json").exists() or not path.exists()


def need_claim(claim: str | Path | None) -> None:
    """Asked right before a file of a checkpoint is made. Raises `SupersededError` when the run is another attempt's: a
    process that was held up for long must not write into what the new one saves under the same name."""
    if superseded(claim):
        raise SupersededError("Another attempt has taken over the run while this one was writing a checkpoint, which it "
                              "leaves unfinished.",
                              "nothing, if you restarted the run elsewhere; its checkpoints are untouched")


def write_range(path: Any, view: memoryview, begin: int, end: int, point: str | None = None,
                claim: str | None = None) -> dict[str, Any]:
    """Write bytes [begin, end) of the buffer as a durable file that was not there before; returns {"bytes", "sha256"}. The
    fault point `point` is passed when half of them are written."""
    chunk = min(CHUNK, max(1, (end - begin + 1) // 2))
    need_claim(claim)
    with files.HashingFile(path, exclusive=True) as file:
        for start in range(begin, end, chunk):
            stop = min(start + chunk, end)
            if point and 2 * (stop - begin) > end - begin:
                faults.point(point)
                point = None
            file.write(view[start:stop])
            if _orphaned():
                os._exit(1)
        if file.remote:
            need_claim(claim)  # there an object is made, and replaces another, when it is closed
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
    need_claim(job["claim"])
    folder = Path(job["folder"])
    folder.mkdir(exist_ok=True)  # rank 0 has made it; on a network file system this host may not know yet
    return folder


def _write(path: Any, item: dict[str, Any], view: memoryview, job: dict[str, Any]) -> dict[str, Any]:
    def write() -> dict[str, Any]:
        return write_range(path, view, item["begin"], item["end"], item["point"], job["claim"])

    return _place().patiently(path, "writing", write) if job["remote"] else write()


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
            records[name] = _write(folder / name, item, view, job)
    except SupersededError as error:
        return {"error": {"superseded": error.problem, "hint": error.hint}}
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
