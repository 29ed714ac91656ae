"""`tubelet runs` says how runs stand from their files alone: quickly, whatever is in the folders, and as they really are."""

import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
from PIL import Image
from programs import ROOT, kill, recipe, rows, run, start, wait_for

from tubelet import files
from tubelet.config import load, parse_yaml
from tubelet.console import run_app
from tubelet.program.runs import picture, reading
from tubelet.program.runs.chosen import chosen, different
from tubelet.program.runs.cli import app
from tubelet.program.runs.picture import Drawn
from tubelet.program.runs.standing import SETTINGS, standing
from tubelet.program.runs.tail import Follower, tail
from tubelet.program.settings import Command, load_command
from tubelet.runs import Run, RunSettings

NOW = time.time()


def say(*words):
    """Run `tubelet runs WORDS` in this process; returns its exit code."""
    return run_app(app, [str(word) for word in words], "tubelet runs")


def begin(above, name="r", config="total_steps: 100\n"):
    """A start of a run by this process, by the code that real runs use."""
    run = Run(RunSettings(name=name, dir=str(above), take_over=True))
    run.begin(2, config)
    return run


def change(run, number=None, **fields):
    path = run.folder / "attempts" / f"{number or run.attempt.number:04d}.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def age(folder, seconds):
    for path in folder.rglob("*"):
        os.utime(path, (NOW - seconds, NOW - seconds))


def log(run, first, last, loss=2.0, every=1, **more):
    files.append_jsonl(run.folder / "metrics.jsonl", [
        {"step": step, "time": NOW + step, "train/loss": loss, "perf/samples_per_sec": 40.0, "perf/step_time": 0.5,
         "samples_seen": 16.0 * step, "train/epoch": 16 * step / 160, **more} for step in range(first, last + 1, every)])


def checkpoint(place, step, **manifest):
    folder = place / f"step-{step:08d}"
    folder.mkdir(parents=True)
    (folder / "rank-00000.safetensors").write_bytes(b"x" * 64)
    files.write_json(folder / "manifest.json", {
        "step": step, "files": {"rank-00000.safetensors": {"bytes": 64, "sha256": "0" * 64}},
        "versions": {"torch": "2.15.0"}, **manifest})
    return folder


def goodput(run, number, first, last, compute=80.0):
    files.write_json(run.folder / "attempts" / f"goodput-{number:04d}.json", {
        "time": NOW + 100, "process_started": NOW, "first_step": first, "step": last, "redone_steps": 0,
        "seconds": {"compute": compute, "data": 100.0 - compute}, "communication_share": 0.0})


# ---------------------------------------------------------------------------------------------------------- states


@pytest.mark.parametrize("end, state, note", [
    (("finished", 0, {"step": 100}), "finished", ""),
    (("preempted", 85, {"step": 7}), "waiting", ""),
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
    files.append_jsonl(run.folder / "metrics.jsonl", [{"step": 4, "time": NOW + 3 + 3600}])  # it is used to such pauses
    age(run.folder, 3 * 3600)
    assert standing(run.folder).state == "running?"


def test_a_job_handed_to_a_scheduler_is_queued_until_it_starts_and_again_when_it_is_submitted_anew(tmp_path):
    folder = tmp_path / "r"
    (folder / "launch").mkdir(parents=True)

    def submit(job, at):
        files.write_json(folder / "launch" / "submitted.json", {"job": job, "time": at, "launcher": "slurm"})

    submit("slurm-7", time.time() - 300)
    found = standing(folder)
    assert (found.state, found.job, found.note) == ("queued", "slurm-7", "slurm-7 submitted 5 min ago")
    run = begin(tmp_path)
    change(run, job="slurm-7")
    assert standing(folder).state == "running"
    run.end("preempted", 85, step=3)
    assert (standing(folder).state, standing(folder).note) == ("waiting", "slurm-7 starts it again")
    submit("slurm-8", time.time() + 1)
    assert (standing(folder).state, standing(folder).job) == ("queued", "slurm-8")
    submit("slurm-8", time.time() - 999)
    begin(tmp_path).end("finished", 0)  # by hand, later
    assert standing(folder).state == "finished"


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


# --------------------------------------------------------------------------------------------------------- one run


def test_a_run_by_its_name_is_looked_for_in_runs(tmp_path, monkeypatch, capsys):
    begin(tmp_path / "runs", "named")
    monkeypatch.chdir(tmp_path)
    assert say("show", "named") == 0 and say("show", "runs/named") == 0 and say() == 0
    assert "named" in capsys.readouterr().out


def test_the_page_of_a_run_says_what_happened_to_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/x/pretrain/__main__.py", "c.yaml", "data.train=https://me:word@host/a.tar"])
    loaded = load_command(_pretrain(), Command("configs/pretrain/vit_b16_i21k.yaml", ["optimizer.lr=0.123", "ema=null"]))
    first = begin(tmp_path, config=loaded.as_yaml())
    log(first, 1, 20, every=5)
    files.append_jsonl(first.folder / "metrics.jsonl", [{"step": 10, "val/acc1": 60.5, "val/loss": 3.0},
                                                        {"step": 20, "val/acc1": 55.0, "val/loss": 2.0}])
    first.event("skipped", step=7, samples=[112, 128], ranks_with_bad_loss=[1], what="loss", keys=["a.tar:k1", "a.tar:k2"])
    first.event("rollback", reason="the loss spiked", folder="x", steps_lost=3, set_aside=[], step=5, seen=80, to=144)
    first.event("of a later version", answer=42)
    begin(tmp_path).event("settings_changed", changes=["optimizer.lr: 0.1 -> 0.123"])
    run = begin(tmp_path, config=loaded.as_yaml())
    run.end("failed", 1, error="DataError: https://me:word@host/a.tar did not answer")
    goodput(run, 3, 0, 20)
    checkpoint(run.folder, 10), checkpoint(run.folder, 20)
    (run.folder / "step-00000030").mkdir()
    files.write_json(run.folder / "best.json", {"folder": "step-00000010", "step": 10, "metric": "val/acc1", "value": 60.5})
    assert say("show", run.folder) == 0
    text = capsys.readouterr().out
    for said in (
            "failed: DataError: https://***@host/a.tar did not answer", "python -m pretrain c.yaml", "went back to step 5",
            "step 7 was skipped: its loss is not finite on rank 1; a.tar:k1, a.tar:k2", "of a later version: answer=42",
            "settings changed: optimizer.lr: 0.1 -> 0.123", "torch 2.15.0", "2 start(s) left no record of their end",
            "1 update(s) skipped", "saves that never finished: step-00000030"):
        assert said in text, (said, text)
    for said in (
            r"optimizer\.lr +0\.123 ", r"\n  1 +.*killed: left no word", r"\n  3 +.*failed \(exit code 1\): DataError",
            r"step-00000010 +.*the best: val/acc1 60\.5000", r"step-00000030 +never finished", r"goodput +80\.0 %",
            r"val/acc1 +55\.0000 +20 +60\.5000 +10\n", r"val/loss +2\.0000 +20 +2\.0000 +20\n"):
        assert re.search(said, text), (said, text)
    assert "word" not in text.replace("left no word", "")
    assert "global_batch_size" in text and "schedule.final_lr" not in text.replace("schedule.final_lr  1", "")
    assert say("show", run.folder, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["settings"]["optimizer.lr"] == 0.123 and found["results"]["val/acc1"] == {
        "step": 20, "latest": 55.0, "best": 60.5}
    assert [item["end"]["state"] for item in found["attempts"]] == ["killed", "killed", "failed"]
    assert "me:word" not in json.dumps(found)


def _pretrain():
    from pretrain.settings import PretrainSettings

    return PretrainSettings


def test_checkpoints_kept_elsewhere_are_found_there_or_by_the_log(tmp_path):
    run = begin(tmp_path, config=f"total_steps: 100\ncheckpoint:\n  dir: {tmp_path / 'kept'}\n")
    checkpoint(tmp_path / "kept", 60)
    found = standing(run.folder)
    assert found.checkpoint.step == 60 and found.place == str(tmp_path / "kept")
    far = begin(tmp_path, "far", "total_steps: 100\ncheckpoint:\n  dir: s3://bucket/far  # command line\n")
    files.append_jsonl(far.folder / "metrics.jsonl", [
        {"step": 40, "time": 1.0, "ckpt/stall_seconds": 0.1}, {"step": 42, "time": 2.0, "ckpt/save_seconds": 3.0},
        {"step": 60, "time": 3.0, "ckpt/stall_seconds": 0.1}])  # 60 is being written
    found = standing(far.folder)
    assert (found.checkpoint.step, found.checkpoint.time, found.place) == (40, 2.0, "s3://bucket/far")


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda path: path.stem)
def test_settings_that_differ_from_the_defaults_are_those_that_make_the_run(path, tmp_path):
    if path.stem == "tiny":
        return
    from finetune.settings import FinetuneSettings
    cls = FinetuneSettings if path.parent.name == "finetune" else _pretrain()
    loaded = load(cls, path, ["run.name=x"])
    text = loaded.as_yaml()
    (tmp_path / "config.yaml").write_text(text)
    whole = parse_yaml(text)
    assert reading.some_settings(tmp_path / "config.yaml", SETTINGS) == {key: whole[key] for key in SETTINGS}
    data = {"run": {"name": "x"}}
    for key, value, _ in chosen(whole):  # these alone must give the same settings
        *parents, leaf = key.split(".")
        place = data
        for parent in parents:
            place = place.setdefault(parent, {})
        place[leaf] = value
    assert not any(key.endswith((".label", ".weight", ".storage")) for key, *_ in chosen(whole))  # of entries of lists too
    assert cls.model_validate(_listed(data)).model_dump(mode="json", exclude={"run"}) == loaded.settings.model_dump(
        mode="json", exclude={"run"})


def _listed(value):
    """{"0": a, "1": b} -> [a, b]."""
    if not isinstance(value, dict):
        return value
    if value and all(key.isdigit() for key in value):
        return [_listed(item) for item in value.values()]
    return {key: _listed(item) for key, item in value.items()}


# ------------------------------------------------------------------------------------------------------------ tail


def test_log_lines_and_events_come_in_the_order_they_were_written(tmp_path, capsys):
    run = begin(tmp_path)
    base = json.loads((run.folder / "events.jsonl").read_text())
    moment = reading.time_of(base)
    event = {"event": "skipped", "step": 2, "what": "loss", "keys": [], "at": time.strftime(
        "%Y-%m-%dT%H:%M:%S", time.localtime(moment + 2)) + ".500" + base["at"][-6:]}
    files.append_jsonl(run.folder / "events.jsonl", [event])
    fraction = moment % 1
    for step in (1, 2, 3):
        files.append_jsonl(run.folder / "metrics.jsonl", [
            {"step": step, "time": moment - fraction + step, "train/loss": 1.5, "train/lr": 1e-3},
            {"step": step, "time": moment - fraction + step, "goodput/data_pct": 3.0}])
    files.append_jsonl(run.folder / "metrics.jsonl", [{"step": 3, "time": moment + 4, "val/acc1": 12.0}])
    assert say("tail", run.folder) == 0
    lines = [line[16:] for line in capsys.readouterr().out.splitlines()]
    assert [line.split("  ")[0] for line in lines[1:]] == [
        "step 1/100", "step 2/100", "step 2 was skipped: its loss is not finite", "step 3/100", "step 3"]
    assert lines[1] == "step 1/100  loss 1.5000  lr 1.00e-03" and lines[-1] == "step 3  val/acc1 12.0000"
    assert say("tail", run.folder, "-n", 2) == 0
    assert [line[16:].split("  ")[0] for line in capsys.readouterr().out.splitlines()] == ["step 3/100", "step 3"]


def test_following_goes_over_restarts_and_repeats_and_misses_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("tubelet.program.runs.tail.POLL_SECONDS", 0.01)
    run = begin(tmp_path)
    path = run.folder / "metrics.jsonl"
    log(run, 1, 30)
    last, following = tail(run.folder, 3)
    assert [line.split("  ")[1] for line in last] == ["step 28/100", "step 29/100", "step 30/100"]
    found, ready = [], threading.Event()

    def listen():
        for lines in following():
            found.extend(line.split("  ")[1] for line in lines)
            ready.set()

    listener = threading.Thread(target=listen, daemon=True)
    listener.start()

    def wait(count):
        deadline = time.time() + 60
        while len(found) < count:
            assert time.time() < deadline, found
            ready.wait(0.05)

    log(run, 31, 40)
    with open(path, "a") as file:
        file.write('{"step": 41, "time"')  # the kill
        file.flush()
        wait(10)
    files.keep_jsonl(path, 35)  # the next start: rows above its checkpoint go, in a file of its own
    for step in range(36, 51):
        log(run, step, step, time=NOW + 1000 + step)
    run.event("settings_changed", changes=["a: 1 -> 2"])
    wait(26)
    files.keep_jsonl(path, 45)
    run.end("finished", 0, step=50)
    listener.join(60)
    assert not listener.is_alive()
    expected = [f"step {step}/100" for step in [*range(31, 41), *range(36, 51)]]
    assert [word for word in found if word.startswith("step ")] == expected
    assert found[-1].startswith("start 1 finished") and len(found) == len(expected) + 2


def test_a_row_that_is_written_in_two_pieces_is_one_row(tmp_path):
    path = tmp_path / "metrics.jsonl"
    follower = Follower(path, reading.read_tail(path))
    assert follower.read() == []  # no such file yet
    for piece, expected in [('{"step": 1}\n{"st', [{"step": 1}]), ('ep": ', []), ('2}\n', [{"step": 2}])]:
        with open(path, "a") as file:
            file.write(piece)
        assert follower.read() == expected


# --------------------------------------------------------------------------------------------------------- compare


def test_a_comparison_names_every_setting_that_differs_and_how_a_resume_takes_it():
    from finetune.settings import FinetuneSettings

    path, base = ROOT / "configs/finetune/digits.yaml", ["run.name=x"]

    def config(cls, file, *words):
        return load(cls, file, [*base, *words]).settings.model_dump(mode="json")

    a = config(FinetuneSettings, path, "optimizer.lr=1e-3", "ema=null", "data.workers=1", "run.dir=elsewhere")
    b = config(FinetuneSettings, path, "optimizer.lr=2e-3", "ema={decay: 0.5}", "data.workers=2", "model.img_size=96")
    assert different([a, a]) == []
    found = {key: (kind, values) for key, kind, values in different([a, b])}
    assert found == {"optimizer.lr": ("recorded", [1e-3, 2e-3]), "data.workers": ("free", [1, 2]),
                     "model.img_size": ("fixed", [64, 96]), "ema.decay": ("recorded", [None, 0.5]),
                     "ema.warmup": ("recorded", [None, False])}
    del b["log_every"]  # a file of an earlier version
    assert ("log_every" in {key for key, _, _ in different([a, b])}) == (a["log_every"] != 50)


def test_compared_results_and_curves(tmp_path, capsys):
    for number, name in enumerate(("low", "high")):
        run = begin(tmp_path, name, f"total_steps: 200\nglobal_batch_size: 16\noptimizer: {{lr: {number + 1}}}\n")
        log(run, 1, 100 + 50 * number, loss=1.0 + number)
        files.append_jsonl(run.folder / "metrics.jsonl", [{"step": 50, "val/acc1": 30.0 + number},
                                                          {"step": 100, "val/acc1": 20.0}])
        checkpoint(run.folder, 50, versions={"torch": f"2.1{number}"})
    out = tmp_path / "c.png"
    assert say("compare", tmp_path / "low", tmp_path / "high", "--out", out) == 0
    text = capsys.readouterr().out
    for said in (r"optimizer\.lr +recorded +1 +2\n", r"training loss at step 100 +1\.0000 +2\.0000",
                 r"val/acc1, best +30\.0000 at step 50 +31\.0000 at step 50", r"torch +2\.10 +2\.11",
                 "curves of train/loss, val/acc1, perf/samples_per_sec"):
        assert re.search(said, text), (said, text)
    picture_ = Image.open(out).convert("RGB")
    assert min(picture_.size) > 300
    colours = {colour for _, colour in picture_.getcolors(1 << 24)}
    assert {(0x1f, 0x6f, 0xb4), (0xd1, 0x60, 0x3d)} <= colours  # a line for each run
    assert not list(tmp_path.glob(".*tmp"))
    assert say("compare", tmp_path / "low", tmp_path / "high", "--out", tmp_path / "no" / "c.png") == 1
    assert "cannot be written" in capsys.readouterr().err


def test_curves_over_steps_samples_and_hours():
    lines = [{"step": 10, "train/loss": 1.0, "samples_seen": 160.0, "perf/step_time": 36.0},
             {"step": 10, "val/loss": 5.0}, {"step": 20, "train/loss": float("nan"), "perf/step_time": 36.0},
             {"step": 30, "train/loss": 2.0, "samples_seen": 480.0, "perf/step_time": 72.0}]
    run = Drawn("r", lines, 16)
    assert run.points("train/loss", "step") == [(10, 1.0), (30, 2.0)]
    assert run.points("train/loss", "samples") == [(160, 1.0), (480, 2.0)]
    assert run.points("train/loss", "time") == [(pytest.approx(0.1), 1.0), (pytest.approx(0.4), 2.0)]
    assert run.points("val/loss", "samples") == [(160, 5.0)] and run.points("val/loss", "time")[0][0] == pytest.approx(0.1)


def test_without_matplotlib_the_tables_are_there_and_the_picture_is_an_error(tmp_path, monkeypatch, capsys):
    for name in ("a", "b"):
        log(begin(tmp_path, name), 1, 9)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert say("compare", tmp_path / "a", tmp_path / "b", "--out", tmp_path / "c.png") == 1
    said = capsys.readouterr()
    assert "training loss, last" in said.out and "pip install 'tubelet[demo]'" in said.err
    assert say("compare", tmp_path / "a", tmp_path / "b", "--no-picture") == 0 and not (tmp_path / "c.png").exists()


def test_one_rare_spike_presses_no_curve_flat(tmp_path):
    points = [(float(step), 1.0 + step / 1000) for step in range(1000)]
    points[500] = (500.0, 1e6)
    assert picture._range([points, [(0.0, 3.0)]]) == (pytest.approx(1.005), 3.0)


# ------------------------------------------------------------------------------------------------------ a real run


def test_a_real_run_is_seen_running_killed_resumed_and_finished(tmp_path):
    config, folder = recipe(tmp_path, steps=12)
    follower = None
    job = start("pretrain", config, "total_steps=2000", "save_every=4")
    try:
        wait_for(lambda: any(row["step"] >= 6 for row in rows(folder / "metrics.jsonl")), job)
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
