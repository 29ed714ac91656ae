"""What can be known of a SLURM job before it is queued: has the cluster what it asks for, and is its run folder free?"""

from __future__ import annotations

import contextlib
import functools
import getpass
import os
import re
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch import folder
from launch.request import Request
from launch.restarts import read_json
from launch.settings import seconds_of
from launch.slurm_options import for_asking, for_sbatch, given
from launch.slurm_script import gpus, options, script
from tubelet import files
from tubelet.errors import EXIT_INTERRUPTED, EXIT_LOST, EXIT_PREEMPTED, ConfigError, Problems, RunError, nearest
from tubelet.redact import redact

COMMANDS = ("sbatch", "sinfo", "squeue", "scontrol")
ANSWER_SECONDS = 60


@dataclass(frozen=True)
class Nodes:
    """Nodes of one kind in one partition, as sinfo lists them."""

    partition: str
    default: bool
    seconds: int | None
    """Longest job; None = no limit."""
    count: int
    gpus: int
    cpus: int


def check_commands() -> None:
    """Raises `RunError` when this is no host to submit from."""
    missing = [name for name in COMMANDS if shutil.which(name) is None]
    if missing:
        raise RunError(f"SLURM's {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not on the PATH of this host.",
                       "a login node of the cluster; or `module load slurm`; --dry-run prints the script anywhere")


def ask(*words: str) -> str:
    """What a command of SLURM says. Raises `RunError` when it fails or does not answer."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=ANSWER_SECONDS, env=for_asking())
    except subprocess.TimeoutExpired:
        raise RunError(f"`{' '.join(words)}` took more than {ANSWER_SECONDS} s.", "again, when SLURM answers") from None
    if done.returncode:
        raise RunError(f"`{' '.join(words)}` failed: {done.stderr.strip()}.", "again, when SLURM answers (`scontrol ping`)")
    return done.stdout


def check(request: Request) -> None:
    """Everything that the cluster cannot give, and every run folder that cannot be written or is in use, in one error."""
    problems = Problems(ConfigError)
    _check_nodes(request, problems)
    for run in request.runs or [request]:
        try:
            writable(run.launch_folder)
            claim(run, record=False)
        except RunError as error:
            problems.items.append(error)
    for path in output_folders(request):
        if "%" in str(path):
            problems.add(f"The job's output would lie in {path}: SLURM makes no folders, and fails a job without a word "
                         "when its output's is not there.", f"--output {path.parent}/%x-%j.out: % in the file's name alone")
            continue
        try:
            writable(path)
        except RunError as error:
            problems.add(error.problem, "another --output, or permissions there")
    problems.raise_if_any()


def output_folders(request: Request) -> list[Path]:
    """Folders that the job's output and errors are made in, where they are not this launcher's own; SLURM does not make
    them. What exists (/dev/null) needs none."""
    found = given(options(request))
    paths = [Path(request.workdir, found[key].replace("%x", request.name).replace("%u", getpass.getuser())) for key in
             ("output", "error") if found.get(key)]
    places = dict.fromkeys(path.parent for path in paths if not path.exists())
    return [place for place in places if place != request.launch_folder]


# -------------------------------------------------------------------------------------------------- the cluster


def partitions() -> list[Nodes]:
    """The cluster's nodes by partition."""
    found = []
    for line in ask("sinfo", "-h", "-a", "-e", "-o", "%P|%l|%D|%G|%c").splitlines():
        name, limit, count, gres, cpus = line.split("|")
        found.append(Nodes(name.rstrip("*"), name.endswith("*"), None if limit in ("infinite", "n/a") else seconds_of(limit),
                           int(count), _gpus(gres), int(cpus.rstrip("+"))))
    return found


def _gpus(gres: str) -> int:
    """GPUs of a node: `gpu:h100:8(S:0-1),nic:2` -> 8."""
    return sum(int(match[1]) for match in re.finditer(r"(?:^|,)gpu(?::[^:,()]+)*?:(\d+)(?=[(,]|$)", gres))


def _check_nodes(request: Request, problems: Problems) -> None:
    slurm = request.settings.slurm
    _check_names(slurm, problems)
    everywhere = partitions()
    names = sorted({nodes.partition for nodes in everywhere})
    asked = given(options(request)).get("partition")
    named = asked or os.environ.get("SBATCH_PARTITION")
    wanted = named.split(",") if named else [nodes.partition for nodes in everywhere if nodes.default]
    for name in wanted:
        if name not in names:
            close = nearest(name, names)
            problems.add(f"{'`slurm.partition`' if asked else '$SBATCH_PARTITION'} {name} is no partition of this cluster.",
                         (close or [", ".join(names)])[0])
    if not wanted:
        problems.add("The cluster has no default partition, and `slurm.partition` is not given.",
                     f"--partition {names[0] if names else 'NAME'}")
    chosen = [nodes for nodes in everywhere if nodes.partition in wanted]
    if chosen:
        where = f"partition {','.join(dict.fromkeys(wanted))}"
        _check_gpus(request, chosen, where, problems)
        _check_size(request, chosen, where, problems)


def _check_gpus(request: Request, chosen: list[Nodes], where: str, problems: Problems) -> None:
    """Are there enough nodes, and enough with so many GPUs?"""
    settings, need, low = request.settings, gpus(request), request.settings.node_range[0]
    total, enough = sum(nodes.count for nodes in chosen), sum(nodes.count for nodes in chosen if nodes.gpus >= need)
    most = max(nodes.gpus for nodes in chosen)
    if total < low:
        problems.add(f"--nodes {settings.nodes}: {where} has {total} node(s).", f"--nodes {total}, or another --partition")
    if most < need:
        problems.add(f"--gpus-per-node {need}: nodes of {where} have {most or 'no'} GPU(s).",
                     f"--gpus-per-node {most}, or another --partition" + ("" if most else " (0 trains on CPUs)"))
    elif enough < low <= total:
        problems.add(f"--nodes {settings.nodes} --gpus-per-node {need}: only {enough} node(s) of {where} have so many GPUs.",
                     f"--nodes {enough}, or fewer --gpus-per-node")


def _check_size(request: Request, chosen: list[Nodes], where: str, problems: Problems) -> None:
    """Are there enough cores, and may a job be so long?"""
    settings, cores = request.settings, max(nodes.cpus for nodes in chosen)
    if settings.tasks_per_node * (settings.cpus_per_task or 1) > cores:
        problems.add(f"{settings.tasks_per_node} process(es) a node, {settings.cpus_per_task or 1} core(s) each: nodes "
                     f"of {where} have {cores} core(s).", "fewer --cpus-per-task")
    longest = max(float("inf") if nodes.seconds is None else nodes.seconds for nodes in chosen)
    if settings.seconds and settings.seconds > longest:
        problems.add(f"--time {settings.time}: {where} lets jobs run for {longest // 60:.0f} minutes at most.",
                     f"--time {longest // 60:.0f}: the run is saved before, and started again by itself")


def _check_names(slurm: Any, problems: Problems) -> None:
    """Names of nodes that do not exist."""
    given = {key: getattr(slurm, key) for key in ("nodelist", "exclude") if getattr(slurm, key)}
    if not given:
        return
    known = set(ask("sinfo", "-h", "-a", "-N", "-o", "%N").split())
    for key, text in given.items():
        unknown = [name for name in ask("scontrol", "show", "hostnames", text).split() if name not in known]
        if unknown:
            close = nearest(unknown[0], known)
            problems.add(f"`slurm.{key}` {text}: the cluster has no node {', '.join(unknown[:8])}.",
                         close[0] if close else "a node that `sinfo -N` lists")


def test_only(request: Request) -> None:
    """Let SLURM say whether it would take a job (accounts, limits, features). Raises `ConfigError` with its words."""
    done = subprocess.run(["sbatch", "--test-only"], input=script(request), capture_output=True, text=True,
                          env=for_sbatch(options(request)))
    if done.returncode or "allocation failure" in done.stderr:
        said = [line.removeprefix("sbatch: error: ") for line in done.stderr.strip().splitlines()] or ["without a reason"]
        raise ConfigError(f"SLURM would refuse this job: {redact('; '.join(dict.fromkeys(said)))}.",
                          "other settings (`python -m launch slurm --help`); `scontrol show partition` lists what there is")


# ----------------------------------------------------------------------------------------------------- the folder


def writable(path: Path) -> None:
    """Raises `RunError` unless a folder, or the nearest one above it, can be written: a file is made and removed."""
    if path.is_dir():
        return folder.prepare(path)
    above = next((parent for parent in path.parents if parent.exists()), Path("/"))
    probe = above / f".probe-{os.getpid()}"
    try:
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise RunError(f"{path} cannot be made, since {above} cannot be written: {error.strerror or error}.",
                       "another run.dir= (shared by all nodes), or permissions there") from None


@functools.cache
def _config() -> str:
    return ask("scontrol", "show", "config")


def cluster() -> str:
    """The name of this cluster: numbers of jobs mean nothing on another."""
    found = re.search(r"^ClusterName\s*=\s*(\S+)", _config(), re.MULTILINE)
    return found[1] if found else ""


def sees_jobs_of(user: str) -> bool:
    """Whether SLURM would show us a job of `user`: with PrivateData=jobs everybody sees their own alone."""
    private = re.search(r"^PrivateData\s*=\s*(\S+)", _config(), re.MULTILINE)
    hidden = private is not None and {"jobs", "all"} & set(private[1].lower().split(","))
    return not hidden or user == getpass.getuser() or os.getuid() == 0


def state_of(job: str) -> str:
    """State of a job (`RUNNING`, `PENDING`, ...); "" when SLURM does not show it in its queue any more."""
    try:
        said = ask("squeue", "-h", "-j", job, "-o", "%T")
    except RunError as error:
        if "Invalid job id" not in error.problem:
            raise
        return ""
    return " ".join(dict.fromkeys(said.split()))


def claim(request: Request, record: bool = True) -> None:
    """Raises `RunError` when another job writes the run's folder or waits to do so, or may do so unseen by us.

    A start that left no record of its end, of a job of this cluster that SLURM does not know any more, was killed: it is
    written down (unless not `record`), so that the new job, which cannot tell, may follow it.
    """
    if request.training is None:
        return
    place, free = request.launch_folder, request.training.run.take_over
    submitted, here = read_json(place / "submitted.json"), cluster()
    last = folder.open_attempt(request)
    ours = submitted.get("cluster", here) == here
    way_out = "run.take_over=true (it then leaves with exit code 86); or another run.name"
    owner = str(submitted.get("user", ""))
    if submitted and not owner:  # written by an earlier version
        with contextlib.suppress(OSError, KeyError):
            owner = (place / "submitted.json").owner()
    users = {str(submitted.get("job", "")): owner}
    if last:
        users[last.job] = last.user
    for job, user in users.items():
        number = job.removeprefix("slurm-")
        if not job.startswith("slurm-") or not ours or free:
            continue
        if state := state_of(number):
            raise RunError(f"Job {number} writes {request.run_folder}: it is {state.lower()}. Two jobs must never write one "
                           "run folder.", f"scancel {number}; or {way_out}")
        if not sees_jobs_of(user) and not _is_over(request, job):
            raise RunError(f"Job {number} of {user or 'somebody'} may still write {request.run_folder}: this cluster shows "
                           "nobody the jobs of others (PrivateData).", f"ask {user or 'them'} whether it runs; or {way_out}")
    if last is None or free:
        return
    if last.job.startswith("slurm-") and ours and submitted.get("job") == last.job:
        if record:
            files.write_json(Path(str(request.run_folder), "attempts", f"{last.number:04d}.end.json"), {
                "how": "lost", "code": EXIT_LOST, "time": time.time(),
                "error": f"job {last.job} left no record of its end and is not in SLURM's queue any more"})
        return
    folder.check_owner(request)


def _is_over(request: Request, job: str) -> bool:
    """Whether the newest start of a job wrote down an end after which nobody starts it again."""
    run = folder.the_run(request)
    attempts = run.attempts() if run else []
    if run is None or not attempts or attempts[-1].job != job:
        return False
    code = read_json(run.folder / "attempts" / f"{attempts[-1].number:04d}.end.json").get("code")
    return isinstance(code, int) and code not in (EXIT_PREEMPTED, EXIT_LOST) and code <= EXIT_INTERRUPTED
