"""Where a process stands, from whatever launched it; ranks that agree."""

import pytest
from ranks import run_ranks

from tubelet import dist
from tubelet.errors import ConfigError, DataError

LAUNCHERS = {
    "nothing": ({}, (0, 1, 0)),
    "torchrun": (dict(RANK="5", WORLD_SIZE="8", LOCAL_RANK="1", LOCAL_WORLD_SIZE="4", MASTER_ADDR="n0", MASTER_PORT="7"),
                 (5, 8, 1)),
    "slurm task": (dict(SLURM_PROCID="3", SLURM_NTASKS="4", SLURM_LOCALID="1", SLURM_JOB_ID="123", SLURM_STEP_ID="0",
                        SLURM_STEP_NODELIST="node[07-09]"), (3, 4, 1)),
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
