"""TokenLearner 1.0 and 1.1, TokenFuser and the ViTs that hold them: the released code's shapes, counts and identities."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from watch import Largest

from tubelet.errors import ConfigError
from tubelet.models.build import build_meta, build_model
from tubelet.models.cost import num_parameters
from tubelet.models.names import entries
from tubelet.models.settings import ModelSettings
from tubelet.models.token_learner import TokenFuser, TokenLearnerV10, TokenLearnerV11, TokenLearnerViT
from tubelet.models.vit import HEADS

SMALL = {"embed_dim": 24, "depth": 4, "num_heads": 2, "patch_size": 8, "num_tokens": 3}


def small(**kwargs) -> TokenLearnerViT:
    settings = ModelSettings(name="vit_tiny_patch16_tokenlearner8_224", img_size=kwargs.pop("img_size", 32), num_classes=5,
                             kwargs={**SMALL, **kwargs})
    return build_model(settings, seed=0).double().eval()


def shake(module: nn.Module) -> nn.Module:
    """Away from zeros and ones, so that every term shows."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, dtype=parameter.dtype)
    return module


def test_modules_have_the_published_numbers_of_parameters():
    published = {("1.0", 768, 8): 58_560, ("1.0", 768, 16): 119_040, ("1.0", 1024, 8): 77_504, ("1.0", 1024, 16): 156_416,
                 ("1.1", 768, 8): 51_272, ("1.1", 768, 16): 51_792, ("1.1", 1024, 8): 68_168, ("1.1", 1024, 16): 68_688,
                 ("fuser", 768, 8): 54_416, ("fuser", 768, 16): 55_136, ("fuser", 1024, 8): 72_336,
                 ("fuser", 1024, 16): 73_056}
    kinds = {"1.0": TokenLearnerV10, "1.1": TokenLearnerV11, "fuser": TokenFuser}
    for (kind, dim, tokens), count in published.items():
        assert num_parameters(kinds[kind](dim, tokens)) == count, (kind, dim, tokens)


def test_v10_is_the_weighted_sum_written_out():
    module = shake(TokenLearnerV10(6, 2).double())
    x = torch.randn(1, 12, 6, dtype=torch.float64)
    rows, cols = 3, 4
    w = module.state_dict()

    def convolve(image, kernel):  # [C][r][c], zeros around it
        out = torch.zeros(kernel.shape[0], rows, cols, dtype=torch.float64)
        for o in range(kernel.shape[0]):
            for r in range(rows):
                for c in range(cols):
                    for dr in (-1, 0, 1):
                        for dc in (-1, 0, 1):
                            if 0 <= r + dr < rows and 0 <= c + dc < cols:
                                out[o, r, c] += kernel[o, :, dr + 1, dc + 1] @ image[:, r + dr, c + dc]
        return out

    def gelu(t):
        return 0.5 * t * (1 + torch.erf(t / 2**0.5))

    a = x[0] - x[0].mean(-1, keepdim=True)
    a = a / (a.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * w["norm.weight"] + w["norm.bias"]
    image = a.T.reshape(6, rows, cols)
    for i in (0, 2, 4):
        image = gelu(convolve(image, w[f"attention.{i}.weight"]))
    alpha = 1 / (1 + torch.exp(-convolve(image, w["attention.6.weight"])))
    expected = torch.stack([sum(alpha[s, p // cols, p % cols] * x[0, p] for p in range(12)) for s in range(2)])
    torch.testing.assert_close(module(x, (rows, cols))[0], expected)
    module.pool = "mean"
    torch.testing.assert_close(module(x, (rows, cols))[0], expected / 12)


def test_zeroed_attention_gives_means_and_half_sums():
    x = torch.randn(2, 9, 6, dtype=torch.float64)
    v10, v11 = TokenLearnerV10(6, 4).double(), TokenLearnerV11(6, 4).double()
    with torch.no_grad():
        for module in (*v10.attention, v11.mlp.fc1, v11.mlp.fc2):
            for parameter in module.parameters():
                parameter.zero_()
    torch.testing.assert_close(v10(x, (3, 3)), x.sum(1, keepdim=True).expand(-1, 4, -1) / 2)
    torch.testing.assert_close(v11(x), x.mean(1, keepdim=True).expand(-1, 4, -1))


def test_v11_weighs_positions_whatever_their_order():
    module = shake(TokenLearnerV11(6, 4).double())
    x = torch.randn(2, 9, 6, dtype=torch.float64)
    torch.testing.assert_close(module(x), module(x[:, torch.randperm(9)]))
    one_hot = torch.zeros(1, 5, 6, dtype=torch.float64)
    one_hot[0, :, 0] = 1.0  # every position equal in one coordinate: each token must be a convex combination
    torch.testing.assert_close(module(one_hot)[..., 0], torch.ones(1, 4, dtype=torch.float64))


def test_fuser_is_the_released_formula():
    module = shake(TokenFuser(6, 2, bottleneck=5).double())
    y, x = torch.randn(1, 2, 6, dtype=torch.float64), torch.randn(1, 7, 6, dtype=torch.float64)
    w = module.state_dict()

    def norm(t, name):
        return F.layer_norm(t, (6,), w[f"{name}.weight"], w[f"{name}.bias"], 1e-6)

    mixed = torch.zeros(2, 6, dtype=torch.float64)
    for s in range(2):  # over the token axis
        mixed[s] = sum(w["mix.weight"][s, t] * norm(y[0, t], "norm1") for t in range(2)) + w["mix.bias"][s]
    hidden = F.gelu(norm(x[0], "norm") @ w["mlp.fc1.weight"].T + w["mlp.fc1.bias"])
    beta = torch.sigmoid(hidden @ w["mlp.fc2.weight"].T + w["mlp.fc2.bias"])  # [N, S]
    torch.testing.assert_close(module(y, x)[0], beta @ norm(mixed, "norm2"))


def test_fuser_model_starts_as_the_model_without_its_last_blocks():
    """Also through timm's own initialisation."""
    for model in (small(fuser=True, at=2), timm.create_model(
            "vit_base_patch16_tokenlearner8_fuser_224", img_size=32, num_classes=5, **{**SMALL, "at": 2}).double().eval()):
        cut = copy.deepcopy(model)
        cut.blocks = cut.blocks[:2]
        pixels = torch.randn(2, 3, 32, 32, dtype=torch.float64)
        assert torch.equal(model(pixels), cut(pixels))
        assert model.forward_features(pixels).shape == (2, 16, 24)


def test_one_hot_attention_over_all_positions_is_a_plain_gap_vit():
    model = small(num_tokens=16)

    class Identity(nn.Module):
        def forward(self, x, grid_size):
            return x

    plain = build_model(ModelSettings(name="ViT-Ti/16", img_size=32, num_classes=5, kwargs={
        "embed_dim": 24, "depth": 4, "num_heads": 2, "patch_size": 8, **HEADS["gap"]}), seed=9).double().eval()
    shared = {name: tensor for name, tensor in shake(model).state_dict().items() if "token_" not in name}
    plain.load_state_dict(shared, strict=True)  # timm's own keys
    model.token_learners[0] = Identity()
    pixels = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(model(pixels), plain(pixels), rtol=1e-12, atol=1e-12)


def test_tokens_replace_positions_right_before_block_at():
    model, lengths = small(at=1, version="1.0"), []
    for block in model.blocks:
        block.register_forward_hook(lambda module, inputs, output: lengths.append((inputs[0].shape[1], output.shape[1])))
    assert model.forward_features(torch.randn(2, 3, 32, 32, dtype=torch.float64)).shape == (2, 3, 24)
    assert lengths == [(16, 16), (3, 3), (3, 3), (3, 3)]
    lengths.clear()
    fused = small(at=1, fuser=True, version="1.0")
    for block in fused.blocks:
        block.register_forward_hook(lambda module, inputs, output: lengths.append((inputs[0].shape[1], output.shape[1])))
    fused(torch.randn(2, 3, 32, 32, dtype=torch.float64))
    assert lengths == [(16, 16), (3, 3), (3, 3), (3, 3)] and len(fused.token_learners) == len(fused.token_fusers) == 3


def test_every_registered_name_has_the_count_of_the_papers_arithmetic():
    sizes = {"tiny": (192, 12, 768), "small": (384, 12, 1536), "base": (768, 12, 3072), "large": (1024, 24, 4096)}
    checked = 0
    for name in entries():
        if "tokenlearner" not in name:
            continue
        width, depth, mlp = sizes[name.split("_")[1]]
        words = name.split("_")
        patch, tokens = int(words[2][5:]), int(words[3][12:])
        depth = next((int(word[1:]) for word in words if word[0] == "d" and word[1:].isdigit()), depth)
        at = next((int(word[2:]) for word in words if word[:2] == "at"), depth // 2)
        learner = (2 * width + 9 * width * tokens + 27 * tokens**2 if "v10" in words else
                   2 * width + 64 * width + 64 + 64 * tokens + tokens)
        fuser = 4 * width + tokens**2 + tokens + 2 * width + 64 * width + 64 + 64 * tokens + tokens
        extra = (depth - at) * (learner + fuser) if "fuser" in words else learner
        block = 4 * (width**2 + width) + 2 * width * mlp + mlp + width + 4 * width
        embed, head = (3 * patch**2 + 1) * width + (224 // patch) ** 2 * width, 1000 * (width + 1)
        count = embed + depth * block + 2 * width + extra + head
        assert num_parameters(build_meta(ModelSettings(name=name))) == count, name
        checked += 1
    assert checked == 42
    paper = {10: 442.86, 8: 443.05}  # L/10 and L/8 (24+11); with the 18,291 classes of JFT they are the paper's "460M"
    for patch, millions in paper.items():
        name = f"vit_large_patch{patch}_tokenlearner16_at18_d35_v10_224"
        assert round(num_parameters(build_meta(ModelSettings(name=name))) / 1e6, 2) == pytest.approx(millions, abs=0.015)
        jft = num_parameters(build_meta(ModelSettings(name=name, num_classes=18_291)))
        assert round(jft / 1e6, 2) == {10: 460.58, 8: 460.78}[patch]


def test_pictures_need_not_be_square_nor_of_one_size():
    for version in ("1.0", "1.1"):
        model = small(img_size=(24, 40), version=version)
        assert model(torch.randn(2, 3, 24, 40, dtype=torch.float64)).shape == (2, 5)
        dynamic = small(version=version, dynamic_img_size=True)
        fixed = small(version=version)
        pixels = torch.randn(1, 3, 32, 32, dtype=torch.float64)
        torch.testing.assert_close(dynamic(pixels), fixed(pixels))
        assert dynamic(torch.randn(1, 3, 24, 48, dtype=torch.float64)).shape == (1, 5)


def test_the_timm_surface_is_there():
    model = small(version="1.0", fuser=True)
    assert "pos_embed" in model.no_weight_decay() and model.default_cfg["input_size"] == (3, 32, 32)
    groups = timm.models.group_parameters(model, model.group_matcher())
    of = {name: layer for layer, names in groups.items() for name in names}
    assert of["token_learners.1.norm.weight"] == of["blocks.3.norm1.weight"] == of["token_fusers.1.mix.weight"]
    assert of["pos_embed"] < of["blocks.0.norm1.weight"] < of["token_learners.0.norm.weight"] < of["head.weight"]
    pixels = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    final, found = model.forward_intermediates(pixels, indices=[0, 3], norm=True)
    assert [list(y.shape) for y in found] == [[1, 24, 4, 4]] * 2
    torch.testing.assert_close(final, model.forward_features(pixels))
    torch.testing.assert_close(found[1].flatten(2).transpose(1, 2), final)
    model.reset_classifier(9)
    assert model.get_classifier().out_features == 9 and model(pixels).shape == (1, 9)
    with pytest.raises(ConfigError, match="no rows and columns"):
        small().forward_intermediates(pixels, indices=[3])


def test_compiled_and_exported_models_compute_the_same():
    model = small(version="1.0", fuser=True).float()
    pixels = torch.randn(2, 3, 32, 32)
    expected = model(pixels)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(pixels), expected)
    torch.testing.assert_close(torch.export.export(model, (pixels,)).module()(pixels), expected)


@pytest.mark.parametrize("kwargs, named", [
    ({"at": 4}, "`at` = 4"), ({"num_tokens": 0}, "num_tokens"), ({"version": "2"}, "version"),
    ({"pool": "max"}, "pool"), ({"global_pool": "token"}, "global_pool"), ({"class_token": True}, "class_token"),
    ({"version": "1.0", "patch_drop_rate": 0.5}, "patch_drop_rate")])
def test_impossible_options_are_refused_by_name(kwargs, named):
    with pytest.raises(ConfigError, match=named) as caught:
        small(**kwargs)
    assert caught.value.hint


@pytest.mark.parametrize("kwargs", [{}, {"version": "1.0"}, {"fuser": True}], ids=str)
def test_no_attention_matrix_is_ever_in_memory(kwargs):
    model = small(img_size=88, num_tokens=5, **kwargs)  # 121 positions: a number that nothing else here has
    with torch.no_grad(), Largest({121, 5}) as seen:
        model(torch.randn(2, 3, 88, 88, dtype=torch.float64))
    assert not [shape for _, shape in seen.squares if shape[-1] == shape[-2] == 121]
