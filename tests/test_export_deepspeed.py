"""`tubelet ckpt export --to deepspeed`: stock DeepSpeed, which knows nothing of us, goes on as we would."""

import json
import re

import numpy as np
import pytest
import torch
from checkpoint_parts import Net, SplitEngine, WholeEngine
from ranks import run_ranks

from tubelet.console import run_app
from tubelet.dist import World
from tubelet.engine import checkpoint
from tubelet.engine.ckpt_cli import app
from tubelet.safe_io import read_pth

LR, RANKS = 1e-3, 2


def model():
    return Net(seed=3, width=37, norm="layer")


def loss_of(engine, rank, step):
    generator = torch.Generator().manual_seed(10 * step + rank)
    x, y = torch.randn(2, 5, generator=generator), torch.randn(2, 3, generator=generator)
    return (engine(x).float() - y).square().mean()


def picture(flats, state, slots):
    """{(flat, kind): bytes} of what means something on this rank."""
    found = {}
    for number, (flat, own) in enumerate(zip(flats, slots)):
        for kind in ("master", "exp_avg", "exp_avg_sq"):
            values = (flat if kind == "master" else state[flat][kind]).detach()
            found[number, kind] = b"".join(values[offset : offset + length].numpy().tobytes() for offset, length in own)
        found[number, "step"] = float(state[flat]["step"])
    return found


def ours(world, device, run, stage, precision):
    """Two steps, a checkpoint, two more; as all our programs train."""
    from tubelet.engine.build import build_engine
    from tubelet.engine.settings import EngineSettings

    settings = EngineSettings.model_validate({
        "global_batch_size": 2 * world.size, "engine": "zero", "zero": {"stage": stage}, "precision": precision,
        "clip_grad": None, "optimizer": {"name": "adamw", "lr": LR, "weight_decay": 0.1, "betas": [0.8, 0.95],
                                         "frozen": ["^stem"]}})
    engine = build_engine(model(), settings, world=world, device=device, micro_batch_size=2)
    losses = []
    for step in range(5):
        if step == 2:
            checkpoint.save(run, engine, step=step, ema=None, extra={"state": {"seen": 8, "skipped_steps": 1}})
            flats = engine.flats()
            slots = [[(slot.offset, slot.length) for slot in flat.slots] for flat in flats]
            saved = picture([flat.key for flat in flats], engine.optimizer.state, slots)
        loss = loss_of(engine.model, world.rank, step)
        losses.append(float(loss.detach()))
        engine.backward(loss)
        engine.step(LR)
    return {"losses": losses[2:], "state": saved, "slots": slots}


def stock(world, device, out, stage, precision, slots):
    """The program that the README of the export shows, and three steps."""
    import deepspeed
    import deepspeed.ops

    setattr(deepspeed.ops, "__compatible_ops__", {})  # noqa: B010 - or it compiles for a minute first
    net, said = model(), json.loads((out / "tubelet.json").read_text())
    for name in said["frozen"]:
        net.get_parameter(name).requires_grad_(False)
    names = dict(net.named_parameters())
    with torch.no_grad():
        for value in [*names.values(), *net.buffers()]:
            value.zero_()
    groups = [{"params": [names[name] for name in group["params"]]} for group in said["groups"]]
    engine, *_ = deepspeed.initialize(model=net, optimizer=torch.optim.AdamW(groups, lr=1.0), config={
        "train_micro_batch_size_per_gpu": 2, "gradient_clipping": 0.0, "bf16": {"enabled": precision == "bf16"},
        "zero_allow_untested_optimizer": True, "zero_optimization": {"stage": stage}})
    path, client = engine.load_checkpoint(str(out))
    assert path is not None and client["tubelet"] == {"step": 2, "state": {"seen": 8, "skipped_steps": 1}}
    assert (engine.global_steps, engine.global_samples, engine.skipped_steps) == (2, 8, 1)
    zero = engine.optimizer
    flats = zero.fp32_partitioned_groups_flat if stage == 3 else zero.single_partition_of_fp32_groups
    hyper = [{key: group[key] for key in ("lr", "betas", "weight_decay", "eps")} for group in zero.optimizer.param_groups]
    found = {"state": picture(flats, zero.optimizer.state, slots[world.rank]), "hyper": hyper, "losses": []}
    for step in range(2, 5):
        loss = loss_of(lambda x: engine(x.bfloat16() if precision == "bf16" else x), world.rank, step)
        found["losses"].append(float(loss.detach()))
        engine.backward(loss)
        engine.step()
    return found


@pytest.mark.parametrize(("stage", "precision"), [(1, "fp32"), (3, "bf16")])
def test_stock_deepspeed_goes_on_to_the_bit(stage, precision, tmp_path, capsys, monkeypatch):
    run, out = tmp_path / "run", tmp_path / "out"
    env = {"MKL_CBWR": "COMPATIBLE"}
    monkeypatch.setenv("MKL_CBWR", "COMPATIBLE")
    expected = run_ranks(ours, RANKS, run, stage, precision, env=env)
    assert run_app(app, ["export", str(run), str(out), "--to", "deepspeed", "--ranks", str(RANKS)], "ckpt") == 0, (
        capsys.readouterr().err)
    assert (out / "latest").read_text() == "global_step2" and "deepspeed.initialize" in (out / "README.md").read_text()
    found = run_ranks(stock, RANKS, out, stage, precision, [own["slots"] for own in expected], env=env)
    for mine, theirs in zip(expected, found):
        assert theirs["state"].keys() == mine["state"].keys() and len(mine["state"]) >= 8
        assert [key for key in mine["state"] if theirs["state"][key] != mine["state"][key]] == []
        assert theirs["losses"] == mine["losses"] and len(set(mine["losses"])) == 3
        assert sorted((group["lr"], tuple(group["betas"]), group["weight_decay"]) for group in theirs["hyper"]) == [
            (LR, (0.8, 0.95), 0.0), (LR, (0.8, 0.95), 0.1)]


def test_another_number_of_ranks_and_the_script_that_makes_plain_weights(tmp_path, capsys, one_thread):
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    written = SplitEngine(Net(1, width=20), World(), groups=(("body", 1e-3), ("", 1e-2)), frozen=["stem"]).train_a_little(1)
    checkpoint.save(tmp_path / "run", written, step=7, ema=None, extra={})
    words = ["export", str(tmp_path / "run"), str(tmp_path / "out"), "--to", "deepspeed"]
    assert run_app(app, [*words, "--ranks", "3", "--stage", "2"], "ckpt") == 0, capsys.readouterr().err
    assert sum("optim_states" in path.name for path in (tmp_path / "out" / "global_step7").iterdir()) == 3
    found = get_fp32_state_dict_from_zero_checkpoint(str(tmp_path / "out"))
    expected = dict(checkpoint.assemble(tmp_path / "run" / "step-00000007"))
    assert {name for name in expected if "num_batches" not in name} == {*found} - {"norm.num_batches_tracked"}
    both = [(found[name].detach().numpy(), value.numpy()) for name, value in expected.items() if name in found]
    assert all(np.array_equal(one, other) for one, other in both)
    capsys.readouterr()
    assert run_app(app, words, "ckpt") == 1, "another number of ranks would leave a mixture"
    assert "global_step7 is there already" in capsys.readouterr().err


def test_what_cannot_be_written_is_said_before_anything_is(tmp_path, capsys, one_thread):
    written = SplitEngine(Net(1), World()).train_a_little(1)
    checkpoint.save(tmp_path / "run", written, step=7, ema=None, extra={})
    whole = WholeEngine(Net(1), torch.optim.Adafactor).train_a_little(1)
    checkpoint.save(tmp_path / "whole", whole, step=7, ema=None, extra={})
    broken = checkpoint.save(tmp_path / "broken", written, step=7, ema=None, extra={})
    (broken / "rank-00000.safetensors").write_bytes(b"")
    out = tmp_path / "out"
    for run, words, said in (
            ("run", ["--to", "deepspeed", "--ranks", "0"], "--ranks is 0"),
            ("run", ["--to", "deepspeed", "--stage", "4"], "--stage 4"),
            ("run", ["--to", "deepspeed", "--which", "ema", "--dtype", "bf16"], "--which, --dtype: has no meaning"),
            ("run", ["--ranks", "2"], "--ranks: has no meaning with `--to safetensors`"),
            ("whole", ["--to", "deepspeed"], "The state of Adafactor has no place"),
            ("broken", ["--to", "deepspeed"], "is not whole"),
            ("run", ["--to", "onnx"], "is not a format")):
        assert run_app(app, ["export", str(tmp_path / run), str(out), *words], "ckpt") == 1
        told = capsys.readouterr().err
        assert said in told and "Try:" in told and not out.exists(), told


def test_an_error_in_one_process_ends_all_and_is_told_once(tmp_path, capsys, one_thread, monkeypatch):
    written = SplitEngine(Net(1), World()).train_a_little(1)
    checkpoint.save(tmp_path / "run", written, step=7, ema=None, extra={})
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text("import os, sys\nif os.environ.get('RANK') == '1': sys.exit('no such luck')\n")
    monkeypatch.setenv("PYTHONPATH", str(site))
    assert run_app(app, ["export", str(tmp_path / "run"), str(tmp_path / "out"), "--to", "deepspeed", "--ranks", "2"],
                   "ckpt") == 1
    told = capsys.readouterr().err
    assert re.search("process that writes DeepSpeed's files ended with code", told) and "no such luck" in told, told
    assert not (tmp_path / "out" / "latest").exists(), "without it nothing is loaded"


def test_what_is_written_holds_tensors_and_plain_values_that_anybody_may_look_at(tmp_path, capsys, one_thread):
    written = SplitEngine(Net(1), World()).train_a_little(1)
    checkpoint.save(tmp_path / "run", written, step=7, ema=None, extra={})
    assert run_app(app, ["export", str(tmp_path / "run"), str(tmp_path / "out"), "--to", "deepspeed"], "ckpt") == 0
    state = read_pth(tmp_path / "out" / "global_step7" / "mp_rank_00_model_states.pt")
    assert {"module", "param_shapes", "tubelet"} <= state.keys()
