"""LV-ViT: the released code's numbers, a forward pass written out, MixToken mixed and un-mixed, both classifiers."""

import pytest
import timm
import torch
import torch.nn.functional as F
from sinfill import five, sinfill, sinin

from tubelet.errors import CheckpointError, ConfigError
from tubelet.models.build import build_meta, build_model, model_cfg
from tubelet.models.cost import macs, num_parameters
from tubelet.models.lv_vit import LVViT, box_share, draw_mix_box, mix_tokens
from tubelet.models.names import resolve_name
from tubelet.models.settings import ModelSettings
from tubelet.models.weights import load_weights

SMALL = {"embed_dim": 24, "depth": 3, "num_heads": 2, "stem": 6, "patch_size": 8}
ROWS = {"lvvit_tiny": (240, 12, 64), "lvvit_small": (384, 16, 64), "lvvit_medium": (512, 20, 64),
        "lvvit_large": (768, 24, 128)}  # width, depth, channels of the stem


def small(**kwargs) -> LVViT:
    size, classes = kwargs.pop("img_size", (32, 48)), kwargs.pop("num_classes", 5)
    name = kwargs.pop("name", "lvvit_small")
    return build_model(ModelSettings(name=name, img_size=size, num_classes=classes, kwargs={**SMALL, **kwargs}), seed=0)


def shake(model):
    """Away from zeros and ones, so that every term shows."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in (*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())):
            tensor += 0.2 * torch.rand(tensor.shape, generator=generator).to(tensor.dtype)
    return model


def test_parameter_counts_are_the_released_models():
    published = {("lvvit_tiny", 224): 8_534_720, ("lvvit_small", 224): 26_151_824, ("lvvit_small", 384): 26_297_744,
                 ("lvvit_medium", 224): 55_830_544, ("lvvit_medium", 384): 56_025_104, ("lvvit_medium", 448): 56_131_600,
                 ("lvvit_large", 224): 150_021_968, ("lvvit_large", 448): 150_473_552, ("lvvit_large", 512): 150_657_872}
    for (name, size), count in published.items():
        assert num_parameters(build_meta(ModelSettings(name=name, img_size=size))) == count, (name, size)


def test_multiply_adds_are_the_computed_ones():
    """The reference counter adds the norms, which ours leaves out: 5 per number in LayerNorm, 2 in BatchNorm."""
    computed = {"lvvit_tiny": 2.879, "lvvit_small": 6.569, "lvvit_medium": 12.704, "lvvit_large": 34.684}
    for name, gmacs in computed.items():
        width, depth, stem = ROWS[name]
        norms = 5 * (2 * depth + 1) * 197 * width + 2 * 3 * stem * 112 * 112
        found = macs(build_meta(ModelSettings(name=name)))
        assert (found + norms) / 1e9 == pytest.approx(gmacs, abs=6e-4), name


def test_lvvit_small_answers_as_the_released_model_filled_by_formula():
    model = timm.create_model("lvvit_small").eval()
    model.load_official(sinfill(model.official_state_dict()))
    with torch.no_grad():
        mean, std, first = five(model(sinin(2, 3, 224, 224)))
    assert (mean, std) == pytest.approx((0.463252, 1.413722), abs=2e-5)
    assert first == pytest.approx([-0.2943, -1.37847, -1.46836, -0.48619, 1.05112], abs=3e-5)


def plain_lv_vit(w, x, depth, heads, patch, skip):
    """The model from products alone. Returns (class logits, auxiliary logits)."""

    def norm(t, name):
        t = t - t.mean(-1, keepdim=True)
        return t / (t.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]

    def batch_norm(t, name):
        scale = w[f"{name}.weight"] / (w[f"{name}.running_var"] + 1e-5).sqrt()
        return (t - w[f"{name}.running_mean"][:, None, None]) * scale[:, None, None] + w[f"{name}.bias"][:, None, None]

    for number, (stride, padding) in enumerate(((2, 3), (1, 1), (1, 1)), 1):
        x = F.conv2d(x, w[f"patch_embed.conv{number}.weight"], stride=stride, padding=padding)
        x = batch_norm(x, f"patch_embed.bn{number}").clamp(min=0)
    x = F.conv2d(x, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=patch // 2).flatten(2).transpose(1, 2)
    x = torch.cat([w["cls_token"].expand(len(x), -1, -1), x], 1) + w["pos_embed"]
    for i in range(depth):
        q, k, v = (part.unflatten(-1, (heads, -1)) for part in (
            norm(x, f"blocks.{i}.norm1") @ w[f"blocks.{i}.attn.qkv.weight"].T).chunk(3, -1))
        scores = torch.einsum("bnhd,bmhd->bhnm", q, k) / q.shape[-1] ** 0.5
        y = torch.einsum("bhnm,bmhd->bnhd", scores.softmax(-1), v).flatten(2)
        x = x + (y @ w[f"blocks.{i}.attn.proj.weight"].T + w[f"blocks.{i}.attn.proj.bias"]) / skip
        hidden = norm(x, f"blocks.{i}.norm2") @ w[f"blocks.{i}.mlp.fc1.weight"].T + w[f"blocks.{i}.mlp.fc1.bias"]
        hidden = 0.5 * hidden * (1 + torch.erf(hidden / 2**0.5))
        x = x + (hidden @ w[f"blocks.{i}.mlp.fc2.weight"].T + w[f"blocks.{i}.mlp.fc2.bias"]) / skip
    x = norm(x, "norm")
    return (x[:, 0] @ w["head.weight"].T + w["head.bias"], x[:, 1:] @ w["aux_head.weight"].T + w["aux_head.bias"])


def test_forward_equals_an_lv_vit_written_out_in_float64():
    for name, skip in (("lvvit_small", 2), ("lvvit_large", 3)):
        model = shake(small(name=name)).double().eval()
        x = torch.randn(2, 3, 32, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        logits, aux = plain_lv_vit(model.state_dict(), x, 3, 2, 8, skip)
        found = model(x, output="dense")
        torch.testing.assert_close(found[0], logits, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(found[1], aux, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(model(x), logits + 0.5 * aux.max(1).values, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(model(x, output="class"), logits, rtol=1e-10, atol=1e-10)


def test_boxes_lie_in_the_grid_and_leave_a_uniform_share():
    torch.manual_seed(0)
    boxes = [draw_mix_box((14, 10)) for _ in range(4000)]
    for top, left, bottom, right in boxes:
        assert 0 <= top <= bottom <= 14 and 0 <= left <= right <= 10
    torch.manual_seed(0)
    assert boxes[:5] == [draw_mix_box((14, 10)) for _ in range(5)]
    # on a fine grid, what is not cut off at an edge has the share lambda, which is uniform
    shares = torch.tensor([box_share(box, (1000, 1000)) for box in (draw_mix_box((1000, 1000)) for _ in range(20000)) if (
        box[0] > 0 and box[1] > 0 and box[2] < 1000 and box[3] < 1000)])
    # P(uncut | side s) = (1 - s)^2, s = sqrt(1 - lambda): E[s^2] = 2 (1/4 - 2/5 + 1/6) / (2 (1/2 - 2/3 + 1/4))
    assert float((1 - shares).mean()) == pytest.approx((1 / 4 - 2 / 5 + 1 / 6) / (1 / 2 - 2 / 3 + 1 / 4), abs=0.01)
    assert box_share((3, 2, 3, 9), (14, 10)) == 1 and box_share((0, 1, 2, 3), (4, 4)) == 0.75


def test_tokens_in_the_box_come_from_the_partner_and_go_back():
    x = torch.arange(4 * 6).reshape(4, 6, 1)  # a grid of 2 rows and 3 columns
    mixed = mix_tokens(x, (2, 3), (0, 1, 2, 2))
    for image in range(4):
        for token in range(6):
            owner = 3 - image if token % 3 == 1 else image
            assert mixed[image, token] == x[owner, token]
    assert torch.equal(mix_tokens(mixed, (2, 3), (0, 1, 2, 2)), x)
    assert torch.equal(mix_tokens(x, (2, 3), (1, 1, 1, 3)), x)  # an empty box


def test_mixing_acts_on_tokens_and_auxiliary_answers_come_back_unmixed():
    model, box, grid = shake(small()).double().eval(), (1, 0, 4, 3), (4, 6)
    x = torch.randn(4, 3, 32, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    embed = model.patch_embed
    tokens = embed(x)
    by_hand = tokens.clone().unflatten(1, grid)
    by_hand[:, 1:4, 0:3] = tokens.flip(0).unflatten(1, grid)[:, 1:4, 0:3]
    logits, aux = model(x, output="dense", box=box)
    embed.register_forward_hook(lambda *_: by_hand.flatten(1, 2))
    plain_logits, plain_aux = model(x, output="dense")
    torch.testing.assert_close(logits, plain_logits)
    expected = plain_aux.clone().unflatten(1, grid)
    expected[:, 1:4, 0:3] = plain_aux.flip(0).unflatten(1, grid)[:, 1:4, 0:3]
    torch.testing.assert_close(aux, expected.flatten(1, 2))
    # where no token sees another one, mixing cannot be seen in the auxiliary answers at all
    apart = shake(small()).double().eval()
    for block in apart.blocks:
        torch.nn.init.zeros_(block.attn.proj.weight)
    torch.testing.assert_close(apart(x, output="dense", box=box)[1], apart(x, output="dense")[1])


def test_it_trains_recomputes_compiles_and_exports():
    model, pixels, gradients = shake(small()), torch.randn(4, 3, 32, 48), []
    for checkpointing in (False, True):
        model.zero_grad()
        model.set_grad_checkpointing(checkpointing)
        logits, aux = model(pixels, output="dense", box=(0, 0, 2, 3))
        (logits.square().sum() + aux.square().sum()).backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient.abs().max() > 0, f"{name} gets no gradient"
        torch.testing.assert_close(gradients[1][name], gradient)
    model.set_grad_checkpointing(False)
    model.eval()
    with torch.no_grad():
        expected = model(pixels)
        torch.testing.assert_close(torch.compile(model, backend="aot_eager", fullgraph=True)(pixels), expected)
        torch.testing.assert_close(torch.export.export(model, (pixels,)).module()(pixels), expected)
        assert model.bfloat16()(pixels.bfloat16()).isfinite().all()


def test_two_classifiers_are_made_started_and_replaced_together():
    model = build_model(ModelSettings(name="lvvit_tiny", img_size=32, num_classes=5, head_init="zero", head_bias=-2,
                                      kwargs=SMALL), seed=0).eval()
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model(x), torch.full((2, 5), -2 - 0.5 * 2.0))
    assert model_cfg(model)["classifier"] == ["head", "aux_head"] and model_cfg(model)["crop_pct"] == 0.9
    assert model_cfg(model)["mean"] == [0.485, 0.456, 0.406]
    report = model.load_official(small(img_size=32).state_dict())
    assert not report.names("dropped")
    source = small(img_size=32, num_classes=9).state_dict()
    with pytest.raises(CheckpointError, match="9 x 24 in the weights, 5 x 24 in the model"):
        model.load_official(source)
    report = load_weights(model, source)
    assert report.names("new") == [f"{head}.{part}" for head in ("head", "aux_head") for part in ("weight", "bias")]
    model.reset_classifier(3)
    assert model(x).shape == (2, 3) and model(x, output="dense")[1].shape == (2, 16, 3)
    assert [layer.out_features for layer in model.get_classifier()] == [3, 3]
    model.reset_classifier(0)
    features = model.forward_features(x)
    for found in (model(x), model.forward_head(features, pre_logits=True)):
        assert torch.equal(found, features[:, 0])
    model.reset_classifier(0, "")
    assert torch.equal(model(x), features)


def test_feature_maps_are_its_blocks():
    whole = timm.create_model("lvvit_small", img_size=32, **SMALL).eval()
    maps = timm.create_model("lvvit_small", img_size=32, features_only=True, out_indices=(0, 2), **SMALL).eval()
    maps.model.load_state_dict(whole.state_dict(), strict=False)
    x, seen = torch.randn(2, 3, 32, 32), []
    for block in whole.blocks:
        block.register_forward_hook(lambda _, __, y: seen.append(y))
    whole(x)
    for found, expected in zip(maps(x), (seen[0], seen[2])):
        torch.testing.assert_close(found, expected[:, 1:].transpose(1, 2).unflatten(2, (4, 4)))


def test_official_layout_is_the_released_one():
    keys = set(build_meta(ModelSettings(name="lvvit_large")).official_state_dict())
    block = ("norm1.weight", "norm1.bias", "attn.qkv.weight", "attn.proj.weight", "attn.proj.bias", "norm2.weight",
             "norm2.bias", "mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight", "mlp.fc2.bias")
    norms = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    assert keys == {"cls_token", "pos_embed", *(f"patch_embed.conv{i}.weight" for i in (1, 2, 3)),
                    *(f"patch_embed.bn{i}.{part}" for i in (1, 2, 3) for part in norms),
                    *(f"blocks.{i}.{part}" for i in range(24) for part in block),
                    *(f"{layer}.{part}" for layer in ("patch_embed.proj", "norm", "head", "aux_head")
                      for part in ("weight", "bias"))}
    source, model = shake(small()), small()
    model.load_official(source.official_state_dict())
    assert all(torch.equal(tensor, model.official_state_dict()[name]) for name, tensor in source.state_dict().items())
    wider = small(img_size=(48, 48))
    assert wider.load_official(small(img_size=32).official_state_dict()).names("resized") == ["pos_embed"]


def test_what_cannot_be_is_said_with_both_numbers():
    for kwargs, numbers in (({"img_size": 36}, ("36 x 36", "8 x 8", "img_size=32 or 40")),
                            ({"num_heads": 5}, ("24", "5", "num_heads=4")), ({"class_token": False}, ("class_token",)),
                            ({"global_pool": "avg"}, ("global_pool", "avg")),
                            ({"patch_size": 7, "img_size": 28}, ("7", "even"))):
        with pytest.raises(ConfigError) as caught:
            small(**kwargs)
        assert all(number in str(caught.value) for number in numbers), str(caught.value)
    with pytest.raises(ConfigError, match="40 x 48 pixels.*32 x 48"):
        small()(torch.zeros(1, 3, 40, 48))
    with pytest.raises(ConfigError, match="auxiliary head"):
        small(aux_head=False)(torch.zeros(1, 3, 32, 48), output="dense")
    state = small().state_dict()
    for change, words in (({"norm.weight": torch.ones(7)}, ("`norm.weight`", "7", "24")),
                          ({"extra": torch.ones(1)}, ("`extra`",))):
        with pytest.raises(CheckpointError) as caught:
            small().load_official({**state, **change})
        assert all(word in str(caught.value) for word in words)
    assert resolve_name("LV-ViT-S") == "lvvit_small"
