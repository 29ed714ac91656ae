"""Official layouts: written as the authors' code names them, read from any of their conventions, wrong ones refused.

The independent answers are timm's own readers of the published JAX files, and names written out by hand.
"""

import re

import numpy as np
import pytest
import timm
import torch
from sinfill import sinfill, sinin

import tubelet.models
from tubelet.errors import CheckpointError
from tubelet.models import load_official, official_state_dict
from tubelet.models.build import build_meta, build_model
from tubelet.models.settings import ModelSettings
from tubelet.models.vit import HEADS
from tubelet.models.weights import load_weights, read_weights

SMALL = {"embed_dim": 24, "depth": 2, "num_heads": 3, "patch_size": 8}
TOKENS = "vit_base_patch16_tokenlearner8"


def make(name="vit_base_patch16_224", seed=0, img_size=32, classes=5, **kwargs):
    settings = ModelSettings(name=name, img_size=img_size, num_classes=classes, kwargs={**SMALL, **kwargs})
    return build_model(settings, seed=seed)


def equal(model, other):
    own, state = model.state_dict(), other.state_dict()
    return own.keys() == state.keys() and all(torch.equal(own[name], state[name]) for name in own)


MODELS = {
    "class token": lambda seed: make(seed=seed),
    "average": lambda seed: make(seed=seed, **HEADS["gap"]),
    "map": lambda seed: make(seed=seed, **HEADS["map"]),
    "no classifier": lambda seed: make(seed=seed, classes=0),
    "TokenLearner 1.0": lambda seed: make(f"{TOKENS}_v10_224", seed, num_tokens=3),
    "TokenLearner 1.1": lambda seed: make(f"{TOKENS}_224", seed, num_tokens=3),
    "1.1 with fuser": lambda seed: make(f"{TOKENS}_fuser_224", seed, num_tokens=3, depth=3),
    "1.0 with fuser": lambda seed: make(f"{TOKENS}_v10_fuser_224", seed, num_tokens=3),
    "hybrid": lambda seed: timm.create_model("vit_small_r26_s32_224", embed_dim=24, depth=1, num_heads=3, num_classes=5),
    "hybrid, stem alone": lambda seed: timm.create_model("vit_tiny_r_s16_p8_224", depth=1, num_classes=5),
    "BiT": lambda seed: timm.create_model("resnetv2_50x1_bit", num_classes=5),
    "layer scale": lambda seed: make(seed=seed, init_values=0.1),
    "DeiT": lambda seed: timm.create_model("deit_tiny_distilled_patch16_224", depth=1),
    "other": lambda seed: timm.create_model("resnet10t", num_classes=3),
}


@pytest.mark.parametrize("kind", MODELS)
def test_writing_and_loading_are_inverse(kind):
    source, model = MODELS[kind](1), MODELS[kind](2)
    filled = sinfill(official_state_dict(source))
    load_official(source, filled)
    again = official_state_dict(source)
    assert all(torch.equal(again[key], filled[key]) for key in filled)
    report = load_official(model, again)
    names = [name for name in model.state_dict() if not name.endswith("num_batches_tracked")]
    assert equal(model, source) and set(names) <= set(report.names("loaded"))


@pytest.mark.parametrize("kind", ["class token", "average", "map", "hybrid", "hybrid, stem alone", "BiT"])
@pytest.mark.parametrize("layout", ["vision_transformer", "big_vision"])
def test_timms_reader_of_the_published_files_reads_what_is_written(kind, layout, tmp_path):
    source, model = MODELS[kind](1), MODELS[kind](2)
    load_official(source, sinfill(official_state_dict(source)))
    state = official_state_dict(source, layout)
    np.savez(tmp_path / "w.npz", **{key: tensor.numpy() for key, tensor in state.items()})  # type: ignore[arg-type]
    model.load_pretrained(str(tmp_path / "w.npz"))  # type: ignore[operator]
    assert equal(model, source)


def test_a_published_file_is_read_as_initial_weights(tmp_path):
    source, model = make(seed=1, img_size=48), make(seed=2, img_size=32, classes=7)
    state = {f"opt/target/{key}": tensor.numpy() for key, tensor in official_state_dict(source).items()}
    state["opt/state/step"] = np.zeros(())
    np.savez(tmp_path / "w.npz", **state)
    found, cfg = read_weights(str(tmp_path / "w.npz"))
    report = load_weights(model, found, source=cfg, method="bilinear_align_corners")
    assert report.names("resized") == ["pos_embed"] and "opt/state/step" in report.names("dropped")
    assert torch.equal(model.blocks[1].attn.qkv.weight, source.blocks[1].attn.qkv.weight)
    expected = make(seed=3, img_size=32, classes=7)
    load_weights(expected, source.state_dict(), method="bilinear_align_corners")
    assert equal(model, expected)
    half = torch.randn(3, 5).to(torch.bfloat16)
    np.savez(tmp_path / "b.npz", w=half.view(torch.int16).numpy().view("V2"))
    assert torch.equal(read_weights(str(tmp_path / "b.npz"))[0]["w"], half)


def test_stacked_blocks_and_tables_without_class_row_load():
    source, model = make(seed=1), make(seed=2)
    with torch.no_grad():
        source.pos_embed[:, 0] = 0
    state = official_state_dict(source, "big_vision")
    assert not any("LayerNorm_2" in key or "MlpBlock_3" in key for key in state)
    names = [key.replace("_0/", "/", 1) for key in state if "encoderblock_0/" in key]
    for name in names:
        parts = [name.replace("encoderblock/", f"encoderblock_{i}/") for i in range(2)]
        state[name] = torch.stack([state.pop(part) for part in parts])
    state["pos_embedding"] = state["pos_embedding"][:, 1:]
    report = load_official(model, {f"params/{key}": tensor for key, tensor in state.items()})
    assert equal(model, source) and "pos_embed[0]" in report.names("new")


def test_the_representation_layer_takes_its_classifier_along():
    state = official_state_dict(make(seed=1)) | {"pre_logits/kernel": torch.ones(24, 24), "pre_logits/bias": torch.ones(24)}
    model = make(seed=2)
    report = load_official(model, state)
    assert {"pre_logits/kernel", "head/kernel"} <= set(report.names("dropped")) and not model.head.weight.any()


def test_names_and_shapes_are_the_authors():
    vit = official_state_dict(build_meta(ModelSettings(name="ViT-B/16")))
    attention = "Transformer/encoderblock_11/MultiHeadDotProductAttention_1"
    expected = {"embedding/kernel": [16, 16, 3, 768], "embedding/bias": [768], "cls": [1, 1, 768],
                "Transformer/posembed_input/pos_embedding": [1, 197, 768], f"{attention}/query/kernel": [768, 12, 64],
                f"{attention}/value/bias": [12, 64],
                f"{attention}/out/kernel": [12, 64, 768], f"{attention}/out/bias": [768],
                "Transformer/encoderblock_3/LayerNorm_2/scale": [768],
                "Transformer/encoderblock_0/MlpBlock_3/Dense_0/kernel": [768, 3072], "Transformer/encoder_norm/bias": [768],
                "head/kernel": [768, 1000]}
    assert {key: list(vit[key].shape) for key in expected} == expected
    assert len(vit) == 8 + 12 * 16 and sum(tensor.numel() for tensor in vit.values()) == 86_567_656
    giant = official_state_dict(build_meta(ModelSettings(name="g/14", num_classes=0, kwargs=HEADS["map"])))
    expected = {"MAPHead_0/probe": [1, 1, 1408], "pos_embedding": [1, 256, 1408],
                "MAPHead_0/MultiHeadDotProductAttention_0/key/kernel": [1408, 16, 88],
                "MAPHead_0/MlpBlock_0/Dense_1/kernel": [6144, 1408],
                "Transformer/encoderblock_39/MultiHeadDotProductAttention_0/out/kernel": [16, 88, 1408]}
    assert {key: list(giant[key].shape) for key in expected} == expected
    fused = official_state_dict(build_meta(ModelSettings(name=f"{TOKENS}_v10_fuser_224")))
    expected = {"Transformer/TokenLearnerModule_5/Conv_0/kernel": [3, 3, 768, 8],
                "Transformer/TokenLearnerModule_0/LayerNorm_0/scale": [768],
                "Transformer/TokenFuser_5/Dense_0/kernel": [8, 8],
                "Transformer/TokenFuser_0/fuser_mix_norm2/bias": [768], "output_projection/kernel": [768, 1000],
                "Transformer/TokenFuser_3/token_masking/Dense_1/kernel": [64, 8]}
    assert {key: list(fused[key].shape) for key in expected} == expected
    newer = official_state_dict(build_meta(ModelSettings(name=f"{TOKENS}_224")))
    assert list(newer["Transformer/TokenLearnerModuleV11_0/token_masking/Dense_0/kernel"].shape) == [768, 64]


def test_what_does_not_fit_is_named_with_both_numbers():
    model = make(seed=1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    wrong = {
        "3 blocks, the model has 2": official_state_dict(make(depth=3)),
        "4 heads, the model has 3": official_state_dict(make(num_heads=4)),
        "3 x 16 x 16 in the weights, 24 x 3 x 8 x 8 in the model": official_state_dict(make(patch_size=16, img_size=64)),
        "out/kernel` is not in the weights": {key: value for key, value in official_state_dict(model).items()
                                              if "encoderblock_1/MultiHeadDotProductAttention_1/query/kernel" not in key},
        "norm.weight` of the model: not in": {key: value for key, value in official_state_dict(model).items()
                                              if key != "Transformer/encoder_norm/scale"},
        "conv_root/kernel` of the weights: not": official_state_dict(model) | {"conv_root/kernel": torch.zeros(7, 7, 3, 2)},
    }
    for text, state in wrong.items():
        text = text.replace("out/kernel", "query/kernel")
        with pytest.raises(CheckpointError, match=re.escape(text)):
            load_official(model, state)
    with pytest.raises(CheckpointError, match="resnet10t does not have"):
        load_official(timm.create_model("resnet10t"), official_state_dict(model))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_model_that_knows_its_layout_is_asked():
    class Knowing(torch.nn.Linear):
        def official_state_dict(self):
            return {"w": self.weight.detach().T}

        def load_official(self, state):
            self.weight.data.copy_(state["w"].T)

    model = Knowing(2, 3, bias=False)
    filled = sinin(2, 3)
    report = tubelet.models.load_official(model, {"w": filled})
    assert torch.equal(tubelet.models.official_state_dict(model)["w"], filled) and report.names("loaded") == ["w"]
