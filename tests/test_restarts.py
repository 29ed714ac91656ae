"""Which jobs are started again: by exit code, first error and progress; and which node failed, from what srun says."""

import json
import shutil

import pytest

from launch.restarts import attempt_of, decide, newest_step
from launch.settings import RestartSettings
from launch.slurm_restart import answer, first_failure
from tubelet.errors import CheckpointError, LostError
from tubelet.meeting import Meeting, explanation
from tubelet.program.main import report


def a_run(folder, *, attempts=1, steps=(), end=None, error=None, job="slurm-7"):
    """A run folder as the newest of so many starts has left it."""
    for name in ("attempts", "logs", "launch"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for number in range(1, attempts + 1):
        (folder / "attempts" / f"{number:04d}.json").write_text(json.dumps({"number": number, "job": job,
                                                                            "restarts": number - 1}))
    if end:
        (folder / "attempts" / f"{attempts:04d}.end.json").write_text(json.dumps(end))
    if error:
        (folder / "logs" / f"first-error-{attempts:04d}.json").write_text(json.dumps(error))
    for step in steps:
        (folder / f"step-{step:08d}").mkdir(exist_ok=True)
        (folder / f"step-{step:08d}" / "manifest.json").write_text("{}")
    (folder / "step-99999999").mkdir(exist_ok=True)  # not published: no manifest
    return folder


OOM = {"rank": 3, "host": "g2", "code": 1, "error": "torch.OutOfMemoryError: CUDA out of memory", "time": 0}
LOST = {"rank": 0, "host": "g1", "code": 87, "error": "Lost the connection to rank 3", "time": 0}
SAVED, FINISHED = {"how": "preempted", "code": 85}, {"how": "finished", "code": 0}


@pytest.mark.parametrize("code, end, error, restart, counts, parts", [
    (85, SAVED, None, True, 85, ["attempt 2 left with 85 (saved, asked to leave) at step 1200", "0 of 3"]),
    (0, FINISHED, None, False, 0, ["finished"]),
    (0, None, None, True, 87, ["lost a rank or a connection"]),           # srun lost a node's part of the job
    (137, SAVED, None, True, 85, ["85"]),                                # killed when all had saved
    (137, FINISHED, None, False, 0, ["finished"]),
    (1, None, OOM, False, 1, ["rank 3 on g2", "CUDA out of memory", "would come again"]),
    (87, None, OOM, False, 1, ["CUDA out of memory"]),                   # the others lost the rank that had the error
    (137, None, OOM, False, 1, ["CUDA out of memory"]),                  # and were killed
    (87, None, LOST, True, 87, ["Lost the connection to rank 3"]),
    (137, None, LOST, True, 137, ["SIGKILL"]),
    (134, None, None, True, 134, ["SIGABRT"]),
    (253, None, None, True, 253, ["memory was full"]),
    (86, None, None, False, 86, ["another attempt has taken the run over"]),
    (130, {"how": "preempted", "code": 130}, None, False, 130, ["interrupted"]),
    (2, None, None, False, 2, ["would come again", "Try:"]),
])
def test_what_is_started_again_and_what_is_not(tmp_path, code, end, error, restart, counts, parts):
    run = a_run(tmp_path / "r", attempts=2, steps=(800, 1200), end=end, error=error)
    found = decide(run, code, RestartSettings(), job="slurm-7", attempt=2)
    assert (found.restart, found.code, found.step) == (restart, counts, 1200), found
    assert all(part in found.said for part in parts), found.said
    assert len((run / "launch" / "restarts.jsonl").read_text().splitlines()) == 1


def test_losses_are_not_restarted_when_told_so_but_requests_to_leave_are(tmp_path):
    settings = RestartSettings(on_failure=False)
    assert not decide(a_run(tmp_path / "a"), 137, settings, job="j", attempt=1).restart
    assert decide(a_run(tmp_path / "b", end=SAVED), 85, settings, job="j", attempt=1).restart


def test_restarts_end_after_so_many_without_a_newer_checkpoint_and_a_newer_one_begins_to_count_anew(tmp_path):
    run, settings = a_run(tmp_path / "r"), RestartSettings(max_without_progress=2)

    def restarted(job="j", code=85):
        return decide(run, code, settings, job=job, attempt=1).restart

    assert [restarted(), restarted(code=137), restarted()] == [True, True, False]
    a_run(run, steps=(10,))
    assert [restarted(), restarted()] == [True, True]
    a_run(run, steps=(10, 20))
    assert [restarted(), restarted(), restarted()] == [True, True, False]
    assert restarted(job="submitted again") is True
    assert "(0 of 2 restarts" in decide(run, 85, settings, job="and again", attempt=1).said
    never = decide(run, 85, RestartSettings(max_without_progress=0), job="k", attempt=1)
    assert not never.restart and "max_without_progress is 0" in never.said


def test_a_start_that_never_claimed_the_folder_is_not_judged_by_the_one_before(tmp_path):
    run = a_run(tmp_path / "r", attempts=2, end=FINISHED, error=OOM)
    assert [attempt_of(run, "slurm-7", restarts) for restarts in (0, 1, 2)] == [1, 2, 0]
    assert attempt_of(run, "slurm-8", 1) == 0
    found = decide(run, 137, RestartSettings(), job="slurm-7", attempt=0)
    assert found.restart and "had not yet claimed the run folder" in found.said


def test_progress_is_looked_for_where_the_checkpoints_are(tmp_path):
    import fsspec

    run = a_run(tmp_path / "r", steps=(5,))
    assert newest_step(run) == 5
    (run / "config.yaml").write_text(f"checkpoint:\n  dir: {tmp_path}/elsewhere\n")
    assert newest_step(run) is None
    a_run(tmp_path / "elsewhere", steps=(7,))
    assert newest_step(run) == 7
    (run / "config.yaml").write_text("checkpoint:\n  dir: memory://bucket/r\n  storage: {}\n")
    with fsspec.open("memory://bucket/r/step-00000009/manifest.json", "w") as file:
        file.write("{}")
    assert newest_step(run) == 9
    (run / "config.yaml").write_text("checkpoint:\n  dir: nothing-known://bucket/r\n")
    with pytest.raises(CheckpointError, match="cannot be listed"):
        newest_step(run)


KILLED = """\
launch: start 0 of job 4 on g[1-2], 2026-01-01
srun: error: g1: task 0: Killed
launch: start 1 of job 4 on g[1-2], 2026-01-01
step 3/60 loss 2.3
"""
WAITED = """srun: First task exited 60s ago
srun: StepId=4.2 tasks {running}: running
srun: StepId=4.2 task 1: exited abnormally
srun: launch/slurm: _step_signal: Terminating StepId=4.2
srun: Job step aborted: Waiting up to 12 seconds for job step to finish.
"""


@pytest.mark.parametrize("text, node, how", [
    (KILLED + "srun: error: g2: task 3: Killed\nsrun: error: g1: tasks 0-1: Exited with exit code 87\n", "g2", "Killed"),
    (KILLED + "srun: error: g1: tasks 0-1: Exited with exit code 87\nsrun: error: g2: tasks 2,3: Segmentation fault\n", "g2",
     "Segmentation fault"),
    (KILLED + "srun: error: Node failure on g2\nsrun: error: g1: task 0: Killed\n", "g2", "the node was lost"),
    (KILLED + "srun: error: g1: task 1: Exited with exit code 87\n" + WAITED.format(running="0,2-3")
     + "srun: error: g1: task 0: Killed\nsrun: error: g2: tasks 2-3: Killed\n", "", ""),   # killed by srun, which waited
    (KILLED + "srun: error: g1: tasks 0-1: Exited with exit code 87\n" + WAITED.format(running="2-3")
     + "srun: error: Timed out waiting for job step to complete\n", "g2", "its tasks were not heard of any more"),
    (KILLED + WAITED.format(running="0,2-3"), "", ""),                                      # both nodes: which one?
    (KILLED + "srun: error: g1: tasks 0-1: Exited with exit code 85\n", "", ""),
    (KILLED, "", ""),
])
def test_the_node_that_failed_first_is_read_from_what_srun_says_of_the_last_start(text, node, how):
    assert first_failure("\n" + text, ["g1", "g2"], 2) == (node, how)


def test_the_node_of_a_rank_with_an_error_of_its_own_is_named_as_slurm_names_it(tmp_path, capsys):
    run = a_run(tmp_path / "r", error={**OOM, "host": "some-other-name"}, job="slurm-12_3")
    env = {"TUBELET_RUN": str(run), "TUBELET_CODE": "87", "TUBELET_JOB": "slurm-12_3", "TUBELET_HOSTS": "g1\ng2",
           "TUBELET_OUTPUT": "/nonexistent", "SLURM_RESTART_COUNT": "0"}
    assert answer(["--per-node=2", "--max-without-progress=3", "--exclude="], env) == "stop 1"
    assert "rank 3 on g2" in capsys.readouterr().err
    (run / "logs" / "first-error-0001.json").write_text(json.dumps({**OOM, "code": 139}))
    assert answer(["--per-node=2", "--max-without-progress=3", "--exclude="], env) == "restart without g2"
    assert answer(["--per-node=2", "--max-without-progress=3"], env) == "restart"
    (run / "logs" / "first-error-0001.json").write_text(json.dumps(LOST))  # of a rank that lost another one
    assert answer(["--per-node=2", "--max-without-progress=3", "--exclude="], env) == "restart"
    (tmp_path / "out").write_text(KILLED + "srun: error: g2: task 3: Killed\n")
    env["TUBELET_OUTPUT"] = str(tmp_path / "out")
    capsys.readouterr()
    assert answer(["--per-node=2", "--max-without-progress=9", "--exclude="], env) == "restart without g2"
    said = capsys.readouterr().err  # what died is one thing, who noticed another
    assert "on g2 a rank failed first (Killed)" in said and "rank 0 on g1: Lost the connection" in said
    (run / "attempts" / "0001.end.json").write_text(json.dumps(SAVED))  # killed when all had saved: no fault of the node
    assert answer(["--per-node=2", "--max-without-progress=9", "--exclude="], env) == "restart"


def test_a_device_that_failed_is_a_loss_whose_node_can_be_left_out_and_is_not_restarted_for_ever(
        tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # a rank that lost another one lets it speak first
    run = a_run(tmp_path / "r", job="slurm-9")
    (run / "attempts" / "0001.yaml").touch()
    told = explanation(RuntimeError("CUDA error: uncorrectable ECC error encountered\nCUDA kernel errors might be ..."),
                       Meeting({}, [("x", "")] * 4, "train", rank=3))
    assert told and report(told, 3, run, start=1) == 87
    assert report(LostError("Lost the connection to rank 3", "read logs"), 0, run, start=1) == 87
    env = {"TUBELET_RUN": str(run), "TUBELET_CODE": "87", "TUBELET_JOB": "slurm-9", "TUBELET_HOSTS": "g1\ng2",
           "TUBELET_OUTPUT": "/nonexistent", "SLURM_RESTART_COUNT": "0"}
    capsys.readouterr()
    assert answer(["--per-node=2", "--max-without-progress=2", "--exclude=g7"], env) == "restart without g7,g2"
    said = capsys.readouterr().err
    assert "rank 3 on g2: error: The device of rank 3 on host x failed while training: CUDA error: uncorrectable ECC" in said
    assert "keeps off g2" in said
    assert answer(["--per-node=2", "--max-without-progress=2"], env) == "restart"
    assert answer(["--per-node=2", "--max-without-progress=2", "--exclude="], env) == "stop 87"


def test_a_folder_in_which_nothing_can_be_remembered_is_not_restarted_for_ever(tmp_path):
    run = a_run(tmp_path / "r", end=SAVED)
    shutil.rmtree(run / "launch")
    (run / "launch").write_text("a file")
    with pytest.raises(CheckpointError, match="cannot be read and written"):
        decide(run, 85, RestartSettings(), job="j", attempt=1)
