"""An export is what timm loads, and gives the checkpoint's own answers."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from checkpoint_parts import SplitEngine, WholeEngine
from safetensors.torch import load_file

from tubelet import errors
from tubelet.dist import World
from tubelet.engine import checkpoint
from tubelet.models.build import build_model, hub_config, model_cfg
from tubelet.models.settings import ModelSettings

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
MODELS = {
    "vit": ModelSettings(name="vit_tiny_patch16_224", img_size=32, num_classes=5, mean=(0.1, 0.2, 0.3), crop_pct=0.77,
                         kwargs={"embed_dim": 24, "num_heads": 2, "depth": 2, "class_token": False, "global_pool": "avg"}),
    "batch norm": ModelSettings(name="resnet10t", img_size=32, num_classes=3),
    "tokenlearner": ModelSettings(name="vit_base_patch16_tokenlearner8_224", img_size=32, num_classes=5,
                                  kwargs={"embed_dim": 24, "num_heads": 2, "depth": 2}),
}


def trained(settings, run, *, with_hub_config=True):
    model = build_model(settings, seed=3)
    for part in model.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            part.running_mean.normal_(0, 0.1)
    engine = SplitEngine(model, World(), groups=(("head", 1e-3), ("", 1e-3))).train_a_little(5)
    ema = [flat.master * 0.9 for flat in engine.flats()]
    extra = {"config": {"model": settings.model_dump(mode="json")}, "model_cfg": model_cfg(model), "state": {"seen": 640}}
    if with_hub_config:
        extra["hub_config"] = hub_config(model, settings)
    return model.eval(), checkpoint.save(run, engine, step=10, ema=ema, extra=extra)


@torch.no_grad()
def logits(model):
    return model.eval()(X)


@pytest.mark.parametrize("name", MODELS)
def test_timm_loads_an_export_and_gives_equal_logits(tmp_path, one_thread, name):
    settings = MODELS[name]
    model, folder = trained(settings, tmp_path / "run")
    out = checkpoint.export(folder, tmp_path / "out", which="weights")
    loaded = timm.create_model(f"local-dir:{out}", pretrained=True)
    assert (logits(loaded) == logits(model)).all()
    for key, wanted in model_cfg(model).items():
        if key in ("mean", "std", "crop_pct", "interpolation", "num_classes", "input_size"):
            found = loaded.pretrained_cfg[key]
            assert (list(found) if isinstance(found, (list, tuple)) else found) == wanted, key
    another = timm.create_model(f"local-dir:{out}", pretrained=True, num_classes=7)  # as somebody fine-tunes it
    assert logits(another).shape == (2, 7)
    config = json.loads((out / "config.json").read_text())
    assert config["num_features"] == model.num_features and config["architecture"] == model_cfg(model)["architecture"]
    card = (out / "README.md").read_text()
    assert "after 10 steps, 640 samples" in card and 'timm.create_model("local-dir:' in card


def test_the_average_is_what_an_export_takes_unless_asked_otherwise(tmp_path, one_thread):
    model, folder = trained(MODELS["vit"], tmp_path / "run", with_hub_config=False)  # from the settings alone
    out = checkpoint.export(folder, tmp_path / "out")
    found, plain = load_file(out / "model.safetensors"), model.state_dict()
    assert list(plain) == list(json.loads((out / "model.safetensors").read_bytes()[8:].split(b"}}")[0] + b"}}"))[1:]
    assert all(torch.equal(found[name], plain[name] * 0.9) for name in plain)
    with torch.no_grad():
        for param in model.parameters():
            param.mul_(0.9)
    assert (logits(timm.create_model(f"local-dir:{out}", pretrained=True)) == logits(model)).all()


def test_bf16_and_many_files_hold_the_same_numbers(tmp_path):
    model, folder = trained(MODELS["batch norm"], tmp_path / "run")
    state = model.state_dict()
    out = checkpoint.export(folder, tmp_path / "out", which="weights", dtype="bf16")
    found = load_file(out / "model.safetensors")
    parameters = {name for name, _ in model.named_parameters()}
    for name, value in state.items():
        wanted = value.to(torch.bfloat16) if name in parameters else value  # statistics keep their digits
        assert found[name].dtype == wanted.dtype and torch.equal(found[name], wanted), name

    checkpoint.export(folder, out, which="weights", max_file_bytes=4_000_000)  # over the earlier one
    files = sorted(path.name for path in out.glob("*.safetensors"))
    assert len(files) > 3 and not (out / "model.safetensors").exists()
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((out / "model.safetensors.index.json").read_text())
    joined = {}
    for file in files:
        assert (out / file).stat().st_size < 4_100_000 or len(load_file(out / file)) == 1
        part = load_file(out / file)
        assert all(index["weight_map"][name] == file for name in part)
        joined |= part
    assert joined.keys() == state.keys() and all(torch.equal(joined[name], state[name]) for name in state)
    assert index["metadata"]["total_size"] == sum(value.numel() * value.element_size() for value in state.values())

    from tubelet.models.weights import read_weights  # what fine-tuning reads

    again, _ = read_weights(str(out))
    assert all(np.array_equal(again[name], state[name]) for name in state)


def test_what_cannot_be_exported_is_said(tmp_path):
    _, folder = trained(MODELS["vit"], tmp_path / "run")
    with pytest.raises(errors.CheckpointError, match="fp32 or bf16"):
        checkpoint.export(folder, tmp_path / "out", dtype="fp16")
    data = bytearray((folder / "rank-00000.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "rank-00000.safetensors").write_bytes(data)
    with pytest.raises(errors.CheckpointError, match="so it is not exported: rank-00000.safetensors is damaged"):
        checkpoint.export(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


MEASURE = """
import sys
from pathlib import Path
from tubelet.engine import checkpoint

def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024

run, out = Path(sys.argv[1]), Path(sys.argv[2])
checkpoint.export(run / "step-00000001", out / "small")  # everything is imported, every buffer that stays is there
before = peak()
checkpoint.export(run / "step-00000002", out / "large", dtype="bf16", max_file_bytes=150 * 10**6)
print(peak() - before)
"""


def test_exporting_needs_the_memory_of_a_few_tensors_not_of_the_model(tmp_path, one_thread):
    """25 tensors of 16 MiB, 400 MiB in all, written by one rank; the peak is the kernel's own count."""
    sizes = {"step-00000001": 8, "step-00000002": 2048}
    for name, size in sizes.items():
        module = torch.nn.ParameterDict({f"w{i}": torch.full((size, size), i / 8) for i in range(25)})
        engine = WholeEngine(module, lambda groups: torch.optim.AdamW(groups))
        checkpoint.save(tmp_path / "run", engine, step=int(name[-1]), ema=None, extra={"model_cfg": {"architecture": "net"}})
        del module, engine
    done = subprocess.run([sys.executable, "-c", MEASURE, str(tmp_path / "run"), str(tmp_path)],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    print(f"{int(done.stdout) / 2**20:.0f} MiB above the start")
    assert int(done.stdout) < 60 * 2**20
    index = json.loads((tmp_path / "large" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 25 * 2048 * 2048 * 2
    found = load_file(tmp_path / "large" / index["weight_map"]["w24"])["w24"]
    assert found.dtype == torch.bfloat16 and found.shape == (2048, 2048) and (found == 3).all()


def test_an_export_goes_to_a_folder_of_its_own_on_a_disk(tmp_path, one_thread, monkeypatch):
    from typer.testing import CliRunner

    from tubelet.engine.ckpt_cli import app

    _, folder = trained(MODELS["vit"], tmp_path / "run")
    (tmp_path / "run" / "README.md").write_text("the card of the run")
    monkeypatch.chdir(tmp_path)
    for out, why in (("s3://bucket/x", "is a URL"), (folder, "is itself a checkpoint"), ("run", "is the folder of a run")):
        for more in ([], ["--to", "deepspeed"]):
            done = CliRunner().invoke(app, ["export", "run", str(out), *more])
            assert done.exit_code and why in str(done.exception), done.output
    with pytest.raises(errors.CheckpointError, match="is a URL"):
        checkpoint.export(folder, Path("s3://bucket/x"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
    assert (tmp_path / "run" / "README.md").read_text() == "the card of the run"
