"""What a host has and allows: memory, /dev/shm, cores, limits, environment. Looking needs no torch."""

from __future__ import annotations

import os
import resource
import shutil
import socket
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from tubelet import dist
from tubelet.files import human_bytes
from tubelet.memory import INFINITE, cgroup_memory_left
from tubelet.program.doctor.findings import Finding, at_least, at_most, equal, some
from tubelet.program.doctor.nodes import Node, known

GIB = 2**30
HARMFUL = {"CUDA_LAUNCH_BLOCKING": ("1", "every kernel waits for the one before"),
           "NCCL_P2P_DISABLE": ("1", "GPUs of a node exchange through the host's memory"),
           "NCCL_SHM_DISABLE": ("1", "ranks of a node exchange through the network"),
           "NCCL_IB_DISABLE": ("1", "InfiniBand and RoCE are not used"),
           "NCCL_DEBUG": ("INFO TRACE", "every rank writes pages of log"),
           "TORCH_DISTRIBUTED_DEBUG": ("DETAIL", "every collective is checked, which is slow"),
           "TORCH_NCCL_BLOCKING_WAIT": ("1", "the host waits for every collective"),
           "NCCL_BLOCKING_WAIT": ("1", "the host waits for every collective"),
           "PYTORCH_NO_CUDA_MEMORY_CACHING": ("1", "every tensor asks the driver for memory"),
           "TORCH_SHOW_CPP_STACKTRACES": ("1", "errors of ranks become pages")}
PREFIXES = ("NCCL_", "GLOO_", "TORCH_NCCL_")
_EACH_ITS_OWN = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "NCCL_IB_HCA")  # cards may be called otherwise elsewhere


def clock() -> float:
    """Seconds since 1970 by this host's clock."""
    return time.time()


def look(env: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """Numbers of this host. Bytes are bytes; a limit that is none is `INFINITE`."""
    memory = psutil.virtual_memory()
    shm = shutil.disk_usage("/dev/shm") if os.path.isdir("/dev/shm") else None
    infiniband = Path("/sys/class/infiniband")
    return {
        "shm": shm.free if shm else None,
        "memory": memory.available, "memory_total": memory.total, "swap_used": psutil.swap_memory().used,
        "memory_limit": cgroup_memory_left(),
        "cores": len(os.sched_getaffinity(0)), "cores_online": os.cpu_count() or 1, "cpu_quota": cgroup_cpus(),
        "open_files": _hard(resource.RLIMIT_NOFILE), "locked": _hard(resource.RLIMIT_MEMLOCK),
        "processes": min(_hard(resource.RLIMIT_NPROC), _number(Path("/sys/fs/cgroup/pids.max"))),
        "infiniband": sorted(path.name for path in infiniband.iterdir()) if infiniband.is_dir() else [],
        "tmp": shutil.disk_usage(tempfile.gettempdir()).free, "tmp_folder": tempfile.gettempdir(),
        "threads": env.get("OMP_NUM_THREADS", ""), "slurm_cpus": env.get("SLURM_CPUS_PER_TASK", ""),
        "environment": {key: value for key, value in sorted(env.items()) if key.startswith(PREFIXES) or key in HARMFUL},
    }


def _hard(which: int) -> float:
    limit = resource.getrlimit(which)[1]  # a run raises its own limit to the hard one
    return INFINITE if limit == resource.RLIM_INFINITY else float(limit)


def _number(path: Path) -> float:
    try:
        text = path.read_text().strip()
    except OSError:
        return INFINITE
    return float(text) if text.isdigit() else INFINITE


def cgroup_cpus(root: Path = Path("/sys/fs/cgroup")) -> float:
    """Cores' worth of time that the container may use; `INFINITE` without a quota."""
    try:
        quota, period = (root / "cpu.max").read_text().split()
        return INFINITE if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        return INFINITE


def judge(nodes: Sequence[Node], needs: Mapping[str, float]) -> list[Finding]:
    """Rules for one host each. `needs`: bytes of /dev/shm (`shm`) and of memory (`memory`) per node that the recipe takes,
    when there is one."""
    facts = known(nodes, "machine")
    per_node = {node.label: len(node.ranks) for node in nodes}
    return [*_memory(facts, per_node, needs), *_cores(facts, per_node), *_limits(facts, per_node), *_environment(facts)]


def _memory(facts: dict[str, Any], per_node: dict[str, int], needs: Mapping[str, float]) -> list[Finding]:
    found = []
    shm = {label: mine["shm"] for label, mine in facts.items() if mine["shm"] is not None}
    hint = "docker run --shm-size=16g (or --ipc=host); in Kubernetes an emptyDir with medium: Memory at /dev/shm"
    if not shm:
        found.append(Finding("memory", "/dev/shm", "skipped", "there is none on this system"))
    elif needs.get("shm"):
        found.append(at_least("memory", "/dev/shm", shm, show=human_bytes, what="free", fail=needs["shm"],
                              rule=f"the recipe's batches in flight take {human_bytes(needs['shm'])} on a node: workers x "
                              "prefetch x micro batch x ranks", hint=f"{hint}; or fewer data.workers"))
    else:
        found.append(at_least("memory", "/dev/shm", shm, show=human_bytes, what="free", warn=2 * GIB,
                              rule="at least 2 GiB, through which workers hand over batches", hint=hint))
    free = {label: min(mine["memory"], mine["memory_limit"]) / per_node[label] for label, mine in facts.items()}
    staged = needs.get("memory", 0.0)
    rule = "at least 2 GiB for each rank" + (f", and {human_bytes(staged)} to copy a checkpoint aside" if staged else "")
    found.append(at_least("memory", "RAM", free, show=human_bytes, what="free per rank", warn=2 * GIB + staged, rule=rule,
                          hint="another host, fewer ranks a node, or a higher memory limit of the container or job"
                          + ("; checkpoint.asynchronous=false needs no copy" if staged else "")))
    limited = {label: mine["memory_limit"] for label, mine in facts.items() if mine["memory_limit"] < INFINITE}
    if limited:
        found.append(Finding("memory", "limit of the cgroup", "ok", f"{human_bytes(min(limited.values()))} left",
                             details={label: human_bytes(value) for label, value in limited.items()}))
    swap = {label: float(mine["swap_used"]) for label, mine in facts.items()}
    found.append(at_most("memory", "swap", swap, show=human_bytes, what="used", warn=GIB, rule="less than 1 GiB in use",
                         hint="find out what took the memory: a host that swaps slows the whole job"))
    tmp = {label: float(mine["tmp"]) for label, mine in facts.items()}
    found.append(at_least("memory", "temporary folder", tmp, show=human_bytes, what="free", warn=GIB, fail=64 * 2**20,
                          rule="at least 1 GiB", hint="clean it, or TMPDIR=a folder on a larger local disk"))
    return found


def _cores(facts: dict[str, Any], per_node: dict[str, int]) -> list[Finding]:
    usable = {label: min(mine["cores"], mine["cpu_quota"]) for label, mine in facts.items()}
    found = [at_least("processor", "cores", {label: usable[label] / per_node[label] for label in facts},
                      show=lambda value: f"{value:.3g}", what="per rank", warn=1.0, rule="at least one for each rank",
                      hint="more cores for the job (--cpus-per-task, --cpu-bind=none, a higher CPU limit), or fewer ranks")]
    given = {label: int(mine["slurm_cpus"]) for label, mine in facts.items() if mine["slurm_cpus"].isdigit()}
    short = [label for label, count in given.items() if usable[label] < count]
    if given:
        found.append(Finding("processor", "cores of the task", "warn" if short else "ok",
                             f"SLURM_CPUS_PER_TASK {min(given.values())}, may use {min(usable[label] for label in given):g}",
                             "a task may use the cores that it asked for", "srun --cpus-per-task=N (it does not inherit "
                             "sbatch's), --cpu-bind=none" if short else "", short))
    threads = {label: int(mine["threads"]) * per_node[label] / usable[label] for label, mine in facts.items()
               if mine["threads"].isdigit()}
    if threads:
        found.append(at_most("processor", "OMP_NUM_THREADS", threads, show=lambda value: f"{value:.3g}",
                             what="threads per core over the ranks of a node", warn=1.01,
                             rule="threads x ranks of a node at most its cores",
                             hint="OMP_NUM_THREADS=cores / ranks, or unset it: the launcher then sets that"))
    return found


def _limits(facts: dict[str, Any], per_node: dict[str, int]) -> list[Finding]:
    def show(value: float) -> str:
        return "unlimited" if value >= INFINITE else f"{value:,.0f}"

    found = [at_least("limits", "open files", {label: mine["open_files"] for label, mine in facts.items()}, show=show,
                      fail=256, warn=4096, rule="at least 4096 (ulimit -Hn)",
                      hint="LimitNOFILE of the scheduler's or container's service, docker run --ulimit nofile=65536"),
             at_least("limits", "processes", {label: mine["processes"] for label, mine in facts.items()}, show=show,
                      warn=1024 * max(per_node.values(), default=1),
                      rule="at least 1024 threads for each rank of a node (ulimit -Hu, pids.max)",
                      hint="a higher ulimit -u, docker run --pids-limit=-1, TasksMax of the service")]
    with_cards = {label: mine["locked"] for label, mine in facts.items() if mine["infiniband"]}
    if with_cards:
        found.append(at_least("limits", "locked memory", with_cards, show=show, fail=INFINITE,
                              rule="unlimited on hosts with InfiniBand (ulimit -Hl)",
                              hint="LimitMEMLOCK=infinity of slurmd or the container, docker run --ulimit memlock=-1"))
    return found


def _environment(facts: dict[str, Any]) -> list[Finding]:
    found = []
    for key, (bad, why) in HARMFUL.items():
        hosts = [label for label, mine in facts.items() if mine["environment"].get(key, "").upper() in bad.split()]
        if hosts:
            value = facts[hosts[0]]["environment"][key]
            found.append(Finding("environment", key, "warn", f"{key}={value} on {some(hosts)}: {why}",
                                 "not in a run that should be fast", f"unset {key}", hosts))
    for key in dict.fromkeys(key for mine in facts.values() for key in mine["environment"] if key not in _EACH_ITS_OWN):
        one = equal("environment", key, {label: mine["environment"].get(key, "not set") for label, mine in facts.items()},
                    status="warn", hint="let the launcher set it for all hosts, not a profile of one of them")
        if one.status != "ok":
            found.append(one)
    if not found:
        given = dict.fromkeys(f"{key}={value}" for mine in facts.values() for key, value in mine["environment"].items())
        found.append(Finding("environment", "variables", "ok", some(list(given)) or "none of NCCL_*, GLOO_*, TORCH_NCCL_*",
                             "nothing that slows a run, and the same everywhere"))
    return found


def own(world: dist.World) -> dict[str, Any]:
    """What every rank says of itself."""
    return {"host": socket.gethostname(), "pid": os.getpid(), "local_rank": world.local_rank,
            "local_size": world.local_size, "cores": len(os.sched_getaffinity(0))}
