"""Where the time of a run went: made-up starts whose true shares are known, and the record that a start keeps of itself."""

import json
import os
import subprocess
import time
from types import SimpleNamespace

import pytest

from tubelet.engine.goodput import KINDS, Goodput, process_started, records, report
from tubelet.engine.phases import Phases
from tubelet.runs import Run, RunSettings

PHASES = ("start", "restore", "data", "compute", "save", "evaluate", "log", "wait")


def made_up(tmp_path, *starts):
    """A run folder with these starts: {begin, clock, end, job, first, step, redone, share, seconds: {phase: s}, before}.

    `before` = seconds between the beginning of the process and of its clock; without `clock` there is no record, without
    `end` the start left no word."""
    run = Run(RunSettings(name="r", dir=str(tmp_path)))
    folder = run.folder / "attempts"
    folder.mkdir(parents=True)
    for number, start in enumerate(starts, 1):
        attempt = {"number": number, "host": "h", "pid": 1, "pid_started": "", "job": start.get("job", ""), "restarts": 0,
                   "world_size": 8, "time": start["begin"] + 1.0, "user": "u"}  # claimed a second after the process began
        (folder / f"{number:04d}.json").write_text(json.dumps(attempt))
        if "seconds" in start:
            record = {"time": start["clock"], "process_started": start["begin"], "first_step": start["first"],
                      "step": start["step"], "redone_steps": start.get("redone", 0), "seconds": start["seconds"],
                      "communication_share": start.get("share")}
            (folder / f"goodput-{number:04d}.json").write_text(json.dumps(record))
        if "end" in start:
            (folder / f"{number:04d}.end.json").write_text(json.dumps({"how": "x", "code": 0, "time": start["end"]}))
    return report(records(run))


def test_one_undisturbed_start_is_divided_as_its_clock_says(tmp_path, capsys):
    seconds = {"start": 10.0, "restore": 5.0, "data": 20.0, "compute": 100.0, "save": 30.0, "evaluate": 15.0, "log": 2.0,
               "wait": 8.0}  # 190 s, and 10 s of imports before
    found = made_up(tmp_path, {"begin": 1000, "clock": 1200, "end": 1200, "first": 0, "step": 50, "share": 0.25,
                               "seconds": seconds})
    assert found.total == pytest.approx(200)
    assert found.shares() == pytest.approx({"data": 10.0, "compute": 37.5, "communication": 16.5, "checkpoint": 15.0,
                                            "evaluation": 7.5, "restart": 12.5, "other": 1.0})
    assert found.goodput == pytest.approx(0.5) and (found.steps, found.redone_steps) == (50, 0)
    assert sum(found.shares().values()) == pytest.approx(100)
    assert found.scalars()["goodput/data_pct"] == pytest.approx(10) and found.scalars()["goodput/goodput_pct"] == 50
    assert found.rows()[0] == ("data", "10.0 %", "00:00:20") and found.rows()[-1] == ("goodput", "50.0 %", "00:01:40")
    found.show()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Goodput: 00:03:20 in 1 start, 50 steps" and lines[2].split() == ["data", "10.0", "%", "00:00:20"]


def test_a_killed_job_of_a_scheduler_costs_what_was_lost_and_the_time_it_was_down(tmp_path):
    killed = {"begin": 0, "clock": 100, "job": "slurm-7", "first": 0, "step": 80,  # checkpoint at 60: 20 of 80 lost
              "seconds": {"start": 10.0, "data": 8.0, "compute": 64.0, "save": 10.0, "log": 8.0}}
    second = {"begin": 160, "clock": 220, "end": 220, "job": "slurm-7", "first": 60, "step": 100,
              "seconds": {"restore": 20.0, "compute": 40.0}}
    found = made_up(tmp_path, killed, second)
    assert found.total == pytest.approx(220)
    expected = {"data": 6.0, "compute": 48 + 40, "communication": 0.0, "checkpoint": 10.0, "evaluation": 0.0,
                "restart": 10 + (2 + 16 + 2) + 60 + 20, "other": 6.0}
    assert found.seconds == pytest.approx(expected)
    assert found.goodput == pytest.approx(88 / 220) and (found.steps, found.redone_steps) == (100, 20)
    assert "2 starts, 120 steps, 20 of them again" in found.title()


def test_nobodys_time_between_starts_by_hand_is_not_counted(tmp_path):
    first = {"begin": 0, "clock": 50, "end": 50, "first": 0, "step": 10, "seconds": {"compute": 50.0}}
    second = {"begin": 90_000, "clock": 90_050, "end": 90_050, "first": 10, "step": 20, "seconds": {"compute": 50.0}}
    found = made_up(tmp_path, first, second)
    assert found.total == pytest.approx(100) and found.goodput == pytest.approx(1)


def test_steps_gone_back_over_are_counted_once_whoever_did_them(tmp_path):
    first = {"begin": 0, "clock": 100, "end": 100, "first": 0, "step": 40, "redone": 10, "seconds": {"compute": 100.0}}
    second = {"begin": 200, "clock": 300, "end": 300, "first": 20, "step": 40, "seconds": {"compute": 100.0}}
    third = {"begin": 400, "clock": 500, "end": 500, "first": 10, "step": 60, "seconds": {"compute": 100.0}}
    found = made_up(tmp_path, first, second, third)  # newer checkpoints were damaged: the third went back further
    assert found.steps == 60 and found.redone_steps == 10 + 30 + 20
    assert found.productive == pytest.approx(100 * 10 / 50 + 0 + 100)
    assert found.seconds["restart"] == pytest.approx(300 - found.productive)


def test_a_start_that_left_nothing_is_restart_only_and_damaged_records_are_none(tmp_path):
    nothing = {"begin": 0, "end": 30, "job": "k8s-1"}
    second = {"begin": 40, "clock": 140, "end": 140, "job": "k8s-1", "first": 0, "step": 5, "seconds": {"compute": 100.0}}
    found = made_up(tmp_path, nothing, second)
    assert found.seconds["restart"] == pytest.approx(29 + 10)  # the first second before it claimed the folder is not known
    assert found.seconds["compute"] == pytest.approx(100)
    run = Run(RunSettings(name="r", dir=str(tmp_path)))
    (run.folder / "attempts" / "goodput-0002.json").write_text('{"step": 1')
    assert report(records(run)).steps == 0
    assert report([]).shares() == dict.fromkeys(KINDS, 0.0) and report([]).goodput == 0.0


def test_a_live_run_keeps_records_that_its_next_start_reads(tmp_path, capsys):
    settings = RunSettings(name="r", dir=str(tmp_path))
    run = Run(settings)
    run.begin(1, "a: 1\n")
    share = [None]
    phases = Phases()
    keeper = Goodput(run, phases, first_step=0, communication=lambda: share[0])
    with phases("data"):
        time.sleep(0.05)
    with phases("compute"):
        time.sleep(0.2)
        keeper.write(3, least_seconds=30)  # young enough: left as it is
        assert records(run)[0].last_step == 0
    share[0] = 0.5
    keeper.rewind(6, 4)
    keeper.write(7)
    (record,) = records(run)
    assert (record.first_step, record.last_step, record.redone_steps, record.steps) == (0, 7, 2, 9)
    assert record.communication == 0.5 and 0.05 <= record.seconds["data"] < 0.15
    found = keeper.report()
    assert found.seconds["communication"] == pytest.approx(found.seconds["compute"], rel=0.02)
    assert found.seconds["data"] == pytest.approx(7 / 9 * record.seconds["data"])
    assert found.total >= time.time() - process_started(os.getpid()) - 1  # imports are part of it
    run.end("finished", 0, step=7)
    again = Run(settings)
    again.begin(1, "a: 1\n")  # records are no starts: the next number, and this start is the newest
    again.check_current()
    assert again.attempt.number == 2 and len(again.attempts()) == 2
    Goodput(again, Phases(), first_step=7).write(9)
    assert [(item.first_step, item.last_step) for item in records(again)] == [(0, 7), (7, 9)]
    Goodput(again, Phases(), first_step=7, enabled=False).write(99)  # another rank
    assert records(again)[-1].last_step == 9


def test_a_full_disk_is_said_once_and_no_error(tmp_path, monkeypatch, capsys):
    run = Run(RunSettings(name="r", dir=str(tmp_path)))
    run.begin(1, "a: 1\n")
    keeper = Goodput(run, SimpleNamespace(seconds=dict), first_step=0)

    def full(*paths):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    keeper.write(1)
    keeper.write(2)
    assert capsys.readouterr().out.count("No space left") == 1


def test_a_process_began_when_it_did():
    before = time.time()
    with subprocess.Popen(["sleep", "5"]) as child:
        assert abs(process_started(child.pid) - before) < 0.5
        child.kill()
    assert process_started(2**22 + 1) is None
