"""What a checkpoint promises when nothing is broken: what is written, what is read back, what is kept."""

import hashlib
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from checkpoint_parts import Net, SplitEngine, differences, picture
from safetensors.torch import load_file

from tubelet import errors
from tubelet.dist import World
from tubelet.engine import checkpoint
from tubelet.engine.checkpoint.folder import prunable, step_of

ONE = World()


def engine(seed=0, width=7, **kwargs):
    return SplitEngine(Net(seed, width), ONE, **kwargs)


def averages(engine, seed):
    return [torch.randn(flat.master.numel(), generator=torch.Generator().manual_seed(seed)) for flat in engine.flats()]


def save_steps(run, *steps, **kwargs):
    found = engine().train_a_little(1)
    for step in steps:
        checkpoint.save(run, found, step=step, ema=None, extra={"state": {"seen": 8 * step}}, **kwargs)
    return found


def names(run):
    return sorted(path.name for path in run.glob("step-*") if (path / "manifest.json").exists())


def flip(path, place=-1):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def test_files_are_what_the_manifest_says_and_any_safetensors_reader_opens_them(tmp_path):
    before = os.umask(0o027)
    try:
        written = engine(groups=(("body", 1e-3), ("", 1e-2)), frozen=["stem"]).train_a_little(3)
        ema = averages(written, 4)
        folder = checkpoint.save(tmp_path / "run", written, step=12, ema=ema,
                                 extra={"config": {"a": 1e-3}, "state": {"seen": 96}})
    finally:
        os.umask(before)
    manifest = checkpoint.read_manifest(folder)
    on_disk = {path.name for path in folder.iterdir()}
    assert on_disk == {"rank-00000.safetensors", "buffers.safetensors", "frozen.safetensors", "index.json", "manifest.json"}
    assert set(manifest["files"]) == on_disk - {"manifest.json"}
    for name, record in manifest["files"].items():
        data = (folder / name).read_bytes()
        assert record == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        assert (folder / name).stat().st_mode & 0o777 == 0o640, "the umask decides who may read"
    assert (manifest["step"], manifest["samples"], manifest["world_size"], manifest["config"]) == (12, 96, 1, {"a": 1e-3})
    assert manifest["engine"] == {"kind": "zero", "stage": 1, "precision": "fp32"}
    assert manifest["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert (tmp_path / "run" / "latest").read_text() == "step-00000012\n"

    flat = load_file(folder / "rank-00000.safetensors")  # the library's own reader
    for number, ours in enumerate(written.flats()):
        state = written.optimizer.state[ours.key]
        for kind, value in (("master", ours.master), ("exp_avg", state["exp_avg"]), ("ema", ema[number])):
            assert flat[f"{kind}.{number}"].numpy().tobytes() == value.detach().numpy().tobytes()
    assert set(load_file(folder / "frozen.safetensors")) == {"stem.weight", "stem.bias"}
    assert set(load_file(folder / "buffers.safetensors")) == {"norm.running_mean", "norm.running_var",
                                                             "norm.num_batches_tracked", "table"}
    assert checkpoint.verify(folder) == []


def test_the_full_state_comes_back_without_an_engine(tmp_path):
    written = engine(frozen=["stem"]).train_a_little(3)
    ema = averages(written, 4)
    expected, averaged = written.module.state_dict(), picture(written, ema)["ema"]
    folder = checkpoint.save(tmp_path, written, step=1, ema=ema, extra={})
    found = dict(checkpoint.assemble(folder, which="weights"))
    assert list(found) == list(expected) and all(torch.equal(found[name], expected[name]) for name in expected)
    found = dict(checkpoint.assemble(folder))  # auto: the average where there is one
    for name, value in found.items():
        wanted = averaged[name] if name in averaged else expected[name].numpy().ravel()
        assert (value.numpy().ravel() == wanted).all() and value.shape == expected[name].shape
    plain = checkpoint.save(tmp_path, written, step=2, ema=None, extra={})
    assert torch.equal(dict(checkpoint.assemble(plain))["head.weight"], expected["head.weight"])
    with pytest.raises(errors.CheckpointError, match="holds no moving average"):
        checkpoint.assemble(plain, which="ema")


def test_learning_rates_of_groups_survive_another_grouping(tmp_path):
    written = engine(groups=(("body", 1e-3), ("", 5e-2)), seed=1).train_a_little(2)
    written.optimizer.param_groups[1]["betas"] = (0.8, 0.95)
    folder = checkpoint.save(tmp_path, written, step=5, ema=None, extra={})

    other = engine(groups=(("head", 7.0), ("body", 8.0), ("", 9.0)), seed=2)  # more groups, another order
    checkpoint.restore(folder, other, None)
    assert not differences(picture(other), picture(written))
    assert [group["lr"] for group in other.optimizer.param_groups] == [5e-2, 1e-3, 5e-2]
    assert other.optimizer.param_groups[0]["betas"] == (0.8, 0.95)

    kept = engine(groups=(("body", 7.0), ("", 9.0)), seed=2)
    kept.optimizer.param_groups[0]["weight_decay"] = 0.77
    restored = checkpoint.restore(folder, kept, None, keep=["weight_decay"])
    assert [group["weight_decay"] for group in kept.optimizer.param_groups] == [0.77, 1e-2]
    assert kept.optimizer.param_groups[0]["lr"] == 1e-3 and "weight_decay as set now" in restored.rows[-1][2]

    one = engine(groups=(("", 9.0),), seed=2)  # two rates for one group: nobody can say which
    rows = checkpoint.restore(folder, one, None).rows
    assert one.optimizer.param_groups[0]["lr"] == 9.0 and one.optimizer.param_groups[0]["betas"] == (0.9, 0.999)
    assert "betas as set now" in rows[-1][2]


def test_a_checkpoint_of_another_model_is_refused_with_every_difference_and_changes_nothing(tmp_path):
    folder = checkpoint.save(tmp_path, engine().train_a_little(1), step=1, ema=None, extra={})
    module = Net(3, width=9)
    module.extra = torch.nn.Linear(2, 2, bias=False)
    del module.gain
    other = SplitEngine(module, ONE)
    before = picture(other)
    with pytest.raises(errors.CheckpointError) as caught:
        checkpoint.restore(folder, other, None)
    message = str(caught.value)
    for part in ("stem.weight is [7, 5] in the checkpoint, [9, 5] in this model", "gain [1] is in the checkpoint only",
                 "extra.weight [2, 2] is in this model only", "buffer norm.running_mean is [7]", "Try: ", "init.weights="):
        assert part in message, message
    assert not differences(picture(other), before)


def test_the_table_says_what_was_restored_missing_and_new(tmp_path, capsys):
    written = engine(seed=1, frozen=["stem"]).train_a_little(2)
    folder = checkpoint.save(tmp_path, written, step=5, ema=averages(written, 1), extra={"state": {"seen": 40}})
    other = engine(seed=2, frozen=["head"]).train_a_little(7)  # what was frozen is trained now, and the other way round
    restored = checkpoint.restore(folder, other, None)
    loaded, saved = other.module.state_dict(), written.module.state_dict()
    assert all(torch.equal(loaded[name], saved[name]) for name in saved)
    rows = {row[0]: row[1:] for row in restored.rows}
    assert rows["EMA"][0] == "missing" and rows["exp_avg"] == ("restored", "fp32, 2 parameters start at zero")
    moments = picture(other)["exp_avg"]
    assert not moments["stem.weight"].any() and moments["body.weight"].any()
    restored.show("resume", folder, {"seen": 40})
    shown = capsys.readouterr().out
    assert "step 5" in shown and "EMA" in shown and "missing" in shown

    sgd = engine(seed=2, frozen=["stem"], optimizer=torch.optim.SGD)
    average = averages(sgd, 9)
    bare = checkpoint.save(tmp_path, written, step=6, ema=None, extra={})
    rows = {row[0]: row[1:] for row in checkpoint.restore(bare, sgd, average).rows}
    assert rows["EMA"][0] == rows["optimizer state"][0] == "new" and not sgd.optimizer.state
    assert all((a == flat.master).all() for a, flat in zip(average, sgd.flats()))


def test_an_attempt_that_was_superseded_publishes_nothing_and_touches_nothing(tmp_path):
    save_steps(tmp_path, 1)
    calls = []

    def superseded():
        calls.append(sorted(path.name for path in (tmp_path / "step-00000002").glob("*")))
        if len(calls) == 2:  # taken over while it wrote
            raise errors.SupersededError("a newer attempt", "")

    with pytest.raises(errors.SupersededError):
        save_steps(tmp_path, 2, before_commit=superseded)
    assert calls[0] == [] and "manifest.json.tmp" in calls[1], "asked before the first file and right before the commit"
    assert names(tmp_path) == ["step-00000001"] and (tmp_path / "latest").read_text() == "step-00000001\n"
    assert "rank-00000.safetensors" in os.listdir(tmp_path / "step-00000002"), "these may be the newer attempt's files"
    with pytest.raises(ValueError, match="our own mistake"):
        save_steps(tmp_path, 3, before_commit=lambda: (_ for _ in ()).throw(ValueError("our own mistake")))
    assert not (tmp_path / "step-00000003").exists(), "another failure leaves nothing half written"


def test_saving_a_step_again_replaces_it_whole_or_not_at_all(tmp_path):
    save_steps(tmp_path, 1, 2)
    flip(tmp_path / "step-00000002" / "rank-00000.safetensors")
    folder, notes = checkpoint.choose(tmp_path)
    assert folder.name == "step-00000001" and "step-00000002 is rejected" in notes[0]
    calls = []

    def fail_late():
        calls.append(1)
        if len(calls) == 2:
            raise OSError(5, "Input/output error")

    with pytest.raises(errors.CheckpointError, match="Input/output error.*Earlier checkpoints are untouched"):
        save_steps(tmp_path, 2, before_commit=fail_late)
    assert names(tmp_path) == ["step-00000001", "step-00000002"], "the old one is put back, damaged as it is"
    save_steps(tmp_path, 2)
    assert checkpoint.choose(tmp_path)[0].name == "step-00000002"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000001", "step-00000002"]


def test_pruning_keeps_what_it_promises(tmp_path):
    run = tmp_path / "run"
    save_steps(run, 10, 20, 30, 40, 50, 60)
    os.remove(run / "step-00000040" / "manifest.json")  # never finished, and a later one did
    (run / "step-00000070").mkdir()  # being written just now, perhaps
    asked = []
    removed = checkpoint.prune(run, keep_last=2, keep_every=30, protect={run / "step-00000020"},
                               before_delete=lambda: asked.append(1))
    assert [step_of(path) for path in removed] == [10, 40] and len(asked) == 2
    assert names(run) == ["step-00000020", "step-00000030", "step-00000050", "step-00000060"]
    assert (run / "step-00000070").exists() and not (run / "step-00000040").exists()

    def superseded():
        raise errors.SupersededError("a newer attempt", "")

    with pytest.raises(errors.SupersededError):
        checkpoint.prune(run, keep_last=1, before_delete=superseded)
    assert len(names(run)) == 4


def test_pruning_in_another_process_counts_only_checkpoints_that_verify(tmp_path):
    save_steps(tmp_path, 10, 20, 30, 40)
    flip(tmp_path / "step-00000040" / "rank-00000.safetensors")
    flip(tmp_path / "step-00000030" / "buffers.safetensors")
    done = subprocess.run([sys.executable, "-m", "tubelet.cli", "ckpt", "prune", str(tmp_path), "--keep-last", "1"],
                          capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.endswith("\nremoved step-00000010\n"), done.stderr + done.stdout
    assert checkpoint.choose(tmp_path)[0].name == "step-00000020"
    for step in (20, 30, 40):  # none is left that verifies: nothing may go
        flip(tmp_path / f"step-{step:08d}" / "index.json", 5)
    assert prunable(tmp_path, keep_last=1) == []


def test_the_command_line_tells_and_judges(tmp_path, capsys):
    from tubelet.console import run_app
    from tubelet.engine.ckpt_cli import app

    written = engine().train_a_little(1)
    for step in (1, 2):
        checkpoint.save(tmp_path, written, step=step, ema=averages(written, 1), extra={"config": {"model": {"name": "net"}}})
    (tmp_path / "step-00000003").mkdir()
    assert run_app(app, ["info", str(tmp_path)], "ckpt") == 0
    shown = capsys.readouterr().out
    for part in ("step-00000002", "net", "AdamW", "exp_avg", "others in", "step-00000001",
                 "unfinished saves: step-00000003"):
        assert part in shown, shown
    assert run_app(app, ["verify", str(tmp_path), "--all"], "ckpt") == 0
    flip(tmp_path / "step-00000001" / "rank-00000.safetensors")
    assert run_app(app, ["verify", str(tmp_path)], "ckpt") == 0  # the newest is whole
    assert run_app(app, ["verify", str(tmp_path), "--all", "--quick"], "ckpt") == 0  # sizes still agree
    assert run_app(app, ["verify", str(tmp_path), "--all"], "ckpt") == 1
    assert "rank-00000.safetensors is damaged" in capsys.readouterr().out
    os.truncate(tmp_path / "step-00000001" / "rank-00000.safetensors", 100)
    assert run_app(app, ["verify", str(tmp_path), "--all", "--quick"], "ckpt") == 1
    assert "has 100 bytes, the manifest says" in capsys.readouterr().out
    assert run_app(app, ["info", str(tmp_path / "nothing")], "ckpt") == 1
    assert run_app(app, ["export", str(tmp_path), str(tmp_path / "out"), "--to", "onnx"], "ckpt") == 1
    assert run_app(app, ["export", str(tmp_path / "step-00000001"), str(tmp_path / "out")], "ckpt") == 1
    assert "is not whole" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert run_app(app, ["prune", str(tmp_path), "--keep-last", "1", "--dry-run"], "ckpt") == 0
    assert "would remove step-00000001" in capsys.readouterr().out and (tmp_path / "step-00000001").exists()


def test_a_newer_format_is_named_not_guessed(tmp_path):
    save_steps(tmp_path, 1)
    path = tmp_path / "step-00000001" / "manifest.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "format": 3}))
    with pytest.raises(errors.CheckpointError, match="has format 3, this version of Tubelet reads formats 1 to 2"):
        checkpoint.read_manifest(path.parent)


def test_a_replicated_engine_splits_the_writing_and_loses_nothing(tmp_path):
    """One process plays three ranks that all hold everything; only the files of all three together are the model."""
    from tubelet.engine.checkpoint.describe import buffers, describe, rank_entries
    from tubelet.engine.checkpoint.format import BUFFERS, FROZEN
    from tubelet.engine.checkpoint.tensors import entry, write_safetensors
    from tubelet.engine.layout import Whole

    whole = engine(groups=(("stem", 1e-2), ("body", 1e-2), ("", 1e-2)), seed=4).train_a_little(4)
    whole.replicated, one = True, whole.layout()
    whole.layout = lambda: Whole(3, one.sizes, one.flats)
    texts = []
    for rank in range(3):
        whole.world = World(rank, 3)
        index = describe(whole, False, {}, buffers(whole.module))
        texts.append(index.to_json())
        own = rank_entries(whole, index, None)
        assert [item.name for item in own] == [f"{kind}.{rank}" for kind in ("master", "exp_avg", "exp_avg_sq")]
        write_safetensors(tmp_path / f"rank-{rank:05d}.safetensors", own, {})
    assert len(set(texts)) == 1, "every rank computes the same index, also of flats it does not write"
    (tmp_path / "index.json").write_text(texts[0])
    write_safetensors(tmp_path / BUFFERS, [entry(n, v) for n, v in buffers(whole.module).items()], {})
    write_safetensors(tmp_path / FROZEN, [], {})
    from tubelet.engine.checkpoint.format import seal

    files = {path.name: {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
             for path in tmp_path.iterdir()}
    wrote_by = {"kind": "plain", "stage": 0, "precision": "fp32"}
    (tmp_path / "manifest.json").write_text(seal({"format": 2, "step": 1, "world_size": 3, "files": files, "versions": {},
                                                  "engine": wrote_by, "created": "2026-01-01T00:00:00+0000"}))
    assert checkpoint.verify(tmp_path) == []
    whole.world = World()
    expected = picture(whole)["master"]
    found = dict(checkpoint.assemble(tmp_path))
    assert all((found[name].numpy().ravel() == expected[name]).all() for name in expected)
    assert np.isfinite(found["head.weight"].numpy()).all()
