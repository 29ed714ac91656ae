"""`tubelet plan` as a user runs it: what it picks, what it says when nothing fits, what it refuses."""

import json
import subprocess
import sys

import pytest
from little_shards import write_shards
from programs import ROOT

from data_pipelines.indexing import build_index
from tubelet.console import run_app
from tubelet.engine.peaks import PEAK_TFLOPS, gpu_kind
from tubelet.errors import ConfigError
from tubelet.program.plan.calibrate import _on_one_rank
from tubelet.program.plan.cli import app, load_settings, program_of
from tubelet.program.plan.facts import facts_of
from tubelet.program.plan.gpus import GPUS, find_gpu
from tubelet.program.settings import parse_command

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
    found = in_json(capsys, *words, 2.13)[1]
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


def test_a_calibration_is_taken_for_its_gpu_and_its_job_alone(config, capsys):
    saved = {"gpu": "h100", "model": "vit_small_patch16_224", "mfu": 0.25, "device": "NVIDIA H100", "engine": "zero",
             "precision": "bf16", "input_shape": [3, 64, 64], "compile": None, "recompute": None}
    path = config.parent / "calibration.json"
    path.write_text(json.dumps(saved))
    mfu = in_json(capsys, config)[1]["speed"]["mfu"]
    assert mfu["value"] == 0.25 and "measured on NVIDIA H100" in mfu["source"]
    for words, why in ((["--gpu", "a100"], "gpu h100 there and a100 here"), (["precision=amp"], "precision bf16 there"),
                       (["model.img_size=96"], "input_shape 3 x 64 x 64 there and 3 x 96 x 96 here"),
                       (["compile={}"], "compile off there and backend=inductor"),
                       (["activation_checkpointing={mode: selective}"], "recompute off there and mode=selective")):
        other = in_json(capsys, config, *words)[1]
        assert "assumed" in other["speed"]["mfu"]["source"]
        assert any("is not taken" in note and why in note for note in other["notes"]), (words, other["notes"])
    assert in_json(capsys, config, "--mfu", "0.5")[1]["speed"]["mfu"]["value"] == 0.5
    path.write_text(json.dumps({key: saved[key] for key in ("gpu", "model", "mfu", "device")}))
    assert any("precision not recorded there" in note for note in in_json(capsys, config)[1]["notes"])


def test_mfu_is_what_a_run_logs_whether_blocks_are_recomputed_or_not(config, capsys):
    """A run divides the model's own FLOPs by time and peak (Meter.read), whatever it computes twice."""
    words = [config, "--gpu", "h100", "--gpus-per-node", 8, "model.name=ViT-B/16", "model.img_size=224", "--gpu-memory", 2.1]
    full = "activation_checkpointing={mode: full}"

    def predicted(*more):
        found = in_json(capsys, *words, *more)[1]
        assert found["chosen"]["recompute"], "memory is short: every one of these jobs recomputes"
        speed = found["speed"]
        seen = 256 * found["flops_per_sample"] / 8 / speed["compute"] / 989e12
        assert speed["mfu"]["value"] == pytest.approx(seen) and speed["hfu"] == pytest.approx(seen * 4 / 3)
        return seen, speed

    assumed, speed = predicted(full)
    assert speed["hfu"] == pytest.approx(0.32) and assumed == pytest.approx(0.24)
    assert predicted(full, "--mfu", 0.3)[0] == pytest.approx(0.3)
    less, speed = predicted("--mfu", 0.3)  # of a config that recomputes nothing, and this way does
    assert less == pytest.approx(0.3 * 3 / 4) and "recomputes more" in speed["mfu"]["source"]


def test_what_is_calibrated_is_the_configs_own_way(config):
    """Eighty GB would hold this model without recomputation and at stage 1: neither is a reason to measure that."""
    option = "activation_checkpointing={mode: %s}"
    for words, recompute, stage in ((["zero.stage=3", option % "full"], "full", 3), ([option % "selective"], "selective", 1),
                                    ([], None, 1)):
        settings = load_settings(parse_command([str(config), *words]))
        own = _on_one_rank(settings, facts_of(settings.model, settings.optimizer), GPUS["h100"])
        assert own.zero.stage == stage and (own.activation_checkpointing and own.activation_checkpointing.mode) == recompute
        assert own.micro_batch_size == 256 == own.global_batch_size, "the largest micro-batch that fits"
    settings = load_settings(parse_command([str(config), "micro_batch_size=32"]))
    own = _on_one_rank(settings, facts_of(settings.model, settings.optimizer), GPUS["h100"])
    assert (own.micro_batch_size, own.global_batch_size) == (32, 64), "the config's, where it has one"


def test_gpus_are_known_by_whole_words_of_their_names():
    names = {"NVIDIA H100 80GB HBM3": ("h100", 989), "NVIDIA H100 PCIe": ("h100-pcie", 756),
             "NVIDIA H100 NVL": ("h100-nvl", 835), "NVIDIA H200": ("h200", 989), "NVIDIA GH200 480GB": ("gh200", 990),
             "NVIDIA A100-SXM4-80GB": ("a100", 312), "NVIDIA A100 80GB PCIe": ("a100", 312),
             "NVIDIA A100-SXM4-40GB": ("a100-40", 312), "NVIDIA A100-PCIE-40GB": ("a100-40", 312),
             "NVIDIA L40": ("l40", 181), "NVIDIA L40S": ("l40s", 362), "NVIDIA L4": ("l4", 121), "NVIDIA A10": ("a10", 125),
             "NVIDIA B200": ("b200", 2250), "NVIDIA GeForce RTX 4090": ("rtx4090", 165),
             "Tesla V100-SXM2-32GB": ("v100", 125)}
    for name, (kind, peak) in names.items():
        assert gpu_kind(name) == kind and PEAK_TFLOPS[kind] == peak == find_gpu(kind).peak_tflops, name
    for name in ("NVIDIA H20", "NVIDIA A10G", "NVIDIA GeForce RTX 4090 D", "NVIDIA H100 80GB HBM3 MIG 1g.10gb"):
        assert gpu_kind(name) is None, name


def test_local_shards_give_lanes_bytes_and_the_length_of_an_epoch(config, capsys):
    words = ["data.train=made-up:photos?n=512&size=40&classes=10", "total_steps=null", "epochs=4", "--gpus-per-node", 2]
    found = in_json(capsys, config, *words)[1]
    assert found["total_steps"] == 4 * 512 // 256 and found["data"]["lanes"] >= 1
    assert found["feed"]["bytes_per_second"] > 0


def test_shards_without_an_index_are_not_scanned_but_said(config, capsys, monkeypatch):
    write_shards(config.parent / "shards", [4, 4])
    monkeypatch.setenv("TUBELET_CACHE", str(config.parent / "cache"))
    words = ["data.train=shards/shard-{0000..0001}.tar", "--gpus-per-node", 2]
    found = in_json(capsys, config, *words)[1]
    assert found["data"] is None and not list(config.parent.rglob("*.idx")), "a scan of the shards that nobody asked for"
    note = next(note for note in found["notes"] if "have no index" in note)
    assert "tubelet data index 'shards/shard-{0000..0001}.tar'" in note, note
    build_index(["shards"])
    assert in_json(capsys, config, *words)[1]["data"]["lanes"] >= 1


def test_calibrate_measures_the_real_loop_and_what_it_holds(config, tmp_path):
    words = ["plan", str(config), "activation_checkpointing={mode: full}", "--calibrate", "--seconds", "1", "--json"]
    done = subprocess.run([sys.executable, "-m", "tubelet.cli", *words], capture_output=True, text=True, cwd=tmp_path,
                          env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin",
                               "CUDA_VISIBLE_DEVICES": ""}, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert found["steps"] >= 1 and found["samples_per_second"] > 0 and found["mfu"] is None
    assert found["recompute"] == {"mode": "full", "every": 1} and found["compile"] is None
    assert found["precision"] == "fp32" and found["input_shape"] == [3, 64, 64] and found["engine"] == "zero"
    assert found["state_bytes"] == pytest.approx(found["predicted_state_bytes"], rel=0.01)
    assert json.loads((tmp_path / "calibration.json").read_text()) == found
