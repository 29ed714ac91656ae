"""ViViT: the paper's parameters and multiply-adds, four models against plain loops, and the way from an image ViT."""

import json

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

import tubelet.models
from tubelet.errors import CheckpointError, ConfigError
from tubelet.models.build import build_meta, build_model, hub_config
from tubelet.models.cost import input_shape, macs, num_parameters
from tubelet.models.from_image import from_image
from tubelet.models.names import entries, resolve_name
from tubelet.models.settings import ModelSettings
from tubelet.models.vit import HEADS
from tubelet.models.vivit import ViViT, sampled_frames
from tubelet.models.weights import load_weights

SMALL = {"embed_dim": 24, "depth": 3, "num_heads": 2, "patch_size": 8, "num_frames": 4}
NAMES = [name for name in entries() if name.startswith(("vivit_", "timesformer_"))]


def kinetics(name: str, img_size: int = 224, **kwargs):
    return build_meta(ModelSettings(name=name, img_size=img_size, num_classes=400, kwargs=kwargs))


def small(word: str = "joint", img_size=16, num_classes=5, **kwargs) -> ViViT:
    settings = ModelSettings(name=f"vivit_base_patch16x2_{word}", img_size=img_size, num_classes=num_classes,
                             kwargs={**SMALL, **kwargs})
    return shake(build_model(settings, seed=0)).double().eval()


def image_vit(pool: str = "token", img_size=16, **kwargs):
    settings = ModelSettings(name="ViT-B/16", img_size=img_size, num_classes=5, kwargs={
        key: value for key, value in {**SMALL, **HEADS[pool], **kwargs}.items() if key != "num_frames"})
    return shake(build_model(settings, seed=1)).double().eval()


def shake(module):
    """Away from zeros and ones, so that every term shows."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.2 * torch.randn(parameter.shape)
    return module


def clips(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_parameters_and_macs_are_the_papers():
    base, large = "vivit_base_patch16x2_", "vivit_large_patch16x2_"
    published = [  # parameters with 400 classes, GMACs of a view of 32 frames (table 2 and section 4.1, recomputed)
        (kinetics(f"{base}joint"), 88_954_000, 451.525), (kinetics(f"{base}factorised_encoder"), 115_062_928, 283.342),
        (kinetics(f"{base}factorised_attention"), 117_319_312, 371.094),
        (kinetics(f"{base}factorised_dot"), 88_952_464, 276.182),
        (kinetics(f"{base}factorised_encoder", temporal_depth=0), 86_696_080, 282.859),
        (kinetics(f"{large}joint"), 307_508_624, 1436), (kinetics(f"{large}joint", 288), None, 2895),
        (kinetics(f"{large}joint", 320), None, 3957), (kinetics(f"{large}factorised_encoder"), 354_903_440, 988.2),
        (kinetics(f"{large}factorised_encoder", temporal_depth=24), 606_827_920, 992.5),
        (kinetics("vivit_huge_patch14x2_joint"), 636_945_040, 3959)]
    for model, count, gmacs in published:
        assert count in (None, num_parameters(model))
        assert macs(model) / 1e9 == pytest.approx(gmacs, rel=1e-3)
    assert kinetics(f"{base}joint").patch_embed.grid_size == (16, 14, 14)


def test_tokenlearner_on_clips_costs_what_its_table_of_videos_says():
    large, v10 = "vivit_large_patch16x2_joint", {"version": "1.0"}
    for gmacs, kwargs in [(760.9, {"num_tokens": 16, "at": 12}), (1087.9, {"num_tokens": 8, "at": 18}),
                          (1097.7, {"num_tokens": 8, "at": 18, "depth": 30}),
                          (1608.9, {"num_tokens": 16, "at": 18, "depth": 35, "patch_size": 14}),
                          (4027.8, {"num_tokens": 16, "at": 18, "depth": 35, "patch_size": 10}),
                          (4060, {"num_tokens": 16, "at": 18, "depth": 35, "patch_size": 10, "fuser": True})]:
        assert macs(kinetics(large, **kwargs, **v10)) / 1e9 == pytest.approx(gmacs, rel=1e-3), kwargs


def test_tokens_are_tubelets_in_the_order_of_time_then_rows():
    embed = small(img_size=(24, 16)).patch_embed
    x = clips(1, 3, 4, 24, 16)
    kernel, bias, number = embed.proj.weight, embed.proj.bias, 0
    tokens = embed(x).flatten(1, 2)[0]
    for t in range(2):
        for row in range(3):
            for col in range(2):
                piece = x[0, :, 2 * t:2 * t + 2, 8 * row:8 * row + 8, 8 * col:8 * col + 8]
                torch.testing.assert_close(tokens[number], (kernel * piece).flatten(1).sum(1) + bias)
                number += 1
    assert number == len(tokens)


def test_sampled_frames_are_the_authors_and_embedded_as_images():
    for num_frames, count in [(32, 8), (32, 16), (16, 3), (250, 32), (7, 7), (5, 4)]:
        step = num_frames / (count + 1) if count < num_frames else 1
        expected = np.round(np.arange(step if count < num_frames else 0, num_frames, step)).astype(int)[:count]
        assert sampled_frames(num_frames, count) == np.minimum(expected, num_frames - 1).tolist()
    model, image = small("factorised_encoder", num_frames=9, sample_frames=3, temporal_depth=0), image_vit()
    from_image(model, image.state_dict())
    x = clips(2, 3, 9, 16, 16)
    picked = torch.stack([image.forward_head(image.forward_features(x[:, :, t]), pre_logits=True) for t in (2, 4, 7)], 1)
    torch.testing.assert_close(model.forward_slices(x), picked)  # 9 / 4 = 2.25, 4.5, 6.75, halves to even


def attend(w, name, x, heads):
    """Attention of one sequence [N, D] by products and exponentials; yields the outputs of the heads."""
    q, k, v = (x @ w[f"{name}.qkv.weight"].T + w[f"{name}.qkv.bias"]).chunk(3, -1)
    for qh, kh, vh in zip(q.chunk(heads, -1), k.chunk(heads, -1), v.chunk(heads, -1)):
        scores = (qh @ kh.T / kh.shape[-1] ** 0.5).exp()
        yield scores / scores.sum(-1, keepdim=True) @ vh


def linear(w, name, x):
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def norm(w, name, x):
    x = x - x.mean(-1, keepdim=True)
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]


def gelu(x):
    return 0.5 * x * (1 + torch.erf(x / 2**0.5))


@pytest.mark.parametrize("word,order", [("factorised_attention", "time_space"), ("factorised_attention", "space_time"),
                                        ("factorised_dot", None)])
def test_factorised_models_are_loops_over_slices_and_positions(word, order):
    model = small(word, img_size=(24, 16), num_frames=8, num_heads=4, **({"attention_order": order} if order else {}))
    w, x = model.state_dict(), clips(1, 3, 8, 24, 16)
    z = (model.patch_embed(x).flatten(1, 2) + w["pos_embed"])[0]  # [T * N, D], T = 4, N = 6
    slices = [[t * 6 + p for p in range(6)] for t in range(4)]
    columns = [[t * 6 + p for t in range(4)] for p in range(6)]
    for i in range(3):
        block = f"blocks.{i}"
        if order:
            for axis in order.split("_"):
                ours, lists = (("temporal_", columns) if axis == "time" else ("", slices))
                y = torch.zeros_like(z)
                for rows in lists:
                    heads = attend(w, f"{block}.{ours}attn", norm(w, f"{block}.{ours}norm1", z[rows]), 4)
                    y[rows] = linear(w, f"{block}.{ours}attn.proj", torch.cat([*heads], -1))
                z = z + y
        else:
            y, normed = torch.zeros_like(z), norm(w, f"{block}.norm1", z)
            for lists, half in ((columns, slice(0, 2)), (slices, slice(2, 4))):
                for rows in lists:
                    for number, head in [*enumerate(attend(w, f"{block}.attn", normed[rows], 4))][half]:
                        y[rows, 6 * number:6 * number + 6] = head
            z = z + linear(w, f"{block}.attn.proj", y)
        z = z + linear(w, f"{block}.mlp.fc2", gelu(linear(w, f"{block}.mlp.fc1", norm(w, f"{block}.norm2", z))))
    torch.testing.assert_close(model(x)[0], linear(w, "head", norm(w, "norm", z).mean(0)), rtol=1e-9, atol=1e-9)


# ------------------------------------------------------------------------------------------- from an image ViT


def test_one_tubelet_is_the_image_model_on_its_central_frame():
    image, x = image_vit(), clips(2, 3, 4, 16, 16)
    for frames, central in ((2, 1), (3, 1), (4, 2)):
        model = small(num_frames=frames, tubelet_size=frames)
        report = from_image(model, image.state_dict(), head="auto")
        torch.testing.assert_close(model(x[:, :, :frames]), image(x[:, :, central]))
    assert report.names("resized") == ["patch_embed.proj.weight"] and not report.names("new")


def test_model_2_sees_slices_as_the_image_model_sees_frames():
    x = clips(2, 3, 4, 16, 16)
    for pool in ("token", "gap"):
        image = image_vit(pool)
        model = small("factorised_encoder", class_token=pool == "token")
        temporal = {name: value.clone() for name, value in model.state_dict().items() if name.startswith("temporal_")}
        report = from_image(model, image.state_dict())
        features = [image.forward_head(image.forward_features(x[:, :, t]), pre_logits=True) for t in (1, 3)]
        torch.testing.assert_close(model.forward_slices(x), torch.stack(features, 1))
        assert all(torch.equal(model.state_dict()[name], value) for name, value in temporal.items())
        assert set(temporal) < set(report.names("new")) and not model.head.weight.any()


@pytest.mark.parametrize("kernel", ["central", "average"])
def test_on_a_still_clip_averaging_models_are_their_image_model(kernel):
    frame = clips(2, 3, 16, 16)
    still = frame.unsqueeze(2).expand(-1, -1, 4, -1, -1)
    for word, pool, kwargs in (("joint", "gap", {"class_token": False}), ("factorised_attention", "gap", {}),
                               ("factorised_encoder", "token", {"temporal_depth": 0})):
        image, model = image_vit(pool), small(word, **kwargs)
        from_image(model, image.state_dict(), kernel=kernel, head="keep")
        torch.testing.assert_close(model(still), image(frame), rtol=1e-9, atol=1e-9)


def test_model_3_begins_as_the_image_model_on_each_slice_and_learns_to_attend_over_time():
    image, model, x = image_vit("gap"), small("factorised_attention"), clips(2, 3, 4, 16, 16)
    report = from_image(model, image.state_dict())
    features = torch.stack([image.forward_features(x[:, :, t]) for t in (1, 3)], 1)
    torch.testing.assert_close(model.forward_features(x), features.flatten(1, 2))
    assert [name for name in report.names("new") if "attn" in name] == [
        f"blocks.{i}.temporal_attn.proj.{leaf}" for i in range(3) for leaf in ("weight", "bias")]
    torch.nn.init.normal_(model.head.weight)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for step in range(2):  # zero in q, k, v too would leave all of them without gradient for ever
        optimizer.zero_grad()
        model(x).square().mean().backward()
        for block in model.blocks:
            assert block.temporal_attn.proj.weight.grad.abs().max() > 0
            assert (block.temporal_attn.qkv.weight.grad.abs().max() > 0) == bool(step)
        optimizer.step()
    copied = small("factorised_attention")
    from_image(copied, image.state_dict(), temporal="copy")
    assert torch.equal(copied.blocks[2].temporal_attn.proj.weight, copied.blocks[2].attn.proj.weight)


def test_positions_are_tiled_and_other_grids_are_resampled_on_request():
    image, model = image_vit(), small(img_size=24)
    with pytest.raises(CheckpointError, match="2 x 2 patches, a slice of the model 3 x 3") as caught:
        from_image(model, image.state_dict())
    assert "resize" in caught.value.hint
    from_image(model, image.state_dict(), positions="resize")
    table, old = model.pos_embed.reshape(1, 19, 24)[0], image.pos_embed[0]
    assert torch.equal(table[1:10], table[10:]) and torch.equal(table[0], old[0])
    torch.testing.assert_close(table[1:10][[0, 2, 6, 8]], old[1:].float().double())  # corners stay
    torch.testing.assert_close(table[5], old[1:].mean(0), rtol=1e-5, atol=1e-6)
    gap = small(class_token=False)
    report = from_image(gap, image.state_dict())
    assert set(report.names("dropped")) == {"cls_token", "pos_embed[0]", "head.weight", "head.bias"}
    torch.testing.assert_close(gap.pos_embed[0], image.pos_embed[0, 1:].repeat(2, 1))
    with pytest.raises(CheckpointError, match="class token") as caught:
        from_image(small(), image_vit("gap").state_dict())
    assert "class_token=false" in caught.value.hint
    with pytest.raises(CheckpointError, match="blocks"):
        from_image(small(), image_vit(depth=4).state_dict())


def test_weights_of_other_sizes_and_lengths_come_in_resampled_and_others_are_refused():
    def grid(table, slices, side):  # [1, D, T, H, W]
        return table[:, 1:].unflatten(1, (slices, side, side)).movedim(-1, 1)

    source = small("joint", num_frames=8)  # 4 slices of 2 x 2
    for changes, slices, side in (({"img_size": 32, "num_frames": 8}, 4, 4), ({"num_frames": 4}, 2, 2),
                                  ({"num_frames": 20}, 10, 2)):
        model = small("joint", **changes)
        report = load_weights(model, source.state_dict(), method="bilinear_align_corners")
        expected = F.interpolate(grid(source.pos_embed, 4, 2), (slices, side, side), mode="trilinear", align_corners=True)
        torch.testing.assert_close(grid(model.pos_embed, slices, side), expected, rtol=1e-5, atol=1e-6)
        assert torch.equal(model.pos_embed[:, 0], source.pos_embed[:, 0])
        assert report.names("resized") == ["pos_embed"] and "pos_embed" not in report.names("loaded")
    source, model = small("factorised_encoder"), small("factorised_encoder", img_size=32, num_frames=8)
    report = load_weights(model, source.state_dict(), method="bilinear_align_corners")
    assert set(report.names("resized")) == {"pos_embed", "temporal_pos_embed"}
    expected = F.interpolate(source.temporal_pos_embed[:, 1:].movedim(1, 2), size=4, mode="linear", align_corners=True)
    torch.testing.assert_close(model.temporal_pos_embed[:, 1:], expected.movedim(2, 1), rtol=1e-5, atol=1e-6)
    with pytest.raises(CheckpointError, match="1 x 13 x 24 in the weights, 1 x 129 x 24 in the model"):
        load_weights(small("joint", img_size=32, num_frames=16), small("joint", img_size=(16, 24)).state_dict())


def test_learned_tokens_of_a_slice_know_nothing_of_other_slices():
    for kwargs in ({"version": "1.0"}, {"version": "1.1"}, {"version": "1.1", "fuser": True}):
        model = small(num_tokens=3, at=1, **kwargs)
        assert model.cls_token is None
        seen: list[torch.Tensor] = []
        model.token_learners[0].register_forward_hook(lambda module, args, out, seen=seen: seen.append(out))
        model.blocks[0] = torch.nn.Identity()  # what comes before has mixed nothing
        x = clips(2, 3, 4, 16, 16)
        tokens = model.forward_features(x)
        assert tokens.shape == (2, 8 if "fuser" in kwargs else 6, 24)
        x[1, :, 2:] += 1  # the second slice of the second clip: number 3 of 4
        model.forward_features(x)
        same = [torch.equal(a, b) for a, b in zip(*seen)]
        assert same == [True, True, True, False]
    by_frame = small("factorised_encoder", num_tokens=3, at=1)
    assert by_frame.forward_slices(x).shape == (2, 2, 24)


# ------------------------------------------------------------------------------------------------- as a model here


def small_of(name: str, **kwargs):
    sizes = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 8, "num_frames": 4, **kwargs}
    return shake(build_model(ModelSettings(name=name, img_size=16, num_classes=5, kwargs=sizes), seed=0))


@pytest.mark.parametrize("name", NAMES)
def test_every_registered_model_trains_recomputes_and_takes_bf16(name):
    assert tubelet.models and timm.is_model(name)
    model, gradients = small_of(name), []
    assert input_shape(model) == (3, 4, 16, 16)
    pixels = torch.randn(2, *input_shape(model))
    for checkpointing in (False, True):
        model.zero_grad()
        model.set_grad_checkpointing(checkpointing)
        logits = model(pixels)
        assert logits.shape == (2, 5) and logits.isfinite().all()
        logits.square().sum().backward()
        gradients.append({key: p.grad.clone() for key, p in model.named_parameters()})
    for key, gradient in gradients[0].items():
        assert gradient.abs().max() > 0, f"{key} gets no gradient"
        torch.testing.assert_close(gradients[1][key], gradient)
    assert model.bfloat16()(pixels.bfloat16()).isfinite().all()
    assert {key for key in model.state_dict() if key.endswith(("_token", "_embed"))} == set(model.no_weight_decay()) & set(
        model.state_dict())
    grouped = [key for keys in timm.models.group_parameters(model, model.group_matcher()).values() for key in keys]
    assert sorted(grouped) == sorted(key for key, _ in model.named_parameters())
    model.reset_classifier(7)
    assert model.get_classifier().out_features == 7


@pytest.mark.parametrize("name,kwargs", [
    *((name, {}) for name in NAMES if "_base_" in name),
    ("vivit_base_patch16x2_joint", {"num_tokens": 3, "fuser": True}), ("vivit_base_patch16x2_joint", {"sample_frames": 2}),
    ("vivit_base_patch16x2_factorised_encoder", {"num_tokens": 3, "version": "1.0"})])
def test_compiled_and_exported_models_answer_the_same_and_the_authors_names_lead_back(name, kwargs):
    model = small_of(name, **kwargs).eval()
    pixels = torch.randn(2, *input_shape(model))
    with torch.no_grad():
        expected = model(pixels)
        torch.testing.assert_close(torch.compile(model, backend="aot_eager", fullgraph=True)(pixels), expected)
        torch.testing.assert_close(torch.export.export(model, (pixels,)).module()(pixels), expected)
    torch.compiler.reset()
    state = tubelet.models.official_state_dict(model)
    assert sum(tensor.numel() for tensor in state.values()) == num_parameters(model)
    other = build_model(ModelSettings(name=name, img_size=16, num_classes=5, kwargs={
        "embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 8, "num_frames": 4, **kwargs}), seed=9).eval()
    tubelet.models.load_official(other, state)
    assert all(torch.equal(other.state_dict()[key], value) for key, value in model.state_dict().items())
    last = sorted(key for key in state if "encoderblock_1" in key or "blocks.1" in key)[-1]
    with pytest.raises(CheckpointError, match="block.*not in the weights"):
        tubelet.models.load_official(other, {key: value for key, value in state.items() if key != last})
    with pytest.raises(CheckpointError, match="stranger"):
        tubelet.models.load_official(other, {**state, "stranger.weight": torch.zeros(2)})


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vivit_base_patch16x2_factorised_encoder", "vivit_base_patch16x2_factorised_dot",
                                  "timesformer_base_divided"])
def test_inductor_answers_the_same(name):
    model = small_of(name).eval()
    pixels = torch.randn(2, *input_shape(model))
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model)(pixels), model(pixels), rtol=1e-4, atol=1e-4)
    torch.compiler.reset()


def test_authors_names_and_shapes_are_those_of_the_jax_tree():
    state = tubelet.models.official_state_dict(small("factorised_encoder", temporal_depth=1))
    assert {key: tuple(value.shape) for key, value in state.items() if "encoderblock" not in key} == {
        "embedding/kernel": (2, 8, 8, 3, 24), "embedding/bias": (24,), "cls_SpatialTransformer": (1, 1, 24),
        "cls_TemporalTransformer": (1, 1, 24), "SpatialTransformer/posembed_input/pos_embedding": (1, 5, 24),
        "TemporalTransformer/posembed_input/pos_embedding": (1, 3, 24), "output_projection/kernel": (24, 5),
        "output_projection/bias": (5,), **{f"{part}Transformer/encoder_norm/{leaf}": (24,)
                                           for part in ("Spatial", "Temporal") for leaf in ("scale", "bias")}}
    state = tubelet.models.official_state_dict(small("factorised_attention"))
    block = "Transformer/encoderblock_2"
    assert {key.removeprefix(f"{block}/").rpartition("/")[0] for key in state if key.startswith(block)} == {
        "LayerNorm_time", "LayerNorm_space", "LayerNorm_mlp", "MlpBlock/Dense_0", "MlpBlock/Dense_1",
        *(f"MultiHeadDotProductAttention_{axis}/{part}" for axis in ("time", "space")
          for part in ("query", "key", "value", "out"))}
    assert state[f"{block}/MultiHeadDotProductAttention_time/key/kernel"].shape == (24, 2, 12)


def test_timm_rebuilds_an_export_from_its_config(tmp_path):
    settings = ModelSettings(name="vivit_base_patch16x2_factorised_encoder", img_size=(16, 24), num_classes=4, kwargs=SMALL)
    model = build_model(settings, seed=0).eval()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(hub_config(model, settings)))
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    pixels = torch.randn(1, 3, 4, 16, 24)
    assert torch.equal(again(pixels), model(pixels)) and again.pretrained_cfg["input_size"] == (3, 4, 16, 24)


def test_stochastic_depth_rescales_or_not_and_the_head_starts_at_zero():
    for rescale, kept in ((True, 2.0), (False, 1.0)):
        settings = ModelSettings(name="vivit_base_patch16x2_factorised_attention", img_size=16, drop_path_rate=0.5,
                                 head_init="zero", kwargs={**SMALL, "drop_path_rescale": rescale})
        model = build_model(settings, seed=0)
        assert [getattr(block.drop_path1, "drop_prob", 0) for block in model.blocks] == [0, 0.25, 0.5]
        assert model.blocks[2].drop_path1.train()(torch.ones(64, 2, 3, 4)).unique().tolist() == [0, kept]
        assert not model(torch.randn(1, 3, 4, 16, 16)).any()


def test_papers_names_lead_to_the_models():
    for name, known in (("ViViT-L/16x2", "vivit_large_patch16x2_joint"), ("TimeSformer", "timesformer_base_divided"),
                        ("ViViT-B/16x2 FE", "vivit_base_patch16x2_factorised_encoder")):
        assert resolve_name(name) == known and known in entries()


def test_what_does_not_fit_is_said_with_both_numbers():
    model = small()
    for shape, numbers in [((1, 3, 8, 16, 16), "8 frames .* 4"), ((1, 3, 4, 16, 24), "16 x 24 .* 16 x 16"),
                           ((1, 3, 16, 16), "3, 16, 16.* 3, frames"), ((1, 1, 4, 16, 16), "1, 4, .* 3, frames")]:
        with pytest.raises(ConfigError, match=numbers):
            model(torch.zeros(shape, dtype=torch.float64))
    wrong = {"num_frames": 5, "embed_dim": 25, "at": 3, "num_tokens": 2, "class_token": True}
    with pytest.raises(ConfigError) as caught:
        build_meta(ModelSettings(name="vivit_base_patch16x2_joint", img_size=20, kwargs={**SMALL, **wrong}))
    text = str(caught.value)
    assert all(part in text for part in ("`num_frames` = 5", "`tubelet_size` = 2", "`embed_dim` = 25", "`num_heads` = 2",
                                         "`at` = 3", "3 blocks", "`img_size` = 20", "`patch_size` = 8", "class_token"))
    with pytest.raises(ConfigError, match="`num_heads` = 3"):
        build_meta(ModelSettings(name="vivit_base_patch16x2_factorised_dot", img_size=16, kwargs={**SMALL, "num_heads": 3}))
    with pytest.raises(ConfigError, match="6 of `num_frames` = 4"):
        small(sample_frames=6)
    with pytest.raises(CheckpointError, match="4 heads, the model has 2"):
        model.load_official(small(num_heads=4).official_state_dict())
