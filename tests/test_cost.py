"""Multiply-adds by arithmetic against the papers' tables and formulas."""

import pytest
import timm
import torch
from typer.testing import CliRunner

from tubelet.models.build import build_meta
from tubelet.models.cli import app
from tubelet.models.cost import activation_bytes, flops_per_sample_training, input_shape, macs
from tubelet.models.names import TOKEN_LEARNERS, token_learner_name
from tubelet.models.settings import ModelSettings
from tubelet.models.vit import HEADS


def cost(name: str, img_size: int, **kwargs) -> int:
    return macs(build_meta(ModelSettings(name=name, img_size=img_size, **kwargs)), img_size)


def formula(width, depth, mlp, patch, size, classes=1000, prefix=1):
    """The ViT paper's arithmetic: patches, projections and MLP, both products of attention, classifier."""
    patches = (size // patch) ** 2
    n = patches + prefix
    return (patches * 3 * patch**2 * width + depth * (n * (4 * width**2 + 2 * width * mlp) + 2 * n * n * width)
            + width * classes)


def test_plain_vits_cost_what_the_formula_and_the_published_table_say():
    published = {  # GMACs of one forward pass (computed; timm's fvcore counts agree to 0.3 %)
        ("ViT-Ti/16", 224): 1.26, ("ViT-Ti/16", 384): 4.68, ("ViT-S/32", 224): 1.15, ("ViT-S/16", 384): 15.49,
        ("ViT-B/32", 384): 13.04, ("ViT-B/16", 224): 17.57, ("ViT-B/16", 384): 55.48, ("ViT-L/32", 384): 45.3,
        ("ViT-L/16", 224): 61.56, ("ViT-L/16", 512): 361.99, ("ViT-H/14", 518): 1016.7}
    sizes = {"Ti": (192, 12, 768), "S": (384, 12, 1536), "B": (768, 12, 3072), "L": (1024, 24, 4096), "H": (1280, 32, 5120)}
    for (name, size), gmacs in published.items():
        letter, patch = name[4:].split("/")
        found = cost(name, size)
        assert found == formula(*sizes[letter], int(patch), size)
        assert found / 1e9 == pytest.approx(gmacs, rel=0.01), (name, size)
    assert cost("ViT-G/14", 518) == formula(1664, 48, 8192, 14, 518)


def test_scaling_paper_costs_twice_our_macs_without_its_head():
    published = {("g/14", 224): 531.93, ("g/14", 384): 1592.42, ("G/14", 224): 963.65, ("G/14", 384): 2854.30,
                 ("s/28", 224): 0.71, ("B/28", 384): 30.37, ("L/16", 384): 381.41}  # 384 / 14 = 27 patches, 6 pixels unused
    for (name, size), gflops in published.items():
        found = 2 * cost(name, size, num_classes=0, kwargs=HEADS["gap"]) / 1e9
        assert found == pytest.approx(gflops, rel=1e-3, abs=0.005), (name, size)
    with_map = 2 * cost("G/14", 224, num_classes=0, kwargs=HEADS["map"]) / 1e9
    assert with_map == pytest.approx(966.55, rel=1e-4)


def test_exaflops_of_the_vit_papers_table_6():
    published = [("B/32", 7, 55), ("B/16", 7, 224), ("L/32", 7, 196), ("L/16", 14, 1567), ("H/14", 14, 4262)]
    for name, epochs, exaflops in published:
        model = build_meta(ModelSettings(name=name, num_classes=18_291))
        assert flops_per_sample_training(model) * 303e6 * epochs / 1e18 == pytest.approx(exaflops, rel=0.025)


def test_every_tokenlearner_of_the_papers_tables_costs_what_it_published():
    for row in TOKEN_LEARNERS:
        if row.gmacs:
            found = cost(token_learner_name(row, "1.0"), row.img_size) / 1e9
            assert found == pytest.approx(row.gmacs, rel=0.01), row.paper
    computed = {"vit_base_patch16_tokenlearner8_v10_224": (384, 28.24),
                "vit_base_patch16_tokenlearner16_v10_fuser_224": (384, 29.21),
                "vit_large_patch16_tokenlearner8_at18_d30_v10_224": (512, 272.7),
                "vit_small_patch32_tokenlearner8_d22_v10_224": (384, 3.31),
                "vit_large_patch10_tokenlearner16_at18_d35_v10_fuser_224": (512, 853.9),
                "vit_large_patch8_tokenlearner16_at18_d35_v10_224": (512, 1551)}
    for name, (size, gmacs) in computed.items():
        assert cost(name, size) / 1e9 == pytest.approx(gmacs, rel=1e-3 if gmacs > 4 else 2e-3), name


def test_counting_leaves_a_real_model_alone_and_knows_resnets():
    model = timm.create_model("resnet50").train()
    before = model.conv1.weight.clone()
    assert round(macs(model, 224) / 1e9, 2) == 4.09  # as torchvision publishes it
    assert macs(model, 448) / macs(model, 224) == pytest.approx(4, rel=1e-3)
    assert model.training and torch.equal(model.conv1.weight, before) and model.conv1.weight.requires_grad
    assert model.bn1.num_batches_tracked == 0
    assert input_shape(model, (96, 64)) == (3, 96, 64)


def test_the_command_lists_models_and_costs():
    run = CliRunner().invoke(app, ["small_patch32_tokenlearner8_d22"])
    assert run.exit_code == 0 and "vit_small_patch32_tokenlearner8_d22_v10_224" in run.output
    run = CliRunner().invoke(app, ["--cost", "ViT-L/16", "--img-size", "512"])
    assert "361.99 GMACs" in run.output and "vit_large_patch16_224" in run.output
    assert "723.97 GFLOPs (2 per MAC)" in run.output and "MiB with activation_checkpointing" in run.output


def saved_by_autograd(model, shape: tuple[int, ...], batch: int) -> int:
    """Bytes that a real forward pass on the CPU (whose attention is fused too) leaves saved, beside the weights."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    saved: dict[int, torch.Tensor] = {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logits = model(torch.randn(batch, *shape))
    assert logits.requires_grad
    return sum(tensor.untyped_storage().nbytes() for key, tensor in saved.items() if key not in own)


@pytest.mark.parametrize("name, kwargs", [
    ("vit_base_patch16_224", {"embed_dim": 96, "depth": 3, "num_heads": 4, "drop_path_rate": 0.2}),
    ("vit_base_patch16_224", {"embed_dim": 96, "depth": 2, "num_heads": 4, **HEADS["map"]}),
    ("vit_base_patch16_tokenlearner8_fuser_224", {"embed_dim": 48, "depth": 4, "num_heads": 2}),
    ("vit_base_patch16_tokenlearner8_v10_224", {"embed_dim": 48, "depth": 4, "num_heads": 2}), ("resnet18", {})])
def test_activations_are_what_autograd_saves(name, kwargs):
    size = {} if name == "resnet18" else {"img_size": 64}
    model = timm.create_model(name, **size, **kwargs).train()
    real = saved_by_autograd(model, (3, 64, 64), 3) - saved_by_autograd(model, (3, 64, 64), 2)
    assert activation_bytes(model, 64, dtype_bytes=4) == real
    model.eval()
    activation_bytes(model, 64)
    assert not model.training and all(not p.is_meta and p.grad is None for p in model.parameters())


def test_activations_follow_the_arithmetic_of_a_block():
    """Per block and position in units of D: two norms and their outputs' users, qkv, attention out, MLP 4 + 4, and so on."""
    model = build_meta(ModelSettings(name="ViT-L/16", img_size=512))
    tokens, width, depth, heads = 1025, 1024, 24, 16
    block = tokens * (2 * (1 + 1 + 3 + 1 + 1 + 1 + 4 + 4) * width + 2 * 2 * 2 + 4 * heads)  # bf16; mean, rstd; log-sum-exp
    assert activation_bytes(model) == pytest.approx(depth * block, rel=0.02)
    kept = activation_bytes(model, checkpointing=True)
    assert depth * tokens * width * 2 < kept < depth * tokens * width * 2 + 2 * block  # inputs, one block, gradients
    assert not model.grad_checkpointing
