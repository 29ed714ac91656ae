"""Plain ViTs: the forward pass and the parameter counts of the papers, their initial weights, names and errors."""

import subprocess
import sys

import pytest
import timm
import torch
import torch.nn.functional as F

import tubelet.models
from tubelet.errors import ConfigError
from tubelet.models.build import build_meta, build_model, hub_config, model_cfg, set_picture_cfg
from tubelet.models.cost import num_parameters
from tubelet.models.names import SIZES, entries, resolve_name
from tubelet.models.settings import ModelSettings
from tubelet.models.vit import HEADS, init_weights

SMALL = {"embed_dim": 48, "depth": 3, "num_heads": 4, "patch_size": 8}


def plain_vit(w, pixels, *, depth, heads, patch, pool):
    """A ViT from matrix products alone: float64, no layers. `w` is a state dict with timm's names."""

    def norm(x, name):
        x = x - x.mean(-1, keepdim=True)
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def gelu(x):
        return 0.5 * x * (1 + torch.erf(x / 2**0.5))

    def attend(q, k, v):  # [N, D] each; heads lie side by side
        outputs = []
        for qh, kh, vh in zip(q.chunk(heads, -1), k.chunk(heads, -1), v.chunk(heads, -1)):
            scores = qh @ kh.T / kh.shape[-1] ** 0.5
            scores = (scores - scores.max(-1, keepdim=True).values).exp()
            outputs.append(scores / scores.sum(-1, keepdim=True) @ vh)
        return torch.cat(outputs, -1)

    logits = []
    for image in pixels:
        rows = []
        for top in range(0, image.shape[1] - patch + 1, patch):
            for left in range(0, image.shape[2] - patch + 1, patch):
                piece = image[:, top:top + patch, left:left + patch].reshape(-1)
                rows.append(w["patch_embed.proj.weight"].flatten(1) @ piece + w["patch_embed.proj.bias"])
        x = torch.stack(rows)
        if pool == "token":
            x = torch.cat([w["cls_token"][0], x])
        x = x + w["pos_embed"][0]
        for i in range(depth):
            q, k, v = linear(norm(x, f"blocks.{i}.norm1"), f"blocks.{i}.attn.qkv").chunk(3, -1)
            x = x + linear(attend(q, k, v), f"blocks.{i}.attn.proj")
            hidden = gelu(linear(norm(x, f"blocks.{i}.norm2"), f"blocks.{i}.mlp.fc1"))
            x = x + linear(hidden, f"blocks.{i}.mlp.fc2")
        x = norm(x, "norm")
        if pool == "map":
            k, v = linear(x, "attn_pool.kv").chunk(2, -1)
            y = linear(attend(linear(w["attn_pool.latent"][0], "attn_pool.q"), k, v), "attn_pool.proj")
            x = y + linear(gelu(linear(norm(y, "attn_pool.norm"), "attn_pool.mlp.fc1")), "attn_pool.mlp.fc2")
        logits.append(linear(x.mean(0) if pool == "gap" else x[0], "head"))
    return torch.stack(logits)


@pytest.mark.parametrize("pool", HEADS)
def test_forward_equals_a_vit_written_out_in_float64(pool):
    settings = ModelSettings(name="ViT-B/16", img_size=(24, 32), num_classes=7, kwargs={**SMALL, **HEADS[pool]})
    model = build_model(settings, seed=3).double().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # no zeros and ones, so that every term shows
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    pixels = torch.randn(2, 3, 24, 32, generator=generator, dtype=torch.float64)
    expected = plain_vit(model.state_dict(), pixels, depth=3, heads=4, patch=8, pool=pool)
    torch.testing.assert_close(model(pixels), expected, rtol=1e-10, atol=1e-10)


# The ViT authors' own unit test (vit_jax/models_test.py), 224 pixels, 1000 classes, class token.
PUBLISHED = {
    "ViT-Ti/16": 5_717_416, "ViT-S/16": 22_050_664, "ViT-S/32": 22_878_952, "ViT-B/8": 86_576_872,
    "ViT-B/16": 86_567_656, "ViT-B/32": 88_224_232, "ViT-L/16": 304_326_632, "ViT-L/32": 306_535_400,
    "ViT-H/14": 632_045_800, "ViT-g/14": 1_012_611_432, "ViT-G/14": 1_844_440_680, "R+ViT-Ti/16": 6_337_704,
    "R26+ViT-S/32": 36_431_912, "R26+ViT-B/32": 101_383_976, "R50+ViT-B/16": 98_659_112, "R50+ViT-L/32": 328_994_856,
    "BiT-R50x1": 25_549_352, "BiT-R50x3": 217_319_080, "BiT-R101x1": 44_541_480, "BiT-R101x3": 387_934_888,
    "BiT-R152x2": 236_335_208, "BiT-R152x4": 936_533_224, "BiT-R50x2": 97_988_712, "BiT-R152x1": 60_185_128,
    "BiT-R200x3": 568_633_000, "R50+ViT-B/32": 110_945_832, "R50+ViT-L/16": 316_483_624,  # computed
}  # fmt: skip
# Scaling paper, table 2: encoder alone and with MAP head, neither with classifier.
PUBLISHED_G = {"g/14": (1_011_199_616, 1_036_448_384), "G/14": (1_842_772_352, 1_881_132_416)}


def test_parameter_counts_are_the_published_integers():
    for name, count in PUBLISHED.items():
        assert num_parameters(build_meta(ModelSettings(name=name))) == count, name
    gap = {"B/16": 86_566_120, "B/32": 88_222_696, "S/16": 22_049_896, "S/32": 22_878_184}  # the authors' "-gap-norep"
    for name, count in gap.items():
        assert num_parameters(build_meta(ModelSettings(name=name, kwargs=HEADS["gap"]))) == count, name
    for name, (encoder, with_map) in PUBLISHED_G.items():
        found = build_meta(ModelSettings(name=name, num_classes=0, kwargs=HEADS["map"]))
        pool = num_parameters(found.attn_pool)
        assert (num_parameters(found) - pool, num_parameters(found)) == (encoder, with_map), name


def test_our_plain_names_have_the_counts_of_the_size_formula():
    published_millions = {"s/28": 5.4, "s/16": 5.0, "B/28": 87}  # scaling paper, table 2, encoder alone
    for letter, patch, width, depth, mlp in [("s", 28, 256, 6, 1024), ("s", 16, 256, 6, 1024), ("B", 28, 768, 12, 3072),
                                             ("L", 10, 1024, 24, 4096), ("L", 8, 1024, 24, 4096)]:
        patches = (224 // patch) ** 2
        block = 4 * (width * width + width) + 2 * width * mlp + mlp + width + 4 * width
        encoder = 3 * patch * patch * width + width + patches * width + depth * block + 2 * width
        settings = ModelSettings(name=f"ViT-{letter}/{patch}", num_classes=0, kwargs=HEADS["gap"])
        assert num_parameters(build_meta(settings)) == encoder
        with_class_token = build_meta(ModelSettings(name=f"{letter}/{patch}"))
        assert num_parameters(with_class_token) == encoder + 2 * width + 1000 * (width + 1)
        if f"{letter}/{patch}" in published_millions:
            assert abs(encoder / 1e6 - published_millions[f"{letter}/{patch}"]) < 0.1


def test_the_size_table_is_timms_where_timm_has_the_size():
    for letter, patch in [("Ti", 16), ("S", 16), ("B", 16), ("L", 16), ("H", 14), ("g", 14), ("G", 14)]:
        size, model = SIZES[letter], build_meta(ModelSettings(name=f"{letter}/{patch}"))
        block = model.blocks[0]
        assert (size.width, size.depth, size.mlp, size.heads) == (
            model.embed_dim, len(model.blocks), block.mlp.fc1.out_features, block.attn.num_heads), letter


def test_initial_weights_are_the_papers():
    settings = ModelSettings(name="ViT-B/16", img_size=32, num_classes=11, head_init="zero", head_bias=-10,
                             kwargs={**HEADS["map"], "depth": 2, "embed_dim": 384, "num_heads": 6, "patch_size": 4})
    model = build_model(settings, seed=0)
    with torch.no_grad():  # poison: what is not initialised shows
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    torch.manual_seed(0)
    init_weights(model, settings.head_init, settings.head_bias)
    w = {name: value.double() for name, value in model.state_dict().items()}
    assert all(value.isfinite().all() for value in w.values())
    xavier = (2 / (384 + 384)) ** 0.5  # std of a Xavier uniform D -> D
    for name in ("blocks.0.attn.qkv.weight", "attn_pool.kv.weight", "attn_pool.q.weight", "blocks.1.attn.proj.weight"):
        for part in w[name].split(384):
            assert abs(part.std() / xavier - 1) < 0.01, name
            assert part.abs().max() <= xavier * 3**0.5 * 1.0001, name
    wide = (2 / (384 + 4 * 384)) ** 0.5
    assert abs(w["blocks.0.mlp.fc1.weight"].std() / wide - 1) < 0.01
    assert 0 < w["blocks.0.mlp.fc1.bias"].abs().max() < 1e-5
    assert abs(w["pos_embed"].std() / 0.02 - 1) < 0.02
    assert abs(w["patch_embed.proj.weight"].std() / (1 / 48) ** 0.5 - 1) < 0.02
    assert w["attn_pool.latent"].abs().max() <= (6 / 385) ** 0.5
    zero = ["head.weight", "blocks.0.attn.qkv.bias", "blocks.0.attn.proj.bias", "patch_embed.proj.bias", "norm.bias"]
    assert not any(w[name].any() for name in zero)
    pixels = torch.randn(3, 3, 32, 32)
    assert torch.equal(model(pixels), torch.full((3, 11), -10.0))


def test_building_depends_on_the_seed_alone():
    settings = ModelSettings(name="ViT-B/16", img_size=32, num_classes=3, kwargs={**SMALL, "reg_tokens": 2})
    before = torch.random.get_rng_state()
    first = build_model(settings, seed=5).state_dict()
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(123)
    second, other = build_model(settings, seed=5).state_dict(), build_model(settings, seed=6).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["pos_embed"], other["pos_embed"])


def test_zero_head_starts_at_ln_k_and_sends_no_gradient_below():
    settings = ModelSettings(name="ViT-B/16", img_size=32, num_classes=100, head_init="zero", kwargs=SMALL)
    model = build_model(settings, seed=0).double()
    loss = F.cross_entropy(model(torch.randn(4, 3, 32, 32, dtype=torch.float64)), torch.arange(4))
    loss.backward()
    assert abs(loss.item() - 4.605170185988092) < 1e-12  # ln 100
    assert model.head.weight.grad.abs().max() > 0
    assert not any(p.grad.any() for name, p in model.named_parameters() if not name.startswith("head"))


def test_dropout_setting_acts_where_the_paper_drops():
    model = build_meta(ModelSettings(name="ViT-B/16", drop_rate=0.1, drop_path_rate=0.2, kwargs={"depth": 3}))
    block = model.blocks[2]
    rates = [model.pos_drop.p, block.attn.proj_drop.p, block.mlp.drop1.p, block.mlp.drop2.p, block.drop_path1.drop_prob]
    assert rates == pytest.approx([0.1, 0.1, 0.1, 0.1, 0.2])
    assert model.head_drop.p == block.attn.attn_drop.p == 0


def test_other_models_of_timm_build_with_head_and_img_size_where_they_have_one():
    model = build_model(ModelSettings(name="resnet18", img_size=64, num_classes=5, head_init="zero"), seed=0).eval()
    assert not model(torch.randn(1, 3, 64, 64)).any()
    assert model_cfg(model)["input_size"] == [3, 64, 64]


def test_picture_settings_come_from_the_recipe_then_the_weights_then_the_model():
    model = build_model(ModelSettings(name="B/16", img_size=32, num_classes=3, crop_pct=1.0, kwargs=SMALL), seed=0)
    assert (model_cfg(model)["mean"], model_cfg(model)["crop_pct"]) == ([0.5] * 3, 1.0)
    weights = {"mean": [0.1] * 3, "std": [0.2] * 3, "crop_pct": 0.8, "interpolation": "bilinear", "num_classes": 3,
               "label_names": ["a", "b", "c"]}
    assert set_picture_cfg(model, ModelSettings(name="B/16", crop_pct=1.0), weights) == []
    cfg = model_cfg(model)
    assert (cfg["mean"], cfg["crop_pct"], cfg["interpolation"], cfg["label_names"]) == (
        [0.1] * 3, 1.0, "bilinear", ["a", "b", "c"])
    warnings = set_picture_cfg(model, ModelSettings(name="B/16", mean=(0.5, 0.5, 0.5)), weights)
    assert len(warnings) == 1 and "model.mean" in warnings[0]


def test_paper_names_resolve_and_wrong_ones_say_what_is_near():
    pairs = {"ViT-L/16": "vit_large_patch16_224", "L/8": "vit_large_patch8_224", "vit-g/14": "vit_giant_patch14_224",
             "ViT-G/14": "vit_gigantic_patch14_224", "s/28": "vit_xsmall_patch28_224", "S/32": "vit_small_patch32_224",
             "vit_base_patch16_224.augreg_in21k": "vit_base_patch16_224.augreg_in21k", "resnet50": "resnet50"}
    assert {name: resolve_name(name) for name in pairs} == pairs
    for wrong, right in [("vit_bas_patch16_224", "vit_base_patch16_224"), ("L/7", "vit_large_patch8_224"),
                         ("ViT-L16", "ViT-L/16"), ("vit_large_patch8_tokenlearner12_at18_224", "num_tokens': 12")]:
        with pytest.raises(ConfigError, match="model.name") as caught:
            resolve_name(wrong)
        assert right in caught.value.hint


def test_wrong_arguments_are_listed_together():
    with pytest.raises(ConfigError) as caught:
        build_meta(ModelSettings(name="B/16", kwargs={"embed_dims": 3, "img_size": 7, "cls_token": True}))
    text = str(caught.value)
    assert all(part in text for part in ("embed_dims", "embed_dim;", "model.img_size", "cls_token", "class_token"))
    with pytest.raises(ConfigError, match="num_heads"):
        build_meta(ModelSettings(name="B/16", kwargs={"num_heads": 7}))


def test_an_image_size_that_the_patch_does_not_divide_is_refused_but_where_a_paper_did_it():
    with pytest.raises(ConfigError, match="230 is not a multiple of the patch size 16") as caught:
        build_meta(ModelSettings(name="B/16", img_size=(224, 230)))
    assert "224 or 240" in caught.value.hint
    with pytest.raises(ConfigError, match="8 is not a multiple of the patch size 16"):
        build_meta(ModelSettings(name="vit_base_patch16_tokenlearner8_224", img_size=8))
    with pytest.warns(UserWarning, match="27 patches are taken and the last 6 pixels"):
        assert build_meta(ModelSettings(name="g/14", img_size=384)).patch_embed.grid_size == (27, 27)
    assert build_meta(ModelSettings(name="B/16", img_size=230, kwargs={"dynamic_img_pad": True, "depth": 1}))


@pytest.mark.parametrize("lines", ["import tubelet.models, timm", "import tubelet.models.token_learner, timm"])
def test_timm_knows_our_names_after_import(lines):
    code = (f"{lines}\nassert timm.is_model('vit_large_patch8_224')\n"
            "m = timm.create_model('vit_tiny_patch16_tokenlearner8_224', depth=2, embed_dim=24, num_heads=2)\n"
            "assert m.at == 1 and m.pretrained_cfg['mean'] == (0.5, 0.5, 0.5)")
    subprocess.run([sys.executable, "-c", code], check=True)


def test_settings_and_names_need_no_torch():
    code = ("import sys, tubelet.models.settings, tubelet.models.names as n; assert n.resolve_name('L/8')\n"
            "assert not {'torch', 'timm'} & set(sys.modules)")
    subprocess.run([sys.executable, "-c", code], check=True)


def test_timm_rebuilds_an_export_from_its_config(tmp_path):
    import json

    from safetensors.torch import save_file

    settings = ModelSettings(name="vit_tiny_patch16_tokenlearner8_224", img_size=(32, 48), num_classes=4,
                             kwargs={**SMALL, "version": "1.0", "num_tokens": 3})
    model = build_model(settings, seed=0).eval()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(hub_config(model, settings)))
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    pixels = torch.randn(2, 3, 32, 48)
    assert torch.equal(again(pixels), model(pixels))


def small_of(name: str) -> ModelSettings:
    """A registered model shrunk by keyword arguments, its structure (fuser, version, place) kept."""
    tokens = {"num_tokens": 3} if "tokenlearner" in name else {}
    return ModelSettings(name=name, img_size=32, num_classes=5,
                         kwargs={"embed_dim": 32, "depth": 4, "num_heads": 2, "patch_size": 8, **tokens})


@pytest.mark.parametrize("name", [name for name in entries() if "patch" in name and name.startswith("vit_")])
def test_every_registered_model_trains_and_recomputes_the_same(name):
    assert tubelet.models and timm.is_model(name)
    model = build_model(small_of(name), seed=0)
    with torch.no_grad():  # away from the zeros of the papers' initialisation, which hold gradients back
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape)
    pixels, gradients = torch.randn(2, 3, 32, 32), []
    for checkpointing in (False, True):
        model.zero_grad()
        model.set_grad_checkpointing(checkpointing)
        logits = model(pixels)
        assert logits.shape == (2, 5) and logits.isfinite().all()
        logits.square().sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for key, gradient in gradients[0].items():
        assert gradient.abs().max() > 0, f"{key} gets no gradient"
        torch.testing.assert_close(gradients[1][key], gradient)
