"""What goes wrong says so: the thing, the rule, the values and what to try, on one rank, without a hang, losing nothing."""

import json
import os
import shutil
import socket
import subprocess
import tarfile
import time
from types import SimpleNamespace

import pytest
from programs import kill, recipe, rows, run, start, wait_for

from data_pipelines.settings import DataSettings
from tubelet import dist
from tubelet.engine.settings import EngineSettings
from tubelet.program.train import impatient


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def program(capsys):
    """Run a program inside this process; returns (exit code, what it printed)."""
    import importlib

    def call(name, config, *words):
        before = dict(os.environ)
        code = importlib.import_module(f"{name}.__main__").main([str(config), "data.workers=0", *map(str, words)])
        dist.stop()
        os.environ.clear()
        os.environ.update(before)
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    return call


@pytest.fixture
def shards(tmp_path, program):
    """A small data set of two shards, written by the project."""
    from data_pipelines.cli import app
    from tubelet.console import run_app

    out = tmp_path / "shards"
    assert run_app(app, ["write", "made-up:photos?n=40&size=40&classes=10", str(out), "--shard-size", "20"], "data") == 0
    return out


def said(output, *parts):
    message = output[output.index("error: "):]
    for part in (*parts, "Try: "):
        assert part in message, f"{part!r} is missing in:\n{message}"
    assert "Traceback" not in message, message


def test_an_empty_data_set(tmp_path, program):
    config, _ = recipe(tmp_path)
    (tmp_path / "empty").mkdir()
    code, output = program("pretrain", config, f"data.train={tmp_path}/empty")
    assert code == 1
    said(output, f"{tmp_path}/empty")


def test_a_vanished_and_a_truncated_shard_are_named_together(tmp_path, program, shards):
    config, _ = recipe(tmp_path)
    first, second = sorted(shards.glob("*.tar"))
    first.unlink()
    second.write_bytes(second.read_bytes()[:-3000])
    code, output = program("pretrain", config, f"data.train={shards}")
    assert code == 1
    said(output, first.name, second.name)


def test_a_label_out_of_range(tmp_path, program, shards):
    config, folder = recipe(tmp_path)
    code, output = program("pretrain", config, f"data.train={shards}", "model.num_classes=3", "data.augment.mixup_alpha=0",
                           "data.augment.cutmix_alpha=0")
    assert code == 1
    said(output, "3", "model.num_classes")
    log = (folder / "logs" / "rank-0000.txt").read_text()
    assert f"rank 0 on {socket.gethostname()}" in log and "Traceback" in log  # the whole story is kept


def test_a_checkpoint_of_another_model(tmp_path, program, shards):
    config, folder = recipe(tmp_path, steps=2, save_every=2)
    words = [f"data.train={shards}", "data.val=[]"]
    code, output = program("pretrain", config, *words)
    assert code == 0, output
    code, output = program("pretrain", config, *words, "model.kwargs.depth=3", "model.kwargs.at=1", "seed=3")
    assert code == 1
    said(output, "model.kwargs.depth: checkpoint 4, now 3", "seed: checkpoint 0, now 3", "3 fixed settings")
    code, output = program("pretrain", config, *words, "total_steps=1", "schedule.warmup_steps=0")
    assert code == 1
    said(output, "end at step 1", "stands at step 2")
    code, output = program("pretrain", config, *words, "run.name=fork", f"init.from_run={folder}", "model.kwargs.depth=3")
    assert code == 1
    said(output, "blocks.3")


def test_data_that_is_not_the_checkpoints_is_refused_and_its_order_begun_anew_once(tmp_path, program, shards):
    config, folder = recipe(tmp_path, steps=2, save_every=2)
    assert program("pretrain", config, f"data.train={shards}", "data.val=[]")[0] == 0
    moved = tmp_path / "moved"
    shutil.copytree(shards, moved)  # another place is fine
    code, output = program("pretrain", config, f"data.train={moved}", "data.val=[]", "total_steps=3")
    assert code == 0, output
    code, output = program("pretrain", config, "data.train=made-up:photos?n=50&size=40&classes=10", "data.val=[]",
                           "total_steps=4")
    assert code == 1
    said(output, "40", "50", "data.restart_order=true")
    for steps, size in ((4, 16), (6, 24)):  # a launcher starts the same command again; another batch is no other data
        code, output = program("pretrain", config, "data.train=made-up:photos?n=50&size=40&classes=10", "data.val=[]",
                               f"total_steps={steps}", "data.restart_order=true", f"global_batch_size={size}")
        assert code == 0, output
    samples = json.loads((folder / "step-00000006/manifest.json").read_text())["state"]["seen"]
    assert samples == (4 - 3) * 16 + 2 * 24  # step 3 was the last with the former data
    events = [row for row in rows(folder / "events.jsonl") if row["event"] == "data_restarted"]
    assert [(row["step"], row["samples"]) for row in events] == [(3, 3 * 16)] and events[0]["changes"]


def test_time_outs_of_data_that_outlast_those_of_the_other_ranks_are_warned_of():
    data = DataSettings(train="made-up:photos?n=9")
    two = dist.World(0, 2, 0, 2)
    assert not impatient(SimpleNamespace(data=data, timeout_seconds=600.0), two)  # the defaults
    assert not impatient(SimpleNamespace(data=data, timeout_seconds=60.0), dist.World())
    said = impatient(SimpleNamespace(data=data, timeout_seconds=400.0), two)
    assert "data.worker_timeout_seconds=480" in said and "io_timeout" not in said and "Try: timeout_seconds=600" in said
    engine = EngineSettings(global_batch_size=1, optimizer={"lr": 1.0})
    assert data.io_timeout_seconds < data.worker_patience < engine.timeout_seconds


def test_a_flipped_byte_in_the_newest_checkpoint_falls_back_to_the_next_and_says_so(tmp_path, program, shards):
    config, folder = recipe(tmp_path, steps=4, save_every=2)
    words = [f"data.train={shards}", "data.val=[]"]
    assert program("pretrain", config, *words)[0] == 0
    victim = folder / "step-00000004" / "rank-00000.safetensors"
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    code, output = program("pretrain", config, *words, "total_steps=5")
    assert code == 0, output
    assert "step-00000004" in output and "rank-00000.safetensors" in output and "step-00000002" in output
    for path in folder.glob("step-*/rank-00000.safetensors"):
        path.write_bytes(path.read_bytes()[:100])
    before = sorted(folder.rglob("*.safetensors"))
    code, output = program("pretrain", config, *words, "total_steps=6")
    assert code == 1
    said(output, "No checkpoint", "run.overwrite=true")
    assert sorted(folder.rglob("*.safetensors")) == before


def test_a_picture_that_does_not_decode_is_replaced_and_in_the_ledger(tmp_path, program, shards):
    victim = sorted(shards.glob("*.tar"))[0]
    with tarfile.open(victim) as tar:
        member = next(item for item in tar if not item.name.endswith(".cls"))
    data = bytearray(victim.read_bytes())
    data[member.offset_data:member.offset_data + member.size] = b"x" * member.size
    victim.write_bytes(data)
    config, folder = recipe(tmp_path, steps=5, save_every=5)
    code, output = program("pretrain", config, f"data.train={shards}", "data.val=[]")
    assert code == 0, output
    ledger = [row for path in folder.glob("ledger-*.jsonl") for row in rows(path)]
    assert len(ledger) == 2 and {row["key"] for row in ledger} == {member.name.rsplit(".", 1)[0]}  # 80 samples of 40


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small tmpfs needs root")
def test_a_full_disk_while_saving_stops_all_ranks_and_keeps_what_was_saved(tmp_path, shards):
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)], check=True)
    try:
        config, folder = recipe(tmp_path, steps=9, save_every=1)
        started = time.time()
        output = run("pretrain", config, f"data.train={shards}", "data.val=[]", f"run.dir={disk}", "keep_last=20", nproc=2,
                     expect=1)
        assert time.time() - started < 90
        said(output, str(disk), "free")
        assert output.count("error: ") == 1
        saved = sorted((disk / "r").glob("step-*/manifest.json"))
        assert saved
        listed = run("tubelet.cli", "ckpt", "verify", disk / "r")
        assert saved[-1].parent.name in listed
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_two_jobs_on_one_run_folder(tmp_path, program, shards):
    config, folder = recipe(tmp_path, steps=500, save_every=5)
    words = [f"data.train={shards}", "data.val=[]"]
    first = start("pretrain", config, *words, env={"TUBELET_FAULTS": "save.begin=2"})  # a slow disk: it goes on for minutes
    try:
        wait_for(lambda: len(rows(folder / "metrics.jsonl")) >= 3, first)
        code, output = program("pretrain", config, *words)
        assert code == 1
        said(output, "attempt 0001", "run.take_over=true")
        assert first.poll() is None
        code, output = program("pretrain", config, *words, "run.take_over=true", "total_steps=100")
        assert code == 0, output
        first.wait(60)
        assert first.returncode == 86, first.stdout.read()
        ends = {json.loads(path.read_text())["how"] for path in (folder / "attempts").glob("*.end.json")}
        assert "finished" in ends
    finally:
        kill(first)
