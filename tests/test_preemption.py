"""Preemption: signals at any moment of a program's life, and the end of the job by the clock. (Signals in the middle of
training and saving, through real programs: test_resume.py.)"""

import os
import signal
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

import pytest
from programs import ROOT, digests, recipe, run, start, wait_for
from ranks import run_ranks

from launch.workers import exit_code
from tubelet.engine.deadline import Deadline
from tubelet.engine.settings import EngineSettings, OptimizerSettings
from tubelet.engine.signals import StopFlag, Stopped

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
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=200,
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
    env = {"SLURM_JOB_ID": "7", "PATH": f"{tmp_path}:{os.environ['PATH']}", "TUBELET_END_TIME": str(NOON + 9000)}
    deadline = Deadline(settings(), env, now=Clock())
    assert (deadline.end, deadline.source) == (NOON + 7200, "scontrol") and asked(tmp_path) == ["scontrol show job -o 7"]
    for _ in range(3):
        deadline.due(1, 1)
    assert len(asked(tmp_path)) == 1
    quiet = Deadline(settings(), {**env, "TUBELET_END_TIME": ""}, speaks=False, now=Clock())
    assert quiet.end is None and not quiet.due(1, 1) and not quiet.due(1, 1) and len(asked(tmp_path)) == 1


def test_the_limit_of_a_launcher_inside_of_an_allocation_holds_when_it_ends_first():
    def end(slurm, launcher):
        env = {"SLURM_JOB_ID": "7", "SLURM_JOB_END_TIME": str(int(NOON) + slurm), "PATH": "/nowhere",
               "TUBELET_END_TIME": str(NOON + launcher)}
        deadline = Deadline(settings(), env, now=Clock())
        return deadline.end and deadline.end - NOON, deadline.source

    assert end(7200, 600) == (600, "TUBELET_END_TIME") and end(500, 600) == (500, "SLURM_JOB_END_TIME")
    assert end(500, -60) == (500, "SLURM_JOB_END_TIME")  # left over in the shell
    assert end(-60, 600) == (600, "TUBELET_END_TIME")


def test_a_task_of_an_array_asks_for_itself_alone(tmp_path):
    stub(tmp_path, "scontrol", f"EndTime={datetime.fromtimestamp(NOON + 900):%Y-%m-%dT%H:%M:%S}")
    env = {"SLURM_JOB_ID": "7", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2",
           "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    assert Deadline(settings(), env, now=Clock()).end == NOON + 900 and asked(tmp_path) == ["scontrol show job -o 7_2"]


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


# ----------------------------------------------------------------------------------------------- signals, without torch

BLOCKED = """
import ctypes, os, signal, sys, time
from tubelet.engine import signals
signals.START_SECONDS = 0.4
stop = signals.StopFlag(float(sys.argv[2]))
if sys.argv[1] == "starting":
    stop.starts()
if sys.argv[1] == "saved":
    stop.saved()
with stop:
    print("ready", flush=True)
    mutex = ctypes.create_string_buffer(64)  # what a collective is to Python: C code that comes back to no handler
    for _ in range(2):
        ctypes.CDLL(None).pthread_mutex_lock(mutex)
"""

READING = """
import os, signal, sys, time
from tubelet.engine import signals
with signals.StopFlag(60) as stop:
    child = os.fork()
    if not child:
        time.sleep(60)
    print(child, flush=True)
    for line in sys.stdin:
        print(stop.code, stop.reason or "-", flush=True)
    os.kill(child, signal.SIGKILL)
os.kill(os.getpid(), signal.SIGTERM)  # late: must not spoil the exit code
time.sleep(0.1)
os._exit(stop.code)
"""


def script(text, *words, env=None):
    return subprocess.Popen([sys.executable, "-c", text, *words], cwd=ROOT, text=True, stdin=subprocess.PIPE,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, **(env or {})},
                            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))


@pytest.mark.parametrize("phase, number, code", [("starting", signal.SIGTERM, 85), ("starting", signal.SIGINT, 130),
                                                 ("training", signal.SIGUSR1, 87), ("training", signal.SIGINT, 130),
                                                 ("saved", signal.SIGTERM, 85)])
def test_a_rank_that_waits_in_c_code_leaves_in_time_all_the_same(phase, number, code, tmp_path):
    process = script(BLOCKED, phase, "0.4", env={"TUBELET_EXIT_DIR": str(tmp_path), "RANK": "3"})
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.2)
    begun = time.monotonic()
    for _ in range(3):  # however often it comes (three Ctrl-C in a row are one key)
        process.send_signal(number)
    _, errors = process.communicate(timeout=90)
    assert 0.3 < time.monotonic() - begun < 10
    assert (tmp_path / "rank-3.code").read_text() == str(code)
    assert process.returncode == (0 if phase == "starting" else code)  # the launcher reads the file: no page of torchrun's
    assert phase == "starting" or "preempt_grace_seconds" in errors and signal.Signals(number).name in errors
    assert ("saving has not finished" in errors) == (phase == "training")


def test_a_signal_to_a_forked_worker_is_not_the_programs_and_a_late_one_does_not_spoil_the_exit_code():
    process = script(READING)
    child = int(process.stdout.readline())

    def heard():
        process.stdin.write("?\n")
        process.stdin.flush()
        return process.stdout.readline().split()

    for number in (signal.SIGTERM, signal.SIGUSR1):
        os.kill(child, number)
    time.sleep(0.2)
    assert heard() == ["0", "-"]
    process.send_signal(signal.SIGUSR2)
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.1)
    assert heard() == ["85", "SIGUSR2"]
    process.stdin.close()
    assert process.wait(20) == 85


def test_a_second_ctrl_c_within_five_seconds_leaves_at_once_and_the_first_does_not():
    process = script(BLOCKED, "training", "60")
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    time.sleep(0.03)
    process.send_signal(signal.SIGINT)  # the same key, passed on by a launcher
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=90)
    assert process.returncode == 130 and "second Ctrl-C" in errors


def one_is_asked(world, device):
    """Only rank 1 gets the signal; says what each rank raised, and that asking before and alone raised nothing."""
    with StopFlag().starts() as stop:
        stop.raise_if_asked(together=True)
        if world.rank == 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        while world.rank == 1 and not stop.code:
            time.sleep(0.01)
        if world.rank == 0:
            stop.raise_if_asked()
        try:
            stop.raise_if_asked(together=True)
        except Stopped as error:
            return error.code, error.reason
    return None


def test_one_rank_that_is_asked_while_starting_takes_the_others_along():
    assert run_ranks(one_is_asked, 2) == [(85, "a signal on another rank"), (85, "SIGUSR1")]


@pytest.mark.parametrize("torchrun, workers, asked, code", [
    (0, [0, 0], False, 0), (0, [85, 85], True, 85), (0, [130, 130], True, 130), (0, [86, 86], False, 86),
    (1, [85], True, 85),  # one left while starting, the other was ended by torchrun before its first line
    (1, [85], False, 1), (1, [], True, 1), (1, [85, 3], True, 3), (-9, [], False, 137), (0, [], False, 0)])
def test_the_launchers_exit_code_is_the_first_error_and_else_what_the_ranks_agree_on(torchrun, workers, asked, code):
    assert exit_code(torchrun, workers, asked) == code


# -------------------------------------------------------------------------------------------- signals to real programs


def leave_at(config, nproc, condition, number=signal.SIGTERM):
    """Start, signal the group twice once `condition(seconds, folder)`; returns (exit code, output)."""
    begun = time.monotonic()
    process = start("pretrain", config, nproc=nproc)
    wait_for(lambda: condition(time.monotonic() - begun) and catches(process.pid), process)
    for _ in range(2):
        os.killpg(process.pid, number)
    output, _ = process.communicate(timeout=300)
    return process.returncode, output


def test_a_signal_while_a_program_starts_ends_it_with_85_or_130_on_all_ranks(tmp_path):
    config, folder = recipe(tmp_path, 3, 50)
    code, output = leave_at(config, 1, lambda seconds: seconds > 0.5)  # torch is being imported, or not yet
    assert code == 85 and ("SIGTERM while starting" in output or not output) and not folder.exists(), output[-2000:]
    written = folder / "attempts" / "0001.json"
    code, output = leave_at(config, 2, lambda seconds: written.exists(), signal.SIGINT)  # the model is being built
    assert code == 130 and "SIGINT while starting" in output and "Traceback" not in output, output[-2000:]
    assert not list(folder.glob("step-*"))


def catches(pid):
    """True once a process has a handler for TERM; before, not a line of ours has run."""
    status = Path(f"/proc/{pid}/status").read_text()
    return bool(int(status.partition("SigCgt:")[2].split()[0], 16) >> (signal.SIGTERM - 1) & 1)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_launcher_passes_a_signal_on_whenever_it_comes(tmp_path):
    config, folder = recipe(tmp_path, 3000, 3)
    saved = -1
    trained = folder / "digest.jsonl"
    moments = [lambda seconds, least=least: seconds > least for least in (0.3, 1, 2, 3, 4, 5, 6, 8)]
    for moment in [*moments, lambda seconds: trained.exists() and len(trained.read_text()) > 300]:
        code, output = leave_at(config, 2, moment)
        assert code == 85, output[-3000:]
        steps = sorted(int(path.parent.name[5:]) for path in folder.glob("step-*/manifest.json"))
        assert not steps or steps[-1] >= saved
        saved = steps[-1] if steps else saved
    assert saved > 0
    output = run("pretrain", config, f"total_steps={saved + 1}", nproc=2)
    assert f"step {saved + 1}/{saved + 1}" in output and list(digests(folder)) == list(range(1, saved + 2))
