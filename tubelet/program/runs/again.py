"""Whether a run whose newest start has ended is started again, as the launchers have put it down in `launch/`:

    submitted.json   the job that a scheduler was given, or of `launch hostfile` while that is at work
    restarts.jsonl   a row for each decision (`launch.restarts`): by SLURM's batch script after its srun, by `local` and
                     `hostfile` after a loss, on Kubernetes by the first pod of the next start

Nothing is decided, and no row written, by a batch script that was cancelled or whose nodes SLURM took away, by `local` and
`hostfile` when the job was asked to leave or its time was up, and where no launcher of ours is at work.
"""

from __future__ import annotations

from pathlib import Path

from tubelet.errors import EXIT_INTERRUPTED, EXIT_LOST, EXIT_PREEMPTED, EXIT_SUPERSEDED
from tubelet.program.runs import reading
from tubelet.program.runs.reading import Row, ago

DECIDING_SECONDS = 180.0
"""Between the end of a start and the row about it: srun waits for the last rank, and the script asks Python."""
STARTING_SECONDS = 600.0
"""A launcher without a queue has started a run again after so long, or never will."""


def decision(folder: Path, number: int, started: float, job: str, state: str) -> Row:
    """The last decision, if it is about how things stand: about the newest start, `number`, of `job`, begun at `started`
    and in this `state`; or about a later one that did not get so far as to claim the folder (attempt 0). {} when not."""
    rows = reading.read_tail(folder / "launch" / "restarts.jsonl").rows
    if not rows or state == "running":
        return {}
    row, about = rows[-1], reading.whole(rows[-1].get("attempt"))
    if about:
        return row if about == number else {}
    later = about == 0 and _time(row) > started
    return row if later and (state != "running?" or row.get("job") == job) else {}


def decided(row: Row, submitted: Row, state: str, note: str, now: float) -> tuple[str, str]:
    """(state, note) of a run by the decision about its newest start, which itself ended in `state`."""
    job, code, said = str(row.get("job", "")), reading.whole(row.get("code")), reading.first_line(row.get("said", ""), 300)
    if row.get("restart"):
        since = ago(now - _time(row))
        kept = submitted.get("job") == job
        # `launch hostfile` may wait for its hosts as long as it likes, and takes its note away when it ends
        queued = job.startswith("slurm-") or (kept and submitted.get("launcher") in ("k8s", "hostfile"))
        gone = job.startswith("hostfile-") and not kept
        if queued or (not gone and now - _time(row) < STARTING_SECONDS):
            return "queued", f"{job} again, since {since}: {said}"
        return "stopped", f"{job} was to start it again {since} ago, and has gone without having done so: {said}"
    if code in (EXIT_PREEMPTED, EXIT_LOST) or (code or 0) > 128 and code != EXIT_INTERRUPTED:
        return "stopped", said  # it could have gone on
    if code == 0 or (row.get("attempt") and state not in ("lost", "lost?", "running?")):
        return state, note  # the run has said more of its end than its launcher knows
    return {EXIT_INTERRUPTED: "interrupted", EXIT_SUPERSEDED: "superseded"}.get(code or 0, "failed"), said


def undecided(job: str, submitted: Row, since: float) -> str:
    """What is known of a run that saved and left with 85 `since` seconds ago, when nobody has put down what follows."""
    launcher = submitted.get("launcher", "") if job and submitted.get("job") == job else ""
    if launcher == "k8s":
        return f"Kubernetes starts {job} again, unless that was deleted"
    if launcher == "hostfile" or job.startswith(("local-", "hostfile-")):
        return "asked to leave, or its time was up: its launcher does not start it again, the same command does"
    if not job.startswith("slurm-"):
        return "no restart is on record: started without `launch`, the same command goes on"
    if launcher and since < DECIDING_SECONDS:
        return f"no restart is on record yet: {job} is about to decide"
    look = f"`squeue -j {job.removeprefix('slurm-')}` tells"
    if launcher:
        return f"no restart is on record: {job} was cancelled, or SLURM took its nodes and starts it again itself; {look}"
    return f"no restart is on record: {job} was not submitted by `launch` from here; {look} whether it is queued again"


def _time(row: Row) -> float:
    return reading.number(row, "time") or 0.0
