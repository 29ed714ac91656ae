"""SLURM without SLURM: what is rendered, and what a script does with stand-ins for SLURM's commands. (The real thing:
cluster/test_slurm.py; when a job is restarted: test_restarts.py; what is asked before: test_launch_slurm_submission.py.)"""

import os
import resource
import signal
import subprocess
import sys

import pytest
from golden_files import is_clean, is_golden
from programs import ROOT
from test_restarts import a_run

from launch.__main__ import main
from launch.request import read_request, wrap
from launch.slurm import render
from launch.slurm_checks import _gpus
from launch.slurm_script import script
from launch.sweep import finish_words, piece_words, points
from tubelet.dist import World, device_index
from tubelet.errors import ConfigError

SITE = ["--python", "/opt/tubelet/bin/python", "--workdir", "/shared/tubelet"]
PRETRAIN = ["--", "pretrain", "configs/pretrain/vit_b16_i21k.yaml"]
CASES = {
    "simple": ["--nodes", "2", "--time", "1-00:00:00", *PRETRAIN],
    "everything": [
        "--name", "big", "--nodes", "4", "--gpus-per-node", "4", "--cpus-per-task", "16", "--memory", "512G",
        "--time", "08:00:00",
        "--environment.NCCL_DEBUG=INFO", "--environment.WANDB_API_KEY=0123456789abcdef", "--environment.TEXT=it's $HOME",
        "--setup", "module load cuda/12.8\nulimit -n 65536", "--partition", "gpu,long", "--account", "vision",
        "--qos", "high",
        "--reservation", "march", "--constraint", "h100&ib", "--nodelist", "g[1-8]", "--exclude", "g3,g5", "--exclusive",
        "--gpu-request", "gres", "--gpu-type", "h100", "--signal-seconds", "600", "--output", "logs/%x-%j.out",
        "--slurm.srun=[--cpu-bind=cores, '--container-mounts=/data:/data']", "--slurm.sbatch=[--mail-type=FAIL]",
        "--restart.max-without-progress", "5", "--restart.on-failure", "false", *PRETRAIN, "optimizer.lr=1e-3",
        "data.train=/data/$x.tar"],
    "range": ["--nodes", "1-2", "--restart.exclude-failed-node", "--exclude", "g3", *PRETRAIN],
    "range-of-one": ["--nodes", "1-2", "--gpus-per-node", "1", "--cpus-per-task", "8", *PRETRAIN],
    "container": ["--container", "apptainer exec --nv /images/tubelet.sif bash -c 'cd /src && {command}'", *PRETRAIN,
                  "data.train='/data/a b.tar'"],
    "image": ["--slurm.srun=[--container-image=/images/tubelet 1.sqsh, --container-mounts, '/data:/data', --label]",
              *PRETRAIN],
    "sweep": ["--gpus-per-node", "1", "--time", "20", "--parallel", "2", "--sweep", "optimizer.lr=1e-3,3e-3", "--sweep",
              "seed=0,1", *PRETRAIN],
    "pieces": ["--array", "16", "--time", "4:00:00", "--", "data", "write", "/data/imagenet", "/shards/imagenet", "--check"],
    "evaluate": ["--gpus-per-node", "8", "--", "evaluate", "runs/x", "--data", "/data/val.tar"],
}


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("TUBELET_SITE", "/dev/null")
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)


def request_of(*words):
    return read_request("slurm", [*SITE, *words])


# ------------------------------------------------------------------------------------------------------ renderings


@pytest.mark.parametrize("name", CASES)
def test_the_scripts_are_the_golden_ones_hide_secrets_and_are_clean_for_shellcheck(name):
    text = render(request_of(*CASES[name])) + "\n"
    is_golden(text, f"slurm/{name}.sh")
    is_clean(text)


def test_the_script_that_is_submitted_holds_the_secrets_that_the_shown_one_hides():
    assert "0123456789abcdef" in script(request_of(*CASES["everything"]))


def test_a_dry_run_checks_the_whole_config_without_torch_and_numpy():
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    code = ("import sys; from launch.__main__ import main; code = main(sys.argv[1:]); print('TOO MUCH', "
            "[name for name in ('torch', 'numpy', 'fsspec', 'rich', 'typer') if name in sys.modules], "
            "len(sys.modules) // 350); sys.exit(code)")  # 292 when it was written; numpy has 150, torch 2000
    done = subprocess.run([sys.executable, "-c", code, "slurm", "--dry-run", *CASES["simple"]], capture_output=True,
                          text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0 and "TOO MUCH [] 0" in done.stdout, done.stdout + done.stderr
    print(f"{after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime:.2f} s of CPU (0.33 when it was written)")


def test_the_notice_before_the_end_never_fills_a_short_job():
    def signal_of(*words):
        return [line for line in script(request_of(*words, *PRETRAIN)).splitlines() if "--signal" in line]

    assert signal_of("--time", "4:00:00") == ["#SBATCH --signal=USR1@300"] == signal_of()
    assert signal_of("--time", "4") == ["#SBATCH --signal=USR1@120"] and signal_of("--signal-seconds", "0") == []


@pytest.mark.parametrize("words, parts", [
    (["--array", "4", *PRETRAIN], ["--array 4", "one run folder", "--sweep"]),
    (["--array", "4", "--", "models", "list"], ["All 4 tasks", "{index}"]),
    (["--sweep", "seed=1,1", *PRETRAIN], ["seed=1,1", "twice"]),
    (["--sweep", "seed", *PRETRAIN], ["names no values", "--sweep optimizer.lr=1e-3,3e-3"]),
    (["--sweep", "optimizer.lrr=1,2", "--sweep", "seed=a,0", *PRETRAIN],
     ["optimizer.lrr=1 seed=0", "`optimizer.lrr` is not"]),
    (["--nodes", "--time", "4", *PRETRAIN], ["`--nodes` has no value"]),
    (["--sweep", "seed=0,1", "--", "doctor"], ["doctor", "--array"]),
    (["--nodes", "0", "--time", "tomorrow", *PRETRAIN, "seed=x"], ["nodes", "time", "seed"]),
    (["--partitoin", "gpu", *PRETRAIN], ["partitoin", "slurm.partition"]),
    (["--processes-per-node", "16", "--gpus-per-node", "8", *PRETRAIN],
     ["--processes-per-node 16", "--gpus-per-node 8", "a GPU of its own", "--processes-per-node 8"]),
    (["--processes-per-node", "16", *PRETRAIN], ["--processes-per-node 16", "--gpus-per-node 8 (where it is not given)"]),
    (["--", "evaluate", "runs/x", "data.val=/data/val.tar"], ["evaluate", "--data", "--help"]),
    (["--", "doctor", "configs/pretrain/vit_b16_i21k.yaml", "optimizer.lrr=1"], ["`optimizer.lrr` is not"]),
    (["--", "doctor", "--skip", "netwrok"], ["netwrok", "network"]),
    (["--nodes", "3", *PRETRAIN], ["global_batch_size", "24"]),
])
def test_what_makes_no_sense_is_refused_with_the_way_out(words, parts, capsys):
    assert main(["slurm", *SITE, "--dry-run", *words]) == 1
    said = capsys.readouterr().err
    assert all(part in said for part in [*parts, "Try:"]), said


def test_sweeps_name_runs_readably_and_never_alike():
    assert [point.suffix for point in points(["optimizer.lr=1e-3,3e-3", "seed=0,1"])] == [
        "lr1e-3-seed0", "lr1e-3-seed1", "lr3e-3-seed0", "lr3e-3-seed1"]
    assert [point.words for point in points(["data.train=[a.tar,b.tar],c.tar"])] == [["data.train=[a.tar,b.tar]"],
                                                                                    ["data.train=c.tar"]]
    assert points(["optimizer.lr=1", "ema.lr=2"])[0].suffix == "optimizer.lr1-ema.lr2"
    with pytest.raises(ConfigError, match="both be named"):
        points(["data.train=a/b,a?b"])
    with pytest.raises(ConfigError, match="1024 combinations"):
        points([f"k{n}=0,1" for n in range(10)])
    request = request_of(*CASES["sweep"])
    assert [run.run_folder.name for run in request.runs] == [f"{request.name}-lr{lr}-seed{seed}"
                                                             for lr in ("1e-3", "3e-3") for seed in (0, 1)]
    assert [(run.training.optimizer.lr, run.training.seed) for run in request.runs] == [
        (1e-3, 0), (1e-3, 1), (3e-3, 0), (3e-3, 1)]


def test_pieces_are_all_written_once_and_finished_once():
    assert piece_words(["write", "a", "b"], 4) == ["write", "a", "b", "--piece", "{index}/4"]
    assert piece_words(["write", "a", "b", "--piece={index}/{count}"], 4)[-1] == "--piece={index}/4"
    assert piece_words(["verify", "x-{index}.tar"], 4) == ["verify", "x-{index}.tar"]
    for words in (["write", "a", "b", "--piece", "{index}/4", "--seed", "1"], ["write", "a", "b", "--piece={index}/4",
                                                                                "--seed", "1"]):
        assert finish_words(words) == ["write", "a", "b", "--seed", "1", "--finish"]
    assert finish_words(["verify", "x-{index}.tar"]) == []


@pytest.mark.parametrize("text, count", [("gpu:8", 8), ("gpu:h100:4(S:0-1)", 4), ("gpu:a:2,gpu:b:3,nic:9", 5), ("(null)", 0),
                                         ("nvme:2", 0), ("gpu:h100_1g.10gb:7(S:0)", 7)])
def test_gpus_of_a_node_are_read_from_what_sinfo_lists(text, count):
    assert _gpus(text) == count


# --------------------------------------------------------------------------------------- scripts with stand-ins


def stand_in(folder, name, text):
    path = folder / name
    path.write_text(f"#!/bin/bash\necho \"{name} $*\" >> {folder}/calls\n{text}\n")
    path.chmod(0o755)


def play(tmp_path, code, *words, python="/nonexistent/python", env=None, **stand_ins):
    """Run a script whose srun returns `code`; returns (its exit code, calls of SLURM's commands, output)."""
    folder = tmp_path / "bin"
    folder.mkdir(exist_ok=True)
    for name, text in {"srun": f"exit {code}", "scontrol": "[ \"$1 $2\" = 'show hostnames' ] && printf 'g1\\ng2\\n'; exit 0",
                       "squeue": "echo 2030-01-01T00:00:00", "sleep": "", **stand_ins}.items():
        stand_in(folder, name, text)
    request = read_request("slurm", ["--workdir", str(tmp_path), "--python", python, *words, *PRETRAIN])
    path = tmp_path / "job.sh"
    path.write_text(script(request))
    with open(tmp_path / "out", "w") as out:
        done = subprocess.run(["bash", str(path)], stdout=out, stderr=subprocess.STDOUT, timeout=60, cwd=ROOT, env={
            "PATH": f"{folder}:{os.environ['PATH']}", "SLURM_JOB_ID": "12", "SLURM_JOB_NODELIST": "g[1-2]",
            "SLURM_JOB_NUM_NODES": "2", "SLURM_CPUS_ON_NODE": "32", **(env or {})})
    return done.returncode, (folder / "calls").read_text().splitlines(), (tmp_path / "out").read_text()


def requeues(calls):
    return [line.split()[2] for line in calls if line.startswith("scontrol requeue")]


@pytest.mark.parametrize("code, most", [(85, 20), (0, 0), (1, 0), (86, 0), (87, 3), (130, 0), (137, 3), (253, 3)])
def test_without_python_on_the_batch_host_the_exit_code_decides_and_not_for_ever(tmp_path, code, most):
    for restarts in {max(most - 1, 0), most}:
        place = tmp_path / str(restarts)
        place.mkdir()
        left, calls, output = play(place, code, env={"SLURM_RESTART_COUNT": str(restarts)})
        assert left == code and requeues(calls) == ["12"] * (restarts < most)
        assert f"exit code {code} does" in output


def test_where_srun_starts_a_container_the_decision_is_asked_for_in_one(tmp_path):
    """The stand-in for srun shows no Python to a step outside of a container."""
    ask = f"""[[ "$*" = *"--ntasks=1 "* ]] || exit 137
[[ "$*" = *"--container-image=/images/tubelet 1.sqsh --container-mounts /data:/data"* && "$*" != *--label* ]] || exit 1
while [ "$1" != -m ]; do shift; done
exec {sys.executable} "$@\""""
    a_run(read_request("slurm", ["--workdir", str(tmp_path), *PRETRAIN]).run_folder, job="slurm-12")
    left, calls, output = play(tmp_path, 137, "--gpus-per-node", "4", CASES["image"][0], srun=ask)
    assert left == 137 and requeues(calls) == ["12"] and "started again (0 of 3 restarts without progress)" in output, output
    assert [line for line in calls if line.startswith("srun --nodes=1 --ntasks=1 --ntasks-per-node=1 --nodelist=")]


def test_a_task_of_an_array_is_requeued_by_its_own_name_and_a_busy_controller_is_asked_again(tmp_path):
    busy = ("[ \"$1 $2\" = 'show hostnames' ] && echo g1 && exit 0\n"
            f"[ \"$1\" = requeue ] && [ $(grep -c requeue {tmp_path}/bin/calls) -lt 3 ] && exit 1\nexit 0")
    _, calls, _ = play(tmp_path, 85, scontrol=busy, env={"SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "3"})
    assert requeues(calls) == ["12_3"] * 3


def test_the_ranks_learn_where_they_meet_and_when_the_job_ends(tmp_path):
    seen = "env | grep -E '^(MASTER_|TUBELET_|OMP_|RANK|X=|SQUEUE)' | sort"
    _, calls, output = play(tmp_path, 0, "--environment.X=it's $HOME", srun=f"{seen}\nexit 0",
                            env={"RANK": "3", "TUBELET_JOB": "old", "SLURM_RESTART_COUNT": "2", "SQUEUE_STATES": "PD",
                                 "TZ": "Europe/Paris"})  # an hour before Greenwich; a container may not know it
    for line in ("MASTER_ADDR=g1", f"MASTER_PORT={20000 + 12 + 122}", "OMP_NUM_THREADS=4", "X=it's $HOME",
                 "TUBELET_END_TIME=1893452400"):
        assert line in output.splitlines()
    assert "RANK=3" not in output.splitlines() and "TUBELET_JOB" not in output and "SQUEUE" not in output
    assert "--ntasks=16" in "".join(calls) and "launch: start 2 of job 12 on g[1-2]" in output


def test_a_cancelled_job_is_not_requeued_and_one_whose_time_is_over_is(tmp_path):
    for reason, expected in (("None", []), ("TimeLimit", ["12"])):
        place = tmp_path / reason
        place.mkdir()
        told = ("[ \"$1 $2\" = 'show hostnames' ] && echo g1\n"
                f"[ \"$1 $2\" = 'show job' ] && echo 'JobId=12 Reason={reason} Dependency=(null)'; exit 0")
        left, calls, _ = play(place, 0, scontrol=told, srun="kill -TERM $PPID; kill -USR1 $PPID; exit 85")
        assert left == 85 and requeues(calls) == expected


def test_a_job_whose_end_nobody_knows_is_told_none(tmp_path):
    for said in ("", "N/A", "NONE"):
        place = tmp_path / f"-{said.replace('/', '')}"
        place.mkdir()
        _, _, output = play(place, 0, srun='echo "end=<$TUBELET_END_TIME>"', squeue=f"echo {said}")
        assert "end=<>" in output


def test_a_job_that_is_cancelled_while_it_is_decided_stays_cancelled(tmp_path):
    for moment, requeued in (("asked", 0), ("refused", 1)):
        place = tmp_path / moment
        place.mkdir()
        python = place / "python"
        cancel = "kill -TERM $(awk '/^PPid/ {print $2}' /proc/$PPID/status)\n" if moment == "asked" else ""
        python.write_text(f"#!/bin/bash\n{cancel}echo restart\n")
        python.chmod(0o755)
        left, calls, output = play(place, 85, python=str(python), scontrol=f'[ "$1" != requeue ] || exit {requeued}',
                                   sleep='[ "$1" != 5 ] || kill -TERM $PPID')
        assert left == 85 and len(requeues(calls)) == requeued, output


def test_the_decision_is_asked_for_and_the_failed_node_is_left_out(tmp_path):
    run = tmp_path / "runs" / "vit_b16_i21k"
    folder = read_request("slurm", ["--workdir", str(tmp_path), *PRETRAIN]).run_folder
    assert folder.parent == run.parent
    a_run(folder, job="slurm-12")
    left, calls, output = play(tmp_path, 137, "--restart.exclude-failed-node", "--exclude", "g9", python=sys.executable,
                               srun="echo 'srun: error: g2: task 9: Killed' >&2; exit 137")
    assert requeues(calls) == ["12"], output
    assert "scontrol update JobId=12 ExcNodeList=g9,g2" in calls and calls.index(
        "scontrol update JobId=12 ExcNodeList=g9,g2") > calls.index("scontrol requeue 12")
    assert "on g2 a rank failed first (Killed)" in output and left == 137


def test_the_failed_node_is_found_where_a_site_keeps_errors_apart(tmp_path):
    """In the file of errors, after the line that this start begins with."""
    folder = tmp_path / "bin"
    left = play(tmp_path, 0)  # lays out the stand-ins
    assert left[0] == 0
    a_run(read_request("slurm", ["--workdir", str(tmp_path), *PRETRAIN]).run_folder, job="slurm-12")
    stand_in(folder, "srun", "echo 'srun: error: g2: task 9: Killed' >&2; exit 137")
    (tmp_path / "job.sh").write_text(script(read_request("slurm", ["--workdir", str(tmp_path), "--python", sys.executable,
                                                                   *PRETRAIN])))
    with open(tmp_path / "out", "w") as out, open(tmp_path / "err", "w") as err:
        err.write("launch: start 0 of job 11\nsrun: error: g1: task 1: Killed\n")
        err.flush()
        subprocess.run(["bash", str(tmp_path / "job.sh")], stdout=out, stderr=err, timeout=60, cwd=ROOT, env={
            "PATH": f"{folder}:{os.environ['PATH']}", "SLURM_JOB_ID": "12", "SLURM_JOB_NODELIST": "g[1-2]",
            "SLURM_JOB_NUM_NODES": "2", "SLURM_CPUS_ON_NODE": "32"})
    assert "on g2 a rank failed first (Killed)" in (tmp_path / "err").read_text()


def test_a_piece_that_is_preempted_begins_again_and_the_last_step_does_not_wait_for_ever_for_one_that_failed():
    text = render(request_of(*CASES["pieces"]))
    assert text.count("#SBATCH --requeue") == 2 and "--kill-on-invalid-dep=yes" in text
    plain = script(request_of("--", "data", "write", "/in", "/out"))
    assert "#SBATCH --no-requeue" in plain  # it would write all of it again


def test_signals_reach_a_program_that_a_shell_starts(tmp_path):
    """SLURM may signal only the process that it started itself. This shell does not replace itself by its last command."""
    program = ("import os, signal; signal.signal(signal.SIGUSR1, lambda *a: os._exit(85)); print(1, flush=True); "
               "signal.pause()")
    words = wrap("bash -c 'trap : USR2; cd / && {command}'", [sys.executable, "-c", program])
    process = subprocess.Popen(words, stdout=subprocess.PIPE)
    assert process.stdout.readline()
    process.send_signal(signal.SIGUSR1)
    assert process.wait(30) == 85
    assert wrap("bash -c 'exec {command}'", ["x"])[-1] == "exec x"  # said already
    assert wrap("bash -c 'numactl -N0 {command}'", ["x"])[-1] == "numactl -N0 x"  # not the shell's own
    assert wrap("env -S '{command}'", ["x"])[-1] == "x"  # no shell


def test_each_task_has_a_gpu_whether_a_site_shows_it_all_of_the_node_or_its_own():
    world, step = World(5, 16, 5, 8), {"SLURM_STEP_ID": "0"}
    assert [device_index(world, 8, step), device_index(world, 8, {}), device_index(world, 1, step)] == [5, 5, 0]
    for visible, env in ((1, {}), (4, step), (0, step)):
        with pytest.raises(ConfigError, match="Local rank 5 has no GPU"):
            device_index(world, visible, env)
