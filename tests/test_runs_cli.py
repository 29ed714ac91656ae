"""`tubelet runs` says how runs stand from their files alone: quickly, whatever is in the folders, and as they really are."""

import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from little_run import resumed, trainers
from programs import ROOT, kill, recipe, rows, run, start, wait_for
from run_folders import LOGGED, NOW, age, begin, change, checkpoint, decided, goodput, log, say, submit

from tubelet import files, first_error
from tubelet.program.runs.standing import standing
from tubelet.runs import Run, RunSettings

# ---------------------------------------------------------------------------------------------------------- states


@pytest.mark.parametrize("end, state, note", [
    (("finished", 0, {"step": 100}), "finished", ""),
    (("preempted", 85, {"step": 7}), "saved", "no restart is on record: started without `launch`, the same command goes on"),
    (("preempted", 130, {"step": 7}), "interrupted", ""),
    (("failed", 86, {"error": "SupersededError: taken over"}), "superseded", "SupersededError: taken over"),
    (("failed", 1, {"error": "DataError: shard.tar did not answer\nsecond line"}), "failed",
     "DataError: shard.tar did not answer"),
])
def test_a_start_that_told_how_it_ended_is_in_that_state(tmp_path, end, state, note):
    run = begin(tmp_path)
    run.end(end[0], end[1], **end[2])
    found = standing(run.folder)
    assert (found.state, found.note) == (state, note)


def test_a_start_without_an_end_runs_if_its_process_does_and_is_lost_otherwise(tmp_path):
    run = begin(tmp_path)
    assert standing(run.folder).state == "running"  # this process
    change(run, pid_started="1")  # the number was given to another process since
    assert standing(run.folder).state == "lost"
    gone = subprocess.Popen(["true"])
    gone.wait()
    change(run, pid=gone.pid, pid_started=run.attempt.pid_started)
    found = standing(run.folder)
    assert found.state == "lost" and str(gone.pid) in found.note


def test_a_start_that_could_not_tell_its_end_but_had_an_error_has_failed_with_it(tmp_path):
    run = begin(tmp_path)
    first_error.keep(run.folder, 1, rank=3, code=87, error="error: rank 3 lost the connection to rank 0.\n  Try: again")
    assert standing(run.folder).state == "running"  # it is still leaving
    for host, pid_started in ((run.attempt.host, "1"), ("n3", "1")):
        change(run, host=host, pid_started=pid_started)
        found = standing(run.folder)
        assert found.state == "failed"
        assert found.note == f"rank 3 on {socket.gethostname()}: rank 3 lost the connection to rank 0."


def test_of_a_process_on_another_host_only_the_last_sign_is_known(tmp_path):
    run = begin(tmp_path)
    log(run, 1, 3)
    change(run, host="n3")
    age(run.folder, 120)
    found = standing(run.folder)
    assert (found.state, found.note) == ("running?", "host n3, last sign 2 min ago")
    age(run.folder, 3 * 3600)
    found = standing(run.folder)
    assert (found.state, found.note) == ("lost?", "host n3, last sign 3 h ago")
    files.append_jsonl(run.folder / "metrics.jsonl", [{"step": 4, "time": LOGGED + 3 + 3600}])  # it is used to such pauses
    age(run.folder, 3 * 3600)
    assert standing(run.folder).state == "running?"


def test_a_job_handed_to_a_scheduler_is_queued_until_it_starts_and_again_when_it_is_submitted_anew(tmp_path):
    folder = tmp_path / "r"
    submit(folder, "slurm-7", 300)
    found = standing(folder)
    assert (found.state, found.job, found.note) == ("queued", "slurm-7", "slurm-7 submitted 5 min ago")
    run = begin(tmp_path)
    change(run, job="slurm-7")
    assert standing(folder).state == "running"
    run.end("preempted", 85, step=3)
    assert standing(folder).state == "saved"
    submit(folder, "slurm-7", -1)  # a name that is given again, as Kubernetes has it
    assert standing(folder).state == "queued"
    submit(folder, "slurm-8", -1)
    assert (standing(folder).state, standing(folder).job) == ("queued", "slurm-8")
    decided(folder, 2, job="slurm-8", attempt=0, ago=-2)
    assert standing(folder).state == "failed"
    submit(folder, "slurm-9", -3)
    assert (standing(folder).state, standing(folder).job) == ("queued", "slurm-9")
    submit(folder, "slurm-9", 999)
    run = begin(tmp_path)  # by hand, later
    change(run, time=time.time() + 4)
    run.end("finished", 0)
    assert standing(folder).state == "finished"


@pytest.mark.parametrize("job, launcher, ago, note", [
    ("slurm-7", "slurm", 10, "no restart is on record yet: slurm-7 is about to decide"),
    ("slurm-7", "slurm", 3600, "no restart is on record: slurm-7 was cancelled, or SLURM took its nodes and starts it again "
                               "itself; `squeue -j 7` tells"),
    ("slurm-7", "", 10, "no restart is on record: slurm-7 was not submitted by `launch` from here; `squeue -j 7` tells "
                        "whether it is queued again"),
    ("k8s-default-r", "k8s", 10, "Kubernetes starts k8s-default-r again, unless that was deleted"),
    ("local-n1-4-5", "", 10, "asked to leave, or its time was up: its launcher does not start it again, the same command "
                             "does"),
])
def test_a_start_that_saved_and_left_is_said_to_come_again_only_where_somebody_starts_it(tmp_path, job, launcher, ago, note):
    run = begin(tmp_path)
    change(run, job=job, time=NOW - ago - 100)
    if launcher:
        submit(run.folder, job, ago + 200, launcher)
    run.end("preempted", 85, step=3)
    files.write_json(run.folder / "attempts" / "0001.end.json", {"how": "preempted", "code": 85, "time": time.time() - ago})
    assert (standing(run.folder).state, standing(run.folder).note) == ("saved", note)


@pytest.mark.parametrize("end, code, settings, state", [
    (("preempted", 85, {"step": 3}), 85, {}, "queued"),
    (("failed", 87, {"error": "rank 1 was lost"}), 87, {}, "queued"),  # for the whole of the time in the queue
    (None, 137, {}, "queued"),  # SIGKILL
    (("preempted", 85, {"step": 3}), 85, {"max_without_progress": 0}, "stopped"),
    (("failed", 87, {"error": "rank 1 was lost"}), 87, {"on_failure": False}, "stopped"),
    (None, 137, {"on_failure": False}, "stopped"),
    (None, 1, {}, "failed"),
])
def test_an_ended_run_stands_as_its_launcher_has_decided(tmp_path, capsys, end, code, settings, state):
    run = begin(tmp_path)
    submit(run.folder, "slurm-7", 9999)
    change(run, job="slurm-7", host="n3", time=NOW - 9000)
    if end:
        run.end(*end[:2], **end[2])
    said = decided(run.folder, code, ago=7200, **settings)
    found = standing(run.folder)
    assert (found.state, found.job) == (state, "slurm-7")
    assert found.note == (f"slurm-7 again, since 2 h: {said}" if state == "queued" else said)
    assert say("show", run.folder) == 0  # the run waits; its start has ended as it did
    shown = capsys.readouterr().out
    assert f"{state}: {found.note}" in shown and (f"{end[0]} at step 3" if end and end[0] == "preempted" else
                                                  "failed (exit code 87)" if end else "killed: left no word") in shown
    begin(tmp_path)
    assert standing(run.folder).state == "running"  # and what was decided before is no more


def test_a_run_says_more_of_its_own_end_than_its_launcher_knows(tmp_path):
    for number, (how, code, details, state) in enumerate([
            ("failed", 1, {"error": "DataError: no shard"}, "failed"), ("preempted", 130, {}, "interrupted"),
            ("failed", 86, {"error": "SupersededError: taken over"}, "superseded"),
            ("finished", 0, {"step": 100}, "finished")]):
        run = begin(tmp_path, f"r{number}")
        run.end(how, code, **details)
        decided(run.folder, code)
        assert (standing(run.folder).state, standing(run.folder).note) == (state, details.get("error", ""))


def test_starts_that_never_claimed_the_folder_count_too(tmp_path):
    folder = tmp_path / "r"
    submit(folder, "slurm-7", 500)
    said = decided(folder, 137, attempt=0, ago=300)
    assert (standing(folder).state, standing(folder).note) == ("queued", f"slurm-7 again, since 5 min: {said}")
    said = decided(folder, 137, attempt=0, max_without_progress=1)
    assert (standing(folder).state, standing(folder).note) == ("stopped", said)
    assert say("show", folder) == 0
    run = begin(tmp_path)
    change(run, job="slurm-8", host="n3")
    assert standing(folder).state == "running?"
    decided(folder, 1, job="slurm-9", attempt=0, ago=-1)  # refused, since another job has the run
    assert standing(folder).state == "running?"
    said = decided(folder, 1, job="slurm-8", attempt=0, ago=-2)  # the next start of that job: the one before is over
    assert (standing(folder).state, standing(folder).note) == ("failed", said)


def test_a_launcher_without_a_queue_has_given_up_once_it_has_gone(tmp_path):
    for job, wait in (("local-n1-4-5", 900), ("hostfile-n1-4-5", 9)):
        run = begin(tmp_path, job)
        change(run, job=job)
        run.end("failed", 87, error="rank 1 was lost")
        submit(run.folder, job, 99, "hostfile") if job.startswith("hostfile") else None
        decided(run.folder, 87, job=job)
        assert standing(run.folder).state == "queued"
        decided(run.folder, 87, job=job, ago=3000)
        assert standing(run.folder).state == ("queued" if job.startswith("hostfile-") else "stopped")  # it asks its hosts
        (run.folder / "launch" / "submitted.json").unlink(missing_ok=True)
        decided(run.folder, 87, job=job, ago=wait)
        found = standing(run.folder)
        assert found.state == "stopped" and "has gone without having done so" in found.note


# -------------------------------------------------------------------------------------------------------- the list


def test_the_list_says_how_far_each_run_is(tmp_path, capsys):
    run = begin(tmp_path, "vit_a")
    log(run, 1, 40, loss=1.25)
    checkpoint(run.folder, 30)
    os.utime(run.folder / "step-00000030" / "manifest.json", (time.time() - 3000,) * 2)
    (run.folder / "step-00000040").mkdir()  # a save in progress is none yet
    goodput(run, 1, 0, 40)
    other = begin(tmp_path, "vit_b", "epochs: 30\nglobal_batch_size: 16\ntotal_steps: null\n")
    log(other, 1, 5, loss=float("nan"))
    other.end("failed", 1, error="ValueError: no")
    change(other, time=NOW - 9999)
    (tmp_path / "a foreign folder").mkdir()
    (tmp_path / "vit_a.replaced-1" / "attempts").mkdir(parents=True)
    assert say(tmp_path) == 0
    title, head, first, second, *rest = capsys.readouterr().out.splitlines()
    assert title == f"2 runs in {tmp_path}"
    assert head.split() == ["run", "state", "step", "%", "loss", "images/s", "ETA", "checkpoint", "restarts", "goodput"]
    assert re.split(r"  +", first.strip()) == ["vit_a", "running", "40/100", "40", "1.2500", "40.0", "00:00:30",
                                               "30, 50 min ago", "0", "80 %"]  # 60 steps of half a second are left
    assert re.split(r"  +", second.strip()) == ["vit_b", "failed", "5/300", "2", "nan", "40.0", "none", "0"]
    assert rest == ["  vit_b failed: ValueError: no", "1 replaced run not shown (--all)"]
    assert say(tmp_path, "--json", "--filter", "*_b") == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["loss"] is None and row["total_steps"] == 300 and row["state"] == "failed" and row["checkpoint"] is None


def test_restarts_that_followed_a_start_without_a_new_checkpoint_are_counted(tmp_path):
    for number, steps in enumerate([(0, 12), (10, 14), (10, 11), None, (10, 25), (20, 22)], 1):
        run = begin(tmp_path)  # the second, third and fourth start saved nothing new; the fourth died while starting
        if steps:
            goodput(run, number, *steps)
    checkpoint(run.folder, 20)
    found = standing(run.folder)
    assert (found.restarts, found.without_progress) == (5, 3)


def test_order_and_choice(tmp_path, capsys):
    for number, name in enumerate(("b", "c", "a")):
        run = begin(tmp_path, name)
        log(run, 1, 1 + number, loss=3.0 - number)
        change(run, time=NOW + number)
    begin(tmp_path, "c").end("finished", 0)
    change(Run(RunSettings(name="c", dir=str(tmp_path))), 2, time=NOW + 1)

    log(begin(tmp_path, "d"), 1, 1, loss=float("nan"))
    change(Run(RunSettings(name="d", dir=str(tmp_path))), 1, time=NOW - 1)

    def names(*words):
        assert say(tmp_path, "--json", *words) == 0
        return [row["name"] for row in json.loads(capsys.readouterr().out)]

    assert names() == ["a", "c", "b", "d"] and names("--sort", "name") == ["a", "b", "c", "d"]
    assert names("--sort", "loss") == ["a", "c", "b", "d"] and names("--sort", "step") == ["a", "c", "b", "d"]
    assert names("--state", "finished") == ["c"] and names("--filter", "[ab]") == ["a", "b"]


def test_a_list_of_long_runs_reads_their_ends_only_and_imports_no_torch(tmp_path):
    for number in range(20):
        run = begin(tmp_path, f"r{number}")
        with open(run.folder / "metrics.jsonl", "wb") as file:
            file.truncate(1 << 40)  # nobody can read so much
        with open(run.folder / "metrics.jsonl", "ab") as file:
            file.write(b"\n")
        log(run, 1, 60, more="x" * 2000)
    code = ("import sys; from tubelet.program.runs.cli import app; from tubelet.console import run_app\n"
            f"assert run_app(app, [{str(tmp_path)!r}], 'x') == 0\n"
            f"assert run_app(app, ['show', {str(tmp_path / 'small')!r}], 'x') == 0\n"
            "print('HEAVY', sorted({'torch', 'numpy', 'timm', 'deepspeed', 'matplotlib'} & set(sys.modules)))")
    small = begin(tmp_path, "small", (ROOT / "configs/pretrain/vit_b16_i21k.yaml").read_text())
    log(small, 1, 3)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert "HEAVY []" in done.stdout and "60/100" in done.stdout, done.stdout + done.stderr


def test_what_a_kill_cut_and_what_others_wrote_hides_nothing(tmp_path, capsys):
    run = begin(tmp_path, "good")
    log(run, 1, 5)
    with open(run.folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "train/lo')  # and the next start's row on the same line
    log(run, 7, 7)
    with open(run.folder / "metrics.jsonl", "a") as file:
        file.write('[1]\n"text"\n{"step": "eight", "train/loss": "x"}\n{"step": 9, "train/loss": 1')
    cut = begin(tmp_path, "cut")
    (cut.folder / "attempts" / "0001.json").write_text('{"number": 1, "host"')
    (cut.folder / "config.yaml").write_text("a: [")
    (cut.folder / "events.jsonl").write_text("{")
    (cut.folder / "launch").mkdir()
    (cut.folder / "launch" / "submitted.json").write_text("")
    damaged = begin(tmp_path, "damaged")
    (checkpoint(damaged.folder, 3) / "rank-00000.safetensors").write_bytes(b"x")
    half = begin(tmp_path, "half")
    (checkpoint(half.folder, 3) / "manifest.json").write_text('{"step": 3, "fil')
    (half.folder / "attempts" / "0001.end.json").write_text("")
    assert say(tmp_path, "--json") == 0
    found = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert found["good"]["state"] == "running" and found["good"]["step"] == 5
    assert found["cut"]["state"] == "running?"  # nobody knows whose it is, and its files changed lately
    assert "cut short" in found["damaged"]["checkpoint"]["problem"]
    assert "manifest.json is damaged" in found["half"]["checkpoint"]["problem"] and found["half"]["state"] == "lost"
    for name in found:
        assert say("show", tmp_path / name) == 0 and say("tail", tmp_path / name) == 0, name
    assert say("compare", *(tmp_path / name for name in found), "--no-picture") == 0


def test_runs_of_others_that_may_not_be_read_are_named_and_hide_nothing():
    with tempfile.TemporaryDirectory() as above:  # not tmp_path, whose parents nobody else may enter
        os.chmod(above, 0o755)
        log(begin(above, "mine"), 1, 3)
        begin(above, "closed")
        part = begin(above, "part")
        log(part, 1, 3)
        subprocess.run(["chmod", "-R", "a+rX", above], check=True)
        os.chmod(Path(above, "closed"), 0)
        os.chmod(part.folder / "metrics.jsonl", 0)
        code = ("import os, sys; from tubelet.program.runs.cli import app; from tubelet.console import run_app\n"
                "if os.getuid() == 0:\n"
                f"    {_warm()}\n"
                "    os.setgid(65534), os.setuid(65534)\n"
                f"above = {above!r}\n"
                "print([run_app(app, words, 'x') for words in ([above], ['show', above + '/closed'], ['show', above + "
                "'/part'], ['tail', above + '/part'], ['compare', above + '/part', above + '/mine', '--no-picture'])])")
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT)
        os.chmod(Path(above, "closed"), 0o755)
    assert "[0, 1, 1, 1, 1]" in done.stdout, done.stdout + done.stderr
    assert done.stderr.count("may not be read by this user") == 4 and "Traceback" not in done.stderr
    assert re.search(r"closed +no access", done.stdout) and re.search(r"part +no access", done.stdout)
    assert re.search(r"mine +running +3/100", done.stdout)


def _warm():
    """Import what the commands need: the interpreter may lie where only root can read."""
    modules = ("listing", "page", "tail", "compare", "picture", "standing", "chosen")
    settings = "import pretrain.settings, finetune.settings, encodings.idna"
    return f"{settings}; from tubelet.program.runs import {', '.join(modules)}"


def test_mistakes_are_answered_with_the_next_step(tmp_path, capsys):
    begin(tmp_path / "runs", "vit_large"), begin(tmp_path / "runs", "vit_small")
    (tmp_path / "empty").mkdir()
    runs = tmp_path / "runs"
    for words, problem, hint in [
        ([tmp_path / "none"], "There is no folder", "tubelet runs DIR"),
        (["shwo"], "There is no folder shwo", "`tubelet runs show ...`"),
        ([tmp_path / "empty"], "holds no run", "tubelet pretrain CONFIG"),
        ([runs, "--filter", "vit_lrge"], "None of the 2 runs", "vit_large"),
        ([runs, "--state", "runing"], "`--state runing`", "running"),
        ([runs, "--sort", "los"], "`--sort los`", "loss"),
        ([runs, "--state", "finished"], "None of the 2 runs", "without --state"),
        (["show", runs], "is no run, but a folder with 2 runs in it", f"`tubelet runs {runs}`"),
        (["show", runs / "vit_larg"], "there is no such folder", f"{runs}/vit_large"),
        (["tail", tmp_path / "empty"], "neither attempts/ nor", "tubelet runs DIR"),
        (["compare", runs / "vit_large"], "needs two", "tubelet runs compare"),
        (["compare", runs / "vit_large", runs / "vit_large"], "named twice", "different runs"),
        (["compare", runs / "vit_large", runs / "vit_small", "--metric", "train/los"], "`train/los`", "have logged"),
        (["compare", runs / "vit_large", runs / "vit_small", "--by", "day"], "`--by day`", "--by step"),
    ]:
        assert say(*words) == 1, words
        error = capsys.readouterr().err
        assert problem in error and hint in error.partition("Try: ")[2], (words, error)


# ------------------------------------------------------------------------------------------------------ a real run


def test_what_the_trainer_writes_is_read_as_it_is_meant(tmp_path, one_thread, capsys, monkeypatch):
    monkeypatch.setattr("tubelet.runs._git", lambda *words: "")  # somebody may commit between the two starts
    with trainers(tmp_path, name="r") as make:
        make(total_steps=4).fit()
        make(total_steps=6, beginning=resumed(tmp_path / "r")).fit()
    capsys.readouterr()
    found = standing(tmp_path / "r")
    assert (found.state, found.step, found.total_steps, found.restarts, found.without_progress) == ("finished", 6, 6, 1, 0)
    assert found.checkpoint.step == 6 and not found.checkpoint.problem and 0 < found.goodput < 1 and found.rate > 0
    assert say("tail", tmp_path / "r", "-n", 100) == 0
    lines = [line[16:] for line in capsys.readouterr().out.splitlines()]
    kinds = [line.split("  ")[0].split(" (")[0].split(", ")[0] for line in lines if "checkpoint" not in line]
    assert [kind.split(" on ")[0] for kind in kinds] == [
        "start 1", *(f"step {step}" for step in range(1, 5)), "start 1 finished at step 4",
        "start 2", "resumed at step 4", "step 5", "step 6", "start 2 finished at step 6"]


def test_a_real_run_is_seen_running_killed_resumed_and_finished(tmp_path):
    config, folder = recipe(tmp_path, steps=12)
    follower = None
    job = start("pretrain", config, "total_steps=2000", "save_every=4")
    try:
        wait_for(lambda: any(row["step"] >= 6 for row in rows(folder / "metrics.jsonl"))
                 and list(folder.glob("step-*/manifest.json")), job)
        assert standing(folder).state == "running"
        follower = subprocess.Popen([sys.executable, "-m", "tubelet.cli", "runs", "tail", str(folder), "-n", "2", "-f"],
                                    stdout=subprocess.PIPE, text=True, cwd=ROOT)
        follower.stdout.readline()
        kill(job)
        found = standing(folder)
        assert found.state == "lost" and found.total_steps == 2000 and found.checkpoint.step >= 4
        steps = found.checkpoint.step + 8
        run("pretrain", config, f"total_steps={steps}", "save_every=4")
        text, _ = follower.communicate(timeout=120)
    finally:
        kill(job)
        if follower and follower.poll() is None:
            follower.kill()
    found = standing(folder)
    assert (found.state, found.step, found.total_steps, found.restarts) == ("finished", steps, steps, 1)
    assert found.checkpoint.problem == "" and found.host == socket.gethostname() and 0 < found.goodput < 1
    assert f"resumed at step {steps - 8}, " in text and f"step {steps}/{steps}  loss" in text
    assert text.rstrip().endswith(f"start 2 finished at step {steps} (exit code 0)")
