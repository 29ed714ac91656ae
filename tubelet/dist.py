"""Rank, world, device and process group, whoever launched us; and how ranks agree.

The place of this process is read from the environment in this order: torchrun, PMI, SLURM, Open MPI, else a single
process. MPI discovery is never used. Two kinds of process groups exist: the default one (NCCL on GPUs, gloo on CPUs) and
what DeepSpeed makes beside it carry gradients; one gloo *control* group carries flags, decisions and objects. Each has a
time-out, and `patience` changes them for training, saving and evaluating, so that a slow save never trips the training
time-out; `explain` says what to do when one was met all the same.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from tubelet import network
from tubelet.errors import ConfigError, TubeletError
from tubelet.meeting import DOING, MARK, Meeting, explanation

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

_RANK = ("RANK", "PMI_RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK")
_SIZE = ("WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")
_LOCAL_RANK = ("LOCAL_RANK", "MPI_LOCALRANKID", "SLURM_LOCALID", "OMPI_COMM_WORLD_LOCAL_RANK")
_LOCAL_SIZE = ("LOCAL_WORLD_SIZE", "MPI_LOCALNRANKS", "SLURM_STEP_TASKS_PER_NODE", "SLURM_NTASKS_PER_NODE",
               "OMPI_COMM_WORLD_LOCAL_SIZE")
_FIRST_RESERVED_STEP = 0xFFFFFFF0
"""From here on SLURM's step numbers are no steps of srun: 4294967290 is salloc's shell where a site sets
`use_interactive_step`, which has the rank 0 and the number of tasks of the whole allocation in its environment."""

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


def slurm_hosts(nodes: str) -> list[str]:
    """Host names of a list as SLURM writes it (`n[1-4]`), in its order; empty where scontrol is not there or fails."""
    try:
        listed = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return []
    return listed.stdout.split() if listed.returncode == 0 else []


def _first_slurm_host(nodes: str) -> str:
    hosts = slurm_hosts(nodes)
    if hosts:
        return hosts[0]
    head = nodes.split(",")[0]
    if "[" not in head:
        return head
    prefix, _, rest = nodes.partition("[")
    return prefix + rest.split("]")[0].split(",")[0].split("-")[0]


def _in_step(env: Mapping[str, str]) -> bool:
    """Whether SLURM's srun started this process as one of its tasks."""
    step = env.get("SLURM_STEP_ID")
    return step is not None and not (step.isdigit() and int(step) >= _FIRST_RESERVED_STEP)


def resolve(env: Mapping[str, str] | None = None) -> World:
    """The place of this process, from its environment. Raises `ConfigError` when the variables contradict each other."""
    env = os.environ if env is None else env
    if "RANK" not in env and "SLURM_PROCID" in env and not _in_step(env):
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
_meeting = Meeting()  # made by `start`, kept after `stop` so that errors can be explained
_waits: AbstractContextManager[Any] = nullcontext()


def free_port() -> int:
    """A TCP port that is free now on this host."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(world: World, timeout_seconds: float = 600, start_timeout_seconds: float = 3600, *,
          save_timeout_seconds: float = 3600, eval_timeout_seconds: float = 3600) -> torch.device:
    """Join the process group (all ranks call it) and return this rank's device. Also sets what DeepSpeed reads.

    A single process gets a group of one, so that every engine runs the same code at any world size. The time-outs are those
    of collectives, in seconds: of gradients, of the control group when starting and ending (outside of any `patience`), and
    inside those of saving and evaluating.
    """
    global _control, _meeting
    import torch
    import torch.distributed as dist

    _meeting = Meeting(rank=world.rank)  # a device may fail before the ranks have met
    cuda = torch.cuda.is_available()
    if not cuda:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        if "OMP_NUM_THREADS" not in os.environ:  # ranks of one host that each take every core are many times slower
            threads = max(1, (os.cpu_count() or 1) // world.local_size)
            os.environ["OMP_NUM_THREADS"] = str(threads)
            torch.set_num_threads(threads)
    store = None
    if world.size == 1 and not dist.is_initialized():  # nobody to meet: a port that no other program can take first
        store = dist.TCPStore("127.0.0.1", 0, 1, is_master=True)
    port = store.port if store else world.port or free_port()
    index = device_index(world, torch.cuda.device_count()) if cuda else world.local_rank
    # DeepSpeed and Accelerate take LOCAL_RANK for the number of the device.
    os.environ.update(RANK=str(world.rank), WORLD_SIZE=str(world.size), LOCAL_RANK=str(index),
                      LOCAL_SIZE=str(world.local_size), MASTER_ADDR=world.address, MASTER_PORT=str(port))
    network.choose_card(world.address, several=world.size > world.local_size)
    device = torch.device("cuda", index) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo", rank=world.rank, world_size=world.size, store=store,
                                timeout=timedelta(seconds=timeout_seconds), device_id=device if cuda else None)
    _control = dist.new_group(backend="gloo", timeout=timedelta(seconds=start_timeout_seconds))
    _meeting = Meeting({"": start_timeout_seconds, "train": timeout_seconds, "save": save_timeout_seconds,
                         "evaluate": eval_timeout_seconds}, rank=world.rank)
    _meeting.hosts = gather(_own_host())
    return device


def device_index(world: World, visible: int, env: Mapping[str, str] | None = None) -> int:
    """Which of the `visible` GPUs this rank takes: that of its local rank, or the only one where SLURM gives each task its
    own. Raises `ConfigError` when there is none for it."""
    if visible == 1 and "SLURM_STEP_ID" in (os.environ if env is None else env):
        return 0
    if world.local_rank >= visible:
        raise ConfigError(f"Local rank {world.local_rank} has no GPU: {visible} are visible.",
                          "start at most one process a GPU, or check CUDA_VISIBLE_DEVICES")
    return world.local_rank


def _own_host() -> tuple[str, str]:
    return socket.gethostname(), network.own_address(os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")[0])


def host(rank: int) -> str:
    """The name of the host that a rank runs on; "?" before `start`."""
    return _meeting.name_of(rank)


def stop() -> None:
    """Leave the process group. Without this the next start on the same port can abort."""
    global _control, _waits
    import torch.distributed as dist

    _control, _waits = None, nullcontext()
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def patience(what: str) -> Iterator[None]:
    """Collectives that begin inside wait as long as `what` allows: "train", "save" (restoring too) or "evaluate". All ranks
    enter and leave it at the same place in the program; it may be nested, and the innermost one counts.

    It holds for the control group and for every other group of this process, NCCL or gloo, the ones of DeepSpeed included.
    (Until the first `patience` those have torch's own time-out, 10 minutes under NCCL and 30 under gloo, whatever
    `timeout_seconds` says.) A collective that is already under way keeps the time-out it began with. Leaving costs one
    barrier when what follows is less patient: else the first rank out would wait for the others by the shorter time-out.
    """
    assert what in DOING and what, what
    before = _meeting.doing
    try:
        _be_patient(what)
        yield
        if _seconds(before) < _seconds(what):
            barrier()
    except BaseException as error:
        if not hasattr(error, MARK):
            setattr(error, MARK, what)
        raise
    finally:
        _be_patient(before)


def _seconds(what: str) -> float:
    return _meeting.seconds.get(what, float("inf"))


def _be_patient(what: str) -> None:
    import torch.distributed as dist

    _meeting.doing = what
    if not (dist.is_available() and dist.is_initialized()) or not _meeting.seconds:
        return
    control, others = _meeting.seconds[what], _meeting.seconds[what or "train"]
    for group in list(dist.distributed_c10d._world.pg_map):
        _set_timeout(group, control if group is _control else others)


def _set_timeout(group: Any, seconds: float) -> None:
    """torch's way; its name was `_set_pg_timeout` until 2.14."""
    import torch.distributed as dist

    change = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a backend of neither kind warns and keeps its own
        change(timedelta(seconds=seconds), group)


def mark_waits(context: AbstractContextManager[Any] | None) -> None:
    """Enter `context` (such as `phases("wait")`, made to be entered again and again) around every collective of the control
    group; None = no longer. Ended by `stop`."""
    global _waits
    _waits = context or nullcontext()


def _alone() -> bool:
    import torch.distributed as dist

    return not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1


def barrier() -> None:
    """Wait for all ranks (control group). All ranks call it."""
    import torch.distributed as dist

    if not _alone():
        with _waits:
            dist.barrier(group=_control)


def broadcast(value: T, source: int = 0) -> T:
    """`value` of rank `source`, on all ranks. All ranks call it; the value must be picklable."""
    import torch.distributed as dist

    if _alone():
        return value
    box = [value]
    with _waits:
        dist.broadcast_object_list(box, src=source, group=_control)
    return box[0]


def gather(value: T) -> list[T]:
    """The values of all ranks in rank order, on all ranks. All ranks call it."""
    import torch.distributed as dist

    if _alone():
        return [value]
    box: list[Any] = [None] * dist.get_world_size()
    with _waits:
        dist.all_gather_object(box, value, group=_control)
    return box


def sums(values: list[float]) -> list[float]:
    """Element-wise float64 sums over ranks (control group). All ranks call it with lists of one length."""
    return _reduced(values, "SUM")


def maxima(values: list[float]) -> list[float]:
    """Element-wise float64 maxima over ranks (control group). All ranks call it with lists of one length."""
    return _reduced(values, "MAX")


def _reduced(values: list[float], how: str) -> list[float]:
    import torch
    import torch.distributed as dist

    if _alone():
        return list(values)
    tensor = torch.tensor(values, dtype=torch.float64)
    with _waits:
        dist.all_reduce(tensor, op=getattr(dist.ReduceOp, how), group=_control)
    return tensor.tolist()


def bear_witness(sentence: str) -> None:
    """Keep who is missing, in a sentence, for `explain`; the last one counts."""
    _meeting.witness = sentence.strip()


def explain(error: BaseException) -> TubeletError | None:
    """What a failed collective of torch, or a failed device, means to a user, or None when `error` is something else.

    Recognised are time-outs and lost connections of gloo, NCCL and the rendezvous store, and devices and network cards that
    fail. The answer names what was being done, the setting of its time-out, and the peer as far as it is known; its cause
    is `error`.
    """
    return explanation(error, _meeting)


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
    answers: list[bool] = []  # asked for in a thread: a store behind a network that is cut never answers
    thread = threading.Thread(target=lambda: answers.append(_all_fail(wait_seconds)), name="tubelet-leaving", daemon=True)
    thread.start()
    thread.join(wait_seconds + 1)
    return answers == [True]


def _all_fail(wait_seconds: float) -> bool:
    import torch.distributed as dist

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
