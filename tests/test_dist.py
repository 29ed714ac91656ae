"""Where a process stands, from whatever launched it; ranks that agree."""

import os
import socket
import time
from typing import Any

import pytest
from ranks import run_ranks

from tubelet import dist
from tubelet.errors import EXIT_LOST, ConfigError, DataError, DeviceError

LAUNCHERS = {
    "nothing": ({}, (0, 1, 0)),
    "torchrun": (dict(RANK="5", WORLD_SIZE="8", LOCAL_RANK="1", LOCAL_WORLD_SIZE="4", MASTER_ADDR="n0", MASTER_PORT="7"),
                 (5, 8, 1)),
    "slurm task": (dict(SLURM_PROCID="3", SLURM_NTASKS="4", SLURM_LOCALID="1", SLURM_JOB_ID="123", SLURM_STEP_ID="0",
                        SLURM_STEP_NODELIST="node[07-09]"), (3, 4, 1)),
    "slurm task of a smaller step": (dict(SLURM_PROCID="2", SLURM_NTASKS="4", SLURM_STEP_NUM_TASKS="3", SLURM_LOCALID="0",
                                          SLURM_JOB_ID="123", SLURM_STEP_ID="0", SLURM_STEP_NODELIST="n[1-2]",
                                          SLURM_STEP_TASKS_PER_NODE="2,1", SLURM_NTASKS_PER_NODE="2"), (2, 3, 0)),
    "slurm interactive step": (dict(SLURM_PROCID="0", SLURM_NTASKS="4", SLURM_LOCALID="0", SLURM_JOB_ID="123",
                                    SLURM_STEP_ID="4294967290", SLURM_NTASKS_PER_NODE="2"), (0, 1, 0)),
    "mpirun in a slurm interactive step": (dict(SLURM_PROCID="0", SLURM_NTASKS="4", SLURM_LOCALID="0", SLURM_JOB_ID="123",
                                                SLURM_STEP_ID="4294967290", OMPI_COMM_WORLD_RANK="1",
                                                OMPI_COMM_WORLD_SIZE="2", OMPI_COMM_WORLD_LOCAL_RANK="1", MASTER_ADDR="h",
                                                MASTER_PORT="9"), (1, 2, 1)),
    "srun's shell in an allocation": (dict(SLURM_PROCID="0", SLURM_NTASKS="4", SLURM_STEP_NUM_TASKS="1", SLURM_LOCALID="0",
                                           SLURM_JOB_ID="123", SLURM_STEP_ID="0", SLURM_STEP_NODELIST="n1"), (0, 1, 0)),
    "slurm shell": (dict(SLURM_PROCID="0", SLURM_NTASKS="4", SLURM_JOB_ID="123", SLURM_JOB_NODELIST="n1"), (0, 1, 0)),
    "open mpi": (dict(OMPI_COMM_WORLD_RANK="2", OMPI_COMM_WORLD_SIZE="4", OMPI_COMM_WORLD_LOCAL_RANK="0",
                      MASTER_ADDR="h", MASTER_PORT="9"), (2, 4, 0)),
    "torchrun under slurm": (dict(RANK="0", WORLD_SIZE="2", LOCAL_RANK="0", MASTER_ADDR="h", MASTER_PORT="9",
                                  SLURM_PROCID="7", SLURM_NTASKS="9"), (0, 2, 0)),
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_every_launcher_is_understood(launcher):
    env, expected = LAUNCHERS[launcher]
    world = dist.resolve(env)
    assert (world.rank, world.size, world.local_rank) == expected


def test_tasks_of_a_slurm_node_are_those_of_the_step():
    env = dict(LAUNCHERS["slurm task"][0], SLURM_NTASKS_PER_NODE="8", SLURM_STEP_TASKS_PER_NODE="2(x2)")
    assert dist.resolve(env).local_size == 2


def test_slurm_ranks_meet_on_the_first_host_at_a_port_of_the_job():
    world = dist.resolve(LAUNCHERS["slurm task"][0])
    assert world.address == "node07" and world.port == 20_123


def test_contradictory_or_incomplete_environments_are_refused():
    with pytest.raises(ConfigError, match="rank 4 of 4"):
        dist.resolve(dict(RANK="4", WORLD_SIZE="4", MASTER_ADDR="h", MASTER_PORT="1"))
    with pytest.raises(ConfigError, match="MASTER_PORT is not set"):
        dist.resolve(dict(RANK="0", WORLD_SIZE="4"))


def _fail_on(rank, world):
    if world.rank == rank:
        raise DataError(f"shard of rank {rank} vanished", "restore it")
    return world.rank


def _agree(world, device):
    seen = {"gather": dist.gather(world.rank * 10), "broadcast": dist.broadcast(f"from {world.rank}", source=1),
            "sums": dist.sums([1.0, float(world.rank)]), "maxima": dist.maxima([float(-world.rank)])}
    assert dist.together(lambda: _fail_on(9, world)) == world.rank
    try:
        dist.together(lambda: _fail_on(1, world))
    except DataError as error:
        seen["error"] = str(error)
    return seen


def test_ranks_agree_and_a_failure_of_one_is_raised_on_all():
    for seen in run_ranks(_agree, 2):
        assert seen["gather"] == [0, 10] and seen["broadcast"] == "from 1"
        assert seen["sums"] == [2.0, 1.0] and seen["maxima"] == [0.0]
        assert "shard of rank 1 vanished" in seen["error"] and "Try: restore it" in seen["error"]


def _restart(world, port, *seconds):
    """The same ranks in new groups with these time-outs: training, control, saving, evaluating."""
    dist.stop()
    train, control, save, evaluate = seconds
    os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)  # rank 0 serves the new meeting itself
    dist.start(dist.World(world.rank, world.size, world.local_rank, world.local_size, world.address, port), train, control,
               save_timeout_seconds=save, eval_timeout_seconds=evaluate)


def _failure(action):
    """(seconds, the error) of an action that must fail."""
    started = time.monotonic()
    try:
        action()
    except RuntimeError as error:
        return time.monotonic() - started, error
    raise AssertionError("no error came")


def _patiently(world, device, port):
    import torch
    import torch.distributed as torch_dist

    _restart(world, port, 1, 60, 30, 30)
    own: Any = torch_dist.new_group(backend="gloo")  # as DeepSpeed makes its own: with torch's time-out, not ours
    one, late = torch.ones(1), 1.3 * (world.rank == 1)
    with dist.patience("train"):
        torch_dist.all_reduce(one), torch_dist.all_reduce(one, group=own)  # connected: what follows measures waiting alone
        with dist.patience("save"):
            time.sleep(late)  # a save that is slower than timeout_seconds on one rank
            dist.barrier()
        with dist.patience("evaluate"):
            time.sleep(late)
            torch_dist.all_reduce(one), torch_dist.all_reduce(one, group=own)  # ZeRO-3 gathers weights in evaluation
            time.sleep(late)  # and is slow after its last collective too: the others must not go on without it
        total = dist.sums([1.0])
        time.sleep(late)
        waited, error = _failure(lambda: torch_dist.all_reduce(one, group=own))
        text = str(dist.explain(error))
    dist.stop()
    return total, waited, text


def test_slow_saving_and_evaluating_outlive_the_time_out_of_training_and_training_does_not():
    (total, waited, text), (other, _, _) = run_ranks(_patiently, 2, dist.free_port(), timeout=200)
    assert total == other == [2.0]
    assert 0.8 < waited < 3, waited  # timeout_seconds=1 holds for a group of DeepSpeed's kind, not torch's half an hour
    assert "timed out after 1 s while training (timeout_seconds=1)" in text and "a higher timeout_seconds" in text


def _broken(world, device, ports):
    import torch
    import torch.distributed as torch_dist

    def save():
        with dist.patience("train"), dist.patience("save"):
            time.sleep(3 * world.rank)
            dist.barrier()

    def train():
        with dist.patience("train"):
            torch_dist.all_reduce(torch.ones(1))

    _restart(world, ports[0], 20, 60, 1.5, 30)
    _, error = _failure(save)
    dist.bear_witness("rank 1 on host n7 has not been heard of for 45 s.")
    late = dist.explain(error)
    assert late and late.__cause__ is error
    _restart(world, ports[1], 20, 60, 30, 30)
    train()
    if world.rank == 0:
        lost = str(dist.explain(_failure(train)[1]))
    else:
        lost = ""
    dist.stop()  # rank 1 leaves at once, rank 0 after it saw that
    return str(late), lost, socket.gethostname()


def test_a_broken_collective_is_explained_with_its_setting_and_peer():
    (late, lost, name), (other, _, _) = run_ranks(_broken, 2, (dist.free_port(), dist.free_port()), timeout=200)
    assert "timed out after 1.5 s while saving or restoring (save_timeout_seconds=1.5)" in late
    assert "rank 1 on host n7 has not been heard of for 45 s." in late and "Try: a higher save_timeout_seconds" in late
    assert "Lost the connection to one of the ranks 0-1" in other, other  # rank 0 had given up
    assert f"Lost the connection to one of the ranks 0-1 on host {name}" in lost and "while training" in lost
    assert "Try: " in lost and "first-error" in lost


MESSAGES = {
    "[Rank 1] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=9, OpType=ALLREDUCE, NumelIn=1, NumelOut=1, "
    "Timeout(ms)=600000) ran for 600029 milliseconds before timing out.": "timed out after 600.029 s while training "
                                                                           "(timeout_seconds=600)",
    "NCCL error in: ProcessGroupNCCL.cpp:3690, remote process exited or there was a network error": "Lost the connection to "
                                                                                                    "another rank",
    "[/gloo/transport/tcp/pair.cc:561] Connection closed by peer [10.1.0.7]:14725.": "one of the ranks 2-3 on host n7",
    "[/gloo/transport/tcp/pair.cc:561] Connection closed by peer [10.9.9.9]:14725.": "a rank at 10.9.9.9",
    "[/gloo/transport/tcp/unbound_buffer.cc:78] Application timeout caused pair closure": "A collective timed out",
    "The client socket has timed out after 600000ms while trying to connect to (n0, 29500).": "The ranks did not meet",
}


@pytest.mark.parametrize("message", MESSAGES, ids=range(len(MESSAGES)))
def test_messages_of_nccl_gloo_and_the_store_are_understood(message):
    from torch.distributed import DistBackendError, DistNetworkError

    from tubelet.meeting import Meeting, explanation

    meeting = Meeting({"train": 600}, 2 * [("n0", "10.1.0.0")] + 2 * [("n7", "10.1.0.7")], "train")
    kind = RuntimeError if "gloo" in message else DistNetworkError if "client" in message else DistBackendError
    assert MESSAGES[message] in str(explanation(kind(message), meeting))


CUDA = "\nCUDA kernel errors might be asynchronously reported at some other API call"
NCCL = "NCCL error in: /pytorch/torch/csrc/distributed/c10d/ProcessGroupNCCL.cpp:3690, {}, NCCL version 2.30.7\n"
OF_DEVICES = {
    "CUDA error: uncorrectable ECC error encountered" + CUDA: "uncorrectable ECC",
    "CUDA error: unspecified launch failure" + CUDA: "unspecified launch failure",
    "CUDA error: uncorrectable NVLink error detected during the execution" + CUDA: "NVLink",
    "CUDA error: Invalid access of peer GPU memory over nvlink or a hardware error": "hardware error",
    "CUDA driver error: GPU has fallen off the bus": "off the bus",
    "CUDA error: CUDA-capable device(s) is/are busy or unavailable" + CUDA: "busy or unavailable",
    "CUDA error: unknown error" + CUDA: "unknown error",
    "HIP error: unspecified launch failure": "HIP error",
    NCCL.format("unhandled cuda error") + "Last error:\nCuda failure 214 'uncorrectable ECC error encountered'": "214",
}


@pytest.mark.parametrize("message", OF_DEVICES, ids=range(len(OF_DEVICES)))
@pytest.mark.parametrize("claimed", [True, False])
def test_a_device_that_fails_is_a_loss_that_names_rank_and_host_and_is_said_before_its_consequences(message, claimed):
    import torch
    from torch.distributed import DistBackendError

    from tubelet.first_error import seconds_before
    from tubelet.meeting import Meeting, explanation

    meeting = Meeting({"train": 600}, [("n0", ""), ("n0", ""), ("n7", "")], "train", rank=2)
    for kind in (DistBackendError,) if "NCCL" in message else (RuntimeError, torch.AcceleratorError):
        error = explanation(kind(message), meeting if claimed else Meeting(rank=2))
        assert isinstance(error, DeviceError) and error.exit_code == EXIT_LOST and seconds_before(error, 2) == 0
        place = "rank 2 on host n7 failed while training: " if claimed else (
            f"rank 2 on host {socket.gethostname()} failed while starting or ending: ")
        assert f"The device of {place}" in error.problem and OF_DEVICES[message] in error.problem, error
        assert "CUDA kernel errors" not in str(error)
        for part in ("--exclude HOST", "--restart.exclude-failed-node", "nvidia-smi -q", "Xid"):
            assert part in error.hint


def test_who_is_told_that_another_ranks_device_failed_names_that_one_and_lets_it_speak_first():
    from tubelet.first_error import seconds_before
    from tubelet.meeting import Meeting, explanation

    told = RuntimeError("Rank 1 failed with AcceleratorError: CUDA error: uncorrectable ECC error encountered" + CUDA)
    error = explanation(told, Meeting({}, [("n0", ""), ("n7", "")], "save", rank=0))
    assert error and "The device of rank 1 on host n7 failed while saving" in error.problem
    assert error.exit_code == EXIT_LOST and seconds_before(error, 0) > 1


@pytest.mark.parametrize("said, last", [
    ("unhandled system error (run with NCCL_DEBUG=INFO for details)", "NET/IB : mlx5_3: port error"),
    ("unhandled cuda error (run with NCCL_DEBUG=INFO for details)", ""),
    ("unhandled system error", "It can be caused by unexpected exit of a remote peer, you can check NCCL warnings")])
def test_a_system_error_of_nccl_is_a_loss_that_waits_for_who_knows_more(said, last):
    from torch.distributed import DistBackendError

    from tubelet.first_error import seconds_before
    from tubelet.meeting import Meeting, explanation

    work = "WorkNCCL(SeqNum=2, OpType=ALLREDUCE, NumelIn=1, NumelOut=1, Timeout(ms)=600000) raised an async exception: "
    for before in ("", work):
        error = explanation(DistBackendError(before + NCCL.format(said) + f"Last error:\n{last}"),
                            Meeting({"train": 600}, [("n0", ""), ("n7", "")], "train", rank=1))
        assert error and error.exit_code == EXIT_LOST and seconds_before(error, 1) > 1
        assert "NCCL failed on rank 1 on host n7 while training" in error.problem and last in error.problem, error
        assert "NCCL_DEBUG=WARN" in error.hint and "--restart.exclude-failed-node" in error.hint


def test_errors_of_devices_and_of_nccl_that_would_come_again_are_the_programs():
    import torch
    from torch.distributed import DistBackendError

    for text in ("out of memory", "device-side assert triggered", "an illegal memory access was encountered",
                 "no kernel image is available for execution on the device", "invalid device ordinal"):
        for kind in (RuntimeError, torch.AcceleratorError):
            assert dist.explain(kind(f"CUDA error: {text}{CUDA}")) is None, text
        said = NCCL.format("unhandled cuda error") + f"Last error:\nCuda failure '{text}'"
        assert dist.explain(DistBackendError(said)) is None, text
    for last in ("Error: failed to extend /dev/shm/nccl-EcdgVa to 33030532 bytes, error: No space left on device (28)",
                 "Bootstrap : no socket interface found", "Call to ibv_reg_mr failed with error Cannot allocate memory"):
        assert dist.explain(DistBackendError(NCCL.format("unhandled system error") + f"Last error:\n{last}")) is None, last
    assert dist.explain(RuntimeError("unspecified launch failure of a rocket")) is None


def test_waiting_in_vain_while_starting_names_its_own_setting():
    from tubelet.meeting import Meeting, explanation

    error = RuntimeError("[/gloo/transport/tcp/unbound_buffer.cc:133] Timed out waiting 90000ms for recv operation")
    text = str(explanation(error, Meeting({"": 90, "train": 600})))
    assert "timed out after 90 s while starting or ending (start_timeout_seconds=90)" in text, text
    assert "a higher start_timeout_seconds" in text


def test_other_errors_are_left_alone():
    for error in (RuntimeError("CUDA out of memory"), RuntimeError("timed out reading a shard"), DataError("gloo timed out"),
                  ValueError("gloo: Connection closed by peer [1.2.3.4]:5"), OSError("Connection reset by peer")):
        assert dist.explain(error) is None, error
