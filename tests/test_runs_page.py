"""`tubelet runs show`, `tail` and `compare`: a run on a page, its lines as they come, several runs side by side."""

import json
import re
import sys
import threading
import time

import pytest
from PIL import Image
from programs import ROOT
from run_folders import LOGGED, begin, checkpoint, goodput, log, say

from tubelet import files
from tubelet.config import load, parse_yaml
from tubelet.program.runs import picture, reading
from tubelet.program.runs.chosen import chosen, different
from tubelet.program.runs.picture import Drawn
from tubelet.program.runs.standing import SETTINGS, standing
from tubelet.program.runs.tail import Follower, tail
from tubelet.program.settings import Command, load_command

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


def test_the_last_checkpoint_in_a_store_is_found_however_many_rows_were_logged_since(tmp_path):
    run = begin(tmp_path, config="total_steps: 9999\ncheckpoint:\n  dir: s3://bucket/r\n")
    path = run.folder / "metrics.jsonl"
    for step in (1000, 2000):
        files.append_jsonl(path, [{"step": step, "time": 1.0, "ckpt/stall_seconds": 0.1}])
        log(run, step + 1, step + 500, filler="x" * 500)
        files.append_jsonl(path, [{"step": step + 500, "time": float(step), "ckpt/save_seconds": 99.0}])
        log(run, step + 501, step + 999, filler="x" * 500)
    assert path.stat().st_size > 1 << 20
    found = standing(run.folder)
    assert (found.step, found.checkpoint.step, found.checkpoint.time) == (2999, 2000, 2000.0)
    files.keep_jsonl(path, 2000)  # the next start goes on from 2000: the row that told of its publication is dropped
    assert standing(run.folder).checkpoint.step == 1000
    run.event("resume", step=2000, folder="s3://bucket/r/step-00002000")
    log(run, 2001, 2040)
    assert (standing(run.folder).checkpoint.step, standing(run.folder).checkpoint.time) == (2000, 1.0)
    path.unlink()
    log(run, 2001, 2040)
    assert standing(run.folder).checkpoint.step == 2000
    run.event("fork", step=3000, folder="elsewhere/step-00003000")  # another run's
    assert standing(run.folder).checkpoint.step == 2000
    with open(path, "wb") as file:
        file.truncate(1 << 40)  # nobody can read so much
    log(run, 2041, 2050)
    assert standing(run.folder).checkpoint.step == 2000


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*/*.yaml")), ids=lambda path: path.stem)
def test_settings_that_differ_from_the_defaults_are_those_that_make_the_run(path, tmp_path):
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
        log(run, step, step, time=LOGGED + 1000 + step)
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
    assert picture._range([points], every=True) == (1.0, 1e6)
