"""What a submission asks SLURM and what it tells sbatch, with stand-ins for SLURM's commands: options, environment,
partition, the folder of the output, and whether another job has the run's folder."""

import getpass
import json
import os
import shutil
from dataclasses import asdict

import pytest
from programs import ROOT
from test_launch_slurm import PRETRAIN, stand_in
from test_restarts import a_run

from launch import slurm_checks
from launch.__main__ import main
from launch.request import read_request
from launch.slurm_checks import state_of
from launch.slurm_options import given, quoted
from tubelet.errors import RunError
from tubelet.runs import Attempt


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """SLURM's commands, as far as a submission asks them; what they were asked, with what of the environment: `calls`."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("TUBELET_SITE", "/dev/null")
    for key in [key for key in os.environ if key.startswith(("SLURM_", "SBATCH_", "SQUEUE_", "SINFO_"))]:
        monkeypatch.delenv(key)
    slurm_checks._config.cache_clear()
    folder = tmp_path / "bin"
    folder.mkdir()
    seen = f"env | grep -E '^(SBATCH|SLURM|SQUEUE|SINFO)_' | sort >> {folder}/calls"
    for name, text in {"sinfo": "echo 'gpu*|infinite|4|gpu:8|64'; echo 'long|1-00:00:00|4|gpu:8|64'", "squeue": "",
                       "scontrol": "echo 'ClusterName = c'; echo 'PrivateData = none'", "sbatch": "echo 77"}.items():
        stand_in(folder, name, f"{seen}\n{text}")
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    yield folder
    slurm_checks._config.cache_clear()


def submit(tmp_path, *words):
    return main(["slurm", "--workdir", str(tmp_path), *words, *PRETRAIN])


def test_what_the_environment_says_to_sbatch_does_not_override_the_script(slurm, tmp_path, monkeypatch, capsys):
    """sbatch believes its variables more than the script; what the script leaves open they may say."""
    for key, value in {"TIMELIMIT": "5", "NO_REQUEUE": "1", "ARRAY_INX": "0-3", "GPUS": "1", "MEM_PER_CPU": "1",
                       "QOS": "high", "PARTITION": "long", "SIGNAL": "KILL@9", "GRES": "nvme:1", "EXPORT": "NONE"}.items():
        monkeypatch.setenv(f"SBATCH_{key}", value)
    monkeypatch.setenv("SLURM_NTASKS", "3")
    monkeypatch.setenv("SQUEUE_STATES", "PENDING")
    assert submit(tmp_path, "--time", "60", "--slurm.sbatch=[-q low]") == 0
    calls = (slurm / "calls").read_text()
    told = calls.split("sbatch --parsable")[1].splitlines()[1:]
    assert told == ["SBATCH_EXPORT=NONE", "SBATCH_GRES=nvme:1", "SBATCH_MEM_PER_CPU=1", "SBATCH_PARTITION=long"]
    assert "SLURM_" not in calls and "SQUEUE_" not in calls
    assert ("SBATCH_ARRAY_INX, SBATCH_GPUS, SBATCH_NO_REQUEUE, SBATCH_QOS, SBATCH_SIGNAL, SBATCH_TIMELIMIT of the "
            "environment: not used") in capsys.readouterr().out


def test_the_partition_that_is_checked_is_the_one_the_job_will_have(slurm, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SBATCH_PARTITION", "logn")
    assert submit(tmp_path) == 1 and "$SBATCH_PARTITION logn is no partition" in capsys.readouterr().err
    assert submit(tmp_path, "--time", "2-00:00:00", "--slurm.sbatch=[-p long]") == 1
    assert "partition long lets jobs run for 1440 minutes at most" in capsys.readouterr().err
    assert "--parsable" not in (slurm / "calls").read_text()


@pytest.mark.parametrize("option, text, found", [
    ("--export ALL,FOO=bar", "--export ALL,FOO=bar", {"export": "ALL,FOO=bar"}), ("-J x=y", "-J x=y", {"job-name": "x=y"}),
    ("--comment=two words", "--comment='two words'", {"comment": "two words"}), ("-p gpu", "-p gpu", {"partition": "gpu"}),
    ("--partition gpu", "--partition gpu", {"partition": "gpu"}), ("-pgpu", "-pgpu", {"partition": "gpu"}),
    ("--comment=it's", "--comment='it'\"'\"'s'", {"comment": "it's"}), ("--requeue", "--requeue", {"requeue": ""}),
    ('--comment="a #b"', "--comment='a #b'", {"comment": "a #b"})])
def test_options_of_sbatch_stand_in_the_script_as_sbatch_reads_them(option, text, found):
    assert quoted(option) == text and given([text]) == found


def test_the_folder_of_a_jobs_output_is_made_or_said_to_be_missing_before(slurm, tmp_path, capsys):
    assert submit(tmp_path, "--output", "logs/%x/%j.out", "--slurm.sbatch=[--error=errors/%j.err]") == 0
    assert (tmp_path / "logs" / "vit_b16_i21k").is_dir() and (tmp_path / "errors").is_dir()
    assert f"tail -F {tmp_path}/logs/vit_b16_i21k/77.out" in capsys.readouterr().out
    (tmp_path / "file").write_text("")
    for output, parts in (("logs/%j/out", ["logs/%j", "SLURM makes no folders"]), ("file/x/%j.out", ["file", "--output"])):
        assert submit(tmp_path, "--output", output) == 1
        said = capsys.readouterr().err
        assert all(part in said for part in [*parts, "Try:"]), said


def test_silence_about_somebody_elses_job_is_not_taken_for_its_end(slurm, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(os, "getuid", lambda: 1000)  # root would be shown all jobs
    folder = read_request("slurm", ["--workdir", str(tmp_path), *PRETRAIN]).run_folder
    for private, user, end, free in (("jobs,nodes", "ada", None, False), ("jobs", getpass.getuser(), None, True),
                                     ("none", "ada", None, True), ("jobs", "ada", 85, False), ("jobs", "ada", 0, True)):
        stand_in(slurm, "scontrol", f"echo 'ClusterName = c'; echo 'PrivateData = {private}'")
        slurm_checks._config.cache_clear()
        shutil.rmtree(folder, ignore_errors=True)
        a_run(folder, job="slurm-12")
        attempt = Attempt(1, "another", 7, "0", "slurm-12", 0, 1, 0.0, user)
        (folder / "attempts" / "0001.json").write_text(json.dumps(asdict(attempt)))
        if end is not None:
            (folder / "attempts" / "0001.end.json").write_text(json.dumps({"how": "preempted", "code": end}))
        (folder / "launch").mkdir(exist_ok=True)
        (folder / "launch" / "submitted.json").write_text(json.dumps({"job": "slurm-12", "cluster": "c", "user": user}))
        assert (submit(tmp_path) == 0) == free, (private, user, end)
        said = capsys.readouterr().err
        assert free or ("Job 12 of ada may still write" in said and "run.take_over=true" in said), said
        assert (folder / "attempts" / "0001.end.json").exists() == (free or end is not None)


def test_a_queue_that_does_not_answer_is_no_free_folder(slurm, monkeypatch):
    monkeypatch.setattr(slurm_checks, "ANSWER_SECONDS", 0.2)
    stand_in(slurm, "squeue", "exec sleep 30")
    with pytest.raises(RunError, match=r"took more than 0\.2 s"):
        state_of("12")
    stand_in(slurm, "squeue", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    monkeypatch.setattr(slurm_checks, "ANSWER_SECONDS", 60)
    assert state_of("12") == ""
