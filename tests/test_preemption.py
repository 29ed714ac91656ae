"""Preemption: signals at any moment of a program's life, and the end of the job by the clock. (Signals in the middle of
training and saving, through real programs: test_resume.py.)"""

import os
import subprocess
import sys
import time
from datetime import datetime

import pytest
from programs import ROOT

from tubelet.engine.deadline import Deadline
from tubelet.engine.settings import EngineSettings, OptimizerSettings

NOON = 1_800_000_000.0


def settings(**changes):
    return EngineSettings(total_steps=4, global_batch_size=4, optimizer=OptimizerSettings(lr=1e-3), **changes)


class Clock:
    def __init__(self, now=NOON):
        self.now = now

    def __call__(self):
        return self.now


def stub(folder, name, text, code=0, seconds=0):
    """A command of a scheduler that says `text`, notes that it was asked, and may be slow."""
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/sh\necho \"{name} $*\" >> {folder}/asked\nsleep {seconds}\n"
                    f"cat <<'END'\n{text}\nEND\nexit {code}\n")
    path.chmod(0o755)


def asked(folder):
    return (folder / "asked").read_text().splitlines() if (folder / "asked").exists() else []


# ------------------------------------------------------------------------------------------------ the clock


def test_leaving_begins_so_early_that_the_margin_a_long_save_and_two_steps_fit():
    clock = Clock()
    env = {"SLURM_JOB_ID": "7", "SLURM_JOB_END_TIME": str(int(NOON) + 3600)}
    deadline = Deadline(settings(time_limit_margin_seconds=100), env, now=clock)
    assert deadline.end == NOON + 3600
    assert deadline.reason == f"time limit: the job ends at {datetime.fromtimestamp(NOON + 3600):%Y-%m-%d %H:%M}"
    clock.now = NOON + 3600
    assert not deadline.due(40, 5)  # every job gets one step, or none would get on
    clock.now = NOON + 3600 - 100 - 1.5 * 40 - 2 * 5 - 0.01
    assert not deadline.due(40, 5)
    clock.now += 0.02
    assert deadline.due(40, 5) and not deadline.due(39, 5) and not deadline.due(40, 4)


def test_the_limit_of_the_settings_counts_from_the_start_of_the_job_and_goes_before_the_schedulers():
    env = {"SLURM_JOB_ID": "7", "SLURM_JOB_END_TIME": str(int(NOON) + 60), "SLURM_JOB_START_TIME": str(int(NOON) - 600)}
    assert Deadline(settings(time_limit_minutes=30), env, now=Clock()).end == NOON + 1200
    script = ("import time, sys; time.sleep(1); from tests.test_preemption import settings, Deadline\n"
              "print(Deadline(settings(time_limit_minutes=1), {}).end - time.time())")
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60,
                          env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT}/tests"})
    assert 40 < float(done.stdout) < 59, done.stderr  # what was imported before counts


def test_a_requeued_job_reads_its_new_end():
    first = {"SLURM_JOB_ID": "7", "SLURM_JOB_END_TIME": str(int(NOON) + 3600)}
    again = {**first, "SLURM_JOB_END_TIME": str(int(NOON) + 9000), "SLURM_RESTART_COUNT": "1"}
    assert [Deadline(settings(), env, now=Clock()).end for env in (first, again)] == [NOON + 3600, NOON + 9000]


def test_slurm_is_asked_once_by_one_rank_when_its_variable_is_missing(tmp_path):
    end = datetime.fromtimestamp(NOON + 7200)
    stub(tmp_path, "scontrol",
         f"JobId=7 JobName=x StartTime=2026-01-01T00:00:00 EndTime={end:%Y-%m-%dT%H:%M:%S} Deadline=N/A")
    stub(tmp_path, "squeue", "N/A")
    env = {"SLURM_JOB_ID": "7", "PATH": f"{tmp_path}:{os.environ['PATH']}", "TUBELET_END_TIME": str(NOON + 10)}
    deadline = Deadline(settings(), env, now=Clock())
    assert (deadline.end, deadline.source) == (NOON + 7200, "scontrol") and asked(tmp_path) == ["scontrol show job -o 7"]
    for _ in range(3):
        deadline.due(1, 1)
    assert len(asked(tmp_path)) == 1
    quiet = Deadline(settings(), {**env, "TUBELET_END_TIME": ""}, speaks=False, now=Clock())
    assert quiet.end is None and not quiet.due(1, 1) and not quiet.due(1, 1) and len(asked(tmp_path)) == 1


@pytest.mark.parametrize("said, code", [("EndTime=Unknown", 0), ("slurm_load_jobs error: Invalid job id", 1), ("", 0)])
def test_what_one_command_of_slurm_does_not_know_the_next_may_and_then_the_variable(tmp_path, said, code):
    stub(tmp_path, "scontrol", said, code)
    stub(tmp_path, "squeue", f"{datetime.fromtimestamp(NOON + 500):%Y-%m-%dT%H:%M:%S}")
    env = {"SLURM_JOB_ID": "7", "PATH": f"{tmp_path}:{os.environ['PATH']}",
           "TUBELET_END_TIME": datetime.fromtimestamp(NOON + 900).isoformat()}
    deadline = Deadline(settings(), env, now=Clock())
    assert (deadline.end, deadline.source) == (NOON + 500, "squeue")
    assert asked(tmp_path) == ["scontrol show job -o 7", "squeue -h -j 7 -o %e"]
    stub(tmp_path, "squeue", "NONE")
    assert Deadline(settings(), env, now=Clock()).source == "TUBELET_END_TIME"
    absent = {**env, "PATH": "/nowhere"}
    assert Deadline(settings(), absent, now=Clock()).end == NOON + 900
    assert Deadline(settings(), {"SLURM_JOB_ID": "7", "PATH": "/nowhere"}, now=Clock()).end is None


def test_a_scheduler_that_does_not_answer_costs_seconds_and_means_unknown(tmp_path, monkeypatch):
    monkeypatch.setattr("tubelet.engine.deadline.ASK_SECONDS", 0.3)
    for name in ("scontrol", "squeue"):
        stub(tmp_path, name, "EndTime=2030-01-01T00:00:00", seconds=5)
    begun = time.monotonic()
    deadline = Deadline(settings(), {"SLURM_JOB_ID": "7", "PATH": f"{tmp_path}:{os.environ['PATH']}"}, now=Clock())
    assert deadline.end is None and deadline.notes() == [] and time.monotonic() - begun < 4


def test_a_job_shorter_than_its_margin_is_warned_of_and_still_trains():
    clock = Clock()
    deadline = Deadline(settings(time_limit_margin_seconds=120), {"TUBELET_END_TIME": str(NOON + 100)}, now=clock)
    said = "\n".join(deadline.notes())
    for part in ("warning", "100 s", "time_limit_margin_seconds", "120", "25 s are kept", "Try:"):
        assert part in said
    assert not deadline.due(1, 1) and not deadline.due(1, 1)
    clock.now += 75
    assert deadline.due(0, 0)


def test_no_room_for_a_save_is_warned_of_once_it_is_known_how_long_one_takes():
    deadline = Deadline(settings(time_limit_margin_seconds=10), {"TUBELET_END_TIME": str(NOON + 400)}, now=Clock())
    assert len(deadline.notes()) == len(deadline.notes(200)) == 1
    assert "a save takes 300 s" in deadline.notes(300)[1] and "Try:" in deadline.notes(300)[1]


def test_an_end_in_the_past_is_said_and_not_believed():
    deadline = Deadline(settings(), {"TUBELET_END_TIME": str(NOON - 5)}, now=Clock())
    assert deadline.end is None and not deadline.due(1, 1) and not deadline.due(1, 1)
    assert "TUBELET_END_TIME" in deadline.notes()[0] and "Try:" in deadline.notes()[0]
