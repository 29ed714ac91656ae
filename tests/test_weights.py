"""Loading weights: what is explained is reported, what is not is one error, and nothing is loaded then."""

import json

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed

from tubelet.errors import CheckpointError
from tubelet.models.build import build_model, hub_config
from tubelet.models.settings import ModelSettings
from tubelet.models.weights import load_weights, read_weights

SMALL = {"embed_dim": 24, "depth": 3, "num_heads": 2, "patch_size": 8}
GAP = {"class_token": False, "global_pool": "avg", "fc_norm": False}


def vit(img_size=32, classes=5, seed=0, name="ViT-B/16", **kwargs):
    settings = ModelSettings(name=name, img_size=img_size, num_classes=classes, kwargs={**SMALL, **kwargs})
    return build_model(settings, seed=seed)


def rows(report):
    return {(row.name, row.action): row.detail for row in report.rows}


def test_equal_models_load_bit_for_bit_and_the_table_folds_layers():
    source, model = vit(seed=1), vit(seed=2)
    wrapped = {f"module.model.{name}": tensor for name, tensor in source.state_dict().items()}
    report = load_weights(model, wrapped)
    assert all(torch.equal(tensor, source.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert len(report.names("loaded")) == len(source.state_dict()) == len(report.rows)
    assert ("blocks.*.attn.qkv.weight", 3, "loaded", "72 x 24") in report.folded()


def test_another_resolution_and_other_classes(capsys):
    source, model = vit(32, 5, seed=1), vit((48, 64), 7, seed=2)
    report = load_weights(model, source.state_dict(), method="bicubic_antialias", head_bias=-6.9)
    found = rows(report)
    assert found["pos_embed", "resized"] == "4 x 4 -> 6 x 8, bicubic_antialias"
    assert torch.equal(model.pos_embed, resample_abs_pos_embed(source.pos_embed, [6, 8], [4, 4], 1))
    assert not model.head.weight.any() and torch.equal(model.head.bias, torch.full((7,), -6.9))
    assert {("head.weight", "new"), ("head.weight", "dropped"), ("head.bias", "new")} <= set(found)
    report.show("weights from elsewhere")
    shown = capsys.readouterr().out
    assert "1 resized, 2 new, 2 dropped" in shown and "6 x 8" in shown and "x3" in shown


def test_a_table_that_is_not_square_needs_its_input_size():
    source, model = vit((32, 64), seed=1, **GAP), vit((64, 32), seed=2, **GAP)
    with pytest.raises(CheckpointError, match="pos_embed") as caught:
        load_weights(vit((48, 64), **GAP), source.state_dict())  # 32 patches are no square
    assert "input_size" in caught.value.hint
    report = load_weights(model, source.state_dict(), source={"input_size": (3, 32, 64)}, method="bilinear_align_corners")
    assert rows(report)["pos_embed", "resized"].startswith("4 x 8 -> 8 x 4")  # as many, but not the same ones


@pytest.mark.parametrize("head, classes, action", [("auto", 5, "loaded"), ("replace", 5, "new"), ("auto", 7, "new"),
                                                   ("keep", 5, "loaded")])
def test_the_head_is_kept_or_replaced_as_asked(head, classes, action):
    source, model = vit(classes=5, seed=1), vit(classes=classes, seed=2)
    assert ("head.weight", action) in rows(load_weights(model, source.state_dict(), head=head))
    assert torch.equal(model.head.weight, source.head.weight if action == "loaded" else torch.zeros(classes, 24))


def test_a_headless_source_a_headless_model_and_a_head_that_must_be_kept():
    source = vit(classes=5, seed=1).state_dict()
    body = {name: tensor for name, tensor in source.items() if not name.startswith("head")}
    assert ("head.weight", "new") in rows(load_weights(vit(classes=5), body))
    assert ("head.weight", "dropped") in rows(load_weights(vit(classes=0), source))
    with pytest.raises(CheckpointError, match="5 x 24 in the weights, 7 x 24 in the model") as caught:
        load_weights(vit(classes=7), source, head="keep")
    assert "init.head=replace" in str(caught.value)


def test_a_class_token_is_left_behind_by_a_model_without_one():
    source, model = vit(32, seed=1), vit(32, seed=2, **GAP)
    found = rows(load_weights(model, source.state_dict()))
    assert ("cls_token", "dropped") in found and ("pos_embed[0]", "dropped") in found
    assert torch.equal(model.pos_embed, source.pos_embed[:, 1:])
    with pytest.raises(CheckpointError, match="cls_token"):  # the other way round it would be untrained
        load_weights(source, model.state_dict())


def test_everything_unexplained_is_listed_at_once_and_nothing_is_loaded():
    state = vit(seed=1).state_dict()
    state = {name.replace("attn.qkv", "attn.qvk"): tensor for name, tensor in state.items()}
    state["norm.weight"], state["extra"] = torch.zeros(25), torch.zeros(2)
    del state["blocks.1.mlp.fc1.bias"]
    model = vit(seed=2, depth=5)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        load_weights(model, state)
    text = str(caught.value)
    for part in ("blocks.0.attn.qkv.weight", "is it their blocks.*.attn.qvk.*?", "`extra` of the weights",
                 "blocks.4.mlp.fc2.bias", "`blocks.1.mlp.fc1.bias` of the model", "25 in the weights, 24 in the model"):
        assert part in text, part
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_key_maps_and_named_exceptions_explain_the_rest():
    plain = vit(seed=1, **GAP)
    state = {f"net_{name}": tensor for name, tensor in plain.state_dict().items()} | {"step": torch.zeros(())}
    model = vit(seed=2, name="vit_base_patch16_tokenlearner8_v10_224", num_tokens=3)
    with pytest.raises(CheckpointError, match="token_learners"):
        load_weights(model, plain.state_dict())
    learner = {name: tensor.clone() for name, tensor in model.state_dict().items() if "token_learners" in name}
    report = load_weights(model, state, key_map=lambda name: None if name == "step" else name.removeprefix("net_"),
                          allow_new=[r"^token_learners\."])
    assert report.names("dropped") == ["step"] and set(report.names("new")) == set(learner)
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in {**learner, **plain.state_dict()}.items())


def test_weights_are_read_from_every_kind_of_file(tmp_path):
    settings = ModelSettings(name="ViT-B/16", img_size=32, num_classes=5, kwargs=SMALL)
    model = build_model(settings, seed=1)
    state = model.state_dict()
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir(), parts.mkdir()
    save_file(state, whole / "model.safetensors")
    (whole / "config.json").write_text(json.dumps(hub_config(model, settings)))
    places = {name: f"model-{'head' in name:05d}.safetensors" for name in state}
    for file in set(places.values()):
        save_file({name: state[name] for name in state if places[name] == file}, parts / file)
    (parts / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    torch.save({"model": state, "epoch": 3}, tmp_path / "a.pth")
    ema = {name: tensor + 1 for name, tensor in state.items()}
    torch.save({"state_dict": state, "model_ema": {"state_dict": ema}}, tmp_path / "b.pth")
    for spec in (whole, whole / "model.safetensors", parts, tmp_path / "a.pth"):
        found, cfg = read_weights(str(spec))
        assert found.keys() == state.keys() and all(torch.equal(found[name], state[name]) for name in state), spec
        if spec == whole:
            assert cfg["input_size"] == [3, 32, 32] and cfg["num_classes"] == 5 and cfg["model_args"]["embed_dim"] == 24
            assert cfg["architecture"] == "vit_base_patch16_224"
    assert torch.equal(read_weights(str(tmp_path / "b.pth"))[0]["norm.bias"], ema["norm.bias"])
    assert torch.equal(read_weights(str(tmp_path / "b.pth"), ema=False)[0]["norm.bias"], state["norm.bias"])
    with pytest.raises(CheckpointError, match="no moving average"):
        read_weights(str(tmp_path / "a.pth"), ema=True)


def test_what_cannot_be_read_says_what_to_do(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../a.safetensors"}}))
    torch.save({"epoch": 3}, tmp_path / "a.pth")
    (tmp_path / "weights.h5").touch()
    (tmp_path / "empty").mkdir()
    for spec, problem, hint in [
            (f"{tmp_path}/b.pth", "do not exist", "a.pth"), (f"{tmp_path}/a.pth", "epoch", "safetensors"),
            (f"{tmp_path}/weights.h5", "no kind of weights", "timm:"), (f"{tmp_path}/empty", "holds nothing", "verify"),
            (str(tmp_path), "outside its folder", "export"), ("timm:vit_large_patch8_224", "no weights", "another"),
            ("timm:vit_base_patch16_224.augreg", "no weights", "timm:vit_base_patch16_224.augreg_in1k"),
            ("timm:vit_base_patch16_224.augreg_in21k", "could not be fetched",
             "huggingface.co/timm/vit_base_patch16_224.augreg_in21k")]:
        with pytest.raises(CheckpointError) as caught:
            read_weights(spec)
        assert problem in caught.value.problem and hint in caught.value.hint, spec


def test_a_swin_goes_to_another_window_as_timm_itself_would_take_it():
    small = {"depths": (1, 1), "embed_dim": 12, "num_heads": (1, 2), "num_classes": 3}
    source = timm.create_model("swin_tiny_patch4_window7_224", img_size=112, window_size=7, **small)
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.normal_(0, 0.1)
    ours, theirs = (timm.create_model("swin_tiny_patch4_window7_224", img_size=64, window_size=8, **small) for _ in range(2))
    report = load_weights(ours, source.state_dict())
    theirs.load_state_dict(timm.models.swin_transformer.checkpoint_filter_fn(source.state_dict(), theirs))
    assert {name.rpartition(".")[2] for name in report.names("resized")} == {"relative_position_bias_table"}
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert ours.eval()(x).equal(theirs.eval()(x))


def test_another_depth_names_both_numbers_and_another_patch_size_is_resampled_on_request():
    deep, flat, fine = (timm.create_model("vit_tiny_patch16_224", embed_dim=24, num_heads=2, **kwargs).eval() for kwargs in (
        {"depth": 3}, {"depth": 2}, {"depth": 2, "patch_size": 32, "img_size": 448}))
    with pytest.raises(CheckpointError, match="the weights have 3 blocks, the model 2"):
        load_weights(flat, deep.state_dict())
    with pytest.raises(CheckpointError, match="16 x 16 in the weights, 24 x 3 x 32 x 32 in the model") as caught:
        load_weights(fine, flat.state_dict())
    assert "init.patch_kernel=resample" in caught.value.hint
    assert load_weights(fine, flat.state_dict(), patch_kernel="resample").names("resized") == ["patch_embed.proj.weight"]
    x = torch.randn(1, 3, 224, 224)
    enlarged = torch.nn.functional.interpolate(x, scale_factor=2, mode="bicubic", antialias=False)
    with torch.no_grad():  # enlarged patches under the enlarged kernel say nearly the same
        a, b = flat.patch_embed(x), fine.patch_embed(enlarged)
    assert torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0) > 0.95
