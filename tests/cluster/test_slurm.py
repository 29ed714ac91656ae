"""Jobs on a real SLURM of two nodes: however one is disturbed, it goes on by itself and has seen the same samples."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cluster.slurm import Cluster
from kills import whole
from programs import ROOT, digests, recipe, rows, run

pytestmark = pytest.mark.cluster
STEPS = 100
TRAIN = ("--nodes", "2", "--gpus-per-node", "0", "--time", "10")


@pytest.fixture(scope="module")
def cluster():
    with Cluster() as made:
        yield made


@pytest.fixture(autouse=True)
def free_nodes(request):
    yield
    if "cluster" in request.fixturenames:
        made = request.getfixturevalue("cluster")
        made.run("scancel", "--user=root", "--signal=KILL", "--full", check=False)
        made.run("scancel", "--user=root")
        made.resume_nodes()
        deadline = time.monotonic() + 60
        while made.run("squeue", "-h"):
            assert time.monotonic() < deadline, made.run("squeue")
            time.sleep(0.1)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """{step: digest} of one process that nobody disturbs."""
    config, folder = recipe(tmp_path_factory.mktemp("undisturbed"), steps=STEPS, save_every=1000)
    run("pretrain", config)
    found = digests(folder)
    assert len(found) == STEPS
    return found


class Submitted:
    """A run that was submitted by `python -m launch slurm`."""

    def __init__(self, cluster, folder, *words, steps=STEPS, save_every=10, overrides=(), env=None):
        self.cluster = cluster
        self.config, self.folder = recipe(folder, steps=steps, save_every=save_every)
        self.words = [*(words or TRAIN), "--", "pretrain", str(self.config), *overrides]
        said = launch(cluster, *self.words, env=env)
        self.job = said.split("submitted job ")[1].split(":")[0]

    @property
    def output(self):
        path = self.folder / "launch" / f"slurm-{self.job}.out"
        return path.read_text() if path.exists() else ""

    def decisions(self):
        return rows(self.folder / "launch" / "restarts.jsonl")

    def starts(self):
        return len(list(self.folder.glob("attempts/[0-9][0-9][0-9][0-9].json")))

    def wait(self, condition, what, timeout=240):
        deadline = time.monotonic() + timeout
        while not condition():
            state = self.cluster.state(self.job)
            ended = state in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
            assert time.monotonic() < deadline and not ended, f"{what}: {state}\n{self.output[-4000:]}"
            time.sleep(0.05)

    def trained(self, step):
        """Wait until the newest start has trained so far."""
        self.wait(lambda: max(digests(self.folder), default=0) >= step, f"step {step}")

    def ends(self, state="COMPLETED", timeout=240):
        found = self.cluster.wait_for(self.job, "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", timeout=timeout)
        assert found == state, f"{found}\n{self.output[-4000:]}"


def launch(cluster, *words, expect=0, env=None, cwd=ROOT):
    """`python -m launch slurm WORDS`; what it says."""
    done = subprocess.run([sys.executable, "-m", "launch", "slurm", *words], cwd=cwd, capture_output=True, text=True,
                          env={**cluster.env, "PYTHONPATH": str(ROOT), **(env or {})}, timeout=120)
    assert done.returncode == expect, done.stdout + done.stderr
    return done.stdout + done.stderr


def say(capsys, text):
    with capsys.disabled():
        print(f"\n  {text}")


def first_new_step(folder, step, after):
    """When the first step after `step` was logged by a start that began after a moment."""
    return min(row["time"] for row in rows(folder / "metrics.jsonl") if row.get("step", 0) > step and row["time"] > after)


# ------------------------------------------------------------------------------------------------- disturbances


def test_a_job_that_is_signalled_saves_is_requeued_and_ends_with_the_samples_of_an_undisturbed_run(
        cluster, tmp_path, undisturbed, capsys):
    job = Submitted(cluster, tmp_path)
    job.trained(15)
    asked = time.time()
    cluster.run("scancel", "--signal=USR1", job.job)
    cluster.wait_for(job.job, "PENDING")
    newest = max(job.folder.glob("step-*/manifest.json")).parent
    assert whole(newest) and int(newest.name[5:]) >= 15
    say(capsys, f"from SIGUSR1 to the last byte of a verified checkpoint: "
                f"{(newest / 'manifest.json').stat().st_mtime - asked:.2f} s")
    refused = launch(cluster, *job.words, expect=1)
    assert f"Job {job.job}" in refused and "pending" in refused and f"scancel {job.job}" in refused  # two jobs, one folder
    released = time.time()
    cluster.start_now(job.job)
    job.ends()
    step = int(newest.name[5:])
    say(capsys, f"from the start of the requeued job to its first new step: "
                f"{first_new_step(job.folder, step, released) - released:.2f} s")
    assert digests(job.folder) == undisturbed and job.starts() == 2
    assert [(row["code"], row["restart"]) for row in job.decisions()] == [(85, True), (0, False)]
    assert "started again (0 of 3 restarts without progress)" in job.output and job.output.count("launch: start ") == 2


@pytest.mark.parametrize("notice", [0, 60])
def test_a_job_whose_time_is_over_is_requeued(cluster, tmp_path, undisturbed, notice):
    job = Submitted(cluster, tmp_path, *TRAIN, "--signal-seconds", str(notice))  # without notice: TERM, KILL soon after it
    job.trained(15)
    pids = [pid for node in ("n1", "n2") for pid in cluster.pids(job.job, node)[1]]
    send(pids, signal.SIGSTOP)  # SLURM looks at the clock every 30 s, in which the run would end
    # The end comes nearer after the ranks have read it, so that it is not they who keep it.
    end = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(time.time() + (50 if notice else 1)))
    cluster.run("scontrol", "update", f"JobId={job.job}", f"EndTime={end}")
    if notice:
        job.wait(lambda: all(waiting(pid, signal.SIGUSR1) for pid in pids), "USR1")
        send(pids, signal.SIGCONT)
    else:
        job.wait(lambda: "DUE TO TIME LIMIT" in job.output, "the time limit")  # continues them, too
    cluster.wait_for(job.job, "PENDING")
    cluster.run("scontrol", "update", f"JobId={job.job}", "TimeLimit=10")
    cluster.start_now(job.job)
    job.ends()
    assert digests(job.folder) == undisturbed and job.starts() == 2
    assert job.decisions()[0]["code"] == 85 and ("DUE TO TIME LIMIT" in job.output) == (not notice)


def send(pids, number):
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):  # a helper of a rank that has ended meanwhile
            os.kill(pid, number)


def waiting(pid, number):
    """Whether a signal waits to be delivered to a process that is stopped; one that has gone waits for nothing."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return True
    masks = [int(line.split()[1], 16) for line in text.splitlines() if line.startswith(("SigPnd", "ShdPnd", "SigIgn"))]
    return any(mask >> (number - 1) & 1 for mask in masks)


def test_slurm_itself_requeues_a_job_whatever_the_environment_says(cluster, tmp_path, undisturbed):
    job = Submitted(cluster, tmp_path, env={"SBATCH_NO_REQUEUE": "1", "SBATCH_TIMELIMIT": "1", "SBATCH_EXPORT": "NONE",
                                            "SBATCH_JOB_NAME": "other", "SQUEUE_STATES": "CANCELLED"})
    found = cluster.job(job.job)
    assert (found["Requeue"], found["TimeLimit"], found["JobName"]) == ("1", "00:10:00", "r")
    job.trained(15)
    cluster.run("scontrol", "requeue", job.job)
    cluster.start_now(job.job)
    job.ends()
    assert digests(job.folder) == undisturbed and job.starts() == 2
    assert rows(job.folder / "launch" / "restarts.jsonl")[-1]["step"] == STEPS


def test_a_killed_rank_is_named_its_node_left_out_and_the_job_goes_on_with_fewer(cluster, tmp_path, undisturbed):
    job = Submitted(cluster, tmp_path, "--nodes", "1-2", "--gpus-per-node", "0", "--restart.exclude-failed-node",
                    "--time", "10")
    job.trained(25)
    cluster.kill_step(job.job, "n2", tasks_only=True)
    cluster.start_now(job.job)
    assert cluster.job(job.job)["ExcNodeList"] == "n2"
    job.ends()
    first = job.decisions()[0]
    assert first["restart"] and first["node"] == "n2" and "on n2 a rank failed first (Killed)" in job.output
    assert digests(job.folder) == undisturbed
    worlds = [json.loads(path.read_text())["world_size"]
              for path in sorted(job.folder.glob("attempts/[0-9][0-9][0-9][0-9].json"))]
    assert worlds == [2, 1]


def test_a_node_that_dies_with_all_it_knows_is_noticed_and_the_job_goes_on(cluster, tmp_path, undisturbed):
    job = Submitted(cluster, tmp_path, *TRAIN, "--slurm.srun=[--wait=5]")
    job.trained(25)
    cluster.kill_step(job.job, "n2")
    cluster.start_now(job.job)
    job.ends()
    first = job.decisions()[0]
    assert first["restart"] and first["node"] == "n2", job.output
    assert digests(job.folder) == undisturbed and job.starts() == 2


def test_a_node_that_is_drained_is_done_without(cluster, tmp_path, undisturbed):
    job = Submitted(cluster, tmp_path, "--nodes", "1-2", "--gpus-per-node", "0", "--time", "10")
    job.trained(15)
    cluster.run("scontrol", "update", "NodeName=n2", "State=DRAIN", "Reason=test")
    cluster.run("scancel", "--signal=USR1", job.job)
    cluster.start_now(job.job)
    job.ends()
    assert digests(job.folder) == undisturbed and "1 process(es)" in job.output.split("launch: start 1")[1]


# ------------------------------------------------------------------------------------------------ what is not restarted


def test_a_job_that_gets_nowhere_is_stopped(cluster, tmp_path):
    job = Submitted(cluster, tmp_path, "--nodes", "1", "--gpus-per-node", "0", "--restart.max-without-progress", "1")
    for number in range(2):
        job.wait(lambda at=number: job.output.count("launch: start ") == at + 1, f"start {number}")
        time.sleep(1)
        cluster.run("scancel", "--signal=USR1", job.job)
        if not number:
            cluster.start_now(job.job)
    job.ends("FAILED")
    assert [row["restart"] for row in job.decisions()] == [True, False]
    assert "1 restarts in a row made no newer checkpoint" in job.output and cluster.job(job.job)["ExitCode"] == "85:0"


def test_an_error_of_the_program_is_not_started_again(cluster, tmp_path):
    job = Submitted(cluster, tmp_path, *TRAIN, overrides=[f"data.train={tmp_path}/nothing-here.tar"])
    job.ends("FAILED")
    assert cluster.job(job.job)["ExitCode"] == "1:0"
    assert "not started again, since an error of the program would come again" in job.output
    again = launch(cluster, *job.words)  # the folder is free: that start left a record of its end, or never began
    cluster.run("scancel", again.split("submitted job ")[1].split(":")[0])


def test_a_job_whose_ranks_slurm_cannot_start_is_tried_again(cluster, tmp_path):
    job = Submitted(cluster, tmp_path, *TRAIN, "--slurm.srun=[--nodelist=n9]")  # srun: Unable to create step
    job.wait(lambda: job.decisions(), "a decision")
    cluster.wait_for(job.job, "PENDING")
    assert [(row["code"], row["restart"]) for row in job.decisions()] == [(87, True)], job.output
    cluster.run("scancel", job.job)


def test_a_cancelled_job_stays_cancelled_with_what_it_has_saved_and_can_be_submitted_anew(cluster, tmp_path):
    job = Submitted(cluster, tmp_path, "--nodes", "1", "--gpus-per-node", "2", "--time", "10")  # two tasks of one node
    job.trained(5)
    cluster.run("scancel", job.job)
    job.ends("CANCELLED")
    job.cluster.wait_for(job.job, "CANCELLED")
    time.sleep(2)
    assert cluster.state(job.job) == "CANCELLED" and whole(max(job.folder.glob("step-*")))
    assert "2 process(es)" in job.output
    said = launch(cluster, *job.words)
    cluster.run("scancel", said.split("submitted job ")[1].split(":")[0])


def test_a_job_that_was_killed_outright_may_be_followed_by_another(cluster, tmp_path):
    job = Submitted(cluster, tmp_path, "--nodes", "1", "--gpus-per-node", "0", "--time", "10",
                    "--restart.on-failure", "false")
    job.trained(12)
    cluster.kill_step(job.job, "n1", tasks_only=True)
    job.ends("FAILED")
    assert "since restart.on_failure is false" in job.output
    attempt = job.folder / "attempts" / "0001.json"
    attempt.write_text(json.dumps({**json.loads(attempt.read_text()), "host": "another"}))  # where nobody here can look
    said = launch(cluster, *job.words)
    assert json.loads((job.folder / "attempts" / "0001.end.json").read_text())["how"] == "lost"
    cluster.run("scancel", said.split("submitted job ")[1].split(":")[0])


# ------------------------------------------------------------------------------------------------------- arrays


def test_a_sweep_is_an_array_whose_tasks_are_runs_of_their_own_and_are_requeued_alone(cluster, tmp_path):
    config, folder = recipe(tmp_path, steps=30)
    said = launch(cluster, "--nodes", "1", "--gpus-per-node", "0", "--time", "10", "--sweep", "seed=0,1", "--",
                  "pretrain", str(config))
    job = said.split("submitted job ")[1].split(":")[0]
    runs = [folder.with_name(f"r-seed{seed}") for seed in (0, 1)]
    deadline = time.monotonic() + 240
    while max(digests(runs[1]), default=0) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    cluster.run("scancel", "--signal=USR1", f"{job}_1")
    cluster.start_now(f"{job}_1")
    for task in (0, 1):
        assert cluster.wait_for(f"{job}_{task}", "COMPLETED", "FAILED") == "COMPLETED"
    assert [len(digests(path)) for path in runs] == [30, 30] and digests(runs[0]) != digests(runs[1])
    assert [len(list(path.glob("attempts/*.end.json"))) for path in runs] == [1, 2]
    assert json.loads((runs[1] / "launch" / "submitted.json").read_text())["job"] == f"slurm-{job}_1"


def test_shards_are_written_in_pieces_by_an_array_and_finished_by_a_job_after_it(cluster, tmp_path):
    out = tmp_path / "shards"
    said = launch(cluster, "--workdir", str(tmp_path), "--array", "3", "--parallel", "2", "--", "data", "write",
                  "made-up:fractals?n=60&size=16&classes=3", str(out), "--shard-size", "10", cwd=ROOT)
    first, last = (line.split()[2].rstrip(":") for line in said.splitlines() if line.startswith("submitted job "))
    assert cluster.wait_for(last, "COMPLETED", "FAILED", "CANCELLED") == "COMPLETED", said
    index = json.loads((out / "index.json").read_text())
    assert index["num_samples"] == 60 and len(index["shards"]) == 6
    outputs = list(tmp_path.glob(f"runs/.launch/data/slurm-{first}_*.out"))
    assert len(outputs) == 3 and all("piece" in path.read_text() for path in outputs)


# ---------------------------------------------------------------------------------------------------- bad inputs


@pytest.mark.parametrize("words, parts", [
    (["--nodes", "3"], ["--nodes 3", "partition main has 2 node(s)", "--nodes 2"]),
    (["--nodes", "2", "--partition", "small"], ["partition small has 1 node(s)"]),
    (["--partition", "smal"], ["`slurm.partition` smal is no partition", "small"]),
    (["--gpus-per-node", "4"], ["--gpus-per-node 4", "have 2 GPU(s)", "--gpus-per-node 2"]),
    (["--time", "2:00:00", "--exclude", "n7", "--nodelist", "n[1-3]"],
     ["3 problems", "60 minutes at most", "no node n7", "no node n3"]),
    (["--cpus-per-task", "16"], ["have 4 core(s)"]),
    (["--memory", "900G"], ["SLURM would refuse this job", "Requested node configuration is not available"]),
])
def test_what_the_cluster_has_not_is_said_before_anything_is_queued(cluster, tmp_path, words, parts):
    config, folder = recipe(tmp_path, steps=3)
    gpus = [] if "--gpus-per-node" in words else ["--gpus-per-node", "0"]
    said = launch(cluster, *gpus, *words, "--", "pretrain", str(config), "global_batch_size=48", expect=1)
    assert all(part in said for part in [*parts, "Try:"]), said
    assert not cluster.run("squeue", "-h") and not folder.exists()


def test_a_config_that_does_not_validate_or_a_folder_that_cannot_be_written_is_found_before(cluster, tmp_path):
    config, folder = recipe(tmp_path, steps=3)
    said = launch(cluster, "--nodes", "9", "--", "pretrain", str(config), "optimizer.lrr=1", expect=1)
    assert "optimizer.lrr" in said and "Try:" in said
    said = launch(cluster, *TRAIN, "--", "pretrain", str(config), "run.dir=/proc/nowhere", expect=1)
    assert "/proc/nowhere/r/launch" in said and "run.dir=" in said
    said = launch(cluster, *TRAIN, "--", "pretrain", str(config), expect=1, env={"PATH": "/nonexistent"})
    assert "sbatch" in said and "PATH" in said and "Try:" in said
    assert not cluster.run("squeue", "-h") and not folder.exists()


def test_what_is_left_of_a_killed_cluster_goes_before_the_next_begins(tmp_path):
    code = "import os\nfrom cluster.slurm import Cluster\nCluster().__enter__(); print(os.getpid(), flush=True); os._exit(9)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120,
                          env={**os.environ, "PYTHONPATH": f"{ROOT}/tests"})
    left = f"tubelet-slurm-{done.stdout.strip()}"
    assert Path("/tmp", left).is_dir() and left in Path("/etc/hosts").read_text(), done.stderr
    from cluster.slurm import clean_up

    clean_up()
    assert not Path("/tmp", left).exists() and left not in Path("/etc/hosts").read_text()
