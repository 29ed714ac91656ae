"""Run folders: one owner at a time, nothing lost, fixed settings refuse a resume."""

import errno
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tubelet.config import Settings, fixed, free, recorded
from tubelet.errors import RunError, SupersededError
from tubelet.runs import Run, RunSettings, _pid_started, check_changes, scheduler_job


def make(tmp_path, **kwargs):
    return Run(RunSettings(name="r", dir=str(tmp_path), **kwargs))


def publish(run, step):
    folder = run.folder / f"step-{step:08d}"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{}")
    return folder


def edit_last_attempt(run, **changes):
    path = sorted((run.folder / "attempts").glob("[0-9][0-9][0-9][0-9].json"))[-1]
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_process_that_ended_and_was_never_waited_for_is_gone(tmp_path):
    """The first process of many containers waits for none of those that it inherits."""
    first = make(tmp_path)
    first.begin(1, "a: 1\n")
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        edit_last_attempt(first, pid=process.pid, pid_started=_pid_started(process.pid))
        with pytest.raises(RunError, match="still running"):
            make(tmp_path).begin(1, "")
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # ended, and left as it is
        assert Path(f"/proc/{process.pid}").exists()
        make(tmp_path).begin(1, "")


def test_a_second_live_job_is_refused_and_may_take_over(tmp_path):
    first = make(tmp_path)
    first.begin(1, "a: 1\n")
    with pytest.raises(RunError, match="still running") as caught:
        make(tmp_path).begin(1, "")
    assert "run.take_over=true" in caught.value.hint and str(os.getpid()) in caught.value.problem
    second = make(tmp_path, take_over=True)
    second.begin(1, "")
    second.check_current()
    with pytest.raises(SupersededError) as caught:
        first.check_current()
    assert caught.value.exit_code == 86


def test_a_job_on_another_host_needs_take_over_unless_it_ended(tmp_path):
    run = make(tmp_path)
    run.begin(1, "")
    edit_last_attempt(run, host="elsewhere")
    with pytest.raises(RunError, match="elsewhere"):
        make(tmp_path).begin(1, "")
    run.end("preempted", 85)
    assert make(tmp_path).begin(1, "").number == 2


def test_a_dead_process_and_a_requeued_job_are_followed(tmp_path, monkeypatch):
    run = make(tmp_path)
    run.begin(1, "")
    dead = subprocess.Popen([sys.executable, "-c", "pass"])
    dead.wait()
    edit_last_attempt(run, pid=dead.pid, pid_started="1")
    assert make(tmp_path).begin(1, "").number == 2
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    edit_last_attempt(run, host="elsewhere", job="slurm-77")
    assert make(tmp_path).begin(1, "").number == 3


def test_a_pid_that_was_reused_by_another_process_is_not_the_old_job(tmp_path):
    run = make(tmp_path)
    run.begin(1, "")
    edit_last_attempt(run, pid_started="12345")  # same pid, started at another moment
    assert make(tmp_path).begin(1, "").number == 2


def test_two_jobs_that_start_at_once_get_one_folder_between_them(tmp_path):
    code = ("import sys; from tubelet.runs import Run, RunSettings\n"
            f"run = Run(RunSettings(name='r', dir={str(tmp_path)!r}))\n"
            "try:\n    run.begin(1, ''); print('owner'); sys.stdout.flush(); sys.stdin.read()\n"
            "except Exception as error: print(type(error).__name__)\n")
    jobs = [subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            for _ in range(4)]
    lines = [job.stdout.readline().strip() for job in jobs]
    for job in jobs:
        job.communicate("")
    assert lines.count("owner") == 1 and lines.count("RunError") == 3


def test_overwrite_keeps_the_old_run_and_a_requeue_does_not_overwrite_again(tmp_path, monkeypatch):
    run = make(tmp_path)
    run.begin(1, "")
    publish(run, 3)
    run.end("finished", 0)
    monkeypatch.setenv("TUBELET_JOB", "k8s-1")
    again = make(tmp_path, overwrite=True)
    again.begin(1, "")
    assert (tmp_path / "r.replaced-1" / "step-00000003" / "manifest.json").exists() and not again.has_checkpoints()
    publish(again, 1)
    requeued = make(tmp_path, overwrite=True)
    requeued.begin(1, "")
    assert requeued.has_checkpoints() and not (tmp_path / "r.replaced-2").exists()


def test_a_start_records_host_commit_settings_and_end(tmp_path):
    run = make(tmp_path)
    run.begin(2, "lr: 1\n")
    run.end("finished", 0, step=9)
    attempt = json.loads((run.folder / "attempts" / "0001.json").read_text())
    assert attempt["host"] == socket.gethostname() and attempt["world_size"] == 2 and time.time() - attempt["time"] < 60
    assert (run.folder / "config.yaml").read_text() == "lr: 1\n"
    events = [json.loads(line)["event"] for line in (run.folder / "events.jsonl").read_text().splitlines()]
    assert events[0] == "start" and events[-1] == "end"


def test_schedulers_are_recognised():
    assert scheduler_job({"SLURM_JOB_ID": "5", "SLURM_STEP_ID": "0", "SLURM_RESTART_COUNT": "2"}) == ("slurm-5", 2)
    assert scheduler_job({"SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "3"}) == ("slurm-5_3", 0)
    assert scheduler_job({"SLURM_JOB_ID": "5"}) == ("", 0)  # a shell inside an allocation, not the job's task


class Small(Settings):
    width: int = fixed(1)
    depth: int = fixed(1)
    lr: float = recorded(1.0)
    log_every: int = free(1)


def test_fixed_settings_are_refused_together_and_recorded_ones_returned():
    old = Small().model_dump(mode="json")
    with pytest.raises(RunError, match="2 fixed settings") as caught:
        check_changes(Small, old, Small(width=2, depth=3, lr=2).model_dump(mode="json"), "runs/r")
    assert "width: checkpoint 1, now 2" in str(caught.value) and "depth: checkpoint 1, now 3" in str(caught.value)
    assert "init.from_run" in caught.value.hint
    changed = check_changes(Small, old, Small(lr=2, log_every=5).model_dump(mode="json"), "runs/r")
    assert [str(item) for item in changed] == ["lr: 1.0 -> 2.0"]


def test_a_checkpoint_of_an_earlier_version_resumes_with_settings_it_does_not_know():
    """Each new setting counts as its default then; what is not the default is a change as ever."""
    from pretrain.settings import PretrainSettings

    given = {"run": {"name": "r"}, "model": {"name": "vit_tiny_patch16_224"}, "total_steps": 3, "global_batch_size": 8,
             "optimizer": {"name": "adamw", "lr": 1e-3},
             "data": {"train": [{"name": "a", "shards": "a.tar"}]}}
    now = PretrainSettings(**given).model_dump(mode="json")
    old = json.loads(json.dumps(now))
    for name in ("clip", "cache", "token_labels", "reduced_decode", "video_decoder", "worker_timeout_seconds"):
        del old["data"][name]
    for name in ("short_side", "crop_last", "color_jitter", "erasing", "erasing_mode", "erasing_count", "mixtoken_alpha"):
        del old["data"]["augment"][name]
    del old["data"]["train"][0]["storage"], old["init"]["inflate"], old["objective"]["average"]
    assert check_changes(PretrainSettings, old, now, "runs/r") == []
    now["data"]["augment"]["erasing"], now["data"]["clip"]["frames"] = 0.25, 8
    with pytest.raises(RunError, match="1 fixed setting changed.\n    data.clip.frames: checkpoint 1, now 8"):
        check_changes(PretrainSettings, old, now, "runs/r")
    now["data"]["clip"]["frames"] = 1
    (changed,) = check_changes(PretrainSettings, old, now, "runs/r")
    assert str(changed) == "data.augment.erasing: 0.0 -> 0.25"
    now["data"]["train"].append({"name": "b", "shards": "b.tar", "weight": 1.0, "label": "cls", "class_map": None})
    with pytest.raises(RunError, match="data.train.1.weight: checkpoint None, now 1.0"):  # a new source is no new setting
        check_changes(PretrainSettings, old, now, "runs/r")


def test_a_folder_that_cannot_be_written_is_said_with_its_setting(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="`run.dir` is .*file, and the run folder .*file/r cannot be written") as caught:
        make(tmp_path / "file").begin(1, "a: 1\n")
    assert "Not a directory" in caught.value.problem and "run.dir=" in caught.value.hint
    make(tmp_path).begin(1, "a: 1\n")

    def refused(*args):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("tubelet.files.create_exclusive", refused)
    with pytest.raises(RunError, match="Read-only file system"):
        make(tmp_path, take_over=True).begin(1, "a: 1\n")
