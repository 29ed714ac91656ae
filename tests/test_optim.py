"""Parameter groups and optimizers against the rules of the papers, spelled out by hand."""

import pytest
import torch
from torch import nn

from tubelet.engine.optim import build_optimizer, parameter_groups
from tubelet.engine.settings import OptimizerSettings
from tubelet.errors import ConfigError

CPU = torch.device("cpu")


def vit(**kwargs):
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(**{"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2,
                                "num_classes": 7, **kwargs})


def by_name(groups):
    """name -> (lr_scale, weight_decay); fails when a parameter stands in two groups."""
    found = {}
    for group in groups:
        assert len(group["params"]) == len(group["param_names"]) == len(group["lr_scales"]) > 0
        assert group["lr_scales"] == sorted(group["lr_scales"])  # one stretch for each scale
        for name, scale in zip(group["param_names"], group["lr_scales"]):
            assert name not in found
            found[name] = (scale, group["weight_decay"])
    return found


def test_vit_g_decays_head_and_body_apart_and_pooling_head_as_body():
    """Scaling ViT (2106.04560), section 3.1: head 3.0, body 0.03; no decay of biases, norms, positions and the probe."""
    module = vit(class_token=False, global_pool="map", reg_tokens=2)
    groups = parameter_groups(module, OptimizerSettings(lr=1, weight_decay=0.03, head_weight_decay=3.0))
    assert len(groups) == 3  # by what differs, not by layer
    found = by_name(groups)
    assert set(found) == {name for name, _ in module.named_parameters()}
    decayed = {name for name, (_, decay) in found.items() if decay}
    assert {name for name, (_, decay) in found.items() if decay == 3.0} == {"head.weight"}
    assert {"attn_pool.q.weight", "attn_pool.kv.weight", "attn_pool.mlp.fc1.weight", "patch_embed.proj.weight",
            "blocks.2.attn.qkv.weight"} <= decayed
    assert not {"attn_pool.latent", "pos_embed", "reg_token", "norm.weight", "head.bias", "blocks.0.norm1.weight"} & decayed
    for group in groups:
        assert [dict(module.named_parameters())[name] is param
                for name, param in zip(group["param_names"], group["params"])] == [True] * len(group["params"])


def test_layer_decay_is_a_power_of_the_layers_above():
    """0.75 per layer as BEiT / MAE: head 1, last block and norm 0.75 ** 1 ... stem 0.75 ** 4 for three blocks."""
    groups = parameter_groups(vit(), OptimizerSettings(lr=1, weight_decay=0.1, layer_decay=0.75))
    found = {name: scale for name, (scale, _) in by_name(groups).items()}
    expected = {"head.weight": 1, "norm.bias": 0.75, "blocks.2.mlp.fc2.weight": 0.75, "blocks.1.norm1.bias": 0.75**2,
                "blocks.0.attn.qkv.weight": 0.75**3, "patch_embed.proj.bias": 0.75**4, "cls_token": 0.75**4,
                "pos_embed": 0.75**4}
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    assert len(groups) == 2  # decayed or not: the scale makes no groups


def test_undecayed_names_of_a_model_inside_a_model_count():
    class Video(nn.Module):
        def __init__(self):
            super().__init__()
            self.spatial = vit()
            self.table = nn.Embedding(4, 16)

        def no_weight_decay(self):
            return {"table.weight"}

        def forward(self, x):
            return x

    found = by_name(parameter_groups(Video(), OptimizerSettings(lr=1, weight_decay=0.1)))
    assert found["spatial.pos_embed"] == found["table.weight"] == (1, 0) and found["spatial.head.weight"] == (1, 0.1)


def test_frozen_patterns_leave_the_rest_and_drop_empty_groups():
    module = vit()
    settings = OptimizerSettings(lr=1, weight_decay=0.1, frozen=["^(patch_embed|blocks|norm)", "pos_embed", "cls_token"])
    groups = parameter_groups(module, settings)
    assert [group["param_names"] for group in groups] == [["head.weight"], ["head.bias"]]
    assert {name for name, param in module.named_parameters() if param.requires_grad} == {"head.weight", "head.bias"}


def test_wrong_patterns_and_heads_are_reported_together():
    settings = OptimizerSettings(lr=1, frozen=["^patch_embd", "blocks.("], head_weight_decay=3, layer_decay=0.5)
    with pytest.raises(ConfigError) as caught:
        parameter_groups(nn.Sequential(nn.Linear(2, 2)), settings)
    for part in ("'^patch_embd' matches none", "'blocks.(' is not a regular expression", "head_weight_decay is 3",
                 "no classifier", "no group_matcher"):
        assert part in str(caught.value)
    with pytest.raises(ConfigError, match="all of them are frozen"):
        parameter_groups(vit(), OptimizerSettings(lr=1, frozen=["."]))


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd", "lion"])
def test_decay_is_decoupled_and_relative_to_the_learning_rate(name):
    """One step with zero gradient shrinks the head by lr * 3.0, the body by lr * 0.03 and nothing else."""
    module = vit()
    before = {key: value.clone() for key, value in module.state_dict().items()}
    settings = OptimizerSettings(name=name, lr=0.1, weight_decay=0.03, head_weight_decay=3.0)
    optimizer = build_optimizer(parameter_groups(module, settings), settings, CPU)
    for param in module.parameters():
        param.grad = torch.zeros_like(param)
    optimizer.step()
    after = module.state_dict()
    factor = {"head.weight": 1 - 0.1 * 3.0, "blocks.0.mlp.fc1.weight": 1 - 0.1 * 0.03, "pos_embed": 1.0, "norm.weight": 1.0}
    for key, value in factor.items():
        torch.testing.assert_close(after[key], before[key] * value, rtol=1e-6, atol=0)


def test_settings_reach_the_optimizer():
    groups = parameter_groups(vit(), OptimizerSettings(lr=1))
    adamw = build_optimizer(groups, OptimizerSettings(lr=2, betas=(0.8, 0.95), eps=1e-6), CPU)
    assert (adamw.defaults["lr"], adamw.defaults["betas"], adamw.defaults["eps"]) == (2, (0.8, 0.95), 1e-6)
    fresh = parameter_groups(vit(), OptimizerSettings(lr=1))
    sgd = build_optimizer(fresh, OptimizerSettings(name="sgd", lr=1, momentum=0.7), CPU)
    assert sgd.defaults["momentum"] == 0.7 and not sgd.defaults["nesterov"]
    fresh = parameter_groups(vit(), OptimizerSettings(lr=1))
    lion = build_optimizer(fresh, OptimizerSettings(name="lion", lr=1, betas=(0.95, 0.98)), CPU)
    assert lion.defaults["betas"] == (0.95, 0.98)
    assert all({"name", "weight_decay", "param_names"} <= set(group) for group in lion.param_groups)
