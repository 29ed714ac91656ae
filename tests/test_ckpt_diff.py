"""`tubelet ckpt diff` says what numpy says, whatever wrote the two checkpoints, and one tensor at a time."""

import json
import shutil
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint_parts import Net, SplitEngine, WholeEngine, picture

from tubelet.console import run_app
from tubelet.dist import World
from tubelet.engine import checkpoint
from tubelet.engine.checkpoint import diff as module
from tubelet.engine.checkpoint.diff import compare, diff
from tubelet.engine.checkpoint.load import Source
from tubelet.engine.ckpt_cli import app

FORMAT_1 = Path(__file__).parent / "format1"
EXTRA = {"config": {"model": {"name": "net"}, "seed": 1, "run": {"name": "a"}}, "total_steps": 9,
         "state": {"step": 1, "seen": 8, "skipped_steps": 0}, "data": {"fingerprint": {"sources": [{"size": 3}], "seed": 5}}}


def strict(text):
    """JSON as others parse it: NaN and Infinity are not in it."""
    return json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))


def split(seed=1, **kwargs):
    return SplitEngine(Net(seed), World(), **kwargs)


def averages(engine):
    return [flat.master * 0.9 for flat in engine.flats()]


def test_the_same_state_written_by_two_engines_is_equal(tmp_path, capsys):
    wrote = split().train_a_little(1)
    a = checkpoint.save(tmp_path / "a", wrote, step=1, ema=averages(wrote), extra=EXTRA)
    plain = WholeEngine(Net(5), torch.optim.AdamW)
    ema = [torch.zeros_like(flat.master) for flat in plain.flats()]
    checkpoint.restore(a, plain, ema)
    other = json.loads(json.dumps(EXTRA))
    other["config"]["run"]["name"] = "b"
    b = checkpoint.save(tmp_path / "b", plain, step=1, ema=ema, extra=other)
    found = diff(a, b)
    assert found.equal and not found.most and not found.one_sided
    assert {kind: (one.count, one.equal) for kind, one in found.kinds.items()} == {
        "weights": (9, 9), "EMA": (9, 9), "exp_avg": (9, 9), "exp_avg_sq": (9, 9), "buffers": (4, 4)}
    assert found.sections["settings"] == {"run.name": ("a", "b")}
    assert found.sections["engine"] == {"kind": ("zero", "plain"), "stage": (1, 0)}
    assert run_app(app, ["diff", str(tmp_path / "a"), str(b)], "ckpt") == 0
    shown = capsys.readouterr().out
    for part in ("equal: the same state", "run.name", "exp_avg_sq", "step-00000001"):
        assert part in shown, shown

    # written on two ranks at stage 3 by an earlier version; only what this engine's groups do not keep differs
    reads = SplitEngine(Net(9, 3), World(), frozen=["stem"])
    ema = [torch.zeros_like(flat.master) for flat in reads.flats()]
    checkpoint.restore(FORMAT_1 / "step-00000002", reads, ema)
    c = checkpoint.save(tmp_path / "c", reads, step=2, ema=ema, extra={})
    found = diff(FORMAT_1, c)
    assert all(one.equal == one.count for one in found.kinds.values()) and not found.one_sided
    assert found.kinds["EMA"].count == 7
    assert found.kinds["weights"].count == 9, "the frozen ones are compared too"
    assert set(found.sections["optimizer"]) == {"lr_scale of 7 parameter(s), first gain",
                                                "weight_decay of 7 parameter(s), first gain"}


def test_distances_are_what_numpy_says_and_the_most_different_come_first(tmp_path):
    one = split().train_a_little(1)
    a = checkpoint.save(tmp_path / "a", one, step=1, ema=averages(one), extra=EXTRA)
    left = picture(one)
    one.train_a_little(2)
    one.optimizer.param_groups[0]["weight_decay"] = 0.3
    extra = json.loads(json.dumps(EXTRA))
    extra["config"]["seed"], extra["state"] = 2, {"step": 2, "seen": 16, "skipped_steps": 1}
    extra["data"]["fingerprint"]["sources"][0]["size"] = 4
    b = checkpoint.save(tmp_path / "b", one, step=2, ema=None, extra=extra)
    right, found = picture(one), diff(a, b, top=5)
    assert not found.equal and found.one_sided == {"EMA": (9, 0)} and found.steps == (1, 2)
    relative = {}
    for kind, word in (("master", "weights"), ("exp_avg", "exp_avg"), ("exp_avg_sq", "exp_avg_sq")):
        x, y = ({name: value.astype(np.float64) for name, value in own[kind].items()} for own in (left, right))
        gaps = {name: x[name] - y[name] for name in x}
        distance = found.kinds[word]
        assert distance.max_abs == max(np.abs(gap).max() for gap in gaps.values())
        expected = np.linalg.norm(np.concatenate(list(gaps.values()))) / np.linalg.norm(np.concatenate(list(x.values())))
        assert distance.relative == pytest.approx(expected, rel=1e-12)
        assert (distance.count, distance.equal) == (9, 0)
        if kind == "master":
            relative = {name: np.linalg.norm(gaps[name]) / np.linalg.norm(x[name]) for name in x}
    assert [name for _, name, _ in found.most] == sorted(relative, key=relative.get, reverse=True)[:5]
    assert {kind for kind, *_ in found.most} == {"weights"}
    assert found.sections["state"] == {"step": (1, 2), "seen": (8, 16), "skipped_steps": (0, 1)}
    assert found.sections["data"] == {"sources.0.size": (3, 4)} and found.sections["settings"] == {"seed": (1, 2)}
    assert found.sections["optimizer"] == {
        "EMA": (True, False), "weight_decay of 9 parameter(s), first gain": (0.01, 0.3),
        "step of 9 parameter(s), first gain": (1.0, 2.0)}
    assert found.sections["engine"] == found.sections["versions"] == {}


def test_other_models_are_compared_where_they_agree(tmp_path):
    small, large = Net(1), Net(1, width=9)
    del small.gain
    large.extra = torch.nn.Linear(2, 2, bias=False)
    a = checkpoint.save(tmp_path / "a", SplitEngine(small, World(), frozen=["head"]), step=1, ema=None, extra={})
    b = checkpoint.save(tmp_path / "b", SplitEngine(large, World()).train_a_little(1), step=1, ema=None, extra={})
    found = diff(a, b)
    assert found.only_a == [] and found.only_b == ["gain", "extra.weight"]
    assert found.shapes["stem.weight"] == ([7, 5], [9, 5]) and "norm.running_mean" in found.shapes
    assert "body.bias" not in found.shapes and found.kinds["weights"].count == 3, "body.bias and the head"
    assert found.one_sided == {"exp_avg": (0, 3), "exp_avg_sq": (0, 3)}, "one has not stepped"
    assert strict(json.dumps(found.to_json()))["parameters"]["shapes"]["stem.weight"] == [[7, 5], [9, 5]]


def test_bits_are_compared_not_only_values(monkeypatch):
    monkeypatch.setattr(module, "_CHUNK", 3)  # so that tensors of a few elements are compared in parts
    x = torch.arange(8.0)
    assert (compare(x, x.clone()).equal, compare(x, x.clone()).relative) == (1, 0.0)
    zero, minus = torch.zeros(5), torch.zeros(5)
    minus[4] = -0.0
    found = compare(zero, minus)
    assert (found.equal, found.max_abs, found.relative) == (0, 0.0, 0.0)
    y = x.clone()
    y[7] += 0.5
    found = compare(x, y)
    assert found.equal == 0 and found.max_abs == 0.5 and found.relative == pytest.approx(0.5 / np.linalg.norm(x.numpy()))
    y[0], bad = torch.nan, x.clone()
    assert np.isnan(compare(x, y).max_abs) and not compare(x, y).equal
    bad[3] = torch.inf
    assert compare(bad, bad.clone()).equal == 1 and compare(bad, x).max_abs == np.inf
    assert compare(zero, x[:5]).relative == np.inf, "nothing to be relative to"
    assert compare(x, x.to(torch.bfloat16)).equal == 0 and compare(x, x.to(torch.bfloat16)).max_abs == 0
    assert compare(x, x.view(2, 4)).max_abs == np.inf and compare(x[:0], x[:0]).equal == 1
    assert compare(torch.tensor(True), torch.tensor(False)).max_abs == 1


def test_the_command_answers_as_diff_does(tmp_path, capsys):
    engine = split().train_a_little(1)
    checkpoint.save(tmp_path / "a", engine, step=1, ema=None, extra=EXTRA)
    checkpoint.save(tmp_path / "b", engine, step=1, ema=None, extra=EXTRA)
    engine.flats()[0].master[3] = torch.nan
    checkpoint.save(tmp_path / "b", engine, step=2, ema=None, extra=EXTRA)  # a run stands for its newest
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    assert run_app(app, ["diff", a, f"{b}/step-00000001"], "ckpt") == 0
    capsys.readouterr()
    assert run_app(app, ["diff", a, b, "--json", "--top", "3"], "ckpt") == 1
    found = strict(capsys.readouterr().out)
    assert found["equal"] is False and found["tensors"]["weights"] == {
        "count": 9, "equal": 8, "max_abs": "nan", "relative": "nan"}
    assert [(row["kind"], row["name"]) for row in found["most_different"]] == [("weights", "stem.weight")]
    assert run_app(app, ["diff", a, b], "ckpt") == 1
    assert "different: 30 of 31 tensors are equal bit by bit" in capsys.readouterr().out
    assert run_app(app, ["diff", a, str(tmp_path / "nothing")], "ckpt") == 2
    assert "Try: " in capsys.readouterr().err
    shutil.copytree(tmp_path / "a", tmp_path / "c")
    (tmp_path / "c/step-00000001/rank-00000.safetensors").write_bytes(b"short")
    assert run_app(app, ["diff", str(tmp_path / "c"), b], "ckpt") == 2
    assert "is not whole: rank-00000.safetensors has 5 bytes" in capsys.readouterr().err


def test_no_more_than_one_tensor_of_each_is_in_memory(tmp_path, monkeypatch):
    a = checkpoint.save(tmp_path / "a", split().train_a_little(1), step=1, ema=None, extra={})
    b = checkpoint.save(tmp_path / "b", split(2).train_a_little(1), step=1, ema=None, extra={})
    real, alive, most = Source.full, weakref.WeakSet(), 0

    def full(self, kind, name):
        nonlocal most
        value = real(self, kind, name)
        alive.add(value)
        most = max(most, len(alive))
        return value

    monkeypatch.setattr(Source, "full", full)
    assert not diff(a, b).equal
    assert most == 2
