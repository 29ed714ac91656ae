"""`python -m launch.slurm_restart`: asked by a batch script when its srun has ended. Says whether the job is requeued.

The last line of its output is for the script: `restart`, `restart without NODE,...` or `stop CODE`; the rest is for people.
The script hands over in variables, which pass into containers: TUBELET_RUN (the run's folder), TUBELET_CODE (what srun
returned), TUBELET_JOB, TUBELET_HOSTS (node names, a line each), TUBELET_OUTPUT (the file of the job's errors, as a rule that
of its output too, which holds what srun says of tasks that died), and SLURM's own.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from launch.restarts import attempt_of, decide
from launch.settings import RestartSettings
from launch.slurm_script import START
from tubelet import first_error
from tubelet.errors import EXIT_LOST, TubeletError

_DIED = re.compile(r"srun: error: (\S+): tasks? [\d,-]+: (?!Exited with exit code)(.+)")
_NODE = re.compile(r"srun: error: Node failure on (\S+)")
_OVER = re.compile(r"srun: (?:First task exited|Force Terminated|launch/slurm: _step_signal|Job step aborted)")
_RUNNING = re.compile(r"srun: StepId=\S+ tasks? ([\d,-]+): running")
_REPORTED = re.compile(r"srun: error: \S+: tasks? ([\d,-]+): ")


class Failure(NamedTuple):
    """Where a rank failed first, and how; empty when that is not known."""

    node: str = ""
    how: str = ""


def first_failure(output: str, hosts: Sequence[str], per_node: int) -> Failure:
    """What srun said of the tasks of the last start in a job's output. A death by a signal, the loss of a node, or a task of
    which nothing more was heard counts; a rank that left because it lost another one is not the one that failed."""
    text = output[output.rfind(f"\n{START} ") + 1:]
    over = _OVER.search(text)
    before = text[:over.start()] if over else text  # afterwards srun kills the others
    lost = _NODE.search(before)
    died = _DIED.search(before)
    if lost or died:
        found = min(filter(None, (lost, died)), key=lambda match: match.start())
        return Failure(found[1], "the node was lost" if found is lost else found[2].strip())
    running = _RUNNING.search(text)
    if running is None:
        return Failure()
    silent = _numbers(running[1]) - {task for match in _REPORTED.finditer(text) for task in _numbers(match[1])}
    nodes = sorted({hosts[task // per_node] for task in silent if task // per_node < len(hosts)})
    return Failure(nodes[0], "its tasks were not heard of any more") if len(nodes) == 1 else Failure()


def _numbers(text: str) -> set[int]:
    """`0,2-4` -> 0, 2, 3, 4."""
    ranges = [item.partition("-") for item in text.strip(",").split(",")]
    return {number for low, _, high in ranges for number in range(int(low), int(high or low) + 1)}


def node_of_error(folder: Path, attempt: int, hosts: Sequence[str], per_node: int) -> str:
    """The node of the rank that had the first error of its own in this start, or whose device failed, as SLURM names it; ""
    when nobody had one."""
    error = first_error.read(folder, attempt) if attempt else None
    if error is None or not first_error.is_of_its_node(error):
        return ""
    place = int(error["rank"]) // per_node
    return hosts[place] if place < len(hosts) else ""


def answer(words: Sequence[str], env: Mapping[str, str] = os.environ) -> str:
    """The line for the script. Says on standard error what it decided. Raises `TubeletError`."""
    parser = argparse.ArgumentParser(prog="python -m launch.slurm_restart", description=__doc__)
    parser.add_argument("--per-node", type=int, required=True)
    parser.add_argument("--max-without-progress", type=int, required=True)
    parser.add_argument("--not-on-failure", action="store_true")
    parser.add_argument("--exclude", help="nodes that are excluded anyway; given at all, the failed one is excluded too")
    given = parser.parse_args(words)
    folder, job, hosts = Path(env["TUBELET_RUN"]), env["TUBELET_JOB"], env.get("TUBELET_HOSTS", "").split()
    attempt = attempt_of(folder, job, int(env.get("SLURM_RESTART_COUNT") or 0))
    failure = first_failure(_tail(env.get("TUBELET_OUTPUT", "")), hosts, given.per_node)
    node = node_of_error(folder, attempt, hosts, given.per_node)
    node, how = (node, "") if node else failure
    settings = RestartSettings(max_without_progress=given.max_without_progress, on_failure=not given.not_on_failure)
    decision = decide(folder, int(env["TUBELET_CODE"]), settings, job=job, attempt=attempt, node=node, how=how)
    print(f"launch: {decision.said}", file=sys.stderr, flush=True)
    if not decision.restart:
        return f"stop {decision.code}"
    if given.exclude is None or not decision.node or decision.code < EXIT_LOST:
        return "restart"
    print(f"launch: the next start keeps off {decision.node}", file=sys.stderr, flush=True)
    return f"restart without {','.join(filter(None, [given.exclude, decision.node]))}"


def _tail(path: str, size: int = 1 << 20) -> str:
    """The last megabyte of a file; "" when it cannot be read."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - size))
            return "\n" + file.read().decode(errors="replace")
    except OSError:
        return ""


def main() -> int:
    """Print the answer. Without one, the script goes by the exit code alone."""
    try:
        print(answer(sys.argv[1:]), flush=True)
    except TubeletError as error:
        print(f"error: {error}", file=sys.stderr)
        print(f"stop {os.environ.get('TUBELET_CODE', error.exit_code)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
