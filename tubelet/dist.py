"""Rank, world, device and process group, whoever launched us; and how ranks agree.

The place of this process is read from the environment in this order: torchrun, PMI, SLURM, Open MPI, else a single
process. MPI discovery is never used. Two process groups exist: the default one (NCCL on GPUs, gloo on CPUs) carries
gradients; a gloo *control* group with a longer time-out of its own carries flags, decisions and objects, so that a
slow save never trips the training time-out.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from tubelet.errors import ConfigError, TubeletError

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

_RANK = ("RANK", "PMI_RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK")
_SIZE = ("WORLD_SIZE", "PMI_SIZE", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")
_LOCAL_RANK = ("LOCAL_RANK", "MPI_LOCALRANKID", "SLURM_LOCALID", "OMPI_COMM_WORLD_LOCAL_RANK")
_LOCAL_SIZE = ("LOCAL_WORLD_SIZE", "MPI_LOCALNRANKS", "SLURM_NTASKS_PER_NODE", "OMPI_COMM_WORLD_LOCAL_SIZE")

EXIT_DIR = "TUBELET_EXIT_DIR"
"""Environment variable: the folder through which `launch local` learns pids and exit codes of its workers."""


def die_with_parent() -> None:
    """From now on this process gets SIGKILL when the one that started it ends (Linux)."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


@dataclass(frozen=True)
class World:
    """Where this process stands. `rank` in 0..size-1 over all nodes, `local_rank` on this node."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    address: str = "127.0.0.1"
    port: int = 0

    @property
    def speaks(self) -> bool:
        """True on the one rank that prints and writes what is common to all."""
        return self.rank == 0


def _first(env: Mapping[str, str], names: tuple[str, ...]) -> int | None:
    for name in names:
        value = env.get(name, "")
        if value.split("(")[0].isdigit():  # SLURM writes "4(x2)" for two nodes of four tasks
            return int(value.split("(")[0])
    return None


def _first_slurm_host(nodes: str) -> str:
    try:
        listed = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, timeout=20)
        if listed.returncode == 0 and listed.stdout.split():
            return listed.stdout.split()[0]
    except (OSError, subprocess.SubprocessError):
        pass
    head = nodes.split(",")[0]
    if "[" not in head:
        return head
    prefix, _, rest = nodes.partition("[")
    return prefix + rest.split("]")[0].split(",")[0].split("-")[0]


def resolve(env: Mapping[str, str] | None = None) -> World:
    """The place of this process, from its environment. Raises `ConfigError` when the variables contradict each other."""
    env = os.environ if env is None else env
    if "RANK" not in env and "SLURM_PROCID" in env and "SLURM_STEP_ID" not in env:
        env = {k: v for k, v in env.items() if not k.startswith("SLURM_")}  # a shell inside an allocation, not a task
    rank, size = _first(env, _RANK), _first(env, _SIZE)
    if rank is None or size is None:
        return World()
    local_rank = _first(env, _LOCAL_RANK)
    local_size = _first(env, _LOCAL_SIZE) or (size if size == 1 else 1)
    if rank >= size:
        raise ConfigError(f"This process is rank {rank} of {size}: ranks count from 0 to {size - 1}.",
                          "unset leftover RANK / WORLD_SIZE variables, or start through `python -m launch`")
    address, port = env.get("MASTER_ADDR", ""), env.get("MASTER_PORT", "")
    if not address:
        nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST", "")
        address = _first_slurm_host(nodes) if nodes else "127.0.0.1"
    if not port:
        job = env.get("SLURM_JOB_ID", "")
        port = str(20_000 + int(job) % 20_000) if job.isdigit() else "0"
    if size > 1 and port == "0":
        raise ConfigError(f"WORLD_SIZE is {size} but MASTER_PORT is not set, so the ranks cannot meet.",
                          "export MASTER_ADDR and MASTER_PORT, or start through `python -m launch`")
    return World(rank, size, local_rank if local_rank is not None else 0, local_size, address, int(port))


# ------------------------------------------------------------------------------------------- process groups

_control: Any = None  # the control group; None = single process without a group


def free_port() -> int:
    """A TCP port that is free now on this host."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(world: World, timeout_seconds: float = 600, control_timeout_seconds: float = 7200) -> torch.device:
    """Join the process group (all ranks call it) and return this rank's device. Also sets what DeepSpeed reads.

    A single process gets a group of one, so that every engine runs the same code at any world size.
    """
    global _control
    import torch
    import torch.distributed as dist

    cuda = torch.cuda.is_available()
    if not cuda:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        if "OMP_NUM_THREADS" not in os.environ:  # ranks of one host that each take every core are many times slower
            threads = max(1, (os.cpu_count() or 1) // world.local_size)
            os.environ["OMP_NUM_THREADS"] = str(threads)
            torch.set_num_threads(threads)
    port = world.port or free_port()
    os.environ.update(RANK=str(world.rank), WORLD_SIZE=str(world.size), LOCAL_RANK=str(world.local_rank),
                      LOCAL_SIZE=str(world.local_size), MASTER_ADDR=world.address, MASTER_PORT=str(port))
    device = torch.device("cuda", world.local_rank) if cuda else torch.device("cpu")
    if cuda:
        if world.local_rank >= torch.cuda.device_count():
            raise ConfigError(f"Local rank {world.local_rank} has no GPU: {torch.cuda.device_count()} are visible.",
                              "start at most one process a GPU, or check CUDA_VISIBLE_DEVICES")
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo", rank=world.rank, world_size=world.size,
                                timeout=timedelta(seconds=timeout_seconds), device_id=device if cuda else None)
    _control = dist.new_group(backend="gloo", timeout=timedelta(seconds=control_timeout_seconds))
    return device


def stop() -> None:
    """Leave the process group. Without this the next start on the same port can abort."""
    global _control
    import torch.distributed as dist

    _control = None
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def _alone() -> bool:
    import torch.distributed as dist

    return not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1


def barrier() -> None:
    """Wait for all ranks (control group). All ranks call it."""
    import torch.distributed as dist

    if not _alone():
        dist.barrier(group=_control)


def broadcast(value: T, source: int = 0) -> T:
    """`value` of rank `source`, on all ranks. All ranks call it; the value must be picklable."""
    import torch.distributed as dist

    if _alone():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=source, group=_control)
    return box[0]


def gather(value: T) -> list[T]:
    """The values of all ranks in rank order, on all ranks. All ranks call it."""
    import torch.distributed as dist

    if _alone():
        return [value]
    box: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(box, value, group=_control)
    return box


def sums(values: list[float]) -> list[float]:
    """Element-wise float64 sums over ranks (control group). All ranks call it with lists of one length."""
    import torch
    import torch.distributed as dist

    if _alone():
        return list(values)
    tensor = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(tensor, group=_control)
    return tensor.tolist()


def maxima(values: list[float]) -> list[float]:
    """Element-wise float64 maxima over ranks (control group). All ranks call it with lists of one length."""
    import torch
    import torch.distributed as dist

    if _alone():
        return list(values)
    tensor = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=_control)
    return tensor.tolist()


def together(action: Callable[[], T]) -> T:
    """Run `action` on every rank; if it raised on any, all ranks raise the error of the lowest one.

    This is how a failure that only one rank can see (a full disk, a damaged file) ends without a hang. The action must
    not contain collectives that a failing rank would leave.
    """
    result: Any = None
    error: BaseException | None = None
    try:
        result = action()
    except Exception as caught:
        error = caught
    said = (type(error), getattr(error, "problem", str(error)), getattr(error, "hint", "")) if error else None
    everyone = gather(said)
    failed = [(rank, item) for rank, item in enumerate(everyone) if item is not None]
    if not failed:
        return result
    rank, item = failed[0]
    assert item is not None
    kind, problem, hint = item
    if error is None or said != item:
        if issubclass(kind, TubeletError):
            error = kind(problem if rank == 0 else f"Rank {rank}: {problem}", hint)
        else:
            error = RuntimeError(f"Rank {rank} failed with {kind.__name__}: {problem}")
    raise error


def all_failing(wait_seconds: float = 3.0) -> bool:
    """True when every rank calls this within `wait_seconds`: all are leaving with an error, so nobody is left waiting in
    a collective. Uses the rendezvous store, no collective."""
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        return False
    try:
        store, size, until = dist.distributed_c10d._get_default_store(), dist.get_world_size(), time.time() + wait_seconds
        store.add("tubelet-failing", 1)
        while store.add("tubelet-failing", 0) < size:
            if time.time() > until:
                return False
            time.sleep(0.02)
    except RuntimeError:  # the store has gone with the rank that held it
        return False
    return True
