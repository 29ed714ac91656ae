"""`tubelet plan` as a user runs it: what it picks, what it says when nothing fits, what it refuses."""

import json
import subprocess
import sys

import pytest
from programs import ROOT

from tubelet.console import run_app
from tubelet.errors import ConfigError
from tubelet.program.plan.cli import app, program_of
from tubelet.program.plan.gpus import GPUS, find_gpu

RECIPE = """\
run: {name: r, dir: runs}
model: {name: vit_small_patch16_224, img_size: 64, num_classes: 10}
data: {train: "nowhere/x-{000..009}.tar", workers: 2}
total_steps: 1000
global_batch_size: 256
optimizer: {name: adamw, lr: 1.0e-3}
"""


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


def plan(capsys, *words):
    """(exit code, standard output, standard error) of `tubelet plan`."""
    code = run_app(app, [str(word) for word in words], "tubelet plan")
    return code, *capsys.readouterr()


def in_json(capsys, *words):
    code, out, err = plan(capsys, *words, "--json")
    assert not err, err
    return code, json.loads(out)


def test_a_model_that_fits_is_given_the_smallest_stage_and_the_whole_share(config, capsys):
    code, found = in_json(capsys, config, "--nodes", 2, "--gpus-per-node", 4, "--gpu", "a100")
    chosen = found["chosen"]
    assert code == 0 and chosen["stage"] == 1 and chosen["recompute"] is None and chosen["micro_batch_size"] == 256 // 8
    assert found["overrides"] == "micro_batch_size=32 zero.stage=1"
    assert [option["name"] for option in found["options"]] == [
        f"ZeRO-{stage}{more}" for more in ("", " + recomputation") for stage in (1, 2, 3)]
    # by hand: 21.7 M parameters (ViT-S at 64 pixels with 10 classes), 2 bytes each and 12 / 8 of fp32 state
    numel = found["parameters"]
    assert chosen["state_bytes"]["total"] == pytest.approx(numel * (2 + 12 / 8), rel=0.01)
    assert chosen["precision"] == "bf16"
    # 1000 steps of 256 samples at the assumed share of the peak, on 8 GPUs, and what travels
    speed = found["speed"]
    ideal = 256 * found["flops_per_sample"] / (8 * 312e12 * speed["mfu"]["value"])
    assert speed["compute"] == pytest.approx(ideal, rel=1e-6) and "assumed" in speed["mfu"]["source"]
    assert found["seconds"] == pytest.approx(1000 * (ideal + speed["exposed"]), rel=1e-6)
    assert any("nowhere/ of source `main` is not here" in note for note in found["notes"])


def test_the_tables_are_readable_at_a_hundred_columns_and_name_every_stage(config, capsys):
    code, out, _ = plan(capsys, config, "--gpu", "h100", "model.name=ViT-B/16")
    assert code == 0 and max(map(len, out.splitlines())) <= 104
    for word in ("ZeRO-1", "ZeRO-3 + recomputation", "images/s", "assumed", "checkpoint", "Take: micro_batch_size=",
                 "cores"):
        assert word in out, word


def test_when_memory_is_short_recomputation_or_a_higher_stage_is_picked_and_the_reason_said(config, capsys):
    words = [config, "--gpu", "h100", "--gpus-per-node", 8, "model.name=ViT-B/16", "model.img_size=224", "--gpu-memory"]
    found = in_json(capsys, *words, 2.1)[1]
    chosen = found["chosen"]
    assert chosen["recompute"] and chosen["stage"] == 2 and chosen["micro_batch_size"] >= 8
    assert "activation_checkpointing='{mode: full}'" in found["overrides"]
    assert any("ZeRO-1 leaves room for a micro-batch of" in reason for reason in found["reasons"])
    code, found = in_json(capsys, *words, 1.95)
    chosen, options = found["chosen"], {option["name"]: option for option in found["options"]}
    assert code == 0 and chosen["stage"] > 1
    assert chosen["peak_bytes"] <= found["budget_bytes"] < options["ZeRO-1"]["peak_bytes"]
    assert any("ZeRO-1 does not fit" in reason for reason in found["reasons"])


def test_when_nothing_fits_it_says_how_much_is_missing_and_leaves_with_one(config, capsys):
    code, out, _ = plan(capsys, config, "--gpu", "l4", "--gpu-memory", "2", "--gpus-per-node", 1, "model.name=ViT-B/16",
                        "model.img_size=224")
    assert code == 1
    out = " ".join(out.split())  # as one line
    assert "Nothing fits" in out and "GiB more than" in out and "What would help" in out and "Take:" not in out


def test_what_cannot_be_is_refused_as_a_run_would(config, capsys):
    cases = [(["--gpu", "h10"], "h10 is not in the table"), (["--gpus-per-node", 7], "7 ranks"),
             (["optimizer.nme=x"], "optimizer.name"), (["precision=bf16", "--gpu", "v100"], "bf16"),
             (["optimizer.name=lamb"], "engine=plain"), (["--margin", "1.5"], "--margin"),
             (["--program", "pretrian"], "pretrain"), (["--nodez", 3], "nodez")]
    for words, expected in cases:
        code, _, err = plan(capsys, config, *words)
        assert code and expected in err and "Try" in err, (words, err)
    with pytest.raises(ConfigError, match="h20 is not in the table") as caught:
        find_gpu("h20")
    assert "h200" in caught.value.hint
    assert find_gpu("H200").memory_gib > 139 and find_gpu("a100-80") is GPUS["a100"]


def test_the_plain_engine_and_finetuning_are_planned_too(config, capsys):
    code, found = in_json(capsys, config, "engine=plain", "optimizer.name=lamb", "--gpus-per-node", 2)
    assert code == 0 and found["chosen"]["precision"] == "amp" and found["overrides"] == "micro_batch_size=128"
    config.write_text(RECIPE + "init: {weights: runs/x}\n")
    assert program_of(str(config)) == "finetune"
    assert plan(capsys, config, "--json")[0] == 0


def test_a_calibration_is_taken_for_its_gpu_and_model_alone(config, capsys):
    saved = {"gpu": "h100", "model": "vit_small_patch16_224", "mfu": 0.25, "device": "NVIDIA H100"}
    (config.parent / "calibration.json").write_text(json.dumps(saved))
    mfu = in_json(capsys, config)[1]["speed"]["mfu"]
    assert mfu["value"] == 0.25 and "measured on NVIDIA H100" in mfu["source"]
    other = in_json(capsys, config, "--gpu", "a100")[1]
    assert "assumed" in other["speed"]["mfu"]["source"] and any("is not taken" in note for note in other["notes"])
    assert in_json(capsys, config, "--mfu", "0.5")[1]["speed"]["mfu"]["value"] == 0.5


def test_local_shards_give_lanes_bytes_and_the_length_of_an_epoch(config, capsys):
    words = ["data.train=made-up:photos?n=512&size=40&classes=10", "total_steps=null", "epochs=4", "--gpus-per-node", 2]
    found = in_json(capsys, config, *words)[1]
    assert found["total_steps"] == 4 * 512 // 256 and found["data"]["lanes"] >= 1
    assert found["feed"]["bytes_per_second"] > 0


def test_calibrate_measures_the_real_loop_and_what_it_holds(config, tmp_path):
    words = ["plan", str(config), "--calibrate", "--seconds", "1", "--json"]
    done = subprocess.run([sys.executable, "-m", "tubelet.cli", *words], capture_output=True, text=True, cwd=tmp_path,
                          env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin",
                               "CUDA_VISIBLE_DEVICES": ""}, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert found["steps"] >= 1 and found["samples_per_second"] > 0 and found["mfu"] is None
    assert found["state_bytes"] == pytest.approx(found["predicted_state_bytes"], rel=0.01)
    assert json.loads((tmp_path / "calibration.json").read_text()) == found
