"""Memory that may still be taken, as control groups of either version say it, wherever in their tree the limit stands."""

import os

import pytest

from tubelet.memory import INFINITE, available_memory, cgroup_memory_left

GIB = 2**30


def group(folder, limit, used, idle=0, version=2):
    names = (("memory.max", "memory.current", "inactive_file") if version == 2 else
             ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"))
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in zip(names, (limit, used)):
        (folder / name).write_text(f"{value}\n")
    (folder / "memory.stat").write_text(f"anon 1\n{names[2]} {idle}\n")


@pytest.fixture
def left(tmp_path):
    def ask(own):
        (tmp_path / "own").write_text(own)
        return cgroup_memory_left(tmp_path / "cgroup", tmp_path / "own")

    return ask


def test_the_limit_of_a_slurm_job_is_seen_levels_above_the_task_and_below_the_root(tmp_path, left):
    job = tmp_path / "cgroup" / "system.slice" / "slurmstepd.scope" / "job_7"
    group(job / "step_0" / "user" / "task_0", "max", GIB)
    group(job, 8 * GIB, 6 * GIB, idle=GIB)
    group(job.parent, 64 * GIB, 10 * GIB)
    assert left("0::/system.slice/slurmstepd.scope/job_7/step_0/user/task_0\n") == 3 * GIB
    group(job / "step_0", 5 * GIB, 6 * GIB)
    assert left("0::/system.slice/slurmstepd.scope/job_7/step_0/user/task_0\n") == 0, "beyond it is not less than nothing"


def test_version_one_is_read_too_and_its_huge_number_is_no_limit(tmp_path, left):
    memory = tmp_path / "cgroup" / "memory"
    group(memory, 2**63 - 4096, 30 * GIB, version=1)
    group(memory / "slurm" / "uid_0" / "job_7", 4 * GIB, 3 * GIB, idle=GIB // 2, version=1)
    group(memory / "slurm" / "uid_0" / "job_8", GIB, GIB, version=1)
    own = "9:cpu,cpuacct:/slurm\n4:memory:/slurm/uid_0/job_7/step_0/task_0\n1:name=systemd:/x\n0::/system.slice/slurmd\n"
    assert left(own) == 1.5 * GIB
    assert left(own.replace("uid_0/job_7", "uid_1/job_9")) == INFINITE


def test_inside_a_container_the_root_is_its_own_group(tmp_path, left):
    group(tmp_path / "cgroup", 2 * GIB, GIB)
    for own in ("0::/\n", "0::/docker/of-the-host\n", "0::/../../x\n", "", "nonsense\n"):
        assert left(own) == GIB, own


def test_without_control_groups_the_host_is_the_limit(tmp_path):
    assert cgroup_memory_left(tmp_path / "none", tmp_path / "nothing") == INFINITE
    assert 2**20 < available_memory() <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
