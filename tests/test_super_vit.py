"""SuperViT: the released code's numbers at every size and share, DeiT-S inside it, ranking by one row of attention."""

import math

import pytest
import timm
import torch
import torch.nn.functional as F
from sinfill import five, sinfill, sinin
from watch import Largest

from tubelet.errors import CheckpointError, ConfigError
from tubelet.models import super_vit
from tubelet.models.build import build_meta, build_model
from tubelet.models.cost import macs, num_parameters
from tubelet.models.names import resolve_name
from tubelet.models.settings import ModelSettings
from tubelet.models.super_vit import SuperViT, num_kept, paper_sizes, scale_box
from tubelet.models.weights import load_weights

# (size, keep) -> tokens in blocks 0-2, 3-5, 6-8, 9-11 behind each drop, GMACs of the DeiT-S and LV-ViT-S models.
# The second column counts norms and the resize of the image as well (see `test_multiply_adds...`).
TABLE = {
    (128, 0.5): ((65, 34, 18, 10), 0.7424, 1.1186), (128, 0.7): ((65, 47, 34, 25), 0.9723, 1.4061),
    (128, 1): ((65, 65, 65, 65), 1.4384, 2.0575), (160, 0.5): ((101, 52, 27, 15), 1.1553, 1.7427),
    (160, 0.7): ((101, 72, 52, 38), 1.5149, 2.1914), (160, 1): ((101, 101, 101, 101), 2.2685, 3.2455),
    (192, 0.5): ((145, 74, 38, 20), 1.6682, 2.5075), (192, 0.7): ((145, 103, 74, 53), 2.1937, 3.1628),
    (192, 1): ((145, 145, 145, 145), 3.3155, 4.7409), (224, 0.5): ((197, 100, 51, 27), 2.2985, 3.4421),
    (224, 0.7): ((197, 139, 99, 71), 3.0126, 4.3321), (224, 1): ((197, 197, 197, 197), 4.5989, 6.5694),
}  # fmt: skip
SMALL = {"embed_dim": 24, "depth": 5, "num_heads": 2, "patch_size": 4, "drop_at": [1, 3]}
NAMES = ("supervit_deit_small", "supervit_lvvit_small")


def small(name=NAMES[0], **kwargs) -> SuperViT:
    """56 pixels and 14 patches a side, as many as the paper's."""
    settings = ModelSettings(name=name, img_size=kwargs.pop("img_size", 56), num_classes=kwargs.pop("num_classes", 5),
                             kwargs={**SMALL, **({"stem": 6} if "lv" in name else {}), **kwargs})
    model, generator = build_model(settings, seed=0), torch.Generator().manual_seed(1)
    with torch.no_grad():  # away from zeros and ones, so that every term shows
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def images(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def filled():
    model = timm.create_model("supervit_deit_small").eval()
    model.load_official(sinfill(model.official_state_dict()))
    return model


def test_deit_small_answers_as_the_released_model_filled_by_formula(filled, monkeypatch):
    golden = {(128, 1): (-0.000239, 0.972416, [-0.80746, -1.34988, -1.1352, -0.29924, 0.67743]),
              (224, 0.5): (0.000319, 0.873065, [-1.12367, -1.09732, -0.45493, 0.42879, 1.04659]),
              (224, 1): (0.000319, 0.872973, [-1.12352, -1.09725, -0.45497, 0.42865, 1.04644])}
    found, choose = [], super_vit.kept_tokens
    monkeypatch.setattr(super_vit, "kept_tokens", lambda *a: found.append(choose(*a)) or found[-1])
    for (size, keep), (mean, std, first) in golden.items():
        with torch.no_grad():
            answer = five(filled(sinin(2, 3, 224, 224), size=size, keep=keep))
        assert answer[:2] == pytest.approx((mean, std), abs=2e-5), (size, keep)
        assert answer[2] == pytest.approx(first, abs=5e-5), (size, keep)
    assert [tuple(index.shape) for index in found] == [(2, 100), (2, 51), (2, 27)]
    assert found[0][0, :12].tolist() == [0, 95, 136, 54, 177, 13, 21, 62, 169, 103, 128, 5]


def test_lv_vit_small_answers_as_the_released_model_filled_by_formula():
    model = timm.create_model("supervit_lvvit_small").eval()
    model.load_official(sinfill(model.official_state_dict()))
    with torch.no_grad():
        mean, std, first = five(model(sinin(2, 3, 224, 224)))
    assert (mean, std) == pytest.approx((0.232357, 2.029871), abs=2e-5)
    assert first == pytest.approx([-2.09229, -2.69795, -1.7013, 0.36068, 2.35719], abs=5e-5)


def test_a_step_of_four_sub_networks_has_the_released_losses(filled):
    model = filled.train()  # no dropout at the default rates
    x, targets = sinin(2, 3, 224, 224), torch.full((2, 1000), 1e-4)
    targets[0, 7] = targets[1, 123] = 0.9 + 1e-4
    targets, losses = 0.7 * targets + 0.3 * targets.flip(0), []
    teacher = torch.zeros(())
    for size, keep in ((224, 1), (224, 0.5), (160, 1), (160, 0.7)):
        log_p = model(x, size=size, keep=keep).log_softmax(-1)
        if keep == 1:
            teacher = log_p.detach().exp()
            losses.append(-(targets * log_p).sum(-1).mean())
        else:
            losses.append(F.kl_div(log_p, teacher, reduction="batchmean"))
    sum(losses).backward()
    assert float(losses[0]) == pytest.approx(8.03471184, abs=2e-5)
    assert float(losses[2]) == pytest.approx(7.82900715, abs=2e-5)
    assert abs(float(losses[1])) < 1e-6 and abs(float(losses[3])) < 1e-6
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    model.zero_grad(set_to_none=True)
    model.eval()
    assert without == ["pos_embed_list.0", "pos_embed_list.2"]


def test_parameter_counts_and_keys_are_the_released_ones():
    for name, count, keys in zip(NAMES, (22_170_088, 26_271_248), (155, 207)):
        model = build_meta(ModelSettings(name=name))
        state = model.official_state_dict()
        assert (num_parameters(model), len(state)) == (count, keys)
        assert [tuple(state[f"pos_embed_list.{i}"].shape) for i in range(4)] == [
            (1, tokens, 384) for tokens in (65, 101, 145, 197)]
        assert state["patch_embed.proj.weight"].shape == ((384, 3, 16, 16) if "deit" in name else (384, 64, 8, 8))
        assert ("blocks.0.attn.qkv.bias" in state) == ("deit" in name) == ("aux_head.weight" not in state)


def test_tokens_at_every_size_and_share_are_the_papers():
    for name in NAMES:
        model = build_meta(ModelSettings(name=name, kwargs={"embed_dim": 24, "num_heads": 2, "depth": 12}))
        seen = []
        for block in model.blocks:
            block.mlp.register_forward_hook(lambda _, inputs, __, seen=seen: seen.append(inputs[0].shape[1]))
        for (size, keep), (tokens, _, _) in TABLE.items():
            seen.clear()
            model(torch.empty(1, 3, 224, 224, device="meta"), size=size, keep=keep)
            assert seen == [count for count in tokens for _ in range(3)], (name, size, keep)
    assert [num_kept(keep, 197) for keep in (0.5, 0.7)] == [99, 138] and num_kept(0.9, 5) == 4


def test_multiply_adds_at_every_size_and_share_are_the_computed_ones():
    """The reference's counter adds to the LV-ViT column what ours leaves out: 5 for each number in LayerNorm, 2 in
    BatchNorm, 4 for each number of the shrunken image."""
    for (size, keep), (tokens, deit, lv_vit) in TABLE.items():
        chosen = {"size": size, "keep": keep}
        found = macs(build_meta(ModelSettings(name=NAMES[0], kwargs=chosen)))
        assert found / 1e9 == pytest.approx(deit, rel=2e-4, abs=6e-5), chosen
        per_block = [tokens[min(i // 3, 3)] for i in range(16)]
        inputs = [tokens[0], *per_block[:-1]]
        norms = 5 * 384 * (sum(inputs) + sum(per_block) + tokens[3])
        extra = norms + 2 * 3 * 64 * (size // 2) ** 2 + 4 * 3 * size**2
        found = macs(build_meta(ModelSettings(name=NAMES[1], kwargs=chosen)))
        assert (found + extra) / 1e9 == pytest.approx(lv_vit, rel=2e-4), chosen


def test_a_deit_loads_and_is_found_again_at_full_size():
    deit = timm.create_model("deit_small_patch16_224", depth=4, num_classes=7).eval()
    model = timm.create_model("supervit_deit_small", depth=4, num_classes=7).eval()
    report = load_weights(model, deit.state_dict())
    assert set(report.names("resized")) == {f"pos_embed_list.{i}" for i in range(3)}
    assert len(report.names("loaded")) == len(model.state_dict()) - 3 and not report.names("dropped")
    x = images(2, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(model(x), deit(x))
        for number, side in enumerate((8, 10, 12)):
            table = timm.layers.resample_abs_pos_embed(deit.pos_embed, [side, side], [14, 14])
            torch.testing.assert_close(model.pos_embed_list[number], table)
            deit_there = timm.create_model("deit_small_patch16_224", depth=4, num_classes=7, img_size=16 * side).eval()
            deit_there.load_state_dict({**deit.state_dict(), "pos_embed": table})
            shrunk = F.interpolate(x, size=(16 * side, 16 * side), mode="bilinear", align_corners=True)
            torch.testing.assert_close(model(x, size=16 * side), deit_there(shrunk))


def plain_super_vit(w, x, keep, depth, heads, patch, drop_at, table):
    """The DeiT form in float64 from products alone, one image, with the whole attention matrix."""

    def norm(t, name):
        t = t - t.mean(-1, keepdim=True)
        return t / (t.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(t, name):
        return t @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    rows = [w["patch_embed.proj.weight"].flatten(1) @ x[:, r:r + patch, c:c + patch].flatten() + w["patch_embed.proj.bias"]
            for r in range(0, x.shape[1], patch) for c in range(0, x.shape[2], patch)]
    tokens = torch.stack([w["cls_token"][0, 0], *rows]) + w[table][0]
    for i in range(depth):
        q, k, v = linear(norm(tokens, f"blocks.{i}.norm1"), f"blocks.{i}.attn.qkv").chunk(3, -1)
        outputs, looks = [], torch.zeros(len(tokens), dtype=x.dtype)
        for qh, kh, vh in zip(q.chunk(heads, -1), k.chunk(heads, -1), v.chunk(heads, -1)):
            attention = (qh @ kh.T / qh.shape[-1] ** 0.5).softmax(-1)
            outputs.append(attention @ vh)
            looks += attention[0] / heads
        tokens = tokens + linear(torch.cat(outputs, -1), f"blocks.{i}.attn.proj")
        if i in drop_at:
            best = sorted(range(1, len(tokens)), key=lambda token: -float(looks[token]))[:math.ceil(keep * len(tokens))]
            tokens = tokens[[0, *best]]
        hidden = linear(norm(tokens, f"blocks.{i}.norm2"), f"blocks.{i}.mlp.fc1")
        tokens = tokens + linear(0.5 * hidden * (1 + torch.erf(hidden / 2**0.5)), f"blocks.{i}.mlp.fc2")
    return linear(norm(tokens, "norm")[0], "head")


def test_forward_equals_a_super_vit_written_out_in_float64():
    model, x = small().double().eval(), images(3, 3, 56, 56).double()
    assert model.sizes == (32, 40, 48, 56)
    for size, keep in ((56, 0.5), (56, 0.7), (40, 0.7), (32, 0.3)):
        shrunk = F.interpolate(x, size=(size, size), mode="bilinear", align_corners=True)
        expected = torch.stack([plain_super_vit(model.state_dict(), image, keep, 5, 2, 4, (1, 3),
                                                f"pos_embed_list.{model.sizes.index(size)}") for image in shrunk])
        torch.testing.assert_close(model(x, size=size, keep=keep), expected, rtol=1e-9, atol=1e-9)
    assert (model(x, keep=0.5) - model(x)).abs().max() > 1e-3  # dropping is not nothing


def test_the_order_of_patches_does_not_matter():
    for name in NAMES:
        model, x = small(name).double().eval(), images(2, 3, 56, 56).double()
        expected, embed = model(x, keep=0.5), model._pos_embed
        order = torch.cat([torch.zeros(1, dtype=torch.long), 1 + torch.randperm(196)])
        model._pos_embed = lambda tokens, embed=embed, order=order: embed(tokens)[:, order]
        torch.testing.assert_close(model(x, keep=0.5), expected, rtol=1e-9, atol=1e-9)


def test_no_attention_matrix_is_made_where_tokens_are_ranked():
    model, tokens = small().eval(), {197, 100, 51}
    with torch.no_grad(), Largest(tokens) as seen:
        model(images(2, 3, 56, 56), keep=0.5)
    assert not seen.squares
    with Largest(tokens) as seen:  # the watch would see one
        torch.zeros(2, 2, 100, 4) @ torch.zeros(2, 2, 4, 100)
    assert seen.squares


@pytest.mark.parametrize("name", NAMES)
def test_it_trains_over_its_sizes_recomputes_compiles_and_exports(name):
    model, x, gradients = small(name), images(4, 3, 56, 56), []
    for checkpointing in (False, True):
        model.zero_grad()
        model.set_grad_checkpointing(checkpointing)
        for size, keep in ((56, 1), (48, 0.7), (40, 0.5), (32, 0.7)):
            model(x, size=size, keep=keep).square().sum().backward()
        gradients.append({key: p.grad.clone() for key, p in model.named_parameters()})
    for key, gradient in gradients[0].items():
        assert gradient.abs().max() > 0, f"{key} gets no gradient"
        torch.testing.assert_close(gradients[1][key], gradient)
    model.set_grad_checkpointing(False)
    model.eval()
    with torch.no_grad():
        chosen = {"size": 40, "keep": 0.7}
        expected = model(x, **chosen)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x, **chosen), expected)
        exported = torch.export.export(model, (x,), chosen)
        torch.testing.assert_close(exported.module()(x, **chosen), expected)
        assert model.bfloat16()(x.bfloat16(), **chosen).isfinite().all()


def test_defaults_given_when_it_is_built_hold_for_calls_that_say_nothing():
    x = images(2, 3, 56, 56)
    model, usual = small(size=40, keep=0.5).eval(), small().eval()
    torch.testing.assert_close(model(x), usual(x, size=40, keep=0.5))
    torch.testing.assert_close(model(x, size=56, keep=1), usual(x))
    alone = small(sizes=[56], keep=0.5)  # for training at one size: nothing is left without gradient
    alone(x).square().sum().backward()
    assert all(parameter.grad is not None for parameter in alone.parameters()) and len(alone.pos_embed_list) == 1
    features, maps = usual.forward_intermediates(x, indices=[1, 4], size=48, norm=True)
    assert [tuple(m.shape) for m in maps] == [(2, 24, 12, 12)] * 2
    torch.testing.assert_close(usual.forward_head(features), usual(x, size=48))


def test_mixed_tokens_at_a_smaller_size_are_those_of_the_shrunken_box():
    assert paper_sizes(224, 16) == [128, 160, 192, 224] and paper_sizes(384, 16) == [224, 272, 336, 384]
    for grid in (8, 10, 12, 14):
        assert scale_box((0, 3, 7, 13), 14, grid) == tuple(int(edge // (14 / grid)) for edge in (0, 3, 7, 13))
    assert scale_box((3, 3, 4, 4), 14, 8) == (1, 1, 2, 2) and scale_box((4, 4, 5, 5), 14, 8) == (2, 2, 2, 2)
    model, x = small(NAMES[1]).double().eval(), images(4, 3, 56, 56).double()
    torch.testing.assert_close(model(x, size=32, box=(4, 4, 5, 5)), model(x, size=32))  # empty there
    assert (model(x, size=32, box=(0, 0, 7, 14)) - model(x, size=32)).abs().max() > 1e-3
    whole = model(x, size=40, box=(0, 0, 14, 14), output="dense")  # every token is the partner's
    expected = model(x, size=40, output="dense")
    torch.testing.assert_close(whole, (expected[0].flip(0), expected[1]))


def test_weights_go_to_other_sizes_and_back():
    source = small()
    larger = small(img_size=96)  # 24 patches a side: 14, 17, 21, 24
    report = load_weights(larger, source.state_dict())
    assert larger.sizes == (56, 68, 84, 96) and len(report.names("resized")) == 3
    assert torch.equal(larger.pos_embed_list[0], source.pos_embed_list[3])  # 14 patches a side are there already
    table = timm.layers.resample_abs_pos_embed(source.pos_embed_list[3], [24, 24], [14, 14])
    torch.testing.assert_close(larger.pos_embed_list[3], table)
    again = small()
    assert not again.load_official(source.official_state_dict()).names("resized")
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in source.state_dict().items())


def test_what_cannot_be_is_said_with_both_numbers():
    for kwargs, words in (({"img_size": 58}, ("58 x 58", "4 x 4")), ({"sizes": [32, 48]}, ("56", "48")),
                          ({"sizes": [30, 56]}, ("30", "4")), ({"drop_at": [1, 7]}, ("7", "0 to 4")),
                          ({"img_size": (56, 48)}, ("56 x 48",)), ({"keep": 1.5}, ("1.5",)), ({"size": 50}, ("50", "48"))):
        with pytest.raises(ConfigError) as caught:
            small(**kwargs)
        assert all(word in str(caught.value) for word in words), str(caught.value)
    model, x = small(NAMES[1]), torch.zeros(1, 3, 56, 56)
    for chosen, words in (({"size": 50}, ("50", "32, 40, 48, 56", "size=48")), ({"keep": 0}, ("keep", "0")),
                          ({"keep": 0.5, "output": "dense"}, ("dense", "0.5"))):
        with pytest.raises(ConfigError) as caught:
            model(x, **chosen)
        assert all(word in str(caught.value) for word in words), str(caught.value)
    state = small(embed_dim=32).state_dict()
    with pytest.raises(CheckpointError) as caught:
        small().load_official(state)
    assert all(word in str(caught.value) for word in ("pos_embed_list", "1 x 65 x 32", "1 x 65 x 24"))
    assert resolve_name("SuperViT-DeiT-S") == NAMES[0]
