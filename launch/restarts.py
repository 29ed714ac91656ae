"""Whether a job that has ended is started again: by its exit code, its first error and the progress it made. No torch here.

    decide(run_folder, 137, RestartSettings(), job="slurm-42", attempt=3)

A job that was asked to leave (85) is started again, and one that lost a node, a process or a connection too; an error of the
program is not, since it would come again. Either way only so often in a row without a newer checkpoint. What was decided is
remembered in `<run folder>/launch/restarts.jsonl`, a row each time. Which launcher asks does not matter.
"""

from __future__ import annotations

import json
import signal
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from launch.settings import RestartSettings
from tubelet import files, first_error
from tubelet.errors import EXIT_INTERRUPTED, EXIT_LOST, EXIT_PREEMPTED, EXIT_SUPERSEDED, CheckpointError
from tubelet.redact import redact

ROWS = "restarts.jsonl"
OUT_OF_MEMORY = 253
"""What srun returns when the kernel killed a task because the host's memory was full."""


@dataclass(frozen=True)
class Decision:
    """What happens after a job has ended."""

    restart: bool
    said: str
    """One line for the job's output; a second one begins with "Try:" where a human has to do something."""
    code: int
    """The exit code that counts: that of the run's own record where there is one, else the one given."""
    attempt: int
    """Number of the start that ended; 0 when it did not get so far as to claim the run's folder."""
    step: int | None
    """Newest published checkpoint; None = there is none yet."""
    node: str = ""
    """Where a rank failed first, when that is known."""


def decide(folder: Path, code: int, settings: RestartSettings, *, job: str, attempt: int = 0, node: str = "",
           how: str = "") -> Decision:
    """Decide and remember. `code` is the job's exit code (128 + N for signal N), `attempt` the number of its start in the
    run `folder` (0 = it never claimed it; see `attempt_of`, `newest_attempt`), `job` what all its restarts have in common.
    `node` says where a rank failed first, as the launcher calls it; `how` in which way, when it is the launcher that saw it
    and not the rank that said it. The caller starts the job again.

    Raises `CheckpointError` when the checkpoints of a run cannot be listed.
    """
    error = first_error.read(folder, attempt) if attempt else None
    code, finished = code_that_counts(folder, attempt, code, error)
    step = newest_step(folder)
    what = _ended(attempt, code, step, node, how, error)
    why_not = "" if finished else _why_not(code, settings, error)
    if finished or why_not:
        restart, said = False, f"{what}: {'finished' if finished else f'not started again, {why_not}'}"
    else:
        idle, most = restarts_without_progress(folder, job, step), settings.max_without_progress
        restart = idle < most
        said = f"{what}: started again ({idle} of {most} restarts without progress)" if restart else (
            f"{what}: not started again, since restart.max_without_progress is {most}"
            + (f" and {idle} restarts in a row made no newer checkpoint.\n  Try: read logs/ of the run and what it printed; "
               "save more often (save_every, save_every_minutes); then submit it again" if most else ""))
    decision = Decision(restart, redact(said), code, attempt, step, node)
    _remember(folder, decision, job)
    return decision


def code_that_counts(folder: Path, attempt: int, code: int, error: dict[str, Any] | None) -> tuple[int, bool]:
    """(code, whether the run is finished). What the run wrote down of its end goes before the code of a launcher, which is
    the largest of all ranks: a rank that was killed a moment after all had saved took nothing with it. Nor is 0 believed
    of a run that did not say it is finished: srun returns it when it lost a node's part of the job."""
    record = read_json(folder / "attempts" / f"{attempt:04d}.end.json") if attempt else {}
    if record.get("how") in ("finished", "preempted"):
        code = int(record["code"])
    elif error and int(error["code"]) not in (0, EXIT_LOST):
        code = int(error["code"])  # the cause; others lost this rank, or were killed when it had gone
    elif attempt and code == 0:
        code = EXIT_LOST
    return code, code == 0


def _why_not(code: int, settings: RestartSettings, error: dict[str, Any] | None) -> str:
    """Why a job that ended with `code` is not started again; "" when it may be."""
    if code == EXIT_PREEMPTED:
        return ""
    if code == EXIT_SUPERSEDED:
        return "since another attempt has taken the run over"
    if code == EXIT_INTERRUPTED:
        return "since somebody interrupted it"
    if code == EXIT_LOST or code > 128:
        return "" if settings.on_failure else "since restart.on_failure is false"
    return "since an error of the program would come again" + ("" if error else
                                                               ".\n  Try: read what it printed, and logs/ of the run")


def _ended(attempt: int, code: int, step: int | None, node: str, how: str, error: dict[str, Any] | None) -> str:
    """How this start ended, in one line."""
    who = f"attempt {attempt}" if attempt else "a start that had not yet claimed the run folder"
    at = "before the first checkpoint" if step is None else f"at step {step}"
    text = f"{who} left with {code}{_meaning(code)} {at}"
    if code in (0, EXIT_PREEMPTED, EXIT_SUPERSEDED, EXIT_INTERRUPTED):
        return text
    if node and how:
        text += f"; on {node} a rank failed first ({how})"
    if error and int(error["code"]) == code:
        place = error["host"] if how or not node else node
        text += f"; first error, rank {error['rank']} on {place}: {_line(error['error'])}"
    elif node and not how:
        text += f"; on {node} a rank failed first"
    return text


def _meaning(code: int) -> str:
    """What an exit code says, in brackets."""
    known = {EXIT_PREEMPTED: "saved, asked to leave", EXIT_LOST: "lost a rank or a connection",
             OUT_OF_MEMORY: "the host's memory was full"}
    if code in known:
        return f" ({known[code]})"
    try:
        return f" ({signal.Signals(code - 128).name})" if code > 128 else ""
    except ValueError:
        return ""


def _line(text: str, length: int = 300) -> str:
    """The line of an error that says most: the last of a traceback, else the first."""
    lines = [line for line in text.strip().splitlines() if line.strip()] or [""]
    line = lines[-1] if lines[0].startswith("Traceback") else lines[0]
    return line if len(line) <= length else line[:length] + " ..."


# ------------------------------------------------------------------------------------------------ what the run left


def newest_step(folder: Path) -> int | None:
    """Step of the newest published checkpoint of the run in `folder`, wherever `checkpoint.dir` of its config says that they
    lie (an object store too); None when there is none. Raises `CheckpointError` when a store cannot be listed."""
    text, storage = _elsewhere(folder)
    if "://" not in text:
        found = [path.parent.name for path in Path(text or folder).glob("step-*/manifest.json")]
    else:
        import fsspec

        try:
            system, path = fsspec.core.url_to_fs(text.rstrip("/"), **storage)
            found = [name.rsplit("/", 2)[-2] for name in system.glob(f"{path}/step-*/manifest.json")]
        except Exception as error:  # drivers raise what they like
            raise CheckpointError(f"The checkpoints in {text} cannot be listed: {type(error).__name__}: {error}",
                                  "checkpoint.dir, checkpoint.storage; the credentials in the environment") from None
    steps = [int(name[5:]) for name in found if name[5:].isdigit()]
    return max(steps, default=None)


def _elsewhere(folder: Path) -> tuple[str, dict[str, Any]]:
    """`checkpoint.dir` ("" when it is the run's folder) and `checkpoint.storage` of the run's config."""
    if not (folder / "config.yaml").is_file():
        return "", {}
    from tubelet.config import read_yaml

    checkpoint = read_yaml(folder / "config.yaml").get("checkpoint") or {}
    return str(checkpoint.get("dir") or "").removeprefix("file://"), checkpoint.get("storage") or {}


def newest_attempt(folder: Path) -> int:
    """Number of the newest start; 0 when there was none. For launchers that start the job themselves: a start that leaves
    this unchanged did not claim the folder."""
    return max((int(path.stem) for path in (folder / "attempts").glob("[0-9][0-9][0-9][0-9].json")), default=0)


def attempt_of(folder: Path, job: str, restarts: int) -> int:
    """Number of the start that belongs to a scheduler's job at its so many-th restart (`runs.scheduler_job`); 0 when it did
    not claim the folder."""
    for number in range(newest_attempt(folder), 0, -1):
        record = read_json(folder / "attempts" / f"{number:04d}.json")
        if record.get("job") == job and record.get("restarts") == restarts:
            return number
    return 0


def restarts_without_progress(folder: Path, job: str, step: int | None) -> int:
    """How many restarts of a job until now, in a row, began and ended at `step`. Another submission counts anew."""
    try:
        before = files.read_jsonl(folder / "launch" / ROWS)
    except OSError as error:
        raise _forgetful(folder, error) from None
    count = 0
    for row in reversed(before):
        if row.get("job") != job or not row.get("restart") or row.get("step") != step:
            break
        count += 1
    return count


def _remember(folder: Path, decision: Decision, job: str) -> None:
    row = {"time": time.time(), "job": job, **asdict(decision)}
    try:
        (folder / "launch").mkdir(parents=True, exist_ok=True)
        files.append_jsonl(folder / "launch" / ROWS, [row])
    except OSError as error:
        raise _forgetful(folder, error) from None


def _forgetful(folder: Path, error: OSError) -> CheckpointError:
    """Without memory a job would be started for ever."""
    return CheckpointError(f"{folder / 'launch' / ROWS} cannot be read and written: {error.strerror or error}; the job is "
                           "not started again.", "free space and permissions there, then submit it again")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds a mapping; {} when it is missing or damaged."""
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}
