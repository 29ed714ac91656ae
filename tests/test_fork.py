"""Other beginnings than resuming: a fork keeps everything under its own schedule, weights alone begin anew."""

import shutil

import pytest
from programs import digests, recipe, rows
from test_bad_input import _cache, program, shards  # noqa: F401 - fixtures

from tubelet.engine.checkpoint.load import assemble, read_manifest
from tubelet.engine.state import TrainState


@pytest.fixture
def parent(tmp_path, program, shards):  # noqa: F811
    config, folder = recipe(tmp_path, steps=6, save_every=2)
    words = [f"data.train={shards}", "data.val=[]"]
    code, output = program("pretrain", config, *words, "keep_last=9")
    assert code == 0, output
    return config, folder, words


def test_a_fork_continues_samples_weights_moments_and_average_under_its_own_schedule(program, parent):  # noqa: F811
    config, folder, words = parent
    same = program("pretrain", config, *words, "run.name=same", f"init.from_run={folder}/step-00000002")
    assert same[0] == 0, same[1]
    child = folder.parent / "same"
    assert {step: value for step, value in digests(folder).items() if step > 2} == digests(child)
    for which in ("weights", "ema"):  # unchanged settings: the fork is the parent's own continuation, to the bit
        ours, theirs = (dict(assemble(run / "step-00000006", which=which)) for run in (child, folder))
        assert all(ours[name].equal(theirs[name]) for name in theirs)
    code, output = program("pretrain", config, *words, "run.name=cooled", f"init.from_run={folder}/step-00000004",
                           "schedule={name: constant, cooldown_steps: 4, warmup_steps: 0}", "total_steps=8")
    assert code == 0, output
    rates = [row["train/lr"] for row in rows(folder.parent / "cooled" / "metrics.jsonl") if "train/loss" in row]
    assert rates == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4])
    assert "fork from" in output
    events = [row["event"] for row in rows(folder.parent / "cooled" / "events.jsonl")]
    assert "fork" in events
    shutil.rmtree(folder)  # once it has checkpoints of its own, a fork resumes them and needs its parent no more
    code, output = program("pretrain", config, *words, "run.name=same", f"init.from_run={folder}", "total_steps=7")
    assert code == 0 and "resume from" in output, output


def test_weights_alone_begin_at_step_zero_with_fresh_moments_and_the_average_as_weights(program, parent):  # noqa: F811
    config, folder, words = parent
    code, output = program("pretrain", config, *words, "run.name=child", f"init.weights={folder}", "total_steps=2",
                           "schedule.warmup_steps=1", "optimizer.lr=1e-30", "optimizer.weight_decay=0",
                           "optimizer.head_weight_decay=0")
    assert code == 0, output
    child = folder.parent / "child" / "step-00000002"
    assert TrainState(**read_manifest(child)["state"]) == TrainState(step=2, seen=32)
    ours, theirs = dict(assemble(child, which="weights")), dict(assemble(folder / "step-00000006", which="ema"))
    assert all(ours[name].equal(theirs[name]) for name in theirs)
    assert "loaded" in output


def test_fine_tuning_from_a_run_resizes_replaces_and_takes_over_the_picture_settings(program, parent):  # noqa: F811
    config, folder, words = parent
    code, output = program("finetune", config, *words, "run.name=tuned", f"init.weights={folder}", "model.img_size=48",
                           "model.num_classes=12", "total_steps=1", "schedule.warmup_steps=0")
    assert code == 0, output
    assert "4 x 4 -> 6 x 6" in output and "12 x 32, zero" in output
    manifest = read_manifest(folder.parent / "tuned" / "step-00000001")
    assert manifest["model_cfg"]["input_size"] == [3, 48, 48] and manifest["model_cfg"]["mean"] == [0.5, 0.5, 0.5]
    assert rows(folder.parent / "tuned" / "metrics.jsonl")[0]["train/loss"] == pytest.approx(2.4849, abs=1e-3)  # ln 12


def test_fine_tuning_without_weights_is_refused(program, tmp_path):  # noqa: F811
    config, _ = recipe(tmp_path)
    code, output = program("finetune", config)
    assert code == 1 and "init.weights" in output and "from_scratch=true" in output
